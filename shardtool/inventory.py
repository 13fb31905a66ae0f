"""The inventory of a source, every tensor's dtype and shape: as compact JSON values, and against a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from shardtool.dtypes import DType
from shardtool.mosaic import Logical
from shardtool.recipe import SLOT, Recipe, filled
from shardtool.recipe_json import count, from_runs, runs, shape_of, text_of

MOST_TENSORS = 1 << 20
MOST_LETTERS = 128 << 20
"""Source tensors, and letters of their names, that one may have: runs of numbers say many in a few bytes."""

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,8})(?=\.)")


def pack(inventory: Mapping[str, Logical]) -> list[dict[str, Any]]:
    """The inventory with the layers' numbers folded into runs."""
    groups: dict[tuple[str, str, tuple[int, ...], bool], list[int]] = {}
    for name, tensor in inventory.items():
        number = None if SLOT in name else _NUMBER.search(name)
        if number:
            template = name[: number.start()] + SLOT + name[number.end() :]
            groups.setdefault((template, tensor.dtype.name, tensor.shape, True), []).append(int(number[0]))
        else:
            groups[name, tensor.dtype.name, tensor.shape, False] = []
    return [
        {"name": name, **({"i": runs(sorted(index))} if folded else {}), "dtype": dtype, "shape": list(shape)}
        for (name, dtype, shape, folded), index in sorted(groups.items())
    ]


def unpack(value: Any) -> dict[str, Logical]:
    """The inventory that such values say. Raises the built-in errors of wrong shapes."""
    found: dict[str, Logical] = {}
    counts = [count(entry["i"]) if "i" in entry else 1 for entry in value]
    letters = 0
    for n, entry in zip(counts, value, strict=True):
        letters += n * len(text_of(entry["name"]))
    if sum(counts) > MOST_TENSORS or letters > MOST_LETTERS:
        raise ValueError(f"it lists {sum(counts)} source tensors, whose names have {letters} letters")
    for entry in value:
        tensor = Logical(DType[entry["dtype"]], shape_of(entry["shape"]))
        for i in from_runs(entry["i"]) if "i" in entry else (None,):
            found[filled(entry["name"], i)] = tensor
    return dict(sorted(found.items()))


def check(recipe: Recipe, ranks: int, inventory: Mapping[str, Logical], *, complete: bool) -> None:
    """Refuse a recipe with ranks beyond those that there are, or windows beyond the ends of its sources.

    ``complete``: a source that is not listed is refused too. Raises ``ValueError``.
    """
    for rule in recipe.rules:
        if any(share.ranks and max(share.ranks) >= ranks for share in rule.shares):
            raise ValueError(f"{rule.name!r} has a rank beyond the {ranks} that there are")
        ends = {name: max(window.bounds[1] for window in windows) for name, windows in rule.sources().items()}
        for template in {*ends, *(name for program in rule.programs() for name in program.sources())}:
            for name in rule.filled((template,)):
                logical = inventory.get(name)
                if logical is None and complete:
                    raise ValueError(f"{rule.name!r} takes {name!r}, which the checkpoint does not have")
                if logical is not None and ends.get(template, 0) > prod(logical.shape):
                    raise ValueError(f"{rule.name!r} takes elements of {name!r} that are beyond its last")
