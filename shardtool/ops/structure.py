"""What can be said of a checkpoint without reading its tensors: files, headers, ranks, names, coverage.

Everything found wrong is collected; nothing is raised, so that one look tells all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from shardtool import pattern
from shardtool.checkpoint import Checkpoint, WeightFile, read_header
from shardtool.errors import ChecksumMismatch, PlanError, ShardtoolError, StoreError
from shardtool.manifest import FileRecord, Manifest
from shardtool.mosaic import Logical, check_target, held_once
from shardtool.ops.source import digest_of
from shardtool.plan import Stored, Tensor
from shardtool.recipe import Recipe
from shardtool.stores.base import Store
from shardtool.window import Window

WHOLE = "checkpoint"
"""The name under which troubles that belong to no single file are reported."""

FOREIGN = 100
"""Files that do not belong to a checkpoint and are named at most; others are counted."""


@dataclass(slots=True)
class FileCheck:
    """One file: what is wrong with it. ``missing``: it is not there at all.

    ``compared``: what a quick look has compared, ``not_compared``: what it could not, and why.
    """

    key: str
    size: int = 0
    why: list[str] = field(default_factory=list)
    missing: bool = False
    compared: list[str] = field(default_factory=list)
    not_compared: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.why


def check_files(checkpoint: Checkpoint, made: Manifest) -> tuple[list[FileCheck], list[WeightFile]]:
    """Every file of a manifest against its record, and those that could be opened."""
    checks: list[FileCheck] = []
    opened: list[WeightFile] = []
    store = checkpoint.store
    by_rank = {rank: {t.name: t for t in made.recipe.tensors(rank)} for rank in made.recipe.ranks()}
    seen: dict[int | None, set[str]] = {rank: set() for rank in by_rank}
    for record in made.files:
        check = FileCheck(record.key, record.size)
        checks.append(check)
        file = _open(store, record, check)
        if file is None:
            continue
        opened.append(file)
        if record.rank is not None:
            _names(file, by_rank.get(record.rank, {}), seen.setdefault(record.rank, set()), check)
    whole = FileCheck(WHOLE)
    recorded = {record.rank for record in made.files}
    broken = {record.rank for record, check in zip(made.files, checks, strict=True) if not check.ok}
    for rank, tensors in by_rank.items():
        if rank not in recorded:
            whole.why.append(f"no file of rank {rank}")
        elif rank not in broken and (lost := sorted(set(tensors) - seen[rank])):
            whole.why.append(f"rank {rank} lacks {len(lost)} tensors, first {lost[0]!r}")
    whole.why += coverage(made)
    checks += _foreign(store, made)
    return [*checks, *([whole] if whole.why else [])], opened


def _open(store: Store, record: FileRecord, check: FileCheck) -> WeightFile | None:
    """The file with its header, if both are as recorded."""
    try:
        found = store.stat(record.key)
    except StoreError:
        raise
    except ShardtoolError:
        check.why.append("missing")
        check.missing = True
        return None
    if found.size != record.size:
        check.why.append(f"{found.size} bytes, the manifest says {record.size}")
        return None
    try:
        parsed = read_header(store, record.key, found.size, record.header)
    except StoreError:
        raise
    except ChecksumMismatch:
        check.why.append("its header differs from its digest")
        return None
    except ShardtoolError as error:
        check.why.append(str(error))
        return None
    if [entry.name for entry in parsed.entries] != [t.name for t in record.tensors]:
        check.why.append("its tensors are not those that the manifest lists")
        return None
    return WeightFile(record.key, record.size, parsed, record.rank, record.part)


def _names(file: WeightFile, wanted: Mapping[str, Tensor], seen: set[str], check: FileCheck) -> None:
    """Names, dtypes and shapes against the recipe."""
    for entry in file.header.entries:
        tensor = wanted.get(entry.name)
        if tensor is None:
            check.why.append(f"tensor {entry.name!r} is not in the recipe of rank {file.rank}")
        elif entry.name in seen:
            check.why.append(f"tensor {entry.name!r} is in another part of rank {file.rank} too")
        elif (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            check.why.append(
                f"tensor {entry.name!r} is {entry.dtype.name} {list(entry.shape)}, the recipe says "
                f"{tensor.dtype.name} {list(tensor.shape)}"
            )
        seen.add(entry.name)


def _foreign(store: Store, made: Manifest) -> list[FileCheck]:
    """Files that an engine would take for shards of this checkpoint, and that are not. Too many are only counted."""
    names = pattern.parse(made.pattern, tp=made.tp, pp=made.pp).regex()
    own = {record.key for record in made.files}
    why = "foreign: the manifest does not know it, but an engine would read it"

    def read(key: str) -> bool:
        """An engine globs in one folder; in an object store it takes every key that ends in a shard's name."""
        if pattern.matched_whole(store.uri):
            return re.search(f"(?:{names.pattern})$", key) is not None
        return names.fullmatch(key) is not None or ("/" not in key and key.endswith(".safetensors"))

    found = (thing for thing in store.list() if thing.key not in own and read(thing.key))
    checks = [FileCheck(thing.key, thing.size, [why]) for thing in islice(found, FOREIGN)]
    if more := sum(1 for _ in found):
        checks.append(FileCheck(made.pattern, why=[f"foreign: {more} more files, beside the {FOREIGN} that are named"]))
    return checks


def coverage(made: Manifest) -> list[str]:
    """What is wrong with the recipe: targets with gaps, source elements that are nowhere."""
    troubles: list[str] = []
    for rule in made.recipe.rules:
        for share in rule.shares:
            pieces = tuple(share.expanded())
            target = Tensor(rule.name, rule.dtype, share.shape, lambda pieces=pieces: pieces, share.fill)  # type: ignore[misc]
            try:
                check_target(target, pieces)
            except PlanError as error:
                troubles.append(str(error))
    known = {d.name for d in made.dropped} | set(made.copies)
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], bool] = {}
    for name, windows in _windows(made.recipe).items():
        logical = made.inventory.get(name)
        if logical is None:
            troubles.append(f"the recipe uses {name!r}, which the inventory of the source does not list")
        elif name not in known and (trouble := _covered(name, logical, windows, seen)):
            troubles.append(trouble)
        known.add(name)
    troubles += [
        f"source tensor {name!r} is in no shard and not declared as dropped"
        for name in made.inventory
        if name not in known
    ]
    return troubles


def partly_held(recipe: Recipe, inventory: Mapping[str, Logical]) -> dict[str, str]:
    """The source tensors of which a recipe takes some elements and not all, and how many it leaves."""
    found: dict[str, str] = {}
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], bool] = {}
    for name, windows in _windows(recipe).items():
        logical = inventory.get(name)
        if logical is not None and (trouble := _covered(name, logical, windows, seen)):
            found[name] = trouble
    return found


def _windows(recipe: Recipe) -> dict[str, tuple[tuple[Window, ...], ...]]:
    """The windows that are taken of each source; rules share theirs among all their numbers."""
    found: dict[str, tuple[tuple[Window, ...], ...]] = {}
    for rule in recipe.rules:
        for name, windows in rule.sources().items():
            shared = tuple(windows)
            for one in rule.filled((name,)):
                found[one] = (*found.get(one, ()), shared)
    return found


def _covered(
    name: str,
    logical: Logical,
    windows: tuple[tuple[Window, ...], ...],
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], bool],
) -> str | None:
    """``held_once``, asked once for all layers that are cut alike."""
    alike = (tuple(map(id, windows)), logical.shape)
    if seen.get(alike):
        return None
    trouble = held_once(name, logical, (window for group in windows for window in group))
    seen[alike] = trouble is None
    return trouble


def check_shards(checkpoint: Checkpoint, made: Manifest | None, trouble: str | None) -> list[FileCheck]:
    """Rank files without a manifest: every rank and part is there, and holds what the engine's table says.

    ``trouble``: why there is no recipe although config.json and the tables should give one.
    """
    checks = [FileCheck(file.key, file.size) for file in checkpoint.files]
    whole = FileCheck(WHOLE)
    ranks = checkpoint.ranks
    whole.why += [f"no file of rank {rank}" for rank in range(max(ranks) + 1) if rank not in ranks]
    for rank in ranks:
        parts = sorted(file.part for file in checkpoint.files if file.rank == rank)
        whole.why += [f"rank {rank} has no part {part}" for part in range(parts[-1]) if part not in parts]
    whole.missing = bool(whole.why) and trouble is None
    if trouble is not None:
        whole.why.append(trouble)
    try:
        held = {rank: {name: _kind(s) for name, s in checkpoint.held(rank).items()} for rank in ranks}
    except ShardtoolError as error:
        whole.why.append(str(error))
        held = {}
    for rank, tensors in held.items():
        wanted = {t.name: _kind(t) for t in made.recipe.tensors(rank)} if made else held.get(0, {})
        whole.why += unlike(rank, tensors, wanted, shapes=made is not None)
    return [*checks, *([whole] if whole.why else [])]


def _kind(tensor: Tensor | Stored) -> str:
    """Dtype and shape, as people read them."""
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def unlike(rank: int, held: Mapping[str, str], wanted: Mapping[str, str], *, shapes: bool) -> Iterable[str]:
    """How what a rank holds differs from what is wanted; dtype and shape as ``BF16 [2, 3]``."""
    if lost := sorted(wanted.keys() - held.keys()):
        yield f"rank {rank} lacks {len(lost)} tensors, first {lost[0]!r}"
    if extra := sorted(held.keys() - wanted.keys()):
        yield f"rank {rank} has {len(extra)} tensors too many, first {extra[0]!r}"
    if shapes and (other := sorted(name for name in held.keys() & wanted.keys() if held[name] != wanted[name])):
        name = other[0]
        yield (
            f"rank {rank} has {len(other)} tensors of another dtype or shape, first {name!r}: {held[name]} instead of "
            f"{wanted[name]}"
        )


def check_side_files(checkpoint: Checkpoint, made: Manifest, *, digests: bool) -> list[FileCheck]:
    """The side files against the manifest: sizes, and digests if asked."""
    checks = []
    for side in made.side_files:
        check = FileCheck(side.key, side.size)
        checks.append(check)
        try:
            size = checkpoint.store.stat(side.key).size
        except StoreError:
            raise
        except ShardtoolError:
            check.why.append("missing")
            check.missing = True
            continue
        if size != side.size:
            check.why.append(f"{size} bytes, the manifest says {side.size}")
        elif digests and digest_of(checkpoint.store, side.key, size) != side.blake3:
            check.why.append("its bytes differ from its digest")
    return checks
