"""An address becomes the right store, and nothing heavy is imported before it has to be."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import shardtool.stores
from shardtool.errors import NotFound, UsageError
from shardtool.stores import SCHEMES, open_store
from shardtool.stores.address import shown
from shardtool.stores.local.store import LocalStore
from shardtool.stores.memory import MemoryStore
from shardtool.stores.s3.store import S3Store


def test_a_path_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    for address in (tmp_path, str(tmp_path), f"{tmp_path}/"):
        with open_store(address) as store:
            assert isinstance(store, LocalStore)
            assert store.get("a", limit=1) == b"x"


def test_a_relative_path_stays_what_it_was_when_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    with open_store(".") as store:
        monkeypatch.chdir("/")
        assert store.exists("a")


def test_a_file_address_is_a_path_with_escapes(tmp_path: Path) -> None:
    folder = tmp_path / "my models"
    folder.mkdir()
    (folder / "a").write_bytes(b"x")
    for address in (folder.as_uri(), folder.as_uri().replace("file://", "FILE://localhost")):
        with open_store(address) as store:
            assert isinstance(store, LocalStore)
            assert store.exists("a")


@pytest.mark.parametrize("address", ["file://server/share", "file://", "file:///a?b", "file:///a#b"])
def test_a_file_address_of_another_machine_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="file:///"):
        open_store(address)


def test_a_path_object_is_always_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_store(Path("s3://bucket")), LocalStore)


def test_s3_and_memory_have_stores() -> None:
    with open_store("s3://bucket/folder/") as store:
        assert isinstance(store, S3Store)
        assert store.uri == "s3://bucket/folder"
    assert isinstance(open_store("memory://test_open"), MemoryStore)


def test_a_scheme_may_be_in_capitals() -> None:
    with open_store("S3://Bucket/Folder") as store:
        assert isinstance(store, S3Store)
        assert store.uri == "s3://Bucket/Folder"
    assert open_store("Memory://test_open") is open_store("memory://test_open")


@pytest.mark.parametrize("address", ["gopher://host/folder", "x://a"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(address: str) -> None:
    with pytest.raises(UsageError, match=r"a path or one of .*file://, .*s3://(?!.*memory)"):
        open_store(address)


def test_without_fsspec_an_unknown_scheme_says_how_to_get_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as caught:
        open_store("gopher://host")
    assert "fsspec" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UsageError, match=r"gopher://host.*pip install 'shardtool\[fsspec\]'"):
        open_store("gopher://host")


def test_every_scheme_has_something_that_opens_it() -> None:
    for scheme, opens in SCHEMES.items():
        if isinstance(opens, str):
            module, _, name = opens.partition(":")
            assert callable(getattr(importlib.import_module(module), name)), scheme


def test_an_empty_address_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        open_store("")


def test_a_registered_scheme_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "ram", "shardtool.stores.memory:MemoryStore")
    store = open_store("ram://anything")
    assert isinstance(store, MemoryStore)
    assert store.uri == "ram://anything"


def test_a_scheme_may_be_registered_with_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "ram", lambda uri: MemoryStore(uri))
    assert open_store("ram://anything").uri == "ram://anything"


def test_what_opens_no_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "ram", lambda uri: {})
    with pytest.raises(UsageError, match=r"ram://host/x is opened by what makes no stores.*dict"):
        open_store("ram://user:secret@host/x?token=1")


def test_a_store_is_its_own_address_and_stays_open() -> None:
    class Closing(MemoryStore):
        closed = False

        def close(self) -> None:
            self.closed = True

    mine = Closing()
    with open_store(mine) as store:
        store.put("a", b"x")
    assert mine.get("a", limit=1) == b"x"
    assert not mine.closed
    mine.close()
    assert mine.closed


# Plug-ins


def plug_in(folder: Path, name: str, points: str, code: str, patch: pytest.MonkeyPatch) -> None:
    """Install a package that brings schemes, in this test."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[shardtool.stores]\n{points}\n")
    (folder / f"{name}.py").write_text(code)
    patch.syspath_prepend(folder)
    patch.delitem(sys.modules, name, raising=False)


STORE = "from shardtool.stores.memory import MemoryStore\nclass Store(MemoryStore): ..."


def test_a_package_brings_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(tmp_path, "brings_hdfs", "hdfs = brings_hdfs:Store", STORE, monkeypatch)
    with open_store("HDFS://host/llama") as store:
        assert type(store).__module__ == "brings_hdfs"
        assert store.uri == "hdfs://host/llama"
    with pytest.raises(UsageError, match="hdfs://"):
        open_store("gopher://host")


def test_what_shardtool_brings_itself_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(tmp_path, "brings_s3", "s3 = brings_s3:Store", STORE, monkeypatch)
    with open_store("s3://bucket/x") as store:
        assert isinstance(store, S3Store)


@pytest.mark.parametrize(
    ("point", "code", "says"),
    [
        ("broken", "import there_is_no_such_module", "cannot be loaded: ModuleNotFoundError.*there_is_no_such_module"),
        ("broken:missing", "", "cannot be loaded: AttributeError"),
        ("broken:thing", "thing = 1", "cannot be called"),
        ("broken:thing", "def thing(uri): return 1", "makes no stores"),
    ],
)
def test_a_broken_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, code: str, says: str
) -> None:
    plug_in(tmp_path, "broken", f"odd = {point}", code, monkeypatch)
    with pytest.raises(UsageError, match=says) as caught:
        open_store("odd://host/x")
    assert "broken" in str(caught.value) or "odd://" in str(caught.value)


def test_two_packages_with_one_scheme_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one_hdfs", "other_hdfs"):
        plug_in(tmp_path / name, name, f"hdfs = {name}:Store", STORE, monkeypatch)
    with pytest.raises(UsageError, match=r"one_hdfs .* and other_hdfs .*uninstall all but one"):
        open_store("hdfs://host/x")


# Addresses as people see them


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("./llama", "./llama"),
        ("a@b/c?d", "a@b/c?d"),
        ("file:///a/b", "file:///a/b"),
        ("s3://bucket/llama", "s3://bucket/llama"),
        ("redis://user:pass@host:6379/name", "redis://host:6379/name"),
        ("redis://:p@ss@host/name", "redis://host/name"),
        ("https://host/a?X-Amz-Signature=secret", "https://host/a"),
        ("https://token@host/a#b", "https://host/a"),
        ("https://host/a@b", "https://host/a@b"),
        ("az://container/x?sv=1&sig=secret", "az://container/x"),
        ("az://container@account/x", "az://container@account/x"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("https://[::1]:80/a@b", "https://[::1]:80/a@b"),
        # passwords that nobody has quoted
        ("redis://user:pa/ss@host/name", "redis://host/name"),
        ("redis://user:pa?ss@host/name", "redis://host/name"),
        ("sftp://user:pa#ss@host/name", "sftp://host/name"),
    ],
)
def test_an_address_is_shown_without_secrets(address: str, seen: str) -> None:
    assert shown(address) == seen


@pytest.mark.parametrize(
    "address",
    [
        "s3://key:SECRET@bucket/x",
        "gs://key:SECRET@bucket/x",
        "hf://user:SECRET@org/name/x",
        "az://container?sv=1&sig=SECRET",
        "az://container/x?sv=1&sig=SECRET",
        "abfss://container@account.dfs.core.windows.net/x?sig=SECRET",
        "sftp://user:SECRET/SECRET@host:bad/x",
    ],
)
def test_an_address_that_is_refused_is_shown_without_secrets(address: str) -> None:
    with pytest.raises(UsageError, match=address.partition("://")[0]) as refused:
        open_store(address)
    assert "SECRET" not in str(refused.value)


def test_opening_looks_nothing_up(tmp_path: Path) -> None:
    with open_store(tmp_path / "missing") as store, pytest.raises(NotFound, match="missing"):
        store.list()


def test_public_names_are_sorted() -> None:
    assert shardtool.stores.__all__ == sorted(shardtool.stores.__all__)
    assert all(hasattr(shardtool.stores, name) for name in shardtool.stores.__all__)


@pytest.mark.parametrize(
    "statement",
    [
        "import shardtool.stores.s3.store, shardtool.stores.s3.errors",
        "from shardtool.stores import open_store; open_store('.'); open_store('memory://x')",
    ],
)
def test_importing_and_opening_a_folder_loads_no_heavy_library(statement: str) -> None:
    heavy = "{'boto3', 'botocore', 'urllib3', 'numpy', 'torch', 'pytest'}"
    code = f"{statement}; import sys; print(*sorted({heavy} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []
