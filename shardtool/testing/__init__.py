"""For those who write a store: the laws as a test class, and two stores that wrap another to watch or to break it.

::

    class TestMyStore(StoreContract):            every law of shardtool.stores.base, one test each
        gaps = frozenset({"exclusive race"})     laws that the store cannot keep: their tests assert what happens then

        @pytest.fixture
        def store(self, tmp_path):
            with MyStore(tmp_path) as store:
                yield store

    class TestMyMirror(ReadOnlyContract):        the laws of reading, for a store that cannot be written
        @pytest.fixture
        def fill(self, tmp_path):
            return lambda key, data: put_behind(tmp_path, key, data)

    CountingStore(inner)                         how many bytes were read and written, and which ones
    FaultyStore(inner, {("readinto", 3): Raise(Unavailable("cut"))})

    write(store, key, data, slice_size=...)      an object in slices, as the engine writes it
    read(store, key, start, size)                a range of one as bytes

Needs pytest; nothing else in shardtool imports this package.
"""

from __future__ import annotations

from shardtool.stores.counting import CountingStore
from shardtool.stores.faulty import Call, Fault, FaultyStore, Flip, Raise, Truncate
from shardtool.testing.reading import Fill, ReadingContract, ReadOnlyContract
from shardtool.testing.words import read, write
from shardtool.testing.writing import StoreContract

__all__ = [
    "Call",
    "CountingStore",
    "Fault",
    "FaultyStore",
    "Fill",
    "Flip",
    "Raise",
    "ReadOnlyContract",
    "ReadingContract",
    "StoreContract",
    "Truncate",
    "read",
    "write",
]
