"""Any file system that fsspec knows, for addresses that no store of shardtool's own opens: SFTP, SMB, HDFS, WebDAV ...

::

    create ── <root>/.shardtool/tmp/<mark>-<key> ── write* ── commit: rename over the key, or copy and remove
           └─ where neither can be done: the object is held in memory and written in one go

    readinto ── pieces of 4 MiB through a line
    line     ── a file system of fsspec's, which is one connection and for one thread at a time

fsspec has no condition for creating a file, so ``conditional`` is False: of writers that meet the last one wins. What
is written is visible whole or not at all if renaming is atomic there, as it is with SFTP.
"""

from __future__ import annotations

import contextlib
import posixpath
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TypeVar

from shardtool.errors import (
    AlreadyExists,
    FormatError,
    NotFound,
    ShardtoolError,
    StoreError,
    Unavailable,
    UsageError,
)
from shardtool.stores.address import scheme_of, shown
from shardtool.stores.base import CheckedWriter, Object, Store, Unfinished, check_key, is_key, target
from shardtool.stores.fsspec.errors import not_opened, translated
from shardtool.stores.local import temporary
from shardtool.stores.wire.retry import Again

_PIECE = 4 << 20
_REQUEST = 32 << 10  # bytes of one request of SFTP
_LINES = 8
_SILENCE = 60.0  # seconds after which a server of SFTP that says nothing is given up
_DEEPEST = 64
_TRIES = 20

T = TypeVar("T")


def installed() -> bool:
    """Whether fsspec is there."""
    try:
        import fsspec  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def knows(scheme: str) -> bool:
    """Whether fsspec is there and has a file system for these addresses, be it with another library to install."""
    if not installed():
        return False
    from fsspec.registry import known_implementations, registry

    return scheme in known_implementations or scheme in registry


class RemoteStore(Store):
    """The files below an address of fsspec's. ``lines``: connections at most; ``again``: how often reads are tried."""

    conditional = False

    def __init__(self, uri: str, *, lines: int = _LINES, again: Again = Again()) -> None:  # noqa: B008
        self.uri = shown(uri).rstrip("/")
        self._address = uri
        self._again = again
        self._most = lines
        self._lines: list[_Line] = []
        self._lock = threading.Lock()
        self._turn = 0
        self._root, self._moves = "", False
        self._lines.append(self._connect())
        fs = self._lines[0].fs
        self._moves = _own(fs, "mv") or _own(fs, "cp_file") or _own(fs, "_cp_file")

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The files whose key starts with ``prefix``; links to files are followed, to folders they are not."""
        found = self._tried("", lambda line: list(line.walk(self._root, "", prefix)))
        return iter(sorted(found, key=lambda thing: thing.key))

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such file."""
        path = self._path(key)
        return self._tried(key, lambda line: _object(key, line.file(path)))

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view`` from ``start``, piece by piece."""
        memory = target(start, view)
        path = self._path(key)
        for at in range(0, len(memory), _PIECE):
            piece = memory[at : at + _PIECE]
            got = self._tried(key, lambda line, at=at, piece=piece: line.read(path, start + at, piece))  # type: ignore[misc]
            if got < len(piece):
                size, end = self.stat(key).size, start + len(memory)
                raise FormatError(f"{self.locate(key)} ends at byte {size}, before byte {end}")

    def create(self, key: str, size: int, *, exclusive: bool = False) -> CheckedWriter:
        """Begin a file of exactly ``size`` bytes."""
        path = self._path(key)
        if self._moves:
            return _MovingWriter(self, key, path, size, exclusive=exclusive)
        return _HeldWriter(self, key, path, size, exclusive=exclusive)

    def delete(self, key: str) -> None:
        """Remove a file, and the folders that it leaves empty; one that is not there is not an error."""
        path = self._path(key)
        with contextlib.suppress(NotFound):
            self.tried_once(key, lambda line: line.remove(path))
            self.tried_once(key, lambda line: line.tidy(posixpath.dirname(path), self._root))

    def held(self, size: int) -> int:
        """The whole object, where it cannot be renamed."""
        return 0 if self._moves else size

    def reading(self, threads: int) -> int:
        """A piece for each connection, as fsspec gives it."""
        return _PIECE * min(threads, self._most)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """The temporary files. Whether somebody still writes one only its age tells."""
        folder = posixpath.join(self._root, temporary.FOLDER)
        for name, info in self._tried("", lambda line: line.names(folder)):
            key = temporary.key_of(name)
            if key is not None and key.startswith(prefix):
                yield Unfinished(key, name, _changed(info), int(info.get("size") or 0))

    def discard(self, left: Unfinished) -> None:
        """Remove a temporary file."""
        if temporary.key_of(left.name) is not None and is_key(left.name) and "/" not in left.name:
            path = posixpath.join(self._root, temporary.FOLDER, left.name)
            with contextlib.suppress(NotFound):
                self.tried_once(left.key, lambda line: line.remove(path))

    def close(self) -> None:
        """Close the connections. They are made again if the store is used again."""
        with self._lock:
            lines, self._lines = self._lines, []
        for line in lines:
            with contextlib.suppress(Exception):  # it may have ended meanwhile, in a way that only its library knows
                if line is lines[0]:
                    line.tidy(f"{self._root}/{temporary.FOLDER}", self._root)
            line.close()

    def line(self) -> _Line:
        """A connection: one that nobody uses, a new one, or the next in turn."""
        with self._lock:
            for line in self._lines:
                if not line.lock.locked():
                    return line
            if len(self._lines) >= self._most:
                self._turn += 1
                return self._lines[self._turn % len(self._lines)]
        line = self._connect()
        with self._lock:
            self._lines.append(line)
        return line

    def tried_once(self, key: str, call: Callable[[_Line], T], line: _Line | None = None) -> T:
        """One attempt, with shardtool's errors. A connection that broke is not used again."""
        line = line or self.line()
        with line.lock:
            try:
                return call(line)
            except ShardtoolError:
                raise
            except Exception as error:
                found = translated(error, self.locate(key) if key else self.uri)
                if isinstance(found, Unavailable):
                    self._drop(line)
                raise found from error

    def _tried(self, key: str, call: Callable[[_Line], T]) -> T:
        return self._again.run(lambda _: self.tried_once(key, call))

    def _drop(self, line: _Line) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._lines.remove(line)
        line.close()

    def _connect(self) -> _Line:
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {"skip_instance_cache": True}
        if scheme_of(self._address) in ("sftp", "ssh"):
            from shardtool.stores.fsspec.known_hosts import policy

            options["host_key_policy"] = policy(self.uri)
        try:
            fs, path = url_to_fs(self._address, **options)
        except ImportError as error:
            raise UsageError(f"{self.uri} needs another library: {' '.join(str(error).split())}") from error
        except ShardtoolError:
            raise
        except Exception as error:
            raise not_opened(error, self.uri) from error
        self._root = str(path).rstrip("/")
        if channel := getattr(getattr(fs, "ftp", None), "get_channel", None):
            channel().settimeout(_SILENCE)
        return _Line(fs)

    def _path(self, key: str) -> str:
        check_key(key)
        if key == temporary.FOLDER or key.startswith(temporary.FOLDER + "/"):
            raise UsageError(f"{self.locate(key)} is where temporary files are: choose another name")
        return f"{self._root}/{key}"


class _Line:
    """A file system of fsspec's."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self.lock = threading.Lock()

    def file(self, path: str) -> dict[str, Any]:
        """What is known of a file."""
        self.fs.invalidate_cache()
        info = self.followed(path, self.fs.info(path))
        if info.get("type") != "file" or info.get("size") is None:
            raise FileNotFoundError(path)
        return info

    def followed(self, path: str, info: dict[str, Any]) -> dict[str, Any]:
        """What is known of a file; of a link to a file, what is known of that."""
        if info.get("type") in ("file", "directory"):
            return info
        with contextlib.suppress(FileNotFoundError):
            info = self.fs.info(path)
            return info if info["type"] != "other" or not self.fs.isfile(path) else {**info, "type": "file"}
        return info

    def names(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        """The names in a folder, without those that lead elsewhere; none if it is not there."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        named = ((str(info["name"]).rstrip("/").rpartition("/")[2], info) for info in found)
        return [(name, info) for name, info in named if is_key(name)]

    def walk(self, folder: str, base: str, prefix: str, depth: int = 0) -> Iterator[Object]:
        """The files below a folder whose keys start with ``base``."""
        for name, info in self.names(folder):
            path, key = f"{folder}/{name}", base + name
            if info.get("type") == "directory":
                wanted = f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/")
                if wanted and key != temporary.FOLDER and depth < _DEEPEST:
                    yield from self.walk(path, f"{key}/", prefix, depth + 1)
            elif key.startswith(prefix) and (info := self.followed(path, info)).get("type") == "file":
                yield _object(key, info)

    def read(self, path: str, start: int, memory: memoryview) -> int:
        """Bytes from ``start`` into ``memory``, fewer where the file ends."""
        if not _own(self.fs, "cat_file") and not _own(self.fs, "_cat_file"):
            with self.fs.open(path, "rb") as file:
                if hasattr(file, "readv"):  # SFTP: many requests at once
                    return self._pipelined(file, start, memory)
                file.seek(start)
                data = file.read(len(memory))
        else:
            data = self.fs.cat_file(path, start=start, end=start + len(memory))
        memory[: len(data)] = data
        return len(data)

    def _pipelined(self, file: Any, start: int, memory: memoryview) -> int:
        end = min(start + len(memory), file.stat().st_size)
        asked = [(at, min(_REQUEST, end - at)) for at in range(start, end, _REQUEST)]
        done = 0
        for data in file.readv(asked):
            memory[done : done + len(data)] = data
            done += len(data)
        return done

    def remove(self, path: str) -> None:
        """Remove a file."""
        self.file(path)
        self.fs.rm_file(path)

    def tidy(self, folder: str, root: str) -> None:
        """Remove a folder and those above it while they are empty, up to the root, which stays."""
        with contextlib.suppress(OSError, NotImplementedError):
            while folder.startswith(f"{root}/"):
                self.fs.invalidate_cache()
                if self.fs.ls(folder, detail=False):
                    return
                self.fs.rmdir(folder)
                folder = posixpath.dirname(folder)

    def folder(self, path: str) -> None:
        """Make a folder and those above it, unless they are there, or are only parts of names."""
        for turn in range(_TRIES):
            try:
                if not self.fs.isdir(path):
                    self.fs.makedirs(path, exist_ok=True)
            except NotImplementedError:
                return
            except OSError:  # somebody else makes or removes one of them at this moment
                if turn == _TRIES - 1:
                    raise
            else:
                return

    def move(self, old: str, new: str) -> None:
        """Give a file another name, at once where the file system can."""
        if _own(self.fs, "mv"):
            self.fs.mv(old, new)
        else:
            self.fs.cp_file(old, new)
            self.fs.rm_file(old)

    def close(self) -> None:
        """End the connection, as far as fsspec lets one."""
        for name in ("ftp", "client"):
            if close := getattr(getattr(self.fs, name, None), "close", None):
                with contextlib.suppress(Exception):
                    close()


class _RemoteWriter(CheckedWriter):
    def __init__(self, store: RemoteStore, key: str, path: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store.locate(key), size)
        self._store = store
        self._key = key
        self._path = path
        self._exclusive = exclusive

    def _expect_free(self) -> None:
        """Refuse an exclusive object that is there already. Another writer may still come in between."""
        if self._exclusive and self._store.exists(self._key):
            raise AlreadyExists(f"{self._where} exists already: delete it or choose another name")


class _MovingWriter(_RemoteWriter):
    """Writes a temporary file and renames it."""

    def __init__(self, store: RemoteStore, key: str, path: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store, key, path, size, exclusive=exclusive)
        self._temporary = f"{store._root}/{temporary.FOLDER}/{temporary.new_name(key)}"
        self._line = store.line()
        self._file: Any = self._on_line(self._opened)

    def _on_line(self, call: Callable[[_Line], T]) -> T:
        return self._store.tried_once(self._key, call, self._line)

    def _opened(self, line: _Line) -> Any:
        line.folder(posixpath.dirname(self._temporary))
        file = line.fs.open(self._temporary, "wb")
        if hasattr(file, "set_pipelined"):
            file.set_pipelined(True)
        return file

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._on_line(lambda _, piece=piece: self._file.write(piece))  # type: ignore[misc]

    def _commit(self) -> None:
        self._on_line(lambda _: self._file.close())
        if (size := self._on_line(lambda line: int(line.file(self._temporary)["size"]))) != self._size:
            raise StoreError(f"{self._where} was written with {self._size} bytes and has {size}: try again")
        self._expect_free()
        self._on_line(self._publish)

    def _publish(self, line: _Line) -> None:
        # Who deletes removes folders that are empty, while others are about to use them; and some servers rename in
        # several steps, which fail when another writer of this key takes them.
        for turn in range(_TRIES):
            try:
                line.folder(posixpath.dirname(self._path))
                line.move(self._temporary, self._path)
            except OSError:
                # Then it was renamed all the same, and replaced at once. Another try would only remove what is there.
                if self._gone(line):
                    self._expect_none(line)
                    raise StoreError(
                        f"what was written of {self._where} has been removed meanwhile: write it again"
                    ) from None
                if turn == _TRIES - 1:
                    raise
                time.sleep(0.01 * turn)
            else:
                return

    def _gone(self, line: _Line) -> bool:
        """Whether there is no temporary file any more. Some servers say that there is until it is read."""
        try:
            line.file(self._temporary)
            return line.read(self._temporary, 0, memoryview(bytearray(min(1, self._size)))) < min(1, self._size)
        except OSError as error:
            return isinstance(error, FileNotFoundError) or "no such file" in str(error).lower()

    def _expect_none(self, line: _Line) -> None:
        """Refuse an exclusive object where another writer's is there, or comes within a moment."""
        for turn in range(_TRIES if self._exclusive else 0):
            with contextlib.suppress(FileNotFoundError):
                line.file(self._path)
                raise AlreadyExists(f"{self._where} exists already: delete it or choose another name") from None
            time.sleep(0.01 * turn)

    def _abort(self) -> None:
        with contextlib.suppress(ShardtoolError):
            self._on_line(lambda _: self._file.close())
        with contextlib.suppress(ShardtoolError):
            self._store.tried_once(self._key, lambda line: line.remove(self._temporary))


class _HeldWriter(_RemoteWriter):
    """Keeps the object in memory and writes it in one go."""

    def __init__(self, store: RemoteStore, key: str, path: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store, key, path, size, exclusive=exclusive)
        self._data = bytearray(size)

    def _write(self, data: memoryview) -> None:
        self._data[self._written : self._written + len(data)] = data

    def _commit(self) -> None:
        self._expect_free()
        self._store.tried_once(self._key, self._publish)
        self._data = bytearray()

    def _publish(self, line: _Line) -> None:
        line.folder(posixpath.dirname(self._path))
        line.fs.pipe_file(self._path, bytes(self._data))

    def _abort(self) -> None:
        self._data = bytearray()


def _own(fs: Any, name: str) -> bool:
    """Whether a file system does this itself, not as fsspec's base does it."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    mine = getattr(type(fs), name, None)
    return mine is not None and mine not in (
        getattr(AbstractFileSystem, name, None),
        getattr(AsyncFileSystem, name, None),
    )


def _object(key: str, info: dict[str, Any]) -> Object:
    version = next((str(info[name]) for name in ("ETag", "etag", "mtime", "LastModified") if info.get(name)), "")
    return Object(key, int(info["size"]), version)


def _changed(info: dict[str, Any]) -> float:
    """When a file was written last, or 0."""
    for name in ("mtime", "created", "LastModified", "last_modified"):
        found = info.get(name)
        if isinstance(found, datetime):
            return found.timestamp()
        if isinstance(found, int | float):
            return float(found)
    return 0.0
