"""Ranges of objects over HTTP: asked for until they are whole, and only what is missing.

::

    fill ── request(first, last) ── freshly signed ── 206 ── the body straight into the view
      ├── cut, silent, slow, 429, 5xx, a part only    wait a little, ask for the rest
      ├── 401, 403                                    renewed() once, then what the store says
      └── another version, another range              an error: the object was replaced, the server is wrong
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardtool.errors import FormatError, ShardtoolError, StoreError, Unavailable
from shardtool.stores.base import Replaced
from shardtool.stores.wire.http import Answer, Reply, Request, Wire
from shardtool.stores.wire.retry import PASSING, Again, Busy, retry_after

_PROGRESS = 1 << 20  # a connection that brought so much is not held against the server
_ERROR = 64 << 10
_RANGE = re.compile(r"bytes (\d{1,19})-(-?\d{1,19})/(\d{1,19}|\*)")  # 0--1/0 is what one server says of nothing


def etag(headers: Mapping[str, str]) -> str:
    """The version that most servers tell."""
    return headers.get("etag", "")


@dataclass(frozen=True, slots=True)
class Remote:
    """What a store says of an object, so that its bytes can be fetched.

    ``where``: for messages. ``request(first, last)``: a GET of these bytes, the last one included, signed now. It is
    asked for before every try. ``refused(answer)``: the error that an answer other than 200, 206 and 416 means; it is
    tried again if it is ``retryable`` (``Busy`` brings Retry-After). ``version(headers)``: what changes when the object
    does, or nothing. ``renewed()``: called once after a 401 or 403; whether credentials are new, so that another try is
    worth it. ``size()``: the object's size, asked for only if a server answers a range with 200. ``redirects``: how
    many are followed.
    """

    where: str
    request: Callable[[int, int], Request]
    refused: Callable[[Answer], ShardtoolError]
    version: Callable[[Mapping[str, str]], str] = etag
    renewed: Callable[[], bool] = bool
    size: Callable[[], int] | None = None
    redirects: int = 0


def fill(wire: Wire, remote: Remote, start: int, view: memoryview, *, again: Again = Again(), version: str = "") -> str:  # noqa: B008
    """Fill ``view`` (writable, of single bytes) with an object's bytes from ``start``; gives their version.

    ``version``: the one that they must have, if it is known already. An object that is replaced meanwhile is
    ``Replaced``, one that ends before is a ``FormatError``, a server that stays away is ``Unavailable``.
    """
    job = _Job(wire, remote, start, view, version)
    trying = again.trying()
    renewed = False
    while job.done < len(view):
        before = job.done
        try:
            denied = job.read_on()
        except ShardtoolError as error:
            if job.done - before >= _PROGRESS:
                trying.progressed()
            trying.failed(error)
            continue
        if denied is not None:
            if renewed or not remote.renewed():
                raise remote.refused(denied)
            renewed = True
        elif job.done - before < _PROGRESS and job.done < len(view):
            # A part of what was asked for is an answer, but not one to be content with for ever.
            trying.failed(Unavailable(f"the server of {remote.where} sends less than it is asked for: try again"))
    return job.version


def passing(answer: Answer, where: str) -> Busy | None:
    """The error of an answer after which another try may help, or None for all others: for ``Remote.refused``."""
    if answer.status not in PASSING:
        return None
    return Busy(
        f"{where} could not be served at this moment (the server says {answer.status}): try again later",
        after=retry_after(answer.headers),
    )


class _Job:
    """How far a range has come."""

    def __init__(self, wire: Wire, remote: Remote, start: int, view: memoryview, version: str) -> None:
        self.done = 0
        self.version = version
        self._wire = wire
        self._remote = remote
        self._start = start
        self._view = view
        self._total = "*"  # of the object's bytes, as soon as it is known

    def read_on(self) -> Answer | None:
        """Ask for what is missing and take what comes; gives an answer that says that credentials are not good."""
        remote, where = self._remote, self._remote.where
        first, last = self._start + self.done, self._start + len(self._view) - 1
        request = remote.request(first, last)
        with self._wire.open(request, where=where, redirects=remote.redirects) as reply:
            if reply.status not in (200, 206):
                answer = Answer(reply.status, reply.headers, reply.read(_ERROR), reply.url)
                if reply.status in (401, 403):
                    return answer
                raise self._refused(answer)
            end = self.done + self._expect(reply, first, last)
            while self.done < end:
                count = reply.readinto(self._view[self.done : end])
                if not count:
                    raise Unavailable(f"the connection to the server of {where} ended early: try again")
                self.done += count
        return None

    def _refused(self, answer: Answer) -> ShardtoolError:
        where = self._remote.where
        if answer.status == 416:
            return FormatError(f"{where} ends before the bytes that were asked for")
        if answer.status == 412:
            return Replaced(f"{where} was replaced while it was read: start again")
        return self._remote.refused(answer)

    def _expect(self, reply: Reply, first: int, last: int) -> int:
        """How many bytes of the body to take."""
        where, wanted = self._remote.where, last + 1 - first
        version = self._remote.version(reply.headers)
        if self.version not in ("", version):
            raise Replaced(f"{where} was replaced while it was read: start again")
        if reply.status == 200 and "content-range" not in reply.headers:
            self.version = version
            return self._expect_whole(reply, first, wanted)
        said = _RANGE.fullmatch(reply.headers.get("content-range", ""))
        total = said[3] if said else "*"
        if "*" not in (self._total, total) and total != self._total:
            raise Replaced(f"{where} was replaced while it was read: start again")
        if total != "*" and int(total) <= last:
            raise FormatError(f"{where} ends before the bytes that were asked for")
        if said is None or int(said[1]) != first or not first <= int(said[2]) <= last:
            raise Unavailable(f"the server of {where} sends other bytes than it was asked for: try again")
        count = int(said[2]) + 1 - first
        if reply.length not in (None, count):
            raise Unavailable(f"the server of {where} contradicts itself on how many bytes it sends: try again")
        self.version, self._total = version, total
        return count

    def _expect_whole(self, reply: Reply, first: int, wanted: int) -> int:
        """Some servers answer a range with 200 and its bytes, some with the whole object."""
        where, size = self._remote.where, self._remote.size
        if reply.length is not None and reply.length < wanted and first == 0:
            raise FormatError(f"{where} ends before the bytes that were asked for")
        whole = None if size is None or not first else size()
        if whole is not None and reply.length == whole - first < wanted:
            raise FormatError(f"{where} ends before the bytes that were asked for")
        if first and (reply.length != wanted or whole in (None, wanted)):
            raise StoreError(
                f"the server of {where} ignores which bytes are asked for: copy the files to a folder first"
            )
        return wanted
