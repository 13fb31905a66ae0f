"""A lane.

Tiles of one file arrive in any order and are handled in the order of their bytes, stage after stage. Each stage is the
business of one thread at a time, and the stages of two: one hashes a tile while another one writes the tile before it.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

Handle = Callable[[memoryview], None]
Release = Callable[[], None]


class _Stage:
    """Something that is done to every tile. ``next``: where the tile begins that is next in line."""

    __slots__ = ("busy", "handle", "next", "waiting")

    def __init__(self, handle: Handle, start: int) -> None:
        self.handle = handle
        self.next = start
        self.waiting: dict[int, tuple[memoryview, Release]] = {}
        self.busy = False


class Lane:
    """Whoever brings a tile does what can be done now, of this tile or of others; what is not in line yet waits."""

    def __init__(self, handle: Handle, start: int, *more: Handle) -> None:
        """``start``: the first tile's offset. ``more``: what is done to each tile after ``handle``."""
        self._stages = [_Stage(one, start) for one in (handle, *more)]
        self._lock = Lock()

    def put(self, offset: int, view: memoryview, release: Release) -> None:
        """Bring the tile at ``offset``; its memory is released once it has been through all stages."""
        with self._lock:
            self._stages[0].waiting[offset] = (view, release)
            due = self._due()
        while due is not None:
            number, view, release = due
            stage = self._stages[number]
            stage.handle(view)
            last = number + 1 == len(self._stages)
            with self._lock:
                if not last:
                    self._stages[number + 1].waiting[stage.next] = (view, release)
                stage.next += len(view)
                stage.busy = False
                due = self._due()
            if last:
                release()

    def _due(self) -> tuple[int, memoryview, Release] | None:
        """A stage that nobody is at and whose next tile is there: the last such, so that memory is free soon."""
        for number in range(len(self._stages) - 1, -1, -1):
            stage = self._stages[number]
            if not stage.busy and stage.next in stage.waiting:
                stage.busy = True
                return number, *stage.waiting.pop(stage.next)
        return None
