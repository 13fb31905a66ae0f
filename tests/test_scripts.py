"""The scripts that people run first: the demo shows every command, and the set-up says what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file())


def checkout(folder: Path) -> Path:
    """A copy of the scripts, so that they make their folders there and not in this tree."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    return folder


def tool(folder: Path, name: str, text: str) -> None:
    """A command that a script finds first on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def run(root: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of a copy."""
    return subprocess.run(
        [str(root / "scripts" / script)],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_run_and_says_what_it_does(path: Path) -> None:
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")
    assert "set -euo pipefail" in lines


@pytest.mark.slow
def test_the_demo_shows_every_command_and_how_to_serve(tmp_path: Path) -> None:
    """It works in its own folder, empties what an earlier run left there, and uses the environment that is active."""
    root, tools = checkout(tmp_path), tmp_path / "bin"
    tool(tools, "shardtool", f'exec {sys.executable} -m shardtool "$@"')
    tool(tools, "python", f'exec {sys.executable} "$@"')
    (root / ".demo").mkdir()
    (root / ".demo" / "old").touch()
    path = f"{tools}:{os.environ['PATH']}"
    done = run(root, "demo", VIRTUAL_ENV=sys.prefix, PATH=path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout
    for command in ("save", "verify", "load", "reshard", "merge", "bench", "inspect"):
        assert f"\n$ shardtool {command} " in done.stdout, done.stdout
    assert "./llama-tp4: OK (compared with ./llama" in done.stdout
    assert "./llama-merged: OK (compared with ./llama" in done.stdout
    assert re.search(r"model-rank-1-part-0.safetensors: FAILED \(tensor '\S+' differs from its digest", done.stdout)
    assert done.stdout.rstrip().splitlines()[-1] == (
        f"  vllm serve {root}/.demo/llama-tp4 --load-format sharded_state --tensor-parallel-size 4"
    )
    assert (root / ".demo" / "llama-tp4" / "shardtool.json").exists()
    assert not (root / ".demo" / "old").exists()
    assert not (root / ".venv").exists()
    shutil.rmtree(root / ".demo")


def test_the_set_up_says_which_python_is_needed(tmp_path: Path) -> None:
    root, tools = checkout(tmp_path), tmp_path / "bin"
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        tool(tools, name, "exit 1")
    done = run(root, "setup", PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert done.stdout.startswith("scripts/setup: Python 3.11 or newer is needed")
    assert not (root / ".venv").exists()


def test_the_set_up_says_how_to_get_a_missing_venv_module(tmp_path: Path) -> None:
    root, tools = checkout(tmp_path), tmp_path / "bin"
    tool(tools, "python3", '[ "$1" = -c ]')
    done = run(root, "setup", PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "install its venv module" in done.stdout
    assert not (root / ".venv").exists()


def test_the_set_up_has_nothing_to_do_where_all_is_installed(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    tool_folder = root / ".venv" / "bin"
    tool_folder.mkdir(parents=True)
    tool(tool_folder, "python", '[ "$1" = -c ]')  # what the script asks of it, and nothing else, succeeds
    stamp = subprocess.run(
        "cat pyproject.toml constraints.txt | cksum", shell=True, cwd=root, capture_output=True, text=True, check=True
    )
    (root / ".venv" / ".stamp").write_text(stamp.stdout)
    done = run(root, "setup")
    assert (done.returncode, done.stdout) == (0, "")
