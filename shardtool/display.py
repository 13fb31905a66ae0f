"""How results reach people and machines.

Results go to stdout: tables where it is a terminal, aligned lines where it is not, one JSON object with ``--json``.
Notes, errors and the progress bar go to stderr. Names come from files that nobody has checked, so that whatever a
terminal could take for a command is written as an escape.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any, TextIO

PIPE_CLOSED = 141
"""The exit code when whoever read stdout has gone: what a shell shows for a process that SIGPIPE ended."""
MOST_ROWS = 1000
"""Rows that are drawn as a table; more are written as plain lines, which takes no time."""

Tell = Callable[[int, int], None]


def printable(text: str) -> str:
    """The text with control characters, and what no encoding can write, as backslash escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def out(*lines: str) -> None:
    """Lines to stdout. If nobody reads it any more, the process ends in silence."""
    _write(sys.stdout, "".join(printable(line) + "\n" for line in lines))


def note(text: str) -> None:
    """Something worth knowing, to stderr."""
    _say(f"note: {text}")


def error(text: str) -> None:
    """What went wrong, to stderr, in one line."""
    _say(f"shardtool: error: {text}")


def interrupted(text: str) -> None:
    """That a signal has ended the command, to stderr."""
    _say(f"shardtool: {text}")


def as_json(value: Mapping[str, Any]) -> None:
    """One JSON object to stdout, in one line."""
    out(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    """The value as JSON can say it: numbers that are none become texts."""
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case Mapping():
            return {str(key): _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
    return value


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal, aligned columns elsewhere.

    A column whose heading starts with a space is set to the right.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if terminal(sys.stdout) and len(rows) <= MOST_ROWS:
        _write(sys.stdout, _drawn(headings, cells))
        return
    widths = [max((len(row[i]) for row in cells), default=0) for i in range(len(headings))]
    lines = []
    for row in cells:
        placed = [
            cell.rjust(width) if heading.startswith(" ") else cell.ljust(width)
            for cell, width, heading in zip(row, widths, headings, strict=True)
        ]
        lines.append("  ".join(placed).rstrip())
    _write(sys.stdout, "".join(line + "\n" for line in lines))


def _drawn(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        right = heading.startswith(" ")
        drawn.add_column(heading.strip(), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    page = io.StringIO()
    Console(file=page, force_terminal=True, width=_columns(sys.stdout) or 80).print(drawn)
    return page.getvalue()


@contextlib.contextmanager
def progress(label: str, *, shown: bool, unit: str = "B") -> Iterator[Tell | None]:
    """A bar with bytes (or another unit), speed and time left on stderr; None where it is not a terminal.

    Many threads may tell.
    """
    if not shown or not terminal(sys.stderr):
        yield None
        return
    from tqdm import tqdm

    lock = Lock()
    known = _columns(sys.stderr) > 0
    size = {"dynamic_ncols": True} if known else {"ncols": 80, "nrows": 24}
    with tqdm(desc=label, unit=unit, unit_scale=unit == "B", leave=False, file=sys.stderr, **size) as bar:

        def tell(done: int, total: int) -> None:
            with lock:
                # Threads may tell out of order, by a little; a fall by more than half is another pass over the bytes.
                if total != bar.total or bar.n - done > total / 2:
                    bar.reset(total)
                if done > bar.n:
                    bar.update(done - bar.n)

        yield tell


def _columns(stream: TextIO) -> int:
    """The width of a terminal; 0 if it does not tell, as some that programs make do not."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at the stream."""
    return stream is not None and not stream.closed and stream.isatty()


def speed(nbytes: int, seconds: float) -> float:
    """GB/s, in units of 10**9 bytes; 0 where no time has passed."""
    return nbytes / seconds / 1e9 if seconds > 0 else 0.0


def show_speed(nbytes: int, seconds: float) -> str:
    """``1.23 GB/s``."""
    return f"{speed(nbytes, seconds):.2f} GB/s"


def show_seconds(seconds: float) -> str:
    """``0.12 s``, ``12.3 s`` or ``3 min 20 s``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def counted(n: int, what: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _say(text: str) -> None:
    """One line to stderr, which may be closed: there is nobody to tell that."""
    with contextlib.suppress(OSError, SystemExit):
        _write(sys.stderr, printable(text) + "\n")


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # the process was started without it
        return
    data = memoryview(text.encode(stream.encoding or "utf-8", "backslashreplace"))
    try:
        stream.flush()
        while data:  # an unbuffered stream may take less than it is given
            data = data[stream.buffer.write(data) or 0 :]
        stream.flush()
    except OSError as failed:
        # What is left in its buffer would fail again when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(failed, BrokenPipeError):
            raise SystemExit(PIPE_CLOSED) from None
        raise
