"""Segments on their way: tiles in any order, each chunk checked, nothing handed on before the last byte is there."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardtool import digest
from shardtool.budget import Gate, Slabs
from shardtool.checkpoint import WeightFile
from shardtool.dtypes import DType
from shardtool.engine import Clock
from shardtool.errors import ChecksumMismatch
from shardtool.header import Entry, Header
from shardtool.schedule import Tile
from shardtool.segments import Item, Segment, divide
from shardtool.sinks.device import Plain
from shardtool.sinks.segment import Apart, Fresh, Given, Place, SegmentSink

KINDS = {DType.U8: torch.uint8, DType.BF16: torch.bfloat16, DType.F32: torch.float32, DType.I64: torch.int64}


def held(shapes: list[tuple[DType, tuple[int, ...]]], start: int = 8) -> tuple[list[Item], bytes]:
    """Tensors one after the other in a file, and its bytes."""
    entries, at = [], start
    for number, (dtype, shape) in enumerate(shapes):
        entries.append(Entry(f"t{number}", dtype, shape, at, dtype.nbytes(math.prod(shape))))
        at += entries[-1].nbytes
    data = random.Random(at).randbytes(at)
    file = WeightFile("x.safetensors", at, Header(tuple(entries), {}, start))
    found = []
    for entry in entries:
        part = data[entry.offset : entry.offset + entry.nbytes]
        chunks = tuple(digest.of_chunk(part[i : i + digest.CHUNK]) for i in range(0, len(part), digest.CHUNK))
        found.append(Item(entry.name, file, entry, chunks))
    return found, data


def wanted(item: Item, data: bytes) -> torch.Tensor:
    entry = item.entry
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=KINDS[entry.dtype])
    own = bytearray(data[entry.offset : entry.offset + entry.nbytes])
    return torch.frombuffer(own, dtype=KINDS[entry.dtype]).view(entry.shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: random bytes are sometimes not a number."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


def bring(segment: Segment, place: Place, data: bytes, ready: Callable[[SegmentSink], None], *, tile: int) -> None:
    """What the engine does, tiles in any order."""
    sink = SegmentSink(0, segment, place, Plain(Clock()), Clock(), "here/x.safetensors", ready)
    sink.begin()
    target = segment.target(sink, place.staging)
    tiles = [Tile(target, at, min(tile, segment.nbytes - at), 0, None) for at in range(0, segment.nbytes, tile)]
    random.Random(1).shuffle(tiles)
    for one in tiles:
        memory = memoryview(bytearray(one.nbytes * place.staging))
        at = segment.start + one.offset
        sink.room(one, memory)[:] = data[at : at + one.nbytes]
        sink.done(one, memory, lambda: None)


SHAPES = st.lists(
    st.tuples(st.sampled_from([DType.I64, DType.F32, DType.BF16, DType.U8]), st.lists(st.integers(0, 5), max_size=3)),
    min_size=1,
    max_size=6,
)


@given(SHAPES, st.sampled_from([8, 9, 4096, 4100]), st.sampled_from(["fresh", "apart", "given", "turned"]))
def test_tensors_arrive_as_they_lie_in_the_file(shapes: list[tuple[DType, list[int]]], start: int, kind: str):
    found, data = held([(dtype, tuple(shape)) for dtype, shape in shapes], start)
    targets = {}
    for item in found:
        blank = torch.zeros(item.entry.shape, dtype=KINDS[item.entry.dtype])
        targets[item.name] = blank.mT.contiguous().mT if kind == "turned" and blank.dim() > 1 else blank
    for segment in divide(found, 1 << 20):
        places: dict[str, Place] = {
            "fresh": Fresh(segment, Slabs(1 << 30)),
            "apart": Apart(segment, torch.device("cpu"), Gate(1 << 30)),
            "given": Given(segment, targets),
            "turned": Given(segment, targets),
        }
        place = places[kind]
        done: list[SegmentSink] = []
        bring(segment, place, data, done.append, tile=digest.CHUNK)
        assert len(done) == 1
        tensors = place.tensors()
        place.leave()
        for item, tensor in zip(segment.items, tensors, strict=True):
            assert same(tensor, wanted(item, data)), item.name
            assert tensor.data_ptr() % item.entry.dtype.itemsize == 0
            if kind in ("given", "turned"):
                assert tensor is targets[item.name]


@pytest.mark.parametrize("kind", ["fresh", "apart"])
def test_damage_is_named_with_its_tensor_and_nothing_is_handed_on(kind: str):
    """The second of three neighbours, and the second chunk of a large one."""
    found, data = held([(DType.U8, (100,)), (DType.U8, (50,)), (DType.U8, (100,))])
    (segment,) = divide(found, 1 << 20)
    broken = bytearray(data)
    broken[found[1].entry.offset + 7] ^= 1
    done: list[SegmentSink] = []
    place: Place = Fresh(segment, Slabs(1 << 30)) if kind == "fresh" else Apart(segment, torch.device("cpu"), Gate(1))
    with pytest.raises(ChecksumMismatch, match=r"^here/x\.safetensors: tensor 't1' differs .* bytes 0 to 50;"):
        bring(segment, place, bytes(broken), done.append, tile=digest.CHUNK)
    assert not done

    (large,), data = held([(DType.U8, (digest.CHUNK + 100,))])
    (segment,) = divide([large], 1 << 20)
    broken = bytearray(data)
    broken[-1] ^= 1
    place = Fresh(segment, Slabs(1 << 30)) if kind == "fresh" else Apart(segment, torch.device("cpu"), Gate(1))
    with pytest.raises(ChecksumMismatch, match=rf"bytes {digest.CHUNK} to {digest.CHUNK + 100};"):
        bring(segment, place, bytes(broken), done.append, tile=digest.CHUNK)
    assert not done


def test_a_tensor_owns_no_more_than_itself():
    """What a caller stores or sends of a small tensor is that tensor, and not its neighbours."""
    found, data = held([(DType.U8, (100,)), (DType.F32, (5,)), (DType.U8, (3,))])
    (segment,) = divide(found, 1 << 20)
    place = Fresh(segment, Slabs(1 << 30))
    bring(segment, place, data, lambda _: None, tile=digest.CHUNK)
    assert [tensor.untyped_storage().nbytes() for tensor in place.tensors()] == [100, 20, 3]


def test_a_large_tensor_is_filled_in_place_and_a_small_one_through_a_buffer():
    found, _ = held([(DType.U8, (100,)), (DType.U8, (100,))])
    target = {"t0": torch.zeros(100, dtype=torch.uint8), "t1": torch.zeros(100, dtype=torch.uint8)}
    (both,) = divide(found, 1 << 20)
    assert Given(both, target).staging == 1
    first, _ = divide(found, 50)
    assert Given(first, target).staging == 0
    turned = {"t0": torch.zeros(200, dtype=torch.uint8)[::2]}
    assert Given(first, turned).staging == 1
