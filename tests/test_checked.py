"""Bytes that are checked on the way: nothing is handed on unchecked that has a digest, and no chunk is read twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool import digest
from shardtool.budget import PAGE
from shardtool.checked import KEPT, Checked
from shardtool.checkpoint import WeightFile
from shardtool.dtypes import DType
from shardtool.errors import ChecksumMismatch
from shardtool.header import Entry, Header
from shardtool.segments import Item
from shardtool.stores.counting import CountingStore
from shardtool.stores.memory import MemoryStore

KEY = "model.safetensors"
CHUNK = 100
SIZES = [250, 0, 30, 100, 1, 420, 99]
"""Bytes of the tensors, with ``GAPS`` before each: a gap has no digest."""
GAPS = [17, 0, 0, 5, 0, 40, 0]
DATA = bytes((i * 37 + i // 251) % 256 for i in range(sum(SIZES) + sum(GAPS) + 23))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "CHUNK", CHUNK)


def items() -> list[Item]:
    file = WeightFile(KEY, len(DATA), Header((), {}, 0))
    found, at = [], 0
    for number, (gap, size) in enumerate(zip(GAPS, SIZES, strict=True)):
        at += gap
        entry = Entry(f"t{number}", DType.U8, (size,), at, size)
        chunks = tuple(digest.of_chunk(DATA[at : at + size][i : i + CHUNK]) for i in range(0, size, CHUNK))
        found.append(Item(entry.name, file, entry, chunks))
        at += size
    return found


def store(data: bytes = DATA) -> tuple[Checked, CountingStore]:
    inner = MemoryStore()
    inner.put(KEY, data)
    inner.put("other", data)
    counting = CountingStore(inner)
    return Checked(counting, reversed(items())), counting


def chunks() -> list[tuple[int, int]]:
    """The bytes of every chunk."""
    return [
        (low, min(item.entry.offset + item.entry.nbytes, low + CHUNK))
        for item in items()
        for low in range(item.entry.offset, item.entry.offset + item.entry.nbytes, CHUNK)
    ]


def read(checked: Checked, start: int, size: int) -> bytes:
    memory = bytearray(b"\xee" * size)
    checked.readinto(KEY, start, memoryview(memory))
    return bytes(memory)


ranges = st.tuples(st.integers(0, len(DATA)), st.integers(0, len(DATA))).map(sorted)


@given(st.lists(ranges, max_size=6))
def test_what_is_read_is_what_there_is(wanted: list[list[int]]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "CHUNK", CHUNK)
        checked, _ = store()
        for start, end in wanted:
            assert read(checked, start, end - start) == DATA[start:end]


@given(ranges, st.integers(0, len(DATA) - 1))
def test_damage_is_found_in_every_chunk_of_which_a_byte_is_read_and_in_no_other(wanted: list[int], at: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "CHUNK", CHUNK)
        start, end = wanted
        damaged = bytearray(DATA)
        damaged[at] ^= 1
        checked, _ = store(bytes(damaged))
        hit = [low for low, high in chunks() if low <= at < high and low < end and start < high and start < end]
        if not hit:
            assert read(checked, start, end - start) == bytes(damaged[start:end])
            return
        with pytest.raises(ChecksumMismatch, match=r"tensor 't\d' differs from its digest in its bytes \d+ to \d+"):
            read(checked, start, end - start)


@given(ranges)
def test_a_range_costs_at_most_the_chunks_in_which_it_begins_and_ends(wanted: list[int]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "CHUNK", CHUNK)
        start, end = wanted
        checked, counting = store()
        read(checked, start, end - start)
        needed = set(range(start, end)).union(
            *(range(low, high) for low, high in chunks() if low < end and start < high and start < end)
        )
        assert counting.bytes_read == counting.distinct_bytes_read() == len(needed)
        assert checked.cost([(KEY, start, end - start)]) == len(needed)


def test_neighbouring_ranges_read_a_chunk_once():
    """Bands of rows that begin in the middle of a chunk, as ranks have them."""
    checked, counting = store()
    bands = [(at, 90) for at in range(31, len(DATA) - 90, 90)]
    for start, size in bands:
        read(checked, start, size)
    assert counting.bytes_read == counting.distinct_bytes_read()
    assert checked.cost([(KEY, start, size) for start, size in bands]) == counting.bytes_read


def test_threads_that_want_one_chunk_wait_for_one_read():
    checked, counting = store()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: read(checked, 20 + i, 3), range(8)))
    assert found == [DATA[20 + i : 23 + i] for i in range(8)]
    assert counting.bytes_read == CHUNK


def test_a_damaged_chunk_is_damaged_for_everybody_who_wants_it():
    damaged = bytearray(DATA)
    damaged[60] ^= 1
    checked, _ = store(bytes(damaged))
    for _ in range(2):
        with pytest.raises(ChecksumMismatch, match=rf"{KEY}: tensor 't0' differs .* bytes 0 to 100;"):
            read(checked, 20, 3)


@given(st.lists(ranges, max_size=4), st.integers(0, len(DATA) - 1))
def test_at_the_end_what_nobody_has_read_is_checked_and_nothing_twice(wanted: list[list[int]], at: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "CHUNK", CHUNK)
        checked, counting = store()
        for start, end in wanted:
            read(checked, start, end - start)
        before = counting.bytes_read
        wholly = {low for low, high in chunks() for start, end in wanted if low < end and start < high and start < end}
        checked.finish(2)
        assert counting.bytes_read - before == sum(high - low for low, high in chunks() if low not in wholly)
        damaged = bytearray(DATA)
        damaged[at] ^= 1
        checked, _ = store(bytes(damaged))
        if any(low <= at < high for low, high in chunks()):
            with pytest.raises(ChecksumMismatch, match=r"tensor 't\d' differs from its digest"):
                checked.finish(2)
        else:
            checked.finish(2)


def test_what_is_wanted_in_parts_is_read_into_the_same_few_pieces_of_memory():
    checked, _ = store()
    for _ in range(3):
        for low, _ in chunks():
            read(checked, low, 1)
    assert len(checked._aside) + len(checked._spare) <= 1 + KEPT


def test_one_that_rests_passes_everything_on():
    damaged = bytearray(DATA)
    damaged[60] ^= 1
    checked, counting = store(bytes(damaged))
    checked.rest()
    assert read(checked, 20, 50) == damaged[20:70]
    assert counting.bytes_read == 50


def test_other_objects_and_tensors_without_digests_pass():
    checked, counting = store()
    memory = bytearray(50)
    checked.readinto("other", 20, memoryview(memory))
    assert (bytes(memory), counting.bytes_read) == (DATA[20:70], 50)


def test_it_says_what_memory_it_takes():
    checked, counting = store()
    assert checked.reading(3) == counting.reading(3) + (3 + KEPT) * (CHUNK + PAGE)
    checked.rest()
    assert checked.reading(3) == counting.reading(3)
