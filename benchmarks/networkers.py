"""How each client reads from S3 and writes to it: the child of ``network.py``, one run in a fresh process.

python benchmarks/networkers.py '{"call": "boto3_fileobj", "files": ["s3://bucket/a.safetensors"], ...}'

Readers hand tensors to the consumer of ``contestants.py``, which reads each byte once; those that know no tensors fetch
a file at a time and are cut into tensors. Writers send memory that is there before the clock starts.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - imported by the first connection of whoever uses Python's sockets
import io
import json
import mmap
import os
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import urlopen

import contestants
import xxhash
from contestants import Job, Tensors

RANGE = 8 << 20
THREADS = 8
SLICE = 64 << 20


def _bucket(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _tensors(file: memoryview) -> Tensors:
    """The tensors of a file in memory."""
    import torch

    (length,) = struct.unpack("<Q", file[:8])
    head = json.loads(bytes(file[8 : 8 + length]))
    head.pop("__metadata__", None)
    for name, entry in head.items():
        begin, end = entry["data_offsets"]
        yield name, torch.frombuffer(file, dtype=torch.uint8, count=end - begin, offset=8 + length + begin)


def _client(checksums: str = "when_required") -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        config=Config(
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
            max_pool_connections=64,
            s3={"addressing_style": "path"},
        ),
    )


def _room(size: int) -> memoryview:
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]


# Readers


def shardtool_stream(job: Job) -> Callable[[], Tensors]:
    """``stream``, with everything imported that a load from S3 needs."""
    import boto3  # noqa: F401
    import botocore.auth
    import botocore.awsrequest  # noqa: F401

    import shardtool.stores.s3.store  # noqa: F401

    _client().close()  # what botocore imports for a client, as everybody's is there before the clock starts
    return contestants.shardtool_stream(job)


def runai_stream(job: Job) -> Callable[[], Tensors]:
    """Tensors that last until the next one is asked for."""
    import boto3  # noqa: F401

    return contestants.runai_stream(job)


def boto3_ranges(job: Job) -> Callable[[], Tensors]:
    """``get_object`` of 8 MiB at a time by 8 threads, each read whole and copied to its place."""
    import torch  # noqa: F401

    client = _client()

    def run() -> Iterator[tuple[str, Any]]:
        with ThreadPoolExecutor(THREADS) as pool:
            for uri in job["files"]:
                bucket, key = _bucket(uri)
                room = _room(client.head_object(Bucket=bucket, Key=key)["ContentLength"])

                def get(at: int, room: memoryview = room, bucket: str = bucket, key: str = key) -> None:
                    end = min(at + RANGE, len(room))
                    answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={at}-{end - 1}")
                    room[at:end] = answer["Body"].read()

                list(pool.map(get, range(0, len(room), RANGE)))
                yield from _tensors(room)

    return run


def boto3_fileobj(job: Job) -> Callable[[], Tensors]:
    """``download_fileobj``, which is what boto3 recommends."""
    import torch  # noqa: F401
    from boto3.s3.transfer import TransferConfig

    client = _client()
    config = TransferConfig(multipart_chunksize=RANGE, max_concurrency=THREADS)

    def run() -> Iterator[tuple[str, Any]]:
        for uri in job["files"]:
            bucket, key = _bucket(uri)
            file = io.BytesIO()
            client.download_fileobj(bucket, key, file, Config=config)
            yield from _tensors(file.getbuffer())

    return run


def obstore_ranges(job: Job) -> Callable[[], Tensors]:
    """``get_range`` of 8 MiB at a time by 8 threads."""
    import obstore
    import torch  # noqa: F401

    bucket, _ = _bucket(job["files"][0])
    store = _obstore(bucket)

    def run() -> Iterator[tuple[str, Any]]:
        with ThreadPoolExecutor(THREADS) as pool:
            for uri in job["files"]:
                _, key = _bucket(uri)
                room = _room(obstore.head(store, key)["size"])

                def get(at: int, room: memoryview = room, key: str = key) -> None:
                    end = min(at + RANGE, len(room))
                    room[at:end] = memoryview(obstore.get_range(store, key, start=at, end=end))

                list(pool.map(get, range(0, len(room), RANGE)))
                yield from _tensors(room)

    return run


def s3torchconnector_sequential(job: Job) -> Callable[[], Tensors]:
    """Its reader for whole objects."""
    import torch  # noqa: F401
    from s3torchconnector._s3client import S3Client, S3ClientConfig

    settings = S3ClientConfig(force_path_style=True)
    client = S3Client(os.environ["AWS_REGION"], endpoint=os.environ["AWS_ENDPOINT_URL"], s3client_config=settings)

    def run() -> Iterator[tuple[str, Any]]:
        for uri in job["files"]:
            reader = client.get_object(*_bucket(uri))
            yield from _tensors(memoryview(bytearray(reader.read())))

    return run


def _obstore(bucket: str) -> Any:
    from obstore.store import S3Store

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    options: Any = {"allow_http": True}
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        with open(bundle, "rb") as file:
            options["root_certificate"] = file.read()
    return S3Store(
        bucket, endpoint=endpoint, region="us-east-1", virtual_hosted_style_request=False, client_options=options
    )


# Writers: each gets memory and where it goes to


def shardtool_create(job: Job, data: memoryview) -> Callable[[], None]:
    """``Store.create``: slices of 64 MiB, of which several parts are under way at a time."""
    import botocore.auth  # noqa: F401

    from shardtool.stores.s3.store import S3Store

    uri, _, key = job["files"][0].rpartition("/")
    store = S3Store(uri)
    store._client.request("GetObject", key)  # botocore imports more for its first request

    def run() -> None:
        writer = store.create(key, len(data))
        for at in range(0, len(data), SLICE):
            writer.write(at, data[at : at + SLICE])
        writer.commit()

    return run


class _Memory(io.RawIOBase):
    """Memory as a file; ``io.BytesIO`` would copy it before it is sent."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, len(self._data))[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, room: Any) -> int:
        piece = self._data[self._at : self._at + len(room)]
        room[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _fileobj(job: Job, data: memoryview, checksums: str) -> Callable[[], None]:
    from boto3.s3.transfer import TransferConfig

    client = _client(checksums)
    config = TransferConfig(multipart_chunksize=RANGE, max_concurrency=THREADS)
    return lambda: client.upload_fileobj(_Memory(data), *_bucket(job["files"][0]), Config=config)


def boto3_upload(job: Job, data: memoryview) -> Callable[[], None]:
    """``upload_fileobj`` as it is."""
    return _fileobj(job, data, "when_supported")


def boto3_upload_plain(job: Job, data: memoryview) -> Callable[[], None]:
    """``upload_fileobj`` without checksums."""
    return _fileobj(job, data, "when_required")


def obstore_put(job: Job, data: memoryview) -> Callable[[], None]:
    """Its multipart upload."""
    import obstore

    bucket, key = _bucket(job["files"][0])
    store = _obstore(bucket)
    return lambda: (obstore.put(store, key, _Memory(data), chunk_size=RANGE, max_concurrency=THREADS), None)[1]


def write(job: Job) -> dict[str, Any]:
    """One upload. ``prove``: compare the digests of what the sink got with those of what was sent."""
    data = _room(job["size"])
    seed = os.urandom(SLICE)
    for at in range(0, len(data), SLICE):
        data[at : at + SLICE] = seed[: len(data) - at]
        data[at : at + 8] = at.to_bytes(8, "little")  # no two alike
    call = globals()[job["call"]](job, data)
    contestants.back(job["back"])
    before, wall, cpu = contestants.peak(), time.monotonic(), time.process_time()
    call()
    said = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu, "over": contestants.peak() - before}
    if job["prove"]:
        at = 0
        for size, digest in _proof():
            if xxhash.xxh3_128_hexdigest(data[at : at + size]) != digest:
                raise SystemExit(f"the sink got other bytes from {at} on")
            at += size
        if at != len(data):
            raise SystemExit(f"the sink got {at} bytes")
    return said


def _proof() -> list[tuple[int, str]]:
    context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
    with urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/?proof", context=context) as answer:
        found: list[tuple[int, str]] = json.loads(answer.read())
        return found


def main() -> None:
    """One run."""
    job = json.loads(sys.argv[1])
    if job["writes"]:
        idle = threading.Thread(target=int)  # the memory that a first thread takes
        idle.start()
        idle.join()
        said = write(job)
    else:
        said = contestants.run(job, globals()[job["call"]])
    print(json.dumps(said), flush=True)
    os._exit(0)  # what a client does when it is taken down is not asked for


if __name__ == "__main__":
    main()
