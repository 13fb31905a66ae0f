"""A limit is kept by all threads and stores together, from the first byte, and changes no byte."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardtool.errors import UsageError
from shardtool.stores import open_store
from shardtool.stores.bandwidth import LEAST, Bucket, Limit, LimitedStore, applied, limited
from shardtool.stores.memory import MemoryStore
from shardtool.testing import CountingStore, StoreContract, write


class TestLimitedStore(StoreContract):
    """Every law holds under a limit."""

    @pytest.fixture
    def store(self) -> Iterator[LimitedStore]:
        with LimitedStore(MemoryStore(), Limit(1 << 40)) as store:
            yield store


class TestLimitedStoreWithUnit(StoreContract):
    """Every law holds where slices have a least size."""

    @pytest.fixture
    def store(self) -> Iterator[LimitedStore]:
        with LimitedStore(MemoryStore(unit=1 << 20), Limit(1 << 40)) as store:
            yield store


def test_bytes_wait_for_those_before_them() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    bucket = Bucket(1000, clock=lambda: now[0], sleep=sleep)
    for _ in range(10):
        bucket.take(500)
    assert now == [5.0]
    now[0] = 100.0  # what was not used is gone
    bucket.take(1000)
    assert now == [101.0]


@pytest.mark.parametrize("unit", [0, 1 << 20])
def test_many_threads_share_the_limit(unit: int) -> None:
    """Eight threads read, or write, 4 MiB at 8 MiB per second in half a second; reading and writing do not add up."""
    inner = MemoryStore(unit=unit)
    store = LimitedStore(inner, Limit(8 << 20))
    data = bytes(range(256)) * 2048

    def seconds(call, arguments) -> float:
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(call, arguments))
        return time.monotonic() - began

    assert 0.45 < seconds(lambda n: write(store, f"{n}", data, slice_size=1 << 20), range(8)) < 30
    assert 0.45 < seconds(lambda n: store.get(f"{n}", limit=len(data)), range(8)) < 30
    assert all(inner.get(f"{n}", limit=len(data)) == data for n in range(8))


def test_large_reads_and_writes_are_cut_into_pieces() -> None:
    inner = CountingStore(MemoryStore())
    store = LimitedStore(inner, Limit(1 << 30))
    store.put("a", bytes(20 << 20))
    room = bytearray(20 << 20)
    store.readinto("a", 0, memoryview(room))
    assert inner.calls["write"] == inner.calls["readinto"] == 3
    slow = LimitedStore(inner, Limit(1 << 20))
    inner.reset()
    slow.readinto("a", 0, memoryview(room)[: 512 << 10])
    assert inner.reads["a"] == [(0, 256 << 10), (256 << 10, 512 << 10)]


def test_stores_that_are_opened_in_a_block_are_limited_together(tmp_path: Path) -> None:
    with limited(1 << 20):
        one, other = open_store(tmp_path), open_store("memory://test_bandwidth")
        assert isinstance(one, LimitedStore)
        assert isinstance(other, LimitedStore)
        assert one._limit is other._limit
        with limited(None):
            assert not isinstance(open_store(tmp_path), LimitedStore)
    assert not isinstance(open_store(tmp_path), LimitedStore)
    plain = MemoryStore()
    assert applied(plain) is plain


def test_a_limit_that_stops_everything_is_refused() -> None:
    with pytest.raises(UsageError, match=f"--bwlimit {LEAST - 1} is less than {LEAST}"):
        Limit(LEAST - 1)
