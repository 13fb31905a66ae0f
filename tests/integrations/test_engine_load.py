"""A checkpoint of any kind into a rank's model: the nearest way that fits, every byte right, nothing read in vain.

The models are plain modules whose tensors are those of shards that ``save`` wrote; that these are the engines' own is
tested in ``tests/engine``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardtool
from shardtool.checkpoint import open_checkpoint, read_header
from shardtool.errors import (
    BudgetTooSmall,
    ChecksumMismatch,
    Incomplete,
    NotFound,
    PlanError,
    TensorMismatch,
    UsageError,
)
from shardtool.integrations import engine_load
from shardtool.integrations.engine_checks import tied
from shardtool.integrations.engine_load import Engine, Rank, Report
from shardtool.integrations.engine_options import Options
from shardtool.layouts.base import Parallel
from shardtool.ops.bring import Slices, bundles, memory_for, steps
from shardtool.ops.slices import Wanted, opened
from shardtool.ops.stream import Fresh
from shardtool.stores import open_store
from tests.builders import Files, config, flipped, model, put, random, safetensors, tensors
from tests.integrations.modules import Cutter, Tree, digests, empty, poisoned
from tests.layouts import classic, mixtures

HEADER = 64 << 10
"""Bytes that are read of a file for its header, or all of a shorter file."""
VLLM = Engine("vllm", "vLLM", "0.32.0")
SGLANG = Engine("sglang", "SGLang", "0.5.23", parts=3, tells=False)


def source(family: str, **said: Any) -> Files:
    """A tiny Hugging Face checkpoint."""
    if family == "llama":
        made = config(**said)
        return model(made, tensors(made), files=3)
    made = mixtures.config(family, **said)
    return model(made, mixtures.tensors(made), files=3)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama``, ``tied``, ``qwen3_moe``, ``gpt_oss`` and ``deepseek_v3`` with shards at several sizes."""
    made = tmp_path_factory.mktemp("shelf")
    for name, files in {
        "llama": source("llama"),
        "tied": source("llama", tie_word_embeddings=True, vocab_size=101),
        "qwen3_moe": source("qwen3_moe"),
        "gpt_oss": source("gpt_oss"),
        "deepseek_v3": source("deepseek_v3"),
    }.items():
        put(made / name, files)
        for tp in (1, 2, 4):
            shardtool.save(made / name, made / f"{name}-tp{tp}", tp=tp)
    shardtool.save(made / "llama", made / "llama-pp2", tp=2, pp=2)
    shardtool.save(made / "llama", made / "llama-0.24", tp=4, engine_version="0.24")
    shardtool.save(made / "qwen3_moe", made / "qwen3_moe-ep2", tp=2, expert_parallel=True)
    return made


def loaded(into: torch.nn.Module, uri: Any, tp: int, rank: int, pp: int = 1, ep: bool = False, **said: Any) -> Report:
    """Load a rank's module."""
    options = Options(**{key: said.pop(key) for key in list(said) if key in Options.__slots__})
    return engine_load.load(into, uri, Rank(Parallel(tp, pp, ep), rank), options, **{"engine": VLLM, **said})


def same(into: torch.nn.Module, shards: Any, rank: int) -> bool:
    """Whether a module holds what a rank of some shards does."""
    return digests(into.state_dict().items()) == digests(shardtool.stream(shards, rank=rank))


# The rank's own files.


@pytest.mark.parametrize("name", ["llama", "tied", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_rank_reads_its_own_files_and_no_others(shelf: Path, name: str):
    shards = shelf / f"{name}-tp2"
    for rank in range(2):
        into = empty(shards, rank)
        report = loaded(into, shards, 2, rank)
        assert same(into, shards, rank)
        assert (report.way, report.why) == ("own", "")
        size = (shards / f"model-rank-{rank}-part-0.safetensors").stat().st_size
        held = sum(tensor.nbytes for tensor in into.state_dict().values())
        assert report.nbytes == held <= report.read <= size + min(size, HEADER)


def test_pipeline_stages_are_ranks_too(shelf: Path):
    shards = shelf / "llama-pp2"
    for rank in range(4):
        into = empty(shards, rank)
        assert loaded(into, shards, 2, rank, pp=2).way == "own"
        assert same(into, shards, rank)


def test_a_tensor_under_two_names_is_filled_once(shelf: Path):
    """As an engine's model has them: the head is the embedding."""
    found = poisoned(shardtool.load(shelf / "tied-tp2", rank=1))
    into = Tree(found | {"model.embed_tokens.weight": found["lm_head.weight"]})
    assert loaded(into, shelf / "tied-tp2", 2, 1).tensors == len(found)
    state = into.state_dict()
    assert state["model.embed_tokens.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
    del state["model.embed_tokens.weight"]
    assert digests(state.items()) == digests(shardtool.stream(shelf / "tied-tp2", rank=1))


def test_shards_without_a_manifest_are_loaded_too(shelf: Path, tmp_path: Path):
    """Those that an engine wrote itself: nothing is checked but names, shapes and types."""
    for name in ("config.json", *(f"model-rank-{rank}-part-0.safetensors" for rank in range(2))):
        (tmp_path / name).write_bytes((shelf / "llama-tp2" / name).read_bytes())
    into = empty(shelf / "llama-tp2", 1)
    assert loaded(into, tmp_path, 2, 1).way == "own"
    assert same(into, shelf / "llama-tp2", 1)
    into = empty(shelf / "llama-tp4", 3)
    assert loaded(into, tmp_path, 4, 3).way == "cut"
    assert same(into, shelf / "llama-tp4", 3)


def test_a_pattern_names_shards_that_have_no_manifest(shelf: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((shelf / "llama-tp2" / "config.json").read_bytes())
    for rank in range(2):
        data = (shelf / "llama-tp2" / f"model-rank-{rank}-part-0.safetensors").read_bytes()
        (tmp_path / f"r{rank}.safetensors").write_bytes(data)
    into = empty(shelf / "llama-tp2", 0)
    assert loaded(into, tmp_path, 2, 0, pattern="r{rank}.safetensors").way == "own"
    assert same(into, shelf / "llama-tp2", 0)
    with pytest.raises(UsageError, match="leave it out"):
        loaded(into, shelf / "llama-tp2", 2, 0, pattern="r{rank}.safetensors")


# Files that were cut otherwise.


def costs(plan: Slices) -> tuple[int, int]:
    """The fewest and the most bytes that a plan may take: a chunk of which parts are needed comes once, or each time.

    It is kept for a while, and how long depends on what the other threads read.
    """
    memory = memory_for(plan, Fresh("cpu"), None, None)
    made = steps(list(bundles(plan.slices, memory.run)), memory, {})
    reads = [(read.key, read.start, read.nbytes) for step in made for read in step.reads]
    most = sum(read[2] if plan.checked is None else plan.checked.cost([read]) for read in reads)
    return plan.to_read(), most


@pytest.mark.parametrize("name", ["llama", "tied", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("stored", "tp"), [(4, 2), (1, 2), (2, 4)])
def test_shards_of_other_sizes_are_cut_on_the_way(shelf: Path, name: str, stored: int, tp: int, verify: bool):
    """Only the ranges that are needed are read: where they are checked, the chunks at their ends whole."""
    uri, shards = shelf / f"{name}-tp{stored}", shelf / f"{name}-tp{tp}"
    heads = sum(min(path.stat().st_size, HEADER) for path in uri.rglob("*.safetensors"))
    for rank in (0, tp - 1):
        into = empty(shards, rank)
        report = loaded(into, uri, tp, rank, verify=verify)
        assert same(into, shards, rank)
        assert report.way == "cut"
        with opened(uri, Wanted(tp=tp, rank=rank, verify=verify)) as plan:
            least, most = costs(plan)
        assert least <= report.read - heads <= most
        assert verify or least == most


def test_stages_are_joined_and_parted(shelf: Path):
    into = empty(shelf / "llama-tp2", 1)
    assert loaded(into, shelf / "llama-pp2", 2, 1).way == "cut"
    assert same(into, shelf / "llama-tp2", 1)
    into = empty(shelf / "llama-pp2", 3)
    assert loaded(into, shelf / "llama-tp4", 2, 3, pp=2).way == "cut"
    assert same(into, shelf / "llama-pp2", 3)


def test_slices_of_experts_become_whole_experts_and_back(shelf: Path):
    into = empty(shelf / "qwen3_moe-ep2", 1)
    assert loaded(into, shelf / "qwen3_moe-tp4", 2, 1, ep=True).way == "cut"
    assert same(into, shelf / "qwen3_moe-ep2", 1)
    into = empty(shelf / "qwen3_moe-tp4", 2)
    assert loaded(into, shelf / "qwen3_moe-ep2", 4, 2).way == "cut"
    assert same(into, shelf / "qwen3_moe-tp4", 2)


@pytest.mark.parametrize(("family", "cut"), [("llama", {"layout": "sglang"}), ("gpt_neox", {"engine_version": "0.24"})])
def test_the_names_of_another_engine_or_version_are_translated(tmp_path: Path, family: str, cut: dict[str, Any]):
    """By the table of the version that runs, from what the manifest knows of each tensor: only ranges are read."""
    made = config() if family == "llama" else classic.config(family)
    held = tensors(made) if family == "llama" else classic.tensors(family, made)
    put(tmp_path / "model", model(made, held))
    shardtool.save(tmp_path / "model", tmp_path / "other", tp=4, **cut)
    shardtool.save(tmp_path / "model", tmp_path / "wanted", tp=2, engine_version="0.32")
    into = empty(tmp_path / "wanted", 1)
    assert into.state_dict().keys() != shardtool.load(tmp_path / "other", rank=1).keys()
    report = loaded(into, tmp_path / "other", 2, 1)
    assert report.way == "cut"
    assert same(into, tmp_path / "wanted", 1)


def test_the_same_names_of_another_version_are_taken_as_they_are(shelf: Path):
    shards = shelf / "llama-0.24"
    into = empty(shards, 2)
    assert loaded(into, shards, 4, 2).way == "own"
    assert same(into, shards, 2)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["llama-tp2", "llama-tp4", "llama"]),
    st.sampled_from([0, "1MiB", None, -1]),
    st.sampled_from([None, 1, 5]),
)
def test_whatever_the_means(shelf: Path, uri: str, limit: Any, concurrency: int | None):
    into = Cutter(shelf / "llama-tp2", 1)
    report = loaded(into, shelf / uri, 2, 1, memory_limit=limit, concurrency=concurrency)
    assert report.way == {"llama-tp2": "own", "llama-tp4": "cut", "llama": "fed"}[uri]
    assert same(into, shelf / "llama-tp2", 1)


# Whole tensors.


@pytest.mark.parametrize("name", ["llama", "tied", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_models_own_loader_gets_the_tensors_of_a_checkpoint(shelf: Path, name: str):
    into = Cutter(shelf / f"{name}-tp2", 1)
    report = loaded(into, shelf / name, 2, 1)
    assert report.way == "fed"
    assert sorted(into.names) == sorted(open_checkpoint(shelf / name).entries())
    assert same(into, shelf / f"{name}-tp2", 1)


@pytest.mark.parametrize("name", ["llama", "tied", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_version_that_no_table_knows_gets_them_from_shards(shelf: Path, name: str):
    """The files have other names: the manifest says what they are made of, and every source tensor comes as it was."""
    uri = shelf / f"{name}-tp4"
    into = Cutter(shelf / f"{name}-tp2", 0)
    into.add_module("new", Tree({"name": torch.zeros(3)}))  # of which no table knows
    wanted = digests(shardtool.stream(shelf / name))
    got: dict[str, str] = {}

    def take(weights: Any) -> set[str]:
        kept = list(weights)
        got.update(digests(kept))
        return into.cut(kept) | {"new.name"}

    into.instead = take
    report = loaded(into, uri, 2, 0, engine=Engine("vllm", "vLLM", "0.99.1"))
    assert report.way == "fed"
    assert "'new.name' is missing" in report.why
    assert "made for vllm 0.32" in report.why
    assert got == wanted
    del into._modules["new"]
    assert same(into, shelf / f"{name}-tp2", 0)


def test_tensors_that_the_engine_will_make_itself_go_through_its_own_loader(shelf: Path):
    """Online quantization: a parameter has no memory before its whole tensor comes."""
    into = Cutter(shelf / "llama-tp2", 0)
    into.get_submodule("model.norm").weight = torch.nn.Parameter(torch.empty(32, device="meta"), requires_grad=False)
    seen: list[str] = []
    into.instead = lambda weights: seen.extend(dict(weights))
    report = loaded(into, shelf / "llama-tp2", 2, 0)
    assert (report.way, "model.norm.weight" in seen) == ("fed", True)
    assert "'model.norm.weight' itself" in report.why


def test_what_a_loader_leaves_is_read_to_its_end(shelf: Path):
    """A model may stop before the last tensor; it has to say that it has all of its own."""
    into = Cutter(shelf / "llama-tp2", 0)
    into.instead = lambda weights: {next(iter(weights))[0]}
    with pytest.raises(TensorMismatch, match=r"has nothing for 'model.* of Cutter in vLLM 0.32.0 and 21 more of"):
        loaded(into, shelf / "llama", 2, 0)
    into.instead = lambda weights: None
    assert loaded(into, shelf / "llama", 2, 0).way == "fed"  # it does not say
    into.instead = lambda weights: set()
    assert loaded(into, shelf / "llama", 2, 0, quantized=True).way == "fed"


# What is refused.


def test_what_is_missing_foreign_or_unlike_is_named(shelf: Path):
    """Before a byte of the model is written."""
    shards = shelf / "llama-tp2"
    found = poisoned(shardtool.load(shards, rank=0))
    del found["model.norm.weight"]
    found["model.layers.0.more"] = torch.zeros(3)
    found["lm_head.weight"] = found["lm_head.weight"].float()
    into = Tree(found)
    before = digests(into.state_dict().items())
    with pytest.raises(TensorMismatch) as error:
        loaded(into, shards, 2, 0)
    assert str(error.value) == (
        f"{shards}, made for vllm 0.32: the tensors of rank 0 of tp 2 are not those of Tree in vLLM 0.32.0: "
        "'model.layers.0.more' is missing; 'model.norm.weight' is foreign to the model; 'lm_head.weight' is "
        "torch.bfloat16 [64, 32] there and torch.float32 [64, 32] in the model"
    )
    assert digests(into.state_dict().items()) == before


def test_another_model_is_refused_by_what_differs(shelf: Path):
    into = Cutter(shelf / "qwen3_moe-tp2", 0)
    with pytest.raises(TensorMismatch, match=r"llama-tp2, made for vllm 0.32: .* are missing; .* foreign to the model"):
        loaded(into, shelf / "llama-tp2", 2, 0)


def test_a_loaders_own_error_becomes_a_sentence(shelf: Path):
    into = Cutter(shelf / "llama-tp2", 0)

    def refuse(weights: Any) -> None:
        next(weights)
        raise ValueError("There is no module named 'x'\nin the model")

    into.instead = refuse
    with pytest.raises(
        TensorMismatch, match=r"Cutter of vLLM 0.32.0 does not take .*llama: ValueError: There is no module named 'x'$"
    ):
        loaded(into, shelf / "llama", 2, 0)


def copy(shelf: Path, name: str, to: Path) -> Path:
    """The files of a folder, to be damaged."""
    for path in (shelf / name).rglob("*"):
        if path.is_file():
            put(to, {str(path.relative_to(shelf / name)): path.read_bytes()})
    return to


@pytest.mark.parametrize(("tp", "rank"), [(2, 1), (4, 2)])
def test_a_corrupted_shard_is_refused_with_its_tensor(shelf: Path, tmp_path: Path, tp: int, rank: int):
    shards = copy(shelf, "llama-tp2", tmp_path / "shards")
    file = shards / "model-rank-1-part-0.safetensors"
    name = "model.layers.0.mlp.down_proj.weight"
    (entry,) = [
        one for one in read_header(open_store(str(shards)), file.name, file.stat().st_size).entries if one.name == name
    ]
    file.write_bytes(flipped(file.read_bytes(), entry.offset + 5))
    into = empty(shelf / f"llama-tp{tp}", rank)
    with pytest.raises(ChecksumMismatch, match=f"model-rank-1-part-0.safetensors.*{name}"):
        loaded(into, shards, tp, rank)
    assert loaded(into, shards, tp, rank, verify=False).way in ("own", "cut")
    if tp == 2:
        assert loaded(empty(shelf / "llama-tp2", 0), shards, 2, 0).way == "own"  # whose files are as they were


@pytest.mark.parametrize(("tp", "rank"), [(2, 1), (4, 0)])
def test_a_missing_part_is_named(shelf: Path, tmp_path: Path, tp: int, rank: int):
    shards = copy(shelf, "llama-tp2", tmp_path / "shards")
    (shards / "model-rank-1-part-0.safetensors").unlink()
    with pytest.raises(Incomplete, match=r"model-rank-1-part-0.safetensors is missing"):
        loaded(empty(shelf / f"llama-tp{tp}", rank), shards, tp, rank)


def test_a_tensor_that_a_part_lacks_is_named(shelf: Path, tmp_path: Path):
    """Without a manifest only the names can tell."""
    for rank in range(2):
        held = {f"t{i}": random((4, 3), "F32", i) for i in range(3 - rank)}
        put(tmp_path, {f"model-rank-{rank}-part-0.safetensors": safetensors(held)})
    into = Tree({f"t{i}": torch.zeros(4, 3) for i in range(3)})
    assert loaded(into, tmp_path, 2, 0).way == "own"
    with pytest.raises(TensorMismatch, match=r"rank 1 of tp 2 are not those of Tree in vLLM 0.32.0: 't2' is missing"):
        loaded(into, tmp_path, 2, 1)


def test_an_impossible_size_is_refused_by_its_reason(shelf: Path):
    with pytest.raises(PlanError, match="3"):
        loaded(empty(shelf / "llama-tp2", 0), shelf / "llama-tp2", 3, 0)


def test_nothing_there_and_no_way_to_take_it(shelf: Path, tmp_path: Path):
    into = empty(shelf / "llama-tp2", 0)
    with pytest.raises(NotFound):
        loaded(into, tmp_path / "nowhere", 2, 0)
    with pytest.raises(UsageError, match=r"Tree of vLLM 0.32.0 takes no whole tensors: save shards"):
        loaded(into, shelf / "llama", 2, 0)
    cutter = Cutter(shelf / "llama-tp2", 0)
    cutter.secondary_weights = (tmp_path,)
    with pytest.raises(UsageError, match=r"takes weights of .* besides, .* use --load-format auto"):
        loaded(cutter, shelf / "llama", 2, 0)


def test_a_limit_that_is_too_small_says_what_would_do(shelf: Path):
    with pytest.raises(BudgetTooSmall, match="would do"):
        loaded(empty(shelf / "llama-tp2", 0), shelf / "llama-tp2", 2, 0, memory_limit=1000)


def test_a_head_of_its_own_despite_the_config(tmp_path: Path):
    """The source's config.json says tied, its head differs: the shards' amendment counts."""
    made = config(tie_word_embeddings=True)
    held = tensors(config())
    put(tmp_path / "model", model(made, held))
    shardtool.save(tmp_path / "model", tmp_path / "shards", tp=2)
    assert tied(open_checkpoint(tmp_path / "shards")) is False
    assert tied(open_checkpoint(tmp_path / "model")) is False
    into = empty(tmp_path / "shards", 0)
    assert loaded(into, tmp_path / "shards", 2, 0).way == "own"


# An engine whose models do not say what they loaded, and whose names are others.


def quiet(shards: Path, rank: int) -> Cutter:
    """A model that takes whole tensors and says nothing."""
    into = Cutter(shards, rank)

    def take(weights: Any) -> None:
        into.cut(weights)

    into.instead = take
    return into


@pytest.fixture(scope="module")
def sglang(shelf: Path) -> Path:
    """``gpt_oss`` as SGLang names its tensors."""
    for tp in (2, 4):
        shardtool.save(shelf / "gpt_oss", shelf / f"sglang-tp{tp}", tp=tp, layout="sglang")
    return shelf


@pytest.mark.parametrize(
    ("uri", "way"), [("sglang-tp2", "own"), ("sglang-tp4", "cut"), ("gpt_oss-tp4", "cut"), ("gpt_oss-tp2", "cut")]
)
def test_an_engine_takes_its_own_names_and_translates_those_of_others(sglang: Path, uri: str, way: str):
    into = empty(sglang / "sglang-tp2", 1)
    assert into.state_dict().keys() != shardtool.load(sglang / "gpt_oss-tp2", rank=1).keys()
    assert loaded(into, sglang / uri, 2, 1, engine=SGLANG).way == way
    assert same(into, sglang / "sglang-tp2", 1)


def test_a_version_counts_as_far_as_its_layouts_depend_on_it(shelf: Path):
    """Of vLLM 0.32.1 they are those of 0.32; SGLang's may change with any."""
    assert VLLM.generation("0.32.1") == "0.32"
    assert SGLANG.generation("0.5.23.post1") == "0.5.23"
    assert (VLLM.builtin.engine_version, SGLANG.builtin.engine_version) == ("0.32", "0.5.23")


def test_what_a_quiet_model_has_left_is_seen(shelf: Path, tmp_path: Path):
    """A plain checkpoint without one of the three projections that its model has in one tensor."""
    shards = shelf / "llama-tp2"
    into = quiet(shards, 0)
    assert loaded(into, shelf / "llama", 2, 0, engine=SGLANG).way == "fed"
    assert same(into, shards, 0)
    made = config()
    held = {name: one for name, one in tensors(made).items() if name != "model.layers.0.self_attn.k_proj.weight"}
    put(tmp_path, model(made, held))
    with pytest.raises(
        TensorMismatch, match=r"has nothing for 'model.layers.0.self_attn.qkv_proj.weight' of Cutter in SGLang 0.5.23$"
    ):
        loaded(quiet(shards, 0), tmp_path, 2, 0, engine=SGLANG)
    assert loaded(quiet(shards, 0), tmp_path, 2, 0, engine=SGLANG, quantized=True).way == "fed"


def test_an_engine_may_take_them_in_a_way_of_its_own(shelf: Path):
    into = empty(shelf / "llama-tp2", 0)  # it has no load_weights
    names: list[str] = []

    def take(weights: Any) -> None:
        names.extend(name for name, _ in weights)

    assert loaded(into, shelf / "llama", 2, 0, take=take).way == "fed"
    assert sorted(names) == sorted(open_checkpoint(shelf / "llama").entries())


def test_a_rank_that_no_layout_knows_takes_whole_tensors(shelf: Path, tmp_path: Path):
    """Or its own files where nobody recorded what they are; those of other sizes say why they do not do."""
    shards, apart = shelf / "llama-tp2", "its attention is divided by 1 where tp is 2"
    into = Cutter(shards, 1)
    report = loaded(into, shards, 2, 1, apart=apart)
    assert (report.way, report.why) == ("fed", apart)
    assert same(into, shards, 1)
    assert loaded(Cutter(shards, 1), shelf / "llama", 2, 1, apart=apart).why == ""
    for rank in range(2):
        put(
            tmp_path,
            {f"model-rank-{rank}-part-0.safetensors": (shards / f"model-rank-{rank}-part-0.safetensors").read_bytes()},
        )
    put(tmp_path, {"config.json": (shards / "config.json").read_bytes()})
    assert loaded(into, tmp_path, 2, 1, apart=apart).way == "own"
    with pytest.raises(UsageError, match="its attention is divided by 1"):
        loaded(Cutter(shelf / "llama-tp4", 1), tmp_path, 4, 1, apart=apart)


@pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=str)
def test_why_a_model_cannot_be_cut_for_so_many_ranks_is_known(shelf: Path, engine: Engine):
    """From any checkpoint of it; nothing is said of sizes that do."""
    for uri in ("llama", "llama-tp2"):
        reason = engine_load.impossible(open_checkpoint(shelf / uri), Rank(Parallel(3), 0), engine)
        assert isinstance(reason, PlanError)
        assert "3" in str(reason)
        assert engine_load.impossible(open_checkpoint(shelf / uri), Rank(Parallel(2), 0), engine) is None


def test_a_report_is_one_line(shelf: Path):
    report = loaded(empty(shelf / "llama-tp2", 1), shelf / "llama-tp4", 2, 1)
    assert "\n" not in str(report)
    assert str(report).startswith(f"rank 1 of tp 2: {report.tensors} tensors (")
    assert "ranges of files that were cut otherwise" in str(report)
    assert json.dumps(report.why) == '""'
