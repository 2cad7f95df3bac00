"""How a rehearsal did: each of its figures as it was predicted, and as the destination shows it after the run."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import msgspec
from msgspec import Struct

from retrofill.backfill.drive import staged
from retrofill.backfill.journal import Ledger
from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import Target, names_retrofill, target
from retrofill.engine.history import Asked
from retrofill.rehearse import asked as stages
from retrofill.rehearse import difference, given, outcome
from retrofill.rehearse.outcome import VERDICT, Outcome, Properties


class Figure(Struct, frozen=True):
    """One figure. predicted, found: a number, or counts by name or day. differing: of those, the first that are not the same."""

    name: str
    predicted: int | float | dict[str, int]
    found: int | float | dict[str, int]
    differing: list[str] = []

    @property
    def same(self) -> bool:
        """Whether it came as it was predicted."""
        return self.predicted == self.found

    def line(self) -> str:
        """Say it in one line."""
        mark = "as predicted" if self.same else "otherwise"
        text = f"{mark:<13}{self.name}: predicted {_said(self.predicted)}"
        if not self.same:
            text += f", found {_said(self.found)}"
        return text + "".join(f"; {one}" for one in self.differing)


def _said(value: float | dict[str, int]) -> str:
    if isinstance(value, dict):
        return f"{sum(value.values()):,} in {len(value):,}"
    return f"{value:,}"


def applies(work: Path, to: Target) -> Outcome | None:
    """Return the rehearsal that a verification of this work directory can look at; None if there is none.

    It must have been made of the same import, and not against another server than the one that was sent to.
    """
    made = outcome.read(work)
    if made is None or made.import_id != staged(work).import_id:
        return None
    if made.kind == "server" and target(made.against).read != to.read:
        return None
    return made


def verdict(work: Path, to: Target, keys: Keys, made: Outcome) -> list[Figure]:
    """Ask the destination what is there now, and compare. The figures are kept in the work directory.

    Of a destination that is not ours, and where the rehearsal knew an export alone, these are what charts show.
    Raises FinalError if it refuses, RetryError if it cannot be reached.
    """
    ours = to.ours and names_retrofill(to.read)
    found = (
        _of_server(work, to, keys, made)
        if ours and made.kind != "export"
        else _of_charts(to, keys, made)
    )
    (work / VERDICT).write_bytes(
        msgspec.json.encode([{**msgspec.to_builtins(one), "same": one.same} for one in found])
    )
    return found


def _of_charts(to: Target, keys: Keys, made: Outcome) -> list[Figure]:
    """Compare the days between the first and the last that the rehearsal speaks of."""
    days = sorted({*made.new_users.after, *made.active_users.after})
    if not days:
        return []
    first, last = date.fromisoformat(days[0]), date.fromisoformat(days[-1])
    return [
        _days(f"{name} users by day", told.after, given.chart(to, keys, name, first, last))
        for name, told in (("new", made.new_users), ("active", made.active_users))
    ]


def _of_server(work: Path, to: Target, keys: Keys, made: Outcome) -> list[Figure]:
    """Ask a server of ours for the same people, as they are now."""
    manifest = staged(work)
    touched = stages.touched(work / "stage", manifest)
    wanted = Asked(device_ids=touched.device_ids, user_ids=touched.user_ids, rows="none")
    with given.ask(to, keys, wanted) as answer:
        now = answer.given
    before, after = outcome.read_before(work), now.people
    imported = given.import_figures(to, keys, manifest.import_id)
    return [
        _days("new users by day", made.new_users.after, now.days.new),
        _days("active users by day", made.active_users.after, now.days.active),
        Figure("new people", made.new_people, difference.new_people(before, after)),
        *_first_seen(made, difference.first_seen(before, after)),
        *_properties(made.properties, difference.properties(before, after)),
        Figure("merges", made.merged, len(difference.merges(before, after))),
        Figure("events stored", made.volume.stored, imported.rows - made.imported_rows),
        Figure("duplicates", made.duplicates, imported.duplicates - made.imported_duplicates),
        Figure("refused by the destination", sum(made.refused.values()), _refused(work)),
    ]


def _days(name: str, predicted: dict[str, int], found: dict[str, int]) -> Figure:
    return Figure(name, predicted, found, list(_differing(predicted, found)))


def _differing(predicted: dict[str, int], found: dict[str, int]) -> Iterator[str]:
    days = sorted({*predicted, *found})
    wrong = [one for one in days if predicted.get(one, 0) != found.get(one, 0)]
    for one in wrong[:5]:
        yield f"{one}: {predicted.get(one, 0):,} predicted, {found.get(one, 0):,} found"
    if len(wrong) > 5:
        yield f"and {len(wrong) - 5:,} more"


def _first_seen(made: Outcome, found: outcome.FirstSeen) -> Iterator[Figure]:
    yield Figure("first seen moved", made.first_seen.moved, found.moved)
    yield Figure("first seen moved, days at most", made.first_seen.days_max, found.days_max)


def _properties(predicted: Properties, found: Properties) -> Iterator[Figure]:
    yield Figure("live people whose properties changed", predicted.people, found.people)
    yield _days("live people by property that changed", predicted.names, found.names)
    sides = (
        {(one.name, one.old, one.new): one.people for one in side.listed}
        for side in (predicted, found)
    )
    first, second = sides
    same = sum(second.get(change) == people for change, people in first.items())
    yield Figure("listed changes of properties", len(first), same)


def _refused(work: Path) -> int:
    ledger = Ledger(work)
    try:
        return len(ledger.dead_rows())
    finally:
        ledger.close()
