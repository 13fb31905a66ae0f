"""Lanes: whatever the order and the threads in which tiles come, they are handled in the order of their bytes."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.sinks.lane import Lane


def tiles(data: bytes, cuts: list[int]) -> list[tuple[int, memoryview]]:
    """The data in tiles, each with its offset."""
    ends = sorted({*cuts, len(data)} - {0})
    return [(a, memoryview(data)[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


@given(st.binary(min_size=1, max_size=40), st.lists(st.integers(1, 40), max_size=8), st.randoms(), st.integers(0, 99))
def test_tiles_are_handled_in_order_and_each_is_released_after_it_was(
    data: bytes, cuts: list[int], order: random.Random, start: int
):
    done: list[bytes] = []
    released: list[int] = []
    lane = Lane(lambda view: done.append(bytes(view)), start)
    given_in = tiles(data, [cut for cut in cuts if cut < len(data)])
    order.shuffle(given_in)
    for offset, view in given_in:
        lane.put(start + offset, view, partial(released.append, offset))
    assert b"".join(done) == data
    assert released == sorted(offset for offset, _ in given_in)


def test_a_tile_that_is_not_in_line_waits_without_blocking():
    done: list[bytes] = []
    released: list[str] = []
    lane = Lane(lambda view: done.append(bytes(view)), 0)
    lane.put(2, memoryview(b"cd"), lambda: released.append("second"))
    assert (done, released) == ([], [])
    lane.put(0, memoryview(b"ab"), lambda: released.append("first"))
    assert (done, released) == ([b"ab", b"cd"], ["first", "second"])


def test_one_thread_at_a_time_handles_tiles():
    data = random.Random(1).randbytes(4000)
    inside = threading.Lock()
    done = bytearray()

    def handle(view: memoryview) -> None:
        assert inside.acquire(blocking=False), "two threads at once"
        done.extend(view)
        inside.release()

    lane = Lane(handle, 0)
    work = tiles(data, list(range(7, 4000, 7)))
    random.Random(2).shuffle(work)
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(lane.put, offset, view, lambda: None) for offset, view in work]:
            future.result()
    assert bytes(done) == data


def test_a_failure_is_raised_to_whoever_brought_the_tile():
    def handle(_: memoryview) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Lane(handle, 0).put(0, memoryview(b"x"), lambda: None)
