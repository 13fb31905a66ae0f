"""Comparison of what should be with what is: for ``verify --against``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from shardtool.cast import decode
from shardtool.dtypes import FLOATS, DType
from shardtool.plan import Stored
from shardtool.schedule import Tile
from shardtool.sinks.lane import Release
from shardtool.stores.base import Store

BLOCK = 1 << 16
"""Elements that are compared at a time, so that the temporaries stay in cache and out of the memory limit."""


@dataclass(slots=True)
class Difference:
    """How a stored tensor differs from what it should be."""

    count: int
    first: int  # element, in row-major order
    expected: float | int
    actual: float | int
    max_abs: float

    def index(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The first differing element's index in a tensor of this shape."""
        found, rest = [], self.first
        for dim in range(len(shape)):
            inner = math.prod(shape[dim + 1 :])
            found.append(rest // inner)
            rest %= inner
        return tuple(found)


class CompareSink:
    """Compares expected tiles of one stored tensor with its bytes, in any order."""

    staging = 2  # the expected tile and the stored bytes

    def __init__(self, store: Store, stored: Stored, found: list[CompareSink]) -> None:
        """``found``: where the sink puts itself when it sees its first difference."""
        self.stored = stored
        self.difference: Difference | None = None
        self._found = found
        self._store = store
        self._lock = Lock()

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """The first half of the step's memory."""
        return memory[: tile.nbytes]

    def done(self, tile: Tile, memory: memoryview, release: Release) -> None:
        """Read the stored bytes into the second half and compare. Tiles are counted from the tensor's start."""
        actual = memory[tile.nbytes : 2 * tile.nbytes]
        self._store.readinto(self.stored.key, self.stored.offset + tile.offset, actual)
        found = compare(memory[: tile.nbytes], actual, self.stored.dtype, tile.offset // self.stored.dtype.itemsize)
        if found:
            with self._lock:
                if self.difference is None:
                    self._found.append(self)
                self.difference = found if self.difference is None else _joined(self.difference, found)
        release()


def compare(expected: memoryview, actual: memoryview, dtype: DType, first: int) -> Difference | None:
    """The difference of two equally long runs of elements, the first of which is number ``first``.

    Bits are compared.
    """
    total: Difference | None = None
    bits = f"<u{dtype.itemsize}"
    a, b = np.frombuffer(expected, bits), np.frombuffer(actual, bits)
    for at in range(0, len(a), BLOCK):
        differs = np.flatnonzero(a[at : at + BLOCK] != b[at : at + BLOCK])
        if not len(differs):
            continue
        want, have = _values(a[at : at + BLOCK][differs], dtype), _values(b[at : at + BLOCK][differs], dtype)
        found = Difference(
            len(differs), first + at + int(differs[0]), want[0].item(), have[0].item(), _farthest(want, have, dtype)
        )
        total = found if total is None else _joined(total, found)
    return total


def _values(bits: NDArray[np.generic], dtype: DType) -> NDArray[np.generic]:
    return decode(bits.view(dtype.numpy), dtype)


def _farthest(want: NDArray[np.generic], have: NDArray[np.generic], dtype: DType) -> float:
    """The largest absolute difference; not a number if either side holds one that is not."""
    kind = np.complex128 if dtype is DType.C64 else np.float64 if dtype in FLOATS else np.longdouble
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.abs(want.astype(kind) - have.astype(kind)).max())


def _joined(a: Difference, b: Difference) -> Difference:
    first = a if a.first <= b.first else b
    return Difference(
        a.count + b.count, first.first, first.expected, first.actual, float(np.maximum(a.max_abs, b.max_abs))
    )
