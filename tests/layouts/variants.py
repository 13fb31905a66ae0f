"""Tiny models of every family: config.json and the shapes of all source tensors, as layouts are given them."""

from __future__ import annotations

from typing import Any

from shardtool.dtypes import DType, from_name
from shardtool.layouts.base import Model
from shardtool.mosaic import Logical
from tests import builders, quants
from tests.layouts import classic, mixtures

QUANTIZED = "quantized-"
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"


def _variants() -> dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]]:
    found = {}
    llamas: dict[str, dict[str, Any]] = {family: {"family": family} for family in builders.KINDS}
    llamas["llama-biases"] = {"family": "llama", "attention_bias": True, "mlp_bias": True}
    llamas["llama-tied"] = {"family": "llama", "tie_word_embeddings": True}
    llamas["granite-sinks"] = {"family": "granite", "attention_sinks": True}
    for name, said in llamas.items():
        config = builders.config(**said)
        found[name] = config, {**builders.shapes(config), ROTARY: (2,)}
    others: dict[str, dict[str, Any]] = {family: {"family": family} for family in classic.KINDS}
    others["falcon-new"] = {"family": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    others["opt-350m"] = {"family": "opt", "word_embed_proj_dim": 24, "do_layer_norm_before": False}
    others["cohere-norms"] = {"family": "cohere", "use_qk_norm": True}
    for name, said in others.items():
        config = classic.config(**said)
        found[name] = config, classic.KINDS[said["family"]].shapes(config)
    for family in mixtures.KINDS:
        config = mixtures.config(family)
        found[family] = config, mixtures.shapes(config)
    for name in quants.SCHEMES:
        config, held = quants.quantized(name)
        found[f"{QUANTIZED}{name}"] = config, {key: raw.array.shape for key, raw in held.items()}
    return found


VARIANTS = _variants()
"""config.json and the shapes of all source tensors, by name."""


def model(name: str) -> Model:
    """A variant as a layout is given it."""
    config, shapes = VARIANTS[name]
    if name.startswith(QUANTIZED):
        _, held = quants.quantized(name.removeprefix(QUANTIZED))
        found = {key: Logical(DType[raw.dtype], raw.array.shape) for key, raw in held.items()}
        return Model(config, found, from_name(config["torch_dtype"]))
    sources = {key: Logical(DType.F32 if key == ROTARY else DType.BF16, shape) for key, shape in shapes.items()}
    return Model(config, sources, DType.BF16)
