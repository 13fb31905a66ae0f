"""What every server of the tests is: a process on a free port of the loopback interface, which ends with the tests."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
STARTS_WITHIN = 120.0
_FIRST_PORT, _EACH, _WORKERS = 20_000, 1500, 8
_numbers = itertools.count(os.getpid())


def free_port() -> int:
    """A port that nobody listens on now, and that nobody else gets before a server does.

    It lies below those that systems choose from for connections, and each worker of a test run has a range of its own,
    of which it takes one after the other.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % _WORKERS
    for _ in range(_EACH):
        port = _FIRST_PORT + worker * _EACH + next(_numbers) % _EACH
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    pytest.fail(f"none of {_EACH} ports is free")


def program(name: str, package: str) -> str:
    """The path of a program. Where it is missing the test is skipped, which CI does not let pass."""
    beside = os.path.dirname(sys.executable)
    folders = (beside, os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"{name} is not installed: {package}")
    return found


@contextmanager
def running(command: Sequence[str], port: int, environ: Mapping[str, str] = {}) -> Iterator[Path]:
    """A server in a session of its own until the block ends, ready when it listens; gives its empty folder."""
    with tempfile.TemporaryDirectory(prefix="server-") as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environ, "TMPDIR": folder},
                cwd=folder,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            wait_for(process, port, log)
            yield Path(folder)
        finally:
            stop(process)


def _end_with_parent() -> None:
    """A server of tests that were killed ends with them (PR_SET_PDEATHSIG)."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"the server did not start; the end of its log:\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        else:
            break
    process.wait()
