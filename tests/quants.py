"""Tiny quantized checkpoints, made without shardtool, and what each rank of an engine holds of them.

::

    quantized("gptq")             config.json and tensors of a Llama in one of SCHEMES
    expected(name, ..., rank, tp) what a rank holds of its linear layers, with slices of arrays

Every number is random: only where it lands matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.builders import NUMPY, Raw, Tensors, config, tensors

HIDDEN, INTER, HEADS, KV, DIM, GROUP = 64, 128, 8, 4, 8, 16
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
}
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.down_proj": ("down_proj",),
}
INWARD = ("self_attn.o_proj", "mlp.down_proj")


def numbers(dtype: str, shape: tuple[int, ...], seed: int) -> Raw:
    """Random bits, but floats that are finite."""
    made = np.random.default_rng([seed, *shape])
    if dtype in ("F16", "F32"):
        return Raw(dtype, (made.random(shape) + 0.5).astype(NUMPY[dtype]))
    if dtype == "BF16":
        return Raw(dtype, made.integers(0x3C00, 0x3F80, shape).astype("<u2"))
    wide = np.dtype(NUMPY[dtype])
    return Raw(dtype, made.integers(0, 100, shape).astype(wide))


@dataclass(frozen=True)
class Kind:
    """A scheme: config.json's settings, a layer's parts, and how they are cut.

    ``parts``: (name, dtype in the file, shape of outputs and inputs, dtype in the shards, how). ``how``: the axis of
    the outputs for what is cut (negative: inputs are never cut), ``each`` for a number per part, ``last`` for the last
    part's alone, ``gone`` for what no rank holds.
    """

    settings: Mapping[str, Any]
    parts: tuple[tuple[str, str, Callable[[int, int], tuple[int, ...]], str, object], ...]
    dtype: str = "bfloat16"
    extra: Mapping[str, tuple[str, tuple[int, ...], float]] = ()  # type: ignore[assignment]


def _groups(weights: dict[str, Any], inputs: dict[str, Any] | None, form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": {"g": group}}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
_WEIGHT = ("weight", "F8_E4M3", lambda n, k: (n, k), "F8_E4M3", 0)
_CACHE = {f"{x}_scale": ("BF16", (), -1.0) for x in ("q", "k", "v", "prob")}
_TENSORS = {f"{x}_scale": ("F32", (1,), 1.0) for x in "qkv"} | {f"{x}_zero_point": ("BF16", (1,), 0.0) for x in "qkv"}
SCHEMES: dict[str, Kind] = {
    "fp8": Kind(FP8, (_WEIGHT, ("weight_scale", "F32", lambda n, k: (), "F32", "each")), extra=_CACHE),
    "fp8-static": Kind(
        {**FP8, "activation_scheme": "static"},
        (_WEIGHT, *((x, "F32", lambda n, k: (), "F32", "each") for x in ("weight_scale", "input_scale"))),
        extra=_CACHE,
    ),
    "fp8-block": Kind(
        {**FP8, "weight_block_size": [8, 16]},
        (_WEIGHT, ("weight_scale_inv", "F32", lambda n, k: (n // 8, k // 16), "F32", 0)),
        extra=_CACHE,
    ),
    "tensors-fp8": Kind(
        _groups({"num_bits": 8, "type": "float", "strategy": "channel"}, TOKEN, "float-quantized"),
        (_WEIGHT, ("weight_scale", "BF16", lambda n, k: (n, 1), "F32", -1)),
        extra=_TENSORS,
    ),
    "tensors-int8": Kind(
        _groups({"strategy": "tensor"}, {**TOKEN, "type": "int"}, "int-quantized"),
        (
            ("weight", "I8", lambda n, k: (n, k), "I8", 0),
            ("weight_scale", "BF16", lambda n, k: (1,), "F32", "each"),
        ),
        extra=_TENSORS,
    ),
    "tensors-w4a16": Kind(
        _groups({"num_bits": 4, "symmetric": False, "group_size": GROUP}, None, "pack-quantized"),
        (
            ("weight_packed", "I32", lambda n, k: (n, k // 8), "I32", 0),
            ("weight_scale", "BF16", lambda n, k: (n, k // GROUP), "BF16", 0),
            ("weight_zero_point", "I32", lambda n, k: (n // 8, k // GROUP), "I32", 0),
            ("weight_shape", "I64", lambda n, k: (2,), "I64", "last"),
        ),
        extra=_TENSORS,
    ),
    "gptq": Kind(
        GPTQ,
        (
            ("qweight", "I32", lambda n, k: (k // 8, n), "I32", 1),
            ("qzeros", "I32", lambda n, k: (k // GROUP, n // 8), "I32", 1),
            ("scales", "F16", lambda n, k: (k // GROUP, n), "F16", 1),
            ("g_idx", "I32", lambda n, k: (k,), "", "gone"),
        ),
        "float16",
        {},
    ),
    "gptq-8-bit-channel": Kind(
        {**GPTQ, "bits": 8, "group_size": -1, "desc_act": True},
        (
            ("qweight", "I32", lambda n, k: (k // 4, n), "I32", 1),
            ("qzeros", "I32", lambda n, k: (1, n // 4), "I32", -2),
            ("scales", "F16", lambda n, k: (1, n), "F16", -2),
        ),
        "float16",
        {},
    ),
    "awq": Kind(
        AWQ,
        (
            ("qweight", "I32", lambda n, k: (k, n // 8), "I32", 1),
            ("qzeros", "I32", lambda n, k: (k // GROUP, n // 8), "I32", 1),
            ("scales", "F16", lambda n, k: (k // GROUP, n), "F16", 1),
        ),
        "float16",
        {},
    ),
}


def quantized(name: str, *, fused: bool = False, **changes: Any) -> tuple[dict[str, Any], Tensors]:
    """config.json and tensors of a Llama (``fused``: a Phi3) whose linear layers are all quantized."""
    kind = SCHEMES[name]
    said = {**SIZES, "quantization_config": dict(kind.settings), "torch_dtype": kind.dtype, **changes}
    made = config("phi3" if fused else "llama", **said)
    plain = tensors(made, dtype="F16" if kind.dtype == "float16" else "BF16")
    held: Tensors = {}
    for i, (key, raw) in enumerate(plain.items()):
        module = key.removesuffix(".weight")
        if not module.endswith("_proj"):
            held[key] = raw
            continue
        for j, (part, dtype, shape, _, _) in enumerate(kind.parts):
            held[f"{module}.{part}"] = numbers(dtype, shape(*raw.array.shape), 100 * i + j)
    return made, held


def _to(dtype: str, raw: Raw) -> Raw:
    if raw.dtype == dtype:
        return raw
    assert (raw.dtype, dtype) == ("BF16", "F32")
    return Raw(dtype, (raw.array.astype("<u4") << 16).view("<f4"))


def expected(name: str, held: Tensors, rank: int, tp: int, layers: int = 2) -> Tensors:
    """What a rank holds of the linear layers and of the attention's scales."""
    found: Tensors = {}
    for i in range(layers):
        for target, modules in FUSED.items():
            parts_of = [f"model.layers.{i}.{target.rpartition('.')[0]}.{module}" for module in modules]
            for part, _, _, dtype, how in SCHEMES[name].parts:
                raws = [held[f"{module}.{part}"] for module in parts_of]
                if how != "gone":
                    found[f"model.layers.{i}.{target}.{part}"] = _to(dtype, _cut(target, raws, how, rank, tp))
        for scale, (dtype, shape, value) in SCHEMES[name].extra.items():
            array = np.full(shape, value, "<f4")
            if dtype == "BF16":
                array = (array.view("<u4") >> 16).astype("<u2").reshape(shape)
            found[f"model.layers.{i}.self_attn.attn.{scale}"] = Raw(dtype, array)
    return found


def _cut(target: str, raws: list[Raw], how: object, rank: int, tp: int) -> Raw:
    arrays = [raw.array for raw in raws]
    if how == "last":
        return raws[-1]
    if how == "each":
        return Raw(raws[0].dtype, np.concatenate([array.reshape(1) for array in arrays]))
    assert isinstance(how, int)
    axis = {-1: 0, -2: 1}.get(how, how)
    if target in INWARD:
        return raws[0] if how < 0 else Raw(raws[0].dtype, np.split(arrays[0], tp, 1 - axis)[rank])
    shares = [tp, min(tp, KV), min(tp, KV)] if len(arrays) == 3 else [tp] * len(arrays)
    mine = [np.split(array, n, axis)[rank * n // tp] for array, n in zip(arrays, shares, strict=True)]
    return Raw(raws[0].dtype, np.concatenate(mine, axis))
