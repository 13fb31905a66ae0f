"""The command line's streams and signals: pipes that close, disks that are full, Ctrl-C, and terminals."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.commands import RANK_1, Ended, command, environment, here


def test_whoever_stops_reading_ends_the_command_in_silence(shards):
    process = subprocess.Popen(
        command("inspect", "tp2", "--tensors", "*"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_stdout_is_told(shards, unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("inspect", "tp2"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment() | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (5, "shardtool: error: No space left on device\n")


def begin(folder: Path, files: int, *words: str | Path) -> subprocess.Popen[str]:
    """Start a command that writes, and wait until it has written something to so many files."""
    process = subprocess.Popen(
        command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    while process.poll() is None and sum(map(has_begun, folder.glob(".shardtool/tmp/*.tmp"))) < files:
        time.sleep(0.002)
    return process


def has_begun(path: Path) -> bool:
    """Whether the length of the header has been written."""
    try:
        with path.open("rb") as file:
            return file.read(8) > bytes(8) and path.stat().st_size > 1 << 20
    except FileNotFoundError:
        return False


def finish(process: subprocess.Popen[str]) -> Ended:
    """Wait for a command that was started."""
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err)


@pytest.mark.parametrize(("number", "words"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_ends_a_save_cleanly_and_the_next_run_goes_on(number, words, as_json, large_llama, tmp_path):
    out = tmp_path / "out"
    slowly = ["--memory-limit", "0", "--concurrency", "1", *(["--json"] if as_json else [])]
    process = begin(out, 2, "save", large_llama, "--tp", "2", "-o", out, *slowly)
    process.send_signal(number)
    ended = finish(process)
    message = f"{words}; the same command goes on where this one stopped"
    assert (ended.code, ended.err) == (128 + number, f"shardtool: {message}\n")
    if as_json:
        assert ended.json == {"error": {"kind": "Interrupted", "message": message, "exit_code": 128 + number}}
    else:
        assert ended.out == ""
    left = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["job.json"]
    assert here("inspect", out).code == 4


def said_on(terminal: int, until: bytes | None = None) -> bytes:
    """What a terminal shows, to the end or until something comes up."""
    said = b""
    while until is None or until not in said:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # Linux: nobody holds the other end any more
            break
        if not piece:
            break
        said += piece
    return said


def start_on_a_terminal(words: Sequence[str | Path]) -> tuple[subprocess.Popen[bytes], int]:
    """A process whose stdout and stderr are a terminal, and our end of that."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(*words), stdout=theirs, stderr=theirs, env=environment() | {"TERM": "xterm"})
    os.close(theirs)
    return process, ours


def on_a_terminal(words: Sequence[str | Path]) -> tuple[int, str]:
    """Run a command line with stdout and stderr on a terminal."""
    process, terminal = start_on_a_terminal(words)
    said = said_on(terminal)
    os.close(terminal)
    return process.wait(), said.decode()


@pytest.mark.parametrize("name", ["load", "verify"])
def test_an_interrupt_of_a_command_that_writes_nothing_is_one_line_below_the_bar(name, large_llama, shards):
    against = ["--against", large_llama] if name == "verify" else []
    process, terminal = start_on_a_terminal([name, large_llama, *against, "--memory-limit", "0", "--concurrency", "1"])
    said_on(terminal, until=b"%|")
    process.send_signal(signal.SIGINT)
    said = said_on(terminal).decode()
    os.close(terminal)
    assert process.wait() == 130
    assert said.rpartition("\r")[0].endswith("shardtool: interrupted")
    assert "Traceback" not in said


def test_a_terminal_shows_progress_and_tables(work):
    code, said = on_a_terminal(["save", "llama", "--tp", "2", "-o", "tp2"])
    assert code == 0
    assert "save:   0%|" in said
    assert "B/s]" in said
    assert re.search(r"─{20}", said)
    assert RANK_1 in said


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_quiet_and_json_show_no_progress_on_a_terminal(work, flag):
    code, said = on_a_terminal(["save", "llama", "--tp", "2", "-o", "tp2", flag])
    assert code == 0
    assert "B/s]" not in said
