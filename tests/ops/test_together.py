"""Whole tensors that several ranks want: each byte is read by one of them, and every rank gets what it gets alone.

Ranks are real processes that talk through gloo, see ``tests.streaming``.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import shardtool
from tests import exchanging
from tests.builders import config, model, put, tensors
from tests.ops.test_distributed import CONFIG, RAWS

Played = dict[str, list[dict[str, Any]]]
MODULE = "tests.streaming"


def shelf(base: Path, size: int) -> Path:
    """A checkpoint in two files, and shards of it for as many ranks."""
    put(base / "model", model(CONFIG, RAWS, files=2))
    shardtool.save(base / "model", base / f"tp{size}", tp=size)
    return base


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = shelf(tmp_path_factory.mktemp("two"), 2)
    scenes = ["whole", "least", "everybody", "by_itself", "own_files", "filled"]
    scenes += ["absent", "enough", "unbegun", "unlike_device", "other_order"]
    return exchanging.play(folder, 2, *scenes, module=MODULE)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = shelf(tmp_path_factory.mktemp("four"), 4)
    return exchanging.play(folder, 4, "whole", "own_files", "absent", "enough", module=MODULE)


def read_once(ranks: list[dict[str, Any]]) -> None:
    """Every byte of every tensor was read by exactly one rank, and every rank has read some."""
    total = sum(raw.array.nbytes for raw in RAWS.values())
    assert all(one["reads"] for one in ranks)
    spans = sorted(tuple(read) for one in ranks for read in one["reads"])
    assert sum(stop - start for _, start, stop in spans) == total
    for (key, _, stop), (other, start, _) in pairwise(spans):
        assert key != other or stop <= start


@pytest.mark.parametrize("scene", ["whole", "least", "everybody", "by_itself"])
def test_two_ranks_read_each_byte_once_and_get_all(two: Played, scene: str):
    assert all(one["same"] for one in two[scene]), two[scene]
    read_once(two[scene])


def test_four_ranks_read_each_byte_once_and_get_all(four: Played):
    assert all(one["same"] for one in four["whole"]), four["whole"]
    read_once(four["whole"])


def test_what_lies_on_this_machine_is_not_exchanged_unless_that_is_asked_for(two: Played):
    assert all(one["local"] for one in two["by_itself"])


def test_rank_files_are_read_by_their_ranks(two: Played, four: Played):
    assert all(one["same"] for played in (two, four) for one in played["own_files"])


def test_tensors_that_exist_are_filled(two: Played):
    assert all(one["same"] for one in two["filled"]), two["filled"]


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_fails_before_it_begins_fails_all(two: Played, four: Played, size: int):
    found = (two if size == 2 else four)["absent"]
    assert {one["error"] for one in found} == {"NotFound"}
    assert all(f"rank {size - 1}: " in one["message"] for one in found[:-1])
    assert all(one["seconds"] < 60 for one in found)


@pytest.mark.parametrize(
    ("scene", "kind", "told"), [("unbegun", "StoreError", "rank 0: "), ("unlike_device", "UsageError", "rank 1: ")]
)
def test_a_rank_that_never_begins_is_told_by_the_others(two: Played, scene: str, kind: str, told: str):
    """It drops its stream, or cannot have it: nobody waits for it."""
    other = two[scene][1 if scene == "unbegun" else 0]
    assert other["error"] == kind
    assert other["message"].startswith(told)
    assert other["seconds"] < 60


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_stops_early_fails_the_others(two: Played, four: Played, size: int):
    found = (two if size == 2 else four)["enough"]
    assert "error" not in found[0]
    assert all("rank 0" in one["message"] for one in found[1:]), found
    assert all(one["seconds"] < 60 for one in found)


def test_ranks_that_ask_for_another_order_are_refused(two: Played):
    assert {one["error"] for one in two["other_order"]} == {"PlanError"}


def test_a_read_that_fails_on_one_rank_is_told_by_all(tmp_path: Path):
    made = config(num_hidden_layers=2)
    put(tmp_path / "model", model(made, tensors(made), files=2))
    found = exchanging.play(tmp_path, 2, "cut_short", module=MODULE)["cut_short"]
    assert {one["error"] for one in found} == {"FormatError"}
    assert all("ends at byte" in one["message"] for one in found)
    assert sum(one["message"].startswith("rank ") for one in found) == 1
