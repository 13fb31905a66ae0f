"""Which modules are quantized, as what, and what config.json must say of it: the outlines of quantized models."""

from __future__ import annotations

import re
from typing import Any

import pytest

from shardtool.dtypes import DType, from_name
from shardtool.errors import PlanError, ShardtoolError, UnsupportedModel, UsageError
from shardtool.layouts import vllm
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.mosaic import Logical
from tests import quants
from tests.builders import Tensors
from tests.layouts import mixtures
from tests.quants import AWQ, FP8, GPTQ, quantized

LAYER = "model.layers.0."


def outline(config: dict[str, Any], held: Tensors, tp: int = 2, *, ep: bool = False, backend: str = "") -> Outline:
    tensors = {key: Logical(DType[raw.dtype], raw.array.shape) for key, raw in held.items()}
    layout = vllm.for_config(config, moe_backend=backend or None)
    return layout.outline(Model(config, tensors, from_name(config["torch_dtype"])), Parallel(tp, 1, ep))


def names(found: Outline, rank: int = 0) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {tensor.name: (tensor.dtype.name, tensor.shape) for tensor in found.recipe.tensors(rank)}


def said(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The config with other quantization settings; None takes one out."""
    settings = {**config["quantization_config"], **changes}
    return {**config, "quantization_config": {k: v for k, v in settings.items() if v is not None}}


def plain(held: Tensors, scheme: str, *modules: str) -> Tensors:
    """The checkpoint with some modules that are not quantized."""
    parts = [part for part, *_ in quants.SCHEMES[scheme].parts]
    found = {key: raw for key, raw in held.items() if key.rpartition(".")[0] not in modules}
    for module in modules:
        first = held[f"{module}.{parts[0]}"]
        outputs, inputs = first.array.shape
        if scheme == "gptq":
            outputs, inputs = inputs, outputs * 8
        elif scheme == "awq":
            outputs, inputs = inputs * 8, outputs
        dtype = "F16" if scheme in ("gptq", "awq") else "BF16"
        found[f"{module}.weight"] = quants.numbers(dtype, (outputs, inputs), 1)
    return found


GATED = (LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj")


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("fp8", {"ignored_layers": list(GATED)}),
        ("fp8", {"modules_to_not_convert": ["lm_head", LAYER + "mlp.gate_up_proj"]}),
        ("tensors-fp8", {"ignore": ["re:.*layers.0.mlp.(gate|up)_proj"]}),
        ("tensors-fp8", {"ignore": [LAYER + "mlp.gate_up_proj"]}),
        ("gptq", {"dynamic": {"-:.*layers\\.0\\.mlp\\.gate_up_proj": {}}}),
        ("gptq", {}),  # the engine looks which numbers are no floats
        ("awq", {"modules_to_not_convert": ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"]}),
        ("awq", {}),
    ],
)
def test_modules_that_are_left_out_keep_their_weight(scheme: str, changes: dict[str, Any]):
    config, held = quantized(scheme)
    found = names(outline(said(config, **changes), plain(held, scheme, *GATED)))
    assert found[LAYER + "mlp.gate_up_proj.weight"] == ("F16" if scheme in ("gptq", "awq") else "BF16", (128, 64))
    assert not [name for name in found if name.startswith(LAYER + "mlp.gate_up_proj.") and not name.endswith(".weight")]
    kept = {"fp8": "weight_scale", "tensors-fp8": "weight_scale"}.get(scheme, "qweight")
    assert f"model.layers.1.mlp.gate_up_proj.{kept}" in found


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("fp8", {"ignored_layers": [LAYER + "mlp.gate_proj"]}),
        ("tensors-fp8", {"ignore": [LAYER + "mlp.gate_proj"]}),
        ("gptq", {"modules_in_block_to_quantize": [["mlp.gate_proj"]]}),
        ("awq", {"modules_to_not_convert": ["mlp.gate_proj"]}),
    ],
)
def test_fused_parts_of_which_some_are_quantized_are_refused(scheme: str, changes: dict[str, Any]):
    config, held = quantized(scheme)
    with pytest.raises(PlanError, match=r"some but not all of the parts of 'model.layers.0.mlp.gate_up_proj'"):
        outline(said(config, **changes), held)


def test_the_lists_that_engines_would_look_up_in_headers_are_written():
    config, held = quantized("gptq")
    some = outline(config, plain(held, "gptq", *GATED)).amendments["quantization_config"]
    assert [LAYER + "mlp.down_proj"] in some["modules_in_block_to_quantize"]
    assert list(GATED) not in some["modules_in_block_to_quantize"]
    listed = said(config, modules_in_block_to_quantize=[["self_attn", "mlp"]])
    assert outline(listed, held).amendments == {}
    config, held = quantized("awq")
    assert outline(config, held).amendments["quantization_config"] == {**AWQ, "modules_to_not_convert": ["lm_head"]}
    left = outline(config, plain(held, "awq", *GATED)).amendments["quantization_config"]
    assert left["modules_to_not_convert"] == [*GATED, "lm_head"]


def test_dynamic_rules_of_gptq_change_bits_and_groups():
    config, held = quantized("gptq")
    eight, _ = quantized("gptq-8-bit-channel")
    assert eight["quantization_config"]["group_size"] == -1
    wide = {f"model.layers.{i}.mlp.down_proj.{name}": raw for i in range(2) for name, raw in _wide_down().items()}
    rule = {"+:.*down_proj": {"bits": 8, "group_size": 32}}
    found = names(outline(said(config, dynamic=rule), {**held, **wide}))
    assert found[LAYER + "mlp.down_proj.qweight"] == ("I32", (128 // 4 // 2, 64))
    assert found[LAYER + "mlp.down_proj.scales"] == ("F16", (128 // 32 // 2, 64))
    assert found[LAYER + "self_attn.o_proj.qweight"] == ("I32", (64 // 8 // 2, 64))


def _wide_down() -> Tensors:
    shapes = {"qweight": ("I32", (32, 64)), "qzeros": ("I32", (4, 16)), "scales": ("F16", (4, 64))}
    return {name: quants.numbers(dtype, shape, 3) for name, (dtype, shape) in shapes.items()}


def test_a_quantized_head_is_cut_along_the_padded_vocabulary():
    config, held = quantized("gptq", vocab_size=128)
    del held["lm_head.weight"]
    shapes = {"qweight": ("I32", (8, 128)), "qzeros": ("I32", (4, 16)), "scales": ("F16", (4, 128))}
    held |= {f"lm_head.{name}": quants.numbers(dtype, shape, 5) for name, (dtype, shape) in shapes.items()}
    made = outline(said(config, lm_head=True), held)
    assert names(made)["lm_head.qzeros"] == ("I32", (4, 8))
    assert ["lm_head"] in made.amendments["quantization_config"]["modules_in_block_to_quantize"]
    with pytest.raises(PlanError, match="the quantized head has 100 entries, which are not a multiple of 64"):
        outline({**said(config, lm_head=True), "vocab_size": 100}, held)


@pytest.mark.parametrize(
    ("scheme", "changes", "error", "text"),
    [
        ("fp8", {"activation_scheme": "odd"}, PlanError, "activation_scheme 'odd'"),
        ("fp8", {"store_dtype": "mxfp4"}, UnsupportedModel, "store_dtype"),
        ("fp8-block", {"activation_scheme": "static"}, PlanError, "weight_block_size with static activations"),
        ("fp8-block", {"weight_block_size": [8]}, UnsupportedModel, "weight_block_size [8]"),
        ("fp8-block", {"weight_block_size": [8, 8]}, PlanError, "has [8, 8] with the quantization settings"),
        ("gptq", {"desc_act": True}, PlanError, "desc_act with groups of 16"),
        ("gptq", {"bits": 3}, PlanError, "bits 3"),
        ("gptq", {"sym": False}, PlanError, "sym False"),
        ("gptq", {"bits": None}, PlanError, "do not say bits"),
        ("gptq", {"group_size": 32}, PlanError, "with the quantization settings in config.json"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, UnsupportedModel, "checkpoint_format 'gptq_v2'"),
        ("gptq", {"dynamic": {"+:(a+)+": {}}}, UnsupportedModel, "too involved"),
        ("gptq", {"dynamic": {"+:(": {}}}, UnsupportedModel, "the pattern '('"),
        ("awq", {"bits": 8}, PlanError, "other than 4 bits"),
        ("awq", {"zero_point": False}, UnsupportedModel, "zero_point False"),
        ("tensors-fp8", {"transform_config": {"a": 1}}, UnsupportedModel, "transform_config"),
        ("tensors-fp8", {"format": "odd"}, UnsupportedModel, "8-bit float weights by channel in the format odd"),
        ("tensors-fp8", {"kv_cache_scheme": {"strategy": "attn_head"}}, UnsupportedModel, "kv_cache_scheme"),
        ("tensors-fp8", {"config_groups": None}, UnsupportedModel, "no config_groups"),
    ],
)
def test_settings_that_are_refused_or_unknown_are_named(
    scheme: str, changes: dict[str, Any], error: type[ShardtoolError], text: str
):
    config, held = quantized(scheme)
    with pytest.raises(error, match=re.escape(text)):
        outline(said(config, **changes), held)


def test_other_versions_of_the_engine_are_refused():
    config, _ = quantized("fp8")
    with pytest.raises(UnsupportedModel, match=r"for version 0.32 of the engine only, not for 0.27"):
        vllm.for_config(config, "0.27")


def test_families_whose_quantized_models_were_not_compared_are_refused():
    with pytest.raises(UnsupportedModel, match="the table of opt does not know gptq checkpoints"):
        vllm.for_config({"architectures": ["OPTForCausalLM"], "quantization_config": GPTQ})


# Experts.

MOE = {"moe_intermediate_size": 128, "hidden_size": 64, "num_experts": 4}


def mixture(scheme: str, size: int = 128, **settings: Any) -> tuple[dict[str, Any], Tensors]:
    """A Qwen3-MoE whose experts are fp8; with a scale for each matrix its other linear layers are as well."""
    config = mixtures.config("qwen3_moe", **{**MOE, "moe_intermediate_size": size}, torch_dtype="bfloat16")
    ignored: list[str] = []
    held: Tensors = {}
    for key, shape in mixtures.shapes(config).items():
        module = key.removesuffix(".weight")
        if not module.endswith("_proj") or (scheme == "block" and ".experts." not in module):
            ignored.append(module)
            held[key] = quants.numbers("BF16", shape, 1)
            continue
        held[key] = quants.numbers("F8_E4M3", shape, 1)
        if scheme == "block":
            held[f"{module}.weight_scale_inv"] = quants.numbers("F32", tuple(-(-n // 64) for n in shape), 2)
        else:
            held[f"{module}.weight_scale"] = quants.numbers("F32", (), 2)
        if scheme == "static":
            held[f"{module}.input_scale"] = quants.numbers("F32", (), 3)
    config["quantization_config"] = {**FP8, "ignored_layers": ignored, **settings}
    return config, held


def experts(found: Outline) -> dict[str, tuple[str, tuple[int, ...]]]:
    (layer,) = {name.partition(".mlp.")[0] for name in names(found) if ".routed_experts." in name} & {"model.layers.1"}
    at = f"{layer}.mlp.experts.routed_experts."
    return {name.removeprefix(at): what for name, what in names(found).items() if name.startswith(at)}


def test_experts_have_a_scale_for_each_matrix():
    config, held = mixture("static", activation_scheme="static")
    found = outline(config, held)
    assert experts(found) == {
        "w13_weight": ("F8_E4M3", (4, 128, 64)),
        "w13_weight_scale": ("F32", (4, 2)),
        "w13_input_scale": ("F32", (4,)),
        "w2_weight": ("F8_E4M3", (4, 64, 64)),
        "w2_weight_scale": ("F32", (4,)),
        "w2_input_scale": ("F32", (4,)),
    }
    assert "of its last part" in found.dropped["model.layers.1.mlp.experts.3.gate_proj.input_scale"]
    assert experts(outline(config, held, ep=True))["w13_weight_scale"] == ("F32", (2, 2))


def test_blocks_of_experts_are_made_finer_where_a_split_parts_them():
    config, held = mixture("block", weight_block_size=[64, 64])
    assert experts(outline(config, held))["w13_weight_scale_inv"] == ("F32", (4, 2, 1))
    assert experts(outline(config, held, 4))["w13_weight_scale_inv"] == ("F32", (4, 2 * 1, 2))  # blocks of 32
    assert experts(outline(config, held, 4))["w2_weight_scale_inv"] == ("F32", (4, 2, 1))
    assert experts(outline(config, held, 4, ep=True))["w13_weight_scale_inv"] == ("F32", (1, 4, 1))
    assert experts(outline(config, held, 4, backend="triton")) == experts(outline(config, held, 4))
    with pytest.raises(PlanError, match="only the kernel triton takes finer ones"):
        outline(config, held, 4, backend="marlin")
    config, held = mixture("block", 64, weight_block_size=[64, 64])
    with pytest.raises(PlanError, match="gets 16 of the 64 outputs of each expert, which are not whole blocks of 64"):
        outline(config, held, 4)


def test_experts_that_no_rule_knows_are_refused():
    config = mixtures.config("qwen3_moe", torch_dtype="float16", quantization_config=GPTQ)
    held = {key: quants.numbers("F16", shape, 1) for key, shape in mixtures.shapes(config).items()}
    with pytest.raises(UnsupportedModel, match="quantized experts"):
        outline(config, held)


# mxfp4.


def gpt_oss(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    said_of = {"quantization_config": {"quant_method": "mxfp4"}, "torch_dtype": "bfloat16"}
    config = mixtures.config("gpt_oss", **{"hidden_size": 64, "intermediate_size": 128, **said_of, **changes})
    held: Tensors = {}
    for key, shape in mixtures.shapes(config).items():
        if key.endswith(("gate_up_proj", "down_proj")):
            count, inputs, outputs = shape
            held[key + "_blocks"] = quants.numbers("U8", (count, outputs, inputs // 32, 16), 1)
            held[key + "_scales"] = quants.numbers("U8", (count, outputs, inputs // 32), 2)
        else:
            held[key] = quants.numbers("BF16", shape, 3)
    return config, held


@pytest.mark.parametrize(
    ("backend", "hidden", "inter"), [("triton", 64, 64), ("marlin", 256, 128), ("emulation", 64, 64)]
)
def test_mxfp4_experts_have_the_shapes_that_the_backend_asks_for(backend: str, hidden: int, inter: int):
    config, held = gpt_oss()
    found = outline(config, held, backend=backend)
    count = config["num_local_experts"]
    at = "model.layers.0.mlp.experts.routed_experts."
    mine = {name.removeprefix(at): what for name, what in names(found).items() if name.startswith(at)}
    assert mine == {
        "w13_weight": ("U8", (count, 2 * inter, hidden // 2)),
        "w13_weight_scale": ("U8", (count, 2 * inter, hidden // 32)),
        "w13_bias": ("BF16", (count, 2 * inter)),
        "w2_weight": ("U8", (count, hidden, inter // 2)),
        "w2_weight_scale": ("U8", (count, hidden, inter // 32)),
        "w2_bias": ("BF16", (count, hidden)),
    }


@pytest.mark.parametrize("backend", ["", "odd"])
def test_mxfp4_without_a_backend_that_is_known_is_refused_with_the_list(backend: str):
    config, held = gpt_oss()
    with pytest.raises(UsageError, match=r"say with --moe-backend which it will be, one of .*marlin.*triton"):
        outline(config, held, backend=backend)


def test_the_backend_is_kept_in_the_manifest():
    config, _ = gpt_oss()
    layout = vllm.for_config(config, moe_backend="triton")
    assert vllm.from_manifest(layout.record(), "here") == layout
    assert "moe_backend" not in vllm.for_config(config).record()
