"""The vocabulary of layout tables: how one target is cut from its sources, for every rank.

Each rule is two functions: ``cut`` makes the ranks' shares from the sources' shapes, and ``unshard`` tells those shapes
from a rank's shape, so that shards without a manifest can be read too. Sources: vLLM 0.32
``model_executor/layers/linear.py`` and ``vocab_parallel_embedding.py``.

========== ============================================================================= ==================
rule       rank r of tp holds                                                              engine's name
========== ============================================================================= ==================
copy       the whole source                                                                replicated
column     rows ``[r * N/tp, (r+1) * N/tp)``                                                 ColumnParallel
merged     such rows of each source (or of each equal part of one source), stacked           MergedColumn
row        columns ``[r * K/tp, (r+1) * K/tp)``                                              RowParallel
qkv        its query heads; its key and value heads, which ranks share where tp > kv heads    QKVParallel
grouped    the same, from one source of groups: query heads, a key and a value each                QKVParallel
vision_qkv such rows of each third of one source                                            QKVParallel
vocab      rows ``[r * P/tp, (r+1) * P/tp)`` of the vocabulary padded with zeros to P          VocabParallel
vocab_tp   the same, padded further where P cannot be divided                                 SGLang's
root       the square root of the hidden size                                              a constant of Gemma 2
scalar     one 1.0 of no source                                                             Attention scales
========== ============================================================================= ==================

``column_t``, ``qkv_t`` and ``row_t`` do the same with sources whose rows and columns are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardtool.errors import PlanError
from shardtool.plan import Piece
from shardtool.recipe import Share
from shardtool.window import Window, row_major, simplify

PAD = 64
"""Rows to a multiple of which the vocabulary is padded (``DEFAULT_VOCAB_PADDING_SIZE``)."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes that cutting needs, from config.json.

    ``experts``: how many there are, 0 for none; ``expert_parallel``: whether ranks hold whole ones. ``config``: all
    settings, as the table reads them.
    """

    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    expert_parallel: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """A source of a rule: its name (with the slots) and its shape.

    Where the name has the slot of the experts, ``numbers`` are theirs, and the shape is that of each. ``flipped``: the
    checkpoint holds it with rows and columns exchanged; the shape is the one without that.
    """

    name: str
    shape: Shape
    numbers: tuple[int, ...] = ()
    flipped: bool = False

    @property
    def window(self) -> Window:
        """The whole source."""
        return row_major(self.shape[::-1]).transpose(1, 0) if self.flipped else row_major(self.shape)

    def rows(self, start: int, count: int) -> Window:
        """A window on some rows."""
        return self.window.narrow(0, start, count)


Sources = Sequence[Source]


def fail(target: str, why: str) -> PlanError:
    """The error that a target cannot be cut so."""
    return PlanError(f"tensor {target!r}: {why}")


def divide(target: str, what: str, size: int, tp: int) -> int:
    """A size divided by the ranks. Raises ``PlanError`` where it does not divide."""
    if size % tp:
        raise fail(
            target, f"{what} {size} cannot be divided by --tp {tp}; the engine refuses it too, use a tp that divides it"
        )
    return size // tp


def _stacked(windows: Sequence[tuple[str, Window]], rest: Shape) -> tuple[Shape, tuple[Piece, ...]]:
    """Windows of rows one below the other: the target's shape and pieces. Rows may be those of groups of rows."""
    counts = [window.size // math.prod(rest) for _, window in windows]
    shape = (sum(counts), *rest)
    pieces, at = [], 0
    for (name, window), n in zip(windows, counts, strict=True):
        if n:
            to = row_major(shape).narrow(0, at, n)
            if to.shape != window.shape:
                to, window = simplify(to.reshape(*window.shape), window)
            pieces.append(Piece(to, window, name))
        at += n
    return shape, tuple(pieces)


def _same_width(target: str, sources: Sources) -> Shape:
    rest = sources[0].shape[1:]
    for source in sources:
        if not source.shape or source.shape[1:] != rest:
            raise fail(
                target,
                f"its sources have the shapes {', '.join(str(list(s.shape)) for s in sources)}, which cannot "
                f"be stacked",
            )
    return rest


def copy(target: str, sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
    """The whole source on every rank."""
    (source,) = sources
    window = row_major(source.shape)
    return (Share(tuple(range(tp)), source.shape, (Piece(window, window, source.name),)),)


def scalar(_target: str, _sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
    """A constant 1.0 without dimensions."""
    return (Share(tuple(range(tp)), (), (), 1.0),)


def root(target: str, _sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """The square root of ``hidden_size``, without dimensions (SGLang's ``models/gemma2.py``)."""
    hidden = dims.config.get("hidden_size")
    if type(hidden) is not int or hidden < 1:
        raise fail(target, f"config.json says hidden_size {hidden!r}, which is not a size")
    return (Share(tuple(range(tp)), (), (), math.sqrt(hidden)),)


def _merged(target: str, sources: Sources, tp: int, parts: int = 0) -> tuple[Share, ...]:
    """Each rank its rows of every source, stacked. One source stands for ``parts`` equal ones, stacked already."""
    rest = _same_width(target, sources)
    blocks: list[tuple[Source, int, int]] = []
    if len(sources) == 1 and parts > 1:
        (source,) = sources
        if source.shape[0] % parts:
            raise fail(target, f"{source.shape[0]} rows are not {parts} equal parts")
        n = source.shape[0] // parts
        blocks = [(source, i * n, n) for i in range(parts)]
    else:
        blocks = [(source, 0, source.shape[0]) for source in sources]
    shares = []
    for r in range(tp):
        windows = []
        for source, first, n in blocks:
            mine = divide(target, "its size", n, tp)
            windows.append((source.name, source.rows(first + r * mine, mine)))
        shares.append(Share((r,), *_stacked(windows, rest)))
    return tuple(shares)


def column(target: str, sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
    """Each rank its rows."""
    return _merged(target, sources, tp)


def gate_up(target: str, sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
    """Each rank its rows of gate and its rows of up, which the checkpoint may hold in one tensor already."""
    return _merged(target, sources, tp, 2)


def row(target: str, sources: Sources, _dims: Dims, tp: int) -> tuple[Share, ...]:
    """Each rank its columns."""
    (source,) = sources
    if len(source.shape) != 2:
        raise fail(target, f"its source has the shape {list(source.shape)}, not rows and columns")
    mine = divide(target, "its input size", source.shape[1], tp)
    shape = (source.shape[0], mine)
    full = source.window
    return tuple(
        Share((r,), shape, (Piece(row_major(shape), full.narrow(1, r * mine, mine), source.name),)) for r in range(tp)
    )


def qkv(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Each rank its heads: query, key, value.

    Where there are fewer kv heads than ranks, neighbours hold the same one.
    """
    rest = _same_width(target, sources)
    q_rows, kv_rows = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    if len(sources) == 1:
        blocks = [(sources[0], 0), (sources[0], q_rows), (sources[0], q_rows + kv_rows)]
        rows, expected = [sources[0].shape[0]], [q_rows + 2 * kv_rows]
    else:
        blocks = [(source, 0) for source in sources]
        rows, expected = [source.shape[0] for source in sources], [q_rows, kv_rows, kv_rows]
    if rows != expected:
        raise fail(
            target,
            f"its sources have {rows} rows, but {dims.heads} heads and {dims.kv_heads} kv heads of "
            f"{dims.head_dim} in config.json "
            f"make {expected}",
        )
    heads = divide(target, "the number of heads", dims.heads, tp)
    if tp > dims.kv_heads:
        if tp % dims.kv_heads:
            raise fail(
                target, f"--tp {tp} is not a multiple of its {dims.kv_heads} kv heads; the engine refuses it too"
            )
        kv, sharing = 1, tp // dims.kv_heads
    else:
        kv, sharing = divide(target, "the number of kv heads", dims.kv_heads, tp), 1
    shares = []
    for r in range(tp):
        counts = (heads * dims.head_dim, kv * dims.head_dim, kv * dims.head_dim)
        turns = (r, r // sharing, r // sharing)
        windows = [
            (source.name, source.rows(first + turn * n, n))
            for (source, first), n, turn in zip(blocks, counts, turns, strict=True)
        ]
        shares.append(Share((r,), *_stacked(windows, rest)))
    return tuple(shares)


def _heads_each(target: str, dims: Dims, tp: int) -> tuple[int, int, int]:
    """Query heads and kv heads of a rank, and how many neighbours share its kv heads."""
    heads = divide(target, "the number of heads", dims.heads, tp)
    if tp <= dims.kv_heads:
        return heads, divide(target, "the number of kv heads", dims.kv_heads, tp), 1
    if tp % dims.kv_heads:
        raise fail(target, f"--tp {tp} is not a multiple of its {dims.kv_heads} kv heads; the engine refuses it too")
    return heads, 1, tp // dims.kv_heads


def grouped(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """As ``qkv``, from one source that holds for each kv head its query heads, its key and its value.

    Falcon's and, with one query head each, BLOOM's and GPT-NeoX's (``models/falcon.py``, ``bloom.py``).
    """
    (source,) = sources
    rest, group = source.shape[1:], dims.heads // dims.kv_heads
    if not source.shape or source.shape[0] != dims.kv_heads * (group + 2) * dims.head_dim:
        raise fail(
            target,
            f"its source has the shape {list(source.shape)}, but {dims.kv_heads} groups of {group} heads, a key and a "
            f"value of {dims.head_dim} in config.json make {dims.kv_heads * (group + 2) * dims.head_dim} rows",
        )
    heads, kv, sharing = _heads_each(target, dims, tp)
    groups = source.window.reshape(dims.kv_heads, group + 2, dims.head_dim, *rest)
    shares = []
    for r in range(tp):
        mine = groups.narrow(0, r // sharing * kv, kv)
        q = mine.narrow(1, r * heads % group, min(heads, group))
        parts = [(source.name, q), *((source.name, mine.narrow(1, group + i, 1)) for i in range(2))]
        shares.append(Share((r,), *_stacked(parts, rest)))
    return tuple(shares)


def vision_qkv(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """As ``qkv`` for an encoder of images: one source of three equal parts, and as many kv heads as heads.

    ``models/qwen2_5_vl.py``.
    """
    vision = dims.config.get("vision_config")
    heads = vision.get("num_heads") if isinstance(vision, Mapping) else None
    if type(heads) is not int:
        raise fail(target, f"config.json says vision_config.num_heads {heads!r}, which is not a size")
    divide(target, "the number of heads of the vision encoder", heads, tp)
    return _merged(target, sources, tp, 3)


def padded_vocab(vocab: int) -> int:
    """The vocabulary's size with padding."""
    return -(-vocab // PAD) * PAD


def vocab(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """Each rank its rows of the padded vocabulary; padding is zeros, also at tp 1."""
    return _vocabulary(target, sources, dims, tp, padded_vocab(dims.vocab))


def vocab_tp(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
    """As ``vocab``, for any tp: where the padded vocabulary cannot be divided, it is padded to a multiple of PAD * tp.

    SGLang 0.5.23 ``layers/vocab_parallel_embedding.py``.
    """
    padded = padded_vocab(dims.vocab)
    return _vocabulary(
        target, sources, dims, tp, padded if padded % tp == 0 else -(-dims.vocab // (PAD * tp)) * PAD * tp
    )


def _vocabulary(target: str, sources: Sources, dims: Dims, tp: int, padded: int) -> tuple[Share, ...]:
    (source,) = sources
    if not source.shape or source.shape[0] != dims.vocab:
        raise fail(
            target, f"its source has the shape {list(source.shape)}, but config.json says vocab_size {dims.vocab}"
        )
    mine = divide(target, "the padded vocabulary", padded, tp)
    shape = (mine, *source.shape[1:])
    shares = []
    for r in range(tp):
        n = max(0, min(mine, dims.vocab - r * mine))
        pieces = (Piece(row_major(shape).narrow(0, 0, n), source.rows(r * mine, n), source.name),) if n else ()
        shares.append(Share((r,), shape, pieces, None if n == mine else 0.0))
    return tuple(shares)


def _same(shape: Shape, _sources: int, _dims: Dims, _tp: int) -> tuple[Shape, ...]:
    return (shape,)


def _nothing(_shape: Shape, _sources: int, _dims: Dims, _tp: int) -> tuple[Shape, ...]:
    return ()


def _all_rows(shape: Shape, _sources: int, _dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((shape[0] * tp, *shape[1:]),)


def _gate_and_up(shape: Shape, sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
    (both,) = _all_rows(shape, sources, dims, tp)
    return ((both[0] // 2, *both[1:]),) * 2 if sources == 2 else (both,)


def _all_columns(shape: Shape, _sources: int, _dims: Dims, tp: int) -> tuple[Shape, ...]:
    return ((shape[0], shape[1] * tp),)


def _heads(shape: Shape, sources: int, dims: Dims, _tp: int) -> tuple[Shape, ...]:
    rest, q, kv = shape[1:], dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    return ((q, *rest), (kv, *rest), (kv, *rest)) if sources == 3 else ((q + 2 * kv, *rest),)


def _groups(shape: Shape, _sources: int, dims: Dims, _tp: int) -> tuple[Shape, ...]:
    return (((dims.heads + 2 * dims.kv_heads) * dims.head_dim, *shape[1:]),)


def _unpadded(shape: Shape, _sources: int, dims: Dims, _tp: int) -> tuple[Shape, ...]:
    return ((dims.vocab, *shape[1:]),)


Cut = Callable[[str, Sources, Dims, int], tuple[Share, ...]]
"""(target, sources, dims, tp) -> the ranks' shares. Raises ``PlanError`` where the engine would refuse."""
Unshard = Callable[[Shape, int, Dims, int], tuple[Shape, ...]]
"""(the shape that each rank holds, number of sources, dims, tp) -> the sources' shapes."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A way of cutting, how its sources' shapes are told from a rank's, and how many sources it can have.

    ``dim``: the dimension of the sources that is cut. ``parts``: the equal parts of which a single source is made.
    """

    cut: Cut
    unshard: Unshard
    counts: tuple[int, ...] = (1,)
    dim: int = 0
    parts: int = 1


def transposed(rule: Rule) -> Rule:
    """A rule of sources whose rows and columns are exchanged (``models/gpt2.py``, ``_transpose_conv1d``)."""

    def cut(target: str, sources: Sources, dims: Dims, tp: int) -> tuple[Share, ...]:
        for source in sources:
            if len(source.shape) != 2:
                raise fail(target, f"its source has the shape {list(source.shape)}, not rows and columns")
        flipped = [Source(source.name, source.shape[::-1], source.numbers, flipped=True) for source in sources]
        return rule.cut(target, flipped, dims, tp)

    def unshard(shape: Shape, sources: int, dims: Dims, tp: int) -> tuple[Shape, ...]:
        return tuple(found[::-1] for found in rule.unshard(shape, sources, dims, tp))

    return Rule(cut, unshard, rule.counts, 1 - rule.dim, rule.parts)


_COLUMN = Rule(column, _all_rows)
_QKV = Rule(qkv, _heads, (1, 3))
_ROW = Rule(row, _all_columns, dim=1)

RULES: dict[str, Rule] = {
    "column": _COLUMN,
    "column_t": transposed(_COLUMN),
    "copy": Rule(copy, _same),
    "gate_up": Rule(gate_up, _gate_and_up, (1, 2), parts=2),
    "grouped": Rule(grouped, _groups),
    "qkv": _QKV,
    "qkv_t": transposed(_QKV),
    "root": Rule(root, _nothing, (0,)),
    "row": _ROW,
    "row_t": transposed(_ROW),
    "scalar": Rule(scalar, _nothing, (0,)),
    "vision_qkv": Rule(vision_qkv, _all_rows, parts=3),
    "vocab": Rule(vocab, _unpadded),
    "vocab_tp": Rule(vocab_tp, _unpadded),
}
