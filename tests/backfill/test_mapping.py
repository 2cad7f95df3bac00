"""Mappings against sources: what compiles, what goes wrong before a row is sent, what goes to the dead letters."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.backfill.staging import events, letters, ndjson, run
from tests.backfill.staging import rows as staged_rows

from retrofill.backfill import columns, compiled, mapping_file
from retrofill.errors import InputError

ROW = {
    "user": "user-1",
    "at": 1700000000,
    "event": "Open",
    "props": {"a": 1, "Big Key": [1.5, None]},
}
BASE: dict[str, Any] = {"user_id": "user", "event_type": "event", "time": "at * 1000"}
LOST = {"insert_id", "$skip_user_properties_sync"}


def mapped(
    tmp_path: Path, rows: list[Any], event: dict[str, Any], **more: Any
) -> list[dict[str, Any]]:
    document = {"event": {**BASE, **event}, **more.pop("document", {})}
    run(tmp_path / "work", ndjson(tmp_path / "source.ndjson", rows), document, **more)
    return [
        {key: one for key, one in event.items() if key not in LOST}
        for event in events(tmp_path / "work")
    ]


def test_a_column_goes_on_as_the_source_wrote_it(tmp_path: Path) -> None:
    row = {
        **ROW,
        "n": 12345678901234567,
        "f": 0.1,
        "t": 'a"\\ü\n',
        "b": True,
        "l": [1, {"x": "y"}],
        "o": None,
    }
    event = {"event_properties": {name: name for name in "nftblo"}}
    (found,) = mapped(tmp_path, [row], event)
    assert found["event_properties"] == {name: row[name] for name in "nftbl"}


def test_names_reach_into_objects_with_dots(tmp_path: Path) -> None:
    event = {"event_properties": {"a": "props.a", "big": 'props."Big Key"', "sum": "props.a + 1"}}
    (found,) = mapped(tmp_path, [ROW], event)
    assert found["event_properties"] == {"a": 1, "big": [1.5, None], "sum": 2}


def test_json_operators_work_as_in_duckdb(tmp_path: Path) -> None:
    event = {
        "event_properties": {"a": "props->>'a'", "all": "list_transform([1, 2], lambda x: x + at)"}
    }
    (found,) = mapped(tmp_path, [ROW], event)
    assert found["event_properties"] == {"a": "1", "all": [1700000001, 1700000002]}


def test_columns_named_as_words_of_sql_need_no_quotes(tmp_path: Path) -> None:
    row = {**ROW, "order": 7, "group": "g", "desc": "d", "end": 3}
    event = {"event_properties": {"o": "order + 1", "g": "upper(group)", "d": "desc", "e": "end"}}
    (found,) = mapped(tmp_path, [row], event)
    assert found["event_properties"] == {"o": 8, "g": "G", "d": "d", "e": 3}


def test_a_column_is_found_whatever_its_case_if_no_other_is_alike(tmp_path: Path) -> None:
    (found,) = mapped(tmp_path, [{**ROW, "OrderID": "o-1"}], {"event_properties": {"o": "orderid"}})
    assert found["event_properties"] == {"o": "o-1"}


def test_the_whole_row_has_a_name(tmp_path: Path) -> None:
    event = {"event_properties": "without(source_row, 'user|at|event')"}
    (found,) = mapped(tmp_path, [ROW], event)
    assert found["event_properties"] == {"props": ROW["props"]}


def test_where_leaves_rows_out_that_are_no_history(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "event": None}, {**ROW, "event": "Close"}]
    found = mapped(tmp_path, rows, {}, document={"where": "event IS NOT NULL"})
    assert [event["event_type"] for event in found] == ["Open", "Close"]
    assert letters(tmp_path / "work") == []


SOLD: list[Any] = [
    {"user": "user-1", "at": 1700000000, "event": "Buy", "items": [{"sku": "a"}, {"sku": "b"}]},
    {"user": "user-2", "at": 1700000001, "event": "Look", "items": []},
    {"user": "user-3", "at": 1700000002, "event": "Buy", "items": [{"sku": "c"}]},
    {"user": "user-4", "at": 1700000003, "event": "Buy", "items": None},
]
PARTED: dict[str, Any] = {
    "each": "CAST(items AS JSON[])",
    "where": "event != 'Sell'",
    "event": {**BASE, "event_properties": {"sku": "each->>'$.sku'"}},
}


@pytest.mark.parametrize("source", ["s.ndjson", "s.parquet", "s.csv"])
def test_a_row_becomes_an_event_for_each_element_of_a_list(tmp_path: Path, source: str) -> None:
    path, document = tmp_path / source, PARTED
    if source == "s.parquet":
        pq.write_table(pa.Table.from_pylist(SOLD), path)
        typed = {**BASE, "event_properties": {"sku": "each.sku"}}
        document = {**PARTED, "each": "items", "event": typed}
    elif source == "s.csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, SOLD[0])
            table.writeheader()
            table.writerows({**row, "items": json.dumps(row["items"] or [])} for row in SOLD)
    else:
        ndjson(path, SOLD)
    run(tmp_path / "work", path, document)
    found = events(tmp_path / "work")
    assert [(one["user_id"], one["event_properties"]["sku"]) for one in found] == [
        ("user-1", "a"),
        ("user-1", "b"),
        ("user-3", "c"),
    ]
    assert len({one["insert_id"] for one in found}) == len(found)
    assert letters(tmp_path / "work") == []


def test_equal_parts_of_a_row_are_told_apart_and_two_columns_make_a_list(tmp_path: Path) -> None:
    row = {**ROW, "second": "Open"}
    more = {"document": {"each": "[event, second, event || '!']"}}
    found = mapped(tmp_path, [row], {"event_type": "each", "user_id": "user"}, **more)
    assert [one["event_type"] for one in found] == ["Open", "Open", "Open!"]
    assert len({one["insert_id"] for one in events(tmp_path / "work")}) == len(found)


def test_a_list_that_does_not_fit_refuses_its_row(tmp_path: Path) -> None:
    rows = [*SOLD, {**SOLD[0], "user": "user-5", "items": "no list"}]
    run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", rows), PARTED, bad_rows=0.5)
    assert len(events(tmp_path / "work")) == 3
    (letter,) = letters(tmp_path / "work")
    assert letter["line"] == 5
    assert letter["reason"] == 'each: CAST(items AS JSON[]) does not fit where items = "no list"'


def test_letters_of_a_row_that_is_very_many_events_show_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shows the row: all of 2,000 with 200 KB took more memory than there is for it."""
    items = [{"price": "none" if n else "x" * 200} for n in range(1000)]
    rows = [{**SOLD[0], "items": items[:count]} for count in (10, 1000)] + [
        {**SOLD[0], "items": [{"price": n, "more": "x" * 200} for n in range(2000)]}
    ]
    told = {
        **PARTED,
        "event": {**BASE, "price": "CAST((each->>'$.price') || left(user, 0) AS DOUBLE)"},
    }
    monkeypatch.setattr(compiled, "_PARTS_BYTES_MAX", 100_000)
    run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", rows), told, bad_rows=0.9)
    assert len(events(tmp_path / "work")) == 2000
    found = letters(tmp_path / "work")
    assert [one["line"] for one in found] == [1] * 10 + [2] * 1000
    assert json.loads(found[0]["row"]) == rows[0]
    assert found[0]["reason"].endswith('does not fit where user = "user-1"')
    assert found[-1]["row"] == json.dumps(rows[1], separators=(",", ":"))[:1000] + "…"
    assert found[-1]["reason"].endswith("does not fit where the row is so")


@pytest.mark.parametrize(
    ("each", "words"),
    [
        ("items", "The mapping's each cannot be: This is no list"),
        ("[nobody]", "no column 'nobody'"),
        ("[min(at) OVER ()]", "A window function cannot stand in `each`"),
    ],
)
def test_a_wrong_each_names_itself(tmp_path: Path, each: str, words: str) -> None:
    with pytest.raises(InputError) as told:
        mapped(tmp_path, SOLD, {}, document={"each": each})
    assert words in told.value.what
    assert told.value.where == f"each: {each}"


def test_a_window_looks_over_all_rows_that_are_history(tmp_path: Path) -> None:
    rows = [{**ROW, "s": "a", "at": at, "ok": at > 5} for at in (5, 20, 10)]
    event = {"session_id": "min(at) OVER (PARTITION BY s) * 1000"}
    found = mapped(tmp_path, rows, event, document={"where": "ok"})
    assert [event["session_id"] for event in found] == [10000, 10000]


def test_a_mapping_that_fits_is_asked_for_its_types_in_two_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = compiled.compile_mapping

    class Connection:
        def __init__(self, connection: Any) -> None:
            self.connection = connection

        def execute(self, sql: str, *more: Any) -> Any:
            asked.append(sql)
            return self.connection.execute(sql, *more)

    def counted(told: Any, columns: Any, connection: Any, **more: Any) -> Any:
        return real(told, columns, Connection(connection), **more)

    monkeypatch.setattr(compiled, "compile_mapping", counted)
    event = {
        "session_id": "min(at) OVER (PARTITION BY user) * 1000",
        "event_properties": {"bare": "at", "sum": "props.a + 1", "name": "upper(user)"},
    }
    assert len(mapped(tmp_path, [ROW], event)) == 1
    assert len([sql for sql in asked if sql.startswith("DESCRIBE")]) == 2


def test_texts_numbers_and_flags_are_made_what_the_wire_wants(tmp_path: Path) -> None:
    row = {**ROW, "v": 17, "q": "3", "p": "9.99", "skip": "true", "s": "2023-11-14T22:13:20Z"}
    event = {
        "os_version": "v",
        "quantity": "q",
        "price": "p",
        "session_id": "s",
        "$skip_user_properties_sync": "skip",
    }
    (found,) = mapped(tmp_path, [row], event, skip_user_properties_sync=False)
    assert found["os_version"] == "17"
    assert (found["quantity"], found["price"]) == (3, 9.99)
    assert found["session_id"] == 1700000000000


# event, words of the error
UNCOMPILED = [
    (
        {"platform": "plattform"},
        r"platform cannot be: The source has no column 'plattform'.*plattform",
    ),
    ({"platform": "upper(event"}, r"platform cannot be: syntax error"),
    ({"platform": "uper(event)"}, r"platform cannot be: .*uper does not exist.*uper\(event\)"),
    ({"event_properties": {"a": "event + 1 FROM x"}}, r"event_properties.a cannot be"),
    ({"event_properties": {"a": "(SELECT 1)"}}, r"A query inside"),
    ({"event_properties": {"a": "sum(at)"}}, r"event_properties.a cannot be"),
    ({"event_properties": {"a": "random()"}}, r"event_properties.a cannot be.*volatile"),
    ({"event_properties": {"a": "props.b"}}, r"no column 'props.b'.*props.a"),
    ({"time": "at > 5"}, r"A truth value is no time"),
    ({"platform": "?"}, r"does not say yet what platform is.*question mark"),
]


@pytest.mark.parametrize(("event", "words"), UNCOMPILED)
def test_a_wrong_mapping_fails_at_once_and_names_field_and_expression(
    tmp_path: Path, event: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        mapped(tmp_path, [ROW], event)
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)
    assert not (tmp_path / "work" / "stage").exists()


def test_a_wrong_where_names_itself(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="where cannot be"):
        mapped(tmp_path, [ROW], {}, document={"where": "evnt = 'x'"})


def test_single_rows_that_do_not_fit_are_dead_letters_with_field_expression_and_value(
    tmp_path: Path,
) -> None:
    rows = [{**ROW, "at": 1700000000 + at, "n": "1"} for at in range(99)]
    rows.insert(40, {**ROW, "at": "soon"})
    rows.insert(60, {**ROW, "n": "many"})
    rows.insert(61, {**ROW, "event": ""})
    rows.insert(62, {**ROW, "event": None})
    found = mapped(tmp_path, rows, {"quantity": "n"})
    assert len(found) == 99
    told = letters(tmp_path / "work")
    assert [
        (letter["line"], letter["file"].split("/")[-1])
        for letter in sorted(told, key=lambda x: x["line"])
    ] == [
        (41, "source.ndjson"),
        (61, "source.ndjson"),
        (62, "source.ndjson"),
        (63, "source.ndjson"),
    ]
    reasons = {letter["line"]: letter["reason"] for letter in told}
    assert reasons[41] == 'time: at * 1000 does not fit where at = "soon"'
    assert reasons[61] == 'quantity: n does not fit where n = "many"'
    assert reasons[62] == "event_type: it is empty"
    rows_told = {letter["line"]: letter["row"] for letter in told}
    assert rows_told[41].startswith('{"user":"user-1","at":"soon"')


# Of each an optimizer could work out a part once for all rows, outside of what refuses a single one.
TWICE = [
    {"event_properties": {"x": "CAST(n AS INT)"}},
    {"event_properties": {"x": "CAST(n AS INT) * CAST(n AS INT)"}},
    {"event_properties": {"x": {"y": "coalesce(CAST(n AS INT), CAST(n AS INT))"}}},
    {"quantity": "CAST(n AS INT) + CAST(n AS INT)"},
    {"insert_id": "to_json(CAST(n AS INT))"},
    {"event_properties": {"x": "100 / (n - 5)"}},
    {"revenue": "100 / (n - 5)"},
]


@pytest.mark.parametrize("event", TWICE)
def test_an_expression_that_fails_in_one_row_refuses_that_row_alone(
    tmp_path: Path, event: dict[str, Any]
) -> None:
    bad = 5 if "n - 5" in str(event) else "many"
    rows = [{**ROW, "n": at if at != 5 else bad} for at in range(40)]
    assert len(mapped(tmp_path, rows, event)) == 39
    (letter,) = letters(tmp_path / "work")
    assert letter["line"] == 6
    assert re.match(r"\w+(\.\w+)*: .* does not fit where n = ", letter["reason"])


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "nan"])
def test_a_row_that_holds_what_is_no_json_is_refused_alone(tmp_path: Path, text: str) -> None:
    rows = [json.dumps(ROW)] * 40
    rows[20] = json.dumps({**ROW, "at": "%"}).replace('"%"', text)
    rows[21] = json.dumps({**ROW, "at": "soon", "n": "%"}).replace('"%"', text)
    path = tmp_path / "source.ndjson"
    path.write_text("\n".join(rows))
    event = "event:\n  user_id: user\n  event_type: event\n  time: at * 1000\n"
    found = run(tmp_path / "work", path, event, bad_rows=0.1)
    assert found.events == 38
    told = {letter["line"]: letter for letter in letters(tmp_path / "work")}
    assert [told[line]["row"] for line in told] == rows[20:22]
    assert told[21]["reason"].startswith("time: at * 1000 does not fit where ")
    assert told[22]["reason"].startswith("time: at * 1000 does not fit where ")
    assert '"soon"' in told[22]["reason"]
    rows[22] = json.dumps({**ROW, "props": {"x": ["%"]}}).replace('"%"', text)
    path.write_text("\n".join(rows))
    run(tmp_path / "whole", path, event + "  event_properties: props\n", bad_rows=0.1)
    told = {letter["line"]: letter for letter in letters(tmp_path / "whole")}
    assert told[23]["reason"] == "event: JSON has no NaN or Infinity"


NESTED = """
source: {columns: {props.none: BIGINT, props.b.none: JSON, props.city: VARCHAR}}
event:
  user_id: user
  event_type: event
  time: at * 1000
  city: props.city
  event_properties: {a: props.a, twice: props.a * 2, c: props.b.c, b: props.b, n: props.none, m: props.b.none}
"""


@pytest.mark.parametrize(
    "form", ["text.ndjson", "object.ndjson", "text.csv", "text.parquet", "object.parquet"]
)
def test_a_column_inside_of_an_object_is_found_also_where_the_object_is_text(
    tmp_path: Path, form: str
) -> None:
    """As warehouses, CSV and Parquet have the properties of events."""
    inner = [{"a": at, "city": 'Köln "x"', "b": {"c": [at, 2]}} for at in range(40)]
    texts = [json.dumps(one) for one in inner]
    texts[30], texts[31] = "{no object", '{"a": "x", "b": null}'
    props = inner if form.startswith("object") else texts
    rows = [{**ROW, "props": one} for one in props]
    path = tmp_path / form
    if form.endswith("ndjson"):
        ndjson(path, rows)
    elif form.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w") as file:
            writer = csv.DictWriter(file, list(ROW))
            writer.writeheader()
            writer.writerows(rows)
    run(tmp_path / "work", path, NESTED, bad_rows=0.1)
    found = {one.get("event_properties", {}).get("a"): one for one in events(tmp_path / "work")}
    expected = {"a": 7, "twice": 14, "c": [7, 2], "b": {"c": [7, 2]}}
    assert (found[7]["event_properties"], found[7]["city"]) == (expected, 'Köln "x"')
    told = {letter["line"]: letter["reason"] for letter in letters(tmp_path / "work")}
    if form.startswith("object"):
        assert (len(found), told) == (40, {})
    else:  # a text that is no object has nothing inside, one that holds another type is refused
        assert len(found) == 39
        assert "event_properties" not in found[None]
        (reason,) = told.values()
        assert reason.startswith("event_properties.twice: props.a * 2 does not fit where")


def test_what_no_struct_of_parquet_holds_is_told_with_its_field(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "rows.parquet")
    document = {"event": {**BASE, "event_properties": {"a": "props.a", "x": "props.aa"}}}
    with pytest.raises(
        InputError, match=r"event_properties\.x cannot be: The source has no column"
    ):
        run(tmp_path / "work", tmp_path / "rows.parquet", document)


def test_a_star_is_no_expression(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="city cannot be: A star is no expression"):
        mapped(tmp_path, [ROW], {"city": "*"})


def test_a_name_that_stands_twice_in_a_mapping_is_told(tmp_path: Path) -> None:
    text = "event: {user_id: user, event_type: event, time: at}\n"
    (tmp_path / "m.yaml").write_text(text.replace("{", "{user_id: device, "))
    with pytest.raises(InputError, match=r"'user_id' stands there twice\s+in .*, line 1, column"):
        mapping_file.load(str(tmp_path / "m.yaml"))


def test_too_many_bad_rows_stop_everything_naming_the_worst(tmp_path: Path) -> None:
    rows = [ROW] * 90 + [{**ROW, "at": "soon"}] * 10
    with pytest.raises(InputError) as caught:
        mapped(tmp_path, rows, {})
    text = str(caught.value)
    assert "10 of 100 rows were refused (time 10)" in text
    assert 'at * 1000 does not fit where at = "soon"' in text
    assert "source.ndjson, row 91" in text
    assert "--bad-rows" in text
    assert not (tmp_path / "work" / "stage").exists()
    assert len(letters(tmp_path / "work")) == 10
    assert len(mapped(tmp_path, rows, {}, bad_rows=0.1)) == 90


# user_id, device_id, what is left of them; None: the row is refused. Source: contract, events 4.
IDS = [
    ("user-1", "device-1", {"user_id": "user-1", "device_id": "device-1"}),
    ("  user-1", None, {"user_id": "user-1"}),
    ("usr", "device-1", {"device_id": "device-1"}),
    ("user-1", "dev", {"user_id": "user-1"}),
    ("Anonymous", "device-1", {"device_id": "device-1"}),
    ("user-1", "00000000-0000-0000-0000-000000000000", {"user_id": "user-1"}),
    ("", "device-1", {"device_id": "device-1"}),
    (12345678, None, {"user_id": "12345678"}),
    ("null", "N/A", None),
    ("usr", None, None),
    (None, None, None),
    ("ü" * 5, None, {"user_id": "ü" * 5}),
    ("u" * 2000, "device-1", {"device_id": "device-1"}),
    ("u" * 2000, None, None),
]


@pytest.mark.parametrize(("user", "device", "expected"), IDS)
def test_an_unusable_id_beside_a_good_one_is_taken_away(
    tmp_path: Path, user: object, device: object, expected: dict[str, str] | None
) -> None:
    row = {**ROW, "user": user, "d": device, "x": "1"}
    found = mapped(tmp_path, [row], {"device_id": "d"}, bad_rows=1.0)
    if expected is None:
        assert found == []
        assert "no usable id" in letters(tmp_path / "work")[0]["reason"]
    else:
        (event,) = found
        assert {key: event[key] for key in ("user_id", "device_id") if key in event} == expected


def test_shorter_ids_are_good_where_the_destination_is_told_so(tmp_path: Path) -> None:
    (event,) = mapped(tmp_path, [{**ROW, "user": "u1"}], {}, id_length_min=1)
    assert event["user_id"] == "u1"


def test_what_the_core_mends_is_staged_mended_and_what_it_refuses_is_not(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(60):
        deep = {"d": deep}
    rows = [
        {**ROW, "props": {"long": "x" * 2000}},
        {**ROW, "props": {"a": 1}, "table": {"n": 10**30}},
        {**ROW, "props": deep},
        *[ROW] * 50,
    ]
    found = mapped(
        tmp_path, rows, {"event_properties": "props", "user_properties": "table", "idfv": "'kept'"}
    )
    assert found[0]["event_properties"] == {"long": "x" * 1024}
    assert found[0]["idfv"] == "kept"
    assert found[1]["user_properties"] == {"n": 1e30}
    assert len(found) == 52
    (letter,) = letters(tmp_path / "work")
    assert letter["line"] == 3
    assert letter["reason"].startswith("event_properties: ")
    assert json.loads(letter["row"]) == rows[2]


def test_what_a_server_would_rewrite_is_staged_rewritten(tmp_path: Path) -> None:
    """So that what is read back is what was sent."""
    rows = [{**ROW, "event": "$exposure", "x": {"flag_key": "f", "variant": "on"}, "p": {"a": "b"}}]
    told = {"event_properties": "x", "plan": "p"}
    (event,) = mapped(tmp_path, [*rows, {**ROW, "x": {}, "p": {"branch": "main"}}], told)[:1]
    assert event["event_type"] == "[Experiment] Exposure"
    assert event["user_properties"] == {"$set": {"[Experiment] f": "on"}}
    assert event["plan"] == {}
    kinds = {row["event_type"] for row in staged_rows(tmp_path / "work")}
    assert "[Experiment] Exposure" in kinds
    assert "$exposure" not in kinds


def test_csv_cells_are_typed_by_their_column_and_strays_stay_text(tmp_path: Path) -> None:
    lines = ["user,at,event,n,z,b,t"]
    lines += [f"user-{at % 7},17000000{at:02},Open,{at},0{at},true,x" for at in range(50)]
    lines += ["user-9,1700000099,Open,many,,maybe,"]
    source = tmp_path / "source.csv"
    source.write_text("\n".join(lines))
    event = {**BASE, "event_properties": {name: name for name in "nzbt"}}
    run(tmp_path / "work", source, {"event": event})
    found = [one.get("event_properties") for one in events(tmp_path / "work")]
    assert found[7] == {"n": 7, "z": "07", "b": True, "t": "x"}
    assert found[50] == {"n": "many", "b": "maybe"}


def test_csv_numbers_are_numbers(tmp_path: Path) -> None:
    source = tmp_path / "source.csv"
    source.write_text("user,at,event,n,f,b,z\nuser-1,1700000000,Open,5,1.50,TRUE,007\n")
    run(tmp_path / "work", source, {"event": {**BASE, "event_properties": {x: x for x in "nfbz"}}})
    assert events(tmp_path / "work")[0]["event_properties"] == {
        "n": 5,
        "f": 1.5,
        "b": True,
        "z": "007",
    }


def test_parquet_keeps_its_types_and_its_dead_letters_show_the_row(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user": ["user-1", "user-2", "u"],
            "at": pa.array([1700000000123456, 1700000001000000, 1], pa.timestamp("us")),
            "event": ["Open", "Open", "Open"],
            "s": [{"x": 1, "y": "a"}, None, None],
            "l": [[1, 2], [], None],
        }
    )
    pq.write_table(table, tmp_path / "source.parquet")
    event = {**BASE, "time": "at", "event_properties": {"x": "s.x", "s": "s", "l": "l"}}
    run(tmp_path / "work", tmp_path / "source.parquet", {"event": event}, bad_rows=0.5)
    found = events(tmp_path / "work")
    assert [one["time"] for one in found] == [1700000000123, 1700000001000]
    assert found[0]["event_properties"] == {"x": 1, "s": {"x": 1, "y": "a"}, "l": [1, 2]}
    (letter,) = letters(tmp_path / "work")
    assert (letter["line"], '"user":"u"' in letter["row"]) == (3, True)


def test_columns_of_parquet_may_be_named_as_ours(tmp_path: Path) -> None:
    ours = ("file", "line", "text", "filename", "unreadable", "bad", "body", "u0", "e1", "t2")
    table = pa.table(
        {
            "user": ["user-1", "user-2"], "at": [1, 2], "event": ["Open"] * 2,
            **{name: [f"{name} 1", f"{name} 2"] for name in ours},
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "source.parquet")
    event = {**BASE, "event_properties": {name: name for name in ours}}
    run(tmp_path / "work", tmp_path / "source.parquet", {"event": event})
    assert [
        row["line"] for row in sorted(staged_rows(tmp_path / "work"), key=lambda r: r["line"])
    ] == [1, 2]
    first, _ = events(tmp_path / "work")
    assert first["event_properties"] == {name: f"{name} 1" for name in ours}
    pq.write_table(
        table.rename_columns(["user", "at", "event", "file_row_number", *ours[1:]]),
        tmp_path / "b.parquet",
    )
    with pytest.raises(InputError, match="cannot be named file_row_number"):
        run(tmp_path / "other", tmp_path / "b.parquet", {"event": BASE})


def test_what_is_no_number_in_parquet_is_nothing(tmp_path: Path) -> None:
    columns = {"user": ["user-1"] * 3, "at": [1, 2, 3], "event": ["Open"] * 3}
    table = pa.table({**columns, "n": [1.5, float("nan"), float("inf")]})
    pq.write_table(table, tmp_path / "source.parquet")
    event = {**BASE, "price": "n", "event_properties": {"n": "n", "row": "source_row->'$.n'"}}
    run(tmp_path / "work", tmp_path / "source.parquet", {"event": event})
    found = [(one.get("price"), one.get("event_properties")) for one in events(tmp_path / "work")]
    assert found == [(1.5, {"n": 1.5, "row": 1.5}), (None, None), (None, None)]


def test_a_missing_mapping_and_broken_yaml_are_told(tmp_path: Path) -> None:
    from retrofill.backfill import mapping_file  # noqa: PLC0415  # one test's own

    with pytest.raises(InputError, match=r"no mapping 'nothing'.*amplitude-export"):
        mapping_file.load("nothing")
    broken = tmp_path / "broken.yaml"
    broken.write_text("event: [")
    with pytest.raises(InputError, match="no YAML"):
        mapping_file.load(str(broken))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False, width=32),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), JSON), min_size=1, max_size=8))
def test_any_json_values_arrive_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("json")
    rows = [{**ROW, "a": None, "b": None, "c": None, **value} for value in values]
    found = mapped(folder, rows, {"event_properties": {"a": "a", "b": "b", "c": "c"}})
    expected = [{key: one for key, one in value.items() if one is not None} for value in values]
    assert [event.get("event_properties", {}) for event in found] == expected


def test_of_objects_with_made_up_keys_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_PATHS_MAX", 6)
    row = '{"a":{"k1":1,"k2":"x","k3":null},"b":null,"c":[1]}'
    assert columns.json_types([row, "{", "[]", '{"a":7,"b":1.5,"d":true}']) == {
        ("a",): "JSON",
        ("b",): "DOUBLE",
        ("c",): "JSON",
        ("d",): "BOOLEAN",
        ("a", "k1"): "BIGINT",
        ("a", "k2"): "VARCHAR",
    }
