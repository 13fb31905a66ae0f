"""Operations in processes of their own: what memory they take, how they fail, and what is left when they are killed.

``run`` starts a child that performs one operation of the library and says how it went::

    run("save", model, out, tp=2, memory_limit="16MiB")          -> Outcome(value=..., over=..., torch=False, ...)
    run("save", model, out, tp=2, kill=At(progress=0.6))         killed by SIGKILL once 60 % of the bytes are done
    run("save", model, out, tp=2, kill=At(change=7))             killed just before its 7th change of the file system
    run("save", model, "s3://...", tp=2, kill=At(request=7))     killed just before its 7th request

Changes and requests are counted by an audit hook, so that a kill falls between any two system calls that matter, inside
``commit`` too, and the same number is the same place in every run with one reader.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT = 120
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.link", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


@dataclass(frozen=True)
class At:
    """Where a child kills itself: a share of the bytes, or before the n-th change or request (from 1)."""

    progress: float | None = None
    change: int | None = None
    request: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a child. ``over``: its peak of resident memory less that right after the imports, in bytes."""

    status: int
    value: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    message: str = ""
    exit_code: int = 0
    needed: int = 0
    over: int = 0
    torch: bool = False
    changes: int = 0
    requests: int = 0
    threads: tuple[str, ...] = ()

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL


def start(
    operation: str,
    *args: Any,
    kill: At | None = None,
    **kwargs: Any,
) -> subprocess.Popen[str]:
    """Start a child that performs an operation."""
    job = {
        "operation": operation,
        "args": [os.fspath(a) for a in args],
        "kwargs": {k: os.fspath(v) if isinstance(v, Path) else v for k, v in kwargs.items()},
        "kill": dataclasses.asdict(kill) if kill else {},
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.processes", json.dumps(job)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(child: subprocess.Popen[str]) -> Outcome:
    """Wait for a child. One that neither reports nor was killed is a failure of the test."""
    try:
        out, err = child.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise AssertionError(f"the child did not end within {TIMEOUT} seconds\n{err[-3000:]}") from None
    if child.returncode == -signal.SIGKILL:
        return Outcome(child.returncode)
    assert child.returncode == 0, f"the child ended with {child.returncode}:\n{err[-3000:]}"
    said = json.loads(out.splitlines()[-1])
    said["threads"] = tuple(said["threads"])
    return Outcome(0, **said)


def run(operation: str, *args: Any, **options: Any) -> Outcome:
    """Start a child and wait for it."""
    return finish(start(operation, *args, **options))


def cli(*args: Any, file_size: int | None = None, mortal: bool = False) -> subprocess.CompletedProcess[str]:
    """The command line, as people start it. ``mortal``: without root's power to ignore permissions."""

    def limit() -> None:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    command = [sys.executable, "-W", "error", "-m", "shardtool", *map(os.fspath, args)]
    if mortal and os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    return subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, timeout=TIMEOUT, check=False, preexec_fn=limit
    )


# What the child does.


class _Watch:
    """Counts changes and requests, and kills the process at the chosen one."""

    def __init__(self, kill: dict[str, Any]) -> None:
        self.changes = 0
        self.requests = 0
        self._kill = kill
        self._lock = threading.Lock()

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
            with self._lock:
                self.changes += 1
                self._at("change", self.changes)
        elif event in ("http.client.send", "shardtool.request"):  # botocore's, and ours
            with self._lock:
                self.requests += 1
                self._at("request", self.requests)

    def progress(self, done: int, total: int) -> None:
        share = self._kill.get("progress")
        if share is not None and done >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    def _at(self, what: str, number: int) -> None:
        if self._kill.get(what) == number:
            os.kill(os.getpid(), signal.SIGKILL)


def _imported(operation: str, args: list[str]) -> Callable[..., Any]:
    """The operation, with what it needs imported and a thread started once."""
    import importlib

    import blake3  # noqa: F401
    import numpy  # noqa: F401
    import xxhash  # noqa: F401

    module = importlib.import_module("shardtool.ops." + {"stream": "load"}.get(operation, operation))
    if operation in ("stream", "measure"):
        import shardtool.sinks.tensor  # noqa: F401
    if remote := [a for a in args if a.startswith("s3://")]:
        from shardtool.stores import open_store

        with open_store(remote[0]) as store:
            store.exists("nothing")
    idle = threading.Thread(target=int)
    idle.start()
    idle.join()
    return getattr(module, operation)


def _perform(operation: str, call: Callable[..., Any], args: list[str], kwargs: dict[str, Any]) -> dict[str, Any]:
    if operation == "stream":
        return {"bytes": sum(tensor.nbytes for _, tensor in call(*args, **kwargs))}
    found = call(*args, **kwargs)
    names = (
        "written",
        "kept",
        "complete",
        "least_memory",
        "bytes_to_write",
        "bytes_to_read",
        "ok",
        "depth",
        "bytes",
        "tensors",
    )
    return {name: getattr(found, name) for name in names if hasattr(found, name)}


def _main(text: str) -> None:
    from shardtool.budget import peak_memory
    from shardtool.errors import ShardtoolError

    job = json.loads(text)
    operation, args, kwargs = job["operation"], job["args"], job["kwargs"]
    call = _imported(operation, args)
    watch = _Watch(job["kill"])
    sys.addaudithook(watch.hook)
    if "progress" in job["kill"] and job["kill"]["progress"] is not None:
        kwargs["progress"] = watch.progress
    before = peak_memory()
    said: dict[str, Any] = {}
    try:
        said["value"] = _perform(operation, call, args, kwargs)
    except ShardtoolError as error:
        said.update(
            error=type(error).__name__,
            message=str(error),
            exit_code=error.exit_code,
            needed=getattr(error, "needed", 0),
        )
    said["over"] = peak_memory() - before
    said["torch"] = "torch" in sys.modules
    said["changes"], said["requests"] = watch.changes, watch.requests
    said["threads"] = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    print(json.dumps(said))


if __name__ == "__main__":
    _main(sys.argv[1])
