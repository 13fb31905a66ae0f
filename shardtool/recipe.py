"""The recipe: what every rank's tensors are made of, compact enough to be kept with them.

A layout is evaluated once per kind of layer; what repeats is one ``Rule`` with the layers' numbers. A rule says for
each group of ranks the shape, the fill and the pieces; ``{i}`` in names stands for the number::

    Rule "model.layers.{i}.self_attn.qkv_proj.weight"  i = 0..31  BF16
    └── Share  ranks 0,1  shape [1536, 4096]
        └── Piece  dst <- src of "model.layers.{i}.self_attn.q_proj.weight"

The recipe that is executed is the recipe that is recorded: plans are made from it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from shardtool.dtypes import DType
from shardtool.errors import FormatError
from shardtool.plan import Piece, Tensor
from shardtool.window import Window, row_major

SLOT = "{i}"
MOST_NUMBERS = 1 << 22
"""Numbers of layers and ranks that a recipe may have in all: a few bytes of JSON must not ask for gigabytes."""
MOST_DIMENSIONS = 64
MOST_ELEMENTS = 1 << 59
"""Elements that a tensor may have, of up to eight bytes each."""


@dataclass(frozen=True, slots=True)
class Share:
    """What some ranks hold of a target: all of them the same."""

    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    fill: float | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One target, or one per number in ``index`` where the name has the slot ``{i}``."""

    name: str
    dtype: DType
    shares: tuple[Share, ...]
    index: tuple[int, ...] = ()

    def names(self) -> Iterator[tuple[str, int | None]]:
        """Each target's name with its number."""
        if not self.index:
            yield self.name, None
        for i in self.index:
            yield self.name.replace(SLOT, str(i)), i

    def sources(self) -> dict[str, list[Window]]:
        """The windows that this rule takes of each source (names still with the slot)."""
        found: dict[str, list[Window]] = {}
        for share in self.shares:
            for piece in share.pieces:
                found.setdefault(str(piece.source), []).append(piece.src)
        return found


def filled(name: str, number: int | None) -> str:
    """A name with its slot filled."""
    return name if number is None else name.replace(SLOT, str(number))


@dataclass(frozen=True, slots=True)
class Recipe:
    """All rules of a layout."""

    rules: tuple[Rule, ...]

    def tensors(self, rank: int) -> Iterator[Tensor]:
        """What one rank holds, pieces made when asked for, citing names."""
        for rule in self.rules:
            for share in rule.shares:
                if rank in share.ranks:
                    for name, number in rule.names():
                        yield Tensor(name, rule.dtype, share.shape, _Filled(share, number), share.fill)
                    break

    def by_name(self) -> Iterator[list[tuple[int, Tensor]]]:
        """Every target with the ranks that hold it, one name at a time.

        Ranks that hold the same share one ``Tensor``.
        """
        for rule in self.rules:
            for name, number in rule.names():
                group = []
                for share in rule.shares:
                    tensor = Tensor(name, rule.dtype, share.shape, _Filled(share, number), share.fill)
                    group += [(rank, tensor) for rank in share.ranks]
                yield group

    def ranks(self) -> tuple[int, ...]:
        """Every rank that holds anything."""
        return tuple(sorted({rank for rule in self.rules for share in rule.shares for rank in share.ranks}))


class _Filled:
    """The pieces of a share with the slots of their names filled, made when called.

    One per target, so it is kept small.
    """

    __slots__ = ("_number", "_share")

    def __init__(self, share: Share, number: int | None) -> None:
        self._share = share
        self._number = number

    def __call__(self) -> tuple[Piece, ...]:
        return tuple(Piece(p.dst, p.src, filled(str(p.source), self._number)) for p in self._share.pieces)


# JSON


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """Sorted numbers as runs [first, one past the last]."""
    found: list[list[int]] = []
    for n in numbers:
        if found and found[-1][1] == n:
            found[-1][1] = n + 1
        else:
            found.append([n, n + 1])
    return found


def count(value: Any) -> int:
    """How many numbers such runs hold, without making them."""
    total = 0
    for first, past in value:
        if type(first) is not int or type(past) is not int or not 0 <= first < past:
            raise ValueError(f"the run {first!r}..{past!r} is not one of numbers")
        total += past - first
    return total


def from_runs(value: Any) -> tuple[int, ...]:
    """The numbers of such runs; a million at most."""
    if count(value) > 1_000_000:
        raise ValueError(f"the runs hold {count(value)} numbers, more than a million")
    return tuple(n for first, past in value for n in range(first, past))


def to_json(recipe: Recipe) -> list[dict[str, Any]]:
    """The recipe as JSON values; ``docs/manifest.md`` specifies them."""
    return [
        {
            "name": rule.name,
            **({"i": runs(rule.index)} if rule.index else {}),
            "dtype": rule.dtype.name,
            "shares": [
                {
                    "ranks": runs(share.ranks),
                    "shape": list(share.shape),
                    **({} if share.fill is None else {"fill": share.fill}),
                    "pieces": [_piece_to_json(piece, share.shape) for piece in share.pieces],
                }
                for share in rule.shares
            ],
        }
        for rule in recipe.rules
    ]


def _piece_to_json(piece: Piece, shape: tuple[int, ...]) -> dict[str, Any]:
    if piece.dst == row_major(shape) and piece.src == piece.dst:
        return {"of": piece.source}
    return {
        "of": piece.source,
        "shape": list(piece.dst.shape),
        "to": [piece.dst.offset, *piece.dst.strides],
        "from": [piece.src.offset, *piece.src.strides],
    }


def from_json(value: Any, where: str) -> Recipe:
    """The recipe that JSON values say, checked: windows stay inside their targets. Raises ``FormatError``."""
    try:
        if sum(count(runs) for entry in value for runs in _all_runs(entry)) > MOST_NUMBERS:
            raise ValueError(f"it has more than {MOST_NUMBERS} numbers of layers and ranks")
        return Recipe(tuple(_rule(entry) for entry in value))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
        raise FormatError(f"{where}: the recipe is damaged ({repr(error)[:300]})") from None


def _all_runs(entry: Mapping[str, Any]) -> Iterator[Any]:
    """The runs of a rule: small in JSON, large when they are numbers."""
    yield entry.get("i", ())
    for share in entry["shares"]:
        yield share["ranks"]


def sizes(values: Any) -> tuple[int, ...]:
    """A shape, or what goes with one: no tensor has so many dimensions or elements that it could not be stored."""
    if (
        not isinstance(values, list)
        or len(values) > MOST_DIMENSIONS
        or not all(type(n) is int and 0 <= n < MOST_ELEMENTS for n in values)
    ):
        raise ValueError(f"{values!r:.100} are not sizes")
    return tuple(values)


def shape_of(values: Any) -> tuple[int, ...]:
    """A shape of a tensor that could be."""
    shape = sizes(values)
    if prod(shape) >= MOST_ELEMENTS:
        raise ValueError(f"no tensor has the shape {list(shape)}")
    return shape


def _rule(entry: Mapping[str, Any]) -> Rule:
    index = from_runs(entry["i"]) if "i" in entry else ()
    if not isinstance(entry["name"], str) or bool(index) != (SLOT in entry["name"]):
        raise ValueError(f"the name {entry['name']!r} and its numbers do not fit")
    shares = tuple(_share(share) for share in entry["shares"])
    ranks = [rank for share in shares for rank in share.ranks]
    if len(ranks) != len(set(ranks)):
        raise ValueError(f"a rank has two shares of {entry['name']!r}")
    return Rule(entry["name"], DType[entry["dtype"]], shares, index)


def _share(entry: Mapping[str, Any]) -> Share:
    shape = shape_of(entry["shape"])
    fill = entry.get("fill")
    if fill is not None and type(fill) not in (int, float):
        raise ValueError(f"the fill {fill!r} is not a number")
    pieces = tuple(_piece(piece, shape) for piece in entry["pieces"])
    end = row_major(shape).bounds[1]
    for piece in pieces:
        if piece.dst.bounds[1] > end or piece.dst.size > end:
            raise ValueError(f"a piece of {piece.source!r} leaves its target")
    return Share(from_runs(entry["ranks"]), shape, pieces, None if fill is None else float(fill))


def _piece(entry: Mapping[str, Any], shape: tuple[int, ...]) -> Piece:
    if not isinstance(entry["of"], str):
        raise ValueError(f"the source {entry['of']!r} is not a name")
    if "shape" not in entry:
        window = row_major(shape)
        return Piece(window, window, entry["of"])
    box, to, of = shape_of(entry["shape"]), sizes(entry["to"]), sizes(entry["from"])
    if not len(to) == len(of) == len(box) + 1:
        raise ValueError(f"a piece of {entry['of']!r} has windows of different shapes")
    return Piece(Window(to[0], box, to[1:]), Window(of[0], box, of[1:]), entry["of"])
