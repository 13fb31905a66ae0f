"""What the environment says: the only place that reads its variables.

A flag wins over ``SHARDTOOL_*``, which wins over the twin that Run:ai's streamer reads, which wins over the default::

    --memory-limit    SHARDTOOL_MEMORY_LIMIT    RUNAI_STREAMER_MEMORY_LIMIT    bytes or a size; -1 no limit, 0 the least
    --concurrency     SHARDTOOL_CONCURRENCY     RUNAI_STREAMER_CONCURRENCY     1 to 1024
    --bwlimit         SHARDTOOL_BWLIMIT                                        bytes per second, or a size
    --block-size      SHARDTOOL_BLOCK_SIZE      RUNAI_STREAMER_CHUNK_BYTESIZE  a size
    --max-part-size   SHARDTOOL_MAX_PART_SIZE                                  a size
    --pattern         SHARDTOOL_PATTERN                                        names of files that are written
    --dtype           SHARDTOOL_DTYPE                                          as the flag
    --layout          SHARDTOOL_LAYOUT                                         as the flag, of save
    --engine-python   SHARDTOOL_ENGINE_PYTHON                                  a path
    --layer-partition SHARDTOOL_LAYER_PARTITION VLLM_PP_LAYER_PARTITION        numbers of layers, for example 16,18
    --device          SHARDTOOL_DEVICE                                         as the flag
    --distributed     SHARDTOOL_DISTRIBUTED    RUNAI_STREAMER_DIST             1, 0 or auto
    --quiet           SHARDTOOL_QUIET                                          1 or 0

``shardtool.integrations.runai`` reads RUNAI_STREAMER_S3_ENDPOINT, _S3_UNSIGNED, _S3_USE_VIRTUAL_ADDRESSING,
_DIST_GLOBAL and _DIST_TIMEOUT besides.

An empty variable counts as one that is not set. A bad value is a ``UsageError`` that names the variable.
"""

from __future__ import annotations

import os
import re
from typing import Literal

from shardtool.errors import UsageError
from shardtool.units import parse_size

MOST_READERS = 1024
_MOST_BYTES = 1 << 62
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,4})?")


def memory_limit(flag: str | None) -> int | None:
    """Bytes; -1 is no limit, 0 the least that does. None: the operation's own default."""
    said = _said(flag, "--memory-limit", "SHARDTOOL_MEMORY_LIMIT", "RUNAI_STREAMER_MEMORY_LIMIT")
    if said is None:
        return None
    text, name = said
    return -1 if text == "-1" else _size(text, name)


def concurrency(flag: int | None) -> int | None:
    """How many reads are under way at once, or None."""
    said = _said(flag, "--concurrency", "SHARDTOOL_CONCURRENCY", "RUNAI_STREAMER_CONCURRENCY")
    if said is None:
        return None
    text, name = said
    found = _number(text, name)
    if not 1 <= found <= MOST_READERS:
        raise UsageError(f"{name} {text} is not a number of readers; write one from 1 to {MOST_READERS}")
    return found


def bwlimit(flag: str | None) -> int | None:
    """Bytes that are read, and bytes that are written, in a second at most, or None."""
    said = _said(flag, "--bwlimit", "SHARDTOOL_BWLIMIT")
    if said is None:
        return None
    text, name = said
    return _size(re.sub(r"/s$", "", text), name)


def block_size(flag: str | None) -> int | None:
    """Bytes of one read at most, or None."""
    said = _said(flag, "--block-size", "SHARDTOOL_BLOCK_SIZE", "RUNAI_STREAMER_CHUNK_BYTESIZE")
    return None if said is None else _size(*said)


def max_part_size(flag: str | None) -> int | None:
    """Bytes of a file at most, or None."""
    said = _said(flag, "--max-part-size", "SHARDTOOL_MAX_PART_SIZE")
    return None if said is None else _size(*said)


def pattern(flag: str | None) -> str | None:
    """The names of the files that are written, or None."""
    said = _said(flag, "--pattern", "SHARDTOOL_PATTERN")
    return None if said is None else said[0]


def dtype(flag: str | None) -> str | None:
    """The element type that shards shall have, or None."""
    said = _said(flag, "--dtype", "SHARDTOOL_DTYPE")
    return None if said is None else said[0]


def layout(flag: str | None) -> str | None:
    """The layout by which to cut, or None."""
    said = _said(flag, "--layout", "SHARDTOOL_LAYOUT")
    return None if said is None else said[0]


def engine_python(flag: str | None) -> str | None:
    """The interpreter that has the engine, or None."""
    said = _said(flag, "--engine-python", "SHARDTOOL_ENGINE_PYTHON")
    return None if said is None else said[0]


def layer_partition(flag: str | None) -> tuple[int, ...] | None:
    """The layers of each pipeline stage, or None. vLLM reads the same variable when it serves."""
    said = _said(flag, "--layer-partition", "SHARDTOOL_LAYER_PARTITION", "VLLM_PP_LAYER_PARTITION")
    if said is None:
        return None
    text, name = said
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", part) for part in parts) or len(parts) > MOST_READERS:
        raise UsageError(f"{name} {text[:32]!r} is not a number of layers for each stage; write for example 16,18")
    return tuple(map(int, parts))


def device(flag: str | None) -> str | None:
    """``cpu``, ``cuda`` or ``cuda:N``; under torchrun ``cuda`` is the process's own GPU. None if nothing says one."""
    said = _said(flag, "--device", "SHARDTOOL_DEVICE")
    if said is None:
        return None
    text, name = said
    if not _DEVICE.fullmatch(text):
        raise UsageError(f"{name} {text!r} is not a device; write cpu, cuda or cuda:0")
    if text == "cuda" and (started := torchrun()):
        return f"cuda:{started[1]}"
    return text


def quiet(flag: bool | None) -> bool:
    """Whether only errors and differences are to be shown."""
    if flag is not None:
        return flag
    said = _said(None, "--quiet", "SHARDTOOL_QUIET")
    if said is None:
        return False
    return _switch(*said)


def torchrun() -> tuple[int, int, int] | None:
    """(rank, local rank, world size) of a process that torchrun started, or None."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    texts = [os.environ.get(name, "").strip() for name in names]
    if not all(texts):
        return None
    rank, local, world = map(_number, texts, names)
    if rank >= world:
        raise UsageError(f"RANK {rank} is not below WORLD_SIZE {world}; unset both, or start the command with torchrun")
    return rank, local, world


def distributed(flag: bool | str | None) -> bool | Literal["auto"] | None:
    """Whether ranks that want the same bytes read them once and exchange them, or None."""
    said = _said(flag, "--distributed", "SHARDTOOL_DISTRIBUTED", "RUNAI_STREAMER_DIST")
    if said is None:
        return None
    text, name = said
    if text.lower() == "auto":
        return "auto"
    if text.lower() not in (*_TRUE, *_FALSE):
        raise UsageError(f"{name} {text!r} is neither on nor off nor auto; write 1, 0 or auto")
    return text.lower() in _TRUE


def distributed_scope() -> Literal["node", "global"]:
    """Which ranks exchange what they read: those of a node, or all of them as Run:ai's users may set it."""
    said = _said(None, "", "RUNAI_STREAMER_DIST_GLOBAL")
    return "global" if said is not None and _switch(*said) else "node"


def distributed_timeout() -> int | None:
    """Seconds that a rank waits for another, as Run:ai's users set them, or None."""
    said = _said(None, "", "RUNAI_STREAMER_DIST_TIMEOUT")
    return None if said is None else _number(*said)


def s3_endpoint() -> str | None:
    """The address of the S3 server, as Run:ai's users set it, or None: boto3's own settings decide."""
    said = _said(None, "", "RUNAI_STREAMER_S3_ENDPOINT")
    return None if said is None else said[0]


def s3_unsigned() -> bool:
    """Whether Run:ai's users ask S3 servers as nobody."""
    said = _said(None, "", "RUNAI_STREAMER_S3_UNSIGNED")
    return said is not None and _switch(*said)


def s3_addressing() -> str | None:
    """Where Run:ai's users have the bucket's name, ``virtual`` or ``path``; None leaves it to what fits the server."""
    said = _said(None, "", "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING")
    return None if said is None else "virtual" if _switch(*said) else "path"


def _said(flag: object, option: str, *variables: str) -> tuple[str, str] | None:
    """What was said, and the flag or the variable that said it."""
    if flag is not None:
        return str(flag).strip(), option
    for variable in variables:
        if text := os.environ.get(variable, "").strip():
            return text, variable
    return None


def _size(text: str, name: str) -> int:
    """Bytes of a text such as ``5GiB``."""
    found = parse_size(text, name) if len(text) < 32 else _MOST_BYTES + 1
    if found > _MOST_BYTES:
        raise UsageError(f"{name} {text[:32]!r} is more than any machine has; write for example 64MiB or 5GiB")
    return found


def _switch(text: str, name: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise UsageError(f"{name} {text!r} is neither on nor off; write 1 or 0")
    return text.lower() in _TRUE


def _number(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(f"{name} {text[:32]!r} is not a whole number")
    return int(text)
