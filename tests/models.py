"""Checkpoints on disk.

A plug-in of pytest (``tests/conftest.py`` names it); no test changes the first two::

    tiny_llama    a Llama as transformers saves it: bfloat16, several files with an index, a tokenizer
    large_llama   a Llama of 1 GB that takes no space on the disk: all zeros, for what has to last a while
    work          the current folder for one test, with a copy of tiny_llama as ``llama``
    shards        the folder ``tp2`` in there, with its shards for two ranks
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest

import shardtool
from tests import builders


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, eight heads, two of them for keys and values, and a vocabulary that has to be padded."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers warns of is not about us
        _save_tiny_llama(folder)
    return folder


def _save_tiny_llama(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1003,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).bfloat16()
    numbers = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=numbers))
    model.save_pretrained(folder, max_shard_size="1MB")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def large_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file whose tensors are a hole."""
    folder = tmp_path_factory.mktemp("models") / "large-llama"
    folder.mkdir()
    config = builders.config(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, head_dim=256, vocab_size=32_000
    )
    (folder / "config.json").write_text(json.dumps(config))
    table, at = {}, 0
    for name, shape in builders.shapes(config).items():
        nbytes = 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(table).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return folder


@pytest.fixture
def work(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own."""
    shutil.copytree(tiny_llama, tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shards(work: Path) -> Path:
    """Shards that the test may damage."""
    shardtool.save("llama", "tp2", tp=2)
    return work / "tp2"
