"""One of several processes that stream whole tensors together: scenes for ``tests.exchanging``.

The folder holds ``model``, whole tensors, and ``tpN``, its shards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from shardtool.stores.counting import CountingStore
from shardtool.stores.local.store import LocalStore
from tests.exchanging import Scene, main
from tests.slicing import digests


class Counted(CountingStore):
    """A folder that says that it is far away, and counts what is asked of it."""

    made: ClassVar[list[CountingStore]] = []

    def __init__(self, uri: str) -> None:
        super().__init__(LocalStore(uri.removeprefix("counted://")))
        self.uri = uri
        self.remote = True
        self.made.append(self)


def counted(uri: Path, **options: Any) -> tuple[dict[str, str], list[tuple[str, int, int]]]:
    """The tensors of a stream, and the ranges of tensors that this process read for it."""
    import shardtool
    from shardtool import stores
    from tests.streaming import Counted  # not that of this script: the store is made by its name

    stores.SCHEMES["counted"] = "tests.streaming:Counted"
    Counted.made.clear()
    found = digests(shardtool.stream(f"counted://{uri}", **options))
    starts = {path.name: 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in uri.glob("*.safetensors")}
    reads = [
        (key, start, stop)
        for store in Counted.made
        for key, spans in store.reads.items()
        for start, stop in spans
        if start >= starts.get(key, 1 << 60)
    ]
    return found, reads


def compared(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    import shardtool

    wanted = digests(shardtool.load(folder / name, distributed=False).items())
    found, reads = counted(folder / name, **options)
    return {"same": list(found.items()) == list(wanted.items()), "reads": reads}


def whole(folder: Path, rank: int, size: int) -> dict[str, Any]:
    return compared(folder, "model", distributed=True)


def least(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """As little memory as possible."""
    return compared(folder, "model", distributed=True, memory_limit=0, concurrency=1)


def everybody(folder: Path, rank: int, size: int) -> dict[str, Any]:
    return compared(folder, "model", distributed=True, scope="global")


def by_itself(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """What ``auto`` does with a store that is not this machine's, and with one that is."""
    from shardtool.exchange import exchange_for

    found = compared(folder, "model", distributed="auto")
    return {**found, "local": exchange_for(folder / "model", "auto") is None}


def own_files(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Rank files are of one rank each: there is nothing to exchange."""
    import shardtool

    wanted = digests(shardtool.stream(folder / f"tp{size}", rank=rank, distributed=False))
    return {"same": digests(shardtool.stream(folder / f"tp{size}", rank=rank, distributed=True)) == wanted}


def filled(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Tensors that exist."""
    import torch

    import shardtool

    wanted = shardtool.load(folder / "model", distributed=False)
    target = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    shardtool.load_into(target, folder / "model", distributed=True)
    return {"same": digests(target.items()) == digests(wanted.items())}


def cut_short(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """The file shrinks after its header was read: whoever reads its end fails."""
    import shardtool

    path = sorted((folder / "model").glob("*.safetensors"))[-1]
    tensors = shardtool.stream(folder / "model", distributed=True, memory_limit=0)
    next(tensors)
    if rank == 0:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 64)
    list(tensors)
    return {}


def absent(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """The last rank does not even find the checkpoint."""
    import shardtool

    name = "nowhere" if rank == size - 1 else "model"
    list(shardtool.stream(folder / name, distributed=True))
    return {}


def enough(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """The first rank stops after two tensors."""
    import shardtool

    for number, _ in enumerate(shardtool.stream(folder / "model", distributed=True)):
        if rank == 0 and number == 1:
            break
    return {}


def unbegun(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """The first rank asks for a stream and drops it."""
    import shardtool

    tensors = shardtool.stream(folder / "model", distributed=True)
    if rank:
        list(tensors)
    return {}


def unlike_device(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """The last rank asks for a device that it does not have."""
    import shardtool

    list(shardtool.stream(folder / "model", distributed=True, device="cuda:77" if rank == size - 1 else "cpu"))
    return {}


def other_order(folder: Path, rank: int, size: int) -> dict[str, Any]:
    import shardtool

    names = sorted(shardtool.load(folder / "model", distributed=False), reverse=bool(rank))
    list(shardtool.stream(folder / "model", distributed=True, order=names))
    return {}


SCENES: dict[str, Scene] = {
    "whole": whole,
    "least": least,
    "everybody": everybody,
    "by_itself": by_itself,
    "own_files": own_files,
    "filled": filled,
    "cut_short": cut_short,
    "absent": absent,
    "enough": enough,
    "unbegun": unbegun,
    "unlike_device": unlike_device,
    "other_order": other_order,
}

if __name__ == "__main__":
    main(SCENES, set())
