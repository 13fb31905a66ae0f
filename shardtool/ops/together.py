"""Ranks of one node that bring their slices together: what several of them want is read once and exchanged.

::

    alone       tensors of which every rank takes other bytes (rows of its own): each reads its own, as without others
    together    norms, replicated heads, rows that are cut too short to be read apart
        ├── every rank plans the same steps, for all ranks, and numbers the ranges that several of them want
        ├── each range has an owner, who reads it; it comes to the others over the exchange     Shared, a store
        └── each rank cuts its own tensors out of it

What is together comes last, so that a rank that fails before its last byte is heard by the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

from shardtool import schedule
from shardtool.budget import Stopped
from shardtool.dtypes import DType
from shardtool.engine import Clock
from shardtool.errors import UsageError
from shardtool.exchange import Exchange
from shardtool.ops.bring import Bundle, Job, Memory, Sinks, Slice, Slices, bring, bundles, memory_for, slice_of, steps
from shardtool.ops.stream import Fresh
from shardtool.plan import Tensor
from shardtool.recipe import Recipe, Rule
from shardtool.schedule import Copy, Read, Step, Target, Tile
from shardtool.stores.base import Store, Wrapper
from shardtool.window import Window

if TYPE_CHECKING:
    import torch

PREFIX = ".shardtool/shared/"
GRACE = 10.0
"""Seconds that a rank which stops waits at most for what it is sharing at that moment."""
Range = tuple[str, int, int]
"""Bytes of an object: key, start, number."""


def place(number: int) -> str:
    """The key under which a shared range is asked for."""
    return f"{PREFIX}{number}"


class Shared(Wrapper):
    """A store some of whose ranges are read by one rank, and come to all over an exchange.

    Those ranges have keys of their own (``place``). Each must be asked for on every rank, in their order, and whoever
    asks waits until its turn has come: one thread shares them.
    """

    def __init__(self, inner: Store, exchange: Exchange, ranges: Sequence[Range]) -> None:
        super().__init__(inner)
        self._exchange = exchange
        self._owners = exchange.owners([size for _, _, size in ranges], [f"{key} {at}" for key, at, _ in ranges])
        self._keys = {place(number): (number, key) for number, (key, _, _) in enumerate(ranges)}
        self._there: dict[int, memoryview] = {}
        self._shared = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="shardtool-exchange", daemon=True)

    def start(self) -> None:
        """Begin to share."""
        self._thread.start()

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Bytes of the store, or of whoever reads them for all. Raises what another rank failed with."""
        number, real = self._keys.get(key, (None, key))
        if number is None or self._owners[number] == self._exchange.rank:
            try:
                self.inner.readinto(real, start, view)
            except BaseException as error:
                self.fail(error)
                raise
        if number is None:
            return
        with self._changed:
            self._there[number] = view
            self._changed.notify_all()
            while self._shared <= number and self._error is None and not self._stopped:
                self._changed.wait()
            if self._shared <= number:
                raise self._error or Stopped

    def _run(self) -> None:
        import torch

        try:
            with self._exchange as exchange:
                for number in range(len(self._owners)):
                    with self._changed:
                        while number not in self._there and self._error is None:
                            self._changed.wait()
                        if self._error is not None:
                            raise self._error
                        view = self._there.pop(number)
                    exchange.share(number, torch.frombuffer(view, dtype=torch.uint8))
                    with self._changed:
                        self._shared = number + 1
                        self._changed.notify_all()
        except BaseException as error:
            self.fail(error)

    def stop(self) -> None:
        """Wake whoever waits here: what was wanted is wanted no more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """This rank goes no further: the other ranks are told why."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait for the end of what is being shared."""
        self._thread.join(GRACE)


@dataclass(frozen=True, slots=True)
class _Group:
    """One tensor as several ranks want it, by rank."""

    first: tuple[str, int]
    slices: dict[int, Slice]


def together(
    found: Slices,
    exchange: Exchange,
    *,
    device: str = "cpu",
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """``Slices.tensors`` for ranks that share an exchange: all of them call it, each for a rank of its own.

    What at least two of them want is read once. The exchange ends with it. A rank that fails, or that takes no more
    tensors, ends the others with its reason.
    """
    places = Fresh(device)
    if exchange.size == 1:
        memory = memory_for(found, places, memory_limit, concurrency)
        made = list(bundles(found.slices, memory.run))
        return bring(found, Job(made, partial(steps, made, memory), found.store), places, memory, progress, clock)
    sizes = f"{found.parallel} {found.layout}"
    said = [one.partition(" ") for one in exchange.told(f"{found.rank} {sizes}")]
    if {rest for _, _, rest in said} != {sizes}:
        raise UsageError(f"the ranks of one exchange are cut alike: {', '.join(sorted({rest for *_, rest in said}))}")
    members = [int(rank) for rank, _, _ in said]
    if len(set(members)) < len(members):
        raise UsageError(f"two processes of one exchange take the same rank: they said {sorted(members)}")
    groups = _groups(found, members)
    names = {part.tensor.name for group in groups for part in group.slices.values()}
    staging = 0 if places.device.type == "cpu" else 1
    everybody = [
        [Target(part.tensor, part.pieces, None, 0, staging) for part in group.slices.values()] for group in groups
    ]
    memory = _agreed(exchange, memory_for(found, places, memory_limit, concurrency, everybody))
    alone = list(bundles([part for part in found.slices if part.tensor.name not in names], memory.run))
    mine = list(bundles([group.slices[found.rank] for group in groups if found.rank in group.slices], memory.run))
    planned = _Planned(found.rank, groups, mine, memory)
    shared = Shared(found.store, exchange, [one for step in planned.steps({}, 0) for one in planned.ranges(step)])

    def all_steps(sinks: Sinks) -> Iterator[Step]:
        return chain(steps(alone, memory, sinks), planned.own(sinks, len(alone)))

    job = Job([*alone, *mine], all_steps, shared, shared.stop)
    return _sharing(shared, bring(found, job, places, memory, progress, clock))


def _sharing(shared: Shared, tensors: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The same, with what is shared begun before and ended after."""
    shared.start()
    try:
        yield from tensors
    except BaseException as error:
        shared.fail(error)
        raise
    finally:
        shared.finish()


def _agreed(exchange: Exchange, memory: Memory) -> Memory:
    """The same with the least that a rank has, where all must plan alike."""
    said = [tuple(map(int, one.split())) for one in exchange.told(f"{memory.arena} {memory.want} {memory.longest}")]
    arena, want, longest = (min(numbers) for numbers in zip(*said, strict=True))
    return replace(memory, together=(arena, want, longest))


def _groups(found: Slices, members: Sequence[int]) -> list[_Group]:
    """The tensors of which several members want the same bytes, in the order of the source: the same on every rank."""
    made = []
    for rule in found.recipe.rules:
        if not _wanted_by_several(rule, members):
            continue
        for group in Recipe((rule,)).by_name():
            slices: dict[int, Slice] = {}
            by_tensor: dict[Tensor, Slice] = {}
            for rank, tensor in group:
                if rank in members:
                    slices[rank] = by_tensor.get(tensor) or by_tensor.setdefault(
                        tensor, slice_of(tensor, found.resolve)
                    )
            made.append(_Group(min(part.first for part in slices.values()), dict(sorted(slices.items()))))
    made.sort(key=lambda group: group.first)
    return made


def _wanted_by_several(rule: Rule, members: Sequence[int]) -> bool:
    """Whether bytes of a rule's tensors are read by more than one member."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for share in rule.shares:
        here = sum(rank in share.ranks for rank in members)
        if not here or not share.pieces:
            continue
        if here > 1:
            return True
        for piece in share.expanded():
            if isinstance(piece.source, str):
                spans.setdefault(piece.source, []).extend(_spans(piece.src, rule.dtype))
    for found in spans.values():
        found.sort()
        end = 0
        for first, past in found:
            if first < end:
                return True
            end = max(end, past)
    return False


def _spans(window: Window, dtype: DType) -> Iterator[tuple[int, int]]:
    """The runs of elements that are read for a window: what lies between short ones is read over."""
    if not window.size:
        return
    for dim, (n, stride) in enumerate(zip(window.shape, window.strides, strict=True)):
        others = [i for i in range(len(window.shape)) if i != dim]
        extent = 1 + sum((window.shape[i] - 1) * window.strides[i] for i in others)
        if n > 1 and (stride - extent) * dtype.itemsize > schedule.GAP:
            for i in range(n):
                yield from _spans(window.narrow(dim, i, 1), dtype)
            return
    yield window.bounds


class _Nobody:
    """The sink of a step in which a rank has no tensor of its own."""

    staging = 0

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """Nothing is brought here."""
        return memory[:0]

    def done(self, tile: Tile, memory: memoryview, release: Callable[[], None]) -> None:
        """The step's memory is free."""
        release()


class _Planned:
    """The steps that all members plan alike, and what of them is a rank's own."""

    def __init__(self, rank: int, groups: Sequence[_Group], mine: Sequence[Bundle], memory: Memory) -> None:
        self._rank = rank
        self._groups = groups
        self._memory = memory
        self._places = {
            part.tensor.name: (i, item.entry.offset)
            for i, bundle in enumerate(mine)
            for item, part in zip(bundle.items, bundle.slices, strict=True)
        }

    def steps(self, sinks: Sinks, first: int) -> Iterator[Step]:
        """Every member's tensors. ``sinks``: this rank's own, from number ``first`` on."""
        arena, want, longest = self._memory.together

        def groups() -> Iterator[list[Target]]:
            for group in self._groups:
                yield [self._target(rank, part, sinks, first) for rank, part in group.slices.items()]

        return schedule.steps(groups(), limit=arena, want=want, longest=longest)

    def _target(self, rank: int, part: Slice, sinks: Sinks, first: int) -> Target:
        sink, offset = None, 0
        if rank == self._rank:
            number, offset = self._places[part.tensor.name]
            sink = sinks.get(first + number)
        return _Member(part.tensor, part.pieces, sink, offset, self._memory.staging, rank=rank)

    def ranges(self, step: Step) -> list[Range]:
        """What of a step is shared, in order."""
        return [
            (read.key, read.start, read.nbytes)
            for read in step.reads
            for read in self._apart(read)
            if self._several(read)
        ]

    def own(self, sinks: Sinks, first: int) -> Iterator[Step]:
        """This rank's part of every step: its own tiles, its own reads, and all that are shared."""
        nobody = Target(Tensor("", DType.U8, (0,), tuple), (), _Nobody(), 0, 0)
        numbers = count()
        for step in self.steps(sinks, first):
            tiles = [tile for tile in step.tiles if self._mine(tile)]
            reads = []
            for whole in step.reads:
                for read in [whole] if whole.place is None else self._apart(whole):
                    copies = [copy for copy in read.copies if self._mine(copy.tile)]
                    if self._several(read):
                        reads.append(replace(read, key=place(next(numbers)), copies=copies))
                    elif copies:
                        reads.append(replace(read, copies=copies))
            if tiles or reads:
                yield replace(step, tiles=tiles or [Tile(nobody, 0, 0, 0, None)], reads=reads)

    def _mine(self, tile: Tile) -> bool:
        return isinstance(tile.target, _Member) and tile.target.rank == self._rank

    def _several(self, read: Read) -> bool:
        """Whether more than one member wants it."""
        return len({_rank(copy) for copy in read.copies}) > 1

    def _apart(self, read: Read) -> Iterator[Read]:
        """A read as neighbouring ranges that are wanted by different members, where they are not small."""
        spans = sorted(((*_bytes(copy), i) for i, copy in enumerate(read.copies)))
        runs: list[_Run] = []
        for low, high, i in spans:
            one = _Run(low, high, {_rank(read.copies[i])}, [i])
            while runs and (low < runs[-1].high or runs[-1].joins(one)):
                one = runs.pop().with_(one)
            runs.append(one)
        for run in runs:
            place = None if read.place is None else read.place + run.low
            copies = [replace(read.copies[i], base=read.copies[i].base - run.low) for i in run.copies]
            yield Read(read.key, read.start + run.low, run.high - run.low, copies, place)


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes [low, high) of a read, who wants them, and its copies that take of them."""

    low: int
    high: int
    ranks: set[int]
    copies: list[int]

    def joins(self, after: _Run) -> bool:
        """Whether it is better read with what comes after."""
        small = min(self.high - self.low, after.high - after.low) < schedule.FLOOR
        return self.high == after.low and (small or self.ranks == after.ranks)

    def with_(self, after: _Run) -> _Run:
        """Both as one."""
        return _Run(self.low, max(self.high, after.high), self.ranks | after.ranks, self.copies + after.copies)


@dataclass(frozen=True)
class _Member(Target):
    """A target of one of the members."""

    rank: int = 0


def _rank(copy: Copy) -> int:
    """The member whose tensor a copy goes to."""
    assert isinstance(copy.tile.target, _Member)
    return copy.tile.target.rank


def _bytes(copy: Copy) -> tuple[int, int]:
    """The bytes of its read that a copy takes elements of."""
    low, high = copy.src.bounds
    return copy.base + low * copy.dtype.itemsize, copy.base + high * copy.dtype.itemsize
