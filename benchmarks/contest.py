"""Contests: who takes part, whose turn it is, what came of it, and the tables that show it.

A contest asks one question. Contestants take turns, each round in another shuffled order, so that what disturbs the
machine disturbs all of them, and nobody always runs behind the same one. What is kept are the seconds of every run;
medians and ratios are made when they are shown.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import measure

OURS = "shardtool"
MAPPING = "mapping"
WANTED = 0.9
"""The share of a bar's rate that is wanted, if nothing else is said."""
ALIKE = measure.MIB
"""Bytes of memory by which runs differ that are alike."""


@dataclass(frozen=True)
class Sample:
    """One run: seconds, and the peak of resident memory less that right after the imports, in bytes."""

    wall: float
    cpu: float
    over: int = 0


@dataclass
class Row:
    """A contestant. ``kind``: what it hands out or does; only equals are compared.

    ``held``: bytes of tensors that are handed out and kept, so that every loader has them. ``over``: the highest peak.
    ``pinned``: bytes that a device copied from, as far as they are seen; ``taken``: by which the whole machine had less
    memory. ``failed`` says why there is nothing to show.
    """

    name: str
    kind: str
    held: int = 0
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    over: int = 0
    failed: str = ""
    pinned: int = 0
    taken: int = 0

    @property
    def ours(self) -> bool:
        """Whether this is shardtool."""
        return self.name.startswith(OURS)

    @property
    def wall(self) -> float:
        """The median."""
        return measure.middle(self.walls)

    @property
    def cpu(self) -> float:
        """The median."""
        return measure.middle(self.cpus)

    @property
    def extra(self) -> int | None:
        """Bytes of memory beside the tensors that are held; None where none was measured."""
        return self.over - self.held if self.over else None

    def add(self, sample: Sample) -> None:
        """One more run."""
        self.walls.append(round(sample.wall, 4))
        self.cpus.append(round(sample.cpu, 4))
        self.over = max(self.over, sample.over)


@dataclass
class Contest:
    """A question and its contestants. ``gib``: of the bytes at stake; ``base``: with whom all are compared, if any.

    ``limited``: the limit is for all memory of ours, no tensors aside. ``bar``: seconds that can hardly be less, of
    ``bar_name``, and ``wanted``: the share of their rate that is to be reached.
    """

    question: str
    gib: float
    runs: int
    back: float
    limit: int
    rows: list[Row]
    base: str = ""
    limited: bool = False
    bar: float = 0.0
    bar_name: str = ""
    wanted: float = WANTED

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Contest:
        """What ``asdict`` made of one."""
        return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def table(self) -> str:
        """All contestants in Markdown."""
        against = next((row for row in self.rows if row.name == self.base and not row.failed), None)
        heads = ["contestant", "kind", "wall s", "GiB/s", "CPU-s/GiB, median", "least"]
        heads += [f"wall, {self.base} = 1", f"CPU, {self.base} = 1"] if against else []
        heads += ["of the ceiling"] if self.bar else []
        heads += ["MiB over the imports", "less the limit, MiB" if self.limited else "less tensors held, MiB"]
        machine = any(row.taken for row in self.rows)
        heads += ["pinned, MiB", "of the machine, MiB"] if machine else []
        lines: list[list[str]] = []
        for row in self.rows:
            if row.failed:
                lines.append([row.name, row.kind, row.failed, *[""] * (len(heads) - 3)])
                continue
            cells = [row.name, row.kind, f"{row.wall:.2f}", f"{self.gib / row.wall:.2f}"]
            cells += [f"{row.cpu / self.gib:.3f}", f"{min(row.cpus) / self.gib:.3f}"]
            cells += [f"{row.wall / against.wall:.2f}", f"{row.cpu / max(against.cpu, 1e-9):.2f}"] if against else []
            cells += [f"{self.bar / row.wall:.0%}"] if self.bar else []
            cells.append(f"{row.over / measure.MIB:.0f}" if row.over else "")
            cells.append(self._beside(row))
            cells += [_mib(row.pinned) if row.pinned else "", _mib(row.taken)] if machine else []
            lines.append(cells)
        return measure.table(heads, lines)

    def said(self) -> str:
        """The circumstances, in a sentence."""
        backed = f", {self.back:g} GiB of memory made present before each" if self.back else ""
        turns = f"{self.runs} runs in turns, in another order each round" if self.runs > 1 else "1 run"
        limit = f", memory limit {self.limit / measure.MIB:.0f} MiB" if self.limit else ""
        return f"{self.gib:.2f} GiB, {turns}{backed}{limit}."

    def _beside(self, row: Row) -> str:
        """What a contestant takes beside the tensors that are held, or beside the limit if that bound it."""
        if row.extra is None or (self.limited and not row.ours):
            return ""
        if self.limited and row.over < self.limit * 3 // 4:
            return "does not bind"
        return f"{(row.over - self.limit if self.limited else row.extra) / measure.MIB:.0f}"

    def equals(self, row: Row) -> list[Row]:
        """Whom a contestant of ours is compared with: who does the same, those who map, and the base."""
        peers = [peer for peer in self.rows if not peer.ours and not peer.failed]
        return [peer for peer in peers if peer.kind in (row.kind, MAPPING) or peer.name == self.base]

    def losses(self) -> Iterator[tuple[str, str, str, str, str, str]]:
        """Each peer that is faster than one of our rows, uses less CPU or takes less memory beside its tensors.

        Question, peer, ours, wall, CPU, memory. Less memory is what is more than runs differ by.
        """
        for row in self.rows:
            if not row.ours or row.failed:
                continue
            for peer in self.equals(row):
                slow, dear = row.wall > peer.wall, row.cpu > peer.cpu
                large = row.extra is not None and peer.extra is not None and row.extra - peer.extra > ALIKE
                if slow or dear or large:
                    name = f"{peer.name} ({MAPPING})" if peer.kind == MAPPING else peer.name
                    yield (
                        self.question,
                        name,
                        row.name,
                        _pair(peer.wall, row.wall, 2) if slow else "",
                        _pair(peer.cpu / self.gib, row.cpu / self.gib, 3) if dear else "",
                        f"{_mib(peer.extra)} to {_mib(row.extra)}" if large else "",
                    )

    def verdicts(self) -> Iterator[str]:
        """How each of our rows stands to the best of its equals that does not map, in wall and in CPU."""
        for row in self.rows:
            peers = [peer for peer in self.equals(row) if peer.kind != MAPPING]
            if row.ours and not row.failed and peers:
                fast, thrifty = min(peers, key=lambda p: p.wall), min(peers, key=lambda p: p.cpu)
                yield (
                    f"{row.name}: {row.wall / fast.wall:.2f} times the wall of the fastest ({fast.name}), "
                    f"{row.cpu / max(thrifty.cpu, 1e-9):.2f} times the CPU of the thriftiest ({thrifty.name})"
                )
            if row.ours and not row.failed and self.bar:
                share = f"{self.bar / row.wall:.0%} of the rate of {self.bar_name}"
                yield f"{row.name}: {share}; {self.wanted:.0%} is wanted"


def _pair(theirs: float, ours: float, digits: int) -> str:
    """Both numbers, and how many times the first the second is."""
    return f"{theirs:.{digits}f} to {ours:.{digits}f} ({ours / max(theirs, 1e-9):.2f} times)"


def _mib(nbytes: int | None) -> str:
    return f"{(nbytes or 0) / measure.MIB:.0f}"


def reason(failed: BaseException) -> str:
    """The last line of an error."""
    return str(failed).strip().splitlines()[-1][:120]


Contestant = tuple[Row, Callable[[], Sample]]


def take_turns(
    contestants: list[Contestant],
    runs: int,
    before: Callable[[Row], None],
    enough: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Run all, ``runs`` rounds, each shuffled by a fixed seed. A peer that fails is out, and its row says why.

    ``before`` prepares a run: files into the page cache or out of it, memory made present. ``enough`` is asked behind
    each round whether that was the last one, however many are left.
    """
    for i in range(runs):
        for row, contestant in random.Random(i).sample(contestants, len(contestants)):
            if row.failed:
                continue
            before(row)
            try:
                sample = contestant()
            except measure.Failed as failed:
                if row.ours:
                    raise
                row.failed = f"failed: {reason(failed)}"
                print(f"{row.name} {row.failed}", file=sys.stderr, flush=True)
                continue
            row.add(sample)
            print(f"{row.name}: {sample.wall:.2f} s, {sample.cpu:.2f} CPU s", file=sys.stderr, flush=True)
        if enough():
            break
    return [row for row, _ in contestants]
