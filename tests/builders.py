"""Tiny checkpoints, made without shardtool: config.json, tensors of the right names and random bytes, their files.

::

    config("llama", vocab_size=100)          config.json of a family
    tensors(config)                          name -> Raw(dtype, array), as Hugging Face names them
    model(config, tensors, files=2)          a folder as {key: bytes}: safetensors, index, config, side files
    put(place, model) / contents(place)      into and out of a folder or a store
    rank_tensors(contents, rank)             what a rank's files hold, read by the safetensors library

bfloat16 has no numpy type: its elements are uint16 here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize

from shardtool import manifest
from shardtool.stores import memory, open_store
from shardtool.stores.counting import CountingStore

NUMPY = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "i1",
    "U8": "u1",
    "F8_E4M3": "u1",
}
SHARD = re.compile(r"model-rank-(\d+)-part-(\d+)\.safetensors")


@dataclass(frozen=True, eq=False)
class Raw:
    """A tensor: a dtype as safetensors names it, and its elements."""

    dtype: str
    array: NDArray[Any]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Raw):
            return NotImplemented
        same = (self.dtype, self.array.shape) == (other.dtype, other.array.shape)
        return same and self.array.tobytes() == other.array.tobytes()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Raw({self.dtype} {list(self.array.shape)})"


Tensors = dict[str, Raw]
Files = dict[str, bytes]


@dataclass(frozen=True)
class Kind:
    """What a family's checkpoints look like; ``biases``: which of q, k, v, o have one, and when."""

    architecture: str
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    qk_norm: bool = False
    qkv_bias: str = "attention_bias"  # the key of config.json, or "always"
    o_bias: str = "attention_bias"
    mlp_bias: str = ""
    fused: bool = False
    head: bool = True
    tied: bool = False


_GEMMA = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
KINDS = {
    "llama": Kind("LlamaForCausalLM", mlp_bias="mlp_bias"),
    "mistral": Kind("MistralForCausalLM"),
    "qwen2": Kind("Qwen2ForCausalLM", qkv_bias="always", o_bias=""),
    "qwen3": Kind("Qwen3ForCausalLM", qk_norm=True),
    "phi3": Kind("Phi3ForCausalLM", qkv_bias="", o_bias="", fused=True),
    "gemma2": Kind("Gemma2ForCausalLM", _GEMMA, head=False, tied=True),
    "gemma3": Kind("Gemma3ForCausalLM", _GEMMA, qk_norm=True, tied=True),
    "granite": Kind("GraniteForCausalLM", mlp_bias="mlp_bias"),
}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model; a change to None removes the key."""
    kind = KINDS[family]
    made: dict[str, Any] = {
        "architectures": [kind.architecture],
        "model_type": {"gemma3": "gemma3_text"}.get(family, family),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 100,
        "tie_word_embeddings": kind.tied,
        "torch_dtype": "bfloat16",
        **changes,
    }
    return {key: value for key, value in made.items() if value is not None}


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The family of a config."""
    return next(kind for kind in KINDS.values() if kind.architecture in config["architectures"])


def head_dim(config: Mapping[str, Any]) -> int:
    """Elements of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def shapes(config: Mapping[str, Any], *, fused: bool | None = None) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint and their shapes. ``fused``: qkv and gate_up in one tensor each, as Phi3 has them."""
    kind = kind_of(config)
    fused = kind.fused if fused is None else fused
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, dim = config["num_attention_heads"], head_dim(config)
    kv = config.get("num_key_value_heads") or heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)

    def asked(key: str) -> bool:
        return key == "always" or bool(key and config.get(key))

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found.update({f"{layer}{norm}.weight": (hidden,) for norm in kind.norms})
        rows = {"q": heads * dim, "k": kv * dim, "v": kv * dim}
        for suffix, cols in [("weight", (hidden,)), *([("bias", ())] if asked(kind.qkv_bias) else [])]:
            if fused:
                found[f"{layer}self_attn.qkv_proj.{suffix}"] = (sum(rows.values()), *cols)
            else:
                found.update({f"{layer}self_attn.{x}_proj.{suffix}": (n, *cols) for x, n in rows.items()})
        found[f"{layer}self_attn.o_proj.weight"] = (hidden, heads * dim)
        if asked(kind.o_bias):
            found[f"{layer}self_attn.o_proj.bias"] = (hidden,)
        for suffix, cols in [("weight", (hidden,)), *([("bias", ())] if asked(kind.mlp_bias) else [])]:
            if fused:
                found[f"{layer}mlp.gate_up_proj.{suffix}"] = (2 * inter, *cols)
            else:
                found.update({f"{layer}mlp.{x}_proj.{suffix}": (inter, *cols) for x in ("gate", "up")})
        found[f"{layer}mlp.down_proj.weight"] = (hidden, inter)
        if asked(kind.mlp_bias):
            found[f"{layer}mlp.down_proj.bias"] = (hidden,)
        if kind.qk_norm or config.get("qk_norm"):
            found.update({f"{layer}self_attn.{x}_norm.weight": (dim,) for x in "qk"})
        if config.get("attention_sinks"):
            found[f"{layer}self_attn.sinks"] = (heads,)
    return found


def random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Raw:
    """Random values around 1, all of them finite; any two tensors differ."""
    values = (np.random.default_rng([seed, *shape]).standard_normal(shape) * 0.1).astype(np.float32)
    if dtype == "BF16":
        return Raw(dtype, (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).reshape(shape))
    return Raw(dtype, values.astype(NUMPY[dtype]).reshape(shape))


def tensors(config: Mapping[str, Any], *, dtype: str = "BF16", seed: int = 0, fused: bool | None = None) -> Tensors:
    """All tensors of a checkpoint, each with bytes of its own."""
    made = shapes(config, fused=fused)
    return {name: random(shape, dtype, seed * 10_000 + i) for i, (name, shape) in enumerate(sorted(made.items()))}


def safetensors(held: Mapping[str, Raw], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file, its tensors in the order in which they are given."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, raw in held.items():
        table[name] = {"dtype": raw.dtype, "shape": list(raw.array.shape), "data_offsets": [at, at + raw.array.nbytes]}
        at += raw.array.nbytes
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(raw.array.tobytes() for raw in held.values())


def model(
    config: Mapping[str, Any],
    held: Tensors,
    *,
    files: int = 1,
    where: Callable[[str], int] | None = None,
    side: Mapping[str, bytes] | None = None,
) -> Files:
    """A Hugging Face checkpoint. ``where``: which of the files a tensor lies in; by default they take turns."""
    turns = itertools.count()
    place = {name: (where(name) if where else next(turns)) % files for name in held}
    keys = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors" for i in range(files)]
    made = {"config.json": json.dumps(config, indent=2).encode(), "tokenizer.json": b'{"version": "1.0"}'}
    for i, key in enumerate(keys):
        made[key] = safetensors({n: raw for n, raw in held.items() if place[n] == i}, {"format": "pt"})
    if files > 1:
        table = {"metadata": {}, "weight_map": {name: keys[i] for name, i in place.items()}}
        made["model.safetensors.index.json"] = json.dumps(table).encode()
    return {**made, **(side or {})}


# Places: folders and stores.


def put(place: str | Path, files: Mapping[str, bytes]) -> str:
    """Write the files; returns the place's address."""
    if isinstance(place, Path):
        for key, data in files.items():
            path = place / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        place.mkdir(parents=True, exist_ok=True)
    else:
        with open_store(place) as store:
            for key, data in files.items():
                store.put(key, data)
    return str(place)


def contents(place: str | Path) -> Files:
    """Every object of a place. A folder is read without shardtool."""
    if isinstance(place, Path):
        return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}
    with open_store(place) as store:
        return {found.key: store.get(found.key, limit=1 << 30) for found in store.list()}


def unplaced(where: str | Path) -> dict[str, bytes]:
    """All objects of a checkpoint; its manifest without the checksums that a store keeps, which are of its own kind."""
    found = contents(where)
    made = manifest.decode(found[manifest.KEY], str(where))
    files = tuple(replace(file, stored={}) for file in made.files)
    return {**found, manifest.KEY: replace(made, files=files).encode()}


@contextlib.contextmanager
def places() -> Iterator[Callable[[str], str]]:
    """Stores in memory that are forgotten at the end: ``place("a")`` is an address of its own."""
    made: list[str] = []

    def place(name: str) -> str:
        made.append(f"memory://builders-{next(_NUMBERS)}-{name}")
        return made[-1]

    yield place
    for uri in made:
        memory._NAMED.pop(uri.partition("://")[2], None)


_NUMBERS = itertools.count()
COUNTED: dict[str, CountingStore] = {}


def counted(uri: str) -> CountingStore:
    """The store of ``counted://memory-name`` (see ``COUNTING``): counts what is asked of ``memory://memory-name``."""
    if uri not in COUNTED:
        COUNTED[uri] = CountingStore(open_store("memory://" + uri.partition("://")[2]))
    return COUNTED[uri]


COUNTING = "tests.builders:counted"
"""For ``monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)``."""


def parsed(data: bytes) -> Tensors:
    """The tensors of one file, as the safetensors library reads them."""
    found = {}
    for name, entry in deserialize(data):
        shape = tuple(entry["shape"])
        array = np.frombuffer(bytes(entry["data"]), NUMPY[entry["dtype"]], math.prod(shape)).reshape(shape)
        found[name] = Raw(entry["dtype"], array)
    return found


def rank_tensors(files: Files, rank: int, names: re.Pattern[str] = SHARD) -> Tensors:
    """What the files of one rank hold; a tensor in two parts is an error."""
    found: Tensors = {}
    for key, data in files.items():
        match = names.fullmatch(key)
        if match and int(match[1]) == rank:
            part = parsed(data)
            assert not part.keys() & found.keys(), f"{key} repeats a tensor"
            found |= part
    return found


def whole_tensors(files: Files) -> Tensors:
    """What the files of a Hugging Face checkpoint hold."""
    found: Tensors = {}
    for key, data in files.items():
        if key.endswith(".safetensors") and "/" not in key:
            found |= parsed(data)
    return found


def engine_saved(config: Mapping[str, Any], ranks: list[Tensors], parts: int = 1) -> Files:
    """A folder as an engine's ``save_sharded_state`` leaves it: rank files and config.json, no manifest."""
    made = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}"}
    for rank, held in enumerate(ranks):
        for part in range(parts):
            chosen = {name: raw for i, (name, raw) in enumerate(held.items()) if i % parts == part}
            made[f"model-rank-{rank}-part-{part}.safetensors"] = safetensors(chosen)
    return made


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    """The same bytes with one bit changed."""
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)
