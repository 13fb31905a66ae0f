"""Tables of quantized models: a linear layer's row becomes the rows of its parts.

``find`` reads the scheme from config.json; ``applied`` puts a scheme into a family's table, layer by layer, from what
config.json says and what the checkpoint holds. It happens each time that a table is evaluated, so that the manifest
keeps the table of the plain model.

A part is cut by a rule of the same kind as the weight (``_CUT``, and ``_TURNED`` where rows are inputs). Where a part's
entry stands for several elements of the weight, these stay together: a split that would part them is refused, as
``create_weights`` of vLLM 0.32's schemes does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardtool.errors import PlanError, UnsupportedModel, UsageError
from shardtool.layouts import compressed, schemes, sizes
from shardtool.layouts.base import Parallel
from shardtool.layouts.packed import MX_BACKENDS, REFINED
from shardtool.layouts.rules import Dims
from shardtool.layouts.schemes import REFUSES, Form, Held, Module, Part, Scheme
from shardtool.layouts.tables.language import TIE, Family, Row, holds, numbers
from shardtool.layouts.vocabulary import RULES
from shardtool.mosaic import Logical
from shardtool.recipe import SLOT, filled

KEYS = ("quantization_config", "compression_config")
METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "fp8": schemes.fp8,
    "compressed-tensors": compressed.tensors,
    "gptq": schemes.gptq,
    "awq": schemes.awq,
    "mxfp4": schemes.mxfp4,
}
ENGINE_VERSION = "0.32"
FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "granite"}
    | {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"}
)
"""The families whose quantized models have been compared with the engine's."""

_CUT = {"qkv": "qkv_units", "latent": "stacked"}
_TURNED = {
    "by_head": "row",
    "column": "row",
    "copy": "copy",
    "from_heads": "column",
    "gate_up": "gate_up_across",
    "latent": "joined_across",
    "qkv": "qkv_across",
    "row": "column",
    "vocab": "row",
}
_EACH = {"qkv": "three_scalars", "gate_up": "two_scalars", "latent": "two_scalars"}
_INWARD = frozenset({"row", "from_heads"})
"""The rules that cut the inputs of a layer."""
_KINDS = {"qkv": "QKVParallelLinear", "gate_up": "MergedColumnParallelLinear", "latent": "MergedColumnParallelLinear"}
_MX = {
    "swapped_gate_up": ("mx_gate_up", "mx_gate_up_scale"),
    "swapped_down": ("mx_down", "mx_down_scale"),
    "pairs_bias": ("mx_gate_up_bias", ""),
    "bias_once": ("mx_down_bias", ""),
}
_CACHE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"\.kv_scale$", r".attn.k_scale"),
        (r"\.self_attn\.[kv]_proj\.([kv])_scale$", r".self_attn.attn.\1_scale"),
        (r"\.self_attn\.qk(?:qk)?v_proj\.([kv])_scale$", r".self_attn.attn.\1_scale"),
        (r"\.self_attn\.q\.scale$", r".self_attn.attn.q_scale"),
        (r"\.self_attn\.([kv])_cache\.scale$", r".self_attn.attn.\1_scale"),
        (r"(?<!\.attn)\.([qkv])_scale$", r".attn.\1_scale"),
        (r"(?<!\.attn)\.([qkv])_zero_point$", r".attn.\1_zero_point"),
    )
)
"""Checkpoints' names of the scales of keys and values -> the engine's (``get_cache_scale_mapper``)."""
_CACHE_FP8 = (
    *((re.compile(rf"\.{x}_proj\.output_scale$"), f".attn.{x}_scale") for x in "kvq"),
    (re.compile(r"\.self_attn\.prob_output_scale$"), ".self_attn.attn.prob_scale"),
)
_CACHE_ENDS = re.compile(r"\.attn\.([qkv]_(scale|zero_point)|prob_scale)$")
_LAST = "of a fused layer the engine keeps that of its last part"
_DROPS = {".g_idx": "the order of GPTQ's groups, which the engine does not use"}


@dataclass(frozen=True, slots=True)
class Quantized:
    """A family's table for one quantized model, and what config.json must say so that the engine sees it so."""

    family: Family
    amendments: Mapping[str, Any]


def find(config: Mapping[str, Any]) -> tuple[str, Scheme] | None:
    """The key in config.json that says how the model is quantized, and the scheme; None for one that is not.

    Raises ``UnsupportedModel`` for a scheme or a setting that is not known, and ``PlanError`` for one that the engine
    refuses.
    """
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and any(nested.get(key) for key in KEYS):
        raise UnsupportedModel("text_config has a quantization_config, which the built-in tables do not know")
    key = next((key for key in KEYS if config.get(key)), None)
    if key is None:
        return None
    said = config[key]
    method = str(said.get("quant_method", "")).lower() if isinstance(said, Mapping) else ""
    read = METHODS.get(method)
    if read is None:
        raise UnsupportedModel(
            f"config.json has a {key} of quant_method {method!r:.60}, which the built-in tables do not know; they know "
            f"{', '.join(METHODS)}"
        )
    return key, read(said)


def refuse(family: Family, scheme: Scheme, engine_version: str) -> None:
    """Refuse families and engines whose quantized models are not known. Raises ``UnsupportedModel``."""
    if numbers(engine_version) != numbers(ENGINE_VERSION):
        raise UnsupportedModel(
            f"the tables know quantized checkpoints for version {ENGINE_VERSION} of the engine only, not for "
            f"{engine_version}"
        )
    if family.name not in FAMILIES or (scheme.title == "mxfp4") != (family.name == "gpt_oss"):
        raise UnsupportedModel(f"the table of {family.name} does not know {scheme.title} checkpoints")


def applied(
    family: Family,
    found: tuple[str, Scheme],
    names: Mapping[str, Logical],
    dims: Dims,
    parallel: Parallel,
    *,
    targets: bool = False,
) -> Quantized:
    """The table with the rows of the quantized layers.

    ``names``: the checkpoint's tensors, or with ``targets`` those of a rank that the engine saved, whose sizes are not
    checked then. Raises ``PlanError`` for what the engine refuses, ``UnsupportedModel`` for what is not known.
    """
    key, scheme = found
    work = _Work(family, scheme, names, dims, parallel, targets)
    work = replace(work, scheme=scheme.seen(work.held()))
    rows = tuple(made for row in family.rows for made in work.rows(row))
    drops = {**family.drops, **_DROPS, **work.drops(rows)}
    amendments = {} if targets else work.amendments(key, scheme)
    return Quantized(replace(family, rows=rows, drops=drops), amendments)


@dataclass(frozen=True, slots=True)
class _Work:
    """One model's table."""

    family: Family
    scheme: Scheme
    names: Mapping[str, Logical]
    dims: Dims
    parallel: Parallel
    targets: bool

    def held(self) -> Held:
        """The modules of the checkpoint, told from its tensors' dtypes."""
        modules: set[str] = set()
        quantized: set[str] = set()
        for name, tensor in self.names.items():
            module = name.rpartition(".")[0]
            modules.add(module)
            if tensor.dtype.name not in ("F16", "BF16", "F32"):
                quantized.add(module)
        if self.targets:  # the engine's names; the parts of a fused module are what the module is
            for row, linear, i in self._linears():
                if filled(_module(row.to), i) in quantized:
                    quantized.update(linear.parts)
                modules.update(linear.parts)
        return Held(frozenset(modules), frozenset(quantized))

    def _numbers(self, row: Row) -> Iterable[int | None]:
        return sizes.layers(row.layers, self.dims.config) if SLOT in row.to else (None,)

    def _linears(self) -> Iterator[tuple[Row, Module, int | None]]:
        """Every linear layer that the model has."""
        for row in self.family.rows:
            if _kind(row) and _kind(row) != "vocab" and holds(row.when, self.dims.config):
                for i in self._numbers(row):
                    yield row, _named(row, i), i

    def rows(self, row: Row) -> Iterator[Row]:
        """The rows in place of one."""
        if not holds(row.when, self.dims.config):
            return
        kind = _kind(row)
        if kind:
            yield from self._linear(row, kind)
        elif ".routed_experts." in row.to:
            yield from self._experts(row)
        else:
            yield row
            if self.scheme.attention and row.to.endswith("._k_scale") and ".mla_attn." not in row.to:
                yield from self._attention(row)

    def _each(self, row: Row, forms: Mapping[int | None, Form | None]) -> Iterator[tuple[Row, Form | None]]:
        """The row for each form that its layers have."""
        groups: dict[Form | None, list[int | None]] = {}
        for i, form in forms.items():
            groups.setdefault(form, []).append(i)
        for form, some in groups.items():
            yield (row if len(groups) == 1 else replace(row, layers=",".join(map(str, some)))), form

    def _linear(self, row: Row, kind: str) -> Iterator[Row]:
        told = self.scheme.head if kind == "vocab" else self.scheme.linear
        for one, form in self._each(row, {i: told(_named(row, i)) for i in self._numbers(row)}):
            if form is None:
                yield one
                continue
            if kind == "vocab":
                self._check_head(one, form)
            if not self.targets:
                self._check(one, form, kind)
            yield from (_part(one, part, kind) for part in form.parts)

    def _check_head(self, row: Row, form: Form) -> None:
        if self.dims.config.get(TIE):
            raise UnsupportedModel("a quantized head that is tied to the embeddings is not one that the tables know")
        if self.dims.vocab % 64 and any(p.how == "turned" or p.outputs > 1 for p in form.parts):
            raise PlanError(
                f"tensor {row.to!r}: the quantized head has {self.dims.vocab} entries, which are not a multiple of 64; "
                f"{REFUSES}"
            )

    def _check(self, row: Row, form: Form, kind: str) -> None:
        """Refuse shapes that do not belong together, and splits that part what must stay together."""
        seen: set[tuple[tuple[int, ...], ...]] = set()
        for i in self._numbers(row):
            modules = self._modules(row, i)
            found = [[self._tensor(f"{module}.{part.name}", i) for part in form.parts] for module in modules]
            if any(tensor is None for tensors in found for tensor in tensors[:1]):
                continue  # the table says which are missing
            shapes = tuple(tuple(tensor.shape if tensor else ()) for tensors in found for tensor in tensors)
            if shapes not in seen:
                seen.add(shapes)
                wide = [_weight(form.parts[0], tensors[0]) for tensors in found if tensors[0]]
                for module, tensors, (outputs, inputs) in zip(modules, found, wide, strict=True):
                    for part, tensor in zip(form.parts, tensors, strict=True):
                        if tensor is not None:
                            _check_shape(filled(f"{module}.{part.name}", i), part, tensor, outputs, inputs)
                self._check_split(row, form, kind, i, wide)

    def _modules(self, row: Row, i: int | None) -> tuple[str, ...]:
        """The names of the modules from which a row's weight comes, as the checkpoint has them."""
        if row.instead and not any(self._has(_module(name), i) for name in row.of):
            return tuple(_module(name) for name in row.instead)
        return tuple(_module(name) for name in row.of)

    def _has(self, module: str, i: int | None) -> bool:
        return any(self._tensor(f"{module}.{name}", i) for name in ("weight", "qweight", "weight_packed"))

    def _tensor(self, name: str, i: int | None) -> Logical | None:
        for spelling in self.family.spellings(name):
            found = self.names.get(filled(spelling, i).replace("{e}", "0"))
            if found is not None:
                return found
        return None

    def _check_split(self, row: Row, form: Form, kind: str, i: int | None, wide: list[tuple[int, int]]) -> None:
        target, tp = filled(row.to, i), 1 if kind in ("latent", "copy") else self.parallel.tp
        if row.size:
            said, size = sizes.SIZES[row.size]
            want = size(self.dims)
            times = RULES[row.rule].parts if len(wide) == 1 else 1
            for outputs, inputs in wide:
                held = inputs if kind in _INWARD else outputs
                if held != (want if kind in _INWARD else want * times):
                    raise PlanError(
                        f"tensor {target!r}: its source has the size {held}, but {said} in config.json is {want}"
                    )
        if kind in _INWARD:
            self._check_inputs(target, form, wide[0][1], tp)
            return
        unit = math.lcm(*(part.outputs for part in form.parts if part.how in ("cut", "turned")))
        parts = self._outputs(kind, wide, tp)
        for n in parts if tp > 1 else parts[:-1]:
            if n % unit:
                raise PlanError(
                    f"tensor {target!r}: a rank of --tp {tp} gets {n:g} of its outputs, which are not whole blocks "
                    f"or packs of {unit}; use a tp where they are"
                )

    def _outputs(self, kind: str, wide: list[tuple[int, int]], tp: int) -> list[float]:
        """The outputs that each rank has of each part."""
        if kind == "qkv":
            q, kv = self.dims.heads * self.dims.head_dim, self.dims.head_dim * max(1, self.dims.kv_heads / tp)
            return [q / tp, kv, kv]
        if len(wide) == 1 and kind == "gate_up":
            return [wide[0][0] / 2 / tp] * 2
        if kind == "vocab":
            return [-(-outputs // 64) * 64 / tp for outputs, _ in wide]
        return [outputs / tp for outputs, _ in wide]

    def _check_inputs(self, target: str, form: Form, inputs: int, tp: int) -> None:
        unit = math.lcm(*(part.inputs for part in form.parts if part.how in ("cut", "turned") and part.inputs))
        if tp > 1 and inputs % (tp * unit):
            raise PlanError(
                f"tensor {target!r}: a rank of --tp {tp} gets {inputs / tp:g} of its {inputs} inputs, which are not "
                f"whole groups, blocks or packs of {unit}; use a tp where they are"
            )
        if tp > 1 and self.scheme.title == "awq" and any(part.inputs == 0 for part in form.parts):
            raise PlanError(f"tensor {target!r}: awq without groups cannot be split by --tp {tp}; {REFUSES}")

    # Experts.

    def _experts(self, row: Row) -> Iterator[Row]:
        prefix = row.to.partition(".routed_experts.")[0]
        forms = {i: self.scheme.experts(filled(prefix, i)) for i in self._numbers(row)}
        for one, form in self._each(row, forms):
            if form is None:
                yield one
            elif self.scheme.title == "mxfp4":
                yield from self._mx(one)
            elif one.rule in ("experts_gate_up", "experts_down"):
                yield from self._fp8_experts(one, form)
            elif one.to.rpartition(".")[2] in ("w13_weight", "w2_weight"):
                raise UnsupportedModel(f"quantized experts of {self.family.name} are not ones that the tables know")
            else:
                yield one

    def _mx(self, row: Row) -> Iterator[Row]:
        if row.rule not in _MX:
            yield row
            return
        backend = self.dims.config.get("moe_backend")
        if backend not in MX_BACKENDS and not self.targets:
            known = ", ".join(MX_BACKENDS)
            raise UsageError(
                f"the shapes of mxfp4 experts depend on the engine's kernel for them: say with --moe-backend which it "
                f"will be, one of {known}"
            )
        rule, scale = _MX[row.rule]
        (of,) = row.of
        if not scale:
            yield replace(row, rule=rule, size="", dtype="BF16")
            return
        yield replace(row, rule=rule, of=(of + "_blocks",), size="", dtype="U8")
        yield replace(row, rule=scale, to=row.to + "_scale", of=(of + "_scales",), size="", dtype="U8")

    def _fp8_experts(self, row: Row, form: Form) -> Iterator[Row]:
        up = row.rule == "experts_gate_up"
        factor = self._finer(row, form)
        for part in form.parts:
            of = tuple(f"{_module(name)}.{part.name}" for name in row.of)
            to = row.to.removesuffix("weight") + part.name
            if part.name == "weight":
                yield replace(row, of=of, instead=(), dtype=part.dtype)
            elif part.how == "cut":
                rule = row.rule if factor == 1 else f"{'gate_up' if up else 'down'}_refined_{factor}"
                yield Row(rule, to, of, row.when, layers=row.layers, stage=row.stage, dtype=part.dtype)
            elif part.name == "input_scale":
                yield Row("experts_scalar", to, of[-1:], row.when, layers=row.layers, stage=row.stage, dtype=part.dtype)
            else:
                rule = "experts_two_scalars" if up else "experts_scalar"
                yield Row(rule, to, of, row.when, layers=row.layers, stage=row.stage, dtype=part.dtype)

    def _finer(self, row: Row, form: Form) -> int:
        """How many times finer the engine makes blocks, so that they can be cut (``refine_fp8_moe_block_shape``)."""
        scale = form.parts[1]
        i = next(iter(self._numbers(row)))
        weight = self._tensor(row.of[0], i)
        if self.targets:
            return self._finer_held(row, i, scale)
        if weight is None or len(weight.shape) != 2:
            raise UnsupportedModel(
                f"the checkpoint has no tensor {filled(row.of[0], i)!r} for each expert; quantized experts in other "
                f"tensors are not ones that the tables know"
            )
        found = self._tensor(f"{_module(row.of[0])}.{scale.name}", i)
        outputs, inputs = weight.shape
        if found is not None:
            _check_shape(filled(f"{_module(row.of[0])}.{scale.name}", i), scale, found, outputs, inputs)
        if scale.how != "cut":
            return 1
        size, hidden = (outputs, inputs) if row.rule == "experts_gate_up" else (inputs, outputs)
        tp = 1 if self.parallel.ep else self.parallel.tp
        mine, target = size // tp, filled(row.to, i)
        if size % tp:
            raise PlanError(
                f"tensor {target!r}: the size of the experts {size} cannot be divided by --tp {tp}; {REFUSES}"
            )
        if mine % scale.outputs == 0 and (tp == 1 or mine % scale.inputs == 0):
            return 1
        fine = math.gcd(scale.outputs, scale.inputs, mine, hidden)
        said = (
            f"a rank of --tp {tp} gets {mine} of the {size} outputs of each expert, which are not whole blocks of "
            f"{scale.outputs}"
        )
        if self.dims.config.get("moe_backend") not in (None, "auto", "triton"):
            raise UnsupportedModel(f"tensor {target!r}: {said}; what other kernels than triton do then is not known")
        factor = scale.outputs // fine
        if fine < 32 or scale.outputs != scale.inputs or factor not in REFINED:
            raise PlanError(f"tensor {target!r}: {said}; {REFUSES}")
        return factor

    def _finer_held(self, row: Row, i: int | None, scale: Part) -> int:
        """The same, told from the shapes that a rank holds."""
        name = filled(row.to, i)
        weight, held = self.names.get(name), self.names.get(name.removesuffix("weight") + scale.name)
        if scale.how != "cut" or weight is None or held is None or len(weight.shape) != 3 or len(held.shape) != 3:
            return 1
        hidden, blocks = (
            (weight.shape[2], held.shape[2]) if row.rule == "experts_gate_up" else (weight.shape[1], held.shape[1])
        )
        return next((factor for factor in REFINED if blocks == -(-hidden // scale.outputs) * factor), 1)

    # Attention.

    def _attention(self, row: Row) -> Iterator[Row]:
        """The scales that the scheme gives to an attention layer: the checkpoint's, or a value for none."""
        at = row.to.removesuffix("_k_scale")
        if self.scheme.attention == "fp8":
            rows = [Row("minus_one", f"{at}{x}_scale") for x in ("k", "prob", "q", "v")]
            rule = "bare_scalar"
        else:
            rows = [Row("one", f"{at}{x}_scale", dtype="F32") for x in "kqv"]
            rows += [Row("zero", f"{at}{x}_zero_point") for x in "kqv"]
            rule = "one_scalar"
        held = self._cache()
        head = at.partition(SLOT)[0]
        for made in rows:
            made = replace(made, when=row.when, layers=row.layers, stage=row.stage)
            groups: dict[str, list[int | None]] = {}
            for i in self._numbers(row):
                sources = held.get(filled(made.to, i), [])
                if len(sources) > 1:
                    raise PlanError(
                        f"tensor {filled(made.to, i)!r}: the checkpoint holds it as {sources[0]!r} and {sources[1]!r}"
                    )
                of = sources[0] if sources else ""
                groups.setdefault(of.replace(f"{head}{i}.", f"{head}{SLOT}.", 1), []).append(i)
            for of, some in groups.items():
                one = replace(made, rule=rule, of=(of,)) if of else made
                yield one if len(groups) == 1 else replace(one, layers=",".join(map(str, some)))

    def _cache(self) -> dict[str, list[str]]:
        """Scales of keys and values: the engine's name -> the checkpoint's names."""
        found: dict[str, list[str]] = {}
        patterns = (*_CACHE_FP8, *_CACHE) if self.scheme.title == "fp8" else _CACHE
        for name in self.names:
            if name.endswith(("_scale", ".scale", "_zero_point")):
                to = name
                for pattern, new in patterns:
                    to = pattern.sub(new, to)
                if _CACHE_ENDS.search(to):
                    found.setdefault(to, []).append(name)
        return found

    # What is left.

    def drops(self, rows: tuple[Row, ...]) -> dict[str, str]:
        """Sources that the engine does not take, and why."""
        held = {name for names in self._cache().values() for name in names}
        found = dict.fromkeys(sorted(held), "a scale of the attention, which the engine's model does not have")
        names = {row.to.rpartition(".")[2] for row in rows}
        for name in ("weight_shape", "input_zero_point", "input_scale"):
            if any(name in ending for ending in names):
                found[f".{name}"] = _LAST
        return found

    def amendments(self, key: str, said: Scheme) -> dict[str, Any]:
        """The lists of modules, where the engine would tell them from the files' headers, in which names are fused."""
        config = self.dims.config[key]
        if said.title == "gptq" and isinstance(said, schemes.Gptq) and not said.modules:
            lists = self._lists()
            if said.lm_head and self.scheme.head(Module("lm_head", ("lm_head",))):
                lists.append(["lm_head"])
            return {key: {**config, "modules_in_block_to_quantize": lists}}
        if said.title == "awq" and isinstance(said, schemes.Awq) and not said.skipped:
            left = [name for _, module, _ in self._linears() if not self.scheme.linear(module) for name in module.parts]
            head = Module("lm_head", ("lm_head",))
            left += ["lm_head"] if not self.scheme.head(head) else []
            return {key: {**config, "modules_to_not_convert": left or ["model.embed_tokens"]}}
        return {}

    def _lists(self) -> list[list[str]]:
        """The quantized modules as GPTQ lists them: endings if these say it for all layers, else names."""
        endings: dict[tuple[str, ...], bool] = {}
        names: list[list[str]] = []
        for row, module, _ in self._linears():
            quantized = self.scheme.linear(module) is not None
            ending = tuple(_module(name).partition(f"{SLOT}.")[2] for name in row.of)
            endings[ending] = endings.get(ending, True) and quantized
            if quantized:
                names.append(list(module.parts))
        short = [list(ending) for ending, quantized in endings.items() if quantized and all(ending)]
        scheme = schemes.Gptq(4, -1, False, tuple(name for names in short for name in names))
        same = all((scheme.linear(m) is None) == (self.scheme.linear(m) is None) for _, m, _ in self._linears())
        return short if short and same else names


def _kind(row: Row) -> str:
    """The rule by which a linear layer's weight is cut; empty for what is none."""
    if not row.to.endswith(".weight"):
        return ""
    if row.rule in _TURNED and row.rule not in ("copy", "vocab"):
        return row.rule
    if row.rule == "copy" and row.to.endswith(".kv_a_proj_with_mqa.weight"):
        return "copy"
    return "vocab" if row.rule == "vocab" and row.to == "lm_head.weight" == row.of[0] else ""


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _named(row: Row, i: int | None) -> Module:
    """A row's module as the engine names it while it builds the model."""
    parts = tuple(filled(_module(name), i) for name in row.of)
    if len(parts) == 1:
        return Module(parts[0], parts, _KINDS.get(row.rule, "Linear"))
    last = _module(row.to).rpartition(".")[2]
    return Module(f"{parts[0].rpartition('.')[0]}.{last}", parts, _KINDS.get(row.rule, "Linear"))


def _part(row: Row, part: Part, kind: str) -> Row:
    """The row of one part of a quantized layer."""
    to = f"{_module(row.to)}.{part.name}"
    of, instead = (tuple(f"{_module(name)}.{part.name}" for name in names) for names in (row.of, row.instead))
    if part.name == "weight":
        return replace(row, dtype=part.dtype)
    if part.how in ("last", "final"):
        of, instead = of[-1:], instead[-1:]
    rule = _TURNED[kind] if part.how == "turned" else _CUT.get(kind, kind)
    if part.how == "each":
        rule = _EACH.get(kind, "one_scalar")
    elif part.how in ("last", "final"):
        rule = "copy" if part.how == "last" else "one_scalar"
    elif kind in _INWARD and not part.inputs:
        rule = "copy"
    return replace(row, rule=rule, to=to, of=of, instead=instead, size="", dtype=part.dtype)


def _weight(part: Part, tensor: Logical) -> tuple[int, int]:
    """The outputs and inputs of the weight that a tensor of packed or small numbers stands for."""
    if len(tensor.shape) != 2:
        raise PlanError(f"a tensor {part.name!r} has the shape {list(tensor.shape)}, not rows and columns")
    outputs, inputs = tensor.shape[::-1] if part.how == "turned" else tensor.shape
    return outputs * part.outputs, inputs * part.inputs


def _check_shape(name: str, part: Part, tensor: Logical, outputs: int, inputs: int) -> None:
    """Refuse a part of another shape than its weight has."""
    if part.how == "last":
        return
    if part.how in ("each", "final"):
        if math.prod(tensor.shape) != 1:
            raise PlanError(f"tensor {name!r} has the shape {list(tensor.shape)}, which is not one number")
        return
    want = (-(-outputs // part.outputs), -(-inputs // part.inputs) if part.inputs else 1)
    want = want[::-1] if part.how == "turned" else want
    if tensor.shape != want:
        raise PlanError(
            f"tensor {name!r} has the shape {list(tensor.shape)}, but a weight of {outputs} outputs and {inputs} "
            f"inputs has {list(want)} with the quantization settings in config.json"
        )
