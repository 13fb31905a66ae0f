"""Objects of Google Cloud Storage, by its JSON API.

::

    list stat delete checksums ── google-cloud-storage
    readinto ── GET of a range, of one generation ── straight into the view            stores.wire
    create   ── up to 8 MiB:  gathered, one POST with its CRC32C
             ── larger:       a resumable upload, chunks from the caller's memory      stores.gcs.upload
             exclusive, of any size: ifGenerationMatch=0, which says that there is none

An upload's chunks follow each other, so an object is as fast as one connection; several objects are written at a time.
Composing objects of parts would be faster for a single one, at the price of parts that everybody sees, that buckets
with a retention policy never let go, and that a killed process leaves behind.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from shardtool.errors import AlreadyExists, NotFound, ShardtoolError, StoreError, UsageError
from shardtool.stores import accounts
from shardtool.stores.address import shown
from shardtool.stores.base import CheckedWriter, Object, Store, check_key, is_key, target
from shardtool.stores.gcs.account import Account, expect_safe
from shardtool.stores.gcs.errors import answered
from shardtool.stores.gcs.upload import QUARTER, Session, extended, resource_of
from shardtool.stores.wire.http import Answer, Request, Wire
from shardtool.stores.wire.pages import Pages
from shardtool.stores.wire.pins import Pins
from shardtool.stores.wire.ranged import Remote, fill
from shardtool.stores.wire.retry import Again

_MIB = 1 << 20
_SMALL = 8 * _MIB
_CHUNK = 8 * _MIB  # each costs a round trip and a little of the server's time
_CHUNK_OF_LARGE = 16 * _MIB
_LARGE = 1 << 30
_WRITER = "shardtool-writer"  # metadata by which a writer knows its own object again
_TIMEOUT = (10, 60)
_BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,220}[a-z0-9])?")
_FIELDS = "items(name,size,generation),nextPageToken"
_BYTES = "application/octet-stream"

T = TypeVar("T")


class GcsStore(Store):
    """The objects below ``gs://bucket/prefix``.

    ``endpoint``: another server than Google's or the environment's. ``credentials``: an object of google-auth, in place
    of those that it finds. ``wire``, ``again``: connections and patience.
    """

    def __init__(
        self,
        uri: str,
        *,
        endpoint: str | None = None,
        credentials: Any = None,
        wire: Wire | None = None,
        again: Again = Again(),  # noqa: B008
    ) -> None:
        bucket, _, prefix = uri.partition("://")[2].partition("/")
        prefix = prefix.strip("/")
        if not uri.startswith("gs://") or not _BUCKET.fullmatch(bucket):
            raise UsageError(f"{shown(uri)!r} names no bucket of Google's: write gs://bucket/folder")
        if "?" in uri:
            raise UsageError(f"{shown(uri)!r} has a query, which addresses of Google's buckets do not: leave it out")
        self.uri = f"gs://{bucket}/{prefix}" if prefix else f"gs://{bucket}"
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._again = again
        self._pins = Pins()
        self._account = Account(self.uri, endpoint=endpoint, credentials=credentials)
        self._wire = wire or Wire(ca_bundle=accounts.ca_file())
        self._bucket = self._account.client.bucket(bucket)
        self._objects = f"/storage/v1/b/{quote(bucket, safe='')}/o"
        # Emulators exist that ignore conditions.
        self.conditional = not self._account.emulator

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The objects whose key starts with ``prefix``, asked for in pages; markers of empty folders are hidden."""
        since = self._pins.since()
        start, client, token = self._prefix + prefix, self._account.client, None

        def page() -> tuple[list[Any], Any]:
            found = client.list_blobs(
                self._bucket, prefix=start, fields=_FIELDS, page_token=token, retry=None, timeout=_TIMEOUT
            )
            return list(next(found.pages, ())), found.next_page_token

        taken = Pages(self.locate(prefix))
        while True:
            blobs, token = self._tried(self.locate(prefix), page)
            taken.took(len(blobs))
            for blob in blobs:
                key = blob.name.removeprefix(self._prefix)
                if is_key(key):
                    self._pins.keep(key, str(blob.generation), since)
                    yield Object(key, blob.size or 0, str(blob.generation))
            if not token:
                return

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such object."""
        since, blob = self._pins.since(), self._blob(key)
        self._pins.keep(key, str(blob.generation), since)
        return Object(key, blob.size or 0, str(blob.generation))

    def reading(self, threads: int) -> int:
        """What TLS takes."""
        return self._wire.reading(self._account.endpoint, threads)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view`` from one generation, that which was seen last; what a cut did not bring is asked for again."""
        memory, where = target(start, view), self.locate(check_key(key))
        address = f"{self._account.endpoint}{self._objects}/{quote(self._prefix + key, safe='')}?alt=media"
        pinned = known = self._pins.of(key)
        used: dict[str, str] = {}

        def request(first: int, last: int) -> Request:
            nonlocal used
            url = f"{address}&ifGenerationMatch={pinned}" if pinned else address
            used = self._account.headers("GET", url, where)
            # What is stored compressed is not to be unpacked by the server, which would ignore the range.
            return Request("GET", url, {"Range": f"bytes={first}-{last}", "Accept-Encoding": "gzip", **used})

        def version(headers: Mapping[str, str]) -> str:
            nonlocal pinned
            pinned = pinned or headers.get("x-goog-generation", "")
            return headers.get("x-goog-generation") or known or headers.get("etag", "")

        remote = Remote(
            where,
            request,
            lambda answer: self._refused(answer, where),
            version,
            lambda: self._account.renew(used, where),
            lambda: self.stat(key).size,
        )
        fill(self._wire, remote, start, memory, again=self._again, version=known)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> CheckedWriter:
        """Begin an object: one over 8 MiB is uploaded in chunks. Any size can be exclusive.

        On an emulator (``conditional`` is False) two exclusive writers that meet may both win.
        """
        check_key(key)
        return (_SmallWriter if size <= _SMALL else _ChunksWriter)(self, key, size, exclusive=exclusive)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is not an error."""
        self._remove(key)

    def unit(self, size: int) -> int:
        """0 for what goes in one request, otherwise a chunk: 8 MiB, and 16 MiB of objects over 1 GiB."""
        return 0 if size <= _SMALL else _CHUNK if size <= _LARGE else _CHUNK_OF_LARGE

    def held(self, size: int) -> int:
        """What goes in one request is gathered in memory first; of chunks only what is left over."""
        return size if size <= _SMALL else 2 * QUARTER

    def checksums(self, key: str) -> Mapping[str, str]:
        """The CRC32C, which Google always keeps, and the MD5 of objects that were not composed of others."""
        blob = self._blob(key)
        return {name: _hex(said) for name, said in (("crc32c", blob.crc32c), ("md5", blob.md5_hash)) if said}

    def close(self) -> None:
        """Close the connections."""
        self._account.close()
        self._wire.close()

    def _blob(self, key: str) -> Any:
        """What the library knows of an object."""
        blob = self._bucket.blob(self._prefix + check_key(key))

        def known() -> Any:
            blob.reload(retry=None, timeout=_TIMEOUT)
            int(blob.generation)  # an answer that is none has none
            return blob

        return self._tried(self.locate(key), known)

    def _remove(self, key: str, generation: int | None = None) -> None:
        blob = self._bucket.blob(self._prefix + check_key(key))
        try:
            with self._pins.changing(key):
                self._tried(
                    self.locate(key),
                    lambda: blob.delete(if_generation_match=generation, retry=None, timeout=_TIMEOUT),
                )
        except NotFound as error:
            if "bucket" in str(error):
                raise

    def _tried(self, where: str, call: Callable[[], T]) -> T:
        """A call of the library, with shardtool's errors and patience."""

        def attempt(_: int) -> T:
            try:
                return call()
            except Exception as error:
                raise self._account.error(error, where) from error

        return self._again.run(attempt)

    def _posted(self, where: str, query: str, body: memoryview | bytes, headers: Mapping[str, str]) -> Answer:
        """A POST that begins or makes an object; it may be repeated."""
        url = f"{self._account.endpoint}/upload{self._objects}?{query}"

        def attempt(_: int) -> Answer:
            mine = self._account.headers("POST", url, where)
            answer = self._wire.send(Request("POST", url, {**headers, **mine}), body, where=where)
            if answer.status == 401 and self._account.renew(mine, where):
                mine = self._account.headers("POST", url, where)
                answer = self._wire.send(Request("POST", url, {**headers, **mine}), body, where=where)
            if answer.status not in (200, 201):
                raise self._refused(answer, where)
            return answer

        return self._again.run(attempt)

    def _refused(self, answer: Answer, where: str) -> ShardtoolError:
        return answered(answer, where, anonymous=self._account.anonymous)


class _GcsWriter(CheckedWriter):
    """What both kinds of writers know: who they are, and what the object must look like in the end."""

    def __init__(self, store: GcsStore, key: str, size: int, *, unit: int, exclusive: bool) -> None:
        super().__init__(store.locate(key), size, unit=unit)
        self._store = store
        self._key = key
        self._exclusive = exclusive
        self._mark = secrets.token_hex(16)
        self._crc = 0

    def checksums(self) -> Mapping[str, str]:
        """The CRC32C of what was written."""
        return {"crc32c": f"{self._crc:08x}"}

    def _about(self, **more: str) -> bytes:
        about = {"name": self._store._prefix + self._key, "contentType": _BYTES, "metadata": {_WRITER: self._mark}}
        return json.dumps({**about, **more}).encode()

    def _query(self, kind: str) -> str:
        """The query of an upload. Where it would be told late or never, an object that is there is looked for first."""
        if not self._exclusive:
            return f"uploadType={kind}"
        if (kind == "resumable" or not self._store.conditional) and self._store.exists(self._key):
            raise AlreadyExists(f"{self._where} exists already: delete it or choose another name")
        return f"uploadType={kind}&ifGenerationMatch=0"

    def _expect_own(self, error: AlreadyExists) -> None:
        """When an answer is lost, the repetition finds the object that we made ourselves: it bears our mark."""
        try:
            found = self._store._blob(self._key).metadata or {}
        except NotFound:
            found = {}
        if found.get(_WRITER) != self._mark:
            raise error

    def _expect_whole(self, resource: Mapping[str, Any]) -> None:
        """Servers that do not compare checksums exist too."""
        if str(resource.get("size", 0)) == str(self._size) and resource.get("crc32c") == _said(self._crc):
            return
        generation = str(resource.get("generation", ""))
        self._store._remove(self._key, int(generation) if generation.isdigit() else None)
        raise StoreError(f"{self._where} did not arrive as it was sent, and was removed again: start again")


class _SmallWriter(_GcsWriter):
    """One request: what the object is and its bytes, between lines that are no part of them."""

    def __init__(self, store: GcsStore, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store, key, size, unit=0, exclusive=exclusive)
        edge, about = f"--{self._mark}".encode(), self._about(crc32c=_said(0))
        head = b"%b\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n%b\r\n" % (edge, about)
        head += b"%b\r\nContent-Type: %b\r\n\r\n" % (edge, _BYTES.encode())
        tail = b"\r\n%b--\r\n" % edge
        self._start = len(head)
        self._crc_at = head.rindex(_said(0).encode())
        self._body = bytearray(len(head) + size + len(tail))
        self._body[: len(head)] = head
        self._body[len(head) + size :] = tail

    def _write(self, data: memoryview) -> None:
        at = self._start + self._written
        self._body[at : at + len(data)] = data

    def _commit(self) -> None:
        body = memoryview(self._body)
        self._crc = extended(0, body[self._start : self._start + self._size])
        said = _said(self._crc).encode()
        body[self._crc_at : self._crc_at + len(said)] = said
        headers = {"Content-Type": f'multipart/related; boundary="{self._mark}"'}
        try:
            with self._store._pins.changing(self._key):
                answer = self._store._posted(self._where, self._query("multipart"), body, headers)
        except AlreadyExists as error:
            self._expect_own(error)
        else:
            self._expect_whole(resource_of(answer, self._where))
        self._body = bytearray()

    def _abort(self) -> None:
        self._body = bytearray()


class _ChunksWriter(_GcsWriter):
    """A resumable upload. The last bytes are kept back until the commit, since they make the object visible."""

    def __init__(self, store: GcsStore, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store, key, size, unit=store.unit(size), exclusive=exclusive)
        headers = {
            "Content-Type": "application/json; charset=UTF-8",
            "X-Upload-Content-Type": _BYTES,
            "X-Upload-Content-Length": str(size),
        }
        answer = store._posted(self._where, self._query("resumable"), self._about(), headers)
        url = answer.headers.get("location", "")
        self._session = Session(
            store._wire, expect_safe(url, store._account.endpoint, self._where), size, self._where, store._again
        )
        self._rest = bytearray()

    def _write(self, data: memoryview) -> None:
        self._crc = extended(self._crc, data)
        last = self._written + len(data) == self._size
        count = (len(self._rest) + len(data) - last) // QUARTER * QUARTER
        if self._rest and count:
            lacking = QUARTER - len(self._rest)
            self._session.send(memoryview(bytes(self._rest) + data[:lacking]))
            self._rest.clear()
            data = data[lacking:]
            count -= QUARTER
        if count:
            self._session.send(data[:count])
        self._rest += data[count:]

    def _commit(self) -> None:
        try:
            with self._store._pins.changing(self._key):
                self._session.send(memoryview(bytes(self._rest)), _said(self._crc))
        except AlreadyExists as error:
            self._expect_own(error)
        else:
            self._expect_whole(self._session.resource or {})

    def _abort(self) -> None:
        self._session.drop()
        self._rest.clear()


def _said(crc: int) -> str:
    """A CRC as Google writes it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _hex(said: str) -> str:
    """A checksum of Google's as hexadecimal digits."""
    try:
        return base64.b64decode(said, validate=True).hex()
    except (binascii.Error, ValueError):
        return said
