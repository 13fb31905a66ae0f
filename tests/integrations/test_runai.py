"""Code written for Run:ai Model Streamer runs on shardtool: the same calls, the same tensors, the same errors."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardtool
from shardtool import budget
from shardtool.errors import (
    AccessDenied,
    ChecksumMismatch,
    FormatError,
    NotFound,
    ShardtoolError,
    StoreError,
    UsageError,
)
from shardtool.integrations import runai, runai_streams
from shardtool.integrations.runai import (
    DistributedStreamer,
    FileChunks,
    FileStreamer,
    ObjectStorageModel,
    S3Credentials,
    SafetensorsStreamer,
    list_safetensors,
    pull_files,
)
from shardtool.ops import files as ops_files
from shardtool.ops.files import copying
from tests.builders import Raw, config, contents, flipped, model, places, put, random, safetensors, tensors
from tests.servers import S3Server

A = {"x": random((4, 3), "F32"), "y": random((5,), "BF16", 1), "e": random((0, 3), "F32")}
B = {"x": random((2, 2), "F32", 2), "z": random((7,), "F16", 3)}
SHARD = "model-rank-0-part-0.safetensors"


@pytest.fixture(autouse=True)
def no_thread_stays_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield

    def left() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("shardtool")} - before

    if left():
        gc.collect()
    assert not left()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    put(tmp_path, {"a.safetensors": safetensors(A), "more/b.safetensors": safetensors(B)})
    return [f"{tmp_path}/a.safetensors", f"{tmp_path}/more/b.safetensors"]


def streamed(paths: list[str], *args: Any, **options: Any) -> list[tuple[str, torch.Tensor]]:
    """Everything that a streamer hands out, kept as it is."""
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths, *args, **options)
        return list(streamer.get_tensors())


def equal(tensor: torch.Tensor, raw: Raw) -> bool:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
    octets = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return (tensor.dtype, tuple(tensor.shape), octets) == (kinds[raw.dtype], raw.array.shape, raw.array.tobytes())


# Streaming.


def test_every_tensor_of_every_file_comes_once(files):
    found = streamed(files)
    assert sorted(name for name, _ in found) == sorted([*A, *B])
    for name, tensor in found:
        assert any(name in held and equal(tensor, held[name]) for held in (A, B))
        assert tensor.is_contiguous()


def test_one_file_is_streamed_by_its_path(files):
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(files[1], None, "cpu", False)
        found = dict(streamer.get_tensors())
    assert found.keys() == B.keys()
    assert all(equal(found[name], B[name]) for name in B)


@pytest.mark.parametrize("device", ["cpu", None, torch.device("cpu"), "cpu:0"])
@pytest.mark.parametrize("owned", [True, False])
def test_tensors_are_the_callers_whatever_is_asked(files, device, owned):
    """Kept without a copy while others are streamed; nothing that is written into one shows in another."""
    found = streamed(files, device=device, owned=owned)
    more = streamed(files, device=device, owned=owned)
    for _, tensor in more:
        tensor.fill_(0)
    held = [raw for held in (A, B) for raw in held.values()]
    assert all(any(equal(tensor, raw) for raw in held) for _, tensor in found)
    memory = [t.data_ptr() for _, t in (*found, *more) if t.numel()]
    assert len(set(memory)) == len(memory)


def test_what_will_come_is_known_before_it_comes(files):
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files, device="cpu", is_distributed=False)
        known = streamer.files_to_tensors_metadata
        assert streamer.device_str == "cpu"
        assert streamer.total_size == sum(raw.array.nbytes for raw in (*A.values(), *B.values()))
        assert sorted(known) == [0, 1]
        for number, held in enumerate((A, B)):
            assert [one.name for one in known[number]] == list(held)
            at = 0
            for one in known[number]:
                raw = held[one.name]
                assert one.shape == list(raw.array.shape)
                assert one.dtype == raw.dtype
                assert one.get_bytesize() == raw.array.nbytes == one.offsets.get_diff()
                assert one.get_item_count() == raw.array.size
                assert one.get_element_size() == raw.array.itemsize == one.get_torch_dtype().itemsize
                assert one.offsets.start == at
                at = one.offsets.end
        assert len(list(streamer.get_tensors())) == sum(map(len, known.values()))
        assert streamer.unaligned_copies == 0


def test_a_tensor_that_lies_where_its_type_cannot_be_read_is_handed_out_right(tmp_path):
    held = {
        "odd": Raw("U8", random((3,), "F32").array.astype("u1")),
        "x": random((6,), "F32"),
        "y": random((3,), "BF16"),
    }
    put(tmp_path, {"a.safetensors": safetensors(held)})
    found = dict(streamed([f"{tmp_path}/a.safetensors"]))
    assert all(equal(found[name], raw) for name, raw in held.items())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


def test_files_of_folders_and_buckets_are_streamed_together(files, bucket):
    put(f"s3://{bucket}/deep", {"b.safetensors": safetensors(B)})
    found = streamed([files[0], f"s3://{bucket}/deep/b.safetensors"])
    assert sorted(name for name, _ in found) == sorted([*A, *B])


def test_only_the_tensors_that_are_named_are_streamed(files):
    for names in ({"y", "z"}, ["z", "y"], frozenset({"y", "z"}), {"y": 1, "z": 2}.keys()):
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files, tensor_names=names)
            assert {k: [m.name for m in v] for k, v in streamer.files_to_tensors_metadata.items()} == {
                0: ["y"],
                1: ["z"],
            }
            assert sorted(name for name, _ in streamer.get_tensors()) == ["y", "z"]
            assert streamer.total_size == A["y"].array.nbytes + B["z"].array.nbytes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("x", "is a single str"),
        (set(), "is empty"),
        ({"y", "w"}, r"not found in the files: \['w'\]"),
        ({"y", "x"}, r"in more than one file: \['x'\]"),
    ],
)
def test_names_that_make_no_sense_are_refused(files, names, message):
    with SafetensorsStreamer() as streamer, pytest.raises(ValueError, match=message):
        streamer.stream_files(files, tensor_names=names)


def test_a_loop_that_is_left_can_be_gone_on_with(files):
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files)
        found = [name for _, (name, _) in zip(range(2), streamer.get_tensors(), strict=False)]
        found += [name for name, _ in streamer.get_tensors()]
        assert len(found) in (len(A) + len(B), len(A) + len(B) - 1)  # zip takes one more than it shows
        assert list(streamer.get_tensors()) == []


def test_a_streamer_can_be_left_early_and_used_again(files):
    streamer = SafetensorsStreamer()
    assert list(streamer.get_tensors()) == []
    with streamer:
        streamer.stream_files(files)
        next(streamer.get_tensors())
        streamer.stream_file(files[1])
        assert sorted(name for name, _ in streamer.get_tensors()) == sorted(B)
        streamer.stream_files(files)
        with contextlib.suppress(KeyError):
            for _ in streamer.get_tensors():
                raise KeyError
    with streamer:
        streamer.stream_file(files[0])
        assert sorted(name for name, _ in streamer.get_tensors()) == sorted(A)


def test_no_files_are_no_tensors():
    assert streamed([]) == []


def test_no_tensor_is_kept_by_the_streamer(files):
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files)
        found = streamer.get_tensors()
        for _ in range(len(A) + len(B)):
            tensor = next(found)[1]
            seen = weakref.ref(tensor)
            del tensor
            assert seen() is None


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=8), limit=st.sampled_from([None, "1"])
)
def test_any_file_comes_as_it_is(shapes, limit):
    held = {f"t{i}": random(shape, ("F32", "BF16", "F16")[i % 3], i) for i, shape in enumerate(shapes)}
    with places() as place, pytest.MonkeyPatch.context() as patch:
        if limit:
            patch.setenv("RUNAI_STREAMER_MEMORY_LIMIT", limit)
        uri = put(place("one"), {"a.safetensors": safetensors(held)})
        found = dict(streamed([f"{uri}/a.safetensors"]))
    assert found.keys() == held.keys()
    assert all(equal(found[name], raw) for name, raw in held.items())


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)])
def test_tensors_come_to_a_gpu(files, device):
    found = streamed([files[1]], device=device)
    assert all(tensor.device == torch.device("cuda", 0) for _, tensor in found)
    assert all(equal(tensor.cpu(), B[name]) for name, tensor in found)


# Digests.


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, bytes]:
    """The one shard of a tiny model, with its manifest."""
    made = config()
    shardtool.save(put(tmp_path / "source", model(made, tensors(made))), tmp_path / "saved", tp=1)
    return contents(tmp_path / "saved")


def test_files_of_a_shardtool_checkpoint_are_checked(tmp_path, saved):
    put(tmp_path / "here", saved)
    assert streamed([f"{tmp_path}/here/{SHARD}"])
    put(tmp_path / "here", {SHARD: flipped(saved[SHARD], -1)})
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(f"{tmp_path}/here/{SHARD}")
        with pytest.raises(ChecksumMismatch, match="differs from its digest") as caught:
            list(streamer.get_tensors())
    assert isinstance(caught.value, ValueError)


def test_a_broken_manifest_of_somebody_else_says_what_to_do(tmp_path):
    put(tmp_path, {"a.safetensors": safetensors(A), "shardtool.json": b"[1]"})
    with SafetensorsStreamer() as streamer, pytest.raises(ValueError, match="or remove it to read them unchecked"):
        streamer.stream_file(f"{tmp_path}/a.safetensors")
    (tmp_path / "shardtool.json").unlink()
    assert len(streamed([f"{tmp_path}/a.safetensors"])) == len(A)


# Errors.


def damaged(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(name: str, start: int, end: int, shape: str = "[4]", dtype: str = "U8") -> str:
    return f'"{name}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {end}]}}'


BAD = {
    "header size exceeds limit": damaged("{}", length=(100 << 20) + 1),
    "header is not valid JSON": damaged("{"),
    "Shape claims 40 bytes .* but offsets reserve 4 bytes": damaged("{%s}" % entry("a", 0, 4, "[10]", "F32"), bytes(4)),  # noqa: UP031
    "a tensor overlaps with next tensor": damaged("{%s, %s}" % (entry("a", 0, 4), entry("b", 2, 6)), bytes(6)),  # noqa: UP031
    "Unsupported dtype 'ALIEN'": damaged("{%s}" % entry("a", 0, 4, dtype="ALIEN"), bytes(4)),  # noqa: UP031
    "file is truncated": damaged("{%s}" % entry("a", 0, 4), bytes(3)),  # noqa: UP031
    "extra trailing bytes": damaged("{%s}" % entry("a", 0, 4), bytes(5)),  # noqa: UP031
    "gap before the start of a tensor": damaged("{%s}" % entry("a", 5, 9), bytes(9)),  # noqa: UP031
}


@pytest.mark.parametrize("words", BAD)
def test_a_damaged_file_is_a_value_error_that_says_so_in_both_projects_words(tmp_path, words):
    put(tmp_path, {"a.safetensors": BAD[words]})
    with SafetensorsStreamer() as streamer, pytest.raises(ValueError, match=words) as caught:
        streamer.stream_file(f"{tmp_path}/a.safetensors")
    assert isinstance(caught.value, FormatError)
    assert str(caught.value.__cause__) in str(caught.value)


def test_errors_can_go_to_other_processes(tmp_path):
    with SafetensorsStreamer() as streamer, pytest.raises(ValueError, match="does not exist") as caught:
        streamer.stream_file(f"{tmp_path}/gone.safetensors")
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, NotFound)
    assert isinstance(again, ValueError)
    assert str(again) == str(caught.value)
    assert again.exit_code == NotFound.exit_code


def test_a_file_that_shrinks_while_it_is_streamed_is_a_value_error(tmp_path):
    put(tmp_path, {"a.safetensors": safetensors({"x": random((300_000,), "F32")})})
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(f"{tmp_path}/a.safetensors")
        os.truncate(tmp_path / "a.safetensors", 1000)
        with pytest.raises(ValueError, match=r"a\.safetensors ends at byte 1000"):
            list(streamer.get_tensors())


def test_a_device_that_is_not_there_is_a_value_error(files):
    with SafetensorsStreamer() as streamer, pytest.raises(ValueError, match="abacus"):
        streamer.stream_files(files, device="abacus")


# What the environment says.


def test_a_memory_limit_that_nothing_fits_into_is_raised_to_the_least(files, monkeypatch, caplog):
    monkeypatch.setenv("RUNAI_STREAMER_MEMORY_LIMIT", "2048")
    with caplog.at_level(logging.WARNING):
        assert len(streamed(files)) == len(A) + len(B)
    assert "too small" in caplog.text


@pytest.mark.parametrize(
    ("variable", "text"), [("MEMORY_LIMIT", "lots"), ("CONCURRENCY", "0"), ("S3_UNSIGNED", "maybe")]
)
def test_a_variable_that_makes_no_sense_is_refused(files, monkeypatch, variable, text):
    monkeypatch.setenv(f"RUNAI_STREAMER_{variable}", text)
    paths = ["s3://bucket/a.safetensors"] if variable == "S3_UNSIGNED" else files
    with SafetensorsStreamer() as streamer, pytest.raises(ValueError, match=f"^RUNAI_STREAMER_{variable} "):
        streamer.stream_files(paths)


def test_the_time_it_took_is_logged(files, caplog):
    with caplog.at_level(logging.INFO, "shardtool"):
        streamed(files)
    assert [r.getMessage() for r in caplog.records if "2 files to cpu" in r.getMessage()]


# Credentials.


@pytest.fixture
def elsewhere(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with a file, of which the environment says nothing."""
    put(f"s3://{bucket}/models", {"a.safetensors": safetensors(A)})
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(variable)
    return f"s3://{bucket}/models"


@pytest.mark.parametrize("kind", [S3Credentials, SimpleNamespace])
def test_credentials_are_those_of_the_call(elsewhere, s3_server, kind):
    given_ = kind(
        access_key_id="test-key",
        secret_access_key="test-secret",
        session_token=None,
        region_name="us-east-1",
        endpoint=s3_server.endpoint,
    )
    assert list_safetensors(elsewhere, given_) == [f"{elsewhere}/a.safetensors"]
    assert len(streamed([f"{elsewhere}/a.safetensors"], given_)) == len(A)
    assert "test-secret" not in repr(given_) or kind is SimpleNamespace


def test_without_credentials_access_is_denied(elsewhere, s3_server, monkeypatch):
    monkeypatch.setenv("RUNAI_STREAMER_S3_ENDPOINT", s3_server.endpoint)
    with pytest.raises(ValueError, match="no credentials") as caught:
        list_safetensors(elsewhere)
    assert isinstance(caught.value, AccessDenied)


def test_a_public_bucket_is_read_as_nobody(elsewhere, s3_server, monkeypatch):
    client, bucket = s3_server.client, elsewhere.split("/")[2]
    client.put_object_acl(Bucket=bucket, Key="models/a.safetensors", ACL="public-read")
    monkeypatch.setenv("RUNAI_STREAMER_S3_ENDPOINT", s3_server.endpoint)
    monkeypatch.setenv("RUNAI_STREAMER_S3_UNSIGNED", "1")
    assert len(streamed([f"{elsewhere}/a.safetensors"])) == len(A)


# Lists and copies.

TREE = {
    "a.safetensors": b"a",
    "b.safetensors": b"",
    "config.json": b"{}",
    "tokenizer.model": b"t",
    "more/c.safetensors": b"ccc",
    "more/deep/d.json": b"d",
}


@pytest.fixture(params=["folder", "bucket", "memory"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The same files in a folder, a bucket and a store in memory."""
    if request.param == "folder":
        yield put(tmp_path / "tree", TREE)
    elif request.param == "bucket":
        yield put(f"s3://{request.getfixturevalue('bucket')}/models/llama", TREE)
    else:
        with places() as place:
            yield put(place("tree"), TREE)


@pytest.mark.parametrize("slash", ["", "/"])
def test_safetensors_files_right_in_a_folder_are_listed(tree, slash):
    assert sorted(list_safetensors(tree + slash)) == [f"{tree}/a.safetensors", f"{tree}/b.safetensors"]
    assert list_safetensors(f"{tree}/more{slash}") == (
        [] if tree.startswith("memory") else [f"{tree}/more/c.safetensors"]
    )


def test_a_folder_that_is_not_there_has_no_files(tmp_path, bucket):
    assert list_safetensors(f"{tmp_path}/none") == []
    assert list_safetensors(f"s3://{bucket}/none") == []
    with pytest.raises(ValueError, match="does not exist"):
        list_safetensors(f"file://{tmp_path}/none")
    with pytest.raises(ValueError, match="the bucket of"):
        list_safetensors(f"s3://{bucket}-none/x")


def test_a_folder_called_like_a_file_is_not_listed(tmp_path):
    put(tmp_path, {"x.safetensors/y": b"", ".hidden.safetensors": b"", "z.safetensors": b""})
    assert list_safetensors(str(tmp_path)) == [f"{tmp_path}/z.safetensors"]


@pytest.mark.parametrize(
    ("allow", "ignore", "wanted"),
    [
        (None, None, TREE.keys()),
        (["*.json"], None, {"config.json", "more/deep/d.json"}),
        (None, ["*.safetensors", "*.model"], {"config.json", "more/deep/d.json"}),
        (["*.json", "*.model"], ["more/*"], {"config.json", "tokenizer.model"}),
        (["config.json"], None, {"config.json"}),
        ([], None, set()),
        (None, [], TREE.keys()),
    ],
)
def test_a_copy_takes_what_the_patterns_say(tree, tmp_path, allow, ignore, wanted):
    pull_files(tree, str(tmp_path / "to"), allow, ignore)
    assert contents(tmp_path / "to") == {key: TREE[key] for key in wanted}


@pytest.mark.parametrize("given_", ["*.json", [1], 5])
def test_a_pattern_that_is_not_in_a_list_is_refused(tree, tmp_path, given_):
    """The letters of a text would be patterns, and ``*`` is one of them."""
    for patterns in ((given_, None), (None, given_)):
        with pytest.raises(ValueError, match=r"_pattern=.* is not a list of patterns"):
            pull_files(tree, str(tmp_path / "to"), *patterns)
        with pytest.raises(ValueError, match=r"_patterns=.* is not a list of patterns"):
            FileStreamer().list_files(tree, True, *patterns)
    assert not (tmp_path / "to").exists()


def test_a_folder_of_more_files_than_any_model_is_not_listed(tree, tmp_path, monkeypatch):
    assert len(FileStreamer().list_files(tree)) == len(TREE)
    monkeypatch.setattr(runai_streams, "MAX_OBJECTS", 3)
    for listing in (list_safetensors, FileStreamer().list_files, lambda uri: pull_files(uri, str(tmp_path / "to"))):
        with pytest.raises(ValueError, match="holds more than 3 files"):
            listing(tree)


def test_a_copy_keeps_within_the_memory_limit(tree, tmp_path, monkeypatch, caplog):
    seen: list[int] = []

    def noting(*args: Any) -> Any:
        seen.append((how := copying(*args)).threads * how.block)
        return how

    monkeypatch.setattr(ops_files, "copying", noting)
    monkeypatch.setenv("RUNAI_STREAMER_CONCURRENCY", "512")
    for limit, most in (("16MiB", 16 << 20), ("1000", 128 << 10)):
        monkeypatch.setenv("RUNAI_STREAMER_MEMORY_LIMIT", limit)
        pull_files(tree, str(tmp_path / "to"))
        assert 0 < seen[-1] < most
    assert "too small" in caplog.text
    assert contents(tmp_path / "to") == TREE


def test_patterns_are_matched_with_whole_keys_too(bucket, tmp_path):
    put(f"s3://{bucket}/models/llama", TREE)
    pull_files(f"s3://{bucket}/models/llama/", str(tmp_path / "to"), ["models/llama/co*"])
    assert contents(tmp_path / "to").keys() == {"config.json"}


def test_a_copy_replaces_what_is_there_and_keeps_the_rest(tmp_path):
    put(tmp_path / "from", {"a": b"new"})
    put(tmp_path / "to", {"a": b"older", "b": b"kept"})
    pull_files(str(tmp_path / "from"), str(tmp_path / "to"))
    assert contents(tmp_path / "to") == {"a": b"new", "b": b"kept"}


def test_a_copy_never_leaves_its_folder(bucket, s3_server, tmp_path):
    """Keys that lead elsewhere are no files of the folder."""
    for key in ("m/../../evil", "m//evil", "m/./evil", "m/a"):
        s3_server.client.put_object(Bucket=bucket, Key=key, Body=b"x")
    pull_files(f"s3://{bucket}/m", str(tmp_path / "in" / "to"))
    assert contents(tmp_path) == {"in/to/a": b"x"}


def test_what_cannot_be_copied_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        pull_files(str(tmp_path / "none"), str(tmp_path / "to"))
    with pytest.raises(ValueError, match="no store knows addresses like"):
        pull_files("nosuch://bucket/x", str(tmp_path / "to"))


# Models in a bucket.


@pytest.fixture
def stored(bucket: str) -> str:
    return put(f"s3://{bucket}/models/llama", TREE)


def test_a_model_is_copied_once(stored, tmp_path, s3_server):
    dst = tmp_path / "cache" / "llama"
    dst.parent.mkdir()
    with ObjectStorageModel(model_path=stored, dst=str(dst)) as first:
        assert first.dir == str(dst)
        first.pull_files(allow_pattern=["*.safetensors"])
        first.pull_files(ignore_pattern=["*.safetensors"])
        assert not (dst / ObjectStorageModel.SENTINEL_NAME).exists()
    assert contents(dst) == {**TREE, ".runai_complete": b""}
    s3_server.client.put_object(Bucket=stored.split("/")[2], Key="models/llama/config.json", Body=b"changed")
    with ObjectStorageModel(stored, f"{dst}/") as second:
        second.pull_files()
    assert contents(dst) == {**TREE, ".runai_complete": b""}
    assert (tmp_path / "cache" / "llama.lock").exists()


def test_what_an_interrupted_copy_left_is_removed(stored, tmp_path):
    put(tmp_path / "llama", {"half": b"x"})
    with contextlib.suppress(KeyError), ObjectStorageModel(stored, str(tmp_path / "llama")) as one:
        one.pull_files(["a*"])
        raise KeyError
    assert contents(tmp_path / "llama") == {"a.safetensors": b"a"}
    with ObjectStorageModel(stored, str(tmp_path / "llama")) as one:
        assert contents(tmp_path / "llama") == {}
        one.pull_files()
    assert "a.safetensors" in contents(tmp_path / "llama")


def test_a_copy_of_nothing_is_no_model(bucket, tmp_path):
    with (
        pytest.raises(RuntimeError, match="nothing was copied"),
        ObjectStorageModel(f"s3://{bucket}/none", str(tmp_path / "x")) as one,
    ):
        one.pull_files()
    assert not (tmp_path / "x" / ObjectStorageModel.SENTINEL_NAME).exists()


def test_only_addresses_of_object_storage_are_taken(tmp_path):
    with pytest.raises(ValueError, match="not in an object storage"):
        ObjectStorageModel(str(tmp_path), str(tmp_path / "x"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dst", ["/", ".", "..", "~"])
def test_a_folder_that_people_live_in_is_never_emptied(tmp_path, monkeypatch, dst):
    home = tmp_path / "home" / "me"
    home.mkdir(parents=True)
    put(home, {"precious": b"x"})
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match="is emptied before anything is copied") as caught:
        ObjectStorageModel("s3://bucket/x", os.path.expanduser(dst))
    assert isinstance(caught.value, UsageError)
    assert contents(home) == {"precious": b"x"}


ASK = """
import sys
from shardtool.integrations.runai import ObjectStorageModel
print("asks", flush=True)
with ObjectStorageModel(sys.argv[1], sys.argv[2]) as one:
    one.pull_files()
    print("waited" if one._skip else "copied", flush=True)
    sys.stdin.readline()
"""


def test_processes_that_ask_at_once_copy_once(stored, tmp_path):
    command = [sys.executable, "-c", ASK, stored, str(tmp_path / "llama")]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert [first.stdout.readline() for _ in range(2)] == ["asks\n", "copied\n"]
    # It has the lock until it is told to end; the others ask meanwhile.
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for job in others:
        assert job.stdout is not None
        assert job.stdout.readline() == "asks\n"
    assert not (tmp_path / "llama" / ObjectStorageModel.SENTINEL_NAME).exists()
    assert [job.communicate("end\n", timeout=120)[0] for job in (first, *others)] == ["", "waited\n", "waited\n"]
    assert contents(tmp_path / "llama") == {**TREE, ".runai_complete": b""}


# Ranges of bytes.


def chunks(streamer: FileStreamer | DistributedStreamer) -> dict[tuple[int, int], bytes]:
    return {(number, index): data.numpy().tobytes() for number, index, data in streamer.get_chunks()}


def test_ranges_of_files_come_as_bytes(tmp_path):
    put(tmp_path, {"a": bytes(range(100)), "b": b"", "c": b"Hello"})
    requests = [
        FileChunks(7, f"{tmp_path}/a", [50, 0, 40], [10, 5, 20]),
        FileChunks(8, f"{tmp_path}/b", [], []),
        FileChunks.contiguous(9, f"{tmp_path}/c", 1, [2, 0, 2]),
    ]
    whole = bytes(range(100))
    wanted = {(7, 0): whole[50:60], (7, 1): whole[:5], (7, 2): whole[40:60], (9, 0): b"el", (9, 1): b"", (9, 2): b"lo"}
    with FileStreamer() as streamer:
        for _ in range(2):
            streamer.stream_files(requests)
            assert all(data.shape == (1, len(wanted[n, i])) for n, i, data in streamer.get_chunks())
            streamer.stream_files(requests, None, None, 1 << 20, False)
            assert chunks(streamer) == wanted
    with DistributedStreamer() as together:
        together.stream_files(requests, None, "cpu", False)
        assert chunks(together) == wanted
    assert (requests[0].total_size(), requests[0].max_chunk_size()) == (35, 20)
    assert "ranges=3, bytes=35" in repr(requests[0])
    with pytest.raises(ValueError, match="do not fit"):
        FileChunks(1, "a", [1], [])


@pytest.mark.parametrize(("name", "message"), [("c", "ends at byte 5, before byte 9"), ("none", "does not exist")])
def test_a_range_that_is_not_there_is_a_value_error(tmp_path, name, message):
    put(tmp_path, {"c": b"Hello"})
    with FileStreamer() as streamer:
        streamer.stream_files([FileChunks.contiguous(1, f"{tmp_path}/{name}", 3, [6])])
        with pytest.raises(ValueError, match=message):
            list(streamer.get_chunks())
        assert list(FileStreamer().get_chunks()) == []


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [(0, 1 << 50, "ends at byte 5, before byte 1125899906842624"), (-1, 2, "negative"), (3, -1, "negative")],
)
@pytest.mark.parametrize("kind", [FileStreamer, DistributedStreamer])
def test_a_range_outside_its_file_is_refused_before_there_is_memory_for_it(
    tmp_path, monkeypatch, kind, offset, size, message
):
    put(tmp_path, {"c": b"Hello"})
    asked: list[int] = []
    anonymous = budget.anonymous

    def noting(nbytes: int) -> Any:
        asked.append(nbytes)
        return anonymous(min(nbytes, 1 << 20))

    monkeypatch.setattr(budget, "anonymous", noting)
    requests = [FileChunks(1, f"{tmp_path}/c", [0, offset], [1, size])]
    with kind() as streamer:
        streamer.stream_files(requests, None, "cpu", None if kind is FileStreamer else False)
        with pytest.raises(ValueError, match=message):
            list(streamer.get_chunks())
    assert sum(asked) <= 1  # the empty arena of a stream that needs none


def test_there_is_no_ring(tmp_path):
    put(tmp_path, {"c": b"Hello"})
    for streamer in (FileStreamer(), DistributedStreamer()):
        assert streamer.ring_info() is None
        requests = [FileChunks.contiguous(1, f"{tmp_path}/c", 0, [5])]
        streamer.stream_files(requests, None, "cpu", *([False] if isinstance(streamer, DistributedStreamer) else []))
        assert chunks(streamer) == {(1, 0): b"Hello"}
        assert streamer.ring_info() is None


def test_files_are_listed_with_their_sizes(tree):
    streamer = FileStreamer()
    assert dict(streamer.list_files(tree)) == {f"{tree}/{key}": len(data) for key, data in TREE.items()}
    assert dict(streamer.list_files(tree, is_recursive=False)).keys() == {
        f"{tree}/{key}" for key in TREE if "/" not in key
    }
    some = streamer.list_files(tree, allow_patterns=["*.json", "*.model"], ignore_patterns=["more/*"])
    assert [path for path, _ in some] == [f"{tree}/config.json", f"{tree}/tokenizer.model"]


def test_a_folder_that_is_not_there_cannot_be_listed(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        FileStreamer().list_files(str(tmp_path / "none"))


# Names.


def test_the_module_offers_what_the_other_one_does():
    """The names of ``runai_model_streamer`` 0.17."""
    other = {
        "SafetensorsStreamer",
        "ObjectStorageModel",
        "DistributedStreamer",
        "FileStreamer",
        "FileChunks",
        "list_safetensors",
        "pull_files",
    }
    assert other <= set(runai.__all__)
    assert all(getattr(runai, name).__doc__ for name in runai.__all__)


def test_errors_that_are_value_errors_already_stay_as_they_are():
    class Both(StoreError, ValueError):
        pass

    with pytest.raises(Both) as caught, runai_streams.value_errors():
        raise Both("x")
    assert type(caught.value) is Both
    assert isinstance(caught.value, ShardtoolError)
