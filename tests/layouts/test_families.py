"""Tables: the built-in ones agree with their golden files, find their models, and survive their own writing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from shardtool.errors import FormatError, UnsupportedModel
from shardtool.layouts import families
from shardtool.layouts.families import FAMILIES, find, from_record, holds, known
from shardtool.layouts.rules import RULES
from tests import builders
from tests.layouts import golden


@pytest.mark.parametrize("name", golden.VARIANTS)
def test_a_layout_is_what_it_was(name: str):
    """If the change is meant: ``python -m tests.layouts.golden --update``."""
    assert golden.text(name) == golden.path(name).read_text()


def test_there_are_no_golden_files_without_a_layout():
    assert {path.stem for path in golden.FOLDER.glob("*.json")} == set(golden.VARIANTS)


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in golden.FOLDER.glob("*.json")) < 128 << 10


@pytest.mark.parametrize("kind", builders.KINDS.values(), ids=builders.KINDS)
def test_every_family_is_found_by_its_architecture(kind: builders.Kind):
    assert kind.architecture in find({"architectures": [kind.architecture]}).architectures


def test_the_first_known_architecture_counts():
    found = find({"architectures": ["MyOwnModel", "Qwen3ForCausalLM", "LlamaForCausalLM"]})
    assert found.name == "qwen3"


@pytest.mark.parametrize(
    "config", [{}, {"architectures": None}, {"architectures": "LlamaForCausalLM"}, {"architectures": [3]}]
)
def test_a_config_without_architecture_is_refused(config: dict[str, Any]):
    with pytest.raises(UnsupportedModel, match=r"no architecture in config\.json"):
        find(config)


def test_an_unknown_architecture_is_refused_with_all_that_are_known():
    with pytest.raises(UnsupportedModel, match="the architecture MambaForCausalLM is not one") as error:
        find({"architectures": ["MambaForCausalLM"]})
    assert all(name in str(error.value) for name in known())
    assert len(known()) == sum(len(family.architectures) for family in FAMILIES)


def test_no_architecture_has_two_tables():
    assert len(known()) == len(set(known()))


@pytest.mark.parametrize(
    ("when", "config", "true"),
    [
        ("", {}, True),
        ("a", {"a": True}, True),
        ("a", {"a": False}, False),
        ("a", {"a": None}, False),
        ("a", {}, False),
        ("a|b", {"b": 1}, True),
        ("a|b", {"a": 0, "b": 0}, False),
        ("not a", {}, True),
        ("not a", {"a": True}, False),
        ("x else a|b", {"x": False, "a": True}, False),
        ("x else a|b", {"x": True}, True),
        ("x else a|b", {"a": True}, True),
        ("x else a|b", {}, False),
    ],
)
def test_a_condition_holds_for_the_configs_that_it_describes(when: str, config: dict[str, Any], true: bool):
    assert holds(when, config) is true


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_table_is_read_back_from_json_as_it_was(family: families.Family):
    assert from_record(json.loads(json.dumps(family.record())), "here") == family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_table_uses_rules_that_exist_and_names_no_target_twice_under_one_condition(family: families.Family):
    assert {row.rule for row in family.rows} <= set(RULES)
    seen = [(row.to, row.when) for row in family.rows]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.pop("rows"),
        lambda record: record.pop("name"),
        lambda record: record.update(rows=3),
        lambda record: record.update(more=1),
        lambda record: record["rows"][0].pop("rule"),
        lambda record: record["rows"][0].update(of=None),
        lambda record: record["rows"][0].update(rule="twist"),
        lambda record: record.update(tied=5),
    ],
)
def test_a_damaged_table_is_refused(damage: Any):
    record = copy.deepcopy(FAMILIES[0].record())
    damage(record)
    with pytest.raises(FormatError, match=r"^here: the layout"):
        from_record(record, "here")


@pytest.mark.parametrize("record", [None, 3, [], "x"])
def test_what_is_no_table_is_refused(record: Any):
    with pytest.raises(FormatError, match="the layout table is damaged"):
        from_record(record, "here")
