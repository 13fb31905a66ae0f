"""The laws of writing: objects that are whole or not there, writers that race, and what dead writers leave."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardtool.errors import AlreadyExists, FormatError, NotFound, ShardtoolError, UsageError
from shardtool.stores.base import Object, Store, Unfinished, Writer
from shardtool.testing.reading import ReadingContract
from shardtool.testing.words import BAD_KEYS, UNUSUAL_KEYS, content, listed, write


class StoreContract(ReadingContract):
    """The laws of ``shardtool.stores.base``. A subclass brings a fixture ``store``: an empty store for each test."""

    def test_what_is_written_is_read(self, store: Store) -> None:
        """An object comes back as it was written, with its size."""
        data = content(10_000)
        store.put("model.bin", data)
        assert store.stat("model.bin") == Object("model.bin", 10_000)
        assert store.get("model.bin", limit=10_000) == data

    def test_slices_follow_each_other(self, store: Store) -> None:
        """A large object written in slices is whole, and its last slice may be shorter than the unit."""
        data = content(self.large)
        write(store, "large.bin", data)
        assert store.stat("large.bin").size == self.large
        assert store.get("large.bin", limit=self.large) == data

    def test_nothing_is_visible_before_the_commit(self, store: Store) -> None:
        """Neither a listing nor a reader sees an object that is being written, not even when all bytes are there."""
        writer = store.create("a/b", 3)
        try:
            assert listed(store) == []
            writer.write(0, b"abc")
            assert listed(store) == []
            assert not store.exists("a/b")
            writer.commit()
        finally:
            writer.abort()
        assert listed(store) == ["a/b"]

    def test_an_aborted_object_never_was(self, store: Store) -> None:
        """Aborting leaves nothing; doing it again does nothing."""
        for size in (3, self.large):
            writer = store.create("a/b", size)
            writer.write(0, bytes(min(size, max(1, writer.unit))))
            writer.abort()
            writer.abort()
            assert listed(store) == []

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
        assert listed(store) == ["a"]

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
            try:
                store.readinto("a", 0, memoryview(room))
            except ShardtoolError:
                if "one version" in self.gaps:
                    return versions[0]
                raise
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
        assert listed(store) == ["a"]

    def race(self, store: Store, key: str, size: int = 100, *, writers: int = 8) -> list[int]:
        """Let exclusive writers commit at the same moment; return the numbers of those that won.

        Each has written its own bytes. Those of one that won are the object's.
        """
        start = threading.Barrier(writers)

        def run(number: int) -> bool:
            writer = store.create(key, size, exclusive=True)
            try:
                writer.write(0, bytes([number]) * size)
                start.wait(timeout=60)
                writer.commit()
            except AlreadyExists:
                return False
            finally:
                writer.abort()
            return True

        with ThreadPoolExecutor(writers) as pool:
            winners = [number for number, won in enumerate(pool.map(run, range(writers))) if won]
        assert store.get(key, limit=size) in [bytes([number]) * size for number in winners]
        return winners

    def test_of_exclusive_writers_one_wins(self, store: Store) -> None:
        """Of eight writers that commit at the same moment one succeeds, the others know it, and its bytes stay."""
        assert store.conditional is ("exclusive race" not in self.gaps)
        turns = range(1 if store.conditional else 20)
        several = any(len(self.race(store, f"folder/record-{turn}")) > 1 for turn in turns)
        assert several is not store.conditional

    def test_of_exclusive_writers_of_a_large_object_one_wins(self, store: Store) -> None:
        """Nothing of the others gets into it, in however many slices they were sent."""
        winners = self.race(store, "large", self.large, writers=3)
        assert len(winners) == 1 or not store.conditional

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_names_that_leave_the_store_are_refused(self, store: Store, key: str) -> None:
        """A name that could mean a place outside the store, or no object, is neither created nor deleted."""
        with pytest.raises(UsageError):
            store.create(key, 1)
        with pytest.raises(UsageError):
            store.delete(key)

    @pytest.mark.parametrize("key", UNUSUAL_KEYS)
    def test_unusual_names_are_only_names(self, store: Store, key: str) -> None:
        """Characters that mean something in addresses or shells mean nothing here."""
        with self.kept(f"name {key}"):
            store.put(key, b"abc")
            assert listed(store) == [key]
            assert store.get(key, limit=3) == b"abc"
            store.delete(key)
            assert listed(store) == []

    def test_many_threads_write(self, store: Store) -> None:
        """Writers of different objects do not disturb each other."""
        objects = {f"folder-{number % 3}/{number}": content(50_000 + number, number) for number in range(16)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: write(store, key, objects[key], slice_size=7000), objects))
        assert listed(store) == sorted(objects)
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
            store.put("a", content(size))
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
        assert listed(store) == []

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
        assert listed(store) == []

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
        assert listed(store) == []

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
        assert listed(store) == ["folder/b"]
        with pytest.raises(NotFound):
            store.readinto("folder/a", 0, memoryview(bytearray(1)))

    def test_a_name_is_free_when_its_folder_is_empty(self, store: Store) -> None:
        """Folders are parts of names, not things: when the last object below is gone, the name can be an object's."""
        store.put("a/b/c", b"x")
        store.delete("a/b/c")
        store.put("a", b"y")
        assert listed(store) == ["a"]

    def test_other_content_has_other_checksums(self, store: Store) -> None:
        """When an object is replaced by another of its size, everything that the store says of its content changes."""
        store.put("a", b"first")
        first = store.checksums("a")
        store.put("a", b"other")
        other = store.checksums("a")
        assert first.keys() == other.keys()
        assert [name for name in first if first[name] == other[name]] == []

    def test_a_writer_knows_what_the_store_will_say(self, store: Store) -> None:
        """What a writer tells after its commit is what the store tells of the object, whatever its size."""
        for size in (0, 100, self.large):
            writer = store.create("a", size)
            try:
                for start in range(0, size, step := max(1 << 20, writer.unit)):
                    writer.write(start, content(size)[start : start + step])
                writer.commit()
            finally:
                writer.abort()
            assert writer.checksums().items() <= store.checksums("a").items()

    def abandon(self, store: Store, key: str) -> Writer:
        """Begin an object and go away, as a process does that is killed."""
        writer = store.create(key, self.large)
        writer.write(0, bytes(max(1, writer.unit)))
        return writer

    def test_what_a_killed_writer_left_can_be_found_and_removed(self, store: Store) -> None:
        """Nobody sees it but who asks for it; when it is removed it cannot become an object any more."""
        store.put("folder/whole", b"x")
        writer = self.abandon(store, "folder/left.bin")
        try:
            found = list(store.unfinished())
            assert listed(store) == ["folder/whole"]
            with pytest.raises(NotFound):
                store.stat("folder/left.bin")
            with self.kept("unfinished"):
                assert [left.key for left in found] == ["folder/left.bin"]
            for left in found:
                assert list(store.unfinished("other")) == []
                assert [(same.key, same.name) for same in store.unfinished("folder/")] == [(left.key, left.name)]
                assert -1 <= left.size <= self.large
                with self.kept("age"):
                    assert not left.since or abs(left.since - time.time()) < 300
                store.discard(left)
                store.discard(left)
            assert list(store.unfinished()) == []
            if found:
                with pytest.raises(ShardtoolError):
                    self._finish(writer)
        finally:
            writer.abort()
        assert listed(store) == ["folder/whole"]

    def _finish(self, writer: Writer) -> None:
        done = max(1, writer.unit)
        writer.write(done, bytes(self.large - done))
        writer.commit()

    def test_what_is_unfinished_is_removed_without_the_object_of_its_name(self, store: Store) -> None:
        """Removing a replacement that was never finished leaves what it was to replace."""
        store.put("a", b"old")
        writer = self.abandon(store, "a")
        try:
            for left in list(store.unfinished()):
                store.discard(left)
            assert store.get("a", limit=3) == b"old"
        finally:
            writer.abort()
        assert store.get("a", limit=3) == b"old"

    def test_who_ends_leaves_nothing_unfinished(self, store: Store) -> None:
        """Neither an object that was committed nor one that was given up leaves anything behind."""
        write(store, "large", content(self.large))
        self.abandon(store, "given up").abort()
        store.put("small", b"x")
        assert list(store.unfinished()) == []
        store.discard(Unfinished("small", "never-was"))
        assert store.get("small", limit=1) == b"x"
