"""Copies from the engine's memory to where tensors lie: at once on this machine, on streams of their own to a GPU.

::

    a reader ── copy ── side stream: copy_(non_blocking) ── event ──┐
                                                                    ├── a thread waits for the events in order
    the block goes back, the segment is handed on ── landed <───────┘

The engine's memory is registered with the driver for the time of a run, so that the device fetches it by itself.
Tensors are handed on when their bytes have arrived as the host sees it, so that any stream of the caller may use them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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

    def open(self) -> None:
        """Get ready; called by the thread that will take the tensors."""

    def making(self) -> AbstractContextManager[None]:
        """Where destinations are made, or taken over, by the dispatcher."""

    def copy(self, pairs: Pairs, landed: Landed) -> None:
        """Copy each source to its destination and call ``landed`` when all are there: soon, or at once."""

    def close(self) -> None:
        """Return when everything has landed."""


class Plain:
    """Copies at once, in the reader's thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def open(self) -> None:
        """Nothing is needed."""

    def making(self) -> AbstractContextManager[None]:
        """Anywhere."""
        return nullcontext()

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

    def making(self) -> AbstractContextManager[None]:
        """Where destinations are made."""

    def begin(self, pairs: Pairs) -> Any:
        """Begin to copy; returns a token."""

    def wait(self, token: Any) -> None:
        """Return when that copy has been made."""

    def close(self) -> None:
        """Give back what was taken."""


class Queued:
    """Copies that a device makes by itself, while readers go on. ``fail`` is told of an error that a copy ends with.

    ``make`` is called when it is opened: what is never begun takes nothing of the device.
    """

    def __init__(self, make: Callable[[], Events], clock: Clock, fail: Callable[[BaseException], None]) -> None:
        self._make = make
        self._clock = clock
        self._fail = fail
        self._events: Events | None = None
        self._under_way: SimpleQueue[tuple[Any, Landed] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="shardtool-copies", daemon=True)

    @property
    def events(self) -> Events:
        """The device, which was opened."""
        assert self._events is not None
        return self._events

    def open(self) -> None:
        """Take what the device needs, and wait for its copies from now on."""
        events = self._make()
        try:
            self._thread.start()
        except BaseException:
            events.close()
            raise
        self._events = events

    def making(self) -> AbstractContextManager[None]:
        """Where the device wants destinations to be made."""
        return self.events.making()

    def copy(self, pairs: Pairs, landed: Landed) -> None:
        """Begin to copy."""
        self._under_way.put((self.events.begin(pairs), landed))

    def close(self) -> None:
        """Wait for everything under way."""
        if self._events is None:
            return
        self._under_way.put(None)
        self._thread.join()
        self._events.close()

    def _run(self) -> None:
        while (job := self._under_way.get()) is not None:
            token, landed = job
            try:
                began = time.perf_counter()
                self.events.wait(token)
                self._clock.add("copy", began)
                landed()
            except BaseException as error:
                self._fail(error)


class Cuda:
    """Side streams of CUDA devices, one for each, and the registration of the engine's memory.

    A thread of ours begins with the first device of the machine as its current one. A device that is current while CUDA
    is called gets a context, which takes half a GiB of it, so that the device in question is made current first.
    """

    def __init__(self, memory: memoryview, devices: Iterable[torch.device]) -> None:
        """``memory``: all that copies are made from. Called by the thread that will take the tensors."""
        self._callers = {device: torch.cuda.current_stream(device) for device in devices}
        self._streams = {device: torch.cuda.Stream(device) for device in self._callers}
        self._first = next(iter(self._callers))
        self._memory: memoryview | None = memory  # which must not go before the driver has forgotten it
        self._address = np.frombuffer(memory, np.uint8).ctypes.data
        with torch.cuda.device(self._first):
            refused = int(torch.cuda.cudart().cudaHostRegister(self._address, len(memory), _PORTABLE))
            if refused:
                _forget(self._first)  # memory that cannot be registered is copied all the same, only slower
        self._pinned = not refused
        for device, stream in self._streams.items():  # parameters may still be worked on
            stream.wait_stream(self._callers[device])

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Destinations are the caller's streams' own. What these still do with memory taken over comes first."""
        with torch.cuda.device(self._first), contextlib.ExitStack() as stack:
            for stream in self._callers.values():
                stack.enter_context(torch.cuda.stream(stream))
            yield
        for device, stream in self._streams.items():
            stream.wait_stream(self._callers[device])

    def begin(self, pairs: Pairs) -> list[tuple[torch.device, torch.cuda.Event]]:
        """Copy on the side stream of each destination's device."""
        events = []
        for device in {target.device for target, _ in pairs}:
            with torch.cuda.device(device), torch.cuda.stream(self._streams[device]):
                for target, source in pairs:
                    if target.device == device:
                        target.copy_(source, non_blocking=True)
                        target.record_stream(self._streams[device])
                event = torch.cuda.Event(blocking=True)  # whoever waits for another keeps a core busy meanwhile
                event.record(self._streams[device])
            events.append((device, event))
        return events

    def wait(self, token: list[tuple[torch.device, torch.cuda.Event]]) -> None:
        """Wait for the events; other threads run meanwhile."""
        for device, event in token:
            with torch.cuda.device(device):
                event.synchronize()

    def close(self) -> None:
        """Give the memory back to the system."""
        if self._pinned:
            with torch.cuda.device(self._first):
                if int(torch.cuda.cudart().cudaHostUnregister(self._address)):
                    _kept.append(self._memory)
                    _forget(self._first)
            self._pinned = False
        self._memory = None


def _forget(device: torch.device) -> None:
    """Take a refusal from the driver, which remembers it as its last error and blames the next kernel of anybody."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)


_PORTABLE = 1  # cudaHostRegisterPortable: for every device
_kept: list[memoryview | None] = []
"""Memory that the driver would not forget: what came to lie there would be taken for it."""
