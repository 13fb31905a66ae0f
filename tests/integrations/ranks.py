"""One of several processes that stream the same files by Run:ai's interface: scenes for ``tests.exchanging``.

The folder holds ``a.safetensors`` and ``more/b.safetensors``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.exchanging import Scene, main

NAMES = ("a.safetensors", "more/b.safetensors")


def digests(tensors: Iterable[tuple[Any, ...]]) -> list[str]:
    """What came, in an order of its own: names and a digest of the bytes."""
    import torch

    found = []
    for *name, tensor in tensors:
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        found.append(f"{name} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}")
    return sorted(found)


def streamed(paths: list[Path], is_distributed: bool) -> dict[str, Any]:
    """Stream the files; what came, what comes to one process alone, and how many bytes of tensors were read."""
    from shardtool.integrations import runai_streams
    from shardtool.integrations.runai import SafetensorsStreamer
    from shardtool.stores import open_store
    from shardtool.stores.counting import CountingStore

    stores: list[CountingStore] = []

    def counted(uri: str) -> CountingStore:
        stores.append(CountingStore(open_store(uri)))
        return stores[-1]

    with mock.patch.object(runai_streams, "open_store", counted), SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in paths], is_distributed=is_distributed)
        for store in stores:
            store.reset()
        found = digests(streamer.get_tensors())
        total = streamer.total_size
    return {"found": found, "total": total, "read": sum(store.bytes_read for store in stores)}


def together(folder: Path, rank: int, size: int) -> dict[str, Any]:
    os.environ["RUNAI_STREAMER_DIST"] = "1"
    return streamed([folder / name for name in NAMES], is_distributed=True)


def unasked(folder: Path, rank: int, size: int) -> dict[str, Any]:
    os.environ["RUNAI_STREAMER_DIST"] = "1"
    return streamed([folder / name for name in NAMES], is_distributed=False)


def denied(folder: Path, rank: int, size: int) -> dict[str, Any]:
    os.environ["RUNAI_STREAMER_DIST"] = "0"
    return streamed([folder / name for name in NAMES], is_distributed=True)


def automatic(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Files of this machine are faster read twice."""
    os.environ.pop("RUNAI_STREAMER_DIST", None)
    return streamed([folder / name for name in NAMES], is_distributed=True)


def missing(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """One rank does not find its file."""
    os.environ["RUNAI_STREAMER_DIST"] = "1"
    names = NAMES if rank == 0 else (NAMES[0], "gone.safetensors")
    try:
        return streamed([folder / name for name in names], is_distributed=True)
    except ValueError as error:
        return {"failed": str(error)}


def dropped(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Everybody opens the files and leaves them before the first tensor; then all stream them."""
    from shardtool.integrations.runai import SafetensorsStreamer

    os.environ["RUNAI_STREAMER_DIST"] = "1"
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(folder / name) for name in NAMES], is_distributed=True)
    return together(folder, rank, size)


def ranges(folder: Path, rank: int, size: int) -> dict[str, Any]:
    from shardtool.integrations.runai import DistributedStreamer, FileChunks

    os.environ["RUNAI_STREAMER_DIST"] = "1"
    requests = [FileChunks.contiguous(i, str(folder / name), 3, [100, 0, 7, 60]) for i, name in enumerate(NAMES)]
    with DistributedStreamer() as streamer:
        streamer.stream_files(requests, None, "cpu", True)
        return {"found": digests(streamer.get_chunks())}


SCENES: dict[str, Scene] = {
    scene.__name__: scene for scene in (together, unasked, denied, automatic, missing, dropped, ranges)
}

if __name__ == "__main__":
    main(SCENES, set())
