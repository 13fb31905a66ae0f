"""S3 servers."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest

from tests.servers.process import free_port, running


@dataclass(frozen=True)
class S3Server:
    """A running server and how to reach it."""

    endpoint: str
    environ: dict[str, str]
    """What boto3 needs in the environment, for child processes too."""

    @cached_property
    def client(self) -> Any:
        """A boto3 client of this server, whatever the environment says."""
        import boto3.session
        from botocore.config import Config

        session = boto3.session.Session(self.environ["AWS_ACCESS_KEY_ID"], self.environ["AWS_SECRET_ACCESS_KEY"])
        config = Config(s3={"addressing_style": "path"})
        return session.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", config=config)

    def bucket(self, patch: pytest.MonkeyPatch) -> str:
        """Make a bucket that nobody else uses, and point boto3's environment to this server until ``patch`` ends."""
        name = f"test-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        for variable, value in self.environ.items():
            patch.setenv(variable, value)
        return name


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A moto server on a free port of the loopback interface."""
    port = free_port()
    environ = {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, port, environ):
        server = S3Server(environ["AWS_ENDPOINT_URL"], environ)
        yield server
        server.client.close()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket; ``S3Store(f"s3://{bucket}/folder")`` finds it."""
    return s3_server.bucket(monkeypatch)
