"""Every operation takes a store where it takes an address, for what it reads and for what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardtool
from shardtool.errors import UsageError
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
    assert [file.key for file in shardtool.pull(shards, tmp_path / "side").brought][:1] == ["config.json"]
    assert shardtool.bench(shards, seconds=0.2).uri == "mine://shards"


def test_a_job_is_taken_up_where_it_was_left(source: Mine) -> None:
    store = Mine("mine://out")
    assert not shardtool.save(source, store, tp=2, ranks=[0]).complete
    done = shardtool.save(source, store, tp=2)
    assert done.complete
    assert done.kept > 0


def test_the_source_itself_is_no_output(source: Mine) -> None:
    with pytest.raises(shardtool.PlanError, match="mine://source is the source itself"):
        shardtool.save(source, source, tp=2)


def test_an_engine_may_be_asked_about_a_model_in_a_store(source: Mine) -> None:
    """The model is opened; what is missing here is the engine."""
    with pytest.raises(UsageError, match="vLLM is not installed here"):
        shardtool.trace(source, tp=2)
    with pytest.raises(shardtool.NotFound, match="mine://empty has no "):
        shardtool.trace(Mine("mine://empty"), tp=2)


def test_what_a_killed_job_left_is_removed(source: Mine) -> None:
    store = Mine("mine://out")
    shardtool.save(source, store, tp=2, ranks=[0])
    assert len(shardtool.clean(store, yes=True, older_than=0).removed) == 3
    assert list(store.list()) == []


def test_what_a_rank_of_other_sizes_holds_is_cut_on_the_way(source: Mine, shards: Mine) -> None:
    for rank in (0, 1):
        held = shardtool.load(shards, rank=rank)
        cut = shardtool.load(source, tp=2, rank=rank)
        assert all(torch.equal(cut[name], held[name]) for name in held)
        target = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
        shardtool.load_into(target, shards, rank=rank)
        assert all(torch.equal(target[name], held[name]) for name in held)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_reads_it(source: Mine, shards: Mine) -> None:
    from torch.distributed import checkpoint as dcp

    from shardtool.integrations.dcp import ShardtoolReader

    whole = shardtool.load(source)
    state = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(state, storage_reader=ShardtoolReader(shards), no_dist=True)
    assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_a_store_that_is_called_like_a_file_is_a_folder_all_the_same(source: Mine) -> None:
    store = Mine("mine://llama.safetensors")
    for thing in source.list():
        store.put(thing.key, source.get(thing.key, limit=1 << 20))
    assert shardtool.inspect(store).kind == "huggingface"
    assert shardtool.load(store).keys() == tensors(config()).keys()


def test_where_only_a_file_or_a_folder_will_do_a_store_is_refused(source: Mine, tmp_path: Path) -> None:
    store = Mine("mine://out")
    with pytest.raises(UsageError, match=r"^mine://out is a store: files are pulled into a folder of this machine"):
        shardtool.pull(source, store)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^output=mine://out is a store, not a file: write the path or address"):
        shardtool.trace(source, tp=2, output=store)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^layout=.* is not a text"):
        shardtool.save(source, tmp_path / "out", tp=2, layout=store)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^mine://source/model-.* cannot be borrowed: only files of this machine"):
        shardtool.load(source, borrow=True)
    assert list(store.list()) == []
