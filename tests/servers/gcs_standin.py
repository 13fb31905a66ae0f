"""A small server that speaks the JSON API of Google Cloud Storage as its documentation has it, in memory.

Run as a program: ``python gcs_standin.py PORT [CERTIFICATE]``, with TLS if there is a certificate. It has what the
emulators that can be had lack: preconditions (412) and generations, listings in pages, checksums that are checked, and
accounts whose tokens end. It knows nothing that shardtool does not use: no versions of objects, no copies, no rules.

::

    /storage/v1/b ...              buckets (POST) and objects (GET, DELETE); ?alt=media: ranges of their bytes
    /upload/storage/v1/b/B/o       uploadType=media, multipart, resumable (then PUT, and DELETE to give up)
    /token                         a token for a service account's signed claim; the signature is not looked at
    /control                       GET: what was counted; POST: a JSON object of the fields of ``Settings`` to set

A bucket whose name begins with ``private`` is only for who shows a token, any other one is open to all.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import secrets
import ssl
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c

QUARTER = 256 << 10  # what a resumable upload keeps comes in multiples of this


class Answer(NamedTuple):
    """What a request gets."""

    status: int
    body: bytes | memoryview = b""
    headers: dict[str, str] = {}  # noqa: RUF012 - nobody changes it


def told(resource: dict[str, Any], status: int = 200) -> Answer:
    return Answer(status, json.dumps(resource).encode(), {"Content-Type": "application/json; charset=UTF-8"})


class Refused(Exception):
    """An answer that is not the one that was hoped for."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        detail = {"message": message, "domain": "global", "reason": reason}
        self.answer = told({"error": {"code": status, "message": message, "errors": [detail]}}, status)


@dataclass
class Settings:
    """What tests may change, and what they may look at."""

    page: int = 1000  # the most objects of a page
    uses: int = 0  # how often a token is good for; 0: for ever
    expires_in: int = 3600  # what is said of a token's life
    keep: int = -1  # the next chunk of a resumable upload: so many bytes are kept, then ``fault`` is answered
    fault: int = 503  # a status, or 0: the connection is cut
    forget: bool = False  # the next request of a resumable upload finds no session
    spoil: bool = False  # the next upload arrives with one bit changed
    gullible: bool = False  # checksums are not compared
    tokens: int = 0  # how many were given out
    refused: int = 0  # how many requests came with a token that had ended


@dataclass
class Session:
    """A resumable upload."""

    bucket: str
    name: str
    about: dict[str, Any]
    query: dict[str, str]
    data: bytearray = field(default_factory=bytearray)
    done: dict[str, Any] | None = None


class World:
    """All that the server remembers."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.settings = Settings()
        self.buckets: dict[str, dict[str, tuple[dict[str, Any], bytes]]] = {}
        self.sessions: dict[str, Session] = {}
        self.tokens: dict[str, int] = {}
        self.generation = time.time_ns() // 1000

    def objects(self, bucket: str) -> dict[str, tuple[dict[str, Any], bytes]]:
        if bucket not in self.buckets:
            raise Refused(404, "notFound", "The specified bucket does not exist.")
        return self.buckets[bucket]

    def found(self, bucket: str, name: str, query: dict[str, str]) -> tuple[dict[str, Any], bytes]:
        with self.lock:
            there = self.objects(bucket).get(name)
        if there is None or query.get("generation", there[0]["generation"]) != there[0]["generation"]:
            raise Refused(404, "notFound", f"No such object: {bucket}/{name}")
        self.expect(there[0], query)
        return there

    @staticmethod
    def expect(about: dict[str, Any] | None, query: dict[str, str]) -> None:
        """``ifGenerationMatch``: 0 means that there is none."""
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and wanted != (about["generation"] if about else "0"):
            raise Refused(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")

    def put(self, bucket: str, name: str, data: bytes, about: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        """Make an object, if its checksums are right and the conditions hold."""
        if self.settings.spoil and data:
            self.settings.spoil = False
            data = bytes([data[0] ^ 1]) + data[1:]
        crc = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        for key, made in (("crc32c", crc), ("md5Hash", md5)):
            if about.get(key, made) != made and not self.settings.gullible:
                text = f"Provided {key} hash {about[key]!r} doesn't match calculated {key} hash {made!r}."
                raise Refused(400, "invalid", text)
        with self.lock:
            objects = self.objects(bucket)
            self.expect(objects[name][0] if name in objects else None, query)
            self.generation += 1
            made_now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
            resource = {
                "kind": "storage#object",
                "name": name,
                "bucket": bucket,
                "generation": str(self.generation),
                "metageneration": "1",
                "size": str(len(data)),
                "crc32c": crc,
                "md5Hash": md5,
                "etag": f"etag-{self.generation}",
                "contentType": about.get("contentType", "application/octet-stream"),
                "timeCreated": made_now,
                "updated": made_now,
                "metadata": about.get("metadata", {}),
            }
            objects[name] = (resource, data)
            return resource


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    world: ClassVar[World]
    scheme: ClassVar[str] = "http"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        try:
            self.body = self.rfile.read(length)
            if len(self.body) < length:
                raise ConnectionError
            address = urlsplit(self.path)
            self.query = {key: values[-1] for key, values in parse_qs(address.query, keep_blank_values=True).items()}
            try:
                answer = self.route(address.path)
            except Refused as no:
                answer = no.answer
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.status != 204:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)
        except (ConnectionError, ssl.SSLError):
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = serve  # noqa: N815 - the standard library chooses these names

    def route(self, path: str) -> Answer:
        if path == "/token":
            return self.token()
        if path == "/control":
            return self.control()
        if path == "/storage/v1/b" and self.command == "POST":
            made = json.loads(self.body)["name"]
            with self.world.lock:
                self.world.buckets.setdefault(made, {})
            return told({"name": made})
        found = re.fullmatch(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)/o(?:/([^/]+))?", path)
        if not found:
            raise Refused(404, "notFound", "Not Found")
        kind, bucket, name = found[1], unquote(found[2]), unquote(found[3] or "")
        if "upload_id" in self.query:  # the address of a session is the permission
            return self.resume(self.query["upload_id"])
        self.authorize(bucket)
        match self.command, kind, bool(name):
            case "GET", None, False:
                return self.listing(bucket)
            case "POST", "upload", False:
                return self.upload(bucket)
            case "GET", None | "download", True:
                about, data = self.world.found(bucket, name, self.query)
                media = kind or self.query.get("alt") == "media"
                return self.media(about, data) if media else told(about)
            case "DELETE", None, True:
                with self.world.lock:
                    self.world.found(bucket, name, self.query)
                    del self.world.objects(bucket)[name]
                return Answer(204)
        raise Refused(405, "methodNotAllowed", "Method Not Allowed")

    def control(self) -> Answer:
        settings = self.world.settings
        for name, value in json.loads(self.body or b"{}").items():
            setattr(settings, name, value)
        unfinished = sum(session.done is None for session in list(self.world.sessions.values()))
        return told({**vars(settings), "sessions": unfinished})

    # Accounts

    def token(self) -> Answer:
        form = parse_qs(self.body.decode())
        claim = form.get("assertion", [""])[0].split(".")
        if form.get("grant_type") != ["urn:ietf:params:oauth:grant-type:jwt-bearer"] or len(claim) != 3:
            return told({"error": "invalid_grant", "error_description": "no signed claim"}, 400)
        who = json.loads(base64.urlsafe_b64decode(claim[1] + "=" * (-len(claim[1]) % 4)))["iss"]
        if who.startswith("deleted"):
            return told({"error": "invalid_grant", "error_description": "Invalid grant: account not found"}, 400)
        settings = self.world.settings
        with self.world.lock:
            token = f"ya29.{'nobody' if who.startswith('nobody') else 'owner'}.{secrets.token_hex(8)}"
            self.world.tokens[token] = settings.uses or -1
            settings.tokens += 1
        return told({"access_token": token, "expires_in": settings.expires_in, "token_type": "Bearer"})

    def authorize(self, bucket: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token:
            with self.world.lock:
                left = self.world.tokens.get(token, 0)
                self.world.tokens[token] = max(-1, left - 1)
                if not left:
                    self.world.settings.refused += 1
                    raise Refused(401, "authError", "Invalid Credentials")
        if bucket.startswith("private"):
            no = "does not have storage.objects.get access to the Google Cloud Storage object."
            if not token:
                raise Refused(401, "required", f"Anonymous caller {no}")
            if ".nobody." in token:
                raise Refused(403, "forbidden", f"nobody@project.iam.gserviceaccount.com {no}")

    # Reading

    def listing(self, bucket: str) -> Answer:
        prefix = self.query.get("prefix", "")
        after = base64.urlsafe_b64decode(self.query.get("pageToken", "")).decode()
        most = min(int(self.query.get("maxResults", 1000)), self.world.settings.page)
        with self.world.lock:
            objects = self.world.objects(bucket)
            # The order is that of the names' bytes, which is that of their characters.
            names = sorted(name for name in objects if name.startswith(prefix) and name > after)
            page: dict[str, Any] = {"kind": "storage#objects"}
            if names:
                page["items"] = [objects[name][0] for name in names[:most]]
        if len(names) > most:
            page["nextPageToken"] = base64.urlsafe_b64encode(names[most - 1].encode()).decode()
        return told(page)

    def media(self, about: dict[str, Any], data: bytes) -> Answer:
        headers = {
            "Content-Type": about["contentType"],
            "ETag": about["etag"],
            "X-Goog-Generation": about["generation"],
            "X-Goog-Hash": f"crc32c={about['crc32c']},md5={about['md5Hash']}",
            "X-Goog-Stored-Content-Length": about["size"],
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return Answer(200, data, headers)
        first = int(wanted[1])
        last = min(int(wanted[2] or len(data)), len(data) - 1)
        if first > last:
            raise Refused(416, "requestedRangeNotSatisfiable", "Request range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return Answer(206, memoryview(data)[first : last + 1], headers)

    # Writing

    def upload(self, bucket: str) -> Answer:
        kind = self.query.get("uploadType")
        if kind == "media":
            return told(self.world.put(bucket, self.query["name"], self.body, {}, self.query))
        if kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^;'\"]+)", self.headers.get("Content-Type", ""))
            parts = self.body.split(b"--" + boundary[1].encode()) if boundary else []
            if len(parts) != 4:
                raise Refused(400, "badContent", "Malformed multipart body.")
            about = json.loads(parts[1].partition(b"\r\n\r\n")[2])
            data = parts[2].partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
            return told(self.world.put(bucket, about.get("name") or self.query["name"], data, about, self.query))
        if kind != "resumable":
            raise Refused(400, "invalid", "Invalid upload type.")
        about = json.loads(self.body or b"{}")
        name = about.get("name") or self.query["name"]
        self.world.objects(bucket)
        identity = secrets.token_urlsafe(32)  # conditions are looked at in the end
        self.world.sessions[identity] = Session(bucket, name, about, self.query)
        where = f"{self.scheme}://{self.headers['Host']}/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable"
        return Answer(200, b"", {"Location": f"{where}&upload_id={identity}", "X-GUploader-UploadID": identity})

    def resume(self, identity: str) -> Answer:
        settings = self.world.settings
        session = self.world.sessions.get(identity)
        if session is None or settings.forget:
            settings.forget = False
            raise Refused(410 if session else 404, "notFound", "No such upload.")
        if self.command == "DELETE":
            del self.world.sessions[identity]
            return Answer(499)
        wanted = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if wanted is None:
            raise Refused(400, "invalid", "Failed to parse Content-Range header.")
        if session.done is not None:
            return told(session.done)
        total = None if wanted[3] == "*" else int(wanted[3])
        if wanted[1] is not None:
            self.take(session, int(wanted[1]), int(wanted[2]), total)
        if total != len(session.data):
            return Answer(308, b"", {"Range": f"bytes=0-{len(session.data) - 1}"} if session.data else {})
        sums = dict(item.strip().split("=", 1) for item in self.headers.get("X-Goog-Hash", "").split(",") if item)
        about = session.about | ({"crc32c": sums["crc32c"]} if "crc32c" in sums else {})
        session.done = self.world.put(session.bucket, session.name, bytes(session.data), about, session.query)
        session.data.clear()
        return told(session.done)

    def take(self, session: Session, first: int, last: int, total: int | None) -> None:
        """Keep a chunk; what is there already is passed over."""
        settings = self.world.settings
        there = len(session.data)
        if last - first + 1 != len(self.body) or first > there or (total is not None and last >= total):
            raise Refused(400, "invalid", f"The chunk {first}-{last} does not follow the {there} bytes that are there.")
        if last + 1 != total and len(self.body) % QUARTER:
            raise Refused(400, "invalid", "A chunk that is not the last is a multiple of 262144 bytes.")
        new = self.body[there - first :]
        if settings.keep < 0:
            session.data += new
            return
        session.data += new[: settings.keep // QUARTER * QUARTER]
        settings.keep = -1
        if not settings.fault:
            raise ConnectionError
        raise Refused(settings.fault, "backendError", "Backend Error")


def main(port: int, certificate: str | None = None) -> None:
    """Serve for ever."""
    Handler.world = World()
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    if certificate:
        Handler.scheme = "https"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
