"""The journal: what it says after any crash is what happened."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrofill.backfill.journal import (
    Dead,
    Final,
    Journal,
    Ledger,
    Rows,
    Span,
    pack,
    set_aside,
    unpack,
)
from retrofill.errors import BusyError, InputError, StoreError

SPANS = st.lists(
    st.builds(Span, st.integers(0, 3), st.integers(0, 60), st.integers(1, 9)), max_size=12
)
HOUR = 3_600_000


def sent(journal: Journal, number: int, *spans: Span, now_ms: int = 1000) -> None:
    events = sum(span.count for span in spans)
    journal.sent(number, list(spans), events=events, size=10 * events, now_ms=now_ms)


def taken(number: int, *, at_ms: int = 2000, tries: int = 1) -> Final:
    return Final(number, tries, 200, at_ms, at_ms, None)


@given(SPANS)
def test_ranges_come_back_as_they_were_packed(spans: list[Span]) -> None:
    assert unpack(pack(spans)) == spans


@given(SPANS, st.integers(0, 3), st.integers(0, 70), st.integers(0, 70))
def test_missing_rows_are_those_in_no_range(
    spans: list[Span], number: int, first: int, last: int
) -> None:
    there = {(s.set, row) for s in spans for row in range(s.first, s.first + s.count)}
    rows = Rows([pack(spans)])
    assert rows.count == len(there)
    found = [row for a, b in rows.missing(number, first, last) for row in range(a, b)]
    assert found == [row for row in range(first, last) if (number, row) not in there]


def test_only_answered_requests_are_done_after_a_crash(tmp_path: Path) -> None:
    journal = Journal(tmp_path, threaded=False)
    sent(journal, 1, Span(0, 0, 10), Span(1, 5, 5))
    sent(journal, 2, Span(0, 10, 10))
    journal.kick()
    journal.answered(taken(1))
    journal.kick()
    journal.answered(taken(2))  # noted, never committed
    journal._db.close()
    journal._lock.close()
    again = Journal(tmp_path, threaded=False)
    assert list(again.done().spans()) == [Span(0, 0, 10), Span(1, 5, 5)]
    assert again.next_id == 3
    again.close()


def test_everything_noted_before_is_on_disk_when_flushed_returns(tmp_path: Path) -> None:
    async def whole() -> None:
        journal = Journal(tmp_path)

        async def one(number: int) -> None:
            sent(journal, number, Span(0, number * 10, 10))
            await journal.flushed()
            reader = Ledger(tmp_path)
            assert number in {request["id"] for request in reader.requests()}
            reader.close()

        await asyncio.gather(*(one(number) for number in range(1, 40)))
        journal.close()

    asyncio.run(whole())


def test_a_dead_letter_stands_in_the_file_once_even_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "dead-letters-send.ndjson"
    journal = Journal(tmp_path, threaded=False)
    for row in range(3):
        journal.died(Dead(0, row, "bad", json.dumps({"row": row})))
    journal.kick()
    journal.close()
    path.write_text('{"row": 0}\n{"row": 1}\n{"ro')
    Journal(tmp_path, threaded=False).close()
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2]
    path.unlink()
    Journal(tmp_path, threaded=False).close()
    assert len(path.read_text().splitlines()) == 3


def test_two_runs_never_work_in_one_directory(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(BusyError, match="Another run works in"):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()


def test_a_directory_belongs_to_one_source_and_one_destination(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.settle({"fingerprint": "a", "destination": "http://x"})
    journal.settle({"fingerprint": "a", "destination": "http://x"})
    with pytest.raises(InputError, match="begun with destination"):
        journal.settle({"destination": "http://y"})
    journal.close()


def test_a_journal_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    async def whole() -> None:
        journal = Journal(tmp_path)
        journal._db.execute("DROP TABLE requests")
        sent(journal, 1, Span(0, 0, 1))
        with pytest.raises(StoreError, match="journal cannot be written"):
            await journal.flushed()
        with pytest.raises(StoreError, match="journal cannot be written"):
            await journal.flushed()
        journal.close()

    asyncio.run(whole())


def test_a_lost_window_is_sent_again_and_stays_in_the_ledger(tmp_path: Path) -> None:
    journal = Journal(tmp_path, threaded=False)
    for number in range(1, 5):
        sent(journal, number, Span(0, number * 10, 10))
        journal.answered(taken(number, at_ms=number * HOUR))
    journal.kick()
    assert journal.lose(2 * HOUR, 3 * HOUR, 9 * HOUR) == 20
    assert list(journal.done().spans()) == [Span(0, 10, 10), Span(0, 40, 10)]
    journal.close()
    ledger = Ledger(tmp_path)
    lost = {request["id"]: request["lost_ms"] for request in ledger.requests()}
    assert lost == {1: None, 2: 9 * HOUR, 3: 9 * HOUR, 4: None}
    assert ledger.totals().taken == 20
    ledger.close()


def test_single_rows_can_be_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path, threaded=False)
    sent(journal, 1, Span(0, 0, 10), Span(1, 0, 4))
    sent(journal, 2, Span(0, 10, 10))
    journal.answered(taken(1))
    journal.answered(taken(2))
    journal.kick()
    journal.lose_rows(Rows([], [(0, 3), (1, 0)]), 5000)
    assert list(journal.done().spans()) == [Span(0, 0, 3), Span(0, 4, 16), Span(1, 1, 3)]
    sent(journal, journal.next_id, Span(0, 3, 1))
    journal.answered(taken(journal.next_id))
    journal.close()
    ledger = Ledger(tmp_path)
    assert ledger.totals().taken == 23
    ledger.close()


def test_only_what_may_have_been_stored_long_ago_is_unsure(tmp_path: Path) -> None:
    journal = Journal(tmp_path, threaded=False)
    sent(journal, 1, Span(0, 0, 10), now_ms=1000)  # never answered
    sent(journal, 2, Span(0, 10, 10), now_ms=1000)
    journal.answered(Final(2, 3, 429, 0, 1500, 1200))  # an uncertain try, then refused
    sent(journal, 3, Span(0, 10, 5), now_ms=1600)
    journal.answered(taken(3))  # half of it was taken later
    sent(journal, 4, Span(0, 20, 10), now_ms=1000)
    journal.answered(Final(4, 1, 503, 0, 1500, None))  # certainly not stored
    sent(journal, 5, Span(0, 30, 10), now_ms=9000)  # not long ago
    journal.kick()
    assert journal.unsure_before(5000, 99_000) == 15
    assert list(journal.unsure().spans()) == [Span(0, 0, 10), Span(0, 15, 5)]
    assert journal.done().missing(0, 0, 40) == [(20, 40)]
    journal.trust_unsure()
    assert journal.unsure().count == 0
    journal.close()


def test_daily_arrivals_add_up_over_runs(tmp_path: Path) -> None:
    journal = Journal(tmp_path, threaded=False)
    journal.arrived("device", "d", 100, 5)
    journal.arrived("device", "d", 100, 6)
    journal.arrived("user", "u", 99, 1)
    journal.kick()
    assert journal.arrivals(100) == [("device", "d", 100, 11)]
    journal.close()


def test_a_directory_without_a_journal_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No journal in"):
        Ledger(tmp_path)


def test_a_journal_is_set_aside_whole_and_never_under_a_reader(tmp_path: Path) -> None:
    for place in ("journal-1.db", "journal-1-2.db"):
        journal = Journal(tmp_path, threaded=False)
        sent(journal, 1, Span(0, 0, 5))
        journal.answered(taken(1))
        with pytest.raises(BusyError):
            set_aside(tmp_path, 1)
        journal.close()
        reader = Ledger(tmp_path)
        assert reader.totals().taken == 5
        with pytest.raises(BusyError, match="reads the journal"):
            set_aside(tmp_path, 1)
        reader.close()
        assert set_aside(tmp_path, 1) == tmp_path / place
        assert not (tmp_path / "journal.db").exists()
    fresh = Journal(tmp_path, threaded=False)
    assert fresh.done().count == 0
    fresh.close()


def test_a_journal_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops while it makes one leaves what the next begins anew, and readers find none."""
    (tmp_path / "journal.new").write_bytes(b"half of a page")
    (tmp_path / "journal.new-journal").write_bytes(b"and how to take it back")

    def stop(*_: object) -> None:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(OSError, match="stopped"):
            Journal(tmp_path, threaded=False)
    with pytest.raises(InputError, match="No journal in"):
        Ledger(tmp_path)
    Journal(tmp_path, threaded=False).close()
    ledger = Ledger(tmp_path)
    assert (ledger.meta(), ledger.totals().requests) == ({}, 0)
    ledger.close()
    assert not (tmp_path / "journal.new").exists()
