"""Single files, wherever each of them lies: opened together as one checkpoint, and copied from store to store.

::

    gathered       addresses of files -> Files, and nothing is looked up yet
    Files          a store: objects of several folders or buckets, for reading
    open_files     a checkpoint over all of them, and the tensors of each
    copy           objects of a store into another, each whole or not at all

A file in a folder with a manifest that lists it is checked against its digests, like the rest of that checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from shardtool import digest, manifest
from shardtool.budget import PAGE, limit_of
from shardtool.checkpoint import Checkpoint, WeightFile, parted, read_header
from shardtool.errors import AccessDenied, FormatError, NotFound, StoreError, TensorMismatch, UsageError
from shardtool.manifest import FileRecord
from shardtool.ops.limits import reading
from shardtool.segments import Item
from shardtool.stores import open_store
from shardtool.stores.address import scheme_of
from shardtool.stores.base import Object, Store, Writer, check_key

BLOCK = digest.CHUNK
"""Bytes that are copied at a time, at most."""
LEAST = 64 << 10
"""Bytes that are copied at a time, at least."""
UNLIMITED = 1 << 40
_HEADER_READERS = 16


class Files(Store):
    """Objects of several stores under keys of their own, for reading only. It closes these stores."""

    writable = False

    def __init__(self, places: dict[str, tuple[Store, str]]) -> None:
        self.uri = "1 file" if len(places) == 1 else f"{len(places)} files"
        self.keys = list(places)
        self._places = places
        self.stores = list({id(store): store for store, _ in places.values()}.values())
        self.remote = any(store.remote for store in self.stores)

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The files whose key starts with ``prefix``, in the order of their keys."""
        return (self.stat(key) for key in sorted(self._places) if key.startswith(prefix))

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such file."""
        store, inner = self.place_of(key)
        found = store.stat(inner)
        return Object(key, found.size, found.version)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view`` from the file of this key."""
        store, inner = self.place_of(key)
        store.readinto(inner, start, view)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> NoReturn:
        """Refused: these files are only read."""
        raise UsageError(f"{self.locate(key)} is open for reading and is not replaced")

    def delete(self, key: str) -> None:
        """Refused: these files are only read."""
        raise UsageError(f"{self.locate(key)} is open for reading and is not removed")

    def reading(self, threads: int) -> int:
        """What the most demanding of the stores takes."""
        return max((store.reading(threads) for store in self.stores), default=0)

    def locate(self, key: str) -> str:
        """Where the file lies."""
        if key not in self._places:
            return super().locate(key)
        store, inner = self._places[key]
        return store.locate(inner)

    def close(self) -> None:
        """Close the stores."""
        for store in self.stores:
            store.close()

    def place_of(self, key: str) -> tuple[Store, str]:
        """The store that a file lies in, and its key there."""
        if key not in self._places:
            raise NotFound(f"{check_key(key)} is none of {self.uri}")
        return self._places[key]


@dataclass(frozen=True, slots=True)
class OpenedFiles:
    """Files with their headers. ``items``: the tensors of each file, in the order of the files and of their bytes."""

    checkpoint: Checkpoint
    items: tuple[tuple[Item, ...], ...]


def gathered(paths: Sequence[str], opener: Callable[[str], Store] = open_store) -> Files:
    """A store over single files, with a key for each in their order. Nothing is looked up yet.

    ``opener``: opens a file's folder.
    """
    stores: dict[str, Store] = {}
    places: dict[str, tuple[Store, str]] = {}
    try:
        for i, path in enumerate(paths):
            folder, name = parted(path, scheme_of(path))
            if folder not in stores:
                stores[folder] = opener(folder)
            places[f"{i}/{check_key(name)}"] = (stores[folder], name)
    except BaseException:
        for opened in stores.values():
            opened.close()
        raise
    return Files(places)


def open_files(store: Files) -> OpenedFiles:
    """Read the headers of safetensors files, which may have tensors of the same names.

    Raises ``NotFound``, and ``FormatError`` for a damaged header.
    """
    with ThreadPoolExecutor(_HEADER_READERS, thread_name_prefix="shardtool-headers") as pool:
        listed = dict(zip(store.stores, pool.map(_records, store.stores), strict=True))

        def one(key: str) -> tuple[WeightFile, tuple[Item, ...]]:
            inner, name = store.place_of(key)
            return _opened(store, key, listed[inner].get(name))

        found = list(pool.map(one, store.keys))
    checkpoint = Checkpoint(store.uri, store, "huggingface", tuple(file for file, _ in found))
    return OpenedFiles(checkpoint, tuple(items for _, items in found))


def _records(store: Store) -> dict[str, FileRecord]:
    """What a manifest beside the files says about them. Without one, or where nobody may look for it: nothing."""
    try:
        data = store.get(manifest.KEY, limit=manifest.MAX_BYTES)
    except (NotFound, AccessDenied):  # S3 denies what is not there to those who may not list
        return {}
    where = store.locate(manifest.KEY)
    try:
        return {record.key: record for record in manifest.decode(data, where).files}
    except FormatError as error:
        raise FormatError(
            f"{error}; it says what the files beside it shall be: restore it, or remove it to read them unchecked"
        ) from None


def _opened(store: Store, key: str, record: FileRecord | None) -> tuple[WeightFile, tuple[Item, ...]]:
    """One file and its tensors, with their digests if there is a record."""
    size = store.stat(key).size
    file = WeightFile(key, size, read_header(store, key, size, record.header if record else None))
    entries = file.header.entries
    if record is None:
        return file, tuple(Item(entry.name, file, entry, None) for entry in entries)
    chunks = {tensor.name: tensor.digest.chunks for tensor in record.tensors}
    counts = {entry.name: -(-entry.nbytes // digest.CHUNK) for entry in entries}
    if size != record.size or counts != {name: len(found) for name, found in chunks.items()}:
        raise TensorMismatch(
            f"{store.locate(key)} does not hold what the manifest beside it lists; run shardtool verify"
        )
    return file, tuple(Item(entry.name, file, entry, chunks[entry.name]) for entry in entries)


@dataclass(frozen=True, slots=True)
class Copying:
    """How a copy keeps within its limit: so many blocks are read ahead, and one more is written."""

    threads: int
    block: int


def copying(
    source: Store, to: Store, objects: Sequence[Object], concurrency: int | None, memory_limit: int | str | None
) -> Copying:
    """Blocks of 8 MiB and as many readers as the limit has room for beside what the stores take; or smaller blocks.

    Raises ``BudgetTooSmall`` with the bytes that would do.
    """
    unit = max((to.unit(thing.size) for thing in objects), default=0)
    held = max((to.held(thing.size) for thing in objects), default=0)
    least, most = max(unit, LEAST), max(unit, BLOCK)
    limit = limit_of(memory_limit, least=held + 2 * least, what=f"a copy of {source.uri}", most=UNLIMITED)
    how = reading(limit - held, concurrency, source)
    spare = limit - held - how.held
    most = max(least, min(most, how.longest))
    blocks = spare // most
    if blocks < 2:
        return Copying(1, max(least, spare // 2 // PAGE * PAGE))
    return Copying(min(how.threads, blocks - 1), most)


def copy(
    source: Store,
    to: Store,
    objects: Iterable[Object],
    *,
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    done: Callable[[Object], None] = lambda _: None,
) -> None:
    """Bring objects into another store, each visible when it is whole, with buffers within the memory limit.

    ``done`` is told of each object as soon as it is there. Raises ``StoreError`` for an object that is replaced
    meanwhile, and ``BudgetTooSmall``.
    """
    wanted = list(objects)
    how = copying(source, to, wanted, concurrency, memory_limit)
    size, threads = how.block, how.threads
    parts = ((thing, at) for thing in wanted for at in (range(0, thing.size, size) or (0,)))
    ahead: deque[tuple[Object, int, Future[NDArray[np.uint8]]]] = deque()
    writer: Writer | None = None

    def read(thing: Object, at: int) -> NDArray[np.uint8]:
        block = np.empty(min(size, thing.size - at), np.uint8)
        source.readinto(thing.key, at, block.data)
        return block

    with ThreadPoolExecutor(threads, thread_name_prefix="shardtool-copy") as pool:
        try:
            while True:
                while len(ahead) < threads and (part := next(parts, None)):
                    ahead.append((*part, pool.submit(read, *part)))
                if not ahead:
                    return
                thing, at, block = ahead.popleft()
                if writer is None:
                    writer = to.create(thing.key, thing.size)
                writer.write(at, block.result().data)
                if at + size >= thing.size:
                    if at and source.stat(thing.key).version != thing.version:
                        raise StoreError(f"{source.locate(thing.key)} was replaced while it was read: start again")
                    writer.commit()
                    writer = None
                    done(thing)
        finally:
            if writer is not None:
                writer.abort()
            for _, _, block in ahead:
                block.cancel()
