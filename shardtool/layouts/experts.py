"""Rules for mixtures of experts: how a layer's stacked experts are cut, for every rank.

The engine stacks the experts of a layer: ``w13`` is ``[experts, 2 * size, hidden]``, each expert's gate over its up,
and ``w2`` is ``[experts, hidden, size]``. A checkpoint may hold each expert's tensors on their own (sources with the
slot ``{e}``), gate and up of an expert in one, or all experts stacked already; a rule takes what it is given.

Without expert parallel every rank has its slice of each expert; with it, whole experts: consecutive ones, and one more
on the first ranks where they do not divide. Sources: vLLM 0.32 ``model_executor/layers/fused_moe/routed_experts.py``
and ``expert_map_manager.py``; for the swapped ones ``model_executor/models/gpt_oss.py``.

=============== ======================================================================= =============================
rule            of each expert, rank r of tp holds                                       its sources, as a rule
=============== ======================================================================= =============================
experts_gate_up its rows of gate, then its rows of up                                    gate and up, per expert
experts_down    its columns                                                              per expert
stacked_gate_up as experts_gate_up                                                       ``[experts, 2 size, hidden]``
stacked_down    as experts_down                                                          ``[experts, hidden, size]``
swapped_gate_up its columns as rows; gate and up alternate, pairs stay together          ``[experts, hidden, 2 size]``
swapped_down    its rows as columns                                                      ``[experts, size, hidden]``
pairs_bias      its elements; gate and up alternate, pairs stay together                 ``[experts, 2 size]``
bias_once       all on rank 0, zeros on the others, since the ranks' results are added   ``[experts, hidden]``
=============== ======================================================================= =============================
"""

from __future__ import annotations

from collections.abc import Callable

from shardtool.layouts import blocks
from shardtool.layouts.blocks import Blocks
from shardtool.layouts.rules import Dims, Rule, Shape, Source, Sources, divide, fail
from shardtool.recipe import Share


def local_experts(experts: int, tp: int, rank: int) -> range:
    """The experts of one rank with expert parallel (``determine_expert_map``, linear placement)."""
    each, more = divmod(experts, tp)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def _stack(target: str, source: Source, dims: Dims, sizes: int) -> Blocks:
    """All experts of a source; each has so many sizes. Refused where its shape is another."""
    one = blocks.whole(source.name, source.shape)
    if len(source.shape) != sizes + (not source.numbers):
        what = f"of the {sizes} sizes of one expert" if source.numbers else f"of experts and their {sizes} sizes"
        raise fail(target, f"its source {source.name!r} has the shape {list(source.shape)}, which is not one {what}")
    if source.numbers:
        return blocks.stack(one, len(source.numbers))
    if source.shape[0] != dims.experts:
        raise fail(
            target,
            f"its source has the shape {list(source.shape)}, but config.json says {dims.experts} experts",
        )
    return one


def _halves(target: str, sources: Sources, dims: Dims) -> tuple[Blocks, Blocks]:
    """Gate and up of all experts."""
    found = [_stack(target, source, dims, 2) for source in sources]
    if len(found) == 1:
        (both,) = found
        if both.shape[1] % 2:
            raise fail(target, f"its source has {both.shape[1]} rows for each expert, which are no gate and up")
        size = both.shape[1] // 2
        return blocks.narrow(both, 1, 0, size), blocks.narrow(both, 1, size, size)
    gate, up = found
    if gate.shape != up.shape:
        raise fail(target, f"gate and up are {list(gate.shape[1:])} and {list(up.shape[1:])}, which cannot be stacked")
    return gate, up


def _shares(
    full: Blocks, mine: Callable[[int], Blocks], dims: Dims, tp: int, fill: float | None = None
) -> tuple[Share, ...]:
    """Each rank's share: with expert parallel its experts of ``full``, else what ``mine`` says.

    A rank without any expert holds nothing. ``fill``: the value where ``mine`` has no blocks.
    """
    shares = []
    for r in range(tp):
        if dims.expert_parallel:
            local = local_experts(dims.experts, tp, r)
            if not local:
                continue
            one = blocks.narrow(full, 0, local.start, len(local))
        else:
            one = mine(r)
        shares.append(Share((r,), one.shape, blocks.pieces(one), None if one.blocks else fill))
    return tuple(shares)


def _slice(target: str, size: int, dims: Dims, tp: int) -> int:
    """The part of the experts' size that each rank has."""
    return size if dims.expert_parallel else divide(target, "the size of the experts", size, tp)


def gate_up(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Of each expert, a rank's rows of gate and below them its rows of up."""
    gate, up = _halves(target, sources, dims)
    n = _slice(target, gate.shape[1], dims, tp)

    def mine(r: int) -> Blocks:
        return blocks.join([blocks.narrow(half, 1, r * n, n) for half in (gate, up)], 1)

    return _shares(blocks.join([gate, up], 1), mine, dims, tp)


def down(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Of each expert, a rank's columns."""
    (source,) = sources
    full = _stack(target, source, dims, 2)
    n = _slice(target, full.shape[2], dims, tp)
    return _shares(full, lambda r: blocks.narrow(full, 2, r * n, n), dims, tp)


def swapped_gate_up(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Of each expert, a rank's columns (gate, up, gate, up ...) as rows."""
    (source,) = sources
    full = blocks.turn(_stack(target, source, dims, 2), 1, 2)
    n = _pairs(target, full.shape[1], dims, tp)
    return _shares(full, lambda r: blocks.narrow(full, 1, r * n, n), dims, tp)


def swapped_down(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Of each expert, a rank's rows as columns."""
    (source,) = sources
    full = blocks.turn(_stack(target, source, dims, 2), 1, 2)
    n = _slice(target, full.shape[2], dims, tp)
    return _shares(full, lambda r: blocks.narrow(full, 2, r * n, n), dims, tp)


def pairs_bias(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Of each expert, a rank's elements (gate, up, gate, up ...)."""
    (source,) = sources
    full = _stack(target, source, dims, 1)
    n = _pairs(target, full.shape[1], dims, tp)
    return _shares(full, lambda r: blocks.narrow(full, 1, r * n, n), dims, tp)


def bias_once(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Each expert's bias on rank 0 and zeros on the others; with expert parallel, where the expert is."""
    (source,) = sources
    full = _stack(target, source, dims, 1)
    return _shares(full, lambda r: Blocks(full.shape, full.blocks if r == 0 else ()), dims, tp, 0.0)


def _pairs(target: str, both: int, dims: Dims, tp: int) -> int:
    """The elements that each rank has of gates and ups that alternate."""
    if both % 2:
        raise fail(target, f"its source has {both} elements for each expert, which are no pairs of gate and up")
    return 2 * _slice(target, both // 2, dims, tp)


def _all(size: int, dims: Dims, tp: int) -> int:
    return size if dims.expert_parallel else size * tp


def _each_gate_up(shape: Shape, sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
    both, hidden = _all(shape[1], dims, tp), shape[2]
    return ((both // 2, hidden),) * 2 if sources == 2 else ((both, hidden),)


def _each_down(shape: Shape, _sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((shape[1], _all(shape[2], dims, tp)),)


def _stacked_gate_up(shape: Shape, _sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((dims.experts, _all(shape[1], dims, tp), shape[2]),)


def _stacked_down(shape: Shape, _sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((dims.experts, shape[1], _all(shape[2], dims, tp)),)


def _swapped_gate_up(shape: Shape, _sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((dims.experts, shape[2], _all(shape[1], dims, tp)),)


def _swapped_down(shape: Shape, _sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((dims.experts, _all(shape[2], dims, tp), shape[1]),)


def _pairs_bias(shape: Shape, _sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((dims.experts, _all(shape[1], dims, tp)),)


def _bias_once(shape: Shape, _sources: int, dims: Dims, _tp: int) -> tuple[Shape, ...]:
    return ((dims.experts, shape[1]),)


RULES: dict[str, Rule] = {
    "bias_once": Rule(bias_once, _bias_once, dim=-1),
    "experts_down": Rule(down, _each_down, dim=-1),
    "experts_gate_up": Rule(gate_up, _each_gate_up, (1, 2), dim=-2, parts=2),
    "pairs_bias": Rule(pairs_bias, _pairs_bias, dim=-1, parts=2),
    "stacked_down": Rule(down, _stacked_down, dim=-1),
    "stacked_gate_up": Rule(gate_up, _stacked_gate_up, (1, 2), dim=-2, parts=2),
    "swapped_down": Rule(swapped_down, _swapped_down, dim=-2),
    "swapped_gate_up": Rule(swapped_gate_up, _swapped_gate_up, dim=-1, parts=2),
}
