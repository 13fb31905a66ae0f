"""``safe_open`` and ``load_file``: any checkpoint in the shape of the safetensors library.

::

    safe_open ──> Opened ── keys  offset_keys  metadata
                     ├── get_tensor   get_tensors    whole: every chunk is checked against its digest, if it has one
                     └── get_slice ──> Slice[...]    only what the index asks for is read

Of a slice these bytes are read: rows that are next to each other, as one range. A column, a step, or anything else
that leaves gaps: gaps up to 64 KiB are read over, in blocks of up to 8 MiB, and larger ones are left out. Of a list or
an array of indices: from the smallest to the largest. Chunks (8 MiB of a tensor) that are read in one piece are checked
against their digests; those of which a slice takes a part cannot be.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeGuard

import numpy as np
from numpy.typing import NDArray

from shardtool.checkpoint import KINDS, Checkpoint, WeightFile, read_header
from shardtool.errors import NotFound, UsageError
from shardtool.ops.gather import Octets, gather
from shardtool.ops.limits import readers
from shardtool.ops.load import handed, load
from shardtool.ops.rank import chosen, items, number, opened
from shardtool.ops.stream import Fresh
from shardtool.segments import Item
from shardtool.stores import Address, Store, open_store
from shardtool.window import Window, row_major

if TYPE_CHECKING:
    import torch

FRAMEWORKS = {"pt": "pt", "torch": "pt", "pytorch": "pt", "np": "np", "numpy": "np"}
BACKENDS = ("mmap", "pread")
"""The ways to read that the safetensors library offers; here tensors are read in one way, whatever is asked."""


def load_file(
    filename: Address, device: str | int = "cpu", *, backend: str = "mmap", rank: int | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of a file, a folder or an address by name, as ``safetensors.torch.load_file`` gives those of a file.

    ``rank``: which shard, where there are several. Digests are checked if there is a manifest. ``backend`` is taken as
    safetensors takes it and changes nothing. Each process reads for itself; ``load`` lets the ranks of a group read
    together.
    """
    _expect_backend(backend)
    if _is_file(filename):
        with safe_open(filename, device=device, rank=rank) as found:
            return found.get_tensors()
    return load(filename, rank=rank, device=_device(device), distributed=False)


def safe_open(
    filename: Address,
    framework: str = "pt",
    device: str | int = "cpu",
    *,
    backend: str = "mmap",
    rank: int | None = None,
    pattern: str | None = None,
    verify: bool = True,
    concurrency: int | None = None,
) -> Opened:
    """Open a file, a folder or an address for single tensors and slices, as ``safetensors.safe_open`` opens a file.

    A file of this machine is a safetensors file whatever it is called, unless its name ends in ``.bin``.
    ``framework``: ``pt`` for torch tensors, ``np`` for numpy arrays (which needs no torch). ``rank``: which shard,
    where there are several. ``verify``: check the digests of chunks that are read as a whole, if there is a manifest.
    ``concurrency``: how many parts of one tensor are read at once. ``backend`` is taken as safetensors takes it and
    changes nothing. What is handed out belongs to the caller.
    """
    _expect_backend(backend)
    kind = FRAMEWORKS.get(str(framework))
    where = _device(device)
    if kind is None:
        raise UsageError(f"framework={framework!r} is not offered; write pt for torch tensors or np for numpy arrays")
    if kind == "np" and where != "cpu":
        raise UsageError(f"device={device!r}: numpy arrays are in this machine's memory; leave the device out")
    if kind == "pt":
        found = Fresh(where).device
        where = "cpu" if found.type == "cpu" else str(found)
    readers(concurrency)  # refused before anything is opened
    checkpoint = _single(filename, rank) if _is_file(filename) else opened(filename, rank, pattern)
    with checkpoint.store.closed_on_failure():
        number = chosen(checkpoint, rank)
        return Opened(checkpoint, number, items(checkpoint, number, verify=verify), kind, where, concurrency)


class Opened:
    """A checkpoint, or a rank of one, of which single tensors and slices can be had. From ``safe_open``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        rank: int | None,
        found: list[Item],
        framework: str,
        device: str,
        concurrency: int | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._rank = rank
        self._items = {item.name: item for item in found}
        self._framework = framework
        self._device = device
        self._concurrency = concurrency
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Lock()
        self._closed = False

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._open())

    def offset_keys(self) -> list[str]:
        """The names of the tensors in the order of their bytes, file by file."""
        return list(self._open())

    def __contains__(self, name: object) -> bool:
        return name in self._open()

    def metadata(self) -> dict[str, str] | None:
        """What the headers say beside the tensors, or None. Of several files: what no two of them say differently."""
        self._open()
        found: dict[str, str] = {}
        differ: set[str] = set()
        for file in self._checkpoint.files:
            for key, value in file.header.metadata.items() if file.rank == self._rank else ():
                if found.setdefault(key, value) != value:
                    differ.add(key)
        return {key: value for key, value in found.items() if key not in differ} or None

    def get_tensor(self, name: str) -> Any:
        """One tensor whole. Raises ``NotFound`` for a name that is not there and ``ChecksumMismatch`` for damage."""
        item = self._item(name)
        return self._made(item, _whole(item), _shape(item))

    def get_tensors(self) -> dict[str, Any]:
        """Every tensor by name, in the order of their bytes."""
        if self._framework == "np":
            return {name: self.get_tensor(name) for name in self.offset_keys()}
        found = list(self._open().values())
        return dict(handed(self._checkpoint, found, self._device, concurrency=self._concurrency))

    def get_slice(self, name: str) -> Slice:
        """A tensor of which only what is indexed is read. Raises ``NotFound`` for a name that is not there."""
        return Slice(self, self._item(name))

    def close(self) -> None:
        """Close the files and connections; nothing can be read after that."""
        with self._lock:
            pool, self._pool, self._closed = self._pool, None, True
        if pool is not None:
            pool.shutdown()
        self._checkpoint.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._checkpoint.store.close()

    def _open(self) -> Mapping[str, Item]:
        if self._closed:
            raise UsageError(f"{self._checkpoint.uri} was closed: use it inside the with statement that opens it")
        return self._items

    def _item(self, name: str) -> Item:
        found = self._open().get(name)
        if found is None:
            raise NotFound(f"{self._checkpoint.uri} has no tensor {name!r}")
        return found

    def _threads_for_parts(self) -> ThreadPoolExecutor:
        with self._lock:
            self._open()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(readers(self._concurrency), thread_name_prefix="shardtool-open")
            return self._pool

    def _made(self, item: Item, window: Window, shape: tuple[int, ...]) -> Any:
        """A window's elements as what the framework calls a tensor; a type that it lacks is refused before reading."""
        if self._framework == "np":
            code = _numpy(item)
            return self._gathered(item, window).view(code).reshape(shape)
        import torch

        kind = item.entry.dtype.torch()
        if not window.size:
            return torch.empty(shape, dtype=kind, device=self._device)
        found = torch.from_numpy(self._gathered(item, window)).view(kind).view(shape)
        return found if self._device == "cpu" else found.to(self._device)

    def _gathered(self, item: Item, window: Window) -> Octets:
        return gather(self._checkpoint.store, item, window, _size(item), self._threads_for_parts)


class Slice:
    """A tensor of a file: ``[...]`` reads a part of it, indexed as torch and numpy index. From ``Opened.get_slice``."""

    def __init__(self, opened: Opened, item: Item) -> None:
        self._opened = opened
        self._item = item

    def get_shape(self) -> list[int]:
        """The sizes of the whole tensor."""
        return list(self._item.entry.shape)

    def get_dtype(self) -> str:
        """The element type as safetensors files name it, such as ``BF16``."""
        return self._item.entry.dtype.name

    def __getitem__(self, index: Any) -> Any:
        """The part that an index names.

        Integers, slices with steps of 1 or more, ``...``, ``None``, and lists or arrays of integers or truth values.
        Raises ``IndexError`` for what lies outside, and ``ValueError`` for a step below 1.
        """
        window, then = _narrowed(_whole(self._item), index)
        found = self._opened._made(self._item, window, window.shape)
        if all(isinstance(one, slice) for one in then):
            return found
        if self._opened._framework == "pt":
            import torch

            then = tuple(torch.from_numpy(one) if isinstance(one, np.ndarray) else one for one in then)
        return found[(*then, ...)]  # the ellipsis keeps an array of no dimensions an array


def _is_file(filename: Address) -> TypeGuard[str | os.PathLike[str]]:
    """Whether this is a file of this machine whose name does not say what it is, as in the cache of a hub."""
    if isinstance(filename, Store):
        return False
    path = os.fspath(filename)
    return not path.endswith(KINDS) and "://" not in path and os.path.isfile(path)


def _single(filename: str | os.PathLike[str], rank: int | None) -> Checkpoint:
    """One safetensors file, whatever it is called."""
    number(rank, "rank")
    path = os.fspath(filename)
    folder, name = os.path.split(path)
    with open_store(folder or ".").closed_on_failure() as store:
        size = store.stat(name).size
        return Checkpoint(path, store, "huggingface", (WeightFile(name, size, read_header(store, name, size)),))


def _expect_backend(backend: object) -> None:
    if backend not in BACKENDS:
        raise UsageError(f"backend={backend!r} is not offered; leave it out, or write {' or '.join(BACKENDS)}")


def _device(device: object) -> str:
    """A device as text; safetensors takes a number for a GPU, and torch has a type for it."""
    return f"cuda:{device}" if isinstance(device, int) and not isinstance(device, bool) else str(device)


def _shape(item: Item) -> tuple[int, ...]:
    """The shape that frameworks know: torch packs two elements that are narrower than a byte into one of its own."""
    shape, bits = item.entry.shape, item.entry.dtype.bits
    if bits % 8 == 0:
        return shape
    if not shape or shape[-1] * bits % 8:
        raise UsageError(f"tensor {item.name!r} has elements of {bits} bits that do not fill the bytes of a row")
    return (*shape[:-1], shape[-1] * bits // 8)


def _size(item: Item) -> int:
    """Bytes of one element, as frameworks count them."""
    return max(1, item.entry.dtype.bits // 8)


def _whole(item: Item) -> Window:
    """All elements where they lie, counted from the first."""
    shape = _shape(item)
    return row_major(shape) if item.entry.strides is None else Window(0, shape, item.entry.strides)


def _numpy(item: Item) -> np.dtype[Any]:
    """The numpy type. Those that numpy does not have by itself are there when ``ml_dtypes`` was imported."""
    dtype = item.entry.dtype
    try:
        return np.dtype(dtype.torch_name)
    except TypeError:
        raise UsageError(
            f"numpy has no type for tensor {item.name!r} of {dtype.name}; import ml_dtypes first, or use framework='pt'"
        ) from None


def _narrowed(window: Window, index: Any) -> tuple[Window, tuple[Any, ...]]:
    """What to read of a tensor for an index, and what is then left to do: an index on what was read.

    The second has a slice for each dimension that needs nothing more.
    """
    given = index if isinstance(index, tuple) else (index,)
    rank = len(window.shape)
    used = sum(map(_dimensions, given))
    if used > rank:
        raise IndexError(f"too many indices for a tensor of {rank} dimensions")
    then: list[Any] = []
    dim = 0
    for one in _expanded(given, rank - used):
        if one is None or isinstance(one, bool | np.bool_):
            then.append(one)
            continue
        if isinstance(one, slice):
            start, stop, step = one.indices(window.shape[dim]) if _step(one) > 0 else (0, 0, 0)
            if not step:
                raise ValueError("the step of a slice must be 1 or more")
            window = window.narrow(dim, start, len(range(start, stop, step)), step)
            then.append(slice(None))
        elif _is_array(one):
            array = np.asarray(one)
            if array.dtype == bool:
                _expect_mask(array, window.shape[dim : dim + array.ndim])
                then.append(array)
                dim += array.ndim
                continue
            window, rest = _hull(window, dim, array)
            then.append(rest)
        else:
            window = window.narrow(dim, _inside(_integer(one), window.shape[dim]), 1)
            then.append(0)
        dim += 1
    return window, tuple(then)


def _expanded(given: Sequence[Any], missing: int) -> Iterator[Any]:
    """The index with a slice for each dimension that an ellipsis, or nothing, stands for."""
    ellipses = [i for i, one in enumerate(given) if isinstance(one, EllipsisType)]
    if len(ellipses) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    at = ellipses[0] if ellipses else len(given)
    yield from given[:at]
    yield from (slice(None) for _ in range(missing))
    yield from given[at + 1 :]


def _dimensions(one: Any) -> int:
    """How many dimensions of the tensor an element of an index is about."""
    if one is None or isinstance(one, EllipsisType | bool | np.bool_):
        return 0
    if _is_array(one):
        array = np.asarray(one)
        return array.ndim if array.dtype == bool else 1
    return 1


def _is_array(one: Any) -> bool:
    return isinstance(one, list | tuple | range) or getattr(one, "ndim", 0) > 0


def _integer(one: Any) -> int:
    try:
        return operator.index(one)
    except TypeError:
        raise IndexError(
            f"only integers, slices, '...', None and lists or arrays of integers are indices, not {one!r:.40}"
        ) from None


def _step(one: slice) -> int:
    return 1 if one.step is None else _integer(one.step)


def _inside(index: int, n: int) -> int:
    if not -n <= index < n:
        raise IndexError(f"index {index} is out of bounds for a dimension of {n}")
    return index % n


def _hull(window: Window, dim: int, array: NDArray[Any]) -> tuple[Window, NDArray[np.int64]]:
    """The rows from the first to the last that an array of indices names, and where these are among them."""
    if array.size and array.dtype.kind not in "iu":
        raise IndexError(f"only integers and truth values are indices, not {array.dtype}")
    if not array.size:
        return window.narrow(dim, 0, 0), np.zeros(array.shape, np.int64)
    n = window.shape[dim]
    _inside(int(array.min()), n)
    _inside(int(array.max()), n)
    rows = np.where(array < 0, array + n, array).astype(np.int64)
    first = int(rows.min())
    return window.narrow(dim, first, int(rows.max()) - first + 1), rows - first


def _expect_mask(array: NDArray[np.bool_], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise IndexError(f"truth values of shape {list(array.shape)} do not fit dimensions of {list(shape)}")
