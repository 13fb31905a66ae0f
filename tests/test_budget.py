"""Memory is counted before it is used: never lent twice, never more than the limit, and nobody waits forever."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardtool import budget
from shardtool.budget import PAGE, Arena, Block, Gate, Slabs, Stopped, anonymous, default_limit
from shardtool.errors import BudgetTooSmall


class Lending(RuleBasedStateMachine):
    """Blocks of an arena, leased and given back in any order: what is free is exactly what is not lent."""

    SIZE = 20 * PAGE + 100

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(self.SIZE)
        self.lent: list[Block] = []

    def holes(self) -> list[tuple[int, int]]:
        """What lies between the blocks."""
        ends = [0, *(n for b in sorted(self.lent, key=lambda b: b.start) for n in (b.start, b.end)), self.SIZE]
        return [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]

    def rooms(self) -> list[tuple[int, int]]:
        """What of each hole begins with a page."""
        return [(start, b) for a, b in self.holes() if (start := -(-a // PAGE) * PAGE) < b]

    @precondition(lambda self: self.rooms())
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        """A size that fits into some hole is lent without waiting, from the first page of the first that has it."""
        nbytes = data.draw(st.integers(1, max(b - a for a, b in self.rooms())))
        first = next(a for a, b in self.rooms() if b - a >= nbytes)
        block = self.arena.lease(nbytes)
        assert (block.start, block.end) == (first, first + nbytes)
        assert block.view.nbytes == nbytes
        self.lent.append(block)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Any block may come back at any time."""
        self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1))).release()

    @invariant()
    def nothing_is_lent_twice(self) -> None:
        """Blocks do not overlap and stay inside."""
        spans = sorted((b.start, b.end) for b in self.lent)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert all(0 <= a < b <= self.SIZE for a, b in spans)


TestLending = Lending.TestCase


def test_threads_never_share_a_byte():
    """Each thread writes its own number over its block and finds it there still."""
    arena = Arena(16 * PAGE)
    wrong: list[str] = []

    def work(number: int) -> None:
        sizes = random.Random(number)
        for _ in range(200):
            block = arena.lease(sizes.randint(1, 3 * PAGE))
            block.view[:] = bytes([number]) * block.view.nbytes
            if bytes(block.view) != bytes([number]) * block.view.nbytes:
                wrong.append(f"thread {number} lost its bytes")
            block.release()

    run_all([partial(work, n) for n in range(1, 9)])
    assert not wrong
    assert arena.lease(16 * PAGE).view.nbytes == 16 * PAGE  # all of it has come back in one piece


def run_all(works: list[Callable[[], None]]) -> None:
    """Run in threads; nobody may wait forever."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread waits forever"


class Waiting:
    """A call in a thread: whether it has returned, and what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.returned = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            self.error = error
        self.returned.set()

    def still(self) -> bool:
        """Whether it waits. A short while is enough: a call that does not wait returns at once."""
        return not self.returned.wait(0.05)

    def ends(self) -> bool:
        """Whether it comes back."""
        return self.returned.wait(60)


def test_who_asks_for_more_than_is_free_waits_until_it_is_there():
    arena = Arena(4 * PAGE)
    first, second = arena.lease(2 * PAGE), arena.lease(PAGE + 1)
    waiting = Waiting(lambda: arena.lease(4 * PAGE - 1))
    assert waiting.still()
    first.release()
    assert waiting.still()
    second.release()
    assert waiting.ends()
    assert waiting.error is None


def test_more_than_the_arena_has_is_refused_at_once_with_the_number():
    with pytest.raises(BudgetTooSmall, match="needs 101 bytes") as caught:
        Arena(100).lease(101)
    assert caught.value.needed == 101


def test_whoever_waits_for_memory_is_stopped_and_so_is_who_comes_later():
    arena = Arena(10)
    arena.lease(10)
    waiting = Waiting(lambda: arena.lease(1))
    assert waiting.still()
    arena.stop()
    assert waiting.ends()
    assert isinstance(waiting.error, Stopped)
    with pytest.raises(Stopped):
        arena.lease(1)


def test_nothing_may_be_leased_and_given_back():
    arena = Arena(10)
    block = arena.lease(0)
    block.release()
    assert arena.lease(10).view.nbytes == 10


def test_an_arena_of_nothing_is_an_arena():
    assert Arena(0).lease(0).view.nbytes == 0


# Slabs.


def taken(slabs: Slabs, nbytes: int) -> Any:
    """A slab that was lent to a caller and given to it; what it returns is all that looks at its memory."""
    slab = slabs.take(nbytes)
    array = slabs.lend(slab)
    slabs.give(slab.size)
    return array


def address(array: Any) -> int:
    found: int = array.ctypes.data
    return found


def test_what_a_caller_drops_is_used_again():
    slabs = Slabs(100 * PAGE)
    first = taken(slabs, 5 * PAGE)
    there = address(first)
    assert address(taken(slabs, 5 * PAGE)) != there, "the caller holds it still"
    part = first[10:20]
    del first
    assert address(taken(slabs, 5 * PAGE)) != there, "a view is a way of holding it"
    del part
    assert address(taken(slabs, 4 * PAGE)) == there


def test_memory_that_a_caller_holds_is_its_own_for_good():
    slabs = Slabs(4 * PAGE)
    held = []
    for number in range(50):
        array = taken(slabs, PAGE)
        array[:] = number
        held.append(array)
        if number % 3 == 0:
            held.pop(0)
    assert all((array == array[0]).all() for array in held)
    assert [int(array[0]) for array in held] == list(range(17, 50))


def test_what_is_not_the_callers_yet_is_limited():
    slabs = Slabs(4 * PAGE)
    first = slabs.take(3 * PAGE)
    waiting = Waiting(lambda: slabs.take(2 * PAGE))
    assert waiting.still()
    slabs.give(first.size)
    assert waiting.ends()


def test_what_is_larger_than_the_limit_is_let_in_alone_and_not_kept():
    slabs = Slabs(4 * PAGE)
    big = taken(slabs, 9 * PAGE)
    there = weakref.ref(big)
    del big
    assert there() is None
    assert slabs.kept == 9 * PAGE
    taken(slabs, PAGE)
    assert slabs.kept <= 4 * PAGE


def test_what_is_kept_makes_room_for_what_does_not_fit_into_it():
    slabs = Slabs(10 * PAGE)
    arrays = [taken(slabs, 2 * PAGE) for _ in range(4)]
    del arrays
    assert slabs.kept == 8 * PAGE
    other = slabs.take(6 * PAGE)
    assert slabs.kept <= 4 * PAGE
    slabs.give(other.size)


def test_memory_is_used_again_by_who_is_always_ahead_of_the_caller():
    """All the limit is read ahead, slab for slab; each is handed over, and the one before it dropped."""
    slabs = Slabs(4 * PAGE)
    ahead = [slabs.take(PAGE) for _ in range(4)]
    fresh = 0
    for _ in range(40):
        slab = ahead.pop(0)
        held = slabs.lend(slab)  # which drops the one before
        fresh += not held[0]  # the system's memory is zero
        held[0] = 1
        slabs.give(slab.size)
        ahead.append(slabs.take(PAGE))
    assert fresh <= 6, "memory that the caller has dropped goes back to the system, and comes anew"


def test_after_the_end_nothing_is_kept():
    slabs = Slabs(100 * PAGE)
    held, dropped = taken(slabs, PAGE), taken(slabs, PAGE)
    del dropped
    assert slabs.kept == PAGE
    slabs.stop()
    assert slabs.kept == 0
    held[:] = 7
    del held
    assert slabs.kept == 0
    with pytest.raises(Stopped):
        slabs.take(1)


def test_whoever_waits_for_a_slab_is_stopped():
    slabs = Slabs(PAGE)
    slabs.take(PAGE)
    waiting = Waiting(lambda: slabs.take(PAGE))
    assert waiting.still()
    slabs.stop()
    assert waiting.ends()
    assert isinstance(waiting.error, Stopped)


def test_a_slab_is_dropped_by_any_thread_at_any_time():
    """Also by one that is in the middle of taking another: dropping takes no lock."""
    slabs = Slabs(64 * PAGE)

    def work(number: int) -> None:
        for n in range(200):
            array = taken(slabs, (n % 3 + 1) * PAGE)
            array[:] = number
            assert (array == number).all()

    run_all([partial(work, n) for n in range(8)])
    assert slabs.kept <= 64 * PAGE + 8 * 3 * PAGE


# The gate.


def test_a_gate_lets_in_what_fits_and_holds_back_the_rest():
    gate = Gate(100)
    gate.enter(60)
    gate.enter(40)
    waiting = Waiting(lambda: gate.enter(1))
    assert waiting.still()
    gate.leave(40)
    assert waiting.ends()


def test_what_is_larger_than_the_gate_is_let_in_alone():
    gate = Gate(100)
    gate.enter(1)
    waiting = Waiting(lambda: gate.enter(500))
    assert waiting.still()
    gate.leave(1)
    assert waiting.ends()
    behind = Waiting(lambda: gate.enter(1))
    assert behind.still()
    gate.leave(500)
    assert behind.ends()


def test_whoever_waits_at_a_gate_is_stopped():
    gate = Gate(10)
    gate.enter(10)
    waiting = Waiting(lambda: gate.enter(1))
    assert waiting.still()
    gate.stop()
    assert waiting.ends()
    assert isinstance(waiting.error, Stopped)
    with pytest.raises(Stopped):
        gate.enter(1)


def test_a_gate_never_counts_more_than_its_limit():
    gate, lock = Gate(100), threading.Lock()
    inside, most = 0, 0

    def work(number: int) -> None:
        nonlocal inside, most
        sizes = random.Random(number)
        for _ in range(200):
            nbytes = sizes.randint(1, 60)
            gate.enter(nbytes)
            with lock:
                inside += nbytes
                most = max(most, inside)
            with lock:
                inside -= nbytes
            gate.leave(nbytes)

    run_all([partial(work, n) for n in range(8)])
    assert 0 < most <= 100


# The machine.


def test_memory_is_private_zero_and_as_large_as_asked():
    for nbytes in (1, 4096, 5 << 20):
        memory = anonymous(nbytes)
        assert len(memory) >= nbytes
        assert memory[0] == memory[nbytes - 1] == 0


def test_a_run_that_is_told_nothing_takes_half_of_what_is_free_within_bounds(monkeypatch: pytest.MonkeyPatch):
    for free, limit in ((0, 64 << 20), (300 << 20, 150 << 20), (1 << 40, 256 << 20)):
        monkeypatch.setattr(budget, "available", lambda free=free: free)
        assert default_limit() == limit


def test_ranks_that_run_side_by_side_share_what_is_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "available", lambda: 1600 << 20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_limit() == 100 << 20
