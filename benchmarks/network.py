"""How fast do bytes come from S3 and go there, beside every peer, and what does it cost the client?

python benchmarks/network.py [read read-tls write write-tls] [--size 512MiB] [--runs 3] [--back 0]
                             [--peers-python PATH] [--json FILE]

read    nginx (one worker, sendfile) serves a checkpoint on this machine; tensors go to the consumer of contestants.py
write   memory is uploaded to a server that takes everything and keeps nothing (sink.py), in parts of 8 MiB
-tls    the same by way of TLS, with a certificate of an authority of its own

Every run is a process of its own, whose processor time is the client's alone; the clock starts when everything is
imported and the client is made. Tensors must be those of an independent reader; of uploads one more run of each proves
that the sink got the right bytes. The server shares the machine, so rates say less than processor seconds for each GiB.
Needs nginx and ``pip install trustme``; peers live in a Python of their own::

    python -m venv peers && peers/bin/pip install torch numpy xxhash runai-model-streamer[s3] boto3 obstore \\
        s3torchconnector
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, Popen, run
from urllib.request import urlopen
from xml.sax.saxutils import escape

import contest
import flags
import load
import measure
import models
import trustme
from contest import Contest, Contestant, Row, Sample

from shardtool.units import parse_size

READ, READ_TLS, WRITE, WRITE_TLS = QUESTIONS = ("read", "read-tls", "write", "write-tls")
STREAM, FILES, UPLOAD = "stream", "files", "upload"
_PORT, _SECURE, _SINK, _SECURE_SINK = 9310, 9311, 9312, 9313


@dataclass(frozen=True)
class Client:
    """A way to read or write. ``needs``: a package of the peers' Python; without one this Python runs it."""

    name: str
    call: str
    kind: str
    needs: str = ""
    verify: bool = False


CLIENTS = (
    Client("shardtool stream, unchecked", "shardtool_stream", STREAM),
    Client("shardtool stream, digests checked", "shardtool_stream", STREAM, verify=True),
    Client("Run:ai, not owned", "runai_stream", STREAM, "runai_model_streamer_s3"),
    Client("boto3 get_object, 8 threads", "boto3_ranges", FILES, "boto3"),
    Client("boto3 download_fileobj", "boto3_fileobj", FILES, "boto3"),
    Client("obstore get_range, 8 threads", "obstore_ranges", FILES, "obstore"),
    Client("s3torchconnector", "s3torchconnector_sequential", FILES, "s3torchconnector"),
    Client("shardtool create", "shardtool_create", UPLOAD),
    Client("boto3 upload_fileobj", "boto3_upload", UPLOAD, "boto3"),
    Client("boto3 upload_fileobj, no checksums", "boto3_upload_plain", UPLOAD, "boto3"),
    Client("obstore put", "obstore_put", UPLOAD, "obstore"),
)

_NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000; default_type application/octet-stream;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    listen 127.0.0.1:{port}; listen 127.0.0.1:{secure} ssl;
    ssl_certificate {folder}/chain.pem; ssl_certificate_key {folder}/key.pem; root {folder}/served;
    location ~ ^/bucket/?$ {{ default_type application/xml; try_files /list.xml =404; }}
  }}
}}
"""


def main() -> None:
    """The command line."""
    parser = flags.parser(
        __doc__, limit="512MiB", limited="of memory, for what streams", size="of the checkpoint, and of an upload"
    )
    flags.asking(parser, QUESTIONS)
    flags.choosing(parser)
    args = parser.parse_args()
    asked = flags.asked(args, QUESTIONS)
    found = []
    with measure.place(args.dir) as folder:
        certify(folder)
        if READ in asked or READ_TLS in asked:
            data = load.prepare(folder / "llama", models.of_size(parse_size(args.size, "--size")), args, parts=2)
            with nginx(folder, data.folder):
                found += [compare(question, data, args, folder) for question in asked if question in (READ, READ_TLS)]
        for question, port, secure in ((WRITE, _SINK, False), (WRITE_TLS, _SECURE_SINK, True)):
            if question in asked:
                with sink(folder, port, secure):
                    found.append(compare(question, None, args, folder))
    if args.json:
        args.json.write_text(json.dumps({"contests": [one.to_json() for one in found]}))


def certify(folder: Path) -> None:
    """A certificate for this machine."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    for part in issued.cert_chain_pems:
        part.write_to_path(str(folder / "chain.pem"), append=True)


@contextmanager
def nginx(folder: Path, checkpoint: Path) -> Iterator[None]:
    """The checkpoint as ``s3://bucket/tp1``, with a listing."""
    served = folder / "served"
    (served / "bucket").mkdir(parents=True)
    (served / "bucket" / "tp1").symlink_to(checkpoint)
    items = []
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        key, about = escape(f"tp1/{path.relative_to(checkpoint)}"), path.stat()
        tag = f"&quot;{int(about.st_mtime):x}-{about.st_size:x}&quot;"  # as nginx makes it
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(about.st_mtime))
        items.append(
            f"<Contents><Key>{key}</Key><LastModified>{when}</LastModified><ETag>{tag}</ETag>"
            f"<Size>{about.st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        )
    (served / "list.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name><Prefix></Prefix>'
        f"<KeyCount>{len(items)}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
        f"{''.join(items)}</ListBucketResult>"
    )
    settings = folder / "nginx.conf"
    settings.write_text(_NGINX.format(folder=folder, port=_PORT, secure=_SECURE))
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if program is None:
        raise SystemExit("nginx is not installed")
    folder.chmod(0o755)  # its worker is another user
    with serving([program, "-c", str(settings)], folder, f"http://127.0.0.1:{_PORT}/bucket"):
        yield


@contextmanager
def sink(folder: Path, port: int, secure: bool) -> Iterator[None]:
    """The server that takes everything."""
    words = [str(folder / "chain.pem"), str(folder / "key.pem")] if secure else []
    command = [sys.executable, str(measure.HERE / "sink.py"), str(port), *words]
    with serving(command, folder, f"http{'s' * secure}://127.0.0.1:{port}/?nothing"):
        yield


@contextmanager
def serving(command: list[str], folder: Path, address: str) -> Iterator[None]:
    """A server until the block ends, ready when it answers."""
    server = Popen(command, stdout=DEVNULL, stderr=DEVNULL)
    try:
        for _ in range(100):
            try:
                ask(address, folder)
            except OSError:
                time.sleep(0.1)
                continue
            time.sleep(0.1)  # one that could not have its port has ended by now, and it was another that answered
            if server.poll() is None:
                break
        else:
            raise SystemExit(f"{command[0]} does not start; is something else on the port of {address}?")
        yield
    finally:
        server.terminate()
        server.wait()


def ask(address: str, folder: Path) -> bytes:
    """An answer of a server of ours."""
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    with urlopen(address, context=context) as answer:
        return bytes(answer.read())


def compare(question: str, data: load.Data | None, args: argparse.Namespace, folder: Path) -> Contest:
    """Run everyone in turns and print the table."""
    limit, size = parse_size(args.limit, "--limit"), parse_size(args.size, "--size")
    taking: list[Contestant] = []
    for client in CLIENTS:
        if (client.kind == UPLOAD) is (data is None) and (not args.only or args.only in client.name):
            held = data.seen["largest"] if data else 0
            row = Row(client.name, client.kind, held if client.kind == STREAM else 0)
            taking.append((row, partial(once, question, client, data, args, folder)))

    def before(row: Row) -> None:
        if data:
            measure.warm(data.folder)

    if data is None:
        for row, _ in taking:
            client = next(client for client in CLIENTS if client.name == row.name)
            try:
                once(question, client, data, args, folder, prove=True)
            except measure.Failed as failed:
                if row.ours:
                    raise
                row.failed = f"failed: {contest.reason(failed)}"
    rows = contest.take_turns(taking, args.runs, before)
    gib = (data.seen["bytes"] if data else size) / measure.GIB
    found = Contest(question, gib, args.runs, args.back, limit if data else 0, rows)
    print(f"{question}: {found.said()}\n\n{found.table()}\n", flush=True)
    print("".join(f"{line}\n" for line in found.verdicts()), flush=True)
    return found


def once(
    question: str,
    client: Client,
    data: load.Data | None,
    args: argparse.Namespace,
    folder: Path,
    prove: bool = False,
) -> Sample:
    """One run in a process of its own."""
    ports = {READ: _PORT, READ_TLS: _SECURE, WRITE: _SINK, WRITE_TLS: _SECURE_SINK}
    secure = question in (READ_TLS, WRITE_TLS)
    endpoint = f"http{'s' * secure}://127.0.0.1:{ports[question]}"
    limit = parse_size(args.limit, "--limit")
    job = {
        "call": client.call,
        "writes": data is None,
        "owned": False,
        "uri": "s3://bucket/tp1",
        "files": [f"s3://bucket/tp1/{path.name}" for path in data.files] if data else ["s3://bucket/upload"],
        "size": parse_size(args.size, "--size"),
        "verify": client.verify,
        "limit": limit,
        "back": args.back,
        "prove": prove,
    }
    if prove:
        ask(f"{endpoint}/?prove", folder)
    variables = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": hashlib.sha256(b"secret").hexdigest(),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RUNAI_STREAMER_S3_ENDPOINT": endpoint,
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "RUNAI_STREAMER_CONCURRENCY": "8",
        "RUNAI_STREAMER_MEMORY_LIMIT": str(limit),
    } | ({"AWS_CA_BUNDLE": str(folder / "ca.pem"), "SSL_CERT_FILE": str(folder / "ca.pem")} if secure else {})
    python = args.peers_python if client.needs else sys.executable
    environ = measure.environ(**variables)
    paths = [measure.HERE] if client.needs else [measure.HERE, measure.HERE.parent]
    environ["PYTHONPATH"] = ":".join(map(str, paths))
    words = [python, str(measure.HERE / "networkers.py"), json.dumps(job)]
    child = run(words, env=environ, capture_output=True, text=True, check=False)
    if child.returncode:
        raise measure.Failed(child.stderr or f"networkers.py ended with {child.returncode}")
    said = json.loads(child.stdout.splitlines()[-1])
    if data:
        load.check(client.name, said, data)
        if said["imported"]:
            print(f"{client.name} imported on the clock: {', '.join(said['imported'][:8])}", file=sys.stderr)
    return Sample(said["wall"], said["cpu"], said["over"])


if __name__ == "__main__":
    main()
