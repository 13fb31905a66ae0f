"""vLLM's layout end to end: what ``save`` writes is, byte for byte, what ``tests/oracle.py`` says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardtool
from shardtool.dtypes import DType
from shardtool.errors import FormatError, PlanError, TensorMismatch, UnsupportedModel, UsageError
from shardtool.layouts import vllm
from shardtool.layouts.base import Model, Parallel
from shardtool.mosaic import Logical
from tests.builders import (
    KINDS,
    Files,
    Raw,
    Tensors,
    config,
    contents,
    model,
    places,
    put,
    random,
    rank_tensors,
    safetensors,
    tensors,
    whole_tensors,
)
from tests.oracle import cast, engine_dtype, expected

ROTARY = "model.layers.1.self_attn.rotary_emb.inv_freq"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def saved(files: Files, tp: int, **options: Any) -> Files:
    """What ``save`` writes of a checkpoint."""
    with places() as place:
        out = place("out")
        summary = shardtool.save(put(place("model"), files), out, tp=tp, **options)
        assert summary.complete
        assert shardtool.verify(out).ok
        return contents(out)


def ranks(files: Files, tp: int) -> list[Tensors]:
    return [rank_tensors(files, rank) for rank in range(tp)]


def merged(files: Files) -> Files:
    """What ``merge`` makes of shards."""
    with places() as place:
        out = place("merged")
        shardtool.merge(put(place("shards"), files), out)
        return contents(out)


def refusal(made: dict[str, Any], held: Tensors, tp: int, kind: type[Exception] = PlanError, **options: Any) -> str:
    """The sentence with which ``save`` refuses a checkpoint; it must not have written anything."""
    with places() as place:
        out = place("out")
        with pytest.raises(kind) as error:
            shardtool.save(put(place("model"), model(made, held)), out, tp=tp, **options)
        assert contents(out) == {}
    return str(error.value)


def check(made: dict[str, Any], held: Tensors, tp: int, dtype: str | None = None, **layout: Any) -> Files:
    """Save, compare every rank with the oracle, and see that merging gives the source back where nothing was lost."""
    options = {"dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]} if dtype else {}
    files = saved(model(made, held, **layout), tp, **options)
    found, wanted = ranks(files, tp), expected(held, made, tp, dtype)
    for rank in range(tp):
        assert found[rank].keys() == wanted[rank].keys()
        for name, raw in wanted[rank].items():
            assert found[rank][name] == raw, f"{name} of rank {rank}"
    if all(raw.dtype == engine_dtype(made, dtype) for raw in held.values()):
        assert whole_tensors(merged(files)) == held
    return files


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("family", KINDS)
def test_every_rank_of_every_family_holds_what_the_engine_holds(family: str, tp: int):
    made = config(family)
    check(made, tensors(made), tp, files=2)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", {"attention_bias": True}, id="llama attention bias"),
        pytest.param("llama", {"mlp_bias": True}, id="llama mlp bias"),
        pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama both biases"),
        pytest.param("granite", {"attention_bias": True, "mlp_bias": True}, id="granite biases"),
        pytest.param("granite", {"attention_sinks": True}, id="granite sinks"),
        pytest.param("mistral", {"attention_bias": True}, id="mistral attention bias"),
        pytest.param("qwen3", {"attention_bias": True}, id="qwen3 attention bias, of which the engine skips o_proj's"),
        pytest.param("gemma2", {"attention_bias": True}, id="gemma2 attention bias"),
        pytest.param("gemma3", {"attention_bias": True}, id="gemma3 attention bias"),
        pytest.param("qwen2", {"qk_norm": True}, id="qwen2 qk norm"),
        pytest.param("llama", {"tie_word_embeddings": True}, id="tied"),
        pytest.param("gemma3", {"tie_word_embeddings": False}, id="gemma3 untied"),
        pytest.param("llama", {"num_key_value_heads": 1}, id="one kv head"),
        pytest.param("llama", {"num_key_value_heads": None}, id="as many kv heads as heads"),
        pytest.param("llama", {"head_dim": None}, id="head_dim from hidden_size"),
        pytest.param("llama", {"head_dim": 6}, id="head_dim of its own"),
        pytest.param("llama", {"num_hidden_layers": 1}, id="one layer"),
        pytest.param("llama", {"num_hidden_layers": 12}, id="twelve layers"),
        pytest.param("llama", {"vocab_size": 7}, id="a vocabulary below 64"),
        pytest.param("llama", {"vocab_size": 128}, id="a vocabulary without padding"),
    ],
)
def test_every_variant_of_a_config_is_laid_out_as_the_engine_does(family: str, changes: dict[str, Any], tp: int):
    made = config(family, **changes)
    check(made, tensors(made), tp)


@pytest.mark.parametrize(
    ("says", "q", "o"),
    [
        ({"attention_bias": True}, True, True),
        ({"bias": True}, True, True),
        ({"qkv_bias": True}, True, False),
        ({"qkv_bias": False, "attention_bias": True}, False, True),
        ({"qkv_bias": True, "bias": True}, True, True),
        ({"attention_bias": False, "bias": None}, False, False),
    ],
)
def test_several_settings_say_which_projections_have_a_bias(says: dict[str, Any], q: bool, o: bool):
    made = config(**says)
    both = tensors(config(attention_bias=True))
    held = {name: raw for name, raw in both.items() if ".bias" not in name or (o if "o_proj" in name else q)}
    check(made, held, 4)


@pytest.mark.parametrize(
    ("says", "sinks"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, True),
        ({"layer_types": ["full_attention"] * 2, "attention_sinks": False}, False),
        ({"attention_sinks": True}, True),
        ({}, False),
    ],
)
def test_a_granite_with_kinds_of_layers_has_sinks_unless_it_says_otherwise(says: dict[str, Any], sinks: bool):
    made = config("granite", **says)
    check(made, tensors({**made, "attention_sinks": sinks}), 4)


@pytest.mark.parametrize(("kv", "tp"), [(1, 8), (2, 4), (2, 8), (4, 8), (1, 2)])
def test_ranks_share_kv_heads_where_there_are_fewer_of_them(kv: int, tp: int):
    made = config(num_key_value_heads=kv)
    held = tensors(made)
    files = check(made, held, tp)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    kv_of = [rank_tensors(files, rank)[name].array[-4:].tobytes() for rank in range(tp)]
    assert len(set(kv_of)) == kv


@pytest.mark.parametrize(("vocab", "tp"), [(192, 3), (384, 6), (384, 3), (150, 3)])
def test_six_heads_and_three_kv_heads_are_cut_in_three_and_six(vocab: int, tp: int):
    made = config(num_attention_heads=6, num_key_value_heads=3, hidden_size=24, vocab_size=vocab)
    check(made, tensors(made), tp)


def test_a_rank_past_the_vocabulary_holds_zeros():
    made = config(vocab_size=7)
    files = check(made, tensors(made), 8)
    assert not rank_tensors(files, 7)[HEAD].array.any()


@pytest.mark.parametrize(
    ("changes", "tp", "said"),
    [
        ({}, 3, "cannot be divided by --tp 3; the engine refuses it too"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 4, "number of heads 6 cannot be divided by --tp 4"),
        ({"intermediate_size": 50}, 4, "its size 50 cannot be divided by --tp 4"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 192},
            6,
            "--tp 6 is not a multiple of its 4 kv heads",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            4,
            "the number of kv heads 6 cannot be divided by --tp 4",
        ),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3},
            3,
            "the padded vocabulary 128 cannot be divided by --tp 3",
        ),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, 1, "6 heads and 4 kv heads, which do not divide"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_as_the_engine_does(changes: dict[str, Any], tp: int, said: str):
    made = config(**changes)
    assert said in refusal(made, tensors(made), tp)


@pytest.mark.parametrize("tp", [0, -1, 1025])
def test_a_tp_that_is_no_number_of_ranks_is_refused(tp: int):
    made = config()
    assert f"--tp {tp} is not a number of ranks" in refusal(made, tensors(made), tp, UsageError)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.layers.1.mlp.down_proj.weight", (32, 40), "intermediate_size in config.json is 48"),
        ("model.layers.1.mlp.up_proj.weight", (40, 32), "intermediate_size in config.json is 48"),
        ("model.layers.0.self_attn.o_proj.weight", (32, 40), "heads times head_dim in config.json is 32"),
        ("model.layers.0.self_attn.o_proj.weight", (32,), "heads times head_dim in config.json is 32"),
        ("model.layers.0.self_attn.k_proj.weight", (16, 32), "2 kv heads of 4 in config.json"),
        ("model.layers.0.self_attn.v_proj.weight", (8, 30), "cannot be stacked"),
        (EMBED, (101, 32), "config.json says vocab_size 100"),
    ],
)
def test_a_tensor_that_is_not_as_large_as_config_json_says_is_refused(name: str, shape: tuple[int, ...], said: str):
    made = config()
    held = {**tensors(made), name: random(shape, "BF16")}
    assert said in refusal(made, held, 2)


@pytest.mark.parametrize("key", ["vocab_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"])
@pytest.mark.parametrize("value", ["8", 8.0, -8, 0, True, [8]])
def test_a_size_in_config_json_that_is_none_is_refused(key: str, value: Any):
    made = config()
    assert f"config.json says {key} {value!r}, which is not a size" in refusal({**made, key: value}, tensors(made), 1)


# Tied embeddings.


def tied_with_head(head: Raw | None = None) -> tuple[dict[str, Any], Tensors]:
    """A model that says that it is tied and has a head all the same."""
    made = config(tie_word_embeddings=True)
    held = tensors(made)
    return made, {**held, HEAD: head or Raw("BF16", held[EMBED].array.copy())}


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_tied_model_with_an_equal_head_stores_one_of_them_and_merge_gives_both_back(tp: int):
    made, held = tied_with_head()
    files = check(made, held, tp)
    assert EMBED not in rank_tensors(files, 0)
    assert json.loads(files["config.json"])["tie_word_embeddings"] is True
    assert whole_tensors(merged(files)) == held


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_tied_model_with_a_head_of_its_own_stores_both_and_config_json_says_so(tp: int):
    made, held = tied_with_head(random((100, 32), "BF16", seed=77))
    files = check(made, held, tp)
    assert {EMBED, HEAD} <= rank_tensors(files, 0).keys()
    assert json.loads(files["config.json"]) == {**made, "tie_word_embeddings": False}
    back = merged(files)
    assert whole_tensors(back) == held
    assert json.loads(back["config.json"]) == made


def test_a_head_that_differs_in_its_last_element_only_is_a_head_of_its_own():
    made, held = tied_with_head()
    held[HEAD].array[-1, -1] ^= 1
    files = check(made, held, 2)
    assert {EMBED, HEAD} <= rank_tensors(files, 0).keys()


def test_an_untied_model_without_a_head_is_refused():
    made = config()
    held = tensors(made)
    del held[HEAD]
    assert "the checkpoint has no tensor 'lm_head.weight', which LlamaForCausalLM" in refusal(made, held, 2)


def test_a_head_in_a_family_that_has_none_is_refused():
    made = config("gemma2")
    assert HEAD in refusal(made, {**tensors(made), HEAD: random((100, 32), "BF16")}, 2)


# Names.


def test_a_llama_with_fused_sources_is_cut_like_one_with_split_ones():
    made = config(attention_bias=True, mlp_bias=True)
    for tp in (1, 2, 4, 8):
        check(made, {**tensors(made, fused=True)}, tp)


def test_a_phi3_with_split_sources_is_cut_like_one_with_fused_ones():
    made = config("phi3")
    for tp in (1, 2, 4):
        check(made, tensors(made, fused=False), tp)


def test_fused_and_split_sources_of_the_same_values_make_the_same_shards():
    made = config("phi3")
    held = tensors(made, fused=False)
    fused = {name: raw for name, raw in held.items() if not re.search(r"\.(q|k|v|gate|up)_proj\.", name)}
    for i in range(2):
        for to, of in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            layer = f"model.layers.{i}.{to.split('.')[0]}."
            parts = [held[f"{layer}{x}_proj.weight"].array for x in of]
            fused[f"model.layers.{i}.{to}.weight"] = Raw("BF16", np.concatenate(parts))
    assert ranks(saved(model(made, held), 4), 4) == ranks(saved(model(made, fused), 4), 4)


def test_layers_of_different_kinds_may_be_mixed():
    """One layer fused, the other not: each is cut from what it has."""
    made = config("llama")
    split, fused = tensors(made), tensors(made, fused=True, seed=1)
    held = {name: raw for name, raw in split.items() if ".layers.1." not in name}
    check(made, held | {name: raw for name, raw in fused.items() if ".layers.1." in name}, 4)


def test_tables_of_the_rotary_embedding_are_dropped_kept_and_given_back():
    made = config()
    held = {**tensors(made), ROTARY: random((2,), "F32")}
    files = saved(model(made, held), 2)
    assert all(ROTARY not in rank_tensors(files, rank) for rank in range(2))
    assert whole_tensors(merged(files)) == held
    manifest = json.loads(files["shardtool.json"])
    assert [(d["name"], d["kept"]) for d in manifest["source"]["dropped"]] == [(ROTARY, True)]


def test_a_bias_that_the_engine_skips_is_dropped_and_given_back():
    made = config()
    held = {**tensors(made), "lm_head.bias": random((100,), "BF16")}
    files = saved(model(made, held), 2)
    assert whole_tensors(merged(files)) == held


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.embed_positions.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "extra.bias",
    ],
)
def test_a_tensor_that_the_engine_does_not_know_is_refused(name: str):
    made = config()
    said = refusal(made, {**tensors(made), name: random((4,), "BF16")}, 2)
    assert f"1 source tensors have no place in LlamaForCausalLM with this config.json: {name!r}" in said


@pytest.mark.parametrize("name", sorted(tensors(config(num_hidden_layers=1))))
def test_any_tensor_that_is_missing_is_named(name: str):
    made = config(num_hidden_layers=1)
    held = tensors(made)
    del held[name]
    assert f"the checkpoint has no tensor {name!r}, which LlamaForCausalLM" in refusal(made, held, 2)


# Element types.


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_float16_stays_float16(family: str):
    made = config(family, torch_dtype="float16")
    files = check(made, tensors(made, dtype="F16"), 2)
    assert json.loads(files["config.json"]) == made


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_in_float16_is_written_as_bfloat16_because_the_engine_runs_it_so(family: str):
    made = config(family, torch_dtype="float16")
    files = check(made, tensors(made, dtype="F16"), 2)
    assert json.loads(files["config.json"]) == {**made, "torch_dtype": "bfloat16"}
    assert f"--dtype float16: the built-in table {family} can be BF16, F32" in refusal(
        made, tensors(made, dtype="F16"), 2, UsageError, dtype="float16"
    )


@pytest.mark.parametrize(("said", "to"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_float32_weights_are_cast_as_torch_casts_them(said: str, to: str):
    """Random bits: not-a-numbers, infinities, denormal numbers and ties too. torch keeps a NaN a NaN."""
    made = config(num_hidden_layers=1, torch_dtype=said)
    held = tensors(made)
    rng = np.random.default_rng(5)
    for i, (name, raw) in enumerate(list(held.items())):
        if i % 2:
            held[name] = Raw("F32", rng.integers(0, 1 << 32, raw.array.shape, np.uint32).view(np.float32))
    files = saved(model(made, held), 2)
    found, wanted = ranks(files, 2), expected(held, made, 2)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name, raw in theirs.items():
            a, b = (as_numbers(x) for x in (mine[name], raw))
            assert np.array_equal(a, b, equal_nan=True), name


def as_numbers(raw: Raw) -> Any:
    return cast(raw, "F32").array if raw.dtype != "F32" else raw.array


def test_a_source_of_mixed_types_is_held_in_one_and_float32_comes_back_narrower():
    made = config()
    held = tensors(made)
    for name in list(held)[::3]:
        held[name] = random(held[name].array.shape, "F32", 9)
    files = check(made, held, 4)
    with places() as place:
        out = place("merged")
        summary = shardtool.merge(put(place("shards"), files), out)
        assert whole_tensors(contents(out)) == {name: cast(raw, "BF16") for name, raw in held.items()}
    assert any("were narrowed when they were saved and stay BF16" in note for note in summary.notes)


def test_bfloat16_in_float32_comes_back_as_it_was():
    """A cast that loses nothing is undone by merge."""
    made = config()
    held = tensors(made)
    files = check(made, held, 2, dtype="F32")
    assert json.loads(files["config.json"])["torch_dtype"] == "float32"
    back = merged(files)
    assert whole_tensors(back) == held
    assert json.loads(back["config.json"]) == made


@pytest.mark.parametrize("says", [{"torch_dtype": "float32"}, {"dtype": "float32", "torch_dtype": None}])
def test_a_float32_config_needs_a_word(says: dict[str, Any]):
    made = config(**says)
    assert "config.json says float32" in refusal(made, tensors(made), 2, UsageError)
    files = check(made, tensors(made, dtype="F32"), 2, dtype="BF16")
    (key,) = [key for key in says if says[key]]
    assert json.loads(files["config.json"]) == {**made, key: "bfloat16"}


def test_a_config_without_dtype_needs_a_word_and_gets_one():
    made = config(torch_dtype=None)
    assert "config.json does not say a dtype" in refusal(made, tensors(made), 2, UsageError)
    files = check(made, tensors(made), 2, dtype="BF16")
    assert json.loads(files["config.json"]) == {**made, "dtype": "bfloat16"}


@pytest.mark.parametrize("says", [{"dtype": "bfloat16", "torch_dtype": None}, {"dtype": "bfloat16"}])
def test_dtype_is_read_under_its_new_name_and_its_old_one(says: dict[str, Any]):
    made = config(**says)
    files = check(made, tensors(made), 2)
    assert json.loads(files["config.json"]) == made


def test_where_both_names_are_there_both_are_corrected():
    made = config(dtype="bfloat16", torch_dtype="bfloat16")
    files = check(made, tensors(made), 2, dtype="F16")
    assert json.loads(files["config.json"]) == {**made, "dtype": "float16", "torch_dtype": "float16"}


@pytest.mark.parametrize(("dtype", "kind"), [("int8", UsageError), ("bf17", UsageError), ("float64", UsageError)])
def test_a_dtype_that_no_engine_runs_is_refused(dtype: str, kind: type[Exception]):
    made = config()
    refusal(made, tensors(made), 2, kind, dtype=dtype)
    refusal(config(torch_dtype=dtype), tensors(made), 2, kind)


def test_integers_are_not_cast_to_floats():
    made = config()
    held = {**tensors(made), "model.norm.weight": Raw("I64", np.zeros(32, np.int64))}
    assert "tensor 'model.norm.weight' is I64, which cannot be cast to BF16" in refusal(made, held, 2)


# Models that no table knows.


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "hqq"}},
        {"compression_config": {"format": "pack"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_a_model_quantized_in_a_way_that_no_table_knows_is_refused(change: dict[str, Any]):
    made = config()
    assert "which the built-in tables do not know" in refusal({**made, **change}, tensors(made), 2, UnsupportedModel)


def test_a_model_quantized_by_another_file_is_refused():
    made = config()
    with places() as place:
        source = put(place("model"), model(made, tensors(made), side={"hf_quant_config.json": b"{}"}))
        with pytest.raises(UnsupportedModel, match=r"hf_quant_config\.json, which the built-in tables do not know"):
            shardtool.save(source, place("out"), tp=2)


def test_an_unknown_architecture_is_refused_with_all_that_are_known():
    made = {**config(), "architectures": ["MambaForCausalLM"]}
    held = tensors(config())
    said = refusal(made, held, 2, UnsupportedModel)
    assert "the architecture MambaForCausalLM is not one that shardtool knows; known are " in said
    assert all(kind.architecture in said for kind in KINDS.values())


def test_a_setting_that_changes_the_model_beyond_the_table_is_refused():
    made = config(per_layer_config=[{}])
    assert "config.json sets per_layer_config" in refusal(made, tensors(made), 2, UnsupportedModel)


# Where the tensors lie does not matter.


@pytest.mark.parametrize(
    ("files", "where"),
    [
        (5, lambda name: hash_of(name)),
        (3, lambda name: int("layers.1" in name)),
        (40, lambda name: hash_of(name[::-1])),
    ],
)
def test_tensors_spread_oddly_over_files_make_the_same_shards(files: int, where: Callable[[str], int]):
    made = config()
    held = tensors(made)
    one = saved(model(made, held), 4)
    many = saved(model(made, dict(reversed(held.items())), files=files, where=where), 4)
    assert ranks(one, 4) == ranks(many, 4)


def hash_of(name: str) -> int:
    return sum(name.encode()) % 31


# Reading a rank's shapes backwards.


def logicals(held: Tensors) -> dict[str, Logical]:
    return {name: Logical(DType[raw.dtype], raw.array.shape) for name, raw in held.items()}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("family", KINDS)
def test_the_source_can_be_told_from_what_one_rank_holds(family: str, tp: int):
    made = config(family, tie_word_embeddings=family.startswith("gemma"))
    held = tensors(made)
    for rank in (0, tp - 1):
        found = vllm.for_config(made).infer(made, logicals(expected(held, made, tp)[rank]), Parallel(tp))
        assert found == logicals(held)


def test_what_a_rank_lacks_or_has_too_many_of_is_named():
    made = config()
    held = logicals(expected(tensors(made), made, 2)[0])
    layout = vllm.for_config(made)
    with pytest.raises(TensorMismatch, match=r"1 tensors that LlamaForCausalLM does not, first 'zzz'"):
        layout.infer(made, {**held, "zzz": held[HEAD]}, Parallel(2))
    del held["model.norm.weight"]
    with pytest.raises(TensorMismatch, match=r"the shards have no tensor 'model\.norm\.weight'"):
        layout.infer(made, held, Parallel(2))


@pytest.mark.parametrize("record", [{}, {"engine": "sglang", "kind": "builtin"}, {"engine": "vllm", "kind": "traced"}])
def test_a_layout_of_another_kind_is_refused(record: dict[str, Any]):
    with pytest.raises(FormatError, match="is not one that this version of shardtool knows"):
        vllm.from_manifest(record, "here")


def test_a_layout_with_a_size_that_nobody_knows_is_refused():
    record = json.loads(json.dumps(vllm.for_config(config()).record()))
    next(row for row in record["table"]["rows"] if row["size"])["size"] = "spoons"
    with pytest.raises(FormatError, match="here: the layout names the size 'spoons', which this version"):
        vllm.from_manifest(record, "here")


@pytest.mark.parametrize("of", ["{e}{i}", "model.layers.{i}.mlp.{e}.weight"])
def test_a_table_that_names_experts_is_refused_for_a_model_that_has_none(of: str):
    made = config("llama")
    record = json.loads(json.dumps(vllm.for_config(made).record()))
    row = next(row for row in record["table"]["rows"] if row["to"] == "model.layers.{i}.mlp.down_proj.weight")
    row["of"] = [of]
    changed, sources = vllm.from_manifest(record, "here"), Model(made, logicals(tensors(made)), DType.BF16)
    with pytest.raises(
        PlanError, match=r"makes 'model\.layers\.0\.mlp\.down_proj\.weight' of one '.*\{e\}.*' for each"
    ):
        changed.outline(sources, Parallel(2, 1))


def test_a_layout_is_read_back_from_its_record():
    layout = vllm.for_config(config())
    assert vllm.from_manifest(json.loads(json.dumps(layout.record())), "here") == layout
    assert layout.record()["engine_version"] == "0.32"


def test_a_table_that_knows_no_pipeline_stages_is_cut_for_one_stage_only():
    """Those of manifests that were written before tables said where the stages are."""
    made, held = config(), tensors(config())
    record = json.loads(json.dumps(vllm.for_config(made).record()))
    del record["table"]["pipeline"]
    for row in record["table"]["rows"]:
        row.pop("stage", None)
        row.pop("dtype", None)
    old, sources = vllm.from_manifest(record, "here"), Model(made, logicals(held), DType.BF16)
    assert old.outline(sources, Parallel(4)) == vllm.for_config(made).outline(sources, Parallel(4))
    with pytest.raises(UnsupportedModel, match="the table of llama knows no pipeline stages; leave --pp out"):
        old.outline(sources, Parallel(1, 2))


def test_a_file_of_the_oracles_ranks_is_what_the_engine_reads(tmp_path: Path):
    """The builder's writer and the safetensors library agree, so that the comparisons above compare something."""
    from safetensors.torch import load_file

    raw = random((3, 4), "BF16")
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"x": raw}))
    (tensor,) = load_file(path).values()
    assert tensor.view(-1).float().tolist() == as_numbers(raw).reshape(-1).tolist()
