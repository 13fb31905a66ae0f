"""Comparison: every differing element is counted, the first is shown, and bits decide."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.dtypes import DType
from shardtool.plan import Stored, Tensor
from shardtool.schedule import Target, Tile
from shardtool.sinks.compare import BLOCK, CompareSink, Difference, compare
from shardtool.stores.memory import MemoryStore

BYTES = tuple(dtype for dtype in DType if dtype.bits % 8 == 0)


def both(dtype: DType, a: Any, b: Any, first: int = 0) -> Difference | None:
    """Compare arrays of numpy's type for this dtype."""
    left, right = (np.array(x, dtype.numpy).tobytes() for x in (a, b))
    return compare(memoryview(left), memoryview(right), dtype, first)


@given(st.sampled_from(BYTES), st.binary(max_size=64), st.data())
def test_the_differing_elements_are_counted_and_the_first_is_named(dtype: DType, data: bytes, draw: st.DataObject):
    item = dtype.itemsize
    data = data[: len(data) // item * item]
    other = bytearray(data)
    changed = draw.draw(st.sets(st.integers(0, max(0, len(data) // item - 1)), max_size=5)) if data else set()
    for i in changed:
        other[i * item + draw.draw(st.integers(0, item - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    found = compare(memoryview(data), memoryview(bytes(other)), dtype, 100)
    if not changed:
        assert found is None
    else:
        assert found is not None
        assert (found.count, found.first) == (len(changed), 100 + min(changed))


def test_values_are_shown_as_numbers():
    found = both(DType.F32, [1, 2, 3], [1, 5, -3])
    assert found == Difference(2, 1, 2.0, 5.0, 6.0)
    assert both(DType.BF16, [0x3F80, 0x4000], [0x3F80, 0x4040]) == Difference(1, 1, 2.0, 3.0, 1.0)
    assert both(DType.F16, [1, 2], [1, 0.5]) == Difference(1, 1, 2.0, 0.5, 1.5)
    assert both(DType.I64, [1 << 62], [-1]) == Difference(1, 0, 1 << 62, -1, float((1 << 62) + 1))
    assert both(DType.F8_E4M3, [0x38], [0x40]) == Difference(1, 0, 1.0, 2.0, 1.0)
    assert both(DType.BOOL, [1], [0]) == Difference(1, 0, 1, 0, 1.0)


def test_bits_decide_not_values():
    """Zero and minus zero differ, and a not-a-number equals itself."""
    found = both(DType.F32, [0.0], [-0.0])
    assert found is not None
    assert (found.count, found.max_abs) == (1, 0.0)
    assert both(DType.F32, [math.nan], [math.nan]) is None
    found = both(DType.F32, [math.nan, 1], [1, 3])
    assert found is not None
    assert math.isnan(found.max_abs)
    found = both(DType.F32, [math.inf], [-math.inf])
    assert found is not None
    assert found.max_abs == math.inf


def test_blocks_are_added_up():
    a, b = np.zeros(3 * BLOCK, "<f4"), np.zeros(3 * BLOCK, "<f4")
    b[[5, BLOCK + 1, 3 * BLOCK - 1]] = [1, -7, 2]
    assert both(DType.F32, a, b, 10) == Difference(3, 15, 0.0, 1.0, 7.0)


@pytest.mark.parametrize(
    ("first", "shape", "index"), [(0, (2, 3), (0, 0)), (5, (2, 3), (1, 2)), (7, (2, 2, 2), (1, 1, 1)), (0, (), ())]
)
def test_the_first_difference_has_an_index(first: int, shape: tuple[int, ...], index: tuple[int, ...]):
    assert Difference(1, first, 0, 0, 0.0).index(shape) == index


@given(st.integers(1, 30), st.integers(1, 9), st.sets(st.integers(0, 29), max_size=4), st.randoms())
def test_a_sink_finds_what_the_store_holds_otherwise_in_tiles_of_any_order(
    size: int, most: int, changed: set[int], order: random.Random
):
    changed = {i for i in changed if i < size}
    expected = np.arange(size, dtype="<i4")
    held = expected.copy()
    held[list(changed)] += 1000
    store = MemoryStore()
    store.put("x", b"head" + held.tobytes())
    stored = Stored("x", DType.I32, (size,), 4)
    found: list[CompareSink] = []
    sink = CompareSink(store, stored, found)
    target = Target(Tensor("t", DType.I32, (size,), tuple), (), sink, 0, sink.staging)
    released = 0

    def release() -> None:
        nonlocal released
        released += 1

    work = list(range(0, size, most))
    order.shuffle(work)
    for at in work:
        part = expected[at : at + most]
        tile = Tile(target, at * 4, part.nbytes, 0, None)
        memory = memoryview(bytearray(part.nbytes * sink.staging))
        sink.room(tile, memory)[:] = part.tobytes()
        sink.done(tile, memory, release)
    assert released == len(work)
    assert found == ([sink] if changed else [])
    if changed:
        first = min(changed)
        assert sink.difference == Difference(len(changed), first, first, first + 1000, 1000.0)
