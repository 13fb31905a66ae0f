"""``verify``: is a checkpoint whole, are its bytes what was written, are they what the source says?

Three depths: structure (headers, names, coverage), digests, and equality with another model under the recipe,
without merging. Differences are returned, not raised; an error means that it was not possible to look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from shardtool import computed, digest, schedule
from shardtool.budget import Arena, limit_of
from shardtool.checkpoint import Checkpoint, WeightFile, open_checkpoint
from shardtool.computed import Resolve
from shardtool.dtypes import castable
from shardtool.engine import execute
from shardtool.errors import (
    ChecksumMismatch,
    FormatError,
    Incomplete,
    NotFound,
    PlanError,
    ShardtoolError,
    StoreError,
    UnsupportedModel,
    UsageError,
)
from shardtool.layouts import vllm
from shardtool.layouts.base import Model
from shardtool.manifest import FileRecord, Manifest
from shardtool.mosaic import Logical, resolve
from shardtool.ops import digests, stored, structure
from shardtool.ops import source as sources
from shardtool.ops.fits import check_fit
from shardtool.ops.job import Means
from shardtool.ops.limits import MOST, reading, want
from shardtool.ops.source import Source
from shardtool.ops.structure import FileCheck
from shardtool.plan import Piece, Stored, Tensor, itself
from shardtool.schedule import Target
from shardtool.sinks.compare import CompareSink, Difference
from shardtool.stores import Address, named
from shardtool.stores.base import Store

Told = Callable[[int, int], None] | None


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A stored tensor that is not what the other side says: where, or why it could not be compared."""

    name: str
    rank: int | None
    key: str
    shape: tuple[int, ...]
    dtype: str
    difference: Difference | None = None
    why: str = ""


@dataclass(slots=True)
class Report:
    """What was looked at and what was found. ``depth``: structure, digests or equality."""

    uri: str
    kind: str
    depth: str
    files: list[FileCheck] = field(default_factory=list)
    differences: list[TensorDifference] = field(default_factory=list)
    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.differences and all(file.ok for file in self.files)

    @property
    def exit_code(self) -> int:
        """0 fine, 1 difference or damage, 4 when files are missing and nothing else is wrong."""
        if self.ok:
            return 0
        return 4 if not self.differences and all(file.ok or file.missing for file in self.files) else 1


def verify(
    uri: Address,
    *,
    against: Address | None = None,
    quick: bool = False,
    engine: str | None = None,
    engine_python: str | None = None,
    trust_remote_code: bool = False,
    moe_backend: str | None = None,
    pattern: str | None = None,
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    progress: Told = None,
) -> Report:
    """Check a checkpoint: its structure, then its digests (not with ``quick``), then against another model or sharding.

    ``quick`` reads headers only, and compares sizes and what the store keeps of contents with what it kept when they
    were written. ``against``: the source model, or shards of any tp; every tensor of every rank is compared with what
    the recipe takes from it. ``engine``: the installed engine (``vllm``, ``sglang``) that shall say whether it would
    take these shards; ``engine_python``, ``trust_remote_code`` and ``moe_backend`` are as in ``save``. ``pattern``: the
    names of shards without a manifest. Returns a report; ``report.ok`` and ``report.exit_code`` say how it went.
    """
    if engine is None and (engine_python or trust_remote_code or moe_backend):
        raise UsageError(
            "--engine-python, --trust-remote-code and --moe-backend are for --engine; say which one to ask"
        )
    if quick and against is not None:
        raise UsageError("--quick looks at no tensor and --against at all of them; use one of the two")
    began = time.monotonic()
    try:
        checkpoint = open_checkpoint(uri, shard_pattern=pattern)
    except FormatError as error:
        return Report(named(uri), "unknown", "structure", [FileCheck(structure.WHOLE, why=[str(error)])])
    with checkpoint.store:
        uri = checkpoint.uri
        report = Report(uri, checkpoint.kind, "structure")
        made = _structure(checkpoint, report, quick=quick, compared=against is not None)
        if checkpoint.manifest is not None and made is not None:
            report.files, files = structure.check_files(checkpoint, made)
            report.files += structure.check_side_files(checkpoint, made, digests=not quick)
            checkpoint = Checkpoint(uri, checkpoint.store, checkpoint.kind, tuple(files), made)
            report.files += stored.check_sums(checkpoint.store, made)
            if against is not None:  # before hours are spent on digests
                _limit(memory_limit, len(checkpoint.ranks))
            if quick:
                stored.compare(checkpoint.store, made.files, {check.key: check for check in report.files})
            else:
                report.depth = "digests"
                _digests(checkpoint.store, files, made, report, memory_limit, concurrency, progress)
        if engine is not None:
            checks, asked = check_fit(checkpoint, engine, engine_python, trust_remote_code, moe_backend)
            report.files += checks
            if not checks:
                report.notes.append(f"{asked} expects just these names, dtypes and shapes on every rank")
        if against is not None:
            report.depth = "equality"
            other = sources.open_source(against)
            with other.store:
                _against(checkpoint, made, other, report, memory_limit, concurrency, progress)
    report.seconds = time.monotonic() - began
    return report


def _structure(checkpoint: Checkpoint, report: Report, *, quick: bool, compared: bool) -> Manifest | None:
    """The recipe to go by: the manifest's, or one inferred for shards without a manifest."""
    if checkpoint.manifest is not None:
        return checkpoint.manifest
    made = None
    trouble = None
    if checkpoint.kind == "shards":
        try:
            made = sources.infer(checkpoint)
        except (UnsupportedModel, NotFound) as error:
            report.notes.append(f"only the files were compared with each other: {error}")
        except Incomplete:  # the files tell it too
            pass
        except StoreError:
            raise
        except ShardtoolError as error:  # they are not what config.json says
            trouble = f"its {len(checkpoint.ranks)} ranks are not what config.json says: {error}"
        report.files = structure.check_shards(checkpoint, made, trouble)
    else:
        report.files = [FileCheck(file.key, file.size) for file in checkpoint.files]
        checkpoint.entries()
    report.tensors = sum(len(file.header.entries) for file in checkpoint.files)
    if not quick and not compared:
        report.notes.append("there is no manifest, so that there are no digests to check")
    return made


def _least(ranks: int) -> int:
    """The memory with which shards of so many ranks can be compared side by side."""
    return max(1, ranks) * CompareSink.staging * schedule.FLOOR + schedule.FLOOR + schedule.ALIGN


def _limit(limit: int | str | None, ranks: int) -> int:
    """The memory limit for comparing shards of so many ranks."""
    return limit_of(limit, least=_least(ranks), what="a verification", most=MOST)


class _Tally:
    """Adds up the bytes that have been done, and tells of them."""

    def __init__(self, progress: Told, total: int) -> None:
        self.done = 0
        self._progress = progress
        self._total = total

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        if self._progress is not None:
            self._progress(self.done, self._total)


def _digests(
    store: Store,
    files: Sequence[WeightFile],
    made: Manifest,
    report: Report,
    limit: int | str | None,
    concurrency: int | None,
    progress: Told,
) -> None:
    """Read every file that is whole and compare its digests with the manifest."""
    checks = {check.key: check for check in report.files}
    records = {record.key: record for record in made.files}
    sound = [file for file in files if checks[file.key].ok]
    tally = _Tally(progress, sum(file.size for file in sound))
    read = digests.read(store, sound, memory_limit=limit, concurrency=concurrency, progress=tally)
    report.bytes += tally.done
    for file in sound:
        checks[file.key].why += _unlike(records[file.key], file, read[file.key])
        report.tensors += len(read[file.key])


def _unlike(record: FileRecord, file: WeightFile, found: Sequence[digest.TensorDigest]) -> list[str]:
    """One sentence for each tensor whose bytes are not those that were written."""
    troubles = []
    for said, has, entry in zip(record.tensors, found, file.header.entries, strict=True):
        if said.digest == has:
            continue
        chunks = [i for i, (a, b) in enumerate(zip(said.digest.chunks, has.chunks, strict=False)) if a != b]
        start = chunks[0] * digest.CHUNK if chunks else 0
        end = min(entry.nbytes, start + digest.CHUNK)
        troubles.append(f"tensor {said.name!r} differs from its digest, first in its bytes {start} to {end}")
    return troubles


def check_input(source: Source, means: Means, *, digests: bool = True) -> None:
    """Check shards that are about to be converted: their files, headers and side files, and all their ``digests``.

    Raises ``ChecksumMismatch`` or ``Incomplete`` that names the first damage.
    """
    if source.origin is None or not source.origin.files:
        return
    origin = source.origin
    checkpoint = Checkpoint(source.uri, source.store, "sharded", (), origin)
    report = Report(source.uri, "sharded", "digests")
    report.files, files = structure.check_files(checkpoint, origin)
    report.files += structure.check_side_files(checkpoint, origin, digests=True)
    if digests:
        _digests(source.store, files, origin, report, means.memory_limit, means.concurrency, means.progress)
    own = {structure.WHOLE, *(record.key for record in origin.files), *(side.key for side in origin.side_files)}
    bad = [check for check in report.files if not check.ok and check.key in own]  # foreign files are not read
    if bad:
        kind = Incomplete if bad[0].missing else ChecksumMismatch
        raise kind(
            f"{source.store.locate(bad[0].key)}: {bad[0].why[0]}; nothing was written, restore the file"
            + (f" ({len(bad)} files are damaged)" if len(bad) > 1 else "")
        )


def _against(
    checkpoint: Checkpoint,
    made: Manifest | None,
    other: Source,
    report: Report,
    limit: int | str | None,
    concurrency: int | None,
    progress: Told,
) -> None:
    """Compare every stored tensor with what the other model says it should be."""
    store = other.store
    if checkpoint.kind == "huggingface":
        compared = _whole_tensors(checkpoint, other, report)
    else:
        if checkpoint.manifest is None:
            made = _recipe_for(checkpoint, other)
        assert made is not None
        if not _same_inventory(checkpoint, made, other, report):
            return
        store, resolved, _ = computed.over(other.store, other.catalog, made.recipe)
        compared = _rank_tensors(checkpoint, made, other, resolved, report)
    found: list[CompareSink] = []
    report.tensors = 0

    def groups() -> Iterator[list[Target]]:
        for group in compared:
            report.tensors += len(group)
            yield [
                Target(c.tensor, c.pieces, CompareSink(checkpoint.store, c.stored, found), 0, CompareSink.staging)
                for c in group
            ]

    ranks = len(checkpoint.ranks)
    most = _limit(limit, ranks)
    how = reading(most - _least(ranks), concurrency, store, checkpoint.store)
    arena = Arena(min(MOST, most - how.held))
    step = want(arena.size)
    steps = schedule.steps(groups(), limit=arena.size, want=step, longest=min(how.longest, step))
    tally = _Tally(progress, sum(file.size for file in checkpoint.files))
    execute(steps, store, arena, readers=how.threads, progress=tally)
    report.bytes += tally.done
    rank_of = {file.key: file.rank for file in checkpoint.files}
    names = {(file.key, e.offset): e.name for file in checkpoint.files for e in file.header.entries if e.nbytes}
    for sink in sorted(found, key=lambda sink: (sink.stored.key, sink.stored.offset)):
        stored = sink.stored
        name = names[stored.key, stored.offset]
        report.differences.append(
            TensorDifference(name, rank_of[stored.key], stored.key, stored.shape, stored.dtype.name, sink.difference)
        )


@dataclass(frozen=True, slots=True)
class _Compared:
    """A stored tensor, and the pieces of the other side that it should be made of."""

    tensor: Tensor
    stored: Stored
    pieces: tuple[Piece, ...]


def _whole_tensors(checkpoint: Checkpoint, other: Source, report: Report) -> Iterator[list[_Compared]]:
    """A Hugging Face checkpoint, tensor by tensor."""
    own = checkpoint.catalog()
    for name in sorted(set(own) | set(other.catalog)):
        if name not in own:
            report.differences.append(_apart(name, other.catalog[name], "", f"{checkpoint.uri} lacks it"))
            continue
        tensor, expected = own[name], other.catalog.get(name)
        stored = tensor.stored
        if stored is None:
            raise PlanError(
                f"{checkpoint.uri}: the elements of {name!r} do not lie one after the other, so that it cannot be "
                f"compared; turn the two around: shardtool verify {other.uri} --against {checkpoint.uri}"
            )
        if expected is None:
            report.differences.append(_apart(name, tensor, stored.key, f"{other.uri} lacks it"))
        elif (expected.dtype, expected.shape) != (tensor.dtype, tensor.shape):
            report.differences.append(
                _apart(name, tensor, stored.key, f"it is {expected.dtype.name} {list(expected.shape)} in {other.uri}")
            )
        else:
            yield from _one(
                itself(name, stored.dtype, stored.shape), None, stored, partial(resolve, catalog=other.catalog), report
            )


def _apart(name: str, tensor: Tensor, key: str, why: str, rank: int | None = None) -> TensorDifference:
    return TensorDifference(name, rank, key, tensor.shape, tensor.dtype.name, None, why)


def _same_inventory(checkpoint: Checkpoint, made: Manifest, other: Source, report: Report) -> bool:
    """Whether both sides are of the same source tensors; what differs is reported."""
    equal = sources.equal_in(other)
    for name in sorted(set(made.inventory) | set(other.inventory)):
        mine, theirs = made.inventory.get(name), other.inventory.get(name)
        if mine is None:
            why = f"{checkpoint.uri} lacks it"
        elif theirs is None:
            why = f"{other.uri} lacks it"
        elif mine.shape != theirs.shape:
            why = f"its shape in {other.uri} is {list(theirs.shape)}"
        elif name in made.copies and not equal(name, made.copies[name]):
            why = f"it is not equal to {made.copies[name]!r} in {other.uri}, but the shards hold one tensor for both"
        else:
            continue
        shown = mine or theirs or Logical(made.dtype, ())
        report.differences.append(TensorDifference(name, None, "", shown.shape, shown.dtype.name, None, why))
    return not report.differences


def _rank_tensors(
    checkpoint: Checkpoint, made: Manifest, other: Source, resolved: Resolve, report: Report
) -> Iterator[list[_Compared]]:
    """Rank files, every tensor of every rank, and what is kept beside them."""
    held = {rank: checkpoint.held(rank) for rank in checkpoint.ranks}
    bad = {check.key for check in report.files if not check.ok}
    reported = {record.rank for record in made.files if record.key in bad}  # what they lack needs no word more
    for every in made.recipe.by_name():
        group: list[_Compared] = []
        for rank, tensor in every:
            stored = held.get(rank, {}).pop(tensor.name, None)
            if stored is None and rank in reported:
                continue
            if stored is None:
                report.differences.append(_apart(tensor.name, tensor, "", f"rank {rank} lacks it", rank))
            elif (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
                why = f"it is {stored.dtype.name} {list(stored.shape)} there"
                report.differences.append(_apart(tensor.name, tensor, stored.key, why, rank))
            else:
                for compared in _one(tensor, rank, stored, resolved, report):
                    group += compared
        if group:
            yield group
    for rank, rest in held.items():
        for name, stored in rest.items():
            extra = Tensor(name, stored.dtype, stored.shape, tuple)
            report.differences.append(_apart(name, extra, stored.key, "the recipe does not know it", rank))
    for name, (file, _) in checkpoint.entries().items():
        if name in other.catalog:
            stored = file.stored()[name]
            yield from _one(
                itself(name, stored.dtype, stored.shape), None, stored, partial(resolve, catalog=other.catalog), report
            )


def _one(
    tensor: Tensor, rank: int | None, stored: Stored, resolved: Resolve, report: Report
) -> Iterator[list[_Compared]]:
    """The comparison of one tensor, unless the other side cannot be cast to it."""
    pieces = resolved(tensor)
    for piece in pieces:
        assert isinstance(piece.source, Stored)
        if not castable(piece.source.dtype, tensor.dtype):
            report.differences.append(
                _apart(tensor.name, tensor, stored.key, f"its source is {piece.source.dtype.name}", rank)
            )
            return
    yield [_Compared(tensor, stored, pieces)]


def _recipe_for(checkpoint: Checkpoint, other: Source) -> Manifest:
    """The recipe of shards without a manifest, from the very model that they shall be compared with."""
    made = sources.infer(checkpoint)
    layout = vllm.for_config(other.config)
    head, embed = layout.family.tied
    # Held apart by one rank, they are stored apart; stages hold them apart in any case.
    both = made.pp == 1 and {head, embed} <= set(checkpoint.held(0))
    equal = (lambda _a, _b: False) if both else sources.equal_in(other)
    outline = layout.outline(Model(other.config, other.inventory, made.dtype, equal), made.parallel)
    return replace(made, recipe=outline.recipe, inventory=other.inventory)
