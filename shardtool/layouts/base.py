"""What a layout is given and what it says. Pure: config dicts and headers in, a recipe out.

::

    Model       config.json, every source tensor's dtype and shape, and whether two of them are equal
    Parallel    tp, pp
    Outline     the recipe, what is dropped and why, which sources are copies, what config.json must say instead
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from shardtool.dtypes import DType
from shardtool.errors import UsageError
from shardtool.mosaic import Logical
from shardtool.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Parallel:
    """The sizes of the groups. A rank is ``pp_rank * tp + tp_rank``."""

    tp: int
    pp: int = 1

    def __post_init__(self) -> None:
        if type(self.tp) is not int or not 1 <= self.tp <= 1024:
            raise UsageError(f"--tp {self.tp!r} is not a number of ranks from 1 to 1024")
        if self.pp != 1:
            raise UsageError("pipeline parallel layouts are not supported yet; leave --pp out")

    @property
    def ranks(self) -> range:
        """Every rank."""
        return range(self.tp * self.pp)

    def place(self, rank: int) -> tuple[int, int]:
        """(tp rank, pp rank) of a rank."""
        return rank % self.tp, rank // self.tp


def _never_equal(_a: str, _b: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Model:
    """A source model.

    ``equal(a, b)`` compares two tensors' bytes; it may read, so a layout asks only where it must know.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Logical]
    dtype: DType
    equal: Callable[[str, str], bool] = _never_equal


@dataclass(frozen=True, slots=True)
class Outline:
    """What a layout says of a model."""

    recipe: Recipe
    dropped: Mapping[str, str] = field(default_factory=dict)  # source tensor -> why
    copies: Mapping[str, str] = field(default_factory=dict)  # source tensor -> the source tensor that it equals
    amendments: Mapping[str, Any] = field(default_factory=dict)  # keys of config.json -> what they must be


class Layout(Protocol):
    """How one engine wants a model's ranks."""

    def outline(self, model: Model, parallel: Parallel) -> Outline:
        """The recipe of every rank. Raises ``PlanError`` where the engine would refuse the model at these sizes."""

    def record(self) -> dict[str, Any]:
        """What the manifest keeps of this layout, enough to evaluate it again at other sizes."""
