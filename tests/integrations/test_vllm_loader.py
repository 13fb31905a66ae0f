"""The loader that vLLM makes in its workers, with a stand-in for vLLM: what it asks of it, and what it logs.

That it works in vLLM itself is tested in ``tests/engine/test_vllm_plugin.py``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import shardtool
from shardtool.errors import ChecksumMismatch, NotFound, PlanError, UsageError
from shardtool.layouts.base import Parallel
from tests.builders import config, flipped, model, put, tensors
from tests.integrations.modules import Cutter, digests, empty

FORMAT = "shardtool"


@dataclass
class Vllm:
    """A stand-in: its registry, the groups of the process, and the model that it builds next."""

    loaders: dict[str, Any] = field(default_factory=dict)
    tp: Any = field(default_factory=lambda: SimpleNamespace(world_size=1, rank_in_group=0))
    pp: Any = field(default_factory=lambda: SimpleNamespace(world_size=1, rank_in_group=0))
    build: Callable[[], torch.nn.Module] = torch.nn.Module
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def rank(self, tp: int, tp_rank: int, pp: int = 1, pp_rank: int = 0) -> None:
        self.tp = SimpleNamespace(world_size=tp, rank_in_group=tp_rank)
        self.pp = SimpleNamespace(world_size=pp, rank_in_group=pp_rank)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    """VLLM as far as the plug-in imports it. The plug-in's own modules are imported anew with it."""
    made = Vllm()

    class BaseModelLoader:
        def __init__(self, load_config: Any) -> None:
            self.load_config = load_config

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
            built = made.build()
            self.load_weights(built, model_config)  # type: ignore[attr-defined]
            return built.eval()

    def register_model_loader(name: str) -> Callable[[Any], Any]:
        return lambda loader: made.loaders.setdefault(name, []).append(loader) or loader

    def module(name: str, **content: Any) -> None:
        one = ModuleType(name)
        vars(one).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, one)

    module("vllm", __version__="0.32.0+cpu")
    module("vllm.config", get_current_vllm_config=lambda: vllm_config())
    module("vllm.distributed", get_tp_group=lambda: made.tp, get_pp_group=lambda: made.pp)
    module("vllm.model_executor")
    module("vllm.model_executor.model_loader", register_model_loader=register_model_loader)
    module("vllm.model_executor.model_loader.base_loader", BaseModelLoader=BaseModelLoader)
    ours = [f"shardtool.integrations.{name}" for name in ("vllm", "vllm_loader")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield made
    for name in ours:
        sys.modules.pop(name, None)


@dataclass
class HfConfig:
    """A config of transformers whose text model is of the same class, or none."""

    tie_word_embeddings: bool = False
    text: HfConfig | None = None

    def get_text_config(self) -> HfConfig:
        return self if self.text is None else self.text


def vllm_config(**parallel: Any) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{"enable_expert_parallel": False, **parallel}), speculative_config=None
    )


def model_config(folder: Any, **more: Any) -> SimpleNamespace:
    usual = {
        "model": str(folder),
        "model_weights": "",
        "revision": None,
        "quantization": None,
        "is_moe": False,
        "hf_config": HfConfig(),
        "word_embeddings_untied_by_checkpoint": False,
        "maybe_untie_word_embeddings": lambda: None,
    }
    return SimpleNamespace(**{**usual, **more})


def loader(vllm: Vllm, extra: Any = None) -> Any:
    """A loader as vLLM makes it."""
    from shardtool.integrations.vllm import register

    register()
    return vllm.loaders[FORMAT][0](SimpleNamespace(model_loader_extra_config=extra, use_tqdm_on_load=False))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("shelf")
    for name, tied in (("llama", False), ("tied", True)):
        made = config(tie_word_embeddings=tied)
        put(base / name, model(made, tensors(made)))
        for tp in (2, 4):
            shardtool.save(base / name, base / f"{name}-tp{tp}", tp=tp)
    shardtool.save(base / "llama", base / "stages", tp=1, pp=2)
    return base


def test_the_format_is_registered_once(vllm: Vllm):
    """VLLM may load its plug-ins more than once in a process."""
    from shardtool.integrations.vllm import register

    register()
    register()
    assert [one.__name__ for one in vllm.loaders[FORMAT]] == ["ShardtoolLoader"]


def test_a_worker_loads_its_own_rank(vllm: Vllm, shelf: Path, caplog: pytest.LogCaptureFixture):
    for rank in range(2):
        vllm.rank(2, rank)
        vllm.build = lambda rank=rank: empty(shelf / "llama-tp2", rank)  # type: ignore[misc]
        with caplog.at_level(logging.INFO, "vllm"):
            built = loader(vllm).load_model(vllm_config(), model_config(shelf / "llama-tp2"))
        assert not built.training
        wanted = digests(shardtool.stream(shelf / "llama-tp2", rank=rank))
        assert digests(built.state_dict().items()) == wanted
    said = [record.getMessage() for record in caplog.records]
    assert [text[:27] for text in said] == ["shardtool: rank 0 of tp 2: ", "shardtool: rank 1 of tp 2: "]


def test_a_worker_of_a_stage(vllm: Vllm, shelf: Path):
    vllm.rank(1, 0, 2, 1)
    vllm.build = lambda: empty(shelf / "stages", 1)
    built = loader(vllm).load_model(vllm_config(), model_config(shelf / "stages"))
    assert digests(built.state_dict().items()) == digests(shardtool.stream(shelf / "stages", rank=1))


@pytest.mark.parametrize(("moe", "said", "ep"), [(True, True, True), (True, False, False), (False, True, False)])
def test_experts_are_whole_where_there_are_some(vllm: Vllm, moe: bool, said: bool, ep: bool):
    vllm.rank(4, 3)
    made = loader(vllm)
    made._config = vllm_config(enable_expert_parallel=said)
    assert made._rank(model_config("x", is_moe=moe)).parallel == Parallel(4, 1, ep)


def test_stages_are_divided_as_vllm_is_told(vllm: Vllm, monkeypatch: pytest.MonkeyPatch):
    vllm.rank(2, 1, 2, 1)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1")
    found = loader(vllm)._rank(model_config("x"))
    assert (found.parallel, found.number) == (Parallel(2, 2, False, (3, 1)), 3)


def test_the_uri_is_where_the_weights_are(vllm: Vllm, shelf: Path):
    vllm.rank(2, 1)
    vllm.build = lambda: empty(shelf / "llama-tp2", 1)
    built = loader(vllm, {"uri": str(shelf / "llama-tp4")}).load_model(vllm_config(), model_config(shelf / "nowhere"))
    assert digests(built.state_dict().items()) == digests(shardtool.stream(shelf / "llama-tp2", rank=1))


def test_weights_may_be_loaded_into_a_model_that_is_built(vllm: Vllm, shelf: Path):
    """As vLLM does to load them again."""
    vllm.rank(2, 0)
    built = empty(shelf / "llama-tp2", 0)
    loader(vllm).load_weights(built, model_config(shelf / "llama-tp2"))
    assert digests(built.state_dict().items()) == digests(shardtool.stream(shelf / "llama-tp2", rank=0))


def test_where_the_weights_of_a_model_are(vllm: Vllm, tmp_path: Path):
    made, plain = loader(vllm, {"uri": "s3://bucket/x"}), loader(vllm)
    draft = model_config("draft")
    made._config = vllm_config()
    made._config.speculative_config = SimpleNamespace(draft_model_config=draft)
    assert made._uri(model_config("org/name")) == "s3://bucket/x"
    assert made._uri(draft) == "draft"
    assert plain._uri(model_config("org/name", model_weights="s3://bucket/y")) == "s3://bucket/y"
    assert plain._uri(model_config("org/name", revision="refs/pr/1")) == "hf://org/name@refs%2Fpr%2F1"
    assert plain._uri(model_config(tmp_path, revision="main")) == str(tmp_path)


def test_what_is_refused_is_a_line_of_the_log_too(
    vllm: Vllm, shelf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(UsageError):
        loader(vllm, {"ranks": 2})
    for path in (shelf / "llama-tp2").glob("*.*"):
        put(tmp_path, {path.name: path.read_bytes()})
    file = tmp_path / "model-rank-0-part-0.safetensors"
    file.write_bytes(flipped(file.read_bytes(), -1))
    vllm.rank(2, 0)
    vllm.build = lambda: empty(shelf / "llama-tp2", 0)
    with pytest.raises(ChecksumMismatch):
        loader(vllm).load_model(vllm_config(), model_config(tmp_path))
    with pytest.raises(NotFound):
        loader(vllm).load_model(vllm_config(), model_config(tmp_path / "nowhere"))
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.name for record in errors] == ["vllm.shardtool"] * 3
    assert ["the key 'ranks'" in errors[0].getMessage(), "differs from its digest" in errors[1].getMessage()] == [
        True,
        True,
    ]
    assert all(record.getMessage().startswith("shardtool: ") and record.exc_info is None for record in errors)


@pytest.mark.parametrize("source", ["llama", "llama-tp2"])
def test_a_model_that_cannot_be_built_for_so_many_ranks_is_refused_with_the_reason(
    vllm: Vllm, shelf: Path, source: str, caplog: pytest.LogCaptureFixture
):
    """VLLM says that 3 is not divisible by 2."""

    def fail() -> torch.nn.Module:
        raise AssertionError("3 is not divisible by 2")

    vllm.build = fail
    vllm.rank(3, 0)
    with pytest.raises(PlanError, match=r"tp 3|--tp 3"):
        loader(vllm).load_model(vllm_config(), model_config(shelf / source))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    vllm.rank(2, 0)  # which can be: vLLM's own error it is
    with pytest.raises(AssertionError, match="not divisible"):
        loader(vllm).load_model(vllm_config(), model_config(shelf / source))


def test_that_whole_tensors_are_read_is_a_warning(vllm: Vllm, shelf: Path, caplog: pytest.LogCaptureFixture):
    """Where shards would have needed less."""
    sys.modules["vllm"].__version__ = "0.99.0"  # type: ignore[attr-defined]
    vllm.rank(2, 0)
    into = Cutter(shelf / "llama-tp2", 0)
    into.register_parameter("new", torch.nn.Parameter(torch.zeros(1)))
    into.instead = lambda weights: into.cut(weights) | {"new"}
    vllm.build = lambda: into
    loader(vllm).load_model(vllm_config(), model_config(shelf / "llama-tp4"))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("shardtool: every rank takes whole tensors because ")
    assert "'new' is missing" in warning


def test_a_store_is_closed_when_no_model_was_built(vllm: Vllm, shelf: Path, monkeypatch: pytest.MonkeyPatch):
    from shardtool.stores.local.store import LocalStore

    closed: list[Any] = []
    monkeypatch.setattr(LocalStore, "close", lambda store: closed.append(store))

    def fail() -> torch.nn.Module:
        raise MemoryError

    vllm.build = fail
    with pytest.raises(MemoryError):
        loader(vllm).load_model(vllm_config(), model_config(shelf / "llama-tp2"))
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("uri", "says", "sniffed", "tie", "untied"),
    [
        ("tied-tp2", False, True, True, False),  # vLLM took the shards' head for one of its own
        ("tied-tp2", True, False, True, False),
        ("llama-tp2", True, False, False, False),  # the config of another folder
        ("tied", True, False, True, False),
        ("llama", True, False, False, True),  # a head that the folder of the config does not have
        ("llama", False, True, False, True),
    ],
)
def test_the_head_is_the_embedding_where_the_checkpoint_has_it_so(
    vllm: Vllm, shelf: Path, uri: str, says: bool, sniffed: bool, tie: bool, untied: bool
):
    from shardtool.checkpoint import open_checkpoint
    from shardtool.integrations.vllm_loader import _tie

    inner = HfConfig(says)
    made = model_config("x", hf_config=HfConfig(says, inner), word_embeddings_untied_by_checkpoint=sniffed)
    _tie(made, open_checkpoint(shelf / uri))
    assert (made.hf_config.tie_word_embeddings, made.word_embeddings_untied_by_checkpoint) == (tie, untied)
    assert inner.tie_word_embeddings is tie


def test_progress_is_shown_by_the_first_rank_alone(vllm: Vllm, shelf: Path, capsys: pytest.CaptureFixture[str]):
    """VLLM's own switch turns it off; nothing is drawn where there is no terminal."""
    made = loader(vllm)
    made.load_config.use_tqdm_on_load = True
    vllm.rank(2, 1)
    with made._bar() as tell:
        assert tell is None
    vllm.rank(2, 0)
    with loader(vllm)._bar() as tell:  # turned off
        assert tell is None
    with made._bar() as tell:
        tell(1, 2)
        tell(2, 2)
    assert capsys.readouterr().err == ""
