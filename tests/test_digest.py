"""Digests: what a stream gives however it is cut is what the whole gives."""

from __future__ import annotations

import random

import blake3
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shardtool import digest
from shardtool.digest import StreamDigester, TensorDigest, of_bytes, of_chunk, of_file

SIZES = st.lists(st.integers(0, 40), max_size=6)


def at_once(data: bytes, chunk: int) -> TensorDigest:
    """A tensor's digests from its bytes, by the letter."""
    chunks = [xxhash.xxh3_128(data[i : i + chunk]).hexdigest() for i in range(0, len(data), chunk)]
    return TensorDigest(blake3.blake3(data).hexdigest(), tuple(chunks))


@given(SIZES, st.integers(1, 17), st.lists(st.integers(0, 30), min_size=1, max_size=30))
def test_a_stream_gives_the_digests_of_its_tensors_however_it_is_cut(sizes: list[int], chunk: int, cuts: list[int]):
    data = random.Random(0).randbytes(sum(sizes))
    digester = StreamDigester(sizes, chunk)
    at = 0
    while at < len(data):
        for cut in cuts or [1]:
            digester.update(memoryview(data)[at : at + cut])
            at += cut
        digester.update(memoryview(data)[at : at + 1])
        at += 1
    wanted, start = [], 0
    for size in sizes:
        wanted.append(at_once(data[start : start + size], chunk))
        start += size
    assert digester.digests() == wanted


def test_a_chunk_is_eight_mebibytes_of_one_tensor():
    sizes = [digest.CHUNK + 5, 3]
    data = bytes(range(256)) * (sum(sizes) // 256 + 1)
    digester = StreamDigester(sizes)
    digester.update(memoryview(data)[: sum(sizes)])
    long, short = digester.digests()
    assert long.chunks == (of_chunk(data[: digest.CHUNK]), of_chunk(data[digest.CHUNK : sizes[0]]))
    assert short == at_once(data[sizes[0] : sum(sizes)], digest.CHUNK)
    assert long.blake3 == of_bytes(data[: sizes[0]])


def test_empty_tensors_have_the_digest_of_nothing_and_no_chunks():
    nothing = TensorDigest(of_bytes(b""), ())
    assert StreamDigester([]).digests() == []
    assert StreamDigester([0, 0]).digests() == [nothing, nothing]


@pytest.mark.parametrize("size", [digest.BLOCK - 1, digest.BLOCK, 3 * digest.BLOCK + 5])
def test_what_is_longer_than_a_block_is_hashed_as_a_whole(size: int):
    data = random.Random(0).randbytes(size)
    digester = StreamDigester([size])
    digester.update(memoryview(data))
    assert digester.digests() == [at_once(data, digest.CHUNK)]


def test_digests_are_not_given_before_the_last_byte():
    digester = StreamDigester([4])
    digester.update(memoryview(b"abc"))
    with pytest.raises(AssertionError, match="before the last byte"):
        digester.digests()


def test_bytes_beyond_the_last_tensor_are_not_taken():
    digester = StreamDigester([2])
    with pytest.raises(AssertionError, match="more bytes"):
        digester.update(memoryview(b"abc"))


@given(st.binary(max_size=20), st.lists(st.binary(max_size=5), max_size=4))
def test_a_files_digest_covers_its_header_and_each_tensor_in_order(header: bytes, tensors: list[bytes]):
    digests = [at_once(data, 8) for data in tensors]
    parts = [blake3.blake3(data).digest() for data in (header, *tensors)]
    assert of_file(header, digests) == blake3.blake3(b"".join(parts)).hexdigest()


def test_a_files_digest_differs_when_anything_does():
    one, two = at_once(b"one", 8), at_once(b"two", 8)
    found = {of_file(b"h", [one, two]), of_file(b"h", [two, one]), of_file(b"g", [one, two]), of_file(b"h", [one])}
    assert len(found) == 4
