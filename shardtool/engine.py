"""The engine: brings the bytes of a schedule to sinks, with threads, under one arena.

::

    execute
    ├── dispatcher (the caller's thread): per step, lease a block, ask the sinks for room, queue the reads
    └── readers (threads): read -> scatter (slice, cast) -> the last one of a step hands its tiles to their sinks

Memory is leased by the dispatcher only, in the order of the steps. A sink gives a tile's memory back when it is
done with it; the block returns when all its tiles have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardtool.budget import Arena, Block, Stopped
from shardtool.cast import cast_into
from shardtool.dtypes import FLOATS, DType
from shardtool.errors import UnsupportedTransform
from shardtool.schedule import Copy, Read, Step, Tile
from shardtool.stores.base import Store
from shardtool.turns import Turns

Progress = Callable[[int], None]
"""Told of the bytes that have just been done, by one thread at a time."""


class Clock:
    """Seconds that the threads of a run spend in its stages, added up: two threads may spend two in one second.

    ``storage``: in the store, from the request to the last byte; ``hash``: with digests; ``copy``: from the engine's
    memory to where tensors lie; ``exchange``: the consumer's, with other ranks; ``room``: the dispatcher's, until the
    consumer has taken what was read ahead; ``data``: the consumer's, until there is something to take.
    """

    STAGES = ("storage", "hash", "copy", "exchange", "room", "data")

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(self.STAGES, 0.0)
        self.busy = 0.0
        """Seconds in which at least one thread was in the store."""
        self._inside = 0
        self._since = 0.0
        self._lock = Lock()

    def asked(self) -> float:
        """A thread goes into the store; returns the time."""
        now = time.perf_counter()
        with self._lock:
            if not self._inside:
                self._since = now
            self._inside += 1
        return now

    def answered(self, began: float) -> None:
        """It has come back; ``began`` is when it went."""
        now = time.perf_counter()
        with self._lock:
            self.seconds["storage"] += now - began
            self._inside -= 1
            if not self._inside:
                self.busy += now - self._since

    def add(self, stage: str, began: float) -> None:
        """Count the time since ``began`` (of ``time.perf_counter``)."""
        spent = time.perf_counter() - began
        with self._lock:
            self.seconds[stage] += spent


class Sink(Protocol):
    """Where tiles go. ``staging`` is how many bytes of the step's block it needs per byte of tile."""

    staging: int

    def room(self, tile: Tile, memory: memoryview) -> memoryview:
        """Memory for the tile: of ``memory`` (``staging`` times its size), or the sink's own.

        Called by the dispatcher; may wait.
        """

    def done(self, tile: Tile, memory: memoryview, release: Callable[[], None]) -> None:
        """The tile is filled. ``memory`` is what ``room`` was given; ``release`` gives it back. Called by a reader."""


class _Work:
    """One step under way."""

    __slots__ = ("block", "held", "left", "lock", "memory", "rooms", "step")

    def __init__(self, step: Step, block: Block | None, jobs: int) -> None:
        self.step = step
        self.block = block
        self.memory = block.view if block else memoryview(b"")
        self.left = jobs
        self.held = len(step.tiles)
        self.rooms: dict[int, memoryview] = {}
        self.lock = Lock()

    def staging(self, tile: Tile) -> memoryview:
        return self.memory[tile.place : tile.place + tile.nbytes * tile.target.staging]

    def release(self) -> None:
        """One tile's memory is free; the block goes back with the last one."""
        with self.lock:
            self.held -= 1
            last = self.held == 0
        if last and self.block:
            self.block.release()


def execute(
    steps: Iterable[Step],
    store: Store,
    arena: Arena,
    *,
    readers: int,
    progress: Progress | None = None,
    stop: Callable[[], None] | None = None,
    clock: Clock | None = None,
    depth: int | None = None,
    few: int | None = None,
) -> None:
    """Run every step; returns when all tiles are done. The first failure of any thread is raised here.

    ``stop`` is called on failure, to wake sinks that wait in ``room``; they raise ``Stopped`` then. ``clock``: is told
    how long reads take. ``depth``: jobs that wait or are under way at most, for sinks whose room costs memory; ``few``:
    as many until it is clear that storage is what is waited for. Where it is not, more jobs only push each other's
    bytes out of the processor's cache.
    """
    depth = depth or 4 * max(1, readers) + 8
    run = _Run(store, arena, depth, min(few or depth, depth), progress, stop, clock or Clock())
    pool = _Pool(run.job, max(1, readers))
    try:
        for step in steps:
            run.dispatch(step, pool)
        pool.finish()
    except BaseException as error:
        run.fail(error)
        pool.finish()
        if not isinstance(error, Exception):  # Ctrl-C is not a consequence of what may have failed before
            raise
    if run.error is not None:
        raise run.error


_Job = tuple[_Work, list[Read]]


class _Pool:
    """Threads that do jobs, which never raise: started when there is one that no other waits for."""

    def __init__(self, do: Callable[[_Work, list[Read]], None], most: int) -> None:
        self._do = do
        self._most = most
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._idle: SimpleQueue[None] = SimpleQueue()
        self._threads: list[Thread] = []

    def submit(self, job: _Job) -> None:
        self._jobs.put(job)
        try:
            self._idle.get_nowait()
        except Empty:
            if len(self._threads) < self._most:
                thread = Thread(target=self._work, name=f"shardtool-{len(self._threads)}", daemon=True)
                thread.start()
                self._threads.append(thread)

    def finish(self) -> None:
        """Wait until all jobs are done and the threads have ended."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(*job)
            del job  # it has the memory of its step
            self._idle.put(None)


class _Run:
    def __init__(
        self,
        store: Store,
        arena: Arena,
        depth: int,
        few: int,
        progress: Progress | None,
        stop: Callable[[], None] | None,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._stop = stop
        self.error: BaseException | None = None
        self._store = store
        self._arena = arena
        self._progress = progress
        self._telling = Lock()
        self._waited = 0.0
        self._queued = Turns(few)
        self._spare = depth - few
        self._judged = few  # reads that are looked at first

    def fail(self, error: BaseException) -> None:
        """Remember the first error and wake everybody who waits."""
        if self.error is None:
            self.error = error
        self._arena.stop()
        if self._stop:
            self._stop()

    def dispatch(self, step: Step, pool: _Pool) -> None:
        block = self._arena.lease(step.cost) if step.cost else None
        jobs = [step.reads] if step.serial or not step.reads else [[read] for read in step.reads]
        work = _Work(step, block, len(jobs))
        self._queued.take()  # before memory is taken for it
        for tile in step.tiles:
            room = tile.target.sink.room(tile, work.staging(tile))
            work.rooms[id(tile)] = room
            if tile.fill is not None:
                fill(room, tile.target.tensor.dtype, tile.fill)
        for number, job in enumerate(jobs):
            if number:
                self._queued.take()
            if self.error is not None:
                raise Stopped
            pool.submit((work, job))

    def job(self, work: _Work, reads: list[Read]) -> None:
        try:
            if self.error is None:
                for read in reads:
                    self._read(work, read)
                self._finish(work)
        except BaseException as error:
            self.fail(error)
        finally:
            self._queued.give_back()

    def _read(self, work: _Work, read: Read) -> None:
        if read.place is None:
            (copy,) = read.copies
            start = copy.dst.offset * copy.dtype.itemsize
            self._fetch(read, work.rooms[id(copy.tile)][start : start + read.nbytes])
            return
        scratch = work.memory[read.place : read.place + read.nbytes]
        self._fetch(read, scratch)
        for copy in read.copies:
            scatter(copy, scratch, work.rooms[id(copy.tile)])

    def _fetch(self, read: Read, view: memoryview) -> None:
        began = self._clock.asked()
        worked = time.thread_time()
        try:
            self._store.readinto(read.key, read.start, view)
        finally:
            self._clock.answered(began)
        if self._spare:
            self._judge(time.perf_counter() - began, time.thread_time() - worked)

    def _judge(self, wall: float, worked: float) -> None:
        """Whether storage is what readers wait for, and not the processor: then as many as may be ask it at once."""
        with self._telling:
            self._waited += wall - 2 * worked
            self._judged -= 1
            if self._judged < 0 and self._waited > 0 and self._spare:
                self._queued.give_back(self._spare)
                self._spare = 0

    def _finish(self, work: _Work) -> None:
        with work.lock:
            work.left -= 1
            if work.left:
                return
        for tile in work.step.tiles:
            tile.target.sink.done(tile, work.staging(tile), work.release)
            if self._progress:
                with self._telling:
                    self._progress(tile.nbytes)


def scatter(copy: Copy, source: memoryview, room: memoryview) -> None:
    """Elements of a read to their places in a tile, cast where the types differ."""
    to = copy.tile.target.tensor.dtype
    src = elements(
        source, copy.dtype, copy.base + copy.src.offset * copy.dtype.itemsize, copy.src.shape, copy.src.strides
    )
    dst = elements(room, to, copy.dst.offset * to.itemsize, copy.dst.shape, copy.dst.strides)
    if to is copy.dtype:
        np.copyto(dst, src)
    else:
        cast_into(dst, to, src, copy.dtype)


def elements(
    memory: memoryview, dtype: DType, start: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[np.generic]:
    """A strided view of elements in memory, ``start`` in bytes."""
    item = dtype.itemsize
    return np.ndarray(shape, dtype.numpy, memory, start, tuple(s * item for s in strides))


def fill(room: memoryview, dtype: DType, value: float) -> None:
    """Every element of a tile set to one value."""
    count = len(room) // dtype.itemsize
    target = elements(room, dtype, 0, (count,), (1,))
    if dtype in FLOATS:
        one = np.zeros(1, dtype.numpy)
        cast_into(one, dtype, np.full(1, value, np.float64), DType.F64)
        target.fill(one[0])
    elif value == 0 or (not dtype.name.startswith("F") and value == value // 1):
        target.fill(int(value))
    else:
        raise UnsupportedTransform(f"elements of {dtype.name} cannot be filled with {value}")
