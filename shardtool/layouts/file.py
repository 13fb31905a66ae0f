"""The layout file: what an engine's own loader was seen to do, for the sizes of groups that were asked for.

``shardtool trace`` writes it where the engine is installed; ``--layout FILE`` uses it anywhere. ``docs/layouts.md``
specifies it::

    engine, engine_version, class, dtype      whose layout it is (moe_backend too, where the shapes depend on it)
    tensors                                   the checkpoint that it is for, as the manifest keeps inventories
    layouts                                   for each sizes of groups: the recipe of every rank, what is not loaded,
                                              names that share memory, tensors with memory that nothing fills, config
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardtool import inventory, parallel, recipe_json
from shardtool.dtypes import DType
from shardtool.errors import FormatError, PlanError
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.manifest import Manifest
from shardtool.mosaic import Logical
from shardtool.recipe import Recipe, Rule, used, used_by_programs
from shardtool.recipe_json import table_of, text_of

FORMAT = "shardtool-layout/1"
KIND = "traced"
TIE = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Traced:
    """What was seen at some sizes.

    ``aliases``: names that share the memory of another, which is the one that is stored. ``uninitialised``: targets and
    how many of their elements the engine leaves as memory happens to be. ``untied``: config.json ties head and
    embedding, but the checkpoint has both and the engine loads both; ``tied``: the names of the two targets where it
    then compares them and holds one if they are equal.
    """

    parallel: Parallel
    recipe: Recipe
    dropped: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    amendments: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    uninitialised: Mapping[str, int] = field(default_factory=dict)
    untied: bool = False
    tied: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The layout of one checkpoint (or of others with the same tensors), at the sizes in ``traced``."""

    engine: str
    engine_version: str
    model_class: str
    dtype: DType
    tensors: Mapping[str, Logical]
    traced: tuple[Traced, ...]
    moe_backend: str | None = None
    where: str = "the layout file"

    @property
    def title(self) -> str:
        """How people name it."""
        backend = "" if self.moe_backend is None else f", MoE backend {self.moe_backend}"
        return f"the trace of {self.engine} {self.engine_version} ({self.model_class}{backend})"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtype in which it was traced."""
        return (self.dtype.name,)

    def record(self) -> dict[str, Any]:
        """What the manifest keeps; the recipe stands there already."""
        return {
            "engine": self.engine,
            "engine_version": self.engine_version,
            "kind": KIND,
            "class": self.model_class,
            **({} if self.moe_backend is None else {"moe_backend": self.moe_backend}),
        }

    def outline(self, model: Model, parallel: Parallel) -> Outline:
        """The recipe of every rank. Raises ``PlanError`` for other sizes and for another checkpoint."""
        found = next((one for one in self.traced if one.parallel == parallel), None)
        if found is None:
            held = ", ".join(str(one.parallel) for one in self.traced)
            raise PlanError(
                f"{self.where} holds the layout of {self.engine} {self.engine_version} for {held}, not for {parallel}: "
                f"--layout {self.engine}:traced where {self.engine} is installed, --layout {self.engine}:builtin if a "
                f"table knows the model, or --layout with a file of these sizes"
            )
        self._check_tensors(model.tensors)
        notes = [
            f"{self.engine} leaves {count} elements of {name} as memory happens to be; they are written as 0"
            for name, count in found.uninitialised.items()
        ]
        recipe, copies, amendments = found.recipe, dict(found.copies), dict(found.amendments)
        if found.untied:
            equal = _equal(found, model)
            if equal is not None and found.tied is not None:
                recipe = _once(recipe, found.tied)
                copies[equal[0]] = equal[1]
            else:  # the engine's loader of shards does not look for an own head: config.json has to say it
                amendments.update(_untied(model.config))
        reason = f"the shards hold what {self.engine} computes of it"
        computed = dict.fromkeys(sorted(used_by_programs(recipe) - used(recipe)), reason)
        return Outline(recipe, {**computed, **found.dropped}, copies, amendments, tuple(notes))

    def _check_tensors(self, tensors: Mapping[str, Logical]) -> None:
        """Refuse a checkpoint with other tensors than the traced one had."""
        if missing := sorted(self.tensors.keys() - tensors.keys()):
            raise PlanError(f"{self.where} is of another checkpoint: this one has no tensor {missing[0]!r}")
        if strange := sorted(tensors.keys() - self.tensors.keys()):
            raise PlanError(f"{self.where} is of another checkpoint: it does not know the tensor {strange[0]!r}")
        for name, tensor in tensors.items():
            if self.tensors[name] != tensor:
                was = self.tensors[name]
                raise PlanError(
                    f"{self.where} is of another checkpoint: there {name!r} is {was.dtype.name} {list(was.shape)}, "
                    f"here {tensor.dtype.name} {list(tensor.shape)}"
                )


def _equal(traced: Traced, model: Model) -> tuple[str, str] | None:
    """The source tensors of a head and of the embedding, if they are equal."""
    if traced.tied is None:
        return None
    rules = {rule.name: rule for rule in traced.recipe.rules if rule.name in traced.tied}
    head, embedding = (_source(rules[name]) for name in traced.tied)
    return (head, embedding) if head and embedding and model.equal(head, embedding) else None


def _source(rule: Rule) -> str | None:
    """The one source tensor that a rule cuts."""
    names = {str(piece.source) for share in rule.shares for piece in share.expanded()}
    return names.pop() if len(names) == 1 else None


def _once(recipe: Recipe, tied: tuple[str, str]) -> Recipe:
    """The recipe with head and embedding as one tensor, under the smaller name, cut from the embedding."""
    (embedding,) = (rule for rule in recipe.rules if rule.name == tied[1])
    one = Rule(min(tied), embedding.dtype, embedding.shares, embedding.index)
    kept = [rule for rule in recipe.rules if rule.name not in tied]
    return Recipe(tuple(sorted([*kept, one], key=lambda rule: (rule.name, rule.index))))


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json must say of a checkpoint with a head of its own."""
    said: dict[str, Any] = {TIE: False}
    nested = config.get("text_config")
    if isinstance(nested, dict) and nested.get(TIE, True):
        said["text_config"] = {**nested, TIE: False}
    return said


def of_manifest(made: Manifest, where: str) -> FileLayout:
    """The layout that a manifest recorded, for the sizes that its shards have."""
    record = made.layout
    dropped = {found.name: found.reason for found in made.dropped}
    try:
        return FileLayout(
            text_of(record["engine"]),
            text_of(record["engine_version"]),
            text_of(record["class"]),
            made.dtype,
            made.inventory,
            (Traced(made.parallel, made.recipe, dropped, made.copies, made.amendments),),
            _backend(record),
            where,
        )
    except (KeyError, TypeError) as error:
        raise FormatError(f"{where}: the layout is damaged ({error!r:.200})") from None


# JSON


def encode(layout: FileLayout) -> bytes:
    """The bytes of the file: one line for each top-level key."""
    table = {
        "format": FORMAT,
        "engine": layout.engine,
        "engine_version": layout.engine_version,
        "class": layout.model_class,
        "dtype": layout.dtype.name,
        **({} if layout.moe_backend is None else {"moe_backend": layout.moe_backend}),
        "tensors": inventory.pack(layout.tensors),
        "layouts": [_traced_to_json(traced) for traced in layout.traced],
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in table.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _traced_to_json(traced: Traced) -> dict[str, Any]:
    return {
        "parallel": traced.parallel.to_json(),
        "recipe": recipe_json.to_json(traced.recipe),
        "dropped": dict(traced.dropped),
        "copies": dict(traced.copies),
        "amendments": dict(traced.amendments),
        "aliases": dict(traced.aliases),
        "uninitialised": dict(traced.uninitialised),
        "untied": traced.untied,
        **({} if traced.tied is None else {"tied": list(traced.tied)}),
    }


def decode(data: bytes, where: str) -> FileLayout:
    """The layout that these bytes say, checked. Raises ``FormatError``."""
    try:
        table = json.loads(data.decode("utf-8"))
        said = table["format"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise FormatError(f"{where} is not a layout file: make one with shardtool trace") from None
    if said != FORMAT:
        raise FormatError(f"{where} has the format {said!r:.80}; this version of shardtool reads {FORMAT!r}")
    try:
        layout = FileLayout(
            text_of(table["engine"]),
            text_of(table["engine_version"]),
            text_of(table["class"]),
            DType[table["dtype"]],
            inventory.unpack(table["tensors"]),
            tuple(_traced(entry, where) for entry in table["layouts"]),
            _backend(table),
            where,
        )
        for traced in layout.traced:
            _check(traced, layout.tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: {repr(error)[:300]}") from None
    return layout


def _backend(table: Mapping[str, Any]) -> str | None:
    """The MoE backend for which the shapes are, where one was named."""
    return text_of(table["moe_backend"]) if "moe_backend" in table else None


def _traced(entry: Mapping[str, Any], where: str) -> Traced:
    tied = entry.get("tied")
    if tied is not None:
        head, embedding = tied
        tied = text_of(head), text_of(embedding)
    return Traced(
        parallel.from_json(table_of(entry["parallel"])),
        recipe_json.from_json(entry["recipe"], where),
        _texts(entry["dropped"]),
        _texts(entry["copies"]),
        table_of(entry["amendments"]),
        _texts(entry["aliases"]),
        {text_of(name): _count(count) for name, count in table_of(entry["uninitialised"]).items()},
        bool(entry["untied"]),
        tied,
    )


def _check(traced: Traced, tensors: Mapping[str, Logical]) -> None:
    """What each value alone does not show: ranks, sources and windows that are not there. Raises ``ValueError``."""
    ranks = len(traced.parallel.ranks)
    names = {rule.name for rule in traced.recipe.rules}
    if traced.tied is not None and not set(traced.tied) <= names:
        raise ValueError(f"{traced.tied} are tied, but are no tensors of the layout")
    inventory.check(traced.recipe, ranks, tensors, complete=True)


def _texts(value: Any) -> dict[str, str]:
    return {text_of(key): text_of(text) for key, text in table_of(value).items()}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is not a count")
    return value
