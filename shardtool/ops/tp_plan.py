"""The only room that names the inside of transformers: what it makes of a checkpoint, and a model without its weights.

::

    layout_of    config.json and the tensors' names -> the layout under the model's own tp_plan
    empty        config.json -> the model on the meta device
    divided      ... -> the same model as one of several ranks, each parameter its slice
    dtypes       the dtype of each of its tensors
    finished     its tensors are loaded -> ready: ties, buffers, evaluation mode

Written for transformers 5.19 to 5.23 (``modeling_utils.py``, ``core_model_loading.py``, ``conversion_mapping.py``,
``distributed/mixin.py``), which is imported when a function here is called. No code of a checkpoint is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from shardtool.errors import Incomplete, PlanError, UnsupportedModel, UnsupportedTransform, UsageError
from shardtool.layouts.transformers import Row, Step, TransformersLayout, assembled
from shardtool.mosaic import Logical
from shardtool.recipe import EXPERT, SLOT

if TYPE_CHECKING:
    import torch

OLDEST = (5, 19)
"""The first version of transformers whose tensor parallelism is the one that is known here."""


def installed() -> str:
    """The version of transformers. Raises ``UsageError`` where it is missing or too old."""
    try:
        import transformers
    except ImportError:
        raise UsageError(
            "transformers is not installed, which knows this layout: pip install 'shardtool[transformers]'"
        ) from None
    version: str = transformers.__version__
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise UsageError(
            f"transformers {version} is too old for this: tensor parallelism is supported from "
            f"{OLDEST[0]}.{OLDEST[1]} on, pip install --upgrade transformers"
        )
    return version


def empty(config: Mapping[str, Any], dtype: torch.dtype, tp: int = 1) -> Any:
    """The model that a config.json describes, on the meta device; of ``tp`` ranks, this one's part of it.

    Raises ``UnsupportedModel`` for what transformers does not have, or cannot divide.
    """
    import transformers
    from transformers.monkey_patching import patch_output_recorders
    from transformers.utils.generic import ContextManagers

    version = installed()
    wanted, name = str(config.get("model_type")), _architecture(config)
    known = transformers.CONFIG_MAPPING
    kind = getattr(transformers, name, None)
    if wanted not in known or not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        own = ", and shardtool does not run a checkpoint's own code" if config.get("auto_map") else ""
        raise UnsupportedModel(f"transformers {version} has no {name} of the model type {wanted!r}{own}")
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "config.json has a quantization_config: transformers changes quantized models while it loads them, which "
            "shardtool does not do"
        )
    try:
        made = known[wanted].from_dict(dict(config))
        for one in (made, *(getattr(made, key, None) for key in made.sub_configs)):
            if one is not None:
                one.dtype = dtype
        parallel, _, mesh = kind.prepare_distribute_model(_parallel(made, tp))
        with ContextManagers(kind.get_init_context(dtype, False, False, False)):
            model = kind(made)
        patch_output_recorders(model)
        if mesh is not None:
            model = kind.maybe_distribute_model(model, parallel, mesh)
    except Exception as error:  # whatever transformers says of such a config
        ranks, why = f" for {tp} ranks" if tp > 1 else "", " ".join(str(error).split())
        raise UnsupportedModel(
            f"transformers {version} cannot make a {name} of this config.json{ranks}: {why[:400]}"
        ) from error
    return model


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise UnsupportedModel("config.json does not say which model it is (architectures)")
    return named[0]


def _parallel(config: Any, tp: int) -> Any:
    """What transformers is told of the ranks; it looks at its config for it too."""
    if tp == 1:
        return None
    from transformers.distributed.configuration_utils import DistributedConfig

    config.distributed_config = DistributedConfig(tp_size=tp)
    return config.distributed_config


def dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each tensor of a model that is held in ``dtype``: some stay float32."""
    kept = list(model._get_dtype_plan(dtype))
    pattern = re.compile("|".join(name.replace("*", ".*") for name in kept)) if kept else None
    import torch

    return {
        name: torch.float32 if pattern and pattern.search(name) else tensor.dtype
        for name, tensor in model.state_dict().items()
    }


def finished(model: Any, missing: Set[str], device: torch.device) -> None:
    """Make a model whose other tensors are loaded ready: tied weights, buffers that no file holds, evaluation mode.

    ``missing``: tensors that no file holds. Raises ``Incomplete`` for those that nothing else gives.
    """
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils.loading_report import LoadStateDictInfo

    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in missing:
            tensor._is_hf_initialized = True  # what transformers goes by
    info = LoadStateDictInfo(set(missing), set(), set(), [], {}, set())
    load = LoadStateDictConfig(device_map={"": device}, device_mesh=model._device_mesh, dtype=model.dtype)
    model._finalize_model_loading(model, load, info)
    if info.missing_keys:
        raise Incomplete(f"the checkpoint has no tensor {min(info.missing_keys)!r}, which {type(model).__name__} needs")
    model.eval()


def generation(model: Any, settings: Mapping[str, Any]) -> None:
    """Take over a generation_config.json."""
    from transformers import GenerationConfig

    if model.can_generate():
        model.generation_config = GenerationConfig.from_dict(dict(settings))


# What the model's tensors are made of.


@dataclass(slots=True)
class _Made:
    """One tensor of the module, or several that are parts of one: how it is converted, and its sources by pattern."""

    converter: Any = None
    sources: dict[str, list[str]] = field(default_factory=dict)


def layout_of(config: Mapping[str, Any], tensors: Mapping[str, Logical]) -> TransformersLayout:
    """The layout of a checkpoint: its plan, and how transformers makes the module's tensors of the checkpoint's.

    Raises ``PlanError`` where a tensor is missing, strange or of another shape than the module's.
    """
    import torch

    version = installed()
    model = empty(config, torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    made, strange = _collected(model, tensors)
    rows: list[Row] = []
    for name, one in made.items():
        rows.extend(_rows(name, one, model, tensors, shapes))
    unused = _unused(model, {row.to for row in rows}, strange)
    for row in rows:
        whole = assembled(row, [tensors[_first(of)].shape for of in row.of])
        if whole.shape != shapes[row.to]:
            raise PlanError(
                f"tensor {row.to!r} is {list(shapes[row.to])} in {type(model).__name__} with this config.json, the "
                f"checkpoint's tensors make {list(whole.shape)}"
            )
    return TransformersLayout(
        architecture=type(model).__name__,
        engine_version=version,
        plan=_plan(model),
        rows=_folded(_typed(rows, model)),
        tied=dict(model.all_tied_weights_keys),
        unused=unused,
        head_dim=_head_dim(model),
        even=_even(),
    )


def _first(of: str) -> str:
    return of.replace(EXPERT, "0")


def _plan(model: Any) -> dict[str, str]:
    """The plan, and for what has a style by its place only: whose embedding it is, and that buffers stay whole."""
    import torch
    from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard as generic

    plan = {str(name): str(style) for name, style in (model.tp_plan or {}).items()}
    for name, module in model.named_modules():
        style = plan.get(generic(name))
        if style is None:
            continue
        for buffer in module._buffers:
            plan[generic(f"{name}.{buffer}")] = "replicate"
        if isinstance(module, torch.nn.Embedding) and style.startswith(("rowwise", "colwise")):
            plan[generic(name)] = f"embedding_{style[:7]}"
    return plan


def _even() -> tuple[str, ...]:
    """The styles with which this version refuses what does not divide."""
    from transformers.integrations.tensor_parallel import ColwiseParallel, TensorParallelLayer

    checked = ColwiseParallel.validate_param is not TensorParallelLayer.validate_param
    return ("colwise_gather_output", "colwise_rep") if checked else ()


def _head_dim(model: Any) -> int:
    text = model.config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    said = getattr(text, "head_dim", None) or (hidden // heads if heads and hidden else 0)
    return said if isinstance(said, int) else 0


def _collected(model: Any, names: Iterable[str]) -> tuple[dict[str, _Made], set[str]]:
    """The module's tensors with their sources, and the sources that none of them takes.

    The same steps as in ``convert_and_load_state_dict_in_model``.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model, None, None)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    held, prefix = model.state_dict(), model.base_model_prefix
    made: dict[str, _Made] = {}
    strange: set[str] = set()
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, held)
        if target not in held and name in held:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=held)
        if target not in held:
            strange.add(name)
            continue
        one = made.setdefault(target, _Made(of_pattern[pattern] if pattern is not None else None))
        key = name if pattern is None else pattern
        if (pattern is None) != (one.converter is None) or (pattern is None and one.sources):
            raise PlanError(f"the checkpoint holds {target!r} twice: as {name!r} and under other names")
        one.sources.setdefault(key, []).append(name)
    return made, strange


def _rows(
    name: str, made: _Made, model: Any, tensors: Mapping[str, Logical], shapes: Mapping[str, tuple[int, ...]]
) -> list[Row]:
    """The tensors that one conversion makes."""
    from transformers import core_model_loading as loading

    if made.converter is None:
        ((of,),) = made.sources.values()
        return [Row(name, (of,))]
    converter = made.converter
    lists = [made.sources[pattern] for pattern in converter.source_patterns if pattern in made.sources]
    steps: list[Step] = []
    targets = [name]
    parts: tuple[Step, ...] = ()
    for op in converter.operations:
        if type(op) is loading.MergeModulelist and op.dim == 0 and not steps:
            lists, count = _stacked(name, lists)
            steps.append(("stack", count))
        elif type(op) is loading.Concatenate and not parts:
            steps.append(("join", op.dim))
        elif type(op) is loading.Transpose and not parts:
            if not (op.check_dims and tensors[lists[0][0]].shape == shapes[name]):
                steps.append(("turn", op.dim0, op.dim1))
        elif type(op) is loading.Chunk and not parts:
            patterns = op.get_target_patterns(converter.target_patterns, config=model.config)
            found = next(pattern for pattern in patterns if pattern in name)
            before, _, after = name.partition(found)
            targets = [before + pattern + after for pattern in patterns]
            parts = tuple(("part", op.dim, k, len(targets)) for k in range(len(targets)))
        else:
            raise UnsupportedTransform(
                f"transformers makes {name!r} of {lists[0][0]!r} with {op!r}, which shardtool does not know"
            )
    sources = tuple(source for one in lists for source in one)
    if len(sources) > 1 and not any(step[0] == "join" for step in steps):
        raise PlanError(f"the checkpoint has {len(sources)} tensors for {name!r}, first {sources[0]!r}")
    if not parts:
        return [Row(name, sources, tuple(steps))]
    if lost := sorted(set(targets) - set(shapes)):
        raise PlanError(f"{sources[0]!r} would become {lost[0]!r}, which {type(model).__name__} does not have")
    return [Row(target, sources, (*steps, last)) for target, last in zip(targets, parts, strict=True)]


def _stacked(name: str, lists: list[list[str]]) -> tuple[list[list[str]], int]:
    """Lists of the experts' names as one name with a slot each, and the number of experts."""
    found, counts = [], set()
    for names in lists:
        split = [one.split(".") for one in names]
        places = [
            i
            for i, part in enumerate(split[0])
            if part == "0" and all(len(one) == len(split[0]) and one[i] == str(e) for e, one in enumerate(split))
        ]
        slotted = {".".join([*one[:p], EXPERT, *one[p + 1 :]]) for p in places[-1:] for one in split}
        if len(slotted) != 1:
            raise PlanError(f"the experts of {name!r} are not numbered from 0 on without a gap, first {names[0]!r}")
        found.append([slotted.pop()])
        counts.add(len(names))
    if len(counts) != 1:
        raise PlanError(f"the checkpoint has different numbers of experts for {name!r}: {sorted(counts)}")
    return found, counts.pop()


def _unused(model: Any, targets: Set[str], strange: Set[str]) -> dict[str, str]:
    """The sources that the model ignores, with the reason. Raises ``PlanError`` for what is missing or unknown."""
    missing = set(model.state_dict()) - targets
    for target, source in model.all_tied_weights_keys.items():
        if target in targets or source in targets:
            missing -= {target, source}
    info = SimpleNamespace(missing_keys=missing, unexpected_keys=set(strange))
    model._adjust_missing_and_unexpected_keys(info)
    what = type(model).__name__
    if info.missing_keys:
        raise PlanError(f"the checkpoint has no tensor for {min(info.missing_keys)!r}, which {what} needs")
    if info.unexpected_keys:
        raise PlanError(
            f"{len(info.unexpected_keys)} source tensors have no place in {what}, first "
            f"{min(info.unexpected_keys)!r}; check config.json and the index, or remove them from the checkpoint"
        )
    return dict.fromkeys(sorted(strange), f"{what} ignores it")


def _typed(rows: list[Row], model: Any) -> list[Row]:
    """The rows with the dtypes that stay what they are."""
    import torch

    full, half = dtypes(model, torch.bfloat16), dtypes(model, torch.float16)
    found = []
    for row in rows:
        if full[row.to] is torch.float32:
            dtype = "F32"
        elif full[row.to] is not torch.bfloat16:
            dtype = "same"
        else:
            dtype = "half" if half[row.to] is torch.float32 else ""
        found.append(Row(row.to, row.of, row.steps, row.index, dtype))
    return found


def _folded(rows: list[Row]) -> tuple[Row, ...]:
    """Rows that differ in the layer's number only, as one."""
    groups: dict[Row, list[int]] = {}
    for row in rows:
        slotted, number = _slotted(row)
        groups.setdefault(slotted, []).extend([] if number is None else [number])
    return tuple(Row(row.to, row.of, row.steps, tuple(sorted(index)), row.dtype) for row, index in groups.items())


def _slotted(row: Row) -> tuple[Row, int | None]:
    """The row with a slot for the first number in its name, if its sources have the same number first."""
    number = next((part for part in row.to.split(".") if part.isdecimal()), None)
    names = [_with_slot(name, number) for name in (row.to, *row.of)] if number else [None]
    if number is None or None in names:
        return row, None
    to, *of = [str(name) for name in names]
    return Row(to, tuple(of), row.steps, (), row.dtype), int(number)


def _with_slot(name: str, number: str) -> str | None:
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None or parts[first] != number:
        return None
    parts[first] = SLOT
    return ".".join(parts)
