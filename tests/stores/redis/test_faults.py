"""Connections to Redis that end or fall silent anywhere: right bytes or a clear error, soon, and nothing half-visible.

Each case has a seed, by which connections are cut after some bytes in one of the directions. A commit whose answer is
lost is a commit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shardtool
from shardtool import stores
from shardtool.errors import AlreadyExists, StoreError, Unavailable
from shardtool.stores.redis.records import UNIT
from shardtool.stores.redis.store import RedisStore
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.retry import Again
from shardtool.testing import write
from tests.builders import config, contents, model, put, tensors
from tests.servers import Cut, Pipe
from tests.servers.redis import RedisServer

AGAIN = Again(attempts=4, backoff=0.002)
PACE = Pace(connect=2.0, silence=0.2, floor=200)
LONGEST = 50.0
"""Seconds that a case may take: less than one wait at the usual pace."""


class Sea:
    """The way to a server: the first connections are cut as a seed says, or as ``cuts`` says, the others are not."""

    def __init__(self, seed: int, *, share: float = 0.7, most: int = 3 * UNIT) -> None:
        self.chance = random.Random(seed)
        self.share = share
        self.most = most
        self.fine = False

    def __call__(self, number: int) -> Cut | None:
        chance = self.chance
        if self.fine or chance.random() > self.share:
            return None
        after = int(2 ** chance.uniform(0, self.most.bit_length())) - 1
        silent = 0.5 if chance.random() < 0.1 else 0.0
        return Cut(after, up=chance.random() < 0.5, silent=silent, reset=chance.random() < 0.5)


@pytest.fixture
def pipe(redis_server: RedisServer) -> Iterator[Pipe]:
    with Pipe("127.0.0.1", redis_server.port) as pipe:
        yield pipe


def far(pipe: Pipe, name: str, scheme: str = "", pace: Pace = PACE) -> RedisStore:
    return RedisStore(f"redis://127.0.0.1:{pipe.port}/{name}{scheme}", again=AGAIN, pace=pace)


def trouble(call: Callable[[], object]) -> str:
    """What the call said of why it failed, or nothing."""
    try:
        call()
    except StoreError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(60))
def test_what_is_written_is_there_or_is_not(redis_server: RedisServer, redis_name: str, pipe: Pipe, seed: int) -> None:
    """A replacement succeeds and is whole, or fails and the old object is whole; what is left behind can be removed."""
    began = time.monotonic()
    chance = random.Random(seed)
    size = chance.choice([10, UNIT // 2, UNIT + 1, 3 * UNIT])
    key = "model-rank-0-part-0.bin"
    with RedisStore(redis_server.address(redis_name)) as near:
        near.put(key, b"old")
        data = chance.randbytes(size)
        pipe.plan = Sea(seed)
        with far(pipe, redis_name, chance.choice(["", "?for=sglang"])) as store:
            failed = trouble(lambda: write(store, key, data, slice_size=UNIT))
        assert f"/{redis_name}/{key}" in (failed or f"/{redis_name}/{key}")
        assert near.get(key, limit=size) in ((b"old", data) if failed else (data,))
        kept = near.get(key, limit=size)
        for left in list(near.unfinished()):
            near.discard(left)
        assert list(near.unfinished()) == []
        assert near.get(key, limit=size) == kept
        near.delete(key)
        assert [name for name in redis_server.keys(redis_name) if not name.endswith("/writers")] == []
    assert time.monotonic() - began < LONGEST


@pytest.mark.parametrize("seed", range(60))
def test_what_is_read_is_right(redis_server: RedisServer, redis_name: str, pipe: Pipe, seed: int) -> None:
    began = time.monotonic()
    chance = random.Random(seed)
    data = random.Random(1).randbytes(2 * UNIT + 99)
    with RedisStore(redis_server.address(redis_name)) as near:
        write(near, "a", data, slice_size=UNIT)
    pipe.plan = Sea(seed)
    with far(pipe, redis_name) as store:
        for _ in range(4):
            start, end = sorted(chance.randrange(len(data)) for _ in range(2))
            room = bytearray(end - start)
            failed = trouble(lambda: store.readinto("a", start, memoryview(room)))  # noqa: B023 - called at once
            assert f"/{redis_name}/a" in failed if failed else room == data[start:end]
    assert time.monotonic() - began < LONGEST


@pytest.mark.parametrize("seed", range(20))
def test_a_save_ends_right_or_can_be_finished(
    redis_server: RedisServer, redis_name: str, pipe: Pipe, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What says that it is done is right, also for SGLang; another run finishes what is not."""
    made = config(num_hidden_layers=1, vocab_size=256)
    source = put(tmp_path / "llama", model(made, tensors(made)))
    scheme = "?for=sglang" if seed % 2 else ""
    near, away = redis_server.address(redis_name), f"redis://127.0.0.1:{pipe.port}/{redis_name}"
    monkeypatch.setitem(stores.SCHEMES, "redis", lambda uri: RedisStore(uri, again=AGAIN, pace=PACE))
    pipe.plan = sea = Sea(seed, share=0.4, most=200_000)
    began = time.monotonic()
    failed = trouble(lambda: shardtool.save(source, f"{away}{scheme}", tp=2, max_part_size=20_000))
    assert f"/{redis_name}" in (failed or f"/{redis_name}")
    assert time.monotonic() - began < LONGEST
    assert shardtool.verify(near).ok if "shardtool.json" in contents(near) else failed
    sea.fine = True
    monkeypatch.setitem(stores.SCHEMES, "redis", RedisStore)  # which has the patience that a busy machine needs
    shardtool.save(source, f"{away}{scheme}", tp=2, max_part_size=20_000)
    shardtool.save(source, tmp_path / "tp2", tp=2, max_part_size=20_000)
    assert contents(near) == contents(tmp_path / "tp2")


@pytest.mark.parametrize("back", [5, 1, 20])
def test_a_commit_whose_answer_is_lost_is_a_commit(
    redis_server: RedisServer, redis_name: str, pipe: Pipe, back: int
) -> None:
    """Sent again, the script finds the record that it made. Another writer's is not taken for it."""
    cut = [Cut(back)]  # what the server says to three commands is 5 + 5 + 16 bytes or so
    pipe.plan = lambda _: cut.pop() if cut else None
    with far(pipe, redis_name, pace=Pace()) as store:
        store.put("record", b"mine", exclusive=True)
        assert cut == []
        assert store.get("record", limit=4) == b"mine"
        cut.append(Cut(back))
        store.close()
        with pytest.raises(AlreadyExists):
            store.put("record", b"other", exclusive=True)
        assert store.get("record", limit=4) == b"mine"
        assert list(store.unfinished()) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_writer_whose_last_word_was_not_heard_harms_nothing(
    redis_server: RedisServer, redis_name: str, pipe: Pipe, seed: int
) -> None:
    """The commit is done but every answer is lost: the writer is told that it failed, and what it wrote stays whole."""
    data = random.Random(seed).randbytes(UNIT + 5)
    with far(pipe, redis_name, pace=Pace()) as store, RedisStore(redis_server.address(redis_name)) as near:
        writer = store.create("a", len(data))
        writer.write(0, data)
        store.close()
        pipe.plan = lambda _: Cut(seed % 5)  # up to here nothing of an answer comes back
        with pytest.raises(Unavailable):
            writer.commit()
        pipe.plan = lambda _: None
        writer.abort()
        assert near.get("a", limit=len(data)) == data
        assert list(near.unfinished()) == []
