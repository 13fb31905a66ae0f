"""``verify --engine`` and traces for ``save``: what the engine is asked. A program that keeps the job stands in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool.errors import UnsupportedModel, UsageError
from tests.builders import config, model, put, tensors
from tests.layouts.test_quantized import gpt_oss


@pytest.fixture
def asked(tmp_path: Path) -> Any:
    """Runs an operation that asks an engine -> the job that the engine got."""
    python, kept = tmp_path / "engine", tmp_path / "JOB.json"
    python.write_text(f'#!/bin/sh\nif [ "$#" -gt 3 ]; then cp "$4" {kept}; exit 7; fi\n')
    python.chmod(0o755)

    def of(operation: Any, *args: Any, **said: Any) -> Any:
        with pytest.raises(UnsupportedModel, match="vLLM ended with exit code 7"):
            operation(*args, engine_python=str(python), **said)
        return json.loads(kept.read_text())

    return of


def without_a_manifest(folder: Path) -> Path:
    """The shards of a folder as an engine would have left them."""
    (folder / "shardtool.json").unlink()
    return folder


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("known", [True, False])
def test_shards_without_a_manifest_are_of_the_sizes_that_their_names_say(
    asked: Any, tmp_path: Path, tp: int, pp: int, known: bool
):
    source = put(tmp_path / "model", model(made := config(), tensors(made)))
    shardtool.save(source, tmp_path / "out", tp=tp, pp=pp)
    out = without_a_manifest(tmp_path / "out")
    if not known:
        (out / "config.json").write_text(json.dumps({**made, "architectures": ["NovelForCausalLM"]}))
    (sizes,) = asked(shardtool.verify, out, engine="vllm", quick=True)["parallels"]
    assert (sizes["tp"], sizes.get("pp", 1)) == (tp, pp)


def test_the_backend_is_the_one_that_the_shards_were_made_for(asked: Any, tmp_path: Path):
    shardtool.save(put(tmp_path / "model", model(*gpt_oss())), out := tmp_path / "out", tp=2, moe_backend="marlin")
    assert asked(shardtool.verify, out, engine="vllm", quick=True)["moe_backend"] == "marlin"
    assert asked(shardtool.verify, out, engine="vllm", quick=True, moe_backend="triton")["moe_backend"] == "triton"
    assert asked(shardtool.reshard, out, tmp_path / "x", tp=1, layout="vllm:traced")["moe_backend"] == "marlin"


@pytest.mark.parametrize(
    ("said", "flag", "dtype"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", None),  # which some models run as bfloat16
        ("float16", "float16", "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_a_trace_for_shards_is_of_the_dtype_that_config_json_or_the_flag_says(
    asked: Any, tmp_path: Path, said: str, flag: str, dtype: str | None
):
    source = put(tmp_path / "model", model(config(torch_dtype=said), tensors(config())))
    job = asked(shardtool.save, source, tmp_path / "out", tp=2, layout="vllm:traced", dtype=flag)
    assert job["dtype"] == dtype


@pytest.mark.parametrize(
    ("layout", "architecture"), [("vllm:traced", "LlamaForCausalLM"), ("vllm", "NovelForCausalLM")]
)
def test_the_version_that_was_said_is_the_one_that_is_traced(tmp_path: Path, layout: str, architecture: str):
    """Also where the layout is traced only because no table knows the model."""
    source = put(tmp_path / "model", model(config(architectures=[architecture]), tensors(config())))
    python = tmp_path / "engine"
    python.write_text('#!/bin/sh\nif [ "$#" -gt 3 ]; then exit 7; fi\necho 0.32.0+cpu\n')
    python.chmod(0o755)
    said: dict[str, Any] = {"tp": 2, "layout": layout, "engine_python": str(python)}
    with pytest.raises(UsageError, match=r"has vLLM 0\.32\.0, not 0\.27: leave --engine-version out"):
        shardtool.save(source, tmp_path / "out", engine_version="0.27", **said)
    with pytest.raises(UnsupportedModel, match="vLLM ended with exit code 7"):
        shardtool.save(source, tmp_path / "out", engine_version="0.32", **said)


@pytest.mark.parametrize("flag", ["engine_python", "trust_remote_code", "moe_backend"])
def test_flags_for_an_engine_that_is_not_asked_are_refused(flag: str, tmp_path: Path):
    said: dict[str, Any] = {flag: "x"}
    with pytest.raises(UsageError, match="are for --engine; say which one to ask"):
        shardtool.verify(tmp_path, **said)
