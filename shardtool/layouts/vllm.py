"""vLLM's layout from a built-in table: the rows of a family, evaluated once per kind of layer.

``outline``   a source model and a tp -> the recipe of every rank
``infer``     a rank's shapes, as an engine saved them without a manifest -> the source model that they came from
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardtool.dtypes import DType, castable
from shardtool.errors import FormatError, PlanError, TensorMismatch, UnsupportedModel, UnsupportedTransform
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.layouts.families import ENGINE, ENGINE_VERSION, Family, Row, find, from_record, holds
from shardtool.layouts.rules import RULES, Dims, Source
from shardtool.mosaic import Logical
from shardtool.recipe import SLOT, Recipe, Rule, filled

TIE = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class VllmLayout:
    """The layout of one family's table."""

    family: Family
    engine_version: str = ENGINE_VERSION

    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {
            "engine": ENGINE,
            "engine_version": self.engine_version,
            "kind": "builtin",
            "table": self.family.record(),
        }

    def dtype(self, wanted: DType) -> DType:
        """The dtype in which the engine holds a model of this config dtype (it runs Gemma's float16 as bfloat16)."""
        return wanted if wanted.name in self.family.dtypes else DType[self.family.dtypes[0]]

    def outline(self, model: Model, parallel: Parallel) -> Outline:
        """The recipe of every rank. Raises ``PlanError`` for what the engine would refuse or leave uninitialised."""
        config = self._config(model.config)
        copies: dict[str, str] = {}
        amendments: dict[str, Any] = {}
        head, embed = self.family.tied
        if head and config[TIE] and head in model.tensors and embed in model.tensors:
            if model.equal(head, embed):
                copies[head] = embed
            else:  # engines that load shards do not look for an own head: config.json has to say it
                config[TIE] = amendments[TIE] = False
        dims, layers = _dims(self.family, config), _integer(config, "num_hidden_layers")
        used = set(copies)
        rules: list[Rule] = []
        for row in self.family.rows:
            if holds(row.when, config):
                rules.extend(self._rules(row, model, dims, config, layers, parallel.tp, used))
        dropped = self._dropped(model, used)
        rules.sort(key=lambda rule: rule.name)
        return Outline(Recipe(tuple(rules)), dropped, copies, amendments)

    def _config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json over the engine's defaults, refused where the table does not know what it asks for."""
        for key in self.family.refused:
            if config.get(key):
                raise UnsupportedModel(f"config.json sets {key}, which the table of {self.family.name} does not know")
        return {**self.family.defaults, **config}

    def _rules(
        self, row: Row, model: Model, dims: Dims, config: Mapping[str, Any], layers: int, tp: int, used: set[str]
    ) -> list[Rule]:
        """One rule for each kind of layer: those whose sources have the same names and shapes."""
        kinds: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
        per_layer = SLOT in row.to
        for i in range(layers) if per_layer else (None,):
            names = row.of
            if row.instead and all(filled(name, i) in model.tensors for name in row.instead):
                names = row.instead
            kind = []
            for name in names:
                tensor = model.tensors.get(filled(name, i))
                if tensor is None:
                    raise PlanError(
                        f"the checkpoint has no tensor {filled(name, i)!r}, which "
                        f"{self.family.architectures[0]} with this config.json needs"
                    )
                if not castable(tensor.dtype, model.dtype):
                    raise UnsupportedTransform(
                        f"tensor {filled(name, i)!r} is {tensor.dtype.name}, which cannot be cast to {model.dtype.name}"
                    )
                used.add(filled(name, i))
                kind.append((name, tensor.shape))
            kinds.setdefault(tuple(kind), []).append(-1 if i is None else i)
        found = []
        for alike, index in kinds.items():
            target = filled(row.to, index[0])
            sources = [Source(name, shape) for name, shape in alike]
            _check_size(target, row, sources, dims, config)
            shares = RULES[row.rule].cut(target, sources, dims, tp)
            dtype = DType.F32 if row.rule == "scalar" else model.dtype
            found.append(Rule(row.to, dtype, shares, tuple(index) if per_layer else ()))
        return found

    def _dropped(self, model: Model, used: set[str]) -> dict[str, str]:
        """The sources that no target uses, with the reason. One without a reason is refused."""
        dropped: dict[str, str] = {}
        strange: list[str] = []
        modules = {name.rpartition(".")[0] for name in used}
        for name in model.tensors:
            if name in used:
                continue
            reason = next((why for part, why in self.family.drops.items() if part in name), None)
            if reason is None and name.endswith(".bias") and name.rpartition(".")[0] in modules:
                reason = "a bias that the engine's model does not have with this config.json and skips"
            if reason is None:
                strange.append(name)
            else:
                dropped[name] = reason
        if strange:
            shown = ", ".join(repr(name) for name in sorted(strange)[:3]) + (" ..." if len(strange) > 3 else "")
            raise PlanError(
                f"{len(strange)} source tensors have no place in {self.family.architectures[0]} with this "
                f"config.json: {shown}; "
                "check config.json and the index, or remove them from the checkpoint"
            )
        return dropped

    def infer(self, config: Mapping[str, Any], held: Mapping[str, Logical], tp: int) -> dict[str, Logical]:
        """The source tensors of shards that an engine saved, from what one rank holds."""
        full = self._config(config)
        dims, layers = _dims(self.family, full), _integer(full, "num_hidden_layers")
        if full[TIE] and self.family.tied[1] in held:
            full[TIE] = False  # both are held: the head is its own
        sources: dict[str, Logical] = {}
        expected: set[str] = set()
        for row in self.family.rows:
            if not holds(row.when, full):
                continue
            for i in range(layers) if SLOT in row.to else (None,):
                target = filled(row.to, i)
                expected.add(target)
                if target not in held:
                    raise TensorMismatch(
                        f"the shards have no tensor {target!r}, which {self.family.architectures[0]} needs"
                    )
                shapes = RULES[row.rule].unshard(held[target].shape, len(row.of), dims, tp)
                for name, shape in zip(row.of, shapes, strict=True):
                    sources.setdefault(filled(name, i), Logical(held[target].dtype, shape))
        if strange := sorted(set(held) - expected):
            raise TensorMismatch(
                f"the shards have {len(strange)} tensors that {self.family.architectures[0]} does not, first "
                f"{strange[0]!r}"
            )
        return sources


def for_config(config: Mapping[str, Any]) -> VllmLayout:
    """The layout of a model. Raises ``UnsupportedModel`` for architectures without a table and for quantized models."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key):
                raise UnsupportedModel(f"config.json has a {key}: quantized checkpoints are not supported yet")
    return VllmLayout(find(config))


def from_manifest(record: Mapping[str, Any], where: str) -> VllmLayout:
    """The layout that a manifest kept. Raises ``FormatError``."""
    if record.get("engine") != ENGINE or record.get("kind") != "builtin":
        raise FormatError(
            f"{where}: the layout {record.get('engine')!r} {record.get('kind')!r} is not one that this version "
            f"of shardtool knows"
        )
    family = from_record(record.get("table"), where)
    for row in family.rows:
        if row.size and row.size not in SIZES:
            raise FormatError(
                f"{where}: the layout names the size {row.size!r}, which this version of shardtool does not know"
            )
    return VllmLayout(family, str(record.get("engine_version")))


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 1 << 32:
        raise PlanError(f"config.json says {key} {value!r}, which is not a size")
    return value


def _dims(family: Family, config: Mapping[str, Any]) -> Dims:
    heads = _integer(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else _integer(config, "num_key_value_heads")
    if heads % kv_heads:
        raise PlanError(
            f"config.json says {heads} heads and {kv_heads} kv heads, which do not divide; the engine refuses it too"
        )
    if family.head_dim_key and config.get(family.head_dim_key):
        head_dim = _integer(config, family.head_dim_key)
    else:
        head_dim = _integer(config, "hidden_size") // heads
    return Dims(heads, kv_heads, head_dim, _integer(config, "vocab_size"))


SIZES: dict[str, tuple[str, Callable[[Dims, Mapping[str, Any]], int]]] = {
    "heads": ("heads times head_dim", lambda dims, _config: dims.heads * dims.head_dim),
    "intermediate": ("intermediate_size", lambda _dims, config: _integer(config, "intermediate_size")),
    "sinks": ("num_attention_heads", lambda dims, _config: dims.heads),
}
"""What ``Row.size`` may name: how config.json calls it, and its value."""


def _check_size(target: str, row: Row, sources: list[Source], dims: Dims, config: Mapping[str, Any]) -> None:
    """Refuse sources whose cut dimension is not what config.json says.

    The engine would cut them short without a word.
    """
    if not row.size:
        return
    said, size = SIZES[row.size]
    want = size(dims, config)
    dim = 1 if row.rule == "row" else 0
    times = 2 if row.rule == "gate_up" and len(sources) == 1 else 1
    for source in sources:
        if len(source.shape) <= dim or source.shape[dim] != want * times:
            raise PlanError(
                f"tensor {target!r}: its source has the shape {list(source.shape)}, but {said} in config.json is {want}"
            )
