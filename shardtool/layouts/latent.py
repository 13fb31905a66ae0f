"""Rules for latent attention (MLA): what is cut by heads, and what every rank holds whole.

Queries and keys come from small latent vectors, which every rank computes for itself; only the matrices that make
heads of them are cut. Source: vLLM 0.32 ``model_executor/models/deepseek_v2.py``.

============= ================================================== ==========================================
rule          rank r of tp holds                                  of
============= ================================================== ==========================================
by_head       the rows of its heads                               ``q_b_proj``, ``q_proj``, ``kv_b_proj``
from_heads    the columns of its heads                            ``o_proj``
latent        all rows of both sources, stacked                   ``q_a_proj`` and ``kv_a_proj_with_mqa``
============= ================================================== ==========================================
"""

from __future__ import annotations

from shardtool.layouts import blocks
from shardtool.layouts.rules import Dims, Rule, Shape, Sources, column, divide, fail, row
from shardtool.recipe import Share


def by_head(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Each rank the rows of its heads."""
    divide(target, "the number of heads", dims.heads, tp)
    return column(target, sources, dims, tp)


def from_heads(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Each rank the columns of its heads."""
    divide(target, "the number of heads", dims.heads, tp)
    return row(target, sources, dims, tp)


def latent(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Both sources, one below the other, on every rank. A single one is the two, stacked already."""
    wanted = _ranks(dims)
    rows = [source.shape[0] if source.shape else 0 for source in sources]
    if rows != ([sum(wanted)] if len(sources) == 1 else wanted):
        raise fail(
            target,
            f"its sources have {rows} rows, but q_lora_rank, kv_lora_rank and qk_rope_head_dim in config.json "
            f"make {wanted}",
        )
    one = blocks.join([blocks.whole(source.name, source.shape) for source in sources], 0)
    return (Share(tuple(range(tp)), one.shape, blocks.pieces(one)),)


def _ranks(dims: Dims) -> list[int]:
    """The rows of the two latent projections."""
    return [_size(dims, "q_lora_rank"), _size(dims, "kv_lora_rank") + _size(dims, "qk_rope_head_dim")]


def _size(dims: Dims, key: str) -> int:
    value = dims.config.get(key)
    return value if type(value) is int else 0


def _rows(shape: Shape, _sources: int, _dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((shape[0] * tp, *shape[1:]),)


def _columns(shape: Shape, _sources: int, _dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((shape[0], shape[1] * tp),)


def _both(shape: Shape, sources: int, dims: Dims, _tp: int) -> tuple[Shape, ...]:
    return tuple((rows, *shape[1:]) for rows in _ranks(dims)) if sources == 2 else (shape,)


RULES: dict[str, Rule] = {
    "by_head": Rule(by_head, _rows),
    "from_heads": Rule(from_heads, _columns, dim=1),
    "latent": Rule(latent, _both, (1, 2)),
}
