"""Random tiny models and random ways to shard them, for laws that hold for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.builders import KINDS, Files, Raw, Tensors, config, model, random, tensors

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, repr=False)
class Case:
    """A model, two sizes that its engine takes, and how to go about it."""

    config: dict[str, Any]
    held: Tensors
    files: Files
    tp: int
    tp2: int
    options: dict[str, Any]
    options2: dict[str, Any]

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """What Hypothesis shows of a case that fails."""
        shape = f"{self.config}, {len(self.files)} files"
        printer.text(f"Case({shape}, tp {self.tp} {self.options}, tp {self.tp2} {self.options2})")


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Part size, memory limit and readers."""
    return {
        "max_part_size": draw(st.sampled_from([1, 700, 3000, 20_000, "5GiB"])),
        "concurrency": draw(st.sampled_from([1, 2, 8])),
        "memory_limit": draw(st.sampled_from([0, 0, "2MiB", "8MiB", None, -1])),
    }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any family, heads, dimensions, vocabulary and layers; any spread over files; dropped tensors and spare heads."""
    family = draw(st.sampled_from(sorted(KINDS)))
    tps = draw(st.sampled_from([(1, 2, 4, 8), (1, 2, 4, 8), (1, 3), (1, 2, 3, 6)]))
    most = max(tps)
    kv = draw(st.sampled_from([n for n in range(1, most + 1) if all(t % n == 0 or n % t == 0 for t in tps)]))
    small = draw(st.sampled_from([True, True, True, False]))  # the others are cut in tiles where memory is tight
    heads = most * kv * draw(st.integers(1, 2)) if most % kv else most * draw(st.integers(1, 2))
    made = config(
        family,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=draw(st.sampled_from([1, 2, 3, 5])),
        hidden_size=draw(st.sampled_from([8, 24, 30])) if small else 330,
        intermediate_size=most * draw(st.integers(1, 6)) * (1 if small else 20),
        vocab_size=draw(st.integers(1, 200)) * (1 if small else 10),
        num_hidden_layers=draw(st.integers(1, 3)),
        attention_bias=draw(st.booleans()) and KINDS[family].qkv_bias == "attention_bias",
        mlp_bias=draw(st.booleans()) and bool(KINDS[family].mlp_bias),
        tie_word_embeddings=True if family == "gemma2" else draw(st.booleans()),
        torch_dtype=draw(st.sampled_from(["bfloat16", "bfloat16", "float16"])),
    )
    if family == "qwen2":
        made["head_dim"], made["hidden_size"] = None, heads * 2
        del made["head_dim"]
    if 3 in tps:  # 3 divides no padded vocabulary but those of 192
        made["vocab_size"] = draw(st.sampled_from([129, 150, 192, 384]))
    dtype = "F16" if made["torch_dtype"] == "float16" and "gemma" not in family else "BF16"
    held = tensors(made, dtype=dtype, seed=draw(st.integers(0, 3)))
    if made["tie_word_embeddings"] and family != "gemma2" and draw(st.booleans()):  # a head all the same
        equal = draw(st.booleans())
        held[HEAD] = Raw(dtype, held[EMBED].array.copy()) if equal else random(held[EMBED].array.shape, dtype, 99)
    if draw(st.booleans()):
        held["model.layers.0.self_attn.rotary_emb.inv_freq"] = random((3,), "F32")
    names = draw(st.permutations(sorted(held)))
    made_files = model(made, {name: held[name] for name in names}, files=draw(st.integers(1, 4)))
    tp, tp2 = draw(st.sampled_from(tps)), draw(st.sampled_from(tps))
    return Case(made, held, made_files, tp, tp2, draw(options()), draw(options()))
