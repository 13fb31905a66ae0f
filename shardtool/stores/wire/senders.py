"""Threads that send the parts of an object, several at a time, straight from the caller's memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

SENDERS = 16

T = TypeVar("T")


class Senders:
    """The threads of all writers of a store. A process that was forked off makes its own: threads are not inherited."""

    def __init__(self, most: int = SENDERS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._process = 0
        self._pool: ThreadPoolExecutor | None = None

    def each(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """What the calls give, in their order: the first is made by this thread, the others at the same time.

        When this returns, or raises what one of them raised, none is under way: the memory is the caller's again.
        """
        others = calls[1:]
        pool = self._here() if others else None
        sent = [pool.submit(call) for call in others] if pool else []
        try:
            return [*(call() for call in calls[:1]), *(future.result() for future in sent)]
        finally:
            for future in sent:
                future.cancel()
            wait(sent)

    def close(self) -> None:
        """End the threads; they are made again if the object is used again."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._process == os.getpid():
            pool.shutdown()

    def _here(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._process != os.getpid():
                self._process = os.getpid()
                self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="shardtool-upload")
            return self._pool
