"""The output of a job: whose it is, what may be removed there, and what is never touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

import shardtool
from shardtool.checkpoint import open_checkpoint
from shardtool.errors import PlanError
from shardtool.ops import output
from shardtool.ops.job import Summary
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
                together.wait(10)
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
        worker.join(60)
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
