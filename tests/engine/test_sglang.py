"""SGLang on the path, as CONTRIBUTING says: traced, and compared with what was kept and with what its ranks hold."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from shardtool.errors import UnsupportedModel
from shardtool.layouts import difference
from shardtool.parallel import Parallel
from shardtool.tracing import parent
from tests.engine import kept, sglang_truth
from tests.layouts import traced
from tests.layouts.traced.__main__ import again

GROUP = "sglang-0.5.23"
MODELS = ("llama-tied", "qwen3moe", "gpt_oss", "deepseek_v3", "gemma3")
TP = 4

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not on the path"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of some kept models."""
    work = tmp_path_factory.mktemp("models")
    return {name: kept.make(traced.read(GROUP, name), work / name) for name in MODELS}


@pytest.fixture(scope="module")
def truth(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SGLang's ranks hold of each."""
    work = tmp_path_factory.mktemp("truth")
    assert sglang_truth.load(models, TP, work) == dict.fromkeys(models, "")
    return work


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_is_what_was_kept_and_what_the_ranks_hold(name: str, models: dict[str, Path], truth: Path) -> None:
    before = traced.read(GROUP, name)
    now = again(before, None)
    assert difference.files(before.layout, now.layout) == []
    assert kept.differences(now, TP, models[name], truth / name) == []


@pytest.mark.parametrize("name", [name for name in traced.names(GROUP) if name not in MODELS])
def test_a_trace_is_what_was_kept(name: str) -> None:
    before = traced.read(GROUP, name)
    assert difference.files(before.layout, again(before, None).layout) == []


def test_what_it_cannot_be_traced_for_is_refused_with_the_reason() -> None:
    one = traced.read(GROUP, "llama-tied")
    tensors = one.layout.tensors
    job = parent.Job("sglang", "a model", '{"architectures": ["LlamaForCausalLM"]}', tensors, (Parallel(1, 2),))
    with pytest.raises(UnsupportedModel, match="one file name for the same rank of every pipeline stage"):
        parent.trace(job)
