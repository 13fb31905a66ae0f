"""The commands. Each reads its settings, calls one operation of the library and shows what it returned.

Operations are imported when their command runs: asking for help must not load numpy or torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from shardtool import display, settings
from shardtool.cli import options
from shardtool.cli.program import main
from shardtool.errors import Incomplete

if TYPE_CHECKING:
    from shardtool.cli.reports import Memory
    from shardtool.ops.job import Summary


def _given(**values: Any) -> dict[str, Any]:
    """The arguments that something was said for; the rest keep the operation's own defaults."""
    return {name: value for name, value in values.items() if value is not None}


def _layout(flags: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say by which layout to cut. The variable of an engine's Python is for those that ask one."""
    from shardtool.ops.layout import traces

    partition, python = flags["layer_partition"], flags["engine_python"]
    return {
        "pp": flags["pp"],
        "trust_remote_code": flags["trust_remote_code"],
        **_given(
            layout=flags["layout"],
            layer_partition=settings.layer_partition(partition) if partition or flags["pp"] > 1 else None,
            engine_version=flags["engine_version"],
            engine_python=settings.engine_python(python) if traces(flags["layout"]) else python,
            moe_backend=flags["moe_backend"],
        ),
    }


def _loaded(*uris: str | None) -> Memory:
    """Load what the addresses need beyond the operation's own imports, and note the memory that it all takes."""
    from shardtool.cli.reports import Memory
    from shardtool.stores import open_store

    for uri in uris:
        if uri is not None and "://" in uri:
            open_store(uri).close()
    return Memory()


@main.command(
    short_help="Shard a Hugging Face checkpoint.", epilog="Example: shardtool save ./llama --tp 4 -o ./llama-tp4"
)
@click.argument("model", callback=options.source)
@options.tp("Tensor parallel size: how many ranks.")
@options.pp
@options.expert_parallel
@options.layer_partition
@options.layout
@options.engine
@options.output("the shards")
@options.pattern(options.WRITTEN_PATTERN)
@options.part_size
@click.option(
    "--dtype",
    metavar="TYPE",
    help="auto, bfloat16, float16 or float32; auto is what config.json says.  [default: auto]",
)
@options.ranks
@click.option(
    "--keep-dropped", is_flag=True, help="Keep every source tensor that no rank needs, whatever its size, for merge."
)
@options.resources()
@options.sums
@options.writing
@options.speech
def save(model: str, tp: int, output: str, **flags: Any) -> int:
    """Shard a Hugging Face checkpoint: one set of files for each rank, with a manifest."""
    from shardtool.ops.save import save as operation

    flags["layout"] = settings.layout(flags["layout"]) or "vllm"
    return _write(
        "save",
        model,
        output,
        flags,
        lambda common: operation(
            model,
            output,
            tp=tp,
            expert_parallel=flags["expert_parallel"],
            keep_dropped=flags["keep_dropped"],
            ranks=flags["ranks"],
            sha256=flags["sha256"],
            sglang_sha256=flags["sglang_sha256"],
            **_layout(flags),
            **_given(
                pattern=settings.pattern(flags["pattern"]),
                max_part_size=settings.max_part_size(flags["max_part_size"]),
                dtype=settings.dtype(flags["dtype"]),
            ),
            **common,
        ),
    )


@main.command(
    short_help="Change the tensor parallel size of shards.",
    epilog="Example: shardtool reshard ./llama-tp4 --tp 2 -o ./llama-tp2",
)
@click.argument("uri", callback=options.source)
@options.tp("Tensor parallel size of the new shards.")
@options.pp
@click.option(
    "--expert-parallel/--no-expert-parallel",
    default=None,
    help="Whole experts on each rank.  [default: as in the input]",
)
@options.layer_partition
@options.layout
@options.engine
@options.output("the new shards")
@options.pattern(options.WRITTEN_PATTERN)
@options.pattern(options.READ_PATTERN, "--source-pattern")
@options.part_size
@options.verified_input
@options.ranks
@options.resources()
@options.sums
@options.writing
@options.speech
def reshard(uri: str, tp: int, output: str, **flags: Any) -> int:
    """Turn shards into those of another tensor parallel size, without the source model."""
    from shardtool.ops.reshard import reshard as operation

    return _write(
        "reshard",
        uri,
        output,
        flags,
        lambda common: operation(
            uri,
            output,
            tp=tp,
            expert_parallel=flags["expert_parallel"],
            source_pattern=flags["source_pattern"],
            verify=flags["verify"],
            ranks=flags["ranks"],
            sha256=flags["sha256"],
            sglang_sha256=flags["sglang_sha256"],
            **_layout(flags),
            **_given(
                pattern=settings.pattern(flags["pattern"]),
                max_part_size=settings.max_part_size(flags["max_part_size"]),
            ),
            **common,
        ),
    )


@main.command(
    short_help="Turn shards back into a whole checkpoint.",
    epilog="Example: shardtool merge ./llama-tp4 -o ./llama-merged",
)
@click.argument("uri", callback=options.source)
@options.output("the whole tensors")
@options.pattern(options.READ_PATTERN, "--source-pattern")
@options.merged_size
@options.verified_input
@options.resources()
@options.writing
@options.speech
def merge(uri: str, output: str, **flags: Any) -> int:
    """Turn shards back into the Hugging Face checkpoint that they were made from."""
    from shardtool.ops.merge import merge as operation

    return _write(
        "merge",
        uri,
        output,
        flags,
        lambda common: operation(
            uri,
            output,
            source_pattern=flags["source_pattern"],
            verify=flags["verify"],
            **_given(max_part_size=settings.max_part_size(flags["max_part_size"])),
            **common,
        ),
    )


def _write(
    command: str, source: str, output: str, flags: dict[str, Any], operation: Callable[[dict[str, Any]], Summary]
) -> int:
    """Run an operation that writes a checkpoint, and report it."""
    from shardtool.cli import reports

    memory = _loaded(source, output)
    silent, wants_json = settings.quiet(flags["quiet"]), flags["wants_json"]
    dry_run = flags["dry_run"]
    began = time.monotonic()
    with display.progress(command, shown=not (silent or wants_json or dry_run)) as tell:
        common = {
            "memory_limit": settings.memory_limit(flags["memory_limit"]),
            "concurrency": settings.concurrency(flags["concurrency"]),
            "overwrite": flags["overwrite"],
            "dry_run": dry_run,
            "progress": tell,
        }
        summary = operation(common)
    report = reports.Written(command, output, summary, time.monotonic() - began, memory, dry_run=dry_run)
    report.show(quiet=silent, wants_json=wants_json)
    return 0


@main.command(short_help="Load tensors and say how fast it was.", epilog="Example: shardtool load ./llama-tp4 --rank 0")
@click.argument("uri", callback=options.source)
@options.rank
@click.option("--tp", type=int, metavar="N", help="Bring ranks of N out of whole tensors, or of shards of any size.")
@click.option("--pp", type=int, default=1, metavar="N", help="The same for N pipeline stages.")
@click.option("--layout", metavar="NAME", help="How they are cut, as for save.  [default: as the shards were, or vllm]")
@click.option(
    "--device",
    metavar="DEVICE",
    help="cpu, cuda or cuda:0; under torchrun cuda is the process's own GPU.  [default: cpu]",
)
@options.resources("8, and 16 for storage that is far away")
@click.option("--block-size", metavar="SIZE", help="Bytes of one read at most, for example 4MiB.  [default: 8MiB]")
@click.option("--verify/--no-verify", default=True, help="Check digests while reading.  [default: verify]")
@click.option(
    "--distributed",
    metavar="1|0|auto",
    help="Under torchrun: read whole tensors once for all processes of a node, and exchange them.  [default: auto, "
    "for storage that is not this machine's]",
)
@options.pattern(options.READ_PATTERN)
@options.speech
def load(uri: str, **flags: Any) -> int:
    """Load tensors into memory, drop them, and say how fast it was.

    With --tp it reads only the ranges that a rank of that size needs, whatever the checkpoint was cut for.

    Under torchrun each process loads its own rank, or all of them the same whole tensors. cuda without a number spreads
    ranks over the GPUs.
    """
    import_module("shardtool.sinks.tensor")  # torch, which the operation imports later
    from shardtool.cli import reports
    from shardtool.ops.measure import joined, measure

    memory = _loaded(uri)
    silent, wants_json = settings.quiet(flags["quiet"]), flags["wants_json"]
    started = settings.torchrun()
    device = settings.device(flags["device"]) or "cpu"
    said = settings.distributed(flags["distributed"])
    distributed = "auto" if said is None else said
    shown = display.progress("load", shown=not (silent or wants_json))
    with joined(uri, distributed, device), shown as tell:
        found = measure(
            uri,
            rank=flags["rank"],
            own=started[0] if started else None,
            device=device,
            concurrency=settings.concurrency(flags["concurrency"]),
            memory_limit=settings.memory_limit(flags["memory_limit"]),
            block_size=settings.block_size(flags["block_size"]),
            verify=flags["verify"],
            pattern=flags["pattern"],
            distributed=distributed,
            progress=tell,
            tp=flags["tp"],
            pp=flags["pp"],
            layout=flags["layout"],
        )
    reports.Loaded(found, memory).show(quiet=silent, wants_json=wants_json)
    return 0


@main.command(
    short_help="Check files, digests and values.", epilog="Example: shardtool verify ./llama-tp4 --against ./llama"
)
@click.argument("uri", callback=options.source)
@click.option(
    "--quick", is_flag=True, help="Look at names, sizes, headers and checksums that stores keep; read no tensor."
)
@click.option(
    "--against",
    metavar="URI",
    callback=options.source,
    help="Compare every tensor with this model, or with shards of it at any size.",
)
@click.option(
    "--engine", metavar="NAME", help="Ask the installed engine (vllm, sglang) whether it would take these shards."
)
@options.asked_engine
@options.pattern(options.READ_PATTERN)
@options.resources()
@options.speech
def verify(uri: str, **flags: Any) -> int:
    """Check that a checkpoint is whole and its bytes are those that were written.

    Exits with 0 if all is well, 1 if something differs or is damaged, 4 if only files are missing.
    """
    from shardtool.cli import reports
    from shardtool.ops.verify import verify as operation

    memory = _loaded(uri, flags["against"])
    silent, wants_json = settings.quiet(flags["quiet"]), flags["wants_json"]
    with display.progress("verify", shown=not (silent or wants_json)) as tell:
        found = operation(
            uri,
            against=flags["against"],
            quick=flags["quick"],
            engine=flags["engine"],
            engine_python=settings.engine_python(flags["engine_python"]) if flags["engine"] else flags["engine_python"],
            trust_remote_code=flags["trust_remote_code"],
            moe_backend=flags["moe_backend"],
            pattern=flags["pattern"],
            memory_limit=settings.memory_limit(flags["memory_limit"]),
            concurrency=settings.concurrency(flags["concurrency"]),
            progress=tell,
        )
    reports.Verified(found, flags["against"], memory).show(quiet=silent, wants_json=wants_json)
    return found.exit_code


@main.command(
    short_help="Ask an engine how it cuts a model.",
    epilog="Example: shardtool trace ./llama --tp 1,2,4 -o ./llama-layout.json",
)
@click.argument("model", callback=options.source)
@options.tps
@options.pp
@options.expert_parallel
@options.layer_partition
@click.option("--engine", metavar="NAME", default="vllm", help="vllm or sglang.  [default: vllm]")
@options.asked_engine
@click.option(
    "--dtype",
    metavar="TYPE",
    help="auto, bfloat16, float16 or float32; auto is what the engine chooses on a CPU.  [default: auto]",
)
@click.option("--output", "-o", metavar="URI", callback=options.address, help="Where the layout file (*.json) goes.")
@click.option("--compare", metavar="FILE", help="Say what differs from this layout file, of another version perhaps.")
@options.speech
def trace(model: str, tps: tuple[int, ...], **flags: Any) -> int:
    """Ask an installed engine how it cuts a model: its own loader runs without weights, memory or a GPU.

    The layout file that comes of it serves save --layout on machines without the engine. With --compare it exits with
    1 if something differs.
    """
    from shardtool.cli import reports
    from shardtool.ops.layout import from_file
    from shardtool.ops.trace import trace as operation

    silent, wants_json = settings.quiet(flags["quiet"]), flags["wants_json"]
    earlier = None if flags["compare"] is None else from_file(flags["compare"], "--compare")
    partition = flags["layer_partition"]
    began = time.monotonic()
    with display.progress("trace", shown=not (silent or wants_json), unit="rank") as tell:
        found = operation(
            model,
            tp=tps,
            pp=flags["pp"],
            expert_parallel=flags["expert_parallel"],
            engine=flags["engine"],
            trust_remote_code=flags["trust_remote_code"],
            output=flags["output"],
            progress=tell,
            **_given(
                layer_partition=settings.layer_partition(partition) if partition or flags["pp"] > 1 else None,
                engine_python=settings.engine_python(flags["engine_python"]),
                moe_backend=flags["moe_backend"],
                dtype=settings.dtype(flags["dtype"]),
            ),
        )
    report = reports.Traced(model, flags["output"], found, earlier, time.monotonic() - began)
    report.show(quiet=silent, wants_json=wants_json)
    return report.exit_code


@main.command(
    short_help="Say what a checkpoint is.", epilog="Example: shardtool inspect ./llama-tp4 --tensors 'model.layers.0.*'"
)
@click.argument("uri", callback=options.source)
@click.option("--tensors", metavar="GLOB", help="List the tensors that this names, for example '*.q_proj.*'.")
@options.pattern(options.READ_PATTERN)
@click.option("--json", "wants_json", is_flag=True, help="Print one JSON object instead of text.")
def inspect(uri: str, tensors: str | None, pattern: str | None, wants_json: bool) -> int:
    """Say what a checkpoint is, from its headers alone.

    Exits with 4 if files are missing; what is there is shown.
    """
    from shardtool.cli import reports
    from shardtool.ops.inspect import inspect as operation

    found = operation(uri, tensors=tensors, pattern=pattern)
    reports.Inspected(found).show(wants_json=wants_json, only_tensors=tensors is not None)
    return Incomplete.exit_code if found.missing else 0
