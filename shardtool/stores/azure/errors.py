"""What the answers of Azure's blob service mean: one place that turns them into shardtool's errors.

The service names what is wrong in ``x-ms-error-code``, of the answer to a HEAD request too; the status decides where it
says nothing, or something that is not known here.

::

    no credentials, 401, 403            AccessDenied
    no container, no blob, 404          NotFound
    409, 412 of a blob that is there    AlreadyExists    (only asked for where a blob must not exist)
    416                                 FormatError      the blob ends before the bytes that were asked for
    throttling, 5xx, damaged bytes      Unavailable      another try may help
    a bad name or a bad setting         UsageError
    the rest                            StoreError
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardtool.errors import (
    AccessDenied,
    AlreadyExists,
    FormatError,
    NotFound,
    ShardtoolError,
    StoreError,
    Unavailable,
    UsageError,
)
from shardtool.stores.wire.retry import PASSING, THROTTLED, Busy, retry_after

MISSING = frozenset({"BlobNotFound", "ResourceNotFound", "DirectoryIsNotEmpty"})
"""What says that there is no such blob."""

_CODE = re.compile(r"[A-Za-z0-9]{1,80}")
_IN_BODY = re.compile(rb"<Code>([A-Za-z0-9]{1,80})</Code>")

_WRONG = frozenset({"AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation"})
_DENIED = frozenset({"PublicAccessNotPermitted", "BlobImmutableDueToPolicy", "AccountIsDisabled"})
_KEYS = frozenset({"KeyBasedAuthenticationNotPermitted", "AuthenticationTypeDisabled"})
_PASSING = frozenset({"InternalError", "OperationTimedOut"})
_THROTTLED = frozenset({"ServerBusy", "TooManyRequests"})
_DAMAGED = frozenset({"Md5Mismatch", "Crc64Mismatch"})
_NAMES = frozenset({"InvalidResourceName", "InvalidUri", "OutOfRangeInput"})
_THERE = frozenset({"BlobAlreadyExists", "ConditionNotMet", "TargetConditionNotMet"})


class Dropped(StoreError):
    """Blocks that were sent are not there any more."""


def code_of(headers: Mapping[str, str], body: bytes | memoryview = b"") -> str:
    """What the service says is wrong; empty if nothing, or nothing that looks like a name."""
    said = headers.get("x-ms-error-code", "")
    if _CODE.fullmatch(said):
        return said
    found = _IN_BODY.search(body)
    return found[1].decode() if found else ""


def translated(
    status: int, headers: Mapping[str, str], body: bytes | memoryview, where: str, *, how: str = "the credentials"
) -> ShardtoolError:
    """The error of shardtool that an answer means for ``where``; ``how`` names what proved who we are."""
    code = code_of(headers, body)
    container = "/".join(where.split("/")[:3])
    said = f"the server says {code or status}"
    match code, status:
        case (("ContainerNotFound" | "ContainerBeingDeleted" | "ContainerDisabled"), _):
            return NotFound(f"the container of {where} does not exist ({said}): check {container} and the account")
        case name, _ if name in _WRONG or (status == 401 and not name):
            return AccessDenied(
                f"{how} for {where} are not valid or have expired ({said}): renew or correct them, and check this"
                " machine's clock"
            )
        case name, _ if name in _KEYS:
            return AccessDenied(
                f"the account of {where} takes no account keys ({said}): unset them, so that the login of az, a managed"
                " identity or another of DefaultAzureCredential's is used"
            )
        case name, _ if name in _THROTTLED or (not name and status in THROTTLED):
            return Busy(
                f"{where} is asked for too often ({said}): try again later or with fewer readers",
                after=retry_after(headers),
            )
        case name, _ if name in _DAMAGED:
            return Unavailable(f"the bytes of {where} were damaged on the way ({said}): try again")
        case name, _ if name in _PASSING or status in PASSING:
            return Unavailable(f"{where} could not be served at this moment ({said}): try again")
        case "AccountRequiresHttps", _:
            return UsageError(f"the account of {where} is only reached over https: correct AZURE_STORAGE_ENDPOINT")
        case name, _ if name in _NAMES:
            return UsageError(f"{where} is no name that Azure takes ({said}): choose another one")
        case (("BlobArchived" | "BlobBeingRehydrated"), _):
            return StoreError(f"{where} lies in the archive tier and cannot be read: set its tier to hot and wait")
        case (("LeaseIdMissing" | "SnapshotsPresent"), _):
            return StoreError(f"{where} is held by a lease or by snapshots ({said}): break or delete them")
        case name, _ if name in _THERE or (not name and status in (409, 412)):
            return AlreadyExists(f"{where} exists already: delete it or choose another name")
        case "InvalidBlockList", _:
            return Dropped(
                f"the blocks of {where} are gone: somebody else wrote it at the same time, or removed what was"
                " unfinished; write it again"
            )
        case (("InvalidBlobOrBlock" | "InvalidBlockId"), _):
            return StoreError(
                f"another program has begun to write {where} and left its blocks ({said}): see shardtool clean, or wait"
                " a week"
            )
        case name, _ if name in _DENIED or status in (401, 403):
            return AccessDenied(
                f"access to {where} is denied ({said}): check {how}, its permissions (a role such as Storage Blob Data"
                " Contributor) and the account's network rules"
            )
        case name, _ if name in MISSING or status == 404:
            return NotFound(f"{where} does not exist")
        case _, 416:
            return FormatError(f"{where} ends before the bytes that were asked for")
        case _:
            return StoreError(f"{where} failed: {said} (status {status})")
