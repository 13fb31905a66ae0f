"""Digests of files that exist: for ``verify``."""

from __future__ import annotations

from collections.abc import Sequence

from shardtool import digest
from shardtool.schedule import Tile
from shardtool.sinks.lane import Lane, Release


class DigestSink:
    """Takes one file's tensors, whose ``sizes`` follow each other from ``start`` on, and keeps but their digests."""

    staging = 1

    def __init__(self, sizes: Sequence[int], start: int) -> None:
        self._digester = digest.StreamDigester(sizes)
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
