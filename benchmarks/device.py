"""How fast are tensors brought to a GPU, beside every peer and beside what the machine can do?

python benchmarks/device.py [warm cold large many] [--device cuda] [--minutes 8] [--runs 5] [--size 16GiB]
                            [--peers-python PATH] [--json FILE]

warm   files in the page cache, all tensors kept on the GPU
cold   the same from the disk: the files are dropped from the page cache before each run
large  as warm, under a limit that is smaller than several tensors; only those that have a limit take part
many   one file of many small tensors, in the page cache

Every run is a process of its own, which has imported everything and has woken the GPU before the clock starts; those of
one round start together and wait for their turns. The clock ends when the GPU has done all its work. Tensors are proven
behind it, where they lie: their digests must be those of an independent reader, or there is no result.

The ceiling is the slower of two: blocks copied from pinned memory and nothing else, and the faster of two bare loops
(threads that read blocks into a pinned ring, from where they are copied). What they need is there before the clock
starts. --minutes is for everything: each question gets an equal part of what is left, at least one round and at most
--runs. Nothing is downloaded. Peers live in the same Python or in one of their own::

    python -m venv peers && peers/bin/pip install torch safetensors runai-model-streamer fastsafetensors \\
        instanttensor numpy xxhash

Without one of them, the rest is measured. Where torch sees no GPU, ``--device cpu`` runs the same code with a plain
ring and plain copies, which says whether it works and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import contest
import contestants
import flags
import load
import measure
import models
import numpy as np
import torch
from contest import Contest, Contestant, Row, Sample

from shardtool import header
from shardtool.dtypes import DType
from shardtool.units import parse_size

WARM, COLD, LARGE, MANY = QUESTIONS = ("warm", "cold", "large", "many")
KEPT, CEILING = "kept", "ceiling"
LOAD, STREAM = "shardtool_load", "shardtool_stream"
WANTED = 0.85
"""The share of the ceiling's rate that is wanted."""
COPIES, FEW, SEVERAL = "pinned copies alone", "bare loop, 8 threads", "bare loop, a thread for each core"
START, LONGEST = 150, 60
"""Seconds after which a child that is not ready, or a run, has failed."""
PARTS = 4


@dataclass(frozen=True)
class Way:
    """A way onto the device. ``needs``: the package of a peer; ``cuda``: it takes CUDA devices only.

    ``limited``: it has a memory limit; ``threads``: of a ceiling.
    """

    name: str
    call: str
    needs: str = ""
    verify: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    environ: tuple[tuple[str, str], ...] = ()
    cuda: bool = False
    limited: bool = False
    threads: int = 0

    @property
    def kind(self) -> str:
        """What it hands out."""
        return CEILING if self.threads else KEPT


def ways(readers: Iterable[int] = ()) -> list[Way]:
    """All of them. ``readers``: ours also with so many of them."""
    cores = len(os.sched_getaffinity(0))
    ready = (("order", "ready"),)
    return [
        Way(COPIES, "copies", threads=16),
        Way(FEW, "bare", threads=8),
        Way(SEVERAL, "bare", threads=min(32, cores)),
        Way("shardtool load, digests checked", LOAD, verify=True, limited=True),
        Way("shardtool load, unchecked", LOAD, limited=True),
        *(Way(f"shardtool load, unchecked, {n} readers", LOAD, options=(("concurrency", n),)) for n in readers),
        Way("shardtool stream, ready, digests checked", STREAM, verify=True, options=ready, limited=True),
        Way("shardtool stream, ready, unchecked", STREAM, options=ready, limited=True),
        Way("safetensors load_file", "safetensors_load", "safetensors"),
        Way("safetensors safe_open", "safetensors_open", "safetensors"),
        Way("Run:ai", "runai", "runai-model-streamer", limited=True),
        Way("Run:ai, buffered", "runai", "runai-model-streamer", environ=load.BUFFERED, limited=True),
        Way("fastsafetensors", "fastsafetensors", "fastsafetensors"),
        Way("fastsafetensors, GDS", "fastsafetensors", "fastsafetensors", options=(("direct", True),), cuda=True),
        Way("InstantTensor", "instanttensor", "instanttensor", cuda=True),
        Way("InstantTensor, buffered", "instanttensor", "instanttensor", options=(("backend", "BUFFERED"),), cuda=True),
    ]


def main() -> None:
    """The command line."""
    how_large = "of the checkpoint; 16GiB, or less where the disk, the memory or the GPU is small"
    parser = flags.parser(__doc__, limit="1GiB", size=how_large)
    parser.set_defaults(size=None, runs=5, back=2.0)
    flags.asking(parser, QUESTIONS)
    flags.choosing(parser, "; the ceilings take part in any case")
    parser.add_argument("--device", help="cuda where torch sees a GPU, else it has to be said: cpu")
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--cold-size", default="4GiB", help="of the one that is read from the disk, at most --size")
    parser.add_argument("--tensors", type=int, default=20000, help="of the file of many")
    parser.add_argument("--small-limit", default="64MiB", help="of memory, where tensors are larger than it")
    parser.add_argument("--readers", type=int, nargs="+", default=[], metavar="N", help="ours with so many, too")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    args.device = device_of(args.device)
    asked = flags.asked(args, QUESTIONS)
    with measure.place(args.dir) as folder:
        size = parse_size(args.size, "--size") if args.size else fitting(folder, args.device)
        found = Found(args, folder)
        if WARM in asked or LARGE in asked:
            data = prepare(folder / "large", of_large(size))
            found.compare([question for question in asked if question in (WARM, LARGE)], data, asked)
            shutil.rmtree(folder / "large")
        if COLD in asked:
            data = prepare(folder / "cold", of_large(min(size, parse_size(args.cold_size, "--cold-size"))))
            found.compare([COLD], data, asked)
            shutil.rmtree(folder / "cold")
        if MANY in asked:
            found.compare([MANY], prepare(folder / "many", models.of_many(args.tensors), parts=1), asked)


def device_of(asked: str | None) -> str:
    """The device, by its full name."""
    if asked is None and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --device cpu runs the same code without one")
    device = torch.device(asked or "cuda")
    if device.type == "cuda":
        return f"cuda:{device.index or 0}"
    if device.type != "cpu":
        raise SystemExit(f"--device {asked} is neither cuda nor cpu")
    return "cpu"


def fitting(folder: Path, device: str) -> int:
    """Bytes that are enough to tell a GPU's rate, or what this disk and this memory can hold three of."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = measure.GIB // 4
    if device != "cpu":  # three ceilings have as much of it, and one loader
        most = min(16 * measure.GIB, torch.cuda.get_device_properties(device).total_memory // 8)
    return min(most, shutil.disk_usage(folder).free // 3, memory // 4)


def of_large(size: int) -> dict[str, object]:
    """The config of a Llama with few and large tensors."""
    return models.of_size(size, hidden=8192) if size >= 6 * measure.GIB else models.of_size(size)


def prepare(folder: Path, config: dict[str, object], *, parts: int = PARTS) -> load.Data:
    """A checkpoint of one rank with its manifest, in ``parts`` files, on the disk."""
    began = time.monotonic()
    total = write(folder / "hf", config, parts)
    measure.run("save", folder / "hf", folder / "tp1", tp=1, max_part_size=total // parts + total // 20 + measure.MIB)
    shutil.rmtree(folder / "hf")
    files = tuple(sorted((folder / "tp1").glob("*.safetensors")))
    with ThreadPoolExecutor(len(files)) as pool:
        every = list(pool.map(lambda path: load.independent((path,)), files))
    seen = {key: sum(one[key] for one in every) for key in ("digest", "bytes", "tensors")}
    seen |= {"digest": seen["digest"] % contestants.MOST, "largest": max(one["largest"] for one in every)}
    print(f"{seen['bytes'] / measure.GIB:.2f} GiB prepared in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return load.Data(folder / "tp1", files, seen, folder / "copy")


def write(out: Path, config: dict[str, object], parts: int) -> int:
    """Write the checkpoint by as many threads as it has files; returns its bytes.

    One block of random bits is written again and again, each time with some of its bits turned, so that no two blocks
    are the same and none of the numbers is NaN.
    """
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    shapes = models.shapes(config)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    every = list(models.files(shapes, total // parts + 1))
    mask = np.uint64(0xBF7FBF7FBF7FBF7F)
    random = np.random.default_rng(0).integers(0, 1 << 64, 1 << 20, np.uint64, endpoint=False) & mask

    def one(number: int) -> dict[str, str]:
        key = f"model-{number + 1:05d}-of-{len(every):05d}.safetensors"
        names = sorted(every[number])
        turned, block = np.random.default_rng(number + 1), np.empty_like(random)
        with open(out / key, "wb") as file:
            file.write(header.encode([(name, DType.BF16, every[number][name]) for name in names], {"format": "pt"}))
            left = sum(2 * int(np.prod(every[number][name])) for name in names)
            while left > 0:
                np.bitwise_xor(random, turned.integers(0, 1 << 63, dtype=np.uint64) & mask, out=block)
                file.write(block.data.cast("B")[: min(left, block.nbytes)])
                left -= block.nbytes
        return dict.fromkeys(names, key)

    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(min(8, len(every))) as pool:
        for names in pool.map(one, range(len(every))):
            weight_map |= names
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Found:
    """What was measured so far, which is written after each question, as a session on such a machine may end."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._contests: list[Contest] = []
        here = machine(folder, args.device)
        self._there = load.versions_of(args.peers_python)
        self._about = {
            "command": command(sys.argv[1:]),
            "full": args.size is None and args.device != "cpu",
            "date": str(datetime.datetime.now(datetime.UTC).date()),
            "machine": here,
            "peers": {name: version for name, version in self._there.items() if name not in here},
        }

    def compare(self, questions: list[str], data: load.Data, asked: list[str]) -> None:
        """Answer questions of one checkpoint."""
        for question in questions:
            left = len(asked) - len(self._contests)
            until = time.monotonic() + (self._args.until - time.monotonic()) / left
            self._contests.append(compare(question, data, self._args, self._there, until))
            if self._args.json:
                contests = [one.to_json() for one in self._contests]
                self._args.json.write_text(json.dumps({"contests": contests, **self._about}, indent=1) + "\n")


def command(words: list[str]) -> str:
    """The command line without this machine's paths."""
    shown = ["python", "benchmarks/device.py"]
    left = iter(words)
    for word in left:
        if word in ("--json", "--dir"):
            next(left, "")
        elif word == "--peers-python":
            shown += [word, "PATH"]
            next(left, "")
        else:
            shown.append(word)
    return " ".join(shown)


def machine(folder: Path, device: str) -> dict[str, str]:
    """What was measured on, the GPU and its driver among it."""
    found = measure.machine(folder)
    if device == "cpu":
        return found
    with torch.cuda.device(device):
        about: Any = torch.cuda.get_device_properties(device)
    driver = Path("/proc/driver/nvidia/version")
    words = driver.read_text().split("Module", 1)[-1].split() if driver.exists() else [""]
    return {"GPU": f"{about.name}, {about.total_memory / measure.GIB:.0f} GiB", "driver": words[0], **found}


def compare(question: str, data: load.Data, args: argparse.Namespace, there: dict[str, str], until: float) -> Contest:
    """Run everyone in turns, whole rounds until the time has come, and print the table."""
    limit = parse_size(args.small_limit if question == LARGE else args.limit, "--limit")
    found: dict[str, Way] = {}
    taking: list[Contestant] = []
    began, rounds = time.monotonic(), 0

    def enough() -> bool:
        """Whether most of one more round would come too late."""
        nonlocal rounds
        rounds += 1
        now = time.monotonic()
        return now + (now - began) / rounds / 2 > until

    with Waiting(found, partial(start, question, data, args, limit)) as waiting:
        for way in ways(args.readers):
            if (question == LARGE and not way.limited and not way.threads) or (
                args.only and not way.threads and args.only not in way.name
            ):
                continue
            held = data.seen["bytes"] if args.device == "cpu" and way.call != "copies" else 0
            row = Row(way.name, way.kind, held, failed=refused(way, args.device, there))
            found[way.name] = way
            taking.append((row, partial(once, way, data, waiting, row)))

        def before(row: Row) -> None:
            waiting.ready([one for one, _ in taking])
            if question == COLD and found[row.name].call != "copies":
                measure.cold(*data.files)
            elif measure.cached(data.files) < 1:
                measure.warm(*data.files)
            contestants.back(args.back)

        rows = contest.take_turns(taking, args.runs, before, enough)
    gib, runs = data.seen["bytes"] / measure.GIB, max(len(row.walls) for row in rows)
    made = Contest(f"device, {question}", gib, runs, args.back, limit, rows, wanted=WANTED)
    made.bar, made.bar_name = ceiling(rows)
    print(f"{made.question}: {made.said()}\n\n{made.table()}\n", flush=True)
    print("".join(f"{line}\n" for line in made.verdicts()), flush=True)
    return made


def refused(way: Way, device: str, there: dict[str, str]) -> str:
    """Why a way is left out, if it is."""
    if way.cuda and device == "cpu":
        return "takes CUDA devices only"
    if way.needs and way.needs not in there:
        return "not installed"
    if dict(way.options).get("direct") and not Path("/proc/driver/nvidia-fs").exists():
        return "nvidia-fs is not loaded"
    return ""


def ceiling(rows: list[Row]) -> tuple[float, str]:
    """The seconds that can hardly be less, and of what: the slower of copies alone and the faster bare loop.

    None if either of them failed.
    """
    there = {row.name: row for row in rows if row.walls}
    loops = [there[name] for name in (FEW, SEVERAL) if name in there]
    if COPIES not in there or not loops:
        return 0.0, ""
    slower = max(there[COPIES], min(loops, key=lambda row: row.wall), key=lambda row: row.wall)
    return slower.wall, slower.name


# Children.


def start(question: str, data: load.Data, args: argparse.Namespace, limit: int, way: Way) -> Child:
    """A process that gets ready for one run."""
    job = {
        "call": way.call,
        "device": args.device,
        "uri": str(data.folder),
        "files": [str(path) for path in data.files],
        "verify": way.verify,
        "limit": limit,
        "threads": way.threads,
        "direct": question == COLD,
        "options": dict(way.options) | ({"device": args.device} if way.call in (LOAD, STREAM) else {}),
    }
    python = args.peers_python if way.needs else sys.executable
    streamed = {"RUNAI_STREAMER_MEMORY_LIMIT": str(limit), "RUNAI_STREAMER_CONCURRENCY": str(load.CONCURRENCY)}
    environ = measure.environ(**streamed, **dict(way.environ))
    ours = python == sys.executable
    environ["PYTHONPATH"] = measure.path(measure.HERE, measure.HERE.parent) if ours else str(measure.HERE)
    return Child([python, str(measure.HERE / "devicers.py"), json.dumps(job)], environ)


class Child:
    """A process that says when it is ready and waits for its turn."""

    def __init__(self, words: list[str], environ: dict[str, str]) -> None:
        self._stderr: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
        self._process = subprocess.Popen(
            words, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )
        self._timer = threading.Timer(START, self._process.kill)
        self._timer.start()

    def ready(self) -> None:
        """Wait until it is, or has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == "ready\n":
                break
        self._timer.cancel()

    def run(self) -> dict[str, Any]:
        """Its turn: returns what it says. Raises ``measure.Failed``."""
        try:
            out, _ = self._process.communicate("go\n", LONGEST)
        except subprocess.TimeoutExpired:
            raise measure.Failed(f"took more than {LONGEST} s") from None
        except BrokenPipeError:
            out = ""
        finally:
            self.close()
        if self._process.returncode:
            raise measure.Failed(self._said or f"it ended with {self._process.returncode}")
        return dict(json.loads(out.splitlines()[-1]))

    def close(self) -> None:
        """End it, if it has not ended."""
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()
        if not self._stderr.closed:
            self._stderr.seek(0)
            self._said = self._stderr.read().decode(errors="replace")
            self._stderr.close()


class Waiting:
    """The children of one round, which start together; whoever has had its turn is gone."""

    def __init__(self, every: dict[str, Way], begin: Callable[[Way], Child]) -> None:
        self._every = every
        self._begin = begin
        self._children: dict[str, Child] = {}

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.close()

    def ready(self, rows: list[Row]) -> None:
        """Start those of the next round if there are none, and wait until all of them do nothing but wait."""
        if not self._children:
            self._children = {row.name: self._begin(self._every[row.name]) for row in rows if not row.failed}
            for child in self._children.values():
                child.ready()

    def take(self, name: str) -> Child:
        """The one whose turn it is."""
        return self._children.pop(name)


def once(way: Way, data: load.Data, waiting: Waiting, row: Row) -> Sample:
    """One run of a child that waits."""
    with Available() as available:
        said = waiting.take(way.name).run()
    if way.call != "copies":
        load.check(way.name, said["seen"], data)
    if said["imported"]:
        print(f"{way.name} imported on the clock: {', '.join(said['imported'][:8])}", file=sys.stderr)
    row.pinned = max(row.pinned, said["pinned"])
    row.taken = max(row.taken, taken(available.seen, said["began"], said["ended"]))
    return Sample(said["ended"] - said["began"], said["cpu"], said["over"])


class Available:
    """How much of this machine's memory is available, again and again. What is pinned is not, whoever pinned it."""

    def __init__(self) -> None:
        self.seen = [(time.monotonic(), available())]
        """Times and bytes."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Available:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.seen.append((time.monotonic(), available()))


def taken(seen: list[tuple[float, int]], began: float, ended: float) -> int:
    """By how many bytes less was available between two times than right before the first."""
    before = [nbytes for when, nbytes in seen if when <= began] or [seen[0][1]]
    return max(0, before[-1] - min([nbytes for when, nbytes in seen if began < when <= ended] or before))


def available() -> int:
    """Bytes that the system could give away."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    main()
