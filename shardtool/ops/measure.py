"""``load`` on the command line: tensors are brought, counted and dropped, and how fast that was is told.

::

    measure     one rank, every rank, or whole tensors
    joined      the group of the processes that torchrun started, for as long as a command runs
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from shardtool.budget import peak_memory
from shardtool.checkpoint import Checkpoint, open_checkpoint
from shardtool.engine import Clock
from shardtool.errors import UsageError
from shardtool.exchange import Exchange, exchange_for, heard, store_of
from shardtool.ops.bring import Slices
from shardtool.ops.limits import readers
from shardtool.ops.load import exhaust, for_whole, size
from shardtool.ops.rank import items, number, opened
from shardtool.ops.slices import Wanted, held
from shardtool.ops.stream import CONCURRENCY, Fresh, flow, means_for
from shardtool.ops.together import together
from shardtool.parallel import Parallel
from shardtool.stores import Address
from shardtool.stores.counting import CountingStore
from shardtool.units import show_size


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
    """What loading came to. ``peak_memory``: the most that the process has had resident, in bytes.

    ``stages``: where the time went, in seconds of all threads together (see ``engine.Clock``); ``storage_busy``: the
    seconds in which at least one of the ``readers`` was in the store.
    """

    uri: str
    kind: str
    ranks: tuple[RankLoad, ...]
    tensors: int
    bytes: int
    seconds: float
    verified: bool
    peak_memory: int
    notes: tuple[str, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    storage_busy: float = 0.0
    readers: int = 0


def measure(
    uri: Address,
    *,
    rank: int | None = None,
    device: str = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
    pattern: str | None = None,
    distributed: bool | str = "auto",
    scope: str = "node",
    own: int | None = None,
    block_size: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    tp: int | None = None,
    pp: int = 1,
    layout: str | None = None,
) -> LoadReport:
    """Stream a rank, or every rank, dropping the tensors, and report.

    Rank r goes to ``cuda:r`` where there are as many GPUs. ``own``: the rank of this process, which is loaded where
    there are ranks and none was said. ``tp``, ``pp``, ``layout``: what ranks of such sizes hold, whatever the
    checkpoint was cut for, as in ``stream``.
    """
    exchange = exchange_for(uri, distributed, scope=scope, device=device)
    with heard(exchange):
        if tp is not None or pp != 1 or layout is not None:
            if block_size is not None:
                raise UsageError("the size of a read follows from what is cut; leave --block-size out")
            sizes = Parallel(1 if tp is None else tp, pp)
            one = own if rank is None else rank
            how = _Cut(sizes, layout, device, concurrency, memory_limit, verify, exchange)
            return how.measured(uri, pattern, sizes.ranks if one is None else (one,), progress)
        return _measured(
            uri, rank, own, device, concurrency, memory_limit, verify, pattern, block_size, exchange, progress
        )


def _measured(
    uri: Address,
    rank: int | None,
    own: int | None,
    device: str,
    concurrency: int | None,
    memory_limit: int | str | None,
    verify: bool,
    pattern: str | None,
    block_size: int | str | None,
    exchange: Exchange | None,
    progress: Callable[[int, int], None] | None,
) -> LoadReport:
    began = time.monotonic()
    checkpoint = opened(uri, rank, pattern, own=own)
    if rank is None and checkpoint.ranks:
        rank = own
    ranks: tuple[int | None, ...] = (rank,) if rank is not None else (checkpoint.ranks or (None,))
    exchange = for_whole(exchange, ranks[0])
    number(concurrency, "concurrency")
    size(memory_limit)
    with checkpoint.store.closed_on_failure():
        jobs = [(r, items(checkpoint, r, verify=verify), Fresh(_device_of(device, r, len(ranks)))) for r in ranks]
        every = [item for _, found, _ in jobs for item in found]
        # One set of buffers for all ranks: memory that one of them has used is there for the next.
        many = 1 if exchange is None else exchange.size
        means = means_for(checkpoint, every, jobs[0][2], memory_limit, concurrency, ranks=many, block_size=block_size)
    total = sum(item.entry.nbytes for item in every)
    done = 0

    def tell(so_far: int, _of: int) -> None:
        if progress is not None:
            progress(done + so_far, total)

    loads = []
    try:
        with checkpoint.store:
            for r, found, where in jobs:
                at = time.monotonic()
                exhaust(flow(checkpoint, found, where, means, progress=tell, exchange=exchange))
                nbytes = sum(item.entry.nbytes for item in found)
                done += nbytes
                loads.append(RankLoad(r, str(where.device), len(found), nbytes, time.monotonic() - at))
    finally:
        means.slabs.stop()
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
        dict(means.clock.seconds),
        means.clock.busy,
        means.threads,
    )


@dataclass(frozen=True, slots=True)
class _Cut:
    """How ranks of some sizes are loaded from a checkpoint that was cut otherwise."""

    sizes: Parallel
    layout: str | None
    device: str
    concurrency: int | None
    memory_limit: int | str | None
    verify: bool
    exchange: Exchange | None

    def measured(
        self,
        uri: Address,
        pattern: str | None,
        ranks: Sequence[int],
        progress: Callable[[int, int], None] | None,
    ) -> LoadReport:
        """Load ranks one after the other. With an exchange: the one of this process, while others load theirs."""
        began = time.monotonic()
        checkpoint = open_checkpoint(uri, shard_pattern=pattern)
        loads, clock, done = [], Clock(), 0
        with CountingStore(checkpoint.store) as store:
            opened = replace(checkpoint, store=store)
            jobs = [(r, self._held(opened, r), Fresh(_device_of(self.device, r, len(ranks))).device) for r in ranks]
            headers, total = store.bytes_read, sum(found.nbytes for _, found, _ in jobs)

            def tell(so_far: int, _of: int) -> None:
                if progress is not None:
                    progress(done + so_far, total)

            for r, found, where in jobs:
                at = time.monotonic()
                take = found.tensors if self.exchange is None else partial(together, found, self.exchange)
                exhaust(
                    take(
                        device=str(where),
                        memory_limit=self.memory_limit,
                        concurrency=self.concurrency,
                        progress=tell,
                        clock=clock,
                    )
                )
                done += found.nbytes
                loads.append(RankLoad(r, str(where), len(found.slices), found.nbytes, time.monotonic() - at))
        verified = all(found.checked is not None for _, found, _ in jobs)
        notes = [f"cut for {self.sizes}: {show_size(store.bytes_read - headers)} were read for {show_size(total)}"]
        if self.verify and not verified:
            notes.append("there is no manifest, so that no digest was checked")
        return LoadReport(
            checkpoint.uri,
            checkpoint.kind,
            tuple(loads),
            sum(one.tensors for one in loads),
            total,
            time.monotonic() - began,
            verified,
            peak_memory(),
            tuple(notes),
            dict(clock.seconds),
            clock.busy,
            readers(self.concurrency, CONCURRENCY),
        )

    def _held(self, checkpoint: Checkpoint, rank: int) -> Slices:
        tp, pp = self.sizes.tp, self.sizes.pp
        return held(checkpoint, Wanted(tp=tp, pp=pp, rank=rank, layout=self.layout, verify=self.verify))


def _device_of(device: str, rank: int | None, ranks: int) -> str:
    """``cuda`` is the rank's own GPU where there is one for each, else the first."""
    if device != "cuda":
        return device
    import torch

    return f"cuda:{rank}" if rank is not None and torch.cuda.device_count() >= max(ranks, rank + 1) else "cuda:0"


@contextmanager
def joined(uri: Address, distributed: bool | str, device: str) -> Iterator[None]:
    """The group of the processes that ``torchrun`` started, if there is none yet and they will exchange something."""
    import torch.distributed as dist

    launched = dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched()
    if launched and distributed == "auto":
        with store_of(uri) as store:
            launched = store.remote
    if not launched or not distributed:
        yield
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
