"""The public face: what ``shardtool`` offers is listed once, in order, and every name explains itself."""

from __future__ import annotations

import inspect
import re

import pytest

import shardtool
from shardtool import errors

ERRORS = sorted(
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.ShardtoolError) and value.__module__ == errors.__name__
)
OPERATIONS = (
    *("bench", "clean", "inspect", "load", "load_into", "load_model", "merge", "open_store", "pull"),
    *("reshard", "save", "stream", "trace", "verify"),
)


def test_all_is_sorted_and_names_nothing_twice() -> None:
    assert list(shardtool.__all__) == sorted(set(shardtool.__all__))


@pytest.mark.parametrize("name", shardtool.__all__)
def test_a_public_name_resolves_and_explains_itself(name: str) -> None:
    value = getattr(shardtool, name)
    if inspect.isroutine(value) or inspect.isclass(value):
        assert value.__doc__, f"shardtool.{name} has no docstring"


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_public(name: str) -> None:
    assert name in shardtool.__all__
    assert callable(getattr(shardtool, name))


def test_every_command_is_an_operation_of_the_same_name() -> None:
    from shardtool.cli import main

    assert set(main.commands) <= set(shardtool.__all__)


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_public_under_the_same_name(name: str) -> None:
    assert name in shardtool.__all__
    assert getattr(shardtool, name) is getattr(errors, name)


def test_dir_shows_every_public_name() -> None:
    assert set(shardtool.__all__) <= set(dir(shardtool))


def test_a_star_import_gives_exactly_the_public_names() -> None:
    space: dict[str, object] = {}
    exec("from shardtool import *", space)
    assert set(space) - {"__builtins__"} == set(shardtool.__all__)


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    name = "shave"
    with pytest.raises(AttributeError, match="'shardtool' has no attribute 'shave'"):
        getattr(shardtool, name)


def test_the_package_says_its_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+|\.dev\d+)?", shardtool.__version__)
