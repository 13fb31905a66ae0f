"""vLLM's ranks that load a model by any load format, and say what they hold then: ``Loaders``.

::

    with Loaders(World(tp=2)) as loaders:                               # processes joined by gloo
        answers = loaders.load(model, "shardtool", {"uri": ...})        # one Answer for each rank

What is compared is the state dict before ``process_weights_after_loading``, and the word embeddings' tie with it.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.engine import truth
from tests.engine.truth import PATIENCE, World


@dataclass(frozen=True, slots=True)
class Answer:
    """What one rank did: digests of its tensors, whether its head is the embedding, or why it failed.

    ``way`` and ``read``: of shardtool's report. ``peak``: bytes that this process had at once while it loaded, more
    than before the weights came.
    """

    held: dict[str, str] = field(default_factory=dict)
    way: str = ""
    why: str = ""
    read: int = 0
    peak: int = 0
    error: str = ""


class Loaders:
    """The processes of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __enter__(self) -> Loaders:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def load(
        self, model: Path, load_format: str = "auto", extra: dict[str, Any] | None = None, **more: Any
    ) -> list[Answer]:
        """What each rank holds. A world in which a rank failed is not used again: the others may wait for it."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((str(model), load_format, extra or {}, more))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(PATIENCE):
                    raise TimeoutError
                answers.append(pipe.recv())
            except (EOFError, OSError, TimeoutError) as error:
                answers.append(Answer(error=f"rank {rank}: {type(error).__name__}"))
        if any(answer.error for answer in answers):
            self._stop()
        return answers

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world.tp * self.world.pp):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(rank: int, world: World, port: int, pipe: Any) -> None:
    truth.quieten(rank, world)
    truth.join(rank, world, port)
    from shardtool.integrations.vllm import register

    register()
    with suppress(EOFError):
        while True:
            model, load_format, extra, more = pipe.recv()
            try:
                answer = _load(model, world, load_format, extra, more)
            except Exception as error:
                answer = Answer(error=f"{type(error).__name__}: {error}")
            gc.collect()
            pipe.send(answer)


class _Seen(Exception):
    """The state dict was seen; nothing after it is wanted."""


def _load(model: str, world: World, load_format: str, extra: dict[str, Any], more: dict[str, Any]) -> Answer:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import base_loader, get_model_loader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    vllm_loader: Any = import_module("shardtool.integrations.vllm_loader")
    held: dict[str, str] = {}
    reports: list[Any] = []
    peaks: list[int] = []
    inner = vllm_loader.load

    def see(built: Any, *rest: Any) -> None:
        for name, tensor in ShardedStateLoader._filter_subtensors(built.state_dict()).items():
            held[name] = _digest(tensor)
        raise _Seen

    def load(*args: Any, **named: Any) -> Any:
        gc.collect()
        with _peak(peaks):
            reports.append(inner(*args, **named))
        return reports[-1]

    config = truth.engine_config(model, world, load_format=load_format, model_loader_extra_config=extra, **more)
    with (
        suppress(_Seen),
        truth.instead(base_loader, "process_weights_after_loading", see),
        truth.instead(vllm_loader, "load", load),
        set_current_vllm_config(config),
    ):
        get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
    if not reports:
        return Answer(held)
    return Answer(held, reports[0].way, reports[0].why, reports[0].read, peaks[0])


def _digest(tensor: Any) -> str:
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw.tobytes()).hexdigest()}"


@contextmanager
def _peak(found: list[int]) -> Iterator[None]:
    """The most memory that this process has had inside, less what it had before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield
    found.append(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
