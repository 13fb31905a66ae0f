"""Models of any size for measurements: real architecture, random weights, no framework needed.

python benchmarks/models.py OUT --size 2GiB            # a Llama of about that size, in several files
python benchmarks/models.py OUT --tensors 11000        # headers only: sparse files that hold zeros
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shardtool import header
from shardtool.dtypes import DType
from shardtool.units import parse_size

FILE = 1 << 30
Shapes = dict[str, tuple[int, ...]]


def config(*, hidden: int, layers: int, inter: int, heads: int, kv_heads: int, vocab: int) -> dict[str, object]:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }


def shapes(cfg: dict[str, object]) -> Shapes:
    """Every tensor of that Llama."""
    hidden, inter, vocab = (int(str(cfg[k])) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv = int(str(cfg["num_attention_heads"])), int(str(cfg["num_key_value_heads"]))
    dim = hidden // heads
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(int(str(cfg["num_hidden_layers"]))):
        at = f"model.layers.{i}."
        found[at + "input_layernorm.weight"] = (hidden,)
        found[at + "self_attn.q_proj.weight"] = (hidden, hidden)
        found[at + "self_attn.k_proj.weight"] = (kv * dim, hidden)
        found[at + "self_attn.v_proj.weight"] = (kv * dim, hidden)
        found[at + "self_attn.o_proj.weight"] = (hidden, hidden)
        found[at + "post_attention_layernorm.weight"] = (hidden,)
        found[at + "mlp.gate_proj.weight"] = (inter, hidden)
        found[at + "mlp.up_proj.weight"] = (inter, hidden)
        found[at + "mlp.down_proj.weight"] = (hidden, inter)
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (vocab, hidden)
    return found


def files(every: Shapes, most: int) -> Iterator[Shapes]:
    """The tensors, divided into files."""
    chosen: Shapes = {}
    filled = 0
    for name, shape in every.items():
        nbytes = 2 * int(np.prod(shape))
        if chosen and filled + nbytes > most:
            yield chosen
            chosen, filled = {}, 0
        chosen[name] = shape
        filled += nbytes
    yield chosen


def write(out: Path, cfg: dict[str, object], *, sparse: bool = False, most: int = FILE) -> int:
    """Write the checkpoint; returns its bytes. Weights are random bits with small exponents, so that none is NaN."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(cfg, indent=1))
    every = list(files(shapes(cfg), most))
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    total = 0
    for i, chosen in enumerate(every):
        key = f"model-{i + 1:05d}-of-{len(every):05d}.safetensors"
        names = sorted(chosen)
        text = header.encode([(name, DType.BF16, chosen[name]) for name in names], {"format": "pt"})
        with open(out / key, "wb") as file:
            file.write(text)
            for name in names:
                weight_map[name] = key
                left = int(np.prod(chosen[name]))
                total += 2 * left
                if sparse:
                    file.seek(2 * left, 1)
                    continue
                while left:
                    n = min(left, 1 << 22)
                    file.write((rng.integers(0, 1 << 16, n, np.uint16) & np.uint16(0xBF7F)).tobytes())
                    left -= n
            file.truncate()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def of_size(nbytes: int, *, hidden: int | None = None, vocab: int | None = None) -> dict[str, object]:
    """The config of a Llama of about ``nbytes``; a small one is narrow and knows few words, so that it has layers."""
    hidden = hidden or (2048 if nbytes >= 128 << 20 else 512)
    vocab = vocab or (32000 if nbytes >= 1 << 30 else 4 * hidden)
    inter, heads = hidden * 11 // 4, hidden // 64
    kv = min(8, heads)
    layer = 2 * (2 * hidden * hidden + 2 * kv * 64 * hidden + 3 * hidden * inter)
    layers = max(1, round((nbytes - 4 * vocab * hidden) / layer))
    return config(hidden=hidden, layers=layers, inter=inter, heads=heads, kv_heads=kv, vocab=vocab)


def of_tensors(count: int) -> dict[str, object]:
    """The config of a Llama with about ``count`` tensors, small ones."""
    return config(hidden=1024, layers=count // 9, inter=2048, heads=16, kv_heads=8, vocab=32000)


def of_many(count: int) -> dict[str, object]:
    """The config of a Llama whose shards at tp 1 have about ``count`` tensors, of 71 KiB on average."""
    return config(hidden=128, layers=max(1, (count - 3) // 6), inter=384, heads=2, kv_heads=2, vocab=4096)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="2GiB")
    parser.add_argument("--tensors", type=int)
    args = parser.parse_args()
    if args.tensors:
        cfg = of_tensors(args.tensors)
        print(write(args.out, cfg, sparse=True, most=8 << 30), "bytes,", len(shapes(cfg)), "tensors")
    else:
        cfg = of_size(parse_size(args.size, "--size"))
        print(write(args.out, cfg), "bytes,", len(shapes(cfg)), "tensors")


if __name__ == "__main__":
    main()
