"""What the tests of stores behind a server share: something that goes wrong on the way, and a store that meets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from shardtool.stores.base import Store
from tests.servers import Proxy, Trouble

pytest.register_assert_rewrite("tests.stores.far")


@pytest.fixture
def trouble(proxy: Proxy) -> Trouble:
    """What goes wrong between ``far`` and the server."""
    return proxy.trouble


@pytest.fixture
def far(behind: Callable[..., AbstractContextManager[Store]]) -> Iterator[Store]:
    """The place of ``store`` by way of the proxy."""
    with behind() as store:
        yield store
