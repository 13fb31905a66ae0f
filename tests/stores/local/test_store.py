"""LocalStore obeys every law on a real disk, and keeps its promises when disks are full or processes are killed."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shardtool.errors import AccessDenied, AlreadyExists, NotFound, ShardtoolError, StoreError, UsageError
from shardtool.stores.base import Object, Store, Unfinished, Writer
from shardtool.stores.local import store as local
from shardtool.stores.local.files import Kind, kind_of
from shardtool.stores.local.store import LocalStore
from shardtool.stores.memory import MemoryStore
from shardtool.testing import StoreContract

ROOT = Path(__file__).parents[3]
IS_ROOT = os.geteuid() == 0
CAN_MOUNT = IS_ROOT and sys.platform == "linux" and not subprocess.call(["unshare", "--mount", "true"])


class TestLocalStore(StoreContract):
    """Every law holds in a folder, and no test leaves a temporary file."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[LocalStore]:
        with LocalStore(tmp_path / "made" / "on demand") as store:
            os.makedirs(store.uri)
            yield store
        assert list(tmp_path.rglob("*.tmp")) == []


class TestLocalStoreWithOneOpenFile(StoreContract):
    """Every law holds when files are closed and opened again all the time."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[LocalStore]:
        with LocalStore(tmp_path, open_files=1) as store:
            yield store


class TestLocalStoreWithoutHardLinks(StoreContract):
    """File systems such as exFAT and some network mounts have none; only the exclusive create is different."""

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalStore]:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
        with LocalStore(tmp_path) as store:
            yield store


def files(folder: Path) -> list[str]:
    """Everything below a folder, temporary files and folders included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; who may not mount one gets a folder and a limit of 4 MiB for the size of files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if CAN_MOUNT:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
        try:
            yield folder
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs ``code`` with the store's module at hand and its arguments in ``sys.argv[1:]``."""
    return subprocess.Popen(
        [sys.executable, "-c", "import sys\n" + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


# Folders


def test_the_folder_is_made_when_something_is_created(tmp_path: Path) -> None:
    root = tmp_path / "new" / "folder"
    with LocalStore(root) as store:
        assert files(tmp_path) == []
        store.put("a/b", b"x")
    assert files(root) == ["a", "a/b"]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "missing")
    room = memoryview(bytearray(1))
    for read in (store.list, lambda: store.stat("a"), lambda: store.readinto("a", 0, room)):
        with pytest.raises(NotFound, match=r"folder .*missing does not exist"):
            read()
    store.delete("a")
    assert not (tmp_path / "missing").exists()


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"model\.safetensors is a file"):
        LocalStore(tmp_path / "model.safetensors")


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"x")
    with pytest.raises(StoreError, match="a/b"):
        store.put("a/b", b"y")
    with pytest.raises(StoreError, match="below"):
        LocalStore(tmp_path / "a" / "below").put("b", b"y")
    assert files(tmp_path) == ["a"]


def test_a_folder_in_the_way_of_a_file_is_an_error(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"x")
    with pytest.raises(StoreError, match="/a "):
        store.put("a", b"y")
    assert files(tmp_path) == ["a", "a/b"]


def test_files_are_readable_by_whom_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalStore(tmp_path).put("a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_commit_leaves_only_the_file(tmp_path: Path) -> None:
    LocalStore(tmp_path).put("a", b"x")
    LocalStore(tmp_path).put("b", b"x", exclusive=True)
    assert files(tmp_path) == ["a", "b"]


def test_the_temporary_file_looks_like_nothing_else(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    writer = store.create("model-rank-0-part-0.safetensors", 5)
    (temporary,) = (tmp_path / ".shardtool" / "tmp").iterdir()
    assert temporary.suffix == ".tmp"
    assert "model" not in temporary.name
    writer.abort()
    assert files(tmp_path) == []


def test_records_beside_temporary_files_are_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put(".shardtool/plan/record.json", b"{}")
    writer = store.create("a", 0)
    assert [found.key for found in store.list()] == [".shardtool/plan/record.json"]
    assert [found.key for found in store.list(".shardtool/")] == [".shardtool/plan/record.json"]
    writer.abort()


@pytest.mark.parametrize("key", [".shardtool/tmp", ".shardtool/tmp/a", ".shardtool/tmp/a/b.tmp"])
def test_the_place_for_temporary_files_is_reserved(tmp_path: Path, key: str) -> None:
    store = LocalStore(tmp_path)
    for call in (store.stat, store.delete, lambda key: store.create(key, 1)):
        with pytest.raises(UsageError, match="temporary"):
            call(key)


# Links


def test_a_cache_of_links_reads_like_files(tmp_path: Path) -> None:
    """A Hugging Face snapshot is a folder of links to blobs; writing and deleting spare the blob."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "123").write_bytes(b"content")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    (snapshot / "gone.json").symlink_to("../../blobs/456")
    with LocalStore(snapshot) as store:
        assert list(store.list()) == [Object("model.safetensors", 7)]
        assert store.get("model.safetensors", limit=7) == b"content"
        with pytest.raises(NotFound, match=r"gone\.json"):
            store.stat("gone.json")
        store.put("model.safetensors", b"replaced")
        store.delete("gone.json")
    assert files(snapshot) == ["model.safetensors"]
    assert (blobs / "123").read_bytes() == b"content"


def test_a_linked_folder_can_be_read_but_not_changed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "a").write_bytes(b"x")
    (inside / "link").symlink_to(outside)
    with LocalStore(inside) as store:
        assert list(store.list()) == [Object("link/a", 1)]
        assert store.get("link/a", limit=1) == b"x"
        for change in (lambda: store.put("link/b", b"y"), lambda: store.delete("link/a")):
            with pytest.raises(UsageError, match="leaves"):
                change()
    assert files(outside) == ["a"]


def test_a_folder_that_becomes_a_link_while_writing_is_noticed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    outside.mkdir()
    writer = LocalStore(inside).create("link/a", 0)
    (inside / "link").symlink_to(outside)
    with pytest.raises(UsageError, match="leaves"):
        writer.commit()
    writer.abort()
    assert files(outside) == []


def test_a_link_inside_the_store_is_a_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("real/a", b"x")
    (tmp_path / "alias").symlink_to("real")
    store.put("alias/b", b"y")
    assert [found.key for found in store.list()] == ["alias/a", "alias/b", "real/a", "real/b"]


def test_links_in_a_circle_are_listed_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"x")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to("self")
    assert [found.key for found in store.list()] == ["a/b"]


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    LocalStore(tmp_path / "link").put("a/b", b"x")
    assert (tmp_path / "real" / "a" / "b").read_bytes() == b"x"


def test_only_files_are_objects(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    store = LocalStore(tmp_path)
    assert list(store.list()) == []
    for name in ("pipe", "empty"):
        with pytest.raises(NotFound):
            store.readinto(name, 0, memoryview(bytearray(1)))


# Open files


def test_open_files_are_bounded_and_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))

    def opened() -> int:
        return len(os.listdir("/dev/fd")) - before

    store = LocalStore(tmp_path, open_files=4)
    for number in range(20):
        store.put(f"f{number}", bytes([number]))

    def read(number: int) -> bool:
        room = bytearray(1)
        store.readinto(f"f{number % 20}", 0, memoryview(room))
        return room[0] == number % 20

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))
    assert opened() == 4
    store.close()
    assert opened() == 0
    assert read(3)
    store.close()


def test_a_file_replaced_by_others_is_read_anew(tmp_path: Path) -> None:
    """The cache of open files must not serve what was at the path before."""
    room = bytearray(3)
    with LocalStore(tmp_path) as store:
        store.put("a", b"old")
        store.readinto("a", 0, memoryview(room))
        (tmp_path / "other").write_bytes(b"new")
        os.replace(tmp_path / "other", tmp_path / "a")
        store.readinto("a", 0, memoryview(room))
        assert room == b"new"
        (tmp_path / "a").unlink()
        with pytest.raises(NotFound):
            store.readinto("a", 0, memoryview(room))


# Failures


def test_a_full_disk_shows_at_once_and_leaves_nothing(small_disk: Path) -> None:
    store = LocalStore(small_disk)
    store.put("before", bytes(1 << 20))
    with pytest.raises(StoreError, match=r"no space left on the disk of .*model\.bin"):
        store.create("model.bin", 8 << 20)
    assert files(small_disk) == ["before"]
    store.put("after", bytes(1 << 20))


def test_a_disk_that_fills_up_while_writing_leaves_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens where space cannot be reserved, as on macOS."""
    monkeypatch.setattr(local, "LIBRARY", None)
    writer = LocalStore(small_disk).create("model.bin", 8 << 20)
    with pytest.raises(StoreError, match="no space left"):
        writer.write(0, bytes(8 << 20))
    with pytest.raises(UsageError):
        writer.commit()
    writer.abort()
    assert files(small_disk) == []


def test_a_file_system_that_reserves_nothing_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def fallocate(self, *_: int) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    monkeypatch.setattr(local, "LIBRARY", Refusing())
    LocalStore(tmp_path).put("a", b"x")
    assert files(tmp_path) == ["a"]


def test_space_is_reserved_where_the_file_system_can(tmp_path: Path) -> None:
    writer = LocalStore(tmp_path).create("model.bin", 3 << 20)
    (temporary,) = (tmp_path / ".shardtool" / "tmp").iterdir()
    info = temporary.stat()
    with open(temporary, "rb") as file:
        can = kind_of(file.fileno()) is not Kind.OTHER
    writer.abort()
    assert (info.st_size, info.st_blocks * 512 >= 3 << 20) == ((3 << 20, True) if can else (0, False))


def test_a_file_size_limit_is_a_lack_of_space(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StoreError, match=r"no space left .*model\.bin"):
            LocalStore(tmp_path).put("model.bin", bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == []


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with one object ``a`` in which nothing can be written: for root only a mount does that."""
    if IS_ROOT and not CAN_MOUNT:
        pytest.skip("root may write everywhere, and may not mount here: run this test as another user")
    folder = tmp_path / "fixed"
    folder.mkdir()
    (folder / "a").write_bytes(b"x")
    if CAN_MOUNT:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    else:
        folder.chmod(0o555)
    try:
        yield folder
    finally:
        if CAN_MOUNT:
            subprocess.run(["umount", folder], check=True)
        else:
            folder.chmod(0o755)


def test_a_read_only_folder_can_be_read_and_says_no_to_the_rest(read_only: Path) -> None:
    with LocalStore(read_only) as store:
        assert store.get("a", limit=1) == b"x"
        with pytest.raises(AccessDenied, match=str(read_only / "b")):
            store.create("b", 1)
        with pytest.raises(AccessDenied, match=str(read_only / "a")):
            store.delete("a")
    assert files(read_only) == ["a"]


def test_a_file_without_permission_is_access_denied() -> None:
    code = """
        import os
        from shardtool.errors import AccessDenied
        from shardtool.stores.local.store import LocalStore
        if os.geteuid() == 0:  # only now, when everything is imported
            os.setgroups([]), os.setgid(65534), os.setuid(65534)
        store = LocalStore(sys.argv[1])
        for call in (lambda: store.get("secret", limit=1), lambda: store.create("new", 1)):
            try:
                call()
            except AccessDenied as error:
                print(error)
    """
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which others may not enter
        folder = Path(name)
        (folder / "secret").write_bytes(b"x")
        (folder / "secret").chmod(0)
        folder.chmod(0o555)
        with python(code, folder) as process:
            out, err = process.communicate()
        assert f"{folder}/secret cannot be read" in out, err
        assert f"{folder}/new cannot be written" in out, err
        assert files(folder) == ["secret"]
        folder.chmod(0o755)


WRITE_HALF = """
    import time
    from shardtool.stores.local.store import LocalStore
    writer = LocalStore(sys.argv[1]).create("model.bin", 2000)
    writer.write(0, bytes(1000))
    print("half", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def half_written(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has written half of ``model.bin`` and waits."""
    with python(WRITE_HALF, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        yield process
        process.kill()


def test_a_killed_writer_leaves_nothing_to_see_and_is_swept_up(
    tmp_path: Path, half_written: subprocess.Popen[str]
) -> None:
    half_written.send_signal(signal.SIGKILL)
    half_written.wait()
    with LocalStore(tmp_path) as store:
        assert list(store.list()) == []
        assert len(list(tmp_path.rglob("*.tmp"))) == 1
        store.put("other", b"x")
        assert files(tmp_path) == ["other"]


def test_what_a_killed_writer_left_is_known_by_its_key_and_its_age(
    tmp_path: Path, half_written: subprocess.Popen[str]
) -> None:
    (folder,) = tmp_path.rglob("tmp")
    (path,) = folder.iterdir()
    hour = time.time() - 3600
    os.utime(path, (hour, hour))
    with LocalStore(tmp_path) as store:
        (living,) = store.unfinished()
        assert abs(living.since - time.time()) < 60  # whoever writes still has it locked
        half_written.send_signal(signal.SIGKILL)
        half_written.wait()
        (dead,) = store.unfinished()
        assert dead == Unfinished("model.bin", path.name, dead.since, dead.size)
        assert abs(dead.since - hour) < 1
        assert path.exists()  # looking sweeps nothing
        store.discard(dead)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["left.tmp", f"{'0' * 32}-Li4vYQ.tmp", f"{'0' * 32}-!.tmp", f"{'0' * 32}.tmp"])
def test_a_temporary_file_that_does_not_tell_its_key_goes_by_its_own_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / ".shardtool" / "tmp"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"x")
    (left,) = LocalStore(tmp_path).unfinished()
    assert (left.key, left.name, left.size) == (f".shardtool/tmp/{name}", name, 1)


def test_a_key_that_is_too_long_to_be_told_is_written_all_the_same(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    key = "/".join(["folder" * 20] * 3)
    writer = store.create(key, 1)
    (left,) = store.unfinished()
    assert left.key == f".shardtool/tmp/{left.name}"
    writer.write(0, b"x")
    writer.commit()
    assert store.exists(key)


@pytest.mark.parametrize("name", ["../../a", "/etc/passwd", "", ".."])
def test_nothing_is_discarded_elsewhere(tmp_path: Path, name: str) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"x")
    store.create("b", 1)
    store.discard(Unfinished("a", name))
    assert store.exists("a")
    store.close()


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path, half_written: subprocess.Popen[str]) -> None:
    LocalStore(tmp_path).put("other", b"x")
    assert half_written.poll() is None
    assert len(list(tmp_path.rglob("*.tmp"))) == 1


def test_what_another_store_of_this_process_writes_is_left_alone(tmp_path: Path) -> None:
    writer = LocalStore(tmp_path).create("a", 1)
    LocalStore(tmp_path).put("b", b"x")
    writer.write(0, b"y")
    writer.commit()
    assert files(tmp_path) == ["a", "b"]


def test_files_of_others_are_not_swept(tmp_path: Path) -> None:
    folder = tmp_path / ".shardtool" / "tmp"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "left.tmp").write_text("nobody's")
    LocalStore(tmp_path).put("a", b"x")
    assert files(tmp_path) == [".shardtool", ".shardtool/tmp", ".shardtool/tmp/notes.txt", "a"]


def test_a_folder_that_empties_again_and_again_is_no_obstacle(tmp_path: Path) -> None:
    """Writers remove the folder for temporary files, and deleters empty folders, while others are about to use them."""
    stores = [LocalStore(tmp_path) for _ in range(4)]

    def work(number: int) -> None:
        for turn in range(40):
            stores[number].put(f"folder/{number}", bytes([turn]))
            stores[number].delete(f"folder/{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert [path for path in files(tmp_path) if path != "folder"] == []


class LocalAgainstMemory(RuleBasedStateMachine):
    """Whatever is done to a folder and to the model, both answer the same."""

    keys = st.sampled_from(["a", "b/c", "b/d", "b.x", "b0", "e/f/g", ".shardtool/record", "../a"])
    contents = st.binary(max_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.stores: tuple[Store, ...] = (LocalStore(self.folder.name, open_files=2), MemoryStore())
        self.writers: list[tuple[tuple[Writer, ...], bytes]] = []

    def both(self, call: Callable[[Store], object]) -> object:
        """The answer or the kind of error that both stores give."""
        return self.same([call_or_error(partial(call, store)) for store in self.stores])

    @staticmethod
    def same(answers: list[object]) -> object:
        """The one answer that all gave."""
        assert answers[0] == answers[1]
        return answers[0]

    @rule(key=keys, data=contents, exclusive=st.booleans())
    def put(self, key: str, data: bytes, exclusive: bool) -> None:
        self.both(lambda store: store.put(key, data, exclusive=exclusive))

    @rule(key=keys)
    def delete(self, key: str) -> None:
        self.both(lambda store: store.delete(key))

    @rule(key=keys)
    def stat(self, key: str) -> None:
        self.both(lambda store: store.stat(key))

    @rule(key=keys, start=st.integers(-1, 9), size=st.integers(0, 9))
    def read(self, key: str, start: int, size: int) -> None:
        def read(store: Store) -> bytes:
            room = bytearray(size)
            store.readinto(key, start, memoryview(room))
            return bytes(room)

        self.both(read)

    @rule(prefix=st.sampled_from(["", "a", "b", "b/", "b.", ".", ".shardtool", "e/f", "x"]))
    def list(self, prefix: str) -> None:
        self.both(lambda store: [*store.list(prefix)])

    @rule(key=keys.filter(lambda key: key[0] != "."), data=contents, exclusive=st.booleans())
    def begin(self, key: str, data: bytes, exclusive: bool) -> None:
        self.writers.append((tuple(store.create(key, len(data), exclusive=exclusive) for store in self.stores), data))

    @rule(chance=st.randoms(use_true_random=False), offset=st.integers(0, 8), size=st.integers(0, 8))
    def write(self, chance: random.Random, offset: int, size: int) -> None:
        if self.writers:
            writers, data = chance.choice(self.writers)
            piece = data[offset : offset + size]
            self.same([call_or_error(partial(writer.write, offset, piece)) for writer in writers])

    @rule(chance=st.randoms(use_true_random=False), end=st.sampled_from(["commit", "abort"]), rest=st.booleans())
    def end(self, chance: random.Random, end: str, rest: bool) -> None:
        if self.writers:
            writers, data = chance.choice(self.writers)
            if rest:
                self.same([call_or_error(partial(writer.write, 0, data)) for writer in writers])
            self.same([call_or_error(getattr(writer, end)) for writer in writers])

    @invariant()
    def the_same_is_visible(self) -> None:
        self.both(lambda store: [(found, store.get(found.key, limit=8)) for found in store.list()])

    def teardown(self) -> None:
        """Nothing is left but objects when all writers have ended."""
        for writers, _ in self.writers:
            for writer in writers:
                writer.abort()
        assert not (Path(self.folder.name) / ".shardtool" / "tmp").exists()
        for store in self.stores:
            store.close()
        self.folder.cleanup()


def call_or_error(call: Callable[[], object]) -> object:
    """What a call returns, or the class of the error that it raises."""
    try:
        return call()
    except ShardtoolError as error:
        return type(error)


TestLocalAgainstMemory = LocalAgainstMemory.TestCase


def test_an_exclusive_create_says_where_the_object_is(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("record.json", b"x")
    with pytest.raises(AlreadyExists, match=str(tmp_path / "record.json")):
        store.put("record.json", b"y", exclusive=True)
