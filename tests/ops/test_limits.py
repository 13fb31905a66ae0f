"""Limits: as many readers as there are processors, and no more than the stores have memory for."""

from __future__ import annotations

import pytest

from shardtool.errors import UsageError
from shardtool.ops import limits
from shardtool.ops.limits import READ, Reading, readers, reading
from shardtool.stores.local.direct import LARGE
from shardtool.stores.memory import MemoryStore


class Taking(MemoryStore):
    """A store that takes some memory for each thread."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self.each = each

    def reading(self, threads: int) -> int:
        """So much for each."""
        return threads * self.each


@pytest.mark.parametrize(("processors", "wanted"), [(1, 8), (8, 8), (96, 96)])
def test_there_are_eight_readers_or_as_many_as_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, wanted: int
):
    monkeypatch.setattr(limits, "cores", lambda: processors)
    assert readers(None) == wanted
    assert readers(3) == 3
    assert readers(None, 16) == 16


@pytest.mark.parametrize("number", [0, -1, 1025, True, 1.0])
def test_a_number_of_readers_that_cannot_be_is_refused(number: int):
    with pytest.raises(UsageError, match=f"--concurrency {number} is not a number of readers from 1 to 1024"):
        readers(number)


def test_stores_that_take_nothing_are_read_as_is_asked():
    assert reading(0, 5, MemoryStore(), MemoryStore()) == Reading(5, READ, 0)


def test_a_store_takes_a_third_of_what_is_spare_at_most():
    assert reading(3000, 8, Taking(100)) == Reading(8, READ, 800)
    assert reading(3000, 20, Taking(100)) == Reading(10, READ, 1000)
    assert reading(3000, 20, Taking(100), Taking(150)) == Reading(4, READ, 1000)
    assert reading(300, 20, Taking(100)) == Reading(1, READ, 100)


def test_where_there_is_nothing_to_spare_reads_are_so_small_that_they_take_nothing():
    found = reading(299, 20, Taking(100))
    assert found.longest < LARGE
    assert (found.threads, found.held) == (20, 0)
