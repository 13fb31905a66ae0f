"""The command line where storage is concerned: what is left over, limits of bandwidth, addresses with secrets."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests import builders
from tests.commands import apart, documented, here

FILES = builders.model(builders.config(), builders.tensors(builders.config()), files=2)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return builders.put(tmp_path / "llama", FILES)


@pytest.fixture
def begun(llama: str, tmp_path: Path) -> Path:
    """An output with the shards of one rank of two, of two days ago."""
    out = tmp_path / "out"
    assert here("save", llama, "--tp", 2, "--ranks", "0", "-o", out).code == 0
    for path in (out / ".shardtool").rglob("*.json"):
        said = json.loads(path.read_text())
        path.write_text(json.dumps({**said, "at": time.time() - 2 * 86400}))
    return out


def test_clean_lists_what_is_left_over(begun: Path, llama: str) -> None:
    ended = here("clean", begun)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].split()[:2] == ["shard", "model-rank-0-part-0.safetensors"]
    assert lines[0].endswith("2 d")
    assert lines[-2] == f"{begun}: left by a job that was writing tp 2 shards of {llama}"
    assert lines[-1].startswith(f"{begun}: 3 things to remove (")
    assert lines[-1].endswith("say --yes")


def test_clean_removes_it_when_it_is_told_to(begun: Path) -> None:
    young = here("clean", begun, "--yes", "--older-than", "3d")
    assert young.out.splitlines()[-1] == f"{begun}: 3 things may be in use: see --older-than"
    ended = here("clean", begun, "--yes")
    assert ended.out.splitlines()[-1].startswith(f"{begun}: 3 things removed (")
    assert builders.contents(begun) == {}
    assert here("clean", begun).out == f"{begun}: nothing is left over\n"
    assert here("clean", begun, "--quiet").out == ""


def test_clean_says_it_as_json(begun: Path) -> None:
    said = here("clean", begun, "--json").json
    assert (said["command"], said["uri"], said["complete"]) == ("clean", str(begun), False)
    assert [one["kind"] for one in said["found"]] == ["shard", "record", "record"]
    assert all(one["old"] and not one["removed"] for one in said["found"])
    assert set(said) == documented("clean")
    assert documented("clean", inner="found") == set(said["found"][0])


def test_clean_tells_of_a_record_that_it_cannot_read(begun: Path) -> None:
    for path in (begun / ".shardtool").rglob("*.json"):
        path.write_text("")
    ended = here("clean", begun)
    assert ended.code == 0
    assert ended.err.startswith("note: ")
    assert "json is cut short or damaged: it is not JSON: nothing tells the age of its job" in ended.err
    assert here("clean", begun, "--json").json["notes"][0] in ended.err


def test_a_save_that_a_damaged_record_keeps_from_its_end_says_why(begun: Path, llama: str) -> None:
    (record,) = (begun / ".shardtool").rglob("model-rank-0-part-0.safetensors.json")
    record.write_text("{")
    ended = here("save", llama, "--tp", 2, "--ranks", "1", "-o", begun)
    assert ended.code == 4
    assert ended.err.startswith(f"shardtool: error: {record} is cut short or damaged: it is not JSON, so that nothing")
    assert here("save", llama, "--tp", 2, "--ranks", "0", "-o", begun).code == 0
    assert here("verify", begun, "--against", llama).code == 0


def test_pull_says_it_as_json(llama: str, tmp_path: Path) -> None:
    said = here("pull", llama, tmp_path / "side", "--json").json
    assert set(said) == documented("pull")
    assert documented("pull", inner="files") == set(said["files"][0])
    assert (said["folder"], said["waited"]) == (str(tmp_path / "side"), False)
    assert said["bytes"] == sum(file["size"] for file in said["files"] if file["brought"]) > 0


def test_clean_of_what_is_not_there_says_so(tmp_path: Path) -> None:
    ended = here("clean", tmp_path / "missing")
    assert ended.code == 3
    assert "missing does not exist" in ended.err


def test_a_time_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    ended = here("clean", tmp_path, "--older-than", "soon")
    assert ended.code == 2
    assert "--older-than 'soon' is not a time" in ended.err


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_bwlimit_makes_a_command_slower(llama: str, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 100 KB at 200 KB per second takes half a second, at least to read."""
    size = sum(path.stat().st_size for path in Path(llama).glob("*.safetensors"))
    rate = 2 * size
    flags = ["--bwlimit", str(rate)] if by == "flag" else []
    if by == "variable":
        monkeypatch.setenv("SHARDTOOL_BWLIMIT", f"{rate}B/s")
    began = time.monotonic()
    ended = here("save", llama, "--tp", 2, "-o", tmp_path / "out", *flags)
    assert ended.code == 0, ended.err
    assert time.monotonic() - began > 0.4
    monkeypatch.delenv("SHARDTOOL_BWLIMIT", raising=False)
    began = time.monotonic()
    assert here("verify", tmp_path / "out", "--against", llama).code == 0
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("value", ["fast", "1", "0"])
def test_a_bwlimit_that_makes_no_sense_is_refused(llama: str, tmp_path: Path, value: str) -> None:
    ended = here("verify", llama, "--bwlimit", value)
    assert ended.code == 2
    assert ended.err.startswith(
        f"shardtool: error: --bwlimit {value!r}" if value == "fast" else "shardtool: error: --bwlimit"
    )


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("s3:/bucket/llama", "s3://bucket/llama"),
        ("s3:bucket", "s3://bucket"),
        ("GS:/bucket/llama", "gs://bucket/llama"),
        ("file:/models/llama", "file:///models/llama"),
        ("redis:/user:hunter2@host/llama", "redis://host/llama"),
        ("https:/host/llama?sig=hunter2", "https://host/llama"),
    ],
)
def test_an_address_that_lost_a_slash_is_no_folder(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, address: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = builders.contents(tmp_path)
    for words in (("verify", path), ("save", llama, "--tp", 2, "-o", path), ("verify", llama, "--against", path)):
        ended = here(*words)
        assert (ended.code, ended.out) == (2, "")
        assert f"this is a path and no address: write {address}, or put ./ before it" in ended.err
        assert "hunter2" not in ended.err
    assert builders.contents(tmp_path) == before


@pytest.mark.parametrize("path", ["./s3:/out", "s3:/out", "s3.d:out"])
def test_a_folder_may_be_called_like_a_scheme(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if path == "s3:/out":
        (tmp_path / path).mkdir(parents=True)  # what is there is meant
    ended = here("save", llama, "--tp", 2, "-o", path)
    assert (ended.code, ended.err) == (0, "")
    assert here("verify", path, "--quiet").code == 0


def test_secrets_where_no_address_fits_are_not_shown_either(llama: str, tmp_path: Path) -> None:
    address = "https://user:hunter2@127.0.0.1:9/x.json?sig=hunter2"
    for words in (
        ("trace", llama, "--tp", 2, "-o", address),
        ("trace", llama, "--tp", 2, "--compare", address),
        ("save", llama, "--tp", 2, "--layout", address, "-o", tmp_path / "out"),
        ("pull", llama, address),
        ("inspect", "memory://user:hunter2@x"),
    ):
        ended = here(*words)
        assert ended.code == 2
        assert "hunter2" not in ended.out + ended.err, words


def test_secrets_in_an_address_are_not_shown(tmp_path: Path) -> None:
    for address in ("sftp://user:hunter2@127.0.0.1:9/x?token=hunter2", "gopher://user:hunter2@host/x?sig=hunter2"):
        for command in (["verify", address], ["clean", address], ["save", "x", "--tp", "2", "-o", address]):
            ended = apart(*command)
            assert ended.code
            assert "hunter2" not in ended.out + ended.err, command
