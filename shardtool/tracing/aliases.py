"""Which of an engine's tensors are stored: not those that lie in the memory of another.

vLLM and SGLang have the same rule (``ShardedStateLoader._filter_subtensors``): empty tensors are left out; of tensors
on the same memory the one with the smallest name is kept, a tensor inside a larger contiguous one is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from shardtool.tracing.tape import META, Log, Ref


def kept(log: Log, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, Ref], dict[str, str]]:
    """The tensors of a trace that are stored, and for each other name the one that has its memory."""
    return stored(
        (name, log.ref(tensor) if tensor.device == META else log.real(tensor))
        for name, tensor in state.items()
        if tensor.numel()
    )


def of_model(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model in memory that are stored."""
    refs = (
        (name, Ref(_place(tensor), int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype))
        for name, tensor in state.items()
        if tensor.numel()
    )
    return {name: state[name] for name in stored(refs)[0]}


def _place(tensor: torch.Tensor) -> int:
    """A number for a tensor's storage. Those of the meta device have no address."""
    storage = tensor.untyped_storage()
    return storage._cdata if tensor.is_meta else storage.data_ptr()


def stored(views: Iterable[tuple[str, Ref]]) -> tuple[dict[str, Ref], dict[str, str]]:
    """The views that are stored, and for each other name the one that has its memory."""
    groups: dict[int, list[tuple[str, Ref]]] = {}
    for name, ref in views:
        groups.setdefault(ref.storage, []).append((name, ref))
    found: dict[str, Ref] = {}
    aliases: dict[str, str] = {}
    for group in groups.values():
        for name, ref in group:
            over = _covering(name, ref, group)
            if over is None:
                found[name] = ref
            else:
                aliases[name] = over
    return found, {name: _end(name, aliases) for name in aliases}


def _covering(name: str, ref: Ref, group: list[tuple[str, Ref]]) -> str | None:
    """The tensor of a group that makes this one superfluous."""
    if len(group) == 1:
        return None
    a, b = _extent(ref)
    for other, held in group:
        if not _contiguous(held):
            continue
        first, past = _extent(held)
        if a < first or past < b:
            continue
        if first < a or b < past or not _contiguous(ref) or other < name:
            return other
    return None


def _end(name: str, aliases: Mapping[str, str]) -> str:
    """The tensor that is kept, at the end of a chain of aliases."""
    while name in aliases:
        name = aliases[name]
    return name


def _extent(ref: Ref) -> tuple[int, int]:
    """The first byte of a view in its storage and one past its last element."""
    last = sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True))
    return ref.offset * ref.dtype.itemsize, (ref.offset + last + 1) * ref.dtype.itemsize


def _contiguous(ref: Ref) -> bool:
    expected = math.prod(ref.shape)
    for n, stride in zip(ref.shape, ref.strides, strict=True):
        expected //= n
        if n != 1 and stride != expected:
            return False
    return True
