"""vLLM's layout from a built-in table: the rows of a family, evaluated once per kind of layer.

``outline``   a source model and the sizes of the groups -> the recipe of every rank
``infer``     a rank's shapes, as an engine saved them without a manifest -> the source model that they came from
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardtool.dtypes import DType, castable
from shardtool.errors import FormatError, PlanError, TensorMismatch, UnsupportedModel, UnsupportedTransform
from shardtool.layouts import quantized, sizes
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.layouts.rules import Dims, Source
from shardtool.layouts.tables import ENGINE, ENGINE_VERSION, find
from shardtool.layouts.tables.language import TIE, Family, Row, from_record, holds
from shardtool.layouts.vocabulary import RULES
from shardtool.mosaic import Logical
from shardtool.recipe import EXPERT, SLOT, Recipe, Rule, Share, filled


@dataclass(frozen=True, slots=True)
class VllmLayout:
    """The layout of one family's table."""

    family: Family
    engine_version: str = ENGINE_VERSION
    moe_backend: str | None = None

    @property
    def engine(self) -> str:
        """The engine."""
        return ENGINE

    @property
    def title(self) -> str:
        """How people name it."""
        return f"the built-in table {self.family.name}"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes in which the engine holds the model, the one that it falls back to first."""
        return self.family.dtypes

    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {
            "engine": ENGINE,
            "engine_version": self.engine_version,
            "kind": "builtin",
            "table": self.family.record(),
            **({"moe_backend": self.moe_backend} if self.moe_backend else {}),
        }

    def outline(self, model: Model, parallel: Parallel) -> Outline:
        """The recipe of every rank. Raises ``PlanError`` for what the engine would refuse or leave uninitialised."""
        config = self._config(model.config, parallel)
        copies: dict[str, str] = {}
        ignored: dict[str, str] = {}
        amendments: dict[str, Any] = {}
        head, embed = (_spelled(self.family, model, name) for name in self.family.tied)
        if head and config.get(TIE) and head in model.tensors and embed in model.tensors:
            if model.equal(head, embed):
                copies[head] = embed
            elif not self.family.unties:
                ignored[head] = "a head that the engine does not look at, because config.json says that it is tied"
            else:  # engines that load shards do not look for an own head: config.json has to say it
                config[TIE] = amendments[TIE] = False
                nested = model.config.get(self.family.inside)
                if isinstance(nested, Mapping) and TIE in nested:
                    amendments[self.family.inside] = {**nested, TIE: False}
        dims = sizes.dims(self.family, config, expert_parallel=parallel.ep)
        if parallel.ep and not dims.experts:
            raise PlanError(f"{self.family.architectures[0]} has no experts; leave --expert-parallel out")
        for limit in self.family.limits:
            sizes.LIMITS[limit](dims, parallel)
        family = self.family
        if scheme := quantized.find(config):
            found = quantized.applied(family, scheme, model.tensors, dims, parallel)
            family, amendments = found.family, {**amendments, **found.amendments}
        work = _Work(family, model, dims, parallel, _Places(config, parallel), {*copies, *ignored})
        rules = [rule for row in family.rows if holds(row.when, config) for rule in work.rules(row)]
        rules.sort(key=lambda rule: rule.name)
        return Outline(Recipe(tuple(rules)), ignored | work.dropped(), copies, amendments)

    def _config(self, said: Mapping[str, Any], parallel: Parallel) -> dict[str, Any]:
        """config.json as the table reads it, refused where the table does not know what it asks for."""
        config = self.family.config(said)
        for condition in self.family.refused:
            if holds(condition, config):
                raise UnsupportedModel(
                    f"config.json sets {condition}, which the table of {self.family.name} does not know"
                )
        if parallel.pp > 1 and not self.family.pipeline:
            raise UnsupportedModel(f"the table of {self.family.name} knows no pipeline stages; leave --pp out")
        if scheme := quantized.find(config):
            quantized.refuse(self.family, scheme[1], self.engine_version)
        return {**config, "moe_backend": self.moe_backend} if self.moe_backend else config

    def infer(self, config: Mapping[str, Any], held: Mapping[str, Logical], parallel: Parallel) -> dict[str, Logical]:
        """The source tensors of shards that an engine saved, from what one rank of each stage holds."""
        full = self._config(config, parallel)
        dims = sizes.dims(self.family, full, expert_parallel=parallel.ep)
        if full.get(TIE) and parallel.pp == 1 and any(name in held for name in self._embeddings()):
            full[TIE] = False  # both are held: the head is its own
        places = _Places(full, parallel)
        family = self.family
        if scheme := quantized.find(full):
            family = quantized.applied(family, scheme, held, dims, parallel, targets=True).family
        sources: dict[str, Logical] = {}
        expected: set[str] = set()
        for row in family.rows:
            if not holds(row.when, full):
                continue
            for i, stages in places.of(row):
                target = filled(row.to, i)
                if not stages:
                    continue
                expected.add(target)
                if target not in held:
                    raise TensorMismatch(
                        f"the shards have no tensor {target!r}, which {self.family.architectures[0]} needs"
                    )
                shapes = RULES[row.rule].unshard(held[target].shape, len(row.of), dims, parallel.tp)
                for name, shape in zip(row.of, shapes, strict=True):
                    for each in _experts(filled(name, i), dims):
                        sources.setdefault(each, Logical(held[target].dtype, shape))
        if strange := sorted(set(held) - expected):
            raise TensorMismatch(
                f"the shards have {len(strange)} tensors that {self.family.architectures[0]} does not, first "
                f"{strange[0]!r}"
            )
        return sources

    def _embeddings(self) -> set[str]:
        """The targets that only a model with an own head has at one stage."""
        head, embed = self.family.tied
        of = {name: {row.to for row in self.family.rows if row.of == (name,)} for name in (head, embed)}
        return of[embed] - of[head]


@dataclass(frozen=True, slots=True)
class _Places:
    """Which numbers a row's slot takes, and which pipeline stages hold each."""

    config: Mapping[str, Any]
    parallel: Parallel
    _stages: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.parallel.pp > 1:
            layers = sizes.integer(self.config, "num_hidden_layers", sizes.MOST)
            for stage, mine in enumerate(self.parallel.stages(layers)):
                self._stages.update(dict.fromkeys(mine, stage))

    def of(self, row: Row) -> Iterator[tuple[int | None, tuple[int, ...]]]:
        """(number, stages); the number is None for a row without a slot."""
        last = self.parallel.pp - 1
        named = {
            "": tuple(range(last + 1)),
            "every": tuple(range(last + 1)),
            "first": (0,),
            "last": (last,),
            "first|last": (0, last) if last else (0,),
            "first not last": (0,) if last else (),
        }[row.stage]
        if SLOT not in row.to:
            yield None, named
            return
        for i in sizes.layers(row.layers, self.config):
            yield i, named if row.stage else (self._stages.get(i, 0),)


@dataclass(frozen=True, slots=True)
class _Work:
    """The evaluation of one model's table; ``used`` are the sources that have a place."""

    family: Family
    model: Model
    dims: Dims
    parallel: Parallel
    places: _Places
    used: set[str]

    def rules(self, row: Row) -> Iterator[Rule]:
        """One rule for each kind of layer: those whose sources have the same names, shapes and stages."""
        kinds: dict[tuple[tuple[Source, ...], DType, tuple[int, ...]], list[int]] = {}
        for i, stages in self.places.of(row):
            if stages:
                sources = tuple(self._source(name, i, row) for name in self._names(row, i))
                kinds.setdefault((sources, self._dtype(row, sources, i), stages), []).append(-1 if i is None else i)
        for (sources, dtype, stages), index in kinds.items():
            target = filled(row.to, index[0])
            _check_size(target, row, sources, self.dims)
            shares = RULES[row.rule].cut(target, sources, self.dims, self.parallel.tp)
            yield Rule(row.to, dtype, _staged(shares, stages, self.parallel.tp), tuple(index) if SLOT in row.to else ())

    def _names(self, row: Row, i: int | None) -> tuple[str, ...]:
        """The sources' names as this checkpoint spells them."""
        if row.instead:
            other = tuple(_spelled(self.family, self.model, name, i) for name in row.instead)
            if all(_first(filled(name, i)) in self.model.tensors for name in other):
                return other
        return tuple(_spelled(self.family, self.model, name, i) for name in row.of)

    def _source(self, name: str, i: int | None, row: Row) -> Source:
        """One source; all experts of one that names them. Refused where the checkpoint has no such tensor."""
        if EXPERT in name and not self.dims.experts:
            raise PlanError(
                f"the table of {self.family.name} makes {filled(row.to, i)!r} of one {name!r} for each expert, but "
                "config.json says that the model has none"
            )
        found: Logical | None = None
        for each in _experts(filled(name, i), self.dims):
            tensor = self.model.tensors.get(each)
            if tensor is None:
                raise PlanError(
                    f"the checkpoint has no tensor {each!r}, which "
                    f"{self.family.architectures[0]} with this config.json needs"
                )
            if found is not None and found != tensor:
                raise PlanError(
                    f"tensor {each!r} is {tensor.dtype.name} {list(tensor.shape)}, but that of the first expert is "
                    f"{found.dtype.name} {list(found.shape)}"
                )
            to = self._wanted(row, tensor)
            if not castable(tensor.dtype, to):
                raise UnsupportedTransform(f"tensor {each!r} is {tensor.dtype.name}, which cannot be cast to {to.name}")
            self.used.add(each)
            found = tensor
        assert found is not None
        return Source(name, found.shape, tuple(range(self.dims.experts)) if EXPERT in name else ())

    def _wanted(self, row: Row, source: Logical) -> DType:
        if row.dtype == "same":
            return source.dtype
        return DType[row.dtype] if row.dtype else self.model.dtype

    def _dtype(self, row: Row, sources: Iterable[Source], i: int | None) -> DType:
        """The target's dtype; refused where it should be its sources' and they differ."""
        held = [self.model.tensors[_first(filled(source.name, i))] for source in sources]
        found = {self._wanted(row, tensor) for tensor in held}
        if len(found) > 1:
            said = ", ".join(sorted(dtype.name for dtype in found))
            raise PlanError(f"tensor {filled(row.to, i)!r}: its sources are {said}, which cannot be stacked")
        return found.pop() if found else DType[row.dtype] if row.dtype else self.model.dtype

    def dropped(self) -> dict[str, str]:
        """The sources that no target uses, with the reason. One without a reason is refused."""
        dropped: dict[str, str] = {}
        strange: list[str] = []
        modules = {name.rpartition(".")[0] for name in self.used}
        skipped = [
            (filled(begins, i), why)
            for layers, begins, why in self.family.skips
            for i in sizes.LAYERS[layers](self.dims.config)
        ]
        for name in self.model.tensors:
            if name in self.used:
                continue
            reason = next((why for part, why in self.family.drops.items() if part in name), None)
            reason = reason or next((why for begins, why in skipped if name.startswith(begins)), None)
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


def _spelled(family: Family, model: Model, name: str, i: int | None = None) -> str:
    """A source's name as the checkpoint spells it; the table's own where it has none of the spellings."""
    for spelling in family.spellings(name):
        if _first(filled(spelling, i)) in model.tensors:
            return spelling
    return name


def _first(name: str) -> str:
    """A source's name for the first expert."""
    return name.replace(EXPERT, "0")


def _experts(name: str, dims: Dims) -> Iterator[str]:
    """A source's name for each expert, or just the name."""
    if EXPERT not in name:
        yield name
        return
    for e in range(dims.experts):
        yield name.replace(EXPERT, str(e))


def _staged(shares: tuple[Share, ...], stages: tuple[int, ...], tp: int) -> tuple[Share, ...]:
    """Shares of the tensor parallel ranks as those of the ranks of some stages."""
    if stages == (0,):
        return shares
    return tuple(
        Share(tuple(stage * tp + r for stage in stages for r in share.ranks), share.shape, share.pieces, share.fill)
        for share in shares
    )


def for_config(
    config: Mapping[str, Any], engine_version: str = ENGINE_VERSION, moe_backend: str | None = None
) -> VllmLayout:
    """The layout of a model. ``moe_backend``: the engine's kernel for experts, where shapes depend on it.

    Raises ``UnsupportedModel`` for architectures without a table and for schemes of quantization that none knows.
    """
    family = find(config, engine_version)
    if scheme := quantized.find(config):
        quantized.refuse(family, scheme[1], engine_version)
    return VllmLayout(family, engine_version, moe_backend)


def from_manifest(record: Mapping[str, Any], where: str) -> VllmLayout:
    """The layout that a manifest kept. Raises ``FormatError``."""
    if record.get("engine") != ENGINE or record.get("kind") != "builtin":
        raise FormatError(
            f"{where}: the layout {record.get('engine')!r} {record.get('kind')!r} is not one that this version "
            f"of shardtool knows"
        )
    family = from_record(record.get("table"), where)
    said: list[tuple[str, str, Mapping[str, object]]] = [("limit", limit, sizes.LIMITS) for limit in family.limits]
    said += [("layers", skipped[0], sizes.LAYERS) for skipped in family.skips]
    for row in family.rows:
        said += [("size", row.size, sizes.SIZES), ("layers", row.layers, sizes.LAYERS)]
    for what, word, words in said:
        if word and word not in words:
            raise FormatError(
                f"{where}: the layout names the {what} {word!r}, which this version of shardtool does not know"
            )
    backend = record.get("moe_backend")
    return VllmLayout(family, str(record.get("engine_version")), backend if isinstance(backend, str) else None)


def _check_size(target: str, row: Row, sources: Iterable[Source], dims: Dims) -> None:
    """Refuse sources whose cut dimension is not what config.json says.

    The engine would cut them short without a word.
    """
    if not row.size:
        return
    rule, found = RULES[row.rule], tuple(sources)
    said, size = sizes.SIZES[row.size]
    want = size(dims)
    times = rule.parts if len(found) == 1 else 1
    for source in found:
        if not -len(source.shape) <= rule.dim < len(source.shape) or source.shape[rule.dim] != want * times:
            raise PlanError(
                f"tensor {target!r}: its source has the shape {list(source.shape)}, but {said} in config.json is {want}"
            )
