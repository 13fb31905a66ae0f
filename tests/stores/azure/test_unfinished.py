"""What killed writers leave in a container of Azure is found and removed, and nothing else is."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from shardtool.errors import StoreError
from shardtool.stores.azure.store import AzureStore
from shardtool.stores.base import Unfinished
from shardtool.testing import write
from tests.servers import Proxy
from tests.servers.azure import AzureServer

MIB = 1 << 20


@pytest.fixture
def store(container: str) -> Iterator[AzureStore]:
    """A whole container."""
    with AzureStore(f"az://{container}") as store:
        yield store


def test_unfinished_blocks_tell_when_they_were_begun_and_how_many_they_are(store: AzureStore) -> None:
    before = int(time.time())
    writer = store.create("folder/a", 20 * MIB)
    writer.write(0, bytes(8 * MIB))
    (found,) = store.unfinished("folder/")
    assert (found.key, found.size) == ("folder/a", 8 * MIB)
    assert before <= found.since <= time.time()
    assert list(store.unfinished("other")) == []
    store.discard(found)
    assert list(store.unfinished()) == []
    writer.write(8 * MIB, bytes(12 * MIB))
    with pytest.raises(StoreError, match="removed what was unfinished"):
        writer.commit()
    writer.abort()


def test_blocks_of_another_program_are_unfinished_too(
    store: AzureStore, container: str, azure_server: AzureServer
) -> None:
    azure_server.client.get_blob_client(container, "a").stage_block("eHh4", b"abc")
    assert list(store.unfinished()) == [Unfinished("a", "blocks", 0.0, 3)]
    store.put("b", b"")
    assert [found.key for found in store.unfinished()] == ["a"]
    store.discard(Unfinished("a", "blocks"))
    assert azure_server.left(container) == ["b"]


def test_blocks_of_another_program_are_in_the_way_until_they_are_removed(
    store: AzureStore, container: str, azure_server: AzureServer
) -> None:
    """All names of blocks of a blob must be equally long."""
    azure_server.client.get_blob_client(container, "a").stage_block("eHh4", b"abc")
    with pytest.raises(StoreError, match=r"another program .* clean"):
        write(store, "a", bytes(9 * MIB), slice_size=9 * MIB)
    for found in store.unfinished():
        store.discard(found)
    write(store, "a", bytes(9 * MIB), slice_size=9 * MIB)


def test_an_object_is_not_discarded(store: AzureStore) -> None:
    """Not even an empty one, or one that was finished after its blocks were seen."""
    store.put("a", b"")
    store.discard(Unfinished("a", "blocks"))
    writer = store.create("b", 9 * MIB)
    writer.write(0, bytes(9 * MIB))
    (found,) = store.unfinished()
    writer.commit()
    store.discard(found)
    assert [found.key for found in store.list()] == ["a", "b"]


@pytest.mark.parametrize("methods", [("PUT",), ("DELETE",), ("HEAD",)])
def test_a_lost_answer_to_a_discard_leaves_nothing(
    container: str, azure_server: AzureServer, methods: tuple[str, ...]
) -> None:
    azure_server.client.get_blob_client(container, "a").stage_block("eHh4", b"abc")
    with Proxy(azure_server.endpoint) as proxy, azure_server.behind(proxy, container) as far:
        proxy.trouble.lost, proxy.trouble.methods = 1, methods
        far.discard(Unfinished("a", "blocks"))
        assert proxy.trouble.lost == 0
    assert azure_server.left(container) == []


def test_a_discard_that_was_killed_can_be_finished(
    store: AzureStore, container: str, azure_server: AzureServer
) -> None:
    """What it has made is no object meanwhile."""
    client = azure_server.client.get_blob_client(container, "a")
    client.upload_blob(b"", metadata={"shardtool_discarded": "1"})
    assert list(store.list()) == []
    assert not store.exists("a")
    (found,) = store.unfinished()
    store.discard(found)
    assert azure_server.left(container) == []
    store.put("a", b"new")
    store.discard(found)
    assert store.get("a", limit=3) == b"new"
