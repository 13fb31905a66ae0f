"""What happens when things break in the middle: one sentence, the right exit code, nothing half-written, no hang.

Disks fill up, folders are read-only, files vanish or shrink, reads and writes fail, servers refuse and hang up. Each
time the same command afterwards, with the trouble gone, ends where an undisturbed run does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool import stores
from shardtool.errors import FormatError, NotFound, ShardtoolError, StoreError, Unavailable
from shardtool.stores.base import Store
from shardtool.stores.local.store import LocalStore
from shardtool.stores.s3.store import S3Store
from shardtool.testing import Call, FaultyStore, Flip, Raise
from tests import builders
from tests.processes import cli
from tests.servers import Proxy, S3Server

pytestmark = pytest.mark.timeout(240)

PART = 20_000
OPTIONS: dict[str, Any] = {"tp": 2, "max_part_size": PART}
SOURCE = {"save": "hf", "reshard": "save", "merge": "save"}
COMMANDS: dict[str, dict[str, Any]] = {
    "save": OPTIONS,
    "reshard": {"tp": 4, "max_part_size": PART // 2},
    "merge": {"max_part_size": 2 * PART},
}
MARKS = ("shardtool.json", "model.safetensors.index.json")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 KB (``hf``), and what undisturbed runs of ``save``, ``reshard`` and ``merge`` make of it."""
    made = tmp_path_factory.mktemp("faults")
    config = builders.config(num_hidden_layers=8, hidden_size=64, intermediate_size=96, vocab_size=128)
    builders.put(made / "hf", builders.model(config, builders.tensors(config), files=3))
    for operation, options in COMMANDS.items():
        getattr(shardtool, operation)(made / SOURCE[operation], made / operation, **options)
    return made


@pytest.fixture(autouse=True)
def nothing_stays_behind(tmp_path: Path, shelf: Path) -> Iterator[None]:
    """However an operation ends, its threads end with it, and its files are closed."""
    before = set(threading.enumerate())
    yield
    started = [thread.name for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    assert [name for name in started if "process_request_thread" not in name] == []  # those are the proxy's
    if sys.platform == "linux":
        paths = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        assert [path for path in paths if path.startswith((str(tmp_path), str(shelf)))] == []


def perform(operation: str, source: Any, out: Any, **options: Any) -> Any:
    return getattr(shardtool, operation)(source, out, **COMMANDS[operation], **options)


def assert_unfinished(out: Path, undisturbed: Path) -> None:
    """Files are whole or not there, temporary ones are gone, and nothing claims to be complete."""
    left, whole = builders.contents(out), builders.contents(undisturbed)
    visible = {key: data for key, data in left.items() if not key.startswith(".shardtool/")}
    assert visible.items() <= whole.items()
    assert not [mark for mark in MARKS if mark in visible]
    assert not [key for key in left if key.startswith(".shardtool/tmp")]


def assert_same_folder(out: Path, undisturbed: Path) -> None:
    found, wanted = builders.contents(out), builders.contents(undisturbed)
    assert found.keys() == wanted.keys()
    assert [key for key in found if found[key] != wanted[key]] == []


def assert_one_sentence(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code of the class, one line on stderr that names what it is about, nothing on stdout."""
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr
    assert done.stdout == ""


# Disks and folders.


@dataclass
class Disk:
    """A folder on a disk of its own that is too small, or one in which files must be small; ``grow`` ends that."""

    folder: Path
    file_size: int | None = None

    def grow(self) -> None:
        if self.file_size is None:
            subprocess.run(["mount", "-o", "remount,size=64m", self.folder], check=True)
        self.file_size = None


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk of ``request.param`` bytes where this user may mount one; elsewhere files of 10,000 bytes at most."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            yield Disk(folder)
            subprocess.run(["umount", folder], check=True)
            return
    yield Disk(folder, 10_000)


@pytest.mark.parametrize("operation", ["save", "reshard", "merge"])
@pytest.mark.parametrize("disk", [16_384, 200_000], indirect=True)
def test_a_full_disk(shelf: Path, disk: Disk, operation: str) -> None:
    """What is whole stays, what is not goes and gives its space back; with more space the same command goes on."""
    out = disk.folder / "out"
    args = [operation, shelf / SOURCE[operation], "-o", out, "--quiet"]
    for name, value in COMMANDS[operation].items():
        args += [f"--{name.replace('_', '-')}", str(value)]
    done = cli(*args, file_size=disk.file_size)
    assert_one_sentence(done, StoreError.exit_code, "no space left", str(out))
    assert_unfinished(out, shelf / operation)
    disk.grow()
    done = cli(*args)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_folder(out, shelf / operation)


def test_a_limit_on_the_size_of_files(shelf: Path, tmp_path: Path) -> None:
    """It is told from a full disk by its advice."""
    args = ["save", shelf / "hf", "--tp", "2", "-o", tmp_path / "out", "--quiet"]
    done = cli(*args, file_size=50_000)
    assert_one_sentence(done, StoreError.exit_code, "ulimit -f")
    assert_unfinished(tmp_path / "out", shelf / "save")
    assert cli(*args).returncode == 0


@pytest.mark.parametrize("which", ["output", "parent"])
def test_a_folder_that_may_not_be_written(shelf: Path, tmp_path: Path, which: str) -> None:
    """The error names the folder; nothing is there, and nothing is left once it may be written."""
    parent = tmp_path / "parent"
    out = parent / "out"
    out.mkdir(parents=True)
    locked = out if which == "output" else parent
    if which == "parent":
        out.rmdir()
    locked.chmod(0o555)
    args = ["save", shelf / "hf", "--tp", "2", "--max-part-size", str(PART), "-o", out, "--quiet"]
    done = cli(*args, mortal=True)
    assert_one_sentence(done, StoreError.exit_code, str(out), "permission")
    locked.chmod(0o755)
    assert builders.contents(parent) == {}
    assert cli(*args).returncode == 0
    assert_same_folder(out, shelf / "save")


def test_a_source_that_may_not_be_read(shelf: Path, tmp_path: Path) -> None:
    """Found before anything is written."""
    source = tmp_path / "hf"
    shutil.copytree(shelf / "hf", source)
    locked = source / "model-00002-of-00003.safetensors"
    locked.chmod(0)
    done = cli("save", source, "--tp", "2", "-o", tmp_path / "out", "--quiet", mortal=True)
    assert_one_sentence(done, StoreError.exit_code, str(locked), "permission")
    assert not (tmp_path / "out").exists()


def test_folders_above_the_output_are_made(shelf: Path, tmp_path: Path) -> None:
    """A parent that is missing is no trouble; one that is a file is."""
    out = tmp_path / "a" / "b" / "out"
    assert shardtool.save(shelf / "hf", out, **OPTIONS).complete
    assert_same_folder(out, shelf / "save")
    (tmp_path / "file").write_text("")
    done = cli("save", shelf / "hf", "--tp", "2", "-o", tmp_path / "file" / "out", "--quiet")
    assert_one_sentence(done, StoreError.exit_code, str(tmp_path / "file"))
    done = cli("save", shelf / "hf", "--tp", "2", "-o", tmp_path / "file", "--quiet")
    assert_one_sentence(done, 2, str(tmp_path / "file"), "is a file")


# Sources that change under a run.


class Midway:
    """A progress callback that does something once, at a share of the bytes."""

    def __init__(self, deed: Callable[[], Any], share: float = 0.3) -> None:
        self.deed: Callable[[], Any] | None = deed
        self.share = share

    def __call__(self, done: int, total: int) -> None:
        if self.deed and done >= self.share * total:
            deed, self.deed = self.deed, None
            deed()


def last_file(source: Path) -> Path:
    return max(path for path in source.glob("*.safetensors"))


CHANGES: dict[str, tuple[Callable[[Path], Any], type[ShardtoolError]]] = {
    "vanishes": (Path.unlink, NotFound),
    "shrinks": (lambda path: os.truncate(path, path.stat().st_size // 2), FormatError),
    "empties": (lambda path: os.truncate(path, 0), FormatError),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("operation", ["save", "reshard", "merge"])
def test_a_source_file_that_changes_in_mid_run(shelf: Path, tmp_path: Path, operation: str, change: str) -> None:
    """The error names the file, and the run can be finished once it is back."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(shelf / SOURCE[operation], source)
    changed = last_file(source)
    kept, times = changed.read_bytes(), (changed.stat().st_atime_ns, changed.stat().st_mtime_ns)
    deed, kind = CHANGES[change]
    options = {} if operation == "save" else {"verify": False}
    with pytest.raises(kind, match=changed.name):
        perform(
            operation,
            source,
            out,
            memory_limit="1MiB",
            concurrency=1,
            progress=Midway(lambda: deed(changed)),
            **options,
        )
    assert_unfinished(out, shelf / operation)
    changed.write_bytes(kept)
    os.utime(changed, ns=times)  # a file of another time counts as another file
    assert perform(operation, source, out).complete
    assert_same_folder(out, shelf / operation)


def test_a_file_that_vanishes_while_it_is_streamed(shelf: Path, tmp_path: Path) -> None:
    """What was handed over is right, and the error comes where the next tensor would have."""
    source = tmp_path / "source"
    shutil.copytree(shelf / "save", source)
    gone = max(source.glob("model-rank-0-*"))
    names = []

    def consume() -> None:
        for name, _ in shardtool.stream(source, rank=0, memory_limit="64KiB", concurrency=1):
            gone.unlink(missing_ok=True)
            names.append(name)

    with pytest.raises(NotFound, match=gone.name):
        consume()
    assert names


def test_a_stream_that_is_given_up_ends_its_threads(shelf: Path) -> None:
    """Closing the generator is enough; the fixture looks for threads."""
    tensors = shardtool.stream(shelf / "save", rank=0, memory_limit="64KiB")
    next(tensors)
    tensors.close()  # type: ignore[attr-defined]


# Stores that fail at a chosen call.


class Faults:
    """Opens ``faulty://path`` as the folder at that path, with the script that is set."""

    def __init__(self) -> None:
        self.script: Callable[[Call], Any] = lambda call: None
        self.opened: list[FaultyStore] = []

    def __call__(self, uri: str) -> Store:
        self.opened.append(FaultyStore(LocalStore(uri.partition("://")[2]), lambda call: self.script(call)))
        return self.opened[-1]

    def calls(self) -> list[Call]:
        return [call for store in self.opened for call in store.calls]


FAULTS = Faults()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """The scheme ``faulty`` for this test."""
    monkeypatch.setitem(stores.SCHEMES, "faulty", f"{__name__}:FAULTS")
    monkeypatch.setattr(FAULTS, "script", lambda call: None)
    monkeypatch.setattr(FAULTS, "opened", [])
    return FAULTS


class Nth:
    """A script: something happens to the n-th call of some operations."""

    def __init__(self, number: int, what: Any, operations: tuple[str, ...]) -> None:
        self.left, self.what, self.operations = number, what, operations
        self.lock = threading.Lock()

    def __call__(self, call: Call) -> Any:
        with self.lock:
            if call.operation in self.operations:
                self.left -= 1
                return self.what if self.left == 0 else None
        return None


WRITES = ("create", "write", "commit", "delete", "list", "stat", "readinto")
ERRORS = {
    "refused": lambda: Raise(Unavailable("the disk is away: try again")),
    "lost": lambda: Raise(Unavailable("the disk is away: try again"), after=True),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", ["save", "merge"])
def test_any_call_on_the_output_may_fail(
    shelf: Path, tmp_path: Path, faults: Faults, operation: str, error: str
) -> None:
    """Every thirty-seventh call of a run, the first and the last ones: its error is told, or it did not matter."""
    source, out = shelf / SOURCE[operation], tmp_path / "out"
    perform(operation, source, f"faulty://{out}", concurrency=1)
    total = len([call for call in faults.calls() if call.operation in WRITES])
    assert_same_folder(out, shelf / operation)
    for number in sorted({1, 2, *range(3, total, 37), *range(total - 2, total + 1)}):
        shutil.rmtree(out)
        faults.script = Nth(number, ERRORS[error](), WRITES)
        with contextlib.suppress(Unavailable):
            perform(operation, source, f"faulty://{out}", concurrency=1)
        whole = builders.contents(shelf / operation)
        left = builders.contents(out)
        visible = {key: data for key, data in left.items() if not key.startswith(".shardtool/")}
        assert visible.items() <= whole.items(), number
        assert not [key for key in left if key.startswith(".shardtool/tmp")], number
        faults.script = lambda call: None
        assert perform(operation, source, f"faulty://{out}").complete, number
        assert_same_folder(out, shelf / operation)


@pytest.mark.parametrize("operation", ["save", "reshard", "merge"])
@pytest.mark.parametrize(
    "error", [Unavailable("gone"), OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError("a bug")]
)
def test_any_read_of_the_source_may_fail(
    shelf: Path, tmp_path: Path, faults: Faults, operation: str, error: Exception
) -> None:
    """The very error is raised, whatever it is, from whichever reader, and nobody waits for the others."""
    source = shelf / SOURCE[operation]
    perform(operation, f"faulty://{source}", tmp_path / "first")
    total = len([call for call in faults.calls() if call.operation == "readinto"])
    chosen = random.Random(1)
    for number in (1, total, *(chosen.randint(2, total - 1) for _ in range(2))):
        out = tmp_path / f"out-{number}"
        faults.script = Nth(number, Raise(error), ("readinto",))
        with pytest.raises(type(error)) as caught:
            perform(operation, f"faulty://{source}", out)
        assert caught.value is error
        if out.exists():
            assert_unfinished(out, shelf / operation)
        faults.script = lambda call: None
        assert perform(operation, f"faulty://{source}", out).complete
        assert_same_folder(out, shelf / operation)


@pytest.mark.parametrize("number", [1, 5, 40])
def test_an_interruption_leaves_nothing_half_written(shelf: Path, tmp_path: Path, number: int) -> None:
    """A ``KeyboardInterrupt`` in the middle, as Ctrl-C sends it, ends all threads and removes temporary files."""
    seen = iter(range(1, 10_000))

    def interrupt(_done: int, _total: int) -> None:
        if next(seen) == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform("save", shelf / "hf", tmp_path / "out", progress=interrupt)
    if (tmp_path / "out").exists():
        assert_unfinished(tmp_path / "out", shelf / "save")
    assert perform("save", shelf / "hf", tmp_path / "out").complete
    assert_same_folder(tmp_path / "out", shelf / "save")


@pytest.mark.parametrize("number", [1, 9, 33])
def test_a_bit_that_flips_on_its_way_to_the_disk_is_found(
    shelf: Path, tmp_path: Path, faults: Faults, number: int
) -> None:
    """Digests are of what should be written, so that ``verify`` sees that something else was."""
    seen: list[str] = []

    def flip(call: Call) -> Any:
        if call.operation == "write" and call.key.endswith(".safetensors"):
            seen.append(call.key)
            return Flip(4321) if len(seen) == number else None
        return None

    faults.script = flip
    assert perform("save", shelf / "hf", f"faulty://{tmp_path / 'out'}", concurrency=1).complete
    report = shardtool.verify(tmp_path / "out")
    assert report.exit_code == 1
    assert [check.key for check in report.files if not check.ok] == [seen[number - 1]]


# Servers.


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 server, and stores that do not wait long between their tries."""
    with Proxy(s3_server.endpoint) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        monkeypatch.setitem(stores.SCHEMES, "s3", f"{__name__}:quick")
        yield made


def quick(uri: str) -> S3Store:
    return S3Store(uri, attempts=4, backoff=0.01)


FEW: dict[str, Any] = {"tp": 2, "max_part_size": 20_000, "memory_limit": 0}


@pytest.fixture(scope="module")
def few(shelf: Path) -> Path:
    """A model of one layer (``hf``) and its shards in two parts for each rank: requests take their time."""
    config = builders.config(num_hidden_layers=1, vocab_size=256)
    builders.put(shelf / "few" / "hf", builders.model(config, builders.tensors(config)))
    shardtool.save(shelf / "few" / "hf", shelf / "few" / "save", **FEW)
    return shelf / "few"


TROUBLES: dict[str, dict[str, Any]] = {
    "SlowDown": {"refused": 2},
    "InternalError": {"refused": 2, "status": 500, "code": "InternalError"},
    "cut bodies": {"methods": ("GET",), "cuts": 1, "cut_after": 1000},
    "resets": {"methods": ("GET",), "cuts": 1, "cut_after": 1000, "reset": True},
    "lost answers": {"methods": ("PUT", "POST"), "lost": 2},
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_with_a_server_that_passes(few: Path, bucket: str, proxy: Proxy, trouble: str) -> None:
    """Refusals, cut connections and lost answers in mid-run are overcome; the bytes are right."""
    uri = f"s3://{bucket}/source"
    builders.put(uri, builders.contents(few / "hf"))

    def begin() -> None:
        for name, value in TROUBLES[trouble].items():
            setattr(proxy.trouble, name, value)

    out = f"s3://{bucket}/out"
    assert shardtool.save(uri, out, progress=Midway(begin, 0.1), concurrency=2, **FEW).complete
    assert builders.unplaced(out) == builders.unplaced(few / "save")
    left = proxy.trouble.refused + proxy.trouble.cuts + proxy.trouble.lost
    assert left == 0, "the trouble never came"


@pytest.mark.parametrize("side", ["source", "output"])
def test_a_server_that_goes_away(few: Path, tmp_path: Path, bucket: str, proxy: Proxy, side: str) -> None:
    """After some tries the run ends with ``Unavailable`` and no mark; when the server is back it is finished."""
    uri = f"s3://{bucket}/{side}"
    if side == "source":
        builders.put(uri, builders.contents(few / "hf"))
    source, out = (uri, tmp_path / "out") if side == "source" else (few / "hf", uri)

    def begin() -> None:
        proxy.trouble.refused = 1 << 30

    with pytest.raises(Unavailable, match=r"s3://") as caught:
        shardtool.save(source, out, progress=Midway(begin, 0.1), **FEW)
    assert caught.value.exit_code == 5
    proxy.trouble.refused = 0
    left = builders.contents(out)
    assert not [mark for mark in MARKS if mark in left]
    assert shardtool.save(source, out, **FEW).complete
    assert builders.unplaced(out) == builders.unplaced(few / "save")


def test_no_server_at_all(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence and exit code 5, on the command line too."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(stores.SCHEMES, "s3", f"{__name__}:quick")
    with pytest.raises(Unavailable, match="s3://bucket/model"):
        shardtool.save("s3://bucket/model", tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()
