"""Digests that are read again: of every tensor, whatever the memory and the readers, and no tensor costs a read."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool import digest, header
from shardtool.checkpoint import WeightFile
from shardtool.digest import TensorDigest
from shardtool.dtypes import DType
from shardtool.errors import BudgetTooSmall, ShardtoolError, Unavailable
from shardtool.header import PAGE, Entry, Header
from shardtool.ops import digests
from shardtool.ops.digests import LEAST, Run, runs
from shardtool.stores.base import Store, Wrapper
from shardtool.stores.memory import MemoryStore
from shardtool.testing import CountingStore, FaultyStore, Raise

pytestmark = pytest.mark.timeout(240)


def made(key: str, sizes: list[int], store: Store) -> tuple[WeightFile, list[bytes]]:
    """A file of tensors of so many bytes, in the store."""
    data = [random.Random(f"{key} {i}").randbytes(size) for i, size in enumerate(sizes)]
    text = header.encode([(f"t{i:05d}", DType.U8, (size,)) for i, size in enumerate(sizes)])
    store.put(key, text + b"".join(data))
    at, entries = len(text), []
    for i, size in enumerate(sizes):
        entries.append(Entry(f"t{i:05d}", DType.U8, (size,), at, size))
        at += size
    return WeightFile(key, at, Header(tuple(entries), {}, len(text))), data


def by_the_letter(data: bytes) -> TensorDigest:
    chunks = tuple(digest.of_chunk(data[at : at + digest.CHUNK]) for at in range(0, len(data), digest.CHUNK))
    return TensorDigest(digest.of_bytes(data), chunks)


def read(
    store: Store,
    files: list[WeightFile],
    *,
    limit: int | None = None,
    concurrency: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, list[TensorDigest]]:
    return digests.read(store, files, memory_limit=limit, concurrency=concurrency, progress=progress)


@given(
    st.lists(st.lists(st.sampled_from([0, 1, 70, 5000, 70_000, 300_001]), max_size=6), max_size=3),
    st.sampled_from([0, 1, 100_000, 10 << 20]),
    st.sampled_from([None, 1, 3]),
)
def test_every_tensor_has_its_digests_whatever_the_memory_and_the_readers(
    files: list[list[int]], more: int, concurrency: int | None
):
    store = MemoryStore()
    have = [made(f"f{i}", sizes, store) for i, sizes in enumerate(files)]
    told: list[int] = []
    found = read(
        store,
        [file for file, _ in have],
        limit=LEAST + more,
        concurrency=concurrency,
        progress=told.append,
    )
    assert found == {file.key: [by_the_letter(one) for one in data] for file, data in have}
    assert sum(told) == sum(map(sum, files))


def test_a_tensor_of_several_chunks_has_a_digest_for_each():
    store = MemoryStore()
    file, (data, rest) = made("f", [digest.CHUNK + 5, 3], store)
    found = read(store, [file], limit=1 << 20)
    assert found == {"f": [by_the_letter(data), by_the_letter(rest)]}
    assert len(found["f"][0].chunks) == 2


def test_small_neighbours_are_read_together_and_no_byte_twice():
    """Twenty thousand tensors of 64 bytes are 1.2 MiB: one read."""
    inner = MemoryStore()
    file, _ = made("f", [64] * 20_000, inner)
    store = CountingStore(inner)
    assert len(read(store, [file])["f"]) == 20_000
    start = file.header.data_offset
    assert store.reads["f"] == [(start, start + 64 * 20_000)]


def test_a_run_ends_where_the_next_tensor_would_be_too_much_and_a_large_one_is_alone():
    file, _ = made("f", [10, 0, 20, 71, 300, 0, 5, 5], MemoryStore())
    at = file.header.data_offset
    assert list(runs(file, 100)) == [
        Run("f", at, (10, 0, 20)),
        Run("f", at + 30, (71,)),
        Run("f", at + 101, (300,)),
        Run("f", at + 401, (0, 5, 5)),
    ]
    assert list(runs(made("g", [], MemoryStore())[0], 100)) == []


class Meeting(Wrapper):
    """A store in whose reads as many threads meet as shall."""

    def __init__(self, inner: Store, threads: int) -> None:
        super().__init__(inner)
        self.barrier = threading.Barrier(threads, timeout=30)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Wait for the others, then read."""
        self.barrier.wait()
        self.inner.readinto(key, start, view)


def test_the_tensors_of_one_file_are_hashed_side_by_side(monkeypatch: pytest.MonkeyPatch):
    """Two readers meet in the store; one alone would wait forever."""
    monkeypatch.setattr(digests, "cores", lambda: 1)
    inner = MemoryStore()
    size = 9 << 20  # more than one run
    file, data = made("f", [size, size], inner)
    found = read(Meeting(inner, 2), [file], concurrency=2, limit=2 * (16 << 20))
    assert found["f"] == [by_the_letter(one) for one in data]


def test_more_readers_begin_where_storage_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    """With one processor there are two readers at first; six meet once the store has turned out to be slow."""
    monkeypatch.setattr(digests, "cores", lambda: 1)
    inside, most, lock = 0, 0, threading.Lock()

    class Slow(Wrapper):
        def readinto(self, key: str, start: int, view: memoryview) -> None:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.02)
            self.inner.readinto(key, start, view)
            with lock:
                inside -= 1

    inner = MemoryStore()
    file, data = made("f", [600_000] * 120, inner)
    monkeypatch.setattr(digests, "READ", 600_000)
    found = read(Slow(inner), [file], concurrency=6)
    assert found["f"] == [by_the_letter(one) for one in data]
    assert most == 6


def test_reads_lie_in_memory_as_in_their_file():
    """So that a store can read past the page cache without a copy."""
    behind: set[int] = set()

    class Watched(Wrapper):
        def readinto(self, key: str, start: int, view: memoryview) -> None:
            import ctypes

            behind.add((ctypes.addressof(ctypes.c_char.from_buffer(view)) - start) % PAGE)
            self.inner.readinto(key, start, view)

    inner = MemoryStore()
    file, _ = made("f", [5 << 20, 123, 9 << 20, (1 << 20) + 7, 10 << 20], inner)
    read(Watched(inner), [file], concurrency=2)
    assert behind == {0}


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("number", [1, 5])
def test_the_failure_of_a_read_is_raised_and_no_thread_is_left(number: int, concurrency: int):
    inner = MemoryStore()
    file, _ = made("f", [300_000] * 10, inner)
    store = FaultyStore(inner, {("readinto", number): Raise(Unavailable("cut"))})
    before = set(threading.enumerate())
    with pytest.raises(Unavailable, match="cut"):
        read(store, [file], concurrency=concurrency, limit=LEAST * 4)
    assert set(threading.enumerate()) <= before


def test_what_progress_raises_is_raised():
    file, _ = made("f", [300_000] * 10, store := MemoryStore())

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(store, [file], progress=stop)


def test_less_memory_than_the_least_is_refused_with_the_least():
    file, _ = made("f", [10], store := MemoryStore())
    with pytest.raises(BudgetTooSmall) as error:
        read(store, [file], limit=LEAST - 1)
    assert error.value.needed == LEAST
    assert issubclass(BudgetTooSmall, ShardtoolError)
