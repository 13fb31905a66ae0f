"""Rules for the tensors of quantized checkpoints: packed numbers, scales of groups and blocks, scales of whole tensors.

A quantized layer is several tensors, each cut along the same borders as the weight would be, but counted in its own
units: eight 4-bit numbers to an int32, a scale for a group of 128 inputs or a block of 128 x 128. How many elements of
the weight an entry stands for follows from the sizes. ``across`` means that the outputs are the columns, as GPTQ and
AWQ store them. Sources: vLLM 0.32 ``model_executor/parameter.py`` and ``layers/linear.py``; for experts
``layers/fused_moe/routed_experts.py``; for mxfp4 ``model_executor/models/gpt_oss.py`` and
``layers/fused_moe/oracle/mxfp4.py``.

======================= ==================================================================== ==========================
rule                    rank r of tp holds                                                   of
======================= ==================================================================== ==========================
qkv_units               its heads of q, k and v, stacked                                     rows in units
qkv_across              the same next to each other                                          columns in units
gate_up_across          its columns of gate, then its columns of up                          columns
stacked                 all rows of all sources                                              rows
joined_across           all columns of all sources                                           columns
one_scalar              ``[1]``, a number                                                    one number
two_scalars             ``[2]``, a number for each part; the same if there is only one       one or two numbers
three_scalars           the same for q, k and v                                              one or three numbers
bare_scalar             ``[]``, a number                                                     one number
minus_one, one, zero    -1.0 as ``[]``; 1.0 and 0.0 as ``[1]``                               nothing
experts_scalar          ``[experts]``, a number for each                                     one number per expert
experts_two_scalars     ``[experts, 2]``, gate's and up's                                    two numbers per expert
gate_up_refined_F       as experts_gate_up, every entry F x F times, of smaller blocks       scales of blocks
down_refined_F          as experts_down, in the same way                                     scales of blocks
mx_gate_up, mx_down     its blocks of 32 elements, under zeros up to what the backend asks   ``_blocks``
mx_gate_up_scale,       the scales of these blocks                                           ``_scales``
mx_down_scale
mx_gate_up_bias,        their biases; that of down on rank 0 only                            ``_bias``
mx_down_bias
======================= ==================================================================== ==========================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from shardtool.layouts import blocks
from shardtool.layouts.blocks import Block, Blocks
from shardtool.layouts.experts import local_experts
from shardtool.layouts.rules import Dims, Rule, Shape, Source, Sources, divide, fail
from shardtool.plan import Piece
from shardtool.recipe import Series, Share
from shardtool.window import Window, row_major

MX = 32
"""Elements that share a scale in mxfp4 (``OCP_MX_BLOCK_SIZE``)."""

MX_BACKENDS: dict[str, tuple[int, int]] = {
    "aiter_mxfp4_fp8": (256, 256),
    "aiter_mxfp4_mxfp4": (256, 128),
    "aiter_triton_mxfp4_bf16": (256, 256),
    "b12x": (1, 1),
    "cpu": (32, 32),
    "deep_gemm": (128, 128),
    "emulation": (32, 32),
    "flashinfer_cutlass": (128, 128),
    "flashinfer_cutlass_afp8": (128, 128),
    "flashinfer_trtllm": (256, 128),
    "flashinfer_trtllm_afp8": (256, 128),
    "humming": (1, 64),
    "marlin": (256, 128),
    "triton": (1, 64),
    "triton_unfused": (1, 64),
    "xpu": (1, 64),
}
"""Backends of mxfp4 experts as vLLM calls them -> multiples to which they round the hidden and the intermediate size.

``mxfp4_round_up_hidden_size_and_intermediate_size`` on the platform of each: those of AITER on AMD GPUs, ``triton`` and
``marlin`` on NVIDIA ones.
"""

MOE_BACKENDS = frozenset(MX_BACKENDS) | {
    "aiter",
    "aiter_mega_moe",
    "auto",
    "batched_triton",
    "cutlass",
    "deep_gemm_mega_moe",
    "flashinfer_b12x",
    "flashinfer_cutedsl",
    "flashinfer_moe_ep_cutedsl",
    "flashinfer_moe_ep_mega_deep_gemm",
    "flydsl",
    "hpc",
    "rdna3",
}
"""These and the other names of ``MoEBackend`` (vLLM 0.32 ``config/kernel.py``), on which no shape here depends."""

REFINED = (2, 4)
"""How many times finer blocks of experts can be made: of 128, 64 and 32."""


# Linear layers.


def _qkv(dim: int) -> Callable[[str, Sources, Dims, int], tuple[Share, ...]]:
    """Query, key and value heads along a dimension, in units of so many elements as the sizes say."""

    def cut(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
        q, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
        held = [source.shape[dim] if dim < len(source.shape) else 0 for source in sources]
        unit = (q + 2 * kv) // sum(held) if sum(held) else 0
        wanted = [q, kv, kv] if len(held) == 3 else [q + 2 * kv]
        if not unit or [n * unit for n in held] != wanted:
            if tp == 1 and unit and all(n == -(-w // unit) for n, w in zip(held, wanted, strict=True)):
                return _whole(_join(target, sources, dim), 1)
            raise fail(
                target,
                f"its sources have {held} entries for {wanted} elements, which {dims.heads} heads and {dims.kv_heads} "
                f"kv heads of {dims.head_dim} in config.json make; that is no whole number of elements for each",
            )
        heads = divide(target, "the number of heads", dims.heads, tp) * dims.head_dim
        if tp > dims.kv_heads and tp % dims.kv_heads:
            raise fail(
                target, f"--tp {tp} is not a multiple of its {dims.kv_heads} kv heads; the engine refuses it too"
            )
        sharing = max(1, tp // dims.kv_heads)
        keys = divide(target, "the number of kv heads", dims.kv_heads * sharing, tp) * dims.head_dim
        if heads % unit or keys % unit:
            raise fail(
                target,
                f"the heads of a rank of --tp {tp} are {heads} and {keys} elements, which cannot be divided into units "
                f"of {unit} that stay together",
            )
        q, kv, heads, keys = q // unit, kv // unit, heads // unit, keys // unit
        one = _join(target, sources, dim)
        shares = []
        for r in range(tp):
            s = r // sharing
            parts = [
                blocks.narrow(one, dim, r * heads, heads),
                blocks.narrow(one, dim, q + s * keys, keys),
                blocks.narrow(one, dim, q + kv + s * keys, keys),
            ]
            held_by = blocks.join(parts, dim)
            shares.append(Share((r,), held_by.shape, blocks.pieces(held_by)))
        return tuple(shares)

    return cut


def _qkv_shapes(dim: int) -> Callable[[Shape, int, Dims, int], tuple[Shape, ...]]:
    def unshard(shape: Shape, sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
        q, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
        mine = q // tp + 2 * dims.head_dim * max(1, dims.kv_heads // tp)
        unit = max(1, mine // max(1, shape[dim]))
        sizes = (q, kv, kv) if sources == 3 else (q + 2 * kv,)
        return tuple(_put(shape, dim, -(-n // unit)) for n in sizes)

    return unshard


def gate_up_across(target: str, sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
    """Each rank its columns of gate, and next to them its columns of up."""
    one = _join(target, sources, 1)
    sizes = [source.shape[1] for source in sources] if len(sources) == 2 else [one.shape[1] // 2] * 2
    if sum(sizes) != one.shape[1]:
        raise fail(target, f"{one.shape[1]} columns are not two equal parts")
    shares = []
    for r in range(tp):
        parts, at = [], 0
        for n in sizes:
            mine = divide(target, "its size", n, tp)
            parts.append(blocks.narrow(one, 1, at + r * mine, mine))
            at += n
        held = blocks.join(parts, 1)
        shares.append(Share((r,), held.shape, blocks.pieces(held)))
    return tuple(shares)


def _gate_up_shapes(shape: Shape, sources: int, _dims: Dims, tp: int) -> tuple[Shape, ...]:
    both = shape[1] * tp
    return ((shape[0], both // 2),) * 2 if sources == 2 else ((shape[0], both),)


def stacked(target: str, sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
    """All rows of all sources on every rank."""
    return _whole(_join(target, sources, 0), tp)


def joined_across(target: str, sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
    """All columns of all sources on every rank."""
    return _whole(_join(target, sources, 1), tp)


def _latent_shapes(dim: int) -> Callable[[Shape, int, Dims, int], tuple[Shape, ...]]:
    """Of the two latent projections: the first has whole units."""

    def unshard(shape: Shape, sources: int, dims: Dims, _tp: int) -> tuple[Shape, ...]:
        if sources == 1:
            return (shape,)
        q, kv, rope = (_size(dims, key) for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"))
        unit = max(1, -(-(q + kv + rope) // max(1, shape[dim])))
        return _put(shape, dim, q // unit), _put(shape, dim, shape[dim] - q // unit)

    return unshard


def _join(target: str, sources: Sources, dim: int) -> Blocks:
    """The sources next to each other."""
    if any(len(source.shape) != 2 or source.shape[1 - dim] != sources[0].shape[1 - dim] for source in sources):
        said = ", ".join(str(list(source.shape)) for source in sources)
        raise fail(target, f"its sources have the shapes {said}, which cannot be put together")
    return blocks.join([blocks.whole(source.name, source.shape) for source in sources], dim)


def _whole(one: Blocks, tp: int) -> tuple[Share, ...]:
    return (Share(tuple(range(tp)), one.shape, blocks.pieces(one)),)


# Numbers.


def _number(target: str, source: Source, shape: Shape) -> Blocks:
    """A source of one element under another shape of one element."""
    if math.prod(source.shape) != 1:
        raise fail(target, f"its source {source.name!r} has the shape {list(source.shape)}, which is not one number")
    return Blocks(shape, (Block((0,) * len(shape), row_major(shape), source.name),))


def _numbers(parts: int) -> Rule:
    """A number for each part; a single one stands for all of them (``weight_loader_v2`` of fused layers)."""

    def cut(target: str, sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
        found = [_number(target, source, (1,)) for source in sources] * (parts // len(sources))
        return _whole(blocks.join(found, 0), tp)

    def unshard(_shape: Shape, sources: int, _dims: Dims, _tp: int) -> tuple[Shape, ...]:
        return ((),) * sources

    return Rule(cut, unshard, tuple(sorted({1, parts})))


def bare_scalar(target: str, sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
    """A number without dimensions."""
    (source,) = sources
    return _whole(_number(target, source, ()), tp)


def _constant(value: float, shape: Shape) -> Rule:
    def cut(_target: str, _sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
        return (Share(tuple(range(tp)), shape, (), value),)

    return Rule(cut, lambda _shape, _sources, _dims, _tp: (), (0,))


def _bare(_shape: Shape, _sources: int, _dims: Dims, _tp: int) -> tuple[Shape, ...]:
    return ((),)


# Experts.


def _local(one: Blocks, dims: Dims, tp: int) -> tuple[Share, ...]:
    """All experts on every rank; with expert parallel, each rank's own."""
    if not dims.expert_parallel:
        return _whole(one, tp)
    shares = []
    for r in range(tp):
        mine = local_experts(dims.experts, tp, r)
        if mine:
            held = blocks.narrow(one, 0, mine.start, len(mine))
            shares.append(Share((r,), held.shape, blocks.pieces(held)))
    return tuple(shares)


def experts_scalar(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """A number for each expert."""
    (source,) = sources
    return _local(blocks.stack(_number(target, source, ()), len(source.numbers)), dims, tp)


def experts_two_scalars(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """For each expert the numbers of gate and up."""
    columns = [blocks.stack(_number(target, source, (1,)), len(source.numbers)) for source in sources]
    return _local(blocks.join(columns, 1), dims, tp)


def _refined(factor: int, dim: int) -> Rule:
    """Scales of an expert's blocks as those of ``factor`` times smaller ones, cut along a dimension of the matrix.

    ``weight_loader`` of the engine repeats each entry along both dimensions, then cuts.
    """

    def cut(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
        for source in sources:
            if len(source.shape) != 2 or not source.numbers or source.shape != sources[0].shape:
                raise fail(
                    target, f"its source {source.name!r} has the shape {list(source.shape)}, not that of the rest"
                )
        fine = [n * factor for n in sources[0].shape]
        ranks = 1 if dims.expert_parallel else tp
        mine = divide(target, "the finer blocks of the experts", fine[dim], ranks)
        shares = []
        for r in range(tp):
            numbers = local_experts(dims.experts, tp, r) if dims.expert_parallel else range(dims.experts)
            if not numbers:
                continue
            ranges = [range(size) for size in fine]
            ranges[dim] = range(r % ranks * mine, (r % ranks + 1) * mine)
            shape = (len(numbers), len(ranges[0]) * len(sources), len(ranges[1]))
            pieces: list[Series] = []
            for i, source in enumerate(sources):
                to = row_major(shape).narrow(0, 0, 1).narrow(1, i * len(ranges[0]), len(ranges[0]))
                pieces += (
                    Series(piece, tuple(numbers), shape[1] * shape[2])
                    for piece in _repeated(to, source, ranges, factor)
                )
            shares.append(Share((r,), shape, tuple(pieces)))
        return tuple(shares)

    def unshard(shape: Shape, sources: int, _dims: Dims, tp: int) -> tuple[Shape, ...]:
        rows, columns = (n * (tp if i == dim else 1) for i, n in enumerate(shape[1:]))
        return ((rows // factor // sources, columns // factor),) * sources

    return Rule(cut, unshard, (2,) if dim == 0 else (1,), dim=-2 + dim)


def _repeated(to: Window, source: Source, ranges: Sequence[range], factor: int) -> Iterator[Piece]:
    """Some rows and columns of a matrix whose entries are repeated, onto ``to``, which is ``[1, rows, columns]``."""
    full = row_major(source.shape)
    for at, i, n, each in _runs(ranges[0], factor):
        for at2, j, m, each2 in _runs(ranges[1], factor):
            dst = to.narrow(1, at, n * each).narrow(2, at2, m * each2).reshape(n, each, m, each2)
            src = full.narrow(0, i, n).narrow(1, j, m)
            yield Piece(
                dst, Window(src.offset, (n, each, m, each2), (src.strides[0], 0, src.strides[1], 0)), source.name
            )


def _runs(indices: range, factor: int) -> Iterator[tuple[int, int, int, int]]:
    """A range of repeated indices as (first place, first source index, how many of these, how often each)."""
    at, stop = indices.start, indices.stop
    while at < stop:
        entry, skipped = divmod(at, factor)
        whole = (stop - at) // factor
        n, each = (whole, factor) if not skipped and whole else (1, min(factor - skipped, stop - at))
        yield at - indices.start, entry, n, each
        at += n * each


# mxfp4 experts.


def _size(dims: Dims, key: str) -> int:
    value = dims.config.get(key)
    return value if type(value) is int else 0


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def mx_sizes(dims: Dims) -> tuple[int, int]:
    """The hidden and the intermediate size of the experts."""
    return _size(dims, "hidden_size"), _size(dims, "intermediate_size")


def mx_rounded(dims: Dims, tp: int) -> tuple[int, int]:
    """The hidden size and a rank's intermediate size as the backend rounds them."""
    hidden, inter = mx_sizes(dims)
    by_hidden, by_inter = MX_BACKENDS[dims.config["moe_backend"]]
    return _up(hidden, by_hidden), _up(inter if dims.expert_parallel else inter // tp, by_inter)


def _mx(per: int, pairs: bool, last: bool, once: bool = False) -> Rule:
    """A tensor of the experts, its entries ``per`` elements each along the last dimension (0: a bias).

    ``pairs``: gates and ups that alternate are cut; else the inputs are. ``last``: the source has another dimension of
    16 bytes. ``once``: rank 0 alone has it.
    """

    def full(dims: Dims) -> Shape:
        hidden, inter = mx_sizes(dims)
        first, second = (2 * inter, hidden) if pairs else (hidden, inter)
        return (dims.experts, first) if not per else (dims.experts, first, second // per)

    def stored(dims: Dims) -> Shape:
        shape = full(dims)
        return (*shape[:2], shape[2] * per // MX, MX // per) if last else shape

    def cut(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
        (source,) = sources
        hidden, inter = mx_sizes(dims)
        if source.shape != stored(dims):
            raise fail(
                target,
                f"its source has the shape {list(source.shape)}, but {dims.experts} experts, hidden_size {hidden} and "
                f"intermediate_size {inter} in config.json make {list(stored(dims))}",
            )
        to_hidden, to_inter = mx_rounded(dims, tp)
        each = inter if dims.expert_parallel else -(-(inter // MX) // tp) * MX
        if each > to_inter:
            raise fail(
                target,
                f"a rank of --tp {tp} gets {each} of {inter} intermediate elements in blocks of {MX}, but the backend "
                f"{dims.config['moe_backend']!r} has room for {to_inter}; the engine fails too, use another one",
            )
        one = blocks.whole(source.name, full(dims))
        shares = []
        for r in range(tp):
            part, count = one, dims.experts
            start, n = min(r * each, inter), min(each, inter - min(r * each, inter))
            if dims.expert_parallel:
                mine = local_experts(dims.experts, tp, r)
                part, count = blocks.narrow(one, 0, mine.start, len(mine)), len(mine)
            elif pairs:
                part = blocks.narrow(one, 1, 2 * start, 2 * n)
            elif per:
                part = blocks.narrow(one, 2, start // per, n // per)
            elif once and r:
                part = Blocks(one.shape, ())
            first, second = (2 * to_inter, to_hidden) if pairs else (to_hidden, to_inter)
            shape = (count, first) if not per else (count, first, second // per)
            pieces = blocks.pieces(Blocks(shape, tuple(b for b in part.blocks if b.window.size)))
            shares.append(Share((r,), shape, pieces, None if part.shape == shape and pieces else 0.0))
        return tuple(shares)

    return Rule(cut, lambda _shape, _sources, dims, _tp: (stored(dims),))


def _put(values: Shape, i: int, value: int) -> Shape:
    return (*values[:i], value, *values[i + 1 :])


RULES: dict[str, Rule] = {
    "bare_scalar": Rule(bare_scalar, _bare),
    "experts_scalar": Rule(experts_scalar, _bare),
    "experts_two_scalars": Rule(experts_two_scalars, lambda _shape, _sources, _dims, _tp: ((), ()), (2,)),
    "gate_up_across": Rule(gate_up_across, _gate_up_shapes, (1, 2), dim=1, parts=2),
    "joined_across": Rule(joined_across, _latent_shapes(1), (1, 2), dim=1),
    "minus_one": _constant(-1.0, ()),
    "mx_down": _mx(2, False, True),
    "mx_down_bias": _mx(0, False, False, once=True),
    "mx_down_scale": _mx(MX, False, False),
    "mx_gate_up": _mx(2, True, True),
    "mx_gate_up_bias": _mx(0, True, False),
    "mx_gate_up_scale": _mx(MX, True, False),
    "one": _constant(1.0, (1,)),
    "one_scalar": _numbers(1),
    "qkv_across": Rule(_qkv(1), _qkv_shapes(1), (1, 3), dim=1),
    "qkv_units": Rule(_qkv(0), _qkv_shapes(0), (1, 3)),
    "stacked": Rule(stacked, _latent_shapes(0), (1, 2)),
    "three_scalars": _numbers(3),
    "two_scalars": _numbers(2),
    "zero": _constant(0.0, (1,)),
    **{f"gate_up_refined_{factor}": _refined(factor, 0) for factor in REFINED},
    **{f"down_refined_{factor}": _refined(factor, 1) for factor in REFINED},
}
