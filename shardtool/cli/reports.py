"""What an operation returned, as people and machines read it.

Each report has ``show``, which prints text or, with ``--json``, the one object of ``to_json``. In JSON sizes are bytes,
times seconds, and speeds 10**9 bytes per second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from shardtool import display
from shardtool.budget import peak_memory
from shardtool.display import counted, show_seconds, show_speed, speed
from shardtool.stores.address import shown
from shardtool.units import show_size

if TYPE_CHECKING:
    from shardtool.layouts.file import FileLayout
    from shardtool.layouts.file import Traced as AtSizes
    from shardtool.ops.inspect import Inspection
    from shardtool.ops.job import Summary
    from shardtool.ops.measure import LoadReport
    from shardtool.ops.structure import FileCheck
    from shardtool.ops.verify import Report, TensorDifference

_RESTS_ON = {"save": " (same headers, samples, flags; shardtool verify --against checks every byte)"}
"""What it rests on that a job counts as done, where not every byte of its source is bound to it."""
SHOWN = 5
"""Troubles of one file that are shown; JSON has all."""


class Memory:
    """The most memory that the process had when the command's libraries were loaded, and has had since."""

    def __init__(self) -> None:
        self.after_imports = peak_memory()

    def to_json(self) -> dict[str, int]:
        """Both in bytes."""
        return {"peak_memory": peak_memory(), "memory_after_imports": self.after_imports}


@dataclass(frozen=True, slots=True)
class Written:
    """What ``save``, ``reshard`` or ``merge`` wrote, or would write."""

    command: str
    output: str
    summary: Summary
    seconds: float
    memory: Memory
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """Every field of the summary, and what it took."""
        fields = asdict(self.summary)
        fields["files"] = [{"key": key, "rank": rank, "size": size} for key, rank, size in self.summary.files]
        return {
            "command": self.command,
            "output": shown(self.output),
            "dry_run": self.dry_run,
            **fields,
            "seconds": self.seconds,
            "gb_per_s": speed(self.summary.written, self.seconds),
            **self.memory.to_json(),
        }

    def show(self, *, quiet: bool, wants_json: bool) -> None:
        """The files and a line that sums up; the plan is shown even if ``quiet``."""
        _notes(self.summary.notes, quiet=quiet)
        if wants_json:
            display.as_json(self.to_json())
        elif self.dry_run or not quiet:
            display.table(
                ("file", "rank", " size"),
                [(key, _rank(rank), show_size(size)) for key, rank, size in self.summary.files],
            )
            display.out(*(self._plan() if self.dry_run else self._result()))

    def _plan(self) -> Iterable[str]:
        summary = self.summary
        yield f"{shown(self.output)}: would hold {summary.what}"
        yield from (f"{key}: {value}" for key, value in summary.details.items() if isinstance(value, str | int))
        yield f"writes: {show_size(summary.bytes_to_write)} in {counted(len(summary.files), 'file')}"
        yield f"reads: {show_size(summary.bytes_to_read)}"
        least, most = show_size(summary.least_memory), show_size(summary.memory_limit)
        yield f"memory: {least} ({summary.least_memory} bytes) at least, {most} at most"

    def _result(self) -> Iterable[str]:
        summary = self.summary
        total = f"{show_size(summary.bytes_to_write)} in {counted(len(summary.files), 'file')}"
        if summary.complete and not summary.written:
            yield f"{shown(self.output)}: {summary.what}, {total}: complete already{_RESTS_ON.get(self.command, '')}"
            return
        took = f"{show_seconds(self.seconds)} ({show_speed(summary.written, self.seconds)})"
        before = f", {show_size(summary.kept)} of it written before" if summary.kept else ""
        yield f"{shown(self.output)}: {summary.what}, {total}{before}, {took}, peak memory {show_size(peak_memory())}"
        if not summary.complete:
            yield f"{shown(self.output)}: not complete yet, other ranks are still to be written"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What ``load`` came to."""

    report: LoadReport
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        """Every field of the report, with speeds."""
        report = self.report
        fields = asdict(report)
        fields["ranks"] = [{**asdict(one), "gb_per_s": speed(one.bytes, one.seconds)} for one in report.ranks]
        return {"command": "load", **fields, "gb_per_s": speed(report.bytes, report.seconds), **self.memory.to_json()}

    def show(self, *, quiet: bool, wants_json: bool) -> None:
        """A line for each rank and one for all."""
        report = self.report
        _notes(report.notes, quiet=quiet)
        if wants_json:
            display.as_json(self.to_json())
        elif not quiet:
            display.table(
                ("rank", "device", " tensors", " size", " time", " speed"),
                [
                    (
                        _rank(one.rank) or "whole",
                        one.device,
                        counted(one.tensors, "tensor"),
                        show_size(one.bytes),
                        show_seconds(one.seconds),
                        show_speed(one.bytes, one.seconds),
                    )
                    for one in report.ranks
                ],
            )
            display.out(
                f"{report.uri}: {counted(report.tensors, 'tensor')}, {_took(report.bytes, report.seconds)}, "
                f"digests {'' if report.verified else 'not '}checked, peak memory {show_size(report.peak_memory)}"
            )
            if report.bytes:
                display.out(_where_time_went(report))


def _where_time_went(report: LoadReport) -> str:
    """One line: what the threads did, who waited for whom, and how far it was from what the storage gives."""
    stages, wall = report.stages, max(report.seconds, 1e-9)
    named = {"storage": "storage", "hash": "digests", "copy": "copies", "exchange": "exchange"}
    always = ("storage", "hash") if report.verified else ("storage",)
    shown = [stage for stage in named if stage in always or stages[stage] >= 0.0005]
    spent = [f"{named[stage]} {show_seconds(stages[stage])}" for stage in shown]
    busy = min(report.storage_busy, wall)
    waited = f"waited {show_seconds(stages['data'])} for data and {show_seconds(stages['room'])} for the consumer"
    limit = f"storage was busy {busy / wall:.0%} of the time and gave {show_speed(report.bytes, busy)} then"
    return f"time of {counted(report.readers, 'reader')}: {', '.join(spent)}; {waited}; {limit}"


@dataclass(frozen=True, slots=True)
class Verified:
    """What ``verify`` found."""

    report: Report
    against: str | None
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        """Every file and every difference."""
        report = self.report
        return {
            "command": "verify",
            "uri": report.uri,
            "against": None if self.against is None else shown(self.against),
            "kind": report.kind,
            "depth": report.depth,
            "ok": report.ok,
            "exit_code": report.exit_code,
            "files": [
                {
                    "key": file.key,
                    "size": file.size,
                    "ok": file.ok,
                    "missing": file.missing,
                    "why": list(file.why),
                    **({"compared": list(file.compared)} if file.compared else {}),
                    **({"not_compared": file.not_compared} if file.not_compared else {}),
                }
                for file in report.files
            ],
            "differences": [_difference(one) for one in report.differences],
            "tensors": report.tensors,
            "bytes": report.bytes,
            "notes": list(report.notes),
            "seconds": report.seconds,
            "gb_per_s": speed(report.bytes, report.seconds),
            **self.memory.to_json(),
        }

    def show(self, *, quiet: bool, wants_json: bool) -> None:
        """A line for each file, each difference, and one for all; if ``quiet``, only of what is wrong."""
        report = self.report
        _notes(report.notes, quiet=quiet)
        if wants_json:
            display.as_json(self.to_json())
            return
        display.out(*(line for file in report.files if not (quiet and file.ok) for line in _checked(file)))
        display.out(*(_differs(one) for one in report.differences))
        if not (quiet and report.ok):
            display.out(self._result())

    def _result(self) -> str:
        report = self.report
        looked = {
            "structure": "structure checked",
            "digests": "structure and digests checked",
            "equality": f"compared with {shown(self.against or '')}",
        }[report.depth]
        if report.ok:
            found = [counted(len(report.files), "file")]
            found += [counted(report.tensors, "tensor")] if report.tensors else []
            found += [_took(report.bytes, report.seconds)] if report.bytes else []
            return f"{report.uri}: OK ({looked}; {', '.join(found)})"
        bad = f"{sum(not file.ok for file in report.files)} of {counted(len(report.files), 'file')}"
        differ = f", {counted(len(report.differences), 'difference')}" if report.depth == "equality" else ""
        return f"{report.uri}: FAILED ({looked}; {bad} failed{differ})"


def _checked(file: FileCheck) -> list[str]:
    """One line for a file, or one for each thing that is wrong with it."""
    if file.ok:
        quick = [", ".join(file.compared), f"not its {file.not_compared}" if file.not_compared else ""]
        said = "; ".join(text for text in quick if text)
        return [f"{file.key}: OK ({said})" if said else f"{file.key}: OK"]
    lines = [f"{file.key}: FAILED ({why})" for why in file.why[:SHOWN]]
    return lines + [f"{file.key}: FAILED (and {more} more)" for more in [len(file.why) - SHOWN] if more > 0]


def _differs(one: TensorDifference) -> str:
    where = ", ".join(word for word in (_rank(one.rank), one.key) if word)
    found = one.difference
    if found is None:
        what = one.why
    else:
        what = (
            f"{found.count} of {counted(math.prod(one.shape), 'element')} differ, "
            f"first at {list(found.index(one.shape))}: expected {_value(found.expected)}, "
            f"found {_value(found.actual)}, max abs difference {_value(found.max_abs)}"
        )
    return f"{one.name}: {where + ': ' if where else ''}{what}"


def _value(number: complex) -> str:
    return f"{number:.6g}" if isinstance(number, float) else str(number)


def _difference(one: TensorDifference) -> dict[str, Any]:
    found = one.difference
    return {
        "name": one.name,
        "rank": one.rank,
        "key": one.key,
        "dtype": one.dtype,
        "shape": list(one.shape),
        "elements": math.prod(one.shape),
        "count": found.count if found else None,
        "first": list(found.index(one.shape)) if found else None,
        "expected": found.expected if found else None,
        "actual": found.actual if found else None,
        "max_abs": found.max_abs if found else None,
        "why": one.why,
    }


@dataclass(frozen=True, slots=True)
class Inspected:
    """What ``inspect`` saw."""

    found: Inspection

    def to_json(self) -> dict[str, Any]:
        """Every field of the inspection; ``listed`` is called ``tensor_list``."""
        fields = asdict(self.found)
        listed = fields.pop("listed")
        return {"command": "inspect", **fields, "tensor_list": listed}

    def show(self, *, wants_json: bool, only_tensors: bool) -> None:
        """A summary; or the tensors that were asked for, and nothing else."""
        found = self.found
        if wants_json:
            display.as_json(self.to_json())
        elif only_tensors:
            for key in found.missing:
                display.note(f"{key} is missing; its tensors are not listed")
            display.table(
                ("tensor", "rank", "file", "dtype", "shape", " size"),
                [(t.name, _rank(t.rank), t.key, t.dtype, str(list(t.shape)), show_size(t.bytes)) for t in found.listed],
            )
        else:
            display.table(("checkpoint", found.uri), list(self._facts()))
            display.table(
                ("file", "rank", " tensors", " size"),
                [(f.key, _rank(f.rank), counted(f.tensors, "tensor"), show_size(f.size)) for f in found.files]
                + [(key, "", "missing", "") for key in found.missing],
            )
            display.table(
                ("dtype", " tensors", " elements", " size"),
                [
                    (d.dtype, counted(d.tensors, "tensor"), counted(d.elements, "element"), show_size(d.bytes))
                    for d in found.dtypes
                ],
            )

    def _facts(self) -> Iterable[tuple[str, str]]:
        found = self.found
        stored = f"{counted(found.tensors, 'tensor')}, {show_size(found.bytes)}"
        facts = {
            "kind": found.kind,
            "architecture": found.architecture,
            "engine": found.engine,
            "tp": found.tp,
            "pp": found.pp if (found.pp or 1) > 1 else None,
            "experts": "whole on each rank" if found.expert_parallel else None,
            "dtype": found.dtype,
            "pattern": found.pattern,
            "written by": found.written_by,
            "parameters": None if found.parameters is None else f"{found.parameters:,}",
            "dropped": found.dropped or None,
            "stored": f"{stored} in {counted(len(found.files), 'file')}",
            "missing": counted(len(found.missing), "file") if found.missing else None,
        }
        yield from ((name, str(value)) for name, value in facts.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Traced:
    """What ``trace`` saw, and what changed since an earlier layout file."""

    model: str
    output: str | None
    found: FileLayout
    earlier: FileLayout | None
    seconds: float

    @property
    def changes(self) -> list[str]:
        """What differs from the earlier file, in sentences."""
        from shardtool.layouts.difference import files

        return [] if self.earlier is None else files(self.earlier, self.found)

    @property
    def exit_code(self) -> int:
        """1 if something differs from the earlier file."""
        return 1 if self.changes else 0

    def to_json(self) -> dict[str, Any]:
        """What was traced, size by size."""
        found = self.found
        return {
            "command": "trace",
            "model": self.model,
            "output": self.output,
            "engine": found.engine,
            "engine_version": found.engine_version,
            "class": found.model_class,
            "dtype": found.dtype.name,
            "layouts": [
                {
                    "parallel": one.parallel.to_json(),
                    "tensors": _count(one),
                    "dropped": dict(one.dropped),
                    "aliases": dict(one.aliases),
                    "amendments": dict(one.amendments),
                    "uninitialised": dict(one.uninitialised),
                }
                for one in found.traced
            ],
            "changes": self.changes,
            "seconds": self.seconds,
        }

    def show(self, *, quiet: bool, wants_json: bool) -> None:
        """A line for each size; if ``quiet``, only what changed."""
        if wants_json:
            display.as_json(self.to_json())
            return
        found = self.found
        if not quiet:
            display.table(
                ("sizes", " tensors", " dropped", " aliases"),
                [
                    (
                        str(one.parallel),
                        counted(_count(one), "tensor"),
                        f"{len(one.dropped)} dropped",
                        f"{len(one.aliases)} aliases",
                    )
                    for one in found.traced
                ],
            )
            went = "" if self.output is None else f" -> {self.output}"
            by = f"{found.engine} {found.engine_version}, {found.model_class}, {found.dtype.name}"
            display.out(f"{self.model}: traced by {by} in {show_seconds(self.seconds)}{went}")
        if self.earlier is not None:
            display.out(*self.changes)
            if not self.changes and not quiet:
                display.out(f"nothing changed since {self.earlier.engine} {self.earlier.engine_version}")


def _count(traced: AtSizes) -> int:
    """Tensors of all ranks."""
    return sum(len(share.ranks) * (len(rule.index) or 1) for rule in traced.recipe.rules for share in rule.shares)


def _took(nbytes: int, seconds: float) -> str:
    return f"{show_size(nbytes)} in {show_seconds(seconds)} ({show_speed(nbytes, seconds)})"


def _rank(rank: int | None) -> str:
    return "" if rank is None else f"rank {rank}"


def _notes(notes: Iterable[str], *, quiet: bool) -> None:
    if not quiet:
        for text in notes:
            display.note(text)
