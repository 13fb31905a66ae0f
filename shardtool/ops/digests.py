"""Digests of files that exist, read again.

::

    files ── runs ──── a large tensor, or neighbouring small ones: a digest ends with its tensor, so that runs do not
      │                depend on each other
      └── readers ──── each takes a run, reads it into a buffer of its own, and hashes what it has just read

So one file keeps all processors busy as well as many do, no tensor costs a read of its own, and what is hashed is in
the processor's cache. The engine, whose tiles are read ahead, would have it fall out of there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event, Lock

from shardtool.budget import anonymous, limit_of
from shardtool.checkpoint import WeightFile
from shardtool.digest import StreamDigester, TensorDigest
from shardtool.header import PAGE
from shardtool.ops.limits import MOST, READ, Reading, readers, reading
from shardtool.schedule import FLOOR
from shardtool.stores.base import Store
from shardtool.stores.local.direct import cores

LEAST = FLOOR + PAGE
"""Bytes of memory with which digests can be read."""
READERS = 12
"""Readers where storage is slower than hashing: some of them hash while the others keep it busy."""
HOT = 4 << 20
"""Bytes that are read at a time where storage is fast: they are still in the processor's cache when they are hashed."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors of these ``sizes`` that follow each other in a file from byte ``start`` on."""

    key: str
    start: int
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(self.sizes)


def runs(file: WeightFile, most: int) -> Iterator[Run]:
    """A file's tensors in the order of their bytes: as many in a run as have ``most`` bytes, and one at least."""
    sizes: list[int] = []
    start = end = file.header.data_offset
    for entry in file.header.entries:
        if sizes and end + entry.nbytes - start > most:
            yield Run(file.key, start, tuple(sizes))
            sizes, start = [], end
        sizes.append(entry.nbytes)
        end += entry.nbytes
    if sizes:
        yield Run(file.key, start, tuple(sizes))


def read(
    store: Store,
    files: Sequence[WeightFile],
    *,
    memory_limit: int | str | None,
    concurrency: int | None,
    progress: Callable[[int], None],
) -> dict[str, list[TensorDigest]]:
    """The digests of every tensor of some files, by file.

    ``progress`` is told of the bytes that have just been hashed, by one thread at a time.
    """
    limit = limit_of(memory_limit, least=LEAST, what="a verification", most=MOST)
    how = reading(limit - LEAST, readers(concurrency, max(READERS, cores())), store)
    threads, tile = _divided(limit - how.held, how)
    found = [run for file in files for run in runs(file, max(tile, READ))]
    done: dict[Run, list[TensorDigest]] = {}
    # The longest first, so that none is left for one processor alone.
    _side_by_side(store, sorted(found, key=lambda run: -run.nbytes), threads, tile, progress, done)
    digests: dict[str, list[TensorDigest]] = {file.key: [] for file in files}
    for run in found:
        digests[run.key] += done[run]
    return digests


def _divided(memory: int, how: Reading) -> tuple[int, int]:
    """How many readers share so much memory, and how many bytes each of them reads at a time."""
    threads = max(1, min(how.threads, memory // LEAST))
    return threads, min(how.longest, (memory // threads - PAGE) // PAGE * PAGE)


class _Pace:
    """Whether storage is what the readers wait for: then there shall be more of them.

    Without that there is a reader for each processor, since more would only push each other's bytes out of the cache. A
    reader that is not at work may as well wait for a processor; how long is seen while it hashes.
    """

    def __init__(self, few: int) -> None:
        self._few = few
        self._tiles = 0
        self._read = _Spent()
        self._hashed = _Spent()
        self._more = Event()

    def wait(self, number: int) -> None:
        """Until the reader of this number is needed, or all is done."""
        if number >= self._few:
            self._more.wait()

    def count(self, times: Sequence[tuple[float, float]]) -> None:
        """One more tile: (wall, processor) seconds before it was read, between, and after it was hashed.

        Called by one thread at a time.
        """
        self._tiles += 1
        self._read.add(*times[:2])
        self._hashed.add(*times[1:])
        usual = self._read.worked * self._hashed.wall / max(self._hashed.worked, 1e-9)
        if self._tiles > 2 * self._few and self._read.wall - usual > 2 * (self._read.worked + self._hashed.worked):
            self._more.set()

    @property
    def slow(self) -> bool:
        """Whether the storage is what is waited for."""
        return self._more.is_set()

    def end(self) -> None:
        """All is done: who waits may go."""
        self._more.set()


class _Spent:
    """Seconds that readers spent with something, by the clock and at work."""

    def __init__(self) -> None:
        self.wall = self.worked = 0.0

    def add(self, began: tuple[float, float], ended: tuple[float, float]) -> None:
        """Count the time between."""
        self.wall += ended[0] - began[0]
        self.worked += ended[1] - began[1]


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def _side_by_side(
    store: Store,
    work: Iterable[Run],
    threads: int,
    tile: int,
    progress: Callable[[int], None],
    done: dict[Run, list[TensorDigest]],
) -> None:
    """The digests of every run; what any reader raises is raised here."""
    left = iter(work)
    taking, telling = Lock(), Lock()
    stopped = Event()
    pace = _Pace(max(2, cores()))

    def take() -> Run | None:
        with taking:
            return None if stopped.is_set() else next(left, None)

    def reader(number: int) -> None:
        pace.wait(number)
        memory = memoryview(b"")
        while (run := take()) is not None:
            memory = memory or memoryview(anonymous(tile + PAGE))
            digester = StreamDigester(run.sizes)
            lead = run.start % PAGE  # in memory as in the file
            at = 0
            while at < run.nbytes and not stopped.is_set():
                view = memory[lead : lead + min(run.nbytes - at, tile if pace.slow else min(tile, HOT))]
                times = [_now()]
                store.readinto(run.key, run.start + at, view)
                times.append(_now())
                digester.update(view)
                times.append(_now())
                at += len(view)
                with telling:
                    pace.count(times)
                    progress(len(view))
            if at == run.nbytes:
                done[run] = digester.digests()
        pace.end()

    with ThreadPoolExecutor(threads, thread_name_prefix="shardtool") as pool:
        try:
            ended, _ = wait([pool.submit(reader, number) for number in range(threads)], return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
            pace.end()
    for one in ended:
        one.result()
