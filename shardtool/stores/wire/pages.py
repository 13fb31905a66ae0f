"""An end to listings whose pages have none."""

from __future__ import annotations

from shardtool.errors import StoreError

_MOST_EMPTY = 10_000  # some servers send a few where much was removed


class Pages:
    """The pages of one listing. ``where``: what is listed, for messages."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._empty = 0

    def took(self, count: int) -> None:
        """A page had so many entries. Raises ``StoreError`` where nothing but empty pages come."""
        self._empty = 0 if count else self._empty + 1
        if self._empty > _MOST_EMPTY:
            raise StoreError(
                f"the server of {self._where} lists pages without end and nothing is on them: check the address"
            )
