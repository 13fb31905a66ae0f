"""Memory that is counted before it is used.

``Arena``  one anonymous mapping of the limit's size, lent in blocks. It cannot grow, so the limit cannot be passed.
``Gate``   counts memory that others own (tensors on their way to the caller) against a limit.

Only one thread leases, in the order of the steps; whoever finishes a step gives its block back without needing another.
So every lease is granted sooner or later, as long as each single one fits.
"""

from __future__ import annotations

import mmap
import os
import sys
from bisect import insort
from threading import Condition

from shardtool.errors import BudgetTooSmall, UsageError
from shardtool.units import parse_size, show_size

HUGE = 2 << 20
DEFAULT_MOST = 256 << 20
"""Bytes that a run takes if it is not told: half of what is free, and no more than this, which is enough to keep disks
and processors busy. Memory that is reused is in cache; more of it is slower."""


class Stopped(Exception):
    """The run has failed elsewhere; whoever waits for memory shall stop."""


def anonymous(nbytes: int) -> mmap.mmap:
    """Private anonymous memory, on huge pages where that pays."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= 2 * HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
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
    """``size`` bytes in one mapping, lent first-fit from the low end, so that what is never needed is never touched."""

    def __init__(self, size: int) -> None:
        self.size = max(1, size)
        self.memory = memoryview(anonymous(self.size))
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
                for i, (start, end) in enumerate(self._free):
                    if end - start >= nbytes:
                        if end - start == nbytes:
                            del self._free[i]
                        else:
                            self._free[i] = (start + nbytes, end)
                        return Block(self, start, start + nbytes)
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


def available() -> int:
    """Bytes of memory that this process could still take: of the machine, or of its control group if that is less."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for most, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(most, encoding="ascii") as a, open(used, encoding="ascii") as b:
                taken = int(b.read()) - _evictable(os.path.dirname(used))
                free = min(free, max(0, int(a.read()) - taken))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return free


def _evictable(group: str) -> int:
    """Bytes of the page cache that a control group is charged for and gives up when it needs memory."""
    with open(f"{group}/memory.stat", encoding="ascii") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def default_limit() -> int:
    """The memory limit of a run that was given none."""
    return max(64 << 20, min(DEFAULT_MOST, available() // 2))


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
