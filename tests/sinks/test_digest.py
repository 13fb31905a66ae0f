"""Digest sinks: the digests of a file that is read in any order are those of its tensors."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool import digest
from shardtool.dtypes import DType
from shardtool.plan import Tensor
from shardtool.schedule import Target, Tile
from shardtool.sinks.digest import DigestSink


@given(st.lists(st.integers(0, 20), max_size=5), st.integers(1, 20), st.integers(0, 9), st.randoms())
def test_digests_are_those_of_the_tensors_whatever_the_order(
    sizes: list[int], most: int, start: int, order: random.Random
):
    tensor = Tensor("any", DType.U8, (sum(sizes),), tuple)
    data = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    sink = DigestSink(sizes, start)
    whole = b"".join(data)
    work = [(at, whole[at : at + most]) for at in range(0, len(whole), most)]
    order.shuffle(work)
    for at, part in work:
        tile = Tile(Target(tensor, (), sink, 0), start + at, len(part), 0, None)
        memory = memoryview(bytearray(part))
        assert sink.room(tile, memory) is memory
        sink.done(tile, memory, lambda: None)
    assert [found.blake3 for found in sink.digests()] == [digest.of_bytes(part) for part in data]
    assert [found.chunks for found in sink.digests()] == [(digest.of_chunk(part),) if part else () for part in data]


def test_digests_are_not_given_before_the_last_byte():
    with pytest.raises(AssertionError, match="before the last byte"):
        DigestSink([4], 0).digests()
