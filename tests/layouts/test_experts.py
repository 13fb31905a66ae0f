"""Rules of experts and of latent attention: what a rank holds, what is refused, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.errors import PlanError
from shardtool.layouts.experts import local_experts
from shardtool.layouts.rules import Dims, Source
from shardtool.layouts.vocabulary import RULES
from shardtool.recipe import Share
from tests.strategies import Array, run

TPS = st.sampled_from([1, 2, 3, 4, 6, 8])
SMALL = st.integers(1, 4)
EXPERTS = st.integers(1, 9)


def dims(experts: int = 4, *, ep: bool = False, **config: Any) -> Dims:
    return Dims(6, 6, 4, 100, experts, ep, config)


def numbered(*shapes: tuple[int, ...]) -> list[Array]:
    """Arrays whose elements are all different, and none of them 0."""
    found, first = [], 1
    for shape in shapes:
        size = int(np.prod(shape))
        found.append(np.arange(first, first + size).reshape(shape))
        first += size
    return found


def cut(rule: str, held: Sequence[Array], said: Dims, tp: int, *, each: bool = False) -> tuple[Share, ...]:
    """The shares of a rule. ``each``: the first dimension of the arrays is the expert, whose tensors lie apart."""
    numbers = tuple(range(said.experts)) if each else ()
    sources = [Source(f"s{i}" + ".{e}" * each, a.shape[each:], numbers) for i, a in enumerate(held)]
    return RULES[rule].cut("target", sources, said, tp)


def ranks(rule: str, held: Sequence[Array], said: Dims, tp: int, *, each: bool = False) -> dict[int, Array]:
    """What every rank holds that holds anything."""
    names: Mapping[str, Array] = {f"s{i}": array for i, array in enumerate(held)}
    if each:
        names = {f"s{i}.{e}": array[e] for i, array in enumerate(held) for e in range(said.experts)}
    found = {}
    for share in cut(rule, held, said, tp, each=each):
        for rank in share.ranks:
            assert rank not in found
            found[rank] = run(share.expanded(), share.shape, lambda name: names[name], share.fill)
    return found


def same(found: Mapping[int, Array], wanted: Mapping[int, Array]) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[rank], wanted[rank]) for rank in wanted)


def slices(full: Callable[[Callable[[Array, int], Array]], Array], tp: int) -> dict[int, Array]:
    """What ``full(mine)`` says for every rank, where mine(array, axis) is the rank's slice of an array."""

    def mine(r: int) -> Callable[[Array, int], Array]:
        return lambda array, axis: np.split(array, tp, axis)[r]

    return {r: full(mine(r)) for r in range(tp)}


def some(stack: Array, experts: int, tp: int) -> dict[int, Array]:
    """The experts of every rank that has one."""
    return {r: part for r, part in enumerate(np.array_split(stack, tp)) if len(part)}


@given(st.integers(1, 40), TPS)
def test_experts_are_dealt_in_runs_the_first_ranks_one_more(experts: int, tp: int):
    wanted = np.array_split(np.arange(experts), tp)
    assert [list(local_experts(experts, tp, r)) for r in range(tp)] == [list(part) for part in wanted]


@given(TPS, EXPERTS, SMALL, SMALL, st.booleans(), st.booleans())
def test_gate_up_is_each_experts_rows_of_gate_over_its_rows_of_up(
    tp: int, experts: int, n: int, hidden: int, each: bool, fused: bool
):
    gate, up = numbered((experts, n * tp, hidden), (experts, n * tp, hidden))
    held = [np.concatenate([gate, up], 1)] if fused or not each else [gate, up]
    wanted = slices(lambda mine: np.concatenate([mine(gate, 1), mine(up, 1)], 1), tp)
    assert same(ranks("experts_gate_up", held, dims(experts), tp, each=each), wanted)
    assert same(
        ranks("experts_gate_up", held, dims(experts, ep=True), tp, each=each),
        some(np.concatenate([gate, up], 1), experts, tp),
    )


@given(TPS, EXPERTS, SMALL, SMALL, st.booleans())
def test_down_is_each_experts_columns(tp: int, experts: int, n: int, hidden: int, each: bool):
    held = numbered((experts, hidden, n * tp))
    assert same(ranks("experts_down", held, dims(experts), tp, each=each), slices(lambda mine: mine(held[0], 2), tp))
    assert same(ranks("experts_down", held, dims(experts, ep=True), tp, each=each), some(held[0], experts, tp))


@given(TPS, EXPERTS, SMALL, SMALL, st.booleans())
def test_swapped_rules_turn_each_expert_and_keep_pairs_together(tp: int, experts: int, n: int, hidden: int, each: bool):
    (both,) = numbered((experts, hidden, 2 * n * tp))
    turned = both.swapaxes(1, 2)
    assert same(
        ranks("swapped_gate_up", [both], dims(experts), tp, each=each), slices(lambda mine: mine(turned, 1), tp)
    )
    assert same(ranks("swapped_gate_up", [both], dims(experts, ep=True), tp, each=each), some(turned, experts, tp))
    (down,) = numbered((experts, n * tp, hidden))
    turned = down.swapaxes(1, 2)
    assert same(ranks("swapped_down", [down], dims(experts), tp, each=each), slices(lambda mine: mine(turned, 2), tp))
    assert same(ranks("swapped_down", [down], dims(experts, ep=True), tp, each=each), some(turned, experts, tp))


@given(TPS, EXPERTS, SMALL, st.booleans())
def test_biases_of_experts(tp: int, experts: int, n: int, each: bool):
    both, down = numbered((experts, 2 * n * tp), (experts, n))
    assert same(ranks("pairs_bias", [both], dims(experts), tp, each=each), slices(lambda mine: mine(both, 1), tp))
    assert same(ranks("pairs_bias", [both], dims(experts, ep=True), tp, each=each), some(both, experts, tp))
    wanted = {r: down if r == 0 else np.zeros_like(down) for r in range(tp)}
    assert same(ranks("bias_once", [down], dims(experts), tp, each=each), wanted)
    assert same(ranks("bias_once", [down], dims(experts, ep=True), tp, each=each), some(down, experts, tp))


@given(TPS, EXPERTS, SMALL, SMALL, st.booleans())
def test_each_rule_is_read_backwards(tp: int, experts: int, n: int, hidden: int, ep: bool):
    said = dims(experts, ep=ep)
    cases: list[tuple[str, list[tuple[int, ...]], bool]] = [
        ("experts_gate_up", [(experts, n * tp, hidden)] * 2, True),
        ("experts_gate_up", [(experts, 2 * n * tp, hidden)], True),
        ("experts_down", [(experts, hidden, n * tp)], True),
        ("stacked_gate_up", [(experts, 2 * n * tp, hidden)], False),
        ("stacked_down", [(experts, hidden, n * tp)], False),
        ("swapped_gate_up", [(experts, hidden, 2 * n * tp)], False),
        ("swapped_down", [(experts, n * tp, hidden)], False),
        ("pairs_bias", [(experts, 2 * n * tp)], False),
        ("bias_once", [(experts, n)], False),
    ]
    for rule, shapes, each in cases:
        for share in cut(rule, numbered(*shapes), said, tp, each=each):
            assert RULES[rule].unshard(share.shape, len(shapes), said, tp) == tuple(s[each:] for s in shapes)


def test_runs_of_experts_stay_runs():
    """Not a piece for each of 9 experts."""
    held = numbered((9, 4, 2), (9, 4, 2))
    assert [len(share.pieces) for share in cut("experts_gate_up", held, dims(9), 4, each=True)] == [2] * 4
    assert [len(share.pieces) for share in cut("experts_gate_up", held, dims(9, ep=True), 4, each=True)] == [2] * 4


@pytest.mark.parametrize(("rule", "shapes", "each", "why"), [
    ("experts_gate_up", [(4, 6, 2), (4, 6, 2)], True, "the size of the experts 6 cannot be divided by --tp 4"),
    ("experts_gate_up", [(4, 8, 2), (4, 8, 3)], True, r"gate and up are \[8, 2\] and \[8, 3\]"),
    ("experts_gate_up", [(4, 7, 2)], True, "has 7 rows for each expert, which are no gate and up"),
    ("experts_gate_up", [(3, 8, 2)], False, r"has the shape \[3, 8, 2\], but config.json says 4 experts"),
    ("experts_gate_up", [(4, 8)], False, r"has the shape \[4, 8\], which is not one of experts and their 2 sizes"),
    ("experts_gate_up", [(4, 8, 2, 2)], True, r"has the shape \[8, 2, 2\], which is not one of the 2 sizes"),
    ("experts_down", [(4, 2, 6)], True, "the size of the experts 6 cannot be divided by --tp 4"),
    ("swapped_gate_up", [(4, 2, 7)], False, "has 7 elements for each expert, which are no pairs of gate and up"),
    ("swapped_gate_up", [(4, 2, 12)], False, "the size of the experts 6 cannot be divided by --tp 4"),
    ("swapped_down", [(5, 8, 2)], False, r"has the shape \[5, 8, 2\], but config.json says 4 experts"),
    ("pairs_bias", [(4, 9)], False, "has 9 elements for each expert"),
    ("bias_once", [(4,)], False, "which is not one of experts and their 1 sizes"),
])  # fmt: skip
def test_sources_that_are_no_experts_are_refused(rule: str, shapes: list[tuple[int, ...]], each: bool, why: str):
    with pytest.raises(PlanError, match=f"tensor 'target'.*{why}"):
        cut(rule, numbered(*shapes), dims(4), 4, each=each)


# Latent attention


@given(st.sampled_from([1, 2, 3, 6]), SMALL, SMALL)
def test_what_is_cut_by_heads(tp: int, dim: int, other: int):
    down, up = numbered((6 * dim, other), (other, 6 * dim))
    assert same(ranks("by_head", [down], dims(), tp), slices(lambda mine: mine(down, 0), tp))
    assert same(ranks("from_heads", [up], dims(), tp), slices(lambda mine: mine(up, 1), tp))


@pytest.mark.parametrize("rule", ["by_head", "from_heads"])
def test_a_head_is_not_divided(rule: str):
    with pytest.raises(PlanError, match="the number of heads 6 cannot be divided by --tp 4"):
        cut(rule, numbered((24, 24)), dims(), 4)


LATENT = dims(q_lora_rank=5, kv_lora_rank=4, qk_rope_head_dim=2)


@given(TPS)
def test_latent_projections_are_whole_on_every_rank(tp: int):
    q, kv = numbered((5, 3), (6, 3))
    both = np.concatenate([q, kv])
    assert same(ranks("latent", [q, kv], LATENT, tp), dict.fromkeys(range(tp), both))
    assert same(ranks("latent", [both], LATENT, tp), dict.fromkeys(range(tp), both))
    assert RULES["latent"].unshard((11, 3), 2, LATENT, tp) == ((5, 3), (6, 3))
    assert RULES["latent"].unshard((11, 3), 1, LATENT, tp) == ((11, 3),)


@pytest.mark.parametrize("shapes", [[(6, 3), (5, 3)], [(5, 3), (7, 3)], [(10, 3)], [(), (6, 3)]])
def test_latent_projections_of_other_sizes_are_refused(shapes: list[tuple[int, ...]]):
    with pytest.raises(PlanError, match=r"rows, but q_lora_rank, kv_lora_rank and qk_rope_head_dim .* make \[5, 6\]"):
        cut("latent", numbered(*shapes), LATENT, 2)


def test_latent_projections_of_different_widths_are_refused():
    with pytest.raises(PlanError, match="cannot be joined"):
        cut("latent", numbered((5, 3), (6, 2)), LATENT, 1)
