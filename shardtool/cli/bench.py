"""The command ``bench``: its flags, and what it found as a table, a line to copy, or JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from shardtool import display, settings
from shardtool.cli import options
from shardtool.cli.program import main
from shardtool.display import counted, show_seconds, show_speed, speed
from shardtool.units import show_size

if TYPE_CHECKING:
    from shardtool.cli.reports import Memory
    from shardtool.ops.bench import Benchmark, Trial


@dataclass(frozen=True, slots=True)
class Benched:
    """What ``bench`` tried."""

    found: Benchmark
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        """Every trial, the best one for each state, and the settings to go by."""
        found = self.found
        return {
            "command": "bench",
            "uri": found.uri,
            "files": found.files,
            "bytes": found.bytes,
            "sample": found.sample,
            "memory_limit": found.memory_limit,
            "trials": [_trial(one) for one in found.trials],
            "best": [_trial(one) for one in found.best],
            "settings": {"concurrency": found.best[0].concurrency, "block_size": found.best[0].block},
            "notes": list(found.notes),
            "seconds": found.seconds,
            **self.memory.to_json(),
        }

    def show(self, *, quiet: bool, wants_json: bool) -> None:
        """A line for each trial, what was best, and the settings."""
        found = self.found
        if wants_json:
            display.as_json(self.to_json())
        elif not quiet:
            for text in found.notes:
                display.note(text)
            display.table(("from", " readers", " blocks", "digests", " speed", " CPU"), [_row(t) for t in found.trials])
            display.out(*self._result())

    def _result(self) -> Iterable[str]:
        found = self.found
        read = f"{show_size(found.sample)} of {show_size(found.bytes)} in {counted(found.files, 'file')}"
        yield f"{found.uri}: read {read}, in {show_seconds(found.seconds)}"
        for one in found.best:
            how = f"{_readers(one)}, {_blocks(one)}, {_speed(one)} with digests, {_cpu(one)}"
            yield f"best from the {one.state}: {how}"
        good = found.best[0]
        yield f"settings: --concurrency {good.concurrency} --block-size {good.block >> 20}MiB"


def _trial(one: Trial) -> dict[str, Any]:
    return {
        "state": one.state,
        "concurrency": one.concurrency,
        "block": one.block,
        "digests": one.digests,
        "bytes": one.bytes,
        "seconds": one.seconds,
        "cpu_seconds": one.cpu_seconds,
        "gb_per_s": speed(one.bytes, one.seconds),
        "cpu_s_per_gib": one.cpu_per_gib,
    }


def _row(one: Trial) -> tuple[str, ...]:
    checked = "digests" if one.digests else ""
    return one.state, _readers(one), _blocks(one), checked, _speed(one), _cpu(one)


def _readers(one: Trial) -> str:
    return counted(one.concurrency, "reader")


def _blocks(one: Trial) -> str:
    return f"by {show_size(one.block)}"


def _speed(one: Trial) -> str:
    return show_speed(one.bytes, one.seconds)


def _cpu(one: Trial) -> str:
    return f"{one.cpu_per_gib:.3f} CPU-s/GiB"


@main.command(
    short_help="Find good settings for a storage.", epilog="Example: shardtool bench ./llama-tp4 --seconds 30"
)
@click.argument("uri", callback=options.source)
@click.option("--sample", metavar="SIZE", help="Bytes of the checkpoint to read at most.  [default: 2GiB]")
@click.option("--seconds", type=float, metavar="N", help="How long to try, in all.  [default: 10]")
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Memory for buffers at most, for example 512MiB; settings that need more are left out."
    "  [default: half of what is free, 256MiB at most]",
)
@options.pattern(options.READ_PATTERN)
@options.speech
def bench(uri: str, **flags: Any) -> int:
    """Read a sample of a checkpoint with several settings, say how fast each was, and which are good here.

    Local files are read from the disk, for which they are dropped from the page cache, and from the page cache. Nothing
    is written.
    """
    from shardtool.cli.reports import Memory
    from shardtool.ops.bench import bench as operation

    memory = Memory()
    silent, wants_json = settings.quiet(flags["quiet"]), flags["wants_json"]
    given = {
        "sample": flags["sample"],
        "seconds": flags["seconds"],
        "memory_limit": settings.memory_limit(flags["memory_limit"]),
        "pattern": flags["pattern"],
    }
    with display.progress("bench", shown=not (silent or wants_json), unit="trial") as tell:
        found = operation(uri, progress=tell, **{name: value for name, value in given.items() if value is not None})
    Benched(found, memory).show(quiet=silent, wants_json=wants_json)
    return 0
