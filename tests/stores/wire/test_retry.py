"""Again and Lanes: how often, how long, and how many at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtool.errors import AccessDenied, ShardtoolError, Unavailable
from shardtool.stores.wire import retry
from shardtool.stores.wire.retry import Again, Busy, Lanes, retry_after


class Clock:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the module."""
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


def failing(*errors: ShardtoolError) -> Callable[[int], str]:
    """A call that raises these, one after the other, and then succeeds."""
    left = list(errors)

    def call(failures: int) -> str:
        assert failures == len(errors) - len(left)
        if left:
            raise left.pop(0)
        return "done"

    return call


GONE = Unavailable("gone")


def test_what_may_pass_is_tried_again(clock: Clock) -> None:
    assert Again(attempts=3).run(failing(GONE, GONE)) == "done"
    assert len(clock.waits) == 2


def test_the_last_error_is_told_when_the_tries_are_used_up(clock: Clock) -> None:
    last = Unavailable("the third")
    with pytest.raises(Unavailable) as caught:
        Again(attempts=3).run(failing(GONE, GONE, last))
    assert caught.value is last
    assert len(clock.waits) == 2


def test_what_does_not_pass_is_told_at_once(clock: Clock) -> None:
    with pytest.raises(AccessDenied):
        Again().run(failing(AccessDenied("no")))
    assert clock.waits == []


def test_errors_that_are_none_of_ours_are_not_touched(clock: Clock) -> None:
    def call(_: int) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        Again().run(call)


@given(st.integers(1, 12), st.floats(0.001, 5), st.floats(0.001, 30))
def test_waits_double_up_to_the_longest_and_are_random(failures: int, backoff: float, longest: float) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "time", clock)
        Again(attempts=20, backoff=backoff, longest=longest, within=1e9).run(failing(*[GONE] * failures))
    assert len(clock.waits) == failures
    for number, wait in enumerate(clock.waits):
        full = min(longest, backoff * 2**number)
        assert 0.5 * full <= wait <= full


def test_two_readers_do_not_come_back_at_once(clock: Clock) -> None:
    for _ in range(20):
        Again(backoff=1.0).run(failing(GONE))
    assert len({round(wait, 4) for wait in clock.waits}) > 10


def test_a_pause_that_the_server_asks_for_is_made_unless_it_is_absurd(clock: Clock) -> None:
    Again(backoff=0.1, pause=30.0).run(failing(Busy("b", after=7.0), Busy("b", after=9000.0), Busy("b")))
    assert 7.0 <= clock.waits[0] <= 7.7
    assert 30.0 <= clock.waits[1] <= 33.0
    assert clock.waits[2] <= 0.4


def test_no_try_begins_after_the_time_is_over(clock: Clock) -> None:
    began = clock.now
    with pytest.raises(Unavailable):
        Again(attempts=1000, backoff=1.0, longest=1.0, within=10.0).run(failing(*[GONE] * 999))
    assert 8.0 < clock.now - began <= 10.0


def test_progress_gives_new_tries_and_new_time(clock: Clock) -> None:
    trying = Again(attempts=2, backoff=1.0, within=3.0).trying()
    for _ in range(10):
        trying.failed(GONE)
        trying.progressed()
    assert clock.now - 100.0 >= 5.0
    trying.failed(GONE)
    with pytest.raises(Unavailable):
        trying.failed(GONE)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("5", 5), (" 7 ", 7), ("0", 0), ("2.5", 2.5), ("-3", 0), ("soon", 0), ("", 0), ("1" * 400, 86400), ("٣", 3)],
)
def test_a_retry_after_in_seconds(said: str, seconds: float) -> None:
    assert retry_after({"retry-after": said}) == seconds


def test_a_retry_after_as_a_date() -> None:
    assert 20 < retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 30
    assert retry_after({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0
    assert retry_after({}) == 0


# Lanes


def test_there_is_a_lane_for_everybody_at_first() -> None:
    lanes = Lanes(most=3)
    with lanes.lane(0), lanes.lane(0), lanes.lane(0):
        began = time.monotonic()
        with lanes.lane(0.1):  # the fourth waits, but not for ever
            assert time.monotonic() - began >= 0.1


def test_throttling_halves_what_was_under_way_once(clock: Clock) -> None:
    lanes = Lanes(most=100)
    held = [lanes.lane(0) for _ in range(16)]
    under_way = [holding.__enter__() for holding in held]
    clock.now += 1
    for one in under_way:  # all began before the first of them was throttled
        one.ended(503)
    assert lanes.limit == 8
    for holding in held:
        holding.__exit__(None, None, None)
    clock.now += 1
    with lanes.lane(0) as lane:
        lane.ended(429)
    assert lanes.limit == 1


def test_success_adds_one_lane_for_every_round(clock: Clock) -> None:
    lanes = Lanes(most=6)
    lanes.limit = 2.0
    before = [lanes.limit]
    for _ in range(40):
        with lanes.lane(0) as lane:
            lane.ended(206)
        before.append(lanes.limit)
    assert before == sorted(before)
    assert before[2] == pytest.approx(2.9, abs=0.2)
    assert lanes.limit == 6


def test_an_error_of_the_server_is_no_throttling() -> None:
    lanes = Lanes(most=4)
    with lanes.lane(0) as lane:
        lane.ended(500)
    assert lanes.limit == 4


def test_no_more_than_the_limit_are_under_way() -> None:
    lanes = Lanes(most=8)
    lanes.limit = 2.0
    lock, now, seen, pair = threading.Lock(), [0], [], threading.Barrier(2)

    def run() -> None:
        with lanes.lane(60):
            with lock:
                now[0] += 1
                seen.append(now[0])
            pair.wait(60)  # for the one beside it; a third one would come in while they stay a moment longer
            time.sleep(0.01)
            with lock:
                now[0] -= 1

    threads = [threading.Thread(target=run) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seen) == 2
