"""What the benchmarks share: operations in processes of their own, memory that the host backs, and tables.

Run as a script this module is the child: ``python benchmarks/measure.py '{"operation": "save", ...}'``.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """One run of a child. Seconds and bytes; ``over``: peak of resident memory less that right after the imports."""

    wall: float
    cpu: float
    over: int
    value: Any
    torch: bool


def run(call: str, *args: Any, module: str = "", **kwargs: Any) -> Run:
    """An operation of shardtool, or a function of a ``module`` beside this one, in a process of its own.

    The clocks start when everything that it needs is imported.
    """
    job = {"operation": call, "module": module, "args": [str(a) for a in args], "kwargs": kwargs}
    environ = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    child = subprocess.run(
        [sys.executable, HERE / "measure.py", json.dumps(job)], env=environ, capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise SystemExit(f"{call} failed:\n{child.stderr}")
    return Run(**json.loads(child.stdout.splitlines()[-1]))


def command(*words: Any) -> tuple[float, float]:
    """Wall and CPU seconds of a command, its start included."""
    began = time.monotonic()
    child = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{words} ended with {child.returncode}")
    return wall, usage.ru_utime + usage.ru_stime


def back(gib: float) -> None:
    """Touch and free memory in a child.

    A virtual machine may have given free pages back to its host, and getting them again would be what is measured.
    """
    if gib and not os.fork():
        memory = mmap.mmap(-1, int(gib * GIB), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[::4096] = 1
        os._exit(0)
    if gib:
        os.wait()


def warm(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    block = memoryview(bytearray(8 * MIB))
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def sync(folder: Path) -> None:
    """Bring a folder's files to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


@contextmanager
def place(keep: str | None) -> Iterator[Path]:
    """A folder to work in, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="shardtool-benchmark-", dir=keep) as folder:
        yield Path(folder)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table in Markdown."""
    print(f"| {' | '.join(heads)} |")
    print(f"|{'|'.join('---' for _ in heads)}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def middle(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def _child(text: str) -> None:
    from shardtool.budget import peak_memory

    job = json.loads(text)
    operation, args, kwargs = job["operation"], job["args"], job["kwargs"]
    call: Callable[..., Any]
    if job["module"]:
        call = getattr(importlib.import_module(job["module"]), operation)
    else:
        import blake3  # noqa: F401
        import numpy  # noqa: F401
        import xxhash  # noqa: F401

        within = {"stream": "load", "measure": "load"}.get(operation, operation)
        call = getattr(importlib.import_module(f"shardtool.ops.{within}"), operation)
        if within == "load":
            import shardtool.sinks.tensor  # noqa: F401
    idle = threading.Thread(target=int)
    idle.start()
    idle.join()
    before, wall, cpu = peak_memory(), time.monotonic(), time.process_time()
    found = call(*args, **kwargs)
    if operation in ("stream", "streamed"):
        found = sum(tensor.nbytes for _, tensor in found)
    said = {
        "wall": time.monotonic() - wall,
        "cpu": time.process_time() - cpu,
        "over": peak_memory() - before,
        "torch": "torch" in sys.modules,
        "value": found if isinstance(found, int | float | dict) else None,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    _child(sys.argv[1])
