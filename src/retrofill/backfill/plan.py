"""What an import will do and take, said before anything is sent: a stage seen under a destination's limits.

Nothing here decides anything. Counts come from the stage's manifest, the duration from the scheduler's own lower bound,
which a run comes within a per cent of, and from how fast this client sends where nothing limits it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from retrofill.backfill.feed import HISTORY_PER_S
from retrofill.backfill.feed import updates as updates_of
from retrofill.backfill.manifest import Hot, HotPerson, Kiosk, Manifest
from retrofill.backfill.profile import Profile
from retrofill.backfill.records import CUT_OFF
from retrofill.backfill.sets import TEXT, Set
from retrofill.core.schedule import Bound, lower_bound

_UNBILLED = ("$identify", "$groupidentify")  # contract, events 10
_EARLY_MS = 631_152_000_000  # 1990: history before it is more likely seconds taken for milliseconds
_LISTED = 10
_ANSWER_S = 0.1  # ours: how long an answer is taken to take, before any was seen
_OVER_BOUND = 1.01  # how near to its bound the scheduler comes (tests/core/test_schedule.py)
_OWN_PACE = "sending itself"
_LONGEST = "longest person"


class Throttled(Struct, frozen=True):
    """An id that the destination's limits hold back. days: of its daily quota. seconds: at its rate."""

    kind: str  # device or user
    id: str
    events: int
    days: int
    seconds: float


class Busy(Struct, frozen=True):
    """A person with many events, by the ids of their first one."""

    user_id: str | None
    device_id: str | None
    events: int

    @property
    def name(self) -> str:
        """How to call them."""
        return self.user_id or self.device_id or "nobody, calls about groups"


class Plan(Struct, frozen=True, kw_only=True):
    """The figures of a run that has not happened.

    billed: events that count to the destination's volume. requests: at least. duration_s: about how long it takes, at
    the destination's limits; because: what makes it so long. least_s: what those limits alone take, whoever sends;
    least_because: the limit. updates: property updates of the person who has most, 0 where they are not counted.
    warnings: what a person should look at.
    """

    import_id: str
    destination: str
    profile: str
    skip_user_properties_sync: bool
    rows: int
    events: int
    billed: int
    bytes: int
    requests: int
    people: int
    devices: int
    users: int
    first_ms: int | None
    last_ms: int | None
    days: dict[str, int]
    types: dict[str, int]
    refused: dict[str, int]
    dead_letters: int
    duplicates: int
    duplicates_different: int
    ids: dict[str, int]
    left_out: dict[str, int]
    hot_devices: list[Hot]
    hot_users: list[Hot]
    hot_people: list[Busy]
    kiosks: list[Kiosk]
    throttled: list[Throttled]
    quota_days: int
    updates: int
    duration_s: float
    because: str
    least_s: float
    least_because: str
    bounds: dict[str, float]
    warnings: list[str]


def plan(
    found: Manifest, profile: Profile, *, destination: str, stage: Path, start_s: float = 0.0
) -> Plan:
    """Return the plan of sending a stage. start_s: when, seconds since the epoch: daily quotas count clock hours."""
    counted = found.updates and profile.rates.updates_per_h
    updates = _most_updates(found, stage) if counted else 0
    bound = _bound(found, profile, updates, start_s)
    limits = {name: seconds for name, seconds in bound.parts.items() if name != _LONGEST}
    limit = max(limits, key=lambda name: limits[name])
    own_s = found.events / HISTORY_PER_S
    billed = found.events - sum(found.types.get(kind, 0) for kind in _UNBILLED)
    throttled = _throttled(found, profile)
    return Plan(
        import_id=found.import_id,
        destination=destination,
        profile=profile.name,
        skip_user_properties_sync=found.options.skip_user_properties_sync,
        rows=found.rows,
        events=found.events,
        billed=billed,
        bytes=found.bytes,
        requests=_requests(found, profile),
        people=found.people,
        devices=found.devices,
        users=found.users,
        first_ms=found.first_ms,
        last_ms=found.last_ms,
        days=found.days,
        types=found.types,
        refused=found.refused,
        dead_letters=sum(found.refused.values()),
        duplicates=found.duplicates.same,
        duplicates_different=found.duplicates.different,
        ids=found.ids,
        left_out=found.left_out,
        hot_devices=found.hot_devices[:_LISTED],
        hot_users=found.hot_users[:_LISTED],
        hot_people=[_busy(one, found, stage) for one in found.hot_people[:_LISTED]],
        kiosks=found.kiosks[:_LISTED],
        throttled=throttled,
        quota_days=max((one.days for one in throttled), default=1 if found.events else 0),
        updates=updates,
        duration_s=max(bound.seconds, own_s) * _OVER_BOUND,
        because=bound.reason if bound.seconds >= own_s else _OWN_PACE,
        least_s=limits[limit],
        least_because=limit,
        bounds=bound.parts,
        warnings=list(_warnings(found, profile, throttled, updates)),
    )


def _most(hot: list[Hot] | list[HotPerson]) -> int:
    return max((one.events for one in hot), default=0)


def _bound(found: Manifest, profile: Profile, updates: int, start_s: float) -> Bound:
    return lower_bound(
        profile.rates,
        events=found.events,
        hottest_device=_most(found.hot_devices),
        hottest_user=_most(found.hot_users),
        longest_person=_most(found.hot_people),
        most_updates=updates,
        round_trip_s=_ANSWER_S,
        start_s=start_s,
    )


def _most_updates(found: Manifest, stage: Path) -> int:
    """The property updates of the person who has most, among those with most events."""
    most = 0
    for one in found.hot_people:
        if one.events <= most:
            break
        texts = (part.column(TEXT) for part in _rows(one, found, stage, [TEXT]))
        most = max(most, sum(pc.sum(updates_of(t)).as_py() or 0 for t in texts))
    return most


def _busy(one: HotPerson, found: Manifest, stage: Path) -> Busy:
    first = next(_rows(one, found, stage, ["user_id", "device_id"]))
    return Busy(first["user_id"][0].as_py(), first["device_id"][0].as_py(), one.events)


def _rows(
    one: HotPerson, found: Manifest, stage: Path, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """Yield a person's staged rows, a row group at a time."""
    with Set(stage / found.sets[one.set].path) as rows:
        for _first, part in rows.within(one.seq, one.seq + one.events, columns):
            yield part


def _requests(found: Manifest, profile: Profile) -> int:
    by_count = math.ceil(found.events / max(profile.rates.events_per_request, 1))
    return max(by_count, math.ceil(found.bytes / profile.body_bytes))


def _throttled(found: Manifest, profile: Profile) -> list[Throttled]:
    rates, whole = profile.rates, found.events / (profile.rates.events_per_s or math.inf)
    held = []
    for kind, hot, per_s in (
        ("device", found.hot_devices, rates.device_per_s),
        ("user", found.hot_users, rates.user_per_s),
    ):
        for one in hot:
            days = math.ceil(one.events / rates.quota_per_day) if rates.quota_per_day else 1
            seconds = one.events / per_s if per_s else 0.0
            if days > 1 or seconds > whole:
                held.append(Throttled(kind, one.id, one.events, days, seconds))
    return sorted(held, key=lambda one: -one.events)


def _warnings(
    found: Manifest, profile: Profile, throttled: list[Throttled], updates: int
) -> Iterator[str]:
    if found.first_ms is not None and found.first_ms < _EARLY_MS:
        yield "The first event is from before 1990: is `time` in seconds? It wants milliseconds"
    if found.duplicates.different:
        yield (
            f"{found.duplicates.different:,} rows have the insert_id of an earlier row of their device with other "
            "content; the destination would drop them, they are dead letters"
        )
    cut_off = found.refused.get(CUT_OFF, 0)
    if cut_off:
        yield (
            f"{cut_off:,} files cannot be read to their end: what follows there is not in this import; the dead letters "
            "name them"
        )
    if found.kiosks:
        yield (
            f"{len(found.kiosks):,} ids join more than {found.options.kiosk_limit} people and hence nobody; "
            "order holds within each user"
        )
    late = [one for one in throttled if one.days > 1]
    if late:
        yield (
            f"{len(late)} ids have more events than the {profile.rates.quota_per_day:,} a day that are taken; "
            f"{late[0].kind} {late[0].id} takes {late[0].days} days"
        )
    if not found.options.skip_user_properties_sync:
        yield (
            "The destination goes by event time: property values of these events hold from their own time on, and "
            "rows of before show them"
            if profile.by_event_time
            else "Property values of these events will change the user profiles of the destination"
        )
    elif identifies := found.types.get("$identify", 0):
        yield (
            f"{identifies:,} of these events are identify calls, which set user properties whatever "
            "$skip_user_properties_sync says"
            + (
                ", by event time: no newer value changes"
                if profile.by_event_time
                else ": old values of theirs replace live ones. `where` in the mapping leaves them out"
            )
        )
    allowed = profile.rates.updates_per_h
    if allowed and updates > allowed:
        yield (
            f"One person has {updates:,} property updates, of which {allowed:,} an hour are taken: that alone takes "
            f"{sentence(lower_bound(profile.rates, events=0, most_updates=updates).seconds)}. "
            + (
                "Its identify calls count; `where` in the mapping leaves them out"
                if found.options.skip_user_properties_sync
                else "With --skip-user-properties-sync nobody waits for it, but for identify calls"
            )
        )


def sentence(seconds: float) -> str:
    """Say a duration as people do: `3 days 4 h`, `12 min 5 s`."""
    whole = math.ceil(seconds)
    units = (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    parts = []
    for name, size in units:
        if whole >= size:
            parts.append(f"{whole // size} {name}")
            whole %= size
    return " ".join(parts[:2]) or "under a second"


def to_json(made: Plan) -> str:
    """Return the plan as one line of JSON."""
    return msgspec.json.encode(made).decode()
