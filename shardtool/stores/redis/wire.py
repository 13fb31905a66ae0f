"""Redis' protocol over connections of our own: large values go from and to the caller's memory without a copy.

::

    Address    host, user, password, database, name: what a redis:// address says
    Wire       one connection: commands out, replies in; a bulk reply can be received straight into a view
    Pool       connections that are idle; one is lent to one thread at a time

Commands may be sent before the replies to those before them are read. A connection on which anything went wrong, or
that owes replies, is closed, never used again.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from shardtool.errors import ShardtoolError, StoreError, Unavailable, UsageError
from shardtool.stores import accounts
from shardtool.stores.base import Buffer, check_key
from shardtool.stores.redis.errors import Refusal, translated
from shardtool.stores.wire.link import Link, Pace, connect, reason, unreached

_INLINE = 16 << 10  # arguments up to this size are sent together with what is before them
_LINE = 64 << 10
_REPLY = 64 << 20
_WHOLE = 512 << 20  # bytes of all that is in one reply
_ITEM = 64  # bytes that one of a list costs at least
_DEPTH = 4
_PORT = 6379

Reply = int | bytes | None | list["Reply"]
Command = tuple[Buffer | tuple[Buffer, ...], ...]
"""What is sent: an argument that is a tuple is one value, its buffers in a row."""


@dataclass(frozen=True, slots=True)
class Address:
    """What ``redis[s]://[user:password@]host[:port]/name[?db=N&for=sglang&...]`` says.

    ``uri``: the address without who we are. User and password come from the environment where the address has none.
    ``ca``, ``certificate``, ``key``: files in PEM format for TLS.
    """

    uri: str
    host: str
    port: int
    name: str
    db: int = 0
    tls: bool = False
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    scheme: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""

    @classmethod
    def of(cls, address: str) -> Address:
        """Raises ``UsageError``, whose message does not repeat the address."""
        kind, _, rest = address.partition("://")
        place, _, query = rest.partition("?")
        login, name = place.partition("/")[::2]
        name = name.strip("/")
        shape = f"write {kind}://host:port/name"
        try:
            parts = urlsplit(f"{kind}://{login}")
            host, port = parts.hostname, parts.port
        except ValueError:
            raise UsageError(f"the host or port of a {kind}:// address makes no sense: {shape}") from None
        if not host:
            raise UsageError(f"a {kind}:// address names no host: {shape}")
        if not name:
            raise UsageError(f"the address {kind}://{login.rpartition('@')[2]} names no checkpoint: {shape}")
        base = f"{kind}://{login.rpartition('@')[2]}/{check_key(name)}"
        options = _options(query, base)
        db = options.get("db", "0")
        if not (db.isascii() and db.isdigit() and len(db) < 6):
            raise UsageError(f"{base}: db={db} is not the number of a database")
        if options.get("for", "sglang") != "sglang":
            raise UsageError(f"{base}: for={options['for']} is not known: leave it out, or write for=sglang")
        account = accounts.redis()
        return cls(
            uri=f"{base}?db={int(db)}" if int(db) else base,
            host=host,
            port=port or _PORT,
            name=name,
            db=int(db),
            tls=kind == "rediss",
            user=unquote(parts.username or "") or (account.username or "" if parts.password is None else ""),
            password=unquote(parts.password or "") or account.password or "",
            scheme=options.get("for", ""),
            ca=options.get("ssl_ca_certs", ""),
            certificate=options.get("ssl_certfile", ""),
            key=options.get("ssl_keyfile", ""),
        )

    @property
    def place(self) -> str:
        """The same for all addresses of one place, as far as can be told."""
        return f"redis://{self.host.lower()}:{self.port}/{self.name}?db={self.db}"

    def context(self) -> ssl.SSLContext | None:
        """How TLS is spoken; None for a plain connection."""
        if not self.tls:
            return None
        context = ssl.create_default_context()
        try:
            if trusted := self.ca or accounts.ca_file():
                context.load_verify_locations(trusted)
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key or None)
        except OSError as error:  # also what ssl raises for a file that is no certificate
            named = ", ".join(filter(None, (self.ca or accounts.ca_file(), self.certificate, self.key)))
            raise UsageError(f"{self.uri}: the certificates in {named} cannot be used ({error})") from None
        return context


_KNOWN = ("db", "for", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


def _options(query: str, base: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _KNOWN:
            raise UsageError(f"{base}: the address says {name!r}, which is not one of {', '.join(_KNOWN)}")
        options[name] = value
    return options


class Wire:
    """One connection. ``owed``: replies that were not read yet. ``heard``: whether the server has said anything."""

    def __init__(self, link: Link) -> None:
        self.owed = 0
        self.heard = False
        self._link = link
        self._room = 0  # bytes that the reply may still take
        self._input = link.file()

    def send(self, *arguments: Buffer | tuple[Buffer, ...]) -> None:
        """Send a command. A server that breaks off may have said why, which is a ``Refusal``."""
        try:
            self._send(*arguments)
        except TimeoutError:
            raise
        except OSError:
            if words := self._last_words():
                self.owed = -1  # whoever lent it closes it
                raise Refusal(words) from None
            raise
        self.owed += 1

    def _send(self, *arguments: Buffer | tuple[Buffer, ...]) -> None:
        pending = bytearray(b"*%d\r\n" % len(arguments))
        for argument in arguments:
            pieces = argument if isinstance(argument, tuple) else (argument,)
            pending += b"$%d\r\n" % sum(len(piece) for piece in pieces)
            for piece in pieces:
                if len(piece) <= _INLINE:
                    pending += piece
                else:
                    self._link.sendall(pending)
                    self._link.sendall(piece)
                    pending = bytearray()
            pending += b"\r\n"
        self._link.sendall(pending)

    def _last_words(self) -> str:
        """The error that a server sent before it closed the connection; there may be replies before it."""
        self._link.expect(1.0)
        try:
            while True:
                kind, text = self._line()
                if kind == b"-":
                    return text.decode("utf-8", "replace")
        except (OSError, EOFError, ProtocolError):
            return ""

    def reply(self, limit: int = _REPLY) -> Reply:
        """The next reply; no part of it may be longer than ``limit`` bytes. An error is a ``Refusal``."""
        self._link.expect()
        self._room = _WHOLE
        found = self._reply(limit, 0)
        self.owed -= 1
        if isinstance(found, Refusal):
            raise found
        return found

    def into(self, view: memoryview) -> bool:
        """The next reply, a string, into ``view``; False where it is missing or of another length."""
        self._link.expect()
        kind, text = self._line()
        self.owed -= 1
        if kind == b"-":
            raise Refusal(text.decode("utf-8", "replace"))
        if kind != b"$":
            raise ProtocolError(f"it answers {kind + text[:20]!r} where a value was asked for")
        size = self._number(text)
        if size == len(view):
            self._fill(view)
            self._end()
            return True
        if size > len(view):
            raise ProtocolError(f"it sends {size} bytes where {len(view)} were asked for")
        if size >= 0:
            self._fill(memoryview(bytearray(size)))
            self._end()
        return False

    def stale(self) -> bool:
        """Whether the server has closed the idle connection, or says what nobody has asked for."""
        return self._link.stale()

    def close(self) -> None:
        """Close it."""
        self._input.close()
        self._link.shut()

    def _reply(self, limit: int, depth: int) -> Reply | Refusal:
        kind, text = self._line()
        match kind:
            case b"+":
                return text
            case b"-":
                return Refusal(text.decode("utf-8", "replace"))
            case b":":
                return self._number(text)
            case b"$":
                size = self._number(text)
                if size < 0:
                    return None
                if size > min(limit, self._room):
                    raise ProtocolError(f"it sends a value of {size} bytes where at most {limit} make sense")
                self._room -= size
                data = bytearray(size)
                self._fill(memoryview(data))
                self._end()
                return bytes(data)
            case b"*":
                count = self._number(text)
                self._room -= _ITEM * max(0, count)
                if self._room < 0 or depth >= _DEPTH:
                    raise ProtocolError("it sends more than anybody has asked for")
                items: list[Reply] = []
                for _ in range(count):
                    item = self._reply(limit, depth + 1)
                    if isinstance(item, Refusal):
                        raise ProtocolError("it sends an error inside a list")
                    items.append(item)
                return None if count < 0 else items
            case _:
                raise ProtocolError(f"it answers {kind + text[:20]!r}")

    def _line(self) -> tuple[bytes, bytes]:
        line = self._input.readline(_LINE)
        if not line.endswith(b"\r\n"):
            if len(line) == _LINE:
                raise ProtocolError("it sends a line without an end")
            raise EOFError("it closed the connection")
        self.heard = True
        return line[:1], line[1:-2]

    def _number(self, text: bytes) -> int:
        try:
            return int(text)
        except ValueError:
            raise ProtocolError(f"it sends {text[:20]!r} for a number") from None

    def _fill(self, view: memoryview) -> None:
        if self._input.readinto(view) != len(view):
            raise EOFError("it closed the connection")

    def _end(self) -> None:
        if self._input.read(2) != b"\r\n":
            raise ProtocolError("a value does not end where it should")


class ProtocolError(Exception):
    """What came is not Redis' protocol."""


class Pool:
    """The connections to one server, for any number of threads."""

    def __init__(self, address: Address, pace: Pace) -> None:
        self._address = address
        self._pace = pace
        self._tls = address.context()
        self._idle: list[Wire] = []
        self._lock = threading.Lock()
        self._process = os.getpid()

    @contextmanager
    def lent(self, where: str) -> Iterator[Wire]:
        """A connection for the block, whose errors are those of shardtool; what may pass is ``Unavailable``.

        Replies that are still owed when the block ends cost the connection.
        """
        wire = self._take()
        try:
            if wire is None:
                wire = self._connected(where)
            yield wire
        except Refusal as refusal:
            raise translated(str(refusal), where) from None
        except ProtocolError as error:
            self._drop(wire)
            raise StoreError(
                f"the server of {where} does not speak Redis' protocol as it should ({error}): check the address"
            ) from None
        except (OSError, EOFError) as error:
            self._drop(wire)
            self.close()  # what is idle goes to the same server, which may have been started anew
            raise self._broken(error, wire, where) from error
        except ShardtoolError:
            raise
        except BaseException:
            self._drop(wire)
            raise
        finally:
            if wire is not None:
                self._give_back(wire)

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _take(self) -> Wire | None:
        with self._lock:
            if self._process != os.getpid():  # a child must not speak on its parent's connections
                self._process, self._idle = os.getpid(), []
            while self._idle:
                wire = self._idle.pop()
                if not wire.stale():
                    return wire
                wire.close()
        return None

    def _drop(self, wire: Wire | None) -> None:
        if wire is not None:
            wire.owed = -1

    def _give_back(self, wire: Wire) -> None:
        if wire.owed:
            wire.close()
            return
        with self._lock:
            self._idle.append(wire)

    def _connected(self, where: str) -> Wire:
        address = self._address
        link = connect(address.host, address.port, self._pace, where=where, tls=self._tls)
        wire = Wire(link)
        try:
            link.expect(self._pace.connect + self._pace.silence)
            if address.password:
                user = [address.user.encode()] if address.user else []
                wire.send(b"AUTH", *user, address.password.encode())
                wire.reply()
            if address.db:
                wire.send(b"SELECT", b"%d" % address.db)
                wire.reply()
        except BaseException as error:
            wire.close()
            if isinstance(error, Refusal):
                raise Refusal(str(error).replace(address.password or "\0", "...")) from None
            if isinstance(error, EOFError | OSError) and not wire.heard:
                raise self._broken(error, wire, where) from None
            raise
        return wire

    def _broken(self, error: BaseException, wire: Wire | None, where: str) -> Unavailable:
        if wire is None:
            return unreached(where, self._address.host, self._address.port, error)
        text = reason(error)
        if not wire.heard and not self._tls:
            return Unavailable(
                f"the server of {where} broke the connection without a word ({text}): if it speaks TLS, write rediss://"
            )
        return Unavailable(f"the connection to the server of {where} broke ({text}): try again")
