"""Every command between folders and Redis, with the same bytes at both ends, in our chunks and in SGLang's values."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import shardtool
from shardtool.errors import ChecksumMismatch, Incomplete, NotFound, PlanError
from shardtool.stores import open_store
from tests.builders import config, contents, flipped, model, put, random, rank_tensors, tensors
from tests.commands import apart, here
from tests.oracle import expected
from tests.processes import At, run
from tests.servers.redis import PASSWORD, RedisServer

CONFIG = config(hidden_size=64, vocab_size=3000)
HELD = {**tensors(CONFIG), "model.layers.0.self_attn.rotary_emb.inv_freq": random((2,), "F32")}
FILES = model(CONFIG, HELD, files=2, side={"templates/a.jinja": b"x", "tokenizer.model": b"\x00\xff\xfe"})
RANK_1 = "model-rank-1-part-0.safetensors"


@pytest.fixture
def at(redis_server: RedisServer, redis_name: str) -> str:
    return redis_server.address(redis_name)


@pytest.fixture(params=["", "?for=sglang"], ids=["ours", "sglang"])
def scheme(request: pytest.FixtureRequest) -> str:
    """What an address of shards ends with."""
    found: str = request.param
    return found


def test_a_shard_of_many_chunks(at: str, scheme: str, tmp_path: Path) -> None:
    made = config(num_hidden_layers=1, hidden_size=512, vocab_size=20_000)
    held = tensors(made)
    put(tmp_path / "model", model(made, held))
    shardtool.save(tmp_path / "model", f"{at}/tp1{scheme}", tp=1)
    found = contents(f"{at}/tp1")
    assert len(found["model-rank-0-part-0.safetensors"]) > 4 * (8 << 20)
    assert rank_tensors(found, 0) == expected(held, made, 1)[0]
    with open_store(f"{at}/tp1") as store:
        assert list(store.unfinished()) == []


def test_workers_share_a_job(at: str, scheme: str, tmp_path: Path) -> None:
    source = put(tmp_path / "llama", FILES)
    start = threading.Barrier(3)

    def work(ranks: list[int]) -> bool:
        start.wait()
        return shardtool.save(source, f"{at}/tp4{scheme}", tp=4, ranks=ranks, memory_limit="96MiB").complete

    with ThreadPoolExecutor(3) as pool:
        assert any(pool.map(work, [[0, 1], [2], [3, 1]]))
    shardtool.save(source, tmp_path / "tp4", tp=4)
    assert contents(f"{at}/tp4") == contents(tmp_path / "tp4")


def test_a_second_run_writes_nothing(at: str, scheme: str, tmp_path: Path) -> None:
    source = put(tmp_path / "llama", FILES)
    first = shardtool.save(source, f"{at}/tp2{scheme}", tp=2)
    second = shardtool.save(source, f"{at}/tp2{scheme}", tp=2)
    assert (second.written, second.kept, second.complete) == (0, first.written, True)
    with pytest.raises(PlanError, match="is not empty"):
        shardtool.save(source, f"{at}/tp2", tp=4)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_killed_run_is_taken_up_again(at: str, scheme: str, share: float, tmp_path: Path) -> None:
    """What it left is no checkpoint; the same command again ends where an undisturbed run does, and nothing is left."""
    source = put(tmp_path / "llama", FILES)
    options = {"tp": 2, "max_part_size": 20_000, "concurrency": 1}  # of several readers each may hold a file yet
    shardtool.save(source, tmp_path / "whole", tp=2, max_part_size=20_000)
    assert run("save", source, f"{at}/tp2{scheme}", **options, kill=At(progress=share)).status < 0
    with pytest.raises(Incomplete):
        shardtool.load(f"{at}/tp2", rank=0)
    again = shardtool.save(source, f"{at}/tp2{scheme}", tp=2, max_part_size=20_000)
    assert again.complete
    assert again.kept > 0
    assert contents(f"{at}/tp2") == contents(tmp_path / "whole")
    with open_store(f"{at}/tp2") as store:
        for left in list(store.unfinished()):
            store.discard(left)
        assert list(store.unfinished()) == []
    assert contents(f"{at}/tp2") == contents(tmp_path / "whole")


def test_what_is_wrong_is_found(at: str, tmp_path: Path) -> None:
    source = put(tmp_path / "llama", FILES)
    shardtool.save(source, f"{at}/tp2", tp=2)
    put(f"{at}/tp2", {RANK_1: flipped(contents(f"{at}/tp2")[RANK_1], -1)})
    assert [check.key for check in shardtool.verify(f"{at}/tp2").files if not check.ok] == [RANK_1]
    with pytest.raises(ChecksumMismatch):
        shardtool.load(f"{at}/tp2", rank=1)
    with pytest.raises(NotFound):
        shardtool.verify(f"{at}/nothing")
    shardtool.save(source, f"{at}/half", tp=2, ranks=[0])
    with pytest.raises(Incomplete):
        shardtool.load(f"{at}/half", rank=0)


def test_a_password_is_in_nothing_that_is_written_or_said(
    locked_redis: RedisServer, redis_name: str, tmp_path: Path
) -> None:
    """Neither in manifests nor in what a command says, right or wrong, on paper or to a program."""
    source = put(tmp_path / "llama", FILES)
    quoted = "pass%2Fword%401"
    address = locked_redis.address(redis_name, login=f":{quoted}@")
    wrong = locked_redis.address(redis_name, login=f":{quoted}no@")
    done = [
        here("save", source, "--tp", "2", "--output", address),
        here("verify", address),
        here("inspect", address, "--json"),
        apart("save", address, "--tp", "2", "--output", tmp_path / "out"),  # sharded already
        here("verify", f"{address}/nothing"),
        here("verify", wrong),
    ]
    assert [ended.code for ended in done] == [0, 0, 0, 2, 3, 5], [ended.err for ended in done]
    said = "".join(ended.out + ended.err for ended in done)
    written = b"".join(contents(address).values()).decode("latin-1")
    for secret in (PASSWORD, quoted):
        assert secret not in said
        assert secret not in written
