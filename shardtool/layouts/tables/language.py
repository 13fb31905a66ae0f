"""The language of layout tables: what a row and a family may say, and what their words mean.

A table is data. The manifest of a checkpoint keeps the one that made it, so that it can be cut again after the
built-in tables have changed; ``docs/layouts.md`` explains the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from shardtool.dtypes import DType
from shardtool.errors import FormatError
from shardtool.layouts.vocabulary import RULES

TIE = "tie_word_embeddings"
UNTIES_SINCE = "0.31"
"""The first engine version that gives a tied model its own head where the checkpoint has one."""
MOST_TEXT = 1000
"""Characters of a text in a table that a manifest kept, so that conditions do not nest without end."""
STAGES = ("", "every", "first", "last", "first|last", "first not last")
"""What ``Row.stage`` may say."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: ``to`` is cut by ``rule`` from ``of``.

    ``{i}`` in names is the layer; ``{e}`` in the names of sources is the expert. ``when`` is a condition on config.json
    (``holds``). ``size`` names the size that the cut dimension must have. ``instead``: names under which a checkpoint
    may hold the same (one tensor for q, k and v, say, or three). ``layers`` names the layers that have the row
    (``sizes.LAYERS``; empty: all). ``dtype``: empty for the model's, ``same`` for the source's own, else a dtype.
    ``stage``: the pipeline stages that hold the row; empty for the layer's own, or every stage where there is no layer.
    ``since``, ``until``: the first and the last engine version that has it.
    """

    rule: str
    to: str
    of: tuple[str, ...] = ()
    when: str = ""
    size: str = ""
    instead: tuple[str, ...] = ()
    layers: str = ""
    dtype: str = ""
    stage: str = ""
    since: str = ""
    until: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """A table.

    ``defaults``: what the engine assumes where config.json is silent. ``keys``: a size's name -> its key in config.json
    where that has another one too. ``inside``: the key under which config.json nests the sizes. ``implied``:
    (condition, key, value) that follow from others, in order; a value ``@key`` is that key's. ``unties``: whether a
    tied model whose checkpoint has a head of its own gets that one. ``experts``: the keys that may say the number of
    experts. ``limits``: sizes of groups that the engine refuses (``sizes.LIMITS``). ``skips``: (layers as
    ``Row.layers`` names them, the beginning of their source names, why the engine skips them). ``prefixes``: (a
    checkpoint's, the table's) beginnings of source names that mean the same. ``drops``: parts of names that the engine
    skips, and why. ``refused``: conditions under which the model is one that the table does not know. ``pipeline``:
    whether the rows know their pipeline stages.
    """

    name: str
    architectures: tuple[str, ...]
    rows: tuple[Row, ...]
    defaults: Mapping[str, Any]
    head_dim_key: str = "head_dim"  # empty: always hidden_size / num_attention_heads
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")  # empty names: no own head
    unties: bool = True
    dtypes: tuple[str, ...] = ("BF16", "F16", "F32")
    refused: tuple[str, ...] = ()
    drops: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    inside: str = ""
    implied: tuple[tuple[str, str, Any], ...] = ()
    experts: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    skips: tuple[tuple[str, str, str], ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()
    pipeline: bool = True
    since: str = ""
    until: str = ""

    def at(self, version: str) -> Family:
        """The table of one engine version: the rows that it has."""
        rows = tuple(replace(row, since="", until="") for row in self.rows if between(row.since, version, row.until))
        unties = self.unties and between(UNTIES_SINCE, version, "")
        return replace(self, rows=rows, unties=unties, since="", until="")

    def record(self) -> dict[str, Any]:
        """The table as JSON values. Columns that came later are left out where they say nothing."""
        made = asdict(self)
        rows = [{key: value for key, value in row.items() if key in _FIRST_OF_ROW or value} for row in made["rows"]]
        return {key: value for key, value in made.items() if key in _FIRST or value} | {"rows": rows}

    def config(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """config.json as the table reads it: over the engine's defaults, under the table's names."""
        nested = said.get(self.inside) if self.inside else None
        full: dict[str, Any] = {**said, **nested} if isinstance(nested, dict) else dict(said)
        if said.get(TIE):  # at either level
            full[TIE] = True
        for ours, theirs in self.keys.items():
            if full.get(theirs) is not None:
                full[ours] = full[theirs]
        for key, value in self.defaults.items():
            if isinstance(value, Mapping) and isinstance(full.get(key), Mapping):
                full[key] = {**value, **full[key]}
            else:
                full.setdefault(key, value)
        for when, key, value in self.implied:
            if holds(when, full):
                full[key] = setting(full, value[1:]) if isinstance(value, str) and value[:1] == "@" else value
        return full

    def spellings(self, name: str) -> tuple[str, ...]:
        """The names that a checkpoint may have for a source."""
        others = tuple(old + name[len(new) :] for old, new in self.prefixes if name.startswith(new))
        return (name, *others)


_FIRST_OF_ROW = frozenset({"rule", "to", "of", "when", "size", "instead"})
_FIRST = frozenset(
    {
        "name",
        "architectures",
        "rows",
        "defaults",
        "head_dim_key",
        "tied",
        "unties",
        "dtypes",
        "refused",
        "drops",
        "pipeline",
    }
)


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A setting; ``a.b`` is b inside a. None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def holds(when: str, config: Mapping[str, Any]) -> bool:
    """Whether a condition is true of a config.

    ``a|b``: one of the keys is true. ``a=x``: it is x, as text; ``a=@b``: it is what b is. ``not a``: it is not so.
    ``x else a|b``: x decides if config.json has it, else the rest. ``a & b``: both conditions are true.
    """
    if not when:
        return True
    if " & " in when:
        return all(holds(part, config) for part in when.split(" & "))
    if when.startswith("not "):
        return not holds(when[4:], config)
    if " else " in when:
        first, rest = when.split(" else ", 1)
        return bool(config[first]) if first in config else holds(rest, config)
    return any(_is(part, config) for part in when.split("|"))


def _is(part: str, config: Mapping[str, Any]) -> bool:
    key, equals, value = part.partition("=")
    if not equals:
        return bool(setting(config, key))
    return (
        setting(config, key) == setting(config, value[1:]) if value[:1] == "@" else str(setting(config, key)) == value
    )


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, by which engines are told apart. Raises ``ValueError``."""
    return tuple(int(part) for part in version.split(".")[:2])


def between(since: str, version: str, until: str) -> bool:
    """Whether a version is from ``since`` to ``until``, both included; empty ones are open."""
    mine = numbers(version)
    return (not since or numbers(since) <= mine) and (not until or mine <= numbers(until))


def from_record(value: Any, where: str) -> Family:
    """A table that a manifest kept. Raises ``FormatError``."""
    try:
        rows = tuple(_row(row) for row in value["rows"])
        lists = {key: tuple(value[key]) for key in ("architectures", "tied", "dtypes", "refused")}
        later = {
            key: tuple(map(_tuple, value.get(key, ()))) for key in ("implied", "experts", "limits", "skips", "prefixes")
        }
        if len(lists["tied"]) != 2:
            raise ValueError("tied does not name two tensors")
        # tables of old manifests say nothing of pipeline stages
        family = Family(**{"pipeline": False, **value, **lists, **later, "rows": rows})
        _check_kinds(family)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: the layout table is damaged ({error!r})") from None
    for row in rows:
        if row.rule not in RULES:
            raise FormatError(
                f"{where}: the layout uses the rule {row.rule!r}, which this version of shardtool does not know"
            )
        for names in (row.of, row.instead or row.of):
            if len(names) not in RULES[row.rule].counts:
                raise FormatError(
                    f"{where}: the layout table cuts {row.to!r} by {row.rule!r} from {len(names)} sources"
                )
    return family


def _row(value: Any) -> Row:
    old = {"dtype": "F32"} if value["rule"] == "scalar" else {}
    return Row(**{**old, **value, "of": tuple(value["of"]), "instead": tuple(value["instead"])})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_kinds(family: Family) -> None:
    """Refuse a table whose columns hold other kinds of values. Raises ``TypeError`` or ``ValueError``."""
    texts: list[object] = [family.name, family.head_dim_key, family.inside, family.since, family.until]
    texts += [*family.architectures, *family.tied, *family.refused, *family.experts, *family.limits]
    for row in family.rows:
        texts += [getattr(row, column.name) for column in fields(row) if column.name not in ("of", "instead")]
        texts += [*row.of, *row.instead]
        if row.stage not in STAGES or row.dtype not in ("", "same", *DType.__members__):
            raise ValueError(f"the row of {row.to!r} has the stage {row.stage!r} and the dtype {row.dtype!r}")
    for pair in family.prefixes:
        old, new = pair
        texts += [old, new]
    for layers, begins, why in family.skips:
        texts += [layers, begins, why]
    for triple in family.implied:
        when, key, _ = triple
        texts += [when, key]
    tables: list[object] = [family.defaults, family.drops, family.keys]
    if not all(isinstance(table, dict) for table in tables):
        raise TypeError("a column that should be a table is none")
    words = (*texts, *family.drops, *family.drops.values(), *family.keys, *family.keys.values())
    if not all(isinstance(text, str) and len(text) <= MOST_TEXT for text in words):
        raise TypeError(f"a column holds something that is not a text of at most {MOST_TEXT} characters")
    flags: list[object] = [family.pipeline, family.unties]
    if not all(isinstance(flag, bool) for flag in flags):
        raise TypeError("a column that should be true or false is neither")
    if not family.architectures or not family.dtypes:
        raise ValueError("a column has too few entries")
    if not set(family.dtypes) <= set(DType.__members__):
        raise ValueError(f"{family.dtypes} are not all dtypes")
