"""The manifest: what is written is read back, any other bytes are refused, and the documents describe it exactly."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

import shardtool
from shardtool.digest import TensorDigest
from shardtool.dtypes import DType
from shardtool.errors import FormatError, ShardtoolError
from shardtool.manifest import FileRecord, Manifest, TensorRecord, decode
from shardtool.mosaic import Logical
from shardtool.plan import OPERATIONS
from tests.builders import Files, Raw, config, contents, flipped, model, places, put, tensors
from tests.builders import random as random_raw
from tests.ops.cases import Case, cases

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads((ROOT / "docs" / "manifest.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def saved(**changes: Any) -> Files:
    """A checkpoint with a dropped tensor, a copy and padding."""
    made = config(num_hidden_layers=1, vocab_size=70, tie_word_embeddings=True, **changes)
    held = tensors(made)
    held["lm_head.weight"] = Raw("BF16", held["model.embed_tokens.weight"].array)
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = random_raw((3,), "F32")
    with places() as place:
        shardtool.save(put(place("model"), model(made, held)), out := place("out"), tp=2)
        return contents(out)


FILES = saved()
DATA = FILES["shardtool.json"]
TABLE = json.loads(DATA)


def dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def signed(table: dict[str, Any]) -> bytes:
    """The bytes of a manifest that says this, written after docs/manifest.md."""
    rest = {key: value for key, value in table.items() if key != "digest"}
    rest["digest"] = blake3(dump(rest).encode()).hexdigest()
    lines = ",\n".join(f"{json.dumps(key)}: {dump(value)}" for key, value in rest.items())
    return f"{{\n{lines}\n}}\n".encode()


# Reading and writing.


def test_a_manifest_is_read_back_as_it_was_written():
    made = decode(DATA, "here")
    assert made.encode() == DATA
    assert decode(made.encode(), "here") == made


@settings(max_examples=30)
@given(cases())
def test_every_manifest_is_valid_under_the_schema_and_is_read_back(case: Case):
    with places() as place:
        shardtool.save(put(place("model"), case.files), a := place("a"), tp=case.tp, **case.options)
        shardtool.reshard(a, b := place("b"), tp=case.tp2, **case.options2)
        for out in (a, b):
            data = contents(out)["shardtool.json"]
            VALIDATOR.validate(json.loads(data))
            made = decode(data, "here")
            assert made.encode() == data
            assert made.config.encode() == case.files["config.json"]
            assert {name: (t.dtype.name, t.shape) for name, t in made.inventory.items()} == {
                name: (raw.dtype, raw.array.shape) for name, raw in case.held.items()
            }


NAMES = st.text(st.sampled_from('ab.01{i}é\n"\\/'), min_size=1, max_size=10)
HEX = st.integers(0, 15).map(lambda n: f"{n:x}" * 64)


@st.composite
def records(draw: st.DrawFn) -> FileRecord:
    made = tuple(
        TensorRecord(name, TensorDigest(draw(HEX), tuple(h[:32] for h in draw(st.lists(HEX, max_size=2)))))
        for name in draw(st.lists(NAMES, unique=True, max_size=3))
    )
    rank = draw(st.none() | st.integers(0, 1))
    return FileRecord(
        draw(st.sampled_from(["a.safetensors", "b/c d.safetensors"])),
        rank,
        1,
        draw(st.integers(0, 1 << 60)),
        draw(HEX),
        draw(HEX),
        made,
    )


@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from([DType.BF16, DType.F32]), st.sampled_from([(), (2,), (2, 3)]))),
    st.lists(records(), max_size=2, unique_by=lambda record: record.key),
    st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_any_names_and_texts_are_read_back(inventory: dict[str, Any], files: list[FileRecord], text: str):
    from dataclasses import replace

    made = replace(
        decode(DATA, "here"),
        inventory={name: Logical(*found) for name, found in sorted(inventory.items())},
        config=text,
        amendments={text: [text, None, 1.5, {"a": text}]},
        copies={text: text},
        files=tuple(files),
    )
    data = made.encode()
    assert decode(data, "here") == made
    assert data == signed(json.loads(data))


def test_files_are_sorted_by_key():
    made = decode(DATA, "here")
    assert made.with_files(reversed(made.files)) == made
    keys = [f.key for f in made.files]
    assert keys == sorted(keys)


def test_the_fingerprint_covers_the_plan_and_nothing_else():
    made = decode(DATA, "here")
    plan = {key: value for key, value in TABLE.items() if key not in ("files", "digest")}
    assert made.fingerprint == blake3(dump(plan).encode()).hexdigest()[:32]
    assert made.with_files(()).fingerprint == made.fingerprint


@pytest.mark.parametrize("key", sorted(TABLE.keys() - {"files", "digest"}))
def test_every_field_of_the_plan_makes_another_job(key: str):
    """Workers help each other only where all of it is the same."""
    plan = {k: v for k, v in TABLE.items() if k not in ("files", "digest")}
    changed = blake3(dump({**plan, key: "other"}).encode()).hexdigest()[:32]
    assert changed != decode(DATA, "here").fingerprint


# What is refused.


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_no_byte_can_change(at: int, change: int):
    changed = bytearray(DATA)
    changed[at] ^= change
    with pytest.raises(FormatError, match=r"^here (is|has)"):
        decode(bytes(changed), "here")


@pytest.mark.parametrize(
    "data",
    [
        DATA + b" ",
        b" " + DATA,
        DATA[:-1],
        DATA.replace(b",", b", ", 1),
        DATA.replace(b'"fill":0.0', b'"fill":0e0', 1),
        json.dumps(TABLE, indent=2).encode(),
        DATA.replace(b'"dtype": "BF16",\n', b'"dtype": "F32",\n"dtype": "BF16",\n'),
    ],
)
def test_other_bytes_that_say_the_same_are_refused(data: bytes):
    assert json.loads(data) == TABLE
    assert data != DATA
    with pytest.raises(FormatError, match="its digest does not match its content"):
        decode(data, "here")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"format": ' + b"[" * 900 + b"]" * 900 + b"}", "is not a manifest of shardtool"),
        (b"[]", "is not a manifest of shardtool"),
        (b"{}", "is not a manifest of shardtool"),
        (b'{"format": 1}', "is not a manifest of shardtool"),
        (b'{"format": "other/1"}', "is not a manifest of shardtool"),
        (b'{"format": "shardtool/3"}', "has the format 'shardtool/3'; this version of shardtool reads 'shardtool/2'"),
        (b'{"format": "shardtool/2"}', "its digest does not match"),
        (b'{"format": "shardtool/1"}', "its digest does not match"),
        (b'{"format": "shardtool/1", "config": "\\ud800"}', "is damaged"),
        (b'{"format": "shardtool/1", "a": NaN, "digest": 3}', "its digest does not match"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes, said: str):
    with pytest.raises(FormatError, match=said):
        decode(data, "here")


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside JSON values; of a list, the first and the last."""
    if path:
        yield path
    items: Any = value.items() if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        items = {0: value[0], len(value) - 1: value[-1]}.items()
    for key, inner in items:
        yield from places_in(inner, (*path, key))


JUNK: list[Any] = [None, True, -1, 1 << 64, 0.5, "", "x", "../x", "a\\b", [], [[]], [None], {}, {"a": 1}, "{i}"]


def replaced(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The table with something else in one place."""
    table = copy.deepcopy(TABLE)
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return table


PATHS = sorted(places_in({k: v for k, v in TABLE.items() if k not in ("digest", "format")}), key=repr)


@pytest.mark.parametrize("seed", range(6))
def test_a_manifest_that_says_nonsense_never_breaks_a_reader(seed: int, tmp_path: Path):
    """Rightly signed, so that every word of it is believed; only errors of ours come out, and nothing is written."""
    chosen = random.Random(seed)
    for n, path in enumerate(PATHS[seed::6]):
        data = signed(replaced(path, chosen.choice(JUNK)))
        try:
            made = decode(data, "here")
        except ShardtoolError:
            continue
        assert decode(made.encode(), "here") == made
        with places() as place:
            uri = put(place("shards"), {**FILES, "shardtool.json": data})
            for operation in (
                lambda uri=uri: shardtool.verify(uri),
                lambda uri=uri: shardtool.verify(uri, against=put(place("other"), FILES)),
                lambda uri=uri, n=n: shardtool.reshard(uri, tmp_path / f"r{n}", tp=4, dry_run=True, verify=False),
                lambda uri=uri, n=n: shardtool.merge(uri, tmp_path / f"m{n}", dry_run=True, verify=False),
                lambda uri=uri: shardtool.load(uri, rank=0),
            ):
                try:
                    operation()
                except ShardtoolError:
                    pass
                except Exception as error:
                    raise AssertionError(f"{path}: {error!r}") from error
    assert not list(tmp_path.iterdir())


def test_a_digest_cannot_be_taken_off():
    table = {key: value for key, value in TABLE.items() if key != "digest"}
    data = signed(table)
    assert data == DATA
    lines = [line for line in data.decode().splitlines() if not line.startswith('"digest"')]
    with pytest.raises(FormatError):
        decode("\n".join(lines).replace(",\n}", "\n}").encode(), "here")


# Documents.


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_and_the_document_know_every_operation_of_a_program():
    assert SCHEMA["$defs"]["program"]["properties"]["op"]["enum"] == sorted(OPERATIONS)
    document = (ROOT / "docs" / "manifest.md").read_text()
    assert all(f"`{operation}`" in document for operation in OPERATIONS)


def test_the_schema_and_the_document_have_the_fields_of_the_manifest_in_its_order():
    assert list(SCHEMA["properties"]) == list(TABLE) == SCHEMA["required"]
    document = (ROOT / "docs" / "manifest.md").read_text()
    section = document[document.index("## Fields") : document.index("### Source")]
    listed = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert listed == list(TABLE)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "shardtool/1"),
        (("parallel", "ep"), 1),
        (("parallel", "partition"), []),
        (("layout", "kind"), "guessed"),
        (("layout", "table"), None),
        (("parallel", "tp"), 0),
        (("chunk",), 1),
        (("more",), 1),
        (("source", "tensors", 0, "dtype"), "FP8"),
        (("source", "dropped", 0, "reason"), ""),
        (("recipe", 0, "shares"), []),
        (("recipe", 0, "name"), "a.{i}"),
        (("recipe", 0, "shares", 0, "pieces", 0, "from"), [0]),
        (("files", 0, "key"), "../x"),
        (("files", 0, "key"), "/x"),
        (("files", 0, "header"), "0" * 63),
        (("files", 0, "tensors", 0, "chunks"), ["0" * 64]),
        (("side_files",), []),
        (("layout", "table", "rows", 0, "rule"), None),
        (("recipe", 0, "shares", 0, "pieces", 0, "of"), {"op": "system"}),
        (("recipe", 0, "shares", 0, "pieces", 0, "e"), [[0, 2]]),
    ],
)
def test_the_schema_refuses_what_is_wrong(path: tuple[Any, ...], value: Any):
    VALIDATOR.validate(TABLE)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(replaced(path, value))


def documented_check() -> Any:
    """The function that docs/manifest.md gives to those who do not have shardtool, executed from the document."""
    text = (ROOT / "docs" / "manifest.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    body = code[: code.index("\n\ncheck(")]
    assert "shardtool import" not in body
    assert len(body[body.index("def ") :].splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(compile(body, "docs/manifest.md", "exec"), names)
    return names["check"]


def test_the_lines_of_the_document_verify_a_checkpoint(tmp_path: Path):
    put(tmp_path / "out", FILES)
    documented_check()(tmp_path / "out")


@settings(max_examples=60)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_the_lines_of_the_document_find_every_changed_bit(key: str, data: st.DataObject):
    import tempfile

    at = data.draw(st.integers(0, len(FILES[key]) - 1))
    changed = flipped(FILES[key], at, data.draw(st.integers(0, 7)))
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), {**FILES, key: changed})
        with pytest.raises((AssertionError, ValueError, KeyError, TypeError, MemoryError, OverflowError)):
            documented_check()(Path(folder))


def test_large_tensors_have_a_digest_for_every_8_mib(tmp_path: Path):
    made = config(num_hidden_layers=1, hidden_size=512, vocab_size=17_000)
    held = tensors(made)
    shardtool.save(put(tmp_path / "model", model(made, held)), tmp_path / "out", tp=1)
    table = json.loads((tmp_path / "out" / "shardtool.json").read_bytes())
    chunks = {t["name"]: len(t["chunks"]) for file in table["files"] for t in file["tensors"]}
    assert chunks["lm_head.weight"] == -(-17_024 * 1024 // (8 << 20)) == 3
    assert chunks["model.norm.weight"] == 1
    documented_check()(tmp_path / "out")


def test_records_are_what_the_manifest_will_say(tmp_path: Path):
    """Unfinished jobs, as docs/manifest.md has them."""
    source = put(tmp_path / "model", model(config(), tensors(config())))
    shardtool.save(source, tmp_path / "out", tp=2, ranks=[1])
    (folder,) = (tmp_path / "out" / ".shardtool").iterdir()
    key = "model-rank-1-part-0.safetensors"
    assert sorted(path.name for path in folder.iterdir()) == ["job.json", f"{key}.json"]
    job, record = (json.loads((folder / name).read_bytes()) for name in ("job.json", f"{key}.json"))
    weights = Path(source) / "model.safetensors"
    file = [weights.name, weights.stat().st_size, str(weights.stat().st_mtime_ns)]
    assert job.pop("source") == {"place": os.path.realpath(source), "files": [file]}
    assert all(0 <= time.time() - one.pop("at") < 600 for one in (job, record))
    shards = [[f"model-rank-{rank}-part-0.safetensors", (folder.parents[1] / key).stat().st_size] for rank in (0, 1)]
    assert job == {"what": f"tp 2 shards of {source}", "fingerprint": folder.name, "files": shards}
    shardtool.save(source, tmp_path / "out", tp=2)
    made: Manifest = decode((tmp_path / "out" / "shardtool.json").read_bytes(), "here")
    assert made.fingerprint == folder.name
    assert record["digest"] == blake3(record["record"].encode()).hexdigest()
    assert json.loads(record["record"]) == next(file.to_json() for file in made.files if file.key == key)
