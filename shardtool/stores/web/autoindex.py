"""What a web server lists when it is asked for a folder: nginx, Apache, Caddy, lighttpd, Python's own.

There is no listing in HTTP, but most servers can make one: JSON (nginx with ``autoindex_format json``, Caddy), which
tells sizes, or a page of links with a title that begins as ``TITLES`` do, whose sizes are rounded and not used.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import unescape
from urllib.parse import unquote, urlsplit

from shardtool.stores.base import is_key

TITLES = ("index of", "directory listing for")
_LONGEST = 4096  # characters of a link: a name has 1024 bytes at most, which may be quoted
# Python's own parser of HTML takes the square of the time for a page that is made so.
_TITLE = re.compile(r"<title[^<>]*>\s*([^<]{1,40})", re.IGNORECASE)
_LINK = re.compile(r"""<a\s[^<>]*?href\s*=\s*(?:"([^"<>]*)"|'([^'<>]*)'|([^\s"'<>]+))""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a folder: a name without slashes; ``size`` is -1 where the server does not tell it."""

    name: str
    folder: bool
    size: int = -1


def parse(body: bytes, kind: str) -> list[Listed] | None:
    """The entries of a listing whose ``Content-Type`` is ``kind``, or None if it is something else."""
    if "json" in kind:
        return _of_json(body)
    return _of_html(body) if "html" in kind else None


def _of_json(body: bytes) -> list[Listed] | None:
    try:
        table = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(table, list):
        return None
    found = []
    for item in table:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return None
        folder = item.get("type") == "directory" or item.get("is_dir") is True
        name, size = item["name"].rstrip("/"), item.get("size")
        if _is_name(name):
            found.append(Listed(name, folder, size if type(size) is int and 0 <= size < 1 << 62 else -1))
    return found


def _of_html(body: bytes) -> list[Listed] | None:
    page = body.decode("utf-8", errors="surrogateescape")
    title = _TITLE.search(page)
    if title is None or not title[1].lower().startswith(TITLES):
        return None
    found = {}
    for groups in _LINK.findall(page):
        link = "".join(groups)
        if len(link) > _LONGEST:
            continue
        try:
            parts = urlsplit(unescape(link))
        except ValueError:
            continue
        if parts.scheme or parts.netloc or parts.query or parts.fragment:
            continue  # a link to another order, or out of here
        name = unquote(parts.path.removeprefix("./"), errors="surrogateescape")
        if _is_name(name.rstrip("/")):
            found[name.rstrip("/")] = Listed(name.rstrip("/"), name.endswith("/"))
    return list(found.values())


def _is_name(name: str) -> bool:
    return "/" not in name and is_key(name)
