"""Bytes between files and memory by the way that costs least, past the page cache where that is it.

::

    Reader.fill ── small, or on a file system of which nothing is known ────── preadv
                   in memory ───────────────────────────────────────────────── preadv, no more at once than cores
                   on a local disk ── address % 4096 == offset % 4096 ──────── one O_DIRECT preadv, without a copy
                                   └─ otherwise ────────────────────────────── the same, and then it is moved
    Output ─────── address % 4096 == offset % 4096, at least 128 KiB ───────── O_DIRECT pwritev, without a copy
                   otherwise ───────────────────────────────────────────────── gathered in a buffer, and O_DIRECT

O_DIRECT moves whole pages between the disk and memory that starts on a page. A range that does not begin or end on a
page is therefore read in three pieces: into a spare page, into the caller's memory, and into another spare page. That
fills the caller's memory in place when it lies as the file does, that is, when address and offset leave the same rest.
Otherwise the bytes come to lie a little behind their place, and are moved there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from shardtool.stores.local.files import DISKS, Kind, OpenFile
from shardtool.turns import Turns

PAGE = 4096
"""Bytes to which offsets, addresses and sizes of direct reads and writes are aligned, enough for all common disks."""

LARGE = 256 << 10
"""Bytes from which on a read is worth the choice of its way."""

BUFFER = 128 << 10
"""Bytes of the buffer of an ``Output``: all that goes through it is written so much at once."""

# Spare pages of a read, the size from which on it does without others, and a piece of one that is moved afterwards.
_EDGES = 3 * PAGE
_SMALL = 2 * PAGE
_PIECE = 8 << 20  # the disk is idle, as far as one thread goes, while it is moved

# One system call moves at most 2 GiB on Linux, and more is an error on macOS.
MOST_AT_ONCE = 1 << 30


class Buffers:
    """Buffers of ``size`` bytes that start on a page, made when they are wanted, and reused."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: deque[memoryview] = deque()

    def take(self) -> memoryview:
        """A buffer."""
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def give_back(self, buffer: memoryview) -> None:
        """Return it."""
        self._free.append(buffer)

    @contextmanager
    def lent(self) -> Iterator[memoryview]:
        """A buffer for a while."""
        buffer = self.take()
        try:
            yield buffer
        finally:
            self.give_back(buffer)

    def clear(self) -> None:
        """Free the memory of all that are not lent."""
        self._free.clear()


class Reader:
    """Reads open files. ``direct`` is None for the choice by itself; True reads all past the page cache, False none."""

    def __init__(self, direct: bool | None) -> None:
        self._direct = direct if hasattr(os, "O_DIRECT") and hasattr(os, "preadv") else False
        self._copies = Turns(cores())
        self._edges = Buffers(_EDGES)

    def takes(self, threads: int) -> int:
        """Bytes of memory for so many threads."""
        return 0 if self._direct is False else threads * _EDGES

    def close(self) -> None:
        """Free the spare pages."""
        self._edges.clear()

    def fill(self, file: OpenFile, start: int, memory: memoryview) -> int:
        """Fill ``memory`` from ``start``; returns the number of bytes that there were, fewer only at the file's end."""
        if self._direct:
            return self._past(file, start, memory)
        if len(memory) < LARGE or self._direct is False or file.kind is Kind.OTHER:
            return _through(file.fd, start, memory)
        if file.kind in DISKS and not file.cached(start, len(memory)):
            return self._past(file, start, memory)
        with self._copies:
            return _through(file.fd, start, memory)

    def _past(self, file: OpenFile, start: int, memory: memoryview) -> int:
        """Past the page cache as far as that goes, and the rest through it."""
        done = 0
        if (fd := file.direct()) is not None:
            alike = (_address(memory) - start) % PAGE == 0
            read = _into_edges if len(memory) < _SMALL else _straight if alike else _shifted
            most = MOST_AT_ONCE if alike else _PIECE
            try:
                with self._edges.lent() as edges:
                    while done < len(memory):
                        piece = memory[done : done + most]
                        if len(piece) < _SMALL:
                            read = _into_edges
                        count = read(fd, start + done, piece, edges)
                        done += count
                        if count < len(piece):
                            break
            except OSError as error:  # what is wrong with the file itself shows again below
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    file.refuse()
        return done + _through(file.fd, start + done, memory[done:])


def _straight(fd: int, start: int, memory: memoryview, edges: memoryview) -> int:
    """Read into memory that lies as the file does; the pages that are not whole come in spare ones."""
    before = start % PAGE
    first = -start % PAGE
    whole = (len(memory) - first) // PAGE * PAGE
    last = len(memory) - first - whole
    pieces = (edges[: PAGE if first else 0], memory[first : first + whole], edges[PAGE : 2 * PAGE if last else PAGE])
    count = min(_read(fd, pieces, start - before) - before, len(memory))
    first = max(0, min(first, count))
    memory[:first] = edges[before : before + first]
    if (last := count - first - whole) > 0:
        memory[count - last : count] = edges[PAGE : PAGE + last]
    return max(0, count)


def _shifted(fd: int, start: int, memory: memoryview, edges: memoryview) -> int:
    """Read into memory that lies otherwise: from its first whole page on, and then move the bytes to their place.

    What does not fit in behind comes in spare pages, three at most.
    """
    before = start % PAGE
    skip = -_address(memory) % PAGE
    needed = _whole_pages(before + len(memory))
    inside = min(needed, (len(memory) - skip) // PAGE * PAGE)
    pieces = (memory[skip : skip + inside], edges[: needed - inside])
    count = min(_read(fd, pieces, start - before) - before, len(memory))
    moved = max(0, min(count, inside - before))
    if moved:
        address = _address(memory)
        ctypes.memmove(address, address + skip + before, moved)  # other threads run meanwhile
    if count > moved:
        memory[moved:count] = edges[: count - moved]
    return max(0, count)


def _into_edges(fd: int, start: int, memory: memoryview, edges: memoryview) -> int:
    """Read what is smaller than the spare pages."""
    before = start % PAGE
    count = min(_read(fd, [edges[: _whole_pages(before + len(memory))]], start - before) - before, len(memory))
    if count > 0:
        memory[:count] = edges[before : before + count]
    return max(0, count)


def _read(fd: int, pieces: Sequence[memoryview], offset: int) -> int:
    return os.preadv(fd, [piece for piece in pieces if piece], offset)


class Output:
    """Writes a new file from front to back, past the page cache as long as the file takes it.

    ``buffer`` gathers what is small or does not lie as the file does; its size is a number of whole pages. The file's
    descriptor is the caller's. Raises ``OSError``.
    """

    def __init__(self, fd: int, buffer: memoryview) -> None:
        self._fd = fd
        self._buffer = buffer
        self._at = 0  # the offset of the buffer's first byte, on a page
        self._gathered = 0
        self._direct = False
        try:
            self._switch(on=True)
        except OSError:
            self._direct = False

    def write(self, data: memoryview) -> None:
        """Take the next bytes; they are free on return."""
        offset = self._at + self._gathered
        if len(data) >= len(self._buffer) and (_address(data) - offset) % PAGE == 0:
            first = -offset % PAGE
            whole = (len(data) - first) // PAGE * PAGE
            self._gather(data[:first])
            self._put([self._buffer[: self._gathered], data[first : first + whole]])
            data = data[first + whole :]
        self._gather(data)

    def finish(self) -> None:
        """Write what is gathered; its last page, if it is not whole, goes through the page cache."""
        whole = self._gathered // PAGE * PAGE
        rest = self._buffer[whole : self._gathered]
        self._put([self._buffer[:whole]])
        if rest:
            self._switch(on=False)
            self._put([rest])

    def _gather(self, data: memoryview) -> None:
        while data:
            count = min(len(data), len(self._buffer) - self._gathered)
            copy(self._buffer[self._gathered : self._gathered + count], data[:count])
            self._gathered += count
            data = data[count:]
            if self._gathered == len(self._buffer):
                self._put([self._buffer])

    def _put(self, pieces: list[memoryview]) -> None:
        """Write the pieces, in which all that is gathered is contained, and begin to gather anew behind them."""
        self._gathered = 0
        while pieces := [piece for piece in pieces if piece]:
            try:
                count = os.pwritev(self._fd, pieces, self._at)
            except OSError:
                if not self._direct:
                    raise
                self._switch(on=False)  # what is wrong with the disk itself shows again
                continue
            self._at += count
            if count % PAGE and self._direct:
                self._switch(on=False)
            for number, piece in enumerate(pieces):
                pieces[number] = piece[count:]
                count -= min(count, len(piece))

    def _switch(self, *, on: bool) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        self._direct = on


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes while other threads run."""
    if len(source) <= 2 * PAGE:
        target[:] = source
    else:
        import numpy as np  # takes longer to import than many a command

        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _through(fd: int, start: int, memory: memoryview) -> int:
    """Through the page cache."""
    done = 0
    while done < len(memory):
        count = _read_at(fd, memory[done : done + MOST_AT_ONCE], start + done)
        if not count:
            break
        done += count
    return done


def _read_at(fd: int, memory: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [memory], offset)
    data = os.pread(fd, min(len(memory), 1 << 20), offset)
    memory[: len(data)] = data
    return len(data)


def _address(memory: memoryview) -> int:
    if not memory.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))
    import numpy as np

    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
