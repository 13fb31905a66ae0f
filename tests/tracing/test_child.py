"""The process of the engine: every rank of the sizes that were asked for, folded into one recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardtool import recipe_json
from shardtool.parallel import Parallel
from shardtool.tracing import child
from shardtool.tracing.tape import Refused
from tests.engine import replay
from tests.tracing import tiny

VALUES = {
    name: (torch.arange(torch.Size(shape).numel()) / 16 - 1).to(dtype).reshape(shape)
    for name, (dtype, shape) in tiny.SOURCES.items()
}
EVERY = [Parallel(1), Parallel(2), Parallel(4), Parallel(1, 2), Parallel(2, 2), Parallel(1, 2, partition=(0, 2))]


def real(sizes: Parallel, rank: int) -> dict[str, torch.Tensor]:
    """What the engine's rank holds when it runs on real memory."""
    engine = tiny.Engine()
    with engine.rank(sizes, rank) as config:
        model = engine.construct(config)
        engine.load(config, model, VALUES.items())
    return {name: value for name, value in model.state_dict().items() if name != "head"}


@pytest.mark.parametrize("sizes", EVERY, ids=str)
def test_every_rank_is_what_the_engine_holds_there(sizes: Parallel) -> None:
    ranks = []
    out = child.trace(tiny.Engine(), sizes, tiny.SOURCES, lambda: ranks.append(1))
    recipe = recipe_json.from_json(json.loads(json.dumps(out["recipe"])), "the recipe")
    assert len(ranks) == len(sizes.ranks)
    for rank in sizes.ranks:
        assert not replay.compare(dict(replay.rank(recipe, rank, VALUES.__getitem__)), real(sizes, rank))


def test_layers_that_are_alike_are_said_once() -> None:
    out = child.trace(tiny.Engine(), Parallel(2), tiny.SOURCES, lambda: None)
    assert [rule["name"] for rule in out["recipe"]] == [
        "embed",
        "layers.{i}.decay",
        "layers.{i}.scale",
        "layers.{i}.up",
    ]


def test_what_is_not_loaded_and_what_has_two_names_is_said() -> None:
    out = child.trace(tiny.Engine(), Parallel(2), tiny.SOURCES, lambda: None)
    assert out["unused"] == ["rope"]
    assert out["aliases"] == {"head": "embed"}
    assert out["amendments"] == {"said": 6}
    assert out["uninitialised"] == {}


def test_a_tensor_without_its_source_is_named_as_uninitialised() -> None:
    sources = {name: kind for name, kind in tiny.SOURCES.items() if name != "layers.1.up.weight"}
    out = child.trace(tiny.Engine(), Parallel(2), sources, lambda: None)
    assert out["uninitialised"] == {"layers.1.up": 16}


def test_a_tensor_that_is_made_while_loading_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="'late' only while it loads"):
        child.trace(tiny.Engine("late"), Parallel(1), tiny.SOURCES, lambda: None)


def test_an_operation_that_layouts_do_not_know_is_refused_by_target_and_name() -> None:
    with pytest.raises(Refused, match=r"'layers.0.decay'.*'cumsum'"):
        child.trace(tiny.Engine("cumsum"), Parallel(1), tiny.SOURCES, lambda: None)


def test_shapes_are_those_of_each_rank_without_aliases() -> None:
    out = child.shapes(tiny.Engine(), Parallel(2, 2), lambda: None)
    assert out["ranks"][3] == {
        "embed": ["BF16", [8, 4]],
        "layers.1.decay": ["F32", [4]],
        "layers.1.scale": ["BF16", []],
        "layers.1.up": ["BF16", [4, 4]],
    }


def test_an_error_of_any_kind_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"do": "trace", "engine": "none", "folder": str(tmp_path), "parallels": [{"tp": 1, "pp": 1}]}
    (tmp_path / "JOB.json").write_text(json.dumps(job))
    assert child.main(str(tmp_path / "JOB.json"), str(tmp_path / "OUT.json")) == 0
    out: dict[str, Any] = json.loads((tmp_path / "OUT.json").read_text())
    assert out["error"]["kind"] == "engine"
    assert "'none' is not an engine" in out["error"]["message"]
    monkeypatch.setattr(child, "run", lambda job: (_ for _ in ()).throw(Refused("no")))
    child.main(str(tmp_path / "JOB.json"), str(tmp_path / "OUT.json"))
    assert json.loads((tmp_path / "OUT.json").read_text()) == {"error": {"kind": "Refused", "message": "no"}}
