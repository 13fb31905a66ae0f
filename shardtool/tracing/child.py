"""The process in which an engine is traced: ``python -m shardtool.tracing.child JOB.json OUT.json``.

It runs under the engine's own Python, which needs torch and the engine, and of ours this package on its path.
``JOB.json`` says what to do (``parent.py`` writes it), ``OUT.json`` is the answer or ``{"error": ...}``; what the
engine prints goes where the parent wants it. Ranks are traced one after the other and folded at once, so that memory
holds one rank's pieces.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from shardtool import header, parallel, recipe_json
from shardtool.dtypes import from_name
from shardtool.errors import ShardtoolError
from shardtool.fold import Folding
from shardtool.parallel import Parallel
from shardtool.plan import Mosaic
from shardtool.recipe import used, used_by_programs
from shardtool.tracing.aliases import kept
from shardtool.tracing.compile import Compiler
from shardtool.tracing.contents import Contents
from shardtool.tracing.tape import META, Literals, Log, Refused, Tape

WEIGHTS = "model.safetensors"
Sources = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The source tensors' dtypes and shapes."""
Done = Callable[[], None]
"""Called after each rank."""


class Engine(Protocol):
    """An engine in this process, for one model: what an adapter room is.

    ``config`` is whatever the room hands over for one rank.
    """

    version: str

    def dtype(self, parallel: Parallel) -> torch.dtype:
        """The dtype in which it runs the model."""

    def architecture(self, parallel: Parallel) -> str:
        """The class of the model."""

    def rank(self, parallel: Parallel, rank: int) -> AbstractContextManager[Any]:
        """The process as one rank of some sizes; gives its configuration."""

    def construct(self, config: Any) -> torch.nn.Module:
        """The rank's model, on the meta device."""

    def load(self, config: Any, model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the model's weights as the engine would from files."""

    def untied(self, config: Any) -> bool:
        """Whether it loads a head of the checkpoint's own although config.json says that the embedding is the head."""

    def tied(self, config: Any, model: torch.nn.Module) -> tuple[str, str] | None:
        """The names of such a head and of the embedding, where it holds them once if they are equal."""

    def amendments(self, config: Any, sources: Sources) -> dict[str, Any]:
        """What config.json must say of shards."""


def trace(engine: Engine, sizes: Parallel, sources: Sources, done: Done) -> dict[str, Any]:
    """Every rank of some sizes: recipe, aliases, tensors that nothing fills."""
    folding = Folding()
    aliases: dict[str, str] = {}
    uninitialised: dict[str, int] = {}
    tied: tuple[str, str] | None = None
    for rank in sizes.ranks:
        log = Log()
        tape = Tape(log, Contents(log).value)
        with engine.rank(sizes, rank) as config:
            with META, tape, Literals(tape):
                model = engine.construct(config)
            built = set(model.state_dict())
            with tape:
                engine.load(config, model, _weights(log, sources))
            tied = tied or engine.tied(config, model)
            untied, amendments = engine.untied(config), engine.amendments(config, sources)
        targets, others = kept(log, model.state_dict())
        if late := sorted(targets.keys() - built):
            raise Refused(
                f"the engine makes the tensor {late[0]!r} only while it loads a whole checkpoint; its loader of shards "
                f"does not know it"
            )
        aliases.update(others)
        compiler = Compiler(log)
        mosaics: list[tuple[str, Mosaic]] = []
        for name, target in targets.items():
            compiled = compiler.target(name, target)
            mosaics.append((name, compiled.mosaic))
            if compiled.uninitialised:
                uninitialised[name] = max(compiled.uninitialised, uninitialised.get(name, 0))
        folding.add(rank, mosaics)
        del model, config, compiler, tape, log, mosaics, targets
        gc.collect()
        done()
    recipe = folding.recipe()
    return {
        "parallel": sizes.to_json(),
        "recipe": recipe_json.to_json(recipe),
        "amendments": amendments,
        "unused": sorted(set(sources) - used(recipe) - used_by_programs(recipe)),
        "aliases": aliases,
        "uninitialised": uninitialised,
        "untied": untied,
        **({} if tied is None else {"tied": list(tied)}),
    }


def shapes(engine: Engine, sizes: Parallel, done: Done) -> dict[str, Any]:
    """What every rank of some sizes holds: name -> dtype and shape, aliases left out."""
    ranks = []
    for rank in sizes.ranks:
        log = Log()
        tape = Tape(log, Contents(log).value)
        with engine.rank(sizes, rank) as config, META, tape, Literals(tape):
            model = engine.construct(config)
        targets, _ = kept(log, model.state_dict())
        done()
        ranks.append({name: [from_name(str(ref.dtype)).name, list(ref.shape)] for name, ref in targets.items()})
    return {"parallel": sizes.to_json(), "ranks": ranks}


def _weights(log: Log, sources: Sources) -> Iterator[tuple[str, torch.Tensor]]:
    """Each source tensor as a loader gets it, empty."""
    for name, (dtype, shape) in sources.items():
        tensor = torch.empty(shape, dtype=dtype, device=META)
        log.source(name, tensor)
        yield name, tensor


def _sources(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The source tensors, from the header of the skeleton's weights."""
    path = folder / WEIGHTS
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        text = file.read(header.length(first, size, WEIGHTS))
    return {entry.name: (entry.dtype.torch(), entry.shape) for entry in header.parse(text, size, WEIGHTS).entries}


def _engine(job: Mapping[str, Any]) -> Engine:
    room: Any
    if job["engine"] == "vllm":
        from shardtool.tracing import vllm as room
    elif job["engine"] == "sglang":
        from shardtool.tracing import sglang as room
    else:
        raise ValueError(f"{job['engine']!r} is not an engine that can be traced")
    engine: Engine = room.Engine(
        Path(job["folder"]),
        dtype=job["dtype"],
        trust_remote_code=job["trust_remote_code"],
        moe_backend=job["moe_backend"],
        load_format="auto" if job["do"] == "trace" else "sharded_state",
    )
    return engine


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job."""
    every = [parallel.from_json(value) for value in job["parallels"]]
    engine = _engine(job)
    done = _progress(sum(len(sizes.ranks) for sizes in every))
    if job["do"] == "trace":
        sources = _sources(Path(job["folder"]))
        layouts = [trace(engine, sizes, sources, done) for sizes in every]
    else:
        layouts = [shapes(engine, sizes, done) for sizes in every]
    return {
        "engine_version": engine.version,
        "class": engine.architecture(every[0]),
        "dtype": from_name(str(engine.dtype(every[0]))).name,
        "layouts": layouts,
    }


def _progress(total: int) -> Done:
    """Tell the parent how many ranks are done, among what the engine prints."""
    count = 0

    def done() -> None:
        nonlocal count
        count += 1
        sys.stdout.write(f"\nshardtool-progress {count} of {total}\n")
        sys.stdout.flush()

    return done


def main(job_path: str, out_path: str) -> int:
    """Do the job of a file."""
    try:
        with torch.no_grad():
            out = run(json.loads(Path(job_path).read_text(encoding="utf-8")))
    except ShardtoolError as error:
        out = {"error": {"kind": type(error).__name__, "message": str(error)}}
    except Exception as error:  # whatever the engine raises is an answer
        traceback.print_exc()
        out = {"error": {"kind": "engine", "message": f"{type(error).__name__}: {error}"}}
    Path(out_path).write_text(json.dumps(out, separators=(",", ":")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
