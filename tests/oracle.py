"""What every rank of vLLM holds, said once more with slices of arrays and nothing of shardtool.

``expected_rank`` is the independent judge of ``save``: it follows vLLM 0.32's parallel layers, one line for each of
them, and knows no windows, recipes or tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.builders import Raw, Tensors, head_dim, kind_of

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
Array = NDArray[Any]


def cast(raw: Raw, to: str) -> Raw:
    """``tensor.to(dtype)``, by torch."""
    if raw.dtype == to:
        return raw
    flat = torch.frombuffer(bytearray(raw.array.tobytes()), dtype=TORCH[raw.dtype]).to(TORCH[to])
    octets = flat.view(torch.uint8).numpy().tobytes()
    kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}[to]
    return Raw(to, np.frombuffer(octets, kind).reshape(raw.array.shape))


def engine_dtype(config: Mapping[str, Any], dtype: str | None) -> str:
    """The dtype in which the engine holds the model; Gemma does not run in float16."""
    if dtype:
        return dtype
    said = str(config.get("dtype") or config["torch_dtype"]).removeprefix("torch.")
    gemma = "Gemma" in config["architectures"][0]
    return "F16" if said == "float16" and not gemma else "BF16"


def is_tied(held: Tensors, config: Mapping[str, Any]) -> bool:
    """Whether the written model has one tensor for embedding and head."""
    if not config["tie_word_embeddings"]:
        return False
    return "lm_head.weight" not in held or held["lm_head.weight"] == held["model.embed_tokens.weight"]


def expected_rank(held: Tensors, config: Mapping[str, Any], tp: int, rank: int, dtype: str | None = None) -> Tensors:
    """The state dict of one rank."""
    to = engine_dtype(config, dtype)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim, inter, vocab = head_dim(config), config["intermediate_size"], config["vocab_size"]
    found: dict[str, Array] = {}

    def get(name: str) -> Array:
        return cast(held[name], to).array

    def rows(array: Array) -> Array:
        n = len(array) // tp
        return array[rank * n : (rank + 1) * n]

    def columns(array: Array) -> Array:
        n = array.shape[1] // tp
        return array[:, rank * n : (rank + 1) * n]

    def vocabulary(array: Array) -> Array:
        padded = np.zeros((-(-vocab // 64) * 64, array.shape[1]), array.dtype)
        padded[:vocab] = array
        return rows(padded)

    def qkv(q: Array, k: Array, v: Array) -> Array:
        each, group = max(1, kv_heads // tp), rank // max(1, tp // kv_heads)
        mine = slice(group * each * dim, (group + 1) * each * dim)
        return np.concatenate([rows(q), k[mine], v[mine]])

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if not kind_of(config).head:
        found[embed] = vocabulary(get(embed))
    elif is_tied(held, config):
        found[head] = vocabulary(get(embed))
    else:
        found[embed], found[head] = vocabulary(get(embed)), vocabulary(get(head))
    found["model.norm.weight"] = get("model.norm.weight")
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        for kind in ("weight", "bias"):
            if f"{attention}q_proj.{kind}" in held:
                found[f"{attention}qkv_proj.{kind}"] = qkv(*(get(f"{attention}{x}_proj.{kind}") for x in "qkv"))
            if f"{attention}qkv_proj.{kind}" in held:
                fused, ends = get(f"{attention}qkv_proj.{kind}"), [heads * dim, (heads + kv_heads) * dim]
                found[f"{attention}qkv_proj.{kind}"] = qkv(*np.split(fused, ends))
            if f"{mlp}gate_proj.{kind}" in held:
                gate, up = get(f"{mlp}gate_proj.{kind}"), get(f"{mlp}up_proj.{kind}")
                found[f"{mlp}gate_up_proj.{kind}"] = np.concatenate([rows(gate), rows(up)])
            if f"{mlp}gate_up_proj.{kind}" in held:
                gate, up = np.split(get(f"{mlp}gate_up_proj.{kind}"), [inter])
                found[f"{mlp}gate_up_proj.{kind}"] = np.concatenate([rows(gate), rows(up)])
        found[f"{attention}o_proj.weight"] = columns(get(f"{attention}o_proj.weight"))
        found[f"{mlp}down_proj.weight"] = columns(get(f"{mlp}down_proj.weight"))
        if f"{attention}sinks" in held:
            found[f"{attention}sinks"] = rows(get(f"{attention}sinks"))
        whole = [f"{mlp}down_proj.bias"]
        if "Qwen3" not in config["architectures"][0]:  # Hugging Face's o_proj has a bias there, the engine's has not
            whole.append(f"{attention}o_proj.bias")
        whole += [f"{layer}{norm}.weight" for norm in kind_of(config).norms]
        whole += [f"{attention}{x}_norm.weight" for x in "qk"]
        found.update({name: get(name) for name in whole if name in held})
    made = {name: Raw(to, np.ascontiguousarray(array)) for name, array in found.items()}
    for i in range(config["num_hidden_layers"]):
        for x in ("k", "v", "q", "prob"):
            one = np.ones((), "<f4")
            made[f"model.layers.{i}.self_attn.attn._{x}_scale"] = Raw("F32", one)
    return made


def expected(held: Tensors, config: Mapping[str, Any], tp: int, dtype: str | None = None) -> list[Tensors]:
    """The state dicts of all ranks."""
    return [expected_rank(held, config, tp, rank, dtype) for rank in range(tp)]
