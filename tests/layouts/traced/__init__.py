"""What engines were seen to do with tiny models: layout files that the built-in tables are held to, without the engine.

A file lies at ``<engine>-<version>/<name>.json`` and holds the model's config.json and the layout file of its trace,
which has the shapes of all source tensors too. So the model can be traced again from the file alone::

    python -m tests.layouts.traced sglang-0.5.23 [--engine-python PATH] [--update] [name ...]

prints what the installed engine does otherwise, and ``--update`` writes it down.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardtool.layouts import file as files
from shardtool.layouts.base import Model
from shardtool.layouts.file import FileLayout

FOLDER = Path(__file__).parent
SETS = tuple(sorted(path.name for path in FOLDER.iterdir() if any(path.glob("*.json"))))
"""``<engine>-<version>`` of all that there are."""


@dataclass(frozen=True, slots=True)
class Golden:
    """A tiny model and what an engine made of it."""

    config: dict[str, Any]
    layout: FileLayout

    @property
    def model(self) -> Model:
        """The model as a layout is given it; no two of its tensors are equal."""
        return Model(self.config, self.layout.tensors, self.layout.dtype)


def names(group: str) -> tuple[str, ...]:
    """The models of an engine's version."""
    return tuple(sorted(path.stem for path in (FOLDER / group).glob("*.json")))


def read(group: str, name: str) -> Golden:
    """One of them."""
    path = FOLDER / group / f"{name}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    config = table.pop("config")
    return Golden(config, files.decode(json.dumps(table).encode(), path.name))


def write(group: str, name: str, golden: Golden) -> None:
    """Keep one: a line for each part, and one for each rule of a recipe."""
    path = FOLDER / group / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    table = {"config": golden.config, **json.loads(files.encode(golden.layout))}
    lines = [f"{json.dumps(key)}: {_line(value)}" for key, value in table.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _line(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"))
    return text.replace('{"name":', '\n  {"name":') if isinstance(value, list) else text
