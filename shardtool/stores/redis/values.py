"""The values that SGLang's ``--load-format remote`` reads from Redis: what they are called and what is in them.

After ``sglang/srt/connector/redis.py``, ``connector/serde/safe_serde.py``, ``connector/utils.py`` and
``RemoteModelLoader.save_model`` in ``sglang/srt/model_loader/loader.py`` of SGLang 0.5.23::

    N/keys/rank_R/<tensor>    a safetensors file with one tensor, ``tensor_bytes``
    N/files/<name>            a text in UTF-8; every one is pulled, so nothing else may be there

SGLang asks the server at ``redis://host:port/N`` without user, password or TLS, in database 0, and reads every key that
begins like those of its rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from shardtool import header, manifest
from shardtool.errors import FormatError, PlanError, UsageError
from shardtool.header import Entry as Tensor
from shardtool.stores.redis.records import Extent, Layout, Names, Record

LARGEST = 512 << 20
"""Bytes of a value: what a Redis server takes unless its proto-max-bulk-len is changed."""
_RANKED = re.compile(r"(?:.*[^0-9A-Za-z])?rank-(\d{1,6})-part-\d+\.safetensors")
_GLOB = re.compile(r"[*?\[\]\\]")


def prefix(tensor: Tensor) -> bytes:
    """What is before the bytes of a tensor in its value, as ``safetensors.torch.save`` writes it."""
    about = {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]}
    text = json.dumps({"tensor_bytes": about}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def rank_of(key: str) -> int | None:
    """The rank whose file this is; None for other objects."""
    found = _RANKED.fullmatch(key)
    return int(found[1]) if found else None


def is_side_file(key: str, size: int) -> bool:
    """Whether SGLang shall pull this object, if it is a text. It cannot pull into folders."""
    return "/" not in key and not key.startswith(".") and key != manifest.KEY and 0 < size <= LARGEST


def check_name(name: str, db: int, uri: str) -> None:
    """Refuse with ``UsageError`` a place where SGLang could not find anything."""
    if db:
        raise UsageError(f"{uri}: SGLang reads database 0 only, leave db={db} out")
    if _GLOB.search(name):
        raise UsageError(f"{uri}: SGLang takes *, ?, [, ] and backslashes in a name for patterns, use another name")


def check_values(tensors: Sequence[Tensor], where: str) -> None:
    """Refuse with ``PlanError`` a file with a tensor that does not fit into a value."""
    for tensor in tensors:
        size = len(prefix(tensor)) + tensor.nbytes
        if size > LARGEST:
            raise PlanError(
                f"tensor {tensor.name!r} of {where} makes a value of {size} bytes, but Redis takes {LARGEST} at most:"
                " use more ranks, or leave for=sglang out of the address"
            )


def layout_of(names: Names, key: str, record: Record, first: bytes, where: str) -> Layout:
    """Where the bytes of an object are that SGLang reads. ``first``: piece 0 of a rank's file, its header.

    Raises ``FormatError`` where that is not what it should be.
    """
    if record.place == "file":
        return [(0, Extent(names.file(key), 0, record.size))]
    length = header.length(first[:8], record.size, where)
    if len(first) != 8 + length:
        raise FormatError(f"the header of {where} is damaged on the server: write the file again")
    found: Layout = [(0, Extent(names.piece(record.id, 0), 0, len(first)))]
    for tensor in header.parse(first[8:], record.size, where).entries:
        value = names.ranked(record.rank) + tensor.name
        found.append((tensor.offset, Extent(value, len(prefix(tensor)), tensor.nbytes)))
    return found
