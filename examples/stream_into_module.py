"""Fill a transformers model in place, then look at another checkpoint tensor by tensor.

::

    python examples/stream_into_module.py ./llama ./llama-tp4

``load_into`` reads straight into the parameters' memory. ``stream`` hands out tensors that the caller owns, one after
the other; only those that are read ahead count against the memory limit, so a model of any size can be looked at.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import shardtool


def main() -> None:
    """Load a whole checkpoint into a module, and stream one rank of a sharded one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face checkpoint")
    parser.add_argument("shards", help="shards of it")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.bfloat16).eval()
    shardtool.load_into(model, args.model)
    with torch.inference_mode():
        next_token = model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax().item()
    print(f"after the tokens 1 2 3 the model says {next_token}")

    largest = 0.0
    for name, tensor in shardtool.stream(args.shards, rank=0, memory_limit="64MiB"):
        if name.endswith("qkv_proj.weight"):
            largest = max(largest, tensor.abs().max().item())
    print(f"the largest weight of the attention of rank 0 is {largest:.4f}")


if __name__ == "__main__":
    main()
