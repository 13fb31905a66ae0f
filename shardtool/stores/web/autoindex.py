"""What a web server lists when it is asked for a folder: nginx, Apache, Caddy, lighttpd, Python's own.

There is no listing in HTTP, but most servers can make one: JSON (nginx with ``autoindex_format json``, Caddy), which
tells sizes, or a page of links with a title that begins as ``TITLES`` do, whose sizes are rounded and not used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

from shardtool.stores.base import is_key

TITLES = ("index of", "directory listing for")


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
            found.append(Listed(name, folder, size if isinstance(size, int) and size >= 0 else -1))
    return found


def _of_html(body: bytes) -> list[Listed] | None:
    page = _Page()
    page.feed(body.decode("utf-8", errors="surrogateescape"))
    page.close()
    if not page.title.strip().lower().startswith(TITLES):
        return None
    found = {}
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or parts.query or parts.fragment:
            continue  # a link to another order, or out of here
        name = unquote(parts.path.removeprefix("./"), errors="surrogateescape")
        if _is_name(name.rstrip("/")):
            found[name.rstrip("/")] = Listed(name.rstrip("/"), name.endswith("/"))
    return list(found.values())


def _is_name(name: str) -> bool:
    return "/" not in name and is_key(name)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.links: list[str] = []
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_title = tag == "title"
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
