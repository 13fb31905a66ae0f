"""The laws of reading, for every store, those that cannot be written among them."""

from __future__ import annotations

import array
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ClassVar

import pytest

from shardtool.errors import FormatError, NotFound, ShardtoolError, UsageError
from shardtool.stores.base import Object, Store
from shardtool.testing.words import ALGORITHMS, BAD_KEYS, UNUSUAL_KEYS, check_gaps, content, listed

Fill = Callable[[str, bytes], None]
"""Puts an object into the place that a store reads."""


class ReadingContract:
    """The laws of reading. A subclass brings a fixture ``store``, over a place that is empty at first.

    A store that cannot be written brings ``fill`` as well, a fixture that gives a function ``(key, data)`` which puts
    an object into the place behind the store.

    ``gaps``: names of laws that the store cannot keep (``shardtool.testing.words.GAPS`` says what each means). The
    test of such a law asserts what happens instead, so that it fails when the store learns better. A gap that has no
    name is a test that a subclass writes anew.
    """

    gaps: ClassVar[frozenset[str]] = frozenset()

    large: ClassVar[int] = (12 << 20) + 5
    """Bytes of the largest objects: enough for several slices of a writer that has a unit."""

    @pytest.fixture
    def fill(self, store: Store) -> Fill:
        """Puts an object into the place behind the store."""
        return store.put

    @contextmanager
    def kept(self, law: str) -> Iterator[None]:
        """What the block asserts holds; if the law is one of the ``gaps``, it must not."""
        if law not in self.gaps:
            yield
            return
        with pytest.raises((AssertionError, ShardtoolError)):
            yield

    def test_gaps_have_names(self) -> None:
        """Every gap that a store declares is one that the contract knows."""
        check_gaps(self.gaps)

    @pytest.mark.parametrize(("start", "size"), [(0, 1), (0, 5000), (1, 4998), (4999, 1), (123, 2345)])
    def test_any_range_can_be_read(self, store: Store, fill: Fill, start: int, size: int) -> None:
        """A view is filled with the bytes from ``start``, and no byte beside it is touched."""
        data = content(5000)
        fill("a", data)
        room = bytearray(b"\xaa" * (size + 2))
        store.readinto("a", start, memoryview(room)[1:-1])
        assert room == b"\xaa" + data[start : start + size] + b"\xaa"

    def test_a_view_of_larger_items_is_filled(self, store: Store, fill: Fill) -> None:
        """The items of a view do not matter, only its bytes."""
        data = content(8 * 100)
        fill("a", data)
        numbers = array.array("Q", bytes(len(data)))
        store.readinto("a", 0, memoryview(numbers))
        assert numbers.tobytes() == data

    def test_an_empty_view_is_full(self, store: Store, fill: Fill) -> None:
        """Reading nothing is possible at the start, in the middle and at the end."""
        fill("a", b"abc")
        for start in (0, 1, 3):
            store.readinto("a", start, memoryview(bytearray()))

    @pytest.mark.parametrize(("start", "size"), [(0, 101), (50, 51), (100, 1), (1000, 10)])
    def test_an_object_that_ends_sooner_is_an_error(self, store: Store, fill: Fill, start: int, size: int) -> None:
        """A view that reaches beyond the end is not filled in part but refused."""
        fill("a", content(100))
        with pytest.raises(FormatError, match="a"):
            store.readinto("a", start, memoryview(bytearray(size)))

    def test_a_range_starts_inside_the_object(self, store: Store, fill: Fill) -> None:
        """A negative start does not count from the end."""
        fill("a", b"abc")
        with pytest.raises(UsageError):
            store.readinto("a", -1, memoryview(bytearray(1)))

    def test_memory_to_read_into_is_writable(self, store: Store, fill: Fill) -> None:
        """Read-only memory is refused."""
        fill("a", b"abc")
        with pytest.raises(UsageError):
            store.readinto("a", 0, memoryview(b"123"))

    def test_what_is_not_there_is_not_found(self, store: Store, fill: Fill) -> None:
        """An object that does not exist has no size and no bytes, and the message names it."""
        fill("here", b"x")
        with pytest.raises(NotFound, match=r"missing\.bin"):
            store.stat("missing.bin")
        with pytest.raises(NotFound, match=r"missing\.bin"):
            store.readinto("missing.bin", 0, memoryview(bytearray(1)))
        with pytest.raises(NotFound, match="here/below"):
            store.stat("here/below")
        assert store.exists("here")
        assert not store.exists("missing.bin")

    def test_a_folder_is_not_an_object(self, store: Store, fill: Fill) -> None:
        """What lies below a name does not make the name an object."""
        fill("folder/a", b"x")
        assert not store.exists("folder")
        with pytest.raises(NotFound):
            store.readinto("folder", 0, memoryview(bytearray(1)))

    def test_keys_are_listed_in_order(self, store: Store, fill: Fill) -> None:
        """Keys come in plain string order, in which a slash is a character like any other, with their sizes."""
        keys = ["b", "a/b", "a.b", "a0", "a/B", "Z", "a-b", "a/b.c/d", "a/c", "ä", "1"]
        for size, key in enumerate(keys):
            fill(key, bytes(size))
        with self.kept("listing"):
            assert [(found.key, found.size) for found in store.list()] == sorted((k, n) for n, k in enumerate(keys))

    @pytest.mark.parametrize("prefix", ["", "m", "model", "model-", "model/", "model/a", "model/a/", "x", "model/a/b"])
    def test_a_prefix_is_the_beginning_of_a_string(self, store: Store, fill: Fill, prefix: str) -> None:
        """A listing has all keys that start with the prefix, however deep, be it a folder or part of a name."""
        keys = ["model", "model-1/a", "model-2/a", "model.json"] if prefix == "model" else []
        keys = keys or ["model-1", "model-2/a", "model.json", "model/a/b", "model/ab", "other/model"]
        for key in keys:
            fill(key, b"x")
        with self.kept("listing"):
            assert listed(store, prefix) == sorted(key for key in keys if key.startswith(prefix))

    def test_many_threads_read(self, store: Store, fill: Fill) -> None:
        """Ranges read by many threads at once do not mix, in one object or in several."""
        objects = {f"shard-{number}": content(200_000, number) for number in range(3)}
        for key, data in objects.items():
            fill(key, data)

        def read(number: int) -> bool:
            chance = random.Random(number)
            key = chance.choice(sorted(objects))
            start = chance.randrange(200_000)
            room = bytearray(chance.randrange(200_000 - start) + 1)
            store.readinto(key, start, memoryview(room))
            return room == objects[key][start : start + len(room)]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(64)))

    def test_a_small_file_that_is_too_large_is_not_read(self, store: Store, fill: Fill) -> None:
        """``get`` refuses an object over its limit."""
        fill("config.json", bytes(11))
        with pytest.raises(FormatError, match=r"config\.json.*11"):
            store.get("config.json", limit=10)

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_no_name_that_leaves_the_store_is_read(self, store: Store, key: str) -> None:
        """A name that could mean a place outside the store, or no object, is refused before anybody is asked."""
        with pytest.raises(UsageError):
            store.stat(key)
        with pytest.raises(UsageError):
            store.readinto(key, 0, memoryview(bytearray(1)))

    @pytest.mark.parametrize("key", UNUSUAL_KEYS)
    def test_unusual_names_are_read(self, store: Store, fill: Fill, key: str) -> None:
        """Characters that mean something in addresses or shells mean nothing in a name."""
        with self.kept(f"name {key}"):
            fill(key, b"abc")
            assert store.stat(key) == Object(key, 3)
            assert store.get(key, limit=3) == b"abc"

    def test_a_large_object_is_read_in_any_order(self, store: Store, fill: Fill) -> None:
        """Ranges of an object of ``large`` bytes, read last first, make it whole."""
        data = content(self.large)
        fill("large.bin", data)
        room, step = bytearray(self.large), self.large // 3 + 1
        for start in reversed(range(0, self.large, step)):
            store.readinto("large.bin", start, memoryview(room)[start : start + step])
        assert room == data

    def test_a_checksum_is_that_of_the_content(self, store: Store, fill: Fill) -> None:
        """What the store keeps of a content by a well-known algorithm is what anybody computes from it."""
        for key, size in (("small", 1000), ("large", self.large)):
            data = content(size)
            fill(key, data)
            said = store.checksums(key)
            assert {name: value for name, value in said.items() if name in ALGORITHMS} == {
                name: ALGORITHMS[name](data) for name in said if name in ALGORITHMS
            }
        if said:
            with pytest.raises(NotFound, match="missing"):
                store.checksums("missing")

    def test_people_are_told_where_an_object_is(self, store: Store) -> None:
        """A location begins with the store's address and ends with the key."""
        assert store.locate("a/b").startswith(store.uri.rstrip("/"))
        assert store.locate("a/b").endswith("/a/b")


class ReadOnlyContract(ReadingContract):
    """The laws of a store that is only read: it says so, and does nothing."""

    def test_nothing_can_be_written(self, store: Store, fill: Fill) -> None:
        """Neither can an object be created or deleted, nor is anything unfinished."""
        fill("a", b"x")
        for exclusive in (False, True):
            with pytest.raises(UsageError, match="read"):
                store.create("b", 1, exclusive=exclusive)
        with pytest.raises(UsageError, match="read"):
            store.delete("a")
        assert list(store.unfinished()) == []
        assert not store.writable
        assert store.get("a", limit=1) == b"x"
