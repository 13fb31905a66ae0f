"""One of several processes that load a model's ranks at the same time: scenes for ``tests.exchanging``.

The folder holds ``model``, whole tensors, and ``tpN``, what ``save`` writes of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.exchanging import Scene, main


def loaded(folder: Path, uri: str, rank: int, size: int, into: Any = None, **said: Any) -> dict[str, Any]:
    """Load this process's rank; whether it holds what its shards do, the way, and the bytes that it read."""
    import shardtool
    from shardtool.integrations.engine_load import Engine, Rank, load
    from shardtool.integrations.engine_options import Options
    from shardtool.layouts.base import Parallel
    from tests.integrations.modules import Cutter, digests

    shards = folder / f"tp{size}"
    into = Cutter(shards, rank) if into is None else into
    engine = Engine("vllm", "vLLM", said.pop("version", "0.32.0"))
    options = Options(**{"distributed": True, **said})
    report = load(into, folder / uri, Rank(Parallel(size), rank), options, engine=engine)
    wanted = digests(shardtool.stream(shards, rank=rank))
    held = digests((name, tensor) for name, tensor in into.state_dict().items() if name in wanted)
    return {"same": held == wanted, "way": report.way, "read": report.read}


def fed(folder: Path, rank: int, size: int) -> dict[str, Any]:
    return loaded(folder, "model", rank, size)


def apart(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Each by itself."""
    return loaded(folder, "model", rank, size, distributed=False)


def own(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """There is nothing to exchange."""
    return loaded(folder, f"tp{size}", rank, size)


def cut(folder: Path, rank: int, size: int) -> dict[str, Any]:
    return loaded(folder, "tp4", rank, size, verify=False)


def cut_apart(folder: Path, rank: int, size: int) -> dict[str, Any]:
    return loaded(folder, "tp4", rank, size, verify=False, distributed=False)


def _with_more(folder: Path, rank: int, size: int) -> Any:
    """A module with a tensor that no table knows."""
    from tests.integrations.modules import Cutter, Tree

    into = Cutter(folder / f"tp{size}", rank)
    into.add_module("new", Tree({"name": torch.zeros(3)}))
    into.instead = lambda weights: into.cut(weights) | {"new.name"}
    return into


def unknown(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """A version that no table knows gets whole tensors from shards."""
    return loaded(folder, "tp4", rank, size, into=_with_more(folder, rank, size), version="0.99.0")


def at_odds(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """One rank's model is other than its files: all take the way that it has to take."""
    into = _with_more(folder, rank, size) if rank else None
    return loaded(folder, f"tp{size}", rank, size, into=into)


def refuses(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """One rank's model does not take what comes."""
    from tests.integrations.modules import Cutter

    def take(weights: Any) -> None:
        next(weights)
        raise ValueError("the model has no module named 'x'")

    into = Cutter(folder / f"tp{size}", rank)
    if rank:
        into.instead = take
    return loaded(folder, "model", rank, size, into=into)


def damaged(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Shards of which one byte has changed, in a norm that all want and one reads."""
    return loaded(folder, "damaged", rank, size)


def replicas(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Two processes for the same rank, as in data parallel: each reads its own."""
    from shardtool.integrations.engine_load import Engine, Rank, load
    from shardtool.integrations.engine_options import Options
    from shardtool.layouts.base import Parallel
    from tests.integrations.modules import empty

    report = load(
        empty(folder / "tp2", 1),
        folder / "tp4",
        Rank(Parallel(2), 1),
        Options(distributed=True),
        engine=Engine("vllm", "vLLM", "0.32.0"),
    )
    return {"way": report.way, "read": report.read}


SCENES: dict[str, Scene] = {
    scene.__name__: scene for scene in (fed, apart, own, cut, cut_apart, unknown, at_odds, refuses, damaged, replicas)
}

if __name__ == "__main__":
    main(SCENES, set())
