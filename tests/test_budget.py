"""Memory is counted before it is used: never lent twice, never more than the limit, and nobody waits forever."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardtool import budget
from shardtool.budget import Arena, Block, Gate, Stopped, anonymous, available, default_limit
from shardtool.errors import BudgetTooSmall


class Lending(RuleBasedStateMachine):
    """Blocks of an arena, leased and given back in any order: what is free is exactly what is not lent."""

    SIZE = 1000

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(self.SIZE)
        self.lent: list[Block] = []

    def holes(self) -> list[tuple[int, int]]:
        """What lies between the blocks."""
        ends = [0, *(n for b in sorted(self.lent, key=lambda b: b.start) for n in (b.start, b.end)), self.SIZE]
        return [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]

    @precondition(lambda self: self.holes())
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        """A size that fits into some hole is lent without waiting, from the first hole that has it."""
        nbytes = data.draw(st.integers(1, max(b - a for a, b in self.holes())))
        first = next(a for a, b in self.holes() if b - a >= nbytes)
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
    arena = Arena(1 << 12)
    wrong: list[str] = []

    def work(number: int) -> None:
        sizes = random.Random(number)
        for _ in range(200):
            block = arena.lease(sizes.randint(1, 1 << 10))
            block.view[:] = bytes([number]) * block.view.nbytes
            if bytes(block.view) != bytes([number]) * block.view.nbytes:
                wrong.append(f"thread {number} lost its bytes")
            block.release()

    run_all([partial(work, n) for n in range(1, 9)])
    assert not wrong
    assert arena.lease(1 << 12).view.nbytes == 1 << 12  # all of it has come back in one piece


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
    arena = Arena(100)
    first, second = arena.lease(60), arena.lease(30)
    waiting = Waiting(lambda: arena.lease(95))
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
        assert len(memory) == nbytes
        assert memory[0] == memory[-1] == 0


def test_what_is_available_is_some_memory_and_not_more_than_the_machine_has():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available() <= total


def test_a_run_that_is_told_nothing_takes_half_of_what_is_free_within_bounds(monkeypatch: pytest.MonkeyPatch):
    for free, limit in ((0, 64 << 20), (300 << 20, 150 << 20), (1 << 40, 256 << 20)):
        monkeypatch.setattr(budget, "available", lambda free=free: free)
        assert default_limit() == limit
