"""An S3 server that takes uploads and keeps none, for ``network.py``: what the client does is what is measured.

python benchmarks/sink.py PORT [CERTIFICATE KEY]

It confirms the checksums that a client announces, as Amazon does, but verifies nothing. A request with ``?prove`` makes
it digest what comes from then on, each part by itself, and ``?proof`` tells the digests in the order of the parts.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from io import BufferedReader, RawIOBase
from urllib.parse import parse_qs, urlsplit

import xxhash

PIECE = 1 << 20
Parts = dict[int, tuple[int, str]]


class Sink:
    """What all connections share."""

    def __init__(self) -> None:
        self.proving = False
        self.parts: Parts = {}

    def serve(self, connection: socket.socket) -> None:
        """Answer the requests of a connection, one after the other."""
        piece = memoryview(bytearray(PIECE))
        with connection, connection.makefile("rb", buffering=65536) as file:
            while line := file.readline():
                method, target, _ = line.decode("latin-1").split(" ", 2)
                headers = dict(_headers(file))
                if headers.get("expect", "").lower() == "100-continue":
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                digest = xxhash.xxh3_128() if self.proving else None
                size = 0
                chunked = "chunked" in headers.get("transfer-encoding", "")
                body = BufferedReader(_Chunks(file), PIECE) if chunked else file
                for length in _lengths(body, headers):
                    left = length
                    while left:
                        count = body.readinto(piece[: min(PIECE, left)])
                        if not count:
                            return
                        left -= count
                        if digest:
                            digest.update(piece[:count])
                    size += length
                if chunked:
                    body.read()
                connection.sendall(self._answer(method, target, headers, size, digest.hexdigest() if digest else ""))

    def _answer(self, method: str, target: str, headers: dict[str, str], size: int, digest: str) -> bytes:
        query = parse_qs(urlsplit(target).query, keep_blank_values=True)
        extra, body = [], ""
        if "prove" in query:
            self.proving, self.parts = True, {}
        elif "proof" in query:
            self.proving, body = False, json.dumps([self.parts[number] for number in sorted(self.parts)])
        elif method == "PUT":
            self.parts[int(query.get("partNumber", ["1"])[0])] = (size, digest)
            extra = [f"{name}: {value}" for name, value in headers.items() if name.startswith("x-amz-checksum-")]
        elif "uploads" in query:
            wanted = ("x-amz-checksum-algorithm", "x-amz-checksum-type")
            extra = [f"{name}: {headers[name]}" for name in wanted if name in headers]
            body = "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
        elif method == "POST":
            body = '<CompleteMultipartUploadResult><ETag>"0"</ETag></CompleteMultipartUploadResult>'
        lines = ["HTTP/1.1 200 OK", 'ETag: "0"', f"Content-Length: {len(body)}", *extra, "", ""]
        return "\r\n".join(lines).encode() + (body.encode() if method != "HEAD" else b"")


class _Chunks(RawIOBase):
    """The body of a request whose length is not said before."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._left = -1

    def readable(self) -> bool:
        return True

    def readinto(self, room: memoryview) -> int:  # type: ignore[override]
        if self._left <= 0:
            if self._left == 0:
                self._file.readline()
            self._left = int(self._file.readline().partition(b";")[0], 16)
            if not self._left:
                self._file.readline()
                return 0
        count = self._file.readinto(memoryview(room)[: self._left])
        self._left -= count
        return count


def _lengths(file: BufferedReader, headers: dict[str, str]) -> Iterator[int]:
    """The pieces of a body: one, or those into which ``aws-chunked`` has cut it."""
    if "x-amz-decoded-content-length" not in headers:
        yield int(headers.get("content-length", 0))
        return
    while length := int(file.readline().partition(b";")[0], 16):
        yield length
        file.readline()
    while file.readline().strip():  # what follows: a checksum
        pass


def _headers(file: BufferedReader) -> Iterator[tuple[str, str]]:
    while line := file.readline().decode("latin-1").strip():
        name, _, value = line.partition(":")
        yield name.strip().lower(), value.strip()


def main() -> None:
    """Serve until killed."""
    sink, listener = Sink(), socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=128)
    context = None
    if len(sys.argv) > 2:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[2], sys.argv[3])

    def serve(connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sink.serve(context.wrap_socket(connection, server_side=True) if context else connection)
        except (OSError, ValueError):
            return

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
