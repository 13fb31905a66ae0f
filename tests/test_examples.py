"""Every script in ``examples/`` runs, in a process of its own, and says what its docstring promises."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardtool.stores import SCHEMES
from shardtool.stores.base import Store
from shardtool.testing import StoreContract
from tests import builders
from tests.servers import S3Server

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A tiny Hugging Face checkpoint of two files."""
    config = builders.config("llama")
    builders.put(tmp_path / "llama", builders.model(config, builders.tensors(config), files=2))
    return str(tmp_path / "llama")


def run(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run an example as its docstring says, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", ROOT / "examples" / name, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def said(name: str, *words: str | Path) -> str:
    """What an example that succeeds prints."""
    done = run(name, *words)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_how_to_run_it_and_is_run_here(path: Path) -> None:
    text = path.read_text()
    assert f"python examples/{path.name} " in text.split('"""')[1]
    assert f'"{path.name}"' in Path(__file__).read_text()


def test_save_and_verify_finds_every_tensor_equal(llama: str, tmp_path: Path) -> None:
    output = said("save_and_verify.py", llama, tmp_path / "tp2", "--tp", "2")
    assert "tp 2 shards of" in output
    assert "tensors compared: all equal" in output


def test_save_and_verify_ends_with_the_code_of_its_error(llama: str, tmp_path: Path) -> None:
    done = run("save_and_verify.py", llama, tmp_path / "tp3", "--tp", "3")
    assert done.returncode == 2
    assert "divided by --tp 3" in done.stderr
    assert not (tmp_path / "tp3").exists()


def test_stream_into_module_gives_the_model_that_transformers_loads(llama: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    said("save_and_verify.py", llama, tmp_path / "tp2", "--tp", "2")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        token = model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax().item()
    output = said("stream_into_module.py", llama, tmp_path / "tp2")
    assert f"the model says {token}\n" in output
    assert "the largest weight of the attention of rank 0 is 0." in output


def test_load_model_is_the_same_model_in_one_process_and_in_two(llama: str, tmp_path: Path) -> None:
    import shardtool

    one = said("load_model.py", llama)
    assert one.startswith("rank 0 of 1: after the tokens 1 2 3 the model says ")
    shardtool.save(llama, tmp_path / "tp2", tp=2, layout="transformers", dtype="float32")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, ROOT / "examples" / "load_model.py", tmp_path / "tp2"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    both = [f"rank {rank} of 2: {one.partition(': ')[2].strip()}" for rank in (0, 1)]
    # Where output is not buffered, one rank's line may come before the end of the other's.
    assert sorted(re.findall(r"rank \d of 2: .*? the model says \d+", done.stdout)) == both


def test_several_workers_complete_one_checkpoint(llama: str, tmp_path: Path) -> None:
    output = said("several_workers.py", llama, tmp_path / "tp4", "--tp", "4", "--workers", "2")
    assert "ranks [0, 2]: " in output
    assert "ranks [1, 3]: " in output
    assert "the checkpoint is complete" in output
    assert output.endswith("verified\n")


def test_s3_needs_no_folder(llama: str, bucket: str) -> None:
    output = said("s3.py", llama, f"s3://{bucket}/llama-tp2", "--tp", "2")
    assert "verified\nrank 1 has " in output
    assert "  shardtool.json\n" in output


def test_s3_says_which_bucket_is_missing(llama: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.bucket(monkeypatch)
    done = run("s3.py", llama, "s3://there-is-no-such-bucket/llama")
    assert done.returncode != 0
    assert "there-is-no-such-bucket" in done.stderr.splitlines()[-1]


def test_custom_store_holds_a_checkpoint_in_one_file(llama: str, tmp_path: Path) -> None:
    output = said("custom_store.py", llama, tmp_path / "llama.db")
    assert output.startswith("equal\n")
    assert "  model-rank-1-part-0.safetensors\n" in output
    assert "  model.norm.weight\n" in output


def test_a_package_with_the_custom_store_makes_its_addresses_known_to_the_command_line(
    llama: str, tmp_path: Path
) -> None:
    """As a plug-in is installed: an entry point, and nothing else."""
    info = tmp_path / "site" / "custom_store-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: custom_store\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[shardtool.stores]\nsqlite = custom_store:SqliteStore\n")
    shutil.copy(ROOT / "examples" / "custom_store.py", tmp_path / "site")
    paths = os.pathsep.join((str(ROOT), str(tmp_path / "site")))
    for words in (("save", llama, "--tp", "2", "-o"), ("verify", "--against", llama)):
        command = [sys.executable, "-m", "shardtool", *words, f"sqlite://{tmp_path}/llama.db"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
        assert done.returncode == 0, done.stderr
    assert ": OK (compared with" in done.stdout


class TestCustomStore(StoreContract):
    """The example's store obeys every law of stores; what a killed writer leaves in it cannot be listed."""

    gaps = frozenset({"unfinished"})

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
        monkeypatch.setitem(SCHEMES, "sqlite", "")  # so that what the example registers is forgotten again
        spec = importlib.util.spec_from_file_location("custom_store", ROOT / "examples" / "custom_store.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with module.SqliteStore(f"sqlite://{tmp_path / 'objects.db'}") as store:
            yield store
