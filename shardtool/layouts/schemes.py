"""Quantization schemes: what config.json says of a layer's numbers, as the engine reads it.

A ``Scheme`` tells for each module whether it is quantized, and of which parts its weight is made then. Here are fp8,
GPTQ, AWQ and mxfp4; ``compressed`` has compressed-tensors. Sources: vLLM 0.32
``model_executor/layers/quantization/{fp8,auto_gptq,auto_awq,mxfp4}.py`` and ``utils/{quant_utils,gptq_utils}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from shardtool.errors import PlanError, UnsupportedModel

REFUSES = "the engine refuses it too"
_NESTED = re.compile(r"[*+}]\)[*+{]")
_MOST = 300
"""Characters of a pattern in config.json."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a quantized layer. ``dtype`` is that of ``Row``.

    ``how``: ``cut`` as the weight is (rows are outputs), ``turned`` (rows are inputs), ``each`` (a number for each of
    the fused parts), ``last`` or ``final`` (that of the last fused part alone: the tensor, or a number). ``outputs``
    and ``inputs``: how many of the weight's an entry stands for; 0 for all.
    """

    name: str
    dtype: str
    how: str = "cut"
    outputs: int = 1
    inputs: int = 1


@dataclass(frozen=True, slots=True)
class Form:
    """What a layer's weight is stored as: its parts, the packed or small numbers first."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Module:
    """A module as the engine names it before fusing. ``parts``: the modules that it is fused from, or itself.

    ``kind``: the name of the engine's class, which targets may name.
    """

    name: str
    parts: tuple[str, ...]
    kind: str = "Linear"

    @property
    def fused(self) -> bool:
        """Whether it is fused from others."""
        return len(self.parts) > 1


@dataclass(frozen=True, slots=True)
class Held:
    """The modules that a checkpoint has, and those of them with numbers that are no floats."""

    modules: frozenset[str]
    quantized: frozenset[str]


class Scheme(Protocol):
    """How a model is quantized."""

    @property
    def title(self) -> str:
        """How people name it."""

    @property
    def attention(self) -> str:
        """The scales that attention layers have: ``""``, ``fp8`` or ``tensors``."""

    def seen(self, held: Held) -> Scheme:
        """The scheme with what the engine concludes from the checkpoint itself."""

    def linear(self, module: Module) -> Form | None:
        """What a linear layer is stored as; None for one that is not quantized."""

    def head(self, module: Module) -> Form | None:
        """The same of the model's head."""

    def experts(self, prefix: str) -> Form | None:
        """The same of the experts of a layer."""


def unknown(title: str, what: str) -> UnsupportedModel:
    """The error that the built-in tables do not know a setting."""
    return UnsupportedModel(f"the {title} settings in config.json say {what}, which the built-in tables do not know")


def texts(said: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of texts, or nothing."""
    value = said.get(key) or ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
        raise UnsupportedModel(
            f"the quantization settings in config.json say {key} {value!r:.100}, which is no list of names"
        )
    return tuple(value)


def _count(title: str, said: Mapping[str, Any], *keys: str, least: int = 1) -> int:
    for key in keys:
        if key in said:
            value = said[key]
            if type(value) is int and (value >= least or value == -1):
                return value
            raise unknown(title, f"{key} {value!r:.60}")
    raise PlanError(f"the {title} settings in config.json do not say {keys[0]}; {REFUSES}")


def matches(pattern: str, name: str) -> bool:
    """A regular expression of config.json, from the beginning of a name."""
    if len(pattern) > _MOST or _NESTED.search(pattern):
        raise UnsupportedModel(
            f"the quantization settings in config.json have the pattern {pattern!r:.100}, which is too involved"
        )
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise UnsupportedModel(
            f"the quantization settings in config.json have the pattern {pattern!r:.100}: {error}"
        ) from None


def all_or_none(module: Module, found: Sequence[bool]) -> bool:
    """Whether all of a fused module's parts are so. Raises ``PlanError`` where only some are."""
    if any(found) and not all(found):
        raise PlanError(
            f"some but not all of the parts of {module.name!r} are quantized, which are one tensor; {REFUSES}"
        )
    return all(found)


def _skipped(module: Module, names: Iterable[str], *, inside: bool) -> bool:
    """``is_layer_skipped``: whether names hit a module, exactly or as a part of its name."""
    names = tuple(names)

    def hit(name: str) -> bool:
        return any(x in name for x in names) if inside else name in names

    return (module.fused and hit(module.name)) or all_or_none(module, [hit(part) for part in module.parts])


def _experts_skipped(prefix: str, names: Iterable[str]) -> bool:
    return any("experts" in name and prefix in name for name in names)


FP8_WEIGHT = Part("weight", "F8_E4M3")


@dataclass(frozen=True, slots=True)
class Fp8:
    """``Fp8Config``: a scale for each matrix, or for each of its blocks."""

    static: bool
    block: tuple[int, int] | None
    ignored: tuple[str, ...]
    title: str = "fp8"
    attention: str = "fp8"

    def seen(self, _held: Held) -> Fp8:
        """Nothing depends on the checkpoint."""
        return self

    def linear(self, module: Module) -> Form | None:
        """All linear layers that are not ignored."""
        return None if _skipped(module, self.ignored, inside=False) else self._form()

    def head(self, _module: Module) -> None:
        """Never."""

    def experts(self, prefix: str) -> Form | None:
        """All that are not ignored."""
        return None if _experts_skipped(prefix, self.ignored) else self._form()

    def _form(self) -> Form:
        if self.block:
            return Form((FP8_WEIGHT, Part("weight_scale_inv", "F32", "cut", *self.block)))
        scales = ("weight_scale", "input_scale") if self.static else ("weight_scale",)
        return Form((FP8_WEIGHT, *(Part(name, "F32", "each") for name in scales)))


def fp8(said: Mapping[str, Any]) -> Fp8:
    """fp8 settings. Raises ``PlanError`` and ``UnsupportedModel``, as all of these do."""
    title = "fp8"
    activation, block = said.get("activation_scheme"), said.get("weight_block_size")
    if activation not in ("static", "dynamic"):
        raise PlanError(f"the fp8 settings in config.json say activation_scheme {activation!r:.60}; {REFUSES}")
    if said.get("store_dtype") is not None or said.get("fmt", "e4m3") != "e4m3":
        raise unknown(title, "store_dtype or fmt")
    if block is not None:
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise unknown(title, f"weight_block_size {block!r:.60}")
        if activation == "static":
            raise PlanError(f"the fp8 settings in config.json say weight_block_size with static activations; {REFUSES}")
    ignored = texts(said, "ignored_layers") or texts(said, "modules_to_not_convert")
    return Fp8(activation == "static", tuple(block) if block else None, ignored)


@dataclass(frozen=True, slots=True)
class Gptq:
    """``AutoGPTQConfig``: 4 or 8 bits, packed along the inputs. ``modules``: parts of the names of quantized ones."""

    bits: int
    group: int
    lm_head: bool
    modules: tuple[str, ...]
    dynamic: tuple[tuple[str, Any], ...] = ()
    title: str = "gptq"
    attention: str = ""

    def seen(self, held: Held) -> Gptq:
        """Without a list, the engine takes the modules whose numbers are no floats."""
        return self if self.modules else replace(self, modules=tuple(sorted(held.quantized)))

    def linear(self, module: Module) -> Form | None:
        """Those in the list, unless a rule takes them out."""
        found = [not self.modules or any(x in part for x in self.modules) for part in module.parts]
        rule = self._rule(module.name)
        if rule is False or not all_or_none(module, found):
            return None
        changes = rule if isinstance(rule, Mapping) else {}
        bits, group = changes.get("bits", self.bits), changes.get("group_size", self.group)
        _check_gptq(bits, group, changes.get("desc_act", False), changes.get("sym", True))
        pack, along = 32 // bits, 0 if group == -1 else group
        return Form(
            (
                Part("qweight", "I32", "turned", 1, pack),
                Part("qzeros", "I32", "turned", pack, along),
                Part("scales", "", "turned", 1, along),
            )
        )

    def head(self, module: Module) -> Form | None:
        """If ``lm_head`` says so."""
        return self.linear(module) if self.lm_head else None

    def experts(self, prefix: str) -> None:
        """Not known, unless a rule takes them out."""
        if self._rule(prefix) is not False:
            raise unknown(self.title, "quantized experts")

    def _rule(self, name: str) -> object:
        """The first dynamic rule for a module: False to leave it as it is, changes, or None."""
        for pattern, changes in self.dynamic:
            if pattern.startswith("-:"):
                if matches(pattern[2:], name):
                    return False
            elif matches(pattern.removeprefix("+:"), name):
                return changes
        return None


def _check_gptq(bits: object, group: object, desc_act: object, sym: object) -> None:
    if desc_act and group != -1:
        raise PlanError(f"the gptq settings in config.json say desc_act with groups of {group!r:.40}; {REFUSES}")
    if bits not in (4, 8) or sym is not True:
        raise PlanError(f"the gptq settings in config.json say bits {bits!r:.40} and sym {sym!r:.40}; {REFUSES}")
    if type(group) is not int or (group != -1 and group < 1):
        raise unknown("gptq", f"group_size {group!r:.40}")


def gptq(said: Mapping[str, Any]) -> Gptq:
    """GPTQ settings."""
    dynamic = said.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(isinstance(x, str) for x in dynamic):
        raise unknown("gptq", f"dynamic {dynamic!r:.60}")
    if said.get("checkpoint_format", "gptq") not in ("gptq", ""):
        raise unknown("gptq", f"checkpoint_format {said['checkpoint_format']!r:.40}")
    lists = said.get("modules_in_block_to_quantize") or []
    if not isinstance(lists, list):
        raise unknown("gptq", f"modules_in_block_to_quantize {lists!r:.60}")
    flat = [name for item in lists for name in (item if isinstance(item, list) else [item])]
    if not all(isinstance(name, str) for name in flat):
        raise unknown("gptq", "modules_in_block_to_quantize, which is no list of names")
    bits, group = _count("gptq", said, "bits"), _count("gptq", said, "group_size")
    _check_gptq(bits, group, said.get("desc_act"), said.get("sym"))
    return Gptq(bits, group, bool(said.get("lm_head")), tuple(flat), tuple(dynamic.items()))


@dataclass(frozen=True, slots=True)
class Awq:
    """``AutoAWQConfig``: 4 bits, packed along the outputs. ``skipped``: parts of the names of modules left out."""

    group: int
    lm_head: bool
    skipped: tuple[str, ...]
    title: str = "awq"
    attention: str = ""

    def seen(self, held: Held) -> Awq:
        """Without a list, the engine leaves out the modules all of whose numbers are floats."""
        return self if self.skipped else replace(self, skipped=tuple(sorted(held.modules - held.quantized)))

    def linear(self, module: Module) -> Form | None:
        """All that are not left out."""
        if _skipped(module, self.skipped, inside=True):
            return None
        along = 0 if self.group == -1 else self.group
        return Form(
            (
                Part("qweight", "I32", "turned", 8, 1),
                Part("qzeros", "I32", "turned", 8, along),
                Part("scales", "", "turned", 1, along),
            )
        )

    def head(self, module: Module) -> Form | None:
        """If ``lm_head`` says so."""
        return self.linear(module) if self.lm_head else None

    def experts(self, prefix: str) -> None:
        """Not known, unless they are left out."""
        if not any(name in prefix for name in self.skipped):
            raise unknown(self.title, "quantized experts")


def awq(said: Mapping[str, Any]) -> Awq:
    """AWQ settings."""
    if _count("awq", said, "w_bit", "bits") != 4:
        raise PlanError(f"the awq settings in config.json say other than 4 bits; {REFUSES}")
    if str(said.get("version", "gemm")).lower() != "gemm" or not said.get("zero_point"):
        raise unknown("awq", f"version {said.get('version')!r:.40} and zero_point {said.get('zero_point')!r:.40}")
    group = _count("awq", said, "q_group_size", "group_size")
    return Awq(group, bool(said.get("lm_head")), texts(said, "modules_to_not_convert"))


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """``GptOssMxfp4Config``: the experts alone."""

    title: str = "mxfp4"
    attention: str = ""

    def seen(self, _held: Held) -> Mxfp4:
        """Nothing depends on the checkpoint."""
        return self

    def linear(self, _module: Module) -> None:
        """Never."""

    def head(self, _module: Module) -> None:
        """Never."""

    def experts(self, _prefix: str) -> Form:
        """Always."""
        return Form((Part("blocks", "U8"), Part("scales", "U8")))


def mxfp4(_said: Mapping[str, Any]) -> Mxfp4:
    """mxfp4 settings; which modules are left out follows from the model."""
    return Mxfp4()
