"""A store that watches another: how many calls and bytes, and which bytes of which object.

It proves what a plan promises (each byte is read once) in tests, and measures in benchmarks.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator

from shardtool.stores.base import Buffer, Object, Store, WrappedWriter, Wrapper, Writer


class CountingStore(Wrapper):
    """A store that counts what is asked of another.

    ``calls`` counts calls by operation (``list``, ``stat``, ``readinto``, ``create``, ``write``, ``commit``, ``abort``,
    ``delete``), ``reads`` has the ranges ``(start, stop)`` of each key in the order of the calls. Bytes count when the
    call succeeded.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin to count from zero."""
        with self._lock:
            self.calls: Counter[str] = Counter()
            self.reads: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
            self.bytes_read = 0
            self.bytes_written = 0

    def distinct_bytes_read(self, key: str | None = None) -> int:
        """How many different bytes were read, of one object or of all: less than ``bytes_read`` if some came twice."""
        with self._lock:
            ranges = [sorted(found) for name, found in self.reads.items() if key in (None, name)]
        total = 0
        for found in ranges:
            end = 0
            for start, stop in found:
                total += max(0, stop - max(start, end))
                end = max(end, stop)
        return total

    def list(self, prefix: str = "") -> Iterator[Object]:
        """Count and pass on."""
        self._count("list")
        return self.inner.list(prefix)

    def stat(self, key: str) -> Object:
        """Count and pass on."""
        self._count("stat")
        return self.inner.stat(key)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Count, pass on and note the range."""
        self._count("readinto")
        self.inner.readinto(key, start, view)
        with self._lock:
            self.bytes_read += view.nbytes
            self.reads[key].append((start, start + view.nbytes))

    def create(self, key: str, size: int, *, exclusive: bool = False) -> Writer:
        """Count and pass on; the writer counts too."""
        self._count("create")
        return _CountingWriter(self, self.inner.create(key, size, exclusive=exclusive))

    def delete(self, key: str) -> None:
        """Count and pass on."""
        self._count("delete")
        self.inner.delete(key)

    def _count(self, operation: str, written: int = 0) -> None:
        with self._lock:
            self.calls[operation] += 1
            self.bytes_written += written


class _CountingWriter(WrappedWriter):
    def __init__(self, store: CountingStore, inner: Writer) -> None:
        super().__init__(inner)
        self._store = store

    def write(self, offset: int, view: Buffer) -> None:
        super().write(offset, view)
        self._store._count("write", memoryview(view).nbytes)

    def commit(self) -> None:
        self._store._count("commit")
        super().commit()

    def abort(self) -> None:
        self._store._count("abort")
        super().abort()
