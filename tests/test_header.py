"""Headers: ours are safetensors' own, byte for byte; those of others are read as text that nobody vouches for."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from shardtool.dtypes import DType
from shardtool.errors import FormatError
from shardtool.header import BIG, MAX_HEADER, PAGE, Entry, Header, encode, length, parse, sort_key
from tests.strategies import BYTE_DTYPES, file_tensors, names, shapes

Tensors = list[tuple[str, DType, tuple[int, ...]]]


def read(data: bytes) -> Header:
    """A whole file's header, as a reader meets it."""
    n = length(data[:8], len(data), "a.safetensors")
    return parse(data[8 : 8 + n], len(data), "a.safetensors")


def written(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """A file of zeros."""
    entries = encode(tensors, metadata)
    return entries + bytes(sum(DType.nbytes(dtype, _count(shape)) for _, dtype, shape in tensors))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


# What is written.


@given(file_tensors(), st.dictionaries(names(), st.text(st.characters(codec="utf-8")), max_size=3))
def test_what_is_written_is_read_back(tensors: Tensors, metadata: dict[str, str]):
    data = written(tensors, metadata)
    found = read(data)
    assert [(e.name, e.dtype, e.shape) for e in found.entries if e.nbytes] == [t for t in tensors if 0 not in t[2]]
    assert {(e.name, e.dtype, e.shape) for e in found.entries} == set(tensors)
    assert found.metadata == metadata
    assert found.data_offset % 8 == 0


@given(file_tensors())
def test_the_tensors_lie_next_to_each_other(tensors: Tensors):
    found = read(written(tensors))
    ends = [found.data_offset, *(e.offset + e.nbytes for e in found.entries)]
    assert [e.offset for e in found.entries] == ends[:-1]


IN_TORCH = [
    d for d in BYTE_DTYPES if hasattr(torch, d.torch_name or "-") and "FNUZ" not in d.name and d is not DType.C64
]


@st.composite
def torch_tensors(draw) -> dict[str, torch.Tensor]:
    """Tensors for safetensors to save: their bytes are all different, as far as bytes can be."""
    found = {}
    for name in draw(st.lists(names(), unique=True, min_size=1, max_size=8)):
        dtype, shape = draw(st.sampled_from(IN_TORCH)), draw(shapes(dims=3, most=4, smallest=0))
        nbytes = dtype.nbytes(_count(shape))
        most = 2 if dtype is DType.BOOL else 251
        octets = (torch.arange(nbytes) * 7 % most).to(torch.uint8)
        found[name] = octets.view(dtype.torch()).reshape(shape) if nbytes else torch.empty(shape, dtype=dtype.torch())
    return found


@given(torch_tensors(), st.sampled_from([None, {"format": "pt"}, {"a": 'quote " and \x7f \x01 é'}]))
def test_a_file_of_ours_is_the_file_that_safetensors_writes(tensors: dict[str, torch.Tensor], metadata):
    """Order, spelling, padding: for files without big tensors nothing differs."""
    theirs = safetensors.torch.save(tensors, metadata)
    by_name = {f"torch.{d.torch_name}": d for d in DType}
    ours = sorted(
        ((name, by_name[str(t.dtype)], tuple(t.shape)) for name, t in tensors.items()),
        key=lambda t: sort_key(t[0], t[1]),
    )
    start = len(encode(ours, metadata))
    assert theirs[:start] == encode(ours, metadata)
    data = b"".join(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, _, _ in ours)
    assert theirs[start:] == data


def test_safetensors_sorts_every_type_as_we_do():
    tensors = {d.name: torch.zeros(8, dtype=torch.uint8).view(d.torch()) for d in IN_TORCH}
    theirs = read(safetensors.torch.save(tensors))
    assert [e.name for e in theirs.entries] == [d.name for d in sorted(IN_TORCH, key=lambda d: sort_key(d.name, d))]


@given(st.integers(0, 5000), st.booleans(), st.integers(1, 200))
def test_safetensors_reads_our_padded_files_and_the_first_big_tensor_starts_a_page(n: int, second: bool, name: int):
    tensors: Tensors = [("small", DType.F64, (n,)), ("x" * name, DType.F32, (BIG // 4,))]
    tensors += [("y", DType.F32, (BIG // 4 + 1,))] if second else []
    data = written(tensors)
    found = read(data)
    assert found.entries[1].offset % PAGE == 0
    assert found.data_offset < 8 + len(json.dumps([found.entries[0].name] * 3)) + 2 * PAGE
    assert sorted(safetensors.torch.load(data)) == sorted(t[0] for t in tensors)


def test_a_big_tensor_behind_an_odd_number_of_bytes_leaves_the_header_on_a_multiple_of_eight():
    data = written([("odd", DType.U8, (3,)), ("big", DType.U8, (BIG,))])
    assert read(data).data_offset % 8 == 0
    assert len(safetensors.torch.load(data)) == 2


@pytest.mark.parametrize("tensors", [["a", "a"], ["__metadata__"]])
def test_names_that_a_header_cannot_hold_are_refused(tensors: list[str]):
    with pytest.raises(FormatError, match=tensors[0]):
        encode([(name, DType.U8, (1,)) for name in tensors], {"format": "pt"})


def test_a_header_that_would_be_too_long_is_refused():
    with pytest.raises(FormatError, match="use smaller parts"):
        encode([("n" * MAX_HEADER, DType.U8, (1,))])


# What others have written.


def hostile(table: Any, nbytes: int = 8, tail: bytes = b"") -> bytes:
    """A file with any header."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(nbytes) + tail


def tensor(**changes: Any) -> dict[str, Any]:
    """A header of one tensor, changed."""
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def two(first: tuple[int, int], second: tuple[int, int]) -> dict[str, Any]:
    """A header of two tensors of bytes."""
    return {
        name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]}
        for name, (a, b) in (("a", first), ("b", second))
    }


HUGE = 1 << 200
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "short": (b"\1\0\0", "3 bytes"),
    "length field huge": (b"\xff" * 8 + b"{}", "more than 100000000"),
    "header longer than the file": ((50).to_bytes(8, "little") + b"{}", "but the file has 10"),
    "no header": (hostile(b"", 0), "not JSON"),
    "not JSON": (hostile(b"{'t': 1}"), "not JSON"),
    "not UTF-8": (hostile(b'{"\xff": 1}'), "not JSON"),
    "a byte order mark": (hostile(b"\xef\xbb\xbf{}", 0), "not JSON"),
    "two documents": (hostile(b"{}{}", 0), "not JSON"),
    "deep nesting": (hostile(b'{"t":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "not JSON"),
    **{
        f"{depth} tables inside each other": (hostile(b'{"a":' * depth + b"1" + b"}" * depth), "damaged")
        for depth in (5, 900, *range(960, 1010))
    },
    "a number of many digits": (hostile(b'{"t":' + b"1" * 10_000 + b"}"), "not JSON"),
    "a list": (hostile([]), "not a table"),
    "a number": (hostile(7), "not a table"),
    "a name twice": (hostile(b'{"t":1,"t":2}'), "names 't' twice"),
    "a field twice": (hostile(b'{"t":{"dtype":"U8","dtype":"U8"}}'), "names 'dtype' twice"),
    "a name that is no text": (hostile(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "not text"),
    "metadata of numbers": (hostile({"__metadata__": {"a": 1}, **tensor()}), "__metadata__"),
    "metadata that is a list": (hostile({"__metadata__": ["a"], **tensor()}), "__metadata__"),
    "a tensor that is null": (hostile({"t": None}), "'t' lacks"),
    "a tensor that is a list": (hostile({"t": [1, 2]}), "'t' lacks"),
    "a tensor without dtype": (hostile({"t": {"shape": [2], "data_offsets": [0, 8]}}), "'t' lacks"),
    "one offset": (hostile(tensor(data_offsets=[0])), "'t' lacks"),
    "three offsets": (hostile(tensor(data_offsets=[0, 4, 8])), "'t' lacks"),
    "offsets that are text": (hostile(tensor(data_offsets="08")), "not sizes"),
    "an unknown dtype": (hostile(tensor(dtype="F128")), "unknown dtype 'F128'"),
    "a dtype that is a list": (hostile(tensor(dtype=["F32"])), "unknown dtype"),
    "a dtype that is null": (hostile(tensor(dtype=None)), "unknown dtype"),
    "a negative offset": (hostile(tensor(data_offsets=[-8, 0])), "not sizes"),
    "a float offset": (hostile(tensor(data_offsets=[0, 8.0])), "not sizes"),
    "a huge offset": (hostile(tensor(data_offsets=[HUGE, HUGE + 8])), "not sizes"),
    "a boolean side": (hostile(tensor(shape=[2, True])), "not sizes"),
    "a float side": (hostile(tensor(shape=[2.0])), "not sizes"),
    "NaN for a side": (hostile(tensor(shape=[float("nan")])), "not sizes"),
    "a negative side": (hostile(tensor(shape=[-1, -2])), "not sizes"),
    "a shape that is text": (hostile(tensor(shape="2")), "not sizes"),
    "a shape of many dimensions": (hostile(tensor(shape=[2] + [1] * 100)), "not sizes"),
    "a huge shape": (hostile(tensor(shape=[1 << 62] * 64)), "cannot have 8 bytes"),
    "offsets the wrong way": (hostile(tensor(data_offsets=[8, 0])), "cannot have -8 bytes"),
    "a shape of other bytes": (hostile(tensor(shape=[3])), "cannot have 8 bytes"),
    "half a byte": (hostile(tensor(dtype="F4", shape=[3], data_offsets=[0, 1]), 1), "cannot have 1 bytes"),
    "overlap": (hostile(two((0, 5), (4, 8))), "'b' overlaps"),
    "the same bytes": (hostile(two((0, 8), (0, 8))), "overlaps"),
    "an empty tensor inside another": (hostile(two((0, 8), (4, 4))), "'b' overlaps"),
    "a hole": (hostile(two((0, 3), (4, 8))), "'b' leaves a hole"),
    "a hole at the start": (hostile(two((1, 4), (4, 8))), "'a' leaves a hole"),
    "bytes behind the last tensor": (hostile(tensor(), 8, b"x"), "belong to no tensor"),
    "cut off": (hostile(tensor(), 7), "ends too early"),
}


@given(
    file_tensors().filter(bool), st.dictionaries(names(), st.text(st.characters(codec="utf-8")), max_size=3), st.data()
)
def test_a_key_that_is_said_twice_is_refused_wherever_it_stands(
    tensors: Tensors, metadata: dict[str, str], data: st.DataObject
):
    whole = written(tensors, metadata)
    n = length(whole[:8], len(whole), "a")
    table = json.loads(whole[8 : 8 + n])
    place = data.draw(st.sampled_from([None, *(key for key in table if table[key])]))
    key = data.draw(st.sampled_from(list(table if place is None else table[place])))
    ascii_only = data.draw(st.booleans())

    def text(value: Any, at: str | None) -> str:
        pairs = list(value.items())
        if at == place:
            pairs.insert(data.draw(st.integers(0, len(pairs))), (key, value[key]))
        said = [f"{json.dumps(k, ensure_ascii=ascii_only)}:{json.dumps(v, ensure_ascii=ascii_only)}" for k, v in pairs]
        return "{" + ",".join(said) + "}"

    if place is None:
        twice = text(table, None)
    else:
        marked = json.dumps({**table, place: "HERE"}, ensure_ascii=ascii_only)
        twice = text(table[place], place).join(marked.rsplit('"HERE"', 1))
    header = twice.encode()
    with pytest.raises(FormatError, match="twice"):
        parse(header, len(whole) - n + len(header), "a.safetensors")


@pytest.mark.parametrize(("data", "says"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(data: bytes, says: str):
    with pytest.raises(FormatError, match=r"^a\.safetensors") as caught:
        read(data)
    assert says in str(caught.value)
    str(caught.value).encode()  # it can be printed


@pytest.mark.parametrize(
    "table",
    [
        tensor(),
        {"__metadata__": None, **tensor()},
        {"__metadata__": {}, **tensor()},
        tensor(extra=1),
        two((0, 8), (8, 8)),
    ],
)
def test_what_is_unusual_but_sound_is_read(table: dict[str, Any]):
    assert read(hostile(table)).data_offset > 8


def test_a_tensor_of_types_narrower_than_a_byte_is_read():
    found = read(hostile(tensor(dtype="F4", shape=[4, 4])))
    assert found.entries == (Entry("t", DType.F4, (4, 4), found.data_offset, 8),)


VALID = written([("a", DType.F32, (2, 3)), ("b\n", DType.BF16, (5,)), ("c", DType.U8, (0, 2))], {"format": "pt"})
CHANGES = st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255))


@given(st.lists(CHANGES, min_size=1, max_size=4), st.integers(-20, 20))
@example([(8, 0)], 0)
def test_a_damaged_file_is_refused_or_read_and_nothing_else(changes: list[tuple[int, int]], longer: int):
    data = bytearray(VALID)
    for at, value in changes:
        data[at] = value
    data = data[:longer] if longer < 0 else data + bytes(longer)
    found = None
    with contextlib.suppress(FormatError):
        found = read(bytes(data))
    if found:
        assert all(0 <= e.offset <= e.offset + e.nbytes <= len(data) for e in found.entries)


def test_the_headers_of_real_files_are_read(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3, 4, dtype=torch.bfloat16), "s": torch.tensor(1.0)}, path)
    found = read(path.read_bytes())
    assert [(e.name, e.dtype, e.shape) for e in found.entries] == [("s", DType.F32, ()), ("w", DType.BF16, (3, 4))]
