"""A cause that is shown is one: without it the value is another, and without any other event it is the same."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.core.history import DAY_ONE_MS, History, event

from retrofill.core.block import COLUMNS
from retrofill.core.refold import Rows
from retrofill.core.why import Asked, Explanation, Trace
from retrofill.engine.refold import rows_of
from retrofill.lake import arrow
from retrofill.limits import PROFILES, Limits

Wire = dict[str, Any]
STEP_MS = 60_000
NO_LIMITS = PROFILES["none"]
SAID = Limits(property_updates_per_h=3)
GROUP = ("org", "acme")


def told(wires: list[Wire], limits: Limits = NO_LIMITS, *, without: int = -1) -> History:
    """Fold a history, one request an event, each at its own minute; one of them left out."""
    history = History(limits)
    for at, wire in enumerate(wires):
        if at != without:
            now_ms = DAY_ONE_MS + at * STEP_MS
            kind = wire.get("event_type", "View")
            said = {"event_type": kind, "time": now_ms, **wire}
            one = event(kind, **{key: value for key, value in said.items() if key != "event_type"})
            body = {**said, "$skip_user_properties_sync": said.pop("skip", False)}
            history.send(
                one, now_ms=now_ms, body=msgspec.json.encode({"events": [body | {"skip": None}]})
            )
    return history


def rows(history: History, own: set[int], asked: Asked) -> Rows:
    """All of a history as rows of the lake; group identifies of others are foreign."""
    table = arrow.table(history.blocks)
    others = ~np.isin(table["amplitude_id"].to_numpy(), list(own))
    group = np.array([one == "$groupidentify" for one in table["event_type"].to_pylist()], bool)
    foreign = group & others if asked.what == "group" else np.zeros(len(others), bool)
    return rows_of(table, foreign)


def everyone(history: History, one: int) -> set[int]:
    """The person and everyone merged into it."""
    one = history.people[one].merged_into or one
    return {one, *(was for was, who in history.people.items() if who.merged_into == one)}


def explained(history: History, asked: Asked, *, chunk: int = 0) -> Explanation:
    one = history.users[asked.user or ""] or history.devices[asked.device or ""]
    own = everyone(history, one or asked.amplitude_id) if one or asked.amplitude_id else set()
    trace = Trace(asked, own)
    every = rows(history, own, asked)
    cut = len(every.block)
    if asked.event:
        cut = max(i for i, user in enumerate(every.user_id) if user == asked.user) + 1
    from retrofill.core import why  # noqa: PLC0415 # its way to cut rows

    step = chunk or cut or 1
    for first in range(0, cut, step):
        trace.add(why._cut(every, first, min(first + step, cut)))
    assert trace.exact
    return trace.end()


def value(history: History, asked: Asked) -> Any:
    """The value as the state says it, by no way that the trace goes."""
    if asked.what == "group":
        return history.groups.get(GROUP, {}).get(asked.name)
    number = history.users[asked.user or ""] or history.devices[asked.device or ""]
    who = history.people.get(number)
    if who is not None and who.merged_into:
        who = history.people[who.merged_into]
    if who is None:
        return None
    if asked.what == "column":
        return who.columns[COLUMNS.index(asked.name)]
    if asked.what == "first_seen":
        return None if who.first_seen_ms < 0 else who.first_seen_ms
    return who.properties.get(asked.name)


def needed(found: Explanation) -> set[int]:
    return {one.at for one in found.facts if one.needed}


PROPERTIES = st.one_of(
    st.none(),
    st.builds(
        lambda operation, name, one: (
            {"$clearAll": "-"}
            if operation == "$clearAll"
            else {operation: {name: one}}
            if operation
            else {name: one}
        ),
        st.sampled_from(
            ["", "$set", "$setOnce", "$add", "$append", "$remove", "$unset", "$clearAll"]
        ),
        st.sampled_from(["plan", "plan", "other"]),
        st.sampled_from(["a", "b", 1]),
    ),
)
WIRE = st.fixed_dictionaries(
    {},
    optional={
        "event_type": st.sampled_from(["View", "$identify"]),
        "user_properties": PROPERTIES,
        "platform": st.sampled_from(["iOS", "Web"]),
        "device_model": st.sampled_from(["iPhone 9", "Pixel"]),
        "app_version": st.sampled_from(["1.0", "2.0"]),
        "revenue": st.just(3.5),
        "skip": st.sampled_from([True]),
        "time": st.integers(DAY_ONE_MS - 5, DAY_ONE_MS + 5),
    },
)
WHO = st.sampled_from(
    [
        {"device_id": "phone", "user_id": "ann"},
        {"device_id": "phone"},
        {"device_id": "phone", "user_id": "bob"},
        {"device_id": "kiosk"},
        {"device_id": "kiosk", "user_id": "ann"},
    ]
)
HISTORY = st.lists(st.builds(lambda who, wire: {**who, **wire}, WHO, WIRE), min_size=1, max_size=9)
ASKED = st.sampled_from(
    [
        *[Asked("property", "plan", user="ann")] * 3,
        Asked("property", "plan", device="kiosk"),
        *(Asked("column", name, user="ann") for name in ("platform", "os_name", "library")),
        *(Asked("column", name, user="ann") for name in ("start_version", "paying", "device_type")),
        Asked("first_seen", user="ann"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(HISTORY, ASKED, st.sampled_from([NO_LIMITS, SAID]), st.sampled_from([0, 1, 2]))
@example(  # without bob, the phone's next event would be ann's
    [
        {"device_id": "phone", "user_id": "ann"},
        {"device_id": "phone", "user_id": "bob"},
        {"device_id": "phone", "user_properties": {"plan": "a"}},
    ],
    Asked("property", "plan", user="ann"),
    NO_LIMITS,
    0,
)
@example(  # of two tables joined the one changed last stays: the second event makes the first one's the newer
    [
        {"device_id": "kiosk", "user_properties": {"plan": "a"}},
        {"device_id": "phone", "user_id": "ann", "user_properties": {"plan": "b"}},
        {"device_id": "kiosk", "user_properties": {"other": 1}},
        {"device_id": "kiosk", "user_id": "ann"},
    ],
    Asked("property", "plan", user="ann"),
    NO_LIMITS,
    0,
)
@example(  # a skipped event may merge two people too
    [
        {"device_id": "kiosk", "user_properties": {"plan": "a"}},
        {"device_id": "phone", "user_id": "ann"},
        {"device_id": "kiosk", "user_id": "ann", "skip": True},
    ],
    Asked("property", "plan", user="ann"),
    NO_LIMITS,
    0,
)
def test_what_is_needed_changes_the_value_and_nothing_else_does(
    wires: list[Wire], asked: Asked, limits: Limits, chunk: int
) -> None:
    history = told(wires, limits)
    found = explained(history, asked, chunk=chunk)
    before = value(history, asked)
    assert found.value == before
    changes = {
        at
        for at in range(len(wires))
        if msgspec.json.encode(value(told(wires, limits, without=at), asked))
        != msgspec.json.encode(before)
    }
    assert needed(found) == changes
    assert found.tried


def rules(found: Explanation) -> list[tuple[int, str, bool | None]]:
    return [(one.at, one.rule, one.needed) for one in found.facts]


ANN = {"device_id": "phone", "user_id": "ann"}
PLAN = Asked("property", "plan", user="ann")


def test_the_operation_that_made_the_value_and_those_that_did_nothing() -> None:
    wires: list[Wire] = [
        {**ANN, "user_properties": {"plan": "free"}},
        {**ANN, "user_properties": {"$set": {"plan": "pro"}}},
        {**ANN, "user_properties": {"$setOnce": {"plan": "gold"}}},
        {**ANN, "user_properties": {"plan": "old"}, "skip": True},
        {**ANN, "user_properties": {"color": "red"}},
    ]
    found = explained(told(wires), PLAN)
    assert found.value == "pro"
    assert rules(found) == [
        (0, "changed", False),
        (1, "changed", True),
        (2, "ignored", False),
        (3, "skipped", False),
    ]
    made = found.facts[1]
    assert (made.before, made.after) == ("free", "pro")
    assert made.operations == [("$set", "pro")]


def test_a_value_said_twice_needs_neither_alone() -> None:
    wires: list[Wire] = [{**ANN, "user_properties": {"plan": "pro"}}] * 2
    assert rules(explained(told(wires), PLAN)) == [(0, "changed", False), (1, "repeated", False)]


def test_an_update_over_the_limit_is_dropped_because_of_those_before() -> None:
    wires: list[Wire] = [
        *({**ANN, "user_properties": {"$add": {"count": 1}}} for _ in range(3)),
        {**ANN, "user_properties": {"plan": "pro"}},
    ]
    found = explained(told(wires, SAID), PLAN)
    assert found.value is None
    assert rules(found) == [
        (0, "limit", True),
        (1, "limit", True),
        (2, "limit", True),
        (3, "dropped", False),
    ]


def test_a_value_inherited_at_a_merge() -> None:
    wires: list[Wire] = [
        {"device_id": "kiosk", "user_properties": {"plan": "pro"}},
        ANN,
        {"device_id": "kiosk", "user_id": "ann"},
    ]
    history = told(wires)
    found = explained(history, PLAN)
    absorbed, surviving = history.blocks[2].merges[0].absorbed, history.users["ann"]
    assert found.value == "pro"
    assert rules(found) == [(0, "changed", True), (2, "merged", True)]
    merged = found.facts[-1]
    assert (merged.before, merged.absorbed, merged.after) == (None, "pro", "pro")
    assert merged.merge == (absorbed, surviving)
    nothing = explained(history, Asked("property", "never.said", user="ann"))
    assert (nothing.value, nothing.facts) == (None, [])


def test_columns_that_are_set_together() -> None:
    wires: list[Wire] = [
        {**ANN, "platform": "iOS", "os_name": "ios", "device_model": "iPhone 9"},
        {**ANN, "platform": "Web"},
    ]
    history = told(wires)
    found = explained(history, Asked("column", "os_name", user="ann"))
    assert found.value is None
    assert rules(found) == [(0, "changed", False), (1, "coupled", True)]
    found = explained(history, Asked("column", "platform", user="ann"))
    assert rules(found) == [(0, "changed", False), (1, "changed", True)]
    found = explained(history, Asked("column", "device_family", user="ann"))
    assert rules(found) == [(0, "default", False), (1, "default", True)]


def test_a_value_nobody_said() -> None:
    found = explained(told([{**ANN, "app_version": "1.0"}]), replace(PLAN, name="nothing"))
    assert (found.value, found.facts) == (None, [])
    found = explained(
        told([{**ANN, "app_version": "1.0"}]), Asked("column", "start_version", user="ann")
    )
    assert (found.value, rules(found)) == ("1.0", [(0, "default", True)])


def test_the_snapshot_of_one_event() -> None:
    wires: list[Wire] = [
        {**ANN, "user_properties": {"plan": "free"}},
        {**ANN, "user_properties": {"plan": "pro"}, "skip": True},
    ]
    found = explained(told(wires), replace(PLAN, event=True))
    assert (found.value, rules(found)) == ("pro", [(1, "skipped", True)])
    wires.append({**ANN, "user_properties": {"$append": {"plan": "x"}}})
    found = explained(told(wires), replace(PLAN, event=True))
    assert found.value == ["free", "x"]
    assert rules(found) == [(0, "changed", True), (1, "skipped", False), (2, "changed", True)]


def test_a_property_of_a_group() -> None:
    def sized(operation: str, size: int, org: str = "acme") -> Wire:
        return {
            "event_type": "$groupidentify",
            "device_id": "phone",
            "groups": {"org": org},
            "group_properties": {operation: {"size": size}},
        }

    wires = [sized("$set", 1), sized("$set", 5, "zeta"), sized("$add", 2), sized("$setOnce", 9)]
    asked = Asked("group", "size", group=GROUP)
    found = explained(told(wires), asked)
    assert found.value == 3
    assert rules(found) == [(0, "changed", True), (2, "changed", True), (3, "ignored", False)]
    wires.append({**ANN, "groups": {"org": "acme"}})
    found = explained(told(wires), replace(asked, user="ann", event=True))
    assert found.value == 3
    assert rules(found)[:2] == [(0, "changed", True), (2, "changed", True)]


def test_when_somebody_was_first_seen() -> None:
    wires: list[Wire] = [
        {**ANN, "time": DAY_ONE_MS},
        {**ANN, "time": DAY_ONE_MS - 5000},
        {**ANN, "time": DAY_ONE_MS - 1000},
    ]
    found = explained(told(wires), Asked("first_seen", user="ann"))
    assert found.value == DAY_ONE_MS - 5000
    assert rules(found)[:2] == [(0, "changed", False), (1, "changed", True)]


def test_a_merge() -> None:
    wires: list[Wire] = [{"device_id": "kiosk"}, ANN, {"device_id": "kiosk", "user_id": "ann"}, ANN]
    history = told(wires)
    merge = history.blocks[2].merges[0]
    found = explained(history, Asked("merge", amplitude_id=merge.absorbed))
    assert found.value == merge.surviving
    assert rules(found) == [(0, "identity", True), (1, "identity", True), (2, "merged", True)]
    assert (found.facts[-1].before, found.facts[-1].after) == (None, merge.surviving)


def test_a_long_history_shows_the_newest_and_counts_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from retrofill.core import why  # noqa: PLC0415 # to bound it

    wires: list[Wire] = [{**ANN, "user_properties": {"$add": {"plan": 1}}} for _ in range(150)]
    monkeypatch.setattr(why, "WHY_FOLDED_ROWS_MAX", 450)
    found = explained(told(wires), PLAN, chunk=40)
    assert (found.value, len(found.facts), found.left_out, found.tried) == (150, 100, 50, False)
    assert [one.needed for one in found.facts] == [None] * 97 + [True] * 3
    assert found.facts[-1].after == 150
    monkeypatch.setattr(why, "WHY_FOLDED_ROWS_MAX", 149)
    assert {one.needed for one in explained(told(wires), PLAN).facts} == {None}


def test_a_row_that_was_not_decided_so_is_told() -> None:
    history = told([ANN, ANN])
    every = rows(history, {1}, PLAN)
    trace = Trace(PLAN, {1, 7})
    trace.add(replace(every, amplitude_id=[1, 7]))
    assert not trace.exact
