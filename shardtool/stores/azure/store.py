"""Blobs of Azure, or of a server that speaks its protocol: ``az://container/folder``.

::

    readinto ── GET of a range ── the body straight into the view (stores.wire), its version pinned by If-Match
    create   ── up to 8 MiB:  gathered, one Put Blob
             ── larger:       Put Block, several at a time straight from the caller's memory, then Put Block List
    exclusive                 If-None-Match: * on what makes it visible, whatever its size

Azure's own libraries say who we are (``stores.azure.account``); all requests go through ``stores.wire``. Every blob
bears its writer's mark, so that an answer that was lost is not taken for a failure or for somebody else's blob.

Blocks that are not committed belong to a name, not to a writer: whoever commits a name first drops the blocks of all
others there, whose commits fail. Blocks of a name that never became a blob are ``unfinished``; Azure drops them after
a week. In accounts with folders of their own (hierarchical namespaces) a folder is not an object.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import quote

from shardtool.errors import AccessDenied, AlreadyExists, FormatError, NotFound, ShardtoolError, Unavailable, UsageError
from shardtool.stores import accounts
from shardtool.stores.azure.account import Address, account_of
from shardtool.stores.azure.errors import MISSING, Dropped, code_of, translated
from shardtool.stores.azure.lists import Blob, Blocks, blobs_of, block_list, block_name, blocks_of
from shardtool.stores.base import Buffer, CheckedWriter, Object, Store, Unfinished, check_key, is_key, target
from shardtool.stores.wire.http import Answer, Request, Wire
from shardtool.stores.wire.message import whole_number
from shardtool.stores.wire.pages import Pages
from shardtool.stores.wire.pins import Pins
from shardtool.stores.wire.ranged import Remote, fill
from shardtool.stores.wire.retry import Again
from shardtool.stores.wire.senders import Senders

_MIB = 1 << 20
_SMALL = 8 * _MIB
_BLOCK = 4 * _MIB  # from here on Azure stores blocks at full speed
_BLOCKS = 30_000  # the protocol's limit is 50,000; slices that are no multiples of a block make half as many more
_PER_PAGE = 5000
_MOST = 1_000_000  # they are sorted here, so all of them are held
_PAGE = 64 * _MIB  # of bytes: names have 1024 characters at most
_WRITER = "x-ms-meta-shardtool_writer"
_DISCARDED = "x-ms-meta-shardtool_discarded"
_FOLDER = "x-ms-meta-hdi_isfolder"
_LEFT = "blocks"
_EMPTY = frozenset({"InvalidRange"})
_RANGE = re.compile(r"bytes 0-[-\d]{1,19}/(\d{1,19})")
_ONCE = Again(attempts=1)


class AzureStore(Store):
    """The blobs below ``az://container/prefix``, or ``abfss://container@account.dfs.core.windows.net/prefix``.

    ``access``: the account, in place of what the environment says. ``credential``: an object of Azure's libraries that
    gives tokens, or an ``AzureSasCredential`` or ``AzureNamedKeyCredential``, whose owner may renew it. ``wire``,
    ``again``: connections and patience.
    """

    def __init__(
        self,
        uri: str,
        *,
        access: accounts.AzureAccount | None = None,
        credential: Any = None,
        wire: Wire | None = None,
        again: Again = Again(),  # noqa: B008
    ) -> None:
        address = Address.of(uri)
        self.uri = address.uri
        self._container = f"/{quote(address.container)}"
        self._prefix = f"{address.prefix}/" if address.prefix else ""
        self._account = account_of(address, access or accounts.azure(), credential)
        self._wire = wire or Wire(ca_bundle=accounts.ca_file())
        self._again = again
        self._pins = Pins()
        self._senders = Senders()

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The blobs whose key starts with ``prefix``, sorted: Azure's order is not always that of strings."""
        since, found = self._pins.since(), []
        for key, blob in self._listed(prefix, "metadata"):
            if not _hidden(blob.about):
                self._pins.keep(key, blob.tag, since)
                found.append(Object(key, blob.size, blob.tag))
            if len(found) > _MOST:
                raise UsageError(
                    f"{self.locate(prefix)} holds more than {_MOST} blobs: name the folder of a checkpoint"
                )
        return iter(sorted(found, key=lambda object: object.key))

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such blob."""
        since, head = self._pins.since(), self._head(key)
        self._pins.keep(key, _tag(head.headers), since)
        return Object(key, _size(head.headers, self.locate(key)), _tag(head.headers))

    def reading(self, threads: int) -> int:
        """What TLS takes."""
        return self._wire.reading(self._account.endpoint, threads)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view``; what a broken connection did not bring is asked for again, the rest is not."""
        memory, path, where = target(start, view), self._path(key), self.locate(key)
        pin = self._pins.of(key)
        pinned = {"If-Match": f'"{pin}"'} if pin else {}

        def request(first: int, last: int) -> Request:
            return self._signed("GET", path, headers={"x-ms-range": f"bytes={first}-{last}", **pinned})

        def version(headers: Mapping[str, str]) -> str:
            if _hidden(headers):
                raise NotFound(f"{where} does not exist")
            pinned["If-Match"] = headers.get("etag", "*")
            return _tag(headers)

        remote = Remote(
            where, request, lambda answer: self._refused(answer, where), version, self._account.signer.renew
        )
        fill(self._wire, remote, start, memory, again=self._again, version=pin)

    def get(self, key: str, *, limit: int) -> bytes:
        """A small blob whole, in one request: one version of it, whichever it is."""
        headers = {"x-ms-range": f"bytes=0-{limit}"}

        def attempt(_: int) -> bytes:
            answer = self._ask("GET", key, "", headers, again=_ONCE, fine=_EMPTY, limit=limit + 1)
            if _hidden(answer.headers):
                raise NotFound(f"{self.locate(key)} does not exist")
            said = _RANGE.fullmatch(answer.headers.get("content-range", ""))
            size = int(said[1]) if said and answer.status != 416 else 0
            if size > limit:
                raise FormatError(
                    f"{self.locate(key)} is {size} bytes, more than the {limit} that such a file may have"
                )
            if answer.status == 416:
                return b""
            if not said or len(answer.body) != size:
                raise Unavailable(
                    f"the server of {self.locate(key)} sends other bytes than it was asked for: try again"
                )
            return answer.body

        return self._again.run(attempt)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> CheckedWriter:
        """Begin a blob: one over 8 MiB is uploaded in blocks. Any size can be exclusive."""
        self._path(key)
        return (_SmallWriter if size <= _SMALL else _BlocksWriter)(self, key, size, exclusive=exclusive)

    def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is not an error."""
        with self._pins.changing(key):
            self._ask("DELETE", key, fine=MISSING)

    def unit(self, size: int) -> int:
        """0 for what goes in one request, otherwise a few blocks, so that they can be sent at a time."""
        if size <= _SMALL:
            return 0
        return max(_SMALL if size <= 8 * _SMALL else 2 * _SMALL, 2 * self._block(size))

    def held(self, size: int) -> int:
        """What goes in one request is gathered in memory first."""
        return size if size <= _SMALL else 0

    def checksums(self, key: str) -> Mapping[str, str]:
        """The ETag, and the MD5 that Azure keeps of blobs that came in one request, or that their writer has given."""
        return _kept(self._head(key).headers)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """The names below which there are blocks and no blob, since when their latest writer began, by its clock.

        Blocks that a writer left beside a blob of the same name are not seen: Azure drops them itself.
        """
        for key, blob in sorted(self._listed(prefix, "uncommittedblobs,metadata"), key=lambda found: found[0]):
            if _DISCARDED in blob.about:
                yield Unfinished(key, blob.tag, 0.0, 0)
            elif blob.size == 0 and (blocks := self._blocks(key)) is not None:
                yield Unfinished(key, _LEFT, blocks.since, blocks.size)

    def discard(self, left: Unfinished) -> None:
        """Remove the blocks below a name that is no blob's.

        There is no request for that. So an empty blob is made of none of them, where there is no blob, and removed if
        it is still the same one; it bears a mark by which this store does not take it for an object meanwhile.
        """
        tag = left.name
        if tag == _LEFT:
            if self._blocks(left.key) is None:
                return
            tag = self._emptied(left.key, self._again)
        self._removed(left.key, tag, self._again)

    def _emptied(self, key: str, again: Again) -> str:
        """Make an empty blob where there is none but blocks; gives its ETag, or nothing if there is another blob."""
        try:
            made = self._ask(
                "PUT", key, "comp=blocklist", {"If-None-Match": "*", _DISCARDED: "1"}, block_list(()), again
            )
        except AlreadyExists:  # it was finished meanwhile, or is ours and the answer was lost
            made = self._ask("HEAD", key, again=again, fine=MISSING)
            return _tag(made.headers) if _DISCARDED in made.headers else ""
        return _tag(made.headers)

    def _removed(self, key: str, tag: str, again: Again) -> None:
        if tag:
            with suppress(AlreadyExists):  # another blob
                self._ask("DELETE", key, headers={"If-Match": f'"{tag}"'}, again=again, fine=MISSING)

    def place(self) -> str:
        """The server, the container and the folder, however the account was named."""
        return f"{self._account.endpoint}{self._container}/{self._prefix}".rstrip("/")

    def close(self) -> None:
        """Close the connections."""
        self._senders.close()
        self._account.signer.close()
        self._wire.close()

    def _listed(self, prefix: str, include: str) -> Iterator[tuple[str, Blob]]:
        """Pages of what the container lists; names that are no keys, such as markers of folders, are left out."""
        where, marker = self.locate(prefix), ""
        taken = Pages(where)
        start = quote(self._prefix + prefix, safe="")
        while True:
            query = (
                f"restype=container&comp=list&maxresults={_PER_PAGE}&include={quote(include, safe='')}&prefix={start}"
            )
            query += f"&marker={quote(marker, safe='')}" if marker else ""
            answer = self._tried(where, partial(self._signed, "GET", self._container, query), limit=_PAGE)
            blobs, following = blobs_of(answer.body, where)
            taken.took(len(blobs))
            for blob in blobs:
                if is_key(key := blob.name.removeprefix(self._prefix)):
                    yield key, blob
            if not following or following == marker:
                return
            marker = following

    def _head(self, key: str) -> Answer:
        answer = self._ask("HEAD", key)
        if _hidden(answer.headers):
            raise NotFound(f"{self.locate(key)} does not exist")
        return answer

    def _blocks(self, key: str, again: Again | None = None) -> Blocks | None:
        """The blocks below a name that is no blob's, or None where there are none."""
        try:
            answer = self._ask("GET", key, "comp=blocklist&blocklisttype=uncommitted", again=again, limit=_PAGE)
            blocks = blocks_of(answer.body, self.locate(key))
        except NotFound:
            return None
        if not blocks.count:
            return None
        with suppress(NotFound):
            self._ask("HEAD", key, again=again)
            return None
        return blocks

    def _block(self, size: int) -> int:
        """Bytes of a block, so that the blocks suffice: whole MiB."""
        least = -(-size // _BLOCKS)
        return _BLOCK if least <= _BLOCK else -(-least // _MIB) * _MIB

    def _path(self, key: str) -> str:
        return f"{self._container}/{quote(self._prefix + check_key(key), safe='/~')}"

    def _signed(self, method: str, path: str, query: str = "", headers: dict[str, str] | None = None) -> Request:
        return Request(method, *self._account.signed(method, path, query, headers))

    def _ask(
        self,
        method: str,
        key: str,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        body: Buffer = b"",
        again: Again | None = None,
        *,
        fine: frozenset[str] = frozenset(),
        limit: int = _MIB,
    ) -> Answer:
        """A request about a blob, repeated if need be; what the service calls ``fine`` is no error."""
        said = dict(headers or {})
        if method == "PUT":
            said["Content-Length"] = str(len(body))
            if body and self._account.endpoint.startswith("http://"):
                said["Content-MD5"] = _md5(body)  # no TLS protects it
        request = partial(self._signed, method, self._path(key), query, said)
        return self._tried(self.locate(key), request, body, again, fine=fine, limit=limit)

    def _tried(
        self,
        where: str,
        request: Callable[[], Request],
        body: Buffer = b"",
        again: Again | None = None,
        *,
        fine: frozenset[str] = frozenset(),
        limit: int = _MIB,
    ) -> Answer:
        """Ask until there is an answer that is final; each try is signed anew."""

        def attempt(_: int) -> Answer:
            answer = self._wire.send(request(), body, where=where, limit=limit)
            if answer.status in (401, 403) and self._account.signer.renew():
                answer = self._wire.send(request(), body, where=where, limit=limit)
            if answer.status >= 300 and code_of(answer.headers, answer.body) not in fine:
                raise self._refused(answer, where)
            return answer

        return (again or self._again).run(attempt)

    def _refused(self, answer: Answer, where: str) -> ShardtoolError:
        signer = self._account.signer
        if answer.status in (401, 403) and (ended := signer.ended()):
            return AccessDenied(f"{signer.how} for {where} has expired at {ended}: make a new one")
        return translated(answer.status, answer.headers, answer.body, where, how=signer.how)


class _Writer(CheckedWriter):
    """What both kinds of writers do: publish under a condition, and know their own blob again."""

    def __init__(self, store: AzureStore, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store.locate(key), size, unit=store.unit(size))
        self._store = store
        self._key = key
        self._mark = secrets.token_hex(16)
        self._exclusive = exclusive
        self._kept: Mapping[str, str] = {}

    def checksums(self) -> Mapping[str, str]:
        return self._kept

    def _publish(self, query: str, headers: dict[str, str], body: Buffer) -> Mapping[str, str]:
        """Make the blob visible; gives a head of it."""
        with self._store._pins.changing(self._key):
            return self._made(query, headers, body)

    def _made(self, query: str, headers: dict[str, str], body: Buffer) -> Mapping[str, str]:
        headers = {**headers, _WRITER: self._mark}
        if self._exclusive:
            headers["If-None-Match"] = "*"
        try:
            return self._store._ask("PUT", self._key, query, headers, body).headers
        except (AlreadyExists, Dropped) as error:
            # Where an answer was lost, its repetition is refused because of what the request has made.
            head = self._store._ask("HEAD", self._key, fine=MISSING).headers
            if head.get(_WRITER) == self._mark:
                return head
            if self._exclusive and "etag" in head:
                raise AlreadyExists(f"{self._where} exists already: delete it or choose another name") from error
            raise


class _SmallWriter(_Writer):
    def __init__(self, store: AzureStore, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store, key, size, exclusive=exclusive)
        self._data = bytearray(size)

    def _write(self, data: memoryview) -> None:
        self._data[self._written : self._written + len(data)] = data

    def _commit(self) -> None:
        headers = {"x-ms-blob-type": "BlockBlob", "Content-MD5": _md5(self._data)}
        self._kept = _kept(self._publish("", headers, self._data))
        self._data = bytearray()

    def _abort(self) -> None:
        self._data = bytearray()


class _BlocksWriter(_Writer):
    def __init__(self, store: AzureStore, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store, key, size, exclusive=exclusive)
        self._block = store._block(size)
        self._began = time.time()
        self._blocks: list[str] = []

    def _write(self, data: memoryview) -> None:
        """Send the blocks of a slice, the first by this thread and the others by the store's."""
        count = -(-len(data) // self._block)
        step = -(-len(data) // count)
        pieces = [data[start : start + step] for start in range(0, len(data), step)]
        names = [block_name(len(self._blocks) + n, self._began, self._mark) for n in range(len(pieces))]
        self._blocks += names
        self._store._senders.each([partial(self._send, *each) for each in zip(names, pieces, strict=True)])

    def _send(self, name: str, piece: memoryview) -> None:
        with piece:
            self._store._ask("PUT", self._key, f"comp=block&blockid={quote(name, safe='')}", body=piece)

    def _commit(self) -> None:
        head = self._publish("comp=blocklist", {}, block_list(self._blocks))
        self._kept = {"etag": _tag(head)}  # the MD5 of this answer is that of the list

    def _abort(self) -> None:
        """Drop the blocks, unless there are those of somebody else or a blob, from which they cannot be told apart."""
        store = self._store
        with suppress(ShardtoolError):
            blocks = store._blocks(self._key, _ONCE) if self._blocks else None
            if blocks and blocks.writers == {self._mark}:
                store._removed(self._key, store._emptied(self._key, _ONCE), _ONCE)


def _tag(headers: Mapping[str, str]) -> str:
    return headers.get("etag", "").strip('"')


def _size(headers: Mapping[str, str], where: str) -> int:
    size = whole_number(headers.get("content-length", ""))
    if size is None:
        raise Unavailable(f"the server of {where} does not say how many bytes it has: try again")
    return size


def _hidden(headers: Mapping[str, str]) -> bool:
    """Whether a blob is no object: a folder of a hierarchical namespace, or what ``discard`` makes for a moment."""
    return headers.get(_FOLDER, "").lower() == "true" or _DISCARDED in headers


def _md5(body: Buffer) -> str:
    return b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    """What a head says of a blob's content."""
    kept = {"etag": _tag(headers)}
    with suppress(NotBase64, ValueError):
        if digest := b64decode(headers.get("content-md5", ""), validate=True):
            kept["md5"] = digest.hex()
    return kept
