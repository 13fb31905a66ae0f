"""Writing a checkpoint, from the look at its output to the commit.

Steps are planned under a limit; what is missing is written, each file with a record; whoever writes the last commits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import merge
from itertools import groupby

from shardtool import schedule
from shardtool.budget import Arena, limit_of
from shardtool.computed import Resolve
from shardtool.engine import Progress, execute
from shardtool.errors import ChecksumMismatch, UsageError
from shardtool.header import sort_key
from shardtool.ops import output
from shardtool.ops.guard import Guard
from shardtool.ops.job import Job, Means, Summary
from shardtool.ops.limits import MOST, Reading, reading, want
from shardtool.plan import File, Tensor
from shardtool.schedule import Step, Target
from shardtool.sinks.file import FileSink, Slots
from shardtool.stores.base import Store

_PARTS = 8
"""Parts of a file's upload that are gathered before they are sent, if there is room."""


def _waves(files: Iterable[tuple[int, File]]) -> Iterator[list[File]]:
    """The files of each part."""
    by_part: dict[int, list[File]] = {}
    for part, file in files:
        by_part.setdefault(part, []).append(file)
    for part in sorted(by_part):
        yield by_part[part]


def _groups(
    files: Sequence[File], resolve: Resolve, sinks: Mapping[str, FileSink], *, paged: bool
) -> Iterator[list[Target]]:
    """Every tensor of some files, with the files that want it, in the order of their bytes."""
    side_by_side = merge(*map(_placed, files), key=_order)
    for _, every in groupby(side_by_side, key=_order):
        yield [
            Target(tensor, resolve(tensor), sinks.get(file.key), offset, FileSink.staging, paged)
            for file, tensor, offset in every
        ]


_Placed = tuple[File, Tensor, int]


def _placed(file: File) -> Iterator[_Placed]:
    """A file's tensors with their offsets."""
    offset = len(file.header)
    for tensor in file.tensors:
        yield file, tensor, offset
        offset += tensor.nbytes


def _order(placed: _Placed) -> tuple[int, str]:
    return sort_key(placed[1].name, placed[1].dtype)


@dataclass(frozen=True, slots=True)
class _Memory:
    """How a limit is divided: slots in which uploads gather their parts, what stores hold, and the arena."""

    limit: int
    slots: int
    unit: int
    held: int
    least: int
    reading: Reading

    @property
    def arena(self) -> int:
        return min(self.limit - self.slots * self.unit - self.held - self.reading.held, MOST)

    @property
    def want(self) -> int:
        return want(self.arena)


def _memory(
    job: Job, files: Sequence[tuple[int, File]], to: Store, means: Means, guard: Guard | None = None
) -> _Memory:
    """Divide the limit, or refuse it with the number that would do."""
    units = max((to.unit(file.size) for _, file in files), default=0)
    slots = max((len(wave) for wave in _waves(files)), default=0) if units else 0
    floor = max((_least(wave) for wave in _waves(files)), default=0)
    held = max((sum(to.held(file.size) for file in wave) for wave in _waves(files)), default=0)
    held += job.computing
    least = floor + slots * units + held
    limit = limit_of(means.memory_limit, least=least, what=job.what, most=MOST)
    more = 0
    if units:  # several parts of one file are sent at a time if there is room
        more = min(_PARTS - 1, min(limit // 4, (limit - least) // 2) // (slots * units)) * units
    spare = limit - least - slots * more
    how = reading(spare, means.concurrency, job.source)
    if guard is not None and not guard.expect(how, means.concurrency):
        how = reading(spare, means.concurrency, job.source)
    return _Memory(limit, slots, units + more, held, least, how)


def _least(wave: Sequence[File]) -> int:
    """The smallest arena for the files of one part: a small tile for each, and a small read."""
    tensors = [max((min(schedule.FLOOR, t.nbytes) for t in file.tensors), default=0) for file in wave]
    return sum(-(-n // schedule.ALIGN) * schedule.ALIGN for n in tensors) + schedule.FLOOR + schedule.ALIGN


def _steps(wave: Sequence[File], resolve: Resolve, sinks: Mapping[str, FileSink], memory: _Memory) -> Iterator[Step]:
    longest = min(memory.reading.longest, memory.want)
    groups = _groups(wave, resolve, sinks, paged=not memory.unit)  # parts of uploads are gathered elsewhere
    return schedule.steps(groups, limit=memory.arena, want=memory.want, longest=longest)


def perform(job: Job, to: Store, means: Means, guard: Guard | None = None) -> Summary:
    """Write what is missing of the job, and commit it if that was the last; with ``dry_run``, say what that would be.

    ``guard``: checks the job's input, once it is clear that the job can be done, or as it is read. Where that fails
    nothing stays behind of what this run has written.
    """
    if not to.writable:
        raise UsageError(f"{to.uri} is only read: choose a folder or a bucket for the --output")
    files = job.of_ranks(means.ranks)
    for _, file in files:
        to.admit(file.key, file.size, file.header)
    memory = _memory(job, files, to, means, guard)
    state = output.look(job, to, overwrite=means.overwrite, ranks=means.ranks)
    planned = _planned(job, files, memory, output.cautions(job, to, state))
    if means.dry_run:
        steps = (step for wave in _waves(files) for step in _steps(wave, job.resolve, {}, memory))
        return replace(planned, bytes_to_read=sum(read.nbytes for step in steps for read in step.reads))
    if state.complete:
        output.restore(job, to, state, means.sums)
        return replace(planned, kept=planned.bytes_to_write, complete=True)
    if guard is not None:
        if state.doomed:
            guard.first()
        guard.check(means)
    done = output.begin(job, to, state)
    left = tuple((part, file) for part, file in files if file.key not in done)
    total = planned.bytes_to_write
    kept = total - sum(file.size for _, file in left)
    try:
        reads = _write(job, left, to, memory, _told(means.progress, kept, total), sha256=bool(means.sums))
        if guard is not None and means.ranks is None:
            guard.finish(memory.reading)
    except ChecksumMismatch as error:
        # What others have written, or an earlier run, is theirs; and what a store says of its own is no reason.
        if guard is None or state.own or means.ranks is not None:
            raise
        output.abandon(job, to)
        raise ChecksumMismatch(f"{error}; nothing was written") from error
    complete = output.commit(job, to, means.sums)
    return replace(planned, bytes_to_read=reads, written=total - kept, kept=kept, complete=complete)


def _planned(job: Job, files: Sequence[tuple[int, File]], memory: _Memory, cautions: Sequence[str]) -> Summary:
    """The job's summary before anything is read or written."""
    return Summary(
        what=job.what,
        files=tuple((file.key, file.rank, file.size) for _, file in files),
        bytes_to_write=sum(file.size for _, file in files),
        bytes_to_read=0,
        least_memory=memory.least,
        memory_limit=memory.limit,
        notes=(*job.notes, *cautions),
        details=job.details,
    )


def _told(progress: Callable[[int, int], None] | None, done: int, total: int) -> Progress | None:
    """Adds up what has been done."""
    if progress is None:
        return None
    so_far = [done]
    progress(done, total)

    def tell(nbytes: int) -> None:
        so_far[0] += nbytes
        progress(so_far[0], total)

    return tell


def _write(
    job: Job,
    left: Sequence[tuple[int, File]],
    to: Store,
    memory: _Memory,
    progress: Progress | None,
    *,
    sha256: bool = False,
) -> int:
    """Write some files; returns the bytes that were read."""
    slots = Slots(memory.slots, memory.unit)
    sinks: dict[str, FileSink] = {}
    read = 0

    for part, file in left:
        sinks[file.key] = FileSink(file, part, to, partial(output.record, job, to), slots, sha256=sha256)

    def counted(wave: Sequence[File]) -> Iterator[Step]:
        nonlocal read
        for step in _steps(wave, job.resolve, sinks, memory):
            read += sum(r.nbytes for r in step.reads)
            yield step

    try:
        arena = Arena(memory.arena)
        for wave in _waves(left):
            # A part is durable before the next begins, so that a killed run loses one part at most.
            execute(
                counted(wave), job.source, arena, readers=memory.reading.threads, progress=progress, stop=slots.stop
            )
        for sink in sinks.values():
            if not sink.file.data_size:
                sink.open()
    finally:
        for sink in sinks.values():
            sink.abort()
    return read
