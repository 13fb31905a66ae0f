"""A proxy that makes the answers of an HTTP server go wrong, and one that cuts whatever goes through it.

::

    Proxy(upstream)               what ``trouble`` says: exact, for tests of one thing
    Proxy(upstream, Weather(7))   what a seed says: hundreds of runs, each one different and each one the same again
    Pipe(host, port, plan)        below HTTP: bytes of any protocol, in both directions
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tests.servers.weather import Fault, Weather

Headers = list[tuple[str, str]]
_PATIENCE = 60.0  # seconds that the server behind a proxy may take


@dataclass(frozen=True)
class Request:
    """A request that a proxy has seen."""

    method: str
    path: str
    range: str = ""


@dataclass
class Trouble:
    """What a proxy does to requests; may be changed while it runs.

    It happens to requests of one of the ``methods``. The next ``lost`` reach the server, but their answers do not come
    back. Then the next ``refused`` are answered with ``status`` and ``code``, and the bodies of the next ``cuts`` end
    after ``cut_after`` bytes, by a reset if ``reset``. ``ignore_ranges`` asks for whole objects, and ``answer_200``
    claims that a range was not a range. ``changed``: objects whose path ends so are others from now on.
    """

    methods: tuple[str, ...] = ("GET", "PUT", "POST", "HEAD", "DELETE")
    refused: int = 0
    status: int = 503
    code: str = "SlowDown"
    cuts: int = 0
    cut_after: int = 0
    reset: bool = False
    lost: int = 0
    ignore_ranges: bool = False
    answer_200: bool = False
    changed: str = ""
    seen: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def takes(self, name: str, method: str) -> bool:
        """Whether this request gets the trouble of that name; counts it down."""
        with self.lock:
            left = getattr(self, name)
            if not left or method not in self.methods:
                return False
            setattr(self, name, left - 1)
            return True


class _UnderWay:
    """The requests that are at the server behind a proxy."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def end(self) -> None:
        """Wait until there is none."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._count, 2 * _PATIENCE), (
                "the server behind a proxy says nothing"
            )


class Proxy:
    """A proxy in front of an HTTP server of this machine. Use as a context manager; ``trouble`` says what it does.

    ``weather``: chosen by its seed, besides. ``delay``: seconds that every request takes longer. When it has ended, so
    has all that it asked the server for: what a client gave up does not change anything later.
    """

    def __init__(self, upstream: str, weather: Weather | None = None, *, delay: float = 0.0) -> None:
        host, port = urlsplit(upstream).hostname or "", urlsplit(upstream).port or 80
        self.trouble = trouble = Trouble()
        self.weather = weather
        proxy = self
        self.delay = delay
        self._under_way = _UnderWay()

        class Handler(_Handler):
            def setup(self) -> None:
                super().setup()
                self.trouble = trouble
                self.weather = proxy.weather
                self.delay = proxy.delay
                self.upstream = (host, port)
                self.under_way = proxy._under_way

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._under_way.end()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up: that is what they are here for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    trouble: Trouble
    weather: Weather | None
    delay: float
    upstream: tuple[str, int]
    under_way: _UnderWay

    def log_message(self, *_: object) -> None:
        """Tests look at ``Trouble.seen`` instead."""

    def _serve(self) -> None:
        method, trouble = self.command, self.trouble
        asked: str = self.headers.get("Range") or self.headers.get("x-ms-range") or ""
        fault = self.weather.fault(method, _thing(self.path), ranged=bool(asked)) if self.weather else None
        length = int(self.headers.get("Content-Length") or 0)
        time.sleep(self.delay)
        if fault and fault.kind in ("cut request", "deaf"):
            self.rfile.read(int(length * fault.share) if fault.kind == "cut request" else 0)
            self._end(fault, after=fault.seconds if fault.kind == "deaf" else 0)
            return
        body = self.rfile.read(length)
        if len(body) < length:  # whoever sent it has given up; the server would wait for the rest
            self.close_connection = True
            return
        with trouble.lock:
            trouble.seen.append(Request(method, self.path, asked))
        if trouble.takes("lost", method):
            self._ask(method, body)
            self.close_connection = True
            return
        if trouble.takes("refused", method):
            self._refuse(trouble.status, trouble.code)
            return
        if fault:
            self._go_wrong(fault, method, body, asked)
            return
        status, headers, data = self._ask(method, body)
        announced = next((int(value) for name, value in headers if name.lower() == "content-length"), len(data))
        if data and trouble.takes("cuts", method):
            data = data[: trouble.cut_after]
        if trouble.answer_200 and status == 206:
            status, headers = 200, [item for item in headers if item[0].lower() != "content-range"]
        self._answer(status, headers, data, announced)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815 - the standard library chooses these names

    def _go_wrong(self, fault: Fault, method: str, body: bytes, asked: str) -> None:
        """Answer as the weather has it."""
        match fault.kind:
            case "refused" | "burst":
                self._refuse(
                    fault.status, "SlowDown" if fault.status in (429, 503) else "InternalError", fault.retry_after
                )
            case "junk":
                self.wfile.write(b"\x00\xffwhat do you want?\r\n\r\n")
                self._end(fault)
            case "lost" | "late":
                self._ask(method, body)
                self._end(fault, after=fault.seconds if fault.kind == "late" else 0)
            case "whole":
                self._answer(*self._ask(method, body, whole=True))
            case "other range" | "part" if asked.startswith("bytes=") and "-" in asked:
                self._answer(*self._other_range(fault, method, body, asked))
            case "less":
                status, headers, data = self._ask(method, body)
                self._answer(status, headers, data, int(len(data) * fault.share * 0.9))
            case "more":
                status, headers, data = self._ask(method, body)
                self._answer(status, headers, data, len(data) + 1 + int(1000 * fault.share))
            case _:
                self._say(fault, _raw(*self._ask(method, body), head_only=method == "HEAD"))

    def _say(self, fault: Fault, raw: bytes) -> None:
        """Send an answer as it is, or as much of it as shall come."""
        if fault.kind == "slow":
            step = max(1, len(raw) // 12)
            for start in range(0, len(raw), step):
                self.wfile.write(raw[start : start + step])
                time.sleep(0.005)
            return
        self.wfile.write(raw[: min(int(len(raw) * fault.share), len(raw) - 1)])
        if fault.kind == "trickle":
            end = time.monotonic() + fault.seconds
            rest = raw[int(len(raw) * fault.share) : -1]
            for byte in rest:
                if time.monotonic() > end:
                    break
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
        self._end(fault, after=fault.seconds if fault.kind in ("stall", "trickle") else 0)

    def _other_range(self, fault: Fault, method: str, body: bytes, asked: str) -> tuple[int, Headers, bytes]:
        """Fewer bytes than asked for, or others."""
        first, _, last = asked.removeprefix("bytes=").partition("-")
        if not first or not last:
            return self._ask(method, body)
        start, end = int(first), int(last)
        if fault.kind == "part":
            end = start + int((end - start) * fault.share * 0.9)
        else:
            start, end = start + 1, end + 1
        return self._ask(method, body, range=f"bytes={start}-{end}")

    def _ask(self, method: str, body: bytes, *, whole: bool = False, range: str = "") -> tuple[int, Headers, bytes]:
        dropped = {"expect", "connection"} | (
            {"range", "x-ms-range"} if self.trouble.ignore_ranges or whole or range else set()
        )
        connection = http.client.HTTPConnection(*self.upstream, timeout=_PATIENCE)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            if range:
                headers["Range"] = range
            with self.under_way:
                connection.request(method, self.path, body or None, headers)
                with connection.getresponse() as response:
                    found = response.status, response.getheaders(), response.read()
        finally:
            connection.close()
        ends = self.trouble.changed
        return _changed(*found) if ends and urlsplit(self.path).path.endswith(ends) else found

    def _refuse(self, status: int, code: str, retry_after: str = "") -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        headers = [("Content-Type", "application/xml")] + ([("Retry-After", retry_after)] if retry_after else [])
        self._answer(status, headers, text, len(text))

    def _answer(self, status: int, headers: Headers, data: bytes, announced: int | None = None) -> None:
        announced = _length(headers, data) if announced is None else announced
        self.wfile.write(_raw(status, headers, data, announced, head_only=self.command == "HEAD"))
        if self.command != "HEAD" and len(data) < announced:
            self.wfile.flush()
            self.close_connection = True
            if self.trouble.reset:
                self._reset()

    def _end(self, fault: Fault, *, after: float = 0.0) -> None:
        """Close the connection."""
        self.wfile.flush()
        time.sleep(after)
        self.close_connection = True
        if fault.reset:
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def _thing(path: str) -> str:
    """What a request is for, the same in every run: without the bucket, and without ids and signatures."""
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    told: list[str] = [
        f"{name}={query[name][0]}" for name in ("partNumber", "prefix", "comp", "restype", "list-type") if name in query
    ]
    flags: list[str] = [name for name in ("uploads", "uploadId") if name in query]
    return "/".join(parts.path.split("/")[2:]) + "?" + "&".join(told + flags)


def _length(headers: Headers, data: bytes) -> int:
    return next((int(value) for name, value in headers if name.lower() == "content-length"), len(data))


def _raw(status: int, headers: Headers, data: bytes, announced: int | None = None, *, head_only: bool = False) -> bytes:
    """An answer as it goes over the wire."""
    announced = _length(headers, data) if announced is None else announced
    kept = [(n, v) for n, v in headers if n.lower() not in ("content-length", "connection", "transfer-encoding")]
    lines = "".join(f"{name}: {value}\r\n" for name, value in [*kept, ("Content-Length", str(announced))])
    return f"HTTP/1.1 {status} Said\r\n{lines}\r\n".encode("latin-1") + (b"" if head_only else data)


def _changed(status: int, headers: Headers, data: bytes) -> tuple[int, Headers, bytes]:
    """Another object of the same size: every byte of it is different, and so is its ETag."""
    swapped = bytes(byte ^ 0xFF for byte in data) if status in (200, 206) else data
    return status, [(name, '"another"' if name.lower() == "etag" else value) for name, value in headers], swapped


# Below HTTP


@dataclass(frozen=True, slots=True)
class Cut:
    """A connection ends after ``after`` bytes in one direction (``up`` is to the server), ``silent`` seconds later."""

    after: int
    up: bool = False
    silent: float = 0.0
    reset: bool = True


class Pipe:
    """Passes on bytes between clients and a server of this machine. Use as a context manager.

    ``plan(number)`` says what happens to the n-th connection, from 1: nothing, or a ``Cut``.
    """

    def __init__(self, host: str, port: int, plan: Callable[[int], Cut | None] = lambda _: None) -> None:
        self.plan = plan
        self.connections = 0
        self._upstream = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="process_request_thread pipe")
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Pipe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for one in self._open:
            _end(one, reset=False)
        for thread in self._threads:
            thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
            except OSError:
                return
            self.connections += 1
            cut = self.plan(self.connections)
            self._open += [client, server]
            for source, to, up in ((client, server, True), (server, client, False)):
                args = (source, to, cut if cut and cut.up == up else None)
                thread = threading.Thread(target=_pass_on, args=args, name="process_request_thread pipe")
                thread.start()
                self._threads.append(thread)


def _pass_on(source: socket.socket, to: socket.socket, cut: Cut | None) -> None:
    left = cut.after if cut else 1 << 62
    with contextlib.suppress(OSError):
        while _ready(source) and (data := source.recv(1 << 16)):
            to.sendall(data[:left])
            left -= len(data)
            if cut and left <= 0:
                time.sleep(cut.silent)
                _end(source, reset=cut.reset)
                _end(to, reset=cut.reset)
                return
    _end(to, reset=False)


def _ready(source: socket.socket) -> bool:
    """Wait for bytes or the end of the connection; False where the other direction's thread has closed it."""
    with contextlib.suppress(ValueError):
        while source.fileno() >= 0:
            if select.select([source], [], [], 0.1)[0]:
                return True
    return False


def _end(one: socket.socket, *, reset: bool) -> None:
    with contextlib.suppress(OSError):
        if reset:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            one.shutdown(socket.SHUT_RDWR)
    one.close()
