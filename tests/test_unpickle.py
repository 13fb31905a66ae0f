"""The pickle machine: tables of tensors come out as values, and nothing else comes in, runs, or takes much."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import tracemalloc
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardtool import unpickle
from shardtool.dtypes import DType
from shardtool.errors import FormatError
from shardtool.unpickle import Storage, View, loads
from tests import torchfiles

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


def pickled(value: object) -> bytes:
    """The ``data.pkl`` that ``torch.save`` writes of a value."""
    return torchfiles.unzipped(torchfiles.saved(value))["data.pkl"]


@given(PLAIN)
def test_plain_values_come_back(value: object):
    assert loads(pickle.dumps(value, protocol=2), "x") == value


def test_tensors_come_back_as_views_of_storages():
    base = torch.zeros(3, 5)
    found: Any = loads(pickled({"a": base, "b": base.t()[1:], "p": torch.nn.Parameter(torch.ones(2).half())}), "x")
    storage = Storage("0", DType.F32, 15)
    assert found == {
        "a": View(storage, DType.F32, 0, (3, 5), (5, 1)),
        "b": View(storage, DType.F32, 1, (4, 3), (1, 5)),
        "p": View(Storage("1", DType.F16, 2), DType.F16, 0, (2,), (1,)),
    }


@pytest.mark.parametrize("dtype", [d for d in DType if d.torch_name and d is not DType.F4])
def test_every_type_of_elements_is_known(dtype: DType):
    view: Any = loads(pickled(torch.zeros(4, dtype=dtype.torch())), "x")
    assert view.dtype is dtype
    assert view.storage.dtype.nbytes(view.storage.count) == dtype.nbytes(4)


def test_a_module_s_state_and_tensors_with_attributes_are_read():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = module.state_dict()
    found: Any = loads(pickled(state), "x")
    assert [(name, view.shape) for name, view in found.items()] == [(n, tuple(t.shape)) for n, t in state.items()]
    marked = torch.nn.Parameter(torch.zeros(2))
    marked.mark = 1  # type: ignore[attr-defined]
    assert isinstance(loads(pickled(marked), "x"), View)
    other = torch.zeros(2)
    other.mark = 1  # type: ignore[attr-defined]
    assert isinstance(loads(pickled(other), "x"), View)


class Run:
    """Pickles as a call of ``os.system``."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/shardtool-was-here",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Run(), protocol=2),
        torchfiles.evil("builtins", "eval", "1/0"),
        torchfiles.evil("builtins", "getattr", "x"),
        torchfiles.evil("torch", "load", "x"),
        torchfiles.evil("torch._utils", "_rebuild_qtensor", "x"),
        torchfiles.evil("torch.storage", "_load_from_bytes", "x"),
        torchfiles.evil("collections", "OrderedDict.__init__", "x"),
        pickle.dumps(Counter("a"), protocol=2),
        pickle.dumps(io.StringIO, protocol=2),
    ],
)
def test_what_is_no_part_of_a_tensor_is_refused_by_name(data: bytes):
    with pytest.raises(FormatError, match=r"its pickle calls for '[\w.]+', of which no table of tensors is made"):
        loads(data, "model.bin")
    assert not os.path.exists("/tmp/shardtool-was-here")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (torchfiles.evil("torch", "Size", "x"), r"calls 'torch\.Size' in a way that gives no tensor"),
        (torchfiles.evil("collections", "OrderedDict", "x"), "in a way that gives no tensor"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "instruction 0x81, which torch's weights-only loader does not take"),
        (pickle.dumps([1], protocol=4), "instruction 0x95"),
        (b"(" * 65, "nests more than 64 deep"),
        (b"N" * 70_000, "puts more than 65536 values into one"),
        (b"}K\x01Ns.", "names something by a value of type int instead of a text"),
        (b"})Ns.", "by a value of type tuple"),
        (b"]}b.", "gives attributes to something that is not a table"),
        (b"X\x01\x00\x00\x00aQ.", "refers to something outside of it that is not a storage"),
        (pickled({"c": torch.zeros(2, dtype=torch.complex64).conj()}), "conjugated or negated"),
        (b"", "makes no sense at byte 0"),
        (b"\x80\x02}", "makes no sense at byte 3"),
        (b"N", "makes no sense"),
        (b"0.", "instruction 0x30"),
        (b"NN.", "makes no sense"),
        (b"a.", "makes no sense"),
        (b"(a.", "makes no sense"),
        (b"N(\x85.", "makes no sense"),
        (b"t.", "makes no sense"),
        (b"h\x05.", "makes no sense"),
        (b"NNa.", "makes no sense"),
        (b"}(Nu.", "makes no sense"),
        (b"X\xff\xff\xff\xffabc.", "makes no sense"),
        (b"X\x03\x00\x00\x00\xed\xa0\x80.", "makes no sense"),  # half of a character
        (b"\x8a\xff" + b"\x01" * 255 + b".", "makes no sense"),
        (b"ctorch\nSize", "makes no sense"),
    ],
)
def test_pickles_that_make_no_sense_are_refused_in_one_sentence(data: bytes, said: str):
    with pytest.raises(FormatError, match=said) as caught:
        loads(data, "model.bin")
    assert str(caught.value).startswith("model.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [-1, True, 1 << 70, None, "3", 2.0])
@pytest.mark.parametrize("at", ["offset", "shape", "strides"])
def test_numbers_that_are_no_sizes_are_refused(bad: object, at: str):
    numbers: dict[str, Any] = {"offset": 0, "shape": (2,), "strides": (1,)}
    assert isinstance(unpickle._Machine(b"", "x").view(Storage("0", DType.F32, 2), DType.F32, **numbers), View)
    numbers[at] = bad if at == "offset" else (bad,)
    with pytest.raises(ValueError, match="not sizes"):
        unpickle._Machine(b"", "x").view(Storage("0", DType.F32, 2), DType.F32, **numbers)


@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from("(t)]aesu}NQRbhqKXc.\x85\x86\x87\x88\x89")).map("".join).map(str.encode)
)
def test_any_bytes_give_a_value_or_a_refusal(data: bytes):
    with contextlib.suppress(FormatError):
        loads(data, "x")


def test_every_prefix_of_a_pickle_is_refused():
    data = pickled(OrderedDict(a=torch.zeros(3, 4)))
    for n in range(len(data)):
        with pytest.raises(FormatError):
            loads(data[:n], "x")


def test_a_place_in_the_memo_takes_no_memory_before_it():
    tracemalloc.start()
    loads(b"Nr\xff\xff\xff\xff.", "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_number_of_instructions_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unpickle, "MAX_STEPS", 1000)
    assert loads(b"](" + b"N" * 996 + b"e.", "x") == [None] * 996
    with pytest.raises(FormatError, match="has more than 1000 instructions"):
        loads(b"](" + b"N" * 997 + b"e.", "x")
