"""What tests of the wire have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardtool.stores.wire.http import Wire


@pytest.fixture
def wire() -> Iterator[Wire]:
    """Connections as patient as any: what is right here is right on a busy machine as well."""
    with Wire() as wire:
        yield wire
