"""``load``, ``stream``, ``load_into``: each tensor once, in order, checked, owned by the caller, under the limit."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardtool
from benchmarks import models
from shardtool import stores
from shardtool.budget import PAGE
from shardtool.errors import (
    BudgetTooSmall,
    ChecksumMismatch,
    FormatError,
    Incomplete,
    NotFound,
    TensorMismatch,
    UsageError,
)
from shardtool.ops.measure import measure
from shardtool.ops.rank import items, opened
from shardtool.ops.stream import Given, means_for
from shardtool.stores.memory import MemoryStore
from shardtool.units import parse_size
from tests.builders import (
    COUNTING,
    Files,
    Raw,
    Tensors,
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
)
from tests.ops.cases import Case, cases
from tests.oracle import expected
from tests.processes import run

MIB = 1 << 20
CONFIG = config()
HELD = tensors(CONFIG)
FILES = model(CONFIG, HELD, files=2)


def saved_files(tp: int, **options: Any) -> Files:
    with places() as place:
        shardtool.save(put(place("model"), FILES), out := place("out"), tp=tp, **options)
        return contents(out)


SHARDS = saved_files(2, max_part_size=12_000)


@pytest.fixture
def shards() -> Iterator[str]:
    with places() as place:
        yield put(place("shards"), SHARDS)


@pytest.fixture(autouse=True)
def no_thread_stays_behind() -> Iterator[None]:
    """Whatever a test does with a stream, its threads have ended with it."""
    before = set(threading.enumerate())
    yield
    gc.collect()
    mine = {thread for thread in threading.enumerate() if thread.name.startswith("shardtool")}
    assert mine <= before


def raw_of(tensor: torch.Tensor) -> Raw:
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
    kind = kinds[tensor.dtype]
    if tensor.dtype is torch.bfloat16:
        return Raw(kind, tensor.detach().contiguous().view(torch.int16).numpy().view("<u2"))
    return Raw(kind, tensor.detach().contiguous().numpy())


def raws(found: dict[str, torch.Tensor]) -> Tensors:
    return {name: raw_of(tensor) for name, tensor in found.items()}


# What comes.


@settings(max_examples=30)
@given(cases(), st.sampled_from([0, "1MiB", None, -1]), st.sampled_from([1, 3, 16]))
def test_a_rank_loads_as_it_was_saved(case: Case, limit: Any, concurrency: int):
    with places() as place:
        source, out = put(place("model"), case.files), place("out")
        shardtool.save(source, out, tp=case.tp, **case.options)
        for rank, wanted in enumerate(expected(case.held, case.config, case.tp)):
            found = shardtool.load(out, rank=rank, memory_limit=limit, concurrency=concurrency)
            assert raws(found) == wanted
        assert raws(shardtool.load(source, memory_limit=limit, concurrency=concurrency)) == case.held


def in_order(data: bytes) -> list[str]:
    """The tensors of a file in the order of their bytes."""
    table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    table.pop("__metadata__", None)
    return sorted(table, key=lambda name: table[name]["data_offsets"])


def test_a_stream_has_the_order_of_the_files(shards: str):
    names = [name for name, _ in shardtool.stream(shards, rank=1)]
    keys = sorted(key for key in SHARDS if key.startswith("model-rank-1"))
    assert names == [name for key in keys for name in in_order(SHARDS[key])]
    assert list(shardtool.load(shards, rank=1)) == names


def test_tensors_are_the_callers_own(tmp_path: Path):
    """Neither the file nor another tensor changes with them."""
    put(tmp_path / "out", SHARDS)
    found = shardtool.load(tmp_path / "out", rank=0)
    kept = {name: tensor.clone() for name, tensor in found.items()}
    for path in (tmp_path / "out").glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in found.items())
    for name, tensor in found.items():
        tensor.zero_()
        assert all(torch.equal(other, kept[n]) for n, other in found.items() if other.any() and n != name)
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


@pytest.mark.parametrize("uri", ["model", "file"])
def test_whole_tensors_load_too(tmp_path: Path, uri: str):
    put(tmp_path / "model", FILES)
    if uri == "model":
        assert raws(shardtool.load(tmp_path / "model")) == HELD
    else:
        path = tmp_path / "model" / "model-00001-of-00002.safetensors"
        assert raws(shardtool.load(path)) == parsed(path.read_bytes())


def test_an_engines_shards_load_too(tmp_path: Path):
    ranks = expected(HELD, CONFIG, 2)
    put(tmp_path / "out", engine_saved(CONFIG, ranks, parts=3))
    for rank in (0, 1):
        assert raws(shardtool.load(tmp_path / "out", rank=rank)) == ranks[rank]
    named = {key.replace("model-rank-", "r"): data for key, data in engine_saved(CONFIG, ranks).items()}
    put(tmp_path / "named", named)
    assert raws(shardtool.load(tmp_path / "named", rank=1, pattern="r{rank}-part-{part}.safetensors")) == ranks[1]


def test_scalars_and_empty_tensors_load(tmp_path: Path):
    held = {
        "none": Raw("F32", random((0, 3), "F32").array),
        "one": random((), "F32"),
        "end": Raw("U8", random((0,), "F32").array.view("u1")),
    }
    put(tmp_path / "model", {"model.safetensors": safetensors(held)})
    assert raws(shardtool.load(tmp_path / "model")) == held
    put(tmp_path / "nothing", {"model.safetensors": safetensors({})})
    assert shardtool.load(tmp_path / "nothing") == {}


def test_only_the_ranks_own_files_are_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    with places() as place:
        uri = put(place("shards"), SHARDS).replace("memory", "counted")
        shardtool.load(uri, rank=1)
        store = counted(uri)
        assert not [key for key in store.reads if "rank-0" in key]
        for key in SHARDS:
            if "rank-1" in key:
                start = 8 + int.from_bytes(SHARDS[key][:8], "little")
                assert sum(b - a for a, b in store.reads[key] if a >= start) == len(SHARDS[key]) - start


def test_the_only_rank_need_not_be_named(tmp_path: Path):
    shardtool.save(put(tmp_path / "model", FILES), tmp_path / "out", tp=1)
    assert raws(shardtool.load(tmp_path / "out")) == expected(HELD, CONFIG, 1)[0]


# In which order.


@pytest.mark.parametrize("limit", [0, None])
@pytest.mark.parametrize("uri", ["model", "out"])
def test_tensors_come_in_the_order_of_a_list_of_names(tmp_path: Path, limit: Any, uri: str):
    """Just those that it names."""
    put(tmp_path / "model", FILES)
    put(tmp_path / "out", saved_files(1))
    wanted = raws(shardtool.load(tmp_path / uri))
    names = sorted(wanted, key=lambda name: name[::-1])[::2]
    found = [(name, raw_of(t)) for name, t in shardtool.stream(tmp_path / uri, order=names, memory_limit=limit)]
    assert found == [(name, wanted[name]) for name in names]
    assert list(shardtool.stream(tmp_path / uri, order=[])) == []


@pytest.mark.parametrize("concurrency", [1, 16])
def test_ready_is_any_order_of_all(shards: str, concurrency: int):
    found = list(shardtool.stream(shards, rank=0, order="ready", concurrency=concurrency))
    assert len(found) == len(dict(found))
    assert raws(dict(found)) == expected(HELD, CONFIG, 2)[0]


@pytest.mark.parametrize("order", ["fastest", ["no.such.weight"], ["lm_head.weight", "lm_head.weight"]])
def test_an_order_that_cannot_be_is_refused(shards: str, order: Any):
    with pytest.raises(UsageError, match="order"):
        shardtool.stream(shards, rank=0, order=order)


# Of another size.


@pytest.mark.parametrize("uri", ["model", "tp2"])
def test_a_rank_of_any_size_comes_out_of_whole_tensors_or_other_shards(tmp_path: Path, uri: str):
    put(tmp_path / "model", FILES)
    put(tmp_path / "tp2", SHARDS)
    for rank, wanted in enumerate(expected(HELD, CONFIG, 4)):
        assert raws(shardtool.load(tmp_path / uri, tp=4, rank=rank)) == wanted
        assert raws(dict(shardtool.stream(tmp_path / uri, tp=4, rank=rank, memory_limit=0))) == wanted


def test_what_is_cut_on_the_way_is_neither_borrowed_nor_ordered(shards: str):
    for option in ({"borrow": True}, {"order": "ready"}, {"order": ["lm_head.weight"]}):
        with pytest.raises(UsageError, match="leave order and borrow out"):
            shardtool.stream(shards, tp=4, rank=0, **option)
    with pytest.raises(UsageError, match="leave block_size out"):
        shardtool.stream(shards, tp=4, rank=0, block_size="1MiB")
    with pytest.raises(NotFound, match="has no rank 4"):
        shardtool.stream(shards, tp=4, rank=4)


# Borrowed.


def test_borrowed_tensors_are_the_files_own_pages(tmp_path: Path):
    shardtool.save(put(tmp_path / "model", FILES), tmp_path / "out", tp=1)
    for uri in ("model", "out"):
        found = shardtool.load(tmp_path / uri, borrow=True)
        assert raws(found) == raws(shardtool.load(tmp_path / uri))
    (path,) = (tmp_path / "out").glob("*.safetensors")
    before = path.read_bytes()
    found["model.norm.weight"].fill_(0)
    assert path.read_bytes() == before, "who writes gets a copy"
    again = shardtool.load(tmp_path / "out", borrow=True)
    with open(path, "r+b") as file:
        file.seek(-2, 2)
        file.write(b"zz")
    last = in_order(before)[-1]
    assert raw_of(again[last]) == parsed(path.read_bytes())[last] != parsed(before)[last]


def test_damage_of_a_borrowed_tensor_is_found(tmp_path: Path):
    put(tmp_path / "out", damaged("lm_head.weight"))
    with pytest.raises(ChecksumMismatch, match=r"'lm_head\.weight' differs"):
        shardtool.load(tmp_path / "out", rank=0, borrow=True)
    assert shardtool.load(tmp_path / "out", rank=0, borrow=True, verify=False)


def test_what_is_not_a_file_of_this_machine_cannot_be_borrowed(shards: str):
    with pytest.raises(UsageError, match="only files of this machine can"):
        shardtool.load(shards, rank=0, borrow=True)
    with pytest.raises(UsageError, match="not on meta"):
        shardtool.load(shards, rank=0, borrow=True, device="meta")


def test_a_borrowing_stream_that_is_closed_stops_its_threads(tmp_path: Path):
    before = set(threading.enumerate())
    found = shardtool.stream(put(tmp_path / "model", FILES) and tmp_path / "model", borrow=True)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


# Memory.


def large(tmp_path: Path) -> tuple[Path, Tensors]:
    """A checkpoint with a tensor of 17 MB, three chunks, beside small ones."""
    made = config(num_hidden_layers=1, hidden_size=512, vocab_size=17_000)
    held = tensors(made)
    shardtool.save(put(tmp_path / "model", model(made, held)), tmp_path / "out", tp=1)
    return tmp_path / "out", expected(held, made, 1)[0]


@pytest.mark.parametrize("limit", [0, "64KiB", "1MiB", "9MiB", "20MiB"])
def test_a_limit_below_the_largest_tensor_is_enough(tmp_path: Path, limit: Any):
    out, wanted = large(tmp_path)
    assert raws(shardtool.load(out, memory_limit=limit)) == wanted


@pytest.mark.parametrize("limit", [1, "4KiB"])
def test_a_limit_that_is_too_small_says_what_would_do(shards: str, limit: Any):
    with pytest.raises(
        BudgetTooSmall, match=r"--memory-limit .* is too small for loading .*: 65536 bytes .* would do"
    ) as error:
        shardtool.load(shards, rank=0, memory_limit=limit)
    assert shardtool.load(shards, rank=0, memory_limit=error.value.needed)


def test_no_more_is_read_ahead_than_the_limit_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the caller has not taken yet counts."""
    held = {f"t{i:02d}": random((1 << 16,), "BF16", i) for i in range(20)}
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    with places() as place:
        uri = put(place("model"), {"model.safetensors": safetensors(held)}).replace("memory", "counted")
        found = shardtool.stream(uri, memory_limit="512KiB")
        next(found)
        wait_until(lambda: not changing(lambda: counted(uri).bytes_read))
        assert counted(uri).bytes_read < 1 << 20
        assert len(list(found)) == 19


def changing(value: Callable[[], int]) -> bool:
    before = value()
    threading.Event().wait(0.1)
    return value() != before


def wait_until(done: Callable[[], bool]) -> None:
    for _ in range(100):
        if done():
            return
    raise AssertionError("it does not come to rest")


@pytest.fixture(scope="module")
def ranks_of_many_sizes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eight ranks of 30 MiB, whose tensors have 1 to 6 MiB. Removed afterwards, for the sake of the disk."""
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        models.write(Path(folder, "model"), models.of_size(236 * MIB, vocab=8192))
        shardtool.save(Path(folder, "model"), Path(folder, "tp8"), tp=8)
        yield Path(folder, "tp8")


@pytest.mark.parametrize("limit", [0, 8 * MIB, 24 * MIB])
@pytest.mark.parametrize("rank", [None, 2])
def test_measuring_takes_the_limit_and_the_largest_tensor_however_many_ranks_there_are(
    ranks_of_many_sizes: Path, limit: int, rank: int | None
):
    """What a rank has used is there for the next; what was measured is gone before the next tensor comes."""
    largest = max(tensor.bytes for tensor in shardtool.inspect(ranks_of_many_sizes, tensors="*").listed)
    assert largest < 6 * MIB
    found = run("measure", ranks_of_many_sizes, memory_limit=limit, rank=rank)
    assert not found.error, found.message
    assert found.value["bytes"] > (29 if rank is not None else 8 * 29) * MIB
    assert found.over <= limit + largest + 16 * MIB


# Damage.


def damaged(name: str) -> Files:
    """The shards with one bit of a tensor of rank 0 changed."""
    for key, data in SHARDS.items():
        if key.startswith("model-rank-0") and name in parsed(data):
            return {**SHARDS, key: flipped(data, data.index(parsed(data)[name].array.tobytes()))}
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("concurrency", [1, 16])
def test_a_damaged_tensor_is_not_handed_over(name: str, concurrency: int):
    with places() as place:
        uri = put(place("shards"), damaged(name))
        seen: Tensors = {}

        def take() -> None:
            for got, tensor in shardtool.stream(uri, rank=0, concurrency=concurrency):
                seen[got] = raw_of(tensor)

        said = rf"model-rank-0-part-\d\.safetensors: tensor '{re.escape(name)}' differs"
        with pytest.raises(ChecksumMismatch, match=said):
            take()
        assert seen == {got: expected(HELD, CONFIG, 2)[0][got] for got in seen}
        assert name not in seen
        assert shardtool.load(uri, rank=1)
        found = shardtool.load(uri, rank=0, verify=False)
        assert raw_of(found[name]) != expected(HELD, CONFIG, 2)[0][name]


def test_a_file_of_another_header_is_refused(shards: str):
    """Of the right size, with all tensors, but not those of the manifest."""
    key = "model-rank-0-part-0.safetensors"
    data = SHARDS[key]
    with places() as place:
        changed = (
            data.replace(b"input_layernorm", b"xnput_layernorm")
            if b"input_layernorm" in data
            else data.replace(b"embed", b"xmbed")
        )
        assert changed != data
        uri = put(place("shards"), {**SHARDS, key: changed})
        with pytest.raises(ChecksumMismatch, match="its header differs from its digest"):
            shardtool.load(uri, rank=0)


def test_a_missing_file_is_named(shards: str):
    with places() as place:
        uri = put(place("shards"), {k: v for k, v in SHARDS.items() if k != "model-rank-0-part-1.safetensors"})
        with pytest.raises(Incomplete, match="model-rank-0-part-1"):
            shardtool.load(uri, rank=0)
        assert shardtool.load(uri, rank=1)


# Refusals.


@pytest.mark.parametrize("rank", [2, -1, 99])
def test_a_rank_that_there_is_not_is_not_found(shards: str, rank: int, tmp_path: Path):
    put(tmp_path / "engine", engine_saved(CONFIG, expected(HELD, CONFIG, 2)))
    for uri in (shards, tmp_path / "engine"):
        with pytest.raises(NotFound, match=f"has no rank {rank}"):
            shardtool.load(uri, rank=rank)
        with pytest.raises(NotFound, match=f"has no rank {rank}"):
            measure(uri, rank=rank)


def test_whole_tensors_have_no_ranks(tmp_path: Path):
    put(tmp_path / "model", FILES)
    for operation in (shardtool.load, measure):
        with pytest.raises(NotFound, match="has no rank 1"):
            operation(tmp_path / "model", rank=1)


def test_of_several_ranks_one_must_be_named(shards: str):
    with pytest.raises(UsageError, match="has 2 ranks: say which one to load with rank="):
        shardtool.load(shards)


@pytest.mark.parametrize(
    ("device", "said"), [("gpu", "is not a device"), ("cuda:99", "this machine has"), ("mps", "not supported")]
)
def test_a_device_that_there_is_not_is_refused(shards: str, device: str, said: str):
    with pytest.raises(UsageError, match=said):
        shardtool.load(shards, rank=0, device=device)


@pytest.mark.parametrize("concurrency", [0, -1])
def test_no_readers_are_refused(shards: str, concurrency: int):
    with pytest.raises(UsageError, match="--concurrency"):
        shardtool.load(shards, rank=0, concurrency=concurrency)


def test_arguments_are_checked_before_the_first_tensor_is_asked_for(shards: str):
    with pytest.raises(NotFound):
        shardtool.stream(shards, rank=9)
    with pytest.raises(BudgetTooSmall):
        shardtool.stream(shards, rank=0, memory_limit=1)


OPERATIONS = [
    shardtool.stream,
    shardtool.load,
    measure,
    lambda uri, **options: shardtool.load_into(blank(), uri, **options),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", True),
        ("rank", "0"),
        ("rank", 0.0),
        ("pattern", 7),
        ("memory_limit", -7),
        ("memory_limit", "lots"),
        ("memory_limit", 1.5),
        ("memory_limit", True),
        ("concurrency", 2000),
        ("concurrency", "3"),
        ("concurrency", True),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_by_name(
    shards: str, operation: Callable[..., Any], name: str, value: Any
):
    with pytest.raises(UsageError, match=name.replace("_", "[-_]")):
        operation(shards, **{"rank": 0, name: value})


def test_a_device_or_a_target_of_another_type_is_refused_by_name(shards: str):
    with pytest.raises(UsageError, match="device=0 is not a device"):
        shardtool.load(shards, rank=0, device=0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="target is a list"):
        shardtool.load_into([], shards, rank=0)  # type: ignore[arg-type]


# Streams that end early.


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("limit", [0, None])
def test_a_stream_that_is_closed_stops_its_threads(shards: str, taken: int, limit: Any):
    before = set(threading.enumerate())
    found = shardtool.stream(shards, rank=0, memory_limit=limit)
    for _ in range(taken):
        next(found)
    found.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_a_stream_whose_caller_fails_stops_its_threads(shards: str):
    before = set(threading.enumerate())

    def take() -> None:
        for n, _ in enumerate(shardtool.stream(shards, rank=0, memory_limit=0)):
            if n == 3:
                raise RuntimeError("the caller has had enough")

    with pytest.raises(RuntimeError, match="had enough"):
        take()
    gc.collect()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_stream_that_is_never_begun_starts_no_thread_and_closes_its_store(
    shards: str, device: str, monkeypatch: pytest.MonkeyPatch
):
    closed: list[str] = []
    monkeypatch.setattr(MemoryStore, "close", lambda store: closed.append(store.uri))
    before = set(threading.enumerate())
    found = shardtool.stream(shards, rank=0, device=device)
    assert set(threading.enumerate()) <= before
    del found
    assert set(threading.enumerate()) <= before
    assert closed == [shards]


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path):
    """By another one of the same size: without digests nothing else tells."""
    held = {f"t{i}": random((1 << 17,), "BF16", i) for i in range(3)}
    path = tmp_path / "model" / "model.safetensors"
    put(path.parent, {path.name: safetensors(held)})
    tensors = shardtool.stream(path.parent, memory_limit=0)  # less than a tensor: each is let in alone
    next(tensors)  # and counts until the next one is asked for: the last one cannot have been read yet
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(1, 1))
    other.replace(path)
    with pytest.raises(FormatError, match=rf"{path.name} has changed while it was read; load it again"):
        list(tensors)


@pytest.mark.parametrize("size", ["64KiB", "100KiB", "5MiB", "1GiB"])
def test_reads_are_as_large_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str):
    out, wanted = large(tmp_path)
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    with places() as place:
        uri = put(place("shards"), contents(out)).replace("memory", "counted")
        assert raws(shardtool.load(uri, block_size=size)) == wanted
        longest = max(b - a for key, spans in counted(uri).reads.items() for a, b in spans if key.endswith("tensors"))
        assert longest == min(parse_size(size, ""), 8 * MIB)
    with pytest.raises(UsageError, match="--block-size 1KiB is too small"):
        shardtool.load(out, block_size="1KiB")


def test_two_streams_do_not_disturb_each_other(shards: str):
    a, b = (shardtool.stream(shards, rank=rank, memory_limit=0) for rank in (0, 1))
    pairs = list(zip(a, b, strict=True))
    assert raws(dict(one for one, _ in pairs)) == expected(HELD, CONFIG, 2)[0]
    assert raws(dict(other for _, other in pairs)) == expected(HELD, CONFIG, 2)[1]


# Into tensors that exist.


def blank(rank: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of the right names, shapes and types, full of sevens."""
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}
    wanted = expected(HELD, CONFIG, 2)[rank]
    return {name: torch.full(raw.array.shape, 7.0, dtype=kinds[raw.dtype]) for name, raw in wanted.items()}


@pytest.mark.parametrize("limit", [0, None])
def test_a_state_dict_is_filled_in_place(shards: str, limit: Any):
    target = blank()
    pointers = {name: tensor.data_ptr() for name, tensor in target.items()}
    shardtool.load_into(target, shards, rank=0, memory_limit=limit)
    assert raws(target) == expected(HELD, CONFIG, 2)[0]
    assert {name: tensor.data_ptr() for name, tensor in target.items()} == pointers


@pytest.mark.parametrize("limit", [0, "8MiB", None])
def test_a_parameter_of_any_strides_is_filled(shards: str, limit: Any):
    target = blank()
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        rows, columns = target[name].shape
        target[name] = torch.zeros(columns, rows, dtype=torch.bfloat16).T
    target["lm_head.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)[:, ::2]
    shardtool.load_into(target, shards, rank=0, memory_limit=limit)
    assert raws(target) == expected(HELD, CONFIG, 2)[0]


def test_buffers_are_no_larger_than_what_goes_through_them(shards: str):
    """A device has them registered, which takes time for each page."""
    checkpoint = opened(shards, 0, None)
    with checkpoint.store:
        found = items(checkpoint, 0, verify=True)
        means = means_for(checkpoint, found, Given(blank()), None, None)
    total = sum(item.entry.nbytes for item in found)
    assert total <= means.arena.size <= total + (len(found) + 1) * PAGE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda target: target.pop("model.norm.weight"),
            "has the tensor 'model.norm.weight', which the target does not have",
        ),
        (lambda target: target.update(more=torch.zeros(2)), "the target's tensor 'more' is not in"),
        (
            lambda target: target.update({"model.norm.weight": torch.zeros(31, dtype=torch.bfloat16)}),
            r"'model.norm.weight' is torch.bfloat16 \[32\], the target's is torch.bfloat16 \[31\]",
        ),
        (
            lambda target: target.update({"model.norm.weight": torch.zeros(32)}),
            r"'model.norm.weight' is torch.bfloat16 \[32\], the target's is torch.float32 \[32\]",
        ),
    ],
)
def test_a_target_that_does_not_fit_is_not_touched(shards: str, change: Callable[[dict[str, Any]], Any], said: str):
    target = blank()
    change(target)
    before = {name: tensor.clone() for name, tensor in target.items()}
    with pytest.raises(TensorMismatch, match=said) as error:
        shardtool.load_into(target, shards, rank=0)
    assert "nothing was written" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.items())


DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.1.mlp.down_proj.weight"


def assert_untouched(shards: str, target: dict[str, torch.Tensor], said: str) -> None:
    """The target is refused before its first byte is written."""
    with pytest.raises(TensorMismatch, match=said) as error:
        shardtool.load_into(target, shards, rank=0)
    assert "nothing was written" in str(error.value)
    assert all(bool((tensor == 7).all()) for tensor in target.values())


@pytest.mark.parametrize("first", [1, 32 * 12, 2 * 32 * 12 - 1])
def test_targets_that_overlap_are_refused(shards: str, first: int):
    """Not only those that start at the same place."""
    target = blank()
    n = target[DOWN].numel()
    assert n == 32 * 24
    memory = torch.full((3 * n,), 7.0, dtype=torch.bfloat16)
    target[DOWN] = memory[:n].view(32, 24)
    target[UP] = memory[min(first, n - 1) :][:n].view(32, 24)
    assert_untouched(shards, target, f"'{re.escape(DOWN)}' and '{re.escape(UP)}' overlap")


def test_views_that_interleave_overlap_only_if_they_share_a_byte(shards: str):
    target = blank()
    memory = torch.full((32, 50), 7.0, dtype=torch.bfloat16)
    target[DOWN], target[UP] = memory[:, :24], memory[:, 23:47]
    assert_untouched(shards, target, "overlap")
    target[UP] = memory[:, 24:48]
    shardtool.load_into(target, shards, rank=0)
    assert raws(target) == expected(HELD, CONFIG, 2)[0]
    target[DOWN], target[UP] = memory[:, 0:48:2], memory[:, 1:48:2]
    shardtool.load_into(target, shards, rank=0)
    assert raws(target) == expected(HELD, CONFIG, 2)[0]
    assert bool((memory[:, 48:] == 7).all())


def test_neighbours_in_one_memory_do_not_overlap(shards: str):
    target = blank()
    n = target[DOWN].numel()
    memory = torch.full((2 * n,), 7.0, dtype=torch.bfloat16)
    target[DOWN], target[UP] = memory[:n].view(32, 24), memory[n:].view(32, 24)
    shardtool.load_into(target, shards, rank=0)
    assert raws(target) == expected(HELD, CONFIG, 2)[0]


@pytest.mark.parametrize(("shape", "strides"), [((1, 24), (0, 1)), ((32, 1), (1, 0)), ((56,), (1, 1))])
def test_a_target_whose_elements_share_a_place_is_refused(
    shards: str, shape: tuple[int, ...], strides: tuple[int, int]
):
    """An expanded tensor, a broadcast column, and rows that run into each other."""
    target = blank()
    target[DOWN] = torch.full(shape, 7.0, dtype=torch.bfloat16).as_strided((32, 24), strides)
    assert_untouched(shards, target, rf"'{re.escape(DOWN)}' has several elements in one place .*strides \[")


def test_a_transposed_view_is_another_order_of_the_same_memory(tmp_path: Path):
    held = {"a": random((4, 4), "F32"), "b": random((4, 4), "F32")}
    held["b"] = Raw("F32", held["a"].array.copy())
    put(tmp_path / "model", {"model.safetensors": safetensors(held)})
    memory = torch.full((4, 4), 7.0)
    with pytest.raises(TensorMismatch, match="'a' and 'b' overlap"):
        shardtool.load_into({"a": memory, "b": memory.T}, tmp_path / "model")
    assert bool((memory == 7).all())
    shardtool.load_into({"a": memory, "b": memory.view(4, 4)}, tmp_path / "model")
    assert raw_of(memory) == held["a"]


def test_a_name_that_the_checkpoint_lacks_must_be_all_of_a_memory_that_is_filled(shards: str):
    target = blank()
    memory = torch.full((64, 24), 7.0, dtype=torch.bfloat16)
    target[DOWN] = memory[:32]
    target["more"] = memory
    assert_untouched(shards, target, "'more' is not in")
    target["more"] = memory[:32]
    shardtool.load_into(target, shards, rank=0)


def test_damage_that_is_found_on_the_way_leaves_the_target_written_in_part():
    """Only a target that does not fit is known before the first byte."""
    target = blank()
    with places() as place, pytest.raises(ChecksumMismatch):
        shardtool.load_into(target, put(place("shards"), damaged("model.norm.weight")), rank=0, concurrency=1)
    assert raws(target) != raws(blank())


def test_an_empty_tensor_that_the_checkpoint_lacks_does_not_matter(shards: str):
    target = {**blank(), "nothing": torch.zeros(0)}
    shardtool.load_into(target, shards, rank=0)


def test_targets_on_the_meta_device_take_part_without_memory(shards: str):
    """The path of a GPU without one: every tensor is staged."""
    target = {name: tensor.to("meta") for name, tensor in blank().items()}
    shardtool.load_into(target, shards, rank=0)
    found = shardtool.load(shards, rank=0, device="meta", memory_limit=0)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {n: (t.shape, t.dtype) for n, t in target.items()}
    with places() as place, pytest.raises(ChecksumMismatch):
        shardtool.load(put(place("bad"), damaged("lm_head.weight")), rank=0, device="meta")


def tiny(tied: bool) -> torch.nn.Module:
    import transformers

    made = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(int(tied))
    return transformers.LlamaForCausalLM(made).bfloat16().eval()


@pytest.mark.parametrize("tied", [False, True])
def test_a_module_is_filled_with_a_checkpoint_of_whole_tensors(tmp_path: Path, tied: bool):
    """With tied weights the checkpoint has one of the two names."""
    first, second = tiny(tied), tiny(tied)
    first.save_pretrained(tmp_path / "model", max_shard_size="20KB")  # type: ignore[operator]
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(0)
    shardtool.load_into(second, tmp_path / "model")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, second(tokens).logits)
    if tied:
        assert second.lm_head.weight is second.model.embed_tokens.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("own", ["equal", "other"])
def test_one_memory_takes_two_tensors_only_if_they_are_equal(tmp_path: Path, own: str):
    """A tied module and a checkpoint that has both: the values decide, and not which of them came last."""
    held = dict(HELD)
    if own == "equal":
        held["lm_head.weight"] = Raw("BF16", held["model.embed_tokens.weight"].array.copy())
    put(tmp_path / "model", model(CONFIG, held))
    target = tiny(True)
    if own == "equal":
        shardtool.load_into(target, tmp_path / "model")
        assert raw_of(target.lm_head.weight) == held["lm_head.weight"]  # type: ignore[union-attr,arg-type]
    else:
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        with pytest.raises(
            TensorMismatch, match=r"'model\.embed_tokens\.weight' and 'lm_head\.weight' differ.*nothing was"
        ):
            shardtool.load_into(target, tmp_path / "model")
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_a_tied_pair_that_the_checkpoint_lacks_is_named(tmp_path: Path):
    held = {name: raw for name, raw in HELD.items() if "embed" not in name and "lm_head" not in name}
    put(tmp_path / "model", model(CONFIG, held))
    with pytest.raises(TensorMismatch, match="is not in"):
        shardtool.load_into(tiny(True), tmp_path / "model")


def test_gradients_do_not_hear_of_it(tmp_path: Path):
    target = tiny(False)
    put(tmp_path / "model", FILES)
    shardtool.load_into(target, tmp_path / "model")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in target.parameters())
    assert raws(dict(target.named_parameters())) == HELD


# Progress and measure.


def test_progress_ends_with_all_bytes(shards: str):
    told: list[tuple[int, int]] = []
    found = shardtool.load(shards, rank=0, concurrency=1, progress=lambda done, total: told.append((done, total)))
    total = sum(tensor.nbytes for tensor in found.values())
    assert told[-1] == (total, total)


@pytest.mark.parametrize("rank", [None, 1])
def test_measuring_streams_every_rank_and_keeps_nothing(shards: str, rank: int | None):
    found = measure(shards, rank=rank)
    ranks = range(2) if rank is None else [rank]
    wanted = [sum(raw.array.nbytes for raw in rank_tensors(SHARDS, r).values()) for r in ranks]
    assert [(one.rank, one.bytes, one.device) for one in found.ranks] == [
        (r, n, "cpu") for r, n in zip(ranks, wanted, strict=True)
    ]
    assert (found.bytes, found.kind, found.verified, found.notes) == (sum(wanted), "sharded", True, ())
    assert found.tensors == sum(len(rank_tensors(SHARDS, r)) for r in ranks)


def test_measuring_says_when_nothing_could_be_checked(tmp_path: Path, shards: str):
    put(tmp_path / "model", FILES)
    found = measure(tmp_path / "model")
    assert (found.verified, found.notes) == (False, ("there is no manifest, so that no digest was checked",))
    assert [one.rank for one in found.ranks] == [None]
    unchecked = measure(shards, verify=False)
    assert (unchecked.verified, unchecked.notes) == (False, ())


def test_a_tensor_survives_torch_save(shards: str):
    """It is a tensor like any other, whatever its memory is."""
    found = shardtool.load(shards, rank=0)
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())


# On a GPU.


@pytest.mark.cuda
@pytest.mark.parametrize("limit", [0, "9MiB", None])
def test_tensors_arrive_on_a_gpu(tmp_path: Path, limit: Any):
    out, wanted = large(tmp_path)
    found = shardtool.load(out, device="cuda", memory_limit=limit)
    assert all(tensor.device.type == "cuda" for tensor in found.values())
    assert raws({name: tensor.cpu() for name, tensor in found.items()}) == wanted


@pytest.mark.cuda
def test_parameters_on_a_gpu_are_filled(shards: str):
    target = {name: tensor.to("cuda") for name, tensor in blank().items()}
    target["model.embed_tokens.weight"] = torch.zeros(32, 64, dtype=torch.bfloat16, device="cuda").T
    shardtool.load_into(target, shards, rank=0)
    assert raws({name: tensor.cpu() for name, tensor in target.items()}) == expected(HELD, CONFIG, 2)[0]


@pytest.mark.cuda
def test_a_damaged_tensor_does_not_reach_a_gpu():
    with places() as place, pytest.raises(ChecksumMismatch):
        shardtool.load(put(place("bad"), damaged("lm_head.weight")), rank=0, device="cuda")


@pytest.mark.cuda
def test_measuring_on_gpus_says_where_each_rank_went(shards: str):
    found = measure(shards, device="cuda")
    several = torch.cuda.device_count() >= 2
    assert [one.device for one in found.ranks] == (["cuda:0", "cuda:1"] if several else ["cuda:0", "cuda:0"])
