"""An engine that is traced without being installed: a model of two parallel layers, in plain torch.

It has the methods of an adapter room (``shardtool/tracing/vllm.py``). ``TINY`` says what goes wrong in it, if anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardtool.parallel import Parallel

WIDTH, WORDS = 4, 10
SOURCES = {
    "embed.weight": (torch.bfloat16, (WORDS, WIDTH)),
    "layers.0.up.weight": (torch.bfloat16, (8, WIDTH)),
    "layers.0.decay_log": (torch.float32, (8,)),
    "layers.1.up.weight": (torch.bfloat16, (8, WIDTH)),
    "layers.1.decay_log": (torch.float32, (8,)),
    "rope": (torch.float32, (2,)),
}
Sources = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Layer(nn.Module):
    """A cut weight, what is computed of another tensor, and a constant."""

    def __init__(self, parallel: Parallel) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(8 // parallel.tp, WIDTH), requires_grad=False)
        self.decay = nn.Parameter(torch.empty(8 // parallel.tp, dtype=torch.float32), requires_grad=False)
        places = torch.arange(4) > 1
        self.register_buffer("scale", torch.tensor(1.5 if places.nonzero().numel() == 2 else 0.0))


class Model(nn.Module):
    """Vocabulary padded to a multiple of 8, tied with the head; the layers of a stage."""

    def __init__(self, parallel: Parallel, stage: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(16 // parallel.tp, WIDTH), requires_grad=False)
        self.head = self.embed
        self.layers = nn.ModuleDict({str(i): Layer(parallel) for i in parallel.stages(2)[stage]})


class Engine:
    """The adapter. ``fault``: what goes wrong."""

    version = "1.0"

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def dtype(self, parallel: Parallel) -> torch.dtype:
        """That of the weights."""
        return torch.bfloat16

    def architecture(self, parallel: Parallel) -> str:
        """The model's class."""
        return Model.__name__

    @contextmanager
    def rank(self, parallel: Parallel, rank: int) -> Iterator[Any]:
        """A place."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield parallel, *parallel.place(rank)
        finally:
            torch.set_default_dtype(before)

    def construct(self, config: Any) -> nn.Module:
        """The model."""
        parallel, _, stage = config
        return Model(parallel, stage)

    def load(self, config: Any, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load it."""
        parallel, tp_rank, _ = config
        parameters = dict(model.named_parameters())
        for name, weight in weights:
            if name == "embed.weight":
                rows = 16 // parallel.tp
                part = weight[tp_rank * rows : (tp_rank + 1) * rows]
                parameters["embed"][: len(part)].copy_(part)
                parameters["embed"][len(part) :].fill_(0)
            elif name.endswith("up.weight") and (target := parameters.get(name.removesuffix(".weight"))) is not None:
                target.copy_(weight.chunk(parallel.tp)[tp_rank])
            elif name.endswith("decay_log") and (target := parameters.get(name.removesuffix("_log"))) is not None:
                part = weight.chunk(parallel.tp)[tp_rank]
                target.copy_(part.cumsum(0) if self.fault == "cumsum" else -torch.exp(part))
        if self.fault == "late":
            model.late = nn.Parameter(torch.zeros(2), requires_grad=False)

    def untied(self, config: Any) -> bool:
        """Never."""
        return False

    def tied(self, config: Any, model: nn.Module) -> None:
        """Never."""

    def amendments(self, config: Any, sources: Sources) -> dict[str, Any]:
        """What config.json must say."""
        return {"said": len(sources)}
