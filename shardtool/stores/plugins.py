"""Stores that other packages bring: entry points of the group ``shardtool.stores``, one for each scheme.

::

    [project.entry-points."shardtool.stores"]
    hdfs = "my_package.store:HdfsStore"        called with the address, gives a shardtool.stores.Store

Nothing is looked for before an address comes that shardtool does not know itself.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from shardtool.errors import UsageError
from shardtool.stores.base import Store

GROUP = "shardtool.stores"


def schemes() -> set[str]:
    """The schemes that installed packages bring."""
    return {point.name.lower() for point in entry_points(group=GROUP)}


def opener(scheme: str) -> Callable[[str], Store] | None:
    """What opens the addresses of a scheme, or None if no package brings it.

    Raises ``UsageError`` where it cannot be loaded, or where several packages bring it.
    """
    found = {point.value: point for point in entry_points(group=GROUP) if point.name.lower() == scheme}
    if not found:
        return None
    if len(found) > 1:
        named = " and ".join(sorted(map(_named, found.values())))
        raise UsageError(f"{scheme}:// is brought by several packages, {named}: uninstall all but one")
    (point,) = found.values()
    try:
        made = point.load()
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{scheme}:// is brought by {_named(point)}, which cannot be loaded: {why}") from error
    if not callable(made):
        raise UsageError(f"{scheme}:// is brought by {_named(point)}, which cannot be called to open a store")
    opens: Callable[[str], Store] = made
    return opens


def _named(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else "a package"
    return f"{package} ({point.value})"
