"""Counts by interval: active and new users, sessions, event types, segmentation.

A person is counted under the survivor of its merges, and under its global user; intervals are of `event_time`, days
of UTC, both ends of a range included. A week begins on Monday and a month on its first day; the interval is labelled
with that day even where the range begins later, and counts only what lies in the range.
Source: contract, read 5; identity 3 to 5.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from msgspec import Struct, field

from retrofill.core.block import Flag, Kind
from retrofill.engine import condition
from retrofill.engine.condition import Segment, Sql, Wanted
from retrofill.engine.query import Statement, View, equal
from retrofill.errors import InputError
from retrofill.limits import (
    CHART_DAYS_MAX,
    CHART_GROUPS_MAX,
    CHART_YEARS_MAX,
    MS_PER_DAY,
    MS_PER_HOUR,
    MS_PER_S,
)

_EPOCH = date(1970, 1, 1)
_FIVE_MINUTES_MS = 300_000
_WEEK, _MONTH = 7, 30
_EVERYBODY = "All Users"
_DAYS_A_YEAR = 366

# Names of queries that are no event types. Source: contract, read 1.
_ANY_EVENT = frozenset({"_active", "_all"})
_REVENUE = frozenset(
    {
        "revenue_amount",
        "unverified_revenue",
        "[Amplitude] Revenue",
        "[Amplitude] Revenue (Unverified)",
    }
)
_VERIFIED = frozenset(
    {"verified_revenue", "[Amplitude] Revenue (Verified)"}
)  # none: receipts are not checked

METRICS = ("uniques", "totals", "average", "pct_dau", "sums", "value_avg")


class Range(Struct, frozen=True):
    """Days first … last, cut into intervals.

    interval: as on the wire: 1, 7 or 30 days, -3600000 or -300000 ms.
    """

    first: date
    last: date
    interval: int = 1

    @property
    def start_ms(self) -> int:
        """The first millisecond of the range."""
        return (self.first - _EPOCH).days * MS_PER_DAY

    @property
    def end_ms(self) -> int:
        """The first millisecond after the range."""
        return ((self.last - _EPOCH).days + 1) * MS_PER_DAY

    def cut(self, time: str) -> str:
        """Return the SQL of the interval's number for a time in ms."""
        if self.interval == _WEEK:
            return f"(({time} // {MS_PER_DAY} + 3) // 7)"  # the epoch was a Thursday
        if self.interval == _MONTH:
            moment = f"make_timestamp({time} * 1000)"
            return f"(date_part('year', {moment}) * 12 + date_part('month', {moment}) - 1)"
        return f"({time} // {self._width_ms})"

    @property
    def _width_ms(self) -> int:
        return MS_PER_DAY if self.interval == 1 else -self.interval

    def labels(self) -> dict[int, str]:
        """Return interval number → label, in order, for every interval of the range."""
        if self.interval in (_WEEK, _MONTH):
            days = (
                (self.first + timedelta(step)) for step in range((self.last - self.first).days + 1)
            )
            return dict(map(_week if self.interval == _WEEK else _month, days))
        width = self._width_ms
        numbers = range(self.start_ms // width, self.end_ms // width)
        if width == MS_PER_DAY:
            return {number: (_EPOCH + timedelta(number)).isoformat() for number in numbers}
        return {
            number: datetime.fromtimestamp(number * width / MS_PER_S, UTC).strftime(
                "%Y-%m-%dT%H:%M:%S"
            )
            for number in numbers
        }


def _week(day: date) -> tuple[int, str]:
    return ((day - _EPOCH).days + 3) // 7, (day - timedelta(day.weekday())).isoformat()


def _month(day: date) -> tuple[int, str]:
    return day.year * 12 + day.month - 1, day.replace(day=1).isoformat()


def range_of(start: str, end: str, interval: int = 1) -> Range:
    """Read `start` and `end` (YYYYMMDD). Raises InputError naming what is wrong, also for a range that is too long."""
    first, last = _day("start", start), _day("end", end)
    if last < first:
        raise InputError(f"end {end} is before start {start}")
    most = {1: CHART_DAYS_MAX, -MS_PER_HOUR: 7, -_FIVE_MINUTES_MS: 2}.get(
        interval, CHART_YEARS_MAX * _DAYS_A_YEAR
    )
    days = (last - first).days + 1
    if days > most:
        raise InputError(f"{days} days from start to end, at most {most} for i={interval}")
    return Range(first, last, interval)


def _day(name: str, text: str) -> date:
    try:
        if len(text) != len("YYYYMMDD") or not text.isascii() or not text.isdigit():
            raise ValueError
        return date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        raise InputError(f"{name} must be a day as YYYYMMDD, found {text!r}") from None


class Series(Struct, frozen=True):
    """One line of a chart. values: one an interval. whole: the same over the whole range."""

    label: str
    values: list[int | float]
    whole: int | float


def active(
    view: View, when: Range, segments: Sequence[list[Segment]], group: str | None
) -> dict[str, Any]:
    """Return the users with at least one event in each interval: `data` of /users."""
    return _users(when, segments, group, lambda conditions: _active(view, when, conditions, group))


def new(
    view: View, when: Range, segments: Sequence[list[Segment]], group: str | None
) -> dict[str, Any]:
    """Return the users whose first event, by event time, lies in each interval: `data` of /users.

    Segments and groups go by the first event's snapshot.
    """
    return _users(when, segments, group, lambda conditions: _new(view, when, conditions, group))


def _users(
    when: Range,
    segments: Sequence[list[Segment]],
    group: str | None,
    find: Callable[[list[Segment]], list[Series]],
) -> dict[str, Any]:
    found = [(index, one) for index, conditions in enumerate(segments) for one in find(conditions)]
    if group is None:
        labels: list[Any] = [index for index, _ in found]
    else:  # connectors take these for the names of columns
        labels = [
            one.label if len(segments) == 1 else f"{index}; {one.label}" for index, one in found
        ]
    return {
        "series": [one.values for _, one in found],
        "seriesLabels": labels,
        "seriesCollapsed": [[{"setId": "", "value": one.whole}] for _, one in found],
        "seriesMeta": [{"segmentIndex": index} for index, _ in found],
        "xValues": list(when.labels().values()),
    }


def _active(view: View, when: Range, conditions: list[Segment], group: str | None) -> list[Series]:
    statement = Statement()
    found = condition.segment(conditions, statement)
    groups = [condition.property_("user", group, statement)] if group is not None else []
    rows = _counted(view, when, found, groups, statement)
    return _series(
        when, rows, lambda row: row.uniques, limit=CHART_GROUPS_MAX, grouped=bool(groups)
    )


def _new(view: View, when: Range, conditions: list[Segment], group: str | None) -> list[Series]:
    statement = Statement()
    inside = condition.segment(conditions, statement)
    name = Sql(f"['{_EVERYBODY}']", frozenset())
    if group is not None:
        name = condition.group(condition.property_("user", group, statement))
    # What is not in the segment is no group at all.
    chosen = f"CASE WHEN {inside.text} THEN {name.text} ELSE [] END"
    people = view.people()
    source = view.source(
        {"amplitude_id", "event_time", "block", "row", *inside.needs, *name.needs},
        select=("amplitude_id", "event_time", "block", "row", f"{chosen} AS names"),
    )
    sql = f"""
        WITH firsts AS (
            SELECT min(r.event_time) AS event_time,
                   arg_min(r.names, (r.event_time, r.block, r.row)) AS names
            FROM {source} r LEFT JOIN {people} p ON p.was = r.amplitude_id
            GROUP BY coalesce(p.now, r.amplitude_id)
        )
        SELECT {when.cut("event_time")} AS cut, name, count(*), count(*), NULL
        FROM firsts, unnest(names) AS n(name)
        WHERE event_time >= {when.start_ms} AND event_time < {when.end_ms}
        GROUP BY GROUPING SETS ((cut, name), (name))
    """
    rows = [_Row(*row) for row in view.ask(sql, statement).fetchall()]
    return _series(
        when, rows, lambda row: row.uniques, limit=CHART_GROUPS_MAX, grouped=group is not None
    )


class _Row(Struct, frozen=True):
    """Counts of one interval and group. cut: None for the whole range. total: sum of a property, where asked for."""

    cut: int | None
    name: str
    totals: int
    uniques: int
    total: float | None


def _counted(
    view: View,
    when: Range,
    found: Sql,
    groups: Sequence[Sql],
    statement: Statement,
    *,
    summed: Sql | None = None,
) -> list[_Row]:
    """Count the events for which `found` holds, and their people, by interval and group, and over the whole range."""
    needs = {"amplitude_id", "event_time", *found.needs, *(summed.needs if summed else ())}
    select = ["amplitude_id", f"{when.cut('event_time')} AS cut"]
    select.append(
        f"{condition.number(summed).text} AS amount" if summed else "NULL::DOUBLE AS amount"
    )
    unnested, names = "", []
    for index, one in enumerate(groups):
        needs |= one.needs
        select.append(f"{condition.group(one).text} AS g{index}")
        unnested += f" CROSS JOIN unnest(r.g{index}) AS u{index}(v{index})"
        names.append(f"v{index}")
    name = f"concat_ws('; ', {', '.join(names)})" if names else f"'{_EVERYBODY}'"
    people = view.people()
    source = view.source(
        needs,
        select=select,
        where=f"event_time >= {when.start_ms} AND event_time < {when.end_ms} AND ({found.text})",
    )
    sql = f"""
        SELECT cut, name, count(*), count(DISTINCT person), sum(amount)
        FROM (
            SELECT r.cut, {name} AS name, coalesce(p.now, r.amplitude_id) AS person, r.amount
            FROM {source} r{unnested} LEFT JOIN {people} p ON p.was = r.amplitude_id
        )
        GROUP BY GROUPING SETS ((cut, name), (name))
    """
    return [_Row(*row) for row in view.ask(sql, statement).fetchall()]


def _series(
    when: Range,
    rows: Iterable[_Row],
    value: Callable[[_Row], int | float],
    *,
    limit: int,
    grouped: bool,
) -> list[Series]:
    """Lay rows out as series, the largest group first. Without groups there is one series, of zeros if need be."""
    cells = {(row.name, row.cut): value(row) for row in rows}
    whole = {name: amount for (name, cut), amount in cells.items() if cut is None}
    if not grouped:
        whole.setdefault(_EVERYBODY, 0)
    names = sorted(whole, key=lambda name: (-whole[name], name))[:limit]
    cuts = when.labels()
    return [
        Series(name, [cells.get((name, cut), 0) for cut in cuts], whole[name]) for name in names
    ]


class Question(Struct, frozen=True):
    """What a segmentation asks. groups: names of user properties, at most two with those of the event."""

    events: list[Wanted]
    when: Range
    metric: str = "uniques"
    segments: list[list[Segment]] = field(default_factory=lambda: [[]])
    groups: list[str] = []
    limit: int = 100


def segmentation(view: View, asked: Question) -> dict[str, Any]:
    """Return `data` of /events/segmentation: one series for each event, segment and group.

    Raises InputError for what is not supported.
    """
    labels: list[Any] = []
    lines: list[Series] = []
    plain = not asked.groups
    for index, wanted in enumerate(asked.events):
        for at, conditions in enumerate(asked.segments):
            found = _segmented(view, asked, wanted, conditions)
            lines += found
            number = index if len(asked.segments) == 1 else index * len(asked.segments) + at
            grouped = not plain or (wanted.group_by and asked.metric not in ("sums", "value_avg"))
            labels += [[number, one.label] if grouped else number for one in found]
    return {
        "series": [one.values for one in lines],
        "seriesLabels": labels,
        "seriesCollapsed": [[{"setId": "", "value": one.whole}] for one in lines],
        "xValues": list(asked.when.labels().values()),
    }


def _segmented(
    view: View, asked: Question, wanted: Wanted, conditions: list[Segment]
) -> list[Series]:
    statement = Statement()
    chosen = _event(wanted.event_type, statement)
    inside = condition.segment(conditions, statement)
    filters = condition.filters(wanted.filters, statement)
    groups = [condition.property_(one.type, one.value, statement) for one in wanted.group_by]
    summed = None
    if asked.metric in ("sums", "value_avg"):
        if not groups:
            raise InputError(
                f"m={asked.metric} needs a group_by in e: the property that it adds up"
            )
        summed, groups = groups[0], groups[1:]
    groups += [condition.property_("user", one, statement) for one in asked.groups]
    if len(groups) > 2:  # contract, read 1: at most two
        raise InputError(f"{len(groups)} properties to group by, at most 2")
    found = condition.both(chosen, inside, filters)
    rows = _counted(view, asked.when, found, groups, statement, summed=summed)
    value = _METRICS.get(asked.metric)
    if value is None:
        value = _share(_day_users(view, asked.when, conditions))
    return _series(asked.when, rows, value, limit=asked.limit, grouped=bool(groups))


def _event(event_type: str, statement: Statement) -> Sql:
    if event_type in _ANY_EVENT:
        return Sql("true", frozenset())
    if event_type in _VERIFIED:
        return Sql("false", frozenset())
    if event_type in _REVENUE:
        return Sql(f"(flags & {int(Flag.REVENUE)}) != 0", frozenset({"flags"}))
    if event_type == "_new" or event_type.startswith("ce:"):
        raise InputError(f"Event {event_type!r} is not supported here")
    return Sql(equal("event_type", event_type, statement), frozenset({"event_type"}))


def _day_users(view: View, when: Range, conditions: list[Segment]) -> dict[int | None, int]:
    """Return interval → active users of a segment, None for the whole range."""
    statement = Statement()
    rows = _counted(view, when, condition.segment(conditions, statement), [], statement)
    return {row.cut: row.uniques for row in rows}


def _share(users: dict[int | None, int]) -> Callable[[_Row], float]:
    return lambda row: 100 * row.uniques / users[row.cut]


_METRICS: dict[str, Callable[[_Row], int | float]] = {
    "uniques": lambda row: row.uniques,
    "totals": lambda row: row.totals,
    "average": lambda row: row.totals / row.uniques,
    "sums": lambda row: row.total or 0,
    "value_avg": lambda row: (row.total or 0) / row.totals,
}


# Sessions: events of one person with one session_id. A session belongs to the day of its first event.


def _sessions(view: View) -> str:
    people = view.people()
    source = view.source(("amplitude_id", "event_time", "session_id"), where="session_id >= 0")
    return f"""
        SELECT coalesce(p.now, r.amplitude_id) AS person, min(event_time) AS start,
               least(max(event_time) - min(event_time), {MS_PER_DAY}) AS ms
        FROM {source} r LEFT JOIN {people} p ON p.was = r.amplitude_id
        GROUP BY person, session_id
    """


def session_average(view: View, when: Range) -> dict[str, Any]:
    """Return the mean length in seconds of the sessions that began on each day: `data` of /sessions/average."""
    rows = view.ask(
        f"SELECT {when.cut('start')} AS cut, avg(ms) / {MS_PER_S} FROM ({_sessions(view)}) "
        f"WHERE start >= {when.start_ms} AND start < {when.end_ms} GROUP BY cut"
    ).fetchall()
    return _by_day(when, dict(rows))


def sessions_per_user(view: View, when: Range) -> dict[str, Any]:
    """Return sessions that began on each day divided by that day's active users: `data` of /sessions/peruser."""
    rows = view.ask(
        f"SELECT {when.cut('start')} AS cut, count(*) FROM ({_sessions(view)}) "
        f"WHERE start >= {when.start_ms} AND start < {when.end_ms} GROUP BY cut"
    ).fetchall()
    users = _day_users(view, when, [])
    return _by_day(when, {cut: count / users[cut] for cut, count in rows})


def _by_day(when: Range, found: dict[int, float]) -> dict[str, Any]:
    cuts = when.labels()
    return {
        "series": [[found.get(cut, 0) for cut in cuts]],
        "seriesMeta": [{"segmentIndex": 0}],
        "xValues": list(cuts.values()),
    }


# Source: contract, read 5, "Default session bins".
_BINS_MS = (0, 3_000, 10_000, 30_000, 60_000, 180_000, 600_000, 1_800_000, 3_600_000, MS_PER_DAY)


def session_lengths(view: View, when: Range, bins_ms: Sequence[int] = _BINS_MS) -> dict[str, Any]:
    """Count the sessions that began in the range by their length: `data` of /sessions/length.

    bins_ms: rising edges; a bin holds its lower edge, the last bin its upper edge too.
    """
    statement = Statement()
    lengths = view.ask(
        f"SELECT ms, count(*) FROM ({_sessions(view)}) "
        f"WHERE start >= {when.start_ms} AND start < {when.end_ms} GROUP BY ms",
        statement,
    ).fetchall()
    pairs = list(itertools.pairwise(bins_ms))
    counts = [
        sum(count for ms, count in lengths if low <= ms < high or ms == high == bins_ms[-1])
        for low, high in pairs
    ]
    return {
        "series": [counts],
        "xValues": [f"{_seconds(low)}s-{_seconds(high)}s" for low, high in pairs],
    }


def _seconds(ms: int) -> int | float:
    return ms // MS_PER_S if ms % MS_PER_S == 0 else ms / MS_PER_S


def rows(view: View) -> dict[str, int]:
    """Return how many rows there are of every kind, identify calls and aliases too, and how many came with no import.

    Those of an import that was undone are there for nobody.
    """
    kinds = [kind for kind in Kind if kind not in (Kind.DROPPED, Kind.UNDONE)]
    source = view.source(("import_id",), kinds=kinds)
    every, live = view.ask(f"SELECT count(*), count(*) - count(import_id) FROM {source}").fetchone()
    return {"rows": every, "live": live}


def event_types(view: View, *, now_ms: int) -> list[dict[str, Any]]:
    """Return every event type with its total of this week (from Monday, UTC): `data` of /events/list.

    `id` is made from the name: the same in each answer.
    """
    day = now_ms // MS_PER_DAY
    monday_ms = (day - (day + 3) % 7) * MS_PER_DAY
    source = view.source(("event_type", "event_time"))
    rows = view.ask(
        f"SELECT event_type, count(*) FILTER (event_time >= {monday_ms} AND event_time < {monday_ms + 7 * MS_PER_DAY}) "
        f"FROM {source} GROUP BY event_type ORDER BY event_type"
    ).fetchall()
    return [_event_type(view.project, name, totals) for name, totals in rows]


def _event_type(project: int, name: str, totals: int) -> dict[str, Any]:
    text = hashlib.sha256(f"{project}/{name}".encode()).digest()
    return {
        "id": int.from_bytes(text[:6], "big"),
        "name": name,
        "value": name,
        "display": name,
        "totals": totals,
        "totals_delta": 0,
        "non_active": False,
        "deleted": False,
        "hidden": False,
        "flow_hidden": False,
        "autohidden": False,
        "clusters_hidden": False,
        "timeline_hidden": False,
        "in_waitroom": False,
    }
