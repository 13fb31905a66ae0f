"""TLS over a socket: what one side writes the other one reads, however it is cut on the way."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from shardtool.stores.wire.tls import BLOCK, HELD, Secure
from tests.servers.web import certificate

ROUNDS = 32
Side = Callable[[ssl.SSLSocket], object]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's context and the client's, which trusts it."""
    path = tmp_path_factory.mktemp("tls") / "tls.pem"
    authority: Path = certificate(path)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=authority)


@contextmanager
def connected(contexts: tuple[ssl.SSLContext, ssl.SSLContext], side: Side) -> Iterator[tuple[Secure, Future[object]]]:
    """A client, and what comes of the server's side of it, which runs in a thread."""
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    theirs.settimeout(20)

    def serve() -> object:
        with contexts[0].wrap_socket(theirs, server_side=True, suppress_ragged_eofs=False) as secure:
            return side(secure)

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        client = Secure(ours, contexts[1], "localhost")
        try:
            yield client, served
        finally:
            client.close()


def received(client: Secure, count: int, most: int = 1 << 20) -> bytes:
    memory = bytearray(count)
    got = 0
    while got < count and (n := client.recv_into(memoryview(memory)[got : got + most])):
        got += n
    return bytes(memory[:got])


def taken(server: ssl.SSLSocket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += server.recv(1 << 16)
    return bytes(data)


@pytest.mark.parametrize("size", [1, 16 << 10, BLOCK - 1, BLOCK, BLOCK + 1, 5 << 20])
@pytest.mark.parametrize("most", [7001, 1 << 20])
def test_what_the_server_writes_is_read(pair: tuple[ssl.SSLContext, ssl.SSLContext], size: int, most: int):
    data = Random(size).randbytes(size)
    with connected(pair, lambda server: server.sendall(data)) as (client, _):
        assert received(client, size, most) == data


@pytest.mark.parametrize("size", [1, 16 << 10, 5 << 20])
def test_what_is_sent_without_waiting_arrives_once(pair: tuple[ssl.SSLContext, ssl.SSLContext], size: int):
    """Piece by piece; what the socket has no room for goes later, before the next one."""
    data = memoryview(Random(size).randbytes(size))
    with connected(pair, lambda server: taken(server, size)) as (client, served):
        client.settimeout(0)
        waited = sent = 0
        while sent < size or client.unsent():
            try:
                if client.unsent():
                    client.push()
                else:
                    count = client.send(data[sent:])
                    assert count == min(BLOCK, size - sent)
                    sent += count
            except BlockingIOError:
                waited += 1
        assert served.result(20) == data
        assert waited or size < 1 << 20  # or nothing was learned about what is left over


def test_the_head_of_a_request_goes_as_a_whole(pair: tuple[ssl.SSLContext, ssl.SSLContext]):
    head = bytes(300_000)
    with connected(pair, lambda server: taken(server, len(head))) as (client, served):
        client.sendall(head)
        assert served.result(20) == head
        assert not client.unsent()


def test_an_answer_can_be_read_while_much_is_left_to_send(pair: tuple[ssl.SSLContext, ssl.SSLContext]):
    """The server takes nothing until its answer has been read, and then nothing that was begun is lost."""
    data = memoryview(bytes(range(256)) * (BLOCK // 256))
    heard = threading.Event()

    def answer(server: ssl.SSLSocket) -> bytes:
        server.sendall(b"enough")
        assert heard.wait(20)
        return taken(server, ROUNDS * len(data))

    with connected(pair, answer) as (client, served):
        client.settimeout(0)
        sent = 0
        while not client.unsent():
            sent += client.send(data)
        client.settimeout(20)
        assert client.recv(100) == b"enough"
        heard.set()
        for _ in range(ROUNDS - sent // len(data)):
            while client.unsent():
                client.push()
            client.send(data)
        while client.unsent():
            client.push()
        assert served.result(20) == bytes(data) * ROUNDS


def test_a_connection_that_is_closed_has_an_end(pair: tuple[ssl.SSLContext, ssl.SSLContext]):

    def end(server: ssl.SSLSocket) -> None:
        server.sendall(b"all")
        server.unwrap()

    with connected(pair, end) as (client, _):
        assert received(client, 100) == b"all"
        assert client.recv(1) == b""


def test_one_that_is_cut_gives_what_came_before(pair: tuple[ssl.SSLContext, ssl.SSLContext]):
    """Whoever wants more counts: HTTP says how much there is."""

    def cut(server: ssl.SSLSocket) -> None:
        server.sendall(bytes(100_000))
        raw = socket.socket(fileno=server.detach())
        raw.shutdown(socket.SHUT_RDWR)
        raw.close()

    with connected(pair, cut) as (client, _):
        assert received(client, 1 << 20) == bytes(100_000)
        assert client.recv(1) == b""


def test_bytes_that_were_changed_on_the_way_are_refused(pair: tuple[ssl.SSLContext, ssl.SSLContext]):
    def forge(server: ssl.SSLSocket) -> None:
        server.sendall(b"good")
        raw = socket.socket(fileno=server.detach())
        raw.sendall(b"\x17\x03\x03\x00\x40" + bytes(64))
        raw.close()

    with connected(pair, forge) as (client, _):
        assert client.recv(4) == b"good"
        with pytest.raises(ssl.SSLError):
            client.recv(100)


def test_a_silent_server_is_waited_for_no_longer_than_said(pair: tuple[ssl.SSLContext, ssl.SSLContext]):
    done = threading.Event()
    with connected(pair, lambda server: done.wait(20)) as (client, _):
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(0)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        assert client.recv_at_once(1) == b""
        done.set()


def test_what_has_come_and_was_not_wanted_is_known(pair: tuple[ssl.SSLContext, ssl.SSLContext]):
    with connected(pair, lambda server: server.sendall(b"hello, and more")) as (client, served):
        served.result(20)
        assert client.recv(5) == b"hello"
        assert client.pending
        assert client.recv_at_once(100) == b", and more"


@pytest.mark.parametrize("name", ["elsewhere.example", "127.0.0.2"])
def test_the_server_is_the_one_that_was_meant(pair: tuple[ssl.SSLContext, ssl.SSLContext], name: str):
    ours, theirs = socket.socketpair()

    def serve() -> str:
        with pytest.raises(ssl.SSLError) as error:
            pair[0].wrap_socket(theirs, server_side=True)
        return str(error.value)

    with ThreadPoolExecutor(1) as pool, ours, theirs:
        served = pool.submit(serve)
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            Secure(ours, pair[1], name)
        assert "ALERT" in served.result(20).upper()  # it was told why


def test_a_connection_holds_no_more_than_it_says(pair: tuple[ssl.SSLContext, ssl.SSLContext]):
    data = bytes(4 << 20)
    with connected(pair, lambda server: server.sendall(data)) as (client, _):
        got = 0
        while got < len(data):
            got += client.recv_into(memoryview(bytearray(1000)))
            assert client._incoming.pending <= BLOCK
    assert HELD >= 2 * BLOCK
