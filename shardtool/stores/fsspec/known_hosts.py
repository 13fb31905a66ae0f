"""Which servers an SSH connection trusts: those of ``~/.ssh/known_hosts`` and ``/etc/ssh/ssh_known_hosts``, no others.

fsspec by itself takes whatever key a server shows, and with it whoever stands in between.
"""

from __future__ import annotations

import os
from typing import Any

from shardtool.errors import StoreError, UsageError

FILES = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")


def policy(where: str) -> Any:
    """What paramiko is to do with the key of a server: a ``paramiko.MissingHostKeyPolicy``."""
    try:
        import paramiko
    except ModuleNotFoundError as error:
        raise UsageError(f"{where} needs paramiko: pip install 'shardtool[sftp]'") from error

    class Known(paramiko.MissingHostKeyPolicy):
        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            known = paramiko.HostKeys()
            for name in FILES:
                path = os.path.expanduser(name)
                if os.path.exists(path):
                    known.load(path)
            kinds = known.lookup(hostname)
            if kinds is None:
                raise StoreError(
                    f"the server of {where} is not known: compare its key and add it to ~/.ssh/known_hosts, for example"
                    " with ssh-keyscan"
                )
            if kinds.get(key.get_name()) != key:
                raise StoreError(
                    f"the server of {where} shows another key than ~/.ssh/known_hosts has for it: somebody may stand in"
                    " between"
                )

    return Known()
