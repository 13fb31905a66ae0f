"""Redis servers: one open to all, one that wants a password or a user, both with a port that speaks TLS."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.servers.process import free_port, program, running

PASSWORD = "pass/word@1"
WRITER = ("writer", "their:secret")
READER = ("reader", "readers-secret")


@dataclass(frozen=True)
class RedisServer:
    """A running server and how to reach it. ``password``: of the default user, or empty."""

    port: int
    tls_port: int
    ca: Path
    password: str = field(default="", repr=False)

    def address(self, name: str, *, login: str = "", tls: bool = False) -> str:
        """The address of a name; ``login`` is the part before the host, with its @."""
        return (
            f"rediss://{login}localhost:{self.tls_port}/{name}"
            if tls
            else f"redis://{login}127.0.0.1:{self.port}/{name}"
        )

    @cached_property
    def client(self) -> Any:
        """Another client of the server, to see what lies there."""
        import redis

        return redis.Redis("127.0.0.1", self.port, password=self.password or None, protocol=2)

    def keys(self, name: str) -> list[str]:
        """All keys below a name."""
        return sorted(key.decode() for key in self.client.scan_iter(f"{name}/*", 1000))


def _server(folder: Path, password: str = "", *options: str) -> Iterator[RedisServer]:
    import trustme  # here, for an engine's Python does not have it

    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    port, tls_port = free_port(), free_port()
    command = [program("redis-server", "apt-get install redis-server"), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--tls-port", str(tls_port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(folder / "ca.pem")]
    command += ["--tls-cert-file", str(folder / "certificate.pem"), "--tls-key-file", str(folder / "key.pem")]
    command += ["--save", "", "--appendonly", "no", *options]
    with running(command, port):
        server = RedisServer(port, tls_port, folder / "ca.pem", password)
        yield server
        server.client.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that asks nobody who he is."""
    yield from _server(tmp_path_factory.mktemp("redis"))


@pytest.fixture(scope="session")
def locked_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server with a password, and two users that may write or read below ``shared/``."""
    folder = tmp_path_factory.mktemp("redis")
    users = [f"user default on >{PASSWORD} ~* &* +@all"]
    users += [f"user {WRITER[0]} on >{WRITER[1]} ~shared/* +@read +@write +eval"]
    users += [f"user {READER[0]} on >{READER[1]} ~shared/* +@read"]
    Path(folder, "users.acl").write_text("".join(f"{user}\n" for user in users))
    yield from _server(folder, PASSWORD, "--aclfile", str(folder / "users.acl"))


@pytest.fixture
def redis_name() -> str:
    """A name that nobody else uses."""
    return f"models/test-{uuid.uuid4().hex}"
