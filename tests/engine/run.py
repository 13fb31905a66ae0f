"""Every architecture of the zoo, made, loaded by vLLM, traced, sharded, compared: ``python -m tests.engine.run``.

For each architecture and variant and each size::

    make      a tiny checkpoint
    truth     vLLM's own ranks load it and save what they hold
    save      shardtool shards it, with the layout traced from vLLM and with the built-in one, if there is one
    compare   every rank's tensors, byte by byte
    verify    the shards against the checkpoint
    merge     the shards to a checkpoint: every tensor that was not dropped is the source's

Results go to ``results.json`` in a folder of vLLM's version in the work folder, as they come; ``--table`` writes them
between the markers of a document and prints which of its lines are others now, so that another version of vLLM is a
run of this command. vLLM is imported once for each rank of a size and once for all traces.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.engine.truth import ENVIRONMENT, Ranks, World, engine_version

LAYOUTS = ("traced", "builtin")


@contextlib.contextmanager
def tracing_here() -> Iterator[None]:
    """Let every trace run in a fork of one process that has imported vLLM, instead of one that starts from nothing."""
    parent: Any = import_module("shardtool.tracing.parent")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.engine.preload"])

    def run(command: Sequence[str], *_: object) -> tuple[int, list[str]]:
        process = forks.Process(target=_trace, args=tuple(command[-2:]), daemon=True)
        process.start()
        process.join()
        return process.exitcode or 0, ["the process ended"]

    before = parent._watched
    parent._watched = run
    try:
        yield
    finally:
        parent._watched = before


def _trace(job: str, out: str) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    from shardtool.tracing import child

    sys.exit(child.main(job, out))


def one(model: Path, world: World, ranks: Ranks, workdir: Path) -> dict[str, Any]:
    """Return the result of a model at one size: vLLM's class and error, and per layout what differs."""
    from shardtool.errors import ShardtoolError

    truth = ranks.load(model)
    found: dict[str, Any] = {"class": truth.engine_class, "error": truth.error}
    if truth.error:
        return found
    for layout in LAYOUTS:
        try:
            with TemporaryDirectory(dir=workdir) as scratch:
                found[layout] = _ours(model, world, layout, Path(scratch, "ours"), truth.folder)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            trace = "" if isinstance(error, ShardtoolError) else traceback.format_exc()
            found[layout] = {"refused": reason[:500], "trace": trace}
    return found


def _ours(model: Path, world: World, layout: str, ours: Path, truth: Path) -> dict[str, Any]:
    import shardtool
    from tests.engine.compare import compare

    shardtool.save(
        model,
        ours,
        tp=world.tp,
        pp=world.pp,
        expert_parallel=world.ep,
        layout=f"vllm:{layout}",
        keep_dropped=True,
    )
    compared = compare(ours, truth, world)
    found: dict[str, Any] = {"tensors": compared.tensors, "differences": compared.differences}
    if compared.uninitialised:
        found["uninitialised"] = compared.uninitialised
    try:
        report = shardtool.verify(ours, against=model)
        if not report.ok:
            found["verify"] = "; ".join(f"{file.key}: {why}" for file in report.files for why in file.why)[:500]
    except Exception as error:
        found["verify"] = f"{type(error).__name__}: {error}"[:500]
    merged = ours.with_name("merged")
    try:
        shardtool.merge(ours, merged)
        if wrong := _not_equal(model, merged):
            found["merge"] = wrong
    except Exception as error:
        found["merge"] = f"{type(error).__name__}: {error}"[:500]
    return found


def _not_equal(model: Path, merged: Path) -> str:
    """Return how a merged checkpoint's tensors differ from the source's; "" if they do not."""
    source, back = _tensors(model), _tensors(merged)
    missing = sorted(set(source) - set(back))
    more = sorted(set(back) - set(source))
    other = [name for name in source if name in back and source[name] != back[name]]
    words = [("missing", missing), ("too much", more), ("different", other)]
    return "; ".join(f"{len(names)} {word}: {', '.join(names[:3])}" for word, names in words if names)


def _tensors(folder: Path) -> dict[str, tuple[Any, Any, bytes]]:
    from safetensors import deserialize

    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in deserialize(file.read_bytes())
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the zoo; the exit code says whether everything that vLLM loads came out equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.run", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures; all of them if none is named")
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4, 3, 6, 1], metavar="N")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--expert-parallel", action="store_true", help="whole experts on each rank")
    parser.add_argument("--variants", default="ab", help="a: 6 kv heads; b: 2, and embeddings tied the other way")
    parser.add_argument("--workdir", type=Path, default=Path(".zoo"), help="models, truths and results.json go there")
    parser.add_argument("--table", type=Path, help="document whose table is written anew from all results")
    given = parser.parse_args(arguments)
    _quieten()
    from tests.engine import report
    from tests.engine.zoo import TPS, animals

    names = given.names or list(animals())
    place = given.workdir / f"vllm-{engine_version()}"
    place.mkdir(parents=True, exist_ok=True)
    kept = place / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    with tracing_here():
        for tp in given.tp:
            world = World(tp, given.pp, given.expert_parallel)
            with Ranks(world, place / "truth") as ranks:
                for name in names:
                    for variant in given.variants:
                        if tp in TPS[variant]:
                            found = _try(name, variant, world, ranks, given.workdir)
                            results[f"{name} {variant} {world}"] = found
                            print(report.line(name, variant, world, found), flush=True)
                            kept.write_text(json.dumps(results, indent=1))
    if given.table:
        print(*report.write(given.table, results), sep="\n")
    print(report.summary(results))
    return 0 if all(report.passed(found) for found in results.values()) else 1


def _try(name: str, variant: str, world: World, ranks: Ranks, workdir: Path) -> dict[str, Any]:
    from tests.engine.overrides import REFUSED
    from tests.engine.zoo import make

    try:
        model = make(name, variant, workdir / "models")
    except Exception as error:
        text = " ".join(str(error).split())
        return {"class": "", "error": f"transformers cannot make it: {type(error).__name__}: {text}"[:400]}
    found = one(model, world, ranks, workdir)
    if name in REFUSED:
        found["expected"] = REFUSED[name]
    return found


def _quieten() -> None:
    """Only our own lines are printed."""
    os.environ.update(ENVIRONMENT)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from tests.engine import stubs

    stubs.install()
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
