"""A resumable upload believes a server only what can be."""

from __future__ import annotations

import pytest

from shardtool.errors import StoreError
from shardtool.stores.gcs.upload import QUARTER, Session
from shardtool.stores.wire.http import Wire
from shardtool.stores.wire.retry import Again
from tests.servers.web import Scripted, reply

SOON = Again(attempts=3, backoff=0.001)


@pytest.mark.parametrize(
    ("kept", "good"),
    [(2 * QUARTER - 1, True), (3 * QUARTER - 1, False), (8 * QUARTER - 1, False)],
    ids=["what was sent", "more than that", "the whole object"],
)
def test_a_server_has_what_it_was_sent(kept: int, good: bool) -> None:
    """Bytes that it says to have without having got them would be left out of the object."""
    with Wire() as wire, Scripted(reply(308, Range=f"bytes=0-{kept}", Content_Length=0)) as server:
        session = Session(wire, server.url, 8 * QUARTER, "gs://bucket/a", SOON)
        if good:
            session.send(memoryview(bytes(2 * QUARTER)))
            assert session.kept == 2 * QUARTER
        else:
            with pytest.raises(StoreError, match=r"gs://bucket/a .* never sent"):
                session.send(memoryview(bytes(2 * QUARTER)))
