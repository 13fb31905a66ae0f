"""GcsStore obeys every law on a stand-in that keeps them, and gets through what goes wrong between it and a server.

An emulator keeps fewer laws: what it lacks is asserted. The stand-in answers as Google's storage-testbench does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from shardtool.errors import (
    AccessDenied,
    AlreadyExists,
    ShardtoolError,
    StoreError,
    UsageError,
)
from shardtool.stores import open_store
from shardtool.stores.gcs.store import GcsStore
from shardtool.stores.wire.retry import Again
from shardtool.testing import StoreContract, read, write
from shardtool.testing.words import content
from tests.servers import Proxy, Trouble
from tests.servers.gcs import GcsServer
from tests.stores.far import NEIGHBOURS, HttpContract, Opened, Raw

KIB = 1 << 10
MIB = 1 << 20
SOON = Again(backoff=0.001)


class TestGcsStore(StoreContract):
    """Every law holds in a folder of a bucket that has other objects too, in pages of three.

    What a killed writer leaves cannot be seen, not even by the bucket's owner, and is gone after a week.
    """

    gaps = frozenset({"unfinished"})

    @pytest.fixture
    def store(self, gcs_bucket: str, gcs_standin: GcsServer, raw: Raw) -> Iterator[GcsStore]:
        for key in NEIGHBOURS:
            raw(key, b"not ours")
        gcs_standin.control(page=3)
        with GcsStore(f"gs://{gcs_bucket}/models/llama/") as store:
            yield store
        gcs_standin.control(page=1000)


class TestGcsStoreOnAnEmulator(StoreContract):
    """An emulator ignores conditions, so of exclusive writers that meet several win."""

    gaps = frozenset({"unfinished", "exclusive race"})

    @pytest.fixture
    def store(self, gcs_emulator: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsStore]:
        with GcsStore(f"gs://{gcs_emulator.bucket(monkeypatch)}/models/llama") as store:
            yield store


def test_what_the_emulator_ignores_the_stand_in_does_not(
    gcs_emulator: GcsServer, gcs_standin: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preconditions and the size of pages: an emulator that learns them makes this fail, and can be the stand-in."""
    bucket = gcs_emulator.bucket(monkeypatch)
    for _ in range(2):
        gcs_emulator.put(bucket, "a", b"x", ifGenerationMatch="0")
    gcs_emulator.put(bucket, "b", b"x")
    assert len(gcs_emulator.ask("GET", f"/storage/v1/b/{bucket}/o?maxResults=1")["items"]) == 2
    bucket = gcs_standin.bucket(monkeypatch)
    gcs_standin.put(bucket, "a", b"x", ifGenerationMatch="0")
    with pytest.raises(OSError, match="412"):
        gcs_standin.put(bucket, "a", b"x", ifGenerationMatch="0")
    gcs_standin.put(bucket, "b", b"x")
    assert len(gcs_standin.ask("GET", f"/storage/v1/b/{bucket}/o?maxResults=1")["items"]) == 1


@pytest.fixture
def store(gcs_bucket: str) -> Iterator[GcsStore]:
    """A whole bucket."""
    with GcsStore(f"gs://{gcs_bucket}", again=SOON) as store:
        yield store


@pytest.fixture
def proxy(gcs_bucket: str, gcs_standin: GcsServer) -> Iterator[Proxy]:
    """A proxy in front of the stand-in."""
    with Proxy(gcs_standin.endpoint) as proxy:
        yield proxy


@pytest.fixture
def behind(gcs_bucket: str, proxy: Proxy) -> Opened:
    """The bucket behind the proxy; next to nothing is waited between tries."""

    def opened(attempts: int = SOON.attempts) -> GcsStore:
        again = replace(SOON, attempts=attempts)
        return GcsStore(f"gs://{gcs_bucket}", endpoint=proxy.endpoint, again=again)

    return opened


@pytest.fixture
def raw(gcs_bucket: str, gcs_standin: GcsServer) -> Raw:
    """Puts an object without shardtool."""
    return lambda key, data: gcs_standin.put(gcs_bucket, key, data)


@pytest.fixture
def at_port() -> Callable[[int], GcsStore]:
    """Opens a bucket on a port of this machine."""
    return lambda port: GcsStore("gs://bucket", endpoint=f"http://127.0.0.1:{port}", again=Again(attempts=1))


class TestOnTheWay(HttpContract):
    """What happens between Google's store and us."""

    unreached = r"gs://bucket/a cannot be reached .*[Cc]onnection refused"
    nowhere = "gs://no-such-bucket/folder/"
    untold = frozenset({"unfinished"})
    busy = tuple((status, "") for status in (408, 429, 500, 502, 503, 504))
    throttled = (429, "")
    refusals = ((403, "", AccessDenied, "gs://"),)
    sending = ("POST", "PUT")


# Addresses and settings


@pytest.mark.parametrize(
    "uri", ["gs://", "gs:///folder", "bucket/folder", "gs://bucket/a/../b", "gs://No Bucket", "gs://-a", "gs://a@b/c"]
)
def test_an_address_that_names_no_bucket_or_folder_is_refused(uri: str) -> None:
    with pytest.raises(UsageError):
        GcsStore(uri)


def test_addresses_begin_with_gs(gcs_bucket: str) -> None:
    with open_store(f"GS://{gcs_bucket}/folder") as store:
        assert isinstance(store, GcsStore)
        assert store.uri == f"gs://{gcs_bucket}/folder"


def test_without_the_library_people_are_told_what_to_install() -> None:
    program = """
import sys
sys.modules.update({"google": None, "google_crc32c": None})
import shardtool.stores
try:
    shardtool.stores.open_store("gs://bucket")
except shardtool.errors.UsageError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == "gs://bucket needs Google's library: pip install 'shardtool[gcs]'\n"


def test_an_emulator_may_be_named_without_a_scheme(gcs_bucket: str, gcs_standin: GcsServer, monkeypatch) -> None:
    """Nobody knows what an emulator can do, so the store does not promise conditions."""
    with GcsStore(f"gs://{gcs_bucket}") as store:
        assert store.conditional
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_standin.endpoint.partition("://")[2])
    with GcsStore(f"gs://{gcs_bucket}") as store:
        store.put("a", b"x")
        assert store.get("a", limit=1) == b"x"
        assert not store.conditional


def test_an_endpoint_that_is_none_is_refused() -> None:
    with GcsStore("gs://bucket", endpoint="not an address") as store:
        with pytest.raises(UsageError, match="not an address"):
            read(store, "a", 0, 1)
        with pytest.raises(UsageError, match="gs://bucket/a"):
            store.stat("a")


def test_a_server_that_is_not_google_is_found_out(gcs_bucket: str, trouble: Trouble, far: GcsStore) -> None:
    trouble.refused, trouble.status, trouble.methods = 1, 200, ("POST",)
    with pytest.raises(StoreError, match="does not speak as Google does"):
        far.put("a", b"x")


# Listing


def test_a_page_that_does_not_come_is_asked_for_again(far: GcsStore, trouble: Trouble, gcs_standin: GcsServer) -> None:
    for number in range(5):
        far.put(f"{number}", b"x")
    gcs_standin.control(page=2)
    try:
        found = far.list()
        keys = [next(found).key, next(found).key]
        trouble.refused, trouble.lost = 2, 1
        keys += [each.key for each in found]
    finally:
        gcs_standin.control(page=1000)
    assert keys == list("01234")
    assert trouble.refused == trouble.lost == 0


def test_a_version_is_a_generation(store: GcsStore) -> None:
    store.put("a", b"x")
    first = store.stat("a").version
    assert first == next(store.list()).version
    store.put("a", b"x")
    assert int(store.stat("a").version) > int(first)


# Reading


@pytest.mark.parametrize("reset", [False, True])
def test_a_body_that_was_cut_is_continued_in_its_generation(far: GcsStore, trouble: Trouble, reset: bool) -> None:
    far.put("a", bytes(3 * MIB))
    trouble.cuts, trouble.cut_after, trouble.reset = 2, MIB, reset
    read(far, "a", 1000, 2 * MIB + 500_000)
    pinned = [f"ifGenerationMatch={far.stat('a').version}" in request.path for request in trouble.seen if request.range]
    assert pinned == [False, True, True]


def test_an_object_removed_between_two_tries_is_not_found(
    far: GcsStore, store: GcsStore, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    far.put("a", bytes(2 * MIB))
    trouble.cuts, trouble.cut_after = 1, MIB
    monkeypatch.setattr("time.sleep", lambda _: store.delete("a"))
    with pytest.raises(ShardtoolError, match=r"replaced|does not exist"):
        read(far, "a", 0, 2 * MIB)


# Writing


def test_the_size_decides_how_an_object_is_uploaded(store: GcsStore) -> None:
    """Up to 8 MiB in one request with any slices; above in chunks, whose size grows with the object."""
    for size, unit in ((0, 0), (8 * MIB, 0), (8 * MIB + 1, 8 * MIB), (1 << 30, 8 * MIB), (2 << 30, 16 * MIB)):
        writer = store.create("a", size)
        writer.abort()
        assert writer.unit == store.unit(size) == unit
    assert store.held(8 * MIB) == 8 * MIB
    assert store.held(9 * MIB) == 512 * KIB


@pytest.mark.parametrize(
    "slices",
    [
        [8 * MIB, 8 * MIB],
        [8 * MIB, 8 * MIB + 1],
        [8 * MIB + 1, 8 * MIB + 256 * KIB - 1, 5],
        [9 * MIB - 1, 8 * MIB, 9 * MIB + 77, 256 * KIB],
        [8 * MIB, 1],
        [24 * MIB],
        [8 * MIB + 256 * KIB],
    ],
)
def test_chunks_are_whole_whatever_the_slices(store: GcsStore, slices: list[int]) -> None:
    """The server takes multiples of 256 KiB. Nothing can be seen before the commit."""
    data = content(sum(slices))
    writer = store.create("a", len(data))
    at = 0
    for size in slices:
        writer.write(at, data[at : at + size])
        at += size
    assert not store.exists("a")
    writer.commit()
    assert store.get("a", limit=len(data)) == data
    assert writer.checksums() == {"crc32c": store.checksums("a")["crc32c"]}


@pytest.mark.parametrize("fault", [503, 0])
@pytest.mark.parametrize("keep", [0, 256 * KIB, 3 * MIB + 5, 64 * MIB])
@pytest.mark.parametrize("late", [False, True])
def test_an_upload_goes_on_where_the_server_is(
    store: GcsStore, gcs_standin: GcsServer, keep: int, fault: int, late: bool
) -> None:
    """A chunk that was cut, or whose answer was lost: the server is asked how much of it it has."""
    data = content(20 * MIB + 3)
    writer = store.create("a", len(data))
    if not late:
        gcs_standin.control(keep=keep, fault=fault)
    writer.write(0, data[: 9 * MIB + 1])
    writer.write(9 * MIB + 1, data[9 * MIB + 1 :])
    if late:
        gcs_standin.control(keep=keep, fault=fault)
    writer.commit()
    assert gcs_standin.control()["keep"] == -1
    assert store.get("a", limit=len(data)) == data


@pytest.mark.parametrize("size", [3, 12 * MIB])
def test_an_exclusive_object_whose_answer_was_lost_is_ours(far: GcsStore, trouble: Trouble, size: int) -> None:
    """Its repetition is refused because of itself, or told that it is done."""
    data = content(size)
    writer = far.create("record", size, exclusive=True)
    writer.write(0, data)
    trouble.lost, trouble.methods = 1, ("POST", "PUT")
    writer.commit()
    assert trouble.lost == 0
    assert far.get("record", limit=size) == data


def test_an_exclusive_object_of_another_is_not_ours(far: GcsStore, store: GcsStore, trouble: Trouble) -> None:
    """Not even when it has the same content, if another writer came first while we were told to wait."""
    writer = far.create("record", 4, exclusive=True)
    writer.write(0, b"same")
    trouble.refused, trouble.methods = 1, ("POST",)
    store.put("record", b"same")
    with pytest.raises(AlreadyExists, match="record"):
        writer.commit()


def test_a_large_object_can_be_exclusive(store: GcsStore) -> None:
    """It is refused at once where there is one, and at the commit where one came meanwhile."""
    store.put("a", b"theirs")
    with pytest.raises(AlreadyExists, match="/a exists already"):
        store.create("a", 9 * MIB, exclusive=True)
    writer = store.create("b", 9 * MIB, exclusive=True)
    writer.write(0, bytes(9 * MIB))
    store.put("b", b"theirs")
    with pytest.raises(AlreadyExists, match="/b exists already"):
        writer.commit()
    writer.abort()
    assert store.get("b", limit=6) == b"theirs"
    write(store, "c", bytes(9 * MIB), exclusive=True)
    assert store.stat("c").size == 9 * MIB


def test_a_small_object_that_was_damaged_is_sent_again(store: GcsStore, gcs_standin: GcsServer) -> None:
    gcs_standin.control(spoil=True)
    store.put("a", b"abc")
    assert not gcs_standin.control()["spoil"]
    assert store.get("a", limit=3) == b"abc"


def test_a_large_object_that_was_damaged_is_not_one(store: GcsStore, gcs_standin: GcsServer) -> None:
    """The server compares the checksum that comes with the last bytes; what came before them is not here any more."""
    writer = store.create("a", 9 * MIB)
    writer.write(0, bytes(9 * MIB))
    gcs_standin.control(spoil=True)
    with pytest.raises(StoreError, match=r"/a were damaged on the way"):
        writer.commit()
    writer.abort()
    assert not store.exists("a")


@pytest.mark.parametrize("size", [3, 9 * MIB])
def test_a_server_that_compares_nothing_is_not_believed(store: GcsStore, gcs_standin: GcsServer, size: int) -> None:
    gcs_standin.control(spoil=True, gullible=True)
    try:
        with pytest.raises(StoreError, match="did not arrive as it was sent"):
            write(store, "a", bytes(size))
    finally:
        gcs_standin.control(gullible=False)
    assert not store.exists("a")


def test_an_upload_that_the_server_forgot_is_over(store: GcsStore, gcs_standin: GcsServer) -> None:
    """Its address, which is a secret, is not told."""
    writer = store.create("a", 20 * MIB)
    gcs_standin.control(forget=True)
    with pytest.raises(StoreError, match=r"/a was ended by the server") as caught:
        writer.write(0, bytes(8 * MIB))
    writer.abort()
    assert "upload_id" not in str(caught.value)


def test_an_abort_ends_the_upload(store: GcsStore, gcs_standin: GcsServer) -> None:
    before = gcs_standin.control()["sessions"]
    writer = store.create("a", 20 * MIB)
    writer.write(0, bytes(8 * MIB))
    assert gcs_standin.control()["sessions"] == before + 1
    writer.abort()
    assert gcs_standin.control()["sessions"] == before
