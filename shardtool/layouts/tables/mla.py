"""Latent attention with experts: DeepSeek-V2 and V3.

Facts are vLLM's ``model_executor/models/deepseek_v2.py`` and ``layers/mla.py``. Modules that are registered twice keep
the smaller of their names, so that some weights of the attention are below ``mla_attn`` and others are not.
"""

from __future__ import annotations

from dataclasses import replace

from shardtool.layouts.tables.blocks import DROPS, LAYER, NORMS, PREDICTING, REFUSED, copies, defaults, gated, scales
from shardtool.layouts.tables.language import Family, Row
from shardtool.layouts.tables.moe import experts, own_head, router, shared

_ATTN, _INNER, _MLP = LAYER + "self_attn.", LAYER + "self_attn.mla_attn.", LAYER + "mlp."
_SPARSE = "deepseek sparse"


def _attention() -> list[Row]:
    """With ``q_lora_rank`` the queries come from a latent vector as well."""
    lora, plain = "q_lora_rank", "not q_lora_rank"
    return [
        Row(
            "latent",
            f"{_ATTN}fused_qkv_a_proj.weight",
            (f"{_ATTN}q_a_proj.weight", f"{_ATTN}kv_a_proj_with_mqa.weight"),
            lora,
            instead=(f"{_ATTN}fused_qkv_a_proj.weight",),
        ),
        Row("copy", f"{_INNER}q_a_layernorm.weight", (f"{_ATTN}q_a_layernorm.weight",), lora),
        Row("by_head", f"{_INNER}q_b_proj.weight", (f"{_ATTN}q_b_proj.weight",), lora, "latent q"),
        *copies(f"{_ATTN}kv_a_proj_with_mqa.weight", when=plain),
        Row("by_head", f"{_INNER}q_proj.weight", (f"{_ATTN}q_proj.weight",), plain, "latent q"),
        *copies(f"{_ATTN}kv_a_layernorm.weight"),
        Row("by_head", f"{_ATTN}kv_b_proj.weight", (f"{_ATTN}kv_b_proj.weight",), "", "latent kv"),
        Row("from_heads", f"{_INNER}o_proj.weight", (f"{_ATTN}o_proj.weight",), "", "latent o"),
        *scales(_INNER + "mla_attn."),
    ]


def _rows() -> tuple[Row, ...]:
    rows = own_head()
    rows += copies(*(f"{LAYER}{norm}.weight" for norm in NORMS))
    dense = [replace(row, instead=()) for row in gated(layers="deepseek dense")]
    correction = router(
        f"{_MLP}experts.gate.e_score_correction_bias",
        f"{_MLP}gate.e_score_correction_bias",
        layers=_SPARSE,
        dtype="F32",
    )
    return (
        *rows,
        *_attention(),
        *dense,
        router(f"{_MLP}experts.gate.weight", f"{_MLP}gate.weight", layers=_SPARSE),
        replace(correction, when="topk_method=noaux_tc"),
        *experts(_MLP, both="", layers=_SPARSE),
        *shared(_MLP, "shared_experts", "all shared", fused=False, when="n_shared_experts", layers=_SPARSE),
    )


_REFUSED = (*REFUSED, "index_topk", "is_causal=False", "rswa_window")

FAMILIES: tuple[Family, ...] = (
    Family(
        "deepseek_v2",
        ("DeepseekV2ForCausalLM",),
        _rows(),
        defaults(
            102400,
            4096,
            11008,
            32,
            32,
            num_key_value_heads=32,
            n_routed_experts=64,
            n_shared_experts=2,
            moe_intermediate_size=1407,
            first_k_dense_replace=0,
            moe_layer_freq=1,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            topk_method="greedy",
        ),
        tied=("", ""),
        keys={"n_routed_experts": "num_experts"},
        experts=("n_routed_experts",),
        limits=("latent attention",),
        skips=PREDICTING,
        refused=_REFUSED,
        drops=DROPS,
    ),
    Family(
        "deepseek_v3",
        ("DeepseekV3ForCausalLM",),
        _rows(),
        defaults(
            129280,
            7168,
            18432,
            61,
            128,
            num_key_value_heads=128,
            n_routed_experts=256,
            n_shared_experts=1,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            moe_layer_freq=1,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            num_nextn_predict_layers=1,
        ),
        tied=("", ""),
        keys={"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
        experts=("n_routed_experts",),
        limits=("latent attention",),
        skips=PREDICTING,
        refused=_REFUSED,
        drops=DROPS,
    ),
)
