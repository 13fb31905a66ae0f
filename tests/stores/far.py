"""What holds of every store that has a server, beside the laws of all stores.

::

    class TestOnTheWay(HttpContract):       fixtures of the module, which needs them for its own tests as well:
        ...                                   store    a whole bucket, empty
                                              proxy    in front of its server
                                              behind   opens the bucket by way of the proxy: ``behind(attempts=2)``
                                              raw      puts an object by the library of the server's maker
                                              at_port  opens some bucket on a port of this machine, trying once
"""

from __future__ import annotations

import random
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import ClassVar

import pytest

from shardtool.errors import AccessDenied, FormatError, NotFound, StoreError, Unavailable
from shardtool.stores import open_store
from shardtool.stores.base import Store
from shardtool.testing import read, write
from shardtool.testing.words import content, listed
from tests.servers import Trouble

MIB = 1 << 20
NEIGHBOURS = ("models/llama-2/a", "models/llama", "models/llamas", "z")
"""Objects beside the folder ``models/llama/``, with names that begin alike."""

Opened = Callable[..., AbstractContextManager[Store]]
Raw = Callable[[str, bytes], object]
Refusal = tuple[int, str, type[Exception], str]
"""The status and the code of an answer, and the error that it is, with a pattern of its message."""


def everything(store: Store) -> dict[str, Callable[[], object]]:
    """Ways to ask for the object ``a``."""
    return {
        "read": lambda: read(store, "a", 0, 1),
        "stat": lambda: store.stat("a"),
        "put": lambda: store.put("a", b"x"),
    }


def ranges(trouble: Trouble) -> list[str]:
    """The ranges that were asked for, "" where a whole object was."""
    return [request.range.removeprefix("bytes=") for request in trouble.seen if request.method == "GET"]


class ServerContract:
    """Of a store with any server. ``extra``: bytes of memory that a write and a read of 32 MiB may take."""

    extra: ClassVar[int] = 2 * MIB
    unreached: ClassVar[str] = "cannot be reached"
    """Pattern of the error where no server is."""

    def test_a_server_that_does_not_answer_is_unavailable(self, at_port: Callable[[int], Store]) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            with at_port(closed.getsockname()[1]) as store:
                for call in everything(store).values():
                    with pytest.raises(Unavailable, match=self.unreached):
                        call()

    @pytest.mark.parametrize("new", [b"new", b"newer"])
    @pytest.mark.parametrize("look", [listed, lambda store: store.stat("a")], ids=["list", "stat"])
    def test_an_object_is_read_in_the_version_that_was_seen(
        self, store: Store, look: Callable[[Store], object], new: bytes
    ) -> None:
        """Ranges of one checkpoint come from one version of its files, until somebody looks again."""
        store.put("a", b"old")
        look(store)
        assert (read(store, "a", 0, 1), read(store, "a", 0, 3)) == (b"o", b"old")
        with open_store(store.uri) as other:
            other.put("a", new)
        for start, size in ((1, 1), (0, 3)):
            with pytest.raises(StoreError, match="/a was replaced while it was read"):
                read(store, "a", start, size)
        assert store.get("a", limit=5) == new
        look(store)
        assert (read(store, "a", 1, 1), read(store, "a", 0, len(new))) == (b"e", new)
        store.put("a", b"our")
        assert (read(store, "a", 1, 1), read(store, "a", 0, 3)) == (b"u", b"our")

    def test_memory_goes_to_the_server_and_comes_from_it_without_a_copy(self, store: Store) -> None:
        """Neither a slice nor a range is held a second time."""
        size = 32 * MIB
        data = memoryview(bytearray(random.Random(5).randbytes(MIB)) * 32)
        room = memoryview(bytearray(size))
        write(store, "warm", data[: 10 * MIB])
        read(store, "warm", 0, 1)
        tracemalloc.start()
        try:
            write(store, "a", data, slice_size=size)
            store.readinto("a", 0, room)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert room == data
        assert peak < self.extra
        with pytest.raises(FormatError):
            store.readinto("a", 1, room)


class HttpContract(ServerContract):
    """Of a store that speaks HTTP, with a proxy on the way whose ``trouble`` is this store's, too."""

    nowhere: ClassVar[str]
    """The address of a folder of a bucket that does not exist."""
    bucket: ClassVar[str] = "bucket"
    """What people call it."""
    untold: ClassVar[frozenset[str]] = frozenset()
    """What the server answers without a word of the missing bucket, or is not asked for."""
    busy: ClassVar[Iterable[tuple[int, str]]]
    """Status and code of answers that mean: later."""
    throttled: ClassVar[tuple[int, str]]
    """Status and code of an answer that means: too often."""
    refusals: ClassVar[Iterable[Refusal]]
    library: ClassVar[int] = 1
    """How often a library under the store tries by itself, at most, what neither reads nor writes."""
    sending: ClassVar[tuple[str, ...]] = ("PUT",)
    """Methods of the requests that bring an object's bytes."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """The cases of each store."""
        cases: Mapping[str, Iterable[Sequence[object]]] = {
            "status, code, kind, message": self.refusals,
            "status, code": self.busy,
        }
        for names, given in cases.items():
            if set(names.split(", ")) <= set(metafunc.fixturenames):
                metafunc.parametrize(names, given)
                break

    # What is there

    def test_a_bucket_that_does_not_exist_is_named(self, store: Store) -> None:
        """Whatever is done there; where the server does not say it, the object at least."""
        with open_store(self.nowhere) as there:
            calls: dict[str, Callable[[], object]] = everything(there) | {
                "list": lambda: list(there.list()),
                "unfinished": lambda: list(there.unfinished()),
                "create": lambda: there.create("a", 20 * MIB),
                "write": lambda: write(there, "a", bytes(9 * MIB)),
                "delete": lambda: there.delete("a"),
            }
            assert self.untold < calls.keys()
            for name in calls.keys() - self.untold:
                with pytest.raises(NotFound, match=rf"the {self.bucket} of {self.nowhere}\S* does not exist"):
                    calls[name]()
            with pytest.raises(NotFound, match=there.locate("a")):
                there.stat("a")

    def test_markers_of_folders_are_not_objects(self, store: Store, raw: Raw) -> None:
        """Consoles make empty objects whose name ends with a slash."""
        for key in ("folder/", "folder/a", "double//slash"):
            raw(key, b"")
        assert listed(store) == ["folder/a"]

    # What goes wrong while one reads

    @pytest.mark.parametrize("reset", [False, True])
    def test_a_cut_body_is_continued_where_it_was_cut(self, far: Store, trouble: Trouble, reset: bool) -> None:
        """Only what is missing is asked for again."""
        data = content(3 * MIB)
        far.put("a", data)
        trouble.seen.clear()
        trouble.cuts, trouble.cut_after, trouble.reset = 2, MIB, reset
        assert read(far, "a", 1000, 2 * MIB + 500_000) == data[1000 : 1000 + 2 * MIB + 500_000]
        starts = [int(found.split("-")[0]) for found in ranges(trouble)]
        assert len(starts) == len(trouble.seen) == 3
        assert starts == sorted(starts)
        assert starts[0] == 1000
        # A reset may take back what had arrived; an end does not.
        assert reset or starts == [1000, 1000 + MIB, 1000 + 2 * MIB]
        assert {found.split("-")[1] for found in ranges(trouble)} == {str(1000 + 2 * MIB + 500_000 - 1)}

    def test_connections_that_bring_something_may_break_more_often(self, far: Store, trouble: Trouble) -> None:
        data = content(12 * MIB)
        write(far, "a", data, slice_size=12 * MIB)
        trouble.cuts, trouble.cut_after = 11, MIB
        assert read(far, "a", 0, len(data)) == data
        assert trouble.cuts == 0

    def test_connections_that_bring_nothing_are_given_up(self, behind: Opened, trouble: Trouble) -> None:
        with behind(attempts=3) as store:
            store.put("a", b"abc")
            trouble.cuts = 1000
            with pytest.raises(Unavailable, match=store.locate("a")):
                read(store, "a", 0, 3)
        assert ranges(trouble) == ["0-2"] * 3

    def test_a_busy_server_is_asked_again(self, far: Store, trouble: Trouble, status: int, code: str) -> None:
        far.put("a", b"abc")
        trouble.refused, trouble.status, trouble.code = 2, status, code
        assert read(far, "a", 0, 3) == b"abc"
        assert ranges(trouble) == ["0-2"] * 3
        trouble.refused = 2
        assert far.stat("a").size == 3
        assert trouble.refused == 0
        trouble.refused = 2
        assert listed(far) == ["a"]
        assert trouble.refused == 0
        trouble.refused = 2
        far.delete("a")
        assert trouble.refused == 0
        assert not far.exists("a")

    @pytest.mark.parametrize("attempts", [1, 3])
    def test_a_server_that_stays_busy_is_unavailable(self, behind: Opened, trouble: Trouble, attempts: int) -> None:
        status, code = self.throttled
        with behind(attempts=attempts) as store:
            for name, call in everything(store).items():
                trouble.seen.clear()
                trouble.refused, trouble.status, trouble.code = 1000, status, code
                said = code or str(status)
                if name == "stat":  # an answer to HEAD has no body, and so no code
                    trouble.status, said = 429, "429"
                with pytest.raises(Unavailable, match=rf"{store.locate('a')} is asked for too often .*{said}"):
                    call()
                assert len(trouble.seen) == attempts * (min(attempts, self.library) if name == "stat" else 1)

    def test_a_refusal_is_final(
        self, far: Store, trouble: Trouble, status: int, code: str, kind: type[Exception], message: str
    ) -> None:
        far.put("a", b"abc")
        trouble.refused, trouble.status, trouble.code = 1, status, code
        with pytest.raises(kind, match=message):
            read(far, "a", 0, 3)
        assert len(ranges(trouble)) == 1

    def test_who_may_not_is_told_at_once(self, far: Store, trouble: Trouble) -> None:
        for call in everything(far).values():
            trouble.refused, trouble.status, trouble.code = 1, 403, "AccessDenied"
            trouble.seen.clear()
            with pytest.raises(AccessDenied, match=far.uri):
                call()
            assert len(trouble.seen) == 1

    def test_what_is_missing_is_asked_for_once(self, far: Store, trouble: Trouble) -> None:
        for name in ("read", "stat"):
            trouble.seen.clear()
            with pytest.raises(NotFound, match="/a does not exist"):
                everything(far)[name]()
            assert len(trouble.seen) == 1

    @pytest.mark.parametrize("ours", [False, True])
    def test_an_object_replaced_between_two_tries_is_noticed(
        self, store: Store, far: Store, trouble: Trouble, ours: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half of one object and half of another must not be taken for one, whoever has made the other."""
        far.put("a", bytes(2 * MIB))
        trouble.cuts, trouble.cut_after = 1, MIB
        waits: list[float] = []

        def replace(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 1:
                (far if ours else store).put("a", b"x" * (2 * MIB))

        clock = SimpleNamespace(sleep=replace, monotonic=time.monotonic)
        monkeypatch.setattr("shardtool.stores.wire.retry.time", clock)  # the moment between two tries
        with pytest.raises(StoreError, match="replaced while it was read"):
            read(far, "a", 0, 2 * MIB)

    # What goes wrong while one writes

    @pytest.mark.parametrize("kind", ["refused", "lost"])
    def test_an_abort_that_fails_hides_nothing(self, far: Store, trouble: Trouble, kind: str) -> None:
        """Neither is it an error over the error for which the writer is given up."""
        writer = far.create("a", 20 * MIB)
        writer.write(0, bytes(8 * MIB))
        setattr(trouble, kind, 1000)
        trouble.status, trouble.code = 403, "AccessDenied"
        writer.abort()
        assert getattr(trouble, kind) < 1000

    @pytest.mark.parametrize("size", [3, 12 * MIB])
    @pytest.mark.parametrize("kind", ["refused", "lost"])
    def test_an_upload_gets_through(self, far: Store, trouble: Trouble, size: int, kind: str) -> None:
        """To a server that is busy; and where answers get lost, since sending the same bytes twice is no harm."""
        data = content(size)
        setattr(trouble, kind, 3)
        trouble.status, trouble.code = self.throttled
        if kind == "lost":
            trouble.methods = self.sending
        write(far, "a", data, slice_size=6 * MIB)
        assert getattr(trouble, kind) == 0
        assert far.get("a", limit=size) == data
