"""Runs every benchmark and makes docs/benchmarks.md of what they measured.

python benchmarks/all.py [--full] [--only load save] [--peers-python PATH] [--engine-python PATH] [--dir DIR]

Small by default, to see that everything works; what is published is made with ``--full``, on a machine that does
nothing else: 5 runs, loads of 2 GiB, writes of 4 GiB. That takes about half an hour on two cores, 16 GB of disk and 12
GB of memory. ``--only`` measures some again and keeps the rest, on the same machine. ``device`` runs where torch sees a
GPU; what it measured on another machine is brought by ``report.py --device``, and kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import load
import measure
import report
import torch


@dataclass(frozen=True)
class Script:
    """A script and its arguments, small and full. ``tables``: it says by itself what it measured, as JSON.

    ``peers``: it runs others, which live in a Python of their own.
    """

    name: str
    small: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    tables: bool = False
    peers: bool = False


SCRIPTS = (
    Script(
        "load",
        ("--size", "64MiB", "--tensors", "1000", "--runs", "1", "--limit", "48MiB"),
        ("--size", "2GiB", "--tensors", "20000", "--runs", "5", "--back", "5"),
        tables=True,
        peers=True,
    ),
    Script("device", ("--size", "1GiB", "--tensors", "2000", "--runs", "1"), (), tables=True, peers=True),
    Script("save", ("--size", "64MiB", "--runs", "1"), ("--size", "4GiB", "--runs", "5", "--back", "3"), tables=True),
    Script("verify", ("--size", "64MiB", "--runs", "1"), ("--size", "4GiB", "--runs", "5", "--back", "1"), tables=True),
    Script(
        "network",
        ("--size", "64MiB", "--runs", "1"),
        ("--size", "2GiB", "--runs", "5", "--back", "5"),
        tables=True,
        peers=True,
    ),
    Script("memory", ("--size", "64MiB"), ("--size", "1GiB")),
    Script("help", ("--runs", "3"), ("--runs", "10")),
    Script("headers", ("--tensors", "2000", "--runs", "1"), ("--tensors", "20000", "--runs", "5")),
    Script("plan", ("--tensors", "1000", "--runs", "1"), ("--tensors", "11000", "--runs", "3")),
    Script("experts"),
)
LONG = ("experts",)
"""Scripts that have no small size; run where they are asked for, or with ``--full``."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes that are published")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[script.name for script in SCRIPTS])
    parser.add_argument("--peers-python", help="a Python that has the peers (see load.py)")
    parser.add_argument("--engine-python", help="a Python that has vLLM")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--data", type=Path, default=report.DATA)
    parser.add_argument("--out", type=Path, default=report.PAGE)
    args = parser.parse_args()
    data = begun(args)
    for script in SCRIPTS:
        if script.name not in args.only if args.only else script.name in LONG and not args.full:
            continue
        if script.name == "device" and not args.only and not torch.cuda.is_available():
            continue
        data["sections"][script.name] = measured(script, args)
        args.data.write_text(json.dumps(data, indent=1) + "\n")  # what was measured is kept if a later one fails
    args.out.write_text(report.render(data))


def begun(args: argparse.Namespace) -> dict[str, Any]:
    """The data so far: that of the same machine if some are measured again, else none."""
    here = measure.machine(args.dir)
    data: dict[str, Any] = json.loads(args.data.read_text()) if args.data.exists() else {"sections": {}}
    if args.only and data.get("machine", here) != here:
        raise SystemExit(f"{args.data} is of another machine or other versions; run without --only")
    if not args.only:  # what says which machine it is of is kept
        data = {"sections": {name: found for name, found in data["sections"].items() if "machine" in found}}
    versions = load.versions_of(args.peers_python or sys.executable)
    peers = {name: version for name, version in versions.items() if name not in (*here, "torch", "numpy", "xxhash")}
    today = datetime.datetime.now(datetime.UTC).date()
    return {**data, "date": str(today), "machine": here, "peers": data.get("peers", {}) | peers}


def measured(script: Script, args: argparse.Namespace) -> dict[str, Any]:
    """Run one script and take what it measured, or else what it printed."""
    words = [*(script.full if args.full else script.small)]
    shown = ["python", f"benchmarks/{script.name}.py", *words]
    for wanted, flag, python in (
        (script.peers, "--peers-python", args.peers_python),
        (script.name == "experts", "--engine-python", args.engine_python),
    ):
        if wanted and python:
            words += [flag, python]
            shown += [flag, "PATH"]
    if script.name != "help":
        words += ["--dir", str(args.dir)]
    print(f"== {' '.join(shown)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said.json")
        words += ["--json", str(said)] if script.tables else []
        command: list[str | Path] = [sys.executable, measure.HERE / f"{script.name}.py", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout, flush=True)
        section: dict[str, Any] = {"command": " ".join(shown), "full": args.full}
        if script.tables:
            found = json.loads(said.read_text())
            return section | {key: found[key] for key in ("contests", "date", "machine", "peers") if key in found}
        return section | {"text": done.stdout.strip()}


if __name__ == "__main__":
    main()
