"""File sinks: the file that comes of tiles in any order, its record, and what is left when it does not come."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool import digest
from shardtool.budget import Stopped
from shardtool.dtypes import DType
from shardtool.errors import NotFound
from shardtool.manifest import FileRecord
from shardtool.plan import File, Tensor
from shardtool.schedule import Target, Tile
from shardtool.sinks.file import FileSink, Slots
from shardtool.stores.base import Buffer, Store
from shardtool.stores.memory import MemoryStore
from tests.builders import parsed


def plan(sizes: list[int]) -> File:
    """A file of tensors of so many bytes."""
    tensors = tuple(Tensor(f"t{i:02d}", DType.U8, (size,), tuple) for i, size in enumerate(sizes))
    return File("folder/x.safetensors", 3, tensors)


def tiles(sink: FileSink, cuts: list[int]) -> list[Tile]:
    """The file's tensors in tiles, cut at these offsets too."""
    found, at = [], len(sink.file.header)
    for tensor in sink.file.tensors:
        inner = [at + cut for cut in cuts if 0 < cut < tensor.nbytes]
        ends = sorted({*inner, at + tensor.nbytes} - {at})
        for start, end in zip([at, *ends], ends, strict=False):
            found.append(Tile(Target(tensor, (), sink, at), start, end - start, 0, None))
        at += tensor.nbytes
    return found


def bring(sink: FileSink, tile: Tile, data: bytes) -> None:
    """What the engine does with a tile."""
    memory = memoryview(bytearray(tile.nbytes))
    room = sink.room(tile, memory)
    start = tile.offset - len(sink.file.header)
    room[:] = data[start : start + tile.nbytes]
    sink.done(tile, memory, lambda: None)


def made(store: Store, file: File, records: list[FileRecord], slots: Slots | None = None) -> FileSink:
    def published(record: FileRecord) -> None:
        records.append(record)

    return FileSink(file, 5, store, published, slots or Slots(1, store.unit(file.size)))


SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=6)


@given(SIZES, st.lists(st.integers(1, 29), max_size=4), st.randoms(), st.sampled_from([0, 1, 7, 4096]))
def test_tiles_in_any_order_make_the_file_and_its_record(
    sizes: list[int], cuts: list[int], order: random.Random, unit: int
):
    """Also where a store takes parts of ``unit`` bytes or more."""
    store = MemoryStore(unit=unit)
    records: list[FileRecord] = []
    file = plan(sizes)
    sink = made(store, file, records)
    data = random.Random(0).randbytes(sum(sizes))
    work = tiles(sink, cuts)
    order.shuffle(work)
    for tile in work:
        assert not records
        bring(sink, tile, data)
    if not sum(sizes):
        sink.open()
    (record,) = records
    written = store.get(file.key, limit=1 << 20)
    assert written == file.header + data
    assert (record.key, record.rank, record.part, record.size) == (file.key, 3, 5, len(written))
    assert record.header == digest.of_bytes(file.header)
    assert record.digest == digest.of_file(file.header, [t.digest for t in record.tensors])
    held = parsed(written)
    for tensor in record.tensors:
        assert tensor.digest.blake3 == digest.of_bytes(held[tensor.name].array.tobytes())


def test_a_file_without_bytes_is_its_header():
    store = MemoryStore()
    records: list[FileRecord] = []
    file = plan([0, 0])
    made(store, file, records).open()
    assert store.get(file.key, limit=1000) == file.header
    assert [t.name for t in records[0].tensors] == ["t00", "t01"]


def test_opening_twice_creates_one_file():
    store = MemoryStore()
    records: list[FileRecord] = []
    sink = made(store, plan([0]), records)
    sink.open()
    sink.open()
    assert len(records) == 1


def test_nothing_is_seen_of_a_file_before_its_last_tile_and_nothing_after_an_abort():
    store = MemoryStore()
    records: list[FileRecord] = []
    sink = made(store, plan([4, 4]), records)
    first, _ = tiles(sink, [])
    bring(sink, first, b"abcdefgh")
    with pytest.raises(NotFound):
        store.stat(sink.file.key)
    sink.abort()
    sink.abort()
    assert (list(store.list()), records) == ([], [])


class Waiting(MemoryStore):
    """A store in which the writing of a slice waits for something."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self.event = event

    def create(self, key: str, size: int, *, exclusive: bool = False) -> Any:
        """A writer that waits before each slice but the first, the header."""
        writer = super().create(key, size, exclusive=exclusive)
        write = writer.write

        def waiting(offset: int, view: Buffer) -> None:
            assert not offset or self.event.wait(60)
            write(offset, view)

        writer.write = waiting  # type: ignore[method-assign]
        return writer


def test_a_tile_is_hashed_while_the_tile_before_it_is_written(monkeypatch: pytest.MonkeyPatch):
    """The first tile's write ends when the second tile has been hashed."""
    hashed = threading.Event()
    update = digest.StreamDigester.update

    def told(digester: digest.StreamDigester, view: memoryview) -> None:
        update(digester, view)
        if bytes(view) == b"efgh":
            hashed.set()

    monkeypatch.setattr(digest.StreamDigester, "update", told)
    store = Waiting(hashed)
    records: list[FileRecord] = []
    sink = made(store, plan([4, 4]), records)
    first, second = tiles(sink, [])
    writing = threading.Thread(target=bring, args=(sink, first, b"abcdefgh"))
    writing.start()
    bring(sink, second, b"abcdefgh")
    writing.join(60)
    assert store.get(sink.file.key, limit=1 << 20) == sink.file.header + b"abcdefgh"
    assert [tensor.digest.blake3 for tensor in records[0].tensors] == [digest.of_bytes(x) for x in (b"abcd", b"efgh")]


def test_an_abort_before_the_first_tile_and_after_the_last_does_nothing():
    store = MemoryStore()
    records: list[FileRecord] = []
    sink = made(store, plan([4]), records)
    sink.abort()
    for tile in tiles(sink, []):
        bring(sink, tile, b"abcd")
    sink.abort()
    assert store.exists(sink.file.key)


def test_files_take_turns_in_the_slots_of_uploads():
    """The second file begins when the first has given its buffer back."""
    store = MemoryStore(unit=8)
    records: list[FileRecord] = []
    slots = Slots(1, 8)
    first, second = (made(store, plan([20]), records, slots) for _ in range(2))
    first.open()
    began = threading.Event()

    def begin() -> None:
        second.open()
        began.set()

    thread = threading.Thread(target=begin)
    thread.start()
    assert not began.wait(0.05)
    for tile in tiles(first, []):
        bring(first, tile, bytes(20))
    assert began.wait(60)
    thread.join()
    second.abort()


def test_whoever_waits_for_a_slot_is_woken_when_the_run_fails():
    slots = Slots(1, 8)
    slots.take()
    raised: list[BaseException] = []

    def take() -> None:
        for _ in range(2):
            try:
                slots.take()
            except Stopped as error:
                raised.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    slots.stop()
    thread.join(60)
    assert len(raised) == 2
    assert slots.nbytes == 8
