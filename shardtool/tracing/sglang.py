"""SGLang 0.5.23: the only room that names its internals.

What is used of it: ``ServerArgs`` and ``publish`` for the configuration and the place of a rank, the groups of
``parallel_state`` (one process, whose ranks and sizes are set by hand; nothing is communicated), ``_initialize_model``
for the construction, ``DefaultModelLoader`` for the loading, with our own iterator over the source tensors.

It was run on a machine without a GPU, from the unpacked wheel, with ``device="cpu"``; the sizes that SGLang changes for
CPUs alone (``adjust_config_with_unaligned_cpu_tp``) are left as a GPU has them. What differs on a GPU was read:

* shared experts of DeepSeek-V3 and GLM-4.5 are fused with the others unless ``--disable-shared-experts-fusion``;
* gpt_oss in bfloat16 stores experts transposed with the ``triton_kernel`` backend, which it chooses by itself where the
  package triton_kernels is installed; ``--moe-runner-backend triton`` does not.

Its ``sharded_state`` wants weights as they are after their processing. For quantized models that depends on the GPU and
its kernels, so they are refused; of others nothing is changed.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shardtool.errors import UnsupportedModel
from shardtool.parallel import Parallel
from shardtool.tracing import stubs

NAME = "sglang"

SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
}
"""The environment in which it is imported."""


class Engine:
    """SGLang in this process, for one model."""

    def __init__(
        self, folder: Path, *, dtype: str | None, trust_remote_code: bool, moe_backend: str | None, load_format: str
    ) -> None:
        os.environ.update(SETTINGS)
        stubs.install("torchvision")
        import sglang

        self.version: str = str(sglang.__version__).partition("+")[0]
        self._folder = folder
        self._asked: dict[str, Any] = {"dtype": dtype or "auto", "load_format": load_format}
        if trust_remote_code:
            self._asked["trust_remote_code"] = True
        if moe_backend is not None:
            self._asked["moe_runner_backend"] = moe_backend
        self._configs: dict[Parallel, tuple[Any, Any]] = {}
        self._group: Any = None

    def config(self, parallel: Parallel) -> Any:
        """The engine's configuration of the model. It refuses sizes that it knows to be impossible."""
        return self._made(parallel)[1]

    def dtype(self, parallel: Parallel) -> torch.dtype:
        """The dtype in which it runs the model."""
        dtype: torch.dtype = self.config(parallel).dtype
        return dtype

    def architecture(self, parallel: Parallel) -> str:
        """The class of the model."""
        from sglang.srt.model_loader.utils import get_model_architecture

        return str(get_model_architecture(self.config(parallel))[0].__name__)

    @contextmanager
    def rank(self, parallel: Parallel, rank: int) -> Iterator[Any]:
        """The process as one rank of these sizes: what runs inside sees its configuration and its groups."""
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        config = self.config(parallel)
        if self._group is None:
            self._make_groups()
        self._place(parallel, rank)
        with set_default_torch_dtype(config.dtype), _parameters_on_meta():
            yield config

    def construct(self, config: Any) -> torch.nn.Module:
        """The rank's model, to be called on the meta device."""
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.model_loader.loader import _initialize_model

        model: torch.nn.Module = _initialize_model(config, LoadConfig(), None)
        if getattr(model, "secondary_weights", ()):
            raise UnsupportedModel(f"{type(model).__name__} loads parts of itself from another checkpoint")
        return model

    def load(self, config: Any, model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the model's weights as the engine would from files."""
        from sglang.srt.model_loader.loader import DefaultModelLoader

        DefaultModelLoader.load_weights_only(model, iter(weights), torch.device("meta"))

    def untied(self, config: Any) -> bool:
        """Whether it loads a head of the checkpoint's own although config.json says that the embedding is the head."""
        return False

    def tied(self, config: Any, model: torch.nn.Module) -> tuple[str, str] | None:
        """Nothing: it believes config.json, whatever head the checkpoint has."""
        return None

    def amendments(self, config: Any, sources: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Any]:
        """Nothing: what it looks for in a checkpoint's tensors is for quantized models."""
        return {}

    def _made(self, parallel: Parallel) -> tuple[Any, Any]:
        """The arguments of a server with these sizes, and its configuration of the model."""
        found = self._configs.get(parallel)
        if found is None:
            from sglang.srt.configs.model_config import ModelConfig
            from sglang.srt.server_args import ServerArgs

            if parallel.pp > 1:
                raise UnsupportedModel(
                    "SGLang's sharded_state has one file name for the same rank of every pipeline stage; leave --pp out"
                )
            model = str(self._folder)
            arguments = ServerArgs(
                model_path=model,
                tokenizer_path=model,
                skip_tokenizer_init=True,
                device="cpu",
                tp_size=parallel.tp,
                ep_size=parallel.tp if parallel.ep else 1,
                **self._asked,
            )
            self._publish(arguments, 0)
            config = ModelConfig.from_server_args(arguments)
            if config.quantization is not None:
                raise UnsupportedModel(
                    f"SGLang processes the weights of a {config.quantization} model before it loads shards, and what "
                    "that makes of them depends on the GPU and its kernels; serve the checkpoint as it is, or shard "
                    "one that is not quantized"
                )
            found = self._configs[parallel] = arguments, config
        return found

    @staticmethod
    def _publish(arguments: Any, rank: int) -> None:
        """Make these arguments and this rank the process's own; groups of the rank before are forgotten."""
        from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish

        get_parallel().clear_stamp()
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank))

    def _make_groups(self) -> None:
        """The groups of one process, from which those of any place are made."""
        import sglang.srt.distributed.parallel_state as state

        self._publish(self._made(Parallel(1))[0], 0)
        with tempfile.TemporaryDirectory() as folder:
            state.init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, backend="gloo")
            state.initialize_model_parallel()
        self._group = state._TP

    def _place(self, parallel: Parallel, rank: int) -> None:
        """Give the process and its groups the sizes and ranks of one place."""
        import sglang.srt.distributed.parallel_state as state
        from sglang.srt.layers.dp_attention import initialize_dp_attention
        from sglang.srt.runtime_context import get_parallel

        arguments = self._made(parallel)[0]
        self._publish(arguments, rank)
        experts = parallel.tp if parallel.ep else 1
        sizes = {
            "_WORLD": parallel.tp,
            "_TP": parallel.tp,
            "_ATTN_TP": parallel.tp,
            "_MOE_EP": experts,
            "_MOE_TP": parallel.tp // experts,
            "_MOE_DP": 1,
            "_ATTN_CP": 1,
            "_PP": 1,
        }
        groups = {name: self._group_of(size, rank % size) for name, size in sizes.items()}
        for name, group in groups.items():
            setattr(state, name, group)
        get_parallel().override_permanently(**{f"{name[1:].lower()}_group": group for name, group in groups.items()})
        initialize_dp_attention(server_args=arguments)

    def _group_of(self, size: int, rank: int) -> Any:
        """A group of which this process claims to be one of several."""
        group = copy.copy(self._group)
        group.ranks, group.world_size = list(range(size)), size
        group.rank = group.rank_in_group = rank
        return group


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """The Transformers backend makes its parameters on the device that it finds, and there is none."""
    from sglang.srt.models import transformers

    original = transformers.get_device
    transformers.get_device = lambda *_args: "meta"
    try:
        yield
    finally:
        transformers.get_device = original
