"""``clean``: what killed jobs left in an output, and its removal.

::

    records     .shardtool/<fingerprint>/   of a job that has not ended, or of one that ended while it tidied up
    shards      files that such a job had finished, where nothing marks a complete checkpoint
    uploads     what writers had begun: multipart uploads, temporary files

A complete checkpoint is never touched, nor is what is younger than it must be: somebody may be at work on it. What has
no age that can be told counts as young. A place may hold any number of objects: of those that no job names only one is
looked at at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from shardtool import manifest
from shardtool.errors import AccessDenied, NotFound, UsageError
from shardtool.ops.output import DAMAGED, JOB, MAX_RECORD, reason
from shardtool.stores import Address, open_store
from shardtool.stores.base import Object, Store, Unfinished, is_key
from shardtool.units import parse_duration

OLD = "1d"
_INDEX = ".safetensors.index.json"
MOST = 200_000
"""Records, files of jobs and uploads, of each, that are looked at."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a job left. ``since``: its last sign of life, in seconds since 1970, or 0 if nobody can tell.

    ``job``: what was being made, for records and shards. ``old``: whether it may be removed. ``size`` is -1 if unknown.
    """

    kind: Literal["record", "shard", "upload"]
    key: str
    size: int
    since: float
    job: str = ""
    old: bool = False
    removed: bool = False
    upload: Unfinished | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was found, and whether it was removed. ``complete``: a checkpoint is there that is complete."""

    uri: str
    complete: bool
    found: tuple[Leftover, ...]
    notes: tuple[str, ...] = ()

    @property
    def young(self) -> tuple[Leftover, ...]:
        """What stays because somebody may be at work on it."""
        return tuple(one for one in self.found if not one.old)

    @property
    def removed(self) -> tuple[Leftover, ...]:
        """What is gone."""
        return tuple(one for one in self.found if one.removed)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is left of a job: its records, and the files that it was to write, with the sizes that it said."""

    what: str
    since: float
    records: tuple[Object, ...]
    files: Mapping[str, int]


def clean(uri: Address, *, yes: bool = False, older_than: int | float | str = OLD) -> Cleaned:
    """Find what killed jobs left at ``uri``: records, shards of no complete checkpoint, uploads. Remove it if ``yes``.

    ``older_than``: how long ago its last sign of life must be, in seconds or a text such as ``12h``; 0 takes what has
    no age, and what somebody may be writing at this moment, whose job then fails. Raises ``NotFound`` where nothing
    lies, and ``UsageError`` where jobs have left more records than any job has.
    """
    least = parse_duration(older_than, "--older-than")
    with open_store(uri) as store:
        notes: list[str] = []
        jobs = _jobs(store, notes)
        named = {key for job in jobs for key in job.files}
        there, complete = _seen(store, named)  # after the records, so that what ends meanwhile is complete
        found = [*_of_jobs(jobs, there, complete), *_uploads(store, notes)]
        now = time.time()
        found = [_aged(one, now, least) for one in found]
        if yes:
            found = _removed(store, found)
        return Cleaned(store.uri, complete, tuple(found), tuple(notes))


def _seen(store: Store, named: set[str]) -> tuple[dict[str, int], bool]:
    """The sizes of the objects of some names, and whether something says that a checkpoint is complete here."""
    sizes: dict[str, int] = {}
    complete = False
    for thing in store.list():
        complete = complete or _marks(thing.key)
        if thing.key in named:
            sizes[thing.key] = thing.size
    return sizes, complete


def _marks(key: str) -> bool:
    """Whether an object of this name says that a checkpoint is complete."""
    return key == manifest.KEY or ("/" not in key and key.endswith(_INDEX))


def _aged(one: Leftover, now: float, least: float) -> Leftover:
    old = now - one.since >= least if one.since else least <= 0
    return Leftover(one.kind, one.key, one.size, one.since, one.job, old, upload=one.upload)


def _jobs(store: Store, notes: list[str]) -> list[_Job]:
    """What the records say of the jobs that have not ended."""
    things: dict[str, list[Object]] = {}
    private = store.locate(manifest.PRIVATE)
    for thing in _few(store.list(manifest.PRIVATE), MOST, f"{private} holds too many records"):
        if thing.key.count("/") > 1:
            things.setdefault(thing.key.split("/")[1], []).append(thing)
    found: list[_Job] = []
    left, damaged = MOST, ""
    for name, records in sorted(things.items()):
        own = f"{manifest.PRIVATE}{name}/{JOB}"
        begun: Mapping[str, Any] = {}
        since, why = 0.0, ""
        for thing in records:
            try:
                said = _said(store, thing)
            except NotFound:
                continue  # its job goes on
            except DAMAGED as error:
                why = f"{store.locate(thing.key)} {reason(error)}"
                continue
            since = max(since, _number(said.get("at")))
            if thing.key == own:
                begun = said
        what = begun["what"] if isinstance(begun.get("what"), str) else ""
        damaged = damaged or ("" if since else why)
        files = dict(_few(_files(begun), left, f"{store.locate(own)} lists too many files"))
        left -= len(files)
        # whose they are is told last
        found.append(_Job(what, since, tuple(sorted(records, key=lambda one: (one.key == own, one.key))), files))
    if damaged:
        notes.append(f"{damaged}: nothing tells the age of its job, which only --older-than 0 removes")
    return found


def _few(found: Iterable[_T], most: int, what: str) -> Iterator[_T]:
    """All of them; ``UsageError`` where they are too many."""
    for number, one in enumerate(found):
        if number == most:
            raise UsageError(f"{what}, more than {MOST}, which no job leaves: remove that by other means")
        yield one


def _of_jobs(jobs: Iterable[_Job], there: Mapping[str, int], complete: bool) -> Iterator[Leftover]:
    """The records of jobs, and their shards where nothing is complete; a job's shards come before its records."""
    for job in jobs:
        for key, size in job.files.items() if not complete else ():
            if there.get(key) == size:
                yield Leftover("shard", key, size, job.since, job.what)
        for thing in job.records:
            yield Leftover("record", thing.key, thing.size, job.since, job.what)


def _said(store: Store, thing: Object) -> dict[str, Any]:
    """What a record says. Raises what ``DAMAGED`` lists where it is damaged, or gone meanwhile."""
    found = json.loads(store.get(thing.key, limit=MAX_RECORD))
    if not isinstance(found, dict):
        raise TypeError
    return found


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) and 0 <= value < 1 << 40 else 0.0


def _files(begun: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The files that a job was to write. Names that are no shards, or lead elsewhere, are not believed."""
    said = begun.get("files")
    for one in said if isinstance(said, list) else []:
        match one:
            case [str(key), int(size)] if is_key(key) and key.endswith(".safetensors"):
                if not key.startswith(manifest.PRIVATE) or key == manifest.KEPT:
                    yield key, size


def _uploads(store: Store, notes: list[str]) -> Iterator[Leftover]:
    try:
        for number, left in enumerate(store.unfinished()):
            if number == MOST:
                notes.append(f"{store.uri} has more than {MOST} unfinished uploads: once these are gone, look again")
                return
            yield Leftover("upload", left.key, left.size, left.since, upload=left)
    except AccessDenied as error:
        notes.append(f"unfinished uploads cannot be looked for: {error}")


def _removed(store: Store, found: list[Leftover]) -> list[Leftover]:
    """Remove what is old; shards only if nothing has become complete meanwhile."""
    done = []
    complete: bool | None = None
    for one in found:
        gone = one.old
        if one.old and one.kind == "shard":
            complete = any(_marks(thing.key) for thing in store.list()) if complete is None else complete
            gone = not complete
        if gone and one.upload is not None:
            store.discard(one.upload)
        elif gone:
            store.delete(one.key)
        done.append(Leftover(one.kind, one.key, one.size, one.since, one.job, one.old, gone, one.upload))
    return done
