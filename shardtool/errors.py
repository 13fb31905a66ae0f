"""Every error that shardtool raises on purpose, and the exit code that each one means.

::

    ShardtoolError                      1
    ├── UsageError                      2   the call or the flags make no sense
    │   └── PlanError                   2   the job cannot be planned
    │       ├── UnsupportedModel        2   an architecture that no layout knows
    │       └── UnsupportedTransform    2   geometry or a dtype that cannot be expressed
    ├── NotFound                        3   the checkpoint, file, rank or tensor does not exist
    ├── Incomplete                      4   a checkpoint that is not whole (yet)
    ├── StoreError                      5   input or output failed
    │   ├── AccessDenied                5
    │   ├── AlreadyExists               5   a create-if-absent that lost
    │   └── Unavailable                 5   worth another try (``retryable``)
    ├── BudgetTooSmall                  6   the memory limit cannot hold the smallest step
    └── IntegrityError                  1   bytes are not what they should be
        ├── ChecksumMismatch            1
        ├── FormatError                 1   a file that is not what its name says
        └── TensorMismatch              1   names, shapes, dtypes or values that differ

A message is one sentence that names the file, tensor, rank or flag, and says what to do.
"""

from __future__ import annotations

import re
from typing import ClassVar

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class ShardtoolError(Exception):
    """The root of the tree."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "") -> None:
        """``message`` may quote names that somebody else chose: what would break the line is escaped."""
        super().__init__(_CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), message))


class UsageError(ShardtoolError):
    """The call or the flags make no sense."""

    exit_code = 2


class PlanError(UsageError):
    """The job cannot be planned: nothing has been written."""


class UnsupportedModel(PlanError):
    """No layout knows the model's architecture."""


class UnsupportedTransform(PlanError):
    """Geometry or a conversion of dtypes that a plan cannot express."""


class NotFound(ShardtoolError):
    """A checkpoint, file, rank or tensor does not exist."""

    exit_code = 3


class Incomplete(ShardtoolError):
    """A checkpoint lacks files, ranks, parts or its manifest."""

    exit_code = 4


class StoreError(ShardtoolError):
    """Input or output failed."""

    exit_code = 5


class AccessDenied(StoreError):
    """The store refused the credentials or the permission."""


class AlreadyExists(StoreError):
    """An object that was to be created exists already."""


class Unavailable(StoreError):
    """The store did not answer properly; another try may help."""

    retryable = True


class BudgetTooSmall(ShardtoolError):
    """The memory limit cannot hold the smallest step of the job."""

    exit_code = 6

    def __init__(self, message: str, *, needed: int = 0) -> None:
        super().__init__(message)
        self.needed = needed


class IntegrityError(ShardtoolError):
    """Bytes are not what they should be."""


class ChecksumMismatch(IntegrityError):
    """A digest differs from the recorded one."""


class FormatError(IntegrityError):
    """A file is not what its name says: bad header, offsets, JSON."""


class TensorMismatch(IntegrityError):
    """Names, shapes, dtypes or values differ."""
