"""Servers for tests: a real S3 server in a process of its own, and a proxy that makes its answers go wrong.

A plug-in of pytest (``tests/conftest.py`` names it), so any test may ask for these fixtures::

    s3_server   the server, started once per session when it is first asked for
    bucket      the name of a new bucket on it; boto3's environment points there for this test
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

STARTS_WITHIN = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server and how to reach it."""

    endpoint: str
    environ: dict[str, str]
    """What boto3 needs in the environment, for child processes too."""

    @cached_property
    def client(self) -> Any:
        """A boto3 client of this server, whatever the environment says."""
        import boto3.session
        from botocore.config import Config

        session = boto3.session.Session(self.environ["AWS_ACCESS_KEY_ID"], self.environ["AWS_SECRET_ACCESS_KEY"])
        config = Config(s3={"addressing_style": "path"})
        return session.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", config=config)

    def bucket(self, patch: pytest.MonkeyPatch) -> str:
        """Make a bucket that nobody else uses, and point boto3's environment to this server until ``patch`` ends."""
        name = f"test-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        for variable, value in self.environ.items():
            patch.setenv(variable, value)
        return name


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A moto server on a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with tempfile.TemporaryDirectory(prefix="moto-") as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | environ | {"TMPDIR": folder},
                start_new_session=True,
            )
        try:
            _wait_for(process, port, log)
            server = S3Server(environ["AWS_ENDPOINT_URL"], environ)
            yield server
            server.client.close()
        finally:
            _stop(process)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket; ``S3Store(f"s3://{bucket}/folder")`` finds it."""
    return s3_server.bucket(monkeypatch)


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"the server did not start; the end of its log:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        else:
            break
    process.wait()


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
