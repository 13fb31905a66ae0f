"""The Python interface of Run:ai Model Streamer 0.17: code that uses it runs on shardtool when it imports this instead.

::

    from shardtool.integrations.runai import SafetensorsStreamer      # was: from runai_model_streamer import ...

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths, device="cpu")
        for name, tensor in streamer.get_tensors():
            ...

What differs, and is meant to:

* every tensor is the caller's, with ``owned=False`` too; no memory is used again while anybody looks at it;
* what was not taken is dropped when the next files are streamed, where Run:ai refuses; there is no ring of buffers;
* files of a shardtool checkpoint are checked against their digests on the way;
* a memory limit may be smaller than the largest tensor;
* a file in a bucket that is too short is found when it is opened, not when its end is reached;
* ``pull_files`` leaves no half files, and copies from folders too;
* addresses are those that shardtool has stores for.

Where Run:ai raises ``ValueError``, so does this: its errors are shardtool's own and ``ValueError`` at once. They name
what is wrong in Run:ai's words as well. ``RUNAI_STREAMER_*`` variables are read where ``SHARDTOOL_*`` say nothing.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from shardtool import settings
from shardtool.dtypes import DType
from shardtool.errors import UsageError
from shardtool.integrations.runai_streams import (
    DistributedStreamer,
    FileChunks,
    FileStreamer,
    S3Credentials,
    Stream,
    bounded,
    listed,
    opener,
    together,
    value_errors,
    within,
)
from shardtool.ops.files import copy, gathered, open_files
from shardtool.ops.pull import matching, patterns
from shardtool.segments import Item
from shardtool.stores import open_store
from shardtool.units import show_size

if TYPE_CHECKING:
    import torch

__all__ = [
    "DistributedStreamer",
    "FileChunks",
    "FileStreamer",
    "ObjectStorageModel",
    "Offsets",
    "S3Credentials",
    "SafetensorMetadata",
    "SafetensorsStreamer",
    "list_safetensors",
    "pull_files",
]

SAFETENSORS_PATTERN = "*.safetensors"
_OBJECT_STORAGE = ("s3://", "gs://", "az://")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offsets:
    """Where a tensor's bytes start and end, counted from the first tensor of its file."""

    start: int
    end: int

    def get_diff(self) -> int:
        """The number of bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class SafetensorMetadata:
    """What a file's header says about one tensor."""

    name: str
    shape: list[int]
    dtype: str
    offsets: Offsets

    @classmethod
    def of(cls, item: Item) -> SafetensorMetadata:
        """What is known of a tensor that was found. Raises ``UsageError`` if this torch has no such element type."""
        entry = item.entry
        entry.dtype.torch()
        start = entry.offset - item.file.header.data_offset
        return cls(entry.name, list(entry.shape), entry.dtype.name, Offsets(start, start + entry.nbytes))

    def get_bytesize(self) -> int:
        """Bytes of the tensor."""
        return self.offsets.get_diff()

    def get_item_count(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    def get_element_size(self) -> int:
        """Bytes of one element, as torch counts them."""
        return self.get_torch_dtype().itemsize

    def get_torch_dtype(self) -> torch.dtype:
        """The element type of torch."""
        return DType[self.dtype].torch()


class SafetensorsStreamer:
    """Streams the tensors of safetensors files, each to be had as soon as it is there.

    ``files_to_tensors_metadata``: for each file, by its number in the list, what its header says about the tensors that
    are streamed. ``total_size``: their bytes.
    """

    def __init__(self) -> None:
        self.files_to_tensors_metadata: dict[int, list[SafetensorMetadata]] = {}
        self.total_size = 0
        self.device_str: str | None = None
        self.start_time: float | None = None
        self.unaligned_copies = 0
        """Tensors that were copied because their type could not be read where they lay: none is put there."""
        self._stream: Stream | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def stream_file(
        self,
        path: str,
        s3_credentials: Any = None,
        device: str | torch.device | None = "cpu",
        is_distributed: bool = False,
        tensor_names: Collection[str] | None = None,
        owned: bool = True,
    ) -> None:
        """``stream_files`` for one file."""
        self.stream_files(
            [path],
            s3_credentials=s3_credentials,
            device=device,
            is_distributed=is_distributed,
            tensor_names=tensor_names,
            owned=owned,
        )

    def stream_files(
        self,
        paths: Sequence[str],
        s3_credentials: Any = None,
        device: str | torch.device | None = "cpu",
        is_distributed: bool = False,
        tensor_names: Collection[str] | None = None,
        owned: bool = True,
    ) -> None:
        """Open files, which may lie in different places, for ``get_tensors``. What was streamed before is dropped.

        ``tensor_names``: only these tensors; each must be in exactly one file. ``device``: where the tensors shall be;
        None is ``cpu``. ``is_distributed``: all ranks of a ``torch.distributed`` group call this for the same, and each
        byte is read by one of them if ``RUNAI_STREAMER_DIST`` is 1, or if it is not set (or auto) and the files are not
        on this machine. ``owned`` changes nothing: tensors are always the caller's. Raises ``ValueError`` for a file
        that is not there or damaged.
        """
        if isinstance(tensor_names, str):
            raise ValueError("tensor_names is a single str, not a collection of names: write {name}")
        if tensor_names is not None and not tensor_names:
            raise ValueError("tensor_names is empty: name the tensors, or leave it out to have all")
        self._close()
        self.device_str = "cpu" if device is None else str(device)
        self.start_time = time.monotonic()
        with (
            value_errors(),
            gathered([os.fspath(path) for path in paths], opener(s3_credentials)).closed_on_failure() as store,
            together(is_distributed, self.device_str, store) as exchange,
        ):
            files = open_files(store)
            items = files.items if tensor_names is None else _named(files.items, frozenset(tensor_names))
            self.files_to_tensors_metadata = {
                number: [SafetensorMetadata.of(item) for item in found] for number, found in enumerate(items)
            }
            found = [item for each in items for item in each]
            self.total_size = sum(item.entry.nbytes for item in found)
            self._stream = Stream(files.checkpoint, found, self.device_str, exchange=exchange)

    def get_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the tensor of everything that ``stream_files`` opened, in the order in which it comes.

        Raises ``ValueError`` for what cannot be read and for damage that a digest shows.
        """
        if self._stream is None:
            return
        with value_errors():
            yield from self._stream
        self._close()
        self._log_throughput()

    def _log_throughput(self) -> None:
        if self.start_time is None:
            return
        seconds = time.monotonic() - self.start_time
        _logger.info(
            "Streamed %s of %d files to %s in %.2f s, %s/s",
            show_size(self.total_size),
            len(self.files_to_tensors_metadata),
            self.device_str,
            seconds,
            show_size(int(self.total_size / max(seconds, 1e-9))),
        )

    def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def _named(items: tuple[tuple[Item, ...], ...], names: frozenset[str]) -> tuple[tuple[Item, ...], ...]:
    """The tensors of these names. Raises ``UsageError`` for one that is in no file, or in several."""
    kept = tuple(tuple(item for item in found if item.name in names) for found in items)
    count = Counter(item.name for found in kept for item in found)
    if missing := sorted(names - count.keys()):
        raise UsageError(f"tensor_names not found in the files: {missing}")
    if twice := sorted(name for name, n in count.items() if n > 1):
        raise UsageError(f"tensor_names has tensors that are in more than one file: {twice}")
    return kept


def list_safetensors(path: str, s3_credentials: Any = None) -> list[str]:
    """The safetensors files that lie right in a folder, as whole addresses; none where there is no such path."""
    with value_errors():
        if "://" not in path:
            try:
                with os.scandir(path) as entries:
                    some = bounded(entries, path)
                    names = sorted(entry.name for entry in some if entry.is_file() and entry.name[0] != ".")
            except (FileNotFoundError, NotADirectoryError):
                return []
            return [os.path.join(path, name) for name in names if fnmatch(name, SAFETENSORS_PATTERN)]
        with opener(s3_credentials)(path) as store:
            return [
                store.locate(found.key)
                for found in listed(store)
                if "/" not in found.key and fnmatch(found.key, SAFETENSORS_PATTERN)
            ]


def pull_files(
    model_path: str,
    dst: str,
    allow_pattern: Collection[str] | None = None,
    ignore_pattern: Collection[str] | None = None,
    s3_credentials: Any = None,
) -> None:
    """Copy a folder of files, with the folders in it, to ``dst``; each file appears there when it is whole.

    A pattern is matched with a file's name below ``model_path`` and with its whole key in the bucket; ``*`` stands for
    slashes too. ``allow_pattern``: only what one of these matches; ``ignore_pattern``: nothing that one of these does.
    The memory limit of the environment holds. Raises ``ValueError`` for what cannot be read, and for a pattern that is
    not in a list.
    """
    with value_errors(), opener(s3_credentials)(model_path) as source, open_store(os.path.abspath(dst)) as to:
        above = source.locate("").partition("://")[2].partition("/")[2] if "://" in source.uri else ""

        allowed, ignored = patterns(allow_pattern, "allow_pattern"), patterns(ignore_pattern, "ignore_pattern")

        def matches(key: str, given: Collection[str]) -> bool:
            return matching(key, given) or matching(above + key, given)

        wanted = [
            found
            for found in listed(source)
            if (allowed is None or matches(found.key, allowed)) and not (ignored and matches(found.key, ignored))
        ]
        within(partial(copy, source, to, wanted, concurrency=settings.concurrency(None)))


class ObjectStorageModel:
    """Brings files of a bucket into a folder once, however many processes of this machine ask for it at a time.

    The first process copies while the others wait for its lock (``dst`` + ``.lock``); they find the mark that it leaves
    and copy nothing. Without the mark, what is in ``dst`` is left from a copy that was interrupted, and is removed
    first. Use as a context: the mark is made at its end, unless something was raised. Folders on network file systems
    are locked within one machine only.
    """

    SENTINEL_NAME: ClassVar[str] = ".runai_complete"

    def __init__(self, model_path: str, dst: str, s3_credentials: Any = None) -> None:
        if not model_path.startswith(_OBJECT_STORAGE):
            raise ValueError(f"model_path {model_path!r} is not in an object storage: write s3://bucket/folder")
        self.dir = dst.rstrip("/") or "/"
        with value_errors():
            _expect_expendable(self.dir)
        self._model_path = model_path if model_path.endswith("/") else f"{model_path}/"
        self._s3_credentials = s3_credentials
        self._sentinel = os.path.join(self.dir, self.SENTINEL_NAME)
        self._lock_file = open(f"{self.dir}.lock", "a")  # noqa: SIM115 - as long as this object lives
        try:
            self._skip = self._locked()
        except BaseException:
            self._lock_file.close()
            raise

    def _locked(self) -> bool:
        """Whether the files are there already. If not, this process alone may copy them."""
        fcntl.flock(self._lock_file, fcntl.LOCK_SH)
        if os.path.exists(self._sentinel):
            return True
        # Two that would turn a shared lock into an exclusive one would wait for each other.
        fcntl.flock(self._lock_file, fcntl.LOCK_UN)
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        if os.path.exists(self._sentinel):
            fcntl.flock(self._lock_file, fcntl.LOCK_SH)
            return True
        if os.path.exists(self.dir):
            shutil.rmtree(self.dir)
        os.makedirs(self.dir)
        return False

    def pull_files(
        self, allow_pattern: Collection[str] | None = None, ignore_pattern: Collection[str] | None = None
    ) -> None:
        """``pull_files`` into the folder, unless the files are there already."""
        if not self._skip:
            pull_files(self._model_path, self.dir, allow_pattern, ignore_pattern, self._s3_credentials)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._skip:
                if not any(name != self.SENTINEL_NAME for name in os.listdir(self.dir)):
                    raise RuntimeError(f"nothing was copied to {self.dir}: check the address {self._model_path}")
                try:
                    with open(self._sentinel, "w"):
                        pass
                except OSError as failure:
                    raise RuntimeError(f"the mark {self._sentinel} could not be made: {failure}") from failure
        finally:
            self._lock_file.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock_file"):  # a closed file has no lock
            self._lock_file.close()


def _expect_expendable(folder: str) -> None:
    """Refuse to empty a folder that this process, or its user, lives in."""
    real = os.path.realpath(folder)
    for home in (os.getcwd(), os.path.expanduser("~")):
        if os.path.commonpath((real, os.path.realpath(home))) == real:
            raise UsageError(f"dst {folder!r} is emptied before anything is copied, and {home} is there: name another")
