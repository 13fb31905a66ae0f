"""Servers that speak the JSON API of Google Cloud Storage: an emulator, and a stand-in for what it lacks.

``gcp-storage-emulator`` knows neither preconditions nor pages nor accounts. ``gcs_standin.py`` has them; it was
compared with Google's own storage-testbench.
"""

from __future__ import annotations

import json
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.servers.process import free_port, running


@dataclass(frozen=True)
class GcsServer:
    """A running server and how to reach it."""

    endpoint: str
    environ: dict[str, str] = field(default_factory=dict)
    """What Google's library needs in the environment, for child processes too."""
    authority: Path | None = None
    """The certificate by which the server can be trusted, if it speaks TLS."""

    def bucket(self, patch: pytest.MonkeyPatch, kind: str = "test") -> str:
        """Make a bucket that nobody else uses, and point the environment to this server until ``patch`` ends.

        One of the kind ``private`` asks for a token (the stand-in's do).
        """
        name = f"{kind}-{uuid.uuid4().hex}"
        self.ask("POST", "/storage/v1/b", json.dumps({"name": name}).encode())
        for variable, value in self.environ.items():
            patch.setenv(variable, value)
        return name

    def put(self, bucket: str, name: str, data: bytes, **query: str) -> dict[str, Any]:
        """An object, made without shardtool."""
        text = urllib.parse.urlencode({"uploadType": "media", "name": name, **query})
        return self.ask("POST", f"/upload/storage/v1/b/{bucket}/o?{text}", data)

    def ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """A request of nobody's; the answer is JSON."""
        kind = "application/octet-stream" if path.startswith("/upload") else "application/json"
        request = urllib.request.Request(self.endpoint + path, body, {"Content-Type": kind}, method=method)
        tls = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=self.authority))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), tls)
        try:
            with opener.open(request, timeout=30) as answer:
                found: dict[str, Any] = json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            error.close()
            raise
        return found

    def control(self, **settings: object) -> dict[str, Any]:
        """Change settings of the stand-in (``gcs_standin.Settings``), and say them all."""
        return self.ask("POST", "/control", json.dumps(settings).encode())


@pytest.fixture(scope="session")
def gcs_standin() -> Iterator[GcsServer]:
    """The stand-in. It counts as a server of Google's, where ``STORAGE_EMULATOR_HOST`` would say that it is none."""
    port = free_port()
    with running([sys.executable, str(Path(__file__).with_name("gcs_standin.py")), str(port)], port):
        endpoint = f"http://127.0.0.1:{port}"
        yield GcsServer(endpoint, {"API_ENDPOINT_OVERRIDE": endpoint, "NO_GCE_CHECK": "true"})


@pytest.fixture(scope="session")
def gcs_tls_standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    """The stand-in with TLS."""
    made, known = (tmp_path_factory.mktemp("gcs") / name for name in ("tls.pem", "ca.pem"))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(known)
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(made)
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("gcs_standin.py")), str(port), str(made)]
    with running(command, port):
        endpoint = f"https://localhost:{port}"
        environ = {"API_ENDPOINT_OVERRIDE": endpoint, "NO_GCE_CHECK": "true", "SSL_CERT_FILE": str(known)}
        yield GcsServer(endpoint, environ, known)


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[GcsServer]:
    """The emulator."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "gcp_storage_emulator",
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
    ]
    with running(command, port):
        endpoint = f"http://127.0.0.1:{port}"
        yield GcsServer(endpoint, {"STORAGE_EMULATOR_HOST": endpoint, "NO_GCE_CHECK": "true"})


@pytest.fixture
def gcs_bucket(gcs_standin: GcsServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket of the stand-in; ``GcsStore(f"gs://{gcs_bucket}/folder")`` finds it."""
    return gcs_standin.bucket(monkeypatch)


@pytest.fixture(scope="session")
def gcs_key() -> str:
    """A private key, which takes a while to make."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


def account_file(path: Path, key: str, token_uri: str, who: str = "owner") -> Path:
    """The file of a service account: ``owner``, ``nobody`` (who may nothing), ``deleted`` (who gets no token)."""
    account = {
        "type": "service_account",
        "client_email": f"{who}@project.iam.gserviceaccount.com",
        "private_key_id": "1",
        "private_key": key,
        "token_uri": token_uri,
    }
    path.write_text(json.dumps(account))
    return path


@pytest.fixture
def gcs_account(gcs_standin: GcsServer, gcs_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a service account of the stand-in, which the environment names."""
    path = account_file(tmp_path / "account.json", gcs_key, f"{gcs_standin.endpoint}/token")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    return path
