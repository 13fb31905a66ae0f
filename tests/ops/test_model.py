"""``load_model``: the model that transformers itself would load, whole or as one rank of several.

Ranks are real processes, started by torchrun, which talk through gloo. Each finds its own rank's files and no others.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shardtool
from shardtool import manifest
from shardtool.errors import Incomplete, PlanError, TensorMismatch, UnsupportedModel, UsageError
from tests import builders

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 104,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {"intermediate_size": 50}),
    "phi3": ("phi3", "Phi3ForCausalLM", {}),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", {}),
    "mixtral": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", {"num_experts": 4, **EXPERTS}),
    "deepseek": (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS, **MLA},
    ),
}
AT = {2: tuple(KINDS), 4: ("llama", "qwen3", "qwen3_moe")}


def made(name: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint that transformers writes, with the names that such a model has on the hub."""
    kind, architecture, own = KINDS[name]
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **own, **changes})
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, architecture)(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
        model.save_pretrained(folder)
    return folder


def sharded(model: Path, out: Path, tp: int, **options: Any) -> Path:
    shardtool.save(model, out, tp=tp, layout="transformers", dtype="float32", **options)
    return out


def own_files(shards: Path, rank: int, to: Path) -> None:
    """The same folder without the other ranks' files."""
    to.mkdir(parents=True)
    for path in shards.iterdir():
        if not path.name.startswith("model-rank-") or path.name.startswith(f"model-rank-{rank}-"):
            shutil.copy(path, to)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in KINDS:
        made(name, folder / "whole" / name)
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, models: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    tp = request.param
    if not (models / "tp1").exists():
        sharded(models / "whole" / "llama", models / "tp1", 1)
        shardtool.save(models / "whole" / "llama", models / "vllm2", tp=2, layout="vllm:builtin", dtype="float32")
    for name in AT[tp]:
        out = sharded(models / "whole" / name, models / "shards" / f"{name}-{tp}", tp)
        for rank in range(tp):
            own_files(out, rank, models / f"tp{tp}" / f"rank{rank}" / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp)]
    done = subprocess.run(
        [*command, "-m", "tests.ranks", models],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((models / f"tp{tp}" / f"rank{rank}.json").read_text()) for rank in range(tp)]


# Several processes.


def test_ranks_together_are_the_unsharded_model(found: list[dict[str, Any]]):
    """Logits, the tensors put together again, buffers, and what is generated."""
    for rank in found:
        for name in AT[len(found)]:
            assert rank[name]["difference"] < 1e-5, name
            assert rank[name]["unlike"] == [], name
            assert rank[name]["generates"], name
            assert rank[name]["divided"] >= 4, name
            assert rank[name]["training"] is False
            assert rank[name]["eos"] == 2


@pytest.mark.parametrize("where", ["whole/llama", "tp1", "vllm2"])
def test_ranks_take_their_slices_of_what_was_made_for_others(found: list[dict[str, Any]], where: str):
    """Whole tensors, shards for another number of ranks, and those of another engine."""
    for rank in found:
        assert rank[where]["difference"] < 1e-5
        assert rank[where]["unlike"] == []
        assert rank[where]["generates"]
        assert rank[where]["divided"] >= 4


# One process.


def state(model: Any) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shards", [False, True])
def test_one_process_has_the_model_that_transformers_loads(models: Path, tmp_path: Path, name: str, shards: bool):
    whole = models / "whole" / name
    wanted = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    model = shardtool.load_model(sharded(whole, tmp_path / "out", 1) if shards else whole)
    mine, theirs = state(model), state(wanted)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype is theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key
    assert not model.training
    assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), wanted.parameters(), strict=True))
    tokens = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, wanted(tokens).logits)


@pytest.mark.parametrize("name", ["tied", "gemma3"])
def test_tied_weights_are_one(models: Path, name: str):
    model = shardtool.load_model(models / "whole" / name)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("limit", [0, "64KiB", None])
def test_another_dtype_is_transformers_own_cast(models: Path, limit: Any):
    """Of DeepSeek's tensors one stays float32."""
    whole = models / "whole" / "deepseek"
    wanted = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16).state_dict()
    told: list[tuple[int, int]] = []
    model = shardtool.load_model(
        whole, dtype="bfloat16", memory_limit=limit, progress=lambda done, total: told.append((done, total))
    )
    assert {tensor.dtype for tensor in wanted.values()} == {torch.bfloat16, torch.float32}
    for key, tensor in model.state_dict().items():
        assert tensor.dtype is wanted[key].dtype, key
        assert torch.equal(tensor, wanted[key]), key
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_shards_hold_the_modules_own_names(models: Path, tmp_path: Path):
    """So that a rank's files are its state dict."""
    out = sharded(models / "whole" / "mixtral", tmp_path / "out", 2)
    for rank in (0, 1):
        held = builders.rank_tensors(builders.contents(out), rank)
        experts = held["model.layers.1.mlp.experts.gate_up_proj"].array
        assert experts.shape == (4, 48, 32)
        for e in range(4):
            for x, at in (("w1", 0), ("w3", 24)):
                name = f"model.layers.1.block_sparse_moe.experts.{e}.{x}.weight"
                source = shardtool.load(models / "whole" / "mixtral")[name].numpy()
                assert (experts[e, at : at + 24] == source[24 * rank : 24 * rank + 24]).all()
    assert shardtool.verify(out, against=models / "whole" / "mixtral").ok


def test_shards_are_resharded_and_merged_by_their_record(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without transformers, which is needed once."""
    whole = models / "whole" / "qwen3_moe"
    two = sharded(whole, tmp_path / "two", 2)
    four = sharded(whole, tmp_path / "four", 4)
    monkeypatch.setitem(sys.modules, "transformers", None)
    shardtool.reshard(two, tmp_path / "again", tp=4)
    for rank in range(4):
        assert builders.rank_tensors(builders.contents(tmp_path / "again"), rank) == builders.rank_tensors(
            builders.contents(four), rank
        )
    shardtool.merge(two, tmp_path / "merged")
    held, given = shardtool.load(tmp_path / "merged"), shardtool.load(whole)
    assert held.keys() == given.keys()
    assert all(torch.equal(held[name], given[name]) for name in given)


# Refusals.


def test_a_damaged_tensor_is_refused(models: Path, tmp_path: Path):
    out = sharded(models / "whole" / "qwen3", tmp_path / "out", 1)
    path = out / "model-rank-0-part-0.safetensors"
    data = path.read_bytes()
    path.write_bytes(builders.flipped(data, len(data) - 5))
    with pytest.raises(shardtool.ChecksumMismatch):
        shardtool.load_model(out)
    assert shardtool.load_model(out, verify=False)


def changed(folder: Path, to: Path, **config: Any) -> Path:
    """The checkpoint with another config.json."""
    shutil.copytree(folder, to)
    said = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**said, **config}))
    return to


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"hidden_size": 64}, PlanError, r"tensor '.*' is \[.*64.*\] in LlamaForCausalLM .* tensors make \[.*32.*\]"),
        ({"num_hidden_layers": 3}, PlanError, r"no tensor for 'model\.layers\.2\..*', which LlamaForCausalLM needs"),
        ({"num_hidden_layers": 1}, PlanError, r"tensors have no place in LlamaForCausalLM, first 'model\.layers\.1"),
        ({"architectures": ["NoSuchModel"]}, UnsupportedModel, r"has no NoSuchModel of the model type 'llama'"),
        ({"architectures": ["AutoModel"]}, UnsupportedModel, r"has no AutoModel"),
        ({"architectures": None}, UnsupportedModel, r"does not say which model it is"),
        ({"model_type": "none", "auto_map": {"AutoModel": "x.y"}}, UnsupportedModel, r"does not run .* own code"),
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModel, r"has a quantization_config"),
        ({"hidden_size": "wide"}, UnsupportedModel, r"cannot make a LlamaForCausalLM of this config\.json"),
    ],
)
def test_a_checkpoint_that_is_not_the_models_is_refused(
    models: Path, tmp_path: Path, config: dict[str, Any], error: type[Exception], said: str
):
    with pytest.raises(error, match=said):
        shardtool.load_model(changed(models / "whole" / "llama", tmp_path / "changed", **config))


def test_shards_that_are_not_the_models_are_refused(models: Path, tmp_path: Path):
    out = sharded(models / "whole" / "llama", tmp_path / "out", 1)
    path = out / manifest.KEY
    made_of = manifest.decode(path.read_bytes(), str(path))
    config = json.loads(made_of.config)
    for layers, error, said in ((3, Incomplete, r"no tensor 'model\.layers\.2"), (1, TensorMismatch, "does not have")):
        path.write_bytes(replace(made_of, config=json.dumps({**config, "num_hidden_layers": layers})).encode())
        with pytest.raises(error, match=said):
            shardtool.load_model(out)


@pytest.mark.parametrize(("layout", "tp"), [("vllm:builtin", 1), ("vllm:builtin", 2), ("transformers", 4)])
def test_one_process_has_the_model_of_any_shards(models: Path, tmp_path: Path, layout: str, tp: int):
    whole = models / "whole" / "qwen3"
    shardtool.save(whole, tmp_path / "out", tp=tp, layout=layout, dtype="float32")
    made, wanted = (
        state(shardtool.load_model(tmp_path / "out", memory_limit="4MiB")),
        state(shardtool.load_model(whole)),
    )
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())


def test_ranks_need_as_many_processes(models: Path):
    with pytest.raises(UsageError, match="tp=4 needs 4 processes and there are 1"):
        shardtool.load_model(models / "whole" / "qwen3", tp=4)


def test_heads_that_do_not_divide_are_refused_before_anything_is_written(models: Path, tmp_path: Path):
    with pytest.raises(PlanError, match=r"self_attn\.[qkv]_proj\..*' has 4 heads of 8 rows, which --tp 3 does not"):
        sharded(models / "whole" / "qwen3", tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tp": 0}, "tp=0"),
        ({"tp": "two"}, "tp='two'"),
        ({"tp": True}, "tp=True"),
        ({"device": "gpu"}, "device='gpu' is not a device"),
        ({"device": "mps"}, "device='mps' is not supported"),
        ({"device": "cuda:99"}, "device='cuda:99': this machine has"),
        ({"device": 0}, "device=0"),
        ({"dtype": "wide"}, "'wide' is not a dtype"),
        ({"memory_limit": "lots"}, "memory"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_by_name(models: Path, options: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=said):
        shardtool.load_model(models / "whole" / "tied", **options)


def test_without_transformers_it_says_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"transformers is not installed.*pip install 'shardtool\[transformers\]'"):
        shardtool.load_model(models / "whole" / "tied")


def test_an_old_transformers_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    with pytest.raises(UsageError, match=r"transformers 4\.57\.6 is too old .* from 5\.19 on"):
        shardtool.load_model(models / "whole" / "tied")
