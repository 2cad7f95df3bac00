"""The demo's proof: its comparison finds what is wrong, and its run on the real server finds nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from demo.histories import HISTORIES, History, compare

Row = dict[str, Any]
GIT, SHOP = HISTORIES
PROOFS = (
    "60,966 sent · 60,966 read back · 0 missing · 0 doubled · 0 out of order",
    "31,106 sent · 31,106 read back · 0 missing · 0 doubled · 0 out of order",
)


@cache
def _events(history: History) -> list[Row]:
    return history.events()


def _row(event: Row) -> Row:
    """Return an event as the export shows it."""
    moment = datetime.fromtimestamp(event["time"] / 1000, UTC)
    return {
        **{name: value for name, value in event.items() if name not in ("insert_id", "time")},
        "$insert_id": event.get("insert_id", "made"),
        "event_time": f"{moment:%Y-%m-%d %H:%M:%S.%f}",
    }


def test_a_history_is_in_time_order_and_whole() -> None:
    for history in HISTORIES:
        times = [event["time"] for event in _events(history)]
        assert times == sorted(times)
    assert len({event["insert_id"] for event in _events(GIT)}) == len(_events(GIT)) == 60_966


def test_an_event_shows_what_its_person_had_then() -> None:
    tables: dict[str, Row] = {}
    for event in _events(SHOP):
        before = tables.get(event["user_id"], {})
        assert before.keys() <= event["user_properties"].keys()
        tables[event["user_id"]] = event["user_properties"]
    assert len({event["user_properties"]["utc_offset"] for event in _events(GIT)}) > 5


@pytest.mark.parametrize(
    ("history", "proof"), list(zip(HISTORIES, PROOFS, strict=True)), ids=["git", "shop"]
)
def test_what_came_back_as_it_went_in_is_whole(history: History, proof: str) -> None:
    events = _events(history)
    rows = [_row(event) for event in events]
    # One person's events may lie before or behind another's: arrival is ordered for each by itself.
    rows.sort(key=lambda row: str(row["user_id"]))
    result = compare(events, rows)
    assert result.whole
    assert str(result) == proof


def _lose(rows: list[Row]) -> None:
    del rows[7]


def _double(rows: list[Row]) -> None:
    rows.append(rows[-1])


def _swap(rows: list[Row]) -> None:
    mine = [at for at, row in enumerate(rows) if row["user_id"] == rows[0]["user_id"]]
    first = next(at for at in mine if rows[at]["event_time"] != rows[mine[-1]]["event_time"])
    rows[first], rows[mine[-1]] = rows[mine[-1]], rows[first]


def _change(rows: list[Row]) -> None:
    rows[5] = {**rows[5], "user_properties": {"utc_offset": "+9999"}}


@pytest.mark.parametrize("history", HISTORIES, ids=["git", "shop"])
@pytest.mark.parametrize(
    ("spoil", "found"),
    [(_lose, "missing"), (_double, "doubled"), (_swap, "out_of_order"), (_change, "different")],
)
def test_the_comparison_finds(
    history: History, spoil: Callable[[list[Row]], None], found: str
) -> None:
    events = _events(history)[:100]
    rows = [_row(event) for event in events]
    spoil(rows)
    result = compare(events, rows)
    assert not result.whole
    assert getattr(result, found) >= 1


@pytest.mark.slow
@pytest.mark.timeout(900)  # as much work as thirty others, and they begin together
def test_the_demo_gets_everything_back_from_a_real_server(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "demo" / "histories.py"
    done = subprocess.run(
        [sys.executable, str(script), "--data", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for proof in PROOFS:
        assert f"\n{proof}\n" in done.stdout
    assert "404 people" in done.stdout
    assert "600 people" in done.stdout
    assert (
        "the export of the import is 404 · 0 events left in the project · 0 people first seen"
        " · 0 of the 50 most active found by search\n"
        "git-history: its 60,966 rows are the same as before\n"
    ) in done.stdout
    # The same proof again after it was restored.
    assert done.stdout.count(f"\n{PROOFS[1]}\n") == 2
