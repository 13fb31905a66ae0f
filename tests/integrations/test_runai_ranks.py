"""Ranks that stream the same files by Run:ai's interface: each byte is read once if they ask for it.

Ranks are real processes that talk through gloo, see ``tests.integrations.ranks``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardtool.integrations.runai import FileChunks, FileStreamer, SafetensorsStreamer
from tests import exchanging
from tests.builders import put, random, safetensors
from tests.integrations.ranks import NAMES, SCENES, digests

RANKS = 2
A = {f"a{i}": random((64, 30 + i), "F32", i) for i in range(20)} | {"none": random((0, 3), "F32")}
B = {"a1": random((700, 300), "BF16"), "b": random((5,), "F16")}

Played = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str], list[str]]:
    """The folder, and what one process gets: tensors and ranges."""
    folder = tmp_path_factory.mktemp("ranks")
    put(folder, {NAMES[0]: safetensors(A), NAMES[1]: safetensors(B)})
    paths = [f"{folder}/{name}" for name in NAMES]
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths)
        tensors = digests(streamer.get_tensors())
    with FileStreamer() as reader:
        reader.stream_files([FileChunks.contiguous(i, path, 3, [100, 0, 7, 60]) for i, path in enumerate(paths)])
        return str(folder), tensors, digests(reader.get_chunks())


@pytest.fixture(scope="module")
def played(alone: tuple[str, list[str], list[str]]) -> Played:
    return exchanging.play(Path(alone[0]), RANKS, *SCENES, module="tests.integrations.ranks")


def test_each_byte_is_read_by_one_rank_and_comes_to_all(played, alone):
    for scene in ("together", "dropped"):
        ranks = played[scene]
        assert [one["found"] for one in ranks] == [alone[1]] * RANKS
        total = ranks[0]["total"]
        assert all(0 < one["read"] < total for one in ranks)
        assert total <= sum(one["read"] for one in ranks) < total * 1.01


@pytest.mark.parametrize("scene", ["unasked", "denied", "automatic"])
def test_otherwise_each_rank_reads_its_own(played, alone, scene):
    assert [one["found"] for one in played[scene]] == [alone[1]] * RANKS
    assert all(one["read"] >= one["total"] for one in played[scene])


def test_a_rank_that_cannot_open_its_files_ends_the_others_with_its_reason(played):
    first, second = played["missing"]
    assert "gone.safetensors does not exist" in second["failed"]
    assert "rank 1" in first["failed"]
    assert "gone.safetensors does not exist" in first["failed"]


def test_ranges_are_exchanged_too(played, alone):
    assert [one["found"] for one in played["ranges"]] == [alone[2]] * RANKS
