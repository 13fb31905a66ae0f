"""How results look: aligned text, tables, JSON, and nothing that a terminal would take for a command."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool import display


def test_plain_text_stays_as_it_is():
    assert display.printable("größe_層 [1, 2]") == "größe_層 [1, 2]"


@given(st.text())
def test_nothing_that_is_shown_can_command_a_terminal(text):
    shown = display.printable(text)
    assert shown.isprintable()
    shown.encode()  # no half of a pair is left


def test_a_control_character_is_shown_as_an_escape():
    assert display.printable("a\x1b[2Jb\nc\udc80") == r"a\x1b[2Jb\nc\udc80"


def test_lines_go_to_stdout_and_notes_and_errors_to_stderr(capsys):
    display.out("one", "two\x07")
    display.note("three")
    display.error("four\nfive")
    assert capsys.readouterr() == ("one\ntwo\\x07\n", "note: three\nshardtool: error: four\\nfive\n")


def test_columns_are_aligned_where_stdout_is_no_terminal(capsys):
    display.table(("name", "rank", " size"), [("a", "rank 0", "1 B"), ("longer", "", "1.0 KiB")])
    assert capsys.readouterr().out == "a       rank 0      1 B\nlonger          1.0 KiB\n"


def test_an_empty_table_is_nothing(capsys):
    display.table(("name",), [])
    assert capsys.readouterr().out == ""


def test_json_is_one_object_in_one_line_and_numbers_that_are_none_are_texts(capsys):
    display.as_json({"a": [math.nan, math.inf, -math.inf, 1.5], "b": {"ü\n": None}, "c": (1, True)})
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert json.loads(text) == {"a": ["NaN", "Infinity", "-Infinity", 1.5], "b": {"ü\n": None}, "c": [1, True]}


def test_there_is_no_progress_where_stderr_is_no_terminal(capsys):
    with display.progress("save", shown=True) as tell:
        assert tell is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "0.00 s"), (0.123, "0.12 s"), (12.34, "12.3 s"), (59.9, "59.9 s"), (200, "3 min 20 s")]
)
def test_seconds_are_shown_as_people_say_them(seconds, shown):
    assert display.show_seconds(seconds) == shown


def test_speed_is_in_units_of_a_billion_bytes_and_0_where_no_time_has_passed():
    assert display.show_speed(3 * 10**9, 2.0) == "1.50 GB/s"
    assert display.speed(5, 0.0) == 0.0


@pytest.mark.parametrize(("n", "shown"), [(0, "0 files"), (1, "1 file"), (20_000, "20,000 files")])
def test_things_are_counted(n, shown):
    assert display.counted(n, "file") == shown
