"""Tensors that are computed: the programs of a recipe, run on whole small tensors, seen as objects of a store.

``Computed`` is a store over another: what a program yields lies under a key of its own, so that plans, schedules and
the engine treat it like any stored tensor. A program runs when its bytes are first asked for; torch, whose rounding
the engines have, is imported then.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

from shardtool import digest
from shardtool.dtypes import DType
from shardtool.errors import FormatError, PlanError
from shardtool.mosaic import resolve
from shardtool.plan import Catalog, Mosaic, Piece, Program, Stored, Tensor
from shardtool.recipe import Recipe
from shardtool.recipe_json import broadcast
from shardtool.stores.base import Store, Wrapper

if TYPE_CHECKING:
    import torch

Resolve = Callable[[Tensor], tuple[Piece, ...]]
"""A target's pieces over stored bytes."""

PREFIX = ".shardtool/computed/"
MOST = 256 << 20
"""Bytes that a computed tensor may have."""
CACHED = 8 << 20
"""Bytes of results that are kept for the next tile of the same tensor, and more only for a larger one."""


class Computed(Wrapper):
    """A store with the results of programs beside its objects. ``catalog``: where the programs' sources lie."""

    def __init__(self, inner: Store, catalog: Catalog) -> None:
        super().__init__(inner)
        self._catalog = catalog
        self._programs: dict[str, tuple[Program, str]] = {}
        self._done: dict[str, bytes] = {}
        self._lock = Lock()

    def stored(self, program: Program, name: str = "") -> Stored:
        """Where a program's result can be read. ``name``: the tensor that takes it, for messages.

        Raises ``PlanError`` if it is too large to be computed whole.
        """
        _check_size(program, name)
        key = PREFIX + digest.of_bytes(repr(program).encode())[:32]
        self._programs.setdefault(key, (program, name))
        return Stored(key, program.dtype, program.shape, 0)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Bytes of an object, or of what a program yields.

        Raises ``FormatError`` or ``PlanError``, with the name of the tensor, where it cannot be computed.
        """
        known = self._programs.get(key)
        if known is None:
            super().readinto(key, start, view)
            return
        with self._lock:  # one at a time: what they take is counted once
            data = self._done.get(key)
            if data is None:
                data = self._translated(*known)
                while self._done and sum(map(len, self._done.values())) + len(data) > CACHED:
                    del self._done[next(iter(self._done))]
                self._done[key] = data
        view.cast("B")[:] = data[start : start + view.nbytes]

    def _translated(self, program: Program, name: str) -> bytes:
        """What a program yields, with every refusal as one sentence that names the tensor."""
        who = f"tensor {name!r}: " if name else ""
        try:
            return self._run(program)
        except (FormatError, PlanError) as error:
            raise type(error)(f"{who}{error}") from None
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # as torch refuses
            first = str(error).partition("\n")[0][:200]
            raise FormatError(f"{who}the operation {program.op!r} of the recipe cannot be done: {first}") from None

    def _run(self, program: Program) -> bytes:
        import torch

        result = self._value(program)
        if tuple(result.shape) != program.shape or result.dtype != program.dtype.torch():
            raise FormatError(
                f"the operation {program.op!r} yields {result.dtype} {list(result.shape)}, the recipe says "
                f"{program.dtype.name} {list(program.shape)}"
            )
        # A copy: one element may have strides with which torch does not look at its bytes.
        plain = result.reshape(-1).clone(memory_format=torch.contiguous_format)
        return plain.view(torch.uint8).numpy().tobytes()

    def _value(self, program: Program) -> torch.Tensor:
        import torch

        if program.op == "data":
            return _data(program)
        args = [self._filled(arg) if isinstance(arg, Mosaic) else arg for arg in program.args]
        if program.op in ("to", "view"):
            (source,) = args
            if not isinstance(source, torch.Tensor):
                raise FormatError(f"the operation {program.op!r} of the recipe cannot be done: it takes no tensor")
            dtype = program.dtype.torch()
            return source.to(dtype) if program.op == "to" else source.view(dtype)
        shape = broadcast(arg.shape for arg in program.args if isinstance(arg, Mosaic))
        if shape is not None and prod(shape) > prod(program.shape):  # before it takes the memory
            raise FormatError(
                f"the operation {program.op!r} yields {list(shape)}, the recipe says {list(program.shape)}"
            )
        operation = getattr(torch.nn.functional if program.op == "softplus" else torch, program.op)
        value: torch.Tensor = operation(*args)
        return value

    def _filled(self, mosaic: Mosaic) -> torch.Tensor:
        """A mosaic as a tensor of its own."""
        import torch

        dtype = mosaic.dtype.torch()
        value = torch.full(mosaic.shape, mosaic.fill or 0, dtype=dtype)
        flat = value.reshape(-1)
        for piece in resolve(Tensor("", mosaic.dtype, mosaic.shape, lambda: mosaic.pieces), self._catalog, self.stored):
            assert isinstance(piece.source, Stored)
            if not piece.src.size:
                continue
            first, past = piece.src.bounds
            item = piece.source.dtype.itemsize
            key, offset = piece.source.key, piece.source.offset
            if (past - first) * item > MOST:
                raise PlanError(f"a program takes {(past - first) * item} bytes of {key}; at most {MOST} are computed")
            if key in self._programs:
                raw = bytearray(self._run(self._programs[key][0])[first * item : past * item])
            else:
                raw = bytearray((past - first) * item)
                self.inner.readinto(key, offset + first * item, memoryview(raw))
            source = torch.frombuffer(raw, dtype=piece.source.dtype.torch())
            taken = source.as_strided(piece.src.shape, piece.src.strides)
            flat.as_strided(piece.dst.shape, piece.dst.strides, piece.dst.offset).copy_(taken)
        return value


def over(store: Store, catalog: Catalog, recipe: Recipe) -> tuple[Store, Resolve, int]:
    """A store that has what a recipe computes, how its tensors are resolved over a catalogue, and the bytes it takes.

    The store itself, where the recipe computes nothing. Raises ``PlanError`` for what is too large to be computed.
    """
    programs = []
    for rule in recipe.rules:
        for program in rule.programs():
            _check_size(program, rule.name)
            programs.append(program)
    if not programs:
        return store, lambda tensor: resolve(tensor, catalog), 0
    computed = Computed(store, catalog)
    return computed, lambda tensor: resolve(tensor, catalog, computed.stored), max(map(_cost, programs))


def _nbytes(value: Program | Mosaic) -> int:
    size = value.dtype.itemsize
    for n in value.shape:
        size *= n
    return size


def _check_size(program: Program, name: str) -> None:
    """Refuse a program that is too large, or takes what is, at any depth. ``name``: the tensor that takes it."""
    who = f"tensor {name!r}: " if name else ""
    size = _nbytes(program)
    if size > MOST:
        raise PlanError(f"{who}the operation {program.op!r} yields {size} bytes; at most {MOST} can be computed")
    for arg in program.args:
        if not isinstance(arg, Mosaic):
            continue
        if (size := _nbytes(arg)) > MOST:
            raise PlanError(f"{who}the operation {program.op!r} takes {size} bytes; at most {MOST} can be computed")
        for piece in arg.pieces:
            if isinstance(piece.source, Program):
                _check_size(piece.source, name)


def _cost(program: Program) -> int:
    """Bytes that a program takes at most: results, arguments twice (as they are read, as they are used)."""
    total = 3 * _nbytes(program)
    for arg in program.args:
        if isinstance(arg, Mosaic):
            total += 2 * _nbytes(arg)
            total += sum(_cost(piece.source) for piece in arg.pieces if isinstance(piece.source, Program))
    return total


def _data(program: Program) -> torch.Tensor:
    """The constant that a program holds, unpacked to no more than it says."""
    import torch

    size = _nbytes(program)
    try:
        (text,) = program.args
        unpacked = zlib.decompressobj()
        raw = unpacked.decompress(base64.b64decode(str(text), validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise FormatError(f"a constant of the recipe is damaged ({error})") from None
    if len(raw) != size:
        raise FormatError(f"a constant of the recipe has {len(raw)} bytes instead of {size}")
    if not raw:
        return torch.empty(program.shape, dtype=program.dtype.torch())
    return torch.frombuffer(bytearray(raw), dtype=program.dtype.torch()).reshape(program.shape)


def constant(raw: bytes, dtype: DType, shape: tuple[int, ...]) -> Program:
    """The program that yields these bytes."""
    return Program("data", (base64.b64encode(zlib.compress(raw, 9)).decode(),), dtype, shape)
