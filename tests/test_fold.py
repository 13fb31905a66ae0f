"""Folding: what is said once for many ranks, experts and layers says, unfolded, what each of them holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.dtypes import DType
from shardtool.errors import UnsupportedModel
from shardtool.fold import Folding, experts, number_in, slotted
from shardtool.plan import Mosaic, Piece, Program
from shardtool.recipe import Series
from shardtool.window import Window, row_major

PARTS = st.sampled_from(["layers", "experts", "w", "0", "1", "2", "3", "10", "007", "1e3", ""])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
WINDOWS = st.builds(Window, st.integers(0, 20), st.just((2, 3)), st.sampled_from([(3, 1), (12, 1), (1, 2)]))
PIECES = st.builds(Piece, WINDOWS, WINDOWS, NAMES)
MOSAICS = st.builds(
    Mosaic,
    st.just(DType.BF16),
    st.just((20, 20)),
    st.lists(PIECES, max_size=6, unique=True).map(tuple),
    st.none() | st.just(0.0),
)
RANKS = st.dictionaries(NAMES, MOSAICS, max_size=5)


def said(mosaic: Mosaic) -> tuple[object, ...]:
    """A mosaic without the order of its pieces."""
    return mosaic.shape, mosaic.fill, sorted(mosaic.pieces, key=repr)


@given(st.lists(RANKS, min_size=1, max_size=3))
def test_every_rank_holds_after_folding_what_it_held_before(ranks: list[dict[str, Mosaic]]):
    folding = Folding()
    for rank, tensors in enumerate(ranks):
        folding.add(rank, tensors.items())
    recipe = folding.recipe()
    for rank, tensors in enumerate(ranks):
        held = {t.name: said(Mosaic(t.dtype, t.shape, t.pieces(), t.fill)) for t in recipe.tensors(rank)}
        assert held == {name: said(mosaic) for name, mosaic in tensors.items()}


def stacked(layer: int, count: int) -> Mosaic:
    """Experts below each other, as engines stack them."""
    shape, one = (count, 4, 2), row_major((4, 2))
    pieces = tuple(Piece(one.moved(8 * e), one, f"m.layers.{layer}.experts.{e}.w") for e in range(count))
    return Mosaic(DType.BF16, shape, pieces)


def test_ranks_experts_and_layers_that_are_alike_are_said_once():
    folding = Folding()
    for rank in range(2):
        folding.add(rank, [(f"m.layers.{i}.w", stacked(i, 8)) for i in range(4)])
    (rule,) = folding.recipe().rules
    assert (rule.name, rule.index) == ("m.layers.{i}.w", (0, 1, 2, 3))
    (share,) = rule.shares
    assert share.ranks == (0, 1)
    (series,) = share.pieces
    one = row_major((4, 2))
    assert series == Series(Piece(one, one, "m.layers.{i}.experts.{e}.w"), tuple(range(8)), 8, 0)


def test_a_layer_of_the_same_number_as_an_expert_is_not_confused_with_it():
    folding = Folding()
    folding.add(0, [(f"m.layers.{i}.w", stacked(i, 8)) for i in (3, 7)])
    (rule,) = folding.recipe().rules
    assert rule.index == (3, 7)


def test_experts_at_uneven_distances_stay_pieces_or_become_several_series():
    one = row_major((2,))
    offsets = [0, 2, 4, 6, 20, 22, 24, 31]
    found = experts(Piece(one.moved(at), one, f"e.{n}.w") for n, at in enumerate(offsets))
    assert [len(p.numbers) if isinstance(p, Series) else 1 for p in found] == [4, 3, 1]


def test_the_numbers_of_layers_inside_programs_are_folded_too():
    one = row_major((2,))

    def computed(i: int) -> Mosaic:
        source = Mosaic(DType.F32, (2,), (Piece(one, one, f"layers.{i}.a"),))
        return Mosaic(DType.F32, (2,), (Piece(one, one, Program("neg", (source,), DType.F32, (2,))),))

    folding = Folding()
    folding.add(0, [(f"layers.{i}.b", computed(i)) for i in range(3)])
    (rule,) = folding.recipe().rules
    assert rule.index == (0, 1, 2)
    assert [list(p.sources()) for p in rule.programs()] == [["layers.{i}.a"]]


@pytest.mark.parametrize(
    ("name", "found"),
    [("a.3.b", (1, 3)), ("3", (0, 3)), ("a.03.4", (2, 4)), ("a3.b", None), ("a.1234567890", None), ("a.².1", (2, 1))],
)
def test_numbers_are_parts_of_their_own(name: str, found: tuple[int, int] | None):
    assert number_in(name) == found


def test_only_the_first_of_equal_numbers_becomes_the_slot():
    assert slotted("l.3.e.3.w", 3, "{i}") == "l.{i}.e.3.w"
    assert slotted("l.13.w", 3, "{i}") == "l.13.w"


@pytest.mark.parametrize("name", ["a.{i}.b", "a.{e}"])
def test_names_with_slots_in_them_are_refused(name: str):
    with pytest.raises(UnsupportedModel, match="the slots of recipes"):
        Folding().add(0, [(name, Mosaic(DType.F32, (), ()))])
    piece = Piece(row_major(()), row_major(()), name)
    with pytest.raises(UnsupportedModel, match="the slots of recipes"):
        Folding().add(0, [("t", Mosaic(DType.F32, (), (piece,)))])
