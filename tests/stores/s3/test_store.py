"""S3Store obeys every law on a real server, and gets through what goes wrong between it and a server."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from shardtool.errors import AccessDenied, AlreadyExists, FormatError, NotFound, StoreError, UsageError
from shardtool.stores.s3.store import Access, S3Store
from shardtool.testing import StoreContract, read, write
from tests.servers import Proxy, S3Server, Trouble
from tests.servers.web import Scripted, Visit, reply
from tests.stores.far import NEIGHBOURS, HttpContract, Opened, Raw

MIB = 1 << 20


class TestS3Store(StoreContract):
    """Every law holds in a folder of a bucket that has other objects too."""

    gaps = frozenset({"age"})  # moto says of every upload that it began in 2010

    @pytest.fixture
    def store(self, bucket: str, raw: Raw) -> Iterator[S3Store]:
        for key in NEIGHBOURS:
            raw(key, b"not ours")
        with S3Store(f"s3://{bucket}/models/llama/") as store:
            yield store


@pytest.fixture
def store(bucket: str) -> Iterator[S3Store]:
    """A whole bucket."""
    with S3Store(f"s3://{bucket}") as store:
        yield store


@pytest.fixture
def behind(bucket: str, proxy: Proxy) -> Opened:
    """The bucket behind the proxy; next to nothing is waited between tries."""
    return partial(S3Store, f"s3://{bucket}", backoff=0.001)


@pytest.fixture
def raw(bucket: str, s3_server: S3Server) -> Raw:
    """Puts an object by boto3."""
    return lambda key, data: s3_server.client.put_object(Bucket=bucket, Key=key, Body=data)


@pytest.fixture
def at_port(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], S3Store]:
    """Opens the bucket on a port of this machine."""

    def opened(port: int) -> S3Store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        return S3Store(f"s3://{bucket}", attempts=1)

    return opened


class TestOnTheWay(HttpContract):
    """What happens between S3 and us."""

    extra = 6 * MIB
    nowhere = "s3://no-such-bucket/folder/"
    untold = frozenset({"stat"})
    busy = ((503, "SlowDown"), (500, "InternalError"), (502, ""), (429, "Throttling"))
    throttled = (503, "SlowDown")
    library = 3
    refusals = (
        (403, "AccessDenied", AccessDenied, "access .*denied .*AccessDenied"),
        (403, "SignatureDoesNotMatch", AccessDenied, "credentials .*not valid"),
        (403, "InvalidAccessKeyId", AccessDenied, "credentials .*not valid"),
        (400, "ExpiredToken", AccessDenied, "credentials .*not valid"),
        (403, "RequestTimeTooSkewed", AccessDenied, "clock"),
        (400, "InvalidURI", StoreError, "InvalidURI"),
    )


def uploads(server: S3Server, bucket: str) -> int:
    """How many multipart uploads are unfinished."""
    client = server.client
    found = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    return len(found)


# Addresses and settings


@pytest.mark.parametrize(
    "uri", ["s3://bucket/a?b", "s3://", "s3:///folder", "bucket/folder", "s3://bucket/a/../b", "s3://bucket/a//b"]
)
def test_an_address_that_names_no_bucket_or_folder_is_refused(uri: str) -> None:
    with pytest.raises(UsageError):
        S3Store(uri)


def test_a_name_that_no_bucket_can_have_is_refused(s3_server: S3Server) -> None:
    with S3Store("s3://no bucket") as store, pytest.raises(UsageError, match="s3://no bucket/a"):
        store.stat("a")


def test_a_profile_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match="nobody"):
        S3Store("s3://bucket")


def test_an_endpoint_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not an address")
    with pytest.raises(UsageError, match="not an address"):
        S3Store("s3://bucket")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_a_custom_endpoint_gets_the_bucket_in_the_path(
    bucket: str, proxy: Proxy, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = proxy.endpoint.replace("127.0.0.1", "localhost")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv(variable, endpoint)
    with S3Store(f"s3://{bucket}/folder") as store:
        assert not store.exists("a")
    assert [request.path for request in proxy.trouble.seen] == [f"/{bucket}/folder/a"]


def test_missing_credentials_are_access_denied(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with S3Store(f"s3://{bucket}") as store, pytest.raises(AccessDenied, match=r"no credentials .*AWS_PROFILE"):
        store.stat("a")


# Listing


def test_a_listing_has_many_pages(store: S3Store, s3_server: S3Server) -> None:
    """A page has 1000 keys at most."""
    client = s3_server.client
    bucket = store.uri.removeprefix("s3://")
    for number in range(1005):
        client.put_object(Bucket=bucket, Key=f"folder/{number:04}", Body=b"")
    assert [found.key for found in store.list("folder/")] == [f"folder/{number:04}" for number in range(1005)]


# Reading


def test_a_refused_head_says_that_the_object_may_be_missing(far: S3Store, trouble: Trouble) -> None:
    trouble.refused, trouble.status = 1, 403
    with pytest.raises(AccessDenied, match="whether it exists"):
        far.stat("a")


def test_a_range_answered_with_200_is_a_range(far: S3Store, trouble: Trouble) -> None:
    """Some servers send the right bytes with the status of a whole object."""
    far.put("a", bytes(range(200)))
    trouble.answer_200 = True
    assert read(far, "a", 0, 200) == bytes(range(200))
    assert read(far, "a", 7, 100) == bytes(range(7, 107))
    with pytest.raises(FormatError):
        read(far, "a", 150, 100)


def test_a_server_that_ignores_ranges_is_found_out(far: S3Store, trouble: Trouble) -> None:
    """Its answer to a range begins with the wrong bytes."""
    far.put("a", bytes(range(200)))
    trouble.ignore_ranges = True
    assert read(far, "a", 0, 100) == bytes(range(100))
    for start, size in ((7, 100), (1, 199)):
        with pytest.raises(StoreError, match="ignores which bytes"):
            read(far, "a", start, size)


# Writing


def test_the_size_decides_how_an_object_is_uploaded(store: S3Store) -> None:
    """Up to 8 MiB in one request with any slices; above in parts, of which there may not be too many."""
    for size, unit in ((0, 0), (8 * MIB, 0), (8 * MIB + 1, 5 * MIB), (45_000 * MIB, 5 * MIB), (45_001 * MIB, 6 * MIB)):
        writer = store.create("a", size)
        writer.abort()
        assert writer.unit == unit
    assert -(-(5 << 40) // store.create("a", 5 << 40).unit) <= 10_000


def test_an_abort_leaves_no_parts_behind(store: S3Store, s3_server: S3Server) -> None:
    bucket = store.uri.removeprefix("s3://")
    writer = store.create("a", 20 * MIB)
    writer.write(0, bytes(8 * MIB))
    assert uploads(s3_server, bucket) == 1
    writer.abort()
    assert uploads(s3_server, bucket) == 0


def test_a_lost_answer_to_the_commit_is_not_a_lost_object(far: S3Store, trouble: Trouble) -> None:
    """The repetition is told that there is no such upload, and the object is known by its mark."""
    data = random.Random(4).randbytes(12 * MIB)
    writer = far.create("a", len(data))
    writer.write(0, data)
    trouble.lost, trouble.refused, trouble.status, trouble.code, trouble.methods = 1, 1, 404, "NoSuchUpload", ("POST",)
    writer.commit()
    assert (trouble.lost, trouble.refused) == (0, 0)
    assert far.get("a", limit=len(data)) == data


def test_an_upload_that_somebody_else_aborted_is_not_complete(far: S3Store, trouble: Trouble) -> None:
    """Not even when an object of the same name and size is there."""
    write(far, "a", bytes(12 * MIB), slice_size=6 * MIB)
    writer = far.create("a", 12 * MIB)
    writer.write(0, bytes(12 * MIB))
    trouble.refused, trouble.status, trouble.code, trouble.methods = 1, 404, "NoSuchUpload", ("POST",)
    with pytest.raises(NotFound, match="aborted by somebody else"):
        writer.commit()
    writer.abort()


def test_an_exclusive_object_whose_answer_was_lost_is_ours(far: S3Store, trouble: Trouble) -> None:
    """Its repetition is refused because of itself."""
    trouble.lost, trouble.methods = 1, ("PUT",)
    far.put("record", b"mine", exclusive=True)
    assert [request.method for request in trouble.seen].count("PUT") == 2
    assert far.get("record", limit=10) == b"mine"


def test_an_exclusive_object_of_another_is_not_ours(far: S3Store, trouble: Trouble) -> None:
    """After a repetition, an object with another content was made by another writer."""
    trouble.refused, trouble.methods = 1, ("PUT",)
    writer = far.create("record", 4, exclusive=True)
    writer.write(0, b"mine")
    real = far.exists

    def late(key: str) -> bool:
        found = real(key)
        trouble.methods = ("DELETE",)
        far.put(key, b"theirs")
        trouble.methods = ("PUT",)
        return found

    far.exists = late  # type: ignore[method-assign]  # the moment between the question and the PUT
    with pytest.raises(AlreadyExists, match="record"):
        writer.commit()
    assert far.get("record", limit=10) == b"theirs"


# How a server is reached.


@pytest.fixture
def nowhere(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with an object, of which boto3's environment says nothing."""
    s3_server.client.put_object(Bucket=bucket, Key="a", Body=b"x")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(variable)
    return f"s3://{bucket}"


def test_what_is_said_wins_over_the_settings_of_boto3(nowhere, s3_server):
    access = Access("test-key", "test-secret", region="us-east-1", endpoint=s3_server.endpoint)
    with S3Store(nowhere, access=access) as store:
        assert store.get("a", limit=1) == b"x"
    assert "test-secret" not in repr(access)


def test_what_is_open_to_all_is_read_as_nobody(nowhere, s3_server):
    endpoint = s3_server.endpoint
    with (
        S3Store(nowhere, access=Access(endpoint=endpoint, region="us-east-1")) as store,
        pytest.raises(AccessDenied, match="no credentials"),
    ):
        store.stat("a")
    with S3Store(nowhere, access=Access(endpoint=endpoint, region="us-east-1", unsigned=True)) as store:
        with pytest.raises(AccessDenied, match="the server says 403"):
            store.stat("a")
        s3_server.client.put_object_acl(Bucket=nowhere.partition("://")[2], Key="a", ACL="public-read")
        assert store.get("a", limit=1) == b"x"


@pytest.mark.parametrize(("addressing", "where"), [(None, "path"), ("path", "path"), ("virtual", "virtual")])
def test_the_bucket_goes_where_it_is_said(addressing, where):
    with S3Store("s3://bucket/x", access=Access(endpoint="http://127.0.0.1:9", addressing=addressing)) as store:
        assert store._client.api.meta.config.s3["addressing_style"] == where


@pytest.mark.parametrize("half", [{"access_key_id": "test-key"}, {"secret_access_key": "test-secret"}])
def test_half_of_the_credentials_is_refused(half):
    with pytest.raises(UsageError, match="belong together"):
        Access(**half)


def test_a_new_object_goes_to_a_bucket_in_another_region():
    """Where the bucket lies is asked of an object that is not there yet."""

    def server(visit: Visit) -> None:
        if "/eu-west-1/" not in visit.headers.get("authorization", ""):
            visit.say(reply(301, Content_Length=0, x_amz_bucket_region="eu-west-1"))
        else:
            visit.say(reply(404 if visit.line.startswith("HEAD") else 200, Content_Length=0, ETag='"1"'))

    with Scripted(server) as served:
        access = Access("key", "secret", region="us-east-1", endpoint=served.url)
        with S3Store("s3://bucket/x", access=access, backoff=0.001) as store:
            store.put("a", b"abc")
    assert served.visits[-1].line.startswith("PUT /bucket/x/a")
    assert served.visits[-1].body == b"abc"
