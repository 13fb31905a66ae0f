"""Mosaics: composed and read backwards, they give the bytes that numpy gives.

The arrays stand for bytes: executing a mosaic is one assignment of addressed elements, without a schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.dtypes import DType
from shardtool.errors import PlanError, UnsupportedTransform
from shardtool.layouts.rules import RULES, Dims, Source
from shardtool.mosaic import Logical, check_target, held_once, invert, resolve
from shardtool.plan import Piece, Stored, Tensor, whole
from shardtool.window import Window, flat, row_major
from tests.strategies import Array, Mosaic, Sources, addresses, catalog, layouts, mosaic, mosaics, run, sources, stored


def executed(target: Mosaic, catalogue: dict[str, Tensor], held: Sources) -> Array:
    """The target, resolved over a catalogue and executed over what the stored tensors hold."""
    pieces = resolve(target.tensor, catalogue)
    return run(pieces, target.tensor.shape, lambda source: held[source.key], target.tensor.fill)


def inverted(layout: Sequence[Mosaic], held: Sources) -> dict[str, Tensor]:
    """The logical tensors that a layout's targets hold."""
    inventory = {name: Logical(DType.I64, array.shape) for name, array in held.items()}
    return invert([(target.tensor, stored(target.tensor.name, target.array.shape)) for target in layout], inventory)


# The laws.


@given(st.data())
def test_a_mosaic_of_stored_tensors_is_what_numpy_makes_of_them(data: st.DataObject):
    held = data.draw(sources())
    target = data.draw(mosaics(held))
    assert np.array_equal(executed(target, catalog(held), held), target.array)
    check_target(target.tensor, target.tensor.pieces())


@given(st.data())
def test_a_mosaic_of_mosaics_is_one_mosaic_of_the_stored_tensors(data: st.DataObject):
    held = data.draw(sources())
    first = [data.draw(mosaics(held, f"m{i}")) for i in range(2)]
    middle = {
        m.tensor.name: Tensor(m.tensor.name, DType.I64, m.array.shape, _bound(m, held)) for m in first if m.array.size
    }
    if middle:
        target = data.draw(mosaics({name: m.array for m in first if (name := m.tensor.name) in middle}))
        assert np.array_equal(executed(target, middle, held), target.array)


def _bound(made: Mosaic, held: Sources):
    pieces = resolve(made.tensor, catalog(held))
    return lambda: pieces


@given(st.data())
def test_what_a_layout_holds_can_be_read_back_in_any_other_form(data: st.DataObject):
    """Sources into shards, the shards read as sources, any target of them: as if the shards had never been."""
    held = data.draw(sources())
    layout = data.draw(layouts(held))
    shards = {made.tensor.name: executed(made, catalog(held), held) for made in layout}
    again = inverted(layout, held)
    assert set(again) == set(held)
    for name, array in held.items():
        merged = mosaic(name, array, [Piece(row_major(array.shape), row_major(array.shape), name)])
        assert np.array_equal(executed(merged, again, shards), array)
        assert held_once(name, Logical(DType.I64, array.shape), _windows(layout, name)) is None
    target = data.draw(mosaics(held))
    assert np.array_equal(executed(target, again, shards), target.array)


def _windows(layout: Sequence[Mosaic], name: str) -> list[Window]:
    return [piece.src for made in layout for piece in made.tensor.pieces() if piece.source == name]


DIMS = Dims(heads=8, kv_heads=2, head_dim=3, vocab=70)
CASES = {
    "copy": [(5, 3)],
    "column": [(16, 3)],
    "gate_up": [(16, 3), (16, 3)],
    "row": [(3, 16)],
    "qkv": [(24, 5), (6, 5), (6, 5)],
    "vocab": [(70, 2)],
}


def _ranks(rule: str, tp: int, held: Sources) -> list[Mosaic]:
    """Each rank's target, with the array that its pieces make."""
    found = []
    for share in RULES[rule].cut("t", [Source(name, array.shape) for name, array in held.items()], DIMS, tp):
        array = run(share.expanded(), share.shape, lambda name: held[name], share.fill)
        found += [mosaic(f"rank{rank}", array, share.expanded(), share.fill) for rank in share.ranks]
    return found


@pytest.mark.parametrize("rule", sorted(CASES))
@pytest.mark.parametrize("before", [1, 2, 4, 8])
@pytest.mark.parametrize("after", [1, 2, 4, 8])
def test_ranks_made_from_ranks_are_those_made_from_the_model(rule: str, before: int, after: int):
    held, first = {}, 1
    for i, shape in enumerate(CASES[rule]):
        size = int(np.prod(shape))
        held[f"s{i}"] = np.arange(first, first + size).reshape(shape)
        first += size
    old, new = _ranks(rule, before, held), _ranks(rule, after, held)
    shards = {made.tensor.name: made.array for made in old}
    again = inverted(old, held)
    for target in new:
        pieces = resolve(target.tensor, again)
        check_target(target.tensor, pieces)  # replicas are read once: nothing is written twice
        assert np.array_equal(executed(target, again, shards), target.array)


# Catalogues.


def test_a_tensor_that_one_shard_holds_as_it_is_is_read_as_one_stored_tensor():
    held = {"norm": np.arange(12).reshape(3, 4)}
    layout = [mosaic("t", held["norm"], [Piece(row_major((3, 4)), row_major((3, 4)), "norm")])]
    assert inverted(layout, held)["norm"].stored == stored("t", (3, 4))


def test_a_tensor_that_a_shard_holds_in_another_shape_or_with_neighbours_is_not():
    held = {"norm": np.arange(12).reshape(3, 4)}
    turned = row_major((3, 4)).transpose(1, 0)
    layout = [mosaic("t", held["norm"].T, [Piece(row_major((4, 3)), turned, "norm")])]
    assert inverted(layout, held)["norm"].stored is None


def test_a_source_that_is_not_there_is_refused_by_name():
    target = mosaic("t", np.zeros((2,)), [Piece(flat(0, 2), flat(0, 2), "lost")])
    with pytest.raises(PlanError, match=r"'t' is made of 'lost', which the source does not have"):
        resolve(target.tensor, {})


def test_elements_beyond_the_end_of_a_source_are_refused_and_not_read_from_its_neighbour():
    target = mosaic("t", np.zeros((4,)), [Piece(flat(0, 4), flat(2, 4), "short")])
    with pytest.raises(PlanError, match="'short' that are beyond its 5"):
        resolve(target.tensor, {"short": whole("short", stored("short", (5,)))})


def test_a_piece_that_cites_bytes_already_stays_as_it_is():
    piece = Piece(flat(0, 2), flat(1, 2), Stored("file", DType.I64, (4,), 8))
    assert resolve(mosaic("t", np.zeros((2,)), [piece]).tensor, {}) == (piece,)


# What is missing, and what is there twice.


def _blank(dst: Sequence[Window], size: int, fill: float | None = None) -> None:
    pieces = [Piece(window, window, "s") for window in dst]
    check_target(mosaic("t", np.zeros((size,)), pieces, fill).tensor, pieces)


@given(st.data())
def test_a_target_with_a_piece_taken_out_has_a_gap_unless_it_is_padding(data: st.DataObject):
    target = data.draw(mosaics(data.draw(sources())))
    pieces = list(target.tensor.pieces())
    lost = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
    if lost.dst.size:
        with pytest.raises(PlanError, match=f"{lost.dst.size} of its {target.tensor.size} elements come from nowhere"):
            check_target(target.tensor, pieces)
    check_target(mosaic("t", target.array, pieces, 0.0).tensor, pieces)


@given(st.data())
def test_a_target_with_a_piece_put_in_twice_is_refused(data: st.DataObject):
    target = data.draw(mosaics(data.draw(sources())))
    pieces = list(target.tensor.pieces())
    extra = data.draw(st.sampled_from(pieces))
    if extra.dst.size:
        with pytest.raises(PlanError, match=f"{extra.dst.size} of its elements would be written twice"):
            check_target(target.tensor, [*pieces, extra])


@pytest.mark.parametrize(
    "dst",
    [
        [flat(0, 4), flat(3, 2)],
        [flat(0, 3), flat(2, 3), flat(1, 3)],
        [Window(0, (5, 2), (1, 0))],
        [Window(0, (4, 2), (1, 1))],
    ],
    ids=["overlap", "three overlap", "stands still", "meets itself"],
)
def test_elements_that_are_written_twice_are_refused_however_it_is_said(dst: list[Window]):
    with pytest.raises(PlanError, match="twice"):
        _blank(dst, 5)


@given(st.data())
def test_a_source_whose_last_holder_is_gone_is_found(data: st.DataObject):
    held = data.draw(sources(most=1))
    layout = data.draw(layouts(held))
    gone = data.draw(st.integers(0, len(layout) - 1))
    kept = [made for i, made in enumerate(layout) if i != gone]
    logical = Logical(DType.I64, held["s0"].shape)
    lost = held["s0"].size - len({int(n) for w in _windows(kept, "s0") for n in addresses(w).flat})
    said = held_once("s0", logical, _windows(kept, "s0"))
    assert said == (f"{lost} of the {held['s0'].size} elements of 's0' are in no shard" if lost else None)


def test_windows_beyond_a_source_do_not_stand_for_elements_that_are_lost():
    logical = Logical(DType.I64, (4,))
    assert "beyond its 4" in (held_once("s", logical, [flat(0, 3), flat(7, 1)]) or "")
    assert "cannot be checked" in (held_once("s", logical, [Window(0, (2, 2), (1, 1))]) or "")


def test_geometry_that_no_window_can_say_is_refused_when_it_is_made():
    with pytest.raises(UnsupportedTransform):
        row_major((4, 6)).transpose(1, 0).reshape(24)
