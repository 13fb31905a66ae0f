"""Lanes: whatever the order and the threads in which tiles come, they are handled in the order of their bytes.

That holds for each stage, and while one thread is at a stage others are at the stages before and behind it.
"""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.sinks.lane import Handle, Lane


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


@given(
    st.binary(min_size=1, max_size=40), st.lists(st.integers(1, 40), max_size=8), st.randoms(), st.sampled_from([1, 3])
)
def test_every_stage_sees_every_tile_in_order_after_the_stage_before_it(
    data: bytes, cuts: list[int], order: random.Random, stages: int
):
    seen: list[list[bytes]] = [[] for _ in range(stages + 1)]
    released: list[int] = []

    def stage(number: int) -> Handle:
        def handle(view: memoryview) -> None:
            seen[number].append(bytes(view))
            assert len(seen[number]) <= len(seen[number - 1]) or not number
            assert len(released) < len(seen[number])  # the memory is still the tile's

        return handle

    lane = Lane(stage(0), 0, *(stage(number) for number in range(1, stages + 1)))
    given_in = tiles(data, [cut for cut in cuts if cut < len(data)])
    order.shuffle(given_in)
    for offset, view in given_in:
        lane.put(offset, view, partial(released.append, offset))
    assert all(b"".join(parts) == data for parts in seen)
    assert released == sorted(offset for offset, _ in given_in)


def test_a_tile_is_in_the_first_stage_while_the_tile_before_it_is_in_the_second():
    """Each of two threads waits in its stage for the other one."""
    both = threading.Barrier(2, timeout=30)
    met: list[str] = []

    def first(view: memoryview) -> None:
        if bytes(view) == b"b":
            both.wait()
            met.append("first")

    def second(view: memoryview) -> None:
        if bytes(view) == b"a":
            both.wait()
            met.append("second")

    lane = Lane(first, 0, second)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(lane.put, i, memoryview(x), lambda: None) for i, x in enumerate((b"a", b"b"))]:
            future.result()
    assert sorted(met) == ["first", "second"]


def test_each_stage_is_the_business_of_one_thread_at_a_time():
    data = random.Random(1).randbytes(4000)
    inside = [threading.Lock(), threading.Lock()]
    done = [bytearray(), bytearray()]

    def stage(number: int) -> Handle:
        def handle(view: memoryview) -> None:
            assert inside[number].acquire(blocking=False), "two threads at once"
            done[number].extend(view)
            inside[number].release()

        return handle

    lane = Lane(stage(0), 0, stage(1))
    work = tiles(data, list(range(7, 4000, 7)))
    random.Random(2).shuffle(work)
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(lane.put, offset, view, lambda: None) for offset, view in work]:
            future.result()
    assert [bytes(one) for one in done] == [data, data]


def test_what_is_freed_is_freed_before_more_is_begun():
    """A tile that waits for its last stage goes before one that waits for its first."""
    order: list[str] = []

    def first(view: memoryview) -> None:
        order.append(f"first {bytes(view).decode()}")

    def second(view: memoryview) -> None:
        order.append(f"second {bytes(view).decode()}")

    lane = Lane(first, 0, second)
    lane.put(1, memoryview(b"b"), lambda: None)
    lane.put(0, memoryview(b"a"), lambda: None)
    assert order == ["first a", "second a", "first b", "second b"]


def test_a_failure_is_raised_to_whoever_brought_the_tile():
    def handle(_: memoryview) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Lane(handle, 0).put(0, memoryview(b"x"), lambda: None)
