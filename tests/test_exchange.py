"""The exchange between ranks: each byte is read once, everybody gets all, and a rank that fails ends all of them.

Ranks are real processes that talk through gloo, see ``tests.exchanging``; what they cost is their start, so that one
start plays several scenes.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.errors import UsageError
from shardtool.exchange import Exchange, divided, wanted
from shardtool.stores.counting import CountingStore
from shardtool.stores.local.store import LocalStore
from shardtool.stores.memory import MemoryStore
from tests import exchanging
from tests.exchanging import SEGMENTS

torch = pytest.importorskip("torch")

PROMPT = 60
"""Seconds after which a rank that waits has waited too long: half of what a transfer may take."""


def folder_of(base: Path) -> Path:
    (base / exchanging.FILE).write_bytes(random.Random(3).randbytes(sum(SEGMENTS)))
    return base


Played = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = folder_of(tmp_path_factory.mktemp("two"))
    scenes = ("whole", "everybody", "damaged", "stopped", "thrown", "unlike", "crossed", "short")
    return exchanging.play(folder, 2, *scenes)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = folder_of(tmp_path_factory.mktemp("four"))
    return exchanging.play(folder, 4, "whole", "halves", "damaged", "stopped", "unlike", "crossed")


# What arrives, and what is read.


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_every_rank_gets_every_byte_and_each_is_read_once(ranks: str, request: pytest.FixtureRequest):
    found = request.getfixturevalue(ranks)["whole"]
    assert all(rank["same"] for rank in found)
    read = sorted(tuple(span) for rank in found for span in rank["reads"] if span[0] < span[1])
    ends = [sum(SEGMENTS[: i + 1]) for i in range(len(SEGMENTS))]
    assert read == [(end - size, end) for end, size in zip(ends, SEGMENTS, strict=True) if size]
    assert all(rank["reads"] for rank in found), "a rank read nothing"


def test_groups_of_the_world_exchange_by_themselves(four: Played, two: Played):
    assert [rank["size"] for rank in four["halves"]] == [2, 2, 2, 2]
    assert all(rank["same"] for rank in four["halves"] + two["everybody"])
    for pair in (four["halves"][:2], four["halves"][2:]):
        assert sum(end - start for rank in pair for start, end in rank["reads"]) == sum(SEGMENTS)


# A rank that fails.


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_an_error_of_one_rank_is_raised_by_all_with_its_class_and_its_name(ranks: str, request: pytest.FixtureRequest):
    found = request.getfixturevalue(ranks)["damaged"]
    owner = divided(SEGMENTS, len(found))[3]
    said = [rank["message"] for rank in found]
    assert {rank["error"] for rank in found} == {"ChecksumMismatch"}
    assert said.pop(owner) == "segment 3 differs from its digest"
    assert set(said) == {f"rank {owner}: segment 3 differs from its digest"}
    assert max(rank["seconds"] for rank in found) < PROMPT


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_a_consumer_that_stops_early_stops_all(ranks: str, request: pytest.FixtureRequest):
    found = request.getfixturevalue(ranks)["stopped"]
    assert found.pop(1)["handed"] == 4
    assert {(rank["error"], rank["message"]) for rank in found} == {
        ("StoreError", "rank 1: it stopped before the last tensor")
    }
    assert max(rank["seconds"] for rank in found) < PROMPT


def test_an_error_that_is_not_ours_is_told_with_its_class(two: Played):
    assert two["thrown"][0]["own"] == "out of pencils"
    assert two["thrown"][1]["message"] == "rank 0: RuntimeError: out of pencils"


@pytest.mark.parametrize("scene", ["unlike", "crossed"])
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_ranks_that_do_not_share_the_same_segments_are_refused(ranks: str, scene: str, request: pytest.FixtureRequest):
    found = request.getfixturevalue(ranks)[scene]
    assert {rank["error"] for rank in found} == {"PlanError"}
    for rank in found:
        assert "do not share the same segments; give every rank the same checkpoint" in rank["message"]


def test_a_rank_that_is_through_while_others_go_on_is_refused_by_them(two: Played):
    assert "error" not in two["short"][0]
    assert two["short"][1]["error"] == "PlanError"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("scene", ["killed", "killed_inside"])
def test_a_rank_that_dies_ends_the_others_and_is_named(tmp_path: Path, size: int, scene: str):
    ended = exchanging.finish(exchanging.start(folder_of(tmp_path), size, scene))
    assert ended[-1][0] == -signal.SIGKILL
    for rank, (status, output) in enumerate(ended[:-1]):
        assert status == 0, output
        found = exchanging.said(tmp_path, scene, rank)
        assert found["error"] == "StoreError"
        assert found["message"].startswith(f"rank {size - 1} has ended while tensors were exchanged; its own output")
        assert found["seconds"] < PROMPT


def test_a_reason_arrives_although_its_rank_is_gone_at_once(tmp_path: Path):
    ended = exchanging.finish(exchanging.start(folder_of(tmp_path), 4, "gone"))
    assert [status for status, _ in ended] == [0, 0, 0, 0]
    for rank in range(3):
        found = exchanging.said(tmp_path, "gone", rank)
        assert (found["error"], found["message"]) == ("NotFound", "rank 3: no such file")


# One rank alone.


def test_one_rank_exchanges_nothing_and_needs_no_group():
    with Exchange() as exchange:
        assert (exchange.rank, exchange.size) == (0, 1)
        assert exchange.owners([3, 0, 5]) == [0, 0, 0]
        memory = torch.arange(3, dtype=torch.uint8)
        exchange.share(0, memory)
        exchange.share(1, memory[:0])
        assert memory.tolist() == [0, 1, 2]
        exchange.fail(ValueError("nobody hears it"))
    assert not torch.distributed.is_initialized()


def test_segments_are_shared_in_their_order():
    exchange = Exchange()
    memory = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(UsageError, match="say the owners first"):
        exchange.share(0, memory)
    exchange.owners([1, 1])
    with pytest.raises(UsageError, match="segment 1 is shared where 0 is next"):
        exchange.share(1, memory)


def test_a_scope_that_there_is_not_is_refused():
    with pytest.raises(UsageError, match="scope='rack' is neither 'node' nor 'global'"):
        Exchange(scope="rack")


# Who reads what.


@given(st.lists(st.integers(0, 1000), max_size=200), st.integers(1, 9))
def test_bytes_are_divided_evenly_whatever_the_sizes(sizes: list[int], ranks: int):
    """No two ranks ever differ by more than the largest segment, so that all of them have work all the time."""
    load = [0] * ranks
    for owner, size in zip(divided(sizes, ranks), sizes, strict=True):
        load[owner] += max(1, size)
        assert max(load) - min(load) <= max(1, *sizes)


def test_neighbours_of_one_size_go_round():
    assert divided([5] * 8, 3) == [0, 1, 2, 0, 1, 2, 0, 1]


# Whether.


def test_auto_is_for_several_ranks_and_what_comes_over_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    near, far = CountingStore(LocalStore(tmp_path)), CountingStore(MemoryStore())
    assert not far.remote
    far.remote = True
    assert not wanted("auto", far)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert wanted("auto", far)
    assert not wanted("auto", near)
    assert [wanted(said, store) for said in (True, False) for store in (near, far)] == [True, True, False, False]


@pytest.mark.parametrize("value", ["yes", None, 2, ""])
def test_whether_is_true_false_or_auto(value: Any, tmp_path: Path):
    with pytest.raises(UsageError, match="neither True nor False nor 'auto'"):
        wanted(value, LocalStore(tmp_path))
