"""File names of shards: the pattern that engines use, checked before anything is written.

Fields are vLLM's: ``{rank}`` and ``{tp_rank}`` (the tensor parallel rank), ``{pp_rank}``, ``{part}``. An engine finds a
rank's files by putting ``*`` for the part, so that no rank's pattern may match another rank's file.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardtool.errors import PlanError, UsageError

DEFAULT = "model-rank-{rank}-part-{part}.safetensors"
DEFAULT_PP = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
RANK_FIELDS = ("rank", "tp_rank", "pp_rank")
FIELDS = (*RANK_FIELDS, "part")
_WIDTH = re.compile(r"0?[1-9]\d?d?")
RESERVED = ("shardtool.json", ".shardtool/")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A checked pattern. ``text`` is as the engine takes it."""

    text: str
    fields: frozenset[str]

    def key(self, tp_rank: int, part: int, pp_rank: int = 0) -> str:
        """The name of one part of one rank."""
        return self.text.format(rank=tp_rank, tp_rank=tp_rank, pp_rank=pp_rank, part=part)

    def glob(self, tp_rank: int, pp_rank: int = 0) -> str:
        """What an engine looks for to find all parts of one rank."""
        return self.text.format(rank=tp_rank, tp_rank=tp_rank, pp_rank=pp_rank, part="*")

    def regex(self) -> re.Pattern[str]:
        """Matches the names that this pattern makes, with the fields as groups."""
        made = ""
        seen: dict[str, str | None] = {}
        for literal, field, spec, _ in string.Formatter().parse(self.text):
            made += re.escape(literal)
            if field is None:
                continue
            digits = _digits((spec or "").rstrip("d"))
            again = f"(?P={field})" if seen.get(field) == spec else f"(?:{digits})"
            made += again if field in seen else f"(?P<{field}>{digits})"
            seen.setdefault(field, spec)
        return re.compile(made)


def _digits(width: str) -> str:
    """Matches a number as a format of this width writes it.

    Filled up with zeros if the width starts with one, or spaces.
    """
    if not width:
        return r"0|[1-9]\d*"
    n = int(width)
    spaced = [] if width.startswith("0") else [rf" {{{k}}}\d{{{n - k}}}" for k in range(1, n)]
    return "|".join([rf"\d{{{n},}}", *spaced])


def parse(text: str, *, tp: int, pp: int = 1) -> Pattern:
    """Check a pattern for a tp x pp layout. Raises ``UsageError`` that says which part of it is not allowed."""
    say = f"--pattern {text!r}"
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UsageError(f"{say} is not a pattern: {error}") from None
    fields = set()
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if field not in FIELDS:
            raise UsageError(f"{say} has the field {{{field}}}; allowed are {', '.join('{' + f + '}' for f in FIELDS)}")
        if conversion:
            raise UsageError(f"{say} converts {{{field}}} with !{conversion}; conversions are not allowed")
        if spec and field == "part":
            raise UsageError(f"{say} formats {{part}}, which engines replace by *; use a plain {{part}}")
        if spec and not _WIDTH.fullmatch(spec):
            raise UsageError(
                f"{say} formats {{{field}}} with {spec!r}; only a width such as {{{field}:02d}} is allowed"
            )
        fields.add(field)
    if "pp_rank" in fields and pp == 1:
        raise UsageError(f"{say} has {{pp_rank}}, but there is no pipeline parallelism; leave it out")
    if pp > 1 and "pp_rank" not in fields:
        raise UsageError(f"{say} lacks {{pp_rank}}, which --pp {pp} needs")
    if tp > 1 and not fields & {"rank", "tp_rank"}:
        raise UsageError(f"{say} lacks {{rank}}, which --tp {tp} needs")
    made = Pattern(text, frozenset(fields))
    try:
        key = made.key(0, 0)
    except (ValueError, IndexError, KeyError) as error:
        raise UsageError(f"{say} is not a pattern: {error}") from None
    if key.startswith("/") or "\\" in key or "\0" in key or any(p in ("", ".", "..") for p in key.split("/")):
        raise UsageError(f"{say} leaves the output folder; use a relative name without '.' or '..'")
    if key.startswith(RESERVED[1]) or key == RESERVED[0]:
        raise UsageError(f"{say} names shardtool's own files; choose another name")
    if not key.endswith(".safetensors"):
        raise UsageError(f"{say} must end in .safetensors, or engines will not read the files")
    return made


def matched_whole(uri: str) -> bool:
    """Whether engines match ``*`` + pattern against the whole key at this address, as vLLM does in S3."""
    return uri.lower().startswith("s3://")


def check_names(
    pattern: Pattern, ranks: Sequence[tuple[int, int]], parts: int, taken: Iterable[str], *, whole_key: bool
) -> None:
    """Refuse names that collide and globs that reach into another rank.

    ``ranks``: (tp rank, pp rank) of every rank. ``taken``: names of side files. ``whole_key``: the output is an object
    store, where engines match ``*`` + pattern against the whole key, sub-folders and prefixes included.
    """
    owner: dict[str, tuple[int, int]] = {}
    for tp_rank, pp_rank in ranks:
        for part in range(parts):
            key = pattern.key(tp_rank, part, pp_rank)
            if key in owner:
                raise PlanError(
                    f"--pattern {pattern.text!r} gives two files the name {key}; add {{part}} and the ranks, "
                    f"or use fewer parts"
                )
            owner[key] = (tp_rank, pp_rank)
    for key in taken:
        if key in owner:
            raise PlanError(f"--pattern {pattern.text!r} gives a shard the name of the side file {key}")
    for tp_rank, pp_rank in ranks:
        glob = pattern.glob(tp_rank, pp_rank)
        for key, whose in owner.items():
            hit = fnmatchcase(key, "*" + glob) if whole_key else _glob_match(key, glob)
            if hit != (whose == (tp_rank, pp_rank)):
                what = f"misses its own file {key}" if not hit else f"also matches {key} of rank {whose[0]}"
                raise PlanError(
                    f"--pattern {pattern.text!r}: an engine would look for rank {tp_rank} with {glob}, which {what}; "
                    "put a separator between the fields and no *, ? or [ in the name"
                )


def _glob_match(key: str, glob: str) -> bool:
    """Whether ``glob.glob`` would find the file: a star does not cross folders."""
    names, globs = key.split("/"), glob.split("/")
    return len(names) == len(globs) and all(map(fnmatchcase, names, globs))
