"""``verify --quick``: what a store keeps of contents is compared with what it kept when they were written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import shardtool
from shardtool import manifest
from shardtool.errors import FormatError, Unavailable
from shardtool.manifest import FileRecord
from shardtool.ops.verify import Report
from shardtool.stores import SCHEMES
from shardtool.stores.base import WrappedWriter, Wrapper
from shardtool.stores.memory import MemoryStore
from shardtool.testing import CountingStore
from tests.builders import config, flipped, model, put, tensors

FILES = model(config(), tensors(config()), files=2)
SHARD = "model-rank-1-part-0.safetensors"


class Tagging(Wrapper):
    """A store that keeps an ETag beside its checksum, or other things as it is told."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.tags: dict[str, str] = {}
        self.content = True

    def checksums(self, key: str) -> Mapping[str, str]:
        content = self.inner.checksums(key) if self.content else {}
        return {**content, "etag": self.tags.get(key, f'"{key}"')}

    def create(self, key, size, *, exclusive=False):
        store = self

        class Writer(WrappedWriter):
            def checksums(self):
                return store.checksums(key)

        return Writer(super().create(key, size, exclusive=exclusive))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Tagging:
    """Opened as ``tagging://x``."""
    made = Tagging(MemoryStore("tagging://x", checksums=True))
    monkeypatch.setitem(SCHEMES, "tagging", lambda uri: made)
    return made


@pytest.fixture
def saved(store: Tagging, tmp_path: Path) -> str:
    shardtool.save(put(tmp_path / "model", FILES), "tagging://x", tp=2)
    return "tagging://x"


def quick(uri: str) -> Report:
    return shardtool.verify(uri, quick=True)


def of(report: Report, key: str = SHARD) -> tuple[list[str], str, list[str]]:
    """What was compared of a file, what was not, and what is wrong with it."""
    (check,) = (check for check in report.files if check.key == key)
    return check.compared, check.not_compared, check.why


def record(store: Tagging) -> FileRecord:
    made = manifest.decode(store.get(manifest.KEY, limit=1 << 20), "here")
    (found,) = (file for file in made.files if file.key == SHARD)
    return found


def test_the_manifest_keeps_what_the_store_said(store: Tagging, saved: str) -> None:
    assert record(store).stored == store.checksums(SHARD)
    assert set(record(store).stored) == {"xxh3_128", "etag"}


def test_equal_checksums_are_named_and_no_tensor_is_read(saved: str, store: Tagging) -> None:
    counting = CountingStore(store)
    report = shardtool.verify(counting, quick=True)
    assert report.ok
    assert of(report) == (["size", "header", "xxh3_128"], "", [])
    assert [start for start, _ in counting.reads[SHARD]] == [0]  # the header, with what is read along with it


def test_other_content_is_damage(saved: str, store: Tagging) -> None:
    """One bit of a tensor, which neither the size nor the header tells."""
    data = store.get(SHARD, limit=1 << 20)
    store.put(SHARD, flipped(data, -1))
    report = quick(saved)
    assert report.exit_code == 1
    compared, _, why = of(report)
    assert compared == ["size", "header"]
    assert why == [
        f"its xxh3_128 is {store.checksums(SHARD)['xxh3_128']} in the store, the manifest says "
        f"{record(store).stored['xxh3_128']}"
    ]
    assert not shardtool.verify(saved).ok


def test_an_etag_is_enough_where_it_is_equal(saved: str, store: Tagging) -> None:
    store.content = False
    assert of(quick(saved)) == (["size", "header", "etag"], "", [])


def test_another_etag_proves_nothing_and_is_told(saved: str, store: Tagging) -> None:
    """A checkpoint that was copied to another bucket is as good."""
    store.content = False
    store.tags[SHARD] = '"other"'
    report = quick(saved)
    assert report.ok
    assert of(report) == (["size", "header"], "content: it was written or copied since, as its ETag says", [])
    store.content = True  # the content tells more
    assert of(quick(saved)) == (["size", "header", "xxh3_128"], "", [])


def test_a_store_that_keeps_other_things_is_told(saved: str, store: Tagging, tmp_path: Path) -> None:
    files = {found.key: store.get(found.key, limit=1 << 20) for found in store.list()}
    copy = put(tmp_path / "copy", files)
    report = quick(copy)
    assert report.ok
    assert of(report) == (["size", "header"], "content: this store keeps none of etag, xxh3_128", [])


def test_shards_of_a_folder_have_nothing_to_compare_and_nobody_is_asked(tmp_path: Path) -> None:
    shardtool.save(put(tmp_path / "model", FILES), tmp_path / "out", tp=2)
    assert b'"stored"' not in (tmp_path / "out" / manifest.KEY).read_bytes()
    assert of(quick(str(tmp_path / "out")))[1] == "content: the manifest has no checksum of a store"


def test_a_store_that_does_not_answer_is_an_error(saved: str, store: Tagging, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told that all is well."""

    def cut(key: str) -> dict[str, str]:
        raise Unavailable("cut")

    monkeypatch.setattr(store, "checksums", cut)
    with pytest.raises(Unavailable):
        quick(saved)


@pytest.mark.parametrize(
    "stored", [[], "x", {"MD5": "a"}, {"md5": 1}, {"md5": ""}, {"md5": "a b"}, {"md5": "a\n"}, {"md5": "x" * 257},
               {f"a{n}": "x" for n in range(17)}],
)  # fmt: skip
def test_what_are_no_checksums_is_refused(saved: str, store: Tagging, stored: object) -> None:
    table = json.loads(store.get(manifest.KEY, limit=1 << 20))
    table.pop("digest")
    table["files"][0]["stored"] = stored
    with pytest.raises(FormatError, match="damaged"):
        manifest.decode(manifest._signed(table), "here")
