"""Models of ``torch.save`` as sources: what is made of them equals what is made of the same model as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import shardtool
from shardtool.checkpoint import open_checkpoint
from shardtool.errors import BudgetTooSmall, FormatError, Incomplete, NotFound, PlanError
from tests import torchfiles
from tests.builders import Files, Raw, config, contents, model, put, random, rank_tensors, tensors, whole_tensors
from tests.oracle import expected
from tests.servers import S3Server

CONFIG = config(num_hidden_layers=2, vocab_size=130)
HELD = tensors(CONFIG)
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def shards(files: Files) -> Files:
    """The shards and the config, without the manifest."""
    return {key: data for key, data in files.items() if key != "shardtool.json"}


@pytest.mark.parametrize("files", [1, 3])
def test_the_shards_are_those_of_the_same_model_as_safetensors(tmp_path: Path, files: int):
    """The manifest too: nothing tells where the tensors came from."""
    put(tmp_path / "bin", torchfiles.checkpoint(CONFIG, HELD, files=files))
    put(tmp_path / "safe", model(CONFIG, HELD))
    for source in ("bin", "safe"):
        shardtool.save(tmp_path / source, tmp_path / f"{source}-tp2", tp=2)
    assert contents(tmp_path / "bin-tp2") == contents(tmp_path / "safe-tp2")


def test_tensors_that_lie_column_by_column_are_cut_too(tmp_path: Path):
    put(tmp_path / "bin", torchfiles.checkpoint(CONFIG, HELD, files=2, transposed=True))
    assert any(e.strides for file in open_checkpoint(tmp_path / "bin").files for e in file.header.entries)
    shardtool.save(tmp_path / "bin", tmp_path / "tp4", tp=4, memory_limit="2MiB")
    found = contents(tmp_path / "tp4")
    for rank, wanted in enumerate(expected(HELD, CONFIG, 4)):
        assert rank_tensors(found, rank) == wanted
    assert shardtool.verify(tmp_path / "tp4", against=tmp_path / "bin").ok
    shardtool.merge(tmp_path / "tp4", tmp_path / "merged")
    assert whole_tensors(contents(tmp_path / "merged")) == HELD
    assert shardtool.verify(tmp_path / "merged", against=tmp_path / "bin").ok
    with pytest.raises(PlanError, match=r"turn the two around: shardtool verify .*merged --against .*bin"):
        shardtool.verify(tmp_path / "bin", against=tmp_path / "merged")


@pytest.mark.parametrize("limit", [0, "300KiB", None])
@pytest.mark.parametrize("borrow", [False, True])
def test_what_lies_column_by_column_loads_under_the_least_limit_too(tmp_path: Path, limit: Any, borrow: bool):
    """A tensor larger than that limit, and small ones."""
    held = {**HELD, "big": random((700, 600), "F32")}
    put(tmp_path / "bin", torchfiles.checkpoint(CONFIG, held, transposed=True))
    found = shardtool.load(tmp_path / "bin", memory_limit=limit, borrow=borrow)
    assert sorted(found) == sorted(held)
    assert torch.equal(found["big"], torch.from_numpy(held["big"].array))
    assert found["big"].is_contiguous() or borrow
    with pytest.raises(BudgetTooSmall) as refused:
        shardtool.load(tmp_path / "bin", memory_limit="65KiB")
    assert shardtool.load(tmp_path / "bin", memory_limit=refused.value.needed).keys() == found.keys()


def test_verify_finds_a_changed_element_on_either_side(tmp_path: Path):
    put(tmp_path / "safe", model(CONFIG, HELD))
    array = HELD[EMBED].array.copy()
    array[7, 3] ^= 1
    put(tmp_path / "bin", torchfiles.checkpoint(CONFIG, {**HELD, EMBED: Raw("BF16", array)}))
    for one, other in (("safe", "bin"), ("bin", "safe")):
        report = shardtool.verify(tmp_path / one, against=tmp_path / other)
        assert [d.name for d in report.differences] == [EMBED]
    assert shardtool.verify(tmp_path / "bin", against=tmp_path / "bin").ok


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_a_tied_head_that_is_in_the_file_is_compared(tmp_path: Path, transposed: bool, equal: bool):
    """Where they share a storage, and where they are two that are equal or not."""
    tied = {**CONFIG, "tie_word_embeddings": True}
    head = HELD[EMBED] if equal else HELD[HEAD]
    held = {**HELD, HEAD: head}
    put(tmp_path / "bin", torchfiles.checkpoint(tied, held, transposed=transposed))
    put(tmp_path / "safe", model(tied, held))
    for source in ("bin", "safe"):
        shardtool.save(tmp_path / source, tmp_path / f"{source}-tp2", tp=2)
    assert shards(contents(tmp_path / "bin-tp2")) == shards(contents(tmp_path / "safe-tp2"))


def test_a_shared_storage_is_one_tensor_under_two_names(tmp_path: Path):
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 6), "b": torch.nn.Linear(4, 6)})
    module["b"].weight = module["a"].weight
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    assert shardtool.inspect(tmp_path).parameters == 4 * 6 + 6 + 6
    other = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 6), "b": torch.nn.Linear(4, 6)})
    other["b"].weight = other["a"].weight
    shardtool.load_into(other, tmp_path)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())


def test_inspect_says_what_a_torch_model_holds(tmp_path: Path):
    put(tmp_path, torchfiles.checkpoint(CONFIG, HELD, files=2))
    found = shardtool.inspect(tmp_path, tensors="*.norm.weight")
    assert (found.kind, found.tensors) == ("huggingface", len(HELD))
    assert found.parameters == sum(raw.array.size for raw in HELD.values())
    assert [(t.name, t.dtype, t.shape) for t in found.listed] == [("model.norm.weight", "BF16", (32,))]


def test_side_files_come_along_and_weights_do_not(tmp_path: Path):
    put(tmp_path / "bin", torchfiles.checkpoint(CONFIG, HELD, files=2))
    put(tmp_path / "bin", {"training_args.bin": b"?", "optimizer.bin": b"?", "adapter_model.bin": b"?"})
    shardtool.save(tmp_path / "bin", tmp_path / "tp1", tp=1)
    assert contents(tmp_path / "tp1").keys() == {
        "config.json", "tokenizer.json", "shardtool.json", "model-rank-0-part-0.safetensors",
    }  # fmt: skip


def test_a_bucket_is_a_source_like_a_folder(tmp_path: Path, bucket: str, s3_server: S3Server):
    made = torchfiles.checkpoint(CONFIG, HELD, files=2, transposed=True)
    put(tmp_path / "bin", made)
    source = put(f"s3://{bucket}/bin", made)
    shardtool.save(source, tmp_path / "far", tp=2)
    shardtool.save(tmp_path / "bin", tmp_path / "near", tp=2)
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


# Which files count.


def test_safetensors_win_where_both_are(tmp_path: Path):
    put(tmp_path, torchfiles.checkpoint(CONFIG, HELD))
    assert [file.key for file in open_checkpoint(tmp_path).files] == ["pytorch_model.bin"]
    put(tmp_path, model(CONFIG, HELD))
    assert [file.key for file in open_checkpoint(tmp_path).files] == ["model.safetensors"]


def test_an_index_of_safetensors_that_are_not_there_does_not_hide_torch_files(tmp_path: Path):
    put(tmp_path, {key: data for key, data in model(CONFIG, HELD, files=2).items() if key.endswith(".json")})
    with pytest.raises(Incomplete, match=r"safetensors is missing; model\.safetensors\.index\.json lists it"):
        open_checkpoint(tmp_path)
    put(tmp_path, torchfiles.checkpoint(CONFIG, HELD))
    assert open_checkpoint(tmp_path).entries().keys() == HELD.keys()


def test_files_without_an_index_are_all_taken(tmp_path: Path):
    made = torchfiles.checkpoint(CONFIG, HELD, files=3)
    del made["pytorch_model.bin.index.json"]
    put(tmp_path, made)
    assert open_checkpoint(tmp_path).entries().keys() == HELD.keys()
    put(tmp_path, {"copy.bin": made["pytorch_model-00001-of-00003.bin"]})
    with pytest.raises(FormatError, match=r"is in copy\.bin and in pytorch_model-00001-of-00003\.bin"):
        open_checkpoint(tmp_path).entries()


def test_an_index_decides_which_files_and_tensors_count(tmp_path: Path):
    made = torchfiles.checkpoint(CONFIG, HELD, files=2)
    index = "pytorch_model.bin.index.json"
    put(tmp_path, {**made, "copy.bin": made["pytorch_model-00001-of-00002.bin"]})
    assert open_checkpoint(tmp_path).entries().keys() == HELD.keys()
    table = json.loads(made[index])
    del table["weight_map"][EMBED]
    put(tmp_path, {index: json.dumps(table).encode()})
    assert open_checkpoint(tmp_path).entries().keys() == HELD.keys() - {EMBED}
    table["weight_map"]["other"] = "pytorch_model-00001-of-00002.bin"
    put(tmp_path, {index: json.dumps(table).encode()})
    with pytest.raises(FormatError, match=r"says that tensor 'other' is in pytorch_model-00001-of-00002\.bin"):
        open_checkpoint(tmp_path)
    table["weight_map"]["other"] = "../secret.bin"
    put(tmp_path, {index: json.dumps(table).encode()})
    with pytest.raises(FormatError, match="which is not inside the checkpoint"):
        open_checkpoint(tmp_path)


def test_training_leftovers_alone_are_no_checkpoint(tmp_path: Path):
    put(tmp_path, {"training_args.bin": b"?", "config.json": b"{}"})
    with pytest.raises(NotFound, match=r"has no safetensors files and no \*\.bin of torch\.save"):
        open_checkpoint(tmp_path)
