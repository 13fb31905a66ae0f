"""One rank of several: loads a tensor parallel model with ``load_model``, compares it, and writes down what it found.

Run by torchrun: ``python -m torch.distributed.run --nproc-per-node 2 -m tests.ranks FOLDER``. The folder holds
``whole/NAME``, ``tpN/rankR/NAME``, where the files of ranks other than R are not, and the llama's shards for others:
``tp1`` and ``vllm2``. Rank r's findings go to ``tpN/rankR.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import shardtool

TOKENS = [[3, 4, 5, 6, 7, 8, 9, 1], [11, 2, 3, 4, 90, 99, 50, 3]]


def outputs(model: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits, and what the model says next."""
    tokens = torch.tensor(TOKENS)
    with torch.inference_mode():
        logits = model(tokens).logits
    said = model.generate(tokens, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(tokens))
    return logits, said.tolist()


def compared(model: Any, whole: Any) -> dict[str, Any]:
    """How a tensor parallel model differs from the unsharded one. All ranks call this together."""
    logits, said = outputs(model)
    wanted, also = outputs(whole)
    state, full = model.state_dict(), whole.state_dict()
    unlike, divided = sorted(state.keys() ^ full.keys()), 0
    for name in sorted(state.keys() & full.keys()):
        tensor = state[name]
        if isinstance(tensor, DTensor):
            divided += tensor.to_local().numel() < tensor.numel()
            tensor = tensor.full_tensor()
        if tensor.dtype != full[name].dtype or not torch.equal(tensor, full[name]):
            unlike.append(name)
    buffers = dict(whole.named_buffers())
    unlike += [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    return {
        "difference": (logits - wanted).abs().max().item(),
        "generates": said == also,
        "unlike": unlike,
        "divided": divided,
        "training": model.training,
        "eos": model.generation_config.eos_token_id,
    }


def main() -> None:
    """Every model of the folder, from files of its own and from those that were made for others."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for whole in sorted(folder.glob("whole/*")):
        mine = folder / f"tp{size}" / f"rank{rank}" / whole.name
        if mine.exists():
            found[whole.name] = compared(shardtool.load_model(mine), shardtool.load_model(whole, tp=1))
    whole = shardtool.load_model(folder / "whole" / "llama", tp=1)
    for where in ("whole/llama", "tp1", "vllm2"):
        found[where] = compared(shardtool.load_model(folder / where, distributed=where == "tp1"), whole)
    (folder / f"tp{size}" / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
