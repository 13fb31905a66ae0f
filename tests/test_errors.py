"""The tree of errors: what its docstring draws is what the classes are."""

from __future__ import annotations

import pickle
import re

import pytest

from shardtool import errors
from shardtool.errors import BudgetTooSmall, ShardtoolError

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ShardtoolError)]


def drawn() -> dict[str, tuple[str | None, int]]:
    """Each class in the docstring's tree, with its parent and its exit code."""
    found: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([ │├└─]{4,})(\w+) +(\d)\b", line)
        if match:
            depth = len(match[1])
            above = [entry for entry in above if entry[0] < depth]
            found[match[2]] = (above[-1][1] if above else None, int(match[3]))
            above.append((depth, match[2]))
    return found


def test_the_docstring_draws_every_class_below_its_parent_with_its_exit_code():
    actual: dict[str, tuple[str | None, int]] = {c.__name__: (c.__bases__[0].__name__, c.exit_code) for c in CLASSES}
    actual["ShardtoolError"] = (None, ShardtoolError.exit_code)
    assert drawn() == actual


def test_only_an_unavailable_store_is_worth_another_try():
    assert [c.__name__ for c in CLASSES if c.retryable] == ["Unavailable"]


def test_no_exit_code_means_success():
    assert all(0 < c.exit_code < 7 for c in CLASSES)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_survives_the_way_between_processes(kind: type[ShardtoolError]):
    error = pickle.loads(pickle.dumps(kind("file a.safetensors is gone")))
    assert (type(error), str(error)) == (kind, "file a.safetensors is gone")


def test_a_budget_that_is_too_small_says_what_would_do():
    error = BudgetTooSmall("too small", needed=8192)
    assert error.needed == 8192
    assert pickle.loads(pickle.dumps(error)).needed == 8192
