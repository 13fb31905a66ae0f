"""A rank's files against vLLM's own: names, dtypes, shapes and bytes, constants and padding included."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.engine.truth import World

LARGEST = {torch.int64: 2**63 - 1, torch.int32: 2**31 - 1, torch.int16: 2**15 - 1, torch.int8: 127, torch.uint8: 255}
"""What torch fills uninitialised memory with, where it is asked to; floating-point memory with NaN."""


@dataclass(slots=True)
class Compared:
    """How many tensors were compared, what differs, and which tensors vLLM leaves uninitialised in part or wholly."""

    tensors: int = 0
    differences: list[str] = field(default_factory=list)
    uninitialised: list[str] = field(default_factory=list)


def compare(ours: Path, truth: Path, world: World) -> Compared:
    """Compare every rank's files in two folders."""
    out = Compared()
    for rank in range(world.tp * world.pp):
        mine, theirs = rank_tensors(ours, world, rank), rank_tensors(truth, world, rank)
        out.tensors += len(theirs)
        for name in sorted(set(mine) | set(theirs)):
            if name not in mine:
                out.differences.append(f"rank {rank}: {name} {_kind(theirs[name])} is missing")
            elif name not in theirs:
                out.differences.append(f"rank {rank}: {name} {_kind(mine[name])} is too much")
            else:
                _compare(f"rank {rank}: {name}", mine[name], theirs[name], out)
    return out


def rank_tensors(folder: Path, world: World, rank: int) -> dict[str, Any]:
    """Return all that a rank's files hold."""
    stem = f"pp-{rank // world.tp}-tp-{rank % world.tp}" if world.pp > 1 else f"rank-{rank}"
    out: dict[str, Any] = {}
    for file in sorted(folder.glob(f"model-{stem}-part-*.safetensors")):
        out |= load_file(file)
    return out


def _compare(where: str, mine: torch.Tensor, theirs: torch.Tensor, out: Compared) -> None:
    if _kind(mine) != _kind(theirs):
        out.differences.append(f"{where} is {_kind(mine)}, should be {_kind(theirs)}")
        return
    unknown = _uninitialised(theirs)
    if bool(unknown.any()):
        out.uninitialised.append(f"{where}: {int(unknown.sum())} of {theirs.numel()} elements")
    wrong = (_bytes(mine) != _bytes(theirs)).any(dim=-1) & ~unknown.reshape(-1)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        values = f"{mine.reshape(-1)[first].item()} should be {theirs.reshape(-1)[first].item()}"
        out.differences.append(
            f"{where} {_kind(theirs)}: {int(wrong.sum())} of {theirs.numel()} elements, first {first}: {values}"
        )


def _uninitialised(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.isnan(tensor.float())
    largest = LARGEST.get(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=torch.bool) if largest is None else tensor == largest


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
