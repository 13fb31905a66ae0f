"""What a checkpoint and a model have to say of each other: what differs, what was left, whether they are tied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardtool
from shardtool.checkpoint import open_checkpoint
from shardtool.dtypes import DType
from shardtool.integrations.engine_checks import Marks, difference, tied, unfilled
from tests.builders import config, model, put, tensors
from tests.integrations.modules import Tree, poisoned


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama`` and ``tied`` with shards for two ranks; ``llama-pp2`` has stages besides."""
    made = tmp_path_factory.mktemp("shelf")
    for name, said in (("llama", {}), ("tied", {"tie_word_embeddings": True})):
        sizes = config(**said)  # type: ignore[arg-type]
        put(made / name, model(sizes, tensors(sizes)))
        shardtool.save(made / name, made / f"{name}-tp2", tp=2)
    shardtool.save(made / "llama", made / "llama-pp2", tp=2, pp=2)
    return made


def test_a_difference_is_one_clause_for_each_kind():
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(2)}
    assert difference([(name, DType.F32, tuple(t.shape)) for name, t in state.items()], state) == ""
    assert difference([], state) == "'a' and 2 more are missing"
    entries = [("a", DType.F32, (3, 2)), ("b", DType.F16, (2,)), ("c", DType.F32, (2,)), ("d", DType.F32, (1,))]
    assert difference(entries, state) == (
        "'d' is foreign to the model; 'a' is torch.float32 [3, 2] there and torch.float32 [2, 3] in the model, and 1 "
        "more differ"
    )


# What a model has left as it was.


def test_parameters_are_filled_under_any_of_their_names():
    one, other = torch.zeros(3), torch.zeros(3)
    into = Tree({"a.x": one, "b.x": one, "c": other, "none": torch.zeros(0)})
    assert unfilled(into, {"b.x"}) == ["c"]
    assert unfilled(into, {"c"}) == ["a.x"]
    assert unfilled(into, {"a.x", "c", "more"}) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_marks_show_each_part_that_was_left(dtype: torch.dtype):
    """One of several projections or experts; what was there before is there again."""
    held = {
        "qkv": torch.full((6, 4), 0.5, dtype=dtype),
        "experts": torch.full((3, 2, 4), 0.5, dtype=dtype),
        "norm": torch.full((4,), 0.5, dtype=dtype),
        "whole": torch.full((5, 2), 0.5, dtype=dtype),
    }
    into = Tree(held)
    marks = Marks(into)
    with torch.no_grad():
        into.get_parameter("qkv").data[:4].fill_(2)
        into.get_parameter("experts").data[[0, 2]] = 2
        into.get_parameter("norm").data[:3].fill_(2)
        into.get_parameter("whole").data.copy_(torch.full((5, 2), float("nan")))  # which a checkpoint may hold
    assert marks.left() == ["qkv", "experts", "norm"]
    assert into.get_parameter("qkv")[:, 0].tolist() == [2, 2, 2, 2, 0.5, 0.5]
    assert into.get_parameter("experts")[:, 0, 0].tolist() == [2, 0.5, 2]
    assert into.get_parameter("norm").tolist() == [2, 2, 2, 0.5]
    assert into.get_parameter("whole").isnan().all()
    assert marks.left() == []  # said once


def test_a_model_that_fills_everything_leaves_no_mark():
    given = {"a.x": torch.rand(3, 5), "b": torch.rand(7), "c": torch.rand(())}
    into = Tree(poisoned(given))
    marks = Marks(into)
    for name, tensor in given.items():
        into.get_parameter(name).data.copy_(tensor)
    assert marks.left() == []
    assert all(torch.equal(into.get_parameter(name), tensor) for name, tensor in given.items())


def test_marks_are_made_in_floats_that_are_there():
    """Not in numbers that could be weights, nor where a model has made a parameter anew."""
    one = torch.zeros(2, 2)
    into = Tree(
        {
            "one": one,
            "again": one,
            "count": torch.ones(3, dtype=torch.int8),
            "none": torch.zeros(0, 4),
            "later": torch.empty(2, device="meta"),
            "anew": torch.zeros(4),
        }
    )
    marks = Marks(into)
    assert into.get_parameter("count").tolist() == [1, 1, 1]
    into.get_parameter("anew").data = torch.zeros(4)
    assert marks.left() == ["one"]
    assert one.tolist() == [[0, 0], [0, 0]]


# Whether the head is the embedding.


@pytest.mark.parametrize(
    ("uri", "said"),
    [("llama-tp2", False), ("tied-tp2", True), ("llama", False), ("tied", None), ("llama-pp2", False)],
)
def test_a_checkpoint_says_whether_its_head_is_the_embedding(shelf: Path, uri: str, said: bool | None):
    assert tied(open_checkpoint(shelf / uri)) is said


@pytest.mark.parametrize(("name", "said"), [("llama", False), ("tied", None)])
def test_shards_without_a_manifest_show_it_by_their_names(shelf: Path, tmp_path: Path, name: str, said: bool | None):
    for path in (shelf / f"{name}-tp2").glob("model-rank-*"):
        put(tmp_path, {path.name: path.read_bytes()})
    assert tied(open_checkpoint(tmp_path)) is said
