"""SGLang's built-in layout: what differs from vLLM's table, and what is refused.

What SGLang itself makes of each family is in ``test_traced``.
"""

from __future__ import annotations

from typing import Any

import pytest

from shardtool.dtypes import DType
from shardtool.errors import FormatError, PlanError, UnsupportedModel, UsageError
from shardtool.layouts import sglang, vllm
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.layouts.sglang import CHANGES
from shardtool.layouts.tables import FAMILIES
from shardtool.mosaic import Logical
from tests import builders
from tests.layouts import mixtures, variants


def outline(config: dict[str, Any], tp: int, **parallel: Any) -> Outline:
    """SGLang's layout of a Llama-like model that has all tensors."""
    sources = {name: Logical(DType.BF16, shape) for name, shape in builders.shapes(config).items()}
    return sglang.for_config(config).outline(Model(config, sources, DType.BF16), Parallel(tp, **parallel))


def names(found: Outline) -> set[str]:
    """The targets of rank 0."""
    return {tensor.name for tensor in found.recipe.tensors(0)}


def test_every_change_is_one_of_a_table() -> None:
    assert set(CHANGES) <= {family.name for family in FAMILIES}


def test_attention_has_no_scales() -> None:
    config = builders.config()
    with_scales = vllm.for_config(config).outline(variants.model("llama"), Parallel(2))
    assert any(name.endswith("_k_scale") for name in names(with_scales))
    assert not any("_scale" in name for name in names(outline(config, 2)))


def rows(found: Outline, rank: int, name: str) -> tuple[int, float | None]:
    """How many rows a rank holds of a target, and what is under them."""
    (tensor,) = [tensor for tensor in found.recipe.tensors(rank) if tensor.name == name]
    return tensor.shape[0], tensor.fill


@pytest.mark.parametrize(
    ("vocab", "tp", "padded"),
    [
        (1000, 1, 1024),
        (1000, 2, 1024),
        (1024, 4, 1024),
        (1000, 3, 1152),
        (1000, 6, 1152),
        (1025, 3, 1152),
        (64, 3, 192),
    ],
)
def test_a_vocabulary_that_tp_does_not_divide_is_padded_further(vocab: int, tp: int, padded: int) -> None:
    config = builders.config(vocab_size=vocab, num_attention_heads=12, num_key_value_heads=12, intermediate_size=24)
    found = outline(config, tp)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        held = [rows(found, rank, name) for rank in range(tp)]
        assert {count for count, _ in held} == {padded // tp}
        assert [fill for _, fill in held] == [None if (r + 1) * padded // tp <= vocab else 0.0 for r in range(tp)]


def test_vllm_refuses_what_sglang_pads() -> None:
    config = builders.config(vocab_size=1000, num_attention_heads=12, num_key_value_heads=12, intermediate_size=24)
    sources = {name: Logical(DType.BF16, shape) for name, shape in builders.shapes(config).items()}
    with pytest.raises(PlanError, match="the padded vocabulary 1024 cannot be divided by --tp 3"):
        vllm.for_config(config).outline(Model(config, sources, DType.BF16), Parallel(3))


def test_config_is_believed_about_tied_embeddings() -> None:
    config = builders.config(tie_word_embeddings=True)
    shapes = builders.shapes(config)
    sources = {name: Logical(DType.BF16, shape) for name, shape in shapes.items()}
    sources["lm_head.weight"] = sources["model.embed_tokens.weight"]
    found = sglang.for_config(config).outline(Model(config, sources, DType.BF16), Parallel(2))
    assert set(found.dropped) == {"lm_head.weight"}
    assert not found.amendments
    assert "model.embed_tokens.weight" not in names(found)
    pieces = [
        piece for tensor in found.recipe.tensors(0) if tensor.name == "lm_head.weight" for piece in tensor.pieces()
    ]
    assert {piece.source for piece in pieces} == {"model.embed_tokens.weight"}


def test_gemma_2_holds_the_root_of_its_width() -> None:
    config = builders.config("gemma2")
    (tensor,) = [t for t in outline(config, 2).recipe.tensors(1) if t.name == "model.normalizer"]
    assert (tensor.shape, tensor.dtype, tensor.fill) == ((), DType.BF16, config["hidden_size"] ** 0.5)


def test_gpt_oss_biases_are_float32_and_its_backend_is_named() -> None:
    config = mixtures.config("gpt_oss")
    sources = {name: Logical(DType.BF16, shape) for name, shape in mixtures.shapes(config).items()}
    found = sglang.for_config(config).outline(Model(config, sources, DType.BF16), Parallel(2))
    biases = {t.name: t.dtype for t in found.recipe.tensors(0) if t.name.endswith("_weight_bias")}
    assert len(biases) == 2 * config["num_hidden_layers"]
    assert set(biases.values()) == {DType.F32}
    assert found.notes == (
        "start SGLang with --moe-runner-backend triton: its triton_kernel backend stores experts in another order",
    )


@pytest.mark.parametrize("count", [256, 8])
def test_shared_experts_that_a_gpu_fuses_are_said(count: int) -> None:
    """SGLang fuses those of DeepSeek-V3 where there are 256 experts and one is shared."""
    config = {**mixtures.config("deepseek_v3"), "n_shared_experts": 1, "n_routed_experts": count}
    sources = {name: Logical(DType.BF16, shape) for name, shape in mixtures.shapes(config).items()}
    found = sglang.for_config(config).outline(Model(config, sources, DType.BF16), Parallel(1))
    assert any("--disable-shared-experts-fusion" in note for note in found.notes) == (count == 256)


@pytest.mark.parametrize(
    ("family", "said", "why"),
    [
        ("llama", {"mlp_bias": True}, "config.json sets mlp_bias"),
        ("qwen2", {"qk_norm": True}, "config.json sets qk_norm"),
        ("qwen3", {"attention_bias": True}, "config.json sets attention_bias"),
        ("granite", {"attention_bias": True}, r"config.json sets attention_bias\|bias"),
    ],
)
def test_a_model_that_sglang_builds_otherwise_is_refused(family: str, said: dict[str, Any], why: str) -> None:
    config = {**builders.config(family), **said}
    with pytest.raises(UnsupportedModel, match=why):
        outline(config, 1)


@pytest.mark.parametrize("place", ["quantization_config", "compression_config"])
def test_quantized_models_are_refused_with_the_reason(place: str) -> None:
    config = builders.config() | {place: {"quant_method": "fp8"}}
    with pytest.raises(UnsupportedModel, match="SGLang processes such weights before it loads shards"):
        sglang.for_config(config)


def test_pipeline_stages_and_expert_parallel_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="one file name for the same rank of every pipeline stage"):
        outline(builders.config(), 1, pp=2)
    with pytest.raises(UnsupportedModel, match="know no expert parallel layouts"):
        outline(builders.config(), 2, ep=True)


def test_unknown_architectures_and_versions_are_refused() -> None:
    with pytest.raises(
        UnsupportedModel, match="BloomForCausalLM is not an architecture that shardtool knows of SGLang"
    ):
        sglang.for_config({"architectures": ["BloomForCausalLM"]})
    with pytest.raises(UsageError, match=r"SGLang 0\.5\.23, not of '0\.4'"):
        sglang.for_config(builders.config(), "0.4")


def test_the_manifest_keeps_the_table() -> None:
    for name in ("llama-tied", "gpt_oss", "gemma2"):
        model = variants.model(name)
        made = sglang.for_config(model.config)
        again = sglang.from_manifest(made.record(), "shardtool.json")
        assert again == made
        assert again.outline(model, Parallel(2)) == made.outline(model, Parallel(2))


def test_the_record_of_another_engine_is_refused() -> None:
    record = vllm.for_config(builders.config()).record()
    with pytest.raises(FormatError, match="the layout of 'vllm' is not one of sglang"):
        sglang.from_manifest(record, "shardtool.json")


def test_shards_without_a_manifest_are_read_back() -> None:
    model = variants.model("llama")
    layout = sglang.for_config(model.config)
    found = layout.outline(model, Parallel(2))
    held = {tensor.name: Logical(tensor.dtype, tensor.shape) for tensor in found.recipe.tensors(0)}
    used = {name: tensor for name, tensor in model.tensors.items() if name not in found.dropped}
    assert layout.infer(model.config, held, Parallel(2)) == used
