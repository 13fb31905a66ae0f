"""What must hold so that a quantized layer can be cut: its parts belong together, and splits part no number.

Source: vLLM 0.32 ``create_weights`` of each scheme, ``validate_fp8_block_shape`` and
``verify_group_size_divides_partition``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardtool.errors import PlanError
from shardtool.layouts import sizes
from shardtool.layouts.rules import PAD, Dims
from shardtool.layouts.schemes import REFUSES, Form, Part
from shardtool.layouts.tables.language import Row
from shardtool.layouts.vocabulary import RULES
from shardtool.mosaic import Logical

INWARD = frozenset({"row", "from_heads"})
"""The rules that cut the inputs of a layer."""
Size = tuple[int, int]
"""The outputs and the inputs of a weight."""


def weight_size(name: str, part: Part, tensor: Logical) -> Size:
    """The outputs and inputs of the weight that a tensor of packed or small numbers stands for."""
    if len(tensor.shape) != 2:
        raise PlanError(f"tensor {name!r} has the shape {list(tensor.shape)}, not rows and columns")
    outputs, inputs = tensor.shape[::-1] if part.how == "turned" else tensor.shape
    return outputs * part.outputs, inputs * part.inputs


def check_shape(name: str, part: Part, tensor: Logical, size: Size) -> None:
    """Refuse a part of another shape than its weight has."""
    if part.how == "last":
        return
    if part.how in ("each", "final"):
        if math.prod(tensor.shape) != 1:
            raise PlanError(f"tensor {name!r} has the shape {list(tensor.shape)}, which is not one number")
        return
    outputs, inputs = size
    want = (-(-outputs // part.outputs), -(-inputs // part.inputs) if part.inputs else 1)
    want = want[::-1] if part.how == "turned" else want
    if tensor.shape != want:
        raise PlanError(
            f"tensor {name!r} has the shape {list(tensor.shape)}, but a weight of {outputs} outputs and {inputs} "
            f"inputs has {list(want)} with the quantization settings in config.json"
        )


def check_size(target: str, row: Row, kind: str, found: Sequence[Size], dims: Dims) -> None:
    """Refuse weights of other sizes than config.json says."""
    if not row.size:
        return
    said, size = sizes.SIZES[row.size]
    want = size(dims) * (RULES[row.rule].parts if len(found) == 1 and kind not in INWARD else 1)
    for outputs, inputs in found:
        held = inputs if kind in INWARD else outputs
        if held != want:
            raise PlanError(
                f"tensor {target!r}: its source has the size {held}, but {said} in config.json is {size(dims)}"
            )


def check_split(target: str, form: Form, kind: str, found: Sequence[Size], dims: Dims, tp: int) -> None:
    """Refuse a split that parts blocks, groups or packs. ``found``: the weights of the fused parts."""
    if kind in INWARD:
        _check_inputs(target, form, found[0][1], tp)
        return
    whole = kind in ("latent", "copy")
    unit = math.lcm(*(part.outputs for part in form.parts if part.how in ("cut", "turned")))
    parts = _outputs(kind, found, dims, 1 if whole else tp)
    for n in parts if tp > 1 and not whole else parts[:-1]:
        if unit > 1 and n % unit:
            raise PlanError(
                f"tensor {target!r}: a rank of --tp {tp} gets {n:g} outputs of one of its parts, which are not whole "
                f"blocks or packs of {unit}; use a tp where they are"
            )


def _outputs(kind: str, found: Sequence[Size], dims: Dims, tp: int) -> list[float]:
    """The outputs that each rank has of each part."""
    if kind == "qkv":
        q, kv = dims.heads * dims.head_dim, dims.head_dim * max(1, dims.kv_heads / tp)
        return [q / tp, kv, kv]
    if len(found) == 1 and kind == "gate_up":
        return [found[0][0] / 2 / tp] * 2
    if kind == "vocab":
        return [-(-outputs // PAD) * PAD / tp for outputs, _ in found]
    return [outputs / tp for outputs, _ in found]


def _check_inputs(target: str, form: Form, inputs: int, tp: int) -> None:
    unit = math.lcm(*(part.inputs for part in form.parts if part.how in ("cut", "turned") and part.inputs))
    if tp > 1 and unit > 1 and inputs % (tp * unit):
        raise PlanError(
            f"tensor {target!r}: a rank of --tp {tp} gets {inputs / tp:g} of its {inputs} inputs, which are not whole "
            f"groups, blocks or packs of {unit}; use a tp where they are"
        )


def finer(target: str, scale: Part, size: int, hidden: int, ranks: int, backend: str | None) -> int:
    """How many times finer the engine makes the blocks of experts, so that they can be cut.

    ``size``, ``hidden``: of each expert; ``ranks``: that share one. ``refine_fp8_moe_block_shape`` of
    ``fused_moe/oracle/fp8.py``. Raises ``PlanError`` where the engine refuses them.
    """
    if size % ranks:
        raise PlanError(
            f"tensor {target!r}: the size of the experts {size} cannot be divided by --tp {ranks}; {REFUSES}"
        )
    mine = size // ranks
    if mine % scale.outputs == 0 and (ranks == 1 or mine % scale.inputs == 0):
        return 1
    fine = math.gcd(scale.outputs, scale.inputs, mine, hidden)
    said = (
        f"tensor {target!r}: a rank of --tp {ranks} gets {mine} of the {size} outputs of each expert, which are not "
        f"whole blocks of {scale.outputs}"
    )
    factor = scale.outputs // fine
    if fine < 32 or scale.outputs != scale.inputs or f"down_refined_{factor}" not in RULES:
        raise PlanError(f"{said}; {REFUSES}")
    if backend not in (None, "auto", "triton"):
        raise PlanError(f"{said}; only the kernel triton takes finer ones: leave --moe-backend out")
    return factor
