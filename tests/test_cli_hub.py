"""The command line on models of the hub: every command that reads takes them, by address or by id alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

import shardtool
from tests import builders
from tests.commands import Ended, apart, here
from tests.servers.hub import Hub


@pytest.fixture
def llama(work: Path, hub: Hub) -> str:
    """The id of a model on the hub; the current folder has no such folder."""
    hub.commit("llama", builders.contents(work / "llama"))
    return f"{hub.org}/llama"


def quiet(*words: str | Path) -> None:
    assert here(*words, "-q") == Ended(0, "", "")


# Addresses.


def test_every_command_reads_from_the_hub(hub: Hub, llama: str, work: Path) -> None:
    uri = f"hf://{llama}"
    quiet("save", uri, "--tp", "2", "-o", "tp2")
    quiet("verify", "tp2", "--against", uri)
    quiet("verify", uri, "--against", "llama")
    assert here("inspect", uri, "--json").json["architecture"] == "LlamaForCausalLM"
    loaded = here("load", uri, "--json").json
    assert loaded["tensors"] == here("load", "llama", "--json").json["tensors"]
    assert here("bench", uri, "--seconds", "0.2", "--json").json["trials"]

    hub.commit("shards", builders.contents(work / "tp2"))
    shards = f"hf://{hub.org}/shards"
    quiet("verify", shards, "--against", uri)
    quiet("reshard", shards, "--tp", "4", "-o", "tp4")
    quiet("merge", shards, "-o", "merged")
    assert here("load", shards, "--rank", "1", "--json").json["verified"] is True
    assert builders.whole_tensors(builders.contents(work / "merged")) == builders.whole_tensors(
        builders.contents(work / "llama")
    )
    name = next(path.name for path in (work / "llama").glob("*.safetensors"))
    assert shardtool.load(f"{uri}/{name}").keys() == shardtool.load(f"llama/{name}").keys()


def test_a_revision_is_what_is_read(hub: Hub, llama: str, work: Path) -> None:
    first = hub.about("llama")["refs"]["main"]
    hub.commit("llama", {"README.md": b"nothing else"})
    assert here("inspect", f"hf://{llama}").code == 3
    quiet("verify", f"hf://{llama}@{first}", "--against", "llama")


def test_the_hub_is_not_written_to(llama: str, work: Path) -> None:
    ended = here("save", "llama", "--tp", "2", "-o", f"hf://{llama}")
    assert (ended.code, ended.out) == (2, "")
    assert f"hf://{llama} is only read: choose a folder or a bucket" in ended.err


def test_processes_of_their_own_find_the_hub_by_the_environment(llama: str, work: Path) -> None:
    ended = apart("save", f"hf://{llama}", "--tp", "2", "-o", "tp2", "-q")
    assert ended == Ended(0, "", "")
    quiet("verify", "tp2", "--against", "llama")


def test_offline_commands_read_the_cache(llama: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    huggingface_hub.snapshot_download(llama, endpoint=constants.ENDPOINT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    quiet("save", f"hf://{llama}", "--tp", "2", "-o", "tp2")
    quiet("verify", "tp2", "--against", llama)


# Ids.


def test_an_id_is_taken_for_a_model_of_the_hub_where_there_is_no_such_path(llama: str, work: Path) -> None:
    note = f"note: {llama} does not exist here: taken for the model hf://{llama}\n"
    ended = here("save", llama, "--tp", "2", "-o", "tp2")
    assert (ended.code, ended.err) == (0, note)
    ended = here("verify", "tp2", "--against", llama)
    assert (ended.code, ended.err) == (0, note)
    for command in (("inspect", llama), ("load", llama, "--json"), ("pull", llama, "beside")):
        ended = here(*command)
        assert (ended.code, ended.err.splitlines(keepends=True)[0]) == (0, note), command
    quiet("verify", "tp2", "--against", f"{llama}@main")
    assert shardtool.load(llama).keys() == shardtool.load("llama").keys()
    name = next(path.name for path in (work / "llama").glob("*.safetensors"))
    assert shardtool.load(f"{llama}/{name}").keys() == shardtool.load(f"llama/{name}").keys()
    assert here("inspect", f"{llama}/{name}").err == f"note: {llama}/{name}{note.removeprefix(f'note: {llama}')}"


def test_a_path_that_is_there_is_that_path(hub: Hub, llama: str, work: Path) -> None:
    os.renames("llama", llama)
    before = len(hub.asked())
    ended = here("inspect", llama)
    assert (ended.code, ended.err) == (0, "")
    assert len(hub.asked()) == before


def test_a_path_that_was_mistyped_does_not_go_to_the_hub(hub: Hub, llama: str, work: Path) -> None:
    """Whoever has the folder means it."""
    Path(hub.org).mkdir()
    before = len(hub.asked())
    for command in (("inspect", llama), ("load", llama), ("save", llama, "--tp", "2", "-o", "x"), ("pull", llama, "x")):
        assert here(*command) == Ended(
            3,
            "",
            f"shardtool: error: {llama} does not exist in the folder {hub.org}; if a model of the hub is meant, write"
            f" hf://{llama}\n",
        )
    assert len(hub.asked()) == before


@pytest.mark.parametrize(
    "path", ["nowhere", "./no/where", "/no/where", "../no/where", "~no/where", "a/b/c", "no/where/", "no/x.safetensors"]
)
def test_what_can_only_be_a_path_is_one(hub: Hub, work: Path, path: str) -> None:
    ended = here("inspect", path)
    there = {"no/x.safetensors": "no"}.get(path, path)
    assert (ended.code, ended.err) == (3, f"shardtool: error: the folder {there} does not exist\n")
    assert not hub.asked()


def test_an_output_is_never_a_model_of_the_hub(llama: str, work: Path) -> None:
    quiet("save", "llama", "--tp", "2", "-o", llama)
    assert (work / llama / "shardtool.json").exists()


def test_an_id_that_is_nowhere_is_told_of_both_ways(hub: Hub, work: Path) -> None:
    ended = here("inspect", f"{hub.org}/none", "--json")
    assert (ended.code, ended.json["error"]["kind"]) == (3, "NotFound")
    message = ended.json["error"]["message"]
    assert message.startswith(f"{hub.org}/none does not exist here, and as a model of the hub: ")
    assert "or it is private" in message


def test_an_id_that_is_not_in_the_cache_is_told_of_without_a_network(work: Path) -> None:
    assert constants.HF_HUB_OFFLINE
    ended = here("load", "no/where", "-q")
    assert (ended.code, ended.out) == (3, "")
    assert "no/where does not exist here, and as a model of the hub: " in ended.err
    assert "HF_HUB_OFFLINE is set" in ended.err


# pull.


def test_pull_tells_what_it_brought(llama: str, work: Path) -> None:
    ended = here("pull", f"hf://{llama}", "beside", "--ignore", "README*")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    brought = sorted(path.name for path in (work / "beside").iterdir() if path.name != ".shardtool")
    assert [line.split()[0] for line in lines[:-1]] == brought
    assert {"config.json", "tokenizer.json"} <= set(brought)
    assert not [name for name in brought if "safetensors" in name]
    assert lines[-1].startswith(f"beside: {len(brought)} files brought (")
    assert f", from hf://{llama} in " in lines[-1]
    again = here("pull", f"hf://{llama}", "beside", "--ignore", "README*").out
    assert again.startswith(f"beside: 0 files brought (0 B), {len(brought)} there already, from hf://{llama} in ")


def test_pull_takes_patterns_and_prints_json(shards: Path) -> None:
    found = here("pull", "tp2", "some", "--allow", "*.json", "--allow", "model-rank-0*", "--no-manifest", "--json").json
    keys = {file["key"] for file in found["files"]}
    assert {"config.json", "model-rank-0-part-0.safetensors"} <= keys
    assert not {"shardtool.json", "model-rank-1-part-0.safetensors"} & keys
    assert found["bytes"] == sum(file["size"] for file in found["files"])
    assert (found["command"], found["folder"], found["waited"]) == ("pull", "some", False)
    quiet("pull", "tp2", "some", "--allow", "*.json")


def test_what_was_pulled_serves_transformers(llama: str, work: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    quiet("pull", f"hf://{llama}", "beside")
    assert AutoConfig.from_pretrained("beside").architectures == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained("beside").vocab_size
