"""A look at the bytes of a row finds what reading the row would find, and passes nothing that is odd."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.backfill.staging import rows, run

from retrofill.backfill import hashes, intake, native, places, scan
from retrofill.core import glance
from retrofill.limits import DEPTH_MAX, STRING_CHARS_MAX, TIME_MS_MAX

KINDS = {
    "user_id": "text",
    "device_id": "text",
    "event_type": "text",
    "time": "millis",
    "insert_id": "text",
    "platform": "text",
    "session_id": "integer",
    "event_properties": "object",
}
NEEDED = {"event_type", "time", "insert_id"}
SCANNER = scan.Scanner(KINDS, needed=NEEDED, id_length_min=5)
ROW = (
    '{"user_id":"zoë-maria@example.example","device_id":"device-1","event_type":"Open","time":1700000000000,'
    '"insert_id":"id-1","platform":"like \\"Gecko\\"","session_id":-1,'
    '"event_properties":{"a":[1,-2.50,{"b":null},[]],"c":{},"d":"x\\ny","e":true}}\n'
)
PARTS = [
    *(
        " ",
        "\t",
        "\r",
        '"',
        "\\",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "-",
        ".",
        "0",
        "1",
        "e",
        "E",
        "\x00",
    ),
    *('""', "{}", "[]", '\\"', "\\\\", "\\u0041", "\\/", "null", "true", "false", "nul", "tru"),
    *("9" * 18, "9" * 19, "1e5", "00", "-0", "0.5", ".5", "5.", "é", "\x7f", "a" * 1100, "none"),
    *('"a":1,', '"time":', '"device_id":"device-2",', '"user_id":"",', "$exposure", "x" * 65),
    *("00000000-0000-0000-0000-000000000000", "[" * 39, "]" * 39, '{"a":' * 40, "}" * 40, "}\n{"),
]


class OddError(Exception):
    """What a row must not have."""


def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
    return {"pairs": found}  # keys may stand twice inside of properties


def number(text: str) -> float:
    if re.fullmatch(r"-?\d{1,18}(\.\d{1,18})?", text) is None:
        raise OddError(text)
    return float(text)


def whole(text: str) -> int:
    number(text)
    return int(text)


def constant(text: str) -> None:
    raise OddError(text)


def strings(line: str) -> list[str]:
    """The strings of some JSON as they are written."""
    return re.findall(r'"((?:[^"\\]|\\.)*)"', line)


def deep(value: Any) -> int:
    """How many objects and arrays there are."""
    if isinstance(value, dict):
        return 1 + sum(deep(inner) for _key, inner in value["pairs"])
    return 1 + sum(map(deep, value)) if isinstance(value, list) else 0


def meant(line: str) -> dict[str, Any] | None:
    """Return what a row that may pass holds, read in the usual way; None for one that must not."""
    if not (line.startswith("{") and line.endswith("}\n") and line.count("\n") == 1):
        return None
    try:
        found = json.loads(
            line,
            object_pairs_hook=pairs,
            parse_int=whole,
            parse_float=number,
            parse_constant=constant,
        )["pairs"]
    except (ValueError, OddError):
        return None
    row = dict(found)
    written = strings(line)
    fine = (
        len(row) == len(found)
        and NEEDED <= row.keys() <= KINDS.keys()
        and not any(f'"{key}"' not in line for key in row)
        and all(len(one.encode()) <= STRING_CHARS_MAX for one in written)
        and not any(re.search(r"\\[^\"\\bfnrt]", one.replace("\\\\", "")) for one in written)
        and "\\u" not in "".join(written).replace("\\\\", "")
        and all(value_fits(KINDS[key], value) for key, value in row.items())
        and ids_good(row)
        and re.search(r":[ \t\r]*\{[ \t\r}]", own_objects(line)) is None
    )
    return row if fine else None


def own_objects(line: str) -> str:
    """The row less what stands inside of its objects."""
    out, depth, inside, escaped = [], 0, False, False
    for character in line[1:]:
        if depth == 0 or (depth == 1 and out[-1] == "{"):
            out.append(character)
        if inside:
            inside = escaped or character != '"'
            escaped = character == "\\" and not escaped
            continue
        inside = character == '"'
        depth += (character in "{[") - (character in "}]")
    return "".join(out)


def value_fits(kind: str, value: Any) -> bool:
    if kind == "object":
        return isinstance(value, dict) and value["pairs"] != [] and deep(value) <= DEPTH_MAX
    return type(value) is (str if kind == "text" else int)


def ids_good(row: dict[str, Any]) -> bool:
    texts = [
        row[name] for name in ("user_id", "device_id", "insert_id", "event_type") if name in row
    ]
    users = [row[name] for name in ("user_id", "device_id") if name in row]
    return (
        bool(users)
        and all(texts)
        and not any(set(text) & set('"\\\b\f\n\r\t') for text in texts)
        and all(len(one) >= 5 and one > "!" and one not in glance.FORBIDDEN_IDS for one in users)
        and all(len(one.encode()) <= 64 for one in (*users, row["insert_id"]))
        and len(row["event_type"].encode()) <= STRING_CHARS_MAX // 4
        and row["event_type"].lower()
        not in {"$exposure", *(one.lower() for one in glance.FORBIDDEN_IDS)}
        and all(one.lower() != "$exposure" for one in users)
        and 0 <= row["time"] <= TIME_MS_MAX
    )


def looked(*lines: str) -> scan.Found:
    encoded = [line.encode() for line in lines]
    ends = np.cumsum([len(line) for line in encoded], dtype=np.int64)
    return SCANNER.look(memoryview(b"".join(encoded)), ends)


@st.composite
def changed(draw: st.DrawFn) -> str:
    """A good row with up to three changes."""
    row = ROW
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(row) - 1))
        until = at + draw(st.sampled_from([0, 0, 1, 2, 5, 20]))
        part = draw(st.sampled_from([*PARTS, "", ""]) | st.text(string.printable[:95], max_size=4))
        row = row[:at] + part + row[until:]
    return row if row.endswith("\n") else row + "\n"


@given(changed())
@example(ROW)
@example(ROW.replace(",", " ,\t").replace(":", " :\r "))
@example(ROW.replace("maria", "m\\u0061ria"))
@example(ROW.replace('"user_id"', '"user\\u005fid"'))
@example(ROW.replace('"device_id":"device-1",', ""))
@example(ROW.replace('"platform"', '"time":1,"platform"'))
@example(ROW.replace('"c":{}', '"c":{' + '"c":{' * 60 + "}" * 61))
@example(ROW.replace("[]", "[" * 38 + "]" * 38))
@example(ROW.replace("1700000000000", "-1"))
@example(ROW.replace("1700000000000", "99999999999999999"))
@example(ROW.replace("-1", "1.0"))
@example(ROW.replace("-1", "-"))
@example(ROW.replace("-1", "01"))
@example(ROW.replace("Open", "$EXPOSURE"))
@example(ROW.replace("id-1", "é" * 33))
@example(ROW.replace("device-1", "é" * 4))
@example(ROW.replace("}}\n", "},}\n"))
@example(ROW.replace("}}\n", "}} }\n"))
@example(ROW.replace("true", "true,"))
@example("{}\n")
@example("{\n")
@example("}\n")
@example("\n")
def test_a_look_finds_what_reading_finds(line: str) -> None:
    row = meant(line) if line.count("\n") == 1 else None
    if line.count("\n") != 1:
        return  # two rows, if any
    found = looked(ROW, line, ROW)
    assert found.good.tolist() == [True, row is not None, True]
    if row is None:
        return
    texts, none = pa.array([ROW, line, ROW]), pa.nulls(3, pa.string())
    said = {
        name: places.spelled(name, none, texts, found.places, found.sizes) for name in places.NAMES
    }
    assert {name: one[1].as_py() for name, one in said.items()} == {
        name: row.get(name) for name in said
    }
    assert found.time_ms[1] == row["time"]
    for mine, name, seed in (
        (found.device, "device_id", hashes.DEVICE),
        (found.user, "user_id", hashes.USER),
        (found.insert, "insert_id", hashes.INSERT),
    ):
        assert mine.tolist() == hashes.of(said[name], seed=seed).tolist()
    assert found.kind[0] == found.kind[2] > 0
    assert (found.kind[0] == found.kind[1]) == (row["event_type"] == "Open")


@pytest.mark.parametrize("size", [0, 1])
def test_ids_that_stand_too_far_behind_have_no_place(size: int) -> None:
    head = '{"event_properties":{"a":["' + '","'.join(["x" * 500] * 121)
    middle = '"]},"device_id":"device-1","event_type":"Open","time":1,"insert_id":"'
    more = "x" * (places.PLACE_MAX - len(head + middle) + size)
    found = looked(f'{head}{more}{middle}id-1"}}\n')
    assert found.good.tolist() == [not size]


def test_places_move_with_what_is_put_in_front() -> None:
    texts = pa.array([ROW, ROW.replace('"device_id":"device-1",', "")])
    found = looked(*texts.to_pylist())
    longer = pa.array(["," + "x" * 300 + text for text in texts.to_pylist()])
    where = (places.moved(found.places, found.sizes, 301), found.sizes)
    own = pa.nulls(2, pa.string())
    assert places.spelled("device_id", own, longer, *where).to_pylist() == ["device-1", None]
    part = longer.slice(1)
    where = (where[0][1:], where[1][1:])
    assert places.spelled("insert_id", own[1:], part, *where).to_pylist() == ["id-1"]


def test_what_has_no_place_is_in_its_own_column() -> None:
    found, texts = looked(ROW), pa.array([ROW, "{}"])
    where = [np.append(one, 0) for one in (found.places, found.sizes)]
    own = pa.array([None, "a user"])
    assert places.spelled("user_id", own, texts, *where).to_pylist() == [
        "zoë-maria@example.example",
        "a user",
    ]
    assert places.spelled("user_id", own, texts, *map(np.zeros_like, where)) is own


@pytest.mark.parametrize("limit", ["SCANNED_BYTES", "SCANNED_BYTES_MIN"])
def test_a_large_source_is_looked_at_and_a_small_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    path = tmp_path / "s.ndjson"
    path.write_text(ROW + ROW.replace("id-1", "id-2"), encoding="utf-8")
    document = {"event": {name: name for name in KINDS}}
    found = [run(tmp_path / "small", path, document)]
    size = path.stat().st_size
    monkeypatch.setattr(intake, limit, size)
    monkeypatch.setattr(native, "there", lambda _name: limit == "SCANNED_BYTES_MIN")
    found.append(run(tmp_path / "large", path, document))
    assert found[0].events == found[1].events == 2
    small, large = ([row["json"] for row in rows(tmp_path / one)] for one in ("small", "large"))
    assert [ROW[1:-1] in text for text in small + large] == [False, False, True, False]
    assert list(map(json.loads, small)) == list(map(json.loads, large))
