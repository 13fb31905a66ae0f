"""What the kernel tells of an open file: the file system that it lies on, and whether its bytes are in memory.

::

    filesystem ── /proc/self/fdinfo has the mount, /proc/self/mountinfo its type
    counted    ── cachestat(2), since Linux 6.5: a few microseconds; refused to who neither owns the file nor may write
    mapped     ── mincore(2): some tens of microseconds; answers wrongly where cachestat would refuse
    probed     ── preadv2(2) with RWF_NOWAIT at a few places: for everybody

Each of the last three looks at a few pieces of a long range, and says whether most of it is in the page cache, or None
where the kernel does not tell. Nothing here changes what is read, only which way: a wrong answer costs time.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import sys
from collections.abc import Callable

_PAGE = os.sysconf("SC_PAGE_SIZE")
_CACHESTAT = 451  # the number of the call, which these machines share
_MACHINES = ("x86_64", "aarch64", "riscv64", "ppc64le", "s390x", "loongarch64")

_PROT_NONE = 0
_NO_ADDRESS = ctypes.c_void_p(-1).value

_PIECES = 4
_PIECE = 128 << 10
_PROBES = 3


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("size", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    """Pages, by what they are."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "in_writeback", "evicted", "recent"))


def filesystem(fd: int) -> str:
    """The type of the file system that an open file lies on, as the mount table has it; empty if it is not told."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8", errors="replace") as lines:
            mount = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
            line = next(line for line in lines if line.startswith(f"{mount} "))
    except (OSError, StopIteration, IndexError):
        return ""
    return (line.partition(" - ")[2].split() or [""])[0]


def counted(fd: int, start: int, size: int) -> bool | None:
    """Whether most of ``size`` bytes from ``start`` are in memory; not for files that stand for others (overlayfs)."""
    if _cachestat is None:
        return None
    counts = _Counts()
    cached = 0
    pieces = _pieces(start, size)
    for piece in pieces:
        if _cachestat(_CACHESTAT, fd, ctypes.byref(piece), ctypes.byref(counts), 0):
            return None
        cached += counts.cached
    return bool(cached * _PAGE * 2 > sum(piece.size for piece in pieces))


def mapped(fd: int, start: int, size: int) -> bool | None:
    """The same, right only if ``is_told``. The mapping that it takes is gone on return, and cannot be read."""
    if LIBRARY is None:
        return None
    first = start // _PAGE * _PAGE
    length = start + size - first
    address = LIBRARY.mmap(None, length, _PROT_NONE, mmap.MAP_SHARED, fd, first)
    if address in (None, _NO_ADDRESS):
        return None
    pages = cached = 0
    try:
        for piece in _pieces(first, length):
            count = -(-piece.size // _PAGE)
            flags = ctypes.create_string_buffer(count)
            if LIBRARY.mincore(address + (piece.start - first) // _PAGE * _PAGE, count * _PAGE, flags):
                return None
            pages += count
            cached += sum(flag & 1 for flag in flags.raw)
    finally:
        LIBRARY.munmap(address, length)
    return cached * 2 > pages


def is_told(fd: int) -> bool:
    """Whether the kernel tells this process the truth about a file's pages: to its owner and who may write it."""
    return os.fstat(fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)


def probed(fd: int, start: int, size: int) -> bool | None:
    """The same as two of three bytes say, somewhere in the range.

    A page that is not there is begun to be read, so ``fd`` should be advised ``POSIX_FADV_RANDOM``, which makes that
    one page, and the places are random, so that what was probed before does not answer for its neighbours.
    """
    here = 0
    room = bytearray(1)
    for number in range(_PROBES):
        try:
            os.preadv(fd, [room], start + random.randrange(size), os.RWF_NOWAIT)
            here += 1
        except BlockingIOError:
            pass
        except OSError:
            return None
        if 2 in (here, number + 1 - here):
            break
    return here >= 2


def _pieces(start: int, size: int) -> list[_Range]:
    """The pieces of a range that are looked at, from its first byte to its last."""
    if size <= _PIECES * _PIECE:
        return [_Range(start, size)]
    step = (size - _PIECE) // (_PIECES - 1)
    return [_Range(start + number * step, _PIECE) for number in range(_PIECES)]


def _library() -> ctypes.CDLL | None:
    """The C library, where its types are known: Linux with 64 bits."""
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return None
    number, address, size, offset = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = address
        library.mmap.argtypes = (address, size, number, number, number, offset)
        library.munmap.argtypes = (address, size)
        library.mincore.argtypes = (address, size, ctypes.c_char_p)
        library.fallocate.argtypes = (number, number, offset, offset)
    except (OSError, AttributeError):
        return None
    return library


def _system_call() -> Callable[..., int] | None:
    """``cachestat``, if this kernel has it. It is so short that the interpreter's lock is kept, which costs less."""
    if LIBRARY is None or os.uname().machine not in _MACHINES:
        return None
    call = ctypes.PyDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    call.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong)
    # Asked of no file, a kernel that knows the call says that there is no such file.
    known = call(_CACHESTAT, -1, ctypes.byref(_Range()), ctypes.byref(_Counts()), 0)
    return call if known == -1 and ctypes.get_errno() == errno.EBADF else None


LIBRARY = _library()
"""The C library with the types of what is called here and of ``fallocate``; None where it is not Linux with 64 bits."""

_cachestat = _system_call()
