"""AzureStore obeys every law on a real server, and gets through what goes wrong between it and a server."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from shardtool.errors import AccessDenied, AlreadyExists, NotFound, StoreError, Unavailable, UsageError
from shardtool.stores.accounts import AzureAccount
from shardtool.stores.azure import store as azure
from shardtool.stores.azure.lists import blobs_of
from shardtool.stores.azure.store import AzureStore
from shardtool.stores.wire.retry import Again
from shardtool.testing import StoreContract, read, write
from tests.servers import Proxy, Trouble
from tests.servers.azure import KEY, AzureServer, Identity
from tests.stores.far import NEIGHBOURS, HttpContract, Opened, Raw

MIB = 1 << 20


class TestAzureStore(StoreContract):
    """Every law holds in a folder of a container that has other blobs too."""

    @pytest.fixture
    def store(self, container: str, raw: Raw) -> Iterator[AzureStore]:
        for key in NEIGHBOURS:
            raw(key, b"not ours")
        with AzureStore(f"az://{container}/models/llama/") as store:
            yield store


class TestAzureStoreOverTls(StoreContract):
    """Every law holds over TLS, with the tokens of an identity that ``DefaultAzureCredential`` finds."""

    @pytest.fixture
    def store(
        self, azure_tls_server: AzureServer, identity: Identity, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[AzureStore]:
        container = azure_tls_server.container(monkeypatch)
        monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azure_tls_server.endpoint)
        with AzureStore(f"az://{container}") as store:
            yield store
        assert identity.given == len(identity.asked)


@pytest.fixture
def store(container: str) -> Iterator[AzureStore]:
    """A whole container."""
    with AzureStore(f"az://{container}") as store:
        yield store


@pytest.fixture
def proxy(azure_server: AzureServer) -> Iterator[Proxy]:
    """A proxy in front of the server."""
    with Proxy(azure_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def behind(container: str, azure_server: AzureServer, proxy: Proxy) -> Opened:
    """The container behind the proxy; next to nothing is waited between tries."""
    return partial(azure_server.behind, proxy, container)


@pytest.fixture
def raw(container: str, azure_server: AzureServer) -> Raw:
    """Puts a blob by Azure's own library."""
    return lambda key, data: azure_server.client.get_blob_client(container, key).upload_blob(data)


@pytest.fixture
def at_port() -> Callable[[int], AzureStore]:
    """Opens a container on a port of this machine."""

    def opened(port: int) -> AzureStore:
        access = AzureAccount(endpoint=f"http://127.0.0.1:{port}/acme", key=KEY)
        return AzureStore("az://models", access=access, again=Again(attempts=1))

    return opened


class TestOnTheWay(HttpContract):
    """What happens between Azure and us."""

    unreached = "the server of az://models/a cannot be reached"
    nowhere = "az://no-such-container/folder"
    bucket = "container"
    untold = frozenset({"create"})
    busy = ((503, "ServerBusy"), (500, "InternalError"), (500, "OperationTimedOut"), (502, ""), (429, ""))
    throttled = (503, "ServerBusy")
    refusals = (
        (403, "AuthenticationFailed", AccessDenied, "the account key .*not valid"),
        (403, "AuthorizationPermissionMismatch", AccessDenied, "access to .* is denied .*Blob Data Contributor"),
        (403, "KeyBasedAuthenticationNotPermitted", AccessDenied, "takes no account keys"),
        (409, "PublicAccessNotPermitted", AccessDenied, "access to .* is denied"),
        (409, "BlobArchived", StoreError, "archive tier"),
        (400, "AccountRequiresHttps", UsageError, "https"),
        (400, "UnsupportedHeader", StoreError, r"UnsupportedHeader \(status 400\)"),
        (404, "ResourceNotFound", NotFound, "does not exist"),
    )


# Listing


def test_a_listing_has_many_pages(store: AzureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"folder/{number:02}" for number in range(23)]
    for key in keys:
        store.put(key, b"")
    monkeypatch.setattr(azure, "_PER_PAGE", 5)
    assert [found.key for found in store.list("folder/")] == keys
    assert [found.key for found in store.list("folder/1")] == keys[10:20]


def test_a_listing_is_in_order_whatever_the_server_s_order_is(
    store: AzureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hierarchical namespace lists what is in a folder before what is beside it: ``a/b`` before ``a.b``."""
    for key in ("a.b", "a/b", "a0"):
        store.put(key, b"")
    monkeypatch.setattr(azure, "blobs_of", lambda body, where: (blobs_of(body, where)[0][::-1], ""))
    assert [found.key for found in store.list()] == ["a.b", "a/b", "a0"]


def test_folders_are_not_objects(store: AzureStore, container: str, azure_server: AzureServer) -> None:
    """Neither what consoles make, whose name ends with a slash, nor what a hierarchical namespace has."""
    for name, metadata in (("folder/", {}), ("double//slash", {}), ("tree", {"hdi_isfolder": "true"}), ("tree/a", {})):
        azure_server.client.get_blob_client(container, name).upload_blob(b"", metadata=metadata)
    assert [found.key for found in store.list()] == ["tree/a"]
    assert not store.exists("tree")
    with pytest.raises(NotFound, match="/tree does not exist"):
        read(store, "tree", 0, 1)


# Reading


def test_a_small_object_that_comes_short_is_asked_for_again(store: AzureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is not what the answer's length says, but what the range says."""
    store.put("a", b"abc")
    short, send = [b"", b"ab"], store._wire.send

    def cut(*args, **settings):
        answer = send(*args, **settings)
        return replace(answer, body=short.pop()) if short else answer

    monkeypatch.setattr(store._wire, "send", cut)
    monkeypatch.setattr(store, "_again", Again(backoff=0.001))
    assert store.get("a", limit=3) == b"abc"
    assert short == []


# Writing


def test_the_size_decides_how_a_blob_is_uploaded(store: AzureStore) -> None:
    """Up to 8 MiB in one request with any slices; above in blocks, of which there may not be too many."""
    for size, unit in ((0, 0), (8 * MIB, 0), (8 * MIB + 1, 8 * MIB), (64 * MIB, 8 * MIB), (64 * MIB + 1, 16 * MIB)):
        assert store.unit(size) == unit
        assert store.held(size) == (0 if unit else size)
    for size in (10 << 30, 120_000 * MIB, 120_001 * MIB, 1 << 40, 9 << 40, 100 << 40):
        unit = store.unit(size)
        blocks = -(-unit // store._block(size))
        assert blocks >= 2
        assert -(-size // unit) * blocks <= 50_000
        assert unit // blocks <= 4000 * MIB


def test_blocks_are_sent_several_at_a_time(store: AzureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four waits until the others are on their way too."""
    together = threading.Barrier(4)
    send = store._wire.send

    def waiting(request, *args, **settings):
        if "comp=block&" in request.url:
            together.wait(timeout=30)
        return send(request, *args, **settings)

    monkeypatch.setattr(store._wire, "send", waiting)
    data = random.Random(3).randbytes(16 * MIB)
    write(store, "a", data, slice_size=16 * MIB)
    assert store.get("a", limit=len(data)) == data


def test_a_block_that_fails_fails_the_slice_and_frees_the_memory(far: AzureStore, trouble: Trouble) -> None:
    memory = bytearray(16 * MIB)
    writer = far.create("a", 16 * MIB)
    trouble.refused, trouble.status, trouble.code, trouble.methods = 1000, 403, "AuthorizationFailure", ("PUT",)
    with pytest.raises(AccessDenied):
        writer.write(0, memory)
    memory[:] = bytes(len(memory))
    trouble.refused = 0
    writer.abort()


def test_a_slice_that_fails_is_not_read_any_more(store: AzureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """When ``write`` raises, the other blocks are not on their way any more: the memory is the caller's."""
    begun, busy = threading.Event(), threading.Semaphore(0)
    ours = threading.current_thread()

    def send(request, *_args, **_settings):
        if threading.current_thread() is ours:
            assert begun.wait(30)
            raise StoreError("no")
        begun.set()
        time.sleep(0.3)
        busy.release()
        raise StoreError("no")

    writer = store.create("a", 16 * MIB)
    with monkeypatch.context() as patch:
        patch.setattr(store._wire, "send", send)
        with pytest.raises(StoreError, match="no"):
            writer.write(0, bytearray(8 * MIB))
        assert busy.acquire(blocking=False)
    writer.abort()


def test_an_abort_leaves_no_blocks_behind(store: AzureStore, container: str, azure_server: AzureServer) -> None:
    writer = store.create("a", 20 * MIB)
    writer.write(0, bytes(8 * MIB))
    assert azure_server.left(container) == ["a"]
    writer.abort()
    assert azure_server.left(container) == []


def test_an_abort_leaves_the_blocks_of_others_alone(store: AzureStore) -> None:
    ours, theirs = store.create("a", 9 * MIB), store.create("a", 9 * MIB)
    ours.write(0, bytes(9 * MIB))
    theirs.write(0, b"x" * (9 * MIB))
    ours.abort()
    theirs.commit()
    assert store.get("a", limit=9 * MIB) == b"x" * (9 * MIB)


def test_of_two_that_write_one_name_the_first_to_commit_wins(store: AzureStore) -> None:
    """Blocks belong to a name: they are gone when somebody else commits it. It is not taken for a success."""
    first, second = store.create("a", 9 * MIB), store.create("a", 9 * MIB)
    second.write(0, b"2" * (9 * MIB))
    first.write(0, b"1" * (9 * MIB))
    first.commit()
    with pytest.raises(StoreError, match=r"the blocks of .*/a are gone: somebody else"):
        second.commit()
    second.abort()
    assert store.get("a", limit=9 * MIB) == b"1" * (9 * MIB)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("size", [3, 12 * MIB])
def test_a_lost_answer_to_the_commit_is_not_a_lost_object(
    far: AzureStore, trouble: Trouble, size: int, exclusive: bool
) -> None:
    """The repetition is refused because of what the first one has made, and the blob is known by its mark."""
    data = random.Random(4).randbytes(size)
    writer = far.create("a", size, exclusive=exclusive)
    writer.write(0, data)
    trouble.lost, trouble.methods = 1, ("PUT",)
    writer.commit()
    assert trouble.lost == 0
    assert far.get("a", limit=size) == data
    assert writer.checksums() == far.checksums("a")


@pytest.mark.parametrize("size", [4, 9 * MIB])
def test_an_exclusive_object_of_another_is_not_ours(
    far: AzureStore, store: AzureStore, trouble: Trouble, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even after a repetition, and with the same content."""
    writer = far.create("record", size, exclusive=True)
    writer.write(0, bytes(size))
    trouble.refused, trouble.methods, trouble.code = 1, ("PUT",), "ServerBusy"
    sleep = time.sleep

    def overtake(seconds: float) -> None:
        write(store, "record", bytes(size), slice_size=size)
        sleep(seconds)

    monkeypatch.setattr("shardtool.stores.wire.retry.time.sleep", overtake)  # the moment between two tries
    with pytest.raises(AlreadyExists, match="record"):
        writer.commit()
    writer.abort()


@pytest.mark.parametrize("size", [3, 9 * MIB])
def test_bytes_that_change_on_the_way_are_noticed_by_the_server(
    store: AzureStore, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes without TLS has a checksum."""
    monkeypatch.setattr(store, "_again", Again(attempts=2, backoff=0.001))
    monkeypatch.setattr(azure, "_md5", lambda body: "AAAAAAAAAAAAAAAAAAAAAA==")
    with pytest.raises(Unavailable, match=r"damaged on the way .*Md5Mismatch"):
        write(store, "a", bytes(size), slice_size=size)
    assert not store.exists("a")


def test_a_small_object_has_a_checksum_of_its_content(store: AzureStore) -> None:
    store.put("a", b"abc")
    assert store.checksums("a")["md5"] == "900150983cd24fb0d6963f7d28e17f72"
    write(store, "b", bytes(9 * MIB), slice_size=9 * MIB)
    assert set(store.checksums("b")) == {"etag"}
    assert store.checksums("b")["etag"] == store.stat("b").version == next(store.list("b")).version
    with pytest.raises(NotFound):
        store.checksums("c")
