"""What lies in the output of a job: its records, its mark, and what may be removed there.

``.shardtool/<fingerprint>/`` holds the records while a job lasts. Workers with the same fingerprint help each
other, and a second run skips what is recorded. Whoever finds all records commits, then removes them. The mark that
makes a checkpoint complete is one small object, written last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from shardtool import digest, manifest, pattern
from shardtool.checkpoint import listed
from shardtool.errors import AlreadyExists, FormatError, Incomplete, NotFound, PlanError
from shardtool.manifest import FileRecord
from shardtool.ops import sums
from shardtool.ops.job import Job
from shardtool.ops.sums import Sums
from shardtool.stores.base import Store

MAX_RECORD = 256 << 20
JOB = "job.json"
PAGE = 1000
"""Objects that vLLM sees of a place in S3."""
DAMAGED = (NotFound, FormatError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a record raises that is not whole, or gone because another worker has committed."""
_ALTERED = "the record differs from its digest"


@dataclass(frozen=True, slots=True)
class State:
    """What an output holds, before anything is done to it.

    ``found``: every object's size. ``own``: this job has begun there. ``complete``: it has ended there. ``doomed``:
    what has to be removed first.
    """

    found: Mapping[str, int]
    own: bool
    complete: bool
    doomed: Set[str]


def look(job: Job, to: Store, *, overwrite: bool, ranks: Sequence[int] | None) -> State:
    """The output's state. Changes nothing.

    Raises ``PlanError`` where the job must not be done there, and ``UsageError`` where no checkpoint can be so large.
    """
    if to.place() == job.source.place():
        raise PlanError(f"--output {to.uri} is the source itself: use another folder")
    try:
        found = {thing.key: thing.size for thing in listed(to)}
    except NotFound:
        found = {}
    committed = job.mark in found and job.committed(to)
    if committed and not overwrite and all(found.get(file.key) == file.size for _, file in job.files):
        return State(found, own=True, complete=True, doomed=frozenset())
    if committed and overwrite and ranks is not None:
        raise PlanError(
            f"{to.uri} is complete: --overwrite with --ranks would remove the other ranks' files, leave it out"
        )
    own = job.prefix + JOB in found
    begun = _begun(job, to) if own else {}
    changed = isinstance(begun, dict) and _changed(job, begun)
    if changed and not overwrite:
        raise PlanError(
            f"the weights of {job.source.uri} have changed since this job began in {to.uri}: use --overwrite "
            f"to begin anew"
        )
    own = own and not changed
    doomed = _doomed(job, to, found) if overwrite and not own else frozenset()
    _spare_source(job, to, doomed)
    if not own:
        _expect_empty(job, to, {key for key in found if key not in doomed}, overwrite=overwrite)
    return State(found, own, complete=False, doomed=doomed)


def _expect_empty(job: Job, to: Store, left: Set[str], *, overwrite: bool) -> None:
    """Refuse an output that holds something else than what may be removed."""
    if others := _others(job, left):
        begun = _begun(job, to, others[0])
        what = begun if isinstance(begun, str) else begun.get("what")
        raise PlanError(
            f"{to.uri} holds the unfinished output of another job{f' ({what})' if isinstance(what, str) else ''}: "
            "finish that one, use --overwrite or another --output, or see shardtool clean"
        )
    if left and not overwrite:
        raise PlanError(f"{to.uri} is not empty (it holds {min(left)}): use --overwrite or another --output")
    if weights := [key for key in sorted(left) if key.endswith(".safetensors") and "/" not in key]:
        raise PlanError(
            f"{to.uri} holds {weights[0]}, which --overwrite does not remove and engines would read: remove it "
            f"yourself "
            "or use another --output"
        )


def _others(job: Job, keys: Iterable[str]) -> list[str]:
    """The fingerprints of other jobs that have begun."""
    private = {key.split("/")[1] for key in keys if key.startswith(manifest.PRIVATE) and key.count("/") > 1}
    return sorted(private - {job.fingerprint})


def _doomed(job: Job, to: Store, found: Mapping[str, int]) -> frozenset[str]:
    """What an older checkpoint left and this one replaces. Files of other kinds stay."""
    listed = _listed(to) if manifest.KEY in found else set()
    ours = (manifest.KEY, job.mark)
    return frozenset(
        key
        for key in found
        if key in listed or key in ours or key in sums.NAMES or key.startswith(manifest.PRIVATE) or job.stale(key)
    )


def _listed(to: Store) -> set[str]:
    """The shards of the checkpoint that is there, whatever their names. One that cannot be read lists none."""
    try:
        made = manifest.decode(to.get(manifest.KEY, limit=manifest.MAX_BYTES), to.locate(manifest.KEY))
    except (NotFound, FormatError):
        return set()
    return {file.key for file in made.files if file.key.endswith(".safetensors")}


def _written(to: Store) -> tuple[FileRecord, ...]:
    """The files of the complete checkpoint that is there."""
    return manifest.decode(to.get(manifest.KEY, limit=manifest.MAX_BYTES), to.locate(manifest.KEY)).files


def _spare_source(job: Job, to: Store, doomed: Set[str]) -> None:
    """Refuse to remove or replace a file that the source reads, where one folder lies in the other."""
    touched = {*doomed, *job.beside, job.mark, *(file.key for _, file in job.files)}
    read = {f"{job.source.place()}/{weight.key}" for weight in job.weights}
    if lost := sorted(key for key in touched if f"{to.place()}/{key}" in read):
        raise PlanError(f"{to.locate(lost[0])} is a file of the source: use another --output or --pattern")


def cautions(job: Job, to: Store, state: State) -> list[str]:
    """What engines would stumble over where they list an object store, as vLLM lists S3: one page, whole keys."""
    if not pattern.matched_whole(to.uri):
        return []
    notes = []
    own = {file.key for _, file in job.files}
    left = {key for key in state.found if key not in state.doomed and not key.startswith(job.prefix)}
    count = len(left | own | job.beside | {job.mark})
    if count >= PAGE:
        notes.append(
            f"{to.uri} will hold {count} objects: vLLM lists {PAGE} of a place and ignores the rest; use a larger"
            " --max-part-size or an --output of its own"
        )
    if others := sorted(key for key in left - own if job.reads(key)):
        notes.append(
            f"{to.locate(others[0])} is not of this checkpoint, but engines would read it as one of its shards: remove"
            " it"
        )
    return notes


def begin(job: Job, to: Store, state: State) -> set[str]:
    """Take the output for this job; returns the files that are written already."""
    for key in sorted(state.doomed, key=lambda key: (key != manifest.KEY, key != job.mark, key)):  # marks first
        to.delete(key)
    if not state.own:
        _announce(job, to)
        if others := _others(job, (thing.key for thing in to.list(manifest.PRIVATE))):
            to.delete(job.prefix + JOB)
            raise PlanError(
                f"another job ({others[0]}) has begun in {to.uri} at the same moment: run one of them again"
            )
    return set(_records(job, to, state.found).whole)


def restore(job: Job, to: Store, state: State, wanted: Sums) -> None:
    """Put back what a complete checkpoint lacks beside its weights, and remove what a killed run left.

    What is there stays: it may have been edited.
    """
    if missing := job.beside - state.found.keys():
        job.write_beside(to, missing)
    if any(key.startswith(job.prefix) for key in state.found):
        _tidy(job, to)
    names = {sums.TEXT: wanted.text, sums.SGLANG: wanted.sglang}
    if any(asked and name not in state.found for name, asked in names.items()):
        sums.write(to, wanted, sums.summed(to, wanted, _written(to)), job.beside)


def record(job: Job, to: Store, made: FileRecord) -> None:
    """Remember a file that is durable."""
    text = json.dumps(made.to_json())  # with a digest: a damaged record must not become part of a manifest
    kept = {"record": text, "digest": digest.of_bytes(text.encode()), "at": time.time()}
    to.put(_record_key(job, made.key), json.dumps(kept).encode())


def abandon(job: Job, to: Store) -> None:
    """Remove what a run has written that cannot go on."""
    for key in _records(job, to, _sizes(job, to)).whole:
        to.delete(key)
    _tidy(job, to)


def commit(job: Job, to: Store, wanted: Sums) -> bool:
    """Commit if every file is there with its record. Losing to an identical commit is success.

    Raises ``Incomplete`` where nothing is left to be written and a record cannot be read: nobody would commit.
    """
    own = {file.key for _, file in job.files}
    records = _records(job, to, _sizes(job, to))
    if records.whole.keys() == own:
        job.write_beside(to, job.beside)
        made = [records.whole[file.key] for _, file in job.files]
        if wanted:
            made = sums.summed(to, wanted, made)
            sums.write(to, wanted, made, job.beside)
        try:
            job.commit(to, made)
        except AlreadyExists:
            if not job.committed(to):
                raise
    elif not job.committed(to):  # if it is, another worker has done it and removed the records
        if records.damaged and records.whole.keys() | records.damaged.keys() == own:
            key, why = min(records.damaged.items())
            raise Incomplete(
                f"{why}, so that nothing tells whether {key} is whole: run the same command again, with the rank of "
                f"that file among its --ranks, or remove what is there with shardtool clean {to.uri}"
            )
        return False
    _tidy(job, to)
    return True


def _announce(job: Job, to: Store) -> None:
    """Say whose job this output is, which files it will have, and when this was said: what ``clean`` goes by."""
    kept = {
        "what": job.what,
        "fingerprint": job.fingerprint,
        "source": _versions(job),
        "files": [[file.key, file.size] for _, file in job.files],
        "at": time.time(),
    }
    to.put(job.prefix + JOB, json.dumps(kept).encode())


def _versions(job: Job) -> dict[str, Any]:
    """Where the source's weights are and in which version."""
    return {"place": job.source.place(), "files": [[w.key, w.size, w.version] for w in job.weights]}


def _begun(job: Job, to: Store, fingerprint: str | None = None) -> dict[str, Any] | str:
    """What a job said when it began, or why that cannot be read."""
    key = f"{manifest.PRIVATE}{fingerprint or job.fingerprint}/{JOB}"
    try:
        said = json.loads(to.get(key, limit=MAX_RECORD))
    except DAMAGED as error:
        return f"{to.locate(key)} {reason(error)}"
    return said if isinstance(said, dict) else f"{to.locate(key)} is no record of a job"


def _changed(job: Job, begun: Mapping[str, Any]) -> bool:
    """Whether the weights are not those that the job began with. Copies elsewhere are taken at their word."""
    said, now = begun.get("source"), _versions(job)
    return isinstance(said, dict) and said.get("place") == now["place"] and said.get("files") != now["files"]


def _tidy(job: Job, to: Store) -> None:
    """Remove the records of a committed job. Announcing it first makes the store sweep what a killed run left there."""
    _announce(job, to)
    for thing in list(to.list(job.prefix)):
        to.delete(thing.key)


def _sizes(job: Job, to: Store) -> dict[str, int]:
    """The sizes of the job's files that are there, whatever else is."""
    own = {file.key for _, file in job.files}
    return {thing.key: thing.size for thing in to.list() if thing.key in own}


def _record_key(job: Job, key: str) -> str:
    """Where the record of a file is while the job lasts."""
    return f"{job.prefix}{key}.json"


def _unsealed(data: bytes) -> FileRecord:
    """The record. Raises the built-in errors of wrong shapes where it is damaged."""
    kept = json.loads(data)
    text = kept["record"]
    if digest.of_bytes(text.encode()) != kept["digest"]:
        raise ValueError(_ALTERED)
    return FileRecord.from_json(json.loads(text))


@dataclass(frozen=True, slots=True)
class _Records:
    """What is recorded of a job's files, by their keys: ``whole``, and why the record of another says nothing."""

    whole: dict[str, FileRecord]
    damaged: dict[str, str]


def _records(job: Job, to: Store, sizes: Mapping[str, int]) -> _Records:
    """The records of the finished files among those that lie there with some sizes."""
    own = {_record_key(job, file.key): file.key for _, file in job.files}
    found = _Records({}, {})
    for thing in to.list(job.prefix):
        key = own.get(thing.key)
        if key is None or key not in sizes:
            continue
        try:
            made = _unsealed(to.get(thing.key, limit=MAX_RECORD))
        except NotFound:  # another worker has committed
            continue
        except DAMAGED as error:
            found.damaged[key] = f"{to.locate(thing.key)} {reason(error)}"
            continue
        if made.key != key:
            found.damaged[key] = f"{to.locate(thing.key)} is the record of {made.key}"
        elif made.size == sizes[key]:  # or else the file is still to be written
            found.whole[key] = made
    return found


def reason(error: Exception) -> str:
    """What is wrong with a record, in the words that follow its name."""
    match error:
        case NotFound():
            return "is missing"
        case FormatError():
            return f"cannot be read: {error}"
        case ValueError() if str(error) == _ALTERED:
            return "differs from its own digest"
        case json.JSONDecodeError() | UnicodeDecodeError():
            return "is cut short or damaged: it is not JSON"
        case _:
            return "is no record of a job"
