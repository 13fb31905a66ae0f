"""What a store is: objects of bytes under one URI. It knows nothing of tensors.

Laws (``shardtool.testing.StoreContract`` checks them for every store):

* a key is a relative path of non-empty segments joined by ``/``; ``.`` and ``..`` are refused;
* an object is visible whole or not at all: nothing is visible before ``Writer.commit``;
* an object has exactly the size it was created with, and 0 is a size;
* an object is never changed in place: a second ``create`` of a key replaces it at commit, unless it is ``exclusive``;
* of many exclusive writers of one key at most one commits; the others get ``AlreadyExists`` and change nothing (a
  store that cannot promise it for writers that meet says so: ``conditional`` is False);
* ``readinto`` fills the whole view or raises; an empty view is full already;
* ``list`` yields whole keys in plain string order and nothing that is not committed;
* what a killed writer left is seen by ``unfinished`` alone, and ``discard`` removes it;
* every method may be called from many threads; one ``Writer`` is used by one thread at a time.

::

    Store ── create ──> Writer ── write* ── commit | abort
      │                   └── CheckedWriter    holds its caller to the law; stores derive from it
      └── list  stat  readinto  delete         a store brings these five; exists, get and put are made of them
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from shardtool.errors import FormatError, NotFound, StoreError, UsageError

Buffer = memoryview | bytearray | bytes
_VERSIONS = 10  # replaced under a reader this often, a small object is not read to its end


class Replaced(StoreError):
    """An object is not any more in the version in which it was seen."""


@dataclass(frozen=True, slots=True)
class Object:
    """One object of a store: its key and its size in bytes.

    ``version`` changes when the object does, if the store can tell (a time of change, an ETag); it does not make two
    objects differ.
    """

    key: str
    size: int
    version: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What a writer that never ended left in a store: invisible to readers, but it takes room.

    ``name`` tells two of one key apart (the id of an upload, the name of a temporary file); ``since``: when it was
    begun, in seconds since 1970, or 0 if the store cannot tell; ``size``: its bytes so far, or -1 likewise.
    """

    key: str
    name: str
    since: float = 0.0
    size: int = -1


class Writer(ABC):
    """Writes one object from front to back; the object appears when ``commit`` returns.

    ``unit`` is 0 when any slices may be written. Otherwise each slice but the last must be ``unit`` bytes or more
    (a part of a multipart upload), and the caller gathers them.
    """

    unit: int = 0

    @abstractmethod
    def write(self, offset: int, view: Buffer) -> None:
        """Write ``view`` at ``offset``, the sum of what was written before. The view is free again on return."""

    @abstractmethod
    def commit(self) -> None:
        """Make the object durable and visible. Raises ``AlreadyExists`` when it was to be exclusive and lost."""

    @abstractmethod
    def abort(self) -> None:
        """Drop what was written; may be called at any time, more than once, and after ``commit`` does nothing."""

    def checksums(self) -> Mapping[str, str]:
        """After ``commit``: what ``Store.checksums`` will say of the object as it was written. Asks nobody."""
        return {}


class WrappedWriter(Writer):
    """A writer over another, which passes everything on."""

    def __init__(self, inner: Writer) -> None:
        self.unit = inner.unit
        self.inner = inner

    def write(self, offset: int, view: Buffer) -> None:
        """Pass on."""
        self.inner.write(offset, view)

    def commit(self) -> None:
        """Pass on."""
        self.inner.commit()

    def abort(self) -> None:
        """Pass on."""
        self.inner.abort()

    def checksums(self) -> Mapping[str, str]:
        """Pass on."""
        return self.inner.checksums()


class CheckedWriter(Writer):
    """A writer that holds its caller to the law, so that a store only says what becomes of the bytes.

    ``_write`` gets the slices in order, never an empty one; ``_commit`` is called when all bytes are there; ``_abort``
    is called once at most and never after a commit that succeeded. A breach of the law is a ``UsageError``.
    """

    def __init__(self, where: str, size: int, *, unit: int = 0) -> None:
        if size < 0:
            raise UsageError(f"{where} cannot be {size} bytes long: give a size of 0 or more")
        self.unit = unit
        self._where = where
        self._size = size
        self._written = 0
        self._state = "open"

    def write(self, offset: int, view: Buffer) -> None:
        """Write the next slice. A slice that failed spoils the object: all that is left is ``abort``."""
        data = octets(view)
        end = offset + len(data)
        self._expect_open()
        if offset != self._written:
            raise UsageError(f"{self._where} is written in order: the next offset is {self._written}, not {offset}")
        if end > self._size:
            raise UsageError(f"{self._where} was created with {self._size} bytes, so no bytes up to {end} fit in")
        if len(data) < self.unit and end != self._size:
            raise UsageError(
                f"{self._where} takes slices of {self.unit} bytes or more but for the last, not {len(data)}"
            )
        if data:
            self._state = "failed"
            self._write(data)
            self._state = "open"
        self._written = end

    def commit(self) -> None:
        """Make the object durable and visible. A commit that failed is not tried again: what is left is ``abort``."""
        self._expect_open()
        if self._written != self._size:
            raise UsageError(f"{self._where} was created with {self._size} bytes but only {self._written} were written")
        self._state = "failed"
        self._commit()
        self._state = "committed"

    def abort(self) -> None:
        """Drop what was written."""
        if self._state in ("open", "failed"):
            self._state = "aborted"
            self._abort()

    def _expect_open(self) -> None:
        if self._state != "open":
            raise UsageError(
                f"the writer of {self._where} has {self._state} and takes no more calls: create another one"
            )

    @abstractmethod
    def _write(self, data: memoryview) -> None:
        """Take the next bytes, at ``self._written``."""

    @abstractmethod
    def _commit(self) -> None:
        """Publish the object."""

    @abstractmethod
    def _abort(self) -> None:
        """Drop the bytes."""


class Store(ABC):
    """Objects under one URI."""

    uri: str
    remote: bool = True
    """Whether bytes come over a network, so that ranks which want the same ones had better read them once."""
    conditional: bool = True
    """Whether of exclusive writers that meet at most one wins. Where a store cannot tell, the last one wins."""
    writable: bool = True
    """Whether anything can be written. Where not, ``create`` and ``delete`` are a ``UsageError``."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Object]:
        """All objects whose key starts with ``prefix``, in the order of their keys, folders descended into."""

    @abstractmethod
    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such object."""

    @abstractmethod
    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the object's bytes from ``start``. An object that ends sooner is a ``FormatError``."""

    @abstractmethod
    def create(self, key: str, size: int, *, exclusive: bool = False) -> Writer:
        """Begin an object of exactly ``size`` bytes."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is not an error."""

    def borrow(self, key: str) -> mmap.mmap:
        """The object as memory, nothing of which is copied. Raises ``UsageError`` where there is no such thing.

        Whoever writes into it writes into copies of its pages.
        """
        raise UsageError(f"{self.locate(key)} cannot be borrowed: only files of this machine can; leave borrow out")

    def unit(self, size: int) -> int:
        """The ``Writer.unit`` of an object of ``size`` bytes, to plan memory before anything is created."""
        return 0

    def held(self, size: int) -> int:
        """Bytes of memory that the ``Writer`` of an object of ``size`` bytes takes for itself, to plan memory too."""
        return 0

    def admit(self, key: str, size: int, begins: bytes) -> None:  # noqa: B027 - most stores keep whatever it is
        """Raise ``UsageError`` where such an object, that begins so, cannot be kept: before anything is sent."""

    def reading(self, threads: int) -> int:
        """Bytes of memory that ``readinto`` takes for itself while so many threads are in it, to plan memory too."""
        return 0

    def checksums(self, key: str) -> Mapping[str, str]:
        """What the store itself keeps of an object's content, without reading it: algorithm -> value, or nothing.

        Two equal values of one algorithm mean equal bytes (``crc64nvme``, ``crc32c``, ``md5``: of the whole object, in
        hexadecimal; ``etag``: as the store makes it). Raises ``NotFound``.
        """
        return {}

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """What writers that were killed, or whose abort failed, left of objects whose key starts with ``prefix``.

        Writers that are at work now are among them: only their age tells.
        """
        return iter(())

    def discard(self, left: Unfinished) -> None:  # noqa: B027 - a store that leaves nothing need not override it
        """Remove what ``unfinished`` found; what is not there any more is not an error.

        If a writer was at work after all, its commit fails.
        """

    @contextmanager
    def closed_on_failure(self) -> Iterator[Self]:
        """Close the store if what follows fails; otherwise it stays open for whoever gets it."""
        try:
            yield self
        except BaseException:
            self.close()
            raise

    def close(self) -> None:  # noqa: B027 - a store without resources need not override it
        """Give back connections and files."""

    # what follows is made of the above

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self.stat(key)
        except NotFound:
            return False
        return True

    def get(self, key: str, *, limit: int) -> bytes:
        """A small object whole: one version, whichever it is. One over ``limit`` bytes is refused before it is read."""
        for _ in range(_VERSIONS):
            try:
                return self._seen(key, limit)
            except Replaced:
                continue
        return self._seen(key, limit)

    def _seen(self, key: str, limit: int) -> bytes:
        size = self.stat(key).size
        if size > limit:
            raise FormatError(f"{self.locate(key)} is {size} bytes, more than the {limit} that such a file may have")
        data = bytearray(size)
        self.readinto(key, 0, memoryview(data))
        return bytes(data)

    def put(self, key: str, data: Buffer, *, exclusive: bool = False) -> None:
        """A small object in one go."""
        writer = self.create(key, memoryview(data).nbytes, exclusive=exclusive)
        try:
            writer.write(0, data)
            writer.commit()
        finally:
            writer.abort()

    def place(self) -> str:
        """A name that two stores share when they are the same place, as far as can be told."""
        return self.uri.rstrip("/")

    def locate(self, key: str) -> str:
        """How people are told where an object is."""
        return f"{self.uri.rstrip('/')}/{key}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_key(name: str) -> bool:
    """Whether a name says where an object is inside a store, and nothing else."""
    return not ("\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")))


def check_key(key: str) -> str:
    """The key itself, or ``UsageError`` if it could leave the store or name no object."""
    if not is_key(key):
        raise UsageError(
            f"{key!r} is not a name inside a checkpoint: use a relative path without '.', '..' or backslashes"
        )
    return key


def octets(view: Buffer) -> memoryview:
    """The same memory as single bytes, whatever its items and shape were; it must be contiguous."""
    memory = memoryview(view)
    return memory.cast("B") if memory.nbytes else memoryview(bytearray())


def target(start: int, view: memoryview) -> memoryview:
    """The memory that ``readinto`` is to fill, as single bytes; ``UsageError`` where nothing can be read into it."""
    if start < 0:
        raise UsageError(f"bytes are counted from 0, so nothing can be read from {start}")
    if view.readonly:
        raise UsageError("the memory to read into is read-only: give a writable view")
    return octets(view)


class Wrapper(Store):
    """A store over another, which passes everything on. Middleware overrides what it is about."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.uri = inner.uri
        self.remote = inner.remote
        self.writable = inner.writable

    @property
    def conditional(self) -> bool:  # type: ignore[override]  # what a server ignores may show at its first commit only
        """Pass on."""
        return self.inner.conditional

    def list(self, prefix: str = "") -> Iterator[Object]:
        """Pass on."""
        return self.inner.list(prefix)

    def stat(self, key: str) -> Object:
        """Pass on."""
        return self.inner.stat(key)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Pass on."""
        self.inner.readinto(key, start, view)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> Writer:
        """Pass on."""
        return self.inner.create(key, size, exclusive=exclusive)

    def delete(self, key: str) -> None:
        """Pass on."""
        self.inner.delete(key)

    def borrow(self, key: str) -> mmap.mmap:
        """Pass on."""
        return self.inner.borrow(key)

    def unit(self, size: int) -> int:
        """Pass on."""
        return self.inner.unit(size)

    def held(self, size: int) -> int:
        """Pass on."""
        return self.inner.held(size)

    def admit(self, key: str, size: int, begins: bytes) -> None:
        """Pass on."""
        self.inner.admit(key, size, begins)

    def reading(self, threads: int) -> int:
        """Pass on."""
        return self.inner.reading(threads)

    def checksums(self, key: str) -> Mapping[str, str]:
        """Pass on."""
        return self.inner.checksums(key)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """Pass on."""
        return self.inner.unfinished(prefix)

    def discard(self, left: Unfinished) -> None:
        """Pass on."""
        self.inner.discard(left)

    def place(self) -> str:
        """Pass on."""
        return self.inner.place()

    def locate(self, key: str) -> str:
        """Pass on."""
        return self.inner.locate(key)

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()
