"""What the rule of ``zoo.small`` gets wrong or cannot know, per architecture or configuration class; data only.

``SETTINGS`` are laid on the arguments of the configuration, nested (``...`` takes one away). Several are keys that the
published checkpoints have and that vLLM reads, though transformers' class no longer knows them. ``NAMES`` are tensors
that transformers saves under other names than the published checkpoints have: a pattern and what takes its place.
``FILES`` are further files that the published checkpoints have and that vLLM reads when it constructs the model.
"""

from __future__ import annotations

from typing import Any

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_HYBRID = ["linear_attention", "full_attention"]
_CONV = ["conv", "full_attention"]
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 64,
    "indexer_compress_ratio": 16,
    "hc_lowrank": 16,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "AXK1Config": {"first_k_dense_replace": 0},
    "AfmoeConfig": {"score_func": "sigmoid"},
    "CohereCompassConfig": {"text_config": {"rope_parameters": {"full_attention": _MROPE}}},
    "Cosmos3EdgeConfig": {"text_config": {"rope_parameters": _MROPE}},
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0}},
    "DeepseekV3Config": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "DiffusionGemmaConfig": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96}},
    "Emu3Config": {"vocabulary_map": {"<image>": 9, "<|extra_200|>": 8, "<|visual token 000000|>": 20}},
    "Ernie4_5_VLMoeConfig": {"text_config": {"rope_parameters": _MROPE | {"mrope_section": [6, 6, 4]}}},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": 2 * ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
    },
    "Gemma4TextConfig": {"global_head_dim": 64},
    "Glm4MoeConfig": {"head_dim": 32},
    "Glm4MoeLiteConfig": {"first_k_dense_replace": 1},
    "Glm4vMoeConfig": {"text_config": {"head_dim": 32}},
    "Glm5NextConfig": {"text_config": {"num_key_value_heads": 12, "qk_rope_head_dim": 0}},
    "Granite4VisionConfig": {
        "text_config": {"model_type": "granite"},
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1],
    },
    "GraniteMoeHybridConfig": {"layer_types": _HYBRID},
    "GteConfig": {"position_embedding_type": "rope"},
    "HYV3Config": {"first_k_dense_replace": 1, "expert_hidden_dim": 96, "route_norm": True, "qk_norm": True},
    "InklingTextConfig": {"padded_vocab_size": 384},
    "InklingConfig": {"text_config": {"padded_vocab_size": 384}},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "Lfm2Config": {"layer_types": _CONV},
    "Lfm2MoeConfig": {"layer_types": _CONV},
    "Lfm2VlConfig": {"text_config": {"layer_types": _CONV}},
    "LongcatFlashConfig": {"zero_expert_num": 2},
    "Mamba2Config": {"num_heads": 24},
    "NemotronH_Omni_Reasoning_V3_Config": {"vision_config": {"video_temporal_patch_size": 2}},
    "Qwen3OmniMoeConfig": {
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 96}},
        "enable_audio_output": False,
    },
    "Qwen2_5OmniConfig": {"enable_audio_output": False},
    "Qwen4ExpTextConfig": _QWEN4,
    "Qwen4ExpConfig": {"text_config": _QWEN4},
}

_VISION_MODEL = ((r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),)
_ONE_MODEL = ((r"^language_model\.model\.model\.", "language_model.model."),)
NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "AudioFlamingo3ForConditionalGeneration": _ONE_MODEL,
    "Cohere2VisionForConditionalGeneration": _VISION_MODEL,
    "ColPaliForRetrieval": _VISION_MODEL,
    "Gemma3ForConditionalGeneration": _VISION_MODEL,
    "GlmAsrForConditionalGeneration": _ONE_MODEL,
    "GraniteSpeechForConditionalGeneration": _ONE_MODEL,
    "GraniteSpeechPlusForConditionalGeneration": _ONE_MODEL,
}

FILES: dict[str, dict[str, Any]] = {}
