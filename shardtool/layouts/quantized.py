"""Tables of quantized models: a linear layer's row becomes the rows of its parts.

``find`` reads the scheme from config.json; ``applied`` puts a scheme into a family's table, layer by layer, from what
config.json says and what the checkpoint holds. It happens each time that a table is evaluated, so that the manifest
keeps the table of the plain model.

A part is cut by a rule of the same kind as the weight (``_CUT``, and ``_TURNED`` where rows are inputs). Where a part's
entry stands for several elements of the weight, these stay together: a split that would part them is refused, as
``create_weights`` of vLLM 0.32's schemes does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardtool.errors import PlanError, UnsupportedModel, UsageError
from shardtool.layouts import cache_scales, compressed, schemes, sizes, splits
from shardtool.layouts.base import Parallel
from shardtool.layouts.packed import MX_BACKENDS, REFINED
from shardtool.layouts.rules import Dims
from shardtool.layouts.schemes import REFUSES, Form, Held, Module, Part, Scheme
from shardtool.layouts.tables.language import TIE, Family, Row, holds, numbers
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
_KINDS = {"qkv": "QKVParallelLinear", "gate_up": "MergedColumnParallelLinear", "latent": "MergedColumnParallelLinear"}
_MX = {
    "swapped_gate_up": ("mx_gate_up", "mx_gate_up_scale"),
    "swapped_down": ("mx_down", "mx_down_scale"),
    "pairs_bias": ("mx_gate_up_bias", ""),
    "bias_once": ("mx_down_bias", ""),
}
_WHOLE = {
    "deepseek_v2": (".self_attn.kv_a_proj_with_mqa.weight",),
    "deepseek_v3": (".self_attn.kv_a_proj_with_mqa.weight",),
    "qwen3_moe": (".mlp.gate.weight",),
}
"""The linear layers that every rank holds whole, where they can be quantized."""
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
            if (
                _kind(row, self.family.name)
                and _kind(row, self.family.name) != "vocab"
                and holds(row.when, self.dims.config)
            ):
                for i in self._numbers(row):
                    yield row, _named(row, i), i

    def rows(self, row: Row) -> Iterator[Row]:
        """The rows in place of one."""
        if not holds(row.when, self.dims.config):
            return
        kind = _kind(row, self.family.name)
        if kind:
            yield from self._linear(row, kind)
        elif ".routed_experts." in row.to:
            yield from self._experts(row)
        else:
            yield row
            if self.scheme.attention and row.to.endswith("._k_scale") and ".mla_attn." not in row.to:
                held = cache_scales.held(self.names, self.scheme.attention)
                yield from cache_scales.rows(row, self.scheme.attention, held, tuple(self._numbers(row)))

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
                wide = []
                for module, tensors in zip(modules, found, strict=True):
                    for part, tensor in zip(form.parts, tensors, strict=True):
                        name = filled(f"{module}.{part.name}", i)
                        if part is form.parts[0] and tensor is not None:
                            wide.append(splits.weight_size(name, part, tensor))
                        if tensor is not None:
                            splits.check_shape(name, part, tensor, wide[-1])
                target = filled(row.to, i)
                splits.check_size(target, row, kind, wide, self.dims)
                splits.check_split(target, form, kind, wide, self.dims, self.parallel.tp)

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
        name = f"{_module(row.of[0])}.{scale.name}"
        found = self._tensor(name, i)
        if found is not None:
            splits.check_shape(filled(name, i), scale, found, weight.shape[:2])
        if scale.how != "cut":
            return 1
        size, hidden = weight.shape[:2] if row.rule == "experts_gate_up" else weight.shape[1::-1]
        ranks = 1 if self.parallel.ep else self.parallel.tp
        return splits.finer(filled(row.to, i), scale, size, hidden, ranks, self.dims.config.get("moe_backend"))

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

    # What is left.

    def drops(self, rows: tuple[Row, ...]) -> dict[str, str]:
        """Sources that the engine does not take, and why."""
        held = {name for names in cache_scales.held(self.names, self.scheme.attention).values() for name in names}
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


def _kind(row: Row, family: str) -> str:
    """The rule by which a linear layer's weight is cut; empty for what is none."""
    if not row.to.endswith(".weight"):
        return ""
    if row.rule in _TURNED and row.rule not in ("copy", "vocab"):
        return row.rule
    if row.rule == "copy" and row.of[0].endswith(_WHOLE.get(family, ())):
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
    if kind == "vocab" and part.outputs > 1 and part.how == "cut":
        rule = "column"
    elif part.how == "each":
        rule = _EACH.get(kind, "one_scalar")
    elif part.how in ("last", "final"):
        rule = "copy" if part.how == "last" else "one_scalar"
    elif kind in splits.INWARD and not part.inputs:
        rule = "copy"
    return replace(row, rule=rule, to=to, of=of, instead=instead, size="", dtype=part.dtype)
