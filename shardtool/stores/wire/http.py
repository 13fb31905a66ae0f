"""HTTP for every store: one room through which all requests and bodies go, written for ranges of many megabytes.

::

    wire = Wire()
    answer = wire.send(Request("GET", url, headers), where="s3://b/key")        small: status, headers, body
    with wire.open(Request("GET", url, headers), where="s3://b/key") as reply:  large: the body straight into memory
        while count := reply.readinto(view): ...

    Wire ── Lanes of the host ── a pooled Link, or a new one ── request, body ── Reply

What fails below HTTP is ``Unavailable`` (cut, silent, slow, not reachable) or a ``StoreError`` (not to be trusted).
What a status means is the store's business; nothing is tried again here but a GET on a connection that the server had
closed meanwhile. A URL may bear a signature, so messages say ``where`` instead, never the URL.
"""

from __future__ import annotations

import os
import ssl
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Self
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from shardtool import __version__
from shardtool.errors import FormatError, StoreError, Unavailable, UsageError
from shardtool.stores.address import shown
from shardtool.stores.base import Buffer, octets
from shardtool.stores.wire import message
from shardtool.stores.wire.link import Link, Pace, Proxy, connect, reason, unreached
from shardtool.stores.wire.message import Chunks, Garbled, Head
from shardtool.stores.wire.retry import Lane, Lanes
from shardtool.stores.wire.tls import HELD

_PORTS = {"http": 80, "https": 443}
_CHUNKED = 1 << 20  # bytes taken at once of a body without a length
_IDLE = 20.0  # seconds after which a connection is rather made anew than used again
_ELSEWHERE = frozenset(
    {"accept", "accept-encoding", "if-match", "if-none-match", "if-range", "if-unmodified-since", "range", "user-agent"}
)  # the headers that a server may see to which another one has redirected
_LARGE = 64 << 10  # bytes of a body from which on it goes over a connection that is made for sending
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: ``url`` whole and quoted, with its query; ``headers`` as they were signed.

    ``Host``, ``Content-Length``, ``User-Agent`` and ``Accept-Encoding: identity`` are added where they lack.
    """

    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply whose body was small: ``headers`` by names in small letters, ``url`` the one that answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    url: str = field(default="", repr=False)


class Wire(AbstractContextManager["Wire"]):
    """Connections to any number of servers, for any number of threads.

    ``ca_bundle``: a file or folder of certificates in place of the system's (``SSL_CERT_FILE`` is known to OpenSSL).
    ``pace``: how long to wait. ``most``: requests under way at one server at most, however many threads there are.
    Proxies are those of the environment when the object is made: ``HTTPS_PROXY``, ``HTTP_PROXY``, ``NO_PROXY``.
    """

    def __init__(self, *, ca_bundle: str | None = None, pace: Pace = Pace(), most: int = 256) -> None:  # noqa: B008
        self.pace = pace
        self._ca_bundle = ca_bundle
        self._most = most
        self._proxies = getproxies()
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._idle: dict[tuple[tuple[str, str, int], bool], list[Link]] = {}
        self._lanes: dict[tuple[str, str, int], Lanes] = {}

    def send(
        self,
        request: Request,
        body: Buffer = b"",
        *,
        where: str,
        limit: int = 1 << 20,
        within: float | None = None,
        redirects: int = 0,
    ) -> Answer:
        """Ask, and take a small answer: more than ``limit`` bytes are a ``FormatError``; an error's text is cut there.

        ``within``: seconds from the end of the request to the end of the answer, however silent the server is until
        then; without it the pace's ``silence``. ``redirects``: how many are followed.
        """
        within = self.pace.silence if within is None else within
        with self.open(request, body, where=where, within=within, redirects=redirects) as reply:
            return Answer(reply.status, reply.headers, reply.read(limit), reply.url)

    def open(
        self, request: Request, body: Buffer = b"", *, where: str, within: float | None = None, redirects: int = 0
    ) -> Reply:
        """Ask, and give the reply as soon as its head is there. It must be closed, best by ``with``.

        A reply that comes while the body is still being sent ends the sending. ``within`` as for ``send``; without it
        the body may take as long as it comes at the wire's pace. A redirect is only followed for GET and HEAD, with
        credentials to the same server alone, and never from https to http.
        """
        memory = octets(body)
        reply = self._open(request, memory, where, within)
        for _ in range(redirects):
            if reply.status not in _REDIRECTS or request.method not in ("GET", "HEAD"):
                break
            with reply:
                request = _redirected(request, reply.headers.get("location", ""), where)
            reply = self._open(request, memory, where, within)
        return reply

    def lanes(self, url: str) -> Lanes:
        """The requests under way at a URL's server."""
        with self._lock:
            self._expect_own()
            return self._lanes.setdefault(_server(url), Lanes(self._most))

    def reading(self, url: str, threads: int) -> int:
        """Bytes of memory that bodies take on their way in so many threads: TLS holds what has come of each."""
        return threads * HELD if url.startswith("https:") else 0

    def close(self) -> None:
        """Close all idle connections; the object may be used again."""
        with self._lock:
            links = [link for idle in self._idle.values() for link in idle]
            self._idle.clear()
        for link in links:
            link.shut()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        bundle = self._ca_bundle
        try:
            if bundle:
                folder = os.path.isdir(bundle)
                made = ssl.create_default_context(cafile=None if folder else bundle, capath=bundle if folder else None)
            else:
                made = ssl.create_default_context()
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"the CA bundle {bundle} cannot be read ({reason(error)}): correct its path") from error
        made.set_alpn_protocols(["http/1.1"])
        return made

    def _open(self, request: Request, body: memoryview, where: str, within: float | None) -> Reply:
        server = _server(request.url)
        holding = self.lanes(request.url).lane(self.pace.silence)
        lane = holding.__enter__()
        try:
            while True:
                link = self._link(server, where, sending=server[0] == "https" and len(body) > _LARGE)
                try:
                    return Reply(
                        self,
                        link,
                        server,
                        holding,
                        lane,
                        _asked(self, link, request, body, where, within),
                        request,
                        where,
                    )
                except BaseException as error:
                    link.shut()
                    if isinstance(error, ValueError):  # its text may have what is signed
                        raise _unaskable(where) from None
                    if not isinstance(error, OSError | Garbled):
                        raise
                    if link.reused and request.method in ("GET", "HEAD") and not isinstance(error, TimeoutError):
                        continue
                    raise unavailable(error, where) from error
        except BaseException:
            holding.__exit__(None, None, None)
            raise

    def _link(self, server: tuple[str, str, int], where: str, *, sending: bool) -> Link:
        """An idle connection that is still good, or a new one. ``sending``: one that is made for that."""
        while link := self._taken(server, sending):
            if time.monotonic() - link.quiet_since < _IDLE and not link.stale():
                link.reused = True
                return link
            link.shut()
        scheme, host, port = server
        proxy = self._proxy(server)
        tls = self._tls if scheme == "https" else None
        try:
            if proxy and not tls:
                return connect(proxy.host, proxy.port, self.pace, where=where)
            return connect(host, port, self.pace, where=where, tls=tls, tunnel=proxy, sending=sending)
        except (OSError, Garbled) as error:
            raise unreached(where, host, port, error, proxy=proxy) from error
        except ValueError:
            raise _unaskable(where) from None

    def _taken(self, server: tuple[str, str, int], sending: bool) -> Link | None:
        with self._lock:
            self._expect_own()
            idle = self._idle.get((server, sending))
            return idle.pop() if idle else None

    def _expect_own(self) -> None:
        """A process that was forked off has neither the connections of its parent nor the requests that are on them."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._idle.clear()
            self._lanes.clear()

    def _give_back(self, server: tuple[str, str, int], link: Link) -> None:
        link.quiet_since = time.monotonic()
        with self._lock:
            self._idle.setdefault((server, link.sending), []).append(link)

    def _proxy(self, server: tuple[str, str, int]) -> Proxy | None:
        scheme, host, port = server
        address = self._proxies.get(scheme) or self._proxies.get("all")
        return Proxy.of(address) if address and not proxy_bypass(f"{host}:{port}") else None


class Reply(AbstractContextManager["Reply"]):
    """A reply whose body has not been read: ``status``, ``headers`` by names in small letters, and then the body.

    ``length``: the body's size in bytes, or None where the server does not say. ``url``: the one that answered, after
    redirects. The connection is used again if the body was read whole.
    """

    def __init__(
        self,
        wire: Wire,
        link: Link,
        server: tuple[str, str, int],
        holding: AbstractContextManager[Lane],
        lane: Lane,
        head: Head,
        request: Request,
        where: str,
    ) -> None:
        self.status = head.status
        self.headers = head.headers
        self.url = request.url
        self.length = head.length
        self._wire = wire
        self._link = link
        self._server = server
        self._holding = holding
        self._lane = lane
        self._closes = head.closes
        self._chunks = Chunks(link) if head.chunked else None
        self._where = where
        self._method = request.method
        self._left = head.length
        self._open = True
        if self._left == 0:
            self._expect_end()

    def readinto(self, view: memoryview) -> int:
        """Read the next bytes into ``view`` (of single bytes): one or more, or 0 at the end of the body.

        A body that ends before its length is ``Unavailable``, like all else that happens to a connection.
        """
        if self._left == 0 or not view:
            return 0
        try:
            count = self._next(view)
        except (OSError, Garbled, ValueError) as error:
            raise unavailable(error, self._where) from error
        if count == 0 and self._left:
            raise Unavailable(f"the connection to the server of {self._where} ended early: try again")
        return count

    def read(self, limit: int) -> bytes:
        """What is left of the body. Of more than ``limit`` bytes an error is cut, and all else is a ``FormatError``."""
        data, got = bytearray(min(limit, 65536 if self._left is None else self._left) + 1), 0
        while count := self.readinto(memoryview(data)[got:]):
            got += count
            if got > limit:
                if self.status < 300:
                    raise FormatError(f"the answer for {self._where} is longer than {limit} bytes")
                return bytes(data[:limit])
            if got == len(data):
                data += bytes(min(len(data), limit + 1 - len(data)))
        return bytes(data[:got])

    def close(self) -> None:
        """Give the connection back if it can be used again, and close it otherwise."""
        if not self._open:
            return
        self._open = False
        whole = self._left == 0
        self._lane.ended(self.status)
        self._holding.__exit__(None, None, None)
        if whole and not self._closes and self._link.clean:
            self._wire._give_back(self._server, self._link)
        else:
            self._link.shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, view: memoryview) -> int:
        if self._left is None:
            count = (self._chunks or self._link).receive(view[:_CHUNKED])
            if not count:
                self._left = 0
                if self._chunks:
                    self._expect_end()
            return count
        count = self._link.receive(view[: self._left])
        self._left -= count
        if not self._left:
            self._expect_end()
        return count

    def _expect_end(self) -> None:
        """Nobody has asked for what follows a body: its length was wrong, and then so is the body."""
        if self._link.says_more():
            self._link.clean = False
            if self.status < 300 and self._method != "HEAD":
                raise Garbled("it sends more than it says")


def _unaskable(where: str) -> UsageError:
    return UsageError(
        f"{where} cannot be asked for: its address or what proves who we are has a character that HTTP does not allow,"
        " such as a space or the end of a line; correct it"
    )


def unavailable(error: BaseException, where: str) -> Unavailable:
    """What an error of a connection means."""
    if isinstance(error, TimeoutError):
        return Unavailable(f"the server of {where} is silent or too slow ({reason(error)}): try again")
    return Unavailable(f"the connection to the server of {where} broke ({reason(error)}): try again")


def _asked(wire: Wire, link: Link, request: Request, body: memoryview, where: str, within: float | None) -> Head:
    """Send a request over a connection and read the head of the answer."""
    parts = urlsplit(request.url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    server = _server(request.url)
    headers = {"User-Agent": f"shardtool/{__version__}", "Accept-Encoding": "identity"}
    names = {name.lower() for name in request.headers}
    headers = {name: value for name, value in headers.items() if name.lower() not in names} | dict(request.headers)
    if "host" not in names:
        headers["Host"] = parts.netloc.rpartition("@")[2]
    if "content-length" not in names and (body or request.method in ("PUT", "POST")):
        headers["Content-Length"] = str(len(body))
    proxy = wire._proxy(server) if parts.scheme == "http" else None
    if proxy:
        target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
        if proxy.credentials:
            headers["Proxy-Authorization"] = proxy.credentials
    head = message.request(request.method, target, headers)
    sys.audit("shardtool.request", request.method)
    link.expect()
    link.sendall(head)
    whole = True
    if body:
        try:
            whole = link.send(body)
        except (BrokenPipeError, ConnectionResetError):
            whole = False  # it may have said why
    link.expect(wire.pace.silence if within is None else within)
    answer = message.answer(link, request.method)
    if within is None:
        link.expect()
    link.clean = whole
    return answer


def _redirected(request: Request, location: str, where: str) -> Request:
    url = urljoin(request.url, location)
    if not location or not url.startswith(("http://", "https://")):
        raise StoreError(f"the server of {where} redirects to an address that is none")
    old, new = _server(request.url), _server(url)
    if old[0] == "https" and new[0] == "http":
        raise StoreError(
            f"the server of {where} redirects from https to http, which nobody can trust: use another address"
        )
    headers = request.headers
    if new != old:
        headers = {name: value for name, value in headers.items() if name.lower() in _ELSEWHERE}
    else:
        headers = {name: value for name, value in headers.items() if name.lower() != "host"}
    return Request(request.method, url, headers)


def _server(url: str) -> tuple[str, str, int]:
    """Scheme, host and port."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"an address is none ({error}): correct it") from error
    if parts.scheme not in _PORTS or not host:
        raise UsageError(f"{shown(url)!r} is no address of a web server: write https://host/path")
    return parts.scheme, host, port or _PORTS[parts.scheme]
