"""SGLang with ``--load-format shardtool``: the original checkpoint's tokens, and the tensors of its own loader.

Two levels. ``Loaders`` are SGLang's ranks without an engine around them: quick, and every tensor is compared with that
of ``--load-format auto``. ``sglang_generate`` starts whole engines. Both find the plug-in by its entry point. What
SGLang loads without it, shards of its own format, is here too. Needs SGLang on the path, as CONTRIBUTING says.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import shardtool
from tests.builders import flipped
from tests.engine import kept
from tests.engine.loaders import Loaders, held
from tests.engine.sglang_models import MODELS as GENERATING
from tests.engine.sglang_ranks import SglangLoaders, plugged
from tests.engine.sglang_truth import ENVIRONMENT
from tests.engine.truth import World
from tests.layouts import traced
from tests.servers import S3Server
from tests.servers.redis import RedisServer

GROUP = "sglang-0.5.23"
MODELS = ("llama-tied", "mistral", "qwen3moe", "gpt_oss", "deepseek_v3", "gemma3")
HEADER = 64 << 10
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not on the path"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return plugged(tmp_path_factory.mktemp("path"))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model by its name, with ``NAME-tp1``, ``-tp2`` and ``-tp4``, and vLLM's ``NAME-vllm``; some are damaged."""
    base = tmp_path_factory.mktemp("shelf")
    for name in MODELS:
        kept.make(traced.read(GROUP, name), base / name)
        for tp in (1, 2, 4):
            shardtool.save(base / name, base / f"{name}-tp{tp}", tp=tp, layout="sglang")
        shardtool.save(base / name, base / f"{name}-vllm", tp=4)
    for name in ("damaged", "missing"):
        shardtool.save(base / "llama-tied", base / name, tp=2, layout="sglang")
    file = base / "damaged" / "model-rank-1-part-0.safetensors"
    file.write_bytes(flipped(file.read_bytes(), file.stat().st_size // 2))
    (base / "missing" / "model-rank-1-part-0.safetensors").unlink()
    return base


# Ranks without an engine: every tensor.


@pytest.fixture(scope="module")
def two(path: str) -> Iterator[Loaders]:
    with SglangLoaders(World(2), path) as loaders:
        yield loaders


def compared(loaders: Loaders, shelf: Path, name: str, sources: dict[str, str]) -> None:
    """Each source comes in its way, and to the tensors of SGLang's own loader."""
    wanted = held(loaders.load(shelf / name))
    assert all(len(one) > 5 for one in wanted)
    for source, way in sources.items():
        # Where the weights are is one thing, where the model is another.
        answers = loaders.load(shelf / name, "shardtool", {"uri": str(shelf / source), "distributed": way == "fed"})
        assert held(answers) == wanted, source
        assert {answer.way for answer in answers} == {way}, source


@pytest.mark.parametrize("name", MODELS)
def test_all_tensors_are_those_of_sglangs_own_loader(shelf: Path, two: Loaders, name: str) -> None:
    """From the rank's own files, from shards for four ranks, from vLLM's, and from whole tensors that are exchanged."""
    compared(two, shelf, name, {f"{name}-tp2": "own", f"{name}-tp4": "cut", f"{name}-vllm": "cut", name: "fed"})


def test_one_rank_alone(shelf: Path, path: str) -> None:
    with SglangLoaders(World(1), path) as loaders:
        for name in ("llama-tied", "gpt_oss"):
            compared(loaders, shelf, name, {f"{name}-tp1": "own", f"{name}-tp4": "cut", name: "fed"})


@pytest.mark.parametrize("world", [World(2, 1, ep=True), World(1, 2)], ids=str)
def test_ranks_that_no_layout_of_sglang_knows_take_whole_tensors(shelf: Path, path: str, world: World) -> None:
    """Whole experts, and stages: SGLang's shards have no names for them."""
    name = "qwen3moe" if world.ep else "llama-tied"
    with SglangLoaders(world, path) as loaders:
        compared(loaders, shelf, name, {f"{name}-tp4": "fed", f"{name}-vllm": "fed", name: "fed"})


def test_shards_that_sglang_saved_itself(shelf: Path, two: Loaders, tmp_path: Path) -> None:
    """They have no manifest: the same sizes are taken by name and shape, others are inferred."""
    for file in (shelf / "mistral-tp2").glob("*.*"):
        if file.suffix == ".safetensors" or file.name == "config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    wanted = held(two.load(shelf / "mistral"))
    answers = two.load(tmp_path, "shardtool")
    assert (held(answers), {answer.way for answer in answers}) == (wanted, {"own"})


@pytest.mark.parametrize("name", MODELS)
def test_sglang_loads_our_shards_without_the_plug_in(shelf: Path, two: Loaders, name: str) -> None:
    """``--load-format sharded_state``."""
    assert held(two.load(shelf / f"{name}-tp2", "sharded_state")) == held(two.load(shelf / name))


def test_from_a_server_of_objects_and_from_redis(
    shelf: Path, path: str, s3_server: S3Server, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in s3_server.environ.items():
        monkeypatch.setenv(variable, value)
    s3_server.client.create_bucket(Bucket="sglang-ranks")
    name = "gpt_oss"
    for uri in ("s3://sglang-ranks/model", redis_server.address("sglang-ranks")):
        shardtool.save(shelf / name, uri, tp=4, layout="sglang")
        with SglangLoaders(World(2), path) as loaders:
            wanted = held(loaders.load(shelf / name))
            for together in (True, False):
                answers = loaders.load(shelf / name, "shardtool", {"uri": uri, "distributed": together})
                assert (held(answers), {answer.way for answer in answers}) == (wanted, {"cut"})


def test_each_rank_reads_what_it_needs(shelf: Path, two: Loaders) -> None:
    """Its own files and their headers; of whole tensors all bytes once for both ranks."""
    name = "deepseek_v3"
    for rank, answer in enumerate(two.load(shelf / f"{name}-tp2", "shardtool")):
        size = (shelf / f"{name}-tp2" / f"model-rank-{rank}-part-0.safetensors").stat().st_size
        assert size - HEADER < answer.read <= size + HEADER
    total = sum(file.stat().st_size for file in (shelf / name).glob("*.safetensors"))
    fed = two.load(shelf / name, "shardtool", {"distributed": True})
    assert total - HEADER < sum(answer.read for answer in fed) <= total


@pytest.mark.parametrize(
    ("source", "extra", "error"),
    [
        ("damaged", {}, "ChecksumMismatch: .*model-rank-1-part-0.safetensors: tensor '.*' differs from its digest"),
        ("missing", {}, "Incomplete: .*model-rank-1-part-0.safetensors is missing"),
        ("llama-tied-tp2", {"rank": 1}, "UsageError: --model-loader-extra-config has the key 'rank'"),
        ("llama-tied-tp2", {"memory_limit": "x"}, 'UsageError: --model-loader-extra-config: "memory_limit" is'),
        ("llama-tied-tp2", {"uri": "nowhere"}, "NotFound: "),
        ("llama-tied-tp2", {"uri": "gpt_oss-tp2"}, "TensorMismatch: .* are missing; .* are foreign to the model"),
        ("without", {}, r"TensorMismatch: .*has nothing for 'model.layers.0.self_attn.qkv_proj.weight' of MistralFor"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_sentence(
    shelf: Path, path: str, source: str, extra: dict[str, Any], error: str
) -> None:
    """SGLang itself would run with what its memory held, where a plain checkpoint lacks a tensor."""
    if source == "without" and not (shelf / source).exists():
        (shelf / source).mkdir()
        held = load_file(shelf / "mistral" / "model.safetensors")
        del held["model.layers.0.self_attn.k_proj.weight"]
        save_file(held, shelf / source / "model.safetensors", {"format": "pt"})
        (shelf / source / "config.json").write_bytes((shelf / "mistral" / "config.json").read_bytes())
    if "uri" in extra:
        extra = {"uri": str(shelf / extra["uri"])}
    with SglangLoaders(World(2), path) as loaders:
        answers = loaders.load(shelf / source, "shardtool", extra)
    assert re.match(error, answers[1].error), answers
    assert "\n" not in answers[1].error


@pytest.mark.parametrize("source", ["llama-tied", "llama-tied-tp2"])
def test_an_impossible_size_is_refused_with_its_reason(shelf: Path, path: str, source: str) -> None:
    """SGLang's own word is an assertion without words."""
    with SglangLoaders(World(3), path) as loaders:
        answers = loaders.load(shelf / source, "shardtool")
    assert all(re.match("PlanError: .*3", answer.error) for answer in answers), answers


# Whole engines.


def environment(path: str, **more: str) -> dict[str, str]:
    """Where SGLang finds the plug-in."""
    paths = [path, str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, **ENVIRONMENT, **more, "PYTHONPATH": os.pathsep.join(paths)}


def test_the_load_format_is_a_choice_of_the_command_line(shelf: Path, path: str) -> None:
    """As ``sglang serve`` and ``python -m sglang.launch_server`` make it; others are refused as before."""
    said = ["--model-path", str(shelf / "mistral"), "--device", "cpu", "--skip-tokenizer-init", "--load-format"]
    program = (
        "import sys\n"
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "from sglang.srt.server_args import prepare_server_args\n"
        "print('format', prepare_server_args(sys.argv[1:]).load_format)\n"
    )
    for name, code in (("shardtool", 0), ("shardtools", 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, *said, name],
            env=environment(path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert ("format shardtool" in done.stdout) is (code == 0)


Said = dict[str, tuple[dict[str, Any], str]]
"""By a job's name: its result, and what the engine said."""


@pytest.fixture(scope="module")
def said(
    shelf: Path, path: str, s3_server: S3Server, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Said:
    """What engines make of all these, one after the other."""
    made_of = tmp_path_factory.mktemp("generating")
    subprocess.run([sys.executable, "-m", "tests.engine.sglang_models", made_of], cwd=ROOT, check=True)
    s3_server.client.create_bucket(Bucket="sglang-engines")
    patch = pytest.MonkeyPatch()
    for variable, value in s3_server.environ.items():
        patch.setenv(variable, value)
    jobs: list[dict[str, Any]] = [
        {"name": "damaged", "model": shelf / "damaged"},
        {"name": "padded auto", "model": shelf / "llama-tied", "load_format": "auto"},
        {"name": "padded-tp2", "model": shelf / "llama-tied-tp2"},
    ]
    for name in GENERATING:
        jobs.append({"name": f"{name} auto", "model": made_of / name, "load_format": "auto"})
        for tp in (2, 4):
            shardtool.save(made_of / name, made_of / f"{name}-tp{tp}", tp=tp, layout="sglang")
            jobs.append({"name": f"{name}-tp{tp}", "model": made_of / f"{name}-tp{tp}"})
        for kind, uri in {"s3": f"s3://sglang-engines/{name}", "redis": redis_server.address(f"sglang-{name}")}.items():
            shardtool.save(made_of / name, uri, tp=4, layout="sglang")
            means = {"concurrency": 4, "memory_limit": 64 << 20, "verify": True, "distributed": kind == "s3"}
            jobs.append({"name": f"{name} {kind}", "model": made_of / name, "extra": {**means, "uri": uri}})
    folder = tmp_path_factory.mktemp("engines")
    made = [{"load_format": "shardtool", "tp": 2, **job, "model": str(job["model"])} for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(made))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.sglang_generate", folder / "jobs.json", folder / "out.jsonl"],
        cwd=ROOT,
        env=environment(path, **s3_server.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    patch.undo()
    found: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, (folder / "out.jsonl").read_text().splitlines()):
        found.setdefault(line["name"], {}).update(line)
    texts = {part.partition("\n")[0]: part for part in done.stdout.split("### ")[1:]}
    return {name: (result, texts[name]) for name, result in found.items()}


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize(
    ("source", "way"),
    [
        ("{}-tp2", "the rank's own files"),
        ("{}-tp4", "ranges of files that were cut otherwise"),
        ("{} s3", "ranges of files that were cut otherwise"),
        ("{} redis", "ranges of files that were cut otherwise"),
    ],
)
def test_tokens_are_those_of_the_original(said: Said, name: str, source: str, way: str) -> None:
    same(said, f"{name} auto", source.format(name), way)


def test_a_model_that_sglang_pads_takes_whole_tensors(said: Said) -> None:
    """Its kernels for a CPU want other sizes than the model has; shards of it are not those of a rank then."""
    same(said, "padded auto", "padded-tp2", "whole tensors, cut by the model itself")


def same(said: Said, auto: str, name: str, way: str) -> None:
    """Two engines say the same; the second was loaded in this way."""
    wanted, (found, text) = said[auto], said[name]
    assert all(len(tokens) == 8 for tokens, _ in wanted[0]["generated"])
    assert found.get("generated") == wanted[0]["generated"], text[-3000:]
    lines = [line for line in text.splitlines() if "shardtool: rank " in line]
    assert sorted(line.partition("shardtool: rank ")[2][:1] for line in lines) == ["0", "1"]
    assert all(way in line for line in lines)


def test_what_a_scheduler_refuses_reaches_its_user_as_a_line_of_its_own(said: Said) -> None:
    """Above the traces of its processes; the first rank to read the damaged byte says it."""
    result, text = said["damaged"]
    assert result["code"] != 0
    assert "generated" not in result
    lines = [line for line in text.splitlines() if "] shardtool: /" in line]
    assert lines
    assert all("model-rank-1-part-0.safetensors" in line for line in lines)
    assert all("differs from its digest" in line for line in lines)
