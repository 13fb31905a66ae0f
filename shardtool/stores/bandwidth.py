"""A store that takes its time: no more bytes per second than it may, read and written each.

::

    Bucket(rate)             lets so many bytes per second through, for any number of threads
    LimitedStore(inner, Limit(rate))
    with limited(rate): ...  every store that ``open_store`` opens in the block is such a one; they share the limit

Reads and writes are cut into pieces of a quarter of a second, so that a limit is kept from the first second on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from shardtool.errors import UsageError
from shardtool.stores.base import Buffer, Store, WrappedWriter, Wrapper, Writer, octets, target

LEAST = 1024
_SMALL, _LARGE = 64 << 10, 8 << 20
_now: ContextVar[Limit | None] = ContextVar("limit", default=None)


class Bucket:
    """Lets ``rate`` bytes per second through. Who comes waits until all before have passed."""

    def __init__(
        self, rate: int, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._free = 0.0  # when the next bytes may pass
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until ``count`` bytes may pass."""
        with self._lock:
            now = self._clock()
            self._free = max(self._free, now) + count / self._rate
            wait = self._free - now
        if wait > 0:
            self._sleep(wait)


class Limit:
    """What the stores of one job may take together: ``rate`` bytes per second, read and written each."""

    def __init__(self, rate: int) -> None:
        if rate < LEAST:
            raise UsageError(f"--bwlimit {rate} is less than {LEAST} bytes per second; write for example 100MB")
        self.rate = rate
        self.reads = Bucket(rate)
        self.writes = Bucket(rate)
        self.piece = max(_SMALL, min(_LARGE, rate // 4))


class LimitedStore(Wrapper):
    """A store that keeps within a limit. Listings and sizes do not count."""

    def __init__(self, inner: Store, limit: Limit) -> None:
        super().__init__(inner)
        self._limit = limit

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Pass on, piece by piece."""
        memory = target(start, view)
        for at in range(0, len(memory), self._limit.piece) or (0,):
            piece = memory[at : at + self._limit.piece]
            self._limit.reads.take(len(piece))
            self.inner.readinto(key, start + at, piece)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> Writer:
        """Pass on; the writer keeps within the limit too."""
        return _LimitedWriter(self.inner.create(key, size, exclusive=exclusive), size, self._limit)


class _LimitedWriter(WrappedWriter):
    def __init__(self, inner: Writer, size: int, limit: Limit) -> None:
        super().__init__(inner)
        self._size = size
        self._limit = limit

    def write(self, offset: int, view: Buffer) -> None:
        data = octets(view)
        # The parts of an upload have a least size, so that they are sent whole when all their bytes may pass. What does
        # not fit is refused whole.
        whole = self.unit or offset + len(data) > self._size
        step = max(1, len(data)) if whole else self._limit.piece
        for at in range(0, len(data), step) or (0,):
            piece = data[at : at + step]
            for small in range(0, len(piece), self._limit.piece):
                self._limit.writes.take(min(self._limit.piece, len(piece) - small))
            self.inner.write(offset + at, piece)


@contextmanager
def limited(rate: int | None) -> Iterator[None]:
    """Every store that this thread opens in the block keeps within ``rate`` bytes per second; None is no limit."""
    before = _now.set(None if rate is None else Limit(rate))
    try:
        yield
    finally:
        _now.reset(before)


def applied(store: Store) -> Store:
    """The store, within the limit of the block, if there is one."""
    limit = _now.get()
    return store if limit is None else LimitedStore(store, limit)
