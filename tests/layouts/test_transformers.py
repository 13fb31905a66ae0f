"""The layout under a tp_plan: every style cuts as torch does, and what transformers could not hold is refused.

No transformers is needed here: a plan is data. That the plans and their rows are those of the installed transformers is
shown in ``tests/ops/test_model.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardtool.dtypes import DType
from shardtool.errors import FormatError, PlanError, UnsupportedModel, UnsupportedTransform, UsageError
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.layouts.transformers import STYLES, Row, TransformersLayout, from_record
from shardtool.mosaic import Logical
from tests.layouts.test_blocks import Array, made, numbered

Shape = tuple[int, ...]


def layout(plan: dict[str, str], *rows: Row, **options: Any) -> TransformersLayout:
    return TransformersLayout("LlamaForCausalLM", "5.23.0", plan, rows, **options)


def model(
    shapes: Mapping[str, Shape], *, dtype: DType = DType.BF16, equal: bool = False, own: DType = DType.BF16
) -> Model:
    return Model({}, {name: Logical(own, shape) for name, shape in shapes.items()}, dtype, lambda _a, _b: equal)


def held(outline: Outline, rank: int, sources: dict[str, Array]) -> dict[str, Array]:
    """What a rank holds, made with numpy."""
    found = {}
    for tensor in outline.recipe.tensors(rank):
        found[tensor.name] = made(tensor.shape, tensor.pieces(), sources)
    return found


def ranks(style: str, name: str, shape: Shape, tp: int, **options: Any) -> tuple[Array, list[Array]]:
    """A parameter of a style, and what each rank holds of it. The plan names its module."""
    source = numbered(*shape)
    made_of = layout({name.rpartition(".")[0]: style}, Row(name, (name,)), **options)
    outline = made_of.outline(model({name: shape}), Parallel(tp))
    return source, [held(outline, rank, {name: source})[name] for rank in range(tp)]


def chunked(source: Array, tp: int, dim: int) -> list[Array]:
    """Torch's own division: equal but for the last, and empty ones where there is nothing left."""
    found = [chunk.numpy() for chunk in torch.from_numpy(source).chunk(tp, dim)]
    empty = np.take(source, [], axis=dim)
    return found + [empty] * (tp - len(found))


def same(some: list[Array], others: list[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


@given(
    st.sampled_from(["colwise", "colwise_rep", "colwise_gather_output", "embedding_rowwise"]),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 6),
)
def test_rows_are_divided_as_torch_divides_them(style: str, rows: int, columns: int, tp: int):
    source, found = ranks(style, "mlp.up.weight", (rows, columns), tp)
    assert same(found, chunked(source, tp, 0))


@given(
    st.sampled_from(["rowwise", "rowwise_rep", "rowwise_split_input", "embedding_colwise"]),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 6),
)
def test_columns_are_divided_as_torch_divides_them(style: str, rows: int, columns: int, tp: int):
    source, found = ranks(style, "mlp.down.weight", (rows, columns), tp)
    assert same(found, chunked(source, tp, 1))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 3]))
def test_packed_rows_are_divided_in_each_half(tp: int, each: int, columns: int, dims: int):
    rows = 2 * tp * each
    shape = (rows, columns) if dims == 2 else (3, rows, columns)
    source, found = ranks("packed_colwise", "experts.gate_up_proj", shape, tp)
    gate, up = np.split(source, 2, axis=dims - 2)
    wanted = [
        np.concatenate(pair, axis=dims - 2)
        for pair in zip(*(np.split(x, tp, axis=dims - 2) for x in (gate, up)), strict=True)
    ]
    assert same(found, wanted)


def test_packed_columns_are_divided_in_each_half():
    source, found = ranks("packed_rowwise", "experts.down_proj", (3, 8), 2)
    assert same(found, [source[:, [0, 1, 4, 5]], source[:, [2, 3, 6, 7]]])


@pytest.mark.parametrize("style", sorted(STYLES.keys() - {"embedding_colwise"}))
def test_biases_follow_the_style(style: str):
    source, found = ranks(style, "mlp.up.bias", (8,), 2)
    if style.startswith(("colwise", "packed_colwise", "embedding_rowwise")):
        assert same(found, [source[:4], source[4:]])
    else:
        assert same(found, [source, source])


@pytest.mark.parametrize(
    "style",
    [
        "all_reduce",
        "local_params",
        "mla_kv_a_proj",
        "moe_identity_expert",
        "moe_tp_experts",
        "replicate",
        "replicated_with_grad_allreduce",
        "sequence_parallel",
    ],
)
def test_other_styles_leave_parameters_whole(style: str):
    source, found = ranks(style, "norm.weight", (8, 3), 2)
    assert same(found, [source, source])


def test_a_parameter_without_a_style_is_whole():
    row = Row("norm.weight", ("norm.weight",))
    outline = layout({"mlp": "colwise"}, row).outline(model({"norm.weight": (4,)}), Parallel(2))
    (rule,) = outline.recipe.rules
    assert [share.ranks for share in rule.shares] == [(0, 1)]


def test_a_parameters_own_style_comes_before_its_modules():
    plan = {"layers.*.experts": "moe_tp_experts", "layers.*.experts.down": "rowwise"}
    row = Row("layers.{i}.experts.down", ("layers.{i}.experts.{e}.w2",), (("stack", 2),), (0, 1))
    shapes = {f"layers.{i}.experts.{e}.w2": (3, 4) for i in range(2) for e in range(2)}
    outline = layout(plan, row).outline(model(shapes), Parallel(2))
    (rule,) = outline.recipe.rules
    assert rule.index == (0, 1)
    assert [share.shape for share in rule.shares] == [(2, 3, 2), (2, 3, 2)]


def test_layers_of_other_shapes_are_rules_of_their_own():
    row = Row("layers.{i}.up", ("layers.{i}.up",), (), (0, 1, 2))
    shapes = {"layers.0.up": (4, 2), "layers.1.up": (8, 2), "layers.2.up": (4, 2)}
    outline = layout({"layers.*.up": "colwise"}, row).outline(model(shapes), Parallel(2))
    assert {rule.index: rule.shares[0].shape for rule in outline.recipe.rules} == {(0, 2): (2, 2), (1,): (4, 2)}


def test_a_source_can_be_parted_and_turned():
    rows = [Row(f"{x}_proj", ("qkv",), (("turn", 0, 1), ("part", 0, k, 3))) for k, x in enumerate("qkv")]
    source = numbered(2, 12)
    outline = layout({"k_proj": "colwise"}, *rows).outline(model({"qkv": source.shape}), Parallel(2))
    found = held(outline, 1, {"qkv": source})
    assert np.array_equal(found["q_proj"], source.T[:4])
    assert np.array_equal(found["k_proj"], source.T[6:8])
    with pytest.raises(PlanError, match=r"'q_proj': its source has the shape \[11, 2\].* is not 3 equal parts"):
        layout({}, *rows).outline(model({"qkv": (2, 11)}), Parallel(1))


# Ties and dtypes.


TIED = (Row("lm_head.weight", ("lm_head.weight",)), Row("embed.weight", ("embed.weight",)))
SHAPES: dict[str, Shape] = {"lm_head.weight": (4, 2), "embed.weight": (4, 2)}


def test_an_equal_head_is_stored_once():
    tied = layout({}, *TIED, tied={"lm_head.weight": "embed.weight"})
    outline = tied.outline(model(SHAPES, equal=True), Parallel(1))
    assert [rule.name for rule in outline.recipe.rules] == ["embed.weight"]
    assert outline.copies == {"lm_head.weight": "embed.weight"}
    assert not outline.amendments


def test_another_head_is_kept_and_config_says_so():
    tied = layout({}, *TIED, tied={"lm_head.weight": "embed.weight"})
    outline = tied.outline(model(SHAPES, equal=False), Parallel(1))
    assert [rule.name for rule in outline.recipe.rules] == ["embed.weight", "lm_head.weight"]
    assert outline.amendments == {"tie_word_embeddings": False}
    assert not outline.copies


@pytest.mark.parametrize(
    ("said", "held_in", "own", "wanted"),
    [
        ("", "BF16", "F32", "BF16"),
        ("F32", "BF16", "BF16", "F32"),
        ("half", "F16", "BF16", "F32"),
        ("half", "BF16", "BF16", "BF16"),
        ("same", "BF16", "I64", "I64"),
    ],
)
def test_some_tensors_keep_a_dtype_of_their_own(said: str, held_in: str, own: str, wanted: str):
    row = Row("x", ("x",), dtype=said)
    given_model = model({"x": (2,)}, dtype=DType[held_in], own=DType[own])
    (rule,) = layout({}, row).outline(given_model, Parallel(1)).recipe.rules
    assert rule.dtype is DType[wanted]


# Refusals.


@pytest.mark.parametrize(
    ("plan", "options", "shape", "tp", "error", "said"),
    [
        ({}, {}, (8, 4), 2, UnsupportedModel, "has no tp_plan in transformers 5.23.0"),
        ({"self_attn.q_proj": "diagonal"}, {}, (8, 4), 2, UnsupportedModel, "says 'diagonal' for self_attn.q_proj"),
        ({"self_attn.q_proj": "embedding_colwise"}, {}, (8,), 2, PlanError, "has 1 dimensions, which the style"),
        (
            {"self_attn.q_proj": "packed_colwise"},
            {},
            (6, 4),
            2,
            PlanError,
            "its 6 rows or columns are 2 parts, and --tp 2",
        ),
        ({"self_attn.q_proj": "colwise"}, {"head_dim": 2}, (6, 4), 2, PlanError, "has 3 heads of 2 rows"),
        (
            {"self_attn.q_proj": "colwise"},
            {"even": ("colwise",)},
            (7, 4),
            2,
            PlanError,
            "its 7 rows or columns are not",
        ),
    ],
)
def test_what_transformers_could_not_hold_is_refused(
    plan: dict[str, str], options: Any, shape: Shape, tp: int, error: type[Exception], said: str
):
    name = "self_attn.q_proj.weight"
    one = layout(plan, Row(name, (name,)), **options)
    with pytest.raises(error, match=said):
        one.outline(model({name: shape}), Parallel(tp))
    assert one.outline(model({name: shape}), Parallel(1)).recipe.rules


def test_only_tensor_parallel_ranks_are_known():
    one = layout({}, Row("x", ("x",)))
    with pytest.raises(UsageError, match="--pp"):
        one.outline(model({"x": (2,)}), Parallel(1, 2))
    with pytest.raises(UsageError, match="--expert-parallel"):
        one.outline(model({"x": (2,)}), Parallel(1, 1, ep=True))


def test_missing_strange_and_unlike_tensors_are_named():
    one = layout({}, Row("experts", ("experts.{e}",), (("stack", 2),)), unused={"inv_freq": "ignored"})
    assert one.outline(model({"experts.0": (2,), "experts.1": (2,), "inv_freq": (1,)}), Parallel(1)).dropped
    with pytest.raises(PlanError, match=r"has no tensor 'experts\.1', of which LlamaForCausalLM makes 'experts'"):
        one.outline(model({"experts.0": (2,)}), Parallel(1))
    with pytest.raises(PlanError, match="1 source tensors have no place in LlamaForCausalLM, first 'other'"):
        one.outline(model({"experts.0": (2,), "experts.1": (2,), "other": (2,)}), Parallel(1))
    with pytest.raises(PlanError, match="have different shapes"):
        one.outline(model({"experts.0": (2,), "experts.1": (3,)}), Parallel(1))
    with pytest.raises(UnsupportedTransform, match="'x' is U8, which cannot be cast"):
        layout({}, Row("x", ("x",), dtype="F32")).outline(model({"x": (2,)}, own=DType.U8), Parallel(1))


# The record.


FULL = layout(
    {"lm_head": "colwise_gather_output", "layers.*.experts.up": "packed_colwise"},
    Row("layers.{i}.experts.up", ("layers.{i}.{e}.w1", "layers.{i}.{e}.w3"), (("stack", 4), ("join", 1)), (0, 1, 2, 5)),
    Row("lm_head.weight", ("lm_head.weight",), dtype="F32"),
    Row("k.weight", ("qkv.weight",), (("part", 0, 1, 3),)),
    tied={"lm_head.weight": "embed.weight"},
    unused={"inv_freq": "ignored"},
    head_dim=64,
    even=("colwise_rep",),
)


def test_a_record_is_read_as_it_was_written():
    text = json.dumps(FULL.record())
    assert '"0-2,5"' in text
    assert from_record(json.loads(text), "there") == FULL


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "builtin"},
        {"architecture": 3},
        {"plan": {"x": 3}},
        {"plan": None},
        {"head_dim": -1},
        {"head_dim": "64"},
        {"even": [1]},
        {"rows": 3},
        {"rows": [{"to": "x"}]},
        {"rows": [{"to": "x", "of": []}]},
        {"rows": [{"to": "x", "of": ["a", "b"]}]},
        {"rows": [{"to": "x", "of": ["a"], "dtype": "F64"}]},
        {"rows": [{"to": "x.{i}", "of": ["a.{i}"]}]},
        {"rows": [{"to": "x", "of": ["a"], "index": "0-3"}]},
        {"rows": [{"to": "x.{i}", "of": ["a.{i}"], "index": "3-1"}]},
        {"rows": [{"to": "x.{i}", "of": ["a.{i}"], "index": "0-99999999999"}]},
        {"rows": [{"to": "x.{i}", "of": ["a.{i}"], "index": "1,1"}]},
        {"rows": [{"to": "x", "of": ["a.{e}"]}]},
        {"rows": [{"to": "x", "of": ["a"], "steps": [["stack", 4]]}]},
        {"rows": [{"to": "x", "of": ["a.{e}"], "steps": [["stack", 1 << 40]]}]},
        {"rows": [{"to": "x", "of": ["a"], "steps": [["spin", 4]]}]},
        {"rows": [{"to": "x", "of": ["a"], "steps": [["part", 0, 3, 3]]}]},
        {"rows": [{"to": "x", "of": ["a"], "steps": [["turn", 0]]}]},
        {"rows": [{"to": "x", "of": ["a"], "steps": [["turn", 0, True]]}]},
    ],
)
def test_a_record_that_makes_no_sense_is_refused(changes: dict[str, Any]):
    with pytest.raises(FormatError, match="there: the layout of kind 'tp_plan' is not as"):
        from_record({**FULL.record(), **changes}, "there")


@pytest.mark.parametrize("key", sorted(FULL.record()))
def test_a_record_without_one_of_its_keys_is_refused(key: str):
    with pytest.raises(FormatError):
        from_record({k: v for k, v in FULL.record().items() if k != key}, "there")


def test_a_records_steps_that_fit_no_tensor_are_refused_when_they_are_used():
    one = replace(FULL, rows=(Row("x", ("x",), (("turn", 0, 7),)),), tied={}, unused={})
    with pytest.raises(PlanError, match=r"tensor 'x': .* no dimensions 0 and 7"):
        one.outline(model({"x": (2, 2)}), Parallel(1))
