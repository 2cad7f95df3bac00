"""Who folds history again catches up with traffic that is faster, because the traffic is put off for it."""

from __future__ import annotations

import pytest

from retrofill.engine.pace import Pace
from retrofill.limits import (
    REFOLD_PACE_ROWS,
    REFOLD_PACE_WAIT_S,
    REFOLD_ROOM_ROWS,
    REFOLD_ROOM_WAIT_S,
    REFOLD_SHARE,
    SEAL_LAG_EVENTS_MAX,
)

BLOCK_ROWS = 2000
BLOCK_S = 0.025  # 80,000 rows a second


def arriving(pace: Pace, seconds: float, now_s: float) -> int:
    """Commit blocks for a while, each as soon as it may; return their rows."""
    rows, end = 0, now_s + seconds
    while now_s < end:
        now_s += BLOCK_S
        rows += BLOCK_ROWS
        now_s += pace.wait_s(BLOCK_ROWS, now_s=now_s, took_s=0.0)
    return rows


@pytest.mark.parametrize("fold_rows_per_s", [30_000, 50_000, 100_000])
def test_less_is_left_each_time_around_however_slow_the_fold(fold_rows_per_s: int) -> None:
    pace, now_s, left = Pace(), 0.0, 4_000_000
    pace.begin()
    for _ in range(20):
        seconds = left / fold_rows_per_s
        more = arriving(pace, seconds, now_s)
        pace.follow(left, seconds)
        now_s += seconds
        if left <= REFOLD_PACE_ROWS:
            break
        left = more
    assert left <= REFOLD_PACE_ROWS


def test_nobody_waits_where_nobody_catches_up_or_little_comes() -> None:
    pace = Pace()
    assert pace.wait_s(10**6, now_s=1.0, took_s=0.0) == 0
    assert pace.wait_s(10**6, now_s=1.0, took_s=9.0, room=1) == 0
    pace.begin()
    pace.follow(REFOLD_PACE_ROWS - 1, 100.0)  # too few to say
    assert pace.wait_s(10**6, now_s=1.0, took_s=0.0) == 0
    pace.follow(1_000_000, 20.0)
    waits = [pace.wait_s(10, now_s=2.0 + number / 1000, took_s=0.0) for number in range(1000)]
    assert not any(waits)  # 10,000 rows a second, 30,000 may come
    assert pace.wait_s(10**9, now_s=4.0, took_s=0.0) == pytest.approx(REFOLD_PACE_WAIT_S)
    pace.end()
    assert pace.wait_s(10**6, now_s=4.0, took_s=9.0, room=1) == 0


def test_a_block_of_few_rows_waits_less_than_a_large_one() -> None:
    pace = Pace()
    pace.begin()
    pace.follow(1_000_000, 50.0)
    first = [pace.wait_s(2000, now_s=10.0, took_s=0.0) for _ in range(3)]
    assert first == sorted(first)
    assert max(first) <= REFOLD_PACE_WAIT_S


@pytest.mark.parametrize("speed_rows_per_s", [0, 10_000, 10**9])
def test_what_waits_to_be_sealed_stays_below_its_bound_however_long_sealing_rests(
    speed_rows_per_s: int,
) -> None:
    pace, now_s, unsealed = Pace(), 0.0, 300_000
    pace.begin()
    pace.follow(60 * speed_rows_per_s, 60.0)
    longest_s = 0.0
    while now_s < 240:
        now_s += BLOCK_S
        unsealed += BLOCK_ROWS
        room = SEAL_LAG_EVENTS_MAX - unsealed
        wait_s = pace.wait_s(BLOCK_ROWS, now_s=now_s, took_s=0.0, room=room)
        longest_s = max(longest_s, wait_s)
        now_s += wait_s
    assert unsealed < SEAL_LAG_EVENTS_MAX
    assert unsealed > SEAL_LAG_EVENTS_MAX - REFOLD_ROOM_ROWS  # they did not stand still
    assert longest_s <= REFOLD_ROOM_WAIT_S


def test_the_loop_rests_for_a_part_of_its_time_from_the_beginning() -> None:
    pace, now_s, busy_s = Pace(), 0.0, 0.0
    pace.begin()
    while now_s < 60:
        busy_s += BLOCK_S
        now_s += BLOCK_S + pace.wait_s(BLOCK_ROWS, now_s=now_s, took_s=BLOCK_S)
    assert busy_s / now_s == pytest.approx(REFOLD_SHARE, rel=0.01)
    # A disk that stalls is no reason to stall longer.
    assert pace.wait_s(BLOCK_ROWS, now_s=now_s, took_s=30.0) == REFOLD_PACE_WAIT_S
    # Whichever is longer counts, not both.
    pace.follow(60 * BLOCK_ROWS, 60.0)
    long_s = pace.wait_s(BLOCK_ROWS // 100, now_s=now_s, took_s=BLOCK_S)
    assert long_s == pytest.approx(BLOCK_S * (1 / REFOLD_SHARE - 1))
    pace.end()
    assert pace.wait_s(BLOCK_ROWS, now_s=now_s, took_s=BLOCK_S) == 0
    pace.begin(rests=False)
    assert pace.wait_s(BLOCK_ROWS, now_s=now_s, took_s=BLOCK_S) == 0
