"""The SGLang plug-in: the load format ``shardtool``, which ``pip install 'shardtool[sglang]'`` registers.

::

    sglang serve --model-path DIR --load-format shardtool --model-loader-extra-config '{"uri": "s3://...", ...}'

    sglang.py           register: the entry point of the group ``sglang.srt.plugins``
    sglang_loader.py    the loader that SGLang makes in each scheduler
    engine_*.py         what it has in common with the plug-in of vLLM, see there

SGLang calls ``register`` in its launcher and in every process that loads. The format becomes one of its choices by its
own function for that. Its ``LoadConfig`` knows formats of its own enumeration alone, or a loader's class: a hook gives
it the class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

FORMAT = "shardtool"
VERIFIES = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"


@cache
def register() -> None:
    """Make the load format known to the SGLang of this process, once."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_load_format_choices

    add_load_format_choices([FORMAT])
    HookRegistry.register(VERIFIES, _verify, HookType.AROUND)


def _verify(verify: Callable[[Any], None], config: Any) -> None:
    """What SGLang does to a ``LoadConfig``, but for this format."""
    if config.load_format == FORMAT:
        from shardtool.integrations.sglang_loader import ShardtoolLoader

        config.load_format = ShardtoolLoader
    else:
        verify(config)
