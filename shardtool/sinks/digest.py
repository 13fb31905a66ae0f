"""Digests of files that exist: for ``verify``."""

from __future__ import annotations

from shardtool import digest
from shardtool.plan import File
from shardtool.schedule import Tile
from shardtool.sinks.lane import Lane, Release


class DigestSink:
    """Reads one file's tensors and keeps nothing but their digests."""

    staging = 1

    def __init__(self, file: File, start: int) -> None:
        self.file = file
        self._digester = digest.StreamDigester([t.nbytes for t in file.tensors])
        self._lane = Lane(self._digester.update, start)

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """The step's own block."""
        return memory

    def done(self, tile: Tile, memory: memoryview, release: Release) -> None:
        """Hash the tile when its turn comes."""
        self._lane.put(tile.offset, memory, release)

    def digests(self) -> list[digest.TensorDigest]:
        """The digests of the file's tensors, once all tiles are done."""
        return self._digester.digests()
