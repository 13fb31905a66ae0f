"""Objects of Amazon S3, or of a server that speaks its protocol, by way of boto3.

::

    readinto ── GET of a range ── the body, piece by piece, into the view
                  └── cut, throttled, silent: wait a little, then GET what is missing
    create   ── up to 8 MiB:  gathered, one PUT           exclusive: with If-None-Match
             ── larger:       one part for each slice, straight from the caller's memory

Endpoint, region and credentials are boto3's business (``AWS_PROFILE``, ``AWS_ENDPOINT_URL``, ...). Not every server is
Amazon's, so nothing here rests on checksums, on ``If-Match`` or on conditions of a multipart upload: servers exist that
send the checksum of the whole object with a part of it, or that ignore conditions.
"""

from __future__ import annotations

import io
import random
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from shardtool.errors import AlreadyExists, NotFound, ShardtoolError, StoreError, Unavailable, UsageError
from shardtool.stores.base import Buffer, CheckedWriter, Object, Store, check_key, is_key, octets, target
from shardtool.stores.s3_errors import answer, translated

_MIB = 1 << 20
_SMALL = 8 * _MIB
_EXCLUSIVE = 512 * _MIB  # only a single request can be made conditional everywhere
_LEAST_PART = 5 * _MIB
_LARGEST_PART = 4 << 30  # the protocol's limit is 5 GiB
_PARTS = 9000  # the protocol's limit is 10,000
_PIECE = _MIB // 4  # read from the connection at once: stays in the processor's cache
_HASHED = 64 << 10
_WRITER = "shardtool-writer"  # metadata by which a writer knows its own object again

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is reached, as far as boto3's settings shall not decide. Empty: they do.

    ``unsigned``: ask as nobody, for buckets that are open to all. ``addressing``: ``path`` or ``virtual``, where the
    bucket's name goes.
    """

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None
    endpoint: str | None = None
    unsigned: bool = False
    addressing: str | None = None

    def __post_init__(self) -> None:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise UsageError("the id of an access key and its secret belong together: give both or none")


class S3Store(Store):
    """The objects below ``s3://bucket/prefix``.

    A request that fails in a way that may pass is tried ``attempts`` times, after waits that double from ``backoff``
    seconds and are random, so that many readers do not come back at once. Each try may be up to three of botocore's.
    """

    def __init__(self, uri: str, *, attempts: int = 5, backoff: float = 0.5, access: Access | None = None) -> None:
        bucket, _, prefix = uri.partition("://")[2].partition("/")
        prefix = prefix.strip("/")
        if not uri.startswith("s3://") or not bucket:
            raise UsageError(f"{uri!r} names no bucket: write s3://bucket/folder")
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._bucket = bucket
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._attempts = max(1, attempts)
        self._backoff = backoff
        self._client = _client(self.uri, attempts=min(3, self._attempts), access=access or Access())

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The objects whose key starts with ``prefix``, asked for in pages; markers of empty folders are hidden."""
        pages = self._client.get_paginator("list_objects_v2")
        start = self._prefix + prefix
        found = iter(pages.paginate(Bucket=self._bucket, Prefix=start))
        while page := self._asked(self.locate(prefix), lambda: next(found, None)):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._prefix)
                if is_key(key):
                    yield Object(key, item["Size"], item.get("ETag", ""))

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such object."""
        head = self._head(key)
        return Object(key, head["ContentLength"], head.get("ETag", ""))

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view``; what a broken connection did not bring is asked for again, the rest is not."""
        reading = _Reading(check_key(key), start, target(start, view))
        failures = 0
        while reading.done < len(reading.memory):
            before = reading.done
            try:
                self._read_on(reading)
            except Unavailable:
                # A connection that brought something is not held against the server: another one will bring the rest.
                failures = 1 if reading.done - before >= _MIB else failures + 1
                if failures >= self._attempts:
                    raise
                self._wait(failures)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> CheckedWriter:
        """Begin an object.

        One over 8 MiB is uploaded in parts, or gathered in memory where it is ``exclusive``: up to 512 MiB.

        Servers that ignore conditions exist. On those, two exclusive writers that meet may both win.
        """
        check_key(key)
        if size <= (_EXCLUSIVE if exclusive else _SMALL):
            return _SmallWriter(self, key, size, exclusive=exclusive)
        if exclusive:
            raise UsageError(
                f"{self.locate(key)} is {size} bytes, and only objects up to {_EXCLUSIVE} can be created "
                f"exclusively in S3"
            )
        return _PartsWriter(self, key, size)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is not an error."""
        self._tried(key, "delete_object")

    def unit(self, size: int) -> int:
        """0 for what goes in one request, otherwise the least part with which the parts suffice, in whole MiB."""
        return 0 if size <= _SMALL else max(_LEAST_PART, -(-size // (_PARTS * _MIB)) * _MIB)

    def held(self, size: int) -> int:
        """What goes in one request is gathered in memory first."""
        return size if size <= _SMALL else 0

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _read_on(self, reading: _Reading) -> None:
        """Ask for what is missing and take what comes."""
        where = self.locate(reading.key)
        first, last = reading.start + reading.done, reading.start + len(reading.memory) - 1
        response = self._ask(reading.key, "get_object", Range=f"bytes={first}-{last}")
        body = response["Body"]
        try:
            expected = reading.done + self._expect_range(reading, response)
            while reading.done < expected:
                piece = reading.memory[reading.done : min(reading.done + _PIECE, expected)]
                count = self._asked(where, partial(body.readinto, piece))
                if not count:
                    raise Unavailable(f"the connection to the server of {where} ended early: try again")
                reading.done += count
        finally:
            body.close()

    def _expect_range(self, reading: _Reading, response: dict[str, Any]) -> int:
        """How many bytes to take. Some servers answer a range with 200, and some of those send the whole object."""
        where = self.locate(reading.key)
        missing = len(reading.memory) - reading.done
        length: int = response.get("ContentLength", missing)
        tag = response.get("ETag", "")
        if not length:
            raise Unavailable(f"the server of {where} sent an empty answer: try again")
        if reading.tag not in ("", tag):
            raise StoreError(f"{where} was replaced while it was read: start again")
        reading.tag = tag
        whole = response["ResponseMetadata"]["HTTPStatusCode"] == 200 and "ContentRange" not in response
        if whole and reading.start + reading.done and length == self.stat(reading.key).size:
            raise StoreError(
                f"the server of {where} ignores which bytes are asked for: copy the files to a folder first"
            )
        return min(length, missing)

    def _head(self, key: str) -> dict[str, Any]:
        return self._tried(key, "head_object")

    def _tried(self, key: str, operation: str, **request: Any) -> dict[str, Any]:
        """A request that may be repeated, until it succeeds or the tries are used up."""
        for failures in range(1, self._attempts):
            try:
                return self._ask(key, operation, **request)
            except Unavailable:
                self._wait(failures)
        return self._ask(key, operation, **request)

    def _ask(self, key: str, operation: str, **request: Any) -> dict[str, Any]:
        """One request, with shardtool's errors."""
        call = getattr(self._client, operation)
        where = self.locate(check_key(key))
        response: dict[str, Any] = self._asked(
            where, lambda: call(Bucket=self._bucket, Key=self._prefix + key, **request)
        )
        return response

    def _asked(self, where: str, call: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        try:
            return call()
        except (ClientError, BotoCoreError, HTTPError, OSError) as error:
            raise translated(error, where) from error

    def _wait(self, failures: int) -> None:
        time.sleep(random.uniform(0.5, 1.0) * min(20.0, self._backoff * 2.0 ** (failures - 1)))

    def _put_if_absent(self, key: str, data: Buffer) -> None:
        """One PUT that replaces nothing; on servers that ignore the condition, unless another writer comes in between.

        When the answer to a PUT is lost, its repetition finds the object that it made itself. So after a repetition an
        object with the same content counts as ours.
        """
        if self.exists(key):
            raise AlreadyExists(f"{self.locate(key)} exists already: delete it or choose another name")
        repeated = False
        for failures in range(1, self._attempts + 1):
            try:
                self._ask(key, "put_object", Body=data, IfNoneMatch="*")
            except AlreadyExists as error:
                repeated = repeated or answer(error.__cause__ or error)[2] > 0
                if repeated and self.stat(key).size == len(data) and self.get(key, limit=len(data)) == data:
                    return
                raise
            except Unavailable:
                if failures == self._attempts:
                    raise
                repeated = True
                self._wait(failures)
            else:
                return


@dataclass(slots=True)
class _Reading:
    """How far a range has come."""

    key: str
    start: int
    memory: memoryview
    done: int = 0
    tag: str = ""


class _SmallWriter(CheckedWriter):
    def __init__(self, store: S3Store, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store.locate(key), size)
        self._store = store
        self._key = key
        self._exclusive = exclusive
        self._data = bytearray(size)

    def _write(self, data: memoryview) -> None:
        self._data[self._written : self._written + len(data)] = data

    def _commit(self) -> None:
        if self._exclusive:
            self._store._put_if_absent(self._key, self._data)
        else:
            self._store._tried(self._key, "put_object", Body=self._data)
        self._data = bytearray()

    def _abort(self) -> None:
        self._data = bytearray()


class _PartsWriter(CheckedWriter):
    """A multipart upload. An upload whose abort fails stays behind, invisible, until the bucket's rules remove it."""

    def __init__(self, store: S3Store, key: str, size: int) -> None:
        super().__init__(store.locate(key), size, unit=store.unit(size))
        self._store = store
        self._key = key
        self._mark = secrets.token_hex(16)
        self._parts: list[dict[str, Any]] = []
        upload = store._tried(key, "create_multipart_upload", Metadata={_WRITER: self._mark})
        self._upload = {"UploadId": upload["UploadId"]}

    def _write(self, data: memoryview) -> None:
        count = -(-len(data) // _LARGEST_PART)
        step = -(-len(data) // count)
        for start in range(0, len(data), step):
            number = len(self._parts) + 1
            part = _Body(data[start : start + step])
            answer = self._store._tried(self._key, "upload_part", Body=part, PartNumber=number, **self._upload)
            self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})

    def _commit(self) -> None:
        try:
            self._store._tried(
                self._key, "complete_multipart_upload", MultipartUpload={"Parts": self._parts}, **self._upload
            )
        except NotFound:
            # When the answer is lost, the repetition finds no upload any more; the object then bears our mark.
            if self._store._head(self._key)["Metadata"].get(_WRITER) != self._mark:
                raise

    def _abort(self) -> None:
        try:
            self._store._ask(self._key, "abort_multipart_upload", **self._upload)
        except ShardtoolError:
            return


class _Body(io.RawIOBase):
    """Memory as a file that botocore can read, measure and rewind; small pieces are copied, never the whole."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        memory = octets(buffer)
        piece = self._data[self._at : self._at + len(memory)]
        memory[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def read(self, size: int = -1) -> bytes:
        # Less than what was asked for: eight threads that hash megabytes at a time cost as many megabytes of heap.
        piece = self._data[self._at :] if size < 0 else self._data[self._at : self._at + min(size, _HASHED)]
        self._at += len(piece)
        return bytes(piece)


@cache
def _models(path: str | None) -> Any:
    """What botocore knows of its services, read once for all clients: 12 MiB."""
    from botocore.loaders import create_loader

    return create_loader(path)


def _client(where: str, *, attempts: int, access: Access) -> Any:
    """A client for many threads, as boto3's settings want it, but for what servers other than Amazon's stumble on."""
    try:
        import boto3.session
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ModuleNotFoundError as error:
        raise UsageError(f"{where} needs boto3: pip install boto3") from error

    def made(**settings: Any) -> Any:
        if access.unsigned:
            settings["signature_version"] = botocore.UNSIGNED
        return session.client(
            "s3",
            endpoint_url=access.endpoint,
            config=Config(
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"mode": "standard", "total_max_attempts": attempts},
                max_pool_connections=128,
                connect_timeout=10,
                read_timeout=60,
                tcp_keepalive=True,
                **settings,
            ),
        )

    try:
        core = botocore.session.Session()
        core.register_component("data_loader", _models(core.get_config_variable("data_path")))
        session = boto3.session.Session(
            access.access_key_id,
            access.secret_access_key,
            access.session_token,
            region_name=access.region,
            botocore_session=core,
        )
        if access.addressing:
            return made(s3={"addressing_style": access.addressing})
        client = made()
        # A name such as bucket.localhost rarely resolves, so other servers find the bucket in the path.
        host = urlsplit(client.meta.endpoint_url).hostname or ""
        chosen = (client.meta.config.s3 or {}).get("addressing_style")
        if chosen or host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
            return client
        client.close()
        return made(s3={"addressing_style": "path"})
    except (BotoCoreError, ValueError) as error:
        raise translated(error, where) from error
