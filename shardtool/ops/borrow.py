"""Tensors that are the page cache itself: nothing is copied, and what happens to the file happens to them.

Pages are brought in by several threads ahead of the caller, and digests are checked where they lie. A caller that
writes into such a tensor gets copies of the pages it writes to; the file never changes.
"""

from __future__ import annotations

import errno
import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from shardtool import digest
from shardtool.checkpoint import Checkpoint
from shardtool.errors import FormatError, UsageError
from shardtool.ops.limits import readers
from shardtool.ops.stream import CONCURRENCY, RUN
from shardtool.segments import Item, Segment, divide
from shardtool.window import Window

_POPULATE = 22  # MADV_POPULATE_READ of Linux 5.14, which mmap does not name


def borrowed(
    checkpoint: Checkpoint,
    found: Sequence[Item],
    device: str,
    *,
    concurrency: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Any]]:
    """``(name, tensor)`` in order, on mapped files. Raises ``UsageError`` where nothing can be mapped."""
    if device != "cpu":
        raise UsageError(
            f"borrow=True gives tensors in this machine's page cache, not on {device}; leave one of them out"
        )
    maps = {key: checkpoint.store.borrow(key) for key in dict.fromkeys(i.file.key for i in found if i.entry.nbytes)}
    return _borrowed(checkpoint, found, maps, readers(concurrency, CONCURRENCY), progress)


def _borrowed(
    checkpoint: Checkpoint,
    found: Sequence[Item],
    maps: dict[str, mmap.mmap],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Any]]:
    total, done = sum(item.entry.nbytes for item in found), 0
    segments = divide(found, RUN)
    ahead: deque[tuple[Segment, Future[None]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="shardtool-borrow") as pool:
        try:
            while True:
                while len(ahead) < threads and (segment := next(segments, None)) is not None:
                    where = checkpoint.store.locate(segment.key)
                    ahead.append((segment, pool.submit(_fetch, segment, maps.get(segment.key), where)))
                if not ahead:
                    return
                segment, work = ahead.popleft()
                work.result()
                for item in segment.items:
                    done += item.entry.nbytes
                    if progress is not None:
                        progress(done, total)
                    yield item.name, _tensor(item, maps)
        finally:
            for _, work in ahead:
                work.cancel()


def _fetch(segment: Segment, memory: mmap.mmap | None, where: str) -> None:
    """Bring a segment's pages in and check its digests."""
    if memory is None:
        return
    first = segment.start // mmap.PAGESIZE * mmap.PAGESIZE
    end = segment.start + segment.nbytes
    if end > len(memory):
        raise FormatError(f"{where} ends at byte {len(memory)}, before byte {end}")
    try:
        memory.madvise(_POPULATE, first, end - first)
    except OSError as error:
        if error.errno == errno.EFAULT:  # to look at such a page would end the process
            raise FormatError(f"{where} was cut short while it was read; restore the file") from None
    view = memoryview(memory)
    for item in segment.items:
        data = view[item.entry.offset : item.entry.offset + item.entry.nbytes]
        for number in range(len(item.chunks or ())):
            item.check(number, data[number * digest.CHUNK : (number + 1) * digest.CHUNK], where)


def _tensor(item: Item, maps: dict[str, mmap.mmap]) -> torch.Tensor:
    entry = item.entry
    kind = entry.dtype.torch()
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=kind)
    memory = maps[item.file.key]
    extent = entry.nbytes
    if entry.strides is not None:
        extent = kind.itemsize * Window(0, entry.shape, entry.strides).bounds[1]
    if entry.offset % kind.itemsize:  # the file does not align it
        flat = torch.frombuffer(bytearray(memory[entry.offset : entry.offset + extent]), dtype=kind)
    else:
        flat = torch.frombuffer(memory, dtype=kind, count=extent // kind.itemsize, offset=entry.offset)
    if entry.strides is not None:
        return flat.as_strided(entry.shape, entry.strides)
    if entry.dtype.bits % 8:  # torch packs these: two elements make one of its own
        return flat.view(*entry.shape[:-1], -1)
    return flat.view(entry.shape)
