"""Rules of quantized tensors: cutting what is packed is cutting what it stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.errors import PlanError
from shardtool.layouts.packed import MX_BACKENDS, RULES
from shardtool.layouts.rules import Dims, Source
from shardtool.layouts.vocabulary import RULES as ALL
from tests.layouts.test_rules import DIMS, attentions, numbered, same
from tests.strategies import Array, run

TPS = st.sampled_from([1, 2, 3, 4])


def ranks(rule: str, held: Mapping[str, Array], tp: int, dims: Dims = DIMS) -> list[Array]:
    """What every rank holds under a rule."""
    found: dict[int, Array] = {}
    for share in ALL[rule].cut("target", [Source(name, array.shape) for name, array in held.items()], dims, tp):
        array = run(tuple(share.expanded()), share.shape, lambda name: held[name], share.fill)
        found.update(dict.fromkeys(share.ranks, array))
    return [found[rank] for rank in range(tp)]


UNITS = st.integers(1, 4)


@given(attentions(), UNITS, st.booleans())
def test_heads_in_units_are_those_of_the_elements(sizes: tuple[Dims, int], unit: int, fused: bool):
    """Each entry repeated as often as it has elements, cut by ``qkv``, and every so many taken again."""
    dims, tp = sizes
    wide = Dims(dims.heads, dims.kv_heads, dims.head_dim * unit, 1)
    held = numbered(*[(n * dims.head_dim, 2) for n in (dims.heads, dims.kv_heads, dims.kv_heads)])
    elements = {name: np.repeat(array, unit, 0) for name, array in held.items()}
    wanted = [array[::unit] for array in ranks("qkv", elements, tp, wide)]
    sources = {"s": np.concatenate(list(held.values()))} if fused else held
    assert same(ranks("qkv_units", sources, tp, wide), wanted)
    flipped = {name: np.ascontiguousarray(array.T) for name, array in sources.items()}
    assert same(ranks("qkv_across", flipped, tp, wide), [array.T for array in wanted])


@given(TPS, st.integers(1, 4), st.booleans())
def test_gate_and_up_across_are_gate_and_up_with_rows_and_columns_exchanged(tp: int, n: int, fused: bool):
    held = numbered((n * tp, 3), (n * tp, 3))
    sources = {"s": np.concatenate(list(held.values()))} if fused else held
    flipped = {name: np.ascontiguousarray(array.T) for name, array in sources.items()}
    assert same(ranks("gate_up_across", flipped, tp), [array.T for array in ranks("gate_up", held, tp)])


@given(TPS)
def test_latent_parts_are_whole_on_every_rank(tp: int):
    held = numbered((4, 3), (2, 3))
    assert same(ranks("stacked", held, tp), [np.concatenate(list(held.values()))] * tp)
    flipped = {name: np.ascontiguousarray(array.T) for name, array in held.items()}
    assert same(ranks("joined_across", flipped, tp), [np.concatenate(list(held.values())).T] * tp)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(("rule", "parts"), [("one_scalar", 1), ("two_scalars", 2), ("three_scalars", 3)])
def test_numbers_of_fused_parts_stand_next_to_each_other(rule: str, parts: int, shape: tuple[int, ...]):
    assert same(ranks(rule, numbered(*[shape] * parts), 2), [np.arange(1, parts + 1)] * 2)
    assert same(ranks(rule, numbered(shape), 2), [np.ones(parts, np.int64)] * 2)  # one for all


def test_constants_and_bare_numbers():
    assert same(ranks("minus_one", {}, 2), [np.full((), -1)] * 2)
    assert same(ranks("one", {}, 2), [np.ones(1)] * 2)
    assert same(ranks("zero", {}, 2), [np.zeros(1)] * 2)
    assert same(ranks("bare_scalar", numbered((1,)), 2), [np.ones(())] * 2)


def of_experts(
    rule: str, held: Mapping[str, Array], tp: int, dims: Dims, numbered_sources: bool = True
) -> dict[int, Array]:
    """What every rank holds of sources that are ``[experts, ...]`` here and one tensor for each in the checkpoint."""
    experts = tuple(range(dims.experts))
    sources = [
        Source(f"{name}.{{e}}", array.shape[1:], experts) if numbered_sources else Source(name, array.shape)
        for name, array in held.items()
    ]

    def lookup(name: str) -> Array:
        stem, _, number = name.partition(".")
        return held[stem][int(number)] if number else held[stem]

    found: dict[int, Array] = {}
    for share in ALL[rule].cut("target", sources, dims, tp):
        array = run(tuple(share.expanded()), share.shape, lookup, share.fill)
        found.update(dict.fromkeys(share.ranks, array))
    return found


def mine(array: Array, tp: int, rank: int, axis: int, dims: Dims) -> Array:
    """A rank's part of a stack of experts."""
    return np.array_split(array, tp, 0 if dims.expert_parallel else axis)[rank]


@given(TPS, st.integers(4, 6), st.booleans())
def test_numbers_of_experts_are_on_every_rank_or_where_the_expert_is(tp: int, experts: int, ep: bool):
    dims = Dims(1, 1, 1, 1, experts, ep)
    held = numbered((experts,), (experts,))
    for rule, sources, wanted in (
        ("experts_scalar", {"s0": held["s0"]}, held["s0"]),
        ("experts_two_scalars", held, np.stack(list(held.values()), 1)),
    ):
        found = of_experts(rule, sources, tp, dims)
        assert all(np.array_equal(found[r], mine(wanted, tp, r, 0, dims) if ep else wanted) for r in range(tp))


@given(st.sampled_from([1, 2, 4]), st.sampled_from([2, 4]), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_finer_blocks_of_experts_repeat_the_scales_and_are_cut_then(tp: int, factor: int, n: int, k: int, ep: bool):
    dims = Dims(1, 1, 1, 1, 4, ep)
    rows = n * tp if n * tp * factor % tp else n  # blocks that the split may part
    rows = rows if ep or rows * factor % tp == 0 else rows * tp
    held = numbered((4, rows, k), (4, rows, k))
    fine = [np.repeat(np.repeat(array, factor, 1), factor, 2) for array in held.values()]
    found = of_experts(f"gate_up_refined_{factor}", held, tp, dims)
    for r in range(tp):
        assert np.array_equal(found[r], np.concatenate([mine(array, tp, r, 1, dims) for array in fine], 1))
    turned = {"s0": np.ascontiguousarray(held["s0"].transpose(0, 2, 1))}
    found = of_experts(f"down_refined_{factor}", turned, tp, dims)
    for r in range(tp):
        assert np.array_equal(found[r], mine(fine[0].transpose(0, 2, 1), tp, r, 2, dims))


MX: dict[str, tuple[int, ...]] = {  # what follows the experts in the checkpoint, of 192 hidden and 128 intermediate
    "mx_gate_up": (256, 6, 16),
    "mx_gate_up_scale": (256, 6),
    "mx_gate_up_bias": (256,),
    "mx_down": (192, 4, 16),
    "mx_down_scale": (192, 4),
    "mx_down_bias": (192,),
}


def mx_dims(backend: str, ep: bool = False) -> Dims:
    return Dims(1, 1, 1, 1, 4, ep, {"hidden_size": 192, "intermediate_size": 128, "moe_backend": backend})


@pytest.mark.parametrize("backend", ["triton", "marlin", "emulation", "flashinfer_trtllm"])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("ep", [False, True])
@pytest.mark.parametrize("rule", MX)
def test_mxfp4_experts_are_cut_by_blocks_and_padded_to_what_the_backend_asks(
    rule: str, backend: str, tp: int, ep: bool
):
    dims = mx_dims(backend, ep)
    held = numbered((4, *MX[rule]))["s0"]
    found = of_experts(rule, {"s0": held}, tp, dims, numbered_sources=False)
    by_hidden, by_inter = MX_BACKENDS[backend]
    hidden = -(-192 // by_hidden) * by_hidden
    inter = -(-(128 if ep else 128 // tp) // by_inter) * by_inter
    flat = held.reshape(4, held.shape[1], -1) if held.ndim > 2 else held
    each = -(-4 // tp) * 32  # blocks of 32, the last rank may have fewer
    for r in range(tp):
        part = np.array_split(flat, tp)[r] if ep else flat
        if not ep and rule.startswith("mx_gate_up"):
            part = part[:, 2 * r * each : 2 * (r + 1) * each]
        elif not ep and rule == "mx_down_bias":
            part = part if r == 0 else part[:, :0]
        elif not ep:
            per = 32 // (flat.shape[2] // 4)
            part = part[:, :, r * each // per : (r + 1) * each // per]
        outputs, inputs = (2 * inter, hidden) if "gate_up" in rule else (hidden, inter)
        entries = inputs // (32 if "scale" in rule else 2)
        shape = (len(part), outputs) if flat.ndim == 2 else (len(part), outputs, entries)
        wanted = np.zeros(shape, np.int64)
        wanted[tuple(slice(n) for n in part.shape)] = part
        assert np.array_equal(found[r], wanted)


@pytest.mark.parametrize(
    ("rule", "shape", "backend", "said"),
    [
        ("mx_gate_up", (4, 256, 6, 8), "triton", "hidden_size 192 and intermediate_size 128 in config.json make [4"),
        ("mx_down", (4, 192, 4, 16), "b12x", "gets 64 of 128 intermediate elements in blocks of 32, but the"),
    ],
)
def test_mxfp4_experts_that_do_not_fit_are_refused(rule: str, shape: tuple[int, ...], backend: str, said: str):
    with pytest.raises(PlanError, match=re.escape(said)):
        of_experts(rule, {"s0": np.zeros(shape)}, 3, mx_dims(backend), numbered_sources=False)


@pytest.mark.parametrize(
    ("rule", "shapes", "tp", "said"),
    [
        ("qkv_units", [(32, 2), (9, 2), (8, 2)], 2, "its sources have [32, 9, 8] entries for [32, 8, 8] elements"),
        ("qkv_units", [(4, 2), (1, 2), (1, 2)], 4, "are 8 and 4 elements, which cannot be divided into units of 8"),
        ("qkv_units", [(32, 2), (8, 2), (8, 2)], 3, "the number of heads 8 cannot be divided by --tp 3"),
        ("gate_up_across", [(2, 6), (2, 6)], 4, "its size 6 cannot be divided by --tp 4"),
        ("gate_up_across", [(2, 6), (3, 6)], 2, "[2, 6], [3, 6], which cannot be put together"),
        ("one_scalar", [(2,)], 2, "the shape [2], which is not one number"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_its_sizes(rule: str, shapes: list[tuple[int, ...]], tp: int, said: str):
    with pytest.raises(PlanError, match=re.escape(said)):
        ranks(rule, numbered(*shapes), tp)


LATENT = {"q_lora_rank": 32, "kv_lora_rank": 12, "qk_rope_head_dim": 4}
CASES: list[tuple[str, list[tuple[int, ...]], dict[str, Any]]] = [
    ("qkv_units", [(8, 3), (4, 3), (4, 3)], {}),
    ("qkv_units", [(16, 3)], {}),
    ("qkv_across", [(3, 8), (3, 4), (3, 4)], {}),
    ("qkv_across", [(3, 16)], {}),
    ("gate_up_across", [(3, 8), (3, 8)], {}),
    ("gate_up_across", [(3, 16)], {}),
    ("stacked", [(4, 3), (2, 3)], LATENT),
    ("stacked", [(6, 3)], LATENT),
    ("joined_across", [(3, 4), (3, 2)], LATENT),
    ("one_scalar", [()], {}),
    ("bare_scalar", [()], {}),
    ("two_scalars", [()], {}),
    ("three_scalars", [()], {}),
    ("two_scalars", [()] * 2, {}),
    ("three_scalars", [()] * 3, {}),
    *((rule, [], {}) for rule in ("one", "zero", "minus_one")),
    *((rule, [(4, *shape)], dict(mx_dims("triton").config)) for rule, shape in MX.items()),
]
EXPERTS: list[tuple[str, list[tuple[int, ...]]]] = [
    ("experts_scalar", [()]),
    ("experts_two_scalars", [()] * 2),
    ("gate_up_refined_2", [(4, 3)] * 2),
    ("gate_up_refined_4", [(4, 3)] * 2),
    ("down_refined_2", [(3, 4)]),
    ("down_refined_4", [(3, 4)]),
]


def shapes_again(rule: str, sources: list[Source], dims: Dims, tp: int) -> tuple[tuple[int, ...], ...]:
    (first, *_) = RULES[rule].cut("target", sources, dims, tp)
    return RULES[rule].unshard(first.shape, len(sources), dims, tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("rule", "shapes", "config"), CASES)
def test_the_shapes_of_the_sources_can_be_told_from_a_ranks(
    rule: str, shapes: list[tuple[int, ...]], config: dict[str, Any], tp: int
):
    dims = Dims(8, 4, 4, 100, 4, False, config)
    sources = [Source(f"s{i}", shape) for i, shape in enumerate(shapes)]
    assert shapes_again(rule, sources, dims, tp) == tuple(shapes)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("rule", "shapes"), EXPERTS)
def test_the_shapes_of_each_experts_sources_can_be_told_from_a_ranks(rule: str, shapes: list[tuple[int, ...]], tp: int):
    dims = Dims(1, 1, 1, 1, 4)
    sources = [Source(f"s{i}.{{e}}", shape, (0, 1, 2, 3)) for i, shape in enumerate(shapes)]
    assert shapes_again(rule, sources, dims, tp) == tuple(shapes)


def test_every_rule_can_be_read_backwards():
    assert {rule for rule, *_ in CASES} | {rule for rule, _ in EXPERTS} == set(RULES)
