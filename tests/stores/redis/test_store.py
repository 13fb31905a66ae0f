"""RedisStore obeys every law on each kind of server, and says what is wrong with a server that refuses."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shardtool.errors import AccessDenied, FormatError, NotFound, ShardtoolError, StoreError, Unavailable, UsageError
from shardtool.stores import open_store
from shardtool.stores.redis.errors import translated
from shardtool.stores.redis.records import CHUNK, UNIT, Entry
from shardtool.stores.redis.store import RedisStore
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.retry import Again
from shardtool.testing import StoreContract, read, write
from tests.servers.redis import PASSWORD, READER, WRITER, RedisServer
from tests.stores.far import ServerContract

MIB = 1 << 20
SOON = Again(attempts=3, backoff=0.01)
LOGIN = ":pass%2Fword%401@"


class TestRedisStore(StoreContract):
    """Every law holds beside a name that begins alike."""

    @pytest.fixture
    def store(self, redis_server: RedisServer, redis_name: str) -> Iterator[RedisStore]:
        with RedisStore(redis_server.address(f"{redis_name}-2")) as other:
            other.put("not ours", b"x")
        with RedisStore(redis_server.address(redis_name)) as store:
            yield store


class TestRedisStoreWithTls(StoreContract):
    """With a password, over TLS."""

    @pytest.fixture
    def store(
        self, locked_redis: RedisServer, redis_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[RedisStore]:
        monkeypatch.setenv("SSL_CERT_FILE", str(locked_redis.ca))
        with RedisStore(locked_redis.address(redis_name, login=":pass%2Fword%401@", tls=True)) as store:
            yield store


class TestRedisStoreOfAUser(StoreContract):
    """With no more rights than docs/stores.md asks for."""

    @pytest.fixture
    def store(
        self, locked_redis: RedisServer, redis_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[RedisStore]:
        monkeypatch.setenv("REDIS_USERNAME", WRITER[0])
        monkeypatch.setenv("REDIS_PASSWORD", WRITER[1])
        with RedisStore(locked_redis.address(f"shared/{redis_name}")) as store:
            yield store


class TestRedisStoreForSGLang(StoreContract):
    """Files that SGLang reads obey the same laws."""

    @pytest.fixture
    def store(self, redis_server: RedisServer, redis_name: str) -> Iterator[RedisStore]:
        with RedisStore(f"{redis_server.address(redis_name)}?for=sglang") as store:
            yield store


@pytest.fixture
def store(redis_server: RedisServer, redis_name: str) -> Iterator[RedisStore]:
    with RedisStore(redis_server.address(redis_name), again=SOON) as store:
        yield store


@pytest.fixture
def at_port(redis_name: str) -> Callable[[int], RedisStore]:
    """Opens a name on a port of this machine."""
    return lambda port: RedisStore(f"redis://127.0.0.1:{port}/{redis_name}", again=Again(attempts=1))


class TestOnTheWay(ServerContract):
    """What holds of every store that has a server."""

    extra = MIB
    unreached = "cannot be reached at 127"


@contextmanager
def configured(server: RedisServer, **values: str) -> Iterator[None]:
    """The server with other settings."""
    now = {name.replace("_", "-"): value for name, value in values.items()}
    before = {name: server.client.config_get(name)[name] for name in now}
    try:
        for name, value in now.items():
            server.client.config_set(name, value)
        yield
    finally:
        for name, value in before.items():
            server.client.config_set(name, value)


# Addresses


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("redis://", "names no host"),
        ("redis:///name", "names no host"),
        ("redis://host", "names no checkpoint"),
        ("redis://host:6379/", "names no checkpoint"),
        ("redis://host:port/name", "host or port"),
        ("redis://host/a//b", "relative path"),
        ("redis://host/a/../b", "relative path"),
        ("redis://host/name?db=x", "db=x is not the number"),
        ("redis://host/name?database=1", "'database', which is not one of db, for"),
        ("redis://host/name?for=vllm", "for=vllm is not known"),
        ("rediss://host/name?ssl_ca_certs=/no/such/file", "/no/such/file cannot be used"),
    ],
)
def test_an_address_that_makes_no_sense_is_refused(uri: str, message: str) -> None:
    kind, _, rest = uri.partition("://")
    for address in (uri, f"{kind}://user:hidden@{rest}"):
        with pytest.raises(UsageError, match=message) as refused:
            RedisStore(address)
        assert "hidden" not in str(refused.value)


def test_an_address_is_shown_without_who_we_are() -> None:
    with open_store("REDIS://me:secret@Host:1234/a/b/?db=3") as store:
        assert store.uri == "redis://Host:1234/a/b?db=3"
        assert store.place() == "redis://host:1234/a/b?db=3"
        assert "secret" not in repr(vars(store))
        assert "secret" not in repr(store._address)  # type: ignore[attr-defined]
    with open_store("rediss://[::1]/a") as store:
        assert store.locate("x") == "rediss://[::1]/a/x"
        assert store.place() == "redis://::1:6379/a?db=0"


def test_databases_are_apart(redis_server: RedisServer, redis_name: str) -> None:
    with (
        RedisStore(redis_server.address(redis_name)) as first,
        RedisStore(f"{redis_server.address(redis_name)}?db=1") as second,
    ):
        first.put("a", b"first")
        assert list(second.list()) == []
        second.put("a", b"second")
        assert first.get("a", limit=10) == b"first"
        assert first.place() != second.place()


# How a server is reached


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("login", [LOGIN, f"default{LOGIN}"])
def test_a_password_is_taken_from_the_address(
    locked_redis: RedisServer, redis_name: str, monkeypatch: pytest.MonkeyPatch, login: str, tls: bool
) -> None:
    """Before that of the environment. The certificate's authority may be in the address too."""
    monkeypatch.setenv("REDIS_PASSWORD", "another")
    monkeypatch.setenv("REDIS_USERNAME", "nobody")
    address = locked_redis.address(redis_name, login=login, tls=tls)
    with RedisStore(f"{address}?ssl_ca_certs={locked_redis.ca}") as store:
        store.put("a", b"x")
        assert store.get("a", limit=1) == b"x"


def test_a_password_is_taken_from_the_environment(
    locked_redis: RedisServer, redis_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may be named in the address, where everybody sees it, and the password not."""
    monkeypatch.setenv("REDIS_PASSWORD", PASSWORD)
    with RedisStore(locked_redis.address(redis_name)) as store:
        store.put("a", b"x")
    monkeypatch.setenv("REDIS_PASSWORD", WRITER[1])
    with RedisStore(locked_redis.address(f"shared/{redis_name}", login=f"{WRITER[0]}@")) as store:
        store.put("a", b"x")


@pytest.mark.parametrize(
    ("login", "message"),
    [
        ("", "asks for a password .*NOAUTH.*REDIS_PASSWORD"),
        (":no-such-password@", "is wrong .*WRONGPASS"),
        ("nobody:no-such-password@", "is wrong .*WRONGPASS"),
    ],
)
def test_who_is_not_known_is_denied(locked_redis: RedisServer, redis_name: str, login: str, message: str) -> None:
    with RedisStore(locked_redis.address(redis_name, login=login)) as store:
        for call in (lambda: list(store.list()), lambda: store.stat("a"), lambda: store.put("a", b"x")):
            with pytest.raises(AccessDenied, match=message) as denied:
                call()
            assert "no-such-password" not in str(denied.value)
            assert redis_name in str(denied.value)


def test_a_password_that_nobody_asked_for_is_an_error(redis_server: RedisServer, redis_name: str) -> None:
    with RedisStore(redis_server.address(redis_name, login=LOGIN)) as store, pytest.raises(AccessDenied) as denied:
        store.stat("a")
    assert "knows no password" in str(denied.value)
    assert PASSWORD not in str(denied.value)


def test_a_user_does_what_he_may(locked_redis: RedisServer, redis_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who may only read reads; nobody gets at names that are not his."""
    address = locked_redis.address(f"shared/{redis_name}")
    monkeypatch.setenv("REDIS_USERNAME", WRITER[0])
    monkeypatch.setenv("REDIS_PASSWORD", WRITER[1])
    with RedisStore(address) as store:
        store.put("a", b"abc")
    with RedisStore(locked_redis.address(redis_name)) as store, pytest.raises(AccessDenied, match="NOPERM"):
        store.put("a", b"abc")
    monkeypatch.setenv("REDIS_USERNAME", READER[0])
    monkeypatch.setenv("REDIS_PASSWORD", READER[1])
    with RedisStore(address) as store:
        assert [found.key for found in store.list()] == ["a"]
        assert store.get("a", limit=3) == b"abc"
        assert list(store.unfinished()) == []
        for call in (lambda: store.put("b", b"x"), lambda: store.delete("a")):
            with pytest.raises(AccessDenied, match=r"may not do this .*\+@write \+eval"):
                call()
    assert RedisStore(address).uri == address


def test_a_certificate_that_nobody_vouches_for_is_refused(
    locked_redis: RedisServer, redis_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        RedisStore(locked_redis.address(redis_name, login=LOGIN, tls=True)) as store,
        pytest.raises(StoreError, match=r"cannot be trusted .*SSL_CERT_FILE") as refused,
    ):
        store.stat("a")
    assert not refused.value.retryable
    monkeypatch.setenv("SSL_CERT_FILE", str(locked_redis.ca))
    address = locked_redis.address(redis_name, login=LOGIN, tls=True).replace("localhost", "127.0.0.1")
    with RedisStore(address) as store, pytest.raises(StoreError, match="cannot be trusted"):
        store.stat("a")


def test_tls_where_there_is_none_and_none_where_there_is(redis_server: RedisServer, redis_name: str) -> None:
    plain = f"redis://127.0.0.1:{redis_server.tls_port}/{redis_name}"
    with RedisStore(plain, again=SOON) as store, pytest.raises(Unavailable, match="write rediss://"):
        store.stat("a")
    secure = f"rediss://127.0.0.1:{redis_server.port}/{redis_name}"
    pace = Pace(connect=1, silence=1)
    with RedisStore(secure, again=SOON, pace=pace) as store, pytest.raises(StoreError):
        store.stat("a")


@contextmanager
def speaking(said: bytes) -> Iterator[int]:
    """A server that says this to whoever connects, and no more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connected, _ = listener.accept()
                except OSError:
                    return
                held.append(connected)
                connected.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for each in held:
                each.close()


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$x\r\n",
        b"$3\r\nabcd\r\n",
        b"$99999999999\r\n",
        b"*99999999999\r\n",
        b"*9000000\r\n",
        b"*1\r\n" * 9,
        b"*1\r\n-ERR no\r\n",
        b"-" + b"x" * (1 << 17),
    ],
)
def test_a_server_of_another_kind_is_found_out(said: bytes) -> None:
    """Whatever it says, in no time and in no more memory than makes sense."""
    with speaking(said) as port, RedisStore(f"redis://127.0.0.1:{port}/a", again=SOON) as store:
        with pytest.raises(StoreError, match="does not speak Redis' protocol") as refused:
            list(store.list())
        assert not refused.value.retryable


def test_a_silent_server_is_given_up(redis_name: str) -> None:
    began = time.monotonic()
    with speaking(b"") as port:
        address = f"redis://127.0.0.1:{port}/{redis_name}"
        pace = Pace(connect=1, silence=0.2)
        with RedisStore(address, again=SOON, pace=pace) as store, pytest.raises(Unavailable, match="broke"):
            store.stat("a")
    assert time.monotonic() - began < 40  # of a minute or more at the usual pace


def test_connections_that_the_server_closed_are_not_used(store: RedisStore, redis_server: RedisServer) -> None:
    """Idle ones are closed by servers after a while, and by those that are started anew."""
    store.put("a", b"abc")
    redis_server.client.client_kill_filter(_type="normal")
    assert store.get("a", limit=3) == b"abc"


# What a server refuses


def test_memory_that_is_full_is_told(store: RedisStore, redis_server: RedisServer) -> None:
    """Nothing is visible of what did not fit, and what was sent of it is removed."""
    store.put("a", b"before")
    used = redis_server.client.info("memory")["used_memory"]
    with (
        configured(redis_server, maxmemory=str(used + 6 * MIB), maxmemory_policy="noeviction"),
        pytest.raises(StoreError, match=r"does not fit .*OOM.*maxmemory") as refused,
    ):
        write(store, "large", bytes(4 * UNIT), slice_size=UNIT)
    assert not refused.value.retryable
    assert store.get("a", limit=6) == b"before"
    assert [found.key for found in store.list()] == ["a"]


def test_too_few_replicas_are_told(store: RedisStore, redis_server: RedisServer) -> None:
    with configured(redis_server, min_replicas_to_write="1"), pytest.raises(Unavailable, match="NOREPLICAS"):
        store.put("a", b"x")
    store.put("a", b"x")


def test_a_server_that_takes_only_small_values_is_told(store: RedisStore, redis_server: RedisServer) -> None:
    with (
        configured(redis_server, proto_max_bulk_len=str(MIB)),
        pytest.raises(StoreError, match="proto-max-bulk-len"),
    ):
        write(store, "large", bytes(2 * UNIT), slice_size=UNIT)
    assert list(store.list()) == []


def test_a_database_that_is_not_there_is_told(redis_server: RedisServer, redis_name: str) -> None:
    with (
        RedisStore(f"{redis_server.address(redis_name)}?db=99") as store,
        pytest.raises(UsageError, match="db= in the address"),
    ):
        store.stat("a")


def test_keys_of_somebody_else_are_not_touched(store: RedisStore, redis_server: RedisServer, redis_name: str) -> None:
    redis_server.client.set(f"{redis_name}/objects", "mine")
    for call in (lambda: list(store.list()), lambda: store.put("a", b"x")):
        with pytest.raises(StoreError, match=r"WRONGTYPE.*choose another name"):
            call()
    assert redis_server.client.get(f"{redis_name}/objects") == b"mine"


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ("LOADING Redis is loading the dataset in memory", Unavailable, "not ready"),
        ("BUSY Redis is busy running a script", Unavailable, "not ready"),
        ("MASTERDOWN Link with MASTER is down", Unavailable, "not ready"),
        ("ERR max number of clients reached", Unavailable, "too many connections"),
        ("READONLY You can't write against a read only replica.", StoreError, "primary"),
        ("MISCONF Redis is configured to save RDB snapshots", StoreError, "its own disk"),
        ("MOVED 3999 127.0.0.1:6381", UsageError, "Cluster"),
        ("CROSSSLOT Keys in request don't hash to the same slot", UsageError, "Cluster"),
        ("ERR string exceeds maximum allowed size (proto-max-bulk-len)", StoreError, "proto-max-bulk-len"),
        ("ERR something else", StoreError, "failed: the server says ERR something else"),
    ],
)
def test_what_a_server_says_has_a_meaning(said: str, kind: type[ShardtoolError], message: str) -> None:
    error = translated(said, "redis://host/name/a")
    assert type(error) is kind
    assert message in str(error)
    assert "redis://host/name" in str(error)


def test_a_command_that_a_server_does_not_know_is_not_repeated() -> None:
    """Its arguments could be a password."""
    error = translated("ERR unknown command 'AUTH', with args beginning with: 'me' 'secret' ", "redis://host/name/a")
    assert "AUTH" in str(error)
    assert "secret" not in str(error)


# Reading


def test_ranges_cross_chunks(store: RedisStore) -> None:
    """However the slices were cut of which the chunks were made."""
    size = 3 * UNIT + 12_345
    data = random.Random(1).randbytes(size)
    chance = random.Random(2)
    for step in (UNIT, UNIT + 1, 2 * UNIT - 1):
        write(store, "a", data, slice_size=step)
        assert read(store, "a", 0, size) == data
        for _ in range(10):
            start, end = sorted(chance.randrange(size) for _ in range(2))
            assert read(store, "a", start, end - start) == data[start:end]
        for edge in (CHUNK, UNIT, UNIT + 1, size - 1):
            assert read(store, "a", edge - 1, 2) == data[edge - 1 : edge + 1]


def test_bytes_that_the_server_lost_are_missed(store: RedisStore, redis_server: RedisServer, redis_name: str) -> None:
    """A server that is full may evict what it likes."""
    write(store, "a", bytes(UNIT + 1), slice_size=UNIT)
    victim = next(key for key in redis_server.keys(redis_name) if key.endswith("/1"))
    redis_server.client.delete(victim)
    assert read(store, "a", 0, 100) == bytes(100)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"has lost bytes of \S*/a.*noeviction"):
            read(store, "a", 0, UNIT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "\xff",
        '{"format":1}',
        '{"format":2,"id":"x","size":1,"place":"chunks","runs":[[1,1]]}',
        '{"format":1,"id":"x","size":2,"place":"chunks","runs":[[1,1]]}',
        '{"format":1,"id":"x","size":1,"place":"elsewhere"}',
        '{"format":1,"id":"x","size":-1,"place":"file"}',
        '{"format":1,"id":"../x","size":1,"place":"file"}',
    ],
)
def test_a_damaged_record_is_told(store: RedisStore, redis_server: RedisServer, redis_name: str, text: str) -> None:
    redis_server.client.hset(f"{redis_name}/objects", "a", text)
    with pytest.raises(FormatError, match=r"record of .*/a is damaged"):
        store.stat("a")
    with pytest.raises(FormatError, match=r"record of .*/a is damaged"):
        read(store, "a", 0, 1)


def test_a_reader_knows_of_a_replacement_elsewhere(store: RedisStore, redis_server: RedisServer) -> None:
    """What it remembers of an object is asked about in each read."""
    with RedisStore(store.uri) as other:
        for size in (10, 5, 20):
            other.put("a", bytes([size]) * size)
            assert read(store, "a", 0, 5) == bytes([size]) * 5
        assert read(store, "a", 15, 5) == bytes([20]) * 5
        other.delete("a")
    with pytest.raises(NotFound):
        read(store, "a", 0, 5)


def test_a_small_object_is_got_in_one_version(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the size of one and the bytes of another."""
    store.put("a", b"old")
    with RedisStore(store.uri) as other:
        readinto = store.readinto

        def late(key: str, start: int, view: memoryview) -> None:
            if other.get("a", limit=5) == b"old":
                other.put("a", b"newer")
            readinto(key, start, view)

        monkeypatch.setattr(store, "readinto", late)
        assert store.get("a", limit=5) == b"newer"


def test_a_writer_that_is_nonsense_is_none() -> None:
    for pieces in ("Infinity", "-1", "1e30", '"x"', "[]"):
        assert Entry.of(f'{{"key":"a","since":1,"pieces":{pieces},"discarded":false}}'.encode()) is None


def test_a_reply_of_many_parts_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is too large, but all of them are."""
    monkeypatch.setattr("shardtool.stores.redis.wire._WHOLE", 1000)
    part = b"$400\r\n" + bytes(400) + b"\r\n"
    for count, message in ((2, "record of .* is damaged"), (4, "does not speak Redis' protocol")):
        with (
            speaking(b"*%d\r\n" % count + part * count) as port,
            RedisStore(f"redis://127.0.0.1:{port}/a", again=SOON) as store,
            pytest.raises(ShardtoolError, match=message),
        ):
            list(store.list())


# Writing


def test_the_size_decides_how_an_object_is_written(store: RedisStore) -> None:
    for size, unit, held in ((0, 0, 0), (CHUNK, 0, CHUNK), (CHUNK + 1, UNIT, 0), (1 << 40, UNIT, 0)):
        assert (store.unit(size), store.held(size)) == (unit, held)


def test_a_replaced_object_leaves_nothing(store: RedisStore, redis_server: RedisServer, redis_name: str) -> None:
    for size in (3 * UNIT, 2 * UNIT + 1, 5):
        write(store, "a", bytes(size), slice_size=UNIT)
    assert len([key for key in redis_server.keys(redis_name) if "/chunks/" in key]) == 1
    store.delete("a")
    assert redis_server.keys(redis_name) == []


def test_what_a_killed_writer_left_is_found_and_removed(
    store: RedisStore, redis_server: RedisServer, redis_name: str
) -> None:
    store.put("folder/b", b"there")
    before = redis_server.keys(redis_name)
    began = time.time()
    with RedisStore(store.uri) as killed:
        killed.create("folder/a", 2 * UNIT).write(0, bytes(UNIT))
    (left,) = store.unfinished("folder/")
    assert (left.key, left.size) == ("folder/a", UNIT)
    assert began - 1 <= left.since <= time.time() + 1
    assert list(store.unfinished("elsewhere")) == []
    assert not store.exists("folder/a")
    store.discard(left)
    store.discard(left)
    assert list(store.unfinished()) == []
    assert redis_server.keys(redis_name) == before


def test_a_writer_whose_bytes_were_discarded_does_not_commit(store: RedisStore, redis_server: RedisServer) -> None:
    """And what it wrote after that does not stay."""
    writer = store.create("a", 2 * UNIT)
    writer.write(0, bytes(UNIT))
    (left,) = store.unfinished()
    store.discard(left)
    writer.write(UNIT, bytes(UNIT))
    with pytest.raises(NotFound, match="removed by somebody else"):
        writer.commit()
    writer.abort()
    assert list(store.list()) == []
    assert redis_server.keys(store.uri.partition("://")[2].partition("/")[2]) == []


def test_what_is_committed_is_not_discarded(store: RedisStore) -> None:
    """Even if it was unfinished when it was looked at."""
    writer = store.create("a", UNIT)
    writer.write(0, b"x" * UNIT)
    (left,) = store.unfinished()
    writer.commit()
    store.discard(left)
    assert list(store.unfinished()) == []
    assert read(store, "a", UNIT - 3, 3) == b"xxx"


def test_no_password_is_kept_in_the_server(locked_redis: RedisServer, redis_name: str) -> None:
    with RedisStore(locked_redis.address(redis_name, login=LOGIN)) as store:
        store.put("a", b"x")
    records = locked_redis.client.hgetall(f"{redis_name}/objects") | locked_redis.client.hgetall(
        f"{redis_name}/writers"
    )
    assert [json.loads(text) for text in records.values()]
    assert PASSWORD not in repr(records)
