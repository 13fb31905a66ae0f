"""A store that breaks another as a script says: what fails in production fails here at a chosen call.

::

    FaultyStore(inner, {("readinto", 3): Raise(Unavailable("cut"))})                  the third read
    FaultyStore(inner, lambda call: Flip(0) if call.key.endswith(".json") else None)  whatever the call looks like
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from shardtool.errors import FormatError, UsageError
from shardtool.stores.base import Buffer, Object, Store, WrappedWriter, Wrapper, Writer, octets


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a ``FaultyStore``: the ``number``-th of its operation, from 1; offset and size where it has them."""

    operation: str
    key: str
    number: int
    offset: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Raise:
    """The call raises ``error``: instead of happening, or with ``after`` when it has happened, like a lost answer."""

    error: BaseException
    after: bool = False


@dataclass(frozen=True, slots=True)
class Truncate:
    """Only the first ``keep`` bytes are there: of what is read (an error, as it must be), of a size, or of a write."""

    keep: int


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of what is read or written is wrong: the ``bit``-th, counted around when there are fewer."""

    bit: int


Fault = Raise | Truncate | Flip
Script = Mapping[tuple[str, int], Fault] | Callable[[Call], Fault | None]


class FaultyStore(Wrapper):
    """A store that fails as a script says: a mapping of ``(operation, number)``, or a function of the call.

    The operations are those of ``CountingStore``. ``Raise`` can happen to each, ``Truncate`` to ``readinto``, ``stat``
    and ``write``, ``Flip`` to ``readinto`` and ``write``. ``calls`` has every call in order.
    """

    def __init__(self, inner: Store, script: Script) -> None:
        super().__init__(inner)
        self.calls: list[Call] = []
        self._script = script
        self._numbers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def list(self, prefix: str = "") -> Iterator[Object]:
        """Pass on, or fail."""
        fault = self._fault("list", prefix)
        found = self.inner.list(prefix)
        _raise_after(fault)
        return found

    def stat(self, key: str) -> Object:
        """Pass on, fail, or give a smaller size."""
        fault = self._fault("stat", key)
        found = self.inner.stat(key)
        _raise_after(fault)
        return Object(key, min(found.size, fault.keep)) if isinstance(fault, Truncate) else found

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Pass on, fail, end sooner, or give one wrong bit."""
        memory = octets(view)
        fault = self._fault("readinto", key, start, len(memory))
        if isinstance(fault, Truncate) and fault.keep < len(memory):
            self.inner.readinto(key, start, memory[: fault.keep])
            raise FormatError(
                f"{self.locate(key)} ends at byte {start + fault.keep}, before byte {start + len(memory)}"
            )
        self.inner.readinto(key, start, memory)
        _raise_after(fault)
        if isinstance(fault, Flip):
            _flip(memory, fault.bit)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> Writer:
        """Pass on, or fail; what happens to the writer is in the script too."""
        fault = self._fault("create", key, 0, size)
        writer = self.inner.create(key, size, exclusive=exclusive)
        if isinstance(fault, Raise):
            writer.abort()
        _raise_after(fault)
        return _FaultyWriter(self, key, writer)

    def delete(self, key: str) -> None:
        """Pass on, or fail."""
        fault = self._fault("delete", key)
        self.inner.delete(key)
        _raise_after(fault)

    def _fault(self, operation: str, key: str, offset: int = 0, size: int = 0) -> Fault | None:
        """What is to happen to this call; raises what is to be raised instead of it."""
        with self._lock:
            self._numbers[operation] += 1
            call = Call(operation, key, self._numbers[operation], offset, size)
            self.calls.append(call)
        script = self._script
        fault = script(call) if callable(script) else script.get((operation, call.number))
        possible = {"readinto": (Raise, Truncate, Flip), "write": (Raise, Truncate, Flip), "stat": (Raise, Truncate)}
        if fault is not None and not isinstance(fault, possible.get(operation, (Raise,))):
            raise UsageError(f"{type(fault).__name__} cannot happen to {operation}: choose another fault")
        if isinstance(fault, Raise) and not fault.after:
            raise fault.error
        return fault


class _FaultyWriter(WrappedWriter):
    def __init__(self, store: FaultyStore, key: str, inner: Writer) -> None:
        super().__init__(inner)
        self._store = store
        self._key = key

    def write(self, offset: int, view: Buffer) -> None:
        data = octets(view)
        fault = self._store._fault("write", self._key, offset, len(data))
        if isinstance(fault, Truncate):
            data = octets(bytes(data[: fault.keep]).ljust(len(data), b"\0"))
        elif isinstance(fault, Flip):
            data = octets(bytearray(data))
            _flip(data, fault.bit)
        super().write(offset, data)
        _raise_after(fault)

    def commit(self) -> None:
        fault = self._store._fault("commit", self._key)
        super().commit()
        _raise_after(fault)

    def abort(self) -> None:
        fault = self._store._fault("abort", self._key)
        super().abort()
        _raise_after(fault)


def _raise_after(fault: Fault | None) -> None:
    if isinstance(fault, Raise):
        raise fault.error


def _flip(memory: memoryview, bit: int) -> None:
    if memory:
        byte, place = divmod(bit % (8 * len(memory)), 8)
        memory[byte] ^= 1 << place
