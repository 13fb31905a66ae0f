"""Tensors as memory: where a run of elements lands in tensors of any strides, and who lends what."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardtool.sinks.tensor import lends, octets, scatter


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_elements_land_where_they_belong_in_tensors_of_any_strides(shape: list[int], data: st.DataObject):
    """Runs of any length in any order: a contiguous target, a transposed one, every other row of one."""
    typed = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    size = math.prod(shape)
    wanted = torch.arange(size).to(typed).reshape(shape)
    order = data.draw(st.permutations(range(len(shape))))
    form = data.draw(st.sampled_from(["plain", "turned", "stepped"]))
    target: Any
    if form == "plain" or not shape:
        target = torch.zeros(shape, dtype=typed)
    elif form == "turned":
        target = torch.zeros([shape[i] for i in order], dtype=typed).permute(
            [order.index(i) for i in range(len(shape))]
        )
    else:
        target = torch.zeros([2 * n for n in shape], dtype=typed)[tuple(slice(None, None, 2) for _ in shape)]
    assert tuple(target.shape) == tuple(shape)
    flat = wanted.reshape(-1)
    cuts = sorted({0, *data.draw(st.lists(st.integers(0, size), max_size=3)), size})
    runs = list(pairwise(cuts))
    random.Random(0).shuffle(runs)
    for first, end in runs:
        for part, values in scatter(target, tuple(shape), first, flat[first:end]):
            assert part.shape == values.shape
            part.copy_(values)
    assert torch.equal(target, wanted)


def test_the_bytes_of_a_tensor_are_its_own_memory():
    tensor = torch.zeros(2, 3, dtype=torch.int16)
    octets(tensor)[2:4] = 255
    assert tensor.tolist() == [[0, -1, 0], [0, 0, 0]]
    assert octets(torch.ones(())).numel() == 4
    assert octets(torch.ones(1, 1).as_strided((1, 1), (7, 9))).numel() == 4


def test_what_does_not_lend_its_memory_is_reached_by_copies():
    assert lends(torch.zeros(2, 3))
    assert not lends(torch.zeros(2, 3).T)
    assert not lends(torch.zeros(2, 3, device="meta"))
    assert lends(torch.nn.Parameter(torch.zeros(2)))


@pytest.mark.cuda
def test_a_gpus_memory_is_not_lent():
    assert not lends(torch.zeros(2, 3, device="cuda"))
