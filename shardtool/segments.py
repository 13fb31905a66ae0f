"""Segments: what a load reads, checks and hands out as one.

A segment is a run of neighbouring small tensors of one file, or one larger tensor. Its bytes are read in one piece (a
large one in chunks), so that a file of twenty thousand tensors costs two hundred reads and not twenty thousand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from shardtool import digest
from shardtool.budget import PAGE
from shardtool.checkpoint import WeightFile, tensor_of
from shardtool.dtypes import DType
from shardtool.errors import ChecksumMismatch
from shardtool.header import Entry
from shardtool.plan import Stored, whole
from shardtool.schedule import Target

GAP = 4096
"""Bytes between two tensors that are read over."""


class Item(NamedTuple):
    """One tensor to load. ``chunks``: its digests, or None where none are to be checked."""

    name: str
    file: WeightFile
    entry: Entry
    chunks: tuple[str, ...] | None

    def check(self, number: int, data: memoryview, where: str) -> None:
        """Compare a whole chunk with its digest, if there is one. Raises ``ChecksumMismatch`` that names ``where``."""
        if self.chunks is not None and digest.of_chunk(data) != self.chunks[number]:
            start = number * digest.CHUNK
            raise ChecksumMismatch(
                f"{where}: tensor {self.name!r} differs from its digest in its bytes {start} to {start + len(data)}; "
                "restore the file, shardtool verify tells what else is damaged"
            )


@dataclass(frozen=True, slots=True)
class Segment:
    """``nbytes`` of a file from byte ``start`` on, with the tensors that lie there."""

    key: str
    start: int
    nbytes: int
    items: tuple[Item, ...]

    @property
    def turned(self) -> bool:
        """Whether its one tensor has strides: its elements do not lie in order, so that they are brought there."""
        return self.items[0].entry.strides is not None

    @property
    def lead(self) -> int:
        """How far behind the start of a page it lies, in memory as in the file.

        What the file does not align for its type (safetensors asks nobody to) begins at the page.
        """
        alone = len(self.items) == 1 and self.start % _unit(self.items[0].entry.dtype) != 0
        return 0 if self.turned or alone else self.start % PAGE

    def target(self, sink: object, staging: int) -> Target:
        """What the engine fills: the bytes as they lie, or a turned tensor's elements in order."""
        if self.turned:
            tensor = tensor_of(self.key, self.items[0].entry)
        else:
            tensor = whole("", Stored(self.key, DType.U8, (self.nbytes,), self.start))
        return Target(tensor, tuple(tensor.pieces()), sink, 0, staging)


def divide(items: Iterable[Item], most: int) -> Iterator[Segment]:
    """Segments for tensors in the order in which they are wanted. ``most``: bytes of a run of small ones."""
    run: list[Item] = []
    key, start, end = "", 0, 0

    def made() -> Segment:
        return Segment(key, start, end - start, tuple(run))

    for item in items:
        entry = item.entry
        if not entry.nbytes:  # lies nowhere, and is handed out in its turn
            run.append(item)
            continue
        alone = entry.nbytes > most or entry.strides is not None or entry.offset % _unit(entry.dtype) != 0
        begun = end > start
        near = begun and item.file.key == key and end <= entry.offset <= end + GAP
        if run and (alone or (begun and not (near and entry.offset + entry.nbytes - start <= most))):
            yield made()
            run, begun = [], False
        if not begun:
            key, start = item.file.key, entry.offset
        run.append(item)
        end = entry.offset + entry.nbytes
        if alone:
            yield made()
            run, start, end = [], 0, 0
    if run:
        yield made()


def _unit(dtype: DType) -> int:
    return max(1, dtype.bits // 8)
