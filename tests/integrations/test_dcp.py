"""torch.distributed.checkpoint on shardtool: by one process, by two with DTensors, and what DCP has saved as a source.

Each load is compared with what safetensors itself reads from the checkpoint that the shards were made of.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

import shardtool
from shardtool.errors import ChecksumMismatch, NotFound, UsageError
from shardtool.integrations.dcp import ShardtoolReader, whole_tensors
from tests.exchanging import play

# DCP says so at each load by one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """``llama`` and its shards."""
    folder = tmp_path_factory.mktemp("dcp")
    (folder / "llama").symlink_to(tiny_llama)
    for tp in (1, 2, 4):
        shardtool.save(tiny_llama, folder / f"tp{tp}", tp=tp)
    return folder


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted((folder / "llama").glob("*.safetensors")) for name, t in load_file(path).items()}


def empty_like(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, float("nan"), dtype=dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("where", ["llama", "tp1", "tp2", "tp4"])
def test_a_model_is_loaded_from_any_sharding(folder: Path, where: str):
    expected = whole(folder)
    state = empty_like(expected)
    dcp.load(state, storage_reader=ShardtoolReader(folder / where), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_the_checkpoint_may_be_named_at_the_load(folder: Path):
    expected = whole(folder)
    state = empty_like(expected)
    dcp.load(state, checkpoint_id=folder / "tp2", storage_reader=ShardtoolReader(), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert ShardtoolReader.validate_checkpoint_id(folder / "tp2")
    assert not ShardtoolReader.validate_checkpoint_id(folder / "nothing")
    with pytest.raises(UsageError, match="say what to load"):
        ShardtoolReader().read_metadata()


def test_values_are_cast_to_the_model_s_own_type(folder: Path):
    expected = whole(folder)
    state = empty_like(expected, torch.float32)
    dcp.load(state, storage_reader=ShardtoolReader(folder / "tp4"), no_dist=True)
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in expected.items())


def test_some_tensors_are_some_bytes(folder: Path):
    expected = whole(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    state = empty_like({name: expected[name]})
    reader = ShardtoolReader(folder / "llama")
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(state[name], expected[name])
    assert reader.bytes_read == expected[name].nbytes


@pytest.mark.parametrize("scene", ["rows", "columns"])
def test_two_ranks_load_their_parts(folder: Path, scene: str):
    expected = {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in whole(folder).items()
    }
    total = sum(tensor.nbytes for tensor in whole(folder).values())
    said = play(folder, 2, scene, module="tests.integrations.dcp_ranks")[scene]
    assert len(said) == 2
    for rank in said:
        assert rank["llama"]["found"] == expected
        assert rank["tp4"]["found"] == expected
    if scene == "rows":  # every byte is some rank's, and no rank's bytes are read by another
        assert sum(rank["llama"]["read"] for rank in said) == total


def test_a_damaged_shard_is_refused(folder: Path, tmp_path: Path):
    shardtool.save(folder / "llama", tmp_path / "tp2", tp=2)
    shard = tmp_path / "tp2" / "model-rank-1-part-0.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    state = empty_like(whole(folder))
    with pytest.raises(dcp.api.CheckpointException) as raised:
        dcp.load(state, storage_reader=ShardtoolReader(tmp_path / "tp2"), no_dist=True)
    assert isinstance(raised.value.failures[0][0], ChecksumMismatch)
    dcp.load(state, storage_reader=ShardtoolReader(tmp_path / "tp2", verify=False), no_dist=True)


def test_what_the_checkpoint_does_not_have_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(dcp.api.CheckpointException, match=r"model\.other"):
        dcp.load({"model.other": torch.zeros(2)}, storage_reader=ShardtoolReader(folder / "tp2"), no_dist=True)
    with pytest.raises(NotFound, match="nothing"):
        ShardtoolReader(tmp_path / "nothing").read_metadata()


def test_objects_other_than_tensors_are_refused(folder: Path):
    step, nothing = MetadataIndex("step"), torch.Size([])
    item = ReadItem(LoadItemType.BYTE_IO, step, nothing, step, nothing, nothing)
    with pytest.raises(UsageError, match="'step' is not a tensor"):
        ShardtoolReader(folder / "tp2").read_data(LoadPlan([item]), dcp.DefaultLoadPlanner())


def test_what_dcp_has_saved_becomes_a_source(folder: Path, tmp_path: Path):
    expected = whole(folder)
    state = {"model": expected, "step": 7, "optimizer": {"lr": torch.ones(3)}}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    whole_tensors(tmp_path / "saved", tmp_path / "hf", prefix="model.", max_file_size="1MiB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 3
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_bytes((folder / "llama" / name).read_bytes())
    shardtool.save(tmp_path / "hf", tmp_path / "tp2", tp=2)
    assert shardtool.verify(tmp_path / "tp2", against=folder / "llama").ok


def test_a_folder_that_dcp_has_not_saved_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"has no \.metadata"):
        whole_tensors(folder / "llama", tmp_path / "out")
    dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(UsageError, match=r"begins with 'model\.'"):
        whole_tensors(tmp_path / "saved", tmp_path / "out", prefix="model.")
    (tmp_path / "full").mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "full" / "a.safetensors")
    with pytest.raises(UsageError, match="is not empty"):
        whole_tensors(tmp_path / "saved", tmp_path / "full")
