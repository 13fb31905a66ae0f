"""Files of a web server, to be read only.

::

    https://host/folder              every file below it
    https://host/folder?signature    the same; what follows the question mark is sent with each request and never shown
    https://user:password@host/...   the same, with a password (Basic)

    list ── the server's own listing (nginx, Apache, Caddy, ...), folders descended into
      └─ none: shardtool.json, or else an index, or else model.safetensors, and what usually lies beside them

A file that is replaced while it is read is noticed by its ``ETag`` or else its ``Last-Modified``.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from shardtool import manifest
from shardtool.errors import AccessDenied, FormatError, NotFound, ShardtoolError, StoreError, UsageError
from shardtool.stores import accounts
from shardtool.stores.address import shown
from shardtool.stores.base import CheckedWriter, Object, Store, check_key, is_key, target
from shardtool.stores.web import autoindex
from shardtool.stores.wire.http import Answer, Request, Wire
from shardtool.stores.wire.message import whole_number
from shardtool.stores.wire.ranged import Remote, fill, passing
from shardtool.stores.wire.retry import Again

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_BESIDE = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""What is looked for beside the weights where the server does not list its files."""
_REDIRECTS = 5
_ASKERS = 8
_MOST_JSON = 256 << 20
_MOST_PAGE = 64 << 20
_MOST_FILES = 200_000
_MOST_FOLDERS = 10_000  # links of a server may lead around in a circle
_DEEPEST = 16


class HttpStore(Store):
    """The files below ``https://host/folder``; whatever would change them is a ``UsageError``."""

    conditional = False
    writable = False

    def __init__(self, uri: str, *, again: Again = Again(), wire: Wire | None = None) -> None:  # noqa: B008
        try:
            parts = urlsplit(uri)
            user, password, known = parts.username, parts.password, parts.hostname and (parts.port, True)
        except ValueError:
            known = None
        if not known or parts.scheme not in ("http", "https") or parts.fragment:
            raise UsageError(f"{shown(uri)!r} is no address of files on a web server: write https://host/folder")
        path = quote(parts.path.strip("/"), safe="/%~!$&'()*+,;=:@")
        self.uri = shown(f"{parts.scheme}://{parts.netloc}/{path}").rstrip("/")
        self._query = f"?{parts.query}" if parts.query else ""
        self._headers = {}
        if user is not None:
            pair = f"{unquote(user)}:{unquote(password or '')}"
            self._headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        self._again = again
        self._wire = wire or Wire(ca_bundle=accounts.ca_file())
        self._known: dict[str, Object] = {}

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The files whose key starts with ``prefix``: those that the server lists, or those that are usual."""
        found = self._listed(prefix)
        if found is None:
            names = (key for key in self._usual() if key.startswith(prefix))
            found = dict.fromkeys(names, -1)
        yield from self._with_sizes(sorted(found.items()))

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such file, or a folder."""
        check_key(key)
        answer = self._asked("HEAD", key)
        size = whole_number(answer.headers.get("content-length", ""))
        if answer.status not in (200, 204) or size is None:  # some servers and most signed addresses know only GET
            answer = self._asked("GET", key, Range="bytes=0-0")
            size = self._size_of(answer, key)
        found = self._known[key] = Object(key, size, _version(answer.headers))
        return found

    def reading(self, threads: int) -> int:
        """What TLS takes."""
        return self._wire.reading(self.uri, threads)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view``; what a broken connection did not bring is asked for again, the rest is not."""
        memory = target(start, view)
        known = self._known.get(check_key(key)) or self.stat(key)
        if start + len(memory) > known.size:
            raise FormatError(f"{self.locate(key)} ends before the bytes that were asked for")
        if not memory:
            return
        where = self.locate(key)
        remote = Remote(
            where,
            lambda first, last: self._request("GET", key, Range=f"bytes={first}-{last}"),
            lambda answer: _refused(answer, where),
            version=_version,
            redirects=_REDIRECTS,
        )
        fill(self._wire, remote, start, memory, again=self._again, version=known.version)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> CheckedWriter:
        """A ``UsageError``: web servers are read."""
        raise UsageError(f"{self.locate(check_key(key))} cannot be written: {self.uri} is only read, choose a folder")

    def delete(self, key: str) -> None:
        """A ``UsageError``: web servers are read."""
        raise UsageError(f"{self.locate(check_key(key))} cannot be removed: {self.uri} is only read")

    def close(self) -> None:
        """Close the connections."""
        self._wire.close()

    def _request(self, method: str, key: str, **headers: str) -> Request:
        url = f"{self.uri}/{quote(key, safe='/', errors='surrogateescape')}{self._query}"
        return Request(method, url, {**self._headers, **headers})

    def _asked(self, method: str, key: str, **headers: str) -> Answer:
        """A small answer; ``NotFound`` where there is no file, or a folder answers in its place."""
        where = self.locate(key)
        answer = self._tried(
            key, lambda: self._wire.send(self._request(method, key, **headers), where=where, redirects=_REDIRECTS)
        )
        if answer.status in (404, 410) or urlsplit(answer.url).path.endswith("/"):
            raise NotFound(f"{where} does not exist")
        return answer

    def _tried(self, key: str, ask: Callable[[], Answer]) -> Answer:
        """An answer that another try would not better."""

        def once(_failures: int) -> Answer:
            answer = ask()
            if busy := passing(answer, self.locate(key)):
                raise busy
            return answer

        return self._again.run(once)

    def _size_of(self, answer: Answer, key: str) -> int:
        where = self.locate(key)
        total = whole_number(answer.headers.get("content-range", "").rpartition("/")[2])
        length = whole_number(answer.headers.get("content-length", ""))
        if answer.status in (206, 416) and total is not None:  # 416: not even the first byte is there
            return total
        if answer.status == 200 and length is not None:
            return length
        if answer.status in (200, 206):
            raise StoreError(f"the server of {where} does not say how large it is: copy the files to a folder first")
        raise _refused(answer, where)

    def _with_sizes(self, found: Iterable[tuple[str, int]]) -> Iterator[Object]:
        """The files among these, in their order; the server is asked where a size is not known."""

        def ask(item: tuple[str, int]) -> Object | None:
            key, size = item
            try:
                return Object(key, size) if size >= 0 else self.stat(key)
            except NotFound:
                return None

        with ThreadPoolExecutor(_ASKERS) as pool:
            yield from filter(None, pool.map(ask, found))

    def _listed(self, prefix: str) -> dict[str, int] | None:
        """Sizes by key as the server lists them; None if it lists nothing."""
        found: dict[str, int] = {}
        folders, seen = [""], 0
        while folders:
            folder, seen = folders.pop(), seen + 1
            entries = self._page(folder)
            if entries is None:
                if not folder:
                    return None
                continue
            for entry in entries:
                key = folder + entry.name
                if entry.folder:
                    within = f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/")
                    if within and key.count("/") < _DEEPEST:
                        folders.append(f"{key}/")
                elif key.startswith(prefix):
                    found[key] = entry.size
            if len(found) > _MOST_FILES or seen + len(folders) > _MOST_FOLDERS:
                raise FormatError(
                    f"{self.uri} lists more than {_MOST_FILES} files or {_MOST_FOLDERS} folders, too many for a"
                    " checkpoint"
                )
        return found

    def _page(self, folder: str) -> Sequence[autoindex.Listed] | None:
        """What the server lists of one folder."""
        where = self.locate(folder)

        def ask() -> Answer:
            request = self._request("GET", folder, Accept="application/json, text/html;q=0.9")
            with self._wire.open(request, where=where, redirects=_REDIRECTS) as reply:
                kind = reply.headers.get("content-type", "")
                body = reply.read(_MOST_PAGE) if "json" in kind or "html" in kind else b""
                return Answer(reply.status, reply.headers, body, reply.url)

        answer = self._tried(folder, ask)
        if answer.status == 401:
            raise _refused(answer, where)
        return autoindex.parse(answer.body, answer.headers.get("content-type", "")) if answer.status == 200 else None

    def _usual(self) -> set[str]:
        """The names of the files that a checkpoint without a listing is made of, as far as it says them itself."""
        found = {manifest.KEY, *_INDEXES, *_WEIGHTS, *_BESIDE}
        if data := self._small(manifest.KEY):
            made = manifest.decode(data, self.locate(manifest.KEY))
            return found | {record.key for record in made.files} | {record.key for record in made.side_files}
        for key in _INDEXES:
            files = _table(self._small(key)).get("weight_map")
            if isinstance(files, dict):
                found.update(name for name in files.values() if isinstance(name, str) and is_key(name))
        for key in ("config.json", "tokenizer_config.json"):
            found.update(_modules(_table(self._small(key)).get("auto_map")))
        return found

    def _small(self, key: str) -> bytes:
        """A file of JSON, or nothing where there is none."""
        try:
            return self.get(key, limit=_MOST_JSON)
        except (NotFound, AccessDenied):  # a server may deny what it does not have
            return b""


def _table(data: bytes) -> dict[str, Any]:
    """A JSON object; an empty one where the data are something else, such as a page that says that nothing is there."""
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _modules(said: Any) -> Iterator[str]:
    """The files of a model's own code: ``{"AutoModel": "modeling_mine.MyModel"}`` is ``modeling_mine.py``."""
    names = said.values() if isinstance(said, dict) else ()
    for name in names:
        for one in name if isinstance(name, list) else [name]:
            if isinstance(one, str) and "--" not in one and is_key(one):
                yield f"{one.rpartition('.')[0]}.py"


def _version(headers: Mapping[str, str]) -> str:
    return headers.get("etag") or headers.get("last-modified", "")


def _refused(answer: Answer, where: str) -> ShardtoolError:
    """What an answer other than 200, 206 and 416 means."""
    if busy := passing(answer, where):
        return busy
    match answer.status:
        case 401 | 403:
            return AccessDenied(
                f"access to {where} is denied (the server says {answer.status}): check the user and password, or that "
                "a signed address is not too old"
            )
        case 404 | 410:
            return NotFound(f"{where} does not exist")
        case _:
            return StoreError(f"{where} cannot be read: the server says {answer.status}, check the address")
