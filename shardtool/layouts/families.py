"""The built-in tables: how vLLM 0.32 names and cuts the decoders that people serve most. A new family is a few lines.

A table is data. The manifest of a checkpoint keeps the one that made it, so that it can be cut again after these
have changed. Facts are vLLM's ``model_executor/models/{llama,mistral,qwen2,qwen3,phi3,gemma2,gemma3,granite}.py``
and the defaults of the configuration classes that it reads config.json with; ``docs/layouts.md`` explains the
columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shardtool.dtypes import DType
from shardtool.errors import FormatError, UnsupportedModel
from shardtool.layouts.rules import RULES

ENGINE = "vllm"
ENGINE_VERSION = "0.32"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: ``to`` is cut by ``rule`` from ``of``.

    ``{i}`` in names is the layer. ``when`` is a condition on config.json (``holds``). ``size`` names the size that
    the cut dimension must have. ``instead``: names under which a checkpoint may hold the same (one tensor for q, k
    and v, say, or three).
    """

    rule: str
    to: str
    of: tuple[str, ...] = ()
    when: str = ""
    size: str = ""
    instead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """A table.

    ``defaults``: what the engine assumes where config.json is silent. ``drops``: parts of names that it skips, and
    why.
    """

    name: str
    architectures: tuple[str, ...]
    rows: tuple[Row, ...]
    defaults: Mapping[str, Any]
    head_dim_key: str = "head_dim"  # empty: always hidden_size / num_attention_heads
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")  # empty names: no own head
    dtypes: tuple[str, ...] = ("BF16", "F16", "F32")
    refused: tuple[str, ...] = ()  # keys of config.json that change the model in ways that the table does not know
    drops: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The table as JSON values."""
        return asdict(self)


def holds(when: str, config: Mapping[str, Any]) -> bool:
    """Whether a condition is true of a config.

    ``a|b``: one of the keys is true. ``not a``: it is not. ``x else a|b``: x decides if config.json has it, else
    the rest.
    """
    if not when:
        return True
    if when.startswith("not "):
        return not holds(when[4:], config)
    if " else " in when:
        first, rest = when.split(" else ", 1)
        return bool(config[first]) if first in config else holds(rest, config)
    return any(bool(config.get(key)) for key in when.split("|"))


_L = "model.layers.{i}."
_ROTARY = "a table of the rotary embedding, which engines compute themselves"
_DROPS = dict.fromkeys(
    ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"), _ROTARY
)


def _decoder(
    *,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    head: bool = True,
    qk_norm: str | None = None,
    qkv_bias: str | None = None,
    o_bias: str | None = None,
    mlp_bias: str | None = None,
    fused: bool = False,
) -> tuple[Row, ...]:
    """The rows of a Llama-like decoder. A bias is None where the engine never has one, else its condition.

    ``fused``: checkpoints hold q, k, v and gate, up in one tensor each, as the engine does.
    """
    embed, attention, mlp = "model.embed_tokens.weight", _L + "self_attn.", _L + "mlp."
    if head:
        rows = [
            Row("vocab", embed, (embed,), "not tie_word_embeddings"),
            Row("vocab", "lm_head.weight", ("lm_head.weight",), "not tie_word_embeddings"),
            Row("vocab", "lm_head.weight", (embed,), "tie_word_embeddings"),
        ]
    else:
        rows = [Row("vocab", embed, (embed,))]
    rows += [Row("copy", f"{_L}{norm}.weight", (f"{_L}{norm}.weight",)) for norm in norms]
    rows.append(Row("copy", "model.norm.weight", ("model.norm.weight",)))
    for kind, qkv, o, gate_up in (("weight", "", "", ""), ("bias", qkv_bias, o_bias, mlp_bias)):
        across = "row" if kind == "weight" else "copy"  # a bias of a row-parallel layer is whole on every rank
        if qkv is not None:
            one = f"{attention}qkv_proj.{kind}"
            names = ((one,), tuple(f"{attention}{x}_proj.{kind}" for x in "qkv"))
            rows.append(Row("qkv", one, names[not fused], qkv, instead=names[fused]))
        if o is not None:
            name = f"{attention}o_proj.{kind}"
            rows.append(Row(across, name, (name,), o, "heads" if kind == "weight" else ""))
        if gate_up is not None:
            one = f"{mlp}gate_up_proj.{kind}"
            names = ((one,), (f"{mlp}gate_proj.{kind}", f"{mlp}up_proj.{kind}"))
            rows.append(Row("gate_up", one, names[not fused], gate_up, "intermediate", names[fused]))
            name = f"{mlp}down_proj.{kind}"
            rows.append(Row(across, name, (name,), gate_up, "intermediate" if kind == "weight" else ""))
    if qk_norm is not None:
        rows += [Row("copy", f"{attention}{x}_norm.weight", (f"{attention}{x}_norm.weight",), qk_norm) for x in "qk"]
    rows += [Row("scalar", f"{attention}attn._{x}_scale") for x in ("k", "v", "q", "prob")]
    return tuple(rows)


def _defaults(vocab: int, hidden: int, inter: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "tie_word_embeddings": False, **more}


_QKV_BIAS = "qkv_bias else attention_bias|bias"
_BIAS = "attention_bias|bias"
_GEMMA_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)  # fmt: skip
_SINKS = "attention_sinks else layer_types"
_REFUSED = ("per_layer_config",)

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        _decoder(qkv_bias=_QKV_BIAS, o_bias=_BIAS, mlp_bias="mlp_bias"),
        _defaults(32000, 4096, 11008, 32, 32),
        refused=_REFUSED,
        drops=_DROPS,
    ),
    Family(
        "mistral",
        ("MistralForCausalLM",),
        _decoder(qkv_bias=_QKV_BIAS, o_bias=_BIAS, mlp_bias="mlp_bias"),
        _defaults(32000, 4096, 14336, 32, 32, num_key_value_heads=8),
        refused=(*_REFUSED, "ada_rms_norm_t_cond"),
        drops=_DROPS,
    ),
    Family(
        "qwen2",
        ("Qwen2ForCausalLM",),
        _decoder(qkv_bias="", qk_norm="qk_norm"),
        _defaults(151936, 4096, 22016, 32, 32, num_key_value_heads=32),
        head_dim_key="",
        refused=_REFUSED,
        drops=_DROPS,
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        _decoder(qkv_bias="attention_bias", qk_norm=""),
        _defaults(151936, 4096, 22016, 32, 32, num_key_value_heads=32, head_dim=128),
        refused=_REFUSED,
        drops=_DROPS,
    ),
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        _decoder(qkv_bias=_QKV_BIAS, o_bias=_BIAS, mlp_bias="mlp_bias", fused=True),
        _defaults(32064, 3072, 8192, 32, 32),
        refused=_REFUSED,
        drops=_DROPS,
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        _decoder(norms=_GEMMA_NORMS, head=False, qkv_bias="attention_bias", o_bias="attention_bias"),
        _defaults(256000, 2304, 9216, 26, 8, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True),
        tied=("", ""),
        dtypes=("BF16", "F32"),
        refused=_REFUSED,
        drops=_DROPS,
    ),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM",),
        _decoder(norms=_GEMMA_NORMS, qk_norm="", qkv_bias="attention_bias", o_bias="attention_bias"),
        _defaults(262208, 2304, 9216, 26, 8, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True),
        dtypes=("BF16", "F32"),
        refused=_REFUSED,
        drops=_DROPS,
    ),
    Family(
        "granite",
        ("GraniteForCausalLM",),
        (
            *_decoder(qkv_bias=_BIAS, o_bias=_BIAS, mlp_bias="mlp_bias"),
            Row("column", _L + "self_attn.sinks", (_L + "self_attn.sinks",), _SINKS, "sinks"),
        ),
        _defaults(32000, 4096, 11008, 32, 32),
        refused=_REFUSED,
        drops=_DROPS,
    ),
)


def known() -> tuple[str, ...]:
    """Every architecture that has a table."""
    return tuple(sorted(name for family in FAMILIES for name in family.architectures))


def find(config: Mapping[str, Any]) -> Family:
    """The table of a config's architecture: the first of ``architectures`` that is known, as engines choose it."""
    names = config.get("architectures")
    names = [n for n in names if isinstance(n, str)] if isinstance(names, list) else []
    for name in names:
        for family in FAMILIES:
            if name in family.architectures:
                return family
    shown = (name if name.isprintable() else repr(name) for name in names)
    said = f"the architecture {', '.join(shown)}" if names else "no architecture in config.json"
    raise UnsupportedModel(f"{said} is not one that shardtool knows; known are {', '.join(known())}")


def from_record(value: Any, where: str) -> Family:
    """A table that a manifest kept. Raises ``FormatError``."""
    try:
        rows = tuple(Row(**{**row, "of": tuple(row["of"]), "instead": tuple(row["instead"])}) for row in value["rows"])
        lists = {key: tuple(value[key]) for key in ("architectures", "tied", "dtypes", "refused")}
        if len(lists["tied"]) != 2:
            raise ValueError("tied does not name two tensors")
        family = Family(**{**value, **lists, "rows": rows})
        _check_kinds(family)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: the layout table is damaged ({error!r})") from None
    for row in rows:
        if row.rule not in RULES:
            raise FormatError(
                f"{where}: the layout uses the rule {row.rule!r}, which this version of shardtool does not know"
            )
        for names in (row.of, row.instead or row.of):
            if len(names) not in RULES[row.rule].counts:
                raise FormatError(
                    f"{where}: the layout table cuts {row.to!r} by {row.rule!r} from {len(names)} sources"
                )
    return family


def _check_kinds(family: Family) -> None:
    """Refuse a table whose columns hold other kinds of values. Raises ``TypeError`` or ``ValueError``."""
    texts: list[object] = [family.name, family.head_dim_key, *family.architectures, *family.tied, *family.refused]
    for row in family.rows:
        texts += [row.rule, row.to, *row.of, row.when, row.size, *row.instead]
    tables: list[object] = [family.defaults, family.drops]
    if not all(isinstance(table, dict) for table in tables):
        raise TypeError("a column that should be a table is none")
    if not all(isinstance(text, str) for text in (*texts, *family.drops, *family.drops.values())):
        raise TypeError("a column holds something that is not a text")
    if not family.architectures or not family.dtypes:
        raise ValueError("a column has too few entries")
    if not set(family.dtypes) <= set(DType.__members__):
        raise ValueError(f"{family.dtypes} are not all dtypes")
