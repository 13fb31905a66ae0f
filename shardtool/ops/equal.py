"""Whether two tensors of one store have the same bytes, wherever these lie."""

from __future__ import annotations

from shardtool import schedule
from shardtool.budget import Arena
from shardtool.engine import execute
from shardtool.ops.limits import readers
from shardtool.plan import Stored, Tensor
from shardtool.schedule import Target
from shardtool.sinks.digest import DigestSink
from shardtool.stores.base import Store

BLOCK = 1 << 20
"""Bytes that are compared at a time where both tensors lie in order."""
MEMORY = 32 << 20
"""Bytes for one whose elements have to be gathered."""


def equal(store: Store, a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes; of one that is stored in order, none is read after a difference."""
    if a.nbytes != b.nbytes:
        return False
    if a.pieces() == b.pieces():
        return True
    if a.stored is not None and b.stored is not None:
        return _equal_blocks(store, a.stored, b.stored)
    return _digest(store, a) == _digest(store, b)


def _equal_blocks(store: Store, a: Stored, b: Stored) -> bool:
    block = memoryview(bytearray(2 * BLOCK))
    left, right = block[:BLOCK], block[BLOCK:]
    for at in range(0, a.nbytes, BLOCK):
        n = min(BLOCK, a.nbytes - at)
        store.readinto(a.key, a.offset + at, left[:n])
        store.readinto(b.key, b.offset + at, right[:n])
        if left[:n] != right[:n]:
            return False
    return True


def _digest(store: Store, tensor: Tensor) -> object:
    sink = DigestSink([tensor.nbytes], 0)
    target = Target(tensor, tensor.pieces(), sink, 0, DigestSink.staging)
    arena = Arena(MEMORY)
    steps = schedule.steps([[target]], limit=arena.size, want=arena.size // 4, longest=arena.size // 4)
    execute(steps, store, arena, readers=readers(None))
    return sink.digests()
