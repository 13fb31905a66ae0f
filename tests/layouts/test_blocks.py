"""Tensors put together from sources say the same as numpy does with the sources' elements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from shardtool.errors import PlanError
from shardtool.layouts import blocks
from shardtool.recipe import Series
from shardtool.window import Window

Array = NDArray[Any]


def looked_at(array: Array, window: Window) -> Array:
    """A window on an array, without shardtool."""
    flat = array.reshape(-1)[window.offset :]
    return as_strided(flat, window.shape, tuple(s * array.itemsize for s in window.strides))


def made(shape: tuple[int, ...], parts: Any, sources: Mapping[str, Array]) -> Array:
    """What pieces make of sources; every element once, which shows as no -1 being left."""
    found = np.full(shape, -1, dtype=np.int64)
    for part in parts:
        for piece in part.pieces() if isinstance(part, Series) else (part,):
            place = looked_at(found, piece.dst)
            assert (place == -1).all()
            place[...] = looked_at(sources[str(piece.source)], piece.src)
    return found


def numbered(*shape: int, start: int = 0) -> Array:
    return np.arange(start, start + int(np.prod(shape))).reshape(shape)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.data())
def test_stacked_experts_that_are_joined_and_cut_are_numpys(rows: int, columns: int, count: int, data: st.DataObject):
    sources = {
        f"{x}.{e}": numbered(rows, columns, start=(e * 2 + i) * 100) for e in range(count) for i, x in enumerate("ab")
    }
    a, b = (np.stack([sources[f"{x}.{e}"] for e in range(count)]) for x in "ab")
    one = blocks.join([blocks.stack(blocks.whole(f"{x}.{{e}}", (rows, columns)), count) for x in "ab"], 1)
    wanted = np.concatenate([a, b], axis=1)
    dim = data.draw(st.integers(0, 2))
    start = data.draw(st.integers(0, wanted.shape[dim]))
    length = data.draw(st.integers(0, wanted.shape[dim] - start))
    cut = blocks.narrow(one, dim, start, length)
    wanted = np.take(wanted, range(start, start + length), axis=dim)
    assert cut.shape == wanted.shape
    assert (made(cut.shape, blocks.pieces(cut), sources) == wanted).all()


@given(st.permutations(range(3)))
def test_turned_dimensions_are_numpys(order: list[int]):
    source = numbered(2, 3, 4)
    a, b = order[:2]
    one = blocks.turn(blocks.whole("x", source.shape), a, b)
    wanted = source.swapaxes(a, b)
    assert one.shape == wanted.shape
    assert (made(one.shape, blocks.pieces(one), {"x": source}) == wanted).all()


def test_turned_experts_are_numpys():
    sources = {str(e): numbered(2, 3, start=e * 10) for e in range(3)}
    one = blocks.turn(blocks.stack(blocks.whole("{e}", (2, 3)), 3), 1, 2)
    wanted = np.stack([sources[str(e)].T for e in range(3)])
    assert (made(one.shape, blocks.pieces(one), sources) == wanted).all()


def test_experts_are_one_series():
    (series,) = blocks.pieces(blocks.stack(blocks.whole("x.{e}", (2, 3)), 64))
    assert isinstance(series, Series)
    assert series.numbers == tuple(range(64))
    assert series.dst_step == 6


def test_what_does_not_fit_is_refused():
    x, y = blocks.whole("x", (2, 3)), blocks.whole("y", (2, 4))
    with pytest.raises(PlanError, match=r"\[2, 3\], \[2, 4\] cannot be joined along dimension 0"):
        blocks.join([x, y], 0)
    with pytest.raises(PlanError, match="cannot be joined along dimension 2"):
        blocks.join([x, x], 2)
    with pytest.raises(PlanError, match="no dimensions 0 and 2"):
        blocks.turn(x, 0, 2)
    with pytest.raises(PlanError, match="stacked already"):
        blocks.stack(blocks.stack(x, 2), 2)
    with pytest.raises(PlanError, match="along which experts are stacked"):
        blocks.turn(blocks.stack(x, 2), 0, 1)
