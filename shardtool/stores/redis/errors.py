"""What the errors of a Redis server mean: one place that turns its words into shardtool's errors.

The first word of an error is its kind, as Redis and those that speak its protocol agree.

::

    NOAUTH, WRONGPASS, NOPERM              AccessDenied
    LOADING, BUSY, NOREPLICAS, MASTERDOWN  Unavailable     another try may help
    OOM, READONLY, MISCONF, WRONGTYPE      StoreError      somebody has to do something about the server
    MOVED, ASK, CROSSSLOT, CLUSTERDOWN     UsageError      a cluster
    the rest                               StoreError
"""

from __future__ import annotations

from shardtool.errors import AccessDenied, ShardtoolError, StoreError, Unavailable, UsageError

_CLUSTER = ("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN", "TRYAGAIN")


class Refusal(Exception):
    """An error that the server answered with, in its own words."""


def translated(said: str, where: str) -> ShardtoolError:
    """The error of shardtool that the server's words mean for ``where``."""
    # A server repeats the arguments of a command that it does not know, and these may be a password.
    text = " ".join(said.partition(", with args")[0].split())[:200].rstrip(".")
    says = f"the server says {text}"
    match text.partition(" ")[0]:
        case "NOAUTH":
            return AccessDenied(
                f"{where} asks for a password ({says}): set REDIS_PASSWORD, and REDIS_USERNAME if needed"
            )
        case "WRONGPASS":
            return AccessDenied(f"the user or the password for {where} is wrong ({says}): correct REDIS_PASSWORD")
        case "NOPERM":
            return AccessDenied(
                f"the user of {where} may not do this ({says}): grant +@read, and +@write +eval for writing, on its"
                " keys"
            )
        case "OOM":
            return StoreError(
                f"{where} does not fit into the server's memory ({says}): raise its maxmemory or free some"
            )
        case "NOREPLICAS":
            return Unavailable(f"{where} has too few replicas to take writes ({says}): wait for them and try again")
        case "LOADING" | "BUSY" | "MASTERDOWN":
            return Unavailable(f"the server of {where} is not ready ({says}): try again later")
        case "READONLY":
            return StoreError(f"{where} is on a replica that takes no writes ({says}): use the address of its primary")
        case "MISCONF":
            return StoreError(
                f"the server of {where} cannot save to its own disk and takes no writes ({says}): see its log"
            )
        case "WRONGTYPE":
            return StoreError(f"{where} cannot be used, something else has its keys ({says}): choose another name")
        case kind if kind in _CLUSTER:
            return UsageError(
                f"{where} is on a Redis Cluster, which is not supported ({says}): use a server on its own"
            )
        case _:
            return _of_words(text.lower(), where, says)


def _of_words(text: str, where: str, says: str) -> ShardtoolError:
    if "without any password configured" in text:
        return AccessDenied(f"the server of {where} knows no password, but one was given ({says}): leave it out")
    if "max number of clients" in text:
        return Unavailable(f"the server of {where} has too many connections ({says}): try again with fewer readers")
    if "db index" in text:
        return UsageError(f"the server of {where} does not have this database ({says}): correct db= in the address")
    if "bulk length" in text or "maximum allowed size" in text:
        return StoreError(
            f"{where} has a value that is too large for the server ({says}): raise its proto-max-bulk-len"
        )
    return StoreError(f"{where} failed: {says}")
