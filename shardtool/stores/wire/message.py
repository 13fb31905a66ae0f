"""What HTTP/1.1 says, in bytes: the head of a request, the head of an answer, and bodies that come in chunks.

``http.client`` reads every head as if it were a mail. With ranges of 8 MiB that was a sixteenth of all that a reader's
processor did.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

MOST_OF_A_LINE = 64 << 10
MOST_LINES = 100
"""Headers that an answer may have, trailers, and answers that only say that one will come."""

_SPACES = " \t\r\n"
_ENDS = ("content-length", "transfer-encoding")
_TARGET = re.compile(r"[!-~]+")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[^\0\r\n]*")
_STATUS = re.compile(rb"HTTP/1\.(\d) ([1-9]\d\d)(?: .*)?\r?\n", re.DOTALL)
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?\r?\n", re.DOTALL)


class Garbled(Exception):
    """What the server says is not HTTP/1.1."""


class Source(Protocol):
    """Where an answer comes from."""

    def line(self, most: int) -> bytes:
        """Up to the end of a line, or ``most`` bytes, or to the end of the connection."""

    def receive(self, view: memoryview) -> int:
        """The next bytes into ``view``, or 0 at the end of the connection."""


@dataclass(frozen=True, slots=True)
class Head:
    """``headers`` by names in small letters. ``length``: bytes of the body, None where something else ends it.

    ``closes``: whether the server closes the connection afterwards.
    """

    status: int
    headers: dict[str, str]
    length: int | None
    chunked: bool
    closes: bool


def request(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """The head of a request. Raises ``ValueError`` for characters that would make it another one."""
    if not _NAME.fullmatch(method) or not _TARGET.fullmatch(target):
        raise ValueError("the method or the target has characters that HTTP does not allow")
    for name, value in headers.items():
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"the header {name!r} has characters that HTTP does not allow")
    lines = (f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {target} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1")


def answer(source: Source, method: str) -> Head:
    """The head of the answer to a request. ``ConnectionResetError`` where it ends before, ``Garbled`` if it is none."""
    for _ in range(MOST_LINES):
        line = source.line(MOST_OF_A_LINE)
        if not line:
            raise ConnectionResetError("it ended without an answer")
        found = _STATUS.fullmatch(_whole(line))
        if not found:
            raise Garbled(f"its answer does not begin as one of HTTP/1.1: {line[:40]!r}")
        status, headers = int(found[2]), _headers(source)
        if status >= 200 or status == 101:
            return _head(method, status, headers, old=found[1] == b"0")
    raise Garbled("it says again and again that it goes on, and never answers")


def whole_number(text: str) -> int | None:
    """The number that a header says, or None if that is none: other digits than ours, or too many."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _head(method: str, status: int, headers: dict[str, str], *, old: bool) -> Head:
    chunked = headers.get("transfer-encoding", "").lower() == "chunked"
    length = whole_number(headers.get("content-length", ""))
    if method == "HEAD" or status in (101, 204, 304):
        chunked, length = False, 0
    if chunked:
        length = None
    kept = headers.get("connection", "").lower()
    closes = "keep-alive" not in kept if old else "close" in kept
    return Head(status, headers, length, chunked, closes or status == 101 or (length is None and not chunked))


def _headers(source: Source) -> dict[str, str]:
    """Header lines up to the empty one. What is said twice counts as it was said last, but where a body ends."""
    found: dict[str, str] = {}
    name = ""
    for _ in range(MOST_LINES):
        line = _whole(source.line(MOST_OF_A_LINE))
        if line in (b"\r\n", b"\n"):
            return found
        text = line.decode("latin-1")
        if text[0] in " \t" and name:
            found[name] += " " + text.strip(_SPACES)
            continue
        name, colon, value = text.partition(":")
        name, value = name.strip(_SPACES).lower(), value.strip(_SPACES)
        if not colon or not name:
            raise Garbled(f"its answer has a line that is no header: {line[:40]!r}")
        if name in _ENDS and found.get(name, value) != value:
            raise Garbled(f"its answer says two things of where it ends: {name}")
        found[name] = value
    raise Garbled(f"its answer has {MOST_LINES} headers or more")


def _whole(line: bytes) -> bytes:
    if not line.endswith(b"\n"):
        if len(line) >= MOST_OF_A_LINE:
            raise Garbled(f"its answer has a line of more than {MOST_OF_A_LINE} bytes")
        raise ConnectionResetError("it ended in the middle of a line")
    return line


class Chunks:
    """A body that comes in chunks, each with its size before it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0
        self._ended = False

    def receive(self, view: memoryview) -> int:
        """The next bytes into ``view``, or 0 at the end of the body."""
        if not self._left and not self._ended:
            self._begin()
        if self._ended or not view:
            return 0
        count = self._source.receive(view[: self._left])
        if not count:
            raise ConnectionResetError("it ended in the middle of a chunk")
        self._left -= count
        if not self._left and _whole(self._source.line(MOST_OF_A_LINE)).strip():
            raise Garbled("a chunk of its answer is longer than it says")
        return count

    def _begin(self) -> None:
        line = _whole(self._source.line(MOST_OF_A_LINE))
        found = _CHUNK.fullmatch(line)
        if not found:
            raise Garbled(f"a chunk of its answer has no size: {line[:40]!r}")
        self._left = int(found[1], 16)
        if not self._left:
            _headers(self._source)  # trailers, of which nothing is wanted
            self._ended = True
