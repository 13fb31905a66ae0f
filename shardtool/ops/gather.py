"""Some elements of one stored tensor, brought into memory of their own: with as few reads, and as few bytes, as pay.

::

    gather      a window on a tensor -> its elements in row-major order
    ├── elements that lie one behind the other     read straight into place, whole chunks checked on the way
    └── others                                     read with what lies between them, where that is little

Only numpy: what the memory is to be (an array, a torch tensor) is the caller's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shardtool import digest
from shardtool.budget import PAGE, anonymous
from shardtool.segments import Item
from shardtool.stores.base import Store
from shardtool.window import Window, row_major, simplify

GAP = 64 << 10
"""Bytes between two runs that are read over rather than skipped."""
BLOCK = digest.CHUNK
"""Bytes of one read at most."""
MAPPED = 1 << 20
"""Bytes from which on elements get a mapping of their own, which ends with them."""
_AHEAD = 64  # reads that are queued at once, whatever their number

Octets = NDArray[np.uint8]


def gather(store: Store, item: Item, window: Window, size: int, pool: Callable[[], ThreadPoolExecutor]) -> Octets:
    """The bytes of a window's elements, ``size`` each, in row-major order. The caller owns them.

    The window counts elements from the start of the tensor. ``pool``: gives the threads, if there is more than one
    read. Raises ``ChecksumMismatch`` where a chunk that is read as a whole differs from its digest.
    """
    from_file, to = simplify(window, row_major(window.shape))
    memory = _empty(window.size * size, item.entry.offset + window.offset * size, size)
    if not window.size:
        return memory
    jobs = _jobs(store, item, from_file, to, size, memory)
    first = list(itertools.islice(jobs, 2))
    if len(first) < 2:
        for job in first:
            job()
        return memory
    threads, jobs = pool(), itertools.chain(first, jobs)
    while some := list(itertools.islice(jobs, _AHEAD)):
        futures = [threads.submit(job) for job in some]
        try:
            for future in futures:
                future.result()
        finally:  # nobody may still write into memory that nobody looks at any more
            for future in futures:
                future.cancel() or future.exception()
    return memory


def _empty(nbytes: int, offset: int, size: int) -> Octets:
    """Memory that lies as the file does, seen from the start of a page, so that a cold file is read without a copy."""
    if nbytes < MAPPED:
        return np.empty(nbytes, np.uint8)
    lead = offset % PAGE if offset % size == 0 else 0
    return np.frombuffer(anonymous(lead + nbytes), np.uint8, nbytes, lead)


def _jobs(
    store: Store, item: Item, window: Window, to: Window, size: int, memory: Octets
) -> Iterator[Callable[[], None]]:
    """What is to be read, each part independent of the others."""
    strides = [stride * size for stride in window.strides]
    spans = [size]  # bytes from the first to the last element of what one index of a dimension leaves
    for n, stride in zip(reversed(window.shape), reversed(strides), strict=True):
        spans.insert(0, spans[0] + (n - 1) * stride)
    level = len(strides)  # from this dimension on, indices are read together
    while level and strides[level - 1] - spans[level] <= GAP and spans[level] <= BLOCK:
        level -= 1
    inner, steps = window.shape[level:], strides[level:]
    straight = not inner or (len(inner) == 1 and steps[0] == size)
    result = memory.reshape(*to.shape, size) if to.shape else memory.reshape(1, size)
    for index in itertools.product(*map(range, window.shape[:level])):
        at = window.offset * size + sum(i * stride for i, stride in zip(index, strides, strict=False))
        room = result[index] if index else result
        if straight:
            yield from _straight(store, item, at, room.reshape(-1))
            continue
        rows = inner[0] if not steps[0] else max(1, (BLOCK - spans[level + 1]) // steps[0] + 1)
        for row in range(0, inner[0], rows):
            part = room[row : row + rows]
            yield partial(_scattered, store, item, at + row * steps[0], part, tuple(steps))


def _straight(store: Store, item: Item, start: int, room: Octets) -> Iterator[Callable[[], None]]:
    """Bytes of the tensor from ``start`` on, cut where its chunks end."""
    at, end = start, start + len(room)
    while at < end:
        cut = min(end, (at // digest.CHUNK + 1) * digest.CHUNK)
        yield partial(_chunk, store, item, at, room[at - start : cut - start])
        at = cut


def _chunk(store: Store, item: Item, start: int, room: Octets) -> None:
    """Read bytes of one chunk, and check them if they are all of it."""
    view = room.data
    store.readinto(item.file.key, item.entry.offset + start, view)
    end = start + len(room)
    whole = start % digest.CHUNK == 0 and (end % digest.CHUNK == 0 or end == item.entry.nbytes)
    if whole:
        item.check(start // digest.CHUNK, view, store.locate(item.file.key))


def _scattered(store: Store, item: Item, start: int, room: Octets, strides: tuple[int, ...]) -> None:
    """Read everything from the first of some elements to the last, and take these out of it; strides in bytes."""
    *shape, size = room.shape
    span = size + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    scratch = np.empty(span, np.uint8)
    store.readinto(item.file.key, item.entry.offset + start, scratch.data)
    kind = np.dtype(f"u{size}" if size in (1, 2, 4, 8) else f"V{size}")
    found: NDArray[np.generic] = np.ndarray(shape, kind, scratch, 0, strides)
    np.copyto(room.view(kind)[..., 0], found)
