"""Element types: their names in files, in config.json and in torch, their size, and which casts lose nothing.

The order of the members is safetensors' own: a safetensors file holds its tensors by descending dtype, then by name.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from shardtool.errors import FormatError, UsageError

if TYPE_CHECKING:
    import torch


class DType(Enum):
    """One element type. ``value`` is (rank in safetensors' order, bits, numpy type that holds it, torch's name)."""

    BOOL = (0, 8, "u1", "bool")
    F4 = (1, 4, None, "float4_e2m1fn_x2")
    F6_E2M3 = (2, 6, None, None)
    F6_E3M2 = (3, 6, None, None)
    U8 = (4, 8, "u1", "uint8")
    I8 = (5, 8, "i1", "int8")
    F8_E5M2 = (6, 8, "u1", "float8_e5m2")
    F8_E4M3 = (7, 8, "u1", "float8_e4m3fn")
    F8_E8M0 = (8, 8, "u1", "float8_e8m0fnu")
    F8_E4M3FNUZ = (9, 8, "u1", "float8_e4m3fnuz")
    F8_E5M2FNUZ = (10, 8, "u1", "float8_e5m2fnuz")
    I16 = (11, 16, "<i2", "int16")
    U16 = (12, 16, "<u2", "uint16")
    F16 = (13, 16, "<f2", "float16")
    BF16 = (14, 16, "<u2", "bfloat16")
    I32 = (15, 32, "<i4", "int32")
    U32 = (16, 32, "<u4", "uint32")
    F32 = (17, 32, "<f4", "float32")
    C64 = (18, 64, "<c8", "complex64")
    F64 = (19, 64, "<f8", "float64")
    I64 = (20, 64, "<i8", "int64")
    U64 = (21, 64, "<u8", "uint64")

    def __init__(self, order: int, bits: int, code: str | None, torch_name: str | None) -> None:
        self._order = order
        self._bits = bits
        self._itemsize = 0 if bits % 8 else bits // 8
        self._code = code
        self._torch_name = torch_name

    __hash__ = object.__hash__  # members are single; Enum's own is Python, and asked for each tensor

    @property
    def order(self) -> int:
        """The place in safetensors' order; wider types come later."""
        return self._order

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return self._bits

    @property
    def torch_name(self) -> str | None:
        """The attribute of ``torch`` that names this type, or None."""
        return self._torch_name

    @property
    def itemsize(self) -> int:
        """Bytes of one element; refused for types narrower than a byte, which have no address of their own."""
        if not self._itemsize:
            raise UsageError(f"elements of {self.name} are narrower than a byte and cannot be cut")
        return self._itemsize

    @property
    def numpy(self) -> str:
        """The numpy type whose elements carry the same bits (bfloat16 travels as unsigned integers)."""
        if self._code is None:
            raise UsageError(f"elements of {self.name} are narrower than a byte and cannot be cut")
        return self._code

    def nbytes(self, count: int) -> int:
        """Bytes of ``count`` elements; a count that does not fill whole bytes is a ``FormatError``."""
        bits = count * self.bits
        if bits % 8:
            raise FormatError(f"{count} elements of {self.name} do not fill whole bytes")
        return bits // 8

    def torch(self) -> torch.dtype:
        """The torch type. Imports torch."""
        import torch

        found = getattr(torch, self.torch_name or "", None)
        if not isinstance(found, torch.dtype):
            raise UsageError(f"this version of torch has no type for {self.name}")
        return found


FLOATS = (DType.F16, DType.BF16, DType.F32, DType.F64)
"""The types among which elements can be cast."""

_EXPONENT_MANTISSA = {DType.F16: (5, 10), DType.BF16: (8, 7), DType.F32: (8, 23), DType.F64: (11, 52)}
_BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DType if dtype.torch_name}


def castable(source: DType, target: DType) -> bool:
    """Whether elements of ``source`` can be written as ``target``."""
    return source is target or (source in FLOATS and target in FLOATS)


def lossless(source: DType, target: DType) -> bool:
    """Whether a cast to ``target`` and back gives every element of ``source`` again."""
    if source is target:
        return True
    if source not in FLOATS or target not in FLOATS:
        return False
    (e0, m0), (e1, m1) = _EXPONENT_MANTISSA[source], _EXPONENT_MANTISSA[target]
    return e0 <= e1 and m0 <= m1


def from_name(name: str) -> DType:
    """The type of a name.

    Files write ``BF16``, config.json ``bfloat16`` or ``torch.bfloat16``, people ``bf16``.
    """
    plain = name.removeprefix("torch.")
    upper = {"HALF": "F16", "FP16": "F16", "FLOAT": "F32", "FP32": "F32"}.get(plain.upper(), plain.upper())
    if upper in DType.__members__:
        return DType[upper]
    if plain in _BY_TORCH_NAME:
        return _BY_TORCH_NAME[plain]
    raise UsageError(f"{name!r} is not a dtype that shardtool knows; use for example bfloat16, float16 or float32")
