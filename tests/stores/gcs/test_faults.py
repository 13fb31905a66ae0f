"""Between Google's store and us anything may go wrong, by seeds: what comes out is right, or an error that names it.

The laws of ``tests/test_network_faults.py`` for what is particular here: resumable uploads that are cut, chunks whose
answers get lost, conditions that our own first try has made false.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import settings

from shardtool.errors import AlreadyExists, FormatError, ShardtoolError, StoreError
from shardtool.stores.gcs import store as gcs
from shardtool.stores.gcs.store import GcsStore
from shardtool.stores.gcs.upload import extended
from shardtool.stores.wire.http import Wire
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.retry import Again
from shardtool.testing import write
from shardtool.testing.words import content
from tests.servers import Proxy, Weather
from tests.servers.gcs import GcsServer
from tests.servers.weather import READS

KIB = 1 << 10
TIMES = max(1, settings.default.max_examples // 100) if settings.default else 1
LONGEST = 50.0  # seconds that a run may take whatever happens: less than one wait at the usual pace

pytestmark = pytest.mark.timeout(240)


def seeds(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("seed", range(count * TIMES))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of many chunks need not be large here, and silence not be long."""
    monkeypatch.setattr(gcs, "_SMALL", 100 * KIB)
    monkeypatch.setattr(gcs, "_CHUNK", 300 * KIB)
    monkeypatch.setattr(gcs, "_TIMEOUT", (2.0, 0.2))


@pytest.fixture
def through(gcs_bucket: str, gcs_standin: GcsServer) -> Callable[[Weather], Any]:
    """The bucket through bad weather, by a store that waits next to nothing between tries."""

    @contextmanager
    def opened(weather: Weather) -> Iterator[GcsStore]:
        wire = Wire(pace=Pace(connect=2.0, silence=0.2, floor=200))
        again = Again(attempts=4, backoff=0.005, pause=0.1)
        with (
            Proxy(gcs_standin.endpoint, weather) as proxy,
            GcsStore(f"gs://{gcs_bucket}", endpoint=proxy.endpoint, wire=wire, again=again) as store,
        ):
            began = time.monotonic()
            yield store
            assert time.monotonic() - began < LONGEST, weather.met

    return opened


def outcome(run: Callable[[], Any]) -> tuple[Any, ShardtoolError | None]:
    """What a run gives, or its error: one sentence that names the address, and no secret."""
    caught: ShardtoolError | None = None
    found = None
    try:
        found = run()
    except (StoreError, FormatError) as error:
        caught = error
    if caught:
        assert "gs://" in str(caught), caught
        assert "upload_id" not in str(caught), caught
    return found, caught


def read(store: GcsStore, key: str, size: int) -> bytes:
    room = bytearray(size)
    store.readinto(key, 0, memoryview(room))
    return bytes(room)


@seeds(25)
def test_what_is_read_is_right(gcs_bucket: str, gcs_standin: GcsServer, through: Any, seed: int) -> None:
    """Listings, in pages, sizes, checksums and ranges."""
    data = content(200_000)
    for number in range(5):
        gcs_standin.put(gcs_bucket, f"{number}", data[: 40_000 * number])
    gcs_standin.control(page=2)
    try:
        with through(Weather(seed, odds=0.25, kinds=READS)) as store:
            listed, _ = outcome(lambda: {thing.key: thing.size for thing in store.list()})
            assert listed in (None, {f"{number}": 40_000 * number for number in range(5)})
            sums, _ = outcome(lambda: store.checksums("4"))
            assert sums is None or sums["crc32c"] == f"{extended(0, memoryview(data)[:160_000]):08x}"
            for size in (1, 1000, 160_000):
                found, _ = outcome(partial(read, store, "4", size))
                assert found in (None, data[:size])
    finally:
        gcs_standin.control(page=1000)


@seeds(30)
def test_what_is_written_is_whole_or_not_there(gcs_bucket: str, through: Any, seed: int) -> None:
    """In one request and in chunks, a new object and one that replaces another."""
    with GcsStore(f"gs://{gcs_bucket}") as fine:
        allowed: list[bytes | None] = [None]
        for number, size in enumerate((70_000, 2_000_003, 0, 600 * KIB)):
            data = content(size, seed + number)
            allowed.append(data)
            with through(Weather(f"{seed}.{number}", odds=0.35)) as store:
                _, error = outcome(partial(write, store, "a", data, slice_size=300 * KIB))
            assert not isinstance(error, AlreadyExists)
            left = fine.get("a", limit=1 << 30) if fine.exists("a") else None
            assert left in (allowed if error else [data])


@seeds(30)
def test_of_exclusive_writers_one_wins_and_knows_it(gcs_bucket: str, through: Any, seed: int) -> None:
    """Answers get lost, so that the winner is told at its next try that there is an object already: its own."""
    made = [bytes([number]) * (500 * KIB if seed % 2 else 10) for number in range(2)]
    with through(Weather(seed, odds=0.5, kinds=("lost", "late", "refused", "cut answer"))) as store:
        told = [outcome(partial(write, store, "a", data, exclusive=True))[1] for data in made]
    with GcsStore(f"gs://{gcs_bucket}") as fine:
        left = fine.get("a", limit=1 << 30) if fine.exists("a") else None
    assert not isinstance(told[0], AlreadyExists)
    if told[0] is None:
        assert left == made[0]
        assert isinstance(told[1], StoreError)
    elif told[1] is None:
        assert left == made[1]
    else:
        assert left in (None, *made)
