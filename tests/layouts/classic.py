"""The decoders from GPT-2 to Qwen2.5-VL once more: their checkpoints, and what each rank of vLLM holds of them.

``expected_rank`` follows the engine's own loading code with numpy arrays (``gpt2.py`` transposes, ``falcon.py`` views,
narrows and concatenates, ...) and its parallel layers; it knows no windows, recipes or tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.builders import Raw, Tensors, random

Array = NDArray[Any]
Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """A family. ``load``: what a rank holds; ``scales``: where its attention is."""

    architecture: str
    config: dict[str, Any]
    shapes: Callable[[Config], Shapes]
    load: Callable[[Config, Rank], None]
    scales: str


class Rank:
    """One rank of an engine while it loads: ``get`` is the checkpoint, ``put`` the rank's parameter of that name."""

    def __init__(self, held: Tensors, tp: int, rank: int) -> None:
        self.held, self.tp, self.rank = held, tp, rank
        self.found: dict[str, Array] = {}

    def get(self, name: str) -> Array:
        return self.held[name].array

    def has(self, name: str) -> bool:
        return name in self.held

    def rows(self, array: Array) -> Array:
        n = len(array) // self.tp
        return array[self.rank * n : (self.rank + 1) * n]

    def whole(self, *names: str, to: Callable[[str], str] = str) -> None:
        """What every rank holds."""
        self.found.update({to(name): self.get(name) for name in names if self.has(name)})

    def vocab(self, name: str, array: Array) -> None:
        padded = np.zeros((-(-len(array) // 64) * 64, *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        self.found[name] = self.rows(padded)

    def ends(self, embed: str, head: str, to: str, new_embed: str | None = None) -> None:
        """Embeddings and head: one matrix under the head's name where the checkpoint has no head."""
        if self.has(head):
            self.vocab(new_embed or embed, self.get(embed))
            self.vocab(to, self.get(head))
        else:
            self.vocab(to, self.get(embed))

    def column(self, name: str, *parts: Array) -> None:
        self.found[name] = np.concatenate([self.rows(part) for part in parts])

    def row(self, name: str, weight: Array) -> None:
        n = weight.shape[1] // self.tp
        self.found[name] = weight[:, self.rank * n : (self.rank + 1) * n]

    def linear(self, module: str, *, across: bool = False, to: Callable[[str], str] = str) -> None:
        """A column parallel layer, or a row parallel one whose bias is whole."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        (self.row if across else self.column)(to(weight), self.get(weight))
        if self.has(bias) and across:
            self.whole(bias, to=to)
        elif self.has(bias):
            self.column(to(bias), self.get(bias))

    def qkv(self, name: str, q: Array, k: Array, v: Array, *, kv_heads: int) -> None:
        each, group = max(1, kv_heads // self.tp), self.rank // max(1, self.tp // kv_heads)
        dim = len(k) // kv_heads
        mine = slice(group * each * dim, (group + 1) * each * dim)
        self.found[name] = np.concatenate([self.rows(q), k[mine], v[mine]])

    def split_qkv(self, at: str, kv_heads: int, to: Callable[[str], str] = str) -> None:
        for kind in ("weight", "bias"):
            names = [f"{at}{x}_proj.{kind}" for x in "qkv"]
            if self.has(names[0]):
                self.qkv(to(f"{at}qkv_proj.{kind}"), *map(self.get, names), kv_heads=kv_heads)

    def gated(self, at: str, to: Callable[[str], str] = str) -> None:
        for kind in ("weight", "bias"):
            if self.has(f"{at}gate_up_proj.{kind}"):
                fused = self.get(f"{at}gate_up_proj.{kind}")
                self.column(to(f"{at}gate_up_proj.{kind}"), *np.split(fused, 2))
            elif self.has(f"{at}gate_proj.{kind}"):
                parts = [self.get(f"{at}{x}_proj.{kind}") for x in ("gate", "up")]
                self.column(to(f"{at}gate_up_proj.{kind}"), *parts)
        self.linear(f"{at}down_proj", across=True, to=to)


def layers(config: Config) -> range:
    return range(config.get("n_layer") or config["num_hidden_layers"])


def heads(config: Config) -> int:
    return int(config.get("n_head") or config["num_attention_heads"])


def norm(name: str, hidden: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.{kind}": (hidden,) for kind in ("weight", *(["bias"] if bias else []))}


def linear(name: str, rows: int, columns: int, *, bias: bool = True, flipped: bool = False) -> Shapes:
    weight = {f"{name}.weight": (columns, rows) if flipped else (rows, columns)}
    return {**weight, **({f"{name}.bias": (rows,)} if bias else {})}


# GPT-2


def gpt2_shapes(c: Config) -> Shapes:
    hidden = c["n_embd"]
    inner = c.get("n_inner") or 4 * hidden
    found: Shapes = {"transformer.wte.weight": (c["vocab_size"], hidden)}
    found["transformer.wpe.weight"] = (c["n_positions"], hidden)
    found |= norm("transformer.ln_f", hidden)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], hidden)
    for i in layers(c):
        at = f"transformer.h.{i}."
        found |= norm(at + "ln_1", hidden) | norm(at + "ln_2", hidden)
        found |= linear(at + "attn.c_attn", 3 * hidden, hidden, flipped=True)
        found |= linear(at + "attn.c_proj", hidden, hidden, flipped=True)
        found |= linear(at + "mlp.c_fc", inner, hidden, flipped=True)
        found |= linear(at + "mlp.c_proj", hidden, inner, flipped=True)
    return found


def gpt2_load(c: Config, r: Rank) -> None:
    r.ends("transformer.wte.weight", "lm_head.weight", "lm_head.weight")
    r.whole("transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias")
    for i in layers(c):
        at = f"transformer.h.{i}."
        r.whole(*(f"{at}{x}.{kind}" for x in ("ln_1", "ln_2") for kind in ("weight", "bias")))
        r.qkv(at + "attn.c_attn.weight", *np.split(r.get(at + "attn.c_attn.weight").T, 3), kv_heads=heads(c))
        r.qkv(at + "attn.c_attn.bias", *np.split(r.get(at + "attn.c_attn.bias"), 3), kv_heads=heads(c))
        r.column(at + "mlp.c_fc.weight", r.get(at + "mlp.c_fc.weight").T)
        r.column(at + "mlp.c_fc.bias", r.get(at + "mlp.c_fc.bias"))
        for module in ("attn.c_proj", "mlp.c_proj"):
            r.row(f"{at}{module}.weight", r.get(f"{at}{module}.weight").T)
            r.whole(f"{at}{module}.bias")


# Falcon, BLOOM


def falcon_kv(c: Config) -> int:
    if c.get("new_decoder_architecture"):
        return int(c.get("num_kv_heads") or heads(c))
    return 1 if c["multi_query"] else heads(c)


def falcon_norms(c: Config) -> tuple[str, ...]:
    if not c["parallel_attn"]:
        return "input_layernorm", "post_attention_layernorm"
    two = c.get("num_ln_in_parallel_attn") or (2 if c.get("new_decoder_architecture") else 1)
    return ("ln_attn", "ln_mlp") if two == 2 else ("input_layernorm",)


def grouped_shapes(c: Config, kv: int, norms: tuple[str, ...], *, bias: bool) -> Shapes:
    hidden = c["hidden_size"]
    found = {"transformer.word_embeddings.weight": (c["vocab_size"], hidden)} | norm("transformer.ln_f", hidden)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], hidden)
    for i in layers(c):
        at = f"transformer.h.{i}."
        for name in norms:
            found |= norm(at + name, hidden)
        rows = (heads(c) + 2 * kv) * hidden // heads(c)
        found |= linear(at + "self_attention.query_key_value", rows, hidden, bias=bias)
        found |= linear(at + "self_attention.dense", hidden, hidden, bias=bias)
        found |= linear(at + "mlp.dense_h_to_4h", 4 * hidden, hidden, bias=bias)
        found |= linear(at + "mlp.dense_4h_to_h", hidden, 4 * hidden, bias=bias)
    return found


def regrouped(array: Array, kv: int, group: int) -> tuple[Array, Array, Array]:
    """``FalconModel.load_weights``: view, narrow, reshape."""
    view = array.reshape(kv, group + 2, -1, *array.shape[1:])
    parts = view[:, :group], view[:, group : group + 1], view[:, group + 1 :]
    q, k, v = (part.reshape(-1, *array.shape[1:]) for part in parts)
    return q, k, v


def grouped_load(c: Config, r: Rank, kv: int) -> None:
    r.ends("transformer.word_embeddings.weight", "lm_head.weight", "lm_head.weight")
    r.whole(*(name for name in r.held if "ln_" in name or "layernorm" in name))
    for i in layers(c):
        at = f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            name = f"{at}self_attention.query_key_value.{kind}"
            if r.has(name):
                r.qkv(name, *regrouped(r.get(name), kv, heads(c) // kv), kv_heads=kv)
        r.linear(at + "self_attention.dense", across=True)
        r.linear(at + "mlp.dense_h_to_4h")
        r.linear(at + "mlp.dense_4h_to_h", across=True)


def bloom_shapes(c: Config) -> Shapes:
    norms = ("input_layernorm", "post_attention_layernorm")
    found = grouped_shapes(c, heads(c), norms, bias=True)
    return found | norm("transformer.word_embeddings_layernorm", c["hidden_size"])


# OPT


def opt_shapes(c: Config) -> Shapes:
    top, hidden, bias = "model.decoder.", c["hidden_size"], c["enable_bias"]
    narrow = c.get("word_embed_proj_dim") or hidden
    found: Shapes = {
        top + "embed_tokens.weight": (c["vocab_size"], narrow),
        top + "embed_positions.weight": (c["max_position_embeddings"] + 2, hidden),
    }
    if narrow != hidden:
        found |= {top + "project_in.weight": (hidden, narrow), top + "project_out.weight": (narrow, hidden)}
    affine = c["layer_norm_elementwise_affine"]
    if affine and c["do_layer_norm_before"] and not c.get("_remove_final_layer_norm"):
        found |= norm(top + "final_layer_norm", hidden)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], narrow)
    for i in layers(c):
        at = f"{top}layers.{i}."
        if affine:
            found |= norm(at + "self_attn_layer_norm", hidden) | norm(at + "final_layer_norm", hidden)
        for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{at}self_attn.{x}", hidden, hidden, bias=bias)
        found |= linear(at + "fc1", c["ffn_dim"], hidden, bias=bias)
        found |= linear(at + "fc2", hidden, c["ffn_dim"], bias=bias)
    return found


def opt_load(c: Config, r: Rank) -> None:
    r.ends("model.decoder.embed_tokens.weight", "lm_head.weight", "lm_head.weight")
    r.whole(*(name for name in r.held if "norm" in name or "project" in name or "positions" in name))
    for i in layers(c):
        at = f"model.decoder.layers.{i}."
        r.split_qkv(at + "self_attn.", heads(c))
        r.linear(at + "self_attn.out_proj", across=True)
        r.linear(at + "fc1")
        r.linear(at + "fc2", across=True)


# GPT-NeoX, in the engine's Transformers backend: q, k and v stay grouped and are cut by rows.


def neox_shapes(c: Config) -> Shapes:
    top, hidden, inter, bias = "gpt_neox.", c["hidden_size"], c["intermediate_size"], c["attention_bias"]
    found = {top + "embed_in.weight": (c["vocab_size"], hidden)} | norm(top + "final_layer_norm", hidden)
    if not c["tie_word_embeddings"]:
        found["embed_out.weight"] = (c["vocab_size"], hidden)
    for i in layers(c):
        at = f"{top}layers.{i}."
        found |= norm(at + "input_layernorm", hidden) | norm(at + "post_attention_layernorm", hidden)
        found |= linear(at + "attention.query_key_value", 3 * hidden, hidden, bias=bias)
        found |= linear(at + "attention.dense", hidden, hidden, bias=bias)
        found |= linear(at + "mlp.dense_h_to_4h", inter, hidden) | linear(at + "mlp.dense_4h_to_h", hidden, inter)
    return found


def neox_load(c: Config, r: Rank) -> None:
    def to(name: str) -> str:
        return name.replace("gpt_neox.", "model.")

    r.ends("gpt_neox.embed_in.weight", "embed_out.weight", "lm_head.weight", "model.embed_in.weight")
    r.whole(*(name for name in r.held if "norm" in name), to=to)
    for i in layers(c):
        at = f"gpt_neox.layers.{i}."
        r.linear(at + "attention.query_key_value", to=to)
        r.linear(at + "attention.dense", across=True, to=to)
        r.linear(at + "mlp.dense_h_to_4h", to=to)
        r.linear(at + "mlp.dense_4h_to_h", across=True, to=to)


# Those that look like Llama


def llama_like(
    c: Config,
    norms: tuple[str, ...],
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    norm_bias: bool = False,
    plain: str = "",
    fused: bool = False,
    head: bool = True,
    at: str = "model.",
) -> Shapes:
    hidden, inter, dim = c["hidden_size"], c["intermediate_size"], c.get("head_dim") or c["hidden_size"] // heads(c)
    kv = c.get("num_key_value_heads") or heads(c)
    found: Shapes = {at + "embed_tokens.weight": (c["vocab_size"], hidden)}
    found |= norm(at + "norm", hidden, bias=norm_bias)
    if head and not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], hidden)
    for i in layers(c):
        layer = f"{at}layers.{i}."
        for name in norms:
            found |= norm(layer + name, hidden, bias=norm_bias)
        for x, n in (("q", heads(c)), ("k", kv), ("v", kv)):
            found |= linear(f"{layer}self_attn.{x}_proj", n * dim, hidden, bias=qkv_bias)
        found |= linear(layer + "self_attn.o_proj", hidden, heads(c) * dim, bias=o_bias)
        if plain:
            found |= linear(layer + "mlp.c_fc", inter, hidden, bias=o_bias)
            found |= linear(layer + "mlp.c_proj", hidden, inter, bias=o_bias)
        elif fused:
            found |= linear(layer + "mlp.gate_up_proj", 2 * inter, hidden, bias=False)
        else:
            found |= linear(layer + "mlp.gate_proj", inter, hidden, bias=False)
            found |= linear(layer + "mlp.up_proj", inter, hidden, bias=False)
        if not plain:
            found |= linear(layer + "mlp.down_proj", hidden, inter, bias=False)
    return found


def llama_load(c: Config, r: Rank, *, head: bool = True, to: Callable[[str], str] = str) -> None:
    if head:
        r.ends("model.embed_tokens.weight", "lm_head.weight", to("lm_head.weight"), to("model.embed_tokens.weight"))
    else:
        r.vocab("model.embed_tokens.weight", r.get("model.embed_tokens.weight"))
    r.whole(*(n for n in r.held if "norm" in n and n.startswith("model.") and r.get(n).ndim == 1), to=to)
    for i in layers(c):
        at = f"model.layers.{i}."
        r.split_qkv(at + "self_attn.", c.get("num_key_value_heads") or heads(c), to)
        r.linear(at + "self_attn.o_proj", across=True, to=to)
        if r.has(at + "mlp.c_fc.weight"):
            r.linear(at + "mlp.c_fc", to=to)
            r.linear(at + "mlp.c_proj", across=True, to=to)
        else:
            r.gated(at + "mlp.", to)


def olmo2_shapes(c: Config) -> Shapes:
    bias, dim = bool(c.get("attention_bias")), c.get("head_dim") or c["hidden_size"] // heads(c)
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    found = llama_like(c, norms, qkv_bias=bias, o_bias=bias)
    kv = c.get("num_key_value_heads") or heads(c)
    for i in layers(c):
        for x, n in (("q", heads(c)), ("k", kv)):
            found |= norm(f"model.layers.{i}.self_attn.{x}_norm", n * dim, bias=False)
    return found


def cohere_shapes(c: Config) -> Shapes:
    found = llama_like(c, ("input_layernorm",), head=False)
    for i in layers(c) if c.get("use_qk_norm") else ():
        dim = c["hidden_size"] // heads(c)
        for x, n in (("q", heads(c)), ("k", c.get("num_key_value_heads") or heads(c))):
            found[f"model.layers.{i}.self_attn.{x}_norm.weight"] = (n, dim)
    return found


def cohere_load(c: Config, r: Rank) -> None:
    llama_load(c, r, head=False)
    for name in r.held:
        if ("q_norm" in name or "k_norm" in name) and r.get(name).ndim == 2:
            r.column(name, r.get(name))


NORMS = ("input_layernorm", "post_attention_layernorm")
GLM = (*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")


# Qwen2.5-VL


def vl_shapes(c: Config) -> Shapes:
    text, v = {**c["text_config"], "tie_word_embeddings": c["tie_word_embeddings"]}, c["vision_config"]
    found = llama_like(text, NORMS, qkv_bias=True)
    hidden, merged = v["hidden_size"], 4 * v["hidden_size"]
    found |= {"visual.patch_embed.proj.weight": (hidden, 3, 2, 14, 14), "visual.merger.ln_q.weight": (hidden,)}
    found |= linear("visual.merger.mlp.0", merged, merged) | linear("visual.merger.mlp.2", text["hidden_size"], merged)
    for i in range(v["depth"]):
        at = f"visual.blocks.{i}."
        found |= norm(at + "norm1", hidden, bias=False) | norm(at + "norm2", hidden, bias=False)
        found |= linear(at + "attn.qkv", 3 * hidden, hidden) | linear(at + "attn.proj", hidden, hidden)
        found |= linear(at + "mlp.gate_proj", v["intermediate_size"], hidden)
        found |= linear(at + "mlp.up_proj", v["intermediate_size"], hidden)
        found |= linear(at + "mlp.down_proj", hidden, v["intermediate_size"])
    return found


def vl_load(c: Config, r: Rank) -> None:
    llama_load({**c["text_config"]}, r, to=lambda name: "language_model." + name)
    r.whole(*(name for name in r.held if name.startswith("visual.") and ("norm" in name or "ln_q" in name)))
    r.whole("visual.patch_embed.proj.weight")
    r.linear("visual.merger.mlp.0")
    r.linear("visual.merger.mlp.2", across=True)
    for i in range(c["vision_config"]["depth"]):
        at = f"visual.blocks.{i}."
        for kind in ("weight", "bias"):
            name = f"{at}attn.qkv.{kind}"
            r.qkv(name, *np.split(r.get(name), 3), kv_heads=c["vision_config"]["num_heads"])
        r.linear(at + "attn.proj", across=True)
        r.gated(at + "mlp.")


SIZES = {"hidden_size": 48, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 12}
LLAMA = {**SIZES, "num_key_value_heads": 4, "vocab_size": 150, "tie_word_embeddings": False}
OLD = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "vocab_size": 150}
GPT2 = {"vocab_size": 150, "n_embd": 48, "n_layer": 2, "n_head": 12, "n_positions": 16, "tie_word_embeddings": True}
BLOOM = {"vocab_size": 150, "hidden_size": 48, "n_layer": 2, "n_head": 12, "tie_word_embeddings": True}
FALCON = {**OLD, "multi_query": True, "parallel_attn": True, "bias": False, "tie_word_embeddings": True}
OPT = {
    **OLD,
    "max_position_embeddings": 16,
    "ffn_dim": 36,
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}
VISION = {"depth": 2, "hidden_size": 24, "intermediate_size": 36, "num_heads": 12, "spatial_merge_size": 2}
VL = {"text_config": {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}, "vision_config": VISION}

KINDS = {
    "gpt2": Kind("GPT2LMHeadModel", GPT2, gpt2_shapes, gpt2_load, "transformer.h.{i}.attn.attn."),
    "falcon": Kind(
        "FalconForCausalLM",
        FALCON,
        lambda c: grouped_shapes(c, falcon_kv(c), falcon_norms(c), bias=c["bias"]),
        lambda c, r: grouped_load(c, r, falcon_kv(c)),
        "transformer.h.{i}.self_attention.attn.",
    ),
    "bloom": Kind(
        "BloomForCausalLM",
        BLOOM,
        bloom_shapes,
        lambda c, r: grouped_load(c, r, heads(c)),
        "transformer.h.{i}.self_attention.attn.",
    ),
    "opt": Kind(
        "OPTForCausalLM",
        {**OPT, "tie_word_embeddings": True},
        opt_shapes,
        opt_load,
        "model.decoder.layers.{i}.self_attn.attn.",
    ),
    "gpt_neox": Kind(
        "GPTNeoXForCausalLM",
        {**SIZES, "vocab_size": 150, "attention_bias": True, "tie_word_embeddings": False},
        neox_shapes,
        neox_load,
        "model.layers.{i}.attention.attn.",
    ),
    "glm4": Kind(
        "Glm4ForCausalLM",
        {**LLAMA, "head_dim": 8, "attention_bias": True},
        lambda c: llama_like(c, GLM, qkv_bias=c["attention_bias"], fused=True),
        llama_load,
        "model.layers.{i}.self_attn.attn.",
    ),
    "olmo2": Kind("Olmo2ForCausalLM", LLAMA, olmo2_shapes, llama_load, "model.layers.{i}.self_attn.attn."),
    "starcoder2": Kind(
        "Starcoder2ForCausalLM",
        {**LLAMA, "use_bias": True, "tie_word_embeddings": True},
        lambda c: llama_like(c, NORMS, qkv_bias=c["use_bias"], o_bias=c["use_bias"], norm_bias=True, plain="c"),
        llama_load,
        "model.layers.{i}.self_attn.attn.",
    ),
    "cohere": Kind(
        "CohereForCausalLM",
        {**LLAMA, "tie_word_embeddings": True},
        cohere_shapes,
        cohere_load,
        "model.layers.{i}.self_attn.attn.",
    ),
    "stablelm": Kind(
        "StableLmForCausalLM",
        {**LLAMA, "use_qkv_bias": False},
        lambda c: llama_like(c, NORMS, qkv_bias=c["use_qkv_bias"], norm_bias=True),
        llama_load,
        "model.layers.{i}.self_attn.attn.",
    ),
    "qwen2_5_vl": Kind(
        "Qwen2_5_VLForConditionalGeneration",
        {**VL, "tie_word_embeddings": False},
        vl_shapes,
        vl_load,
        "language_model.model.layers.{i}.self_attn.attn.",
    ),
}


def config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model; a change to None removes the key."""
    kind = KINDS[family]
    made = {"architectures": [kind.architecture], "model_type": family, "torch_dtype": "bfloat16", **kind.config}
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def tensors(family: str, made: Config) -> Tensors:
    """All tensors of a checkpoint, each with bytes of its own."""
    shapes = KINDS[family].shapes(made)
    return {name: random(shape, "BF16", i) for i, (name, shape) in enumerate(sorted(shapes.items()))}


def expected_rank(family: str, made: Config, held: Tensors, tp: int, rank: int) -> Tensors:
    """The state dict of one rank."""
    kind, loading = KINDS[family], Rank(held, tp, rank)
    kind.load(made, loading)
    found = {name: Raw("BF16", np.ascontiguousarray(array)) for name, array in loading.found.items()}
    one = np.ones((), "<f4")
    return found | {name: Raw("F32", one) for name in scales(family, made)}


def scales(family: str, made: Config) -> Iterator[str]:
    """The names of the scales of the attention layers."""
    for i in layers(made.get("text_config") or made):
        for x in ("k", "v", "q", "prob"):
            yield f"{KINDS[family].scales.replace('{i}', str(i))}_{x}_scale"
