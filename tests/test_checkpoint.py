"""Opening: of what kind a folder is, which files and tensors count, and that nothing but headers is read for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import shardtool
from shardtool import digest, stores
from shardtool.checkpoint import Checkpoint, logical, open_checkpoint, read_header, single_file, targets, with_headers
from shardtool.dtypes import DType
from shardtool.errors import ChecksumMismatch, FormatError, Incomplete, NotFound, ShardtoolError, UsageError
from shardtool.plan import Stored
from shardtool.sinks.tensor import octets
from shardtool.stores import open_store
from tests.builders import (
    COUNTING,
    Files,
    Raw,
    config,
    contents,
    counted,
    engine_saved,
    model,
    places,
    put,
    random,
    rank_tensors,
    safetensors,
    tensors,
)
from tests.oracle import expected
from tests.servers.web import signed

CONFIG = config(num_hidden_layers=1)
HELD = tensors(CONFIG)
FILES = model(CONFIG, HELD, files=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path / "model", FILES)
    return tmp_path / "model"


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    shardtool.save(folder, tmp_path / "out", tp=2, max_part_size=10_000)
    return tmp_path / "out"


def bytes_of(place: Checkpoint, stored: Stored) -> bytes:
    data = bytearray(stored.nbytes)
    place.store.readinto(stored.key, stored.offset, memoryview(data))
    return bytes(data)


def test_a_hugging_face_checkpoint_has_files_without_ranks(folder: Path):
    found = open_checkpoint(folder)
    assert (found.kind, found.ranks, found.manifest) == ("huggingface", (), None)
    assert [(file.key, file.rank) for file in found.files] == [
        ("model-00001-of-00002.safetensors", None),
        ("model-00002-of-00002.safetensors", None),
    ]
    catalog = found.catalog()
    assert catalog.keys() == HELD.keys()
    for name, raw in HELD.items():
        stored = catalog[name].stored
        assert stored is not None
        assert (stored.dtype.name, stored.shape) == (raw.dtype, raw.array.shape)
        assert bytes_of(found, stored) == raw.array.tobytes()


def test_a_sharded_checkpoint_has_a_manifest_and_headers_on_demand(shards: Path):
    found = open_checkpoint(shards)
    assert found.kind == "sharded"
    assert found.manifest is not None
    assert found.files == ()
    whole = with_headers(found)
    assert whole.ranks == (0, 1)
    assert [file.key for file in whole.files] == [record.key for record in found.manifest.files]
    assert {file.rank for file in with_headers(found, [1]).files} == {1}
    for rank in (0, 1):
        held = whole.held(rank)
        for name, raw in rank_tensors(contents(shards), rank).items():
            assert bytes_of(whole, held[name]) == raw.array.tobytes()


def test_opening_reads_headers_and_no_tensor(monkeypatch: pytest.MonkeyPatch):
    made = config(hidden_size=512, vocab_size=2000)
    files = model(made, tensors(made), files=2)
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    with places() as place:
        uri = put(place("model"), files).replace("memory", "counted")
        open_checkpoint(uri)
        read = counted(uri).bytes_read
    assert read < sum(map(len, files.values())) / 10


def test_a_header_longer_than_the_first_read_is_read_on():
    held = {
        f"a-tensor-with-quite-a-long-name-{i:05d}": Raw("U8", random((1,), "F32").array.view("u1")[:1])
        for i in range(2000)
    }
    data = safetensors(held)
    assert int.from_bytes(data[:8], "little") > 64 << 10
    with places() as place:
        store = open_store(put(place("model"), {"a.safetensors": data}))
        found = read_header(store, "a.safetensors", len(data))
    assert {entry.name for entry in found.entries} == held.keys()


@pytest.mark.parametrize("address", [lambda p: str(p), lambda p: p, lambda p: f"file://{p}"])
def test_a_single_file_is_a_checkpoint(folder: Path, address: Any):
    path = folder / "model-00001-of-00002.safetensors"
    found = open_checkpoint(address(path))
    assert [file.key for file in found.files] == [path.name]
    assert found.kind == "huggingface"


def test_a_single_file_of_the_current_folder_is_a_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert open_checkpoint("model-00002-of-00002.safetensors").entries()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://host/a/x.safetensors", ("https://host/a", "x.safetensors")),
        ("https://host/a/x.safetensors?sig=a/b.c&n=1", ("https://host/a?sig=a/b.c&n=1", "x.safetensors")),
        ("HTTP://host:80/x.bin?s=?", ("HTTP://host:80?s=?", "x.bin")),
        ("https://host/a%2Fb/my%20x.safetensors?s", ("https://host/a%2Fb?s", "my x.safetensors")),
        ("https://host/a?file=x.safetensors", None),  # the path decides
        ("https://host/a?next=https://host/x.safetensors", None),
        ("https://host/x.safetensors/?s", None),
        ("https://host.bin", None),
        ("https://host.bin?s=/x.bin", None),
        ("https://host.bin?s=https://host/x.bin", None),
        ("s3://bucket/x.safetensors", ("s3://bucket", "x.safetensors")),
        ("s3://bucket/what?.safetensors", ("s3://bucket", "what?.safetensors")),
        ("x?.bin", (".", "x?.bin")),
        ("/x.bin", ("/", "x.bin")),
        (Path("https://host/x.bin?s"), None),  # a path, whatever it looks like
    ],
)
def test_the_path_of_an_address_says_whether_it_is_of_one_file(address: Any, expected: tuple[str, str] | None):
    assert single_file(address) == expected


@pytest.mark.parametrize("name", ["model.safetensors", "my%20model.safetensors"])
def test_a_signed_address_of_a_file_is_a_checkpoint(name: str):
    """The signature is of this file alone: config.json beside it is denied."""
    query = "X-Amz-Credential=me/2026/s3&X-Amz-Signature=5ec12e7"
    files = {f"folder/{unquote(name)}": safetensors(HELD)}
    with signed(files, query) as server:
        url = f"{server.url}/folder/{name}"
        found = shardtool.inspect(f"{url}?{query}")
        assert (found.uri, found.kind, found.architecture) == (url, "file", None)
        assert found.tensors == len(HELD)
        loaded = shardtool.load(f"{url}?{query}")
        assert {key: octets(tensor).numpy().tobytes() for key, tensor in loaded.items()} == {
            key: raw.array.tobytes() for key, raw in HELD.items()
        }
        with shardtool.safe_open(f"{url}?{query}", framework="np") as opened:
            assert set(opened.keys()) == set(HELD)
        assert shardtool.verify(f"{url}?{query}").ok


def test_a_signature_is_in_no_message():
    query = "X-Amz-Signature=5ec12e7"
    with signed({}, query) as server:
        for address in (f"{server.url}/x.safetensors?{query}", f"{server.url}/folder?x={query}&file=x.safetensors"):
            for operation in (shardtool.inspect, shardtool.load, shardtool.verify):
                with pytest.raises(ShardtoolError) as caught:
                    operation(address)
                assert "5ec12e7" not in str(caught.value)
                assert server.url in str(caught.value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_distributed_checkpoint_has_saved_is_told_from_nothing(tmp_path: Path):
    import torch
    from torch.distributed import checkpoint as dcp

    folder = tmp_path / "saved"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    put(folder, {"config.json": json.dumps(CONFIG).encode()})
    said = f"{folder} is a folder of torch.distributed.checkpoint, which wrote __0_0.distcp: make safetensors of it "
    for operation in (
        lambda: shardtool.inspect(folder),
        lambda: shardtool.verify(folder),
        lambda: shardtool.save(folder, tmp_path / "out", tp=2),
        lambda: shardtool.load(folder),
    ):
        with pytest.raises(UsageError) as caught:
            operation()
        assert str(caught.value).startswith(f"{said}with shardtool.integrations.dcp.whole_tensors")
    put(folder, FILES)  # weights that can be read count, whatever lies beside them
    assert open_checkpoint(folder).kind == "huggingface"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_it_is_told_to_do_with_such_a_folder_helps(tmp_path: Path):
    import torch
    from torch.distributed import checkpoint as dcp

    from shardtool.integrations.dcp import whole_tensors

    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    whole_tensors(tmp_path / "saved", tmp_path / "whole")
    assert shardtool.inspect(tmp_path / "whole").tensors == 1


def test_types_narrower_than_a_byte_are_taken_as_bytes():
    table = {"x": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}}
    text = json.dumps(table).encode()
    data = len(text).to_bytes(8, "little") + text + b"sixsix"
    with places() as place:
        found = open_checkpoint(put(place("model"), {"model.safetensors": data}))
        stored = found.catalog()["x"].stored
        assert stored == Stored("model.safetensors", DType.U8, (6,), 8 + len(text))


# Shards without a manifest.


def engine(parts: int = 2, **names: str) -> Files:
    files = engine_saved(CONFIG, expected(HELD, CONFIG, 4), parts=parts)
    for old, new in names.items():
        files = {key.replace(old, new): data for key, data in files.items()}
    return files


def test_rank_files_without_a_manifest_are_known_by_their_names(tmp_path: Path):
    put(tmp_path / "out", engine())
    found = open_checkpoint(tmp_path / "out")
    assert (found.kind, found.ranks) == ("shards", (0, 1, 2, 3))
    assert [(file.rank, file.part) for file in found.files] == [(r, p) for r in range(4) for p in range(2)]
    with pytest.raises(NotFound, match="has no rank 4; it has ranks 0 to 3"):
        found.held(4)


def test_the_engines_other_pattern_is_known_too(tmp_path: Path):
    put(tmp_path / "out", {k.replace("model-rank-", "model-pp-0-tp-"): v for k, v in engine().items()})
    assert open_checkpoint(tmp_path / "out").ranks == (0, 1, 2, 3)


def test_a_pattern_that_names_nothing_is_said(tmp_path: Path):
    put(tmp_path / "out", engine())
    with pytest.raises(NotFound, match=r"has no file that --pattern 'x-\{rank\}.safetensors' names"):
        open_checkpoint(tmp_path / "out", shard_pattern="x-{rank}.safetensors")


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path):
    files = engine()
    files["model-rank-0-part-7.safetensors"] = safetensors({"model.norm.weight": random((32,), "BF16")})
    put(tmp_path / "out", files)
    with pytest.raises(
        FormatError, match=r"'model\.norm\.weight' is in model-rank-0-part-\d\.\w+ and in model-rank-0-part-7"
    ):
        open_checkpoint(tmp_path / "out").held(0)


# The recipe, read backwards.


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_shards_are_a_catalogue_of_the_source(folder: Path, tmp_path: Path, tp: int):
    """Every logical tensor is a mosaic of stored bytes that gives the source's elements."""
    import numpy as np

    shardtool.save(folder, tmp_path / "out", tp=tp)
    found = with_headers(open_checkpoint(tmp_path / "out"))
    assert found.manifest is not None
    catalog = logical(found, found.manifest)
    assert catalog.keys() == HELD.keys()
    for name, raw in HELD.items():
        out = np.zeros(raw.array.size, raw.array.dtype)
        for piece in catalog[name].pieces():
            assert isinstance(piece.source, Stored)
            data = np.frombuffer(bytes_of(found, piece.source), raw.array.dtype)
            dst, src = (np.full(w.shape, w.offset) for w in (piece.dst, piece.src))
            for dim, (s, t) in enumerate(zip(piece.dst.strides, piece.src.strides, strict=True)):
                index = np.arange(piece.dst.shape[dim]).reshape([-1 if i == dim else 1 for i in range(dst.ndim)])
                dst, src = dst + index * s, src + index * t
            out[dst] = data[src]
        assert out.tobytes() == raw.array.tobytes(), name


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda held: held.pop("model.norm.weight"), Incomplete, "rank 1 has no tensor 'model.norm.weight'"),
        (
            lambda held: held.update(x=random((2,), "BF16")),
            FormatError,
            "rank 1 has the tensor 'x', which the recipe does not know",
        ),
        (
            lambda held: held.update({"model.norm.weight": random((16, 2), "BF16")}),
            FormatError,
            r"'model.norm.weight' of rank 1 is BF16 \[16, 2\] in .*, the recipe says BF16 \[32\]",
        ),
        (
            lambda held: held.update({"model.norm.weight": random((32,), "F16")}),
            FormatError,
            r"is F16 \[32\] in .*, the recipe says BF16 \[32\]",
        ),
    ],
)
def test_files_that_do_not_fit_the_recipe_are_refused(folder: Path, tmp_path: Path, change: Any, kind: Any, said: str):
    shardtool.save(folder, tmp_path / "out", tp=2)
    held = rank_tensors(contents(tmp_path / "out"), 1)
    change(held)
    data = safetensors(held)
    put(tmp_path / "out", {"model-rank-1-part-0.safetensors": data})
    found = open_checkpoint(tmp_path / "out")
    assert found.manifest is not None
    with pytest.raises(ChecksumMismatch, match=r"rank-1-part-0\.safetensors: its header differs from its digest"):
        with_headers(found)
    own = digest.of_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    files = tuple(replace(file, header=own) if file.rank == 1 else file for file in found.manifest.files)
    found = with_headers(replace(found, manifest=replace(found.manifest, files=files)))
    assert found.manifest is not None
    assert len(targets(found, found.manifest, 0)) == len(rank_tensors(contents(tmp_path / "out"), 0))
    with pytest.raises(kind, match=said):
        targets(found, found.manifest, 1)


# What is not (yet) a checkpoint.


def test_a_missing_shard_is_named(shards: Path):
    (shards / "model-rank-1-part-1.safetensors").unlink()
    found = open_checkpoint(shards)
    with pytest.raises(Incomplete, match=r"model-rank-1-part-1\.safetensors is missing; the manifest lists it"):
        with_headers(found)
    assert with_headers(found, [0]).ranks == (0,)


def test_an_unfinished_checkpoint_is_refused(folder: Path, tmp_path: Path):
    shardtool.save(folder, tmp_path / "out", tp=2, ranks=[1])
    with pytest.raises(Incomplete, match="is being written or was interrupted: run the same command again"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("key", ["../model/config.json", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_point_outside(shards: Path, key: str):
    from tests.test_manifest import signed

    table = json.loads((shards / "shardtool.json").read_bytes())
    table["files"][0]["key"] = key
    (shards / "shardtool.json").write_bytes(signed(table))
    with pytest.raises(FormatError, match="is not a name inside the checkpoint"):
        open_checkpoint(shards)


def test_a_damaged_manifest_is_not_mistaken_for_none(shards: Path):
    (shards / "shardtool.json").write_bytes(b"")
    with pytest.raises(FormatError, match=r"shardtool\.json is damaged"):
        open_checkpoint(shards)


def test_an_empty_folder_is_not_found(tmp_path: Path):
    with pytest.raises(NotFound, match="has no safetensors files"):
        open_checkpoint(tmp_path)


def test_an_unknown_address_is_refused():
    with pytest.raises(UsageError, match="nosuch://"):
        open_checkpoint("nosuch://host/model")
