"""A listing that never ends is given up."""

from __future__ import annotations

import pytest

from shardtool.errors import StoreError
from shardtool.stores.wire import pages
from shardtool.stores.wire.pages import Pages


def test_pages_without_entries_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few in a row are no reason to give up, nor are many pages that have something."""
    monkeypatch.setattr(pages, "_MOST_EMPTY", 3)
    taken = Pages("s3://bucket/x")
    for count in (0, 0, 0, 1) * 5:
        taken.took(count)
    for _ in range(3):
        taken.took(0)
    with pytest.raises(StoreError, match="s3://bucket/x lists pages without end"):
        taken.took(0)
