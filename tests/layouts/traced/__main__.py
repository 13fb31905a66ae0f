"""Trace the kept models again with an installed engine, say what it does otherwise, and keep it if asked.

With ``--update``, names of ``tests/layouts/variants.py`` that are not kept yet are traced too.
"""

from __future__ import annotations

import argparse
import json
import sys

from shardtool.layouts import difference
from shardtool.layouts.file import FileLayout, Traced
from shardtool.parallel import Parallel
from shardtool.recipe import Recipe
from shardtool.tracing import parent
from tests.layouts import mixtures, traced, variants
from tests.layouts.traced import Golden


def again(kept: Golden, python: str | None) -> Golden:
    """The same model, traced now."""
    job = parent.Job(
        kept.layout.engine,
        "the kept model",
        json.dumps(kept.config),
        kept.layout.tensors,
        tuple(one.parallel for one in kept.layout.traced),
    )
    return Golden(kept.config, parent.trace(job, python=python))


def first(name: str, group: str) -> Golden:
    """A model that was not traced yet, with the sizes for which it shall be; its recipes are empty."""
    model = variants.model(name)
    engine, _, version = group.partition("-")
    sizes = [Parallel(1), Parallel(4), *([Parallel(2, 2)] if engine == "vllm" else [])]
    if name in mixtures.KINDS and engine == "vllm":
        sizes.append(Parallel(2, ep=True))
    empty = tuple(Traced(size, Recipe(())) for size in sizes)
    return Golden(dict(model.config), FileLayout(engine, version, "", model.dtype, model.tensors, empty))


def main() -> int:
    """The exit code is 1 where something is otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=traced.SETS)
    parser.add_argument("name", nargs="*", help="default: all")
    parser.add_argument("--engine-python", help="a Python that has the engine")
    parser.add_argument("--update", action="store_true")
    asked = parser.parse_intermixed_args()
    changed = 0
    for name in asked.name or traced.names(asked.group):
        fresh = asked.update and name not in traced.names(asked.group)
        kept = first(name, asked.group) if fresh else traced.read(asked.group, name)
        now = again(kept, asked.engine_python)
        found = difference.files(kept.layout, now.layout)
        changed += bool(found)
        sys.stdout.write("".join(f"{name}: {sentence}\n" for sentence in found or ["as it was"]))
        if asked.update and found:
            traced.write(asked.group, name, now)
    return int(changed > 0 and not asked.update)


if __name__ == "__main__":
    sys.exit(main())
