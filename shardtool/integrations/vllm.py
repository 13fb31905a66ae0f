"""The vLLM plug-in: the load format ``shardtool``, which ``pip install 'shardtool[vllm]'`` registers.

::

    vllm serve DIR --load-format shardtool --model-loader-extra-config '{"uri": "s3://bucket/llama-tp4", ...}'

    vllm.py             register: the entry point of the group ``vllm.general_plugins``
    vllm_loader.py      the loader that vLLM makes in each worker
    engine_options.py   the extra config
    engine_load.py      a checkpoint into a rank's model: own files, ranges of others', or whole tensors
    engine_checks.py    what a checkpoint and a model have to say of each other
    engine_log.py       what a loader tells its user

vLLM calls ``register`` in its front end, its engine and every worker, perhaps more than once; it is imported then.
"""

from __future__ import annotations

from functools import cache

FORMAT = "shardtool"


@cache
def register() -> None:
    """Make the load format known to the vLLM of this process, once."""
    from vllm.model_executor.model_loader import register_model_loader

    from shardtool.integrations.vllm_loader import ShardtoolLoader

    register_model_loader(FORMAT)(ShardtoolLoader)
