"""Tensors that are made of ranges of a source, brought to a caller: what they are, how memory is divided, the run.

::

    Slices          what one rank holds of a source: each tensor with the stored bytes that it is made of
    ├── to_read         the bytes that bringing them takes
    └── tensors         (name, tensor) one after the other, through the engine: ranges read, cut, cast, padded, computed
    Bundle          tensors that share their memory: small neighbours, or one larger tensor
    Job, bring      the engine in a thread, and its tensors in their order

Tensors come in the order in which their bytes lie in the source. Where rows are cut into pieces that are too short to
be read apart, the whole band of rows is read. Where the source has digests, chunks of which a part is needed are read
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from shardtool import schedule
from shardtool.budget import PAGE, Arena, Gate, Slabs, limit_of
from shardtool.checked import Checked
from shardtool.checkpoint import WeightFile
from shardtool.computed import Resolve
from shardtool.dtypes import DType
from shardtool.engine import Clock, execute
from shardtool.header import Entry, Header
from shardtool.ops.limits import DEPTH, STEP, readers, reading
from shardtool.ops.rank import number
from shardtool.ops.source import Source
from shardtool.ops.stream import AHEAD, CONCURRENCY, RING, RUN, UNLIMITED, Fresh, Means, Work, copier_for, handed_over
from shardtool.parallel import Parallel
from shardtool.plan import Piece, Stored, Tensor
from shardtool.recipe import Recipe
from shardtool.schedule import Step, Target
from shardtool.segments import Item, Segment
from shardtool.stores.base import Store

if TYPE_CHECKING:
    import torch

    from shardtool.sinks.segment import SegmentSink

LEAST = 64 << 10
"""Bytes of read-ahead with which tensors can be brought."""
_NOWHERE = WeightFile("", 0, Header((), {}, 0))
"""The file of tensors that are in none."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One tensor of the rank with what it is made of. ``first``: where its bytes begin in the source."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    first: tuple[str, int]

    @property
    def straight(self) -> Stored | None:
        """The stored tensor of which it is, from its first byte on, a run of bytes as they are."""
        if len(self.pieces) != 1:
            return None
        (piece,) = self.pieces
        stored = piece.source
        assert isinstance(stored, Stored)
        same = stored.dtype is self.tensor.dtype and piece.dst.size == self.tensor.size
        return stored if same and piece.dst.contiguous and piece.src.contiguous else None


@dataclass(frozen=True, slots=True)
class Bundle(Segment):
    """Tensors that share their memory: small neighbours, or one larger tensor."""

    slices: tuple[Slice, ...] = ()

    @property
    def lead(self) -> int:
        """A single tensor lies as far behind a page as in its file, so that it can be read past the page cache."""
        only = self.slices[0].straight if len(self.slices) == 1 else None
        if only is None:
            return 0
        start = only.offset + self.slices[0].pieces[0].src.offset * only.dtype.itemsize
        return 0 if start % only.dtype.itemsize else start % PAGE

    def targets(self, sink: object, staging: int) -> Iterator[Target]:
        """What the engine fills."""
        for item, part in zip(self.items, self.slices, strict=True):
            yield Target(part.tensor, part.pieces, sink, item.entry.offset, staging)


def _bundle(slices: Iterable[Slice]) -> Bundle:
    """Tensors side by side. The widest types come first, so that each lies as its type needs."""
    ranked = sorted(slices, key=lambda part: -part.tensor.dtype.itemsize)
    items, end = [], 0
    for part in ranked:
        tensor = part.tensor
        items.append(
            Item(tensor.name, _NOWHERE, Entry(tensor.name, tensor.dtype, tensor.shape, end, tensor.nbytes), None)
        )
        end += tensor.nbytes
    return Bundle("", 0, end, tuple(items), tuple(ranked))


def bundles(slices: Sequence[Slice], most: int) -> Iterator[Bundle]:
    """The tensors in their order, small neighbours together. ``most``: bytes of a run of them."""
    run: list[Slice] = []
    weight = 0
    for part in slices:
        nbytes = part.tensor.nbytes
        if weight and weight + nbytes > most:
            yield _bundle(run)
            run, weight = [], 0
        run.append(part)
        weight += nbytes
    if run:
        yield _bundle(run)


@dataclass(frozen=True)
class Slices:
    """What one rank of ``parallel`` holds of a source. ``close`` it, or use it as a context.

    ``store`` has the source's objects and what is computed; ``computing``: bytes of memory that computing takes.
    ``checked``: the source's objects where they are checked. ``recipe``: what all ranks hold, and ``resolve``: what of
    it lies where. ``layout``: how people name what cut it; ``dtype``: that of the model in the rank's memory.
    """

    source: Source
    store: Store
    parallel: Parallel
    rank: int
    slices: tuple[Slice, ...]
    computing: int
    recipe: Recipe
    resolve: Resolve
    layout: str
    dtype: DType
    checked: Checked | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.tensor.nbytes for part in self.slices)

    def entries(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor, in the order in which they come."""
        order = (item for bundle in bundles(self.slices, 0) for item in bundle.items)
        return [(item.name, item.entry.dtype, item.entry.shape) for item in order]

    def to_read(self, *, device: str = "cpu", memory_limit: int | str | None = None) -> int:
        """The bytes that are read of the source to bring all tensors. Reads none.

        More than they have where rows are cut into short pieces, and where chunks are checked; the limit matters for
        transposed tensors only.
        """
        memory = memory_for(self, Fresh(device), memory_limit, None)
        made = list(bundles(self.slices, memory.run))
        reads = [(read.key, read.start, read.nbytes) for step in steps(made, memory, {}) for read in step.reads]
        return sum(nbytes for _, _, nbytes in reads) if self.checked is None else self.checked.cost(reads)

    def tensors(
        self,
        *,
        device: str = "cpu",
        memory_limit: int | str | None = None,
        concurrency: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        clock: Clock | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """``(name, tensor)`` for every tensor of the rank; the caller owns them. ``clock``: to be told of the time."""
        places = Fresh(device)
        memory = memory_for(self, places, memory_limit, concurrency)
        made = list(bundles(self.slices, memory.run))
        return bring(self, Job(made, partial(steps, made, memory), self.store), places, memory, progress, clock)

    def close(self) -> None:
        """Close the source."""
        self.store.close()

    def __enter__(self) -> Slices:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def slice_of(tensor: Tensor, resolve: Resolve) -> Slice:
    """A tensor of a recipe with what it is made of."""
    pieces = resolve(tensor)
    return Slice(tensor, pieces, min(map(_start, pieces), default=("", 0)))


def _start(piece: Piece) -> tuple[str, int]:
    """Where a piece's bytes begin."""
    stored = piece.source
    assert isinstance(stored, Stored)
    return stored.key, stored.offset + piece.src.offset * stored.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Memory:
    """How a limit is divided: buffers (``arena``), what is read ahead, small tensors that lie together (``run``).

    ``want``: bytes of a step, which must find room for what it begins while nothing else is there. ``together``: arena,
    ``want`` and ``longest`` of what several ranks plan alike.
    """

    staging: int
    arena: int
    ahead: int
    run: int
    want: int
    threads: int
    longest: int
    together: tuple[int, int, int] = (0, 0, 0)


def memory_for(
    found: Slices,
    places: Fresh,
    memory_limit: int | str | None,
    concurrency: int | None,
    others: Iterable[Sequence[Target]] = (),
) -> Memory:
    """Divide the limit, or refuse it with the number that would do. ``others``: what is to be done beside."""
    number(concurrency, "concurrency")
    if not isinstance(memory_limit, str):
        number(memory_limit, "memory_limit")
    staging = 0 if places.device.type == "cpu" else 1
    groups = ([Target(part.tensor, part.pieces, None, 0, staging)] for part in found.slices)
    floor = max(schedule.least(groups), schedule.least(others)) + PAGE
    checking = 0 if found.checked is None else found.store.reading(1)
    least = floor + LEAST + found.computing + checking
    limit = limit_of(memory_limit, least=least, what=f"rank {found.rank} of {found.source.uri}", most=UNLIMITED)
    means = reading(max(limit - least, 3 * checking), readers(concurrency, CONCURRENCY), found.store)
    limit -= found.computing + means.held
    arena = max(floor, min(limit // 2, RING))
    ahead = min(limit - arena, AHEAD)
    run = min(RUN, max(PAGE, ahead // 4))
    want = max(1, min(STEP, arena // DEPTH, ahead // 4))
    return Memory(staging, arena, ahead, run, want, means.threads, means.longest)


def steps(made: Sequence[Bundle], memory: Memory, sinks: Sinks) -> Iterator[Step]:
    """The steps that fill some bundles in their order. Without sinks: what they would be."""
    groups = ([target] for i, bundle in enumerate(made) for target in bundle.targets(sinks.get(i), memory.staging))
    return schedule.steps(groups, limit=memory.arena, want=memory.want, longest=memory.longest)


Sinks = dict[int, Any]
"""The sink of each bundle, by its place in the order."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the engine shall do for a rank. ``steps``: with these sinks; ``stop``: wakes whoever waits elsewhere."""

    bundles: Sequence[Bundle]
    steps: Callable[[Sinks], Iterator[Step]]
    store: Store
    stop: Callable[[], None] = lambda: None


def bring(
    found: Slices,
    job: Job,
    places: Fresh,
    memory: Memory,
    progress: Callable[[int, int], None] | None,
    clock: Clock | None = None,
) -> Iterator[tuple[str, Any]]:
    """Run the engine in a thread and hand its tensors over in order."""
    from shardtool.sinks.segment import SegmentSink

    clock = Clock() if clock is None else clock
    means = Means(Arena(memory.arena), Slabs(memory.ahead), Gate(memory.ahead), memory.threads, memory.run, clock)
    ready: SimpleQueue[SegmentSink | BaseException | None] = SimpleQueue()
    total = found.nbytes

    def stop() -> None:
        means.arena.stop()
        means.slabs.stop()
        means.gate.stop()
        job.stop()

    def fail(error: BaseException) -> None:
        ready.put(error)
        stop()

    copier = copier_for(places, means, fail)
    sinks: Sinks = {
        i: SegmentSink(i, bundle, places.place(bundle, means), copier, clock, found.source.uri, ready.put)
        for i, bundle in enumerate(job.bundles)
    }

    def work() -> None:
        done = 0

        def tell(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        try:
            try:
                for i, bundle in enumerate(job.bundles):
                    if not bundle.nbytes:
                        sinks[i].begin()
                execute(
                    job.steps(sinks),
                    job.store,
                    means.arena,
                    readers=memory.threads,
                    progress=tell,
                    stop=stop,
                    clock=clock,
                )
            finally:
                copier.close()
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = Work(work, copier)
    try:
        yield from handed_over(len(job.bundles), ready, thread, stop, clock, in_order=True)
    finally:
        means.slabs.stop()
