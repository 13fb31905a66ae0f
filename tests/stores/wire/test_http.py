"""Wire: what goes over a connection and comes back, when connections are used again, and what it never does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from shardtool.errors import AccessDenied, FormatError, StoreError, Unavailable, UsageError
from shardtool.stores.wire.http import Answer, Reply, Request, Wire
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.tls import HELD
from tests.servers.web import Scripted, Tunnels, Visit, Web, certificate, hang_up, reply

MIB = 1 << 20


@pytest.fixture
def hasty() -> Iterator[Wire]:
    """Connections that lose their patience after half a second."""
    with Wire(pace=Pace(silence=0.5, floor=1000)) as wire:
        yield wire


@pytest.fixture
def timely() -> Iterator[Wire]:
    """Connections that lose it after two seconds, in which every server that works has said something."""
    with Wire(pace=Pace(silence=2.0, floor=1000)) as wire:
        yield wire


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate; the one of its authority lies beside it as ``tls.ca.pem``."""
    path = tmp_path_factory.mktemp("tls") / "tls.pem"
    certificate(path)
    return path


def ask(wire: Wire, url: str, method: str = "GET", body: bytes = b"", **headers: str) -> Answer:
    return wire.send(Request(method, url, headers), body, where="the file")


# What is sent and what comes back


def test_a_small_answer_has_status_headers_and_body(wire: Wire) -> None:
    with Scripted(reply(200, b"hello", ETag='"1"', X_Thing="a")) as server:
        answer = ask(wire, f"{server.url}/a%20b?c=d%2Fe", Range="bytes=0-4")
    assert (answer.status, answer.body) == (200, b"hello")
    assert (answer.headers["etag"], answer.headers["x-thing"]) == ('"1"', "a")
    [visit] = server.visits
    assert visit.line == "GET /a%20b?c=d%2Fe HTTP/1.1"
    assert visit.headers["host"] == f"127.0.0.1:{server.port}"
    assert visit.headers["range"] == "bytes=0-4"
    assert visit.headers["accept-encoding"] == "identity"
    assert visit.headers["user-agent"].startswith("shardtool/")
    assert "content-length" not in visit.headers


def test_headers_of_the_caller_are_sent_as_they_are(wire: Wire) -> None:
    """A signature covers them."""
    with Scripted(reply(200)) as server:
        wire.send(Request("GET", server.url, {"host": "bucket.example", "User-agent": "me"}), where="x")
    assert server.visits[0].head.count(b"ost:") == 1
    assert server.visits[0].headers["host"] == "bucket.example"
    assert server.visits[0].headers["user-agent"] == "me"


@pytest.mark.parametrize("secure", [False, True])
def test_a_body_of_any_size_is_sent_from_memory(wire: Wire, tls: Path, secure: bool) -> None:
    body = os.urandom(5 * MIB + 3)
    with Scripted(reply(201), tls=tls if secure else None) as server, trusting(tls) as wire:
        for data in (b"", b"x", body, memoryview(body).cast("B")[7:]):
            assert wire.send(Request("PUT", server.url), data, where="x").status == 201
    assert [visit.body for visit in server.visits] == [b"", b"x", body, body[7:]]
    assert [visit.headers["content-length"] for visit in server.visits] == [str(len(v.body)) for v in server.visits]
    assert server.connections == 1 + secure  # large bodies go over one that is made for them


def test_a_header_cannot_smuggle_another_one(wire: Wire) -> None:
    with Scripted(reply(200)) as server:
        for request in (
            Request("GET", server.url, {"A": "b\r\nEvil: yes"}),
            Request("GET", server.url, {"A\r\nEvil": "yes"}),
            Request("GET", f"{server.url}/a b"),
            Request("GET\r\nEvil: yes", server.url),
        ):
            with pytest.raises(UsageError, match="the file cannot be asked for"):
                wire.send(request, where="the file")
    assert server.visits == []


def test_what_cannot_be_sent_is_not_shown(wire: Wire) -> None:
    """It may be a password, or a signature."""
    for request in (
        Request("GET", "http://127.0.0.1:1/a?sig=SEC RET"),
        Request("GET", "http://127.0.0.1:1/", {"Authorization": "Bearer SECRET\n"}),
        Request("GET", "http://127.0.0.1:1/", {"Authorization": "Bearer SECRET\u20ac"}),
    ):
        with Scripted(reply(200)) as server, pytest.raises(UsageError) as refused:
            wire.send(Request("GET", request.url.replace("http://127.0.0.1:1", server.url), request.headers), where="x")
        assert "SEC" not in str(refused.value)
        assert refused.value.__suppress_context__


@pytest.mark.parametrize("url", ["ftp://host/a", "host/a", "http://", "http://host:99999/", "http://[::1/"])
def test_an_address_that_is_none_is_refused(wire: Wire, url: str) -> None:
    with pytest.raises(UsageError, match="address"):
        ask(wire, url)


def test_an_answer_that_is_longer_than_it_may_be(wire: Wire) -> None:
    """Refused if it is what was asked for; the text of an error is only cut."""
    with Scripted(reply(200, b"x" * 11), reply(500, b"y" * 11), reply(200, b"x" * 10)) as server:
        with pytest.raises(FormatError, match="the file is longer than 10 bytes"):
            wire.send(Request("GET", server.url), where="the file", limit=10)
        assert wire.send(Request("GET", server.url), where="the file", limit=10).body == b"y" * 10
        assert wire.send(Request("GET", server.url), where="the file", limit=10).body == b"x" * 10


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello world",
        b"HTTP/1.0 200 OK\r\nContent-Length: 11\r\nConnection: close\r\n\r\nhello world",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world",
    ],
)
def test_every_way_to_send_a_body_is_understood(wire: Wire, said: bytes) -> None:
    with Scripted(said) as server:
        assert ask(wire, server.url).body == b"hello world"
        with wire.open(Request("GET", server.url), where="x") as answer:
            view, got = memoryview(bytearray(20)), 0
            while count := answer.readinto(view[got : got + 4]):
                got += count
        assert bytes(view[:got]) == b"hello world"


def test_a_large_body_goes_straight_into_memory(web: Web, tmp_path: Path) -> None:
    data = os.urandom(9 * MIB + 1)
    (web.root / "large").write_bytes(data)
    for url in (f"{web.bare}/large", f"{web.tls}/large"):
        with trusting(web.authority) as wire, wire.open(Request("GET", url), where="x") as answer:
            assert answer.length == len(data)
            view, got = memoryview(bytearray(len(data) + 1)), 0
            while count := answer.readinto(view[got:]):
                got += count
            assert view[:got] == data


# Connections


def test_a_connection_is_used_again_when_its_body_was_read(wire: Wire) -> None:
    with Scripted(*[reply(200, b"hello")] * 3, reply(200, Content_Length=5), reply(200, b"hello")) as server:
        for _ in range(3):
            ask(wire, server.url)
        ask(wire, server.url, "HEAD")
        ask(wire, server.url)
        assert server.connections == 1
        with wire.open(Request("GET", server.url), where="x") as answer:
            answer.readinto(memoryview(bytearray(4)))
        assert ask(wire, server.url).body == b"hello"
        assert server.connections == 2


def test_a_connection_that_the_server_wants_to_close_is_not_used_again(wire: Wire) -> None:
    with Scripted(reply(200, b"hello", Connection="close")) as server:
        for _ in range(3):
            assert ask(wire, server.url).body == b"hello"
        assert server.connections == 3


def test_a_connection_that_was_closed_meanwhile_is_not_noticed_by_anybody(wire: Wire) -> None:
    """Whether it is seen before the request is sent, or after it."""

    def say_and_close(visit: Visit) -> None:
        visit.say(reply(200, b"hello"))
        raise ConnectionAbortedError

    with Scripted(say_and_close) as server:
        for number in range(4):
            assert ask(wire, server.url).body == b"hello"
            time.sleep(0.05 * (number % 2))
    with Scripted(reply(200, b"hello"), hang_up, reply(200, b"again")) as server:
        assert ask(wire, server.url).body == b"hello"
        assert ask(wire, server.url).body == b"again"
        assert server.connections == 2


def test_what_changes_something_is_never_sent_twice(wire: Wire) -> None:
    """On a connection that is used again it is not known whether the server has done it."""
    with Scripted(reply(200), hang_up, reply(200)) as server:
        ask(wire, server.url, "PUT", b"a")
        with pytest.raises(Unavailable, match="the connection to the server of the file broke"):
            ask(wire, server.url, "PUT", b"b")
        assert len(server.visits) == 2


def test_a_new_connection_that_is_cut_is_an_error(wire: Wire) -> None:
    with Scripted(hang_up) as server:
        with pytest.raises(Unavailable, match="the connection to the server of the file broke"):
            ask(wire, server.url)
        assert len(server.visits) == 1


@pytest.mark.parametrize("body", [b"", b"hello", bytes(20_000)])
def test_a_body_that_goes_on_after_its_length_is_not_trusted(wire: Wire, body: bytes) -> None:
    """Its length is wrong, so it may be cut; and whatever follows is no answer to the next request."""
    with Scripted(reply(200, body) + b"evil" + reply(200, b"evil")) as server:
        for _ in range(3):
            with pytest.raises(Unavailable, match="sends more than it says"):
                wire.send(Request("GET", server.url), where="the file")
    with Scripted(reply(404, body) + b"evil", reply(200, b"hello")) as server:
        assert ask(wire, server.url).body == body
        assert ask(wire, server.url).body == b"hello"
        assert server.connections == 2


@pytest.mark.parametrize("behind", [b"evil", reply(200, b"evil")])
def test_what_follows_the_last_chunk_is_no_answer_to_the_next_request(wire: Wire, behind: bytes) -> None:
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    with Scripted(whole + behind, reply(200, b"good")) as server:
        with pytest.raises(Unavailable, match="sends more than it says"):
            ask(wire, server.url)
        assert ask(wire, server.url).body == b"good"


def test_what_follows_a_large_body_is_no_answer_to_the_next_request(wire: Wire) -> None:
    """Nor if the kernel was told to gather much before it tells of it, and whether it comes in time or not."""
    body = os.urandom(512 << 10)
    with Scripted(reply(200, body) + reply(200, b"evil")) as server:
        for _ in range(5):
            with suppress(Unavailable):
                assert wire.send(Request("GET", server.url), where="the file", limit=MIB).body == body
            time.sleep(0.01)


def test_an_answer_to_head_has_no_body_whatever_the_server_thinks(wire: Wire) -> None:
    with Scripted(reply(200, b"hello"), reply(200, b"again")) as server:
        answer = ask(wire, server.url, "HEAD")
        assert (answer.headers["content-length"], answer.body) == ("5", b"")
        assert ask(wire, server.url).body == b"again"
        assert server.connections == 2


def test_many_threads_share_connections(wire: Wire) -> None:
    with Scripted(reply(200, b"hello")) as server, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(wire, server.url).body, range(100)))
        assert answers == [b"hello"] * 100
        assert server.connections <= 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_does_not_use_its_parents_connections(wire: Wire) -> None:
    with Scripted(reply(200, b"hello")) as server:
        ask(wire, server.url)
        child = os.fork()
        if child == 0:
            os._exit(0 if ask(wire, server.url).body == b"hello" else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert ask(wire, server.url).body == b"hello"
        assert server.connections == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_does_not_wait_for_its_parents_requests() -> None:
    """Nobody in the child would ever end them."""
    with (
        Wire(most=1) as wire,
        Scripted(reply(200, b"hello")) as server,
        wire.open(Request("GET", server.url), where="x"),
    ):
        child = os.fork()
        if child == 0:
            began = time.monotonic()
            os._exit(0 if ask(wire, server.url).body == b"hello" and time.monotonic() - began < 20 else 1)
        assert os.waitpid(child, 0)[1] == 0


# Trouble


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (reply(200, b"hello", Content_Length=9) + b"", "broke|ended early"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", "broke|ended early"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhel", "broke"),
        (b"HTTP/1.1 200", "broke"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "broke"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", "broke"),
        (b"HTTP/1.1 200 OK\r\na: " + b"b" * 70000 + b"\r\n\r\n", "broke"),
        (b"HTTP/1.1 9999 OK\r\n\r\n", "broke"),
    ],
)
def test_an_answer_that_is_none_is_an_error_that_passes(wire: Wire, said: bytes, message: str) -> None:
    def say_and_close(visit: Visit) -> None:
        visit.say(said)
        raise ConnectionAbortedError

    with Scripted(say_and_close) as server, pytest.raises(Unavailable, match=message):
        ask(wire, server.url)


def test_nobody_listens(wire: Wire) -> None:
    with pytest.raises(Unavailable, match=r"the server of the file cannot be reached at 127\.0\.0\.1:9 \(Connection r"):
        ask(wire, "http://127.0.0.1:9/?secret")


def test_a_name_that_does_not_resolve(wire: Wire) -> None:
    with pytest.raises(Unavailable, match=r"the file cannot be reached at nowhere\.invalid:80"):
        ask(wire, "http://nowhere.invalid/")


def wait(visit: Visit) -> None:
    visit.connection.recv(1)


def drip(piece: bytes) -> Callable[[Visit], None]:
    def say(visit: Visit) -> None:
        while True:
            visit.say(piece)
            time.sleep(0.05)

    return say


def say_then(data: bytes, then: Callable[[Visit], None]) -> Callable[[Visit], None]:
    def say(visit: Visit) -> None:
        visit.say(data)
        then(visit)

    return say


HEAD = reply(200, Content_Length=MIB)


@pytest.mark.parametrize(
    "answer",
    [
        wait,
        say_then(b"HTTP/1.1 200 OK\r\n", drip(b"x: y\r\n")),
        say_then(HEAD, wait),
        say_then(HEAD, drip(b"x")),
        say_then(HEAD + b"x" * 900, wait),
    ],
    ids=["silent", "trickling head", "silent after the head", "trickling body", "silent in the body"],
)
def test_no_server_holds_a_thread_for_ever(hasty: Wire, answer: Callable[[Visit], None]) -> None:
    """Half a second of silence, or of less than 1000 bytes a second, is as much as anybody waits."""
    with Scripted(answer) as server:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="the file is silent or too slow"):
            take(hasty, Request("GET", server.url))
        assert time.monotonic() - began < 20.0  # of a minute without this pace


def take(wire: Wire, request: Request) -> None:
    """Read a whole body."""
    with wire.open(request, where="the file") as found:
        view = memoryview(bytearray(MIB))
        while count := found.readinto(view):
            view = view[count:]


def test_a_slow_answer_that_is_fast_enough_is_taken(timely: Wire) -> None:
    """In all it takes longer than silence may."""

    def say(visit: Visit) -> None:
        visit.say(reply(200, Content_Length=20_000))
        for _ in range(20):
            visit.say(b"x" * 1000)
            time.sleep(0.15)

    with Scripted(say) as server, timely.open(Request("GET", server.url), where="x") as answer:
        assert len(answer.read(20_000)) == 20_000


def test_what_came_of_a_large_body_before_silence_is_not_lost(hasty: Wire) -> None:
    """The kernel gathers more than that before it wakes anybody, as long as more comes."""
    with (
        Scripted(say_then(reply(200, Content_Length=MIB) + b"x" * 300_000, wait)) as server,
        hasty.open(Request("GET", server.url), where="x") as answer,
    ):
        memory = bytearray(MIB)
        with pytest.raises(Unavailable, match="silent or too slow"):
            fill(answer, memory)
        assert memory.rstrip(b"\0") == b"x" * 300_000


def fill(reply: Reply, memory: bytearray) -> None:
    """Read a body into memory."""
    got = 0
    while count := reply.readinto(memoryview(memory)[got:]):
        got += count


def test_a_large_body_that_comes_in_small_pieces_is_taken_whole(timely: Wire) -> None:
    """In pieces for which nobody is woken, with pauses in between, and an end that is less than such a piece."""
    body = bytes(range(256)) * (MIB // 256) + b"the end"

    def say(visit: Visit) -> None:
        visit.say(reply(200, Content_Length=len(body)))
        for at in range(0, len(body), 100_000):
            visit.say(body[at : at + 100_000])
            time.sleep(0.05)

    with Scripted(say) as server, timely.open(Request("GET", server.url), where="x") as answer:
        assert answer.read(len(body)) == body


def test_what_tls_takes_is_told(wire: Wire) -> None:
    """``test_tls.py`` shows that it takes no more."""
    assert wire.reading("https://host/path", 8) == 8 * HELD
    assert wire.reading("http://host/path", 8) == 0


def test_a_reader_that_takes_its_time_is_not_the_servers_fault(timely: Wire) -> None:
    with Scripted(reply(200, b"x" * 3000)) as server, timely.open(Request("GET", server.url), where="x") as answer:
        got = 0
        while count := answer.readinto(memoryview(bytearray(1000))):
            got += count
            time.sleep(0.8)
        assert got == 3000


def test_a_small_answer_is_over_within_its_time(hasty: Wire) -> None:
    """However patient the wire is; and an operation that takes a server long may be given longer."""

    def late(visit: Visit) -> None:
        for _ in range(7):
            visit.say(b" ")
            time.sleep(0.1)

    with Scripted(say_then(reply(200, Content_Length=7), late)) as server:
        with pytest.raises(Unavailable, match="silent or too slow"):
            hasty.send(Request("POST", server.url), where="x", within=0.3)
        assert hasty.send(Request("POST", server.url), where="x", within=60.0).body == b" " * 7


def test_a_server_that_takes_no_body_is_not_waited_for_for_ever(hasty: Wire) -> None:
    over = threading.Event()

    def take_nothing(_: Visit) -> None:
        over.wait(60)

    with Scripted(take_nothing, early=True) as server:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="silent or too slow"):
            hasty.send(Request("PUT", server.url), bytes(64 * MIB), where="x")
        assert time.monotonic() - began < 20.0
        over.set()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_refusal_is_heard_while_a_body_is_sent(tls: Path, secure: bool, reset: bool) -> None:
    """The server says no before it has read the body, and reads no more; or even closes the connection soon."""

    def refuse(visit: Visit) -> None:
        visit.say(reply(403, b"no", Connection="close"))
        time.sleep(0.2)
        if not reset:
            visit.connection.recv(1)
            time.sleep(0.3)

    with Scripted(refuse, early=True, tls=tls if secure else None) as server, trusting(tls) as wire:
        answer = wire.send(Request("PUT", server.url), bytes(64 * MIB), where="x")
        assert (answer.status, answer.body) == (403, b"no")


# Redirects


def test_a_redirect_is_only_followed_if_asked_for(wire: Wire) -> None:
    with Scripted(reply(302, Location="/b"), reply(200, b"hello")) as server:
        assert ask(wire, server.url).status == 302
    with Scripted(reply(302, Location="/b?x=y"), reply(200, b"hello")) as server:
        request = Request("GET", f"{server.url}/a", {"Authorization": "secret", "Range": "bytes=0-1"})
        answer = wire.send(request, where="x", redirects=3)
        assert (answer.body, answer.url) == (b"hello", f"{server.url}/b?x=y")
        assert server.visits[1].line == "GET /b?x=y HTTP/1.1"
        assert server.visits[1].headers["authorization"] == "secret"
        assert server.connections == 1


def test_another_server_gets_no_credentials(wire: Wire) -> None:
    secrets = {"Authorization": "1", "Cookie": "2", "x-amz-security-token": "3", "X-Api-Key": "4"}
    with Scripted(reply(200, b"hello")) as other:
        with Scripted(reply(307, Location=f"{other.url}/b")) as server:
            request = Request("GET", server.url, {**secrets, "Range": "bytes=0-1", "Host": "secret.example"})
            assert wire.send(request, where="x", redirects=1).body == b"hello"
        assert server.visits[0].headers["authorization"] == "1"
        assert other.visits[0].headers["range"] == "bytes=0-1"
        assert not {name.lower() for name in secrets} & other.visits[0].headers.keys()
        assert b"secret" not in other.visits[0].head


def test_redirects_come_to_an_end(wire: Wire) -> None:
    with Scripted(reply(302, Location="/again")) as server:
        assert wire.send(Request("GET", server.url), where="x", redirects=4).status == 302
        assert len(server.visits) == 5


def test_only_reading_is_redirected(wire: Wire) -> None:
    with Scripted(reply(307, Location="/b")) as server:
        assert wire.send(Request("PUT", server.url), b"a", where="x", redirects=4).status == 307
        assert len(server.visits) == 1


@pytest.mark.parametrize("location", ["", "ftp://host/a", "file:///etc/passwd"])
def test_a_redirect_to_no_web_server_is_refused(wire: Wire, location: str) -> None:
    with Scripted(reply(302, Location=location)) as server, pytest.raises(StoreError, match="redirects to an address"):
        wire.send(Request("GET", server.url), where="x", redirects=1)


def test_https_is_not_left(tls: Path) -> None:
    with Scripted(reply(200, b"hello")) as plain, Scripted(reply(302, Location=plain.url), tls=tls) as server:
        with trusting(tls) as wire, pytest.raises(StoreError, match="redirects from https to http"):
            wire.send(Request("GET", server.url), where="x", redirects=1)
        assert plain.visits == []


# TLS


def trusting(certificate: Path) -> Wire:
    """Connections that trust the authority of a server's certificate."""
    known = certificate if certificate.name.endswith(".ca.pem") else certificate.with_suffix(".ca.pem")
    return Wire(ca_bundle=str(known))


def test_a_server_is_trusted_by_its_authority(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (web.root / "small").write_bytes(b"hello")
    url = f"{web.tls}/small"
    with trusting(web.authority) as wire:
        assert ask(wire, url).body == b"hello"
    monkeypatch.setenv("SSL_CERT_FILE", str(web.authority))
    with Wire() as wire:
        assert ask(wire, url).body == b"hello"


def test_a_folder_of_authorities_is_a_bundle(web: Web, tmp_path: Path) -> None:
    (web.root / "small").write_bytes(b"hello")
    with Wire(ca_bundle=str(tmp_path)) as wire, pytest.raises(StoreError, match="cannot be trusted"):
        ask(wire, f"{web.tls}/small")
    shutil.copy(web.authority, tmp_path)
    subprocess.run(["openssl", "rehash", tmp_path], check=True)
    with Wire(ca_bundle=str(tmp_path)) as wire:
        assert ask(wire, f"{web.tls}/small").body == b"hello"


def test_a_server_that_nobody_knows_is_not_trusted(web: Web) -> None:
    with (
        Wire() as wire,
        pytest.raises(
            StoreError, match=r"the server of the file cannot be trusted \(.*certificate.*SSL_CERT_FILE"
        ) as caught,
    ):
        ask(wire, f"{web.tls}/small?secret")
    assert not caught.value.retryable
    assert "secret" not in str(caught.value)


def test_a_certificate_for_another_name_is_not_trusted(tmp_path: Path) -> None:
    certificate(tmp_path / "tls.pem", "elsewhere.example")
    with (
        Scripted(reply(200), tls=tmp_path / "tls.pem") as server,
        trusting(tmp_path / "tls.pem") as wire,
        pytest.raises(StoreError, match=r"cannot be trusted.*localhost"),
    ):
        ask(wire, server.url)


def test_a_server_without_tls_is_told_from_a_cut_connection(web: Web, tls: Path) -> None:
    with trusting(tls) as wire, pytest.raises(StoreError, match="does not speak TLS"):
        ask(wire, web.bare.replace("http:", "https:"))
    with socket.create_server(("127.0.0.1", 0)) as listener, trusting(tls) as wire:
        closer = threading.Thread(target=lambda: listener.accept()[0].close())
        closer.start()
        with pytest.raises(Unavailable, match="cannot be reached"):
            ask(wire, f"https://localhost:{listener.getsockname()[1]}")
        closer.join()


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_bundle_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "bundle.pem"
    if content:
        path.write_text(content)
    with Wire(ca_bundle=str(path)) as wire, pytest.raises(UsageError, match=r"bundle\.pem cannot be read"):
        ask(wire, "https://localhost:9/")


# Proxies


@pytest.fixture
def tunnels() -> Iterator[Tunnels]:
    """A proxy that wants a password."""
    with Tunnels("me:p@ss") as tunnels:
        yield tunnels


def test_a_proxy_is_asked_for_both_kinds_of_servers(
    web: Web, tunnels: Tunnels, monkeypatch: pytest.MonkeyPatch
) -> None:
    (web.root / "small").write_bytes(b"hello")
    address = tunnels.address.replace("p@ss", "p%40ss")
    monkeypatch.setenv("HTTPS_PROXY", address)
    monkeypatch.setenv("http_proxy", address)
    with trusting(web.authority) as wire:
        for _ in range(2):
            assert ask(wire, f"{web.tls}/small").body == b"hello"
        assert ask(wire, f"{web.bare}/small?a=b").body == b"hello"
    assert tunnels.asked == [
        f"CONNECT {web.tls.removeprefix('https://')} HTTP/1.1",
        f"GET {web.bare}/small?a=b HTTP/1.1",
    ]


def test_a_password_is_for_the_proxy_alone(tls: Path, tunnels: Tunnels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", tunnels.address.replace("p@ss", "p%40ss"))
    with Scripted(reply(200, b"hello"), tls=tls) as server, trusting(tls) as wire:
        assert ask(wire, server.url, Authorization="for the server").body == b"hello"
    assert b"proxy-auth" not in server.visits[0].head.lower()
    assert "for the server" not in tunnels.heads[0]


@pytest.mark.parametrize("excluded", ["127.0.0.1", "*", ".example,127.0.0.1"])
def test_some_servers_are_reached_without_the_proxy(
    tunnels: Tunnels, excluded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", tunnels.address)
    monkeypatch.setenv("NO_PROXY", excluded)
    with Scripted(reply(200, b"hello")) as server, Wire() as wire:
        assert ask(wire, server.url).body == b"hello"
    assert tunnels.asked == []


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (407, AccessDenied, "HTTPS_PROXY"),
        (403, AccessDenied, "allows this server"),
        (502, Unavailable, "try again"),
        (400, StoreError, "HTTPS_PROXY"),
    ],
)
def test_a_proxy_that_refuses_is_named(
    tunnels: Tunnels, status: int, kind: type[StoreError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunnels.refuses = status
    monkeypatch.setenv("HTTPS_PROXY", tunnels.address.replace("p@ss", "p%40ss"))
    with (
        Wire() as wire,
        pytest.raises(kind, match=f"the proxy 127.0.0.1.* says {status} .*{message}") as caught,
    ):
        ask(wire, "https://localhost:9/?secret")
    assert "p@ss" not in str(caught.value)
    assert "p%40ss" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["ho st", "bücher.example"])
def test_a_host_that_no_proxy_can_be_asked_for_is_refused(
    tunnels: Tunnels, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", tunnels.address.replace("p@ss", "p%40ss"))
    with Wire() as wire, pytest.raises(UsageError, match="the file cannot be asked for"):
        ask(wire, f"https://{host}/x")
    assert tunnels.asked == []


@pytest.mark.parametrize("address", ["socks5://me:p@host:1080", "http://me:p@host:port", "http://"])
def test_a_proxy_that_is_none_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", address)
    with Wire() as wire, pytest.raises(UsageError, match="HTTPS_PROXY") as caught:
        ask(wire, "https://localhost:9/")
    assert "me:p" not in str(caught.value)


# Secrets and lanes


def test_secrets_do_not_get_into_reprs() -> None:
    request = Request("GET", "https://host/?secret", {"Authorization": "secret"})
    assert "secret" not in repr(request)
    assert "secret" not in repr(Answer(200, {}, b"", "https://host/?secret"))


def test_a_server_that_throttles_gets_fewer_requests_at_a_time(wire: Wire) -> None:
    with Scripted(reply(503)) as server:
        lanes = wire.lanes(server.url)
        for _ in range(3):
            ask(wire, server.url)
        assert lanes.limit == 1
    with Scripted(reply(500)) as server:
        for _ in range(3):
            ask(wire, server.url)
        assert wire.lanes(server.url).limit == lanes.most
