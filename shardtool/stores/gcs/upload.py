"""A resumable upload of Google Cloud Storage: chunks one after another, of which the server says how much it has.

::

    send ── PUT of a chunk ── 308: it has so much ── the next one
      └── cut, silent, 5xx ── wait ── "how far are you?" ── PUT of what it lacks
    send of the last bytes ── 200 and the object, which only now can be seen

The address of an upload is the permission to go on with it: it needs no credentials, and none are sent. One that is
never finished is invisible, cannot be listed, and is gone after a week.
"""

from __future__ import annotations

import json
import re
from typing import Any

from shardtool.errors import ShardtoolError, StoreError, Unavailable
from shardtool.stores.gcs.errors import answered
from shardtool.stores.wire.http import Answer, Request, Wire
from shardtool.stores.wire.retry import Again

QUARTER = 256 << 10
"""All chunks but the last are multiples of this."""

_PROGRESS = 1 << 20
_KEPT = re.compile(r"bytes=0-(\d{1,19})")


class Session:
    """An upload of ``size`` bytes at ``url``; ``kept`` is how many the server has."""

    def __init__(self, wire: Wire, url: str, size: int, where: str, again: Again) -> None:
        self.kept = 0
        self.resource: dict[str, Any] | None = None
        self._wire = wire
        self._url = url
        self._size = size
        self._where = where
        self._again = again

    def send(self, data: memoryview, crc: str = "") -> None:
        """Send the next bytes: a multiple of 256 KiB, or the last ones, with the ``crc`` of all.

        When this returns the server has them; after the last ones ``resource`` is what it says of the object.
        """
        first, end = self.kept, self.kept + len(data)
        trying = self._again.trying()
        while not self._has(end):
            before = self.kept
            try:
                if trying.failures:
                    self._put(memoryview(b""), first, end, crc)
                if not self._has(end):
                    self._put(data[self.kept - first :], first, end, crc)
                if not self._has(end):
                    raise Unavailable(f"the server of {self._where} takes fewer bytes than it is sent: try again")
            except ShardtoolError as error:
                if self.kept - before >= _PROGRESS:
                    trying.progressed()
                trying.failed(error)

    def drop(self) -> None:
        """Give up; where that fails the server forgets the upload after a week."""
        try:
            self._wire.send(Request("DELETE", self._url, {"Content-Length": "0"}), where=self._where, within=20.0)
        except ShardtoolError:
            return

    def _has(self, end: int) -> bool:
        return self.resource is not None or self.kept >= end != self._size

    def _put(self, data: memoryview, first: int, end: int, crc: str) -> None:
        """Send bytes, or nothing to ask how far the server is, which is from ``first`` to ``end``."""
        span = f"{self.kept}-{self.kept + len(data) - 1}" if data else "*"
        headers = {"Content-Range": f"bytes {span}/{self._size}"}
        if crc:
            headers["X-Goog-Hash"] = f"crc32c={crc}"
        answer = self._wire.send(Request("PUT", self._url, headers), data, where=self._where)
        match answer.status:
            case 200 | 201:
                self.resource = resource_of(answer, self._where)
                self.kept = self._size
            case 308:
                said = _KEPT.fullmatch(answer.headers.get("range", ""))
                kept = int(said[1]) + 1 if said else 0
                # All bytes may be there though the last answer was lost. Else whole pieces count alone.
                self.kept = kept if kept == self._size else kept // QUARTER * QUARTER
                if not first <= self.kept <= end:
                    raise StoreError(
                        f"the server of {self._where} has lost bytes that it had, or has some that it was never sent:"
                        " start again"
                    )
            case 404 | 410 | 499:
                raise StoreError(f"the upload of {self._where} was ended by the server or somebody else: start again")
            case _:
                error = answered(answer, self._where)
                if answer.status == 400 and error.retryable:  # what was damaged is not all here any more
                    raise StoreError(f"the bytes of {self._where} were damaged on the way: start again")
                raise error


def resource_of(answer: Answer, where: str) -> dict[str, Any]:
    """What the server says of an object: a JSON object with ``name``, ``size``, ``generation``, ``crc32c``."""
    try:
        found = json.loads(answer.body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StoreError(f"the server of {where} does not speak as Google does: check the endpoint")
    return found


def extended(crc: int, data: memoryview) -> int:
    """The CRC32C of what ``crc`` is of, and ``data`` after it. A little at a time is copied."""
    import google_crc32c

    for start in range(0, len(data), QUARTER):
        crc = google_crc32c.extend(crc, bytes(data[start : start + QUARTER]))
    return crc
