"""Quantized checkpoints through all operations: every number lands where the engine wants it, and comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool.errors import PlanError, UnsupportedModel
from tests.builders import Tensors, contents, engine_saved, model, parsed, put, random, rank_tensors, whole_tensors
from tests.layouts.test_quantized import gpt_oss, mixture
from tests.quants import GPTQ, SCHEMES, expected, quantized


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_rank_holds_its_part_of_every_number(name: str, tp: int, tmp_path: Path):
    made, held = quantized(name)
    shardtool.save(put(tmp_path / "model", model(made, held, files=2)), tmp_path / "out", tp=tp, layout="vllm:builtin")
    files = contents(tmp_path / "out")
    for rank in range(tp):
        found, wanted = rank_tensors(files, rank), expected(name, held, rank, tp)
        assert {key: found[key] for key in wanted} == wanted
        rest = {key.rpartition(".")[2] for key in found.keys() - wanted.keys()}
        assert rest == {"weight", "_k_scale", "_v_scale", "_q_scale", "_prob_scale"}


@pytest.mark.parametrize("name", SCHEMES)
def test_resharding_is_saving_and_merging_gives_the_source_back(name: str, tmp_path: Path):
    made, held = quantized(name)
    source = put(tmp_path / "model", model(made, held))
    for tp in (1, 2, 4):
        shardtool.save(source, tmp_path / f"tp{tp}", tp=tp, layout="vllm:builtin")
    shardtool.reshard(tmp_path / "tp4", tmp_path / "again", tp=2)
    shardtool.reshard(tmp_path / "tp1", tmp_path / "wide", tp=4)
    for rank in range(2):
        assert rank_tensors(contents(tmp_path / "again"), rank) == rank_tensors(contents(tmp_path / "tp2"), rank)
    for rank in range(4):
        assert rank_tensors(contents(tmp_path / "wide"), rank) == rank_tensors(contents(tmp_path / "tp4"), rank)
    shardtool.merge(tmp_path / "tp4", tmp_path / "whole")
    assert whole_tensors(contents(tmp_path / "whole")) == held
    shardtool.verify(tmp_path / "tp4", against=source)


@pytest.mark.parametrize("name", SCHEMES)
def test_shards_that_an_engine_saved_are_read_without_a_manifest(name: str, tmp_path: Path):
    made, held = quantized(name)
    shardtool.save(put(tmp_path / "model", model(made, held)), tmp_path / "tp2", tp=2, layout="vllm:builtin")
    files = contents(tmp_path / "tp2")
    ranks = [rank_tensors(files, rank) for rank in range(2)]
    config = json.loads(files["config.json"])
    put(tmp_path / "bare", engine_saved(config, ranks))
    shardtool.reshard(tmp_path / "bare", tmp_path / "tp4", tp=4)
    shardtool.reshard(tmp_path / "tp4", tmp_path / "again", tp=2)
    assert [rank_tensors(contents(tmp_path / "again"), rank) for rank in range(2)] == ranks


@pytest.mark.parametrize("name", ["fp8-static", "fp8-block", "tensors-fp8", "gptq", "awq"])
def test_parts_that_a_checkpoint_has_fused_already_are_cut_as_if_they_were_apart(name: str, tmp_path: Path):
    made, held = quantized(name, fused=True)
    for tp in (1, 2):
        shardtool.save(put(tmp_path / "model", model(made, held)), tmp_path / f"tp{tp}", tp=tp, layout="vllm:builtin")
    one = rank_tensors(contents(tmp_path / "tp1"), 0)
    at = "model.layers.0.self_attn.qkv_proj."
    if name == "fp8-static":
        assert one[at + "weight_scale"].array.tolist() == [held[at + "weight_scale"].array.item()] * 3
    for part, *_, how in SCHEMES[name].parts:
        if isinstance(how, int) and how >= 0:
            assert one[at + part] == held[at + part]
    shardtool.merge(tmp_path / "tp2", tmp_path / "whole")
    assert whole_tensors(contents(tmp_path / "whole")) == held


def test_gptq_gets_the_list_of_modules_that_the_engine_would_look_for_in_the_files(tmp_path: Path):
    made, held = quantized("gptq")
    shardtool.save(put(tmp_path / "model", model(made, held)), tmp_path / "out", tp=2, layout="vllm:builtin")
    written = json.loads(contents(tmp_path / "out")["config.json"])["quantization_config"]
    assert written.pop("modules_in_block_to_quantize") == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert written == GPTQ
    assert shardtool.inspect(tmp_path / "out") is not None


def test_scales_of_keys_and_values_are_found_under_their_other_names(tmp_path: Path):
    made, held = quantized("fp8")
    held["model.layers.0.self_attn.k_proj.k_scale"] = random((), "F32", 1)
    held["model.layers.1.self_attn.kv_scale"] = random((1,), "BF16", 2)
    shardtool.save(put(tmp_path / "model", model(made, held)), tmp_path / "out", tp=2, layout="vllm:builtin")
    found = rank_tensors(contents(tmp_path / "out"), 1)
    scales = {key.removeprefix("model.layers."): raw for key, raw in found.items() if key.endswith("attn.k_scale")}
    assert scales["1.self_attn.attn.k_scale"].array.item() == held["model.layers.1.self_attn.kv_scale"].array.item()
    assert scales["0.self_attn.attn.k_scale"].array.item() not in (0, 0xBF80)
    assert found["model.layers.0.self_attn.attn.v_scale"].array.item() == 0xBF80  # -1 in bfloat16
    shardtool.merge(tmp_path / "out", tmp_path / "whole")
    back = whole_tensors(contents(tmp_path / "whole"))
    assert back.keys() == held.keys()


@pytest.mark.parametrize(
    ("name", "tp", "said"),
    [
        ("gptq", 8, "inputs, which are not whole groups, blocks or packs of 16"),
        ("awq", 8, "inputs, which are not whole groups, blocks or packs of 16"),
        ("fp8-block", 8, "inputs, which are not whole groups, blocks or packs of 16"),
        ("tensors-w4a16", 8, "inputs, which are not whole groups, blocks or packs of 16"),
    ],
)
def test_a_split_that_parts_groups_is_refused_with_the_sizes(name: str, tp: int, said: str, tmp_path: Path):
    made, held = quantized(name)
    source = put(tmp_path / "model", model(made, held))
    with pytest.raises(PlanError, match=said):
        shardtool.save(source, tmp_path / "out", tp=tp, layout="vllm:builtin")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_method_that_no_table_knows_is_refused_by_name(tmp_path: Path):
    made, held = quantized("fp8", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UnsupportedModel, match="quant_method 'bitsandbytes', which the built-in tables do not know"):
        shardtool.save(put(tmp_path / "model", model(made, held)), tmp_path / "out", tp=2, layout="vllm:builtin")


def mixtures_of_experts() -> dict[str, tuple[dict[str, Any], Tensors, str | None]]:
    """config.json, tensors and the backend of quantized models with experts."""
    return {
        "static": (*mixture("static", activation_scheme="static"), None),
        "blocks": (*mixture("block", weight_block_size=[64, 64]), None),
        "mxfp4": (*gpt_oss(), "marlin"),
    }


@pytest.mark.parametrize("ep", [False, True])
@pytest.mark.parametrize("name", ["static", "blocks", "mxfp4"])
def test_quantized_experts_are_resharded_and_merged(name: str, ep: bool, tmp_path: Path):
    made, held, backend = mixtures_of_experts()[name]
    source = put(tmp_path / "model", model(made, held))
    said: dict[str, Any] = {"layout": "vllm:builtin", "expert_parallel": ep, "moe_backend": backend}
    sizes = (1, 2) if name == "mxfp4" else (2, 4)  # at 4 ranks the blocks are made finer
    for tp in sizes:
        shardtool.save(source, tmp_path / f"tp{tp}", tp=tp, **said)
    for a, b in (sizes, sizes[::-1]):
        shardtool.reshard(tmp_path / f"tp{a}", tmp_path / f"again{b}", tp=b)
        wanted = contents(tmp_path / f"tp{b}")
        assert [rank_tensors(contents(tmp_path / f"again{b}"), r) for r in range(b)] == [
            rank_tensors(wanted, r) for r in range(b)
        ]
        shardtool.merge(tmp_path / f"tp{a}", tmp_path / f"whole{a}")
        assert whole_tensors(contents(tmp_path / f"whole{a}")) == held


def test_quantized_layers_lie_in_their_pipeline_stages(tmp_path: Path):
    made, held = quantized("fp8-static")
    shardtool.save(put(tmp_path / "model", model(made, held)), tmp_path / "out", tp=1, pp=2, layout="vllm:builtin")
    files = contents(tmp_path / "out")
    for stage in range(2):
        (key,) = [key for key in files if key.startswith(f"model-pp-{stage}-tp-0-")]
        found, wanted = parsed(files[key]), expected("fp8-static", held, 0, 1)
        mine = {name: raw for name, raw in wanted.items() if name.startswith(f"model.layers.{stage}.")}
        assert {name: raw for name, raw in found.items() if name in wanted} == mine
