"""vLLM, 0.24 to 0.32 (0.24, 0.27, 0.31 and 0.32 were run): the only room that names its internals.

What is used of it: ``EngineArgs`` for the configuration, the groups of ``parallel_state`` (one process, whose ranks and
sizes are set by hand; nothing is communicated), ``initialize_model`` for the construction, ``DefaultModelLoader`` for
the loading, with our own iterator over the source tensors. Differences of versions are functions of their own here.

It was run with the CPU build. A CUDA wheel on a machine without a GPU finds no platform; ``VLLM_TARGET_DEVICE=cpu`` in
``SETTINGS`` makes 0.31 and later choose the CPU's by themselves, and ``_platform`` sets it in earlier ones (this was
read, not run). What the shapes of a kernel's weights depend on is then chosen as for a CPU, unless ``moe_backend``
names it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch

from shardtool.errors import UnsupportedModel
from shardtool.parallel import Parallel
from shardtool.tracing import stubs

NAME = "vllm"

SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "DO_NOT_TRACK": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "OMP_NUM_THREADS": "1",
    "RANK": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "WORLD_SIZE": "1",
}
"""The environment in which it is imported."""
PARTITION = "VLLM_PP_LAYER_PARTITION"
_PLAIN = (torch.float16, torch.bfloat16, torch.float32)


class Engine:
    """vLLM in this process, for one model."""

    def __init__(
        self, folder: Path, *, dtype: str | None, trust_remote_code: bool, moe_backend: str | None, load_format: str
    ) -> None:
        os.environ.update(SETTINGS)
        stubs.install("torchvision")
        import vllm

        self.version: str = str(vllm.__version__).partition("+")[0]
        self._folder = folder
        self._asked: dict[str, Any] = {"dtype": dtype or "auto", "load_format": load_format}
        if trust_remote_code:
            self._asked["trust_remote_code"] = True
        if moe_backend is not None:
            self._asked["moe_backend"] = moe_backend
        _platform()
        _inspect_models_here()
        _no_accelerator()
        self._configs: dict[Parallel, Any] = {}
        self._groups = False

    def config(self, parallel: Parallel) -> Any:
        """The engine's configuration. It refuses sizes that the model does not allow."""
        found = self._configs.get(parallel)
        if found is None:
            from vllm.engine.arg_utils import EngineArgs

            self._partition(parallel)
            model = str(self._folder)
            found = self._configs[parallel] = EngineArgs(
                model=model,
                tokenizer=model,
                skip_tokenizer_init=True,
                tensor_parallel_size=parallel.tp,
                pipeline_parallel_size=parallel.pp,
                enable_expert_parallel=parallel.ep,
                distributed_executor_backend="mp" if parallel.tp * parallel.pp > 1 else "uni",
                enforce_eager=True,
                use_tqdm_on_load=False,
                max_model_len=64,
                **self._asked,
            ).create_engine_config()
            found.device_config.device = torch.device("meta")  # where the Transformers backend makes its parameters
        return found

    def dtype(self, parallel: Parallel) -> torch.dtype:
        """The dtype in which it runs the model."""
        dtype: torch.dtype = self.config(parallel).model_config.dtype
        return dtype

    def architecture(self, parallel: Parallel) -> str:
        """The class of the model."""
        from vllm.model_executor.model_loader.utils import get_model_architecture

        return str(get_model_architecture(self.config(parallel).model_config)[0].__name__)

    @contextmanager
    def rank(self, parallel: Parallel, rank: int) -> Iterator[Any]:
        """The process as one rank of these sizes: what runs inside sees its configuration and its groups."""
        from vllm.config import set_current_vllm_config

        config = self.config(parallel)
        self._partition(parallel)
        with ExitStack() as stack:
            stack.enter_context(set_current_vllm_config(config))
            if not self._groups:
                self._make_groups()
                self._groups = True
            config.parallel_config.rank = rank
            _place(parallel, rank)
            stack.enter_context(_default_dtype(config.model_config.dtype))
            yield config

    def construct(self, config: Any) -> torch.nn.Module:
        """The rank's model, to be called on the meta device."""
        from vllm.model_executor.model_loader.utils import initialize_model

        _forget_layers(config)
        with _without_kernels():
            model: torch.nn.Module = initialize_model(vllm_config=config, model_config=config.model_config)
        if getattr(model, "secondary_weights", ()):
            raise UnsupportedModel(f"{type(model).__name__} loads parts of itself from another checkpoint")
        return model

    def load(self, config: Any, model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the model's weights as the engine would from files."""
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        class Loader(DefaultModelLoader):  # type: ignore[misc]
            def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Any:
                return iter(weights)

        Loader(config.load_config).load_weights(model, config.model_config)

    def untied(self, config: Any) -> bool:
        """Whether it loads a head of the checkpoint's own although config.json says that the embedding is the head."""
        return bool(getattr(config.model_config, "word_embeddings_untied_by_checkpoint", False))

    def tied(self, config: Any, model: torch.nn.Module) -> tuple[str, str] | None:
        """The head and the embedding that it would tie again if the checkpoint has them equal, by their tensors' names.

        0.31 and later look into a checkpoint whose config says that they are tied.
        """
        if not self.untied(config):
            return None
        from vllm.model_executor.model_loader import weight_tying

        found = weight_tying._get_untied_lm_head(model)
        if found is None:
            return None
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return names[id(found.lm_head.weight)], names[id(found.embed_tokens.weight)]

    def amendments(self, config: Any, sources: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Any]:
        """What config.json must say of shards, where vLLM looks for it into a checkpoint that is not sharded.

        ``AutoGPTQConfig`` and ``AutoAWQConfig.maybe_update_config``: which modules are quantized.
        """
        said = getattr(config.model_config.hf_config, "quantization_config", None)
        if not isinstance(said, dict):
            return {}
        modules = {name.rpartition(".")[0] for name in sources}
        packed = {name.rpartition(".")[0] for name, (dtype, _) in sources.items() if dtype not in _PLAIN}
        key, found = {
            "gptq": ("modules_in_block_to_quantize", packed),
            "awq": ("modules_to_not_convert", modules - packed),
        }.get(str(said.get("quant_method")), ("", set()))
        if not key or said.get(key) or not found:
            return {}
        return {"quantization_config": {**said, key: sorted(found)}}

    def _make_groups(self) -> None:
        import vllm.distributed.parallel_state as state
        from vllm.distributed import init_distributed_environment, initialize_model_parallel

        with tempfile.TemporaryDirectory() as folder:
            init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, backend="gloo")
            initialize_model_parallel(1)
        if state._EP is None:  # made only for models that vLLM knows to be mixtures
            state._EP = copy(state._TP)

    def _partition(self, parallel: Parallel) -> None:
        if parallel.partition is None:
            os.environ.pop(PARTITION, None)
        else:
            os.environ[PARTITION] = ",".join(map(str, parallel.partition))


def _place(parallel: Parallel, rank: int) -> None:
    """Give the groups of ``parallel_state`` the sizes and ranks of one place."""
    import vllm.distributed.parallel_state as state

    tp_rank, pp_rank = parallel.place(rank)
    peers = [pp_rank * parallel.tp + i for i in range(parallel.tp)]
    stages = [i * parallel.tp + tp_rank for i in range(parallel.pp)]
    for name, ranks in (("_TP", peers), ("_EP", peers), ("_PP", stages)):
        group = getattr(state, name, None)
        if group is not None:
            group.rank, group.ranks, group.world_size = rank, ranks, len(ranks)
            group.rank_in_group = ranks.index(rank)


def _platform() -> None:
    """A build that finds no device takes the CPU's platform."""
    import vllm.platforms as platforms

    if type(platforms.current_platform).__name__ == "UnspecifiedPlatform":
        from vllm.platforms.cpu import CpuPlatform

        platforms._current_platform = CpuPlatform()


def _inspect_models_here() -> None:
    """Model classes are looked at in this process, not in one more for each: nothing here uses a GPU."""
    from vllm.model_executor.models import registry

    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = lambda function: function()


def _no_accelerator() -> None:
    """What vLLM's own CPU runner does too: there is no cache to empty."""
    accelerator = getattr(torch, "accelerator", None)
    for name in ("empty_cache", "synchronize"):
        if accelerator is not None:
            setattr(accelerator, name, lambda *_args, **_kwargs: None)


def _forget_layers(config: Any) -> None:
    """Attention layers register under their names, each once: those of the rank before are forgotten."""
    config.compilation_config.static_forward_context.clear()


def _default_dtype(dtype: torch.dtype) -> AbstractContextManager[Any]:
    from vllm.utils.torch_utils import set_default_torch_dtype

    context: AbstractContextManager[Any] = set_default_torch_dtype(dtype)
    return context


class _NoKernel:
    """A kernel of a quantized layer that this build does not have. It is never called."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_kwargs: None


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Quantized layers look for a kernel that runs here; none is needed to make their parameters."""
    patched: list[tuple[Any, str, Any]] = []
    for where, name, missing in _KERNELS:
        module = _module(where)
        original = getattr(module, name, None)
        if original is not None:
            patched.append((module, name, original))
            setattr(module, name, _tolerant(original, missing))
    try:
        yield
    finally:
        for module, name, original in patched:
            setattr(module, name, original)


def _tolerant(function: Any, missing: Callable[..., Any]) -> Any:
    def tolerant(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, ImportError, NotImplementedError):
            return missing(*args, **kwargs)

    return tolerant


def _first_moe_backend(moe_config: Any) -> tuple[Any, Any]:
    """The kernel that would be tried first, though it takes no experts of these sizes here."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    backend = unquantized._get_priority_backends(moe_config)[0]
    return backend, unquantized.backend_to_kernel_cls(backend)[0]


_KERNELS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    # fp8 linear layers register all their parameters before they look for a kernel.
    (
        "vllm.model_executor.layers.quantization.fp8",
        "init_fp8_linear_kernel",
        lambda *_args, **_kwargs: _NoKernel(),
    ),
    # Plain experts have the same shapes whatever kernel runs them, but for those that --moe-backend may name.
    (
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
        "select_unquantized_moe_backend",
        _first_moe_backend,
    ),
    # mxfp4 experts: a backend that was named is taken, whether it runs here or not; the padding of their parameters
    # depends on its name alone (0.32).
    (
        "vllm.model_executor.layers.fused_moe.oracle.mxfp4",
        "_return_or_raise",
        lambda backend, *_args, **_kwargs: (backend, None),
    ),
)
"""Where a kernel is chosen, and what is taken where there is none."""


def _module(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        return None
