"""Layout files: what was traced, written down, read back and used for a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from shardtool.dtypes import DType
from shardtool.errors import FormatError, PlanError
from shardtool.layouts import file as files
from shardtool.layouts.base import Model, Parallel
from shardtool.layouts.file import FileLayout, Traced
from shardtool.mosaic import Logical
from shardtool.plan import Mosaic, Piece, Program
from shardtool.recipe import Recipe, Rule, Series, Share
from shardtool.window import Window, row_major

WHOLE = row_major((4, 2))
HALVES = [Piece(row_major((2, 2)), row_major((2, 2), 4 * rank), "embed") for rank in range(2)]
NEGATIVE = Program(
    "neg", (Mosaic(DType.F32, (3,), (Piece(row_major((3,)), row_major((3,)), "m.{i}.a"),)),), DType.F32, (3,)
)


def cut(name: str, source: str) -> Rule:
    """A tensor of which each of two ranks holds half the rows."""
    pieces = [Piece(half.dst, half.src, source) for half in HALVES]
    shares = tuple(Share((rank,), (2, 2), (piece,), 0.0) for rank, piece in enumerate(pieces))
    return Rule(name, DType.BF16, shares)


RULES = (
    cut("embedding", "embed"),
    cut("head", "head"),
    Rule("m.{i}.a", DType.F32, (Share((0, 1), (3,), (Piece(row_major((3,)), row_major((3,)), NEGATIVE),)),), (0, 1)),
    Rule(
        "m.{i}.w",
        DType.BF16,
        (
            Share(
                (0, 1),
                (3, 4),
                (Series(Piece(Window(0, (4,), (1,)), Window(0, (4,), (1,)), "m.{i}.e.{e}"), (0, 1, 2), 4),),
            ),
        ),
        (0,),
    ),
)
TENSORS = {
    "embed": Logical(DType.BF16, (4, 2)),
    "head": Logical(DType.BF16, (4, 2)),
    "m.0.a": Logical(DType.BF16, (3,)),
    "m.1.a": Logical(DType.BF16, (3,)),
    **{f"m.0.e.{e}": Logical(DType.BF16, (4,)) for e in range(3)},
    "rope": Logical(DType.F32, (2,)),
}
TRACED = Traced(
    Parallel(2, ep=True),
    Recipe(RULES),
    dropped={"rope": "vLLM 0.32.0 does not load it"},
    amendments={"quantization_config": {"bits": 4}},
    aliases={"also": "head"},
    uninitialised={"m.0.w": 2},
    untied=True,
    tied=("head", "embedding"),
)
LAYOUT = FileLayout("vllm", "0.32.0", "LlamaForCausalLM", DType.BF16, TENSORS, (TRACED,), where="some/recipe.json")


def model(config: dict[str, Any] | None = None, *, equal: bool = False, **tensors: Logical | None) -> Model:
    """A checkpoint, with other tensors than the traced one (None: without it)."""
    merged = {**TENSORS, **tensors}
    held = {name: tensor for name, tensor in merged.items() if tensor is not None}
    return Model(config or {"tie_word_embeddings": True}, held, DType.BF16, lambda a, b: equal)


@pytest.mark.parametrize("layout", [LAYOUT, replace(LAYOUT, moe_backend="marlin")])
def test_what_is_written_is_what_is_read(layout: FileLayout) -> None:
    data = files.encode(layout)
    assert files.decode(data, layout.where) == layout
    assert files.encode(files.decode(data, "elsewhere")) == data


def test_the_outline_is_the_recipe_with_what_belongs_to_it() -> None:
    outline = LAYOUT.outline(model(), Parallel(2, ep=True))
    assert outline.recipe == TRACED.recipe
    assert outline.dropped == {
        "m.0.a": "the shards hold what vllm computes of it",
        "m.1.a": "the shards hold what vllm computes of it",
        "rope": "vLLM 0.32.0 does not load it",
    }
    assert outline.copies == {}
    assert outline.amendments == {"quantization_config": {"bits": 4}, "tie_word_embeddings": False}
    assert "2 elements of m.0.w" in outline.notes[0]


def test_a_head_that_equals_the_embedding_is_held_once() -> None:
    outline = LAYOUT.outline(model(equal=True), Parallel(2, ep=True))
    assert [rule.name for rule in outline.recipe.rules] == ["embedding", "m.{i}.a", "m.{i}.w"]
    assert outline.copies == {"head": "embed"}
    assert "tie_word_embeddings" not in outline.amendments


@pytest.mark.parametrize("equal", [False, True])
def test_where_the_engine_does_not_compare_head_and_embedding_both_are_kept(equal: bool) -> None:
    layout = replace(LAYOUT, traced=(replace(TRACED, tied=None),))
    outline = layout.outline(model(equal=equal), Parallel(2, ep=True))
    assert outline.recipe == TRACED.recipe
    assert outline.amendments["tie_word_embeddings"] is False


def test_the_part_of_a_config_that_is_the_text_model_is_untied_too() -> None:
    nested = {"text_config": {"tie_word_embeddings": True, "hidden_size": 8}}
    outline = LAYOUT.outline(model(nested), Parallel(2, ep=True))
    assert outline.amendments["text_config"] == {"tie_word_embeddings": False, "hidden_size": 8}


@pytest.mark.parametrize("wanted", [Parallel(4, ep=True), Parallel(2), Parallel(2, 2, ep=True)])
def test_sizes_that_were_not_traced_are_refused_with_those_that_were(wanted: Parallel) -> None:
    with pytest.raises(PlanError, match=r"some/recipe.json .* for tp 2 with expert parallel, not for tp"):
        LAYOUT.outline(model(), wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope": None}, "has no tensor 'rope'"),
        ({"extra": Logical(DType.BF16, (1,))}, "does not know the tensor 'extra'"),
        ({"head": Logical(DType.F16, (4, 2))}, "'head' is BF16 .* here F16"),
        ({"head": Logical(DType.BF16, (8, 2))}, r"here BF16 \[8, 2\]"),
    ],
)
def test_another_checkpoint_is_refused_by_the_tensor_that_differs(change: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match="of another checkpoint: .*" + said):
        LAYOUT.outline(model(**change), Parallel(2, ep=True))


def test_a_layout_says_who_made_it() -> None:
    assert LAYOUT.title == "the trace of vllm 0.32.0 (LlamaForCausalLM)"
    assert LAYOUT.dtypes == ("BF16",)
    assert LAYOUT.record() == {
        "engine": "vllm",
        "engine_version": "0.32.0",
        "kind": "traced",
        "class": "LlamaForCausalLM",
    }


def test_a_layout_for_one_moe_backend_says_so() -> None:
    layout = replace(LAYOUT, moe_backend="marlin")
    assert layout.title == "the trace of vllm 0.32.0 (LlamaForCausalLM, MoE backend marlin)"
    assert layout.record()["moe_backend"] == "marlin"


# Damage


def damaged(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with one thing changed."""
    table = json.loads(files.encode(LAYOUT))
    change(table)
    return json.dumps(table).encode()


def _rules(table: dict[str, Any]) -> Any:
    return table["layouts"][0]["recipe"]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("engine"),
        lambda t: t.update(engine=3),
        lambda t: t.update(dtype="B16"),
        lambda t: t.update(tensors=[{"name": "x", "dtype": "F32", "shape": [-1]}]),
        lambda t: t.update(tensors=[{"name": "x.{i}", "i": [[0, 1 << 40]], "dtype": "F32", "shape": []}]),
        lambda t: t["layouts"][0].update(parallel={"tp": 0, "pp": 1, "ep": False}),
        lambda t: t["layouts"][0].update(dropped=["rope"]),
        lambda t: t["layouts"][0].update(amendments=[]),
        lambda t: t["layouts"][0].update(uninitialised={"m.0.w": -1}),
        lambda t: t["layouts"][0].update(tied=["head"]),
        lambda t: t["layouts"][0].update(tied=["head", "nothing"]),
        lambda t: _rules(t)[0]["shares"][0].update(ranks=[[0, 3]]),
        lambda t: _rules(t)[0]["shares"][0].update(ranks=[[2, 3]]),
        lambda t: _rules(t)[0]["shares"][0]["pieces"][0].update(of="nobody"),
        lambda t: _rules(t)[0]["shares"][1]["pieces"][0].update({"from": [5, 2, 1]}),
        lambda t: _rules(t)[2].update(i=[[0, 3]]),
        lambda t: _rules(t)[3].update(i=[[0, 2]]),
    ],
)
def test_damage_is_found_and_named_by_the_file(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(FormatError, match=r"^x\.json"):
        files.decode(damaged(change), "x.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"format": "shardtool/2"}', b"[" * 100_000])
def test_what_is_no_layout_file_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"^x\.json (is not a layout file|has the format)"):
        files.decode(data, "x.json")


def test_a_later_format_is_refused_with_the_one_that_is_read() -> None:
    with pytest.raises(FormatError, match=r"shardtool-layout/9.*shardtool-layout/1"):
        files.decode(damaged(lambda t: t.update(format="shardtool-layout/9")), "x.json")


def test_a_head_that_is_not_one_source_is_never_taken_for_the_embedding() -> None:
    two = replace(HALVES[0], source="rope")
    rules = tuple(
        replace(rule, shares=(Share((0, 1), (4, 2), (HALVES[0], two)),)) if rule.name == "head" else rule
        for rule in RULES
    )
    layout = replace(LAYOUT, traced=(replace(TRACED, recipe=Recipe(rules)),))
    outline = layout.outline(model(equal=True), Parallel(2, ep=True))
    assert outline.amendments["tie_word_embeddings"] is False
