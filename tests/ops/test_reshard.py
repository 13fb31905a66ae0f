"""``reshard``: shards of one size become those of another, byte for byte what ``save`` writes of the source."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import shardtool
from shardtool import stores
from shardtool.errors import (
    ChecksumMismatch,
    FormatError,
    Incomplete,
    NotFound,
    PlanError,
    UnsupportedModel,
)
from shardtool.layouts import tables
from tests.builders import (
    COUNTING,
    KINDS,
    Files,
    config,
    contents,
    counted,
    engine_saved,
    flipped,
    model,
    places,
    put,
    random,
    rank_tensors,
    tensors,
    whole_tensors,
)
from tests.ops.cases import Case, cases
from tests.oracle import expected

CONFIG = config()
HELD = tensors(CONFIG)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return put(tmp_path / "model", model(CONFIG, HELD, files=2))


@pytest.fixture
def shards(source: str, tmp_path: Path) -> Path:
    shardtool.save(source, tmp_path / "tp4", tp=4, max_part_size=20_000)
    return tmp_path / "tp4"


@settings(max_examples=60)
@given(cases())
def test_resharding_gives_every_byte_that_saving_gives(case: Case):
    """Whatever the model, the two sizes, the parts, the memory, and how many files the source lies in."""
    with places() as place:
        source, a, b, c, d = put(place("source"), case.files), place("a"), place("b"), place("c"), place("d")
        shardtool.save(source, a, tp=case.tp, **case.options)
        shardtool.save(source, b, tp=case.tp2, **case.options2)
        same = {**case.options2, "memory_limit": case.options["memory_limit"]}
        summary = shardtool.reshard(a, c, tp=case.tp2, **same)
        assert summary.complete
        assert contents(c) == contents(b)
        shardtool.reshard(c, d, tp=case.tp, **{**case.options, "memory_limit": 0})
        assert contents(d) == contents(a)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_resharding_in_folders_is_saving(source: str, shards: Path, tmp_path: Path, tp: int):
    shardtool.save(source, tmp_path / "saved", tp=tp)
    shardtool.reshard(shards, tmp_path / "resharded", tp=tp)
    assert contents(tmp_path / "resharded") == contents(tmp_path / "saved")


def test_nothing_but_the_shards_is_needed(source: str, shards: Path, tmp_path: Path):
    shardtool.save(source, tmp_path / "saved", tp=2)
    for path in Path(source).iterdir():
        path.unlink()
    shardtool.reshard(shards, tmp_path / "resharded", tp=2)
    assert contents(tmp_path / "resharded") == contents(tmp_path / "saved")


def test_tables_that_have_changed_since_do_not_matter(
    source: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The manifest keeps the table that cut the model, so that a checkpoint can be read for ever."""
    shardtool.save(source, tmp_path / "saved", tp=2)
    monkeypatch.setattr(tables, "FAMILIES", ())
    with pytest.raises(UnsupportedModel):
        shardtool.save(source, tmp_path / "new", tp=2)
    shardtool.reshard(shards, tmp_path / "resharded", tp=2)
    assert contents(tmp_path / "resharded") == contents(tmp_path / "saved")
    assert shardtool.verify(tmp_path / "resharded", against=shards).ok


def test_the_dtype_is_that_of_the_shards(tmp_path: Path):
    made = config(torch_dtype="float32")
    source = put(tmp_path / "model", model(made, tensors(made, dtype="F32")))
    shardtool.save(source, tmp_path / "a", tp=4, dtype="float16")
    shardtool.save(source, tmp_path / "b", tp=2, dtype="float16")
    shardtool.reshard(tmp_path / "a", tmp_path / "c", tp=2)
    assert contents(tmp_path / "c") == contents(tmp_path / "b")


def test_names_and_parts_are_chosen_anew(shards: Path, tmp_path: Path):
    shardtool.reshard(shards, tmp_path / "out", tp=2, pattern="rank{rank:02d}/{part}.safetensors", max_part_size=5000)
    keys = {key for key in contents(tmp_path / "out") if key.endswith(".safetensors")}
    assert {"rank00/0.safetensors", "rank01/0.safetensors", "rank01/1.safetensors"} <= keys


# Refusals.


def test_whole_tensors_are_refused(source: str, tmp_path: Path):
    with pytest.raises(PlanError, match="is not sharded; use shardtool save"):
        shardtool.reshard(source, tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()


def test_a_size_that_does_not_divide_is_refused(shards: Path, tmp_path: Path):
    with pytest.raises(PlanError, match="cannot be divided by --tp 3"):
        shardtool.reshard(shards, tmp_path / "out", tp=3)
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_not_carried_on(shards: Path, tmp_path: Path):
    key = "model-rank-2-part-0.safetensors"
    path = shards / key
    path.write_bytes(flipped(path.read_bytes(), -1))
    with pytest.raises(
        ChecksumMismatch, match=rf"{re.escape(key)}: tensor '.*' differs from its digest.*nothing was written"
    ):
        shardtool.reshard(shards, tmp_path / "out", tp=2)
    assert contents(tmp_path / "out") == {}


def test_damage_in_a_copy_that_is_not_needed_is_found_too(shards: Path, tmp_path: Path):
    """All ranks have the norms, of which one rank's are read; and what was there before is still there."""
    path = shards / "model-rank-3-part-0.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    norm = next(entry for name, entry in header.items() if name.endswith("input_layernorm.weight"))
    path.write_bytes(flipped(data, 8 + int.from_bytes(data[:8], "little") + norm["data_offsets"][0]))
    with pytest.raises(ChecksumMismatch, match=r"rank-3.*input_layernorm.* differs .*; nothing was written"):
        shardtool.reshard(shards, tmp_path / "out", tp=2)
    assert contents(tmp_path / "out") == {}
    assert shardtool.reshard(shards, tmp_path / "some", tp=2, ranks=[0]).written  # which reads none of rank 3
    assert shardtool.reshard(shards, tmp_path / "out", tp=2, verify=False).complete
    made = contents(tmp_path / "out")
    with pytest.raises(ChecksumMismatch, match=r"nothing was written"):
        shardtool.reshard(shards, tmp_path / "out", tp=1, overwrite=True)
    assert contents(tmp_path / "out") == made


@pytest.mark.parametrize("limit", ["200KiB", "64MiB"])
def test_every_byte_of_the_input_is_read_once_and_checked_on_the_way(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
):
    """Where there is memory for the chunks of which a part is wanted; else everything is read to be checked first."""
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    held = contents(shards)
    with places() as place:
        uri = put(place("shards"), held).replace("memory", "counted")
        shardtool.reshard(uri, tmp_path / "out", tp=2, memory_limit=limit)
        spans = [span for key, read in counted(uri).reads.items() if key.endswith(".safetensors") for span in read]
    behind_headers = sum(b - a for a, b in spans if a)
    data = sum(len(d) - 8 - int.from_bytes(d[:8], "little") for key, d in held.items() if key.endswith(".safetensors"))
    assert behind_headers == data if limit == "64MiB" else behind_headers > 3 * data // 2


def test_without_verify_the_digests_of_the_input_are_not_looked_at(shards: Path, tmp_path: Path):
    path = shards / "model-rank-2-part-0.safetensors"
    path.write_bytes(flipped(path.read_bytes(), -1))
    assert shardtool.reshard(shards, tmp_path / "out", tp=2, verify=False).complete


def test_tensors_whose_names_were_exchanged_are_not_carried_on(shards: Path, tmp_path: Path):
    """Every tensor's bytes are as they were; the header is not."""
    names = [b"model.layers.0.input_layernorm.weight", b"model.layers.1.input_layernorm.weight"]
    where = next(p for p in sorted(shards.glob("*.safetensors")) if all(name in p.read_bytes() for name in names))
    data = where.read_bytes()
    exchanged = data.replace(names[0], b"?" * len(names[0])).replace(names[1], names[0])
    where.write_bytes(exchanged.replace(b"?" * len(names[0]), names[1]))
    with pytest.raises((ChecksumMismatch, FormatError)):
        shardtool.reshard(shards, tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()


def test_a_damaged_side_file_is_not_carried_on(shards: Path, tmp_path: Path):
    path = shards / "tokenizer.json"
    path.write_bytes(flipped(path.read_bytes(), 3))
    with pytest.raises(ChecksumMismatch, match=r"tokenizer\.json"):
        shardtool.reshard(shards, tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named(shards: Path, tmp_path: Path):
    (shards / "model-rank-1-part-0.safetensors").unlink()
    with pytest.raises(Incomplete, match=r"model-rank-1-part-0\.safetensors is missing"):
        shardtool.reshard(shards, tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_shards_are_not_resharded_onto_themselves(shards: Path, overwrite: bool):
    before = contents(shards)
    with pytest.raises(PlanError, match="--output"):
        shardtool.reshard(shards, shards, tp=2, overwrite=overwrite)
    assert contents(shards) == before


def test_an_unfinished_checkpoint_is_refused(source: str, tmp_path: Path):
    shardtool.save(source, tmp_path / "half", tp=2, ranks=[0])
    with pytest.raises(Incomplete, match="is being written or was interrupted"):
        shardtool.reshard(tmp_path / "half", tmp_path / "out", tp=1)


def test_what_is_not_there_is_not_found(tmp_path: Path):
    with pytest.raises(NotFound):
        shardtool.reshard(tmp_path / "nothing", tmp_path / "out", tp=1)


# Shards that an engine saved, without a manifest.


def engine_files(family: str, tp: int, **changes: Any) -> tuple[Files, Files, dict[str, Any]]:
    """(source, shards, config) as an engine would have saved them."""
    made = config(family, **changes)
    held = tensors(made)
    return model(made, held), engine_saved(made, expected(held, made, tp), parts=2), made


@pytest.mark.parametrize("tp", [(1, 2), (2, 8), (4, 1), (8, 4)])
@pytest.mark.parametrize("family", KINDS)
def test_an_engines_shards_can_be_resharded(family: str, tp: tuple[int, int]):
    source, shards, made = engine_files(family, tp[0])
    with places() as place:
        out = place("out")
        shardtool.reshard(put(place("shards"), shards), out, tp=tp[1])
        found = contents(out)
        for rank, wanted in enumerate(expected(whole_tensors(source), made, tp[1])):
            assert rank_tensors(found, rank) == wanted
        assert shardtool.verify(out, against=put(place("source"), source)).ok
        assert json.loads(found["config.json"]) == made
        assert found["tokenizer.json"] == shards["tokenizer.json"]


def test_an_engines_shards_may_have_other_names(tmp_path: Path):
    source, shards, _ = engine_files("llama", 2)
    renamed = {key.replace("model-rank-", "w").replace("-part-", "_"): data for key, data in shards.items()}
    put(tmp_path / "shards", renamed)
    with pytest.raises(FormatError):  # taken for whole tensors, of which each comes twice
        shardtool.reshard(tmp_path / "shards", tmp_path / "out", tp=1)
    pattern = "w{rank}_{part}.safetensors"
    shardtool.reshard(tmp_path / "shards", tmp_path / "out", tp=1, source_pattern=pattern)
    assert shardtool.verify(tmp_path / "out", against=put(tmp_path / "model", source)).ok
    with pytest.raises(NotFound, match="--pattern"):
        shardtool.reshard(tmp_path / "shards", tmp_path / "out2", tp=1, source_pattern="x{rank}_{part}.safetensors")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("model-rank-1-part-0.safetensors", "1"),
        ("model-rank-0-part-1.safetensors", "have no tensor"),
        ("config.json", "has no config.json"),
    ],
)
def test_an_engines_shards_that_are_not_whole_are_refused(tmp_path: Path, lost: str, said: str):
    _, shards, _ = engine_files("llama", 4)
    dropped = [lost] if "rank-1" not in lost else [key for key in shards if "rank-1" in key]
    put(tmp_path / "shards", {key: data for key, data in shards.items() if key not in dropped})
    with pytest.raises(shardtool.ShardtoolError, match=said):
        shardtool.reshard(tmp_path / "shards", tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()


def test_an_engines_last_rank_cannot_be_missed(tmp_path: Path):
    """Without a manifest nothing says how many ranks there were; the sizes of config.json do."""
    _, shards, _ = engine_files("llama", 4)
    put(tmp_path / "shards", {key: data for key, data in shards.items() if "rank-3" not in key})
    with pytest.raises(shardtool.ShardtoolError):
        shardtool.reshard(tmp_path / "shards", tmp_path / "out", tp=2)


def test_pipeline_stages_that_an_engine_saved_are_read(tmp_path: Path):
    """Shards of two stages without their manifest, as an engine leaves them, are what they were with it."""
    files, _, _ = engine_files("llama", 2)
    put(tmp_path / "model", files)
    shardtool.save(tmp_path / "model", tmp_path / "made", tp=2, pp=2)
    bare = {key: data for key, data in contents(tmp_path / "made").items() if key != "shardtool.json"}
    put(tmp_path / "shards", bare)
    assert shardtool.verify(tmp_path / "shards", against=tmp_path / "model").ok
    shardtool.reshard(tmp_path / "shards", tmp_path / "tp4", tp=4)
    assert shardtool.verify(tmp_path / "tp4", against=tmp_path / "model").ok
    (tmp_path / "shards" / "model-pp-0-tp-1-part-0.safetensors").unlink()
    with pytest.raises(Incomplete, match="has no file of rank 1, but one of rank 3"):
        shardtool.reshard(tmp_path / "shards", tmp_path / "out", tp=4)


def test_what_only_the_new_layout_drops_is_kept_for_merge(tmp_path: Path):
    """Before 0.31 vLLM ignored a head of its own beside tied embeddings."""
    made = config(tie_word_embeddings=True)
    held = tensors(made)
    held["lm_head.weight"] = random((made["vocab_size"], made["hidden_size"]), "BF16", 77)
    put(tmp_path / "model", model(made, held))
    shardtool.save(tmp_path / "model", tmp_path / "new", tp=2)
    shardtool.reshard(tmp_path / "new", tmp_path / "old", tp=2, layout="vllm:builtin", engine_version="0.27")
    shardtool.save(tmp_path / "model", tmp_path / "direct", tp=2, engine_version="0.27")
    assert contents(tmp_path / "old") == contents(tmp_path / "direct")
    shardtool.merge(tmp_path / "old", tmp_path / "merged")
    assert shardtool.verify(tmp_path / "merged", against=tmp_path / "model").ok
