"""How fast are tensors brought to a consumer on the CPU, beside every peer?

python benchmarks/load.py [warm-owned warm-stream cold-stream many] [--size 256MiB] [--runs 3] [--back 0]
                          [--peers-python PATH] [--json FILE]

warm-owned   files in the page cache, all tensors kept, each in memory of its own
warm-stream  files in the page cache, one tensor after the other, under the memory limit
cold-stream  the same, from the disk: the files are dropped from the page cache before each run
many         one file of many small tensors, in the page cache, kept and streamed

Every run is a process of its own; the clock starts when everything is imported, and headers and manifest are read on
the clock. Every contestant has the same consumer, which reads each byte once (contestants.py); the sum of the tensors'
digests must be that of an independent reader, or there is no result. Peers live in a Python of their own::

    python -m venv peers && peers/bin/pip install torch safetensors runai-model-streamer fastsafetensors tensorizer \\
        numpy xxhash

Without it, or without one of them, the rest is measured. InstantTensor is not among them: it takes CUDA devices only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import contest
import contestants
import flags
import measure
import models
from contest import Contest, Contestant, Row, Sample

import shardtool
from shardtool.units import parse_size

WARM_OWNED, WARM_STREAM, COLD_STREAM, MANY = QUESTIONS = ("warm-owned", "warm-stream", "cold-stream", "many")
OWNED, STREAM, MAPPING = "owned", "stream", contest.MAPPING
CONCURRENCY = 16
BUFFERED = (("RUNAI_STREAMER_FS_STRATEGY", "sync_buffered"),)
"""How Run:ai is told to read by way of the page cache, past which it reads by default."""


@dataclass(frozen=True)
class Loader:
    """A way to load. ``needs``: the package of a peer, which runs in the Python that has it; else this one runs it."""

    name: str
    call: str
    kind: str
    needs: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    verify: bool = False
    environ: tuple[tuple[str, str], ...] = ()


LOADERS = (
    Loader("shardtool load, digests checked", "shardtool_load", OWNED, verify=True),
    Loader("shardtool load, unchecked", "shardtool_load", OWNED),
    Loader("shardtool load, borrow=True", "shardtool_load", MAPPING, options=(("borrow", True),)),
    Loader("shardtool stream, digests checked", "shardtool_stream", STREAM, verify=True),
    Loader("shardtool stream, unchecked", "shardtool_stream", STREAM),
    Loader("safetensors load_file", "safetensors_mapped", MAPPING),
    Loader("safetensors load_file, cloned", "safetensors_cloned", OWNED),
    Loader("safetensors load_file, pread", "safetensors_read", OWNED),
    Loader("safetensors safe_open, pread", "safetensors_each", STREAM),
    Loader("Run:ai, owned", "runai_owned", OWNED, "runai-model-streamer"),
    Loader("Run:ai, not owned", "runai_stream", STREAM, "runai-model-streamer"),
    Loader("Run:ai, buffered, owned", "runai_owned", OWNED, "runai-model-streamer", environ=BUFFERED),
    Loader("Run:ai, buffered, not owned", "runai_stream", STREAM, "runai-model-streamer", environ=BUFFERED),
    Loader("fastsafetensors", "fastsafetensors_owned", OWNED, "fastsafetensors"),
    Loader("fastsafetensors, parts", "fastsafetensors_stream", STREAM, "fastsafetensors"),
    Loader("tensorizer, its own format", "tensorizer_owned", OWNED, "tensorizer"),
)
KINDS = {
    WARM_OWNED: (OWNED, MAPPING),
    WARM_STREAM: (STREAM, MAPPING),
    COLD_STREAM: (STREAM, MAPPING),
    MANY: (OWNED, STREAM, MAPPING),
}


@dataclass(frozen=True)
class Data:
    """A checkpoint that all read: its folder, its files, what is in it; tensorizer's copy, or why there is none."""

    folder: Path
    files: tuple[Path, ...]
    seen: dict[str, int]
    copy: Path
    refused: str = ""

    def read_by(self, loader: Loader) -> list[Path]:
        """The files of which a loader reads the tensors."""
        return [self.copy] if loader.needs == "tensorizer" else list(self.files)


def main() -> None:
    """The command line."""
    parser = flags.parser(__doc__, limit="1GiB", limited="of memory, for what streams", size="of the checkpoint")
    flags.asking(parser, QUESTIONS)
    flags.choosing(parser)
    parser.add_argument("--tensors", type=int, default=4000, help="of the file of many; 20000 have 1.3 GiB")
    args = parser.parse_args()
    asked = flags.asked(args, QUESTIONS)
    found = []
    with measure.place(args.dir) as folder:
        if asked != [MANY]:
            data = prepare(folder / "llama", models.of_size(parse_size(args.size, "--size")), args, parts=2)
            found += [compare(question, data, args) for question in asked if question != MANY]
            shutil.rmtree(folder / "llama")
        if MANY in asked:
            found.append(compare(MANY, prepare(folder / "many", models.of_many(args.tensors), args, parts=1), args))
    if args.json:
        versions = versions_of(args.peers_python)
        args.json.write_text(json.dumps({"contests": [one.to_json() for one in found], "versions": versions}))


def versions_of(python: str) -> dict[str, str]:
    """The packages that a Python has, of those that matter here."""
    return dict(json.loads(_child(python, "--versions")))


def prepare(folder: Path, config: dict[str, object], args: argparse.Namespace, *, parts: int) -> Data:
    """A checkpoint of one rank with its manifest, in ``parts`` files, and the same in tensorizer's format."""
    total = models.write(folder / "hf", config)
    measure.run("save", folder / "hf", folder / "tp1", tp=1, max_part_size=total // parts + total // 20 + measure.MIB)
    shutil.rmtree(folder / "hf")
    files = tuple(sorted((folder / "tp1").glob("*.safetensors")))
    data = Data(folder / "tp1", files, independent(files), folder / "copy.tensors")
    if "tensorizer" in versions_of(args.peers_python):
        job = {"call": "tensorizer_make", "files": [str(path) for path in files], "out": str(data.copy), "owned": False}
        try:
            made = json.loads(_child(args.peers_python, json.dumps(job)))
        except measure.Failed as failed:
            return replace(data, refused=f"cannot write it: {contest.reason(failed)}")
        check("tensorizer's copy", made, data)
    return data


def independent(files: tuple[Path, ...]) -> dict[str, int]:
    """What a reader of its own makes of the files: the sum of the digests, bytes, tensors, the largest tensor."""
    total, sizes = 0, []
    for path in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(length))
            head.pop("__metadata__", None)
            for name, entry in head.items():
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                total += contestants.digest(name, file.read(end - begin))
                sizes.append(end - begin)
    digest = total % contestants.MOST
    return {"digest": digest, "bytes": sum(sizes), "tensors": len(sizes), "largest": max(sizes)}


def check(name: str, seen: dict[str, int], data: Data) -> None:
    """Refuse a result whose bytes are others."""
    wrong = {key: (seen.get(key), value) for key, value in data.seen.items() if seen.get(key) != value}
    if wrong:
        raise SystemExit(f"{name} delivered other tensors (found, expected): {wrong}")


def compare(question: str, data: Data, args: argparse.Namespace) -> Contest:
    """Run everyone in turns and print the table."""
    there = versions_of(args.peers_python)
    limit = parse_size(args.limit, "--limit")
    taking: list[Contestant] = []
    loaders: dict[str, Loader] = {}
    for loader in LOADERS:
        if loader.kind not in KINDS[question] or (args.only and args.only not in loader.name):
            continue
        if question in (WARM_STREAM, COLD_STREAM) and loader.call == "shardtool_load":
            continue
        held = data.seen["bytes"] if loader.kind != STREAM else data.seen["largest"]
        row = Row(loader.name, loader.kind, held)
        if loader.needs and loader.needs not in there:
            row.failed = "not installed"
        elif not set(dict(loader.options)) <= set(signature(shardtool.load).parameters):
            row.failed = "not in this version"
        elif loader.needs == "tensorizer":
            row.failed = data.refused
        loaders[loader.name] = loader
        taking.append((row, partial(once, loader, data, args, limit)))

    def before(row: Row) -> None:
        prepared = measure.cold if question == COLD_STREAM else measure.warm
        prepared(*data.read_by(loaders[row.name]))

    rows = contest.take_turns(taking, args.runs, before)
    found = Contest(question, data.seen["bytes"] / measure.GIB, args.runs, args.back, limit, rows)
    print(f"{question}: {found.said()}\n\n{found.table()}\n", flush=True)
    print("".join(f"{line}\n" for line in found.verdicts()), flush=True)
    return found


def once(loader: Loader, data: Data, args: argparse.Namespace, limit: int) -> Sample:
    """One run in a process of its own."""
    job = {
        "call": loader.call,
        "owned": loader.kind != STREAM,
        "uri": str(data.folder),
        "files": [str(path) for path in data.read_by(loader)],
        "verify": loader.verify,
        "limit": limit,
        "back": args.back,
        "options": dict(loader.options),
        "largest": data.seen["largest"],
    }
    python = args.peers_python if loader.needs else sys.executable
    streamed = str(limit) if loader.kind == STREAM else "-1"
    variables = {"RUNAI_STREAMER_MEMORY_LIMIT": streamed, **dict(loader.environ)}
    said = json.loads(_child(python, json.dumps(job), **variables))
    check(loader.name, said, data)
    if said["imported"]:
        print(f"{loader.name} imported on the clock: {', '.join(said['imported'][:8])}", file=sys.stderr)
    return Sample(said["wall"], said["cpu"], said["over"])


def _child(python: str, word: str, **variables: str) -> str:
    """The last line that contestants.py prints under a Python. Its neighbours cannot shadow what it imports."""
    environ = measure.environ(RUNAI_STREAMER_CONCURRENCY=str(CONCURRENCY), **variables)
    environ["PYTHONPATH"] = measure.path(measure.HERE.parent) if python == sys.executable else ""
    words = [python, "-P", str(measure.HERE / "contestants.py"), word]
    child = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    if child.returncode:
        raise measure.Failed(child.stderr or f"contestants.py ended with {child.returncode}")
    return child.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
