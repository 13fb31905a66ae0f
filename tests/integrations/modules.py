"""Modules that stand for an engine's models: tensors of given names and shapes, poisoned, and one that cuts by itself.

::

    empty(uri, rank)            what a rank of some shards would hold, as a module
    Cutter(uri, rank)           the same, which takes whole tensors and cuts them by the recipe of those shards
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

import shardtool
from shardtool.checkpoint import open_checkpoint
from shardtool.plan import Mosaic
from shardtool.recipe import Recipe
from tests.engine import replay

Tensors = Mapping[str, torch.Tensor]


class Tree(torch.nn.Module):
    """A module with these parameters, by dotted names; tensors that are one are one parameter."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        made: dict[int, torch.nn.Parameter] = {}
        for name, tensor in tensors.items():
            module: torch.nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            parameter = made.setdefault(id(tensor), torch.nn.Parameter(tensor, requires_grad=False))
            module.register_parameter(leaf, parameter)


def poisoned(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors of the same names, shapes and types, all bits set."""
    found = {}
    for name, tensor in tensors.items():
        new = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        new.reshape(-1).view(torch.uint8).fill_(255)
        found[name] = new
    return found


def empty(uri: Any, rank: int) -> Tree:
    """The module of a rank of some shards, without their values."""
    return Tree(poisoned(shardtool.load(uri, rank=rank)))


class Cutter(Tree):
    """A module that takes whole tensors and cuts them by the recipe of some shards, as an engine's model does.

    ``instead``: what it does with them instead. ``names``: those that came.
    """

    instead: Callable[[Any], Any] | None = None
    secondary_weights: Any = ()

    def __init__(self, uri: Any, rank: int) -> None:
        super().__init__(poisoned(shardtool.load(uri, rank=rank)))
        made = open_checkpoint(uri).manifest
        assert made is not None
        self.recipe: Recipe = made.recipe
        self.rank = rank
        self.names: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Take them; the names of what was filled."""
        return self.cut(weights) if self.instead is None else self.instead(weights)

    def cut(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill what can be made of them; a tensor of which something is missing is left as it is."""
        held: dict[str, torch.Tensor] = {}
        for name, value in weights:
            assert name not in held
            held[name] = value
        self.names = list(held)
        state, done = self.state_dict(), set()
        for wanted in self.recipe.tensors(self.rank):
            if all(piece.source in held for piece in wanted.pieces()):
                mosaic = Mosaic(wanted.dtype, wanted.shape, wanted.pieces(), wanted.fill)
                state[wanted.name].copy_(replay.mosaic(mosaic, held.__getitem__))
                done.add(wanted.name)
        return done


def digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """A digest of each tensor, with its dtype and shape."""
    found = {}
    for name, tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
    return found
