"""What the errors of fsspec, and of the libraries under it, mean: one place that turns them into shardtool's errors.

::

    no file, no folder                   NotFound
    no right, no or wrong credentials    AccessDenied
    no connection, cut, silent           Unavailable     another try may help
    an address that makes no sense       UsageError
    what is in the way, the rest         StoreError
"""

from __future__ import annotations

from shardtool.errors import AccessDenied, NotFound, ShardtoolError, StoreError, Unavailable, UsageError
from shardtool.stores.address import scheme_of
from shardtool.stores.wire.link import no_connection, reason, server_of, unreached

_SURPLUS = ("url_query", "url_fragment")  # fsspec gives both to file systems that know neither


def not_opened(error: Exception, where: str) -> ShardtoolError:
    """The error that it means when the file system of an address cannot be made; ``where``: without its password."""
    match error:
        case TypeError() if any(name in str(error) for name in _SURPLUS):
            return UsageError(
                f"{where} has a query or a fragment, which such addresses have not: leave out what follows ? or #"
            )
        case TypeError() if "'host'" in str(error):
            return UsageError(f"{where} names no server: write {scheme_of(where) or 'sftp'}://user@host/folder")
        case ValueError():  # its text may have a part of the password
            return UsageError(
                f"{where} is no address that fsspec understands: correct it, and quote a password (%2F for a slash)"
            )
        case _:
            return translated(error, where)


def translated(error: BaseException, where: str) -> ShardtoolError:
    """The error of shardtool that an error of fsspec, or of a library under it, means for ``where``."""
    text = reason(error)
    name = type(error).__name__
    match error:
        case FileNotFoundError() | NotADirectoryError() | IsADirectoryError():
            return NotFound(f"{where} does not exist")
        case PermissionError():
            return AccessDenied(f"access to {where} is denied: check the account and its permissions")
        case FileExistsError():
            return StoreError(f"{where} cannot be written: something of this name is in the way")
        case NotImplementedError():
            return UsageError(f"{where} can only be read: fsspec cannot do there what was asked for")
        case _ if "Authentication" in name or "PasswordRequired" in name:
            return AccessDenied(
                f"the server of {where} refuses the credentials ({name}): correct user, password or key"
            )
        case _ if "No authentication methods" in text:  # paramiko's, which has no name for it
            return AccessDenied(
                f"the server of {where} asks who you are: write sftp://user@host, and have a key of yours in ~/.ssh or"
                " in ssh-agent"
            )
        case _ if no_connection(error):
            request = getattr(error, "request", None)  # some file systems have servers that are not in the address
            return unreached(where, *server_of(str(getattr(request, "url", None) or where)), error)
        case OSError() | EOFError() | TimeoutError():
            return Unavailable(f"the connection to {where} broke ({text}): try again")
        case _ if "SSH" in name or "Connection" in name or "Timeout" in name:
            return Unavailable(f"the connection to {where} broke ({text}): try again")
        case ValueError() | TypeError() | KeyError():
            return UsageError(f"{where} cannot be opened by fsspec ({name}: {text}): correct the address")
        case _:
            return StoreError(f"{where} failed ({name}: {text})")
