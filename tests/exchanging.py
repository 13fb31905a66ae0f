"""One of several processes that exchange what they read: plays scenes, and writes down how each ended.

Run as ``python -m tests.exchanging FOLDER RANK SIZE SCENE...`` (or ``tests.slicing``, which has other scenes). The
processes find each other through a file of the folder, so that none of them is needed by the others; what became of a
scene goes to ``SCENE-RANK.json``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILE = "data.bin"
SEGMENTS = [300_000, 10, 70_000, 1, 500_000, 123_457, 0, 64, 250_000, 250_000, 90_000, 3, 400_000]
"""Bytes of the segments of the file, one after the other."""


def start(folder: Path, size: int, *scenes: str, module: str = "tests.exchanging") -> list[subprocess.Popen[str]]:
    """Start the processes."""
    (folder / "meeting").unlink(missing_ok=True)
    return [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-W", "error", "-m", module, folder, str(rank), str(size), *scenes],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def finish(children: list[subprocess.Popen[str]], seconds: float = 200) -> list[tuple[int, str]]:
    """Wait for all; status and output of each. One that does not end is a failure of the test."""
    end = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(0.02)
    stuck = [rank for rank, child in enumerate(children) if child.poll() is None]
    for rank in stuck:
        children[rank].send_signal(signal.SIGABRT)  # says where each of its threads is
    outputs = [child.communicate()[0] for child in children]
    assert not stuck, "\n".join(f"rank {rank} waits\n{outputs[rank][-9000:]}" for rank in stuck)
    return [(child.returncode, output) for child, output in zip(children, outputs, strict=True)]


def play(folder: Path, size: int, *scenes: str, module: str = "tests.exchanging") -> dict[str, list[dict[str, Any]]]:
    """Play scenes that all processes survive: by scene, what each rank wrote down."""
    for status, output in finish(start(folder, size, *scenes, module=module)):
        assert status == 0, output[-4000:]
    return {scene: [said(folder, scene, rank) for rank in range(size)] for scene in scenes}


def said(folder: Path, scene: str, rank: int) -> dict[str, Any]:
    """What one rank wrote down of a scene."""
    return json.loads((folder / f"{scene}-{rank}.json").read_text())


# What the processes do.


class Stream:
    """A small reader: own segments from a store that counts, then all of them in order."""

    def __init__(self, folder: Path, exchange: Any) -> None:
        from shardtool.stores import open_store
        from shardtool.stores.counting import CountingStore

        self.store = CountingStore(open_store(str(folder)))
        self.exchange = exchange

    def segments(self, fail_at: int | None = None) -> Iterator[bytes]:
        """The bytes of each segment. ``fail_at``: this one cannot be read."""
        import torch

        from shardtool.errors import ChecksumMismatch

        with self.exchange as exchange:
            owners = exchange.owners(SEGMENTS)
            for i, size in enumerate(SEGMENTS):
                memory = torch.full((size,), 0xEE, dtype=torch.uint8)
                if owners[i] == exchange.rank:
                    if i == fail_at:
                        raise ChecksumMismatch(f"segment {i} differs from its digest")
                    self.store.readinto(FILE, sum(SEGMENTS[:i]), memory.numpy().data)
                exchange.share(i, memory)
                yield bytes(memory.numpy())


Scene = Callable[[Path, int, int], dict[str, Any] | None]


def main(scenes: dict[str, Scene], deadly: set[str]) -> None:
    """Play all scenes, one after the other, in one world. The last rank does not survive those that are ``deadly``."""
    import torch
    import torch.distributed as dist

    from shardtool.errors import ShardtoolError

    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    for scene in sys.argv[4:]:
        found: dict[str, Any] = {}
        began = time.monotonic()
        try:
            found.update(scenes[scene](folder, rank, size) or {})
        except ShardtoolError as error:
            found.update(error=type(error).__name__, message=str(error))
        found["seconds"] = time.monotonic() - began
        (folder / f"{scene}-{rank}.json").write_text(json.dumps(found))
    # Not until everybody is through: who ends a process group must not disturb the others.
    survivors = range(size - 1 if deadly.intersection(sys.argv[4:]) else size)
    while not all((folder / f"{scene}-{r}.json").exists() for scene in sys.argv[4:] for r in survivors):
        time.sleep(0.01)
    dist.destroy_process_group()


def whole(folder: Path, rank: int, size: int, **options: Any) -> dict[str, Any]:
    from shardtool.exchange import Exchange

    exchange = Exchange(**options)
    stream = Stream(folder, exchange)
    same = b"".join(stream.segments()) == (folder / FILE).read_bytes()
    return {"same": same, "reads": sorted(stream.store.reads[FILE]), "size": exchange.size}


def everybody(folder: Path, rank: int, size: int) -> dict[str, Any]:
    return whole(folder, rank, size, scope="global")


def halves(folder: Path, rank: int, size: int) -> dict[str, Any]:
    import torch.distributed as dist

    groups = [dist.new_group(list(range(size // 2))), dist.new_group(list(range(size // 2, size)))]
    return whole(folder, rank, size, group=groups[rank >= size // 2])


def damaged(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """A read that one rank fails with."""
    from shardtool.exchange import Exchange

    handed = 0
    for _ in Stream(folder, Exchange()).segments(fail_at=3):
        handed += 1
    return {"handed": handed}


def stopped(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """A consumer that has enough."""
    from shardtool.exchange import Exchange

    segments = Stream(folder, Exchange()).segments()
    for handed, _ in enumerate(segments, 1):
        if rank == 1 and handed == 4:
            segments.close()  # type: ignore[attr-defined]
            return {"handed": handed}
    return {"handed": len(SEGMENTS)}


def thrown(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """A consumer that fails inside, with an error that is not ours."""
    from shardtool.exchange import Exchange

    try:
        with Exchange() as exchange:
            exchange.owners([10, 10])
            if rank == 0:
                raise RuntimeError("out of pencils")
            exchange.owners([10, 10])
    except RuntimeError as error:
        return {"own": str(error)}
    return {}


def unlike(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """Ranks that want different files."""
    from shardtool.exchange import Exchange

    with Exchange() as exchange:
        exchange.owners([10, 20], ["a", "b"] if rank else ["a", "c"])
    return {}


def crossed(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """One rank is a segment behind."""
    import torch

    from shardtool.exchange import Exchange

    with Exchange() as exchange:
        exchange.owners([10, 10])
        memory = torch.zeros(10, dtype=torch.uint8)
        if rank:
            exchange.share(0, memory)
        exchange.owners([10, 10])
    return {}


def short(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """One rank is through while the others go on."""
    from shardtool.exchange import Exchange

    with Exchange() as exchange:
        exchange.owners([10, 10])
        if rank:
            exchange.owners([10, 10])
    return {}


def gone(folder: Path, rank: int, size: int) -> dict[str, Any]:
    """The last rank tells why it fails and is gone at once; the others come late."""
    from shardtool.errors import NotFound
    from shardtool.exchange import Exchange

    exchange = Exchange()
    exchange.owners([10, 10])
    if rank == size - 1:
        exchange.fail(NotFound("no such file"))
        os._exit(0)
    time.sleep(1)
    with exchange:
        exchange.owners([10, 10])
    return {}


def killed(folder: Path, rank: int, size: int, at: str = "between") -> dict[str, Any]:
    """The last rank dies."""
    import torch

    from shardtool.exchange import Exchange

    with Exchange() as exchange:
        big = 64 << 20
        exchange.owners([big] * 3)
        memory = torch.zeros(big, dtype=torch.uint8)
        exchange.share(0, memory)
        if rank == size - 1:
            if at == "inside":
                exchange._broadcast = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
                exchange.share(1, memory)
            os.kill(os.getpid(), signal.SIGKILL)
        exchange.share(1, memory)
        exchange.share(2, memory)
    return {}


def killed_inside(folder: Path, rank: int, size: int) -> dict[str, Any]:
    return killed(folder, rank, size, "inside")


SCENES: dict[str, Scene] = {
    scene.__name__: scene
    for scene in (
        whole,
        everybody,
        halves,
        damaged,
        stopped,
        thrown,
        unlike,
        crossed,
        short,
        gone,
        killed,
        killed_inside,
    )
}

if __name__ == "__main__":
    main(SCENES, {"gone", "killed", "killed_inside"})
