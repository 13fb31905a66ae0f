"""What operations take of memory: the limit and at most 16 MiB more, measured from outside, in processes of their own.

The model has 236 MiB; its largest tensors (32 MiB) are larger than most limits here, and all of it is larger than any.
A process's peak (VmHWM) is compared with what it was right after the imports that its command needs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import models
from shardtool.ops.inspect import inspect
from tests.processes import Outcome, run

MIB = 1 << 20
SLACK = 16 * MIB
LARGEST = 32 * MIB


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the model (``hf``) and its shards at tp 8 (``tp8``), gone afterwards."""
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        made = Path(folder)
        models.write(made / "hf", models.of_size(236 * MIB, vocab=8192), most=100 * MIB)
        assert run("save", made / "hf", made / "tp8", tp=8).error == ""
        yield made


@pytest.fixture
def out(shelf: Path) -> Iterator[Path]:
    """Where a test writes; emptied at once, for the sake of the disk."""
    yield shelf / "out"
    shutil.rmtree(shelf / "out", ignore_errors=True)


def assert_bounded(found: Outcome, limit: int) -> None:
    assert not found.error, found.message
    assert found.over <= limit + SLACK, f"{found.over / MIB:.1f} MiB over the imports, the limit was {limit / MIB:.1f}"


@pytest.mark.parametrize("limit", [32 * MIB, 20 * MIB])
def test_save_stays_within_its_limit(shelf: Path, out: Path, limit: int) -> None:
    """A limit below the largest tensor is enough, and torch is not loaded."""
    found = run("save", shelf / "hf", out, tp=8, memory_limit=limit)
    assert_bounded(found, limit)
    assert found.value["complete"]
    assert not found.torch


@pytest.mark.parametrize(("operation", "options"), [("reshard", {"tp": 4}), ("merge", {})])
def test_converting_shards_stays_within_its_limit(
    shelf: Path, out: Path, operation: str, options: dict[str, int]
) -> None:
    """Half of the largest tensor is enough, the check of the input's digests included."""
    found = run(operation, shelf / "tp8", out, memory_limit=16 * MIB, **options)
    assert_bounded(found, 16 * MIB)
    assert found.value["complete"]
    assert not found.torch


@pytest.mark.parametrize("against", [None, "hf"])
@pytest.mark.parametrize("limit", [16 * MIB, 0])
def test_verify_stays_within_its_limit(shelf: Path, against: str | None, limit: int) -> None:
    """Digests and comparisons go through a few buffers, however large the tensors; 0 is the least that does."""
    options = {"against": shelf / against} if against else {}
    found = run("verify", shelf / "tp8", memory_limit=limit, **options)
    assert_bounded(found, limit or 2 * MIB)
    assert found.value["ok"]
    assert found.value["depth"] == ("equality" if against else "digests")
    assert not found.torch


@pytest.mark.parametrize(
    ("operation", "source", "options"), [("save", "hf", {"tp": 8}), ("reshard", "tp8", {"tp": 2}), ("merge", "tp8", {})]
)
def test_no_memory_means_the_least_that_does(
    shelf: Path, out: Path, operation: str, source: str, options: dict[str, int]
) -> None:
    """A limit of 0 is the number that a dry run names as the least, which is small."""
    found = run(operation, shelf / source, out, memory_limit=0, **options)
    assert_bounded(found, found.value["least_memory"])
    assert found.value["least_memory"] < 2 * MIB


def test_inspect_reads_headers_only(shelf: Path) -> None:
    """It needs no torch and next to no memory."""
    found = run("inspect", shelf / "tp8")
    assert_bounded(found, 0)
    assert not found.torch
    assert inspect(shelf / "tp8").tp == 8


@pytest.mark.parametrize("limit", [64 * MIB, 16 * MIB, 0])
def test_streaming_stays_within_its_limit(shelf: Path, limit: int) -> None:
    """What is read ahead is limited. The tensor at hand is the caller's, and one that does not fit comes in alone."""
    found = run("stream", shelf / "hf", memory_limit=limit)
    alone = LARGEST if limit < LARGEST else 0
    assert_bounded(found, limit + LARGEST + alone)
    assert found.value["bytes"] > 230 * MIB


def test_streaming_a_rank_stays_within_its_limit(shelf: Path) -> None:
    """Small tensors are bounded as large ones are, and their digests are checked in place."""
    found = run("stream", shelf / "tp8", rank=0, memory_limit=8 * MIB)
    assert_bounded(found, 8 * MIB + 6 * MIB)


@pytest.mark.parametrize(("part", "limit"), [("1GiB", 32 * MIB), ("7MiB", 48 * MIB)])
def test_saving_to_s3_stays_within_its_limit(shelf: Path, bucket: str, part: str, limit: int) -> None:
    """Buffers in which parts of uploads are gathered come out of the limit, and objects that go in one request too."""
    found = run("save", shelf / "hf", f"s3://{bucket}/tp4", tp=4, memory_limit=limit, max_part_size=part)
    assert_bounded(found, limit)
    assert found.value["complete"]


@pytest.mark.parametrize(
    ("operation", "source", "options"),
    [
        ("save", "hf", {"tp": 8}),
        ("reshard", "tp8", {"tp": 4}),
        ("merge", "tp8", {}),
        ("verify", "tp8", {}),
        ("verify", "tp8", {"against": "hf"}),
        ("stream", "tp8", {"rank": 3}),
    ],
)
def test_a_limit_that_is_too_small_is_refused_with_one_that_is_not(
    shelf: Path, out: Path, operation: str, source: str, options: dict[str, int | str]
) -> None:
    """The error names a number of bytes; a byte less is refused as well, and the number works."""
    args = [shelf / source] + ([out] if operation in ("save", "reshard", "merge") else [])
    options = {k: str(shelf / v) if isinstance(v, str) else v for k, v in options.items()}
    refused = run(operation, *args, memory_limit=1, **options)
    assert (refused.error, refused.exit_code) == ("BudgetTooSmall", 6)
    assert str(refused.needed) in refused.message
    assert not out.exists()
    again = run(operation, *args, memory_limit=refused.needed - 1, **options)
    assert (again.error, again.needed) == ("BudgetTooSmall", refused.needed)
    accepted = run(operation, *args, memory_limit=refused.needed, **options)
    assert_bounded(accepted, refused.needed + (12 * MIB if operation == "stream" else 0))
