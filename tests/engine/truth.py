"""What vLLM itself makes of a checkpoint: its default loader, run by real ranks, each rank's state dict saved.

::

    with Ranks(World(tp=2), workdir) as ranks:      # processes joined by gloo; slow to start, then quick
        truth = ranks.load(model)                   # Truth(folder, error): one file per rank, or vLLM's reason

The state dict is what the engine's ``ShardedStateLoader.save_model`` writes, before ``process_weights_after_loading``
changes it for a kernel: that is what its sharded loaders expect. Memory that vLLM leaves uninitialised is filled with
NaN (or the largest integer) by torch, so that it can be told from loaded weights.

A truth is kept in its folder, an error too, so that a second run is cheap. A rank that crashes or hangs ends the ranks
of its world; the next job starts new ones.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import re
import shutil
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

PATIENCE = 600  # seconds for one model
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class World:
    """How a model is spread over ranks."""

    tp: int
    pp: int = 1
    ep: bool = False

    def __str__(self) -> str:
        return f"tp{self.tp}" + (f"-pp{self.pp}" if self.pp > 1 else "") + ("-ep" if self.ep else "")


@dataclass(frozen=True, slots=True)
class Truth:
    """What vLLM did with a model: the folder of its ranks' files, its class, and its error ("" if it loaded)."""

    folder: Path
    engine_class: str
    error: str


Serve = Callable[[int, World, int, Any], None]
"""What a rank's process does: its number, the world, the port where ranks meet, the pipe of questions."""


class Processes:
    """The processes of a world, each with a pipe; they start with the first question. ``serve``: what each does."""

    def __init__(self, world: World, serve: Serve) -> None:
        self.world = world
        self._serve = serve
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def ask(self, question: tuple[object, ...]) -> list[Any]:
        """Ask every rank; return the pipes from which the answers come, by rank."""
        self.start()
        for pipe in self._pipes:
            pipe.send(question)
        return self._pipes

    def start(self) -> None:
        """Start the processes that are not there yet."""
        if self._processes:
            return
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world.tp * self.world.pp):
            ours, theirs = context.Pipe()
            process = context.Process(target=self._serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """End the processes, whatever they do; the next question starts others."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


class Ranks(Processes):
    """The processes of a world in which vLLM loads models. ``root``: where their truths are kept."""

    def __init__(self, world: World, root: Path) -> None:
        super().__init__(world, _serve)
        self.root = root

    def load(self, model: Path) -> Truth:
        """Let vLLM load a model and save each rank's state dict; what an earlier run found is returned as it is."""
        folder = self.root / f"{model.name}-{self.world}"
        record = folder / "truth.json"
        if not record.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            record.write_text(json.dumps(self._ask(model, folder)))
        found = json.loads(record.read_text())
        return Truth(folder, found["class"], found["error"])

    def _ask(self, model: Path, folder: Path) -> dict[str, str]:
        self.start()
        answers: list[dict[str, str]] = []
        try:
            for rank, pipe in enumerate(self.ask((str(model), str(folder)))):
                if not pipe.poll(PATIENCE):
                    raise TimeoutError(f"rank {rank} gave no answer in {PATIENCE} s")
                answers.append(pipe.recv())
        except (EOFError, OSError) as error:
            # One rank's own error tells more than another's that waited for it in vain.
            ready = [pipe.recv() for pipe in self._pipes[len(answers) :] if _has_answer(pipe)]
            answers += [answer for answer in ready if answer["error"]]
            self.stop()
            answers.append({"class": "", "error": f"a rank ended or hung: {type(error).__name__} {error}".strip()})
        return next((answer for answer in answers if answer["error"]), answers[0])


def engine_version() -> str:
    """Return vLLM's version."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def engine_config(model: str, world: World, **more: Any) -> Any:
    """Return vLLM's whole configuration for a model in a world."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=model,
        tokenizer=model,
        skip_tokenizer_init=True,
        tensor_parallel_size=world.tp,
        pipeline_parallel_size=world.pp,
        enable_expert_parallel=world.ep,
        distributed_executor_backend="mp" if world.tp * world.pp > 1 else "uni",
        enforce_eager=True,
        max_model_len=64,
        use_tqdm_on_load=False,
        **more,
    ).create_engine_config()


def _has_answer(pipe: Any) -> bool:
    with contextlib.suppress(EOFError, OSError):
        return bool(pipe.poll(0.2))
    return False


def _serve(rank: int, world: World, port: int, pipe: Any) -> None:
    """Be a rank: join the others, then load model after model until the pipe closes."""
    quieten(rank, world)
    started = ""
    try:
        join(rank, world, port)
    except Exception as error:
        started = _sentence(error)
    with contextlib.suppress(EOFError):
        while True:
            model, folder = pipe.recv()
            answer = {"class": "", "error": started}
            if not started:
                try:
                    answer["class"] = _load(model, world, folder)
                except Exception as error:
                    answer["error"] = _sentence(error)
                    Path(folder, f"rank-{rank}.txt").write_text(traceback.format_exc())
            gc.collect()
            pipe.send(answer)


def quieten(rank: int, world: World) -> None:
    """Let the process say nothing, and have the environment of a rank."""
    os.environ.update(ENVIRONMENT)
    size = str(world.tp * world.pp)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)


def join(rank: int, world: World, port: int) -> None:
    """Join the other ranks."""
    from tests.engine import stubs

    stubs.install()
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.models import registry

    torch.set_num_threads(1)
    # vLLM inspects every class in a process of its own, lest that touch a GPU; there is none.
    registry._run_in_subprocess = lambda function: function()
    torch.accelerator.empty_cache = lambda *args, **kwargs: None
    torch.accelerator.synchronize = lambda *args, **kwargs: None
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    with set_current_vllm_config(VllmConfig()):  # without a model, the groups of experts are made too
        size = world.tp * world.pp
        init_distributed_environment(size, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
        initialize_model_parallel(world.tp, world.pp)


class _Saved(Exception):
    """The state dict is saved; nothing after it is wanted."""


def _load(model: str, world: World, folder: str) -> str:
    """Load a model and save this rank's state dict; return the name of vLLM's class."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import base_loader, get_model_loader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    seen: list[str] = []

    def save(built: Any, *rest: Any) -> None:
        seen.append(type(built).__name__)
        ShardedStateLoader.save_model(built, folder)
        raise _Saved

    config = engine_config(model, world)
    with (
        contextlib.suppress(_Saved),
        instead(base_loader, "process_weights_after_loading", save),
        set_current_vllm_config(config),
    ):
        get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
    return seen[0]


@contextlib.contextmanager
def instead(room: Any, name: str, thing: Any) -> Iterator[None]:
    """Another thing under a name of a module."""
    before = getattr(room, name)
    setattr(room, name, thing)
    try:
        yield
    finally:
        setattr(room, name, before)


def _sentence(error: BaseException) -> str:
    """Return an error as one line, without what differs from run to run."""
    text = re.sub(r"0x[0-9a-f]+", "0x…", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # pydantic puts the reason on its third line
    best = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else "")
    return f"{type(error).__name__}: {best.removeprefix('Value error, ')}"[:400]
