"""Turns: no more threads inside than there are turns, and nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.turns import Turns


@given(st.integers(1, 4), st.integers(1, 8))
def test_no_more_are_inside_than_there_are_turns(count: int, threads: int):
    turns, lock = Turns(count), threading.Lock()
    inside = most = 0

    def work(_: int) -> None:
        nonlocal inside, most
        with turns:
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(20)))
    assert 1 <= most <= count
    assert inside == 0


def test_a_turn_is_given_back_by_whoever_fails():
    turns = Turns(1)
    for _ in range(2):
        with pytest.raises(KeyError), turns:
            raise KeyError
    with turns:
        pass


def test_turns_can_be_added_for_those_who_wait():
    turns = Turns(0)
    waiting = threading.Thread(target=turns.take)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    turns.give_back(2)
    waiting.join(20)
    assert not waiting.is_alive()
    turns.take()
