"""``bench``: read a sample of a checkpoint in several ways, and say which settings suit this machine and storage.

::

    ranges ── a share of every file, evenly
       └── for each state: from the disk (page cache dropped), from the page cache; or the storage as it is
             ├── concurrency 1, 2, 4 ... 32 with blocks of 8 MiB    each without digests and with them,
             └── other blocks with the concurrency that was best    which decide, as a load checks them

Bytes are read by the store itself, as a load does it, into memory that is there already; nothing is written. Every
trial ends after its part of the seconds, so the last reads of slow storage may take longer than that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Lock

import numpy as np

from shardtool import digest
from shardtool.budget import anonymous, limit_of
from shardtool.checkpoint import Checkpoint
from shardtool.container import available
from shardtool.errors import UsageError
from shardtool.ops.rank import opened
from shardtool.stores import Address, named
from shardtool.stores.base import Store
from shardtool.stores.local import residency
from shardtool.stores.local.store import LocalStore
from shardtool.units import parse_size, show_size

DISK, CACHE, STORAGE = "disk", "cache", "storage"
SAMPLE = "2GiB"
SECONDS = 10.0
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
BLOCKS = (1 << 20, 4 << 20)
"""Bytes of a read that are tried besides those of a chunk, of which a load reads no more at a time."""
NEAR = 0.95
"""The share of the best speed that is as good."""
MOST_SECONDS = 86400.0
UNLIMITED = 1 << 40
_PAGE = 4096
_TRIALS = 2 * (len(CONCURRENCIES) + len(BLOCKS))


@dataclass(frozen=True, slots=True)
class Range:
    """``size`` bytes of an object from ``start`` on."""

    key: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to read, and how it went. ``state``: where the bytes came from. Bytes and seconds."""

    state: str
    concurrency: int
    block: int
    digests: bool
    bytes: int
    seconds: float
    cpu_seconds: float

    @property
    def speed(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def cpu_per_gib(self) -> float:
        """CPU seconds of all threads for each GiB."""
        return self.cpu_seconds * (1 << 30) / self.bytes if self.bytes else 0.0


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was tried. ``best``: one trial for each state, with digests; the first is the one to go by."""

    uri: str
    files: int
    bytes: int
    sample: int
    memory_limit: int
    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]
    seconds: float
    notes: tuple[str, ...] = ()


def bench(
    uri: Address,
    *,
    sample: int | str = SAMPLE,
    seconds: float = SECONDS,
    memory_limit: int | str | None = None,
    pattern: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Read ``sample`` bytes of a checkpoint at most with several settings, for about ``seconds`` in all.

    Local files are read from the disk, after they were dropped from the page cache, and from the page cache; what
    cannot be had so is said in ``notes``. ``memory_limit`` bounds the buffers, so that settings that need more are left
    out. ``pattern``: the names of shards without a manifest. ``progress`` is told trials, done and in all.
    """
    began = time.monotonic()
    wanted = parse_size(sample, "--sample")
    if wanted < 1:
        raise UsageError(f"--sample {sample} is not a size to read; write for example 2GiB")
    _check_seconds(seconds)
    limit = limit_of(memory_limit, least=BLOCKS[0], what=f"reading {named(uri)}", most=UNLIMITED)
    checkpoint = opened(uri, None, pattern)
    with checkpoint.store as store:
        every = _ranges(checkpoint)
        total = sum(one.size for one in every)
        ranges = _sampled(every, min(wanted, max(_PAGE, available() // 2)))
        notes: list[str] = []
        states = _states(store, ranges, seconds, notes)
        done = 0

        def told() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, len(states) * _TRIALS)

        searching = _Search(store, _Lanes(limit), seconds / (len(states) * _TRIALS), told)
        tried = [searching.run(name, begin()) for name, begin in states.items()]
    return Benchmark(
        checkpoint.uri,
        len(every),
        total,
        sum(one.size for one in ranges),
        limit,
        tuple(trial for found in tried for trial in found),
        tuple(chosen(found) for found in tried),
        time.monotonic() - began,
        tuple(notes),
    )


def _check_seconds(seconds: object) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MOST_SECONDS:
        raise UsageError(f"--seconds {seconds} is not a time; write a number of seconds, for example 10")


def chosen(trials: Sequence[Trial]) -> Trial:
    """With digests, the fewest readers that are nearly as fast as the fastest, with the block that was fastest then."""
    checked = [trial for trial in trials if trial.digests]
    enough = NEAR * max(trial.speed for trial in checked)
    good = [trial for trial in checked if trial.speed >= enough]
    fewest = min(trial.concurrency for trial in good)
    return max((trial for trial in good if trial.concurrency == fewest), key=lambda trial: trial.speed)


class _Lanes:
    """Memory that readers fill, one lane each, made present before a clock starts."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._memory = memoryview(b"")

    def fits(self, concurrency: int, block: int) -> bool:
        """Whether so many blocks do not pass the limit; the page by which a block may be moved is not counted."""
        return concurrency * block <= self.limit

    def take(self, concurrency: int, block: int) -> list[memoryview]:
        """A lane for each reader, which starts on a page."""
        need = concurrency * (block + _PAGE)
        if len(self._memory) < need:
            self._memory = memoryview(b"")  # the old memory goes before the new one comes
            self._memory = memoryview(anonymous(need))
        np.frombuffer(self._memory[:need], np.uint8)[::_PAGE] = 0
        borders = range(0, need + 1, block + _PAGE)
        return [self._memory[start:end] for start, end in pairwise(borders)]


@dataclass(frozen=True, slots=True)
class _State:
    """Ranges of files, and what brings them to where they shall be read from, before each trial."""

    ranges: Sequence[Range]
    prepare: Callable[[], object] = bool


class _Search:
    """Trials of ``share`` seconds each."""

    def __init__(self, store: Store, lanes: _Lanes, share: float, told: Callable[[], None]) -> None:
        self._store = store
        self._lanes = lanes
        self._share = share
        self._told = told

    def run(self, name: str, state: _State) -> list[Trial]:
        """Readers first, then blocks."""

        def tried(concurrency: int, block: int) -> None:
            for digests in (False, True):
                if self._lanes.fits(concurrency, block):
                    lanes = self._lanes.take(concurrency, block)
                    state.prepare()
                    wall, cpu = time.monotonic(), time.process_time()
                    nbytes = self._fill(state.ranges, lanes, block, until=wall + self._share, digests=digests)
                    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
                    found.append(Trial(name, concurrency, block, digests, nbytes, wall, cpu))
                self._told()

        found: list[Trial] = []
        usual = digest.CHUNK if self._lanes.fits(1, digest.CHUNK) else BLOCKS[0]
        # Files and connections are opened by a read that is not counted.
        self._fill(state.ranges, self._lanes.take(1, BLOCKS[0]), BLOCKS[0], until=0.0, digests=False)
        for concurrency in CONCURRENCIES:
            tried(concurrency, usual)
        readers = chosen(found).concurrency
        for block in BLOCKS:
            tried(readers, block)
        return found

    def _fill(
        self, ranges: Sequence[Range], lanes: Sequence[memoryview], block: int, *, until: float, digests: bool
    ) -> int:
        """Read by one thread for each lane, until the time is over or all is read. Returns the bytes."""
        pieces = blocks(ranges, block)
        lock = Lock()
        read: list[int] = []

        def work(lane: memoryview) -> None:
            while not read or time.monotonic() < until:
                with lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                at = piece.start % _PAGE  # memory that lies as the file does is filled without a copy
                view = lane[at : at + piece.size]
                self._store.readinto(piece.key, piece.start, view)
                if digests:
                    for start in range(0, len(view), digest.CHUNK):
                        digest.of_chunk(view[start : start + digest.CHUNK])
                read.append(piece.size)

        with ThreadPoolExecutor(len(lanes), thread_name_prefix="shardtool-bench") as pool:
            for future in [pool.submit(work, lane) for lane in lanes]:
                future.result()
        return sum(read)


def blocks(ranges: Sequence[Range], block: int) -> Iterator[Range]:
    """The ranges in reads of ``block`` bytes."""
    for one in ranges:
        for at in range(0, one.size, block):
            yield Range(one.key, one.start + at, min(block, one.size - at))


def _ranges(checkpoint: Checkpoint) -> list[Range]:
    """Where each file's tensors lie."""
    found = []
    for file in checkpoint.files:
        start = min((entry.offset for entry in file.header.entries if entry.nbytes), default=file.size)
        if start < file.size:
            found.append(Range(file.key, start, file.size - start))
    if not found:
        raise UsageError(f"{checkpoint.uri} has no bytes of tensors, so that there is nothing to read")
    return found


def _sampled(every: Sequence[Range], wanted: int) -> list[Range]:
    """The same share of each, ``wanted`` bytes in all at most, but a byte of each at least."""
    total = sum(one.size for one in every)
    if total <= wanted:
        return list(every)
    return [Range(one.key, one.start, max(1, one.size * wanted // total)) for one in every]


def _states(store: Store, ranges: Sequence[Range], seconds: float, notes: list[str]) -> dict[str, Callable[[], _State]]:
    """Where the bytes can be had from, and what begins with that. What cannot be had is noted."""
    if not isinstance(store, LocalStore):
        return {STORAGE: lambda: _State(ranges)}
    paths = {one.key: os.path.join(store.place(), one.key) for one in ranges}
    states: dict[str, Callable[[], _State]] = {}
    if not hasattr(os, "posix_fadvise"):
        notes.append("this system drops nothing from its page cache, so that the disk's own speed is not measured")
    elif stay := _drop(ranges, paths):
        notes.append(
            f"{show_size(stay)} stay in the page cache (somebody uses them, or they lie in memory), so that the disk's "
            "own speed is not measured"
        )
    else:
        notes.append("the files were dropped from the page cache before each trial from the disk")
        states[DISK] = lambda: _State(ranges, partial(_drop, ranges, paths))
    states[CACHE] = lambda: _State(_warmed(ranges, paths, seconds / 4))
    return states


def _drop(ranges: Sequence[Range], paths: dict[str, str]) -> int:
    """Drop ranges of files from the page cache; returns the bytes that stay there all the same."""
    stay = 0
    for one in ranges:
        fd = os.open(paths[one.key], os.O_RDONLY)
        try:
            os.fdatasync(fd)  # what is not on the disk yet would stay
            os.posix_fadvise(fd, one.start, one.size, os.POSIX_FADV_DONTNEED)
            if residency.counted(fd, one.start, one.size):
                stay += one.size
        finally:
            os.close(fd)
    return stay


def _warmed(ranges: Sequence[Range], paths: dict[str, str], seconds: float) -> list[Range]:
    """What can be brought into the page cache in some seconds, of ranges of files; a block at least."""
    until = time.monotonic() + seconds
    memory = memoryview(bytearray(BLOCKS[0]))
    found: list[Range] = []
    for one in ranges:
        done = 0
        with open(paths[one.key], "rb", buffering=0) as file:
            file.seek(one.start)
            while done < one.size and (not found or time.monotonic() < until):
                got = file.readinto(memory[: one.size - done])
                if not got:
                    break
                done += got
        if done:
            found.append(Range(one.key, one.start, done))
    return found
