"""Every operation between folders and a bucket of a real S3 server, with the same bytes at both ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import shardtool
from shardtool.errors import ChecksumMismatch, Incomplete, NotFound, PlanError
from tests.builders import config, contents, flipped, model, put, random, rank_tensors, tensors, unplaced
from tests.oracle import expected
from tests.servers import S3Server

CONFIG = config(hidden_size=64, vocab_size=3000)
HELD = {**tensors(CONFIG), "model.layers.0.self_attn.rotary_emb.inv_freq": random((2,), "F32")}
FILES = model(CONFIG, HELD, files=2, side={"templates/a.jinja": b"x"})


@pytest.fixture
def at(bucket: str) -> str:
    return f"s3://{bucket}/models"


def test_parts_of_uploads_make_one_object(at: str, tmp_path: Path, s3_server: S3Server):
    """A shard larger than the part of an upload."""
    made = config(num_hidden_layers=1, hidden_size=512, vocab_size=20_000)
    held = tensors(made)
    put(tmp_path / "model", model(made, held))
    shardtool.save(tmp_path / "model", f"{at}/tp1", tp=1)
    key = "model-rank-0-part-0.safetensors"
    found = contents(f"{at}/tp1")
    assert len(found[key]) > 5 * (8 << 20) - (1 << 20)
    assert rank_tensors(found, 0) == expected(held, made, 1)[0]
    bucket = at.split("/")[2]
    assert not s3_server.client.list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_workers_share_a_job_in_a_bucket(at: str, tmp_path: Path):
    source = put(tmp_path / "llama", FILES)
    start = threading.Barrier(3)

    def work(ranks: list[int]) -> bool:
        start.wait()
        return shardtool.save(source, f"{at}/tp4", tp=4, ranks=ranks, memory_limit="64MiB").complete

    with ThreadPoolExecutor(3) as pool:
        assert any(pool.map(work, [[0, 1], [2], [3, 1]]))
    shardtool.save(source, tmp_path / "tp4", tp=4)
    assert unplaced(f"{at}/tp4") == unplaced(tmp_path / "tp4")


def test_a_second_run_in_a_bucket_writes_nothing(at: str, tmp_path: Path):
    source = put(tmp_path / "llama", FILES)
    first = shardtool.save(source, f"{at}/tp2", tp=2)
    second = shardtool.save(source, f"{at}/tp2", tp=2)
    assert (second.written, second.kept, second.complete) == (0, first.written, True)
    with pytest.raises(PlanError, match="is not empty"):
        shardtool.save(source, f"{at}/tp2", tp=4)


def test_what_is_wrong_in_a_bucket_is_found(at: str, tmp_path: Path):
    source = put(tmp_path / "llama", FILES)
    shardtool.save(source, f"{at}/tp2", tp=2)
    key = "model-rank-1-part-0.safetensors"
    put(f"{at}/tp2", {key: flipped(contents(f"{at}/tp2")[key], -1)})
    assert [check.key for check in shardtool.verify(f"{at}/tp2").files if not check.ok] == [key]
    with pytest.raises(ChecksumMismatch):
        shardtool.load(f"{at}/tp2", rank=1)
    with pytest.raises(NotFound):
        shardtool.verify(f"{at}/nothing")
    shardtool.save(source, f"{at}/half", tp=2, ranks=[0])
    with pytest.raises(Incomplete):
        shardtool.load(f"{at}/half", rank=0)


def test_names_that_an_engine_would_take_for_shards_are_refused_in_a_bucket(at: str, tmp_path: Path):
    """An engine matches ``*`` + pattern against whole keys there: rank 0 would find the files of rank 10 too."""
    made = config(num_attention_heads=16, vocab_size=1000)
    source = put(tmp_path / "model", model(made, tensors(made)))
    shardtool.save(source, tmp_path / "local", tp=16, pattern="{rank}-{part}.safetensors")
    with pytest.raises(PlanError, match="also matches 10-0"):
        shardtool.save(source, f"{at}/out", tp=16, pattern="{rank}-{part}.safetensors")
