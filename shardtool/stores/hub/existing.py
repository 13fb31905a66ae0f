"""Addresses of what is there already, which may be written shorter than addresses of what is to be made.

::

    open_existing("models/llama")         a folder, if there is one
    open_existing("meta-llama/Llama-2")   otherwise a model of the hub, unless there is a folder ``meta-llama`` here
"""

from __future__ import annotations

import os
import re

from shardtool.errors import NotFound
from shardtool.stores import Address, open_store
from shardtool.stores.bandwidth import applied
from shardtool.stores.base import Store

_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_FILES = (".safetensors", ".bin")
_ID = re.compile(rf"{_WORD}/{_WORD}(@[^/@]+)?", re.ASCII)


def hub_id(uri: str | os.PathLike[str] | Store) -> str | None:
    """The address of the model that a text such as ``org/name`` or ``org/name@revision`` names, or None.

    None where it is not such a text, or a path that is there, or ends like a file of tensors. Where only its folder
    ``org`` is there, people mean a path and have mistyped it: ``NotFound``.
    """
    if not isinstance(uri, str) or not _ID.fullmatch(uri) or "--" in uri or ".." in uri:
        return None
    if uri.endswith(_FILES) or os.path.lexists(uri):
        return None
    folder = uri.partition("/")[0]
    if os.path.lexists(folder):
        raise NotFound(f"{uri} does not exist in the folder {folder}; if a model of the hub is meant, write hf://{uri}")
    return f"hf://{uri}"


def open_existing(uri: Address) -> Store:
    """``open_store`` for reading what is there: a model of the hub may be named by its id alone."""
    address = hub_id(uri)
    if address is None:
        return open_store(uri)
    from shardtool.stores.hub.store import HubStore

    return applied(HubStore(address, bare=True))
