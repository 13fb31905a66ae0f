"""One connection to a server: a socket that knows how long to wait, with TLS and by way of a proxy if need be.

::

    connect ── TCP ── CONNECT to the proxy's server ── TLS ── Link
    Link    ── receive, send    never silent for longer than ``silence``, never slower than ``floor``, never past a
                                deadline: all three are a ``TimeoutError``

Bytes that came before they were asked for, such as those behind a head, are kept, and are the first of the next.

``unreached`` is what every store says where no connection comes about, whichever library has tried to make it.
"""

from __future__ import annotations

import errno
import io
import math
import re
import select
import socket
import ssl
import sys
import time
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from shardtool.errors import AccessDenied, StoreError, Unavailable, UsageError
from shardtool.stores.wire import message
from shardtool.stores.wire.tls import Secure

_SENT = 1 << 20  # offered to the kernel at once, so that an early answer is noticed
_AHEAD = 4096
_GATHERED = 1 << 20  # of a large body the kernel gathers so much before it wakes us, which saves a tenth of all work
_NOT_REACHED = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT})
_PORTS = {"http": 80, "https": 443, "sftp": 22, "ssh": 22, "ftp": 21}
_READ = select.POLLIN | select.POLLHUP | select.POLLERR


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a server may take, in seconds: to take a connection, and to say nothing.

    ``floor``: bytes per second below which an answer or an upload is given up, counted over ``silence`` seconds of
    waiting; 0 for none. So ``n`` bytes never hold a thread for longer than about ``n / floor + 2 * silence`` seconds.
    """

    connect: float = 10.0
    silence: float = 60.0
    floor: int = 8192


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy: where it is, and the value of ``Proxy-Authorization`` or nothing."""

    host: str
    port: int
    credentials: str = field(default="", repr=False)

    @classmethod
    def of(cls, address: str) -> Proxy:
        """What an address such as ``http://user:password@proxy:3128`` says; the scheme may be left out."""
        try:
            parts = urlsplit(address if "://" in address else f"http://{address}")
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host = None
        if not host or parts.scheme != "http":
            raise UsageError("the proxy that the environment names is not an http:// address: correct HTTPS_PROXY")
        credentials = ""
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            credentials = f"Basic {b64encode(pair.encode()).decode()}"
        return cls(host, port, credentials)


class Link:
    """A connection. One thread uses it at a time."""

    def __init__(self, connected: socket.socket | Secure, pace: Pace) -> None:
        self.sending = isinstance(connected, ssl.SSLSocket)
        self.reused = False
        self.quiet_since = 0.0
        self.clean = True
        self._socket = connected
        self._pace = pace
        self._ahead = bytearray()
        self._deadline = math.inf
        self._waited = 0.0
        self._moved = 0
        self._timeout = -1.0
        self._gathered = 1

    def expect(self, within: float | None = None) -> None:
        """Begin to measure anew. With ``within``, all that counts is that everything is over after so many seconds."""
        self._deadline = math.inf if within is None else time.monotonic() + within
        self._waited, self._moved = 0.0, 0

    def receive(self, view: memoryview) -> int:
        """The next bytes into ``view``: at least one, or 0 where the server has closed the connection."""
        if self._ahead:
            count = min(len(view), len(self._ahead))
            view[:count] = self._ahead[:count]
            del self._ahead[:count]
            return count
        return self._more(view)

    def line(self, most: int) -> bytes:
        """Up to the end of a line, or ``most`` bytes, or what there is where the server has closed the connection."""
        searched, end = 0, 0
        while not (end := self._ahead.find(b"\n", searched) + 1) and len(self._ahead) < most:
            searched = len(self._ahead)
            room = bytearray(_AHEAD)
            count = self._more(memoryview(room))
            if not count:
                break
            self._ahead += room[:count]
        line = bytes(self._ahead[: min(end or most, most)])
        del self._ahead[: len(line)]
        return line

    def _more(self, view: memoryview) -> int:
        before = time.monotonic()
        self._wait_at_most(before)
        count = self._received(view)
        self._moved += count
        self._count(time.monotonic() - before)
        return count

    def send(self, data: memoryview) -> bool:
        """Send everything, unless the server answers before: then False, and the answer can be received."""
        sent, poll = 0, select.poll()
        poll.register(self._socket, select.POLLIN | select.POLLOUT)
        self._socket.settimeout(0)
        self._timeout = 0.0
        while sent < len(data) or self._unsent():
            before = time.monotonic()
            ready = poll.poll(self._pace.silence * 1000)
            if not ready:
                raise TimeoutError("it takes no more bytes")
            if ready[0][1] & _READ and self._answered():
                return False
            if ready[0][1] & select.POLLOUT:
                with suppress(BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    count = self._offer(data[sent : sent + _SENT])
                    sent += count
                    self._moved += count
            self._count(time.monotonic() - before)
        return True

    def says_more(self) -> bool:
        """Whether there is a byte that nobody has asked for, as far as can be told at once."""
        if self._ahead:
            return True
        if isinstance(self._socket, Secure):
            self._ahead += self._socket.recv_at_once(_AHEAD)
        elif self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else self.stale():
            room = bytearray(1)
            self._ahead += room[: self.receive(memoryview(room))]
        return bool(self._ahead)

    def stale(self) -> bool:
        """Whether an idle connection has been closed by the server, or says what nobody has asked for."""
        if self._ahead or (isinstance(self._socket, Secure) and self._socket.pending):
            return True
        self._gather(1)  # a poll tells of no less than what is gathered
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def shut(self) -> None:
        """Close the connection."""
        self._socket.close()

    def file(self) -> io.BufferedReader:
        """The received bytes as a file."""
        return io.BufferedReader(_Received(self))

    def sendall(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it, such as the head of a request."""
        self._wait_at_most(time.monotonic())
        self._socket.sendall(data)

    def _wait_at_most(self, now: float) -> None:
        left = self._pace.silence if self._deadline == math.inf else self._deadline - now
        if left <= 0:
            raise TimeoutError("it takes too long")
        if left != self._timeout:
            self._socket.settimeout(left)
            self._timeout = left

    def _received(self, view: memoryview) -> int:
        self._gather(min(_GATHERED, len(view)) if len(view) > _GATHERED // 8 else 1)
        try:
            return self._socket.recv_into(view)
        except TimeoutError:
            if self._gathered == 1:
                raise
            self._gather(1)  # what has come although it is not much
            self._socket.settimeout(0)
            self._timeout = 0.0
            with suppress(BlockingIOError):
                return self._socket.recv_into(view)
            raise

    def _gather(self, count: int) -> None:
        """Let the kernel wake us when so many bytes have come, or the connection has ended."""
        if count != self._gathered and type(self._socket) is socket.socket and sys.platform == "linux":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._gathered = count

    def _offer(self, data: memoryview) -> int:
        """How many more bytes the connection takes. What TLS has made of earlier ones goes first."""
        if isinstance(self._socket, Secure) and self._socket.unsent():
            self._socket.push()
            return 0
        return self._socket.send(data)

    def _unsent(self) -> bool:
        return isinstance(self._socket, Secure) and self._socket.unsent()

    def _count(self, waited: float) -> None:
        """A connection that trickles is as good as a silent one."""
        self._waited += waited
        if self._waited > self._pace.silence and self._deadline == math.inf:
            if self._moved < self._pace.floor * self._waited:
                raise TimeoutError(f"only {self._moved} bytes in {self._waited:.0f} seconds")
            self._waited, self._moved = 0.0, 0

    def _answered(self) -> bool:
        """Whether the server has said something; what TLS says to itself does not count."""
        try:
            said = self._socket.recv(_AHEAD)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        if not said:
            raise ConnectionResetError("it closed the connection")
        self._ahead += said
        return True


class _Received(io.RawIOBase):
    def __init__(self, link: Link) -> None:
        self._link = link

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._link.receive(memoryview(buffer))


def connect(
    host: str,
    port: int,
    pace: Pace,
    *,
    where: str,
    tls: ssl.SSLContext | None = None,
    tunnel: Proxy | None = None,
    sending: bool = False,
) -> Link:
    """A new connection to a server: with TLS if a context is given, through a proxy's CONNECT if one is given.

    ``sending``: large bodies will go over it: then Python's own TLS takes less, since it encrypts into the socket.

    An ``OSError`` where there is none; a server that cannot be trusted is a ``StoreError``, a proxy that refuses an
    ``AccessDenied``. ``where`` is what people are told that they asked for.
    """
    at = (tunnel.host, tunnel.port) if tunnel else (host, port)
    connected = socket.create_connection(at, timeout=pace.connect)
    try:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
            if option := getattr(socket, name, 0):
                connected.setsockopt(socket.IPPROTO_TCP, option, 30)
        if tunnel:
            _through(connected, tunnel, host, port, pace, where)
        if tls:
            connected.settimeout(pace.connect)
            return Link(_trusted(connected, tls, host, where, sending=sending), pace)
    except BaseException:
        connected.close()
        raise
    return Link(connected, pace)


def unreached(
    where: str, host: str, port: int | None, error: BaseException, *, proxy: Proxy | None = None
) -> Unavailable:
    """What it means that no connection to the server of ``where`` came about. ``port``: None if it is not known."""
    at = f"[{host}]" if ":" in host else host
    at = f"{at}:{port}" if port else at
    by = f" by way of the proxy {proxy.host}:{proxy.port}" if proxy else ""
    return Unavailable(
        f"the server of {where} cannot be reached at {at}{by} ({reason(error)}): check that it runs, its address and"
        " the network"
    )


def server_of(address: str) -> tuple[str, int | None]:
    """The host that an address names, and its port or that of its scheme, for ``unreached``."""
    try:
        parts = urlsplit(address)
        return parts.hostname or "its address", parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return "its address", None


def no_connection(error: BaseException) -> bool:
    """Whether an error, or one that it is made of, says that no connection came about."""
    cause = _cause(error)
    return isinstance(cause, socket.gaierror) or (isinstance(cause, OSError) and cause.errno in _NOT_REACHED)


def reason(error: BaseException) -> str:
    """What went wrong, in the words of the system where it is the system's error, as one short line."""
    cause = _cause(error)
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    text = re.sub(r"\s*\[Errno -?\d+\]\s*", ": ", str(text)).lstrip(": ")  # of the system's within a library's
    return " ".join(re.sub(r"\[SSL[^]]*\]|\(?_ssl\.c:\d+\)?:?", "", text).split())[:200].rstrip(".")


def _cause(error: BaseException) -> BaseException:
    """The error of the system under those that libraries make of it; the error itself where there is none."""
    seen = [error]
    for found in seen:
        if isinstance(found, OSError) and (found.errno is not None or type(found).__module__ == "builtins"):
            return found
        made: list[object] = [found.__cause__, getattr(found, "reason", None), *found.args]
        for name in ("kwargs", "errors"):  # botocore's, paramiko's
            more = getattr(found, name, None)
            made += more.values() if isinstance(more, dict) else ()
        seen += [other for other in made if isinstance(other, BaseException) and other not in seen]
    return error


def _through(connected: socket.socket, proxy: Proxy, host: str, port: int, pace: Pace, where: str) -> None:
    """Ask a proxy to connect to the server."""
    link = Link(connected, pace)
    link.expect(pace.connect + pace.silence)
    server = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    headers = {"Host": server, **({"Proxy-Authorization": proxy.credentials} if proxy.credentials else {})}
    link.sendall(message.request("CONNECT", server, headers))
    status = message.answer(link, "CONNECT").status
    said = f"the proxy {proxy.host}:{proxy.port} says {status} to a connection for {where}"
    if status in (401, 403, 407):
        raise AccessDenied(f"{said}: check its user and password in HTTPS_PROXY, and whether it allows this server")
    if status >= 500:
        raise Unavailable(f"{said}: try again")
    if not 200 <= status < 300:
        raise StoreError(f"{said}: check HTTPS_PROXY")


def _trusted(
    connected: socket.socket, tls: ssl.SSLContext, host: str, where: str, *, sending: bool
) -> Secure | ssl.SSLSocket:
    """Speak TLS from here on."""
    try:
        if sending:
            return tls.wrap_socket(connected, server_hostname=host)
        return Secure(connected, tls, host)
    except ssl.SSLCertVerificationError as error:
        text = error.verify_message.rstrip(".") or "its certificate is not valid"
        raise StoreError(
            f"the server of {where} cannot be trusted ({text}): if its authority is your own, name its certificate in"
            " SSL_CERT_FILE"
        ) from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise
    except ssl.SSLError as error:
        text = (error.reason or "TLS failed").replace("_", " ").lower()
        raise StoreError(
            f"the server of {where} does not speak TLS as it should ({text}): check the address"
        ) from error
