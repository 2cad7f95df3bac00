from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.stored import DAY_MS, FEW, HOUR_MS, Stored, block
from tests.lake.blocks import START_MS

from retrofill.core.block import Flag, Kind, Merge
from retrofill.engine import charts, condition
from retrofill.engine.charts import Question, range_of
from retrofill.errors import InputError

DAYS = range_of("20260101", "20260105")  # five days from START_MS on


def _ask(
    stored: Stored, event: dict[str, Any], metric: str = "totals", **more: Any
) -> dict[str, Any]:
    when = more.pop("when", DAYS)
    question = Question([condition.event_of(json.dumps(event))], when, metric, **more)
    return stored.ask(lambda view: charts.segmentation(view, question))  # type: ignore[no-any-return]


def _one(tmp_path: Path, *events: dict[str, Any], sealed: bool = True, **more: Any) -> Stored:
    return Stored(tmp_path, [block(1, list(events), **more)], sealed=int(sealed))


EVENT = st.fixed_dictionaries(
    {
        "person": st.integers(1, 5),
        "time": st.integers(START_MS - DAY_MS, START_MS + 6 * DAY_MS - 1),
        "event_type": st.sampled_from(["a", "b"]),
        "plan": st.sampled_from(["free", "pro", None]),
    }
)


@settings(
    max_examples=FEW,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    history=st.lists(st.lists(EVENT, min_size=1, max_size=8), min_size=1, max_size=4),
    sealed=st.integers(0, 4),
    absorbed=st.none() | st.integers(1, 4),
)
def test_counts_equal_those_of_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory,
    history: list[list[dict[str, Any]]],
    sealed: int,
    absorbed: int | None,
) -> None:
    merges = [] if absorbed is None else [Merge(0, 7, absorbed, 5, START_MS)]
    blocks = [
        block(
            number,
            [
                {
                    **event,
                    "shown": {"user_properties": {"plan": event["plan"]} if event["plan"] else {}},
                }
                for event in events
            ],
            merges=merges if number == len(history) else [],
        )
        for number, events in enumerate(history, 1)
    ]
    stored = Stored(tmp_path_factory.mktemp("lake"), blocks, sealed=min(sealed, len(blocks)))
    totals: dict[Any, int] = defaultdict(int)
    users: dict[Any, set[int]] = defaultdict(set)
    first: dict[int, int] = {}
    for event in (one for events in history for one in events):
        person = 5 if event["person"] == absorbed else event["person"]
        day = (event["time"] - START_MS) // DAY_MS
        first[person] = min(first.get(person, event["time"]), event["time"])
        for key in (
            (event["event_type"], day),
            ("any", day),
            (event["event_type"], event["plan"], day),
        ):
            totals[key] += 1
            users[key].add(person)
    for name in ("a", "b"):
        assert _ask(stored, {"event_type": name})["series"] == [
            [totals[name, day] for day in range(5)]
        ]
        found = _ask(stored, {"event_type": name}, "uniques")
        assert found["series"] == [[len(users[name, day]) for day in range(5)]]
        whole = set().union(*(users[name, day] for day in range(5)))
        assert found["seriesCollapsed"] == [[{"setId": "", "value": len(whole)}]]
        only = {
            "subprop_type": "user",
            "subprop_key": "gp:plan",
            "subprop_op": "is",
            "subprop_value": ["pro"],
        }
        found = _ask(stored, {"event_type": name, "filters": [only]}, "uniques")
        assert found["series"] == [[len(users[name, "pro", day]) for day in range(5)]]
    assert stored.ask(lambda view: charts.active(view, DAYS, [[]], None))["series"] == [
        [len(users["any", day]) for day in range(5)]
    ]
    new = [
        sum(1 for time in first.values() if (time - START_MS) // DAY_MS == day) for day in range(5)
    ]
    assert stored.ask(lambda view: charts.new(view, DAYS, [[]], None))["series"] == [new]


def test_a_backfilled_event_moves_the_day_a_user_is_new(tmp_path: Path) -> None:
    late, early = {"time": START_MS + 3 * DAY_MS}, {"time": START_MS}
    stored = Stored(tmp_path, [block(1, [late]), block(2, [early])], sealed=1)
    assert stored.ask(lambda view: charts.new(view, DAYS, [[]], None))["series"] == [
        [1, 0, 0, 0, 0]
    ]


def test_identify_calls_make_nobody_new_or_active(tmp_path: Path) -> None:
    stored = _one(tmp_path, {"time": START_MS}, kinds=[Kind.IDENTIFY])
    assert stored.ask(lambda view: charts.new(view, DAYS, [[]], None))["series"] == [[0] * 5]
    assert stored.ask(lambda view: charts.active(view, DAYS, [[]], None))["series"] == [[0] * 5]


def test_mapped_users_are_counted_once(tmp_path: Path) -> None:
    events = [{"person": one, "user_id": f"user-{one}"} for one in (1, 2, 3)]
    for sealed in (True, False):
        stored = _one(tmp_path / str(sealed), *events, sealed=sealed)
        stored.aliases = {"user-1": "global", "user-2": "global"}
        assert stored.ask(lambda view: charts.active(view, DAYS, [[]], None))["series"][0][0] == 2


def test_groups_are_labelled_as_connectors_read_them(tmp_path: Path) -> None:
    events = [
        {"person": one, "shown": {"country": name}} for one, name in enumerate(["DE", "DE", None])
    ]
    stored = _one(tmp_path, *events)
    found = stored.ask(lambda view: charts.active(view, DAYS, [[]], "country"))
    assert found["seriesLabels"] == ["DE", "(none)"]
    assert found["series"] == [[2, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert found["xValues"][0] == "2026-01-01"


def test_new_users_group_by_their_first_event(tmp_path: Path) -> None:
    events = [
        {"time": START_MS + 1, "shown": {"country": "later"}},
        {"time": START_MS, "shown": {"country": "first"}},
    ]
    stored = _one(tmp_path, *events)
    found = stored.ask(lambda view: charts.new(view, DAYS, [[]], "country"))
    assert (found["seriesLabels"], found["series"]) == (["first"], [[1, 0, 0, 0, 0]])


def test_a_new_user_outside_the_segment_is_not_counted(tmp_path: Path) -> None:
    stored = _one(tmp_path, {"shown": {"country": "DE"}})
    for country, count in (("DE", 1), ("FR", 0)):
        inside = condition.segments_of(
            [json.dumps([{"prop": "country", "op": "is", "values": [country]}])]
        )
        found = stored.ask(lambda view, inside=inside: charts.new(view, DAYS, inside, None))
        assert found["series"][0][0] == count


# Operator, values, which of PROPERTIES match it. Source: contract, read 1, "Operators".
PROPERTIES = [None, "apple", "Banana", 5, 12.5, ["apple", "kiwi"], True, "2026-01-02", []]
OPERATORS: list[tuple[str, list[Any], list[Any]]] = [
    ("is", ["apple"], ["apple", ["apple", "kiwi"]]),
    ("is", ["apple", "Banana"], ["apple", "Banana", ["apple", "kiwi"]]),
    ("is", [5], [5]),
    ("is", ["5"], [5]),
    ("is", [True], [True]),
    ("is", ["(none)"], [None, []]),
    ("is not", ["apple"], [None, "Banana", 5, 12.5, True, "2026-01-02", []]),
    ("is not", ["(none)"], ["apple", "Banana", 5, 12.5, ["apple", "kiwi"], True, "2026-01-02"]),
    ("contains", ["an", "kiw"], ["Banana", ["apple", "kiwi"]]),
    ("does not contain", ["p"], [None, "Banana", 5, 12.5, True, "2026-01-02", []]),
    ("less", [12.5], [5]),
    ("less or equal", ["12.5"], [5, 12.5]),
    ("greater", [5], [12.5]),
    ("greater or equal", [5], [5, 12.5]),
    ("greater", ["2026-01-01"], ["apple", "Banana", 5, ["apple", "kiwi"], True, "2026-01-02"]),
    ("set is", ["kiwi", "apple"], [["apple", "kiwi"]]),
    ("set is not", ["kiwi", "apple"], [None, "apple", "Banana", 5, 12.5, True, "2026-01-02", []]),
]


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    events = [
        {
            "person": index,
            "event_properties": {} if value is None else {"it": value},
            "shown": {"user_properties": {} if value is None else {"it": value}},
        }
        for index, value in enumerate(PROPERTIES)
    ]
    return Stored(tmp_path_factory.mktemp("lake"), [block(1, events)], sealed=1)


@pytest.mark.parametrize(("operator", "values", "expected"), OPERATORS)
@pytest.mark.parametrize(("kind", "key"), [("event", "it"), ("user", "gp:it")])
def test_each_operator_matches_what_it_says(
    fruit: Stored, kind: str, key: str, operator: str, values: list[Any], expected: list[Any]
) -> None:
    one = {
        "subprop_type": kind,
        "subprop_key": key,
        "subprop_op": operator,
        "subprop_value": values,
    }
    found = _ask(
        fruit,
        {"event_type": "_all", "filters": [one], "group_by": [{"type": "user", "value": "gp:it"}]},
    )
    every = fruit.ask(lambda view: charts.active(view, DAYS, [[]], None))["series"][0][0]
    assert every == len(PROPERTIES)
    matched = _ask(fruit, {"event_type": "_all", "filters": [one]})["series"][0][0]
    assert matched == len(expected)
    names: set[str] = set()
    for value in expected:
        some = value if isinstance(value, list) else [value]
        names |= {
            "(none)" if one is None else one if isinstance(one, str) else json.dumps(one)
            for one in some or [None]
        }
    assert {label for _, label in found["seriesLabels"]} == names


@pytest.mark.parametrize(
    "key",
    ['a"b', "a.b", "a/b", "a~b", "$.x", "", "[0]", "*", "ü", "'; DROP TABLE x; --", "a\\b", "0"],
)
def test_any_key_is_only_a_key(tmp_path: Path, key: str) -> None:
    stored = _one(
        tmp_path, {"event_properties": {key: "here"}}, {"event_properties": {"other": "here"}}
    )
    one = {
        "subprop_type": "event",
        "subprop_key": key,
        "subprop_op": "is",
        "subprop_value": ["here"],
    }
    assert _ask(stored, {"event_type": "_all", "filters": [one]})["series"][0][0] == 1


BUILT_IN = {
    "version": ("version_name", "1.2"),
    "country": ("country", "Germany"),
    "city": ("city", "Berlin"),
    "region": ("region", "Berlin"),
    "DMA": ("dma", "area"),
    "language": ("language", "German"),
    "platform": ("platform", "iOS"),
    "os": ("os_name", "ios"),
    "device": ("device_family", "Apple iPhone"),
    "device_type": ("device_type", "Apple iPhone 6"),
    "start_version": ("start_version", "1.0"),
    "paying": ("paying", "true"),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_names_are_those_of_the_dashboard(tmp_path: Path, name: str) -> None:
    column, value = BUILT_IN[name]
    stored = _one(tmp_path, {"shown": {column: value}}, {"shown": {}})
    one = {
        "subprop_type": "user",
        "subprop_key": name,
        "subprop_op": "is",
        "subprop_value": [value],
    }
    assert _ask(stored, {"event_type": "_all", "filters": [one]})["series"][0][0] == 1


def test_two_properties_group_as_pairs_and_arrays_by_each_element(tmp_path: Path) -> None:
    stored = _one(
        tmp_path,
        {"event_properties": {"tags": ["x", "y", "x"]}, "shown": {"platform": "Web"}},
        {"event_properties": {"tags": "x"}, "shown": {"platform": "iOS"}},
    )
    groups = [{"type": "event", "value": "tags"}, {"type": "user", "value": "platform"}]
    found = _ask(stored, {"event_type": "_all", "group_by": groups})
    assert found["seriesLabels"] == [[0, "x; Web"], [0, "x; iOS"], [0, "y; Web"]]
    assert [line[0] for line in found["series"]] == [1, 1, 1]


def test_a_limit_keeps_the_largest_groups(tmp_path: Path) -> None:
    stored = _one(tmp_path, *({"event_properties": {"k": f"v{at % 3}"}} for at in range(8)))
    found = _ask(
        stored, {"event_type": "_all", "group_by": [{"type": "event", "value": "k"}]}, limit=2
    )
    assert found["seriesLabels"] == [[0, "v0"], [0, "v1"]]


METRICS = [
    ("totals", [3, 0], 3),
    ("uniques", [2, 0], 2),
    ("average", [1.5, 0], 1.5),
    ("pct_dau", [100 * 2 / 3, 0], 50.0),
    ("sums", [6.5, 0], 6.5),
    ("value_avg", [6.5 / 3, 0], 6.5 / 3),
]


@pytest.mark.parametrize(("metric", "series", "whole"), METRICS)
def test_each_metric(tmp_path: Path, metric: str, series: list[float], whole: float) -> None:
    buys = [
        {"person": who, "event_type": "buy", "event_properties": {"n": n}}
        for who, n in ((1, 2), (1, 4.5), (2, "none"))
    ]
    others = [{"person": 3}, {"person": 4, "time": START_MS + DAY_MS}]
    stored = _one(tmp_path, *buys, *others)
    by = [{"type": "event", "value": "n"}] if metric in ("sums", "value_avg") else []
    found = _ask(
        stored, {"event_type": "buy", "group_by": by}, metric, when=range_of("20260101", "20260102")
    )
    assert found["series"] == [pytest.approx(series)]
    assert found["seriesCollapsed"][0][0]["value"] == pytest.approx(whole)
    assert found["seriesLabels"] == [0]


def test_revenue_counts_events_that_earn(tmp_path: Path) -> None:
    stored = _one(tmp_path, {}, {}, flags=[Flag.REVENUE, Flag(0)])
    assert _ask(stored, {"event_type": "revenue_amount"})["series"][0][0] == 1
    assert _ask(stored, {"event_type": "verified_revenue"})["series"][0][0] == 0


def test_segments_and_events_each_have_a_line(tmp_path: Path) -> None:
    stored = _one(tmp_path, {"shown": {"platform": "Web"}}, {"shown": {"platform": "iOS"}}, {})
    segments = condition.segments_of(
        [json.dumps([{"prop": "platform", "op": "is", "values": [one]}]) for one in ("Web", "none")]
    )
    events = [condition.Wanted("e"), condition.Wanted("missing")]
    question = Question(events, DAYS, "totals", segments)
    found = stored.ask(lambda view: charts.segmentation(view, question))
    assert [line[0] for line in found["series"]] == [1, 0, 0, 0]
    assert found["seriesLabels"] == [0, 1, 2, 3]


INTERVALS = [
    ("20251231", "20260106", 7, ["2025-12-29", "2026-01-05"], [2, 1]),
    ("20251231", "20260201", 30, ["2025-12-01", "2026-01-01", "2026-02-01"], [0, 3, 1]),
    (
        "20260101",
        "20260101",
        -HOUR_MS,
        [f"2026-01-01T{h:02}:00:00" for h in range(24)],
        [1, 0, 1] + [0] * 21,
    ),
]


@pytest.mark.parametrize(("start", "end", "interval", "labels", "counts"), INTERVALS)
def test_intervals_begin_where_their_labels_say(
    tmp_path: Path, start: str, end: str, interval: int, labels: list[str], counts: list[int]
) -> None:
    moments = [
        "2025-12-30T12:00",
        "2026-01-01T00:00",
        "2026-01-01T02:59",
        "2026-01-05T00:00",
        "2026-02-01T23:59",
    ]
    times = [
        int(datetime.fromisoformat(one).replace(tzinfo=UTC).timestamp() * 1000) for one in moments
    ]
    stored = _one(tmp_path, *({"time": time} for time in times))
    found = _ask(stored, {"event_type": "_all"}, when=range_of(start, end, interval))
    assert (found["xValues"], found["series"]) == (labels, [counts])


def test_a_session_belongs_to_the_day_it_starts(tmp_path: Path) -> None:
    midnight = START_MS + DAY_MS
    times = {
        1: [midnight - 10_000, midnight + 20_000],
        2: [START_MS],
        3: [START_MS, START_MS + 3 * DAY_MS],
    }
    events = [{"session_id": one, "time": time} for one, some in times.items() for time in some]
    stored = _one(tmp_path, *events, {"time": START_MS + DAY_MS})
    average = stored.ask(lambda view: charts.session_average(view, DAYS))
    assert average["series"] == [[pytest.approx((30 + 0 + 86_400) / 3), 0, 0, 0, 0]]
    per_user = stored.ask(lambda view: charts.sessions_per_user(view, DAYS))
    assert per_user["series"] == [[3, 0, 0, 0, 0]]
    lengths = stored.ask(lambda view: charts.session_lengths(view, DAYS))
    assert dict(zip(lengths["xValues"], lengths["series"][0], strict=True)) | {} == {
        **dict.fromkeys(lengths["xValues"], 0),
        "0s-3s": 1,
        "30s-60s": 1,
        "3600s-86400s": 1,
    }


def test_event_types_tell_this_weeks_totals(tmp_path: Path) -> None:
    monday = START_MS + 4 * DAY_MS  # 2026-01-05
    events = [
        {"event_type": name, "time": time}
        for name, time in (("a", monday), ("a", monday - 1), ("b", START_MS))
    ]
    stored = _one(tmp_path, *events)
    found = stored.ask(lambda view: charts.event_types(view, now_ms=monday + DAY_MS))
    assert [(one["value"], one["totals"]) for one in found] == [("a", 1), ("b", 0)]
    assert all(isinstance(one["id"], int) for one in found)
    assert len({one["id"] for one in found}) == 2


REFUSED = [
    (
        {
            "event_type": "a",
            "filters": [
                {
                    "subprop_type": "event",
                    "subprop_key": "k",
                    "subprop_op": "like",
                    "subprop_value": ["x"],
                }
            ],
        },
        "like",
    ),
    (
        {
            "event_type": "a",
            "filters": [
                {
                    "subprop_type": "group",
                    "subprop_key": "k",
                    "subprop_op": "is",
                    "subprop_value": ["x"],
                }
            ],
        },
        "group",
    ),
    (
        {
            "event_type": "a",
            "filters": [
                {
                    "subprop_type": "user",
                    "subprop_key": "unknown",
                    "subprop_op": "is",
                    "subprop_value": ["x"],
                }
            ],
        },
        "gp:<name>",
    ),
    (
        {
            "event_type": "a",
            "filters": [
                {
                    "subprop_type": "user",
                    "subprop_key": "os",
                    "subprop_op": "is",
                    "subprop_value": [],
                }
            ],
        },
        "needs 1 to",
    ),
    (
        {
            "event_type": "a",
            "filters": [
                {
                    "subprop_type": "user",
                    "subprop_key": "os",
                    "subprop_op": "is",
                    "subprop_value": ["x"],
                    "group_type": "User",
                }
            ],
        },
        "group_type",
    ),
    (
        {"event_type": "a", "group_by": [{"type": "event", "value": str(at)} for at in range(3)]},
        "at most 2",
    ),
    ({"event_type": "ce:custom"}, "ce:custom"),
    ({"event_type": "_new"}, "_new"),
    ({"event_type": "a", "unknown": 1}, "unknown"),
    ({"filters": []}, "event_type"),
    ([], "JSON object"),
]


@pytest.mark.parametrize(("event", "says"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(fruit: Stored, event: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        _ask(fruit, event)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["nonsense"], "no JSON"),
        (['[{"prop": "userdata_cohort", "op": "is", "values": ["x"]}]'], "userdata_cohort"),
        (['[{"type": "event", "event_type": "a", "op": ">=", "value": 1}]'], "not supported"),
        (['{"prop": "country"}'], "not understood"),
    ],
)
def test_segments_that_are_not_supported_are_refused(
    fruit: Stored, texts: list[str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        fruit.ask(lambda view: charts.active(view, DAYS, condition.segments_of(texts), None))


@pytest.mark.parametrize(
    ("start", "end", "interval", "says"),
    [
        ("2026-1-1", "20260101", 1, "start must be a day"),
        ("20260101", "20260230", 1, "end must be a day"),
        ("20260102", "20260101", 1, "before start"),
        ("20250101", "20260101", 1, "366 days"),
        ("20260101", "20260108", -HOUR_MS, "at most 7"),
        ("19000101", "20260108", 30, "at most"),
    ],
)
def test_a_range_that_cannot_be_is_refused(start: str, end: str, interval: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        range_of(start, end, interval)
