"""What ranks say to each other while they exchange memory: one short message of each to each, round by round.

Each rank has a receive under way for the next message of every other. So a failing rank's reason arrives although
nobody waits for it, and that a process has ended is seen by all, whoever it was. What nobody says is told by an alarm.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

MESSAGE = 1 << 10
"""Bytes of a message: its kind, the number of its round, the length of its text, the text."""
GRACE = 10.0
"""Seconds that a rank which has failed waits at most for the others to take its reason."""
GOING, FAILED, LOST, DONE = 1, 2, 3, 4
_LEAD = 1 + 8 + 2
MOST = MESSAGE - _LEAD
"""Bytes of a message's text."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a rank said in a round."""

    kind: int
    number: int
    text: str


class Alarm:
    """Something that any rank can turn on and all can see, in the store in which the processes have met."""

    _made = 0  # of this process; all processes make the same exchanges in the same order

    def __init__(self, ranks: Sequence[int]) -> None:
        from torch.distributed import distributed_c10d

        Alarm._made += 1
        self._key = f"shardtool/{Alarm._made}/{'-'.join(map(str, ranks))}"
        self._store = distributed_c10d._get_default_store()

    def ring(self) -> None:
        """Turn it on."""
        with contextlib.suppress(RuntimeError):  # who kept the store has ended: that is alarm enough
            self._store.set(self._key, "")

    def is_on(self) -> bool:
        """Whether somebody has, or the store is gone."""
        try:
            return bool(self._store.check([self._key]))
        except RuntimeError:
            return True


class Line:
    """Short messages between all ranks of a group: one of each to each, round by round."""

    def __init__(self, group: Any, ranks: Sequence[int], rank: int) -> None:
        self.number = 0
        self._group = group
        self._others = {place: other for place, other in enumerate(ranks) if place != rank}
        self._posted: dict[int, tuple[Any, Any] | str] = {}
        self._post()

    def _post(self) -> None:
        """Begin to receive everybody's next message."""
        import torch
        import torch.distributed as dist

        for place, other in self._others.items():
            memory = torch.empty(MESSAGE, dtype=torch.uint8)
            try:
                self._posted[place] = memory, dist.irecv(memory, src=other, group=self._group)
            except RuntimeError as error:  # it has ended: the next round says so
                self._posted[place] = first_line(error)

    def round(self, kind: int, text: str, seconds: float | None) -> dict[int, Message | str]:
        """Tell everybody, hear everybody: by place, what it said, or how the connection to it broke."""
        sent = self._send(kind, text)
        heard: dict[int, Message | str] = {}
        for place, posted in self._posted.items():
            if isinstance(posted, str):
                heard[place] = posted
                continue
            memory, work = posted
            broken = waited(work, seconds)
            heard[place] = broken if broken is not None else decoded(bytes(memory.numpy()))
        for work in sent:  # to a rank that lives it has gone: there is always a receive for it
            waited(work, GRACE)
        self._posted = {}
        self.number += 1
        if all(isinstance(one, Message) and one.kind == GOING for one in heard.values()):
            self._post()
        return heard

    def tell(self, kind: int, text: str, seconds: float) -> None:
        """Tell everybody, and hear nobody."""
        for work in self._send(kind, text):
            waited(work, seconds)

    def _send(self, kind: int, text: str) -> list[Any]:
        import torch
        import torch.distributed as dist

        said = text.encode("utf-8", "replace")[:MOST]
        data = bytes([kind]) + self.number.to_bytes(8, "little") + len(said).to_bytes(2, "little") + said
        memory = torch.zeros(MESSAGE, dtype=torch.uint8)
        memory[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        sent = []
        for other in self._others.values():
            with contextlib.suppress(RuntimeError):  # it has ended: its own message that does not come tells
                sent.append(dist.isend(memory, dst=other, group=self._group))
        return sent

    def close(self) -> None:
        """Receive no more."""
        self._posted = {}
        self._group = None


def waited(work: Any, seconds: float | None) -> str | None:
    """Wait for one message; how it failed, if it did."""
    try:
        work.wait() if seconds is None else work.wait(timedelta(seconds=seconds))
    except RuntimeError as error:
        return first_line(error)
    return None


def decoded(data: bytes) -> Message:
    """A message as it came."""
    length = int.from_bytes(data[9:11], "little")
    text = data[_LEAD : _LEAD + length].decode("utf-8", "replace")
    return Message(data[0], int.from_bytes(data[1:9], "little"), text)


def first_line(error: BaseException) -> str:
    """What gloo says, without its file names and advice."""
    return re.sub(r"^(\[[^\]]*\] *)+", "", str(error)).partition("\n")[0].partition(". This is typically")[0][:200]
