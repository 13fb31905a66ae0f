"""``load``: stream a rank's tensors (or a whole checkpoint's) to a device, bounded and checked.

::

    stream      (name, tensor) one after the other, in the order of the files; the caller owns each
    ├── load        all of them in a dict
    ├── load_into   straight into existing parameters
    └── measure     counted and dropped, for people who want to know how fast it is

A thread dispatches, readers fill tensors, the caller takes them. The memory limit covers buffers and the tensors
that are read ahead; what was handed over, and the one that is being filled, are the caller's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from shardtool import digest, schedule
from shardtool.budget import Arena, Gate, default_limit, peak_memory
from shardtool.checkpoint import Checkpoint, WeightFile, open_checkpoint, stored_of, with_headers
from shardtool.engine import execute
from shardtool.errors import BudgetTooSmall, NotFound, TensorMismatch, UsageError
from shardtool.header import Entry
from shardtool.ops.limits import readers
from shardtool.plan import Tensor
from shardtool.schedule import Target, whole_target
from shardtool.units import parse_size, show_size

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
class _Item:
    """One tensor to load."""

    name: str
    file: WeightFile
    entry: Entry
    chunks: tuple[str, ...] | None


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
    checkpoint = _opened(os.fspath(uri), rank, pattern)
    with checkpoint.store.closed_on_failure():
        items = _items(checkpoint, _rank(checkpoint, rank), verify=verify)
    return _closing(checkpoint, _stream(checkpoint, items, _Fresh(device), concurrency, memory_limit, progress))


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

    Names, shapes and dtypes are compared first: ``TensorMismatch`` means that nothing was written. A tensor of the
    target that shares its memory with another (tied weights) need not be in the checkpoint.
    """
    import torch

    given = target.state_dict(keep_vars=True) if isinstance(target, torch.nn.Module) else dict(target)
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    checkpoint = _opened(os.fspath(uri), rank, pattern)
    with checkpoint.store, torch.no_grad():
        items = _items(checkpoint, _rank(checkpoint, rank), verify=verify)
        _check_fit(items, tensors, checkpoint)
        for _ in _stream(checkpoint, items, _Given(tensors), concurrency, memory_limit, progress):
            pass


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
    checkpoint = _opened(os.fspath(uri), rank, pattern)
    ranks: tuple[int | None, ...] = (rank,) if rank is not None else (checkpoint.ranks or (None,))
    jobs = [(r, _items(checkpoint, r, verify=verify)) for r in ranks]
    total = sum(item.entry.nbytes for _, items in jobs for item in items)
    done = 0

    def tell(so_far: int, _of: int) -> None:
        if progress is not None:
            progress(done + so_far, total)

    loads = []
    with checkpoint.store:
        for r, items in jobs:
            at = time.monotonic()
            where = _device_of(device, r, len(ranks))
            for _ in _stream(checkpoint, items, _Fresh(where), concurrency, memory_limit, tell):
                pass
            nbytes = sum(item.entry.nbytes for item in items)
            done += nbytes
            loads.append(RankLoad(r, where, len(items), nbytes, time.monotonic() - at))
    verified = verify and all(item.chunks is not None for _, items in jobs for item in items)
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


def _device_of(device: str, rank: int | None, ranks: int) -> str:
    """``cuda`` is the rank's own GPU where there is one for each, else the first."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{rank}" if rank is not None and torch.cuda.device_count() >= max(ranks, rank + 1) else "cuda:0"


def _opened(uri: str, rank: int | None, pattern: str | None) -> Checkpoint:
    checkpoint = open_checkpoint(uri, shard_pattern=pattern)
    if (
        checkpoint.manifest is not None
        and rank is not None
        and rank not in range(checkpoint.manifest.tp * checkpoint.manifest.pp)
    ):
        raise NotFound(
            f"{uri} has no rank {rank}; it has ranks 0 to {checkpoint.manifest.tp * checkpoint.manifest.pp - 1}"
        )
    with checkpoint.store.closed_on_failure():
        return with_headers(checkpoint, None if rank is None else [rank])


def _rank(checkpoint: Checkpoint, rank: int | None) -> int | None:
    """The rank to load: the only one, if none was said."""
    ranks = checkpoint.ranks
    if not ranks:
        if rank is not None:
            raise NotFound(f"{checkpoint.uri} has no rank {rank}: its tensors are whole, leave the rank out")
        return None
    if rank is None:
        if len(ranks) > 1:
            raise UsageError(f"{checkpoint.uri} has {len(ranks)} ranks: say which one to load with rank=")
        return ranks[0]
    return rank


def _items(checkpoint: Checkpoint, rank: int | None, *, verify: bool) -> list[_Item]:
    """The tensors of a rank in the order of their bytes, with their digests.

    What differs from the manifest is refused.
    """
    records = {record.key: record for record in checkpoint.manifest.files} if checkpoint.manifest else {}
    if rank is not None and rank not in checkpoint.ranks:
        whole = " (its tensors are whole, of no rank)" if checkpoint.kind == "huggingface" else ""
        raise NotFound(f"{checkpoint.uri} has no rank {rank}{whole}; leave the rank out or name one that it has")
    entries = checkpoint.entries(rank)
    chunks: dict[str, tuple[str, ...]] = {}
    if verify:
        for file in checkpoint.files:
            record = records.get(file.key)
            if record is None or file.rank != rank:
                continue
            names = [entry.name for entry in file.header.entries]
            if names != [t.name for t in record.tensors] or file.size != record.size:
                raise TensorMismatch(
                    f"{checkpoint.store.locate(file.key)} does not hold what the manifest lists; run shardtool verify"
                )
            chunks.update({t.name: t.digest.chunks for t in record.tensors})
    found = [_Item(name, file, entry, chunks.get(name)) for name, (file, entry) in entries.items()]
    for item in found:
        if item.chunks is not None and len(item.chunks) != -(-item.entry.nbytes // digest.CHUNK):
            raise TensorMismatch(
                f"{checkpoint.uri}: tensor {item.name!r} has another size than its digests; run shardtool verify"
            )
    return found


def _check_fit(items: list[_Item], tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    uri = checkpoint.uri
    filled: dict[tuple[int, torch.device], _Item] = {}
    for item in items:
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
        other = filled.setdefault((tensor.data_ptr(), tensor.device), item)
        if other is not item and tensor.device.type != "meta" and not _equal(checkpoint, item, other):
            raise TensorMismatch(
                f"{uri}: {item.name!r} and {other.name!r} differ, but they share their memory in the target (tied "
                "weights); nothing was written"
            )
    names = {item.name for item in items}
    for name, tensor in tensors.items():
        if name not in names and tensor.numel() and (tensor.data_ptr(), tensor.device) not in filled:
            raise TensorMismatch(f"the target's tensor {name!r} is not in {uri}; nothing was written")


def _equal(checkpoint: Checkpoint, a: _Item, b: _Item) -> bool:
    """Whether two tensors have the same bytes, by their digests or else by reading them."""
    if a.entry.nbytes != b.entry.nbytes:
        return False
    if a.chunks is not None and b.chunks is not None:
        return a.chunks == b.chunks
    block = memoryview(bytearray(2 << 20))
    left, right = block[: 1 << 20], block[1 << 20 :]
    for at in range(0, a.entry.nbytes, len(left)):
        n = min(len(left), a.entry.nbytes - at)
        checkpoint.store.readinto(a.file.key, a.entry.offset + at, left[:n])
        checkpoint.store.readinto(b.file.key, b.entry.offset + at, right[:n])
        if left[:n] != right[:n]:
            return False
    return True


class _Fresh:
    """Destinations: new tensors on a device."""

    def __init__(self, device: str) -> None:
        import torch

        try:
            self._device = torch.device(device)
        except RuntimeError:
            raise UsageError(f"--device {device!r} is not a device; write cpu, cuda or cuda:0") from None
        if self._device.type == "cuda" and (self._device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        if self._device.type not in ("cpu", "cuda", "meta"):
            raise UsageError(f"--device {device!r} is not supported; write cpu, cuda or cuda:0")

    def staging(self, item: _Item) -> int:
        return 0 if self._device.type == "cpu" else 1

    def make(self, item: _Item) -> torch.Tensor:
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

    def staging(self, item: _Item) -> int:
        from shardtool.sinks.tensor import lends

        return 0 if lends(self._tensors[item.name]) else 1

    def make(self, item: _Item) -> torch.Tensor:
        return self._tensors[item.name]


def _limits(items: list[_Item], staged: bool, memory_limit: int | str | None, concurrency: int) -> tuple[int, int]:
    """(arena, gate): how the limit is divided between buffers and tensors that are read ahead."""
    limit = default_limit() if memory_limit is None else parse_size(memory_limit, "--memory-limit")
    least = max((min(digest.CHUNK, item.entry.nbytes) for item in items), default=0) + LEAST if staged else LEAST
    if limit == -1:
        limit = UNLIMITED
    elif limit == 0:
        limit = least
    if limit < least:
        raise BudgetTooSmall(
            f"--memory-limit {show_size(limit)} is too small to load: {least} bytes would do", needed=least
        )
    arena = max(least - LEAST // 2, min(limit // 2, concurrency * digest.CHUNK)) if staged else min(limit // 2, SCRATCH)
    return arena, limit - arena


def _stream(
    checkpoint: Checkpoint,
    items: list[_Item],
    places: _Fresh | _Given,
    concurrency: int | None,
    memory_limit: int | str | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Any]]:
    """Run the engine in a thread and hand its tensors over in order."""
    from shardtool.sinks.tensor import TensorSink

    threads = readers(concurrency, CONCURRENCY)
    staging = {item.name: places.staging(item) for item in items}
    size, ahead = _limits(items, any(staging.values()), memory_limit, threads)
    arena, gate = Arena(size), Gate(ahead)
    ready: SimpleQueue[TensorSink | BaseException | None] = SimpleQueue()
    total = sum(item.entry.nbytes for item in items)

    def sink_of(item: _Item) -> TensorSink:
        return TensorSink(
            item.name,
            item.entry.dtype,
            item.entry.shape,
            item.entry.nbytes,
            where=checkpoint.store.locate(item.file.key),
            make=lambda: places.make(item),
            staging=staging[item.name],
            gate=gate,
            chunks=item.chunks,
            ready=ready.put,
        )

    def groups() -> Iterator[list[Target]]:
        for item in items:
            sink = sink_of(item)
            if not item.entry.nbytes:
                sink.begin()
                continue
            yield [_target(item, sink, staging[item.name])]

    def work() -> None:
        done = 0

        def tell(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        want = max(1, min(size, ahead) // 2)
        steps = schedule.steps(groups(), limit=size, want=want, longest=digest.CHUNK, tile=digest.CHUNK)
        try:
            execute(steps, checkpoint.store, arena, readers=threads, progress=tell, stop=gate.stop)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    def stop() -> None:
        arena.stop()
        gate.stop()

    return _handed_over(
        [item.name for item in items], ready, gate, Thread(target=work, name="shardtool-load", daemon=True), stop
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
                found = ready.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    raise AssertionError(f"the engine ended without {name!r}")
                waiting[found.name] = found
            sink = waiting.pop(name)
            tensor, sink.target = sink.target, None
            gate.leave(sink.nbytes)
            yield name, tensor
            del tensor
    finally:
        stop()
        thread.join()


def _target(item: _Item, sink: TensorSink, staging: int) -> Target:
    """The tensor as it lies in its file, counted from its own start."""
    stored = stored_of(item.file.key, item.entry)
    tensor = Tensor(item.name, stored.dtype, stored.shape, tuple, stored=stored)
    return whole_target(tensor, stored, sink, 0, staging)
