"""The straight way is the query's, only shorter: whatever the rows, the stage is the same."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from tests.backfill.staging import letters, rows, run

from retrofill.backfill import intake, stage, straight
from retrofill.backfill.manifest import Manifest
from retrofill.errors import InputError

SAME = {
    name: name
    for name in (
        *("user_id", "device_id", "event_type", "time", "insert_id", "platform", "session_id"),
        *("event_properties", "user_properties", "groups", "group_properties", "plan"),
    )
}
RENAMED = {
    **SAME,
    "event_type": "name",
    "insert_id": "key",
    "city": "platform",
    "app_version": "key",
}
# What passes as it stands: nothing that the core looks into by itself.
PASSED = {name: name for name in SAME if name not in {"groups", "plan"}}
UNNAMED = {name: source for name, source in SAME.items() if name != "insert_id"}
TYPES = {name: "JSON" for name in SAME if name.endswith("properties") or name in {"groups", "plan"}}
DECLARED = {**TYPES, "session_id": "BIGINT", "time": "BIGINT", "name": "VARCHAR", "key": "VARCHAR"}

# JSON of a field's values: what is good, and what is not quite.
GOOD: dict[str, list[str]] = {
    "user_id": ['"anna-1@example.example"', '"berta-2"', '"zoë-maria"', "null"],
    "device_id": [f'"0000000{n}-0000-0000-0000-000000000000"' for n in range(1, 4)],
    "event_type": ['"Open"', '"Close, then: open"'],
    "name": ['"Open"', '"Close"'],
    "time": ["1700000000000", "1700000000001", "1700000000002"],
    "insert_id": [f'"id-{n}"' for n in range(40)] + ["null"],
    "key": [f'"id-{n}"' for n in range(40)],
    "platform": ['"Web"', '""', "null", '"like \\"Gecko\\", and {more}"'],
    "session_id": ["-1", "1700000000000", "null"],
    "event_properties": ['{"a":1,"b":[1,2,{"c":null}]}', "{}", "null", '{"say":"a, b: c\\nd"}'],
    "user_properties": ['{"$set":{"plan":"pro"}}', '{"$add":{"n":1.5}}'],
    "groups": ['{"team":"red"}', '{"team":["red","blue"]}', "{}"],
    "group_properties": ['{"size":3}'],
    "plan": ['{"branch":"main"}'],
}
ODD: dict[str, list[str]] = {
    "user_id": [
        "12345",
        '"ab"',
        '"none"',
        '" anna-1"',
        '""',
        "true",
        '"x\\u0041nna"',
        f'"{"x" * 1500}"',
    ],
    "device_id": [
        "null",
        '"00000000-0000-0000-0000-000000000000"',
        '""',
        '"NULL"',
        '"device\\/1"',
        "77777",
    ],
    "event_type": ['""', "null", "7", '"$exposure"', f'"{"é" * 600}"'],
    "name": ["null", "7"],
    "time": ['"1700000000000"', "1.5", "-1", "null", "1e12", "99999999999999999999", '"noon"'],
    "insert_id": ['""', "17", '"q\\"uote"', '"back\\\\slash"'],
    "key": ['""', "17"],
    "platform": ["3", "true", '{"a":1}', f'"{"p" * 1100}"'],
    "session_id": ['"12"', "1.5", "[]", "99999999999999999999"],
    "event_properties": [
        '{ "a" : [1, 2] , "b":3}',
        "[]",
        '"text"',
        '{"n":1e400}',
        '{"n":1000.0, "m":0.5}',
    ],
    "user_properties": ['{"n":12345678901234567890123}', "7", "{ }", '{"a":{"b":{"c":[{}]}}}'],
    "groups": ['{"team":[]}', '{"team":{"a":1}}', '{"team":7}', '{"team":""}'],
    "group_properties": [f'{{"a":{"[" * 60}{"]" * 60}}}', "{\t}"],
    "plan": ['"text"', "null", '{"colour":"red"}'],
}
BROKEN = [
    "{",
    '{"user_id":"anna-1"',
    "[]",
    "17",
    '{"time":1}x',
    '{"a":"\t"}',
    '{"a":tru}',
    "   ",
    "\ufeff{}",
]


@pytest.fixture(autouse=True)
def _as_large_sources_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for rows that pass as they stand, however few there are."""
    monkeypatch.setattr(intake, "SCANNED_BYTES", 0)


@pytest.fixture
def way_used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of events that went straight."""
    taken: list[int] = []
    events = straight.Straight.events

    def counted(self: straight.Straight, records: Any) -> Iterator[tuple[pa.RecordBatch, bool]]:
        for batch, good in events(self, records):
            taken.append(batch.num_rows)
            yield batch, good

    monkeypatch.setattr(straight.Straight, "events", counted)
    return taken


def source(
    path: Path,
    names: set[str],
    *,
    odd: float,
    seed: int,
    array: bool = False,
    good: dict[str, list[str]] = GOOD,
) -> Path:
    draw = random.Random(seed)
    texts = []
    for _ in range(400):
        if not array and draw.random() < odd:
            texts.append(draw.choice(BROKEN))
            continue
        values = {
            name: draw.choice(ODD[name] if draw.random() < odd else good[name])
            for name in draw.sample(sorted(names), len(names))
            if draw.random() < (0.9 if name.endswith("properties") else 0.99)
        }
        colon, comma = draw.choice([(":", ","), (":", ","), (": ", ", ")])
        texts.append("{" + comma.join(f'"{name}"{colon}{v}' for name, v in values.items()) + "}")
    text = "[" + ",\n".join(texts) + "]" if array else "".join(f"{text}\n" for text in texts)
    path.write_text(text, encoding="utf-8")
    return path


def said(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, whatever the order of members, white space and the way to write a number."""
    return [{**row, "json": msgspec.json.decode(row["json"]), "bytes": None} for row in rows]


def both(
    tmp_path: Path,
    path: Path,
    event: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    exact: bool = True,
) -> tuple[Manifest, Manifest]:
    """Stage by the straight way and by the query alone; rows and dead letters must be equal."""
    document = {"event": event, "source": {"columns": DECLARED}}
    found = run(tmp_path / "straight", path, document, bad_rows=1.0)
    monkeypatch.setattr(intake, "straight", lambda *_: None)
    monkeypatch.setattr(intake.Intake, "_narrow_way", lambda _: None)
    meant = run(tmp_path / "query", path, document, bad_rows=1.0)
    staged = [rows(tmp_path / one) for one in ("straight", "query")]
    assert staged[0] == staged[1] if exact else said(staged[0]) == said(staged[1])
    refused = [sorted(map(str, letters(tmp_path / one))) for one in ("straight", "query")]
    assert refused[0] == refused[1]
    return found, meant


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
@pytest.mark.parametrize("event", [SAME, RENAMED, UNNAMED], ids=["same", "renamed", "unnamed"])
@pytest.mark.parametrize("odd", [0.0, 0.01, 0.2])
def test_the_straight_way_stages_what_the_query_stages(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way_used: list[int],
    event: dict[str, str],
    odd: float,
    *,
    array: bool,
) -> None:
    names = {*event.values()}
    path = source(
        tmp_path / f"s.{'json' if array else 'ndjson'}", names, odd=odd, seed=5, array=array
    )
    found, meant = both(tmp_path, path, event, monkeypatch)
    assert sum(way_used) > (250 if odd < 0.1 else 20)  # it was taken
    assert found.events > 20
    differing = {
        name for name in Manifest.__struct_fields__ if getattr(found, name) != getattr(meant, name)
    }
    assert differing <= {"refused"}  # the same counts, in another order where they are equal
    assert found.refused == meant.refused


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
@pytest.mark.parametrize("odd", [0.0, 0.01, 0.05])
def test_rows_that_hold_what_the_mapping_names_pass_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: float, *, array: bool
) -> None:
    good = {name: [one for one in GOOD[name] if one not in {"null", "{}"}] for name in PASSED}
    good["event_properties"] += ['{"n": 1.50, "m":1e+2}', '{"n":-0.0}']
    kind = "json" if array else "ndjson"
    path = source(tmp_path / f"s.{kind}", {*PASSED}, odd=odd, seed=7, array=array, good=good)
    found, meant = both(tmp_path, path, PASSED, monkeypatch, exact=False)
    lines = {line[1:] for line in path.read_text(encoding="utf-8").split("\n")}
    texts = [row["json"] for row in rows(tmp_path / "straight")]
    passed = sum(text.partition('"$skip_user_properties_sync":true,')[2] in lines for text in texts)
    assert (
        passed == 0 if array else passed > 0.4 * len(texts)
    )  # the others have "1e+2" or something odd
    assert (found.events, found.refused) == (meant.events, meant.refused)
    assert found.duplicates == meant.duplicates


NOT_AS_THEY_STAND = {
    "a null": ('"platform":"Web"', '"platform":null'),
    "nothing in an object": ('{"a":1}', "{}"),
    "nothing but white space": ('{"a":1}', "{ }"),
    "no object": ('{"a":1}', "[1]"),
    "more than the mapping names": ('"platform":"Web"', '"platform":"Web","colour":"red"'),
    "no insert_id": ('"insert_id":"id-1",', ""),
    "an empty insert_id": ('"id-1"', '""'),
    "another type": ('"Web"', "7"),
    "a forbidden id": ("anna-1", "none"),
    "no time": ('"time":1700000000000,', ""),
    "a time too late": ("1700000000000", "999999999999999999"),
    "a number beyond 64 bits": ('{"a":1}', '{"a":12345678901234567890123}'),
    "a number that nothing holds": ('{"a":1}', '{"a":1e400}'),
    "too deep": ('{"a":1}', f'{{"a":{"[" * 60}{"]" * 60}}}'),
    "a text too long": ('"Web"', f'"{"w" * 1100}"'),
    "white space before it": ('{"device_id"', ' {"device_id"'),
    "an escape that the query writes otherwise": ("Open", "\\u004fpen"),
    "an exposure": ("Open", "$exposure"),
}


@pytest.mark.parametrize("name", NOT_AS_THEY_STAND)
def test_a_row_with_something_odd_does_not_pass_as_it_stands_and_its_neighbours_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    good = (
        '{"device_id":"device-1","user_id":"anna-1","event_properties":{"a":1},"event_type":"Open",'
        '"insert_id":"id-1","time":1700000000000, "platform":"Web"}'
    )
    odd = good.replace(*NOT_AS_THEY_STAND[name])
    assert odd != good
    others = [good.replace("id-1", f"id-{number}") for number in (2, 3)]
    path = tmp_path / "s.ndjson"
    path.write_text("".join(f"{text}\n" for text in (others[0], odd, others[1])))
    names = ("device_id", "user_id", "event_type", "time", "insert_id", "platform")
    event = {one: one for one in (*names, "event_properties")}
    both(tmp_path, path, event, monkeypatch, exact=False)
    staged = "\n".join(row["json"] for row in rows(tmp_path / "straight"))
    assert [text[1:] in staged for text in (others[0], odd, others[1])] == [True, False, True]


TWICE = {
    "a text": ('"platform":"Web"', '"platform":"TV","platform":"Web"'),
    "a number": ('"time":1700000000000', '"time":1, "time" : 1700000000000'),
    "an object": ('{"a":1}', '{"b":"x"}, "event_properties":{"a":1}'),
    "while another is missing": (
        '"user_id":"anna-1","event_properties":{"a":1}',
        '"device_id":"device-1","event_properties":{"a":1}',
    ),
    "beside an escaped quote": ('"Web"', '"a \\"b\\" c","platform":"Web"'),
    "beside backslashes": ('"Web"', '"b\\\\","platform":"a\\\\"'),
    "beside both": ('{"a":1},', '{"a":"\\\\\\""},"platform":"\\\\",'),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("other", ["", "{}\n"], ids=["alone", "beside an odd row"])
def test_no_event_has_a_key_twice(tmp_path: Path, name: str, other: str) -> None:
    """Who reads it might take the other one than we did: another person, another insert_id."""
    good = (
        '{"device_id":"device-1","user_id":"anna-1","event_properties":{"a":1},"event_type":"Open",'
        '"insert_id":"id-1","time":1700000000000, "platform":"Web"}'
    )
    odd = good.replace(*TWICE[name])
    assert odd != good
    path = tmp_path / "s.ndjson"
    others = [good.replace("id-1", f"id-{number}") for number in (2, 3)]
    path.write_text(other + "".join(f"{text}\n" for text in (others[0], odd, others[1])))
    run(
        tmp_path / "work",
        path,
        {"event": {one: one for one in PASSED if f'"{one}"' in good}},
        bad_rows=1.0,
    )
    texts = [row["json"] for row in rows(tmp_path / "work")]
    assert len(texts) == 3
    assert sum(text.partition(',"device_id"')[2] in others[0] + others[1] for text in texts) == 2
    for text in texts:
        pairs: list[tuple[str, object]] = json.loads(text, object_pairs_hook=list)
        assert len({key for key, _value in pairs}) == len(pairs)
        held = {"device_id": "device-1", "time": 1700000000000, "event_type": "Open"}
        assert held.items() <= dict(pairs).items()


def test_what_is_said_again_in_another_order_is_the_same(tmp_path: Path) -> None:
    row = {"device_id": "device-1", "event_type": "Open", "time": 1, "insert_id": "id-1"}
    turned = dict(reversed(row.items()))
    path = tmp_path / "s.ndjson"
    texts = [msgspec.json.encode(one).decode() for one in (row, turned, {**row, "time": 2})]
    path.write_text("".join(f"{text}\n" for text in [*texts, texts[1].replace(":", ": ")]))
    found = run(tmp_path / "work", path, {"event": {name: name for name in row}})
    assert (found.duplicates.same, found.duplicates.different) == (2, 1)


def test_a_mapping_with_an_expression_or_a_condition_goes_by_the_query(
    tmp_path: Path, way_used: list[int]
) -> None:
    path = source(tmp_path / "s.ndjson", {*SAME}, odd=0.0, seed=1)
    columns = {"columns": DECLARED}
    run(tmp_path / "a", path, {"event": {**SAME, "platform": "upper(platform)"}, "source": columns})
    run(tmp_path / "b", path, {"event": SAME, "where": "event_type = 'Open'", "source": columns})
    run(
        tmp_path / "c",
        path,
        {"event": {**SAME, "event_properties": {"a": "plan"}}, "source": columns},
    )
    row = msgspec.json.encode({'d"d': "device-1", "e": "Open", "t": 1}).decode()
    (tmp_path / "d.ndjson").write_text(f"{row}\n", encoding="utf-8")
    odd = {"device_id": '"d""d"', "event_type": "e", "time": "t"}
    assert run(tmp_path / "d", tmp_path / "d.ndjson", {"event": odd}).devices == 1
    assert way_used == []


def test_duckdb_is_asked_only_where_a_row_or_an_expression_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def connect(scratch: Path) -> Any:
        opened.append(scratch)
        return intake.connect(scratch)

    monkeypatch.setattr(stage, "connect", connect)
    names = {name: name for name in ("user_id", "event_type", "time")}
    row = '{"user_id":"anna-1","event_type":"Open","time":1}\n'
    path = tmp_path / "s.ndjson"
    path.write_text(row * 3, encoding="utf-8")
    assert run(tmp_path / "a", path, {"event": names}).rows == 3
    assert opened == []
    path.write_text(row * 3 + row.replace(":1}", ': "2" }'), encoding="utf-8")
    assert run(tmp_path / "b", path, {"event": names}).rows == 4  # the last one is no plain row
    assert len(opened) == 1
    path.write_text(row.replace(":1}", ":true}"), encoding="utf-8")
    with pytest.raises(InputError, match="A truth value is no time"):
        run(tmp_path / "c", path, {"event": names})
    assert len(opened) == 2


NUMBERS = [
    *(
        "19.90",
        "1.0",
        "-0",
        "-0.0",
        "0.10",
        "1e3",
        "1E-7",
        "1.50e2",
        "-12.5",
        "0.30000000000000004",
    ),
    *("123456789012345678901234567890.0", "0.00001", "1e400", "18446744073709551616", "100.00"),
    "12345678901234567.5",
    f"{'9' * 40}.5",
]


def test_a_number_is_written_the_same_by_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way_used: list[int]
) -> None:
    """The insert_id that is made of an event is a hash of its text, so a second run must write the same."""
    seeded = random.Random(3)
    drawn = [repr(seeded.uniform(-1, 1) * 10 ** seeded.randint(-6, 18)) for _ in range(200)]
    numbers = [*NUMBERS, *drawn, *(f"{float(one):.2f}" for one in drawn)]
    shapes = ['{"n":%s}', '{"n": [%s]}', '{"n":[1,%s ,2]}']
    path = tmp_path / "s.ndjson"
    path.write_text(
        "".join(
            '{"device_id":"device-1","event_type":"Open","time":1,"event_properties":'
            f"{seeded.choice(shapes) % number}}}\n"
            for number in numbers
        )
    )
    names = ("device_id", "event_type", "time", "event_properties")
    both(tmp_path, path, {name: name for name in names}, monkeypatch)
    assert sum(way_used) > 100  # as Python writes them they go straight
    assert '"event_properties":{"n":19.9}' in "".join(
        one["json"] for one in rows(tmp_path / "straight")
    )


def test_what_looks_like_a_number_in_a_text_goes_straight(
    tmp_path: Path, way_used: list[int]
) -> None:
    texts = (
        "bf637293-0b09-4ed6-bb1e-1c2f0266a1d8",
        f"{'0' * 35}e",
        "2026-01-02T03:04:05Z",
        "at 10.",
    )
    path = tmp_path / "s.ndjson"
    path.write_text(
        "".join(f'{{"device_id":"{one} x","event_type":"Open","time":1}}\n' for one in texts)
    )
    run(tmp_path / "work", path, {"event": {n: n for n in ("device_id", "event_type", "time")}})
    assert sum(way_used) == len(texts)


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_two_objects_in_a_line_are_no_two_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way_used: list[int], end: str
) -> None:
    def row(number: int) -> str:
        return f'{{"device_id":"device-{number}","event_type":"Open","time":{number}}}'

    path = tmp_path / "s.ndjson"
    lines = [*map(row, range(1, 5)), row(5) + row(6), "  ", *map(row, range(7, 12))]
    path.write_bytes("".join(f"{line}{end}" for line in lines).encode())
    both(tmp_path, path, {name: name for name in ("device_id", "event_type", "time")}, monkeypatch)
    assert sum(way_used) == 9


@pytest.mark.parametrize("event", [SAME, PASSED], ids=["encoded", "as it stands"])
def test_what_a_row_becomes_does_not_depend_on_its_neighbours(
    tmp_path: Path, event: dict[str, str]
) -> None:
    row = {name: msgspec.Raw(GOOD[name][0].encode()) for name in event}
    text = msgspec.json.encode(row).decode()
    document = {"event": event, "source": {"columns": DECLARED}}
    staged = []
    none = text.replace('{"a":1,"b":[1,2,{"c":null}]}', "[]")
    escaped = text.replace("anna", "\\u0061nna")
    for number, other in enumerate(["", "{", escaped, text + " ", none]):
        path = tmp_path / f"{number}.ndjson"
        path.write_text(f"{text}\n{other}\n", encoding="utf-8")
        run(tmp_path / f"w{number}", path, document, bad_rows=1.0)
        staged.append(rows(tmp_path / f"w{number}")[0]["json"])
    assert len(set(staged)) == 1


@pytest.mark.parametrize("problem", [InputError("The query broke off"), KeyboardInterrupt()])
def test_what_goes_wrong_while_rows_are_read_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    path = source(tmp_path / "s.ndjson", {*SAME}, odd=0.0, seed=1)

    def broken(*_: object) -> None:
        raise problem

    monkeypatch.setattr(straight.Straight, "_make", broken)
    with pytest.raises(type(problem)):
        run(tmp_path / "work", path, {"event": SAME, "source": {"columns": DECLARED}})
