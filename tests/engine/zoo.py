"""Tiny checkpoints of every architecture that both transformers and vLLM's registry hold.

A configuration is the defaults of the architecture's own class with every size that the tables below name made small.
The sizes are awkward where that shows mistakes (a vocabulary that does not fill the last rank) and divide by 2, 3, 4
and 6 where an engine asks for it. What this rule alone gets wrong is data: ``overrides.py``.

Each architecture comes in two variants, because no number of key and value heads smaller than 12 suits all of
tp 2, 3, 4 and 6:

* ``a``: 6 kv heads, 330 words; tp 1, 2, 3 and 6.
* ``b``: 2 kv heads (ranks share them at tp 4), 1003 words, embeddings tied if by default they are not, or the other
  way round; tp 2 and 4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.engine.overrides import FILES, NAMES, SETTINGS

TPS = {"a": (1, 2, 3, 6), "b": (2, 4)}
VOCABULARY = {"a": 330, "b": 1003}
KV_HEADS = {"a": 6, "b": 2}
HIDDEN, HEADS, HEAD, INNER, LAYERS, EXPERTS = 384, 12, 32, 192, 2, 4
EYE, EYE_HEAD, EYE_INNER = 192, 16, 96  # vision and audio towers

# Sizes of language models, by the key's name. A key that its class leaves at None stays so, unless ALWAYS names it.
TEXT: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), INNER // 2),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp", "share_expert_dim"), INNER),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "dense_intermediate_size"), INNER),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 512),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention"), 64),
    **dict.fromkeys(("kv_lora_rank", "index_head_dim"), 64),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank", "mamba_dt_rank", "time_step_rank"), 96),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), HEAD),
    **dict.fromkeys(("head_dim", "swa_head_dim", "query_pre_attn_scalar", "linear_head_dim", "global_head_dim"), HEAD),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"), HEADS),
    **dict.fromkeys(("linear_num_key_heads", "swa_num_key_value_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), 0),  # KV_HEADS of the variant
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 0),  # VOCABULARY of the variant
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    "qk_rope_head_dim": 16,
    "hidden_size_per_layer_input": 32,
    "rotary_dim": 16,
    "projection_dim": HIDDEN,
    "max_window_layers": 1,
    "mamba_n_heads": 24,
    "mamba_d_head": HEAD,
    "mamba_d_ssm": 24 * HEAD,
    "mamba_num_heads": 24,
    "mamba_head_dim": HEAD,
    "n_mamba_heads": 24,
    "laurel_rank": 16,
    "adapter_rank": 16,
    "original_max_position_embeddings": 512,
    "index_topk": 64,
    **dict.fromkeys(("projector_hidden_size", "alignment_intermediate_size"), INNER),
}

# Sizes of vision and audio towers, and of what joins them to the language model.
TOWER: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "embed_dim", "hidden_dim", "d_model", "vision_hidden_size", "encoder_hidden_size"), EYE
    ),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "conf_num_attention_heads"), HEADS),
    **dict.fromkeys(("conf_num_hidden_layers",), LAYERS),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "downsample_hidden_size"), EYE_INNER),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "text_hidden_size", "text_embed_dim"), HIDDEN),
    **dict.fromkeys(("output_dim", "vision_output_dim", "mm_embed_dim", "audio_embed_dim", "output_proj_dims"), HIDDEN),
    **dict.fromkeys(("projection_intermediate_size", "alignment_intermediate_size", "projector_hidden_size"), INNER),
    **dict.fromkeys(("head_dim", "dim_head"), EYE_HEAD),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim"), EYE_INNER),
    **dict.fromkeys(("max_image_size", "n_mel_bins", "mel_vocab_size"), 56),
    **dict.fromkeys(("num_position_embeddings", "max_source_positions", "position_embedding_size"), 64),
    "vocab_size": 0,
    "num_mel_bins": 16,
    "image_size": 56,
}

# Keys that are set although their class leaves them at None.
ALWAYS = ("num_key_value_heads", "num_kv_heads", "head_dim")
BY_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "indexer_types",
    "layer_rope_theta",
    "no_rope_layers",
)
TOWERS = (
    "vision",
    "audio",
    "encoder",
    "qformer",
    "projector",
    "vq_",
    "perceiver",
    "vit",
    "talker",
    "token2wav",
    "code2wav",
)
# What makes a checkpoint one of sentence-transformers: vLLM then takes a language model for an embedding model.
POOLING: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ],
    "1_Pooling/config.json": {"pooling_mode_lasttoken": True},
}
BEGINNINGS_OF_WORDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Animal:
    """An architecture of the zoo: its name, the room of vLLM's registry that holds it, and vLLM's class.

    The class is named as module and class below ``vllm.model_executor.models``; the Transformers backend's begins with
    ``transformers``.
    """

    architecture: str
    kind: str
    engine_class: str


@cache
def animals() -> dict[str, Animal]:
    """Every architecture that vLLM's registry and transformers hold, by name."""
    import transformers
    from vllm.model_executor.models import registry

    found = {}
    for table in sorted(name for name in vars(registry) if name.startswith("_") and name.endswith("_MODELS")):
        room = vars(registry)[table]
        if table == "_VLLM_MODELS" or not isinstance(room, dict):
            continue
        for name, place in room.items():
            if name in registry._VLLM_MODELS and hasattr(transformers, name):
                kind = table.strip("_").removesuffix("_MODELS").lower().replace("_", " ")
                found[name] = Animal(name, kind, ".".join(place))
    return dict(sorted(found.items()))


def small(config_class: type, variant: str, path: str = "") -> dict[str, Any]:
    """Return arguments of a configuration class that make a tiny model: by the tables above, nested ones included."""
    tower = any(word in path or word in config_class.__name__.lower() for word in TOWERS)
    table = TOWER if tower else TEXT
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        name, default = field.name, field.default
        if default is dataclasses.MISSING or isinstance(default, bool):
            continue
        if name in table and (default is not None or name in ALWAYS):
            size = table[name]
            if name.startswith("vocab_size"):
                size = VOCABULARY[variant]
            elif name in ("num_key_value_heads", "num_kv_heads", "kv_n_heads"):
                size = HEADS if tower else KV_HEADS[variant]
            out[name] = [size, size] if isinstance(default, tuple | list) else size
        elif isinstance(default, int) and (name.endswith(("token_id", "token_index")) or name in BEGINNINGS_OF_WORDS):
            out[name] = BEGINNINGS_OF_WORDS.get(name, 10 + len(out))
        elif name == "tie_word_embeddings" and variant == "b" and not path:
            out[name] = not default
    try:
        nested = vars(config_class())
    except Exception:
        return out
    out |= _kinds_of_layers(nested, out)
    if isinstance(out.get("image_size"), int) and isinstance(nested.get("patch_size"), int):
        out["image_size"] = 4 * nested["patch_size"]
    for name, value in nested.items():
        if name in getattr(config_class, "sub_configs", {}) and hasattr(value, "model_type"):
            inner = small(type(value), variant, f"{path}{name}.")
            out[name] = {"model_type": value.model_type, **inner}
    if variant == "b" and not path:
        tied = nested.get("tie_word_embeddings")
        if isinstance(tied, bool):
            out["tie_word_embeddings"] = not tied
    return out


def _kinds_of_layers(default: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Return lists by layer, and their number, such that every kind of layer that the default has is there."""
    count = next((name for name in ("num_hidden_layers", "n_layer") if name in made and name in default), "")
    by_layer = {
        name: list(value)
        for name, value in default.items()
        if count and name in BY_LAYER and isinstance(value, list | tuple) and len(value) == default[count]
    }
    chosen: list[int] = []
    for layer in range(default[count] if by_layer else 0):
        if any(value[layer] not in [value[other] for other in chosen] for value in by_layer.values()):
            chosen.append(layer)
    if not chosen:
        return {}
    rest = (layer for layer in range(default[count]) if layer not in chosen)
    chosen = sorted([*chosen, *(next(rest) for _ in range(LAYERS - len(chosen)))])
    return {count: len(chosen)} | {name: [value[layer] for layer in chosen] for name, value in by_layer.items()}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid on it, nested; ``...`` takes a key away."""
    out = dict(base)
    for key, value in over.items():
        if value is ...:
            out.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merged(out[key], value)
        else:
            out[key] = value
    return out


def settings(architecture: str, variant: str) -> dict[str, Any]:
    """Return the arguments of the architecture's configuration class."""
    config_class = model_class(architecture).config_class
    out = small(config_class, variant)
    return merged(out, SETTINGS.get(config_class.__name__, {}))


def model_class(architecture: str) -> Any:
    """Return transformers' class."""
    import transformers

    return getattr(transformers, architecture)


def make(architecture: str, variant: str, folder: Path) -> Path:
    """Save a tiny checkpoint with random weights in bfloat16 and a tokenizer; what is already there is kept.

    The folder is named by architecture, variant and a digest of the settings, so that a changed rule makes a new one.
    """
    wanted = settings(architecture, variant)
    words = json.dumps([wanted, NAMES.get(architecture), FILES.get(architecture)], sort_keys=True, default=str)
    place = folder / f"{architecture}-{variant}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    if not (place / "config.json").exists():
        unfinished = place.with_name(place.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        save(architecture, wanted, unfinished)
        unfinished.rename(place)
    return place


def save(architecture: str, wanted: Mapping[str, Any], place: Path) -> None:
    """Save a checkpoint of these settings, with random weights in bfloat16 and a tokenizer."""
    import torch
    from transformers import GenerationConfig

    config = model_class(architecture).config_class(**wanted)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = model_class(architecture)(config)
    finally:
        torch.set_default_dtype(before)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(1234)
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.data_ptr() not in seen and "inv_freq" not in name:
                seen.add(tensor.data_ptr())
                tensor.copy_(0.08 * torch.randn(tensor.shape, generator=generator))
    model.generation_config = GenerationConfig()  # its own may hold words that a small vocabulary lacks
    model.save_pretrained(place)
    _tokenizer(place)
    files = FILES.get(architecture, {})
    if animals()[architecture].kind == "embedding" and architecture.endswith("Model"):
        files = POOLING | files
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps(content))
    _rename(place / "model.safetensors", NAMES.get(architecture, ()))


def _rename(file: Path, rules: tuple[tuple[str, str], ...]) -> None:
    from safetensors.torch import load_file, save_file

    if rules:
        tensors = load_file(file)
        for pattern, new in rules:
            renamed = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
            tensors = {name: tensor for name, tensor in renamed.items() if name}
        save_file(tensors, file, metadata={"format": "pt"})


def _tokenizer(place: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {f"{what}_token": f"<{what}>" for what in ("image", "video", "audio", "boi", "eoi", "eof", "boa", "eoa")}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=special,
    ).save_pretrained(place)
