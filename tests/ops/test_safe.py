"""``safe_open`` and ``load_file``: what the safetensors library gives, for folders, addresses and ranks too."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file as reference_load_file

import shardtool
from shardtool import stores
from shardtool.errors import ChecksumMismatch, FormatError, NotFound, UsageError
from shardtool.ops import gather
from shardtool.ops.safe import load_file, safe_open
from tests import torchfiles
from tests.builders import COUNTING, Raw, config, contents, counted, flipped, model, places, put, random, safetensors
from tests.builders import tensors as model_tensors

HELD = {
    "wide": random((6, 5, 4), "F32"),
    "bf16": random((7, 3), "BF16", 1),
    "scalar": random((), "F64", 2),
    "empty": Raw("F16", np.zeros((0, 3), "<f2")),
    "numbers": Raw("I64", np.arange(11, dtype="<i8")),
    "bytes": Raw("U8", np.arange(24, dtype="u1").reshape(2, 3, 4)),
    "truth": Raw("BOOL", np.array([True, False, True])),
}
METADATA = {"format": "pt", "made by": "a test"}
FILE = safetensors(HELD, METADATA)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "some.safetensors").write_bytes(FILE)
    return str(tmp_path / "some.safetensors")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same file, for tests that try many examples."""
    path = tmp_path_factory.mktemp("kept") / "some.safetensors"
    path.write_bytes(FILE)
    return str(path)


@pytest.fixture(autouse=True)
def no_thread_stays_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert {thread for thread in threading.enumerate() if thread.name.startswith("shardtool")} <= before


def same(a: Any, b: Any) -> bool:
    """Equal types, shapes and bytes."""
    if type(a) is not type(b) or a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a.tobytes() == b.tobytes()


# Whole tensors and what is said about them.


def test_a_file_shows_what_the_safetensors_library_shows(file):
    with safe_open(file) as ours, reference.safe_open(file, "pt") as theirs:
        assert ours.keys() == theirs.keys()
        assert ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() == theirs.metadata() == METADATA
        for name in theirs.keys():  # noqa: SIM118 - it is no dictionary
            assert same(ours.get_tensor(name), theirs.get_tensor(name)), name
            mine, other = ours.get_slice(name), theirs.get_slice(name)
            assert mine.get_shape() == other.get_shape()
            assert mine.get_dtype() == other.get_dtype()
        assert "wide" in ours
        assert "narrow" not in ours
        both = ours.get_tensors()
        assert list(both) == theirs.offset_keys()
        assert all(same(tensor, theirs.get_tensor(name)) for name, tensor in both.items())


@pytest.mark.parametrize("name", ["blob", "weights.st", "0a1b2c", ".hidden", "a.json"])
def test_any_file_is_a_safetensors_file_whatever_it_is_called(tmp_path, monkeypatch, name):
    put(tmp_path, {name: FILE, "shardtool.json": b"of something else"})
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, str(tmp_path / name), name):
        with safe_open(path) as ours, reference.safe_open(path, "pt") as theirs:
            assert ours.keys() == theirs.keys()
            assert same(ours.get_tensor("wide"), theirs.get_tensor("wide"))
            assert same(ours.get_slice("wide")[1:3], theirs.get_slice("wide")[1:3])
        found = load_file(path)
        assert list(found) == ours_order(path)
        assert all(same(tensor, reference_load_file(path)[key]) for key, tensor in found.items())
        for opening in (safe_open, load_file):
            with pytest.raises(NotFound, match="no rank 1"):
                opening(path, rank=1)


def ours_order(path: str | Path) -> list[str]:
    with reference.safe_open(path, "pt") as theirs:
        return list(theirs.offset_keys())


def test_a_file_of_a_hubs_cache_is_opened_by_its_link_too(tmp_path):
    put(tmp_path, {"blobs/0a1b": FILE})
    link = tmp_path / "snapshots" / "1" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../blobs/0a1b")
    for path in (link, tmp_path / "blobs" / "0a1b"):
        with safe_open(path) as opened:
            assert same(opened.get_tensor("wide").numpy(), HELD["wide"].array)
        assert load_file(path).keys() == HELD.keys()


def test_a_file_that_is_none_of_tensors_is_refused(tmp_path):
    put(tmp_path, {"text": b"no tensors here"})
    for opening in (safe_open, load_file):
        with pytest.raises(FormatError, match="text"):
            opening(tmp_path / "text")
        with pytest.raises(NotFound):
            opening(tmp_path / "gone")


def test_arguments_are_called_as_in_the_safetensors_library(file):
    for backend in ("mmap", "pread"):
        with (
            safe_open(filename=file, framework="pt", device="cpu", backend=backend) as ours,
            reference.safe_open(filename=file, framework="pt", device="cpu", backend=backend) as theirs,
        ):
            assert same(ours.get_tensor("wide"), theirs.get_tensor("wide"))
        theirs = reference_load_file(filename=file, device="cpu", backend=backend)
        assert load_file(filename=file, device="cpu", backend=backend).keys() == theirs.keys()
    for opening in (safe_open, load_file):
        with pytest.raises(UsageError, match="backend='tape' is not offered"):
            opening(file, backend="tape")


@pytest.mark.parametrize("framework", ["np", "numpy"])
def test_numpy_arrays_are_what_the_safetensors_library_gives(file, framework):
    names = sorted(HELD.keys() - {"bf16"})
    with safe_open(file, framework) as ours, reference.safe_open(file, framework) as theirs:
        for name in names:
            assert same(ours.get_tensor(name), theirs.get_tensor(name)), name
            assert ours.get_tensor(name).flags.writeable
        with pytest.raises(UsageError, match="numpy has no type for tensor 'bf16' of BF16; import ml_dtypes"):
            ours.get_tensor("bf16")
        with pytest.raises(UsageError, match="BF16"):
            ours.get_slice("bf16")[0]


def test_all_arrays_at_once(tmp_path):
    held = {"b": HELD["wide"], "a": HELD["numbers"]}
    put(tmp_path, {"x.safetensors": safetensors(held)})
    with safe_open(tmp_path / "x.safetensors", "np") as opened:
        assert opened.metadata() is None
        found = opened.get_tensors()
    assert list(found) == ["b", "a"]
    assert all(same(found[name], raw.array) for name, raw in held.items())


def test_what_is_handed_out_is_the_callers(file):
    with safe_open(file) as opened:
        first, second = opened.get_tensor("wide"), opened.get_tensor("wide")
        part = opened.get_slice("wide")[1:3]
    assert len({tensor.untyped_storage().data_ptr() for tensor in (first, second, part)}) == 3
    first.zero_()
    part.zero_()
    assert same(second.numpy(), HELD["wide"].array)


def test_elements_narrower_than_a_byte_come_as_torch_packs_them(tmp_path):
    table = {"x": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}}
    text = json.dumps(table).encode()
    path = tmp_path / "four.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(6)))
    with safe_open(path) as ours, reference.safe_open(path, "pt") as theirs:
        assert same(ours.get_tensor("x").view(torch.uint8), theirs.get_tensor("x").view(torch.uint8))
        assert ours.get_slice("x").get_shape() == [3, 4]
        assert ours.get_slice("x")[1:].view(torch.uint8).tolist() == [[2, 3], [4, 5]]
    with safe_open(path, "np") as ours, pytest.raises(UsageError, match="numpy has no type"):
        ours.get_tensor("x")


@pytest.mark.parametrize(("kind", "shape", "size"), [("F6_E2M3", [2, 4], 6), ("F4", [4, 1], 2)])
def test_elements_that_no_framework_has_are_refused(tmp_path, kind, shape, size):
    text = json.dumps({"x": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with safe_open(tmp_path / "x.safetensors") as opened:
        for take in (opened.get_tensor, lambda name: opened.get_slice(name)[0]):
            with pytest.raises(UsageError, match=kind if kind != "F4" else "do not fill the bytes of a row"):
                take("x")


def test_load_file_gives_what_the_safetensors_library_gives(file):
    ours, theirs = load_file(file), reference_load_file(file)
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in theirs)


def test_arrays_need_no_torch(file):
    program = (
        "import sys\nfrom shardtool.ops.safe import safe_open\n"
        f"with safe_open({file!r}, 'np') as f:\n    f.get_tensor('wide'), f.get_slice('wide')[1], f.get_tensors\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# Slices.

SHAPE = HELD["wide"].array.shape


def indices(n: int) -> st.SearchStrategy[Any]:
    """Anything that indexes a dimension of ``n``, or just misses it."""
    ends = st.none() | st.integers(-n - 2, n + 2)
    steps = st.none() | st.integers(1, n + 1)
    return st.integers(-n - 1, n) | st.builds(slice, ends, ends, steps)


@st.composite
def plain(draw: Callable[..., Any]) -> Any:
    """Integers, slices, ``None`` and an ellipsis."""
    parts: list[Any] = [draw(indices(n)) for n in SHAPE[: draw(st.integers(0, len(SHAPE)))]]
    if draw(st.booleans()):
        at = draw(st.integers(0, len(parts)))
        parts[at:at] = [...]
        behind = len(parts) - at - 1
        parts[at + 1 :] = [draw(indices(n)) for n in SHAPE[len(SHAPE) - behind :]]
    for _ in range(draw(st.integers(0, 2))):
        parts.insert(draw(st.integers(0, len(parts))), None)
    return parts[0] if len(parts) == 1 and draw(st.booleans()) else tuple(parts)


@st.composite
def fancy(draw: Callable[..., Any]) -> Any:
    """The same with a list or an array of integers or truth values."""
    dim = draw(st.integers(0, len(SHAPE) - 1))
    n = SHAPE[dim]
    rows = st.lists(st.integers(-n, n - 1), min_size=1, max_size=4)
    truths = st.lists(st.booleans(), min_size=n, max_size=n)
    one = draw(rows | rows.map(np.array) | truths.map(np.array) | rows.map(lambda found: np.array([found, found])))
    return (*(draw(indices(size)) for size in SHAPE[:dim]), one, *(draw(indices(size)) for size in SHAPE[dim + 1 :]))


def outcome(take: Callable[[], Any]) -> Any:
    """What it gives, or that it is an error of the kinds that indexing raises."""
    try:
        return take()
    except (IndexError, ValueError) as error:
        return IndexError if isinstance(error, IndexError) else ValueError


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@given(index=plain() | fancy())
def test_any_index_gives_what_the_safetensors_library_gives(kept, index):
    with safe_open(kept) as ours, reference.safe_open(kept, "pt") as theirs:
        mine = outcome(lambda: ours.get_slice("wide")[index])
        other = outcome(lambda: theirs.get_slice("wide")[index])
    assert mine is other or same(mine, other), (index, mine, other)


@given(index=plain() | fancy())
def test_any_index_of_an_array_gives_what_numpy_gives(kept, index):
    whole = HELD["wide"].array
    with safe_open(kept, "np") as ours:
        mine = outcome(lambda: ours.get_slice("wide")[index])
    whole_index = index if isinstance(index, tuple) else (index,)
    if not any(one is ... for one in whole_index):  # with it, numpy gives an array where it would give a number
        whole_index = (*whole_index, ...)
    other = outcome(lambda: whole[whole_index])
    assert mine is other or same(mine, other), (index, mine, other)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (6, IndexError, "index 6 is out of bounds for a dimension of 6"),
        ((0, -6), IndexError, "index -6 is out of bounds for a dimension of 5"),
        ((0, 0, 0, 0), IndexError, "too many indices for a tensor of 3 dimensions"),
        ((..., 0, ...), IndexError, "single ellipsis"),
        (slice(None, None, -1), ValueError, "step"),
        (slice(None, None, 0), ValueError, "step"),
        (1.5, IndexError, "not 1.5"),
        ("a", IndexError, "not 'a'"),
        ([0, 6], IndexError, "index 6 is out of bounds"),
        ([0.5], IndexError, "not float64"),
        (np.array([True, False]), IndexError, "truth values of shape"),
    ],
)
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_what_is_no_index_is_refused(file, framework, index, error, message):
    with safe_open(file, framework) as opened, pytest.raises(error, match=message):
        opened.get_slice("wide")[index]


def test_tensors_and_masks_of_several_dimensions_are_indices_too(file):
    whole = torch.from_numpy(HELD["wide"].array)
    mask = whole[0] > 1
    with safe_open(file) as opened:
        part = opened.get_slice("wide")
        assert same(part[torch.tensor([2, -1])], whole[torch.tensor([2, -1])])
        assert same(part[1, mask], whole[1, mask])
        assert same(part[torch.tensor(3)], whole[3])
        assert same(part[True], whole[None])
        assert part[[]].shape == (0, 5, 4)
        assert same(opened.get_slice("scalar")[()], opened.get_tensor("scalar"))


# What is read of a slice.

ROWS = Raw("U16", np.random.default_rng(3).integers(0, 1 << 16, (64, 2048), dtype="<u2"))
ROW = 4096
"""Bytes of a row."""


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], list[tuple[int, int]]]]:
    """Takes a slice of a matrix, expects what numpy gives, and returns which of its bytes were read, in order."""
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    with places() as place:
        uri = put(place("rows"), {"x.safetensors": safetensors({"rows": ROWS})}).replace("memory://", "counted://")

        def taken(index: Any) -> list[tuple[int, int]]:
            with safe_open(f"{uri}/x.safetensors", "np") as opened:
                offset = opened._items["rows"].entry.offset
                counted(uri).reset()
                found = opened.get_slice("rows")[index]
                reads = [pair for pairs in counted(uri).reads.values() for pair in pairs]
            assert same(found, np.asarray(ROWS.array[index])) or found.tolist() == ROWS.array[index].tolist()
            return sorted((start - offset, stop - offset) for start, stop in reads)

        yield taken


def test_rows_are_one_range(ranges):
    assert ranges(slice(3, 9)) == [(3 * ROW, 9 * ROW)]
    assert ranges(7) == [(7 * ROW, 8 * ROW)]
    assert ranges((7, slice(10, 20))) == [(7 * ROW + 20, 7 * ROW + 40)]
    assert ranges(slice(5, 5)) == []


def test_a_list_of_rows_reads_from_the_first_to_the_last_of_them(ranges):
    assert ranges([40, 8, -60]) == [(4 * ROW, 41 * ROW)]


def test_small_gaps_are_read_over(ranges):
    assert ranges((slice(None), 5)) == [(10, 63 * ROW + 12)]
    assert ranges((slice(2, 5), slice(None, None, 2))) == [(2 * ROW, 5 * ROW - 2)]


def test_large_gaps_are_left_out(ranges, monkeypatch):
    monkeypatch.setattr(gather, "GAP", 2000)
    assert ranges((slice(0, 3), slice(0, 10))) == [(row * ROW, row * ROW + 20) for row in range(3)]
    assert ranges((slice(0, 3), slice(0, 2000))) == [(0, 2 * ROW + 4000)]
    assert ranges((slice(0, 6, 2), slice(1, 9, 4))) == [(row * ROW + 2, row * ROW + 12) for row in (0, 2, 4)]


def test_what_is_read_over_is_read_in_blocks(ranges, monkeypatch):
    monkeypatch.setattr(gather, "BLOCK", 3 * ROW)
    found = ranges((slice(None), slice(0, 2047)))
    assert len(found) == 22
    assert all(stop - start <= 3 * ROW for start, stop in found)


SMALL = Raw("U16", np.arange(16 * 64, dtype="<u2").reshape(16, 64))


@given(
    index=st.tuples(*map(indices, SMALL.array.shape)),
    gap=st.sampled_from([0, 10, 200, 1 << 20]),
    block=st.sampled_from([1, 64, 500, 1 << 20]),
)
def test_no_limit_on_gaps_and_blocks_changes_what_is_read(index, gap, block):
    wanted = outcome(lambda: SMALL.array[index])
    with places() as place, pytest.MonkeyPatch.context() as patch:
        uri = put(place("rows"), {"x.safetensors": safetensors({"rows": SMALL})})
        patch.setattr(gather, "GAP", gap)
        patch.setattr(gather, "BLOCK", block)
        with safe_open(f"{uri}/x.safetensors", "np") as opened:
            found = outcome(lambda: opened.get_slice("rows")[index])
    assert found is wanted or (found == wanted).all()


# Digests.

BIG = config(num_hidden_layers=1, hidden_size=512, vocab_size=20_032)
EMBEDDING = "model.embed_tokens.weight"
PER_ROW = 1024


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Raw]:
    """A saved rank with a tensor of three chunks, and that tensor."""
    folder = tmp_path_factory.mktemp("big")
    held = model_tensors(BIG)
    shardtool.save(put(folder / "model", model(BIG, held)), folder / "out", tp=1)
    return contents(folder / "out"), held[EMBEDDING]


def damaged(files: dict[str, bytes], row: int, folder: Path) -> str:
    """The rank with one bit changed in a row of the embedding."""
    key = "model-rank-0-part-0.safetensors"
    with safe_open(put(folder / "sound", files)) as opened:
        at = opened._items[EMBEDDING].entry.offset + row * PER_ROW
    return put(folder / "damaged", {**files, key: flipped(files[key], at)})


def test_every_chunk_of_a_tensor_is_checked(big, tmp_path):
    files, embedding = big
    with safe_open(put(tmp_path / "sound", files), "pt") as opened:
        assert same(opened.get_tensor(EMBEDDING).view(torch.uint16).numpy(), embedding.array)
    uri = damaged(files, 20_031, tmp_path)
    with safe_open(uri) as opened:
        with pytest.raises(ChecksumMismatch, match=f"tensor '{EMBEDDING}' differs from its digest in its bytes"):
            opened.get_tensor(EMBEDDING)
        with pytest.raises(ChecksumMismatch):
            opened.get_tensors()
    with pytest.raises(ChecksumMismatch):
        load_file(uri)
    with safe_open(uri, verify=False) as opened:
        assert opened.get_tensor(EMBEDDING).shape == (20_032, 512)


def test_of_a_slice_the_chunks_are_checked_that_it_has_whole(big, tmp_path):
    files, embedding = big
    with safe_open(damaged(files, 8192, tmp_path)) as opened:  # the first row of the second chunk
        part = opened.get_slice(EMBEDDING)
        assert same(part[:8192].view(torch.uint16).numpy(), embedding.array[:8192])
        assert part[8192:16_383].shape == (8191, 512)  # a part of the chunk: it cannot be told
        for rows in (slice(8192, 16_384), slice(100, 17_000), slice(None)):
            with pytest.raises(ChecksumMismatch, match="bytes 8388608 to 16777216"):
                part[rows]


# Where it lies.


def test_a_rank_of_shards_is_opened_by_its_number(tmp_path):
    made = config()
    shardtool.save(put(tmp_path / "model", model(made, model_tensors(made), files=2)), tmp_path / "tp2", tp=2)
    for rank in range(2):
        wanted = shardtool.load(tmp_path / "tp2", rank=rank)
        with safe_open(tmp_path / "tp2", rank=rank) as opened:
            assert opened.keys() == sorted(wanted)
            assert all(same(opened.get_tensor(name), wanted[name]) for name in wanted)
        found = load_file(tmp_path / "tp2", rank=rank)
        assert all(same(found[name], wanted[name]) for name in wanted)
    with pytest.raises(UsageError, match="has 2 ranks: say which one"):
        safe_open(tmp_path / "tp2")
    with pytest.raises(NotFound, match="no rank 2"):
        safe_open(tmp_path / "tp2", rank=2)


def test_a_folder_of_several_files_is_one(tmp_path):
    put(
        tmp_path,
        {
            "model-1.safetensors": safetensors({"b": HELD["wide"]}, {"format": "pt", "part": "1"}),
            "model-2.safetensors": safetensors({"a": HELD["numbers"]}, {"format": "pt", "part": "2", "more": "x"}),
        },
    )
    with safe_open(tmp_path) as opened:
        assert opened.keys() == ["a", "b"]
        assert opened.offset_keys() == ["b", "a"]
        assert opened.metadata() == {"format": "pt", "more": "x"}
        assert same(opened.get_slice("b")[2].numpy(), HELD["wide"].array[2])


def test_a_bucket(bucket):
    uri = put(f"s3://{bucket}/models", {"x.safetensors": FILE})
    with safe_open(f"{uri}/x.safetensors", "np") as opened:
        assert same(opened.get_tensor("wide"), HELD["wide"].array)
        assert same(opened.get_slice("wide")[:, 1], np.ascontiguousarray(HELD["wide"].array[:, 1]))
    found = load_file(uri)
    assert found.keys() == HELD.keys()


def test_torch_files_whose_elements_lie_in_another_order(tmp_path):
    table = {"turned": torch.arange(600.0).reshape(20, 30).t(), "wide": torch.arange(8).expand(3, 8)}
    put(tmp_path, {"pytorch_model.bin": torchfiles.saved(table)})
    with safe_open(tmp_path / "pytorch_model.bin") as opened:
        for name, tensor in table.items():
            assert same(opened.get_tensor(name), tensor.contiguous())
            assert same(opened.get_slice(name)[1:3, ::2], tensor[1:3, ::2].contiguous())


# Opening and closing.


def test_nothing_can_be_read_when_it_is_closed(file):
    with safe_open(file) as opened:
        part = opened.get_slice("wide")
    for late in (opened.keys, opened.metadata, lambda: opened.get_tensor("wide"), lambda: "wide" in opened):
        with pytest.raises(UsageError, match="was closed"):
            late()
    with safe_open(file, "np", concurrency=2) as opened:
        gone = opened.get_slice("wide")
    del part, gone


def test_it_can_be_used_without_a_with_statement(file):
    opened = safe_open(file)
    assert opened.get_tensor("scalar").shape == ()
    opened.close()
    opened.close()


def test_tensors_and_slices_come_to_another_device(file):
    with safe_open(file, device="meta") as opened:
        for found in (opened.get_tensor("wide"), opened.get_slice("wide")[:], opened.get_tensors()["wide"]):
            assert (found.device.type, tuple(found.shape), found.dtype) == ("meta", SHAPE, torch.float32)
        assert opened.get_tensor("empty").device.type == "meta"


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 0)])
def test_tensors_and_slices_come_to_a_gpu(file, device):
    with safe_open(file, device=device) as opened:
        assert opened.get_tensor("empty").device == torch.device("cuda", 0)
        assert same(opened.get_tensor("wide").cpu().numpy(), HELD["wide"].array)
        assert same(opened.get_slice("wide")[1:3, [0, 2]].cpu().numpy(), HELD["wide"].array[1:3, [0, 2]])
        assert all(tensor.device == torch.device("cuda", 0) for tensor in opened.get_tensors().values())
    assert all(tensor.device == torch.device("cuda", 0) for tensor in load_file(file, device).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"framework": "tf"}, "framework='tf' is not offered; write pt"),
        ({"framework": None}, "framework=None is not offered"),
        ({"framework": ["pt"]}, "is not offered"),
        ({"framework": "np", "device": "cuda:0"}, "numpy arrays are in this machine's memory"),
        ({"device": "abacus"}, "'abacus' is not a device"),
        ({"device": 99}, "cuda:99"),
        ({"concurrency": 0}, "--concurrency 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(file, options, message):
    with pytest.raises(UsageError, match=message):
        safe_open(file, **options)


def test_what_is_not_there_is_named(file, tmp_path):
    with safe_open(file) as opened:
        for take in (opened.get_tensor, opened.get_slice):
            with pytest.raises(NotFound, match="has no tensor 'narrow'"):
                take("narrow")
    with pytest.raises(NotFound, match="gone"):
        safe_open(tmp_path / "gone.safetensors")
    put(tmp_path, {"short.safetensors": FILE[:-1]})
    with pytest.raises(FormatError, match="ends too early"):
        safe_open(tmp_path / "short.safetensors")


def test_a_failed_read_leaves_no_thread_at_work(tmp_path, big):
    """The memory of a tensor that could not be read whole is not written to any more."""
    files, _ = big
    uri = damaged(files, 0, tmp_path)
    with safe_open(uri, "pt", concurrency=4) as opened, pytest.raises(ChecksumMismatch):
        opened.get_tensor(EMBEDDING)
