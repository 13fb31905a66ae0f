"""``save``: a Hugging Face checkpoint becomes per-rank files, as an engine's own ranks would hold them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from shardtool import __version__, computed, header, manifest, pattern
from shardtool.dtypes import DType, lossless
from shardtool.errors import FormatError, NotFound, UsageError
from shardtool.layouts.base import Layout, Outline
from shardtool.manifest import Dropped, FileRecord, Manifest
from shardtool.ops import layout as layouts
from shardtool.ops import source as sources
from shardtool.ops.guard import Guard
from shardtool.ops.job import Job, Means, Summary, for_reasons, split_parts
from shardtool.ops.layout import Choice
from shardtool.ops.source import Source
from shardtool.ops.structure import partly_held
from shardtool.ops.sums import Sums
from shardtool.ops.write import perform
from shardtool.parallel import Parallel
from shardtool.plan import File, Tensor, itself
from shardtool.recipe import held_as, used, used_by_programs
from shardtool.stores import Address, open_store
from shardtool.stores.base import Store
from shardtool.units import parse_size, show_size

PART_SIZE = 5 << 30
KEPT_MOST = 64 << 20
"""Bytes of dropped source tensors that are kept beside the shards, so that ``merge`` gives them back."""


def save(
    model: Address,
    output: Address,
    *,
    tp: int,
    pp: int = 1,
    expert_parallel: bool = False,
    layer_partition: Sequence[int] | None = None,
    layout: str = "vllm",
    engine_version: str | None = None,
    engine_python: str | None = None,
    trust_remote_code: bool = False,
    moe_backend: str | None = None,
    pattern: str | None = None,
    max_part_size: int | str = PART_SIZE,
    dtype: str = "auto",
    keep_dropped: bool = False,
    ranks: Sequence[int] | None = None,
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    sha256: bool = False,
    sglang_sha256: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write what every rank of ``tp`` (times ``pp``) would hold of a Hugging Face checkpoint, with a manifest.

    ``model``, ``output``: folders or URIs. ``expert_parallel``: whole experts on each rank. ``layer_partition``: the
    layers of each pipeline stage, where they are not divided as vLLM does by itself.

    ``layout``: ``vllm`` (the built-in table if there is one, else traced), ``vllm:builtin``, ``vllm:traced``,
    ``sglang``, ``transformers``, or a layout file that ``trace`` wrote. ``engine_version``: of the engine that the
    table shall be for. ``engine_python``: the interpreter that has the engine. ``trust_remote_code``: whether the
    engine may run the model's own code. ``moe_backend``: its kernel for experts, where shapes depend on it.

    ``pattern``: names of the shards. ``max_part_size``, ``memory_limit``: bytes or a text such as ``5GiB``; a limit of
    -1 is none, 0 the least that does. ``ranks``: only these, so that several machines share a job; whoever finishes
    last commits. ``sha256``: write ``SHA256SUMS`` too, as ``sha256sum -c`` reads it, and with ``sglang_sha256`` the
    ``checksums.json`` that SGLang's ``--model-checksum`` reads. ``progress`` is told (bytes done, bytes in all).
    Returns what was done; with ``dry_run``, what would be.
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
    source = sources.open_source(model)
    with source.store:
        sources.refuse_sharded(source)
        most = parse_size(max_part_size, "--max-part-size")
        partition = None if layer_partition is None else tuple(layer_partition)
        parallel = Parallel(tp, pp, expert_parallel, partition)
        choice = Choice(layout, engine_version, engine_python, trust_remote_code, moe_backend)
        return convert(source, output, means, Cut(parallel, choice, pattern, most, dtype, keep_dropped))


@dataclass(frozen=True, slots=True)
class Cut:
    """What the shards shall be: how many ranks, by which layout, which names and sizes, which dtype."""

    parallel: Parallel
    choice: Choice
    pattern: str | None
    max_part_size: int
    dtype: str = "auto"
    keep_dropped: bool = False

    @property
    def names(self) -> str:
        """The pattern of the shards' names: that which the engine looks for, unless one is said."""
        if self.pattern is not None:
            return self.pattern
        return pattern.DEFAULT_PP if self.parallel.pp > 1 else pattern.DEFAULT


def convert(source: Source, uri: Address, means: Means, cut: Cut, guard: Guard | None = None) -> Summary:
    """Shard a source, whole or sharded already. ``guard``: checks it."""
    parallel = cut.parallel
    if means.ranks is not None and not means.ranks:
        raise UsageError("--ranks names no rank; leave it out to write all of them")
    for rank in means.ranks or ():
        if rank not in parallel.ranks:
            raise UsageError(f"--ranks names rank {rank}, but {parallel} has ranks 0 to {parallel.ranks[-1]}")
    with open_store(uri) as to:
        return perform(plan(source, to, cut), to, means, guard)


def plan(source: Source, to: Store, cut: Cut) -> Job:
    """The job that writes a source's ranks. Reads the source's headers and a few samples; writes nothing."""
    parallel = cut.parallel
    named = pattern.parse(cut.names, tp=parallel.tp, pp=parallel.pp)
    layout, outline, held = layouts.outlined(source, cut.choice, parallel, cut.dtype)
    amendments = {**outline.amendments, **_dtype_amendment(source, held)}
    config = sources.amended(source.config_text, amendments)
    if layout.record().get("kind") == "traced":
        outline = _with_parts(outline, source, layout)
    dropped = _dropped(source, outline, cut.keep_dropped)
    side = sources.side_records(source, config)
    made = Manifest(
        written_by=f"shardtool {__version__}",
        layout=layout.record(),
        parallel=parallel,
        dtype=held,
        pattern=cut.names,
        max_part_size=cut.max_part_size,
        config=source.config_text,
        amendments=amendments,
        sample=sources.sample_of(source),
        inventory=source.inventory,
        dropped=dropped,
        copies=outline.copies,
        recipe=outline.recipe,
        side_files=side,
    )
    files = _files(made, parallel, named, cut.max_part_size)
    parts = max(part for part, _ in files) + 1
    places = [parallel.place(rank) for rank in parallel.ranks]
    pattern.check_names(named, places, parts, [s.key for s in side], whole_key=pattern.matched_whole(to.uri))
    if kept := _kept_file(made, source):
        files.append((0, kept))
    names = named.regex()
    store, resolve, computing = computed.over(source.store, source.catalog, made.recipe)

    def commit(store: Store, records: Sequence[FileRecord]) -> None:
        store.put(manifest.KEY, made.with_files(records).encode(), exclusive=True)

    def committed(store: Store) -> bool:
        try:
            found = manifest.decode(store.get(manifest.KEY, limit=manifest.MAX_BYTES), store.locate(manifest.KEY))
        except (NotFound, FormatError):
            return False
        return found.fingerprint == made.fingerprint

    return Job(
        what=f"{parallel} shards of {source.uri}",
        fingerprint=made.fingerprint,
        files=tuple(files),
        resolve=resolve,
        source=store,
        weights=source.weights,
        beside={s.key for s in side},
        write_beside=lambda store, keys: sources.write_side_files(source, config, store, keys),
        commit=commit,
        committed=committed,
        mark=manifest.KEY,
        stale=lambda key: bool(names.fullmatch(key)) or ("/" not in key and key.endswith(".safetensors.index.json")),
        reads=lambda key: re.search(f"(?:{names.pattern})$", key) is not None,
        notes=(*outline.notes, *_notes(source, made)),
        details={
            "architecture": str((source.config.get("architectures") or ["unknown"])[0]),
            **_sizes(parallel),
            "dtype": held.name,
            "engine": f"{layout.engine} {layout.engine_version}",
            "layout": layout.title,
        },
        computing=computing,
    )


def _sizes(parallel: Parallel) -> dict[str, int | str]:
    """The sizes as the plan shows them: those that are not usual."""
    found: dict[str, int | str] = {"tp": parallel.tp}
    if parallel.pp > 1:
        found["pp"] = parallel.pp
    if parallel.partition is not None:
        found["layers of each stage"] = ",".join(map(str, parallel.partition))
    if parallel.ep:
        found["experts"] = "whole on each rank"
    return found


def _dtype_amendment(source: Source, held: DType) -> dict[str, str]:
    """What config.json must say so that the engine chooses the dtype of the shards."""
    keys = [key for key in ("dtype", "torch_dtype") if key in source.config] or ["dtype"]
    wanted = held.torch_name or ""
    return {key: wanted for key in keys if source.config.get(key) != wanted}


def _with_parts(outline: Outline, source: Source, layout: Layout) -> Outline:
    """The outline with the tensors of which an engine takes a part only: they are kept whole, and people are told.

    An engine whose parameter is smaller than the checkpoint's tensor takes its beginning without a word.
    """
    partly = {
        name: why for name, why in partly_held(outline.recipe, source.inventory).items() if name not in outline.dropped
    }
    if not partly:
        return outline
    reason = f"{layout.engine} takes only a part of it; check config.json"
    return replace(outline, dropped={**outline.dropped, **dict.fromkeys(partly, reason)})


def _dropped(source: Source, outline: Outline, keep_all: bool) -> tuple[Dropped, ...]:
    """The dropped source tensors, kept while they fit.

    Those that the shards hold in part or as something computed are always kept: nothing else has them.
    """
    found, room = [], KEPT_MOST
    before = {d.name: d.kept for d in source.origin.dropped} if source.origin is not None else {}
    needed = used_by_programs(outline.recipe) | used(outline.recipe) if outline.dropped else set()
    for name, reason in sorted(outline.dropped.items()):
        tensor = source.catalog.get(name)
        if name in before:
            kept = before[name]
        elif name in needed:
            kept = tensor is not None
        else:
            kept = tensor is not None and (keep_all or tensor.nbytes <= room)
            room -= tensor.nbytes if kept and tensor is not None else 0
        found.append(Dropped(name, reason, kept))
    return tuple(found)


def _kept_file(made: Manifest, source: Source) -> File | None:
    """The file of kept source tensors, if there are any."""
    tensors = []
    for dropped in made.dropped:
        if dropped.kept:
            logical = made.inventory[dropped.name]
            tensors.append(itself(dropped.name, logical.dtype, logical.shape))
    if not tensors:
        return None
    tensors.sort(key=lambda t: header.sort_key(t.name, t.dtype))
    return File(manifest.KEPT, None, tuple(tensors))


def _files(made: Manifest, parallel: Parallel, named: pattern.Pattern, most: int) -> list[tuple[int, File]]:
    """Every rank's files. A tensor is in the same part on all ranks, so that they are written side by side."""
    sizes = {
        name: max(rule.dtype.nbytes(prod(share.shape)) for share in rule.shares)
        for rule in made.recipe.rules
        for name, _ in rule.names()
    }
    part_of = split_parts(sizes, most)
    chosen: dict[tuple[int, int], list[Tensor]] = {}
    for group in made.recipe.by_name():
        for rank, tensor in group:
            chosen.setdefault((part_of[tensor.name], rank), []).append(tensor)
    files = []
    for (part, rank), tensors in sorted(chosen.items(), key=lambda item: item[0]):
        tp_rank, pp_rank = parallel.place(rank)
        tensors.sort(key=lambda t: header.sort_key(t.name, t.dtype))
        files.append((part, File(named.key(tp_rank, part, pp_rank), rank, tuple(tensors))))
    return files


def _dropped_notes(dropped: Sequence[Dropped]) -> Iterator[str]:
    """What is dropped and why; many for one reason are one note."""
    for kept, after in ((True, " (kept for merge)"), (False, " (not kept: merge cannot give it back)")):
        reasons = {one.name: one.reason + after for one in dropped if one.kept is kept}
        yield from for_reasons(reasons, "is dropped", "are dropped")


def _notes(source: Source, made: Manifest) -> list[str]:
    """What people should know before and after."""
    notes = [
        f"{o.key} ({show_size(o.size)}) stays behind: side files come along up to {show_size(sources.MAX_SIDE)}"
        for o in source.skipped
    ]
    notes += _dropped_notes(made.dropped)
    notes += [f"{copy} equals {of} and is stored once" for copy, of in made.copies.items()]
    notes += [f"config.json is written with {key}: {value!r}" for key, value in made.amendments.items()]
    unused = {d.name for d in made.dropped}
    narrowed = {n: dtype for n, dtype in held_as(made.recipe).items() if n not in unused}
    narrowed = {n: dtype for n, dtype in narrowed.items() if not lossless(made.inventory[n].dtype, dtype)}
    if narrowed:
        first = min(narrowed)
        notes.append(f"{len(narrowed)} tensors lose precision as {narrowed[first].name}, first {first}")
    return notes
