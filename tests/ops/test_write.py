"""What is written lies in memory as in its file, so that a store can write it past the page cache without a copy."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

import shardtool
from benchmarks import models
from shardtool.header import PAGE
from shardtool.stores.base import CheckedWriter

LARGE = 256 << 10


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every slice that a writer is given: its bytes, and how far it lies from where it does in its file."""
    found: list[tuple[int, int]] = []
    write = CheckedWriter.write

    def watched(writer: CheckedWriter, offset: int, view: Any) -> None:
        if isinstance(view, memoryview) and not view.readonly:
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            found.append((view.nbytes, (address - offset) % PAGE))
        write(writer, offset, view)

    monkeypatch.setattr(CheckedWriter, "write", watched)
    return found


@pytest.mark.parametrize("limit", ["256MiB", "12MiB"])
@pytest.mark.parametrize("tp", [1, 4])
def test_large_slices_lie_in_memory_as_in_their_file(
    tmp_path: Path, slices: list[tuple[int, int]], tp: int, limit: str
):
    """Tensors that are cut by rows, by columns, and not at all, of a width that is no multiple of a page."""
    config = models.config(hidden=704, layers=1, inter=2112, heads=8, kv_heads=4, vocab=4000)
    models.write(tmp_path / "hf", config)
    shardtool.save(tmp_path / "hf", tmp_path / "out", tp=tp, memory_limit=limit)
    large = [behind for nbytes, behind in slices if nbytes >= LARGE]
    assert len(large) >= 5 * tp
    assert set(large) == {0}
    assert sum(nbytes for nbytes, _ in slices if nbytes >= LARGE) > 0.8 * sum(nbytes for nbytes, _ in slices)
    slices.clear()
    shardtool.merge(tmp_path / "out", tmp_path / "merged", memory_limit=limit)
    assert {behind for nbytes, behind in slices if nbytes >= LARGE} == {0}
