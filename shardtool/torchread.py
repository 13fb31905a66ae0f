"""A file of ``torch.save``, opened by ranged reads: its directory, its pickle, the heads of its storages; no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from shardtool import torchfile, unpickle
from shardtool.errors import FormatError
from shardtool.header import Header
from shardtool.stores.base import Store
from shardtool.torchfile import HEAD, Record

TAIL = 64 << 10
"""Bytes from the end that are read first; the directories of most files are in it."""
GAP = 64 << 10
"""Bytes between two heads that are read over rather than skipped."""
SPAN = 1 << 20
"""Bytes that one read of heads takes at most."""
_READERS = 8


def read_header(store: Store, key: str, size: int) -> Header:
    """The tensors of one file, every number checked against it. Raises ``FormatError`` that names the file."""
    where = store.locate(key)
    tail = _read(store, key, max(0, size - TAIL), min(size, TAIL))
    span = torchfile.directory(tail, size, where)
    if span is None:
        raise torchfile.not_zip(_read(store, key, 0, min(size, 512)), key, where)
    start, length, count = span
    inside = start - (size - len(tail))
    text = tail[inside : inside + length] if inside >= 0 else _read(store, key, start, length)
    found = torchfile.archive(text, start, count, where)
    if "byteorder" in found.records:
        torchfile.check_byteorder(_content(store, key, torchfile.record(found, "byteorder", where), 16, where), where)
    pickled = torchfile.record(found, "data.pkl", where)
    table = unpickle.loads(_content(store, key, pickled, torchfile.MAX_PICKLE, where), where)
    views = torchfile.views(table, key, where)
    starts = _starts(store, key, torchfile.storages(views, found, where), where)
    return Header(torchfile.entries(views, starts, size, where), {}, 0)


def _read(store: Store, key: str, start: int, length: int) -> bytes:
    data = bytearray(length)
    if data:
        store.readinto(key, start, memoryview(data))
    return bytes(data)


def _content(store: Store, key: str, record: Record, most: int, where: str) -> bytes:
    """The bytes of a small record."""
    if record.size > most:
        raise FormatError(
            f"{where} is not read: its record {record.name[:100]!r} is {record.size} bytes, more than {most}"
        )
    head = _read(store, key, record.start, HEAD + len(record.name.encode()))
    return _read(store, key, torchfile.data_offset(record, head, where), record.size)


def _starts(store: Store, key: str, records: Mapping[str, Record], where: str) -> dict[str, int]:
    """Where each storage's bytes start. Heads that are near each other are read together."""
    ends = {name: record.start + HEAD + len(record.name.encode()) for name, record in records.items()}
    order = sorted(records, key=lambda name: records[name].start)
    groups: list[list[str]] = [order[:1]] if order else []
    for before, name in pairwise(order):
        near = records[name].start - ends[before] <= GAP and ends[name] - records[groups[-1][0]].start <= SPAN
        if near:
            groups[-1].append(name)
        else:
            groups.append([name])

    def one(group: list[str]) -> list[tuple[str, int]]:
        first = records[group[0]].start
        data = _read(store, key, first, ends[group[-1]] - first)
        return [
            (name, torchfile.data_offset(record, data[record.start - first : ends[name] - first], where))
            for name in group
            for record in (records[name],)
        ]

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(pair for found in pool.map(one, groups) for pair in found)
