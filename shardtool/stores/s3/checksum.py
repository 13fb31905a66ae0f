"""Checksums that S3 servers verify and keep, and how those of the parts make that of the whole object.

The fastest that this Python has is used: CRC-64/NVME by awscrt (0.03 s of a processor for each GiB), or CRC-32 by zlib
(0.15), which is always there. Both run without Python's lock.
"""

from __future__ import annotations

import importlib
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

_PIECE = 64 << 20  # some libraries count in 32 bits


@dataclass(frozen=True, slots=True)
class Checksum:
    """A cyclic redundancy check as S3 has it. ``name``: ours, small; S3's is the same in capitals.

    ``update(data, value)``: the value of what gave ``value`` followed by ``data``; 0 is that of nothing.
    ``polynomial``: reflected, of ``bits`` bits.
    """

    name: str
    bits: int
    polynomial: int
    update: Callable[[memoryview, int], int]

    @property
    def algorithm(self) -> str:
        """S3's name."""
        return self.name.upper()

    @property
    def field(self) -> str:
        """The name of its value in requests and answers of botocore."""
        return f"Checksum{self.algorithm}"

    def of(self, data: memoryview) -> int:
        """The value of some bytes."""
        value = 0
        for start in range(0, len(data), _PIECE):
            value = self.update(data[start : start + _PIECE], value)
        return value

    def joined(self, first: int, second: int, length: int) -> int:
        """The value of two pieces, one after the other, from theirs; ``length``: bytes of the second."""
        return self._product(_shift(self, length), first) ^ second

    def given(self, value: int) -> dict[str, str]:
        """The fields of a PUT whose body has this value."""
        return {"ChecksumAlgorithm": self.algorithm, self.field: self.encoded(value)}

    def encoded(self, value: int) -> str:
        """As S3 writes it."""
        return b64encode(value.to_bytes(self.bits // 8, "big")).decode()

    def hexadecimal(self, value: int) -> str:
        """As ``Store.checksums`` writes it."""
        return f"{value:0{self.bits // 4}x}"

    def _product(self, a: int, b: int) -> int:
        """Of two polynomials modulo ours; the highest bit is the coefficient of 1."""
        found, bit = 0, 1 << (self.bits - 1)
        while a:
            if a & bit:
                found ^= b
                a ^= bit
            bit >>= 1
            b = b >> 1 ^ (self.polynomial if b & 1 else 0)
        return found


@cache
def _shift(checksum: Checksum, length: int) -> int:
    """The power ``8 * length`` of x: what so many bytes do to the value of what is before them."""
    found, power, bits = 1 << (checksum.bits - 1), 1 << (checksum.bits - 2), 8 * length
    while bits:
        if bits & 1:
            found = checksum._product(power, found)
        power = checksum._product(power, power)
        bits >>= 1
    return found


def crc32() -> Checksum:
    """The one that is always there."""
    return Checksum("crc32", 32, 0xEDB88320, zlib.crc32)


def crc64nvme() -> Checksum | None:
    """With awscrt, or None."""
    try:
        library = importlib.import_module("awscrt.checksums")
    except ImportError:
        return None
    return Checksum("crc64nvme", 64, 0x9A6C9329AC4BC9B5, library.crc64nvme)


@cache
def best() -> Checksum:
    """The fastest that is there."""
    return crc64nvme() or crc32()


def kept(answer: Mapping[str, Any]) -> dict[str, str]:
    """What an answer of botocore says of a whole object: its checksums in hexadecimal and its ETag."""
    found = {}
    if answer.get("ChecksumType") != "COMPOSITE":  # made of the parts' checksums, and different for other parts
        for name in ("crc32", "crc32c", "crc64nvme", "sha1", "sha256"):
            value = answer.get(f"Checksum{name.upper()}", "")
            if value and "-" not in value:
                found[name] = b64decode(value).hex()
    if tag := answer.get("ETag", "").strip('"'):
        found["etag"] = tag
    return found
