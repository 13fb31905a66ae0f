"""Bytes that are checked on the way, whoever reads them: a store that knows the digests of its tensors' chunks.

``Checked`` is a store over another. What is read of a chunk as a whole is checked where it lies; where a part is read,
the whole chunk is, aside, and kept for a while, since the next range often begins in it. So a range costs at most one
chunk more than it has, and no byte is handed on unchecked that has a digest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock

import numpy as np

from shardtool import digest
from shardtool.budget import PAGE, anonymous
from shardtool.segments import Item
from shardtool.stores.base import Store, Wrapper, octets

KEPT = 4
"""Chunks of which parts were read that are kept, beside those that are being read."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes [low, high) of an object, chunk ``number`` of a tensor, ``place`` among all of the object."""

    item: Item
    number: int
    place: int
    low: int
    high: int

    def within(self, start: int, end: int) -> bool:
        """Whether all of it lies there."""
        return start <= self.low and self.high <= end


class _Aside:
    """A chunk that is read aside: its memory, whether it has come or failed, and how many use it."""

    __slots__ = ("came", "error", "memory", "users")

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.came = Event()
        self.error: BaseException | None = None
        self.users = 1


class Checked(Wrapper):
    """A store whose tensors are checked. ``items``: those that have digests, with the files that they lie in."""

    def __init__(self, inner: Store, items: Iterable[Item]) -> None:
        super().__init__(inner)
        self._items: dict[str, list[Item]] = {}
        for item in items:
            if item.chunks and item.entry.nbytes:
                self._items.setdefault(item.file.key, []).append(item)
        for found in self._items.values():
            found.sort(key=lambda item: item.entry.offset)
        self._starts = {key: [item.entry.offset for item in found] for key, found in self._items.items()}
        self._before = {key: list(_before(found)) for key, found in self._items.items()}
        self._covered = {
            key: bytearray(self._before[key][-1] + _count(found[-1])) for key, found in self._items.items()
        }
        sizes = (item.entry.nbytes for found in self._items.values() for item in found)
        self._largest = min(digest.CHUNK, max(sizes, default=0))
        self._aside: dict[tuple[str, int], _Aside] = {}
        self._spare: list[memoryview] = []
        self._resting = False
        self._lock = Lock()

    def rest(self) -> None:
        """From now on pass everything on unchecked: who calls this has checked it all."""
        self._resting = True

    def reading(self, threads: int) -> int:
        """The inner store's, and the chunks that are read aside."""
        held = self.inner.reading(threads)
        return held if self._resting else held + (threads + KEPT) * (self._largest + PAGE)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Pass on, and check. Raises ``ChecksumMismatch`` with the tensor's name."""
        if self._resting:
            self.inner.readinto(key, start, view)
            return
        memory = octets(view)
        at, end = start, start + memory.nbytes
        whole = []
        for chunk in self._chunks(key, start, end):
            if chunk.within(start, end):
                whole.append(chunk)
                continue
            low, high = max(start, chunk.low), min(end, chunk.high)
            self._plain(key, at, memory[at - start : low - start])
            with self._read_aside(key, chunk) as data:
                part = data[low - chunk.low : high - chunk.low]
                np.copyto(np.frombuffer(memory[low - start : high - start], np.uint8), np.frombuffer(part, np.uint8))
            at = high
        self._plain(key, at, memory[at - start :])
        for chunk in whole:
            self._check(key, chunk, memory[chunk.low - start : chunk.high - start])

    def finish(self, threads: int) -> None:
        """Read and check what nobody has read. Raises ``ChecksumMismatch``."""
        left = (
            (key, chunk)
            for key, seen in self._covered.items()
            if not all(seen)
            for chunk in self._chunks(key, 0, self._end(key))
            if not seen[chunk.place]
        )
        taking, stopped = Lock(), Event()

        def work() -> None:
            try:
                while not stopped.is_set():
                    with taking:
                        one = next(left, None)
                    if one is None:
                        return
                    with self._read_aside(*one):
                        pass
            except BaseException:
                stopped.set()
                raise

        with ThreadPoolExecutor(threads, thread_name_prefix="shardtool-check") as pool:
            try:
                for done in [pool.submit(work) for _ in range(threads)]:
                    done.result()
            finally:
                stopped.set()

    def cost(self, ranges: Iterable[tuple[str, int, int]]) -> int:
        """The bytes that reading some ranges (key, start, number) takes, each chunk aside once."""
        total, aside = 0, set()
        for key, start, nbytes in ranges:
            end = start + nbytes
            total += nbytes
            for chunk in self._chunks(key, start, end):
                if not chunk.within(start, end):
                    total -= min(end, chunk.high) - max(start, chunk.low)
                    if (key, chunk.low) not in aside:
                        aside.add((key, chunk.low))
                        total += chunk.high - chunk.low
        return total

    def _plain(self, key: str, start: int, view: memoryview) -> None:
        if view.nbytes:
            self.inner.readinto(key, start, view)

    def _end(self, key: str) -> int:
        last = self._items[key][-1].entry
        return last.offset + last.nbytes

    def _chunks(self, key: str, start: int, end: int) -> Iterator[_Chunk]:
        """The chunks that have bytes in a range, in their order."""
        items = self._items.get(key, []) if start < end else []
        first = max(0, bisect_right(self._starts.get(key, []), start) - 1)
        for i in range(first, len(items)):
            entry = items[i].entry
            if entry.offset >= end:
                return
            past = entry.offset + entry.nbytes
            number = max(0, start - entry.offset) // digest.CHUNK
            while (low := entry.offset + number * digest.CHUNK) < min(end, past):
                if (high := min(past, low + digest.CHUNK)) > start:
                    yield _Chunk(items[i], number, self._before[key][i] + number, low, high)
                number += 1

    @contextmanager
    def _read_aside(self, key: str, chunk: _Chunk) -> Iterator[memoryview]:
        """The whole chunk, checked: read by whoever comes first, while others wait."""
        place = key, chunk.low
        with self._lock:
            found = self._aside.get(place)
            mine = found is None
            if found is None:
                self._make_room()
                found = self._aside[place] = _Aside(self._spare.pop() if self._spare else self._memory())
            else:
                found.users += 1
        try:
            if mine:
                self._fill(key, chunk, found)
            else:
                found.came.wait()
            if found.error is not None:
                raise found.error
            yield _placed(found.memory, chunk)
        finally:
            with self._lock:
                found.users -= 1
                if found.error is not None and self._aside.get(place) is found:
                    del self._aside[place]

    def _fill(self, key: str, chunk: _Chunk, aside: _Aside) -> None:
        try:
            data = _placed(aside.memory, chunk)
            self.inner.readinto(key, chunk.low, data)
            self._check(key, chunk, data)
        except BaseException as error:
            aside.error = error
        finally:
            aside.came.set()

    def _make_room(self) -> None:
        """Of the chunks that nobody uses keep the latest few; the memory of the others is used again."""
        idle = [place for place, aside in self._aside.items() if not aside.users]
        for place in idle[: max(0, len(idle) - KEPT + 1)]:
            self._spare.append(self._aside.pop(place).memory)

    def _memory(self) -> memoryview:
        return memoryview(anonymous(self._largest + PAGE))

    def _check(self, key: str, chunk: _Chunk, data: memoryview) -> None:
        chunk.item.check(chunk.number, data, self.locate(key))
        self._covered[key][chunk.place] = 1


def _count(item: Item) -> int:
    """How many chunks a tensor has."""
    return -(-item.entry.nbytes // digest.CHUNK)


def _before(items: Iterable[Item]) -> Iterator[int]:
    """How many chunks come before those of each tensor."""
    count = 0
    for item in items:
        yield count
        count += _count(item)


def _placed(memory: memoryview, chunk: _Chunk) -> memoryview:
    """Where a chunk lies in memory: as far behind a page as in its object, so that it can be read past the cache."""
    lead = chunk.low % PAGE
    return memory[lead : lead + chunk.high - chunk.low]
