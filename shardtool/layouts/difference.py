"""What changed between two layouts of one model, as sentences: names, cuts, dtypes, constants, what is dropped.

A change of engine version is a re-run of the trace and a look at this::

    recipes    two recipes: tensors that are new, gone, renamed or made otherwise
    outlines   two outlines: also what is dropped, which sources are copies, what config.json must say
    files      two layout files, at all sizes that both hold: what is true at all of them is said once

Two tensors are the same when every element of theirs comes from the same place, however the pieces are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from shardtool.errors import UnsupportedTransform
from shardtool.fold import number_in, slotted
from shardtool.layouts.file import FileLayout, Traced
from shardtool.plan import Piece, Program, Stored, Tensor
from shardtool.recipe import SLOT, Recipe, Rule
from shardtool.window import join, simplify

Held = Mapping[int, Tensor]
"""What each rank holds of one target."""

SHOWN = 4
"""Sources that a sentence names; of more it tells how many there are."""


class Said(Protocol):
    """What a layout says of a model at some sizes: an ``Outline``, or what was traced."""

    @property
    def recipe(self) -> Recipe:
        """Every rank's tensors."""

    @property
    def dropped(self) -> Mapping[str, str]:
        """Source tensor -> why."""

    @property
    def copies(self) -> Mapping[str, str]:
        """Source tensor -> the one that it equals."""

    @property
    def amendments(self) -> Mapping[str, Any]:
        """Keys of config.json -> what they must be."""


def files(old: FileLayout, new: FileLayout) -> list[str]:
    """What changed between two layout files of one model: the engine, the model's class, and what it makes of it."""
    found = []
    for what, was, now in (
        ("engine", f"{old.engine} {old.engine_version}", f"{new.engine} {new.engine_version}"),
        ("class of the model", old.model_class, new.model_class),
        ("dtype", old.dtype.name, new.dtype.name),
    ):
        if was != now:
            found.append(f"the {what} is {now} instead of {was}")
    other = [
        name
        for name in sorted(old.tensors.keys() | new.tensors.keys())
        if old.tensors.get(name) != new.tensors.get(name)
    ]
    if other:
        found.append(f"they are of different checkpoints: {len(other)} source tensors differ, first {other[0]!r}")
    before, after = ({one.parallel: one for one in layout.traced} for layout in (old, new))
    said = {sizes: traces(before[sizes], after[sizes]) for sizes in before if sizes in after}
    everywhere = [s for s in next(iter(said.values()), []) if all(s in of for of in said.values())]
    found += everywhere
    for sizes, sentences in said.items():
        found += [f"at {sizes}: {sentence}" for sentence in sentences if sentence not in everywhere]
    for these, others, what in ((before, after, "old"), (after, before, "new")):
        if alone := [str(sizes) for sizes in these if sizes not in others]:
            found.append(f"only the {what} layout is for {', '.join(alone)}")
    return found


def traces(old: Traced, new: Traced) -> list[str]:
    """What changed between two traces at one size."""
    return [
        *outlines(old, new),
        *_mappings(old.aliases, new.aliases, "the name {} shares the memory", lambda kept: f" of {kept!r}"),
        *_mappings(
            old.uninitialised, new.uninitialised, "elements of {} are left as memory happens to be", lambda n: f": {n}"
        ),
    ]


def outlines(old: Said, new: Said) -> list[str]:
    """What changed between two outlines of one model, at one size. Reasons are words and not looked at."""
    before, after = (dict.fromkeys(one.dropped, "") for one in (old, new))
    return [
        *recipes(old.recipe, new.recipe),
        *_mappings(before, after, "the source tensor {} is dropped", lambda _why: ""),
        *_mappings(old.copies, new.copies, "the source tensor {} is left out as a copy", lambda of: f" of {of!r}"),
        *_mappings(
            old.amendments, new.amendments, "the setting {} of config.json is made", lambda value: f" {value!r}"
        ),
    ]


def recipes(old: Recipe, new: Recipe) -> list[str]:
    """What changed between two recipes: first the tensors that both have, then the renamed, the gone and the new."""
    before, after = _changed(old, set(new.rules)), _changed(new, set(old.rules))
    found = _Sentences()
    for name in before.keys() & after.keys():
        for change in _changes(before[name], after[name]):
            found.add(0, name, "", change)
    gone = {name: held for name, held in before.items() if name not in after}
    fresh = {name: held for name, held in after.items() if name not in before}
    for name, now in _renamed(gone, fresh):
        found.add(1, name, now, "is now called")
        del gone[name], fresh[now]
    for name, held in gone.items():
        found.add(2, name, "", "is gone" + _content(held))
    for name, held in fresh.items():
        found.add(3, name, "", "is new" + _content(held))
    return list(found)


def _changed(recipe: Recipe, others: set[Rule]) -> dict[str, dict[int, Tensor]]:
    """The targets of the rules that the other recipe does not have just so."""
    mine = Recipe(tuple(rule for rule in recipe.rules if rule not in others))
    found: dict[str, dict[int, Tensor]] = {}
    for group in mine.by_name():
        for rank, tensor in group:
            found.setdefault(tensor.name, {})[rank] = tensor
    return found


class _Sentences:
    """Changes of single tensors in the making of sentences: those that differ in the layer's number are one."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str, str, str], list[int]] = {}

    def add(self, order: int, name: str, now: str, change: str) -> None:
        """One change; ``now`` is another name that belongs to it."""
        found = number_in(name)
        if found is None:
            self._found.setdefault((order, name, now, change), [])
            return
        number = found[1]
        key = order, slotted(name, number, SLOT), slotted(now, number, SLOT), _slot(change, number)
        self._found.setdefault(key, []).append(number)

    def __iter__(self) -> Iterator[str]:
        for (_, name, now, change), numbers in sorted(self._found.items()):
            layers = f" ({SLOT[1:-1]} {_runs(numbers)})" if numbers else ""
            yield f"{name!r}{layers} {change}" + (f" {now!r}" if now else "")


def _slot(text: str, number: int) -> str:
    """The names in a sentence with the layer's number made a slot."""
    parts = text.split("'")
    return "'".join(slotted(part, number, SLOT) if place % 2 else part for place, part in enumerate(parts))


def _changes(old: Held, new: Held) -> Iterator[str]:
    """How a tensor that both have is made otherwise, in words."""
    if len({t.dtype for t in old.values()} | {t.dtype for t in new.values()}) > 1:
        yield f"is {next(iter(new.values())).dtype.name} instead of {next(iter(old.values())).dtype.name}"
    for ranks, now, all_ranks in (
        (sorted(old.keys() - new.keys()), "no longer", old),
        (sorted(new.keys() - old.keys()), "now", new),
    ):
        if ranks:
            yield f"is {now} held by {_ranks(ranks, all_ranks)}"
    by_change: dict[str, list[int]] = {}
    seen: dict[tuple[int, int], str] = {}
    both = sorted(old.keys() & new.keys())
    for rank in both:
        pair = id(old[rank]), id(new[rank])
        if pair not in seen:
            seen[pair] = _change(old[rank], new[rank])
        if seen[pair]:
            by_change.setdefault(seen[pair], []).append(rank)
    for change, ranks in by_change.items():
        yield change if len(ranks) == len(both) else f"{change}, on {_ranks(ranks, both)}"


def _change(old: Tensor, new: Tensor) -> str:
    """How one rank's tensor differs, the dtype aside; empty where it does not."""
    if old.shape != new.shape:
        return f"has the shape {list(new.shape)} instead of {list(old.shape)}"
    before, after = _by_source(old), _by_source(new)
    if before.keys() != after.keys():
        return f"is made of {_sources(after)} instead of {_sources(before)}"
    other = {source: after[source] for source in before if not _same(before[source], after[source])}
    if other:
        return f"takes other elements of {_sources(other)}"
    if old.fill != new.fill:
        return f"is filled with {_fill(new.fill)} instead of {_fill(old.fill)}"
    return ""


def _by_source(tensor: Tensor) -> dict[str | Program | Stored, list[Piece]]:
    found: dict[str | Program | Stored, list[Piece]] = {}
    for piece in tensor.pieces():
        found.setdefault(piece.source, []).append(piece)
    return found


def _same(old: Sequence[Piece], new: Sequence[Piece]) -> bool:
    """Whether pieces of one source put the same elements in the same places."""
    pairs = [sorted((simplify(p.dst, p.src) for p in pieces), key=repr) for pieces in (old, new)]
    if pairs[0] == pairs[1]:
        return True
    equal = 0
    try:
        for a in old:
            for b in new:
                met = join(a.dst, a.src, b.dst, b.src)
                equal += sum(mine.size for mine, other in met if mine == other)
    except UnsupportedTransform:
        return False
    return equal == sum(p.dst.size for p in old) == sum(p.dst.size for p in new)


def _renamed(gone: Mapping[str, Held], fresh: Mapping[str, Held]) -> list[tuple[str, str]]:
    """The pairs of names that mean the same tensor: of the same content, where only one on each side has it.

    Constants are alike, so names that end alike in the same layer are tried first.
    """
    found: list[tuple[str, str]] = []
    left, right = dict(gone), dict(fresh)
    for key in (_ending, _anything):
        olds, news = _unique(left, key), _unique(right, key)
        for content, name in olds.items():
            now = news.get(content, "")
            if name and now and not any(_changes(left[name], right[now])):
                found.append((name, now))
                del left[name], right[now]
    return found


def _ending(name: str) -> Hashable:
    """The layer and the last part of a name."""
    found = number_in(name)
    return None if found is None else found[1], name.rpartition(".")[2]


def _anything(_name: str) -> Hashable:
    return None


def _unique(targets: Mapping[str, Held], key: Callable[[str], Hashable]) -> dict[Hashable, str]:
    """Content and key -> the name; empty where several have them."""
    found: dict[Hashable, str] = {}
    for name, held in targets.items():
        content = tuple((rank, t.dtype, t.shape, t.fill, frozenset(_by_source(t))) for rank, t in sorted(held.items()))
        found[content, key(name)] = "" if (content, key(name)) in found else name
    return found


def _content(held: Held) -> str:
    """What a tensor is, in words."""
    shapes = {t.shape for t in held.values()}
    one = next(iter(held.values()))
    sources = sorted({_source(source) for t in held.values() for source in _by_source(t)})
    shape = f" {list(one.shape)}" if len(shapes) == 1 else ""
    of = f" of {_few(sources)}" if sources else f" of {_fill(one.fill)}"
    return f": {one.dtype.name}{shape}{of}"


def _mappings(old: Mapping[str, Any], new: Mapping[str, Any], what: str, why: Callable[[Any], str]) -> Iterator[str]:
    """What changed between two tables of names with a value each."""
    found: dict[tuple[str, str], list[int]] = {}
    for name in sorted(old.keys() | new.keys()):
        if name in old and name in new:
            if old[name] == new[name]:
                continue
            change = f"{why(new[name])} (it was{why(old[name])})"
        else:
            change = f" now{why(new[name])}" if name in new else f" no longer{why(old[name])}"
        found_number = number_in(name)
        number = -1 if found_number is None else found_number[1]
        template = name if number < 0 else slotted(name, number, SLOT)
        found.setdefault((template, _slot(change, number)), []).extend([] if number < 0 else [number])
    for (template, change), numbers in found.items():
        layers = f" ({SLOT[1:-1]} {_runs(numbers)})" if numbers else ""
        yield what.format(f"{template!r}{layers}") + change


def _source(source: str | Program | Stored) -> str:
    if isinstance(source, Program):
        names = sorted(set(source.sources()))
        return f"the {source.op} of {_few([repr(name) for name in names])}" if names else "constants"
    return repr(source)


def _sources(sources: Iterable[str | Program | Stored]) -> str:
    said = sorted({_source(source) for source in sources})
    return _few(said) if said else "no source"


def _few(said: Sequence[str]) -> str:
    shown = said if len(said) <= SHOWN else said[: SHOWN - 1]
    more = f" and {len(said) - len(shown)} more" if len(shown) < len(said) else ""
    return ", ".join(shown) + more


def _fill(fill: float | None) -> str:
    return "nothing" if fill is None else f"{fill:g}"


def _ranks(ranks: Sequence[int], of: Iterable[int]) -> str:
    if sorted(ranks) == sorted(of):
        return "every rank"
    return f"rank{'s' if len(ranks) > 1 else ''} {_runs(ranks)}"


def _runs(numbers: Iterable[int]) -> str:
    """Numbers as people write them: 0-3, 7."""
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
