"""Checkpoints of the models whose traces are kept (``tests/layouts/traced``), and what an engine makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.engine import replay
from tests.layouts.traced import Golden


def make(kept: Golden, folder: Path) -> Path:
    """A checkpoint with the kept model's config.json and tensors of random numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(kept.config), encoding="utf-8")
    random = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(tensor.shape, generator=random).to(tensor.dtype.torch())
        for name, tensor in kept.layout.tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def differences(now: Golden, tp: int, model: Path, truth: Path) -> list[str]:
    """What differs between a trace, replayed on a checkpoint, and what the engine's ranks hold of it."""
    (recipe,) = [one.recipe for one in now.layout.traced if one.parallel.tp == tp]
    get = replay.sources(model)
    return [
        f"rank {rank}: {what}"
        for rank in range(tp)
        for what in replay.compare(dict(replay.rank(recipe, rank, get)), replay.stored(truth, rank))
    ]
