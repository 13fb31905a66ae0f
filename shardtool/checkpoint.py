"""A checkpoint that exists, opened from its headers alone: which files it has, and where each tensor's bytes lie.

Three kinds::

    sharded      rank files with a manifest
    shards       rank files without one, found by their names (an engine's own ``save_sharded_state``)
    huggingface  files of whole tensors, safetensors or else torch.save's ``.bin``; an index, where there is one,
                 decides which files and tensors count

Everything that is read here is untrusted: paths must stay inside, sizes are bounded, headers are checked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import unquote

from shardtool import digest, header, manifest, pattern, torchread
from shardtool.dtypes import DType
from shardtool.errors import ChecksumMismatch, FormatError, Incomplete, NotFound, UsageError
from shardtool.header import Entry, Header
from shardtool.manifest import Manifest
from shardtool.mosaic import invert
from shardtool.plan import Piece, Stored, Tensor, whole
from shardtool.stores import Address, named
from shardtool.stores.address import scheme_of
from shardtool.stores.base import Object, Store, check_key
from shardtool.stores.hub.existing import open_existing
from shardtool.window import Window, row_major

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MAX_JSON = 256 << 20
"""Bytes of an index or a config that are read at most."""
MAX_OBJECTS = 200_000
"""Files that a folder may hold before it is taken for something else than a checkpoint."""
FIRST_READ = 64 << 10
KINDS = (".safetensors", ".bin")
"""The files of whole tensors. Where both are, the engines take the first."""
_FOREIGN = re.compile(
    r"^(consolidated[^/]*|adapter_model[^/]*)\.(safetensors|bin)$|(training_args|optimizer)\.bin$"  # as vLLM has it
)
_HEADER_READERS = 8


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of tensors: its rank and part, if it belongs to a rank."""

    key: str
    size: int
    header: Header
    rank: int | None = None
    part: int = 0
    version: str = ""  # of the object, as its store tells it

    def stored(self) -> dict[str, Stored]:
        """Where each tensor's bytes lie. Types narrower than a byte are taken as the bytes that hold them."""
        return {entry.name: stored_of(self.key, entry) for entry in self.header.entries}


def stored_of(key: str, entry: Entry) -> Stored:
    """Where a header's entry lies. A type narrower than a byte is taken as the bytes that hold it.

    Of an entry with strides: all elements from its first to its last.
    """
    if entry.dtype.bits % 8:
        return Stored(key, DType.U8, (entry.nbytes,), entry.offset)
    if entry.strides is not None:
        return Stored(key, entry.dtype, (Window(0, entry.shape, entry.strides).bounds[1],), entry.offset)
    return Stored(key, entry.dtype, entry.shape, entry.offset)


def tensor_of(key: str, entry: Entry) -> Tensor:
    """A header's entry as a tensor to read from; one with strides is a mosaic of one piece."""
    stored = stored_of(key, entry)
    if entry.strides is None:
        return whole(entry.name, stored)
    piece = Piece(row_major(entry.shape), Window(0, entry.shape, entry.strides), stored)
    return Tensor(entry.name, entry.dtype, entry.shape, lambda: (piece,))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint. Where there is an index, its files show only the tensors that it takes from them."""

    uri: str
    store: Store
    kind: str
    files: tuple[WeightFile, ...]
    manifest: Manifest | None = None
    objects: Mapping[str, Object] = field(default_factory=dict)
    stages: int = 1  # of the pipeline, as the files' names say without a manifest

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that it has files of; none for whole tensors."""
        return tuple(sorted({file.rank for file in self.files if file.rank is not None}))

    def entries(self, rank: int | None = None) -> dict[str, tuple[WeightFile, Entry]]:
        """Every tensor of a rank (or of the files without a rank). A name that comes twice is refused."""
        found: dict[str, tuple[WeightFile, Entry]] = {}
        for file in self.files:
            if file.rank != rank:
                continue
            for entry in file.header.entries:
                if entry.name in found:
                    raise FormatError(
                        f"{self.uri}: tensor {entry.name!r} is in {found[entry.name][0].key} and in {file.key}: remove "
                        "one of them, or say in an index which file counts"
                    )
                found[entry.name] = (file, entry)
        return found

    def held(self, rank: int) -> dict[str, Stored]:
        """Where a rank's tensors lie. Raises ``NotFound`` for a rank that the checkpoint does not have."""
        if rank not in self.ranks:
            raise NotFound(f"{self.uri} has no rank {rank}; it has {_spans(self.ranks)}")
        return {name: stored_of(file.key, entry) for name, (file, entry) in self.entries(rank).items()}

    def catalog(self) -> dict[str, Tensor]:
        """Every whole tensor of a Hugging Face checkpoint, by name."""
        return {name: tensor_of(file.key, entry) for name, (file, entry) in self.entries().items()}

    def config_text(self) -> str:
        """The text of config.json. Raises ``NotFound`` where there is none."""
        try:
            data = self.store.get(CONFIG, limit=MAX_JSON)
        except NotFound:
            raise NotFound(f"{self.uri} has no config.json, which says what the model is") from None
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.store.locate(CONFIG)} is not text") from None


def _spans(numbers: Iterable[int]) -> str:
    listed = list(numbers)
    return f"ranks {listed[0]} to {listed[-1]}" if listed else "no ranks"


def parse_config(text: str, where: str) -> dict[str, Any]:
    """config.json as a table. Raises ``FormatError``."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON ({str(error)[:80]})") from None
    if not isinstance(config, dict):
        raise FormatError(f"{where} is not a table of settings")
    return config


def read_header(store: Store, key: str, size: int, expected: str | None = None) -> Header:
    """The checked header of one file. Raises ``FormatError`` that names it.

    Where a digest is ``expected``, another one is a ``ChecksumMismatch``.
    """
    where = store.locate(key)
    first = bytearray(min(size, FIRST_READ))
    if first:
        store.readinto(key, 0, memoryview(first))
    n = header.length(bytes(first[:8]), size, where)
    text = bytearray(first[8 : 8 + n])
    if len(text) < n:
        have = len(text)
        text.extend(bytes(n - have))
        store.readinto(key, 8 + have, memoryview(text)[have:])
    if expected is not None and digest.of_bytes(bytes(first[:8] + text)) != expected:
        raise ChecksumMismatch(
            f"{where}: its header differs from its digest; restore the file, shardtool verify tells what else is wrong"
        )
    return header.parse(bytes(text), size, where)


def open_checkpoint(uri: Address, *, shard_pattern: str | None = None) -> Checkpoint:
    """Open whatever lies at a URI; a single ``.safetensors`` or ``.bin`` file too, and a model of the hub by its id.

    Reads headers and the manifest or the index, no tensor.
    """
    if single := single_file(uri):
        folder, name = single
        with open_existing(folder).closed_on_failure() as store:
            return Checkpoint(named(uri), store, "huggingface", _files(store, [(store.stat(name), None, 0)]))
    with open_existing(uri).closed_on_failure() as store:
        where = named(uri)
        try:
            data = store.get(manifest.KEY, limit=manifest.MAX_BYTES)
        except NotFound:
            return _without_manifest(where, store, shard_pattern)
        found = manifest.decode(data, store.locate(manifest.KEY))
        if shard_pattern is not None and shard_pattern != found.pattern:
            raise UsageError(
                f"--pattern {shard_pattern!r}: the shards in {where} are named {found.pattern!r}; leave it out"
            )
        return Checkpoint(where, store, "sharded", (), found)


def single_file(uri: Address) -> tuple[str, str] | None:
    """Folder and name, if the URI names one file of tensors and not a folder that is called like one."""
    if isinstance(uri, Store):
        return None
    text = os.fspath(uri)
    scheme = scheme_of(text) if isinstance(uri, str) else None
    folder, name = parted(text, scheme)
    if not name.endswith(KINDS) or os.path.isdir(text):
        return None
    if scheme is not None and "://" not in folder.partition("?")[0]:  # it is a host's name
        return None
    return folder, name


def parted(path: str, scheme: str | None) -> tuple[str, str]:
    """Folder and name of a file. What follows a web address's question mark (a signature) goes with the folder."""
    if scheme in ("http", "https"):
        path, mark, query = path.partition("?")
        folder, _, name = path.rpartition("/")
        return folder + mark + query, unquote(name, errors="surrogateescape")
    folder, _, name = path.rpartition("/")
    return folder or ("/" if path.startswith("/") else "."), name


def with_headers(checkpoint: Checkpoint, ranks: Iterable[int] | None = None) -> Checkpoint:
    """The same checkpoint with the headers of its manifest's files (of some ranks only, if said)."""
    if checkpoint.manifest is None:
        return checkpoint
    wanted = None if ranks is None else set(ranks)
    jobs = []
    for record in checkpoint.manifest.files:
        if wanted is not None and record.rank not in wanted:
            continue
        try:
            found = checkpoint.store.stat(record.key)
        except NotFound:
            raise Incomplete(
                f"{checkpoint.store.locate(record.key)} is missing; the manifest lists it, restore it or save again"
            ) from None
        jobs.append((found, record.rank, record.part))
    files = _files(checkpoint.store, jobs, {record.key: record.header for record in checkpoint.manifest.files})
    return Checkpoint(checkpoint.uri, checkpoint.store, checkpoint.kind, files, checkpoint.manifest)


def _files(
    store: Store, jobs: list[tuple[Object, int | None, int]], digests: Mapping[str, str] | None = None
) -> tuple[WeightFile, ...]:
    """Files with their headers, which must have these digests where there are some."""
    expected = digests or {}

    def one(job: tuple[Object, int | None, int]) -> WeightFile:
        found, rank, part = job
        if rank is None and found.key.endswith(".bin"):
            read = torchread.read_header(store, found.key, found.size)
        else:
            read = read_header(store, found.key, found.size, expected.get(found.key))
        return WeightFile(found.key, found.size, read, rank, part, found.version)

    if len(jobs) < 2:
        return tuple(map(one, jobs))
    with ThreadPoolExecutor(min(_HEADER_READERS, len(jobs))) as pool:
        return tuple(pool.map(one, jobs))


def listed(store: Store, uri: str = "") -> list[Object]:
    """Everything that lies in a store, in the order of the keys. ``UsageError`` for more than a checkpoint can have.

    ``uri``: what people are told where that is, if it is not the store's own.
    """
    found = list(islice(store.list(), MAX_OBJECTS + 1))
    if len(found) > MAX_OBJECTS:
        raise UsageError(f"{uri or store.uri} holds more than {MAX_OBJECTS} files; name the folder of one checkpoint")
    return found


def _without_manifest(uri: str, store: Store, shard_pattern: str | None) -> Checkpoint:
    objects = {found.key: found for found in listed(store, uri)}
    if any(key.startswith(manifest.PRIVATE) and key.endswith(".json") for key in objects):
        raise Incomplete(f"{uri} is being written or was interrupted: run the same command again to finish it")
    shards, stages = _shards(objects, shard_pattern)
    if shards:
        return Checkpoint(uri, store, "shards", _files(store, shards), objects=objects, stages=stages)
    if shard_pattern is not None:
        raise NotFound(f"{uri} has no file that --pattern {shard_pattern!r} names")
    own = sorted(key for key in objects if "/" not in key)
    there = tuple(kind for kind in KINDS if any(key.endswith(kind) for key in objects))
    for kind in there or KINDS:  # an index of files of which none is there says nothing
        indexes = [key for key in own if key.endswith(f"{kind}.index.json") and "consolidated" not in key]
        if indexes:
            return _indexed(uri, store, objects, INDEX if INDEX in indexes else indexes[0])
        plain = [key for key in own if key.endswith(kind) and not _FOREIGN.search(key)]
        if plain:
            files = _files(store, [(objects[key], None, 0) for key in plain])
            return Checkpoint(uri, store, "huggingface", files, objects=objects)
    if saved := min((key for key in objects if key.endswith(".distcp")), default=None):
        raise UsageError(
            f"{uri} is a folder of torch.distributed.checkpoint, which wrote {saved}: make safetensors of it with "
            "shardtool.integrations.dcp.whole_tensors, and name their folder"
        )
    raise NotFound(
        f"{uri} has no safetensors files and no *.bin of torch.save; name the folder of a checkpoint, with its "
        "config.json and weights"
    )


def _shards(objects: Mapping[str, Object], text: str | None) -> tuple[list[tuple[Object, int | None, int]], int]:
    """The files that a pattern (or one of the engines' own) names, with rank and part, and the number of stages."""
    for candidate in (pattern.DEFAULT, pattern.DEFAULT_PP) if text is None else (text,):
        fields = {field for field in pattern.FIELDS if "{" + field in candidate}
        made = pattern.parse(candidate, tp=2 if fields & {"rank", "tp_rank"} else 1, pp=2 if "pp_rank" in fields else 1)
        names = made.regex()
        found: list[tuple[Object, int, int, int]] = []
        for key, thing in sorted(objects.items()):
            if match := names.fullmatch(key):
                numbers = {name: int(value) for name, value in match.groupdict().items()}
                tp_rank = numbers.get("rank", numbers.get("tp_rank", 0))
                found.append((thing, tp_rank, numbers.get("pp_rank", 0), numbers.get("part", 0)))
        if found:
            tp = max(tp_rank for _, tp_rank, _, _ in found) + 1
            placed = [(thing, stage * tp + tp_rank, part) for thing, tp_rank, stage, part in found]
            return list(placed), max(stage for _, _, stage, _ in found) + 1
    return [], 1


def _indexed(uri: str, store: Store, objects: Mapping[str, Object], index: str) -> Checkpoint:
    where = store.locate(index)
    table = parse_config(store.get(index, limit=MAX_JSON).decode("utf-8", "replace"), where)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f"{where} is damaged: it has no weight_map from tensors to files")
    names_in: dict[str, set[str]] = {}
    for name, key in weight_map.items():
        names_in.setdefault(key, set()).add(name)
    for key in names_in:
        try:
            check_key(key)
        except UsageError:
            raise FormatError(f"{where} names the file {key!r}, which is not inside the checkpoint") from None
        if key not in objects:
            raise Incomplete(f"{store.locate(key)} is missing; {index} lists it, fetch the checkpoint again")
    files = _files(store, [(objects[key], None, 0) for key in sorted(names_in)])
    for file in files:
        if lost := names_in[file.key] - {entry.name for entry in file.header.entries}:
            raise FormatError(f"{where} says that tensor {min(lost)!r} is in {file.key}, but it is not there")
    chosen = tuple(_only(file, names_in[file.key]) for file in files)
    return Checkpoint(uri, store, "huggingface", chosen, objects=objects)


def _only(file: WeightFile, names: set[str]) -> WeightFile:
    """The file with the tensors that the index takes from it."""
    entries = tuple(entry for entry in file.header.entries if entry.name in names)
    return WeightFile(
        file.key, file.size, Header(entries, file.header.metadata, file.header.data_offset), version=file.version
    )


def targets(checkpoint: Checkpoint, made: Manifest, rank: int) -> list[tuple[Tensor, Stored]]:
    """A rank's tensors as the recipe says them, beside where they lie.

    What is missing, foreign or different is refused.
    """
    held = checkpoint.held(rank)
    found = []
    for tensor in made.recipe.tensors(rank):
        stored = held.pop(tensor.name, None)
        if stored is None:
            raise Incomplete(f"{checkpoint.uri}: rank {rank} has no tensor {tensor.name!r}")
        if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
            raise FormatError(
                f"{checkpoint.uri}: tensor {tensor.name!r} of rank {rank} is {stored.dtype.name} "
                f"{list(stored.shape)} in {stored.key}, "
                f"the recipe says {tensor.dtype.name} {list(tensor.shape)}"
            )
        found.append((tensor, stored))
    if held:
        raise FormatError(f"{checkpoint.uri}: rank {rank} has the tensor {min(held)!r}, which the recipe does not know")
    return found


def logical(checkpoint: Checkpoint, made: Manifest) -> dict[str, Tensor]:
    """The source tensors that a sharded checkpoint holds.

    Its recipe read backwards, copies and kept tensors included.
    """
    every = [pair for rank in made.recipe.ranks() for pair in targets(checkpoint, made, rank)]
    found = invert(every, made.inventory)
    if any(dropped.kept for dropped in made.dropped):
        for name, (file, entry) in checkpoint.entries().items():
            found[name] = whole(name, stored_of(file.key, entry))
    for copy, of in made.copies.items():
        if of in found:
            found[copy] = Tensor(copy, found[of].dtype, found[of].shape, found[of].pieces, stored=found[of].stored)
    return found
