"""Between us and Azure anything may go wrong: what comes out is right or a clear error, and soon.

The cases of ``test_network_faults`` for the protocol of Azure. Each has a seed, by which ``tests.servers.weather``
chooses what happens to which request; ``--hypothesis-profile=thorough`` runs twenty times as many.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import shardtool
from shardtool import stores
from shardtool.errors import AlreadyExists, FormatError, ShardtoolError, StoreError
from shardtool.manifest import KEY as MANIFEST
from shardtool.manifest import PRIVATE
from shardtool.stores.accounts import AzureAccount
from shardtool.stores.azure import store as azure
from shardtool.stores.azure.store import AzureStore
from shardtool.stores.base import Store
from shardtool.stores.wire.http import Wire
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.retry import Again
from shardtool.testing import write
from tests import builders
from tests.servers import Proxy
from tests.servers.azure import ACCOUNT, AzureServer
from tests.servers.weather import READS, WRITES, Weather

pytestmark = pytest.mark.timeout(240)

TIMES = max(1, settings.default.max_examples // 100) if settings.default else 1
CONTAINER = "weather"  # the seed chooses by names
SILENCE = 0.3
LONGEST = 50.0
"""Seconds that a run may take whatever happens: waits are short here."""


def sized(store: Store, key: str) -> int:
    """The size that the store says."""
    return store.stat(key).size


def seeds(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("seed", range(count * TIMES))


@dataclass
class Sea:
    """A container, and a store of it behind a proxy in bad weather."""

    server: AzureServer
    sas: str

    @contextmanager
    def rough(self, folder: str, weather: Weather) -> Iterator[AzureStore]:
        """The folder in bad weather, asked by a store that waits next to nothing, and not for long."""
        with Proxy(self.server.endpoint, weather) as proxy:
            began = time.monotonic()
            with AzureStore(
                f"az://{CONTAINER}/{folder}",
                access=AzureAccount(endpoint=f"{proxy.endpoint}/{ACCOUNT}", sas=self.sas),
                wire=Wire(pace=Pace(connect=2.0, silence=0.15, floor=200)),
                again=Again(attempts=4, backoff=0.005),
            ) as store:
                yield store
                pool = store._senders._pool
            assert time.monotonic() - began < LONGEST, weather.met
        assert pool is None or not any(thread.is_alive() for thread in pool._threads)

    @contextmanager
    def calm(self, folder: str) -> Iterator[AzureStore]:
        """The folder as it is."""
        access = AzureAccount(connection_string=self.server.connection_string)
        with AzureStore(f"az://{CONTAINER}/{folder}", access=access) as store:
            yield store


@pytest.fixture(scope="module")
def sea(azure_server: AzureServer) -> Iterator[Sea]:
    """A container that any run finds under the same name."""
    azure_server.client.create_container(CONTAINER)
    yield Sea(azure_server, azure_server.sas(CONTAINER))
    azure_server.client.delete_container(CONTAINER)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are small, so that there are many."""
    monkeypatch.setattr(azure, "_SMALL", 10_000)
    monkeypatch.setattr(azure, "_BLOCK", 4_000)


def outcome(run: Callable[[], Any]) -> tuple[Any, ShardtoolError | None]:
    """What a run gives, or its error: one sentence that names the address, of a class that says what it is."""
    try:
        return run(), None
    except ShardtoolError as error:
        text = str(error)
        assert f"az://{CONTAINER}/" in text, text
        assert "sig=" not in text
        if not isinstance(error, StoreError | FormatError):
            raise
        return None, error


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def visible(store: Store) -> set[str]:
    """The objects of a checkpoint; records of a job that could not be removed are for ``shardtool clean``."""
    return {found.key for found in store.list() if not found.key.startswith(PRIVATE)}


def read(store: Store, key: str, start: int, size: int) -> bytes:
    room = bytearray(size)
    store.readinto(key, start, memoryview(room))
    return bytes(room)


@seeds(30)
def test_what_is_read_is_right(sea: Sea, seed: int) -> None:
    """Listings, sizes, small objects and ranges of every size."""
    objects = {"a": content(3), "b/c": content(50_000, 1), "d": content(400_000, 2)}
    with sea.calm("read") as store:
        for key, data in objects.items():
            write(store, key, data, slice_size=20_000)
    with sea.rough("read", Weather(seed, odds=0.35, kinds=READS, silence=SILENCE)) as store:
        listed, _ = outcome(lambda: {thing.key: thing.size for thing in store.list()})
        assert listed in (None, {key: len(data) for key, data in objects.items()})
        assert outcome(lambda: store.get("a", limit=10))[0] in (None, objects["a"])
        for key, data in objects.items():
            assert outcome(partial(sized, store, key))[0] in (None, len(data))
            for start, size in ((0, 1), (1, 2), (len(data) // 3, len(data) // 2), (0, len(data))):
                got, _ = outcome(partial(read, store, key, start, size))
                assert got in (None, data[start : start + size])


@seeds(20)
@pytest.mark.parametrize("size", [300, 90_000])
def test_what_is_written_is_whole_or_not_there(sea: Sea, seed: int, size: int) -> None:
    """What is said to be written is; nobody else's object is ever seen; and in fine weather all can be done again."""
    folder, data, old = f"write-{size}", content(size, seed), content(77, seed)
    with sea.calm(folder) as quiet, sea.rough(folder, Weather(seed, odds=0.35, silence=SILENCE)) as store:
        quiet.delete("new")
        quiet.put("old", old)
        for key, exclusive, before in (("new", True, None), ("old", False, old)):
            _, error = outcome(partial(write, store, key, data, slice_size=20_000, exclusive=exclusive))
            assert not isinstance(error, AlreadyExists), "an object of our own was taken for somebody else's"
            there = quiet.get(key, limit=size) if quiet.exists(key) else None
            assert there == data if error is None else there in (before, data)
        write(quiet, "old", data, slice_size=20_000)
        assert quiet.get("old", limit=size) == data
        for found in quiet.unfinished():
            quiet.discard(found)
        assert list(quiet.unfinished()) == []
        assert {found.key for found in quiet.list()} <= {"old", "new"}


@seeds(10)
@pytest.mark.parametrize("size", [300, 30_000])
def test_of_two_that_create_one_object_at_most_one_wins(sea: Sea, seed: int, size: int) -> None:
    """Each in a weather of its own. What is there in the end is the winner's."""
    folder, both = f"race-{size}", [content(size, seed), content(size, -1 - seed)]
    with sea.calm(folder) as quiet:
        quiet.delete("record")
        with (
            sea.rough(folder, Weather(seed, odds=0.3, kinds=WRITES, silence=SILENCE)) as one,
            sea.rough(folder, Weather(-1 - seed, odds=0.3, kinds=WRITES, silence=SILENCE)) as other,
            ThreadPoolExecutor(2) as pool,
        ):
            made = [
                pool.submit(outcome, partial(write, s, "record", d, slice_size=20_000, exclusive=True))
                for s, d in zip((one, other), both, strict=True)
            ]
            errors = [each.result()[1] for each in made]
        there = quiet.get("record", limit=size) if quiet.exists("record") else None
        won = [data for data, error in zip(both, errors, strict=True) if error is None]
        assert len(won) <= 1
        assert there == won[0] if won else there in (None, *both)
        if there is None:
            assert not any(isinstance(error, AlreadyExists) for error in errors)


@seeds(10)
def test_an_object_that_changes_is_read_as_one_version(sea: Sea, seed: int) -> None:
    versions = [bytes([number]) * 200_000 for number in range(3)]
    with (
        sea.calm("change") as quiet,
        sea.rough("change", Weather(seed, odds=0.4, kinds=READS, silence=SILENCE)) as store,
    ):
        quiet.put("a", versions[0])
        end = threading.Event()

        def replace() -> None:
            while not end.wait(0.01):
                for version in versions:
                    quiet.put("a", version)

        with ThreadPoolExecutor(1) as pool:
            replacing = pool.submit(replace)
            try:
                for _ in range(5):
                    got, _ = outcome(lambda: read(store, "a", 1000, 150_000))
                    assert got in (None, *(version[:150_000] for version in versions))
            finally:
                end.set()
            replacing.result()


@seeds(10)
def test_a_save_is_complete_or_can_be_finished(
    sea: Sea, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A save that says that it is done is right; one that does not leaves no manifest, or all that it names."""
    config = builders.config(num_hidden_layers=1, vocab_size=256)
    source = builders.put(tmp_path / "source", builders.model(config, builders.tensors(config)))
    options: dict[str, Any] = {"tp": 2, "max_part_size": 20_000, "memory_limit": 0}
    shardtool.save(source, tmp_path / "expected", **options)
    expected = builders.contents(tmp_path / "expected")
    folder = f"save-{seed}"
    uri = f"az://{CONTAINER}/{folder}"
    with sea.calm(folder) as quiet, sea.rough(folder, Weather(seed, odds=0.12, silence=SILENCE)) as store:
        monkeypatch.setitem(stores.SCHEMES, "az", lambda _: stores.open_store(store))
        _, error = outcome(lambda: shardtool.save(source, uri, **options))
        there = {key: quiet.get(key, limit=1 << 20) for key in visible(quiet)}
        assert all(there[key] == expected[key] for key in there if key.endswith(".safetensors"))
        if error is None or MANIFEST in there:
            assert there.keys() == expected.keys()
        monkeypatch.setitem(stores.SCHEMES, "az", lambda _: stores.open_store(quiet))
        shardtool.save(source, uri, **options)
        assert visible(quiet) == expected.keys()
        assert shardtool.verify(uri, against=source).ok
