"""Starting is cheap: importing shardtool or asking for help loads none of the heavy libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"boto3", "botocore", "numpy", "rich", "safetensors", "torch", "transformers"}


def loaded_by(*arguments: str) -> set[str]:
    """The top-level packages that a fresh interpreter imports while it runs."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = (line for line in run.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("-c", "import shardtool"), id="import shardtool"),
        pytest.param(("-c", "import shardtool; dir(shardtool)"), id="dir(shardtool)"),
        pytest.param(("-m", "shardtool", "--help"), id="shardtool --help"),
        pytest.param(("-m", "shardtool", "--version"), id="shardtool --version"),
    ],
)
def test_starting_loads_no_heavy_library(arguments: tuple[str, ...]) -> None:
    loaded = loaded_by(*arguments)
    assert "shardtool" in loaded
    assert loaded & HEAVY == set()


def test_the_measurement_would_notice_a_heavy_library() -> None:
    assert "numpy" in loaded_by("-c", "import shardtool, numpy")
