"""Trace the kept models again with an installed engine, say what it does otherwise, and keep it if asked."""

from __future__ import annotations

import argparse
import json
import sys

from shardtool.layouts import difference
from shardtool.tracing import parent
from tests.layouts import traced
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
        kept = traced.read(asked.group, name)
        now = again(kept, asked.engine_python)
        found = difference.files(kept.layout, now.layout)
        changed += bool(found)
        sys.stdout.write("".join(f"{name}: {sentence}\n" for sentence in found or ["as it was"]))
        if asked.update and found:
            traced.write(asked.group, name, now)
    return int(changed > 0 and not asked.update)


if __name__ == "__main__":
    sys.exit(main())
