"""Copies from the engine's memory to where tensors lie: at once on this machine, on streams of their own to a GPU.

::

    a reader ── copy ── side stream: copy_(non_blocking) ── event ──┐
                                                                    ├── a thread waits for the events in order
    the block goes back, the segment is handed on ── landed <───────┘

The engine's memory is registered with the driver for the time of a run, so that the device fetches it by itself.
Tensors are handed on when their bytes have arrived as the host sees it, so that any stream of the caller may use them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import numpy as np
import torch

from shardtool.engine import Clock

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
Landed = Callable[[], None]


class Copier(Protocol):
    """Copies tiles on."""

    def copy(self, pairs: Pairs, landed: Landed) -> None:
        """Copy each source to its destination and call ``landed`` when all are there: soon, or at once."""

    def close(self) -> None:
        """Return when everything has landed."""


class Plain:
    """Copies at once, in the reader's thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def copy(self, pairs: Pairs, landed: Landed) -> None:
        """Copy and tell."""
        began = time.perf_counter()
        for target, source in pairs:
            target.copy_(source)
        self._clock.add("copy", began)
        landed()

    def close(self) -> None:
        """Nothing is under way."""


class Events(Protocol):
    """How a device is told to copy, and when it has: the part of this room that needs one."""

    def begin(self, pairs: Pairs) -> Any:
        """Begin to copy; returns a token."""

    def wait(self, token: Any) -> None:
        """Return when that copy has been made."""

    def close(self) -> None:
        """Give back what was taken."""


class Queued:
    """Copies that a device makes by itself, while readers go on. ``fail`` is told of an error that a copy ends with."""

    def __init__(self, events: Events, clock: Clock, fail: Callable[[BaseException], None]) -> None:
        self._events = events
        self._clock = clock
        self._fail = fail
        self._under_way: SimpleQueue[tuple[Any, Landed] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="shardtool-copies", daemon=True)
        self._thread.start()

    def copy(self, pairs: Pairs, landed: Landed) -> None:
        """Begin to copy."""
        self._under_way.put((self._events.begin(pairs), landed))

    def close(self) -> None:
        """Wait for everything under way."""
        self._under_way.put(None)
        self._thread.join()
        self._events.close()

    def _run(self) -> None:
        while (job := self._under_way.get()) is not None:
            token, landed = job
            try:
                began = time.perf_counter()
                self._events.wait(token)
                self._clock.add("copy", began)
                landed()
            except BaseException as error:
                self._fail(error)


class Cuda:
    """Side streams of CUDA devices, one for each, and the registration of the engine's memory."""

    def __init__(self, memory: memoryview, devices: Iterable[torch.device]) -> None:
        """``memory``: all that copies are made from. Called by the thread that will take the tensors."""
        self._callers = {device: torch.cuda.current_stream(device) for device in devices}
        self._streams = {device: torch.cuda.Stream(device) for device in self._callers}
        self._address = np.frombuffer(memory, np.uint8).ctypes.data
        # Memory that cannot be registered (a limit on locked pages) is copied all the same, only slower.
        self._pinned = int(torch.cuda.cudart().cudaHostRegister(self._address, len(memory), 0)) == 0

    def begin(self, pairs: Pairs) -> list[torch.cuda.Event]:
        """Copy on the side stream of each destination's device."""
        events = []
        for device in {target.device for target, _ in pairs}:
            stream = self._streams[device]
            # What is still to be done with memory that this destination has taken over, or filled before, comes first.
            stream.wait_stream(self._callers[device])
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for target, source in pairs:
                    if target.device == device:
                        target.copy_(source, non_blocking=True)
                        target.record_stream(stream)
                event = torch.cuda.Event()
                event.record(stream)
            events.append(event)
        return events

    def wait(self, token: list[torch.cuda.Event]) -> None:
        """Wait for the events; other threads run meanwhile."""
        for event in token:
            event.synchronize()

    def close(self) -> None:
        """Give the memory back to the system."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._pinned = False
