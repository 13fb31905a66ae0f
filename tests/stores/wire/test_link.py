"""A connection that does not come about is told in the same words whoever tried to make it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from shardtool.errors import Unavailable
from shardtool.stores import open_store
from shardtool.stores.base import Store
from shardtool.stores.gcs.store import GcsStore
from shardtool.stores.redis.store import RedisStore
from shardtool.stores.s3.store import Access, S3Store
from shardtool.stores.wire.http import Request, Wire
from shardtool.stores.wire.link import Proxy, no_connection, reason, server_of, unreached
from shardtool.stores.wire.retry import Again

ONCE = Again(attempts=1)


@pytest.fixture
def port() -> Iterator[int]:
    """A port at which nobody listens, and nobody else will meanwhile."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield closed.getsockname()[1]


def s3(port: int) -> Store:
    access = Access("key", "secret", region="us-east-1", endpoint=f"http://127.0.0.1:{port}")
    return S3Store("s3://bucket/x", attempts=1, access=access)


STORES: dict[str, Callable[[int], Store]] = {
    "s3": s3,
    "gs": lambda port: GcsStore("gs://bucket/x", endpoint=f"http://127.0.0.1:{port}", again=ONCE),
    "redis": lambda port: RedisStore(f"redis://127.0.0.1:{port}/x", again=ONCE),
    "http": lambda port: open_store(f"http://127.0.0.1:{port}/x"),
}


@pytest.mark.parametrize("scheme", STORES)
@pytest.mark.parametrize(
    "call",
    [lambda store: store.stat("a"), lambda store: store.readinto("a", 0, memoryview(bytearray(1)))],
    ids=["stat", "readinto"],
)
def test_every_store_says_the_same_of_a_server_that_is_not_there(
    scheme: str, call: Callable[[Store], None], port: int
) -> None:
    with pytest.raises(Unavailable) as caught, STORES[scheme](port) as store:
        call(store)
    text = str(caught.value)
    assert text.startswith(f"the server of {scheme}://")
    assert text.endswith(
        f" cannot be reached at 127.0.0.1:{port} (Connection refused): check that it runs, its address and the network"
    )


def test_what_is_reached_and_hangs_up_is_told_otherwise() -> None:
    """Whoever reads that a server cannot be reached looks for what is not wrong."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        port = listening.getsockname()[1]

        def hang_up() -> None:
            for _ in range(2):
                listening.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        for scheme in ("gs", "redis"):
            with pytest.raises(Unavailable, match=r"broke (\(|the connection)"), STORES[scheme](port) as store:
                store.stat("a")
        thread.join()


def test_a_proxy_that_is_not_there_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By HTTP and by S3, whose address would otherwise seem to be wrong."""
    monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    with Wire() as wire, pytest.raises(Unavailable) as caught:
        wire.send(Request("GET", "http://model.example/a"), where="http://model.example/a")
    assert f"at model.example:80 by way of the proxy 127.0.0.1:{port} (Connection refused)" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("http://h/x", ("h", 80)),
        ("https://h:8443/x", ("h", 8443)),
        ("sftp://h/x", ("h", 22)),
        ("hdfs://h/x", ("h", None)),
        ("https://[::1]/x", ("::1", 443)),
        ("nothing", ("its address", None)),
        ("http://h:port/x", ("its address", None)),
    ],
)
def test_a_server_is_read_from_an_address(address: str, server: tuple[str, int | None]) -> None:
    assert server_of(address) == server


def test_an_address_is_written_as_one_can_use_it() -> None:
    error = ConnectionRefusedError(111, "Connection refused")
    assert " at h:1 (Conn" in str(unreached("x", "h", 1, error))
    assert " at [::1]:443 (Conn" in str(unreached("x", "::1", 443, error))
    assert " at h (Conn" in str(unreached("x", "h", None, error))
    assert " at h:1 by way of the proxy p:3128 (Conn" in str(unreached("x", "h", 1, error, proxy=Proxy("p", 3128)))


def test_the_reason_is_that_of_the_system() -> None:
    """Whatever libraries put around it; but what an error was met beside is not its reason."""
    refused = ConnectionRefusedError(111, "Connection refused")
    made = RuntimeError("<object at 0x1>: failed")
    made.__cause__ = refused
    assert (reason(made), no_connection(made)) == ("Connection refused", True)
    assert reason(ValueError(made)) == "Connection refused"
    beside = TimeoutError("it takes no more bytes")
    beside.__context__ = refused
    assert (reason(beside), no_connection(beside)) == ("it takes no more bytes", False)
    assert (reason(EOFError()), no_connection(EOFError())) == ("EOFError", False)
    assert reason(OSError("[SSL: WRONG] it is\nso (_ssl.c:99)")) == "it is so"
    assert reason(RuntimeError("no banner[Errno 104] Connection reset")) == "no banner: Connection reset"
    assert reason(RuntimeError("[Errno -2] Name or service not known")) == "Name or service not known"
    around = RuntimeError("round")
    around.__cause__ = around
    assert reason(around) == "round"
