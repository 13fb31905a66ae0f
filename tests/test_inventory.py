"""Inventories: what is folded is unfolded, and names that look like a slot are not confused with one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.dtypes import DType
from shardtool.inventory import MOST_TENSORS, pack, unpack
from shardtool.mosaic import Logical

NAMES = st.text(st.sampled_from("ab.01{i}é"), min_size=1, max_size=10)
TENSORS = st.builds(Logical, st.sampled_from([DType.BF16, DType.F8_E4M3]), st.sampled_from([(), (2,), (2, 3)]))


@given(st.dictionaries(NAMES, TENSORS))
def test_what_is_packed_is_unpacked(inventory: dict[str, Logical]):
    assert unpack(json.loads(json.dumps(pack(inventory)))) == dict(sorted(inventory.items()))


def test_layers_are_folded_and_names_that_look_like_it_are_not_confused():
    inventory = {
        **{f"m.{i}.w": Logical(DType.F32, (2,)) for i in (0, 1, 2, 5)},
        "m.3.w": Logical(DType.F32, (3,)),
        "m.007.w": Logical(DType.F32, (2,)),
        "m.{i}.w": Logical(DType.F32, (2,)),
        "m.1": Logical(DType.F32, (2,)),
        "1.m": Logical(DType.F32, (2,)),
        "m.0.w.4.b": Logical(DType.F32, (2,)),
        f"m.{'9' * 5000}.w": Logical(DType.F32, (2,)),
    }
    packed = pack(inventory)
    assert unpack(json.loads(json.dumps(packed))) == dict(sorted(inventory.items()))
    assert {"name": "m.{i}.w", "i": [[0, 3], [5, 6]], "dtype": "F32", "shape": [2]} in packed
    assert {"name": "m.{i}.w", "dtype": "F32", "shape": [2]} in packed


@pytest.mark.parametrize(
    "entry",
    [
        {"name": 5, "dtype": "F32", "shape": []},
        {"name": "a", "dtype": "F32", "shape": [-1]},
        {"name": "a.{i}.b", "i": [[0, MOST_TENSORS + 1]], "dtype": "F32", "shape": []},
        {"name": "a" * 1000 + ".{i}.b", "i": [[0, 200_000]], "dtype": "F32", "shape": []},
    ],
)
def test_what_is_too_much_or_nonsense_is_refused(entry: dict[str, object]):
    with pytest.raises((TypeError, ValueError)):
        unpack([entry])
