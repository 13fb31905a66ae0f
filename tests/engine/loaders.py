"""An engine's ranks that load a model by any load format, and say what they hold then: ``Loaders``.

::

    with Loaders(World(tp=2), serve) as loaders:                        # processes joined by gloo
        answers = loaders.load(model, "shardtool", {"uri": ...})        # one Answer for each rank

What is compared is the state dict before the engine changes its tensors for its kernels.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engine import truth
from tests.engine.truth import PATIENCE, Processes

Load = Callable[[str, str, dict[str, Any], dict[str, Any]], "Answer"]
"""Load a model by a load format with an extra config and further arguments of the engine."""


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


class Loaders(Processes):
    """The processes of a world. ``serve``: what each does; it joins the others and calls ``answer``."""

    def load(
        self, model: Path, load_format: str = "auto", extra: dict[str, Any] | None = None, **more: Any
    ) -> list[Answer]:
        """What each rank holds. A world in which a rank failed is not used again: the others may wait for it."""
        answers = []
        for rank, pipe in enumerate(self.ask((str(model), load_format, extra or {}, more))):
            try:
                if not pipe.poll(PATIENCE):
                    raise TimeoutError
                answers.append(pipe.recv())
            except (EOFError, OSError, TimeoutError) as error:
                answers.append(Answer(error=f"rank {rank}: {type(error).__name__}"))
        if any(answer.error for answer in answers):
            self.stop()
        return answers


def held(answers: list[Answer]) -> list[dict[str, str]]:
    """What each rank has; an error is one of the test."""
    assert [answer.error for answer in answers] == [""] * len(answers)
    return [answer.held for answer in answers]


class _Seen(Exception):
    """The state dict was seen; nothing after it is wanted."""


@dataclass(slots=True)
class Watch:
    """What a rank is seen to do."""

    held: dict[str, str] = field(default_factory=dict)
    reports: list[Any] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def see(self, state: Mapping[str, Any]) -> None:
        """Keep digests of what is stored of a model, and go no further."""
        self.held.update((name, _digest(tensor)) for name, tensor in state.items())
        raise _Seen

    @contextmanager
    def of(self, loader: Any) -> Iterator[None]:
        """Watch the module of a plug-in's loader until ``see`` was called."""
        inner = loader.load

        def load(*args: Any, **named: Any) -> Any:
            gc.collect()
            with _peak(self.peaks):
                self.reports.append(inner(*args, **named))
            return self.reports[-1]

        with suppress(_Seen), truth.instead(loader, "load", load):
            yield

    @property
    def answer(self) -> Answer:
        """What there is to say."""
        if not self.reports:
            return Answer(self.held)
        (report,) = self.reports
        return Answer(self.held, report.way, report.why, report.read, self.peaks[0])


def answer(pipe: Any, load: Load) -> None:
    """Load what comes through the pipe until it is closed."""
    with suppress(EOFError):
        while True:
            model, load_format, extra, more = pipe.recv()
            try:
                found = load(model, load_format, extra, more)
            except Exception as error:
                found = Answer(error=f"{type(error).__name__}: {error}")
            gc.collect()
            pipe.send(found)


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
