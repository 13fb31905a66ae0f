"""From mosaics to steps: which ranges to read, where each element goes, and how much memory it takes. Pure.

A *group* is one tensor as every destination wants it (the same norm on eight ranks; the same projection, cut in
eight). A *step* is the same band of rows of a whole group: what its targets share is read once, in long ranges, and
sliced in memory::

    Step                 one block of memory: tiles first, then scratch
    ├── Tile                 a range of elements of one target
    └── Read                 a range of bytes of one object
        └── Copy                 elements of the read -> elements of a tile (strided, perhaps cast)

A read whose bytes are a tile's bytes goes straight into it and takes no scratch. Small neighbouring groups share a
step, so that they share reads. A step whose reads cannot all be held at once is *serial*: its reads take turns in
one scratch buffer. Bands follow each other in the source as in the target, so each source byte is read once; only a
transposed tensor that does not fit into the limit is read again for each of its bands.

Blocks start on a page. What is large lies as far behind a page in its block as it does in its file: a tile as in the
file that it goes to if its sink writes from there, else as in the file that it comes from; a read as in its object. So
stores can move it past the page cache. Where memory is short that is given up first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from shardtool.dtypes import DType
from shardtool.errors import BudgetTooSmall, PlanError
from shardtool.header import PAGE
from shardtool.plan import Piece, Stored, Tensor
from shardtool.window import Window, aligned, flat, join

FLOOR = 64 << 10
"""Bytes below which neither a tile nor a read is made smaller."""
ALIGN = 64
"""Tiles and scratch start on multiples of this in a step's block, where they do not lie as in a file."""
LARGE = 4
"""Floors from which on tiles and reads lie as in a file. Stores copy smaller ones."""
GAP = 128 << 10
"""Bytes between two runs of one window that are read over rather than skipped."""


@dataclass(frozen=True)
class Target:
    """A tensor that some sink wants filled. ``pieces`` cite stored bytes.

    ``staging``: bytes of the step's block that the sink needs per byte of tile (0: it lends the memory itself).
    ``offset``: where the tensor starts in the sink. ``paged``: whether the sink's store writes from the tile's memory,
    so that tiles shall lie there as they do in the sink's file.
    """

    tensor: Tensor
    pieces: tuple[Piece, ...]
    sink: Any
    offset: int
    staging: int = 1
    paged: bool = False

    def within(self, first: int, count: int) -> Sequence[Piece]:
        """The pieces that may land on elements [first, first + count). Stacked experts have a thousand pieces."""
        if count == self.tensor.size:
            return self.pieces
        starts, reach, pieces = self._by_place
        return pieces[bisect_right(reach, first) : bisect_left(starts, first + count)]

    @cached_property
    def _by_place(self) -> tuple[list[int], list[int], list[Piece]]:
        """The first elements of all pieces in order, how far the pieces up to each one reach, and the pieces."""
        placed = sorted(((*piece.dst.bounds, i) for i, piece in enumerate(self.pieces)))
        reach = list(accumulate((end for _, end, _ in placed), max))
        return [start for start, _, _ in placed], reach, [self.pieces[i] for _, _, i in placed]


@dataclass(slots=True)
class Tile:
    """``nbytes`` of a target from ``offset`` of its sink.

    ``fill`` goes under its pieces, which need not cover it then.
    """

    target: Target
    offset: int
    nbytes: int
    place: int  # in the step's block
    fill: float | None


@dataclass(slots=True)
class Copy:
    """Elements of a read (``src``, from byte ``base`` of it) to elements of a tile (``dst``, from its start)."""

    tile: Tile
    dst: Window
    src: Window
    base: int
    dtype: DType


@dataclass(slots=True)
class Read:
    """Bytes [start, start + nbytes) of an object.

    ``place`` is in the block; None: straight into the one copy's tile.
    """

    key: str
    start: int
    nbytes: int
    copies: list[Copy]
    place: int | None = None


@dataclass(slots=True)
class Step:
    """Work that shares a block of ``cost`` bytes. The reads of a ``serial`` step take turns in one scratch buffer."""

    tiles: list[Tile] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    cost: int = 0
    serial: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles."""
        return sum(tile.nbytes for tile in self.tiles)


def least(groups: Iterable[Sequence[Target]], tile: int | None = None) -> int:
    """The smallest block in which every group can be done.

    ``tile``: bytes of every tile, if a sink needs a certain size.
    """
    need = 0
    for group in groups:
        tiles = sum(_up(min(tile or FLOOR, t.tensor.nbytes)) * t.staging for t in group)
        need = max(need, tiles + FLOOR + ALIGN)
    return need


def steps(
    groups: Iterable[Sequence[Target]], *, limit: int, want: int, longest: int, tile: int | None = None
) -> Iterator[Step]:
    """The steps that fill every target of every group, in order.

    ``limit``: bytes that one step's block may have; ``want``: bytes that it should have; ``longest``: bytes of one
    read; ``tile``: bytes of every tile, if a sink needs a certain size.
    """
    want = min(want, limit)
    batch: list[Sequence[Target]] = []
    weight = 0
    for every in groups:
        group = [target for target in every if target.tensor.size]
        cost = _whole_cost(group)
        if batch and weight + cost > want:
            yield from _batch(batch, limit, want, longest, tile)
            batch, weight = [], 0
        if group:
            batch.append(group)
            weight += cost
    if batch:
        yield from _batch(batch, limit, want, longest, tile)


def straight(target: Target, *, want: int, longest: int, tile: int) -> Iterator[Step]:
    """The steps of a target that is a stored run of bytes as it lies: what ``steps`` makes of it, for a tenth."""
    (piece,) = target.pieces
    stored = piece.source
    assert isinstance(stored, Stored)
    assert stored.dtype.itemsize == 1
    end = stored.offset + target.tensor.nbytes
    for start in range(stored.offset, end, tile):
        count = min(tile, end - start)
        place = cost = 0
        if target.staging:
            place = start % PAGE if _large(count) else 0
            if _up(place + _up(count) * target.staging) > want:
                place = 0
            cost = _up(place + _up(count) * target.staging)
        made = Tile(target, target.offset + start - stored.offset, count, place, None)
        reads = []
        for at in range(start, start + count, longest):
            nbytes = min(longest, start + count - at)
            dst, src = flat(at - start, nbytes), flat(at - stored.offset, nbytes)
            reads.append(Read(stored.key, at, nbytes, [Copy(made, dst, src, stored.offset - at, stored.dtype)]))
        yield Step([made], reads, cost)


def _up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def _whole_cost(group: Sequence[Target]) -> int:
    """About what it takes to do a group in one step: its tiles and as much again for its reads."""
    pages = 2 * PAGE * sum(_large(t.tensor.nbytes) for t in group)
    return sum(_up(t.tensor.nbytes) * (t.staging + 1) for t in group) + pages


def _large(nbytes: int) -> bool:
    return nbytes >= LARGE * FLOOR


def _batch(batch: list[Sequence[Target]], limit: int, want: int, longest: int, tile: int | None) -> Iterator[Step]:
    ranges = [(t, 0, t.tensor.size) for group in batch for t in group]
    if tile is None or all(t.tensor.nbytes <= tile for t, _, _ in ranges):
        step = _step(ranges, longest)
        if step.cost <= want:
            yield step
            return
    if len(batch) > 1:
        for group in batch:
            yield from _batch([group], limit, want, longest, tile)
        return
    (group,) = batch
    yield from _bands(group, limit, want, longest, tile)


def _bands(group: Sequence[Target], limit: int, want: int, longest: int, tile: int | None) -> Iterator[Step]:
    """The steps of one group that is too big for one."""
    turned = any(_turned(p) for t in group for p in t.pieces)
    most = limit if turned else want
    if turned and tile is None:
        step = _fitting([(t, 0, t.tensor.size) for t in group], longest, limit)
        if step.cost <= limit:
            yield step
            return
    size = tile or _share(group, limit // 2 if turned else want, turned)
    done = [0] * len(group)
    while any(n < t.tensor.size for n, t in zip(done, group, strict=True)):
        ranges = [
            (t, n, count) for n, t in zip(done, group, strict=True) if (count := _count(t, n, size, tile is not None))
        ]
        smaller = tile is None and not turned and size > FLOOR
        step = _step(ranges, longest) if smaller else _fitting(ranges, longest, most)
        if step.cost > most:
            if smaller:
                size = max(FLOOR, min(size * 7 // 8, size * want // step.cost) // ALIGN * ALIGN)
                continue
            scratch = limit - sum(_up(c * t.tensor.dtype.itemsize) * t.staging for t, _, c in ranges)
            if scratch < FLOOR + ALIGN:
                needed = least([group], tile)
                raise BudgetTooSmall(
                    f"tensor {group[0].tensor.name!r} needs {needed} bytes of memory and has {limit}", needed=needed
                )
            step = _step(ranges, longest, scratch=scratch // ALIGN * ALIGN)
        yield step
        for i, t in enumerate(group):
            done[i] += _count(t, done[i], size, tile is not None)


def _share(group: Sequence[Target], most: int, turned: bool) -> int:
    """Bytes of each tile of a group if all of them and their reads shall fit into ``most``."""
    share = most // (sum(t.staging + (not turned) for t in group) or 1)
    if _large(share - PAGE):
        share -= PAGE
    return max(FLOOR, share // ALIGN * ALIGN)


def _fitting(ranges: Sequence[tuple[Target, int, int]], longest: int, most: int) -> Step:
    """A step of at most ``most`` bytes, if there is one: rather without regard to pages than not at all."""
    step = _step(ranges, longest)
    return step if step.cost <= most else _step(ranges, longest, paged=False)


def _count(target: Target, done: int, size: int, exact: bool) -> int:
    """Elements of the next tile of at most ``size`` bytes: whole rows, if it need not be exact."""
    most = max(1, size // target.tensor.dtype.itemsize)
    if not exact:
        most = aligned(target.tensor.shape, most)
    return min(most, target.tensor.size - done)


def _turned(piece: Piece) -> bool:
    """Whether the source runs in another direction than the target, so that bands of one are not bands of the other."""
    order = sorted(zip(piece.dst.strides, piece.src.strides, piece.dst.shape, strict=True), reverse=True)
    strides = [s for _, s, n in order if n > 1 and s]
    return any(a < b for a, b in pairwise(strides))


def _step(
    ranges: Sequence[tuple[Target, int, int]], longest: int, *, scratch: int | None = None, paged: bool = True
) -> Step:
    """One step that fills these (target, first element, count).

    ``scratch``: bytes in which its reads take turns; pages are of no regard then. ``paged``: whether they are else.
    """
    step = Step(serial=scratch is not None)
    wanted: dict[str, list[tuple[int, int, Copy]]] = {}
    for target, first, count in ranges:
        tensor = target.tensor
        item = tensor.dtype.itemsize
        tile = Tile(target, target.offset + first * item, count * item, 0, tensor.fill)
        step.tiles.append(tile)
        filled = 0
        for piece in target.within(first, count):
            for dst, src in _cut(piece, first, count, tensor.size):
                filled += dst.size
                stored = piece.source
                assert isinstance(stored, Stored)
                for part_dst, part_src in _runs(dst, src, stored.dtype.itemsize):
                    lo, hi = part_src.bounds
                    start = stored.offset + lo * stored.dtype.itemsize
                    copy = Copy(tile, part_dst, part_src, stored.offset, stored.dtype)
                    wanted.setdefault(stored.key, []).append((start, stored.offset + hi * stored.dtype.itemsize, copy))
        if filled < count and tensor.fill is None:
            raise PlanError(f"tensor {tensor.name!r}: {count - filled} of its elements come from nowhere")
    biggest = min(longest, scratch - ALIGN) if scratch is not None else longest  # less what a read is moved by
    for key, asks in wanted.items():
        step.reads.extend(_reads(key, asks, biggest))
    _place(step, paged=paged and not step.serial)
    return step


def _place(step: Step, *, paged: bool) -> None:
    """Give tiles and reads their places in the step's block, and the block its size."""
    straight = [_straight(read) for read in step.reads]
    starts: dict[int, int] = {}  # where a tile would start in the object that fills it
    for read, one in zip(step.reads, straight, strict=True):
        if one:
            (copy,) = read.copies
            starts.setdefault(id(copy.tile), read.start - copy.dst.offset * copy.dtype.itemsize)
    end = 0
    for tile in step.tiles:
        target = tile.target
        if not target.staging:
            continue
        start = tile.offset if target.paged else starts.get(id(tile), 0)
        if paged and _large(tile.nbytes) and start % target.tensor.dtype.itemsize == 0:
            tile.place = _behind(end, start)
        else:
            tile.place = _up(end)
        end = tile.place + _up(tile.nbytes) * target.staging
    end = scratch = _up(end)
    for read, one in zip(step.reads, straight, strict=True):
        if one:
            continue
        first = scratch if step.serial else _up(end)
        # Elements are as aligned in memory as they are in the file.
        read.place = _behind(first, read.start) if paged and _large(read.nbytes) else first + read.start % ALIGN
        end = max(end, _up(read.place + read.nbytes))
    step.cost = end


def _behind(place: int, start: int) -> int:
    """The first place from ``place`` on that lies as far behind a page as ``start`` does."""
    return place + (start - place) % PAGE


def _cut(piece: Piece, first: int, count: int, size: int) -> Iterable[tuple[Window, Window]]:
    """The part of a piece that lands on elements [first, first + count), its target window counted from ``first``."""
    if count == size:
        return ((piece.dst, piece.src),) if piece.dst.size else ()
    band = flat(first, count)
    return ((dst.moved(-first), src) for src, dst in join(piece.dst, piece.src, band, band))


def _runs(dst: Window, src: Window, item: int) -> Iterator[tuple[Window, Window]]:
    """The pair itself, or its rows where more than ``GAP`` bytes lie between them that it does not want."""
    for dim, (n, s) in enumerate(zip(src.shape, src.strides, strict=True)):
        inner = [i for i in range(len(src.shape)) if i != dim]
        extent = 1 + sum((src.shape[i] - 1) * src.strides[i] for i in inner)
        if n > 1 and (s - extent) * item > GAP:
            for i in range(n):
                yield from _runs(dst.narrow(dim, i, 1), src.narrow(dim, i, 1), item)
            return
    yield dst, src


def _reads(key: str, asks: list[tuple[int, int, Copy]], longest: int) -> Iterator[Read]:
    """Ranges that touch or overlap become one, unless dividing it could cut an element; long ones are divided."""
    asks.sort(key=lambda ask: ask[:2])
    at = 0
    while at < len(asks):
        lo, hi = asks[at][:2]
        last = at + 1
        while last < len(asks) and asks[last][0] <= hi and not (asks[last][2].base - lo) % asks[last][2].dtype.itemsize:
            hi = max(hi, asks[last][1])
            last += 1
        yield from _divided(key, lo, hi, asks[at:last], longest)
        at = last


def _divided(key: str, lo: int, hi: int, asks: list[tuple[int, int, Copy]], longest: int) -> Iterator[Read]:
    if hi - lo <= longest:
        yield Read(key, lo, hi - lo, [_based(copy, lo) for _, _, copy in asks])
        return
    widest = max(copy.dtype.itemsize for _, _, copy in asks)
    stride = longest - longest % widest
    for start in range(lo, hi, stride):
        end = min(hi, start + stride)
        copies = []
        for a, b, copy in asks:
            if b <= start or a >= end:
                continue
            if start <= a and b <= end:
                copies.append(_based(copy, start))
                continue
            item = copy.dtype.itemsize
            first = -((copy.base - start) // item) if copy.base < start else 0
            past = (end - copy.base) // item
            band = flat(first, past - first)
            for dst, src in join(copy.src, copy.dst, band, band):
                copies.append(_based(Copy(copy.tile, dst, src, copy.base, copy.dtype), start))
        if copies:
            yield Read(key, start, end - start, copies)


def _based(copy: Copy, start: int) -> Copy:
    """The copy with its base counted from the start of a read."""
    return Copy(copy.tile, copy.dst, copy.src, copy.base - start, copy.dtype)


def _straight(read: Read) -> bool:
    """Whether the read's bytes are, in order, bytes of one tile."""
    if len(read.copies) != 1:
        return False
    (copy,) = read.copies
    same = copy.dtype is copy.tile.target.tensor.dtype
    return same and copy.dst.contiguous and copy.src.contiguous and copy.src.size * copy.dtype.itemsize == read.nbytes
