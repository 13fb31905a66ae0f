"""What ``for=sglang`` writes is what SGLang reads: keys, values and texts, and nothing that it trips over.

``tests/engine/test_sglang_redis.py`` lets SGLang's own code read it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardtool
from shardtool import header
from shardtool.dtypes import DType
from shardtool.errors import FormatError, PlanError, UsageError
from shardtool.header import Entry
from shardtool.stores.redis.records import CHUNK, UNIT
from shardtool.stores.redis.store import RedisStore
from shardtool.stores.redis.values import LARGEST, check_values, prefix, rank_of
from shardtool.testing import write
from tests.builders import Raw, config, contents, model, parsed, put, rank_tensors, safetensors, shapes, tensors
from tests.servers.redis import RedisServer

FILE = "model-rank-3-part-0.safetensors"

# What SafeSerializer of SGLang 0.5.23 makes of these.
SERIALIZED = {
    ("BF16", (2, 3), b"\x80?\x00@@@\x80@\xa0@\xc0@"): (
        b'H\x00\x00\x00\x00\x00\x00\x00{"tensor_bytes":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}   '
        b"\x80?\x00@@@\x80@\xa0@\xc0@"
    ),
    ("F32", (), b"\x00\x00\x00?"): (
        b'@\x00\x00\x00\x00\x00\x00\x00{"tensor_bytes":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}\x00\x00\x00?'
    ),
    ("I8", (0, 4), b""): (
        b'H\x00\x00\x00\x00\x00\x00\x00{"tensor_bytes":{"dtype":"I8","shape":[0,4],"data_offsets":[0,0]}}      '
    ),
    ("F8_E4M3", (2,), b"8@"): (
        b'H\x00\x00\x00\x00\x00\x00\x00{"tensor_bytes":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}   8@'
    ),
}


def octets(data: bytes) -> Raw:
    """A tensor of bytes."""
    return Raw("U8", np.frombuffer(data, np.uint8))


@pytest.fixture
def store(redis_server: RedisServer, redis_name: str) -> Iterator[RedisStore]:
    with RedisStore(f"{redis_server.address(redis_name)}?for=sglang") as store:
        yield store


def test_values_are_what_its_serializer_makes(store: RedisStore, redis_server: RedisServer, redis_name: str) -> None:
    items = {"BF16": "<u2", "F32": "<u4", "I8": "u1", "F8_E4M3": "u1"}
    held = {
        f"t{n}": Raw(dtype, np.frombuffer(data, items[dtype]).reshape(shape))
        for n, (dtype, shape, data) in enumerate(SERIALIZED)
    }
    store.put(FILE, safetensors(held))
    for name, value in zip(held, SERIALIZED.values(), strict=True):
        assert redis_server.client.get(f"{redis_name}/keys/rank_3/{name}") == value
    assert store.get(FILE, limit=10_000) == safetensors(held)


@pytest.mark.parametrize("dtype", [dtype for dtype in DType if dtype.torch_name])
def test_values_are_what_safetensors_makes(dtype: DType) -> None:
    import torch
    from safetensors.torch import save

    made = torch.zeros((2, 16), dtype=torch.uint8).view(getattr(torch, dtype.torch_name or ""))
    shape = (2, 32) if dtype is DType.F4 else tuple(made.shape)
    data = save({"tensor_bytes": made})
    assert data[: -made.nbytes] == prefix(Entry("t", dtype, shape, 0, made.nbytes))


@pytest.mark.parametrize("step", [1, 7, 1000, UNIT, UNIT + 1])
def test_a_file_is_taken_apart_however_it_is_cut(
    store: RedisStore, redis_server: RedisServer, redis_name: str, step: int
) -> None:
    """Tensors that fit into a slice, that span several, and empty ones at both ends."""
    chance = random.Random(1)
    large = step >= UNIT
    sizes = [0, 3, 5, 0, 2 * UNIT + 11 if large else 300, 1, CHUNK if large else 40, 0]
    held = {f"layer.{n}": octets(chance.randbytes(size)) for n, size in enumerate(sizes)}
    data = safetensors(held)
    write(store, FILE, data, slice_size=step)
    names = {key.decode() for key in redis_server.client.scan_iter(f"{redis_name}/keys/rank_3/*", 1000)}
    assert names == {f"{redis_name}/keys/rank_3/{name}" for name in held}
    for name, raw in held.items():
        value = redis_server.client.get(f"{redis_name}/keys/rank_3/{name}")
        assert parsed(value) == {"tensor_bytes": raw}
    assert store.get(FILE, limit=len(data)) == data
    for _ in range(20):
        start, end = sorted(chance.randrange(len(data)) for _ in range(2))
        room = bytearray(end - start)
        store.readinto(FILE, start, memoryview(room))
        assert room == data[start:end]


def test_nothing_is_seen_before_the_commit(store: RedisStore, redis_server: RedisServer, redis_name: str) -> None:
    """Neither by us nor by SGLang; what was aborted never was."""
    data = safetensors({"a": octets(bytes(2 * UNIT))})
    writer = store.create(FILE, len(data))
    writer.write(0, data[:UNIT])
    writer.write(UNIT, data[UNIT:])
    assert [key for key in redis_server.keys(redis_name) if "/keys/" in key] == []
    writer.abort()
    assert redis_server.keys(redis_name) == []


def test_a_replaced_file_leaves_none_of_its_tensors(
    store: RedisStore, redis_server: RedisServer, redis_name: str
) -> None:
    """SGLang would load what is left, and stumble over a name that its model does not have."""
    store.put(FILE, safetensors({"a": octets(b"abc"), "b": octets(b"x")}))
    store.put(FILE, safetensors({"b": octets(b"yz"), "c": octets(b"")}))
    found = [key for key in redis_server.keys(redis_name) if "/keys/" in key]
    assert found == [f"{redis_name}/keys/rank_3/{name}" for name in "bc"]
    with RedisStore(store.uri) as plain:  # without for=sglang
        write(plain, FILE, safetensors({"b": octets(b"12")}))
        assert [key for key in redis_server.keys(redis_name) if "/keys/" in key] == []
        plain.delete(FILE)
    store.put(FILE, safetensors({"b": octets(b"yz")}))
    store.delete(FILE)
    assert redis_server.keys(redis_name) == []


def test_values_of_another_writer_are_not_mixed_with_ours(
    store: RedisStore, redis_server: RedisServer, redis_name: str
) -> None:
    data = safetensors({"a": octets(b"abc")})
    store.put("model-rank-3-part-1.safetensors", data)
    redis_server.client.set(f"{redis_name}/keys/rank_3/strange", b"x")
    with pytest.raises(PlanError, match=r"values of rank 3 that shardtool did not write, such as .*/strange"):
        store.put(FILE, data)
    store.put("model-rank-30-part-0.safetensors", data)


@pytest.mark.parametrize(
    ("key", "data", "pulled"),
    [
        ("config.json", b'{"a": "\xc3\xa4"}', True),
        ("tokenizer.json", "ä€".encode() * (3 * UNIT // 5), True),
        ("merges.txt", b"a b\n", True),
        ("tokenizer.model", b"\x00\xff", False),
        ("cut.txt", "ä".encode()[:1], False),
        ("large.bin", b"x" * (UNIT + 5) + b"\xff" + b"x" * UNIT, False),
        ("templates/a.jinja", b"x", False),
        ("shardtool.json", b"{}", False),
        (".shardtool/job.json", b"{}", False),
        ("empty.txt", b"", False),
    ],
)
def test_texts_are_pulled_and_nothing_else(
    store: RedisStore, redis_server: RedisServer, redis_name: str, key: str, data: bytes, pulled: bool
) -> None:
    """SGLang decodes what it pulls, and takes the first folder that it meets for the place of all that follow."""
    write(store, key, data, slice_size=UNIT)
    value = redis_server.client.get(f"{redis_name}/files/{key}")
    assert value == (data if pulled else None)
    assert store.get(key, limit=len(data)) == data
    store.put(key, b"new")
    assert store.get(key, limit=3) == b"new"
    store.delete(key)
    assert redis_server.keys(redis_name) == []


@pytest.mark.parametrize(
    ("key", "rank"),
    [
        ("model-rank-0-part-0.safetensors", 0),
        ("model-rank-12-part-3.safetensors", 12),
        ("rank-1-part-0.safetensors", 1),
        ("model-00001-of-00002.safetensors", None),
        ("model.safetensors", None),
        ("frank-1-part-0.safetensors", None),
        ("model-rank-0-part-0.safetensors.json", None),
    ],
)
def test_the_name_tells_the_rank(key: str, rank: int | None) -> None:
    assert rank_of(key) == rank


def test_a_file_of_no_rank_is_refused(store: RedisStore, tmp_path: Path) -> None:
    """Before anything is written."""
    data = safetensors({"a": octets(b"abc")})
    with pytest.raises(UsageError, match=r"not a rank's file: for=sglang takes names such as model-rank-0-part-0"):
        store.create("model.safetensors", len(data))
    source = put(tmp_path / "llama", model(config(), tensors(config())))
    shardtool.save(source, tmp_path / "tp2", tp=2)
    with pytest.raises(UsageError, match="not a rank's file"):
        shardtool.merge(tmp_path / "tp2", f"{store.uri}?for=sglang")
    assert list(store.list()) == []


def test_a_value_that_is_too_large_is_refused_before_anything_is_sent(store: RedisStore, tmp_path: Path) -> None:
    """512 MiB with what is before the tensor; no byte less."""
    most = LARGEST - len(prefix(Entry("a", DType.U8, (LARGEST,), 0, LARGEST)))
    check_values([Entry("a", DType.U8, (most,), 0, most)], "here")
    with pytest.raises(
        PlanError, match=r"tensor 'a' of here makes a value of 536870913 bytes, but Redis takes 536870912"
    ):
        check_values([Entry("a", DType.U8, (most + 1,), 0, most + 1)], "here")
    first = header.encode([("x", DType.U8, (10,)), ("large", DType.BF16, (1 << 14, 1 << 15))])
    size = len(first) + 10 + (1 << 30)
    with pytest.raises(PlanError, match=r"tensor 'large' .* use more ranks"):
        store.admit(FILE, size, first)
    writer = store.create(FILE, size)
    with pytest.raises(PlanError, match="tensor 'large'"):
        writer.write(0, first + bytes(UNIT))
    writer.abort()
    assert list(store.unfinished()) == []
    with RedisStore(store.uri) as plain:
        plain.admit(FILE, size, first)


def test_a_job_with_such_a_value_writes_nothing(store: RedisStore, tmp_path: Path) -> None:
    made = config(vocab_size=(1 << 20) + 64, hidden_size=256, num_hidden_layers=1)
    source = tmp_path / "llama"
    _sparse(source, made)
    with pytest.raises(PlanError, match=r"makes a value of .* use more ranks"):
        shardtool.save(source, f"{store.uri}?for=sglang", tp=1)
    assert list(store.list()) == []


def _sparse(folder: Path, made: dict[str, Any]) -> None:
    """A model of holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(made))
    first = header.encode([(name, DType.BF16, shape) for name, shape in shapes(made).items()])
    with (folder / "model.safetensors").open("wb") as file:
        file.write(first)
        file.truncate(len(first) + sum(2 * math.prod(shape) for shape in shapes(made).values()))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("redis://host/name?for=sglang&db=1", "database 0"),
        ("redis://host/na*me?for=sglang", "patterns"),
        ("redis://host/[name]?for=sglang", "patterns"),
    ],
)
def test_a_place_where_it_would_not_look_is_refused(address: str, message: str) -> None:
    with RedisStore(address) as store:
        for call in (lambda: store.create("config.json", 5), lambda: store.admit(FILE, 100, b"")):
            with pytest.raises(UsageError, match=message):
                call()


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 100, (50).to_bytes(8, "little") + b"{" * 50])
def test_a_file_that_is_none_is_refused(store: RedisStore, data: bytes) -> None:
    with pytest.raises(FormatError, match=FILE):
        store.put(FILE, data)
    assert list(store.list()) == []
    assert list(store.unfinished()) == []


def test_a_header_that_the_server_lost_is_missed(store: RedisStore, redis_server: RedisServer, redis_name: str) -> None:
    store.put(FILE, safetensors({"a": octets(b"abc")}))
    (victim,) = (key for key in redis_server.keys(redis_name) if "/chunks/" in key)
    redis_server.client.delete(victim)
    with RedisStore(store.uri) as other:
        with pytest.raises(FormatError, match=FILE):
            other.get(FILE, limit=1000)
        other.delete(FILE)
        assert list(other.list()) == []


def test_shards_that_sglang_reads_are_shards(store: RedisStore, redis_server: RedisServer, tmp_path: Path) -> None:
    """Every rank's tensors as SGLang's table cuts them, under its names, the config beside them."""
    made = config(num_hidden_layers=1)
    source = put(tmp_path / "llama", model(made, tensors(made)))
    shardtool.save(source, f"{store.uri}?for=sglang", tp=2, layout="sglang")
    shardtool.save(source, tmp_path / "tp2", tp=2, layout="sglang")
    name = store.uri.partition("://")[2].partition("/")[2]
    for rank in (0, 1):
        begins = f"{name}/keys/rank_{rank}/"
        values = {
            key.decode().removeprefix(begins): redis_server.client.get(key)
            for key in redis_server.client.scan_iter(f"{begins}*", 1000)
        }
        wanted = rank_tensors(contents(tmp_path / "tp2"), rank)
        assert {key: rank_tensors({FILE: value}, 3)["tensor_bytes"] for key, value in values.items()} == wanted
    assert redis_server.client.get(f"{name}/files/config.json") == (tmp_path / "tp2" / "config.json").read_bytes()
