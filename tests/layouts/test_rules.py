"""Rules: each says which rows and columns a rank holds, refuses what does not divide, and can be read backwards."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.errors import PlanError
from shardtool.layouts.rules import PAD, RULES, Dims, Source, padded_vocab
from shardtool.recipe import Share
from tests.strategies import Array, run

DIMS = Dims(heads=8, kv_heads=2, head_dim=4, vocab=100)


def numbered(*shapes: tuple[int, ...]) -> dict[str, Array]:
    """Sources whose elements are all different, and none of them 0."""
    found, first = {}, 1
    for i, shape in enumerate(shapes):
        size = int(np.prod(shape))
        found[f"s{i}"] = np.arange(first, first + size).reshape(shape)
        first += size
    return found


def shares(rule: str, held: Mapping[str, Array], tp: int, dims: Dims = DIMS) -> tuple[Share, ...]:
    return RULES[rule].cut("target", [Source(name, array.shape) for name, array in held.items()], dims, tp)


def ranks(rule: str, held: Mapping[str, Array], tp: int, dims: Dims = DIMS) -> list[Array]:
    """What every rank holds under a rule."""
    found: dict[int, Array] = {}
    for share in shares(rule, held, tp, dims):
        array = run(share.expanded(), share.shape, lambda name: held[name], share.fill)
        assert not found.keys() & set(share.ranks)
        found.update(dict.fromkeys(share.ranks, array))
    assert sorted(found) == list(range(tp))
    return [found[rank] for rank in range(tp)]


def same(found: list[Array], wanted: list[Array]) -> bool:
    return len(found) == len(wanted) and all(map(np.array_equal, found, wanted))


TPS = st.sampled_from([1, 2, 3, 4, 6, 8])
SMALL = st.integers(1, 5)


@given(TPS, SMALL, SMALL)
def test_copy_is_the_whole_source_on_every_rank(tp: int, n: int, k: int):
    held = numbered((n, k))
    assert same(ranks("copy", held, tp), [held["s0"]] * tp)


@given(TPS)
def test_scalar_is_a_one_without_source_and_dimensions(tp: int):
    assert same(ranks("scalar", {}, tp), [np.ones((), np.int64)] * tp)


@given(TPS, SMALL, st.sampled_from([(), (3,), (2, 2)]))
def test_column_is_an_equal_run_of_rows_for_each_rank(tp: int, n: int, rest: tuple[int, ...]):
    held = numbered((n * tp, *rest))
    assert same(ranks("column", held, tp), np.split(held["s0"], tp))


@given(TPS, SMALL, SMALL)
def test_row_is_an_equal_run_of_columns_for_each_rank(tp: int, n: int, k: int):
    held = numbered((n, k * tp))
    assert same(ranks("row", held, tp), np.split(held["s0"], tp, axis=1))


@given(TPS, SMALL, st.booleans())
def test_gate_up_is_the_ranks_rows_of_gate_over_its_rows_of_up(tp: int, n: int, fused: bool):
    held = numbered((n * tp, 3), (n * tp, 3))
    gate, up = np.split(held["s0"], tp), np.split(held["s1"], tp)
    sources = {"s": np.concatenate([held["s0"], held["s1"]])} if fused else held
    assert same(ranks("gate_up", sources, tp), [np.concatenate(pair) for pair in zip(gate, up, strict=True)])


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Dims, int]:
    """Numbers of heads, kv heads and ranks that an engine takes."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    kv = draw(st.sampled_from([n for n in range(1, 17) if n % tp == 0 or tp % n == 0]))
    heads = draw(st.sampled_from([n for n in range(1, 97) if n % tp == 0 and n % kv == 0]))
    return Dims(heads, kv, draw(st.integers(1, 3)), 1), tp


@given(attentions(), st.sampled_from([(), (2,)]), st.booleans())
def test_qkv_is_the_ranks_heads_and_the_kv_heads_that_they_attend_to(
    sizes: tuple[Dims, int], rest: tuple[int, ...], fused: bool
):
    """The kv head of each query head decides, head by head, without a word on sharing."""
    dims, tp = sizes
    d = dims.head_dim
    held = numbered((dims.heads * d, *rest), *[(dims.kv_heads * d, *rest)] * 2)
    wanted = []
    for rank in range(tp):
        mine = range(rank * dims.heads // tp, (rank + 1) * dims.heads // tp)
        kv = sorted({head * dims.kv_heads // dims.heads for head in mine})
        parts = [("s0", mine), ("s1", kv), ("s2", kv)]
        wanted.append(np.concatenate([held[name][h * d : (h + 1) * d] for name, found in parts for h in found]))
    sources = {"s": np.concatenate(list(held.values()))} if fused else held
    assert same(ranks("qkv", sources, tp, dims), wanted)


@given(attentions(), st.sampled_from([(), (2,)]))
def test_grouped_is_qkv_of_a_source_that_holds_each_kv_head_behind_its_query_heads(
    sizes: tuple[Dims, int], rest: tuple[int, ...]
):
    dims, tp = sizes
    held = numbered((dims.kv_heads, dims.heads // dims.kv_heads + 2, dims.head_dim, *rest))["s0"]
    parts = {"q": held[:, :-2], "k": held[:, -2:-1], "v": held[:, -1:]}
    apart = {name: part.reshape(-1, *rest) for name, part in parts.items()}
    assert same(ranks("grouped", {"s": held.reshape(-1, *rest)}, tp, dims), ranks("qkv", apart, tp, dims))


@given(TPS, SMALL, st.sampled_from([(), (3,)]))
def test_vision_qkv_is_the_ranks_rows_of_each_third(tp: int, n: int, rest: tuple[int, ...]):
    held = numbered((3 * n * tp, *rest))
    dims = Dims(1, 1, 1, 1, config={"vision_config": {"num_heads": tp}})
    thirds = (np.split(third, tp) for third in np.split(held["s0"], 3))
    assert same(ranks("vision_qkv", held, tp, dims), [np.concatenate(parts) for parts in zip(*thirds, strict=True)])


@given(attentions(), st.sampled_from(["column", "row", "qkv"]))
def test_a_transposed_rule_is_the_rule_on_sources_whose_rows_and_columns_are_exchanged(
    sizes: tuple[Dims, int], rule: str
):
    dims, tp = sizes
    rows = (dims.heads + 2 * dims.kv_heads) * dims.head_dim if rule == "qkv" else 2 * tp
    held = numbered((rows, 3 * tp))
    flipped = {"s0": np.ascontiguousarray(held["s0"].T)}
    assert same(ranks(rule + "_t", flipped, tp, dims), ranks(rule, held, tp, dims))


@given(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.integers(1, 200), SMALL)
def test_vocab_is_the_ranks_rows_of_the_table_padded_with_zeros(tp: int, vocab: int, width: int):
    held = numbered((vocab, width))
    padded = np.zeros((-(-vocab // 64) * 64, width), np.int64)
    padded[:vocab] = held["s0"]
    assert same(ranks("vocab", held, tp, Dims(1, 1, 1, vocab)), np.split(padded, tp))


@given(TPS, st.integers(1, 400), SMALL)
def test_vocab_tp_is_padded_further_where_the_padded_vocabulary_cannot_be_divided(tp: int, vocab: int, width: int):
    held = numbered((vocab, width))
    rows = -(-vocab // 64) * 64
    rows = rows if rows % tp == 0 else -(-vocab // (64 * tp)) * 64 * tp
    padded = np.zeros((rows, width), np.int64)
    padded[:vocab] = held["s0"]
    assert same(ranks("vocab_tp", held, tp, Dims(1, 1, 1, vocab)), np.split(padded, tp))


@given(TPS, st.integers(1, 100))
def test_root_is_the_square_root_of_the_hidden_size(tp: int, hidden: int):
    (share,) = RULES["root"].cut("target", [], Dims(1, 1, 1, 1, config={"hidden_size": hidden**2}), tp)
    assert (share.ranks, share.shape, share.pieces, share.fill) == (tuple(range(tp)), (), (), float(hidden))


@pytest.mark.parametrize(("vocab", "padded"), [(1, 64), (63, 64), (64, 64), (65, 128), (32000, 32000), (32001, 32064)])
def test_a_vocabulary_is_padded_to_a_multiple_of_64(vocab: int, padded: int):
    assert PAD == 64
    assert padded_vocab(vocab) == padded


def test_padding_is_declared_only_where_there_is_some():
    fills = [share.fill for share in shares("vocab", numbered((100, 2)), 4)]
    assert fills == [None, None, None, 0.0]


@pytest.mark.parametrize(
    ("rule", "shapes", "tp", "said"),
    [
        ("column", [(6, 2)], 4, "its size 6 cannot be divided by --tp 4"),
        ("gate_up", [(6, 2), (6, 2)], 4, "its size 6 cannot be divided by --tp 4"),
        ("gate_up", [(7, 2)], 1, "7 rows are not 2 equal parts"),
        ("gate_up", [(4, 2), (4, 3)], 2, "[4, 2], [4, 3], which cannot be stacked"),
        ("gate_up", [()], 2, "cannot be stacked"),
        ("row", [(2, 6)], 4, "its input size 6 cannot be divided by --tp 4"),
        ("row", [(6,)], 2, "the shape [6], not rows and columns"),
        ("qkv", [(32, 2), (8, 2), (8, 2)], 3, "the number of heads 8 cannot be divided by --tp 3"),
        ("qkv", [(32, 2), (4, 2), (4, 2)], 2, "its sources have [32, 4, 4] rows, but 8 heads and 2 kv heads of 4"),
        ("qkv", [(32, 2)], 2, "its sources have [32] rows"),
        ("column_t", [(2, 6)], 4, "its size 6 cannot be divided by --tp 4"),
        ("column_t", [(6,)], 2, "the shape [6], not rows and columns"),
        ("row_t", [(6, 2)], 4, "its input size 6 cannot be divided by --tp 4"),
        ("qkv_t", [(2, 44)], 2, "its sources have [44] rows"),
        ("grouped", [(48, 2)], 3, "the number of heads 8 cannot be divided by --tp 3"),
        ("grouped", [(44, 2)], 2, "the shape [44, 2], but 2 groups of 4 heads, a key and a value of 4"),
        ("grouped", [()], 1, "the shape [], but 2 groups of 4 heads"),
        ("vision_qkv", [(48, 2)], 1, "vision_config.num_heads None, which is not a size"),
        ("vocab", [(100, 2)], 3, "the padded vocabulary 128 cannot be divided by --tp 3"),
        ("vocab", [(101, 2)], 2, "the shape [101, 2], but config.json says vocab_size 100"),
    ],
)
def test_what_an_engine_would_refuse_is_refused_with_its_sizes(
    rule: str, shapes: list[tuple[int, ...]], tp: int, said: str
):
    with pytest.raises(PlanError, match=re.escape(said)) as error:
        shares(rule, numbered(*shapes), tp)
    assert "'target'" in str(error.value)


@pytest.mark.parametrize(
    ("kv", "tp", "said"),
    [
        (4, 6, "--tp 6 is not a multiple of its 4 kv heads"),
        (6, 4, "the number of kv heads 6 cannot be divided by --tp 4"),
    ],
)
def test_kv_heads_must_divide_the_ranks_or_the_ranks_them(kv: int, tp: int, said: str):
    dims = Dims(12, kv, 1, 1)
    with pytest.raises(PlanError, match=re.escape(said)):
        shares("qkv", numbered((12, 2), (kv, 2), (kv, 2)), tp, dims)


def test_a_vision_encoder_is_cut_by_whole_heads():
    dims = Dims(1, 1, 1, 1, config={"vision_config": {"num_heads": 6}})
    with pytest.raises(PlanError, match="the number of heads of the vision encoder 6 cannot be divided by --tp 4"):
        shares("vision_qkv", numbered((24, 2)), 4, dims)


DIMS_OF = {
    "vision_qkv": Dims(1, 1, 1, 1, config={"vision_config": {"num_heads": 16}}),
    "root": Dims(1, 1, 1, 1, config={"hidden_size": 16}),
}
CASES = [
    ("column_t", [(3, 16)]),
    ("row_t", [(16, 3)]),
    ("qkv_t", [(3, 32), (3, 8), (3, 8)]),
    ("qkv_t", [(3, 48)]),
    ("grouped", [(48, 3)]),
    ("grouped", [(48,)]),
    ("vision_qkv", [(48, 3)]),
    ("copy", [(5, 3)]),
    ("scalar", []),
    ("column", [(16, 3)]),
    ("column", [(16,)]),
    ("row", [(3, 16)]),
    ("gate_up", [(16, 3), (16, 3)]),
    ("gate_up", [(32, 3)]),
    ("qkv", [(32, 3), (8, 3), (8, 3)]),
    ("qkv", [(48, 3)]),
    ("qkv", [(32,), (8,), (8,)]),
    ("vocab", [(100, 3)]),
    ("vocab_tp", [(100, 3)]),
    ("root", []),
]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(("rule", "shapes"), CASES)
def test_the_shapes_of_the_sources_can_be_told_from_a_ranks(rule: str, shapes: list[tuple[int, ...]], tp: int):
    dims = DIMS_OF.get(rule, DIMS)
    (first, *_) = shares(rule, numbered(*shapes), tp, dims)
    assert RULES[rule].unshard(first.shape, len(shapes), dims, tp) == tuple(shapes)


def test_every_rule_can_be_read_backwards():
    assert {rule for rule, _ in CASES} == set(RULES)  # those of experts and of packed tensors have tests of their own
