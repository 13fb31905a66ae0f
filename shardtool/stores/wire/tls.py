"""TLS over a socket that brings much at a time.

OpenSSL left alone asks the socket twice for every 16 KiB, and threads that do so pass Python's lock around just as
often. Here the socket is asked for large pieces while no lock is held; what has come is decrypted in one go, by no more
threads at a time than there are processors. Large bodies that are sent are better off with Python's own
(``link.connect``), which encrypts into the socket.

::

    socket ── BLOCK at most ── incoming ── OpenSSL ── the caller's memory
    socket ── whole pieces  ── outgoing ── OpenSSL ── the caller's memory
"""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress

from shardtool.stores.local.direct import cores
from shardtool.turns import Turns

BLOCK = 256 << 10
"""Encrypted bytes that are taken from the socket at a time, at most: the processor's own cache holds them."""
HELD = 3 * BLOCK
"""Bytes of memory that a connection takes for what it has received, and the thread that has received it."""
_RECORD = 64 << 10  # more than any record, so that each read of OpenSSL is for one


class Secure:
    """A connected socket that speaks TLS; as a ``socket.socket`` is, as far as a ``Link`` needs it.

    The handshake is done when the object is made, within the socket's timeout for each step. Errors are ``ssl``'s.
    """

    def __init__(self, connected: socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._socket = connected
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._unsent = memoryview(b"")
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self._send_out()
                    self._take_in()
        finally:
            with suppress(OSError):  # why it has failed is for the other side too
                self._send_out()

    def unsent(self) -> bool:
        """Whether something that was taken by ``send`` has not left yet."""
        return bool(self._unsent) or self._outgoing.pending > 0

    @property
    def pending(self) -> bool:
        """Whether something has come that has not been received, encrypted or not."""
        return self._tls.pending() > 0 or self._incoming.pending > 0

    def fileno(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    def settimeout(self, seconds: float) -> None:
        """Seconds that the socket may be silent, or 0 for not waiting at all."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def recv_into(self, view: memoryview) -> int:
        """The next bytes, as many as have come; waits for one. 0 where there are no more."""
        while (count := self._decrypted(view)) is None:
            if self._outgoing.pending and not self._unsent:  # the protocol answers by itself
                with suppress(BlockingIOError):
                    self.push()
            self._take_in()
        return count

    def recv(self, most: int) -> bytes:
        """The same as new memory."""
        memory = bytearray(most)
        return bytes(memory[: self.recv_into(memoryview(memory))])

    def recv_at_once(self, most: int) -> bytes:
        """What has come already, which may be nothing."""
        memory = bytearray(most)
        return bytes(memory[: self._decrypted(memoryview(memory)) or 0])

    def send(self, data: memoryview) -> int:
        """Take ``BLOCK`` bytes at most, and send what the socket takes now: ``unsent`` tells whether something is left.

        Nothing more may be given then: ``push`` sends on.
        """
        assert not self.unsent()
        taken = self._tls.write(data[:BLOCK])
        with suppress(BlockingIOError):
            self.push()
        return taken

    def push(self) -> None:
        """Send what is left, as much as the socket takes."""
        if not self._unsent:
            self._unsent = memoryview(self._outgoing.read())
        if self._unsent:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def sendall(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it."""
        self._tls.write(data)
        self._send_out()

    def _decrypted(self, view: memoryview) -> int | None:
        """What can be had of what has come; None if that is nothing. 0 at the end."""
        count = 0
        read = self._tls.read
        with _TURNS:
            while count < len(view):
                try:
                    got: int = read(_RECORD, view[count : count + _RECORD])  # type: ignore[assignment]
                except ssl.SSLWantReadError:
                    return count or None
                except ssl.SSLEOFError:
                    return count  # cut off; whoever waits for more knows it
                except ssl.SSLError:
                    if not count:
                        raise
                    return count  # what came is good; the next call meets the error again
                if not got:
                    return count
                count += got
        return count

    def _take_in(self) -> None:
        scratch = _scratch()
        count = self._socket.recv_into(scratch)
        if count:
            self._incoming.write(scratch[:count])
        else:
            self._incoming.write_eof()

    def _send_out(self) -> None:
        while self.unsent():
            self.push()


_TURNS = Turns(cores())
_MEMORY = threading.local()


def _scratch() -> memoryview:
    """This thread's memory for what it has just received."""
    found: memoryview | None = getattr(_MEMORY, "scratch", None)
    if found is None:
        found = _MEMORY.scratch = memoryview(bytearray(BLOCK))
    return found
