"""The extra config of the load format: every documented key is taken, anything else is refused with one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardtool.errors import UsageError
from shardtool.integrations.engine_options import Options, options

ALL: dict[str, Any] = {
    "uri": "s3://bucket/llama-tp4",
    "concurrency": 16,
    "memory_limit": 5368709120,
    "pattern": "model-rank-{rank}-part-{part}.safetensors",
    "distributed": True,
    "verify": True,
}


def test_every_documented_key_is_taken():
    """As it comes from the command line: JSON."""
    assert options(json.loads(json.dumps(ALL))) == Options(**ALL)


@pytest.mark.parametrize("nothing", [None, {}])
def test_without_a_config_everything_is_as_in_stream(nothing: Any):
    assert options(nothing) == Options()


@pytest.mark.parametrize(
    ("key", "value", "held"),
    [
        ("memory_limit", -1, -1),
        ("memory_limit", 0, 0),
        ("memory_limit", "5GiB", 5 << 30),
        ("memory_limit", "-1", -1),
        ("distributed", "auto", "auto"),
        ("distributed", False, False),
        ("verify", False, False),
        ("concurrency", 1, 1),
        ("concurrency", 1024, 1024),
    ],
)
def test_values_that_are_good(key: str, value: Any, held: Any):
    assert getattr(options({key: value}), key) == held


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uri", 7),
        ("uri", " "),
        ("uri", None),
        ("concurrency", 0),
        ("concurrency", 1025),
        ("concurrency", True),
        ("concurrency", "16"),
        ("concurrency", 2.5),
        ("memory_limit", -2),
        ("memory_limit", True),
        ("memory_limit", 1 << 62),
        ("memory_limit", "much"),
        ("memory_limit", 1.5),
        ("pattern", ["a"]),
        ("pattern", ""),
        ("distributed", "yes"),
        ("distributed", 1),
        ("distributed", None),
        ("verify", "true"),
        ("verify", 0),
    ],
)
def test_a_bad_value_is_named_with_its_key(key: str, value: Any):
    with pytest.raises(UsageError, match=rf'--model-loader-extra-config: "{key}" is .+, which is not '):
        options({key: value})


def test_an_unknown_key_is_refused_with_the_list():
    with pytest.raises(
        UsageError, match=r"'rank', which .* know: concurrency, distributed, memory_limit, pattern, uri"
    ):
        options({**ALL, "rank": 3})


@pytest.mark.parametrize("extra", ["uri", ["uri"], 7, object()])
def test_what_is_no_object_is_refused(extra: Any):
    with pytest.raises(UsageError, match="is not a JSON object"):
        options(extra)


def test_the_environment_says_what_the_config_does_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHARDTOOL_MEMORY_LIMIT", "1GiB")
    monkeypatch.setenv("RUNAI_STREAMER_CONCURRENCY", "5")
    monkeypatch.setenv("SHARDTOOL_DISTRIBUTED", "0")
    assert options({}) == Options(memory_limit=1 << 30, concurrency=5, distributed=False)
    said: dict[str, Any] = {"memory_limit": 7 << 20, "concurrency": 2, "distributed": True}
    assert options(said) == Options(**said)
