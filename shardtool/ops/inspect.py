"""``inspect``: what a checkpoint is, from its headers and its manifest alone. No tensor is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from shardtool.checkpoint import (
    CONFIG,
    Checkpoint,
    WeightFile,
    open_checkpoint,
    parse_config,
    single_file,
    with_headers,
)
from shardtool.dtypes import DType
from shardtool.errors import AccessDenied, Incomplete, NotFound, ShardtoolError, StoreError
from shardtool.manifest import Manifest
from shardtool.mosaic import Logical
from shardtool.ops import source as sources
from shardtool.ops.job import natural
from shardtool.ops.rank import text
from shardtool.stores import Address


@dataclass(frozen=True, slots=True)
class FileSummary:
    """One file of tensors. ``bytes``: of its tensors; ``size``: of the file."""

    key: str
    rank: int | None
    size: int
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class DTypeSummary:
    """All stored tensors of one element type."""

    dtype: str
    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One stored tensor."""

    name: str
    rank: int | None
    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint. ``kind``: sharded (with a manifest), shards (without), huggingface or file.

    ``tensors``, ``elements`` and ``bytes`` count what is stored, replicas of ranks included. ``parameters`` are the
    model's, each counted once; None where nothing says how the shards make up a model. ``missing``: files that the
    manifest lists and that are not there; nothing of them is counted. ``listed``: the tensors that were asked for.
    """

    uri: str
    kind: str
    architecture: str | None
    engine: str | None
    tp: int | None
    pp: int | None
    expert_parallel: bool | None
    dtype: str | None
    pattern: str | None
    written_by: str | None
    tensors: int
    elements: int
    bytes: int
    parameters: int | None
    dropped: int
    files: tuple[FileSummary, ...]
    dtypes: tuple[DTypeSummary, ...]
    missing: tuple[str, ...] = ()
    listed: tuple[TensorSummary, ...] = ()


def inspect(uri: Address, *, tensors: str | None = None, pattern: str | None = None) -> Inspection:
    """Summarise any checkpoint: sharded with or without a manifest, Hugging Face, or a single file of tensors.

    ``tensors``: a shell pattern (``model.layers.0.*``); the stored tensors that it names are listed. ``pattern``:
    the names of shards without a manifest. Raises ``NotFound`` where there is no checkpoint, or no such tensor.
    """
    text(tensors, "tensors")
    text(pattern, "pattern")
    checkpoint = open_checkpoint(uri, shard_pattern=pattern)
    with checkpoint.store:
        single = single_file(uri) is not None
        checkpoint, missing = _with_what_is_there(checkpoint)
        made = checkpoint.manifest
        config = _config(checkpoint, single=single)
        dtypes = _dtypes(checkpoint.files)
        return Inspection(
            uri=checkpoint.uri,
            kind="file" if single else checkpoint.kind,
            architecture=_architecture(config),
            engine=_engine(made) if made else None,
            tp=made.tp if made else ((max(checkpoint.ranks) + 1) // checkpoint.stages if checkpoint.ranks else None),
            pp=made.pp if made else (checkpoint.stages if checkpoint.ranks else None),
            expert_parallel=made.parallel.ep if made else None,
            dtype=made.dtype.name if made else None,
            pattern=made.pattern if made else None,
            written_by=made.written_by if made else None,
            tensors=sum(one.tensors for one in dtypes),
            elements=sum(one.elements for one in dtypes),
            bytes=sum(one.bytes for one in dtypes),
            parameters=_parameters(checkpoint),
            dropped=len(made.dropped) if made else 0,
            files=tuple(_file(file) for file in sorted(checkpoint.files, key=_place)),
            dtypes=dtypes,
            missing=missing,
            listed=_listed(checkpoint, tensors, missing) if tensors is not None else (),
        )


def _with_what_is_there(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint with the headers of the files that exist, and the names of those that its manifest misses."""
    made = checkpoint.manifest
    try:
        return with_headers(checkpoint), ()
    except Incomplete:
        if made is None:
            raise
    there = tuple(record for record in made.files if checkpoint.store.exists(record.key))
    found = with_headers(replace(checkpoint, manifest=replace(made, files=there)))
    missing = {record.key for record in made.files} - {record.key for record in there}
    return replace(found, manifest=made), tuple(sorted(missing, key=natural))


def _place(file: WeightFile) -> tuple[bool, int, int, str]:
    """By rank and part; what belongs to no rank comes last."""
    return file.rank is None, file.rank or 0, file.part, file.key


def _file(file: WeightFile) -> FileSummary:
    entries = file.header.entries
    return FileSummary(file.key, file.rank, file.size, len(entries), sum(entry.nbytes for entry in entries))


def _config(checkpoint: Checkpoint, *, single: bool) -> Mapping[str, Any]:
    """config.json, the original where a manifest kept it; empty where there is none, or none may be read.

    ``single``: of one file, whose signed address is of no other.
    """
    if checkpoint.manifest is not None:
        return parse_config(checkpoint.manifest.config, f"{checkpoint.uri}: the config in the manifest")
    try:
        text = checkpoint.config_text()
    except NotFound:
        return {}
    except AccessDenied:
        if single:
            return {}
        raise
    return parse_config(text, checkpoint.store.locate(CONFIG))


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _engine(made: Manifest) -> str:
    return f"{made.layout.get('engine')} {made.layout.get('engine_version')}"


def _dtypes(files: Iterable[WeightFile]) -> tuple[DTypeSummary, ...]:
    """What is stored, by element type, the most bytes first."""
    count: dict[DType, list[int]] = {}
    for file in files:
        for entry in file.header.entries:
            sums = count.setdefault(entry.dtype, [0, 0, 0])
            sums[0] += 1
            sums[1] += math.prod(entry.shape)
            sums[2] += entry.nbytes
    found = (DTypeSummary(dtype.name, *sums) for dtype, sums in count.items())
    return tuple(sorted(found, key=lambda one: (-one.bytes, one.dtype)))


def _parameters(checkpoint: Checkpoint) -> int | None:
    """Elements of the model, each once."""
    if not checkpoint.ranks:  # tensors of a torch file may share their elements
        every = ((file.key, entry) for file in checkpoint.files for entry in file.header.entries)
        return sum({(key, entry.offset, entry.nbytes): math.prod(entry.shape) for key, entry in every}.values())
    made = checkpoint.manifest or _inferred(checkpoint)
    if made is None:
        return None
    return sum(_size(tensor) for name, tensor in made.inventory.items() if name not in made.copies)


def _inferred(checkpoint: Checkpoint) -> Manifest | None:
    """The manifest that rank files would have, where config.json and the built-in tables can tell."""
    try:
        return sources.infer(checkpoint)
    except StoreError:
        raise
    except ShardtoolError:
        return None


def _size(tensor: Logical) -> int:
    return math.prod(tensor.shape)


def _listed(checkpoint: Checkpoint, glob: str, missing: tuple[str, ...]) -> tuple[TensorSummary, ...]:
    """The stored tensors that a shell pattern names, rank by rank. None may be right if files are missing."""
    found = [
        TensorSummary(entry.name, file.rank, file.key, entry.dtype.name, entry.shape, entry.nbytes)
        for file in sorted(checkpoint.files, key=_place)
        for entry in file.header.entries
        if fnmatchcase(entry.name, glob)
    ]
    if not found and not missing:
        raise NotFound(f"{checkpoint.uri} has no tensor that --tensors {glob!r} names")
    return tuple(sorted(found, key=lambda one: (one.rank is None, one.rank or 0, natural(one.name))))
