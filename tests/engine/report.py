"""The results of a run, as lines, as a table of a document, as counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from difflib import unified_diff
from pathlib import Path
from typing import Any

from tests.engine.truth import World
from tests.engine.zoo import animals

BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
Results = Mapping[str, Mapping[str, Any]]


def wrong(found: Mapping[str, Any], layout: str) -> str:
    """Return what is wrong with the shards of a layout, in one line; "" if nothing is."""
    ours = found.get(layout)
    if ours is None:
        return "not tried"
    if "refused" in ours:
        return str(ours["refused"])
    if ours["differences"]:
        return f"{len(ours['differences'])} differences: {ours['differences'][0]}"
    return "; ".join(f"{step}: {ours[step]}" for step in ("verify", "merge") if ours.get(step))


def tabled(found: Mapping[str, Any]) -> bool:
    """Whether there is a built-in table for the model."""
    return "refused" not in found.get("builtin", {"refused": ""})


def passed(found: Mapping[str, Any]) -> bool:
    """Whether all is well: vLLM does not load it, or every layout that there is equals what vLLM holds.

    A model that vLLM could not load again is refused, for the reason that is expected.
    """
    if "expected" in found:
        return found["expected"] in found.get("traced", {}).get("refused", "") and not tabled(found)
    return bool(found["error"]) or not (wrong(found, "traced") or (tabled(found) and wrong(found, "builtin")))


def line(name: str, variant: str, world: World, found: Mapping[str, Any]) -> str:
    """Return the line of one result."""
    if found["error"]:
        return f"-     {name} {variant} {world}: {found['error']}"
    ours = found["traced"]
    state = wrong(found, "traced") or f"{ours['tensors']} tensors equal"
    if "uninitialised" in ours:
        state += f", {len(ours['uninitialised'])} uninitialised in vLLM"
    builtin = (wrong(found, "builtin") or "equal") if tabled(found) else "none"
    return f"{'OK   ' if passed(found) else 'WRONG'} {name} {variant} {world}: {state}; built in: {builtin}"


def summary(results: Results) -> str:
    """Return the counts: architectures, and models at a size."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for key, found in results.items():
        by_name.setdefault(key.split()[0], []).append(found)
    loaded = {name: [found for found in all_ if not found["error"]] for name, all_ in by_name.items()}
    right = [name for name, all_ in loaded.items() if all_ and all(passed(found) for found in all_)]
    states = Counter("not loaded" if f["error"] else "equal" if passed(f) else "wrong" for f in results.values())
    return (
        f"{len(by_name)} architectures: vLLM loads {sum(map(bool, loaded.values()))}, equal everywhere {len(right)}, "
        f"with a built-in table {sum(any(map(tabled, all_)) for all_ in loaded.values())}; "
        f"models at a size: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}"
    )


def write(document: Path, results: Results) -> list[str]:
    """Put the table between the markers of a document; return the lines that are gone (-) and new (+)."""
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{document} lacks the lines {BEGIN} and {END}, between which the table goes")
    new = table(results)
    document.write_text("\n".join([before + begin, *new, end + after]), encoding="utf-8")
    return [line for line in unified_diff(old.split("\n")[1:-1], new, n=0, lineterm="") if line[:2] in ("-|", "+|")]


def table(results: Results) -> list[str]:
    """Return a table with one line for each architecture."""
    rows = ["| architecture | in vLLM | layout | equal at tp | remark |", "|---|---|---|---|---|"]
    for name, animal in animals().items():
        mine = {key.split()[2]: found for key, found in results.items() if key.split()[0] == name}
        if not mine:
            continue
        loaded = {size: found for size, found in mine.items() if not found["error"]}
        equal = sorted(size.removeprefix("tp") for size, found in loaded.items() if passed(found))
        layout = "traced" if loaded else "none"
        if any(tabled(found) for found in loaded.values()):
            layout = "built in, traced"
        engine_class = next((found["class"] for found in loaded.values()), animal.engine_class.rpartition(".")[2])
        remarks = {wrong(found, "traced") for found in loaded.values()} | {
            found["error"] for found in mine.values() if not loaded
        }
        remark = "; ".join(sorted(_cell(text) for text in remarks if text))
        rows.append(f"| {name} | {engine_class} | {layout} | {', '.join(equal)} | {remark} |")
    return rows


_FOLDER = re.compile(r"(?<![\w:/])(?:/[\w.-]+)+/")


def _cell(text: str) -> str:
    """A reason as one cell; folders of this machine say nothing to others."""
    return _FOLDER.sub("", text).replace("|", "\\|").replace("<", "&lt;")[:160]
