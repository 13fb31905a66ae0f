"""The engine: every byte arrives, whoever fails is heard, and nobody waits forever."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtool import engine
from shardtool.budget import Arena, Stopped
from shardtool.dtypes import DType
from shardtool.engine import execute
from shardtool.errors import BudgetTooSmall, FormatError, PlanError, ShardtoolError, Unavailable
from shardtool.plan import Piece, Tensor, whole
from shardtool.schedule import Step, Target, Tile, least, steps
from shardtool.stores.base import Store, Wrapper
from shardtool.stores.memory import MemoryStore
from shardtool.testing import CountingStore, FaultyStore, Flip, Raise, Truncate
from shardtool.window import row_major
from tests.strategies import addresses, mosaic
from tests.worlds import World, chance, ruled

pytestmark = pytest.mark.timeout(240)

Release = Callable[[], None]


class Collect:
    """A plain sink: one rank's memory, its tiles in any order. ``staging`` says how much memory it borrows for each."""

    def __init__(self, memory: bytearray, staging: int = 1) -> None:
        self.memory = memory
        self.staging = staging
        self.tiles: list[tuple[int, int]] = []
        self.lock = threading.Lock()

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """The step's memory, or its own."""
        assert memory.nbytes == self.staging * tile.nbytes
        return (
            memory[: tile.nbytes] if self.staging else memoryview(self.memory)[tile.offset : tile.offset + tile.nbytes]
        )

    def done(self, tile: Tile, memory: memoryview, release: Release) -> None:
        """Keep the bytes."""
        if self.staging:
            self.memory[tile.offset : tile.offset + tile.nbytes] = memory[: tile.nbytes]
        with self.lock:
            self.tiles.append((tile.offset, tile.nbytes))
        release()


def store_of(world: World) -> MemoryStore:
    """A world's files in a store."""
    store = MemoryStore()
    for key, data in world.files.items():
        store.put(key, data)
    return store


def with_sinks(world: World, groups: Sequence[Sequence[Target]]) -> list[list[Target]]:
    """The same groups, each target with a sink of its own over its rank's memory."""
    return [
        [
            Target(t.tensor, t.pieces, Collect(world.ranks[t.sink], t.staging), t.offset, t.staging)
            for t in group
        ]
        for group in groups
    ]  # fmt: skip


def small(count: int = 40, nbytes: int = 3000) -> tuple[World, list[list[Target]], list[Collect]]:
    """Tensors that take a step each under a small limit."""
    world = World()
    for i in range(count):
        world.store(f"t{i}", DType.U8, (nbytes,))
    targets = [world.target(whole(name, stored), 0) for name, stored in world.stored.items()]
    groups = with_sinks(world, [[target] for target in targets])
    return world, groups, [target.sink for (target,) in groups]


def planned(groups: Sequence[Sequence[Target]], limit: int = 10_000) -> Iterator[Step]:
    """Steps of a few kilobytes."""
    return steps(groups, limit=limit, want=4000, longest=2000)


# What arrives.


@settings(max_examples=60)
@given(st.data(), st.integers(0, 4000), st.integers(1, 4000), st.integers(1, 4))
def test_every_target_is_filled_under_any_limit_with_any_number_of_readers(data, more: int, want: int, readers: int):
    world = World()
    kinds = st.one_of(
        chance(world), st.sampled_from(["qkv", "row", "vocab"]).flatmap(lambda rule: ruled(world, rule, 2))
    )
    groups = with_sinks(world, data.draw(st.lists(kinds, min_size=1, max_size=3)))
    limit = least(groups) + more
    told: list[int] = []
    execute(
        steps(groups, limit=limit, want=want, longest=256),
        store_of(world),
        Arena(limit),
        readers=readers,
        progress=told.append,
    )
    for group in groups:
        for target in group:
            end = target.offset + target.tensor.nbytes
            assert bytes(target.sink.memory[target.offset : end]) == world.wanted(target)
            at = target.offset
            for offset, nbytes in sorted(target.sink.tiles):
                assert offset == at  # each tile once
                at += nbytes
            assert at == end
    assert sum(told) == sum(target.tensor.nbytes for group in groups for target in group)


def test_a_tensor_is_read_from_the_store_as_the_plan_says():
    world, groups, _ = small()
    store = CountingStore(store_of(world))
    execute(planned(groups), store, Arena(10_000), readers=4)
    wanted = [(r.start, r.start + r.nbytes) for step in planned(groups) for r in step.reads]
    assert sorted(store.reads["f"]) == sorted(wanted)


def test_nothing_to_do_is_done():
    execute([], MemoryStore(), Arena(1), readers=4)


def test_a_step_without_reads_is_done_as_well():
    world = World()
    group = [world.target(mosaic("one", np.zeros(()), [], 1.0, DType.F32).tensor, 0)]
    (sunk,) = with_sinks(world, [group])
    execute(steps([sunk], limit=100, want=100, longest=100), MemoryStore(), Arena(100), readers=1)
    assert world.ranks[0][-4:] == struct.pack("<f", 1.0)


def test_reads_of_one_step_and_of_several_are_under_way_at_once():
    """Four readers meet inside the store; fewer would wait for each other forever."""
    world, groups, _ = small(8)
    meeting = threading.Barrier(4, timeout=30)
    execute(planned(groups, 100_000), Watched(store_of(world), lambda: meeting.wait()), Arena(100_000), readers=4)
    assert not meeting.broken


def test_the_reads_of_a_serial_step_take_turns():
    world = World()
    world.store("s", DType.F32, (200, 200))
    piece = Piece(row_major((200, 200)), row_major((200, 200)).transpose(1, 0), "s")
    tensor = mosaic("t", np.zeros((200, 200)), [piece], dtype=DType.F32).tensor
    (group,) = with_sinks(world, [[world.target(tensor, 0)]])
    limit = least([group])
    made = list(steps([group], limit=limit, want=limit, longest=1 << 20))
    assert all(step.serial and len(step.reads) > 1 for step in made)
    inside = threading.Lock()

    def alone() -> None:
        assert inside.acquire(blocking=False)
        inside.release()

    execute(made, Watched(store_of(world), alone), Arena(limit), readers=4)
    assert bytes(world.ranks[0][11:]) == world.wanted(group[0])


class Watched(Wrapper):
    """A store in which something happens at each read."""

    def __init__(self, inner: Store, happens: Callable[[], object]) -> None:
        super().__init__(inner)
        self.happens = happens

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Read when it has happened."""
        self.happens()
        self.inner.readinto(key, start, view)


# Memory.


class InLine(Collect):
    """Keeps each tile's memory until the tile behind it has come, and copies then: a file that is written in order."""

    held: list[tuple[Tile, memoryview, Release]]

    def __init__(self, memory: bytearray) -> None:
        super().__init__(memory)
        self.held = []

    def done(self, tile: Tile, memory: memoryview, release: Release) -> None:
        """Let go of what came before."""
        with self.lock:
            before, self.held = self.held, [(tile, memory, release)]
        for kept in before:
            Collect.done(self, *kept)


def test_memory_that_a_sink_keeps_is_not_lent_again():
    world, groups, _ = small(200, 700)  # several tiles a step
    sink = InLine(world.ranks[0])
    for group in groups:
        group[:] = [Target(t.tensor, t.pieces, sink, t.offset) for t in group]
    execute(planned(groups, 20_000), store_of(world), Arena(20_000), readers=4)
    Collect.done(sink, *sink.held[0])
    for group in groups:
        for t in group:
            assert bytes(world.ranks[0][t.offset : t.offset + t.tensor.nbytes]) == world.wanted(t)


def test_all_memory_has_come_back_when_the_work_is_done():
    world, groups, _ = small()
    arena = Arena(10_000)
    execute(planned(groups), store_of(world), arena, readers=4)
    assert arena.lease(10_000).view.nbytes == 10_000


def test_a_step_that_the_arena_cannot_hold_is_refused():
    world, groups, _ = small()
    with pytest.raises(BudgetTooSmall, match="needs"):
        execute(planned(groups), store_of(world), Arena(100), readers=2)


# Failures.


@pytest.mark.parametrize("number", [1, 2, 17, 79])
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize(
    "error", [Unavailable("cut"), FormatError("damaged"), OSError(5, "disk"), ZeroDivisionError("bug")]
)
def test_whatever_the_store_raises_is_raised_and_the_sinks_are_told(number: int, readers: int, error: Exception):
    world, groups, sinks = small()
    stopped = threading.Event()
    store = FaultyStore(store_of(world), {("readinto", number): Raise(error)})
    with pytest.raises(type(error), match=str(error.args[-1])):
        execute(planned(groups), store, Arena(10_000), readers=readers, stop=stopped.set)
    assert stopped.is_set()
    assert sum(n for sink in sinks for _, n in sink.tiles) < 40 * 3000


def test_an_object_that_ends_too_early_is_not_taken_for_data():
    world, groups, sinks = small(1)
    with pytest.raises(FormatError):
        execute(
            planned(groups), FaultyStore(store_of(world), {("readinto", 2): Truncate(10)}), Arena(10_000), readers=1
        )
    assert sinks[0].tiles == []


def test_a_wrong_bit_arrives_as_it_was_read():
    """The engine does not judge bytes: whoever has digests does."""
    world, groups, _ = small(1)
    execute(planned(groups), FaultyStore(store_of(world), {("readinto", 1): Flip(3)}), Arena(10_000), readers=1)
    (target,) = groups[0]
    assert world.ranks[0][11] == world.wanted(target)[0] ^ 8


class Broken(Collect):
    """A sink that fails with its third tile, in the place it is told to."""

    def __init__(self, memory: bytearray, place: str, error: BaseException) -> None:
        super().__init__(memory)
        self.place = place
        self.error = error
        self.count = 0

    def _count(self, place: str) -> None:
        if place == self.place:
            with self.lock:
                self.count += 1
                if self.count == 3:
                    raise self.error

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """Fail here, in the dispatcher."""
        self._count("room")
        return super().room(tile, memory)

    def done(self, tile: Tile, memory: memoryview, release: Release) -> None:
        """Or here, in a reader."""
        self._count("done")
        super().done(tile, memory, release)


@pytest.mark.parametrize("place", ["room", "done"])
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("error", [Unavailable("disk is full"), RuntimeError("bug"), KeyboardInterrupt()], ids=repr)
def test_whatever_a_sink_raises_is_raised(place: str, readers: int, error: BaseException):
    world, groups, _ = small()
    sink = Broken(world.ranks[0], place, error)
    broken = [[Target(t.tensor, t.pieces, sink, t.offset) for t in group] for group in groups]
    with pytest.raises(type(error)) as caught:
        execute(planned(broken), store_of(world), Arena(10_000), readers=readers)
    assert caught.value is error


def test_a_plan_that_fails_half_way_is_raised():
    world, groups, _ = small()

    def failing() -> Iterator[Step]:
        yield from list(planned(groups))[:3]
        raise PlanError("cannot go on")

    with pytest.raises(PlanError, match="cannot go on"):
        execute(failing(), store_of(world), Arena(10_000), readers=2)


def test_the_first_failure_is_raised_and_not_what_came_of_it():
    """A reader has failed; then the dispatcher fails because of that."""
    world, groups, _ = small(1, 1500)  # one step of one read
    failed = threading.Event()

    def failing() -> Iterator[Step]:
        yield next(planned(groups))
        assert failed.wait(30)
        raise RuntimeError("the file is closed")

    store = FaultyStore(store_of(world), {("readinto", 1): Raise(Unavailable("cut"))})
    with pytest.raises(Unavailable, match="cut"):
        execute(failing(), store, Arena(10_000), readers=1, stop=failed.set)


class Stuck(Collect):
    """A sink that has no room until it is stopped."""

    def __init__(self, memory: bytearray) -> None:
        super().__init__(memory)
        self.stopped = threading.Event()
        self.count = 0

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """Wait, from the second tile on."""
        self.count += 1
        if self.count > 1:
            assert self.stopped.wait(30)
            raise Stopped
        return super().room(tile, memory)


def test_a_sink_that_waits_for_room_is_woken_when_a_read_fails():
    world, groups, _ = small()
    sink = Stuck(world.ranks[0])
    stuck = [[Target(t.tensor, t.pieces, sink, t.offset) for t in group] for group in groups]
    store = FaultyStore(store_of(world), {("readinto", 1): Raise(Unavailable("cut"))})
    with pytest.raises(Unavailable, match="cut"):
        execute(planned(stuck), store, Arena(10_000), readers=1, stop=sink.stopped.set)


class Keeping(Collect):
    """A sink that never gives its memory back."""

    def done(self, tile: Tile, memory: memoryview, release: Release) -> None:
        """Keep it."""


def test_the_dispatcher_that_waits_for_memory_is_woken_when_a_read_fails():
    world, groups, _ = small()
    kept = [[Target(t.tensor, t.pieces, Keeping(t.sink.memory), t.offset) for t in group] for group in groups]
    calls = 0

    def late() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Unavailable("cut")

    with pytest.raises(Unavailable, match="cut"):
        execute(planned(kept), Watched(store_of(world), late), Arena(8_000), readers=1)


def test_no_thread_is_left_behind():
    before = set(threading.enumerate())
    for fault in ({}, {("readinto", 5): Raise(Unavailable("cut"))}):
        world, groups, _ = small()
        try:
            execute(planned(groups), FaultyStore(store_of(world), fault), Arena(10_000), readers=8)
        except ShardtoolError:
            assert fault
    assert set(threading.enumerate()) <= before


# Elements.


@pytest.mark.parametrize(
    ("dtype", "value", "octets"),
    [
        (DType.F32, 1.0, struct.pack("<f", 1.0)),
        (DType.F16, -2.0, struct.pack("<e", -2.0)),
        (DType.BF16, 1.0, b"\x80\x3f"),
        (DType.F64, 0.5, struct.pack("<d", 0.5)),
        (DType.I64, 3.0, struct.pack("<q", 3)),
        (DType.U8, 7.0, b"\x07"),
        (DType.BOOL, 1.0, b"\x01"),
        (DType.F8_E4M3, 0.0, b"\x00"),
        (DType.C64, 0.0, bytes(8)),
    ],
)
def test_a_fill_is_the_value_in_the_elements_own_type(dtype: DType, value: float, octets: bytes):
    room = bytearray(b"\xa5" * (3 * dtype.itemsize))
    engine.fill(memoryview(room), dtype, value)
    assert room == octets * 3


@given(st.data())
def test_elements_are_a_view_of_the_memory_wherever_it_starts(data):
    window = data.draw(
        st.sampled_from([row_major((2, 3)), row_major((4, 5)).narrow(1, 1, 2, 2).transpose(1, 0), row_major(())])
    )
    start = data.draw(st.integers(0, 9))
    memory = bytearray(200)
    view = engine.elements(memoryview(memory), DType.I32, start + 4 * window.offset, window.shape, window.strides)
    view[...] = np.arange(1, window.size + 1).reshape(window.shape)
    found = np.frombuffer(memory, "<i4", count=40, offset=start)
    assert np.array_equal(found[addresses(window)], view)


def test_elements_beyond_the_memory_are_refused():
    with pytest.raises((ValueError, TypeError)):
        engine.elements(memoryview(bytearray(10)), DType.I32, 0, (3,), (1,))


def test_a_cast_that_there_is_not_is_refused_and_not_guessed():
    world = World()
    stored = world.store("s", DType.I32, (10,))
    target = world.target(Tensor("s", DType.F32, (10,), whole("s", stored).pieces), 0)
    (group,) = with_sinks(world, [[target]])
    with pytest.raises(PlanError, match="I32 cannot be cast to F32"):
        execute(steps([group], limit=1000, want=1000, longest=100), store_of(world), Arena(1000), readers=1)
