"""From the log to mosaics: what each target is made of, in the words of a plan.

::

    Source     a piece; with another dtype where the engine casts it
    Uniform    the fill of the target, or one element that is repeated
    Data       a constant program
    Made       a program of the operations that plans allow; worked out here where no source takes part
    Unknown    0, and the target is named as uninitialised: the engine has there what happened to be in its memory

Whatever else an engine does to a tensor is refused, with the operation.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardtool.dtypes import castable
from shardtool.errors import ShardtoolError
from shardtool.plan import OPERATIONS, Mosaic, Piece, Program
from shardtool.tracing.contents import Contents, Data, Made, Part, Source, Uniform, Unknown, dtype_of
from shardtool.tracing.tape import DependsOnSource, Log, Ref, Refused, Write
from shardtool.window import Window, row_major, simplify

MOST_CONSTANT = 16 << 20
"""Bytes that a constant may have."""
DEEPEST = 16
"""Operations inside each other that a program may have."""
_ONE = Window(0, (1,), (1,))


@dataclass(frozen=True, slots=True)
class Compiled:
    """A target's content, and how many of its elements nothing has written."""

    mosaic: Mosaic
    uninitialised: int


class Compiler:
    """Makes mosaics from a finished log."""

    def __init__(self, log: Log) -> None:
        self._contents = Contents(log)

    def target(self, name: str, ref: Ref) -> Compiled:
        """What a view holds at the end. Raises ``Refused`` that names the target and what cannot be said of it."""
        try:
            return self._compiled(ref, None, 0)
        except ShardtoolError as error:
            raise Refused(f"the tensor {name!r} cannot be said as a layout: {error}") from None
        except RecursionError:
            raise Refused(f"the tensor {name!r} is computed in too many steps for a layout") from None

    def _compiled(self, ref: Ref, before: int | None, depth: int) -> Compiled:
        dtype = dtype_of(ref.dtype)
        pieces: list[Piece] = []
        uniform: dict[float, list[Part]] = {}
        unknown = 0
        for part in self._contents.read(ref, before):
            made = part.leaf
            if isinstance(made, Unknown):
                unknown += part.at.size
                continue
            if isinstance(made, Made):
                part, program = self._made(part, made.write, depth)
                if program is not None:
                    pieces.append(_cast(part, program, ref.dtype))
                    continue
            if isinstance(part.leaf, Source):
                pieces.append(_cast(part, part.leaf.name, ref.dtype))
                continue
            here = part._replace(at=_ONE) if isinstance(part.leaf, Uniform) else part
            content = self._contents.of_part(here)
            if (single := _single(content)) is not None:
                uniform.setdefault(single, []).append(part)
            elif isinstance(part.leaf, Uniform):  # a value that JSON has no number for
                pieces.append(_repeated(part, content))
            else:
                pieces.append(Piece(part.at, row_major(part.at.shape), _constant(content)))
        fill = max(uniform, key=lambda value: sum(part.at.size for part in uniform[value])) if uniform else None
        for value, parts in uniform.items():
            if value != fill:
                pieces += [_repeated(part, torch.tensor([value], dtype=torch.float64).to(ref.dtype)) for part in parts]
        if unknown and fill is None:
            fill = 0.0
        settled = tuple(_settled(piece, ref.shape) for piece in pieces)
        return Compiled(Mosaic(dtype, ref.shape, settled, fill), unknown)

    def _made(self, part: Part, write: Write, depth: int) -> tuple[Part, Program | None]:
        """A part of what an operation yields: a constant part, or one of a program."""
        try:
            return part._replace(leaf=Data(self._contents.made(write))), None
        except DependsOnSource:
            return part, self._program(write, depth)

    def _program(self, write: Write, depth: int) -> Program:
        op, args = _operation(write)
        if depth >= DEEPEST:
            raise Refused(f"the engine computes it in more than {DEEPEST} operations")
        taken: list[Mosaic | float | str] = []
        for arg in args:
            if isinstance(arg, (bool, int, float)):
                taken.append(arg)
            elif isinstance(arg, torch.Tensor) and arg.ndim == 0:
                taken.append(arg.item())
            elif isinstance(arg, torch.Tensor):
                whole = row_major(tuple(arg.shape))
                pieces = (Piece(whole, whole, _constant(arg)),)
                taken.append(Mosaic(dtype_of(arg.dtype), tuple(arg.shape), pieces))
            elif isinstance(arg, Ref):
                found = self._compiled(arg, write.time, depth + 1)
                if found.uninitialised:
                    raise Refused(f"the engine computes it ({write.op}) from memory that nothing has written")
                taken.append(found.mosaic)
            else:
                raise Refused(f"the engine computes it with {write.op!r} and {arg!r:.80}, which layouts cannot say")
        return _yielding(Program(op, tuple(taken), dtype_of(write.out.dtype), write.out.shape), args, write)


def _operation(write: Write) -> tuple[str, Sequence[Any]]:
    """What plans call an operation, and its arguments by place."""
    name = write.op.removesuffix("_")
    if name not in OPERATIONS or name in ("data", "to", "view"):
        raise Refused(f"the engine computes it with the operation {write.op!r}, which layouts do not know")
    assert write.call is not None
    op, kwargs, _ = write.call
    said = {key: value for key, value in kwargs.items() if value is not None}
    args = list(write.args)
    for argument in op._schema.arguments[len(args) :]:
        if argument.kwarg_only or argument.name not in said:
            break
        args.append(said.pop(argument.name))
    while args and args[-1] is None:
        args.pop()
    if said.pop("alpha", 1) != 1 or said:
        named = ", ".join(sorted(said)) or "alpha"
        raise Refused(f"the engine computes it with {write.op!r} and its {named}, which layouts cannot say")
    return name, args


def _yielding(program: Program, args: Sequence[Any], write: Write) -> Program:
    """The program, with a change of dtype where the operation by itself yields another than it writes (``mul_``)."""
    meta = [
        torch.empty(arg.shape, dtype=arg.dtype, device="meta") if isinstance(arg, (Ref, torch.Tensor)) else arg
        for arg in args
    ]
    operation = getattr(torch.nn.functional if program.op == "softplus" else torch, program.op)
    plain = operation(*meta).dtype
    if plain == write.out.dtype:
        return program
    inner = Program(program.op, program.args, dtype_of(plain), program.shape)
    return _changed(inner, plain, write.out.dtype, "to")


def _cast(part: Part, source: str | Program, wanted: torch.dtype) -> Piece:
    """A piece of a source, after the part's changes of dtype."""
    if not part.steps or (
        len(part.steps) == 1 and part.steps[0][0] == "to" and castable(dtype_of(part.dtype), dtype_of(wanted))
    ):
        return Piece(part.at, part.src, source)
    shape = part.at.shape
    whole = row_major(shape)
    mosaic = Mosaic(dtype_of(part.dtype), shape, (Piece(whole, part.src, source),))
    program: Program | None = None
    for what, dtype in part.steps:
        program = Program(what, (mosaic,), dtype_of(dtype), shape)
        mosaic = Mosaic(program.dtype, shape, (Piece(whole, whole, program),))
    assert program is not None
    return Piece(part.at, whole, program)


def _changed(program: Program, dtype: torch.dtype, wanted: torch.dtype, what: str) -> Program:
    whole = row_major(program.shape)
    mosaic = Mosaic(dtype_of(dtype), program.shape, (Piece(whole, whole, program),))
    return Program(what, (mosaic,), dtype_of(wanted), program.shape)


def _repeated(part: Part, value: torch.Tensor) -> Piece:
    """One element all over a part."""
    shape = part.at.shape
    return Piece(part.at, Window(0, shape, (0,) * len(shape)), _constant(value))


def _single(value: torch.Tensor) -> float | None:
    """The one value of a tensor that has the same everywhere and that JSON can say, else None."""
    flat = value.reshape(-1)
    first = flat[0].item()
    number = float(first)
    if number != first or not math.isfinite(number) or (number == 0 and math.copysign(1, number) < 0):
        return None
    bits = _bytes(value).reshape(flat.numel(), -1)
    return number if bool((bits == bits[0]).all()) else None


def _constant(value: torch.Tensor) -> Program:
    """The program that yields a tensor's values."""
    raw = _bytes(value).numpy().tobytes()
    if len(raw) > MOST_CONSTANT:
        raise Refused(f"the engine has a constant of {len(raw)} bytes there; layouts hold at most {MOST_CONSTANT}")
    text = base64.b64encode(zlib.compress(raw, 9)).decode()
    return Program("data", (text,), dtype_of(value.dtype), tuple(value.shape))


def _bytes(value: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes. A copy: one element may have strides with which torch does not look at its bytes."""
    return value.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _settled(piece: Piece, shape: tuple[int, ...]) -> Piece:
    """The piece with as few dimensions as it takes; one that fills its target in order has the target's shape."""
    dst, src = simplify(piece.dst, piece.src)
    if dst.size == math.prod(shape) and dst.contiguous and src.contiguous:
        dst, src = row_major(shape), row_major(shape, src.offset)
    return Piece(dst, src, piece.source)
