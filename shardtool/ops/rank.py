"""One rank's tensors as they lie: which there are, in which files, with which digests.

::

    opened      a URI -> the checkpoint with the headers of a rank (or of all)
    chosen      the rank that is meant where none was said
    items       a rank -> its tensors in the order of their bytes, each with its digests
    equal       whether two of them have the same bytes
"""

from __future__ import annotations

from shardtool import digest
from shardtool.calm import calm
from shardtool.checkpoint import Checkpoint, open_checkpoint, tensor_of, with_headers
from shardtool.errors import NotFound, TensorMismatch, UsageError
from shardtool.ops.equal import equal as equal_bytes
from shardtool.segments import Item
from shardtool.stores import Address


def text(value: object, name: str) -> None:
    """Refuse an argument that is neither a text nor left out."""
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{name}={value!r} is not a text")


def number(value: object, name: str) -> None:
    """Refuse an argument that is neither a whole number nor left out."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UsageError(f"{name}={value!r} is not a whole number")


def opened(uri: Address, rank: int | None, pattern: str | None, *, own: int | None = None) -> Checkpoint:
    """The checkpoint at a URI with the headers of a rank, or of all. Raises ``NotFound`` and ``UsageError``.

    ``own``: the rank to take where there are ranks and none was said.
    """
    number(rank, "rank")
    text(pattern, "pattern")
    checkpoint = open_checkpoint(uri, shard_pattern=pattern)
    with checkpoint.store.closed_on_failure():
        made = checkpoint.manifest
        if made is not None and rank is None:
            rank = own
        if made is not None and rank is not None and rank not in range(made.tp * made.pp):
            raise NotFound(f"{checkpoint.uri} has no rank {rank}; it has ranks 0 to {made.tp * made.pp - 1}")
        return with_headers(checkpoint, None if rank is None else [rank])


def chosen(checkpoint: Checkpoint, rank: int | None) -> int | None:
    """The rank to load: the only one, if none was said."""
    ranks = checkpoint.ranks
    if not ranks:
        if rank is not None:
            raise NotFound(f"{checkpoint.uri} has no rank {rank}: its tensors are whole, leave the rank out")
        return None
    if rank is None:
        if len(ranks) > 1:
            raise UsageError(f"{checkpoint.uri} has {len(ranks)} ranks: say which one to load with rank=")
        return ranks[0]
    return rank


def items(checkpoint: Checkpoint, rank: int | None, *, verify: bool) -> list[Item]:
    """The tensors of a rank in the order of their bytes, with their digests.

    What differs from the manifest is refused.
    """
    with calm():
        return _items(checkpoint, rank, verify=verify)


def _items(checkpoint: Checkpoint, rank: int | None, *, verify: bool) -> list[Item]:
    records = {record.key: record for record in checkpoint.manifest.files} if checkpoint.manifest else {}
    if rank is not None and rank not in checkpoint.ranks:
        whole = " (its tensors are whole, of no rank)" if checkpoint.kind == "huggingface" else ""
        raise NotFound(f"{checkpoint.uri} has no rank {rank}{whole}; leave the rank out or name one that it has")
    entries = checkpoint.entries(rank)
    chunks: dict[str, tuple[str, ...]] = {}
    if verify:
        for file in checkpoint.files:
            record = records.get(file.key)
            if record is None or file.rank != rank:
                continue
            names = [entry.name for entry in file.header.entries]
            if names != [t.name for t in record.tensors] or file.size != record.size:
                raise TensorMismatch(
                    f"{checkpoint.store.locate(file.key)} does not hold what the manifest lists; run shardtool verify"
                )
            chunks.update({t.name: t.digest.chunks for t in record.tensors})
    found = [Item(name, file, entry, chunks.get(name)) for name, (file, entry) in entries.items()]
    for item in found:
        if item.chunks is not None and len(item.chunks) != -(-item.entry.nbytes // digest.CHUNK):
            raise TensorMismatch(
                f"{checkpoint.uri}: tensor {item.name!r} has another size than its digests; run shardtool verify"
            )
    return found


def equal(checkpoint: Checkpoint, a: Item, b: Item) -> bool:
    """Whether two tensors have the same bytes, by their digests or else by reading them."""
    if a.entry.nbytes != b.entry.nbytes:
        return False
    if a.chunks is not None and b.chunks is not None:
        return a.chunks == b.chunks
    return equal_bytes(checkpoint.store, tensor_of(a.file.key, a.entry), tensor_of(b.file.key, b.entry))
