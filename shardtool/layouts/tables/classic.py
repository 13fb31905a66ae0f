"""The other decoders without experts, from GPT-2 to Cohere.

Facts are vLLM's ``model_executor/models/{gpt2,falcon,bloom,opt,glm4,commandr,stablelm}.py`` and, for those that run in
its Transformers backend, ``models/transformers/``; for older versions ``gpt_neox.py``, ``olmo2.py`` and
``starcoder2.py``. The defaults are those of the configuration classes of transformers.
"""

from __future__ import annotations

from typing import Any

from shardtool.layouts.tables.blocks import (
    DROPS,
    LAYER,
    NORMS,
    PREDICTING,
    REFUSED,
    SCALES_SINCE,
    across,
    attention,
    copies,
    decoder,
    defaults,
    down,
    ends,
    gated,
    renamed,
    scales,
)
from shardtool.layouts.tables.language import Family, Row

_MASK = "a mask of the attention, which engines make themselves"
_ALL_HEADS = (("", "num_key_value_heads", None),)
_FIRST_TRANSFORMERS = "0.27"  # the first version that runs OLMo 2 and Starcoder 2 in its Transformers backend
_LAST_NATIVE = "0.24"


def _with_bias(*modules: str, when: str = "", stage: str = "") -> list[Row]:
    """Weight and bias of norms, whole on every rank."""
    return copies(*(f"{module}.{kind}" for module in modules for kind in ("weight", "bias")), when=when, stage=stage)


# GPT-2


_H = "transformer.h.{i}."


def _gpt2() -> tuple[Row, ...]:
    embed = "transformer.wte.weight"
    rows = ends(embed=embed, norms=("transformer.ln_f.weight", "transformer.ln_f.bias"), everywhere=True)
    rows.append(Row("copy", "transformer.wpe.weight", ("transformer.wpe.weight",), "", "positions"))
    rows += _with_bias(_H + "ln_1", _H + "ln_2")
    for module, rule, size in (("attn.c_attn", "qkv", ""), ("mlp.c_fc", "column", "inner")):
        weight, bias = f"{_H}{module}.weight", f"{_H}{module}.bias"
        rows += [Row(rule + "_t", weight, (weight,), "", size), Row(rule, bias, (bias,), "", size)]
    for module, size in (("attn.c_proj", "heads"), ("mlp.c_proj", "inner")):
        weight = f"{_H}{module}.weight"
        rows += [Row("row_t", weight, (weight,), "", size), *copies(f"{_H}{module}.bias")]
    return (*rows, *scales(_H + "attn.attn."))


# Falcon and BLOOM: q, k and v of a checkpoint are one tensor, grouped by kv heads.


def _grouped(at: str, bias: str | None) -> list[Row]:
    """Attention and perceptron of a Falcon-like layer. The bias is None where there is none, else its condition."""
    one = at + "self_attention.query_key_value"
    rows = [Row("grouped", f"{one}.{kind}", (f"{one}.{kind}",), when) for kind, when in _kinds(bias)]
    rows += across(at + "self_attention.dense", bias, "heads")
    rows += down(at + "mlp.dense_h_to_4h", bias, "four")
    return rows + across(at + "mlp.dense_4h_to_h", bias, "four")


def _kinds(bias: str | None) -> list[tuple[str, str]]:
    return [("weight", ""), *([] if bias is None else [("bias", bias)])]


def _falcon() -> tuple[Row, ...]:
    embed = "transformer.word_embeddings.weight"
    rows = ends(embed=embed, norms=("transformer.ln_f.weight", "transformer.ln_f.bias"), everywhere=True)
    two = "num_ln_in_parallel_attn=2"
    rows += _with_bias(_H + "input_layernorm", _H + "post_attention_layernorm", when="not parallel_attn")
    rows += _with_bias(_H + "input_layernorm", when=f"parallel_attn & not {two}")
    rows += _with_bias(_H + "ln_attn", _H + "ln_mlp", when=f"parallel_attn & {two}")
    return (*rows, *_grouped(_H, "bias"), *scales(_H + "self_attention.attn."))


def _bloom() -> tuple[Row, ...]:
    embed = "transformer.word_embeddings.weight"
    rows = ends(embed=embed, norms=("transformer.ln_f.weight", "transformer.ln_f.bias"), everywhere=True)
    rows += _with_bias("transformer.word_embeddings_layernorm", *(_H + norm for norm in NORMS))
    return (*rows, *_grouped(_H, ""), *scales(_H + "self_attention.attn."))


# OPT


def _opt() -> tuple[Row, ...]:
    top, layer = "model.decoder.", "model.decoder.layers.{i}."
    affine, bias = "layer_norm_elementwise_affine", "enable_bias"
    last = f"do_layer_norm_before & not _remove_final_layer_norm & {affine}"
    other = "not word_embed_proj_dim=@hidden_size"
    rows = ends(embed=top + "embed_tokens.weight", norms=(), everywhere=True)
    rows.append(Row("copy", top + "embed_positions.weight", (top + "embed_positions.weight",), "", "opt positions"))
    rows += copies(top + "project_in.weight", top + "project_out.weight", when=other)
    rows += _with_bias(top + "final_layer_norm", when=last)
    rows += _with_bias(layer + "self_attn_layer_norm", layer + "final_layer_norm", when=affine)
    rows += attention(layer + "self_attn.", qkv_bias=bias, o_bias=bias, out="out_proj")
    rows += down(layer + "fc1", bias, "ffn") + across(layer + "fc2", bias, "ffn")
    return (*rows, *scales(layer + "self_attn.attn."))


# GPT-NeoX


def _neox(rule: str, head: str, *, everywhere: bool) -> list[Row]:
    """``rule``: how q, k and v are cut; ``head``: the engine's name of it."""
    layer = "gpt_neox.layers.{i}."
    norms = ("gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias")
    rows = ends(embed="gpt_neox.embed_in.weight", norms=norms, head="embed_out.weight", to=head, everywhere=everywhere)
    rows += _with_bias(*(layer + norm for norm in NORMS))
    one = layer + "attention.query_key_value"
    rows += [Row(rule, f"{one}.{kind}", (f"{one}.{kind}",), when) for kind, when in _kinds("attention_bias")]
    rows += across(layer + "attention.dense", "attention_bias", "heads")
    rows += down(layer + "mlp.dense_h_to_4h", "", "intermediate")
    rows += across(layer + "mlp.dense_4h_to_h", "", "intermediate")
    return rows + scales(layer + "attention.attn.")


# OLMo 2, Starcoder 2, Cohere, StableLM, GLM 4


def _scales(native: bool) -> str:
    """Since when the engine keeps the scales; in its Transformers backend since later."""
    return SCALES_SINCE if native else "0.31"


def _olmo2(*, native: bool) -> tuple[Row, ...]:
    bias = None if native else "attention_bias"
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    return decoder(norms=norms, qk_norm="", qkv_bias=bias, o_bias=bias, everywhere=native, scales_since=_scales(native))


def _starcoder2(*, native: bool) -> tuple[Row, ...]:
    bias = "use_bias"
    rows = ends(norms=("model.norm.weight", "model.norm.bias"), everywhere=native)
    rows += _with_bias(*(LAYER + norm for norm in NORMS))
    rows += attention(qkv_bias=bias, o_bias=bias)
    rows += down(LAYER + "mlp.c_fc", bias, "intermediate") + across(LAYER + "mlp.c_proj", bias, "intermediate")
    return (*rows, *scales(since=_scales(native)))


def _cohere() -> tuple[Row, ...]:
    rows = decoder(norms=("input_layernorm",), head="", everywhere=True)
    names = (f"{LAYER}self_attn.{x}_norm.weight" for x in "qk")
    return (*rows, *(Row("column", name, (name,), "use_qk_norm") for name in names))


def _stablelm() -> tuple[Row, ...]:
    biases = copies("model.norm.bias", *(f"{LAYER}{norm}.bias" for norm in NORMS))
    return (*decoder(qkv_bias="use_qkv_bias", everywhere=True), *biases)


def _glm4() -> tuple[Row, ...]:
    norms = (*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")
    rows = ends() + copies(*(f"{LAYER}{norm}.weight" for norm in norms))
    return (*rows, *attention(qkv_bias="attention_bias"), *gated(fused=True), *scales())


_TIED_HEAD = ("lm_head.weight", "transformer.word_embeddings.weight")
_NO_HEAD = {"lm_head.": "the engine's model has no head of its own"}
_IN_MODEL = (("", "model."),)
_NEOX = (("model.", "gpt_neox."), ("", "gpt_neox."), ("lm_head.", "embed_out."))


def _neox_family(rows: tuple[Row, ...], **more: Any) -> Family:
    sizes = defaults(50432, 6144, 24576, 44, 64, attention_bias=True)
    masks = {"attention.bias": _MASK, "attention.masked_bias": _MASK}
    tied = ("embed_out.weight", "gpt_neox.embed_in.weight")
    return Family(
        "gpt_neox",
        ("GPTNeoXForCausalLM",),
        rows,
        sizes,
        head_dim_key="",
        tied=tied,
        unties=False,  # the engine looks for heads that are called lm_head
        refused=REFUSED,
        drops={**DROPS, **masks},
        implied=_ALL_HEADS,
        **more,
    )


def _olmo2_family(**more: Any) -> Family:
    sizes = defaults(50304, 4096, 11008, 32, 32)
    return Family(
        "olmo2",
        ("Olmo2ForCausalLM",),
        _olmo2(native="until" in more),
        sizes,
        refused=REFUSED,
        drops=DROPS,
        **more,
    )


def _starcoder2_family(**more: Any) -> Family:
    sizes = defaults(49152, 3072, 12288, 30, 24, num_key_value_heads=2, use_bias=True, tie_word_embeddings=True)
    return Family(
        "starcoder2",
        ("Starcoder2ForCausalLM",),
        _starcoder2(native="until" in more),
        sizes,
        refused=REFUSED,
        drops=DROPS,
        **more,
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        "gpt2",
        ("GPT2LMHeadModel",),
        _gpt2(),
        {
            "vocab_size": 50257,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
        head_dim_key="",
        tied=("lm_head.weight", "transformer.wte.weight"),
        refused=(*REFUSED, "add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
        drops={".attn.bias": _MASK, ".attn.masked_bias": _MASK},
        keys={
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "max_position_embeddings": "n_positions",
        },
        implied=_ALL_HEADS,
        prefixes=(("", "transformer."),),
    ),
    Family(
        "falcon",
        ("FalconForCausalLM",),
        _falcon(),
        {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "multi_query": True,
            "parallel_attn": True,
            "tie_word_embeddings": True,
        },
        head_dim_key="",
        tied=_TIED_HEAD,
        refused=(*REFUSED, "model_type=RefinedWeb", "model_type=RefinedWebModel"),
        keys={"hidden_size": "n_embed"},
        implied=(
            ("", "num_key_value_heads", None),
            ("multi_query", "num_key_value_heads", 1),
            ("new_decoder_architecture", "num_key_value_heads", "@num_kv_heads"),
            ("new_decoder_architecture & num_ln_in_parallel_attn=None", "num_ln_in_parallel_attn", 2),
        ),
    ),
    Family(
        "bloom",
        ("BloomForCausalLM",),
        _bloom(),
        {
            "vocab_size": 250880,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "tie_word_embeddings": True,
        },
        head_dim_key="",
        tied=_TIED_HEAD,
        refused=REFUSED,
        keys={"hidden_size": "n_embed", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
        implied=_ALL_HEADS,
        prefixes=(("", "transformer."),),
    ),
    Family(
        "opt",
        ("OPTForCausalLM",),
        _opt(),
        {
            "vocab_size": 50272,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "ffn_dim": 3072,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "tie_word_embeddings": True,
        },
        head_dim_key="",
        tied=("lm_head.weight", "model.decoder.embed_tokens.weight"),
        refused=REFUSED,
        implied=(*_ALL_HEADS, ("word_embed_proj_dim=None", "word_embed_proj_dim", "@hidden_size")),
        prefixes=(("decoder.", "model.decoder."),),
    ),
    _neox_family(
        tuple(renamed(_neox("column", "lm_head.weight", everywhere=False), "gpt_neox.", "model.")),
        prefixes=_NEOX,
        since="0.32",
    ),
    _neox_family(tuple(_neox("grouped", "embed_out.weight", everywhere=True)), until="0.31"),
    Family(
        "glm4",
        ("Glm4ForCausalLM",),
        _glm4(),
        defaults(151552, 4096, 13696, 40, 32, num_key_value_heads=2, head_dim=128, attention_bias=True),
        dtypes=("BF16", "F32"),
        skips=PREDICTING,
        refused=REFUSED,
        drops=DROPS,
    ),
    _olmo2_family(prefixes=_IN_MODEL, since=_FIRST_TRANSFORMERS),
    _olmo2_family(head_dim_key="", until=_LAST_NATIVE),
    _starcoder2_family(prefixes=_IN_MODEL, since=_FIRST_TRANSFORMERS),
    _starcoder2_family(head_dim_key="", until=_LAST_NATIVE),
    Family(
        "cohere",
        ("CohereForCausalLM", "Cohere2ForCausalLM"),
        _cohere(),
        defaults(256000, 8192, 22528, 40, 64, tie_word_embeddings=True),
        tied=("", ""),
        refused=(*REFUSED, "attention_bias"),
        drops={**DROPS, **_NO_HEAD},
    ),
    Family(
        "stablelm",
        ("StableLmForCausalLM",),
        _stablelm(),
        defaults(50304, 2560, 6912, 32, 32, num_key_value_heads=32),
        head_dim_key="",
        refused=(*REFUSED, "qk_layernorm", "use_parallel_residual"),
        drops=DROPS,
    ),
)
