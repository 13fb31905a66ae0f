"""A volume of a cluster is a folder where it is mounted, and nothing outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardtool.errors import NotFound, UsageError
from shardtool.stores import open_store
from shardtool.stores.pvc import PvcStore
from shardtool.testing import StoreContract


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the claim ``models`` is mounted."""
    monkeypatch.setenv("SHARDTOOL_PVC_ROOT", str(tmp_path / "volumes" / "{claim}"))
    mount = tmp_path / "volumes" / "models"
    mount.mkdir(parents=True)
    return mount


class TestPvcStore(StoreContract):
    """Every law holds on a volume."""

    @pytest.fixture
    def store(self, volume: Path) -> Iterator[PvcStore]:
        (volume / "llama").mkdir()
        with PvcStore("pvc://models/llama") as store:
            yield store


def test_a_path_is_below_the_mount(volume: Path) -> None:
    with open_store("PVC://models/org/llama/") as store:
        store.put("config.json", b"{}")
        assert (volume / "org" / "llama" / "config.json").read_bytes() == b"{}"
        assert store.locate("config.json") == "pvc://models/org/llama/config.json"
        assert store.place() == str(volume / "org" / "llama")


def test_a_claim_alone_is_its_whole_volume(volume: Path) -> None:
    (volume / "a").write_bytes(b"x")
    assert [found.key for found in open_store("pvc://models").list()] == ["a"]


def test_one_volume_for_all_claims_is_where_it_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDTOOL_PVC_ROOT", str(tmp_path))
    open_store("pvc://any-claim/llama").put("a", b"x")
    assert (tmp_path / "llama" / "a").exists()


def test_a_volume_that_is_not_mounted_is_named_and_not_made(volume: Path) -> None:
    store = open_store("pvc://other/llama")
    for call in (lambda: list(store.list()), lambda: store.stat("a"), lambda: store.put("a", b"x")):
        with pytest.raises(NotFound, match=r"volume other .* is not mounted at .*volumes/other.*SHARDTOOL_PVC_ROOT"):
            call()
    assert not (volume.parent / "other").exists()


@pytest.mark.parametrize(
    "address",
    ["pvc://", "pvc:///a", "pvc://models/../a", "pvc://../a", "pvc://models//a", "pvc://Models/a", "pvc://m/a?hf=b/c"],
)
def test_addresses_that_leave_the_volume_are_refused(address: str) -> None:
    with pytest.raises(UsageError, match="pvc://claim/path"):
        open_store(address)


def test_a_link_does_not_lead_out_of_the_volume(volume: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a").write_bytes(b"x")
    (volume / "out").symlink_to(tmp_path / "secret")
    store = open_store("pvc://models/out")
    for call in (lambda: list(store.list()), lambda: store.put("b", b"x")):
        with pytest.raises(UsageError, match="leaves its volume"):
            call()
