"""What counts as a source: which files and tensors are read, which side files come along, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool.errors import FormatError, Incomplete, NotFound, UsageError
from shardtool.ops import source as sources
from shardtool.ops.source import MAX_SIDE, open_source
from tests.builders import (
    Files,
    config,
    contents,
    engine_saved,
    model,
    put,
    random,
    rank_tensors,
    safetensors,
    tensors,
)
from tests.oracle import expected

CONFIG = config()
HELD = tensors(CONFIG)
FILES = model(CONFIG, HELD, files=3)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path / "model", FILES)
    return tmp_path / "model"


def saved(folder: Path, tp: int = 2) -> Files:
    """The shards of a folder's model."""
    out = folder.parent / "out"
    shardtool.save(folder, out, tp=tp)
    return contents(out)


def right(files: Files) -> bool:
    return all(rank_tensors(files, rank) == wanted for rank, wanted in enumerate(expected(HELD, CONFIG, 2)))


# The index decides.


def test_the_index_decides_which_files_are_the_source(folder: Path):
    put(folder, {"model-extra.safetensors": safetensors({"model.norm.weight": random((32,), "BF16", 9)})})
    assert right(saved(folder))


def test_the_index_decides_which_tensors_are_the_source(folder: Path):
    """Another tensor in a listed file does not count, were it one that the index takes from elsewhere."""
    first = {name: raw for i, (name, raw) in enumerate(HELD.items()) if i % 3 == 0}
    more = {**first, "strange.weight": random((3,), "F32"), "model.norm.weight": random((32,), "BF16", 9)}
    assert "model.norm.weight" not in first
    put(folder, {"model-00001-of-00003.safetensors": safetensors(more)})
    assert right(saved(folder))


def test_without_an_index_every_file_counts(tmp_path: Path):
    put(tmp_path / "model", {key: data for key, data in FILES.items() if key != INDEX})
    assert right(saved(tmp_path / "model"))


def test_without_an_index_a_tensor_in_two_files_is_refused(tmp_path: Path):
    files = {key: data for key, data in FILES.items() if key != INDEX}
    files["more.safetensors"] = safetensors({"model.norm.weight": random((32,), "BF16", 9)})
    put(tmp_path / "model", files)
    with pytest.raises(FormatError, match=r"'model\.norm\.weight' is in model-\S+ and in more\.safetensors"):
        saved(tmp_path / "model")
    assert not (tmp_path / "out").exists()


def with_index(folder: Path, **changes: Any) -> None:
    table = json.loads(FILES[INDEX])
    table["weight_map"].update(changes)
    put(folder, {INDEX: json.dumps(table).encode()})


@pytest.mark.parametrize(
    "key", ["../model/x.safetensors", "/etc/passwd", "a//b.safetensors", "./x.safetensors", "", "a\\b"]
)
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, key: str):
    with_index(folder, **{"model.norm.weight": key})
    with pytest.raises(FormatError, match="which is not inside the checkpoint"):
        saved(folder)


def test_an_index_that_names_a_file_that_is_not_there_is_refused(folder: Path):
    with_index(folder, **{"model.norm.weight": "model-9.safetensors"})
    with pytest.raises(Incomplete, match=r"model-9\.safetensors is missing"):
        saved(folder)


def test_an_index_that_names_a_tensor_that_is_not_there_is_refused(folder: Path):
    with_index(folder, **{"a.weight": "model-00001-of-00003.safetensors"})
    with pytest.raises(FormatError, match=r"says that tensor 'a\.weight' is in model-00001"):
        saved(folder)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_index_is_refused(folder: Path, text: bytes):
    put(folder, {INDEX: text})
    with pytest.raises(FormatError, match=INDEX):
        saved(folder)


def test_an_index_of_another_format_is_not_the_index(tmp_path: Path):
    """Mistral's own files have one too."""
    consolidated = {"weight_map": {"x": "consolidated-1.safetensors"}}
    files = {**FILES, "consolidated.safetensors.index.json": json.dumps(consolidated).encode()}
    put(tmp_path / "model", files)
    assert right(saved(tmp_path / "model"))


# What is not read and not copied.


FOREIGN = {
    "consolidated.safetensors": b"not safetensors",
    "consolidated-00001-of-00002.safetensors": b"x",
    "adapter_model.safetensors": b"x",
    "original/consolidated.00.pth": b"x",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"x",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"x",
    "pytorch_model.bin.index.json": b"{}",
    "model.Q4_K_M.gguf": b"x",
    "tf_model.h5": b"x",
    "flax_model.msgpack": b"x",
    "weights.pt": b"x",
    "unet/diffusion.safetensors": b"x",
    ".git/config": b"x",
    ".gitattributes": b"x",
    "__pycache__/modeling.pyc": b"x",
}
COPIED = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"\0spm",
    "generation_config.json": b"{}",
    "modeling_mine.py": b"pass\n",
    "README.md": b"# Mine\n",
    "chat_template.jinja": b"",
    "templates/tool.jinja": b"{{ x }}",
}


@pytest.mark.parametrize("indexed", [True, False])
def test_other_formats_are_neither_read_nor_copied_and_side_files_are(tmp_path: Path, indexed: bool):
    files = {key: data for key, data in FILES.items() if indexed or key != INDEX}
    put(tmp_path / "model", {**files, **FOREIGN, **COPIED})
    found = saved(tmp_path / "model")
    assert right(found)
    assert {key: data for key, data in found.items() if "rank" not in key} == {
        **COPIED,
        "config.json": FILES["config.json"],
        "shardtool.json": found["shardtool.json"],
    }


def test_config_json_is_copied_to_the_byte_where_nothing_must_change(folder: Path):
    odd = (
        b'{ "architectures" : ["LlamaForCausalLM"],\r\n'
        + FILES["config.json"][FILES["config.json"].index(b'  "model_type"') :]
    )
    put(folder, {"config.json": odd})
    assert saved(folder)["config.json"] == odd


def test_a_large_side_file_stays_behind_and_a_note_says_so(folder: Path):
    with (folder / "recording.wav").open("wb") as file:
        os.truncate(file.fileno(), MAX_SIDE + 1)
    with (folder / "small.wav").open("wb") as file:
        os.truncate(file.fileno(), 1 << 20)
    out = folder.parent / "out"
    summary = shardtool.save(folder, out, tp=1)
    assert not (out / "recording.wav").exists()
    assert (out / "small.wav").stat().st_size == 1 << 20
    assert "recording.wav (64.0 MiB) stays behind: side files come along up to 64.0 MiB" in summary.notes


def test_a_snapshot_of_links_is_a_source(folder: Path, tmp_path: Path):
    """The cache of huggingface_hub: names that link to blobs elsewhere."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(i)))
    shardtool.save(snapshot, tmp_path / "out", tp=2)
    assert right(contents(tmp_path / "out"))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


# What is no source.


def test_a_folder_that_is_not_there_is_not_found(tmp_path: Path):
    with pytest.raises(NotFound):
        saved(tmp_path / "nothing")


def test_a_folder_without_weights_is_not_found(tmp_path: Path):
    put(tmp_path / "model", {"config.json": FILES["config.json"], "model.gguf": b"x"})
    with pytest.raises(NotFound, match=r"has no safetensors files and no \*\.bin of torch\.save"):
        saved(tmp_path / "model")


def test_a_folder_without_config_is_not_found(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(NotFound, match=r"has no config\.json"):
        saved(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"", "is not JSON"), (b"[]", "is not a table"), (b"\xff\xfe", "is not text"), (b"[" * 100_000, "is not JSON")],
)
def test_a_damaged_config_is_refused(folder: Path, text: bytes, said: str):
    put(folder, {"config.json": text})
    with pytest.raises(FormatError, match=rf"config\.json {said}"):
        saved(folder)


@pytest.mark.parametrize("data", [b"", b"short", b"\xff" * 100, (5).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_not_safetensors_is_named(folder: Path, data: bytes):
    put(folder, {"model-00002-of-00003.safetensors": data})
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.safetensors is"):
        saved(folder)


def test_a_truncated_file_is_named(folder: Path):
    put(folder, {"model-00002-of-00003.safetensors": FILES["model-00002-of-00003.safetensors"][:-1]})
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.safetensors is damaged: it ends too early"):
        saved(folder)


# Kinds.


def test_a_source_says_what_it_is(folder: Path, tmp_path: Path):
    whole = open_source(str(folder))
    assert whole.origin is None
    assert sorted(whole.inventory) == sorted(HELD)
    shardtool.save(folder, tmp_path / "out", tp=2)
    sharded = open_source(str(tmp_path / "out"))
    assert sharded.origin is not None
    assert sharded.inventory == whole.inventory
    assert sharded.config_text == whole.config_text
    put(tmp_path / "engine", engine_saved(CONFIG, expected(HELD, CONFIG, 4)))
    inferred = open_source(str(tmp_path / "engine"))
    assert inferred.origin is not None
    assert (inferred.origin.tp, inferred.inventory) == (4, whole.inventory)


def test_shards_with_a_tensor_of_another_dtype_are_refused(tmp_path: Path):
    ranks = expected(HELD, CONFIG, 2)
    for held in ranks:
        held["model.norm.weight"] = random((32,), "F16")
    put(tmp_path / "engine", engine_saved(CONFIG, ranks))
    with pytest.raises(FormatError, match=r"'model\.norm\.weight' of rank 0 is F16 \[32\].* the recipe says BF16"):
        open_source(str(tmp_path / "engine"))


def test_a_sample_tells_two_models_of_one_shape_apart(folder: Path, tmp_path: Path):
    first = sources.sample_of(open_source(str(folder)))
    assert first == sources.sample_of(open_source(str(folder)))
    put(tmp_path / "other", model(CONFIG, tensors(CONFIG, seed=1), files=3))
    assert first != sources.sample_of(open_source(str(tmp_path / "other")))
    shardtool.save(folder, tmp_path / "out", tp=2)
    assert first == sources.sample_of(open_source(str(tmp_path / "out")))


def test_a_folder_of_too_many_things_is_not_taken_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from shardtool import checkpoint

    monkeypatch.setattr(checkpoint, "MAX_OBJECTS", 3)
    put(tmp_path / "model", FILES)
    with pytest.raises(UsageError, match="more than 3 files; name the folder of one checkpoint"):
        open_source(str(tmp_path / "model"))
