"""Mixtures of experts once more: their checkpoints, and what each rank of vLLM holds of them, said with numpy alone.

``expected_rank`` follows the engine's classes (``models/mixtral.py``, ``qwen3_moe.py``, ``deepseek_v2.py`` ...) and its
loader of experts; it knows no windows, recipes or tables. Experts of one layer are taken apart first, so that every
spelling of a checkpoint (``SPELLINGS``) has one expectation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.builders import Raw, Tensors, random
from tests.layouts.classic import Array, Config, Rank, Shapes
from tests.oracle import cast

F32 = re.compile(r"e_score_correction_bias$|_scale$")


@dataclass(frozen=True)
class Kind:
    """A family.

    ``sparse``: whether a layer has experts; ``ends``: whether only the first and the last pipeline stage hold
    embeddings and head; ``tied``: whether the engine can tie them; ``count``: where config.json says the experts.
    """

    architecture: str
    config: dict[str, Any]
    layer: Callable[[Config, int], Shapes]
    load: Callable[[Config, Experts, str, bool], None]
    sparse: Callable[[Config, int], bool] = lambda _config, _i: True
    ends: bool = False
    tied: bool = True
    count: str = "num_experts"
    float32: str = ""  # further tensors that are float32


class Experts(Rank):
    """One rank of an engine while it loads a model with experts."""

    def __init__(self, held: Tensors, tp: int, rank: int, experts: int, *, ep: bool) -> None:
        super().__init__(held, tp, rank)
        self.experts, self.ep = experts, ep

    def local(self) -> list[int]:
        """The experts of this rank: all of them, or with expert parallel every rank some, the first ones one more."""
        if not self.ep:
            return list(range(self.experts))
        return [int(e) for e in np.array_split(np.arange(self.experts), self.tp)[self.rank]]

    def mine(self, array: Array, axis: int = 0) -> Array:
        """A rank's slice of an expert; with expert parallel all of it."""
        return array if self.ep else np.split(array, self.tp, axis)[self.rank]

    def stack(self, name: str, each: Callable[[int], Array]) -> None:
        """A stacked parameter; one without elements is not stored."""
        if self.local():
            self.found[name] = np.stack([each(e) for e in self.local()])

    def routed(self, to: str, of: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        gate, up, down = ([self.get(f"{of}{e}.{name}.weight") for e in range(self.experts)] for name in names)
        self.stack(to + "w13_weight", lambda e: np.concatenate([self.mine(gate[e]), self.mine(up[e])]))
        self.stack(to + "w2_weight", lambda e: self.mine(down[e], 1))


BASE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def attention(at: str, c: Config, *, dim: int, bias: bool = False, norm: int = 0) -> Shapes:
    q, kv, hidden = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim, c["hidden_size"]
    found: Shapes = {f"{at}{x}_proj.weight": (n, hidden) for x, n in zip("qkv", (q, kv, kv), strict=True)}
    found[f"{at}o_proj.weight"] = (hidden, q)
    if bias:
        found |= {f"{at}{x}_proj.bias": (n,) for x, n in zip("qkv", (q, kv, kv), strict=True)}
    if norm:
        found |= {f"{at}q_norm.weight": (norm,), f"{at}k_norm.weight": (norm,)}
    return found


def gated(at: str, hidden: int, size: int) -> Shapes:
    shapes = {"gate": (size, hidden), "up": (size, hidden), "down": (hidden, size)}
    return {f"{at}{name}_proj.weight": shape for name, shape in shapes.items()}


def routed(at: str, c: Config, count: str, size: str, names: str = "gate_proj up_proj down_proj") -> Shapes:
    found = {}
    for e in range(c[count]):
        for name, shape in zip(names.split(), gated("", c["hidden_size"], c[size]).values(), strict=True):
            found[f"{at}experts.{e}.{name}.weight"] = shape
    return found


def load_attention(r: Experts, at: str, kv_heads: int, to: Callable[[str], str] = str) -> None:
    r.split_qkv(at, kv_heads, to)
    r.linear(f"{at}o_proj", across=True, to=to)
    r.whole(f"{at}q_norm.weight", f"{at}k_norm.weight", to=to)


# Mixtral


def mixtral_layer(c: Config, i: int) -> Shapes:
    at = f"model.layers.{i}.block_sparse_moe."
    found = attention(f"model.layers.{i}.self_attn.", c, dim=c.get("head_dim") or 2)
    found[at + "gate.weight"] = (c["num_local_experts"], c["hidden_size"])
    return found | routed(at, c, "num_local_experts", "intermediate_size", "w1 w3 w2")


def mixtral_load(c: Config, r: Experts, layer: str, _sparse: bool) -> None:
    load_attention(r, layer + "self_attn.", c["num_key_value_heads"])
    at = layer + "block_sparse_moe."
    r.whole(at + "gate.weight")
    r.routed(at + "experts.routed_experts.", at + "experts.", ("w1", "w3", "w2"))


# Qwen2-MoE, Qwen3-MoE


def qwen_sparse(c: Config, i: int) -> bool:
    return i not in c.get("mlp_only_layers", []) and (i + 1) % c["decoder_sparse_step"] == 0


def qwen_layer(c: Config, i: int) -> Shapes:
    third = "Qwen3" in c["architectures"][0]
    dim = c["head_dim"] if third else 2
    at = f"model.layers.{i}.mlp."
    bias = not third or bool(c.get("attention_bias"))
    found = attention(f"model.layers.{i}.self_attn.", c, dim=dim, bias=bias, norm=dim if third else 0)
    if not qwen_sparse(c, i):
        return found | gated(at, c["hidden_size"], c["intermediate_size"])
    found |= routed(at, c, "num_experts", "moe_intermediate_size")
    found[at + "gate.weight"] = (c["num_experts"], c["hidden_size"])
    if size := c.get("shared_expert_intermediate_size"):
        found |= gated(at + "shared_expert.", c["hidden_size"], size)
    if size or not third:
        found[at + "shared_expert_gate.weight"] = (1, c["hidden_size"])
    return found


def qwen_load(c: Config, r: Experts, layer: str, sparse: bool) -> None:
    load_attention(r, layer + "self_attn.", c["num_key_value_heads"])
    at = layer + "mlp."
    if not sparse:
        r.gated(at)
        return
    third = "Qwen3" in c["architectures"][0]
    r.whole(at + "gate.weight", to=lambda _: at + ("experts.gate.weight" if third else "gate.weight"))
    r.routed(at + "experts.routed_experts.", at + "experts.")
    if c.get("shared_expert_intermediate_size"):
        inner = at + "experts._shared_experts._layer."
        r.gated(at + "shared_expert.", to=lambda name: name.replace(at + "shared_expert.", inner))
        r.whole(at + "shared_expert_gate.weight", to=lambda _: inner + "expert_gate.weight")
    else:
        r.whole(at + "shared_expert_gate.weight")


# OLMoE


def olmoe_layer(c: Config, i: int) -> Shapes:
    at, attn = f"model.layers.{i}.mlp.", f"model.layers.{i}.self_attn."
    found = attention(attn, c, dim=2) | routed(at, c, "num_experts", "intermediate_size")
    found |= {attn + "q_norm.weight": (16,), attn + "k_norm.weight": (2 * c["num_key_value_heads"],)}
    return found | {at + "gate.weight": (c["num_experts"], c["hidden_size"])}


def olmoe_load(c: Config, r: Experts, layer: str, _sparse: bool) -> None:
    load_attention(r, layer + "self_attn.", c["num_key_value_heads"])
    r.whole(layer + "mlp.gate.weight")
    r.routed(layer + "mlp.experts.routed_experts.", layer + "mlp.experts.")


# GraniteMoE, with and without experts that every token goes to


def granite_layer(c: Config, i: int) -> Shapes:
    at, hidden, n = f"model.layers.{i}.block_sparse_moe.", c["hidden_size"], c["num_local_experts"]
    found = attention(f"model.layers.{i}.self_attn.", c, dim=2)
    found |= {
        at + "router.layer.weight": (n, hidden),
        at + "input_linear.weight": (n, 2 * c["intermediate_size"], hidden),
    }
    found[at + "output_linear.weight"] = (n, hidden, c["intermediate_size"])
    if c.get("attention_sinks"):
        found[f"model.layers.{i}.self_attn.sinks"] = (c["num_attention_heads"],)
    if size := c.get("shared_intermediate_size"):
        found[f"model.layers.{i}.shared_mlp.input_linear.weight"] = (2 * size, hidden)
        found[f"model.layers.{i}.shared_mlp.output_linear.weight"] = (hidden, size)
    return found


def granite_load(c: Config, r: Experts, layer: str, _sparse: bool) -> None:
    load_attention(r, layer + "self_attn.", c["num_key_value_heads"])
    if r.has(layer + "self_attn.sinks"):
        r.column(layer + "self_attn.sinks", r.get(layer + "self_attn.sinks"))
    at = layer + "block_sparse_moe."
    both, down = r.get(at + "input_linear.weight"), r.get(at + "output_linear.weight")
    gate, up = np.split(both, 2, 1)
    r.stack(at + "experts.routed_experts.w13_weight", lambda e: np.concatenate([r.mine(gate[e]), r.mine(up[e])]))
    r.stack(at + "experts.routed_experts.w2_weight", lambda e: r.mine(down[e], 1))
    r.whole(at + "router.layer.weight", to=lambda _: at + "gate.weight")
    if r.has(layer + "shared_mlp.input_linear.weight"):
        name = layer + "shared_mlp.input_linear.weight"
        r.column(name, *np.split(r.get(name), 2))
        r.linear(layer + "shared_mlp.output_linear", across=True)


# GLM4-MoE


def glm4_sparse(c: Config, i: int) -> bool:
    return bool(i >= c["first_k_dense_replace"])


def glm4_layer(c: Config, i: int) -> Shapes:
    at, dim = f"model.layers.{i}.mlp.", c["head_dim"]
    found = attention(
        f"model.layers.{i}.self_attn.", c, dim=dim, bias=c["attention_bias"], norm=dim if c["use_qk_norm"] else 0
    )
    return found | late_mlp(at, c, correction=True) if glm4_sparse(c, i) else found | dense(at, c)


def dense(at: str, c: Config) -> Shapes:
    return gated(at, c["hidden_size"], c["intermediate_size"])


def late_mlp(at: str, c: Config, *, correction: bool) -> Shapes:
    found = routed(at, c, "n_routed_experts", "moe_intermediate_size")
    found[at + "gate.weight"] = (c["n_routed_experts"], c["hidden_size"])
    if correction:
        found[at + "gate.e_score_correction_bias"] = (c["n_routed_experts"],)
    if n := c["n_shared_experts"]:
        found |= gated(at + "shared_experts.", c["hidden_size"], n * c["moe_intermediate_size"])
    return found


def load_late_mlp(c: Config, r: Experts, at: str, gate: str, correction: str) -> None:
    r.whole(at + "gate.weight", to=lambda _: at + gate)
    r.whole(at + "gate.e_score_correction_bias", to=lambda _: at + correction)
    r.routed(at + "experts.routed_experts.", at + "experts.")
    if c["n_shared_experts"]:
        old, inner = at + "shared_experts.", at + "experts._shared_experts._layer."
        r.gated(old, to=lambda name: name.replace(old, inner))


def glm4_load(c: Config, r: Experts, layer: str, sparse: bool) -> None:
    load_attention(r, layer + "self_attn.", c["num_key_value_heads"])
    if sparse:
        load_late_mlp(c, r, layer + "mlp.", "gate.weight", "experts.routed_experts.e_score_correction_bias")
    else:
        r.gated(layer + "mlp.")


# gpt_oss


def gpt_oss_layer(c: Config, i: int) -> Shapes:
    at, attn = f"model.layers.{i}.mlp.", f"model.layers.{i}.self_attn."
    n, hidden, size = c["num_local_experts"], c["hidden_size"], c["intermediate_size"]
    found = attention(attn, c, dim=c["head_dim"], bias=True)
    found |= {attn + "o_proj.bias": (hidden,), attn + "sinks": (c["num_attention_heads"],)}
    found |= {at + "router.weight": (n, hidden), at + "router.bias": (n,)}
    found |= {at + "experts.gate_up_proj": (n, hidden, 2 * size), at + "experts.gate_up_proj_bias": (n, 2 * size)}
    return found | {at + "experts.down_proj": (n, size, hidden), at + "experts.down_proj_bias": (n, hidden)}


def gpt_oss_load(c: Config, r: Experts, layer: str, _sparse: bool) -> None:
    def to(name: str) -> str:
        return name.replace("self_attn.", "attn.")

    load_attention(r, layer + "self_attn.", c["num_key_value_heads"], to)
    r.column(layer + "attn.sinks", r.get(layer + "self_attn.sinks"))
    at, held = layer + "mlp.", layer + "mlp.experts.routed_experts."
    r.whole(at + "router.weight", at + "router.bias")
    both, down, both_bias, down_bias = (
        r.get(f"{at}experts.{x}") for x in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    )
    r.stack(held + "w13_weight", lambda e: r.mine(both[e].T))
    r.stack(held + "w13_bias", lambda e: r.mine(both_bias[e]))
    r.stack(held + "w2_weight", lambda e: r.mine(down[e].T, 1))
    r.stack(held + "w2_bias", lambda e: down_bias[e] * (r.ep or r.rank == 0))


# DeepSeek


def deepseek_sparse(c: Config, i: int) -> bool:
    return bool(i >= c["first_k_dense_replace"] and i % c.get("moe_layer_freq", 1) == 0)


def deepseek_layer(c: Config, i: int) -> Shapes:
    at, n, hidden = f"model.layers.{i}.self_attn.", c["num_attention_heads"], c["hidden_size"]
    nope, rope, v, latent = (c[x] for x in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    found: Shapes = {
        at + "kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        at + "kv_a_layernorm.weight": (latent,),
        at + "kv_b_proj.weight": (n * (nope + v), latent),
        at + "o_proj.weight": (hidden, n * v),
    }
    if q := c["q_lora_rank"]:
        found |= {at + "q_a_proj.weight": (q, hidden), at + "q_a_layernorm.weight": (q,)}
        found[at + "q_b_proj.weight"] = (n * (nope + rope), q)
    else:
        found[at + "q_proj.weight"] = (n * (nope + rope), hidden)
    mlp = f"model.layers.{i}.mlp."
    if not deepseek_sparse(c, i):
        return found | dense(mlp, c)
    return found | late_mlp(mlp, c, correction=c.get("topk_method") == "noaux_tc")


def deepseek_load(c: Config, r: Experts, layer: str, sparse: bool) -> None:
    at, inner = layer + "self_attn.", layer + "self_attn.mla_attn."

    def to(name: str) -> str:
        return name.replace(at, inner)

    if c["q_lora_rank"]:
        parts = [r.get(at + "q_a_proj.weight"), r.get(at + "kv_a_proj_with_mqa.weight")]
        r.found[at + "fused_qkv_a_proj.weight"] = np.concatenate(parts)
        r.whole(at + "q_a_layernorm.weight", to=to)
        r.linear(at + "q_b_proj", to=to)
    else:
        r.whole(at + "kv_a_proj_with_mqa.weight")
        r.linear(at + "q_proj", to=to)
    r.whole(at + "kv_a_layernorm.weight")
    r.linear(at + "kv_b_proj")
    r.linear(at + "o_proj", across=True, to=to)
    if sparse:
        load_late_mlp(c, r, layer + "mlp.", "experts.gate.weight", "experts.gate.e_score_correction_bias")
    else:
        r.gated(layer + "mlp.")


LATE = {
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
LATENT = {
    **LATE,
    "num_key_value_heads": 8,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
QWEN = {"num_experts": 9, "moe_intermediate_size": 8, "decoder_sparse_step": 1, "num_hidden_layers": 3}
KINDS = {
    "mixtral": Kind(
        "MixtralForCausalLM", {"num_local_experts": 5}, mixtral_layer, mixtral_load,
        count="num_local_experts",
    ),
    "qwen2_moe": Kind(
        "Qwen2MoeForCausalLM", {**QWEN, "mlp_only_layers": [1], "shared_expert_intermediate_size": 16}, qwen_layer,
        qwen_load, qwen_sparse,
    ),
    "qwen3_moe": Kind(
        "Qwen3MoeForCausalLM", {**QWEN, "mlp_only_layers": [0], "head_dim": 4}, qwen_layer, qwen_load, qwen_sparse
    ),
    "olmoe": Kind("OlmoeForCausalLM", {"num_experts": 5}, olmoe_layer, olmoe_load, tied=False),
    "granitemoe": Kind(
        "GraniteMoeForCausalLM", {"num_local_experts": 5}, granite_layer, granite_load, count="num_local_experts"
    ),
    "granitemoeshared": Kind(
        "GraniteMoeSharedForCausalLM", {"num_local_experts": 5, "shared_intermediate_size": 16}, granite_layer,
        granite_load, count="num_local_experts",
    ),
    "glm4_moe": Kind(
        "Glm4MoeForCausalLM", {**LATE, "head_dim": 4, "attention_bias": True, "use_qk_norm": True}, glm4_layer,
        glm4_load, glm4_sparse, ends=True, tied=False, count="n_routed_experts", float32=r"mlp\.gate\.weight$",
    ),
    "gpt_oss": Kind(
        "GptOssForCausalLM", {"num_local_experts": 8, "head_dim": 2, "num_key_value_heads": 8}, gpt_oss_layer,
        gpt_oss_load, tied=False, count="num_local_experts",
    ),
    "deepseek_v2": Kind(
        "DeepseekV2ForCausalLM", {**LATENT, "q_lora_rank": None, "topk_method": "greedy"}, deepseek_layer,
        deepseek_load, deepseek_sparse, ends=True, tied=False, count="n_routed_experts",
    ),
    "deepseek_v3": Kind(
        "DeepseekV3ForCausalLM", {**LATENT, "q_lora_rank": 5, "topk_method": "noaux_tc"}, deepseek_layer,
        deepseek_load, deepseek_sparse, ends=True, tied=False, count="n_routed_experts",
    ),
}  # fmt: skip


def config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model; a change to ... removes the key."""
    kind = KINDS[family]
    made = {"architectures": [kind.architecture], "model_type": family, **BASE, **kind.config, **changes}
    return {key: value for key, value in made.items() if value is not ...}


def kind_of(c: Config) -> Kind:
    return next(kind for kind in KINDS.values() if kind.architecture in c["architectures"])


def shapes(c: Config) -> Shapes:
    """The tensors of a checkpoint and their shapes."""
    kind, hidden = kind_of(c), c["hidden_size"]
    found: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
        found |= kind.layer(c, i)
    return found


def tensors(c: Config) -> Tensors:
    """A checkpoint, every tensor with bytes of its own."""
    return {name: random(shape, "BF16", i) for i, (name, shape) in enumerate(sorted(shapes(c).items()))}


def expected_rank(held: Tensors, c: Config, tp: int, rank: int, *, ep: bool = False, pp: int = 1) -> Tensors:
    """The state dict of one rank of ``pp`` times ``tp``."""
    kind, stage = kind_of(c), rank // tp
    r = Experts(held, tp, rank % tp, c[kind.count], ep=ep and tp > 1)
    layers = np.array_split(np.arange(c["num_hidden_layers"]), pp)[stage] if pp > 1 else range(c["num_hidden_layers"])
    for i in map(int, layers):
        layer = f"model.layers.{i}."
        r.whole(layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight")
        kind.load(c, r, layer, kind.sparse(c, i))
    embed, head, last = "model.embed_tokens.weight", "lm_head.weight", not kind.ends or stage == pp - 1
    first, tied = not kind.ends or stage == 0, c["tie_word_embeddings"] and kind.tied
    if last:
        r.whole("model.norm.weight")
        r.vocab(head, r.get(embed if tied else head))
    if first and not tied:
        r.vocab("model.embedding.weight" if "GptOss" in kind.architecture else embed, r.get(embed))
    attn = {"gpt_oss": "attn.attn."}.get(c["model_type"], "self_attn.attn.")
    attn = "self_attn.mla_attn.mla_attn." if "Deepseek" in kind.architecture else attn
    for i in layers:
        r.found |= {f"model.layers.{i}.{attn}_{x}_scale": np.ones((), "<f4") for x in ("k", "v", "q", "prob")}
    made = {}
    for name, array in r.found.items():
        wide = bool(F32.search(name) or (kind.float32 and re.search(kind.float32, name)))
        plain = np.ascontiguousarray(array).reshape(array.shape)
        raw = Raw("F32" if array.dtype == np.dtype("<f4") else "BF16", plain)
        made[name] = cast(raw, "F32") if wide else raw
    return made


# Other spellings of the same checkpoint


def _experts_of(held: Tensors) -> dict[str, dict[int, dict[str, Raw]]]:
    found: dict[str, dict[int, dict[str, Raw]]] = {}
    for name in list(held):
        if match := re.match(r"(.*\.experts\.)(\d+)\.(\w+)\.weight$", name):
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = held.pop(name)
    return found


def stacked(held: Tensors, gate: str, up: str, down: str, to: tuple[str, str]) -> Tensors:
    """All experts of a layer in two tensors."""
    made = dict(held)
    for at, each in _experts_of(made).items():
        both = [np.concatenate([each[e][gate].array, each[e][up].array]) for e in sorted(each)]
        made[at + to[0]] = Raw("BF16", np.stack(both))
        made[at + to[1]] = Raw("BF16", np.stack([each[e][down].array for e in sorted(each)]))
    return made


def fused(held: Tensors, gate: str, up: str, to: str) -> Tensors:
    """Gate and up of each expert in one tensor."""
    made = dict(held)
    for name in held:
        if re.search(rf"\.experts\.\d+\.{gate}\.weight$", name):
            parts = [made.pop(name), made.pop(name.replace(gate, up))]
            made[name.replace(gate, to)] = Raw("BF16", np.concatenate([part.array for part in parts]))
    return made


def renamed(held: Tensors, names: Mapping[str, str]) -> Tensors:
    """Ends of names replaced."""
    made = {}
    for name, raw in held.items():
        old = next((old for old in names if name.endswith(old)), "")
        made[name[: len(name) - len(old)] + names.get(old, "")] = raw
    return made


def apart(held: Tensors, names: Mapping[str, str]) -> Tensors:
    """Stacked tensors as one per expert; ``{e}`` in the new ends of their names."""
    made = {}
    for name, raw in held.items():
        old = next((old for old in names if name.endswith(old)), None)
        if old is None:
            made[name] = raw
            continue
        for e, one in enumerate(raw.array):
            made[name[: len(name) - len(old)] + names[old].replace("{e}", str(e))] = Raw("BF16", one.copy())
    return made


def halves(held: Tensors) -> Tensors:
    """Each expert's ``gate_up_proj`` as gate and up."""
    made = dict(held)
    for name in held:
        if name.endswith(".gate_up_proj.weight"):
            for half, part in zip(("gate_proj", "up_proj"), np.split(made.pop(name).array, 2), strict=True):
                made[name.replace("gate_up_proj", half)] = Raw("BF16", part.copy())
    return made


_GUD = ("gate_proj", "up_proj", "down_proj")
_BOTH = ("gate_up_proj", "down_proj")
_GRANITE = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
_EACH = {
    "input_linear.weight": "experts.{e}.gate_up_proj.weight",
    "output_linear.weight": "experts.{e}.down_proj.weight",
}
_OSS = {".gate_up_proj": ".{e}.gate_up_proj", ".down_proj": ".{e}.down_proj"}
_OSS |= {f"{old}_bias": f"{new}_bias" for old, new in _OSS.items()}
_NATIVE = {".gate_up_proj": ".{e}.w13_weight", ".down_proj": ".{e}.w2_weight"}
_NATIVE |= {".gate_up_proj_bias": ".{e}.w13_bias", ".down_proj_bias": ".{e}.w2_bias"}

SPELLINGS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "mixtral stacked": ("mixtral", lambda held: stacked(held, "w1", "w3", "w2", ("w13", "w2"))),
    "mixtral fused": ("mixtral", lambda held: fused(held, "w1", "w3", "w13")),
    "mixtral by other names": (
        "mixtral",
        lambda held: renamed(
            held, {"w1.weight": "gate_proj.weight", "w3.weight": "up_proj.weight", "w2.weight": "down_proj.weight"}
        ),
    ),
    **{
        f"{family} stacked": (family, lambda held: stacked(held, *_GUD, _BOTH))
        for family in ("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe")
    },
    **{
        f"{family} fused": (family, lambda held: fused(held, "gate_proj", "up_proj", "gate_up_proj"))
        for family in ("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe")
    },
    "granitemoe by its new names": (
        "granitemoe",
        lambda held: renamed(held, {**_GRANITE, "router.layer.weight": "router.weight"}),
    ),
    "granitemoe fused": ("granitemoe", lambda held: apart(held, _EACH)),
    "granitemoe per expert": ("granitemoe", lambda held: halves(apart(held, _EACH))),
    "gpt_oss per expert": ("gpt_oss", lambda held: apart(held, _OSS)),
    "gpt_oss per expert by the engine's names": ("gpt_oss", lambda held: apart(held, _NATIVE)),
    "gpt_oss by the engine's names": (
        "gpt_oss",
        lambda held: {
            name.replace("self_attn.", "attn.").replace("embed_tokens", "embedding"): raw
            for name, raw in renamed(held, {old: new.replace("{e}.", "") for old, new in _NATIVE.items()}).items()
        },
    ),
}
"""What the engine loads just as well."""
