"""A lane.

Tiles of one file arrive in any order and are handled in the order of their bytes, by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

Handle = Callable[[memoryview], None]
Release = Callable[[], None]


class Lane:
    """Whoever brings the next tile in line handles it and those that waited behind it; others leave theirs and go."""

    def __init__(self, handle: Handle, start: int) -> None:
        self._handle = handle
        self._next = start
        self._waiting: dict[int, tuple[memoryview, Release]] = {}
        self._busy = False
        self._lock = Lock()

    def put(self, offset: int, view: memoryview, release: Release) -> None:
        """Bring the tile at ``offset``; its memory is released once it has been handled."""
        with self._lock:
            self._waiting[offset] = (view, release)
            if self._busy:
                return
            self._busy = True
        while True:
            with self._lock:
                found = self._waiting.pop(self._next, None)
                if found is None:
                    self._busy = False
                    return
            view, release = found
            self._handle(view)
            self._next += len(view)
            release()
