"""What is written down in Redis about an object, and under which keys its bytes are. Pure data.

Below the name ``N`` of a checkpoint::

    N/objects            a hash: an object's key -> its Record. What is not in it does not exist
    N/writers            a hash: a writer's id -> its Entry, from before its first byte is sent until its bytes are gone
    N/chunks/<id>/<n>    the bytes that the writer with this id sent: piece n of its object
    N/keys/rank_R/...    for SGLang, see ``stores.redis.values``
    N/files/...          likewise

A writer's id is part of every key that it writes, so that a new version of an object never touches the bytes of the
old one, and replacing a record replaces the object. An id in ``N/writers`` whose record is not in ``N/objects`` is
what a killed writer left, or belongs to one that is at work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardtool.errors import FormatError

CHUNK = (4 << 20) - 4096
"""Bytes of a chunk at most. With what Redis adds it fits a size class of its allocator; larger ones are slower too."""
UNIT = 2 * CHUNK
"""Bytes of the slices that a writer wants: so many chunks are sent before the first reply is waited for."""
_FORMAT = 1
_PLACES = ("chunks", "rank", "file")


@dataclass(frozen=True, slots=True)
class Extent:
    """Some bytes of a value: those from ``start`` to ``start + size``; ``whole``: it has no others."""

    key: str
    start: int
    size: int
    whole: bool = False


Layout = list[tuple[int, Extent]]
"""Where the bytes of an object are: offsets in the object, in order, and what begins there."""


@dataclass(frozen=True, slots=True)
class Record:
    """An object: how many bytes, by which writer, and where.

    ``place``: ``chunks``: in pieces of the sizes that ``runs`` tells as (how many, how large); ``file``: in one value
    that SGLang reads; ``rank``: piece 0 is the header of a safetensors file, the tensors are values of SGLang's
    ``rank``.
    """

    id: str
    size: int
    place: str = "chunks"
    runs: tuple[tuple[int, int], ...] = ()
    rank: int = 0

    def text(self) -> bytes:
        """As it is kept."""
        kept: dict[str, Any] = {"format": _FORMAT, "id": self.id, "size": self.size, "place": self.place}
        if self.place == "chunks":
            kept["runs"] = self.runs
        if self.place == "rank":
            kept["rank"] = self.rank
        return json.dumps(kept, separators=(",", ":")).encode()

    @classmethod
    def of(cls, text: bytes, where: str) -> Record:
        """Read a record, which anybody who may write to the server could have made."""
        try:
            kept = json.loads(text)
            runs = tuple((count, size) for count, size in kept.get("runs", ()))
            made = cls(kept["id"], kept["size"], kept["place"], runs, kept.get("rank", 0))
            numbers = (made.size, made.rank, *(number for run in runs for number in run))
            fine = (
                kept["format"] == _FORMAT
                and made.place in _PLACES
                and all(type(number) is int and number >= 0 for number in numbers)
                and str.isalnum(made.id)
                and (made.place != "chunks" or sum(count * size for count, size in runs) == made.size)
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fine = False
        if not fine:
            raise FormatError(f"the record of {where} is damaged, or of a newer shardtool: write the object again")
        return made


@dataclass(frozen=True, slots=True)
class Entry:
    """A writer: of which object, since when (seconds since 1970), and how many pieces it may have sent."""

    key: str
    since: float
    pieces: int
    discarded: bool = False

    def text(self) -> bytes:
        """As it is kept."""
        kept = {"key": self.key, "since": self.since, "pieces": self.pieces, "discarded": self.discarded}
        return json.dumps(kept, separators=(",", ":")).encode()

    @classmethod
    def of(cls, text: bytes) -> Entry | None:
        """Read an entry; None for what is none."""
        try:
            kept = json.loads(text)
            made = cls(str(kept["key"]), float(kept["since"]), int(kept["pieces"]), bool(kept["discarded"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        return made if 0 <= made.pieces < 1 << 24 else None


@dataclass(frozen=True, slots=True)
class Names:
    """The keys in Redis below the name of a checkpoint."""

    name: str

    @property
    def objects(self) -> str:
        """The records."""
        return f"{self.name}/objects"

    @property
    def writers(self) -> str:
        """The writers' entries."""
        return f"{self.name}/writers"

    def piece(self, id: str, number: int) -> str:
        """A piece of what a writer wrote."""
        return f"{self.name}/chunks/{id}/{number}"

    def file(self, key: str) -> str:
        """A text that SGLang pulls."""
        return f"{self.name}/files/{key}"

    def ranked(self, rank: int) -> str:
        """What the names of a rank's tensors begin with."""
        return f"{self.name}/keys/rank_{rank}/"


def unit(size: int) -> int:
    """The unit of a writer of ``size`` bytes."""
    return 0 if size <= CHUNK else UNIT


def held(size: int) -> int:
    """The bytes that such a writer gathers."""
    return size if 0 <= size <= CHUNK else 0


def cut(size: int) -> list[int]:
    """The sizes of the chunks that a slice becomes."""
    return [min(CHUNK, size - start) for start in range(0, size, CHUNK)]


def most_pieces(size: int) -> int:
    """How many chunks an object of ``size`` bytes has at most, however it was cut."""
    return 2 * -(-size // CHUNK) + 2


def add_run(runs: list[tuple[int, int]], size: int) -> None:
    """Append a chunk to runs."""
    if runs and runs[-1][1] == size:
        runs[-1] = (runs[-1][0] + 1, size)
    else:
        runs.append((1, size))


def chunks_between(names: Names, record: Record, start: int, end: int) -> Iterator[Extent]:
    """Where the bytes from ``start`` to ``end`` of an object in chunks are."""
    number, at = 0, 0
    for count, size in record.runs:
        if size and at + count * size > start:
            skipped = max(0, start - at) // size
            for index in range(skipped, count):
                begin = at + index * size
                if begin >= end:
                    return
                first, last = max(start, begin), min(end, begin + size)
                yield Extent(names.piece(record.id, number + index), first - begin, last - first, last - first == size)
        number, at = number + count, at + count * size
