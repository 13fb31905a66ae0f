"""Our side of a trace: a folder for the engine to look at, its process, and its answer as a layout.

The folder is a *skeleton*: config.json, what lies beside the weights, and one safetensors file with the header of all
source tensors and none of their bytes. An engine that looks into a checkpoint before it builds the model (quantized
modules, tied heads, dtypes) sees there what the checkpoint has, whatever store it lies in and whatever its files are.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

from shardtool import errors, header, recipe_json
from shardtool.dtypes import DType
from shardtool.errors import UnsupportedModel, UsageError
from shardtool.layouts.base import Parallel
from shardtool.layouts.file import FileLayout, Traced
from shardtool.mosaic import Logical

PROGRESS = re.compile(r"shardtool-progress (\d{1,9}) of (\d{1,9})")
"""The child's lines of progress: ranks done, of all."""
TIMEOUT = 4 * 3600.0
"""Seconds that an engine gets."""
_TITLES = {"vllm": "vLLM", "sglang": "SGLang"}
_LOOK = """
import importlib.metadata, importlib.util, sys
if importlib.util.find_spec(sys.argv[1]) is None:
    sys.exit(1)
try:
    print(importlib.metadata.version(sys.argv[1]))
except importlib.metadata.PackageNotFoundError:
    pass
"""
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from shardtool.tracing.child import main; sys.exit(main(*sys.argv[2:]))"
)


Progress = Callable[[int, int], None]
"""Is told how many ranks are done, of how many."""


def _no_side_files(_folder: Path) -> None:
    pass


def _silent(_done: int, _total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Job:
    """What to trace. ``side`` writes the files beside the weights into a folder; ``dtype`` is torch's name.

    ``engine_version``: the version that the engine must have; ``0.27`` stands for ``0.27.1`` too.
    """

    engine: str
    uri: str
    config: str
    tensors: Mapping[str, Logical]
    parallels: tuple[Parallel, ...]
    side: Callable[[Path], None] = _no_side_files
    dtype: str | None = None
    trust_remote_code: bool = False
    moe_backend: str | None = None
    engine_version: str | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """What every rank of an engine's model holds at some sizes, by name."""

    engine_version: str
    parallel: Parallel
    ranks: tuple[Mapping[str, Logical], ...]


def available(engine: str, python: str | None = None) -> bool:
    """Whether an engine is installed, here or for another interpreter."""
    return _installed(engine, _program(python)) is not None


def _program(python: str | None) -> str | None:
    """The path of another interpreter, which is run in a folder of its own. A link stays: it may be that of a venv."""
    if python is None:
        return None
    found = shutil.which(python)
    if found is None:
        raise UsageError(f"--engine-python {python!r:.200}: there is no such program")
    return str(Path(found).absolute())


def _installed(engine: str, python: str | None) -> str | None:
    """The version of an engine that its package says, empty where it says none; None where it is not installed."""
    if python is not None:
        with contextlib.suppress(OSError):
            looked = subprocess.run(
                [python, "-c", _LOOK, engine], check=False, capture_output=True, text=True, errors="replace"
            )
            return looked.stdout.strip() if looked.returncode == 0 else None
        return None
    if importlib.util.find_spec(engine) is None:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(engine)
    return ""


def _check_version(job: Job, found: str, python: str | None) -> None:
    """Refuse an engine that is not of the version that was said."""
    said, found = job.engine_version, found.partition("+")[0]
    if said and found and said.split(".") != found.split(".")[: said.count(".") + 1]:
        where = "this Python" if python is None else python
        raise UsageError(
            f"{where} has {_TITLES[job.engine]} {found}, not {said}: leave --engine-version out, or name a Python that "
            f"has it with --engine-python"
        )


def trace(
    job: Job, *, python: str | None = None, progress: Progress | None = None, timeout: float = TIMEOUT
) -> FileLayout:
    """The layout that an engine's loader shows. Raises ``UnsupportedModel`` with what the engine said."""
    out = _done(job, "trace", python, progress, timeout)
    version = str(out["engine_version"])
    reason = f"{_TITLES[job.engine]} {version} does not load it"
    traced = []
    for entry, sizes in zip(out["layouts"], job.parallels, strict=True):
        tied = entry.get("tied")
        traced.append(
            Traced(
                sizes,
                recipe_json.from_json(entry["recipe"], f"the trace of {job.uri}"),
                dropped=dict.fromkeys(entry["unused"], reason),
                amendments=entry["amendments"],
                aliases=entry["aliases"],
                uninitialised=entry["uninitialised"],
                untied=bool(entry["untied"]),
                tied=None if tied is None else (tied[0], tied[1]),
            )
        )
    return FileLayout(
        job.engine,
        version,
        str(out["class"]),
        DType[out["dtype"]],
        job.tensors,
        tuple(traced),
        job.moe_backend,
        f"the trace of {job.uri}",
    )


def held(
    job: Job, *, python: str | None = None, progress: Progress | None = None, timeout: float = TIMEOUT
) -> tuple[Held, ...]:
    """What an engine builds for a sharded checkpoint: only constructed, nothing is loaded."""
    out = _done(job, "shapes", python, progress, timeout)
    return tuple(
        Held(
            str(out["engine_version"]),
            sizes,
            tuple(
                {name: Logical(DType[dtype], tuple(shape)) for name, (dtype, shape) in rank.items()}
                for rank in entry["ranks"]
            ),
        )
        for entry, sizes in zip(out["layouts"], job.parallels, strict=True)
    )


def _done(job: Job, do: str, python: str | None, progress: Progress | None, timeout: float) -> dict[str, Any]:
    """The child's answer."""
    python = _program(python)
    installed = _installed(job.engine, python)
    if installed is None:
        where = "here" if python is None else f"for {python}"
        raise UsageError(
            f"{_TITLES[job.engine]} is not installed {where}: install it, or name a Python that has it with "
            f"--engine-python"
        )
    _check_version(job, installed, python)
    with TemporaryDirectory(prefix="shardtool-trace-") as scratch:
        folder = Path(scratch, "model")
        skeleton(job, folder, "model.safetensors" if do == "trace" else "model-rank-0-part-0.safetensors")
        asked = Path(scratch, "JOB.json")
        answer = Path(scratch, "OUT.json")
        asked.write_text(
            json.dumps(
                {
                    "do": do,
                    "engine": job.engine,
                    "folder": str(folder),
                    "dtype": job.dtype,
                    "trust_remote_code": job.trust_remote_code,
                    "moe_backend": job.moe_backend,
                    "parallels": [sizes.to_json() for sizes in job.parallels],
                }
            ),
            encoding="utf-8",
        )
        command = [python or sys.executable, "-c", _BOOT, str(_path(Path(scratch))), str(asked), str(answer)]
        code, said = _watched(command, scratch, progress or _silent, timeout)
        try:
            out: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UnsupportedModel(_crashed(job, code, said, timeout)) from None
    if "error" in out:
        raise _error(job, out["error"])
    _check_version(job, str(out["engine_version"]), python)  # its own word, where its package had none
    return out


def skeleton(job: Job, folder: Path, weights: str) -> None:
    """Write what the engine looks at."""
    folder.mkdir(parents=True)
    job.side(folder)
    for path in folder.rglob("*.safetensors*"):
        path.unlink()
    (folder / "config.json").write_text(job.config, encoding="utf-8")
    tensors = [(name, tensor.dtype, tensor.shape) for name, tensor in job.tensors.items()]
    text = header.encode(tensors)
    size = len(text) + sum(tensor.dtype.nbytes(_count(tensor.shape)) for tensor in job.tensors.values())
    with (folder / weights).open("wb") as file:
        file.write(text)
        file.truncate(size)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _path(scratch: Path) -> Path:
    """A folder with this package alone, for a Python whose other packages must stay its own."""
    folder = scratch / "path"
    folder.mkdir()
    package = Path(__file__).resolve().parents[1]
    try:
        (folder / "shardtool").symlink_to(package, target_is_directory=True)
    except OSError:
        shutil.copytree(package, folder / "shardtool")
    return folder


def _watched(command: Sequence[str], cwd: str, progress: Progress, timeout: float) -> tuple[int, Sequence[str]]:
    """Run a process to its end, or for so long. -> (exit code, its last lines)."""
    said: deque[str] = deque(maxlen=200)
    with subprocess.Popen(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        timer = Timer(timeout, _kill, [process])
        timer.start()
        try:
            for line in _lines(process):
                if found := PROGRESS.fullmatch(line):
                    progress(int(found[1]), int(found[2]))
                else:
                    said.append(line)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                _kill(process)
    return code, said


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip()


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _crashed(job: Job, code: int, said: Sequence[str], timeout: float) -> str:
    title = _TITLES[job.engine]
    last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
    if code == -signal.SIGKILL:
        why = f"out of memory, or after {timeout:.0f} seconds"
        return f"{title} was ended while its loader was traced, {why}: {last[:300]}"
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"{title} ended {how} while its loader was traced: {last[:300]}"


def _error(job: Job, error: Mapping[str, Any]) -> errors.ShardtoolError:
    """The child's error as ours."""
    kind, message = str(error["kind"]), str(error["message"])
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, errors.ShardtoolError):
        return known(message)
    if kind != "engine":
        return UnsupportedModel(f"{_TITLES[job.engine]} loads this model in a way that cannot be traced: {message}")
    if "trust_remote_code" in message and not job.trust_remote_code:
        return UnsupportedModel(f"{job.uri} has code of its own, which runs only with --trust-remote-code")
    return UnsupportedModel(f"{_TITLES[job.engine]} cannot load this model: {essence(message)}")


def essence(message: str) -> str:
    """The line of an exception's text that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in lines:  # pydantic lists what it found below a first line that only counts
        if line.startswith(("Value error, ", "Assertion failed, ")):
            return re.sub(r" \[type=\w+, input_value=.*$", "", line.partition(", ")[2])[:500]
    return lines[0][:500] if lines else "it does not say why"
