"""``load``: stream a rank's tensors (or a whole checkpoint's) to a device, bounded and checked.

::

    stream      (name, tensor) one after the other, in the order of the files; the caller owns each
    ├── load        all of them in a dict
    ├── load_into   straight into existing parameters
    └── measure     counted and dropped, for people who want to know how fast it is

A thread dispatches, readers fill tensors, the caller takes them. The memory limit covers buffers, the tensors that are
read ahead, and the one that was handed over last; those before it are the caller's. A tensor that does not fit is let
in alone.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from shardtool import digest, schedule
from shardtool.budget import Arena, Gate, limit_of, peak_memory
from shardtool.checkpoint import Checkpoint, tensor_of
from shardtool.engine import execute
from shardtool.errors import TensorMismatch, UsageError
from shardtool.ops.limits import readers
from shardtool.ops.rank import Item, chosen, equal, items, number, opened
from shardtool.schedule import Target

if TYPE_CHECKING:
    import torch

    from shardtool.sinks.tensor import TensorSink

CONCURRENCY = 16
SCRATCH = 32 << 20
"""Bytes in which small neighbours are read together, at most."""
LEAST = 64 << 10
"""The smallest limit with which tensors can be read straight into place."""
UNLIMITED = 1 << 40


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What loading one rank came to. Bytes and seconds."""

    rank: int | None
    device: str
    tensors: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading came to. ``peak_memory``: the most that the process has had resident, in bytes."""

    uri: str
    kind: str
    ranks: tuple[RankLoad, ...]
    tensors: int
    bytes: int
    seconds: float
    verified: bool
    peak_memory: int
    notes: tuple[str, ...] = ()


def stream(
    uri: str | os.PathLike[str],
    *,
    rank: int | None = None,
    device: str = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
    pattern: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` for every tensor of a rank, in the order of its files; the caller owns them.

    ``rank`` may be left out where there is only one, or none (a Hugging Face checkpoint). ``verify``: check each
    chunk's digest on the way, if there is a manifest; a damaged tensor raises ``ChecksumMismatch`` before it is
    handed over. ``memory_limit``: bytes or a text such as ``1GiB``.
    """
    checkpoint = opened(uri, rank, pattern)
    with checkpoint.store.closed_on_failure():
        found = items(checkpoint, chosen(checkpoint, rank), verify=verify)
        tensors = handed(
            checkpoint, found, device, memory_limit=memory_limit, concurrency=concurrency, progress=progress
        )
    return _closing(checkpoint, tensors)


def _closing(checkpoint: Checkpoint, tensors: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The same, with the checkpoint's store closed at the end."""
    with checkpoint.store:
        yield from tensors


def load(
    uri: str | os.PathLike[str],
    *,
    rank: int | None = None,
    device: str = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
    pattern: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors of a rank by name. The arguments are those of ``stream``."""
    return dict(
        stream(
            uri,
            rank=rank,
            device=device,
            concurrency=concurrency,
            memory_limit=memory_limit,
            verify=verify,
            pattern=pattern,
            progress=progress,
        )
    )


def load_into(
    target: torch.nn.Module | Mapping[str, torch.Tensor],
    uri: str | os.PathLike[str],
    *,
    rank: int | None = None,
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
    pattern: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill the parameters of a module, or the tensors of a state dict, in place.

    Names, shapes and dtypes are compared first, and that no two tensors of the target overlap: ``TensorMismatch`` means
    that nothing was written. After any other error, such as a ``ChecksumMismatch`` on the way, the target is written in
    part and must not be used. Two names of one and the same memory (tied weights) may be filled if the checkpoint's
    tensors are equal, and one of them need not be in it.
    """
    import torch

    if not isinstance(target, torch.nn.Module | Mapping):
        raise UsageError(f"target is a {type(target).__name__}, neither a module nor tensors by name")
    given = target.state_dict(keep_vars=True) if isinstance(target, torch.nn.Module) else dict(target)
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    checkpoint = opened(uri, rank, pattern)
    with checkpoint.store:
        found = items(checkpoint, chosen(checkpoint, rank), verify=verify)
        fill(checkpoint, found, tensors, memory_limit=memory_limit, concurrency=concurrency, progress=progress)


def fill(
    checkpoint: Checkpoint,
    found: list[Item],
    tensors: Mapping[str, torch.Tensor],
    *,
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """``load_into`` for some tensors of a checkpoint that is open: each into the tensor of its name, in place."""
    import torch

    with torch.no_grad():
        places = _Given(tensors)
        _check_fit(found, tensors, checkpoint)
        means = _means(checkpoint, found, places, memory_limit, concurrency)
        _exhaust(_stream(checkpoint, found, places, means, progress))


def handed(
    checkpoint: Checkpoint,
    found: list[Item],
    device: str,
    *,
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """``stream`` for some tensors of a checkpoint that is open."""
    places = _Fresh(device)
    return _stream(checkpoint, found, places, _means(checkpoint, found, places, memory_limit, concurrency), progress)


def measure(
    uri: str | os.PathLike[str],
    *,
    rank: int | None = None,
    device: str = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
    pattern: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Stream a rank, or every rank, dropping the tensors, and report.

    Rank r goes to ``cuda:r`` where there are as many GPUs.
    """
    began = time.monotonic()
    checkpoint = opened(uri, rank, pattern)
    ranks: tuple[int | None, ...] = (rank,) if rank is not None else (checkpoint.ranks or (None,))
    with checkpoint.store.closed_on_failure():
        jobs = [(r, items(checkpoint, r, verify=verify), _device_of(device, r, len(ranks))) for r in ranks]
        every = [item for _, found, _ in jobs for item in found]
        # One set of buffers for all ranks: memory that one of them has used is there for the next.
        means = _means(checkpoint, every, _Fresh(jobs[0][2]), memory_limit, concurrency)
    total = sum(item.entry.nbytes for item in every)
    done = 0

    def tell(so_far: int, _of: int) -> None:
        if progress is not None:
            progress(done + so_far, total)

    loads = []
    with checkpoint.store:
        for r, found, where in jobs:
            at = time.monotonic()
            _exhaust(_stream(checkpoint, found, _Fresh(where), means, tell))
            nbytes = sum(item.entry.nbytes for item in found)
            done += nbytes
            loads.append(RankLoad(r, where, len(found), nbytes, time.monotonic() - at))
    verified = verify and all(item.chunks is not None for item in every)
    notes = () if verified or not verify else ("there is no manifest, so that no digest was checked",)
    return LoadReport(
        checkpoint.uri,
        checkpoint.kind,
        tuple(loads),
        sum(one.tensors for one in loads),
        total,
        time.monotonic() - began,
        verified,
        peak_memory(),
        notes,
    )


def _exhaust(tensors: Iterator[object]) -> None:
    """Take all and keep none: each is gone before the next is asked for, which a loop's variable would not allow."""
    deque(tensors, maxlen=0)


def _device_of(device: str, rank: int | None, ranks: int) -> str:
    """``cuda`` is the rank's own GPU where there is one for each, else the first."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{rank}" if rank is not None and torch.cuda.device_count() >= max(ranks, rank + 1) else "cuda:0"


def _check_fit(found: list[Item], tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Refuse a target that does not take these tensors, each in memory of its own. Nothing is written."""
    from shardtool.sinks.tensor import Memory, overlapping

    uri = checkpoint.uri
    filled: dict[Memory, Item] = {}
    for item in found:
        tensor = tensors.get(item.name)
        if tensor is None:
            raise TensorMismatch(
                f"{uri} has the tensor {item.name!r}, which the target does not have; nothing was written"
            )
        kind = item.entry.dtype.torch()
        if tuple(tensor.shape) != item.entry.shape or tensor.dtype is not kind:
            raise TensorMismatch(
                f"{uri}: tensor {item.name!r} is {kind} {list(item.entry.shape)}, the target's is "
                f"{tensor.dtype} {list(tensor.shape)}; "
                "nothing was written"
            )
        if not tensor.numel():
            continue
        memory = Memory.of(tensor)
        if memory.folded:
            raise TensorMismatch(
                f"the target's tensor {item.name!r} has several elements in one place (shape {list(tensor.shape)}, "
                f"strides {list(tensor.stride())}); give it memory of its own, nothing was written"
            )
        other = filled.setdefault(memory, item)
        if other is not item and memory.real and not equal(checkpoint, item, other):
            raise TensorMismatch(
                f"{uri}: {item.name!r} and {other.name!r} differ, but they share their memory in the target (tied "
                "weights); nothing was written"
            )
    if pair := overlapping(filled):
        first, second = sorted(filled[memory].name for memory in pair)
        raise TensorMismatch(f"the target's tensors {first!r} and {second!r} overlap in memory; nothing was written")
    names = {item.name for item in found}
    for name, tensor in tensors.items():
        if name not in names and tensor.numel() and Memory.of(tensor) not in filled:
            raise TensorMismatch(f"the target's tensor {name!r} is not in {uri}; nothing was written")


class _Fresh:
    """Destinations: new tensors on a device."""

    def __init__(self, device: str) -> None:
        import torch

        if not isinstance(device, str | torch.device):
            raise UsageError(f"device={device!r} is not a device; write cpu, cuda or cuda:0")
        try:
            self._device = torch.device(device)
        except RuntimeError:
            raise UsageError(f"--device {device!r} is not a device; write cpu, cuda or cuda:0") from None
        if self._device.type == "cuda" and (self._device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        if self._device.type not in ("cpu", "cuda", "meta"):
            raise UsageError(f"--device {device!r} is not supported; write cpu, cuda or cuda:0")

    def staging(self, item: Item) -> int:
        return 0 if self._device.type == "cpu" else 1

    def make(self, item: Item) -> torch.Tensor:
        from shardtool.sinks.tensor import empty

        entry = item.entry
        if self._device.type == "cpu":
            return empty(entry.dtype, entry.shape, entry.nbytes)
        import torch

        return torch.empty(entry.shape, dtype=entry.dtype.torch(), device=self._device)


class _Given:
    """Destinations: tensors that exist."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def staging(self, item: Item) -> int:
        from shardtool.sinks.tensor import lends

        return 0 if lends(self._tensors[item.name]) else 1

    def make(self, item: Item) -> torch.Tensor:
        return self._tensors[item.name]


@dataclass(frozen=True, slots=True)
class _Means:
    """What a run may use, and one after it again: blocks to read into, room for tensors that wait, threads."""

    arena: Arena
    gate: Gate
    threads: int
    want: int


def _means(
    checkpoint: Checkpoint,
    found: list[Item],
    places: _Fresh | _Given,
    memory_limit: int | str | None,
    concurrency: int | None,
) -> _Means:
    """Divide the limit between blocks and tensors that are read ahead."""
    number(concurrency, "concurrency")
    if not isinstance(memory_limit, str):
        number(memory_limit, "memory_limit")
    threads = readers(concurrency, CONCURRENCY)
    if any(places.staging(item) for item in found):
        least = max(min(digest.CHUNK, item.entry.nbytes) for item in found) + LEAST
    else:
        least = LEAST
    limit = limit_of(memory_limit, least=least, what=f"loading {checkpoint.uri}", most=UNLIMITED)
    if least > LEAST:
        size = max(least - LEAST // 2, min(limit // 2, threads * digest.CHUNK))
    else:
        size = min(limit // 2, SCRATCH)
    return _Means(Arena(size), Gate(limit - size), threads, max(1, min(size, limit - size) // 2))


def _stream(
    checkpoint: Checkpoint,
    found: list[Item],
    places: _Fresh | _Given,
    means: _Means,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Any]]:
    """Run the engine in a thread and hand its tensors over in order."""
    from shardtool.sinks.tensor import TensorSink

    arena, gate = means.arena, means.gate
    ready: SimpleQueue[TensorSink | BaseException | None] = SimpleQueue()
    total = sum(item.entry.nbytes for item in found)

    def sink_of(item: Item) -> TensorSink:
        return TensorSink(
            item.name,
            item.entry.dtype,
            item.entry.shape,
            item.entry.nbytes,
            where=checkpoint.store.locate(item.file.key),
            make=lambda: places.make(item),
            staging=places.staging(item),
            gate=gate,
            chunks=item.chunks,
            ready=ready.put,
        )

    def groups() -> Iterator[list[Target]]:
        for item in found:
            sink = sink_of(item)
            if not item.entry.nbytes:
                sink.begin()
                continue
            yield [_target(item, sink)]

    def work() -> None:
        done = 0

        def tell(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        steps = schedule.steps(groups(), limit=arena.size, want=means.want, longest=digest.CHUNK, tile=digest.CHUNK)
        try:
            execute(steps, checkpoint.store, arena, readers=means.threads, progress=tell, stop=gate.stop)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    def stop() -> None:
        arena.stop()
        gate.stop()

    return _handed_over(
        [item.name for item in found], ready, gate, Thread(target=work, name="shardtool-load", daemon=True), stop
    )


def _handed_over(
    names: list[str],
    ready: SimpleQueue[TensorSink | BaseException | None],
    gate: Gate,
    thread: Thread,
    stop: Callable[[], None],
) -> Iterator[tuple[str, Any]]:
    waiting: dict[str, TensorSink] = {}
    thread.start()
    try:
        for name in names:
            while name not in waiting:
                came = ready.get()
                if isinstance(came, BaseException):
                    raise came
                if came is None:
                    raise AssertionError(f"the engine ended without {name!r}")
                waiting[came.name] = came
                del came
            sink = waiting.pop(name)
            tensor, sink.target = sink.target, None
            yield name, tensor
            del tensor
            gate.leave(sink.nbytes)
    except BaseException:
        stop()
        raise
    finally:
        thread.join()


def _target(item: Item, sink: TensorSink) -> Target:
    """The tensor as it lies in its file, counted from its own start."""
    tensor = tensor_of(item.file.key, item.entry)
    return Target(tensor, tensor.pieces(), sink, 0, sink.staging)
