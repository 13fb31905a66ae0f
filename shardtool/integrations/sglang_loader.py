"""The loader that SGLang makes in each scheduler for ``--load-format shardtool``. Importing it imports SGLang.

It has been run with SGLang 0.5.23 on a CPU; ``docs/engines.md`` says what was checked.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import sglang
import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.model_loader import loader as loaders
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.runtime_context import get_model, get_parallel

from shardtool.checkpoint import Checkpoint, open_checkpoint
from shardtool.errors import UnsupportedModel, UsageError
from shardtool.integrations.engine_load import Engine, Rank, impossible, load
from shardtool.integrations.engine_log import progress, refusals, said
from shardtool.integrations.engine_options import options
from shardtool.parallel import Parallel

SGLANG = Engine("sglang", "SGLang", str(sglang.__version__).partition("+")[0], parts=3, tells=False)
CALIBRATED = ("modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mixed")
_logger = logging.getLogger("sglang.shardtool")


class ShardtoolLoader(loaders.BaseModelLoader):  # type: ignore[misc]
    """Fills the model of one rank from a checkpoint of any kind: its own shards, others', or whole tensors."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        with refusals(_logger):
            self.options = options(load_config.model_loader_extra_config)

    def download_model(self, model_config: Any) -> None:
        """Nothing comes before its time: each rank streams what it needs."""

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """Build the model, load it, and let SGLang change its tensors for its kernels.

        Where it cannot be built for so many ranks, and shardtool knows why, that is what is raised.
        """
        with refusals(_logger):
            self._refuse(model_config)
            checkpoint = open_checkpoint(self._uri(model_config), shard_pattern=self.options.pattern)
        device = torch.device(device_config.device)
        with set_default_torch_dtype(model_config.dtype):
            with checkpoint.store.closed_on_failure():
                model = self._build(model_config, device, checkpoint)
            self._fill(model, model_config, device, checkpoint)
            loaders.DefaultModelLoader.postprocess_weights(model, device)
        return model.eval()

    def _build(self, model_config: Any, device: torch.device, checkpoint: Checkpoint) -> torch.nn.Module:
        """The model without its weights."""
        processed = model_config.quantization is not None and checkpoint.kind == "shards"
        if processed and checkpoint.manifest is None:
            with refusals(_logger):
                raise UnsupportedModel(
                    f"{checkpoint.uri} has shards of a quantized model and no manifest: SGLang saves such weights as "
                    f"its kernels want them; use --load-format sharded_state"
                )
        try:
            quantization = loaders._get_quantization_config(model_config, self.load_config)
            with device:
                model: torch.nn.Module = loaders._initialize_model(model_config, self.load_config, quantization)
            return model
        except Exception as error:
            if reason := impossible(checkpoint, _rank(), SGLANG):
                with refusals(_logger):
                    raise reason from error
            raise

    def _fill(self, model: torch.nn.Module, model_config: Any, device: torch.device, checkpoint: Checkpoint) -> None:
        """Load it, as its own loader leaves it before tensors are changed for kernels."""
        rank = _rank()
        with refusals(_logger), progress(first=rank.number == 0) as tell:
            report = load(
                model,
                checkpoint.uri,
                rank,
                self.options,
                engine=SGLANG,
                quantized=model_config.quantization is not None,
                apart=_apart(),
                take=lambda weights: loaders.DefaultModelLoader.load_weights_only(model, weights, device),
                checkpoint=checkpoint,
                progress=tell,
            )
        said(_logger, report)
        if report.way != "fed":
            loaders.post_load_weights(model)

    def _refuse(self, model_config: Any) -> None:
        """Refuse what SGLang loads in ways of its own."""
        if self.load_config.draft_model_idx is not None:
            raise UsageError(
                "a draft model of several layers takes one of them from its checkpoint, which the load format "
                "shardtool does not; use --speculative-draft-load-format auto"
            )
        asked = model_config.quantization
        calibrated = asked in CALIBRATED or bool(getattr(model_config, "modelopt_quant", None))
        if asked == "auto-round-int8" or (calibrated and not model_config._is_already_quantized()):
            raise UsageError(
                f"SGLang quantizes a model to {asked or 'modelopt'} while it loads, which the load format shardtool "
                f"leaves to it; use --load-format auto"
            )

    def _uri(self, model_config: Any) -> str:
        """Where the weights lie. A draft model that is not part of the model has none but its own."""
        own = str(getattr(model_config, "model_weights", "") or model_config.model_path)
        if model_config.is_draft_model and model_config.model_path != get_model().model_path:
            return own
        if self.options.uri is None and model_config.revision and "://" not in own and not os.path.exists(own):
            return f"hf://{own}@{model_config.revision.replace('/', '%2F')}"
        return self.options.uri or own


def _rank() -> Rank:
    """This process's place."""
    groups = get_parallel()
    sizes = Parallel(groups.tp_size, groups.pp_size, groups.moe_ep_size > 1)
    return Rank(sizes, groups.pp_rank * groups.tp_size + groups.tp_rank)


def _apart() -> str:
    """Why no layout says what this process holds, if so."""
    groups = get_parallel()
    for name, size, usual in (
        ("its attention is", groups.attn_tp_size, (groups.tp_size,)),
        ("its experts are", groups.moe_ep_size, (1, groups.tp_size)),
        ("its dense layers are", getattr(groups, "moe_dense_tp_size", None) or groups.tp_size, (groups.tp_size,)),
    ):
        if size not in usual:
            return f"{name} divided by {size} where tp is {groups.tp_size}, which no layout of SGLang says"
    places = get_global_expert_location_metadata()
    if places is not None:
        mapping = places.physical_to_logical_map
        plain = torch.arange(mapping.shape[-1], device=mapping.device)
        if mapping.shape[-1] != places.num_logical_experts or not bool((mapping == plain).all()):
            return "its experts are at other places than in the checkpoint, which no layout of SGLang says"
    return ""
