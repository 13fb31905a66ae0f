"""``load``: stream a rank's tensors (or a whole checkpoint's) to a device, bounded and checked.

::

    stream      (name, tensor) one after the other, in the order of the files; the caller owns each
    ├── load        all of them in a dict
    └── load_into   straight into existing parameters

``ops/stream.py`` says how bytes become tensors, and what the memory limit covers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardtool.checkpoint import Checkpoint
from shardtool.errors import TensorMismatch, UsageError
from shardtool.exchange import Exchange, exchange_for, heard
from shardtool.ops.rank import chosen, equal, items, number, opened
from shardtool.ops.stream import Fresh, Given, Handed, Means, flow, means_for, ordered
from shardtool.segments import Item
from shardtool.stores import Address

if TYPE_CHECKING:
    import torch

Order = str | Sequence[str]


def stream(
    uri: Address,
    *,
    rank: int | None = None,
    device: str = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
    pattern: str | None = None,
    tp: int | None = None,
    pp: int = 1,
    layout: str | None = None,
    order: Order = "file",
    block_size: int | str | None = None,
    distributed: bool | str = "auto",
    scope: str = "node",
    borrow: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(name, tensor)`` for every tensor of a rank; the caller owns them.

    ``rank`` may be left out where there is only one, or none (a Hugging Face checkpoint). ``verify``: check each
    chunk's digest on the way, if there is a manifest; a damaged tensor raises ``ChecksumMismatch`` before it is
    handed over. ``memory_limit``: bytes or a text such as ``1GiB``. ``block_size``: bytes of one read at most.
    ``order``: ``file``, as they lie in the files; ``ready``, as soon as they are there; or a list of names: just those
    tensors, one after the other.

    ``tp``, ``pp``: what ``rank`` holds of so many ranks, whatever the checkpoint was cut for, if at all; ``layout`` as
    in ``save``. Only the ranges that it needs are read, and cut on the way (``ops.slices.sliced`` has more to say).

    ``distributed``: in a ``torch.distributed`` group whose ranks all call this for the same whole tensors, each byte is
    read once (for the processes of a node, or of all with ``scope="global"``) and exchanged; ``auto`` does so unless
    the checkpoint is on this machine. Rank files are always read by their own ranks. A rank that fails ends all of
    them. ``borrow``: tensors that are the page cache of local files; they cost nothing, and change when a file does.
    """
    if tp is not None or pp != 1 or layout is not None:
        if block_size is not None:
            raise UsageError("the size of a read follows from what is cut; leave block_size out")
        if borrow or order != "file":
            raise UsageError("what is cut on the way has its own order and memory; leave order and borrow out")
        from shardtool.ops.slices import sliced

        return sliced(
            uri,
            tp=1 if tp is None else tp,
            pp=pp,
            rank=0 if rank is None else rank,
            layout=layout,
            device=device,
            memory_limit=memory_limit,
            concurrency=concurrency,
            source_pattern=pattern,
            verify=verify,
            distributed=distributed,
            scope=scope,
            progress=progress,
        )
    if borrow and distributed is True:
        raise UsageError("borrow=True exchanges nothing; leave distributed out")
    if borrow:
        distributed = False
    exchange = exchange_for(uri, distributed, scope=scope, device=device)
    with heard(exchange):
        checkpoint = opened(uri, rank, pattern)
        with checkpoint.store.closed_on_failure():
            of = chosen(checkpoint, rank)
            found = items(checkpoint, of, verify=verify)
            exchange = for_whole(exchange, of)
            if borrow:
                borrowed = _borrowed(checkpoint, found, device, order, concurrency, progress)
                return Handed(_closing(checkpoint, borrowed), checkpoint.store.close)
            tensors = handed(
                checkpoint,
                found,
                device,
                memory_limit=memory_limit,
                concurrency=concurrency,
                order=order,
                block_size=block_size,
                exchange=exchange,
                progress=progress,
            )

    def unbegun() -> None:
        checkpoint.store.close()
        if exchange is not None:
            exchange.fail(GeneratorExit())

    return Handed(_closing(checkpoint, tensors), unbegun)


def _borrowed(
    checkpoint: Checkpoint,
    found: Sequence[Item],
    device: str,
    order: Order,
    concurrency: int | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    from shardtool.ops.borrow import borrowed

    number(concurrency, "concurrency")
    return borrowed(checkpoint, ordered(found, order), device, concurrency=concurrency, progress=progress)


def for_whole(exchange: Exchange | None, rank: int | None) -> Exchange | None:
    """The exchange if there is something for it: files of a rank are read by that rank alone."""
    if exchange is None or (rank is None and exchange.size > 1):
        return exchange
    exchange.close()
    return None


def _closing(checkpoint: Checkpoint, tensors: Iterator[tuple[str, Any]]) -> Generator[tuple[str, Any], None, None]:
    """The same, with the checkpoint's store closed at the end."""
    with checkpoint.store:
        yield from tensors


def load(
    uri: Address,
    *,
    rank: int | None = None,
    device: str = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
    pattern: str | None = None,
    tp: int | None = None,
    pp: int = 1,
    layout: str | None = None,
    order: Order = "file",
    block_size: int | str | None = None,
    distributed: bool | str = "auto",
    scope: str = "node",
    borrow: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors of a rank by name. The arguments are those of ``stream``."""
    return dict(
        stream(
            uri,
            rank=rank,
            device=device,
            concurrency=concurrency,
            memory_limit=memory_limit,
            verify=verify,
            pattern=pattern,
            tp=tp,
            pp=pp,
            layout=layout,
            order=order,
            block_size=block_size,
            distributed=distributed,
            scope=scope,
            borrow=borrow,
            progress=progress,
        )
    )


def load_into(
    target: torch.nn.Module | Mapping[str, torch.Tensor],
    uri: Address,
    *,
    rank: int | None = None,
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
    pattern: str | None = None,
    distributed: bool | str = "auto",
    scope: str = "node",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill the parameters of a module, or the tensors of a state dict, in place.

    Names, shapes and dtypes are compared first, and that no two tensors of the target overlap: ``TensorMismatch`` means
    that nothing was written. After any other error, such as a ``ChecksumMismatch`` on the way, the target is written in
    part and must not be used. Two names of one and the same memory (tied weights) may be filled if the checkpoint's
    tensors are equal, and one of them need not be in it.
    """
    import torch

    if not isinstance(target, torch.nn.Module | Mapping):
        raise UsageError(f"target is a {type(target).__name__}, neither a module nor tensors by name")
    given = target.state_dict(keep_vars=True) if isinstance(target, torch.nn.Module) else dict(target)
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    device = next((str(tensor.device) for tensor in tensors.values()), "cpu")
    exchange = exchange_for(uri, distributed, scope=scope, device=device)
    with heard(exchange):
        checkpoint = opened(uri, rank, pattern)
        with checkpoint.store:
            of = chosen(checkpoint, rank)
            found = items(checkpoint, of, verify=verify)
            exchange = for_whole(exchange, of)
            fill(
                checkpoint,
                found,
                tensors,
                memory_limit=memory_limit,
                concurrency=concurrency,
                exchange=exchange,
                progress=progress,
            )


def fill(
    checkpoint: Checkpoint,
    found: list[Item],
    tensors: Mapping[str, torch.Tensor],
    *,
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    exchange: Exchange | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """``load_into`` for some tensors of a checkpoint that is open: each into the tensor of its name, in place.

    What comes over an ``exchange`` is copied there.
    """
    import torch

    number(concurrency, "concurrency")
    size(memory_limit)
    with torch.no_grad():
        places = Given(tensors)
        _check_fit(found, tensors, checkpoint)
        if exchange is not None:
            device = next((str(tensor.device) for tensor in tensors.values()), "cpu")
            limits: dict[str, Any] = {"memory_limit": memory_limit, "concurrency": concurrency}
            for name, tensor in handed(checkpoint, found, device, **limits, exchange=exchange, progress=progress):
                tensors[name].copy_(tensor)
            return
        means = means_for(checkpoint, found, places, memory_limit, concurrency)
        exhaust(flow(checkpoint, found, places, means, order="ready", progress=progress))


def handed(
    checkpoint: Checkpoint,
    found: Sequence[Item],
    device: str,
    *,
    memory_limit: int | str | None = None,
    concurrency: int | None = None,
    order: Order = "file",
    block_size: int | str | None = None,
    exchange: Exchange | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """``stream`` for some tensors of a checkpoint that is open."""
    number(concurrency, "concurrency")
    size(memory_limit)
    places = Fresh(device)
    wanted = ordered(found, order)
    ranks = exchange.size if exchange is not None else 1
    means = means_for(checkpoint, wanted, places, memory_limit, concurrency, ranks=ranks, block_size=block_size)
    tensors = flow(checkpoint, wanted, places, means, order=order, progress=progress, exchange=exchange)
    return _ending(means, tensors)


def _ending(means: Means, tensors: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The same; at the end nothing is kept for reuse any more."""
    try:
        yield from tensors
    finally:
        means.slabs.stop()


def size(memory_limit: object) -> None:
    """Refuse a limit that is neither a number of bytes, nor a text, nor left out."""
    if not isinstance(memory_limit, str):
        number(memory_limit, "memory_limit")


def exhaust(tensors: Iterator[object]) -> None:
    """Take all and keep none: each is gone before the next is asked for, which a loop's variable would not allow."""
    deque(tensors, maxlen=0)


def _check_fit(found: list[Item], tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Refuse a target that does not take these tensors, each in memory of its own. Nothing is written."""
    from shardtool.sinks.tensor import Memory, overlapping

    uri = checkpoint.uri
    filled: dict[Memory, Item] = {}
    for item in found:
        tensor = tensors.get(item.name)
        if tensor is None:
            raise TensorMismatch(
                f"{uri} has the tensor {item.name!r}, which the target does not have; nothing was written"
            )
        kind = item.entry.dtype.torch()
        if tuple(tensor.shape) != item.entry.shape or tensor.dtype is not kind:
            raise TensorMismatch(
                f"{uri}: tensor {item.name!r} is {kind} {list(item.entry.shape)}, the target's is "
                f"{tensor.dtype} {list(tensor.shape)}; "
                "nothing was written"
            )
        if not tensor.numel():
            continue
        memory = Memory.of(tensor)
        if memory.folded:
            raise TensorMismatch(
                f"the target's tensor {item.name!r} has several elements in one place (shape {list(tensor.shape)}, "
                f"strides {list(tensor.stride())}); give it memory of its own, nothing was written"
            )
        other = filled.setdefault(memory, item)
        if other is not item and memory.real and not equal(checkpoint, item, other):
            raise TensorMismatch(
                f"{uri}: {item.name!r} and {other.name!r} differ, but they share their memory in the target (tied "
                "weights); nothing was written"
            )
    if pair := overlapping(filled):
        first, second = sorted(filled[memory].name for memory in pair)
        raise TensorMismatch(f"the target's tensors {first!r} and {second!r} overlap in memory; nothing was written")
    names = {item.name for item in found}
    for name, tensor in tensors.items():
        if name not in names and tensor.numel() and Memory.of(tensor) not in filled:
            raise TensorMismatch(f"the target's tensor {name!r} is not in {uri}; nothing was written")
