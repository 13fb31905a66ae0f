"""How much memory a process may still take is read from the machine and from every control group that it is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.container import available, ranks_here

GIB = 1 << 30
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
OTHER_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"


def put(root: Path, name: str, text: object) -> None:
    """One file of a machine that is made up."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 64 GiB left."""
    put(tmp_path, "proc/meminfo", f"MemTotal: 99999999 kB\nMemFree:  5 kB\nMemAvailable:   {64 * GIB >> 10} kB")
    return tmp_path


def v2(root: Path, path: str, *, mounted: str = "/") -> None:
    """Say that this process is in a group of version 2, of whose tree the part below ``mounted`` is mounted."""
    put(root, "proc/self/cgroup", f"0::{path}")
    put(root, "proc/self/mountinfo", V2_MOUNT.format(root=mounted))


def group2(
    root: Path, path: str, limit: object, used: int, *, inactive: int = 0, active: int = 0, **more: object
) -> None:
    """A group of version 2."""
    folder = f"sys/fs/cgroup/{path}"
    put(root, f"{folder}/memory.max", limit)
    put(root, f"{folder}/memory.current", used)
    put(root, f"{folder}/memory.stat", f"anon 1\nfile 999999\ninactive_file {inactive}\nactive_file {active}\nshmem 7")
    for name, value in more.items():
        put(root, f"{folder}/memory.{name}", value)


def v1(root: Path, path: str, *, mounted: str = "/") -> None:
    """Say that this process is in a group of version 1."""
    put(root, "proc/self/cgroup", f"4:cpu,cpuacct:/elsewhere\n3:hugetlb,memory:{path}\n0::/")
    put(root, "proc/self/mountinfo", f"{OTHER_MOUNT}\n{V1_MOUNT.format(root=mounted)}")


def group1(root: Path, path: str, limit: int, used: int, stat: str = "") -> None:
    """A group of version 1."""
    folder = f"sys/fs/cgroup/memory/{path}"
    put(root, f"{folder}/memory.limit_in_bytes", limit)
    put(root, f"{folder}/memory.usage_in_bytes", used)
    put(root, f"{folder}/memory.stat", stat)


def test_without_groups_it_is_the_machine(root: Path) -> None:
    assert available(root) == 64 * GIB


def test_a_group_has_what_its_limit_leaves(root: Path) -> None:
    v2(root, "/")
    group2(root, "", 10 * GIB, 3 * GIB)
    assert available(root) == 7 * GIB


def test_the_page_cache_of_a_group_is_free(root: Path) -> None:
    """All of it gives way, but files of tmpfs, which are counted with it elsewhere, do not."""
    v2(root, "/")
    group2(root, "", 10 * GIB, 9 * GIB, inactive=4 * GIB, active=2 * GIB)
    assert available(root) == 7 * GIB


def test_the_least_of_all_groups_above_counts(root: Path) -> None:
    """A pod may have less than its container is promised."""
    v2(root, "/pods/pod/container")
    group2(root, "pods/pod/container", "max", 1 * GIB)
    group2(root, "pods/pod", 8 * GIB, 2 * GIB)
    group2(root, "pods", 100 * GIB, 1 * GIB)
    group2(root, "pods/other", 1, 1)
    assert available(root) == 6 * GIB
    group2(root, "pods/pod/container", 4 * GIB, 1 * GIB)
    assert available(root) == 3 * GIB


def test_a_group_that_is_throttled_has_no_more_than_that(root: Path) -> None:
    v2(root, "/")
    group2(root, "", "max", 1 * GIB, high=5 * GIB)
    assert available(root) == 4 * GIB


def test_a_group_over_its_limit_has_nothing(root: Path) -> None:
    v2(root, "/")
    group2(root, "", GIB, 2 * GIB)
    assert available(root) == 0


@pytest.mark.parametrize(("mounted", "path"), [("/docker/abc", "/docker/abc"), ("/../..", "/"), ("/", "/../../x")])
def test_a_container_sees_its_own_group_as_the_top(root: Path, mounted: str, path: str) -> None:
    """What is mounted is its group, whatever its name is outside."""
    v2(root, path, mounted=mounted)
    group2(root, "", 10 * GIB, 3 * GIB)
    assert available(root) == 7 * GIB


def test_a_group_below_the_one_that_is_mounted_is_found(root: Path) -> None:
    v2(root, "/docker/abc/inner", mounted="/docker/abc")
    group2(root, "inner", 2 * GIB, GIB)
    assert available(root) == GIB


def test_groups_of_the_first_version_are_understood(root: Path) -> None:
    """Their numbers contain those of the groups below, under names of their own; no limit is a very high one."""
    v1(root, "/docker/abc")
    group1(root, "", (1 << 63) - 4096, 50 * GIB)
    group1(root, "docker", 20 * GIB, 5 * GIB)
    total = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file {2 * GIB}"
    group1(root, "docker/abc", 10 * GIB, 4 * GIB, total)
    assert available(root) == 9 * GIB
    group1(root, "docker", 5 * GIB, 4 * GIB)
    assert available(root) == GIB


def test_a_place_with_a_blank_is_found(root: Path) -> None:
    v2(root, "/")
    put(root, "proc/self/mountinfo", "30 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw")
    put(root, "my groups/memory.max", 5)
    put(root, "my groups/memory.current", 2)
    assert available(root) == 3


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
@pytest.mark.parametrize("text", ["", "-1", "1e9", "5 6", "\N{SUPERSCRIPT TWO}", "9" * 5000, "inactive_file", "a\0b"])
def test_what_is_not_understood_is_left_out(root: Path, name: str, text: str) -> None:
    v2(root, "/")
    group2(root, "", 10 * GIB, 3 * GIB)
    put(root, f"sys/fs/cgroup/{name}", text)
    assert available(root) == (7 if name == "memory.stat" else 64) * GIB


@pytest.mark.parametrize("name", ["proc/self/cgroup", "proc/self/mountinfo", "sys/fs/cgroup/memory.max"])
def test_what_is_missing_is_left_out(root: Path, name: str) -> None:
    v2(root, "/")
    group2(root, "", 10 * GIB, 3 * GIB)
    (root / name).unlink()
    assert available(root) == 64 * GIB


def test_without_any_of_it_half_the_machine_is_free(tmp_path: Path) -> None:
    assert available(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@given(st.lists(st.binary(max_size=60), min_size=5, max_size=5))
def test_nothing_that_stands_there_is_an_error(tmp_path_factory: pytest.TempPathFactory, texts: list[bytes]) -> None:
    root = tmp_path_factory.getbasetemp() / "machine"
    v2(root, "/")
    group2(root, "", 10 * GIB, 3 * GIB)
    put(root, "proc/meminfo", f"MemAvailable: {GIB >> 10} kB")
    names = ("proc/self/cgroup", "proc/self/mountinfo", "proc/meminfo", "memory.max", "memory.stat")
    for name, text in zip(names, texts, strict=True):
        path = root / (name if "/" in name else f"sys/fs/cgroup/{name}")
        path.write_bytes(path.read_bytes() + text)
    assert available(root) >= 0


def test_this_machine_has_memory_left() -> None:
    assert 0 < available() < 1 << 60


@pytest.mark.parametrize(
    ("said", "ranks"),
    [("8", 8), ("1", 1), (" 4 ", 4), ("0", 1), ("-3", 1), ("", 1), ("many", 1), ("2.5", 1), ("9" * 5000, 1)],
)
def test_the_launcher_says_how_many_ranks_are_here(monkeypatch: pytest.MonkeyPatch, said: str, ranks: int) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    assert ranks_here() == ranks
    assert ranks_here({"LOCAL_WORLD_SIZE": said}) == ranks


def test_without_a_launcher_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_here() == ranks_here({}) == 1
