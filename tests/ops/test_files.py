"""Single files from anywhere as one checkpoint, and copies of objects from store to store."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shardtool
from shardtool.errors import (
    AccessDenied,
    BudgetTooSmall,
    ChecksumMismatch,
    FormatError,
    NotFound,
    StoreError,
    TensorMismatch,
    UsageError,
)
from shardtool.ops import files
from shardtool.ops.files import Copying, Files, OpenedFiles, copy, copying, gathered
from shardtool.stores import open_store
from shardtool.stores.base import Object, Store, Wrapper
from shardtool.stores.counting import CountingStore
from shardtool.stores.memory import MemoryStore
from tests.builders import Files as Contents
from tests.builders import config, contents, flipped, model, places, put, random, safetensors, tensors
from tests.servers.web import signed

A = {"x": random((4, 3), "F32"), "y": random((5,), "BF16", 1)}
B = {"x": random((2, 2), "F32", 2), "z": random((7,), "F16", 3)}
SHARD = "model-rank-0-part-0.safetensors"


@pytest.fixture(autouse=True)
def no_thread_stays_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert {thread for thread in threading.enumerate() if thread.name.startswith("shardtool")} <= before


def open_files(paths: list[str], *opener: Callable[[str], Store]) -> OpenedFiles:
    """The files at these addresses; what was opened is closed if that fails."""
    with gathered(paths, *opener).closed_on_failure() as store:
        return files.open_files(store)


@pytest.fixture
def saved(tmp_path: Path) -> Contents:
    """The one shard of a tiny model, with its manifest."""
    made = config()
    shardtool.save(put(tmp_path / "source", model(made, tensors(made))), tmp_path / "saved", tp=1)
    return contents(tmp_path / "saved")


def test_files_of_several_places_are_one_checkpoint(tmp_path, bucket):
    """Two have the same name, and a tensor's name comes twice."""
    put(tmp_path / "one", {"f.safetensors": safetensors(A)})
    put(f"s3://{bucket}/two", {"f.safetensors": safetensors(B)})
    opened = open_files([f"{tmp_path}/one/f.safetensors", f"s3://{bucket}/two/f.safetensors"])
    with opened.checkpoint.store as store:
        assert [[item.name for item in found] for found in opened.items] == [["x", "y"], ["x", "z"]]
        for held, found in zip((A, B), opened.items, strict=True):
            for item in found:
                data = bytearray(item.entry.nbytes)
                store.readinto(item.file.key, item.entry.offset, memoryview(data))
                assert data == held[item.name].array.tobytes()
        assert [store.locate(file.key) for file in opened.checkpoint.files] == [
            f"{tmp_path}/one/f.safetensors",
            f"s3://{bucket}/two/f.safetensors",
        ]
        assert [found.size for found in store.list()] == [len(safetensors(A)), len(safetensors(B))]
        assert [found.size for found in store.list("1/")] == [len(safetensors(B))]


def test_paths_without_a_folder_lie_in_the_current_one(tmp_path, monkeypatch):
    put(tmp_path, {"f.safetensors": safetensors(A)})
    monkeypatch.chdir(tmp_path)
    with open_files(["f.safetensors"]).checkpoint.store as store:
        assert store.stat("0/f.safetensors").size == len(safetensors(A))


def test_a_file_beside_its_manifest_has_digests(tmp_path, saved):
    put(tmp_path / "here", saved)
    opened = open_files([f"{tmp_path}/here/{SHARD}"])
    opened.checkpoint.store.close()
    assert all(item.chunks for item in opened.items[0])


def test_another_file_in_that_folder_has_none(tmp_path, saved):
    put(tmp_path / "here", {**saved, "extra.safetensors": safetensors(A)})
    opened = open_files([f"{tmp_path}/here/extra.safetensors"])
    opened.checkpoint.store.close()
    assert all(item.chunks is None for item in opened.items[0])


def test_a_file_that_its_manifest_does_not_describe_is_refused(tmp_path, saved):
    put(tmp_path / "header", {**saved, SHARD: flipped(saved[SHARD], 20)})
    with pytest.raises((ChecksumMismatch, FormatError)):
        open_files([f"{tmp_path}/header/{SHARD}"])
    record = saved["shardtool.json"]
    longer = record.replace(b'"size": ' + str(len(saved[SHARD])).encode(), b'"size": 9')
    longer = record.replace(b'"size":' + str(len(saved[SHARD])).encode(), b'"size":9') if longer == record else longer
    assert longer != record
    put(tmp_path / "size", {**saved, "shardtool.json": longer})
    with pytest.raises((TensorMismatch, FormatError)):
        open_files([f"{tmp_path}/size/{SHARD}"])


def test_whoever_may_not_look_for_a_manifest_opens_the_file(tmp_path):
    """S3 denies what is not there to those who may not list a bucket."""

    class Denying(Wrapper):
        def stat(self, key: str) -> Object:
            if key == "shardtool.json":
                raise AccessDenied("no")
            return super().stat(key)

    put(tmp_path, {"f.safetensors": safetensors(A)})
    opened = open_files([f"{tmp_path}/f.safetensors"], lambda folder: Denying(open_store(folder)))
    opened.checkpoint.store.close()
    assert [item.name for item in opened.items[0]] == ["x", "y"]


def test_a_folder_is_opened_once_and_closed_whatever_happens(tmp_path):
    closed: list[str] = []

    class Noting(Wrapper):
        def close(self) -> None:
            closed.append(self.uri)
            super().close()

    put(tmp_path, {"a.safetensors": safetensors(A), "b.safetensors": safetensors(B), "bad.safetensors": b"x" * 50})
    paths = [f"{tmp_path}/{name}.safetensors" for name in "ab"]
    opened = open_files(paths, lambda folder: Noting(open_store(folder)))
    assert closed == []
    opened.checkpoint.store.close()
    assert closed == [str(tmp_path)]
    for path, error in [("bad.safetensors", FormatError), ("gone.safetensors", NotFound), ("..", UsageError)]:
        closed.clear()
        with pytest.raises(error):
            open_files([*paths, f"{tmp_path}/{path}"], lambda folder: Noting(open_store(folder)))
        assert closed == [str(tmp_path)]


def test_signed_addresses_of_files_keep_their_signatures():
    """Each is good for its own file alone."""
    query = "X-Amz-Signature=a/b"
    with signed({"one/a b.safetensors": safetensors(A), "two/b.safetensors": safetensors(B)}, query) as server:
        found = open_files([f"{server.url}/{path}?{query}" for path in ("one/a%20b.safetensors", "two/b.safetensors")])
        with found.checkpoint.store:
            assert [[item.name for item in of] for of in found.items] == [["x", "y"], ["x", "z"]]


def test_files_that_are_read_are_not_changed(tmp_path):
    put(tmp_path, {"a.safetensors": safetensors(A)})
    with gathered([f"{tmp_path}/a.safetensors"]) as store:
        (key,) = store.keys
        with pytest.raises(UsageError, match="not replaced"):
            store.create(key, 1)
        with pytest.raises(UsageError, match="not removed"):
            store.delete(key)
        with pytest.raises(NotFound, match="none of 1 file"):
            store.stat("1/a.safetensors")
        assert store.reading(4) == open_store(tmp_path).reading(4)
    assert Files({}).reading(4) == 0


def test_files_are_remote_if_one_of_them_is(tmp_path, bucket):
    here, there = f"{tmp_path}/a.safetensors", f"s3://{bucket}/a.safetensors"
    for paths, remote in [([], False), ([here], False), ([here, there], True), ([there], True)]:
        with gathered(paths) as store:
            assert store.remote is remote


# Copies.


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 10)
    monkeypatch.setattr(files, "LEAST", 10)


SIZES = {"empty": 0, "one": 1, "block": 10, "folder/more": 11, "many": 95}
HELD = {key: bytes(range(size)) for key, size in SIZES.items()}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_copy_has_every_byte(tmp_path, threads):
    with places() as place, open_store(put(place("from"), HELD)) as source, open_store(tmp_path / "to") as to:
        copy(source, to, source.list(), concurrency=threads)
    assert contents(tmp_path / "to") == HELD


@pytest.mark.usefixtures("small_blocks")
def test_a_copy_that_fails_leaves_whole_files_only(tmp_path):
    with places() as place, open_store(put(place("from"), HELD)) as source, open_store(tmp_path / "to") as to:
        listed = [*source.list(), Object("zzz", 40)]
        with pytest.raises(NotFound, match="zzz"):
            copy(source, to, listed, concurrency=3)
    assert contents(tmp_path / "to") == HELD


@pytest.mark.usefixtures("small_blocks")
def test_an_object_that_is_replaced_meanwhile_is_not_copied(tmp_path):
    source = MemoryStore()
    source.put("a", bytes(35))
    listed = list(source.list())
    source.put("a", b"x" * 35)
    with open_store(tmp_path / "to") as to, pytest.raises(StoreError, match="a was replaced while it was read"):
        copy(source, to, listed, concurrency=2)
    assert contents(tmp_path / "to") == {}


@pytest.mark.usefixtures("small_blocks")
def test_each_byte_is_read_once(tmp_path):
    with places() as place, open_store(put(place("from"), HELD)) as inner, open_store(tmp_path / "to") as to:
        source = CountingStore(inner)
        copy(source, to, inner.list(), concurrency=4)
    assert source.bytes_read == source.distinct_bytes_read() == sum(SIZES.values())


MIB = 1 << 20


class Greedy(MemoryStore):
    """Takes memory of its own: a MiB for each reader, three for a writer."""

    def reading(self, threads: int) -> int:
        return threads * MIB

    def held(self, size: int) -> int:
        return 3 * MIB


@pytest.mark.parametrize("kind", [MemoryStore, Greedy])
@pytest.mark.parametrize("readers", [1, 8, 1024])
@pytest.mark.parametrize(
    ("limit", "most"), [("4MiB", 4 * MIB), ("20MiB", 20 * MIB), ("400MiB", 400 * MIB), (-1, 1 << 40)]
)
def test_a_copy_keeps_within_its_limit(kind, readers, limit, most):
    """Blocks that are read ahead, one that is written, and what the stores take, for reads that are not small."""
    source, to = kind(), kind()
    how = copying(source, to, [Object("a", 100 * MIB)], readers, limit)
    assert 1 <= how.threads <= readers
    assert 64 << 10 <= how.block <= 8 * MIB
    own = source.reading(how.threads) if how.block >= 256 << 10 else 0
    assert (how.threads + 1) * how.block + own + to.held(100 * MIB) <= most
    if limit == -1:
        assert how == Copying(readers, 8 * MIB)


@pytest.mark.parametrize("kind", [MemoryStore, Greedy])
def test_the_least_limit_of_a_copy_is_named_and_taken(kind):
    thing = [Object("a", 100 * MIB)]
    with pytest.raises(BudgetTooSmall) as refused:
        copying(kind(), kind(), thing, 8, "100KiB")
    assert refused.value.needed == kind().held(1) + (128 << 10)
    assert copying(kind(), kind(), thing, 8, refused.value.needed) == copying(kind(), kind(), thing, 8, 0)
    assert copying(kind(), kind(), thing, 8, 0) == Copying(1, 64 << 10)


def test_the_memory_of_a_copy_is_what_was_planned(tmp_path):
    """No more blocks are there at once than readers and the one that is written."""
    source = MemoryStore()
    source.put("a", bytes(4 * MIB))
    there: set[int] = set()
    most = 0

    class Watching(Wrapper):
        def readinto(self, key: str, start: int, view: memoryview) -> None:
            nonlocal most
            block = view.obj
            there.add(id(block))
            weakref.finalize(block, there.discard, id(block))
            most = max(most, len(there))
            super().readinto(key, start, view)

    with open_store(tmp_path / "to") as to:
        how = copying(source, to, [Object("a", 4 * MIB)], 8, "1MiB")
        copy(Watching(source), to, source.list(), concurrency=8, memory_limit="1MiB")
    assert contents(tmp_path / "to") == {"a": bytes(4 * MIB)}
    assert 0 < most <= how.threads + 1


def test_a_limit_that_nothing_fits_into_is_refused(tmp_path):
    source = MemoryStore()
    source.put("a", b"x")
    with open_store(tmp_path / "to") as to:
        with pytest.raises(BudgetTooSmall, match="too small for a copy of"):
            copy(source, to, source.list(), memory_limit="1KiB")
        copy(source, to, source.list(), memory_limit=0)
    assert contents(tmp_path / "to") == {"a": b"x"}


def test_a_broken_manifest_beside_a_file_says_what_to_do(tmp_path):
    put(tmp_path, {"a.safetensors": safetensors(A), "shardtool.json": b"{}"})
    with pytest.raises(FormatError, match=r"shardtool\.json is not a manifest .* or remove it to read them unchecked"):
        open_files([f"{tmp_path}/a.safetensors"])


def test_a_copy_never_leaves_its_folder(tmp_path):
    """A link in the folder leads elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "folder").symlink_to(tmp_path / "elsewhere")
    source = MemoryStore()
    source.put("folder/a", b"x")
    with open_store(tmp_path / "to") as to:
        with pytest.raises(UsageError, match="behind a link"):
            copy(source, to, source.list(), concurrency=2)
        with pytest.raises(UsageError, match="not a name inside"):
            copy(source, to, [Object("../a", 1)], concurrency=2)
    assert contents(tmp_path / "elsewhere") == {}
