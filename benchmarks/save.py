"""How fast are the operations, beside ``cp`` and what people do with safetensors? GiB/s, and CPU seconds for each GiB.

python benchmarks/save.py [--size 512MiB] [--model DIR] [--tp 4] [--runs 3] [--back 0]

Contestants take turns, so that what disturbs the machine disturbs all of them. Files are in the page cache. shardtool
brings every file to the disk before it is named; for the others that is measured apart. On a virtual machine whose host
takes free memory back, ``--back N`` makes N GiB present before each run: otherwise the host's faults are measured.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import measure
import models

from shardtool.units import parse_size

Result = tuple[float, float, float]  # wall, wall of bringing files to the disk, CPU


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512MiB")
    parser.add_argument("--model", type=Path, help="a model that is there already")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--back", type=float, default=0)
    parser.add_argument("--limit", default="1GiB")
    parser.add_argument("--dir", help="where to work; needs four times the model's size")
    args = parser.parse_args()
    with measure.place(args.dir) as folder:
        model = args.model or folder / "hf"
        if args.model is None:
            models.write(model, models.of_size(parse_size(args.size, "--size")))
        compare(folder, model, args)


def compare(folder: Path, model: Path, args: argparse.Namespace) -> None:
    """Run everything in turns and print the table."""
    shards, out = folder / "shards", folder / "out"
    measure.run("save", model, shards, tp=args.tp)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / measure.GIB
    limit = {"memory_limit": args.limit}

    def ours(operation: str, source: Path, writes: bool, **options: object) -> Result:
        found = measure.run(operation, source, *([out] if writes else []), **limit, **options)
        return found.wall, 0.0, found.cpu

    def peer(name: str, *paths: Path, **options: object) -> Result:
        found = measure.run(name, *paths, module="peers", **options)
        return found.wall, synced(), found.cpu

    def copied() -> Result:
        wall, cpu = measure.command("cp", "-r", model, out)
        return wall, synced(), cpu

    def synced() -> float:
        began = time.monotonic()
        if out.exists():
            measure.sync(out)
        return time.monotonic() - began

    contestants: dict[str, Callable[[], Result]] = {
        "cp": copied,
        f"safetensors, slice, save (tp {args.tp})": lambda: peer("reshard", model, out, tp=args.tp),
        f"shardtool save (tp {args.tp})": lambda: ours("save", model, True, tp=args.tp),
        f"shardtool reshard ({args.tp} to {2 * args.tp}), unverified": lambda: ours(
            "reshard", shards, True, tp=2 * args.tp, verify=False
        ),
        f"shardtool reshard ({args.tp} to {2 * args.tp})": lambda: ours("reshard", shards, True, tp=2 * args.tp),
        "shardtool merge, unverified": lambda: ours("merge", shards, True, verify=False),
        "shardtool merge": lambda: ours("merge", shards, True),
        "shardtool verify": lambda: ours("verify", shards, False),
        "shardtool verify --against": lambda: ours("verify", shards, False, against=str(model)),
        "safetensors load_file, touched": lambda: peer("load", model),
        "safetensors load_file, cloned": lambda: peer("load_owned", model),
        "shardtool stream, verified": lambda: ours("measure", shards, False),
        "shardtool stream, unverified": lambda: ours("measure", shards, False, verify=False),
    }
    found: dict[str, list[Result]] = {name: [] for name in contestants}
    for _ in range(args.runs):
        for name, contestant in contestants.items():
            shutil.rmtree(out, ignore_errors=True)
            for place in (model, shards):
                measure.warm(place)
            measure.back(args.back)
            found[name].append(contestant())
    rows = []
    base = measure.middle([cpu for _, _, cpu in found["cp"]])
    for name, results in found.items():
        wall = measure.middle([wall + disk for wall, disk, _ in results])
        cpu = [cpu for _, _, cpu in results]
        rows.append(
            (
                name,
                f"{measure.middle([wall for wall, _, _ in results]):.2f}",
                f"{measure.middle([disk for _, disk, _ in results]):.2f}",
                f"{size / wall:.2f}",
                f"{measure.middle(cpu) / size:.3f}",
                f"{min(cpu) / size:.3f}",
                f"{measure.middle(cpu) / base:.2f}",
            )
        )
    print(f"{size:.2f} GiB, {args.runs} runs in turns, page cache warm, {args.back} GiB backed before each\n")
    heads = ("contestant", "wall s", "+ fsync s", "GiB/s with fsync", "CPU-s/GiB, median", "least", "CPU, cp = 1")
    measure.table(heads, rows)


if __name__ == "__main__":
    main()
