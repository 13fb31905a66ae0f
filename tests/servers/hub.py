"""A Hugging Face hub of this machine: ``hub_endpoint`` in a process of its own, and models to put there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers.process import free_port, running

PAGE = 4
"""Files of a tree that come in one answer, so that hardly any listing is a single one."""


@dataclass(frozen=True)
class Asked:
    """A request that the hub, or the host of its large files, has seen."""

    host: str
    method: str
    path: str
    range: str
    token: str
    agent: str


@dataclass(frozen=True)
class HubServer:
    """A running hub, where its large files are, and the folder that it serves."""

    endpoint: str
    cdn: str
    folder: Path

    def set(self, **settings: Any) -> None:
        """Change settings: ``page``, ``cdn``, or ``secret``, with which every signed address that was given ends."""
        path = self.folder / "settings.json"
        now = json.loads(path.read_text()) if path.exists() else {}
        _replace(path, now | settings)

    def log(self) -> list[Asked]:
        """The requests so far."""
        with suppress(FileNotFoundError):
            return [Asked(**json.loads(line)) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return []


@dataclass(frozen=True)
class Hub:
    """The models of one organisation that no other test knows."""

    server: HubServer
    org: str

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is to be."""
        return self.server.endpoint

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        branch: str = "main",
        lfs: tuple[str, ...] = (".safetensors", ".bin"),
        replace: bool = True,
    ) -> str:
        """Commit these files to a branch of a model, beside those that are there unless ``replace``; gives the commit.

        Files whose name ends with one of ``lfs`` are large files.
        """
        about = self.about(name)
        found = {} if replace else dict(about["commits"].get(about["refs"].get(branch), {}))
        for key, data in files.items():
            sha256 = hashlib.sha256(data).hexdigest() if key.endswith(lfs) else None
            oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            found[key] = {"size": len(data), "oid": oid, "lfs": sha256}
            path = self.server.folder / "blobs" / (sha256 or oid)
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
        about["commits"][commit := secrets.token_hex(20)] = found
        about["refs"][branch] = commit
        self.set(name, **about)
        return commit

    def about(self, name: str) -> dict[str, Any]:
        """What the hub knows of a model."""
        path = self._path(name)
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"refs": {}, "commits": {}}
        return found

    def set(self, name: str, **about: Any) -> None:
        """Change what the hub knows of a model: ``private``, ``gated``, ``readers`` (tokens), ``moved``."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, self.about(name) | about)

    def uri(self, name: str) -> str:
        """The address of a model."""
        return f"hf://{self.org}/{name}"

    def asked(self, host: str = "") -> list[Asked]:
        """The requests since the test began, to ``hub`` or to ``cdn`` or to both."""
        return [one for one in self.server.log() if host in ("", one.host)]

    def _path(self, name: str) -> Path:
        return self.server.folder / "repos" / self.org / name / "about.json"


def _replace(path: Path, value: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value))
    new.replace(path)


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    """A hub on two free ports of the loopback interface."""
    port, cdn_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="hub-") as folder:
        server = HubServer(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{cdn_port}", Path(folder))
        server.set(page=PAGE, secret="first", cdn=server.cdn)
        command = [sys.executable, str(Path(__file__).with_name("hub_endpoint.py")), folder, str(port), str(cdn_port)]
        with running(command, port):
            yield server


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """An organisation of its own, and huggingface_hub pointed to the hub with an empty cache, here and in children."""
    use(monkeypatch, hub_server.endpoint, tmp_path_factory.mktemp("hf-home"))
    hub_server.set(cdn=hub_server.cdn)
    (hub_server.folder / "log.jsonl").unlink(missing_ok=True)
    return Hub(hub_server, f"org-{uuid.uuid4().hex[:12]}")


def use(patch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Point huggingface_hub to an endpoint and to a cache. In this process it has read its variables already."""
    from huggingface_hub import constants

    patch.setenv("HF_ENDPOINT", endpoint)
    patch.setenv("HF_HOME", str(home))
    patch.delenv("HF_HUB_OFFLINE", raising=False)
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", os.path.join(home, "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", os.path.join(home, "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
