"""``save``: parts, names, workers, second runs, what is refused, and how often the source is read.

What the tensors of each rank are is the matter of ``tests/layouts/test_vllm.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardtool
from shardtool import stores
from shardtool.errors import BudgetTooSmall, Incomplete, PlanError, UsageError
from shardtool.ops.job import natural, split_parts
from tests import quants
from tests.builders import (
    COUNTING,
    SHARD,
    Files,
    config,
    contents,
    counted,
    model,
    parsed,
    places,
    put,
    random,
    rank_tensors,
    tensors,
)
from tests.layouts import mixtures
from tests.ops.cases import Case, cases
from tests.oracle import expected

CONFIG = config()
HELD = tensors(CONFIG)
FILES = model(CONFIG, HELD, files=3)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> str:
    return put(tmp_path / "model", FILES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def saved() -> Files:
    """What saving the model at tp 4 in parts of 6000 bytes gives."""
    with places() as place:
        shardtool.save(put(place("model"), FILES), place_out := place("out"), tp=4, max_part_size=6000)
        return contents(place_out)


# The whole thing.


@settings(max_examples=40)
@given(cases())
def test_ranks_hold_what_the_engine_holds_whatever_the_parts_and_the_memory(case: Case):
    with places() as place:
        out = place("out")
        summary = shardtool.save(put(place("model"), case.files), out, tp=case.tp, **case.options)
        assert summary.complete
        found = contents(out)
    for rank, wanted in enumerate(expected(case.held, case.config, case.tp)):
        assert rank_tensors(found, rank) == wanted
    assert sum(len(data) for key, data in found.items() if key.endswith(".safetensors")) == summary.bytes_to_write


@settings(max_examples=20)
@given(st.integers(0, 1 << 20))
def test_any_memory_limit_gives_the_same_bytes_or_says_how_much_it_takes(saved: Files, limit: int):
    with places() as place:
        source, out = put(place("model"), FILES), place("out")
        options: dict[str, Any] = {"tp": 4, "max_part_size": 6000}
        with contextlib.suppress(BudgetTooSmall):
            shardtool.save(source, out, memory_limit=limit, **options)
        if not contents(out):
            with pytest.raises(BudgetTooSmall) as error:
                shardtool.save(source, out, memory_limit=limit, **options)
            needed = error.value.needed
            assert needed > limit
            shardtool.save(source, out, memory_limit=needed, **options)
        assert contents(out) == saved


def test_a_folder_holds_shards_manifest_and_side_files_and_nothing_else(source: str, out: Path):
    shardtool.save(source, out, tp=2)
    assert sorted(contents(out)) == [
        "config.json",
        "model-rank-0-part-0.safetensors",
        "model-rank-1-part-0.safetensors",
        "shardtool.json",
        "tokenizer.json",
    ]
    assert not (out / ".shardtool").exists()


def test_a_folder_and_a_store_hold_the_same_bytes(source: str, out: Path, saved: Files):
    shardtool.save(source, out, tp=4, max_part_size=6000)
    assert contents(out) == saved


# Parts.


def parts(files: Files, rank: int) -> list[dict[str, int]]:
    """Bytes by tensor of each part of a rank, in order."""
    found = {
        int(m[2]): parsed(data) for key, data in files.items() if (m := SHARD.fullmatch(key)) and int(m[1]) == rank
    }
    return [{name: raw.array.nbytes for name, raw in found[part].items()} for part in sorted(found)]


@pytest.mark.parametrize("most", [1, 500, 2048, 4000, 1 << 20])
def test_parts_hold_no_more_than_was_said_and_are_filled_before_the_next(source: str, out: Path, most: int):
    shardtool.save(source, out, tp=4, max_part_size=most)
    files = contents(out)
    assert len({len(parts(files, rank)) for rank in range(4)}) == 1
    for rank in range(4):
        found = parts(files, rank)
        assert all(found), "a part is empty"
        for part in found:
            assert sum(part.values()) <= most or len([n for n in part.values() if n]) == 1
    assert {n for part in parts(files, 0) for n in part} == expected(HELD, CONFIG, 4)[0].keys()


def test_a_tensor_larger_than_a_part_is_alone_in_one(source: str, out: Path):
    shardtool.save(source, out, tp=1, max_part_size=4000)
    assert {"lm_head.weight": 128 * 32 * 2} in parts(contents(out), 0)


def test_a_tensor_is_in_the_same_part_of_every_rank(source: str, out: Path):
    shardtool.save(source, out, tp=8, max_part_size=1000)
    files = contents(out)
    names = [[set(part) for part in parts(files, rank)] for rank in range(8)]
    assert all(found == names[0] for found in names)


@given(st.dictionaries(st.text("ab.12", min_size=1, max_size=5), st.integers(0, 50), max_size=8), st.integers(1, 60))
def test_tensors_are_divided_in_the_order_of_their_names(sizes: dict[str, int], most: int):
    found = split_parts(sizes, most)
    assert found.keys() == sizes.keys()
    assert [found[name] for name in sorted(sizes, key=natural)] == sorted(found.values())
    assert sorted(set(found.values())) == list(range(max(found.values(), default=-1) + 1))
    totals = [sum(sizes[name] for name in found if found[name] == part) for part in set(found.values())]
    for (a, b), part in zip(itertools.pairwise(totals), itertools.count()):
        first = min((name for name in found if found[name] == part + 1), key=natural)
        assert a + sizes[first] > most, f"{first} had room in part {part}, before {b}"


def test_numbers_in_names_count_as_numbers():
    assert sorted(["l.10.w", "l.2.w", "l.2.b", "l"], key=natural) == ["l", "l.2.b", "l.2.w", "l.10.w"]


@pytest.mark.parametrize("most", [0, -1, "0", "many"])
def test_a_part_size_that_is_none_is_refused(source: str, out: Path, most: Any):
    with pytest.raises(UsageError, match="--max-part-size"):
        shardtool.save(source, out, tp=2, max_part_size=most)
    assert not out.exists()


# Names.


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("m-{rank:02d}-{part}.safetensors", ["m-00-0.safetensors", "m-01-0.safetensors"]),
        ("{tp_rank}/w-{part}.safetensors", ["0/w-0.safetensors", "1/w-0.safetensors"]),
        ("a/b/r{rank}.safetensors", ["a/b/r0.safetensors", "a/b/r1.safetensors"]),
        ("{rank}x{rank}-{part}.safetensors", ["0x0-0.safetensors", "1x1-0.safetensors"]),
    ],
)
def test_a_pattern_names_the_files(source: str, out: Path, pattern: str, keys: list[str]):
    shardtool.save(source, out, tp=2, pattern=pattern)
    files = contents(out)
    assert sorted(key for key in files if key.endswith(".safetensors")) == keys
    for rank, wanted in enumerate(expected(HELD, CONFIG, 2)):
        assert parsed(files[keys[rank]]) == wanted
        assert shardtool.load(out, rank=rank).keys() == wanted.keys()
    assert shardtool.verify(out, against=source).ok


@pytest.mark.parametrize(
    ("pattern", "most", "said"),
    [
        ("model-{part}.safetensors", "5GiB", "lacks {rank}"),
        ("model-{rank}.safetensors", 4000, "gives two files the name model-0.safetensors"),
        ("../m-{rank}-{part}.safetensors", "5GiB", "leaves the output folder"),
        ("/m-{rank}-{part}.safetensors", "5GiB", "leaves the output folder"),
        (".shardtool/{rank}-{part}.safetensors", "5GiB", "shardtool's own files"),
        ("m-{rank}-{part}.bin", "5GiB", r"must end in \.safetensors"),
        ("m-{rank}-{port}.safetensors", "5GiB", "has the field {port}"),
        ("m-{pp_rank}-{rank}-{part}.safetensors", "5GiB", "no pipeline parallelism"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused_before_anything_is_written(
    source: str, out: Path, pattern: str, most: Any, said: str
):
    with pytest.raises(UsageError, match=said):
        shardtool.save(source, out, tp=2, pattern=pattern, max_part_size=most)
    assert not out.exists()


@pytest.mark.parametrize(
    ("most", "said"), [(500, "gives two files the name model110"), ("5GiB", "also matches model100")]
)
def test_ranks_whose_names_run_into_each_other_are_refused(tmp_path: Path, out: Path, most: Any, said: str):
    """Rank 1 with part 10 and rank 11 with part 0; an engine that looks for model1*.safetensors finds rank 10 too."""
    made = config(num_attention_heads=16, vocab_size=1000)
    source = put(tmp_path / "large", model(made, tensors(made)))
    with pytest.raises(PlanError, match=said):
        shardtool.save(source, out, tp=16, pattern="model{rank}{part}.safetensors", max_part_size=most)
    assert not out.exists()


# Workers.


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
def test_ranks_may_be_written_one_by_one_in_any_order(source: str, out: Path, saved: Files, order: list[int]):
    for n, rank in enumerate(order, 1):
        summary = shardtool.save(source, out, tp=4, max_part_size=6000, ranks=[rank])
        assert summary.complete is (n == 4)
        if n < 4:
            with pytest.raises(Incomplete):
                shardtool.verify(out)
    assert contents(out) == saved


def test_threads_share_a_job_and_one_of_them_commits(source: str, out: Path, saved: Files):
    start = threading.Barrier(4)

    def work(ranks: list[int]) -> bool:
        start.wait()
        return shardtool.save(source, out, tp=4, max_part_size=6000, ranks=ranks, memory_limit="2MiB").complete

    with ThreadPoolExecutor(4) as pool:
        complete = list(pool.map(work, [[0], [1], [2], [3]]))
    assert any(complete)
    assert contents(out) == saved


def test_processes_share_a_job_even_where_they_do_the_same_ranks(source: str, out: Path, saved: Files):
    code = (
        "import sys, shardtool; shardtool.save(sys.argv[1], sys.argv[2], tp=4, max_part_size=6000, "
        "ranks=[int(r) for r in sys.argv[3]])"
    )
    command = [sys.executable, "-W", "error", "-c", code, source, str(out)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([*command, ranks], env=environ) for ranks in ("01", "23", "12", "30")]
    assert [process.wait() for process in running] == [0] * 4
    assert contents(out) == saved


def test_a_job_that_was_interrupted_is_finished_by_the_same_command(source: str, out: Path, saved: Files):
    shardtool.save(source, out, tp=4, max_part_size=6000, ranks=[1, 3])
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    summary = shardtool.save(source, out, tp=4, max_part_size=6000)
    assert summary.complete
    assert summary.kept == sum(path.stat().st_size for path in before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(out) == saved


def test_a_rank_that_there_is_not_is_refused(source: str, out: Path):
    with pytest.raises(UsageError, match="--ranks names rank 4, but tp 4 has ranks 0 to 3"):
        shardtool.save(source, out, tp=4, ranks=[1, 4])
    assert not out.exists()


def test_another_job_does_not_join_an_unfinished_one(source: str, out: Path):
    shardtool.save(source, out, tp=4, ranks=[0])
    before = contents(out)
    with pytest.raises(PlanError, match="unfinished output of another job"):
        shardtool.save(source, out, tp=2, ranks=[0])
    assert contents(out) == before
    shardtool.save(source, out, tp=2, overwrite=True)
    assert {key for key in contents(out) if SHARD.fullmatch(key)} == {
        f"model-rank-{r}-part-0.safetensors" for r in (0, 1)
    }
    assert shardtool.verify(out).ok


# Second runs.


def test_the_same_command_again_writes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    with places() as place:
        source, out = put(place("model"), FILES), place("out").replace("memory", "counted")
        first = shardtool.save(source, out, tp=4)
        store = counted(out)
        store.reset()
        second = shardtool.save(source, out, tp=4)
        assert not store.calls.keys() & {"create", "write", "commit", "delete"}
    assert (first.written, first.kept) == (first.bytes_to_write, 0)
    assert (second.written, second.kept, second.complete) == (0, first.written, True)


def changed(name: str) -> Files:
    """The same model with one element of one tensor changed."""
    held = tensors(CONFIG)
    held[name].array.reshape(-1)[0] ^= 1
    return model(CONFIG, held, files=3)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_source_that_has_changed_is_another_job(source: str, out: Path, tmp_path: Path, name: str):
    shardtool.save(source, out, tp=2)
    before = contents(out)
    put(Path(source), changed(name))
    with pytest.raises(PlanError, match=r"is not empty .*: use --overwrite or another --output"):
        shardtool.save(source, out, tp=2)
    assert contents(out) == before
    shardtool.save(source, out, tp=2, overwrite=True)
    assert contents(out) != before
    assert shardtool.verify(out, against=source).ok


def test_a_side_file_that_has_changed_is_another_job(source: str, out: Path):
    shardtool.save(source, out, tp=2)
    Path(source, "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(PlanError, match="is not empty"):
        shardtool.save(source, out, tp=2)


@pytest.mark.parametrize(
    "other",
    [
        {"tp": 8},
        {"tp": 1},
        {"tp": 4, "max_part_size": 700},
        {"tp": 4, "pattern": "x{rank}-{part}.safetensors"},
        {"tp": 4, "dtype": "float16"},
    ],
)
def test_overwriting_leaves_nothing_of_the_old_checkpoint(
    source: str, out: Path, tmp_path: Path, other: dict[str, Any]
):
    shardtool.save(source, out, **other)
    with pytest.raises(PlanError, match="is not empty"):
        shardtool.save(source, out, tp=4)
    shardtool.save(source, out, tp=4, overwrite=True)
    shardtool.save(source, tmp_path / "fresh", tp=4)
    assert contents(out) == contents(tmp_path / "fresh")
    assert shardtool.verify(out).ok


def test_overwriting_writes_the_same_checkpoint_anew(source: str, out: Path, saved: Files):
    shardtool.save(source, out, tp=4, max_part_size=6000)
    path = out / "model-rank-0-part-0.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    summary = shardtool.save(source, out, tp=4, max_part_size=6000, overwrite=True)
    assert summary.kept == 0
    assert contents(out) == saved


def test_overwriting_does_not_touch_what_is_not_its_own(source: str, out: Path):
    """Notes of people, and checkpoints in sub-folders."""
    others = {"notes.txt": b"x", "other/model.safetensors.index.json": b"{}", "other/model.safetensors": b"y"}
    put(out, others)
    with pytest.raises(PlanError, match=r"is not empty \(it holds notes\.txt\)"):
        shardtool.save(source, out, tp=2)
    assert contents(out) == others
    shardtool.save(source, out, tp=2, overwrite=True)
    assert contents(out).items() >= others.items()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_the_source_is_refused(source: str, tmp_path: Path, overwrite: bool):
    (tmp_path / "link").symlink_to(source)
    for place in (source, tmp_path / "link", f"file://{source}"):
        with pytest.raises(PlanError, match="--output"):
            shardtool.save(source, place, tp=2, overwrite=overwrite)
    assert contents(Path(source)) == FILES


def test_shards_are_not_saved_again(source: str, out: Path, tmp_path: Path):
    shardtool.save(source, out, tp=2)
    with pytest.raises(PlanError, match=r"is sharded already \(tp 2\); use shardtool reshard"):
        shardtool.save(out, tmp_path / "again", tp=4)


def test_a_dry_run_writes_nothing(source: str, out: Path):
    plan = shardtool.save(source, out, tp=2, dry_run=True)
    assert not out.exists()
    done = shardtool.save(source, out, tp=2)
    assert plan.files == done.files
    assert (plan.bytes_to_write, plan.bytes_to_read) == (done.bytes_to_write, done.bytes_to_read)
    assert {(key, size) for key, _, size in plan.files} == {
        (key, len(data)) for key, data in contents(out).items() if SHARD.fullmatch(key)
    }


def test_progress_ends_with_all_bytes(source: str, out: Path):
    told: list[tuple[int, int]] = []
    summary = shardtool.save(source, out, tp=2, progress=lambda done, total: told.append((done, total)), concurrency=1)
    assert told[0] == (0, summary.bytes_to_write)
    headers = sum(int.from_bytes(d[:8], "little") + 8 for k, d in contents(out).items() if SHARD.fullmatch(k))
    assert told[-1] in [
        (summary.bytes_to_write, summary.bytes_to_write),
        (summary.bytes_to_write - headers, told[0][1]),
    ]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# What is read.


@pytest.mark.parametrize("limit", [0, "1MiB", None])
@pytest.mark.parametrize("tp", [1, 4, 8])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_each_byte_of_the_source_is_read_once_whatever_the_ranks_and_the_memory(
    monkeypatch: pytest.MonkeyPatch, family: str, tp: int, limit: Any
):
    """Apart from headers, samples (a plan reads them, and a dry run no more than them) and side files."""
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    made = config(family, hidden_size=128, intermediate_size=512, vocab_size=1000, head_dim=16, torch_dtype="bfloat16")
    held = tensors(made)
    size = sum(raw.array.nbytes for raw in held.values())
    with places() as place:
        source = put(place("model"), model(made, held, files=2)).replace("memory", "counted")
        store = counted(source)
        options: dict[str, Any] = {"tp": tp, "memory_limit": limit, "max_part_size": 300_000}
        plan = shardtool.save(source, place("out"), dry_run=True, **options)
        planning = store.bytes_read
        store.reset()
        side = len(FILES["tokenizer.json"])
        done = shardtool.save(source, place("out2"), **options)
        assert store.bytes_read - planning == plan.bytes_to_read + side
        assert plan.bytes_to_read == done.bytes_to_read == size


def test_a_worker_reads_no_more_than_its_ranks_need(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    with places() as place:
        source = put(place("model"), FILES).replace("memory", "counted")
        plan = shardtool.save(source, place("a"), tp=2, ranks=[1], dry_run=True)
        planning = counted(source).bytes_read
        counted(source).reset()
        done = shardtool.save(source, place("b"), tp=2, ranks=[1])
        assert counted(source).bytes_read - planning == plan.bytes_to_read == done.bytes_to_read
        assert plan.bytes_to_read <= sum(raw.array.nbytes for raw in HELD.values())


def test_many_tensors_that_are_dropped_for_one_reason_are_one_note(tmp_path: Path):
    made = config(num_hidden_layers=6)
    held = tensors(made)
    for i in range(6):
        held[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = random((2,), "F32")
    put(tmp_path / "model", model(made, held))
    notes = shardtool.save(tmp_path / "model", tmp_path / "out", tp=2).notes
    (note,) = (note for note in notes if "dropped" in note)
    first = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert note.startswith(f"6 tensors are dropped, first {first}: a table of the rotary embedding")
    assert note.endswith("(kept for merge)")


def test_expert_parallel_is_shown_in_the_plan_and_refused_without_experts(tmp_path: Path):
    made = mixtures.config("mixtral")
    put(tmp_path / "moe", model(made, mixtures.tensors(made)))
    plan = shardtool.save(tmp_path / "moe", tmp_path / "out", tp=2, expert_parallel=True, dry_run=True)
    assert plan.details["experts"] == "whole on each rank"
    shardtool.save(tmp_path / "moe", tmp_path / "out", tp=2, expert_parallel=True)
    assert shardtool.inspect(tmp_path / "out").expert_parallel is True
    dense = config()
    put(tmp_path / "dense", model(dense, tensors(dense)))
    with pytest.raises(PlanError, match="LlamaForCausalLM has no experts; leave --expert-parallel out"):
        shardtool.save(tmp_path / "dense", tmp_path / "x", tp=2, expert_parallel=True)


def test_what_is_never_cast_loses_no_precision(tmp_path: Path):
    made, held = quants.quantized("gptq")
    put(tmp_path / "model", model(made, held))
    notes = shardtool.save(tmp_path / "model", tmp_path / "out", tp=2, dry_run=True).notes
    assert not any("lose precision" in note for note in notes)
    wide = {name: random(raw.array.shape, "F32") if "norm" in name else raw for name, raw in tensors(config()).items()}
    put(tmp_path / "wide", model(config(), wide))
    (note,) = (n for n in shardtool.save(tmp_path / "wide", tmp_path / "x", tp=2, dry_run=True).notes if "lose" in n)
    assert note.startswith(
        f"{sum('norm' in name for name in wide)} tensors lose precision as BF16, first model.layers.0"
    )
