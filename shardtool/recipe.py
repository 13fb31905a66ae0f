"""The recipe: what every rank's tensors are made of, compact enough to be kept with them.

A layout is evaluated once per kind of layer; what repeats is one ``Rule`` with the layers' numbers. A rule says for
each group of ranks the shape, the fill and the pieces; ``{i}`` in names stands for the layer's number, ``{e}`` in a
series for an expert's::

    Rule "model.layers.{i}.mlp.experts.w2"  i = 0..31  BF16
    └── Share  ranks 0,1  shape [64, 4096, 768]
        ├── Piece   dst <- src of one source
        └── Series  e = 0..63, one piece each: dst <- src of "model.layers.{i}.mlp.experts.{e}.down_proj.weight"

The recipe that is executed is the recipe that is recorded: plans are made from it alone. ``recipe_json`` writes it
down, ``fold`` makes it from every rank's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from shardtool.dtypes import DType
from shardtool.plan import Mosaic, Piece, Program, Tensor
from shardtool.window import Window

SLOT = "{i}"
EXPERT = "{e}"


@dataclass(frozen=True, slots=True)
class Series:
    """One piece for each number: ``{e}`` in its source's name is the number.

    The k-th has its windows moved by k times ``dst_step`` and ``src_step`` elements.
    """

    piece: Piece
    numbers: tuple[int, ...]
    dst_step: int
    src_step: int = 0

    def pieces(self) -> Iterator[Piece]:
        """The pieces, one after the other."""
        for k, number in enumerate(self.numbers):
            moved = Piece(
                self.piece.dst.moved(k * self.dst_step), self.piece.src.moved(k * self.src_step), self.piece.source
            )
            yield renamed(moved, lambda name, number=number: name.replace(EXPERT, str(number)))  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Share:
    """What some ranks hold of a target: all of them the same."""

    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece | Series, ...]
    fill: float | None = None

    def expanded(self) -> Iterator[Piece]:
        """The plain pieces, those of every expert included."""
        for piece in self.pieces:
            if isinstance(piece, Series):
                yield from piece.pieces()
            else:
                yield piece


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

    def filled(self, names: Iterable[str]) -> Iterator[str]:
        """The names that some of this rule's stand for: one with the slot, one for each number."""
        for name in names:
            if SLOT in name and self.index:
                yield from (name.replace(SLOT, str(i)) for i in self.index)
            else:
                yield name

    def sources(self) -> dict[str, list[Window]]:
        """The windows that this rule takes of each source as it is (names still with the slot ``{i}``)."""
        found: dict[str, list[Window]] = {}
        for share in self.shares:
            for piece in share.expanded():
                if isinstance(piece.source, str):
                    found.setdefault(piece.source, []).append(piece.src)
        return found

    def programs(self) -> Iterator[Program]:
        """The programs whose results this rule takes (names still with the slot ``{i}``)."""
        for share in self.shares:
            for piece in share.pieces:
                if isinstance(piece, Piece) and isinstance(piece.source, Program):
                    yield piece.source


def used(recipe: Recipe) -> set[str]:
    """The source tensors of which pieces take elements."""
    return {name for rule in recipe.rules for name in rule.filled(rule.sources())}


def used_by_programs(recipe: Recipe) -> set[str]:
    """The source tensors that programs take."""
    return {
        name for rule in recipe.rules for program in rule.programs() for name in rule.filled(set(program.sources()))
    }


def held_as(recipe: Recipe) -> dict[str, DType]:
    """The dtype in which a recipe holds each source tensor: the widest, where it is held in several."""
    found: dict[str, DType] = {}
    for rule in recipe.rules:
        for name in rule.filled(rule.sources()):
            before = found.get(name)
            if before is None or before.bits < rule.dtype.bits:
                found[name] = rule.dtype
    return found


def filled(name: str, number: int | None) -> str:
    """A name with its slot filled."""
    return name if number is None else name.replace(SLOT, str(number))


def renamed(piece: Piece, name: Callable[[str], str]) -> Piece:
    """The piece with other names for its sources, those inside programs included."""
    if isinstance(piece.source, str):
        return Piece(piece.dst, piece.src, name(piece.source))
    if isinstance(piece.source, Program):
        program = piece.source
        args = tuple(
            replace(arg, pieces=tuple(renamed(p, name) for p in arg.pieces)) if isinstance(arg, Mosaic) else arg
            for arg in program.args
        )
        return Piece(piece.dst, piece.src, replace(program, args=args))
    return piece


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
        return tuple(renamed(p, lambda name: filled(name, self._number)) for p in self._share.expanded())
