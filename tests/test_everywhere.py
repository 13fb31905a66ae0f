"""Every command against every store, on servers that the tests start: the same bytes as in folders, at both ends.

``at`` is an address below which nothing lies, of each of the places in turn. What a server cannot do is said here.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

import shardtool
from shardtool.errors import ChecksumMismatch, Incomplete, NotFound, PlanError
from shardtool.stores import open_store
from tests.builders import config, contents, flipped, model, put, random, rank_tensors, tensors, unplaced, whole_tensors
from tests.oracle import expected
from tests.processes import At, run
from tests.servers.redis import PASSWORD, WRITER

CONFIG = config(hidden_size=64, vocab_size=3000)
HELD = {**tensors(CONFIG), "model.layers.0.self_attn.rotary_emb.inv_freq": random((2,), "F32")}
FILES = model(CONFIG, HELD, files=2, side={"templates/a.jinja": b"x", "tokenizer.model": b"\x00\xff\xfe"})
RANK_1 = "model-rank-1-part-0.safetensors"
LIMIT = "96MiB"

S3 = ("s3_server", "moto_tls", "moto_iam", "ministack", "ceph_server", "rclone")
AZURE = ("azure_server", "azure_tls_server")
GCS = ("gcs_standin", "gcs_emulator")
REDIS = ("redis", "redis-sglang", "redis-password", "redis-user", "redis-tls")
PLACES = ("folder", "memory", *S3, *AZURE, *GCS, *REDIS, "sftp")


def address(place: str, request: pytest.FixtureRequest, patch: pytest.MonkeyPatch, folder: Path) -> str:
    """Where nothing lies yet; its server is started, and the environment says how it is reached."""
    new = uuid.uuid4().hex
    if place in S3:
        return f"s3://{request.getfixturevalue(place).bucket(patch)}/models"
    if place in AZURE:
        return f"az://{request.getfixturevalue(place).container(patch)}/models"
    if place in GCS:
        return f"gs://{request.getfixturevalue(place).bucket(patch)}/models"
    if place in ("redis", "redis-sglang"):
        return str(request.getfixturevalue("redis_server").address(new))
    if place == "redis-tls":
        server = request.getfixturevalue("redis_server")
        patch.setenv("SSL_CERT_FILE", str(server.ca))
        return str(server.address(new, tls=True))
    if place.startswith("redis"):
        login = f"{WRITER[0]}:{WRITER[1]}" if place == "redis-user" else f":{PASSWORD}"
        return str(request.getfixturevalue("locked_redis").address(f"shared/{new}", login=f"{quoted(login)}@"))
    if place == "sftp":
        return str(request.getfixturevalue("sftp"))
    return f"memory://{new}" if place == "memory" else str(folder / "models")


def quoted(login: str) -> str:
    """A user and a password as addresses have them."""
    from urllib.parse import quote

    user, _, password = login.partition(":")
    return f"{user}:{quote(password, safe='')}"


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def at(place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    return address(place, request, monkeypatch, tmp_path)


@pytest.fixture
def shards(place: str) -> str:
    """What the address of shards ends with."""
    return "?for=sglang" if place == "redis-sglang" else ""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the same commands make in folders."""
    folder = tmp_path_factory.mktemp("folders")
    put(folder / "llama", FILES)
    shardtool.save(folder / "llama", folder / "tp4", tp=4, max_part_size="100KB")
    shardtool.reshard(folder / "tp4", folder / "tp2", tp=2, max_part_size="100KB")
    shardtool.merge(folder / "tp2", folder / "merged")
    shardtool.save(folder / "llama", folder / "small", tp=2, max_part_size=20_000)
    return folder


def test_there_and_back_again(at: str, shards: str, folders: Path, tmp_path: Path):
    """A source, shards of two sizes, whole tensors again: saved, verified, loaded, resharded, merged, inspected."""
    source = put(f"{at}/llama", FILES)
    shardtool.save(source, f"{at}/tp4{shards}", tp=4, max_part_size="100KB", memory_limit=LIMIT)
    assert unplaced(f"{at}/tp4{shards}") == unplaced(folders / "tp4")
    assert shardtool.verify(f"{at}/tp4{shards}").ok
    assert shardtool.verify(f"{at}/tp4{shards}", quick=True).ok
    assert shardtool.verify(f"{at}/tp4{shards}", against=source).ok
    assert shardtool.verify(folders / "tp4", against=f"{at}/tp4{shards}").ok
    wanted = expected(HELD, CONFIG, 4)
    for rank in (0, 3):
        found = shardtool.load(f"{at}/tp4{shards}", rank=rank, memory_limit=LIMIT)
        same = shardtool.load(folders / "tp4", rank=rank)
        assert found.keys() == wanted[rank].keys()
        assert all((found[name] == same[name]).all() for name in found)
    shardtool.reshard(f"{at}/tp4{shards}", f"{at}/tp2{shards}", tp=2, max_part_size="100KB", memory_limit=LIMIT)
    assert unplaced(f"{at}/tp2{shards}") == unplaced(folders / "tp2")
    shardtool.merge(f"{at}/tp2{shards}", f"{at}/merged", memory_limit=LIMIT)
    assert contents(f"{at}/merged") == contents(folders / "merged")
    assert whole_tensors(contents(f"{at}/merged")) == HELD
    assert [file.key for file in shardtool.inspect(f"{at}/tp2{shards}").files]
    shardtool.pull(f"{at}/tp2{shards}", tmp_path / "meta")
    pulled = contents(tmp_path / "meta")
    assert pulled["tokenizer.model"] == FILES["tokenizer.model"]
    assert not [key for key in pulled if key.endswith(".safetensors")]


@pytest.mark.parametrize("place", sorted({*PLACES} - {"memory"}), indirect=True)
def test_a_killed_run_is_taken_up_again(at: str, shards: str, folders: Path):
    """What it left is no checkpoint; the same command again ends where an undisturbed run does, and nothing is left."""
    options = {"tp": 2, "max_part_size": 20_000, "concurrency": 1}  # of several readers each may hold a file yet
    assert run("save", folders / "llama", f"{at}/tp2{shards}", **options, kill=At(progress=0.6)).killed
    with pytest.raises((Incomplete, NotFound)):
        shardtool.load(f"{at}/tp2{shards}", rank=0)
    again = shardtool.save(folders / "llama", f"{at}/tp2{shards}", tp=2, max_part_size=20_000)
    assert again.complete
    assert again.kept > 0
    assert unplaced(f"{at}/tp2{shards}") == unplaced(folders / "small")
    with open_store(f"{at}/tp2{shards}") as store:
        for left in list(store.unfinished()):
            store.discard(left)
        assert list(store.unfinished()) == []
    assert shardtool.verify(f"{at}/tp2{shards}").ok


def test_what_is_wrong_is_found(at: str, shards: str, folders: Path):
    """A flipped bit, half of a checkpoint, nothing at all, and the place of another job."""
    shardtool.save(folders / "llama", f"{at}/tp2", tp=2)
    put(f"{at}/tp2", {RANK_1: flipped(contents(f"{at}/tp2")[RANK_1], -1)})
    assert [check.key for check in shardtool.verify(f"{at}/tp2").files if not check.ok] == [RANK_1]
    with pytest.raises(ChecksumMismatch):
        shardtool.load(f"{at}/tp2", rank=1)
    with pytest.raises(NotFound):
        shardtool.verify(f"{at}/nothing")
    shardtool.save(folders / "llama", f"{at}/half{shards}", tp=2, ranks=[0])
    with pytest.raises(Incomplete):
        shardtool.load(f"{at}/half{shards}", rank=0)
    with pytest.raises(PlanError, match="unfinished output of another job"):
        shardtool.save(folders / "llama", f"{at}/half{shards}", tp=4)
    assert rank_tensors(contents(folders / "tp2"), 1) == expected(HELD, CONFIG, 2)[1]
