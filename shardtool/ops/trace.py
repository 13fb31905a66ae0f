"""``trace``: an engine's own loader says what its ranks hold; what it says becomes a file that ``save`` can use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from shardtool.errors import UsageError
from shardtool.layouts.file import FileLayout, encode
from shardtool.ops import layout as layouts
from shardtool.ops import source as sources
from shardtool.ops.layout import Choice
from shardtool.parallel import Parallel
from shardtool.stores import open_store

ENGINES = ("vllm", "sglang")


def trace(
    model: str | os.PathLike[str],
    *,
    tp: int | Sequence[int],
    pp: int = 1,
    expert_parallel: bool = False,
    layer_partition: Sequence[int] | None = None,
    engine: str = "vllm",
    engine_python: str | None = None,
    trust_remote_code: bool = False,
    moe_backend: str | None = None,
    dtype: str = "auto",
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FileLayout:
    """The layout that the installed engine's own loader gives a model at some sizes; no weight is read, no GPU needed.

    ``model``: a folder or URI, whole or sharded (then of the source that its manifest lists). ``tp``: one size or
    several. ``output``: where the layout file goes, if anywhere. ``progress`` is told (ranks done, ranks in all). The
    rest is as in ``save``. Raises ``UnsupportedModel`` with the engine's own words for what it does not load.
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine!r} cannot be traced; {' and '.join(ENGINES)} can")
    if output is not None and not os.fspath(output).endswith(".json"):
        raise UsageError(f"--output {os.fspath(output)!r} is not a name for a layout file; let it end in .json")
    many = (tp,) if isinstance(tp, int) else tuple(tp)
    partition = None if layer_partition is None else tuple(layer_partition)
    parallels = [Parallel(size, pp, expert_parallel, partition) for size in many]
    source = sources.open_source(os.fspath(model))
    with source.store:
        choice = Choice("", None, engine_python, trust_remote_code, moe_backend)
        found = layouts.trace(source, choice, engine, parallels, dtype, progress)
    if output is not None:
        folder, _, name = os.fspath(output).rpartition("/")
        with open_store(folder or ("/" if os.fspath(output).startswith("/") else ".")) as store:
            store.put(name, encode(found))
    return found
