"""The demo's proof: its comparison finds what is wrong, and its run on the real server finds nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from demo.git_history import compare, history

Row = dict[str, Any]


def _row(event: Row) -> Row:
    """Return an event as the export shows it."""
    moment = datetime.fromtimestamp(event["time"] / 1000, UTC)
    return {
        **{name: value for name, value in event.items() if name not in ("insert_id", "time")},
        "$insert_id": event["insert_id"],
        "event_time": f"{moment:%Y-%m-%d %H:%M:%S.%f}",
    }


@pytest.fixture(scope="module")
def events() -> list[Row]:
    return history()


def test_the_history_is_in_time_order_and_whole(events: list[Row]) -> None:
    times = [event["time"] for event in events]
    assert times == sorted(times)
    assert len({event["insert_id"] for event in events}) == len(events) == 60_966


def test_what_came_back_as_it_went_in_is_whole(events: list[Row]) -> None:
    result = compare(events, [_row(event) for event in events])
    assert result.whole
    assert str(result) == "60,966 sent · 60,966 read back · 0 missing · 0 doubled · 0 out of order"


def _lose(rows: list[Row]) -> None:
    del rows[7]


def _double(rows: list[Row]) -> None:
    rows.append(rows[-1])


def _swap(rows: list[Row]) -> None:
    rows[3], rows[4] = rows[4], rows[3]


def _change(rows: list[Row]) -> None:
    rows[5] = {**rows[5], "user_properties": {"utc_offset": "+9999"}}


@pytest.mark.parametrize(
    ("spoil", "found"),
    [(_lose, "missing"), (_double, "doubled"), (_swap, "out_of_order"), (_change, "different")],
)
def test_the_comparison_finds(
    events: list[Row], spoil: Callable[[list[Row]], None], found: str
) -> None:
    rows = [_row(event) for event in events[:100]]
    spoil(rows)
    result = compare(events[:100], rows)
    assert not result.whole
    assert getattr(result, found) == 1


@pytest.mark.slow
def test_the_demo_gets_everything_back_from_a_real_server(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "demo" / "git_history.py"
    done = subprocess.run(
        [sys.executable, str(script), "--data", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60,966 sent · 60,966 read back · 0 missing · 0 doubled · 0 out of order" in done.stdout
    assert "404 people" in done.stdout
