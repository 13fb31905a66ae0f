"""From a checkpoint to tensors in a caller's hands: the engine in a thread, and what it may use.

::

    flow ── divide ──> segments ── the engine's thread fills them ── ready ── in the order that was asked for ──> caller

The memory limit covers what is read ahead, buffers, and memory that the caller has dropped and that is kept for reuse.
What was handed over is the caller's; a tensor that does not fit is let in alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from shardtool import digest, schedule
from shardtool.budget import PAGE, Arena, Gate, Slabs, limit_of
from shardtool.calm import calm
from shardtool.checkpoint import Checkpoint
from shardtool.engine import Clock, execute
from shardtool.errors import FormatError, UsageError
from shardtool.ops.limits import readers
from shardtool.segments import Item, Segment, divide
from shardtool.stores.local.direct import cores
from shardtool.units import parse_size, show_size

if TYPE_CHECKING:
    import torch

    from shardtool.exchange import Exchange
    from shardtool.schedule import Step
    from shardtool.sinks.device import Copier
    from shardtool.sinks.segment import Place, SegmentSink

    Ready = SimpleQueue[SegmentSink | BaseException | None]

CONCURRENCY = 16
"""Readers of storage that is far away."""
LOCAL = 8
"""Readers of this machine's disks, which keep them busy with blocks of 8 MiB; more readers are more memory in use."""
AHEAD = 128 << 20
"""Bytes that are read ahead at most, or two of the largest tensors; more does not make it faster."""
RING = 128 << 20
"""Bytes of buffers through which a device is reached, at most."""
SCRATCH = 32 << 20
"""Bytes in which tensors that do not lie in order are read, at most."""
LEAST = 64 << 10
"""The smallest limit with which tensors can be read straight into place."""
RUN = digest.CHUNK - 2 * PAGE
"""Bytes of small tensors that are read as one: with its lead such a run fills whole huge pages."""
UNLIMITED = 1 << 40
ORDERS = ("file", "ready")


class Fresh:
    """Destinations: new tensors on a device."""

    def __init__(self, device: str) -> None:
        import torch

        if not isinstance(device, str | torch.device):
            raise UsageError(f"device={device!r} is not a device; write cpu, cuda or cuda:0")
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise UsageError(f"--device {device!r} is not a device; write cpu, cuda or cuda:0") from None
        if self.device.type == "cuda":
            if not 0 <= (self.device.index or 0) < torch.cuda.device_count():  # torch wraps what is far too large
                raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
            if str(self.device) == "cuda":
                self.device = torch.device("cuda", torch.cuda.current_device())
        if self.device.type not in ("cpu", "cuda", "meta"):
            raise UsageError(f"--device {device!r} is not supported; write cpu, cuda or cuda:0")

    @property
    def devices(self) -> set[torch.device]:
        """Where copies go."""
        return {self.device}

    def staged(self, found: Sequence[Item]) -> Sequence[Item]:
        """The tensors that are reached through a buffer."""
        return () if self.device.type == "cpu" else found

    def place(self, segment: Segment, means: Means) -> Place:
        """Where a segment goes."""
        from shardtool.sinks.segment import Apart
        from shardtool.sinks.segment import Fresh as Own

        if self.device.type == "cpu":
            return Own(segment, means.slabs)
        return Apart(segment, self.device, means.gate)


class Given:
    """Destinations: tensors that exist, by name."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @property
    def devices(self) -> set[torch.device]:
        """Where copies go."""
        return {tensor.device for tensor in self._tensors.values()}

    def staged(self, found: Sequence[Item]) -> Sequence[Item]:
        """The tensors that are reached through a buffer: small neighbours are, as they are read as one."""
        from shardtool.sinks.tensor import lends

        return [item for item in found if item.entry.nbytes <= RUN or not lends(self._tensors[item.name])]

    def place(self, segment: Segment, means: Means) -> Place:
        """Where a segment goes."""
        from shardtool.sinks.segment import Given as Theirs

        return Theirs(segment, self._tensors)


@dataclass(frozen=True, slots=True)
class Means:
    """What a run may use, and one after it again. ``run``: bytes of small tensors that are read as one.

    ``ahead``: bytes that ``slabs`` and ``gate`` let in; ``block``: bytes of one read at most.
    """

    arena: Arena
    slabs: Slabs
    gate: Gate
    threads: int
    run: int
    clock: Clock = field(default_factory=Clock)
    ahead: int = 0
    block: int = digest.CHUNK


def means_for(
    checkpoint: Checkpoint,
    found: Sequence[Item],
    places: Fresh | Given,
    memory_limit: int | str | None,
    concurrency: int | None,
    *,
    ranks: int = 1,
    block_size: int | str | None = None,
) -> Means:
    """Divide the limit between buffers and what is read ahead; of several ranks also what the others read."""
    threads = readers(concurrency, CONCURRENCY if checkpoint.store.remote else LOCAL)
    staged = places.staged(found)
    turned = any(item.entry.strides is not None for item in found)
    tile = PAGE + min(digest.CHUNK, max((item.entry.nbytes for item in staged), default=0))
    least = max(LEAST, LEAST // 2 + tile)
    if turned:
        least += 2 * (schedule.FLOOR + schedule.ALIGN)
    limit = limit_of(memory_limit, least=least, what=f"loading {checkpoint.uri}", most=UNLIMITED)
    store = checkpoint.store
    while threads > 1 and store.reading(threads) > (limit - least + LEAST) // 2:  # under so small a limit fewer do
        threads -= 1
    limit -= store.reading(threads)
    if staged:
        most = RING if turned else min(RING, sum(item.entry.nbytes + PAGE for item in staged))
        size = max(least - LEAST // 2, min(limit // 2, most))
    elif turned:
        size = max(schedule.FLOOR + schedule.ALIGN, min(limit // 2, SCRATCH))
    else:
        size = 0
    ahead = min(limit - size, max(AHEAD, 2 * max((item.entry.nbytes + PAGE for item in found), default=0)))
    run = RUN
    if ranks > 1:
        ahead = min(ahead, (limit - size) // 2)
        run = max(LEAST, sum(item.entry.nbytes for item in found) // (4 * ranks))  # so that there is some for each
    run = min(run, RUN, max(PAGE, ahead // 4))
    run = min(run, size - PAGE) if staged else run
    return Means(Arena(size), Slabs(ahead), Gate(ahead), threads, run, ahead=ahead, block=block_of(block_size))


def block_of(block_size: int | str | None) -> int:
    """Bytes of one read at most: a chunk, of which a digest is, or less."""
    if block_size is None:
        return digest.CHUNK
    size = parse_size(block_size, "--block-size")
    if size < LEAST:
        raise UsageError(f"--block-size {block_size} is too small; write {show_size(LEAST)} or more")
    return min(size, digest.CHUNK)


def ordered(found: Sequence[Item], order: str | Sequence[str]) -> list[Item]:
    """The tensors in the order in which they are to be read: as they lie, or just those that are named."""
    if isinstance(order, str):
        if order not in ORDERS:
            raise UsageError(f"order={order!r} is neither 'file' nor 'ready' nor a list of names")
        return list(found)
    by_name = {item.name: item for item in found}
    chosen = []
    for name in order:
        item = by_name.pop(name, None)
        if item is None:
            raise UsageError(f"order names the tensor {name!r}, which there is not, or which it has named before")
        chosen.append(item)
    return chosen


class Handed(Iterator[tuple[str, Any]]):
    """Tensors one after the other. Closed or dropped, it gives back what it holds, even if it was never begun.

    A generator that was never begun knows nothing of that: ``unbegun`` says what is to be done then.
    """

    def __init__(self, tensors: Generator[tuple[str, Any], None, None], unbegun: Callable[[], None]) -> None:
        self._tensors = tensors
        self._unbegun: Callable[[], None] | None = unbegun

    def __next__(self) -> tuple[str, Any]:
        self._unbegun = None
        return next(self._tensors)

    def close(self) -> None:
        """Take no more."""
        unbegun, self._unbegun = self._unbegun, None
        self._tensors.close()
        if unbegun is not None:
            unbegun()

    def __del__(self) -> None:
        self.close()


def flow(
    checkpoint: Checkpoint,
    found: Sequence[Item],
    places: Fresh | Given,
    means: Means,
    *,
    order: str | Sequence[str] = "file",
    progress: Callable[[int, int], None] | None = None,
    exchange: Exchange | None = None,
) -> Iterator[tuple[str, Any]]:
    """Run the engine in a thread and hand its tensors over, in the order of ``found`` or as they get ready.

    With an ``exchange`` every rank calls this with the same tensors; each byte is read by one of them.
    """
    from shardtool.sinks.segment import SegmentSink

    with calm():
        segments = list(divide(found, means.run))
    owners: dict[int, int] = {}
    if exchange is not None:
        common = [number for number, segment in enumerate(segments) if segment.nbytes]
        sizes = [segments[number].nbytes for number in common]
        names = [f"{segments[number].key} {segments[number].start}" for number in common]
        owners = dict(zip(common, exchange.owners(sizes, names), strict=True))
    ready: Ready = SimpleQueue()
    total = sum(item.entry.nbytes for item in found)

    # With an exchange a tensor that does not fit waits for its turn: another rank's may be on its way here before.
    turns = {n: Event() for n in owners if segments[n].nbytes > means.ahead}

    def stop() -> None:
        means.arena.stop()
        means.slabs.stop()
        means.gate.stop()
        for turn in turns.values():
            turn.set()

    def fail(error: BaseException) -> None:
        ready.put(error)
        stop()

    copier = copier_for(places, means, fail)

    def steps() -> Iterator[Step]:
        """One segment after the other: memory is taken when a segment's own step is at hand, never for two."""
        for number, segment in enumerate(segments):
            if exchange is not None and owners.get(number, exchange.rank) != exchange.rank:
                continue
            place = places.place(segment, means)
            where = checkpoint.store.locate(segment.key)
            sink = SegmentSink(number, segment, place, copier, means.clock, where, ready.put)
            if not segment.nbytes:
                sink.begin()
                continue
            target = segment.target(sink, place.staging)
            if number in turns:
                turns[number].wait()
            want = min(digest.CHUNK + PAGE, means.arena.size)
            if segment.turned or place.staging * min(digest.CHUNK, segment.nbytes) > want:
                yield from schedule.steps(
                    [[target]], limit=means.arena.size, want=want, longest=means.block, tile=digest.CHUNK
                )
            else:
                yield from schedule.straight(target, want=want, longest=means.block, tile=digest.CHUNK)

    def work() -> None:
        done = 0

        def tell(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None and exchange is None:
                progress(min(done, total), total)  # gaps between tensors that are read over do not count

        try:
            try:
                execute(
                    steps(),
                    checkpoint.store,
                    means.arena,
                    readers=means.threads,
                    progress=tell,
                    stop=stop,
                    clock=means.clock,
                    depth=means.threads + 1,
                    few=max(2, cores()),
                )
            finally:
                copier.close()
            check_versions(checkpoint, found)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = Work(work, copier)
    if exchange is None:
        return handed_over(len(segments), ready, thread, stop, means.clock, in_order=order != "ready")
    apart = replace(means, slabs=Slabs(means.ahead), gate=Gate(means.ahead))
    theirs = {n: places.place(segments[n], apart) for n, owner in owners.items() if owner != exchange.rank}
    shared = _together(segments, theirs, turns, ready, thread, stop, means.clock, exchange, apart)
    return shared if progress is None else _told(shared, found, progress)


def _told(
    tensors: Iterator[tuple[str, Any]], found: Sequence[Item], progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Any]]:
    """Tells of the bytes that have been handed over, whoever has read them."""
    done, total = 0, sum(item.entry.nbytes for item in found)
    sizes = iter([item.entry.nbytes for item in found])
    for pair in tensors:
        done += next(sizes)
        progress(done, total)
        yield pair
        del pair


def copier_for(places: Fresh | Given, means: Means, fail: Callable[[BaseException], None]) -> Copier:
    """What brings staged tiles to their tensors: a GPU's own copies, or this machine's."""
    from shardtool.sinks.device import Cuda, Plain, Queued

    devices = [device for device in places.devices if device.type == "cuda"]
    if devices:
        return Queued(lambda: Cuda(means.arena.memory, devices), means.clock, fail)
    return Plain(means.clock)


class Work(Thread):
    """The engine's thread. What copies need is taken when it starts, by the thread that will take the tensors."""

    def __init__(self, work: Callable[[], None], copier: Copier) -> None:
        super().__init__(target=work, name="shardtool-load", daemon=True)
        self._copier = copier

    def start(self) -> None:
        """Open the copier, and begin."""
        self._copier.open()
        try:
            super().start()
        except BaseException:
            self._copier.close()
            raise


def check_versions(checkpoint: Checkpoint, found: Sequence[Item]) -> None:
    """Refuse files that others than those that were opened have replaced: tensors may be of either."""
    for key, version in {item.file.key: item.file.version for item in found if item.entry.nbytes}.items():
        if version and checkpoint.store.stat(key).version not in ("", version):
            raise FormatError(f"{checkpoint.store.locate(key)} has changed while it was read; load it again")


def handed_over(
    count: int,
    ready: Ready,
    thread: Thread,
    stop: Callable[[], None],
    clock: Clock,
    *,
    in_order: bool,
) -> Iterator[tuple[str, Any]]:
    """The tensors of each segment, in turn. Nothing here keeps one that was handed over."""
    waiting: dict[int, SegmentSink] = {}
    thread.start()
    try:
        for number in range(count):
            sink = _next(ready, waiting, number if in_order else None, clock)
            yield from _taken(sink.segment, sink.place)
        _ended(ready)
    except BaseException:
        stop()
        raise
    finally:
        thread.join()


def _ended(ready: Ready) -> None:
    """All has been taken; raises what the engine still ended with."""
    came = ready.get()
    if isinstance(came, BaseException):
        raise came


def _together(
    segments: Sequence[Segment],
    theirs: Mapping[int, Place],
    turns: Mapping[int, Event],
    ready: Ready,
    thread: Thread,
    stop: Callable[[], None],
    clock: Clock,
    exchange: Exchange,
    apart: Means,
) -> Iterator[tuple[str, Any]]:
    """The same on every rank: what this one has read goes to the others, what they have read comes here.

    ``theirs``: where the segments go that other ranks read, ``apart``: in memory of their own.
    """
    waiting: dict[int, SegmentSink] = {}
    turn = 0
    with exchange:
        thread.start()
        try:
            for number, segment in enumerate(segments):
                place = theirs.get(number)
                if number in turns:
                    turns[number].set()
                if place is None:
                    place = _next(ready, waiting, number, clock).place
                else:
                    place.begin()
                if segment.nbytes:
                    began = time.perf_counter()
                    exchange.share(turn, place.flat())
                    clock.add("exchange", began)
                    turn += 1
                yield from _taken(segment, place)
            _ended(ready)
        except BaseException:
            stop()
            raise
        finally:
            thread.join()
            apart.slabs.stop()


def _next(ready: Ready, waiting: dict[int, SegmentSink], number: int | None, clock: Clock) -> SegmentSink:
    """The segment of this number, or any; waits for it. Raises what the engine failed with."""
    began = time.perf_counter()
    while not (waiting if number is None else number in waiting):
        came = ready.get()
        if isinstance(came, BaseException):
            raise came
        if came is None:
            raise AssertionError("the engine ended before its last segment")
        waiting[came.number] = came
    clock.add("data", began)
    return waiting.pop(next(iter(waiting)) if number is None else number)


def _taken(segment: Segment, place: Place) -> Iterator[tuple[str, Any]]:
    """A segment's tensors, handed over one by one."""
    tensors = place.tensors()
    tensors.reverse()
    for item in segment.items:
        yield item.name, tensors.pop()
    place.leave()
