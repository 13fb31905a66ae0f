"""What of a checkpoint in Redis exists: the records, who makes them valid, and what of whom is removed.

A commit, a removal and the end of a writer are a script each, which the server runs as one step. Whatever is sent here
may be sent twice: where a reply was lost, the second one finds what the first one did.

::

    register ── pieces are sent ── commit             the object is there; then what its old writer sent is removed
                       └── killed ── unfinished ── discard
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardtool.errors import AlreadyExists, FormatError, NotFound, ShardtoolError, StoreError, Unavailable
from shardtool.stores.base import Buffer, Unfinished, is_key
from shardtool.stores.redis.records import Entry, Layout, Names, Record
from shardtool.stores.redis.values import layout_of
from shardtool.stores.redis.wire import Address, Command, Pool, Reply
from shardtool.stores.wire.link import Pace
from shardtool.stores.wire.pins import Pins
from shardtool.stores.wire.retry import Again

_BATCH = 500
_KNOWN = 10_000

# KEYS: objects, writers. ARGV: key, id, record, entry, exclusive, the record that is replaced, how many renames, from
# and to of each, what is removed. A record with "runs" has no keys but its writer's, so any such may be replaced. The
# first write fails where memory is full, and then nothing has been changed.
_COMMIT = b"""
local old = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if old == ARGV[3] then return {'done', ''} end
if redis.call('HGET', KEYS[2], ARGV[2]) ~= ARGV[4] then return {'gone', ''} end
if old ~= '' and ARGV[5] == '1' then return {'exists', ''} end
if old ~= '' and old ~= ARGV[6] and not string.find(old, '"runs"', 1, true) then return {'changed', old} end
local last = 7 + 2 * tonumber(ARGV[7])
for i = 8, last, 2 do if redis.call('EXISTS', ARGV[i]) == 0 then return {'gone', ''} end end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
for i = last + 1, #ARGV do redis.call('UNLINK', ARGV[i]) end
for i = 8, last, 2 do redis.call('RENAME', ARGV[i], ARGV[i + 1]) end
return {'done', old}
"""
# KEYS: objects. ARGV: key, the record that is removed, what else is removed.
_DELETE = b"""
local old = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if old ~= '' and old ~= ARGV[2] and not string.find(old, '"runs"', 1, true) then return {'changed', old} end
redis.call('HDEL', KEYS[1], ARGV[1])
for i = 3, #ARGV do redis.call('UNLINK', ARGV[i]) end
return {'done', old}
"""
# KEYS: objects, writers. ARGV: key, id, the entry of a writer that may not commit any more.
_END = b"""
local old = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if string.find(old, ARGV[2], 1, true) then return 0 end
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 1 then redis.call('HSET', KEYS[2], ARGV[2], ARGV[3]) end
return 1
"""


class Ledger:
    """The records and writers of one name.

    ``known``: records as they were last seen, which may be old. ``pins``: the versions (ids of writers) to be read.
    """

    def __init__(self, address: Address, again: Again, pace: Pace) -> None:
        self.names = Names(address.name)
        self.again = again
        self.pool = Pool(address, pace)
        self.known: dict[str, Record] = {}
        self.pins = Pins()
        self._uri = address.uri
        self._objects = self.names.objects.encode()
        self._writers = self.names.writers.encode()
        self._layouts: dict[str, Layout] = {}

    def ask(self, where: str, *command: Buffer | tuple[Buffer, ...], once: bool = False) -> Reply:
        """The reply to one command that may be repeated, and is unless ``once``."""
        return self.deliver(where, [command], once=once)[0]

    def deliver(self, where: str, commands: Sequence[Command], *, once: bool = False) -> list[Reply]:
        """Commands that may be repeated, sent without waiting for each other's replies. What was answered is not."""
        replies: list[Reply] = []
        trying = (replace(self.again, attempts=1) if once else self.again).trying()
        while len(replies) < len(commands):
            before = len(replies)
            try:
                with self.pool.lent(where) as wire:
                    batch = commands[before : before + _BATCH]
                    for command in batch:
                        wire.send(*command)
                    for _ in batch:
                        said = wire.reply()
                        replies.append(said)
            except Unavailable as error:
                if len(replies) > before:
                    trying.progressed()
                trying.failed(error)
        return replies

    def record(self, key: str) -> Record:
        """An object's record as it is now. Raises ``NotFound``."""
        return self.seen(key, self.ask(self.locate(key), *self.look(key)))

    def look(self, key: str) -> Command:
        """The command that gets an object's record, whose reply ``seen`` takes."""
        return b"HGET", self._objects, key.encode()

    def seen(self, key: str, said: Reply) -> Record:
        """The record in a reply to ``look``. Raises ``NotFound``."""
        if not isinstance(said, bytes):
            self.known.pop(key, None)
            raise NotFound(f"{self.locate(key)} does not exist")
        return self._remember(key, Record.of(said, self.locate(key)))

    def records(self) -> dict[str, Record]:
        """All records at one moment, by key."""
        found = self._table(self._objects)
        return {key: self._remember(key, Record.of(text, self.locate(key))) for key, text in found.items()}

    def layout(self, key: str, record: Record) -> Layout:
        """Where the bytes of an object are that is not in chunks."""
        found = self._layouts.get(record.id)
        if found is None:
            first = self.ask(self.locate(key), b"GET", self.names.piece(record.id, 0).encode())
            found = layout_of(self.names, key, record, first if isinstance(first, bytes) else b"", self.locate(key))
            self._layouts[record.id] = found
        return found

    def register(self, key: str, id: str, pieces: int) -> tuple[Entry, Command]:
        """A writer's entry and the command that makes it known, to be sent before anything else that it sends."""
        entry = Entry(key, time.time(), pieces)
        return entry, (b"HSET", self._writers, id.encode(), entry.text())

    def commit(
        self, key: str, record: Record, entry: Entry, *, exclusive: bool, renames: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Make a record the object's, and with it the ``renames`` of pieces; removes what the old one had."""
        where = self.locate(key)
        pairs = [name.encode() for pair in renames for name in pair]
        kept = {to for _, to in renames}
        made = (key.encode(), record.id.encode(), record.text(), entry.text(), b"1" if exclusive else b"0")
        state, old = b"changed", b""
        while state == b"changed":
            doomed = [name.encode() for name in self._published(key, old) if name not in kept]
            with self.pins.changing(key):
                state, old = self._run(where, _COMMIT, 2, *made, old, b"%d" % len(renames), *pairs, *doomed)
        if state == b"exists":
            raise AlreadyExists(f"{where} exists already: delete it or choose another name")
        if state == b"gone":
            raise NotFound(f"what was written of {where} has been removed by somebody else: write it again")
        self._remember(key, record)
        self._replaced(where, old)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        where = self.locate(key)
        state, old = b"changed", b""
        while state == b"changed":
            doomed = [name.encode() for name in self._published(key, old)]
            with self.pins.changing(key):
                state, old = self._run(where, _DELETE, 1, key.encode(), old, *doomed)
        self.known.pop(key, None)
        self._replaced(where, old)

    def unfinished(self, prefix: str) -> Iterator[Unfinished]:
        """Writers whose bytes are there but belong to no object: killed, at work, or replaced a moment ago."""
        writers = self._table(self._writers)
        valid = {record.id for record in self.records().values()}
        for id, text in sorted(writers.items()):
            entry = Entry.of(text)
            if entry is not None and id not in valid and entry.key.startswith(prefix) and is_key(entry.key):
                yield Unfinished(entry.key, id, entry.since, self._sent(id, entry))

    def discard(self, key: str, id: str) -> None:
        """End a writer and remove what it sent. If it is still at work its commit fails; what has committed stays."""
        said = self.ask(self.locate(key), b"HGET", self._writers, id.encode())
        entry = Entry.of(said) if isinstance(said, bytes) else None
        if entry is not None:
            self._end(id, entry, once=False)

    def give_up(self, id: str, entry: Entry) -> None:
        """``discard`` for the writer itself, tried once: what stays is found by ``unfinished``."""
        try:
            self._end(id, entry, once=True)
        except ShardtoolError:
            return

    def walk(self, begins: str) -> set[str]:
        """The keys of the server that begin so, which must not look like a pattern. Looks at all keys there are."""
        cursor, found = b"0", set[str]()
        while True:
            said = self.ask(self._uri, b"SCAN", cursor, b"MATCH", begins.encode() + b"*", b"COUNT", b"1000")
            match said:
                case [bytes(cursor), [*keys]]:
                    found.update(key.decode("utf-8", "replace") for key in keys if isinstance(key, bytes))
                case _:
                    raise StoreError(
                        f"the server of {self._uri} answers with nonsense: see that it is Redis 6 or later"
                    )
            if cursor == b"0":
                return found

    def locate(self, key: str) -> str:
        """How people are told where an object is: the address has no user or password."""
        return f"{self._uri}/{key}"

    def _end(self, id: str, entry: Entry, *, once: bool) -> None:
        where, dead = self.locate(entry.key), replace(entry, discarded=True).text()
        keys = (b"2", self._objects, self._writers)
        if self.ask(where, b"EVAL", _END, *keys, entry.key.encode(), id.encode(), dead, once=once):
            self._sweep(where, id, entry, once=once)

    def _sweep(self, where: str, id: str, entry: Entry, *, once: bool) -> None:
        """Remove the pieces that a writer sent, then its entry."""
        for first in range(0, entry.pieces, _BATCH):
            numbers = range(first, min(first + _BATCH, entry.pieces))
            self.ask(where, b"UNLINK", *(self.names.piece(id, number).encode() for number in numbers), once=once)
        self.ask(where, b"HDEL", self._writers, id.encode(), once=once)
        self._layouts.pop(id, None)

    def _replaced(self, where: str, old: bytes) -> None:
        """Remove what the writer of a record sent that is none any more. What stays is found by ``unfinished``."""
        try:
            id = Record.of(old, where).id if old else ""
            said = self.ask(where, b"HGET", self._writers, id.encode()) if id else None
            entry = Entry.of(said) if isinstance(said, bytes) else None
            if entry is not None:
                self._sweep(where, id, entry, once=False)
        except ShardtoolError:
            return

    def _published(self, key: str, record: bytes) -> list[str]:
        """The keys of an object that do not bear its writer's id; none where nothing tells them any more."""
        if not record:
            return []
        try:
            made = Record.of(record, self.locate(key))
            placed = [] if made.place == "chunks" else self.layout(key, made)
        except FormatError:
            return []
        return [extent.key for _, extent in placed if extent.key != self.names.piece(made.id, 0)]

    def _sent(self, id: str, entry: Entry) -> int:
        where, sent = self.locate(entry.key), 0
        for first in range(0, entry.pieces, _BATCH):
            numbers = range(first, min(first + _BATCH, entry.pieces))
            lengths: list[Command] = [(b"STRLEN", self.names.piece(id, number).encode()) for number in numbers]
            sent += sum(size for size in self.deliver(where, lengths) if isinstance(size, int))
        return sent

    def _run(self, where: str, script: bytes, keys: int, *arguments: Buffer) -> tuple[bytes, bytes]:
        said = self.ask(where, b"EVAL", script, b"%d" % keys, *(self._objects, self._writers)[:keys], *arguments)
        match said:
            case [bytes(state), bytes(old)]:
                return state, old
        raise StoreError(f"the server of {where} answers a script with nonsense: see that it is Redis 6 or later")

    def _table(self, name: bytes) -> dict[str, bytes]:
        said = self.ask(self._uri, b"HGETALL", name)
        if not isinstance(said, list):
            raise StoreError(f"the server of {self._uri} answers with nonsense: see that it is Redis 6 or later")
        fields = [item.decode("utf-8", "replace") if isinstance(item, bytes) else "" for item in said[::2]]
        return {key: text for key, text in zip(fields, said[1::2], strict=False) if isinstance(text, bytes)}

    def _remember(self, key: str, record: Record) -> Record:
        if len(self.known) >= _KNOWN:
            self.known.clear()
            self._layouts.clear()
        self.known[key] = record
        return record
