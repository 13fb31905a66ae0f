"""How each loader brings tensors to a device, and what the device can take: the child of ``device.py``.

python benchmarks/devicers.py '{"call": "runai", "device": "cuda:0", "files": ["a.safetensors"], ...}'

It imports everything, wakes the device, says ``ready`` and waits for a line; then the clock starts. All tensors are
kept on the device, and the clock ends when it has done all its work. Their bytes are proven behind it, by a digest of
what lies there. It runs under the Python that has the peer.
"""

from __future__ import annotations

import json
import os
import queue
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import contestants
import torch
import xxhash
from contestants import Job, Tensors

BLOCK = 8 << 20
"""Bytes of one copy, as ours are."""
PAGE = 4096
PROOF = 16 << 20
"""Bytes that are brought back at once to be proven."""
PROVERS = min(8, os.cpu_count() or 1)
cuda: Any = torch.cuda
"""It does not say the types of what it has."""


# Devices. What is asked of both is the same, so that all but the calls of CUDA itself runs without one.


class Lane:
    """Copies in order, made at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], Any]:
        """Begin to copy; what is returned waits until it has been made."""
        target.copy_(source)
        return int


class CudaLane(Lane):
    """Copies in order, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = cuda.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], Any]:
        """Begin to copy; what is returned waits until it has been made."""
        with cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = cuda.Event()
            event.record(self._stream)
        return lambda: event.synchronize()


def lane(device: torch.device) -> Lane:
    """A lane of a device."""
    return CudaLane(device) if device.type == "cuda" else Lane(device)


def ring(device: torch.device, nbytes: int) -> torch.Tensor:
    """Memory on this machine from which a device copies, pinned for CUDA. It has been touched."""
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8, pin_memory=device.type == "cuda")
    lead = -memory.data_ptr() % PAGE  # what is read past the page cache lies on pages
    return memory[lead : lead + nbytes].zero_()


def finished(device: torch.device) -> None:
    """Return when a device has done all its work."""
    if device.type == "cuda":
        cuda.synchronize(device)


def wake(device: torch.device) -> None:
    """What a device's first use takes: its context, its first copies each way, the memory of a first thread."""
    torch.ones(PAGE).to(device).cpu()
    finished(device)
    idle = threading.Thread(target=int)
    idle.start()
    idle.join()


class Pinned:
    """Bytes that a process has pinned by way of torch at most: of its allocator's, and what was registered.

    What a loader's own code pins is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        self._registered = 0
        self._most = 0
        self._cuda = device.type == "cuda"
        self._before = 0
        if self._cuda:
            self._before = self._allocated("current")
            self.watch(cuda.cudart())

    def most(self) -> int:
        """So far, since this was made."""
        return self._most + (max(0, self._allocated("peak") - self._before) if self._cuda else 0)

    def watch(self, runtime: Any) -> None:
        """Count what is registered by way of this module from now on."""
        register, forget = runtime.cudaHostRegister, runtime.cudaHostUnregister
        sizes: dict[int, int] = {}

        def registered(address: int, nbytes: int, flags: int) -> Any:
            refused = register(address, nbytes, flags)
            if not int(refused):
                sizes[address] = nbytes
                self._registered += nbytes
                self._most = max(self._most, self._registered)
            return refused

        def forgotten(address: int) -> Any:
            self._registered -= sizes.pop(address, 0)
            return forget(address)

        runtime.cudaHostRegister, runtime.cudaHostUnregister = registered, forgotten

    def _allocated(self, kind: str) -> int:
        stats = getattr(cuda, "host_memory_stats", None)
        return int(stats().get(f"allocated_bytes.{kind}", 0)) if stats is not None else 0


# The proof.


def proven(tensors: dict[str, Any], device: torch.device) -> dict[str, int]:
    """The digest, bytes and count of tensors that lie on a device, in the terms of ``contestants.consume``."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise SystemExit(f"{name} lies on {tensor.device} and not on {device}")
        if not tensor.is_contiguous():
            raise SystemExit(f"{name} is not contiguous")
    todo: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
    for pair in tensors.items():
        todo.put(pair)
    totals: list[int] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            total = 0
            memory = ring(device, PROOF)
            while (pair := todo.get()) is not None:
                total += _digest(*pair, memory)
            totals.append(total)
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(PROVERS)]
    for worker in workers:
        todo.put(None)
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    sizes = [tensor.nbytes for tensor in tensors.values()]
    digest = sum(totals) % contestants.MOST
    return {"digest": digest, "bytes": sum(sizes), "tensors": len(sizes), "largest": max(sizes)}


def _digest(name: str, tensor: Any, memory: torch.Tensor) -> int:
    """A tensor's part of the sum, as ``contestants.digest`` has it; ``memory``: into which it is brought for that."""
    state = xxhash.xxh3_64(seed=xxhash.xxh3_64_intdigest(name.encode()))
    flat = tensor.detach().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    for start in range(0, len(flat), PROOF):
        part = flat[start : start + PROOF]
        state.update(memory[: len(part)].copy_(part).numpy().data)
    return int(state.intdigest())


# What the machine can do.


def _laid_out(job: Job) -> tuple[list[tuple[str, int, int, int]], list[tuple[str, int, int]]]:
    """Blocks (file, start, bytes, place) of all files one behind the other, and tensors (name, place, bytes)."""
    blocks, tensors, place = [], [], 0
    for path in job["files"]:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(length))
        head.pop("__metadata__", None)
        for name, entry in head.items():
            begin, end = entry["data_offsets"]
            tensors.append((name, place + 8 + length + begin, end - begin))
        blocks += [(path, at, min(BLOCK, size - at), place + at) for at in range(0, size, BLOCK)]
        place += -(-size // BLOCK) * BLOCK
    return blocks, tensors


def _target(blocks: list[tuple[str, int, int, int]], device: torch.device) -> torch.Tensor:
    """Memory on the device for all blocks, which is there."""
    size = max(place + BLOCK for _, _, _, place in blocks)
    return torch.empty(size, dtype=torch.uint8, device=device).fill_(1)


def copies(job: Job) -> Callable[[], Tensors]:
    """Blocks of the ring to the device and nothing else, as many bytes as the files have. No tensors come of it."""
    device = torch.device(job["device"])
    blocks, _ = _laid_out(job)
    source = ring(device, job["threads"] * BLOCK)
    target = _target(blocks, device)
    lanes = [lane(device), lane(device)]

    def run() -> Iterator[tuple[str, Any]]:
        for number, (_, _, nbytes, place) in enumerate(blocks):
            at = number % job["threads"] * BLOCK
            lanes[number % 2].copy(target[place : place + nbytes], source[at : at + nbytes])
        return iter(())

    return run


def bare(job: Job) -> Callable[[], Tensors]:
    """Threads that read blocks into the ring, from where they are copied: two blocks for each, which take turns.

    The ring and the memory of the device are there before the clock starts, and files are open.
    """
    device, threads = torch.device(job["device"]), job["threads"]
    blocks, tensors = _laid_out(job)
    memory = ring(device, 2 * threads * BLOCK)
    target = _target(blocks, device)
    flags = os.O_RDONLY | (os.O_DIRECT if job["direct"] else 0)
    fds = {path: os.open(path, flags) for path in job["files"]}
    lanes = [lane(device) for _ in range(threads)]
    failed: list[BaseException] = []

    def work(number: int, todo: Iterator[tuple[str, int, int, int]]) -> None:
        try:
            slots = [memory[at : at + BLOCK] for at in (2 * number * BLOCK, (2 * number + 1) * BLOCK)]
            landed: list[Callable[[], Any]] = [int, int]
            for turn, (path, start, nbytes, place) in enumerate(todo):
                landed[turn % 2]()
                slot = slots[turn % 2]
                view = slot.numpy().data
                at = 0
                while at < nbytes:
                    got = os.preadv(fds[path], [view[at : -(-nbytes // PAGE) * PAGE]], start + at)
                    if not got:
                        raise EOFError(path)
                    at += got
                landed[turn % 2] = lanes[number].copy(target[place : place + nbytes], slot[:nbytes])
            for wait in landed:
                wait()
        except BaseException as error:
            failed.append(error)

    def run() -> Iterator[tuple[str, Any]]:
        todo = iter(blocks)
        workers = [threading.Thread(target=work, args=(number, todo)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failed:
            raise failed[0]
        return ((name, target[place : place + nbytes]) for name, place, nbytes in tensors)

    return run


# Peers. Those of shardtool are ``shardtool_load`` and ``shardtool_stream`` of contestants.py.


def safetensors_load(job: Job) -> Callable[[], Tensors]:
    """``load_file``, file after file."""
    from safetensors.torch import load_file

    return lambda: (pair for path in job["files"] for pair in load_file(path, device=job["device"]).items())


def safetensors_open(job: Job) -> Callable[[], Tensors]:
    """``safe_open``, tensor by tensor."""
    from safetensors import safe_open

    def run() -> Iterator[tuple[str, Any]]:
        for path in job["files"]:
            with safe_open(path, "pt", device=job["device"]) as file:
                for name in file.keys():  # noqa: SIM118 - it is not a dict
                    yield name, file.get_tensor(name)

    return run


def runai(job: Job) -> Callable[[], Tensors]:
    """Run:ai Model Streamer, which is told the device. Its concurrency and memory limit come from variables."""
    from runai_model_streamer import SafetensorsStreamer

    def run() -> Iterator[tuple[str, Any]]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(job["files"], device=job["device"])
            yield from streamer.get_tensors()

    return run


def instanttensor(job: Job) -> Callable[[], Tensors]:
    """InstantTensor's ``safe_open``, tensors copied out of its buffer; ``backend``: how it reads."""
    import instanttensor as package

    backend = job["options"].get("backend")
    options = {"backend": package.BackendPolicy[backend]} if backend else {}

    def run() -> Iterator[tuple[str, Any]]:
        with package.safe_open(list(job["files"]), framework="pt", device=job["device"], **options) as file:
            yield from file.tensors()

    return run


CALLS: dict[str, Callable[[Job], Callable[[], Tensors]]] = {
    "shardtool_load": contestants.shardtool_load,
    "shardtool_stream": contestants.shardtool_stream,
    "copies": copies,
    "bare": bare,
    "safetensors_load": safetensors_load,
    "safetensors_open": safetensors_open,
    "runai": runai,
    "fastsafetensors": contestants.fastsafetensors_owned,
    "instanttensor": instanttensor,
}


def main() -> None:
    """One run: seconds, bytes, and what was proven."""
    job = json.loads(sys.argv[1])
    device = torch.device(job["device"])
    if device.type == "cuda":
        cuda.set_device(device)
    wake(device)
    call = CALLS[job["call"]](job)
    pinned = Pinned(device)
    finished(device)
    print("\nready", flush=True)
    sys.stdin.readline()
    before, modules = contestants.peak(), set(sys.modules)
    began, cpu = time.monotonic(), time.process_time()
    held = dict(call())
    finished(device)
    ended, cpu = time.monotonic(), time.process_time() - cpu
    over, most = contestants.peak() - before, pinned.most()
    imported = sorted(set(sys.modules) - modules)
    seen = proven(held, device) if held else {}
    said = {"began": began, "ended": ended, "cpu": cpu, "over": over, "pinned": most, "imported": imported}
    print(f"\n{json.dumps({**said, 'seen': seen})}", flush=True)
    os._exit(0)  # what a loader does when it is taken down is not asked for


if __name__ == "__main__":
    main()
