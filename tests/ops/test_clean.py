"""What killed jobs left is found, told from what is complete or at work, and removed only when that is said."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool.errors import AccessDenied, NotFound, Unavailable, UsageError
from shardtool.ops import clean as operation
from shardtool.ops.clean import Cleaned, clean
from shardtool.stores.base import Object, Unfinished
from shardtool.stores.local.store import LocalStore
from shardtool.stores.memory import MemoryStore
from tests.builders import config, contents, model, put, tensors
from tests.processes import At, run

FILES = model(config(), tensors(config()), files=2)
RANK_0 = "model-rank-0-part-0.safetensors"
DAY = 86400.0


@pytest.fixture
def source(tmp_path: Path) -> str:
    return put(tmp_path / "model", FILES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def begun(source: str, out: Path) -> Path:
    """An output with the shards of one rank of two."""
    shardtool.save(source, out, tp=2, ranks=[0])
    return out


def aged(out: Path, seconds: float) -> None:
    """Make a job's records older."""
    for path in (out / ".shardtool").rglob("*.json"):
        said = json.loads(path.read_text())
        path.write_text(json.dumps({**said, "at": said["at"] - seconds}))


def kinds(found: Cleaned) -> list[tuple[str, str]]:
    """What was found, without the name of the job's folder."""
    return [(one.kind, one.key.rpartition("/")[2]) for one in found.found]


def test_a_job_that_has_not_ended_is_listed_and_nothing_is_changed(begun: Path) -> None:
    aged(begun, 2 * DAY)
    before = contents(begun)
    found = clean(begun)
    assert kinds(found) == [("shard", RANK_0), ("record", f"{RANK_0}.json"), ("record", "job.json")]
    assert all(one.old and not one.removed and one.job.startswith("tp 2 shards of") for one in found.found)
    assert all(abs(one.since - (time.time() - 2 * DAY)) < 60 for one in found.found)
    assert found.found[0].size == (begun / RANK_0).stat().st_size
    assert not found.complete
    assert contents(begun) == before


def test_what_is_old_is_removed_when_it_is_said(begun: Path, source: str) -> None:
    aged(begun, 2 * DAY)
    found = clean(begun, yes=True)
    assert len(found.removed) == len(found.found) == 3
    assert contents(begun) == {}
    assert clean(begun).found == ()
    assert shardtool.save(source, begun, tp=4).complete  # another job may begin


def test_what_is_young_stays_unless_it_is_asked_for(begun: Path) -> None:
    aged(begun, 2 * 3600)
    before = contents(begun)
    for older_than in ("1d", "3h", 3 * 3600):
        found = clean(begun, yes=True, older_than=older_than)
        assert len(found.young) == 3
        assert found.removed == ()
    assert contents(begun) == before
    assert len(clean(begun, yes=True, older_than="90m").removed) == 3


def test_a_job_lives_as_long_as_its_last_record(begun: Path, source: str) -> None:
    """A job that was begun days ago and has just finished a file is at work."""
    aged(begun, 9 * DAY)
    shardtool.save(source, begun, tp=4, overwrite=True, ranks=[0])
    (record,) = (begun / ".shardtool").rglob("job.json")
    said = json.loads(record.read_text())
    record.write_text(json.dumps({**said, "at": said["at"] - 9 * DAY}))
    assert clean(begun, yes=True).removed == ()


def test_a_job_of_unknown_age_is_young(begun: Path) -> None:
    """Records of before the times were kept."""
    for path in (begun / ".shardtool").rglob("*.json"):
        said = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in said.items() if name != "at"}))
    found = clean(begun, yes=True, older_than="1s")
    assert found.removed == ()
    assert {one.since for one in found.found} == {0.0}
    assert len(clean(begun, yes=True, older_than=0).removed) == 3


def test_a_complete_checkpoint_is_never_touched(source: str, out: Path) -> None:
    """Not even by the records that a run left which was killed while it tidied up."""
    shardtool.save(source, out, tp=2)
    before = contents(out)
    job = {"what": "x", "files": [[RANK_0, (out / RANK_0).stat().st_size]], "at": time.time() - 9 * DAY}
    (out / ".shardtool" / "abc").mkdir(parents=True)
    (out / ".shardtool" / "abc" / "job.json").write_text(json.dumps(job))
    found = clean(out, yes=True)
    assert found.complete
    assert kinds(found) == [("record", "job.json")]
    assert contents(out) == before
    assert shardtool.verify(out).ok


def test_a_merged_checkpoint_is_complete_too(source: str, out: Path, tmp_path: Path) -> None:
    shardtool.save(source, tmp_path / "shards", tp=2)
    shardtool.merge(tmp_path / "shards", out)
    assert clean(out) == Cleaned(str(out), complete=True, found=())


def test_files_of_others_stay(begun: Path) -> None:
    """Those that the job does not name, and those that are not what it says."""
    aged(begun, 2 * DAY)
    (begun / "mine.safetensors").write_bytes(b"x")
    (begun / "config.json").write_text("{}")
    (begun / RANK_0).write_bytes(b"something else")
    clean(begun, yes=True)
    assert sorted(contents(begun)) == ["config.json", "mine.safetensors", RANK_0]


@pytest.mark.parametrize(
    "files",
    [
        [["../secret.safetensors", 6]],
        [["/etc/passwd", 6]],
        [["notes.txt", 6]],
        [["a", "b", "c"]],
        {"a": 1},
        "text",
        [1],
    ],
)
def test_a_record_that_lies_removes_nothing_else(tmp_path: Path, files: Any) -> None:
    out = tmp_path / "out"
    (tmp_path / "secret.safetensors").write_text("secret")
    (out / ".shardtool" / "abc").mkdir(parents=True)
    (out / "notes.txt").write_text("secret")
    (out / ".shardtool" / "abc" / "job.json").write_text(json.dumps({"files": files, "at": 1.0, "what": 7}))
    assert kinds(clean(out, yes=True)) == [("record", "job.json")]
    assert (tmp_path / "secret.safetensors").exists()
    assert (out / "notes.txt").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"at": "x"}', '{"at": 1e300}', '{"at": -1}'])
def test_a_damaged_record_has_no_age(tmp_path: Path, text: str) -> None:
    (tmp_path / ".shardtool" / "abc").mkdir(parents=True)
    (tmp_path / ".shardtool" / "abc" / "job.json").write_text(text)
    assert [one.since for one in clean(tmp_path).found] == [0.0]
    clean(tmp_path, yes=True, older_than=0)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "is cut short or damaged: it is not JSON"), ("[]", "is no record of a job"), ('{"at": 1.0}', "")],
)
def test_a_record_that_says_nothing_is_told_of(tmp_path: Path, text: str, why: str) -> None:
    record = tmp_path / ".shardtool" / "abc" / "job.json"
    record.parent.mkdir(parents=True)
    record.write_text(text)
    told = f"{record} {why}: nothing tells the age of its job, which only --older-than 0 removes"
    assert clean(tmp_path).notes == ((told,) if why else ())


def test_a_record_that_the_store_does_not_give_makes_no_job_old(begun: Path) -> None:
    """Its last sign of life may be the one that was not read."""
    aged(begun, 2 * DAY)

    class Busy(LocalStore):
        def readinto(self, key: str, start: int, view: memoryview) -> None:
            if key.endswith(f"{RANK_0}.json"):
                raise Unavailable("come again later")
            super().readinto(key, start, view)

    before = contents(begun)
    with Busy(begun) as store, pytest.raises(Unavailable, match="come again later"):
        clean(store, yes=True)
    assert contents(begun) == before


# Places of others, of any size


class Crowded(MemoryStore):
    """A store with many more objects than those that it has been given."""

    many = 300_000

    def list(self, prefix: str = "") -> Iterator[Object]:
        yield from super().list(prefix)
        yield from (Object(f"theirs/{number:09}.safetensors", 1) for number in range(0 if prefix else self.many))


def test_a_bucket_of_any_size_is_looked_through_one_by_one(source: str) -> None:
    store = Crowded()
    shardtool.save(source, inner := MemoryStore(), tp=2, ranks=[0])
    for thing in inner.list():
        store.put(thing.key, inner.get(thing.key, limit=1 << 20))
    tracemalloc.start()
    try:
        found = clean(store, yes=True, older_than=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kinds(found) == [("shard", RANK_0), ("record", f"{RANK_0}.json"), ("record", "job.json")]
    assert len(found.removed) == 3
    assert peak < 5 << 20  # 300,000 objects and their names are ten times as much


def test_more_records_than_jobs_leave_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "MOST", 3)
    store = MemoryStore()
    for number in range(3):
        store.put(f".shardtool/abc/{number}.json", b"{}")
    assert len(clean(store).found) == 3
    store.put(".shardtool/abc/3.json", b"{}")
    with pytest.raises(UsageError, match=r"\.shardtool/ holds too many records, more than 3, which no job leaves"):
        clean(store, yes=True, older_than=0)
    assert len(list(store.list())) == 4


def test_a_record_that_lists_more_files_than_jobs_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all jobs together."""
    monkeypatch.setattr(operation, "MOST", 3)
    store = MemoryStore()
    for job, files in (("a", 2), ("b", 1)):
        listed = [[f"{job}{number}.safetensors", 1] for number in range(files)]
        store.put(f".shardtool/{job}/job.json", json.dumps({"files": listed}).encode())
    assert len(clean(store).found) == 2
    store.put(".shardtool/c/job.json", json.dumps({"files": [["c.safetensors", 1]]}).encode())
    with pytest.raises(UsageError, match=r"\.shardtool/c/job\.json lists too many files, more than 3"):
        clean(store)


def test_more_uploads_than_can_be_looked_at_are_removed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "MOST", 3)
    store = Old()
    for number in range(5):
        store.create(f"{number}.bin", 10)
    found = clean(store, yes=True)
    assert len(found.removed) == 3
    assert found.notes == (f"{store.uri} has more than 3 unfinished uploads: once these are gone, look again",)
    found = clean(store, yes=True)
    assert (len(found.removed), found.notes) == (2, ())


def test_a_run_that_was_killed_is_cleaned_up_after(source: str, out: Path) -> None:
    """By SIGKILL, with a file half written."""
    assert run("save", source, out, tp=2, kill=At(progress=0.5)).killed
    found = clean(out, older_than=0)
    assert {one.kind for one in found.found} >= {"record", "upload"}
    clean(out, yes=True, older_than=0)
    assert contents(out) == {}


def test_uploads_are_found_with_their_age_and_size(out: Path) -> None:
    with LocalStore(out) as store:
        writer = store.create("model.bin", 1000)
        try:
            (found,) = clean(out, yes=True).found
            assert (found.kind, found.key, found.size, found.old) == ("upload", "model.bin", 1000, False)
            (found,) = clean(out, yes=True, older_than=0).found
            assert found.removed
            assert list(store.unfinished()) == []
        finally:
            writer.abort()


class Old(MemoryStore):
    """A store whose uploads are of long ago, or of nobody knows when."""

    since = 1.0

    def unfinished(self, prefix: str = ""):
        return (Unfinished(one.key, one.name, self.since, one.size) for one in super().unfinished(prefix))


def test_an_upload_of_unknown_age_is_young() -> None:
    store = Old()
    store.create("model.bin", 10)
    store.since = 0.0
    assert clean(store, yes=True).removed == ()
    store.since = 1.0
    assert len(clean(store, yes=True).removed) == 1
    assert clean(store).found == ()


def test_uploads_that_nobody_may_list_are_noted() -> None:
    class Closed(MemoryStore):
        def unfinished(self, prefix: str = ""):
            raise AccessDenied("no permission to list uploads")

    store = Closed()
    store.put("a", b"x")
    found = clean(store)
    assert found.found == ()
    assert found.notes == ("unfinished uploads cannot be looked for: no permission to list uploads",)


def test_a_checkpoint_that_becomes_complete_meanwhile_keeps_its_shards(source: str, begun: Path) -> None:
    """Another worker finishes between the look and the removal."""
    aged(begun, 2 * DAY)

    class Late(LocalStore):
        def unfinished(self, prefix: str = ""):  # looked for after the jobs
            shardtool.save(source, begun, tp=2)
            return iter(())

    with Late(begun) as store:
        clean(store, yes=True)
    assert shardtool.verify(begun).ok


@pytest.mark.parametrize("call", [lambda out: clean(out / "missing"), lambda out: clean(out, older_than="soon")])
def test_what_cannot_be_looked_at_is_an_error(out: Path, call: Callable[[Path], Any]) -> None:
    with pytest.raises((NotFound, UsageError)):
        call(out)
