"""What does a checkpoint of 92,000 tensors cost before a byte moves? DeepSeek-V3 in fp8, headers only, at tp 8.

python benchmarks/experts.py [--engine-python PATH]

Its plan by the built-in table; with a Python that has vLLM also its trace, and the plan by the layout file of it. CPU
seconds and peak memory are those of the whole process, the engine's own included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import measure

from shardtool import header
from shardtool.dtypes import DType

HIDDEN, LAYERS, DENSE, EXPERTS, HEADS, VOCAB, BLOCK = 7168, 61, 3, 256, 128, 129280, 128
INTER, EXPERT, LATENT_Q, LATENT_KV, NOPE, ROPE, VALUE = 18432, 2048, 1536, 512, 128, 64, 128
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": DENSE,
    "intermediate_size": INTER,
    "moe_intermediate_size": EXPERT,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": LATENT_Q,
    "kv_lora_rank": LATENT_KV,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "vocab_size": VOCAB,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
Entry = tuple[str, DType, tuple[int, ...]]


def tensors() -> Iterator[Entry]:
    """Every tensor of the published checkpoint."""
    yield "model.norm.weight", DType.BF16, (HIDDEN,)
    yield "model.embed_tokens.weight", DType.BF16, (VOCAB, HIDDEN)
    yield "lm_head.weight", DType.BF16, (VOCAB, HIDDEN)
    for layer in range(LAYERS + 1):
        here = f"model.layers.{layer}."
        for norm, n in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
            yield f"{here}{norm}.weight", DType.BF16, (n,)
        yield f"{here}self_attn.q_a_layernorm.weight", DType.BF16, (LATENT_Q,)
        yield f"{here}self_attn.kv_a_layernorm.weight", DType.BF16, (LATENT_KV,)
        for name, rows, columns in (
            ("q_a_proj", LATENT_Q, HIDDEN),
            ("q_b_proj", HEADS * (NOPE + ROPE), LATENT_Q),
            ("kv_a_proj_with_mqa", LATENT_KV + ROPE, HIDDEN),
            ("kv_b_proj", HEADS * (NOPE + VALUE), LATENT_KV),
            ("o_proj", HIDDEN, HEADS * VALUE),
        ):
            yield from linear(f"{here}self_attn.{name}", rows, columns)
        if layer < DENSE:
            yield from mlp(f"{here}mlp.", INTER)
            continue
        yield f"{here}mlp.gate.weight", DType.BF16, (EXPERTS, HIDDEN)
        yield f"{here}mlp.gate.e_score_correction_bias", DType.F32, (EXPERTS,)
        yield from mlp(f"{here}mlp.shared_experts.", EXPERT)
        for expert in range(EXPERTS):
            yield from mlp(f"{here}mlp.experts.{expert}.", EXPERT)
    last = f"model.layers.{LAYERS}."  # predicts further tokens
    yield last + "embed_tokens.weight", DType.BF16, (VOCAB, HIDDEN)
    yield last + "shared_head.head.weight", DType.BF16, (VOCAB, HIDDEN)
    yield last + "eh_proj.weight", DType.BF16, (HIDDEN, 2 * HIDDEN)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{last}{norm}.weight", DType.BF16, (HIDDEN,)


def linear(name: str, rows: int, columns: int) -> Iterator[Entry]:
    """A matrix of eight bits, and the scales of its blocks."""
    yield f"{name}.weight", DType.F8_E4M3, (rows, columns)
    yield f"{name}.weight_scale_inv", DType.F32, (-(-rows // BLOCK), -(-columns // BLOCK))


def mlp(name: str, inner: int) -> Iterator[Entry]:
    """Three matrices."""
    yield from linear(f"{name}gate_proj", inner, HIDDEN)
    yield from linear(f"{name}up_proj", inner, HIDDEN)
    yield from linear(f"{name}down_proj", HIDDEN, inner)


def write(folder: Path) -> tuple[int, int]:
    """The checkpoint without its bytes: one sparse file. Returns tensors and bytes."""
    folder.mkdir(parents=True)
    every = list(tensors())
    text = header.encode(every)
    size = len(text)
    for _, dtype, shape in every:
        size += dtype.itemsize * (shape[0] * (shape[1] if len(shape) > 1 else 1))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(text)
        file.truncate(size)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return len(every), size


def command(*words: str) -> tuple[str, str, str]:
    """Wall seconds, CPU seconds and peak MiB of a command with all processes that it starts."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environ = measure.environ(PYTHONPATH=str(measure.HERE.parent))
    subprocess.run([sys.executable, "-m", "shardtool", *words], env=environ, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{time.monotonic() - began:.0f}", f"{cpu:.0f}", f"{after.ru_maxrss / 1024:.0f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine-python", help="a Python that has vLLM")
    parser.add_argument("--tp", default="8")
    parser.add_argument("--dir", help="where to work")
    args = parser.parse_args()
    with measure.place(args.dir) as folder:
        model, out, layout = str(folder / "model"), str(folder / "out"), str(folder / "layout.json")
        count, size = write(Path(model))
        plan = ("save", model, "--tp", args.tp, "-o", out, "--dry-run", "--quiet", "--json")
        rows = [("plan, built in", *command(*plan, "--layout", "vllm:builtin"))]
        if args.engine_python:
            trace = ("trace", model, "--tp", args.tp, "-o", layout, "--engine-python", args.engine_python, "--quiet")
            rows.append(("trace", *command(*trace)))
            rows.append(("plan, layout file", *command(*plan, "--layout", layout)))
            print(f"layout file: {Path(layout).stat().st_size >> 10} KiB")
    print(f"{count} tensors, {size >> 30} GiB, tp {args.tp}")
    print(measure.table(("", "wall s", "CPU s", "peak MiB so far"), rows))


if __name__ == "__main__":
    main()
