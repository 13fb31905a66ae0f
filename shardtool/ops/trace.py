"""``trace``: an engine's own loader says what its ranks hold; what it says becomes a file that ``save`` can use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from shardtool.errors import FormatError, NotFound, UsageError
from shardtool.layouts.file import FileLayout, decode, encode
from shardtool.ops import layout as layouts
from shardtool.ops import source as sources
from shardtool.ops.layout import Choice
from shardtool.parallel import Parallel
from shardtool.stores import Address, open_store
from shardtool.stores.address import shown
from shardtool.stores.base import Store

ENGINES = ("vllm", "sglang")


def trace(
    model: Address,
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

    ``model``: a folder, a URI or a store, whole or sharded (then of the source that its manifest lists). ``tp``: one
    size or several. ``dtype``: ``auto`` is what the engine chooses where it sees a CPU. ``output``: the path or address
    where the layout file goes, if anywhere; it replaces an earlier one and nothing else. ``progress`` is told (ranks
    done, ranks in all). The rest is as in ``save``. Raises ``UnsupportedModel`` with the engine's own words for what it
    does not load.
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine!r} cannot be traced; {' and '.join(ENGINES)} can")
    if isinstance(output, Store):
        raise UsageError(f"output={output.uri} is a store, not a file: write the path or address of a layout file")
    if output is not None and not os.fspath(output).endswith(".json"):
        raise UsageError(f"--output {shown(os.fspath(output))!r} is not a name for a layout file; let it end in .json")
    many = (tp,) if isinstance(tp, int) else tuple(tp)
    partition = None if layer_partition is None else tuple(layer_partition)
    parallels = [Parallel(size, pp, expert_parallel, partition) for size in many]
    if output is not None:
        _check_output(os.fspath(output))
    source = sources.open_source(model)
    with source.store:
        choice = Choice("", None, engine_python, trust_remote_code, moe_backend)
        found = layouts.trace(source, choice, engine, parallels, dtype, progress)
    if output is not None:
        with _place(os.fspath(output)) as (store, name):
            store.put(name, encode(found))
    return found


@contextmanager
def _place(output: str) -> Iterator[tuple[Store, str]]:
    """The folder of a file, and its name there."""
    folder, _, name = output.rpartition("/")
    with open_store(folder or ("/" if output.startswith("/") else ".")) as store:
        yield store, name


def _check_output(output: str) -> None:
    """Refuse to replace what is not a layout file, before the engine has worked for nothing."""
    try:
        with _place(output) as (store, name):
            decode(store.get(name, limit=layouts.MOST), store.locate(name))
    except NotFound:
        return
    except FormatError as error:
        raise UsageError(
            f"--output {shown(output)!r} is there already, and only a layout file is replaced: {error}"
        ) from None
