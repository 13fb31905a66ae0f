"""What shardtool ships for plug-in authors does what it says: it counts, it breaks, and it finds stores that lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import shardtool.testing
from shardtool.errors import AlreadyExists, FormatError, NotFound, Unavailable, UsageError
from shardtool.stores.base import Object, Store, Unfinished, Wrapper
from shardtool.stores.memory import MemoryStore
from shardtool.testing import (
    Call,
    CountingStore,
    Fault,
    FaultyStore,
    Fill,
    Flip,
    Raise,
    ReadingContract,
    ReadOnlyContract,
    StoreContract,
    Truncate,
    read,
    write,
)


class TestCountingStore(StoreContract):
    """A store that is counted obeys every law."""

    @pytest.fixture
    def store(self) -> Iterator[CountingStore]:
        with CountingStore(MemoryStore(unit=1 << 20)) as store:
            yield store


class TestFaultyStoreWithoutFaults(StoreContract):
    """A script without faults changes nothing."""

    @pytest.fixture
    def store(self) -> Iterator[FaultyStore]:
        with FaultyStore(MemoryStore(), {}) as store:
            yield store


def test_public_names_are_sorted() -> None:
    assert shardtool.testing.__all__ == sorted(shardtool.testing.__all__)
    assert all(hasattr(shardtool.testing, name) for name in shardtool.testing.__all__)


# Counting


def test_calls_and_bytes_are_counted() -> None:
    store = CountingStore(MemoryStore())
    write(store, "a", bytes(100), slice_size=30)
    read(store, "a", 10, 20)
    read(store, "a", 20, 20)
    store.stat("a")
    list(store.list())
    store.delete("a")
    assert store.calls == {
        "create": 1, "write": 4, "commit": 1, "abort": 1, "readinto": 2, "stat": 1, "list": 1, "delete": 1,
    }  # fmt: skip
    assert (store.bytes_written, store.bytes_read) == (100, 40)
    assert store.reads == {"a": [(10, 30), (20, 40)]}


def test_bytes_read_twice_are_distinct_once() -> None:
    store = CountingStore(MemoryStore())
    for key in ("a", "b"):
        store.put(key, bytes(100))
    for start, size in ((50, 10), (0, 10), (5, 10), (5, 2), (55, 20), (99, 1), (60, 0)):
        read(store, "a", start, size)
    read(store, "b", 0, 7)
    assert store.distinct_bytes_read("a") == 15 + 25 + 1
    assert store.distinct_bytes_read("b") == 7
    assert store.distinct_bytes_read() == 48
    assert store.distinct_bytes_read("c") == 0
    assert store.bytes_read > store.distinct_bytes_read()


def test_what_failed_brought_no_bytes() -> None:
    store = CountingStore(MemoryStore())
    with pytest.raises(NotFound):
        read(store, "a", 0, 5)
    assert (store.calls["readinto"], store.bytes_read, store.reads) == (1, 0, {})


def test_counting_begins_anew() -> None:
    store = CountingStore(MemoryStore())
    store.put("a", b"x")
    store.reset()
    assert (store.calls, store.bytes_written) == ({}, 0)


def test_threads_are_counted_together() -> None:
    store = CountingStore(MemoryStore())
    store.put("a", bytes(10))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: read(store, "a", 0, 10), range(800)))
    assert (store.calls["readinto"], store.bytes_read, len(store.reads["a"])) == (800, 8000, 800)


# Breaking


def test_a_call_is_chosen_by_its_number() -> None:
    store = FaultyStore(MemoryStore(), {("readinto", 2): Raise(Unavailable("cut"))})
    store.put("a", b"abc")
    assert read(store, "a", 0, 3) == b"abc"
    with pytest.raises(Unavailable, match="cut"):
        read(store, "a", 0, 3)
    assert read(store, "a", 0, 3) == b"abc"


def test_a_call_is_chosen_by_what_it_is() -> None:
    def script(call: Call) -> Fault | None:
        return Raise(Unavailable("cut")) if call.operation == "write" and call.offset + call.size > 2 else None

    store = FaultyStore(MemoryStore(), script)
    store.put("a", b"ab")
    with pytest.raises(Unavailable):
        write(store, "b", b"abc", slice_size=2)
    assert [found.key for found in store.list()] == ["a"]
    assert [(call.key, call.number, call.offset, call.size) for call in store.calls if call.operation == "write"] == [
        ("a", 1, 0, 2),
        ("b", 2, 0, 2),
        ("b", 3, 2, 1),
    ]


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "list": lambda store: list(store.list()),
    "stat": lambda store: store.stat("a"),
    "readinto": lambda store: read(store, "a", 0, 1),
    "create": lambda store: store.create("b", 0),
    "write": lambda store: store.put("b", b"x"),
    "commit": lambda store: store.put("b", b"x"),
    "abort": lambda store: store.put("b", b"x"),
    "delete": lambda store: store.delete("a"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("after", [False, True])
def test_every_operation_can_fail(operation: str, after: bool) -> None:
    inner = MemoryStore()
    inner.put("a", b"x")
    store = FaultyStore(inner, {(operation, 1): Raise(Unavailable("no"), after=after)})
    with pytest.raises(Unavailable, match="no"):
        OPERATIONS[operation](store)


@pytest.mark.parametrize("after", [False, True])
def test_a_lost_answer_is_a_call_that_happened(after: bool) -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, {("commit", 1): Raise(Unavailable("no"), after=after)})
    with pytest.raises(Unavailable):
        store.put("a", b"x")
    assert inner.exists("a") is after


def test_an_object_can_end_sooner() -> None:
    store = FaultyStore(MemoryStore(), lambda call: Truncate(2) if call.operation in ("stat", "readinto") else None)
    store.put("a", b"abc")
    assert store.stat("a") == Object("a", 2)
    assert read(store, "a", 0, 2) == b"ab"
    room = bytearray(3)
    with pytest.raises(FormatError, match="ends"):
        store.readinto("a", 0, memoryview(room))
    assert room == b"ab\0"


def test_a_write_can_be_torn() -> None:
    store = FaultyStore(MemoryStore(), {("write", 2): Truncate(1)})
    write(store, "a", b"abcdef", slice_size=3)
    assert store.get("a", limit=6) == b"abcd\0\0"


def test_one_bit_can_be_wrong() -> None:
    data = b"\x00\x00\x00"
    store = FaultyStore(MemoryStore(), {("readinto", 1): Flip(9), ("readinto", 3): Flip(24), ("write", 2): Flip(0)})
    store.put("a", data)
    assert [read(store, "a", 0, 3) for _ in range(3)] == [b"\x00\x02\x00", data, b"\x01\x00\x00"]
    store.put("b", data)
    assert read(store, "b", 0, 3) == b"\x01\x00\x00"
    assert data == b"\x00\x00\x00"


@pytest.mark.parametrize("operation", ["stat", "delete"])
def test_a_fault_that_makes_no_sense_is_refused(operation: str) -> None:
    store = FaultyStore(MemoryStore(), {(operation, 1): Flip(0)})
    with pytest.raises(UsageError, match=f"Flip cannot happen to {operation}"):
        OPERATIONS[operation](store)


# The contract finds a lie


class _Forgetful(MemoryStore):
    def delete(self, key: str) -> None:
        pass


class _Eager(MemoryStore):
    def create(self, key, size, *, exclusive=False):
        super().create(key, 0).commit()
        return super().create(key, size, exclusive=exclusive)


class _Unfair(MemoryStore):
    def create(self, key, size, *, exclusive=False):
        return super().create(key, size)


class _Partial(MemoryStore):
    def readinto(self, key, start, view):
        size = max(0, min(view.nbytes, self.stat(key).size - start))
        super().readinto(key, start, view[:size])


class _Shuffled(MemoryStore):
    def list(self, prefix=""):
        return iter(sorted(super().list(prefix), key=lambda found: found.key.split("/")))


class _Hoarder(MemoryStore):
    def discard(self, left):
        pass


class _Secretive(MemoryStore):
    def unfinished(self, prefix=""):
        return iter(())


class _Undead(MemoryStore):
    def _publish(self, key, name, data, *, exclusive):
        self._begun.setdefault(name, Unfinished(key, name))
        super()._publish(key, name, data, exclusive=exclusive)


class _Constant(MemoryStore):
    def checksums(self, key):
        return {"md5": "0" * 32}


class _Boastful(MemoryStore):
    def __init__(self) -> None:
        super().__init__(checksums=True)

    def checksums(self, key):
        return {"crc32": "0" * 8}


@pytest.mark.parametrize(
    ("store", "law"),
    [
        (_Forgetful, "test_a_deleted_object_is_gone"),
        (_Eager, "test_nothing_is_visible_before_the_commit"),
        (_Unfair, "test_an_exclusive_object_is_created_once"),
        (_Unfair, "test_of_exclusive_writers_one_wins"),
        (_Unfair, "test_of_exclusive_writers_of_a_large_object_one_wins"),
        (_Hoarder, "test_who_ends_leaves_nothing_unfinished"),
        (_Secretive, "test_what_a_killed_writer_left_can_be_found_and_removed"),
        (_Undead, "test_what_a_killed_writer_left_can_be_found_and_removed"),
        (_Constant, "test_other_content_has_other_checksums"),
        (_Boastful, "test_a_writer_knows_what_the_store_will_say"),
    ],
)
def test_the_contract_finds_a_store_that_breaks_a_law(store: type[MemoryStore], law: str) -> None:
    test = getattr(StoreContract(), law)
    test(MemoryStore())
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(store())


@pytest.mark.parametrize(
    ("store", "law"),
    [(_Shuffled, "test_keys_are_listed_in_order"), (_Constant, "test_a_checksum_is_that_of_the_content")],
)
def test_the_contract_finds_a_store_that_breaks_a_law_of_reading(store: type[MemoryStore], law: str) -> None:
    test = getattr(ReadingContract(), law)
    for right in (MemoryStore(), MemoryStore(unit=1 << 20)):
        test(right, right.put)
    wrong = store()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(wrong, wrong.put)


def test_the_contract_finds_a_store_that_fills_half_a_view() -> None:
    right, wrong = MemoryStore(), _Partial()
    ReadingContract().test_an_object_that_ends_sooner_is_an_error(right, right.put, 50, 51)
    with pytest.raises(pytest.fail.Exception):
        ReadingContract().test_an_object_that_ends_sooner_is_an_error(wrong, wrong.put, 50, 51)


def test_every_law_has_a_sentence() -> None:
    for contract, least in ((ReadingContract, 15), (StoreContract, 20), (ReadOnlyContract, 1)):
        laws = [law for name, law in vars(contract).items() if name.startswith("test_")]
        assert len(laws) >= least
        assert all(law.__doc__ and law.__doc__.endswith(".") for law in laws)


# Gaps


class _LastWins(MemoryStore):
    conditional = False

    def create(self, key, size, *, exclusive=False):
        if exclusive and self.exists(key):
            raise AlreadyExists(f"{key} exists already")
        return super().create(key, size)


class TestStoreWhereTheLastWriterWins(StoreContract):
    """A store without conditions declares it, and keeps every other law."""

    gaps = frozenset({"exclusive race"})

    @pytest.fixture
    def store(self) -> Iterator[MemoryStore]:
        with _LastWins() as store:
            yield store


class _Forgets(MemoryStore):
    def unfinished(self, prefix=""):
        return iter(())


class _Restarted(MemoryStore):
    def unfinished(self, prefix=""):
        return (replace(left, since=1.0) for left in super().unfinished(prefix))


class _Plain(MemoryStore):
    def create(self, key, size, *, exclusive=False):
        if ":" in key:
            raise UsageError(f"{key} has a colon, which this store does not take")
        return super().create(key, size, exclusive=exclusive)


@pytest.mark.parametrize(
    ("gap", "store", "law", "arguments"),
    [
        ("exclusive race", _LastWins, "test_of_exclusive_writers_one_wins", ()),
        ("unfinished", _Forgets, "test_what_a_killed_writer_left_can_be_found_and_removed", ()),
        ("age", _Restarted, "test_what_a_killed_writer_left_can_be_found_and_removed", ()),
        ("name a:b", _Plain, "test_unusual_names_are_only_names", ("a:b",)),
    ],
)
def test_a_gap_must_be_declared_and_must_be_one(
    gap: str, store: type[MemoryStore], law: str, arguments: tuple[str, ...]
) -> None:
    class Declared(StoreContract):
        gaps = frozenset({gap})

    getattr(Declared(), law)(store(), *arguments)
    with pytest.raises((AssertionError, UsageError)):
        getattr(StoreContract(), law)(store(), *arguments)  # it is not declared
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(Declared(), law)(MemoryStore(), *arguments)  # there is none


def test_a_gap_that_nobody_knows_is_found() -> None:
    class Declared(StoreContract):
        gaps = frozenset({"excuses"})

    with pytest.raises(AssertionError, match="excuses"):
        Declared().test_gaps_have_names()


# Reading alone


class _Mirror(Wrapper):
    def __init__(self, inner):
        super().__init__(inner)
        self.writable = False

    def create(self, key, size, *, exclusive=False):
        raise UsageError(f"{self.locate(key)} can only be read")

    def delete(self, key):
        raise UsageError(f"{self.locate(key)} can only be read")


class TestMirror(ReadOnlyContract):
    """A store that only reads is filled behind its back."""

    @pytest.fixture
    def behind(self) -> MemoryStore:
        return MemoryStore()

    @pytest.fixture
    def store(self, behind: MemoryStore) -> _Mirror:
        return _Mirror(behind)

    @pytest.fixture
    def fill(self, behind: MemoryStore) -> Fill:
        return behind.put


def test_a_store_that_can_be_written_is_not_read_only() -> None:
    store = MemoryStore()
    with pytest.raises(pytest.fail.Exception):
        ReadOnlyContract().test_nothing_can_be_written(store, store.put)
