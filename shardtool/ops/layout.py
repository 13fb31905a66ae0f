"""Which layout cuts a model, and what it says of it.

::

    Choice      what was asked for: a name, a file, a version, an interpreter that has the engine
    choose      a source -> the layout: recorded, built in, traced, from a file
    outlined    ... -> its outline at some sizes, with the dtype of the shards
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from shardtool.checkpoint import CONFIG
from shardtool.dtypes import DType, from_name
from shardtool.errors import PlanError, UnsupportedModel, UsageError
from shardtool.layouts import file as files
from shardtool.layouts import tables, vllm
from shardtool.layouts.base import Layout, Model, Outline, dtype_in
from shardtool.layouts.packed import MOE_BACKENDS
from shardtool.manifest import Manifest
from shardtool.ops import source as sources
from shardtool.ops.rank import text
from shardtool.ops.source import Source
from shardtool.parallel import Parallel
from shardtool.stores import open_store
from shardtool.stores.address import shown
from shardtool.stores.base import Store
from shardtool.tracing import parent as tracing

NAMES = ("vllm", "vllm:builtin", "vllm:traced", "sglang", "sglang:builtin", "sglang:traced", "transformers")
MOST = 1 << 30
"""Bytes of a layout file that are read at most."""
SMALL = 32 << 20
"""Bytes of a side file that an engine gets to see while it is traced."""
TRACED_DTYPES = (DType.BF16, DType.F16, DType.F32)
"""The dtypes in which engines can be asked to hold a model."""

_VERSION, _PYTHON, _TRUST, _BACKEND = "--engine-version", "--engine-python", "--trust-remote-code", "--moe-backend"
_FLAGS: Mapping[str, tuple[str, ...]] = {
    "vllm": (_VERSION, _PYTHON, _TRUST, _BACKEND),
    "vllm:builtin": (_VERSION, _BACKEND),
    "vllm:traced": (_VERSION, _PYTHON, _TRUST, _BACKEND),
    "sglang": (_VERSION,),
    "sglang:builtin": (_VERSION,),
    "sglang:traced": (_VERSION, _PYTHON, _TRUST, _BACKEND),
    "transformers": (),
}
"""Layouts by name -> the flags that mean something to them. None does to a layout that is made already."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was asked for. An empty ``layout``: the one that the checkpoint was made with."""

    layout: str = ""
    engine_version: str | None = None
    engine_python: str | None = None
    trust_remote_code: bool = False
    moe_backend: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no name, such as a store."""
        text(self.layout, "layout")


def traces(layout: str | None) -> bool:
    """Whether the layout of this name may ask an engine."""
    return _PYTHON in _FLAGS.get(layout or "", ())


def outlined(source: Source, choice: Choice, parallel: Parallel, dtype: str = "auto") -> tuple[Layout, Outline, DType]:
    """A layout, what it says of a model at some sizes, and the dtype of the shards.

    ``vllm`` is the built-in table; where none knows the model, and vLLM is at hand, its own loader is traced.
    """
    if choice.layout == "vllm":
        try:
            return _outlined(source, _builtin(source, choice), parallel, dtype)
        except UnsupportedModel as error:
            if not tracing.available("vllm", choice.engine_python):
                raise UnsupportedModel(
                    f"{error}; where vLLM is installed its layout can be traced from vLLM itself: shardtool trace"
                    f" writes it to a file for --layout FILE"
                ) from None
            layout, outline, held = _outlined(source, _traced(source, choice, parallel, dtype), parallel, dtype)
            note = f"no built-in table knows this model: it is cut by {layout.title}"
            return layout, replace(outline, notes=(note, *outline.notes)), held
    return _outlined(source, choose(source, choice, parallel, dtype), parallel, dtype)


def _outlined(source: Source, layout: Layout, parallel: Parallel, wanted: str) -> tuple[Layout, Outline, DType]:
    held = target_dtype(source, wanted, layout)
    model = Model(source.config, source.inventory, held, sources.equal_in(source))
    return layout, layout.outline(model, parallel), held


def choose(source: Source, choice: Choice, parallel: Parallel, dtype: str = "auto") -> Layout:
    """The layout that was asked for."""
    engine, _, kind = choice.layout.partition(":")
    if choice.layout not in NAMES:
        made = from_file(choice.layout) if choice.layout else recorded(source)
        _refuse_flags(choice, made.record().get("moe_backend"))
        return made
    _refuse_flags(choice)
    if kind == "traced":
        return _traced(source, choice, parallel, dtype)
    if engine == "transformers":
        from shardtool.ops import tp_plan

        return tp_plan.layout_of(source.config, source.inventory)
    return _builtin(source, choice)


def _refuse_flags(choice: Choice, backend: str | None = None) -> None:
    """Refuse what means nothing to the layout. ``backend``: the MoE backend that a layout has already."""
    said = {
        _VERSION: choice.engine_version,
        _PYTHON: choice.engine_python,
        _TRUST: choice.trust_remote_code,
        _BACKEND: choice.moe_backend if choice.moe_backend != backend else None,
    }
    for flag, value in said.items():
        if not value or flag in _FLAGS.get(choice.layout, ()):
            continue
        if not choice.layout:
            raise UsageError(
                f"{flag} means nothing without --layout: the shards are cut as those that they are made of; leave it "
                f"out, or say --layout vllm"
            )
        if choice.layout == "transformers":
            why = "asks the transformers of this Python and runs no code of a checkpoint"
        elif choice.layout in NAMES:
            why = "is a built-in table and asks no engine"
        else:
            why = "is what one engine was seen to do"
        raise UsageError(f"{flag} means nothing to --layout {choice.layout}, which {why}; leave it out")


def recorded(source: Source) -> Layout:
    """The layout that a sharded checkpoint was made with; that of the built-in table where it has no manifest."""
    if source.origin is None:
        raise PlanError(f"{source.uri} is not sharded: say with --layout how it shall be")
    return from_record(source.origin.layout, source)


def from_record(record: Mapping[str, Any], source: Source) -> Layout:
    """The layout that a manifest kept."""
    if record.get("kind") == "tp_plan":
        from shardtool.layouts import transformers

        return transformers.from_record(record, source.uri)
    if record.get("kind") == "traced":
        assert source.origin is not None
        return files.of_manifest(source.origin, source.uri)
    if record.get("engine") == "sglang":
        from shardtool.layouts import sglang

        return sglang.from_manifest(record, source.uri)
    return vllm.from_manifest(record, source.uri)


def from_file(path: str, flag: str = "--layout") -> files.FileLayout:
    """The layout of a file that ``trace`` wrote. A folder or URI works as well as a local path."""
    folder, _, name = path.rpartition("/")
    if not path.endswith(".json"):
        if flag != "--layout":
            raise UsageError(f"{flag} {shown(path)!r} is not a layout file (*.json)")
        known = ", ".join(NAMES)
        raise UsageError(
            f"--layout {shown(path)!r} is neither the name of a layout ({known}) nor a layout file (*.json)"
        )
    with open_store(folder or ("/" if path.startswith("/") else ".")) as store:
        return files.decode(store.get(name, limit=MOST), store.locate(name))


def moe_backend(said: str | None, made: Manifest | None, engine: str) -> str | None:
    """The engine's kernel for experts: that which was said, else that which this engine's shards were made for."""
    if said is None and made is not None and made.layout.get("engine") == engine:
        found = made.layout.get("moe_backend")
        return found if isinstance(found, str) else None
    return said


def _builtin(source: Source, choice: Choice) -> Layout:
    _refuse_foreign(source)
    version = choice.engine_version
    if choice.layout.startswith("sglang"):
        from shardtool.layouts import sglang

        return sglang.for_config(source.config) if version is None else sglang.for_config(source.config, version)
    backend = moe_backend(choice.moe_backend, source.origin, tables.ENGINE)
    found = vllm.for_config(source.config, version or tables.ENGINE_VERSION, backend)
    if backend is not None and backend not in MOE_BACKENDS:
        known = ", ".join(sorted(MOE_BACKENDS))
        raise UsageError(f"--moe-backend {backend!r:.40} is none of vLLM's kernels for experts: {known}")
    return found


def _refuse_foreign(source: Source) -> None:
    if any(o.key == "hf_quant_config.json" for o in source.side):
        raise UnsupportedModel(f"{source.uri} has a hf_quant_config.json, which the built-in tables do not know")


def _traced(source: Source, choice: Choice, parallel: Parallel, dtype: str) -> Layout:
    engine = choice.layout.partition(":")[0]
    choice = replace(choice, moe_backend=moe_backend(choice.moe_backend, source.origin, engine))
    return trace(source, choice, engine, [parallel], _traced_dtype(source, dtype))


def trace(
    source: Source,
    choice: Choice,
    engine: str,
    parallels: Iterable[Parallel],
    dtype: str,
    progress: Callable[[int, int], None] | None = None,
) -> files.FileLayout:
    """The layout that the installed engine's own loader shows at some sizes.

    Raises ``UsageError`` where it has another version than ``choice`` says.
    """
    wanted = None if dtype == "auto" else from_name(dtype)
    if wanted is not None and wanted not in TRACED_DTYPES:
        known = ", ".join(str(one.torch_name) for one in TRACED_DTYPES)
        raise UsageError(f"--dtype {dtype}: engines hold a model as auto, {known}")
    return tracing.trace(
        tracing.Job(
            engine=engine,
            uri=source.uri,
            config=source.config_text,
            side=partial(write_side_files, source.store, [(found.key, found.size) for found in source.side]),
            tensors=source.inventory,
            parallels=tuple(parallels),
            dtype=None if wanted is None else wanted.torch_name,
            trust_remote_code=choice.trust_remote_code,
            moe_backend=choice.moe_backend,
            engine_version=choice.engine_version,
        ),
        python=choice.engine_python,
        progress=progress,
    )


def write_side_files(store: Store, files: Iterable[tuple[str, int]], folder: Path) -> None:
    """Write what lies beside the weights and is small into a folder: remote code, tokenizer, settings."""
    for key, size in files:
        if size > SMALL or key == CONFIG or key.endswith((".safetensors", ".safetensors.index.json", ".bin")):
            continue
        data = bytearray(size)
        store.readinto(key, 0, memoryview(data))
        place = folder / key
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


def target_dtype(source: Source, wanted: str, layout: Layout) -> DType:
    """The dtype of the shards: ``auto`` is what config.json says, where that is what the engine will use."""
    if wanted != "auto":
        dtype = from_name(wanted)
        if dtype.name not in layout.dtypes:
            raise UsageError(f"--dtype {wanted}: {layout.title} can be {', '.join(layout.dtypes)}")
        return dtype
    if source.origin is not None and source.origin.dtype.name in layout.dtypes:
        return source.origin.dtype
    if len(layout.dtypes) == 1:
        return DType[layout.dtypes[0]]
    if layout.engine == "transformers":  # it runs in what config.json says, whatever the device
        said = sources.said_dtype(source.config)
        return DType.F32 if said is None else dtype_in(layout, from_name(said))
    return dtype_in(layout, _said_dtype(source))


def _traced_dtype(source: Source, wanted: str) -> str:
    """The dtype to trace for, so that it is not the choice of an engine that sees a CPU.

    A float16 that config.json says is left to the engine: some models it runs as bfloat16 then, and it refuses them
    where float16 was asked for.
    """
    if wanted != "auto":
        return wanted
    if source.origin is not None and source.origin.dtype in TRACED_DTYPES:
        return str(source.origin.dtype.torch_name)
    dtype = _said_dtype(source)
    return "auto" if dtype is DType.F16 else str(dtype.torch_name)


def _said_dtype(source: Source) -> DType:
    """The dtype of config.json, where engines use it whatever their GPU is. Raises ``UsageError``."""
    said = sources.said_dtype(source.config)
    if said is None or from_name(said) is DType.F32:
        what = "says float32" if said else "does not say a dtype"
        raise UsageError(
            f"config.json {what}, for which an engine's choice depends on its GPU: say --dtype bfloat16 or "
            f"--dtype float16"
        )
    dtype = from_name(said)
    if dtype not in (DType.BF16, DType.F16):
        raise UsageError(
            f"config.json says dtype {said}, in which engines do not run: say --dtype bfloat16 or --dtype float16"
        )
    return dtype
