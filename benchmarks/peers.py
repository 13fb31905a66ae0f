"""What people do without shardtool: the script that re-shards with safetensors.

``reshard`` writes the very tensors that ``shardtool save`` writes for a Llama whose vocabulary needs no padding.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def reshard(model: str, out: str, *, tp: int) -> int:
    """Load all, slice, make contiguous, save each rank."""
    config = json.loads(Path(model, "config.json").read_text())
    held: dict[str, torch.Tensor] = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        held |= load_file(path)
    kv_parts = min(tp, config["num_key_value_heads"])
    Path(out).mkdir()
    total = 0
    for rank in range(tp):

        def rows(tensor: torch.Tensor, parts: int = tp, at: int = rank) -> torch.Tensor:
            return tensor.chunk(parts)[at * parts // tp]

        def columns(tensor: torch.Tensor, at: int = rank) -> torch.Tensor:
            return tensor.chunk(tp, 1)[at]

        made: dict[str, torch.Tensor] = {}
        for name, tensor in held.items():
            if "q_proj" in name:
                k, v = (held[name.replace("q_proj", f"{x}_proj")] for x in "kv")
                fused = torch.cat([rows(tensor), rows(k, kv_parts), rows(v, kv_parts)])
                made[name.replace("q_proj", "qkv_proj")] = fused
            elif "gate_proj" in name:
                up = held[name.replace("gate_proj", "up_proj")]
                made[name.replace("gate_proj", "gate_up_proj")] = torch.cat([rows(tensor), rows(up)])
            elif "o_proj" in name or "down_proj" in name:
                made[name] = columns(tensor).contiguous()
            elif "embed" in name or "lm_head" in name:
                made[name] = rows(tensor).contiguous()
            elif "norm" in name:
                made[name] = tensor
        save_file(made, Path(out, f"model-rank-{rank}-part-0.safetensors"))
        total += sum(tensor.nbytes for tensor in made.values())
    return total
