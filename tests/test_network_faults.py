"""Between us and the server anything may go wrong: what comes out is right or a clear error, and soon.

Each case has a seed, by which ``tests.servers.Weather`` chooses what happens to which request: refusals and bursts of
them, cut and silent connections in both directions, answers that get lost, that are too long, too short, of other
bytes, or no HTTP at all. A seed that failed once fails again; ``--hypothesis-profile=thorough`` runs twenty times as
many.

The laws: a run that says it is done is right; one that does not leaves nothing that looks complete, ends with an error
of the tree that names the address, and can be finished when the weather is fine.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import settings

import shardtool
from shardtool import stores
from shardtool.errors import AlreadyExists, FormatError, ShardtoolError, StoreError
from shardtool.stores.base import Store
from shardtool.stores.s3 import client as s3_client
from shardtool.stores.s3.store import S3Store
from shardtool.stores.wire.link import Pace
from shardtool.testing import write
from tests import builders
from tests.servers import Cut, Pipe, Proxy, S3Server, Weather
from tests.servers.weather import READS, WRITES

pytestmark = pytest.mark.timeout(240)

TIMES = max(1, settings.default.max_examples // 100) if settings.default else 1
PART = 20_000
OPTIONS: dict[str, Any] = {"tp": 2, "max_part_size": PART, "memory_limit": 0}
LONGEST = 50.0
"""Seconds that a run may take whatever happens: waits are short here, see ``quick``; a usual one is a minute."""


def seeds(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("seed", range(count * TIMES))


def quick(uri: str) -> S3Store:
    """A store that waits next to nothing between its tries."""
    return S3Store(uri, attempts=4, backoff=0.005)


@dataclass(frozen=True, eq=False)
class Sea:
    """A bucket with a model, ``source``, and its shards, ``shards``; ``whole`` is what is in them."""

    server: S3Server
    bucket: str
    source: dict[str, bytes]
    whole: dict[str, bytes]

    @contextmanager
    def weather(self, monkeypatch: pytest.MonkeyPatch, weather: Weather) -> Iterator[Weather]:
        """Stores that are opened in the block reach the bucket through bad weather, wait for nobody, and end soon."""
        before = set(threading.enumerate())
        with Proxy(self.server.endpoint, weather) as proxy, monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            patch.setitem(stores.SCHEMES, "s3", f"{__name__}:quick")
            patch.setattr(s3_client, "PACE", Pace(connect=2.0, silence=0.2, floor=200))
            patch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.005)
            began = time.monotonic()
            yield weather
            assert time.monotonic() - began < LONGEST, weather.met
        left = [t.name for t in set(threading.enumerate()) - before if "process_request_thread" not in t.name]
        assert left == [], "threads of ours are still at work"


@pytest.fixture(scope="module")
def harbour(ministack: S3Server) -> Iterator[Sea]:
    """The bucket, made in fine weather."""
    with pytest.MonkeyPatch.context() as patch:
        bucket = ministack.bucket(patch)
        config = builders.config(num_hidden_layers=1, vocab_size=256)
        source = builders.model(config, builders.tensors(config))
        builders.put(f"s3://{bucket}/source", source)
        shardtool.save(f"s3://{bucket}/source", f"s3://{bucket}/shards", **OPTIONS)
        yield Sea(ministack, bucket, source, builders.contents(f"s3://{bucket}/shards"))


@pytest.fixture
def sea(harbour: Sea, monkeypatch: pytest.MonkeyPatch) -> Sea:
    """The bucket, to which boto3's environment points."""
    for variable, value in harbour.server.environ.items():
        monkeypatch.setenv(variable, value)
    return harbour


def outcome(run: Callable[[], Any]) -> tuple[Any, ShardtoolError | None]:
    """What a run gives, or its error: one sentence that names the address, of a class that says what it is."""
    caught: ShardtoolError | None = None
    found = None
    try:
        found = run()
    except (StoreError, FormatError) as error:
        caught = error
    if caught:
        text = str(caught)
        assert "s3://" in text, text
        assert [word for word in ("Traceback", "Signature=", "test-secret") if word in text] == [], text
    return found, caught


def read(store: Store, key: str, size: int) -> bytes:
    room = bytearray(size)
    store.readinto(key, 0, memoryview(room))
    return bytes(room)


# One store


@seeds(40)
def test_what_is_read_is_right(sea: Sea, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Listings, sizes and ranges of every size."""
    shards = [key for key in sea.whole if key.endswith(".safetensors")]
    with sea.weather(monkeypatch, Weather(seed, odds=0.25, kinds=READS)), quick(f"s3://{sea.bucket}/shards") as store:
        listed, _ = outcome(lambda: {thing.key: thing.size for thing in store.list()})
        assert listed in (None, {key: len(data) for key, data in sea.whole.items()})
        for key in shards:
            data = sea.whole[key]
            found, _ = outcome(partial(store.stat, key))
            assert found is None or found.size == len(data)
            for size in (1, 1000, len(data)):
                got, _ = outcome(partial(read, store, key, size))
                assert got in (None, data[:size])


@seeds(24)
def test_what_is_written_is_whole_or_not_there(sea: Sea, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Small objects, and large ones in parts; a new one and one that replaces another."""
    key, sizes = f"written-{seed}/a", (10, 11 << 20) if seed % 4 == 0 else (0, 70_000)
    with quick(f"s3://{sea.bucket}") as fine:
        allowed: list[bytes | None] = [None]
        for number, size in enumerate(sizes):
            data = bytes([seed % 251, number]) * (size // 2)
            allowed.append(data)
            weather = Weather(f"{seed}.{number}", odds=0.35)
            with sea.weather(monkeypatch, weather), quick(f"s3://{sea.bucket}") as store:
                _, error = outcome(partial(write, store, key, data, slice_size=6 << 20))
            assert not isinstance(error, AlreadyExists)
            left = fine.get(key, limit=1 << 30) if fine.exists(key) else None
            assert left in (allowed if error else [data])
        fine.delete(key)


@seeds(40)
def test_of_exclusive_writers_one_wins_and_knows_it(sea: Sea, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Answers get lost, so that the winner is told at its next try that there is an object already: its own."""
    key, store = f"exclusive-{seed}", quick(f"s3://{sea.bucket}")
    with (
        store as fine,
        sea.weather(monkeypatch, Weather(seed, odds=0.5, kinds=("lost", "late", "refused", "cut answer"))),
    ):
        told: list[ShardtoolError | None] = []
        for number in range(2):
            with quick(f"s3://{sea.bucket}") as writer:
                _, error = outcome(partial(writer.put, key, b"%d" % number, exclusive=True))
                told.append(error)
    with quick(f"s3://{sea.bucket}") as fine:
        left = fine.get(key, limit=10) if fine.exists(key) else None
    if told[0] is None:
        assert left == b"0"
        assert isinstance(told[1], StoreError)
    elif told[1] is None:
        assert left == b"1"
        assert not isinstance(told[0], AlreadyExists)
    else:
        assert left in (None, b"0", b"1")
        assert not isinstance(told[0], AlreadyExists)


# Whole operations


@seeds(50)
def test_a_save_is_right_or_can_be_finished(sea: Sea, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """From the server to the server."""
    out = f"s3://{sea.bucket}/saved-{seed}"

    def save() -> Any:
        return shardtool.save(f"s3://{sea.bucket}/source", out, **OPTIONS)

    with sea.weather(monkeypatch, Weather(seed, odds=(0.03, 0.1, 0.3)[seed % 3])) as weather:
        report, error = outcome(save)
    left = builders.contents(out)
    if error is None and report.complete:
        assert left == sea.whole
        return
    # Whose small files are cut where Content-Length says, nobody can tell: then the run says that it is not complete.
    assert error or weather.met["less"]
    visible = {key: data for key, data in left.items() if not key.startswith(".shardtool/")}
    assert visible.items() <= sea.whole.items()
    if "shardtool.json" in visible:  # written, and then the answer was lost
        assert visible == sea.whole
    assert save().complete
    assert builders.contents(out) == sea.whole


@seeds(30)
def test_a_load_is_right_or_an_error(sea: Sea, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The tensors of a rank, without their digests being compared: the network alone must not make them wrong."""
    with sea.weather(monkeypatch, Weather(seed, odds=(0.05, 0.2, 0.5)[seed % 3])):
        loaded, error = outcome(lambda: shardtool.load(f"s3://{sea.bucket}/shards", rank=seed % 2, verify=False))
    if error is None:
        assert {name: octets(tensor) for name, tensor in loaded.items()} == loaded_bytes(sea, seed % 2)


@functools.cache
def loaded_bytes(sea: Sea, rank: int) -> dict[str, bytes]:
    """What a rank's tensors are in fine weather."""
    loaded = shardtool.load(f"s3://{sea.bucket}/shards", rank=rank)
    return {name: octets(tensor) for name, tensor in loaded.items()}


def octets(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@seeds(30)
def test_verify_never_blames_the_files_for_the_network(sea: Sea, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """It says that they are right, or that it could not look."""
    with sea.weather(monkeypatch, Weather(seed, odds=(0.05, 0.2, 0.5)[seed % 3])):
        report, error = outcome(lambda: shardtool.verify(f"s3://{sea.bucket}/shards"))
    if error is None:
        assert [(check.key, check.why) for check in report.files if not check.ok] == []
        assert report.exit_code == 0


def test_every_kind_of_trouble_is_met() -> None:
    """The seeds of one run bring everything that there is."""
    met = set()
    for seed in range(60):
        weather = Weather(seed, odds=0.5)
        for method in ("GET", "PUT"):
            for number in range(20):
                fault = weather.fault(method, f"{number}", ranged=True)
                met.add(fault.kind if fault else "")
    assert met == {"", *READS, *WRITES}


def test_a_seed_is_the_same_weather_whoever_asks_first() -> None:
    things = [f"thing-{number}" for number in range(200)]
    kinds = tuple(kind for kind in (*READS, *WRITES) if kind != "burst")
    forth, back = Weather(3, odds=0.3, kinds=kinds), Weather(3, odds=0.3, kinds=kinds)
    one = {thing: forth.fault("GET", thing) for thing in things}
    assert one == {thing: back.fault("GET", thing) for thing in reversed(things)}
    assert len({fault.kind for fault in one.values() if fault}) > 3


@pytest.mark.parametrize("ranges", ["header", "tensors"])
def test_a_file_that_is_replaced_while_it_is_saved_is_noticed(
    sea: Sea, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, ranges: str
) -> None:
    """Another object of the same size under the same name, from the middle of the run on."""
    source = f"s3://{sea.bucket}/source"
    with Proxy(sea.server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)

        def replace(done: int, total: int) -> None:
            if done > (0 if ranges == "header" else total // 2):
                proxy.trouble.changed = "model.safetensors"

        with pytest.raises(StoreError, match="was replaced while it was read"):
            shardtool.save(source, tmp_path / "out", progress=replace, concurrency=1, **OPTIONS)
    assert not (tmp_path / "out" / "shardtool.json").exists()


# Below HTTP


@seeds(20)
def test_encrypted_connections_are_cut(moto_tls: S3Server, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """After some bytes in one direction, at once or after a silence: in the handshake, in the middle of a record."""
    chosen = random.Random(seed)
    data = chosen.randbytes(300_000)

    def plan(number: int) -> Cut | None:
        size = chosen.choice((0, 100, 3000, 20_000, 200_000))
        cut = Cut(
            size + chosen.randrange(1, 2000), chosen.random() < 0.4, chosen.choice((0.0, 0.3)), chosen.random() < 0.5
        )
        return cut if chosen.random() < 0.6 else None

    bucket = moto_tls.bucket(monkeypatch)
    moto_tls.client.put_object(Bucket=bucket, Key="a", Body=data)
    at = urlsplit(moto_tls.endpoint)
    monkeypatch.setattr(s3_client, "PACE", Pace(connect=1.0, silence=0.2, floor=200))
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.005)
    began = time.monotonic()
    with Pipe(at.hostname or "", at.port or 0, plan) as pipe:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{pipe.port}")
        with quick(f"s3://{bucket}") as store:
            for size in (10, 5000, len(data)):
                got, _ = outcome(partial(read, store, "a", size))
                assert got in (None, data[:size])
            _, error = outcome(partial(store.put, "b", data[:70_000]))
        assert pipe.connections
    assert time.monotonic() - began < LONGEST
    left = [thing["Key"] for thing in moto_tls.client.list_objects_v2(Bucket=bucket)["Contents"]]
    if error is None or "b" in left:
        assert moto_tls.client.get_object(Bucket=bucket, Key="b")["Body"].read() == data[:70_000]
