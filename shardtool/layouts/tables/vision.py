"""Models that look at images.

Facts are vLLM's ``model_executor/models/qwen2_5_vl.py``, its encoder cut by tensor parallel ranks as it is by default,
and the defaults of the configuration classes of transformers.
"""

from __future__ import annotations

from dataclasses import replace

from shardtool.layouts.tables.blocks import DROPS, REFUSED, across, copies, decoder, defaults, down, gated, renamed
from shardtool.layouts.tables.language import Family, Row

_BLOCK = "visual.blocks.{i}."


def _encoder() -> list[Row]:
    """The encoder of images, which every pipeline stage holds."""
    qkv = _BLOCK + "attn.qkv."
    blocks = copies(_BLOCK + "norm1.weight", _BLOCK + "norm2.weight")
    blocks += [Row("vision_qkv", qkv + kind, (qkv + kind,), "", "vision") for kind in ("weight", "bias")]
    blocks += across(_BLOCK + "attn.proj", "", "vision")
    blocks += gated(_BLOCK + "mlp.", bias="", size="vision_intermediate")
    rows = copies("visual.patch_embed.proj.weight", "visual.merger.ln_q.weight")
    rows += down("visual.merger.mlp.0", "", "merger") + across("visual.merger.mlp.2", "", "merger")
    return [*rows, *(replace(row, layers="vision", stage="every") for row in blocks)]


def _qwen2_5_vl() -> tuple[Row, ...]:
    text = renamed(decoder(qkv_bias=""), "model.", "language_model.model.")
    return (*renamed(text, "lm_head.", "language_model.lm_head."), *_encoder())


FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen2_5_vl",
        ("Qwen2_5_VLForConditionalGeneration",),
        _qwen2_5_vl(),
        {
            **defaults(152064, 8192, 29568, 80, 64, num_key_value_heads=8),
            "vision_config": {
                "depth": 32,
                "hidden_size": 3584,
                "intermediate_size": 3420,
                "num_heads": 16,
                "spatial_merge_size": 2,
            },
        },
        head_dim_key="",
        refused=REFUSED,
        drops=DROPS,
        inside="text_config",
        prefixes=(
            ("model.language_model.", "model."),
            ("language_model.model.", "model."),
            ("model.visual.", "visual."),
            ("language_model.lm_head.", "lm_head."),
        ),
    ),
)
