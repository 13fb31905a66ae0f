"""Recipes as JSON values, and back: compact, and checked as the untrusted text that they are.

``docs/manifest.md`` specifies them. Manifests and layout files hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from math import prod
from typing import Any

from shardtool.dtypes import DType
from shardtool.errors import FormatError
from shardtool.plan import OPERATIONS, Mosaic, Piece, Program
from shardtool.recipe import EXPERT, SLOT, Recipe, Rule, Series, Share
from shardtool.window import Window, row_major

MOST_NUMBERS = 1 << 22
"""Pieces, and targets and sources of all layers, that a recipe may have: a few bytes must not ask for gigabytes."""
MOST_DIMENSIONS = 64
MOST_ELEMENTS = 1 << 59
"""Elements that a tensor may have, of up to eight bytes each."""
MOST_NESTED = 16
"""Programs inside each other."""
_ARGUMENTS = {
    **dict.fromkeys(("add", "sub", "mul", "div", "pow"), (2, 2)),
    "clamp": (2, 3),
    "softplus": (1, 3),
    "data": (1, 1),
}
"""How few and how many arguments an operation takes; the others take one."""


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
    """The recipe as JSON values."""
    return [
        {
            "name": rule.name,
            **({"i": runs(rule.index)} if rule.index else {}),
            "dtype": rule.dtype.name,
            "shares": [{"ranks": runs(share.ranks), **_held_to_json(share)} for share in rule.shares],
        }
        for rule in recipe.rules
    ]


def _held_to_json(held: Share | Mosaic) -> dict[str, Any]:
    return {
        "shape": list(held.shape),
        **({} if held.fill is None else {"fill": held.fill}),
        "pieces": [_piece_to_json(piece, held.shape) for piece in held.pieces],
    }


def _piece_to_json(piece: Piece | Series, shape: tuple[int, ...]) -> dict[str, Any]:
    series: dict[str, Any] = {}
    if isinstance(piece, Series):
        series = {"e": runs(piece.numbers), "step": [piece.dst_step, piece.src_step]}
        piece = piece.piece
    elif piece.dst == row_major(shape) and piece.src == piece.dst:
        return {"of": _source_to_json(piece)}
    return {
        "of": _source_to_json(piece),
        **series,
        "shape": list(piece.dst.shape),
        "to": [piece.dst.offset, *piece.dst.strides],
        "from": [piece.src.offset, *piece.src.strides],
    }


def _source_to_json(piece: Piece) -> str | dict[str, Any]:
    program = piece.source
    if not isinstance(program, Program):
        return str(program)
    args = [{"dtype": arg.dtype.name, **_held_to_json(arg)} if isinstance(arg, Mosaic) else arg for arg in program.args]
    return {"op": program.op, "args": args, "dtype": program.dtype.name, "shape": list(program.shape)}


def from_json(value: Any, where: str) -> Recipe:
    """The recipe that JSON values say, checked: windows stay inside their targets. Raises ``FormatError``."""
    try:
        if sum(_numbers(entry) for entry in value) > MOST_NUMBERS:
            raise ValueError(f"it has more than {MOST_NUMBERS} pieces, ranks, and targets and sources of all layers")
        return Recipe(tuple(_rule(entry) for entry in value))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where}: the recipe is damaged ({repr(error)[:300]})") from None


def _numbers(entry: Mapping[str, Any]) -> int:
    """What a rule asks for, small in JSON and large when it is made.

    The ranks and the pieces of its shares; and for each layer the target of each rank and the sources.
    """
    layers, ranks, pieces = count(entry.get("i", ())), 0, 0
    sources: dict[tuple[str, str], int] = {}  # ranks that share the sources of a layer do not ask for more of them
    for share in entry["shares"]:
        ranks += count(share["ranks"])
        for of, numbers in _cited(share["pieces"]):
            sources[of, repr(numbers)] = many = 1 if numbers is None else count(numbers)
            pieces += many
    return ranks + pieces + layers * (1 + ranks + sum(sources.values()))


def _cited(pieces: Any) -> Iterator[tuple[str, Any]]:
    """Each piece's source with its runs of experts, if it has some; the pieces inside programs too."""
    for piece in pieces:
        of = piece["of"]
        if isinstance(of, dict):
            yield "", None  # its result
            for arg in of["args"]:
                if isinstance(arg, dict):
                    yield from _cited(arg["pieces"])
        else:
            yield of, piece.get("e")


def text_of(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not a text")
    return value


def table_of(value: Any) -> dict[str, Any]:
    """A table of values by name."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.80} is not a table")
    return value


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
    shape, pieces, fill = _held(entry, 0)
    return Share(from_runs(entry["ranks"]), shape, pieces, fill)


def _held(entry: Mapping[str, Any], depth: int) -> tuple[tuple[int, ...], tuple[Piece | Series, ...], float | None]:
    """Shape, pieces and fill."""
    shape = shape_of(entry["shape"])
    fill = entry.get("fill")
    if fill is not None and type(fill) not in (int, float):
        raise ValueError(f"the fill {fill!r} is not a number")
    pieces = tuple(_piece(piece, shape, depth) for piece in entry["pieces"])
    end = row_major(shape).bounds[1]
    for piece in pieces:
        if isinstance(piece, Piece) and isinstance(piece.source, Program):
            has = prod(piece.source.shape)
            if piece.src.size and piece.src.bounds[1] > has:
                raise ValueError(f"a piece takes elements of the result of {piece.source.op!r} beyond its {has}")
        one, last = (piece.piece, len(piece.numbers) - 1) if isinstance(piece, Series) else (piece, 0)
        step = piece.dst_step if isinstance(piece, Series) else 0
        if one.dst.bounds[1] + last * step > end or one.dst.size > end:
            raise ValueError(f"a piece of {one.source!r:.200} leaves its target")
    return shape, pieces, None if fill is None else float(fill)


def _piece(entry: Mapping[str, Any], shape: tuple[int, ...], depth: int) -> Piece | Series:
    source = _source(entry["of"], depth)
    if "shape" not in entry:
        window = row_major(shape)
        return Piece(window, window, source)
    box, to, of = shape_of(entry["shape"]), sizes(entry["to"]), sizes(entry["from"])
    if not len(to) == len(of) == len(box) + 1:
        raise ValueError(f"a piece of {entry['of']!r:.200} has windows of different shapes")
    piece = Piece(Window(to[0], box, to[1:]), Window(of[0], box, of[1:]), source)
    if "e" not in entry:
        return piece
    dst_step, src_step = sizes(entry["step"])
    if not isinstance(source, str) or EXPERT not in source:
        raise ValueError(f"the series of {entry['of']!r:.200} has no slot for its numbers")
    return Series(piece, from_runs(entry["e"]), dst_step, src_step)


def _source(value: Any, depth: int) -> str | Program:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or value["op"] not in OPERATIONS or depth >= MOST_NESTED:
        raise ValueError(f"the source {value!r:.200} is neither a name nor a program")
    args: list[Mosaic | float | str] = []
    for arg in value["args"]:
        if isinstance(arg, dict):
            shape, pieces, fill = _held(arg, depth + 1)
            plain = tuple(piece for piece in pieces if isinstance(piece, Piece))
            if len(plain) != len(pieces):
                raise ValueError(f"a program takes a series: {value!r:.200}")
            args.append(Mosaic(DType[arg["dtype"]], shape, plain, fill))
        elif isinstance(arg, str) or type(arg) in (int, float):
            args.append(arg)
        else:
            raise ValueError(f"a program takes {arg!r:.200}")
    program = Program(value["op"], tuple(args), DType[value["dtype"]], shape_of(value["shape"]))
    _check_program(program)
    return program


def _check_program(program: Program) -> None:
    """Refuse arguments that the operation does not take, and a result that it does not yield."""
    op, args = program.op, program.args
    fewest, most = _ARGUMENTS.get(op, (1, 1))
    tensors = [arg for arg in args if isinstance(arg, Mosaic)]
    texts = sum(isinstance(arg, str) for arg in args)
    if not fewest <= len(args) <= most or (op == "data") != bool(texts) or (op == "data") == bool(tensors):
        raise ValueError(f"the operation {op!r} does not take the {len(args)} arguments that are given")
    if any(dtype.bits % 8 for dtype in (program.dtype, *(arg.dtype for arg in tensors))):
        raise ValueError(f"the operation {op!r} has to do with elements that are narrower than a byte")
    if op == "view" and tensors[0].dtype.bits != program.dtype.bits:
        raise ValueError(f"the operation 'view' makes {tensors[0].dtype.name} elements {program.dtype.name}")
    if tensors and broadcast(arg.shape for arg in tensors) != program.shape:
        shapes = " and ".join(str(list(arg.shape)) for arg in tensors)
        raise ValueError(f"the operation {op!r} on {shapes} does not yield {list(program.shape)}")


def broadcast(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape that element by element operations on tensors of these shapes yield; None where they do not fit."""
    found: list[int] = []
    for sizes_of_places in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        several = {n for n in sizes_of_places if n != 1} or {1}
        if len(several) > 1:
            return None
        found.append(several.pop())
    return tuple(reversed(found))
