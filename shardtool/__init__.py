"""shardtool converts, streams and verifies sharded model checkpoints.

::

    import shardtool

    shardtool.save("llama", "llama-tp4", tp=4)          # a Hugging Face checkpoint -> one file set per rank
    shardtool.verify("llama-tp4", against="llama")      # every tensor of every rank, without merging
    for name, tensor in shardtool.stream("llama-tp4", rank=0):
        ...                                             # digests are checked on the way

Importing this package is cheap: numpy, torch and boto3 are loaded by the functions that need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardtool.errors import (
    AccessDenied,
    AlreadyExists,
    BudgetTooSmall,
    ChecksumMismatch,
    FormatError,
    Incomplete,
    IntegrityError,
    NotFound,
    PlanError,
    ShardtoolError,
    StoreError,
    TensorMismatch,
    Unavailable,
    UnsupportedModel,
    UnsupportedTransform,
    UsageError,
)

if TYPE_CHECKING:
    from shardtool.ops.bench import bench
    from shardtool.ops.clean import clean
    from shardtool.ops.inspect import inspect
    from shardtool.ops.load import load, load_into, stream
    from shardtool.ops.merge import merge
    from shardtool.ops.model import load_model
    from shardtool.ops.pull import pull
    from shardtool.ops.reshard import reshard
    from shardtool.ops.safe import load_file, safe_open
    from shardtool.ops.save import save
    from shardtool.ops.trace import trace
    from shardtool.ops.verify import verify
    from shardtool.stores import open_store

__version__ = "0.1.0"

_LAZY = {
    "bench": "shardtool.ops.bench",
    "clean": "shardtool.ops.clean",
    "inspect": "shardtool.ops.inspect",
    "load": "shardtool.ops.load",
    "load_file": "shardtool.ops.safe",
    "load_into": "shardtool.ops.load",
    "load_model": "shardtool.ops.model",
    "merge": "shardtool.ops.merge",
    "open_store": "shardtool.stores",
    "pull": "shardtool.ops.pull",
    "reshard": "shardtool.ops.reshard",
    "safe_open": "shardtool.ops.safe",
    "save": "shardtool.ops.save",
    "stream": "shardtool.ops.load",
    "trace": "shardtool.ops.trace",
    "verify": "shardtool.ops.verify",
}

__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "BudgetTooSmall",
    "ChecksumMismatch",
    "FormatError",
    "Incomplete",
    "IntegrityError",
    "NotFound",
    "PlanError",
    "ShardtoolError",
    "StoreError",
    "TensorMismatch",
    "Unavailable",
    "UnsupportedModel",
    "UnsupportedTransform",
    "UsageError",
    "bench",
    "clean",
    "inspect",
    "load",
    "load_file",
    "load_into",
    "load_model",
    "merge",
    "open_store",
    "pull",
    "reshard",
    "safe_open",
    "save",
    "stream",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'shardtool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
