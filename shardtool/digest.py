"""Digests: what each number covers, and how to compute them while bytes stream past.

* A *chunk* is 8 MiB of one tensor's bytes (the last may be shorter). Its xxh3_128 guards against accidents and is
  checked in any order by
  whoever reads the chunk.
* A *tensor*'s identity is the blake3 of its bytes.
* A *file*'s digest is the blake3 of its header and its tensors' digests in order, so that it needs no second pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import blake3
import xxhash

CHUNK = 8 << 20
"""Bytes of a tensor that one xxh3_128 covers."""
BLOCK = 1 << 20
"""Bytes that are hashed in two ways at a time: the second finds them in the processor's own cache."""


class TensorDigest(NamedTuple):
    """A tensor's blake3 and the xxh3_128 of each of its chunks, in hexadecimal."""

    blake3: str
    chunks: tuple[str, ...]


def of_bytes(data: bytes | memoryview) -> str:
    """The blake3 of some bytes."""
    return blake3.blake3(data).hexdigest()


class Running:
    """The blake3 of bytes that arrive in pieces."""

    def __init__(self) -> None:
        self._hash = blake3.blake3()

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._hash.update(data)

    def hexdigest(self) -> str:
        """The digest of what came so far."""
        return self._hash.hexdigest()


def of_chunk(data: bytes | memoryview) -> str:
    """The xxh3_128 of a chunk."""
    return xxhash.xxh3_128_hexdigest(data)


def of_chunks(chunks: Iterable[bytes | memoryview]) -> list[str]:
    """The xxh3_128 of each, without a call of ours for every one."""
    return list(map(xxhash.xxh3_128_hexdigest, chunks))


def of_file(header: bytes, tensors: Sequence[TensorDigest]) -> str:
    """A file's digest, from its header and its tensors' digests in the order of their bytes."""
    total = blake3.blake3(blake3.blake3(header).digest())
    for tensor in tensors:
        total.update(bytes.fromhex(tensor.blake3))
    return total.hexdigest()


class StreamDigester:
    """Digests of tensors whose bytes arrive one after the other, without regard to their borders."""

    def __init__(self, sizes: Sequence[int], chunk: int = CHUNK) -> None:
        self._sizes = sizes
        self._chunk = chunk
        self._index = -1
        self._left = 0
        self._done: list[TensorDigest] = []
        self._next()

    def _next(self) -> None:
        """Begin the next tensor that has bytes."""
        while True:
            self._index += 1
            self._identity = blake3.blake3()
            self._chunks: list[str] = []
            self._running = xxhash.xxh3_128()
            self._in_chunk = 0
            if self._index == len(self._sizes):
                return
            self._left = self._sizes[self._index]
            if self._left:
                return
            self._done.append(TensorDigest(self._identity.hexdigest(), ()))

    def update(self, view: memoryview) -> None:
        """The next bytes."""
        at = 0
        while at < len(view):
            assert self._left, "more bytes arrived than the tensors have"
            n = min(len(view) - at, self._left, self._chunk - self._in_chunk, BLOCK)
            part = view[at : at + n]
            self._identity.update(part)
            self._running.update(part)
            self._left -= n
            self._in_chunk += n
            at += n
            if self._in_chunk == self._chunk or not self._left:
                self._chunks.append(self._running.hexdigest())
                self._running = xxhash.xxh3_128()
                self._in_chunk = 0
            if not self._left:
                self._done.append(TensorDigest(self._identity.hexdigest(), tuple(self._chunks)))
                self._next()

    def digests(self) -> list[TensorDigest]:
        """The digests of all tensors; every byte must have arrived."""
        assert self._index == len(self._sizes), "the digests were asked for before the last byte"
        return self._done
