"""Bytes that are not what they should be: damaged by accident, or made by somebody who wants harm.

Whatever a checkpoint says, an operation ends with one of shardtool's errors or a report, takes little memory, and
touches nothing outside of its output. Damage is found before a tensor is handed over and before anything is written.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blake3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardtool
from shardtool.errors import FormatError, Incomplete, IntegrityError, ShardtoolError
from tests import builders
from tests.processes import cli, run

MIB = 1 << 20
RANK0, RANK1 = "model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"
MANIFEST, INDEX = "shardtool.json", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in two files (``hf``) and its shards at tp 2 (``tp2``)."""
    made = tmp_path_factory.mktemp("hostile")
    config = builders.config(num_hidden_layers=1, vocab_size=70)
    builders.put(made / "hf", builders.model(config, builders.tensors(config), files=2))
    shardtool.save(made / "hf", made / "tp2", tp=2)
    return made


@pytest.fixture
def victim(shelf: Path, tmp_path: Path) -> Path:
    """Shards to damage."""
    return shutil.copytree(shelf / "tp2", tmp_path / "victim")


def one_sentence(error: BaseException) -> bool:
    """Whether a message can stand on a line of its own, and does not go on for ever."""
    text = str(error)
    return 0 < len(text) < 2000 and all(" " <= letter != "\x7f" for letter in text)


def handed_over(folder: Path, rank: int | None = None) -> tuple[dict[str, bytes], ShardtoolError | None]:
    """The tensors that a stream gives before it ends, and how it ended."""
    found = {}
    try:
        for name, tensor in shardtool.stream(folder, rank=rank):
            found[name] = bytes(tensor.contiguous().flatten().view(dtype=__import__("torch").uint8).numpy())
    except ShardtoolError as error:
        return found, error
    return found, None


def assert_refused_before_writing(folder: Path, out: Path, *kinds: type[ShardtoolError]) -> None:
    """Neither ``reshard`` nor ``merge`` leaves a byte behind."""
    for operation in (lambda: shardtool.reshard(folder, out, tp=4), lambda: shardtool.merge(folder, out)):
        with pytest.raises(kinds or IntegrityError) as caught:
            operation()
        assert one_sentence(caught.value)
        assert not out.exists() or not any(out.iterdir())


# Damage.


def layout_of(data: bytes) -> dict[str, int]:
    """A byte of every region of a shard."""
    n = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + n]
    used = len(text.rstrip())
    return {
        "the length, low byte": 0,
        "the length, high byte": 7,
        "the first brace": 8,
        "a name": 8 + text.index(b"_proj") + 2,
        "a dtype": 8 + text.index(b"BF16"),
        "a shape": 8 + text.index(b'"shape":[') + 9,
        "an offset": 8 + text.index(b'"data_offsets":[') + 16,
        "the last brace": 8 + used - 1,
        **({"the padding": 8 + used} if used < n else {}),
        "the first byte of data": 8 + n,
        "the middle of the data": 8 + n + (len(data) - 8 - n) // 2,
        "the last byte": len(data) - 1,
    }


REGIONS = (
    "the length, low byte",
    "the length, high byte",
    "the first brace",
    "a name",
    "a dtype",
    "a shape",
    "an offset",
    "the last brace",
    "the padding",
    "the first byte of data",
    "the middle of the data",
    "the last byte",
)


@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_bit_is_found_wherever_it_is(shelf: Path, victim: Path, tmp_path: Path, region: str) -> None:
    """``verify`` names the file, ``load`` stops before the tensor, ``reshard`` and ``merge`` leave nothing."""
    path = victim / RANK1
    data = path.read_bytes()
    where = layout_of(data)
    if region == "the padding" and region not in where:  # every header has some but for one in eight
        where[region] = where["the last brace"]
    path.write_bytes(builders.flipped(data, where[region]))
    report = shardtool.verify(victim)
    assert report.exit_code == 1
    assert [check.key for check in report.files if not check.ok and check.key != "checkpoint"] == [RANK1]
    whole, _ = handed_over(shelf / "tp2", 1)
    found, error = handed_over(victim, 1)
    assert isinstance(error, IntegrityError)
    assert RANK1 in str(error)
    assert found.items() <= whole.items()
    assert found == {} or "byte" in region or "data" in region
    assert handed_over(victim, 0)[1] is None, "the other rank is whole"
    assert_refused_before_writing(victim, tmp_path / "out")
    done = cli("verify", victim)
    assert done.returncode == 1
    assert "FAILED" in done.stdout + done.stderr
    assert RANK1 in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@given(data=st.data())
@settings(max_examples=60)
def test_any_flipped_bit_is_found(shelf: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any bit of any shard, of the manifest and of config.json."""
    victim = tmp_path_factory.mktemp("flip") / "victim"
    shutil.copytree(shelf / "tp2", victim)
    try:
        path = victim / data.draw(st.sampled_from([RANK0, RANK1, MANIFEST, "config.json"]))
        text = path.read_bytes()
        path.write_bytes(builders.flipped(text, data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 7))))
        report = shardtool.verify(victim)
        assert report.exit_code == 1
        if path.name != MANIFEST:
            assert path.name in [check.key for check in report.files if not check.ok]
        if path.suffix == ".safetensors":
            found, error = handed_over(victim, int(path.name == RANK1))
            assert isinstance(error, IntegrityError)
            assert found.items() <= handed_over(shelf / "tp2", int(path.name == RANK1))[0].items()
    finally:
        shutil.rmtree(victim)


@pytest.mark.parametrize("change", [-1, -1000, 1, 4096, "empty", "gone"])
def test_a_shard_of_another_size(victim: Path, tmp_path: Path, change: int | str) -> None:
    """Shorter, longer, empty or gone: found from sizes alone."""
    path = victim / RANK0
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "empty":
        path.write_bytes(b"")
    else:
        assert isinstance(change, int)
        path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    for quick in (False, True):
        report = shardtool.verify(victim, quick=quick)
        assert report.exit_code == (4 if change == "gone" else 1)
        assert RANK0 in [check.key for check in report.files if not check.ok]
    found, error = handed_over(victim, 0)
    assert found == {}
    assert isinstance(error, IntegrityError | Incomplete)
    assert_refused_before_writing(victim, tmp_path / "out", IntegrityError, Incomplete)


def test_headers_that_exchange_two_tensors(victim: Path, tmp_path: Path) -> None:
    """The bytes are all there and every digest of a tensor fits, only the names are exchanged."""
    path = victim / RANK0
    data = path.read_bytes()
    for a, b in (("input_layernorm", "post_attention_layernorm"),):
        n = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + n])
        first, second = f"model.layers.0.{a}.weight", f"model.layers.0.{b}.weight"
        table[first], table[second] = table[second], table[first]
        text = json.dumps(table, separators=(",", ":")).encode().ljust(n)
        path.write_bytes(data[:8] + text + data[8 + n :])
    assert shardtool.verify(victim).exit_code == 1
    found, error = handed_over(victim, 0)
    assert found == {}
    assert isinstance(error, IntegrityError)
    assert_refused_before_writing(victim, tmp_path / "out")


def test_a_header_that_turns_a_tensor(victim: Path, tmp_path: Path) -> None:
    """The same bytes under another shape: only the header's own digest can tell."""
    path = victim / RANK0
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + n])
    entry = table["model.layers.0.mlp.down_proj.weight"]
    entry["shape"].reverse()
    path.write_bytes(data[:8] + json.dumps(table, separators=(",", ":")).encode().ljust(n) + data[8 + n :])
    assert shardtool.verify(victim).exit_code == 1
    found, error = handed_over(victim, 0)
    assert found == {}
    assert isinstance(error, IntegrityError)
    assert_refused_before_writing(victim, tmp_path / "out")


# Hostile headers of a source.


def safetensors(table: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: Any = 0, end: Any = 8, shape: Any = (4,), dtype: Any = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


EIGHT = bytes(8)
HEADERS: dict[str, bytes] = {
    "an empty file": b"",
    "seven bytes": bytes(7),
    "a length beyond all files": b"\xff" * 8,
    "a header of 100 MB in a small file": safetensors({}, length=100_000_000),
    "a header longer than the format allows": safetensors({}, length=100_000_001),
    "no JSON": safetensors(b"{" * 50),
    "no text": safetensors(b"\xff\xfe\x00\x01"),
    "half a character": safetensors(b'{"\\ud800":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}', EIGHT),
    "a list": safetensors([1, 2]),
    "a number": safetensors(7),
    "a deep nest": safetensors(b"[" * 200_000),
    "a deep nest of tables": safetensors(b'{"a":' * 200_000),
    "a name twice": safetensors(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
        EIGHT,
    ),
    "overlapping tensors": safetensors({"a": entry(), "b": entry(4, 12)}, bytes(12)),
    "two tensors in one place": safetensors({"a": entry(), "b": entry()}, EIGHT),
    "a hole": safetensors({"a": entry(), "b": entry(16, 24)}, bytes(24)),
    "bytes behind the last tensor": safetensors({"a": entry()}, bytes(9)),
    "too few bytes": safetensors({"a": entry()}, bytes(7)),
    "a negative offset": safetensors({"a": entry(-8, 0)}, EIGHT),
    "an end before its start": safetensors({"a": entry(8, 0)}, EIGHT),
    "a negative dimension": safetensors({"a": entry(shape=(-2, -2))}, EIGHT),
    "a giant dimension": safetensors({"a": entry(shape=(1 << 62, 1 << 62))}, EIGHT),
    "a dimension of a thousand digits": safetensors({"a": entry(shape=(10**1000,))}, EIGHT),
    "a giant offset": safetensors({"a": entry(0, 1 << 70)}, EIGHT),
    "a thousand dimensions": safetensors({"a": entry(shape=(4, *[1] * 1000))}, EIGHT),
    "a fractional dimension": safetensors({"a": entry(shape=(4.0,))}, EIGHT),
    "a dimension that is true": safetensors({"a": entry(shape=(4, True))}, EIGHT),
    "a shape that is a text": safetensors({"a": entry(shape="4")}, EIGHT),
    "an unknown dtype": safetensors({"a": entry(dtype="Q4")}, EIGHT),
    "a dtype that is a list": safetensors({"a": entry(dtype=["BF16"])}, EIGHT),
    "no offsets": safetensors({"a": {"dtype": "BF16", "shape": [4]}}, EIGHT),
    "three offsets": safetensors({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 4, 8]}}, EIGHT),
    "a tensor that is a number": safetensors({"a": 5}, EIGHT),
    "metadata that is a list": safetensors({"__metadata__": [1], "a": entry()}, EIGHT),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "a": entry()}, EIGHT),
    "not a number": safetensors(b'{"a":{"dtype":"BF16","shape":[NaN],"data_offsets":[0,8]}}', EIGHT),
    "an integer of a hundred thousand digits": safetensors(b'{"a":' + b"9" * 100_000 + b"}"),
}


def model_with(folder: Path, data: bytes) -> Path:
    config = builders.config(num_hidden_layers=1)
    builders.put(folder, {"config.json": json.dumps(config).encode(), "model.safetensors": data})
    return folder


@pytest.mark.parametrize("header", HEADERS)
def test_a_hostile_header_is_refused(tmp_path: Path, header: str) -> None:
    """Every operation that opens the file says in one sentence which file it is, and writes nothing."""
    model, out = model_with(tmp_path / "model", HEADERS[header]), tmp_path / "out"
    operations: dict[str, Callable[[], Any]] = {
        "save": lambda: shardtool.save(model, out, tp=1),
        "inspect": lambda: shardtool.inspect(model),
        "inspect a file": lambda: shardtool.inspect(f"{model}/model.safetensors"),
        "load": lambda: shardtool.load(model),
    }
    for operation in operations.values():
        with pytest.raises(FormatError, match=r"model\.safetensors") as caught:
            operation()
        assert one_sentence(caught.value)
    assert not out.exists()
    assert shardtool.verify(model).exit_code == 1


NAMES = ("../../escape", "/etc/passwd", "a\x00b", "\x1b[2J\x1b[31mred", "line\nbreak", "", "\u202egnp.exe", "x" * 5000)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tensors_are_only_names(tmp_path: Path, name: str) -> None:
    """A tensor may have any name: it never becomes a path, and what people see of it is printable."""
    model, out = model_with(tmp_path / "model", safetensors({name: entry()}, EIGHT)), tmp_path / "out"
    assert list(shardtool.load(model)) == [name]
    assert shardtool.inspect(model).tensors == 1
    with pytest.raises(ShardtoolError) as caught:
        shardtool.save(model, out, tp=1)
    assert one_sentence(caught.value) or name == "x" * 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    done = cli("inspect", model, "--tensors", "*")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "\x00" not in done.stdout


@pytest.mark.parametrize(
    "text", [b" " * (99 * MIB), b"[" * (8 * MIB), b'{"a":' * (2 * MIB)], ids=["blank", "nest", "tables"]
)
def test_a_real_giant_header_takes_bounded_memory(tmp_path: Path, text: bytes) -> None:
    """A header may have 100 MB, of which a few copies are held at most; nonsense ends quickly."""
    model = model_with(tmp_path / "model", safetensors(text))
    found = run("inspect", model)
    assert found.error == "FormatError"
    assert found.over < 4 * len(text) + 64 * MIB


def test_a_claim_of_100_mb_takes_no_memory(tmp_path: Path) -> None:
    """What a length field says is compared with the file's size first."""
    for claim in (99_999_999, 1 << 63):
        model = model_with(tmp_path / f"{claim}", safetensors({}, bytes(1000), length=claim))
        for operation, args in (("inspect", []), ("stream", []), ("save", [tmp_path / "out"])):
            found = run(operation, model, *args, **({"tp": 1} if operation == "save" else {}))
            assert found.error == "FormatError"
            assert found.over < 8 * MIB


WEIRD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2, 1 << 31, 1 << 63, 1 << 70, 10**30]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["..", "../x", "/etc/passwd", "{i}", "{0.__class__}", "\x00", "BF16", "a/../b", "\ud800"]),
    st.lists(st.integers(-2, 3), max_size=3),
    st.sampled_from([{}, {"a": 1}, [[0, 1 << 40]], [[0, 5], [3, 4]], [[1, 0]], [[]], [{}], [None]]),
)


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of JSON values."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from paths_of(value[key], (*at, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from paths_of(item, (*at, i))


def changed(value: Any, path: tuple[Any, ...], to: Any, how: str = "set") -> Any:
    """A copy with the part at ``path`` set, removed or doubled."""
    if not path:
        return to
    made = copy.deepcopy(value)
    place = made
    for key in path[:-1]:
        place = place[key]
    if how == "set":
        place[path[-1]] = to
    elif how == "remove":
        del place[path[-1]]
    elif isinstance(place, list):
        place.append(place[path[-1]])
    else:
        place[f"{path[-1]}2"] = place[path[-1]]
    return made


def all_fail_well(*operations: Callable[[], Any]) -> None:
    """None of them ends in anything but success or one of shardtool's errors."""
    for operation in operations:
        try:
            operation()
        except ShardtoolError as error:
            found = error
        else:
            continue
        assert one_sentence(found), repr(str(found))


@given(data=st.data())
@settings(max_examples=80)
def test_any_change_of_a_header_fails_well(
    shelf: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One value of a true header is replaced by another, removed or doubled."""
    folder = tmp_path_factory.mktemp("header")
    try:
        model, out = folder / "model", folder / "out"
        shutil.copytree(shelf / "hf", model)
        path = model / "model-00001-of-00002.safetensors"
        text = path.read_bytes()
        n = int.from_bytes(text[:8], "little")
        table = json.loads(text[8 : 8 + n])
        where = data.draw(st.sampled_from(list(paths_of(table))))
        made = changed(table, where, data.draw(WEIRD), data.draw(st.sampled_from(["set", "set", "remove", "double"])))
        path.write_bytes(safetensors(made, text[8 + n :]))
        all_fail_well(
            lambda: shardtool.inspect(model, tensors="*"),
            lambda: shardtool.load(model),
            lambda: shardtool.verify(shelf / "tp2", against=model),
            lambda: shardtool.verify(model, against=shelf / "hf"),
            lambda: shardtool.save(model, out, tp=2),
        )
        assert {path.name for path in folder.iterdir()} <= {"model", "out"}
    finally:
        shutil.rmtree(folder)


# Hostile manifests.


def canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")


def signed(table: Any) -> bytes:
    """A manifest whose digest fits what it says, whatever that is; said once more without the package."""
    if not isinstance(table, dict):
        return canonical(table)
    table = {key: value for key, value in table.items() if key != "digest"}
    full = {**table, "digest": blake3.blake3(canonical(table)).hexdigest()}
    lines = [json.dumps(key).encode() + b": " + canonical(value) for key, value in full.items()]
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def manifest_of(shelf: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((shelf / "tp2" / MANIFEST).read_bytes())
    return table


def test_a_manifest_is_signed_as_this_module_thinks(shelf: Path) -> None:
    """Otherwise the tests below would only test the digest."""
    assert signed(manifest_of(shelf)) == (shelf / "tp2" / MANIFEST).read_bytes()


def fused(table: dict[str, Any]) -> int:
    """The number of the recipe's rule for qkv_proj, which has pieces with windows."""
    return next(i for i, rule in enumerate(table["recipe"]) if "qkv_proj" in rule["name"])


def layered(table: dict[str, Any]) -> int:
    return next(i for i, entry in enumerate(table["source"]["tensors"]) if "i" in entry)


Path_ = tuple[Any, ...]
PIECE: Path_ = ("recipe", fused, "shares", 0, "pieces", 0)
HOSTILE: dict[str, tuple[Path_, Any]] = {
    **{
        f"a shard called {key!r}": (("files", 0, "key"), key)
        for key in ("../x", "/etc/x", "a/../../x", "a\\b", "", "a//b")
    },
    **{f"a side file called {key!r}": (("side_files", 0, "key"), key) for key in ("../x", "/etc/x", "..", ".", "a\0b")},
    "a side file in shardtool's place": (("side_files", 0, "key"), ".shardtool/x"),
    "a side file called as the manifest": (("side_files", 0, "key"), MANIFEST),
    "a side file called as a shard": (("side_files", 0, "key"), RANK0),
    "a side file called as weights": (("side_files", 0, "key"), "model-00001-of-00001.safetensors"),
    "a side file called as an index": (("side_files", 0, "key"), INDEX),
    "two shards of one name": (("files", 0, "key"), RANK1),
    "a shard that is a note": (("files", 0, "key"), "notes.txt"),
    "a shard in shardtool's place": (("files", 0, "key"), ".shardtool/x.safetensors"),
    "no ranks": (("parallel", "tp"), 0),
    "a negative tp": (("parallel", "tp"), -2),
    "a giant tp": (("parallel", "tp"), 1 << 40),
    "a tp that is true": (("parallel", "tp"), True),
    "a giant pp": (("parallel", "pp"), 1 << 40),
    "a rank that is not": (("files", 0, "rank"), 2),
    "a giant rank": (("files", 0, "rank"), 1 << 40),
    "a negative size": (("files", 0, "size"), -1),
    "a giant part": (("files", 0, "part"), 1 << 70),
    "a digest that is none": (("files", 0, "digest"), "xyz"),
    "a digest too long": (("files", 0, "header"), "0" * 65),
    "chunks of another size": (("chunk",), 1),
    "billions of ranks": (("recipe", fused, "shares", 0, "ranks"), [[0, 3_000_000_000]]),
    "a million ranks": (("recipe", fused, "shares", 0, "ranks"), [[0, 1_000_000]]),
    "ranks backwards": (("recipe", fused, "shares", 0, "ranks"), [[1, 0]]),
    "ranks that are texts": (("recipe", fused, "shares", 0, "ranks"), [["0", "1"]]),
    "a rank beyond the last": (("recipe", fused, "shares", 0, "ranks"), [[0, 3]]),
    "a rank in two shares": (("recipe", fused, "shares", 0, "ranks"), [[0, 2]]),
    "billions of layers": (("source", "tensors", layered, "i"), [[0, 3_000_000_000]]),
    "layers of a rule without end": (("recipe", fused, "i"), [[0, 1 << 60]]),
    "a window before its target": ((*PIECE, "to", 0), -1),
    "a window beyond its target": ((*PIECE, "to", 0), 10**6),
    "a window with a giant stride": ((*PIECE, "to", 1), 1 << 59),
    "a window before its source": ((*PIECE, "from", 0), -1),
    "a window beyond its source": ((*PIECE, "from", 0), 10**6),
    "a window with a stride out of its source": ((*PIECE, "from", 1), 1 << 30),
    "a window with a negative stride": ((*PIECE, "from", 1), -1),
    "a window of a giant shape": ((*PIECE, "shape"), [1 << 59, 1 << 59]),
    "windows of two shapes": ((*PIECE, "shape"), [1]),
    "a window of a thousand dimensions": ((*PIECE, "shape"), [1] * 1000),
    "a fraction in a window": ((*PIECE, "to", 0), 0.5),
    "an infinite fill": (("recipe", fused, "shares", 0, "fill"), "Infinity"),
    "a target of a giant shape": (("recipe", fused, "shares", 0, "shape"), [1 << 59, 1 << 59, 1 << 59]),
    "a target of many dimensions": (("recipe", fused, "shares", 0, "shape"), [1] * 100_000),
    "an unknown dtype": (("dtype",), "Q4"),
    "a source of a giant shape": (("source", "tensors", 0, "shape"), [1 << 62] * 64),
    "a source of negative shape": (("source", "tensors", 0, "shape"), [-1]),
    "an inventory that is a table": (("source", "tensors"), {"a": 1}),
    "copies that are a list": (("source", "copies"), [["a", "b"]]),
    "copies of lists": (("source", "copies"), {"a": ["b"]}),
    "a layout that is a list": (("layout",), []),
    "amendments that are a list": (("amendments",), [1]),
    "a config that is a table": (("config",), {}),
    "a pattern that asks for attributes": (("pattern",), "{rank.__class__}.safetensors"),
    "a pattern that leaves": (("pattern",), "../{rank}.safetensors"),
    "a pattern that is endless": (("pattern",), "{rank:999999999}.safetensors"),
    "a later format": (("format",), "shardtool/99"),
    "another format": (("format",), "other/1"),
}


def placed(table: Any, path: Path_) -> Path_:
    """The path with its functions of the table answered."""
    return tuple(part(table) if callable(part) else part for part in path)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused(shelf: Path, victim: Path, tmp_path: Path, case: str) -> None:
    """Its digest fits, what it says does not: no operation believes it, and none writes."""
    table = manifest_of(shelf)
    path, to = HOSTILE[case]
    (victim / MANIFEST).write_bytes(signed(changed(table, placed(table, path), to)))
    out = tmp_path / "out"
    operations: tuple[Callable[[], Any], ...] = (
        lambda: shardtool.inspect(victim),
        lambda: shardtool.load(victim, rank=0),
        lambda: shardtool.reshard(victim, out, tp=1),
        lambda: shardtool.merge(victim, out),
    )
    for operation in operations:
        with pytest.raises(FormatError, match=MANIFEST) as caught:
            operation()
        assert one_sentence(caught.value)
    report = shardtool.verify(victim)
    assert report.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim"]


@pytest.mark.parametrize("part", ["files", "recipe", "side_files"])
def test_a_manifest_that_lists_nothing_is_no_complete_checkpoint(
    shelf: Path, victim: Path, tmp_path: Path, part: str
) -> None:
    """It can be read, but ``verify`` misses what is not there, and nothing is made of it."""
    (victim / MANIFEST).write_bytes(signed(changed(manifest_of(shelf), (part,), [])))
    if part != "side_files":
        assert shardtool.verify(victim).exit_code != 0
        with pytest.raises(ShardtoolError) as caught:
            shardtool.merge(victim, tmp_path / "out")
        assert one_sentence(caught.value)
        assert not (tmp_path / "out").exists()


BOMBS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a long name for each of a million layers": lambda table: changed(
        table,
        ("source", "tensors", 0),
        {"name": "{i}." + "x" * 100_000, "i": [[0, 1_000_000]], "dtype": "BF16", "shape": [1]},
    ),
    "a million ranks in each of many rules": lambda table: changed(
        table,
        ("recipe",),
        [
            {"name": f"t{i}", "dtype": "BF16", "shares": [{"ranks": [[0, 1_000_000]], "shape": [1], "pieces": []}]}
            for i in range(2000)
        ],
    ),
    "a million layers in each of many rules": lambda table: changed(
        table,
        ("recipe",),
        [{"name": "t{i}" + str(i), "dtype": "BF16", "i": [[0, 1_000_000]], "shares": []} for i in range(2000)],
    ),
    "many inventories of a million": lambda table: changed(
        table,
        ("source", "tensors"),
        [{"name": f"a{n}.{{i}}.b", "i": [[0, 1_000_000]], "dtype": "BF16", "shape": [1]} for n in range(2000)],
    ),
    "a nest": lambda table: changed(table, ("layout",), {"a": {}}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_manifest_cannot_ask_for_much_memory(shelf: Path, victim: Path, bomb: str) -> None:
    """What its runs and names expand to is counted before it is made."""
    text = signed(BOMBS[bomb](manifest_of(shelf)))
    if bomb == "a nest":
        text = text.replace(b'{"a":{}}', b'{"a":' * 200_000)
    (victim / MANIFEST).write_bytes(text)
    found = run("stream", victim, rank=0)
    assert found.error == "FormatError"
    assert found.over < 64 * MIB


@given(data=st.data())
@settings(max_examples=150)
def test_any_change_of_a_manifest_fails_well(
    shelf: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One value is replaced, removed or doubled, and the digest made to fit."""
    folder = tmp_path_factory.mktemp("manifest")
    try:
        victim, out = folder / "victim", folder / "out"
        shutil.copytree(shelf / "tp2", victim)
        table = manifest_of(shelf)
        seed = data.draw(st.integers(0, 1 << 30))
        chosen = random.Random(seed)
        top = chosen.choice(sorted(table))  # the digests are many, and one is like another
        where = (top, *chosen.choice(list(paths_of(table[top]))))
        to = data.draw(WEIRD)
        how = data.draw(st.sampled_from(["set", "set", "set", "remove", "double"]))
        (victim / MANIFEST).write_bytes(signed(changed(table, where, to, how)))
        all_fail_well(
            lambda: shardtool.inspect(victim, tensors="*"),
            lambda: shardtool.load(victim, rank=0),
            lambda: shardtool.verify(victim),
            lambda: shardtool.verify(victim, against=shelf / "hf"),
            lambda: shardtool.merge(victim, out, overwrite=True),
            lambda: shardtool.reshard(victim, out, tp=1, overwrite=True),
        )
        assert {path.name for path in folder.iterdir()} <= {"victim", "out"}
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("key", ["../precious.safetensors", "notes.txt", "/precious.safetensors"])
def test_overwriting_believes_no_hostile_manifest(shelf: Path, victim: Path, tmp_path: Path, key: str) -> None:
    """What lies outside of the output, or is no shard, is not removed because a manifest lists it."""
    precious = tmp_path / "precious.safetensors"
    precious.write_text("precious")
    (victim / "notes.txt").write_text("precious")
    table = manifest_of(shelf)
    (victim / MANIFEST).write_bytes(signed(changed(table, ("files", 0, "key"), key)))
    shardtool.save(shelf / "hf", victim, tp=1, overwrite=True)
    assert precious.read_text() == "precious"
    assert (victim / "notes.txt").read_text() == "precious"


def test_writing_stays_inside_of_the_output(shelf: Path, tmp_path: Path) -> None:
    """A link in the output that leads elsewhere is not followed when files are written or removed."""
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    (elsewhere / RANK0).write_text("precious")
    out.mkdir()
    (out / "sub").symlink_to(elsewhere)
    with pytest.raises(ShardtoolError, match="link"):
        shardtool.save(shelf / "hf", out, tp=2, pattern="sub/model-rank-{rank}-part-{part}.safetensors", overwrite=True)
    assert [path.name for path in elsewhere.iterdir()] == [RANK0]
    assert (elsewhere / RANK0).read_text() == "precious"


# Hostile indexes and configs.


INDEXES: dict[str, Any] = {
    "a path that leaves": {"weight_map": {"a": "../model.safetensors"}},
    "an absolute path": {"weight_map": {"a": "/etc/passwd"}},
    "a backslash": {"weight_map": {"a": "..\\x.safetensors"}},
    "a number": {"weight_map": {"a": 1}},
    "no map": {"metadata": {}},
    "a map that is a list": {"weight_map": [1]},
    "a list": [1],
    "a tensor that is not there": {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
    "a file that is no weights": {"weight_map": {"a": "config.json"}},
    "itself": {"weight_map": {"a": INDEX}},
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_hostile_index_is_refused(shelf: Path, tmp_path: Path, case: str) -> None:
    """It decides which files are read, but only among those that are there."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(shelf / "hf", model)
    (model / INDEX).write_text(json.dumps(INDEXES[case]))
    for operation in (
        lambda: shardtool.save(model, out, tp=1),
        lambda: shardtool.load(model),
        lambda: shardtool.inspect(model),
    ):
        with pytest.raises(FormatError) as caught:
            operation()
        assert one_sentence(caught.value)
    assert not out.exists()


@given(data=st.data())
@settings(max_examples=100)
def test_any_change_of_a_config_or_an_index_fails_well(
    shelf: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One value is replaced, removed or doubled."""
    folder = tmp_path_factory.mktemp("config")
    try:
        model, out = folder / "model", folder / "out"
        shutil.copytree(shelf / "hf", model)
        path = model / data.draw(st.sampled_from(["config.json", INDEX]))
        table = json.loads(path.read_bytes())
        where = data.draw(st.sampled_from(list(paths_of(table))))
        to, how = data.draw(WEIRD), data.draw(st.sampled_from(["set", "set", "remove", "double"]))
        path.write_bytes(json.dumps(changed(table, where, to, how)).encode())
        all_fail_well(
            lambda: shardtool.inspect(model),
            lambda: shardtool.load(model),
            lambda: shardtool.save(model, out, tp=2),
            lambda: shardtool.verify(model),
        )
        assert {path.name for path in folder.iterdir()} <= {"model", "out"}
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"[" * 200_000, b"{" + b'"a":{' * 100_000, b"9" * 100_000])
@pytest.mark.parametrize("name", ["config.json", INDEX, MANIFEST])
def test_texts_that_are_nothing(shelf: Path, tmp_path: Path, name: str, text: bytes) -> None:
    """Empty, not text, not a table, too deep: one sentence that names the file."""
    model = tmp_path / "model"
    shutil.copytree(shelf / ("tp2" if name == MANIFEST else "hf"), model)
    (model / name).write_bytes(text)
    with pytest.raises(FormatError, match=re.escape(name)) as caught:
        shardtool.save(model, tmp_path / "out", tp=2)
    assert one_sentence(caught.value)
    assert os.listdir(tmp_path) == ["model"]
