"""What a conversion starts from: a model's logical tensors, wherever their bytes lie.

``huggingface``  a checkpoint of whole tensors
``sharded``      rank files with a manifest, whose recipe is read backwards
``shards``       rank files without one: config.json and the built-in tables tell what they were made of
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from shardtool import __version__, digest
from shardtool.checked import Checked
from shardtool.checkpoint import (
    CONFIG,
    Checkpoint,
    logical,
    open_checkpoint,
    parse_config,
    stored_of,
    with_headers,
)
from shardtool.dtypes import FLOATS, DType, from_name
from shardtool.errors import Incomplete, PlanError, ShardtoolError
from shardtool.layouts import vllm
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.manifest import Manifest, SideFile
from shardtool.mosaic import Logical
from shardtool.ops import sums
from shardtool.ops.equal import equal as equal_bytes
from shardtool.ops.rank import items
from shardtool.plan import Catalog, Stored
from shardtool.stores import Address
from shardtool.stores.base import Object, Store

MAX_SIDE = 64 << 20
"""Bytes of a side file that comes along at most."""
SAMPLED = 1024
"""Tensors that are sampled at most."""
SAMPLE = 4096
"""Bytes that are sampled at each end of a tensor."""
_SAMPLERS = 8
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|tflite|npz|npy|tensors|mlmodel|pdparams|index\.json)$"
)
_HIDDEN = re.compile(r"(^|/)\.|(^|/)original/|(^|/)__pycache__/|^shardtool\.json$")
COPIED = 1 << 20
"""Bytes that are copied or compared at a time, aside from the engine."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model to convert. ``origin`` is the manifest that it was read with, if it was sharded."""

    uri: str
    store: Store
    config_text: str
    config: Mapping[str, Any]
    inventory: Mapping[str, Logical]
    catalog: Catalog
    side: tuple[Object, ...]
    skipped: tuple[Object, ...]  # side files that are too large
    stored: tuple[Stored, ...]
    weights: tuple[Object, ...]
    origin: Manifest | None = None


def open_source(uri: Address, *, shard_pattern: str | None = None) -> Source:
    """Open a model of any kind as its logical tensors. Reads headers only."""
    checkpoint = open_checkpoint(uri, shard_pattern=shard_pattern)
    with checkpoint.store.closed_on_failure():
        return of(checkpoint)


def of(checkpoint: Checkpoint) -> Source:
    """A checkpoint that is open, of any kind, as its logical tensors."""
    if checkpoint.kind == "huggingface":
        return _whole(checkpoint)
    if checkpoint.manifest is not None:
        return sharded(with_headers(checkpoint), checkpoint.manifest)
    return sharded(checkpoint, infer(checkpoint))


def checked(checkpoint: Checkpoint, *, verify: bool = True) -> tuple[Source, Checked | None]:
    """The same, and the store that checks what is read by it; None without digests, or ``verify``."""
    made = checkpoint.manifest
    if made is None or not verify:
        return of(checkpoint), None
    found = with_headers(checkpoint)
    ranks = (*found.ranks, None)  # kept tensors are of no rank
    watch = Checked(found.store, [item for rank in ranks for item in items(found, rank, verify=True)])
    return sharded(replace(found, store=watch), made), watch


def _whole(checkpoint: Checkpoint) -> Source:
    text = checkpoint.config_text()
    catalog = checkpoint.catalog()
    inventory = {name: Logical(entry.dtype, entry.shape) for name, (_, entry) in sorted(checkpoint.entries().items())}
    side, skipped = side_files(checkpoint.objects.values())
    return Source(
        uri=checkpoint.uri,
        store=checkpoint.store,
        config_text=text,
        config=parse_config(text, checkpoint.store.locate(CONFIG)),
        inventory=inventory,
        catalog=catalog,
        side=side,
        skipped=skipped,
        stored=tuple(stored_of(file.key, entry) for _, (file, entry) in sorted(checkpoint.entries().items())),
        weights=_weights(checkpoint),
    )


def sharded(checkpoint: Checkpoint, made: Manifest) -> Source:
    """The logical tensors of rank files."""
    if made.side_files:
        side = tuple(Object(s.key, s.size) for s in made.side_files if s.key != CONFIG)
        skipped: tuple[Object, ...] = ()
    else:
        side, skipped = side_files(checkpoint.objects.values())
    return Source(
        uri=checkpoint.uri,
        store=checkpoint.store,
        config_text=made.config,
        config=parse_config(made.config, f"{checkpoint.uri}: the config in the manifest"),
        inventory=made.inventory,
        catalog=logical(checkpoint, made),
        side=side,
        skipped=skipped,
        stored=tuple(stored for rank in checkpoint.ranks for _, stored in sorted(checkpoint.held(rank).items())),
        weights=_weights(checkpoint),
        origin=made,
    )


def _weights(checkpoint: Checkpoint) -> tuple[Object, ...]:
    """The files that hold the tensors."""
    return tuple(Object(file.key, file.size, file.version) for file in checkpoint.files)


def side_files(objects: Iterable[Object]) -> tuple[tuple[Object, ...], tuple[Object, ...]]:
    """The files that come along, config.json aside, and those that are too large to."""
    objects = list(objects)
    # folders with models of their own stay behind
    models = {o.key.split("/")[0] for o in objects if "/" in o.key and o.key.endswith((".safetensors", "/config.json"))}
    plain = [
        o
        for o in objects
        if o.key != CONFIG
        and o.key not in sums.NAMES
        and not _WEIGHTS.search(o.key)
        and not _HIDDEN.search(o.key)
        and not ("/" in o.key and o.key.split("/")[0] in models)
    ]
    return tuple(o for o in plain if o.size <= MAX_SIDE), tuple(o for o in plain if o.size > MAX_SIDE)


def infer(checkpoint: Checkpoint) -> Manifest:
    """The manifest that rank files without one would have, from config.json and the built-in tables."""
    ranks = checkpoint.ranks
    if ranks != tuple(range(len(ranks))):
        missing = min(set(range(max(ranks))) - set(ranks))
        raise Incomplete(f"{checkpoint.uri} has no file of rank {missing}, but one of rank {max(ranks)}")
    text = checkpoint.config_text()
    config = parse_config(text, checkpoint.store.locate(CONFIG))
    if len(ranks) % checkpoint.stages:
        raise Incomplete(f"{checkpoint.uri} has {len(ranks)} ranks in {checkpoint.stages} stages; some are missing")
    tp, pp = len(ranks) // checkpoint.stages, checkpoint.stages
    layout = vllm.for_config(config)
    held = {
        name: Logical(entry.dtype, entry.shape)
        for stage in range(pp)
        for name, (_, entry) in checkpoint.entries(stage * tp).items()
    }
    dtype = _dtype_of(held, config)
    parallel, inventory, outline = _fitting(layout, config, held, dtype, [Parallel(tp, pp), Parallel(tp, pp, True)])
    return Manifest(
        written_by=f"shardtool {__version__}",
        layout=layout.record(),
        parallel=parallel,
        dtype=dtype,
        pattern="",
        max_part_size=0,
        config=text,
        amendments={},
        sample="",
        inventory=inventory,
        dropped=(),
        copies={},
        recipe=outline.recipe,
        side_files=(),
    )


def _fitting(
    layout: vllm.VllmLayout,
    config: Mapping[str, Any],
    held: Mapping[str, Logical],
    dtype: DType,
    parallels: Sequence[Parallel],
) -> tuple[Parallel, dict[str, Logical], Outline]:
    """The first of some sizes by which shards can have been cut: files do not tell experts apart from their slices."""
    failed: ShardtoolError | None = None
    for parallel in parallels:
        try:
            inventory = dict(sorted(layout.infer(config, held, parallel).items()))
            outline = layout.outline(Model(config, inventory, dtype), parallel)
        except ShardtoolError as error:
            failed = failed or error
            continue
        firsts = range(0, parallel.tp * parallel.pp, parallel.tp)
        made = {tensor.name: tensor.shape for rank in firsts for tensor in outline.recipe.tensors(rank)}
        if len(parallels) == 1 or all(held[name].shape == shape for name, shape in made.items() if name in held):
            return parallel, inventory, outline
    if failed is None:
        return _fitting(layout, config, held, dtype, parallels[:1])
    raise failed


def _dtype_of(held: Mapping[str, Logical], config: Mapping[str, Any]) -> DType:
    """The dtype in which an engine held a model: what config.json says, or else that of most elements."""
    said = said_dtype(config)
    if said is not None:
        return from_name(said)
    elements: Counter[DType] = Counter()
    for tensor in held.values():
        elements[tensor.dtype] += prod(tensor.shape)
    floats = [dtype for dtype, _ in elements.most_common() if dtype in FLOATS]
    return floats[0] if floats else DType.BF16


def said_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype of a config, which models of several parts say in the part that is the text model."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(place.get(key), str):
                return str(place[key])
    return None


def amended(text: str, amendments: Mapping[str, Any]) -> bytes:
    """config.json with some keys changed; the very text where there are none."""
    if not amendments:
        return text.encode()
    return (json.dumps({**json.loads(text), **amendments}, indent=2, ensure_ascii=False) + "\n").encode()


def sample_of(source: Source) -> str:
    """A digest that tells two models of one shape apart: both ends of up to some thousand tensors, evenly chosen.

    Resharding carries it along.
    """
    if source.origin is not None and source.origin.sample:
        return source.origin.sample

    def ends(stored: Stored) -> str:
        n = min(SAMPLE, stored.nbytes)
        data = bytearray(2 * n)
        source.store.readinto(stored.key, stored.offset, memoryview(data)[:n])
        source.store.readinto(stored.key, stored.offset + stored.nbytes - n, memoryview(data)[n:])
        return digest.of_bytes(bytes(data))

    step = -(-len(source.stored) // SAMPLED) or 1
    with ThreadPoolExecutor(_SAMPLERS) as pool:
        return digest.of_bytes("".join(pool.map(ends, source.stored[::step])).encode())


def equal_in(source: Source) -> Callable[[str, str], bool]:
    """Compares two tensors of a source, block by block."""

    def equal(a: str, b: str) -> bool:
        if source.origin is not None:
            return source.origin.copies.get(a) == b
        x, y = source.catalog[a], source.catalog[b]
        return (x.dtype, x.shape) == (y.dtype, y.shape) and equal_bytes(source.store, x, y)

    return equal


def side_records(source: Source, config: bytes) -> tuple[SideFile, ...]:
    """What the manifest says of the side files, digests included; the config is given as it will be written."""
    if source.origin is not None and source.origin.side_files:
        rest = [s for s in source.origin.side_files if s.key != CONFIG]
    else:
        rest = [SideFile(o.key, o.size, digest_of(source.store, o.key, o.size)) for o in source.side]
    return tuple(sorted([*rest, SideFile(CONFIG, len(config), digest.of_bytes(config))], key=lambda s: s.key))


def digest_of(store: Store, key: str, size: int) -> str:
    """The blake3 of an object, read block by block."""
    running = digest.Running()
    block = memoryview(bytearray(min(COPIED, max(1, size))))
    for at in range(0, size, len(block)):
        view = block[: min(len(block), size - at)]
        store.readinto(key, at, view)
        running.update(view)
    return running.hexdigest()


def write_side_files(source: Source, config: bytes, to: Store, keys: Set[str]) -> None:
    """Copy the side files of these names, config.json as given. Those that are there already are replaced."""
    if CONFIG in keys:
        to.put(CONFIG, config)
    for found in source.side:
        if found.key not in keys:
            continue
        writer = to.create(found.key, found.size)
        try:
            block = memoryview(bytearray(max(1, min(found.size, max(COPIED, writer.unit)))))
            for at in range(0, found.size, len(block)):
                view = block[: min(len(block), found.size - at)]
                source.store.readinto(found.key, at, view)
                writer.write(at, view)
            writer.commit()
        finally:
            writer.abort()


def refuse_sharded(source: Source) -> None:
    """``save`` starts from whole tensors."""
    if source.origin is not None:
        raise PlanError(f"{source.uri} is sharded already (tp {source.origin.tp}); use shardtool reshard")
