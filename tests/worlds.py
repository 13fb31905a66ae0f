"""A world of files and ranks, for laws about schedules and the engine: what is wanted, and a suspicious interpreter.

::

    World           stored tensors in files, and the memory of ranks
    ├── wanted          a target's bytes, by the letter of its pieces
    ├── run             executes steps: memory is poisoned, reads that may overlap in time are all held at once
    └── check           every target has its bytes, and nothing but its sources was read
    ruled, chance   groups of targets: cut as engines cut them, or as nobody would
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from shardtool.cast import cast_into
from shardtool.dtypes import FLOATS, DType
from shardtool.layouts.rules import RULES, Dims, Source
from shardtool.mosaic import resolve
from shardtool.plan import Stored, Tensor, whole
from shardtool.recipe import Share
from shardtool.schedule import Copy, Step, Target
from tests.strategies import Array, Draw, addresses, dtypes, mosaics, shapes

POISON = 0xA5
START = 11
"""Where the first tensor of a rank lies in its sink."""


@dataclass
class World:
    """Stored tensors in files, and the memory of ranks; what is read of each file is counted."""

    files: dict[str, bytearray] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    ranks: list[bytearray] = field(default_factory=list)
    counts: dict[str, Array] = field(default_factory=dict)

    def store(self, name: str, dtype: DType, shape: tuple[int, ...], key: str = "f", lead: int = 0) -> Stored:
        """Put a tensor of chance bytes behind what the file holds; ``lead`` bytes before the first."""
        data = self.files.setdefault(key, bytearray(lead))
        made = self.stored[name] = Stored(key, dtype, shape, len(data))
        values = np.random.default_rng(len(self.stored)).integers(0, 256, made.nbytes, np.uint8)
        if dtype in FLOATS:  # of these, numbers that are numbers, so that casts can be compared by their bits
            number = np.random.default_rng(len(self.stored)).normal(size=math.prod(shape)).astype(np.float32)
            values = _cast(number, DType.F32, dtype).view(np.uint8)
        data += values.tobytes()
        return made

    def target(self, tensor: Tensor, rank: int, staging: int = 1, *, paged: bool = False) -> Target:
        """The tensor behind what the rank holds; if it is ``paged``, where its elements are aligned."""
        while len(self.ranks) <= rank:
            self.ranks.append(bytearray([POISON] * START))
        if paged:
            self.ranks[rank] += bytes([POISON]) * (-len(self.ranks[rank]) % tensor.dtype.itemsize)
        offset = len(self.ranks[rank])
        self.ranks[rank] += bytes([POISON]) * tensor.nbytes
        pieces = resolve(tensor, {name: whole(name, stored) for name, stored in self.stored.items()})
        return Target(tensor, pieces, rank, offset, staging, paged)

    def elements(self, stored: Stored) -> Array:
        """A stored tensor's elements in order."""
        data = self.files[stored.key][stored.offset : stored.offset + stored.nbytes]
        return np.frombuffer(bytes(data), stored.dtype.numpy)

    def wanted(self, target: Target) -> bytes:
        """A target's bytes, by the letter of its pieces."""
        tensor = target.tensor
        out = np.zeros(tensor.size, tensor.dtype.numpy)
        if tensor.fill:
            out[:] = _cast(np.full(tensor.size, tensor.fill, np.float32), DType.F32, tensor.dtype)
        for piece in target.pieces:
            assert isinstance(piece.source, Stored)
            values = self.elements(piece.source)[addresses(piece.src)]
            out[addresses(piece.dst)] = _cast(values, piece.source.dtype, tensor.dtype)
        return out.tobytes()

    def run(self, made: Iterable[Step], limit: int) -> list[Step]:
        """Execute steps."""
        self.counts = {key: np.zeros(len(data), np.int64) for key, data in self.files.items()}
        done = []
        for step in made:
            assert step.cost <= limit
            self._run(step)
            done.append(step)
        return done

    def _run(self, step: Step) -> None:
        block = bytearray([POISON]) * step.cost
        memory = memoryview(block)
        rooms: dict[int, memoryview] = {}
        taken: list[tuple[int, int]] = []
        for tile in step.tiles:
            if tile.target.staging:
                assert tile.place % tile.target.tensor.dtype.itemsize == 0
                taken.append((tile.place, tile.place + tile.nbytes * tile.target.staging))
                rooms[id(tile)] = memory[tile.place : tile.place + tile.nbytes]
            else:
                rooms[id(tile)] = memoryview(self.ranks[tile.target.sink])[tile.offset : tile.offset + tile.nbytes]
            if tile.fill is not None:
                to = tile.target.tensor.dtype
                value = _cast(np.full(tile.nbytes // to.itemsize, tile.fill, np.float32), DType.F32, to)
                rooms[id(tile)][:] = value.tobytes()
        loaded = []
        for read in step.reads:
            data = self.files[read.key][read.start : read.start + read.nbytes]
            assert len(data) == read.nbytes > 0
            self.counts[read.key][read.start : read.start + read.nbytes] += 1
            if read.place is None:
                (copy,) = read.copies
                at = copy.dst.offset * copy.dtype.itemsize
                rooms[id(copy.tile)][at : at + read.nbytes] = data
                continue
            if not step.serial:
                taken.append((read.place, read.place + read.nbytes))
            room = memory[read.place : read.place + read.nbytes]
            room[:] = data
            if step.serial:
                self._scatter(read.copies, room, rooms)
                room[:] = bytes([POISON]) * read.nbytes
            else:
                loaded.append((read.copies, room))
        for copies, room in loaded:
            self._scatter(copies, room, rooms)
        taken.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(taken)), "memory is used for two things"
        assert all(b <= step.cost for _, b in taken)
        for tile in step.tiles:
            if tile.target.staging:
                self.ranks[tile.target.sink][tile.offset : tile.offset + tile.nbytes] = rooms[id(tile)]

    def _scatter(self, copies: Sequence[Copy], data: memoryview, rooms: dict[int, memoryview]) -> None:
        for copy in copies:
            to = copy.tile.target.tensor.dtype
            src = addresses(copy.src).reshape(-1) * copy.dtype.itemsize + copy.base
            octets = np.frombuffer(data, np.uint8)[src[:, None] + np.arange(copy.dtype.itemsize)]
            values = _cast(octets.reshape(-1).view(copy.dtype.numpy), copy.dtype, to)
            dst = addresses(copy.dst).reshape(-1) * to.itemsize
            room = np.frombuffer(rooms[id(copy.tile)], np.uint8)
            assert dst.min() >= 0
            assert src.min() >= 0
            room[dst[:, None] + np.arange(to.itemsize)] = values.view(np.uint8).reshape(-1, to.itemsize)

    def check(self, groups: Sequence[Sequence[Target]], done: Sequence[Step]) -> None:
        """Every target has its bytes, from tiles that follow each other; nothing but its sources' bytes was read."""
        targets = [t for group in groups for t in group if t.tensor.size]
        ends = {id(t): t.offset for t in targets}
        allowed = {key: np.zeros(len(data), bool) for key, data in self.files.items()}
        for target in targets:
            for piece in target.pieces:
                assert isinstance(piece.source, Stored)
                allowed[piece.source.key][piece.source.offset :][: piece.source.nbytes] = True
        for step in done:
            for tile in step.tiles:
                assert tile.offset == ends[id(tile.target)]
                ends[id(tile.target)] += tile.nbytes
        for target in targets:
            end = target.offset + target.tensor.nbytes
            assert ends[id(target)] == end
            assert bytes(self.ranks[target.sink][target.offset : end]) == self.wanted(target), target.tensor.name
        for key, counts in self.counts.items():
            assert not counts[~allowed[key]].any(), "bytes of a tensor that nobody asked for were read"
        assert all(bytes(rank[:START]) == bytes([POISON]) * START for rank in self.ranks)

    @property
    def most_read(self) -> int:
        """How often the byte was read that was read most."""
        return max(int(counts.max(initial=0)) for counts in self.counts.values())


def _cast(values: Array, of: DType, to: DType) -> Array:
    if of is to:
        return values
    if to not in FLOATS:
        return values.astype(to.numpy)
    out = np.empty(values.shape, to.numpy)
    cast_into(out, to, values, of)
    return out


# What the laws are tried on.

STORABLE = dtypes().filter(lambda dtype: dtype is not DType.C64)


def shared(name: str, dtype: DType, share: Share) -> Tensor:
    """The tensor that the ranks of a share hold."""
    return Tensor(name, dtype, share.shape, lambda: tuple(share.expanded()), share.fill)


@st.composite
def ruled(draw: Draw, world: World, rule: str, tp: int, only: int | None = None) -> list[Target]:
    """One tensor as each rank wants it (or one rank alone), cut as an engine cuts it."""
    width = draw(st.sampled_from([1, 3, 8, 61]))
    dims = Dims(heads=4, kv_heads=draw(st.sampled_from([1, 2, 4])), head_dim=draw(st.sampled_from([1, 5])), vocab=70)
    head, n = dims.head_dim, draw(st.sampled_from([4, 12, 64]))
    sizes: list[tuple[int, ...]] = {
        "copy": [draw(shapes(dims=3, smallest=0))],
        "column": [(n, width)],
        "gate_up": draw(st.sampled_from([[(n, width)] * 2, [(2 * n, width)]])),
        "row": [(width, n)],
        "qkv": [(4 * head, width), (dims.kv_heads * head, width), (dims.kv_heads * head, width)],
        "vocab": [(70, width)],
    }[rule]
    dtype = draw(STORABLE)
    to = draw(st.sampled_from(FLOATS)) if dtype in FLOATS and draw(st.booleans()) else dtype
    number = len(world.stored)
    names = [f"{rule}{number + i}" for i in range(len(sizes))]
    key, lead = draw(st.sampled_from("ab")), draw(st.integers(0, 70))
    for name, shape in zip(names, sizes, strict=True):
        world.store(name, dtype, shape, key, lead)
    staging = draw(st.sampled_from([0, 1, 1, 2]))
    paged = draw(st.booleans())
    shares = RULES[rule].cut(rule, [Source(name, world.stored[name].shape) for name in names], dims, tp)
    return [
        world.target(shared(names[0], to, share), rank, staging, paged=paged)
        for share in shares
        for rank in share.ranks
        if only in (None, rank)
    ]


@st.composite
def chance(draw: Draw, world: World) -> list[Target]:
    """Targets of several stored tensors, with any views, transposed ones too."""
    dtype = draw(STORABLE)
    held = {}
    for _ in range(draw(st.integers(1, 3))):
        name, shape = f"s{len(world.stored)}", draw(shapes(least=1, dims=3, most=9))
        world.store(name, dtype, shape, draw(st.sampled_from("ab")), draw(st.integers(0, 9)))
        held[name] = np.arange(math.prod(shape)).reshape(shape)
    found = []
    for rank in range(draw(st.integers(1, 3))):
        made = draw(mosaics(held, f"t{len(world.stored)}")).tensor
        tensor = Tensor(made.name, dtype, made.shape, made.pieces)
        found.append(world.target(tensor, rank, draw(st.sampled_from([0, 1, 2])), paged=draw(st.booleans())))
    return found
