"""Tensors as memory: their bytes in order, whether they can be read into, which of them share a place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from shardtool.window import Window, join, simplify


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


Pair = tuple[torch.Tensor, torch.Tensor]


def scatter(target: torch.Tensor, shape: tuple[int, ...], first: int, values: torch.Tensor) -> Iterator[Pair]:
    """What a run of elements, counted in row-major order, is copied to in a tensor of any strides: (target, source)."""
    if not shape:
        yield target, values[0]
        return
    inner = math.prod(shape[1:])
    done = 0
    while done < len(values):
        row, at = divmod(first + done, inner)
        rows = (len(values) - done) // inner if at == 0 else 0
        if rows:
            yield target[row : row + rows], values[done : done + rows * inner].view(rows, *shape[1:])
            done += rows * inner
            continue
        n = min(inner - at, len(values) - done)
        yield from scatter(target[row], shape[1:], at, values[done : done + n])
        done += n
