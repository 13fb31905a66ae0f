"""HTTP/1.1 in bytes: what Python's own client reads of an answer is what is read here, however it comes in pieces."""

from __future__ import annotations

import http.client
import io
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardtool.stores.wire.message import MOST_LINES, MOST_OF_A_LINE, Chunks, Garbled, Head, answer, request

TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789!#$%&'*+-.^_`|~", min_size=1, max_size=12)
VALUE = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20).map(
    lambda value: value.strip(" \t")
)


class Said:
    """A source that has these bytes, so many at a time."""

    def __init__(self, data: bytes, most: int = 1 << 20) -> None:
        self._file = io.BytesIO(data)
        self._most = most

    def line(self, most: int) -> bytes:
        return self._file.readline(most)

    def receive(self, view: memoryview) -> int:
        return self._file.readinto(view[: self._most])

    @property
    def rest(self) -> bytes:
        return self._file.read()


class Socket:
    """What http.client wants of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def theirs(data: bytes, method: str) -> Head:
    """The same, as http.client reads it."""
    response = http.client.HTTPResponse(Socket(data), method=method)  # type: ignore[arg-type]
    response.begin()
    headers = {name.lower(): value.strip(" \t\r\n") for name, value in response.getheaders()}
    chunked = bool(response.chunked) and response.length is None  # what has no body has no chunks
    return Head(response.status, headers, response.length, chunked, bool(response.will_close))


def chunked(pieces: list[bytes], extension: str = "", trailers: str = "") -> bytes:
    """A body in chunks."""
    said = [f"{len(piece):x}{extension}\r\n".encode() + piece + b"\r\n" for piece in pieces if piece]
    return b"".join(said) + f"0\r\n{trailers}\r\n".encode()


def body(source: Any, room: int) -> bytes:
    """All of it, asked for in pieces."""
    found, view = bytearray(), memoryview(bytearray(room))
    while count := source.receive(view):
        found += view[:count]
    return bytes(found)


@given(
    st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE"]),
    st.integers(200, 599),
    st.sampled_from(["OK", "", "Not Found", "ü"]),
    st.sampled_from([0, 1]),
    st.dictionaries(TOKEN, VALUE, max_size=6),
    st.sampled_from([None, "0", "5", "123456789012", "-1", "five", ""]),
    st.booleans(),
    st.sampled_from([None, "close", "keep-alive", "Close", "Keep-Alive"]),
    st.integers(0, 3),
)
def test_a_head_says_what_pythons_own_client_reads(
    method: str,
    status: int,
    why: str,
    minor: int,
    headers: dict[str, str],
    length: str | None,
    in_chunks: bool,
    connection: str | None,
    early: int,
):
    own = {"content-length", "transfer-encoding", "connection", "keep-alive", "proxy-connection"}
    lines = [f"{name}: {value}" for name, value in headers.items() if name.lower() not in own]
    lines += [f"Content-Length: {length}"] if length is not None else []
    lines += ["Transfer-Encoding: chunked"] if in_chunks else []
    lines += [f"Connection: {connection}"] if connection else []
    said = b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n" * early
    said += "\r\n".join([f"HTTP/1.{minor} {status} {why}", *lines, "", ""]).encode("latin-1")
    source = Said(said + b"BODY")
    found = answer(source, method)
    assert found == theirs(said, method)
    assert source.rest == b"BODY", "not a byte of the body belongs to the head"


def test_a_line_that_is_folded_is_one():
    assert answer(Said(b"HTTP/1.1 200 OK\r\nA: b\r\n  c\r\n\r\n"), "GET").headers == {"a": "b c"}


def test_what_is_said_twice_of_the_length_may_be_the_same():
    assert answer(Said(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n"), "GET").length == 5


def test_who_speaks_something_else_from_now_on_is_not_asked_again():
    assert answer(Said(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), "GET").closes


def test_lines_may_end_with_the_newline_alone():
    assert answer(Said(b"HTTP/1.1 204 No Content\nA: b\n\n"), "GET").headers == {"a": "b"}


@pytest.mark.parametrize(
    "said",
    [
        b"\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: no name\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded onto nothing\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * MOST_LINES + b"\r\n",
        b"HTTP/1.1 200 " + b"x" * MOST_OF_A_LINE + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * MOST_LINES,
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n \r\nA: b\r\n\r\n",
    ],
)
def test_what_is_no_answer_is_told_apart(said: bytes):
    with pytest.raises(Garbled):
        answer(Said(said), "GET")


@pytest.mark.parametrize("end", range(len(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n")))
def test_an_answer_that_ends_in_its_head_is_a_connection_that_broke(end: int):
    with pytest.raises(ConnectionResetError):
        answer(Said(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"[:end]), "GET")


@given(
    st.lists(st.binary(min_size=1, max_size=50), max_size=6),
    st.sampled_from(["", ";name=value", " ; quoted"]),
    st.sampled_from(["", "Trailer: x\r\n"]),
    st.integers(1, 64),
    st.integers(1, 64),
)
def test_chunks_make_one_body(pieces: list[bytes], extension: str, trailers: str, room: int, most: int):
    source = Said(chunked(pieces, extension, trailers) + b"NEXT", most)
    body_of = Chunks(source)
    assert body(body_of, room) == b"".join(pieces)
    assert body_of.receive(memoryview(bytearray(1))) == 0, "its end stays its end"
    assert source.rest == b"NEXT"


@given(st.data())
def test_chunks_that_end_early_are_a_connection_that_broke(data: st.DataObject):
    said = chunked([b"abcdef", b"xyz"], ";e=1", "T: x\r\n")
    end = data.draw(st.integers(0, len(said) - 1))
    with pytest.raises(ConnectionResetError):
        body(Chunks(Said(said[:end])), 4)


@pytest.mark.parametrize("said", [b"\r\n", b"-1\r\nx", b"+5\r\nhello\r\n", b"0x5\r\nhello\r\n", b"1" * 16 + b"\r\n"])
def test_a_chunk_without_a_size_is_garbled(said: bytes):
    with pytest.raises(Garbled):
        body(Chunks(Said(said)), 4)


def test_a_chunk_longer_than_its_size_is_garbled():
    with pytest.raises(Garbled):
        body(Chunks(Said(b"3\r\nabcdef\r\n0\r\n\r\n")), 64)


@given(TOKEN, st.dictionaries(TOKEN, VALUE, max_size=5))
@example("GET", {"A": "a\tb"})
def test_a_request_says_what_it_was_made_of(method: str, headers: dict[str, str]):
    first, *lines = request(method, "/a?b=%20", headers).decode("latin-1").split("\r\n")
    assert first == f"{method} /a?b=%20 HTTP/1.1"
    assert lines == [*(f"{name}: {value}" for name, value in headers.items()), "", ""]


@pytest.mark.parametrize("target", ["", "/a b", "/a\r\nHost: b", "/ä", "/a\x7f", "/a\0"])
def test_a_target_cannot_say_more(target: str):
    with pytest.raises(ValueError, match="does not allow"):
        request("GET", target, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("A", "b\r\nC: d"),
        ("A", "b\nC: d"),
        ("A", "b\rC"),
        ("A", "\0"),
        ("A b", "c"),
        ("A:", "b"),
        ("", "b"),
        ("A", "€"),
    ],
)
def test_a_header_cannot_say_more(name: str, value: str):
    with pytest.raises(ValueError, match=r"does not allow|codec can't encode"):
        request("GET", "/", {name: value})
