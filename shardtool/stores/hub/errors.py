"""What the answers of a Hugging Face hub mean: one place that turns them into shardtool's errors.

The hub says in ``X-Error-Code`` what the status leaves open. To those who are not logged in it does not tell a model
that is private from one that is not there.

::

    RevisionNotFound, EntryNotFound      NotFound
    RepoNotFound, 401 without a code     NotFound       or private
    GatedRepo, a bad token, 403          AccessDenied
    429, 5xx                             Unavailable    another try may help
    the rest                             StoreError
"""

from __future__ import annotations

from shardtool.errors import AccessDenied, NotFound, ShardtoolError, StoreError
from shardtool.stores.wire.http import Answer
from shardtool.stores.wire.ranged import passing

_BAD_TOKEN = "Invalid credentials"
_QUOTED = 200


def refused(answer: Answer, where: str, page: str, *, elsewhere: bool = False) -> ShardtoolError:
    """The error that an answer means for ``where``, a file or a model whose page is at ``page``.

    ``elsewhere``: the answer is not the hub's, but of the host that has its large files.
    """
    if busy := passing(answer, where):
        return busy
    code, said = answer.headers.get("x-error-code", ""), answer.headers.get("x-error-message", "")[:_QUOTED]
    says = f"the server says {f'{answer.status}, {said}' if said else answer.status}"
    if elsewhere:
        if answer.status == 404:
            return NotFound(f"{where} is listed, but the host that has large files does not have it: try again later")
        return AccessDenied(f"the host that has large files refuses {where} ({says}): check the clock of this machine")
    match code, answer.status:
        case "GatedRepo", _:
            return AccessDenied(
                f"{where} is gated: ask for access on {page}, and log in with hf auth login or set HF_TOKEN"
            )
        case "RevisionNotFound", _:
            return NotFound(f"{where}: {page} has no such revision")
        case "EntryNotFound", _:
            return NotFound(f"{where} does not exist")
        case _, 401 if _BAD_TOKEN in said:
            return AccessDenied(f"the token for {where} is not valid ({says}): run hf auth login, or correct HF_TOKEN")
        case "RepoNotFound", _:
            return _no_model(where, page)
        case _, 401:
            return _no_model(where, page)
        case _, 403:
            return AccessDenied(f"access to {where} is denied ({says}): check what the token of HF_TOKEN may do")
        case _, 404:
            return NotFound(f"{where} does not exist ({says}): check the name, and HF_ENDPOINT if it is set")
        case _:
            return StoreError(f"{where} failed ({says}): check HF_ENDPOINT if it is set")


def _no_model(where: str, page: str) -> NotFound:
    return NotFound(
        f"{where}: there is no model {page}, or it is private: check the name, or log in with hf auth login or set"
        " HF_TOKEN"
    )
