"""The collector rests while somebody is inside, and is as it was when the last has left."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from shardtool.calm import calm


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The collector is on before and after each test."""
    gc.enable()
    yield
    gc.enable()


def test_it_is_off_inside_and_on_after():
    with calm():
        assert not gc.isenabled()
        with calm():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_does_not_leave_it_off():
    with pytest.raises(RuntimeError), calm():
        raise RuntimeError
    assert gc.isenabled()


def test_who_had_it_off_has_it_off_still():
    gc.disable()
    with calm():
        pass
    assert not gc.isenabled()


def test_the_last_thread_turns_it_on():
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with calm():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(60)
    with calm():
        pass
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
