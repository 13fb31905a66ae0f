"""The tables from GPT-2 to Qwen2.5-VL: ``save`` writes, byte for byte, what ``tests/layouts/classic.py`` says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import shardtool
from shardtool.dtypes import DType
from shardtool.errors import PlanError, UnsupportedModel
from shardtool.layouts import vllm
from shardtool.layouts.base import Model, Parallel
from shardtool.mosaic import Logical
from tests.builders import Files, Raw, Tensors, contents, model, places, put, random, rank_tensors, whole_tensors
from tests.layouts import classic
from tests.layouts.classic import KINDS, config, expected_rank, tensors


def saved(made: dict[str, Any], held: Tensors, tp: int) -> tuple[Files, Files]:
    """What ``save`` writes of a checkpoint, and what ``merge`` makes of that again."""
    with places() as place:
        out, back = place("out"), place("back")
        assert shardtool.save(put(place("model"), model(made, held)), out, tp=tp).complete
        shardtool.merge(out, back)
        return contents(out), contents(back)


def check(family: str, made: dict[str, Any], tp: int, held: Tensors | None = None, canonical: Tensors | None = None):
    """Save, compare every rank, merge back. ``canonical``: the tensors as the oracle names them."""
    held = tensors(family, made) if held is None else held
    files, back = saved(made, held, tp)
    for rank in range(tp):
        found, wanted = rank_tensors(files, rank), expected_rank(family, made, canonical or held, tp, rank)
        assert found.keys() == wanted.keys()
        for name, raw in wanted.items():
            assert found[name] == raw, f"{name} of rank {rank}"
    assert whole_tensors(back) == held
    return files


def logicals(held: Tensors) -> dict[str, Logical]:
    return {name: Logical(DType[raw.dtype], raw.array.shape) for name, raw in held.items()}


def refusal(made: dict[str, Any], held: Tensors, tp: int = 1, kind: type[Exception] = PlanError) -> str:
    """The sentence with which ``save`` refuses a checkpoint."""
    with places() as place, pytest.raises(kind) as error:
        shardtool.save(put(place("model"), model(made, held)), place("out"), tp=tp)
    return str(error.value)


@pytest.mark.parametrize("tp", [1, 2, 4, 12])
@pytest.mark.parametrize("family", KINDS)
def test_every_rank_of_every_family_holds_what_the_engine_holds(family: str, tp: int):
    check(family, config(family), tp)


@pytest.mark.parametrize("tp", [1, 2, 6])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("gpt2", {"n_inner": 24}, id="gpt2 with an inner size"),
        pytest.param("gpt2", {"tie_word_embeddings": False}, id="gpt2 untied"),
        pytest.param("falcon", {"bias": True, "parallel_attn": False}, id="falcon one after the other"),
        pytest.param("falcon", {"multi_query": False}, id="falcon with as many kv heads as heads"),
        pytest.param("falcon", {"new_decoder_architecture": True, "num_kv_heads": 6}, id="falcon 40b"),
        pytest.param("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, id="falcon, shared kv heads"),
        pytest.param("falcon", {"new_decoder_architecture": True}, id="falcon new, as many kv heads as heads"),
        pytest.param(
            "falcon",
            {
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
                "num_ln_in_parallel_attn": 1,
                "tie_word_embeddings": False,
            },
            id="falcon 11b",
        ),
        pytest.param("opt", {"word_embed_proj_dim": 24, "do_layer_norm_before": False}, id="opt 350m"),
        pytest.param("opt", {"word_embed_proj_dim": 48}, id="opt whose projections are not needed"),
        pytest.param("opt", {"enable_bias": False}, id="opt without biases"),
        pytest.param("opt", {"layer_norm_elementwise_affine": False}, id="opt with plain norms"),
        pytest.param("opt", {"_remove_final_layer_norm": True}, id="opt without its last norm"),
        pytest.param("opt", {"tie_word_embeddings": False}, id="opt untied"),
        pytest.param("gpt_neox", {"attention_bias": False}, id="gpt_neox without biases"),
        pytest.param("gpt_neox", {"tie_word_embeddings": True}, id="gpt_neox tied"),
        pytest.param("glm4", {"attention_bias": False, "tie_word_embeddings": True}, id="glm4 tied without biases"),
        pytest.param("glm4", {"num_key_value_heads": 1}, id="glm4 with one kv head"),
        pytest.param("olmo2", {"attention_bias": True, "num_key_value_heads": None}, id="olmo2 with biases"),
        pytest.param("olmo2", {"num_key_value_heads": 1, "tie_word_embeddings": True}, id="olmo2 with one kv head"),
        pytest.param("olmo2", {"head_dim": 8}, id="olmo2 with heads of another size"),
        pytest.param("starcoder2", {"use_bias": False, "tie_word_embeddings": False}, id="starcoder2 without biases"),
        pytest.param("cohere", {"architectures": ["Cohere2ForCausalLM"], "head_dim": 8}, id="cohere2"),
        pytest.param("cohere", {"use_qk_norm": True, "num_key_value_heads": 6}, id="cohere with norms of heads"),
        pytest.param("stablelm", {"use_qkv_bias": True, "tie_word_embeddings": True}, id="stablelm tied with biases"),
        pytest.param("qwen2_5_vl", {"tie_word_embeddings": True}, id="qwen2.5-vl tied"),
    ],
)
def test_every_variant_of_a_config_is_laid_out_as_the_engine_does(family: str, changes: dict[str, Any], tp: int):
    made = config(family, **changes)
    kv = (
        classic.falcon_kv(made)
        if family == "falcon"
        else (made.get("text_config") or made).get("num_key_value_heads") or 12
    )
    if tp % kv and kv % tp:
        said = refusal(made, tensors(family, made), tp)
        assert f"--tp {tp} is not a multiple of its {kv} kv heads" in said or "cannot be divided by --tp" in said
    else:
        check(family, made, tp)


# Names.


@pytest.mark.parametrize(
    ("family", "spelled"),
    [
        pytest.param("gpt2", lambda name: name.removeprefix("transformer."), id="gpt2"),
        pytest.param("bloom", lambda name: name.removeprefix("transformer."), id="bloom"),
        pytest.param("opt", lambda name: name.removeprefix("model."), id="opt"),
        pytest.param("gpt_neox", lambda name: name.removeprefix("gpt_neox."), id="gpt_neox"),
        pytest.param("olmo2", lambda name: name.removeprefix("model."), id="olmo2"),
        pytest.param("starcoder2", lambda name: name.removeprefix("model."), id="starcoder2"),
        pytest.param(
            "qwen2_5_vl",
            lambda name: name.replace("model.", "model.language_model.").replace("visual.", "model.visual."),
            id="qwen2.5-vl of newer transformers",
        ),
    ],
)
def test_a_checkpoint_may_spell_its_names_otherwise(family: str, spelled: Callable[[str], str]):
    made = config(family)
    held = tensors(family, made)
    check(family, made, 2, {spelled(name): raw for name, raw in held.items()}, held)


def test_a_tensor_under_two_spellings_is_refused():
    made = config("gpt2")
    held = tensors("gpt2", made)
    said = refusal(made, {**held, "wpe.weight": held["transformer.wpe.weight"]})
    assert "1 source tensors have no place in GPT2LMHeadModel with this config.json: 'wpe.weight'" in said


def test_the_keys_of_an_older_config_are_read():
    """Of a flat config.json of Qwen2.5-VL, and of GPT-2's sizes under the names that others have."""
    made = config("qwen2_5_vl")
    held = tensors("qwen2_5_vl", made)
    flat = {**{key: value for key, value in made.items() if key != "text_config"}, **made["text_config"]}
    assert ranks(flat, held) == ranks(made, held)
    other = config("gpt2", n_embd=None, n_layer=None, n_head=None, n_positions=None)
    other |= {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "max_position_embeddings": 16}
    held = tensors("gpt2", config("gpt2"))
    assert ranks(other, held) == ranks(config("gpt2"), held)


def ranks(made: dict[str, Any], held: Tensors) -> list[Tensors]:
    files, _ = saved(made, held, 2)
    return [rank_tensors(files, rank) for rank in range(2)]


@pytest.mark.parametrize(
    ("family", "at"),
    [("gpt2", "transformer.h.0.attn."), ("gpt_neox", "gpt_neox.layers.1.attention.")],
)
def test_masks_are_dropped_and_given_back(family: str, at: str):
    made = config(family)
    held = tensors(family, made)
    mask = Raw("U8", np.tril(np.ones((1, 1, 4, 4), np.uint8)))
    more = {**held, at + "bias": mask, at + "masked_bias": random((), "F32")}
    files = check(family, made, 2, more, held)
    dropped = json.loads(files["shardtool.json"])["source"]["dropped"]
    assert [entry["name"] for entry in dropped] == [at + "bias", at + "masked_bias"]


def test_a_head_that_cohere_does_not_look_at_is_dropped_and_given_back():
    made = config("cohere")
    held = tensors("cohere", made)
    check("cohere", made, 2, {**held, "lm_head.weight": random((150, 48), "BF16", 9)}, held)


# Tied embeddings.


@pytest.mark.parametrize("family", ["gpt2", "falcon", "bloom", "opt", "gpt_neox", "starcoder2", "qwen2_5_vl"])
def test_a_head_that_equals_the_embeddings_is_stored_once(family: str):
    made = config(family, tie_word_embeddings=True)
    held = tensors(family, made)
    head, embed = vllm.for_config(made).family.tied
    check(family, made, 2, {**held, head: held[embed]}, held)


def test_a_head_of_its_own_that_the_engine_does_not_look_for_is_dropped_and_given_back():
    """It looks for ``lm_head``; GPT-NeoX calls it ``embed_out``."""
    made = config("gpt_neox", tie_word_embeddings=True)
    held = tensors("gpt_neox", made)
    files = check("gpt_neox", made, 2, {**held, "embed_out.weight": random((150, 48), "BF16", 99)}, held)
    assert json.loads(files["config.json"]) == made


@pytest.mark.parametrize("family", ["gpt2", "falcon", "bloom", "opt", "starcoder2", "qwen2_5_vl"])
def test_a_head_of_its_own_makes_config_json_say_so(family: str):
    made = config(family, tie_word_embeddings=True)
    held = tensors(family, made)
    head, embed = vllm.for_config(made).family.tied
    files = check(family, made, 2, {**held, head: random(held[embed].array.shape, "BF16", 99)})
    assert json.loads(files["config.json"])["tie_word_embeddings"] is False


def test_a_tie_that_is_said_inside_is_corrected_inside_too():
    made = config("qwen2_5_vl", tie_word_embeddings=None)
    made["text_config"] = {**made["text_config"], "tie_word_embeddings": True}
    held = tensors("qwen2_5_vl", {**made, "tie_word_embeddings": False})
    files, back = saved(made, held, 2)
    written = json.loads(files["config.json"])
    assert written["tie_word_embeddings"] is False
    assert written["text_config"] == {**made["text_config"], "tie_word_embeddings": False}
    assert json.loads(back["config.json"]) == made


# Pipeline stages.

SPLIT = {"gpt_neox", "glm4", "olmo2", "starcoder2", "qwen2_5_vl"}
"""Whose embeddings are on the first stage and whose head and last norm on the last; the others have all on each."""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_each_stage_holds_its_layers_and_what_the_engine_builds_there(family: str, tied: bool):
    made = config(family, tie_word_embeddings=tied)
    held = tensors(family, made)
    said = vllm.for_config(made).outline(Model(made, logicals(held), DType.BF16), Parallel(2, 2))
    shapes = {name: raw.array.shape for name, raw in expected_rank(family, made, held, 2, 0).items()}
    for stage in range(2):
        wanted = {name: shape for name, shape in shapes.items() if on(family, name, stage)}
        if family in SPLIT and tied and stage == 0:  # the last stage has a copy of its own
            embed = vllm.for_config(made).family.tied[1]
            to = {"gpt_neox": "model.embed_in.weight", "qwen2_5_vl": f"language_model.{embed}"}.get(family, embed)
            wanted[to] = (75 + 21, held[embed].array.shape[1])
        for rank in (2 * stage, 2 * stage + 1):
            assert {tensor.name: tensor.shape for tensor in said.recipe.tensors(rank)} == wanted


def on(family: str, name: str, stage: int) -> bool:
    """Whether a stage of two holds a tensor that one stage alone would hold."""
    layer = re.search(r"(?:layers|transformer\.h)\.(\d)\.", name)
    if layer:
        return int(layer[1]) == stage
    if family not in SPLIT or name.startswith("visual."):
        return True
    return stage == (0 if "embed" in name else 1)


# What the tables do not know, and what does not fit.


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {"add_cross_attention": True}, "config.json sets add_cross_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "config.json sets scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "config.json sets reorder_and_upcast_attn"),
        ("falcon", {"model_type": "RefinedWeb"}, "config.json sets model_type=RefinedWeb"),
        ("cohere", {"attention_bias": True}, "config.json sets attention_bias"),
        ("stablelm", {"qk_layernorm": True}, "config.json sets qk_layernorm"),
        ("stablelm", {"use_parallel_residual": True}, "config.json sets use_parallel_residual"),
    ],
)
def test_settings_beyond_a_table_are_refused(family: str, changes: dict[str, Any], said: str):
    made = config(family)
    assert said in refusal({**made, **changes}, tensors(family, made), kind=UnsupportedModel)


@pytest.mark.parametrize(
    ("family", "changes", "tp", "said"),
    [
        ("gpt2", {}, 5, "cannot be divided by --tp 5"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 6}, 4, "the number of kv heads 6 cannot be"),
        ("bloom", {}, 8, "the number of heads 12 cannot be divided by --tp 8"),
        ("opt", {"ffn_dim": 40}, 12, "its size 40 cannot be divided by --tp 12"),
        ("cohere", {"use_qk_norm": True}, 12, "its size 4 cannot be divided by --tp 12"),
        (
            "qwen2_5_vl",
            {"vision_config": {**classic.VISION, "num_heads": 6}},
            12,
            "the number of heads of the vision encoder 6 cannot be divided by --tp 12",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(family: str, changes: dict[str, Any], tp: int, said: str):
    made = config(family, **changes)
    assert said in refusal(made, tensors(family, made), tp)


@pytest.mark.parametrize(
    ("family", "name", "shape", "said"),
    [
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", (48, 100), "n_inner, else 4 times hidden_size, in config.json is"),
        ("gpt2", "transformer.wpe.weight", (15, 48), "max_position_embeddings in config.json is 16"),
        ("opt", "model.decoder.embed_positions.weight", (16, 48), "and 2 more in config.json is 18"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", (144,), "not rows and columns"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", (48, 96), "12 heads and 12 kv heads of 4 in config.json"),
        ("falcon", "transformer.h.0.self_attention.query_key_value.weight", (144, 48), "1 groups of 12 heads, a key"),
        ("bloom", "transformer.h.0.mlp.dense_4h_to_h.weight", (48, 96), "4 times hidden_size in config.json is 192"),
        ("opt", "model.decoder.layers.1.fc2.weight", (48, 40), "ffn_dim in config.json is 36"),
        ("qwen2_5_vl", "visual.blocks.1.attn.qkv.weight", (96, 24), "vision_config.hidden_size in config.json is 24"),
        ("qwen2_5_vl", "visual.merger.mlp.2.weight", (48, 48), "spatial_merge_size squared in config.json is 96"),
    ],
)
def test_a_tensor_that_is_not_as_large_as_config_json_says_is_refused(
    family: str, name: str, shape: tuple[int, ...], said: str
):
    made = config(family)
    assert said in refusal(made, {**tensors(family, made), name: random(shape, "BF16")}, 2)


# Reading a rank's shapes backwards.


@pytest.mark.parametrize("tp", [1, 2, 12])
@pytest.mark.parametrize("family", KINDS)
def test_the_source_can_be_told_from_what_one_rank_holds(family: str, tp: int):
    made = config(family)
    held = tensors(family, made)
    shards = expected_rank(family, made, held, tp, tp - 1)
    found = vllm.for_config(made).infer(made, logicals(shards), Parallel(tp))
    assert {name: tensor.shape for name, tensor in found.items()} == {n: raw.array.shape for n, raw in held.items()}
