"""compressed-tensors: groups of layers, each with its own numbers.

Sources: vLLM 0.32 ``model_executor/layers/quantization/compressed_tensors/`` and ``utils/config_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardtool.errors import PlanError
from shardtool.layouts.schemes import (
    FP8_WEIGHT,
    REFUSES,
    Form,
    Held,
    Module,
    Part,
    all_or_none,
    matches,
    texts,
    unknown,
)


@dataclass(frozen=True, slots=True)
class Tensors:
    """``CompressedTensorsConfig``. ``targets``: (name, pattern or class, what its modules are stored as), in order."""

    targets: tuple[tuple[str, Form], ...]
    ignored: tuple[str, ...]
    title: str = "compressed-tensors"
    attention: str = "tensors"

    def seen(self, _held: Held) -> Tensors:
        """Nothing depends on the checkpoint."""
        return self

    def linear(self, module: Module) -> Form | None:
        """The form of the first target that is the module's name, those of all its parts, or its class."""
        if self._ignored(module):
            return None
        forms = dict(self.targets)
        by_name = self._first(module.name)
        if by_name is None and module.fused:
            parts = [self._first(part) for part in module.parts]
            by_name = parts[0] if all(part is not None for part in parts) else None
        if by_name is None:
            by_name = self._first(module.kind, inside=True)
        return None if by_name is None else forms[by_name]

    def head(self, module: Module) -> Form | None:
        """If a target names it."""
        return self.linear(replace(module, kind="ParallelLMHead"))

    def experts(self, prefix: str) -> None:
        """Not known, unless they are ignored."""
        if not self._ignored(Module(prefix, (prefix,))):
            raise unknown(self.title, "quantized experts")

    def _ignored(self, module: Module) -> bool:
        if any(_hits(x, module.name) for x in self.ignored):
            return True
        return all_or_none(module, [any(_hits(x, part) for x in self.ignored) for part in module.parts])

    def _first(self, name: str, *, inside: bool = False) -> str | None:
        return next((target for target, _ in self.targets if _hits(target, name, inside=inside)), None)


def _hits(target: str, name: str, *, inside: bool = False) -> bool:
    """``is_equal_or_regex_match``."""
    if target.startswith("re:"):
        return matches(target[3:], name)
    return target.lower() in name.lower() if inside else target == name


def tensors(said: Mapping[str, Any]) -> Tensors:
    """compressed-tensors settings. Raises ``PlanError`` and ``UnsupportedModel``."""
    title = "compressed-tensors"
    for key in ("transform_config", "sparsity_config"):
        if said.get(key):
            raise unknown(title, key)
    cache = said.get("kv_cache_scheme")
    if cache and not (isinstance(cache, Mapping) and cache.get("strategy") == "tensor"):
        raise unknown(title, "a kv_cache_scheme of another strategy than tensor")
    groups = said.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise unknown(title, "no config_groups")
    found: dict[str, Form] = {}
    for group in groups.values():
        targets = texts(group, "targets")
        if len(targets) == 1 and targets[0].endswith("Attention"):
            continue
        form = _form(title, group, str(group.get("format") or said.get("format")))
        found.update(dict.fromkeys(targets, form))
    scheme = Tensors(tuple(found.items()), texts(said, "ignore"))
    if scheme.linear(Module("model.embed_tokens", ("model.embed_tokens",), "VocabParallelEmbedding")):
        raise unknown(title, "quantized embeddings")
    return scheme


_FLOATS = ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized")
"""Formats with activations that are quantized too (``is_activation_quantization_format``)."""


def _form(title: str, group: Mapping[str, Any], format: str) -> Form:
    """What the layers of a group are stored as (``_get_scheme_from_parts``)."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping) or group.get("output_activations"):
        raise unknown(title, "a group without weights or with output_activations")
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if weights.get("actorder") in ("group", "dynamic"):
        raise PlanError(f"the {title} settings in config.json say actorder {weights['actorder']!r}; {REFUSES}")
    said = f"{bits}-bit {kind} weights by {strategy} in the format {format}"
    symmetric = weights.get("symmetric", True)
    if weights.get("dynamic"):
        raise unknown(title, f"dynamic {said}")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise unknown(title, "input_activations that are no table of settings")
    static = bool(inputs) and not inputs.get("dynamic", False) if inputs else False
    if kind == "float" and bits == 8 and symmetric and format in _FLOATS:
        more = (Part("input_scale", "F32", "each"),) if static else ()
        if strategy == "block":
            block = weights.get("block_structure")
            if (
                not isinstance(block, list)
                or len(block) != 2
                or not all(type(n) is int and n > 0 for n in block)
                or more
            ):
                raise unknown(title, f"{said}, with block_structure {block!r:.60}")
            return Form((FP8_WEIGHT, Part("weight_scale", "F32", "cut", *block)))
        if strategy in _SCALES:
            return Form((FP8_WEIGHT, _SCALES[strategy], *more))
    if kind == "int" and bits == 8 and symmetric and format in _FLOATS and strategy in _SCALES and inputs:
        numbers = Part("weight", "I8")
        by = inputs.get("strategy")
        if inputs.get("num_bits", 8) == 8 and (by == "tensor" if static else by == "token"):
            more = (Part("input_scale", "F32", "final"),) if static else ()
            if static and not inputs.get("symmetric", True):
                more = (*more, Part("input_zero_point", "I8", "final"))
            return Form((numbers, _SCALES[strategy], *more))
    if (
        kind == "int"
        and bits in (4, 8)
        and format == "pack-quantized"
        and not inputs
        and strategy in ("group", "channel")
    ):
        along = size if strategy == "group" else 0
        if type(along) is int and along >= 0:
            zeros = () if symmetric else (Part("weight_zero_point", "I32", "cut", 32 // bits, along),)
            return Form(
                (
                    Part("weight_packed", "I32", "cut", 1, 32 // bits),
                    Part("weight_scale", "", "cut", 1, along),
                    Part("weight_shape", "I64", "last"),
                    *zeros,
                )
            )
    raise unknown(title, said)


_SCALES = {"tensor": Part("weight_scale", "F32", "each"), "channel": Part("weight_scale", "F32", "cut", 1, 0)}
