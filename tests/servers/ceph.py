"""A Ceph cluster of this machine: a monitor, an OSD that keeps everything in memory, the gateway that speaks S3."""

from __future__ import annotations

import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.servers.process import free_port, program, running

KEY, SECRET = "ceph-key", "ceph-secret"  # those of the only user
_TIMES = 3  # a cluster that does not come up is given up, and another one made
_WITHIN = 75.0  # seconds for the commands that make one, of which a busy machine needs twenty
_PACKAGES = "apt-get install radosgw ceph-mon ceph-osd"
_SETTINGS = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon}
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 8
osd pool default pg autoscale mode = off
mon max pg per osd = 2000
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/log/$name.log
pid file = {folder}/run/$name.pid
osd objectstore = memstore
osd class update on start = false
osd crush update on start = false
memstore device bytes = 4294967296
osd data = {folder}/osd
mon data = {folder}/mon
mon data avail warn = 1
mon data avail crit = 1
ms bind ipv6 = false
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw dns name = localhost
rgw thread pool size = 32
rgw multipart min part size = 5242880
"""


@contextmanager
def gateway() -> Iterator[int]:
    """A cluster until the block ends; gives the port of its gateway. Ready after a quarter of a minute."""
    tools = ("monmaptool", "ceph-mon", "ceph", "ceph-osd", "radosgw-admin", "radosgw")
    at = {name: program(name, _PACKAGES) for name in tools}
    with ExitStack() as cluster:
        for left in range(_TIMES - 1, -1, -1):
            try:
                port = cluster.enter_context(_started(at))
                break
            except pytest.fail.Exception:
                if not left:
                    raise
        yield port


@contextmanager
def _started(at: Mapping[str, str]) -> Iterator[int]:
    """One cluster, in a folder and on ports of its own."""
    with tempfile.TemporaryDirectory(prefix="ceph-") as folder, ExitStack() as processes:
        end = time.monotonic() + _WITHIN
        for name in ("mon", "osd", "run", "log"):
            Path(folder, name).mkdir()
        cluster, port, mon = str(uuid.uuid4()), free_port(), free_port()
        settings = Path(folder, "ceph.conf")
        settings.write_text(_SETTINGS.format(fsid=cluster, mon=mon, port=port, folder=folder))
        with_settings = ("-c", str(settings))

        def run(tool: str, *words: str, tries: int = 1) -> None:
            said = ""
            for left in range(tries - 1, -1, -1):
                command, within = [at[tool], *words], max(5.0, end - time.monotonic())
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=within, check=False)
                except subprocess.TimeoutExpired:
                    said = f"no answer within {within:.0f} seconds"
                else:
                    if not done.returncode:
                        return
                    said = done.stderr[-3000:]
                if time.monotonic() > end:
                    break
                time.sleep(1 if left else 0)
            logs = [f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in Path(folder, "log").iterdir()]
            pytest.fail("\n".join([f"{tool} {' '.join(words)} failed:", said, *logs]))

        def start(tool: str, listens: int, *words: str) -> None:
            processes.enter_context(running([at[tool], *with_settings, "-f", *words], listens))

        members = f"{folder}/monmap"
        run("monmaptool", "--create", "--fsid", cluster, "--addv", "a", f"[v1:127.0.0.1:{mon}]", members)
        run("ceph-mon", *with_settings, "-i", "a", "--mkfs", "--monmap", members)
        start("ceph-mon", mon, "-i", "a")
        disk = str(uuid.uuid4())
        run("ceph", *with_settings, "osd", "new", disk, tries=30)  # listening is not yet a quorum
        run("ceph-osd", *with_settings, "-i", "0", "--mkfs", "--osd-uuid", disk)
        start("ceph-osd", mon, "-i", "0")  # whose own port nobody needs to know
        # What an OSD says of itself at its start may come before it knows the cluster, which ends it: so we say it.
        run("ceph", *with_settings, "osd", "crush", "add", "0", "1.0", "root=default", "host=localhost", tries=30)
        user = ("--uid=test", "--display-name=test", f"--access-key={KEY}", f"--secret-key={SECRET}")
        run("radosgw-admin", *with_settings, "user", "create", *user, tries=10)
        start("radosgw", port, "-n", "client.rgw.a")
        yield port
