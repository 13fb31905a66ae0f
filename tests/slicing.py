"""One of several processes that take their slices of a checkpoint together: scenes for ``tests.exchanging``.

The folder holds ``model``, whole tensors, and ``tpN`` or ``tpNppM``, what ``save`` writes of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.exchanging import Scene, main


def digests(tensors: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """A digest of each tensor, with its dtype and shape."""
    import torch

    found = {}
    for name, tensor in tensors:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
    return found


def taken(uri: Path, shards: Path, rank: int, sizes: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Take a rank's slices together, and compare them with its shards; what was read, and what alone would be."""
    import shardtool
    from shardtool.exchange import Exchange
    from shardtool.ops.slices import Wanted, opened
    from shardtool.ops.together import together
    from shardtool.stores.counting import CountingStore

    exchange = Exchange()
    with opened(uri, Wanted(rank=rank, verify=False, **sizes)) as found:  # whole chunks would be read by several
        counting = CountingStore(found.store)
        tensors = together(dataclasses.replace(found, store=counting), exchange, **options)
        same = digests(tensors) == digests(shardtool.stream(shards, rank=rank))
        reads = [[key, *span] for key, spans in counting.reads.items() for span in spans]
        return {"same": same, "reads": reads, "alone": found.to_read(), "bytes": found.nbytes}


def whole(folder: Path, rank: int, size: int) -> dict[str, Any]:
    return taken(folder / "model", folder / f"tp{size}", rank, {"tp": size})


def least(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """As little memory as possible, one reader; and not the same limit everywhere."""
    return taken(folder / "model", folder / f"tp{size}", rank, {"tp": size}, memory_limit=rank << 20, concurrency=1)


def turned(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """The ranks of the model in another order than those of the processes."""
    return taken(folder / "model", folder / f"tp{size}", size - 1 - rank, {"tp": size})


def shards(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """From shards for one rank."""
    return taken(folder / "tp1", folder / f"tp{size}", rank, {"tp": size})


def stages(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Ranks of two stages, which have tensors of different names."""
    return taken(folder / "model", folder / "tp2pp2", rank, {"tp": size // 2, "pp": 2})


def called(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """In one call, as people write it."""
    import shardtool
    from shardtool.ops.slices import sliced

    wanted = digests(shardtool.stream(folder / f"tp{size}", rank=rank))
    found = [digests(sliced(folder / x, tp=size, rank=rank, distributed=True)) for x in ("model", "tp1")]
    return {"same": found == [wanted, wanted]}


def damaged(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Shards of which one byte has changed, in a norm that all want and one reads."""
    from shardtool.ops.slices import sliced

    for _ in sliced(folder / "damaged", tp=size, rank=rank, distributed=True):
        pass
    return {}


def broken(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """A store that one rank cannot read on."""
    from shardtool.errors import AccessDenied
    from shardtool.exchange import Exchange
    from shardtool.ops.slices import Wanted, opened
    from shardtool.ops.together import together
    from shardtool.stores.base import Wrapper

    class Closing(Wrapper):
        left = 3

        def readinto(self, key: str, start: int, view: memoryview) -> None:
            self.left -= 1
            if self.left < 0:
                raise AccessDenied(f"{key} may not be read any more")
            super().readinto(key, start, view)

    exchange = Exchange()
    with opened(folder / "model", Wanted(tp=size, rank=rank)) as found:
        store = Closing(found.store) if rank == 1 else found.store
        for _ in together(dataclasses.replace(found, store=store), exchange):
            pass
    return {}


def absent(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """One rank is told another place."""
    from shardtool.ops.slices import sliced

    for _ in sliced(folder / ("model" if rank else "nowhere"), tp=size, rank=rank, distributed=True):
        pass
    return {}


def unlike(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """One rank has other sizes."""
    from shardtool.ops.slices import sliced

    for _ in sliced(folder / "model", tp=size if rank else 2 * size, rank=rank, distributed=True):
        pass
    return {}


def twice(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Two processes take one rank."""
    from shardtool.ops.slices import sliced

    for _ in sliced(folder / "model", tp=size, rank=0, distributed=True):
        pass
    return {}


def enough(folder: Path, rank: int, size: int, kill: bool = False) -> dict[str, Any]:
    """The last rank has enough after some tensors, as soon as some of what is together is there."""
    from shardtool.ops.slices import Wanted, opened, sliced

    with opened(folder / "model", Wanted(tp=size, rank=rank)) as found:
        count = len(found.slices)
    # With little memory, nobody is through before somebody stops.
    tensors = sliced(folder / "model", tp=size, rank=rank, distributed=True, memory_limit=0)
    for number, _ in enumerate(tensors):
        if rank == size - 1 and number == count // 2:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            tensors.close()  # type: ignore[attr-defined]
            return {"stopped": True}
    return {}


def killed(folder: Path, rank: int, size: int) -> dict[str, Any]:
    return enough(folder, rank, size, kill=True)


SCENES: dict[str, Scene] = {
    scene.__name__: scene
    for scene in (
        whole,
        least,
        turned,
        shards,
        stages,
        called,
        damaged,
        broken,
        absent,
        unlike,
        twice,
        enough,
        killed,
    )
}

if __name__ == "__main__":
    main(SCENES, {"killed"})
