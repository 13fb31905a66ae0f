"""The loader that vLLM makes in each worker for ``--load-format shardtool``. Importing it imports vLLM.

It has been run with vLLM 0.32; ``docs/engines.md`` says what was checked.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from shardtool import settings
from shardtool.checkpoint import Checkpoint, open_checkpoint
from shardtool.integrations.engine_checks import TIE, tied
from shardtool.integrations.engine_load import Engine, Rank, impossible, load
from shardtool.integrations.engine_log import progress, refusals, said
from shardtool.integrations.engine_options import options
from shardtool.parallel import Parallel

VLLM = Engine("vllm", "vLLM", str(vllm.__version__).partition("+")[0])
_logger = logging.getLogger("vllm.shardtool")
"""A name below vLLM's own: its handlers and levels are those that its user has set."""


class ShardtoolLoader(BaseModelLoader):  # type: ignore[misc]
    """Fills the model of one rank from a checkpoint of any kind: its own shards, others', or whole tensors."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        with refusals(_logger):
            self.options = options(load_config.model_loader_extra_config)
        self._config: Any = None
        self._opened: Checkpoint | None = None

    def download_model(self, model_config: Any) -> None:
        """Nothing comes before its time: each rank streams what it needs."""

    def load_model(self, vllm_config: Any, model_config: Any, *more: Any, **named: Any) -> torch.nn.Module:
        """Build the model, load it, and let vLLM change its tensors for its kernels.

        Where it cannot be built for so many ranks, and shardtool knows why, that is what is raised.
        """
        self._config = vllm_config
        try:
            with refusals(_logger):
                self._opened = open_checkpoint(self._uri(model_config), shard_pattern=self.options.pattern)
                _tie(model_config, self._opened)
            model: torch.nn.Module = super().load_model(vllm_config, model_config, *more, **named)
            return model
        except Exception as error:
            if self._opened is not None and (reason := impossible(self._opened, self._rank(model_config), VLLM)):
                with refusals(_logger):
                    raise reason from error
            raise
        finally:
            self._config = None
            if self._opened is not None:  # not loaded
                self._opened.store.close()
                self._opened = None

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Fill a model that is built. Raises one of shardtool's errors, after a line in the log that says the same."""
        checkpoint, self._opened = self._opened, None
        with refusals(_logger), self._bar() as tell:
            report = load(
                model,
                self._uri(model_config),
                self._rank(model_config),
                self.options,
                engine=VLLM,
                quantized=model_config.quantization is not None,
                checkpoint=checkpoint,
                progress=tell,
            )
        said(_logger, report)

    def _uri(self, model_config: Any) -> str:
        """Where the weights lie. A draft model has none but its own."""
        speculative = getattr(self._current(), "speculative_config", None)
        draft = getattr(speculative, "draft_model_config", None)
        own = str(getattr(model_config, "model_weights", "") or model_config.model)
        if draft is not None and model_config is draft:
            return own
        if self.options.uri is None and model_config.revision and "://" not in own and not os.path.exists(own):
            return f"hf://{own}@{model_config.revision.replace('/', '%2F')}"
        return self.options.uri or own

    def _rank(self, model_config: Any) -> Rank:
        """This worker's place."""
        tp, pp = get_tp_group(), get_pp_group()
        parallel = getattr(self._current(), "parallel_config", None)
        experts = bool(getattr(parallel, "enable_expert_parallel", False)) and bool(model_config.is_moe)
        layers = settings.layer_partition(None) if pp.world_size > 1 else None
        sizes = Parallel(tp.world_size, pp.world_size, experts, layers)
        return Rank(sizes, pp.rank_in_group * tp.world_size + tp.rank_in_group)

    def _bar(self) -> AbstractContextManager[Any]:
        """Progress where vLLM shows its own."""
        first = get_tp_group().rank_in_group == 0 and get_pp_group().rank_in_group == 0
        return progress(first=first and bool(getattr(self.load_config, "use_tqdm_on_load", True)))

    def _current(self) -> Any:
        return self._config if self._config is not None else get_current_vllm_config()


def _tie(model_config: Any, checkpoint: Checkpoint) -> None:
    """Let the model have a head of its own just where the checkpoint has one.

    vLLM looks for a head in the files of the model's folder, and takes that of shards, which stands for the embedding
    too, for one. Where the folder has no files it finds none.
    """
    config = model_config.hf_config
    found = tied(checkpoint)
    sniffed = bool(getattr(model_config, "word_embeddings_untied_by_checkpoint", False))
    if checkpoint.kind == "huggingface":
        if found is False and getattr(config, TIE, False) and hasattr(model_config, "maybe_untie_word_embeddings"):
            _set_tie(config, False)
            model_config.word_embeddings_untied_by_checkpoint = True  # vLLM compares them, and ties equal ones again
        return
    if found is None and sniffed:
        found = True
    if found is not None:
        _set_tie(config, found)
        if sniffed:
            model_config.word_embeddings_untied_by_checkpoint = False


def _set_tie(config: Any, value: bool) -> None:
    setattr(config, TIE, value)
    setattr(config.get_text_config(), TIE, value)
