"""Element types: their names everywhere, their sizes, and which casts keep every element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardtool.dtypes import FLOATS, DType, castable, from_name, lossless
from shardtool.errors import FormatError, UsageError
from tests.strategies import BYTE_DTYPES

NARROW = [dtype for dtype in DType if dtype not in BYTE_DTYPES]
TORCH = [dtype for dtype in BYTE_DTYPES if hasattr(torch, dtype.torch_name or "-")]


@pytest.mark.parametrize("dtype", BYTE_DTYPES, ids=lambda dtype: dtype.name)
def test_numpy_holds_an_element_in_as_many_little_endian_bytes(dtype: DType):
    kind = np.dtype(dtype.numpy)
    assert kind.itemsize == dtype.itemsize == dtype.bits // 8
    assert kind.itemsize == 1 or dtype.numpy.startswith("<")


@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name)
def test_torch_holds_an_element_in_as_many_bytes(dtype: DType):
    assert dtype.torch().itemsize == dtype.itemsize


def test_every_common_type_of_torch_has_a_name_in_files():
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"):
        assert from_name(name).torch() is getattr(torch, name)


def test_a_type_that_torch_does_not_have_is_refused():
    with pytest.raises(UsageError, match="F6_E2M3"):
        DType.F6_E2M3.torch()


@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: dtype.name)
def test_elements_narrower_than_a_byte_have_no_size_of_their_own(dtype: DType):
    with pytest.raises(UsageError, match=dtype.name):
        _ = dtype.itemsize
    with pytest.raises(UsageError, match=dtype.name):
        _ = dtype.numpy


def test_narrow_elements_fill_whole_bytes_together():
    assert (DType.F4.nbytes(6), DType.F6_E2M3.nbytes(4), DType.BF16.nbytes(3)) == (3, 3, 6)
    with pytest.raises(FormatError, match="3 elements of F4"):
        DType.F4.nbytes(3)


@given(st.sampled_from(list(DType)))
def test_the_order_is_the_order_of_definition_and_wider_types_come_later(dtype: DType):
    assert list(DType)[dtype.order] is dtype
    assert all(other.bits <= max(8, dtype.bits) for other in list(DType)[: dtype.order])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BF16", DType.BF16),
        ("bf16", DType.BF16),
        ("bfloat16", DType.BF16),
        ("torch.bfloat16", DType.BF16),
        ("half", DType.F16),
        ("fp16", DType.F16),
        ("float16", DType.F16),
        ("float", DType.F32),
        ("torch.float32", DType.F32),
        ("fp32", DType.F32),
        ("float8_e4m3fn", DType.F8_E4M3),
        ("f8_e4m3", DType.F8_E4M3),
        ("int64", DType.I64),
        ("bool", DType.BOOL),
    ],
)
def test_a_type_has_the_names_that_people_files_and_torch_give_it(name: str, dtype: DType):
    assert from_name(name) is dtype


@pytest.mark.parametrize("dtype", list(DType), ids=lambda dtype: dtype.name)
def test_a_type_is_found_by_its_own_names(dtype: DType):
    assert from_name(dtype.name) is from_name(dtype.name.lower()) is dtype
    assert dtype.torch_name is None or from_name(dtype.torch_name) is dtype


@pytest.mark.parametrize("name", ["", "auto", "bf-16", "float7", "None", "torch."])
def test_another_name_is_refused_with_an_example(name: str):
    with pytest.raises(UsageError, match="bfloat16"):
        from_name(name)


@given(st.sampled_from(list(DType)), st.sampled_from(list(DType)))
def test_casts_are_among_floating_point_types_only(a: DType, b: DType):
    assert castable(a, b) == (a is b or {a, b} <= set(FLOATS))
    assert castable(a, b) or not lossless(a, b)


@pytest.mark.parametrize("a", FLOATS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("b", FLOATS, ids=lambda dtype: dtype.name)
def test_a_cast_is_called_lossless_when_torch_brings_every_value_back(a: DType, b: DType):
    if a.bits == 16:
        values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(a.torch())
    else:
        info = torch.finfo(a.torch())
        values = torch.tensor([1 + info.eps, info.max, info.tiny, info.smallest_normal / 2, -0.0], dtype=a.torch())
    back = values.to(b.torch()).to(a.torch())
    same = bool(((back == values) | (back.isnan() & values.isnan())).all())
    assert same == lossless(a, b)
