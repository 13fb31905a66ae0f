"""Ranges over HTTP: whole or an error, only what is missing asked for again, one version."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator

import pytest

from shardtool.errors import AccessDenied, FormatError, NotFound, ShardtoolError, StoreError, Unavailable
from shardtool.stores.wire.http import Answer, Request, Wire
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.ranged import Remote, fill, passing
from shardtool.stores.wire.retry import Again
from tests.servers.web import Say, Scripted, Visit, hang_up, reply

DATA = os.urandom(10_000)
QUICK = Again(attempts=4, backoff=0.001)


@pytest.fixture
def hasty() -> Iterator[Wire]:
    """Connections that lose their patience soon, and yet after any server that works has answered."""
    with Wire(pace=Pace(silence=1.5, floor=1000)) as wire:
        yield wire


def refused(answer: Answer) -> ShardtoolError:
    if busy := passing(answer, "the object"):
        return busy
    return {403: AccessDenied, 404: NotFound}.get(answer.status, StoreError)(f"the server says {answer.status}")


def remote(server: Scripted, **about: object) -> Remote:
    """The object of a server."""

    def request(first: int, last: int) -> Request:
        return Request("GET", f"{server.url}/a?signed={time.monotonic_ns()}", {"Range": f"bytes={first}-{last}"})

    return Remote("the object", request, refused, **about)  # type: ignore[arg-type]


def asked(visit: Visit) -> tuple[int, int]:
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", visit.headers["range"])
    assert found
    return int(found[1]), int(found[2])


def part(visit: Visit, data: bytes = DATA, *, most: int | None = None, **headers: str | int) -> bytes:
    """The right answer; no more than ``most`` bytes of it, which the answer says."""
    first, last = asked(visit)
    last = min(last, first + most - 1 if most else last)
    said = {"Content_Range": f"bytes {first}-{last}/{len(data)}", "ETag": '"1"', **headers}
    return reply(206, data[first : last + 1], **said)


def right(visit: Visit) -> None:
    visit.say(part(visit))


def cut(after: int) -> Callable[[Visit], None]:
    """The right answer, of which no more than the head and ``after`` bytes come."""

    def say(visit: Visit) -> None:
        head, _, body = part(visit).partition(b"\r\n\r\n")
        visit.say(head + b"\r\n\r\n" + body[:after])
        raise ConnectionAbortedError

    return say


def read(wire: Wire, server: Scripted, start: int = 0, size: int = len(DATA), **options: object) -> bytes:
    about = options.pop("about", {})
    room = bytearray(size)
    fill(wire, remote(server, **about), start, memoryview(room), again=QUICK, **options)  # type: ignore[arg-type]
    return bytes(room)


def ranges(server: Scripted) -> list[tuple[int, int]]:
    return [asked(visit) for visit in server.visits]


@pytest.mark.parametrize(("start", "size"), [(0, 10_000), (0, 1), (9_999, 1), (123, 4567)])
def test_a_range_is_one_request(wire: Wire, start: int, size: int) -> None:
    with Scripted(right) as server:
        assert read(wire, server, start, size) == DATA[start : start + size]
        assert ranges(server) == [(start, start + size - 1)]


def test_nothing_is_not_asked_for(wire: Wire) -> None:
    with Scripted(right) as server:
        assert read(wire, server, 5, 0) == b""
        assert server.visits == []


def test_only_what_is_missing_is_asked_for_again(wire: Wire) -> None:
    with Scripted(cut(3000), cut(500), right) as server:
        assert read(wire, server, 100, 9000) == DATA[100:9100]
        assert ranges(server) == [(100, 9099), (3100, 9099), (3600, 9099)]


def test_every_try_is_signed_anew(wire: Wire) -> None:
    with Scripted(cut(10), cut(10), right) as server:
        read(wire, server)
        assert len({visit.line for visit in server.visits}) == 3


def silent(visit: Visit) -> None:
    """Until the other side has hung up."""
    visit.say(part(visit)[:2000])
    visit.connection.recv(1)


def reset(visit: Visit) -> None:
    visit.say(part(visit)[:2000])
    visit.reset()


def said_and_gone(make: Callable[[Visit], bytes]) -> Callable[[Visit], None]:
    """An answer, and then nothing more."""

    def say(visit: Visit) -> None:
        visit.say(make(visit))
        hang_up(visit)

    return say


TROUBLES: dict[str, Say] = {
    "cut before the head": hang_up,
    "cut in the head": said_and_gone(lambda visit: part(visit)[:20]),
    "cut in the body": cut(10),
    "reset": reset,
    "silent": silent,
    "503": reply(503, b"slow down"),
    "429": reply(429, Retry_After="0"),
    "500": reply(500),
    "408": reply(408),
    "no HTTP": b"what?\r\n\r\n",
    "the wrong bytes": lambda visit: visit.say(part(visit, Content_Range=f"bytes 1-10000/{len(DATA)}")),
    "no Content-Range": lambda visit: visit.say(reply(206, DATA)),
    "a length that contradicts": said_and_gone(lambda visit: part(visit, Content_Length=50)),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_what_passes_is_tried_again(wire: Wire, hasty: Wire, trouble: Say) -> None:
    wire = hasty if trouble is silent else wire
    with Scripted(right, trouble, trouble, right) as server:
        assert read(wire, server, 0, 10) == DATA[:10]
        assert read(wire, server) == DATA
        assert len(server.visits) in (4, 5)  # a connection that was closed meanwhile is not counted


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_what_does_not_pass_ends_in_an_error(wire: Wire, hasty: Wire, trouble: Say) -> None:
    wire = hasty if trouble is silent else wire
    with Scripted(trouble) as server, pytest.raises(Unavailable, match="the object"):
        read(wire, server)


@pytest.mark.parametrize(
    ("status", "kind"), [(403, AccessDenied), (404, NotFound), (400, StoreError), (416, FormatError), (412, StoreError)]
)
def test_what_is_refused_is_not_tried_again(wire: Wire, status: int, kind: type[ShardtoolError]) -> None:
    with Scripted(reply(status, b"no")) as server:
        with pytest.raises(kind):
            read(wire, server)
        assert len(server.visits) == 1


def test_credentials_are_renewed_once(wire: Wire) -> None:
    calls: list[int] = []

    def renewed() -> bool:
        calls.append(1)
        return True

    with Scripted(reply(403), right) as server:
        assert read(wire, server, about={"renewed": renewed}) == DATA
    with Scripted(reply(401)) as server:
        with pytest.raises(StoreError, match="401"):
            read(wire, server, about={"renewed": renewed})
        assert len(server.visits) == 2
    assert len(calls) == 2


# Parts and whole objects


def test_a_server_may_send_a_part_of_what_it_is_asked_for(wire: Wire) -> None:
    """Some proxies hold no more; what is missing is asked for until nothing is."""
    with Scripted(lambda visit: visit.say(part(visit, most=4000))) as server:
        assert read(wire, server) == DATA
        assert ranges(server) == [(0, 9999), (4000, 9999), (8000, 9999)]


def test_a_server_that_sends_one_byte_at_a_time_is_given_up(wire: Wire) -> None:
    with Scripted(lambda visit: visit.say(part(visit, most=1))) as server:
        with pytest.raises(Unavailable, match="sends less than it is asked for"):
            read(wire, server)
        assert len(server.visits) == QUICK.attempts


def test_an_object_that_ends_sooner(wire: Wire) -> None:
    with Scripted(lambda visit: visit.say(part(visit, DATA[:5000], most=4900))) as server:
        with pytest.raises(FormatError, match="the object ends before"):
            read(wire, server, 100)
        assert len(server.visits) == 1


def test_some_servers_send_a_range_and_call_it_whole(wire: Wire) -> None:
    def say(visit: Visit) -> None:
        first, last = asked(visit)
        visit.say(reply(200, DATA[first : last + 1], ETag='"1"'))

    with Scripted(say) as server:
        assert read(wire, server, 0, 100) == DATA[:100]
        assert read(wire, server, 100, 500, about={"size": lambda: len(DATA)}) == DATA[100:600]
        with pytest.raises(StoreError, match="ignores which bytes are asked for"):
            read(wire, server, 100, 500)


def test_a_server_that_knows_no_ranges(wire: Wire) -> None:
    """What lies at the start can be read all the same; the rest is refused instead of being read for nothing."""
    with Scripted(reply(200, DATA)) as server:
        assert read(wire, server, 0, 100) == DATA[:100]
        assert read(wire, server) == DATA
        with pytest.raises(StoreError, match="ignores which bytes are asked for"):
            read(wire, server, 1, 100, about={"size": lambda: len(DATA)})
        with pytest.raises(FormatError, match="ends before"):
            read(wire, server, 0, 10_001)


def test_a_body_in_chunks(wire: Wire) -> None:
    def say(visit: Visit) -> None:
        head = b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-9999/10000\r\n\r\n"
        visit.say(
            head + b"".join(b"3e8\r\n" + DATA[i : i + 1000] + b"\r\n" for i in range(0, 10000, 1000)) + b"0\r\n\r\n"
        )

    with Scripted(say) as server:
        assert read(wire, server) == DATA


# Versions


def test_an_object_that_is_replaced_is_noticed(wire: Wire) -> None:
    """When a connection broke, and when a version was known before."""
    other = os.urandom(10_000)
    with Scripted(cut(100), lambda visit: visit.say(part(visit, other, ETag='"2"'))) as server:
        with pytest.raises(StoreError, match="the object was replaced while it was read") as caught:
            read(wire, server)
        assert not caught.value.retryable
    with Scripted(right) as server:
        with pytest.raises(StoreError, match="was replaced"):
            read(wire, server, version='"0"')
        assert read(wire, server, version='"1"') == DATA


def test_an_object_that_grows_is_noticed_even_if_it_has_no_version(wire: Wire) -> None:
    grown = DATA + b"more"
    with (
        Scripted(cut(100), lambda visit: visit.say(part(visit, grown))) as server,
        pytest.raises(StoreError, match="was repl"),
    ):
        read(wire, server, about={"version": lambda _: ""})


def test_the_version_is_told(wire: Wire) -> None:
    with Scripted(right) as server:
        assert fill(wire, remote(server), 0, memoryview(bytearray(5))) == '"1"'
        known = remote(server, version=lambda headers: headers["content-range"])
        assert fill(wire, known, 0, memoryview(bytearray(5))) == "bytes 0-4/10000"


def test_large_ranges_have_as_many_tries_as_they_need() -> None:
    """A connection that brought a MiB is not held against the server."""
    data = os.urandom(8 << 20)

    def say(visit: Visit) -> None:
        head, _, body = part(visit, data).partition(b"\r\n\r\n")
        visit.say(head + b"\r\n\r\n" + body[: (1 << 20) + 5])
        raise ConnectionAbortedError

    with Scripted(say) as server, Wire() as wire:
        room = bytearray(len(data))
        fill(wire, remote(server), 0, memoryview(room), again=Again(attempts=2, backoff=0.001))
        assert room == data
        assert len(server.visits) == 8
