"""The language of tables: conditions hold, configs are read, and tables survive their own writing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from shardtool.errors import FormatError
from shardtool.layouts.tables import FAMILIES
from shardtool.layouts.tables.language import Family, Row, between, from_record, holds, setting

NAMES = [f"{family.name}-{family.since or 'first'}" for family in FAMILIES]


def family(**columns: Any) -> Family:
    """A table of one row."""
    return Family(
        **{"name": "x", "architectures": ("X",), "rows": (Row("copy", "a", ("a",)),), "defaults": {}, **columns}
    )


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
        ("a=2", {"a": 2}, True),
        ("a=2", {"a": "2"}, True),
        ("a=2", {"a": 3}, False),
        ("a=None", {}, True),
        ("not a=2", {"a": 2}, False),
        ("a=2|b", {"b": True}, True),
        ("a=@b", {"a": 3, "b": 3}, True),
        ("a=@b", {"a": 3, "b": "3"}, False),
        ("a & b", {"a": True, "b": True}, True),
        ("a & b", {"a": True}, False),
        ("a & not b", {"a": True}, True),
        ("a & not b=2", {"a": True, "b": 2}, False),
        ("a.b", {"a": {"b": True}}, True),
        ("a.b", {"a": True}, False),
        ("a.b=1", {"a": {"b": 1}}, True),
    ],
)
def test_a_condition_holds_for_the_configs_that_it_describes(when: str, config: dict[str, Any], true: bool):
    assert holds(when, config) is true


@pytest.mark.parametrize(("key", "value"), [("a", 1), ("b.c", 2), ("b.d", None), ("a.c", None), ("x", None)])
def test_a_setting_may_be_inside_another(key: str, value: Any):
    assert setting({"a": 1, "b": {"c": 2}}, key) == value


@pytest.mark.parametrize(
    ("since", "version", "until", "true"),
    [
        ("", "0.32", "", True),
        ("0.32", "0.32.1", "", True),
        ("0.9", "0.32", "", True),
        ("0.32", "0.9", "", False),
        ("", "0.31", "0.31", True),
        ("", "0.31.2", "0.31", True),
        ("", "0.32", "0.31", False),
        ("0.24", "0.27", "0.31", True),
    ],
)
def test_versions_are_compared_by_their_first_two_numbers(since: str, version: str, until: str, true: bool):
    assert between(since, version, until) is true


def test_a_table_at_a_version_has_the_rows_of_that_version():
    rows = (Row("copy", "a", ("a",)), Row("copy", "b", ("b",), since="0.31"), Row("copy", "c", ("c",), until="0.27"))
    table = family(rows=rows, since="0.24")
    assert [row.to for row in table.at("0.27").rows] == ["a", "c"]
    assert [row.to for row in table.at("0.32").rows] == ["a", "b"]
    assert all(not row.since and not row.until for row in table.at("0.32").rows)
    assert table.at("0.32").since == ""


# How config.json is read.


def test_defaults_stand_where_config_is_silent_also_inside():
    table = family(defaults={"a": 1, "b": {"c": 2, "d": 3}})
    assert table.config({"b": {"d": 4}}) == {"a": 1, "b": {"c": 2, "d": 4}}
    assert table.config({"a": None, "b": None}) == {"a": None, "b": None}


def test_a_size_may_have_another_key():
    table = family(keys={"hidden_size": "n_embd"}, defaults={"hidden_size": 7})
    assert table.config({"n_embd": 5})["hidden_size"] == 5
    assert table.config({"hidden_size": 6})["hidden_size"] == 6
    assert table.config({})["hidden_size"] == 7


def test_sizes_may_lie_inside():
    table = family(inside="text_config")
    assert table.config({"text_config": {"a": 1}, "a": 2, "b": 3})["a"] == 1
    assert table.config({"a": 2})["a"] == 2


@pytest.mark.parametrize(
    ("outer", "inner", "tied"), [(True, False, True), (False, True, True), (False, False, False), (None, True, True)]
)
def test_a_model_is_tied_if_either_level_says_so(outer: bool | None, inner: bool, tied: bool):
    said = {"tie_word_embeddings": outer, "text_config": {"tie_word_embeddings": inner}}
    assert family(inside="text_config").config(said)["tie_word_embeddings"] is tied


def test_what_follows_from_other_settings_is_set_in_order():
    implied = (("", "kv", None), ("multi", "kv", 1), ("new", "kv", "@n"), ("new & kv=8", "two", True))
    table = family(implied=implied)
    assert table.config({"kv": 9})["kv"] is None
    assert table.config({"multi": True})["kv"] == 1
    assert table.config({"multi": True, "new": True, "n": 8}) == {
        "multi": True,
        "new": True,
        "n": 8,
        "kv": 8,
        "two": True,
    }


def test_a_source_may_be_spelled_in_several_ways():
    table = family(prefixes=(("", "model."), ("model.text.", "model."), ("head.", "lm_head.")))
    assert table.spellings("model.a") == ("model.a", "a", "model.text.a")
    assert table.spellings("lm_head.a") == ("lm_head.a", "head.a")
    assert table.spellings("other") == ("other",)


# Records.


@pytest.mark.parametrize("table", FAMILIES, ids=NAMES)
def test_a_table_is_read_back_from_json_as_it_was(table: Family):
    assert from_record(json.loads(json.dumps(table.record())), "here") == table


def test_a_record_leaves_out_the_later_columns_that_say_nothing():
    table = json.loads(json.dumps(family().record()))
    assert set(table["rows"][0]) == {"rule", "to", "of", "when", "size", "instead"}
    assert not {"keys", "inside", "implied", "experts", "prefixes", "since", "until"} & set(table)


def test_a_table_of_an_older_manifest_is_read():
    """It has no word on pipeline stages and dtypes; its scales were float32 because of their rule."""
    old = {
        "name": "x",
        "architectures": ["X"],
        "rows": [{"rule": "scalar", "to": "s", "of": [], "when": "", "size": "", "instead": []}],
        "defaults": {},
        "head_dim_key": "head_dim",
        "tied": ["", ""],
        "dtypes": ["BF16"],
        "refused": [],
        "drops": {},
    }
    table = from_record(old, "here")
    assert table.pipeline is False
    assert table.unties is True
    assert table.rows[0].dtype == "F32"


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
        lambda record: record.update(tied=["a"]),
        lambda record: record.update(keys=["a"]),
        lambda record: record.update(keys={"a": 1}),
        lambda record: record.update(inside=1),
        lambda record: record.update(implied=[["", "a"]]),
        lambda record: record.update(implied=[[1, "a", 2]]),
        lambda record: record.update(implied=5),
        lambda record: record.update(prefixes=[["a"]]),
        lambda record: record.update(prefixes=[["a", 1]]),
        lambda record: record.update(pipeline="no"),
        lambda record: record.update(unties=1),
        lambda record: record.update(dtypes=["X8"]),
        lambda record: record["rows"][0].update(stage="middle"),
        lambda record: record["rows"][0].update(dtype="X8"),
        lambda record: record["rows"][0].update(layers=3),
        lambda record: record["rows"][0].update(when="not " * 300 + "a"),
    ],
)
def test_a_damaged_table_is_refused(damage: Any):
    record = copy.deepcopy(json.loads(json.dumps(FAMILIES[0].record())))
    damage(record)
    with pytest.raises(FormatError, match=r"^here: the layout"):
        from_record(record, "here")


@pytest.mark.parametrize("record", [None, 3, [], "x"])
def test_what_is_no_table_is_refused(record: Any):
    with pytest.raises(FormatError, match="the layout table is damaged"):
        from_record(record, "here")
