"""Several processes make one checkpoint: each writes some ranks, and whoever finishes last completes it.

::

    python examples/several_workers.py ./llama ./llama-tp4 --tp 4 --workers 2

The workers share nothing but the output, so they may as well be machines that see the same folder or bucket; there the
command is ``shardtool save ./llama --tp 4 -o OUTPUT --ranks 0-1`` on the first and ``--ranks 2-3`` on the second. A
worker that was killed is simply started again: what is finished is not written twice.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import shardtool


def work(model: str, output: str, tp: int, ranks: list[int]) -> str:
    """Write some ranks; runs in a process of its own."""
    done = shardtool.save(model, output, tp=tp, ranks=ranks, memory_limit="64MiB")
    state = "the checkpoint is complete" if done.complete else "others are still at work"
    return f"ranks {ranks}: {done.written:,} bytes written; {state}"


def main() -> None:
    """Deal the ranks to the workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        dealt = [list(range(worker, args.tp, args.workers)) for worker in range(args.workers)]
        for line in pool.map(work, *zip(*((args.model, args.output, args.tp, ranks) for ranks in dealt), strict=True)):
            print(line)
    print("verified" if shardtool.verify(args.output).ok else "damaged")


if __name__ == "__main__":
    main()
