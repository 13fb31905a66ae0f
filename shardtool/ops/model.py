"""``load_model``: a transformers model that is ready to run, whole or as one rank of several.

::

    config.json  ->  the model on the meta device, divided by its own tp_plan     ops/tp_plan.py
    checkpoint   ->  its tensors, this rank's files, or slices of whatever it is   _whole, _shards, _sliced
    each tensor  ->  straight into its parameter; what is cast or cut on the way is copied
    the rest     ->  tied weights, buffers, generation settings, evaluation mode
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shardtool.checkpoint import MAX_JSON, Checkpoint, open_checkpoint, parse_config, with_headers
from shardtool.dtypes import DType, castable, from_name
from shardtool.errors import Incomplete, NotFound, TensorMismatch, UnsupportedTransform, UsageError
from shardtool.exchange import Exchange, exchange_for
from shardtool.layouts.base import Model, Parallel
from shardtool.layouts.transformers import ENGINE, KIND
from shardtool.mosaic import Logical
from shardtool.ops import slices, tp_plan
from shardtool.ops import source as sources
from shardtool.ops.bring import Slices
from shardtool.ops.load import fill, handed
from shardtool.ops.rank import equal, items
from shardtool.ops.together import together
from shardtool.plan import Piece
from shardtool.segments import Item
from shardtool.stores import Address
from shardtool.window import Window, row_major

if TYPE_CHECKING:
    import torch

GENERATION = "generation_config.json"
Uses = Mapping[str, tuple[tuple[str, Piece], ...]]
"""Tensor of a file -> the tensors of the module that take of it, and what."""


def load_model(
    uri: Address,
    *,
    tp: int | str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    verify: bool = True,
    distributed: bool | str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The transformers model of a checkpoint, in evaluation mode.

    ``uri``: whole tensors, or shards of any sizes for any engine. In one process the model is whole. Under ``torchrun``
    (or in a process group that exists) each process gets its part of a tensor parallel model, which all of them call
    together, and reads only what that needs: its own files, where shards were made with ``--layout transformers`` for
    as many ranks, else ranges.

    ``tp``: ``auto``, or the number of ranks, which is 1 or that of the processes. ``device``: ``cpu``, ``cuda``; by
    default the GPU if there is one. ``dtype``: ``auto`` is that of the checkpoint. ``distributed``: whether ranges that
    several processes of this node need are read by one of them and exchanged; ``auto`` is for stores that are not
    local. The other arguments are those of ``stream``.

    Raises ``UsageError`` where ``tp`` and processes do not fit, ``PlanError`` for a model that cannot be divided so,
    ``UnsupportedModel`` for what transformers does not have, ``TensorMismatch`` and ``Incomplete`` for tensors that
    are not those of the model.
    """
    size, rank = _group(tp, device)
    place = _place(device, size)
    exchange = exchange_for(uri, distributed if size > 1 else False)
    with exchange or nullcontext():
        checkpoint = open_checkpoint(uri)
        with checkpoint.store.closed_on_failure():
            if checkpoint.kind == "huggingface" and size == 1:
                source = _whole(checkpoint, dtype, verify)
            elif _own(checkpoint, size):
                source = _shards(checkpoint, rank, dtype, verify)
            else:
                source = _sliced(checkpoint, size, rank, dtype, verify)
        with source.checkpoint.store:
            return _made(source, size, place, exchange, Loading(memory_limit, concurrency, progress))


@dataclass(frozen=True, slots=True)
class Loading:
    """How tensors are to be brought."""

    memory_limit: int | str | None
    concurrency: int | None
    progress: Callable[[int, int], None] | None


def _made(source: _Source, size: int, place: torch.device, exchange: Exchange | None, how: Loading) -> Any:
    """The model with its tensors."""
    model = tp_plan.empty(source.config, source.dtype.torch(), size)
    held = _placed(model, source, place)
    if source.slices is None:
        _fill(source, held, place, how)
    else:
        _bring(source.slices, held, exchange, how)
    tp_plan.finished(model, model.state_dict().keys() - held.keys(), place)
    _no_holes(model)
    if (settings := _generation(source.checkpoint)) is not None:
        tp_plan.generation(model, settings)
    return model


# Who takes part.


def _group(tp: int | str, device: str) -> tuple[int, int]:
    """The number of ranks and this process's own. Joins the others if ``torchrun`` started this process."""
    import torch.distributed as dist

    if tp != "auto" and (isinstance(tp, bool) or not isinstance(tp, int) or tp < 1):
        raise UsageError(f"tp={tp!r} is neither 'auto' nor a number of ranks")
    if not isinstance(device, str):
        raise UsageError(f"device={device!r} is not a device; write cpu, cuda or cuda:0")
    tp_plan.installed()
    if tp == 1 or not dist.is_available():
        found = 1, 0
    else:
        if not dist.is_initialized() and dist.is_torchelastic_launched():
            dist.init_process_group("nccl" if _accelerated(device) else "gloo")
        found = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if tp not in ("auto", found[0]):
        raise UsageError(f"tp={tp} needs {tp} processes and there are {found[0]}: torchrun --nproc-per-node {tp} ...")
    return found


def _accelerated(device: str) -> bool:
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _place(device: str, size: int) -> torch.device:
    """Where the model goes: under ``torchrun`` each process has the GPU of its number."""
    import torch
    import torch.distributed as dist

    if not _accelerated(device):
        if size > 1 and torch.cuda.is_available():
            raise UsageError(f"device={device!r}: transformers puts the ranks on this machine's GPUs; leave device out")
        device = "cpu" if device == "auto" else device
    elif device in ("auto", "cuda"):
        device = f"cuda:{dist.get_node_local_rank(0) if size > 1 else 0}"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device={device!r} is not a device; write cpu, cuda or cuda:0") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if place.type not in ("cpu", "cuda"):
        raise UsageError(f"device={device!r} is not supported; write cpu, cuda or cuda:0")
    return place


# What is read.


@dataclass(frozen=True, slots=True)
class _Source:
    """Some tensors of a checkpoint, and where they go.

    ``targets``: the shape of each tensor of the module that they make, and the dtypes that they have in the files.
    ``made_for``: the version of transformers that shards were made for.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    dtype: DType
    items: list[Item]
    uses: Uses
    targets: Mapping[str, tuple[tuple[int, ...], set[DType]]]
    made_for: str = ""
    slices: Slices | None = None


def _own(checkpoint: Checkpoint, size: int) -> bool:
    """Whether there are files that hold just what each process needs."""
    made = checkpoint.manifest
    if made is None or (made.layout.get("engine"), made.layout.get("kind")) != (ENGINE, KIND):
        return False
    return (made.tp, made.pp) == (size, 1)


def _shards(checkpoint: Checkpoint, rank: int, dtype: str, verify: bool) -> _Source:
    """This rank's own files."""
    made, uri = checkpoint.manifest, checkpoint.uri
    assert made is not None
    opened = with_headers(checkpoint, [rank])
    found = items(opened, rank, verify=verify)
    config = {**parse_config(made.config, f"{uri}: the config in the manifest"), **made.amendments}
    uses = {}
    for item in found:
        window = row_major(item.entry.shape)
        uses[item.name] = ((item.name, Piece(window, window, item.name)),)
    held = made.dtype if dtype == "auto" else from_name(dtype)
    targets = {item.name: (item.entry.shape, {item.entry.dtype}) for item in found}
    return _Source(opened, config, held, found, uses, targets, str(made.layout.get("engine_version")))


def _whole(checkpoint: Checkpoint, dtype: str, verify: bool) -> _Source:
    """All tensors of a Hugging Face checkpoint."""
    uri = checkpoint.uri
    config = parse_config(checkpoint.config_text(), f"{uri}: config.json")
    found = {item.name: item for item in items(checkpoint, None, verify=verify)}
    inventory = {name: Logical(item.entry.dtype, item.entry.shape) for name, item in found.items()}
    held = _dtype_of(config, inventory) if dtype == "auto" else from_name(dtype)
    layout = tp_plan.layout_of(config, inventory)
    model = Model(config, inventory, held, lambda a, b: equal(checkpoint, found[a], found[b]))
    uses: dict[str, list[tuple[str, Piece]]] = {}
    targets: dict[str, tuple[tuple[int, ...], set[DType]]] = {}
    for tensor in layout.outline(model, Parallel(1)).recipe.tensors(0):
        targets[tensor.name] = tensor.shape, set()
        for piece in tensor.pieces():
            uses.setdefault(str(piece.source), []).append((tensor.name, piece))
            targets[tensor.name][1].add(inventory[str(piece.source)].dtype)
    chosen = [item for name, item in found.items() if name in uses]
    return _Source(checkpoint, config, held, chosen, {name: tuple(taken) for name, taken in uses.items()}, targets)


def _sliced(checkpoint: Checkpoint, size: int, rank: int, dtype: str, verify: bool) -> _Source:
    """What a rank takes of a model, whose tensors are whole or were cut for others."""
    source, watch = sources.checked(checkpoint, verify=verify)
    inventory = {name: logical for name, logical in source.inventory.items() if name in source.catalog}
    held = _dtype_of(source.config, inventory) if dtype == "auto" else from_name(dtype)
    layout = tp_plan.layout_of(source.config, inventory)
    parallel = Parallel(size)
    outline = layout.outline(Model(source.config, inventory, held, sources.equal_in(source)), parallel)
    found = replace(slices.of_outline(source, parallel, rank, outline, layout=layout.title, dtype=held), checked=watch)
    targets = {part.tensor.name: (part.tensor.shape, {part.tensor.dtype}) for part in found.slices}
    return _Source(replace(checkpoint, store=found.store), source.config, held, [], {}, targets, slices=found)


def _dtype_of(config: Mapping[str, Any], inventory: Mapping[str, Logical]) -> DType:
    """What config.json says, in its text model if not at the top; else what the first tensor is."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(place.get(key), str):
                return from_name(place[key])
    return next((tensor.dtype for tensor in inventory.values() if castable(tensor.dtype, DType.F32)), DType.F32)


def _generation(checkpoint: Checkpoint) -> dict[str, Any] | None:
    try:
        data = checkpoint.store.get(GENERATION, limit=MAX_JSON)
    except NotFound:
        return None
    return parse_config(data.decode("utf-8", "replace"), checkpoint.store.locate(GENERATION))


# Where it goes.


def _placed(model: Any, source: _Source, place: torch.device) -> dict[str, torch.Tensor]:
    """Give the module's tensors that files hold memory of their own: this rank's part of each, by name.

    Names, shapes and dtypes are compared before.
    """
    import torch

    types = tp_plan.dtypes(model, source.dtype.torch())
    state = model.state_dict(keep_vars=True)
    held: dict[str, torch.Tensor] = {}
    what, uri = type(model).__name__, source.checkpoint.uri
    for name, (shape, kinds) in source.targets.items():
        if name not in state:
            raise TensorMismatch(f"{uri} has the tensor {name!r}, which {what} does not have")
        local = tuple(_local(state[name]).shape)
        if local != shape:
            made_for = f" (it was made for transformers {source.made_for})" if source.made_for else ""
            raise TensorMismatch(
                f"{uri}: tensor {name!r} is {list(shape)}{made_for}, {what} of transformers {tp_plan.installed()} has "
                f"{list(local)}"
            )
        for kind in kinds:
            if not castable(kind, from_name(str(types[name]))):
                raise UnsupportedTransform(
                    f"{uri}: tensor {name!r} is {kind.name}, which cannot be cast to {types[name]}"
                )
    for name in source.targets:
        held[name] = torch.empty(_local(state[name]).shape, dtype=types[name], device=place)
        _replace(model, name, _like(state[name], held[name]))
    return held


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """What takes the place of a parameter or buffer of the meta device."""
    import torch
    from torch.distributed.tensor import DTensor

    if isinstance(old, DTensor):
        local = DTensor.from_local(
            local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
    if not isinstance(old, torch.nn.Parameter):
        return local
    return torch.nn.Parameter(local, requires_grad=old.requires_grad and local.is_floating_point())


def _replace(model: Any, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    (module._buffers if leaf in module._buffers else module._parameters)[leaf] = tensor


def _bring(found: Slices, held: Mapping[str, torch.Tensor], exchange: Exchange | None, how: Loading) -> None:
    """Read what a rank takes of each tensor, by itself or together with the others, and copy it into its place."""
    import torch

    take = found.tensors if exchange is None else partial(together, found, exchange)
    with torch.no_grad():
        for name, tensor in take(memory_limit=how.memory_limit, concurrency=how.concurrency, progress=how.progress):
            held[name].copy_(tensor)


def _fill(source: _Source, held: Mapping[str, torch.Tensor], place: torch.device, how: Loading) -> None:
    """Read every tensor: straight into its place where it goes as it is, otherwise beside it and copied."""
    import torch

    direct: dict[str, torch.Tensor] = {}
    for item in source.items:
        if (view := _view(item, source.uses[item.name], held)) is not None:
            direct[item.name] = view
    straight = [item for item in source.items if item.name in direct]
    others = [item for item in source.items if item.name not in direct]
    before, total = (sum(item.entry.nbytes for item in some) for some in (straight, source.items))

    def tell(done: int, first: int) -> None:
        if how.progress is not None:
            how.progress(first + done, total)

    fill(
        source.checkpoint,
        straight,
        direct,
        memory_limit=how.memory_limit,
        concurrency=how.concurrency,
        progress=lambda done, _of: tell(done, 0),
    )
    with torch.no_grad():
        for name, tensor in handed(
            source.checkpoint,
            others,
            "cpu",
            memory_limit=how.memory_limit,
            concurrency=how.concurrency,
            progress=lambda done, _of: tell(done, before),
        ):
            for target, piece in source.uses[name]:
                _looked_at(held[target], piece.dst).copy_(_looked_at(tensor, piece.src))


def _view(item: Item, uses: Iterable[tuple[str, Piece]], held: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The memory that is this tensor, as it is, in its shape; None where it is cast, cut or turned."""
    taken = tuple(uses)
    if len(taken) != 1:
        return None
    ((name, piece),) = taken
    target = held[name]
    if target.dtype is not item.entry.dtype.torch() or not piece.src.contiguous:
        return None
    if piece.src.size != row_major(item.entry.shape).size:
        return None
    try:
        return _looked_at(target, piece.dst.reshape(*item.entry.shape))
    except UnsupportedTransform:
        return None


def _looked_at(tensor: torch.Tensor, window: Window) -> torch.Tensor:
    return tensor.as_strided(window.shape, window.strides, tensor.storage_offset() + window.offset)


def _no_holes(model: Any) -> None:
    """Refuse a model of which a tensor has no memory."""
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            if tensor.is_meta:
                raise Incomplete(f"nothing gives {type(model).__name__} its tensor {name!r}")
