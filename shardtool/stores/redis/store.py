"""Checkpoints in Redis: objects in chunks below a name, whole or not there at all.

::

    create   ── chunks below the writer's id, two at a time on one connection, out of the caller's memory
    commit   ── one script: the object's record now names this writer; what the old one wrote is removed after that
    readinto ── the chunks straight into the view, and in the same breath the record: was it this version throughout?

``redis.records`` says which keys there are, ``redis.ledger`` what makes them valid; no library is needed. How durable
an object is when ``commit`` returns is the server's setting. ``for=sglang`` in the address makes what is written
readable by SGLang as well (``redis.sglang``); reading needs no such word.
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Iterator

from shardtool.errors import FormatError, StoreError, Unavailable
from shardtool.stores.base import CheckedWriter, Object, Replaced, Store, Unfinished, check_key, is_key, target
from shardtool.stores.redis.ledger import Ledger
from shardtool.stores.redis.records import (
    CHUNK,
    Entry,
    Extent,
    Layout,
    Record,
    add_run,
    chunks_between,
    cut,
    held,
    most_pieces,
    unit,
)
from shardtool.stores.redis.sglang import check_file, sglang_writer
from shardtool.stores.redis.wire import Address, Command, Wire
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.retry import Again

_AHEAD = 2  # values asked for before the first has come: the server keeps that many in its memory for us
_VERSIONS = 50  # replaced under a reader this often, an object is not read to its end


class RedisStore(Store):
    """The objects below ``redis://host:port/name``, or ``rediss://`` with TLS.

    What fails in a way that may pass is tried again as ``again`` says; ``pace`` is how long the server may be silent.
    """

    def __init__(self, uri: str, *, again: Again | None = None, pace: Pace | None = None) -> None:
        self._address = Address.of(uri)
        self.uri = self._address.uri
        self._ledger = Ledger(self._address, again or Again(), pace or Pace())

    def list(self, prefix: str = "") -> Iterator[Object]:
        """All objects at one moment."""
        since, found = self._ledger.pins.since(), self._ledger.records()
        for key in sorted(key for key in found if key.startswith(prefix) and is_key(key)):
            self._ledger.pins.keep(key, found[key].id, since)
            yield Object(key, found[key].size, found[key].id)

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such object."""
        since, record = self._ledger.pins.since(), self._ledger.record(check_key(key))
        self._ledger.pins.keep(key, record.id, since)
        return Object(key, record.size, record.id)

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with bytes of one version: that which was seen last, or else one that stays meanwhile.

        An object that was listed or looked at and is another one now is ``Replaced``.
        """
        memory = target(start, view)
        check_key(key)
        if not memory:
            return
        end, pin = start + len(memory), self._ledger.pins.of(key)
        record = self._ledger.known.get(key) or self._ledger.record(key)
        for _ in range(_VERSIONS):
            if end > record.size or pin not in ("", record.id):
                record = self._ledger.record(key)
            if pin not in ("", record.id):
                raise Replaced(f"{self.locate(key)} was replaced while it was read: start again")
            if end > record.size:
                raise FormatError(f"{self.locate(key)} ends at byte {record.size}, before byte {end}")
            whole, now = self._read(key, record, start, memory)
            if now == record and whole:
                return
            if now == record:
                raise StoreError(
                    f"the server has lost bytes of {self.locate(key)}: write it again, and set the server's"
                    " maxmemory-policy to noeviction"
                )
            record = now
        raise Unavailable(f"{self.locate(key)} is replaced again and again: read it when nobody writes")

    def admit(self, key: str, size: int, begins: bytes) -> None:
        """Refuse what SGLang's values cannot hold, if it is to read them."""
        if self._address.scheme:
            check_file(self._address, key, size, begins, self.locate(key))

    def create(self, key: str, size: int, *, exclusive: bool = False) -> CheckedWriter:
        """Begin an object. Nothing is sent before the first slice, or before the commit where it fits into a chunk."""
        check_key(key)
        if self._address.scheme:
            made = sglang_writer(self._ledger, self._address, key, size, exclusive=exclusive)
            if made is not None:
                return made
        return _ChunksWriter(self._ledger, key, size, exclusive=exclusive)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is not an error."""
        self._ledger.delete(check_key(key))

    def unit(self, size: int) -> int:
        """Two chunks, or 0 for an object that fits into one."""
        return unit(size)

    def held(self, size: int) -> int:
        """An object of up to a chunk is gathered in memory first."""
        return held(size)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """Writers whose bytes are there but belong to no object: killed, at work, or replaced a moment ago."""
        return self._ledger.unfinished(prefix)

    def discard(self, left: Unfinished) -> None:
        """Remove what a writer left. If it is still at work its commit fails; a committed object is kept."""
        self._ledger.discard(left.key, left.name)

    def place(self) -> str:
        """The same for one name on one server, whoever asks."""
        return self._address.place

    def close(self) -> None:
        """Close the connections."""
        self._ledger.pool.close()

    def _read(self, key: str, record: Record, start: int, memory: memoryview) -> tuple[bool, Record]:
        """Fill ``memory`` from what a record says; also whether all was there, and the record afterwards."""
        where = self.locate(key)
        done, whole = 0, True
        trying = self._ledger.again.trying()
        while True:
            before = done
            try:
                extents = [*self._between(key, record, start + done, start + len(memory))]
                with self._ledger.pool.lent(where) as wire:
                    asked = 0
                    for extent in extents:
                        while asked < len(extents) and wire.owed < _AHEAD:
                            _ask_for(wire, extents[asked])
                            asked += 1
                        whole = wire.into(memory[done : done + extent.size]) and whole
                        done += extent.size
                    wire.send(*self._ledger.look(key))
                    said = wire.reply()
                return whole, self._ledger.seen(key, said)
            except Unavailable as error:
                if done > before:
                    trying.progressed()
                trying.failed(error)

    def _between(self, key: str, record: Record, start: int, end: int) -> Iterator[Extent]:
        """The values, or parts of up to a chunk, in which bytes of an object are."""
        if record.place == "chunks":
            extents = chunks_between(self._ledger.names, record, start, end)
        else:
            extents = _overlaps(self._ledger.layout(key, record), start, end)
        for extent in extents:
            for first in range(0, extent.size, CHUNK):
                part = min(CHUNK, extent.size - first)
                yield Extent(extent.key, extent.start + first, part, whole=extent.whole and part == extent.size)


def _overlaps(layout: Layout, start: int, end: int) -> Iterator[Extent]:
    first = max(0, bisect_right(layout, start, key=_offset) - 1)
    for at, extent in layout[first:]:
        if at >= end:
            return
        low, high = max(start, at), min(end, at + extent.size)
        if low < high:
            yield Extent(extent.key, extent.start + low - at, high - low)


def _offset(placed: tuple[int, Extent]) -> int:
    return placed[0]


def _ask_for(wire: Wire, extent: Extent) -> None:
    key = extent.key.encode()
    if extent.whole:
        wire.send(b"GET", key)
    else:
        wire.send(b"GETRANGE", key, b"%d" % extent.start, b"%d" % (extent.start + extent.size - 1))


class _ChunksWriter(CheckedWriter):
    """One piece for each chunk."""

    def __init__(self, ledger: Ledger, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(ledger.locate(key), size, unit=unit(size))
        self._ledger = ledger
        self._key = key
        self._exclusive = exclusive
        self._id = secrets.token_hex(16)
        self._entry: Entry | None = None
        self._small = memoryview(bytearray(held(size)))
        self._runs: list[tuple[int, int]] = []
        self._pieces = 0

    def _write(self, data: memoryview) -> None:
        if self.unit:
            self._send(data)
        else:
            self._small[self._written : self._written + len(data)] = data

    def _send(self, data: memoryview) -> None:
        commands: list[Command] = []
        if self._entry is None:
            self._entry, command = self._ledger.register(self._key, self._id, most_pieces(self._size))
            commands.append(command)
        at = 0
        for size in cut(len(data)):
            name = self._ledger.names.piece(self._id, self._pieces)
            commands.append((b"SET", name.encode(), data[at : at + size]))
            add_run(self._runs, size)
            self._pieces += 1
            at += size
        self._ledger.deliver(self._where, commands)

    def _commit(self) -> None:
        if not self.unit:
            self._send(self._small)
        assert self._entry is not None
        record = Record(self._id, self._size, runs=tuple(self._runs))
        self._ledger.commit(self._key, record, self._entry, exclusive=self._exclusive)
        self._small = memoryview(b"")

    def _abort(self) -> None:
        self._small = memoryview(b"")
        if self._entry is not None:
            self._ledger.give_up(self._id, self._entry)
