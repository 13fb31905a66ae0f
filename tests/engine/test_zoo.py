"""A few of the zoo's architectures, one of each kind, at two ranks: what shardtool writes is what vLLM's ranks hold.

All of them, at all sizes, is ``python -m tests.engine.run``; how long that takes is in CONTRIBUTING.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.report import passed, tabled, wrong

ROOT = Path(__file__).parents[2]
WITH_TABLE = ("LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "DeepseekV3ForCausalLM", "Olmo2ForCausalLM")
TRACED = (
    "MambaForCausalLM",  # computed tensors
    "Qwen3NextForCausalLM",  # two kinds of layers
    "SmolLM3ForCausalLM",  # vLLM's Transformers backend
    "WhisperForConditionalGeneration",  # an encoder, a bias that the checkpoint does not have
    "Qwen2VLForConditionalGeneration",
    "ModernBertForSequenceClassification",
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("zoo")
    command = [sys.executable, "-m", "tests.engine.run", *WITH_TABLE, *TRACED, "--tp", "2", "--variants", "a"]
    subprocess.run([*command, "--workdir", workdir], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    (kept,) = workdir.glob("vllm-*/results.json")
    return json.loads(kept.read_text())


@pytest.mark.parametrize("name", [*WITH_TABLE, *TRACED])
def test_traced_shards_are_what_vllm_holds_verify_and_merge(results, name):
    found = results[f"{name} a tp2"]
    assert found["error"] == ""
    assert wrong(found, "traced") == ""
    assert found["traced"]["tensors"] > 0


@pytest.mark.parametrize("name", WITH_TABLE)
def test_the_built_in_table_says_the_same(results, name):
    found = results[f"{name} a tp2"]
    assert tabled(found)
    assert wrong(found, "builtin") == ""


@pytest.mark.parametrize("name", TRACED)
def test_an_architecture_without_a_table_is_refused_where_one_is_asked_for(results, name):
    found = results[f"{name} a tp2"]
    assert found["builtin"]["refused"].startswith("UnsupportedModel")
    assert passed(found)
