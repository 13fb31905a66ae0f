"""Which of the names that share memory is stored: the rule of ``ShardedStateLoader._filter_subtensors``."""

from __future__ import annotations

import pytest
import torch

from shardtool.tracing.aliases import kept, of_model
from shardtool.tracing.tape import Log


def found(device: str) -> tuple[set[str], dict[str, str]]:
    """The rule on views of one memory."""
    whole = torch.zeros(4, 6, device=device)
    other = torch.zeros(4, 6, device=device)
    state = {
        "b.same": whole,
        "a.same": whole.view(24).view(4, 6),
        "a.inside": whole[1],
        "a.across": whole[:, 1],
        "a.turned": whole.t(),
        "other": other,
        "c.turned": torch.zeros(3, 2, device=device).t(),
        "nothing": torch.zeros(0, device=device),
    }
    targets, aliases = kept(Log(), state)
    return set(targets), aliases


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_of_one_memory_the_smallest_name_of_the_largest_contiguous_view_is_kept(device: str) -> None:
    targets, aliases = found(device)
    assert targets == {"a.same", "other", "c.turned"}
    assert aliases == dict.fromkeys(["b.same", "a.inside", "a.across", "a.turned"], "a.same")


def test_views_that_overlap_without_one_inside_the_other_are_both_kept() -> None:
    whole = torch.zeros(6, device="meta")
    targets, aliases = kept(Log(), {"a": whole[:4], "b": whole[2:]})
    assert set(targets) == {"a", "b"}
    assert not aliases


def test_the_tensors_of_a_model_are_chosen_by_the_same_rule() -> None:
    """Where tensors of the meta device stand for memory that a model does not have yet, too."""
    whole, waiting = torch.zeros(4, 6), torch.zeros(2, device="meta")
    state = {
        "b.same": whole,
        "a.same": whole.view(24).view(4, 6),
        "a.inside": whole[1],
        "other": torch.zeros(4, 6),
        "later": waiting,
        "also later": waiting,
        "nothing": torch.zeros(0),
    }
    found = of_model(state)
    assert list(found) == ["a.same", "other", "also later"]
    assert all(found[name] is state[name] for name in found)
