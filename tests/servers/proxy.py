"""A proxy that makes the answers of an HTTP server go wrong."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


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
    claims that a range was not a range.
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


class Proxy:
    """A proxy in front of an HTTP server of this machine. Use as a context manager; ``trouble`` says what it does."""

    def __init__(self, upstream: str) -> None:
        host, port = urlsplit(upstream).hostname or "", urlsplit(upstream).port or 80
        self.trouble = trouble = Trouble()

        class Handler(_Handler):
            def setup(self) -> None:
                super().setup()
                self.trouble = trouble
                self.upstream = (host, port)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    trouble: Trouble
    upstream: tuple[str, int]

    def log_message(self, *_: object) -> None:
        """Tests look at ``Trouble.seen`` instead."""

    def _serve(self) -> None:
        method, trouble = self.command, self.trouble
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with trouble.lock:
            trouble.seen.append(Request(method, self.path, self.headers.get("Range", "")))
        if trouble.takes("lost", method):
            self._ask(method, body)
            self.close_connection = True
            return
        if trouble.takes("refused", method):
            text = f"<?xml version='1.0'?><Error><Code>{trouble.code}</Code><Message>no</Message></Error>".encode()
            self._answer(trouble.status, [("Content-Type", "application/xml")], text, len(text))
            return
        status, headers, data = self._ask(method, body)
        announced = next((int(value) for name, value in headers if name.lower() == "content-length"), len(data))
        if data and trouble.takes("cuts", method):
            data = data[: trouble.cut_after]
        if trouble.answer_200 and status == 206:
            status, headers = 200, [item for item in headers if item[0].lower() != "content-range"]
        self._answer(status, headers, data, announced)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815 - the standard library chooses these names

    def _ask(self, method: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        dropped = {"expect", "connection"} | ({"range"} if self.trouble.ignore_ranges else set())
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            connection.request(method, self.path, body or None, headers)
            with connection.getresponse() as response:
                return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, announced: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            if len(data) < announced:
                self.wfile.flush()
                self.close_connection = True
                if self.trouble.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
