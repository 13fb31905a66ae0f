"""How much of what an operation takes, where it is not told."""

from __future__ import annotations

from shardtool.errors import UsageError

STEP = 32 << 20
"""Bytes of a step's block that are enough."""
READ = 8 << 20
"""Bytes of one read at most."""
MOST = 1 << 30
"""Bytes of buffers that a run takes at most, whatever it may; more does not make it faster."""
DEPTH = 3
"""Steps that should be under way at once."""
CONCURRENCY = 8
"""Reading threads."""


def want(arena: int) -> int:
    """Bytes that a step should take of an arena."""
    return max(1, min(STEP, arena // DEPTH))


def readers(concurrency: int | None, default: int = CONCURRENCY) -> int:
    """The number of reading threads. Raises ``UsageError`` for one that cannot be."""
    if concurrency is not None and (type(concurrency) is not int or not 1 <= concurrency <= 1024):
        raise UsageError(f"--concurrency {concurrency} is not a number of readers from 1 to 1024")
    return default if concurrency is None else concurrency
