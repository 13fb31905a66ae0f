"""A folder as a store: files that are whole, durable and swept up after.

::

    create ── sweep once ── <root>/.shardtool/tmp/..., locked and with its space reserved
                 write* ──> pwrite; past the page cache if the file is large and the disk local (Output)
                commit  ──> fsync ── rename over the key | link to it if exclusive ── fsync of the folder
                 abort  ──> unlink

    readinto ── a file opened before, if it is still the one at that path ── straight into the view (Reader)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from shardtool.errors import AccessDenied, AlreadyExists, FormatError, NotFound, ShardtoolError, StoreError, UsageError
from shardtool.stores.base import CheckedWriter, Object, Store, Unfinished, check_key, is_key, target
from shardtool.stores.local import temporary
from shardtool.stores.local.direct import BUFFER, MOST_AT_ONCE, Buffers, Output, Reader
from shardtool.stores.local.files import DISKS, OpenFiles, expect_file, kind_of
from shardtool.stores.local.residency import LIBRARY

_PRIVATE = ".shardtool"
_TEMPORARY = temporary.FOLDER

# Bytes from which on a file is written past the page cache.
_LARGE_FILE = 4 << 20

# How often a folder is made again that somebody else removes, as empty, before it is used.
_TRIES = 20

_NO_SUCH_THING = (errno.ENOENT, errno.ENOTDIR)
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

T = TypeVar("T")


class LocalStore(Store):
    """The files below a folder, which is made when something is created in it; up to ``open_files`` stay open.

    What is not in the page cache of a local disk is read past it (O_DIRECT), and large files are written past it. With
    ``direct`` False nothing is, and with True everything, whatever its size, where the file system takes it. No copy
    is made where the address of the memory and the offset in the file leave the same rest modulo 4096.
    """

    remote = False

    def __init__(self, root: str | os.PathLike[str], *, open_files: int = 64, direct: bool | None = None) -> None:
        self.uri = os.fspath(root)
        self._root = os.path.abspath(self.uri)
        self._files = OpenFiles(open_files)
        self._direct = direct if hasattr(os, "O_DIRECT") and hasattr(os, "pwritev") else False
        self._reader = Reader(self._direct)
        self._buffers = Buffers(BUFFER)
        self._sweeping = threading.Lock()
        self._swept = False
        self._begun: set[str] = set()  # names of temporary files that are neither published nor dropped
        if os.path.exists(self._root) and not os.path.isdir(self._root):
            raise UsageError(f"{self.uri} is a file: name the folder that it lies in")

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The files whose key starts with ``prefix``; links are followed, temporary files are hidden."""
        self._expect_root()
        return _walk(self._root, "", prefix, ())

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such file."""
        path = self._path(key)
        with self._explained(key):
            info = os.stat(path)
            expect_file(path, info)
        return Object(key, info.st_size, str(info.st_mtime_ns))

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view`` from the file that is at this path now."""
        memory = target(start, view)
        path = self._path(key)
        if not memory:
            return
        try:
            file = self._files.borrow(path)
            try:
                if self._reader.fill(file, start, memory) < len(memory):
                    size, end = os.fstat(file.fd).st_size, start + len(memory)
                    raise FormatError(f"{self.locate(key)} ends at byte {size}, before byte {end}")
            finally:
                self._files.give_back(file)
        except OSError as error:
            raise self._explain(error, key) from error

    def borrow(self, key: str) -> mmap.mmap:
        """The file mapped, privately. Where it is cut short later, looking at what is gone ends the process."""
        path = self._path(key)
        try:
            file = self._files.borrow(path)
            try:
                size = os.fstat(file.fd).st_size
                return mmap.mmap(file.fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
            finally:
                self._files.give_back(file)
        except OSError as error:
            raise self._explain(error, key) from error
        except ValueError:
            raise FormatError(f"{self.locate(key)} is empty, so that there is nothing to borrow") from None

    def create(self, key: str, size: int, *, exclusive: bool = False) -> LocalWriter:
        """Begin a file of exactly ``size`` bytes. Its space is reserved, so a full disk shows here where it can."""
        path = self._path(key)
        self._expect_inside(key)
        return LocalWriter(self, key, path, size, exclusive=exclusive)

    def held(self, size: int) -> int:
        """The buffer in which a file that is written past the page cache gathers what is small."""
        return BUFFER if self._past_the_cache(size) else 0

    def reading(self, threads: int) -> int:
        """A few spare pages for each, into which goes what is read beside a view."""
        return self._reader.takes(threads)

    def place(self) -> str:
        """The folder's real path."""
        return os.path.realpath(self._root)

    def delete(self, key: str) -> None:
        """Remove a file, and the folders that it leaves empty; one that is not there is not an error."""
        path = self._path(key)
        self._expect_inside(key)
        try:
            os.unlink(path)
        except OSError as error:
            if error.errno in _NO_SUCH_THING:
                return
            raise _translated(error, self.locate(key), writing=True) from error
        folder = os.path.dirname(path)
        with contextlib.suppress(OSError):
            while folder != self._root:
                os.rmdir(folder)
                folder = os.path.dirname(folder)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """The temporary files. The next writer sweeps those of dead processes of this machine anyway."""
        return temporary.unfinished(os.path.join(self._root, _TEMPORARY), prefix)

    def discard(self, left: Unfinished) -> None:
        """Remove a temporary file. Who was writing it cannot commit it any more."""
        if is_key(left.name) and "/" not in left.name:
            with self._explained(left.key, writing=True), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(os.path.join(self._root, _TEMPORARY, left.name))
            self._tidy()

    def close(self) -> None:
        """Close the files that are kept open for reading, and drop what was begun but neither committed nor aborted.

        An interrupt can come between the making of a file and whoever would abort it. The store can still be used.
        """
        self._files.close()
        self._reader.close()
        self._buffers.clear()
        for name in list(self._begun):
            self._forget(name)
        self._tidy()

    def _past_the_cache(self, size: int) -> bool:
        """Whether a file of ``size`` bytes is written past the page cache, if its file system takes that."""
        return self._direct is not False and size >= (1 if self._direct else _LARGE_FILE)

    def _path(self, key: str) -> str:
        check_key(key)
        if key == _TEMPORARY or key.startswith(_TEMPORARY + "/"):
            raise UsageError(f"{self.locate(key)} is where temporary files are: choose another name")
        return os.path.join(self._root, key)

    def _expect_root(self) -> None:
        if not os.path.isdir(self._root):
            raise NotFound(f"the folder {self.uri} does not exist")

    def _expect_inside(self, key: str) -> None:
        """A link to a folder elsewhere must not turn a name inside the store into a file outside it."""
        root = os.path.realpath(self._root)
        folder = os.path.realpath(os.path.dirname(os.path.join(self._root, key)))
        if os.path.commonpath((root, folder)) != root:
            raise UsageError(f"{self.locate(key)} is behind a link that leaves {self.uri}: nothing is changed there")

    @contextlib.contextmanager
    def _explained(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._explain(error, key, writing=writing) from error

    def _explain(self, error: OSError, key: str, *, writing: bool = False) -> ShardtoolError:
        if not writing and error.errno in _NO_SUCH_THING:
            self._expect_root()
        return _translated(error, self.locate(key), writing=writing)

    def _temporary(self, key: str) -> tuple[int, str]:
        """Open a new temporary file and lock it."""
        folder = os.path.join(self._root, _TEMPORARY)
        with self._sweeping:
            if not self._swept:
                temporary.sweep(folder)
                self._swept = True

        def attempt() -> tuple[int, str] | None:
            name = temporary.new_name(key)
            path = os.path.join(folder, name)
            temporary.writing.add(name)
            self._begun.add(name)
            try:
                _make_folders(folder)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except OSError:
                self._forget(name)
                raise
            # A file system without locks still works: nothing can be locked there for sweeping either.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd, path
            # Another process swept the file in the moment before it was locked.
            os.close(fd)
            self._forget(name)
            return None

        return _insistently(attempt)

    def _forget(self, name: str) -> None:
        """Remove a temporary file."""
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._root, _TEMPORARY, name))
        self._begun.discard(name)
        temporary.writing.discard(name)

    def _tidy(self) -> None:
        """Remove the folders for temporary files if nobody uses them."""
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(self._root, _TEMPORARY))
            os.rmdir(os.path.join(self._root, _PRIVATE))


class LocalWriter(CheckedWriter):
    """Writes one file under a temporary name."""

    def __init__(self, store: LocalStore, key: str, path: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store.locate(key), size)
        self._store = store
        self._key = key
        self._path = path
        self._exclusive = exclusive
        with self._explained():
            self._fd, self._temporary = store._temporary(key)
            self._buffer: memoryview | None = None
            self._output: Output | None = None
            try:
                _reserve(self._fd, size)
                if store._past_the_cache(size) and (store._direct or kind_of(self._fd) in DISKS):
                    self._buffer = store._buffers.take()
                    self._output = Output(self._fd, self._buffer)
            except BaseException:
                self._abort()
                raise

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return self._store._explained(self._key, writing=True)

    def _write(self, data: memoryview) -> None:
        done = 0
        with self._explained():
            if self._output:
                self._output.write(data)
                return
            while done < len(data):
                done += os.pwrite(self._fd, data[done : done + MOST_AT_ONCE], self._written + done)

    def _commit(self) -> None:
        with self._explained():
            if self._output:
                self._output.finish()
            _flush(self._fd)
            self._store._expect_inside(self._key)
            for folder in _insistently(self._publish):
                _flush_folder(folder)
        self._discard()

    def _publish(self) -> Sequence[str]:
        """Give the file its name; returns the folders that changed."""
        folder = os.path.dirname(self._path)
        changed = _make_folders(folder)
        if not self._exclusive:
            os.replace(self._temporary, self._path)
        else:
            try:
                os.link(self._temporary, self._path)
            except FileExistsError:
                raise AlreadyExists(f"{self._where} exists already: delete it or choose another name") from None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._rename_if_absent(folder)
        return folder, *changed

    def _rename_if_absent(self, folder: str) -> None:
        """What ``os.link`` does, for file systems without hard links: only this library's writers respect it."""
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.lexists(self._path):
                raise AlreadyExists(f"{self._where} exists already: delete it or choose another name")
            os.replace(self._temporary, self._path)
        finally:
            os.close(fd)

    def _abort(self) -> None:
        self._discard()

    def _discard(self) -> None:
        self._store._forget(os.path.basename(self._temporary))
        os.close(self._fd)
        if self._buffer is not None:
            self._store._buffers.give_back(self._buffer)
            self._buffer = self._output = None
        self._store._tidy()


def _walk(folder: str, base: str, prefix: str, above: tuple[str, ...]) -> Iterator[Object]:
    """The files below ``folder``, whose keys start with ``base``; ``above`` are the folders on the way down to it."""
    real = os.path.realpath(folder)
    if real in above:
        return  # a link back to where we come from
    found: list[tuple[str, int, int]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    info = entry.stat()
                except OSError:
                    continue  # a link to nowhere, or a file that was removed at this moment
                key = base + entry.name
                if stat.S_ISDIR(info.st_mode) and key != _TEMPORARY:
                    key += "/"
                    wanted = key.startswith(prefix) or prefix.startswith(key)
                else:
                    wanted = stat.S_ISREG(info.st_mode) and key.startswith(prefix)
                if wanted and is_key(entry.name):
                    found.append((key, info.st_size, info.st_mtime_ns))
    except FileNotFoundError:
        return
    except OSError as error:
        raise _translated(error, folder, writing=False) from error
    # With its slash a folder sorts where the keys in it belong: "a.b" comes before "a/b".
    for key, size, changed in sorted(found):
        if key.endswith("/"):
            yield from _walk(os.path.join(folder, key[len(base) : -1]), key, prefix, (*above, real))
        else:
            yield Object(key, size, str(changed))


def _insistently(attempt: Callable[[], T | None]) -> T:
    """What ``attempt`` gives, tried again while folders vanish under it: others remove them when they are empty."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):
            result = attempt()
            if result is not None:
                return result
    result = attempt()
    if result is None:
        raise FileNotFoundError(errno.ENOENT, "others keep removing the temporary file")
    return result


def _reserve(fd: int, size: int) -> None:
    """Take the space on the disk now, where the platform and the file system can."""
    # Not os.posix_fallocate, which writes to every block where the file system cannot reserve.
    while size and LIBRARY and LIBRARY.fallocate(fd, 0, 0, size):
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code not in _NOT_SUPPORTED:
            raise OSError(code, os.strerror(code))
        return


def _flush(fd: int) -> None:
    """Bring a file's bytes to the disk; on macOS ``fsync`` alone leaves them in the drive's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def _flush_folder(path: str) -> None:
    """Bring a folder's names to the disk. One that is gone was emptied since, and has none to lose."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(fd)


def _make_folders(folder: str) -> list[str]:
    """Make a folder and those above it; returns the folders that thereby got a new entry."""
    missing = folder
    changed: list[str] = []
    while not os.path.isdir(missing):
        missing = os.path.dirname(missing)
        changed.append(missing)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        if os.path.lexists(folder):
            raise
        raise FileNotFoundError(errno.ENOENT, "removed while it was made", folder) from None
    return changed


def _translated(error: OSError, where: str, *, writing: bool) -> ShardtoolError:
    """The error of shardtool that an error of the operating system means at ``where``."""
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR if not writing:
            return NotFound(f"{where} does not exist")
        case errno.EACCES | errno.EPERM:
            deed = "written" if writing else "read"
            return AccessDenied(f"{where} cannot be {deed}: this user lacks the permission")
        case errno.EROFS:
            return AccessDenied(f"{where} cannot be written: it lies on a read-only file system")
        case errno.ENOSPC:
            return StoreError(f"no space left on the disk of {where}: free some or choose another folder")
        case errno.EDQUOT:
            return StoreError(f"no space left on the disk of {where} for this user, whose quota is used up")
        case errno.EFBIG:
            return StoreError(f"no space left on the disk of {where} for a file of this size: see ulimit -f")
        case _:
            deed = "writing" if writing else "reading"
            return StoreError(f"{deed} {where} failed: {error.strerror or error}")
