"""Our side of a trace: the skeleton, the process and its end, the engine's words as one sentence."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from shardtool import header
from shardtool.dtypes import DType
from shardtool.errors import PlanError, UnsupportedModel, UsageError
from shardtool.layouts.base import Parallel
from shardtool.mosaic import Logical
from shardtool.tracing import parent

TENSORS = {"a": Logical(DType.BF16, (1 << 20, 1 << 20)), "b": Logical(DType.F8_E4M3, (3,))}


def job(**more: object) -> parent.Job:
    """A job for an engine that is never installed."""
    return parent.Job("vllm", "some/model", '{"architectures": ["X"]}', TENSORS, (Parallel(2),), **more)  # type: ignore[arg-type]


def watched(code: str, timeout: float = 60) -> tuple[int, list[str], list[tuple[int, int]]]:
    """A Python process under watch: exit code, what it said, its progress."""
    told: list[tuple[int, int]] = []
    code_, said = parent._watched([sys.executable, "-c", code], ".", lambda *done: told.append(done), timeout)
    return code_, list(said), told


def test_the_skeleton_has_every_header_and_no_bytes(tmp_path: Path) -> None:
    def side(folder: Path) -> None:
        (folder / "code.py").write_text("pass")
        (folder / "old.safetensors").write_text("?")

    folder = tmp_path / "model"
    parent.skeleton(job(side=side), folder, "model.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == ["code.py", "config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == {"architectures": ["X"]}
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    assert size > 1 << 41
    assert weights.stat().st_blocks * 512 < 1 << 20
    with weights.open("rb") as file:
        first = file.read(8)
        entries = header.parse(file.read(header.length(first, size, "x")), size, "x").entries
    assert {entry.name: Logical(entry.dtype, entry.shape) for entry in entries} == TENSORS


def test_a_process_says_how_far_it_is() -> None:
    code = "print('noise'); print('shardtool-progress 1 of 2'); print('shardtool-progress 2 of x')"
    assert watched(code) == (0, ["noise", "shardtool-progress 2 of x"], [(1, 2)])


def test_only_the_last_lines_of_a_noisy_process_are_kept() -> None:
    _, said, _ = watched("for i in range(100_000): print(i)")
    assert said[-1] == "99999"
    assert len(said) <= 200


def test_a_process_that_hangs_is_ended_with_those_that_it_started() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)'])"
    start = time.monotonic()
    code_, _, _ = watched(code, timeout=1)
    assert code_ == -9
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (-11, "vLLM ended by signal 11 while its loader was traced: last words"),
        (-9, "vLLM was ended while its loader was traced, out of memory, or after 5 seconds: last words"),
        (3, "vLLM ended with exit code 3 while its loader was traced: last words"),
    ],
)
def test_a_crash_is_one_sentence_with_the_last_words(code: int, sentence: str) -> None:
    assert parent._crashed(job(), code, ["noise", "last words", " "], 5) == sentence
    assert parent._crashed(job(), code, [], 5).endswith("it said nothing")


@pytest.mark.parametrize(
    ("kind", "message", "error", "sentence"),
    [
        ("engine", "ValueError: no such\nmodel", UnsupportedModel, "vLLM cannot load this model: ValueError: no such"),
        ("Refused", "it sorts", UnsupportedModel, "vLLM loads this model in a way that cannot be traced: it sorts"),
        (
            "engine",
            "OSError: it contains code\nPlease pass trust_remote_code=True",
            UnsupportedModel,
            "some/model has code of its own, which runs only with --trust-remote-code",
        ),
        ("PlanError", "not 3", PlanError, "not 3"),
    ],
)
def test_the_childs_errors_are_ours(kind: str, message: str, error: type[Exception], sentence: str) -> None:
    found = parent._error(job(), {"kind": kind, "message": message})
    assert type(found) is error
    assert str(found) == sentence


def test_of_a_list_of_errors_the_first_is_quoted() -> None:
    text = (
        "ValidationError: 1 validation error for ModelConfig\n  Value error, The model has 12 heads "
        "[type=value_error, input_value=ArgsKwargs((), {...}), input_type=ArgsKwargs]\n    For further information"
    )
    assert parent.essence(text) == "The model has 12 heads"
    assert parent.essence("") == "it does not say why"


def test_an_engine_that_is_not_installed_is_refused_with_what_to_do(tmp_path: Path) -> None:
    python = tmp_path / "python"
    with pytest.raises(UsageError, match=r"--engine-python '.*python': there is no such program"):
        parent.trace(job(), python=str(python))
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(UsageError, match=r"vLLM is not installed for .*--engine-python"):
        parent.held(job(), python=str(python))


def test_a_child_that_ends_without_an_answer_is_an_error(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nif [ "$#" -gt 3 ]; then echo sorry; exit 7; fi\n')
    python.chmod(0o755)
    with pytest.raises(UnsupportedModel, match=r"vLLM ended with exit code 7 .*: sorry"):
        parent.trace(job(), python=str(python))


def test_the_package_is_given_to_another_python_alone(tmp_path: Path) -> None:
    folder = parent._path(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["shardtool"]
    assert (folder / "shardtool" / "tracing" / "child.py").exists()


def interpreter(folder: Path, version: str = "") -> Path:
    """A Python of its own folder that has a package vllm of some version, or of none, which can do nothing."""
    packages = folder / "packages"
    (packages / "vllm").mkdir(parents=True)
    (packages / "vllm" / "__init__.py").write_text("")
    if version:
        (packages / f"vllm-{version}.dist-info").mkdir()
        (packages / f"vllm-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("said", ["0.27", "0.3", "0.32.1", "0.32.0.1", "1"])
def test_an_engine_of_another_version_is_refused_before_it_is_started(said: str, tmp_path: Path) -> None:
    python = interpreter(tmp_path, "0.32.0+cpu")
    with pytest.raises(UsageError, match=rf"{python} has vLLM 0\.32\.0, not {said}: .*--engine-version"):
        parent.trace(job(engine_version=said), python=str(python), timeout=0)


@pytest.mark.parametrize("said", ["0", "0.32", "0.32.0", None])
def test_a_version_is_said_by_its_first_numbers(said: str | None, tmp_path: Path) -> None:
    python = interpreter(tmp_path, "0.32.0+cpu")
    with pytest.raises(
        UnsupportedModel, match="vLLM cannot load this model"
    ):  # it was started, and is an empty package
        parent.trace(job(engine_version=said), python=str(python))


def test_an_engine_whose_package_says_no_version_says_it_itself(tmp_path: Path) -> None:
    python = tmp_path / "python"
    answer = '{"engine_version": "0.32.0", "class": "X", "dtype": "BF16", "layouts": []}'
    python.write_text(f'#!/bin/sh\nif [ "$#" -gt 3 ]; then echo \'{answer}\' > "$5"; fi\n')
    python.chmod(0o755)
    with pytest.raises(UsageError, match=r"has vLLM 0\.32\.0, not 0\.27"):
        parent.trace(job(engine_version="0.27"), python=str(python))


def test_an_interpreter_is_found_by_a_relative_path_and_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter(tmp_path / "bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for said in ("bin/python", "./bin/../bin/python", "python"):
        assert parent.available("vllm", said)
        with pytest.raises(UnsupportedModel, match="vLLM cannot load this model"):
            parent.trace(job(), python=said)


def test_a_link_to_an_interpreter_is_not_followed(tmp_path: Path) -> None:
    """What it points to does not have the packages of the environment that it lies in."""
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert parent._program(str(link)) == str(link)
