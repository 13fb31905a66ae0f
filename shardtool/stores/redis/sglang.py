"""Writes files so that SGLang can read them from Redis: a rank's file as one value per tensor, a text as one value.

Values grow below the writer's id and are renamed when the file is committed. The header of a rank's file is kept beside
them, so that it can be read as a file again. ``stores.redis.values`` says what SGLang wants.
"""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Iterator

from shardtool import header
from shardtool.errors import FormatError, PlanError, UsageError
from shardtool.header import Entry as Tensor
from shardtool.stores.base import CheckedWriter
from shardtool.stores.redis.ledger import Ledger
from shardtool.stores.redis.records import CHUNK, Entry, Record, unit
from shardtool.stores.redis.values import LARGEST, check_name, check_values, is_side_file, prefix, rank_of
from shardtool.stores.redis.wire import Address, Command

# KEYS: a value. ARGV: where its last byte will be. A value that has its size from the beginning is not copied for each
# part; one that has parts already is left alone, for this may arrive late.
_GROW = b"""
if redis.call('STRLEN', KEYS[1]) == 0 then redis.call('SETRANGE', KEYS[1], ARGV[1], string.char(0)) end
"""


def check_file(address: Address, key: str, size: int, begins: bytes, where: str) -> None:
    """Refuse a file of tensors, given its header with the length field, of which no values can be made."""
    check_name(address.name, address.db, address.uri)
    if _is_ranked(key, where):
        length = header.length(begins[:8], size, where)
        check_values(header.parse(begins[8 : 8 + length], size, where).entries, where)


def _is_ranked(key: str, where: str) -> bool:
    if not key.endswith(".safetensors") or key.startswith("."):
        return False
    if rank_of(key) is None:
        raise UsageError(
            f"{where} is not a rank's file: for=sglang takes names such as model-rank-0-part-0.safetensors, for others"
            " leave it out of the address"
        )
    return True


def sglang_writer(ledger: Ledger, address: Address, key: str, size: int, *, exclusive: bool) -> CheckedWriter | None:
    """What writes an object as SGLang reads it; None for one that SGLang does not read."""
    where = ledger.locate(key)
    check_name(address.name, address.db, address.uri)
    if _is_ranked(key, where):
        rank = rank_of(key)
        assert rank is not None
        if exclusive:
            raise UsageError(f"{where} cannot be created exclusively for SGLang: leave for=sglang out of the address")
        _check_alone(ledger, rank)
        return _RankWriter(ledger, key, size, rank)
    return _TextWriter(ledger, key, size, exclusive=exclusive) if is_side_file(key, size) else None


def _check_alone(ledger: Ledger, rank: int) -> None:
    """Refuse a rank of which there are values that no object of ours is made of: SGLang would load these too."""
    begins = ledger.names.ranked(rank)
    found = ledger.walk(begins)
    ours = {
        extent.key
        for key, record in ledger.records().items()
        if record.place == "rank" and record.rank == rank
        for _, extent in ledger.layout(key, record)
    }
    for key in sorted(found - ours):
        if ledger.ask(begins, b"EXISTS", key.encode()):
            raise PlanError(
                f"{ledger.locate('')} has values of rank {rank} that shardtool did not write, such as {key}, and SGLang"
                " would load them too: remove them or choose another name"
            )


class _ValueWriter(CheckedWriter):
    """What the two have in common: values that grow below the writer's id."""

    def __init__(self, ledger: Ledger, key: str, size: int) -> None:
        super().__init__(ledger.locate(key), size, unit=unit(size))
        self._ledger = ledger
        self._key = key
        self._id = secrets.token_hex(16)
        self._entry: Entry | None = None

    def _register(self, pieces: int) -> None:
        self._entry, command = self._ledger.register(self._key, self._id, pieces)
        self._ledger.deliver(self._where, [command])

    def _piece(self, number: int) -> str:
        return self._ledger.names.piece(self._id, number)

    def _put(self, number: int, whole: int, start: int, data: memoryview) -> Iterator[Command]:
        """The commands that put ``data`` at ``start`` of a value of ``whole`` bytes, which may be repeated."""
        name = self._piece(number).encode()
        if len(data) == whole:
            yield b"SET", name, data
            return
        if not start:
            yield b"EVAL", _GROW, b"1", name, b"%d" % (whole - 1)
        for at in range(0, len(data), CHUNK):
            yield b"SETRANGE", name, b"%d" % (start + at), data[at : at + CHUNK]

    def _abort(self) -> None:
        if self._entry is not None:
            self._ledger.give_up(self._id, self._entry)


class _TextWriter(_ValueWriter):
    """A file beside the weights. One that is not text is kept where SGLang does not look, for it would stumble."""

    def __init__(self, ledger: Ledger, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(ledger, key, size)
        self._exclusive = exclusive
        self._text = True
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def _write(self, data: memoryview) -> None:
        if self._entry is None:
            self._register(1)
        self._decode(data)
        self._ledger.deliver(self._where, [*self._put(0, self._size, self._written, data)])

    def _decode(self, data: memoryview, *, final: bool = False) -> None:
        try:
            if self._text:
                self._decoder.decode(data, final)
        except UnicodeDecodeError:
            self._text = False

    def _commit(self) -> None:
        assert self._entry is not None
        self._decode(memoryview(b""), final=True)
        record = Record(self._id, self._size, runs=((1, self._size),))
        renames = []
        if self._text:
            record = Record(self._id, self._size, "file")
            renames = [(self._piece(0), self._ledger.names.file(self._key))]
        self._ledger.commit(self._key, record, self._entry, exclusive=self._exclusive, renames=renames)


class _RankWriter(_ValueWriter):
    """A rank's file: its header is piece 0, its tensor n becomes piece n + 1."""

    def __init__(self, ledger: Ledger, key: str, size: int, rank: int) -> None:
        super().__init__(ledger, key, size)
        self._rank = rank
        self._first = bytearray()
        self._tensors: tuple[Tensor, ...] = ()
        self._next = 0

    def _write(self, data: memoryview) -> None:
        start = self._written
        if self._entry is None:
            taken = self._take_header(data)
            start, data = start + taken, data[taken:]
        commands: list[Command] = []
        while len(data) or self._empty_next():
            tensor = self._tensors[self._next]
            at = start - tensor.offset
            part = data[: tensor.nbytes - at]
            commands += self._tensor_part(tensor, at, part)
            start, data = start + len(part), data[len(part) :]
            if at + len(part) == tensor.nbytes:
                self._next += 1
        self._ledger.deliver(self._where, commands)

    def _empty_next(self) -> bool:
        return self._next < len(self._tensors) and not self._tensors[self._next].nbytes

    def _take_header(self, data: memoryview) -> int:
        """Gather the header; once it is there, send it. Returns how many bytes belong to it."""
        before = len(self._first)
        self._first += data[: max(0, 8 - before)]
        if len(self._first) < 8:
            return len(data)
        length = 8 + header.length(bytes(self._first[:8]), self._size, self._where)
        begun = len(self._first) - before
        self._first += data[begun : begun + length - len(self._first)]
        taken = len(self._first) - before
        if len(self._first) == length:
            self._tensors = header.parse(bytes(self._first[8:]), self._size, self._where).entries
            check_values(self._tensors, self._where)
            if length > LARGEST:
                raise PlanError(f"the header of {self._where} does not fit into a Redis value: use smaller parts")
            self._register(1 + len(self._tensors))
            self._ledger.deliver(self._where, [(b"SET", self._piece(0).encode(), bytes(self._first))])
            self._first = bytearray()
        return taken

    def _tensor_part(self, tensor: Tensor, at: int, part: memoryview) -> Iterator[Command]:
        before, number = prefix(tensor), self._next + 1
        whole = len(before) + tensor.nbytes
        if not at and len(part) == tensor.nbytes:
            yield b"SET", self._piece(number).encode(), (before, part)
            return
        if not at:
            yield from self._put(number, whole, 0, memoryview(before))
        yield from self._put(number, whole, len(before) + at, part)

    def _commit(self) -> None:
        if self._entry is None:
            raise FormatError(f"{self._where} is not a safetensors file: it ends within its header")
        begins = self._ledger.names.ranked(self._rank)
        renames = [(self._piece(n + 1), begins + tensor.name) for n, tensor in enumerate(self._tensors)]
        record = Record(self._id, self._size, "rank", rank=self._rank)
        self._ledger.commit(self._key, record, self._entry, exclusive=False, renames=renames)
