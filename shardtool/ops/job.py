"""What ``save``, ``reshard`` and ``merge`` have in common, as data: the job and what came of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from shardtool import manifest
from shardtool.computed import Resolve
from shardtool.errors import UsageError
from shardtool.manifest import FileRecord
from shardtool.ops.sums import Sums
from shardtool.plan import File
from shardtool.stores.base import Object, Store

FEW = 4
"""Tensors that have a note each."""
_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Job:
    """A checkpoint to write. ``files``: each with its part; those of one part are written together.

    ``resolve``: a target's pieces over the objects of ``source``.

    ``weights``: the source's files, with their versions; a job that is taken up again must find them as they were.

    ``reads``: whether an engine that lists the output would take an object for a shard.

    ``beside``: the side files, of which ``write_beside`` writes some; ``commit``: writes the mark of the complete
    checkpoint, from all records; ``committed``: whether the output bears this very mark already.
    """

    what: str
    fingerprint: str
    files: tuple[tuple[int, File], ...]
    resolve: Resolve
    source: Store
    weights: tuple[Object, ...]
    beside: Set[str]
    write_beside: Callable[[Store, Set[str]], None]
    commit: Callable[[Store, Sequence[FileRecord]], None]
    committed: Callable[[Store], bool]
    mark: str  # the object that makes the checkpoint complete
    stale: Callable[[str], bool]  # whether --overwrite may remove a file of this name
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    reads: Callable[[str], bool] = lambda key: False
    computing: int = 0  # bytes that computed tensors take

    def of_ranks(self, ranks: Sequence[int] | None) -> tuple[tuple[int, File], ...]:
        """The files of some ranks. What belongs to no rank goes with rank 0."""
        if ranks is None:
            return self.files
        return tuple((part, file) for part, file in self.files if (file.rank or 0) in ranks)

    @property
    def prefix(self) -> str:
        """Where the records are while the job lasts."""
        return f"{manifest.PRIVATE}{self.fingerprint}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """How a job is to be done: the arguments that ``save``, ``reshard`` and ``merge`` have in common."""

    memory_limit: int | str | None
    concurrency: int | None
    overwrite: bool
    dry_run: bool
    progress: Callable[[int, int], None] | None
    ranks: Sequence[int] | None = None
    sums: Sums = Sums()  # noqa: RUF009 - it is frozen

    def __post_init__(self) -> None:
        """What has to be read for sums is read with the same means."""
        made = replace(self.sums, memory_limit=self.memory_limit, concurrency=self.concurrency)
        object.__setattr__(self, "sums", made)


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


def for_reasons(reasons: Mapping[str, str], one: str, many: str) -> Iterator[str]:
    """Notes on tensors, by name: those for one reason are one note where they are more than a few."""
    groups: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        groups.setdefault(reason, []).append(name)
    for reason, names in groups.items():
        if len(names) > FEW:
            yield f"{len(names)} tensors {many}, first {names[0]}: {reason}"
        else:
            yield from (f"{name} {one}: {reason}" for name in names)


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
