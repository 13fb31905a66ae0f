"""``verify --engine``: would the installed engine take these shards? Asked of the engine, without a GPU.

The engine builds its model of each rank without memory; names, dtypes and shapes of its parameters are compared with
the headers of the rank's files. A name too many or too few is what engines refuse; a wrong shape is what they load
with a warning and garbage.
"""

from __future__ import annotations

from functools import partial

from shardtool.checkpoint import CONFIG, Checkpoint
from shardtool.errors import ShardtoolError, UsageError
from shardtool.mosaic import Logical
from shardtool.ops import layout as layouts
from shardtool.ops import source as sources
from shardtool.ops.structure import WHOLE, FileCheck, unlike
from shardtool.parallel import Parallel
from shardtool.tracing import parent as tracing


def check_fit(
    checkpoint: Checkpoint, engine: str, python: str | None, trust_remote_code: bool, moe_backend: str | None
) -> tuple[list[FileCheck], str]:
    """What the engine would stumble over, rank by rank, and which engine it was.

    ``moe_backend``: None is the one that the shards were made for. Raises ``UnsupportedModel`` where it cannot build
    the model.
    """
    ranks = checkpoint.ranks
    if not ranks:
        raise UsageError(f"--engine {engine}: {checkpoint.uri} is not sharded; it is for the ranks' own files")
    made = checkpoint.manifest
    parallel = made.parallel if made is not None else _sizes(checkpoint)
    held = {rank: checkpoint.held(rank) for rank in ranks}
    config = checkpoint.store.get(CONFIG, limit=1 << 30).decode("utf-8", "replace")
    side = [(found.key, found.size) for found in checkpoint.objects.values()]
    if made is not None:
        side = [(found.key, found.size) for found in made.side_files]
    (expected,) = tracing.held(
        tracing.Job(
            engine=engine,
            uri=checkpoint.uri,
            config=config,
            side=partial(layouts.write_side_files, checkpoint.store, side),
            tensors={name: Logical(s.dtype, s.shape) for tensors in held.values() for name, s in tensors.items()},
            parallels=(parallel,),
            dtype=None,
            trust_remote_code=trust_remote_code,
            moe_backend=layouts.moe_backend(moe_backend, made, engine),
        ),
        python=python,
    )
    whole = FileCheck(WHOLE)
    for rank in parallel.ranks:
        wanted = {name: f"{kind.dtype.name} {list(kind.shape)}" for name, kind in expected.ranks[rank].items()}
        found = {name: f"{s.dtype.name} {list(s.shape)}" for name, s in held.get(rank, {}).items()}
        whole.why += [f"{engine} would not take it: {why}" for why in unlike(rank, found, wanted, shapes=True)]
    return [whole] if whole.why else [], f"{engine} {expected.engine_version}"


def _sizes(checkpoint: Checkpoint) -> Parallel:
    """The sizes of shards without a manifest; experts count as cut where no table can tell."""
    try:
        return sources.infer(checkpoint).parallel
    except ShardtoolError:
        return Parallel(len(checkpoint.ranks) // checkpoint.stages, checkpoint.stages)
