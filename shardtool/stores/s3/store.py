"""Objects of Amazon S3, or of a server that speaks its protocol.

::

    readinto ── ranged GETs over our own wire, straight into the view      stores.wire
    put      ── up to 8 MiB, exclusive up to 512: one PUT from the caller's memory
    create   ── up to 8 MiB:  gathered, one PUT
             ── larger:       parts of 5 MiB, several at a time, straight from the caller's memory
    exclusive ─ the PUT, or the end of the upload, with If-None-Match
    list, stat, delete, the beginning and the end of an upload ── boto3

Endpoint, region and credentials are boto3's business (``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, ...). Not every server is
Amazon's, so elsewhere nothing rests on ``If-Match`` or on conditions of a multipart upload; checksums are sent to those
that know them: servers exist that send the checksum of the whole object with a part of it, or that ignore conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from time import monotonic, sleep
from typing import Any, TypeVar

from shardtool.errors import (
    AccessDenied,
    AlreadyExists,
    FormatError,
    NotFound,
    ShardtoolError,
    Unavailable,
    UsageError,
)
from shardtool.stores.address import shown
from shardtool.stores.base import (
    Buffer,
    CheckedWriter,
    Object,
    Replaced,
    Store,
    Unfinished,
    check_key,
    is_key,
    octets,
    target,
)
from shardtool.stores.s3.checksum import Checksum, best, kept
from shardtool.stores.s3.client import NOTHING, Access, Client
from shardtool.stores.s3.errors import Unsupported, redirected, refused, translated
from shardtool.stores.s3.write import (
    SMALL,
    PartsWriter,
    SmallWriter,
    kept_of,
    payload_of,
    unit,
)
from shardtool.stores.wire.http import Answer
from shardtool.stores.wire.pages import Pages
from shardtool.stores.wire.pins import Pins
from shardtool.stores.wire.ranged import Remote, fill
from shardtool.stores.wire.retry import Again
from shardtool.stores.wire.senders import Senders

__all__ = ["Access", "S3Store"]

_EXCLUSIVE = 512 << 20  # only a single request can be made conditional everywhere
_COMPARED = 1 << 20  # bytes read at once to compare an object with what was to be written
_SETTLED = 1.0  # seconds after which writers that met on a server without conditions look who was the last

T = TypeVar("T")


class S3Store(Store):
    """The objects below ``s3://bucket/prefix``.

    A request that fails in a way that may pass is tried ``attempts`` times, after waits that double from ``backoff``
    seconds and are random, so that many readers do not come back at once. An object that was listed or looked at is
    read in that version, or it is a ``StoreError``.
    """

    def __init__(self, uri: str, *, attempts: int = 5, backoff: float = 0.5, access: Access | None = None) -> None:
        bucket, _, prefix = uri.partition("://")[2].partition("/")
        prefix = prefix.strip("/")
        if not uri.startswith("s3://") or not bucket or "@" in bucket:
            raise UsageError(f"{shown(uri)!r} names no bucket: write s3://bucket/folder, without user and password")
        if "?" in uri:
            raise UsageError(
                f"{shown(uri)!r} has a query, which addresses of S3 do not: see AWS_PROFILE, AWS_ENDPOINT_URL"
            )
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._pins = Pins()
        self.senders = Senders()
        self._bucket = bucket
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        attempts = max(1, attempts)
        self._again = Again(attempts=attempts, backoff=backoff)
        self._client = Client(self.uri, bucket, attempts=min(3, attempts), access=access or Access())
        self._checksum: Checksum | None = best()
        self._proven = self.amazon  # that conditions are heeded

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The objects whose key starts with ``prefix``, asked for in pages; markers of empty folders are hidden."""
        since = self._pins.since()
        for page in self._pages(self.locate(prefix), "list_objects_v2", Prefix=self._prefix + prefix):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._prefix)
                if is_key(key):
                    self._pins.keep(key, item.get("ETag", "").strip('"'), since)
                    yield Object(key, item["Size"], item.get("ETag", ""))

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such object."""
        since = self._pins.since()
        found = self.head(key)
        self._pins.keep(key, found.get("ETag", "").strip('"'), since)
        return Object(key, found["ContentLength"], found.get("ETag", ""))

    def reading(self, threads: int) -> int:
        """What TLS takes."""
        return self._client.wire.reading(self._client.api.meta.endpoint_url, threads)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view``; what a broken connection did not bring is asked for again, the rest is not."""
        memory = target(start, view)
        asking = _Asking(self, check_key(key), "GetObject")
        remote = Remote(
            where=asking.where,
            request=lambda first, last: asking.request(Range=f"bytes={first}-{last}"),
            refused=asking.refused,
            version=_tag,
            renewed=asking.renewed,
            size=lambda: int(self.head(key)["ContentLength"]),
        )
        fill(self._client.wire, remote, start, memory, again=self._again, version=self._pins.of(key))

    def get(self, key: str, *, limit: int) -> bytes:
        """A small object whole, in one request: one version of it, whichever it is."""
        asking = _Asking(self, check_key(key), "GetObject")

        def ask(_: int) -> bytes:
            with self._client.wire.open(asking.request(), where=asking.where) as reply:
                if reply.status != 200:
                    raise asking.refused(Answer(reply.status, reply.headers, reply.read(1 << 16), reply.url))
                if reply.length is not None and reply.length > limit:
                    raise FormatError(
                        f"{asking.where} is {reply.length} bytes, more than the {limit} that such a file may have"
                    )
                return reply.read(limit)

        return self._again.run(ask)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> CheckedWriter:
        """Begin an object: one over 8 MiB is uploaded in parts. Any size can be exclusive.

        On servers that ignore conditions, exclusive writers that meet look a moment later whose object is there;
        ``conditional`` is False once that is known, or once an upload in parts to another server than Amazon's was
        exclusive, since whether these heed its condition cannot be known.
        """
        check_key(key)
        return (SmallWriter if size <= SMALL else PartsWriter)(self, key, size, exclusive=exclusive)

    def put(self, key: str, data: Buffer, *, exclusive: bool = False) -> None:
        """A small object in one request, and an exclusive one up to 512 MiB, straight from the caller's memory."""
        memory = octets(data)
        if len(memory) > (_EXCLUSIVE if exclusive else SMALL):
            super().put(key, memory, exclusive=exclusive)
            return
        with self.changing(check_key(key)):
            self.put_whole(key, memory, exclusive=exclusive)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is not an error."""
        with self.changing(key):
            self.tried(key, "delete_object")

    def unit(self, size: int) -> int:
        """0 for what goes in one request, otherwise the bytes of a part."""
        return unit(size)

    def held(self, size: int) -> int:
        """What ``create`` sends in one request is gathered in memory first."""
        return size if size <= SMALL else 0

    def checksums(self, key: str) -> Mapping[str, str]:
        """What the server keeps of an object: the checksum that it was sent with, if it keeps any, and its ETag."""
        return kept(self.tried(key, "head_object", ChecksumMode="ENABLED"))

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """The uploads that were neither completed nor aborted."""
        try:
            for page in self._pages(self.locate(prefix), "list_multipart_uploads", Prefix=self._prefix + prefix):
                for item in page.get("Uploads", ()):
                    key = item["Key"].removeprefix(self._prefix)
                    if item["Key"].startswith(self._prefix) and is_key(key):
                        size = self._uploaded(key, item["UploadId"])
                        yield Unfinished(key, item["UploadId"], item["Initiated"].timestamp(), size)
        except NotFound as error:  # as rclone says that there are none
            said = getattr(error.__cause__, "response", {})
            if said.get("Error", {}).get("Code") != "NoSuchUpload":
                raise

    def discard(self, left: Unfinished) -> None:
        """Abort an upload that ``unfinished`` found."""
        self.end_upload(left.key, left.name)

    def close(self) -> None:
        """Close the connections."""
        self.senders.close()
        self._client.close()

    # what the writers need

    @property
    def amazon(self) -> bool:
        """Whether the server is Amazon's own."""
        return self._client.amazon

    @property
    def tls(self) -> bool:
        """Whether nobody on the way can read or change what is sent."""
        return str(self._client.api.meta.endpoint_url).startswith("https://")

    def changing(self, key: str) -> AbstractContextManager[None]:
        """While the block runs, and after it, no version of the object is known."""
        return self._pins.changing(key)

    def head(self, key: str) -> dict[str, Any]:
        """What boto3 says of an object."""
        found = self.tried(key, "head_object")
        if "ContentLength" not in found:  # botocore takes what there is of a head that was cut
            raise Unavailable(f"the server of {self.locate(key)} does not say how large it is: try again")
        return found

    def tried(self, key: str, operation: str, **request: Any) -> dict[str, Any]:
        """A request of boto3 that may be repeated, until it succeeds or the tries are used up."""
        where = self.locate(check_key(key))
        given = {"Bucket": self._bucket, "Key": self._prefix + key, **request}
        found: dict[str, Any] = self._again.run(
            lambda _: self._asked(where, lambda api: getattr(api, operation)(**given))
        )
        return found

    def send(self, key: str, operation: str, body: memoryview, payload: str, **given: str | int) -> Answer:
        """A PUT of the wire that may be repeated, until it succeeds or the tries are used up."""
        asking = _Asking(self, key, operation)
        return self._again.run(lambda _: asking.put(body, payload, **given))

    def begin_upload(self, key: str, metadata: Mapping[str, str]) -> tuple[str, Checksum | None, bool]:
        """The id of a new multipart upload, and the checksum that the server will verify of each part.

        The last item tells whether it will verify and keep that of the whole, too.
        """

        def begin(checksum: Checksum | None) -> dict[str, Any]:
            wanted = {"ChecksumAlgorithm": checksum.algorithm, "ChecksumType": "FULL_OBJECT"} if checksum else {}
            return self.tried(key, "create_multipart_upload", Metadata=metadata, **wanted)

        begun = self._with_checksum(begin)
        if self._checksum is None or begun.get("ChecksumAlgorithm") != self._checksum.algorithm:
            return begun["UploadId"], None, False
        return begun["UploadId"], self._checksum, begun.get("ChecksumType") == "FULL_OBJECT"

    def end_upload(self, key: str, upload: str) -> None:
        """Abort a multipart upload; one that is not there is not an error."""
        try:
            self.tried(key, "abort_multipart_upload", UploadId=upload)
        except NotFound:
            return

    def put_whole(self, key: str, data: memoryview, *, exclusive: bool) -> dict[str, str]:
        """One PUT; gives what the server keeps of the object."""
        payload = payload_of(data, tls=self.tls, verified=False)

        def put(checksum: Checksum | None) -> Answer:
            given = checksum.given(checksum.of(data)) if checksum else {}
            if exclusive:
                return self._put_if_absent(key, data, payload, given)
            return self.send(key, "PutObject", data, payload, **given)

        return kept_of(self._with_checksum(put))

    def _put_if_absent(self, key: str, data: memoryview, payload: str, given: dict[str, str]) -> Answer:
        """One PUT that replaces nothing.

        When the answer to a PUT is lost, its repetition finds the object that it made itself. So after a repetition an
        object with the same content counts as ours.
        """
        began = monotonic()
        self._expect_absent(key)
        asking = _Asking(self, key, "PutObject")

        def put(failures: int) -> Answer:
            try:
                return asking.put(data, payload, IfNoneMatch="*", **given)
            except AlreadyExists:
                self._proven = True
                if failures and self._holds(key, data):
                    return Answer(200, {})
                raise

        answer = self._again.run(put)
        if not self._proven:
            self._prove(lambda: asking.put(data, payload, IfNoneMatch="*", **given))
        if not self.conditional:
            self._expect_last(key, began, lambda: self._holds(key, data))
        return answer

    def complete_if_absent(self, key: str, own: Callable[[], bool], **request: Any) -> dict[str, Any]:
        """End an upload that replaces nothing; ``own``: whether the object that is there is that of the upload.

        An upload cannot be ended twice to see whether its condition is heeded. So on servers other than Amazon's the
        last of those that meet wins, and the others are told.
        """
        began = monotonic()
        self._expect_absent(key)
        try:
            answer = self._with_condition(
                lambda **more: self.tried(key, "complete_multipart_upload", **request, **more)
            )
        except (NotFound, AlreadyExists):  # when the answer is lost, the repetition finds no upload or its own object
            if not own():
                self._expect_absent(key)
                raise
            answer = {}
        if not self.amazon:
            self.conditional = False
            self._expect_last(key, began, own)
        return answer

    def _with_condition(self, call: Callable[..., T]) -> T:
        """Do without the condition on a server that does not know it."""
        try:
            return call(IfNoneMatch="*")
        except Unsupported:
            if self.amazon:
                raise
            return call()

    def _expect_absent(self, key: str) -> None:
        if self.exists(key):
            raise AlreadyExists(f"{self.locate(key)} exists already: delete it or choose another name")

    def _expect_last(self, key: str, began: float, own: Callable[[], bool]) -> None:
        """Where conditions are not heeded: wait until all have written who saw no object, and look whose is there."""
        sleep(max(_SETTLED, 2 * (monotonic() - began)))
        if not own():
            raise AlreadyExists(f"{self.locate(key)} exists already: delete it or choose another name")

    def _prove(self, again: Callable[[], object]) -> None:
        """Find out whether conditions are heeded: what was created a moment ago cannot be created once more."""
        try:
            again()
        except AlreadyExists:
            self._proven = True
        except ShardtoolError:
            return
        else:
            self._proven, self.conditional = True, False

    def _holds(self, key: str, data: memoryview) -> bool:
        """Whether an object has this content; little of it is held at a time."""
        try:
            if len(data) <= _COMPARED:
                return self.get(key, limit=len(data)) == data
            if self.stat(key).size != len(data):
                return False
            room = memoryview(bytearray(_COMPARED))
            for start in range(0, len(data), _COMPARED):
                piece = room[: len(data) - start]
                self.readinto(key, start, piece)
                if piece != data[start : start + len(piece)]:
                    return False
        except (NotFound, FormatError, Replaced):
            return False
        return True

    def _with_checksum(self, call: Callable[[Checksum | None], T]) -> T:
        """Do without checksums on a server that does not know them."""
        try:
            return call(self._checksum)
        except Unsupported:
            if self.amazon or self._checksum is None:
                raise
            found = call(None)
        self._checksum = None
        return found

    def _uploaded(self, key: str, upload: str) -> int:
        """Bytes of an upload so far."""
        pages = self._pages(self.locate(key), "list_parts", Key=self._prefix + key, UploadId=upload)
        try:
            return sum(part["Size"] for page in pages for part in page.get("Parts", ()))
        except NotFound:
            return 0

    def _pages(self, where: str, operation: str, **request: Any) -> Iterator[dict[str, Any]]:
        pages = self._client.api.get_paginator(operation)
        found, taken = iter(pages.paginate(Bucket=self._bucket, **request)), Pages(where)
        while page := self._asked(where, lambda _: next(found, None)):
            # botocore takes an empty answer for an empty list. Of uploads, rclone does not say whether there are more.
            if "IsTruncated" not in page and "Bucket" not in page:
                raise Unavailable(f"the server of {where} does not list what is there: try again")
            taken.took(sum(len(page.get(kind, ())) for kind in ("Contents", "Uploads", "Parts")))
            yield page

    def _asked(self, where: str, call: Callable[[Any], T]) -> T:
        """What boto3 says, with shardtool's errors; once more where it was refused and has new credentials."""
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        renewed = False
        while True:
            seen = None
            try:
                seen = self._client.credentials()
                return call(self._client.api)
            except (ClientError, BotoCoreError, HTTPError, OSError) as error:
                found = translated(error, where)
                if renewed or not isinstance(found, AccessDenied) or not self._client.renew(seen):
                    raise found from error
                renewed = True


class _Asking:
    """One request of the wire and its repetitions."""

    def __init__(self, store: S3Store, key: str, operation: str) -> None:
        self.where = store.locate(key)
        self._store = store
        self._client = store._client
        self._key = store._prefix + key
        self._operation = operation
        self._seen: Any = None
        self._renewed = False

    def request(self, payload: str = NOTHING, **given: str | int) -> Any:
        """The request, signed by the credentials of now."""

        def made(_: Any) -> Any:
            self._seen = self._client.credentials()
            return self._client.request(self._operation, self._key, payload, **given)

        return self._store._asked(self.where, made)

    def put(self, body: memoryview, payload: str, **given: str | int) -> Answer:
        """Send it with its body."""
        answer = self._client.wire.send(self.request(payload, **given), body, where=self.where)
        if answer.status in (200, 201, 204):
            return answer
        raise self.refused(answer)

    def renewed(self) -> bool:
        """Whether there are new credentials, for once."""
        if self._renewed:
            return False
        self._renewed = True
        return self._client.renew(self._seen)

    def refused(self, answer: Answer) -> ShardtoolError:
        """The error that an answer means. It may be tried again where credentials or the region are others now."""
        if redirected(answer):
            self._client.forget()
            with suppress(NotFound, AccessDenied):  # of the object; where the bucket lies botocore knows then
                self._store._asked(self.where, lambda api: api.head_object(Bucket=self._store._bucket, Key=self._key))
            return Unavailable(f"the bucket of {self.where} lies in another region: set AWS_REGION")
        error = refused(answer, self.where)
        if isinstance(error, AccessDenied) and self.renewed():
            return Unavailable(f"{error}; there are new ones")
        return error


def _tag(headers: Mapping[str, str]) -> str:
    return headers.get("etag", "").strip('"')
