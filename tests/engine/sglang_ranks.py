"""SGLang's ranks that load a model by any load format, and say what they hold then, as ``loaders`` asks for it.

SGLang finds the plug-in by itself, by an entry point: ``plugged`` makes a folder that has one. Memory that it leaves
uninitialised is filled with NaN by torch, so that it can be told from loaded weights.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.engine import stubs, truth
from tests.engine.loaders import Answer, Loaders, Watch, answer
from tests.engine.sglang_truth import ENVIRONMENT
from tests.engine.truth import World

ENTRY = "[sglang.srt.plugins]\nshardtool = shardtool.integrations.sglang:register\n"
STUBS = "from tests.engine import stubs\n\nstubs.install()\n"


def plugged(folder: Path) -> str:
    """A path on which the package is installed, as far as entry points tell, and torchvision has a stand-in."""
    info = folder / "shardtool_tests-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shardtool-tests\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY)
    (folder / "sitecustomize.py").write_text(STUBS)
    return str(folder)


class SglangLoaders(Loaders):
    """SGLang's ranks, with the plug-in on their path. ``said``: further arguments of its server."""

    def __init__(self, world: World, path: str, **said: Any) -> None:
        super().__init__(world, Serve(path, said))


class Serve:
    """What a rank's process does."""

    def __init__(self, path: str, said: dict[str, Any]) -> None:
        self.path = path
        self.said = said

    def __call__(self, rank: int, world: World, port: int, pipe: Any) -> None:
        os.environ.update(ENVIRONMENT)
        sys.path.insert(0, self.path)
        stubs.install()
        from sglang.srt.plugins import load_plugins

        load_plugins()

        def load(model: str, load_format: str, extra: dict[str, Any], more: dict[str, Any]) -> Answer:
            return _load(rank, world, port, model, load_format, json.dumps(extra), {**self.said, **more})

        answer(pipe, load)


def _load(rank: int, world: World, port: int, model: str, load_format: str, extra: str, said: dict[str, Any]) -> Answer:
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, ShardedStateLoader, get_model_loader

    arguments = _join(
        rank, world, port, model, {"load_format": load_format, "model_loader_extra_config": extra, **said}
    )
    found = ModelConfig.from_server_args(arguments)
    watch = Watch()

    def see(built: Any, device: Any) -> None:
        watch.see(ShardedStateLoader._filter_subtensors(built.state_dict()))

    with (
        truth.instead(DefaultModelLoader, "postprocess_weights", staticmethod(see)),
        watch.of(import_module("shardtool.integrations.sglang_loader")),
    ):
        loader = get_model_loader(LoadConfig(load_format=load_format, model_loader_extra_config=extra), found)
        see(loader.load_model(model_config=found, device_config=DeviceConfig("cpu")), None)  # it processed them before
    return watch.answer


def _join(rank: int, world: World, port: int, model: str, said: dict[str, Any]) -> Any:
    """This process as a rank of a server for the model."""
    import sglang.srt.distributed.parallel_state as state
    import torch
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    sizes = {"tp_size": world.tp, "pp_size": world.pp, "ep_size": world.tp if world.ep else 1}
    arguments = ServerArgs(
        model_path=model, tokenizer_path=model, skip_tokenizer_init=True, device="cpu", **sizes, **said
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    if state._TP is None:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        number = world.tp * world.pp
        state.init_distributed_environment(number, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
        state.initialize_model_parallel()
        initialize_dp_attention(server_args=arguments)
    return arguments
