"""torch.distributed.checkpoint reads through shardtool: Hugging Face checkpoints, and rank files of any sizes.

::

    import torch.distributed.checkpoint as dcp
    from shardtool.integrations.dcp import ShardtoolReader

    state = model.state_dict()                       # plain tensors, FSDP's, DTensors of any mesh
    dcp.load(state, storage_reader=ShardtoolReader("s3://bucket/llama-tp4", memory_limit="1GiB"))

The names are those of the Hugging Face model, whatever the files hold: a manifest's recipe is read backwards. Each rank
reads the ranges that its own parts need, where there are digests in whole checked chunks, within a memory limit. A name
that the checkpoint does not have is refused by DCP's planner, unless it allows partial loads.

``whole_tensors`` goes the other way: what DCP has saved becomes a folder of safetensors, of which ``shardtool save``
makes shards.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardtool import header
from shardtool.checkpoint import INDEX, Checkpoint, open_checkpoint
from shardtool.dtypes import DType, from_name
from shardtool.errors import ShardtoolError, TensorMismatch, UsageError
from shardtool.mosaic import resolve
from shardtool.ops import source as sources
from shardtool.ops.bring import Slice, Slices, slice_of
from shardtool.parallel import Parallel
from shardtool.plan import Piece, Tensor
from shardtool.recipe import Recipe
from shardtool.stores import Address
from shardtool.stores.local.store import LocalStore
from shardtool.units import parse_size
from shardtool.window import row_major

if TYPE_CHECKING:
    from shardtool.checked import Checked
    from shardtool.ops.source import Source

__all__ = ["ShardtoolReader", "whole_tensors"]


class ShardtoolReader(StorageReader):
    """What ``dcp.load`` takes as its ``storage_reader``.

    ``uri``: a checkpoint of whole tensors, or shards of any sizes. ``memory_limit``, ``concurrency``, ``verify``: as in
    ``shardtool.stream``; tensors go into the caller's own, part by part, so that the limit covers all that is taken
    beside them. ``source_pattern``: the names of shards without a manifest.

    Tensors come in the dtypes that the model had before it was cut, and are cast to those of the caller's.
    """

    def __init__(
        self,
        uri: Address | None = None,
        *,
        memory_limit: int | str | None = None,
        concurrency: int | None = None,
        verify: bool = True,
        source_pattern: str | None = None,
    ) -> None:
        super().__init__()
        self._uri = uri
        self._memory_limit = memory_limit
        self._concurrency = concurrency
        self._verify = verify
        self._pattern = source_pattern
        self.bytes_read = 0
        """Bytes of storage that the last ``read_data`` took."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read another checkpoint from now on, if one is named."""
        if checkpoint_id is not None:
            self._uri = checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint lies there."""
        try:
            open_checkpoint(checkpoint_id).store.close()
        except ShardtoolError:
            return False
        return True

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Every tensor of the model, whole. Reads headers."""
        source, _ = self._open()
        with source.store:
            found = {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=logical.dtype.torch()),
                    torch.Size(logical.shape),
                    [ChunkStorageMetadata(torch.Size([0] * len(logical.shape)), torch.Size(logical.shape))],
                )
                for name, logical in source.inventory.items()
                if name in source.catalog and logical.dtype.torch_name is not None and not logical.dtype.bits % 8
            }
        return Metadata(
            state_dict_metadata=dict[str, Any](found), storage_data=dict[Any, Any](), storage_meta=StorageMeta()
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: each read opens the checkpoint anew."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is: what a rank reads depends on its own plan only."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the planner names, in the order in which the bytes lie. Raises shardtool's errors."""
        if foreign := [item.storage_index.fqn for item in plan.items if item.type is not LoadItemType.TENSOR]:
            raise UsageError(f"{foreign[0]!r} is not a tensor: a checkpoint of shardtool has nothing else")
        source, checked = self._open()
        with source.store:
            wanted = {str(number): item for number, item in enumerate(plan.items)}
            found = [slice_of(_part(name, item, source), _resolver(source)) for name, item in wanted.items()]
            self._bring(_together(source, checked, found), wanted, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _bring(self, found: Slices, wanted: Mapping[str, ReadItem], planner: LoadPlanner) -> None:
        self.bytes_read = found.to_read(memory_limit=self._memory_limit)
        with torch.no_grad():
            for name, tensor in found.tensors(memory_limit=self._memory_limit, concurrency=self._concurrency):
                target = planner.resolve_tensor(wanted[name]).detach()
                if target.shape != tensor.shape:
                    raise TensorMismatch(
                        f"{found.source.uri}: a part of {wanted[name].storage_index.fqn!r} is {list(tensor.shape)}, "
                        f"the model wants it as {list(target.shape)}"
                    )
                target.copy_(tensor)
                planner.commit_tensor(wanted[name], target)

    def _open(self) -> tuple[Source, Checked | None]:
        if self._uri is None:
            raise UsageError("say what to load: ShardtoolReader(uri), or checkpoint_id=uri")
        checkpoint: Checkpoint = open_checkpoint(self._uri, shard_pattern=self._pattern)
        with checkpoint.store.closed_on_failure():
            return sources.checked(checkpoint, verify=self._verify)


def _part(name: str, item: ReadItem, source: Source) -> Tensor:
    """What one item wants, under a name of its own: a box of a tensor of the model."""
    fqn = item.storage_index.fqn
    logical = source.inventory[fqn]
    window = row_major(logical.shape)
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        window = window.narrow(dim, start, length)
    lengths = tuple(item.lengths)
    return Tensor(name, logical.dtype, lengths, lambda: (Piece(row_major(lengths), window, fqn),))


def _resolver(source: Source) -> Any:
    return lambda tensor: resolve(tensor, source.catalog)


def _together(source: Source, checked: Checked | None, found: list[Slice]) -> Slices:
    """Parts of a source, as what a rank of one holds."""
    found.sort(key=lambda part: part.first)
    return Slices(
        source=source,
        store=source.store,
        parallel=Parallel(1),
        rank=0,
        slices=tuple(found),
        computing=0,
        recipe=Recipe(()),
        resolve=_resolver(source),
        layout="parts",
        dtype=DType.F32,
        checked=checked,
    )


def whole_tensors(
    saved: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    prefix: str = "",
    max_file_size: int | str = "4GiB",
) -> None:
    """Write the tensors of a folder that DCP has saved into another as safetensors files with their index, each whole.

    ``prefix``: take the names that begin with it, without it (``model.`` for a state of model and optimizer). The most
    memory is that of one tensor. The files are those of the weights; put config.json and the tokenizer beside them.

    DCP keeps its metadata as a pickle, which torch loads: only open folders that you trust. Raises ``UsageError`` for a
    folder that DCP has not saved or an output that holds files already.
    """
    if not Path(saved, ".metadata").is_file():
        raise UsageError(f"{os.fspath(saved)} is not a folder of torch.distributed.checkpoint: it has no .metadata")
    metadata = FileSystemReader(saved).read_metadata()
    tensors = {
        name.removeprefix(prefix): (name, from_name(str(about.properties.dtype)), tuple(about.size))
        for name, about in metadata.state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata) and name.startswith(prefix)
    }
    if not tensors:
        raise UsageError(f"{os.fspath(saved)} has no tensor whose name begins with {prefix!r}")
    files = list(_files(tensors, parse_size(max_file_size, "max_file_size")))
    if Path(output).is_dir() and any(Path(output).iterdir()):
        raise UsageError(f"{os.fspath(output)} is not empty: name a new folder")
    with LocalStore(output) as to:
        weight_map = {}
        for number, names in enumerate(files, 1):
            key = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            weight_map.update(dict.fromkeys(names, key))
            text = header.encode([(name, *tensors[name][1:]) for name in names], {"format": "pt"})
            sizes = [_nbytes(tensors[name]) for name in names]
            writer = to.create(key, len(text) + sum(sizes))
            try:
                writer.write(0, text)
                at = len(text)
                for name, size in zip(names, sizes, strict=True):
                    if size:
                        writer.write(at, _loaded(saved, *tensors[name]))
                    at += size
                writer.commit()
            finally:
                writer.abort()
        total = sum(map(_nbytes, tensors.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        to.put(INDEX, json.dumps(index, indent=2).encode())


def _nbytes(about: tuple[str, DType, tuple[int, ...]]) -> int:
    return about[1].nbytes(torch.Size(about[2]).numel())


def _files(tensors: Mapping[str, tuple[str, DType, tuple[int, ...]]], most: int) -> Iterator[list[str]]:
    """The names of each file, in the order of the format."""
    run: list[str] = []
    weight = 0
    for name in sorted(tensors, key=lambda name: header.sort_key(name, tensors[name][1])):
        size = _nbytes(tensors[name])
        if run and weight + size > most:
            yield run
            run, weight = [], 0
        run.append(name)
        weight += size
    yield run


def _loaded(saved: str | os.PathLike[str], name: str, dtype: DType, shape: tuple[int, ...]) -> memoryview:
    """One tensor's bytes."""
    state = {name: torch.empty(shape, dtype=dtype.torch())}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
        load(state, storage_reader=FileSystemReader(saved), no_dist=True)
    return state[name].reshape(-1).view(torch.uint8).numpy().data
