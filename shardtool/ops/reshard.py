"""``reshard``: shards of one tp become shards of another, without the source model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardtool.errors import PlanError
from shardtool.ops.guard import guarded
from shardtool.ops.job import Means, Summary
from shardtool.ops.layout import Choice
from shardtool.ops.save import PART_SIZE, Cut, convert
from shardtool.ops.sums import Sums
from shardtool.parallel import Parallel
from shardtool.stores import Address
from shardtool.units import parse_size


def reshard(
    uri: Address,
    output: Address,
    *,
    tp: int,
    pp: int = 1,
    expert_parallel: bool | None = None,
    layer_partition: Sequence[int] | None = None,
    layout: str | None = None,
    engine_version: str | None = None,
    engine_python: str | None = None,
    trust_remote_code: bool = False,
    moe_backend: str | None = None,
    pattern: str | None = None,
    source_pattern: str | None = None,
    max_part_size: int | str = PART_SIZE,
    verify: bool = True,
    ranks: Sequence[int] | None = None,
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    sha256: bool = False,
    sglang_sha256: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write the shards of another ``tp``: byte for byte what ``save`` at that tp writes.

    The layout's table in the manifest is evaluated again, so that nothing but the checkpoint is needed. One that was
    traced knows its own sizes only: for others say ``layout``. What says more of the layout (``engine_version`` and the
    rest) is for that; ``moe_backend`` is then the input's unless another is said. ``verify``: check the input's digests
    (with ``ranks`` only of what is read for them). ``source_pattern``: the names of shards without a manifest.
    ``expert_parallel``: None is as the input is. The rest is as in ``save``.
    """
    means = Means(
        memory_limit=memory_limit,
        concurrency=concurrency,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
        ranks=ranks,
        sums=Sums(sha256, sglang_sha256),
    )
    guard = guarded(uri, source_pattern, verify=verify)
    source = guard.source
    with source.store:
        if source.origin is None:
            raise PlanError(f"{source.uri} is not sharded; use shardtool save")
        whole = source.origin.parallel.ep if expert_parallel is None else expert_parallel
        partition = None if layer_partition is None else tuple(layer_partition)
        choice = Choice(layout or "", engine_version, engine_python, trust_remote_code, moe_backend)
        most = parse_size(max_part_size, "--max-part-size")
        cut = Cut(Parallel(tp, pp, whole, partition), choice, pattern, most)
        return convert(source, output, means, cut, guard)
