"""The sizes of a model: what config.json says of them, and the words by which tables name sizes and layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shardtool.errors import PlanError, UnsupportedModel
from shardtool.layouts.rules import Dims
from shardtool.layouts.tables.language import Family, setting
from shardtool.parallel import Parallel

MOST = 1 << 20
"""Layers or experts that a model may have."""


def integer(config: Mapping[str, Any], key: str, most: int = 1 << 32) -> int:
    """A size in config.json; ``a.b`` is b inside a. Raises ``PlanError`` where it is none."""
    value = setting(config, key)
    if type(value) is not int or not 0 < value < most:
        raise PlanError(f"config.json says {key} {value!r}, which is not a size")
    return value


def dims(family: Family, config: Mapping[str, Any], *, expert_parallel: bool = False) -> Dims:
    """The sizes that the rules need, from a config as the table reads it. Raises ``PlanError``."""
    heads = integer(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else integer(config, "num_key_value_heads")
    if heads % kv_heads:
        raise PlanError(
            f"config.json says {heads} heads and {kv_heads} kv heads, which do not divide; the engine refuses it too"
        )
    if family.head_dim_key and config.get(family.head_dim_key):
        head_dim = integer(config, family.head_dim_key)
    else:
        head_dim = integer(config, "hidden_size") // heads
    said = [key for key in family.experts if config.get(key) is not None]
    experts = integer(config, said[0], MOST) if said else 0
    return Dims(heads, kv_heads, head_dim, integer(config, "vocab_size"), experts, expert_parallel, config)


def _inner(config: Mapping[str, Any]) -> int:
    """GPT-2's inner size."""
    return 4 * integer(config, "hidden_size") if config.get("n_inner") is None else integer(config, "n_inner")


def _merger(config: Mapping[str, Any]) -> int:
    """What an encoder of images hands on for each group of its patches."""
    return integer(config, "vision_config.hidden_size") * integer(config, "vision_config.spatial_merge_size") ** 2


SIZES: dict[str, tuple[str, Callable[[Dims], int]]] = {
    "ffn": ("ffn_dim", lambda dims: integer(dims.config, "ffn_dim")),
    "four": ("4 times hidden_size", lambda dims: 4 * integer(dims.config, "hidden_size")),
    "heads": ("heads times head_dim", lambda dims: dims.heads * dims.head_dim),
    "inner": ("n_inner, else 4 times hidden_size,", lambda dims: _inner(dims.config)),
    "intermediate": ("intermediate_size", lambda dims: integer(dims.config, "intermediate_size")),
    "merger": ("vision_config.hidden_size times spatial_merge_size squared", lambda dims: _merger(dims.config)),
    "opt positions": (
        "max_position_embeddings and 2 more",
        lambda dims: integer(dims.config, "max_position_embeddings") + 2,
    ),
    "positions": ("max_position_embeddings", lambda dims: integer(dims.config, "max_position_embeddings")),
    "sinks": ("num_attention_heads", lambda dims: dims.heads),
    "vision": ("vision_config.hidden_size", lambda dims: integer(dims.config, "vision_config.hidden_size")),
    "vision_intermediate": (
        "vision_config.intermediate_size",
        lambda dims: integer(dims.config, "vision_config.intermediate_size"),
    ),
    "experts": ("the number of experts", lambda dims: dims.experts),
    "moe": ("moe_intermediate_size", lambda dims: integer(dims.config, "moe_intermediate_size")),
    "one shared": (
        "shared_expert_intermediate_size",
        lambda dims: integer(dims.config, "shared_expert_intermediate_size"),
    ),
    "all shared": (
        "moe_intermediate_size times n_shared_experts",
        lambda dims: integer(dims.config, "moe_intermediate_size") * integer(dims.config, "n_shared_experts"),
    ),
    "shared": ("shared_intermediate_size", lambda dims: integer(dims.config, "shared_intermediate_size")),
    "latent q": (
        "heads times qk_nope_head_dim and qk_rope_head_dim",
        lambda dims: dims.heads * (integer(dims.config, "qk_nope_head_dim") + integer(dims.config, "qk_rope_head_dim")),
    ),
    "latent kv": (
        "heads times qk_nope_head_dim and v_head_dim",
        lambda dims: dims.heads * (integer(dims.config, "qk_nope_head_dim") + integer(dims.config, "v_head_dim")),
    ),
    "latent o": ("heads times v_head_dim", lambda dims: dims.heads * integer(dims.config, "v_head_dim")),
}
"""What ``Row.size`` may name: how config.json calls it, and its value."""


def _count(config: Mapping[str, Any], key: str) -> int:
    """A number of layers, which may be 0; nothing said is 0 too."""
    return 0 if config.get(key) in (None, 0) else integer(config, key, MOST)


def _layers(config: Mapping[str, Any]) -> range:
    return range(integer(config, "num_hidden_layers", MOST))


def _qwen_sparse(config: Mapping[str, Any]) -> list[int]:
    """``models/qwen3_moe.py`` and ``qwen2_moe.py``: every so many, without those that are named."""
    step, dense = integer(config, "decoder_sparse_step", MOST), config.get("mlp_only_layers") or ()
    if not isinstance(dense, (list, tuple)):
        raise PlanError(f"config.json says mlp_only_layers {dense!r:.100}, which is no list of layers")
    return [i for i in _layers(config) if (i + 1) % step == 0 and i not in dense]


def _late(config: Mapping[str, Any]) -> range:
    """``models/glm4_moe.py``: all after the first few."""
    return _layers(config)[_count(config, "first_k_dense_replace") :]


def _deepseek_sparse(config: Mapping[str, Any]) -> list[int]:
    """``models/deepseek_v2.py``: after the first few, every so many."""
    step = integer(config, "moe_layer_freq", MOST)
    return [i for i in _late(config) if i % step == 0]


def _predicting(config: Mapping[str, Any]) -> range:
    """The layers after the last, which predict further tokens (``get_spec_layer_idx_from_weight_name``)."""
    layers = len(_layers(config))
    return range(layers, layers + _count(config, "num_nextn_predict_layers"))


def _others(some: Callable[[Mapping[str, Any]], Iterable[int]]) -> Callable[[Mapping[str, Any]], Iterable[int]]:
    def others(config: Mapping[str, Any]) -> Iterable[int]:
        found = set(some(config))
        return [i for i in _layers(config) if i not in found]

    return others


LAYERS: dict[str, Callable[[Mapping[str, Any]], Iterable[int]]] = {
    "": _layers,
    "qwen sparse": _qwen_sparse,
    "qwen dense": _others(_qwen_sparse),
    "late": _late,
    "early": _others(_late),
    "deepseek sparse": _deepseek_sparse,
    "deepseek dense": _others(_deepseek_sparse),
    "predicting": _predicting,
    "vision": lambda config: range(integer(config, "vision_config.depth", MOST)),
}
"""What ``Row.layers`` may name: the numbers that ``{i}`` takes."""


def layers(word: str, config: Mapping[str, Any]) -> Iterable[int]:
    """The numbers of a word of ``LAYERS``, or those that it lists itself: ``0,2,5``."""
    return [int(number) for number in word.split(",")] if word[:1].isdigit() else LAYERS[word](config)


def _an_expert_each(dims: Dims, parallel: Parallel) -> None:
    if parallel.tp > dims.experts:
        raise PlanError(f"--tp {parallel.tp} is more than the {dims.experts} experts; the engine refuses it too")


def _in_every_stage(layers: str) -> Callable[[Dims, Parallel], None]:
    """That each pipeline stage has one of some layers."""

    def check(dims: Dims, parallel: Parallel) -> None:
        sparse = set(LAYERS[layers](dims.config))
        for stage, mine in enumerate(parallel.stages(len(_layers(dims.config)))):
            if not sparse.intersection(mine):
                raise PlanError(
                    f"{parallel}: stage {stage} has the layers {list(mine)}, none of which has experts; "
                    f"the engine refuses it too"
                )

    return check


def _gpt_oss(dims: Dims, parallel: Parallel) -> None:
    """What ``models/gpt_oss.py`` divides by all ranks, and by expert parallel ranks."""
    size, ranks = integer(dims.config, "intermediate_size"), parallel.tp * parallel.pp
    if size % ranks:
        raise PlanError(f"intermediate_size {size} cannot be divided by {ranks} ranks; the engine refuses it too")
    if parallel.tp > dims.kv_heads:
        raise PlanError(
            f"--tp {parallel.tp} is more than the {dims.kv_heads} kv heads, which this model's ranks cannot share; "
            f"the engine refuses it too"
        )
    if parallel.ep and dims.experts % parallel.tp:
        raise PlanError(
            f"{dims.experts} experts cannot be divided by --tp {parallel.tp}; with expert parallel the engine refuses "
            f"it too"
        )


def _latent(dims: Dims, _parallel: Parallel) -> None:
    """The models that the engine runs with latent attention (``model_arch_config_convertor.py``)."""
    kind = dims.config.get("model_type")
    if kind not in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        raise UnsupportedModel(
            f"config.json says model_type {kind!r:.60}, which the engine may run with another attention than the "
            f"latent one that this table knows"
        )


LIMITS: dict[str, Callable[[Dims, Parallel], None]] = {
    "an expert each": _an_expert_each,
    "experts in every stage": _in_every_stage(""),
    "late experts in every stage": _in_every_stage("late"),
    "qwen experts in every stage": _in_every_stage("qwen sparse"),
    "gpt_oss": _gpt_oss,
    "latent attention": _latent,
}
"""What ``Family.limits`` may name: checks that raise ``PlanError`` or ``UnsupportedModel``."""
