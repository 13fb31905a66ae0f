"""The command ``clean``: its flags, and what it found, thing by thing or as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from shardtool import display, settings
from shardtool.cli import options
from shardtool.cli.program import main
from shardtool.display import counted
from shardtool.units import show_duration, show_size

if TYPE_CHECKING:
    from shardtool.ops.clean import Cleaned, Leftover


@dataclass(frozen=True, slots=True)
class Tidied:
    """What ``clean`` found."""

    found: Cleaned
    yes: bool

    def to_json(self) -> dict[str, Any]:
        """Every leftover."""
        return {
            "command": "clean",
            "uri": self.found.uri,
            "complete": self.found.complete,
            "found": [
                {
                    "kind": one.kind,
                    "key": one.key,
                    "size": None if one.size < 0 else one.size,
                    "since": one.since or None,
                    "job": one.job or None,
                    "old": one.old,
                    "removed": one.removed,
                }
                for one in self.found.found
            ],
            "notes": list(self.found.notes),
        }

    def show(self, *, quiet: bool, wants_json: bool) -> None:
        """A line for each leftover, and one for all."""
        if wants_json:
            display.as_json(self.to_json())
        elif not quiet:
            for text in self.found.notes:
                display.note(text)
            display.table(("what", " size", " age", "state"), [self._row(one) for one in self.found.found])
            display.out(*self._result())

    def _row(self, one: Leftover) -> tuple[str, ...]:
        age = show_duration(max(0.0, time.time() - one.since)) if one.since else "age unknown"
        state = "removed" if one.removed else "" if one.old else "young"
        return f"{one.kind} {one.key}", "" if one.size < 0 else show_size(one.size), age, state

    def _result(self) -> Iterable[str]:
        found = self.found
        if not found.found:
            yield f"{found.uri}: nothing is left over"
            return
        for what in dict.fromkeys(one.job for one in found.found if one.job):
            yield f"{found.uri}: left by a job that was writing {what}"
        old = [one for one in found.found if one.old]
        size = show_size(sum(max(0, one.size) for one in old))
        if self.yes:
            yield f"{found.uri}: {counted(len(found.removed), 'thing')} removed ({size})"
        elif old:
            yield f"{found.uri}: {counted(len(old), 'thing')} to remove ({size}): say --yes"
        if found.young:
            yield f"{found.uri}: {counted(len(found.young), 'thing')} may be in use: see --older-than"


@main.command(
    short_help="List and remove what killed jobs left.", epilog="Example: shardtool clean ./llama-tp4 --older-than 12h"
)
@click.argument("uri", callback=options.address)
@click.option("--yes", is_flag=True, help="Remove what is listed; without it nothing is changed.")
@click.option(
    "--older-than",
    metavar="TIME",
    default="1d",
    help="How long ago the last sign of life must be, for example 30m, 12h or 2d; 0 takes all.  [default: 1d]",
)
@options.speech
def clean(uri: str, yes: bool, older_than: str, **flags: Any) -> int:
    """List what killed jobs left at a place: records, shards of no complete checkpoint, unfinished uploads.

    With --yes it is removed. A complete checkpoint is never touched.
    """
    from shardtool.ops.clean import clean as operation

    found = operation(uri, yes=yes, older_than=older_than)
    Tidied(found, yes).show(quiet=settings.quiet(flags["quiet"]), wants_json=flags["wants_json"])
    return 0
