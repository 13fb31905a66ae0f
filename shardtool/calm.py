"""Many small objects made at a stretch, without the garbage collector looking at all of them again and again.

Python's collector goes through every object of a process each time their number has grown by a quarter. With torch
loaded these are half a million before a header of twenty thousand tensors is parsed, which would take four times as
long as it does without. Nothing that is made here is a cycle.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_inside = 0
_was_on = False


@contextmanager
def calm() -> Iterator[None]:
    """The collector is off until the last thread has left, and then as it was when the first came in."""
    global _inside, _was_on
    with _lock:
        if not _inside:
            _was_on = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _was_on:
                gc.enable()
