"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, GraniteMoE, GLM4-MoE and gpt_oss.

Facts are vLLM's ``model_executor/models/{mixtral,qwen2_moe,qwen3_moe,olmoe,granitemoe,granitemoeshared,glm4_moe,
gpt_oss}.py``. Most of these classes build embeddings, last norm and head on every pipeline stage.
"""

from __future__ import annotations

from dataclasses import replace

from shardtool.layouts.tables.blocks import (
    DROPS,
    LAYER,
    NORMS,
    PREDICTING,
    REFUSED,
    attention,
    copies,
    defaults,
    ends,
    gated,
    renamed,
    scales,
)
from shardtool.layouts.tables.language import Family, Row

Spellings = tuple[tuple[str, str], ...]


def experts(
    at: str,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    both: str = "gate_up_proj",
    size: str = "moe",
    layers: str = "",
) -> list[Row]:
    """The stacked experts, from tensors per expert. ``both``: a checkpoint's name for gate and up in one, if any."""
    gate, up, down = (f"{at}experts.{{e}}.{name}.weight" for name in names)
    fused = (f"{at}experts.{{e}}.{both}.weight",) if both else ()
    held = f"{at}experts.routed_experts."
    return [
        Row("experts_gate_up", f"{held}w13_weight", (gate, up), "", size, fused, layers),
        Row("experts_down", f"{held}w2_weight", (down,), "", size, layers=layers),
    ]


def stacked(at: str, both: str = "gate_up_proj", down: str = "down_proj") -> Spellings:
    """``Family.prefixes`` of checkpoints that stack all experts, as the engine's generic loader takes them too."""
    return tuple((f"{at}experts.{x}", f"{at}experts.{{e}}.{x}.weight") for x in (both, down))


def shared(at: str, name: str, size: str, *, fused: bool = True, when: str = "", layers: str = "") -> list[Row]:
    """The experts that every token goes to, under the name that the engine keeps of several.

    ``name``: the checkpoint's. ``fused``: whether checkpoints may hold gate and up in one.
    """
    old, new = f"{at}{name}.", f"{at}experts._shared_experts._layer."
    rows = renamed(gated(old, size=size, layers=layers), old, new)
    return [replace(row, when=when, instead=row.instead if fused else ()) for row in rows]


def router(to: str, of: str, *, layers: str = "", dtype: str = "") -> Row:
    """The matrix that chooses experts, whole on every rank."""
    return Row("copy", to, (of,), "", "experts", layers=layers, dtype=dtype)


def own_head(*, everywhere: bool = False) -> list[Row]:
    """Embeddings, last norm and head of a class that never ties them, whatever config.json says."""
    return [replace(row, when="") for row in ends(everywhere=everywhere) if row.when != "tie_word_embeddings"]


def _frame(rows: list[Row], *, qkv_bias: str | None = None, qk_norm: str | None = None) -> list[Row]:
    """All but the experts and what stands in their place. ``rows``: embeddings, last norm and head."""
    rows += copies(*(f"{LAYER}{norm}.weight" for norm in NORMS))
    rows += attention(qkv_bias=qkv_bias)
    if qk_norm is not None:
        rows += copies(*(f"{LAYER}self_attn.{x}_norm.weight" for x in "qk"), when=qk_norm)
    return [*rows, *scales()]


_MLP, _SPARSE, _OSS = LAYER + "mlp.", LAYER + "block_sparse_moe.", LAYER + "mlp.experts."


def _qwen(gate: str) -> tuple[Row, ...]:
    """The layers of Qwen's mixtures, some of which are dense. ``gate``: the engine's name for the router."""
    some = "shared_expert_intermediate_size"
    inner = f"{_MLP}experts._shared_experts._layer.expert_gate.weight"
    return (
        *gated(layers="qwen dense"),
        router(gate, f"{_MLP}gate.weight", layers="qwen sparse"),
        *experts(_MLP, layers="qwen sparse"),
        *shared(_MLP, "shared_expert", "one shared", when=some, layers="qwen sparse"),
        Row("copy", inner, (f"{_MLP}shared_expert_gate.weight",), some, layers="qwen sparse"),
    )


_SINKS = Row(
    "column", LAYER + "self_attn.sinks", (LAYER + "self_attn.sinks",), "attention_sinks else layer_types", "sinks"
)


def _granite(*more: Row) -> tuple[Row, ...]:
    held = f"{_SPARSE}experts.routed_experts."
    gate, up = (f"{_SPARSE}experts.{{e}}.{x}_proj.weight" for x in ("gate", "up"))
    return (
        *_frame(ends(everywhere=True)),
        _SINKS,
        router(f"{_SPARSE}gate.weight", f"{_SPARSE}router.layer.weight"),
        Row("stacked_gate_up", f"{held}w13_weight", (f"{_SPARSE}input_linear.weight",), "", "intermediate", (gate, up)),
        Row("stacked_down", f"{held}w2_weight", (f"{_SPARSE}output_linear.weight",), "", "intermediate"),
        *more,
    )


_GRANITE_SPELLINGS: Spellings = (
    (f"{_SPARSE}experts.gate_up_proj", f"{_SPARSE}input_linear.weight"),
    (f"{_SPARSE}experts.{{e}}.gate_up_proj.weight", f"{_SPARSE}input_linear.weight"),
    (f"{_SPARSE}experts.down_proj", f"{_SPARSE}output_linear.weight"),
    (f"{_SPARSE}experts.{{e}}.down_proj.weight", f"{_SPARSE}output_linear.weight"),
    (f"{_SPARSE}router.weight", f"{_SPARSE}router.layer.weight"),
    (f"{_SPARSE}gate.weight", f"{_SPARSE}router.layer.weight"),
)


def _gpt_oss() -> tuple[Row, ...]:
    at, to = LAYER + "self_attn.", LAYER + "attn."
    rows = own_head(everywhere=True)
    rows += copies(*(f"{LAYER}{norm}.weight" for norm in NORMS))
    rows += [*attention(at, qkv_bias="", o_bias=""), *scales(to + "attn.")]
    rows.append(Row("column", at + "sinks", (at + "sinks",), "", "sinks"))
    rows = renamed(renamed(rows, at, to), "model.embed_tokens.", "model.embedding.")
    return (
        *rows,
        router(_MLP + "router.weight", _MLP + "router.weight"),
        *copies(_MLP + "router.bias"),
        Row("swapped_gate_up", _OSS + "routed_experts.w13_weight", (_OSS + "gate_up_proj",), "", "intermediate"),
        Row("pairs_bias", _OSS + "routed_experts.w13_bias", (_OSS + "gate_up_proj_bias",), "", "intermediate"),
        Row("swapped_down", _OSS + "routed_experts.w2_weight", (_OSS + "down_proj",), "", "intermediate"),
        Row("bias_once", _OSS + "routed_experts.w2_bias", (_OSS + "down_proj_bias",)),
    )


_OSS_SPELLINGS: Spellings = (
    ("model.embedding.", "model.embed_tokens."),
    (LAYER + "attn.", LAYER + "self_attn."),
    *(
        (_OSS + spelling, _OSS + name)
        for name, engine in (
            ("gate_up_proj", "w13_weight"),
            ("gate_up_proj_bias", "w13_bias"),
            ("down_proj", "w2_weight"),
            ("down_proj_bias", "w2_bias"),
        )
        for spelling in (engine, f"{{e}}.{name}", f"{{e}}.{engine}")
    ),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "mixtral",
        ("MixtralForCausalLM",),
        (
            *_frame(ends(everywhere=True)),
            router(f"{_SPARSE}gate.weight", f"{_SPARSE}gate.weight"),
            *experts(_SPARSE, names=("w1", "w3", "w2"), both="w13", size="intermediate"),
        ),
        defaults(32000, 4096, 14336, 32, 32, num_key_value_heads=8, num_local_experts=8),
        keys={"num_local_experts": "num_experts"},
        experts=("num_local_experts",),
        limits=("experts in every stage",),
        prefixes=(
            *stacked(_SPARSE, "w13", "w2"),
            *(
                (f"{_SPARSE}experts.{{e}}.{theirs}.weight", f"{_SPARSE}experts.{{e}}.{ours}.weight")
                for theirs, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
            ),
        ),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "qwen2_moe",
        ("Qwen2MoeForCausalLM",),
        (
            *_frame(ends(everywhere=True), qkv_bias=""),
            *_qwen(f"{_MLP}gate.weight"),
            *copies(
                f"{_MLP}shared_expert_gate.weight", when="not shared_expert_intermediate_size", layers="qwen sparse"
            ),
        ),
        defaults(
            151936,
            2048,
            5632,
            24,
            16,
            num_key_value_heads=16,
            num_experts=60,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            decoder_sparse_step=1,
        ),
        head_dim_key="",
        keys={"num_experts": "num_local_experts"},
        experts=("num_experts",),
        limits=("an expert each",),
        prefixes=stacked(_MLP),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "qwen3_moe",
        ("Qwen3MoeForCausalLM",),
        (
            *_frame(ends(everywhere=True), qkv_bias="attention_bias", qk_norm=""),
            *_qwen(f"{_MLP}experts.gate.weight"),
        ),
        defaults(
            151936,
            2048,
            6144,
            24,
            32,
            num_key_value_heads=4,
            num_experts=128,
            moe_intermediate_size=768,
            decoder_sparse_step=1,
        ),
        keys={"num_experts": "num_local_experts"},
        experts=("num_experts",),
        limits=("an expert each", "qwen experts in every stage"),
        prefixes=stacked(_MLP),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "olmoe",
        ("OlmoeForCausalLM",),
        (
            *_frame(own_head(everywhere=True), qk_norm=""),
            router(f"{_MLP}gate.weight", f"{_MLP}gate.weight"),
            *experts(_MLP, size="intermediate"),
        ),
        defaults(50304, 2048, 2048, 16, 16, num_key_value_heads=16, num_experts=64),
        head_dim_key="",
        keys={"num_experts": "num_local_experts"},
        tied=("", ""),
        experts=("num_experts",),
        prefixes=stacked(_MLP),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "granitemoe",
        ("GraniteMoeForCausalLM",),
        _granite(),
        defaults(32000, 4096, 11008, 32, 32, num_local_experts=8),
        head_dim_key="",
        keys={"num_local_experts": "num_experts"},
        experts=("num_local_experts",),
        prefixes=_GRANITE_SPELLINGS,
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "granitemoeshared",
        ("GraniteMoeSharedForCausalLM",),
        _granite(
            Row(
                "gate_up",
                f"{LAYER}shared_mlp.input_linear.weight",
                (f"{LAYER}shared_mlp.input_linear.weight",),
                "shared_intermediate_size",
                "shared",
            ),
            Row(
                "row",
                f"{LAYER}shared_mlp.output_linear.weight",
                (f"{LAYER}shared_mlp.output_linear.weight",),
                "shared_intermediate_size",
                "shared",
            ),
        ),
        defaults(32000, 4096, 11008, 32, 32, num_local_experts=8, shared_intermediate_size=0),
        head_dim_key="",
        keys={"num_local_experts": "num_experts"},
        experts=("num_local_experts",),
        prefixes=_GRANITE_SPELLINGS,
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "glm4_moe",
        ("Glm4MoeForCausalLM",),
        (
            *_frame(own_head(), qkv_bias="attention_bias", qk_norm="use_qk_norm"),
            *gated(layers="early"),
            router(f"{_MLP}gate.weight", f"{_MLP}gate.weight", layers="late", dtype="F32"),
            router(
                f"{_MLP}experts.routed_experts.e_score_correction_bias",
                f"{_MLP}gate.e_score_correction_bias",
                layers="late",
                dtype="F32",
            ),
            *experts(_MLP, layers="late"),
            *shared(_MLP, "shared_experts", "all shared", when="n_shared_experts", layers="late"),
        ),
        defaults(
            151552,
            4096,
            10944,
            46,
            96,
            num_key_value_heads=8,
            n_routed_experts=128,
            n_shared_experts=1,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            num_nextn_predict_layers=1,
        ),
        tied=("", ""),
        keys={"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
        experts=("n_routed_experts",),
        limits=("late experts in every stage",),
        skips=PREDICTING,
        prefixes=stacked(_MLP),
        refused=REFUSED,
        drops=DROPS,
    ),
    Family(
        "gpt_oss",
        ("GptOssForCausalLM",),
        _gpt_oss(),
        defaults(201088, 2880, 2880, 36, 64, num_key_value_heads=8, head_dim=64, num_local_experts=128),
        tied=("", ""),
        keys={"num_local_experts": "num_experts"},
        experts=("num_local_experts",),
        limits=("gpt_oss",),
        prefixes=_OSS_SPELLINGS,
        refused=REFUSED,
        drops=DROPS,
    ),
)
