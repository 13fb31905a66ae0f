"""Which layout cuts a model: names, files, what a manifest kept; and that a file cuts as the table does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool.errors import FormatError, PlanError, UnsupportedModel, UsageError
from shardtool.layouts import file as files
from shardtool.ops import layout as layouts
from shardtool.ops import source as sources
from shardtool.ops.layout import Choice
from shardtool.parallel import Parallel
from tests.builders import Files, Raw, config, contents, model, put, random, rank_tensors, tensors
from tests.layouts import traced
from tests.layouts.test_quantized import gpt_oss

GROUP = "vllm-0.32.0"


def of_trace(name: str) -> tuple[Files, traced.Golden]:
    """A checkpoint with the tensors of a kept trace, every one with bytes of its own."""
    kept = traced.read(GROUP, name)
    held: dict[str, Raw] = {
        key: random(tensor.shape, tensor.dtype.name, seed)
        for seed, (key, tensor) in enumerate(kept.layout.tensors.items())
    }
    return model(kept.config, held), kept


def saved(place: Path, name: str, **options: Any) -> Files:
    shardtool.save(place / "model", out := place / name, **options)
    return contents(out)


def layout_file(place: Path, kept: traced.Golden) -> str:
    path = place / "layout.json"
    path.write_bytes(files.encode(kept.layout))
    return str(path)


def shards(found: Files, ranks: int) -> list[Any]:
    return [rank_tensors(found, rank) for rank in range(ranks)]


@pytest.mark.parametrize("name", traced.names(GROUP))
def test_a_layout_file_and_the_table_write_the_same_shards(name: str, tmp_path: Path):
    made, kept = of_trace(name)
    put(tmp_path / "model", made)
    file = layout_file(tmp_path, kept)
    tp = max(one.parallel.tp for one in kept.layout.traced if one.parallel.pp == 1 and not one.parallel.ep)
    by_file = saved(tmp_path, "by-file", tp=tp, layout=file)
    by_table = saved(tmp_path, "by-table", tp=tp, layout="vllm:builtin")
    assert shards(by_file, tp) == shards(by_table, tp)
    if "quantization_config" not in kept.config:  # the file and the table name quantized modules in words of their own
        assert by_file["config.json"] == by_table["config.json"]
    assert shardtool.verify(tmp_path / "by-file", against=tmp_path / "model").ok
    shardtool.merge(tmp_path / "by-file", tmp_path / "merged")
    assert shardtool.verify(tmp_path / "merged", against=tmp_path / "model").ok


# Reshard.


@pytest.fixture
def by_file(tmp_path: Path) -> tuple[Path, str]:
    """Shards of tp 4 that were cut by a layout file, and the file."""
    made, kept = of_trace("llama")
    put(tmp_path / "model", made)
    file = layout_file(tmp_path, kept)
    shardtool.save(tmp_path / "model", tmp_path / "tp4", tp=4, layout=file)
    return tmp_path, file


def test_a_traced_layout_knows_its_own_sizes_only(by_file: tuple[Path, str]):
    place, _ = by_file
    shardtool.reshard(place / "tp4", place / "again", tp=4)
    assert shards(contents(place / "again"), 4) == shards(contents(place / "tp4"), 4)
    with pytest.raises(PlanError, match=r"holds the layout of vllm 0\.32\.0 for tp 4, not for tp 2.*--layout"):
        shardtool.reshard(place / "tp4", place / "out", tp=2)
    assert not (place / "out").exists()


@pytest.mark.parametrize("layout", ["file", "vllm:builtin", "vllm"])
def test_other_sizes_need_the_file_or_the_table(by_file: tuple[Path, str], layout: str):
    place, file = by_file
    shardtool.reshard(place / "tp4", place / "tp1", tp=1, layout=file if layout == "file" else layout)
    assert shards(contents(place / "tp1"), 1) == shards(saved(place, "direct", tp=1), 1)


def test_the_manifest_says_which_layout_it_was(by_file: tuple[Path, str]):
    place, _ = by_file
    record = json.loads(contents(place / "tp4")["shardtool.json"])["layout"]
    assert record == {"engine": "vllm", "engine_version": "0.32.0", "kind": "traced", "class": "LlamaForCausalLM"}
    summary = shardtool.save(place / "model", place / "x", tp=2, dry_run=True)
    assert summary.details["layout"] == "the built-in table llama"


# What is refused.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    made = config()
    put(tmp_path / "model", model(made, tensors(made)))
    return tmp_path


@pytest.mark.parametrize("layout", ["vllm:guessed", "megatron", "layout.txt", "./layout"])
def test_a_layout_that_is_neither_a_name_nor_a_file_is_refused(place: Path, layout: str):
    with pytest.raises(UsageError, match=r"is neither the name of a layout \(vllm, .*\) nor a layout file"):
        shardtool.save(place / "model", place / "out", tp=2, layout=layout)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format": "shardtool/2"}', b'{"format": "shardtool-layout/1"}'])
def test_a_file_that_is_no_layout_is_refused_by_its_name(place: Path, data: bytes):
    (place / "bad.json").write_bytes(data)
    with pytest.raises(FormatError, match=r"bad\.json"):
        shardtool.save(place / "model", place / "out", tp=2, layout=str(place / "bad.json"))


def test_a_file_of_another_checkpoint_is_refused(place: Path):
    file = layout_file(place, traced.read(GROUP, "qwen3"))
    with pytest.raises(PlanError, match="is of another checkpoint"):
        shardtool.save(place / "model", place / "out", tp=4, layout=file)


def test_an_engine_that_is_not_installed_is_missed_with_the_way_out(place: Path):
    with pytest.raises(
        UsageError, match=r"vLLM is not installed here: install it, or name a Python .* --engine-python"
    ):
        shardtool.save(place / "model", place / "out", tp=2, layout="vllm:traced")
    unknown = config(architectures=["NovelForCausalLM"])
    put(place / "novel", model(unknown, tensors(config())))
    with pytest.raises(UnsupportedModel, match=r"NovelForCausalLM .* shardtool trace writes it to a file for --layout"):
        shardtool.save(place / "novel", place / "out", tp=2)


FLAGS = {"engine_version", "engine_python", "trust_remote_code", "moe_backend"}
MEANT = {
    "transformers": set(),
    "vllm:builtin": {"engine_version", "moe_backend"},
    "sglang": {"engine_version"},
    "sglang:builtin": {"engine_version"},
    "FILE": set(),
}


@pytest.mark.parametrize(
    ("layout", "flag"), [(layout, flag) for layout, meant in MEANT.items() for flag in sorted(FLAGS - meant)]
)
def test_flags_that_mean_nothing_to_a_layout_are_refused(place: Path, layout: str, flag: str):
    if layout == "FILE":
        layout = layout_file(place, traced.read(GROUP, "llama"))
    said: dict[str, Any] = {flag: "triton"}
    name = flag.replace("_", "-")
    with pytest.raises(UsageError, match=f"--{name} means nothing to --layout {layout}, which .*; leave it out"):
        shardtool.save(place / "model", place / "out", tp=4, layout=layout, **said)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("vllm:builtin", {"engine_version": "0.27", "moe_backend": "triton"}),
        ("sglang", {"engine_version": "0.5.23"}),
        ("vllm", {"engine_version": "0.27", "engine_python": "python", "trust_remote_code": True}),
    ],
)
def test_flags_that_mean_something_to_a_layout_are_taken(place: Path, layout: str, said: dict[str, Any]):
    summary = shardtool.save(place / "model", place / "out", tp=2, layout=layout, dry_run=True, **said)
    assert summary.details["engine"].endswith(said["engine_version"])


def test_a_layout_file_takes_the_backend_that_it_is_for(tmp_path: Path):
    made, kept = of_trace("llama")
    put(tmp_path / "model", made)
    file = tmp_path / "layout.json"
    file.write_bytes(files.encode(replace(kept.layout, moe_backend="marlin")))
    said: dict[str, Any] = {"tp": 4, "layout": str(file), "dry_run": True}
    shardtool.save(tmp_path / "model", tmp_path / "out", moe_backend="marlin", **said)
    with pytest.raises(UsageError, match=r"--moe-backend means nothing to --layout .*json, which is what one engine"):
        shardtool.save(tmp_path / "model", tmp_path / "out", moe_backend="triton", **said)


def test_a_backend_that_no_table_has_heard_of_is_refused(place: Path):
    with pytest.raises(UsageError, match=r"--moe-backend 'guess' is none of vLLM's kernels for experts: .*marlin"):
        shardtool.save(place / "model", place / "out", tp=2, moe_backend="guess")


# Reshard without a layout, and with one.


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    """Shards of a model whose experts' shapes depend on the kernel."""
    shardtool.save(put(tmp_path / "model", model(*gpt_oss())), tmp_path / "tp1", tp=1, moe_backend="marlin")
    return tmp_path


@pytest.mark.parametrize(
    "said", [{"engine_version": "0.27"}, {"engine_python": "x"}, {"trust_remote_code": True}, {"moe_backend": "triton"}]
)
def test_flags_of_a_layout_are_refused_where_none_is_chosen(mxfp4: Path, said: dict[str, Any]):
    with pytest.raises(UsageError, match=r"--[a-z-]+ means nothing without --layout: .* or say --layout vllm"):
        shardtool.reshard(mxfp4 / "tp1", mxfp4 / "tp2", tp=2, **said)
    shardtool.reshard(mxfp4 / "tp1", mxfp4 / "tp2", tp=2, moe_backend="marlin")


@pytest.mark.parametrize("layout", ["vllm", "vllm:builtin"])
def test_the_backend_of_the_shards_is_kept_unless_another_is_said(mxfp4: Path, layout: str):
    for said in ("marlin", "triton"):
        shardtool.save(mxfp4 / "model", mxfp4 / said, tp=2, moe_backend=said)
    wanted = {said: shards(contents(mxfp4 / said), 2) for said in ("marlin", "triton")}
    assert wanted["marlin"] != wanted["triton"]
    shardtool.reshard(mxfp4 / "tp1", mxfp4 / "kept", tp=2, layout=layout)
    assert shards(contents(mxfp4 / "kept"), 2) == wanted["marlin"]
    shardtool.reshard(mxfp4 / "tp1", mxfp4 / "other", tp=2, layout=layout, moe_backend="triton")
    assert shards(contents(mxfp4 / "other"), 2) == wanted["triton"]


# Before an engine is started.


@pytest.mark.parametrize("said", [None, "float32", "float64"])
def test_a_trace_for_shards_needs_a_dtype_that_does_not_depend_on_the_gpu(tmp_path: Path, said: str | None):
    made = config(torch_dtype=said, dtype=said)
    put(tmp_path / "model", model({k: v for k, v in made.items() if v is not None}, tensors(config())))
    with pytest.raises(UsageError, match=r"config\.json .*: say --dtype bfloat16 or --dtype float16"):
        shardtool.save(tmp_path / "model", tmp_path / "out", tp=2, layout="vllm:traced")
    with pytest.raises(UsageError, match="vLLM is not installed here"):
        shardtool.save(tmp_path / "model", tmp_path / "out", tp=2, layout="vllm:traced", dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "float64", "F8_E4M3"])
def test_engines_are_asked_for_dtypes_that_they_have(place: Path, dtype: str):
    with pytest.raises(UsageError, match=f"--dtype {dtype}"):
        shardtool.trace(place / "model", tp=2, dtype=dtype)
    with pytest.raises(UsageError, match="vLLM is not installed here"):
        shardtool.trace(place / "model", tp=2, dtype="float32")


@pytest.mark.parametrize("data", [b"", b'{"my": "notes"}', b"\xff" * 100])
def test_a_trace_replaces_nothing_but_a_layout_file(place: Path, data: bytes):
    path = place / "notes.json"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"--output '.*notes\.json' is there already, and only a layout file is"):
        shardtool.trace(place / "model", tp=2, output=path)
    assert path.read_bytes() == data
    for output in (layout_file(place, traced.read(GROUP, "llama")), place / "new.json", place / "new" / "new.json"):
        with pytest.raises(UsageError, match="vLLM is not installed here"):
            shardtool.trace(place / "model", tp=2, output=output)
    assert not (place / "new").exists()


def test_a_whole_checkpoint_has_no_layout_of_its_own(place: Path):
    source = sources.open_source(str(place / "model"))
    with source.store, pytest.raises(PlanError, match="is not sharded: say with --layout"):
        layouts.choose(source, Choice(), Parallel(2))
