"""S3Store obeys every law on a real server, and gets through what goes wrong between it and a server."""

from __future__ import annotations

import random
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from shardtool.errors import AccessDenied, AlreadyExists, FormatError, NotFound, StoreError, Unavailable, UsageError
from shardtool.stores.base import Store
from shardtool.stores.s3.store import Access, S3Store
from shardtool.testing import StoreContract, write
from tests.servers import Proxy, S3Server, Trouble
from tests.servers.web import Scripted, Visit, reply

MIB = 1 << 20


class TestS3Store(StoreContract):
    """Every law holds in a folder of a bucket that has other objects too."""

    gaps = frozenset({"age"})  # moto says of every upload that it began in 2010

    @pytest.fixture
    def store(self, bucket: str, s3_server: S3Server) -> Iterator[S3Store]:
        client = s3_server.client
        for key in ("models/llama-2/a", "models/llama", "models/llamas", "z"):
            client.put_object(Bucket=bucket, Key=key, Body=b"not ours")
        with S3Store(f"s3://{bucket}/models/llama/") as store:
            yield store


@pytest.fixture
def store(bucket: str) -> Iterator[S3Store]:
    """A whole bucket."""
    with S3Store(f"s3://{bucket}") as store:
        yield store


@pytest.fixture
def proxy(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server, to which boto3's environment points."""
    with Proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def trouble(proxy: Proxy) -> Trouble:
    """What goes wrong between ``far`` and the server."""
    return proxy.trouble


@pytest.fixture
def far(bucket: str, proxy: Proxy) -> Iterator[S3Store]:
    """The bucket behind the proxy, which waits next to nothing between tries."""
    with S3Store(f"s3://{bucket}", backoff=0.001) as store:
        yield store


def read(store: Store, key: str, start: int, size: int) -> bytes:
    """A range as bytes."""
    room = bytearray(size)
    store.readinto(key, start, memoryview(room))
    return bytes(room)


def ranges(trouble: Trouble) -> list[str]:
    """The ranges that were asked for."""
    return [request.range.removeprefix("bytes=") for request in trouble.seen if request.method == "GET"]


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


def test_a_bucket_that_does_not_exist_is_named(bucket: str) -> None:
    with S3Store("s3://no-such-bucket/folder") as store:
        room = memoryview(bytearray(1))
        calls: list[Callable[[], object]] = [
            lambda: list(store.list()),
            lambda: store.readinto("a", 0, room),
            lambda: store.create("a", 20 * MIB),
            lambda: store.put("a", b"x"),
        ]
        for call in calls:
            with pytest.raises(NotFound, match=r"the bucket of s3://no-such-bucket/folder/\S* does not exist"):
                call()
        with pytest.raises(NotFound, match="s3://no-such-bucket/folder/a"):
            store.stat("a")


def test_a_server_that_does_not_answer_is_unavailable(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with (
            S3Store(f"s3://{bucket}", attempts=1) as store,
            pytest.raises(Unavailable, match="cannot be reached"),
        ):
            store.readinto("a", 0, memoryview(bytearray(1)))


# Listing


def test_a_listing_has_many_pages(store: S3Store, s3_server: S3Server) -> None:
    """A page has 1000 keys at most."""
    client = s3_server.client
    bucket = store.uri.removeprefix("s3://")
    for number in range(1005):
        client.put_object(Bucket=bucket, Key=f"folder/{number:04}", Body=b"")
    assert [found.key for found in store.list("folder/")] == [f"folder/{number:04}" for number in range(1005)]


def test_markers_of_folders_are_not_objects(store: S3Store, s3_server: S3Server) -> None:
    """Consoles make empty objects whose name ends with a slash."""
    client = s3_server.client
    for key in ("folder/", "folder/a", "double//slash"):
        client.put_object(Bucket=store.uri.removeprefix("s3://"), Key=key, Body=b"")
    assert [found.key for found in store.list()] == ["folder/a"]


# Reading


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_body_is_continued_where_it_was_cut(far: S3Store, trouble: Trouble, reset: bool) -> None:
    """Only what is missing is asked for again."""
    data = random.Random(1).randbytes(3 * MIB)
    far.put("a", data)
    trouble.cuts, trouble.cut_after, trouble.reset = 2, MIB, reset
    assert read(far, "a", 1000, 2 * MIB + 500_000) == data[1000 : 1000 + 2 * MIB + 500_000]
    starts = [int(found.split("-")[0]) for found in ranges(trouble)]
    assert len(starts) == 3
    assert starts == sorted(starts)
    assert starts[0] == 1000
    # A reset may take back what had arrived; an end does not.
    assert reset or starts == [1000, 1000 + MIB, 1000 + 2 * MIB]
    assert {found.split("-")[1] for found in ranges(trouble)} == {str(1000 + 2 * MIB + 500_000 - 1)}


def test_connections_that_bring_something_may_break_more_often(far: S3Store, trouble: Trouble) -> None:
    data = random.Random(2).randbytes(12 * MIB)
    write(far, "a", data, slice_size=6 * MIB)
    trouble.cuts, trouble.cut_after = 11, MIB
    assert read(far, "a", 0, len(data)) == data


def test_connections_that_bring_nothing_are_given_up(bucket: str, proxy: Proxy) -> None:
    with S3Store(f"s3://{bucket}", attempts=3, backoff=0.001) as store:
        store.put("a", b"abc")
        proxy.trouble.cuts = 1000
        with pytest.raises(Unavailable, match=f"s3://{bucket}/a"):
            read(store, "a", 0, 3)
    assert ranges(proxy.trouble) == ["0-2"] * 3


@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (502, ""), (429, "Throttling")]
)
def test_a_busy_server_is_asked_again(far: S3Store, trouble: Trouble, status: int, code: str) -> None:
    far.put("a", b"abc")
    trouble.refused, trouble.status, trouble.code = 2, status, code
    assert read(far, "a", 0, 3) == b"abc"
    assert ranges(trouble) == ["0-2"] * 3


def test_a_server_that_stays_busy_is_unavailable(bucket: str, proxy: Proxy) -> None:
    with S3Store(f"s3://{bucket}", attempts=1) as store:
        proxy.trouble.refused = 1000
        with pytest.raises(Unavailable, match=r"too often .*SlowDown"):
            read(store, "a", 0, 1)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access .*denied .*AccessDenied"),
        (403, "SignatureDoesNotMatch", "credentials .*not valid"),
        (403, "InvalidAccessKeyId", "credentials .*not valid"),
        (400, "ExpiredToken", "credentials .*not valid"),
        (403, "RequestTimeTooSkewed", "clock"),
    ],
)
def test_a_refusal_is_final(far: S3Store, trouble: Trouble, status: int, code: str, message: str) -> None:
    far.put("a", b"abc")
    trouble.refused, trouble.status, trouble.code = 1, status, code
    with pytest.raises(AccessDenied, match=message):
        read(far, "a", 0, 3)
    assert len(ranges(trouble)) == 1


def test_a_refused_head_says_that_the_object_may_be_missing(far: S3Store, trouble: Trouble) -> None:
    trouble.refused, trouble.status = 1, 403
    with pytest.raises(AccessDenied, match="whether it exists"):
        far.stat("a")


def test_a_missing_object_is_asked_for_once(far: S3Store, trouble: Trouble) -> None:
    with pytest.raises(NotFound, match="/a does not exist"):
        read(far, "a", 0, 1)
    assert len(trouble.seen) == 1


def test_an_answer_of_another_kind_is_told_as_it_is(far: S3Store, trouble: Trouble) -> None:
    trouble.refused, trouble.status, trouble.code = 1, 400, "InvalidURI"
    with pytest.raises(StoreError, match="InvalidURI"):
        read(far, "a", 0, 1)


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


def test_an_object_replaced_between_two_tries_is_noticed(
    far: S3Store, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of one object and half of another must not be taken for one."""
    far.put("a", bytes(2 * MIB))
    trouble.cuts, trouble.cut_after = 1, MIB
    waits: list[float] = []

    def replace(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            far.put("a", b"x" * (2 * MIB))

    monkeypatch.setattr("shardtool.stores.wire.retry.time", SimpleNamespace(sleep=replace, monotonic=time.monotonic))
    with pytest.raises(StoreError, match="replaced while it was read"):
        read(far, "a", 0, 2 * MIB)


@pytest.mark.parametrize("look", [lambda store: list(store.list("")), lambda store: store.stat("a")])
def test_an_object_is_read_in_the_version_that_was_seen(
    store: S3Store, s3_server: S3Server, look: Callable[[S3Store], object]
) -> None:
    """Ranges of one checkpoint come from one version of its files, until somebody looks again."""
    bucket = store.uri.removeprefix("s3://")
    store.put("a", b"old")
    look(store)
    assert read(store, "a", 0, 1) == b"o"
    s3_server.client.put_object(Bucket=bucket, Key="a", Body=b"new")
    with pytest.raises(StoreError, match="replaced while it was read"):
        read(store, "a", 1, 1)
    assert store.get("a", limit=3) == b"new"
    look(store)
    assert read(store, "a", 1, 1) == b"e"
    store.put("a", b"our")
    assert read(store, "a", 1, 1) == b"u"


# Writing


def test_the_size_decides_how_an_object_is_uploaded(store: S3Store) -> None:
    """Up to 8 MiB in one request with any slices; above in parts, of which there may not be too many."""
    for size, unit in ((0, 0), (8 * MIB, 0), (8 * MIB + 1, 5 * MIB), (45_000 * MIB, 5 * MIB), (45_001 * MIB, 6 * MIB)):
        writer = store.create("a", size)
        writer.abort()
        assert writer.unit == unit
    assert -(-(5 << 40) // store.create("a", 5 << 40).unit) <= 10_000


def test_a_large_object_cannot_be_exclusive(store: S3Store) -> None:
    """Servers exist that ignore the condition when parts are put together."""
    with pytest.raises(UsageError, match="exclusively"):
        store.create("a", 512 * MIB + 1, exclusive=True)


def test_an_abort_leaves_no_parts_behind(store: S3Store, s3_server: S3Server) -> None:
    bucket = store.uri.removeprefix("s3://")
    writer = store.create("a", 20 * MIB)
    writer.write(0, bytes(8 * MIB))
    assert uploads(s3_server, bucket) == 1
    writer.abort()
    assert uploads(s3_server, bucket) == 0


def test_an_abort_that_fails_does_not_hide_what_failed_before(far: S3Store, trouble: Trouble) -> None:
    writer = far.create("a", 20 * MIB)
    trouble.refused, trouble.status, trouble.code, trouble.methods = 1, 403, "AccessDenied", ("DELETE",)
    writer.abort()
    assert trouble.refused == 0


@pytest.mark.parametrize("size", [3, 12 * MIB])
def test_an_upload_gets_through_to_a_busy_server(far: S3Store, trouble: Trouble, size: int) -> None:
    data = random.Random(3).randbytes(size)
    trouble.refused = 3
    write(far, "a", data, slice_size=6 * MIB)
    assert far.get("a", limit=size) == data


@pytest.mark.parametrize("size", [3, 12 * MIB])
def test_a_lost_answer_to_bytes_is_asked_for_again(far: S3Store, trouble: Trouble, size: int) -> None:
    """Sending the same bytes twice is no harm."""
    data = random.Random(4).randbytes(size)
    trouble.lost, trouble.methods = 1, ("PUT",)
    write(far, "a", data, slice_size=6 * MIB)
    assert far.get("a", limit=size) == data


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


def test_memory_goes_to_the_server_and_comes_from_it_without_a_copy(store: S3Store) -> None:
    """Neither a part nor a range is held a second time."""
    size = 32 * MIB
    data = memoryview(bytearray(random.Random(5).randbytes(MIB)) * 32)
    room = memoryview(bytearray(size))
    write(store, "warm", data[: 10 * MIB])
    read(store, "warm", 0, 1)
    tracemalloc.start()
    try:
        write(store, "a", data, slice_size=size)
        store.readinto("a", 0, room)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert room == data
    assert peak < 6 * MIB


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
