"""How objects get to S3: a small one in one request, a large one in parts, several at a time from the caller's memory.

Each request bears a checksum that the server verifies where it can (``s3.checksum``). A server that keeps none gets
hashed bytes where the way is not TLS, and the rest is TLS's business.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

from shardtool.errors import NotFound, ShardtoolError
from shardtool.stores.base import CheckedWriter
from shardtool.stores.s3.checksum import Checksum, kept
from shardtool.stores.s3.client import UNSIGNED
from shardtool.stores.wire.http import Answer
from shardtool.stores.wire.senders import Senders

MIB = 1 << 20
SMALL = 8 * MIB
PART = 5 * MIB  # the least that servers take: smaller parts, smaller memory
PARTS = 9000  # the protocol's limit is 10,000
_WRITER = "shardtool-writer"  # metadata by which a writer knows its own object again


def unit(size: int) -> int:
    """Bytes of a part of an object of ``size`` bytes: 0 for what goes in one request, otherwise whole MiB.

    All parts but the last have one size, which some servers demand.
    """
    return 0 if size <= SMALL else max(PART, -(-size // (PARTS * MIB)) * MIB)


class Bucket(Protocol):
    """What writers need of the store."""

    @property
    def tls(self) -> bool:
        """Whether nobody on the way can read or change what is sent."""

    @property
    def amazon(self) -> bool:
        """Whether the server is Amazon's own."""

    @property
    def senders(self) -> Senders:
        """Threads that send parts."""

    def locate(self, key: str) -> str:
        """How people are told where an object is."""

    def changing(self, key: str) -> AbstractContextManager[None]:
        """While the block runs no version of the object is known."""

    def put_whole(self, key: str, data: memoryview, *, exclusive: bool) -> dict[str, str]:
        """One PUT; gives what the server keeps of the object."""

    def begin_upload(self, key: str, metadata: Mapping[str, str]) -> tuple[str, Checksum | None, bool]:
        """The id of an upload, the checksum of its parts, and whether that of the whole is kept, too."""

    def end_upload(self, key: str, upload: str) -> None:
        """Abort it."""

    def send(self, key: str, operation: str, body: memoryview, payload: str, **given: str | int) -> Answer:
        """A PUT that may be repeated."""

    def tried(self, key: str, operation: str, **request: Any) -> dict[str, Any]:
        """A request of boto3 that may be repeated."""

    def complete_if_absent(self, key: str, own: Callable[[], bool], **request: Any) -> dict[str, Any]:
        """End an upload that replaces nothing; ``own``: whether the object that is there is that of the upload."""


class SmallWriter(CheckedWriter):
    """One PUT; the bytes are gathered in memory."""

    def __init__(self, store: Bucket, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store.locate(key), size)
        self._store = store
        self._key = key
        self._exclusive = exclusive
        self._data = bytearray(size)
        self._kept: dict[str, str] = {}

    def _write(self, data: memoryview) -> None:
        self._data[self._written : self._written + len(data)] = data

    def _commit(self) -> None:
        with self._store.changing(self._key):
            self._kept = self._store.put_whole(self._key, memoryview(self._data), exclusive=self._exclusive)
        self._data = bytearray()

    def _abort(self) -> None:
        self._data = bytearray()

    def checksums(self) -> Mapping[str, str]:
        """What the server keeps of the object."""
        return self._kept


@dataclass(frozen=True, slots=True)
class _Part:
    """A part that is there: what ``CompleteMultipartUpload`` wants of it, its checksum, its size."""

    fields: dict[str, Any]
    value: int
    size: int


class PartsWriter(CheckedWriter):
    """A multipart upload. An upload whose abort fails stays behind, invisible; ``unfinished`` finds it."""

    def __init__(self, store: Bucket, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store.locate(key), size, unit=unit(size))
        self._store = store
        self._key = key
        self._exclusive = exclusive
        self._mark = secrets.token_hex(16)
        self._parts: list[_Part] = []
        self._kept: dict[str, str] = {}
        self._id, self._checksum, self._full = store.begin_upload(key, {_WRITER: self._mark})

    def _write(self, data: memoryview) -> None:
        first = len(self._parts) + 1
        pieces = [data[start : start + self.unit] for start in range(0, len(data), self.unit)]
        if self._written + len(data) < self._size and len(pieces[-1]) < self.unit:
            last = pieces.pop()  # too small to stand alone
            pieces[-1] = data[len(data) - len(last) - self.unit :]
        self._parts += self._store.senders.each(
            [partial(self._send, first + at, piece) for at, piece in enumerate(pieces)]
        )

    def _send(self, number: int, piece: memoryview) -> _Part:
        """Send a part, as often as it takes."""
        checksum = self._checksum
        value = checksum.of(piece) if checksum else 0
        given = checksum.given(value) if checksum else {}
        payload = payload_of(piece, tls=self._store.tls, verified=checksum is not None and not self._store.amazon)
        answer = self._store.send(
            self._key, "UploadPart", piece, payload, UploadId=self._id, PartNumber=number, **given
        )
        fields = {"PartNumber": number, "ETag": answer.headers.get("etag", "")}
        if checksum:
            fields[checksum.field] = checksum.encoded(value)
        return _Part(fields, value, len(piece))

    @cached_property
    def _whole(self) -> dict[str, Any]:
        """The checksum of the object, from those of its parts, for the server to compare with."""
        if not (checksum := self._checksum) or not self._full:
            return {}
        value = 0
        for part in self._parts:
            value = checksum.joined(value, part.value, part.size)
        return {checksum.field: checksum.encoded(value), "ChecksumType": "FULL_OBJECT"}

    def _commit(self) -> None:
        with self._store.changing(self._key):
            answer = self._completed(
                UploadId=self._id, MultipartUpload={"Parts": [part.fields for part in self._parts]}, **self._whole
            )
        self._kept = kept({**self._whole, **self._seen(answer)})

    def _completed(self, **request: Any) -> Mapping[str, Any]:
        if self._exclusive:
            return self._store.complete_if_absent(self._key, self._own, **request)
        try:
            return self._store.tried(self._key, "complete_multipart_upload", **request)
        except NotFound:  # when the answer is lost, the repetition finds no upload any more
            if not self._own():
                raise
            return {}

    def _own(self) -> bool:
        """Whether the object that is there is that of this upload: then it bears our mark."""
        try:
            found = self._store.tried(self._key, "head_object")
        except NotFound:
            return False
        marks = {name.lower(): value for name, value in found["Metadata"].items()}  # rclone writes names as it likes
        return marks.get(_WRITER) == self._mark

    def _seen(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the server says of the object now: when an upload is completed not all say it, or the truth."""
        try:
            found = self._store.tried(self._key, "head_object", ChecksumMode="ENABLED")
        except ShardtoolError:
            return answer
        return found if found["ContentLength"] == self._size else {}

    def _abort(self) -> None:
        try:
            self._store.end_upload(self._key, self._id)
        except ShardtoolError:
            return

    def checksums(self) -> Mapping[str, str]:
        """What the server keeps of the object."""
        return self._kept


def payload_of(data: memoryview, *, tls: bool, verified: bool) -> str:
    """What is signed of a body: its hash, unless TLS or a checksum that the server verifies protects it."""
    return UNSIGNED if tls or verified else hashlib.sha256(data).hexdigest()


def kept_of(answer: Answer) -> dict[str, str]:
    """What the answer to a PUT says that the server keeps of the object."""
    found = {"ETag": answer.headers.get("etag", "")}
    for name in ("crc32", "crc64nvme"):
        found[f"Checksum{name.upper()}"] = answer.headers.get(f"x-amz-checksum-{name}", "")
    return kept(found)
