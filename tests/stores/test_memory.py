"""MemoryStore obeys every law, with and without a unit, and is found again by its name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardtool.errors import UsageError
from shardtool.stores import open_store
from shardtool.stores.memory import MemoryStore, named
from shardtool.testing import StoreContract


class TestMemoryStore(StoreContract):
    """Every law holds for a dictionary."""

    @pytest.fixture
    def store(self) -> Iterator[MemoryStore]:
        with MemoryStore() as store:
            yield store


class TestMemoryStoreWithUnit(StoreContract):
    """Every law holds when slices have a least size."""

    @pytest.fixture
    def store(self) -> Iterator[MemoryStore]:
        with MemoryStore("memory://parts", unit=1 << 20) as store:
            yield store


class TestMemoryStoreWithChecksums(StoreContract):
    """Every law holds where the store keeps a digest of what it holds."""

    @pytest.fixture
    def store(self) -> Iterator[MemoryStore]:
        with MemoryStore(checksums=True) as store:
            yield store


def test_a_name_means_one_store_in_the_whole_process() -> None:
    first = open_store("memory://test_memory/one")
    first.put("a", b"x")
    first.close()
    assert open_store("memory://test_memory/one/") is first
    assert not open_store("memory://test_memory/two").exists("a")


def test_stores_without_a_name_are_strangers() -> None:
    MemoryStore().put("a", b"x")
    assert not MemoryStore().exists("a")


@pytest.mark.parametrize("uri", ["memory://", "memory:///"])
def test_an_address_without_a_name_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="memory://name"):
        named(uri)
