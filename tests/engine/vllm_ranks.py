"""vLLM's ranks that load a model by any load format, and say what they hold then, as ``loaders`` asks for it.

What is compared is the state dict before ``process_weights_after_loading``, and the word embeddings' tie with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tests.engine import truth
from tests.engine.loaders import Answer, Loaders, Watch, answer
from tests.engine.truth import World


class VllmLoaders(Loaders):
    """vLLM's ranks, with the plug-in registered."""

    def __init__(self, world: World) -> None:
        super().__init__(world, _serve)


def _serve(rank: int, world: World, port: int, pipe: Any) -> None:
    truth.quieten(rank, world)
    truth.join(rank, world, port)
    from shardtool.integrations.vllm import register

    register()
    answer(pipe, lambda model, load_format, extra, more: _load(model, world, load_format, extra, more))


def _load(model: str, world: World, load_format: str, extra: dict[str, Any], more: dict[str, Any]) -> Answer:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import base_loader, get_model_loader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    watch = Watch()

    def see(built: Any, *rest: Any) -> None:
        watch.see(ShardedStateLoader._filter_subtensors(built.state_dict()))

    config = truth.engine_config(model, world, load_format=load_format, model_loader_extra_config=extra, **more)
    with (
        watch.of(import_module("shardtool.integrations.vllm_loader")),
        truth.instead(base_loader, "process_weights_after_loading", see),
        set_current_vllm_config(config),
    ):
        get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
    return watch.answer
