"""One of several processes that load a checkpoint by torch.distributed.checkpoint: scenes for ``tests.exchanging``.

The folder holds ``llama``, a checkpoint of whole tensors, and ``tp4``, its shards.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from tests.exchanging import main


def _empty(folder: Path, placements: Any, size: int) -> dict[str, Any]:
    """A state of DTensors that hold nothing yet."""
    import torch
    from safetensors import safe_open
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import zeros

    mesh = init_device_mesh("cpu", (size,))
    state = {}
    for path in sorted((folder / "llama").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                shape = file.get_slice(name).get_shape()
                state[name] = zeros(shape, dtype=torch.bfloat16, device_mesh=mesh, placements=placements(len(shape)))
    return state


def _loaded(folder: Path, where: str, placements: Any, size: int) -> dict[str, Any]:
    """Digests of every whole tensor after the load, and the bytes that this rank has read."""
    import torch
    import torch.distributed.checkpoint as dcp

    from shardtool.integrations.dcp import ShardtoolReader

    reader = ShardtoolReader(folder / where, memory_limit="1MiB")
    state = _empty(folder, placements, size)
    dcp.load(state, storage_reader=reader)
    found = {
        name: hashlib.sha256(tensor.full_tensor().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in state.items()
    }
    return {"found": found, "read": reader.bytes_read}


def rows(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """As FSDP has them: the first dimension is divided."""
    from torch.distributed.tensor import Shard

    return {where: _loaded(folder, where, lambda _: [Shard(0)], size) for where in ("llama", "tp4")}


def columns(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Matrices are divided along their last dimension, the rest is everywhere."""
    from torch.distributed.tensor import Replicate, Shard

    def placements(dims: int) -> list[Any]:
        return [Shard(1) if dims > 1 else Replicate()]

    return {where: _loaded(folder, where, placements, size) for where in ("llama", "tp4")}


if __name__ == "__main__":
    main({"rows": rows, "columns": columns}, set())
    # A mesh keeps its process group, destroyed or not, and with it gloo's threads: one of them that still drops a
    # tensor while the interpreter ends would abort the process.
    os._exit(0)
