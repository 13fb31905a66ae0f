"""Memory that is counted before it is used.

``Arena``  one anonymous mapping of the limit's size, lent in blocks. It cannot grow, so the limit cannot be passed.
``Gate``   counts memory that others own (tensors on their way to the caller) against a limit.
``Slabs``  memory that callers get for good, counted until then, and used again when they have dropped it.

Only one thread leases, in the order of the steps; whoever finishes a step gives its block back without needing another.
So every lease is granted sooner or later, as long as each single one fits.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from bisect import insort
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Condition

import numpy as np
from numpy.typing import NDArray

from shardtool.container import available, ranks_here
from shardtool.errors import BudgetTooSmall, UsageError
from shardtool.units import parse_size, show_size

HUGE = 2 << 20
PAGE = 4096
"""Blocks and slabs start on multiples of it: what lies in memory as it lies in a file can be read past the cache."""
DEFAULT_MOST = 256 << 20
"""Bytes that a run takes if it is not told: half of what is free, and no more than this, which is enough to keep disks
and processors busy. Memory that is reused is in cache; more of it is slower."""
LEAST_DEFAULT = 64 << 20


class Stopped(Exception):
    """The run has failed elsewhere; whoever waits for memory shall stop."""


def anonymous(nbytes: int) -> mmap.mmap:
    """Private anonymous memory, at least ``nbytes``, on huge pages where that pays.

    The kernel aligns a mapping with huge pages if its length is a multiple of them. What lies behind the last whole one
    is touched page by page, so that not more becomes resident than is used.
    """
    huge = nbytes // HUGE * HUGE if nbytes >= 2 * HUGE and hasattr(mmap, "MADV_HUGEPAGE") else 0
    size = -(-nbytes // HUGE) * HUGE if huge else nbytes
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        memory.madvise(mmap.MADV_HUGEPAGE, 0, huge)
    return memory


class Block:
    """A lease of the arena's bytes [start, end)."""

    __slots__ = ("_arena", "end", "start")

    def __init__(self, arena: Arena, start: int, end: int) -> None:
        self._arena = arena
        self.start = start
        self.end = end

    @property
    def view(self) -> memoryview:
        """The leased memory."""
        return self._arena.memory[self.start : self.end]

    def release(self) -> None:
        """Give it back."""
        self._arena.give_back(self.start, self.end)


class Arena:
    """``size`` bytes in one mapping, lent first-fit from the low end, so that what is never needed is never touched.

    Every block starts on a page.
    """

    def __init__(self, size: int) -> None:
        self.size = max(1, size)
        self.memory = memoryview(anonymous(self.size))[: self.size]
        self._free: list[tuple[int, int]] = [(0, self.size)]
        self._changed = Condition()
        self._stopped = False

    def lease(self, nbytes: int) -> Block:
        """Wait for ``nbytes`` in one piece. More than the arena has is ``BudgetTooSmall`` at once."""
        if nbytes > self.size:
            raise BudgetTooSmall(
                f"a step needs {nbytes} bytes of memory and the limit leaves {self.size}", needed=nbytes
            )
        with self._changed:
            while True:
                if self._stopped:
                    raise Stopped
                for i, (low, high) in enumerate(self._free):
                    start = -(-low // PAGE) * PAGE
                    end = start + nbytes
                    if end <= high:
                        self._free[i : i + 1] = [span for span in ((low, start), (end, high)) if span[0] < span[1]]
                        return Block(self, start, end)
                self._changed.wait()

    def give_back(self, start: int, end: int) -> None:
        """Return bytes; called by ``Block.release``."""
        if start == end:
            return
        with self._changed:
            insort(self._free, (start, end))
            merged: list[tuple[int, int]] = []
            for span in self._free:
                if merged and merged[-1][1] == span[0]:
                    merged[-1] = (merged[-1][0], span[1])
                else:
                    merged.append(span)
            self._free = merged
            self._changed.notify_all()

    def stop(self) -> None:
        """Make whoever waits raise ``Stopped``."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Gate:
    """Counts up to ``limit`` bytes. A single lease larger than the limit is let in alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = Condition()
        self._stopped = False

    def enter(self, nbytes: int) -> None:
        """Wait until there is room for ``nbytes``, or until nothing else is in."""
        with self._changed:
            while self._used and self._used + nbytes > self._limit and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise Stopped
            self._used += nbytes

    def leave(self, nbytes: int) -> None:
        """Count them out again."""
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()

    def stop(self) -> None:
        """Make whoever waits raise ``Stopped``."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Slab:
    """Memory of its own, on whole pages. ``view`` is all of it."""

    __slots__ = ("_memory", "_watch", "size", "view")

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = anonymous(size)
        self.view = memoryview(self._memory)[:size]
        self._watch: weakref.ref[NDArray[np.uint8]] | None = None

    def lent(self, back: Callable[[Slab], None]) -> NDArray[np.uint8]:
        """The memory as an array. When nobody looks at it any more, in whatever way, the slab goes ``back``."""
        array = np.frombuffer(self._memory, np.uint8, self.size)
        self._watch = weakref.ref(array, lambda _: back(self))
        return array


class Slabs:
    """Memory for what callers shall own: at most ``limit`` bytes that are not theirs yet, or not any more.

    ::

        take ── filled ── lend ── give ── the caller drops what looks at it ── kept for the next ``take``
                            │       └── from here on it is the caller's and not counted
                            └── drop: nobody got it

    A single slab larger than the limit is let in alone. What a caller has dropped is hot: it is in the processor's
    cache, and its pages are there. What is more than the limit goes back to the system, and all of it at the end.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._kept: list[Slab] = []
        self._out: set[Slab] = set()  # only what is referred to can be told that it is not looked at any more
        self._back: SimpleQueue[Slab] = SimpleQueue()  # whose ``put`` may be called while memory is being freed
        self._changed = Condition()
        self._stopped = False

    def take(self, nbytes: int) -> Slab:
        """A slab of at least ``nbytes``; waits until there is room, or until no other is in use."""
        size = max(1, -(-nbytes // PAGE)) * PAGE
        with self._changed:
            while self._used and self._used + size > self._limit and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise Stopped
            slab = self._again(size)
            self._used += slab.size if slab else size
        return slab or Slab(size)

    @property
    def kept(self) -> int:
        """Bytes that are kept for reuse."""
        with self._changed:
            self._collect()
            return sum(slab.size for slab in self._kept)

    def _again(self, size: int) -> Slab | None:
        """The last dropped slab that is about as large, if there is one. What is too much is let go."""
        self._collect()
        found = None
        for i in range(len(self._kept) - 1, -1, -1):
            if size <= self._kept[i].size <= size + size // 4:
                found = self._kept.pop(i)
                break
        self._trim(size if found is None else found.size)
        return found

    def _trim(self, more: int = 0) -> None:
        """Let go of what is kept beyond the limit, if ``more`` is to be used."""
        while self._kept and self._used + more + sum(slab.size for slab in self._kept) > self._limit:
            del self._kept[0]

    def _collect(self) -> None:
        while True:
            try:
                self._kept.append(self._back.get_nowait())
            except Empty:
                return

    def lend(self, slab: Slab) -> NDArray[np.uint8]:
        """The slab as an array for a caller; it comes back by itself when all that looks at it is gone."""
        self._out.add(slab)
        return slab.lent(self._returned)

    def _returned(self, slab: Slab) -> None:
        """Called while memory is being freed, at any time and by any thread: no lock may be taken here."""
        self._out.discard(slab)
        self._back.put(slab)
        if self._stopped:
            self._kept.clear()
            self._collect()
            self._kept.clear()

    def give(self, size: int) -> None:
        """The caller has a slab of this size now: count it out.

        Whoever gives has let go of it before: what the caller has dropped already is free when others hear of it.
        """
        with self._changed:
            self._used -= size
            self._collect()
            self._trim()
            self._changed.notify_all()

    def stop(self) -> None:
        """Make whoever waits raise ``Stopped``, and keep nothing any more."""
        with self._changed:
            self._stopped = True
            self._collect()
            self._kept.clear()
            self._changed.notify_all()


def default_limit() -> int:
    """The memory limit of a run that was given none: its share, if the ranks of a node run it side by side."""
    return max(LEAST_DEFAULT, min(DEFAULT_MOST, available() // 2 // ranks_here()))


def limit_of(memory_limit: int | str | None, *, least: int, what: str, most: int) -> int:
    """Bytes that a run may take: a number or a text such as ``64MiB``; None is the default, -1 ``most``, 0 ``least``.

    Raises ``BudgetTooSmall`` with the number that would do for ``what``.
    """
    if memory_limit is None:
        return max(default_limit(), least)
    limit = parse_size(memory_limit, "--memory-limit")
    if limit == -1:
        return max(most, least)
    if limit < -1:
        raise UsageError(f"--memory-limit {limit} is not a size; -1 is no limit and 0 the least that does")
    if 0 < limit < least:
        raise BudgetTooSmall(
            f"--memory-limit {show_size(limit)} is too small for {what}: {least} bytes ({show_size(least)}) would do",
            needed=least,
        )
    return limit or least


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes (VmHWM; ``ru_maxrss`` where there is no /proc)."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10
