"""Bytes that one rank reads and all ranks get: each comes from storage once, and then goes over a process group.

::

    wanted          True, False or "auto" -> whether ranks shall exchange what they read
    exchange_for    ... -> their exchange, made before anything can fail;  heard: what fails then is told
    Exchange        every process makes one at the same time
    ├── told            what every rank has to say
    ├── owners          who reads which segment; before, that all ranks have the same list
    ├── share           the next segment: from its owner's memory into everybody's
    └── fail            this rank cannot go on; every other rank raises with its reason

Laws:

* all ranks share the same segments in the same order; one that does not is refused, on every rank;
* nothing is handed over before its owner has it and nobody has failed: a round of short messages comes first;
* a rank that fails, stops early or dies ends the others with one sentence that names it, and nobody waits for ever;
* one rank alone exchanges nothing, and needs no process group;
* no memory but the caller's is used for segments.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shardtool import digest, errors
from shardtool.checkpoint import single_file
from shardtool.errors import PlanError, ShardtoolError, StoreError, UsageError
from shardtool.messages import DONE, FAILED, GOING, GRACE, LOST, MOST, Alarm, Line, Message, first_line
from shardtool.stores import Address
from shardtool.stores.base import Store
from shardtool.stores.hub.existing import open_existing

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

TRANSFER = timedelta(seconds=120)
"""Within which a segment is with all ranks once its owner has it and all are ready."""
LOOK = 0.1
"""Seconds after which a rank that waits for memory looks whether another has lost a connection, and again."""
_MARK = 32
"""Bytes of a digest that says to which ranks, or to which device, a process belongs."""


def wanted(distributed: bool | str, store: Store) -> bool:
    """Whether ranks shall exchange what they read. ``auto``: if there are several and the store is not this machine's.

    Reading twice from this machine's page cache is faster than an exchange. Raises ``UsageError`` for another value.
    """
    if distributed not in (True, False, "auto"):
        raise UsageError(f"distributed={distributed!r} is neither True nor False nor 'auto'")
    if distributed != "auto":
        return bool(distributed)
    return store.remote and _world() > 1


def exchange_for(
    uri: Address,
    distributed: bool | str,
    *,
    group: dist.ProcessGroup | None = None,
    scope: str = "node",
    device: str | torch.device = "cpu",
) -> Exchange | None:
    """The exchange for what ranks read of a checkpoint, if they shall have one. The checkpoint is not looked at.

    What is wrong with the address or the device is not said here, where the others would not hear it.
    """
    if distributed not in (True, False, "auto"):
        raise UsageError(f"distributed={distributed!r} is neither True nor False nor 'auto'")
    if scope not in ("node", "global"):
        raise UsageError(f"scope={scope!r} is neither 'node' nor 'global'")
    if not distributed or _world() == 1:
        return None
    with contextlib.suppress(ShardtoolError), store_of(uri) as store:
        if not wanted(distributed, store):
            return None
    return Exchange(group, scope=scope, device=device if _is_device(device) else "cpu")


def _is_device(device: str | torch.device) -> bool:
    import torch

    try:
        index = torch.device(device).index or 0
    except (RuntimeError, TypeError):
        return False
    return str(device).startswith("cpu") or 0 <= index < torch.cuda.device_count()


def store_of(uri: Address) -> Store:
    """The store that a checkpoint, or a single file of tensors, lies in."""
    return open_existing((single_file(uri) or (uri,))[0])


@contextlib.contextmanager
def heard(exchange: Exchange | None) -> Iterator[None]:
    """What fails inside is told to the other ranks."""
    try:
        yield
    except BaseException as error:
        if exchange is not None:
            exchange.fail(error)
        raise


def _world() -> int:
    """The number of processes; 1 where no group was made."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Exchange:
    """What ranks do together. Every process of the world makes one at the same time, or none does.

    ``scope``: ``node``, the processes of this machine; ``global``, all of them. ``group``: these processes instead; the
    others make one for a group of their own. ``device``: where the memory lies that will be shared: NCCL carries it for
    GPUs of their own, gloo otherwise. ``timeout``: seconds that a rank waits for another that neither answers nor ends;
    None is torch's own. Used as a context, it fails with what is raised inside, and gives its groups back.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        scope: str = "node",
        device: str | torch.device = "cpu",
        timeout: float | None = None,
    ) -> None:
        if scope not in ("node", "global"):
            raise UsageError(f"scope={scope!r} is neither 'node' nor 'global'")
        self.rank, self.size = 0, 1
        self._owners: list[int] | None = None
        self._next = 0
        self._over = False
        self._line: Line | None = None
        self._alarm: Alarm | None = None
        self._groups: list[Any] = []
        if _world() > 1:
            self._join(group, scope, device, None if timeout is None else timedelta(seconds=timeout))

    def _join(self, group: Any, scope: str, device: Any, timeout: timedelta | None) -> None:
        """Find out who takes part, and make the groups: every process makes all of them, in one order."""
        import torch.distributed as dist

        everybody = dist.new_group(backend="gloo", timeout=timeout)
        circles, apart = _circles(everybody, group, scope, device)
        me = dist.get_rank()
        for ranks in circles:
            made = [everybody] if len(circles) == 1 else [dist.new_group(ranks, backend="gloo", timeout=timeout)]
            # Memory has a group of its own, so that it can be given up while messages still go.
            soon = min(timeout or TRANSFER, TRANSFER)
            made.append(dist.new_group(ranks, backend="nccl" if apart[ranks] else "gloo", timeout=soon))
            if me in ranks:
                self._groups = made
                self.rank, self.size, self._ranks = ranks.index(me), len(ranks), ranks
        if len(circles) > 1:
            dist.destroy_process_group(everybody)
        if self.size > 1:
            self._line = Line(self._groups[0], self._ranks, self.rank)
            self._alarm = Alarm(self._ranks)

    def owners(self, sizes: Sequence[int], names: Iterable[str] = ()) -> list[int]:
        """Who reads which segment, as places in the group (``rank`` is this process's).

        ``sizes``: bytes of every segment in the order in which they will be shared; ``names``: what tells two lists of
        the same sizes apart. All ranks must have the same: ``PlanError`` otherwise, on every one. Bytes are divided
        evenly, and neighbours go to different ranks, so that all of them read from the first segment on.
        """
        if self._line is not None:
            self._going(self._line, digest.of_bytes(repr((list(sizes), list(names))).encode()))
        self._owners = divided(sizes, self.size)
        self._next = 0
        return self._owners

    def share(self, number: int, memory: torch.Tensor) -> None:
        """Bring segment ``number`` from its owner's memory into that of the others: flat, bytes, as long on every rank.

        The owner has filled its memory before it calls this. A GPU's memory is filled in the order of its current
        stream. Raises what another rank failed with, ``StoreError`` for a rank that has ended.
        """
        if self._owners is None or number != self._next:
            raise UsageError(f"segment {number} is shared where {self._next} is next; say the owners first, keep order")
        self._next += 1
        if self._line is None:
            return
        self._going(self._line, "")
        lost = self._broadcast(memory, self._ranks[self._owners[number]])
        if lost is not None:
            self._end(self._line, lost)

    def _broadcast(self, memory: torch.Tensor, owner: int) -> str | None:
        """The memory over its group; what went wrong, as text. A GPU's memory is filled when this returns.

        A rank whose neighbour has ended sees that at once. The others wait for bytes that will never come, and look
        for its word meanwhile.
        """
        import torch.distributed as dist

        assert self._alarm is not None
        try:
            work = dist.broadcast(memory, src=owner, group=self._groups[1], async_op=True)
            pause, looked = 1e-5, time.monotonic()
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 1e-3)
                if time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    if self._alarm.is_on():
                        _abandon((work, memory, self._groups[1]))
                        return "another rank has lost a connection"
            work.wait()
            if memory.is_cuda:
                import torch

                torch.cuda.current_stream(memory.device).synchronize()
        except RuntimeError as error:
            return first_line(error)
        return None

    def told(self, text: str) -> list[str]:
        """What every rank says here, by place: at most ``MOST`` bytes each. Raises what somebody failed with."""
        if len(text.encode()) > MOST:
            raise UsageError(f"{text[:40]!r}... is longer than the {MOST} bytes that a rank can say")
        if self._line is None:
            return [text]
        heard = self._heard(self._line, text)
        return [heard[place].text if place != self.rank else text for place in range(self.size)]

    def _going(self, line: Line, text: str) -> None:
        """One round in which all say the same. Raises what somebody failed with, and if they do not."""
        heard = self._heard(line, text)
        for place, one in heard.items():
            if (one.number, one.text) != (line.number - 1, text):
                self._over = True
                self.close()
                raise self._unlike(place)

    def _heard(self, line: Line, text: str) -> dict[int, Message]:
        """One round of messages."""
        if self._over:
            raise UsageError("the exchange is over; make another one")
        heard = line.round(GOING, text, None)
        going = {place: one for place, one in heard.items() if isinstance(one, Message) and one.kind == GOING}
        if len(going) < len(heard):
            self._over = True
            self.close()
            raise self._reason(heard, "")
        return going

    def _end(self, line: Line, lost: str) -> None:
        """The memory's group has broken: give it up, so that everybody notices, and find out why."""
        self._over = True
        assert self._alarm is not None
        self._alarm.ring()
        _destroy(self._groups.pop(1))
        heard = line.round(LOST, lost, GRACE)
        self.close()
        raise self._reason(heard, lost)

    def _reason(self, heard: dict[int, Message | str], lost: str) -> ShardtoolError:
        """What to raise: a reason that a rank gave, else who has ended, else that a connection broke."""
        for place, one in sorted(heard.items()):
            if isinstance(one, Message) and one.kind == FAILED:
                kind, _, text = one.text.partition("\0")
                return _class(kind)(f"rank {self._ranks[place]}: {text}")
        for place, one in sorted(heard.items()):
            if isinstance(one, Message) and one.kind == DONE and not lost:
                return self._unlike(place)
        for place, one in sorted(heard.items()):
            if isinstance(one, str) and "Timed out" in one:
                return StoreError(f"rank {self._ranks[place]} does not answer; see what it is doing ({one})")
        for place, one in sorted(heard.items()):
            if isinstance(one, str):
                return StoreError(
                    f"rank {self._ranks[place]} has ended while tensors were exchanged; its own output says why ({one})"
                )
        return StoreError(f"a connection between the ranks has broken while tensors were exchanged ({lost})")

    def _unlike(self, place: int) -> PlanError:
        return PlanError(
            f"rank {self._ranks[place]} and rank {self._ranks[self.rank]} do not share the same segments; give every "
            "rank the same checkpoint, pattern and order"
        )

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank cannot go on, and why. What the others have said first is not told again."""
        if self._over or self._line is None:
            return
        self._over = True
        self._line.tell(FAILED, _told(error), GRACE)
        self.close()

    def close(self) -> None:
        """Give the groups back. Nobody waits for it."""
        if self._line is not None:
            if not self._over:
                self._line.tell(DONE, "", GRACE)
            self._line.close()
        self._over = True
        while self._groups:
            _destroy(self._groups.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self.close()


def divided(sizes: Sequence[int], ranks: int) -> list[int]:
    """An owner for each segment: the one that has the fewest bytes so far."""
    load = [0] * ranks
    found = []
    for size in sizes:
        owner = load.index(min(load))
        load[owner] += max(1, size)
        found.append(owner)
    return found


def _told(error: BaseException) -> str:
    """The class and the sentence of an error, for other ranks."""
    if isinstance(error, ShardtoolError):
        return f"{type(error).__name__}\0{error}"
    if isinstance(error, GeneratorExit):
        return f"{StoreError.__name__}\0it stopped before the last tensor"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{StoreError.__name__}\0{text}"


def _class(name: str) -> Callable[[str], ShardtoolError]:
    """The error class of this name; ``StoreError`` where there is none."""
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, ShardtoolError) else StoreError


def _circles(
    everybody: Any, group: Any, scope: str, device: Any
) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], bool]]:
    """The ranks that belong together, every circle of the world, and which of them have a GPU for each rank."""
    import torch
    import torch.distributed as dist

    if group is not None:
        belongs = f"group {dist.get_process_group_ranks(group)}"
    else:
        belongs = f"node {_machine()}" if scope == "node" else "global"
    mine = _mark(belongs) + _mark(_gpu(device))
    heard = [torch.empty(len(mine), dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(heard, torch.frombuffer(bytearray(mine), dtype=torch.uint8), group=everybody)
    marks = [bytes(one.numpy()) for one in heard]
    found: dict[bytes, list[int]] = {}
    for rank, mark in enumerate(marks):
        found.setdefault(mark[:_MARK], []).append(rank)
    circles = [tuple(ranks) for ranks in found.values()]
    apart = {}
    for ranks in circles:
        gpus = {marks[rank][_MARK:] for rank in ranks}
        apart[ranks] = len(gpus) == len(ranks) and _mark("") not in gpus and dist.is_nccl_available()
    return circles, apart


def _mark(text: str) -> bytes:
    return bytes.fromhex(digest.of_bytes(text.encode()))[:_MARK]


def _machine() -> str:
    """A name for this machine that no other has, and that processes which cannot reach each other do not share."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as text:
            return f"{socket.gethostname()} {text.read()}"
    except OSError:
        return socket.gethostname()


def _gpu(device: Any) -> str:
    """Which GPU of which machine a device is; nothing for what NCCL cannot reach."""
    import torch

    place = torch.device(device)
    if place.type != "cuda":
        return ""
    return f"{_machine()} {torch.cuda.get_device_properties(place).uuid}"


def _abandon(things: object) -> None:
    """Never free these, not even at the end: freeing a group waits for what is under way in it, which may not come."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(things))


def _destroy(group: Any) -> None:
    """Give a group back, if that was not done already for all groups of the process."""
    import torch.distributed as dist

    with contextlib.suppress(ValueError, AssertionError, RuntimeError):
        dist.destroy_process_group(group)
