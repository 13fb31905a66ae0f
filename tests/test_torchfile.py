"""Files of ``torch.save``, opened from their directory and their pickle: what torch wrote is read, the rest refused."""

from __future__ import annotations

import io
import re
import shlex
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardtool
from shardtool import stores, torchfile
from shardtool.checkpoint import open_checkpoint
from shardtool.dtypes import DType
from shardtool.errors import FormatError
from shardtool.header import Entry
from shardtool.torchread import read_header
from tests.builders import COUNTING, counted, flipped, places, put
from tests.servers import S3Server
from tests.torchfiles import evil, saved, unzipped, zipped

DTYPES = [dtype for dtype in DType if dtype.torch_name and dtype is not DType.F4]


def entries(data: bytes, name: str = "pytorch_model.bin") -> dict[str, Entry]:
    """The tensors of a file with these bytes."""
    with places() as place:
        store = stores.open_store(put(place("model"), {name: data}))
        return {entry.name: entry for entry in read_header(store, name, len(data)).entries}


def loaded(data: bytes, **options: Any) -> dict[str, torch.Tensor]:
    """What ``shardtool.load`` gives of such a file."""
    with places() as place:
        return shardtool.load(put(place("model"), {"pytorch_model.bin": data}), **options)


def octets(tensor: torch.Tensor) -> bytes:
    """A tensor's elements in row-major order."""
    if not tensor.numel():
        return b""
    own = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return bytes(own.flatten().view(torch.uint8).numpy())


@st.composite
def tables(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of any type, and views of them: slices, steps, transposes, repetitions, all over shared storages."""
    made: dict[str, torch.Tensor] = {}
    for i in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        count = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.randint(0, 2 if dtype is DType.BOOL else 256, (count,), dtype=torch.uint8)
        base = whole.view(dtype.torch()).reshape(shape) if count else torch.empty(shape, dtype=dtype.torch())
        made[f"{i}"] = torch.nn.Parameter(base, False) if draw(st.booleans()) else base
        for j in range(draw(st.integers(0, 3))):
            view = base
            for _ in range(draw(st.integers(0, 3))):
                view = viewed(draw, view)
            made[f"{i}.{j}"] = view
    return made


def viewed(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """One view of a tensor."""
    how = draw(st.sampled_from(["slice", "turn", "expand"]))
    if how == "expand" or not tensor.dim():
        return tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
    if how == "turn":
        return tensor.permute(*draw(st.permutations(range(tensor.dim()))))
    dim = draw(st.integers(0, tensor.dim() - 1))
    start = draw(st.integers(0, tensor.shape[dim]))
    return tensor[(slice(None),) * dim + (slice(start, None, draw(st.integers(1, 3))),)]


@given(tables())
def test_what_torch_saves_is_loaded_byte_for_byte(table: dict[str, torch.Tensor]):
    found = loaded(saved(table))
    assert found.keys() == table.keys()
    for name, tensor in table.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert octets(found[name]) == octets(tensor), name


def test_a_tensor_larger_than_the_memory_is_gathered_in_bands():
    base = torch.randn(700, 900)
    found = loaded(saved({"t": base.t(), "s": base[::7, 100:300]}), memory_limit="1MiB")
    assert torch.equal(found["t"], base.t())
    assert torch.equal(found["s"], base[::7, 100:300])


def test_contiguous_tensors_have_no_strides_and_lie_where_the_zip_has_them():
    data = saved({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, 4)[:, 1:]})
    found = entries(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert data[found["a"].offset :][:24] == archive.read("archive/data/0")
    assert (found["a"].strides, found["b"].strides) == (None, None)


@pytest.mark.parametrize("name", ["x", "", "a/b", "../../x", "é\n'", "__proto__"])
def test_names_are_just_names(name: str):
    assert entries(saved({name: torch.zeros(1)})).keys() == {name}


def test_a_zip_of_another_program_is_read_if_it_is_not_compressed():
    made = {"a": torch.randn(5), "b": torch.randn(2, 2)}
    assert torch.equal(loaded(zipped(unzipped(saved(made))))["b"], made["b"])


def test_opening_reads_no_tensor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(stores.SCHEMES, "counted", COUNTING)
    made = {f"model.layers.{i}.weight": torch.zeros(1 << 20, dtype=torch.uint8) for i in range(20)}
    with places() as place:
        uri = put(place("model"), {"pytorch_model.bin": saved(made)}).replace("memory", "counted")
        assert open_checkpoint(uri).entries().keys() == made.keys()
        assert counted(uri).bytes_read < 200_000


def test_a_bucket_is_read_in_the_same_way(bucket: str, s3_server: S3Server):
    made = {"a": torch.randn(50, 40), "b": torch.randn(3, 3).t()}
    uri = put(f"s3://{bucket}/model", {"pytorch_model.bin": saved(made)})
    found = shardtool.load(uri)
    assert all(torch.equal(found[name], made[name]) for name in made)
    assert shardtool.inspect(f"{uri}/pytorch_model.bin").tensors == 2


def test_a_directory_of_more_than_65535_records_and_of_zip64_is_read():
    zero = b"\0" * 8
    records = {f"data/{i}": zero for i in range(66_000)}
    table = saved({"a": torch.arange(2, dtype=torch.int32)})
    data = zipped({**unzipped(table), **records, "data/0": unzipped(table)["data/0"]})
    assert entries(data)["a"].nbytes == 8


def test_offsets_beyond_4_gib_are_read(tmp_path: Path):
    """A sparse file, made as ``torch.save`` makes it with tensors that nobody wrote."""
    path = tmp_path / "pytorch_model.bin"
    with torch.serialization.skip_data():
        torch.save({"big": torch.empty(5 << 30, dtype=torch.uint8), "last": torch.empty(3, 2).t()}, path)
    found = {e.name: e for e in open_checkpoint(path).files[0].header.entries}
    assert found["last"].offset > 5 << 30
    with path.open("r+b") as file:
        file.seek(found["last"].offset)
        file.write(struct.pack("<6f", 0, 1, 2, 3, 4, 5))
    assert found["last"].strides == (1, 2)
    with open_checkpoint(path).store as store:
        view = memoryview(bytearray(24))
        store.readinto(path.name, found["last"].offset, view)
    assert view.cast("f").tolist() == [0, 1, 2, 3, 4, 5]


# What is refused.


def refusal(data: bytes) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(FormatError) as caught:
        entries(data)
    text = str(caught.value)
    assert "pytorch_model.bin" in text
    assert "\n" not in text
    return text


ONE = saved({"a": torch.arange(4.0)})
RECORDS = unzipped(ONE)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"byteorder": b"big"}, "saved on a big-endian machine"),
        ({"byteorder": b"x" * 100}, "its record 'archive/byteorder' is 100 bytes"),
        ({"data.pkl": evil("posix", "system", "id")}, r"calls for 'posix\.system', .* nothing of it was run"),
        ({"data/0": b"\0" * 15}, "the storage of tensor 'a' is shorter than is said of it"),
        ({"data/0": None}, "it has no record 'data/0'"),
        ({"data.pkl": None}, r"a zip without a data\.pkl"),
        ({"DATA/0": b"x"}, "it has two records 'archive/data/0'|it has two records 'archive/DATA/0'"),
        ({"data.pkl": b"N."}, "holds a NoneType, not a table of tensors"),
        ({"data.pkl": b"]."}, "holds a list, not a table"),
    ],
)
def test_records_that_do_not_fit_are_refused(changed: dict[str, bytes | None], said: str):
    records = {name: data for name, data in {**RECORDS, **changed}.items() if data is not None}
    assert re.search(said, refusal(zipped(records)))


def test_a_compressed_or_encrypted_record_is_refused_by_name():
    assert "its record 'archive/byteorder' is compressed" in refusal(zipped(RECORDS, method=zipfile.ZIP_DEFLATED))
    encrypted = bytearray(ONE)
    at = encrypted.rindex(b"archive/data/0") - 46
    encrypted[at + 8] |= 1
    assert "its record 'archive/data/0' is encrypted" in refusal(bytes(encrypted))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ((0, (5,), (1,)), "takes elements beyond its storage"),
        ((1, (4,), (1,)), "takes elements beyond its storage"),
        ((0, (2, 2), (3, 1)), "takes elements beyond its storage"),
        ((1 << 62, (1,), (1,)), "takes elements beyond its storage"),
        ((0, (2, 3), (1, 1)), r"overlaps itself \(shape \[2, 3\], strides \[1, 1\]\); make it contiguous"),
        ((0, (1 << 62, 4), (0, 1)), "of which its tensors would make"),
        ((0, (1 << 62,) * 8, (0,) * 8), "of which its tensors would make"),
    ],
)
def test_views_that_leave_their_storage_or_come_to_too_much_are_refused(call: tuple[Any, ...], said: str):
    offset, shape, strides = call
    text = (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    )
    text += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ" + number(offset)
    for sizes in (shape, strides):
        text += b"(" + b"".join(map(number, sizes)) + b"t"
    assert re.search(said, refusal(zipped({**RECORDS, "data.pkl": text + b"tRs."})))


def number(n: int) -> bytes:
    """The instruction for a number."""
    return b"\x8a\x08" + n.to_bytes(8, "little")


def test_one_storage_of_two_types_is_refused():
    pickled = RECORDS["data.pkl"]
    both = saved({"a": torch.arange(4.0), "b": torch.arange(4, dtype=torch.int32)})
    data = unzipped(both)["data.pkl"].replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
    assert data != pickled
    assert "the storage of tensor 'b' has two types or sizes" in refusal(zipped({**RECORDS, "data.pkl": data}))


def test_two_records_of_one_name_or_place_are_refused():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in RECORDS.items():
            archive.writestr("archive/" + name, data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data/0", b"other bytes 16!!")
    assert "it has two records 'archive/data/0'" in refusal(out.getvalue())
    moved = bytearray(ONE)
    first, second = moved.rindex(b"archive/data/0") - 46, moved.rindex(b"archive/version") - 46
    moved[first + 42 : first + 46] = moved[second + 42 : second + 46]
    assert "two of its records lie in one place" in refusal(bytes(moved))


@pytest.mark.parametrize(
    ("at", "field", "value", "said"),
    [
        ("directory", 42, 10**8, "a record lies outside of it"),
        ("directory", 24, 10**6, "a record has two sizes"),
        ("directory", 0, 0, "its directory is cut off"),
        ("head", 0, 0, "its record 'archive/data/0' is not where the directory says"),
        ("head", 30, 0, "its record 'archive/data/0' is another one than the directory says"),
        ("head", 28, 0xFFFF, "its record 'archive/data/0' runs into what follows it"),
        ("end", 16, 5, "its directory is not where it should be"),
        ("end", 12, 5, r"its directory has 5 bytes for \d+ records"),
        ("end", 8, 99, "a part of a zip of several files"),
    ],
)
def test_a_directory_that_leads_astray_is_refused(at: str, field: int, value: int, said: str):
    data = bytearray(zipped(RECORDS))
    start = {"directory": data.rindex(b"archive/data/0") - 46, "head": data.index(b"archive/data/0") - 30}
    place = start.get(at, len(data) - 22) + field
    width = 2 if (at, field) in (("head", 28), ("end", 8)) else 4
    data[place : place + width] = value.to_bytes(width, "little")
    assert re.search(said, refusal(bytes(data)))


def test_a_directory_in_two_places_is_refused():
    data = bytearray(ONE)
    data[-22 + 16 : -22 + 20] = b"\x01\0\0\0"
    assert "its directory is said to be in two places" in refusal(bytes(data))


def test_any_cut_or_flipped_byte_gives_a_file_or_a_refusal():
    for n in range(0, len(ONE), 3):
        refusal(ONE[:n])
    for at in range(len(ONE)):
        try:
            found = entries(flipped(ONE, at, at % 8))
        except FormatError:
            continue
        assert all(0 <= e.offset <= e.offset + e.nbytes <= len(ONE) for e in found.values())


def test_a_pickle_or_directory_that_is_too_large_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch):
    data = saved({f"a{i}": torch.zeros(1) for i in range(5000)})
    assert len(entries(data)) == 5000
    monkeypatch.setattr(torchfile, "MAX_PICKLE", 10_000)
    assert "its record 'archive/data.pkl' is" in refusal(data)
    monkeypatch.setattr(torchfile, "MAX_DIRECTORY", 10_000)
    assert "its directory has" in refusal(data)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"a": torch.zeros(1), "epoch": 3}, "'epoch' is a number, and engines take tables of nothing but tensors"),
        ({"a": torch.zeros(1), "_extra_state": None}, "'_extra_state' is a NoneType"),
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, "has its tensors under 'state_dict', where engines do not"),
        ({"model": {"a": torch.zeros(1)}}, "has its tensors under 'model'"),
    ],
)
def test_tables_of_other_things_are_refused_with_the_command_that_converts_them(tmp_path: Path, table: Any, said: str):
    torch.save(table, tmp_path / "pytorch_model.bin")
    assert converted(tmp_path / "pytorch_model.bin", said).keys() == {"a"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", 'it\'s $HOME; "x".bin'])
def test_the_format_before_1_6_is_refused_with_the_command_that_converts_it(tmp_path: Path, name: str):
    base = torch.nn.Parameter(torch.randn(3, 4))
    torch.save({"a": base, "t": base.t()}, tmp_path / name, _use_new_zipfile_serialization=False)
    found = converted(tmp_path / name, r"format of torch\.save before 1\.6")
    assert torch.equal(found["t"], base.t())


def converted(path: Path, said: str) -> dict[str, torch.Tensor]:
    """What the command in a refusal makes of a file, run in its folder."""
    with pytest.raises(FormatError, match=said) as caught:
        open_checkpoint(path.parent)
    words = shlex.split(str(caught.value).partition("in its folder: ")[2])
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], cwd=path.parent, check=True)
    return shardtool.load(path.parent)


def test_the_tar_format_and_what_is_no_torch_file_are_refused():
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "can do harm to whoever loads it" in refusal(out.getvalue())
    assert "weights_only=False" in refusal(out.getvalue())
    for data in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04", ONE[:-1]):
        assert "is not a file of torch.save: it is no zip, or it is cut off" in refusal(data)
    assert "some other zip" in refusal(zipped({"a": b""}, folder=""))
