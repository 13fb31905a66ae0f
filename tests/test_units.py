"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.errors import UsageError
from shardtool.units import parse_duration, parse_size, show_duration, show_size

POWERS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@given(st.integers(0, 10**6), st.sampled_from(sorted(POWERS)), st.booleans(), st.booleans(), st.booleans())
def test_a_whole_number_and_a_unit_make_a_size_exactly(n: int, unit: str, spaced: bool, byte: bool, lower: bool):
    text = f"{n}{' ' if spaced else ''}{unit}{'B' if byte else ''}"
    assert parse_size(text.lower() if lower else text, "--limit") == n * POWERS[unit]


@pytest.mark.parametrize(("text", "size"), [("1.5GiB", 3 << 29), ("0.5k", 500), (" 64MiB ", 64 << 20), (12345, 12345)])
def test_fractions_spaces_and_plain_numbers_are_sizes_too(text: str | int, size: int):
    assert parse_size(text, "--limit") == size


@pytest.mark.parametrize("text", ["", "GiB", "-5", "1e9", "5 GiBs", "1,5G", "5PiB", "0x10", "1.G", "five"])
def test_anything_else_is_refused_with_the_flag_and_an_example(text: str):
    with pytest.raises(UsageError, match=r"--limit .* is not a size; write for example 64MiB"):
        parse_size(text, "--limit")


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (2048 << 40, "2048.0 TiB"),
    ],
)
def test_a_size_is_shown_in_the_unit_that_makes_it_short(n: int, text: str):
    assert show_size(n) == text


@given(st.integers(0, 1 << 60))
def test_a_size_that_was_shown_reads_back_to_a_tenth_of_its_unit(n: int):
    shown = show_size(n)
    unit = POWERS[shown.split()[1].removesuffix("B")]
    assert abs(parse_size(shown, "--limit") - n) <= unit * 0.0501 + 1  # a fraction of a byte is cut off


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("30m", 1800),
        ("12h", 43200),
        ("2d", 172800),
        ("1W", 604800),
        ("1.5 h", 5400),
        (0, 0),
        (2.5, 2.5),
    ],
)
def test_a_time_is_a_number_and_a_unit(text: str | float, seconds: float):
    assert parse_duration(text, "--older-than") == seconds


@pytest.mark.parametrize("text", ["", "d", "-1d", "1y", "1d2h", "soon", "inf", "1e9", True, None])
def test_other_times_are_refused_with_the_flag_and_an_example(text: object):
    with pytest.raises(UsageError, match=r"--older-than .* is not a time; write for example 30m"):
        parse_duration(text, "--older-than")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (9 * 86400, "9 d")],
)
def test_a_time_is_shown_in_the_largest_unit_that_fits(seconds: float, text: str):
    assert show_duration(seconds) == text
