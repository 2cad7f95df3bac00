"""The report is one page that loads nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from tests.backfill import staged
from tests.backfill.destination import Misbehaving
from tests.backfill.test_send import OPEN, send

from retrofill.backfill import manifest as manifests
from retrofill.backfill import rehearsed, report
from retrofill.backfill.journal import Dead, Journal
from retrofill.backfill.profile import PROFILES
from retrofill.backfill.report import grouped, page
from retrofill.backfill.resend import recipe
from retrofill.backfill.status import duration, status


class Loads(HTMLParser):
    """Collects everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "link", "img", "iframe", "object"}:
            self.found.append(tag)
        self.found += [v or "" for name, v in attrs if name in {"src", "href", "xlink:href"}]


def sent(work: Path) -> None:
    staged.write(work, staged.history({1: 30, 2: 9}))
    send(work, Misbehaving(), OPEN)
    journal = Journal(work, threaded=False)
    journal.settle({"destination": "http://x", "fingerprint": "made by hand", "import": "imp"})
    journal.note({"limits": msgspec.json.encode(PROFILES["amplitude"]).decode()})
    for second in range(5):
        journal.progressed(second * 1000, taken=second * 8, dead=0, held=second % 2, flying=1)
    journal.died(Dead(9, 9, "<b>bad</b> & worse", "{}"))
    journal.kick()
    journal.close()


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    sent(tmp_path)
    text = page(tmp_path)
    loads = Loads()
    loads.feed(text)
    assert loads.found == []
    assert not re.search(r"url\(|@import", text)
    for heading in ("Plan and outcome", "Events by day", "Progress", "Refused", "Verification"):
        assert heading in text
    assert text.count("<svg") >= 4
    assert "<b>bad</b>" not in text
    assert "&lt;b&gt;bad" in text


def test_a_calendar_too_long_shows_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged.write(tmp_path, staged.history({1: 3}))
    manifest = manifests.read(tmp_path / "stage")
    assert manifest is not None
    days = {"1999-01-01": 1, "2024-01-01": 2, "2024-01-02": 3}
    long = msgspec.structs.replace(manifest, days=days)
    monkeypatch.setattr(report, "staged", lambda _work: long)
    text = page(tmp_path)
    assert "the last 3,700 of 9,133 days" in text
    assert 'title="2024-01-02: 3 of the history' in text
    assert 'title="1999-01-01' not in text


def test_a_stage_alone_has_a_page_too(tmp_path: Path) -> None:
    staged.write(tmp_path, staged.history({1: 3}))
    assert "no destination yet" in page(tmp_path)


def test_days_become_weeks_and_months_when_there_are_many() -> None:
    assert grouped({"2024-01-01": 2, "2024-01-03": 1}) == (
        ["2024-01-01", "2024-01-02", "2024-01-03"],
        [2, 0, 1],
    )
    names, values = grouped({"2024-01-01": 2, "2024-12-31": 1})
    assert len(names) == 53
    assert sum(values) == 3
    assert grouped({"2010-01-01": 2, "2024-12-31": 1}) == (["2010-01", "2024-12"], [2, 1])


def test_the_state_is_told_at_every_stage(tmp_path: Path) -> None:
    staged.write(tmp_path, staged.history({1: 30, 2: 9}))
    assert status(tmp_path)["state"] == "staged"
    send(tmp_path, Misbehaving(), OPEN)
    found = status(tmp_path)
    assert found["state"] == "complete"
    assert found["taken"] == 39
    assert found["left"] == 0


def test_the_recipe_names_types_and_upload_hours(tmp_path: Path) -> None:
    sent(tmp_path)
    found = recipe(tmp_path)
    assert found["event_types"] == {"type": 39}
    assert found["upload_windows"] == [{"from": "2023-11-14T22:00Z", "to": "2023-11-14T23:00Z"}]
    assert found["marks"] == {"source_name": "retrofill", "source_version": "imp"}


def test_time_spans_are_told_as_people_do() -> None:
    assert [duration(s) for s in (0, 59, 60, 3700, 90_000)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h 1 min",
        "1 d 1 h",
    ]


@pytest.mark.parametrize("text", ["{}", '{"block":1,"at_ms":"x","exact":true,"against":"a"}'])
def test_a_rehearsal_of_another_version_leaves_the_rest_of_the_page(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "rehearsal.json").write_text(text)
    assert "rehearse again" in rehearsed.section(tmp_path)
