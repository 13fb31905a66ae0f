"""Schedules: whatever the limit, the steps bring every byte to its place, and none is read more often than it must be.

The steps are executed by the interpreter of ``tests.worlds``, which trusts nothing and counts each byte that is read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardtool import schedule
from shardtool.dtypes import DType
from shardtool.errors import BudgetTooSmall, PlanError
from shardtool.header import PAGE
from shardtool.layouts.rules import RULES, Dims, Source
from shardtool.plan import Piece, Stored, Tensor, whole
from shardtool.schedule import Step, Target, least, steps
from shardtool.window import flat, row_major
from tests.strategies import addresses, mosaic
from tests.worlds import START, World, chance, ruled, shared

CUT = ("column", "copy", "gate_up", "qkv", "row", "vocab")
"""The rules that cut sources."""


@contextlib.contextmanager
def scale(floor: int, gap: int) -> Iterator[None]:
    """Smaller tiles and gaps, so that small tensors are cut as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "FLOOR", floor)
        patch.setattr(schedule, "GAP", gap)
        yield


LIMITS = st.tuples(st.integers(0, 3000), st.integers(1, 5000), st.sampled_from([64, 203, 1 << 20]))


def scheduled(world: World, groups: Sequence[Sequence[Target]], limits: tuple[int, int, int], tile: int | None = None):
    """Plan, execute and check; the limit is so much more than the least."""
    more, want, longest = limits
    limit = least(groups, tile) + more
    done = world.run(steps(groups, limit=limit, want=want, longest=longest, tile=tile), limit)
    world.check(groups, done)
    return done


# The laws.


@given(st.data(), LIMITS, st.sampled_from([64, 256, 4096]), st.sampled_from([0, 40, 128 << 10]))
def test_any_mosaic_is_filled_with_the_right_bytes_under_any_limit(data, limits, floor: int, gap: int):
    """Transposed, stepped, of mixed types, misaligned, empty, cast: the limit holds and the bytes are right."""
    world = World()
    kinds = st.one_of(chance(world), st.sampled_from(CUT).flatmap(lambda rule: ruled(world, rule, 2, only=0)))
    groups = [data.draw(kinds) for _ in range(data.draw(st.integers(1, 4)))]
    with scale(floor, gap):
        scheduled(world, groups, limits)


@given(
    st.data(),
    st.lists(st.sampled_from(CUT), min_size=1, max_size=4),
    st.sampled_from([1, 2, 4]),
    LIMITS,
    st.sampled_from([64, 256, 4096]),
)
def test_what_all_ranks_want_is_read_once_under_any_limit(data, rules: list[str], tp: int, limits, floor: int):
    world = World()
    groups = [data.draw(ruled(world, rule, tp)) for rule in rules]
    with scale(floor, 128 << 10):
        scheduled(world, groups, limits)
    assert world.most_read <= 1


@given(st.data(), st.sampled_from([rule for rule in CUT if rule != "row"]), LIMITS)
def test_one_rank_alone_reads_its_own_bytes_and_no_others(data, rule: str, limits):
    world = World()
    group = data.draw(ruled(world, rule, 4, only=data.draw(st.integers(0, 3))))
    with scale(64, 128 << 10):
        scheduled(world, [group], limits)
    assert world.most_read <= 1
    own = sum(
        len(np.unique(addresses(piece.src))) * piece.source.dtype.itemsize
        for target in group
        for piece in target.pieces
        if isinstance(piece.source, Stored)
    )
    assert sum(int(counts.sum()) for counts in world.counts.values()) == own


@given(st.data(), st.integers(1, 300), LIMITS)
def test_a_sink_that_needs_a_certain_size_gets_tiles_of_that_size(data, tile: int, limits):
    world = World()
    group = data.draw(st.one_of(chance(world), ruled(world, "row", 2), ruled(world, "vocab", 2)))
    items = {target.tensor.dtype.itemsize for target in group}
    tile *= math.lcm(*items) if items else 1
    with scale(64, 100):
        done = scheduled(world, [group], limits, tile)
    for target in group:
        sizes = [t.nbytes for step in done for t in step.tiles if t.target is target]
        assert all(n == tile for n in sizes[:-1])
        assert all(n <= tile for n in sizes)


def assert_congruent(step: Step) -> None:
    """What is large lies in the block as it does in its file, if it can there without parting elements from memory."""
    for tile in step.tiles:
        target, item = tile.target, tile.target.tensor.dtype.itemsize
        straight = [read for read in step.reads if read.place is None and read.copies[0].tile is tile]
        starts = [read.start - read.copies[0].dst.offset * item for read in straight]
        wished = [tile.offset] if target.paged else starts[:1]
        if target.staging and tile.nbytes >= schedule.LARGE * schedule.FLOOR:
            assert all((tile.place - wish) % PAGE == 0 for wish in wished if wish % item == 0)
    for read in step.reads:
        if read.place is not None and read.nbytes >= schedule.LARGE * schedule.FLOOR:
            assert (read.place - read.start) % PAGE == 0


@given(st.data(), LIMITS, st.sampled_from([64, 256, 4096]), st.sampled_from([40, 128 << 10]))
def test_what_is_large_lies_behind_a_page_as_it_does_in_its_file(data, limits, floor: int, gap: int):
    """Wherever there is a page to spare for each tile and each read."""
    world = World()
    kinds = st.one_of(chance(world), st.sampled_from(CUT).flatmap(lambda rule: ruled(world, rule, 2)))
    groups = [data.draw(kinds) for _ in range(data.draw(st.integers(1, 3)))]
    more, want, longest = limits
    pages = data.draw(st.sampled_from([0, 0, 4 * PAGE, 100 * PAGE]))
    with scale(floor, gap):
        done = scheduled(world, groups, (more + pages, want + pages, longest))
        limit = least(groups) + more + pages
        for step in done:
            moved = PAGE * (len(step.tiles) + len(step.reads))
            if not step.serial and step.cost + moved <= min(want + pages, limit):
                assert_congruent(step)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("rule", ["column", "row", "copy"])
@pytest.mark.parametrize("much", [6, 9, 64])
def test_tiles_and_reads_of_a_layer_lie_as_in_their_files(rule: str, much: int, paged: bool):
    """The first tensor of each rank begins 12 bytes into its file, that of the source 3 and a page."""
    world = World()
    world.store("s", DType.BF16, (512, 4096), lead=3 + PAGE)
    shares = RULES[rule].cut("t", [Source("s", (512, 4096))], Dims(1, 1, 1, 1), 2)
    group = [
        world.target(shared("t", DType.BF16, share), rank, paged=paged) for share in shares for rank in share.ranks
    ]
    floor = schedule.LARGE * schedule.FLOOR
    want = much * floor
    done = world.run(steps([group], limit=4 * want, want=want, longest=8 << 20), 4 * want)
    world.check([group], done)
    assert world.most_read == 1
    for step in done:
        assert_congruent(step)
        assert not step.serial
    if paged:
        assert all(tile.place % PAGE == tile.offset % PAGE for s in done for tile in s.tiles if tile.nbytes >= floor)
    assert any(tile.nbytes >= floor for step in done for tile in step.tiles)


def test_a_sink_that_writes_from_its_tiles_has_them_as_in_its_file_and_another_as_in_the_source():
    """The same bytes, read straight into a tile: 4096 + 40 bytes into their file, and 12 into the rank's."""
    size = schedule.LARGE * schedule.FLOOR
    for paged, wanted in ((True, 12), (False, 40)):
        world = World()
        stored = world.store("s", DType.F32, (size // 4,), lead=PAGE + 40)
        target = world.target(whole("s", stored), 0, paged=True)
        target = replace(target, paged=paged)
        (step,) = scheduled(world, [[target]], (4 * size, 4 * size, size))
        (tile,) = step.tiles
        assert (tile.offset % PAGE, tile.place % PAGE) == (12, wanted)
        assert [read.place for read in step.reads] == [None]


def test_elements_are_aligned_rather_than_that_they_lie_as_in_a_file_that_does_not_align_them():
    size = schedule.LARGE * schedule.FLOOR
    world = World()
    stored = world.store("s", DType.F32, (size // 4,), lead=PAGE + 41)
    (step,) = scheduled(world, [[world.target(whole("s", stored), 0)]], (4 * size, 4 * size, size))
    assert step.tiles[0].place == 0


def test_small_tiles_lie_close_together_wherever_they_go():
    world = World()
    stored = [world.store(f"n{i}", DType.U8, (100,)) for i in range(50)]
    groups = [[world.target(whole(f"n{i}", one), 0, paged=True)] for i, one in enumerate(stored)]
    (step,) = scheduled(world, groups, (1 << 20, 1 << 20, 1 << 20))
    assert [tile.place for tile in step.tiles] == [128 * i for i in range(50)]


# Tiles, reads and gaps as large as they are.


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("rule", ["column", "gate_up", "row", "qkv", "copy"])
@pytest.mark.parametrize("much", [1, 2, 20])
def test_a_layer_is_read_once_in_long_ranges(rule: str, tp: int, much: int):
    dims = Dims(heads=16, kv_heads=4, head_dim=8, vocab=1)
    width = 1024
    sizes = {"qkv": [(128, width), (32, width), (32, width)], "gate_up": [(256, width)] * 2}.get(rule, [(128, width)])
    world = World()
    for i, shape in enumerate(sizes):
        world.store(f"s{i}", DType.BF16, shape, lead=3)
    shares = RULES[rule].cut("t", [Source(f"s{i}", shape) for i, shape in enumerate(sizes)], dims, tp)
    group = [world.target(shared("t", DType.BF16, share), rank) for share in shares for rank in share.ranks]
    limit = least([group]) * much
    done = world.run(steps([group], limit=limit, want=limit // 3, longest=8 << 20), limit)
    world.check([group], done)
    assert world.most_read == 1
    assert {int(n) for n in np.unique(world.counts["f"][3:])} == {1}


@given(
    st.integers(1, 3 << 20),
    st.integers(0, 9000),
    st.sampled_from([64 << 10, 1 << 20, 8 << 20]),
    st.sampled_from([100_003, 1 << 20]),
    st.sampled_from([0, 1]),
    st.integers(0, 5000),
)
def test_a_run_of_bytes_has_the_same_steps_for_less(
    size: int, at: int, longest: int, tile: int, staging: int, more: int
):
    tensor = whole("", Stored("key", DType.U8, (size,), at))
    target = Target(tensor, tuple(tensor.pieces()), None, 0, staging)
    want = least([[target]], tile) - schedule.FLOOR - schedule.ALIGN + more  # a tile, and some of the page before it
    found = schedule.straight(target, want=want, longest=longest, tile=tile)
    general = steps([[target]], limit=want, want=want, longest=longest, tile=tile)
    assert list(map(planned, found)) == list(map(planned, general))


def planned(step: Step) -> tuple[object, ...]:
    """All that a step of one tile says; a window of one element is written in several ways."""
    (tile,) = step.tiles
    reads = [
        (read.key, read.start, read.nbytes, read.place, copy.dst.bounds, copy.src.bounds, copy.base, copy.dtype)
        for read in step.reads
        for copy in read.copies
        if copy.tile is tile
    ]
    return tile, step.cost, step.serial, len(step.reads), reads


def test_rows_that_a_rank_needs_only_a_little_of_are_read_apart():
    """Between the columns of one rank lie more bytes than are worth reading."""
    world = World()
    world.store("s", DType.U8, (4, 1 << 20))
    piece = Piece(row_major((4, 100)), row_major((4, 1 << 20)).narrow(1, 500, 100), "s")
    target = world.target(mosaic("t", np.zeros((4, 100)), [piece], dtype=DType.U8).tensor, 0)
    done = scheduled(world, [[target]], (1 << 20, 1 << 20, 1 << 20))
    assert [read.nbytes for step in done for read in step.reads] == [100] * 4


def test_a_transposed_tensor_that_fits_is_read_once_and_one_that_does_not_once_per_band():
    world = World()
    world.store("s", DType.F32, (200, 100))
    piece = Piece(row_major((100, 200)), row_major((200, 100)).transpose(1, 0), "s")
    target = world.target(mosaic("t", np.zeros((100, 200)), [piece], dtype=DType.F32).tensor, 0)
    assert len(scheduled(world, [[target]], (300_000, 20_000, 8 << 20))) == 1
    assert world.most_read == 1
    done = scheduled(world, [[target]], (20_000, 20_000, 8 << 20))
    assert len(done) > 1
    assert world.most_read == len(done)


def test_tiles_end_with_a_row_where_one_fits():
    """So that what is read for a band of rows is one range and is cut the same way everywhere."""
    world = World()
    world.store("s", DType.BF16, (1000, 300))
    shares = RULES["row"].cut("t", [Source("s", (1000, 300))], Dims(1, 1, 1, 1), 2)
    group = [world.target(shared("t", DType.BF16, share), rank) for share in shares for rank in share.ranks]
    done = scheduled(world, [group], (0, 100_000, 8 << 20))
    assert len(done) > 2
    assert all((tile.offset - START) % (150 * 2) == 0 for step in done for tile in step.tiles)


@pytest.mark.parametrize("more", range(0, 400, 7))
def test_a_transposed_tensor_is_done_in_the_least_memory_and_in_any_that_is_a_little_more(more: int):
    world = World()
    world.store("s", DType.U8, (30, 30))
    piece = Piece(row_major((30, 30)), row_major((30, 30)).transpose(1, 0), "s")
    target = world.target(mosaic("t", np.zeros((30, 30)), [piece], dtype=DType.U8).tensor, 0)
    with scale(64, 1000):
        scheduled(world, [[target]], (more, 64, 64))


@pytest.mark.parametrize("longest", [64, 77, 203])
def test_neighbours_whose_elements_do_not_line_up_are_divided_between_elements(longest: int):
    """An odd number of bytes, and behind it numbers of four and eight."""
    world = World()
    for name, dtype, count in (("a", DType.U8, 101), ("b", DType.F32, 51), ("c", DType.F64, 33), ("d", DType.U8, 7)):
        world.store(name, dtype, (count,), lead=3)
    groups = [[world.target(whole(name, stored), rank) for rank in range(2)] for name, stored in world.stored.items()]
    assert len(scheduled(world, groups, (1 << 20, 1 << 20, longest))) == 1
    assert world.most_read == 1


def test_small_neighbours_share_a_step_and_its_reads():
    world = World()
    groups = []
    for i in range(20):
        stored = world.store(f"n{i}", DType.BF16, (64,))
        tensor = whole(f"n{i}", stored)
        groups.append([world.target(tensor, rank) for rank in range(4)])
    done = scheduled(world, groups, (1 << 20, 1 << 20, 1 << 20))
    assert [len(step.reads) for step in done] == [1]
    assert world.most_read == 1


def test_a_read_that_is_a_tile_goes_straight_into_it_and_takes_no_memory():
    world = World()
    stored = world.store("s", DType.F32, (1000,))
    target = world.target(whole("s", stored), 0, staging=0)
    (step,) = scheduled(world, [[target]], (0, 1 << 20, 1 << 20))
    assert step.cost == 0
    assert [read.place for read in step.reads] == [None]


def test_empty_tensors_take_no_step():
    world = World()
    world.store("s", DType.F32, (0, 4))
    assert scheduled(world, [[world.target(whole("s", world.stored["s"]), 0)]], (0, 100, 100)) == []


def test_a_tensor_without_dimensions_is_one_element():
    world = World()
    world.store("s", DType.F64, (), lead=5)
    scheduled(world, [[world.target(whole("s", world.stored["s"]), r) for r in range(3)]], (0, 100, 100))
    assert world.most_read == 1


def test_padding_and_constants_are_filled_without_a_read():
    world = World()
    group = [world.target(mosaic("one", np.zeros(()), [], 1.0, DType.F32).tensor, 0)]
    (step,) = scheduled(world, [group], (0, 100, 100))
    assert (step.reads, step.tiles[0].fill) == ([], 1.0)


def test_replicas_that_overlap_do_not_hide_padding():
    """Four elements of which two come twice and one from nowhere: that one is padding, and filled."""
    world = World()
    stored = world.store("s", DType.U8, (4,))
    pieces = tuple(Piece(flat(at, 2), flat(at, 2), stored) for at in (0, 1))
    target = world.target(Tensor("t", DType.U8, (4,), lambda: pieces, 7.0), 0)
    scheduled(world, [[target]], (0, 100, 100))


def test_elements_that_come_from_nowhere_are_refused():
    world = World()
    stored = world.store("s", DType.U8, (4,))
    target = world.target(Tensor("t", DType.U8, (4,), lambda: (Piece(flat(0, 3), flat(0, 3), stored),)), 0)
    with pytest.raises(PlanError, match="'t': 1 of its elements come from nowhere"):
        list(steps([[target]], limit=1 << 20, want=100, longest=100))


@given(st.data(), st.integers(1, 400))
def test_a_limit_below_the_least_is_enough_or_refused_with_the_least(data, less: int):
    world = World()
    groups = [data.draw(st.one_of(chance(world), ruled(world, "row", 4)))]
    with scale(64, 100):
        limit = least(groups) - less
        assume(limit > 0)
        refused: BudgetTooSmall | None = None
        try:
            done = world.run(steps(groups, limit=limit, want=limit, longest=1 << 20), limit)
        except BudgetTooSmall as error:
            refused = error
        else:
            world.check(groups, done)
        if refused:
            assert refused.needed == least(groups)
            assert f"needs {refused.needed} bytes of memory and has {limit}" in str(refused)


def test_the_least_counts_one_floor_for_each_tile_and_one_read():
    world = World()
    world.store("s", DType.U8, (100_000,))
    world.store("n", DType.U8, (10,))
    tiles = [world.target(whole("s", world.stored["s"]), rank) for rank in range(3)]
    small: list[Any] = [world.target(whole("n", world.stored["n"]), 0)]
    floor, align = schedule.FLOOR, schedule.ALIGN
    assert least([tiles, small]) == 3 * floor + floor + align
    assert least([small]) == align + floor + align
    assert least([tiles], 1 << 10) == 3 * 1024 + floor + align
    assert least([]) == 0
