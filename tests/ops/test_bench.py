"""``bench``: a bounded sample is read in every way that fits, nothing is written, and load takes what it advises."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardtool
from shardtool import digest, stores
from shardtool.errors import BudgetTooSmall, NotFound, UsageError
from shardtool.ops.bench import BLOCKS, CACHE, CONCURRENCIES, DISK, STORAGE, Range, Trial, bench, blocks, chosen
from shardtool.stores.local import residency
from shardtool.stores.local.store import LocalStore
from tests.builders import config, contents, model, put, tensors
from tests.commands import here

MIB = 1 << 20
FILES = model(config(hidden_size=64, vocab_size=3000), tensors(config(hidden_size=64, vocab_size=3000)), files=3)
SECONDS = 0.05


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return put(tmp_path / "llama", FILES)


def say(monkeypatch: pytest.MonkeyPatch, cached: bool | None) -> None:
    """Let the kernel say this of every range, whatever file system the tests run on."""
    monkeypatch.setattr(residency, "counted", lambda fd, start, size: cached)


def trial(concurrency: int, speed: int, *, block: int = 8 * MIB, digests: bool = True) -> Trial:
    return Trial(DISK, concurrency, block, digests, speed, 1.0, 0.1)


@pytest.mark.parametrize("told", [False, None])
def test_every_setting_is_tried_from_the_disk_and_from_the_page_cache(llama, monkeypatch, told):
    say(monkeypatch, told)
    found = bench(llama, seconds=SECONDS)
    assert [one.state for one in found.best] == [DISK, CACHE]
    for state in (DISK, CACHE):
        tried = [(t.concurrency, t.block, t.digests) for t in found.trials if t.state == state]
        readers = [(c, digest.CHUNK) for c in CONCURRENCIES]
        assert tried[: 2 * len(readers)] == [(*one, checked) for one in readers for checked in (False, True)]
        ((fewest, _),) = {(c, len(CONCURRENCIES)) for c, _, _ in tried[2 * len(readers) :]}
        assert fewest in CONCURRENCIES
        assert {block for _, block, _ in tried} <= {digest.CHUNK, *BLOCKS}
    assert all(0 < t.bytes <= found.sample and t.seconds > 0 for t in found.trials)
    assert found.sample == found.bytes
    assert any("dropped from the page cache" in note for note in found.notes)


def test_what_stays_in_the_page_cache_is_not_taken_for_the_disk(llama, monkeypatch):
    say(monkeypatch, True)
    found = bench(llama, seconds=SECONDS)
    assert {t.state for t in found.trials} == {CACHE}
    assert any("stay in the page cache" in note for note in found.notes)


def test_a_system_that_drops_nothing_says_so(llama, monkeypatch):
    monkeypatch.delattr("os.posix_fadvise")
    found = bench(llama, seconds=SECONDS)
    assert {t.state for t in found.trials} == {CACHE}
    assert any("drops nothing" in note for note in found.notes)


def test_other_storage_is_read_as_it_is(bucket):
    at = put(f"s3://{bucket}/llama", FILES)
    found = bench(at, seconds=SECONDS, memory_limit="32MiB")
    assert {t.state for t in found.trials} == {STORAGE}
    assert found.best[0].bytes > 0
    assert found.notes == ()


def test_shards_are_read_whatever_their_ranks(llama, tmp_path):
    shardtool.save(llama, tmp_path / "tp2", tp=2)
    found = bench(tmp_path / "tp2", seconds=SECONDS)
    stored = shardtool.inspect(tmp_path / "tp2")
    assert (found.files, found.sample) == (2, stored.bytes)


def test_a_sample_is_a_share_of_every_file(llama, monkeypatch):
    read: dict[str, set[tuple[int, int]]] = {}
    readinto = LocalStore.readinto

    def noting(self: LocalStore, key: str, start: int, view: memoryview) -> None:
        read.setdefault(key, set()).add((start, len(view)))
        readinto(self, key, start, view)

    monkeypatch.setattr(LocalStore, "readinto", noting)
    found = bench(llama, sample="30KB", seconds=1)  # so much that a busy machine reads all of it once
    assert 29_000 < found.sample <= 30_000
    assert found.bytes > 10 * found.sample
    assert max(t.bytes for t in found.trials) == found.sample
    shares = {key: max(size for start, size in spans if start) for key, spans in read.items() if "-of-" in key}
    assert len(shares) == found.files == 3
    assert sum(shares.values()) == found.sample


def test_settings_that_need_more_memory_than_the_limit_are_left_out(llama):
    found = bench(llama, seconds=SECONDS, memory_limit="17MiB")
    assert {(t.concurrency, t.block) for t in found.trials} >= {(1, 8 * MIB), (2, 8 * MIB)}
    assert all(t.concurrency * t.block <= 17 * MIB for t in found.trials)
    least = bench(llama, seconds=SECONDS, memory_limit=0)
    assert {(t.concurrency, t.block) for t in least.trials} == {(1, MIB)}


def test_digests_are_computed_of_what_is_read_with_digests(llama, monkeypatch):
    hashed: list[int] = []
    of_chunk = digest.of_chunk

    def noting(data: memoryview) -> str:
        hashed.append(len(data))
        return of_chunk(data)

    monkeypatch.setattr(digest, "of_chunk", noting)
    found = bench(llama, seconds=SECONDS)
    assert sum(hashed) == sum(t.bytes for t in found.trials if t.digests)


def test_nothing_is_written(llama):
    def seen() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in Path(llama).rglob("*")}

    before, held = seen(), contents(llama)
    bench(llama, seconds=SECONDS)
    assert seen() == before
    assert contents(llama) == held


def test_progress_counts_trials(llama):
    told: list[tuple[int, int]] = []
    bench(llama, seconds=SECONDS, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))


def test_an_error_of_a_reader_is_the_callers():
    at = put("memory://bench-vanishes", FILES)

    def vanish(_done: int, _total: int) -> None:
        with stores.open_store(at) as store:
            for one in list(store.list()):
                store.delete(one.key)

    with pytest.raises(NotFound):
        bench(at, seconds=SECONDS, progress=vanish)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "10", True])
def test_seconds_that_are_no_time_are_refused(llama, seconds):
    with pytest.raises(UsageError, match="--seconds"):
        bench(llama, seconds=seconds)


@pytest.mark.parametrize("sample", [0, "0", "much"])
def test_a_sample_of_nothing_is_refused(llama, sample):
    with pytest.raises(UsageError, match="--sample"):
        bench(llama, sample=sample)


def test_a_limit_below_one_block_is_refused(llama):
    with pytest.raises(BudgetTooSmall) as refused:
        bench(llama, memory_limit=MIB - 1)
    assert refused.value.needed == MIB


def test_a_checkpoint_without_bytes_is_refused(tmp_path):
    with pytest.raises(NotFound):
        bench(tmp_path / "missing")
    empty = put(tmp_path / "empty", {"model.safetensors": b"\x02\0\0\0\0\0\0\0{}"})
    with pytest.raises(UsageError, match="nothing to read"):
        bench(empty)


def test_the_fewest_readers_that_are_nearly_as_fast_are_chosen():
    assert chosen([trial(1, 50), trial(2, 97), trial(4, 100), trial(8, 99)]).concurrency == 2
    assert chosen([trial(1, 50), trial(2, 80), trial(4, 100)]).concurrency == 4
    assert chosen([trial(2, 96), trial(2, 99, block=MIB), trial(4, 100)]).block == MIB


def test_what_is_fast_without_digests_only_is_not_chosen():
    assert chosen([trial(1, 500, digests=False), trial(1, 50), trial(2, 100)]).concurrency == 2


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=4), st.integers(1, 20))
def test_blocks_cover_their_ranges_in_order(spans, block):
    ranges = [Range(f"file {i}", start, size) for i, (start, size) in enumerate(spans)]
    pieces = list(blocks(ranges, block))
    assert all(piece.size <= block for piece in pieces)
    covered = [(p.key, at) for p in pieces for at in range(p.start, p.start + p.size)]
    assert covered == [(r.key, at) for r in ranges for at in range(r.start, r.start + r.size)]


# The command.


def test_the_command_shows_every_trial_and_settings_that_load_takes(llama):
    ended = here("bench", llama, "--seconds", str(SECONDS))
    assert ended.code == 0
    lines = ended.out.splitlines()
    row = r"(disk|cache) +\d+ readers? +by [\d.]+ MiB +(digests)? +[\d.]+ GB/s +[\d.]+ CPU-s/GiB"
    rows = list(itertools.takewhile(lambda line: re.fullmatch(row, line), lines))
    assert len(rows) >= 2 * len(CONCURRENCIES)
    assert re.fullmatch(r".+/llama: read [\d.]+ KiB of [\d.]+ KiB in 3 files, in .+ s", lines[len(rows)])
    assert lines[len(rows) + 1].startswith("best from the ")
    assert (advice := re.fullmatch(r"settings: (--concurrency \d+ --block-size [148]MiB)", lines[-1]))
    assert here("load", llama, *advice[1].split()).code == 0


def test_machines_get_every_number(llama):
    found = here("bench", llama, "--seconds", str(SECONDS), "--sample", "40KB", "--json").json
    assert found["command"] == "bench"
    assert found["sample"] <= 40_000 < found["bytes"]
    best = found["best"][0]
    assert found["settings"] == {"concurrency": best["concurrency"], "block_size": best["block"]}
    assert set(found["trials"][0]) == {
        *("state", "concurrency", "block", "digests", "bytes", "seconds"),
        *("cpu_seconds", "gb_per_s", "cpu_s_per_gib"),
    }


def test_quiet_says_nothing_and_errors_one_line(llama):
    assert here("bench", llama, "--seconds", str(SECONDS), "--quiet").out == ""
    refused = here("bench", llama, "--seconds", "0")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.count("\n") == 1
    assert here("bench", llama + "-missing").code == 3
