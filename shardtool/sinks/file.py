"""Files: tiles are hashed while they are in cache, written in order, and published when the last one is in.

A tile is hashed while the one before it is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from shardtool import digest
from shardtool.budget import Stopped, anonymous
from shardtool.manifest import FileRecord, TensorRecord
from shardtool.plan import File
from shardtool.schedule import Tile
from shardtool.sinks.lane import Lane, Release
from shardtool.stores.base import Store, Writer


class Published(Protocol):
    """Told of each file once it is durable."""

    def __call__(self, record: FileRecord) -> None:
        """``record`` is what the manifest will say of it."""


class Slots:
    """Buffers in which the parts of uploads are gathered: ``count`` of ``size`` bytes, made once and reused."""

    def __init__(self, count: int, size: int) -> None:
        self.nbytes = count * size
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        for _ in range(count if size else 0):
            self._free.put(memoryview(anonymous(size)))

    def take(self) -> memoryview:
        """Wait for a buffer."""
        slot = self._free.get()
        if slot is None:
            self._free.put(None)
            raise Stopped
        return slot

    def give_back(self, slot: memoryview) -> None:
        """Return it."""
        self._free.put(slot)

    def stop(self) -> None:
        """Make whoever waits raise ``Stopped``."""
        self._free.put(None)


class FileSink:
    """One file of a plan. Opened by the dispatcher with its first tile, closed by the reader that brings its last."""

    staging = 1

    def __init__(
        self, file: File, part: int, store: Store, published: Published, slots: Slots, *, sha256: bool = False
    ) -> None:
        self.file = file
        self._part = part
        self._store = store
        self._published = published
        self._slots = slots
        self._slot: memoryview | None = None
        self._gathered = 0
        self._writer: Writer | None = None
        self._written = 0
        self._digester = digest.StreamDigester([t.nbytes for t in file.tensors])
        self._lane = Lane(self._digester.update, len(file.header), self._append)
        self._write: Callable[[memoryview], None] = self._pass_on
        self._sha256 = hashlib.sha256() if sha256 else None

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """The step's own block."""
        self.open()
        return memory

    def open(self) -> None:
        """Create the file and write its header; called by the dispatcher before its first tile."""
        if self._writer is not None:
            return
        self._writer = self._store.create(self.file.key, self.file.size)
        if self._writer.unit:
            self._slot = self._slots.take()
            self._write = self._gather
        if self._sha256 is not None:
            self._sha256.update(self.file.header)
        self._write(memoryview(self.file.header))
        if not self.file.data_size:
            self._finish()

    def done(self, tile: Tile, memory: memoryview, release: Release) -> None:
        """Hash and write the tile when its turn comes."""
        self._lane.put(tile.offset, memory, release)

    def _append(self, view: memoryview) -> None:
        """Write a tile that has been hashed."""
        if self._sha256 is not None:
            self._sha256.update(view)
        self._write(view)
        if self._written + self._gathered == self.file.size:
            self._finish()

    def _pass_on(self, view: memoryview) -> None:
        assert self._writer is not None
        self._writer.write(self._written, view)
        self._written += len(view)

    def _gather(self, view: memoryview) -> None:
        """Collect bytes until they make parts that the store takes, as many as a buffer holds."""
        assert self._writer is not None
        assert self._slot is not None
        unit = len(self._slot) // self._writer.unit * self._writer.unit
        while len(view):
            n = min(len(view), unit - self._gathered)
            self._slot[self._gathered : self._gathered + n] = view[:n]
            self._gathered += n
            view = view[n:]
            if self._gathered == unit:
                self._flush()

    def _flush(self) -> None:
        assert self._slot is not None
        gathered, self._gathered = self._gathered, 0
        self._pass_on(self._slot[:gathered])

    def _finish(self) -> None:
        assert self._writer is not None
        if self._gathered:
            self._flush()
        self._writer.commit()
        digests = self._digester.digests()
        self._drop_slot()
        self._published(
            FileRecord(
                key=self.file.key,
                rank=self.file.rank,
                part=self._part,
                size=self.file.size,
                header=digest.of_bytes(self.file.header),
                digest=digest.of_file(self.file.header, digests),
                tensors=tuple(TensorRecord(t.name, d) for t, d in zip(self.file.tensors, digests, strict=True)),
                stored=dict(self._writer.checksums()),
                sha256="" if self._sha256 is None else self._sha256.hexdigest(),
            )
        )

    def _drop_slot(self) -> None:
        if self._slot is not None:
            self._slots.give_back(self._slot)
            self._slot = None

    def abort(self) -> None:
        """Drop what was written, if the file is not published."""
        if self._writer is not None:
            self._writer.abort()
