"""S3Store obeys every law on every server that can be had, and what a server cannot do is said here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from shardtool.errors import AccessDenied, AlreadyExists, NotFound, StoreError, UsageError
from shardtool.stores.base import Store
from shardtool.stores.s3.checksum import best
from shardtool.stores.s3.store import Access, S3Store
from shardtool.stores.s3.write import PART
from shardtool.stores.wire.http import Wire
from shardtool.testing import StoreContract, write
from shardtool.testing.words import content
from tests.servers import S3Server

MIB = 1 << 20


class OfServer(StoreContract):
    """The contract in a folder of a new bucket of ``server``, the name of a fixture."""

    server: ClassVar[str]

    @pytest.fixture
    def at(self, request: pytest.FixtureRequest) -> S3Server:
        found = request.getfixturevalue(self.server)
        assert isinstance(found, S3Server)
        return found

    @pytest.fixture
    def store(self, at: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
        with S3Store(f"s3://{at.bucket(monkeypatch)}/folder") as store:
            yield store


class TestCeph(OfServer):
    """A server of production."""

    server = "ceph_server"


class TestMotoTLS(OfServer):
    """By way of TLS."""

    server = "moto_tls"
    gaps = frozenset({"age"})


class TestMotoIAM(OfServer):
    """With signatures that are checked."""

    server = "moto_iam"
    gaps = frozenset({"age"})


class TestMinistack(OfServer):
    """With checksums that are verified."""

    server = "ministack"


class TestRclone(OfServer):
    """A server that ignores conditions and answers ranges with 200."""

    server = "rclone"

    def test_of_exclusive_writers_one_wins(self, store: Store, at: S3Server) -> None:  # type: ignore[override]
        """A gap: the server overwrites what must not exist. So writers look a moment later whose object is there."""
        bucket = store.uri.split("/")[2]
        for content_ in (b"first", b"second"):
            at.client.put_object(Bucket=bucket, Key="folder/direct", Body=content_, IfNoneMatch="*")
        assert store.get("direct", limit=10) == b"second"
        # Nearly always one: who is held up between its look and its request for longer than they wait may be another.
        assert self.race(store, "record")
        assert not store.conditional

    def test_of_exclusive_writers_of_a_large_object_one_wins(self, store: Store) -> None:
        """A gap: uploads of one key that end at the very same moment may fail on this server; here they do not."""
        first, second = (store.create("large", self.large, exclusive=True) for _ in range(2))
        for number, writer in enumerate((first, second)):
            writer.write(0, bytes([number]) * self.large)
        first.commit()
        with pytest.raises(AlreadyExists, match="large"):
            second.commit()
        second.abort()
        assert store.get("large", limit=self.large) == bytes(self.large)
        assert not store.conditional


# Checksums


@pytest.fixture
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., S3Store]]:
    """Opens a store in a new bucket of a server, given the name of its fixture."""
    stores = []

    def opened(name: str, **options: Any) -> S3Store:
        server: S3Server = request.getfixturevalue(name)
        stores.append(S3Store(f"s3://{server.bucket(monkeypatch)}/folder", backoff=0.001, **options))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("server", "keeps"),
    [
        ("s3_server", {"small", "large"}),
        ("moto_tls", {"small", "large"}),
        ("ministack", {"small"}),  # of parts it keeps the checksum of their checksums
        ("rclone", {"small"}),
        ("ceph_server", set()),
    ],
)
def test_a_server_says_which_bytes_it_has(opened: Callable[..., S3Store], server: str, keeps: set[str]) -> None:
    """Where it can it keeps the checksum that it was sent; where not there is its ETag, which is MD5 of the parts."""
    store, data, checksum = opened(server), content(20 * MIB), best()
    for name, size in (("small", 100), ("large", len(data))):
        write(store, name, data[:size], slice_size=3 * PART)
        found = dict(store.checksums(name))
        parts = [hashlib.md5(data[at : min(at + PART, size)]) for at in range(0, size, PART)]
        tag = parts[0].hexdigest()
        if size > 8 * MIB:
            tag = f"{hashlib.md5(b''.join(part.digest() for part in parts)).hexdigest()}-{len(parts)}"
        if server == "rclone":
            tag = hashlib.md5(data[:size]).hexdigest()
        assert found.pop("etag") == tag
        value = checksum.hexadecimal(checksum.of(memoryview(data)[:size]))
        assert found == ({checksum.name: value} if name in keeps else {})


@pytest.mark.parametrize("size", [100, 20 * MIB])
@pytest.mark.parametrize("server", ["ministack", "ceph_server"])
def test_bytes_that_are_damaged_on_their_way_are_sent_again(
    opened: Callable[..., S3Store], server: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server verifies checksums, the other one the hash that was signed."""
    store, data, real = opened(server), content(size), Wire.send
    damaged: list[str] = []

    def send(wire: Wire, request: Any, body: memoryview, **how: Any) -> Any:
        if request.method == "PUT" and len(damaged) < 2:
            damaged.append(request.url)
            body = memoryview(bytes([body[0] ^ 1]) + bytes(body[1:]))
        return real(wire, request, body, **how)

    monkeypatch.setattr(Wire, "send", send)
    write(store, "a", data, slice_size=16 * MIB)
    assert len(damaged) == 2
    assert store.get("a", limit=size) == data


def test_an_unsigned_body_goes_over_tls_or_with_a_checksum(opened: Callable[..., S3Store]) -> None:
    """And what a server does not verify is signed."""
    data, seen = memoryview(content(9 * MIB)), {}
    for server in ("moto_tls", "s3_server", "ceph_server"):
        store = opened(server)
        real = store._client.request

        def request(operation: str, key: str, payload: str = "", *, real: Any = real, **given: Any) -> Any:
            made = real(operation, key, payload, **given)
            seen[server, operation] = {name.lower(): value for name, value in made.headers.items()}  # noqa: B023
            return made

        store._client.request = request  # type: ignore[method-assign]
        write(store, "small", data[:100])
        write(store, "large", data, slice_size=2 * PART)
    hashes = {where: headers["x-amz-content-sha256"] for where, headers in seen.items()}
    name = f"x-amz-checksum-{best().name}"
    small = hashlib.sha256(data[:100]).hexdigest()
    assert hashes["moto_tls", "PutObject"] == hashes["moto_tls", "UploadPart"] == "UNSIGNED-PAYLOAD"
    assert hashes["s3_server", "PutObject"] == hashes["ceph_server", "PutObject"] == small
    assert hashes["s3_server", "UploadPart"] == "UNSIGNED-PAYLOAD"
    assert name in seen["s3_server", "UploadPart"]
    assert name in seen["s3_server", "UploadPart"]["authorization"]
    parts = [hashlib.sha256(data[at : at + PART]).hexdigest() for at in range(0, len(data), PART)]
    assert hashes["ceph_server", "UploadPart"] in parts


# Accounts


@pytest.mark.parametrize("server", ["moto_iam", "ceph_server"])
@pytest.mark.parametrize(("half", "message"), [("key", "InvalidAccessKeyId"), ("secret", "SignatureDoesNotMatch")])
def test_credentials_that_are_wrong_are_denied(
    opened: Callable[..., S3Store], request: pytest.FixtureRequest, server: str, half: str, message: str
) -> None:
    """By boto3 and by the wire alike, and the message does not have them."""
    right = request.getfixturevalue(server).environ
    opened(server).put("a", b"abc")
    key, secret = right["AWS_ACCESS_KEY_ID"], right["AWS_SECRET_ACCESS_KEY"]
    wrong = Access(f"{key}x" if half == "key" else key, f"{secret}x" if half == "secret" else secret)
    store = opened(server, access=wrong)
    calls: list[Callable[[], object]] = [
        lambda: list(store.list()),
        lambda: store.readinto("a", 0, memoryview(bytearray(1))),
        lambda: store.get("a", limit=3),
        lambda: store.put("b", b"x"),
        lambda: store.create("b", 20 * MIB),
    ]
    for call in calls:
        with pytest.raises(AccessDenied, match=f"not valid .*{message}") as caught:
            call()
        assert secret not in str(caught.value)


def test_keys_that_are_rotated_in_mid_run(
    opened: Callable[..., S3Store],
    moto_iam: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old key is deleted; the file of credentials has a new one, which nobody told the process of."""
    client, data = opened("moto_iam"), content(20 * MIB)  # a bucket of somebody else
    file = tmp_path / "credentials"

    def rotate(old: str = "") -> str:
        key, secret = moto_iam.rotated(old)
        file.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")
        return key

    first = rotate()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with S3Store(client.uri) as store:
        writer = store.create("a", len(data))
        writer.write(0, data[: 8 * MIB])
        second = rotate(first)
        writer.write(8 * MIB, data[8 * MIB :])
        third = rotate(second)
        writer.commit()
        rotate(third)
        room = bytearray(len(data))
        store.readinto("a", 0, memoryview(room))
        assert room == data
        moto_iam.rotated(str(store._client.credentials().access_key))  # type: ignore[union-attr]
        with pytest.raises(AccessDenied, match="not valid"):
            store.get("a", limit=len(data))


@pytest.mark.parametrize("server", ["ceph_server", "moto_iam"])
def test_one_signature_serves_for_all_ranges_of_an_object(opened: Callable[..., S3Store], server: str) -> None:
    """Servers that verify each one take it again and again: what range it is, is not signed."""
    store, data = opened(server), content(MIB)
    for key in ("a", "b"):
        write(store, key, data)
    asked = [
        store._client.request("GetObject", f"folder/{key}", Range=f"bytes={n}-{n + 9}") for key in "ab" for n in (0, 5)
    ]
    assert len({request.headers["Authorization"] for request in asked}) == 2, "one for each object"
    assert [request.headers["Range"] for request in asked[:2]] == ["bytes=0-9", "bytes=5-14"]
    for request in asked:
        first = int(request.headers["Range"].removeprefix("bytes=").partition("-")[0])
        with store._client.wire.open(request, where="it") as reply:
            assert reply.read(100) == data[first : first + 10]


def test_what_is_signed_in_another_way_is_signed_by_botocore(opened: Callable[..., S3Store]) -> None:
    """As for buckets whose requests are not signed with SigV4; here it is the older SigV2, which Ceph checks."""
    store, data = opened("ceph_server"), content(20 * MIB)
    store._client.api.meta.events.register("choose-signer.s3", lambda **_: "s3")
    assert store._client.request("GetObject", "a").headers["authorization"].startswith("AWS ceph-key:")
    write(store, "a b", data, slice_size=16 * MIB)
    store.put("small", b"abc", exclusive=True)
    room = bytearray(MIB)
    store.readinto("a b", 5, memoryview(room))
    assert room == data[5 : 5 + MIB]
    assert store.get("small", limit=3) == b"abc"


def test_a_body_that_botocore_would_sign_is_not_sent_unsigned(opened: Callable[..., S3Store]) -> None:
    """Where only botocore can sign, the hash that it signs must not be that of nothing."""
    store = opened("s3_server")
    store._client._addresses["folder/a"] = replace(store._client._address("folder/a"), otherwise=True)
    with pytest.raises(UsageError, match="can only be read"):
        store.put("a", b"abc")
    with pytest.raises(NotFound):
        store.get("a", limit=3)


def test_a_server_whose_certificate_nobody_vouches_for(
    opened: Callable[..., S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused by boto3 and by the wire alike."""
    uri = opened("moto_tls").uri
    monkeypatch.delenv("AWS_CA_BUNDLE")
    with S3Store(uri, attempts=1) as store:
        for call in (lambda: list(store.list()), lambda: store.readinto("a", 0, memoryview(bytearray(1)))):
            with pytest.raises(StoreError, match="cannot be trusted"):
                call()
