"""The nouns of a plan: sizes and offsets are known before a byte is read."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from shardtool import header
from shardtool.dtypes import DType
from shardtool.plan import File, Piece, Stored, Tensor, whole
from shardtool.window import row_major
from tests.strategies import dtypes, file_tensors, shapes


def file(tensors: list[tuple[str, DType, tuple[int, ...]]]) -> File:
    """A file of tensors whose pieces do not matter."""
    return File("a.safetensors", 0, tuple(Tensor(name, dtype, shape, tuple) for name, dtype, shape in tensors))


@given(file_tensors())
def test_a_file_knows_its_size_and_where_each_tensor_will_lie(tensors: list[tuple[str, DType, tuple[int, ...]]]):
    made = file(tensors)
    parsed = header.parse(made.header[8:], made.size, made.key)
    assert {e.name: Stored(made.key, e.dtype, e.shape, e.offset) for e in parsed.entries} == made.stored()
    assert made.size == len(made.header) + made.data_size == len(made.header) + sum(t.nbytes for t in made.tensors)


def test_a_file_carries_its_metadata():
    made = File("a.safetensors", None, (), (("format", "pt"),))
    assert header.parse(made.header[8:], made.size, made.key).metadata == {"format": "pt"}


@given(dtypes(), shapes(smallest=0), st.integers(0, 1000))
def test_a_stored_tensor_is_a_mosaic_of_one_piece(dtype: DType, shape: tuple[int, ...], offset: int):
    stored = Stored("key", dtype, shape, offset)
    tensor = whole("name", stored)
    assert tensor.pieces() == (Piece(row_major(shape), row_major(shape), stored),)
    assert (tensor.stored, tensor.size, tensor.nbytes) == (stored, math.prod(shape), stored.nbytes)


def test_pieces_are_made_only_when_asked_for():
    asked: list[int] = []

    def pieces() -> tuple[Piece, ...]:
        asked.append(1)
        return ()

    tensor = Tensor("t", DType.F32, (2,), pieces)
    assert File("a", 0, (tensor,)).size > 0
    assert asked == []
