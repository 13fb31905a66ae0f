"""Checksums of parts make that of the whole, whoever computes them."""

from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.stores.s3.checksum import Checksum, best, crc32, crc64nvme, kept

KNOWN = [found for found in (crc32(), crc64nvme()) if found]


@pytest.mark.parametrize(("checksum", "value"), [(crc32(), "cbf43926"), (crc64nvme(), "ae8b14860a799888")])
def test_the_value_that_catalogues_have(checksum: Checksum | None, value: str) -> None:
    """Catalogues of CRCs give that of the nine digits."""
    if checksum is None:
        assert best().name == "crc32"
        return
    assert checksum.hexadecimal(checksum.of(memoryview(b"123456789"))) == value
    assert base64.b64decode(checksum.encoded(int(value, 16))).hex() == value


@pytest.mark.parametrize("checksum", KNOWN, ids=lambda checksum: checksum.name)
@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_two_pieces_make_a_whole(checksum: Checksum, first: bytes, second: bytes) -> None:
    a, b = checksum.of(memoryview(first)), checksum.of(memoryview(second))
    assert checksum.joined(a, b, len(second)) == checksum.of(memoryview(first + second))


@pytest.mark.parametrize("length", [5 << 30, (5 << 30) + 1, 1 << 45])
def test_a_piece_may_be_large(length: int) -> None:
    """That of zeros is what is known without reading them: twice as many are the same once more."""
    checksum = crc32()
    half = checksum.joined(checksum.joined(0, zlib.crc32(b"x"), 1), 0, length)
    assert checksum.joined(half, 0, length) == checksum.joined(zlib.crc32(b"x"), 0, 2 * length)


def test_what_a_server_says_of_parts_is_not_of_the_whole() -> None:
    value = crc32().encoded(0xCBF43926)
    assert kept({"ETag": '"abc-2"', "ChecksumCRC32": value, "ChecksumType": "FULL_OBJECT"}) == {
        "crc32": "cbf43926",
        "etag": "abc-2",
    }
    assert kept({"ChecksumCRC32": value}) == {"crc32": "cbf43926"}
    assert kept({"ChecksumCRC32": value, "ChecksumType": "COMPOSITE"}) == {}
    assert kept({"ChecksumCRC32": f"{value}-2"}) == {}
    assert kept({}) == {}
