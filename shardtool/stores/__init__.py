"""Where checkpoints lie: one function that turns an address into a store.

::

    open_store("models/llama")            a folder                                  stores.local
    open_store("file:///models/llama")    the same                                  stores.local
    open_store("s3://bucket/llama")       objects of Amazon S3 or a server like it  stores.s3
    open_store("memory://name")           objects of this process                   stores.memory

A store's module, and the library that it needs, is imported when the first address of its kind is opened.
"""

from __future__ import annotations

import importlib
import os
import re
from urllib.parse import unquote, urlsplit

from shardtool.errors import UsageError
from shardtool.stores.base import Object, Store, Writer

__all__ = ["Object", "Store", "Writer", "open_store"]

SCHEMES: dict[str, str] = {
    "file": "shardtool.stores.local:LocalStore",
    "memory": "shardtool.stores.memory:named",
    "s3": "shardtool.stores.s3:S3Store",
}
"""What opens the addresses of a scheme: ``module:callable``, called with the address (``file``: with the path)."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def open_store(uri: str | os.PathLike[str]) -> Store:
    """The store at an address or a path.

    Nothing is looked up yet: a folder or bucket that is not there is a ``NotFound`` when it is read. An address of an
    unknown kind, or one that cannot be understood, is a ``UsageError``. The scheme may be written in capitals.
    """
    address = os.fspath(uri)
    found = _ADDRESS.match(address) if isinstance(uri, str) else None
    scheme = found[1].lower() if found else "file"
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in sorted(SCHEMES.keys() - {"memory"}))  # keeps nothing for another run
        raise UsageError(f"no store knows addresses like {address!r}: use a path or one of {known}")
    if found:
        address = _path_of(address) if scheme == "file" else scheme + address[len(scheme) :]
    if not address:
        raise UsageError("the address of a checkpoint is empty: give a path, or . for the current folder")
    module, _, name = SCHEMES[scheme].partition(":")
    store = getattr(importlib.import_module(module), name)(address)
    assert isinstance(store, Store), f"{SCHEMES[scheme]} does not make stores"
    return store


def _path_of(address: str) -> str:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
        raise UsageError(f"{address!r} names no file of this machine: write file:///absolute/path")
    return unquote(parts.path)
