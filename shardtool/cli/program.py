"""The program around the commands: how it ends, whatever happens.

::

    0         fine                                   5         input or output failed, or memory ran out
    1         a difference or damage was found       6         the memory limit is too small
    2         usage, or something unsupported        130, 143  interrupted, terminated (129: the terminal has gone)
    3         not found                              141       whoever read stdout has gone
    4         an incomplete checkpoint

An error is one line on stderr; with ``--json`` it is an object on stdout as well. A signal ends the command through
``KeyboardInterrupt``, so that operations remove their temporary files; a second one ends the process at once.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import click

from shardtool import __version__, display
from shardtool.errors import BudgetTooSmall, ShardtoolError

SYSTEM_FAILED = 5
_PLATFORMS = ("linux", "darwin")
_RESUMED = ("save", "reshard", "merge", "pull")


class Program(click.Group):
    """A group of commands that ends with shardtool's exit codes."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> Any:
        """Run one command line and exit."""
        words = list(sys.argv[1:] if args is None else args)
        extra |= {"standalone_mode": False, "obj": _wants_json(words)}
        try:
            code = super().main(words, prog_name or "shardtool", **extra)
        except click.ClickException as error:
            ctx = error.ctx if isinstance(error, click.UsageError) else None
            hint = f" (see {ctx.command_path} --help)" if ctx else ""
            code = _failed("UsageError", error.format_message().rstrip(".") + hint, error.exit_code, extra["obj"])
        sys.exit(code or 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; whatever it raises on purpose becomes a line and an exit code."""
        with _signals() as received:
            try:
                return super().invoke(ctx)
            except (KeyboardInterrupt, ShardtoolError, MemoryError, OSError, RuntimeError) as error:
                if received or isinstance(error, KeyboardInterrupt):
                    return _interrupted(received[0] if received else signal.SIGINT, ctx.invoked_subcommand, ctx.obj)
                if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
                    raise
                return _explained(error, ctx.obj)


def _explained(error: Exception, wants_json: bool) -> int:
    kind = type(error).__name__
    match error:
        case BudgetTooSmall():
            return _failed(kind, str(error), error.exit_code, wants_json, needed=error.needed)
        case ShardtoolError():
            return _failed(kind, str(error), error.exit_code, wants_json)
        case OSError() if error.errno != errno.ENOMEM:
            what = error.strerror or str(error) or kind
            return _failed(kind, f"{error.filename}: {what}" if error.filename else what, SYSTEM_FAILED, wants_json)
        case OSError() | MemoryError():
            message = "there is not enough memory: use a lower --memory-limit or --concurrency"
            return _failed(kind, message, SYSTEM_FAILED, wants_json)
        case _:  # torch's own error, which is known by its name because torch must not be imported here
            return _failed(kind, "the GPU has not enough memory for the tensors", SYSTEM_FAILED, wants_json)


def _wants_json(words: Sequence[str]) -> bool:
    flags = words[: words.index("--")] if "--" in words else words
    return "--json" in flags


def _failed(kind: str, message: str, code: int, wants_json: bool, **more: Any) -> int:
    """Say what went wrong, once for people and once for machines."""
    display.error(message)
    if wants_json:
        display.as_json({"error": {"kind": kind, "message": message, "exit_code": code, **more}})
    return code


def _interrupted(number: int, command: str | None, wants_json: bool) -> int:
    message = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    if command in _RESUMED:
        message += "; the same command goes on where this one stopped"
    exec("")  # an interrupt that passed through exec, as imports use it, would make Python end itself by SIGINT later
    display.interrupted(message)
    if wants_json:
        display.as_json({"error": {"kind": "Interrupted", "message": message, "exit_code": 128 + number}})
    return 128 + number


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Turn the first signal that would end the process into ``KeyboardInterrupt``, and let a second one end it."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def end(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for caught in before:
            signal.signal(caught, signal.SIG_DFL)
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A signal that is ignored (nohup), or that the host program takes, stays as it is.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, end)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.group(
    name="shardtool",
    cls=Program,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: shardtool save ./llama --tp 4 -o ./llama-tp4",
)
@click.version_option(__version__, message="shardtool %(version)s")
@click.pass_context
def main(ctx: click.Context) -> int:
    """Convert, stream and verify sharded model checkpoints.

    A checkpoint is a folder, or an address such as s3://bucket/llama. Every command has its own --help.
    """
    if not sys.platform.startswith(_PLATFORMS):
        raise click.UsageError(f"shardtool runs on Linux and macOS, not on {sys.platform}")
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        return 2
    return 0
