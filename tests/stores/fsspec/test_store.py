"""Whatever fsspec knows is a store: SFTP for real, and small file systems for what SFTP has not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from shardtool.errors import AccessDenied, AlreadyExists, NotFound, StoreError, Unavailable, UsageError
from shardtool.stores import open_store
from shardtool.stores.base import Store, Writer
from shardtool.stores.fsspec import store as remote_fs
from shardtool.stores.fsspec.store import RemoteStore
from shardtool.stores.wire.retry import Again
from shardtool.testing import StoreContract
from tests.servers.process import free_port
from tests.servers.sftp import SftpServer


class Far(RemoteStore):
    """A store that takes its time to look."""

    def exists(self, key: str) -> bool:
        found = super().exists(key)
        time.sleep(0.01)
        return found


class TestSftp(StoreContract):
    """Every law holds on an SFTP server but those for writers and readers that meet: rclone's renames in two steps."""

    gaps = frozenset({"exclusive race", "one version"})
    large = (5 << 20) + 5

    @pytest.fixture
    def store(self, sftp: str) -> Iterator[RemoteStore]:
        with Far(sftp) as store:
            yield store

    def abandon(self, store: Store, key: str) -> Writer:
        """With the process goes its connection."""
        writer = super().abandon(store, key)
        store._drop(writer._line)  # type: ignore[attr-defined]
        return writer


class TestFolder(StoreContract):
    """A file system that renames."""

    gaps = frozenset({"exclusive race"})

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[RemoteStore]:
        with Far(f"local://{tmp_path}/llama") as store:
            yield store


@pytest.fixture
def rigid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty folder, in a file system that can neither rename nor copy."""
    for name in ("mv", "cp_file"):
        monkeypatch.setattr(LocalFileSystem, name, getattr(AbstractFileSystem, name))
    return f"local://{tmp_path}/llama"


class TestWhereNothingIsRenamed(StoreContract):
    """Objects are held in memory and written in one go, so that a killed writer leaves nothing."""

    gaps = frozenset({"exclusive race", "one version", "unfinished"})

    @pytest.fixture
    def store(self, rigid: str) -> Iterator[RemoteStore]:
        with Far(rigid) as store:
            yield store


def test_what_is_held_is_planned(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert RemoteStore(f"local://{tmp_path}").held(5 << 20) == 0
    assert RemoteStore(request.getfixturevalue("rigid")).held(5 << 20) == 5 << 20


def test_sftp_is_opened_by_its_address_and_tells_nobody_the_password(sftp: str) -> None:
    with open_store(sftp) as store:
        assert isinstance(store, RemoteStore)
        assert "secret" not in store.uri + store.locate("a") + store.place()
        with pytest.raises(NotFound, match=r"^sftp://127\.0\.0\.1:\d+/test-.*/llama/missing\.bin does not exist$"):
            store.stat("missing.bin")


@pytest.mark.parametrize(("user", "password"), [("user", "wrong"), ("nobody", "secret")])
def test_wrong_credentials_are_access_denied(sftp_server: SftpServer, sftp: str, user: str, password: str) -> None:
    with pytest.raises(AccessDenied, match="sftp://127") as caught:
        RemoteStore(sftp_server.uri("x", user=user, password=password))
    assert "wrong" not in str(caught.value)


def test_a_server_that_is_not_known_is_refused(sftp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match=r"is not known.*known_hosts"):
        RemoteStore(sftp)


def test_a_server_with_another_key_is_refused(
    sftp: str, sftp_server: SftpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = paramiko.ECDSAKey.generate()
    (tmp_path / ".ssh").mkdir()
    line = f"[127.0.0.1]:{sftp_server.port} {key.get_name()} {key.get_base64()}\n"
    (tmp_path / ".ssh" / "known_hosts").write_text(line)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match="another key"):
        RemoteStore(sftp)


def test_a_connection_that_broke_is_made_again(sftp: str) -> None:
    with RemoteStore(sftp, again=Again(backoff=0.01)) as store:
        store.put("a", b"abc")
        for line in store._lines:
            line.fs.client.close()
        assert store.get("a", limit=3) == b"abc"


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="sftp://127"):
        RemoteStore(f"sftp://user:secret@127.0.0.1:{free_port()}/x")


def test_links_to_files_are_objects(sftp: str, sftp_server: SftpServer) -> None:
    with RemoteStore(sftp) as store:
        store.put("real/a", b"x")
    folder = sftp_server.folder / sftp.rpartition(str(sftp_server.port))[2].strip("/")
    assert (folder / "real" / "a").read_bytes() == b"x"
    with RemoteStore(f"local://{folder}") as store:
        (folder / "alias").symlink_to("real/a")
        (folder / "loop").symlink_to(".")
        assert [found.key for found in store.list()] == ["alias", "real/a"]
        assert store.get("alias", limit=1) == b"x"


@pytest.mark.parametrize(("missing", "says"), [("paramiko", r"shardtool\[sftp\]"), ("fsspec", r"shardtool\[fsspec\]")])
def test_a_missing_library_is_named(missing: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=says):
        open_store("sftp://user:secret@127.0.0.1/x")


def test_a_file_system_with_a_library_that_is_missing_is_named() -> None:
    assert remote_fs.knows("hdfs")
    with pytest.raises(UsageError, match=r"^hdfs://host/x needs another library: .*pyarrow"):
        open_store("hdfs://host/x")


def test_an_end_is_an_end_though_the_connection_broke_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each library has errors of its own, and what was done is done."""

    def broken(*_: object) -> None:
        raise paramiko.SSHException("SSH session not active")

    with RemoteStore(f"local://{tmp_path}/llama") as store:
        store.put("a", b"x")
        monkeypatch.setattr(remote_fs._Line, "tidy", broken)


def on_disk(server: SftpServer, address: str) -> Path:
    """The folder that an address means."""
    return server.folder / address.rpartition(str(server.port))[2].strip("/")


@pytest.mark.parametrize(("exclusive", "told"), [(True, AlreadyExists), (False, StoreError)])
def test_who_was_renamed_and_replaced_at_once_leaves_what_is_there(
    sftp: str, sftp_server: SftpServer, exclusive: bool, told: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a rename has several steps, one may fail though it was done, and the server goes on to list the old name.

    To rename it once more would remove the object of the writer that was faster, and then fail.
    """
    renamed: list[str] = []

    def move(line: remote_fs._Line, old: str, new: str) -> None:
        renamed.append(new)
        (temporary,) = (on_disk(sftp_server, sftp) / ".shardtool" / "tmp").iterdir()
        temporary.unlink()
        assert line.fs.exists(old)  # so much for asking
        monkeypatch.undo()
        monkeypatch.setenv("HOME", str(sftp_server.home))
        with RemoteStore(sftp) as other:
            other.put("a", b"theirs")
        raise OSError("rename: no such file or directory")

    with RemoteStore(sftp) as store:
        writer = store.create("a", 4, exclusive=exclusive)
        writer.write(0, b"mine")
        monkeypatch.setattr(remote_fs._Line, "move", move)
        with pytest.raises(told, match="exists already" if exclusive else "removed meanwhile: write it again"):
            writer.commit()
        writer.abort()
        assert len(renamed) == 1
        assert store.get("a", limit=10) == b"theirs"


def test_a_rename_that_failed_is_tried_again_while_there_is_something_to_rename(
    sftp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0 bytes too, of which none can be read."""
    real, failures = remote_fs._Line.move, [2]

    def move(line: remote_fs._Line, old: str, new: str) -> None:
        if failures[0]:
            failures[0] -= 1
            raise OSError("rename: no such file or directory")
        real(line, old, new)

    monkeypatch.setattr(remote_fs._Line, "move", move)
    with RemoteStore(sftp) as store:
        for data in (b"mine", b""):
            failures[0] = 2
            store.put("a", data)
            assert failures == [0]
            assert store.get("a", limit=4) == data
