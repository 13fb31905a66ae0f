"""What this process may take of the machine: the memory that is left to it, and with how many others it shares.

::

    available = least of   MemAvailable of the machine
                           limit - charged + page cache    of its control group, and of each group above that one
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class _Version:
    """The names of one version of control groups."""

    filesystem: str
    limits: tuple[str, ...]
    charged: str
    page_cache: tuple[tuple[str, ...], ...]  # of memory.stat; of the alternatives the first that is there


_VERSIONS = (
    _Version("cgroup2", ("memory.max", "memory.high"), "memory.current", (("inactive_file", "active_file"),)),
    _Version(
        "cgroup",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        (("total_inactive_file", "total_active_file"), ("inactive_file", "active_file")),
    ),
)


def available(root: str | os.PathLike[str] = "/") -> int:
    """Bytes of memory that this process could still take: of the machine, or of a control group if that has less.

    The page cache that a group is charged for counts as free, since it gives way. ``root`` is where ``/proc`` and the
    mounts of control groups are found. What is missing there or cannot be understood is left out.
    """
    base = Path(root)
    free = _of_the_machine(base)
    for version, group in _groups(base):
        if (left := _of_a_group(version, group)) is not None:
            free = min(free, left)
    return free


def ranks_here(environment: Mapping[str, str] | None = None) -> int:
    """How many ranks of a distributed run share this machine: ``LOCAL_WORLD_SIZE``, which launchers set, or 1."""
    try:
        return max(1, int((os.environ if environment is None else environment).get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        return 1


def _of_the_machine(base: Path) -> int:
    for line in _lines(base / "proc/meminfo"):
        found = re.fullmatch(r"MemAvailable:\s*([0-9]+) kB", line.strip())
        if found:
            return int(found[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _of_a_group(version: _Version, group: Path) -> int | None:
    """What is left of one group's limit; None where it has none."""
    limits = [limit for name in version.limits if (limit := _number(group / name)) is not None]
    charged = _number(group / version.charged)
    if not limits or charged is None:
        return None
    found = {}
    for line in _lines(group / "memory.stat"):
        name, _, value = line.strip().partition(" ")
        if value.isascii() and value.isdigit():
            found[name] = int(value)
    names = next((names for names in version.page_cache if names[0] in found), ())
    page_cache = sum(found.get(name, 0) for name in names)
    return max(0, min(limits) - max(0, charged - page_cache))


def _groups(base: Path) -> Iterator[tuple[_Version, Path]]:
    """The folders of this process's groups of memory and of all groups above them, as far as they are mounted."""
    paths = {}
    for line in _lines(base / "proc/self/cgroup"):
        number, _, rest = line.rstrip("\n").partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for line in _lines(base / "proc/self/mountinfo"):
        mount, _, what = line.partition(" - ")
        fields, kind = mount.split(), what.split()
        for version in _VERSIONS:
            if len(fields) < 5 or len(kind) < 3 or kind[0] != version.filesystem or version.filesystem not in paths:
                continue
            if version.filesystem == "cgroup" and "memory" not in kind[2].split(","):
                continue
            top = base / _plain(fields[4]).lstrip("/")
            below = _below(_plain(fields[3]), paths[version.filesystem])
            for depth in range(len(below), -1, -1):
                yield version, top.joinpath(*below[:depth])


def _below(mounted: str, path: str) -> tuple[str, ...]:
    """The folders from the group that is mounted down to the one at ``path``; none where that is not below it."""
    group = PurePosixPath(path)
    if ".." in group.parts or not group.is_relative_to(mounted):
        return ()
    return group.relative_to(mounted).parts


def _plain(name: str) -> str:
    """A name of the mount table, in which blanks are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def _number(path: Path) -> int | None:
    """A file's only number; None for ``max``, for what is no number and for what is not there."""
    text = "".join(_lines(path)).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,30}", text) else None


def _lines(path: Path) -> list[str]:
    """The lines of a small file; none if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readlines(1 << 20)
    except (OSError, ValueError):
        return []
