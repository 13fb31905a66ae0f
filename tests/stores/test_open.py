"""An address becomes the right store, and nothing heavy is imported before it has to be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shardtool.stores
from shardtool.errors import NotFound, UsageError
from shardtool.stores import SCHEMES, open_store
from shardtool.stores.local import LocalStore
from shardtool.stores.memory import MemoryStore
from shardtool.stores.s3 import S3Store


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


@pytest.mark.parametrize("address", ["gs://bucket/folder", "https://host/x", "hf://a/b"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(address: str) -> None:
    with pytest.raises(UsageError, match=r"a path or one of file://, s3://$"):
        open_store(address)


def test_an_empty_address_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        open_store("")


def test_a_registered_scheme_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "ram", "shardtool.stores.memory:MemoryStore")
    store = open_store("ram://anything")
    assert isinstance(store, MemoryStore)
    assert store.uri == "ram://anything"


def test_opening_looks_nothing_up(tmp_path: Path) -> None:
    with open_store(tmp_path / "missing") as store, pytest.raises(NotFound, match="missing"):
        store.list()


def test_public_names_are_sorted() -> None:
    assert shardtool.stores.__all__ == sorted(shardtool.stores.__all__)
    assert all(hasattr(shardtool.stores, name) for name in shardtool.stores.__all__)


@pytest.mark.parametrize(
    "statement",
    [
        "import shardtool.stores.s3, shardtool.stores.s3_errors",
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
