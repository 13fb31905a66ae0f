"""When to try again, how long to wait before it, and how many requests a server gets at a time.

::

    Again    tries, back-off with jitter, what the server says in Retry-After, and an end in time
    Lanes    requests under way at one server: halved when it throttles, one more for every round that it does not
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

from shardtool.errors import ShardtoolError, Unavailable

T = TypeVar("T")

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 529})
"""Status codes after which the same request may succeed."""
THROTTLED = frozenset({429, 503, 509, 529})
"""Those among them that ask for fewer requests."""


class Busy(Unavailable):
    """The server asks for a pause of ``after`` seconds, or for one of whatever length (0)."""

    def __init__(self, message: str, *, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True, slots=True)
class Again:
    """The policy for what may pass.

    ``attempts``: tries without progress, in all. ``backoff``: seconds before the second try, doubled for each one after
    it up to ``longest``; each wait is random between half of that and all of it, so that many readers do not come back
    at once. ``within``: no try begins later than so many seconds after the first failure. A server that asks for a
    longer pause gets it, up to ``pause`` seconds.
    """

    attempts: int = 5
    backoff: float = 0.5
    longest: float = 20.0
    pause: float = 60.0
    within: float = 300.0

    def trying(self) -> Trying:
        """A new count of tries."""
        return Trying(self)

    def run(self, call: Callable[[int], T]) -> T:
        """``call(failures so far)`` until it does not raise what is ``retryable``, or the tries are used up."""
        trying = self.trying()
        while True:
            try:
                return call(trying.failures)
            except ShardtoolError as error:
                trying.failed(error)


class Trying:
    """How the tries of one request went."""

    def __init__(self, policy: Again) -> None:
        self.failures = 0
        self._policy = policy
        self._end = math.inf

    def progressed(self) -> None:
        """Something came: what failed before is forgotten."""
        self.failures = 0
        self._end = math.inf

    def failed(self, error: ShardtoolError) -> None:
        """Wait before the next try, or raise ``error`` where there shall be none. Call it in the ``except`` clause."""
        policy, now = self._policy, time.monotonic()
        self.failures += 1
        self._end = min(self._end, now + policy.within)
        if not error.retryable or self.failures >= policy.attempts:
            raise error
        wait = random.uniform(0.5, 1.0) * min(policy.longest, policy.backoff * 2.0 ** (self.failures - 1))
        if isinstance(error, Busy):
            wait = max(wait, min(error.after, policy.pause) * random.uniform(1.0, 1.1))
        if now + wait > self._end:
            raise error
        time.sleep(wait)


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a reply asks to wait: a number or a date; 0 where it says nothing that can be understood."""
    said = headers.get("retry-after", "").strip()
    try:
        found = (
            float(said) if said.replace(".", "", 1).isdigit() else parsedate_to_datetime(said).timestamp() - time.time()
        )
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, min(found, 86400.0))


class Lanes:
    """How many requests may be under way at a server, for all threads that share it.

    It starts with ``most``. A throttled request halves what was under way (once for all requests that began before it
    was halved), and as many successes as there are lanes add one.
    """

    def __init__(self, most: int = 256) -> None:
        self.most = most
        self.limit = float(most)
        self._changed = threading.Condition()
        self._busy = 0
        self._cut = 0.0

    @contextmanager
    def lane(self, wait: float = 60.0) -> Iterator[Lane]:
        """Hold a lane in the block. After ``wait`` seconds without one the request goes on all the same."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy < int(self.limit), wait)
            self._busy += 1
        lane = Lane(self, time.monotonic())
        try:
            yield lane
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify()

    def throttled(self, began: float) -> None:
        """A request that began then was told that there are too many."""
        with self._changed:
            if began >= self._cut:
                self._cut = time.monotonic()
                self.limit = max(1.0, min(self.limit, self._busy) / 2)

    def succeeded(self) -> None:
        """A request was served."""
        with self._changed:
            if self.limit < self.most:
                self.limit = min(float(self.most), self.limit + 1 / self.limit)
                self._changed.notify()


@dataclass(frozen=True, slots=True)
class Lane:
    """A request under way."""

    lanes: Lanes
    began: float

    def ended(self, status: int) -> None:
        """The server has answered with this status."""
        if status in THROTTLED:
            self.lanes.throttled(self.began)
        elif status < 500:
            self.lanes.succeeded()
