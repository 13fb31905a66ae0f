"""Who asks Google Cloud Storage, and where it is: the settings of Google's libraries, and tokens that are renewed.

::

    credentials   GOOGLE_APPLICATION_CREDENTIALS, gcloud's login, the account of the machine: google.auth.default()
                  none of these: nobody, which suffices for buckets that are open to all
    endpoint      as given, STORAGE_EMULATOR_HOST (asked as nobody), API_ENDPOINT_OVERRIDE, storage.googleapis.com
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from shardtool.errors import ShardtoolError, StoreError, UsageError
from shardtool.stores import accounts
from shardtool.stores.gcs.errors import translated

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_NOT_FOUND = "Your default credentials were not found"


class Account:
    """Credentials and a client of Google's library. ``emulator``: nobody knows which conditions such a server keeps."""

    def __init__(self, where: str, *, endpoint: str | None = None, credentials: Any = None) -> None:
        try:
            from google.auth.credentials import AnonymousCredentials, with_scopes_if_required
            from google.auth.transport.requests import AuthorizedSession, Request
            from google.cloud import storage
            from requests import Session
            from requests.adapters import HTTPAdapter
        except ModuleNotFoundError as error:
            raise UsageError(f"{where} needs Google's library: pip install 'shardtool[gcs]'") from error

        said = None if endpoint else accounts.gcs_emulator()
        self.emulator = said is not None
        if said and "://" not in said:
            said = f"http://{said}"
        endpoint = endpoint or said
        try:
            if credentials is None and not self.emulator:
                credentials = _default(storage.Client.SCOPE)
            if credentials is None:
                credentials = AnonymousCredentials()  # type: ignore[no-untyped-call]
            credentials = with_scopes_if_required(  # type: ignore[no-untyped-call]
                credentials, storage.Client.SCOPE
            )
            self.anonymous = isinstance(credentials, AnonymousCredentials)
            self._renewing = Session()
            self._request = Request(self._renewing)
            asking = AuthorizedSession(  # type: ignore[no-untyped-call]
                credentials, () if self.anonymous else (401,), auth_request=self._request
            )
            for session in (self._renewing, asking):
                session.verify = accounts.ca_file() or True
                for scheme in ("https://", "http://"):
                    session.mount(scheme, HTTPAdapter(pool_maxsize=128))
            self.client = storage.Client(
                project=None,
                credentials=credentials,
                _http=asking,
                client_options={"api_endpoint": endpoint} if endpoint else None,
            )
        except Exception as error:
            raise translated(error, where) from error
        self.endpoint = str(self.client.api_endpoint).rstrip("/")
        parts = urlsplit(self.endpoint)
        if parts.scheme == "http" and not self.anonymous and parts.hostname not in _THIS_MACHINE:
            self.close()
            raise UsageError(
                f"credentials for {where} would go to {parts.hostname} in the open: give an https:// endpoint"
            )
        self._credentials = credentials
        self._lock = threading.Lock()

    def headers(self, method: str, url: str, where: str) -> dict[str, str]:
        """What proves who we are, renewed if it is about to end."""
        found: dict[str, str] = {}
        with self._lock:
            try:
                self._credentials.before_request(self._request, method, url, found)
            except Exception as error:
                raise self.error(error, where) from error
        return found

    def renew(self, refused: Mapping[str, str], where: str) -> bool:
        """After a 401 to ``refused`` headers: whether there are new ones now. Many threads renew them once."""
        if self.anonymous:
            return False
        with self._lock:
            now: dict[str, str] = {}
            try:
                self._credentials.apply(now)
                if now.get("authorization") == refused.get("authorization"):
                    self._credentials.refresh(self._request)
            except Exception as error:
                raise self.error(error, where) from error
        return True

    def error(self, error: Exception, where: str) -> ShardtoolError:
        """What an error of Google's libraries means."""
        return error if isinstance(error, ShardtoolError) else translated(error, where, anonymous=self.anonymous)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self._renewing.close()


def _default(scopes: tuple[str, ...]) -> Any:
    """The credentials that google-auth finds, or None. A file that is named but of no use is an error, not nobody."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    about_projects = logging.getLogger("google.auth._default")
    level = about_projects.level
    try:
        # It warns where no project is named: objects are reached without one.
        about_projects.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return google.auth.default(scopes=scopes)[0]
    except DefaultCredentialsError as error:
        if _NOT_FOUND in str(error):
            return None
        raise
    finally:
        about_projects.setLevel(level)


def expect_safe(url: str, endpoint: str, where: str) -> str:
    """The address of an upload, which is a secret, unless it would go over the network in the open."""
    if endpoint.startswith("https://") and not url.startswith("https://"):
        raise StoreError(f"the server of {where} wants bytes to be sent in the open: check the endpoint")
    return url
