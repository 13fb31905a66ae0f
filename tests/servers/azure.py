"""Azure's blob service, as azurite plays it: over HTTP with an account key, and over TLS with tokens."""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trustme

from shardtool.stores.accounts import AzureAccount
from shardtool.stores.azure.store import AzureStore
from shardtool.stores.wire.retry import Again
from tests.servers.process import free_port, program, running
from tests.servers.proxy import Proxy

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key of that account, which azurite's documentation makes public."""

_AZURITE = Path(__file__).parent / "node_modules/azurite/dist/src/blob/main.js"


@dataclass(frozen=True)
class AzureServer:
    """A running server and how to reach it."""

    endpoint: str
    ca: str = ""
    """The file of the authority to trust, where it speaks TLS."""

    @property
    def connection_string(self) -> str:
        """What has all of it."""
        scheme = self.endpoint.partition(":")[0]
        return f"DefaultEndpointsProtocol={scheme};AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint}"

    @property
    def environ(self) -> dict[str, str]:
        """What shardtool needs in the environment, for child processes too."""
        trusted = {"SSL_CERT_FILE": self.ca} if self.ca else {}
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string, **trusted}

    @cached_property
    def client(self) -> Any:
        """A client of Azure's library, whatever the environment says."""
        from azure.storage.blob import BlobServiceClient

        return BlobServiceClient.from_connection_string(self.connection_string, connection_verify=self.ca or True)

    def container(self, patch: pytest.MonkeyPatch, *, public: bool = False) -> str:
        """Make a container that nobody else uses, and point the environment to this server until ``patch`` ends."""
        name = f"test-{uuid.uuid4().hex}"
        self.client.create_container(name, public_access="blob" if public else None)
        for variable, value in self.environ.items():
            patch.setenv(variable, value)
        return name

    def behind(self, proxy: Proxy, container: str, *, attempts: int = 5) -> AzureStore:
        """A container behind a proxy, with next to no waiting between tries."""
        access = AzureAccount(name=ACCOUNT, key=KEY, endpoint=f"{proxy.endpoint}/{ACCOUNT}")
        return AzureStore(f"az://{container}", access=access, again=Again(attempts=attempts, backoff=0.001))

    def left(self, container: str) -> list[str]:
        """The blobs, and the names below which there are only blocks, as Azure's own library finds them."""
        found = self.client.get_container_client(container).list_blobs(include=["uncommittedblobs"])
        return [blob.name for blob in found]

    def sas(self, container: str, permission: str = "racwdl", *, hours: float = 1) -> str:
        """A shared access signature; with negative hours, one that has expired."""
        from azure.storage.blob import generate_container_sas

        expiry = datetime.now(UTC) + timedelta(hours=hours)
        start = expiry - timedelta(hours=abs(hours) + 1)
        return str(generate_container_sas(ACCOUNT, container, KEY, permission=permission, expiry=expiry, start=start))


@dataclass
class Identity:
    """A token service of the kind that managed identities ask: its tokens are good for azurite.

    ``lasting``: seconds that the next tokens last. ``given``: how many were given. ``refused``: none are given.
    """

    endpoint: str = ""
    lasting: float = 3600
    given: int = 0
    refused: bool = False
    asked: list[str] = field(default_factory=list)

    def token(self) -> tuple[str, int]:
        """A token as azurite wants it, and when it ends; nobody checks its signature."""
        now = int(time.time())
        end = now + int(self.lasting)
        self.given += 1
        claims = {
            "aud": "https://storage.azure.com",
            "iss": "https://sts.windows.net/ab1f708d-50f6-404c-a006-d71b2ac7a606/",
            "nbf": now - 600,
            "iat": now - 600,
            "exp": end,
            "number": self.given,
        }
        parts = ({"typ": "JWT", "alg": "RS256", "kid": "none"}, claims, "signature")
        return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts), end


@contextmanager
def _azurite(*options: str) -> Iterator[int]:
    if not _AZURITE.exists():
        pytest.skip("azurite is not installed: npm ci --ignore-scripts --prefix tests/servers")
    port = free_port()
    command = [
        *(program("node", "see https://nodejs.org"), str(_AZURITE), "--blobHost", "127.0.0.1", "--blobPort", str(port)),
        *("--inMemoryPersistence", "--silent", "--disableTelemetry", "--skipApiVersionCheck", *options),
    ]
    with running(command, port):
        yield port


@pytest.fixture(scope="session")
def azure_server() -> Iterator[AzureServer]:
    """Azurite over HTTP."""
    with _azurite() as port:
        server = AzureServer(f"http://127.0.0.1:{port}/{ACCOUNT}")
        yield server
        server.client.close()


@pytest.fixture(scope="session")
def azure_tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    """Azurite over TLS, which takes tokens too."""
    folder = tmp_path_factory.mktemp("azure-tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(folder / "cert.pem", append=True)
    tls = ("--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem"), "--oauth", "basic")
    with _azurite(*tls) as port:
        server = AzureServer(f"https://127.0.0.1:{port}/{ACCOUNT}", str(folder / "ca.pem"))
        yield server
        server.client.close()


@pytest.fixture
def container(azure_server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new container; ``AzureStore(f"az://{container}/folder")`` finds it."""
    return azure_server.container(monkeypatch)


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> Iterator[Identity]:
    """A token service, to which the environment points ``DefaultAzureCredential``."""
    made = Identity()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Tests look at ``Identity`` instead."""

        def do_GET(self) -> None:
            made.asked += parse_qs(urlsplit(self.path).query).get("resource", [])
            token, end = ("", 0) if made.refused else made.token()
            answer = {"error": "no identity"} if made.refused else {"access_token": token, "expires_on": str(end)}
            body = json.dumps({**answer, "resource": "https://storage.azure.com", "token_type": "Bearer"}).encode()
            self.send_response(400 if made.refused else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    made.endpoint = f"http://127.0.0.1:{server.server_address[1]}/token"
    monkeypatch.setenv("IDENTITY_ENDPOINT", made.endpoint)
    monkeypatch.setenv("IDENTITY_HEADER", "header")
    yield made
    server.shutdown()
    thread.join()
    server.server_close()
