"""Tensors put together from whole sources: stacked, joined, divided, turned, and then cut for a rank.

::

    whole(name, shape)     one source
    stack(one, count)      a source per number, along a new first dimension: ``{e}`` in its name is the number
    join(several, dim)     next to each other along a dimension
    turn(one, a, b)        two dimensions exchanged
    narrow(one, ...)       some indices of a dimension
    pieces(one)            what a recipe says of it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardtool.errors import PlanError
from shardtool.plan import Piece
from shardtool.recipe import Series
from shardtool.window import Window, row_major

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A window of a source that fills the box at ``at``.

    With ``numbers``, one such box for each of them, one index of the first dimension further each time.
    """

    at: Shape
    window: Window
    source: str
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tensor as the blocks that fill it."""

    shape: Shape
    blocks: tuple[Block, ...]


def whole(name: str, shape: Shape) -> Blocks:
    """A source as it is."""
    return Blocks(shape, (Block((0,) * len(shape), row_major(shape), name),))


def stack(one: Blocks, count: int) -> Blocks:
    """One such tensor for each number below ``count``, along a new first dimension."""
    numbers = tuple(range(count))
    found = []
    for block in one.blocks:
        if block.numbers:
            raise PlanError(f"{block.source!r} is stacked already")
        w = block.window
        found.append(Block((0, *block.at), Window(w.offset, (1, *w.shape), (0, *w.strides)), block.source, numbers))
    return Blocks((count, *one.shape), tuple(found))


def join(several: Sequence[Blocks], dim: int) -> Blocks:
    """Tensors next to each other along a dimension; their other sizes are equal."""
    shape = several[0].shape
    found, at = [], 0
    for one in several:
        if not 0 <= dim < len(shape) or _without(one.shape, dim) != _without(shape, dim):
            said = ", ".join(str(list(x.shape)) for x in several)
            raise PlanError(f"tensors of the shapes {said} cannot be joined along dimension {dim}")
        found += [Block(_put(b.at, dim, b.at[dim] + at), b.window, b.source, b.numbers) for b in one.blocks]
        at += one.shape[dim]
    return Blocks(_put(shape, dim, at), tuple(found))


def turn(one: Blocks, a: int, b: int) -> Blocks:
    """Two dimensions exchanged."""
    order = list(range(len(one.shape)))
    if not (0 <= a < len(order) and 0 <= b < len(order)):
        raise PlanError(f"a tensor of the shape {list(one.shape)} has no dimensions {a} and {b} to exchange")
    order[a], order[b] = b, a
    if order and order[0] != 0 and any(block.numbers for block in one.blocks):
        raise PlanError("the dimension along which experts are stacked cannot be exchanged")
    found = [Block(tuple(x.at[i] for i in order), x.window.transpose(*order), x.source, x.numbers) for x in one.blocks]
    return Blocks(tuple(one.shape[i] for i in order), tuple(found))


def narrow(one: Blocks, dim: int, start: int, length: int) -> Blocks:
    """``length`` indices of a dimension from ``start``."""
    found = []
    for block in one.blocks:
        numbered = bool(block.numbers) and dim == 0
        size = len(block.numbers) if numbered else block.window.shape[dim]
        lo, hi = max(start, block.at[dim]), min(start + length, block.at[dim] + size)
        if lo >= hi:
            continue
        at, skip = _put(block.at, dim, lo - start), lo - block.at[dim]
        if numbered:
            found.append(Block(at, block.window, block.source, block.numbers[skip : skip + hi - lo]))
        else:
            found.append(Block(at, block.window.narrow(dim, skip, hi - lo), block.source, block.numbers))
    return Blocks(_put(one.shape, dim, length), tuple(found))


def pieces(one: Blocks) -> tuple[Piece | Series, ...]:
    """The blocks as a recipe's pieces."""
    full, found = row_major(one.shape), []
    for block in one.blocks:
        dst = full
        for dim, (at, n) in enumerate(zip(block.at, block.window.shape, strict=True)):
            dst = dst.narrow(dim, at, n)
        piece = Piece(dst, block.window, block.source)
        found.append(Series(piece, block.numbers, math.prod(one.shape[1:])) if block.numbers else piece)
    return tuple(found)


def _put(values: Shape, i: int, value: int) -> Shape:
    return (*values[:i], value, *values[i + 1 :])


def _without(values: Shape, i: int) -> Shape:
    return (*values[:i], *values[i + 1 :])
