"""Casts between floating point types, element by element, with numpy alone (torch's 225 MB are not needed for them).

Rounding is to nearest, ties to even, as torch and every engine do it. float64 goes through float32 on its way to
the 16 bit types, as in torch. bfloat16 travels as unsigned integers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardtool.dtypes import FLOATS, DType
from shardtool.errors import UnsupportedTransform

BLOCK = 1 << 14
"""Elements that are cast at a time, so that the temporaries stay in cache and out of the memory limit."""


def cast_into(dst: NDArray[np.generic], to: DType, src: NDArray[np.generic], of: DType) -> None:
    """Write ``src`` (elements of ``of``) to ``dst`` (elements of ``to``), any strides, equal shapes."""
    if of not in FLOATS or to not in FLOATS:
        raise UnsupportedTransform(f"{of.name} cannot be cast to {to.name}; only floating point types can be cast")
    if src.ndim and src.size > BLOCK:
        rows = src.shape[0]
        if rows == 1:
            cast_into(dst[0], to, src[0], of)
            return
        step = max(1, BLOCK * rows // src.size)
        for i in range(0, rows, step):
            cast_into(dst[i : i + step], to, src[i : i + step], of)
        return
    with np.errstate(over="ignore", invalid="ignore"):
        dst[...] = _encode(_decode(src, of), to)


def _decode(src: NDArray[np.generic], of: DType) -> NDArray[np.generic]:
    """The values as float32 (float64 stays)."""
    if of is DType.BF16:
        return (src.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if of is DType.F16:
        return src.astype(np.float32)
    return src


def _encode(values: NDArray[np.generic], to: DType) -> NDArray[np.generic]:
    if to is DType.F64 or (to is DType.F32 and values.dtype == np.float32):
        return values
    single = values.astype(np.float32)
    if to is DType.F32:
        return single
    if to is DType.F16:
        return single.astype(np.float16)
    bits = single.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    # Rounding could turn a NaN into an infinity: it is cut off and made quiet, unless its bits all survive.
    quiet = np.where(bits & np.uint32(0xFFFF), np.uint32(0x40), np.uint32(0))
    return np.where(np.isnan(single), bits >> np.uint32(16) | quiet, rounded).astype(np.uint16)


def decode(src: NDArray[np.generic], of: DType) -> NDArray[np.generic]:
    """Elements as numbers that numpy can compare and print, for reports. Types without a numpy twin give their bits."""
    if of in (DType.BF16, DType.F16):
        return _decode(src, of)
    if of in (DType.F8_E4M3, DType.F8_E5M2):
        values: NDArray[np.generic] = _FLOAT8[of][src]
        return values
    return src


def _float8(exponent_bits: int, mantissa_bits: int, bias: int, *, infinities: bool) -> NDArray[np.float32]:
    """The 256 values of an 8 bit float."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    unit = float(1 << mantissa_bits)
    normal = (1 + mantissa / unit) * 2.0 ** (exponent - bias)
    values = np.where(exponent == 0, mantissa / unit * 2.0 ** (1 - bias), normal)
    top = exponent == (1 << exponent_bits) - 1
    if infinities:
        values = np.where(top, np.where(mantissa == 0, np.inf, np.nan), values)
    else:
        values = np.where(top & (mantissa == (1 << mantissa_bits) - 1), np.nan, values)
    return (sign * values).astype(np.float32)


_FLOAT8 = {
    DType.F8_E4M3: _float8(4, 3, 7, infinities=False),
    DType.F8_E5M2: _float8(5, 2, 15, infinities=True),
}
