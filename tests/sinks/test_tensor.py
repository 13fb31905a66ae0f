"""Tensor sinks: chunks land in tensors of any kind of memory, checked first, and handed on when all are there."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardtool import digest
from shardtool.budget import HUGE, Gate
from shardtool.dtypes import DType
from shardtool.errors import ChecksumMismatch
from shardtool.plan import Tensor
from shardtool.schedule import Target, Tile
from shardtool.sinks.tensor import TensorSink, empty, lends, octets


def sink_of(
    target: torch.Tensor | Callable[[], torch.Tensor],
    dtype: DType,
    shape: tuple[int, ...],
    ready: Callable[[TensorSink], None],
    *,
    staging: int = 0,
    chunks: tuple[str, ...] | None = None,
    gate: Gate | None = None,
) -> TensorSink:
    make = (lambda: target) if isinstance(target, torch.Tensor) else target
    return TensorSink(
        "t",
        dtype,
        shape,
        dtype.nbytes(math.prod(shape)),
        where="here/x.safetensors",
        make=make,
        staging=staging,
        gate=gate or Gate(1 << 40),
        chunks=chunks,
        ready=ready,
    )


def bring(sink: TensorSink, dtype: DType, shape: tuple[int, ...], at: int, data: bytes) -> None:
    """What the engine does with a tile: ``data`` from byte ``at``."""
    target = Target(Tensor("t", dtype, shape, tuple), (), sink, 0, sink.staging)
    tile = Tile(target, at, len(data), 0, None)
    memory = memoryview(bytearray(len(data) * sink.staging))
    sink.room(tile, memory)[:] = data
    sink.done(tile, memory, lambda: None)


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_elements_land_where_they_belong_in_tensors_of_any_strides(shape: list[int], data: st.DataObject):
    """Runs of any length in any order: a contiguous target, a transposed one, every other row of one."""
    kind = data.draw(
        st.sampled_from([(DType.F32, torch.float32), (DType.BF16, torch.bfloat16), (DType.I64, torch.int64)])
    )
    dtype, typed = kind
    size = math.prod(shape)
    wanted = torch.arange(size).to(typed).reshape(shape)
    order = data.draw(st.permutations(range(len(shape))))
    form = data.draw(st.sampled_from(["plain", "turned", "stepped"]))
    if form == "plain" or not shape:
        target = torch.zeros(shape, dtype=typed)
    elif form == "turned":
        target = torch.zeros([shape[i] for i in order], dtype=typed).permute(
            [order.index(i) for i in range(len(shape))]
        )
    else:
        target = torch.zeros([2 * n for n in shape], dtype=typed)[tuple(slice(None, None, 2) for _ in shape)]
    assert tuple(target.shape) == tuple(shape)
    staging = 0 if lends(target) and data.draw(st.booleans()) else 1
    done: list[TensorSink] = []
    sink = sink_of(target, dtype, tuple(shape), done.append, staging=staging)
    raw = octets(wanted).numpy().tobytes()
    cuts = sorted({0, *data.draw(st.lists(st.integers(0, size), max_size=3))})
    work = [(a * dtype.itemsize, b * dtype.itemsize) for a, b in zip(cuts, [*cuts[1:], size], strict=True) if a < b]
    random.Random(0).shuffle(work)
    for a, b in work:
        assert not done
        bring(sink, dtype, tuple(shape), a, raw[a:b])
    assert done == [sink]
    assert torch.equal(target, wanted)


def test_a_tensor_that_lends_its_memory_is_read_straight_into():
    target = torch.zeros(4, dtype=torch.uint8)
    sink = sink_of(target, DType.U8, (4,), lambda _: None)
    tile = Tile(Target(Tensor("t", DType.U8, (4,), tuple), (), sink, 0, 0), 1, 2, 0, None)
    room = sink.room(tile, memoryview(b""))
    room[:] = b"ab"
    assert target.tolist() == [0, 97, 98, 0]


@pytest.mark.parametrize("staging", [0, 1])
def test_a_damaged_chunk_is_named_and_not_handed_over(staging: int):
    data = random.Random(0).randbytes(digest.CHUNK + 100)
    chunks = tuple(digest.of_chunk(data[at : at + digest.CHUNK]) for at in (0, digest.CHUNK))
    target = torch.zeros(len(data), dtype=torch.uint8)
    done: list[TensorSink] = []
    sink = sink_of(target, DType.U8, (len(data),), done.append, staging=staging, chunks=chunks)
    bring(sink, DType.U8, (len(data),), 0, data[: digest.CHUNK])
    with pytest.raises(
        ChecksumMismatch, match=rf"^here/x\.safetensors: tensor 't' .* bytes {digest.CHUNK} to {len(data)};"
    ):
        bring(sink, DType.U8, (len(data),), digest.CHUNK, data[digest.CHUNK : -1] + b"\0")
    assert not done
    if staging:
        assert not target[digest.CHUNK :].any()
    bring(sink, DType.U8, (len(data),), digest.CHUNK, data[digest.CHUNK :])
    assert done == [sink]


def test_an_empty_tensor_is_ready_when_it_is_begun():
    done: list[TensorSink] = []
    sink = sink_of(torch.zeros(0, 3), DType.F32, (0, 3), done.append)
    sink.begin()
    sink.begin()
    assert done == [sink]


def test_a_target_is_made_when_there_is_room_for_it():
    gate = Gate(10)
    made: list[str] = []

    def maker(name: str) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            made.append(name)
            return torch.zeros(8, dtype=torch.uint8)

        return make

    sinks = [sink_of(maker(name), DType.U8, (8,), lambda _: None, gate=gate) for name in "ab"]
    sinks[0].begin()
    thread = threading.Thread(target=sinks[1].begin)
    thread.start()
    thread.join(0.05)
    assert made == ["a"]
    gate.leave(8)
    thread.join(10)
    assert made == ["a", "b"]


@pytest.mark.parametrize("dtype", [dtype for dtype in DType if dtype.torch_name and dtype.bits % 8 == 0])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_new_tensors_have_the_type_and_shape_that_was_asked_for(dtype: DType, shape: tuple[int, ...]):
    made = empty(dtype, shape, dtype.nbytes(math.prod(shape)))
    assert made.dtype is dtype.torch()
    assert tuple(made.shape) == shape
    assert lends(made)
    assert octets(made).numel() == dtype.nbytes(math.prod(shape))


def test_a_big_tensor_owns_its_memory():
    """It lies on huge pages, and goes when the last tensor that looks at it goes."""
    made = empty(DType.F32, (HUGE // 4, 2), 2 * HUGE)
    made.fill_(3)
    view = made[5]
    del made
    assert view.tolist() == [3, 3]


def test_what_does_not_lend_its_memory_is_reached_by_copies():
    assert lends(torch.zeros(2, 3))
    assert not lends(torch.zeros(2, 3).T)
    assert not lends(torch.zeros(2, 3, device="meta"))
    assert lends(torch.nn.Parameter(torch.zeros(2)))


@pytest.mark.cuda
@pytest.mark.parametrize("form", ["plain", "turned"])
def test_a_tensor_on_a_gpu_is_filled(form: str):
    wanted = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    target: Any = torch.zeros(3, 4, device="cuda") if form == "plain" else torch.zeros(4, 3, device="cuda").T
    done: list[TensorSink] = []
    sink = sink_of(target, DType.F32, (3, 4), done.append, staging=1)
    raw = octets(wanted).numpy().tobytes()
    for at, end in ((20, 48), (0, 20)):
        bring(sink, DType.F32, (3, 4), at, raw[at:end])
    assert done == [sink]
    assert torch.equal(target.cpu(), wanted)
