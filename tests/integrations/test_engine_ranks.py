"""Ranks that load a model together: what several of them want is read once, and one that fails says why to all.

Ranks are real processes that talk through gloo, see ``tests.integrations.loading``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool.checkpoint import read_header
from shardtool.stores import open_store
from tests import exchanging
from tests.builders import config, flipped, model, put, tensors

Played = dict[str, list[dict[str, Any]]]
NORM = "model.norm.weight"
MOST = 60
"""How much of the model one rank may read at most, in percent, where two of them read each byte once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("ranks")
    made = config(hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32, vocab_size=512)
    put(base / "model", model(made, tensors(made), files=2))
    for tp in (2, 4):
        shardtool.save(base / "model", base / f"tp{tp}", tp=tp)
    shardtool.save(base / "model", base / "damaged", tp=4)
    for file in (base / "damaged").glob("model-rank-*"):
        with open_store(str(file.parent)) as store:
            held = {entry.name: entry for entry in read_header(store, file.name, file.stat().st_size).entries}
        file.write_bytes(flipped(file.read_bytes(), held[NORM].offset + 1))
    return base


@pytest.fixture(scope="module")
def played(folder: Path) -> Played:
    scenes = ["fed", "apart", "own", "cut", "cut_apart", "unknown", "at_odds", "replicas", "refuses", "damaged"]
    return exchanging.play(folder, 2, *scenes, module="tests.integrations.loading")


@pytest.mark.parametrize(
    ("scene", "way"),
    [("fed", "fed"), ("apart", "fed"), ("own", "own"), ("cut", "cut"), ("cut_apart", "cut"), ("unknown", "fed")],
)
def test_every_rank_gets_its_own(played: Played, scene: str, way: str):
    assert [(one.get("same"), one.get("way")) for one in played[scene]] == [(True, way)] * 2, played[scene]


def test_whole_tensors_are_read_once_for_all_ranks(played: Played, folder: Path):
    size = sum(tensor.nbytes for _, tensor in shardtool.stream(folder / "model"))
    assert [one["read"] for one in played["apart"]] == [size, size]
    assert sum(one["read"] for one in played["fed"]) == size
    assert all(one["read"] < size * MOST // 100 for one in played["fed"])


def test_ranges_that_several_ranks_want_are_read_once(played: Played):
    together, alone = (sum(one["read"] for one in played[scene]) for scene in ("cut", "cut_apart"))
    assert together < alone


def test_all_ranks_take_the_way_that_one_has_to_take(played: Played):
    assert [one.get("way") for one in played["at_odds"]] == ["fed", "fed"], played["at_odds"]
    assert all(one["same"] for one in played["at_odds"])


def test_replicas_of_a_rank_read_by_themselves(played: Played):
    assert [one.get("way") for one in played["replicas"]] == ["cut", "cut"], played["replicas"]


def test_a_model_that_refuses_ends_all_ranks_with_its_reason(played: Played):
    for one in played["refuses"]:
        assert one["error"] == "TensorMismatch"
        assert "does not take the tensors of" in one["message"]
        assert "ValueError: the model has no module named 'x'" in one["message"]
        assert one["seconds"] < 60
    assert played["refuses"][0]["message"].startswith("rank 1: ")


def test_damage_that_one_rank_reads_ends_all_with_its_tensor(played: Played):
    for one in played["damaged"]:
        assert one["error"] == "ChecksumMismatch"
        assert NORM in one["message"]
        assert one["seconds"] < 60
