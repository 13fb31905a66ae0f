"""The lists that Azure's blob service sends and takes: of blobs, and of the blocks of one blob. XML, from anybody."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote
from xml.etree import ElementTree

from shardtool.errors import FormatError

_BLOCK = re.compile(rb"\d{6}-(\d{11})-([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob of a listing: ``tag`` is its ETag without quotes, ``about`` its metadata, named as in a head."""

    name: str
    size: int
    tag: str
    about: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks below a name that are not committed: how many, their bytes, whose they are, and since when.

    ``writers``: the marks of the writers that made them, "" for another program's.
    """

    count: int
    size: int
    writers: frozenset[str]
    since: float


def block_name(number: int, began: float, mark: str) -> str:
    """The name of a block: 51 bytes, since all names of a blob must be equally long, and 64 are the most."""
    return b64encode(f"{number:06d}-{int(began):011d}-{mark}".encode()).decode()


def block_list(names: Iterable[str]) -> bytes:
    """What a blob shall be made of: blocks that are not committed yet."""
    body = "".join(f"<Uncommitted>{name}</Uncommitted>" for name in names)
    return f'<?xml version="1.0" encoding="utf-8"?><BlockList>{body}</BlockList>'.encode()


def blobs_of(body: bytes, where: str) -> tuple[list[Blob], str]:
    """A page of blobs, and what to ask for the next one with: empty after the last."""
    root = _parsed(body, where, "EnumerationResults")
    return [_blob(entry, where) for entry in root.iterfind("Blobs/Blob")], root.findtext("NextMarker") or ""


def blocks_of(body: bytes, where: str) -> Blocks:
    """The blocks that are not committed."""
    entries = list(_parsed(body, where, "BlockList").iterfind("UncommittedBlocks/Block"))
    writers, since = set(), 0.0
    for entry in entries:
        try:
            found = _BLOCK.fullmatch(b64decode(entry.findtext("Name") or "", validate=True))
        except NotBase64:
            found = None
        writers.add(found[2].decode() if found else "")
        since = max(since, float(found[1]) if found else 0.0)
    return Blocks(len(entries), sum(_size(entry, "Size", where) for entry in entries), frozenset(writers), since)


def _blob(entry: ElementTree.Element, where: str) -> Blob:
    name = entry.find("Name")
    if name is None or name.text is None:
        raise FormatError(f"the listing of {where} has a blob without a name")
    encoded = name.get("Encoded") == "true"  # where it has characters that XML cannot say
    metadata = entry.find("Metadata")
    return Blob(
        unquote(name.text) if encoded else name.text,
        _size(entry, "Properties/Content-Length", where),
        (entry.findtext("Properties/Etag") or "").strip('"'),
        {} if metadata is None else {f"x-ms-meta-{item.tag.lower()}": item.text or "" for item in metadata},
    )


def _size(entry: ElementTree.Element, path: str, where: str) -> int:
    text = entry.findtext(path) or ""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise FormatError(f"the listing of {where} has a size that is none")
    return int(text)


def _parsed(body: bytes, where: str, name: str) -> ElementTree.Element:
    try:
        # A document type, by whose entities a few bytes become many, be it in UTF-16; CDATA is never sent.
        if b"<!" in body or b"\0" in body:
            raise ElementTree.ParseError("it declares a document type")
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise FormatError(
            f"the server of {where} sends a list that cannot be read ({error}): check the address"
        ) from error
    if root.tag != name:
        raise FormatError(f"the server of {where} sends no list of blobs: check the address")
    return root
