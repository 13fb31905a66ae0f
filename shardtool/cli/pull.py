"""The command ``pull``: its flags, and what it brought, file by file or as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from shardtool import display, settings
from shardtool.cli import options
from shardtool.cli.program import main
from shardtool.display import counted, show_seconds
from shardtool.units import show_size

if TYPE_CHECKING:
    from shardtool.cli.reports import Memory
    from shardtool.ops.pull import Pulled


@dataclass(frozen=True, slots=True)
class Brought:
    """What ``pull`` brought."""

    found: Pulled
    seconds: float
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        """Every file."""
        found = self.found
        return {
            "command": "pull",
            "uri": found.uri,
            "folder": found.folder,
            "files": [asdict(file) for file in found.files],
            "bytes": sum(file.size for file in found.brought),
            "waited": found.waited,
            "seconds": self.seconds,
            **self.memory.to_json(),
        }

    def show(self, *, quiet: bool, wants_json: bool) -> None:
        """A line for each file that was brought, and one for all."""
        if wants_json:
            display.as_json(self.to_json())
        elif not quiet:
            display.table(("file", " size"), [(file.key, show_size(file.size)) for file in self.found.brought])
            display.out(*self._result())

    def _result(self) -> Iterable[str]:
        found = self.found
        brought = found.brought
        size = show_size(sum(file.size for file in brought))
        there = len(found.files) - len(brought)
        parts = [f"{counted(len(brought), 'file')} brought ({size})"]
        parts += [f"{there} there already"] if there else []
        parts += ["waited for another process"] if found.waited else []
        yield f"{found.folder}: {', '.join(parts)}, from {found.uri} in {show_seconds(self.seconds)}"


@main.command(
    short_help="Bring everything but the weights into a folder.",
    epilog="Example: shardtool pull ./llama ./llama-config --ignore '*.md'",
)
@click.argument("uri", callback=options.source)
@click.argument("folder", metavar="DIR")
@click.option(
    "--allow",
    multiple=True,
    metavar="GLOB",
    help="Bring what this names, weights too, in place of everything but weights; may be repeated.",
)
@click.option("--ignore", multiple=True, metavar="GLOB", help="Leave out what this names; may be repeated.")
@click.option("--manifest/--no-manifest", default=True, help="Bring shardtool.json too.  [default: manifest]")
@options.resources()
@options.speech
def pull(uri: str, folder: str, **flags: Any) -> int:
    """Bring a checkpoint's config, tokenizer, templates and remote code into a folder, and leave its weights.

    What was brought before and has not changed stays as it is. Processes of one node may ask at once: one of them
    brings the files, and the others wait for it.
    """
    from shardtool.cli.reports import Memory
    from shardtool.ops.pull import pull as operation

    memory = Memory()
    silent, wants_json = settings.quiet(flags["quiet"]), flags["wants_json"]
    began = time.monotonic()
    found = operation(
        uri,
        folder,
        allow=flags["allow"] or None,
        ignore=flags["ignore"] or None,
        manifest=flags["manifest"],
        concurrency=settings.concurrency(flags["concurrency"]),
        memory_limit=settings.memory_limit(flags["memory_limit"]),
    )
    Brought(found, time.monotonic() - began, memory).show(quiet=silent, wants_json=wants_json)
    return 0
