"""The sizes of the groups: which rank is where, and which layers a stage holds."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.errors import PlanError, UsageError
from shardtool.parallel import Parallel, from_json

SIZES = st.integers(1, 8)


@st.composite
def parallels(draw: st.DrawFn) -> Parallel:
    pp = draw(SIZES)
    partition = draw(st.none() | st.lists(st.integers(0, 40), min_size=pp, max_size=pp).map(tuple))
    return Parallel(draw(SIZES), pp, draw(st.booleans()), partition)


@given(parallels())
def test_what_is_written_down_is_read_back(parallel: Parallel):
    assert from_json(json.loads(json.dumps(parallel.to_json()))) == parallel


@given(parallels())
def test_every_rank_has_a_place_of_its_own(parallel: Parallel):
    places = [parallel.place(rank) for rank in parallel.ranks]
    assert len(set(places)) == parallel.tp * parallel.pp
    assert places == [(tp, pp) for pp in range(parallel.pp) for tp in range(parallel.tp)]


@given(SIZES, st.integers(0, 100))
def test_the_stages_hold_every_layer_once_in_order(pp: int, layers: int):
    stages = Parallel(1, pp).stages(layers)
    assert list(chain(*stages)) == list(range(layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"),
    [
        (32, 4, [8, 8, 8, 8]),
        (33, 4, [8, 8, 9, 8]),  # the last stage has the head: it gets no more
        (34, 4, [8, 9, 9, 8]),
        (35, 4, [9, 9, 9, 8]),
        (61, 2, [31, 30]),
        (3, 2, [2, 1]),
        (1, 2, [1, 0]),
    ],
)
def test_layers_that_do_not_divide_go_to_the_stages_before_the_last(layers: int, pp: int, sizes: list[int]):
    assert list(map(len, Parallel(2, pp).stages(layers))) == sizes


def test_a_partition_by_hand_is_taken_as_it_is():
    assert Parallel(1, 2, partition=(3, 1)).stages(4) == (range(3), range(3, 4))
    with pytest.raises(PlanError, match=r"the layer partition 3,1 is not the 5 layers of the model"):
        Parallel(1, 2, partition=(3, 1)).stages(5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0,), "--tp 0 is not a number of ranks"),
        ((1025,), "--tp 1025 is not a number of ranks"),
        ((True,), "--tp True is not"),
        ((2, 0), "--pp 0 is not a number of ranks"),
        ((64, 32), "--tp 64 times --pp 32 is more than 1024 ranks"),
        ((2, 2, False, (1,)), "the layer partition 1 does not name a number of layers for each of --pp 2"),
        ((2, 1, False, (-1,)), "the layer partition -1 does not name"),
    ],
)
def test_sizes_that_cannot_be_are_refused(arguments: Any, said: str):
    with pytest.raises(UsageError, match=said):
        Parallel(*arguments)


def test_people_read_what_is_not_usual():
    assert str(Parallel(4)) == "tp 4"
    assert str(Parallel(4, 2, True)) == "tp 4 pp 2 with expert parallel"
    assert str(Parallel(2, 2, partition=(3, 1))) == "tp 2 pp 2 (3,1 layers)"


@pytest.mark.parametrize("value", [{}, {"tp": 2}, {"tp": 2, "pp": 1, "ep": 1}, {"tp": 2, "pp": 1, "partition": 3}])
def test_nonsense_is_refused(value: dict[str, Any]):
    with pytest.raises((KeyError, ValueError)):
        from_json(value)
