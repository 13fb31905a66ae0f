"""The output of a job: whose it is, what may be removed there, and what is never touched."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

import shardtool
from shardtool import checkpoint, digest
from shardtool.checkpoint import open_checkpoint
from shardtool.errors import Incomplete, PlanError, UsageError
from shardtool.ops import output
from shardtool.ops.job import Summary
from shardtool.stores.base import Object
from shardtool.stores.memory import MemoryStore
from tests.builders import config, contents, model, put, tensors

FILES = model(config(), tensors(config()), files=2)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return put(tmp_path / "model", FILES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_job_is_not_finished_with_other_weights_than_it_began_with(out: Path, tmp_path: Path):
    """A byte in the middle of a tensor is in no sample; the file's time of change tells."""
    large = config(vocab_size=2048)
    source = put(tmp_path / "large", model(large, tensors(large)))
    shardtool.save(source, out, tp=2, ranks=[0])
    lies = open_checkpoint(source).catalog()["model.embed_tokens.weight"].stored
    assert lies is not None
    path = Path(source, lies.key)
    data = bytearray(path.read_bytes())
    data[lies.offset + lies.nbytes // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(PlanError, match=r"the weights of .*large have changed since this job began"):
        shardtool.save(source, out, tp=2, ranks=[1])
    shardtool.save(source, out, tp=2, overwrite=True)
    assert shardtool.verify(out, against=source).ok


def test_a_copy_of_the_weights_elsewhere_may_help(source: str, out: Path, tmp_path: Path):
    """Two machines with a copy each have files of different times."""
    shardtool.save(source, out, tp=2, ranks=[0])
    put(tmp_path / "copy", FILES)
    assert shardtool.save(tmp_path / "copy", out, tp=2, ranks=[1]).complete
    assert shardtool.verify(out, against=source).ok


def test_overwriting_never_removes_or_replaces_the_source(source: str, tmp_path: Path):
    """Not even where the source lies in the output and the pattern reaches into it."""
    place = tmp_path / "place"
    shardtool.save(source, place / "sub", tp=2)
    before = contents(place)
    reaching = "sub/model-rank-{rank}-part-{part}.safetensors"
    for overwrite in (True, False):
        with pytest.raises(PlanError, match=r"is a file of the source"):
            shardtool.reshard(place / "sub", place, tp=1, pattern=reaching, overwrite=overwrite)
        assert contents(place) == before


def test_overwriting_does_not_turn_a_checkpoint_into_half_of_one(source: str, tmp_path: Path):
    """Weights that are not shardtool's stay, and an engine would read them: the output is refused as it is."""
    other = put(tmp_path / "other", FILES)
    before = contents(other)
    with pytest.raises(PlanError, match=r"holds model-00001-of-00002\.safetensors, which --overwrite does not remove"):
        shardtool.save(source, other, tp=2, overwrite=True)
    assert contents(other) == before


def test_merging_over_an_older_merge_leaves_other_weights_alone(source: str, out: Path, tmp_path: Path):
    shardtool.save(source, out, tp=2)
    merged = tmp_path / "merged"
    shardtool.merge(out, merged)
    (merged / "notes.txt").write_text("mine")
    shardtool.merge(out, merged, overwrite=True)
    assert (merged / "notes.txt").read_text() == "mine"
    (merged / "lora.safetensors").write_bytes(b"mine too")
    with pytest.raises(PlanError, match=r"holds lora\.safetensors"):
        shardtool.merge(out, merged, overwrite=True)
    assert (merged / "lora.safetensors").read_bytes() == b"mine too"


def test_one_worker_cannot_overwrite_what_all_have_finished(source: str, out: Path):
    shardtool.save(source, out, tp=2)
    before = contents(out)
    with pytest.raises(PlanError, match=r"--overwrite with --ranks would remove the other ranks' files"):
        shardtool.save(source, out, tp=2, ranks=[0], overwrite=True)
    assert contents(out) == before


def test_of_two_jobs_that_begin_at_once_none_harms_the_other(
    source: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both have seen an empty folder. Whoever sees the other withdraws; the last one that looks may go on alone."""

    def at_once(before: Callable[..., Any]) -> Callable[..., Any]:
        together = Barrier(2)

        def done(*args: Any, **more: Any) -> Any:
            found = before(*args, **more)
            if len(waited) < 4:  # once in each of the two threads, for each of the two functions
                waited.append(1)
                together.wait(60)
            return found

        return done

    waited: list[int] = []
    monkeypatch.setattr(output, "look", at_once(output.look))
    monkeypatch.setattr(output, "_announce", at_once(output._announce))
    failures: list[BaseException] = []

    def work(tp: int) -> None:
        try:
            shardtool.save(source, out, tp=tp)
        except BaseException as error:
            failures.append(error)

    workers = [Thread(target=work, args=(tp,)) for tp in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert failures
    assert all("has begun in" in str(failure) for failure in failures)
    if len(failures) == 1:
        assert shardtool.verify(out, against=source).ok
    else:
        assert contents(out) == {}


def test_another_jobs_unfinished_output_is_named(source: str, out: Path):
    shardtool.save(source, out, tp=2, ranks=[0])
    with pytest.raises(PlanError, match=r"the unfinished output of another job \(tp 2 shards of .*model\)"):
        shardtool.save(source, out, tp=1)


def test_another_job_whose_record_cannot_be_read_is_told_of_with_the_reason(source: str, out: Path):
    shardtool.save(source, out, tp=2, ranks=[0])
    (record,) = (out / ".shardtool").rglob("job.json")
    record.write_text("{")
    with pytest.raises(
        PlanError, match=r"another job \(.*/job\.json is cut short or damaged: it is not JSON\): finish"
    ):
        shardtool.save(source, out, tp=1)


# Records that cannot be read


def resealed(text: str, **other: Any) -> str:
    """A record that says something else, as if it had been made so."""
    said = json.loads(text)
    made = json.dumps({**json.loads(said["record"]), **other})
    return json.dumps({**said, "record": made, "digest": digest.of_bytes(made.encode())})


DAMAGES: dict[str, tuple[Callable[[str], str], str]] = {
    "cut": (lambda text: text[:20], "is cut short or damaged: it is not JSON"),
    "empty": (lambda text: "", "is cut short or damaged: it is not JSON"),
    "a list": (lambda text: "[]", "is no record of a job"),
    "changed": (lambda text: text.replace('part\\": 0', 'part\\": 1'), "differs from its own digest"),
    "of another": (lambda text: resealed(text, key="x.safetensors"), "is the record of x.safetensors"),
}
RANK_0 = "model-rank-0-part-0.safetensors"


@pytest.mark.parametrize("damage", DAMAGES)
def test_whoever_writes_the_last_file_tells_of_a_record_that_keeps_the_job_from_its_end(
    source: str, out: Path, damage: str
):
    shardtool.save(source, out, tp=2, ranks=[0])
    (record,) = (out / ".shardtool").rglob(f"{RANK_0}.json")
    change, why = DAMAGES[damage]
    record.write_text(change(record.read_text()))
    with pytest.raises(Incomplete) as told:
        shardtool.save(source, out, tp=2, ranks=[1])
    assert str(told.value).startswith(f"{record} {why}")
    assert f"nothing tells whether {RANK_0} is whole: run the same command again" in str(told.value)
    assert f"or remove what is there with shardtool clean {out}" in str(told.value)
    assert not (out / "shardtool.json").exists()
    assert shardtool.save(source, out, tp=2, ranks=[0]).complete  # as it was told to do
    assert shardtool.verify(out, against=source).ok


def test_a_damaged_record_is_nothing_to_tell_while_others_have_still_to_write(source: str, out: Path):
    """Whoever writes that file may come yet, and writes it anew."""
    shardtool.save(source, out, tp=4, ranks=[0])
    (record,) = (out / ".shardtool").rglob(f"{RANK_0}.json")
    record.write_text("")
    assert not shardtool.save(source, out, tp=4, ranks=[1]).complete
    assert shardtool.save(source, out, tp=4).complete


@pytest.mark.parametrize("text", ["", None])
def test_a_record_without_its_file_is_nothing_to_tell(source: str, out: Path, text: str | None):
    """That file is still to be written: nothing of its name is there, or something of another size."""
    shardtool.save(source, out, tp=2, ranks=[0])
    (record,) = (out / ".shardtool").rglob(f"{RANK_0}.json")
    if text is None:
        record.write_text(resealed(record.read_text(), size=7))
    else:
        record.write_text(text)
        (out / RANK_0).unlink()
    assert not shardtool.save(source, out, tp=2, ranks=[1]).complete
    assert shardtool.save(source, out, tp=2, ranks=[0]).complete
    assert shardtool.verify(out, against=source).ok


# What holds more than any checkpoint


def test_an_output_that_holds_too_much_is_refused_before_it_is_read_whole(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "MAX_OBJECTS", 3)

    class Endless(MemoryStore):
        def list(self, prefix: str = "") -> Iterator[Object]:
            return (Object(f"{number:09}", 1) for number in itertools.count())

    for overwrite in (True, False):
        with pytest.raises(UsageError, match="more than 3 files; name the folder of one checkpoint"):
            shardtool.save(source, Endless(), tp=2, overwrite=overwrite)


def test_an_output_that_holds_as_much_as_may_be_is_taken(source: str, out: Path, monkeypatch: pytest.MonkeyPatch):
    put(out, {f"{number}.txt": b"mine" for number in range(5)})
    monkeypatch.setattr(checkpoint, "MAX_OBJECTS", 5)
    assert shardtool.save(source, out, tp=2, overwrite=True).complete


@pytest.mark.parametrize("kind", ["itself", "full"])
def test_a_dry_run_refuses_what_the_run_would(source: str, tmp_path: Path, kind: str):
    place = source if kind == "itself" else put(tmp_path / "full", {"notes.txt": b"mine"})
    for dry_run in (True, False):
        with pytest.raises(PlanError, match=r"is the source itself|is not empty"):
            shardtool.save(source, place, tp=2, dry_run=dry_run)


def test_a_second_run_puts_back_missing_side_files_and_leaves_edited_ones(source: str, out: Path):
    shardtool.save(source, out, tp=2)
    (out / "tokenizer.json").unlink()
    (out / "config.json").write_text("{}")
    again = shardtool.save(source, out, tp=2)
    assert again.complete
    assert again.written == 0
    assert (out / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert (out / "config.json").read_text() == "{}"


# Where engines list an object store


class Bucket(MemoryStore):
    """Memory that engines list as they list S3."""

    def __init__(self) -> None:
        super().__init__("s3://bucket/llama")


def cautions(summary: Summary) -> list[str]:
    return [note for note in summary.notes if "s3://bucket/llama" in note]


def test_a_thousand_objects_are_more_than_vllm_lists(source: str):
    store = Bucket()
    shardtool.save(source, store, tp=2)
    own = len(list(store.list()))
    for number in range(1000 - own):
        store.put(f"notes/{number}.txt", b"")
    (note,) = cautions(shardtool.save(source, store, tp=2, overwrite=True, dry_run=True))
    assert note.startswith("s3://bucket/llama will hold 1000 objects: vLLM lists 1000 of a place and ignores the rest")
    store.delete("notes/0.txt")
    assert cautions(shardtool.save(source, store, tp=2, overwrite=True)) == []


def test_what_engines_would_read_as_a_shard_is_named(source: str):
    store = Bucket()
    store.put("old/model-rank-0-part-0.safetensors", b"x")
    store.put("old/notes.txt", b"x")
    (note,) = cautions(shardtool.save(source, store, tp=2, overwrite=True, dry_run=True))
    assert note.startswith("s3://bucket/llama/old/model-rank-0-part-0.safetensors is not of this checkpoint")


def test_a_folder_is_listed_whole(source: str, out: Path):
    (out / "old").mkdir(parents=True)
    (out / "old" / "model-rank-0-part-0.safetensors").write_bytes(b"x")
    summary = shardtool.save(source, out, tp=2, overwrite=True)
    assert not [note for note in summary.notes if "engines" in note]
