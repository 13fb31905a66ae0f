"""``inspect``: any checkpoint is told apart and summed up from headers alone."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shardtool
from shardtool import stores
from shardtool.errors import FormatError, Incomplete, NotFound, UsageError
from shardtool.ops.inspect import FileSummary, inspect
from shardtool.stores.counting import CountingStore
from tests import builders

ROOT = Path(__file__).parents[2]
CONFIG = builders.config()
TENSORS = builders.tensors(CONFIG)
PARAMETERS = sum(math.prod(raw.array.shape) for raw in TENSORS.values())
BYTES = sum(raw.array.nbytes for raw in TENSORS.values())
SCALES = 4 * 4 * CONFIG["num_hidden_layers"]
"""Bytes of what vLLM adds to each layer of a rank: four float32 scales."""


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A Hugging Face checkpoint of two files."""
    return builders.put(tmp_path / "llama", builders.model(CONFIG, TENSORS, files=2))


@pytest.fixture
def shards(model: str, tmp_path: Path) -> Path:
    """Its shards for tp 2."""
    shardtool.save(model, tmp_path / "tp2", tp=2)
    return tmp_path / "tp2"


def test_a_hugging_face_checkpoint(model):
    found = inspect(model)
    assert (found.kind, found.architecture) == ("huggingface", "LlamaForCausalLM")
    assert (found.engine, found.tp, found.pp, found.dtype, found.pattern, found.written_by) == (None,) * 6
    assert (found.tensors, found.parameters, found.elements, found.bytes) == (
        len(TENSORS),
        PARAMETERS,
        PARAMETERS,
        BYTES,
    )
    assert [file.key for file in found.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [(d.dtype, d.tensors, d.elements, d.bytes) for d in found.dtypes] == [
        ("BF16", len(TENSORS), PARAMETERS, BYTES)
    ]


def test_shards_with_a_manifest_say_what_made_them_and_what_the_model_is(shards):
    found = inspect(shards)
    assert (found.kind, found.architecture, found.tp, found.pp, found.dtype) == (
        "sharded",
        "LlamaForCausalLM",
        2,
        1,
        "BF16",
    )
    assert found.engine is not None
    assert found.engine.startswith("vllm ")
    assert found.written_by == f"shardtool {shardtool.__version__}"
    assert found.parameters == PARAMETERS
    assert [(file.key, file.rank) for file in found.files] == [
        ("model-rank-0-part-0.safetensors", 0),
        ("model-rank-1-part-0.safetensors", 1),
    ]
    assert found.bytes == sum(file.bytes for file in found.files)
    assert all(file.size == (shards / file.key).stat().st_size for file in found.files)
    assert {d.dtype: d.bytes for d in found.dtypes}["F32"] == 2 * SCALES


def test_shards_without_a_manifest_are_told_by_their_names(shards):
    (shards / "shardtool.json").unlink()
    found = inspect(shards)
    assert (found.kind, found.tp, found.dtype, found.engine) == ("shards", 2, None, None)
    assert [file.rank for file in found.files] == [0, 1]
    assert found.parameters is not None


def test_shards_of_an_unknown_model_have_no_number_of_parameters(shards):
    (shards / "shardtool.json").unlink()
    (shards / "config.json").write_text(json.dumps({"architectures": ["NobodyKnows"]}))
    found = inspect(shards)
    assert (found.kind, found.architecture, found.parameters) == ("shards", "NobodyKnows", None)


def test_a_pattern_names_shards_that_are_called_otherwise(shards):
    (shards / "shardtool.json").unlink()
    for rank in range(2):
        (shards / f"model-rank-{rank}-part-0.safetensors").rename(shards / f"r{rank}.p0.safetensors")
    found = inspect(shards, pattern="r{rank}.p{part}.safetensors")
    assert [(file.key, file.rank) for file in found.files] == [("r0.p0.safetensors", 0), ("r1.p0.safetensors", 1)]


def test_a_pattern_that_names_nothing_is_refused(model):
    with pytest.raises(NotFound, match=r"no file that --pattern 'r\{rank\}.safetensors' names"):
        inspect(model, pattern="r{rank}.safetensors")


def test_a_single_file_is_enough_and_needs_no_config(tmp_path):
    data = builders.safetensors({"a": builders.random((2, 3), "F16"), "b": builders.random((), "I64")})
    (tmp_path / "one.safetensors").write_bytes(data)
    found = inspect(tmp_path / "one.safetensors")
    assert (found.kind, found.architecture, found.parameters, found.bytes) == ("file", None, 7, 20)
    assert found.files == (FileSummary("one.safetensors", None, len(data), 2, 20),)
    assert [(d.dtype, d.bytes) for d in found.dtypes] == [("F16", 12), ("I64", 8)]


def test_tensors_are_listed_by_a_shell_pattern_rank_by_rank_in_the_order_of_their_numbers(shards):
    found = inspect(shards, tensors="model.layers.*.mlp.down_proj.weight").listed
    assert [(t.rank, t.name) for t in found] == [
        (rank, f"model.layers.{layer}.mlp.down_proj.weight") for rank in range(2) for layer in range(2)
    ]
    assert {(t.dtype, t.shape, t.bytes) for t in found} == {("BF16", (32, 24), 2 * 32 * 24)}
    assert inspect(shards).listed == ()


def test_layer_10_comes_after_layer_9(tmp_path):
    config = builders.config(num_hidden_layers=11)
    model = builders.put(tmp_path / "llama", builders.model(config, builders.tensors(config)))
    names = [t.name for t in inspect(model, tensors="*.input_layernorm.weight").listed]
    assert names == [f"model.layers.{i}.input_layernorm.weight" for i in range(11)]


def test_a_name_that_no_tensor_has_is_not_found(model):
    with pytest.raises(NotFound, match=r"no tensor that --tensors 'lm_heat\.\*' names"):
        inspect(model, tensors="lm_heat.*")


def test_headers_are_read_and_no_tensor(monkeypatch):
    monkeypatch.setitem(stores.SCHEMES, "counted", builders.COUNTING)
    config = builders.config(vocab_size=100_000)
    with builders.places() as place:
        uri = place("llama")
        builders.put(uri, builders.model(config, builders.tensors(config)))
        store = builders.counted(uri.replace("memory", "counted"))
        assert isinstance(store, CountingStore)
        found = inspect(uri.replace("memory", "counted"))
    assert found.bytes > 10 << 20
    assert store.bytes_read < 1 << 17


def test_torch_is_not_imported(model):
    code = f"import sys; from shardtool import inspect; inspect({model!r}, tensors='*'); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "False\n"


def test_a_folder_without_a_checkpoint_is_not_found(tmp_path):
    with pytest.raises(NotFound, match="does not exist"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(NotFound, match="has no safetensors files"):
        inspect(tmp_path)


def test_what_is_there_is_told_of_shards_that_miss_files(shards):
    whole = inspect(shards)
    (shards / "model-rank-0-part-0.safetensors").unlink()
    found = inspect(shards)
    assert (whole.missing, found.missing) == ((), ("model-rank-0-part-0.safetensors",))
    assert found.files == whole.files[1:]
    assert found.bytes == whole.files[1].bytes
    assert (found.tp, found.parameters, found.engine) == (2, PARAMETERS, whole.engine)
    assert {t.rank for t in inspect(shards, tensors="*").listed} == {1}
    assert inspect(shards, tensors="lm_heat").listed == ()
    (shards / "model-rank-1-part-0.safetensors").unlink()
    found = inspect(shards)
    assert (len(found.missing), found.files, found.dtypes, found.bytes) == (2, (), (), 0)


def test_shards_that_are_still_being_written_are_incomplete(model, tmp_path):
    shardtool.save(model, tmp_path / "out", tp=2, ranks=[0])
    with pytest.raises(Incomplete, match="is being written or was interrupted"):
        inspect(tmp_path / "out")


def test_a_folder_that_is_called_like_a_file_is_a_folder(model, tmp_path):
    shardtool.save(model, tmp_path / "tp2.safetensors", tp=2)
    found = inspect(tmp_path / "tp2.safetensors")
    assert (found.kind, found.tp) == ("sharded", 2)


@pytest.mark.parametrize("name", ["tensors", "pattern"])
@pytest.mark.parametrize("value", [1, True, b"*"])
def test_an_argument_of_another_type_is_refused_by_name(shards, name, value):
    with pytest.raises(UsageError, match=re.escape(f"{name}={value!r} is not a text")):
        inspect(shards, **{name: value})


def test_a_damaged_header_is_refused_by_name(model):
    path = Path(model, "model-00002-of-00002.safetensors")
    path.write_bytes(builders.flipped(path.read_bytes(), 8))
    with pytest.raises(FormatError, match=r"model-00002-of-00002\.safetensors is damaged"):
        inspect(model)
