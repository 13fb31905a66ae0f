"""The built-in tables: how vLLM names and cuts the models that people serve. A new family is a few lines.

``find`` gives the table of a config for one engine version; ``docs/layouts.md`` explains the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardtool.errors import UnsupportedModel, UsageError
from shardtool.layouts.tables import classic, llama, mla, moe, vision
from shardtool.layouts.tables.language import Family, between, numbers

ENGINE = "vllm"
ENGINE_VERSION = "0.32"
VERSIONS = ("0.24", "0.27", "0.31", "0.32")
"""The engine versions whose layouts the tables say. Those between two of them have not been looked at."""

FAMILIES: tuple[Family, ...] = (*llama.FAMILIES, *classic.FAMILIES, *vision.FAMILIES, *moe.FAMILIES, *mla.FAMILIES)


def known(engine_version: str = ENGINE_VERSION) -> tuple[str, ...]:
    """Every architecture that has a table for an engine version."""
    return tuple(sorted(name for family in _families(engine_version) for name in family.architectures))


def find(config: Mapping[str, Any], engine_version: str = ENGINE_VERSION) -> Family:
    """The table of a config's architecture: the first of ``architectures`` that is known, as engines choose it.

    Raises ``UnsupportedModel`` where there is none, and ``UsageError`` for an engine version that no table knows.
    """
    names = config.get("architectures")
    names = [n for n in names if isinstance(n, str)] if isinstance(names, list) else []
    families = _families(engine_version)
    for name in names:
        for family in families:
            if name in family.architectures:
                return family.at(engine_version)
    shown = (name if name.isprintable() else repr(name) for name in names)
    said = f"the architecture {', '.join(shown)}" if names else "no architecture in config.json"
    raise UnsupportedModel(f"{said} is not one that shardtool knows; known are {', '.join(known(engine_version))}")


def _families(engine_version: str) -> tuple[Family, ...]:
    """The tables of an engine version."""
    try:
        version = numbers(engine_version)
    except ValueError:
        version = ()
    if version not in map(numbers, VERSIONS):
        raise UsageError(
            f"the built-in tables know the layouts of {ENGINE} {', '.join(VERSIONS)}, not of {engine_version!r:.40}; "
            f"trace that version instead"
        )
    return tuple(family for family in FAMILIES if between(family.since, engine_version, family.until))
