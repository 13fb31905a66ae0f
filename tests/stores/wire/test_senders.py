"""Senders make several calls at a time, and give the memory back only when none is under way."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial

import pytest

from shardtool.stores.wire.senders import Senders


def test_calls_are_made_at_the_same_time_and_answered_in_order() -> None:
    meeting, senders = threading.Barrier(4), Senders()

    def call(number: int) -> int:
        meeting.wait(timeout=60)
        return number

    assert senders.each([partial(call, number) for number in range(4)]) == [0, 1, 2, 3]
    assert senders.each([]) == []
    senders.close()


def test_a_single_call_needs_no_thread() -> None:
    senders = Senders()
    assert senders.each([threading.current_thread]) == [threading.current_thread()]
    senders.close()


@pytest.mark.parametrize("at", [0, 2])
def test_when_one_fails_nothing_is_under_way_any_more(at: int) -> None:
    """The memory is the caller's again, so those that have not begun are left out, and the others are waited for."""
    senders, busy, lock = Senders(2), [0, 0], threading.Lock()

    def call(number: int) -> None:
        with lock:
            busy[0] += 1
            busy[1] += 1
        time.sleep(0.05)
        with lock:
            busy[0] -= 1
        if number == at:
            raise ValueError(number)

    with pytest.raises(ValueError, match=str(at)):
        senders.each([partial(call, number) for number in range(40)])
    assert busy[0] == 0
    assert busy[1] < 40
    senders.close()


def test_after_the_end_they_begin_anew() -> None:
    senders, before = Senders(), set(threading.enumerate())
    for _ in range(2):
        assert senders.each([int, int]) == [0, 0]
        senders.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """Those of its parent are not there, and would be waited for without end."""
    senders = Senders()
    senders.each([partial(time.sleep, 0.01)] * 4)
    if not (child := os.fork()):
        signal.alarm(60)
        good = senders.each([int, int, int]) == [0, 0, 0]
        senders.close()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    senders.close()
