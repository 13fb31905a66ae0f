"""Where checkpoints lie: one function that turns an address into a store.

::

    open_store("models/llama")            a folder                                  stores.local
    open_store("file:///models/llama")    the same                                  stores.local
    open_store("pvc://claim/llama")       a volume of a Kubernetes cluster          stores.pvc
    open_store("s3://bucket/llama")       objects of Amazon S3 or a server like it  stores.s3
    open_store("gs://bucket/llama")       Google Cloud Storage                      stores.gcs
    open_store("az://container/llama")    Azure Blob Storage                        stores.azure
    open_store("redis://host:port/name")  Redis                                     stores.redis
    open_store("hf://org/name@revision")  the Hugging Face hub, for reading         stores.hub
    open_store("https://host/llama")      a web server, for reading                 stores.web
    open_store("memory://name")           objects of this process                   stores.memory
    open_store("hdfs://host/llama")       what an installed package brings          stores.plugins
    open_store("sftp://host/llama")       what fsspec knows                         stores.fsspec
    open_store(my_store)                  a store is its own address

A store's module, and the library that it needs, is imported when the first address of its kind is opened.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable

from shardtool.errors import UsageError
from shardtool.stores.address import path_of, scheme_of, shown
from shardtool.stores.bandwidth import applied
from shardtool.stores.base import Object, Store, Wrapper, Writer

__all__ = ["Address", "Object", "Store", "Writer", "named", "open_store"]

Address = str | os.PathLike[str] | Store
"""Where a checkpoint lies: a path, an address, or a store of one's own."""


SCHEMES: dict[str, str | Callable[[str], Store]] = {
    "abfs": "shardtool.stores.azure.store:AzureStore",
    "abfss": "shardtool.stores.azure.store:AzureStore",
    "az": "shardtool.stores.azure.store:AzureStore",
    "file": "shardtool.stores.local.store:LocalStore",
    "gs": "shardtool.stores.gcs.store:GcsStore",
    "hf": "shardtool.stores.hub.store:HubStore",
    "http": "shardtool.stores.web.store:HttpStore",
    "https": "shardtool.stores.web.store:HttpStore",
    "memory": "shardtool.stores.memory:named",
    "pvc": "shardtool.stores.pvc:PvcStore",
    "redis": "shardtool.stores.redis.store:RedisStore",
    "rediss": "shardtool.stores.redis.store:RedisStore",
    "s3": "shardtool.stores.s3.store:S3Store",
}
"""What opens the addresses of a scheme: a callable, or ``module:callable``, which is called with the address (``file``:
with the path). A package brings its own by an entry point, see ``stores.plugins``; those here win."""


def open_store(uri: Address) -> Store:
    """The store at an address or a path.

    Nothing is looked up yet: a folder or bucket that is not there is a ``NotFound`` when it is read. An address of an
    unknown kind, or one that cannot be understood, is a ``UsageError``. The scheme may be written in capitals.

    A store that is given instead of an address stays open when what is returned is closed.
    """
    if isinstance(uri, Store):
        return applied(_Lent(uri))
    address = os.fspath(uri)
    scheme = scheme_of(address) if isinstance(uri, str) else None
    if scheme == "file":
        address = path_of(address)
    elif scheme is not None:
        address = scheme + address[len(scheme) :]
    if not address:
        raise UsageError("the address of a checkpoint is empty: give a path, or . for the current folder")
    store = _opener(scheme or "file", address)(address)
    if not isinstance(store, Store):
        raise UsageError(f"{shown(address)} is opened by what makes no stores: it made a {type(store).__name__}")
    return applied(store)


def named(uri: Address) -> str:
    """What people are told that they asked for."""
    return uri.uri if isinstance(uri, Store) else shown(os.fspath(uri))


def _opener(scheme: str, address: str) -> Callable[[str], Store]:
    """What opens the addresses of a scheme: shardtool's own, an installed package's, or fsspec's."""
    opens = SCHEMES.get(scheme)
    if isinstance(opens, str):
        module, _, name = opens.partition(":")
        found: Callable[[str], Store] = getattr(importlib.import_module(module), name)
        return found
    if opens is not None:
        return opens
    from shardtool.stores import plugins
    from shardtool.stores.fsspec import store as remote_fs

    if brought := plugins.opener(scheme):
        return brought
    if remote_fs.knows(scheme):
        return remote_fs.RemoteStore
    known = sorted({*SCHEMES, *plugins.schemes()} - {"memory"})  # keeps nothing for another run
    raise UsageError(
        f"no store knows addresses like {shown(address)!r}: use a path or one of "
        + ", ".join(f"{name}://" for name in known)
        + ("" if remote_fs.installed() else ", or one that fsspec knows: pip install 'shardtool[fsspec]'")
    )


class _Lent(Wrapper):
    """A store of the caller's, who closes it."""

    def close(self) -> None:
        """Leave it open."""
