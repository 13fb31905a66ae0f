"""How long does ``shardtool inspect`` take for a checkpoint of 20,000 tensors? It should be below a second.

python benchmarks/headers.py [--tensors 20000] [--runs 5]
"""

from __future__ import annotations

import argparse

import measure
import models


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", help="where to work")
    args = parser.parse_args()
    with measure.place(args.dir) as folder:
        config = models.of_tensors(args.tensors)
        models.write(folder / "hf", config, sparse=True, most=8 << 30)
        found = [measure.run("inspect", folder / "hf") for _ in range(args.runs)]
        row = (
            len(models.shapes(config)),
            f"{measure.middle([run.wall for run in found]):.2f}",
            f"{measure.middle([run.cpu for run in found]):.2f}",
            f"{max(run.over for run in found) / measure.MIB:.0f}",
        )
    print(measure.table(("tensors", "wall s, median", "CPU s, median", "MiB over the imports"), [row]))


if __name__ == "__main__":
    main()
