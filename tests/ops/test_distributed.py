"""Slices that ranks take together: what several of them want is read once, and all get what they get alone.

Ranks are real processes that talk through gloo, see ``tests.slicing``.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardtool
from tests import exchanging
from tests.builders import config, contents, flipped, model, put, tensors

pytest.importorskip("torch")

CONFIG = config(
    hidden_size=256,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=300,
)
RAWS = tensors(CONFIG)
MODULE = "tests.slicing"
PROMPT = 60
"""Seconds after which a rank that waits has waited too long: half of what a transfer may take."""

Played = dict[str, list[dict[str, Any]]]


def folder_for(base: Path, *sizes: dict[str, Any]) -> Path:
    put(base / "model", model(CONFIG, RAWS, files=2))
    for size in sizes:
        shardtool.save(base / "model", base / "".join(f"{name}{n}" for name, n in size.items()), **size)
    return base


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = folder_for(tmp_path_factory.mktemp("two"), {"tp": 1}, {"tp": 2})
    files = contents(folder / "tp1")
    key = "model-rank-0-part-0.safetensors"  # whose last bytes are those of a norm
    put(folder / "damaged", {**files, key: flipped(files[key], -1)})
    scenes = ["whole", "least", "turned", "shards", "called", "damaged"]
    scenes += ["broken", "absent", "unlike", "twice", "enough"]
    return exchanging.play(folder, 2, *scenes, module=MODULE)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = folder_for(tmp_path_factory.mktemp("four"), {"tp": 1}, {"tp": 4}, {"tp": 2, "pp": 2})
    scenes = ("whole", "least", "shards", "stages", "broken", "enough")
    return exchanging.play(folder, 4, *scenes, module=MODULE)


COMPLETE = [
    *(("two", scene) for scene in ("whole", "least", "turned", "shards")),
    *(("four", scene) for scene in ("whole", "least", "shards", "stages")),
]


@pytest.mark.parametrize(("ranks", "scene"), COMPLETE)
def test_every_rank_gets_its_slices_and_no_byte_is_read_twice(ranks: str, scene: str, request: pytest.FixtureRequest):
    found = request.getfixturevalue(ranks)[scene]
    assert all(rank["same"] for rank in found)
    counts: dict[str, Any] = {}
    for rank in found:
        for key, start, end in rank["reads"]:
            counts.setdefault(key, np.zeros(1 << 22, np.int32))[start:end] += 1
    assert max(count.max() for count in counts.values()) == 1
    read = sum(int(count.sum()) for count in counts.values())
    alone = sum(rank["alone"] for rank in found)
    assert read < alone - 256 * 256, "nothing was shared"
    if scene != "shards":
        assert read == sum(raw.array.nbytes for raw in RAWS.values())
    assert all(rank["reads"] for rank in found)


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_rows_of_one_rank_are_read_by_that_rank(ranks: str, request: pytest.FixtureRequest):
    """What only one wants is neither read by another nor sent around: a gate's rows, for instance."""
    found = request.getfixturevalue(ranks)["whole"]
    gate = RAWS["model.layers.0.mlp.gate_proj.weight"].array.nbytes // len(found)
    own = [sum(end - start for _, start, end in rank["reads"]) for rank in found]
    assert min(own) > 4 * gate


def test_one_call_does_it(two: Played):
    assert all(rank["same"] for rank in two["called"])


# A rank that fails.


def test_damage_that_one_rank_finds_ends_all(two: Played):
    assert {rank["error"] for rank in two["damaged"]} == {"ChecksumMismatch"}
    one, other = sorted((rank["message"] for rank in two["damaged"]), key=len)
    assert "tensor 'model.norm.weight' differs from its digest" in one
    assert other in (f"rank 0: {one}", f"rank 1: {one}")


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_a_rank_that_cannot_read_on_ends_all(ranks: str, request: pytest.FixtureRequest):
    found = request.getfixturevalue(ranks)["broken"]
    assert {rank["error"] for rank in found} == {"AccessDenied"}
    own = found.pop(1)["message"]
    assert own.endswith("may not be read any more")
    assert {rank["message"] for rank in found} == {f"rank 1: {own}"}
    assert max(rank["seconds"] for rank in found) < PROMPT


def test_a_rank_that_does_not_find_the_checkpoint_ends_all(two: Played):
    assert [rank["error"] for rank in two["absent"]] == ["NotFound", "NotFound"]
    assert two["absent"][1]["message"] == f"rank 0: {two['absent'][0]['message']}"


def test_ranks_of_other_sizes_are_refused(two: Played):
    assert {rank["error"] for rank in two["unlike"]} == {"UsageError"}
    assert "tp 2" in two["unlike"][0]["message"]
    assert "tp 4" in two["unlike"][1]["message"]


def test_one_rank_is_taken_by_one_process(two: Played):
    assert {rank["error"] for rank in two["twice"]} == {"UsageError"}
    assert "two processes of one exchange take the same rank" in two["twice"][0]["message"]


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_a_rank_that_has_enough_ends_the_others(ranks: str, request: pytest.FixtureRequest):
    found = request.getfixturevalue(ranks)["enough"]
    assert found.pop()["stopped"]
    assert {(rank["error"], rank["message"]) for rank in found} == {
        ("StoreError", f"rank {len(found)}: it stopped before the last tensor")
    }
    assert max(rank["seconds"] for rank in found) < PROMPT


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_dies_ends_the_others_and_is_named(tmp_path: Path, size: int):
    folder = folder_for(tmp_path)
    ended = exchanging.finish(exchanging.start(folder, size, "killed", module=MODULE))
    assert ended[-1][0] == -signal.SIGKILL
    for rank, (status, output) in enumerate(ended[:-1]):
        assert status == 0, output
        found = exchanging.said(folder, "killed", rank)
        assert found["error"] == "StoreError"
        assert found["message"].startswith(f"rank {size - 1} has ended while tensors were exchanged")
        assert found["seconds"] < PROMPT
