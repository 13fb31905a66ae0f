"""The header of a safetensors file: written so that direct reads are aligned, parsed as the untrusted text that it is.

A file is: 8 bytes of header length (little endian), the header (JSON, padded with spaces), the tensors' bytes
without holes. Ours holds the tensors in safetensors' own order (dtype descending, then name); its padding makes the
first tensor of 1 MiB or more start on a multiple of 4096 bytes (not if what lies before it is no multiple of 8).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

from shardtool.calm import calm
from shardtool.dtypes import DType
from shardtool.errors import FormatError

MAX_HEADER = 100_000_000
"""Bytes of header that a file may have; the format's own limit."""
PAGE = 4096
BIG = 1 << 20


class Entry(NamedTuple):
    """One tensor of a file: its dtype, shape and where its bytes start in the file.

    ``strides``, in elements, where these do not follow each other (never in a safetensors file).
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: entries in the order of their bytes."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_offset: int


def sort_key(name: str, dtype: DType) -> tuple[int, str]:
    """The order of tensors in a safetensors file."""
    return -dtype.order, name


def encode(tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> bytes:
    """Length field and header for these tensors, whose bytes follow in this order."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    big: int | None = None
    for name, dtype, shape in tensors:
        nbytes = dtype.nbytes(math.prod(shape))
        if name in table or name == "__metadata__":
            raise FormatError(
                f"a file cannot hold a tensor {name!r} beside what has this name already; rename one of them"
            )
        table[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        if big is None and nbytes >= BIG:
            big = offset
        offset += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    pad = -(8 + len(text)) % 8
    if big is not None and big % 8 == 0:
        pad = -(8 + len(text) + big) % PAGE
    if len(text) + pad > MAX_HEADER:
        raise FormatError(f"a file of {len(table)} tensors needs a header of {len(text)} bytes; use smaller parts")
    return (len(text) + pad).to_bytes(8, "little") + text + b" " * pad


def length(first: bytes, file_size: int, where: str) -> int:
    """Bytes of the header after the length field, from the file's first 8 bytes."""
    if file_size < 8 or len(first) < 8:
        raise FormatError(
            f"{where} is not a safetensors file: it has {file_size} bytes, fewer than the 8 of a length field"
        )
    n = int.from_bytes(first[:8], "little")
    if n > MAX_HEADER:
        raise FormatError(f"{where} is not a safetensors file: its header would be {n} bytes, more than {MAX_HEADER}")
    if 8 + n > file_size:
        raise FormatError(
            f"{where} is damaged: its header should be {n} bytes but the file has {file_size}; fetch it again"
        )
    return n


def parse(text: bytes, file_size: int, where: str) -> Header:
    """The header's entries, every length and offset checked against the file's size.

    Raises ``FormatError`` that names the file, and the tensor where there is one.
    """
    with calm():
        return _parsed(text, file_size, where)


def _parsed(text: bytes, file_size: int, where: str) -> Header:
    try:
        words = text.decode("utf-8")
        table = json.loads(words)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: its header is not JSON ({str(error)[:80]})") from None
    if not isinstance(table, dict):
        raise FormatError(f"{where} is damaged: its header is not a table of tensors")
    if not _says_all(words, table):
        _refuse_duplicates(words, where)
    metadata = table.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{where} is damaged: its __metadata__ is not a table of strings")
    try:
        "".join((*table, *metadata, *metadata.values())).encode()
    except UnicodeEncodeError:  # JSON can spell half of a character
        raise FormatError(f"{where} is damaged: its header has a name that is not text") from None
    base = 8 + len(text)
    try:
        entries = _entries(table, base)
    except (TypeError, KeyError, ValueError, OverflowError):  # one of them is wrong: which one, and how?
        _refuse_duplicates(words, where)
        entries = [_entry(name, value, base, where) for name, value in table.items()]
    entries.sort(key=attrgetter("offset", "nbytes"))
    end = base
    for entry in entries:
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            raise FormatError(f"{where} is damaged: tensor {entry.name!r} {kind}")
        end += entry.nbytes
    if end != file_size:
        kind = "ends too early" if end > file_size else "has bytes that belong to no tensor"
        raise FormatError(f"{where} is damaged: it {kind} ({file_size} bytes, its header says {end}); fetch it again")
    return Header(tuple(entries), metadata, base)


_DTYPES = dict(DType.__members__)  # which enum makes anew at each look


class _Duplicate(Exception):
    pass


def _says_all(words: str, table: dict[str, Any]) -> bool:
    """Whether surely no key of the text was said twice, which would be lost in the table.

    Without escapes every text stands between two quotes, and a tensor has five: its name, three keys and its dtype.
    """
    texts = 5 * len(table)
    if "__metadata__" in table:
        metadata = table["__metadata__"]
        texts += 2 * len(metadata) - 4 if isinstance(metadata, dict) else -4
    return "\\" not in words and words.count('"') == 2 * texts


def _refuse_duplicates(words: str, where: str) -> None:
    try:
        json.loads(words, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise FormatError(f"{where} is damaged: its header is not JSON ({str(error)[:80]})") from None
    except _Duplicate as error:
        raise FormatError(f"{where} is damaged: its header names {str(error)!r} twice") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        raise _Duplicate(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return table


def _entries(table: dict[str, Any], base: int) -> list[Entry]:
    """All entries at once, as ``_entry`` makes them: twice as fast. Raises a built-in error if any is wrong."""
    values = table.values()
    kinds, shapes = [value["dtype"] for value in values], [value["shape"] for value in values]
    offsets = [value["data_offsets"] for value in values]
    numbers = [*chain.from_iterable(shapes), *chain.from_iterable(offsets)]
    if {*map(type, shapes), *map(type, offsets)} - {list} or set(map(type, numbers)) - {int} or len(table) == 0:
        raise TypeError
    if min(numbers) < 0 or max(numbers) >= 1 << 63 or max(map(len, shapes)) > 64:
        raise ValueError
    entries, sizes = [], dict[Any, tuple[DType, tuple[int, ...], int]]()
    for name, kind, dims, (start, end) in zip(table, kinds, shapes, offsets, strict=True):
        known = sizes.get((kind, *dims))
        if known is None:
            dtype, shape = _DTYPES[kind], tuple(dims)
            nbytes, odd = divmod(math.prod(shape) * dtype.bits, 8)
            if odd:
                raise ValueError
            known = sizes[kind, *dims] = (dtype, shape, nbytes)
        dtype, shape, nbytes = known
        if end - start != nbytes:
            raise ValueError
        entries.append(Entry(name, dtype, shape, base + start, nbytes))
    return entries


def _entry(name: str, value: Any, base: int, where: str) -> Entry:
    try:
        kind, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"{where} is damaged: tensor {name!r} lacks dtype, shape or data_offsets") from None
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise FormatError(f"{where}: tensor {name!r} has the unknown dtype {kind!r}")
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    for n in numbers:
        if type(n) is not int or not 0 <= n < 1 << 63:
            numbers = []
            break
    if not numbers or len(shape) > 64:
        raise FormatError(f"{where} is damaged: tensor {name!r} has a shape or offsets that are not sizes")
    bits = math.prod(shape) * dtype.bits
    if bits % 8 or end - start != bits // 8:
        raise FormatError(
            f"{where} is damaged: tensor {name!r} of shape {shape} and {kind} cannot have {end - start} bytes"
        )
    return Entry(name, dtype, tuple(shape), base + start, end - start)
