"""Which account of Azure an address means, and how its requests are signed, by way of Azure's own libraries.

::

    az://container/folder                                    the account of the environment
    az://container@account/folder                            an account of the public cloud
    abfss://container@account.dfs.core.windows.net/folder    as Hadoop and Spark write it

    connection string, account key    every request is signed           azure-storage-blob
    shared access signature           goes with the address
    neither                           a token of DefaultAzureCredential  azure-identity
    anonymous                         nothing

A key or a signature of one account never goes to another, and tokens only go over TLS to Azure's own domains or to the
endpoint that the environment names.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from shardtool.errors import AccessDenied, UsageError
from shardtool.stores.accounts import AzureAccount
from shardtool.stores.address import shown
from shardtool.stores.base import check_key

SCOPE = "https://storage.azure.com/.default"
VERSION = "2021-12-02"
"""The protocol that is spoken: what is used here is in all later ones."""

_SCHEMES = ("az", "abfs", "abfss")
_CONTAINER = re.compile(r"(?=.{3,63}$)[a-z0-9]+(?:-[a-z0-9]+)*")
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_DOMAIN = re.compile(
    r"([a-z0-9]{3,24})\.(?:blob|dfs)\."
    r"(core\.windows\.net|core\.chinacloudapi\.cn|core\.usgovcloudapi\.net|z\d{1,2}\.storage\.azure\.net)"
)
_ZONED = re.compile(r"([a-z0-9]{3,24})\.(z\d{1,2})\.(?:blob|dfs)\.(storage\.azure\.net)")
_NOT_THERE = re.compile(r"unavailable|not found|could not be found|not installed|requires? the|not configured")
_RENEWED = 300.0  # seconds before its end that a token is renewed
_JUST_NOW = 30.0

INSTALL = "pip install 'shardtool[azure]'"


@dataclass(frozen=True, slots=True)
class Address:
    """What an address says: ``endpoint`` and ``account`` only if it names an account."""

    uri: str
    container: str
    prefix: str
    account: str | None = None
    endpoint: str | None = None

    @classmethod
    def of(cls, uri: str) -> Address:
        """Understand an address, or ``UsageError``."""
        if "?" in uri:
            raise UsageError(
                f"{shown(uri)} has something behind a question mark: leave it out, and put a shared access signature"
                " into AZURE_STORAGE_SAS_TOKEN"
            )
        scheme, _, rest = uri.partition("://")
        place, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        container, at, host = place.partition("@")
        if scheme not in _SCHEMES or not container:
            raise UsageError(f"{uri!r} names no container: write az://container/folder")
        if not _CONTAINER.fullmatch(container):
            raise UsageError(
                f"{uri!r} names no container: {container!r} is not made of 3 to 63 small letters, digits and single"
                " dashes"
            )
        account = endpoint = None
        if at:
            account, endpoint = _account_at(uri, host)
        elif scheme != "az":
            raise UsageError(
                f"{uri!r} names no account: write {scheme}://container@account.dfs.core.windows.net/folder"
            )
        if prefix:
            check_key(prefix)
        return cls(f"{scheme}://{place}/{prefix}".rstrip("/"), container, prefix, account, endpoint)


def _account_at(uri: str, host: str) -> tuple[str, str]:
    """The account and the endpoint that the part of an address behind the ``@`` means."""
    if _ACCOUNT.fullmatch(host):
        return host, f"https://{host}.blob.core.windows.net"
    if found := _DOMAIN.fullmatch(host):
        return found[1], f"https://{found[1]}.blob.{found[2]}"
    if found := _ZONED.fullmatch(host):
        return found[1], f"https://{found[1]}.{found[2]}.blob.{found[3]}"
    raise UsageError(
        f"{uri!r} names no account of Azure: write container@account, or name another server in AZURE_STORAGE_ENDPOINT"
    )


class Signer:
    """What proves to a server who we are: here nothing does. Used by many threads."""

    how: str = "anonymous requests"
    """What people are told about it."""

    def query(self) -> str:
        """What is appended to the query of an address."""
        return ""

    def sign(self, method: str, url: str, headers: dict[str, str]) -> None:
        """Add to the headers of a request what it needs; the body is not looked at."""

    def renew(self) -> bool:
        """Forget what the server has refused; whether there is another now."""
        return False

    def ended(self) -> str:
        """When it ended, if it says so itself and has."""
        return ""

    def close(self) -> None:
        """Give back connections."""


class Key(Signer):
    """The key of an account, with which the policy of ``azure-storage-blob`` signs.

    ``said`` is the variable that it comes from.
    """

    how = "the account key"

    def __init__(self, policy: Any, said: str) -> None:
        self._policy = policy
        try:
            self.sign("GET", "https://account.blob.core.windows.net/", {})
        except Exception:  # the library's, of which no more is known, and whose text may hold the key
            raise UsageError(f"{said} has no account key: it is longer, and ends with ==") from None

    def sign(self, method: str, url: str, headers: dict[str, str]) -> None:
        """Sign method, address and headers."""
        from azure.core.pipeline import PipelineContext, PipelineRequest
        from azure.core.pipeline.transport import HttpRequest

        request = HttpRequest(method, url, headers)
        self._policy.on_request(PipelineRequest(request, PipelineContext(None)))
        headers["Authorization"] = request.headers["Authorization"]


class NamedKey(Signer):
    """The key of an ``AzureNamedKeyCredential``, whose owner may change it at any time."""

    how = Key.how

    def __init__(self, credential: Any, endpoint: str, uri: str) -> None:
        self._credential = credential
        self._endpoint = endpoint
        self._uri = uri
        self._made: tuple[Any, Key] | None = None

    def sign(self, method: str, url: str, headers: dict[str, str]) -> None:
        """Sign with the key as it is now."""
        named, made = self._credential.named_key, self._made
        if made is None or made[0] != named:
            self._made = made = (named, _key(self._uri, self._endpoint, *named))
        made[1].sign(method, url, headers)


class Sas(Signer):
    """A shared access signature: a part of the address that must not be shown.

    ``signature`` is one, or an ``AzureSasCredential``, which its owner may renew at any time.
    """

    how = "the shared access signature"

    def __init__(self, signature: Any) -> None:
        self._signature = signature

    def query(self) -> str:
        """The signature as it is now."""
        return str(getattr(self._signature, "signature", self._signature)).lstrip("?")

    def ended(self) -> str:
        """The time in its field ``se``, if that has passed."""
        text = dict(parse_qsl(self.query())).get("se", "")
        try:
            end = datetime.fromisoformat(text)
        except ValueError:
            return ""
        return text if end.replace(tzinfo=end.tzinfo or UTC) < datetime.now(UTC) else ""


class Token(Signer):
    """A token of Microsoft Entra ID, renewed before it ends, from a ``credential`` that has ``get_token``.

    Without one ``DefaultAzureCredential`` is asked.
    """

    how = "the identity"

    def __init__(self, credential: Any, where: str) -> None:
        self._own = credential is None
        self._credential = _default(where) if credential is None else credential
        self._where = where
        self._lock = threading.Lock()
        self._token: Any = None
        self._renewed = -math.inf

    def sign(self, method: str, url: str, headers: dict[str, str]) -> None:
        """Add the token."""
        headers["Authorization"] = f"Bearer {self._current()}"

    def _current(self) -> str:
        with self._lock:
            left = self._token.expires_on - time.time() if self._token else 0.0
            if left < _RENEWED:
                try:
                    self._token = self._asked()
                except AccessDenied:
                    if left <= 0:
                        raise
            token: str = self._token.token
            return token

    def _asked(self) -> Any:
        from azure.core.exceptions import AzureError

        try:
            return self._credential.get_token(SCOPE)
        except (AzureError, ValueError) as error:
            raise AccessDenied(
                f"no credentials for {self._where} ({_reason(str(error))}): set AZURE_STORAGE_CONNECTION_STRING,"
                " AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, or log in with az login"
            ) from error

    def renew(self) -> bool:
        """Ask for another token, since the server has refused this one."""
        with self._lock:
            if time.monotonic() - self._renewed < _JUST_NOW:
                return True  # by another thread, whose request was refused like this one
            refused, self._token = self._token, None
            try:
                self._token = self._asked()
            except AccessDenied:
                self._token = refused
            another = refused is not None and self._token.token != refused.token
            self._renewed = time.monotonic() if another else self._renewed
            return another

    def close(self) -> None:
        """Close what was opened here."""
        if self._own:
            self._credential.close()


@dataclass(frozen=True, slots=True)
class Account:
    """A server, and who we are there. ``endpoint`` ends without a slash."""

    endpoint: str
    signer: Signer

    def signed(
        self, method: str, path: str, query: str = "", headers: dict[str, str] | None = None
    ) -> tuple[str, dict[str, str]]:
        """The address and the headers of a request as they are to be sent now; ``path`` and ``query`` are quoted."""
        query = "&".join(filter(None, (query, self.signer.query())))
        url = f"{self.endpoint}{path}?{query}" if query else f"{self.endpoint}{path}"
        signed = {"x-ms-version": VERSION, "x-ms-date": formatdate(usegmt=True), **(headers or {})}
        self.signer.sign(method, url, signed)
        return url, signed


def account_of(address: Address, known: AzureAccount, credential: Any = None) -> Account:
    """The account that an address means, given what is known; nothing is asked for yet.

    ``credential``: an object of Azure's libraries that wins over what is known: one with ``get_token``, an
    ``AzureSasCredential`` or an ``AzureNamedKeyCredential``.
    """
    uri = address.uri
    if known.connection_string and credential is None and not known.anonymous:
        return _of_connection_string(address, known.connection_string)
    name = address.account or known.name
    secret = known.key or known.sas
    if address.account and known.name not in (None, address.account) and (secret or known.endpoint):
        raise UsageError(
            f"{uri} lies in the account {address.account}, but the environment is set for {known.name}: correct"
            " AZURE_STORAGE_ACCOUNT or the address"
        )
    endpoint = known.endpoint or address.endpoint or (name and f"https://{name}.blob.core.windows.net")
    if not endpoint:
        raise UsageError(
            f"{uri} does not say in which account it lies: set AZURE_STORAGE_ACCOUNT or"
            " AZURE_STORAGE_CONNECTION_STRING, or write az://container@account/folder"
        )
    endpoint = _checked(endpoint)
    if known.anonymous:
        return Account(endpoint, Signer())
    if credential is None and known.key:
        parts = urlsplit(endpoint)
        name = name or parts.path.strip("/") or (parts.hostname or "").partition(".")[0]
        return Account(endpoint, _key(uri, endpoint, name, known.key))
    if hasattr(credential, "named_key"):
        return Account(endpoint, NamedKey(credential, endpoint, uri))
    if hasattr(credential, "signature") or (credential is None and known.sas):
        return Account(endpoint, Sas(credential or known.sas))
    if not endpoint.startswith("https://"):
        raise UsageError(f"{uri} cannot be asked for: tokens only go over TLS, so correct AZURE_STORAGE_ENDPOINT")
    return Account(endpoint, Token(credential, uri))


def _checked(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.username
    except ValueError:
        good = None
    if not good:
        raise UsageError(
            "AZURE_STORAGE_ENDPOINT is not an address such as https://account.blob.core.windows.net: correct it"
        )
    return endpoint.rstrip("/")


def _of_connection_string(address: Address, text: str) -> Account:
    try:
        from azure.storage.blob import BlobServiceClient
    except ModuleNotFoundError as error:
        raise UsageError(f"{address.uri} needs azure-storage-blob: {INSTALL}") from error

    try:
        with BlobServiceClient.from_connection_string(text) as client:
            name, url, policy = client.account_name, client.primary_endpoint, client.credential
    except ValueError:  # its text, and what it comes from, may hold the key
        raise UsageError(
            f"{address.uri} cannot be asked for: AZURE_STORAGE_CONNECTION_STRING is not a connection string"
        ) from None
    if address.account and name and address.account != name:
        raise UsageError(
            f"{address.uri} lies in the account {address.account}, but AZURE_STORAGE_CONNECTION_STRING is of {name}:"
            " correct one of them"
        )
    url, _, sas = url.partition("?")
    if policy is None and not sas:
        raise UsageError(f"AZURE_STORAGE_CONNECTION_STRING has neither a key nor a signature for {address.uri}")
    return Account(_checked(url), Key(policy, "AZURE_STORAGE_CONNECTION_STRING") if policy is not None else Sas(sas))


def _key(uri: str, endpoint: str, name: str, key: str) -> Key:
    try:
        from azure.storage.blob import BlobServiceClient
    except ModuleNotFoundError as error:
        raise UsageError(f"{uri} needs azure-storage-blob: {INSTALL}") from error

    with BlobServiceClient(endpoint, credential={"account_name": name, "account_key": key}) as client:
        return Key(client.credential, "AZURE_STORAGE_KEY")


def _default(uri: str) -> Any:
    try:
        from azure.identity import DefaultAzureCredential
    except ModuleNotFoundError as error:
        raise UsageError(f"{uri} needs azure-identity: {INSTALL}") from error

    logger = logging.getLogger("azure.identity")
    if not logger.handlers:  # what it warns of is in its error, and Python would write it to the screen
        logger.addHandler(logging.NullHandler())
    return DefaultAzureCredential()


def _reason(text: str) -> str:
    """Of all that ``DefaultAzureCredential`` says: what was there and failed, or else its first sentence."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    tried = [line for line in lines if re.match(r"\w+Credential: ", line) and not _NOT_THERE.search(line)]
    return (tried or lines or ["it does not say why"])[0].rstrip(".:")[:300]
