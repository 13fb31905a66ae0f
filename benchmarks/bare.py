"""A loop that reads a folder's files and hashes them, and does nothing else: what the machine can do at most."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import blake3
import xxhash

BLOCK = 8 << 20
PAGE = 4096


def read(folder: str, *, threads: int, direct: bool = False, hashed: bool = True) -> int:
    """Blocks of 8 MiB into one buffer for each thread, and the blake3 and the xxh3_128 of each. Returns the bytes.

    ``direct``: past the page cache.
    """
    files = {path: path.stat().st_size for path in sorted(Path(folder).glob("*.safetensors"))}
    blocks = iter([(path, start) for path, size in files.items() for start in range(0, size, BLOCK)])
    fds = {path: os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for path in files}
    done: list[int] = []

    def work() -> None:
        memory = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(memory)
        for path, start in blocks:
            n = min(BLOCK, files[path] - start)
            at = 0
            while at < n:
                got = os.preadv(fds[path], [view[at : -(-n // PAGE) * PAGE]], start + at)
                if not got:
                    raise EOFError(path)
                at += got
            if hashed:
                blake3.blake3(view[:n]).digest()
                xxhash.xxh3_128_digest(view[:n])
            done.append(n)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd in fds.values():
        os.close(fd)
    if sum(done) != sum(files.values()):
        raise EOFError(f"{folder}: {sum(done)} of {sum(files.values())} bytes were read")
    return sum(done)
