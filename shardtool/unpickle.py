"""A pickle of tensors, read as the untrusted text that it is: a small machine of its own that runs nothing.

It takes the instructions that torch's ``weights_only`` loader takes, and of the names that a pickle can call for only
those of which a table of tensors is made; they become the inert values below, whatever is installed. There is no
import, no class and no call that is not in this file. Every count is bounded: instructions, depth and stack.

::

    Storage     a run of elements that lies in the file beside the pickle, under a key
    View        a tensor: elements of a storage
    Name        a class or function that the pickle calls for; only those of ``NAMES`` are let in
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardtool.dtypes import DType
from shardtool.errors import FormatError

MAX_STEPS = 1 << 23
"""Instructions that a pickle may have; a tensor takes about 40."""
MAX_DEPTH = 64
"""Tuples, lists and tables that may be open at a time."""
MAX_STACK = 1 << 16
"""Values that may wait to be put into one."""
MAX_DIMS = 64

STORAGES = {
    "torch.BoolStorage": DType.BOOL,
    "torch.ByteStorage": DType.U8,
    "torch.CharStorage": DType.I8,
    "torch.ShortStorage": DType.I16,
    "torch.HalfStorage": DType.F16,
    "torch.BFloat16Storage": DType.BF16,
    "torch.IntStorage": DType.I32,
    "torch.FloatStorage": DType.F32,
    "torch.ComplexFloatStorage": DType.C64,
    "torch.DoubleStorage": DType.F64,
    "torch.LongStorage": DType.I64,
    "torch.storage.UntypedStorage": DType.U8,
    "torch.UntypedStorage": DType.U8,
}
DTYPES = {f"torch.{dtype.torch_name}": dtype for dtype in DType if dtype.torch_name and dtype.bits % 8 == 0}
CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
FUNCTIONS = (
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
)
NAMES = frozenset((*STORAGES, *DTYPES, *CLASSES, *FUNCTIONS))


@dataclass(frozen=True, slots=True)
class Name:
    """A class or a function, by its name alone."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """``count`` elements of ``dtype`` that lie beside the pickle under ``key``."""

    key: str
    dtype: DType
    count: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: elements of a storage; ``offset`` and ``strides`` are counted in elements of ``dtype``.

    The numbers are sizes; whether they lie in the storage is for the reader to check.
    """

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def loads(data: bytes, where: str) -> object:
    """The value that a pickle describes: tables, lists, tuples, numbers, texts and the values above.

    Raises ``FormatError`` with one sentence that names ``where``.
    """
    machine = _Machine(data, where)
    try:
        return machine.run()
    except (IndexError, KeyError, ValueError, struct.error):
        raise FormatError(f"{where} is damaged: its pickle makes no sense at byte {machine.at}") from None


class _Machine:
    def __init__(self, data: bytes, where: str) -> None:
        self.data = data
        self.at = 0
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        operations = _OPERATIONS
        for _ in range(MAX_STEPS):
            code = self.data[self.at]
            self.at += 1
            if code == _STOP:
                (value,) = self.stack
                return value
            operation = operations.get(code)
            if operation is None:
                raise FormatError(
                    f"{self.where}: its pickle has the instruction {code:#04x}, which torch's weights-only loader does "
                    "not take either; save the model as safetensors"
                )
            operation(self)
            if len(self.stack) > MAX_STACK:
                raise self.refused(f"puts more than {MAX_STACK} values into one")
        raise self.refused(f"has more than {MAX_STEPS} instructions")

    def refused(self, what: str) -> FormatError:
        return FormatError(f"{self.where} is not read: its pickle {what}")

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) < count:
            raise ValueError("the pickle ends too early")
        self.at += count
        return found

    def byte(self) -> int:
        found = self.data[self.at]
        self.at += 1
        return found

    def number(self, code: str, width: int) -> Any:
        (found,) = struct.unpack(code, self.take(width))
        return found

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end]
        self.at = end + 1
        return text.decode()

    # what the instructions do

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        """The last value, which must have come after the last mark."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the pickle takes a value that is not there")
        return self.stack.pop()

    def top(self) -> Any:
        """The same, which stays."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the pickle looks at a value that is not there")
        return self.stack[-1]

    def mark(self) -> None:
        if len(self.marks) == MAX_DEPTH:
            raise self.refused(f"nests more than {MAX_DEPTH} deep")
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def last(self, count: int) -> None:
        """The last values become a tuple."""
        found = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(found)))

    def put(self, at: int) -> None:
        self.memo[at] = self.top()

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise ValueError("only lists are appended to")
        target.extend(items)

    def set(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise ValueError("only tables have items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # others could be made to hash for ever
                raise self.refused(f"names something by a value of type {type(key).__name__} instead of a text")
            target[key] = value

    def named(self) -> None:
        name = f"{self.line()}.{self.line()}"
        if name not in NAMES:
            raise self.refused(
                f"calls for {name[:100]!r}, of which no table of tensors is made; nothing of it was run, save the "
                "model as safetensors"
            )
        self.stack.append(Name(name))

    def stored(self) -> None:
        """A storage, which the pickle calls persistent."""
        match self.pop():
            case "storage", Name() as kind, str() as key, _, int() as count if kind.name in STORAGES and _size(count):
                self.stack.append(Storage(key, STORAGES[kind.name], count))
            case _:
                raise self.refused("refers to something outside of it that is not a storage of plain elements")

    def build(self) -> None:
        """Attributes of a table (the versions of its modules), which say nothing about its tensors."""
        self.pop()
        if type(self.top()) is not dict:
            raise self.refused("gives attributes to something that is not a table")

    def call(self) -> None:
        arguments, what = self.pop(), self.pop()
        self.stack.append(self.made(what, arguments))

    def made(self, what: object, arguments: object) -> object:
        """What a function of ``NAMES`` would return."""
        if type(what) is not Name or type(arguments) is not tuple:
            raise ValueError("only names are called")
        match what.name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                return {}
            case "Size", (tuple() as size,):
                return size
            case "_rebuild_tensor", (Storage() as storage, offset, size, strides):
                return self.view(storage, storage.dtype, offset, size, strides)
            case "_rebuild_tensor_v2", (Storage() as storage, offset, size, strides, _, _, *metadata):
                self.plain(metadata)
                return self.view(storage, storage.dtype, offset, size, strides)
            case "_rebuild_tensor_v3", (Storage() as storage, offset, size, strides, _, _, Name() as kind, *metadata):
                self.plain(metadata)
                return self.view(storage, DTYPES[kind.name], offset, size, strides)
            case ("_rebuild_parameter", (View() as view, _, _)) | (
                "_rebuild_parameter_with_state",
                (View() as view, _, _, _),
            ):
                return view
            case "_rebuild_from_type_v2", (Name() as function, Name() as kind, tuple() as rest, _):
                if kind.name in CLASSES and function != what:
                    return self.made(function, rest)
        raise self.refused(f"calls {what.name!r} in a way that gives no tensor")

    def plain(self, metadata: list[Any]) -> None:
        """Refuse tensors whose values are not those of their storage (conjugate, negative)."""
        if len(metadata) > 1 or any(not isinstance(m, dict | None) or (m and any(m.values())) for m in metadata):
            raise self.refused("has a tensor whose values differ from what is stored (conjugated or negated)")

    def view(self, storage: Storage, dtype: DType, offset: Any, shape: Any, strides: Any) -> View:
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise ValueError("a tensor has no shape")
        if len(shape) > MAX_DIMS or not all(map(_size, (offset, *shape, *strides))):
            raise ValueError("a tensor has a shape, strides or an offset that are not sizes")
        return View(storage, dtype, offset, shape, strides)


def _size(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 63


def _text(machine: _Machine) -> None:
    machine.push(machine.take(machine.number("<I", 4)).decode())


def _long(machine: _Machine) -> None:
    count = machine.byte()
    if count > 8:
        raise ValueError("a number of more than 8 bytes is no size")
    machine.push(int.from_bytes(machine.take(count), "little", signed=True))


def _one(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set([key, value])


_STOP = ord(".")
# fmt: off
_OPERATIONS: dict[int, Callable[[_Machine], object]] = {ord(code): operation for code, operation in {
    "\x80": lambda m: m.take(1),                          # PROTO
    "c":    _Machine.named,                               # GLOBAL
    "R":    _Machine.call,                                # REDUCE
    "b":    _Machine.build,                               # BUILD
    "Q":    _Machine.stored,                              # BINPERSID
    "(":    _Machine.mark,                                # MARK
    "t":    lambda m: m.push(tuple(m.since_mark())),      # TUPLE
    ")":    lambda m: m.push(()),                         # EMPTY_TUPLE
    "\x85": lambda m: m.last(1),                          # TUPLE1
    "\x86": lambda m: m.last(2),                          # TUPLE2
    "\x87": lambda m: m.last(3),                          # TUPLE3
    "]":    lambda m: m.push([]),                         # EMPTY_LIST
    "a":    lambda m: m.extend([m.pop()]),                # APPEND
    "e":    lambda m: m.extend(m.since_mark()),           # APPENDS
    "}":    lambda m: m.push({}),                         # EMPTY_DICT
    "s":    _one,                                         # SETITEM
    "u":    lambda m: m.set(m.since_mark()),              # SETITEMS
    "N":    lambda m: m.push(None),                       # NONE
    "\x89": lambda m: m.push(False),                      # NEWFALSE
    "\x88": lambda m: m.push(True),                       # NEWTRUE
    "J":    lambda m: m.push(m.number("<i", 4)),          # BININT
    "K":    lambda m: m.push(m.byte()),                   # BININT1
    "M":    lambda m: m.push(m.number("<H", 2)),          # BININT2
    "\x8a": _long,                                        # LONG1
    "G":    lambda m: m.push(m.number(">d", 8)),          # BINFLOAT
    "X":    _text,                                        # BINUNICODE
    "U":    lambda m: m.push(m.take(m.byte())),           # SHORT_BINSTRING
    "h":    lambda m: m.push(m.memo[m.byte()]),           # BINGET
    "j":    lambda m: m.push(m.memo[m.number("<I", 4)]),  # LONG_BINGET
    "q":    lambda m: m.put(m.byte()),                    # BINPUT
    "r":    lambda m: m.put(m.number("<I", 4)),           # LONG_BINPUT
}.items()}
# fmt: on
