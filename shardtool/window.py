"""Windows: which elements of a stored tensor, in which order. The geometry under every plan.

A window is an affine map from a box of indices to addresses: element ``(i, j, ...)`` lies at
``offset + i * strides[0] + j * strides[1] + ...``, counted in elements of the tensor. Slices, steps, transposes and
reshapes of a row-major tensor are all windows.

Two windows of one shape make a *pair*: a copy of elements. Everything that plans need comes down to one question about
two pairs whose first windows look at the same tensor::

    join(k1, v1, k2, v2):  where do k1 and k2 meet, and where do v1 and v2 stand there?

* a layout over a catalogue (``resolve``): k1 = what the piece wants of a tensor, k2 = what a file holds of it;
* a tile of a target: k1 = where the piece lands, k2 = the tile's range of elements.

``join`` writes every window as a box of digits in a number system whose places are the strides of both, so that meeting
is the intersection of two boxes. A window that straddles a place is cut into head, body and tail first; one whose
strides do not divide each other is peeled row by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from shardtool.errors import UnsupportedTransform

MAX_PEELED = 1 << 16
"""Rows that one window may be peeled into before the geometry is refused."""
MAX_COMPARED = 1 << 22
"""Pairs of windows, or of what is left of them, that a union or a difference may look at before it is refused."""


@dataclass(frozen=True, slots=True)
class Window:
    """Elements of one tensor: ``offset``, ``shape`` and ``strides``, all counted in elements.

    Strides are not negative.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bounds(self) -> tuple[int, int]:
        """The first address and one past the last."""
        if not self.size:
            return self.offset, self.offset
        return self.offset, self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie next to each other in order."""
        expected = 1
        for n, s in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and s != expected:
                return False
            expected *= n
        return True

    def moved(self, by: int) -> Window:
        """The same window ``by`` elements further."""
        return Window(self.offset + by, self.shape, self.strides)

    def narrow(self, dim: int, start: int, length: int, step: int = 1) -> Window:
        """``length`` indices of one dimension from ``start``, every ``step``-th."""
        if start < 0 or length < 0 or step < 1 or (length and start + (length - 1) * step >= self.shape[dim]):
            raise UnsupportedTransform(
                f"{length} indices from {start} by {step} leave a dimension of {self.shape[dim]}"
            )
        offset = self.offset + start * self.strides[dim] if length else self.offset
        return Window(offset, _swap(self.shape, dim, length), _swap(self.strides, dim, self.strides[dim] * step))

    def transpose(self, *order: int) -> Window:
        """The dimensions in another order."""
        return Window(self.offset, tuple(self.shape[i] for i in order), tuple(self.strides[i] for i in order))

    def reshape(self, *shape: int) -> Window:
        """The same elements in the same order under another shape, if one window can say it."""
        if math.prod(shape) != self.size:
            raise UnsupportedTransform(f"{self.shape} cannot become {shape}")
        if not self.size:
            return Window(self.offset, shape, (0,) * len(shape))
        merged: list[list[int]] = []  # dimensions as [count, stride], neighbours joined
        for n, s in zip(self.shape, self.strides, strict=True):
            if n == 1:
                continue
            if merged and merged[-1][1] == n * s:
                merged[-1] = [merged[-1][0] * n, s]
            else:
                merged.append([n, s])
        strides: list[int] = []
        for n in reversed(shape):
            if n == 1:
                strides.append(0)
                continue
            if not merged or merged[-1][0] % n:
                raise UnsupportedTransform(f"{self.shape} with strides {self.strides} cannot become {shape}")
            count, stride = merged[-1]
            strides.append(stride)
            if count == n:
                merged.pop()
            else:
                merged[-1] = [count // n, stride * n]
        return Window(self.offset, tuple(shape), tuple(reversed(strides)))


def row_major(shape: tuple[int, ...], offset: int = 0) -> Window:
    """The whole of a tensor of this shape, as it is stored."""
    strides, stride = [], 1
    for n in reversed(shape):
        strides.append(stride)
        stride *= n
    return Window(offset, tuple(shape), tuple(reversed(strides)))


def flat(start: int, count: int) -> Window:
    """``count`` elements from ``start``, one after the other."""
    return Window(start, (count,), (1,))


def simplify(a: Window, b: Window) -> tuple[Window, Window]:
    """The same pair with as few dimensions as it takes: those of one index go, those that continue each other merge."""
    dims: list[tuple[int, int, int]] = []
    for n, s, t in zip(a.shape, a.strides, b.strides, strict=True):
        if n == 1:
            continue
        if dims and dims[-1][1] == n * s and dims[-1][2] == n * t:
            dims[-1] = (dims[-1][0] * n, s, t)
        else:
            dims.append((n, s, t))
    shape = tuple(n for n, _, _ in dims)
    return Window(a.offset, shape, tuple(s for _, s, _ in dims)), Window(b.offset, shape, tuple(t for _, _, t in dims))


@lru_cache(maxsize=1 << 11)
def join(k1: Window, v1: Window, k2: Window, v2: Window) -> tuple[tuple[Window, Window], ...]:
    """Where ``k1`` and ``k2`` meet: pairs of windows, into what ``v1`` and what ``v2`` looks at, of one shape each.

    ``k1`` and ``v1`` have one shape, ``k2`` and ``v2`` another. A dimension of ``k1`` with stride 0 (a broadcast) is
    carried along; ``k2`` must not meet any of its addresses twice.
    """
    if not k1.size or not k2.size:
        return ()
    free, (k1, v1) = _split_broadcast(k1, v1)
    (k1, v1), (k2, v2) = simplify(k1, v1), simplify(k2, v2)
    lo1, hi1 = k1.bounds
    lo2, hi2 = k2.bounds
    if hi1 <= lo2 or hi2 <= lo1:
        return ()
    places = sorted({*k1.strides, *k2.strides}) or [1]
    if any(big % small for small, big in pairwise(places)):
        return tuple(
            (_with(a, [(n, s) for n, s in free]), _with(b, [(n, 0) for n, _ in free]))
            for (r1, w1), (r2, w2) in _peeled(k1, v1, k2, v2)
            for a, b in join(r1, w1, r2, w2)
        )
    found = []
    for box1 in _boxes(k1, v1, places):
        for box2 in _boxes(k2, v2, places):
            met = _meet(box1, box2, places[0])
            if met is not None:
                a, b = simplify(*met)
                found.append((_with(a, free), _with(b, [(n, 0) for n, _ in free])))
    return tuple(found)


def _swap(values: tuple[int, ...], i: int, value: int) -> tuple[int, ...]:
    return (*values[:i], value, *values[i + 1 :])


def _with(window: Window, dims: list[tuple[int, int]]) -> Window:
    """``window`` with further dimensions (count, stride) in front."""
    if not dims:
        return window
    return Window(window.offset, (*(n for n, _ in dims), *window.shape), (*(s for _, s in dims), *window.strides))


def _split_broadcast(k: Window, v: Window) -> tuple[list[tuple[int, int]], tuple[Window, Window]]:
    """The dimensions along which ``k`` stands still, as (count, stride in v), and the pair without them."""
    if 0 not in k.strides:
        return [], (k, v)
    still = [i for i, s in enumerate(k.strides) if s == 0 and k.shape[i] > 1]
    moving = [i for i in range(len(k.shape)) if i not in still]
    return [(v.shape[i], v.strides[i]) for i in still], (k.transpose(*moving), v.transpose(*moving))


def _peeled(
    k1: Window, v1: Window, k2: Window, v2: Window
) -> Iterator[tuple[tuple[Window, Window], tuple[Window, Window]]]:
    """The two pairs with the outermost dimension of the more entangled one taken apart."""
    own1 = _entangled(k1)
    first = own1 or (not _entangled(k2) and len(k1.shape) >= len(k2.shape))
    k, v = (k1, v1) if first else (k2, v2)
    dim = max(range(len(k.shape)), key=lambda i: k.strides[i])
    if k.shape[dim] > MAX_PEELED:
        raise UnsupportedTransform(f"windows with strides {k1.strides} and {k2.strides} do not fit together")
    for i in range(k.shape[dim]):
        row = simplify(k.narrow(dim, i, 1), v.narrow(dim, i, 1))
        yield (row, (k2, v2)) if first else ((k1, v1), row)


def _entangled(window: Window) -> bool:
    strides = sorted(set(window.strides))
    return any(big % small for small, big in pairwise(strides))


@dataclass(frozen=True, slots=True)
class _Box:
    """A window in digits: per place (lowest first) the first digit, the count and the stride of the partner."""

    rest: int  # what the offset has below the lowest place
    first: tuple[int, ...]
    count: tuple[int, ...]
    offset: int  # of the partner
    strides: tuple[int, ...]  # of the partner


def _boxes(k: Window, v: Window, places: list[int]) -> list[_Box]:
    dims: dict[int, tuple[int, int]] = {}
    for n, s, t in zip(k.shape, k.strides, v.strides, strict=True):
        if s in dims:
            raise UnsupportedTransform(f"a window of shape {k.shape} with strides {k.strides} meets its elements twice")
        dims[s] = (n, t)
    found: list[_Box] = []
    _cut(k.offset, v.offset, dims, places, found)
    return found


def _cut(offset: int, partner: int, dims: dict[int, tuple[int, int]], places: list[int], found: list[_Box]) -> None:
    """Append the boxes of a window, cutting it wherever a digit would carry into the next place."""
    first = []
    for place, above in zip(places, [*places[1:], 0], strict=True):
        digit = (offset % above if above else offset) // place
        first.append(digit)
        n, t = dims.get(place, (1, 0))
        if not above or digit + n <= (radix := above // place):
            continue
        head = radix - digit if digit else 0
        rows, tail = divmod(n - head, radix)
        if head:
            _cut(offset, partner, {**dims, place: (head, t)}, places, found)
        if rows:
            body = {**dims, place: (radix, t)}
            if rows > 1:
                if above in dims:
                    raise UnsupportedTransform("a window meets its elements twice")
                body[above] = (rows, t * radix)
            _cut(offset + head * place, partner + head * t, body, places, found)
        if tail:
            done = head + rows * radix
            _cut(offset + done * place, partner + done * t, {**dims, place: (tail, t)}, places, found)
        return
    pairs = [dims.get(place, (1, 0)) for place in places]
    found.append(
        _Box(offset % places[0], tuple(first), tuple(n for n, _ in pairs), partner, tuple(t for _, t in pairs))
    )


def _meet(a: _Box, b: _Box, lowest: int) -> tuple[Window, Window] | None:
    if a.rest != b.rest and lowest > 1:
        return None
    at, bt = a.offset, b.offset
    dims: list[tuple[int, int, int]] = []
    for i in range(len(a.first)):
        lo = max(a.first[i], b.first[i])
        hi = min(a.first[i] + a.count[i], b.first[i] + b.count[i])
        if hi <= lo:
            return None
        at += (lo - a.first[i]) * a.strides[i]
        bt += (lo - b.first[i]) * b.strides[i]
        if hi - lo > 1:
            dims.append((hi - lo, a.strides[i], b.strides[i]))
    dims.reverse()
    shape = tuple(n for n, _, _ in dims)
    return Window(at, shape, tuple(s for _, s, _ in dims)), Window(bt, shape, tuple(t for _, _, t in dims))


def tiles(shape: tuple[int, ...], most: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, count) of elements in row-major order.

    Each has ``most`` elements at most and ends at the end of a row if it can.
    """
    total = math.prod(shape)
    size = aligned(shape, most)
    for start in range(0, total, size):
        yield start, min(size, total - start)


def aligned(shape: tuple[int, ...], most: int) -> int:
    """The largest count up to ``most`` that is a whole number of rows (of inner rows, if not even one row fits)."""
    for dim in range(len(shape)):
        inner = math.prod(shape[dim + 1 :])
        if inner and most >= inner:
            return max(1, most - most % inner)
    return max(1, most)


def union(windows: Iterable[Window]) -> int:
    """How many addresses the windows hold together.

    A window that meets itself other than by standing still is refused, and windows that overlap in too many ways.
    """
    distinct = sorted(dict.fromkeys(_nested(window) for window in windows), key=lambda window: window.bounds)
    total = 0
    compared = 0
    near: list[Window] = []  # those before that reach as far as this one; a thousand stacked experts are far apart
    for window in distinct:
        near = [earlier for earlier in near if earlier.bounds[1] > window.offset]
        compared = _counted(compared, len(near))
        met = [(earlier, found) for earlier in near if (found := join(window, window, earlier, earlier))]
        if len(met) < 2:  # what it shares with one other is in disjoint windows already
            fresh = window.size - sum(shared.size for _, found in met for shared, _ in found)
        else:
            rest = [window]
            for earlier, _ in met:
                compared = _counted(compared, len(rest))
                rest = [left for part in rest for left, _ in without(part, part, earlier)]
            fresh = sum(part.size for part in rest)
        if fresh:
            total += fresh
            run = next((earlier for earlier in near if earlier.contiguous), None) if window.contiguous else None
            if run is not None:  # they overlap, so both are one
                near.remove(run)
                window = flat(run.offset, window.bounds[1] - run.offset)
            near.append(window)
    return total


def _counted(compared: int, more: int) -> int:
    """The sum, refused where it is more than anything that a layout needs."""
    if compared + more > MAX_COMPARED:
        raise UnsupportedTransform(f"the windows overlap in too many ways: more than {MAX_COMPARED} pairs of them")
    return compared + more


def _nested(window: Window) -> Window:
    """The window's addresses, each once: without the dimensions along which it stands still."""
    (kept, _) = _split_broadcast(window, window)[1]
    kept = simplify(kept, kept)[0]
    extent = 1
    for stride, n in sorted(zip(kept.strides, kept.shape, strict=True)):
        if stride < extent and kept.size:
            raise UnsupportedTransform(
                f"a window of shape {window.shape} with strides {window.strides} meets its elements twice"
            )
        extent += stride * (n - 1)
    return kept


def without(k1: Window, v1: Window, k2: Window) -> list[tuple[Window, Window]]:
    """The pair ``k1``, ``v1`` without the addresses that ``k2`` looks at as well: disjoint pairs.

    No window may meet any of its addresses twice.
    """
    (k1, v1), (k2, _) = simplify(k1, v1), simplify(k2, k2)
    lo1, hi1 = k1.bounds
    lo2, hi2 = k2.bounds
    if hi1 <= lo2 or hi2 <= lo1:
        return [(k1, v1)] if k1.size else []
    places = sorted({*k1.strides, *k2.strides}) or [1]
    if any(big % small for small, big in pairwise(places)):
        return _peeled_without(k1, v1, k2)
    rest = _boxes(k1, v1, places)
    for hole in _boxes(k2, k2, places):
        rest = [left for box in rest for left in _outside(box, hole, places)]
    found = []
    for box in rest:
        shape = tuple(reversed(box.count))
        start = box.rest + sum(digit * place for digit, place in zip(box.first, places, strict=True))
        keys = Window(start, shape, tuple(reversed(places)))
        found.append(simplify(keys, Window(box.offset, shape, tuple(reversed(box.strides)))))
    return found


def _peeled_without(k1: Window, v1: Window, k2: Window) -> list[tuple[Window, Window]]:
    """``without`` row by row, of the window that is more entangled."""
    first = _entangled(k1) or (not _entangled(k2) and len(k1.shape) >= len(k2.shape))
    window = k1 if first else k2
    dim = max(range(len(window.shape)), key=lambda i: window.strides[i])
    if window.shape[dim] > MAX_PEELED:
        raise UnsupportedTransform(f"windows with strides {k1.strides} and {k2.strides} do not fit together")
    rows = range(window.shape[dim])
    if first:
        return [p for i in rows for p in without(k1.narrow(dim, i, 1), v1.narrow(dim, i, 1), k2)]
    done: list[tuple[Window, Window]] = []  # what lies before the row, and so before all that follow
    rest = [(k1, v1)]
    compared = 0
    for i in rows:
        row = k2.narrow(dim, i, 1)
        compared = _counted(compared, len(rest))
        done += [pair for pair in rest if pair[0].bounds[1] <= row.offset]
        rest = [left for pair in rest if pair[0].bounds[1] > row.offset for left in without(*pair, row)]
    return done + rest


def _outside(box: _Box, hole: _Box, places: list[int]) -> Iterator[_Box]:
    """What is left of a box beside another: for each place the digits before it and after it, then the next place."""
    meets = box.rest == hole.rest or places[0] == 1
    for a, n, b, m in zip(box.first, box.count, hole.first, hole.count, strict=True):
        meets = meets and max(a, b) < min(a + n, b + m)
    if not meets:
        yield box
        return
    for i in range(len(places)):
        lo = max(box.first[i], hole.first[i])
        hi = min(box.first[i] + box.count[i], hole.first[i] + hole.count[i])
        if lo > box.first[i]:
            yield _narrowed(box, i, box.first[i], lo)
        if hi < box.first[i] + box.count[i]:
            yield _narrowed(box, i, hi, box.first[i] + box.count[i])
        box = _narrowed(box, i, lo, hi)


def _narrowed(box: _Box, i: int, start: int, end: int) -> _Box:
    """The box with the digits from ``start`` to ``end`` at one place."""
    offset = box.offset + (start - box.first[i]) * box.strides[i]
    return _Box(box.rest, _swap(box.first, i, start), _swap(box.count, i, end - start), offset, box.strides)
