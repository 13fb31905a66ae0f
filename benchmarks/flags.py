"""The flags of the benchmarks that compare shardtool with others: how much, how often, under what limit, and where."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parser(
    said: str | None, *, limit: str, limited: str = "of memory", size: str = "of the model"
) -> argparse.ArgumentParser:
    """A parser that says what a script's docstring says, and has the flags of each such script.

    ``limit``: that of memory, by default. ``limited`` and ``size`` say what it limits, and whose size is given.
    """
    made = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", default="256MiB", help=size)
    made.add_argument("--runs", type=int, default=3)
    made.add_argument("--limit", default=limit, help=limited)
    made.add_argument("--back", type=float, default=0, help="GiB of memory to make present before each clock starts")
    made.add_argument("--dir", help="where to work; needs three times the size")
    made.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there, too")
    return made


def choosing(made: argparse.ArgumentParser, more: str = "") -> None:
    """Add what chooses some of the contestants. ``more``: what else is to be known of it."""
    made.add_argument("--only", metavar="TEXT", help="contestants whose name has this" + more)


def asking(made: argparse.ArgumentParser, questions: Sequence[str]) -> None:
    """Add a script's questions, of which all are asked by default, and the Python of the peers that answer them."""
    made.add_argument("questions", nargs="*", choices=[*questions, []], help="all by default")
    made.add_argument("--peers-python", default=sys.executable, help="a Python that has the peers")


def asked(args: argparse.Namespace, questions: Sequence[str]) -> list[str]:
    """The questions that were asked, in the script's order."""
    return [question for question in questions if question in args.questions or not args.questions]
