"""An exclusive object of any size: one writer wins, the others are told, and memory stays what the store says."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

from shardtool.errors import AlreadyExists, NotFound, UsageError
from shardtool.stores.s3 import store as s3
from shardtool.stores.s3.errors import Unsupported
from shardtool.stores.s3.store import S3Store
from shardtool.testing import write
from shardtool.testing.words import content
from tests.servers import Proxy, S3Server, Trouble

MIB = 1 << 20
LARGE = 12 * MIB


@pytest.fixture
def store(bucket: str) -> Iterator[S3Store]:
    with S3Store(f"s3://{bucket}/folder") as store:
        yield store


@pytest.fixture
def proxy(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server, to which boto3's environment points."""
    with Proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def trouble(proxy: Proxy) -> Trouble:
    return proxy.trouble


@pytest.fixture
def far(bucket: str, proxy: Proxy) -> Iterator[S3Store]:
    """The bucket behind the proxy, as if it were Amazon's, whose conditions are known to be heeded; moto's are too."""
    with S3Store(f"s3://{bucket}", backoff=0.001) as store:
        store._client.amazon = store._proven = True
        yield store


def asked(trouble: Trouble, method: str) -> int:
    return [request.method for request in trouble.seen].count(method)


@pytest.mark.parametrize("size", [3 * MIB, 32 * MIB])
@pytest.mark.parametrize("exclusive", [False, True])
def test_a_writer_holds_what_was_foretold(store: S3Store, size: int, exclusive: bool) -> None:
    """Beside the caller's own slices, which are of the size that the store asks for."""
    data, slice_size = memoryview(bytearray(size)), max(MIB, store.unit(size))
    write(store, "warm", data, slice_size=slice_size, exclusive=exclusive)
    tracemalloc.start()
    try:
        write(store, "a", data, slice_size=slice_size, exclusive=exclusive)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert store.held(size) <= 8 * MIB
    assert peak < store.held(size) + 3 * MIB


@pytest.mark.parametrize("size", [3 * MIB, 32 * MIB])
def test_what_is_put_exclusively_is_not_held_twice(store: S3Store, size: int) -> None:
    data = memoryview(bytearray(size))
    store.put("warm", data, exclusive=True)
    tracemalloc.start()
    try:
        store.put("a", data, exclusive=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * MIB
    assert store.stat("a").size == size


def test_what_is_put_exclusively_is_one_request_as_long_as_a_server_takes_it(
    far: S3Store, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its condition is heeded by more servers than that of an upload in parts."""
    data = content(LARGE)
    far.put("a", data, exclusive=True)
    assert (asked(trouble, "PUT"), asked(trouble, "POST")) == (1, 0)
    monkeypatch.setattr(s3, "_EXCLUSIVE", 10 * MIB)
    far.put("b", data, exclusive=True)
    assert asked(trouble, "POST") == 2  # the beginning and the end of an upload
    assert far.get("a", limit=LARGE) == far.get("b", limit=LARGE) == data
    for key in ("a", "b"):
        with pytest.raises(AlreadyExists, match=f"{far.uri}/{key} exists already"):
            far.put(key, bytes(LARGE), exclusive=True)
        assert far.get(key, limit=LARGE) == data
    with pytest.raises(UsageError):
        far.put("../a", b"", exclusive=True)


def test_a_large_object_replaces_nothing_though_it_was_not_there_a_moment_ago(
    far: S3Store, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question comes first, the condition decides; and nothing is left of the upload that lost."""
    writer = far.create("a", LARGE, exclusive=True)
    write(far, "a", content(LARGE), exclusive=True)
    monkeypatch.setattr(far, "exists", lambda key: False)
    writer.write(0, bytes(LARGE))
    with pytest.raises(AlreadyExists, match=f"s3://{bucket}/a exists already"):
        writer.commit()
    writer.abort()
    assert far.get("a", limit=LARGE) == content(LARGE)
    assert list(far.unfinished()) == []
    assert far.conditional


def test_a_large_object_that_is_there_is_not_replaced(store: S3Store) -> None:
    store.put("a", b"first")
    with pytest.raises(AlreadyExists, match="/folder/a exists already"):
        write(store, "a", bytes(LARGE), exclusive=True)
    assert store.get("a", limit=5) == b"first"
    write(store, "b", content(LARGE), exclusive=True)
    assert store.get("b", limit=LARGE) == content(LARGE)


@pytest.mark.parametrize(
    ("server", "heeds"), [("s3_server", True), ("ministack", True), ("ceph_server", False), ("rclone", False)]
)
def test_of_large_exclusive_writers_that_meet_one_wins(
    server: str, heeds: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the server heeds the condition of an upload or not; the store does not promise it.

    Both saw that there is no object. The second ends its upload while the first waits to see who was the last.
    """
    at: S3Server = request.getfixturevalue(server)
    told: list[int] = []
    with S3Store(f"s3://{at.bucket(monkeypatch)}/folder") as store:
        writers = [store.create("record", LARGE, exclusive=True) for _ in range(2)]
        for number, writer in enumerate(writers):
            writer.write(0, bytes([number]) * LARGE)

        def end(number: int) -> None:
            try:
                writers[number].commit()
            except AlreadyExists:
                told.append(number)

        def meanwhile(seconds: float) -> None:
            assert seconds >= 1
            monkeypatch.setattr(s3, "sleep", lambda _: None)
            end(1)

        monkeypatch.setattr(store, "exists", lambda _: False)
        monkeypatch.setattr(s3, "sleep", meanwhile)
        end(0)
        assert told == [1 if heeds else 0]
        assert store.get("record", limit=LARGE) == bytes([1 - told[0]]) * LARGE
        assert not store.conditional


def test_a_large_exclusive_object_whose_answer_was_lost_is_ours(far: S3Store, trouble: Trouble) -> None:
    writer = far.create("a", LARGE, exclusive=True)
    writer.write(0, content(LARGE))
    trouble.lost, trouble.methods = 1, ("POST",)
    writer.commit()
    assert trouble.lost == 0
    assert far.get("a", limit=LARGE) == content(LARGE)


@pytest.mark.parametrize("there", [True, False])
def test_an_upload_that_somebody_else_ended_is_not_ours(far: S3Store, trouble: Trouble, there: bool) -> None:
    """Whether there is another's object by then or none."""
    writer = far.create("a", LARGE, exclusive=True)
    writer.write(0, bytes(LARGE))
    real = far.exists

    def late(key: str) -> bool:
        found = real(key)
        if there and not found:
            far.put(key, b"theirs")
        trouble.refused, trouble.status, trouble.code, trouble.methods = 1, 404, "NoSuchUpload", ("POST",)
        return found

    far.exists = late  # type: ignore[method-assign]  # the moment between the question and the end of the upload
    with pytest.raises(AlreadyExists if there else NotFound, match="exists already" if there else "somebody else"):
        writer.commit()
    writer.abort()


def test_a_server_that_does_not_know_the_condition_of_an_upload_does_without(bucket: str, proxy: Proxy) -> None:
    """And who was the last is looked for; Amazon would be believed."""
    trouble = proxy.trouble
    for amazon in (False, True):
        with S3Store(f"s3://{bucket}/{amazon}", backoff=0.001) as store:
            store._client.amazon = amazon
            writer = store.create("a", LARGE, exclusive=True)
            writer.write(0, content(LARGE))
            trouble.refused, trouble.status, trouble.code, trouble.methods = 1, 501, "NotImplemented", ("POST",)
            if amazon:
                with pytest.raises(Unsupported, match="NotImplemented"):
                    writer.commit()
                writer.abort()
            else:
                writer.commit()
                assert store.get("a", limit=LARGE) == content(LARGE)
                assert not store.conditional
            assert trouble.refused == 0


def test_an_object_is_compared_piece_by_piece(store: S3Store) -> None:
    """Where an answer was lost, to know whether the object is ours."""
    data = content(LARGE)
    store.put("a", data)
    assert store._holds("a", memoryview(data))
    assert not store._holds("a", memoryview(data[:-1]))
    assert not store._holds("a", memoryview(data[:-1] + b"?"))
    assert not store._holds("missing", memoryview(data))
    tracemalloc.start()
    try:
        store._holds("a", memoryview(data))
        assert tracemalloc.get_traced_memory()[1] < 3 * MIB
    finally:
        tracemalloc.stop()
