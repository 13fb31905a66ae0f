"""For those who write a store: the laws as a test class, and two stores that wrap another to watch or to break it.

::

    class TestMyStore(StoreContract):            every law of shardtool.stores.base, one test each
        @pytest.fixture
        def store(self, tmp_path):
            with MyStore(tmp_path) as store:
                yield store

    CountingStore(inner)                         how many bytes were read and written, and which ones
    FaultyStore(inner, {("readinto", 3): Raise(Unavailable("cut"))})

Needs pytest; nothing else in shardtool imports this module.
"""

from __future__ import annotations

import array
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from shardtool.errors import AlreadyExists, FormatError, NotFound, UsageError
from shardtool.stores.base import Buffer, Object, Store, octets
from shardtool.stores.counting import CountingStore
from shardtool.stores.faulty import Call, Fault, FaultyStore, Flip, Raise, Truncate

__all__ = ["Call", "CountingStore", "Fault", "FaultyStore", "Flip", "Raise", "StoreContract", "Truncate", "write"]

BAD_KEYS = ("", "/", "/etc/passwd", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a\\b", "a\0b")


def write(store: Store, key: str, data: Buffer, *, slice_size: int = 1 << 20, exclusive: bool = False) -> None:
    """Create an object in slices, of the writer's unit where that is more than ``slice_size``."""
    memory = octets(data)
    writer = store.create(key, len(memory), exclusive=exclusive)
    try:
        step = max(slice_size, writer.unit)
        for start in range(0, len(memory), step):
            writer.write(start, memory[start : start + step])
        writer.commit()
    finally:
        writer.abort()


def _content(size: int, seed: int = 0) -> bytes:
    """Bytes that are different everywhere, so that a swap shows."""
    return random.Random(seed).randbytes(size)


def _keys(store: Store, prefix: str = "") -> list[str]:
    return [found.key for found in store.list(prefix)]


class StoreContract:
    """The laws of ``shardtool.stores.base``. A subclass brings a fixture ``store``: an empty store for each test."""

    large: ClassVar[int] = (12 << 20) + 5
    """Bytes of the largest objects: enough for several slices of a writer that has a unit."""

    def test_what_is_written_is_read(self, store: Store) -> None:
        """An object comes back as it was written, with its size."""
        data = _content(10_000)
        store.put("model.bin", data)
        assert store.stat("model.bin") == Object("model.bin", 10_000)
        assert store.get("model.bin", limit=10_000) == data

    def test_slices_follow_each_other(self, store: Store) -> None:
        """A large object written in slices is whole, and its last slice may be shorter than the unit."""
        data = _content(self.large)
        write(store, "large.bin", data)
        assert store.stat("large.bin").size == self.large
        assert store.get("large.bin", limit=self.large) == data

    @pytest.mark.parametrize(("start", "size"), [(0, 1), (0, 5000), (1, 4998), (4999, 1), (123, 2345)])
    def test_any_range_can_be_read(self, store: Store, start: int, size: int) -> None:
        """A view is filled with the bytes from ``start``, and no byte beside it is touched."""
        data = _content(5000)
        store.put("a", data)
        room = bytearray(b"\xaa" * (size + 2))
        store.readinto("a", start, memoryview(room)[1:-1])
        assert room == b"\xaa" + data[start : start + size] + b"\xaa"

    def test_a_view_of_larger_items_is_filled(self, store: Store) -> None:
        """The items of a view do not matter, only its bytes."""
        data = _content(8 * 100)
        store.put("a", memoryview(data).cast("Q"))
        numbers = array.array("Q", bytes(len(data)))
        store.readinto("a", 0, memoryview(numbers))
        assert numbers.tobytes() == data

    def test_an_empty_view_is_full(self, store: Store) -> None:
        """Reading nothing is possible at the start, in the middle and at the end."""
        store.put("a", b"abc")
        for start in (0, 1, 3):
            store.readinto("a", start, memoryview(bytearray()))

    @pytest.mark.parametrize(("start", "size"), [(0, 101), (50, 51), (100, 1), (1000, 10)])
    def test_an_object_that_ends_sooner_is_an_error(self, store: Store, start: int, size: int) -> None:
        """A view that reaches beyond the end is not filled in part but refused."""
        store.put("a", _content(100))
        with pytest.raises(FormatError, match="a"):
            store.readinto("a", start, memoryview(bytearray(size)))

    def test_a_range_starts_inside_the_object(self, store: Store) -> None:
        """A negative start does not count from the end."""
        store.put("a", b"abc")
        with pytest.raises(UsageError):
            store.readinto("a", -1, memoryview(bytearray(1)))

    def test_memory_to_read_into_is_writable(self, store: Store) -> None:
        """Read-only memory is refused."""
        store.put("a", b"abc")
        with pytest.raises(UsageError):
            store.readinto("a", 0, memoryview(b"123"))

    def test_what_is_not_there_is_not_found(self, store: Store) -> None:
        """An object that does not exist has no size and no bytes, and the message names it."""
        store.put("here", b"x")
        with pytest.raises(NotFound, match=r"missing\.bin"):
            store.stat("missing.bin")
        with pytest.raises(NotFound, match=r"missing\.bin"):
            store.readinto("missing.bin", 0, memoryview(bytearray(1)))
        with pytest.raises(NotFound, match="here/below"):
            store.stat("here/below")
        assert store.exists("here")
        assert not store.exists("missing.bin")

    def test_a_folder_is_not_an_object(self, store: Store) -> None:
        """What lies below a name does not make the name an object."""
        store.put("folder/a", b"x")
        assert not store.exists("folder")
        with pytest.raises(NotFound):
            store.readinto("folder", 0, memoryview(bytearray(1)))

    def test_nothing_is_visible_before_the_commit(self, store: Store) -> None:
        """Neither a listing nor a reader sees an object that is being written, not even when all bytes are there."""
        writer = store.create("a/b", 3)
        try:
            assert _keys(store) == []
            writer.write(0, b"abc")
            assert _keys(store) == []
            assert not store.exists("a/b")
            writer.commit()
        finally:
            writer.abort()
        assert _keys(store) == ["a/b"]

    def test_an_aborted_object_never_was(self, store: Store) -> None:
        """Aborting leaves nothing; doing it again does nothing."""
        for size in (3, self.large):
            writer = store.create("a/b", size)
            writer.write(0, bytes(min(size, max(1, writer.unit))))
            writer.abort()
            writer.abort()
            assert _keys(store) == []

    def test_an_abort_after_the_commit_does_nothing(self, store: Store) -> None:
        """The usual ``finally: abort()`` does not harm an object that was committed."""
        writer = store.create("a", 1)
        writer.write(0, b"x")
        writer.commit()
        writer.abort()
        assert store.get("a", limit=1) == b"x"

    def test_an_object_is_replaced_at_commit(self, store: Store) -> None:
        """Until the commit readers see the old object, then the new one, without a tail of the old."""
        store.put("a", b"old and long")
        writer = store.create("a", 3)
        try:
            writer.write(0, b"new")
            assert store.get("a", limit=100) == b"old and long"
            writer.commit()
        finally:
            writer.abort()
        assert store.get("a", limit=100) == b"new"
        assert _keys(store) == ["a"]

    def test_an_aborted_replacement_keeps_the_old_object(self, store: Store) -> None:
        """Giving up on a replacement changes nothing."""
        store.put("a", b"old")
        writer = store.create("a", 3)
        writer.write(0, b"new")
        writer.abort()
        assert store.get("a", limit=3) == b"old"

    def test_a_reader_sees_one_version(self, store: Store) -> None:
        """While an object is replaced again and again, each read gives one version, whole."""
        versions = [bytes([number]) * 4096 for number in range(8)]
        store.put("a", versions[0])

        def read(_: int) -> bytes:
            room = bytearray(4096)
            store.readinto("a", 0, memoryview(room))
            return bytes(room)

        with ThreadPoolExecutor(4) as pool:
            reads = pool.map(read, range(32))
            for version in versions[1:]:
                store.put("a", version)
            assert set(reads) <= set(versions)
        assert read(0) == versions[-1]

    def test_an_exclusive_object_is_created_once(self, store: Store) -> None:
        """Where an object is, an exclusive one is refused and changes nothing; where none is, it is created."""
        store.put("a", b"first", exclusive=True)
        with pytest.raises(AlreadyExists, match="a"):
            store.put("a", b"other", exclusive=True)
        assert store.get("a", limit=5) == b"first"
        assert _keys(store) == ["a"]

    def test_of_exclusive_writers_one_wins(self, store: Store) -> None:
        """Of eight writers that commit at the same moment one succeeds, the others know it, and its bytes stay."""
        start = threading.Barrier(8)

        def race(number: int) -> int | None:
            data = bytes([number]) * 100
            writer = store.create("folder/record", 100, exclusive=True)
            try:
                writer.write(0, data)
                start.wait(timeout=60)
                writer.commit()
            except AlreadyExists:
                return None
            finally:
                writer.abort()
            return number

        with ThreadPoolExecutor(8) as pool:
            winners = [number for number in pool.map(race, range(8)) if number is not None]
        assert len(winners) == 1
        assert store.get("folder/record", limit=100) == bytes(winners) * 100
        assert _keys(store) == ["folder/record"]

    def test_keys_are_listed_in_order(self, store: Store) -> None:
        """Keys come in plain string order, in which a slash is a character like any other, with their sizes."""
        keys = ["b", "a/b", "a.b", "a0", "a/B", "Z", "a-b", "a/b.c/d", "a/c", "ä", "1"]
        for size, key in enumerate(keys):
            store.put(key, bytes(size))
        assert [(found.key, found.size) for found in store.list()] == sorted((k, n) for n, k in enumerate(keys))

    @pytest.mark.parametrize("prefix", ["", "m", "model", "model-", "model/", "model/a", "model/a/", "x", "model/a/b"])
    def test_a_prefix_is_the_beginning_of_a_string(self, store: Store, prefix: str) -> None:
        """A listing has all keys that start with the prefix, however deep, be it a folder or part of a name."""
        keys = ["model", "model-1/a", "model-2/a", "model.json"] if prefix == "model" else []
        keys = keys or ["model-1", "model-2/a", "model.json", "model/a/b", "model/ab", "other/model"]
        for key in keys:
            store.put(key, b"x")
        assert _keys(store, prefix) == sorted(key for key in keys if key.startswith(prefix))

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_names_that_leave_the_store_are_refused(self, store: Store, key: str) -> None:
        """A name that could mean a place outside the store, or no object, is refused by every method."""
        with pytest.raises(UsageError):
            store.stat(key)
        with pytest.raises(UsageError):
            store.readinto(key, 0, memoryview(bytearray(1)))
        with pytest.raises(UsageError):
            store.create(key, 1)
        with pytest.raises(UsageError):
            store.delete(key)

    @pytest.mark.parametrize("key", ["a b", "a+b%20c", "ü/ö", "a?b#c", "..a/b..", "-", "a:b", "~"])
    def test_unusual_names_are_only_names(self, store: Store, key: str) -> None:
        """Characters that mean something in addresses or shells mean nothing here."""
        store.put(key, b"abc")
        assert _keys(store) == [key]
        assert store.get(key, limit=3) == b"abc"
        store.delete(key)
        assert _keys(store) == []

    def test_many_threads_read(self, store: Store) -> None:
        """Ranges read by many threads at once do not mix, in one object or in several."""
        objects = {f"shard-{number}": _content(200_000, number) for number in range(3)}
        for key, data in objects.items():
            store.put(key, data)

        def read(number: int) -> bool:
            chance = random.Random(number)
            key = chance.choice(sorted(objects))
            start = chance.randrange(200_000)
            room = bytearray(chance.randrange(200_000 - start) + 1)
            store.readinto(key, start, memoryview(room))
            return room == objects[key][start : start + len(room)]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(64)))

    def test_many_threads_write(self, store: Store) -> None:
        """Writers of different objects do not disturb each other."""
        objects = {f"folder-{number % 3}/{number}": _content(50_000 + number, number) for number in range(16)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: write(store, key, objects[key], slice_size=7000), objects))
        assert _keys(store) == sorted(objects)
        assert all(store.get(key, limit=100_000) == data for key, data in objects.items())

    def test_a_view_is_free_after_the_write(self, store: Store) -> None:
        """The writer keeps no hold of the caller's memory, which may be used again at once."""
        writer = store.create("large", self.large)
        memory = bytearray(max(writer.unit, self.large // 2))
        try:
            for start in range(0, self.large, len(memory)):
                size = min(len(memory), self.large - start)
                memory[:size] = bytes([start % 251]) * size
                with memoryview(memory)[:size] as view:
                    writer.write(start, view)
            memory += b"it can be resized"
            writer.commit()
        finally:
            writer.abort()
        first = bytearray(1)
        store.readinto("large", 0, memoryview(first))
        assert first == b"\0"

    def test_slices_are_as_long_as_the_unit(self, store: Store) -> None:
        """A writer has the unit that was announced, and refuses a shorter slice unless it is the last."""
        writer = store.create("large", self.large)
        assert writer.unit == store.unit(self.large)
        try:
            if writer.unit:
                assert writer.unit < self.large
                with pytest.raises(UsageError, match=str(writer.unit)):
                    writer.write(0, bytes(writer.unit - 1))
            else:
                writer.write(0, b"x")
        finally:
            writer.abort()

    def test_small_objects_are_written_in_one_go(self, store: Store) -> None:
        """An object in one slice is always taken, since its only slice is its last."""
        for size in (1, 100, 70_000):
            store.put("a", _content(size))
            assert store.stat("a").size == size

    @pytest.mark.parametrize("slices", [[], [b""], [b"", b""]])
    def test_empty_objects_are_objects(self, store: Store, slices: list[bytes]) -> None:
        """An object of no bytes can be written, by any number of empty slices, listed, read and removed."""
        writer = store.create("empty", 0)
        try:
            for each in slices:
                writer.write(0, each)
            writer.commit()
        finally:
            writer.abort()
        assert list(store.list()) == [Object("empty", 0)]
        assert store.get("empty", limit=0) == b""
        with pytest.raises(FormatError):
            store.readinto("empty", 0, memoryview(bytearray(1)))
        store.delete("empty")
        assert _keys(store) == []

    def test_slices_leave_no_gap(self, store: Store) -> None:
        """A slice that does not begin where the last one ended is refused."""
        writer = store.create("a", self.large)
        piece = bytes(max(1, writer.unit))
        try:
            with pytest.raises(UsageError):
                writer.write(5, piece)
            writer.write(0, piece)
            with pytest.raises(UsageError):
                writer.write(0, piece)
        finally:
            writer.abort()
        assert _keys(store) == []

    def test_an_object_has_the_size_it_was_created_with(self, store: Store) -> None:
        """More bytes are refused, fewer are not committed, and a negative size is no size."""
        for size in (3, self.large):
            writer = store.create("a", size)
            try:
                with pytest.raises(UsageError):
                    writer.write(0, bytes(size + 1))
                if size > 3:
                    writer.write(0, bytes(max(1, writer.unit)))
                with pytest.raises(UsageError):
                    writer.commit()
            finally:
                writer.abort()
        with pytest.raises(UsageError):
            store.create("a", -1)
        assert _keys(store) == []

    def test_a_writer_is_used_once(self, store: Store) -> None:
        """After a commit or an abort a writer takes nothing more."""
        for end in ("commit", "abort"):
            writer = store.create("a", 0)
            getattr(writer, end)()
            with pytest.raises(UsageError):
                writer.write(0, b"")
            with pytest.raises(UsageError):
                writer.commit()
            writer.abort()

    def test_a_deleted_object_is_gone(self, store: Store) -> None:
        """Deleting removes one object, and removing it again is not an error."""
        store.put("folder/a", b"x")
        store.put("folder/b", b"y")
        store.delete("folder/a")
        store.delete("folder/a")
        store.delete("never/was")
        assert _keys(store) == ["folder/b"]
        with pytest.raises(NotFound):
            store.readinto("folder/a", 0, memoryview(bytearray(1)))

    def test_a_name_is_free_when_its_folder_is_empty(self, store: Store) -> None:
        """Folders are parts of names, not things: when the last object below is gone, the name can be an object's."""
        store.put("a/b/c", b"x")
        store.delete("a/b/c")
        store.put("a", b"y")
        assert _keys(store) == ["a"]

    def test_a_small_file_that_is_too_large_is_not_read(self, store: Store) -> None:
        """``get`` refuses an object over its limit."""
        store.put("config.json", bytes(11))
        with pytest.raises(FormatError, match=r"config\.json.*11"):
            store.get("config.json", limit=10)

    def test_people_are_told_where_an_object_is(self, store: Store) -> None:
        """A location begins with the store's address and ends with the key."""
        assert store.locate("a/b").startswith(store.uri.rstrip("/"))
        assert store.locate("a/b").endswith("/a/b")
