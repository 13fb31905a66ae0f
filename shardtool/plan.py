"""The nouns of a plan. All of them are data; nothing here reads or writes.

::

    File        one destination: a key and its tensors, every offset known
    └── Tensor      name, dtype, shape, and a mosaic: pieces, over a fill where there is padding
        └── Piece       these elements of the target (dst) are those elements (src) of a source
            ├── Stored      a tensor whose bytes exist: object, offset, dtype, shape; or just a name, before ``resolve``
            └── Program     or a small tensor that is computed: one operation on mosaics and numbers

A difference of dtype between a piece's source and its target is a cast. Pieces are made when asked for, per tensor: a
model has hundreds of thousands of them and a plan holds none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from shardtool import header
from shardtool.dtypes import DType
from shardtool.window import Window, row_major


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor whose bytes exist, in row-major order, at ``offset`` bytes of the object ``key``."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.dtype.nbytes(math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class Piece:
    """The elements ``src`` of ``source`` land on the elements ``dst`` of the target. Both windows have one shape."""

    dst: Window
    src: Window
    source: str | Stored | Program


@dataclass(frozen=True, slots=True)
class Mosaic:
    """A tensor made of pieces, without a name: what a program takes, and what a rank holds of a target.

    ``fill`` is the value under the pieces.
    """

    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    fill: float | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """A tensor that an engine computes while it loads: one operation of ``OPERATIONS`` on whole small tensors.

    ``args``: mosaics, numbers and texts, as the operation takes them. Chains nest: a piece of a mosaic may cite a
    program again. ``data`` is a constant: its argument is the base64 text of its deflated little-endian bytes.
    """

    op: str
    args: tuple[Mosaic | float | str, ...]
    dtype: DType
    shape: tuple[int, ...]

    def sources(self) -> Iterator[str]:
        """The names of all source tensors that it takes, at any depth."""
        for arg in self.args:
            for piece in arg.pieces if isinstance(arg, Mosaic) else ():
                if isinstance(piece.source, Program):
                    yield from piece.source.sources()
                else:
                    yield str(piece.source)


OPERATIONS = frozenset(
    {"abs", "add", "clamp", "data", "div", "exp", "expm1", "log", "log1p", "mul", "neg", "pow", "reciprocal", "rsqrt"}
    | {"sigmoid", "softplus", "sqrt", "sub", "to", "view"}
)
"""What a program may do: element by element as torch does it, ``to`` (another dtype), ``view`` (the bits
as another dtype of the same size), and ``data``."""


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A target or a logical source: a mosaic of pieces. ``fill`` is the value under them (padding, constants)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: Callable[[], tuple[Piece, ...]]
    fill: float | None = None
    stored: Stored | None = None  # set when the mosaic is one stored tensor, whole

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.dtype.nbytes(self.size)


Catalog = Mapping[str, Tensor]
"""What can be read, by logical name."""


def whole(name: str, stored: Stored) -> Tensor:
    """The mosaic of one: a stored tensor under a name."""

    def pieces() -> tuple[Piece, ...]:
        window = row_major(stored.shape)
        return (Piece(window, window, stored),)

    return Tensor(name, stored.dtype, stored.shape, pieces, stored=stored)


def itself(name: str, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """The target that is the source's tensor of the same name, whole."""
    window = row_major(shape)
    return Tensor(name, dtype, shape, lambda: (Piece(window, window, name),))


@dataclass(frozen=True, eq=False)
class File:
    """One destination file of rank ``rank`` (None: of no rank) with its tensors in the order of their bytes."""

    key: str
    rank: int | None
    tensors: tuple[Tensor, ...]
    metadata: tuple[tuple[str, str], ...] = ()

    @cached_property
    def header(self) -> bytes:
        """The safetensors header, length field and padding included."""
        return header.encode([(t.name, t.dtype, t.shape) for t in self.tensors], dict(self.metadata))

    @cached_property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_size

    def stored(self) -> dict[str, Stored]:
        """Where each tensor's bytes will lie."""
        found, offset = {}, len(self.header)
        for tensor in self.tensors:
            found[tensor.name] = Stored(self.key, tensor.dtype, tensor.shape, offset)
            offset += tensor.nbytes
        return found
