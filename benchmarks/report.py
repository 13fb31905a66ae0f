"""Makes docs/benchmarks.md of what the benchmarks measured.

python benchmarks/report.py [--data benchmarks/results.json] [--out docs/benchmarks.md] [--device FILE]

``all.py`` runs the benchmarks and writes the data; ``--device`` adds what ``device.py --json`` wrote on a machine that
has a GPU, which is shown with that machine. What is said about the numbers in general stands here; what depends
on them, who is ahead of us among it, is made of them.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
from contest import MAPPING, Contest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
WIDTH = 120
"""Characters of a line of text."""
DEVICE = "device"
"""The script whose section has a machine of its own."""

HEAD = """\
# Benchmarks

Each file in `benchmarks/` asks one question, runs alone with small defaults and prints a table; `python
benchmarks/all.py` runs all of them and makes this page of what they measured. Nothing below is written by hand but the
explanations.
"""

READING = """\
## How to read the tables

**Noise.** On a virtual machine, wall times of what writes vary by half from run to run, those of what reads by a
quarter, CPU seconds by a tenth to a fifth; smaller differences mean nothing. A disk that grants bursts is faster at
first than later. Memory figures repeat to within 1 MiB. Compare rows of one table, not tables of different days.

**What is counted.** Every run is a process of its own, with none of the variables by which readers are set. Where the
line above a table says that runs took turns, the order is shuffled anew for each round, and wall and CPU seconds are
medians, *least* is the smallest. Imports are outside the clock; opening files, headers and the manifest are inside.
CPU seconds are those of all threads, the kernel's on their behalf included. *Over the imports* is the highest peak of
resident memory (VmHWM) less that right after the imports; *does not bind* stands where that stayed below three quarters
of the limit. *Of the ceiling* is the rate as a share of what can hardly be passed, which the lines below the table
name. The host of a virtual machine takes free memory back within seconds, and getting it again would be what is
measured; where a line says so, memory was made present right before the clock started.
"""


@dataclass(frozen=True)
class Section:
    """One script's part of the page."""

    script: str
    title: str
    text: str


SECTIONS = (
    Section(
        "load",
        "Loading",
        """\
Tensors are brought to a consumer on the CPU that reads each byte once, in the same way for all (a pass of xxh3_64 over
the tensor where it lies; about 0.04 CPU-s/GiB of every row). The sum of these digests is that of an independent reader,
or there is no table. shardtool reads a checkpoint that it saved: with its digests checked, and without. The others read
the same files.

*owned*: each tensor has memory of its own, and all are kept. *stream*: one after the other under a memory limit; what
is held is the largest tensor. *mapping*: tensors are the file's own pages, which are read when they are touched, and
change when the file does; nothing is copied, and nothing can be checked beforehand.

Run:ai reads with 16 threads; by default it reads past the page cache also where the files are in it, *buffered* is with
`RUNAI_STREAMER_FS_STRATEGY=sync_buffered`. tensorizer reads a format of its own. InstantTensor is missing because
it takes CUDA devices only.""",
    ),
    Section(
        DEVICE,
        "To a GPU",
        """\
Tensors are brought to one GPU and kept there; the clock ends when it has done all its work. Behind it they are brought
back, and the sum of their digests is that of an independent reader, or there is no row. Processes have imported
everything and have woken the GPU before. shardtool's digests are checked on the way, or not; *ready*: tensors come as
they arrive. The others read the same files, each in its own way to a GPU.

The ceiling is what cannot be passed here: the slower of copies from pinned memory alone, in blocks of 8 MiB, and of the
faster bare loop (threads read blocks into a pinned ring, from where they are copied); their memory is there and pinned
before the clock starts. 85 % of its rate is wanted from files in the page cache. *Pinned* is what torch knows of, which
is all that shardtool has; *of the machine* is by how much the memory that is available on the whole machine went down,
in which there is whatever a loader pins by itself.""",
    ),
    Section(
        "save",
        "Writing",
        """\
A source in the page cache is written as shards (`save`), shards as others (`reshard`) and as whole tensors (`merge`),
beside a plain copy and the script that people write with safetensors. All are on the disk when the clock stops, by
fsync. shardtool computes two digests of every byte on the way, and checks those of its input unless it says
*unverified*.""",
    ),
    Section(
        "verify",
        "Verifying",
        """\
`verify` reads every byte and computes its blake3 and xxh3_128, beside a bare loop that does the same with blocks of
8 MiB and all cores, and knows nothing of tensors. From the disk, the files are dropped from the page cache before each
run and the loop reads past it, also without hashing, which is the disk's own rate. What verify can hardly pass is the
slower of that rate and the rate at which the loop hashes what is in the page cache.""",
    ),
    Section(
        "network",
        "Over the network",
        """\
Servers of this machine: nginx (one worker, sendfile) gives a checkpoint as objects of S3, a server that takes
everything gets uploads. They share the two cores with the client, so the CPU seconds, which are those of the client
alone, say more than the rates. Tensors are those of an independent reader, or there is no table; of uploads one more
run of each proves that the bytes came. `digests checked` is xxh3_128 over every chunk on the way; the others check
nothing but what TCP and TLS do. Run:ai is set to 8 connections. `shardtool create` uploads as `save` does, with the
checksum that S3 compares.""",
    ),
    Section(
        "memory",
        "Memory",
        """\
One run each. A limit of 0 is the least that does; 16 MiB over the limit is what we allow. `stream` limits what is read
ahead; the tensor at hand, and one that is larger than the limit, are allowed on top; figures can be negative.""",
    ),
    Section("help", "Start", "CPU seconds of a whole process, imports included."),
    Section(
        "headers",
        "Headers",
        "`inspect` of sparse files, from the headers alone; below a second is wanted for 20,000 tensors.",
    ),
    Section(
        "plan",
        "Plans",
        "`save --dry-run`: every step is planned, nothing is read but headers and samples.",
    ),
    Section(
        "experts",
        "Mixtures of experts",
        """\
DeepSeek-V3 in fp8 with blocks, all its tensors as a sparse file: `save --dry-run`, which plans every step of the
conversion, by the built-in table; where an engine is at hand also the trace of its own loader, eight ranks one after
the other, and the plan by the layout file of it. One run each, of the whole process: imports, the engine's too, are
counted. The peak is the highest so far.""",
    ),
)

QUESTIONS = {
    "warm-owned": "Files in the page cache, tensors kept",
    "warm-stream": "Files in the page cache, streamed",
    "cold-stream": "Files on the disk, streamed",
    "many": "One file of many small tensors, in the page cache",
    "device, warm": "Files in the page cache",
    "device, cold": "Files on the disk",
    "device, large": "Files in the page cache, several tensors larger than the limit",
    "device, many": "One file of many small tensors, in the page cache",
    "writing": "",
    "read": "Tensors from S3 over HTTP, streamed",
    "read-tls": "Tensors from S3 over HTTPS, streamed",
    "write": "Uploads over HTTP",
    "write-tls": "Uploads over HTTPS",
    "verify, warm": "From the page cache",
    "verify, cold": "From the disk",
}


def render(data: dict[str, Any]) -> str:
    """The page."""
    parts = [HEAD, _machine(data), READING, *_losses(data)]
    there = data["sections"]
    for section in SECTIONS:
        if section.script in there:
            parts.append(_section(section, there[section.script]))
        elif section.script == DEVICE:
            parts.append(f"## {section.title}\n\nNo GPU was at hand, so that nothing was measured to one.\n")
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _machine(data: dict[str, Any]) -> str:
    rows = [*data["machine"].items(), *data["peers"].items()]
    small = [found["command"].split()[1] for found in data["sections"].values() if not found["full"]]
    said = f"Measured on {data['date']}."
    if small:
        said += f" These ran at a small size, to see that they work, and their numbers say little: {', '.join(small)}."
    return f"## The machine\n\n{textwrap.fill(said, WIDTH)}\n\n{measure.table(('', ''), rows)}\n"


def contests(data: dict[str, Any]) -> Iterator[Contest]:
    """Every contest, in the order of the page."""
    for section in SECTIONS:
        for found in data["sections"].get(section.script, {}).get("contests", ()):
            yield Contest.of_json(found)


def _losses(data: dict[str, Any]) -> Iterator[str]:
    lost = [line for one in contests(data) for line in one.losses()]
    yield "## Where we lose\n"
    if not lost:
        yield "Nowhere, in the tables below.\n"
        return
    heads = ("question", "ahead of us", "us", "wall s", "CPU-s/GiB", "MiB beside the tensors")
    yield (
        "Every row below that is faster than one of ours or uses less CPU, whatever the difference, or takes less\n"
        "memory beside the tensors that are held, by more than a MiB: theirs to ours.\n"
        f"Only who does the same is compared; those who hand out a {MAPPING}, a plain copy and a bare loop besides.\n"
    )
    yield measure.table(heads, lost)


def _section(section: Section, found: dict[str, Any]) -> str:
    parts = [f"## {section.title}: `{found['command']}`", section.text]
    if "machine" in found:
        rows = [*found["machine"].items(), *found["peers"].items()]
        parts += [f"Measured on {found['date']}, on a machine of its own.", measure.table(("", ""), rows)]
    for given in found.get("contests", ()):
        one = Contest.of_json(given)
        title = QUESTIONS[one.question]
        parts += [f"### {title}"] if title else []
        parts += [one.said(), one.table()]
        parts += ["\n".join(_item(line) for line in one.verdicts())]
    parts += [_filled(found["text"])] if "text" in found else []
    return "\n\n".join(part.strip("\n") for part in parts if part)


def _item(line: str) -> str:
    """A line of a list."""
    return textwrap.fill(line, WIDTH, initial_indent="* ", subsequent_indent="  ", break_on_hyphens=False)


def _filled(text: str) -> str:
    """What a script printed, with its text in lines of the page's width; tables stay as they are."""
    return "\n".join(line if line.startswith("|") else textwrap.fill(line, WIDTH) for line in text.splitlines())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument(
        "--device", type=Path, metavar="FILE", help="what device.py --json wrote; becomes part of the data"
    )
    args = parser.parse_args()
    data = json.loads(args.data.read_text())
    if args.device:
        data["sections"][DEVICE] = json.loads(args.device.read_text())
        args.data.write_text(json.dumps(data, indent=1) + "\n")
    args.out.write_text(render(data))


if __name__ == "__main__":
    main()
