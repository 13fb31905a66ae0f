"""Models of the Hugging Face hub, for reading. huggingface_hub says who asks and what is cached; the rest is HTTP.

::

    first use ── /api/models/ORG/NAME/revision/REV ── the commit, once: nothing that is pushed later is seen
              └─ /api/models/ORG/NAME/tree/COMMIT  ── page by page: every file with its size and its hash
    readinto  ── in huggingface_hub's cache at that commit ── as any file of this machine
              ├─ LFS file ── HEAD of /resolve/ ── its signed address, kept until it is refused ── ranges of it
              └─ other    ── /resolve/, and where that leads

Token, endpoint, cache and whether to be offline are what huggingface_hub says: ``HF_TOKEN`` or ``hf auth login``,
``HF_ENDPOINT``, ``HF_HOME`` or ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``. Offline, a model is what the cache has of it.
The token goes to the endpoint alone, never to the hosts of large files.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn
from urllib.parse import quote, unquote, urljoin, urlsplit

from shardtool.errors import AccessDenied, FormatError, NotFound, ShardtoolError, Unavailable, UsageError
from shardtool.stores.address import shown
from shardtool.stores.base import Object, Replaced, Store, check_key, is_key, target
from shardtool.stores.hub.errors import refused
from shardtool.stores.local.store import LocalStore
from shardtool.stores.wire.http import Answer, Request, Wire
from shardtool.stores.wire.ranged import Remote, fill
from shardtool.stores.wire.retry import Again

MOST_FILES = 500_000
"""Files that a model may have before it is taken for something else."""
_MOST_ANSWER = 64 << 20
_REDIRECTS = 5
_MOVED = (301, 302, 303, 307, 308)
_KINDS = ("datasets", "spaces", "kernels", "buckets")
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ADDRESS = re.compile(rf"({_WORD}/{_WORD})(?:@(refs/(?:pr/\d+|convert/[\w.-]+)|[^/@]+))?(?:/(.*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NEXT = re.compile(r'<[^<>]*\?([^<>]*)>\s*;\s*rel="next"')


@dataclass(frozen=True, slots=True)
class Place:
    """What an address names: the model, the revision if it says one, and the folder in it or nothing."""

    repo: str
    revision: str | None
    folder: str

    @classmethod
    def of(cls, uri: str) -> Place:
        """Take ``hf://org/name[@revision][/folder]`` apart; a slash in a revision is written %2F.

        Raises ``UsageError``.
        """
        rest = uri.partition("://")[2].rstrip("/").removeprefix("models/")
        if rest.partition("/")[0] in _KINDS:
            raise UsageError(f"{shown(uri)!r} is no model: of the hub only models are read, write hf://org/name")
        found = _ADDRESS.fullmatch(rest)
        if not found or "--" in found[1] or ".." in found[1]:
            raise UsageError(
                f"{shown(uri)!r} names no model: write hf://org/name, hf://org/name@revision or hf://org/name/folder"
            )
        return cls(found[1], unquote(found[2]) if found[2] else None, check_key(found[3]) if found[3] else "")


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a commit: its hash by which git knows it, or the sha256 of a large one."""

    size: int
    oid: str
    large: bool


@dataclass(slots=True)
class _Large:
    """Where a large file can be had now, as the hub signed it: None if it is not known, nothing if the hub has it.

    ``failure`` and ``since``: how the last try to know ended, and when (of the monotonic clock).
    """

    url: str | None = None
    failure: ShardtoolError | None = None
    since: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class _Pinned:
    """A commit: the model's name as the hub has it now, its files in the folder, and what of it is in the cache."""

    repo: str
    commit: str
    files: Mapping[str, _File]
    cache: LocalStore


class HubStore(Store):
    """The files below ``hf://org/name[@revision][/folder]``, of the commit that the revision is when it is first used.

    ``again``: how often a request is tried; ``wire``: by which connections. ``bare``: the address was not written as
    one, but as the path ``org/name`` that is not there, so that errors speak of both.
    """

    conditional = False
    writable = False

    def __init__(
        self,
        uri: str,
        *,
        again: Again = Again(),  # noqa: B008
        wire: Wire | None = None,
        bare: bool = False,
    ) -> None:
        self._place = Place.of(uri)
        self.uri = uri.rstrip("/")
        self._again = again
        self._bare = bare
        self._wire = wire or Wire()
        self._lock = threading.Lock()
        self._pin: _Pinned | None = None
        self._large: dict[str, _Large] = {}
        try:
            import huggingface_hub.constants as hub
        except ModuleNotFoundError as error:
            if bare:
                raise NotFound(
                    f"{self._id} does not exist here; if it is a model of the hub: pip install 'shardtool[hf]'"
                ) from error
            raise UsageError(f"{uri} needs huggingface_hub: pip install 'shardtool[hf]'") from error
        self._endpoint = hub.ENDPOINT.rstrip("/")
        self._offline = bool(hub.HF_HUB_OFFLINE)
        self._cache = os.path.join(hub.HF_HUB_CACHE, f"models--{self._place.repo.replace('/', '--')}")
        self.remote = not self._offline

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The files of the commit whose key starts with ``prefix``."""
        files = self._pinned().files
        return (Object(key, files[key].size, files[key].oid) for key in sorted(files) if key.startswith(prefix))

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where the commit has no such file."""
        found = self._file(key)
        return Object(key, found.size, found.oid)

    def reading(self, threads: int) -> int:
        """What TLS takes."""
        return self._wire.reading(self._endpoint, threads)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view`` from the cache, or else from the hub: what a broken connection did not bring is asked again."""
        memory = target(start, view)
        found = self._file(key)
        if start + len(memory) > found.size:
            raise FormatError(f"{self.locate(key)} ends at byte {found.size}, before byte {start + len(memory)}")
        if not memory:
            return
        if self._cached(key, found):
            self._pinned().cache.readinto(key, start, memory)
            return
        large = self._large.setdefault(key, _Large()) if found.large else _Large("")
        used = ""

        def request(first: int, last: int) -> Request:
            nonlocal used
            used = self._elsewhere(key, found, large)
            asked = {"Range": f"bytes={first}-{last}"}
            return Request("GET", used, asked) if used else Request("GET", self._url(key), asked | self._credentials())

        def renewed() -> bool:
            """Signed addresses end: another one is asked for, unless somebody else has done so."""
            with large.lock:
                if large.url == used:
                    large.url = None if used else ""
            return bool(used)

        remote = Remote(
            where=self.locate(key),
            request=request,
            refused=partial(self._refused, key),
            renewed=renewed,
            size=lambda: found.size,
            redirects=_REDIRECTS,
        )
        fill(self._wire, remote, start, memory, again=self._again)

    def borrow(self, key: str) -> mmap.mmap:
        """A file that is in the cache, as memory."""
        if not self._cached(key, self._file(key)):
            return super().borrow(key)
        return self._pinned().cache.borrow(key)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> NoReturn:
        """Refused."""
        raise UsageError(f"{self.uri} is only read: save to a folder, and push that to the hub with hf upload")

    def delete(self, key: str) -> NoReturn:
        """Refused."""
        raise UsageError(f"{self.uri} is only read: nothing on the hub is removed")

    def checksums(self, key: str) -> Mapping[str, str]:
        """The sha256 of a large file; nothing of others. Raises ``NotFound``."""
        found = self._file(key)
        return {"sha256": found.oid} if _SHA256.fullmatch(found.oid) else {}

    def commit(self) -> str:
        """The commit that is read."""
        return self._pinned().commit

    def close(self) -> None:
        """Close connections and files."""
        self._wire.close()
        if self._pin:
            self._pin.cache.close()

    # The commit and its files.

    @property
    def _id(self) -> str:
        return self.uri.partition("://")[2]

    def _pinned(self) -> _Pinned:
        with self._lock:
            if self._pin is None:
                try:
                    self._pin = self._from_cache() if self._offline else self._from_hub()
                except ShardtoolError as error:
                    if not self._bare:
                        raise
                    raise type(error)(f"{self._id} does not exist here, and as a model of the hub: {error}") from error
            return self._pin

    def _file(self, key: str) -> _File:
        check_key(key)
        found = self._pinned().files.get(key)
        if found is None:
            missing = "is not in the cache, and HF_HUB_OFFLINE is set" if self._offline else "does not exist"
            raise NotFound(f"{self.locate(key)} {missing}")
        return found

    def _cached(self, key: str, found: _File) -> bool:
        """Whether the cache has the file: it puts one there when it is whole."""
        try:
            return self._pinned().cache.stat(key).size == found.size
        except (NotFound, UsageError):
            return False

    def _snapshot(self, commit: str) -> LocalStore:
        return LocalStore(os.path.join(self._cache, "snapshots", commit, self._place.folder))

    def _from_cache(self) -> _Pinned:
        revision = self._place.revision or "main"
        commit = revision
        if not _COMMIT.fullmatch(revision) and is_key(revision):
            try:
                with open(os.path.join(self._cache, "refs", revision), encoding="ascii") as file:
                    commit = file.read(64).strip()
            except (OSError, UnicodeDecodeError):
                commit = ""
        cache = self._snapshot(commit)
        if not _COMMIT.fullmatch(commit) or not os.path.isdir(cache.uri):
            raise NotFound(
                f"{self.uri} is not in the cache {os.path.dirname(self._cache)}, and HF_HUB_OFFLINE is set: unset it,"
                f" or fetch the model with hf download {self._place.repo}"
            )

        def known(found: Object) -> _File:
            # A file of the cache is a link to a blob that is called by its hash.
            oid = os.path.basename(os.path.realpath(os.path.join(cache.uri, found.key)))
            return _File(found.size, oid, bool(_SHA256.fullmatch(oid)))

        return _Pinned(self._place.repo, commit, {found.key: known(found) for found in cache.list()}, cache)

    def _from_hub(self) -> _Pinned:
        revision = self._place.revision
        url = f"{self._endpoint}/api/models/{self._place.repo}"
        about = self._asked(url if revision is None else f"{url}/revision/{quote(revision, safe='')}")[0]
        repo, commit = (about.get("id"), about.get("sha")) if isinstance(about, dict) else (None, None)
        if not (isinstance(commit, str) and _COMMIT.fullmatch(commit) and isinstance(repo, str)):
            raise self._strange("no commit")
        if not re.fullmatch(f"{_WORD}/{_WORD}", repo, re.ASCII):
            raise self._strange(f"the name {repo!r:.200}")
        files = dict(self._tree(repo, commit))
        if self._place.folder and not files:
            raise NotFound(f"{self.uri} does not exist: the model has no such folder")
        return _Pinned(repo, commit, files, self._snapshot(commit))

    def _tree(self, repo: str, commit: str) -> Iterator[tuple[str, _File]]:
        above = f"{self._place.folder}/" if self._place.folder else ""
        base = f"{self._endpoint}/api/models/{repo}/tree/{commit}/{quote(above)}".rstrip("/")
        query: str | None = "recursive=true&expand=false"
        count = 0
        while query is not None:
            entries, headers = self._asked(f"{base}?{query}")
            # The address of the next page may be that of another host, such as the one that a mirror mirrors.
            following = _NEXT.search(headers.get("link", ""))
            query = following[1] if following else None
            if not isinstance(entries, list) or (following and not entries):
                raise self._strange("no list of files")
            count += len(entries)
            if count > MOST_FILES:
                raise UsageError(f"{self.uri} holds more than {MOST_FILES} files: name a folder that holds one model")
            for entry in entries:
                if isinstance(entry, dict) and entry.get("type") == "file":
                    path = entry.get("path")
                    if isinstance(path, str) and path.startswith(above) and is_key(path.removeprefix(above)):
                        yield path.removeprefix(above), self._entry(entry)

    def _entry(self, entry: Mapping[str, Any]) -> _File:
        large = entry.get("lfs")
        said = {"size": entry.get("size"), "oid": entry.get("oid"), **(large if isinstance(large, dict) else {})}
        size, oid = said["size"], said["oid"]
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62 or not isinstance(oid, str):
            raise self._strange(f"no size of {entry.get('path')!r:.200}")
        return _File(size, oid[:128], isinstance(large, dict))

    def _strange(self, what: str) -> FormatError:
        return FormatError(f"{self._endpoint} says {what} for {self.uri}, as no hub does: check HF_ENDPOINT")

    # Requests.

    def _asked(self, url: str) -> tuple[Any, Mapping[str, str]]:
        """An answer of the API, and its headers."""

        def ask(_: int) -> tuple[Any, Mapping[str, str]]:
            answer = self._wire.send(
                Request("GET", url, self._credentials()), where=self.uri, limit=_MOST_ANSWER, redirects=_REDIRECTS
            )
            if answer.status != 200:
                raise self._refused("", answer)
            try:
                return json.loads(answer.body), answer.headers
            except (ValueError, RecursionError):
                if "json" not in answer.headers.get("content-type", ""):
                    raise self._strange("what is not JSON") from None
                raise Unavailable(f"the list of the files of {self.uri} came damaged: try again") from None

        return self._again.run(ask)

    def _refused(self, key: str, answer: Answer) -> ShardtoolError:
        elsewhere = _origin(answer.url) != _origin(self._endpoint)
        where = self.locate(key) if key else self.uri
        return refused(answer, where, f"{self._endpoint}/{self._place.repo}", elsewhere=elsewhere)

    def _elsewhere(self, key: str, found: _File, large: _Large) -> str:
        """The signed address of a large file, asked for once for all threads; nothing if it is the hub that has it."""
        began = time.monotonic()
        with large.lock:
            if large.url is None:
                if large.failure and large.since > began:
                    raise large.failure  # of somebody for whom this thread has waited
                try:
                    large.url = self._signed(key, found)
                    large.failure = None
                except ShardtoolError as error:
                    large.failure, large.since = error, time.monotonic()
                    raise
            return large.url

    def _signed(self, key: str, found: _File) -> str:
        """Ask the hub where a large file is; the answer may be that it has it itself."""
        url = self._url(key)
        answer = self._head(key, url)
        said = answer.headers.get("x-linked-etag", "").removeprefix("W/").strip('"')
        if said not in ("", found.oid):
            raise Replaced(f"{self.locate(key)} was replaced while it was read: start again")
        to = urljoin(url, answer.headers.get("location", "")) if answer.status in _MOVED else url
        # A redirect from https to http is left to the wire, which refuses it.
        trusted = urlsplit(to).scheme in ("https", urlsplit(url).scheme)
        return to if trusted and _origin(to) != _origin(url) else ""

    def _head(self, key: str, url: str) -> Answer:
        answer = self._wire.send(Request("HEAD", url, self._credentials()), where=self.locate(key))
        if answer.status not in (200, *_MOVED):
            raise self._refused(key, answer)
        return answer

    def _url(self, key: str) -> str:
        pinned = self._pinned()
        path = f"{self._place.folder}/{key}" if self._place.folder else key
        return f"{self._endpoint}/{pinned.repo}/resolve/{pinned.commit}/{quote(path)}"

    def _credentials(self) -> dict[str, str]:
        """The token as huggingface_hub has it now: it renews those that end."""
        import huggingface_hub
        from huggingface_hub import constants

        if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            return {}
        try:
            token = huggingface_hub.get_token()
        except Exception as error:  # of whatever it asks for a token, which is not listed
            raise AccessDenied(f"huggingface_hub has no token for {self.uri} ({error}): run hf auth login") from error
        return {"Authorization": f"Bearer {token}"} if token else {}


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
