"""Files kept open for reading, each with all that a reader needs to know of it.

::

    OpenFiles ── borrow ──> OpenFile     fd       for reads through the page cache
                              │          kind     what its file system is good for
                              │          direct   another descriptor of the same file, past the page cache
                              └────────  cached   whether a range of it is in memory

What costs a system call is found out when it is first asked for, which only large reads do.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from enum import Enum

from shardtool.stores.local import residency


class Kind(Enum):
    """What a file system is good for."""

    DISK = "a local disk: what is not in memory is best read past the page cache"
    LAYERS = "the same most of the time, but the pages belong to the files below, and cannot be counted"
    MEMORY = "all its files are in memory"
    OTHER = "a network, or something else that knows better than we do"


DISKS = (Kind.DISK, Kind.LAYERS)
"""Where O_DIRECT pays."""

_KINDS = {
    **dict.fromkeys(("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs"), Kind.DISK),
    **dict.fromkeys(("tmpfs", "ramfs"), Kind.MEMORY),
    "overlay": Kind.LAYERS,
}


def kind_of(fd: int) -> Kind:
    """What the file system of an open file is good for."""
    return _KINDS.get(residency.filesystem(fd), Kind.OTHER)


class OpenFile:
    """A file that is open; what ``OpenFiles`` lends."""

    __slots__ = ("_direct", "_kind", "_lock", "_probe", "_told", "fd", "identity", "retired", "users")

    def __init__(self, fd: int, identity: tuple[int, int]) -> None:
        self.fd = fd
        self.identity = identity
        self.users = 1
        self.retired = False
        self._lock = threading.Lock()
        self._kind: Kind | None = None
        self._told: bool | None = None
        self._direct = _Another()
        self._probe = _Another()

    @property
    def kind(self) -> Kind:
        """What its file system is good for."""
        if self._kind is None:
            self._kind = kind_of(self.fd)
        return self._kind

    def direct(self) -> int | None:
        """A descriptor for reads past the page cache; None if there is none or it was refused."""
        return self._direct.get(self.fd, os.O_DIRECT, self._lock)

    def refuse(self) -> None:
        """Direct reads have failed: there shall be no more of them."""
        self._direct.refused = True

    def cached(self, start: int, size: int) -> bool:
        """Whether most of ``size`` bytes from ``start`` are in the page cache, as far as can be told."""
        layers = self.kind is Kind.LAYERS
        answer = None if layers else residency.counted(self.fd, start, size)
        if answer is None:
            if self._told is None:
                self._told = residency.is_told(self.fd)
            answer = residency.mapped(self.fd, start, size) if self._told else None
        if answer is None and hasattr(os, "RWF_NOWAIT"):
            probe = self._probe.get(self.fd, 0, self._lock, os.POSIX_FADV_RANDOM)
            answer = None if probe is None else residency.probed(probe, start, size)
        return layers if answer is None else answer

    def close(self) -> None:
        """Close all descriptors."""
        for fd in (self._direct.fd, self._probe.fd, self.fd):
            if fd is not None:
                os.close(fd)


class _Another:
    """A second descriptor of an open file, made when it is first wanted."""

    __slots__ = ("fd", "refused")

    def __init__(self) -> None:
        self.fd: int | None = None
        self.refused = False

    def get(self, fd: int, flags: int, lock: threading.Lock, advice: int | None = None) -> int | None:
        """The descriptor, or None if it cannot be made or was refused."""
        if self.fd is None:
            with lock:
                self._make(fd, flags, advice)
        return None if self.refused else self.fd

    def _make(self, fd: int, flags: int, advice: int | None) -> None:
        if self.fd is not None or self.refused:
            return
        try:
            # Not by its path, where another file may be by now.
            self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | flags)
            if advice is not None:
                os.posix_fadvise(self.fd, 0, 0, advice)
        except OSError:
            self.refused = True


class OpenFiles:
    """Files kept open for reading, the least recently used closed first; none is closed while somebody reads it."""

    def __init__(self, limit: int) -> None:
        self._limit = max(1, limit)
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def borrow(self, path: str) -> OpenFile:
        """The file that is at ``path`` now, even if another one was there before; to be given back."""
        info = os.stat(path)
        expect_file(path, info)
        return self._kept(path, (info.st_dev, info.st_ino)) or self._opened(path)

    def give_back(self, file: OpenFile) -> None:
        """End a loan."""
        with self._lock:
            file.users -= 1
            if file.retired and not file.users:
                file.close()

    def __del__(self) -> None:
        self.close()  # of a store that nobody closed

    def close(self) -> None:
        """Close every file as soon as nobody reads it."""
        with self._lock:
            while self._files:
                self._retire(self._files.popitem()[1])

    def _kept(self, path: str, identity: tuple[int, int]) -> OpenFile | None:
        with self._lock:
            file = self._files.get(path)
            # While a file is open its number is not given to another, so the same number is the same file.
            if file is None or file.identity != identity:
                return None
            file.users += 1
            self._files.move_to_end(path)
            return file

    def _opened(self, path: str) -> OpenFile:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        info = os.fstat(fd)
        file = OpenFile(fd, (info.st_dev, info.st_ino))
        with self._lock:
            if path in self._files:
                self._retire(self._files.pop(path))
            self._files[path] = file
            while len(self._files) > self._limit:
                self._retire(self._files.popitem(last=False)[1])
        return file

    def _retire(self, file: OpenFile) -> None:
        file.retired = True
        if not file.users:
            file.close()


def expect_file(path: str, info: os.stat_result) -> None:
    """Raise what opening a name that is not there raises, unless a file is there."""
    if not stat.S_ISREG(info.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a file", path)
