from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from tests.engine.stored import DAY_MS, PROJECT, Stored, block
from tests.lake.blocks import START_MS

from retrofill.core.block import Merge
from retrofill.core.person import FORGOTTEN, Person
from retrofill.engine.deletion import Deletions, Entry, Request
from retrofill.errors import InputError, StoreError
from retrofill.limits import DELETION_FREEZE_DAYS, DELETION_IDS_MAX, Limits

TODAY = date(2026, 1, 1)
DELETION_DAYS = Limits().deletion_days
DAY = date(2026, 1, 1 + DELETION_DAYS)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.days = 0

    def now_ms(self) -> int:
        return START_MS + self.days * DAY_MS


class Place:
    """Three people, 3 merged into 1, and the deletions of their directory."""

    def __init__(self, folder: Path) -> None:
        merge = Merge(2, PROJECT, 3, 1, START_MS)
        events = [{"person": 1, "user_id": "ada"}, {"person": 2, "user_id": "bob"}, {"person": 3}]
        self.stored = Stored(folder / "lake", [block(1, events, merges=[merge])], sealed=1)
        self.stored.people = {1: Person(1, "ada"), 2: Person(2, "bob"), 3: Person(3, merged_into=1)}
        self.clock = Clock()
        self.file = folder / "deletions.sqlite"
        self.days = {PROJECT: DELETION_DAYS, PROJECT + 1: 0}
        self.deletions = self.open()
        self.erased: list[tuple[int, list[int]]] = []
        self.failing = False

    def open(self) -> Deletions:
        return Deletions(self.file, self.clock, days=self.days.__getitem__)

    def ask(
        self, *ids: int, users: tuple[str, ...] = (), ignore: bool = False
    ) -> tuple[list[int], list[int | str]]:
        asked = Request(list(ids), list(users), "me", ignore=ignore)
        job, invalid = self.deletions.add(self.stored.reader, PROJECT, asked)
        return [one.amplitude_id for one in job.entries], invalid

    async def erase(self, project: int, people: list[int]) -> None:
        self.erased.append((project, people))
        if self.failing:
            raise StoreError("The disk is gone")

    def run(self) -> int:
        return asyncio.run(self.deletions.run_due(self.stored.reader, self.erase))

    def status(self) -> list[str]:
        return [job.status for job in self.deletions.jobs(PROJECT, TODAY, DAY)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    found.deletions.close()


def test_people_are_queued_by_either_id_each_once(place: Place) -> None:
    assert place.ask(1, 3, users=("ada", "bob")) == ([1, 2], [])
    (job,) = place.deletions.jobs(PROJECT, TODAY, DAY)
    assert (job.day, job.status, job.done_on) == (DAY.isoformat(), "staging", None)
    assert job.entries == [Entry(1, "2026-01-01", "me", "ada"), Entry(2, "2026-01-01", "me", "bob")]


def test_an_unknown_id_queues_nothing_unless_it_is_ignored(place: Place) -> None:
    with pytest.raises(InputError, match="Unknown ids: 99, nobody"):
        place.ask(1, 99, users=("nobody",))
    assert place.deletions.jobs(PROJECT, TODAY, DAY) == []
    assert place.ask(1, 99, users=("nobody",), ignore=True) == ([1], [99, "nobody"])
    assert place.status() == ["staging"]


def test_someone_deleted_before_is_unknown(place: Place) -> None:
    place.stored.people[2] = Person(2, merged_into=FORGOTTEN)
    with pytest.raises(InputError, match="Unknown ids: bob"):
        place.ask(users=("bob",))


def test_the_number_of_ids_is_bounded(place: Place) -> None:
    for ids in ((), tuple(range(DELETION_IDS_MAX + 1))):
        with pytest.raises(InputError, match="ids to delete"):
            place.ask(*ids, ignore=True)


def test_a_job_is_staging_then_submitted_then_done(place: Place) -> None:
    place.ask(1)
    place.clock.days = DELETION_DAYS - DELETION_FREEZE_DAYS - 1
    assert place.status() == ["staging"]
    place.clock.days += 1
    assert (place.status(), place.run()) == (["submitted"], 0)
    place.clock.days = DELETION_DAYS
    assert (place.run(), place.status()) == (1, ["done"])
    assert place.erased == [(PROJECT, [1, 3])]
    assert place.run() == 0
    (job,) = place.deletions.jobs(PROJECT, TODAY, DAY)
    assert job.done_on == DAY.isoformat()


def test_a_person_may_be_taken_back_while_the_job_is_staging(place: Place) -> None:
    place.ask(1, 2)
    assert place.deletions.take_back(PROJECT, 1, DAY) == Entry(1, "2026-01-01", "me", "ada")
    with pytest.raises(InputError, match="No deletion of 1"):
        place.deletions.take_back(PROJECT, 1, DAY)
    place.clock.days = DELETION_DAYS - DELETION_FREEZE_DAYS
    with pytest.raises(InputError, match="no longer be edited"):
        place.deletions.take_back(PROJECT, 2, DAY)
    place.clock.days = DELETION_DAYS
    place.run()
    assert place.erased == [(PROJECT, [2])]


def test_requests_of_one_day_are_one_job_and_the_first_counts(place: Place) -> None:
    place.ask(1)
    place.ask(1, 2)
    place.clock.days = 1
    place.ask(2)
    jobs = place.deletions.jobs(PROJECT, TODAY, date(2026, 2, 1))
    assert [[one.amplitude_id for one in job.entries] for job in jobs] == [[1, 2], [2]]
    assert place.deletions.jobs(PROJECT + 1, TODAY, DAY) == []


def test_a_job_that_failed_half_way_runs_again_after_the_next_start(place: Place) -> None:
    place.ask(2)
    place.clock.days = DELETION_DAYS
    place.failing = True
    with pytest.raises(StoreError):
        place.run()
    assert place.status() == ["submitted"]
    place.deletions.close()
    place.deletions = place.open()
    place.failing = False
    assert place.run() == 1
    assert place.erased == [(PROJECT, [2])] * 2
    assert place.status() == ["done"]


def test_with_no_days_between_everyone_goes_at_the_next_look(place: Place) -> None:
    place.days[PROJECT] = 0
    place.ask(1)
    assert (place.status(), place.run(), place.status()) == (["submitted"], 1, ["done"])
    place.ask(2)  # on the same day, so of the same job
    assert (place.status(), place.run(), place.status()) == (["submitted"], 1, ["done"])
    assert place.erased == [(PROJECT, [1, 3]), (PROJECT, [2])]


def test_who_is_asked_for_while_a_job_runs_goes_at_the_next_look(place: Place) -> None:
    place.days[PROJECT] = 0
    place.ask(1)
    erase = place.erase

    async def erase_and_ask(project: int, people: list[int]) -> None:
        place.ask(2)
        await erase(project, people)

    asyncio.run(place.deletions.run_due(place.stored.reader, erase_and_ask))
    assert place.status() == ["submitted"]
    assert (place.run(), place.status()) == (1, ["done"])
    assert place.erased == [(PROJECT, [1, 3]), (PROJECT, [2])]


def test_another_delay_moves_only_what_is_asked_for_later(place: Place) -> None:
    place.ask(1)
    place.days[PROJECT] = 1
    place.ask(2)
    place.clock.days = 1
    assert (place.run(), place.erased) == (1, [(PROJECT, [2])])
    place.clock.days = DELETION_DAYS
    assert (place.run(), place.erased[1:]) == (1, [(PROJECT, [1, 3])])


def test_jobs_are_listed_for_six_months_at_most(place: Place) -> None:
    with pytest.raises(InputError, match="six months"):
        place.deletions.jobs(PROJECT, TODAY, date(2026, 8, 1))
    with pytest.raises(InputError, match="before start_day"):
        place.deletions.jobs(PROJECT, DAY, TODAY)


def test_a_file_that_is_none_of_ours_is_told(tmp_path: Path) -> None:
    file = tmp_path / "deletions.sqlite"
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="SQLite failed"):
        Deletions(file, Clock(), days=lambda _: 0)


def test_what_was_asked_for_is_synced_before_it_is_answered(place: Place) -> None:
    place.ask(1)
    with sqlite3.connect(place.file) as other:
        assert other.execute("SELECT amplitude_id FROM entries").fetchall() == [(1,)]
    other.close()
