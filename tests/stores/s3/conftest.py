"""What the tests of S3 share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import Proxy, S3Server


@pytest.fixture
def proxy(bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server, to which boto3's environment points."""
    with Proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy
