"""Volumes of a Kubernetes cluster: ``pvc://claim/path`` is a folder below where the claim's volume is mounted.

llm-d names models like this, and mounts the one claim of a pod at ``/model-cache``. ``SHARDTOOL_PVC_ROOT`` says another
place, with ``{claim}`` in it where a pod has several: ``/volumes/{claim}``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from shardtool.errors import NotFound, UsageError
from shardtool.stores import accounts
from shardtool.stores.base import Object, is_key
from shardtool.stores.local.store import LocalStore, LocalWriter

_CLAIM = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?", re.ASCII)


class PvcStore(LocalStore):
    """The files below ``pvc://claim/path``. The volume must be mounted: its folder is never made."""

    def __init__(self, uri: str) -> None:
        claim, _, path = uri.partition("://")[2].rstrip("/").partition("/")
        if not _CLAIM.fullmatch(claim) or (path and not is_key(path)) or any(c in path for c in "?#"):
            raise UsageError(f"{uri!r} names no folder of a volume: write pvc://claim/path, without ? or ..")
        self._claim = claim
        self._mount = accounts.pvc_root().replace("{claim}", claim)
        super().__init__(os.path.join(self._mount, path))
        self.uri = f"pvc://{claim}/{path}".rstrip("/")

    def list(self, prefix: str = "") -> Iterator[Object]:
        """The files whose key starts with ``prefix``."""
        self._expect_mount()
        return super().list(prefix)

    def create(self, key: str, size: int, *, exclusive: bool = False) -> LocalWriter:
        """Begin a file of exactly ``size`` bytes."""
        self._expect_mount()
        return super().create(key, size, exclusive=exclusive)

    def _expect_root(self) -> None:
        self._expect_mount()
        super()._expect_root()

    def _expect_mount(self) -> None:
        """The volume is there, and a link in it does not lead the address out of it."""
        if not os.path.isdir(self._mount):
            raise NotFound(
                f"the volume {self._claim} of {self.uri} is not mounted at {self._mount}: mount it, or say where it is"
                " in SHARDTOOL_PVC_ROOT"
            )
        mount = os.path.realpath(self._mount)
        if os.path.commonpath((mount, self.place())) != mount:
            raise UsageError(f"{self.uri} is behind a link that leaves its volume: nothing is read or changed there")
