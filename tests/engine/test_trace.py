"""Traces of the installed vLLM, replayed on real bytes, against what vLLM's own ranks hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardtool import header
from shardtool.errors import UnsupportedModel
from shardtool.layouts import file as files
from shardtool.layouts.base import Parallel
from shardtool.mosaic import Logical
from shardtool.tracing import parent
from tests.engine import replay
from tests.engine.compare import rank_tensors
from tests.engine.truth import Ranks, World
from tests.engine.zoo import make

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),  # those of engines and of transformers
]

MODELS = [
    ("LlamaForCausalLM", "b", World(4)),
    ("LlamaForCausalLM", "a", World(1, 2)),
    ("Qwen3MoeForCausalLM", "b", World(2)),
    ("Qwen3MoeForCausalLM", "b", World(2, 1, True)),
    ("DeepseekV3ForCausalLM", "b", World(2, 2, True)),
    ("GPTNeoXForCausalLM", "b", World(2)),
    ("MambaForCausalLM", "b", World(2)),
    ("BloomForCausalLM", "a", World(2)),
]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and truths of this run."""
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="session")
def truth(work: Path) -> Iterator[Callable[[Path, World], Path]]:
    """The folder of what vLLM's ranks hold of a model."""
    started: dict[World, Ranks] = {}

    def of(model: Path, world: World) -> Path:
        if world not in started:
            started[world] = Ranks(world, work / "truth")
        found = started[world].load(model)
        assert not found.error
        return found.folder

    yield of
    for ranks in started.values():
        ranks.__exit__()


def job(model: Path, *parallels: Parallel, **more: Any) -> parent.Job:
    """The job of tracing a checkpoint in a folder."""
    tensors: dict[str, Logical] = {}
    for path in sorted(model.glob("*.safetensors")):
        data = path.read_bytes()
        text = data[8 : 8 + header.length(data[:8], len(data), path.name)]
        tensors.update({e.name: Logical(e.dtype, e.shape) for e in header.parse(text, len(data), path.name).entries})

    def side(folder: Path) -> None:
        for path in model.iterdir():
            if path.suffix in (".json", ".py", ".txt", ".jinja") and not path.name.endswith(".index.json"):
                shutil.copy(path, folder)

    config = (model / "config.json").read_text()
    return parent.Job("vllm", str(model), config, dict(sorted(tensors.items())), parallels, side, **more)


@pytest.mark.parametrize(("architecture", "variant", "world"), MODELS, ids=str)
def test_a_trace_replayed_is_what_the_engine_holds(
    architecture: str, variant: str, world: World, work: Path, truth: Callable[[Path, World], Path]
) -> None:
    model = make(architecture, variant, work / "models")
    sizes = Parallel(world.tp, world.pp, world.ep)
    layout = parent.trace(job(model, sizes))
    (traced,) = files.decode(files.encode(layout), "x.json").traced
    get = replay.sources(model)
    loose = frozenset(traced.uninitialised)
    for rank in sizes.ranks:
        theirs = rank_tensors(truth(model, world), world, rank)
        assert not replay.compare(dict(replay.rank(traced.recipe, rank, get)), theirs, loose)


def test_a_partition_of_layers_by_hand_is_honoured(work: Path) -> None:
    model = make("LlamaForCausalLM", "a", work / "models")
    (held,) = parent.held(job(model, Parallel(1, 2, partition=(2, 0))))
    assert any(name.startswith("model.layers.1.") for name in held.ranks[0])
    assert not any(name.startswith("model.layers.") for name in held.ranks[1])


def test_what_the_engine_builds_is_what_a_trace_of_it_holds(work: Path) -> None:
    model = make("Qwen3MoeForCausalLM", "b", work / "models")
    sizes = Parallel(2, ep=True)
    (traced,) = parent.trace(job(model, sizes)).traced
    (held,) = parent.held(job(model, sizes))
    for rank in sizes.ranks:
        ours = {tensor.name: Logical(tensor.dtype, tensor.shape) for tensor in traced.recipe.tensors(rank)}
        assert held.ranks[rank] == ours


def test_sizes_that_the_engine_refuses_are_refused_in_its_words(work: Path) -> None:
    model = make("LlamaForCausalLM", "a", work / "models")
    with pytest.raises(UnsupportedModel, match=r"^vLLM cannot load this model: .*12.* must be divisible"):
        parent.trace(job(model, Parallel(5)))


def test_an_architecture_that_the_engine_does_not_know_is_refused(work: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(make("LlamaForCausalLM", "a", work / "models"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(UnsupportedModel, match=r"^vLLM cannot load this model: .*NobodyForCausalLM"):
        parent.trace(job(model, Parallel(1)))


def test_the_code_of_a_checkpoint_runs_only_when_it_is_trusted(work: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(make("LlamaForCausalLM", "a", work / "models"), model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "configuration.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "it_ran"
    (model / "configuration.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(mark)!r}).touch()\n"
        "class Own(LlamaConfig):\n    model_type = 'of_its_own'\n"
    )
    with pytest.raises(UnsupportedModel, match="runs only with --trust-remote-code"):
        parent.trace(job(model, Parallel(1)))
    assert not mark.exists()
    parent.trace(job(model, Parallel(1), trust_remote_code=True))
    assert mark.exists()
