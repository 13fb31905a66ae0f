"""Who asks Google's store, with tokens that end and are renewed, and what its answers mean."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.auth.credentials import AnonymousCredentials
from google.oauth2.service_account import Credentials

from shardtool.errors import (
    AccessDenied,
    AlreadyExists,
    FormatError,
    NotFound,
    ShardtoolError,
    StoreError,
    Unavailable,
    UsageError,
)
from shardtool.stores.base import Store
from shardtool.stores.gcs.account import expect_safe
from shardtool.stores.gcs.errors import answered
from shardtool.stores.gcs.store import GcsStore
from shardtool.stores.wire.http import Answer
from shardtool.stores.wire.retry import Again, Busy
from shardtool.testing import write
from tests.servers.gcs import GcsServer, account_file

MIB = 1 << 20
SOON = Again(backoff=0.001)


def read(store: Store, key: str, start: int, size: int) -> bytes:
    """A range as bytes."""
    room = bytearray(size)
    store.readinto(key, start, memoryview(room))
    return bytes(room)


def bytes_of(size: int) -> bytes:
    """Bytes that are different everywhere."""
    return random.Random(0).randbytes(size)


@pytest.fixture
def private(gcs_standin: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket that is not open to all."""
    yield gcs_standin.bucket(monkeypatch, "private")
    gcs_standin.control(uses=0, expires_in=3600)


def test_nobody_may_read_what_is_not_open_to_all(private: str) -> None:
    with GcsStore(f"gs://{private}") as store:
        for call in (lambda: read(store, "a", 0, 1), lambda: store.stat("a"), lambda: store.put("a", b"x")):
            with pytest.raises(AccessDenied, match=r"not open to all .*GOOGLE_APPLICATION_CREDENTIALS"):
                call()


def test_a_service_account_may(private: str, gcs_account: Path) -> None:
    """One token serves for every request, and no project is asked for."""
    with GcsStore(f"gs://{private}/folder") as store:
        for size in (3, 9 * MIB):
            write(store, f"{size}", bytes_of(size), exclusive=True)
            assert store.get(f"{size}", limit=size) == bytes_of(size)
        assert [found.key for found in store.list()] == ["3", str(9 * MIB)]
        store.delete("3")
        assert not store.exists("3")


def test_a_token_that_ends_is_renewed(private: str, gcs_account: Path, gcs_standin: GcsServer) -> None:
    """In the middle of everything, and by many threads at a time."""
    gcs_standin.control(uses=2, tokens=0, refused=0)
    data = bytes_of(9 * MIB)
    with GcsStore(f"gs://{private}") as store:
        for number in range(4):
            write(store, f"{number}", data)
            assert store.stat(f"{number}").size == len(data)
            assert read(store, f"{number}", 100, 1000) == data[100:1100]
        assert len(list(store.list())) == 4
        counted = gcs_standin.control(uses=200)
        assert counted["refused"] > 3
        assert counted["tokens"] > 3
        with ThreadPoolExecutor(8) as pool:
            reads = pool.map(lambda number: read(store, "1", number, 1000) == data[number : number + 1000], range(1000))
            assert all(reads)
        assert gcs_standin.control()["tokens"] - counted["tokens"] < 20


def test_a_token_that_is_about_to_end_is_renewed_before(
    private: str, gcs_account: Path, gcs_standin: GcsServer
) -> None:
    gcs_standin.control(expires_in=1, tokens=0, refused=0)
    with GcsStore(f"gs://{private}") as store:
        store.put("a", b"x")
        assert store.get("a", limit=1) == b"x"
    counted = gcs_standin.control()
    assert counted["tokens"] > 1
    assert counted["refused"] == 0


def test_an_account_without_a_role_is_told_which(
    private: str, gcs_key: str, gcs_standin: GcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = account_file(tmp_path / "nobody.json", gcs_key, f"{gcs_standin.endpoint}/token", "nobody")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with GcsStore(f"gs://{private}") as store:
        for call in (lambda: read(store, "a", 0, 1), lambda: store.stat("a"), lambda: store.create("a", 9 * MIB)):
            with pytest.raises(AccessDenied, match=r"access to gs://\S*/a is denied .*Storage Object User"):
                call()


def test_an_account_that_is_gone_gets_no_token(
    private: str, gcs_key: str, gcs_standin: GcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = account_file(tmp_path / "deleted.json", gcs_key, f"{gcs_standin.endpoint}/token", "deleted")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with GcsStore(f"gs://{private}", again=SOON) as store:
        for call in (lambda: read(store, "a", 0, 1), lambda: store.stat("a")):
            with pytest.raises(AccessDenied, match=r"gs://\S*/a cannot be renewed .*account not found") as caught:
                call()
            assert "PRIVATE" not in str(caught.value)


def test_who_gives_no_tokens_at_this_moment_is_asked_again(
    private: str, gcs_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        path = account_file(tmp_path / "a.json", gcs_key, f"http://127.0.0.1:{closed.getsockname()[1]}/token")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
        with GcsStore(f"gs://{private}", again=Again(attempts=2, backoff=0.001)) as store:
            for call in (lambda: read(store, "a", 0, 1), lambda: store.stat("a")):
                with pytest.raises(Unavailable, match=r"gives credentials for gs://\S*/a cannot be reached"):
                    call()


@pytest.mark.parametrize("content", [None, "", "no JSON", "{}", '{"type": "service_account"}'])
def test_a_file_that_is_no_account_is_an_error_and_not_nobody(tmp_path: Path, monkeypatch, content: str | None) -> None:
    path = tmp_path / "account.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with pytest.raises(ShardtoolError, match=r"gs://bucket .*account\.json"):
        GcsStore("gs://bucket")


def test_an_upload_shows_no_token(private: str, gcs_account: Path) -> None:
    """The address of an upload is the permission; a token is only shown where one is asked for."""
    shown: list[tuple[str, bool]] = []
    with GcsStore(f"gs://{private}") as store:
        real = store._wire.open

        def open_(request, *args, **kwargs):
            shown.append((request.method, "authorization" in {name.lower() for name in request.headers}))
            return real(request, *args, **kwargs)

        store._wire.open = open_  # type: ignore[method-assign]
        write(store, "a", bytes(9 * MIB))
    assert shown == [("POST", True), *[("PUT", False)] * 3]


def test_who_pays_is_told_with_every_request(private: str, gcs_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", "payer")
    with GcsStore(f"gs://{private}") as store:
        assert store._account.headers("GET", "https://x", "x")["x-goog-user-project"] == "payer"
        store.put("a", b"x")
        assert store.get("a", limit=1) == b"x"


def test_whoever_is_given_asks(private: str, gcs_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of google-auth, which need not know yet what they are for."""
    credentials = Credentials.from_service_account_file(str(gcs_account))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    with GcsStore(f"gs://{private}", credentials=credentials) as store:
        store.put("a", b"x")
        assert store.get("a", limit=1) == b"x"


def test_a_server_is_trusted_by_its_certificate(
    gcs_tls_standin: GcsServer, gcs_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Google's library, where tokens are given, and where bytes travel."""
    bucket = gcs_tls_standin.bucket(monkeypatch, "private")
    path = account_file(tmp_path / "account.json", gcs_key, f"{gcs_tls_standin.endpoint}/token")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with GcsStore(f"gs://{bucket}") as store:
        write(store, "a", bytes_of(9 * MIB))
        assert store.stat("a").size == 9 * MIB
        assert read(store, "a", 5, 1000) == bytes_of(9 * MIB)[5:1005]


def test_a_server_without_a_known_certificate_is_not_trusted(
    gcs_tls_standin: GcsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = gcs_tls_standin.bucket(monkeypatch)
    monkeypatch.delenv("SSL_CERT_FILE")
    with GcsStore(f"gs://{bucket}") as store:
        for call in (lambda: read(store, "a", 0, 1), lambda: store.stat("a"), lambda: store.put("a", b"x")):
            with pytest.raises(StoreError, match=r"gs://\S*/a cannot be trusted .*SSL_CERT_FILE") as caught:
                call()
            assert not caught.value.retryable


def test_credentials_do_not_go_over_the_network_in_the_open(gcs_account: Path) -> None:
    with pytest.raises(UsageError, match=r"gs://bucket would go to example\.com in the open"):
        GcsStore("gs://bucket", endpoint="http://example.com")
    with GcsStore("gs://bucket", endpoint="http://example.com", credentials=AnonymousCredentials()):
        pass


def test_an_upload_does_not_go_over_the_network_in_the_open() -> None:
    """Its address is a secret, and the server that gives it may be misled by what stands before it."""
    with pytest.raises(StoreError, match=r"gs://b/a wants bytes to be sent in the open"):
        expect_safe("http://localhost/upload?upload_id=1", "https://localhost", "gs://b/a")
    assert expect_safe("https://localhost/x", "https://localhost", "gs://b/a") == "https://localhost/x"


def test_nothing_is_said_of_projects(private: str, gcs_account: Path, caplog: pytest.LogCaptureFixture) -> None:
    """google-auth warns where none is named; none is needed."""
    GcsStore(f"gs://{private}").close()
    assert caplog.records == []


# What answers mean


@pytest.mark.parametrize(
    ("status", "reason", "message", "kind", "text"),
    [
        (400, "invalid", 'Provided MD5 hash "x" doesn\'t match calculated MD5 hash "y".', Unavailable, "damaged"),
        (400, "invalid", "Invalid bucket name: 'No'", UsageError, "no name that Google takes .*Invalid bucket name"),
        (400, "invalid", "Something else", StoreError, "Something else"),
        (401, "authError", "Invalid Credentials", AccessDenied, "not valid .*authError"),
        (403, "forbidden", "x does not have storage.objects.get access", AccessDenied, "Storage Object User"),
        (403, "rateLimitExceeded", "", Busy, "too often"),
        (
            404,
            "notFound",
            "The specified bucket does not exist.",
            NotFound,
            "bucket of gs://b/k does not exist: check gs://b",
        ),
        (404, "notFound", "No such object: bucket/k", NotFound, "gs://b/k does not exist"),
        (404, "", "", NotFound, "gs://b/k does not exist"),
        (412, "conditionNotMet", "no", AlreadyExists, "exists already"),
        (412, "orgPolicyConstraintFailed", "a constraint is violated", StoreError, "constraint is violated"),
        (416, "requestedRangeNotSatisfiable", "", FormatError, "ends before"),
        (429, "rateLimitExceeded", "", Busy, "too often"),
        (503, "backendError", "", Busy, "at this moment"),
        (507, "", "", Busy, "at this moment"),
        (418, "teapot", "", StoreError, "418 teapot$"),
    ],
)
def test_answers_are_told(status: int, reason: str, message: str, kind: type[StoreError], text: str) -> None:
    body = {"error": {"code": status, "message": message, "errors": [{"reason": reason, "message": message}]}}
    error = answered(Answer(status, {"retry-after": "7"}, json.dumps(body).encode()), "gs://b/k")
    assert type(error) is kind
    assert not isinstance(error, Busy) or error.after == 7
    with pytest.raises(kind, match=text):
        raise error


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"error": "x"}', b'{"error": {"errors": [1]}}', b"\xff", b"1"]
)
def test_a_body_of_another_kind_says_nothing(body: bytes) -> None:
    assert str(answered(Answer(503, {}, body), "gs://b/k")).endswith("(the server says 503): try again")
