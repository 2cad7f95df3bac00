"""What is said again is the same object, and what is not good is never kept."""

from __future__ import annotations

import msgspec
import pytest

from retrofill.core import alike, event, properties
from retrofill.core.alike import Alike, Same
from retrofill.core.event import Envelope, Event
from retrofill.limits import ALIKE_BYTES_MAX, DEPTH_MAX

KEY = "k" * 32
DEEP = b'{"a":' * DEPTH_MAX + b"1" + b"}" * DEPTH_MAX


def read(known: Alike, *texts: bytes) -> list[alike.Object | None]:
    return known.read(list(texts))


def opened(*sent: bytes) -> Envelope:
    events = b",".join(
        b'{"event_type":"View","user_id":"user-%d","user_properties":%b}' % (number, text)
        for number, text in enumerate(sent)
    )
    found = event.open_envelope(b'{"api_key":"%b","events":[%b]}' % (KEY.encode(), events))
    assert isinstance(found, Envelope)
    return found


def test_from_the_second_time_on_the_same_text_is_the_same_object() -> None:
    known = Alike()
    (first,) = read(known, b'{"plan":"pro"}')
    second, other = read(known, b'{"plan":"pro"}', b'{"plan":"free"}')
    third, another = read(known, b'{"plan":"pro"}', b'{"plan" : "pro"}')
    assert first == second == third == another == {"plan": "pro"}
    assert other == {"plan": "free"}
    assert third is second
    assert another is not second


def test_null_is_none_however_often_it_is_said() -> None:
    known = Alike()
    for _ in range(3):
        assert read(known, b"null", b'{"a":null}', b"{}") == [None, {"a": None}, {}]


def test_a_long_text_is_read_each_time() -> None:
    known = Alike()
    text = b'{"a":"%b"}' % (b"x" * ALIKE_BYTES_MAX)
    said = [read(known, text)[0] for _ in range(3)]
    assert said[0] == said[1] == said[2]
    assert said[1] is not said[2]


@pytest.mark.parametrize(("bound", "most"), [("ALIKE_MAX", 2), ("ALIKE_TOTAL_BYTES", 20)])
def test_it_begins_anew_at_its_bounds(
    bound: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alike, bound, most)
    known = Alike()
    texts = [b'{"a":%d}' % number for number in range(3)]
    for _ in range(2):
        read(known, *texts[:2])
    before = read(known, *texts[:2])
    assert all(one is two for one, two in zip(before, read(known, *texts[:2]), strict=True))
    for _ in range(2):
        read(known, texts[2])
    again = read(known, *texts)
    assert again == [{"a": 0}, {"a": 1}, {"a": 2}]
    assert again[0] is not before[0]


@pytest.mark.parametrize(
    "text",
    [b"5", b'"a"', b"[]", b'{"a":18446744073709551616}', b'{"a":1e999}', b'{"b":' + DEEP + b"}"],
)
def test_what_is_not_good_is_never_kept(text: bytes) -> None:
    known = Alike()
    for _ in range(3):
        with pytest.raises((ValueError, OverflowError)):
            read(known, b'{"a":1}', text)
    assert read(known, DEEP) == [msgspec.json.decode(DEEP)]


def test_nulls_beside_it_let_no_object_go_deeper() -> None:
    with pytest.raises(ValueError, match="levels"):
        read(Alike(), *[b"null"] * 9, b'{"b":' + DEEP + b"}")
    assert read(Alike(), b"null", DEEP, b"{}") == [None, msgspec.json.decode(DEEP), {}]


def test_events_that_say_the_same_share_the_object_and_others_do_not() -> None:
    plans = (b'{"tier":"gold"}', b'{"tier":"gold"}', b'{"tier":"iron"}', b"null")
    opened(*plans)
    events = opened(*plans).events
    assert events is not None
    one, same, other, none = (found.user_properties for found in events)
    assert one == {"tier": "gold"}
    assert same is one
    assert (other, none) == ({"tier": "iron"}, None)


def test_one_event_is_read_as_in_a_body() -> None:
    text = b'{"event_type":"a","user_id":"user-1","user_properties":{"b":[1]}}'
    one = event.decode_one(text)
    assert one == Event("a", user_id="user-1", user_properties={"b": [1]})
    assert [one] == event.decode(b'{"events":[' + text + b"]}")


def test_a_table_that_holds_just_what_was_sent_is_that_object() -> None:
    sent = {"a": 1, "b": [2]}
    assert properties.apply({}, sent) is sent
    assert properties.apply({"a": 0, "b": [2]}, sent) is sent
    assert properties.apply(sent, sent) is sent


@pytest.mark.parametrize(
    ("table", "sent", "after"),
    [
        ({"b": 1, "a": 1}, {"a": 2, "b": 1}, {"b": 1, "a": 2}),  # in the order of the table
        ({"a": 1}, {"a": None, "b": 2}, {"a": 1, "b": 2}),
        ({}, {"a": None}, {}),
        ({"a": 1}, {"a": 1.0}, {"a": 1.0}),
        ({"a": 1, "b": 2}, {"a": 3}, {"a": 3, "b": 2}),
    ],
)
def test_what_was_sent_takes_no_table_place_that_reads_otherwise(
    table: dict[str, object], sent: dict[str, object], after: dict[str, object]
) -> None:
    found = properties.apply(table, sent)
    assert msgspec.json.encode(found) == msgspec.json.encode(after)


def said(number: int) -> bytes:
    return b"a snapshot %d" % number


def test_a_value_that_came_twice_is_one_object_from_then_on() -> None:
    same: Same[bytes] = Same(most=4, longest=100, total=1000)
    first, second, third, other = (same.one(said(one)) for one in (1, 1, 1, 2))
    assert first == second == third
    assert third is second is not first
    assert other == said(2)


def test_a_value_too_long_is_not_kept() -> None:
    same: Same[bytes] = Same(most=4, longest=5, total=1000)
    found = [same.one(said(1)) for _ in range(3)]
    assert found == [said(1)] * 3
    assert found[2] is not found[1]


@pytest.mark.parametrize(("most", "total"), [(2, 1000), (9, 2 * len(said(0)))])
def test_values_begin_anew_at_their_bounds(most: int, total: int) -> None:
    same: Same[bytes] = Same(most=most, longest=100, total=total)
    kept = [same.one(said(number)) for number in (1, 1, 2, 2)][1::2]
    assert [same.one(said(1)), same.one(said(2))] == kept
    assert same.one(said(1)) is kept[0]
    third = [same.one(said(3)) for _ in range(2)][1]
    assert same.one(said(3)) is third
    assert same.one(said(1)) is not kept[0]
