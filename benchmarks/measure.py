"""What the benchmarks share: operations in processes of their own, memory that the host backs, and tables.

Run as a script this module is the child: ``python benchmarks/measure.py '{"operation": "save", ...}'``.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import contestants
import numpy as np

HERE = Path(__file__).parent
SETTINGS = ("RUNAI_STREAMER_", "SHARDTOOL_", "FASTSAFETENSORS_", "MALLOC_", "OMP_")
"""How the names of variables start by which a caller could set how a contestant reads."""
GIB = 1 << 30
MIB = 1 << 20


class Failed(SystemExit):
    """A child did not do what it was started for; the text is its stderr."""


@dataclass(frozen=True)
class Run:
    """One run of a child. Seconds and bytes; ``over``: peak of resident memory less that right after the imports."""

    wall: float
    cpu: float
    over: int
    value: Any
    torch: bool


def environ(**variables: str) -> dict[str, str]:
    """The environment of a child: the caller's, less what would set how it reads, and with these variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)} | variables


def path(*places: Path) -> str:
    """PYTHONPATH of a child of this Python: these places, and the caller's behind them."""
    return os.pathsep.join([*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(call: str, *args: Any, module: str = "", back: float = 0, **kwargs: Any) -> Run:
    """An operation of shardtool, or a function of a ``module`` beside this one, in a process of its own.

    The clocks start when everything that it needs is imported, and ``back`` GiB of memory are present.
    """
    job = {"operation": call, "module": module, "args": [str(a) for a in args], "kwargs": kwargs, "back": back}
    variables = environ(PYTHONPATH=path(HERE.parent, HERE))
    child = subprocess.run(
        [sys.executable, HERE / "measure.py", json.dumps(job)],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise Failed(f"{call} failed:\n{child.stderr}")
    return Run(**json.loads(child.stdout.splitlines()[-1]))


def command(*words: Any) -> tuple[float, float]:
    """Wall and CPU seconds of a command, its start included."""
    began = time.monotonic()
    child = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL, env=environ())
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise Failed(f"{words} ended with {child.returncode}")
    return wall, usage.ru_utime + usage.ru_stime


def files_of(*places: Path) -> list[Path]:
    """The files of folders, and files that are named themselves."""
    found = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return [path for path in found if path.is_file()]


def warm(*places: Path) -> None:
    """Bring files into the page cache."""
    block = memoryview(bytearray(8 * MIB))
    for path in files_of(*places):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def cold(*places: Path) -> None:
    """Drop files from the page cache, and make sure that they are gone."""
    every = files_of(*places)
    for path in every:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)  # what is not on the disk yet would stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if cached(every) > 0.01 and os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    if (share := cached(every)) > 0.01:
        raise SystemExit(f"{share:.0%} of {every[0].parent} stay in the page cache: run this as root or elsewhere")


def cached(files: Sequence[Path]) -> float:
    """The share of some files' pages that is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = total = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            at = np.frombuffer(mapped, np.uint8)
            if libc.mincore(ctypes.c_void_p(at.ctypes.data), ctypes.c_size_t(size), pages):
                raise OSError(ctypes.get_errno(), f"mincore {path}")
            del at
            here += int((np.frombuffer(memoryview(pages), np.uint8) & 1).sum())
            total += len(pages)
    return here / max(1, total)


def sync(*places: Path) -> None:
    """Bring files to the disk."""
    for path in files_of(*places):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def machine(place: Path) -> dict[str, str]:
    """What was measured on: the machine, the file system of a folder, and the versions of what we use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    with open("/proc/self/mounts", encoding="utf-8") as lines:
        mounts = [line.split()[1:3] for line in lines]
    at = str(place.resolve())
    over = [(point, kind) for point, kind in mounts if at == point or at.startswith(point.rstrip("/") + "/")]
    return {
        "processor": f"{model or platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{memory / GIB:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "file system": max(over, key=lambda one: len(one[0]))[1],
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "safetensors", "numpy", "blake3", "xxhash")},
    }


@contextmanager
def place(keep: str | None) -> Iterator[Path]:
    """A folder to work in, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="shardtool-benchmark-", dir=keep) as folder:
        yield Path(folder)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], f"|{'|'.join('---' for _ in heads)}|", *lines[1:]])


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
    elif operation == "stream":
        call = contestants.ours().stream
    else:
        import blake3  # noqa: F401
        import numpy  # noqa: F401
        import xxhash  # noqa: F401

        import shardtool.stores.local.store

        call = getattr(shardtool, operation)
    idle = threading.Thread(target=int)
    idle.start()
    idle.join()
    contestants.back(job["back"])
    before, wall, cpu = peak_memory(), time.monotonic(), time.process_time()
    found = call(*args, **kwargs)
    if operation == "stream":
        found = sum(tensor.nbytes for _, tensor in found)
    said = {
        "wall": time.monotonic() - wall,
        "cpu": time.process_time() - cpu,
        "over": peak_memory() - before,
        "torch": "torch" in sys.modules,
        "value": found if isinstance(found, int | float | dict) else getattr(found, "ok", None),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    _child(sys.argv[1])
