"""What is there already may be named by the id of a model of the hub; a path that is there always wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardtool.errors import NotFound
from shardtool.stores.bandwidth import LimitedStore, limited
from shardtool.stores.hub.existing import hub_id, open_existing
from shardtool.stores.hub.store import HubStore
from shardtool.stores.local.store import LocalStore
from shardtool.stores.memory import MemoryStore


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["org/name", "meta-llama/Llama-3.1-8B", "org/name@main", "o_1/n.a-b_c@v1.0"])
def test_an_id_names_a_model(text: str) -> None:
    assert hub_id(text) == f"hf://{text}"
    with open_existing(text) as store:
        assert isinstance(store, HubStore)
        assert store.uri == f"hf://{text}"


def test_a_limit_holds_for_it_too() -> None:
    with limited(1 << 20), open_existing("org/name") as store:
        assert isinstance(store, LimitedStore)


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "name", "/org/name", "./org/name", "../name", "~/name", "org/", "org/name/", "org/name/more"),
        *("org/.name", "org/name.", "-org/name", "org/na me", "org\\name", "org/na..me", "org/na--me", "org/näme"),
        *("org/model.safetensors", "org/model.bin", "s3://org/name", "hf://org/name", "org/name@a@b", "org/name@"),
    ],
)
def test_all_else_does_not(text: str) -> None:
    assert hub_id(text) is None


def test_a_path_that_is_there_is_no_id(here: Path) -> None:
    (here / "org" / "name").mkdir(parents=True)
    (here / "org" / "link").symlink_to(here / "nowhere")
    assert hub_id("org/name") is None
    assert hub_id("org/link") is None
    with open_existing("org/name") as store:
        assert isinstance(store, LocalStore)


def test_a_path_whose_folder_is_there_is_mistyped(here: Path) -> None:
    (here / "org").mkdir()
    with pytest.raises(NotFound, match=r"org/nmae does not exist in the folder org; .* write hf://org/nmae"):
        hub_id("org/nmae")


def test_what_is_no_text_is_no_id(here: Path) -> None:
    """A path object means a path."""
    store = MemoryStore()
    assert hub_id(Path("org/name")) is None
    assert hub_id(store) is None
    store.put("a", b"x")
    with open_existing(store) as opened:
        assert opened.exists("a")
