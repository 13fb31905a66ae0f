"""What SGLang itself makes of a checkpoint: its default loader, run by real ranks on a CPU, each rank's state saved.

The state is what its ``ShardedStateLoader.save_model`` writes, before weights are processed: for models that are not
quantized the processing changes nothing. Memory that SGLang leaves uninitialised is filled with NaN by torch.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.engine import stubs

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
PATIENCE = 900
"""Seconds for all models."""


def load(models: Mapping[str, Path], tp: int, root: Path) -> dict[str, str]:
    """Load every model with ``tp`` ranks, each saved below ``root`` by its name. -> name: its error or ""."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(tp):
        ours, theirs = context.Pipe()
        job = {name: (str(model), str(root / name)) for name, model in models.items()}
        process = context.Process(target=_serve, args=(rank, tp, port, job, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found = dict.fromkeys(models, "")
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(PATIENCE):
                raise TimeoutError(f"rank {rank} gave no answer in {PATIENCE} s")
            for name, error in pipe.recv().items():
                found[name] = found[name] or error
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found


def _serve(rank: int, tp: int, port: int, models: Mapping[str, tuple[str, str]], pipe: Any) -> None:
    os.environ.update(ENVIRONMENT)
    stubs.install()
    errors: dict[str, str] = {}
    for name, (model, folder) in models.items():
        try:
            _load(rank, tp, port, model, folder)
            errors[name] = ""
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            errors[name] = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:400]
    pipe.send(errors)


def _load(rank: int, tp: int, port: int, model: str, folder: str) -> None:
    import sglang.srt.distributed.parallel_state as state
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_loader.loader import DefaultModelLoader, ShardedStateLoader, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path=model, tokenizer_path=model, skip_tokenizer_init=True, device="cpu", tp_size=tp)
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    if state._TP is None:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        state.init_distributed_environment(tp, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
        state.initialize_model_parallel()
        initialize_dp_attention(server_args=arguments)
    config = ModelConfig.from_server_args(arguments)
    loader = DefaultModelLoader(LoadConfig())
    with set_default_torch_dtype(config.dtype):
        built = _initialize_model(config, LoadConfig(), None)
        loader.load_weights_only(built, loader._get_all_weights(config, built), torch.device("cpu"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    ShardedStateLoader.save_model(built, folder)
