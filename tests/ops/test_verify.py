"""``verify``: nothing that is wrong is called right, what is right is not called wrong, and the sentence says where."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardtool
from shardtool import stores
from shardtool.errors import BudgetTooSmall, Incomplete, NotFound
from shardtool.layouts import tables
from shardtool.ops.structure import FOREIGN
from shardtool.ops.verify import Report
from tests.builders import (
    COUNTING,
    KINDS,
    SHARD,
    Files,
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
    rank_tensors,
    safetensors,
    tensors,
    whole_tensors,
)
from tests.ops.cases import Case, cases
from tests.oracle import expected

CONFIG = config(num_hidden_layers=1)
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"
HELD = {**tensors(CONFIG), ROTARY: random((2,), "F32")}
FILES = model(CONFIG, HELD, files=2)
KEPT = ".shardtool/kept.safetensors"


def saved_files(tp: int, files: Files = FILES) -> Files:
    with places() as place:
        shardtool.save(put(place("model"), files), out := place("out"), tp=tp, max_part_size=12_000)
        return contents(out)


SHARDS = saved_files(4)


def report(files: Files, **options: Any) -> Report:
    """The report on a checkpoint; ``against`` may be the files of another."""
    with places() as place:
        if "against" in options:
            options["against"] = put(place("other"), options["against"])
        return shardtool.verify(put(place("shards"), files), **options)


def troubles(found: Report) -> str:
    """Everything that a report says is wrong."""
    return "\n".join(f"{check.key}: {why}" for check in found.files for why in check.why) + "\n".join(
        f"{d.key} {d.name} {d.rank} {d.difference} {d.why}" for d in found.differences
    )


@settings(max_examples=50)
@given(cases())
def test_what_was_saved_is_right_and_equal_to_the_source_and_to_every_other_sharding(case: Case):
    memory = {"memory_limit": case.options2["memory_limit"], "concurrency": case.options2["concurrency"]}
    with places() as place:
        source, a, b = put(place("source"), case.files), place("a"), place("b")
        shardtool.save(source, a, tp=case.tp, **case.options)
        shardtool.save(source, b, tp=case.tp2, **case.options2)
        for against in (None, source, b):
            found = shardtool.verify(a, against=against, **memory)
            assert found.ok, troubles(found)
            assert found.exit_code == 0
        assert shardtool.verify(a, quick=True).ok


@given(st.data())
def test_no_bit_of_a_shard_can_change_unseen(data: st.DataObject):
    """Length field, header, padding or elements: the file is named, and the tensor where it is one's bytes."""
    key = data.draw(st.sampled_from(sorted(key for key in SHARDS if key.endswith(".safetensors"))))
    at = data.draw(st.integers(0, len(SHARDS[key]) - 1))
    found = report({**SHARDS, key: flipped(SHARDS[key], at, data.draw(st.integers(0, 7)))})
    assert (found.ok, found.exit_code) == (False, 1)
    (bad,) = (check for check in found.files if not check.ok)
    assert bad.key == key
    start = 8 + int.from_bytes(SHARDS[key][:8], "little")
    if at >= start:
        for name, raw in parsed(SHARDS[key]).items():
            size = raw.array.nbytes
            if SHARDS[key].find(raw.array.tobytes(), start) <= at < SHARDS[key].find(raw.array.tobytes(), start) + size:
                assert f"tensor {name!r} differs from its digest, first in its bytes 0 to {size}" in bad.why
                return
        assert re.fullmatch(r"tensor '.*_scale' differs from its digest, first in its bytes 0 to 4", bad.why[0])


@given(st.integers(0, len(SHARDS["shardtool.json"]) - 1), st.integers(1, 255))
def test_no_byte_of_the_manifest_can_change_unseen(at: int, change: int):
    changed = bytearray(SHARDS["shardtool.json"])
    changed[at] ^= change
    found = report({**SHARDS, "shardtool.json": bytes(changed)})
    assert (found.ok, found.exit_code) == (False, 1)
    assert "shardtool.json" in troubles(found)


@pytest.mark.parametrize("add", [b" ", b"\n", b"x", b"{}"])
def test_nothing_can_be_added_to_the_manifest_unseen(add: bytes):
    assert not report({**SHARDS, "shardtool.json": SHARDS["shardtool.json"] + add}).ok
    assert not report({**SHARDS, "shardtool.json": add + SHARDS["shardtool.json"]}).ok


@pytest.mark.parametrize("key", ["config.json", "tokenizer.json"])
def test_no_bit_of_a_side_file_can_change_unseen(key: str):
    for at in range(len(SHARDS[key])):
        found = report({**SHARDS, key: flipped(SHARDS[key], at)}) if at % 17 == 0 else None
        assert found is None or f"{key}: its bytes differ from its digest" in troubles(found)


@pytest.mark.parametrize("key", sorted(SHARDS))
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda _: b""])
def test_a_file_of_another_size_is_named_at_once(key: str, change: Callable[[bytes], bytes]):
    found = report({**SHARDS, key: change(SHARDS[key])}, quick=True)
    assert not found.ok
    assert key in troubles(found)


@pytest.mark.parametrize("key", sorted(SHARDS.keys() - {"shardtool.json"}))
@pytest.mark.parametrize("quick", [True, False])
def test_a_missing_file_makes_a_checkpoint_incomplete(key: str, quick: bool):
    found = report({name: data for name, data in SHARDS.items() if name != key}, quick=quick)
    assert (found.ok, found.exit_code) == (False, 4)
    assert f"{key}: missing" in troubles(found)


def test_damage_weighs_more_than_what_is_missing():
    (first, second, *_) = (key for key in sorted(SHARDS) if SHARD.fullmatch(key))
    files = {**SHARDS, second: flipped(SHARDS[second], -1)}
    del files[first]
    assert report(files).exit_code == 1


def test_quick_looks_at_headers_and_not_at_elements(tmp_path: Path):
    """Where the store keeps nothing of contents, as a folder does; see tests/ops/test_stored.py."""
    key = "model-rank-0-part-0.safetensors"
    out = put(tmp_path / "out", {**SHARDS, key: flipped(SHARDS[key], -1)})
    assert shardtool.verify(out, quick=True).ok
    assert not shardtool.verify(out).ok


@pytest.mark.parametrize(
    "key", ["model-rank-9-part-0.safetensors", "model-rank-0-part-77.safetensors", "model.safetensors"]
)
def test_a_file_that_an_engine_would_read_too_is_foreign(key: str):
    found = report({**SHARDS, key: safetensors({"x": random((2,), "BF16")})})
    assert f"{key}: foreign: the manifest does not know it, but an engine would read it" in troubles(found)
    assert not found.ok


def test_of_many_foreign_files_some_are_named_and_the_others_counted():
    shard = safetensors({"x": random((2,), "BF16")})
    found = report({**SHARDS, **{f"model-rank-0-part-{n}.safetensors": shard for n in range(1000, 1000 + FOREIGN + 7)}})
    assert sum(not check.ok for check in found.files) == FOREIGN + 1
    assert ".safetensors: foreign: 7 more files, beside the 100 that are named" in troubles(found)


def test_notes_beside_a_checkpoint_are_not_its_business():
    assert report({**SHARDS, "notes.txt": b"x", "logs/1.log": b"y"}).ok


def test_what_is_read_is_what_is_there(monkeypatch: pytest.MonkeyPatch):
    """Each shard once, whatever the memory."""
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    for limit in (0, None):
        with places() as place:
            uri = put(place("shards"), SHARDS).replace("memory", "counted")
            assert shardtool.verify(uri, memory_limit=limit).ok
            for key in SHARDS:
                if SHARD.fullmatch(key):
                    start = 8 + int.from_bytes(SHARDS[key][:8], "little")
                    reads = [(a, b) for a, b in counted(uri).reads[key] if a >= start]
                    assert sum(b - a for a, b in reads) == len(SHARDS[key]) - start


def test_a_limit_that_is_too_small_says_what_would_do():
    with pytest.raises(BudgetTooSmall) as error:
        report(SHARDS, memory_limit=1)
    assert report(SHARDS, memory_limit=error.value.needed).ok


# The recipe.


def resigned(change: Callable[[dict[str, Any]], None]) -> Files:
    """The shards with a manifest that says something else, with a right digest."""
    import blake3

    table = json.loads(SHARDS["shardtool.json"])
    del table["digest"]
    change(table)

    def dump(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)

    table["digest"] = blake3.blake3(dump(table).encode()).hexdigest()
    lines = ",\n".join(f"{json.dumps(key)}: {dump(value)}" for key, value in table.items())
    return {**SHARDS, "shardtool.json": f"{{\n{lines}\n}}\n".encode()}


def rule(table: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in table["recipe"] if entry["name"].endswith(name))


def test_a_manifest_may_be_written_by_others():
    assert report(resigned(lambda _: None)).ok
    assert resigned(lambda _: None) == SHARDS


def test_an_element_that_is_in_no_shard_is_seen():
    """Rank 1 takes the rows of rank 0: the checkpoint holds no others."""

    def change(table: dict[str, Any]) -> None:
        shares = rule(table, "down_proj.weight")["shares"]
        shares[1]["pieces"] = shares[0]["pieces"]

    found = report(resigned(change))
    assert "384 of the 1536 elements of 'model.layers.0.mlp.down_proj.weight' are in no shard" in troubles(found)


def test_a_target_with_a_gap_is_seen():
    def change(table: dict[str, Any]) -> None:
        del rule(table, "gate_up_proj.weight")["shares"][2]["pieces"][1]

    found = troubles(report(resigned(change)))
    assert "gate_up_proj.weight': 384 of its 768 elements come from nowhere" in found


def test_a_target_that_is_filled_twice_is_seen():
    def change(table: dict[str, Any]) -> None:
        pieces = rule(table, "gate_up_proj.weight")["shares"][2]["pieces"]
        pieces.append(pieces[0])

    assert "384 of its elements would be written twice" in troubles(report(resigned(change)))


def test_a_source_tensor_that_is_nowhere_is_seen():
    def change(table: dict[str, Any]) -> None:
        table["source"]["dropped"].clear()

    assert f"source tensor {ROTARY!r} is in no shard and not declared as dropped" in troubles(report(resigned(change)))


def test_a_source_that_the_inventory_does_not_list_is_seen():
    def change(table: dict[str, Any]) -> None:
        table["source"]["tensors"] = [t for t in table["source"]["tensors"] if t["name"] != "model.norm.weight"]

    assert "the recipe uses 'model.norm.weight', which the inventory" in troubles(report(resigned(change)))


def test_tensors_that_the_recipe_does_not_have_are_seen():
    def change(table: dict[str, Any]) -> None:
        rule(table, "model.norm.weight")["shares"][0]["ranks"] = [[0, 3]]

    assert "tensor 'model.norm.weight' is not in the recipe of rank 3" in troubles(report(resigned(change)))


def test_a_rank_that_lacks_a_tensor_of_the_recipe_is_seen():
    def change(table: dict[str, Any]) -> None:
        table["recipe"].append({**rule(table, "model.norm.weight"), "name": "model.norm.bias"})

    assert "rank 2 lacks 1 tensors, first 'model.norm.bias'" in troubles(report(resigned(change)))


# Against another.


def other(name: str, index: tuple[int, ...], to: int | None = None) -> Files:
    """The source with one element changed."""
    held = {key: Raw(raw.dtype, raw.array.copy()) for key, raw in HELD.items()}
    held[name].array[index] = held[name].array[index] ^ 1 if to is None else to
    return model(CONFIG, held, files=2)


@pytest.mark.parametrize(
    ("name", "index", "places"),
    [
        ("model.norm.weight", (5,), [("model.norm.weight", r, (5,)) for r in range(4)]),
        ("model.embed_tokens.weight", (40, 3), [("model.embed_tokens.weight", 1, (8, 3))]),
        ("lm_head.weight", (99, 31), [("lm_head.weight", 3, (3, 31))]),
        ("model.layers.0.mlp.down_proj.weight", (7, 30), [("model.layers.0.mlp.down_proj.weight", 2, (7, 6))]),
        ("model.layers.0.mlp.up_proj.weight", (13, 1), [("model.layers.0.mlp.gate_up_proj.weight", 1, (13, 1))]),
        (
            "model.layers.0.self_attn.v_proj.weight",
            (2, 2),
            [("model.layers.0.self_attn.qkv_proj.weight", r, (8 + 4 + 2, 2)) for r in (0, 1)],
        ),
    ],
)
def test_a_difference_is_found_where_it_is(name: str, index: tuple[int, ...], places: list[Any]):
    against = other(name, index)
    for files in (against, saved_files(2, against), saved_files(8, against)):
        found = report(SHARDS, against=files)
        assert (found.ok, found.exit_code, found.depth) == (False, 1, "equality")
        seen = []
        for d in found.differences:
            assert d.difference is not None
            assert d.difference.count == 1
            assert SHARD.fullmatch(d.key)
            seen.append((d.name, d.rank, d.difference.index(d.shape)))
        assert sorted(seen) == places


def test_a_difference_says_both_values():
    name = "model.norm.weight"
    (d, *_) = report(SHARDS, against=other(name, (5,), 0x3FC0)).differences
    assert d.difference is not None
    mine = (int(HELD[name].array[5]) << 16).to_bytes(4, "little")
    assert d.difference.expected == 1.5
    assert d.difference.actual == np.frombuffer(mine, "<f4")[0]
    assert d.difference.max_abs == pytest.approx(abs(1.5 - float(np.frombuffer(mine, "<f4")[0])))


def test_all_differing_elements_are_counted():
    held = {**HELD, "lm_head.weight": random((100, 32), "BF16", 5)}
    found = report(SHARDS, against=model(CONFIG, held))
    count = sum(d.difference.count for d in found.differences if d.difference)
    assert count == int((held["lm_head.weight"].array != HELD["lm_head.weight"].array).sum())


def test_a_kept_tensor_is_compared_too():
    found = report(SHARDS, against=model(CONFIG, {**HELD, ROTARY: random((2,), "F32", 3)}))
    assert [(d.name, d.key, d.rank) for d in found.differences] == [(ROTARY, KEPT, None)]


def test_padding_is_compared_too():
    """Rows past the vocabulary are zeros; others would be right by their digest and wrong all the same."""
    made = config(num_hidden_layers=1)
    ranks = expected(tensors(made), made, 4)
    embed = ranks[3]["model.embed_tokens.weight"].array.copy()
    embed[-1, -1] = 0x3F80
    ranks[3]["model.embed_tokens.weight"] = Raw("BF16", embed)
    found = report(engine_saved(made, ranks), against=model(made, tensors(made)))
    assert [(d.name, d.rank, d.difference and d.difference.index(d.shape)) for d in found.differences] == [
        ("model.embed_tokens.weight", 3, (31, 31))
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop("model.norm.weight"), "lacks it"),
        (lambda held: held.update(more=random((3,), "BF16")), "lacks it"),
        (lambda held: held.update({"model.norm.weight": random((31,), "BF16")}), r"its shape in .* is \[31\]"),
    ],
)
def test_models_of_other_tensors_differ(change: Callable[[dict[str, Raw]], Any], said: str):
    held = dict(HELD)
    change(held)
    found = report(SHARDS, against=model(CONFIG, held))
    assert found.exit_code == 1
    assert re.search(said, troubles(found))


def test_shards_of_a_narrower_dtype_equal_the_source_cast_to_it():
    made = config(torch_dtype="float32")
    held = tensors(made, dtype="F32")
    with places() as place:
        source, out = put(place("model"), model(made, held)), place("out")
        shardtool.save(source, out, tp=2, dtype="bfloat16")
        assert shardtool.verify(out, against=source).ok
        held["model.norm.weight"].array[0] += 1
        assert not shardtool.verify(out, against=put(place("other"), model(made, held))).ok


@pytest.mark.parametrize("equal", [True, False])
def test_a_spare_head_is_compared_with_what_stands_for_it(equal: bool):
    made = config(tie_word_embeddings=True)
    held = tensors(made)
    held["lm_head.weight"] = Raw("BF16", held["model.embed_tokens.weight"].array.copy())
    with places() as place:
        shardtool.save(put(place("model"), model(made, held)), out := place("out"), tp=2)
        if not equal:
            held["lm_head.weight"] = random((100, 32), "BF16", 8)
        found = shardtool.verify(out, against=put(place("other"), model(made, held)))
    assert found.ok is equal
    assert equal or "'model.embed_tokens.weight'" in troubles(found)


def test_tables_that_have_changed_since_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    eight = saved_files(8)
    monkeypatch.setattr(tables, "FAMILIES", ())
    assert report(SHARDS, against=FILES).ok
    assert report(SHARDS, against=eight).ok


@pytest.mark.parametrize("limit", [0, "1MiB", None])
def test_whole_tensors_are_compared_with_whole_and_sharded_ones(limit: Any):
    assert report(FILES, against=SHARDS, memory_limit=limit).ok
    assert report(FILES, against=model(CONFIG, HELD, files=5), memory_limit=limit).ok
    found = report(FILES, against=other("model.norm.weight", (3,)), memory_limit=limit)
    assert [d.name for d in found.differences] == ["model.norm.weight"]
    fewer = {name: raw for name, raw in HELD.items() if name != ROTARY}
    assert [(d.name, d.difference) for d in report(FILES, against=model(CONFIG, fewer)).differences] == [(ROTARY, None)]
    assert [(d.name, d.difference) for d in report(model(CONFIG, fewer), against=FILES).differences] == [(ROTARY, None)]


def test_whole_tensors_alone_have_nothing_to_be_compared_with():
    found = report(FILES)
    assert found.ok
    assert found.notes == ["there is no manifest, so that there are no digests to check"]


def test_the_other_side_is_taken_at_its_word():
    """Its digests are not looked at: what differs, differs, whichever of the two is damaged."""
    key = next(key for key in SHARDS if key.startswith("model-rank-1") and b"down_proj" in SHARDS[key])
    name = "model.layers.0.mlp.down_proj.weight"
    at = SHARDS[key].index(parsed(SHARDS[key])[name].array.tobytes())
    found = report(SHARDS, against={**SHARDS, key: flipped(SHARDS[key], at)})
    assert [(d.name, d.rank, d.key) for d in found.differences] == [(name, 1, key)]


# Shards that an engine saved.


def engine(family: str = "llama", tp: int = 4, **changes: Any) -> tuple[Files, Files]:
    """(shards, source)."""
    made = config(family, **changes)
    held = tensors(made)
    return engine_saved(made, expected(held, made, tp), parts=2), model(made, held)


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("family", KINDS)
def test_an_engines_shards_equal_their_source_and_its_shardings(family: str, tp: int):
    shards, source = engine(family, tp)
    assert report(shards).ok
    for against in (source, saved_files(2, source), engine(family, 2)[0]):
        found = report(shards, against=against)
        assert found.ok, troubles(found)


@pytest.mark.parametrize("fused", [True, False])
def test_an_engines_shards_do_not_tell_how_the_source_was_fused(fused: bool):
    made = config("phi3")
    held = tensors(made, fused=fused)
    shards = engine_saved(made, expected(held, made, 4))
    source = model(made, {**held, ROTARY: random((3,), "F32")})
    for against in (source, saved_files(2, source)):
        found = report(shards, against=against)
        assert found.ok, troubles(found)


@pytest.mark.parametrize("own", ["none", "equal", "other"])
def test_an_engines_shards_of_a_tied_model_may_hold_one_table_or_two(own: str):
    made = config(tie_word_embeddings=True)
    held = tensors(made)
    if own != "none":
        same = held["model.embed_tokens.weight"].array.copy()
        held["lm_head.weight"] = Raw("BF16", same) if own == "equal" else random((100, 32), "BF16", 3)
    source = model(made, held)
    shards = engine_saved(made, expected(held, made, 2))
    for against in (source, saved_files(4, source)):
        found = report(shards, against=against)
        assert found.ok, troubles(found)
    if own == "equal":  # as the default loader un-ties it: both are there
        untied = engine_saved(made, expected(held, {**made, "tie_word_embeddings": False}, 2))
        assert report(untied, against=source).ok


def test_an_element_of_an_engines_shards_that_differs_is_found():
    shards, source = engine()
    key = "model-rank-2-part-0.safetensors"
    found = report({**shards, key: flipped(shards[key], -1)}, against=source)
    assert [(d.key, d.rank) for d in found.differences] == [(key, 2)]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (r"rank-1-", "no file of rank 1"),
        (r"rank-1-part-0", "rank 1 has no part 0"),
        (r"rank-2-part-1", r"rank 2 lacks \d+ tensors"),
        (r"rank-3-", "its 3 ranks are not what config.json says"),
        (r"-part-1", "its 4 ranks are not what config.json says: .* no tensor"),
    ],
)
def test_an_engines_shards_that_are_not_whole_are_named(lost: str, said: str):
    shards, _ = engine()
    found = report({key: data for key, data in shards.items() if lost not in key})
    assert not found.ok
    assert re.search(said, troubles(found))


def test_shards_of_an_unknown_model_are_compared_with_each_other():
    shards, _ = engine()
    shards["config.json"] = shards["config.json"].replace(b"LlamaForCausalLM", b"MyOwnForCausalLM")
    found = report(shards)
    assert found.ok
    assert any("MyOwnForCausalLM is not one" in note for note in found.notes)


# What cannot be looked at.


def test_what_is_not_there_raises(tmp_path: Path):
    with pytest.raises(NotFound):
        shardtool.verify(tmp_path / "nothing")
    with pytest.raises(NotFound):
        shardtool.verify(put(tmp_path / "shards", SHARDS), against=tmp_path / "nothing")


def test_an_unfinished_checkpoint_raises(tmp_path: Path):
    shardtool.save(put(tmp_path / "model", FILES), tmp_path / "out", tp=4, ranks=[1])
    with pytest.raises(Incomplete, match="is being written or was interrupted"):
        shardtool.verify(tmp_path / "out")


def test_a_whole_folder_can_be_verified(tmp_path: Path):
    put(tmp_path / "model", FILES)
    shardtool.save(tmp_path / "model", tmp_path / "out", tp=8, max_part_size=3000)
    found = shardtool.verify(tmp_path / "out", against=tmp_path / "model")
    assert found.ok
    assert found.kind == "sharded"
    assert found.tensors == sum(len(rank_tensors(contents(tmp_path / "out"), rank)) for rank in range(8)) + 1
    assert whole_tensors(FILES).keys() == HELD.keys()
