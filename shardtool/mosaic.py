"""Pure functions on mosaics: replace names by bytes, read a layout backwards, check that nothing is missing.

``resolve(tensor, catalog)``
    every piece that cites a logical tensor becomes pieces that cite the stored bytes which that tensor is made of.
``invert(tensors)``
    the stored targets of a layout, read as the catalogue of its sources: what filled a target can be found there.

Law: for any chain of narrow, step, transpose, reshape, stack and cat, ``resolve`` over ``invert`` is the identity
on the bytes, or ``UnsupportedTransform`` is raised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Lock

from shardtool.dtypes import DType
from shardtool.errors import PlanError, UnsupportedTransform
from shardtool.plan import Catalog, Piece, Program, Stored, Tensor, whole
from shardtool.window import Window, join, row_major, simplify, union

Computed = Callable[[Program, str], Stored]
"""Where the result of a program can be read. The text is the name of the tensor that takes it."""


def resolve(tensor: Tensor, catalog: Catalog, computed: Computed | None = None) -> tuple[Piece, ...]:
    """The tensor's pieces, each citing stored bytes. Replicas in the catalogue are read once: the first that fits."""
    found: list[Piece] = []
    who = f"tensor {tensor.name!r}" if tensor.name else "a computed tensor"  # which has no name of its own
    for piece in tensor.pieces():
        if isinstance(piece.source, Stored):
            found.append(piece)
            continue
        if isinstance(piece.source, Program):
            if computed is None:
                raise PlanError(f"{who} is computed ({piece.source.op}), which is not done here")
            if piece.src.size and piece.src.bounds[1] > math.prod(piece.source.shape):
                raise PlanError(
                    f"{who} takes elements of the result of {piece.source.op!r} that are beyond its "
                    f"{math.prod(piece.source.shape)}"
                )
            found.append(Piece(piece.dst, piece.src, computed(piece.source, tensor.name)))
            continue
        source = catalog.get(piece.source)
        if source is None:
            raise PlanError(f"{who} is made of {piece.source!r}, which the source does not have")
        if piece.src.bounds[1] > source.size:
            raise PlanError(f"{who} takes elements of {piece.source!r} that are beyond its {source.size}")
        if source.stored is not None:
            found.append(Piece(piece.dst, piece.src, source.stored))
            continue
        seen: set[Window] = set()
        for part in source.pieces():
            assert isinstance(part.source, Stored)
            for dst, src in join(piece.src, piece.dst, part.dst, part.src):
                if dst not in seen:
                    seen.add(dst)
                    found.append(Piece(dst, src, part.source))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Logical:
    """A tensor of the source as it was: its dtype and shape."""

    dtype: DType
    shape: tuple[int, ...]


def invert(targets: Iterable[tuple[Tensor, Stored]], inventory: Mapping[str, Logical]) -> dict[str, Tensor]:
    """The source tensors that a layout's stored targets hold, as mosaics over the targets' bytes.

    ``targets``: each target of the layout, with pieces that cite names, beside where its bytes lie. Their pieces
    are made once to see whom they cite and again when a tensor is asked for.
    """
    holders: dict[str, list[tuple[Tensor, Stored]]] = {}
    for tensor, stored in targets:
        for name in dict.fromkeys(piece.source for piece in tensor.pieces() if isinstance(piece.source, str)):
            holders.setdefault(name, []).append((tensor, stored))
    by_source = _BySource()
    return {name: _held(name, inventory[name], held, by_source) for name, held in holders.items() if name in inventory}


class _BySource:
    """The pieces of the tensors that were asked for last, by the source that they cite.

    A tensor of stacked experts has a thousand sources, each of which looks for its own pieces in it.
    """

    MOST = 64

    def __init__(self) -> None:
        self._found: dict[Tensor, dict[str, list[Piece]]] = {}
        self._lock = Lock()

    def __call__(self, tensor: Tensor, name: str) -> Iterable[Piece]:
        with self._lock:
            found = self._found.get(tensor)
            if found is None:
                if len(self._found) >= self.MOST:
                    del self._found[next(iter(self._found))]
                found = self._found[tensor] = {}
                for piece in tensor.pieces():
                    if isinstance(piece.source, str):
                        found.setdefault(piece.source, []).append(piece)
        return found.get(name, ())


def _held(name: str, logical: Logical, held: list[tuple[Tensor, Stored]], by_source: _BySource) -> Tensor:
    def pieces() -> tuple[Piece, ...]:
        return tuple(
            Piece(dst, src, stored)
            for tensor, stored in held
            for piece in by_source(tensor, name)
            for dst, src in [_first_of_each(piece.src, piece.dst)]
        )

    if len(held) == 1:
        (tensor, stored) = held[0]
        window = row_major(logical.shape)
        if stored.shape == logical.shape and tensor.pieces() == (Piece(window, window, name),):
            return Tensor(name, stored.dtype, stored.shape, whole(name, stored).pieces, stored=stored)
    return Tensor(name, held[0][1].dtype, logical.shape, pieces)


def _first_of_each(key: Window, partner: Window) -> tuple[Window, Window]:
    """A pair without the dimensions along which ``key`` stands still: broadcast elements are taken once."""
    still = [i for i, (n, s) in enumerate(zip(key.shape, key.strides, strict=True)) if s == 0 and n > 1]
    for i in still:
        key, partner = key.narrow(i, 0, 1), partner.narrow(i, 0, 1)
    return simplify(key, partner)


def check_target(tensor: Tensor, pieces: Iterable[Piece]) -> None:
    """Refuse a target with elements that no piece fills and that are not declared padding, or that two pieces fill."""
    windows = [piece.dst for piece in pieces]
    filled = union(windows)
    if twice := sum(window.size for window in windows) - filled:
        raise PlanError(f"tensor {tensor.name!r}: {twice} of its elements would be written twice")
    if filled != tensor.size and tensor.fill is None:
        raise PlanError(
            f"tensor {tensor.name!r}: {tensor.size - filled} of its {tensor.size} elements come from nowhere"
        )


def held_once(name: str, logical: Logical, windows: Iterable[Window]) -> str | None:
    """None when every element of a source tensor is held, else one sentence that says how many are not."""
    size = math.prod(logical.shape)
    windows = list(windows)
    if any(window.bounds[1] > size for window in windows):
        return f"the recipe takes elements of {name!r} that are beyond its {size}"
    try:
        held = union(windows)
    except UnsupportedTransform as error:
        return f"the recipe takes {name!r} in a way that cannot be checked: {error}"
    return None if held == size else f"{size - held} of the {size} elements of {name!r} are in no shard"
