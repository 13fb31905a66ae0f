"""Casts: torch is the judge, for every pattern of 16 bits and for the corners of the wider types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shardtool.cast import BLOCK, cast_into, decode
from shardtool.dtypes import FLOATS, DType, lossless
from shardtool.errors import UnsupportedTransform
from tests.strategies import Array

PAIRS = [(a, b) for a in FLOATS for b in FLOATS]
BITS = {dtype: f"<u{dtype.itemsize}" for dtype in FLOATS}


def patterns(dtype: DType) -> Array:
    """All elements of a 16 bit type; of a wider one its corners, ties of the narrower types, and many at random."""
    if dtype.bits == 16:
        return np.arange(1 << 16, dtype=np.uint16).view(dtype.numpy)
    random = np.random.default_rng(0)
    chance = random.integers(0, 1 << dtype.bits, 50_000, np.uint64).astype(BITS[dtype]).view(dtype.numpy)
    sixteen = np.arange(1 << 16, dtype=np.uint16)
    exact = np.concatenate([decode(sixteen, DType.BF16), decode(sixteen.view(np.float16), DType.F16)])
    exact = exact[np.isfinite(exact)].astype(dtype.numpy)
    between = np.sort(exact)
    ties = between[:-1] + (between[1:] - between[:-1]) / 2
    near = [np.nextafter(ties, np.array(side, ties.dtype)) for side in (np.inf, -np.inf)]
    single = np.finfo(np.float32)
    corners = [np.inf, -np.inf, np.nan, 0.0, -0.0, single.max, single.tiny, single.smallest_subnormal, 65504, 65520]
    if dtype is DType.F64:
        corners += [float(single.max) * (1 + 2**-25), float(single.max) * (1 + 2**-24), 1 + 2**-24, 1e300, 5e-324]
    return np.concatenate([chance, exact, ties, *near, np.array(corners, dtype.numpy)])


def tensor(values: Array, dtype: DType) -> torch.Tensor:
    """The same elements in torch."""
    return torch.from_numpy(values.view(BITS[dtype]).copy()).view(dtype.torch())


def same(ours: Array, theirs: torch.Tensor, dtype: DType) -> Array:
    """Which elements have the same bits, or are no numbers on both sides: torch itself writes those in several ways."""
    bits = theirs.view(torch.from_numpy(np.zeros(0, BITS[dtype])).dtype).numpy()
    return (ours.view(BITS[dtype]) == bits) | (np.isnan(decode(ours, dtype)) & theirs.isnan().numpy())


@pytest.mark.parametrize(("of", "to"), PAIRS, ids=lambda dtype: dtype.name)
def test_a_cast_gives_the_bits_that_torch_gives(of: DType, to: DType):
    values = patterns(of)
    ours = np.empty(len(values), to.numpy)
    cast_into(ours, to, values, of)
    right = same(ours, tensor(values, of).to(to.torch()), to)
    assert right.all(), f"{(~right).sum()} differ, first {values[~right][:3]}"


@pytest.mark.parametrize(("of", "to"), [pair for pair in PAIRS if lossless(*pair)], ids=lambda dtype: dtype.name)
def test_a_lossless_cast_and_back_gives_every_number_again(of: DType, to: DType):
    values = patterns(of)
    there, back = np.empty(len(values), to.numpy), np.empty(len(values), of.numpy)
    cast_into(there, to, values, of)
    cast_into(back, of, there, to)
    assert same(back, tensor(values, of), of).all()


@given(hnp.arrays("<f4", hnp.array_shapes(min_dims=0, max_dims=3, max_side=5), elements=st.floats(width=32)), st.data())
def test_any_strides_and_shapes_are_cast_in_place(values: Array, data: st.DataObject):
    order = data.draw(st.permutations(range(values.ndim)))
    room = np.zeros(tuple(2 * n for n in values.shape), "<u2")
    every_other = room[(slice(None, None, 2),) * values.ndim].reshape(values.shape)
    dst = every_other.transpose(order) if values.ndim else room
    src = values.transpose(order) if values.ndim else values
    cast_into(dst, DType.BF16, src, DType.F32)
    wanted = torch.from_numpy(np.ascontiguousarray(src)).to(torch.bfloat16)
    assert same(np.ascontiguousarray(dst).reshape(-1), wanted.reshape(-1), DType.BF16).all()
    assert room.sum() == dst.sum()  # nothing was written between the elements


@pytest.mark.parametrize(
    "shape",
    [(BLOCK + 1,), (1, BLOCK + 1), (3, BLOCK + 1), (BLOCK + 1, 1), (1, 1, 2 * BLOCK), (7, 1, 5000), (5, 3, BLOCK)],
)
def test_what_is_larger_than_a_block_is_cast_whole(shape: tuple[int, ...]):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    found = np.empty(shape, np.float64)
    cast_into(found, DType.F64, values, DType.F32)
    assert np.array_equal(found, values)


@pytest.mark.parametrize("of", [d for d in DType if d not in FLOATS], ids=lambda dtype: dtype.name)
def test_other_types_are_not_cast(of: DType):
    elements = np.zeros(4, np.uint8)
    with pytest.raises(UnsupportedTransform, match=f"{of.name} cannot be cast to F32"):
        cast_into(np.zeros(4, np.float32), DType.F32, elements, of)
    with pytest.raises(UnsupportedTransform, match=f"F32 cannot be cast to {of.name}"):
        cast_into(elements, of, np.zeros(4, np.float32), DType.F32)


@pytest.mark.parametrize("dtype", [DType.F8_E4M3, DType.F8_E5M2, DType.BF16, DType.F16], ids=lambda dtype: dtype.name)
def test_a_report_shows_the_numbers_that_torch_shows(dtype: DType):
    codes = np.arange(1 << dtype.bits).astype(f"<u{dtype.itemsize}")
    theirs = torch.from_numpy(codes.copy()).view(dtype.torch()).to(torch.float32).numpy()
    assert np.array_equal(decode(codes.view(dtype.numpy), dtype), theirs, equal_nan=True)


def test_a_report_shows_other_types_as_they_are():
    assert decode(np.array([3, 4], "<i8"), DType.I64).tolist() == [3, 4]
    assert decode(np.array([3, 200], "u1"), DType.F8_E8M0).tolist() == [3, 200]
