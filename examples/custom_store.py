"""A store of your own: a whole checkpoint in one SQLite database.

::

    python examples/custom_store.py ./llama llama.db

A store brings five methods (``list``, ``stat``, ``readinto``, ``create``, ``delete``) and knows bytes under keys, no
tensors. Its writer brings three. ``shardtool.testing.StoreContract`` holds every law that they must obey, as a test
class: subclass it with a fixture that makes an empty store (``tests/test_examples.py`` does so for this one).

The store itself can be given wherever an address can. For addresses too, name its scheme: in ``SCHEMES``, as here, or
for every program and the command line by an entry point of the package that has it::

    [project.entry-points."shardtool.stores"]
    sqlite = "custom_store:SqliteStore"
"""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Iterator
from threading import Lock

import shardtool
from shardtool.stores import SCHEMES
from shardtool.stores.base import CheckedWriter, Object, Store, check_key, target

PIECE = 1 << 20
SCHEMA = """
    CREATE TABLE IF NOT EXISTS contents (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, id INTEGER NOT NULL, size INTEGER NOT NULL);
"""


class SqliteStore(Store):
    """The objects of the database at ``sqlite://path``. One object has at most 1 GB, SQLite's own limit."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.lock = Lock()
        self.database = sqlite3.connect(uri.partition("://")[2], check_same_thread=False, isolation_level=None)
        self.database.executescript(SCHEMA)

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The objects whose key starts with ``prefix``."""
        with self.lock:
            query = "SELECT key, size FROM objects WHERE substr(key, 1, length(?1)) = ?1 ORDER BY key"
            rows = self.database.execute(query, (prefix,)).fetchall()
        return (Object(key, size) for key, size in rows)

    def stat(self, key: str) -> Object:
        """Raises ``NotFound`` where there is no such object."""
        return Object(key, self._find(key)[1])

    def readinto(self, key: str, start: int, view: memoryview) -> None:
        """Fill ``view``, a piece at a time."""
        memory = target(start, view)
        with self.lock:
            content, size = self._row(key)
            if start + len(memory) > size:
                raise shardtool.FormatError(f"{self.locate(key)} has {size} bytes, not {start + len(memory)}")
            if memory:
                with self.database.blobopen("contents", "data", content, readonly=True) as blob:
                    for at in range(0, len(memory), PIECE):
                        piece = memory[at : at + PIECE]
                        blob.seek(start + at)
                        piece[:] = blob.read(len(piece))

    def create(self, key: str, size: int, *, exclusive: bool = False) -> CheckedWriter:
        """Begin an object; nobody sees it before it is committed."""
        return SqliteWriter(self, check_key(key), size, exclusive=exclusive)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        with self.lock:
            self.database.execute(
                "DELETE FROM contents WHERE id = (SELECT id FROM objects WHERE key = ?)", (check_key(key),)
            )
            self.database.execute("DELETE FROM objects WHERE key = ?", (key,))

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def _find(self, key: str) -> tuple[int, int]:
        with self.lock:
            return self._row(key)

    def _row(self, key: str) -> tuple[int, int]:
        """An object's content and size; the lock is held."""
        query = "SELECT id, size FROM objects WHERE key = ?"
        row: tuple[int, int] | None = self.database.execute(query, (check_key(key),)).fetchone()
        if row is None:
            raise shardtool.NotFound(f"{self.locate(key)} does not exist")
        return row


class SqliteWriter(CheckedWriter):
    """Fills a content that no object names yet; ``CheckedWriter`` holds the caller to the order of the bytes."""

    def __init__(self, store: SqliteStore, key: str, size: int, *, exclusive: bool) -> None:
        super().__init__(store.locate(key), size)
        self._store, self._key, self._exclusive = store, key, exclusive
        with store.lock:
            made = store.database.execute("INSERT INTO contents (data) VALUES (zeroblob(?))", (size,))
            self._content = made.lastrowid or 0

    def _write(self, data: memoryview) -> None:
        with self._store.lock, self._store.database.blobopen("contents", "data", self._content) as blob:
            blob.seek(self._written)
            blob.write(data)

    def _commit(self) -> None:
        database = self._store.database
        with self._store.lock, database:
            database.execute("BEGIN IMMEDIATE")
            old = database.execute("SELECT id FROM objects WHERE key = ?", (self._key,)).fetchone()
            if old and self._exclusive:
                raise shardtool.AlreadyExists(f"{self._where} exists already")
            if old:
                database.execute("DELETE FROM contents WHERE id = ?", old)
            database.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", (self._key, self._content, self._size))

    def _abort(self) -> None:
        with self._store.lock:
            self._store.database.execute("DELETE FROM contents WHERE id = ?", (self._content,))


SCHEMES["sqlite"] = SqliteStore


def main() -> None:
    """Save into the database and verify what lies there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("database")
    parser.add_argument("--tp", type=int, default=2)
    args = parser.parse_args()

    address = f"sqlite://{args.database}"
    with SqliteStore(address) as store:
        shardtool.save(args.model, store, tp=args.tp, memory_limit="64MiB")
        print("equal" if shardtool.verify(store, against=args.model).ok else "not equal")
        for found in store.list():
            print(f"{found.size:>12,}  {found.key}")
    for name, tensor in shardtool.stream(address, rank=0):
        print(f"{tensor.dtype}  {list(tensor.shape)}  {name}")


if __name__ == "__main__":
    main()
