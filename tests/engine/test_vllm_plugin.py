"""vLLM with ``--load-format shardtool``: the tokens of the original checkpoint, and the very tensors of its own loader.

Two levels. ``Loaders`` are vLLM's ranks without an engine around them: quick, and every tensor is compared with that of
``--load-format auto``. ``generate`` starts whole engines, whose plug-in is found by its entry point.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shardtool
from tests.builders import flipped
from tests.engine.loaders import Loaders, held
from tests.engine.truth import ENVIRONMENT, World
from tests.engine.vllm_models import MODELS
from tests.engine.vllm_ranks import VllmLoaders
from tests.servers import S3Server
from tests.servers.redis import RedisServer

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
HEADER = 64 << 10
GENERATING = ("llama-untied", "qwen3-tied", "qwen3moe", "gpt_oss")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model by its name, with ``NAME-tp2`` and ``NAME-tp4``; some of its shards are damaged."""
    base = tmp_path_factory.mktemp("shelf")
    subprocess.run([sys.executable, "-m", "tests.engine.vllm_models", base], cwd=ROOT, check=True)
    for name in MODELS:
        for tp in (2, 4):
            shardtool.save(base / name, base / f"{name}-tp{tp}", tp=tp)
    shardtool.save(base / "gpt_neox", base / "gpt_neox-0.24", tp=4, engine_version="0.24")
    for name in ("damaged", "missing"):
        shardtool.save(base / "llama-untied", base / name, tp=2)
    file = base / "damaged" / "model-rank-1-part-0.safetensors"
    file.write_bytes(flipped(file.read_bytes(), file.stat().st_size // 2))
    (base / "missing" / "model-rank-1-part-0.safetensors").unlink()
    return base


# Ranks without an engine: every tensor.


@pytest.fixture(scope="module")
def two() -> Iterator[Loaders]:
    with VllmLoaders(World(2)) as loaders:
        yield loaders


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("large", "few-heads")])
def test_all_tensors_are_those_of_vllms_own_loader(shelf: Path, two: Loaders, name: str) -> None:
    """From the rank's own files, from shards for four ranks, and from whole tensors that the ranks exchange."""
    wanted = held(two.load(shelf / name))
    assert all(len(one) > 10 for one in wanted)
    for source, way in ((f"{name}-tp2", "own"), (f"{name}-tp4", "cut"), (name, "fed")):
        answers = two.load(shelf / source, "shardtool", {"distributed": way == "fed"})
        assert held(answers) == wanted
        assert [answer.way for answer in answers] == [way, way]


def test_each_rank_reads_what_it_needs(shelf: Path, two: Loaders) -> None:
    """Its own files and their headers; of shards for four ranks at most two thirds, in whole chunks."""
    own = two.load(shelf / "large-tp2", "shardtool")
    for rank, answer in enumerate(own):
        size = (shelf / "large-tp2" / f"model-rank-{rank}-part-0.safetensors").stat().st_size
        assert size - HEADER < answer.read <= size + HEADER
    cut = two.load(shelf / "large-tp4", "shardtool")
    assert held(cut) == held(own)
    for answer in cut:
        assert answer.read <= own[0].read * 1.2
    fed = two.load(shelf / "large", "shardtool", {"distributed": True})
    assert held(fed) == held(own)
    total = sum(file.stat().st_size for file in (shelf / "large").glob("*.safetensors"))
    assert total - MIB < sum(answer.read for answer in fed) <= total


@pytest.mark.parametrize(("source", "limit"), [("large-tp2", 32), ("large-tp4", 48), ("large", 160)])
def test_memory_stays_within_the_limit(shelf: Path, two: Loaders, source: str, limit: int) -> None:
    """The model's own memory is filled as it is read; beside it there is the limit, and 16 MiB for Python's things."""
    model = sum(file.stat().st_size for file in (shelf / "large-tp2").glob("model-rank-0-*"))
    answers = two.load(shelf / source, "shardtool", {"memory_limit": limit * MIB})
    assert held(answers) == held(two.load(shelf / "large-tp2", "shardtool"))
    for answer in answers:
        assert answer.peak <= model + (limit + 16) * MIB, (
            f"{answer.peak / MIB:.0f} MiB, the model has {model / MIB:.0f}"
        )


def test_shards_of_another_version_are_translated(shelf: Path, two: Loaders) -> None:
    """GPT-NeoX has other names in vLLM 0.24."""
    answers = two.load(shelf / "gpt_neox-0.24", "shardtool")
    assert held(answers) == held(two.load(shelf / "gpt_neox"))
    assert "made for vllm 0.24" in answers[0].why


def test_weights_lie_where_the_uri_says(shelf: Path, two: Loaders, tmp_path: Path) -> None:
    """The model's folder has its config alone, which says that the head is the embedding; the shards' head differs."""
    said = json.loads((shelf / "llama-untied" / "config.json").read_text())
    for folder in (tmp_path / "model", tmp_path / "plain"):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": True}))
    for file in (shelf / "llama-untied").glob("*.safetensors"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    shardtool.save(tmp_path / "model", tmp_path / "shards", tp=4)
    wanted = held(two.load(shelf / "llama-untied"))
    for uri in (tmp_path / "shards", tmp_path / "model"):
        assert held(two.load(tmp_path / "plain", "shardtool", {"uri": str(uri)})) == wanted


@pytest.mark.parametrize("world", [World(1, 2), World(2, 1, ep=True)], ids=str)
def test_stages_and_whole_experts(shelf: Path, tmp_path: Path, world: World) -> None:
    name = "qwen3moe" if world.ep else "llama-untied"
    shardtool.save(shelf / name, tmp_path / "own", tp=world.tp, pp=world.pp, expert_parallel=world.ep)
    with VllmLoaders(world) as loaders:
        wanted = held(loaders.load(shelf / name))
        for uri, way in ((tmp_path / "own", "own"), (shelf / f"{name}-tp4", "cut"), (shelf / name, "fed")):
            answers = loaders.load(uri, "shardtool")
            assert (held(answers), {answer.way for answer in answers}) == (wanted, {way})


@pytest.mark.parametrize(
    ("source", "extra", "error"),
    [
        ("damaged", {}, "ChecksumMismatch: .*model-rank-1-part-0.safetensors: tensor '.*' differs from its digest"),
        ("missing", {}, "Incomplete: .*model-rank-1-part-0.safetensors is missing"),
        ("llama-untied-tp2", {"rank": 1}, "UsageError: --model-loader-extra-config has the key 'rank'"),
        ("llama-untied-tp2", {"memory_limit": "x"}, 'UsageError: --model-loader-extra-config: "memory_limit" is'),
        ("llama-untied-tp2", {"uri": "nowhere"}, "NotFound: "),
        ("llama-untied-tp2", {"uri": "gpt_oss-tp2"}, "TensorMismatch: .* are missing; .* are foreign to the model"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_sentence(
    shelf: Path, source: str, extra: dict[str, Any], error: str
) -> None:
    if "uri" in extra:
        extra = {"uri": str(shelf / extra["uri"])}
    with VllmLoaders(World(2)) as loaders:
        answers = loaders.load(shelf / source, "shardtool", extra)
    assert re.match(error, answers[1].error), answers
    assert "\n" not in answers[1].error


@pytest.mark.parametrize("source", ["few-heads", "few-heads-tp2"])
def test_an_impossible_size_is_refused_with_its_reason(shelf: Path, source: str) -> None:
    """VLLM's own word is an assertion, that 3 is not divisible by 2."""
    with VllmLoaders(World(3)) as loaders:
        answers = loaders.load(shelf / source, "shardtool")
    assert all(
        re.match("PlanError: .*--tp 3 is not a multiple of its 2 kv heads", answer.error) for answer in answers
    ), answers


# Whole engines.


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path on which the package is installed, as far as entry points tell."""
    folder = tmp_path_factory.mktemp("path")
    info = folder / "shardtool_tests-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shardtool-tests\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nshardtool = shardtool.integrations.vllm:register\n")
    return os.pathsep.join([str(folder), str(ROOT)])


Said = dict[str, tuple[dict[str, Any], str]]
"""By a job's name: its result, and what the engine said."""


def engines(jobs: list[dict[str, Any]], folder: Path, path: str, environ: dict[str, str] | None = None) -> Said:
    """Do jobs one after the other."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    out = folder / "out.jsonl"
    # The machine's logs: vLLM's own are at ERROR in ENVIRONMENT, and what its user sees is asked for here.
    environ = {**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO", "PYTHONPATH": path, **(environ or {})}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.generate", folder / "jobs.json", out],
        cwd=ROOT,
        env={**environ, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    results = {one["name"]: one for one in map(json.loads, out.read_text().splitlines())}
    texts = {part.partition("\n")[0]: part for part in done.stdout.split("### ")[1:]}
    return {name: (found, texts[name]) for name, found in results.items()}


@pytest.fixture(scope="module")
def said(
    shelf: Path,
    plugged: str,
    s3_server: S3Server,
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Said:
    s3_server.client.create_bucket(Bucket="engines")
    jobs: list[dict[str, Any]] = []
    patch = pytest.MonkeyPatch()
    for variable, value in s3_server.environ.items():
        patch.setenv(variable, value)
    for name in GENERATING:
        remote = {"s3": f"s3://engines/{name}", "redis": redis_server.address(name)}
        for uri in remote.values():
            shardtool.save(shelf / name, uri, tp=4)
        means = {"concurrency": 4, "memory_limit": 64 * MIB, "verify": True}
        jobs += [
            {"name": f"{name} auto", "model": shelf / name, "load_format": "auto"},
            *({"name": source, "model": shelf / source} for source in (f"{name}-tp2", f"{name}-tp4")),
            *(
                {
                    "name": f"{name} {kind}",
                    "model": shelf / name,
                    "extra": {**means, "uri": uri, "distributed": kind == "s3"},
                }
                for kind, uri in remote.items()
            ),
        ]
    jobs += [{"name": name, "model": shelf / name} for name in ("damaged", "missing")]
    found = engines(
        [{"load_format": "shardtool", "tp": 2, **job, "model": str(job["model"])} for job in jobs],
        tmp_path_factory.mktemp("engines"),
        plugged,
        s3_server.environ,
    )
    patch.undo()
    return found


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
    wanted, found = said[f"{name} auto"][0], said[source.format(name)]
    assert found[0] == {"name": source.format(name), "generated": wanted["generated"]}, found[1][-3000:]
    lines = [line for line in found[1].splitlines() if "shardtool: rank " in line]
    assert sorted(line.partition("shardtool: rank ")[2][:1] for line in lines) == ["0", "1"]
    assert all(way in line for line in lines)


@pytest.mark.parametrize(
    ("name", "sentence"), [("damaged", "differs from its digest"), ("missing", "safetensors is missing; the manifest")]
)
def test_what_a_worker_refuses_reaches_its_user_as_a_line_of_its_own(said: Said, name: str, sentence: str) -> None:
    """Above the traces of three processes; vLLM's front end itself only says that the engine did not start."""
    result, text = said[name]
    assert "Engine core initialization failed" in result["error"]
    (line,) = [line for line in text.splitlines() if "shardtool: /" in line and "ERROR" in line and "Error" not in line]
    assert "model-rank-1-part-0.safetensors" in line
    assert sentence in line
    assert "Worker_TP1" in line
