"""SHA-256 files: what tools that people have make of them, whoever wrote the shards, and how verify uses them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool import manifest
from shardtool.errors import StoreError
from shardtool.ops import sums
from shardtool.ops.sums import Sums
from shardtool.stores.base import Object
from shardtool.stores.memory import MemoryStore
from shardtool.testing import CountingStore
from tests.builders import config, contents, flipped, model, put, tensors

FILES = model(config(), tensors(config()), files=2)
SHARD = "model-rank-1-part-0.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> str:
    return put(tmp_path / "model", FILES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def listed(out: Path) -> dict[str, str]:
    """What SHA256SUMS says, by name."""
    return {line[66:]: line[:64] for line in (out / "SHA256SUMS").read_text().splitlines()}


def truth(out: Path) -> dict[str, str]:
    """The sums of everything but the manifest and the sums themselves."""
    own = ("shardtool.json", "SHA256SUMS", "checksums.json")
    return {key: hashlib.sha256(data).hexdigest() for key, data in contents(out).items() if key not in own}


@pytest.mark.parametrize("unit", [0, 1 << 12])
def test_the_sums_are_those_of_the_files(source: str, out: Path, unit: int) -> None:
    store = CountingStore(MemoryStore(unit=unit))
    shardtool.save(source, store, tp=2, sha256=True)
    files = {found.key: store.get(found.key, limit=1 << 20) for found in store.list()}
    assert listed(Path(put(out, files))) == truth(out)
    shards = {key for key in store.reads if key.endswith(".safetensors")}
    assert shards <= {manifest.KEPT, SHARD, SHARD.replace("1", "0", 1)}


def test_no_shard_is_read_to_be_hashed(source: str) -> None:
    store = CountingStore(MemoryStore())
    shardtool.save(source, store, tp=2, sha256=True)
    assert not [key for key in store.reads if key.endswith(".safetensors")]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_them(source: str, out: Path) -> None:
    shardtool.save(source, out, tp=2, sha256=True)

    def run() -> int:
        return subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=out, capture_output=True).returncode

    assert run() == 0
    path = out / SHARD
    path.write_bytes(flipped(path.read_bytes(), -1))
    assert run() == 1


def test_sglang_reads_what_is_for_it(source: str, out: Path) -> None:
    """As its model_file_verifier does: every file that is listed must be there with this sum."""
    shardtool.save(source, out, tp=2, sglang_sha256=True)
    said = json.loads((out / "checksums.json").read_text())
    assert said.keys() == {"files"}
    assert {name: one["sha256"] for name, one in said["files"].items()} == truth(out)
    assert all(one.keys() == {"sha256", "size"} for one in said["files"].values())
    assert all((out / name).stat().st_size == one["size"] for name, one in said["files"].items())
    assert not (out / "SHA256SUMS").exists()


def test_without_being_asked_nothing_is_hashed_or_written(source: str, out: Path) -> None:
    shardtool.save(source, out, tp=2)
    assert not (out / "SHA256SUMS").exists()
    assert b"sha256" not in (out / "shardtool.json").read_bytes()


def test_the_sums_change_neither_shards_nor_the_job(source: str, out: Path, tmp_path: Path) -> None:
    shardtool.save(source, out, tp=2, sha256=True, sglang_sha256=True)
    shardtool.save(source, tmp_path / "plain", tp=2)
    plain, summed = contents(tmp_path / "plain"), contents(out)
    assert summed.keys() - plain.keys() == {"SHA256SUMS", "checksums.json"}
    assert all(summed[key] == plain[key] for key in plain if key != "shardtool.json")


def test_files_that_an_earlier_run_wrote_are_read_once(source: str, out: Path) -> None:
    shardtool.save(source, out, tp=2, ranks=[0])
    shardtool.save(source, out, tp=2, sha256=True)
    assert listed(out) == truth(out)
    assert shardtool.verify(out).ok


# Files that have to be read


class Far(MemoryStore):
    """A store whose every answer takes a while. ``most``: reads that were under way at once; ``longest``: of one.

    No read ends before so many as ``wanted`` have met, and none sooner than another one more could begin.
    """

    def __init__(self, wanted: int = 1) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._wanted = wanted
        self._reads = self.most = self.longest = 0

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        with self._changed:
            self._reads += 1
            self.most, self.longest = max(self.most, self._reads), max(self.longest, len(view))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most >= self._wanted, 20)
        time.sleep(0.02)
        super().readinto(key, start, view)
        with self._changed:
            self._reads -= 1


def far(*sizes: int, wanted: int) -> tuple[Far, dict[str, tuple[str, int]]]:
    """A store with objects of some sizes, and the truth of them."""
    store, truth = Far(wanted), {}
    for number, size in enumerate(sizes):
        data = bytes([number + 1]) * size
        store.put(f"{number}.bin", data)
        truth[f"{number}.bin"] = hashlib.sha256(data).hexdigest(), size
    return store, truth


MIB = 1 << 20


@pytest.mark.parametrize(
    ("means", "most", "longest"),
    [
        (Sums(memory_limit="64MiB", concurrency=4), 4, 8 * MIB),
        (Sums(memory_limit="24MiB"), 2, 8 * MIB),
        (Sums(memory_limit="4MiB"), 1, 2 * MIB),
        (Sums(memory_limit=1), 1, 64 << 10),  # less than anything can be read with
    ],
)
def test_as_much_is_read_at_once_as_the_limit_has_room_for(means: Sums, most: int, longest: int) -> None:
    store, truth = far(5 * longest + 1, 0, 5, wanted=most)
    assert sums.hashed(store, means, truth) == truth
    assert (store.most, store.longest) == (most, longest)


def test_small_files_are_read_side_by_side() -> None:
    store, truth = far(*range(100, 120), wanted=8)
    assert sums.hashed(store, Sums(concurrency=8), truth) == truth
    assert store.most == 8


def test_of_nothing_there_are_no_sums() -> None:
    assert sums.hashed(Far(), Sums(), []) == {}


def test_sums_have_the_means_of_their_job(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Sums] = []

    def seen(store: Any, wanted: Sums, keys: Any) -> dict[str, tuple[str, int]]:
        told.append(wanted)
        return hashed(store, wanted, keys)

    hashed = sums.hashed
    monkeypatch.setattr(sums, "hashed", seen)
    for begun in (None, [0]):  # complete already, or half of it
        shardtool.save(source, store := MemoryStore(), tp=2, ranks=begun)
        told.clear()
        assert shardtool.save(source, store, tp=2, sha256=True, memory_limit="3MiB", concurrency=2).complete
        assert {(one.memory_limit, one.concurrency) for one in told} == {("3MiB", 2)}


def test_a_file_that_is_replaced_while_it_is_hashed_has_no_sum() -> None:
    class Changing(MemoryStore):
        version = 0

        def stat(self, key: str) -> Object:
            self.version += 1
            return Object(key, super().stat(key).size, str(self.version))

    store = Changing()
    store.put("a.bin", bytes(3 * MIB))
    with pytest.raises(StoreError, match=r"a\.bin was replaced while it was read"):
        sums.of(store, "a.bin")


def test_sums_can_be_asked_for_afterwards(source: str, out: Path) -> None:
    shardtool.save(source, out, tp=2)
    assert shardtool.save(source, out, tp=2, sha256=True).complete
    assert listed(out) == truth(out)


def test_reshard_writes_them_too(source: str, out: Path, tmp_path: Path) -> None:
    shardtool.save(source, tmp_path / "first", tp=2, sha256=True)
    shardtool.reshard(tmp_path / "first", out, tp=4, sha256=True)
    assert listed(out) == truth(out)


def test_old_sums_do_not_outlive_what_they_are_of(source: str, out: Path, tmp_path: Path) -> None:
    shardtool.save(source, out, tp=2, sha256=True, sglang_sha256=True)
    shardtool.save(source, out, tp=4, overwrite=True)
    assert not (out / "SHA256SUMS").exists()
    assert not (out / "checksums.json").exists()
    put(tmp_path / "other", {**FILES, "SHA256SUMS": b"of the model"})
    shardtool.save(tmp_path / "other", tmp_path / "shards", tp=2)
    assert not (tmp_path / "shards" / "SHA256SUMS").exists()  # a side file that would be wrong


def test_verify_compares_them_with_the_manifest(source: str, out: Path) -> None:
    shardtool.save(source, out, tp=2, sha256=True, sglang_sha256=True)
    for quick in (True, False):
        report = shardtool.verify(out, quick=quick)
        assert report.ok
        assert {"SHA256SUMS", "checksums.json"} <= {check.key for check in report.files}


@pytest.mark.parametrize("name", ["SHA256SUMS", "checksums.json"])
@pytest.mark.parametrize("key", [SHARD, "config.json"])
def test_sums_that_are_wrong_are_found(source: str, out: Path, name: str, key: str) -> None:
    shardtool.save(source, out, tp=2, sha256=True, sglang_sha256=True)
    text = (out / name).read_text()
    (out / name).write_text(text.replace(truth(out)[key], "0" * 64))
    report = shardtool.verify(out, quick=True)
    assert report.exit_code == 1
    (bad,) = (check for check in report.files if not check.ok)
    assert (bad.key, bad.why) == (name, [f"its sha256 of {key} is another one"])


@pytest.mark.parametrize(("name", "text"), [("SHA256SUMS", "\xff"), ("SHA256SUMS", "x\n"), ("checksums.json", "[]")])
def test_sums_that_cannot_be_read_are_found(source: str, out: Path, name: str, text: str) -> None:
    shardtool.save(source, out, tp=2, sha256=True, sglang_sha256=True)
    (out / name).write_bytes(text.encode("latin-1"))
    (bad,) = (check for check in shardtool.verify(out, quick=True).files if not check.ok)
    assert (bad.key, bad.why) == (name, ["it cannot be read"])


def test_a_line_that_lacks_is_found(source: str, out: Path) -> None:
    shardtool.save(source, out, tp=2, sha256=True)
    lines = (out / "SHA256SUMS").read_text().splitlines(keepends=True)
    (out / "SHA256SUMS").write_text("".join(line for line in lines if SHARD not in line))
    (bad,) = (check for check in shardtool.verify(out, quick=True).files if not check.ok)
    assert f"it lacks {SHARD}" in bad.why


def test_sums_of_others_are_none_of_our_business(source: str, out: Path) -> None:
    """Where the manifest has none to compare with."""
    shardtool.save(source, out, tp=2)
    (out / "SHA256SUMS").write_text("whatever")
    assert shardtool.verify(out).ok
