"""What tables are put together from: the rows of a Llama-like decoder, part by part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from shardtool.layouts.tables.language import Row

LAYER = "model.layers.{i}."
NORMS = ("input_layernorm", "post_attention_layernorm")
REFUSED = ("per_layer_config",)
DROPS = dict.fromkeys(
    ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
    "a table of the rotary embedding, which engines compute themselves",
)
PREDICTING = (
    ("predicting", LAYER, "a layer that predicts further tokens, which the engine loads into a model of its own"),
)
"""``Family.skips`` of the models whose checkpoints hold such layers."""
SCALES_SINCE = "0.15"
"""The first engine version whose attention keeps its scales among the weights."""


def defaults(vocab: int, hidden: int, inter: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """The defaults of a configuration class, by the names of the sizes."""
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "tie_word_embeddings": False, **more}


def copies(*names: str, when: str = "", stage: str = "", layers: str = "") -> list[Row]:
    """Tensors that every rank holds whole, under their own names."""
    return [Row("copy", name, (name,), when, layers=layers, stage=stage) for name in names]


def ends(
    *,
    embed: str = "model.embed_tokens.weight",
    norms: tuple[str, ...] = ("model.norm.weight",),
    head: str = "lm_head.weight",
    to: str = "lm_head.weight",
    everywhere: bool = False,
) -> list[Row]:
    """Embeddings, last norm and head; an empty ``head`` where the engine's model has none.

    ``to``: what the engine calls the head, which is also its name of the one matrix of a tied model. ``everywhere``:
    every pipeline stage holds them; else the first the embeddings, the last the rest.
    """
    first, last = ("", "") if everywhere else ("first", "last")
    rows = copies(*norms, stage=last)
    if not head:
        return [*rows, Row("vocab", embed, (embed,), stage=first)]
    rows += [
        Row("vocab", embed, (embed,), "not tie_word_embeddings", stage=first),
        Row("vocab", to, (head,), "not tie_word_embeddings", stage=last),
        Row("vocab", to, (embed,), "tie_word_embeddings", stage=last),
    ]
    if not everywhere:
        rows.append(Row("vocab", embed, (embed,), "tie_word_embeddings", stage="first not last"))
    return rows


def attention(
    at: str = LAYER + "self_attn.",
    *,
    qkv_bias: str | None = None,
    o_bias: str | None = None,
    fused: bool = False,
    out: str = "o_proj",
) -> list[Row]:
    """q, k and v in one, and the projection back. A bias is None where the engine never has one, else its condition.

    ``fused``: checkpoints hold q, k and v in one tensor too.
    """
    rows = []
    for kind, when in (("weight", ""), ("bias", qkv_bias)):
        if when is not None:
            one = f"{at}qkv_proj.{kind}"
            names = ((one,), tuple(f"{at}{x}_proj.{kind}" for x in "qkv"))
            rows.append(Row("qkv", one, names[not fused], when, instead=names[fused]))
    return [*rows, *across(at + out, o_bias, "heads")]


def gated(
    at: str = LAYER + "mlp.",
    *,
    bias: str | None = None,
    size: str = "intermediate",
    fused: bool = False,
    layers: str = "",
) -> list[Row]:
    """Gate and up in one, and the projection back. ``layers``: those that have it."""
    rows = []
    for kind, when in (("weight", ""), ("bias", bias)):
        if when is not None:
            one = f"{at}gate_up_proj.{kind}"
            names = ((one,), (f"{at}gate_proj.{kind}", f"{at}up_proj.{kind}"))
            rows.append(Row("gate_up", one, names[not fused], when, size, names[fused], layers))
    return [*rows, *across(at + "down_proj", bias, size, layers)]


def down(module: str, bias: str | None, size: str = "", layers: str = "") -> list[Row]:
    """A layer whose rows are cut, and its bias with them."""
    rows = [Row("column", module + ".weight", (module + ".weight",), "", size, layers=layers)]
    if bias is not None:
        rows.append(Row("column", module + ".bias", (module + ".bias",), bias, size, layers=layers))
    return rows


def across(module: str, bias: str | None, size: str = "", layers: str = "") -> list[Row]:
    """A layer whose columns are cut. Its bias is whole on every rank."""
    rows = [Row("row", module + ".weight", (module + ".weight",), "", size, layers=layers)]
    if bias is not None:
        rows += copies(module + ".bias", when=bias, layers=layers)
    return rows


def scales(at: str = LAYER + "self_attn.attn.", since: str = SCALES_SINCE) -> list[Row]:
    """The scales of an attention layer, which are 1."""
    return [Row("scalar", f"{at}_{x}_scale", dtype="F32", since=since) for x in ("k", "v", "q", "prob")]


def decoder(
    *,
    norms: tuple[str, ...] = NORMS,
    head: str = "lm_head.weight",
    qk_norm: str | None = None,
    qkv_bias: str | None = None,
    o_bias: str | None = None,
    mlp_bias: str | None = None,
    fused: bool = False,
    everywhere: bool = False,
    scales_since: str = SCALES_SINCE,
) -> tuple[Row, ...]:
    """The rows of a Llama-like decoder."""
    rows = ends(head=head, everywhere=everywhere)
    rows += copies(*(f"{LAYER}{norm}.weight" for norm in norms))
    rows += attention(qkv_bias=qkv_bias, o_bias=o_bias, fused=fused)
    rows += gated(bias=mlp_bias, fused=fused)
    if qk_norm is not None:
        rows += copies(*(f"{LAYER}self_attn.{x}_norm.weight" for x in "qk"), when=qk_norm)
    return (*rows, *scales(since=scales_since))


def renamed(rows: Iterable[Row], old: str, new: str) -> list[Row]:
    """The rows with another beginning of their targets' names."""
    return [replace(row, to=new + row.to[len(old) :]) if row.to.startswith(old) else row for row in rows]
