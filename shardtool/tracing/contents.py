"""What memory holds: the log read backwards.

The last writer wins, so a storage at any time is a set of disjoint windows, each with its origin. Copies are followed
to where they come from, at the time at which they were made, until something is reached that is no copy::

    Source     elements of a source tensor
    Uniform    one value
    Data       elements of a tensor that exists
    Made       elements of what an operation yielded
    Unknown    memory that nothing has written, or random numbers
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from shardtool.dtypes import DType, from_name, lossless
from shardtool.errors import UsageError
from shardtool.tracing import moves
from shardtool.tracing.tape import META, DependsOnSource, Log, Ref, Refused, Write
from shardtool.window import Window, flat, join, row_major, without

MOST_VALUES = 1 << 26
"""Elements of a tensor whose values are worked out."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A source tensor."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Uniform:
    """One value everywhere."""

    value: float


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """A contiguous tensor that exists."""

    tensor: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """What an operation yielded, row-major."""

    write: Write


class Unknown:
    """Nothing that could be said."""


Leaf = Source | Uniform | Data | Made | Unknown
Step = tuple[str, torch.dtype]
"""``to`` or ``view``, and the dtype that it yields."""


class Part(NamedTuple):
    """Elements ``at`` of the reader are the elements ``src`` of ``leaf``, after these changes of dtype."""

    at: Window
    src: Window
    leaf: Leaf
    dtype: torch.dtype  # of the leaf
    steps: tuple[Step, ...] = ()


class _Held(NamedTuple):
    """Addresses ``at`` of a storage hold the elements ``src`` of a leaf, or of another storage at a time."""

    at: Window
    src: Window
    origin: Leaf | tuple[int, int]
    read: torch.dtype  # the dtype in which the origin is read
    dtype: torch.dtype  # the dtype in which it was written


class Contents:
    """The content of every storage of a log, at any time."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._visible: dict[tuple[int, int], list[_Held]] = {}
        self._values: dict[int, torch.Tensor | DependsOnSource] = {}

    def read(self, ref: Ref, before: int | None = None) -> list[Part]:
        """What a view holds (now, or before an entry of the log): disjoint parts that fill it."""
        window = Window(ref.offset, ref.shape, ref.strides)
        time = self._log.time + 1 if before is None else before
        return list(self._read(ref.storage, window, row_major(ref.shape), ref.dtype, time))

    def _read(self, storage: int, k: Window, v: Window, dtype: torch.dtype, time: int) -> Iterator[Part]:
        """The parts of ``v`` that the addresses ``k`` of a storage fill."""
        if storage in self._log.sources and storage not in self._log.writes:
            name, native = self._log.sources[storage]
            part = Part(v, k, Source(name), native)
            if native != dtype:
                _check_size(native, dtype.itemsize)
                part = part._replace(steps=_then(part, ("view", dtype)))
            yield part
            return
        lo, hi = k.bounds
        for held in self._held(storage, dtype.itemsize, time):
            first, past = held.at.bounds
            if past <= lo or hi <= first:
                continue
            for at, src in join(k, v, held.at, held.src):
                if isinstance(held.origin, tuple):
                    found: Iterable[Part] = self._read(held.origin[0], src, at, held.read, held.origin[1])
                else:
                    found = (Part(at, src, held.origin, held.read),)
                for part in found:
                    steps = _then(part, ("to", held.dtype), ("view", dtype))
                    yield part if steps == part.steps else part._replace(steps=steps)

    def _held(self, storage: int, itemsize: int, time: int) -> list[_Held]:
        """A storage before a time: disjoint windows that cover it."""
        writes = self._log.writes.get(storage, [])
        count = bisect_left(writes, time, key=lambda write: write.time)
        found = self._visible.get((storage, count))
        if found is None:
            found = self._visible[storage, count] = self._seen(storage, writes[:count], itemsize)
        return found

    def _seen(self, storage: int, writes: list[Write], itemsize: int) -> list[_Held]:
        size = self._log.sizes[storage] // itemsize
        everything = flat(0, size)
        newest: list[_Held] = []
        base: _Held | None = None
        for write in reversed(writes):
            _check_size(write.out.dtype, itemsize)
            held = list(self._holds(write))
            if len(held) == 1 and held[0].at.contiguous and held[0].at.size == size:
                base = held[0]
                break
            newest.extend(held)
        overlay = _disjoint(newest)
        if sum(held.at.size for held in overlay) == size:
            return overlay
        if base is None:
            leaf: Leaf = Unknown()
            dtype = torch.uint8
            if storage in self._log.sources:
                name, dtype = self._log.sources[storage]
                leaf = Source(name)
                _check_size(dtype, itemsize)
            base = _Held(everything, everything, leaf, dtype, dtype)
        return overlay + _uncovered(base, overlay)

    def _holds(self, write: Write) -> Iterator[_Held]:
        """What one write fills its addresses with."""
        out = write.out
        at = Window(out.offset, out.shape, out.strides)
        if not at.size:
            return
        still = Window(0, out.shape, (0,) * len(out.shape))
        if write.op == "copy":
            (source,) = write.args
            yield _Held(at, _spread(source, out.shape), (source.storage, write.time), source.dtype, out.dtype)
        elif write.op == "fill":
            yield _Held(at, still, Uniform(write.args[0]), out.dtype, out.dtype)
        elif write.op == "data":
            tensor = write.args[0].contiguous()
            ref = Ref(0, 0, tuple(tensor.shape), tensor.stride(), tensor.dtype)
            yield _Held(at, _spread(ref, out.shape), Data(tensor), tensor.dtype, out.dtype)
        elif write.op == "unknown":
            yield _Held(at, still, Unknown(), out.dtype, out.dtype)
        elif (moved := moves.moved(write, self._index)) is not None:
            for piece in moved:
                if piece.source is None:
                    yield _Held(piece.at, piece.src, Uniform(piece.fill), out.dtype, out.dtype)
                else:
                    yield _Held(piece.at, piece.src, (piece.source.storage, write.time), piece.source.dtype, out.dtype)
        else:
            yield _Held(at, row_major(out.shape), Made(write), out.dtype, out.dtype)

    # Values

    def value(self, ref: Ref, before: int | None = None) -> torch.Tensor:
        """The values of a view, where the checkpoint takes no part in them. Raises ``DependsOnSource``."""
        if math.prod(ref.shape) > MOST_VALUES:
            raise Refused(f"the engine reads the values of a tensor of shape {list(ref.shape)}, which is too large")
        out = torch.empty(ref.shape, dtype=ref.dtype, device="cpu")
        for part in self.read(ref, before):
            place = out.as_strided(part.at.shape, part.at.strides, part.at.offset)
            place.copy_(self.of_part(part))
        return out

    def of_part(self, part: Part) -> torch.Tensor:
        """The values of a part, in its shape. Raises ``DependsOnSource``."""
        leaf = part.leaf
        if isinstance(leaf, Source):
            raise DependsOnSource(leaf.name)
        if isinstance(leaf, Unknown):
            raise Refused("the engine reads memory that nothing has written")
        if isinstance(leaf, Uniform):
            value = torch.full(part.at.shape, leaf.value, dtype=torch.float64, device="cpu").to(part.dtype)
        else:
            whole = leaf.tensor if isinstance(leaf, Data) else self.made(leaf.write)
            value = whole.reshape(-1).as_strided(part.src.shape, part.src.strides, part.src.offset)
        for what, dtype in part.steps:
            value = value.to(dtype) if what == "to" else value.contiguous().view(dtype)
        return value

    def made(self, write: Write) -> torch.Tensor:
        """What an operation yields, done on real tensors. Raises ``DependsOnSource``."""
        found = self._values.get(write.time)
        if found is None:
            try:
                found = self._run(write)
            except DependsOnSource as error:
                found = error
            self._values[write.time] = found
        if isinstance(found, DependsOnSource):
            raise found
        return found

    def _run(self, write: Write) -> torch.Tensor:
        assert write.call is not None
        op, kwargs, which = write.call
        if math.prod(write.out.shape) > MOST_VALUES:
            raise Refused(f"the engine computes ({write.op}) a tensor of {list(write.out.shape)}, which is too large")
        args, kwargs = tree_map(
            lambda x: self.value(x, write.time) if isinstance(x, Ref) else torch.device("cpu") if x == META else x,
            (write.args, kwargs),
            is_leaf=lambda x: isinstance(x, Ref),
        )
        result = op(*args, **kwargs)
        results = [result] if isinstance(result, torch.Tensor) else list(result or ())
        if which >= len(results):
            raise Refused(f"the engine uses the operation {write.op!r}, whose result cannot be told")
        return results[which].contiguous()

    def _index(self, value: Any, time: int) -> list[int]:
        """The numbers in an argument that is an index."""
        tensor = self.value(value, time) if isinstance(value, Ref) else value
        if tensor.ndim != 1 or tensor.dtype not in (torch.int64, torch.int32):
            raise Refused(f"the engine picks elements by an index of {tensor.dtype} and shape {list(tensor.shape)}")
        numbers: list[int] = tensor.tolist()
        return numbers


def dtype_of(dtype: torch.dtype) -> DType:
    """Our name for a torch dtype. Raises ``Refused``."""
    try:
        return from_name(str(dtype))
    except UsageError:
        raise Refused(f"the engine has a tensor of {dtype}, which safetensors files cannot hold") from None


def _check_size(dtype: torch.dtype, itemsize: int) -> None:
    if dtype.itemsize != itemsize:
        raise Refused(f"the engine looks at {dtype} as elements of {itemsize} bytes, which layouts cannot say")


def _then(part: Part, *further: Step) -> tuple[Step, ...]:
    """The steps of a part followed by others, without those that change nothing."""
    steps = list(part.steps)
    for what, dtype in further:
        now = steps[-1][1] if steps else part.dtype
        if dtype == now:
            continue
        if steps and steps[-1][0] == what:
            before = steps[-2][1] if len(steps) > 1 else part.dtype
            if what == "view" or lossless(dtype_of(before), dtype_of(now)):  # the step between has changed no value
                steps.pop()
                now = before
        if dtype != now:
            steps.append((what, dtype))
    return tuple(steps)


def _spread(ref: Ref, shape: tuple[int, ...]) -> Window:
    """A view as a window of a shape to which it is broadcast."""
    missing = len(shape) - len(ref.shape)
    if missing < 0:  # leading dimensions of one index
        ref = ref._replace(shape=ref.shape[-missing:], strides=ref.strides[-missing:])
        missing = 0
    strides = [0] * missing
    for n, wanted, stride in zip(ref.shape, shape[missing:], ref.strides, strict=True):
        strides.append(stride if n == wanted else 0)
    return Window(ref.offset, shape, tuple(strides))


def _disjoint(newest_first: list[_Held]) -> list[_Held]:
    """What is left to see of each write under those that came after it."""
    order = sorted(range(len(newest_first)), key=lambda i: newest_first[i].at.bounds)
    found: list[_Held] = []
    cluster: list[int] = []
    end = 0
    for i in [*order, -1]:
        lo, hi = newest_first[i].at.bounds if i >= 0 else (end, 0)
        if cluster and lo >= end:
            found.extend(_on_top(newest_first[j] for j in sorted(cluster)))
            cluster = []
        if i >= 0:
            cluster.append(i)
            end = max(end, hi) if len(cluster) > 1 else hi
    return found


def _on_top(newest_first: Iterable[_Held]) -> list[_Held]:
    """The same for writes that may meet each other."""
    found: list[_Held] = []
    for held in newest_first:
        found.extend(_uncovered(held, found))
    return found


def _uncovered(held: _Held, over: list[_Held]) -> list[_Held]:
    """What is left to see of a write under disjoint others."""
    active = [(held.at, held.src)]
    done: list[tuple[Window, Window]] = []
    for other in sorted(over, key=lambda h: h.at.bounds):
        lo = other.at.bounds[0]
        done += [pair for pair in active if pair[0].bounds[1] <= lo]
        active = [pair for pair in active if pair[0].bounds[1] > lo]
        active = [left for at, src in active for left in without(at, src, other.at)]
    return [held._replace(at=at, src=src) for at, src in done + active]
