"""A store in memory: the model that the other stores are compared with, and a place for tests and examples.

It is the shortest thing that obeys every law of ``stores.base``: a dictionary under a lock, in which a commit is one
assignment. With ``unit`` it is as particular about slices as a multipart upload.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping

import xxhash

from shardtool.errors import AlreadyExists, FormatError, NotFound, StoreError, UsageError
from shardtool.stores.base import CheckedWriter, Object, Store, Unfinished, check_key, target


class MemoryStore(Store):
    """Objects in the memory of this process; ``unit`` is that of its writers, ``checksums``: whether it keeps one."""

    remote = False

    def __init__(self, uri: str = "memory://", *, unit: int = 0, checksums: bool = False) -> None:
        self.uri = uri
        self._unit = unit
        self._keeps = checksums
        self._objects: dict[str, bytes] = {}
        self._begun: dict[str, Unfinished] = {}
        self._names = map(str, itertools.count())
        self._lock = threading.Lock()

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The objects that are there now; what is committed while they are looked at is not among them."""
        with self._lock:
            found = [
                Object(key, len(data), str(id(data))) for key, data in self._objects.items() if key.startswith(prefix)
            ]
        return iter(sorted(found, key=lambda object: object.key))

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such object."""
        data = self._get(check_key(key))
        return Object(key, len(data), str(id(data)))

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Copy the object's bytes from ``start`` into ``view``."""
        memory = target(start, view)
        check_key(key)
        if not memory:
            return
        data = self._get(key)
        if start + len(memory) > len(data):
            raise FormatError(f"{self.locate(key)} ends at byte {len(data)}, before byte {start + len(memory)}")
        memory[:] = data[start : start + len(memory)]

    def create(self, key: str, size: int, *, exclusive: bool = False) -> _MemoryWriter:
        """Begin an object of exactly ``size`` bytes."""
        return _MemoryWriter(self, check_key(key), size, unit=self._unit, exclusive=exclusive)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is not an error."""
        with self._lock:
            self._objects.pop(check_key(key), None)

    def unit(self, size: int) -> int:
        """The unit that this store was made with."""
        return self._unit

    def checksums(self, key: str) -> Mapping[str, str]:
        """A digest of the content, if there shall be one."""
        return self._checksums(self._get(check_key(key)))

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """The objects of writers that have not ended, whether or not anybody still has them."""
        with self._lock:
            found = [left for left in self._begun.values() if left.key.startswith(prefix)]
        return iter(sorted(found, key=lambda left: left.key))

    def discard(self, left: Unfinished) -> None:
        """Forget what a writer has begun; it cannot be committed any more."""
        with self._lock:
            self._begun.pop(left.name, None)

    def _checksums(self, data: bytes) -> dict[str, str]:
        return {"xxh3_128": xxhash.xxh3_128_hexdigest(data)} if self._keeps else {}

    def _begin(self, key: str, size: int) -> str:
        with self._lock:
            name = next(self._names)
            self._begun[name] = Unfinished(key, name, time.time(), size)
            return name

    def _get(self, key: str) -> bytes:
        with self._lock:
            if key not in self._objects:
                raise NotFound(f"{self.locate(key)} does not exist")
            return self._objects[key]

    def _publish(self, key: str, name: str, data: bytes, *, exclusive: bool) -> None:
        with self._lock:
            if name not in self._begun:
                raise StoreError(f"what was written of {self.locate(key)} has been removed meanwhile: write it again")
            if exclusive and key in self._objects:
                raise AlreadyExists(f"{self.locate(key)} exists already: delete it or choose another name")
            self._objects[key] = data
            del self._begun[name]


class _MemoryWriter(CheckedWriter):
    def __init__(self, store: MemoryStore, key: str, size: int, *, unit: int, exclusive: bool) -> None:
        super().__init__(store.locate(key), size, unit=unit)
        self._store = store
        self._key = key
        self._exclusive = exclusive
        self._data = bytearray()
        self._whole = b""
        self._name = store._begin(key, size)

    def _write(self, data: memoryview) -> None:
        self._data += data

    def _commit(self) -> None:
        self._whole = bytes(self._data)
        self._data.clear()
        self._store._publish(self._key, self._name, self._whole, exclusive=self._exclusive)

    def _abort(self) -> None:
        self._data.clear()
        self._store.discard(Unfinished(self._key, self._name))

    def checksums(self) -> Mapping[str, str]:
        return self._store._checksums(self._whole)


_NAMED: dict[str, MemoryStore] = {}
_NAMING = threading.Lock()


def named(uri: str) -> MemoryStore:
    """The one store of this process at ``memory://name``; it lives as long as the process."""
    name = uri.partition("://")[2].rstrip("/")
    if not name:
        raise UsageError(f"{uri!r} names no store: write memory://name")
    with _NAMING:
        return _NAMED.setdefault(name, MemoryStore(f"memory://{name}"))
