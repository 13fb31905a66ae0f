"""What the environment says, and who wins when several speak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shardtool import settings
from shardtool.errors import UsageError

TWINS: list[tuple[Callable[[Any], Any], str, Any, Any]] = [
    (settings.memory_limit, "MEMORY_LIMIT", "1MiB", 1 << 20),
    (settings.concurrency, "CONCURRENCY", 3, 3),
]
DISTRIBUTED = [("1", True), ("on", True), (True, True), ("0", False), ("No", False), (False, False), ("Auto", "auto")]
PLAIN: list[tuple[Callable[[Any], Any], str, Any, Any]] = [
    (settings.max_part_size, "MAX_PART_SIZE", "5GB", 5 * 10**9),
    (settings.block_size, "BLOCK_SIZE", "4MiB", 4 << 20),
    (settings.pattern, "PATTERN", "r{rank}.safetensors", "r{rank}.safetensors"),
    (settings.dtype, "DTYPE", "float16", "float16"),
    (settings.device, "DEVICE", "cuda:1", "cuda:1"),
]


def test_the_size_of_a_read_has_another_name_in_runais_streamer(monkeypatch):
    monkeypatch.setenv("RUNAI_STREAMER_CHUNK_BYTESIZE", "2097152")
    assert settings.block_size(None) == 2 << 20
    monkeypatch.setenv("SHARDTOOL_BLOCK_SIZE", "1MiB")
    assert settings.block_size(None) == 1 << 20


@pytest.mark.parametrize(("read", "name", "text", "value"), [*TWINS, *PLAIN])
def test_nothing_said_is_left_to_the_operation(read, name, text, value):
    assert read(None) is None


@pytest.mark.parametrize(("read", "name", "text", "value"), [*TWINS, *PLAIN])
def test_a_flag_wins_over_the_variable(monkeypatch, read, name, text, value):
    monkeypatch.setenv(f"SHARDTOOL_{name}", "nonsense that nobody reads")
    assert read(text) == value


@pytest.mark.parametrize(("read", "name", "text", "value"), [*TWINS, *PLAIN])
def test_the_variable_is_read_where_there_is_no_flag(monkeypatch, read, name, text, value):
    monkeypatch.setenv(f"SHARDTOOL_{name}", f" {text} ")
    assert read(None) == value


@pytest.mark.parametrize(("read", "name", "text", "value"), TWINS)
def test_our_variable_wins_over_its_twin(monkeypatch, read, name, text, value):
    monkeypatch.setenv(f"RUNAI_STREAMER_{name}", "nonsense that nobody reads")
    monkeypatch.setenv(f"SHARDTOOL_{name}", str(text))
    assert read(None) == value


@pytest.mark.parametrize("ours", [None, "", "  "])
@pytest.mark.parametrize(("read", "name", "text", "value"), TWINS)
def test_the_twin_is_read_where_ours_is_not_set_or_empty(monkeypatch, read, name, text, value, ours):
    if ours is not None:
        monkeypatch.setenv(f"SHARDTOOL_{name}", ours)
    monkeypatch.setenv(f"RUNAI_STREAMER_{name}", str(text))
    assert read(None) == value


@pytest.mark.parametrize(
    ("text", "value"), [("-1", -1), ("0", 0), ("4096", 4096), ("64MiB", 64 << 20), ("5 GB", 5 * 10**9)]
)
def test_a_memory_limit_is_a_size_or_no_limit_or_the_least(text, value):
    assert settings.memory_limit(text) == value


@pytest.mark.parametrize("text", ["-2", "many", "1e9", "5GiBs", "9" * 5000, "99999999999TiB", ""])
def test_what_is_no_memory_limit_is_refused_with_the_name_of_the_flag(text):
    with pytest.raises(UsageError, match=r"^--memory-limit '"):
        settings.memory_limit(text)


BAD = [
    (settings.memory_limit, "SHARDTOOL_MEMORY_LIMIT", "lots"),
    (settings.memory_limit, "RUNAI_STREAMER_MEMORY_LIMIT", "-3"),
    (settings.concurrency, "SHARDTOOL_CONCURRENCY", "0"),
    (settings.concurrency, "SHARDTOOL_CONCURRENCY", "1025"),
    (settings.concurrency, "RUNAI_STREAMER_CONCURRENCY", "1.5"),
    (settings.max_part_size, "SHARDTOOL_MAX_PART_SIZE", "-1"),
    (settings.device, "SHARDTOOL_DEVICE", "tpu"),
    (settings.quiet, "SHARDTOOL_QUIET", "maybe"),
    (settings.distributed, "SHARDTOOL_DISTRIBUTED", "2"),
    (settings.distributed, "RUNAI_STREAMER_DIST", "nccl"),
    (lambda _: settings.distributed_scope(), "RUNAI_STREAMER_DIST_GLOBAL", "node"),
    (lambda _: settings.distributed_timeout(), "RUNAI_STREAMER_DIST_TIMEOUT", "1.5"),
    (lambda _: settings.s3_unsigned(), "RUNAI_STREAMER_S3_UNSIGNED", "maybe"),
    (lambda _: settings.s3_addressing(), "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "path"),
]


@pytest.mark.parametrize(("read", "variable", "text"), BAD)
def test_a_bad_value_is_refused_with_the_name_of_its_variable(monkeypatch, read, variable, text):
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=rf"^{variable} "):
        read(None)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("Yes", True), ("on", True), ("0", False), ("FALSE", False)])
def test_quiet_is_switched_by_its_variable(monkeypatch, text, value):
    monkeypatch.setenv("SHARDTOOL_QUIET", text)
    assert settings.quiet(None) is value


@pytest.mark.parametrize("flag", [True, False])
def test_the_flags_quiet_and_no_quiet_win_over_the_variable(monkeypatch, flag):
    monkeypatch.setenv("SHARDTOOL_QUIET", "0" if flag else "1")
    assert settings.quiet(flag) is flag


def torchrun(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_process_of_torchrun_knows_its_rank_and_its_gpu(monkeypatch):
    torchrun(monkeypatch, RANK=5, LOCAL_RANK=1, WORLD_SIZE=8)
    assert settings.torchrun() == (5, 1, 8)
    assert settings.device("cuda") == "cuda:1"
    assert settings.device("cuda:0") == "cuda:0"
    assert settings.device("cpu") == "cpu"


@pytest.mark.parametrize("values", [{}, {"RANK": 1}, {"RANK": 1, "WORLD_SIZE": 2}])
def test_some_of_its_variables_are_not_torchrun(monkeypatch, values):
    torchrun(monkeypatch, **values)
    assert settings.torchrun() is None
    assert settings.device("cuda") == "cuda"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "a", "LOCAL_RANK": 0, "WORLD_SIZE": 2}, "^RANK 'a' is not a whole number"),
        ({"RANK": 2, "LOCAL_RANK": 0, "WORLD_SIZE": 2}, "^RANK 2 is not below WORLD_SIZE 2"),
    ],
)
def test_variables_of_torchrun_that_make_no_sense_are_refused(monkeypatch, values, message):
    torchrun(monkeypatch, **values)
    with pytest.raises(UsageError, match=message):
        settings.torchrun()


def test_how_users_of_run_ai_reach_their_servers(monkeypatch):
    assert (settings.s3_endpoint(), settings.s3_unsigned(), settings.s3_addressing()) == (None, False, None)
    monkeypatch.setenv("RUNAI_STREAMER_S3_ENDPOINT", "http://127.0.0.1:9000")
    monkeypatch.setenv("RUNAI_STREAMER_S3_UNSIGNED", "1")
    monkeypatch.setenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0")
    assert (settings.s3_endpoint(), settings.s3_unsigned(), settings.s3_addressing()) == (
        "http://127.0.0.1:9000",
        True,
        "path",
    )
    monkeypatch.setenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "1")
    assert settings.s3_addressing() == "virtual"


@pytest.mark.parametrize(("said", "value"), DISTRIBUTED)
def test_ranks_exchange_what_they_read_or_do_not_or_as_it_pays(monkeypatch, said, value):
    assert settings.distributed(None) is None
    monkeypatch.setenv("RUNAI_STREAMER_DIST", str(said))
    assert settings.distributed(None) == value
    monkeypatch.setenv("SHARDTOOL_DISTRIBUTED", "0" if value else "1")
    assert settings.distributed(None) is not value
    assert settings.distributed(said) == value


def test_who_exchanges_and_how_long_users_of_run_ai_wait(monkeypatch):
    assert (settings.distributed_scope(), settings.distributed_timeout()) == ("node", None)
    monkeypatch.setenv("RUNAI_STREAMER_DIST_GLOBAL", "1")
    monkeypatch.setenv("RUNAI_STREAMER_DIST_TIMEOUT", "5")
    assert (settings.distributed_scope(), settings.distributed_timeout()) == ("global", 5)
    monkeypatch.setenv("RUNAI_STREAMER_DIST_GLOBAL", "0")
    assert settings.distributed_scope() == "node"
