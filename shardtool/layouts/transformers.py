"""The layout of transformers: each rank's slice under the model's own ``tp_plan``, under the module's names.

A plan is data: patterns of modules or parameters, and the style of each. ``ops/tp_plan.py`` reads it from the installed
transformers once, with what the model's tensors are made of; both are kept in the manifest, so that nothing here needs
transformers. Source: transformers 5.19 to 5.23 ``distributed/tensor_parallel.py`` (styles), ``sharding_utils.py`` (how
a source is cut), ``parallel_utils.py`` (whose style a parameter has), ``core_model_loading.py`` (what is joined).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shardtool.dtypes import DType, castable
from shardtool.errors import FormatError, PlanError, UnsupportedModel, UnsupportedTransform, UsageError
from shardtool.layouts import blocks
from shardtool.layouts.base import Model, Outline, Parallel
from shardtool.layouts.blocks import Blocks, Shape
from shardtool.recipe import EXPERT, SLOT, Recipe, Rule, Share, filled

ENGINE = "transformers"
KIND = "tp_plan"
TIE = "tie_word_embeddings"
MOST = 1 << 20
"""Layers, experts or parts that a record may speak of at most."""

Step = tuple[str, *tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of the module, or one per layer where ``to`` has the slot ``{i}``.

    ``of``: the checkpoint's tensors, with ``{e}`` for an expert's number. ``steps``: what is done to them, one after
    the other: ``("stack", count)`` each over its experts, ``("join", dim)`` all of them, ``("part", dim, k, n)`` the
    k-th of n equal parts, ``("turn", a, b)`` two dimensions exchanged. ``dtype``: empty is the model's, ``F32`` always
    float32, ``half`` float32 where the model is float16, ``same`` the source's own.
    """

    to: str
    of: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    index: tuple[int, ...] = ()
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a style divides a parameter: along which dimension (None: not at all), and of how many parts it is packed.

    ``even``: whether it must divide.
    """

    dim: int | None
    parts: int = 1
    even: bool = False


def _column(dims: int, _leaf: str) -> Cut:
    return Cut(max(0, dims - 2))


def _row(dims: int, leaf: str) -> Cut:
    return Cut(None if leaf == "bias" else dims - 1)


def _whole(_dims: int, _leaf: str) -> Cut:
    return Cut(None)


def _packed_column(dims: int, _leaf: str) -> Cut:
    return Cut(0) if dims == 1 else Cut(dims - 2, 2)


def _packed_row(dims: int, _leaf: str) -> Cut:
    return Cut(None) if dims == 1 else Cut(dims - 1, 2)


STYLES: dict[str, Callable[[int, str], Cut]] = {
    "all_reduce": _whole,
    "colwise": _column,
    "colwise_gather_output": _column,
    "colwise_rep": _column,
    "embedding_colwise": lambda _dims, _leaf: Cut(1),
    "embedding_rowwise": lambda _dims, _leaf: Cut(0),
    "local_params": _whole,
    "mla_kv_a_proj": _whole,
    "moe_identity_expert": _whole,
    "moe_tp_experts": _whole,
    "packed_colwise": _packed_column,
    "packed_rowwise": _packed_row,
    "replicate": _whole,
    "replicated_with_grad_allreduce": _whole,
    "rowwise": _row,
    "rowwise_rep": _row,
    "rowwise_split_input": _row,
    "sequence_parallel": _whole,
}
"""Style -> (number of dimensions, last part of the parameter's name) -> cut."""

_NUMBER = re.compile(r"\.\d+(\.|$)")
_HEADS = re.compile(r"(^|\.)self_attn\.[qkv]_proj\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class TransformersLayout:
    """The layout of one model.

    ``plan``: pattern -> style. ``tied``: parameter -> the one that it shares its memory with. ``unused``: source tensor
    -> why no parameter takes it. ``head_dim``: rows of one attention head, 0 where there are none. ``even``: the styles
    with which this version of transformers refuses what does not divide.
    """

    architecture: str
    engine_version: str
    plan: Mapping[str, str]
    rows: tuple[Row, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    head_dim: int = 0
    even: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        """The engine."""
        return ENGINE

    @property
    def title(self) -> str:
        """How people name it."""
        return f"the tp_plan of {self.architecture} in transformers {self.engine_version}"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes in which transformers can hold a model."""
        return ("BF16", "F16", "F32")

    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {
            "engine": ENGINE,
            "engine_version": self.engine_version,
            "kind": KIND,
            "architecture": self.architecture,
            "plan": dict(self.plan),
            "head_dim": self.head_dim,
            "even": list(self.even),
            "tied": dict(self.tied),
            "unused": dict(self.unused),
            "rows": [_row_record(row) for row in self.rows],
        }

    def outline(self, model: Model, parallel: Parallel) -> Outline:
        """The recipe of every rank.

        Raises ``PlanError`` for what transformers would refuse or could not run, and ``UnsupportedModel`` for a model
        without a plan or with a style that is not known here.
        """
        if parallel.pp > 1 or parallel.ep:
            raise UsageError(
                f"--layout transformers is tensor parallel only, without {'--pp' if parallel.pp > 1 else 'experts'}"
                f"{'' if parallel.pp > 1 else ' of their own (--expert-parallel)'}"
            )
        if parallel.tp > 1 and not self.plan:
            raise UnsupportedModel(
                f"{self.architecture} has no tp_plan in transformers {self.engine_version}, so that it cannot be "
                f"divided into {parallel.tp} ranks; use --tp 1 or another layout"
            )
        copies, skipped, amendments = self._ties(model)
        rules = [rule for row in self.rows for rule in self._rules(row, model, parallel.tp, skipped)]
        self._all_placed(model, copies)
        rules.sort(key=lambda rule: (rule.name, rule.index))
        unused = {name: why for name, why in self.unused.items() if name in model.tensors}
        return Outline(Recipe(tuple(rules)), unused, copies, amendments)

    def _ties(self, model: Model) -> tuple[dict[str, str], set[str], dict[str, Any]]:
        """Sources that equal another, the parameters that need no tensor because of it, and what config.json must say.

        Where a checkpoint has both of a tied pair and they differ, transformers does not tie them.
        """
        made = {row.to: row for row in self.rows if not row.index}
        copies: dict[str, str] = {}
        skipped: set[str] = set()
        amendments: dict[str, Any] = {}
        for target, source in self.tied.items():
            a, b = made.get(target), made.get(source)
            if a is None or b is None or a.steps or b.steps:
                continue
            if model.equal(a.of[0], b.of[0]):
                copies[a.of[0]] = b.of[0]
                skipped.add(target)
            else:
                amendments[TIE] = False
        return copies, skipped, amendments

    def _all_placed(self, model: Model, copies: Mapping[str, str]) -> None:
        known = {*self.unused, *copies}
        for row in self.rows:
            for i in row.index or (None,):
                known.update(name for of in row.of for name in _experts(filled(of, i), row))
        if strange := sorted(set(model.tensors) - known):
            raise PlanError(
                f"{len(strange)} source tensors have no place in {self.architecture}, first {strange[0]!r}; check "
                "config.json and the index, or remove them from the checkpoint"
            )

    def _rules(self, row: Row, model: Model, tp: int, skipped: set[str]) -> Iterator[Rule]:
        """One rule for each kind of layer: those whose sources have the same shapes."""
        if row.to in skipped:
            return
        kinds: dict[tuple[DType, tuple[Shape, ...]], list[int]] = {}
        for i in row.index or (-1,):
            shapes, dtype = [], model.dtype
            for of in row.of:
                shape, own = self._shape(of, None if i < 0 else i, row, model)
                shapes.append(shape)
                dtype = _dtype(row.dtype, model.dtype, own)
            kinds.setdefault((dtype, tuple(shapes)), []).append(i)
        for (dtype, shapes_of), index in kinds.items():
            name = row.to if index[0] < 0 else filled(row.to, index[0])
            try:
                made = assembled(row, shapes_of)
            except PlanError as error:
                raise PlanError(f"tensor {name!r}: {error}") from None
            yield Rule(row.to, dtype, self._shares(name, row.to, made, tp), () if index[0] < 0 else tuple(index))

    def _shape(self, of: str, number: int | None, row: Row, model: Model) -> tuple[Shape, DType]:
        """The shape and dtype of a source, which all experts share."""
        found: set[tuple[Shape, DType]] = set()
        for name in _experts(filled(of, number), row):
            tensor = model.tensors.get(name)
            if tensor is None:
                raise PlanError(
                    f"the checkpoint has no tensor {name!r}, of which {self.architecture} makes "
                    f"{filled(row.to, number)!r}"
                )
            if not castable(tensor.dtype, _dtype(row.dtype, model.dtype, tensor.dtype)):
                raise UnsupportedTransform(
                    f"tensor {name!r} is {tensor.dtype.name}, which cannot be cast to {model.dtype.name}"
                )
            found.add((tensor.shape, tensor.dtype))
        if len({shape for shape, _ in found}) != 1:
            raise PlanError(f"the experts of {filled(of, number)!r} have different shapes, so they cannot be stacked")
        return next(iter(found))

    def _shares(self, name: str, to: str, made: Blocks, tp: int) -> tuple[Share, ...]:
        cut = Cut(None) if tp == 1 else self._cut(to, len(made.shape))
        if cut.dim is None:
            return (Share(tuple(range(tp)), made.shape, blocks.pieces(made)),)
        self._heads_whole(name, made.shape, cut, tp)
        shares = []
        for rank in range(tp):
            one = part(name, made, cut, tp, rank)
            shares.append(Share((rank,), one.shape, blocks.pieces(one)))
        return tuple(shares)

    def _cut(self, to: str, dims: int) -> Cut:
        """The cut of a parameter: its own style or its module's."""
        generic = _NUMBER.sub(lambda m: ".*" + m.group(1), to.replace(SLOT, "*"))
        owner, _, leaf = generic.rpartition(".")
        style = self.plan.get(generic, self.plan.get(owner) if owner else None)
        if style is None:
            return Cut(None)
        if style not in STYLES:
            raise UnsupportedModel(
                f"the tp_plan of {self.architecture} says {style!r} for {generic}, a style that shardtool does not know"
            )
        found = STYLES[style](dims, leaf)
        if found.dim is not None and not 0 <= found.dim < dims:
            raise PlanError(f"tensor {to!r} has {dims} dimensions, which the style {style!r} cannot cut")
        return replace(found, even=style in self.even)

    def _heads_whole(self, name: str, shape: Shape, cut: Cut, tp: int) -> None:
        """Refuse slices that end within an attention head: such a model loads, and its first step fails."""
        if not self.head_dim or not _HEADS.search(name) or cut.dim != 0 or shape[0] % self.head_dim:
            return
        heads = shape[0] // self.head_dim
        if heads % tp:
            raise PlanError(
                f"tensor {name!r} has {heads} heads of {self.head_dim} rows, which --tp {tp} does not divide; "
                "transformers cannot run it either, use a tp that divides them"
            )


def assembled(row: Row, shapes: Sequence[Shape]) -> Blocks:
    """The whole tensor of a row from sources of these shapes. Raises ``PlanError`` where they do not fit."""
    held = [blocks.whole(of, shape) for of, shape in zip(row.of, shapes, strict=True)]
    for step in row.steps:
        match step:
            case ("stack", count):
                held = [blocks.stack(one, count) for one in held]
            case ("join", dim):
                held = [blocks.join(held, dim)]
            case ("turn", a, b):
                held = [blocks.turn(one, a, b) for one in held]
            case ("part", dim, k, n):
                held = [_part_of(one, dim, k, n) for one in held]
    (made,) = held
    return made


def _part_of(one: Blocks, dim: int, k: int, n: int) -> Blocks:
    if not 0 <= dim < len(one.shape) or one.shape[dim] % n:
        raise PlanError(f"its source has the shape {list(one.shape)}, of which dimension {dim} is not {n} equal parts")
    size = one.shape[dim] // n
    return blocks.narrow(one, dim, k * size, size)


def part(name: str, made: Blocks, cut: Cut, tp: int, rank: int) -> Blocks:
    """A rank's slice: equal but for the last ones, which are shorter or empty; of a packed tensor, of each part.

    Raises ``PlanError`` for a packed tensor that does not divide, and where transformers would refuse it.
    """
    assert cut.dim is not None
    size = made.shape[cut.dim]
    if (cut.even or cut.parts > 1) and size % (cut.parts * tp):
        parts = f" are {cut.parts} parts, and --tp {tp} does not divide each" if cut.parts > 1 else ""
        raise PlanError(
            f"tensor {name!r}: its {size} rows or columns{parts or f' are not divided by --tp {tp}'}; transformers "
            "refuses it too, use a tp that divides them"
        )
    width = size // cut.parts
    length = -(-width // tp)
    start = min(width, rank * length)
    mine = min(width, start + length) - start
    slices = [blocks.narrow(made, cut.dim, p * width + start, mine) for p in range(cut.parts)]
    return blocks.join(slices, cut.dim)


def _experts(name: str, row: Row) -> tuple[str, ...]:
    """The name of each expert's tensor, or the one name."""
    if EXPERT not in name:
        return (name,)
    count = next(numbers[0] for step, *numbers in row.steps if step == "stack")
    return tuple(name.replace(EXPERT, str(e)) for e in range(count))


def _dtype(said: str, model: DType, own: DType) -> DType:
    """The dtype of a target whose row says this."""
    if said == "same":
        return own
    if said == "F32" or (said == "half" and model is DType.F16):
        return DType.F32
    return model


# What the manifest keeps, and how it is read again. It is untrusted.


def _row_record(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {"to": row.to, "of": list(row.of)}
    if row.steps:
        record["steps"] = [list(step) for step in row.steps]
    if row.index:
        record["index"] = _spans(row.index)
    if row.dtype:
        record["dtype"] = row.dtype
    return record


def _spans(numbers: Sequence[int]) -> str:
    """``0-3,7``: ascending numbers as a text."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def from_record(record: Mapping[str, Any], where: str) -> TransformersLayout:
    """The layout that a manifest kept. Raises ``FormatError``."""
    try:
        if record["engine"] != ENGINE or record["kind"] != KIND:
            raise ValueError("another layout")
        head_dim = record["head_dim"]
        if type(head_dim) is not int or not 0 <= head_dim <= MOST:
            raise ValueError("head_dim")
        return TransformersLayout(
            _text(record["architecture"]),
            _text(record["engine_version"]),
            _texts(record["plan"]),
            tuple(_row_of(row) for row in record["rows"]),
            _texts(record["tied"]),
            _texts(record["unused"]),
            head_dim,
            tuple(_text(style) for style in record["even"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{where}: the layout of kind {KIND!r} is not as this version of shardtool writes it ({str(error)[:80]})"
        ) from None


_SIZES = {"stack": 1, "join": 1, "turn": 2, "part": 3}
"""Step -> how many numbers it takes."""


def _row_of(record: Any) -> Row:
    of = tuple(_text(name) for name in record["of"])
    steps = []
    for step in record.get("steps", []):
        name, *numbers = step
        if _SIZES[name] != len(numbers) or any(type(n) is not int or not 0 <= n <= MOST for n in numbers):
            raise ValueError(f"step {step!r:.60}")
        if name == "part" and not numbers[1] < numbers[2]:
            raise ValueError(f"step {step!r:.60}")
        steps.append((name, *numbers))
    index = _numbers(_text(record["index"])) if "index" in record else ()
    row = Row(_text(record["to"]), of, tuple(steps), index, _text(record.get("dtype", "")))
    names = [step[0] for step in steps]
    if not of or row.dtype not in ("", "F32", "half", "same"):
        raise ValueError(f"row {row.to!r:.60}")
    if (SLOT in row.to) != bool(index) or names.count("stack") != any(EXPERT in name for name in of):
        raise ValueError(f"row {row.to!r:.60}")
    if len(of) > 1 and "join" not in names:
        raise ValueError(f"row {row.to!r:.60}")
    return row


def _numbers(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for span in text.split(","):
        first, _, last = span.partition("-")
        a, b = int(first), int(last or first)
        if not (found[-1] if found else -1) < a <= b <= MOST:
            raise ValueError(f"numbers {text!r:.60}")
        found.extend(range(a, b + 1))
    return tuple(found)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is not a text")
    return value


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.60} is not a table")
    return {_text(key): _text(said) for key, said in value.items()}
