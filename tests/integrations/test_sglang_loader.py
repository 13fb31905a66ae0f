"""The loader that SGLang makes in its schedulers, with a stand-in for SGLang: what it asks of it, and what it logs.

That it works in SGLang itself is tested in ``tests/engine/test_sglang_plugin.py``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import shardtool
from shardtool.errors import ChecksumMismatch, NotFound, PlanError, TensorMismatch, UnsupportedModel, UsageError
from shardtool.layouts.base import Parallel
from tests.builders import config, flipped, model, put, tensors
from tests.integrations.modules import Cutter, digests, empty

FORMAT = "shardtool"


@dataclass
class Sglang:
    """A stand-in: its choices and hooks, the place of the process, the model that it builds next, what it did then."""

    choices: list[str] = field(default_factory=list)
    hooks: list[tuple[str, Callable[..., Any], str]] = field(default_factory=list)
    parallel: Any = None
    places: Any = None
    path: str = ""
    build: Callable[[], torch.nn.Module] = torch.nn.Module
    did: list[str] = field(default_factory=list)

    def rank(self, tp: int, tp_rank: int, **more: Any) -> None:
        usual = {"pp_size": 1, "pp_rank": 0, "moe_ep_size": 1, "attn_tp_size": tp}
        self.parallel = SimpleNamespace(**{"tp_size": tp, "tp_rank": tp_rank, **usual, **more})


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sglang]:
    """SGLang as far as the plug-in imports it. The plug-in's own modules are imported anew with it."""
    made = Sglang()
    made.rank(1, 0)

    class BaseModelLoader:
        def __init__(self, load_config: Any) -> None:
            self.load_config = load_config

    class DefaultModelLoader:
        @staticmethod
        def load_weights_only(built: Any, weights: Any, device: torch.device) -> None:
            made.did.append("load_weights")
            built.load_weights(weights)

        @staticmethod
        def postprocess_weights(built: Any, device: torch.device) -> None:
            made.did.append("process")

    class HookRegistry:
        @staticmethod
        def register(target: str, hook: Callable[..., Any], kind: str) -> None:
            made.hooks.append((target, hook, kind))

    def module(name: str, **content: Any) -> None:
        one = ModuleType(name)
        vars(one).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, one)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, one)

    module("sglang", __version__="0.5.23")
    for name in ("srt", "srt.eplb", "srt.model_loader", "srt.plugins"):
        module(f"sglang.{name}")
    module("sglang.srt.eplb.expert_location", get_global_expert_location_metadata=lambda: made.places)
    module(
        "sglang.srt.model_loader.loader",
        BaseModelLoader=BaseModelLoader,
        DefaultModelLoader=DefaultModelLoader,
        _get_quantization_config=lambda model_config, load_config: None,
        _initialize_model=lambda model_config, load_config, quantization: made.build(),
        post_load_weights=lambda built: made.did.append("post_load"),
    )
    module("sglang.srt.model_loader.utils", set_default_torch_dtype=lambda dtype: nullcontext())
    module("sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry, HookType=SimpleNamespace(AROUND="around"))
    module(
        "sglang.srt.runtime_context",
        get_parallel=lambda: made.parallel,
        get_model=lambda: SimpleNamespace(model_path=made.path),
    )
    module("sglang.srt.server_args", add_load_format_choices=made.choices.extend)
    ours = [f"shardtool.integrations.{name}" for name in ("sglang", "sglang_loader")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield made
    for name in ours:
        sys.modules.pop(name, None)


def model_config(path: Any, **more: Any) -> SimpleNamespace:
    usual = {
        "model_path": str(path),
        "revision": None,
        "quantization": None,
        "dtype": torch.bfloat16,
        "is_draft_model": False,
        "_is_already_quantized": lambda: False,
    }
    return SimpleNamespace(**{**usual, **more})


def loader(sglang: Sglang, extra: Any = None, **more: Any) -> Any:
    """A loader as SGLang makes it: the hook gives ``LoadConfig`` its class."""
    from shardtool.integrations.sglang import register

    register()
    load_config = SimpleNamespace(load_format=FORMAT, model_loader_extra_config=extra, draft_model_idx=None, **more)
    sglang.hooks[0][1](pytest.fail, load_config)
    return load_config.load_format(load_config)


def load(sglang: Sglang, path: Any, extra: Any = None, **more: Any) -> Any:
    device = SimpleNamespace(device="cpu")
    return loader(sglang, extra).load_model(model_config=model_config(path, **more), device_config=device)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("shelf")
    made = config()
    put(base / "llama", model(made, tensors(made)))
    for tp in (2, 4):
        shardtool.save(base / "llama", base / f"llama-tp{tp}", tp=tp, layout="sglang")
    return base


def test_the_format_becomes_a_choice_once(sglang: Sglang):
    """And other formats are verified as they were."""
    from shardtool.integrations.sglang import register

    register()
    register()
    assert sglang.choices == [FORMAT]
    ((target, hook, kind),) = sglang.hooks
    assert (target, kind) == ("sglang.srt.configs.load_config.LoadConfig._verify_load_format", "around")
    seen: list[Any] = []
    other = SimpleNamespace(load_format="auto")
    hook(seen.append, other)
    assert (seen, other.load_format) == ([other], "auto")


@pytest.mark.parametrize(
    ("uri", "did"),
    [
        ("llama-tp2", ["post_load", "process"]),
        ("llama-tp4", ["post_load", "process"]),
        ("llama", ["load_weights", "process"]),  # which does what comes after by itself
    ],
)
def test_a_scheduler_loads_its_own_rank(
    sglang: Sglang, shelf: Path, uri: str, did: list[str], caplog: pytest.LogCaptureFixture
):
    for rank in range(2):
        sglang.rank(2, rank)
        sglang.did.clear()
        sglang.build = lambda rank=rank: Cutter(shelf / "llama-tp2", rank)  # type: ignore[misc]
        with caplog.at_level(logging.INFO, "sglang"):
            built = load(sglang, shelf / "nowhere", {"uri": str(shelf / uri)})
        assert not built.training
        assert sglang.did == did
        assert digests(built.state_dict().items()) == digests(shardtool.stream(shelf / "llama-tp2", rank=rank))
    said = [record.getMessage() for record in caplog.records]
    assert [text[:27] for text in said] == ["shardtool: rank 0 of tp 2: ", "shardtool: rank 1 of tp 2: "]


def test_ranks_of_stages_and_of_experts(sglang: Sglang, shelf: Path):
    loader(sglang)
    from shardtool.integrations.sglang_loader import _rank

    sglang.rank(2, 1, pp_size=2, pp_rank=1, moe_ep_size=2)
    assert (_rank().parallel, _rank().number) == (Parallel(2, 2, True), 3)


@pytest.mark.parametrize(
    ("more", "places", "said"),
    [
        ({}, None, ""),
        ({}, [0, 1, 2, 3], ""),
        ({"moe_ep_size": 4}, None, ""),
        ({"attn_tp_size": 2}, None, "its attention is divided by 2 where tp is 4"),
        ({"moe_ep_size": 2}, None, "its experts are divided by 2 where tp is 4"),
        ({"moe_dense_tp_size": 1}, None, "its dense layers are divided by 1 where tp is 4"),
        ({}, [1, 0, 2, 3], "its experts are at other places than in the checkpoint"),
        ({}, [0, 1, 2, 3, 0, 1], "its experts are at other places than in the checkpoint"),
    ],
)
def test_what_no_layout_says_is_known(sglang: Sglang, more: dict[str, int], places: list[int] | None, said: str):
    loader(sglang)
    from shardtool.integrations.sglang_loader import _apart

    sglang.rank(4, 0, **more)
    if places is not None:
        sglang.places = SimpleNamespace(physical_to_logical_map=torch.tensor([places] * 2), num_logical_experts=4)
    assert _apart().startswith(said) if said else _apart() == ""


def test_where_the_weights_of_a_model_are(sglang: Sglang, tmp_path: Path):
    sglang.path = "org/name"
    made, plain = loader(sglang, {"uri": "s3://bucket/x"}), loader(sglang)
    assert made._uri(model_config("org/name")) == "s3://bucket/x"
    assert made._uri(model_config("org/draft", is_draft_model=True)) == "org/draft"
    assert made._uri(model_config("org/name", is_draft_model=True)) == "s3://bucket/x"  # a part of the model
    assert plain._uri(model_config("org/name", revision="refs/pr/1")) == "hf://org/name@refs%2Fpr%2F1"
    assert plain._uri(model_config(tmp_path, revision="main")) == str(tmp_path)


def test_what_sglang_quantizes_by_itself_is_left_to_it(sglang: Sglang, shelf: Path):
    for asked in ("modelopt_fp8", "auto-round-int8"):
        with pytest.raises(UsageError, match=f"{asked} while it loads, .* use --load-format auto"):
            load(sglang, shelf / "llama-tp2", quantization=asked)
    made = loader(sglang)
    made.load_config.draft_model_idx = 1
    with pytest.raises(UsageError, match="use --speculative-draft-load-format auto"):
        made.load_model(model_config=model_config(shelf / "llama"), device_config=SimpleNamespace(device="cpu"))
    sglang.build = lambda: Cutter(shelf / "llama-tp2", 0)
    sglang.rank(2, 0)
    load(sglang, shelf / "llama", quantization="modelopt_fp8", _is_already_quantized=lambda: True)


def test_processed_shards_of_a_quantized_model_are_refused(sglang: Sglang, shelf: Path, tmp_path: Path):
    """They have no manifest: SGLang saved them."""
    for rank in range(2):
        name = f"model-rank-{rank}-part-0.safetensors"
        put(tmp_path, {name: (shelf / "llama-tp2" / name).read_bytes()})
    sglang.rank(2, 0)
    sglang.build = lambda: empty(shelf / "llama-tp2", 0)
    load(sglang, tmp_path)
    with pytest.raises(UnsupportedModel, match="use --load-format sharded_state"):
        load(sglang, tmp_path, quantization="fp8")


def test_what_is_refused_is_a_line_of_the_log_too(
    sglang: Sglang, shelf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(UsageError):
        loader(sglang, {"ranks": 2})
    for path in (shelf / "llama-tp2").glob("*.*"):
        put(tmp_path, {path.name: path.read_bytes()})
    file = tmp_path / "model-rank-0-part-0.safetensors"
    file.write_bytes(flipped(file.read_bytes(), -1))
    sglang.rank(2, 0)
    sglang.build = lambda: empty(shelf / "llama-tp2", 0)
    with pytest.raises(ChecksumMismatch):
        load(sglang, tmp_path)
    with pytest.raises(NotFound):
        load(sglang, tmp_path / "nowhere")
    sglang.build = lambda: empty(shelf / "llama-tp4", 0)
    with pytest.raises(TensorMismatch):
        load(sglang, shelf / "llama-tp2")
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.name for record in errors] == ["sglang.shardtool"] * 4
    assert "the key 'ranks'" in errors[0].getMessage()
    assert "differs from its digest" in errors[1].getMessage()
    assert "in SGLang 0.5.23: " in errors[3].getMessage()
    assert all(record.getMessage().startswith("shardtool: ") and record.exc_info is None for record in errors)


def test_a_model_that_cannot_be_built_says_why(sglang: Sglang, shelf: Path):
    """SGLang's own word is an assertion without words; where shardtool knows nothing, its own error comes."""

    def fail() -> torch.nn.Module:
        raise AssertionError

    sglang.build = fail
    sglang.rank(3, 0)
    with pytest.raises(PlanError, match="3"):
        load(sglang, shelf / "llama")
    sglang.rank(2, 0)
    with pytest.raises(AssertionError):
        load(sglang, shelf / "llama")


def test_a_store_is_closed_when_no_model_was_built(sglang: Sglang, shelf: Path, monkeypatch: pytest.MonkeyPatch):
    from shardtool.stores import open_store

    closed: list[Any] = []
    monkeypatch.setattr(type(open_store(str(shelf / "llama-tp2"))), "close", lambda store: closed.append(store))

    def fail() -> torch.nn.Module:
        raise MemoryError

    sglang.build = fail
    sglang.rank(2, 0)
    with pytest.raises(MemoryError):
        load(sglang, shelf / "llama-tp2")
    assert len(closed) == 1
