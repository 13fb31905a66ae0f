"""``merge``: shards become a Hugging Face checkpoint again, tensor for tensor as the source was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from shardtool import digest, header
from shardtool.checkpoint import CONFIG, INDEX
from shardtool.dtypes import DType, lossless
from shardtool.errors import FormatError, NotFound, PlanError
from shardtool.manifest import FileRecord, Manifest
from shardtool.mosaic import resolve
from shardtool.ops import source as sources
from shardtool.ops.guard import guarded
from shardtool.ops.job import Job, Means, Summary, for_reasons, split_parts
from shardtool.ops.source import Source
from shardtool.ops.write import perform
from shardtool.plan import File, Tensor, itself
from shardtool.stores import Address, open_store
from shardtool.stores.base import Store
from shardtool.units import parse_size

_WRITTEN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FILE_SIZE = 5 * 10**9
"""Bytes of a file at most, as Hugging Face splits them."""


def merge(
    uri: Address,
    output: Address,
    *,
    source_pattern: str | None = None,
    max_part_size: int | str = FILE_SIZE,
    verify: bool = True,
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write the Hugging Face checkpoint that shards were made from.

    Files with an index, the original config, the side files.

    Tensors equal the source's byte for byte. What ``save`` dropped without keeping, or narrowed by ``--dtype``, is
    named in the notes; a narrowed tensor stays in the shards' dtype. ``verify``: check the input's digests.
    """
    means = Means(
        memory_limit=memory_limit,
        concurrency=concurrency,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
    )
    guard = guarded(uri, source_pattern, verify=verify)
    source = guard.source
    with source.store:
        if source.origin is None:
            raise PlanError(f"{source.uri} is not sharded; there is nothing to merge")
        with open_store(output) as to:
            job = plan(source, source.origin, parse_size(max_part_size, "--max-part-size"))
            return perform(job, to, means, guard)


def plan(source: Source, origin: Manifest, most: int) -> Job:
    """The job that writes the whole tensors. Reads and writes nothing."""
    lost = {d.name: d.reason for d in origin.dropped if not d.kept}
    narrowed: dict[str, DType] = {}
    tensors: dict[str, Tensor] = {}
    for name, logical in source.inventory.items():
        if name in lost:
            continue
        held = source.catalog.get(name)
        if held is None:
            raise PlanError(f"{source.uri} does not hold {name!r}, which its manifest lists")
        dtype = logical.dtype
        if not lossless(dtype, held.dtype):
            narrowed[name] = dtype = held.dtype
        tensors[name] = itself(name, dtype, logical.shape)
    part_of = split_parts({name: t.nbytes for name, t in tensors.items()}, most)
    parts: list[list[Tensor]] = [[] for _ in range(max(part_of.values(), default=0) + 1)]
    for name, tensor in tensors.items():
        parts[part_of[name]].append(tensor)
    files = []
    for part, chosen in enumerate(parts):
        chosen.sort(key=lambda t: header.sort_key(t.name, t.dtype))
        key = f"model-{part + 1:05d}-of-{len(parts):05d}.safetensors"
        files.append((part, File(key, None, tuple(chosen), (("format", "pt"),))))
    config = sources.amended(source.config_text, _config_amendments(origin, narrowed))
    sample = sources.sample_of(source)
    index = _index(files, sample)
    plain = replace(origin, files=())

    def commit(store: Store, records: Sequence[FileRecord]) -> None:
        store.put(INDEX, index, exclusive=True)

    def committed(store: Store) -> bool:
        try:
            return store.get(INDEX, limit=len(index)) == index
        except (NotFound, FormatError):  # there is none, or a longer one
            return False

    return Job(
        what=f"the merged checkpoint of {source.uri}",
        fingerprint=digest.of_bytes(f"merge {plain.fingerprint} {sample} {most}".encode())[:32],
        files=tuple(files),
        resolve=lambda tensor: resolve(tensor, source.catalog),
        source=source.store,
        weights=source.weights,
        beside={CONFIG, *(o.key for o in source.side)},
        write_beside=lambda store, keys: sources.write_side_files(source, config, store, keys),
        commit=commit,
        committed=committed,
        mark=INDEX,
        stale=lambda key: bool(_WRITTEN.fullmatch(key)),
        notes=tuple(_notes(lost, narrowed)),
        details={"tensors": len(tensors), "dropped": sorted(lost), "narrowed": sorted(narrowed)},
    )


def _config_amendments(origin: Manifest, narrowed: dict[str, DType]) -> dict[str, Any]:
    """The original config, but for the dtype where tensors come back narrower than it says."""
    return {k: v for k, v in origin.amendments.items() if k in ("dtype", "torch_dtype")} if narrowed else {}


def _index(files: Sequence[tuple[int, File]], sample: str) -> bytes:
    """The index. ``sample`` tells models of one shape apart, so that another one's files are not taken for these."""
    weight_map = {t.name: file.key for _, file in files for t in file.tensors}
    total = sum(file.data_size for _, file in files)
    metadata = {"total_size": total, "shardtool_sample": sample}
    table = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def _notes(lost: dict[str, str], narrowed: dict[str, DType]) -> list[str]:
    notes = list(for_reasons(lost, "was dropped and not kept", "were dropped and not kept"))
    if narrowed:
        first = min(narrowed)
        notes.append(
            f"{len(narrowed)} tensors were narrowed when they were saved and stay {narrowed[first].name}, first {first}"
        )
    return notes
