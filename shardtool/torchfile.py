"""The file of ``torch.save``: a zip whose records lie in it as they are, one of them a pickle that tells what they are.

::

    NAME/data.pkl      the table of tensors: which elements of which storage (read by ``unpickle``)
    NAME/byteorder     little, or big
    NAME/data/0 ...    the bytes of each storage
    the directory      where each record's head lies, at the end of the file
    the end            where the directory lies

Everything here is a function of bytes that somebody else read. All of it is untrusted: a number that leads out of the
file, two records of one name or one place, anything compressed or encrypted is refused.
"""

from __future__ import annotations

import shlex
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from shardtool.errors import FormatError
from shardtool.header import Entry
from shardtool.unpickle import Storage, View
from shardtool.window import row_major

MAX_DIRECTORY = 64 << 20
"""Bytes of directory that a file may have."""
MAX_PICKLE = 64 << 20
"""Bytes of pickle that a file may have; a tensor takes about 200."""
MAX_SHARED = 16
"""How many times the file's bytes its tensors may come to, since they may share them ..."""
MAX_EXPANDED = 64 << 20
"""... and how many bytes more, since they may repeat an element."""
HEAD = 30
"""Bytes of a record's head before its name."""
_END, _LOCATOR, _END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
_RECORD, _HEAD = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
_ENCRYPTED = 1
_NESTED = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True, slots=True)
class Record:
    """One record: where its head starts, its size, and where it must have ended."""

    name: str
    start: int
    size: int
    end: int
    method: int
    flags: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of a file below the folder that torch gives them, by name (``data.pkl``, ``data/0``)."""

    folder: str
    records: Mapping[str, Record]


def not_zip(first: bytes, key: str, where: str) -> FormatError:
    """What to say of a file that is no zip, from its first bytes: the formats before torch 1.6, or none."""
    if first[257:262] == b"ustar":
        return FormatError(
            f"{where} is in the tar format of torch before 0.2, which can do harm to whoever loads it; if you trust "
            f"it, in its folder: {conversion(key, trusted=True)}"
        )
    if first[:1] == b"\x80":
        return FormatError(
            f"{where} is in the format of torch.save before 1.6 (a plain pickle), which cannot be read in ranges; "
            f"convert it, in its folder: {conversion(key)}"
        )
    return FormatError(f"{where} is not a file of torch.save: it is no zip, or it is cut off; fetch it again")


def conversion(key: str, take: str = "", *, trusted: bool = False) -> str:
    """The command that makes a safetensors file of a torch file."""
    program = (
        "import sys, torch; from safetensors.torch import save_file; "
        f"t = torch.load(sys.argv[1], map_location='cpu', weights_only={not trusted}){take}; "
        "save_file({k: v.detach().clone().contiguous() for k, v in t.items() if isinstance(v, torch.Tensor)}, "
        "sys.argv[2])"
    )
    return f'python -c "{program}" {shlex.quote(key)} {shlex.quote(key.removesuffix(".bin") + ".safetensors")}'


def directory(tail: bytes, size: int, where: str) -> tuple[int, int, int] | None:
    """Where the directory starts, its bytes and its records, from the last bytes of the file; None if it is no zip."""
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        return None
    _, disk, first_disk, here, count, length, start, _ = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\x06\x07":
        _, _, at, _ = _LOCATOR.unpack(locator)
        end -= _LOCATOR.size + _END64.size
        inside = at - (size - len(tail))
        if at != end or inside < 0 or tail[inside : inside + 4] != b"PK\x06\x06":
            raise _damaged(where, "the end of its directory is not where it should be")
        said = (here, count, length, start)
        _, _, _, _, disk, first_disk, here, count, length, start = _END64.unpack_from(tail, inside)
        limits = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        if any(a not in (b, most) for a, b, most in zip(said, (here, count, length, start), limits, strict=True)):
            raise _damaged(where, "its directory is said to be in two places")
    if disk or first_disk or here != count:
        raise _damaged(where, "it is a part of a zip of several files")
    if length > MAX_DIRECTORY or count * _RECORD.size > length:
        raise _damaged(where, f"its directory has {length} bytes for {count} records")
    if start + length != end:
        raise _damaged(where, "its directory is not where it should be")
    return start, length, count


def archive(text: bytes, start: int, count: int, where: str) -> Archive:
    """The records that a directory lists, each with room of its own. ``start``: where the directory lies."""
    found: list[tuple[str, int, int, int, int]] = []
    at = 0
    for _ in range(count):
        if text[at : at + 4] != b"PK\x01\x02" or at + _RECORD.size > len(text):
            raise _damaged(where, "its directory is cut off")
        (_, _, _, flags, method, _, _, _, packed, size, named, extra, comment, disk, _, _, place) = _RECORD.unpack_from(
            text, at
        )
        at += _RECORD.size
        label, more = text[at : at + named], text[at + named : at + named + extra]
        at += named + extra + comment
        packed, size, place = _wide(more, size, packed, place, where)
        if disk or place + HEAD > start:
            raise _damaged(where, "a record lies outside of it")
        if not method and packed != size:
            raise _damaged(where, "a record has two sizes")
        found.append((_text(label, where), place, size, method, flags))
    if at != len(text):
        raise _damaged(where, "its directory is longer than its records")
    if not found or "/" not in found[0][0]:
        raise FormatError(f"{where} is not a file of torch.save but some other zip")
    folder = found[0][0].partition("/")[0] + "/"  # as torch takes it
    places = dict(pairwise(sorted([place for _, place, *_ in found] + [start])))
    records: dict[str, Record] = {}
    seen: set[str] = set()
    for name, place, size, method, flags in found:
        if name.lower() in seen:  # torch looks names up without regard to case
            raise _damaged(where, f"it has two records {name[:100]!r}")
        seen.add(name.lower())
        if name.startswith(folder):
            inner = name.removeprefix(folder)
            records[inner] = Record(name, place, size, places[place], method, flags)
    if len(places) != len(found):
        raise _damaged(where, "two of its records lie in one place")
    if "data.pkl" not in records:
        raise FormatError(f"{where} is not a file of torch.save: it is a zip without a data.pkl")
    return Archive(folder, records)


def _wide(extra: bytes, size: int, packed: int, place: int, where: str) -> tuple[int, int, int]:
    """Packed size, size and place, with those that do not fit into 32 bits from the record's extra fields."""
    numbers = [size, packed, place]
    wanted = [i for i, number in enumerate(numbers) if number == 0xFFFFFFFF]
    at = 0
    while wanted and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            if length < 8 * len(wanted) or at + 4 + length > len(extra):
                break
            for i, number in zip(wanted, struct.unpack_from(f"<{len(wanted)}Q", extra, at + 4), strict=True):
                numbers[i] = number
            return numbers[1], numbers[0], numbers[2]
        at += 4 + length
    if wanted:
        raise _damaged(where, "a record's size is not told")
    return packed, size, place


def record(found: Archive, name: str, where: str) -> Record:
    """One record, which must lie in the file as it is."""
    if name not in found.records:
        raise _damaged(where, f"it has no record {name[:100]!r}")
    one = found.records[name]
    if one.flags & _ENCRYPTED:
        raise FormatError(f"{where}: its record {one.name[:100]!r} is encrypted; save the model as safetensors")
    if one.method:
        raise FormatError(
            f"{where}: its record {one.name[:100]!r} is compressed, so that it cannot be read in ranges; torch.save "
            "does not compress: save the model again, best as safetensors"
        )
    if one.start + HEAD + len(one.name.encode()) + one.size > one.end:
        raise _damaged(where, f"its record {one.name[:100]!r} runs into what follows it")
    return one


def data_offset(one: Record, head: bytes, where: str) -> int:
    """Where a record's bytes start, from its head: ``HEAD`` bytes and the name."""
    name = one.name.encode()
    if len(head) != HEAD + len(name) or head[:4] != b"PK\x03\x04":
        raise _damaged(where, f"its record {one.name[:100]!r} is not where the directory says")
    _, _, flags, method, _, _, _, _, _, named, extra = _HEAD.unpack_from(head)
    if head[HEAD:] != name or named != len(name) or method or flags & _ENCRYPTED:
        raise _damaged(where, f"its record {one.name[:100]!r} is another one than the directory says")
    start: int = one.start + HEAD + named + extra
    if start + one.size > one.end:
        raise _damaged(where, f"its record {one.name[:100]!r} runs into what follows it")
    return start


def check_byteorder(text: bytes, where: str) -> None:
    """Refuse elements whose bytes stand in the other order."""
    if text != b"little":
        raise FormatError(
            f"{where} was saved on a big-endian machine ({text[:20]!r}), whose elements have their bytes in another "
            "order; convert it on such a machine, with safetensors' save_file"
        )


def views(table: object, key: str, where: str) -> dict[str, View]:
    """The tensors of a pickle's value, by name: a table of nothing else, as engines take it."""
    if type(table) is not dict:
        raise FormatError(f"{where} holds a {_kind(table)}, not a table of tensors by name; save the state_dict alone")
    found: dict[str, View] = {}
    for name, value in table.items():
        if isinstance(value, View):
            found[name] = value
        elif name in _NESTED and type(value) is dict:
            raise FormatError(
                f"{where} has its tensors under {name!r}, where engines do not look; take them out, in its folder: "
                + conversion(key, f"[{name!r}]")
            )
        else:
            raise FormatError(
                f"{where}: {name[:100]!r} is a {_kind(value)}, and engines take tables of nothing but tensors; keep "
                f"the tensors alone, in its folder: {conversion(key)}"
            )
    return found


def storages(found: Mapping[str, View], records: Archive, where: str) -> dict[str, Record]:
    """The record of each storage that tensors cite, long enough for it."""
    cited: dict[str, Storage] = {}
    lying: dict[str, Record] = {}
    for name, view in found.items():
        storage = view.storage
        if cited.setdefault(storage.key, storage) != storage:
            raise _damaged(where, f"the storage of tensor {name[:100]!r} has two types or sizes")
        if storage.key in lying:
            continue
        one = record(records, f"data/{storage.key}", where)
        if storage.dtype.nbytes(storage.count) > one.size:
            raise _damaged(where, f"the storage of tensor {name[:100]!r} is shorter than is said of it")
        lying[storage.key] = one
    return lying


def entries(found: Mapping[str, View], starts: Mapping[str, int], size: int, where: str) -> tuple[Entry, ...]:
    """The tensors as entries of their file, in the order of their bytes. ``starts``: of each storage's bytes.

    A tensor whose elements do not lie one after the other keeps its strides. Raises ``FormatError`` for one that takes
    elements outside of its storage or, other than by repeating it whole, an element twice.
    """
    made = []
    for name, view in found.items():
        item, shape = view.dtype.itemsize, view.shape
        count = _count(shape)
        reach = 1 + sum((n - 1) * s for n, s in zip(shape, view.strides, strict=True)) if count else 0
        if (view.offset + reach) * item > view.storage.dtype.nbytes(view.storage.count) and count:
            raise _damaged(where, f"tensor {name[:100]!r} takes elements beyond its storage")
        strides = _strides(view, name, where) if count else None
        start = starts[view.storage.key] + (view.offset * item if count else 0)
        made.append(Entry(name, view.dtype, shape, start, count * item, strides))
    total = sum(entry.nbytes for entry in made)
    if total > MAX_SHARED * size + MAX_EXPANDED:
        raise FormatError(f"{where} is not read: it has {size} bytes, of which its tensors would make {total}")
    return tuple(sorted(made, key=lambda entry: (entry.offset, entry.nbytes, entry.name)))


def _count(shape: Iterable[int]) -> int:
    """Elements of a shape. Factors are multiplied until there are too many to fit into any file."""
    count = 1
    for n in sorted(shape):  # 0 first
        count *= n
        if not count or count >= 1 << 63:
            break
    return count


def _strides(view: View, name: str, where: str) -> tuple[int, ...] | None:
    """The strides, None where the elements follow each other; dimensions of one index stand still."""
    whole = row_major(view.shape).strides
    if all(n == 1 or a == b for n, a, b in zip(view.shape, view.strides, whole, strict=True)):
        return None
    reach = 1
    moving = sorted((s, n) for n, s in zip(view.shape, view.strides, strict=True) if n > 1 and s)
    for stride, n in moving:
        if stride < reach:
            raise FormatError(
                f"{where}: tensor {name[:100]!r} overlaps itself (shape "
                f"{list(view.shape)}, strides {list(view.strides)}); make it contiguous before it is saved"
            )
        reach += stride * (n - 1)
    return tuple(0 if n == 1 else s for n, s in zip(view.shape, view.strides, strict=True))


def _kind(value: object) -> str:
    return {dict: "table", View: "tensor", str: "text", int: "number", float: "number"}.get(
        type(value), type(value).__name__
    )


def _text(name: bytes, where: str) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _damaged(where, "a record has a name that is not text") from None


def _damaged(where: str, why: str) -> FormatError:
    return FormatError(f"{where} is damaged: {why}; fetch it again")
