"""``merge``: the source comes back, tensor for tensor, with its config and its side files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import shardtool
from shardtool import stores
from shardtool.errors import BudgetTooSmall, ChecksumMismatch, Incomplete, PlanError
from shardtool.layouts import tables
from tests.builders import (
    COUNTING,
    KINDS,
    Raw,
    config,
    contents,
    counted,
    engine_saved,
    flipped,
    model,
    parsed,
    places,
    put,
    random,
    tensors,
    whole_tensors,
)
from tests.ops.cases import Case, cases
from tests.oracle import cast, expected

CONFIG = config()
HELD = tensors(CONFIG)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> str:
    return put(tmp_path / "model", model(CONFIG, HELD, files=2, side={"templates/a.jinja": b"x"}))


@pytest.fixture
def shards(source: str, tmp_path: Path) -> Path:
    shardtool.save(source, tmp_path / "tp4", tp=4, max_part_size=20_000)
    return tmp_path / "tp4"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


@settings(max_examples=60)
@given(cases())
def test_merging_what_was_saved_gives_every_tensor_of_the_source(case: Case):
    with places() as place:
        source, out, back = put(place("source"), case.files), place("out"), place("back")
        shardtool.save(source, out, tp=case.tp, **case.options)
        summary = shardtool.merge(out, back, **case.options2)
        assert summary.complete
        assert summary.notes == ()
        found = contents(back)
        assert whole_tensors(found) == case.held
        rest = {key: data for key, data in found.items() if not key.startswith("model")}
        assert rest == {key: data for key, data in case.files.items() if not key.startswith("model")}
        assert shardtool.verify(back, against=source).ok
        assert shardtool.verify(out, against=back).ok


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_of_any_size_merge_to_the_same_bytes(source: str, tmp_path: Path, tp: int):
    shardtool.save(source, tmp_path / "one", tp=1)
    shardtool.save(source, tmp_path / "many", tp=tp)
    shardtool.merge(tmp_path / "one", tmp_path / "a", max_part_size=5000)
    shardtool.merge(tmp_path / "many", tmp_path / "b", max_part_size=5000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_index_says_where_each_tensor_is(shards: Path, out: Path):
    shardtool.merge(shards, out, max_part_size=5000)
    files = contents(out)
    index = json.loads(files[INDEX])
    keys = sorted(key for key in files if key.endswith(".safetensors"))
    assert keys == [f"model-{i + 1:05d}-of-{len(keys):05d}.safetensors" for i in range(len(keys))]
    assert len(keys) > 2
    assert index["weight_map"] == {name: key for key in keys for name in parsed(files[key])}
    assert index["metadata"]["total_size"] == sum(raw.array.nbytes for raw in HELD.values())
    for key in keys:
        held = parsed(files[key])
        assert sum(raw.array.nbytes for raw in held.values()) <= 5000 or len(held) == 1
        assert b'"__metadata__":{"format":"pt"}' in files[key][:200]


def test_a_merged_model_can_be_saved_again(source: str, shards: Path, out: Path, tmp_path: Path):
    shardtool.merge(shards, out)
    shardtool.save(out, tmp_path / "again", tp=4, max_part_size=20_000)
    mine, theirs = contents(tmp_path / "again"), contents(shards)
    differ = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
    assert differ <= {"shardtool.json"}


def test_tables_that_have_changed_since_do_not_matter(shards: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "FAMILIES", ())
    shardtool.merge(shards, out)
    assert whole_tensors(contents(out)) == HELD
    assert shardtool.verify(shards, against=out).ok


@pytest.mark.parametrize("family", KINDS)
def test_an_engines_shards_can_be_merged(family: str, tmp_path: Path):
    """Without a manifest the names are those that the family's checkpoints have."""
    made = config(family)
    held = tensors(made)
    put(tmp_path / "shards", engine_saved(made, expected(held, made, 4), parts=2))
    shardtool.merge(tmp_path / "shards", tmp_path / "merged")
    found = contents(tmp_path / "merged")
    assert whole_tensors(found) == held
    assert json.loads(found["config.json"]) == made
    shards = shardtool.verify(tmp_path / "shards", against=tmp_path / "merged")
    assert shards.ok


def test_shards_share_the_read_of_what_several_ranks_hold(monkeypatch: pytest.MonkeyPatch):
    """A norm is on every rank and is read from one; digests aside, merge reads what it writes."""
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    with places() as place:
        shards = place("shards")
        shardtool.save(put(place("model"), model(CONFIG, HELD)), shards, tp=8)
        shards = shards.replace("memory", "counted")
        plan = shardtool.merge(shards, place("a"), dry_run=True)
        planning = counted(shards).bytes_read
        counted(shards).reset()
        shardtool.merge(shards, place("b"), verify=False)
        assert plan.bytes_to_read == sum(raw.array.nbytes for raw in HELD.values())
        assert counted(shards).bytes_read == planning + plan.bytes_to_read + len(b'{"version": "1.0"}')


# What does not come back.


def test_what_was_dropped_and_not_kept_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from shardtool.ops import save

    monkeypatch.setattr(save, "KEPT_MOST", 16)
    rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": random((3,), "F32") for i in range(2)}
    source = put(tmp_path / "model", model(CONFIG, {**HELD, **rotary}))
    summary = shardtool.save(source, tmp_path / "out", tp=2)
    kept, lost = sorted(rotary)
    assert any(note.startswith(f"{lost} is dropped") and "merge cannot give it back" in note for note in summary.notes)
    for folder in ("out", "resharded"):
        if folder == "resharded":
            shardtool.reshard(tmp_path / "out", tmp_path / folder, tp=4)
        done = shardtool.merge(tmp_path / folder, tmp_path / f"merged-{folder}")
        assert [note for note in done.notes if lost in note] == [
            f"{lost} was dropped and not kept: a table of the rotary embedding, which engines compute themselves"
        ]
        assert whole_tensors(contents(tmp_path / f"merged-{folder}")) == {**HELD, kept: rotary[kept]}
    shardtool.save(source, tmp_path / "all", tp=2, keep_dropped=True)
    shardtool.merge(tmp_path / "all", tmp_path / "merged-all")
    assert whole_tensors(contents(tmp_path / "merged-all")) == {**HELD, **rotary}


def test_what_was_narrowed_stays_so_and_config_json_says_it(tmp_path: Path):
    made = config(torch_dtype="float32")
    held = tensors(made, dtype="F32")
    source = put(tmp_path / "model", model(made, held))
    shardtool.save(source, tmp_path / "out", tp=2, dtype="bfloat16")
    done = shardtool.merge(tmp_path / "out", tmp_path / "merged")
    found = contents(tmp_path / "merged")
    assert whole_tensors(found) == {name: cast(raw, "BF16") for name, raw in held.items()}
    assert json.loads(found["config.json"]) == {**made, "torch_dtype": "bfloat16"}
    assert any(f"{len(held)} tensors were narrowed" in note for note in done.notes)


def test_float16_in_bfloat16_is_narrower_too(tmp_path: Path):
    made = config("gemma2", torch_dtype="float16")
    held = tensors(made, dtype="F16")
    shardtool.save(put(tmp_path / "model", model(made, held)), tmp_path / "out", tp=2)
    shardtool.merge(tmp_path / "out", tmp_path / "merged")
    found = contents(tmp_path / "merged")
    assert whole_tensors(found) == {name: cast(raw, "BF16") for name, raw in held.items()}
    assert json.loads(found["config.json"])["torch_dtype"] == "bfloat16"


# Second runs and refusals.


def test_the_same_command_again_writes_nothing(shards: Path, out: Path):
    first = shardtool.merge(shards, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second = shardtool.merge(shards, out)
    assert (second.written, second.kept, second.complete) == (0, first.written, True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_shards_that_have_changed_are_another_job(source: str, shards: Path, out: Path, tmp_path: Path):
    """Of the same names and sizes: only the elements tell."""
    shardtool.merge(shards, out)
    before = contents(out)
    held = {**HELD, "model.norm.weight": Raw("BF16", HELD["model.norm.weight"].array ^ 1)}
    put(Path(source), model(CONFIG, held, files=2))
    shardtool.save(source, tmp_path / "changed", tp=4)
    with pytest.raises(PlanError, match=r"is not empty .*use --overwrite or another --output"):
        shardtool.merge(tmp_path / "changed", out)
    assert contents(out) == before
    shardtool.merge(tmp_path / "changed", out, overwrite=True)
    assert whole_tensors(contents(out)) == held


def test_overwriting_leaves_nothing_of_what_was_merged_before(shards: Path, out: Path, tmp_path: Path):
    shardtool.merge(shards, out, max_part_size=3000)
    with pytest.raises(PlanError, match="is not empty"):
        shardtool.merge(shards, out)
    shardtool.merge(shards, out, overwrite=True)
    shardtool.merge(shards, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_whole_tensors_are_refused(source: str, out: Path):
    with pytest.raises(PlanError, match="is not sharded; there is nothing to merge"):
        shardtool.merge(source, out)
    assert not out.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_shards_are_not_merged_onto_themselves(shards: Path, overwrite: bool):
    before = contents(shards)
    with pytest.raises(PlanError, match="is the source itself"):
        shardtool.merge(shards, shards, overwrite=overwrite)
    assert contents(shards) == before


def test_a_damaged_shard_is_not_carried_on(shards: Path, out: Path):
    path = shards / "model-rank-2-part-0.safetensors"
    path.write_bytes(flipped(path.read_bytes(), -1))
    with pytest.raises(ChecksumMismatch, match=r"model-rank-2-part-0\.safetensors: tensor '.*' differs"):
        shardtool.merge(shards, out)
    assert contents(out) == {}
    assert shardtool.merge(shards, out, verify=False).complete


@pytest.mark.parametrize("key", ["tokenizer.json", "templates/a.jinja"])
def test_a_missing_side_file_is_named(shards: Path, out: Path, key: str):
    (shards / key).unlink()
    with pytest.raises(Incomplete, match=key):
        shardtool.merge(shards, out)
    assert not out.exists()


def test_a_shard_of_another_checkpoint_is_refused_even_without_digests(shards: Path, out: Path, tmp_path: Path):
    made = config(hidden_size=64)
    shardtool.save(put(tmp_path / "other", model(made, tensors(made))), tmp_path / "tp4-other", tp=4)
    data = (tmp_path / "tp4-other" / "model-rank-1-part-0.safetensors").read_bytes()
    (shards / "model-rank-1-part-0.safetensors").write_bytes(data)
    with pytest.raises(ChecksumMismatch):
        shardtool.merge(shards, out, verify=False)
    assert not out.exists()


def test_a_limit_that_is_too_small_says_what_would_do(shards: Path, out: Path):
    with pytest.raises(BudgetTooSmall) as error:
        shardtool.merge(shards, out, memory_limit=1, verify=False)
    assert not out.exists()
    shardtool.merge(shards, out, memory_limit=error.value.needed, verify=False)
    assert whole_tensors(contents(out)) == HELD


def test_a_dry_run_writes_nothing(shards: Path, out: Path):
    plan = shardtool.merge(shards, out, dry_run=True)
    assert not out.exists()
    done = shardtool.merge(shards, out)
    assert (plan.files, plan.bytes_to_read) == (done.files, done.bytes_to_read)


# With the library that reads such checkpoints.


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"attention_bias": True}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Phi3", {"pad_token_id": 0}),
        ("Gemma2", {"head_dim": 8}),
        ("Mistral", {}),
    ],
)
def test_a_merged_model_gives_the_same_logits(kind: str, changes: dict[str, Any], tmp_path: Path):
    import torch
    import transformers

    made = getattr(transformers, f"{kind}Config")(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    torch.manual_seed(0)
    fresh = getattr(transformers, f"{kind}ForCausalLM")(made).to(torch.bfloat16)
    fresh.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shardtool.save(tmp_path / "model", tmp_path / "out", tp=4)
    shardtool.reshard(tmp_path / "out", tmp_path / "out2", tp=2)
    shardtool.merge(tmp_path / "out2", tmp_path / "merged")
    loaded = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").eval()
        for folder in ("model", "merged")
    ]
    first, second = loaded
    assert second.dtype is torch.bfloat16
    tokens = torch.arange(0, 100, 7)[None]
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, second(tokens).logits)
    state = first.state_dict()
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, state[name]), name
