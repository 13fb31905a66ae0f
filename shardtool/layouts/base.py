"""What a layout is given and what it says. Pure: config dicts and headers in, a recipe out.

::

    Model       config.json, every source tensor's dtype and shape, and whether two of them are equal
    Parallel    tp, pp, ep
    Outline     the recipe, what is dropped and why, which sources are copies, what config.json must say instead
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from shardtool.dtypes import DType
from shardtool.mosaic import Logical
from shardtool.parallel import Parallel
from shardtool.recipe import Recipe

__all__ = ["Layout", "Model", "Outline", "Parallel"]


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
    notes: tuple[str, ...] = ()  # what people should know of it


class Layout(Protocol):
    """How one engine wants a model's ranks. ``title``: how people name it, for notes and errors."""

    @property
    def engine(self) -> str:
        """The engine, for example ``vllm``."""

    @property
    def engine_version(self) -> str:
        """The version of the engine whose layout it is."""

    @property
    def title(self) -> str:
        """How people name it: ``the built-in table llama``, ``the trace of vllm 0.32.0``."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes in which the engine can hold the model, the one that it falls back to first."""

    def outline(self, model: Model, parallel: Parallel) -> Outline:
        """The recipe of every rank. Raises ``PlanError`` where the engine would refuse the model at these sizes."""

    def record(self) -> dict[str, Any]:
        """What the manifest keeps of this layout, enough to evaluate it again at other sizes."""


def dtype_in(layout: Layout, wanted: DType) -> DType:
    """The dtype in which the engine holds a model of this config dtype (it runs Gemma's float16 as bfloat16)."""
    return wanted if wanted.name in layout.dtypes else DType[layout.dtypes[0]]
