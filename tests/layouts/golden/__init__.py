"""Golden layouts: what each table says of a tiny model at tp 4, kept as JSON so that a change is seen and meant.

``python -m tests.layouts.golden --update`` writes them anew. Look at the difference before it is committed: shards that
were made with the old layout keep theirs in the manifest, engines do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardtool import recipe_json
from shardtool.dtypes import DType, from_name
from shardtool.layouts import vllm
from shardtool.layouts.base import Model, Parallel
from shardtool.mosaic import Logical
from tests import builders, quants
from tests.layouts import classic, mixtures

FOLDER = Path(__file__).parent
TP = 4
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


def layout(name: str) -> dict[str, Any]:
    """What the table says of a variant, as JSON values."""
    variant = model(name)
    outline = vllm.for_config(variant.config).outline(variant, Parallel(TP))
    return {
        "config": dict(variant.config),
        "tp": TP,
        "recipe": recipe_json.to_json(outline.recipe),
        "dropped": dict(outline.dropped),
        "copies": dict(outline.copies),
        "amendments": dict(outline.amendments),
    }


def text(name: str) -> str:
    """The golden file of a variant as it should be: a line for each entry of the recipe."""
    table = layout(name)
    rules = ",\n".join(f"    {json.dumps(rule)}" for rule in table.pop("recipe"))
    rest = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    return f'{{\n{rest},\n  "recipe": [\n{rules}\n  ]\n}}\n'


def path(name: str) -> Path:
    """Where a golden file is."""
    return FOLDER / f"{name}.json"


def update() -> list[str]:
    """Write every golden file; returns those that changed."""
    changed = []
    for name in VARIANTS:
        if not path(name).exists() or path(name).read_text() != text(name):
            path(name).write_text(text(name))
            changed.append(name)
    for stale in set(FOLDER.glob("*.json")) - {path(name) for name in VARIANTS}:
        stale.unlink()
        changed.append(stale.stem)
    return changed
