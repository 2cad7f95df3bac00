"""Each figure of the difference, on people made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from retrofill.backfill import rehearsed
from retrofill.cli import rehearse as verb
from retrofill.core import likeness
from retrofill.core.block import COLUMNS
from retrofill.core.person import Person
from retrofill.engine.history import Alike, Days
from retrofill.rehearse import difference, outcome
from retrofill.rehearse.outcome import ByDay, Change, Double, Merge, Moved

DAY_MS = 86_400_000
COUNTRY = COLUMNS.index("country")


def one(number: int, user: str | None = None, **more: Any) -> Person:
    country = more.pop("country", None)
    columns = tuple(country if at == COUNTRY else None for at in range(len(COLUMNS)))
    return Person(number, user, columns=columns, **more)


def people(*some: Person) -> dict[int, Person]:
    return {person.amplitude_id: person for person in some}


def change(name: str, old: str | None, new: str | None, count: int, *, built_in: bool) -> Change:
    return Change(name, built_in, old, new, count)


def test_days_of_the_project_change_by_what_changes_of_the_people_looked_at() -> None:
    whole = Days({"2024-01-01": 10, "2024-01-02": 5}, {"2024-01-02": 7})
    before = Days({"2024-01-02": 2}, {"2024-01-02": 2})
    after = Days({"2023-12-31": 1, "2024-01-02": 1}, {"2023-12-31": 1, "2024-01-02": 2})
    new, active = difference.by_day(whole, before, after)
    assert new == ByDay(whole.new, {"2023-12-31": 1, "2024-01-01": 10, "2024-01-02": 4})
    assert active == ByDay(whole.active, {"2023-12-31": 1, "2024-01-02": 7})


def test_first_seen_moves_of_live_people_are_counted_by_distance() -> None:
    base = 1000 * DAY_MS
    before = people(
        one(1, "ann", first_seen_ms=base),
        one(2, "bob", first_seen_ms=base),
        one(3, "eve", first_seen_ms=base),
        one(4, "only identified"),
        one(5, None, first_seen_ms=base),
    )
    after = people(
        one(1, "ann", first_seen_ms=base - DAY_MS // 2),
        one(2, "bob", first_seen_ms=base - 400 * DAY_MS),
        one(3, "eve", first_seen_ms=base),
        one(4, "only identified", first_seen_ms=base),
        one(5, None, first_seen_ms=base, merged_into=1),
        one(6, "new", first_seen_ms=5),
    )
    found = difference.first_seen(before, after)
    assert (found.moved, found.days_median, found.days_max) == (2, 200.25, 400.0)
    assert found.spread == {"up to a day": 1, "more than a year": 1}
    assert found.listed[0] == Moved("bob", base, base - 400 * DAY_MS)
    assert difference.new_people(before, after) == 1
    assert difference.first_seen(before, before).moved == 0


def test_properties_of_live_people_are_counted_by_value_and_person() -> None:
    before = people(
        one(1, properties={"plan": "paid", "n": 1}),
        one(2, properties={"plan": "paid"}, country="Brazil"),
        one(3, properties={"plan": "free"}),
        one(4, properties={"x": True}),
    )
    after = people(
        one(1, properties={"plan": "free"}),
        one(2, properties={"plan": "free"}, country="Chile"),
        one(3, properties={"plan": "free"}),
        one(4, properties={"x": 1}),
        one(9, properties={"plan": "of nobody live"}),
    )
    found = difference.properties(before, after)
    assert found.people == 3
    assert found.names == {"plan": 2, "country": 1, "n": 1, "x": 1}
    assert found.listed == [
        change("plan", '"paid"', '"free"', 2, built_in=False),
        change("country", '"Brazil"', '"Chile"', 1, built_in=True),
        change("n", "1", None, 1, built_in=False),
        change("x", "true", "1", 1, built_in=False),
    ]


def test_pairs_of_values_are_bounded_and_sums_are_not() -> None:
    before = people(*(one(n, properties={"seen": n}) for n in range(1, 1501)))
    after = people(*(one(n, properties={"seen": -n}) for n in range(1, 1501)))
    found = difference.properties(before, after)
    assert (found.people, found.names, len(found.listed)) == (1500, {"seen": 1500}, 100)


def test_merges_are_those_that_were_not() -> None:
    before = people(one(1, "ann"), one(2, None), one(3, None, merged_into=1))
    after = people(
        one(1, "ann"),
        one(2, None, merged_into=1),
        one(3, None, merged_into=1),
        one(4, None, merged_into=1),
    )
    assert difference.merges(before, after) == [
        Merge("ann", was_live=True),
        Merge("ann", was_live=False),
    ]


def test_who_is_probably_counted_twice_is_named_with_the_evidence() -> None:
    before = people(
        one(1, "Ann@Shop.org"),
        one(2, "user:ab-12345"),
        one(3, "zoe-1", properties={"email": "Zoe@Example.org"}),
        one(4, "old-live-1", properties={"phone": "+49 30 1234567"}),
        one(5, "old-live-2", properties={"phone": "0049301234567"}),
    )
    after = before | people(
        one(11, "ann@shop.org"),
        one(12, "ab-12345"),
        one(13, "zoe-2", properties={"email": "zoe@example.org "}),
        one(14, "shop-999999"),
        one(15, "mail-999999"),
    )
    users = {"ann@shop.org", "ab-12345", "zoe-2", "shop-999999", "mail-999999"}
    found = difference.doubles(
        before,
        after,
        users,
        [Alike(77, "far-away", "prefix", "ab-12345")],
        [("tablet", ["ab-12345", "zoe-2"], 0)],
    )
    assert found == [
        Double("case or space", "ann@shop.org", ["Ann@Shop.org", "ann@shop.org"], live=True),
        Double("email", "zoe@example.org", ["zoe-1", "zoe-2"], live=True),
        Double("prefix", "ab-12345", ["ab-12345", "far-away"], live=True),
        Double("prefix", "ab-12345", ["ab-12345", "user:ab-12345"], live=True),
        Double("device", "tablet", ["ab-12345", "zoe-2"], live=False),
    ]
    assert difference.evidence(found) == {"prefix": 2, "case or space": 1, "device": 1, "email": 1}


@pytest.mark.parametrize(
    ("first", "other", "by"),
    [
        ("Ann", "ann ", "case or space"),
        ("auth0|5f3a9", "5F3A9", "prefix"),
        ("id:12345", "12345", "prefix"),
        ("id:1234", "1234", None),  # too short
        ("user-abcde", "abcde", None),  # no digit
        ("shop-123456", "mail-123456", None),  # neither stands alone
        ("same-12345", "same-12345", None),
        ("ann", "bob", None),
    ],
)
def test_user_ids_that_are_alike(first: str, other: str, by: str | None) -> None:
    assert likeness.alike(first, other) == by
    assert likeness.alike(other, first) == by
    assert by is None or set(likeness.forms(first)) & set(likeness.forms(other))


def test_addresses_are_found_by_the_name_of_the_property() -> None:
    properties = {
        "E-Mail": " A@b.org",
        "email_address": "no address",
        "phone": 301234567,
        "Mobile Number": "+1 (555) 123-4567",
        "tel": "12",
        "note": "x@y.org",
        "mail": None,
    }
    assert list(likeness.contacts(properties)) == [
        ("E-Mail", "a@b.org"),
        ("phone", "301234567"),
        ("Mobile Number", "15551234567"),
    ]


def test_a_rehearsal_that_is_cut_off_while_it_is_kept_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = outcome.read(tmp_path)
    assert made is None
    values = {name: kind() for name, kind in _EMPTY.items()}
    first = msgspec.convert(values, outcome.Outcome)
    outcome.store(tmp_path, first, people(one(1, "ann", properties={"a": 1})))
    assert outcome.read(tmp_path) == first
    assert outcome.read_before(tmp_path)[1].properties == {"a": 1}

    def cut(_self: Path, _to: Path) -> None:
        raise OSError

    monkeypatch.setattr(Path, "rename", cut)
    with pytest.raises(OSError):  # noqa: PT011 - this very one
        outcome.store(tmp_path, first, people(one(1, "ann", properties={"a": 2})))
    assert outcome.read(tmp_path) is None


def test_a_setting_that_was_not_rehearsed_has_no_figures() -> None:
    values = {name: kind() for name, kind in _EMPTY.items()}
    values["synced"] = {"people": 2, "names": {"plan": 2, "email": 1}}
    made = msgspec.convert(values, outcome.Outcome)
    assert verb._names(made) == (("property", "people, synced"), [("plan", 2), ("email", 1)])
    assert ">skipped<" not in rehearsed._properties(
        values | {"synced": dict(listed=[], **values["synced"])}
    )
    values["skipped"] = {"people": 1, "names": {"size": 1}}
    made = msgspec.convert(values, outcome.Outcome)
    names, rows = verb._names(made)
    assert names == ("property", "people, synced", "people, skipped")
    assert rows == [("plan", 2, 0), ("email", 1, 0), ("size", 0, 1)]


_BY_DAY = {"before": {}, "after": {}}
_EMPTY: dict[str, Any] = {
    **dict.fromkeys(("import_id", "against", "kind", "property_time"), str),
    **dict.fromkeys(("exact", "skip_user_properties_sync"), bool),
    **dict.fromkeys(("unknown", "warnings", "merges", "doubles", "shared", "waiting"), list),
    **dict.fromkeys(("evidence", "refused", "refused_before", "first_seen"), dict),
    **dict.fromkeys(
        (
            *("block", "at_ms", "new_people", "merged", "doubled", "shared_devices", "duplicates"),
            *("throttled", "quota_days", "imported_rows", "imported_duplicates"),
        ),
        int,
    ),
    **dict.fromkeys(("sample", "duration_s"), float),
    **dict.fromkeys(("synced", "skipped"), lambda: None),
    **dict.fromkeys(("new_users", "active_users"), lambda: _BY_DAY),
    "volume": lambda: dict.fromkeys(
        ("events", "stored", "billed", "requests", "bytes", "people"), 0
    ),
}
