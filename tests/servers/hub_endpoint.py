"""The endpoint of a Hugging Face hub, as far as models are read from one: a program, of the standard library alone.

::

    python hub_endpoint.py FOLDER PORT CDN_PORT

    FOLDER/settings.json               {"page": files on a page of a tree, "secret": what signs addresses,
                                        "cdn": an address in front of that of large files, if any}
    FOLDER/repos/ORG/NAME/about.json   {"refs": {branch: commit}, "commits": {commit: {path: {"size", "oid", "lfs"}}},
                                        "private", "gated", "readers": [token], "moved": "org/name"}
    FOLDER/blobs/OID                   the bytes of files
    FOLDER/log.jsonl                   a line for each request

Everything is looked up anew for each request, so that tests change it by writing files. What it answers is what
huggingface_hub expects of huggingface.co: LFS files lie on another host (``CDN_PORT``), whose signed addresses end with
a change of the secret, and which refuses a request that brings a token; other files are redirected within the host.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

_COMMIT = re.compile(r"[0-9a-f]{40}")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Failure(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    """What both hosts have in common."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    host: str
    lock = threading.Lock()

    def log_message(self, *_: object) -> None:
        """Tests read the log that ``_note`` writes."""

    def do_GET(self) -> None:
        """Answer."""
        self._note()
        try:
            self.answer(urlsplit(self.path))
        except Failure as failure:
            self._send(failure.status, failure.headers, json.dumps({"error": str(failure)}).encode())

    do_HEAD = do_GET  # noqa: N815 - the standard library chooses this name

    def answer(self, url: Any) -> None:
        """Answer a request, or raise ``Failure``."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What tests have set."""
        found: dict[str, Any] = json.loads((self.folder / "settings.json").read_text())
        return found

    def sign(self, oid: str) -> str:
        """What makes the address of a blob good."""
        return hmac.new(self.settings()["secret"].encode(), oid.encode(), "sha256").hexdigest()

    def blob(self, oid: str, headers: dict[str, str]) -> None:
        """Send a blob, or the range of it that was asked for."""
        path = self.folder / "blobs" / oid
        if not path.exists():
            raise Failure(404, "", "Not found")
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        if asked := _RANGE.fullmatch(self.headers.get("Range", "")):
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            if start >= size:
                self._send(416, {"Content-Range": f"bytes */{size}"}, b"")
                return
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self._begin(status, {**headers, "Accept-Ranges": "bytes", "Content-Length": str(stop - start)})
        if self.command == "GET":
            with path.open("rb") as file:
                file.seek(start)
                left = stop - start
                while left:
                    piece = file.read(min(left, 1 << 20))
                    self.wfile.write(piece)
                    left -= len(piece)

    def _note(self) -> None:
        line = {
            "host": self.host,
            "method": self.command,
            "path": self.path,
            "range": self.headers.get("Range", ""),
            "token": self.headers.get("Authorization", "").removeprefix("Bearer "),
            "agent": self.headers.get("User-Agent", ""),
        }
        with self.lock, (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._begin(status, {**headers, "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)


class Hub(Handler):
    """The hub itself."""

    host = "hub"
    cdn: str

    def answer(self, url: Any) -> None:
        """Take the address apart."""
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self._info),
            (r"/api/models/([^/]+/[^/]+)", self._info),
            (r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)", self._cached),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if found := re.fullmatch(pattern, url.path):
                about = self._about(found[1])
                if "moved" in about:
                    moved = self.path.replace(found[1], about["moved"], 1)
                    self._send(307, {"Location": moved}, b"")
                    return
                answer(found[1], about, *map(unquote, found.groups()[1:]))
                return
        raise Failure(404, "", "Sorry, we can't find the page you are looking for.")

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _about(self, repo: str) -> dict[str, Any]:
        if self._token.startswith("bad"):
            raise Failure(401, "", "Invalid credentials in Authorization header")
        hidden = Failure(404 if self._token else 401, "RepoNotFound", "Repository not found")
        try:
            about: dict[str, Any] = json.loads((self.folder / "repos" / repo / "about.json").read_text())
        except FileNotFoundError:
            raise hidden from None
        if about.get("private") and self._token not in about["readers"]:
            raise hidden
        return about

    def _commit(self, about: dict[str, Any], revision: str) -> str:
        commit: str = about["refs"].get(revision, revision)
        if commit not in about["commits"]:
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, repo: str, about: dict[str, Any], revision: str = "main") -> None:
        commit = self._commit(about, revision)
        siblings = [{"rfilename": path} for path in sorted(about["commits"][commit])]
        gated = "manual" if about.get("gated") else False
        found = {"id": repo, "sha": commit, "private": bool(about.get("private")), "gated": gated, "siblings": siblings}
        self._json(found)

    def _tree(self, _repo: str, about: dict[str, Any], revision: str, folder: str) -> None:
        commit = self._commit(about, revision)
        files = about["commits"][commit]
        inside = {path for path in files if not folder or path == folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise Failure(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        folders = {path[:i] for path in inside for i, letter in enumerate(path) if letter == "/" and i > len(folder)}
        asked = parse_qs(urlsplit(self.path).query)
        depth = len(folder) + 1 if folder else 0
        deep = asked.get("recursive", ["false"])[0].lower() in ("true", "1")
        named = [path for path in sorted(inside | folders) if deep or "/" not in path[depth:]]
        start, page = int(asked.get("cursor", ["0"])[0]), self.settings()["page"]
        headers = {}
        if start + page < len(named):
            host = self.headers["Host"]
            query = f"recursive={str(deep).lower()}&cursor={start + page}"
            headers["Link"] = f'<http://{host}{urlsplit(self.path).path}?{query}>; rel="next"'
        self._json([_entry(path, files.get(path)) for path in named[start : start + page]], headers)

    def _resolve(self, repo: str, about: dict[str, Any], revision: str, path: str) -> None:
        commit, file = self._file(about, revision, path)
        pinned = {"X-Repo-Commit": commit}
        if not file["lfs"]:
            to = f"/api/resolve-cache/models/{repo}/{commit}/{quote(path)}"
            linked = {"X-Linked-Etag": f'"{file["oid"]}"', "X-Linked-Size": str(file["size"])}
            self._send(307, {**pinned, **linked, "Location": to}, b"")
            return
        linked = {"X-Linked-Etag": f'"{file["lfs"]}"', "X-Linked-Size": str(file["size"]), "ETag": f'"{file["oid"]}"'}
        signed = f"Expires=4102444800&Signature={self.sign(file['lfs'])}"
        to = f"{self.settings().get('cdn', self.cdn)}/{file['lfs']}?{signed}"
        self._send(302, {**pinned, **linked, "Location": to}, b"")

    def _cached(self, _repo: str, about: dict[str, Any], revision: str, path: str) -> None:
        commit, file = self._file(about, revision, path)
        self.blob(file["oid"], {"X-Repo-Commit": commit, "ETag": f'"{file["oid"]}"'})

    def _file(self, about: dict[str, Any], revision: str, path: str) -> tuple[str, dict[str, Any]]:
        if about.get("gated") and self._token not in about["readers"]:
            message = "Access to this model is restricted. You must be authenticated and have access to it."
            raise Failure(403 if self._token else 401, "GatedRepo", message)
        commit = self._commit(about, revision)
        file: dict[str, Any] | None = about["commits"][commit].get(path)
        if file is None:
            raise Failure(404, "EntryNotFound", "Entry not found")
        return commit, file

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._send(200, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, body)


def _entry(path: str, file: dict[str, Any] | None) -> dict[str, Any]:
    if file is None:
        return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
    found = {"type": "file", "oid": file["oid"], "size": file["size"], "path": path}
    if file["lfs"]:
        found["lfs"] = {"oid": file["lfs"], "size": file["size"], "pointerSize": 134}
    return found


class Cdn(Handler):
    """Where LFS files lie."""

    host = "cdn"

    def answer(self, url: Any) -> None:
        """A blob, to whoever has an address that is signed."""
        oid = url.path.strip("/")
        if self.headers.get("Authorization"):
            raise Failure(400, "", "Only one auth mechanism allowed")
        given = parse_qs(url.query).get("Signature", [""])[0]
        if not hmac.compare_digest(given, self.sign(oid)):
            raise Failure(403, "", "Request has expired")
        self.blob(oid, {"ETag": f'"{oid[:32]}"'})


def main(folder: str, port: int, cdn_port: int) -> None:
    """Serve until the process ends."""
    Handler.folder = Path(folder)
    Hub.cdn = f"http://127.0.0.1:{cdn_port}"
    cdn = ThreadingHTTPServer(("127.0.0.1", cdn_port), Cdn)
    threading.Thread(target=cdn.serve_forever, daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", port), Hub).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
