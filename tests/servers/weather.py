"""What goes wrong between a client and a server, chosen by a seed.

The same seed gives the n-th request for the same thing the same trouble, whichever thread asks and when. Bursts are the
exception: they are counted over all requests.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

READS = (
    "refused",  # 503, 500, 429 or 408, with and without Retry-After
    "burst",  # the next requests are refused too, whoever asks
    "cut answer",  # the connection ends after some bytes, of the head or of the body, politely or by a reset
    "stall",  # the same, but after a long silence
    "trickle",  # the same, but some bytes come meanwhile
    "slow",  # everything comes, in small pieces
    "junk",  # something that is no HTTP
    "more",  # Content-Length says more than there is
    "less",  # Content-Length says less than there is, the rest follows
    "other range",  # Content-Range and bytes of another place
    "part",  # fewer bytes than asked for, as Content-Range says
    "whole",  # 200 and everything, whatever was asked for
)
WRITES = (
    "refused",
    "burst",
    "cut request",  # the connection ends while the request is sent; the server never sees it
    "deaf",  # the request is not read, and after a long silence the connection ends
    "lost",  # the server does it, the answer gets lost
    "late",  # the server does it, the answer is cut after a long silence
    "cut answer",
    "junk",
    "slow",
)
RANGED = ("other range", "part", "whole")
HEADS = ("refused", "burst", "cut answer", "stall", "junk")
"""What can happen to an answer that has only a head, whose Content-Length is not the length of anything that comes."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong: ``share`` of the bytes pass before it, ``seconds`` it takes."""

    kind: str
    share: float = 0.0
    seconds: float = 0.0
    status: int = 503
    retry_after: str = ""
    reset: bool = False


@dataclass
class Weather:
    """Trouble for one of ``1 / odds`` requests, and no more than ``most`` times in a row for one thing.

    ``kinds``: what may happen, names of ``READS`` and ``WRITES``. ``silence``: how long what is silent is so, in
    seconds. ``clear``: set it to end all trouble. ``met``: how often each kind has happened.
    """

    seed: object
    odds: float = 0.15
    kinds: Sequence[str] = (*READS, *WRITES)
    silence: float = 0.3
    most: int = 3
    clear: bool = False
    met: Counter[str] = field(default_factory=Counter)
    _counts: Counter[str] = field(default_factory=Counter)
    _row: Counter[str] = field(default_factory=Counter)
    _burst: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, method: str, thing: str, *, ranged: bool = False) -> Fault | None:
        """What happens to this request for ``thing``."""
        with self._lock:
            if self.clear:
                return None
            name = f"{method} {thing}"
            self._counts[name] += 1
            chosen = random.Random(f"{self.seed} {name} {self._counts[name]}")
            found = self._burst_of(chosen) or self._chosen(chosen, method, ranged)
            if found is None or self._row[name] >= self.most:
                self._row[name] = 0
                return None
            self._row[name] += 1
            self.met[found.kind] += 1
            return found

    def _burst_of(self, chosen: random.Random) -> Fault | None:
        if not self._burst:
            return None
        self._burst -= 1
        return Fault("burst", status=chosen.choice((429, 503)), retry_after="0")

    def _chosen(self, chosen: random.Random, method: str, ranged: bool) -> Fault | None:
        if chosen.random() >= self.odds:
            return None
        known = HEADS if method == "HEAD" else READS if method == "GET" else WRITES
        kinds = [kind for kind in known if kind in self.kinds and (ranged or kind not in RANGED)]
        if not kinds:
            return None
        kind = chosen.choice(kinds)
        if kind == "burst":
            self._burst = chosen.randint(2, 6)
        return Fault(
            kind,
            share=chosen.choice((0.0, chosen.random(), 1.0)) if kind != "more" else 1.0,
            seconds=self.silence,
            status=chosen.choice((503, 500, 429, 408, 502)),
            retry_after=chosen.choice(("", "0", "0.05", "nonsense")),
            reset=chosen.random() < 0.5,
        )
