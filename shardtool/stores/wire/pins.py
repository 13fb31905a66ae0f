"""Which version of an object is to be read: a store that can tell remembers what it has said of its objects."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_MOST = 100_000  # objects: beyond them each read is only held to itself


class Pins:
    """The versions of objects that were seen last, until this process changes them; for many threads.

    ::

        since = pins.since()
        ...                             ask the server
        pins.keep(key, version, since)
        ...
        fill(..., version=pins.of(key))
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[str, str] = {}
        self._changing: Counter[str] = Counter()
        self._changes = 0

    def since(self) -> int:
        """The moment before something is looked at, for ``keep``."""
        return self._changes

    def keep(self, key: str, version: str, since: int) -> None:
        """What was seen of an object, unless this process has changed one meanwhile."""
        with self._lock:
            known = key in self._versions or len(self._versions) < _MOST
            if known and since == self._changes and key not in self._changing:
                self._versions[key] = version

    def of(self, key: str) -> str:
        """The version to read, or nothing."""
        with self._lock:
            return self._versions.get(key, "")

    @contextmanager
    def changing(self, key: str) -> Iterator[None]:
        """While the block runs no version of this object is known, nor after it, until it is seen again."""
        with self._lock:
            self._changes += 1
            self._changing[key] += 1
            self._versions.pop(key, None)
        try:
            yield
        finally:
            with self._lock:
                self._changes += 1
                self._changing[key] -= 1
                if not self._changing[key]:
                    del self._changing[key]
