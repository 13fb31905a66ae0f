"""Writing a checkpoint: what ``save``, ``reshard`` and ``merge`` have in common.

::

    Job         the files of a checkpoint, where their elements come from, and how it is committed
    ├── summary     what it will cost, before anything is written
    └── run         write what is missing, leave a record of each file, commit when all records are there

``.shardtool/<fingerprint>/`` in the output holds the records while the job lasts. Workers with the same fingerprint
help each other, and a second run skips what is recorded. Whoever finds all records commits, then removes them. The
commit is one small object, written last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from heapq import merge
from itertools import groupby
from typing import Any

from shardtool import digest, manifest, schedule
from shardtool.budget import Arena, default_limit
from shardtool.engine import Progress, execute
from shardtool.errors import AlreadyExists, BudgetTooSmall, FormatError, NotFound, PlanError, UsageError
from shardtool.header import sort_key
from shardtool.manifest import FileRecord
from shardtool.mosaic import resolve
from shardtool.plan import Catalog, File, Tensor
from shardtool.schedule import Step, Target
from shardtool.sinks.file import FileSink, Slots
from shardtool.stores.base import Store
from shardtool.units import show_size

STEP = 32 << 20
"""Bytes of a step's block that are enough."""
READ = 8 << 20
"""Bytes of one read at most."""
UNLIMITED = 1 << 30
"""Bytes that a run takes at most, whatever it may; more does not make it faster."""
DEPTH = 3
"""Steps that should be under way at once."""
MAX_RECORD = 256 << 20
CONCURRENCY = 8
JOB = "job.json"
_NUMBER = re.compile(r"[0-9]{1,18}")
_DAMAGED = (NotFound, FormatError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a record raises that is not whole, or gone because another worker has committed."""


def readers(concurrency: int | None, default: int = CONCURRENCY) -> int:
    """The number of reading threads. Raises ``UsageError`` for one that cannot be."""
    if concurrency is not None and not 1 <= concurrency <= 1024:
        raise UsageError(f"--concurrency {concurrency} is not a number of readers from 1 to 1024")
    return default if concurrency is None else concurrency


@dataclass(frozen=True)
class Job:
    """A checkpoint to write. ``files``: each with its part; those of one part are written together.

    ``beside``: the side files, of which ``write_beside`` writes some; ``commit``: writes the mark of the complete
    checkpoint, from all records; ``committed``: whether the output bears this very mark already.
    """

    what: str
    fingerprint: str
    files: tuple[tuple[int, File], ...]
    catalog: Catalog
    source: Store
    beside: Set[str]
    write_beside: Callable[[Store, Set[str]], None]
    commit: Callable[[Store, Sequence[FileRecord]], None]
    committed: Callable[[Store], bool]
    stale: Callable[[str], bool]  # whether --overwrite may remove a file of this name
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def of_ranks(self, ranks: Sequence[int] | None) -> tuple[tuple[int, File], ...]:
        """The files of some ranks. What belongs to no rank goes with rank 0."""
        if ranks is None:
            return self.files
        return tuple((part, file) for part, file in self.files if (file.rank or 0) in ranks)

    @property
    def prefix(self) -> str:
        """Where the records are while the job lasts."""
        return f"{manifest.PRIVATE}{self.fingerprint}/"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job costs and what came of it. Sizes in bytes."""

    what: str
    files: tuple[tuple[str, int | None, int], ...]  # key, rank, size
    bytes_to_write: int
    bytes_to_read: int
    least_memory: int
    memory_limit: int
    written: int = 0  # bytes of files that this run wrote
    kept: int = 0  # bytes of files that an earlier run had written
    complete: bool = False
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def split_parts(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """The part of each tensor: in the natural order of names, a new part where the next would pass ``most`` bytes."""
    if most < 1:
        raise UsageError(f"--max-part-size {most} is not a size; write for example 5GiB")
    found, part, filled = {}, 0, 0
    for name in sorted(sizes, key=natural):
        if filled and filled + sizes[name] > most:
            part, filled = part + 1, 0
        found[name] = part
        filled += sizes[name]
    return found


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key in which numbers between dots count as numbers."""
    return tuple((0, int(part), "") if _NUMBER.fullmatch(part) else (1, 0, part) for part in name.split("."))


def _waves(files: Iterable[tuple[int, File]]) -> Iterator[list[File]]:
    """The files of each part."""
    by_part: dict[int, list[File]] = {}
    for part, file in files:
        by_part.setdefault(part, []).append(file)
    for part in sorted(by_part):
        yield by_part[part]


def _groups(files: Sequence[File], catalog: Catalog, sinks: Mapping[str, FileSink]) -> Iterator[list[Target]]:
    """Every tensor of some files, with the files that want it, in the order of their bytes."""
    side_by_side = merge(*map(_placed, files), key=_order)
    for _, every in groupby(side_by_side, key=_order):
        yield [Target(tensor, resolve(tensor, catalog), sinks.get(file.key), offset) for file, tensor, offset in every]


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
    """How a limit is divided: slots in which uploads gather their parts, what writers hold, and the arena."""

    limit: int
    slots: int
    unit: int
    held: int
    least: int

    @property
    def arena(self) -> int:
        return min(self.limit - self.slots * self.unit - self.held, UNLIMITED)

    @property
    def want(self) -> int:
        return max(1, min(STEP, self.arena // DEPTH))


def _memory(job: Job, files: Sequence[tuple[int, File]], to: Store, limit: int | None) -> _Memory:
    """Divide the limit, or refuse it with the number that would do."""
    units = max((to.unit(file.size) for _, file in files), default=0)
    slots = max((len(wave) for wave in _waves(files)), default=0) if units else 0
    floor = max((_least(wave) for wave in _waves(files)), default=0)
    held = max((sum(to.held(file.size) for file in wave) for wave in _waves(files)), default=0)
    least = floor + slots * units + held
    if limit is None:
        limit = max(default_limit(), least)
    elif limit == -1:
        limit = max(UNLIMITED, least)
    elif limit == 0:
        limit = least
    if limit < least:
        raise BudgetTooSmall(
            f"--memory-limit {show_size(limit)} is too small for {job.what}: {least} bytes "
            f"({show_size(least)}) would do",
            needed=least,
        )
    return _Memory(limit, slots, units, held, least)


def _least(wave: Sequence[File]) -> int:
    """The smallest arena for the files of one part: a small tile for each, and a small read."""
    tensors = [max((min(schedule.FLOOR, t.nbytes) for t in file.tensors), default=0) for file in wave]
    return sum(-(-n // schedule.ALIGN) * schedule.ALIGN for n in tensors) + schedule.FLOOR + schedule.ALIGN


def _steps(wave: Sequence[File], catalog: Catalog, sinks: Mapping[str, FileSink], memory: _Memory) -> Iterator[Step]:
    longest = min(READ, memory.want)
    return schedule.steps(_groups(wave, catalog, sinks), limit=memory.arena, want=memory.want, longest=longest)


def summary(job: Job, to: Store, *, memory_limit: int | None, ranks: Sequence[int] | None = None) -> Summary:
    """What the job will write and read, and the memory that it needs. Plans every step; moves nothing."""
    files = job.of_ranks(ranks)
    memory = _memory(job, files, to, memory_limit)
    reads = sum(
        read.nbytes for wave in _waves(files) for step in _steps(wave, job.catalog, {}, memory) for read in step.reads
    )
    return _summary(job, files, memory, reads)


def _summary(job: Job, files: Sequence[tuple[int, File]], memory: _Memory, reads: int) -> Summary:
    return Summary(
        what=job.what,
        files=tuple((file.key, file.rank, file.size) for _, file in files),
        bytes_to_write=sum(file.size for _, file in files),
        bytes_to_read=reads,
        least_memory=memory.least,
        memory_limit=memory.limit,
        notes=job.notes,
        details=job.details,
    )


def run(
    job: Job,
    to: Store,
    *,
    memory_limit: int | None,
    concurrency: int | None,
    ranks: Sequence[int] | None,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> Summary:
    """Write what is missing of the job, and commit it if that was the last.

    Nothing is written if it cannot be planned.
    """
    files = job.of_ranks(ranks)
    memory = _memory(job, files, to, memory_limit)
    threads = readers(concurrency)
    done = _begin(job, to, overwrite=overwrite)
    if done is None:
        return _finished(job, files, memory, kept=sum(file.size for _, file in files))
    left = tuple((part, file) for part, file in files if file.key not in done)
    total = sum(file.size for _, file in files)
    kept = total - sum(file.size for _, file in left)
    reads = _write(job, left, to, memory, threads, _told(progress, kept, total))
    complete = _commit(job, to)
    result = _summary(job, files, memory, reads)
    return Summary(**{**_fields(result), "written": total - kept, "kept": kept, "complete": complete})


def _fields(value: Summary) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _finished(job: Job, files: Sequence[tuple[int, File]], memory: _Memory, kept: int) -> Summary:
    return Summary(**{**_fields(_summary(job, files, memory, 0)), "kept": kept, "complete": True})


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
    job: Job, left: Sequence[tuple[int, File]], to: Store, memory: _Memory, threads: int, progress: Progress | None
) -> int:
    """Write some files; returns the bytes that were read."""
    slots = Slots(memory.slots, memory.unit)
    sinks: dict[str, FileSink] = {}
    read = 0

    def published(record: FileRecord) -> None:
        to.put(_record_key(job, record.key), _sealed(record))

    for part, file in left:
        sinks[file.key] = FileSink(file, part, to, published, slots)

    def counted(wave: Sequence[File]) -> Iterator[Step]:
        nonlocal read
        for step in _steps(wave, job.catalog, sinks, memory):
            read += sum(r.nbytes for r in step.reads)
            yield step

    try:
        arena = Arena(memory.arena)
        for wave in _waves(left):
            # A part is durable before the next begins, so that a killed run loses one part at most.
            execute(counted(wave), job.source, arena, readers=threads, progress=progress, stop=slots.stop)
        for sink in sinks.values():
            if not sink.file.data_size:
                sink.open()
    finally:
        for sink in sinks.values():
            sink.abort()
    return read


def _begin(job: Job, to: Store, *, overwrite: bool) -> set[str] | None:
    """The files that are written already; None when the whole checkpoint is.

    Refuses an output that holds something else.
    """
    if to.place() == job.source.place():
        raise PlanError(f"--output {to.uri} is the source itself: use another folder")
    try:
        found = {thing.key: thing.size for thing in to.list()}
    except NotFound:
        found = {}
    if job.committed(to) and all(found.get(file.key) == file.size for _, file in job.files) and not overwrite:
        if not job.beside <= found.keys():  # what is there stays, it may have been edited
            job.write_beside(to, job.beside - found.keys())
        if any(key.startswith(job.prefix) for key in found):  # a run was killed between its commit and its end
            _tidy(job, to)
        return None
    own = job.prefix + JOB in found
    if overwrite and not own:
        _clear(job, to, found)
        found = {}
    others = sorted(
        {key.split("/")[1] for key in found if key.startswith(manifest.PRIVATE) and key.count("/") > 1}
        - {job.fingerprint}
    )
    if others:
        raise PlanError(
            f"{to.uri} holds the unfinished output of another job ({others[0]}): finish that one, use "
            f"--overwrite or another --output"
        )
    if found and not own:
        raise PlanError(f"{to.uri} is not empty (it holds {min(found)}): use --overwrite or another --output")
    if not own:
        _announce(job, to)
    return {record.key for record in _records(job, to) if found.get(record.key) == record.size}


def _clear(job: Job, to: Store, found: Mapping[str, int]) -> None:
    """Remove what an older checkpoint left: its mark first, then its files. Files of other kinds stay."""
    own = _listed(to) if manifest.KEY in found else set()
    for key in sorted(found, key=lambda key: (key != manifest.KEY, not key.endswith(".index.json"), key)):
        if key in own or key == manifest.KEY or key.startswith(manifest.PRIVATE) or job.stale(key):
            to.delete(key)


def _announce(job: Job, to: Store) -> None:
    """Say whose job this output is."""
    to.put(job.prefix + JOB, json.dumps({"what": job.what, "fingerprint": job.fingerprint}).encode())


def _tidy(job: Job, to: Store) -> None:
    """Remove the records of a committed job. Announcing it first makes the store sweep what a killed run left there."""
    _announce(job, to)
    for thing in list(to.list(job.prefix)):
        to.delete(thing.key)


def _record_key(job: Job, key: str) -> str:
    """Where the record of a file is while the job lasts."""
    return f"{job.prefix}{key}.json"


def _sealed(record: FileRecord) -> bytes:
    """A record as it is kept, with a digest: a damaged one must not become part of a manifest."""
    text = json.dumps(record.to_json())
    return json.dumps({"record": text, "digest": digest.of_bytes(text.encode())}).encode()


def _unsealed(data: bytes) -> FileRecord:
    """The record. Raises the built-in errors of wrong shapes where it is damaged."""
    kept = json.loads(data)
    text = kept["record"]
    if digest.of_bytes(text.encode()) != kept["digest"]:
        raise ValueError("the record differs from its digest")
    return FileRecord.from_json(json.loads(text))


def _listed(to: Store) -> set[str]:
    """The shards of the checkpoint that is there, whatever their names. One that cannot be read lists none."""
    try:
        made = manifest.decode(to.get(manifest.KEY, limit=manifest.MAX_BYTES), to.locate(manifest.KEY))
    except (NotFound, FormatError):
        return set()
    return {file.key for file in made.files if file.key.endswith(".safetensors")}


def _records(job: Job, to: Store) -> list[FileRecord]:
    """The records of finished files. A damaged one counts as not there."""
    found = []
    for thing in to.list(job.prefix):
        if thing.key == job.prefix + JOB:
            continue
        try:
            record = _unsealed(to.get(thing.key, limit=MAX_RECORD))
        except _DAMAGED:
            continue
        if thing.key == _record_key(job, record.key):
            found.append(record)
    return found


def _commit(job: Job, to: Store) -> bool:
    """Commit if every file is there with its record. Losing to an identical commit is success."""
    sizes = {thing.key: thing.size for thing in to.list()}
    records = {record.key: record for record in _records(job, to) if sizes.get(record.key) == record.size}
    if all(file.key in records for _, file in job.files):
        job.write_beside(to, job.beside)
        try:
            job.commit(to, [records[file.key] for _, file in job.files])
        except AlreadyExists:
            if not job.committed(to):
                raise
    elif not job.committed(to):  # if it is, another worker has done it and removed the records
        return False
    _tidy(job, to)
    return True
