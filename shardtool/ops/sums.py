"""SHA-256 files for tools that people have: ``SHA256SUMS`` for ``sha256sum -c``, ``checksums.json`` for SGLang.

::

    save --sha256           SHA256SUMS        <64 digits>  <name>
    save --sglang-sha256    checksums.json    {"files": {name: {"sha256": ..., "size": ...}}}

They list the shards and the side files. The shards are hashed while they are written; those that an earlier run wrote
without this are read once more, with several blocks under way while one is hashed. The manifest keeps the shards' sums,
so that ``verify`` can tell whether the files say the same, without hashing anything: whatever has the right blake3 has
the right sha256 too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from shardtool.budget import limit_of
from shardtool.manifest import FileRecord
from shardtool.ops.files import LEAST, UNLIMITED, copy
from shardtool.stores.base import Buffer, Store, Wrapper, Writer
from shardtool.stores.memory import MemoryStore

TEXT = "SHA256SUMS"
SGLANG = "checksums.json"  # as SGLang's own srt/utils/model_file_verifier.py writes and reads it
NAMES = (TEXT, SGLANG)
SMALL = 2 << 20
"""Bytes of memory with which a side file is hashed where nothing was said."""
MOST = 64 << 20
"""Bytes of either file that are read at most."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Which of the two files are wanted, and the memory and the readers for files that have to be read for it."""

    text: bool = False
    sglang: bool = False
    memory_limit: int | str | None = None
    concurrency: int | None = None

    def __bool__(self) -> bool:
        return self.text or self.sglang


def summed(store: Store, wanted: Sums, records: Sequence[FileRecord]) -> list[FileRecord]:
    """The records with their sums. Files that have none are read."""
    found = hashed(store, wanted, [record.key for record in records if not record.sha256])
    return [record if record.sha256 else replace(record, sha256=found[record.key][0]) for record in records]


def write(store: Store, wanted: Sums, records: Sequence[FileRecord], beside: Set[str]) -> None:
    """Write the files that are wanted, from records that have sums; side files are read."""
    found = {record.key: (record.sha256, record.size) for record in records}
    found.update(hashed(store, wanted, sorted(beside)))
    if wanted.text:
        store.put(TEXT, "".join(f"{found[key][0]}  {key}\n" for key in sorted(found)).encode())
    if wanted.sglang:
        files = {key: {"sha256": sha256, "size": size} for key, (sha256, size) in sorted(found.items())}
        store.put(SGLANG, (json.dumps({"files": files}, indent=2, ensure_ascii=False) + "\n").encode())


def of(store: Store, key: str) -> tuple[str, int]:
    """The sha256 and the size of one object, read in little memory."""
    return hashed(store, Sums(memory_limit=SMALL), [key])[key]


def hashed(store: Store, wanted: Sums, keys: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The sha256 and the size of some objects, by key. They are read as they are for a copy: ahead, in large blocks.

    Raises ``StoreError`` for one that is replaced meanwhile.
    """
    objects = [store.stat(key) for key in keys]
    limit = max(2 * LEAST, limit_of(wanted.memory_limit, least=0, what="sums", most=UNLIMITED))
    made = _Hashes()
    copy(store, made, objects, concurrency=wanted.concurrency, memory_limit=limit)
    return {thing.key: (made.found[thing.key], thing.size) for thing in objects}


class _Hashes(Wrapper):
    """A store that keeps nothing of what is written but its sha256."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.found: dict[str, str] = {}

    def create(self, key: str, size: int, *, exclusive: bool = False) -> Writer:
        """Begin to hash."""
        return _Hasher(self.found, key)


class _Hasher(Writer):
    """Hashes one object."""

    def __init__(self, found: dict[str, str], key: str) -> None:
        self._found = found
        self._key = key
        self._sha256 = hashlib.sha256()

    def write(self, offset: int, view: Buffer) -> None:
        """Hash the next bytes."""
        self._sha256.update(view)

    def commit(self) -> None:
        """Say what it is."""
        self._found[self._key] = self._sha256.hexdigest()

    def abort(self) -> None:
        """Nothing was kept."""


def text_read(data: bytes) -> dict[str, str]:
    """The sums of a ``SHA256SUMS``. Raises ``ValueError``."""
    lines = [line.split(" ", 1) for line in data.decode().splitlines()]
    return {name[1:]: sha256 for sha256, name in lines}


def sglang_read(data: bytes) -> dict[str, str]:
    """The sums of a ``checksums.json``. Raises the built-in errors of wrong shapes."""
    table: Any = json.loads(data)
    return {str(name): str(one["sha256"]) for name, one in table["files"].items()}
