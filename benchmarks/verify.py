"""How fast does ``shardtool verify`` read and hash, beside a bare loop that does the same with all cores?

python benchmarks/verify.py [--size 256MiB] [--runs 3] [--back 0] [--json FILE]

Four files and one file, from the page cache and from the disk, from whose files the page cache is dropped before each
run. The bare loop (bare.py) reads blocks of 8 MiB into reused memory and computes a blake3 and an xxh3_128 of each;
from the disk it reads past the page cache, also without hashing, which is the disk's own rate. From the disk, verify is
measured against the slower of that rate and the rate at which the loop hashes what is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import contest
import flags
import measure
import models
from contest import Contest, Contestant, Row, Sample

from shardtool.units import parse_size

LOOP = "bare loop, hashed"
DISK = "bare loop, not hashed"
READERS = 8
"""Threads that keep a disk busy."""


def main() -> None:
    """The command line."""
    parser = flags.parser(__doc__, limit="256MiB")
    args = parser.parse_args()
    with measure.place(args.dir) as folder:
        many, one = prepare(folder, parse_size(args.size, "--size"))
        warm = compare("warm", many, one, args, [])
        found = [warm, compare("cold", many, one, args, warm.rows)]
    if args.json:
        args.json.write_text(json.dumps({"contests": [each.to_json() for each in found]}))


def prepare(folder: Path, size: int) -> tuple[Path, Path]:
    """The same model in four files, for four ranks, and in one."""
    many, one = folder / "tp4", folder / "tp1"
    total = models.write(folder / "hf", models.of_size(size))
    measure.run("save", folder / "hf", many, tp=4, max_part_size=2 * total)
    measure.run("save", folder / "hf", one, tp=1, max_part_size=2 * total)
    shutil.rmtree(folder / "hf")
    return many, one


def compare(kind: str, many: Path, one: Path, args: argparse.Namespace, warm: list[Row]) -> Contest:
    """Run everyone in turns and print the table. ``warm``: what came of it from the page cache, for the disk's bar."""
    limit = parse_size(args.limit, "--limit")
    size = sum(path.stat().st_size for path in many.glob("*.safetensors"))

    def bare(**options: Any) -> Sample:
        found = measure.run("read", many, module="bare", back=args.back, **options)
        return Sample(found.wall, found.cpu, found.over)

    def ours(folder: Path) -> Sample:
        found = measure.run("verify", folder, back=args.back, memory_limit=limit)
        if not found.value:
            raise SystemExit(f"verify finds {folder} damaged")
        return Sample(found.wall, found.cpu, found.over)

    cores = os.cpu_count() or 1
    loops: list[Contestant] = [(Row(LOOP, "verify"), partial(bare, threads=cores))]
    if kind == "cold":
        direct = {"direct": True, "threads": READERS}
        loops = [
            (Row(DISK, "read"), partial(bare, hashed=False, **direct)),
            (Row(LOOP, "verify"), partial(bare, **direct)),
        ]
    contestants: list[Contestant] = [
        *loops,
        (Row("shardtool verify, 4 files", "verify"), partial(ours, many)),
        (Row("shardtool verify, 1 file", "verify"), partial(ours, one)),
    ]

    def before(row: Row) -> None:
        place = one if row.name.endswith("1 file") else many
        (measure.cold if kind == "cold" else measure.warm)(place)

    rows = contest.take_turns(contestants, args.runs, before)
    found = Contest(f"verify, {kind}", size / measure.GIB, args.runs, args.back, limit, rows, LOOP, limited=True)
    found.bar, found.bar_name = bar(rows, warm)
    print(f"{found.question}: {found.said()}\n\n{found.table()}\n", flush=True)
    print("".join(f"{line}\n" for line in found.verdicts()), flush=True)
    return found


def bar(rows: list[Row], warm: list[Row]) -> tuple[float, str]:
    """What verify can hardly be faster than: the hash rate, from the disk the slower of that and the disk's own."""
    hashed = next(row.wall for row in warm or rows if row.name == LOOP)
    disk = next((row.wall for row in rows if row.name == DISK), 0.0)
    if disk > hashed:
        return disk, "the disk alone"
    return hashed, "hashing alone (the bare loop from the page cache)"


if __name__ == "__main__":
    main()
