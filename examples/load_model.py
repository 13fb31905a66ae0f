"""Load a transformers model: whole in one process, or tensor parallel with each rank reading only its own files.

::

    python examples/load_model.py ./llama                                             # one process
    shardtool save ./llama --layout transformers --tp 2 -o ./llama-tp2
    torchrun --nproc-per-node 2 examples/load_model.py ./llama-tp2                    # one process per rank

The model is the one that ``from_pretrained`` gives, under its own ``tp_plan`` where there are several ranks. All ranks
call it with the same tokens and get the same answer.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

import shardtool


def main() -> None:
    """Load, and say which token comes next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face checkpoint, or shards of it for transformers")
    args = parser.parse_args()

    model = shardtool.load_model(args.model, memory_limit="256MiB")
    with torch.inference_mode():
        next_token = model(torch.tensor([[1, 2, 3]], device=model.device)).logits[0, -1].argmax().item()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    print(f"rank {rank} of {ranks}: after the tokens 1 2 3 the model says {next_token}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
