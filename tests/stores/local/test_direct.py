"""Files are read and written past the page cache where that pays, and every byte is where it belongs all the same."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.errors import FormatError, NotFound, StoreError
from shardtool.stores.local import direct
from shardtool.stores.local.direct import BUFFER, LARGE, PAGE
from shardtool.stores.local.files import DISKS, Kind, kind_of
from shardtool.stores.local.store import LocalStore
from shardtool.testing import StoreContract, write
from tests.stores.local.test_store import CAN_MOUNT, files

MIB = 1 << 20
CONTENT = random.Random(4).randbytes(3 * MIB + 1234)


class TestPastThePageCache(StoreContract):
    """Every law holds where whatever is read and written goes past the page cache."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[LocalStore]:
        with LocalStore(tmp_path, direct=True) as store:
            yield store
        assert list(tmp_path.rglob("*.tmp")) == []


class TestThroughThePageCache(StoreContract):
    """Every law holds where nothing does."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[LocalStore]:
        with LocalStore(tmp_path, direct=False) as store:
            yield store


class Spy:
    """Watches the system calls; each is noted as its way and the sizes of its pieces of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[tuple[str, list[int]]] = []
        self.writes: list[tuple[str, list[int]]] = []
        self._patch(monkeypatch, "preadv", self.reads)
        self._patch(monkeypatch, "pwritev", self.writes)

    @staticmethod
    def _patch(monkeypatch: pytest.MonkeyPatch, name: str, noted: list[tuple[str, list[int]]]) -> None:
        call = getattr(os, name)

        def watched(fd: int, pieces: Sequence[memoryview], offset: int, flags: int = 0) -> int:
            if not flags:  # else it only asks what is in memory
                noted.append(("past" if is_direct(fd) else "through", [memoryview(piece).nbytes for piece in pieces]))
            return call(fd, pieces, offset, flags)

        monkeypatch.setattr(os, name, watched)

    @property
    def ways(self) -> set[str]:
        """How it was read."""
        return {way for way, _ in self.reads}


def is_direct(fd: int) -> bool:
    """Whether a descriptor goes past the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder on a local disk, with a file that is not in memory."""
    path = tmp_path / "model.bin"
    path.write_bytes(CONTENT)
    with open(path, "rb") as file:
        if kind_of(file.fileno()) not in DISKS:
            pytest.skip(f"{tmp_path} is on no local disk: give pytest a --basetemp that is")
    cool(path)
    return tmp_path


def cool(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(size: int, rest: int) -> memoryview:
    """``size`` bytes at an address that leaves ``rest`` modulo 4096, all of them 0xaa, as are those around."""
    whole = memoryview(mmap.mmap(-1, (-(-(size + rest) // PAGE) + 1) * PAGE))
    whole[:] = b"\xaa" * len(whole)
    return whole[rest : rest + size]


def around(view: memoryview) -> set[int]:
    """Which bytes there are beside those of ``view``."""
    whole = memoryview(view.obj)
    start = address(view) - address(whole)
    return {*whole[:start], *whole[start + len(view) :]}


def address(view: memoryview) -> int:
    """Where memory lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


# Reading


@pytest.mark.parametrize("start", [0, 1, PAGE, 5 * PAGE - 1, 123_457])
@pytest.mark.parametrize("size", [LARGE, MIB, MIB + 77])
def test_what_is_not_in_memory_is_read_past_the_cache_without_a_copy(
    disk: Path, spy: Spy, start: int, size: int
) -> None:
    """One call fills memory that lies as the file does, but for a page at each end, and nothing else is touched."""
    room = memory(size, start % PAGE)
    with LocalStore(disk) as store:
        store.readinto("model.bin", start, room)
    assert room == CONTENT[start : start + size]
    assert around(room) == {0xAA}
    ((way, pieces),) = spy.reads
    assert way == "past"
    assert max(pieces) >= size - 2 * PAGE
    assert sum(pieces) - size < 2 * PAGE


@pytest.mark.parametrize(("start", "rest"), [(100, 8), (0, 1), (4095, 0), (1, PAGE - 1), (2 * PAGE, 2048)])
def test_memory_that_lies_otherwise_is_filled_where_it_can_and_put_right(
    disk: Path, spy: Spy, start: int, rest: int
) -> None:
    """From its first whole page on, with one call; then the bytes are moved, so no other memory is taken."""
    size = len(CONTENT) - start - 5
    room = memory(size, rest)
    with LocalStore(disk) as store:
        store.readinto("model.bin", start, room)
    assert room == CONTENT[start:-5]
    assert around(room) == {0xAA}
    ((way, pieces),) = spy.reads
    assert way == "past"
    assert max(pieces) >= size - 2 * PAGE
    assert sum(pieces) - size < 2 * PAGE


def test_a_long_range_is_put_right_in_pieces(disk: Path, spy: Spy) -> None:
    """So that the disk is not idle while all of it is moved."""
    data = CONTENT * 6
    (disk / "long").write_bytes(data)
    room = memory(len(data) - 1, 0)
    with LocalStore(disk, direct=True) as store:
        store.readinto("long", 1, room)
    assert room == data[1:]
    assert len(spy.reads) == 3
    assert spy.ways == {"past"}


def test_what_is_in_memory_is_copied_from_there(disk: Path, spy: Spy) -> None:
    (disk / "model.bin").read_bytes()
    room = memory(2 * MIB, 0)
    with LocalStore(disk) as store:
        store.readinto("model.bin", 0, room)
    assert room == CONTENT[: 2 * MIB]
    assert spy.reads == [("through", [2 * MIB])]


def test_what_is_small_is_read_as_ever(disk: Path, spy: Spy) -> None:
    """Headers cost one call more than none, and the files of a checkpoint one descriptor each."""
    before = len(os.listdir("/dev/fd"))
    with LocalStore(disk) as store:
        store.readinto("model.bin", 0, memory(LARGE - 1, 0))
        assert len(os.listdir("/dev/fd")) == before + 1
    assert spy.reads == [("through", [LARGE - 1])]


@pytest.mark.parametrize(("switch", "way"), [(True, "past"), (False, "through")])
def test_the_way_can_be_ordered(disk: Path, spy: Spy, switch: bool, way: str) -> None:
    """Whatever is in memory, and however small it is."""
    with LocalStore(disk, direct=switch) as store:
        for size in (10, MIB):
            for warm in (False, True):
                if warm:
                    (disk / "model.bin").read_bytes()
                else:
                    cool(disk / "model.bin")
                room = memory(size, 77)
                store.readinto("model.bin", 77, room)
                assert room == CONTENT[77 : 77 + size]
    assert spy.ways == {way}


def test_files_that_are_all_in_memory_are_not_asked(spy: Spy, tmp_path: Path) -> None:
    """On tmpfs there is nothing to go past."""
    if not CAN_MOUNT:
        pytest.skip("this user may not mount a tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], check=True)
    try:
        with LocalStore(tmp_path) as store:
            store.put("a", CONTENT)
            room = memory(MIB, 0)
            store.readinto("a", PAGE, room)
            (file,) = store._files._files.values()
            assert file.kind is Kind.MEMORY
        assert room == CONTENT[PAGE : PAGE + MIB]
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert spy.ways == {"through"}


def test_layers_over_a_disk_are_read_and_written_like_it(disk: Path, spy: Spy) -> None:
    """A container's own folders (overlayfs) are on a disk in truth; what is in memory of them is told otherwise."""
    if not CAN_MOUNT:
        pytest.skip("this user may not mount an overlay")
    for name in ("upper", "work", "merged"):
        (disk / name).mkdir()
    options = f"lowerdir={disk},upperdir={disk}/upper,workdir={disk}/work"
    done = subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", disk / "merged"], capture_output=True)
    if done.returncode:
        pytest.skip(f"no overlay can be mounted here: {done.stderr.decode()}")
    try:
        room = memory(MIB, 0)
        with LocalStore(disk / "merged") as store:
            store.readinto("model.bin", 0, room)
            assert room == CONTENT[:MIB]
            assert spy.ways == {"past"}
            spy.reads.clear()
            (disk / "merged" / "model.bin").read_bytes()
            store.readinto("model.bin", 0, room)
            assert spy.ways == {"through"}
            write(store, "new", CONTENT * 2)
        assert (disk / "upper" / "new").read_bytes() == CONTENT * 2
        assert spy.writes[0][0] == "past"
    finally:
        subprocess.run(["umount", disk / "merged"], check=True)


def refuse_opening(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make opening past the cache fail, as some file systems do; returns the tries."""
    call, tries = os.open, []

    def refusing(path: str, flags: int, *rest: int, **others: int) -> int:
        if flags & os.O_DIRECT:
            tries.append(flags)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(path, flags, *rest, **others)

    monkeypatch.setattr(os, "open", refusing)
    return tries


def refuse_calls(monkeypatch: pytest.MonkeyPatch, name: str, code: int = errno.EINVAL) -> list[int]:
    """Make reading or writing past the cache fail; returns the tries."""
    call, tries = getattr(os, name), []

    def refusing(fd: int, pieces: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if is_direct(fd):
            tries.append(offset)
            raise OSError(code, os.strerror(code))
        return call(fd, pieces, offset, flags)

    monkeypatch.setattr(os, name, refusing)
    return tries


@pytest.mark.parametrize("rest", [0, 8])
@pytest.mark.parametrize(
    "refuse", [refuse_opening, lambda patch: refuse_calls(patch, "preadv")], ids=["at open", "at read"]
)
def test_a_file_that_cannot_be_read_past_the_cache_is_tried_once(
    disk: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], list[int]], rest: int
) -> None:
    tries = refuse(monkeypatch)
    with LocalStore(disk) as store:
        for start in (0, MIB, 2 * MIB):
            room = memory(MIB, rest)
            store.readinto("model.bin", start, room)
            assert room == CONTENT[start : start + MIB]
    assert len(tries) == 1


def test_a_disk_that_fails_is_an_error(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails past the cache fails through it too."""

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with LocalStore(disk) as store, pytest.raises(StoreError, match=r"reading .*model\.bin failed"):
        store.readinto("model.bin", 0, memory(MIB, 0))


@pytest.mark.parametrize("rest", [0, 8])
@pytest.mark.parametrize("end", [0, 1, PAGE, MIB - 1, MIB + PAGE + 5])
def test_a_file_that_shrinks_ends_sooner(disk: Path, end: int, rest: int) -> None:
    """While it is open too; the message has its size, and the memory beside the view is left alone."""
    with LocalStore(disk) as store:
        store.readinto("model.bin", 0, memory(MIB, 0))
        os.truncate(disk / "model.bin", end)
        for size in (LARGE, 2 * MIB):
            room = memory(size, rest)
            with pytest.raises(FormatError, match=f"ends at byte {end}, before byte"):
                store.readinto("model.bin", max(0, end + 1 - size), room)
            assert around(room) == {0xAA}


@pytest.mark.parametrize("rest", [0, 8])
def test_a_file_is_read_to_its_last_byte(disk: Path, spy: Spy, rest: int) -> None:
    """Its last page is not whole, and still nothing is read twice."""
    start = len(CONTENT) // PAGE * PAGE - MIB
    room = memory(len(CONTENT) - start, rest)
    with LocalStore(disk) as store:
        store.readinto("model.bin", start, room)
    assert room == CONTENT[start:]
    assert spy.ways == {"past"}


def test_what_is_at_the_path_now_is_read(disk: Path) -> None:
    """Another file of the same name is not read by the old descriptors, and a file that is gone is gone."""
    room = memory(MIB, 0)
    with LocalStore(disk, direct=True) as store:
        store.readinto("model.bin", 0, room)
        (disk / "other").write_bytes(CONTENT[::-1])
        os.replace(disk / "other", disk / "model.bin")
        store.readinto("model.bin", 0, room)
        assert room == CONTENT[::-1][:MIB]
        (disk / "model.bin").unlink()
        with pytest.raises(NotFound):
            store.readinto("model.bin", 0, room)


def test_descriptors_are_bounded_and_closed(disk: Path) -> None:
    """A file has two at most where its owner reads it, and none when its turn is over."""
    before = len(os.listdir("/dev/fd"))
    for number in range(6):
        (disk / str(number)).write_bytes(CONTENT[number : number + MIB])

    def read(number: int) -> bool:
        room = memory(MIB, 0)
        store.readinto(str(number % 6), 0, room)
        return room == CONTENT[number % 6 :][:MIB]

    with LocalStore(disk, open_files=2, direct=True) as store, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))
        assert len(os.listdir("/dev/fd")) == before + 4
    assert len(os.listdir("/dev/fd")) == before


class Crowd:
    """Counts how many threads are inside a call at once, and keeps each there for a moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self._inside = 0
        self._lock = threading.Lock()
        call = os.preadv

        def watched(fd: int, pieces: Sequence[memoryview], offset: int, flags: int = 0) -> int:
            with self._lock:
                self._inside += not flags
                self.most = max(self.most, self._inside)
            threading.Event().wait(0.01)
            try:
                return call(fd, pieces, offset, flags)
            finally:
                with self._lock:
                    self._inside -= not flags

        monkeypatch.setattr(os, "preadv", watched)


def read_by(threads: int, store: LocalStore, *, rest: int = 0) -> None:
    """Let so many threads read the same 512 KiB."""

    def read(_: int) -> bool:
        room = memory(MIB // 2, rest)
        store.readinto("model.bin", 0, room)
        return room == CONTENT[: MIB // 2]

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(read, range(2 * threads)))


def test_no_more_copies_run_at_once_than_there_are_cores(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying what is in memory is the processors' work; reads from the disk are not held up."""
    monkeypatch.setattr(direct, "cores", lambda: 2)
    (disk / "model.bin").read_bytes()
    crowd = Crowd(monkeypatch)
    with LocalStore(disk) as store:
        read_by(12, store)
    assert crowd.most == 2
    cool(disk / "model.bin")
    with LocalStore(disk) as store:
        read_by(12, store)
    assert crowd.most > 2


def test_memory_for_reading_is_bounded_and_foretold(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some pages for each thread, wherever the memory lies into which it reads."""
    Crowd(monkeypatch)  # so that all are in it at once
    threads = 16
    with LocalStore(disk, direct=True) as store:
        read_by(threads, store, rest=8)
        read_by(threads, store, rest=0)
        assert 0 < sum(len(edges) for edges in store._reader._edges._free) <= store.reading(threads)
        assert store.reading(threads) <= threads * 3 * PAGE
        assert store.reading(1) < store.reading(2)
    assert not store._reader._edges._free
    assert LocalStore(disk, direct=False).reading(threads) == 0


# Writing


def test_a_large_file_is_written_past_the_cache_without_a_copy(disk: Path, spy: Spy) -> None:
    """After a header, slices that lie as the file does go out from where they lie, with what was gathered before."""
    header, body = CONTENT[:1000], memory(2 * MIB, 1000)
    body[:] = CONTENT[: 2 * MIB]
    with LocalStore(disk) as store:
        writer = store.create("new", 1000 + 2 * len(body))
        writer.write(0, header)
        writer.write(1000, body)
        writer.write(1000 + len(body), body)
        writer.commit()
    assert (disk / "new").read_bytes() == header + 2 * body.tobytes()
    whole = len(body) // PAGE * PAGE - PAGE
    assert spy.writes == [("past", [PAGE, whole]), ("past", [PAGE, len(body) - PAGE]), ("through", [1000])]


def test_slices_that_lie_otherwise_are_gathered(disk: Path, spy: Spy) -> None:
    with LocalStore(disk) as store:
        write(store, "new", CONTENT * 2, slice_size=100_001)
    assert (disk / "new").read_bytes() == CONTENT * 2
    assert {len(pieces) for _, pieces in spy.writes} == {1}
    assert [way for way, _ in spy.writes[:-1]] == ["past"] * (len(spy.writes) - 1)
    assert spy.writes[0] == ("past", [BUFFER])


def test_read_only_memory_is_written_from_where_it_lies(disk: Path, spy: Spy) -> None:
    """A mapped file is read-only."""
    with open(disk / "model.bin", "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    with LocalStore(disk, direct=True) as store:
        store.put("new", mapped)
    assert (disk / "new").read_bytes() == CONTENT
    assert spy.writes[0] == ("past", [len(CONTENT) // PAGE * PAGE])


def test_the_writer_holds_what_was_foretold(disk: Path) -> None:
    """A buffer for a file that goes past the cache, which the next one uses again; nothing for others."""
    with LocalStore(disk) as store:
        for size, held in ((4 * MIB, BUFFER), (4 * MIB - 1, 0), (0, 0)):
            writer = store.create("new", size)
            assert store.held(size) == held
            assert (writer._buffer is not None) == bool(held)
            writer.abort()
            writer.abort()
        write(store, "new", bytes(5 * MIB))
        assert len(store._buffers._free) == 1
    assert LocalStore(disk, direct=False).held(4 * MIB) == 0
    assert LocalStore(disk, direct=True).held(1) == BUFFER


def test_what_cannot_be_written_past_the_cache_goes_through_it(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether that shows when it is switched on or when it is first done."""
    tries = refuse_calls(monkeypatch, "pwritev")
    with LocalStore(disk) as store:
        write(store, "a", CONTENT * 2)
    assert len(tries) == 1

    def refusing(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(fd, command, flags)

    call = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refusing)
    with LocalStore(disk) as store:
        write(store, "b", CONTENT * 2)
    assert len(tries) == 1
    assert (disk / "a").read_bytes() == (disk / "b").read_bytes() == CONTENT * 2


@pytest.mark.parametrize("most", [PAGE, 5 * PAGE + 700, BUFFER + 1])
def test_calls_that_write_less_are_continued(disk: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Also where they stop in the middle of a page, behind which nothing can be written past the cache."""
    call = os.pwritev

    def short(fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        if is_direct(fd) and sum(len(piece) for piece in pieces) > most:
            with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as through:
                return os.pwrite(through.fileno(), b"".join(pieces)[:most], offset)
        return call(fd, pieces, offset)

    monkeypatch.setattr(os, "pwritev", short)
    body = memory(2 * MIB, 100)
    body[:] = CONTENT[: len(body)]
    with LocalStore(disk, direct=True) as store:
        writer = store.create("new", 100 + len(body))
        writer.write(0, CONTENT[:100])
        writer.write(100, body)
        writer.commit()
    assert (disk / "new").read_bytes() == CONTENT[:100] + body.tobytes()


def test_a_disk_without_space_is_named_and_left_as_it_was(disk: Path) -> None:
    """A real one, of which no space can be reserved for all that is written."""
    if not CAN_MOUNT:
        pytest.skip("this user may not mount a disk")
    (disk / "small").mkdir()
    image = disk / "image"
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    if subprocess.call(["mkfs.ext4", "-q", image]) or subprocess.call(["mount", "-o", "loop", image, disk / "small"]):
        pytest.skip("no disk can be made of a file here")
    try:
        (disk / "small" / "lost+found").rmdir()
        with LocalStore(disk / "small") as store:
            with pytest.raises(StoreError, match=r"no space left on the disk of .*new"):
                store.create("new", 64 * MIB)
            write(store, "fits", CONTENT * 2)
            assert store._buffers._free
            assert (disk / "small" / "fits").read_bytes() == CONTENT * 2
        assert files(disk / "small") == ["fits"]
    finally:
        subprocess.run(["umount", disk / "small"], check=True)


def test_space_that_runs_out_while_writing_is_an_error(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails past the cache, and again through it."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with LocalStore(disk) as store:
        monkeypatch.setattr(os, "pwritev", full)
        writer = store.create("new", 8 * MIB)
        with pytest.raises(StoreError, match="no space left"):
            writer.write(0, bytes(8 * MIB))
        writer.abort()
        assert len(store._buffers._free) == 1
    assert files(disk) == ["model.bin"]


# Any place, any size


@given(
    size=st.integers(0, 5 * PAGE),
    start=st.integers(0, 5 * PAGE),
    length=st.integers(1, 5 * PAGE),
    rest=st.integers(0, PAGE - 1) | st.none(),
)
def test_any_range_of_any_file_into_any_memory(
    tmp_path_factory: pytest.TempPathFactory, size: int, start: int, length: int, rest: int | None
) -> None:
    """Past the page cache comes what would come through it, and nothing beside it is touched."""
    folder = tmp_path_factory.getbasetemp() / "ranges"
    folder.mkdir(exist_ok=True)
    (folder / "a").write_bytes(CONTENT[:size])
    room = memory(length, start % PAGE if rest is None else rest)
    with LocalStore(folder, direct=True) as store:
        if start + length <= size:
            store.readinto("a", start, room)
            assert room == CONTENT[start : start + length]
        else:
            with pytest.raises(FormatError):
                store.readinto("a", start, room)
    assert around(room) == {0xAA}


@given(slices=st.lists(st.tuples(st.integers(0, 4 * LARGE), st.integers(0, PAGE - 1) | st.none()), max_size=6))
def test_any_slices_from_any_memory(
    tmp_path_factory: pytest.TempPathFactory, slices: list[tuple[int, int | None]]
) -> None:
    """A file has the bytes that were written, whatever their sizes and wherever they lay."""
    folder = tmp_path_factory.getbasetemp() / "slices"
    total = sum(size for size, _ in slices)
    expected = (CONTENT * 3)[:total]
    with LocalStore(folder, direct=True) as store:
        writer = store.create("a", total)
        offset = 0
        for size, rest in slices:
            view = memory(size, offset % PAGE if rest is None else rest)
            view[:] = expected[offset : offset + size]
            writer.write(offset, view)
            view[:] = bytes(size)
            offset += size
        writer.commit()
        assert (folder / "a").read_bytes() == expected
