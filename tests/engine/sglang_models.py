"""The checkpoints that SGLang generates with: ``python -m tests.engine.sglang_models FOLDER`` makes them.

Their sizes divide by those of its kernels for a CPU, which pad a model whose do not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.engine.vllm_models import EXPERTS, SIZES

ALIGNED: dict[str, Any] = {**SIZES, "intermediate_size": 256, "num_key_value_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", ALIGNED),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        {**ALIGNED, **EXPERTS, "moe_intermediate_size": 256, "head_dim": 64, "decoder_sparse_step": 1},
    ),
}


def main(folder: str) -> None:
    """Save all of them."""
    from tests.engine import zoo

    for name, (architecture, sizes) in MODELS.items():
        zoo.save(architecture, sizes, Path(folder, name))


if __name__ == "__main__":
    main(*sys.argv[1:])
