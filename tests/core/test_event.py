"""Requests read: good ones fast, odd ones mended, bad ones with every fault named."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import Raw

from retrofill.core import event, glance, mend
from retrofill.core.event import Batch, Envelope, Event, Fault, Refusal
from retrofill.limits import DEPTH_MAX, TIME_MS_MAX, Limits

LIMITS = Limits()
KEY = "0123456789abcdef"


def body(*events: Any, **envelope: Any) -> bytes:
    return json.dumps({"api_key": KEY, "events": list(events), **envelope}).encode()


def one(**fields: Any) -> dict[str, Any]:
    return {"event_type": "Search", "user_id": "user-1", "device_id": "device-1"} | fields


def read(sent: bytes, path: str = "/2/httpapi", limits: Limits = LIMITS) -> Batch | Refusal:
    envelope = event.open_envelope(sent, size_max=limits.batch_bytes)
    if isinstance(envelope, Refusal):
        return envelope
    return event.parse(
        envelope,
        project=7,
        path=path,
        limits=limits,
        received_ms=1_700_000_000_000,
        remote="192.0.2.1",
        payload_bytes=len(sent),
    )


def batch(sent: bytes, path: str = "/2/httpapi", limits: Limits = LIMITS) -> Batch:
    found = read(sent, path, limits)
    assert isinstance(found, Batch), found
    assert event.decode(found.body) == found.events
    return found


def only(path: str = "/2/httpapi", **fields: Any) -> Event:
    return batch(body(one(**fields)), path).events[0]


def faults(sent: bytes, path: str = "/2/httpapi", limits: Limits = LIMITS) -> list[tuple[Any, ...]]:
    found = read(sent, path, limits)
    assert isinstance(found, Refusal), found
    assert found.kind == "faults"
    return [(fault.index, fault.field, fault.kind) for fault in found.faults]


def nested(levels: int, inner: Any = 1) -> Any:
    """An object in which `levels` containers are inside one another, itself counted."""
    for level in range(levels):
        inner = {"a": inner} if level % 2 or level == levels - 1 else [inner]
    return inner


# The envelope. Source: contract, events 1 and 12, ingest 4.


@pytest.mark.parametrize(
    ("sent", "refusal"),
    [
        (b"", Refusal("missing_body")),
        (b" \n", Refusal("missing_body")),
        (b"{", Refusal("invalid_json")),
        (b"nonsense", Refusal("invalid_json")),
        (b"[]", Refusal("invalid_json")),
        (b"7", Refusal("invalid_json")),
        (b'{"api_key":"k","events":[NaN]}', Refusal("invalid_json")),
        (b'{"api_key":"k","events":[{"event_type":"a"}]} x', Refusal("invalid_json")),
        (b'{"api_key":"k","events":[{"event_type":"\xff"}]}', Refusal("invalid_json")),
        (b'{"api_key":"k","events":[{"event_properties":{"a":"\xff"}}]}', Refusal("invalid_json")),
        ('{"api_key":"k"}'.encode("utf-16"), Refusal("invalid_json")),
        (b"{}", Refusal("missing_field", "api_key")),
        (b'{"api_key":null,"events":[]}', Refusal("missing_field", "api_key")),
        (b'{"api_key":"","events":[]}', Refusal("missing_field", "api_key")),
        (b'{"api_key":{},"events":[]}', Refusal("missing_field", "api_key")),
        (b'{"api_key":"k"}', Refusal("missing_field", "events")),
        (b'{"api_key":"k","events":null}', Refusal("missing_field", "events")),
        (b'{"api_key":"k","events":{}}', Refusal("missing_field", "events")),
        (b'{"api_key":"k","events":[]}', Refusal("missing_field", "events")),
    ],
)
def test_a_request_that_is_no_batch_is_refused(sent: bytes, refusal: Refusal) -> None:
    assert read(sent) == refusal


def test_the_key_is_known_before_anything_is_said_of_the_events() -> None:
    envelope = event.open_envelope(b'{"events":[{"time":"x"}, 5],"api_key":"k"}')
    assert isinstance(envelope, Envelope)
    assert envelope.api_key == "k"


def test_a_byte_order_mark_is_passed_over() -> None:
    assert batch(b"\xef\xbb\xbf" + body(one())).events[0].user_id == "user-1"


def test_unknown_keys_are_ignored() -> None:
    sent = body(one(extra={"a": [1]}, delay={"id": 1}), request_metadata={"sdk": {}})
    assert batch(sent).body == sent


def test_2000_events_pass_and_2001_do_not() -> None:
    events = [{"event_type": "a", "user_id": f"user-{n}"} for n in range(2001)]
    assert len(batch(body(*events[:2000])).events) == 2000
    assert read(body(*events)) == Refusal("too_large")
    assert read(body(*([5] * 2001))) == Refusal("too_large")


@pytest.mark.parametrize(
    ("path", "most"), [("/2/httpapi", 1024 * 1024), ("/batch", 20 * 1024 * 1024)]
)
def test_a_body_at_its_limit_passes_and_one_byte_more_does_not(path: str, most: int) -> None:
    sent = body(one())
    assert batch(sent + b" " * (most - len(sent)), path)
    assert read(sent + b" " * (most + 1 - len(sent)), path) == Refusal("too_large")


@pytest.mark.parametrize(
    ("said", "ms"),
    [
        ("2026-01-02T03:04:05.678Z", 1767323045678),
        ("2026-01-02T05:04:05.678+02:00", 1767323045678),
        ("2026-01-02T03:04:05.678", 1767323045678),
        ("1767323045678", 1767323045678),
        (1767323045678, 1767323045678),
        (1767323045678.0, 1767323045678),
        ("yesterday", None),
        ("", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("1950-01-01T00:00:00Z", None),
        ({}, None),
        (None, None),
        (True, None),
    ],
)
def test_the_client_upload_time_is_read_or_left_out(said: Any, ms: int | None) -> None:
    assert batch(body(one(), client_upload_time=said)).client_upload_ms == ms


def test_a_batch_says_where_it_came_from() -> None:
    sent = body(one())
    assert batch(sent, "/batch") == Batch(
        7, "/batch", sent, event.decode(sent), len(sent), 1_700_000_000_000, None, "192.0.2.1"
    )


# Ids. Source: contract, events 4 and ingest 6. What was sent, the path, the ids kept or the faults.

FORBIDDEN = ["anonymous", "Anonymous", "nil", "none", "null", "NULL", "n/a", "N/A", "na", "NA"]
FORBIDDEN += ["undefined", "unKnown", "00000000-0000-0000-0000-000000000000", "{}", "LMY47D"]
FORBIDDEN += ["0", "-1"]


@pytest.mark.parametrize("path", ["/2/httpapi", "/batch"])
@pytest.mark.parametrize("said", [*FORBIDDEN, 0, -1])
def test_a_forbidden_user_id_is_invalid(said: Any, path: str) -> None:
    assert faults(body(one(user_id=said)), path) == [(0, "user_id", "invalid")]


@pytest.mark.parametrize("said", [word for word in FORBIDDEN if not word.startswith("0000")])
def test_a_forbidden_device_id_is_invalid(said: str) -> None:
    assert faults(body(one(device_id=said))) == [(0, "device_id", "invalid")]


IDS: list[tuple[dict[str, Any], str, Any]] = [
    ({"user_id": "", "device_id": "device-1"}, "/2/httpapi", (None, "device-1")),
    ({"user_id": "user-1", "device_id": ""}, "/2/httpapi", ("user-1", None)),
    ({"user_id": "user-1", "device_id": None}, "/2/httpapi", ("user-1", None)),
    ({"user_id": "user-1", "device_id": "   "}, "/2/httpapi", ("user-1", None)),
    ({"user_id": "  user-1 ", "device_id": None}, "/2/httpapi", ("user-1 ", None)),
    ({"user_id": 123456, "device_id": None}, "/2/httpapi", ("123456", None)),
    ({"user_id": 10**30, "device_id": None}, "/2/httpapi", ("1" + "0" * 30, None)),
    ({"user_id": "ü" * 1024, "device_id": None}, "/2/httpapi", ("ü" * 1024, None)),
    ({"user_id": "ü" * 1025}, "/2/httpapi", [(0, "user_id", "id_length")]),
    ({"user_id": 10**1024}, "/2/httpapi", [(0, "user_id", "id_length")]),
    ({"user_id": "x" * 1025, "device_id": None}, "/batch", [(0, "user_id", "id_length")]),
    ({"user_id": "x" * 1025}, "/batch", (None, "device-1")),
    ({"device_id": " " + "x" * 1024}, "/2/httpapi", ("user-1", "x" * 1024)),
    ({"user_id": "User-1", "device_id": None}, "/batch", ("User-1", None)),
    ({"user_id": "abc"}, "/2/httpapi", [(0, "user_id", "id_length")]),
    ({"user_id": "abc"}, "/batch", (None, "device-1")),
    ({"device_id": 1}, "/2/httpapi", [(0, "device_id", "id_length")]),
    ({"device_id": 1}, "/batch", ("user-1", None)),
    ({"device_id": "  abcd"}, "/2/httpapi", [(0, "device_id", "id_length")]),
    (
        {"user_id": "abc", "device_id": "abc"},
        "/batch",
        [(0, "user_id", "id_length"), (0, "device_id", "id_length")],
    ),
    ({"user_id": "abc", "device_id": None}, "/batch", [(0, "user_id", "id_length")]),
    ({"user_id": 1.5}, "/2/httpapi", [(0, "user_id", "invalid")]),
    ({"user_id": True}, "/2/httpapi", [(0, "user_id", "invalid")]),
    ({"user_id": {}, "device_id": None}, "/batch", [(0, "user_id", "invalid")]),
    (
        {"user_id": None, "device_id": ""},
        "/batch",
        [(0, "user_id", "missing"), (0, "device_id", "missing")],
    ),
    ({"device_id": "00000000-0000-0000-0000-000000000000"}, "/2/httpapi", ("user-1", None)),
    (
        {"user_id": None, "device_id": "00000000-0000-0000-0000-000000000000"},
        "/2/httpapi",
        [(0, "device_id", "invalid")],
    ),
    ({"user_id": None, "device_id": None, "event_type": "$groupidentify"}, "/batch", (None, None)),
    ({"user_id": "abc", "device_id": None, "event_type": "$groupidentify"}, "/batch", (None, None)),
]


@pytest.mark.parametrize(("sent", "path", "expected"), IDS)
def test_ids_are_trimmed_dropped_or_refused(sent: dict[str, Any], path: str, expected: Any) -> None:
    if isinstance(expected, list):
        assert faults(body(one(**sent)), path) == expected
    else:
        found = only(path, **sent)
        assert (found.user_id, found.device_id) == expected


def test_two_long_ids_alike_so_far_are_never_one() -> None:
    """Among good events too, where only a glance at all strings tells that one is long."""
    good = [one(event_properties={"a": n}) for n in range(40)]
    long = [one(user_id="x" * 1024 + end) for end in ("", "1", "2")]
    assert faults(body(*good, *long)) == [(n, "user_id", "id_length") for n in (41, 42)]
    kept = [found.user_id for found in batch(body(*good, *long), "/batch").events[40:]]
    assert kept == ["x" * 1024, None, None]


@pytest.mark.parametrize("event_type", ["Clicked", "$groupidentify", "$identify"])
@pytest.mark.parametrize("neighbours", [0, 40])
def test_only_an_identify_says_who_pays_and_since_which_version(
    event_type: str, neighbours: int
) -> None:
    """Source: contract, events 2, `paying` and `start_version`."""
    good = [one(event_properties={"a": n}) for n in range(neighbours)]
    for said in ({"paying": "true"}, {"start_version": "1.0"}):
        taken = batch(body(*good, one(event_type=event_type, **said)))
        kept = {"paying": taken.events[-1].paying, "start_version": taken.events[-1].start_version}
        identify = event_type == "$identify"
        assert kept == {"paying": None, "start_version": None, **(said if identify else {})}
        assert event.decode(taken.body) == taken.events


@pytest.mark.parametrize(
    ("said", "user_id", "accepted"),
    [
        (3, "abc", True),
        (1, "a", True),
        (0, "a", True),
        (10, "user-1", False),
        (-1, "abc", False),
        ("3", "abc", False),
        (None, "abc", False),
        (None, "abcde", True),
    ],
)
def test_min_id_length_overrides_in_both_directions(
    said: Any, user_id: str, *, accepted: bool
) -> None:
    sent = body(one(user_id=user_id, device_id="device-0123"), options={"min_id_length": said})
    assert isinstance(read(sent), Batch if accepted else Refusal)


@pytest.mark.parametrize(("switch", "path"), [("drop", "/2/httpapi"), ("reject", "/batch")])
def test_a_project_may_drop_or_reject_short_ids_everywhere(switch: Any, path: str) -> None:
    limits = Limits(ids_short=switch)
    sent = body(one(user_id="abc"))
    if switch == "drop":
        assert batch(sent, path, limits).events[0].user_id is None
    else:
        assert faults(sent, path, limits) == [(0, "user_id", "id_length")]


# Types. What was sent, and what is kept.


@pytest.mark.parametrize(
    ("field", "said", "kept"),
    [
        ("time", 0, 0),
        ("time", TIME_MS_MAX, TIME_MS_MAX),
        ("time", 1.0, 1),
        ("time", None, None),
        ("platform", 5, "5"),
        ("platform", True, "true"),
        ("os_version", 1.50, "1.5"),
        ("app_version", None, None),
        ("city", "x" * 1025, "x" * 1024),
        ("user_agent", "x" * 5000, "x" * 5000),
        ("insert_id", "", None),
        ("insert_id", 77, "77"),
        ("insert_id", "x" * 1025, "x" * 1025),
        ("event_type", "x" * 1025, "x" * 1024),
        ("session_id", "later", None),
        ("session_id", 2**63, None),
        ("session_id", -1, -1),
        ("event_id", 1.0, 1),
        ("location_lat", "52", None),
        ("location_lat", 52, 52.0),
        ("price", 3, 3.0),
        ("quantity", 2.0, 2),
        ("skip_user_properties_sync", True, True),
        ("skip_user_properties_sync", 1, True),
        ("skip_user_properties_sync", "false", False),
        ("plan", "none", Raw()),
        ("plan", None, Raw()),
        ("plan", {"branch": "b"}, Raw(b'{"branch": "b"}')),
        (
            "plan",
            {"versionId": "i", "source": "s", "version": 3, "x": "y"},
            Raw(b'{"versionId":"i","source":"s"}'),
        ),
        ("ingestion_metadata", 5, None),
        ("ingestion_metadata", {"source_name": 5}, event.IngestionMetadata("5")),
        ("event_properties", None, Raw()),
        ("event_properties", {}, Raw(b"{}")),
        ("event_properties", {"a": 10**30}, Raw(b'{"a": %d}' % 10**30)),
        ("event_properties", {"a": ["x" * 1025]}, Raw(b'{"a":["%s"]}' % (b"x" * 1024))),
        ("user_properties", {"a": {"b": ["x" * 1025]}}, {"a": {"b": ["x" * 1024]}}),
        ("user_properties", {"$add": {"n": 2**64}}, {"$add": {"n": float(2**64)}}),
        ("user_properties", {"n": 2**64 - 1, "m": -(2**63)}, {"n": 2**64 - 1, "m": -(2**63)}),
        ("user_properties", {"a": -(2**63) - 1}, {"a": -float(2**63)}),
        ("groups", {"org": "acme"}, {"org": "acme"}),
        ("groups", {"org": ["a", 5, "", None, 1.5, True]}, {"org": ["a", "5", "1.5", "true"]}),
        ("groups", {"org": 5, "none": "", "nil": None}, {"org": "5"}),
        ("groups", {str(n): "a" for n in range(7)}, {str(n): "a" for n in range(5)}),
        (
            "groups",
            {"a": list("abcdefgh"), "b": list("abcdefgh")},
            {"a": [*"abcdefgh"], "b": ["a", "b"]},
        ),
        ("groups", {"org": "x" * 1025}, {"org": "x" * 1024}),
    ],
)
@pytest.mark.parametrize("neighbours", [0, 40])
def test_values_are_kept_mended_or_left_out(
    field: str, said: Any, kept: Any, neighbours: int
) -> None:
    wire = {"skip_user_properties_sync": "$skip_user_properties_sync"}.get(field, field)
    good = [one(event_properties={"a": n}) for n in range(neighbours)]
    found = batch(body(*good, one(**{wire: said})))
    assert getattr(found.events[-1], field) == kept
    assert type(getattr(found.events[-1], field)) is type(kept)
    assert [bytes(each.event_properties) for each in found.events[:-1]] == [
        b'{"a": %d}' % n for n in range(neighbours)
    ]


@pytest.mark.parametrize(
    ("field", "said", "kind"),
    [
        ("event_type", None, "missing"),
        ("event_type", "", "missing"),
        ("event_type", 5, "invalid"),
        ("event_type", {}, "invalid"),
        ("time", "2026-01-02T03:04:05Z", "invalid"),
        ("time", "1700000000000", "invalid"),
        ("time", 1.5, "invalid"),
        ("time", -1, "invalid"),
        ("time", TIME_MS_MAX + 1, "invalid"),
        ("time", 10**30, "invalid"),
        ("time", True, "invalid"),
        ("event_properties", [], "invalid"),
        ("event_properties", "{}", "invalid"),
        ("user_properties", [], "invalid"),
        ("user_properties", {"a": 10**305}, None),
        ("groups", "acme", "invalid"),
        ("groups", {"org": {}}, "invalid"),
        ("groups", {"org": [["a"]]}, "invalid"),
        ("group_properties", 5, "invalid"),
        ("platform", {}, "invalid"),
        ("city", [], "invalid"),
        ("insert_id", {}, "invalid"),
        ("price", "9.99", "invalid"),
        ("quantity", 1.5, "invalid"),
        ("quantity", "2", "invalid"),
        ("revenue", True, "invalid"),
        ("$skip_user_properties_sync", "perhaps", "invalid"),
    ],
)
@pytest.mark.parametrize("neighbours", [0, 40])
def test_values_that_cannot_be_meant_are_faults(
    field: str, said: Any, kind: str | None, neighbours: int
) -> None:
    good = [one(event_properties={"a": n}) for n in range(neighbours)]
    sent = body(*good, one(**{field: said}))
    if kind is None:
        assert batch(sent)
    else:
        assert faults(sent) == [(neighbours, field, kind)]


def test_an_event_that_is_no_object_is_named() -> None:
    for odd in (5, "text", None, [], [one()], True):
        assert faults(body(one(), odd)) == [(1, "event", "not_object")]


def test_every_fault_of_every_event_is_listed() -> None:
    sent = body(
        one(time="x", event_type=""),
        one(),
        5,
        one(user_id="nil", device_id="abc", event_properties=[]),
        {},
    )
    assert faults(sent) == [
        (0, "time", "invalid"),
        (0, "event_type", "missing"),
        (2, "event", "not_object"),
        (3, "user_id", "invalid"),
        (3, "device_id", "id_length"),
        (3, "event_properties", "invalid"),
        (4, "event_type", "missing"),
        (4, "user_id", "missing"),
        (4, "device_id", "missing"),
    ]


def test_every_fault_has_a_reason_for_the_log() -> None:
    found = read(body(one(time="x"), 5, {}))
    assert isinstance(found, Refusal)
    assert all(isinstance(fault, Fault) and fault.reason for fault in found.faults)


@pytest.mark.parametrize("reserved", sorted(event.RESERVED))
def test_reserved_event_types_are_refused_only_when_strict(reserved: str) -> None:
    sent = body(one(event_type=reserved))
    assert batch(sent).body == sent
    strict = Limits(strict_event_types=True)
    assert faults(sent, limits=strict) == [(0, "event_type", "invalid")]
    assert batch(body(one(event_type="[Amplitude] Page Viewed")), limits=strict)


# Hostile input.

FIELDS = ["event_properties", "user_properties", "group_properties"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("neighbours", [0, 60])
def test_40_levels_pass_and_41_do_not(field: str, neighbours: int) -> None:
    good = [one(event_properties={"a": [n]}) for n in range(neighbours)]
    sent = body(*good, one(**{field: nested(DEPTH_MAX)}))
    assert batch(sent).body == sent
    too_deep = body(*good, one(**{field: nested(DEPTH_MAX + 1)}), one(time="x"))
    assert faults(too_deep) == [(neighbours, field, "invalid"), (neighbours + 1, "time", "invalid")]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("levels", [900, 1000, 5000, 50_000])
def test_what_no_decoder_follows_is_one_events_fault(field: str, levels: int) -> None:
    sent = body(one(), one(**{field: {}}), one(platform="1"))
    deep = b'{"a":' * levels + b"1" + b"}" * levels
    sent = sent.replace(b'"%s": {}' % field.encode(), b'"%s": %s' % (field.encode(), deep))
    assert faults(sent, "/batch") == [(1, field, "invalid")]


def test_depth_in_ignored_keys_does_not_matter() -> None:
    sent = body(one(extra=0)).replace(b'"extra": 0', b'"extra": ' + b"[" * 5000 + b"]" * 5000)
    assert batch(sent).events[0].user_id == "user-1"


# What it begins with, what comes again and again, how often, and how it ends: made by the test, they are half a gigabyte.
HOSTILE = [
    (b"", b"[", 20_000_000, b""),
    (b"", b"{", 20_000_000, b""),
    (b"", b'{"a":', 4_000_000, b""),
    (b'{"api_key":"k","events":[', b"[", 20_000_000, b""),
    (b'{"api_key":"k","events":[', b"[],", 6_000_000, b"[]]}"),
    (b'{"api_key":"k","events":[', b"{},", 6_000_000, b"{}]}"),
    (b'{"api_key":"k","events":[', b"1,", 9_000_000, b"1]}"),
    (b'{"api_key":"k","events":[{"event_properties":{"a":[', b"[],", 6_000_000, b"[]]}}]}"),
    (b'{"api_key":"', b'\\"', 9_000_000, b""),
    (b'{"api_key":"', b"\\ud800", 3_000_000, b'"}'),
    (b'{"api_key":"', b"\\n", 9_000_000, b'\\ud800"}'),
    (b'"', b'\\"', 9_000_000, b""),
    (b"", b" ", 20_000_000, b""),
]


@pytest.mark.parametrize(
    ("start", "again", "times", "end"), HOSTILE, ids=[f"{one[0] + one[1]!r}" for one in HOSTILE]
)
def test_20_mb_of_nothing_is_refused_in_no_time(
    start: bytes, again: bytes, times: int, end: bytes
) -> None:
    hostile = start + again * times + end
    began = time.thread_time()
    assert isinstance(read(hostile, "/batch"), Refusal)
    assert time.thread_time() - began < 10  # of CPU: what others do meanwhile does not count


def test_half_a_surrogate_becomes_the_replacement_character() -> None:
    sent = body(one(event_properties={"a": 0}, user_properties={"b": 0}, platform="p"))
    odd = (
        sent.replace(b'"a": 0', rb'"a": "x\ud800y \ud83d\ude00 \\ud800"')
        .replace(b'"b": 0', rb'"b": "\udc00\ud800"')
        .replace(b'"p"', rb'"\ud83d\ud83d\ude00"')
    )
    found = batch(odd).events[0]
    assert json.loads(bytes(found.event_properties)) == {"a": "x\ufffdy 😀 \\ud800"}
    assert found.user_properties == {"b": "\ufffd\ufffd"}
    assert found.platform == "\ufffd😀"


@pytest.mark.parametrize(
    "number", ["1e999", "-1E+999", "1e0400", "9" * 5000, "9" * 250 + "e99", "0.1e400", "[[1e999]]"]
)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("neighbours", [0, 60])
def test_a_number_that_no_decoder_holds_is_a_fault(
    number: str, field: str, neighbours: int
) -> None:
    good = [one(event_properties={"a": n}) for n in range(neighbours)]
    sent = body(*good, one(**{field: {"a": 0, "b": "c"}}))
    sent = sent.replace(b'"a": 0, "b"', b'"a": %s, "b"' % number.encode())
    assert faults(sent) == [(neighbours, field, "invalid")]


@pytest.mark.parametrize("text", ["1e308", "123e45", "e999", "1e-999", "x 1e999", "1" * 300])
def test_what_only_looks_like_such_a_number_passes(text: str) -> None:
    events = [one(event_properties={"a": text, "b": 1e308, "c": 5e-324}) for _ in range(60)]
    sent = body(*events)
    assert batch(sent).body == sent


def test_many_long_strings_with_quotes_in_them_are_measured_right() -> None:
    events = [one(event_properties={"a": '"' * n}) for n in range(900, 1100)]
    found = batch(body(*events))
    kept = [len(json.loads(bytes(each.event_properties))["a"]) for each in found.events]
    assert kept == [min(n, 1024) for n in range(900, 1100)]


# Laws.

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["", " a", "none", "user-1", "x" * 1030, "0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
odd_events = st.fixed_dictionaries(
    {}, optional={field.encode_name: json_values for field in msgspec.structs.fields(Event)}
)
good_values = st.fixed_dictionaries(
    {"event_type": st.sampled_from(["a", "Search", "$identify"]), "user_id": st.just("user-1")},
    optional={
        "device_id": st.sampled_from(["device-1", "", None, "  device-2"]),
        "time": st.integers(0, TIME_MS_MAX),
        "event_properties": st.dictionaries(st.text(max_size=5), json_values, max_size=3),
        "user_properties": st.dictionaries(st.text(max_size=5), json_values, max_size=3),
        "groups": st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=6),
        "price": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
        "platform": st.text(max_size=5) | st.integers(),
        "session_id": json_values,
    },
)


@given(st.binary(max_size=300))
@example(b'{"api_key":"k","events":[{"plan":null,"event_type":"a","user_id":"abcde"}]}')
def test_any_bytes_give_a_batch_or_a_refusal(sent: bytes) -> None:
    assert isinstance(read(sent), Batch | Refusal)


@given(st.lists(odd_events | json_values, min_size=1, max_size=3), st.booleans())
def test_any_json_gives_a_batch_or_a_refusal(
    events: list[Any],
    ascii_only: bool,  # noqa: FBT001 - drawn
) -> None:
    sent = json.dumps({"api_key": KEY, "events": events}, ensure_ascii=ascii_only)
    found = read(sent.encode(errors="replace"))
    if isinstance(found, Batch):
        assert event.decode(found.body) == found.events
    else:
        assert found.faults


@given(st.lists(good_values, min_size=1, max_size=40))
@settings(max_examples=60)
def test_the_bytes_kept_are_the_events_meant_and_are_good_as_they_stand(events: list[Any]) -> None:
    found = batch(body(*events), "/batch")
    again = batch(b'{"api_key":"k",' + found.body[1:], "/batch")
    assert again.events == found.events


@given(st.binary(max_size=200), st.randoms(use_true_random=False))
def test_a_damaged_body_gives_a_batch_or_a_refusal(noise: bytes, chance: random.Random) -> None:
    good = body(one(event_properties={"a": [1, "é"]}, groups={"b": "c"}), one(user_id="user-2"))
    at, end = sorted(chance.choices(range(len(good)), k=2))
    assert isinstance(read(good[:at] + noise + good[end:]), Batch | Refusal)


property_texts = st.builds(
    lambda keys: json.dumps(keys, ensure_ascii=False),
    st.dictionaries(st.text(max_size=5), json_values, max_size=4),
) | st.sampled_from(
    ["[]", "null", "5", '{"a":1e999}', '{"a":1E+0999}', '{"a":"1e999"}', '{"a":%s}' % ("1" * 310)]
)


@given(st.lists(property_texts, min_size=1, max_size=3), st.integers(0, 30))
def test_the_glance_passes_no_properties_that_a_close_look_refuses(
    texts: list[str], before: int
) -> None:
    plain = '{"a":1,"b":"c"}'
    texts = [plain] * before + texts + [plain] * 30
    raws = [Raw(text.encode(errors="replace")) for text in texts]
    spare = sum(text.count("{") + text.count("[") for text in texts)
    if glance.raws(raws, spare=spare):
        assert all(isinstance(mend.object_(raw), dict) for raw in raws)


@given(
    st.lists(
        st.text("ab\\\"'{}", max_size=1100) | st.integers(1020, 1030).map(lambda n: "x" * n),
        max_size=5,
    )
)
def test_the_glance_passes_no_long_string(texts: list[str]) -> None:
    sent = json.dumps(texts).encode()
    if glance.strings(sent):
        assert all(len(text) <= 1024 for text in texts)


# What was sent, and what is kept as the event's and as the user's properties. Source: contract, events 3, `$exposure`.
EXPOSURES = [
    (
        {"flag_key": "new-cart", "variant": "on", "experiment_key": "exp-1", "page": 3},
        {"theme": "dark", "$set": {"plan": "pro"}},
        {
            "[Experiment] Flag Key": "new-cart",
            "[Experiment] Variant": "on",
            "[Experiment] Experiment Key": "exp-1",
            "page": 3,
        },
        {"theme": "dark", "$set": {"plan": "pro", "[Experiment] new-cart": "on"}},
    ),
    (
        {"flag_key": "new-cart"},
        None,
        {"[Experiment] Flag Key": "new-cart"},
        {"$unset": {"[Experiment] new-cart": "-"}},
    ),
    ({"variant": "on"}, None, {"[Experiment] Variant": "on"}, None),
    (None, None, {}, None),
]


@pytest.mark.parametrize(("sent", "said", "kept", "user"), EXPOSURES)
def test_an_exposure_becomes_the_event_that_it_stands_for(
    sent: Any, said: Any, kept: Any, user: Any
) -> None:
    exposed = one(event_type="$exposure", event_properties=sent, user_properties=said)
    found = batch(body(one(event_type="Open"), exposed))
    assert [each.event_type for each in found.events] == ["Open", "[Experiment] Exposure"]
    assert msgspec.json.decode(found.events[1].event_properties) == kept
    assert found.events[1].user_properties == user
    again = event.decode(found.body)
    assert (again[1].event_type, again[1].user_properties) == ("[Experiment] Exposure", user)


def test_a_variant_is_held_to_what_a_property_may_be() -> None:
    """As the user's it is two objects deeper; and what nobody can save would stop the server."""
    most = DEPTH_MAX - 2

    def said(variant: object) -> bytes:
        props = {"flag_key": "f", "variant": variant}
        return body(one(event_type="$exposure", event_properties=props))

    kept = batch(said(nested(most))).events[0].user_properties
    assert kept == {"$set": {"[Experiment] f": nested(most)}}
    for variant in (nested(most + 1), 10**400):
        assert faults(said(variant)) == [(0, "event_properties", "invalid")]
    assert batch(said(10**25)).events[0].user_properties == {"$set": {"[Experiment] f": 1e25}}


def test_what_was_stored_before_it_was_refused_can_be_read() -> None:
    for props in (nested(DEPTH_MAX + 1), {"a": 10**25}):
        stored = json.dumps({"events": [one(user_properties=props), one()]}).encode()
        assert [found.user_properties for found in event.decode(stored)] == [props, None]
