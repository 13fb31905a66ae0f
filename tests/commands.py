"""Command lines for tests: run in this process or in one of their own, and how they ended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from shardtool.cli import main
from tests import builders

ROOT = Path(__file__).parents[1]
RANK_1 = "model-rank-1-part-0.safetensors"


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one line of stdout."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


def here(*words: str | int | Path) -> Ended:
    """Run a command line in this process."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Ended(done.exit_code, done.stdout, done.stderr)


def command(*words: str | Path) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "shardtool", *map(str, words)]


def environment() -> dict[str, str]:
    """This process's, with the package on the path."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def apart(*words: str | Path) -> Ended:
    """Run a command line in a process of its own, its output in pipes."""
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False, env=environment())
    return Ended(done.returncode, done.stdout, done.stderr)


def damage(path: Path) -> None:
    """Change the last tensor of a file."""
    data = path.read_bytes()
    path.write_bytes(builders.flipped(data, len(data) - 1, 7))


def documented(name: str, inner: str = "") -> set[str]:
    """The keys that docs/cli.md lists for the JSON of a command, or for what is in one of them."""
    rows = re.findall(r"^\| (`.+?) \| (`command`.+) \|$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    (keys,) = (keys for names, keys in rows if f"`{name}`" in names)
    if inner:
        (keys,) = re.findall(rf"`{inner}` \((.*?)\)", keys)
    return set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", keys)))
