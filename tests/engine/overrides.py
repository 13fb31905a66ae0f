"""What the rule of ``zoo.small`` gets wrong or cannot know, per architecture or configuration class; data only.

``SETTINGS`` are laid on the arguments of the configuration, nested (``...`` takes one away). Several are keys that the
published checkpoints have and that vLLM reads, though transformers' class no longer knows them. ``NAMES`` are tensors
that transformers saves under other names than the published checkpoints have: a pattern and what takes its place; a
tensor without a name is left out.
``FILES`` are further files that the published checkpoints have and that vLLM reads when it constructs the model.
``REFUSED`` says what shardtool must say of models that vLLM loads but cannot load again from shards.
"""

from __future__ import annotations

from typing import Any

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_NO_EXPERTS = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "full_attention", "mlp"]}
_LFM2 = _CONV | {
    "block_auto_adjust_ff_dim": False,
    "block_dim": 384,
    "block_ff_dim": 192,
    "conv_dim": 384,
}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 64,
    "indexer_compress_ratio": 16,
    "hc_lowrank": 16,
    "output_gate_type": "silu",
}
_GEMMA4_EYE = {
    "model_type": "gemma4_vision",
    "hidden_size": 192,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 16,
    "global_head_dim": 16,
    "position_embedding_size": 64,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "AXK1Config": {"first_k_dense_replace": 0},
    "AfmoeConfig": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    "CohereAsrConfig": {
        "encoder_config": {"intermediate_size": 384},
        "encoder": {
            "feat_in": 16,
            "feat_out": -1,
            "n_layers": 2,
            "d_model": 192,
            "n_heads": 12,
            "ff_expansion_factor": 2,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": 256,
            "causal_downsampling": False,
            "self_attention_model": "rel_pos",
            "att_context_size": [-1, -1],
            "xscaling": False,
            "untie_biases": True,
            "pos_emb_max_len": 512,
            "conv_kernel_size": 9,
            "conv_norm_type": "batch_norm",
            "conv_context_size": None,
        },
        "transf_decoder": {
            "config_dict": {
                "max_sequence_length": 512,
                "hidden_size": 384,
                "inner_size": 192,
                "num_layers": 2,
                "num_attention_heads": 12,
                "hidden_act": "relu",
            },
        },
        "head": {"num_classes": 330, "hidden_size": 384},
    },
    "CohereCompassConfig": {
        "tie_word_embeddings": True,
        "text_config": {"tie_word_embeddings": True, "rope_parameters": {"full_attention": _MROPE}},
    },
    "Cosmos3EdgeConfig": {"text_config": {"rope_parameters": _MROPE}},
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0}},
    "DeepseekV3Config": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "DiffusionGemmaConfig": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96, "global_head_dim": 64},
        "vision_config": _GEMMA4_EYE,
    },
    "EmbeddingGemma2Config": {"text_config": {"global_head_dim": 64}},
    "Emu3Config": {
        "vocabulary_map": {"<image>": 9, "<|extra_200|>": 8, "<|visual token 000000|>": 20},
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "codebook_size": 64,
            "embed_dim": 4,
            "attn_resolutions": [1],
            "hidden_size": 32,
            "num_attention_heads": 1,
        },
    },
    "Ernie4_5_VLMoeConfig": {
        "text_config": {
            "rope_parameters": _MROPE | {"mrope_section": [6, 6, 4]},
            "moe_intermediate_size": [96, 48],
        },
        "vision_config": {"embed_dim": 192, "mlp_ratio": 0.5},
        "pixel_hidden_size": 192,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
    },
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": 2 * ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
    },
    "Gemma4Config": {"text_config": {"global_head_dim": 64}, "vision_config": _GEMMA4_EYE},
    "Gemma4TextConfig": {"global_head_dim": 64},
    "Gemma4UnifiedConfig": {
        "text_config": {"global_head_dim": 64},
        "vision_config": {"mm_embed_dim": 384, "mm_posemb_size": 64},
    },
    "Glm4MoeConfig": {"head_dim": 32},
    "Glm4MoeLiteConfig": {"first_k_dense_replace": 1},
    "Glm4vMoeConfig": {"text_config": {"head_dim": 32, "use_qk_norm": False}},
    "GlmOcrConfig": {"text_config": {"intermediate_size": 1152}},
    "Glm5NextConfig": {"text_config": {"num_key_value_heads": 12, "qk_rope_head_dim": 0}},
    "Granite4VisionConfig": {
        "text_config": {"model_type": "granite"},
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1, 1, 1, 1],
        "downsample_rate": "1/2",
        "qformer_config": {"intermediate_size": 3072, "num_hidden_layers": 1},
    },
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "GteConfig": {"position_embedding_type": "rope", "hidden_act": "gelu"},
    "HYV3Config": {"first_k_dense_replace": 1, "expert_hidden_dim": 96, "route_norm": True, "qk_norm": True},
    "InklingConfig": {"text_config": {"padded_vocab_size": 384}},
    "InklingTextConfig": {"padded_vocab_size": 384},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "Lfm2Config": _LFM2,
    "Lfm2MoeConfig": _CONV,
    "Lfm2VlConfig": {"text_config": _LFM2, "vision_config": {"vision_use_head": False}},
    "LongcatFlashConfig": {
        "zero_expert_num": 2,
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "Mamba2Config": {"num_heads": 24},
    "MiMoV2FlashConfig": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "layernorm_epsilon": 1e-5,
        "sliding_window_size": 64,
        "swa_num_attention_heads": 12,
        "num_key_value_heads": 6,
        "swa_num_key_value_heads": 12,
        "swa_head_dim": 32,
        "v_head_dim": 32,
    },
    "MiniMaxM2Config": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True},
    "MuseGlimmerAssistantConfig": {"target_layer_ids": [0, 1]},
    "MuseGlimmerConfig": {
        "out_hidden_size": 768,
        "projector_hidden_size": 192,
        "vision_config": {"output_dim": 768, "adapter_dim": 192},
    },
    "NemotronHConfig": _NO_EXPERTS,
    "NemotronH_Omni_Reasoning_V3_Config": {
        "text_config": _NO_EXPERTS,
        "vision_config": {"video_temporal_patch_size": 2},
        "patch_size": 16,
    },
    "NomicBertConfig": {
        "activation_function": "swiglu",
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "qkv_proj_bias": False,
        "rotary_emb_scale_base": None,
        "rotary_emb_interleaved": False,
        "layer_norm_epsilon": 1e-12,
        "n_inner": 192,
        "n_embd": 384,
        "n_layer": 2,
    },
    "QianfanOCRConfig": {"force_image_size": 56, "vision_config": {"patch_size": 14, "image_size": 56}},
    "Qwen2_5OmniConfig": {"enable_audio_output": False},
    "Qwen3OmniMoeConfig": {
        "thinker_config": {"vision_config": {"image_size": 56}},
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 96}},
        "enable_audio_output": False,
    },
    "Qwen3VLMoeConfig": {"text_config": {"norm_topk_prob": True}},
    "Qwen4ExpConfig": {"text_config": _QWEN4, "vision_config": {"deepstack_visual_indexes": []}},
    "Qwen4ExpTextConfig": _QWEN4,
    "VibeVoiceAsrConfig": {
        "acoustic_tokenizer_encoder_config": {"num_filters": 4, "hidden_size": 64},
        "semantic_tokenizer_encoder_config": {"num_filters": 4, "hidden_size": 64},
    },
    "VoxtralConfig": {"audio_config": {"downsample_factor": 4}},
    "XLMRobertaConfig": {"position_embedding_type": "absolute"},
    "Zamba2Config": {"num_key_value_heads": 12},
}

_VISION_MODEL = ((r"(^|\.)vision_tower\.(?!vision_model\.)", r"\1vision_tower.vision_model."),)
_ONE_MODEL = ((r"^language_model\.model\.model\.", "language_model.model."),)
NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "AudioFlamingo3ForConditionalGeneration": _ONE_MODEL,
    "Cohere2VisionForConditionalGeneration": _VISION_MODEL,
    "ColPaliForRetrieval": _VISION_MODEL,
    "Gemma3ForConditionalGeneration": _VISION_MODEL,
    "GlmAsrForConditionalGeneration": _ONE_MODEL,
    "GraniteSpeechForConditionalGeneration": _ONE_MODEL,
    "GraniteSpeechPlusForConditionalGeneration": _ONE_MODEL,
    "PaliGemmaForConditionalGeneration": _VISION_MODEL,
    "Qwen2AudioForConditionalGeneration": _ONE_MODEL,
    "Lfm2VlForConditionalGeneration": _VISION_MODEL,
    "LongcatFlashForCausalLM": ((r".*\.mlp\.experts\.[45]\..*", ""),),  # experts that compute nothing
    "Granite4VisionForConditionalGeneration": _VISION_MODEL,
    "LlavaForConditionalGeneration": _VISION_MODEL,
    "LlavaNextForConditionalGeneration": _VISION_MODEL,
    "LlavaNextVideoForConditionalGeneration": _VISION_MODEL,
    "LlavaOnevisionForConditionalGeneration": _VISION_MODEL,
}

FILES: dict[str, dict[str, Any]] = {
    "Emu3ForConditionalGeneration": {
        "preprocessor_config.json": {"image_processor_type": "Emu3ImageProcessor"},
        "processor_config.json": {"processor_class": "Emu3Processor"},
    },
    "HunYuanVLForConditionalGeneration": {
        "preprocessor_config.json": {"image_processor_type": "HunYuanVLImageProcessor", "patch_size": 16},
        "processor_config.json": {"processor_class": "HunYuanVLProcessor"},
    },
    "VibeVoiceAsrForConditionalGeneration": {
        "preprocessor_config.json": {"feature_extractor_type": "VibeVoiceAcousticTokenizerFeatureExtractor"},
        "processor_config.json": {"processor_class": "VibeVoiceAsrProcessor"},
    },
}

REFUSED: dict[str, str] = {
    "PhiForCausalLM": "its loader of shards does not know it",  # lm_head.bias
}
