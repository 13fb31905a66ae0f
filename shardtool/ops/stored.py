"""What a store itself keeps of its objects, compared with what it said when they were written: no byte is read.

A checksum of the content (crc32c, crc64nvme, md5, sha256 ...) that differs is damage. An ETag is made as a server
likes: an equal one means equal bytes, another one only that the object was written or copied since, so that it proves
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor

from shardtool.errors import FormatError, NotFound
from shardtool.manifest import FileRecord, Manifest
from shardtool.ops import sums
from shardtool.ops.structure import FileCheck
from shardtool.stores.base import Store

_ASKED = 16
ETAG = "etag"


def compare(store: Store, records: Sequence[FileRecord], checks: Mapping[str, FileCheck]) -> None:
    """Say in every check what was compared: the size, the header, and which checksums, or why none."""
    sound = [record for record in records if checks[record.key].ok]
    wanted = [record for record in sound if record.stored]
    with ThreadPoolExecutor(_ASKED, thread_name_prefix="shardtool-stored") as pool:
        asked = pool.map(lambda record: _checksums(store, record.key), wanted)
        has = {record.key: found for record, found in zip(wanted, asked, strict=True)}
    for record in sound:
        _judge(record.stored, has.get(record.key, {}), checks[record.key])


def _checksums(store: Store, key: str) -> Mapping[str, str]:
    try:
        return store.checksums(key)
    except NotFound:
        return {}


def _judge(said: Mapping[str, str], has: Mapping[str, str], check: FileCheck) -> None:
    common = sorted(said.keys() & has.keys())
    content = [name for name in common if name != ETAG]
    check.compared += ["size", "header"]
    for name in content:
        if said[name] == has[name]:
            check.compared.append(name)
        else:
            check.why.append(f"its {name} is {has[name]} in the store, the manifest says {said[name]}")
    if content:
        return
    if ETAG in common and said[ETAG] == has[ETAG]:
        check.compared.append(ETAG)
    elif ETAG in common:
        check.not_compared = "content: it was written or copied since, as its ETag says"
    elif said:
        check.not_compared = f"content: this store keeps none of {', '.join(sorted(said))}"
    else:
        check.not_compared = "content: the manifest has no checksum of a store"


def check_sums(store: Store, made: Manifest) -> list[FileCheck]:
    """Whether the files of sums that are there say what the manifest's sums say. Without the latter, nothing."""
    known = {record.key: record.sha256 for record in made.files if record.sha256}
    if not known:
        return []
    side = {side.key for side in made.side_files}
    checks = []
    for name, read in ((sums.TEXT, sums.text_read), (sums.SGLANG, sums.sglang_read)):
        try:
            data = store.get(name, limit=sums.MOST)
        except NotFound:
            continue
        found = FileCheck(name, len(data))
        checks.append(found)
        try:
            said = read(data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found.why.append("it cannot be read")
            continue
        found.why += [f"it lacks {key}" for key in sorted(known.keys() - said.keys())]
        found.why += [f"its sha256 of {key} is another one" for key in sorted(known) if said.get(key, "") != known[key]]
        found.why += _side(store, said, side)
    return checks


def _side(store: Store, said: Mapping[str, str], side: Set[str]) -> list[str]:
    """What is wrong with the sums of side files, which are small."""
    found = []
    for key in sorted(side & said.keys()):
        try:
            if sums.of(store, key)[0] != said[key]:
                found.append(f"its sha256 of {key} is another one")
        except (NotFound, FormatError):  # that is said of the file itself
            continue
    return found
