"""How long does ``shardtool --help`` take? CPU seconds of the whole process, which should be below 0.15.

python benchmarks/help.py [--runs 10]
"""

from __future__ import annotations

import argparse
import sys

import measure

MOST = 0.15


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    rows = []
    for name, words in {
        "python -c pass": ("-c", "pass"),
        "shardtool --help": ("-m", "shardtool", "--help"),
        "shardtool save --help": ("-m", "shardtool", "save", "--help"),
        "import shardtool": ("-c", "import shardtool"),
    }.items():
        found = [measure.command(sys.executable, *words) for _ in range(args.runs)]
        cpu = [c for _, c in found]
        rows.append(
            (name, f"{measure.middle(cpu):.3f}", f"{min(cpu):.3f}", f"{measure.middle([w for w, _ in found]):.3f}")
        )
    print(measure.table(("command", "CPU s, median", "CPU s, least", "wall s, median"), rows))
    print(f"\nThe median of --help should be below {MOST} CPU s.")


if __name__ == "__main__":
    main()
