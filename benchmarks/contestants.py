"""How each loader brings tensors to a consumer: the child of ``load.py``, one run in a fresh process.

python benchmarks/contestants.py '{"call": "runai_owned", "files": ["a.safetensors"], "owned": true}'
python benchmarks/contestants.py --versions

It runs under the Python that has the peer, so that it imports neither shardtool nor its neighbours unless it must. A
contestant's function imports what the loader needs, and returns what opens the files and yields ``(name, tensor)``:
only that is timed. Every contestant has the same consumer, which reads each byte once.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any

import numpy  # noqa: F401 - what every contestant has before the clock starts
import xxhash

Job = dict[str, Any]
Tensors = Iterable[tuple[str, Any]]
PACKAGES = (
    "torch",
    "safetensors",
    "runai-model-streamer",
    "fastsafetensors",
    "tensorizer",
    "instanttensor",
    "numpy",
    "xxhash",
    "boto3",
    "obstore",
    "s3torchconnector",
    "runai-model-streamer-s3",
)
MOST = 1 << 64

_TOUCH = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, len(memory), 4096):
    memory[at] = 1
"""

_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.restype = ctypes.py_object
_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_READ = 0x100


def digest(name: str, data: Any) -> int:
    """A tensor's part of the sum by which contestants are compared; the sum does not depend on their order."""
    return int(xxhash.xxh3_64_intdigest(data, xxhash.xxh3_64_intdigest(name.encode())))


def consume(tensors: Tensors) -> dict[str, int]:
    """Read every byte once, where it lies, and keep no tensor: 2 us for each tensor and 0.04 s for each GiB."""
    total = nbytes = count = largest = 0
    for name, tensor in tensors:
        if not tensor.is_contiguous():
            raise SystemExit(f"{name} is not contiguous")
        size = tensor.nbytes
        total += digest(name, _view(tensor.data_ptr(), size, _READ) if size else b"")
        nbytes += size
        count += 1
        largest = max(largest, size)
        del tensor
    return {"digest": total % MOST, "bytes": nbytes, "tensors": count, "largest": largest}


# shardtool


def ours() -> Any:
    """Every module of shardtool that a load may import on its way, those of object storage aside."""
    import blake3  # noqa: F401
    import torch  # noqa: F401

    import shardtool

    for package in ("shardtool.ops", "shardtool.sinks", "shardtool.stores"):
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if not found.name.startswith("s3"):
                importlib.import_module(f"{package}.{found.name}")
    for found in pkgutil.iter_modules(shardtool.__path__):
        if found.name not in ("__main__", "cli", "display", "integrations", "settings", "testing", "tracing"):
            importlib.import_module(f"shardtool.{found.name}")
    return shardtool


def _our_options(job: Job) -> dict[str, Any]:
    given = {"rank": 0, "verify": job["verify"], "memory_limit": job["limit"], **job.get("options", {})}
    return {name: value for name, value in given.items() if value is not None}


def shardtool_load(job: Job) -> Callable[[], Tensors]:
    """``load``: a dict of tensors, each of which owns its memory."""
    package = ours()
    return lambda: package.load(job["uri"], **_our_options(job)).items()


def shardtool_stream(job: Job) -> Callable[[], Tensors]:
    """``stream``: one tensor after the other, under the memory limit."""
    package = ours()
    return lambda: package.stream(job["uri"], **_our_options(job))


# safetensors


def safetensors_mapped(job: Job) -> Callable[[], Tensors]:
    """``load_file`` as it is: tensors are the files' own pages."""
    from safetensors.torch import load_file

    return lambda: (pair for path in job["files"] for pair in load_file(path).items())


def safetensors_cloned(job: Job) -> Callable[[], Tensors]:
    """Mapped, and each tensor copied into memory of its own."""
    from safetensors.torch import load_file

    return lambda: ((name, t.clone()) for path in job["files"] for name, t in load_file(path).items())


def safetensors_read(job: Job) -> Callable[[], Tensors]:
    """``load_file`` that reads instead of mapping."""
    from safetensors.torch import load_file

    return lambda: (pair for path in job["files"] for pair in load_file(path, backend="pread").items())


def safetensors_each(job: Job) -> Callable[[], Tensors]:
    """``safe_open`` that reads instead of mapping, tensor by tensor."""
    import torch  # noqa: F401
    from safetensors import safe_open

    def run() -> Iterator[tuple[str, Any]]:
        for path in job["files"]:
            with safe_open(path, "pt", backend="pread") as file:
                for name in file.keys():  # noqa: SIM118 - it is not a dict
                    yield name, file.get_tensor(name)

    return run


# Run:ai Model Streamer. Its concurrency and memory limit come from variables, which the parent sets.


def _runai(job: Job, owned: bool) -> Callable[[], Tensors]:
    from runai_model_streamer import SafetensorsStreamer

    def run() -> Iterator[tuple[str, Any]]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(job["files"], owned=owned)
            yield from streamer.get_tensors()

    return run


def runai_owned(job: Job) -> Callable[[], Tensors]:
    """Tensors that the caller may keep."""
    return _runai(job, True)


def runai_stream(job: Job) -> Callable[[], Tensors]:
    """Tensors that last until the next one is asked for."""
    return _runai(job, False)


# fastsafetensors


def fastsafetensors_owned(job: Job) -> Callable[[], Tensors]:
    """Whole files at once; ``direct``: by GPUDirect Storage, else through its own buffers."""
    import torch  # noqa: F401
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup
    from fastsafetensors.frameworks import _torch  # noqa: F401

    device, direct = job.get("device", "cpu"), job.get("options", {}).get("direct", False)

    def run() -> Iterator[tuple[str, Any]]:
        loader = SafeTensorsFileLoader(SingleGroup(), device, nogds=not direct)
        loader.add_filenames({0: job["files"]})
        buffers = loader.copy_files_to_device()
        for name in loader.get_keys():
            yield name, buffers.get_tensor(name)
        buffers.close()
        loader.close()

    return run


def fastsafetensors_stream(job: Job) -> Callable[[], Tensors]:
    """Parts of files, two of them at a time, besides 256 MiB of buffers that it copies through."""
    import torch  # noqa: F401
    from fastsafetensors import ParallelLoader
    from fastsafetensors.frameworks import _torch  # noqa: F401

    def run() -> Iterator[tuple[str, Any]]:
        loader = ParallelLoader(
            None,
            job["files"],
            use_tqdm_on_load=False,
            device="cpu",
            nogds=True,
            all_local=True,
            max_batch_bytes=max(job["largest"], (job["limit"] - (256 << 20)) // 2),
            accumulate_resident=False,
            borrowed_tensors=True,
        )
        yield from loader.iterate_weights()
        loader.close()

    return run


# tensorizer, which reads a format of its own


def tensorizer_make(job: Job) -> Callable[[], Tensors]:
    """Write that format, from safetensors, and hand its tensors over, so that they are proven as well."""
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    def run() -> Iterator[tuple[str, Any]]:
        held = {name: tensor for path in job["files"] for name, tensor in load_file(path).items()}
        serializer = TensorSerializer(job["out"])
        serializer.write_state_dict(held)
        serializer.close()
        yield from held.items()

    return run


def tensorizer_owned(job: Job) -> Callable[[], Tensors]:
    """All tensors, by two readers."""
    import torch  # noqa: F401
    from tensorizer import TensorDeserializer

    return lambda: TensorDeserializer(job["files"][0], device="cpu", num_readers=2).items()


def versions() -> dict[str, str]:
    """The packages that this Python has."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak() -> int:
    """The most memory that this process has had resident, in bytes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def back(gib: float) -> None:
    """Touch and free memory in a child, right before the clock starts.

    A virtual machine gives free pages back to its host after two seconds, which imports may take; getting them again
    would be what is measured.
    """
    if gib:
        subprocess.run([sys.executable, "-ISc", _TOUCH, str(int(gib * (1 << 30)))], check=True)


def run(job: Job, contestant: Callable[[Job], Callable[[], Tensors]]) -> dict[str, Any]:
    """One run: seconds, bytes, and what the consumer saw."""
    call = contestant(job)
    idle = threading.Thread(target=int)  # the memory that a first thread takes
    idle.start()
    idle.join()
    digest("", b"x")
    back(job.get("back", 0))
    before, modules = peak(), set(sys.modules)
    wall, cpu = time.monotonic(), time.process_time()
    if job["owned"]:
        held = dict(call())
        seen = consume(held.items())
    else:
        seen = consume(call())
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    over = peak() - before
    return {"wall": wall, "cpu": cpu, "over": over, **seen, "imported": sorted(set(sys.modules) - modules)}


if __name__ == "__main__":
    said = versions() if sys.argv[1] == "--versions" else run(job := json.loads(sys.argv[1]), globals()[job["call"]])
    print(json.dumps(said), flush=True)
    os._exit(0)  # what a loader does when it is taken down is not asked for
