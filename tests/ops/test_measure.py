"""``load --tp``: ranks of any sizes are brought, counted and dropped, whatever the checkpoint was cut for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool.errors import NotFound, PlanError, UsageError
from shardtool.ops.measure import LoadReport, measure
from shardtool.ops.slices import Wanted, opened
from tests.builders import config, model, put, tensors

CONFIG = config()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("shelf")
    put(base / "model", model(CONFIG, tensors(CONFIG), files=2))
    for tp in (2, 4):
        shardtool.save(base / "model", base / f"tp{tp}", tp=tp)
    return base


def sizes(report: LoadReport) -> list[tuple[int | None, int, int]]:
    return [(one.rank, one.tensors, one.bytes) for one in report.ranks]


@pytest.mark.parametrize("source", ["model", "tp4", "tp2"])
def test_every_rank_holds_what_its_shards_do(shelf: Path, source: str):
    assert sizes(measure(shelf / source, tp=2)) == sizes(measure(shelf / "tp2"))
    (one,) = sizes(measure(shelf / source, tp=2, rank=1))
    assert one == sizes(measure(shelf / "tp2", rank=1))[0]
    assert sizes(measure(shelf / source, tp=2, own=1)) == [one]


@pytest.mark.parametrize("cut", [{"tp": 2, "pp": 2}, {"tp": 2, "layout": "sglang"}], ids=["stages", "layout"])
def test_stages_and_another_layout(shelf: Path, tmp_path: Path, cut: dict[str, Any]):
    shardtool.save(shelf / "model", tmp_path, **cut)
    assert sizes(measure(shelf / "model", **cut)) == sizes(measure(tmp_path))


def test_what_is_read_is_a_note(shelf: Path):
    with opened(shelf / "tp4", Wanted(tp=2, rank=1)) as found:
        wanted = found.to_read()
    report = measure(shelf / "tp4", tp=2, rank=1)
    assert report.bytes == found.nbytes
    assert report.notes[0].startswith("cut for tp 2: ")
    assert f"{wanted / 1024:.1f} KiB were read for" in report.notes[0]


def test_progress_and_time_are_those_of_all_ranks(shelf: Path):
    seen: list[tuple[int, int]] = []
    report = measure(shelf / "tp4", tp=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes, report.bytes)
    assert report.seconds >= sum(one.seconds for one in report.ranks)
    assert report.stages["storage"] > 0


@pytest.mark.parametrize(
    ("source", "verify", "verified", "notes"),
    [("tp4", True, True, 1), ("tp4", False, False, 1), ("model", True, False, 2)],
)
def test_whether_digests_were_checked_is_said(shelf: Path, source: str, verify: bool, verified: bool, notes: int):
    report = measure(shelf / source, tp=2, rank=0, verify=verify)
    assert (report.verified, len(report.notes)) == (verified, notes)


def test_what_cannot_be_is_refused(shelf: Path):
    with pytest.raises(NotFound, match="tp 2 has no rank 2"):
        measure(shelf / "tp4", tp=2, rank=2)
    with pytest.raises(PlanError, match="3"):
        measure(shelf / "tp4", tp=3)
    with pytest.raises(UsageError, match="leave --block-size out"):
        measure(shelf / "tp4", tp=2, block_size="1MiB")
