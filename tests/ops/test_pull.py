"""``pull`` brings what lies beside the weights, once, whole, and nowhere but into its folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardtool
from shardtool.errors import AccessDenied, NotFound, StoreError, Unavailable, UsageError
from shardtool.ops.pull import LOCK, RECORD, Pulled, matching, pull
from shardtool.stores.base import Object
from shardtool.stores.counting import CountingStore
from shardtool.stores.faulty import FaultyStore, Raise
from shardtool.stores.memory import MemoryStore
from tests.builders import contents, put
from tests.commands import environment
from tests.servers import S3Server
from tests.servers.hub import Hub

BESIDE = {
    "config.json": b'{"a": 1}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"t" * 100_000,
    "tokenizer.model": b"\0sp",
    "chat_template.jinja": b"{{ x }}",
    "modeling_own.py": b"pass",
    "code/deep/er.py": b"1",
    "empty.txt": b"",
    "shardtool.json": b"{}",
}
WEIGHTS = {
    "model-00001-of-00001.safetensors": b"w" * 1000,
    "model-rank-0-part-0.safetensors": b"w",
    "pytorch_model.bin": b"w",
    "model.safetensors.index.json": b"{}",
    "original/consolidated.00.pth": b"w",
    "draft/model.safetensors": b"w",
    "draft/config.json": b"{}",
    "model.gguf": b"w",
    ".gitattributes": b"x",
    ".shardtool/kept.safetensors": b"w",
}
FILES = BESIDE | WEIGHTS


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A folder with all kinds of files."""
    return put(tmp_path / "from", FILES)


@pytest.fixture
def to(tmp_path: Path) -> Path:
    """The folder that files are pulled into, which is not there yet."""
    return tmp_path / "to" / "here"


def pulled(folder: Path) -> dict[str, bytes]:
    """What is in the folder, but for what is noted there."""
    return {key: data for key, data in contents(folder).items() if key not in (RECORD, LOCK)}


def names(found: Pulled) -> list[str]:
    """The keys that were brought."""
    return [file.key for file in found.brought]


class Plain(MemoryStore):
    """A store that tells no versions."""

    def list(self, prefix: str = "") -> Iterator[Object]:
        return (Object(found.key, found.size) for found in super().list(prefix))


# What is brought.


def test_everything_but_the_weights_is_brought(source, to):
    found = shardtool.pull(source, to)
    assert pulled(to) == BESIDE
    assert [(file.key, file.size, file.brought) for file in found.files] == [
        (key, len(data), True) for key, data in sorted(BESIDE.items())
    ]
    assert (found.folder, found.waited) == (str(to), False)


def test_a_manifest_is_left_on_request(source, to):
    pull(source, to, manifest=False)
    assert pulled(to) == {key: data for key, data in BESIDE.items() if key != "shardtool.json"}


@pytest.mark.parametrize(
    ("allow", "ignore", "wanted"),
    [
        (["*.json"], None, {key for key in FILES if key.endswith(".json")}),
        (["*.py"], None, {"modeling_own.py", "code/deep/er.py"}),
        (["code/"], None, {"code/deep/er.py"}),
        (["*.safetensors"], ["draft/", ".s*"], {"model-00001-of-00001.safetensors", "model-rank-0-part-0.safetensors"}),
        (None, ["*.json", "*.py"], {"tokenizer.model", "chat_template.jinja", "empty.txt"}),
        (["config.json"], ["config.json"], set()),
        (["CONFIG.JSON"], None, set()),
        ([], None, set()),
    ],
)
def test_patterns_choose(source, to, allow, ignore, wanted):
    found = pull(source, to, allow=allow, ignore=ignore)
    assert pulled(to) == {key: FILES[key] for key in wanted}
    assert set(names(found)) == wanted


def test_a_star_stands_for_slashes_and_a_folder_for_what_is_in_it():
    assert matching("a/b/c.json", ["*.json"])
    assert matching("a/b/c.json", ["x", "a/"])
    assert not matching("a/b/c.json", ["a"])
    assert not matching("ab/c", ["a/"])


@pytest.mark.parametrize("given", ["*.json", [1], 5])
def test_a_pattern_that_is_not_in_a_list_is_refused(source, to, given):
    for choice in ({"allow": given}, {"ignore": given}):
        with pytest.raises(UsageError, match="is not a list of patterns"):
            pull(source, to, **choice)
    assert not to.exists()


def test_from_every_kind_of_store(hub: Hub, bucket: str, to):
    files = {key: data for key, data in FILES.items() if key != ".shardtool/kept.safetensors"}
    hub.commit("llama", files)
    put(f"s3://{bucket}/llama", files)
    memory = MemoryStore()
    for key, data in files.items():
        memory.put(key, data)
    sources: list[str | MemoryStore] = [hub.uri("llama"), f"s3://{bucket}/llama", memory]
    for number, source in enumerate(sources):
        folder = to / str(number)
        assert len(pull(source, folder).brought) == len(BESIDE)
        assert pulled(folder) == BESIDE
        assert pull(source, folder).brought == ()


# What is there already.


def test_what_has_not_changed_stays_and_what_has_is_brought(source, to):
    pull(source, to)
    before = (to / "config.json").stat().st_ino
    assert names(pull(source, to)) == []
    (Path(source) / "tokenizer.model").write_bytes(b"new")  # of the same size
    (Path(source) / "new.txt").write_bytes(b"new")
    os.utime(Path(source) / "tokenizer.model", ns=(1, 1))
    found = pull(source, to)
    assert names(found) == ["new.txt", "tokenizer.model"]
    assert pulled(to) == BESIDE | {"tokenizer.model": b"new", "new.txt": b"new"}
    assert (to / "config.json").stat().st_ino == before


def test_what_was_changed_or_removed_here_is_brought_again(source, to):
    pull(source, to)
    (to / "config.json").write_bytes(b'{"a": 2}')
    os.utime(to / "config.json", ns=(1, 1))
    (to / "tokenizer.json").unlink()
    assert names(pull(source, to)) == ["config.json", "tokenizer.json"]
    assert pulled(to) == BESIDE


def test_files_of_others_stay_but_for_those_of_the_same_name(source, to):
    put(to, {"mine.txt": b"mine", "config.json": b"mine"})
    pull(source, to)
    assert pulled(to) == BESIDE | {"mine.txt": b"mine"}


def test_another_source_of_files_of_the_same_sizes_is_another(source, to, tmp_path):
    pull(source, to)
    other = put(tmp_path / "other", BESIDE | {"config.json": b'{"a": 9}'})
    for key in BESIDE:
        os.utime(Path(other) / key, ns=(os.stat(Path(source) / key).st_mtime_ns,) * 2)
    assert len(pull(other, to).brought) == len(BESIDE)
    assert pulled(to)["config.json"] == b'{"a": 9}'


def test_a_commit_of_the_hub_that_changes_one_file_brings_one_file(hub: Hub, to):
    hub.commit("llama", FILES)
    pull(hub.uri("llama"), to)
    hub.commit("llama", FILES | {"config.json": b'{"a": 2}'})
    before = len(hub.asked())
    assert names(pull(hub.uri("llama"), to)) == ["config.json"]
    assert {one.path.rpartition("/")[2] for one in hub.asked()[before:] if "resolve" in one.path} == {"config.json"}


@pytest.mark.parametrize(
    "noted",
    [
        b"",
        b"nonsense",
        b"[]",
        b'{"files": {"a": 1}}',
        b'{"source": 1, "files": 3}',
        b'{"source": "x", "at": 1, "files": {"config.json": {"size": Infinity, "version": "1", "here": "1"}}}',
    ],
)
def test_a_note_that_cannot_be_understood_is_made_anew(source, to, noted):
    put(to, {RECORD: noted})
    assert len(pull(source, to).brought) == len(BESIDE)
    assert pull(source, to).brought == ()


def test_a_store_that_tells_no_versions_is_pulled_from_every_time(to):
    store = Plain()
    store.put("config.json", b"{}")
    assert [names(pull(store, to)) for _ in range(2)] == [["config.json"]] * 2


# What goes wrong.


def test_what_came_before_a_failure_is_not_brought_again(to):
    memory = MemoryStore()
    for key, data in BESIDE.items():
        memory.put(key, data)
    broken = FaultyStore(memory, {("readinto", 5): Raise(Unavailable("cut"))})
    with pytest.raises(Unavailable, match="cut"):
        pull(broken, to, concurrency=1)
    assert 0 < len(there := pulled(to)) < len(BESIDE)
    assert all(BESIDE[key] == data for key, data in there.items())
    counting = CountingStore(memory)
    assert set(names(pull(counting, to))) == BESIDE.keys() - there.keys()
    assert not set(counting.reads) & there.keys()
    assert pulled(to) == BESIDE


def test_nothing_leaves_the_folder(bucket: str, s3_server: S3Server, tmp_path, to):
    """Neither keys that lead elsewhere, nor links in the folder."""
    for key in ("m/../../evil", "m//evil", "m/./evil", "m/code/x.py", "m/a.txt"):
        s3_server.client.put_object(Bucket=bucket, Key=key, Body=b"x")
    (tmp_path / "outside").mkdir()
    to.mkdir(parents=True)
    (to / "code").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="leaves"):
        pull(f"s3://{bucket}/m", to)
    assert list((tmp_path / "outside").iterdir()) == []
    (to / "code").unlink()
    pull(f"s3://{bucket}/m", to)
    kept = {f"to/here/{key}" for key in ("a.txt", "code/x.py", RECORD, LOCK)}
    assert contents(tmp_path).keys() == kept


def test_what_is_noted_there_is_not_pulled_into_another_folder(source, to, tmp_path):
    pull(source, to)
    pull(to, tmp_path / "second", allow=["*"])
    assert pulled(tmp_path / "second") == BESIDE
    assert json.loads((tmp_path / "second" / RECORD).read_bytes())["source"] == os.path.realpath(to)


def test_what_is_not_there_is_not_found_and_leaves_nothing(tmp_path, bucket, to):
    (tmp_path / "empty").mkdir()
    for uri in (tmp_path / "none", tmp_path / "empty", f"s3://{bucket}/none"):
        with pytest.raises(NotFound):
            pull(uri, to)
    assert not to.parent.exists()


@pytest.mark.parametrize("folder", ["", "s3://bucket/x", "hf://a/b"])
def test_only_a_folder_of_this_machine_is_pulled_into(source, folder):
    with pytest.raises(UsageError, match="no folder of this machine"):
        pull(source, folder)


def test_a_folder_is_not_pulled_into_itself(source):
    with pytest.raises(UsageError, match="name another folder"):
        pull(source, f"{source}/")
    with pytest.raises(UsageError, match="is a file"):
        pull(source, f"{source}/config.json")


def test_a_folder_that_cannot_be_written_is_told_of(source, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be written to"):
        pull(source, tmp_path / "file" / "below")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(AccessDenied, match="cannot be written to"):
            pull(source, tmp_path / "closed")


def test_a_copy_keeps_within_the_memory_limit(source, to):
    assert len(pull(source, to, memory_limit=0, concurrency=64).brought) == len(BESIDE)
    assert pulled(to) == BESIDE


# Many at a time.


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another process's lock, for the time of the block."""
    path = folder / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_one_that_waits_finds_it_done(to, monkeypatch):
    """Even of a store that tells no versions: nothing can have changed in so short a time."""
    memory = Plain()
    memory.put("config.json", b"{}")
    results: list[Pulled] = []
    store = CountingStore(memory)

    turned_away = threading.Semaphore(0)
    flock = fcntl.flock

    def told(file: int, how: int) -> None:
        try:
            flock(file, how)
        except BlockingIOError:  # now it waits
            turned_away.release()
            raise

    def run() -> None:
        results.append(pull(store, to))

    threads = [threading.Thread(target=run) for _ in range(4)]
    with locked(to):
        monkeypatch.setattr(fcntl, "flock", told)
        for thread in threads:
            thread.start()
        for _ in threads:
            assert turned_away.acquire(timeout=60)
        assert not results
    for thread in threads:
        thread.join()
    assert [len(found.brought) for found in results] in ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])
    assert all(found.waited for found in results)
    assert store.calls["readinto"] == 1


ASK = """
import json, sys
import shardtool
print("asks", flush=True)
found = shardtool.pull(sys.argv[1], sys.argv[2])
print(json.dumps([len(found.brought), found.waited]), flush=True)
"""


def ask(source: str, to: Path) -> subprocess.Popen[str]:
    """A process that pulls; it has said so when this returns."""
    command = [sys.executable, "-c", ASK, source, str(to)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert job.stdout is not None
    assert job.stdout.readline() == "asks\n"
    return job


def test_ranks_of_a_node_that_ask_at_once_bring_each_file_once(hub: Hub, to):
    hub.commit("llama", FILES)
    with locked(to):
        jobs = [ask(hub.uri("llama"), to) for _ in range(4)]
        time.sleep(0.5)
        assert pulled(to) == {}
    found = [json.loads(job.communicate(timeout=120)[0]) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4
    assert sorted(brought for brought, _ in found) == [0, 0, 0, len(BESIDE)]
    fetched = [one.path for one in hub.asked("hub") if one.method == "GET" and "/resolve/" in one.path]
    assert len(fetched) == len(BESIDE) - 1  # the empty one is known without asking
    assert pulled(to) == BESIDE


def test_the_lock_of_a_process_that_was_killed_is_no_lock(source, to):
    """It is the process that holds it, not the file."""
    holding = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('has'); time.sleep(600)"
    (to / LOCK).parent.mkdir(parents=True)
    job = subprocess.Popen([sys.executable, "-u", "-c", holding, str(to / LOCK)], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "has\n"
    asking = ask(source, to)
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    assert json.loads(asking.communicate(timeout=120)[0])[0] == len(BESIDE)
    assert pull(source, to).waited is False


def test_where_there_are_no_locks_there_is_none(source, to, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    assert len(pull(source, to).brought) == len(BESIDE)
