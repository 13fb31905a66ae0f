"""Tensors that callers get: filled chunk by chunk, each chunk checked against its digest by the thread that read it.

A tensor in this machine's memory lends itself to the engine, so that bytes are read straight into it. Any other
destination (a GPU, a parameter that is not contiguous) is reached through the step's block and a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock

import torch

from shardtool import digest
from shardtool.budget import Gate, anonymous
from shardtool.dtypes import DType
from shardtool.errors import ChecksumMismatch
from shardtool.schedule import Tile
from shardtool.sinks.lane import Release
from shardtool.window import Window, join, simplify

Ready = Callable[["TensorSink"], None]
MAPPED = 128 << 10
"""Bytes from which on a tensor has a mapping of its own, which ends with it. The heap would keep much of what it gets
back from tensors of different sizes."""


def empty(dtype: DType, shape: tuple[int, ...], nbytes: int) -> torch.Tensor:
    """An uninitialised tensor that owns its memory. A big one lies on huge pages."""
    kind = dtype.torch()
    if nbytes < MAPPED:
        flat = torch.empty(nbytes, dtype=torch.uint8)
    else:
        flat = torch.frombuffer(anonymous(nbytes), dtype=torch.uint8, count=nbytes)
    typed = flat.view(kind)
    if dtype.bits % 8:  # torch packs these: two elements make one of its own
        return typed.view(*shape[:-1], -1)
    return typed.view(shape)


def octets(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes, flat."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # one element may have any stride and be contiguous
    return flat.view(torch.uint8)


def lends(tensor: torch.Tensor) -> bool:
    """Whether bytes can be read straight into the tensor."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


@dataclass(frozen=True, slots=True)
class Memory:
    """Where a tensor's bytes lie, in order. Equal ones are one memory under two names."""

    device: torch.device
    window: Window

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Memory:
        """The memory of a tensor that has elements."""
        size = tensor.element_size()
        found = Window(tensor.data_ptr(), (*tensor.shape, size), (*(n * size for n in tensor.stride()), 1))
        return cls(tensor.device, simplify(found, found)[0])

    @property
    def real(self) -> bool:
        """Whether there is any: a tensor on the meta device has none."""
        return self.device.type != "meta"

    @property
    def folded(self) -> bool:
        """Whether elements may share a place, as those of an expanded tensor do."""
        extent = 1
        for stride, n in sorted(zip(self.window.strides, self.window.shape, strict=True)):
            if stride < extent:
                return True
            extent += stride * (n - 1)
        return False


def overlapping(memories: Iterable[Memory]) -> tuple[Memory, Memory] | None:
    """Two different memories, none of them folded, that have a byte in common. Views that interleave may have none."""
    open_ones: list[Memory] = []
    for one in sorted(
        (memory for memory in memories if memory.real), key=lambda memory: (str(memory.device), memory.window.bounds)
    ):
        start = one.window.bounds[0]
        open_ones = [m for m in open_ones if m.device == one.device and m.window.bounds[1] > start]
        for other in open_ones:
            if join(one.window, one.window, other.window, other.window):
                return other, one
        open_ones.append(one)
    return None


class TensorSink:
    """One tensor on its way to the caller.

    ``target``: made by ``make`` when the dispatcher comes to it, once the gate has room. ``chunks``: recorded
    digests of its chunks, or None. ``ready`` is called by the thread that fills the last byte.
    """

    def __init__(
        self,
        name: str,
        dtype: DType,
        shape: tuple[int, ...],
        nbytes: int,
        *,
        where: str,
        make: Callable[[], torch.Tensor],
        staging: int,
        gate: Gate,
        chunks: tuple[str, ...] | None,
        ready: Ready,
    ) -> None:
        self.name = name
        self.nbytes = nbytes
        self.staging = staging
        self.target: torch.Tensor | None = None
        self._dtype = dtype
        self._shape = shape
        self._where = where
        self._make = make
        self._gate = gate
        self._chunks = chunks
        self._ready = ready
        self._left = nbytes
        self._lock = Lock()
        self._bytes: memoryview | None = None

    def begin(self) -> None:
        """Wait for room and make the target; called by the dispatcher."""
        if self.target is not None:
            return
        self._gate.enter(self.nbytes)
        self.target = self._make()
        if not self.staging and self.nbytes:
            self._bytes = octets(self.target).numpy().data
        if not self.nbytes:
            self._ready(self)

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """The tensor's own memory, or the step's block."""
        self.begin()
        if self.staging:
            return memory
        assert self._bytes is not None
        return self._bytes[tile.offset : tile.offset + tile.nbytes]

    def done(self, tile: Tile, memory: memoryview, release: Release) -> None:
        """Check the chunk, copy it on where it was staged, and tell when the tensor is whole."""
        view = memory if self.staging else self._bytes[tile.offset : tile.offset + tile.nbytes]  # type: ignore[index]
        if self._chunks is not None:
            self._check(tile, view)
        if self.staging:
            self._copy(tile, view)
        release()
        with self._lock:
            self._left -= tile.nbytes
            whole = self._left == 0
        if whole:
            self._bytes = None
            self._ready(self)

    def _check(self, tile: Tile, view: memoryview) -> None:
        assert self._chunks is not None
        for at in range(0, tile.nbytes, digest.CHUNK):
            number = (tile.offset + at) // digest.CHUNK
            if digest.of_chunk(view[at : at + digest.CHUNK]) != self._chunks[number]:
                start = tile.offset + at
                raise ChecksumMismatch(
                    f"{self._where}: tensor {self.name!r} differs from its digest in its bytes {start} to "
                    f"{min(self.nbytes, start + digest.CHUNK)}; restore the file, shardtool verify tells what "
                    f"else is damaged"
                )

    def _copy(self, tile: Tile, view: memoryview) -> None:
        """From the step's block into the target, wherever it lies."""
        assert self.target is not None
        source = torch.frombuffer(view, dtype=torch.uint8)
        target = self.target.detach()
        if target.is_contiguous():
            octets(target)[tile.offset : tile.offset + tile.nbytes].copy_(source)
            return
        values = source.view(self._dtype.torch())
        _scatter(target, self._shape, tile.offset // self._dtype.itemsize, values)


def _scatter(target: torch.Tensor, shape: tuple[int, ...], first: int, values: torch.Tensor) -> None:
    """Write a run of elements, counted in row-major order, into a tensor of any strides."""
    if not shape:
        target.copy_(values[0])
        return
    inner = math.prod(shape[1:])
    done = 0
    while done < len(values):
        row, at = divmod(first + done, inner)
        rows = (len(values) - done) // inner if at == 0 else 0
        if rows:
            target[row : row + rows].copy_(values[done : done + rows * inner].view(rows, *shape[1:]))
            done += rows * inner
            continue
        n = min(inner - at, len(values) - done)
        _scatter(target[row], shape[1:], at, values[done : done + n])
        done += n
