"""SHA-256 files for tools that people have: ``SHA256SUMS`` for ``sha256sum -c``, ``checksums.json`` for SGLang.

::

    save --sha256           SHA256SUMS        <64 digits>  <name>
    save --sglang-sha256    checksums.json    {"files": {name: {"sha256": ..., "size": ...}}}

They list the shards and the side files. The shards are hashed while they are written; those that an earlier run wrote
without this are read once more. The manifest keeps the shards' sums, so that ``verify`` can tell whether the files say
the same, without hashing anything: whatever has the right blake3 has the right sha256 too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from shardtool.manifest import FileRecord
from shardtool.stores.base import Store

TEXT = "SHA256SUMS"
SGLANG = "checksums.json"  # as SGLang's own srt/utils/model_file_verifier.py writes and reads it
NAMES = (TEXT, SGLANG)
_BLOCK = 1 << 20
MOST = 64 << 20
"""Bytes of either file that are read at most."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Which of the two files are wanted."""

    text: bool = False
    sglang: bool = False

    def __bool__(self) -> bool:
        return self.text or self.sglang


def summed(store: Store, records: Sequence[FileRecord]) -> list[FileRecord]:
    """The records with their sums. Files that have none are read."""
    return [record if record.sha256 else replace(record, sha256=of(store, record.key)[0]) for record in records]


def write(store: Store, wanted: Sums, records: Sequence[FileRecord], beside: Set[str]) -> None:
    """Write the files that are wanted, from records that have sums; side files are read."""
    found = {record.key: (record.sha256, record.size) for record in records}
    found.update({key: of(store, key) for key in beside})
    if wanted.text:
        store.put(TEXT, "".join(f"{found[key][0]}  {key}\n" for key in sorted(found)).encode())
    if wanted.sglang:
        files = {key: {"sha256": sha256, "size": size} for key, (sha256, size) in sorted(found.items())}
        store.put(SGLANG, (json.dumps({"files": files}, indent=2, ensure_ascii=False) + "\n").encode())


def of(store: Store, key: str) -> tuple[str, int]:
    """The sha256 and the size of an object."""
    size = store.stat(key).size
    memory, sha256 = memoryview(bytearray(min(size, _BLOCK))), hashlib.sha256()
    for start in range(0, size, _BLOCK):
        piece = memory[: min(_BLOCK, size - start)]
        store.readinto(key, start, piece)
        sha256.update(piece)
    return sha256.hexdigest(), size


def text_read(data: bytes) -> dict[str, str]:
    """The sums of a ``SHA256SUMS``. Raises ``ValueError``."""
    lines = [line.split(" ", 1) for line in data.decode().splitlines()]
    return {name[1:]: sha256 for sha256, name in lines}


def sglang_read(data: bytes) -> dict[str, str]:
    """The sums of a ``checksums.json``. Raises the built-in errors of wrong shapes."""
    table: Any = json.loads(data)
    return {str(name): str(one["sha256"]) for name, one in table["files"].items()}
