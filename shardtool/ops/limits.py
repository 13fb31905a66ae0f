"""How much of what an operation takes, where it is not told."""

from __future__ import annotations

from dataclasses import dataclass

from shardtool.errors import UsageError
from shardtool.stores.base import Store
from shardtool.stores.local.direct import LARGE, cores

STEP = 32 << 20
"""Bytes of a step's block that are enough."""
READ = 8 << 20
"""Bytes of one read at most."""
MOST = 1 << 30
"""Bytes of buffers that a run takes at most, whatever it may; more does not make it faster."""
DEPTH = 3
"""Steps that should be under way at once."""
CONCURRENCY = 8
"""Reading threads, where there are not more processors: they hash and copy what they have read."""


def want(arena: int) -> int:
    """Bytes that a step should take of an arena."""
    return max(1, min(STEP, arena // DEPTH))


def readers(concurrency: int | None, default: int | None = None) -> int:
    """The number of reading threads. Raises ``UsageError`` for one that cannot be."""
    if concurrency is not None and (type(concurrency) is not int or not 1 <= concurrency <= 1024):
        raise UsageError(f"--concurrency {concurrency} is not a number of readers from 1 to 1024")
    if concurrency is not None:
        return concurrency
    return max(CONCURRENCY, cores()) if default is None else default


@dataclass(frozen=True, slots=True)
class Reading:
    """How stores are read under a limit: by how many threads, at most how many bytes at a time, and what that takes.

    ``held``: bytes of memory that are the stores' own.
    """

    threads: int
    longest: int
    held: int


def reading(spare: int, concurrency: int | None, *stores: Store) -> Reading:
    """As many threads as shall be, or as the stores can do with a third of the spare memory.

    If not even one, reads are so small that the stores take nothing for them.
    """
    asked = readers(concurrency)
    for threads in range(asked, 0, -1):
        if (held := sum(store.reading(threads) for store in stores)) <= spare // 3:
            return Reading(threads, READ, held)
    return Reading(asked, LARGE // 2, 0)
