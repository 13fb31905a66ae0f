"""Mixtures of experts: what each table says of a model is what the engine's own loading makes of it, rank by rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shardtool.dtypes import DType
from shardtool.errors import FormatError, PlanError, UnsupportedModel
from shardtool.layouts import vllm
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.mosaic import Logical
from tests.builders import NUMPY, Raw, Tensors, random
from tests.layouts import mixtures
from tests.layouts.mixtures import KINDS, SPELLINGS, config, expected_rank, tensors
from tests.oracle import cast
from tests.strategies import addresses

MLP = "model.layers.1.mlp."


def outline(made: Mapping[str, Any], held: Tensors, parallel: Parallel) -> Outline:
    model = Model(made, logicals(held), DType.BF16, lambda a, b: held[a] == held[b])
    return vllm.for_config(made).outline(model, parallel)


def logicals(held: Tensors) -> dict[str, Logical]:
    return {name: Logical(DType[raw.dtype], raw.array.shape) for name, raw in held.items()}


def rank_of(said: Outline, held: Tensors, rank: int) -> Tensors:
    """What a rank holds under a recipe, put together element by element."""
    found = {}
    for tensor in said.recipe.tensors(rank):
        to = tensor.dtype.name
        out = np.full(int(np.prod(tensor.shape)), 0 if tensor.fill is None else tensor.fill, NUMPY[to])
        for piece in tensor.pieces():
            of = cast(held[str(piece.source)], to).array.reshape(-1)
            out[addresses(piece.dst)] = of[addresses(piece.src)]
        found[tensor.name] = Raw(to, out.reshape(tensor.shape))
    return found


def check(made: Mapping[str, Any], held: Tensors, parallel: Parallel, plain: Tensors | None = None) -> Outline:
    """That every rank holds what the oracle says of ``plain``, the checkpoint in its usual spelling."""
    said = outline(made, held, parallel)
    for rank in parallel.ranks:
        wanted = expected_rank(plain or held, made, parallel.tp, rank, ep=parallel.ep, pp=parallel.pp)
        found = rank_of(said, held, rank)
        assert found.keys() == wanted.keys()
        for name, raw in wanted.items():
            assert found[name] == raw, name
    return said


def refusal(made: Mapping[str, Any], parallel: Parallel, held: Tensors | None = None) -> str:
    with pytest.raises(PlanError) as error:
        outline(made, held or tensors(made), parallel)
    return str(error.value)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(
    "parallel", [*map(Parallel, (1, 2, 4, 8)), Parallel(4, ep=True), Parallel(1, ep=True)], ids=str
)
def test_every_rank_holds_what_the_engine_would(family: str, parallel: Parallel):
    made = config(family)
    assert not check(made, tensors(made), parallel).dropped


@pytest.mark.parametrize(("family", "changes"), [
    ("mixtral", {"head_dim": 4, "tie_word_embeddings": True}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "tie_word_embeddings": True}),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}),
    ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": None, "num_hidden_layers": 4, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"shared_expert_intermediate_size": 24}),
    ("granitemoe", {"attention_sinks": True}),
    ("granitemoeshared", {"shared_intermediate_size": 0, "tie_word_embeddings": True}),
    ("glm4_moe", {"attention_bias": False, "use_qk_norm": False, "first_k_dense_replace": 0, "n_shared_experts": 1}),
    ("deepseek_v2", {"q_lora_rank": 7, "moe_layer_freq": 2, "num_hidden_layers": 5}),
    ("deepseek_v2", {"n_shared_experts": None, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"q_lora_rank": None}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("parallel", [Parallel(2), Parallel(4, ep=True)], ids=str)
def test_settings_that_change_the_model(family: str, changes: dict[str, Any], parallel: Parallel):
    made = config(family, **changes)
    made = {**made, "mlp_only_layers": made.get("mlp_only_layers") or []}
    check(made, tensors(made), parallel)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("parallel", [Parallel(1), Parallel(4), Parallel(2, ep=True)], ids=str)
def test_checkpoints_that_spell_their_experts_in_other_ways(spelling: str, parallel: Parallel):
    family, spell = SPELLINGS[spelling]
    made = config(family)
    plain = tensors(made)
    held = spell(plain)
    assert held.keys() != plain.keys()
    check(made, held, parallel, plain)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_deepseek_has_no_stacked_experts(family: str):
    """The engine's class for it has a loader of its own, which does not take them."""
    made = config(family)
    held = mixtures.stacked(tensors(made), "gate_proj", "up_proj", "down_proj", ("gate_up_proj", "down_proj"))
    assert f"the checkpoint has no tensor '{MLP}experts.0.gate_proj.weight'" in refusal(made, Parallel(1), held)


def test_mixtral_has_no_stacked_experts_by_the_names_of_others():
    made = config("mixtral")
    held = mixtures.stacked(tensors(made), "w1", "w3", "w2", ("gate_up_proj", "down_proj"))
    assert "has no tensor 'model.layers.0.block_sparse_moe.experts.0.w1.weight'" in refusal(made, Parallel(1), held)


@pytest.mark.parametrize("family", [name for name, kind in KINDS.items() if not kind.tied])
def test_some_classes_never_tie_the_head(family: str):
    made = config(family)
    held = tensors(made)
    tied = {**made, "tie_word_embeddings": True}
    assert check(tied, held, Parallel(2), held).amendments == {}
    equal = {**held, "lm_head.weight": held["model.embed_tokens.weight"]}
    assert check(tied, equal, Parallel(2)).copies == {}
    del held["lm_head.weight"]
    assert "the checkpoint has no tensor 'lm_head.weight'" in refusal(tied, Parallel(2), held)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v2", "deepseek_v3"])
def test_layers_that_predict_further_tokens_are_dropped(family: str):
    made = config(family, num_nextn_predict_layers=2)
    held = tensors(made)
    more = {
        f"model.layers.{3 + i}.{x}": random((4,), "BF16") for i in range(2) for x in ("eh_proj.weight", "enorm.weight")
    }
    said = check(made, {**held, **more}, Parallel(2))
    assert said.dropped.keys() == more.keys()
    assert all("predicts further tokens" in why for why in said.dropped.values())
    assert "1 source tensors have no place" in refusal(
        made, Parallel(2), {**held, "model.layers.5.x.weight": more.popitem()[1]}
    )


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_the_layers_that_predict_are_counted_under_both_names(key: str):
    made = config("deepseek_v3", **{key: 1})
    held = {**tensors(made), "model.layers.3.enorm.weight": random((4,), "BF16")}
    assert len(outline(made, held, Parallel(1)).dropped) == 1


def test_no_layer_predicts_where_the_config_says_so():
    made = config("deepseek_v3", num_nextn_predict_layers=0)
    held = {**tensors(made), "model.layers.3.enorm.weight": random((4,), "BF16")}
    assert "have no place" in refusal(made, Parallel(1), held)


@pytest.mark.parametrize(("family", "other"), [
    ("mixtral", "num_experts"), ("qwen2_moe", "num_local_experts"), ("qwen3_moe", "num_local_experts"),
    ("olmoe", "num_local_experts"), ("granitemoe", "num_experts"), ("gpt_oss", "num_experts"),
    ("glm4_moe", "num_local_experts"), ("deepseek_v2", "num_experts"), ("deepseek_v3", "num_local_experts"),
])  # fmt: skip
def test_the_number_of_experts_is_read_under_both_names(family: str, other: str):
    made = config(family)
    said = {key: value for key, value in made.items() if key != KINDS[family].count} | {
        other: made[KINDS[family].count]
    }
    assert outline(said, tensors(made), Parallel(2)) == outline(made, tensors(made), Parallel(2))


def test_a_correction_that_the_config_does_not_ask_for_is_refused():
    made = config("deepseek_v3")
    assert f"'{MLP}gate.e_score_correction_bias'" in refusal(
        {**made, "topk_method": "greedy"}, Parallel(1), tensors(made)
    )


def test_a_correction_stays_float32_whatever_it_was():
    made = config("deepseek_v3")
    held = tensors(made)
    name = MLP + "gate.e_score_correction_bias"
    exact = random((5,), "F32", 7)
    said = outline(made, {**held, name: exact}, Parallel(2))
    assert rank_of(said, {**held, name: exact}, 1)[MLP + "experts.gate.e_score_correction_bias"] == exact


@pytest.mark.parametrize("key", ["index_topk", "rswa_window"])
def test_deepseek_with_other_attention_is_refused(key: str):
    made = config("deepseek_v3", **{key: 64})
    with pytest.raises(UnsupportedModel, match=f"config.json sets {key}"):
        outline(made, tensors(made), Parallel(1))


@pytest.mark.parametrize("kind", ["deepseek", None, 3])
def test_deepseek_of_a_kind_that_may_have_no_latent_attention_is_refused(kind: Any):
    made = {**config("deepseek_v2"), "model_type": kind}
    with pytest.raises(UnsupportedModel, match=f"config.json says model_type {kind!r}"):
        outline(made, tensors(made), Parallel(1))
    kimi = {**config("deepseek_v3"), "model_type": "kimi_k2"}
    check(kimi, tensors(kimi), Parallel(2))


# Sizes that the engine refuses.


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_more_ranks_than_experts_are_refused_where_the_engine_does(family: str):
    made = config(family, num_experts=3)
    for parallel in (Parallel(4), Parallel(4, ep=True)):
        assert "--tp 4 is more than the 3 experts; the engine refuses it too" in refusal(made, parallel)
    check(made, tensors(made), Parallel(2))


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "deepseek_v2"])
def test_ranks_without_an_expert_hold_none(family: str):
    made = config(family, **{KINDS[family].count: 3})
    said = check(made, tensors(made), Parallel(4, ep=True))
    held = [{t.name for t in said.recipe.tensors(rank) if t.name.endswith("w13_weight")} for rank in range(4)]
    assert [bool(names) for names in held] == [True, True, True, False]


@pytest.mark.parametrize("family", KINDS)
def test_experts_that_do_not_divide_are_refused_but_not_with_expert_parallel(family: str):
    key = "moe_intermediate_size" if "moe_intermediate_size" in config(family) else "intermediate_size"
    made = config(family, **{key: 12, "intermediate_size": 24 if key != "intermediate_size" else 12})
    assert "12 cannot be divided by" in refusal(made, Parallel(8))
    if family not in ("gpt_oss", "glm4_moe", "deepseek_v2", "deepseek_v3"):  # refused whole, or 24 shared ones divide
        check(made, tensors(made), Parallel(8, ep=True))


def test_gpt_oss_divides_its_experts_by_all_ranks_and_shares_no_kv_heads():
    made = config("gpt_oss")
    assert "8 experts cannot be divided by --tp 3" in refusal({**made, "num_attention_heads": 24}, Parallel(3, ep=True))
    assert "intermediate_size 24 cannot be divided by 16 ranks" in refusal(made, Parallel(8, 2))
    assert "--tp 4 is more than the 2 kv heads" in refusal(config("gpt_oss", num_key_value_heads=2), Parallel(4))


def test_latent_attention_is_cut_by_whole_heads():
    made = config("deepseek_v3", num_attention_heads=6, num_key_value_heads=6, v_head_dim=5, qk_nope_head_dim=6)
    assert "the number of heads 6 cannot be divided by --tp 4" in refusal(made, Parallel(4))
    check(made, tensors(made), Parallel(2))


@pytest.mark.parametrize(("family", "name", "shape"), [
    ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.weight", (23, 16)),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.4.w2.weight", (16, 23)),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", (6, 16)),
    ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight", (4, 48, 16)),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", (8, 16, 46)),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias", (7, 16)),
    ("deepseek_v3", "model.layers.0.self_attn.q_a_proj.weight", (6, 16)),
    ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj.weight", (48, 6)),
    ("deepseek_v3", "model.layers.1.mlp.shared_experts.up_proj.weight", (15, 16)),
])  # fmt: skip
def test_a_tensor_of_another_size_than_the_config_says_is_refused(family: str, name: str, shape: tuple[int, ...]):
    made = config(family)
    held = tensors(made)
    assert held[name].array.shape != shape
    said = refusal(made, Parallel(1), {**held, name: random(shape, "BF16")})
    assert str(list(shape)) in said or "rows, but q_lora_rank" in said


@pytest.mark.parametrize("name", ["experts.3.gate_proj.weight", "experts.8.down_proj.weight", "gate.weight"])
def test_any_tensor_of_a_sparse_layer_that_is_missing_is_named(name: str):
    made = config("qwen3_moe")
    held = tensors(made)
    del held[MLP + name]
    assert f"the checkpoint has no tensor '{MLP}{name}'" in refusal(made, Parallel(1), held)


def test_one_expert_too_many_is_refused():
    made = config("olmoe")
    more = tensors({**made, "num_experts": 6})
    more["model.layers.0.mlp.gate.weight"] = tensors(made)["model.layers.0.mlp.gate.weight"]
    more["model.layers.1.mlp.gate.weight"] = tensors(made)["model.layers.1.mlp.gate.weight"]
    assert "6 source tensors have no place" in refusal(made, Parallel(1), more)


@pytest.mark.parametrize("value", [0, -1, "2", 2.0])
def test_a_step_that_is_no_number_of_layers_is_refused(value: Any):
    made = config("qwen3_moe")
    assert f"decoder_sparse_step {value!r}, which is not a size" in refusal(
        {**made, "decoder_sparse_step": value}, Parallel(1), tensors(made)
    )


# Pipeline stages.


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("parallel", [Parallel(1, 2), Parallel(2, 2), Parallel(2, 2, ep=True)], ids=str)
def test_every_stage_holds_its_layers(family: str, parallel: Parallel):
    made = config(family, num_hidden_layers=4, mlp_only_layers=[1], first_k_dense_replace=1)
    check(made, tensors(made), parallel)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"])
def test_classes_that_have_both_ends_on_every_stage_tie_them_there_too(family: str):
    made = config(family, tie_word_embeddings=True, num_hidden_layers=4, mlp_only_layers=[])
    said = check(made, tensors(made), Parallel(2, 2))
    assert {t.name for t in said.recipe.tensors(0)} >= {"lm_head.weight", "model.norm.weight"}


@pytest.mark.parametrize(("family", "changes", "stage", "layers"), [
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}, 0, [0, 1]),
    ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 3}, 1, [2, 3]),
    ("glm4_moe", {"first_k_dense_replace": 2}, 0, [0, 1]),
])  # fmt: skip
def test_a_stage_without_experts_is_refused_where_the_engine_does(
    family: str, changes: dict[str, Any], stage: int, layers: list[int]
):
    made = config(family, num_hidden_layers=4, **changes)
    if changes.get("decoder_sparse_step") == 3:
        stage, layers = 0, [0, 1]
    said = refusal(made, Parallel(2, 2))
    assert f"tp 2 pp 2: stage {stage} has the layers {layers}, none of which has experts" in said
    check(made, tensors(made), Parallel(2))


def test_mixtral_needs_a_layer_in_every_stage():
    assert "stage 2 has the layers []" in refusal(config("mixtral"), Parallel(1, 3))


def test_deepseek_and_others_may_have_dense_stages():
    made = config("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=2)
    check(made, tensors(made), Parallel(2, 2))


# Reading a rank's shapes backwards.


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("parallel", [Parallel(1), Parallel(4), Parallel(4, ep=True)], ids=str)
def test_the_source_can_be_told_from_what_one_rank_holds(family: str, parallel: Parallel):
    made = config(family)
    held = tensors(made)
    rank = expected_rank(held, made, parallel.tp, 0, ep=parallel.ep)
    found = vllm.for_config(made).infer(made, logicals(rank), parallel)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: raw.array.shape for n, raw in held.items()}


@pytest.mark.parametrize("family", KINDS)
def test_a_table_is_read_back_from_its_record(family: str):
    layout = vllm.for_config(config(family))
    assert vllm.from_manifest(json.loads(json.dumps(layout.record())), "here") == layout


@pytest.mark.parametrize(("column", "value"), [("limits", ["whatever"]), ("skips", [["whatever", "a", "b"]])])
def test_a_table_with_words_that_nobody_knows_is_refused(column: str, value: list[Any]):
    record = json.loads(json.dumps(vllm.for_config(config("glm4_moe")).record()))
    record["table"][column] = value
    with pytest.raises(FormatError, match="'whatever', which this version of shardtool does not know"):
        vllm.from_manifest(record, "here")


def test_a_recipe_says_the_experts_once():
    """Gate and up of 9 experts in each share: two runs, not eighteen pieces."""
    made = config("qwen3_moe")
    rules = outline(made, tensors(made), Parallel(4, ep=True)).recipe.rules
    (rule,) = [rule for rule in rules if rule.name.endswith("w13_weight")]
    assert rule.index == (1, 2)
    assert all(len(share.pieces) == 2 for share in rule.shares)
    assert [share.shape[0] for share in rule.shares] == [3, 2, 2, 2]


def test_experts_of_different_shapes_are_refused():
    made = config("olmoe")
    held = tensors(made)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    held[name] = replace(held[name], array=held[name].array[:-1])
    assert f"tensor {name!r} is BF16 [23, 16], but that of the first expert is BF16 [24, 16]" in refusal(
        made, Parallel(1), held
    )
