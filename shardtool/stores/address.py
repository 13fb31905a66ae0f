"""Addresses: what kind one is of, and how it is shown to people."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from shardtool.errors import UsageError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOGIN = re.compile(r"[^/?#]*@")
_BROKEN_LOGIN = re.compile(r"[^/?#\[\]:@]*:(?!\d*(?:[/?#]|$))[^@]*[/?#].*@")  # its password is not quoted
_CONTAINERS = ("az", "abfs", "abfss")  # what is before their @ is no secret


def scheme_of(address: str) -> str | None:
    """The scheme in small letters, or None: then it is a path."""
    found = _ADDRESS.match(address)
    return found[1].lower() if found else None


def shown(address: str) -> str:
    """The address without what may be a secret: user and password, and everything from a question mark on.

    Whoever puts an address into an error, a report, a manifest or a log has it pass through here. A path is shown as it
    is, and so is ``file://``, which has neither.
    """
    if scheme_of(address) in (None, "file"):
        return address
    scheme, _, rest = address.partition("://")
    if scheme.lower() not in _CONTAINERS:
        login = _BROKEN_LOGIN.match(rest) or _LOGIN.match(rest)
        rest = rest[login.end() :] if login else rest
    return f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0]}"


def path_of(address: str) -> str:
    """The path that a ``file://`` address means. Raises ``UsageError``."""
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
        raise UsageError(f"{address!r} names no file of this machine: write file:///absolute/path")
    return unquote(parts.path)
