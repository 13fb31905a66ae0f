"""Shard a Hugging Face checkpoint and compare every tensor of every rank with it.

::

    python examples/save_and_verify.py ./llama ./llama-tp4 --tp 4

Prints the plan before it acts, and each difference that it finds. Ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys

import shardtool


def main() -> int:
    """Plan, save, verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--tp", type=int, default=4)
    args = parser.parse_args()

    plan = shardtool.save(args.model, args.output, tp=args.tp, dry_run=True)
    print(
        f"{plan.what}: {len(plan.files)} files, {plan.bytes_to_write:,} bytes, {plan.least_memory:,} of memory would do"
    )
    for note in plan.notes:
        print(f"note: {note}")

    shardtool.save(args.model, args.output, tp=args.tp, memory_limit="256MiB")

    report = shardtool.verify(args.output, against=args.model)
    for file in report.files:
        for trouble in file.why:
            print(f"{file.key}: {trouble}")
    for found in report.differences:
        print(f"{found.name} of rank {found.rank} differs: {found.why or found.difference}")
    print(f"{report.tensors} tensors compared: {'all equal' if report.ok else 'not equal'}")
    return report.exit_code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except shardtool.ShardtoolError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
