"""Copies that a device makes by itself: nothing is handed on, and no memory given back, before it has arrived."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from shardtool.engine import Clock
from shardtool.sinks.device import Cuda, Events, Pairs, Plain, Queued


def pairs(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(4), torch.full((4,), float(n + 1))) for n in range(count)]


def arrived(made: Pairs) -> bool:
    return all(torch.equal(target, source) for target, source in made)


def test_on_this_machine_copies_are_made_at_once():
    made, told = pairs(), []
    clock = Clock()
    Plain(clock).copy(made, lambda: told.append(arrived(made)))
    assert told == [True]
    assert clock.seconds["copy"] > 0


def opened(events: Events, errors: list[BaseException]) -> Queued:
    copier = Queued(lambda: events, Clock(), errors.append)
    copier.open()
    return copier


class Late:
    """A device that copies when it is waited for, or when it is let."""

    def __init__(self, broken: int | None = None) -> None:
        self.let = threading.Event()
        self.closed = False
        self.begun = 0
        self._broken = broken

    def making(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, pairs: Pairs) -> Any:
        self.begun += 1
        return self.begun, pairs

    def wait(self, token: Any) -> None:
        number, made = token
        assert self.let.wait(60)
        if number == self._broken:
            raise RuntimeError("the device fell off the bus")
        for target, source in made:
            target.copy_(source)

    def close(self) -> None:
        self.closed = True


def test_a_device_copies_while_readers_go_on():
    device, errors = Late(), list[BaseException]()
    copier = opened(device, errors)
    jobs, told = [pairs() for _ in range(5)], list[int]()

    def landed(number: int) -> Callable[[], None]:
        def tell() -> None:
            assert arrived(jobs[number])
            told.append(number)

        return tell

    for number, job in enumerate(jobs):
        copier.copy(job, landed(number))
    assert device.begun == 5
    assert told == []
    device.let.set()
    copier.close()
    assert told == [0, 1, 2, 3, 4]
    assert device.closed
    assert not errors


def test_a_copy_that_fails_is_told_and_ends_nothing_else():
    device, errors, told = Late(broken=2), list[BaseException](), list[int]()
    copier = opened(device, errors)
    for number in (1, 2, 3):
        copier.copy(pairs(), partial(told.append, number))
    device.let.set()
    copier.close()
    assert told == [1, 3]
    assert [str(error) for error in errors] == ["the device fell off the bus"]


def test_what_is_never_opened_takes_nothing_of_the_device():
    def make() -> Events:
        raise AssertionError("nobody asked for it")

    before = set(threading.enumerate())
    Queued(make, Clock(), print).close()
    assert set(threading.enumerate()) <= before


def test_what_cannot_be_waited_for_is_given_back_at_once(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    device = Late()
    copier = Queued(lambda: device, Clock(), print)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        copier.open()
    assert device.closed
    copier.close()


@pytest.mark.cuda
def test_memory_that_cannot_be_registered_harms_nobody():
    """It is registered already: the refusal must not be taken for an error of what the caller does next."""
    from shardtool.budget import Arena

    arena, device = Arena(8 << 20), torch.device("cuda", 0)
    first = Cuda(arena.memory, [device])
    second = Cuda(arena.memory, [device])
    assert torch.ones(3, device=device).sum().item() == 3
    second.close()
    first.close()


@pytest.mark.cuda
def test_a_gpu_gets_what_was_in_registered_memory():
    from shardtool.budget import Arena

    arena, errors, told = Arena(8 << 20), list[BaseException](), list[int]()
    device = torch.device("cuda", 0)
    copier = opened(Cuda(arena.memory, [device]), errors)
    source = torch.frombuffer(arena.memory, dtype=torch.uint8)
    with copier.making():  # else their zeros might come behind the copies
        targets = [torch.zeros(1 << 20, dtype=torch.uint8, device=device) for _ in range(8)]
    for number, target in enumerate(targets):
        part = source[number << 20 : (number + 1) << 20]
        part.fill_(number + 1)
        copier.copy([(target, part)], partial(told.append, number))
    copier.close()
    assert told == list(range(8))
    assert not errors
    assert all(bool((target == number + 1).all()) for number, target in enumerate(targets))
