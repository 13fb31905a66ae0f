"""Every operation takes a store where it takes an address, for what it reads and for what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardtool
from shardtool.ops.bench import bench
from shardtool.ops.pull import pull
from shardtool.stores.memory import MemoryStore
from tests.builders import config, model, put, tensors

FILES = model(config(), tensors(config()), files=2)


class Mine(MemoryStore):
    """A store of the caller's, without a scheme, that must stay open."""

    def close(self) -> None:
        raise AssertionError("it belongs to the caller")


@pytest.fixture
def source() -> Mine:
    store = Mine("mine://source")
    for key, data in FILES.items():
        store.put(key, data)
    return store


@pytest.fixture
def shards(source: Mine) -> Mine:
    store = Mine("mine://shards")
    assert shardtool.save(source, store, tp=2).complete
    return store


def test_checkpoints_are_written_and_compared(source: Mine, shards: Mine) -> None:
    other, merged = Mine("mine://other"), Mine("mine://merged")
    assert shardtool.reshard(shards, other, tp=4).complete
    assert shardtool.merge(other, merged).complete
    for one in (shards, other, merged):
        found = shardtool.verify(one, against=source)
        assert found.ok
        assert found.uri == one.uri
    assert shardtool.verify(shards, quick=True).ok
    assert shardtool.inspect(other).tp == 4


def test_tensors_are_loaded(source: Mine, shards: Mine, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shardtool.save(put(tmp_path / "model", FILES), folder, tp=2)
    for rank in (0, 1):
        mine, theirs = shardtool.load(shards, rank=rank), shardtool.load(folder, rank=rank)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert shardtool.load_file(shards, rank=rank).keys() == mine.keys()
        with shardtool.safe_open(shards, rank=rank) as opened:
            assert torch.equal(opened.get_tensor("lm_head.weight"), mine["lm_head.weight"])
    assert dict(shardtool.stream(source)).keys() == tensors(config()).keys()


def test_side_files_are_pulled_and_speed_is_measured(shards: Mine, tmp_path: Path) -> None:
    assert [file.key for file in pull(shards, tmp_path / "side").brought][:1] == ["config.json"]
    assert bench(shards, seconds=0.2).uri == "mine://shards"


def test_a_job_is_taken_up_where_it_was_left(source: Mine) -> None:
    store = Mine("mine://out")
    assert not shardtool.save(source, store, tp=2, ranks=[0]).complete
    done = shardtool.save(source, store, tp=2)
    assert done.complete
    assert done.kept > 0


def test_the_source_itself_is_no_output(source: Mine) -> None:
    with pytest.raises(shardtool.PlanError, match="mine://source is the source itself"):
        shardtool.save(source, source, tp=2)
