"""Bytes that are checked on the way, whoever reads them: a store that knows the digests of its tensors' chunks.

``Checked`` is a store over another. What is read of a chunk as a whole is checked where it lies; where a part is read,
the whole chunk is, aside, and kept for a while, since the next range often begins in it. So a range costs at most one
chunk more than it has, and no byte is handed on unchecked that has a digest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

import numpy as np

from shardtool import digest
from shardtool.segments import Item
from shardtool.stores.base import Store, Wrapper, octets

KEPT = 4
"""Chunks of which parts were read that are kept, beside those that are being read."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Bytes [low, high) of an object, chunk ``number`` of a tensor."""

    item: Item
    number: int
    low: int
    high: int

    def within(self, start: int, end: int) -> bool:
        """Whether all of it lies there."""
        return start <= self.low and self.high <= end


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
        sizes = (item.entry.nbytes for found in self._items.values() for item in found)
        self._largest = min(digest.CHUNK, max(sizes, default=0))
        self._aside: dict[tuple[str, int], Future[memoryview]] = {}
        self._lock = Lock()

    def reading(self, threads: int) -> int:
        """The inner store's, and the chunks that are read aside."""
        return self.inner.reading(threads) + (threads + KEPT) * self._largest

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Pass on, and check. Raises ``ChecksumMismatch`` with the tensor's name."""
        memory = octets(view)
        at, end = start, start + memory.nbytes
        whole = []
        for chunk in self._chunks(key, start, end):
            if chunk.within(start, end):
                whole.append(chunk)
                continue
            low, high = max(start, chunk.low), min(end, chunk.high)
            self._plain(key, at, memory[at - start : low - start])
            part = self._read_aside(key, chunk)[low - chunk.low : high - chunk.low]
            np.copyto(np.frombuffer(memory[low - start : high - start], np.uint8), np.frombuffer(part, np.uint8))
            at = high
        self._plain(key, at, memory[at - start :])
        for chunk in whole:
            self._check(key, chunk, memory[chunk.low - start : chunk.high - start])

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
                    yield _Chunk(items[i], number, low, high)
                number += 1

    def _read_aside(self, key: str, chunk: _Chunk) -> memoryview:
        """The whole chunk, checked: read by whoever comes first, while others wait."""
        place = key, chunk.low
        with self._lock:
            found = self._aside.get(place)
            mine = found is None
            if found is None:
                found = self._aside[place] = Future()
        if not mine:
            return found.result()
        try:
            data = memoryview(bytearray(chunk.high - chunk.low))
            self.inner.readinto(key, chunk.low, data)
            self._check(key, chunk, data)
        except BaseException as error:
            with self._lock:
                del self._aside[place]
            found.set_exception(error)
            raise
        found.set_result(data)
        with self._lock:
            done = [one for one, future in self._aside.items() if future.done()]
            for one in done[:-KEPT]:
                del self._aside[one]
        return data

    def _check(self, key: str, chunk: _Chunk, data: memoryview) -> None:
        chunk.item.check(chunk.number, data, self.locate(key))
