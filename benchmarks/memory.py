"""How much memory do operations take over their limit? Peak of resident memory less that right after the imports.

python benchmarks/memory.py [--size 256MiB] [--model DIR]

Limits are 128MiB for ``save`` and 64MiB for the rest, then 24MiB for each, which is below the largest tensor of what is
published, then 0, which is the least that does. ``stream`` is limited in what it reads ahead: the tensor at hand and
one that is larger than the limit come on top. The last column should be 16 MiB at most.
"""

from __future__ import annotations

import argparse
import shutil
from math import prod
from pathlib import Path
from typing import Any

import measure
import models

from shardtool.ops.inspect import inspect
from shardtool.units import parse_size

LOW = "24MiB"
JOBS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("save", "hf", {"tp": 8}),
    ("reshard", "tp8", {"tp": 4}),
    ("merge", "tp8", {}),
    ("verify", "tp8", {}),
    ("verify --against", "tp8", {"against": "hf"}),
    ("stream, the model", "hf", {}),
    ("stream, a rank", "tp8", {"rank": 0}),
)


def largest(folder: Path) -> int:
    """Bytes of a checkpoint's largest tensor; all of them are bfloat16."""
    return max(2 * prod(tensor.shape) for tensor in inspect(folder, tensors="*").listed)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256MiB")
    parser.add_argument("--model", type=Path, help="a model that is there already")
    parser.add_argument("--dir", help="where to work; needs three times the model's size")
    args = parser.parse_args()
    with measure.place(args.dir) as folder:
        places = {"hf": args.model or folder / "hf", "tp8": folder / "tp8"}
        if args.model is None:
            size = parse_size(args.size, "--size")
            models.write(places["hf"], models.of_size(size))
        measure.run("save", places["hf"], places["tp8"], tp=8)
        most = largest(places["hf"])
        above = "less than" if most > parse_size(LOW, "") else "not less than"
        print(f"The largest tensor has {most / measure.MIB:.0f} MiB; the limit of {LOW} is {above} that.\n")
        rows = []
        for name, source, given in JOBS:
            operation = name.split()[0].rstrip(",")
            options = {k: str(places[v]) if k == "against" else v for k, v in given.items()}
            limits = ("128MiB" if operation == "save" else "64MiB", LOW, "0")
            rows += [measured(folder, operation, name, places[source], limit, options) for limit in limits]
        print(
            measure.table(
                ("operation", "--memory-limit", "over the imports, MiB", "over the limit, MiB", "torch", "wall s"), rows
            )
        )


def measured(
    folder: Path, operation: str, name: str, source: Path, limit: str, options: dict[str, Any]
) -> tuple[Any, ...]:
    """A row of the table."""
    out = [folder / "out"] if operation in ("save", "reshard", "merge") else []
    allowed = parse_size(limit, "")
    if operation == "stream":
        own = largest(source)
        allowed += own + (own if own > allowed else 0)
    elif allowed == 0 and out:
        allowed = int(measure.run("least", source, *out, module="memory", operation=operation, **options).value)
    found = measure.run(operation, source, *out, memory_limit=limit, **options)
    shutil.rmtree(folder / "out", ignore_errors=True)
    over = f"{found.over / measure.MIB:.1f}"
    return (
        name,
        limit,
        over,
        f"{(found.over - allowed) / measure.MIB:.1f}",
        "yes" if found.torch else "no",
        f"{found.wall:.1f}",
    )


def least(source: str, out: str, *, operation: str, **options: Any) -> int:
    """The least memory that a dry run names."""
    import shardtool

    return int(getattr(shardtool, operation)(source, out, dry_run=True, **options).least_memory)


if __name__ == "__main__":
    main()
