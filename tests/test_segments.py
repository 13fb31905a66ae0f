"""Segments: every tensor in one of them, in order, whole, and as few of them as the limit allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.budget import PAGE
from shardtool.checkpoint import WeightFile
from shardtool.dtypes import DType
from shardtool.header import Entry, Header
from shardtool.segments import GAP, Item, divide


def items_of(sizes: list[tuple[DType, int, int]], key: str = "a") -> list[Item]:
    """Tensors of a file one after the other: type, elements, and bytes that lie unused before each."""
    entries, at = [], 8
    for number, (dtype, count, gap) in enumerate(sizes):
        at += gap
        entries.append(Entry(f"{key}{number}", dtype, (count,), at, dtype.nbytes(count)))
        at += dtype.nbytes(count)
    file = WeightFile(key, at, Header(tuple(entries), {}, 8))
    return [Item(entry.name, file, entry, None) for entry in entries]


TENSORS = st.tuples(
    st.sampled_from([DType.U8, DType.BF16, DType.F32, DType.I64]), st.integers(0, 600), st.sampled_from([0, 0, 1, 5000])
)


@given(st.lists(TENSORS, max_size=12), st.lists(TENSORS, max_size=4), st.integers(1, 4000))
def test_every_tensor_is_in_one_segment_whole_and_in_order(
    first: list[tuple[DType, int, int]], second: list[tuple[DType, int, int]], most: int
):
    found = [*items_of(first), *items_of(second, "b")]
    segments = list(divide(found, most))
    assert [item for segment in segments for item in segment.items] == found
    for segment in segments:
        assert segment.nbytes <= most or sum(1 for item in segment.items if item.entry.nbytes) == 1
        for item in segment.items:
            entry = item.entry
            if not entry.nbytes:
                continue
            assert item.file.key == segment.key
            assert segment.start <= entry.offset
            assert entry.offset + entry.nbytes <= segment.start + segment.nbytes
            # In memory it is as well aligned as its type asks for, whatever the file does.
            assert (segment.lead + entry.offset - segment.start) % entry.dtype.itemsize == 0
        held = [item.entry for item in segment.items if item.entry.nbytes]
        assert segment.nbytes == (held[-1].offset + held[-1].nbytes - held[0].offset if held else 0)


def test_neighbours_are_read_as_one():
    segments = list(divide(items_of([(DType.BF16, 100, 0)] * 1000), 1 << 20))
    assert len(segments) == 1
    assert segments[0].nbytes == 200_000


@pytest.mark.parametrize(("gap", "count"), [(0, 1), (GAP, 1), (GAP + 1, 2)])
def test_a_small_gap_is_read_over(gap: int, count: int):
    assert len(list(divide(items_of([(DType.U8, 10, 0), (DType.U8, 10, gap)]), 1 << 20))) == count


def test_files_and_turns_in_the_order_are_borders():
    a, b = items_of([(DType.U8, 10, 0)] * 2), items_of([(DType.U8, 10, 0)] * 2, "b")
    assert len(list(divide([*a, *b], 1 << 20))) == 2
    assert len(list(divide([a[1], a[0]], 1 << 20))) == 2
    assert len(list(divide([a[0], b[0], a[1]], 1 << 20))) == 3


def test_what_lies_in_the_file_as_in_memory_can_be_read_past_the_cache():
    """A segment is as far behind the start of a page in memory as in its file, unless its type forbids that."""
    odd, even = items_of([(DType.BF16, 10, 1), (DType.U8, 3000, 0), (DType.F32, 10, 3)])[:2]
    (alone,), (other,) = divide([odd], 4096), divide([even], 4096)
    assert odd.entry.offset % 2 == 1
    assert alone.lead == 0
    assert other.lead == even.entry.offset % PAGE


def test_a_tensor_with_strides_is_alone():
    file = WeightFile("x.bin", 400, Header((), {}, 0))
    turned = Item("t", file, Entry("t", DType.F32, (3, 2), 64, 24, (1, 3)), None)
    plain = Item("p", file, Entry("p", DType.F32, (4,), 88, 16), None)
    first, second = divide([turned, plain], 1 << 20)
    assert first.turned
    assert not second.turned
    assert all(first.turned == (piece.src.strides == (1, 3)) for piece in first.target(object(), 0).pieces)
