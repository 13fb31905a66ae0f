"""SGLang's own code reads what ``for=sglang`` writes to Redis: its connector, and its loader into a model of its own.

Needs SGLang on the path, as CONTRIBUTING says, and ``redis`` beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import shardtool
from tests.builders import Tensors, config, contents, model, parsed, put, rank_tensors, tensors
from tests.engine import kept, sglang_truth, stubs
from tests.layouts import traced
from tests.servers.redis import RedisServer

GROUP = "sglang-0.5.23"
TP = 2
PATIENCE = 300
"""Seconds."""

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        find_spec("sglang") is None or find_spec("redis") is None, reason="no SGLang or redis on the path"
    ),
]


@pytest.fixture
def at(redis_server: RedisServer, redis_name: str) -> str:
    return redis_server.address(redis_name)


def test_its_connector_reads_our_keys(at: str, tmp_path: Path) -> None:
    """Every tensor of each rank, and the files that are texts; the address is the one without for=sglang."""
    made = config(hidden_size=64)
    side = {"tokenizer.json": '{"ä": 1}'.encode(), "tokenizer.model": b"\xff\x00", "templates/a.jinja": b"x"}
    source = put(tmp_path / "llama", model(made, tensors(made), side=side))
    shardtool.save(source, f"{at}?for=sglang", tp=TP, layout="sglang", max_part_size=20_000)
    shardtool.save(source, tmp_path / "tp2", tp=TP, layout="sglang")
    for rank in range(TP):
        folder = tmp_path / f"pulled-{rank}"
        held = _apart(_pull, at, rank, str(folder))
        assert held == rank_tensors(contents(tmp_path / "tp2"), rank)
        assert contents(folder) == {key: source_of(source, key) for key in ("config.json", "tokenizer.json")}


def source_of(source: str, key: str) -> bytes:
    return Path(source, key).read_bytes()


def test_its_loader_fills_its_model_from_our_keys(at: str, tmp_path: Path) -> None:
    """``--load-format remote`` with two ranks on a CPU: the state is that of its default loader."""
    source = kept.make(traced.read(GROUP, "llama-tied"), tmp_path / "llama")
    assert sglang_truth.load({"llama": source}, TP, tmp_path / "truth") == {"llama": ""}
    shardtool.save(source, f"{at}?for=sglang", tp=TP, layout="sglang")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = [(rank, port, at, str(tmp_path / "loaded")) for rank in range(TP)]
    _together(_load, jobs)
    for rank in range(TP):
        loaded = rank_tensors(contents(tmp_path / "loaded"), rank)
        assert loaded
        assert loaded == rank_tensors(contents(tmp_path / "truth" / "llama"), rank)


def _apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns in a process of its own."""
    return _together(call, [arguments])[0]


def _together(call: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[Any]:
    """What the calls return. The connector takes over SIGTERM, so the processes are killed."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for job in jobs:
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_tell, args=(theirs, call, job), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        found = []
        for pipe in pipes:
            assert pipe.poll(PATIENCE), "no answer"
            found.append(pipe.recv())
            assert not isinstance(found[-1], Exception), found[-1]
        return found
    finally:
        for process in processes:
            process.kill()
            process.join()


def _tell(pipe: Any, call: Callable[..., Any], job: tuple[Any, ...]) -> None:
    try:
        pipe.send(call(*job))
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _pull(address: str, rank: int, folder: str) -> Tensors:
    os.environ.update(sglang_truth.ENVIRONMENT)
    stubs.install()
    from safetensors.torch import save
    from sglang.srt.connector import ConnectorType, create_remote_connector, get_connector_type

    with create_remote_connector(address) as client:
        assert get_connector_type(client) is ConnectorType.KV
        client.pull_files(ignore_pattern=["*.pt", "*.safetensors", "*.bin"])
        os.rename(client.get_local_dir(), folder)
        held = dict(client.weight_iterator(rank))
    return {name: parsed(save({name: tensor}))[name] for name, tensor in held.items()}


def _load(rank: int, port: int, address: str, folder: str) -> None:
    """As ``sglang_truth`` does, with the loader for remote places and the model's path in Redis."""
    os.environ.update(sglang_truth.ENVIRONMENT)
    stubs.install()
    import sglang.srt.distributed.parallel_state as state
    import torch
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig, LoadFormat
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_loader.loader import ShardedStateLoader, get_model_loader
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(
        model_path=address,
        tokenizer_path=address,
        skip_tokenizer_init=True,
        device="cpu",
        tp_size=TP,
        load_format="remote",
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    torch.set_num_threads(1)
    state.init_distributed_environment(TP, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
    state.initialize_model_parallel()
    initialize_dp_attention(server_args=arguments)
    found = ModelConfig.from_server_args(arguments)
    loader = get_model_loader(LoadConfig(load_format=LoadFormat.REMOTE), found)
    built = loader.load_model(model_config=found, device_config=DeviceConfig("cpu"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    ShardedStateLoader.save_model(built, folder)
