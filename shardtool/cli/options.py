"""Flags that several commands share.

Values that may come from a variable as well are left to ``shardtool.settings``, so that both are read alike.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from shardtool import display, settings

F = TypeVar("F", bound=Callable[..., Any])

MOST_RANKS = 1 << 16


def _ranks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """The ranks of a list such as ``0,2-3``, in order and each once."""
    if value is None:
        return None
    found: set[int] = set()
    for part in value.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < MOST_RANKS:
            raise click.BadParameter(f"{value[:60]!r} is not a list of ranks; write for example 0,2-3", ctx, param)
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _number(least: int) -> Callable[[click.Context, click.Parameter, int | None], int | None]:
    """A callback that refuses numbers below ``least``, and those that no cluster has."""

    def check(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
        if value is not None and not least <= value < MOST_RANKS:
            raise click.BadParameter(f"{value} is not a number from {least} to {MOST_RANKS - 1}", ctx, param)
        return value

    return check


def _slowed(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Lets all stores that the command opens keep within a limit."""
    rate = settings.bwlimit(value)
    if rate is not None:
        from shardtool.stores.bandwidth import limited

        ctx.with_resource(limited(rate))


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def address(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuses an address that means something within one process only, and one that lost a slash."""
    from shardtool.stores.address import shown

    if value is not None and value.lower().startswith("memory://"):
        raise click.BadParameter(
            f"{shown(value)[:60]!r} keeps nothing between commands; name a folder or a bucket", ctx, param
        )
    if value is not None and not os.path.exists(value) and (meant := _meant(value)):
        raise click.BadParameter(
            f"this is a path and no address: write {meant}, or put ./ before it if it is a folder", ctx, param
        )
    return value


def _meant(path: str) -> str | None:
    """The address that a path would be, had it two slashes: ``s3:/bucket``, ``s3:bucket``."""
    from shardtool.stores import SCHEMES
    from shardtool.stores.address import shown

    scheme, colon, rest = path.partition(":")
    if not colon or rest.startswith("//") or scheme.lower() not in SCHEMES:
        return None
    return shown(f"{scheme.lower()}://{'/' if scheme.lower() == 'file' else ''}{rest.removeprefix('/')}")


def source(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """``address`` of what is there already. A text that is taken for the id of a model of the hub is told of."""
    from shardtool.checkpoint import single_file
    from shardtool.stores.hub.existing import hub_id

    value = address(ctx, param, value)
    model = hub_id((single_file(value) or (value,))[0]) if value else None
    if model and not settings.quiet(ctx.params.get("quiet")):
        display.note(f"{value} does not exist here: taken for the model {model}")
    return value


def output(what: str) -> Callable[[F], F]:
    """``--output``."""
    return click.option(
        "--output",
        "-o",
        required=True,
        metavar="URI",
        callback=address,
        help=f"Where {what} go: a folder or an address.",
    )


def tp(what: str) -> Callable[[F], F]:
    """``--tp``."""
    return click.option("--tp", type=int, callback=_number(1), required=True, metavar="N", help=what)


def _sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """The sizes of a list such as ``1,2,4``, each once."""
    parts = [part.strip() for part in value.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]{0,3}", part) for part in parts):
        raise click.BadParameter(f"{value[:60]!r} is not a list of sizes; write for example 1,2,4,8", ctx, param)
    return tuple(dict.fromkeys(int(part) for part in parts))


tps = click.option(
    "--tp", "tps", callback=_sizes, required=True, metavar="LIST", help="Tensor parallel sizes, for example 1,2,4,8."
)
pp = click.option("--pp", type=int, callback=_number(1), default=1, metavar="N", help="Pipeline stages.  [default: 1]")
expert_parallel = click.option(
    "--expert-parallel", is_flag=True, help="Whole experts on each rank, as the engine's flag of this name."
)
layer_partition = click.option(
    "--layer-partition",
    metavar="LIST",
    help="Layers of each pipeline stage, for example 16,18.  [default: as vLLM divides them]",
)


layout = click.option(
    "--layout",
    metavar="L",
    help="vllm, vllm:builtin, vllm:traced, sglang, transformers, or a file that shardtool trace wrote.",
)
asked_engine = _all(
    click.option("--engine-python", metavar="PATH", help="Python that has the engine.  [default: this one]"),
    click.option("--trust-remote-code", is_flag=True, help="Let the engine run the model's own code."),
    click.option("--moe-backend", metavar="NAME", help="The engine's kernel for experts, where shapes depend on it."),
)
engine = _all(
    click.option("--engine-version", metavar="V", help="Version of the engine that a built-in table shall be for."),
    asked_engine,
)

rank = click.option(
    "--rank", type=int, callback=_number(0), metavar="R", help="This rank only.  [default: all; under torchrun its own]"
)


sums = _all(
    click.option("--sha256", is_flag=True, help="Write SHA256SUMS too, as sha256sum -c reads it."),
    click.option(
        "--sglang-sha256", is_flag=True, help="Write checksums.json too, as SGLang's --model-checksum reads it."
    ),
)


def pattern(help_text: str, flag: str = "--pattern") -> Callable[[F], F]:
    """``--pattern`` or ``--source-pattern``."""
    return click.option(flag, metavar="P", help=help_text)


WRITTEN_PATTERN = (
    "Names of the files; with --pp model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors."
    "  [default: model-rank-{rank}-part-{part}.safetensors]"
)
READ_PATTERN = "Names of the files of shards that have no manifest."

part_size = click.option("--max-part-size", metavar="SIZE", help="Size of a file at most.  [default: 5GiB]")
merged_size = click.option("--max-part-size", metavar="SIZE", help="Size of a file at most.  [default: 5GB]")
ranks = click.option("--ranks", callback=_ranks, metavar="LIST", help="Write these ranks only, for example 0,2-3.")
verified_input = click.option(
    "--verify/--no-verify", default=True, help="Check the input's digests.  [default: verify]"
)


def resources(readers: str = "8") -> Callable[[F], F]:
    """``--memory-limit``, ``--concurrency``, whose default is told as ``readers``, and ``--bwlimit``."""
    return _all(
        click.option(
            "--memory-limit",
            metavar="SIZE",
            help="Memory to use at most, for example 512MiB; -1 is no limit, 0 the least that does."
            "  [default: half of what is free, 256MiB at most]",
        ),
        click.option("--concurrency", type=int, metavar="N", help=f"Reads under way at once.  [default: {readers}]"),
        click.option(
            "--bwlimit",
            metavar="SIZE",
            callback=_slowed,
            expose_value=False,
            help="Bytes per second at most, read and written each, for example 100MB.",
        ),
    )


writing = _all(
    click.option("--overwrite", is_flag=True, help="Replace a checkpoint that lies there already."),
    click.option("--dry-run", is_flag=True, help="Show the plan and its cost; write nothing."),
)

speech = _all(
    click.option("--quiet/--no-quiet", "-q", default=None, is_eager=True, help="Show errors and differences only."),
    click.option("--json", "wants_json", is_flag=True, help="Print one JSON object instead of text."),
)
