"""How fast are the operations that write, beside ``cp`` and what people do with safetensors?

python benchmarks/save.py [--size 256MiB] [--tp 4] [--runs 3] [--back 0] [--json FILE]

The source is on the disk and in the page cache. shardtool brings every file to the disk before it is
named; for the others that is done after they have ended, and counted. Its operations compute two digests of every byte
on the way.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import contest
import contestants
import flags
import measure
import models
from contest import Contest, Contestant, Row, Sample

from shardtool.units import parse_size

COPY = "cp -r"


def main() -> None:
    """The command line."""
    parser = flags.parser(__doc__, limit="1GiB")
    flags.choosing(parser, "; cp is always there")
    parser.add_argument("--model", type=Path, help="a model that is there already")
    parser.add_argument("--tp", type=int, default=4)
    args = parser.parse_args()
    with measure.place(args.dir) as folder:
        model = args.model or folder / "hf"
        if args.model is None:
            models.write(model, models.of_size(parse_size(args.size, "--size")))
        found = compare(folder, model, args)
    print(f"{found.said()}\n\n{found.table()}\n")
    print("".join(f"{line}\n" for line in found.verdicts()))
    if args.json:
        args.json.write_text(json.dumps({"contests": [found.to_json()]}))


def compare(folder: Path, model: Path, args: argparse.Namespace) -> Contest:
    """Run everything in turns."""
    shards, out = folder / "shards", folder / "out"
    limit, tp = parse_size(args.limit, "--limit"), args.tp
    measure.run("save", model, shards, tp=tp)
    measure.sync(model, shards)  # or the first round would write them as well
    plain = copying(folder)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / measure.GIB

    def synced(wall: float, cpu: float, over: int = 0) -> Sample:
        began, used = time.monotonic(), time.process_time()
        measure.sync(out)
        return Sample(wall + time.monotonic() - began, cpu + time.process_time() - used, over)

    def copied() -> Sample:
        contestants.back(args.back)
        return synced(*measure.command(*plain, model, out))

    def scripted() -> Sample:
        found = measure.run("reshard", model, out, module="peers", back=args.back, tp=tp)
        return synced(found.wall, found.cpu, found.over)

    def ours(operation: str, source: Path, **options: Any) -> Sample:
        found = measure.run(operation, source, out, back=args.back, memory_limit=limit, **options)
        return Sample(found.wall, found.cpu, found.over)

    def entry(name: str, kind: str, source: Path, call: Callable[[], Sample]) -> Contestant:
        sources[name] = source
        return Row(name, kind), call

    sources: dict[str, Path] = {}
    every = [
        entry(COPY, "copy", model, copied),
        entry(f"safetensors, slice, save (tp {tp})", "save", model, scripted),
        entry(f"shardtool save (tp {tp})", "save", model, partial(ours, "save", model, tp=tp)),
        entry(f"shardtool reshard ({tp} to {2 * tp})", "reshard", shards, partial(ours, "reshard", shards, tp=2 * tp)),
        entry(
            f"shardtool reshard ({tp} to {2 * tp}), unverified",
            "reshard",
            shards,
            partial(ours, "reshard", shards, tp=2 * tp, verify=False),
        ),
        entry("shardtool merge", "merge", shards, partial(ours, "merge", shards)),
        entry("shardtool merge, unverified", "merge", shards, partial(ours, "merge", shards, verify=False)),
    ]
    chosen = [one for one in every if not args.only or args.only in one[0].name or one[0].name == COPY]

    def before(row: Row) -> None:
        shutil.rmtree(out, ignore_errors=True)
        measure.warm(sources[row.name])

    rows = contest.take_turns(chosen, args.runs, before)
    return Contest("writing", size, args.runs, args.back, limit, rows, COPY, limited=True)


def copying(folder: Path) -> list[str]:
    """The command that copies bytes, where the file system could share them as well."""
    probe, copied = folder / "probe", folder / "probe-copied"
    probe.touch()
    words = ["cp", "-r", "--reflink=never"]
    known = subprocess.run([*words, probe, copied], stderr=subprocess.DEVNULL, check=False).returncode == 0
    probe.unlink()
    copied.unlink(missing_ok=True)
    return words if known else words[:2]


if __name__ == "__main__":
    main()
