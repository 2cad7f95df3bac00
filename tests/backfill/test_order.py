"""From the source's rows to what a misbehaving destination stores: within a person, arrival is in order of time.

Whoever shares a device or a user id is one person, whichever row shows it and wherever it stands in the source. At a
kiosk's device, which joins nobody, the order holds within each user.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.backfill.destination import Misbehaving
from tests.backfill.staging import ndjson, run
from tests.backfill.test_send import OPEN, SMALL, send

from retrofill.backfill.profile import Profile

MAPPING = """
event: {user_id: user, device_id: device, event_type: who, time: at, insert_id: id}
"""
Row = dict[str, Any]
FAULTS = {
    "throttle listed": 0.05, "throttle unlisted": 0.02, "500 after storing": 0.05, "503": 0.03,
    "reset after": 0.03, "cut": 0.03, "html 200": 0.02,
}  # fmt: skip


def history() -> list[Row]:
    """Rows of people by name, event_type says of whom; several of equal time."""
    rows: list[Row] = []

    def add(who: str, count: int, *ids: tuple[str | None, str | None]) -> None:
        rows.extend(
            {"who": who, "user": user, "device": device, "n": n}
            for n in range(count)
            for user, device in (ids[n * len(ids) // count],)
        )

    # Anonymous at first, then known, then anonymous again: one device.
    add("login", 60, (None, "phone-1"), ("user-login", "phone-1"), (None, "phone-1"))
    # One user on many devices, of which one was anonymous before.
    add("many", 90, (None, "tablet-9"), *(("user-many", f"screen-{n}") for n in range(8)),
        ("user-many", "tablet-9"))  # fmt: skip
    # Two users of one device, which is no kiosk yet: one person.
    add("couple", 40, ("user-his", "home-tv"), ("user-hers", "home-tv"))
    for user in range(15):
        add(f"kiosk {user}", 12, (f"guest-{user:02}", "kiosk-0"))
    for row in rows:
        row["at"] = 1_700_000_000_000 + row["n"] // 3 * 1000  # three of a time
        row["id"] = f"{row['who']}-{row['n']}"
    return rows


@pytest.mark.parametrize("profile", [SMALL, OPEN], ids=["limits", "no limits"])
@pytest.mark.parametrize("seed", range(4))
def test_arrival_is_in_order_of_time_within_a_person(
    tmp_path: Path, profile: Profile, seed: int
) -> None:
    rows, chance = history(), random.Random(seed)
    chance.shuffle(rows)
    found = run(tmp_path, ndjson(tmp_path / "s.ndjson", rows), MAPPING)
    assert found.people == 3 + 15
    assert [one.id for one in found.kiosks] == ["kiosk-0"]
    to = Misbehaving(seed, faults=FAULTS)
    assert send(tmp_path, to, profile, seed=seed).complete
    place = {row["id"]: (row["at"], number) for number, row in enumerate(rows)}
    assert len(to.stored) == len(rows)
    for who in {row["who"] for row in rows}:
        arrived = [place[one["insert_id"]] for one in to.stored if one["event_type"] == who]
        assert arrived == sorted(arrived), who  # and equal times as they stand in the source
