"""What the answers of Google Cloud Storage mean, and the errors of its library: one place that turns them into ours.

An answer that is an error has a status and mostly a JSON body with a reason and a sentence. The status decides; the
sentence tells a bucket that does not exist from an object that does not, and bytes that were damaged from a request
that makes no sense.

::

    no or wrong credentials, 401, 403   AccessDenied
    no bucket, no object, 404, 410      NotFound
    412 of a condition                  AlreadyExists    (only asked for where an object must not exist)
    416                                 FormatError      the object ends before the bytes that were asked for
    429, 5xx, damaged, cut, silent      Unavailable      another try may help
    a bad name or a bad setting         UsageError
    the rest                            StoreError
"""

from __future__ import annotations

import json
from typing import Any

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
from shardtool.stores.wire.http import Answer
from shardtool.stores.wire.link import no_connection, server_of, unreached
from shardtool.stores.wire.retry import PASSING, Busy, retry_after

_LOGIN = "run gcloud auth application-default login, or name a service account's file in GOOGLE_APPLICATION_CREDENTIALS"
_LONGEST = 300


def answered(answer: Answer, where: str, *, anonymous: bool = False) -> ShardtoolError:
    """The error that an answer of the JSON API means for ``where``; ``anonymous``: it was asked as nobody."""
    reason, message = _said(answer.body)
    return _meaning(answer.status, reason, message, where, anonymous=anonymous, after=retry_after(answer.headers))


def translated(error: Exception, where: str, *, anonymous: bool = False) -> ShardtoolError:
    """The error of shardtool that an error of Google's libraries, or of the network under them, means."""
    import requests.exceptions as http
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError, TransportError

    match error:
        case GoogleAPICallError():
            details = error.errors[0] if error.errors and isinstance(error.errors[0], dict) else {}
            after = retry_after({name.lower(): value for name, value in getattr(error.response, "headers", {}).items()})
            reason = str(details.get("reason", ""))
            return _meaning(int(error.code or 0), reason, str(error.message), where, anonymous=anonymous, after=after)
        case DefaultCredentialsError():
            return AccessDenied(f"no credentials for {where} ({_text(error)}): {_LOGIN}")
        case TransportError():
            text = _text(error)
            return Unavailable(f"the server that gives credentials for {where} cannot be reached ({text}): try again")
        case RefreshError() if not error.retryable:
            return AccessDenied(f"the credentials for {where} cannot be renewed ({_text(error)}): {_LOGIN}")
        case GoogleAuthError():
            kind = Unavailable if error.retryable else AccessDenied
            return kind(f"the credentials for {where} could not be had ({_text(error)}): try again, or {_LOGIN}")
        case http.SSLError():
            return StoreError(f"the server of {where} cannot be trusted ({_text(error)}): see SSL_CERT_FILE")
        case http.InvalidJSONError() | AttributeError() | TypeError() | LookupError():
            # The library takes any answer for a JSON object, an empty one too.
            return Unavailable(f"the server of {where} answers with something that is no JSON object: try again")
        case http.ConnectTimeout() | http.ConnectionError() if no_connection(error) or isinstance(error, http.Timeout):
            return unreached(where, *server_of(str(getattr(error.request, "url", None) or "")), error)
        case http.Timeout():
            return Unavailable(f"the server of {where} is silent or too slow ({_text(error)}): try again")
        case ValueError():
            return UsageError(f"{where} cannot be asked for ({_text(error)}): correct the address or Google's settings")
        case _:
            return Unavailable(f"the connection to the server of {where} broke ({_text(error)}): try again")


def _meaning(status: int, reason: str, message: str, where: str, *, anonymous: bool, after: float) -> ShardtoolError:
    said = f"the server says {status} {reason}".rstrip()
    lower = message.lower()
    match status:
        case 400 if "doesn't match" in lower or "does not match" in lower:
            return Unavailable(f"the bytes of {where} were damaged on the way ({said}): try again")
        case 400 if "bucket" in lower or "object name" in lower:
            return UsageError(f"{where} is no name that Google takes ({said}: {_cut(message)}): choose another one")
        case 401 | 403 if anonymous:
            return AccessDenied(f"{where} is not open to all ({said}) and no credentials were found: {_LOGIN}")
        case 401:
            return AccessDenied(f"the credentials for {where} are not valid ({said}): renew or correct them")
        case 403 if reason in ("rateLimitExceeded", "userRateLimitExceeded", "quotaExceeded"):
            return Busy(f"{where} is asked for too often ({said}): try again later or with fewer readers", after=after)
        case 403:
            return AccessDenied(
                f"access to {where} is denied ({said}): check that the account has a role such as Storage Object User"
                " for the bucket, and whether it exists, since a server denies what it may not say"
            )
        case 404 if "bucket" in lower and "object" not in lower:
            bucket = "/".join(where.split("/")[:3])
            return NotFound(f"the bucket of {where} does not exist: check {bucket} and the project")
        case 404 | 410:
            return NotFound(f"{where} does not exist")
        case 412 if reason == "conditionNotMet" or "generationmatch" in lower:
            return AlreadyExists(f"{where} exists already: delete it or choose another name")
        case 416:
            return FormatError(f"{where} ends before the bytes that were asked for")
        case 429:
            return Busy(f"{where} is asked for too often ({said}): try again later or with fewer readers", after=after)
        case _ if status in PASSING or status >= 500:
            return Busy(f"{where} could not be served at this moment ({said}): try again", after=after)
        case _:
            return StoreError(f"{where} failed: {said}: {_cut(message)}".rstrip(": "))


def _said(body: bytes) -> tuple[str, str]:
    """The reason and the sentence of an error's body; whoever stands between us and Google may have sent anything."""
    try:
        error: Any = json.loads(body)["error"]
        details = (error.get("errors") or [{}])[0]
        return str(details.get("reason", ""))[:40], str(error.get("message", ""))
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", ""


def _text(error: BaseException) -> str:
    """What went wrong, from the innermost error, without the address that was asked."""
    inner: Any = error
    while True:
        deeper = getattr(inner, "reason", None) or (inner.args[0] if inner.args else None)
        if not isinstance(deeper, BaseException):
            break
        inner = deeper
    text = inner.args[0] if inner.args and isinstance(inner.args[0], str) else str(inner)
    return _cut(text.rpartition("object at 0x")[2].partition(">: ")[2] or text)


def _cut(text: str) -> str:
    return " ".join(text.split())[:_LONGEST].rstrip(".")
