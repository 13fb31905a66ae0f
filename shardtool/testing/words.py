"""What the laws are told with: names, contents, checksums, and the gaps that a store may declare."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Callable, Mapping, Set
from functools import cache

import xxhash

from shardtool.stores.base import Buffer, Store, octets

BAD_KEYS = ("", "/", "/etc/passwd", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a\\b", "a\0b")
UNUSUAL_KEYS = ("a b", "a+b%20c", "ü/ö", "a?b#c", "..a/b..", "-", "a:b", "~")

GAPS: Mapping[str, str] = {
    "exclusive race": "of exclusive writers that meet several may win, and the store says so: conditional is False",
    "one version": "an object that is being replaced may be missing or end too soon: an error, never other bytes",
    "unfinished": "what a killed writer leaves, if anything, cannot be listed",
    "age": "the time at which something unfinished was begun is wrong",
    "listing": "the objects cannot be listed",
    **{f"name {key}": f"an object cannot be called {key!r}" for key in UNUSUAL_KEYS},
}
"""The laws that a store may declare it cannot keep, and what that means."""


def check_gaps(gaps: Set[str]) -> None:
    """Fail on a gap without a name here."""
    assert gaps <= GAPS.keys(), f"no such gaps: {sorted(gaps - GAPS.keys())}; known are {sorted(GAPS)}"


def write(store: Store, key: str, data: Buffer, *, slice_size: int = 1 << 20, exclusive: bool = False) -> None:
    """Create an object in slices, of the writer's unit where that is more than ``slice_size``."""
    memory = octets(data)
    writer = store.create(key, len(memory), exclusive=exclusive)
    try:
        step = max(slice_size, writer.unit)
        for start in range(0, len(memory), step):
            writer.write(start, memory[start : start + step])
        writer.commit()
    finally:
        writer.abort()


def read(store: Store, key: str, start: int, size: int) -> bytes:
    """A range of an object as bytes."""
    room = bytearray(size)
    store.readinto(key, start, memoryview(room))
    return bytes(room)


@cache
def content(size: int, seed: int = 0) -> bytes:
    """Bytes that are different everywhere, so that a swap shows."""
    return random.Random(seed).randbytes(size)


def listed(store: Store, prefix: str = "") -> list[str]:
    """The keys in the order of the listing."""
    return [found.key for found in store.list(prefix)]


def _reflected(polynomial: int, bits: int) -> Callable[[bytes], str]:
    """A CRC of so many bits as hexadecimal digits; a byte at a time, to compare with and not to be fast."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)
        table.append(value)
    ones = (1 << bits) - 1

    def crc(data: bytes) -> str:
        found = ones
        for byte in data:
            found = table[(found ^ byte) & 255] ^ found >> 8
        return f"{found ^ ones:0{bits // 4}x}"

    return crc


ALGORITHMS: Mapping[str, Callable[[bytes], str]] = {
    "crc32": lambda data: f"{zlib.crc32(data):08x}",
    "crc32c": _reflected(0x82F63B78, 32),
    "crc64nvme": _reflected(0x9A6C9329AC4BC9B5, 64),
    "md5": lambda data: hashlib.md5(data, usedforsecurity=False).hexdigest(),
    "sha1": lambda data: hashlib.sha1(data, usedforsecurity=False).hexdigest(),
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
    "xxh3_128": lambda data: xxhash.xxh3_128_hexdigest(data),
}
"""Checksums of a whole content, in hexadecimal, by the names that ``Store.checksums`` gives them."""
