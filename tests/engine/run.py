"""Every architecture of the zoo, made, loaded by vLLM, traced, sharded, compared: ``python -m tests.engine.run``.

For each architecture and variant and each size::

    make      a tiny checkpoint
    truth     vLLM's own ranks load it and save what they hold
    save      shardtool shards it, with the layout traced from vLLM and with the built-in one, if there is one
    compare   every rank's tensors, byte by byte
    verify    the shards against the checkpoint
    merge     the shards to a checkpoint: every tensor that was not dropped is the source's

Results go to ``results.json`` in the work folder as they come; ``--table`` writes them between the markers of a
document. vLLM is started once for each size and once for tracing, not once for each model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.engine.truth import ENVIRONMENT, Ranks, World

LAYOUTS = ("traced", "builtin")


class Tracer:
    """A process in which vLLM is started once; each trace runs in it as it would in a process of its own.

    ``parent`` starts a process for each trace; within ``here`` it asks this one instead.
    """

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Let all traces run in this process of ours."""
        from shardtool.trace import parent

        before = parent._watched
        parent._watched = lambda command, *_: self._ask(command[-2:])
        try:
            yield
        finally:
            parent._watched = before
            self._stop()

    def _ask(self, job: Sequence[str]) -> tuple[int, list[str]]:
        if self._process is None:
            self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
            self._process = multiprocessing.get_context("spawn").Process(target=_trace, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send(list(job))
        try:
            self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._stop()
            return code, ["the process ended"]
        return 0, []

    def _stop(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None


def _trace(pipe: Any) -> None:
    """Be the tracer's process."""
    os.environ.update(ENVIRONMENT)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    from shardtool.trace import child

    with contextlib.suppress(EOFError):
        while True:
            child.main(*pipe.recv())
            pipe.send(True)


def one(model: Path, world: World, ranks: Ranks, workdir: Path) -> dict[str, Any]:
    """Return the result of a model at one size: vLLM's class and error, and per layout what differs."""
    truth = ranks.load(model)
    found: dict[str, Any] = {"class": truth.engine_class, "error": truth.error}
    if truth.error:
        return found
    for layout in LAYOUTS:
        ours = workdir / "ours"
        shutil.rmtree(ours, ignore_errors=True)
        try:
            found[layout] = _ours(model, world, layout, ours, truth.folder)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            trace = "" if _is_ours(error) else traceback.format_exc()
            found[layout] = {"refused": reason[:500], "trace": trace}
    return found


def _is_ours(error: Exception) -> bool:
    from shardtool.errors import ShardtoolError

    return isinstance(error, ShardtoolError)


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
            found["verify"] = str(report)[:500]
    except Exception as error:
        found["verify"] = f"{type(error).__name__}: {error}"[:500]
    merged = ours.with_name("merged")
    shutil.rmtree(merged, ignore_errors=True)
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


def passed(found: Mapping[str, Any], layout: str) -> bool:
    """Whether shards of a layout equal vLLM's, verify against their source and merge to it."""
    ours = found.get(layout, {"refused": "not tried"})
    return not any(ours.get(key) for key in ("refused", "differences", "verify", "merge"))


def table(results: Mapping[str, Mapping[str, Any]], engine: str) -> list[str]:
    """Return the lines of the table: one for each architecture."""
    lines = [
        f"{engine}",
        "",
        "| architecture | kind | vLLM's class | built in | traced | tp | why not |",
        "|---|---|---|---|---|---|---|",
    ]
    from tests.engine.zoo import animals

    for name, animal in animals().items():
        mine = {key: value for key, value in results.items() if key.split()[0] == name}
        if not mine:
            continue
        loaded = {key: value for key, value in mine.items() if not value["error"]}
        sizes = sorted({key.split()[2].removeprefix("tp") for key in loaded if passed(loaded[key], "traced")}, key=_size)
        failed = sorted({key.split()[2].removeprefix("tp") for key in loaded if not passed(loaded[key], "traced")}, key=_size)
        classes = {value["class"] for value in loaded.values()}
        builtin = [passed(value, "builtin") for value in loaded.values() if "No table" not in str(value.get("builtin"))]
        tabled = [value for value in loaded.values() if "refused" not in value.get("builtin", {"refused": ""})]
        reasons = {_short(value["error"]) for value in mine.values() if value["error"]} if not loaded else set()
        for key, value in loaded.items():
            if not passed(value, "traced"):
                reasons.add(_short(_why(value["traced"])))
        del builtin
        lines.append(
            f"| {name} | {animal.kind} | {', '.join(sorted(classes)) or animal.engine_class} "
            f"| {'yes' if tabled and all(passed(v, 'builtin') for v in tabled) else 'no'} "
            f"| {'equal' if sizes and not failed else 'differs' if failed else 'vLLM does not load it'} "
            f"| {', '.join(sizes)} | {'; '.join(sorted(reasons))} |"
        )
    return lines
