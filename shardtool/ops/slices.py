"""One rank's tensors of a checkpoint that was cut for nobody, or for other ranks: each reads only what it needs.

The source is whatever ``save`` and ``reshard`` take: whole tensors, or shards of any sizes, whose recipe is read
backwards. The tensors equal those that ``save`` writes for the rank, one by one.

::

    sliced      (name, tensor) one after the other, by oneself or together with other ranks
    Wanted      what is wanted: a rank of some sizes, by which layout, in which dtype
    opened      ... of a URI, as a plan: what comes, of which bytes
    held        ... of a checkpoint that is open
    plan        ... of a source that is open
    whole       all source tensors of shards instead, each as it was, for an engine that cuts them itself
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shardtool import computed
from shardtool.checkpoint import Checkpoint, open_checkpoint
from shardtool.dtypes import DType, lossless
from shardtool.errors import NotFound, PlanError
from shardtool.exchange import exchange_for, heard
from shardtool.layouts.base import Outline
from shardtool.mosaic import resolve
from shardtool.ops import layout as layouts
from shardtool.ops import source as sources
from shardtool.ops.bring import Slices, slice_of
from shardtool.ops.layout import Choice
from shardtool.ops.rank import number, text
from shardtool.ops.source import Source
from shardtool.ops.stream import Handed
from shardtool.ops.together import together
from shardtool.parallel import Parallel
from shardtool.plan import Piece, itself
from shardtool.recipe import Recipe, Rule, Share
from shardtool.stores import Address
from shardtool.window import row_major

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is wanted of a checkpoint: what rank ``rank`` of ``tp`` times ``pp`` holds.

    ``layout``, ``engine_version``, ``dtype``, ``expert_parallel``: as in ``save`` for whole tensors, as in ``reshard``
    for shards, which know their own. ``verify``: check the digests of shards.
    """

    tp: int
    rank: int
    pp: int = 1
    expert_parallel: bool | None = None
    layout: str | None = None
    engine_version: str | None = None
    dtype: str | None = None
    verify: bool = True


def sliced(
    uri: Address,
    *,
    tp: int,
    rank: int,
    pp: int = 1,
    expert_parallel: bool | None = None,
    layout: str | None = None,
    engine_version: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    source_pattern: str | None = None,
    verify: bool = True,
    distributed: bool | str = False,
    scope: str = "node",
    group: dist.ProcessGroup | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` for what rank ``rank`` of ``tp`` times ``pp`` holds; the caller owns them.

    ``uri``: whole tensors, or shards of any sizes. ``layout``, ``engine_version``, ``dtype``, ``expert_parallel``: as
    in ``save`` for whole tensors, as in ``reshard`` for shards, which know their own. ``source_pattern``: the names of
    shards without a manifest. ``device``, ``memory_limit``, ``concurrency``: as in ``stream``. ``verify``: check the
    digests of shards; a chunk of which a part is needed is read whole then.

    ``distributed``: whether bytes that several ranks of this node want (of all, with ``scope="global"``; of ``group``)
    are read by one of them and exchanged; ``auto`` is for stores that are not local. Then every process of the world
    calls this at the same time, each for a rank of its own, and takes all tensors: one that fails or stops ends the
    others with its reason.

    Raises ``NotFound`` for a rank that there is not, and what ``save`` raises for a model that cannot be cut so.
    """
    wanted = Wanted(
        tp=tp,
        rank=rank,
        pp=pp,
        expert_parallel=expert_parallel,
        layout=layout,
        engine_version=engine_version,
        dtype=dtype,
        verify=verify,
    )
    exchange = exchange_for(uri, distributed, group=group, scope=scope)
    with heard(exchange):
        found = opened(uri, wanted, source_pattern=source_pattern)
        with found.store.closed_on_failure():
            take = found.tensors if exchange is None else partial(together, found, exchange)
            tensors = take(device=device, memory_limit=memory_limit, concurrency=concurrency, progress=progress)

    def unbegun() -> None:
        found.close()
        if exchange is not None:
            exchange.fail(GeneratorExit())

    return Handed(_closing(found, tensors), unbegun)


def _closing(found: Slices, tensors: Iterator[tuple[str, Any]]) -> Generator[tuple[str, Any], None, None]:
    with found:
        yield from tensors


def opened(uri: Address, wanted: Wanted, *, source_pattern: str | None = None) -> Slices:
    """What a rank holds. Reads headers, and tensors where a layout must know whether two are equal."""
    text(source_pattern, "source_pattern")
    checkpoint = open_checkpoint(uri, shard_pattern=source_pattern)
    with checkpoint.store.closed_on_failure():
        return held(checkpoint, wanted)


def held(checkpoint: Checkpoint, wanted: Wanted) -> Slices:
    """``opened`` for a checkpoint that is open."""
    number(wanted.rank, "rank")
    for value, name in ((wanted.layout, "layout"), (wanted.dtype, "dtype")):
        text(value, name)
    sizes = Parallel(wanted.tp, wanted.pp)
    if wanted.rank not in sizes.ranks:
        raise NotFound(f"{sizes} has no rank {wanted.rank}; it has ranks 0 to {sizes.ranks[-1]}")
    source, watch = sources.checked(checkpoint, verify=wanted.verify)
    origin = source.origin
    ep = wanted.expert_parallel
    if ep is None:
        ep = origin is not None and origin.parallel.ep
    choice = Choice(wanted.layout or ("" if origin is not None else "vllm"), wanted.engine_version)
    found = plan(source, Parallel(wanted.tp, wanted.pp, ep), wanted.rank, choice, wanted.dtype or "auto")
    return replace(found, checked=watch)


def plan(source: Source, parallel: Parallel, rank: int, choice: Choice, dtype: str = "auto") -> Slices:
    """What a rank of these sizes holds of a source, by a layout. Raises ``PlanError`` where it cannot be cut so."""
    made, outline, held = layouts.outlined(source, choice, parallel, dtype)
    return of_outline(source, parallel, rank, outline, layout=made.title, dtype=held)


def of_outline(source: Source, parallel: Parallel, rank: int, outline: Outline, *, layout: str, dtype: DType) -> Slices:
    """What a rank holds of a source by what a layout has said of it. ``layout``: how people name that one."""
    store, resolve, computing = computed.over(source.store, source.catalog, outline.recipe)
    found = [slice_of(tensor, resolve) for tensor in outline.recipe.tensors(rank)]
    found.sort(key=lambda part: part.first)
    return Slices(
        source=source,
        store=store,
        parallel=parallel,
        rank=rank,
        slices=tuple(found),
        computing=computing,
        recipe=outline.recipe,
        resolve=resolve,
        layout=layout,
        dtype=dtype,
        notes=tuple(outline.notes),
    )


def whole(source: Source, parallel: Parallel, rank: int) -> Slices:
    """All source tensors that shards hold, for a rank of an engine that cuts them itself: every rank holds all.

    Each has its dtype of old, or the narrower one of the shards. What was dropped and not kept is left out; raises
    ``PlanError`` for another one that the shards do not hold.
    """
    made = source.origin
    assert made is not None
    lost = {dropped.name for dropped in made.dropped if not dropped.kept}
    tensors = []
    for name, logical in source.inventory.items():
        held = source.catalog.get(name)
        if held is not None:
            dtype = logical.dtype if lossless(logical.dtype, held.dtype) else held.dtype
            tensors.append(itself(name, dtype, logical.shape))
        elif name not in lost:
            raise PlanError(f"{source.uri} does not hold {name!r}, which its manifest lists")

    def rule(name: str, dtype: DType, shape: tuple[int, ...]) -> Rule:
        window = row_major(shape)
        return Rule(name, dtype, (Share(tuple(parallel.ranks), shape, (Piece(window, window, name),)),))

    found = [slice_of(tensor, lambda one: resolve(one, source.catalog)) for tensor in tensors]
    found.sort(key=lambda part: part.first)
    return Slices(
        source=source,
        store=source.store,
        parallel=parallel,
        rank=rank,
        slices=tuple(found),
        computing=0,
        recipe=Recipe(tuple(rule(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)),
        resolve=lambda tensor: resolve(tensor, source.catalog),
        layout="whole tensors",
        dtype=made.dtype,
    )
