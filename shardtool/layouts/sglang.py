"""SGLang's layout from a built-in table: vLLM's table of the family, changed where SGLang differs.

Its ``sharded_state`` loads weights into a model that has processed its own already, so shards hold weights as they are
after that. For models that are not quantized the processing changes nothing (on CUDA, with the Triton backend for
experts), and the layout is vLLM's but for names; for quantized models it is what the GPU's kernels want, so they are
refused. Differences of every family:

* attention has no scales among its weights;
* a padded vocabulary that tp does not divide is padded further (rule ``vocab_tp``);
* one file name for all pipeline stages, so there is only one stage;
* config.json is believed where it says that embeddings are tied, whatever head the checkpoint has.

What differs for one family is a ``Change``. Facts are SGLang 0.5.23's ``srt/model_loader/loader.py``,
``srt/layers/vocab_parallel_embedding.py``, ``srt/layers/quantization/unquant.py`` and ``srt/models/``, and what it
loads itself on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardtool.errors import FormatError, UnsupportedModel, UsageError
from shardtool.layouts import vllm
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.layouts.tables import ENGINE as VLLM
from shardtool.layouts.tables import FAMILIES, find
from shardtool.layouts.tables.blocks import LAYER
from shardtool.layouts.tables.language import Family, Row, holds
from shardtool.layouts.vllm import VllmLayout
from shardtool.mosaic import Logical

ENGINE = "sglang"
ENGINE_VERSION = "0.5.23"
VERSIONS = ("0.5.23",)
"""The versions whose layouts the tables say."""


@dataclass(frozen=True, slots=True)
class Change:
    """How SGLang's model of a family differs from vLLM's.

    ``names``: (a part of vLLM's name, SGLang's). ``rules``: (a source, how it is cut). ``dtypes``: (the end of a name,
    the dtype that it always has). ``rows``: what only SGLang holds. ``refused``: conditions under which SGLang's model
    is another one. ``head_dim_key``: as in ``Family``. ``notes``: (condition, what people should know).
    """

    names: tuple[tuple[str, str], ...] = ()
    rules: tuple[tuple[str, str], ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()
    rows: tuple[Row, ...] = ()
    refused: tuple[str, ...] = ()
    head_dim_key: str | None = None
    notes: tuple[tuple[str, str], ...] = ()


_EMBED = "model.embed_tokens.weight"
_QKV_BIAS = "qkv_bias & not attention_bias|bias"  # vLLM reads it, SGLang does not
_SINKS = "attention_sinks else layer_types"
_ALL_SPARSE = ("mlp_only_layers", "not decoder_sparse_step=1")  # SGLang takes every layer for one with experts
_FUSED = "start SGLang with --disable-shared-experts-fusion: on a GPU it would store shared experts with the others"
_TRITON = "start SGLang with --moe-runner-backend triton: its triton_kernel backend stores experts in another order"
_EXPERTS = (".experts.routed_experts.", ".experts.")
_ROUTER = (".experts.gate.", ".gate.")
_SHARED = (".experts._shared_experts._layer.", ".shared_experts.")
_LATENT = Change(
    (
        _EXPERTS,
        _ROUTER,
        _SHARED,
        (".self_attn.mla_attn.", ".self_attn."),
        (".fused_qkv_a_proj.", ".fused_qkv_a_proj_with_mqa."),
    )
)

CHANGES: Mapping[str, Change] = {
    "llama": Change(refused=("mlp_bias", _QKV_BIAS)),
    "mistral": Change(refused=("mlp_bias", _QKV_BIAS)),
    "phi3": Change(refused=("mlp_bias", _QKV_BIAS)),
    "qwen2": Change(refused=("qk_norm",), head_dim_key="head_dim"),
    "qwen3": Change(refused=("attention_bias",)),
    "gemma2": Change(rows=(Row("root", "model.normalizer"),)),
    "gemma3": Change(rules=((_EMBED, "copy"),)),
    "granite": Change(refused=("attention_bias|bias", "mlp_bias", _SINKS)),
    "gpt2": Change(),
    "opt": Change(),
    "glm4": Change(),
    "olmo2": Change(),
    "starcoder2": Change(),
    "cohere": Change(refused=("use_qk_norm",)),
    "stablelm": Change(),
    "qwen2_5_vl": Change(
        (
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model."),
            (".attn.qkv.", ".attn.qkv_proj."),
        )
    ),
    "mixtral": Change((_EXPERTS,)),
    "qwen2_moe": Change(
        (
            _EXPERTS,
            (".experts._shared_experts._layer.expert_gate.", ".shared_expert_gate."),
            (".experts._shared_experts._layer.", ".shared_expert."),
        ),
        refused=_ALL_SPARSE,
    ),
    "qwen3_moe": Change(
        (_EXPERTS, _ROUTER), refused=("attention_bias", "shared_expert_intermediate_size", *_ALL_SPARSE)
    ),
    "olmoe": Change((_EXPERTS,)),
    "granitemoe": Change((_EXPERTS,), refused=(_SINKS,)),
    "glm4_moe": Change(
        (
            (".experts.routed_experts.e_score_correction_bias", ".gate.e_score_correction_bias"),
            _EXPERTS,
            _SHARED,
        ),
        notes=(("n_shared_experts", _FUSED),),
    ),
    "gpt_oss": Change(
        (
            ("model.embedding.", "model.embed_tokens."),
            (LAYER + "attn.", LAYER + "self_attn."),
            (".routed_experts.w13_bias", ".w13_weight_bias"),
            (".routed_experts.w2_bias", ".w2_weight_bias"),
            _EXPERTS,
        ),
        dtypes=(("_weight_bias", "F32"),),
        notes=(("", _TRITON),),
    ),
    "deepseek_v2": _LATENT,
    "deepseek_v3": replace(_LATENT, notes=(("n_routed_experts=256 & n_shared_experts=1", _FUSED),)),
}
"""By the name of vLLM's table."""


@dataclass(frozen=True, slots=True)
class SglangLayout:
    """The layout of one family's table. ``notes``: (condition on config.json, what people should know)."""

    family: Family
    engine_version: str = ENGINE_VERSION
    notes: tuple[tuple[str, str], ...] = field(default=())

    @property
    def engine(self) -> str:
        """The engine."""
        return ENGINE

    @property
    def title(self) -> str:
        """How people name it."""
        return f"the built-in table {self.family.name} of SGLang"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes in which the engine can hold the model, the one that it falls back to first."""
        return self.family.dtypes

    @property
    def _table(self) -> VllmLayout:
        """The table as what evaluates tables."""
        return VllmLayout(self.family, self.engine_version)

    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {**self._table.record(), "engine": ENGINE, "engine_version": self.engine_version}

    def outline(self, model: Model, parallel: Parallel) -> Outline:
        """The recipe of every rank. Raises ``PlanError`` for what the engine would refuse or leave uninitialised."""
        _check(model.config, parallel)
        found = self._table.outline(model, parallel)
        config = self.family.config(model.config)
        return replace(found, notes=(*found.notes, *(said for when, said in self.notes if holds(when, config))))

    def infer(self, config: Mapping[str, Any], held: Mapping[str, Logical], parallel: Parallel) -> dict[str, Logical]:
        """The source tensors of shards that an engine saved, from what one rank holds."""
        _check(config, parallel)
        return self._table.infer(config, held, parallel)


def _check(config: Mapping[str, Any], parallel: Parallel) -> None:
    """Refuse what its loader of shards cannot load. Raises ``UnsupportedModel``."""
    for place in (config, config.get("text_config")):
        if isinstance(place, Mapping) and (place.get("quantization_config") or place.get("compression_config")):
            raise UnsupportedModel(
                "config.json says that the model is quantized: SGLang processes such weights before it loads shards, "
                "and what that makes of them depends on the GPU and its kernels; serve the checkpoint as it is, or "
                "shard one that is not quantized"
            )
    if parallel.pp > 1:
        raise UnsupportedModel(
            "SGLang's sharded_state has one file name for the same rank of every pipeline stage; leave --pp out"
        )
    if parallel.ep:
        raise UnsupportedModel("the built-in tables of SGLang know no expert parallel layouts; trace SGLang instead")


def of_vllm(family: Family) -> Family:
    """SGLang's table of a family. Raises ``UnsupportedModel`` where there is none."""
    change = CHANGES.get(family.name)
    if change is None:
        raise UnsupportedModel(
            f"{family.architectures[0]} is not an architecture that shardtool knows of SGLang; known are "
            f"{', '.join(known())}"
        )
    rows = (*(_row(row, change) for row in family.rows if row.rule != "scalar"), *change.rows)
    return replace(
        family,
        rows=rows,
        unties=False,
        pipeline=False,
        refused=(*family.refused, *change.refused),
        head_dim_key=family.head_dim_key if change.head_dim_key is None else change.head_dim_key,
    )


def known() -> tuple[str, ...]:
    """Every architecture that has a table."""
    return tuple(sorted({name for family in FAMILIES if family.name in CHANGES for name in family.architectures}))


def _row(row: Row, change: Change) -> Row:
    to, rule, dtype = row.to, row.rule, row.dtype
    for old, new in change.names:
        to = to.replace(old, new)
    if rule == "vocab":
        rule = next((cut for source, cut in change.rules if row.of == (source,)), "vocab_tp")
    for end, always in change.dtypes:
        dtype = always if to.endswith(end) else dtype
    return replace(row, to=to, rule=rule, dtype=dtype)


def for_config(config: Mapping[str, Any], engine_version: str = ENGINE_VERSION) -> SglangLayout:
    """The layout of a model. Raises ``UnsupportedModel`` for architectures without a table and for quantized models."""
    if engine_version not in VERSIONS:
        raise UsageError(
            f"the built-in tables know the layouts of SGLang {', '.join(VERSIONS)}, not of {engine_version!r:.40}; "
            f"trace that version instead"
        )
    _check(config, Parallel(1))
    family = of_vllm(find(config))
    return SglangLayout(family, engine_version, CHANGES[family.name].notes)


def from_manifest(record: Mapping[str, Any], where: str) -> SglangLayout:
    """The layout that a manifest kept. Raises ``FormatError``."""
    if record.get("engine") != ENGINE:
        raise FormatError(f"{where}: the layout of {record.get('engine')!r} is not one of {ENGINE}")
    table = vllm.from_manifest({**record, "engine": VLLM}, where)
    change = CHANGES.get(table.family.name, Change())
    return SglangLayout(table.family, table.engine_version, change.notes)
