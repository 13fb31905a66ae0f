"""What every process of the tracer finds imported: vLLM, as the product's own child would import it."""

from __future__ import annotations

import os
from importlib import import_module

from shardtool.tracing import stubs, vllm

os.environ.update(vllm.SETTINGS)
stubs.install("torchvision")
for _name in (
    "shardtool.tracing.child",
    "transformers",
    "vllm.distributed",
    "vllm.engine.arg_utils",
    "vllm.model_executor.model_loader.default_loader",
):
    import_module(_name)
