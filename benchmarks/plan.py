"""What does a plan cost? Seconds and memory of ``save --dry-run`` for 11,000 source tensors at tp 8.

python benchmarks/plan.py [--tensors 11000] [--tp 8] [--model DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measure
import models


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=11_000)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--model", type=Path, help="a model that is there already")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", help="where to work")
    args = parser.parse_args()
    with measure.place(args.dir) as folder:
        model = args.model or folder / "hf"
        if args.model is None:
            models.write(model, models.of_tensors(args.tensors), sparse=True, most=8 << 30)
        rows = []
        for limit in ("256MiB", "4GiB"):
            options = {"tp": args.tp, "memory_limit": limit, "dry_run": True}
            found = [measure.run("save", model, folder / "out", **options) for _ in range(args.runs)]
            rows.append(
                (
                    limit,
                    f"{measure.middle([run.wall for run in found]):.2f}",
                    f"{measure.middle([run.cpu for run in found]):.2f}",
                    f"{max(run.over for run in found) / measure.MIB:.0f}",
                )
            )
    print(measure.table(("--memory-limit", "wall s, median", "CPU s, median", "MiB over the imports"), rows))


if __name__ == "__main__":
    main()
