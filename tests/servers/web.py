"""Web servers: nginx with folders of files, a server that says what it is told, and a proxy for CONNECT."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.servers.process import free_port, program, running

NGINX = """
{user} worker_processes 1; daemon off; pid nginx.pid; error_log stderr;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; autoindex_exact_size on; disable_symlinks off; server_tokens off;
  client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;
  types {{ }} default_type application/octet-stream; root {root};
  server {{ listen 127.0.0.1:{json}; location / {{ autoindex on; autoindex_format json; }} }}
  server {{ listen 127.0.0.1:{page}; location / {{ autoindex on; }} }}
  server {{ listen 127.0.0.1:{bare}; }}
  server {{ listen 127.0.0.1:{password}; auth_basic x; auth_basic_user_file users;
            location / {{ autoindex on; autoindex_format json; }} }}
  server {{ listen 127.0.0.1:{tls} ssl; ssl_certificate tls.pem; ssl_certificate_key tls.pem;
            location / {{ autoindex on; autoindex_format json; }} }}
}}
"""


@dataclass(frozen=True)
class Web:
    """A running nginx: a folder, and the addresses under which it is served.

    ``json`` and ``page`` list their files in that form, ``bare`` does not; ``password`` wants ``user`` and ``secret``,
    ``tls`` has a certificate of ``authority``.
    """

    root: Path
    authority: Path
    json: str
    page: str
    bare: str
    password: str
    tls: str


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """An nginx on free ports of the loopback interface."""
    nginx = program("nginx", "apt-get install nginx-light")
    folder = tmp_path_factory.mktemp("web")
    root, authority = folder / "files", certificate(folder / "tls.pem")
    root.mkdir()
    (folder / "t").mkdir()
    (folder / "users").write_text("user:{PLAIN}secret\n")
    ports = {name: free_port() for name in ("json", "page", "bare", "password", "tls")}
    user = "user root;" if os.geteuid() == 0 else ""  # whoever starts it can read the files, its workers shall too
    (folder / "nginx.conf").write_text(NGINX.format(user=user, root=root, **ports))
    with running([nginx, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"], ports["tls"]):
        addresses = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        yield Web(root, authority, **{**addresses, "tls": f"https://localhost:{ports['tls']}"})


def certificate(path: Path, *names: str) -> Path:
    """Make a key with a certificate for this machine, or for others; gives the certificate of its authority."""
    import trustme

    authority = trustme.CA()
    made = authority.issue_cert(*(names or ("localhost", "127.0.0.1")))
    made.private_key_and_cert_chain_pem.write_to_path(str(path))
    path.chmod(0o600)
    authority.cert_pem.write_to_path(str(path.with_suffix(".ca.pem")))
    return path.with_suffix(".ca.pem")


# A server that says what it is told.

Say = bytes | Callable[["Visit"], None]


@dataclass
class Visit:
    """A request at a ``Scripted`` server: its head, what its connection is, and its body as far as it was read."""

    connection: socket.socket
    head: bytes
    body: bytes = b""

    def say(self, data: bytes) -> None:
        """Send bytes."""
        self.connection.sendall(data)

    def reset(self) -> None:
        """End the connection by a reset: what was sent and not read yet is lost."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    @property
    def line(self) -> str:
        """The request line."""
        return self.head.split(b"\r\n")[0].decode()

    @property
    def headers(self) -> dict[str, str]:
        """The headers by names in small letters."""
        lines = (line.partition(":") for line in self.head.decode("latin-1").split("\r\n")[1:] if line)
        return {name.lower(): value.strip() for name, _, value in lines}


def reply(status: int, body: bytes = b"", **headers: str | int) -> bytes:
    """A reply with a ``Content-Length``, unless ``headers`` say another one; ``_`` in a name stands for ``-``."""
    said = {"Content-Length": len(body)} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in said.items())
    return f"HTTP/1.1 {status} Said\r\n{lines}\r\n".encode() + body


def hang_up(_: Visit) -> None:
    """Say nothing and close the connection."""
    raise ConnectionAbortedError


class Scripted:
    """A server that gives the n-th request the n-th of ``answers``, and the last one to all that come after it.

    An answer is what is sent, byte for byte, or a function of the ``Visit``. ``early``: answer before the body has
    come. ``visits``: what was asked for, in order; ``connections``: how many there were.
    """

    def __init__(self, *answers: Say, tls: Path | None = None, early: bool = False) -> None:
        self.visits: list[Visit] = []
        self.connections = 0
        self._answers = list(answers)
        self._early = early
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if self._context and tls:
            self._context.load_cert_chain(tls)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https://localhost' if tls else 'http://127.0.0.1'}:{self.port}"
        self._thread = threading.Thread(target=self._serve, name="process_request_thread scripted")

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            still = list(self._open)
        for connection in still:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _serve(self) -> None:
        threads = []
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            self.connections += 1
            thread = threading.Thread(target=self._talk, args=(connection,), name="process_request_thread scripted")
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(10)

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            with self._lock:
                self._open.add(connection)
            stack.callback(self._open.discard, connection)
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
                stack.callback(connection.close)
            waiting = b""
            while True:
                head, waiting = _head(connection, waiting)
                visit = Visit(connection, head)
                length = int(visit.headers.get("content-length", 0))
                if not self._early:
                    while len(waiting) < length:
                        if not (more := connection.recv(1 << 16)):
                            return
                        waiting += more
                    visit.body, waiting = waiting[:length], waiting[length:]
                with self._lock:
                    self.visits.append(visit)
                    answer = self._answers[min(len(self.visits), len(self._answers)) - 1]
                if isinstance(answer, bytes):
                    connection.sendall(answer)
                    if b"connection: close" in answer.lower():
                        return
                else:
                    answer(visit)


def _head(connection: socket.socket, waiting: bytes) -> tuple[bytes, bytes]:
    """The next head of a request, and what came after it."""
    while b"\r\n\r\n" not in waiting:
        if not (more := connection.recv(1 << 16)):
            raise ConnectionAbortedError
        waiting += more
    head, _, rest = waiting.partition(b"\r\n\r\n")
    return head, rest


def signed(files: Mapping[str, bytes], query: str) -> Scripted:
    """A server that gives to GET requests with a query what the paths of some files say, and denies all else."""

    def say(visit: Visit) -> None:
        method, target, _ = visit.line.split(" ")
        path, _, given = target.partition("?")
        data = files.get(unquote(path).removeprefix("/"))
        if method != "GET" or given != query or data is None:
            visit.say(reply(403))
        else:
            first, last = map(int, visit.headers["range"].removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            visit.say(reply(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}", ETag='"1"'))

    return Scripted(say)


# A proxy.


@dataclass
class Tunnels:
    """A proxy that connects to whatever it is asked to, over HTTP and by CONNECT. Use as a context manager.

    ``password``: what it wants, as ``user:password``. ``asked``: the request lines that it was sent; ``refuses``: the
    status with which it answers instead.
    """

    password: str = ""
    refuses: int = 0
    asked: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)

    def __enter__(self) -> Tunnels:
        self._server = Scripted(self._visit).__enter__()
        self.address = self._server.url.replace("http://", f"http://{self.password}@" if self.password else "http://")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__()

    def _visit(self, visit: Visit) -> None:
        self.asked.append(visit.line)
        self.heads.append(visit.head.decode("latin-1"))
        given = visit.headers.get("proxy-authorization", "").removeprefix("Basic ")
        if self.refuses:
            visit.say(reply(self.refuses))
            raise ConnectionAbortedError
        if self.password and b64decode(given).decode() != self.password:
            visit.say(reply(407, b"who are you?"))
            raise ConnectionAbortedError
        method, target, _ = visit.line.split(" ")
        host, _, port = target.removeprefix("http://").partition("/")[0].rpartition(":")
        with socket.create_connection((host, int(port))) as server:
            if method == "CONNECT":
                visit.say(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = "/" + target.removeprefix("http://").partition("/")[2]
                head = visit.head.decode("latin-1").replace(target, path, 1) + "\r\nConnection: close\r\n\r\n"
                server.sendall(head.encode("latin-1") + visit.body)
            pump(visit.connection, server)
        raise ConnectionAbortedError


def pump(one: Any, other: Any) -> None:
    """Pass on what either side says until one of them ends."""
    while True:
        ready, _, _ = select.select([one, other], [], [], 60)
        for source in ready:
            if not (data := source.recv(1 << 16)):
                return
            (other if source is one else one).sendall(data)
