"""From a checkpoint to tensors in a caller's hands: the engine in a thread, and what it may use.

::

    flow ── divide ──> segments ── the engine's thread fills them ── ready ── in the order that was asked for ──> caller

The memory limit covers what is read ahead, buffers, and memory that the caller has dropped and that is kept for reuse.
What was handed over is the caller's; a tensor that does not fit is let in alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from shardtool import digest, schedule
from shardtool.budget import PAGE, Arena, Gate, Slabs, limit_of
from shardtool.checkpoint import Checkpoint
from shardtool.engine import Clock, execute
from shardtool.errors import UsageError
from shardtool.ops.limits import readers
from shardtool.segments import Item, Segment, divide

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

    def staged(self, item: Item) -> bool:
        """Whether a tensor is reached through a buffer."""
        return self.device.type != "cpu"

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

    def staged(self, item: Item) -> bool:
        """Whether a tensor is reached through a buffer: small neighbours are, as they are read as one."""
        from shardtool.sinks.tensor import lends

        return item.entry.nbytes <= RUN or not lends(self._tensors[item.name])

    def place(self, segment: Segment, means: Means) -> Place:
        """Where a segment goes."""
        from shardtool.sinks.segment import Given as Theirs

        return Theirs(segment, self._tensors)


@dataclass(frozen=True, slots=True)
class Means:
    """What a run may use, and one after it again. ``run``: bytes of small tensors that are read as one.

    ``ahead``: bytes that ``slabs`` and ``gate`` let in.
    """

    arena: Arena
    slabs: Slabs
    gate: Gate
    threads: int
    run: int
    clock: Clock = field(default_factory=Clock)
    ahead: int = 0


def means_for(
    checkpoint: Checkpoint,
    found: Sequence[Item],
    places: Fresh | Given,
    memory_limit: int | str | None,
    concurrency: int | None,
    *,
    ranks: int = 1,
) -> Means:
    """Divide the limit between buffers and what is read ahead; of several ranks also what the others read."""
    threads = readers(concurrency, CONCURRENCY if checkpoint.store.remote else LOCAL)
    staged = any(places.staged(item) for item in found)
    least = LEAST
    if staged:
        least += max(min(digest.CHUNK, item.entry.nbytes) for item in found if places.staged(item))
    least += checkpoint.store.reading(threads)
    limit = limit_of(memory_limit, least=least, what=f"loading {checkpoint.uri}", most=UNLIMITED)
    limit -= checkpoint.store.reading(threads)
    if staged:
        size = max(least - LEAST // 2, min(limit // 2, RING))
    elif any(item.entry.strides is not None for item in found):
        size = min(limit // 2, SCRATCH)
    else:
        size = 0
    ahead = min(limit - size, max(AHEAD, 2 * max((item.entry.nbytes + PAGE for item in found), default=0)))
    run = RUN
    if ranks > 1:
        ahead = min(ahead, (limit - size) // 2)
        run = max(LEAST, sum(item.entry.nbytes for item in found) // (4 * ranks))  # so that there is some for each
    run = min(run, RUN, max(PAGE, ahead // 4))
    return Means(Arena(size), Slabs(ahead), Gate(ahead), threads, min(run, size) if staged else run, ahead=ahead)


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

    segments = list(divide(found, means.run))
    owners: dict[int, int] = {}
    if exchange is not None:
        common = [number for number, segment in enumerate(segments) if segment.nbytes]
        sizes = [segments[number].nbytes for number in common]
        names = [f"{segments[number].key} {segments[number].start}" for number in common]
        owners = dict(zip(common, exchange.owners(sizes, names), strict=True))
    ready: Ready = SimpleQueue()
    total = sum(item.entry.nbytes for item in found)

    def stop() -> None:
        means.arena.stop()
        means.slabs.stop()
        means.gate.stop()

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
            yield from schedule.steps(
                [[target]], limit=means.arena.size, want=digest.CHUNK, longest=digest.CHUNK, tile=digest.CHUNK
            )

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
                )
            finally:
                copier.close()
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = Thread(target=work, name="shardtool-load", daemon=True)
    if exchange is None:
        return handed_over(len(segments), ready, thread, stop, means.clock, in_order=order != "ready")
    apart = replace(means, slabs=Slabs(means.ahead), gate=Gate(means.ahead))
    theirs = {n: places.place(segments[n], apart) for n, owner in owners.items() if owner != exchange.rank}
    shared = _together(segments, theirs, ready, thread, stop, means.clock, exchange)
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
        return Queued(Cuda(means.arena.memory, devices), means.clock, fail)
    return Plain(means.clock)


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
    except BaseException:
        stop()
        raise
    finally:
        thread.join()


def _together(
    segments: Sequence[Segment],
    theirs: Mapping[int, Place],
    ready: Ready,
    thread: Thread,
    stop: Callable[[], None],
    clock: Clock,
    exchange: Exchange,
) -> Iterator[tuple[str, Any]]:
    """The same on every rank: what this one has read goes to the others, what they have read comes here.

    ``theirs``: where the segments go that other ranks read.
    """
    waiting: dict[int, SegmentSink] = {}
    turn = 0
    with exchange:
        thread.start()
        try:
            for number, segment in enumerate(segments):
                place = theirs.get(number)
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
        except BaseException:
            stop()
            raise
        finally:
            thread.join()


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
