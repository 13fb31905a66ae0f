"""From what every rank holds to a recipe: ranks that hold the same, experts and layers that repeat are said once.

``experts``   the pieces of one tensor; runs of sources that differ in one number and step evenly become ``Series``
``Folding``   takes a rank's tensors at a time, so that no more than one rank's pieces are in memory
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardtool.dtypes import DType
from shardtool.errors import UnsupportedModel
from shardtool.plan import Mosaic, Piece
from shardtool.recipe import EXPERT, SLOT, Recipe, Rule, Series, Share, renamed

FEWEST = 3
"""Pieces that a series has at least."""


def number_in(name: str) -> tuple[int, int] | None:
    """Which part of a name is its first number, and the number: names are parted by dots."""
    for place, part in enumerate(name.split(".")):
        if part.isascii() and part.isdecimal() and len(part) < 9 and str(int(part)) == part:
            return place, int(part)
    return None


def slotted(name: str, number: int, slot: str) -> str:
    """The name with its first part that is this number made a slot; the name itself if there is none."""
    parts = name.split(".")
    wanted = str(number)
    if wanted not in parts:
        return name
    parts[parts.index(wanted)] = slot
    return ".".join(parts)


def experts(pieces: Iterable[Piece]) -> tuple[Piece | Series, ...]:
    """The pieces with runs of experts made series. The order of pieces does not matter to what they say."""
    alone: list[Piece] = []
    groups: dict[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], list[tuple[int, Piece]]] = {}
    for piece in pieces:
        found = number_in(piece.source) if isinstance(piece.source, str) else None
        if found is None:
            alone.append(piece)
            continue
        assert isinstance(piece.source, str)
        template = slotted(piece.source, found[1], EXPERT)
        key = (template, piece.dst.shape, piece.dst.strides, piece.src.strides)
        groups.setdefault(key, []).append((found[1], piece))
    done: list[Piece | Series] = list(alone)
    for (template, *_), found_pieces in groups.items():
        found_pieces.sort(key=lambda item: (item[0], item[1].dst.offset))
        for run in _runs(found_pieces):
            if len(run) < FEWEST:
                done.extend(piece for _, piece in run)
                continue
            first, second = run[0][1], run[1][1]
            steps = second.dst.offset - first.dst.offset, second.src.offset - first.src.offset
            named = Piece(first.dst, first.src, template)
            done.append(Series(named, tuple(number for number, _ in run), *steps))
    done.sort(key=_place)
    return tuple(done)


def _runs(pieces: Sequence[tuple[int, Piece]]) -> Iterable[list[tuple[int, Piece]]]:
    """The pieces in runs whose windows move evenly forward and whose numbers differ."""
    run: list[tuple[int, Piece]] = []
    step: tuple[int, int] | None = None
    for item in pieces:
        if run:
            last = run[-1]
            moved = item[1].dst.offset - last[1].dst.offset, item[1].src.offset - last[1].src.offset
            fits = item[0] > last[0] and min(moved) >= 0 and (step is None or step == moved)
            if fits:
                step = moved
                run.append(item)
                continue
            yield run
        run, step = [item], None
    if run:
        yield run


def _place(piece: Piece | Series) -> tuple[int, int, str]:
    one = piece.piece if isinstance(piece, Series) else piece
    return one.dst.offset, one.src.offset, str(one.source)


Held = tuple[tuple[int, ...], tuple[Piece | Series, ...], float | None]
"""Shape, pieces and fill."""


class Folding:
    """A recipe in the making."""

    def __init__(self) -> None:
        # (target template, dtype) -> number (-1: none) -> what it is -> the ranks that hold it so
        self._found: dict[tuple[str, DType], dict[int, dict[Held, list[int]]]] = {}

    def add(self, rank: int, tensors: Iterable[tuple[str, Mosaic]]) -> None:
        """One rank's tensors. Raises ``UnsupportedModel`` for names that a recipe cannot say."""
        for name, mosaic in tensors:
            self._refuse(name)
            found = number_in(name)
            number = -1 if found is None else found[1]
            pieces = tuple(self._layer(piece, number) for piece in mosaic.pieces)
            held = mosaic.shape, experts(pieces), mosaic.fill
            template = name if found is None else slotted(name, number, SLOT)
            by_number = self._found.setdefault((template, mosaic.dtype), {})
            by_number.setdefault(number, {}).setdefault(held, []).append(rank)

    @staticmethod
    def _refuse(name: str) -> None:
        if SLOT in name or EXPERT in name:
            raise UnsupportedModel(f"the name of tensor {name!r} has {SLOT} or {EXPERT} in it, the slots of recipes")

    def _layer(self, piece: Piece, number: int) -> Piece:
        def name(of: str) -> str:
            self._refuse(of)
            return slotted(of, number, SLOT) if number >= 0 else of

        return renamed(piece, name)

    def recipe(self) -> Recipe:
        """What was added, layers that are alike as one rule."""
        rules = []
        for (template, dtype), by_number in self._found.items():
            alike: dict[tuple[Share, ...], list[int]] = {}
            for number, by_held in sorted(by_number.items()):
                shares = tuple(Share(tuple(ranks), *held) for held, ranks in by_held.items())
                alike.setdefault(tuple(sorted(shares, key=lambda share: share.ranks)), []).append(number)
            for shares, numbers in alike.items():
                rules.append(Rule(template, dtype, shares, () if numbers == [-1] else tuple(numbers)))
        rules.sort(key=lambda rule: (rule.name, rule.index))
        return Recipe(tuple(rules))
