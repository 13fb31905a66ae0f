"""Temporary files of a folder: what is being written there, and what killed processes left.

::

    .shardtool/tmp/<32 random digits>-<the key in base64>.tmp      a name that no pattern of model files matches

A temporary file is locked (``flock``) by the process that writes it, and the lock goes when the process does, however
it ends. So what a killed process left behind is told from what another one is writing at this moment.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator

from shardtool.stores.base import Unfinished, is_key

FOLDER = ".shardtool/tmp"
_SUFFIX = ".tmp"
_LONGEST = 240
_DIGITS = 32

writing: set[str] = set()
"""Names of the temporary files that this process is writing.

On some network file systems a process does not see its own locks, and would sweep what another thread writes.
"""


def new_name(key: str) -> str:
    """A name that no other file has, and that tells the key where it is not too long for a name."""
    mark = secrets.token_hex(_DIGITS // 2)
    name = f"{mark}-{base64.urlsafe_b64encode(os.fsencode(key)).decode().rstrip('=')}{_SUFFIX}"
    return name if len(name) <= _LONGEST else mark + _SUFFIX


def sweep(folder: str) -> None:
    """Remove the temporary files that no living process has locked. It is no harm if that cannot be done."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(_SUFFIX) and name not in writing]
    except OSError:
        return
    for name in names:
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def unfinished(folder: str, prefix: str) -> Iterator[Unfinished]:
    """The temporary files of objects whose key starts with ``prefix``. What is being written now is brand new.

    A file whose name does not tell its key goes by its own path.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(_SUFFIX))
    except OSError:
        return
    for name in names:
        key = key_of(name) or f"{FOLDER}/{name}"
        with contextlib.suppress(OSError):
            path = os.path.join(folder, name)
            info = os.stat(path, follow_symlinks=False)
            if stat.S_ISREG(info.st_mode) and key.startswith(prefix):
                alive = name in writing or _locked(path)
                yield Unfinished(key, name, time.time() if alive else info.st_mtime, info.st_size)


def key_of(name: str) -> str | None:
    """The key that the name of a temporary file tells, or None."""
    code = name[_DIGITS + 1 : -len(_SUFFIX)]
    with contextlib.suppress(ValueError):
        key = os.fsdecode(base64.b64decode(code + "=" * (-len(code) % 4), altchars=b"-_", validate=True))
        if name[_DIGITS : _DIGITS + 1] == "-" and name.endswith(_SUFFIX) and is_key(key):
            return key
    return None


def _locked(path: str) -> bool:
    """Whether a living process has locked the file, as far as can be told."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
