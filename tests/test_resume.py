"""Runs that are killed: what they leave is whole, and the same command again ends where an undisturbed run does.

A child kills itself with SIGKILL at a chosen share of the bytes, before a chosen change of the file system or before a
chosen request (``tests.processes``), so that no test waits for a moment. Where it is said how much is left to do it has
one reader: of several each may be about to finish a file.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import shardtool
from shardtool import manifest
from shardtool.errors import Incomplete, PlanError
from shardtool.stores import open_store
from tests import builders
from tests.processes import At, finish, run, start

SAVE: Callable[..., Any] = shardtool.save  # the arguments come as a list

PART = 20_000
SHARDS = "*.safetensors"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 KB (``hf``), its shards at tp 2 in nine parts for each rank, and what follows of them."""
    made = tmp_path_factory.mktemp("resume")
    config = builders.config(num_hidden_layers=8, hidden_size=64, intermediate_size=96, vocab_size=128)
    builders.put(made / "hf", builders.model(config, builders.tensors(config), files=3))
    shardtool.save(made / "hf", made / "save", tp=2, max_part_size=PART)
    shardtool.reshard(made / "save", made / "reshard", tp=4, max_part_size=PART // 2)
    shardtool.merge(made / "save", made / "merge", max_part_size=2 * PART)
    assert len(list((made / "save").glob("model-rank-1-*"))) >= 8
    return made


def command(shelf: Path, operation: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The source and the options with which the undisturbed run of the same name was made."""
    options: dict[str, dict[str, Any]] = {
        "save": {"tp": 2, "max_part_size": PART},
        "reshard": {"tp": 4, "max_part_size": PART // 2, "verify": False},  # so that progress is that of writing
        "merge": {"max_part_size": 2 * PART, "verify": False},
    }
    return (shelf / ("hf" if operation == "save" else "save"),), options[operation]


def changes(shelf: Path, operation: str) -> int:
    """How often the undisturbed run of one reader changes the file system."""
    count = shelf / f"{operation}.changes"
    if not count.exists():
        args, options = command(shelf, operation)
        made = run(operation, *args, shelf / "counted", concurrency=1, **options)
        count.write_text(str(made.changes))
        shutil.rmtree(shelf / "counted")
    return int(count.read_text())


MARK = {"save": "shardtool.json", "reshard": "shardtool.json", "merge": "model.safetensors.index.json"}


def assert_nothing_is_half_written(out: Path, undisturbed: Path, mark: str) -> None:
    """No mark of completeness before the end, and every file that is visible is what it will be."""
    left, whole = builders.contents(out), builders.contents(undisturbed)
    visible = {key: data for key, data in left.items() if not key.startswith(".shardtool/")}
    assert visible.items() <= whole.items()
    if mark in visible:
        assert visible == whole
    elif left:
        with pytest.raises(Incomplete, match="run the same command again"):
            shardtool.inspect(out)


def assert_same_folder(out: Path, undisturbed: Path) -> None:
    """Byte for byte, with nothing left over."""
    found, wanted = builders.contents(out), builders.contents(undisturbed)
    assert found.keys() == wanted.keys()
    assert [key for key in found if found[key] != wanted[key]] == []


@pytest.mark.parametrize("operation", ["save", "reshard", "merge"])
def test_a_killed_run_is_finished_by_the_next(shelf: Path, tmp_path: Path, operation: str) -> None:
    """Killed after 60 % of the bytes: the second run writes at most half of them and leaves nothing behind."""
    args, options = command(shelf, operation)
    out = tmp_path / "out"
    assert run(operation, *args, out, kill=At(progress=0.6), concurrency=1, **options).killed
    assert_nothing_is_half_written(out, shelf / operation, MARK[operation])
    assert list(out.glob(SHARDS))
    again = run(operation, *args, out, **options)
    assert again.value["complete"]
    assert again.value["written"] + again.value["kept"] == again.value["bytes_to_write"]
    assert again.value["written"] <= again.value["bytes_to_write"] / 2
    assert_same_folder(out, shelf / operation)
    third = run(operation, *args, out, **options)
    assert (third.value["written"], third.value["complete"]) == (0, True)


@pytest.mark.parametrize("operation", ["save", "reshard", "merge"])
@pytest.mark.parametrize("seed", range(4))
def test_a_run_can_be_killed_anywhere(shelf: Path, tmp_path: Path, operation: str, seed: int) -> None:
    """Before any change of the file system: the first, those of the commit, the last, and again in the next run."""
    args, options = command(shelf, operation)
    total = changes(shelf, operation)
    out = tmp_path / "out"
    chosen = random.Random(seed)
    at = {0: 1, 1: total}.get(seed, chosen.randint(2, total))
    assert run(operation, *args, out, kill=At(change=at), concurrency=1, **options).killed, at
    assert_nothing_is_half_written(out, shelf / operation, MARK[operation])
    second = run(operation, *args, out, kill=At(change=chosen.randint(1, total // 2)), **options)
    assert_nothing_is_half_written(out, shelf / operation, MARK[operation])
    if second.killed:
        assert getattr(shardtool, operation)(*args, out, **options).complete
    assert_same_folder(out, shelf / operation)


@pytest.mark.parametrize("from_the_end", range(1, 40, 4))
def test_a_commit_can_be_killed_anywhere(shelf: Path, tmp_path: Path, from_the_end: int) -> None:
    """The manifest, the side files and the removal of the records: every fourth change from the end backwards."""
    args, options = command(shelf, "save")
    out = tmp_path / "out"
    at = At(change=changes(shelf, "save") - from_the_end)
    assert run("save", *args, out, kill=at, concurrency=1, **options).killed
    assert_nothing_is_half_written(out, shelf / "save", MARK["save"])
    assert SAVE(*args, out, **options).complete
    assert_same_folder(out, shelf / "save")


def test_what_a_killed_run_left_is_swept(shelf: Path, tmp_path: Path) -> None:
    """Temporary files are there after the kill, hidden from every listing, and gone after the next run."""
    args, options = command(shelf, "save")
    out = tmp_path / "out"
    assert run("save", *args, out, kill=At(progress=0.3), **options).killed
    assert list((out / ".shardtool" / "tmp").iterdir())
    assert not [found for found in open_store(out).list() if "/tmp/" in found.key]
    run("save", *args, out, **options)
    assert not (out / ".shardtool").exists()


def test_workers_share_a_job(shelf: Path, tmp_path: Path) -> None:
    """Two at once, each with its rank: whoever is last commits, and nobody writes what is not his."""
    args, options = command(shelf, "save")
    out = tmp_path / "out"
    workers = [start("save", *args, out, ranks=[rank], **options) for rank in (0, 1)]
    found = [finish(worker) for worker in workers]
    assert [one.error for one in found] == ["", ""]
    assert any(one.value["complete"] for one in found)
    whole = sum(path.stat().st_size for path in (shelf / "save").glob(SHARDS))
    assert sum(one.value["written"] for one in found) == whole
    assert_same_folder(out, shelf / "save")


def test_a_killed_worker_is_replaced_by_another(shelf: Path, tmp_path: Path) -> None:
    """What the dead one finished is kept; the survivor takes over all ranks."""
    args, options = command(shelf, "save")
    out = tmp_path / "out"
    workers = [
        start("save", *args, out, ranks=[0], **options),
        start("save", *args, out, ranks=[1], kill=At(progress=0.6), concurrency=1, **options),
    ]
    survivor, dead = map(finish, workers)
    assert dead.killed
    assert (survivor.error, survivor.value["complete"]) == ("", False)
    assert_nothing_is_half_written(out, shelf / "save", MARK["save"])
    taken = run("save", *args, out, **options)
    assert taken.value["complete"]
    assert 0 < taken.value["written"] <= taken.value["bytes_to_write"] / 4
    assert_same_folder(out, shelf / "save")


def unfinished(shelf: Path, out: Path) -> list[Path]:
    """A job of which rank 0 is done; returns its records."""
    args, options = command(shelf, "save")
    assert SAVE(*args, out, ranks=[0], **options).complete is False
    return sorted((out / ".shardtool").glob("*/model-rank-0-*.json"))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "not JSON": lambda data: b"\xff\xfe" + data,
    "another shape": lambda data: b'["record"]',
    "very deep": lambda data: b"[" * 100_000,
    "a digit of a digest": lambda data: data.replace(data[-100:-99], b"0" if data[-100:-99] != b"0" else b"1"),
    "a chunk's digest": lambda data: _with_another_chunk(data),
}


def _with_another_chunk(data: bytes) -> bytes:
    at = data.index(b"chunks") + len(b'chunks\\": [\\"')
    return data[:at] + (b"0" if data[at : at + 1] != b"0" else b"1") + data[at + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_with_a_damaged_record_is_written_again(shelf: Path, tmp_path: Path, damage: str) -> None:
    """A record that is not whole, or not what was written, counts as none."""
    out = tmp_path / "out"
    record = unfinished(shelf, out)[3]
    record.write_bytes(DAMAGES[damage](record.read_bytes()))
    args, options = command(shelf, "save")
    found = SAVE(*args, out, **options)
    file = out / record.name.removesuffix(".json")
    rank1 = sum(path.stat().st_size for path in out.glob("model-rank-1-*"))
    assert found.written == rank1 + file.stat().st_size
    assert_same_folder(out, shelf / "save")


def test_a_record_counts_for_its_own_file_only(shelf: Path, tmp_path: Path) -> None:
    """One that lies under another name is no record."""
    out = tmp_path / "out"
    records = unfinished(shelf, out)
    shutil.copy(records[3], records[2])
    args, options = command(shelf, "save")
    SAVE(*args, out, **options)
    assert_same_folder(out, shelf / "save")


@pytest.mark.parametrize("loss", ["deleted", "truncated", "longer"])
def test_a_file_that_is_not_what_its_record_says_is_written_again(shelf: Path, tmp_path: Path, loss: str) -> None:
    """A record is believed only while the file is there in its size."""
    out = tmp_path / "out"
    record = unfinished(shelf, out)[5]
    file = out / record.name.removesuffix(".json")
    size = file.stat().st_size
    if loss == "deleted":
        file.unlink()
    else:
        file.write_bytes((file.read_bytes() + b"0")[: size - 1 if loss == "truncated" else size + 1])
    args, options = command(shelf, "save")
    partly = SAVE(*args, out, ranks=[1], **options)
    assert not partly.complete, "a manifest must not list a file that is not there"
    found = SAVE(*args, out, **options)
    assert (found.written, found.complete) == (size, True)
    assert_same_folder(out, shelf / "save")


def test_another_job_is_refused_until_it_may_overwrite(shelf: Path, tmp_path: Path) -> None:
    """Unfinished work of another tp stays as it is; with ``overwrite`` it makes room, and nothing of it remains."""
    (model,), options = command(shelf, "save")
    out = tmp_path / "out"
    unfinished(shelf, out)
    before = builders.contents(out)
    with pytest.raises(PlanError, match="another job"):
        shardtool.save(model, out, tp=4)
    assert builders.contents(out) == before
    shardtool.save(model, out, tp=1, overwrite=True)
    shardtool.save(model, tmp_path / "plain", tp=1)
    assert_same_folder(out, tmp_path / "plain")
    assert options["tp"] != 1


@pytest.mark.parametrize("at", [1, 5, 9, 14, 25, 60])
def test_overwriting_can_be_killed(shelf: Path, tmp_path: Path, at: int) -> None:
    """The old mark of completeness goes first, so that no mixture of two checkpoints looks complete."""
    (model,), options = command(shelf, "save")
    out = tmp_path / "out"
    shutil.copytree(shelf / "reshard", out)
    killed = run("save", model, out, overwrite=True, kill=At(change=at), concurrency=1, **options)
    assert killed.killed
    assert at == 1 or not (out / "shardtool.json").exists()
    assert shardtool.save(model, out, overwrite=True, **options).complete
    assert_same_folder(out, shelf / "save")


def s3_objects(uri: str) -> dict[str, bytes]:
    return builders.contents(uri)


def unstored(files: dict[str, bytes]) -> dict[str, Any]:
    """The files, with the manifest as it is where the store keeps no checksums."""
    if manifest.KEY not in files:
        return files
    made = manifest.decode(files[manifest.KEY], "here")
    plain = made.with_files(replace(file, stored={}) for file in made.files)
    return {**files, manifest.KEY: plain.encode()}


@pytest.mark.parametrize("operation", ["save", "merge"])
def test_a_killed_upload_is_finished_by_the_next_run(shelf: Path, bucket: str, operation: str) -> None:
    """The same holds in S3: no manifest, whole objects only, and at most half of the bytes again."""
    args, options = command(shelf, operation)
    uri = f"s3://{bucket}/out"
    assert run(operation, *args, uri, kill=At(progress=0.6), concurrency=1, **options).killed
    whole = builders.contents(shelf / operation)
    left = {key: data for key, data in s3_objects(uri).items() if not key.startswith(".shardtool/")}
    assert MARK[operation] not in left
    assert left
    assert left.items() <= whole.items()
    with pytest.raises(Incomplete):
        shardtool.inspect(uri)
    again = run(operation, *args, uri, **options)
    assert again.value["complete"]
    assert again.value["written"] <= again.value["bytes_to_write"] / 2
    assert unstored(s3_objects(uri)) == unstored(whole)


def test_an_upload_can_be_killed_anywhere(shelf: Path, bucket: str) -> None:
    """Before any request, those of the commit too."""
    args, options = command(shelf, "save")
    whole = builders.contents(shelf / "save")
    total = run("save", *args, f"s3://{bucket}/count", **options).requests
    chosen = random.Random(7)
    points = sorted({total - 1, total - 12, chosen.randint(2, total // 2), chosen.randint(total // 2, total)})
    for point in points:
        uri = f"s3://{bucket}/out-{point}"
        assert run("save", *args, uri, kill=At(request=point), **options).killed, point
        left = {key: data for key, data in s3_objects(uri).items() if not key.startswith(".shardtool/")}
        assert unstored(left).items() <= unstored(whole).items()
        assert SAVE(*args, uri, **options).complete
        assert unstored(s3_objects(uri)) == unstored(whole)


def test_records_tell_whose_they_are(shelf: Path, tmp_path: Path) -> None:
    """While the job lasts, its folder says what is being made; nothing else of shardtool's is visible."""
    out = tmp_path / "out"
    unfinished(shelf, out)
    (job,) = (out / ".shardtool").glob("*/job.json")
    said = json.loads(job.read_text())
    assert "tp 2" in said["what"]
    assert said["fingerprint"] == job.parent.name
    tops = {key.split("/")[0] for key in builders.contents(out)}
    assert all(top == ".shardtool" or top.startswith("model-rank-0-") for top in tops), list(itertools.islice(tops, 5))
