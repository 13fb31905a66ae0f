"""Segments on their way to the caller: filled tile by tile, each chunk checked by the thread that read it.

::

    SegmentSink ── room ── a slab, a tensor that exists, or the step's block if the bytes have to be copied on
                └─ done ── check ── (copy on) ── ready when the last byte is there

A *place* says where a segment goes::

    Fresh       new tensors in this machine's memory, read straight into; the caller owns them
    Apart       new tensors on another device, reached through the step's block
    Given       tensors that exist; straight into them if they lend their memory
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from threading import Lock
from typing import Protocol

import torch

from shardtool import digest
from shardtool.budget import Gate, Slab, Slabs
from shardtool.dtypes import DType
from shardtool.engine import Clock
from shardtool.header import Entry
from shardtool.schedule import Tile
from shardtool.segments import Item, Segment
from shardtool.sinks.device import Copier
from shardtool.sinks.lane import Release
from shardtool.sinks.tensor import lends, octets, scatter

ALIGN = 512
"""Bytes on which a device's own allocations begin, so that what a file aligns stays aligned."""


class Place(Protocol):
    """Where one segment goes."""

    staging: int

    def begin(self) -> None:
        """Wait for room, and take it; called by the dispatcher."""

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """Memory to read a tile into: ``memory`` of the step's block, or the destination's own."""

    def pairs(self, tile: Tile, view: memoryview) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What of a staged tile is to be copied where: (destination, source) of equal shapes."""

    def flat(self) -> torch.Tensor:
        """All bytes of the segment, for an exchange with other ranks."""

    def tensors(self) -> list[torch.Tensor]:
        """The segment's tensors, in the order of its items; called once, when all bytes are there."""

    def leave(self) -> None:
        """They are the caller's now, or the run has failed: count them out."""


class Fresh:
    """New tensors in this machine's memory, on a slab of their own."""

    staging = 0

    def __init__(self, segment: Segment, slabs: Slabs) -> None:
        self._segment = segment
        self._slabs = slabs
        self._slab: Slab | None = None
        self._lead = segment.lead

    def begin(self) -> None:
        """Take a slab."""
        if self._segment.nbytes:
            self._slab = self._slabs.take(self._lead + self._segment.nbytes)

    @property
    def memory(self) -> memoryview:
        """All bytes of the segment."""
        assert self._slab is not None
        return self._slab.view[self._lead : self._lead + self._segment.nbytes]

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """The slab's own memory."""
        return self.memory[tile.offset : tile.offset + tile.nbytes]

    def pairs(self, tile: Tile, view: memoryview) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Nothing: bytes are read where they belong."""
        return []

    def flat(self) -> torch.Tensor:
        """The slab's own memory."""
        return torch.frombuffer(self.memory, dtype=torch.uint8)

    def tensors(self) -> list[torch.Tensor]:
        """One tensor for each item; the slab comes back when the last of them is gone."""
        array = self._slabs.lend(self._slab) if self._slab is not None else None
        base = self._lead - self._segment.start
        found = []
        for item in self._segment.items:
            entry = item.entry
            kind = _held(entry)
            if entry.nbytes:
                count = entry.nbytes // kind.itemsize
                flat = torch.frombuffer(array, dtype=kind, count=count, offset=base + entry.offset)
                found.append(_shaped(flat, entry))
            else:
                found.append(torch.empty(entry.shape, dtype=kind))
        return found

    def leave(self) -> None:
        """Give the slab to the caller."""
        if self._slab is not None:
            size, self._slab = self._slab.size, None
            self._slabs.give(size)


class Apart:
    """New tensors on another device. Those of one segment share an allocation."""

    staging = 1

    def __init__(self, segment: Segment, device: torch.device, gate: Gate) -> None:
        self._segment = segment
        self._device = device
        self._gate = gate
        self._lead = segment.lead % ALIGN
        self._flat: torch.Tensor | None = None

    def begin(self) -> None:
        """Wait for room and allocate."""
        self._gate.enter(self._segment.nbytes)
        self._flat = torch.empty(self._lead + self._segment.nbytes, dtype=torch.uint8, device=self._device)

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """The step's block."""
        return memory

    def pairs(self, tile: Tile, view: memoryview) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The whole tile, bytes to bytes."""
        assert self._flat is not None
        at = self._lead + tile.offset
        return [(self._flat[at : at + tile.nbytes], torch.frombuffer(view, dtype=torch.uint8))]

    def flat(self) -> torch.Tensor:
        """The allocation but for its lead."""
        assert self._flat is not None
        return self._flat[self._lead :]

    def tensors(self) -> list[torch.Tensor]:
        """Views of the allocation."""
        assert self._flat is not None
        flat, self._flat = self._flat, None
        base = self._lead - self._segment.start
        return [
            _shaped(flat[base + e.offset : base + e.offset + e.nbytes].view(_held(e)), e)
            if e.nbytes
            else torch.empty(e.shape, dtype=e.dtype.torch(), device=self._device)
            for e in (item.entry for item in self._segment.items)
        ]

    def leave(self) -> None:
        """Count them out."""
        self._gate.leave(self._segment.nbytes)


class Given:
    """Tensors that exist, by name."""

    def __init__(self, segment: Segment, tensors: Mapping[str, torch.Tensor]) -> None:
        self._items = segment.items
        self._start = segment.start
        self._turned = segment.turned
        self._tensors = tensors
        self._bytes: memoryview | None = None
        only = segment.items[0] if len(segment.items) == 1 else None
        if only is not None and only.entry.nbytes and lends(tensors[only.name]):
            self._bytes = octets(tensors[only.name]).numpy().data
        self.staging = 0 if self._bytes is not None else 1

    def begin(self) -> None:
        """The memory is the caller's and is there."""

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """The tensor's own memory, or the step's block."""
        return memory if self._bytes is None else self._bytes[tile.offset : tile.offset + tile.nbytes]

    def pairs(self, tile: Tile, view: memoryview) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The part of each tensor that lies in the tile."""
        if self._bytes is not None:
            return []
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        source = torch.frombuffer(view, dtype=torch.uint8)
        for item in self._items:
            at = 0 if self._turned else item.entry.offset - self._start  # where the tensor begins in the segment
            first, end = max(at, tile.offset), min(at + item.entry.nbytes, tile.offset + tile.nbytes)
            if first >= end:
                continue
            target = self._tensors[item.name].detach()
            part = source[first - tile.offset : end - tile.offset]
            if target.is_contiguous():
                found.append((octets(target)[first - at : end - at], part))
            else:
                size = target.element_size()
                if part.storage_offset() % size:  # the file does not align it
                    part = part.clone()
                found += scatter(target, item.entry.shape, (first - at) // size, part.view(target.dtype))
        return found

    def flat(self) -> torch.Tensor:
        """Only a tensor that lends its memory has its bytes in one piece."""
        assert self._bytes is not None
        return torch.frombuffer(self._bytes, dtype=torch.uint8)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that were filled."""
        return [self._tensors[item.name] for item in self._items]

    def leave(self) -> None:
        """They were the caller's all the time."""


def _held(entry: Entry) -> torch.dtype:
    found = _TORCH.get(entry.dtype)
    if found is None:
        found = _TORCH[entry.dtype] = entry.dtype.torch()
    return found


_TORCH: dict[DType, torch.dtype] = {}


def _shaped(flat: torch.Tensor, entry: Entry) -> torch.Tensor:
    if len(entry.shape) == 1 and not entry.dtype.bits % 8:
        return flat
    if entry.dtype.bits % 8:  # torch packs these: two elements make one of its own
        return flat.view(*entry.shape[:-1], -1)
    return flat.view(entry.shape)


class SegmentSink:
    """One segment on its way to the caller. ``ready`` is called by whichever thread brings the last byte."""

    def __init__(
        self,
        number: int,
        segment: Segment,
        place: Place,
        copier: Copier,
        clock: Clock,
        where: str,
        ready: Callable[[SegmentSink], None],
    ) -> None:
        self.number = number
        self.segment = segment
        self.place = place
        self.staging = place.staging
        self._copier = copier
        self._clock = clock
        self._where = where
        self._ready = ready
        self._checked = [item for item in segment.items if item.chunks]
        self._small = len(self._checked) > 1  # a run of tensors, each of them one chunk
        self._left = segment.nbytes if not segment.turned else segment.items[0].entry.nbytes
        self._begun = False
        self._lock = Lock()

    def begin(self) -> None:
        """Wait for room; called by the dispatcher."""
        if not self._begun:
            self._begun = True
            began = time.perf_counter()
            with self._copier.making() if self.staging else nullcontext():
                self.place.begin()
            self._clock.add("room", began)
            if not self._left:
                self._ready(self)

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """The destination's own memory, or the step's block."""
        self.begin()
        return self.place.room(tile, memory)

    def done(self, tile: Tile, memory: memoryview, release: Release) -> None:
        """Check the tile's chunks, copy it on where it was staged, and tell when the segment is whole."""
        view = self.place.room(tile, memory)
        began = time.perf_counter()
        if not (self._small and tile.nbytes == self.segment.nbytes and self._all_equal(view)):
            for item in self._checked:
                self._check(item, tile, view)
        self._clock.add("hash", began)
        landed = partial(self._landed, tile.nbytes, release)
        if self.staging:
            self._copier.copy(self.place.pairs(tile, view), landed)
        else:
            landed()

    def _landed(self, nbytes: int, release: Release) -> None:
        release()
        with self._lock:
            self._left -= nbytes
            whole = self._left == 0
        if whole:
            self._ready(self)

    def _all_equal(self, view: memoryview) -> bool:
        """Whether every tensor of a run has its digest; which one has not is found by looking at each."""
        start = self.segment.start
        entries = [item.entry for item in self._checked]
        spans = [slice(at := entry.offset - start, at + entry.nbytes) for entry in entries]
        wanted = [chunk for item in self._checked if item.chunks for chunk in item.chunks]
        return digest.of_chunks(map(view.__getitem__, spans)) == wanted

    def _check(self, item: Item, tile: Tile, view: memoryview) -> None:
        """The chunks of one tensor that lie in the tile; a tile has whole chunks of what it has any of."""
        assert item.chunks is not None
        nbytes = item.entry.nbytes
        base = item.entry.offset - self.segment.start - tile.offset  # of the tensor in the tile
        first = -base // digest.CHUNK if base < 0 else 0
        for number in range(first, len(item.chunks)):
            start = number * digest.CHUNK
            if base + start >= len(view):
                return
            end = min(nbytes, start + digest.CHUNK)
            item.check(number, view[base + start : base + end], self._where)
