"""``clean``: what killed jobs left in an output, and its removal.

::

    records     .shardtool/<fingerprint>/   of a job that has not ended, or of one that ended while it tidied up
    shards      files that such a job had finished, where nothing marks a complete checkpoint
    uploads     what writers had begun: multipart uploads, temporary files

A complete checkpoint is never touched, nor is what is younger than it must be: somebody may be at work on it. What has
no age that can be told counts as young.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shardtool import manifest
from shardtool.errors import AccessDenied, ShardtoolError
from shardtool.ops.output import JOB, MAX_RECORD
from shardtool.stores import Address, open_store
from shardtool.stores.base import Object, Store, Unfinished, is_key
from shardtool.units import parse_duration

OLD = "1d"
_INDEX = ".safetensors.index.json"
_MOST_JOBS = 10_000


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


def clean(uri: Address, *, yes: bool = False, older_than: int | float | str = OLD) -> Cleaned:
    """Find what killed jobs left at ``uri``, and remove it if ``yes``.

    ``older_than``: how long ago its last sign of life must be, in seconds or a text such as ``12h``; 0 takes what has
    no age, and what somebody may be writing at this moment, whose job then fails. Raises ``NotFound`` where nothing
    lies.
    """
    least = parse_duration(older_than, "--older-than")
    with open_store(uri) as store:
        objects = {thing.key: thing for thing in store.list()}
        complete = _marked(objects)
        notes: list[str] = []
        found = [*_of_jobs(store, objects, complete), *_uploads(store, notes)]
        now = time.time()
        found = [_aged(one, now, least) for one in found]
        if yes:
            found = _removed(store, found)
        return Cleaned(store.uri, complete, tuple(found), tuple(notes))


def _marked(keys: Mapping[str, Object]) -> bool:
    """Whether something says that a checkpoint is complete here."""
    return manifest.KEY in keys or any("/" not in key and key.endswith(_INDEX) for key in keys)


def _aged(one: Leftover, now: float, least: float) -> Leftover:
    old = now - one.since >= least if one.since else least <= 0
    return Leftover(one.kind, one.key, one.size, one.since, one.job, old, upload=one.upload)


def _of_jobs(store: Store, objects: Mapping[str, Object], complete: bool) -> Iterator[Leftover]:
    """The records of jobs, and their shards where nothing is complete; a job's shards come before its records."""
    jobs: dict[str, list[Object]] = {}
    for key, thing in objects.items():
        if key.startswith(manifest.PRIVATE) and key.count("/") > 1:
            jobs.setdefault(key.split("/")[1], []).append(thing)
    for name, things in sorted(jobs.items())[:_MOST_JOBS]:
        own = f"{manifest.PRIVATE}{name}/{JOB}"
        said = {thing.key: _said(store, thing) for thing in things}
        since = max((_number(one.get("at")) for one in said.values()), default=0.0)
        begun = said.get(own, {})
        what = begun["what"] if isinstance(begun.get("what"), str) else ""
        if not complete:
            for key, size in _files(begun):
                if (there := objects.get(key)) is not None and there.size == size:
                    yield Leftover("shard", key, size, since, what)
        for thing in sorted(things, key=lambda thing: (thing.key == own, thing.key)):  # whose they are is told last
            yield Leftover("record", thing.key, thing.size, since, what)


def _said(store: Store, thing: Object) -> dict[str, Any]:
    """What a record says; nothing where it is damaged, or gone meanwhile."""
    try:
        found = json.loads(store.get(thing.key, limit=MAX_RECORD))
    except AccessDenied:
        raise
    except (ShardtoolError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
        for left in store.unfinished():
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
            complete = _marked({thing.key: thing for thing in store.list()}) if complete is None else complete
            gone = not complete
        if gone and one.upload is not None:
            store.discard(one.upload)
        elif gone:
            store.delete(one.key)
        done.append(Leftover(one.kind, one.key, one.size, one.since, one.job, one.old, gone, one.upload))
    return done
