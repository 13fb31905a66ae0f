"""A rank's slices straight from a checkpoint that was cut otherwise, or not at all: what ``save`` writes for the rank.

Every tensor is compared with the shards of a ``save`` at the same sizes, byte for byte; what is read is counted.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardtool
from shardtool import stores
from shardtool.dtypes import DType
from shardtool.errors import BudgetTooSmall, ChecksumMismatch, NotFound, PlanError, UnsupportedModel, UsageError
from shardtool.layouts import file as files
from shardtool.ops.slices import Wanted, opened, sliced
from shardtool.units import parse_size
from tests import builders, quants
from tests.builders import COUNTING, Files, Tensors, config, counted, model, places, put, random, tensors
from tests.layouts import classic, mixtures
from tests.ops import test_computed
from tests.ops.cases import Case, cases

Held = dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]


@pytest.fixture(autouse=True)
def no_thread_stays_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert {thread for thread in threading.enumerate() if thread.name.startswith("shardtool")} <= before


def held(found: Any) -> Held:
    """Tensors by name as something to compare. A name that comes twice is an error."""
    made: Held = {}
    for name, tensor in found:
        assert name not in made
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        made[name] = tensor.dtype, tuple(tensor.shape), raw
    return made


def same(source: str, other: str, sizes: dict[str, Any], cut: dict[str, Any], limits: Any = (None, 0)) -> int:
    """Compare every rank of ``source`` with what ``save`` writes to ``other``; the number of tensors."""
    shardtool.save(source, other, **sizes, **cut)
    ranks = sizes["tp"] * sizes.get("pp", 1)
    count = 0
    for rank in range(ranks):
        wanted = held(shardtool.stream(other, rank=rank))
        for limit in limits:
            assert held(sliced(source, rank=rank, memory_limit=limit, **sizes, **cut)) == wanted
        count += len(wanted)
    return count


# Whole tensors.


@settings(max_examples=25)
@given(cases(), st.sampled_from([0, "1MiB", None]), st.sampled_from([1, 3, 16]))
def test_a_rank_holds_what_saving_writes_for_it(case: Case, limit: Any, concurrency: int):
    """Whatever the model, the sizes, the memory, and how many files the source lies in."""
    with places() as place:
        source, out = put(place("model"), case.files), place("out")
        shardtool.save(source, out, tp=case.tp, **case.options)
        for rank in range(case.tp):
            found = sliced(source, tp=case.tp, rank=rank, memory_limit=limit, concurrency=concurrency)
            assert held(found) == held(shardtool.stream(out, rank=rank))


def families() -> dict[str, tuple[dict[str, Any], Tensors]]:
    found = {}
    for family in ("gpt2", "falcon", "gpt_neox", "qwen2_5_vl", "cohere"):
        made = classic.config(family)
        found[family] = made, classic.tensors(family, made)
    for family in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe"):
        made = mixtures.config(family)
        found[family] = made, mixtures.tensors(made)
    for scheme in quants.SCHEMES:
        found[f"quantized {scheme}"] = quants.quantized(scheme)
    return found


FAMILIES = families()


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_strides_and_quantized_weights_are_cut_alike(name: str):
    made, source = FAMILIES[name]
    with places() as place:
        assert same(put(place("model"), model(made, source, files=2)), place("out"), {"tp": 2}, {}) > 20


@pytest.mark.parametrize(
    ("said", "dtype", "sizes", "cut"),
    [
        ({"tie_word_embeddings": True, "vocab_size": 101}, "BF16", {"tp": 4}, {}),
        ({"torch_dtype": "float32"}, "F32", {"tp": 2}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, "BF16", {"tp": 2}, {}),
        ({}, "BF16", {"tp": 2, "pp": 2}, {}),
        ({"num_key_value_heads": 2}, "BF16", {"tp": 8}, {}),
        ({}, "BF16", {"tp": 2}, {"layout": "sglang"}),
        ({}, "BF16", {"tp": 1}, {"layout": "vllm:builtin", "engine_version": "0.32.0"}),
    ],
    ids=["tied and padded", "cast", "half precision", "stages", "replicated heads", "sglang", "one rank"],
)
def test_padding_casts_stages_and_replicas_are_as_saved(said: Any, dtype: str, sizes: Any, cut: Any):
    made = config(**said)
    with places() as place:
        source = put(place("model"), model(made, tensors(made, dtype=dtype), files=3))
        assert same(source, place("out"), sizes, cut) >= 20


def test_whole_experts_are_as_saved():
    made = mixtures.config("qwen3_moe")
    with places() as place:
        source = put(place("model"), model(made, mixtures.tensors(made)))
        cut: dict[str, Any] = {"expert_parallel": True}
        assert same(source, place("out"), {"tp": 2}, cut) > 20
        assert held(sliced(source, tp=2, rank=1)) != held(sliced(source, tp=2, rank=1, **cut))


def test_what_an_engine_computes_is_computed(tmp_path: Path):
    raws = {name: random(t.shape, t.dtype.name, i) for i, (name, t) in enumerate(test_computed.SOURCES.items())}
    source = put(tmp_path / "model", model(config(architectures=["MambaForCausalLM"]), raws))
    (tmp_path / "layout.json").write_bytes(files.encode(test_computed.layout()))
    assert same(source, str(tmp_path / "out"), {"tp": 2}, {"layout": str(tmp_path / "layout.json")}) == 4


def test_tensors_larger_than_the_limit_come_in_bands(tmp_path: Path):
    made = config(hidden_size=512, intermediate_size=2048, num_hidden_layers=1)
    source = put(tmp_path / "model", model(made, tensors(made)))
    assert same(source, str(tmp_path / "out"), {"tp": 2}, {}, limits=("256KiB",))


# Shards of other sizes.


@settings(max_examples=20)
@given(cases(), st.sampled_from([0, None]))
def test_one_stored_sharding_serves_every_size(case: Case, limit: Any):
    with places() as place:
        source, one, other = put(place("model"), case.files), place("one"), place("other")
        shardtool.save(source, one, tp=case.tp, **case.options)
        shardtool.save(source, other, tp=case.tp2, **case.options2)
        for rank in range(case.tp2):
            found = sliced(one, tp=case.tp2, rank=rank, memory_limit=limit)
            assert held(found) == held(shardtool.stream(other, rank=rank))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "quantized fp8", "quantized gptq"])
@pytest.mark.parametrize("tp", [1, 4])
def test_shards_of_experts_and_quantized_weights_serve_other_sizes(name: str, tp: int):
    made, raws = FAMILIES[name]
    with places() as place:
        source, two, out = put(place("model"), model(made, raws)), place("two"), place("out")
        shardtool.save(source, two, tp=2)
        shardtool.save(source, out, tp=tp)
        for rank in range(tp):
            assert held(sliced(two, tp=tp, rank=rank)) == held(shardtool.stream(out, rank=rank))


def test_shards_without_a_manifest_serve_other_sizes():
    made = config()
    raws = tensors(made)
    with places() as place:
        source, out = put(place("model"), model(made, raws)), place("out")
        shardtool.save(source, out, tp=2)
        kept = {key: data for key, data in builders.contents(out).items() if key != "shardtool.json"}
        engine = put(place("engine"), kept)
        assert same(source, place("four"), {"tp": 4}, {}) > 20
        for rank in range(4):
            assert held(sliced(engine, tp=4, rank=rank)) == held(sliced(source, tp=4, rank=rank))


# What is read.


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any], Tensors]]:
    """A model whose store counts what is read of it."""
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    made = config(
        num_key_value_heads=2, num_attention_heads=4, head_dim=16, hidden_size=64, intermediate_size=256, vocab_size=128
    )
    raws = tensors(made)
    with places() as place:
        uri = put(place("model"), model(made, raws))
        yield uri.replace("memory://", "counted://"), made, raws


def read_by(uri: str, found: Any) -> tuple[int, int]:
    """The bytes that bringing all tensors reads, and how many different ones."""
    store = counted(uri)
    store.reset()
    for _ in found:
        pass
    return store.bytes_read, store.distinct_bytes_read()


def test_each_rank_reads_the_bytes_of_its_rows_and_whole_bands_of_what_is_cut_along_them(counting: Any):
    uri, _, raws = counting
    half = 0
    for name, raw in raws.items():
        nbytes = raw.array.nbytes
        if name.endswith(("norm.weight",)):
            half += nbytes
        elif name.endswith(("o_proj.weight", "down_proj.weight")):  # from its first column in the first row to its last
            half += nbytes - nbytes // raw.array.shape[0] // 2
        else:
            half += nbytes // 2
    for rank in range(2):
        with opened(uri, Wanted(tp=2, rank=rank)) as found:
            assert found.to_read() == half
            assert read_by(uri, found.tensors(concurrency=3)) == (half, half)


def test_a_limit_does_not_make_it_read_more(counting: Any):
    uri, _, _ = counting
    with opened(uri, Wanted(tp=2, rank=1)) as found:
        assert found.to_read(memory_limit=0) == found.to_read()
        assert read_by(uri, found.tensors(memory_limit=0))[0] == found.to_read()


def test_a_plan_reads_headers_only(counting: Any):
    uri, _, raws = counting
    store = counted(uri)
    store.reset()
    with opened(uri, Wanted(tp=2, rank=0)) as found:
        found.to_read()
        assert found.entries()
        most = store.stat("model.safetensors").size - sum(raw.array.nbytes for raw in raws.values())
        assert all(end <= max(most, 64 << 10) for start, end in store.reads["model.safetensors"])
        assert len(store.reads["model.safetensors"]) == 1


def test_long_rows_are_read_apart(monkeypatch: pytest.MonkeyPatch):
    """A rank's part of each row, where the rows are long enough to leave out what lies between."""
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    made = config(hidden_size=8, intermediate_size=1 << 18, num_hidden_layers=1)
    with places() as place:
        raws = tensors(made)
        uri = put(place("model"), model(made, raws)).replace("memory://", "counted://")
        rows = raws["model.layers.0.mlp.down_proj.weight"].array
        assert rows.shape == (8, 1 << 18)
        with opened(uri, Wanted(tp=4, rank=3)) as found:
            assert found.to_read() < sum(raw.array.nbytes for raw in raws.values()) // 4 + (1 << 16)
            assert read_by(uri, found.tensors())[0] == found.to_read()


def test_shards_of_other_sizes_are_read_in_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    made = config(vocab_size=128)
    with places() as place:
        source, four = put(place("model"), model(made, tensors(made))), place("four")
        shardtool.save(source, four, tp=4)
        uri = four.replace("memory://", "counted://")
        for rank in range(2):
            with opened(uri, Wanted(tp=2, rank=rank, verify=False)) as found:
                assert read_by(uri, found.tensors()) == (found.to_read(), found.to_read())
                made_of = [part.tensor.nbytes for part in found.slices if part.pieces]  # the others are constants
                assert found.to_read() == sum(made_of)
                theirs = {int(key.split("-")[2]) for key in counted(uri).reads}
                assert theirs <= {0, 2 * rank, 2 * rank + 1}  # replicas are read of the first that has them


# How tensors come.


@pytest.fixture
def source() -> Iterator[str]:
    made = config()
    with places() as place:
        yield put(place("model"), model(made, tensors(made), files=2))


def test_a_plan_says_what_comes_and_in_which_order(source: str):
    with opened(source, Wanted(tp=2, rank=1)) as found:
        assert (found.layout, found.dtype) == ("the built-in table llama", DType.BF16)
        said = found.entries()
        came = [(name, tensor) for name, tensor in found.tensors()]
        assert sorted(name for name, _ in came) == sorted(name for name, _, _ in said)
        by_name = dict(came)
        for name, dtype, shape in said:
            assert (by_name[name].dtype, tuple(by_name[name].shape)) == (dtype.torch(), shape)
        assert found.nbytes == sum(tensor.nbytes for _, tensor in came)


def test_the_order_is_that_of_the_source_whatever_the_concurrency(source: str):
    names = [name for name, _ in sliced(source, tp=2, rank=0, concurrency=1)]
    assert names == [name for name, _ in sliced(source, tp=2, rank=0, concurrency=16)]


def test_tensors_are_the_callers_own(source: str):
    found = dict(sliced(source, tp=2, rank=0))
    kept = {name: tensor.clone() for name, tensor in found.items()}
    for name, tensor in found.items():
        tensor.zero_()
        assert all(torch.equal(other, kept[n]) for n, other in found.items() if n > name)
        tensor.copy_(kept[name])


@pytest.mark.parametrize("taken", [0, 1, 7])
@pytest.mark.parametrize("limit", [0, None])
def test_an_iterator_that_is_closed_stops_its_threads(source: str, taken: int, limit: Any):
    tensors = sliced(source, tp=2, rank=0, memory_limit=limit)
    for _ in range(taken):
        next(tensors)
    tensors.close()  # type: ignore[attr-defined]


def test_progress_ends_with_all_bytes(source: str):
    told: list[tuple[int, int]] = []
    with opened(source, Wanted(tp=2, rank=0)) as found:
        for _ in found.tensors(progress=lambda done, total: told.append((done, total))):
            pass
        assert told == sorted(told)
        assert told[-1] == (found.nbytes, found.nbytes)


def test_a_file_that_ends_too_soon_is_an_error_of_the_caller(tmp_path: Path):
    made = config()
    place = Path(put(tmp_path / "model", model(made, tensors(made))))
    with opened(place, Wanted(tp=2, rank=0)) as found:
        data = (place / "model.safetensors").read_bytes()
        (place / "model.safetensors").write_bytes(data[: len(data) // 2])
        with pytest.raises(shardtool.FormatError, match=r"model\.safetensors"):
            list(found.tensors())


# Refusals.


@pytest.mark.parametrize("rank", [2, -1, 99])
def test_a_rank_that_there_is_not_is_not_found(source: str, rank: int):
    with pytest.raises(NotFound, match=f"tp 2 has no rank {rank}; it has ranks 0 to 1"):
        sliced(source, tp=2, rank=rank)


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        ({"tp": 3}, PlanError, "--tp 3"),
        ({"tp": 0}, UsageError, "--tp 0"),
        ({"rank": "0"}, UsageError, "rank='0' is not a whole number"),
        ({"layout": "nothing"}, UsageError, "neither the name of a layout"),
        ({"layout": 3}, UsageError, "layout=3 is not a text"),
        ({"dtype": "wide"}, UsageError, "'wide' is not a dtype"),
        ({"device": "gpu"}, UsageError, "is not a device"),
        ({"concurrency": 0}, UsageError, "--concurrency 0"),
        ({"memory_limit": "lots"}, UsageError, "lots"),
        ({"memory_limit": 1000}, BudgetTooSmall, "would do"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_before_anything_is_read(
    source: str, said: dict[str, Any], error: type[Exception], match: str
):
    with pytest.raises(error, match=match):
        sliced(source, **{"tp": 2, "rank": 0, **said})


def test_the_limit_that_would_do_does(source: str):
    with pytest.raises(BudgetTooSmall) as error:
        sliced(source, tp=2, rank=0, memory_limit=1)
    assert held(sliced(source, tp=2, rank=0, memory_limit=error.value.needed)) == held(sliced(source, tp=2, rank=0))


def test_a_model_that_no_table_knows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raws: Files = model(config(architectures=["NoSuchModel"]), tensors(config()))
    with pytest.raises(UnsupportedModel, match="NoSuchModel"):
        sliced(put(tmp_path / "model", raws), tp=2, rank=0, layout="vllm:builtin")


# Memory.

CHILD = """
import sys
from collections import deque
import torch
import shardtool.sinks.segment
from shardtool.budget import peak_memory
from shardtool.ops.slices import sliced
torch.set_num_threads(1)
uri, limit = sys.argv[1], sys.argv[2]
for _ in sliced(uri, tp=4, rank=0, memory_limit=limit):  # what is imported and planned does not count
    break
before = peak_memory()
largest = 0
for _, tensor in sliced(uri, tp=2, rank=0, memory_limit=limit):
    largest = max(largest, tensor.nbytes)
    del tensor
print(peak_memory() - before - largest)
"""


@pytest.mark.parametrize("limit", ["8MiB", "48MiB"])
def test_bringing_takes_the_limit_and_the_tensor_that_was_handed_over(tmp_path: Path, limit: str):
    made = config(hidden_size=1024, intermediate_size=16384, num_hidden_layers=2, vocab_size=32768)
    source = put(tmp_path / "model", model(made, tensors(made)))
    done = subprocess.run([sys.executable, "-c", CHILD, source, limit], capture_output=True, text=True, check=True)
    assert int(done.stdout) < parse_size(limit, "") + (16 << 20)


def test_many_small_tensors_come_with_the_least_memory(tmp_path: Path):
    made = config(num_hidden_layers=40, hidden_size=64, intermediate_size=96)
    source = put(tmp_path / "model", model(made, tensors(made), files=3))
    with opened(source, Wanted(tp=2, rank=0)) as found, pytest.raises(BudgetTooSmall) as error:
        found.tensors(memory_limit=1)
    assert error.value.needed < 200 << 10
    for concurrency in (1, 16):
        assert len(dict(sliced(source, tp=2, rank=0, memory_limit=0, concurrency=concurrency))) > 400


# Digests.


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Shards for four ranks, one byte of which is not what it was: the last of rank 3's rows of the head."""
    made = config(vocab_size=128)
    shardtool.save(put(tmp_path / "model", model(made, tensors(made))), tmp_path / "four", tp=4)
    path = tmp_path / "four" / "model-rank-3-part-0.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])["lm_head.weight"]
    path.write_bytes(builders.flipped(data, 8 + length + head["data_offsets"][1] - 1))
    return tmp_path / "four"


def test_a_damaged_shard_is_refused_by_whoever_needs_it(damaged: Path):
    assert held(sliced(damaged, tp=2, rank=0)) == held(sliced(damaged.parent / "model", tp=2, rank=0))
    with pytest.raises(ChecksumMismatch, match=r"model-rank-3-part-0\.safetensors: tensor 'lm_head\.weight' differs"):
        held(sliced(damaged, tp=2, rank=1))
    with pytest.raises(ChecksumMismatch):
        held(sliced(damaged, tp=8, rank=6))  # whose half of that tensor is as it was


def test_without_verify_digests_are_not_looked_at(damaged: Path):
    whole = held(sliced(damaged.parent / "model", tp=2, rank=1))
    found = held(sliced(damaged, tp=2, rank=1, verify=False))
    assert found.keys() == whole.keys()
    assert [name for name in found if found[name] != whole[name]] == ["lm_head.weight"]


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_part_of_a_chunk_costs_the_chunk(concurrency: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    made = config(vocab_size=128)
    with places() as place:
        source, two = put(place("model"), model(made, tensors(made))), place("two")
        shardtool.save(source, two, tp=2)
        uri = two.replace("memory://", "counted://")
        with opened(uri, Wanted(tp=4, rank=3, verify=False)) as plain, opened(uri, Wanted(tp=4, rank=3)) as found:
            assert found.to_read() > plain.to_read()
            total, distinct = read_by(uri, found.tensors(concurrency=concurrency))
            assert total == distinct == found.to_read()


def test_checking_takes_memory_that_is_counted(damaged: Path):
    with opened(damaged, Wanted(tp=2, rank=0)) as found, opened(damaged, Wanted(tp=2, rank=0, verify=False)) as plain:
        needed = []
        for slices in (found, plain):
            with pytest.raises(BudgetTooSmall) as error:
                slices.tensors(memory_limit=1)
            needed.append(error.value.needed)
        assert needed[0] > needed[1]
        assert held(found.tensors(memory_limit=needed[0])) == held(plain.tensors())
