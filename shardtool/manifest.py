"""The manifest ``shardtool.json``: what a sharded checkpoint is made of, complete enough to read it for ever.

It keeps the recipe that was executed, the inventory of the source, the original config.json, the layout's table and
every digest. It is written last, so that it is the mark of a complete checkpoint. ``docs/manifest.md`` specifies
it; ``docs/manifest.schema.json`` is its JSON schema.

The *plan part* (everything but the files' digests) is known before a byte is moved. Its blake3 is the fingerprint
of the job: workers with the same fingerprint help each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

from shardtool import digest, inventory, parallel, pattern, recipe_json
from shardtool.calm import calm
from shardtool.dtypes import DType
from shardtool.errors import FormatError, UsageError
from shardtool.mosaic import Logical
from shardtool.parallel import Parallel
from shardtool.recipe import Recipe
from shardtool.recipe_json import table_of, text_of

KEY = "shardtool.json"
PRIVATE = ".shardtool/"
KEPT = ".shardtool/kept.safetensors"
FORMAT = "shardtool/2"
FORMATS = ("shardtool/1", FORMAT)
"""What is read. The first had no experts, no pipeline stages and no programs."""
MAX_BYTES = 1 << 30
"""Bytes of manifest that are read at most."""
_HEX = "0123456789abcdef"
_ALGORITHM = re.compile(r"[a-z0-9_]{1,32}")
_CHECKSUM = re.compile(r"[!-~]{1,256}")


class TensorRecord(NamedTuple):
    """A stored tensor's digests."""

    name: str
    digest: digest.TensorDigest


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A finished file.

    Its size, the blake3 of its header, its digest and those of its tensors, in the order of their bytes. ``stored``:
    what the store kept of its content when it was written (``Store.checksums``), by algorithm. ``sha256``: of the whole
    file, where it was asked for.
    """

    key: str
    rank: int | None
    part: int
    size: int
    header: str
    digest: str
    tensors: tuple[TensorRecord, ...]
    stored: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {
            "key": self.key,
            "rank": self.rank,
            "part": self.part,
            "size": self.size,
            "header": self.header,
            "digest": self.digest,
            "tensors": [
                {"name": t.name, "blake3": t.digest.blake3, "chunks": list(t.digest.chunks)} for t in self.tensors
            ],
            **({"stored": dict(self.stored)} if self.stored else {}),
            **({"sha256": self.sha256} if self.sha256 else {}),
        }

    @staticmethod
    def from_json(value: Any) -> FileRecord:
        """The record that JSON values say. Raises the built-in errors of wrong shapes."""
        names = [t["name"] for t in value["tensors"]]
        if set(map(type, names)) - {str}:
            raise TypeError("a tensor has a name that is not a text")
        whole = _hexes([t["blake3"] for t in value["tensors"]], 64)
        chunks = [tuple(t["chunks"]) for t in value["tensors"]]
        _hexes(list(chain.from_iterable(chunks)), 32)
        tensors = tuple(map(TensorRecord, names, map(digest.TensorDigest, whole, chunks)))
        rank = value["rank"] if value["rank"] is None else _size(value["rank"])
        return FileRecord(
            _key(value["key"]),
            rank,
            _size(value["part"]),
            _size(value["size"]),
            _hex(value["header"], 64),
            _hex(value["digest"], 64),
            tensors,
            _stored(value.get("stored", {})),
            _hex(value["sha256"], 64) if "sha256" in value else "",
        )


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that came along: config, tokenizer, remote code."""

    key: str
    size: int
    blake3: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source tensor that no rank holds, why, and whether it is kept in ``.shardtool/kept.safetensors``."""

    name: str
    reason: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    """A sharded checkpoint. Without ``files`` it is the plan of one."""

    written_by: str
    layout: Mapping[str, Any]
    parallel: Parallel
    dtype: DType
    pattern: str
    max_part_size: int
    config: str
    amendments: Mapping[str, Any]
    sample: str
    inventory: Mapping[str, Logical]
    dropped: tuple[Dropped, ...]
    copies: Mapping[str, str]
    recipe: Recipe
    side_files: tuple[SideFile, ...]
    files: tuple[FileRecord, ...] = ()
    format: str = FORMAT

    @property
    def tp(self) -> int:
        """Tensor parallel ranks."""
        return self.parallel.tp

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.parallel.pp

    def _plan(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "written_by": self.written_by,
            "layout": dict(self.layout),
            "parallel": self.parallel.to_json() if self.format == FORMAT else {"tp": self.tp, "pp": self.pp},
            "dtype": self.dtype.name,
            "pattern": self.pattern,
            "max_part_size": self.max_part_size,
            "chunk": digest.CHUNK,
            "config": self.config,
            "amendments": dict(self.amendments),
            "source": {
                "sample": self.sample,
                "tensors": inventory.pack(self.inventory),
                "dropped": [{"name": d.name, "reason": d.reason, "kept": d.kept} for d in self.dropped],
                "copies": dict(sorted(self.copies.items())),
            },
            "recipe": recipe_json.to_json(self.recipe),
            "side_files": [{"key": s.key, "size": s.size, "blake3": s.blake3} for s in self.side_files],
        }

    @property
    def fingerprint(self) -> str:
        """The name of the job that makes this checkpoint."""
        return digest.of_bytes(_canonical(self._plan()))[:32]

    def with_files(self, files: Iterable[FileRecord]) -> Manifest:
        """The finished manifest."""
        return replace(self, files=tuple(sorted(files, key=lambda f: f.key)))

    def encode(self) -> bytes:
        """The bytes of ``shardtool.json``: one line per top-level key, its own digest last."""
        return _signed({**self._plan(), "files": [f.to_json() for f in self.files]})


def _signed(table: Mapping[str, Any]) -> bytes:
    """The only bytes that say this table. The digest is that of its canonical form, of which the lines are parts."""
    parts = {json.dumps(key, ensure_ascii=False): _canonical(table[key]).decode() for key in table}
    whole = "{" + ",".join(f"{key}:{parts[key]}" for key in sorted(parts)) + "}"
    parts['"digest"'] = json.dumps(digest.of_bytes(whole.encode()))
    lines = (f"{key}: {value}" for key, value in parts.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _is_signed(data: bytes, table: Mapping[str, Any]) -> bool:
    """Whether these bytes are what ``_signed`` makes of a table: their lines are parts of the canonical form."""
    if not (data.startswith(b"{\n") and data.endswith(b"\n}\n")):
        return False
    lines = [line.partition(b": ") for line in data[2:-3].split(b",\n")]
    parts = {key: value for key, _, value in lines}
    if lines[-1][0] != b'"digest"' or len(lines) > len(parts) or list(map(json.loads, parts)) != list(table):
        return False
    signed = parts.pop(b'"digest"')
    whole, before = digest.Running(), b"{"
    for key in sorted(parts):  # as texts are sorted: UTF-8 keeps their order
        whole.update(before + key + b":")
        whole.update(parts[key])
        before = b","
    whole.update(b"}")
    return signed == json.dumps(whole.hexdigest()).encode()


def decode(data: bytes, where: str) -> Manifest:
    """The manifest that these bytes say. Raises ``FormatError`` if it is damaged or from a later version."""
    with calm():
        return _decoded(data, where)


def _decoded(data: bytes, where: str) -> Manifest:
    try:
        table = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: it is not JSON ({str(error)[:80]})") from None
    if (
        not isinstance(table, dict)
        or not isinstance(table.get("format"), str)
        or not table["format"].startswith("shardtool/")
    ):
        raise FormatError(f"{where} is not a manifest of shardtool")
    if table["format"] not in FORMATS:
        raise FormatError(
            f"{where} has the format {table['format']!r}; this version of shardtool reads {FORMAT!r}, use a newer one"
        )
    try:
        if not _is_signed(data, table):
            raise FormatError(f"{where} is damaged: its digest does not match its content")
        made = _from_json(table, where)
        _check(made)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: {repr(error)[:300]}") from None
    return made


def _from_json(table: Mapping[str, Any], where: str) -> Manifest:
    source = table["source"]
    if table["chunk"] != digest.CHUNK:
        raise ValueError(f"chunks of {table['chunk']} bytes are not supported")
    return Manifest(
        written_by=text_of(table["written_by"]),
        layout=table_of(table["layout"]),
        parallel=parallel.from_json(table_of(table["parallel"])),
        dtype=DType[table["dtype"]],
        pattern=text_of(table["pattern"]),
        max_part_size=_size(table["max_part_size"]),
        config=text_of(table["config"]),
        amendments=table_of(table["amendments"]),
        sample=text_of(source["sample"]),
        inventory=inventory.unpack(source["tensors"]),
        dropped=tuple(Dropped(text_of(d["name"]), text_of(d["reason"]), bool(d["kept"])) for d in source["dropped"]),
        copies={text_of(copy): text_of(of) for copy, of in table_of(source["copies"]).items()},
        recipe=recipe_json.from_json(table["recipe"], where),
        side_files=tuple(
            SideFile(_key(s["key"]), _size(s["size"]), _hex(s["blake3"], 64)) for s in table["side_files"]
        ),
        files=tuple(FileRecord.from_json(f) for f in table["files"]),
        format=text_of(table["format"]),
    )


def _check(made: Manifest) -> None:
    """What each value alone does not show: names, ranks and windows that do not fit together. Raises ``ValueError``."""
    ranks = made.tp * made.pp
    try:
        pattern.parse(made.pattern, tp=made.tp, pp=made.pp)
    except UsageError as error:
        raise ValueError(str(error)) from None
    for key in [record.key for record in made.files]:
        if not key.endswith(".safetensors") or (key.startswith(PRIVATE) and key != KEPT):
            raise ValueError(f"{key!r} is not a name of a shard")
    for key in [side.key for side in made.side_files]:
        if key == KEY or key.startswith(PRIVATE) or key.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"{key!r} is not a name of a side file")
    keys = [record.key for record in made.files] + [side.key for side in made.side_files]
    if len(set(keys)) != len(keys):
        raise ValueError("two files have the same name")
    if any(record.rank is not None and record.rank >= ranks for record in made.files):
        raise ValueError(f"a file belongs to a rank beyond the {ranks} that there are")
    inventory.check(made.recipe, ranks, made.inventory, complete=False)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a size")
    return value


def _hex(value: Any, digits: int) -> str:
    if not isinstance(value, str) or len(value) != digits or value.strip(_HEX):
        raise ValueError(f"{value!r} is not a digest of {digits} digits")
    return value


def _hexes(values: list[Any], digits: int) -> list[str]:
    """Many at once, which is several times as fast."""
    if set(map(type, values)) - {str} or set(map(len, values)) - {digits} or "".join(values).strip(_HEX):
        return [_hex(value, digits) for value in values]  # says which one
    return values


def _stored(value: Any) -> dict[str, str]:
    """Checksums by algorithm: a few short texts without surprises, since people are shown them."""
    found = {text_of(name): text_of(checksum) for name, checksum in table_of(value).items()}
    if len(found) > 16 or not all(_ALGORITHM.fullmatch(n) and _CHECKSUM.fullmatch(c) for n, c in found.items()):
        raise ValueError("a file has what are no checksums of a store")
    return found


def _key(value: Any) -> str:
    if (
        not isinstance(value, str)
        or "\\" in value
        or "\0" in value
        or any(p in ("", ".", "..") for p in value.split("/"))
        or any(c < " " or c == "\x7f" for c in value)
    ):
        raise ValueError(f"{value!r} is not a name inside the checkpoint")
    return value
