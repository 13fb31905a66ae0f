"""``pull``: everything of a checkpoint but its weights, brought into a folder, as engines want it before they start.

::

    list the source ── choose ── lock the folder ── copy what is not there yet ── note what came from where
                                       └── others that pull into it wait, and find it done

``.shardtool/pulled`` in the folder says which version of which file was brought, so that a second run brings what has
changed and no more. The lock (``flock``) goes with the process that has it, however that ends. Folders on network file
systems may be locked within one machine only, and where there are no locks there is none: what is written is whole
either way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

from shardtool import manifest as manifests
from shardtool.checkpoint import CONFIG, listed
from shardtool.errors import AccessDenied, FormatError, NotFound, StoreError, UsageError
from shardtool.ops.files import copy
from shardtool.ops.source import side_files
from shardtool.stores import Address
from shardtool.stores.address import shown
from shardtool.stores.base import Object, Store
from shardtool.stores.hub.existing import open_existing
from shardtool.stores.local.store import LocalStore

RECORD = ".shardtool/pulled"
LOCK = ".shardtool/pull.lock"
_OURS = (RECORD, LOCK, ".shardtool/tmp/")
_MOST_RECORD = 256 << 20

Patterns = Collection[str]


@dataclass(frozen=True, slots=True)
class PulledFile:
    """A file that is in the folder now. ``brought``: by this run; otherwise it was there already."""

    key: str
    size: int
    brought: bool


@dataclass(frozen=True, slots=True)
class Pulled:
    """What ``pull`` did. ``waited``: for another process that pulled into the folder."""

    uri: str
    folder: str
    files: tuple[PulledFile, ...]
    waited: bool

    @property
    def brought(self) -> tuple[PulledFile, ...]:
        """The files that this run brought."""
        return tuple(file for file in self.files if file.brought)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A file that was brought: its size, its version in the source, and that of the file here."""

    size: int
    version: str
    here: str


@dataclass(frozen=True, slots=True)
class _Record:
    """What the folder has, from where, and when that was noted (ns since 1970)."""

    source: str = ""
    files: Mapping[str, _Kept] = field(default_factory=dict)
    at: int = 0


def pull(
    uri: Address,
    folder: str | os.PathLike[str],
    *,
    allow: Patterns | None = None,
    ignore: Patterns | None = None,
    manifest: bool = True,
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
) -> Pulled:
    """Bring the files beside a checkpoint's weights into a folder: config, tokenizer, templates, remote code.

    ``uri``: a folder, an address or the id of a model of the hub, of shards or of whole tensors. ``allow``: instead of
    that choice, the files that one of these patterns matches, weights too; ``ignore``: none that one of these does. A
    pattern is matched with the name below ``uri``; ``*`` stands for slashes too, and ``code/`` for all in that folder.
    ``manifest``: with shardtool.json, where there is one. ``concurrency`` and ``memory_limit`` are those of a copy.

    Each file appears in the folder when it is whole, and other files in it stay. A file that was brought before is left
    alone if it has not changed since, neither here nor there. Of processes that pull into one folder at a time one
    works; the others wait for it and find it done.

    Raises ``NotFound`` where nothing lies, and ``UsageError`` for a folder that is not one of this machine.
    """
    if isinstance(folder, Store):
        raise UsageError(f"{folder.uri} is a store: files are pulled into a folder of this machine, name one")
    where = os.fspath(folder)
    if not where or "://" in where:
        raise UsageError(f"{shown(where)!r} is no folder of this machine: files are pulled into a folder")
    choice = _Choice(patterns(allow, "allow"), patterns(ignore, "ignore"), manifest)
    began = time.time_ns()
    with LocalStore(where) as to, open_existing(uri) as source:
        if source.place() == to.place():
            raise UsageError(f"{where} is what is to be pulled from: name another folder")
        chosen = choice.of(_listed(source))
        with _locked(where) as waited:
            record = _read(to)
            known = dict(record.files) if record.source == source.place() else {}
            # A store that tells no versions can have changed at any time, but hardly while we waited.
            fresh = waited and record.at >= began
            wanted = [thing for thing in chosen if not _is_there(to, thing, known.get(thing.key), fresh=fresh)]

            def note(thing: Object) -> None:
                known[thing.key] = _Kept(thing.size, thing.version, to.stat(thing.key).version)

            try:
                copy(source, to, wanted, concurrency=concurrency, memory_limit=memory_limit, done=note)
            finally:
                if wanted:
                    made = _Record(source.place(), known, time.time_ns())
                    to.put(RECORD, json.dumps(asdict(made)).encode())
    brought = {thing.key for thing in wanted}
    files = tuple(PulledFile(thing.key, thing.size, thing.key in brought) for thing in chosen)
    return Pulled(source.uri, where, files, waited)


def patterns(given: object, name: str) -> tuple[str, ...] | None:
    """Patterns, or None. Raises ``UsageError`` for a single text, whose letters would be the patterns."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Collection) or not all(isinstance(one, str) for one in given):
        raise UsageError(f"{name}={given!r:.60} is not a list of patterns: write for example ['*.json']")
    return tuple(given)


def matching(key: str, given: Iterable[str]) -> bool:
    """Whether one of some patterns matches a name; ``*`` stands for slashes too, and a folder for all that is in it."""
    return any(fnmatchcase(key, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in given)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which files are meant."""

    allow: tuple[str, ...] | None
    ignore: tuple[str, ...] | None
    manifest: bool

    def of(self, objects: Sequence[Object]) -> list[Object]:
        """The files that are meant among those that are there."""
        if self.allow is None:
            side, large = side_files(objects)
            beside = {thing.key for thing in (*side, *large)} | {CONFIG, manifests.KEY}
            found = [thing for thing in objects if thing.key in beside]
        else:
            found = [thing for thing in objects if matching(thing.key, self.allow)]
        return [
            thing
            for thing in found
            if not thing.key.startswith(_OURS)
            and not matching(thing.key, self.ignore or ())
            and (self.manifest or thing.key != manifests.KEY)
        ]


def _listed(source: Store) -> list[Object]:
    """What the source has."""
    found = listed(source)
    if not found:
        raise NotFound(f"{source.uri} holds nothing: check the address")
    return found


def _is_there(to: Store, thing: Object, kept: _Kept | None, *, fresh: bool) -> bool:
    """Whether a file was brought in this version, and is still as it was then. ``fresh``: it was brought just now."""
    if kept is None or (thing.size, thing.version) != (kept.size, kept.version) or not (thing.version or fresh):
        return False
    try:
        here = to.stat(thing.key)
    except (NotFound, UsageError):
        return False
    return (here.size, here.version) == (kept.size, kept.here)


def _read(to: Store) -> _Record:
    """What an earlier run noted; nothing if there was none, or it cannot be understood."""
    try:
        said = json.loads(to.get(RECORD, limit=_MOST_RECORD))
        files = {
            str(key): _Kept(int(one["size"]), str(one["version"]), str(one["here"]))
            for key, one in said["files"].items()
        }
        return _Record(str(said["source"]), files, int(said["at"]))
    except (NotFound, FormatError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return _Record()


@contextmanager
def _locked(folder: str) -> Iterator[bool]:
    """Keep other processes out of a folder, which is made; gives whether that took waiting."""
    path = os.path.join(folder, LOCK)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        kind = AccessDenied if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else StoreError
        raise kind(f"{folder} cannot be written to: {error.strerror}") from error
    try:
        waited = False
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield waited
    finally:
        os.close(fd)
