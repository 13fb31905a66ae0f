"""The kernel is asked rightly where a file lies and whether it is in memory, and its silence is no error."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardtool.stores.local import residency
from shardtool.stores.local.files import DISKS, Kind, OpenFiles, kind_of

ROOT = Path(__file__).parents[3]
MIB = 1 << 20
SIZE = 16 * MIB
WAYS = (residency.counted, residency.mapped, residency.probed)

Way = Callable[[int, int, int], bool | None]


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of 16 MiB of which only the second half is in memory, opened to be read at random places."""
    path = tmp_path / "model.bin"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    fd = os.open(path, os.O_RDONLY)
    if kind_of(fd) not in DISKS:
        pytest.skip(f"{tmp_path} is on no local disk: give pytest a --basetemp that is")
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.preadv(fd, [bytearray(SIZE // 2)], SIZE // 2)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("start", "size", "cached"),
    [
        (0, SIZE // 2, False),
        (5, 300_000, False),
        (SIZE // 2, SIZE // 2, True),
        (SIZE - 300_000, 300_000, True),
        (SIZE - 1, 1, True),
    ],
)
def test_what_is_in_memory_is_told(fd: int, way: Way, start: int, size: int, cached: bool) -> None:
    """For ranges of which all is looked at, and for those of which only pieces are."""
    if way is residency.counted and residency._cachestat is None:
        pytest.skip("this kernel has no cachestat")
    assert way(fd, start, size) is cached


@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_told_is_none(fd: int, way: Way) -> None:
    """Nothing is told of a file that is not open."""
    closed = os.dup(fd)
    os.close(closed)
    assert way(closed, 0, MIB) is None


def test_a_mapping_is_gone_afterwards(fd: int) -> None:
    """Nothing of a file stays mapped, so nothing is killed when the file shrinks."""
    for start in range(0, SIZE, MIB):
        residency.mapped(fd, start, MIB)
    assert "model.bin" not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_without_the_system_call_the_others_are_asked(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on kernels before 6.5, or in a container that forbids it, or when this user is not told the truth."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    answers = []
    for counts, told in ((True, True), (False, True), (False, False)):
        if not counts:
            monkeypatch.setattr(residency, "_cachestat", None)
        monkeypatch.setattr(residency, "is_told", lambda _, told=told: told)
        files = OpenFiles(1)
        file = files.borrow(path)
        answers.append((file.cached(0, SIZE // 2), file.cached(SIZE // 2, SIZE // 2)))
        files.give_back(file)
        files.close()
    assert answers == [(False, True)] * 3


def test_where_nothing_is_told_a_disk_is_taken_for_cold(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And layers over something for warm, since it may be no disk."""
    for name in ("counted", "mapped", "probed"):
        monkeypatch.setattr(residency, name, lambda *_: None)
    answers = {}
    for kind in DISKS:
        files = OpenFiles(1)
        file = files.borrow(os.readlink(f"/proc/self/fd/{fd}"))
        file._kind = kind
        answers[kind] = file.cached(0, SIZE)
        files.give_back(file)
        files.close()
    assert answers == {Kind.DISK: False, Kind.LAYERS: True}


def test_a_stranger_asks_by_reading(tmp_path: Path) -> None:
    """Who neither owns a file nor may write it would be told that all is in memory, so other means are used."""
    code = """
        import os, sys
        from shardtool.stores.local import residency
        if os.geteuid() == 0:
            os.setgroups([]), os.setgid(65534), os.setuid(65534)
        fd = os.open("/bin/sh", os.O_RDONLY)
        os.pread(fd, 1 << 20, 0)
        print(residency.is_told(fd), residency.counted(fd, 0, 65536), residency.probed(fd, 0, 65536))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    told, counted, probed = done.stdout.split() or [done.stderr, "", ""]
    assert told == "False"
    assert counted in ("None", "True")  # kernel 6.5 told everybody
    assert probed == "True"


def test_an_owner_is_told(fd: int) -> None:
    assert residency.is_told(fd)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a mount table in /proc")
def test_the_file_system_is_named() -> None:
    with open("/proc/self/status", "rb") as file:
        assert residency.filesystem(file.fileno()) == "proc"
        assert kind_of(file.fileno()) is Kind.OTHER


def test_a_file_that_is_not_mounted_is_on_nothing() -> None:
    """Neither a pipe nor a descriptor that is not open."""
    reading, writing = os.pipe()
    os.close(writing)
    assert residency.filesystem(reading) == ""
    os.close(reading)
    assert residency.filesystem(reading) == ""
