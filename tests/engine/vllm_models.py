"""The checkpoints that the plug-in is tested with: ``python -m tests.engine.vllm_models FOLDER`` makes them.

They are small, and as vLLM's kernels for a CPU take them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1003,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied": ("LlamaForCausalLM", {}),
    "qwen3-tied": ("Qwen3ForCausalLM", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3moe": ("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 64, "decoder_sparse_step": 1, "mlp_only_layers": [0]}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "head_dim": 64,
            "num_key_value_heads": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "sliding_window": 128,
        },
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),  # its names are others in vLLM 0.24
    "few-heads": ("LlamaForCausalLM", {"hidden_size": 384, "num_attention_heads": 12, "vocab_size": 960}),
    "large": (  # 386 MiB
        "LlamaForCausalLM",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32000},
    ),
}


def main(folder: str) -> None:
    """Save all of them."""
    from tests.engine import zoo

    for name, (architecture, sizes) in MODELS.items():
        zoo.save(architecture, {**SIZES, **sizes}, Path(folder, name))


if __name__ == "__main__":
    main(*sys.argv[1:])
