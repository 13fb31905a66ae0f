"""What errors of S3 servers and of boto3 mean: one place that makes them shardtool's, and says what to do.

Amazon, Ceph, MinIO and the rest agree on status codes more than on names, so a name is looked at first where it says
more than the status, and the status decides otherwise. The answer to a HEAD request has no body and thus only a status.

::

    no credentials, 401, 403         AccessDenied
    no bucket, no object, 404        NotFound
    412                              AlreadyExists    (only asked for where an object must not exist)
    416                              FormatError      the object ends before the bytes that were asked for
    throttling, 5xx, cut, silent     Unavailable      another try may help; Busy with the pause that the server asks for
    another checksum than ours       Unavailable      the bytes were damaged on their way
    not known to this server         Unsupported      a StoreError: it may do without
    a bad name, region or endpoint   UsageError
    the rest                         StoreError
"""

from __future__ import annotations

import re
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
from shardtool.stores.wire.link import server_of, unreached
from shardtool.stores.wire.retry import Busy, retry_after

_CODE = re.compile(rb"<Code>([A-Za-z0-9._-]{1,100})</Code>")
_THROTTLED = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests")
_PASSING = ("InternalError", "RequestTimeout", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict")
_DAMAGED = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
_UNKNOWN = ("NotImplemented", "InvalidRequest", "InvalidArgument")
_REDIRECTED = ("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IncorrectEndpoint")
_CREDENTIALS = (
    *("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "TokenRefreshRequired"),
    *("ExpiredTokenException", "InvalidIdentityToken", "IDPRejectedClaim", "InvalidClientTokenId"),  # of STS
)


class Unsupported(StoreError):
    """The server does not know what a request asks for."""


def translated(error: BaseException, where: str) -> ShardtoolError:
    """The error of shardtool that an error of boto3, or of the network under it, means for ``where``."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        return _of_client(error, where)
    response: dict[str, Any] = dict(error.response)
    about = response.get("ResponseMetadata", {})
    code, status = str(response.get("Error", {}).get("Code", "")), int(about.get("HTTPStatusCode", 0))
    return _of_answer(code, status, where, detail=str(error))


def refused(answer: Answer, where: str) -> ShardtoolError:
    """The error that an answer of the wire means for ``where``."""
    code = code_of(answer)
    error = _of_answer(code, answer.status, where, detail=f"the server says {answer.status} {code}".rstrip())
    if isinstance(error, Unavailable) and (pause := retry_after(answer.headers)):
        return Busy(str(error), after=pause)
    return error


def redirected(answer: Answer) -> bool:
    """Whether an answer says that the bucket lies in another region."""
    return answer.status in (301, 302, 307, 308) or code_of(answer) in _REDIRECTED


def code_of(answer: Answer) -> str:
    """The name that an answer gives to what is wrong, or nothing."""
    found = _CODE.search(answer.body)
    return found[1].decode() if found else ""


def _of_answer(code: str, status: int, where: str, detail: str) -> ShardtoolError:
    bucket = "/".join(where.split("/")[:3])
    said = f"the server says {code or status}"
    match code, status:
        case "NoSuchBucket", _:
            return NotFound(f"the bucket of {where} does not exist: check {bucket} and the endpoint")
        case "NoSuchUpload", _:
            return NotFound(f"the upload of {where} does not exist: it was completed or aborted by somebody else")
        case "RequestTimeTooSkewed", _:
            return AccessDenied(f"{where} is refused because this machine's clock is wrong ({said}): set it")
        case name, _ if name in _CREDENTIALS:
            return AccessDenied(f"the credentials for {where} are not valid ({said}): renew or correct them")
        case name, _ if name in _THROTTLED or status == 429:
            return Unavailable(f"{where} is asked for too often ({said}): try again later or with fewer readers")
        case name, _ if name in _PASSING or (status >= 500 and status != 501):
            return Unavailable(f"{where} could not be served at this moment ({said}): try again")
        case _, 401 | 403:
            return AccessDenied(
                f"access to {where} is denied ({said}): check the permissions, and whether it exists, since a server"
                " denies what it may not say"
            )
        case _, 404:
            return NotFound(f"{where} does not exist")
        case _, 412:
            return AlreadyExists(f"{where} exists already: delete it or choose another name")
        case _, 416:
            return FormatError(f"{where} ends before the bytes that were asked for")
        case name, _ if name in _DAMAGED:
            return Unavailable(f"the bytes of {where} were damaged on their way ({said}): try again")
        case name, _ if name in _UNKNOWN or status == 501:
            return Unsupported(f"{where} failed: {detail}")
        case _:
            return StoreError(f"{where} failed: {detail}")


def _of_client(error: BaseException, where: str) -> ShardtoolError:
    from botocore import exceptions as boto

    credentials = (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.CredentialRetrievalError,
        boto.NoAuthTokenError,
        boto.TokenRetrievalError,
        boto.SSOError,
    )
    settings = (
        boto.ParamValidationError,
        boto.ProfileNotFound,
        boto.ConfigParseError,
        boto.ConfigNotFound,
        boto.InvalidConfigError,
        boto.InvalidRegionError,
        boto.NoRegionError,
        boto.UnknownEndpointError,
        ValueError,
    )
    text = " ".join(str(error).split())
    match error:
        case _ if isinstance(error, credentials):
            return AccessDenied(f"no credentials for {where} ({text}): set AWS_PROFILE or AWS_ACCESS_KEY_ID")
        case _ if isinstance(error, settings):
            return UsageError(f"{where} cannot be asked for ({text}): correct the address or the AWS settings")
        case boto.SSLError():
            return StoreError(f"the server of {where} cannot be trusted ({text}): see AWS_CA_BUNDLE")
        case boto.EndpointConnectionError() | boto.ConnectTimeoutError() | boto.ProxyConnectionError():
            address = error.kwargs.get("endpoint_url") or error.kwargs.get("proxy_url") or ""
            return unreached(where, *server_of(str(address)), error)
        case FileNotFoundError() | PermissionError() | IsADirectoryError() | NotADirectoryError():
            text = f"{error.filename}: {error.strerror}"  # a token or certificates that the settings name
            return UsageError(f"{where} cannot be asked for ({text}): correct the AWS settings")
        case boto.HTTPClientError() | boto.IncompleteReadError() | OSError():
            return Unavailable(f"the connection to the server of {where} broke ({text}): try again")
        case _:
            return StoreError(f"{where} failed: {text}")
