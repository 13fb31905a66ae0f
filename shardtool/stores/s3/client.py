"""How a bucket is reached: boto3 for the address, the credentials and small requests, our own wire for the bytes.

::

    api                    boto3's client: lists, heads, deletes, begins and ends uploads
    request(GetObject ..)  a request for the wire, signed with the credentials of now
      ├── where            what boto3 would have asked, learned once for each key without sending anything
      └── signature        botocore's SigV4 with the region and service that were learned; where botocore signs in other
                           ways (SigV2, S3 Express, many regions), it makes and signs each request itself
    renew                  credentials that were refused are looked up anew, as after a rotation

So profiles, SSO, web identity, endpoints, addressing and redirects to other regions stay botocore's business.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from shardtool.calm import calm
from shardtool.errors import ShardtoolError, UsageError
from shardtool.stores import accounts
from shardtool.stores.s3.errors import translated
from shardtool.stores.wire.http import Request, Wire
from shardtool.stores.wire.link import Pace

if TYPE_CHECKING:
    from botocore.credentials import ReadOnlyCredentials

PACE = Pace(connect=10.0, silence=60.0)
UNSIGNED = "UNSIGNED-PAYLOAD"
NOTHING = hashlib.sha256().hexdigest()
_AUTHORIZATION = re.compile(r"AWS4-HMAC-SHA256 Credential=.+/\d{8}/([^/,]+)/([^/,]+)/aws4_request, .*")
_AMAZON = (".amazonaws.com", ".amazonaws.com.cn")
_METHODS = {"GetObject": "GET", "PutObject": "PUT", "UploadPart": "PUT"}
_QUERY = {"PartNumber": "partNumber", "UploadId": "uploadId"}
_HEADERS = {
    "Range": "Range",
    "IfNoneMatch": "If-None-Match",
    "ChecksumAlgorithm": "x-amz-sdk-checksum-algorithm",
    "ChecksumCRC32": "x-amz-checksum-crc32",
    "ChecksumCRC64NVME": "x-amz-checksum-crc64nvme",
}
_A_WHILE = 20.0  # seconds for which a signature is used again
_MOST_SIGNATURES = 256
_OF_BODY = ("content-length", "expect")  # the body that the wire sends is another than the one that botocore sees


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is reached, as far as boto3's settings shall not decide. Empty: they do.

    ``unsigned``: ask as nobody, for buckets that are open to all. ``addressing``: ``path`` or ``virtual``, where the
    bucket's name goes.
    """

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region: str | None = None
    endpoint: str | None = None
    unsigned: bool = False
    addressing: str | None = None

    def __post_init__(self) -> None:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise UsageError("the id of an access key and its secret belong together: give both or none")


@dataclass(frozen=True, slots=True)
class _Address:
    """Where an object is, and how requests for it are signed: by nobody, by SigV4, or ``otherwise``."""

    url: str
    region: str = ""
    service: str = ""
    otherwise: bool = False


class Client:
    """One bucket's server, for many threads. ``where``: the store's address, for messages."""

    def __init__(self, where: str, bucket: str, *, attempts: int, access: Access) -> None:
        self._where = where
        self._bucket = bucket
        self._attempts = attempts
        self._access = access
        self._lock = threading.Lock()
        self._here = threading.local()
        self._addresses: dict[str, _Address] = {}
        self._signatures: dict[str, tuple[float, object, dict[str, str]]] = {}
        self._made: list[Any] = []
        self._begin()
        self.wire = Wire(ca_bundle=_certificates(self._session), pace=PACE)
        host = urlsplit(self.api.meta.endpoint_url).hostname or ""
        self.amazon = host.endswith(_AMAZON)
        """Whether this is Amazon's own server, whose behaviour is known."""

    def request(self, operation: str, key: str, payload: str = NOTHING, **given: str | int) -> Request:
        """A request of the wire, signed with the credentials of now.

        ``operation`` and ``given`` as botocore names them. ``payload``: the hash of the body, in hexadecimal, or
        ``UNSIGNED``.
        """
        address = self._address(key)
        if address.otherwise:
            captured = self._captured(operation, key, **given)
            headers = {name.lower(): _text(value) for name, value in captured.headers.items()}
            if operation != "GetObject" and headers.get("x-amz-content-sha256", UNSIGNED) != UNSIGNED:
                raise UsageError(f"{self._where} is a kind of bucket that can only be read: write to another one")
            return Request(captured.method, captured.url, {n: v for n, v in headers.items() if n not in _OF_BODY})
        query = "&".join(f"{_QUERY[n]}={quote(str(v), safe='-_.~')}" for n, v in given.items() if n in _QUERY)
        url = f"{address.url}?{query}" if query else address.url
        headers = {_HEADERS[name]: str(value) for name, value in given.items() if name in _HEADERS}
        headers["Host"] = urlsplit(url).netloc
        if not address.region:
            return Request(_METHODS[operation], url, headers)
        if operation == "GetObject":
            return Request("GET", url, self._signed_for_a_while(url, address, payload) | headers)
        return Request(_METHODS[operation], url, self._signed(_METHODS[operation], url, headers, address, payload))

    def forget(self) -> None:
        """Learn addresses anew, as when a bucket is found in another region."""
        self._addresses, self._signatures = {}, {}

    def credentials(self) -> ReadOnlyCredentials | None:
        """Those of now, renewed by botocore if they are about to expire."""
        found = None if self._unsigned else self._session.get_credentials()
        return found.get_frozen_credentials() if found else None

    def renew(self, refused: ReadOnlyCredentials | None) -> bool:
        """Look up credentials anew; whether they are others than those that were refused."""
        from botocore.exceptions import BotoCoreError, ClientError

        if self._access.access_key_id or refused is None:
            return False
        try:
            with self._lock:
                if self.credentials() == refused:
                    self._begin()
            return self.credentials() != refused
        except (BotoCoreError, ClientError, ShardtoolError, OSError, ValueError):
            return False  # that they were refused says more than that no others can be had

    def close(self) -> None:
        """Close the connections."""
        self.wire.close()
        for client in self._made:
            client.close()

    def _begin(self) -> None:
        """A session of botocore that knows what the environment and the files say now."""
        session, client, unsigned = _opened(self._where, attempts=self._attempts, access=self._access)
        client.meta.events.register_first("before-send.s3", self._capture)
        self._made.append(client)
        self._session, self.api, self._unsigned = session, client, unsigned

    def _address(self, key: str) -> _Address:
        if found := self._addresses.get(key):
            return found
        captured = self._captured("GetObject", key)
        url = captured.url.partition("?")[0]
        authorization = _text(captured.headers.get("Authorization", ""))
        if scope := _AUTHORIZATION.fullmatch(authorization):
            token = "x-amz-s3session-token" in {name.lower() for name in captured.headers}
            address = _Address(url, scope[1], scope[2], otherwise=token)
        else:
            address = _Address(url, otherwise=bool(authorization))
        self._addresses[key] = address
        return address

    def _captured(self, operation: str, key: str, **given: str | int) -> Any:
        """The request that botocore would send."""
        call = {"GetObject": self.api.get_object, "PutObject": self.api.put_object, "UploadPart": self.api.upload_part}
        self._here.captured = None
        self._here.capturing = True
        try:
            call[operation](Bucket=self._bucket, Key=key, **given)
        finally:
            self._here.capturing = False
        return self._here.captured

    def _capture(self, request: Any, **_: Any) -> Any:
        """In front of botocore's connection: keeps the request in this thread and answers it with nothing."""
        if not getattr(self._here, "capturing", False):
            return None
        from botocore.awsrequest import AWSResponse

        self._here.captured = request
        headers: Any = {}
        return AWSResponse(request.url, 200, headers, _Nothing())

    def _signed_for_a_while(self, url: str, address: _Address, payload: str) -> dict[str, str]:
        """The headers of a signed GET, the same for all ranges of some seconds: which range it is need not be signed.

        To sign takes a tenth of a millisecond, and a server takes a signature for a quarter of an hour.
        """
        now = time.time()  # of the day, which the signature says and the server compares with its own
        of = (self.credentials(), address, payload)
        made, by, headers = self._signatures.get(url, (0.0, None, {}))
        if by != of or abs(now - made) > _A_WHILE:
            headers = self._signed("GET", url, {"Host": urlsplit(url).netloc}, address, payload)
            if len(self._signatures) >= _MOST_SIGNATURES:
                self._signatures.clear()
            self._signatures[url] = now, of, headers
        return headers

    def _signed(
        self, method: str, url: str, headers: Mapping[str, str], address: _Address, payload: str
    ) -> dict[str, str]:
        from botocore.awsrequest import AWSRequest

        request = AWSRequest(method=method, url=url, headers=dict(headers))
        request.context["payload"] = payload
        _signer()(self.credentials(), address.service, address.region).add_auth(request)
        return {name: _text(value) for name, value in request.headers.items()}


class _Nothing(io.BytesIO):
    def stream(self) -> Iterator[bytes]:
        return iter(())


@cache
def _signer() -> Any:
    from botocore.auth import S3SigV4Auth

    class Signer(S3SigV4Auth):  # type: ignore[misc, unused-ignore]  # botocore has no types of its own
        """SigV4 of a body whose hash is known, or that is not hashed."""

        def payload(self, request: Any) -> str:
            return str(request.context["payload"])

    return Signer


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _certificates(session: Any) -> str:
    """The certificates that boto3 trusts: both ways to a server shall agree on it."""
    from botocore.httpsession import get_cert_path

    return str(session.get_config_variable("ca_bundle") or get_cert_path(True))


@cache
def _models(path: str | None) -> Any:
    """What botocore knows of its services, read once for all clients: 12 MiB."""
    from botocore.loaders import create_loader

    return create_loader(path)


def _opened(where: str, *, attempts: int, access: Access) -> tuple[Any, Any, bool]:
    """A session, a client for many threads, and whether they ask as nobody. What botocore knows is much JSON."""
    with calm():
        return _made(where, attempts, access)


def _made(where: str, attempts: int, access: Access) -> tuple[Any, Any, bool]:
    """All as boto3's settings want it, but for what servers other than Amazon's stumble on."""
    try:
        import botocore.session
        from botocore.config import Config
        from botocore.configprovider import ConfiguredEndpointProvider
        from botocore.exceptions import BotoCoreError
    except ModuleNotFoundError as error:
        raise UsageError(f"{where} needs boto3: pip install boto3") from error

    try:
        session = botocore.session.Session()
        session.register_component("data_loader", _models(session.get_config_variable("data_path")))
        if access.access_key_id and access.secret_access_key:
            session.set_credentials(access.access_key_id, access.secret_access_key, access.session_token)
        unsigned = access.unsigned or (access.access_key_id is None and accounts.s3_unsigned())
        profile, endpoint = session.get_scoped_config(), access.endpoint
        if not endpoint and not session.get_config_variable("ignore_configured_endpoint_urls"):
            endpoint = ConfiguredEndpointProvider(session.full_config, profile, "s3").provide()
        addressing = access.addressing or (profile.get("s3") or {}).get("addressing_style")
        if not addressing and endpoint and not (urlsplit(endpoint).hostname or "").endswith(_AMAZON):
            addressing = "path"  # a name such as bucket.localhost rarely resolves
        settings: Any = {"addressing_style": addressing} if addressing else None
        client = session.create_client(
            "s3",
            region_name=access.region,
            endpoint_url=endpoint,
            config=Config(
                signature_version=botocore.UNSIGNED if unsigned else None,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"mode": "standard", "total_max_attempts": attempts},
                max_pool_connections=128,
                connect_timeout=PACE.connect,
                read_timeout=PACE.silence,
                tcp_keepalive=True,
                s3=settings,
            ),
        )
    except (BotoCoreError, ValueError) as error:
        raise translated(error, where) from error
    return session, client, unsigned
