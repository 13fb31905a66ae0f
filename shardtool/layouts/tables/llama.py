"""The decoders that people serve most: Llama and those that are cut like it.

Facts are vLLM's ``model_executor/models/{llama,mistral,qwen2,qwen3,phi3,gemma2,gemma3,granite}.py`` and the defaults of
the configuration classes that it reads config.json with.
"""

from __future__ import annotations

from shardtool.layouts.tables.blocks import DROPS, LAYER, REFUSED, decoder, defaults
from shardtool.layouts.tables.language import Family, Row

_QKV_BIAS = "qkv_bias else attention_bias|bias"
_BIAS = "attention_bias|bias"
_GEMMA_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)  # fmt: skip
_SINKS = "attention_sinks else layer_types"

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        decoder(qkv_bias=_QKV_BIAS, o_bias=_BIAS, mlp_bias="mlp_bias"),
        defaults(32000, 4096, 11008, 32, 32),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "mistral",
        ("MistralForCausalLM",),
        decoder(qkv_bias=_QKV_BIAS, o_bias=_BIAS, mlp_bias="mlp_bias"),
        defaults(32000, 4096, 14336, 32, 32, num_key_value_heads=8),
        refused=(*REFUSED, "ada_rms_norm_t_cond"),
        drops=DROPS,
    ),
    Family(
        "qwen2",
        ("Qwen2ForCausalLM",),
        decoder(qkv_bias="", qk_norm="qk_norm"),
        defaults(151936, 4096, 22016, 32, 32, num_key_value_heads=32),
        head_dim_key="",
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        decoder(qkv_bias="attention_bias", qk_norm=""),
        defaults(151936, 4096, 22016, 32, 32, num_key_value_heads=32, head_dim=128),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        decoder(qkv_bias=_QKV_BIAS, o_bias=_BIAS, mlp_bias="mlp_bias", fused=True),
        defaults(32064, 3072, 8192, 32, 32),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        decoder(everywhere=True, norms=_GEMMA_NORMS, head="", qkv_bias="attention_bias", o_bias="attention_bias"),
        defaults(256000, 2304, 9216, 26, 8, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True),
        tied=("", ""),
        dtypes=("BF16", "F32"),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM",),
        decoder(everywhere=True, norms=_GEMMA_NORMS, qk_norm="", qkv_bias="attention_bias", o_bias="attention_bias"),
        defaults(262208, 2304, 9216, 26, 8, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True),
        dtypes=("BF16", "F32"),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "granite",
        ("GraniteForCausalLM",),
        (
            *decoder(qkv_bias=_BIAS, o_bias=_BIAS, mlp_bias="mlp_bias"),
            Row("column", LAYER + "self_attn.sinks", (LAYER + "self_attn.sinks",), _SINKS, "sinks", since="0.31"),
        ),
        defaults(32000, 4096, 11008, 32, 32),
        refused=REFUSED,
        drops=DROPS,
    ),
)
