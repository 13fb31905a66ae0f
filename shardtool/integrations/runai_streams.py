"""The lower half of Run:ai's interface: how its callers reach storage, what they get raised, and streams of bytes.

::

    S3Credentials, opener    what opens a folder or a bucket, as a caller and the environment say
    listed                   what lies in a folder
    within                   something under the memory limit of the environment
    value_errors             shardtool's errors become ``ValueError`` too, in Run:ai's words as well
    Stream                   tensors under way, which may be left and gone on with
    together                 ranks that stream the same, each byte read by one of them
    FileStreamer             any ranges of files as tensors of bytes; ``DistributedStreamer`` is the same
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from shardtool import settings
from shardtool.checkpoint import MAX_OBJECTS, Checkpoint, WeightFile
from shardtool.dtypes import DType
from shardtool.errors import BudgetTooSmall, ShardtoolError, StoreError, UsageError
from shardtool.exchange import Exchange, wanted
from shardtool.header import Entry, Header
from shardtool.ops.files import gathered
from shardtool.ops.load import handed
from shardtool.ops.pull import matching, patterns
from shardtool.ops.stream import Fresh
from shardtool.segments import Item
from shardtool.stores import open_store
from shardtool.stores.base import Object, Store
from shardtool.stores.s3.store import Access, S3Store

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_LOOKING = 16  # files that are looked up at once
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class S3Credentials:
    """What to reach a bucket with; what is None is left to boto3's settings. Run:ai's own objects will do as well."""

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region_name: str | None = None
    endpoint: str | None = None


def opener(credentials: Any) -> Callable[[str], Store]:
    """What opens a folder or a bucket, as the credentials and the environment say."""

    def opened(uri: str) -> Store:
        if not uri.lower().startswith("s3://"):
            return open_store(uri)
        access = Access(
            access_key_id=getattr(credentials, "access_key_id", None),
            secret_access_key=getattr(credentials, "secret_access_key", None),
            session_token=getattr(credentials, "session_token", None),
            region=getattr(credentials, "region_name", None),
            endpoint=getattr(credentials, "endpoint", None) or settings.s3_endpoint(),
            unsigned=settings.s3_unsigned(),
            addressing=settings.s3_addressing(),
        )
        return S3Store(f"s3{uri[2:]}", access=access)

    return opened


def listed(store: Store) -> list[Object]:
    """What lies in a folder and the folders in it. Raises ``UsageError`` for more than any checkpoint has."""
    return bounded(store.list(), store.uri)


def bounded(found: Iterable[T], where: str) -> list[T]:
    """What a folder holds. Raises ``UsageError`` for more than any checkpoint has."""
    some = list(itertools.islice(found, MAX_OBJECTS + 1))
    if len(some) > MAX_OBJECTS:
        raise UsageError(f"{where} holds more than {MAX_OBJECTS} files: name a folder that holds one model")
    return some


def within(begin: Callable[..., T], memory_limit: int | None = None) -> T:
    """What ``begin`` makes within a memory limit, which is the environment's if none is given.

    Run:ai counts its buffers alone, so that limits are in use that are smaller than what anything needs: then the least
    that does is taken, with a warning.
    """
    try:
        return begin(memory_limit=settings.memory_limit(None) if memory_limit is None else memory_limit)
    except BudgetTooSmall as error:
        _logger.warning("%s; this much is taken", error)
        return begin(memory_limit=0)


class Stream:
    """Tensors under way: everything that is iterated over is handed out once, in as many loops as it takes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        found: Sequence[Item],
        device: str,
        *,
        memory_limit: int | None = None,
        exchange: Exchange | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._store = checkpoint.store
        self._exchange = exchange
        self._before = before
        begin = partial(
            handed,
            checkpoint,
            found,
            device,
            concurrency=settings.concurrency(None),
            order="ready",
            exchange=exchange,
        )
        self._tensors = within(begin, memory_limit)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        before, self._before = self._before, None
        if before is not None:
            try:
                before()
            except BaseException as error:
                if self._exchange is not None:
                    self._exchange.fail(error)
                raise
        return map(_same, self._tensors)  # nothing closes a map, and it keeps no tensor

    def close(self) -> None:
        """Drop what is still under way, and close the files."""
        self._tensors.close()  # type: ignore[attr-defined]  # it is a generator
        if self._exchange is not None:
            self._exchange.close()
        self._store.close()


def _same(pair: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    return pair


@contextmanager
def together(is_distributed: bool, device: str, store: Store) -> Iterator[Exchange | None]:
    """The exchange of ranks that stream the same, or None for one that streams alone.

    Ranks exchange nothing unless the caller says so, and then as the environment says; by default, what does not lie on
    this machine. What fails inside ends the other ranks too.
    """
    said = settings.distributed(None)
    if not is_distributed or not wanted("auto" if said is None else said, store):
        yield None
        return
    exchange = Exchange(
        scope=settings.distributed_scope(), device=Fresh(device).device, timeout=settings.distributed_timeout()
    )
    try:
        yield exchange
    except BaseException as error:
        exchange.fail(error)
        raise


class FileChunks:
    """Ranges of one file: ``sizes`` bytes at ``offsets``, in any order. ``id`` is told with each of them."""

    def __init__(self, id: int, path: str, offsets: list[int], sizes: list[int]) -> None:
        if len(offsets) != len(sizes):
            raise ValueError(f"{len(offsets)} offsets and {len(sizes)} sizes do not fit: give one of each per range")
        self.id = id
        self.path = path
        self.offsets = offsets
        self.sizes = sizes

    @staticmethod
    def contiguous(id: int, path: str, offset: int, sizes: list[int]) -> FileChunks:
        """Ranges of these sizes, one behind the other from ``offset`` on."""
        return FileChunks(id, path, list(itertools.accumulate(sizes, initial=offset))[:-1], sizes)

    def total_size(self) -> int:
        """Bytes of all ranges."""
        return sum(self.sizes)

    def max_chunk_size(self) -> int:
        """Bytes of the largest range."""
        return max(self.sizes)

    def __repr__(self) -> str:
        return f"FileChunks(id={self.id!r}, path={self.path!r}, ranges={len(self.sizes)}, bytes={self.total_size()})"


def _expect_inside(store: Store, found: Sequence[Item]) -> None:
    """Refuse ranges that do not lie in their files, before there is memory for them."""
    ends: dict[str, int] = {}
    for item in found:
        entry = item.entry
        if min(entry.offset, entry.nbytes) < 0:
            raise UsageError(
                f"{item.name} of {store.locate(item.file.key)} has {entry.nbytes} bytes from {entry.offset} on: "
                "neither can be negative"
            )
        ends[item.file.key] = max(ends.get(item.file.key, 0), entry.offset + entry.nbytes)
    with ThreadPoolExecutor(_LOOKING, thread_name_prefix="shardtool-stat") as pool:
        for key, size in zip(ends, pool.map(lambda key: store.stat(key).size, ends), strict=True):
            if ends[key] > size:
                raise StoreError(f"{store.locate(key)} ends at byte {size}, before byte {ends[key]}")


class _Ranges:
    """Streams ranges of files, each to be had as soon as it is there, as a tensor of bytes."""

    def __init__(self) -> None:
        self.device_str: str | None = None
        self._stream: Stream | None = None
        self._ranges: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _take_up(
        self,
        requests: Sequence[FileChunks],
        credentials: Any,
        device: str | torch.device | None,
        *,
        memory_limit: int | None = None,
        is_distributed: bool = False,
    ) -> None:
        """Drop what was streamed before, and begin with these."""
        self._close()
        self.device_str = "cpu" if device is None else str(device)
        with (
            value_errors(),
            gathered(
                [os.fspath(request.path) for request in requests], opener(credentials)
            ).closed_on_failure() as store,
            together(is_distributed, self.device_str, store) as exchange,
        ):
            self._ranges = {}
            found = []
            for request, key in zip(requests, store.keys, strict=True):
                file = WeightFile(key, 0, Header((), {}, 0))
                for index, (offset, size) in enumerate(zip(request.offsets, request.sizes, strict=True)):
                    name = f"range {index} of {request.id}"
                    self._ranges[name] = (request.id, index)
                    found.append(Item(name, file, Entry(name, DType.U8, (1, size), offset, size), None))
            ranges = Checkpoint(store.uri, store, "ranges", ())
            self._stream = Stream(
                ranges,
                found,
                self.device_str,
                memory_limit=memory_limit,
                exchange=exchange,
                before=partial(_expect_inside, store, found),
            )

    def ring_info(self) -> tuple[int, int, int] | None:
        """What Run:ai tells of its ring of buffers: None, as there is no ring here."""
        return None

    def get_chunks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield the file's id, the number of its range and the bytes of shape [1, n], in the order in which they come.

        Raises ``ValueError`` for what cannot be read.
        """
        if self._stream is not None:
            with value_errors():
                yield from map(self._numbered, self._stream)

    def _numbered(self, pair: tuple[str, torch.Tensor]) -> tuple[int, int, torch.Tensor]:
        return (*self._ranges[pair[0]], pair[1])

    def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


class FileStreamer(_Ranges):
    """Streams ranges of files, each to be had as soon as it is there, as a tensor of bytes."""

    def stream_files(
        self,
        file_stream_requests: Sequence[FileChunks],
        credentials: Any = None,
        device: str | torch.device | None = "cpu",
        memory_limit: int | None = None,
        owned: bool = True,
    ) -> None:
        """Take up ranges for ``get_chunks``; their files may lie in different places. What was streamed is dropped.

        ``device``: where the tensors shall be; None is ``cpu``. ``memory_limit``: bytes, for reading ahead. ``owned``
        changes nothing: tensors are the caller's.
        """
        self._take_up(file_stream_requests, credentials, device, memory_limit=memory_limit)

    def list_files(
        self,
        prefix: str,
        is_recursive: bool = True,
        allow_patterns: Sequence[str] | None = None,
        ignore_patterns: Sequence[str] | None = None,
    ) -> list[tuple[str, int]]:
        """The files of a folder and their bytes.

        Patterns are matched with names below the folder; ``*`` stands for slashes too. Raises ``ValueError`` for a
        folder of this machine that is not there, and for a pattern that is not in a list.
        """
        with value_errors(), opener(None)(prefix) as store:
            allowed = patterns(allow_patterns, "allow_patterns")
            ignored = patterns(ignore_patterns, "ignore_patterns") or ()
            return [
                (store.locate(found.key), found.size)
                for found in listed(store)
                if (is_recursive or "/" not in found.key)
                and (allowed is None or matching(found.key, allowed))
                and not matching(found.key, ignored)
            ]


class DistributedStreamer(_Ranges):
    """``FileStreamer`` for processes that stream the same together."""

    def stream_files(
        self,
        file_stream_requests: Sequence[FileChunks],
        credentials: Any,
        device: str | torch.device | None,
        is_distributed: bool,
        owned: bool = True,
    ) -> None:
        """``FileStreamer.stream_files``. ``is_distributed``: as in ``SafetensorsStreamer``."""
        self._take_up(file_stream_requests, credentials, device, is_distributed=is_distributed)


@contextmanager
def value_errors() -> Iterator[None]:
    """Errors of shardtool become errors that are ``ValueError`` too."""
    try:
        yield
    except ShardtoolError as error:
        message = str(error) + "".join(f" [{words}]" for words in _words(str(error)))
        raise _value_error(type(error), message) from error


def _value_error(kind: type[ShardtoolError], message: str) -> ShardtoolError:
    """An error of this kind that is a ``ValueError`` too, in other processes as well."""
    if issubclass(kind, ValueError):
        return kind(message)
    named = {"__doc__": kind.__doc__, "__reduce__": lambda error: (_value_error, (kind, str(error)))}
    made: ShardtoolError = type(kind.__name__, (kind, ValueError), named)(message)
    return made


def _mismatch(found: re.Match[str]) -> str:
    shape = [int(n) for n in re.findall(r"\d+", found[1])]
    claimed = math.prod(shape) * DType[found[2]].bits // 8
    return f"Shape claims {claimed} bytes ({shape} x {found[2]}), but offsets reserve {found[3]} bytes"


_WORDS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"its header would be \d+ bytes, more than", lambda found: "header size exceeds limit"),
    (r"its header is not JSON", lambda found: "header is not valid JSON"),
    (r"of shape \[([\d, ]*)\] and (\w+) cannot have (\d+) bytes", _mismatch),
    (r"overlaps the tensor before it", lambda found: "a tensor overlaps with next tensor"),
    (r"has the unknown dtype '(\w+)'", lambda found: f"Unsupported dtype '{found[1]}'"),
    (r"it ends too early", lambda found: "file is truncated"),
    (r"it has bytes that belong to no tensor", lambda found: "extra trailing bytes"),
    (r"leaves a hole before it", lambda found: "gap before the start of a tensor"),
)
"""What shardtool says about a damaged file, and how Run:ai's streamer puts it, for those who look for its words."""


def _words(message: str) -> Iterator[str]:
    for pattern, words in _WORDS:
        if found := re.search(pattern, message):
            yield words(found)
