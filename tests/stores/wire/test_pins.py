"""A version that was seen is the one to read, until this process changes the object."""

from __future__ import annotations

import pytest

from shardtool.stores.wire import pins
from shardtool.stores.wire.pins import Pins


def seen(known: Pins, key: str, version: str) -> None:
    """Look at an object."""
    known.keep(key, version, known.since())


def test_what_was_seen_last_is_known() -> None:
    known = Pins()
    assert known.of("a") == ""
    seen(known, "a", "1")
    seen(known, "b", "2")
    assert (known.of("a"), known.of("b")) == ("1", "2")
    seen(known, "a", "3")
    assert known.of("a") == "3"


def test_a_change_of_our_own_makes_a_version_unknown() -> None:
    known = Pins()
    seen(known, "a", "1")
    seen(known, "b", "2")
    with known.changing("a"):
        assert known.of("a") == ""
        seen(known, "a", "half")
        assert known.of("a") == ""
    assert (known.of("a"), known.of("b")) == ("", "2")
    seen(known, "a", "3")
    assert known.of("a") == "3"


def test_a_change_that_failed_may_have_changed_something() -> None:
    known = Pins()
    seen(known, "a", "1")
    with pytest.raises(KeyError), known.changing("a"):
        raise KeyError
    assert known.of("a") == ""


@pytest.mark.parametrize("inside", [False, True])
def test_what_was_asked_for_before_a_change_is_too_old(inside: bool) -> None:
    """Its answer may be about the object as it was."""
    known = Pins()
    since = known.since()
    with known.changing("a"):
        if inside:
            since = known.since()
    known.keep("a", "old", since)
    assert known.of("a") == ""


def test_two_changes_at_a_time_both_count() -> None:
    known = Pins()
    with known.changing("a"):
        with known.changing("a"):
            pass
        seen(known, "a", "half")
        assert known.of("a") == ""
    seen(known, "a", "1")
    assert known.of("a") == "1"


def test_not_more_are_known_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "_MOST", 2)
    known = Pins()
    for key in ("a", "b", "c"):
        seen(known, key, "1")
    seen(known, "a", "2")
    assert [known.of(key) for key in ("a", "b", "c")] == ["2", "1", ""]
