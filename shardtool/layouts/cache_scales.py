"""The scales of queries, keys and values that quantized models have in each attention layer.

A checkpoint may hold them under many names; where it holds none, the engine starts with a value that says so. Sources:
vLLM 0.32 ``model_executor/layers/quantization/kv_cache.py`` and ``CompressedTensorsKVCacheMethod``; for the names
``get_cache_scale_mapper`` in ``base_config.py`` and ``fp8.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from shardtool.errors import PlanError
from shardtool.layouts.tables.language import Row
from shardtool.recipe import SLOT, filled

_NAMES = (
    (r"\.kv_scale$", r".attn.k_scale"),
    (r"\.self_attn\.[kv]_proj\.([kv])_scale$", r".self_attn.attn.\1_scale"),
    (r"\.self_attn\.qk(?:qk)?v_proj\.([kv])_scale$", r".self_attn.attn.\1_scale"),
    (r"\.self_attn\.q\.scale$", r".self_attn.attn.q_scale"),
    (r"\.self_attn\.([kv])_cache\.scale$", r".self_attn.attn.\1_scale"),
    (r"(?<!\.attn)\.([qkv])_scale$", r".attn.\1_scale"),
    (r"(?<!\.attn)\.([qkv])_zero_point$", r".attn.\1_zero_point"),
)
_NAMES_FP8 = (
    (r"\.([kvq])_proj\.output_scale$", r".attn.\1_scale"),
    (r"\.self_attn\.prob_output_scale$", r".self_attn.attn.prob_scale"),
    *_NAMES,
)
"""A checkpoint's names -> the engine's; each is applied to what the one before it made."""
_ENDS = re.compile(r"\.attn\.([qkv]_(scale|zero_point)|prob_scale)$")


def held(names: Iterable[str], attention: str) -> dict[str, list[str]]:
    """The scales that a checkpoint holds: the engine's name -> the checkpoint's. ``attention``: as in ``Scheme``."""
    patterns = [(re.compile(old), new) for old, new in (_NAMES_FP8 if attention == "fp8" else _NAMES)]
    found: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(("_scale", ".scale", "_zero_point")):
            to = name
            for pattern, new in patterns:
                to = pattern.sub(new, to)
            if _ENDS.search(to):
                found.setdefault(to, []).append(name)
    return found


def rows(row: Row, attention: str, found: Mapping[str, list[str]], numbers: Sequence[int | None]) -> Iterator[Row]:
    """The rows of an attention layer's scales. ``row``: that of its ``_k_scale``; ``numbers``: its layers."""
    at = row.to.removesuffix("_k_scale")
    if attention == "fp8":
        rule, made = "bare_scalar", [Row("minus_one", f"{at}{x}_scale") for x in ("k", "prob", "q", "v")]
    else:
        rule, made = "one_scalar", [Row("one", f"{at}{x}_scale", dtype="F32") for x in "kqv"]
        made += [Row("zero", f"{at}{x}_zero_point") for x in "kqv"]
    head = at.partition(SLOT)[0]
    for one in made:
        groups: dict[str, list[int | None]] = {}
        for i in numbers:
            sources = found.get(filled(one.to, i), [""])
            if len(sources) > 1:
                raise PlanError(
                    f"tensor {filled(one.to, i)!r}: the checkpoint holds it as {sources[0]!r} and as {sources[1]!r}"
                )
            groups.setdefault(sources[0].replace(f"{head}{i}.", f"{head}{SLOT}.", 1), []).append(i)
        for of, some in groups.items():
            layers = row.layers if len(groups) == 1 else ",".join(map(str, some))
            one = replace(one, when=row.when, layers=layers, stage=row.stage)
            yield replace(one, rule=rule, of=(of,)) if of else one
