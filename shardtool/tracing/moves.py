"""Operations that only move elements, said as copies: ``cat``, ``stack``, ``index_select``, ``repeat`` ...

Along each dimension the result takes given indices of its argument; runs of indices with one step are one window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

from shardtool.tracing.tape import Ref, Refused, Write
from shardtool.window import Window, row_major, without

MOST_WINDOWS = 1 << 14
"""Windows that one operation may become."""

Index = Callable[[Any, int], list[int]]
"""The numbers that an argument of a write at this time holds."""


class Moved(NamedTuple):
    """Elements ``src`` of ``source`` are at the addresses ``at`` of the result; ``fill`` where there is no source."""

    at: Window
    src: Window
    source: Ref | None
    fill: float = 0


def moved(write: Write, index: Index) -> list[Moved] | None:
    """The copies that an operation is, or None for one that computes."""
    rule = _RULES.get(write.op)
    if rule is None or not _plain(write):
        return None
    return rule(write, index)


def _plain(write: Write) -> bool:
    """Whether the arguments that are moved are meta tensors; others are worked out."""
    first = write.args[0]
    moved_ones = first if isinstance(first, (list, tuple)) and not isinstance(first, Ref) else [first]
    return all(isinstance(x, Ref) for x in moved_ones)


def _window(ref: Ref) -> Window:
    return Window(ref.offset, ref.shape, ref.strides)


def _cat(write: Write, _index: Index) -> list[Moved]:
    refs, dim = _listed(write, len(write.out.shape))
    found, start = [], 0
    for ref in refs:
        if ref.shape == (0,):  # cat skips these whatever the others' shape
            continue
        n = ref.shape[dim]
        found.append(Moved(_window(write.out).narrow(dim, start, n), _window(ref), ref))
        start += n
    return [one for one in found if one.at.size]


def _stack(write: Write, _index: Index) -> list[Moved]:
    refs, dim = _listed(write, len(write.out.shape))
    out = _window(write.out)
    return [Moved(_dropped(out.narrow(dim, i, 1), dim), _window(ref), ref) for i, ref in enumerate(refs)]


def _dropped(window: Window, dim: int) -> Window:
    """A window without a dimension of one index."""
    return Window(
        window.offset,
        (*window.shape[:dim], *window.shape[dim + 1 :]),
        (*window.strides[:dim], *window.strides[dim + 1 :]),
    )


def _listed(write: Write, rank: int) -> tuple[list[Ref], int]:
    dim = write.args[1] if len(write.args) > 1 else (write.call[1].get("dim", 0) if write.call else 0)
    return list(write.args[0]), dim % rank


def _index_select(write: Write, index: Index) -> list[Moved]:
    ref, dim, picked = write.args
    return _picked(write, ref, {dim % len(ref.shape): index(picked, write.time)})


def _index_tensor(write: Write, index: Index) -> list[Moved]:
    ref, indices = write.args
    given = [(dim, value) for dim, value in enumerate(indices) if value is not None]
    if len(given) != 1:
        raise Refused(f"the engine picks elements by {len(given)} indices at once, which layouts cannot say")
    dim, value = given[0]
    numbers = [n % ref.shape[dim] for n in index(value, write.time)]
    return _picked(write, ref, {dim: numbers})


def _flip(write: Write, _index: Index) -> list[Moved]:
    ref, dims = write.args
    return _picked(write, ref, {dim % len(ref.shape): list(range(ref.shape[dim]))[::-1] for dim in dims})


def _roll(write: Write, _index: Index) -> list[Moved]:
    ref, shifts, *dims = write.args
    if not dims or not dims[0]:
        raise Refused("the engine rolls a tensor over all its dimensions, which layouts cannot say")
    picked = {}
    for shift, dim in zip(shifts, dims[0], strict=True):
        n = ref.shape[dim]
        picked[dim % len(ref.shape)] = [(i - shift) % n for i in range(n)]
    return _picked(write, ref, picked)


def _repeat(write: Write, _index: Index) -> list[Moved]:
    ref, times = write.args
    missing = len(times) - len(ref.shape)
    wide = ref._replace(shape=(1,) * missing + ref.shape, strides=(0,) * missing + ref.strides)
    return _picked(write, wide, {dim: list(range(wide.shape[dim])) * n for dim, n in enumerate(times) if n != 1})


def _pad(write: Write, _index: Index) -> list[Moved]:
    ref, pads, *value = write.args
    at, src = _window(write.out), _window(ref)
    for i in range(len(pads) // 2):
        dim, before, after = len(ref.shape) - 1 - i, pads[2 * i], pads[2 * i + 1]
        kept = ref.shape[dim] - max(0, -before) - max(0, -after)
        at = at.narrow(dim, max(0, before), kept)
        src = src.narrow(dim, max(0, -before), kept)
    fill = value[0] if value else 0
    rest = without(_window(write.out), row_major(write.out.shape), at)
    padding = [Moved(place, Window(0, place.shape, (0,) * len(place.shape)), None, fill) for place, _ in rest]
    return [Moved(at, src, ref), *padding]


def _picked(write: Write, ref: Ref, picked: dict[int, list[int]]) -> list[Moved]:
    """The result that takes these indices of some dimensions, and all of the others."""
    dims = sorted(picked)
    every = [list(_runs(picked[dim])) for dim in dims]
    count = 1
    for runs in every:
        count *= len(runs)
    if count > MOST_WINDOWS:
        raise Refused(f"the engine moves elements about ({write.op}) in {count} pieces, which are too many")
    found = []
    for combination in product(*every):
        at, src = _window(write.out), _window(ref)
        for dim, (to, start, n, step) in zip(dims, combination, strict=True):
            at = at.narrow(dim, to, n)
            src = src.narrow(dim, start, n, step) if step else _still(src.narrow(dim, start, 1), dim, n)
        found.append(Moved(at, src, ref))
    return found


def _still(window: Window, dim: int, n: int) -> Window:
    """A window whose dimension of one index is repeated."""
    return Window(
        window.offset,
        (*window.shape[:dim], n, *window.shape[dim + 1 :]),
        (*window.strides[:dim], 0, *window.strides[dim + 1 :]),
    )


def _runs(numbers: Iterable[int]) -> Iterable[tuple[int, int, int, int]]:
    """(place, first, count, step) of the runs of numbers that stand still or step evenly forward."""
    first = place = count = 0
    step: int | None = None
    last = 0
    for i, n in enumerate(numbers):
        if count and (n - last == step or (step is None and n >= last)):
            step = n - last
            count += 1
        else:
            if count:
                yield place, first, count, 1 if step is None else step
            first, place, count, step = n, i, 1, None
        last = n
    if count:
        yield place, first, count, 1 if step is None else step


_RULES: dict[str, Callable[[Write, Index], list[Moved]]] = {
    "cat": _cat,
    "stack": _stack,
    "index_select": _index_select,
    "index": _index_tensor,
    "flip": _flip,
    "roll": _roll,
    "repeat": _repeat,
    "constant_pad_nd": _pad,
}
