"""What fsspec and the libraries under it say is one sentence that names the address and what to do."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator

import pytest

from shardtool.errors import AccessDenied, NotFound, ShardtoolError, StoreError, Unavailable, UsageError
from shardtool.stores import open_store
from shardtool.stores.fsspec.errors import not_opened, translated
from tests.servers.process import free_port
from tests.servers.sftp import SftpServer

NOISE = re.compile(r"url_query|url_fragment|Errno|TypeError|unexpected keyword|secret|0x[0-9a-f]+|\n")


def said(address: str, kind: type[ShardtoolError]) -> str:
    """What is said of an address that cannot be opened."""
    with pytest.raises(kind) as caught:
        open_store(address)
    text = str(caught.value)
    assert not NOISE.search(text)
    return text


@pytest.fixture
def mute() -> Iterator[int]:
    """The port of a server that hangs up without a word."""

    def hang_up() -> None:
        while True:
            try:
                listening.accept()[0].close()
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=hang_up)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_query_of_an_sftp_address_is_refused(sftp: str, sftp_server: SftpServer) -> None:
    """A fragment too; fsspec gives both to an SSH library that knows neither. Without them the address is good."""
    shown = sftp.replace("user:secret@", "")
    for more in ("?mode=r", "#part", "?a=b#c"):
        assert said(sftp + more, UsageError) == (
            f"{shown} has a query or a fragment, which such addresses have not: leave out what follows ? or #"
        )
    with open_store(sftp) as store:
        assert list(store.list()) == []


def test_an_address_without_a_server_is_refused() -> None:
    assert said("sftp:///folder", UsageError) == "sftp:///folder names no server: write sftp://user@host/folder"


def test_a_server_that_is_not_there_is_named_with_its_port() -> None:
    port = free_port()
    assert said(f"sftp://user:secret@127.0.0.1:{port}/x", Unavailable) == (
        f"the server of sftp://127.0.0.1:{port}/x cannot be reached at 127.0.0.1:{port} (Connection refused): check"
        " that it runs, its address and the network"
    )


def test_a_name_that_does_not_resolve_is_named_with_the_port_of_its_kind() -> None:
    text = said("sftp://user:secret@nowhere.invalid/x", Unavailable)
    assert text.startswith("the server of sftp://nowhere.invalid/x cannot be reached at nowhere.invalid:22 (")


def test_a_server_that_hangs_up_has_broken_the_connection(mute: int) -> None:
    text = said(f"sftp://user:secret@127.0.0.1:{mute}/x", Unavailable)
    assert text.startswith(f"the connection to sftp://127.0.0.1:{mute}/x broke (")
    assert text.endswith("): try again")


def test_who_says_nothing_of_himself_is_asked_who_he_is(
    sftp: str, sftp_server: SftpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other try would help, so that it is not what is retried."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    text = said(sftp.replace(":secret", ""), AccessDenied)
    assert text.startswith(f"the server of {sftp.replace('user:secret@', '')} asks who you are: write sftp://user@host")


def test_a_server_that_is_not_in_the_address_is_named_as_it_was_asked() -> None:
    """WebHDFS and others ask over HTTP, whose library says much."""
    import requests

    with pytest.raises(requests.ConnectionError) as caught:
        requests.get(f"http://127.0.0.1:{(port := free_port())}/webhdfs/v1/x?op=LIST", timeout=5)
    error = translated(caught.value, "webhdfs://cluster/x")
    assert isinstance(error, Unavailable)
    assert str(error).startswith(
        f"the server of webhdfs://cluster/x cannot be reached at 127.0.0.1:{port} (Connection refused): check"
    )


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (FileNotFoundError("/home/x"), NotFound, "sftp://h/x does not exist"),
        (PermissionError(13, "Permission denied"), AccessDenied, "access to sftp://h/x is denied"),
        (ConnectionResetError(104, "Connection reset by peer"), Unavailable, "broke (Connection reset by peer): try"),
        (OSError("Socket is closed"), Unavailable, "the connection to sftp://h/x broke (Socket is closed): try again"),
        (EOFError(), Unavailable, "the connection to sftp://h/x broke (EOFError): try again"),
        (KeyError("size"), UsageError, "sftp://h/x cannot be opened by fsspec (KeyError: 'size')"),
        (RuntimeError("odd\nthing"), StoreError, "sftp://h/x failed (RuntimeError: odd thing)"),
    ],
)
def test_an_error_is_one_sentence(error: Exception, kind: type[ShardtoolError], says: str) -> None:
    found = not_opened(error, "sftp://h/x")
    assert isinstance(found, kind)
    assert says in str(found)
    assert "\n" not in str(found)
