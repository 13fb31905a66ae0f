"""What the laws are tried on: shapes, windows, mosaics and layouts of every kind, each beside what numpy makes of it.

::

    shapes, dtypes              the small things
    views                       a window, and the numpy view that it must look at: narrow, step, transpose, reshape
    windows                     any window at all, strides that fit nothing included
    mosaics                     a target cut from several sources (views, stacked), and the array that it must be
    layouts                     sources divided among shards, each element at least once, some of them more often

The numpy arrays hold unique numbers, so that a swap shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardtool.dtypes import DType
from shardtool.errors import UnsupportedTransform
from shardtool.plan import Piece, Stored, Tensor, whole
from shardtool.window import Window, row_major

Array = NDArray[Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

BYTE_DTYPES = tuple(dtype for dtype in DType if dtype.bits % 8 == 0)
"""The types whose elements have addresses."""


def shapes(*, least: int = 0, most: int = 6, dims: int = 4, smallest: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of ``least`` to ``dims`` dimensions, each ``smallest`` to ``most`` long."""
    return st.lists(st.integers(smallest, most), min_size=least, max_size=dims).map(tuple)


def dtypes() -> st.SearchStrategy[DType]:
    """Types whose elements are whole bytes."""
    return st.sampled_from(BYTE_DTYPES)


def names() -> st.SearchStrategy[str]:
    """Names of tensors, the awkward ones too."""
    return st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def file_tensors(draw: Draw, *, most: int = 6) -> list[tuple[str, DType, tuple[int, ...]]]:
    """The tensors of one file: unique names, any types and shapes, empty ones and scalars included."""
    found = draw(st.lists(names(), unique=True, max_size=most))
    return [(name, draw(dtypes()), draw(shapes(dims=3, smallest=0))) for name in found]


# Windows.


def addresses(window: Window) -> Array:
    """The address of each element, by brute force."""
    found = np.full(window.shape, window.offset, np.int64)
    for dim, stride in enumerate(window.strides):
        index = np.arange(window.shape[dim]) * stride
        found = found + index.reshape([-1 if i == dim else 1 for i in range(len(window.shape))])
    return found


@dataclass(frozen=True)
class View:
    """A window, and the numpy view of the tensor's addresses that it must be equal to."""

    window: Window
    array: Array


def whole_view(shape: tuple[int, ...], numbers: Array | None = None) -> View:
    """All of a tensor; ``numbers`` are its elements, by default their addresses."""
    array = np.arange(math.prod(shape)) if numbers is None else numbers
    return View(row_major(shape), array.reshape(shape))


def narrowed(draw: Draw, view: View) -> View:
    """Some indices of one dimension, perhaps with a step."""
    if not view.array.ndim:
        return view
    dim = draw(st.integers(0, view.array.ndim - 1))
    size = view.array.shape[dim]
    start = draw(st.integers(0, max(0, size - 1)))
    step = draw(st.sampled_from([1, 1, 2, 3]))
    length = draw(st.integers(1, -(-(size - start) // step))) if size else 0
    cut = [slice(None)] * view.array.ndim
    cut[dim] = slice(start, start + (length - 1) * step + 1 if length else start, step)
    return View(view.window.narrow(dim, start, length, step), view.array[tuple(cut)])


def turned(draw: Draw, view: View) -> View:
    """The dimensions in another order."""
    order = draw(st.permutations(range(view.array.ndim)))
    return View(view.window.transpose(*order), view.array.transpose(order))


def reshaped(draw: Draw, view: View) -> View:
    """Another shape, unless one window cannot say it."""
    shape = draw(factorings(view.array.size))
    try:
        return View(view.window.reshape(*shape), view.array.reshape(shape))
    except UnsupportedTransform:
        return view


@st.composite
def factorings(draw: Draw, size: int) -> tuple[int, ...]:
    """A shape of ``size`` elements."""
    shape: list[int] = []
    while size > 1 and len(shape) < 4:
        factor = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        shape.append(factor)
        size //= factor
    return (*shape, size)


def repeated(draw: Draw, view: View) -> View:
    """All of it twice or three times, in a new dimension along which the window stands still."""
    n = draw(st.integers(2, 3))
    window = Window(view.window.offset, (n, *view.window.shape), (0, *view.window.strides))
    return View(window, np.broadcast_to(view.array, (n, *view.array.shape)))


def chained(draw: Draw, view: View, *, cut: bool = True, still: bool = False, most: int = 4) -> View:
    """A chain of up to ``most`` views; without ``cut`` every element stays, with ``still`` some may be repeated."""
    kinds = [turned, reshaped, *([narrowed] * 2 if cut else []), *([repeated] if still else [])]
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=most)):
        view = kind(draw, view)
    return view


@st.composite
def views(draw: Draw, shape: tuple[int, ...] | None = None, *, cut: bool = True) -> View:
    """Any chain of views of a tensor."""
    return chained(draw, whole_view(draw(shapes()) if shape is None else shape), cut=cut)


@st.composite
def windows(draw: Draw, *, still: bool = False, span: int = 40) -> Window:
    """Any window: of strides that do not divide each other, that meets itself; with ``still``, of strides 0 too."""
    shape = draw(shapes(dims=3, most=5))
    strides = tuple(draw(st.integers(0 if still else 1, 13)) for _ in shape)
    return Window(draw(st.integers(0, span)), shape, strides)


# Mosaics.


Sources = Mapping[str, Array]
"""The arrays that logical tensors hold."""


@dataclass(frozen=True)
class Mosaic:
    """A target whose pieces cite names, and the array that it must be."""

    tensor: Tensor
    array: Array


def mosaic(
    name: str, array: Array, pieces: Iterable[Piece], fill: float | None = None, dtype: DType = DType.I64
) -> Mosaic:
    """A target of given pieces."""
    made = tuple(pieces)
    return Mosaic(Tensor(name, dtype, array.shape, lambda: made, fill), array)


def stacked(
    name: str, parts: Sequence[tuple[str, View]], dim: int, order: Sequence[int] = (), dtype: DType = DType.I64
) -> Mosaic:
    """Views of sources, beside each other along ``dim``, their other dimensions equal; then transposed to ``order``."""
    array = np.concatenate([view.array for _, view in parts], axis=dim)
    order = order or range(array.ndim)
    frame = row_major(tuple(array.shape[i] for i in order)).transpose(*np.argsort(order).tolist())
    pieces, at = [], 0
    for source, view in parts:
        length = view.array.shape[dim]
        pieces.append(Piece(frame.narrow(dim, at, length), view.window, source))
        at += length
    return mosaic(name, array.transpose(order), pieces, dtype=dtype)


@st.composite
def mosaics(draw: Draw, sources: Sources, name: str = "target", *, most: int = 4) -> Mosaic:
    """Some views of the sources in rows of one width, one below the other or side by side, perhaps transposed."""
    width = draw(st.integers(1, 3))
    parts = []
    for _ in range(draw(st.integers(1, most))):
        source = draw(st.sampled_from(sorted(sources)))
        parts.append(
            (source, _rows(chained(draw, whole_view(sources[source].shape, sources[source]), still=True), width))
        )
    dim = draw(st.integers(0, 1))
    if dim:  # side by side: as many rows of each
        rows = min(view.array.shape[0] for _, view in parts)
        parts = [(source, View(view.window.narrow(0, 0, rows), view.array[:rows])) for source, view in parts]
    return stacked(name, parts, dim, draw(st.permutations(range(2))))


def _rows(view: View, width: int) -> View:
    """A view's elements in rows of ``width``, as far as one window can say it."""
    while True:
        try:
            line = View(view.window.reshape(view.array.size), view.array.reshape(-1))
            break
        except UnsupportedTransform:  # the first of its rows, then
            rest = view.array.shape[1:]
            view = View(view.window.narrow(0, 0, 1).reshape(*rest), view.array[:1].reshape(rest))
    rows = line.array.size // width
    window = line.window.narrow(0, 0, rows * width)
    return View(window.reshape(rows, width), line.array[: rows * width].reshape(rows, width))


def run(
    pieces: Iterable[Piece], shape: tuple[int, ...], held: Callable[[Any], Array], fill: float | None = None
) -> Array:
    """Execute pieces on arrays; -1 where nothing lands. ``held`` gives the elements of a piece's source."""
    out = np.full(math.prod(shape), -1 if fill is None else fill, np.int64)
    for piece in pieces:
        out[addresses(piece.dst)] = held(piece.source).reshape(-1)[addresses(piece.src)]
    return out.reshape(shape)


@st.composite
def sources(draw: Draw, *, most: int = 3) -> Sources:
    """Logical tensors with unique elements."""
    found, first = {}, 1
    for i in range(draw(st.integers(1, most))):
        shape = draw(shapes(least=1, dims=3))
        found[f"s{i}"] = np.arange(first, first + math.prod(shape)).reshape(shape)
        first += math.prod(shape)
    return found


# Layouts.


def stored(name: str, shape: tuple[int, ...], dtype: DType = DType.I64) -> Stored:
    """Where the tests pretend that a tensor lies: in an object of its own."""
    return Stored(name, dtype, shape, 0)


def catalog(held: Sources) -> dict[str, Tensor]:
    """The arrays as a catalogue of stored tensors."""
    return {name: whole(name, stored(name, array.shape)) for name, array in held.items()}


@st.composite
def layouts(draw: Draw, held: Sources) -> list[Mosaic]:
    """Targets that hold each element of the sources at least once: blocks, each turned or reshaped or stacked."""
    found: list[Mosaic] = []
    for source, array in held.items():
        for view in _blocks(draw, whole_view(array.shape, array), draw(st.integers(0, 3))):
            for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):  # a replica, perhaps of another form
                form = chained(draw, view, cut=False, still=True, most=3)
                copies = draw(st.sampled_from([1, 1, 1, 2]))
                if copies > 1 and form.array.ndim:
                    found.append(stacked(f"t{len(found)}", [(source, form)] * copies, 0))
                else:
                    piece = Piece(row_major(form.array.shape), form.window, source)
                    found.append(mosaic(f"t{len(found)}", form.array, [piece]))
    if draw(st.booleans()) and found:  # and one more that overlaps the others somehow
        found.append(draw(mosaics(held, f"t{len(found)}")))
    return found


def _blocks(draw: Draw, view: View, cuts: int) -> list[View]:
    """Blocks that hold a view's elements once each, cut along rows, columns or every other index."""
    dims = [dim for dim, n in enumerate(view.array.shape) if n > 1]
    if not cuts or not dims:
        return [view]
    dim = draw(st.sampled_from(dims))
    n = view.array.shape[dim]
    before = (slice(None),) * dim
    if draw(st.booleans()):
        at = draw(st.integers(1, n - 1))
        parts = [(0, at, 1), (at, n - at, 1)]
    else:
        parts = [(0, -(-n // 2), 2), (1, n // 2, 2)]
    return [
        block
        for start, length, step in parts
        for block in _blocks(
            draw,
            View(
                view.window.narrow(dim, start, length, step),
                view.array[(*before, slice(start, start + (length - 1) * step + 1, step))],
            ),
            cuts - 1,
        )
    ]
