"""Rows that are cut before they are asked about become what the query over whole rows makes of them, byte for byte."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from tests.backfill.staging import letters, ndjson, rows, run
from tests.backfill.test_presets import EXPORTED, GA4, GROUP

from retrofill.backfill import compiled, intake, narrow
from retrofill.backfill.checkpoint import Checkpoint
from retrofill.backfill.compiled import Filter
from retrofill.backfill.manifest import Manifest

Json = dict[str, Any]

PROPERTIES: Json = {
    "page": "Über uns",
    "price": 12.5,
    "count": 3,
    "n": -7,
    "yes": True,
    "nothing": None,
    "tags": ["a", 1, {"b": []}],
    "deep": {"a": {"b": {"c": {}}}},
    "quoted": 'a "b" \\ c\n',
    "$current_url": "https://example.com/a?b=c",
}
MIXPANEL: Json = {
    "event": "$mp_web_page_view",
    "properties": {
        "time": 1702551600,
        "distinct_id": "user-77",
        "$insert_id": "c7a3e0",
        "$device_id": "18c67a-device",
        "$browser": "Chrome",
        "$browser_version": 120,
        "$os": "Mac OS X",
        "$city": "Zürich",
        "mp_country_code": "CH",
        "$latitude": 47,
        "$longitude": 8.5417,
        "mp_lib": "web",
        "$lib_version": "2.47.0",
        "$initial_referrer": "$direct",
        "mp_processing_time_ms": 1702551601000,
        **PROPERTIES,
    },
}
ALIAS: Json = {
    "event": "$create_alias",
    "properties": {
        "time": 1702551600,
        "distinct_id": "user-77",
        "alias": "18c2a4f1d3e-0b-4e5f-1fa4-18c2a",
    },
}
SEGMENT: Json = {
    "type": "track",
    "messageId": "022bb90c-bbac-11e4-8dfc-aa07a5b093db",
    "anonymousId": "507f191e810c19729de860ea",
    "userId": "97980cfea0067",
    "event": "Order Completed",
    "timestamp": "2015-02-23T22:28:55.111Z",
    "properties": {"revenue": 19, "quantity": 2, "currency": "USD", **PROPERTIES},
    "context": {
        "app": {"version": "2.0"},
        "device": {"id": "B5372DB0", "type": "ios", "model": "iPhone7,2", "advertisingId": "7A3C"},
        "ip": "8.8.8.8",
        "library": {"name": "analytics-ios", "version": "4.1"},
        "locale": "en-US",
        "os": {"name": "iPhone OS", "version": 8},
        "campaign": {"source": "Newsletter", "name": "TPS"},
        "traits": {"plan": "pro"},
        "location": {"country": "US", "latitude": 40.25, "longitude": -70},
    },
    "integrations": {"Actions Amplitude": {"session_id": 1424730000000}},
}
COMMIT: Json = {
    "user": "u-000001",
    "device": "d-000001",
    "event": "commit",
    "at": 1500000000,
    "id": "c-1",
    "repo": "r",
}
COMMIT |= {
    "path": "src/a.py",
    "files": 3,
    "insertions": 10,
    "deletions": 0,
    "merge": False,
    "utc_offset": "+0200",
}
GIT: Json = {
    "where": "event IS NOT NULL",
    "event": {
        "user_id": "user",
        "device_id": "device",
        "event_type": "event",
        "time": "at * 1000",
        "insert_id": "id",
        "quantity": "insertions",
        "event_properties": {
            "repo": "repo",
            "path": "path",
            "sizes": {"files": "files", "of": "deletions + 1"},
            "merge": "merge",
        },
        "user_properties": {"utc_offset": "utc_offset"},
        "groups": "CASE WHEN files > 2 THEN json_object('repo', repo) END",
    },
}
MADE: Json = {
    "event": {
        "user_id": "user",
        "event_type": "lower(event)",
        "time": "unix_ms(at)",
        "event_properties": "without(source_row, 'user|at|id')",
        "user_properties": {"last": "repo || path", "same": "path"},
        "plan": "CASE WHEN merge THEN json_object('branch', path) END",
    },
}
CASES: dict[str, tuple[str | Json, list[Json]]] = {
    "mixpanel": ("mixpanel", [MIXPANEL, MIXPANEL, MIXPANEL, ALIAS]),
    "segment": ("segment", [SEGMENT, SEGMENT, SEGMENT, GROUP]),
    "amplitude-export": (
        "amplitude-export",
        [{**EXPORTED, "groups": {}}, EXPORTED, {**EXPORTED, "device_model": None}],
    ),
    "ga4": ("ga4", [GA4]),
    "git": (GIT, [COMMIT]),
    "made ids": (MADE, [COMMIT]),
}
# Values that stand where a row has another one.
ODD = [
    *(
        "null",
        "true",
        "{}",
        "[]",
        '""',
        '" "',
        "-1",
        "0",
        "-0",
        "-0.0",
        "1.0",
        "1.50",
        "1e5",
        "1E-7",
        "0.0001",
        "0.00001",
    ),
    *(
        "123456789012.5",
        "0.1234567890123456",
        "12345678901234567890",
        "9" * 18,
        "1" * 19,
        '"anonymous"',
        '"ab"',
        '"$exposure"',
    ),
    *(
        '"a\\u0062c"',
        '"a\\/b"',
        '"\\u0000"',
        '"tab\\tq\\"uote"',
        '" leading"',
        '"2021-01-01"',
        '"12"',
        '"x' + "y" * 1100 + '"',
    ),
    *(
        '{"a": 1}',
        '{"a":{"a":1,"a":2}}',
        "{ }",
        "[1, 2]",
        '{"$set":{"a":1}}',
        '{"x":1.10}',
        '"é漢😀"',
        '{"a":' * 45 + "1" + "}" * 45,
    ),
    *("nul", '"open', "{", "\t", '"a\tb"', "1.", ".5", "01", '{"a":1,}'),
]
KEYS = [
    "time",
    "event",
    "userId",
    "$insert_id",
    "n",
    "price",
    "brand-new",
    "a\tb",
    "",
    "k" * 70,
    "k" * 64,
    "distinct_id",
    "é",
]


def changed(row: Json, draw: random.Random) -> str:
    """A row's text with some value, name or byte changed."""
    text = msgspec.json.encode(row).decode()
    for _ in range(draw.choice((1, 1, 2))):
        kind = draw.random()
        starts = [at for at in range(len(text) - 1) if text[at] == ":" and text[at - 1] == '"']
        if kind < 0.5 and starts:
            at = draw.choice(starts) + 1
            try:
                _value, size = json.JSONDecoder().raw_decode(text[at:])
            except ValueError:
                continue
            text = text[:at] + draw.choice(ODD) + text[at + size :]
        elif kind < 0.75:
            at = draw.choice([at for at in range(len(text)) if text[at] == "{"] or [0])
            comma = "" if text[at + 1 : at + 2] == "}" else ","
            text = f"{text[: at + 1]}{json.dumps(draw.choice(KEYS))}:{draw.choice(ODD)}{comma}{text[at + 1 :]}"
        elif kind < 0.9:
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice((" ", "\t", "\\", '"', "\x00", "}", ",")) + text[at:]
        else:
            at = draw.randrange(len(text))
            text = text[:at] + text[at + 1 :]
    return text.replace("\n", " ")


def source(
    path: Path, samples: Sequence[Json], *, odd: float, count: int = 300, seed: int = 1
) -> Path:
    draw = random.Random(seed)
    made: list[str | Json] = []
    for at in range(count):
        row = msgspec.json.decode(msgspec.json.encode(draw.choice(samples)))
        for name in ("$insert_id", "messageId", "uuid", "id", "event_timestamp"):
            for table in (row, row.get("properties") or {}):
                if name in table and name != "event_timestamp":
                    table[name] = f"id-{at}-{draw.randrange(3)}"
        made.append(changed(row, draw) if draw.random() < odd else row)
    return ndjson(path, made)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Sources of any size are cut. How many events came of it, and whether they were finished."""
    monkeypatch.setattr(intake, "SCANNED_BYTES", 0)
    found: list[tuple[int, bool]] = []
    events = narrow.Narrow.events

    def noted(self: narrow.Narrow, batches: Any) -> Iterator[tuple[pa.RecordBatch, bool]]:
        for batch, good in events(self, batches):
            found.append((batch.num_rows, good))
            yield batch, good

    monkeypatch.setattr(narrow.Narrow, "events", noted)
    return found


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the query sees whole rows."""
    monkeypatch.setattr(intake.Intake, "_narrow_way", lambda _self: None)


def alike(one: Path, other: Path) -> bool:
    refused = [sorted(map(str, letters(work))) for work in (one, other)]
    return rows(one) == rows(other) and refused[0] == refused[1]


def counted(found: Manifest) -> Manifest:
    """The same figures, in an order of their own where they are equal."""
    return msgspec.structs.replace(
        found, refused=dict(sorted(found.refused.items())), ids=dict(sorted(found.ids.items()))
    )


@pytest.mark.parametrize("odd", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_cut_rows_become_what_whole_rows_become(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passed: list[tuple[int, bool]],
    case: str,
    odd: float,
) -> None:
    document, samples = CASES[case]
    path = source(tmp_path / "s.ndjson", samples, odd=odd, seed=len(case))
    found = run(tmp_path / "cut", path, document, bad_rows=1.0)
    assert sum(count for count, _good in passed) > 300 * (0.9 - odd)  # it was taken
    whole(monkeypatch)
    meant = run(tmp_path / "whole", path, document, bad_rows=1.0)
    assert alike(tmp_path / "cut", tmp_path / "whole")
    assert counted(found) == counted(meant)
    if odd == 0.0 and case in {"mixpanel", "ga4"}:
        assert all(good for _count, good in passed)  # and none was looked at again


def test_rows_with_names_that_come_later_or_are_too_many_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[tuple[int, bool]]
) -> None:
    monkeypatch.setattr(narrow, "_KNOWN_MAX", 60)
    made = [
        {**COMMIT, "id": f"c-{at}", f"name-{at // 30}": at, "é": [at], "n" * (60 + at % 9): None}
        for at in range(3000)
    ]
    path = ndjson(tmp_path / "s.ndjson", made)
    run(tmp_path / "cut", path, MADE)
    assert 1000 < sum(count for count, _good in passed) < 3000
    whole(monkeypatch)
    run(tmp_path / "whole", path, MADE)
    assert alike(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("texts", [0.1, 1.0])
def test_rows_whose_objects_stand_as_text_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[tuple[int, bool]], texts: float
) -> None:
    draw = random.Random(3)
    made = []
    for at in range(200):
        row = {**SEGMENT, "messageId": f"m-{at}", "traits": None}
        for name in ("context", "integrations"):
            if draw.random() < texts:
                row[name] = msgspec.json.encode(row[name]).decode()
        made.append(row)
    path = ndjson(tmp_path / "s.ndjson", made)
    run(tmp_path / "cut", path, "segment", bad_rows=1.0)
    assert (sum(count for count, _good in passed) > 100) == (texts < 1)
    whole(monkeypatch)
    run(tmp_path / "whole", path, "segment", bad_rows=1.0)
    assert alike(tmp_path / "cut", tmp_path / "whole")


def test_a_row_of_which_one_event_is_bad_is_handed_on_with_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[tuple[int, bool]]
) -> None:
    """Also where its events stand in several parts of an answer."""
    document = {
        "each": "range(parts)",
        "event": {
            "user_id": "user",
            "time": "1700000000000 + each",
            "event_type": "CASE WHEN each != bad THEN 'e' || each END",
            "event_properties": {"n": "each", "same": "user"},
        },
    }
    sizes = [(3, -1), (30_000, 29_999), (2, 0), (20_000, -1), (0, -1), (4, 2), (1, -1)]
    made = [
        {"user": f"user-{at}", "parts": parts, "bad": bad} for at, (parts, bad) in enumerate(sizes)
    ]
    path = ndjson(tmp_path / "s.ndjson", made)
    run(tmp_path / "cut", path, document, bad_rows=1.0)
    assert sum(count for count, _good in passed) == 3 + 20_000 + 1
    whole(monkeypatch)
    run(tmp_path / "whole", path, document, bad_rows=1.0)
    assert alike(tmp_path / "cut", tmp_path / "whole")


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("again", [True, False], ids=["the same way", "without compiled code"])
def test_a_stage_that_was_killed_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passed: list[tuple[int, bool]],
    *,
    again: bool,
) -> None:
    """Rows that were put aside before are asked about, whatever way is taken after."""
    monkeypatch.setattr(intake, "STEP_BYTES", 1)
    path = source(tmp_path / "s.ndjson", [SEGMENT, GROUP], odd=0.05, count=4000)
    save, left = Checkpoint.save, [1]

    def saved(self: Checkpoint) -> None:
        save(self)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", saved)
        with pytest.raises(Killed):
            run(tmp_path / "cut", path, "segment", bad_rows=1.0)
    before = sum(count for count, _good in passed)
    assert before > 500
    if not again:
        whole(monkeypatch)
    run(tmp_path / "cut", path, "segment", bad_rows=1.0)
    assert (sum(count for count, _good in passed) > before) == again
    whole(monkeypatch)
    run(tmp_path / "whole", path, "segment", bad_rows=1.0)
    assert alike(tmp_path / "cut", tmp_path / "whole")


def number(draw: random.Random) -> str:
    digits = "".join(draw.choices("0123456789", k=draw.choice((1, 1, 2, 3, 8, 15, 16, 18, 19))))
    behind = "".join(draw.choices("0012345", k=draw.choice((1, 2, 3, 5, 9, 14, 15, 17))))
    ends = draw.choice(("", "", "." + behind, "." + behind, ".", "e5", "E-3", "e+12", ".5e3"))
    return draw.choice(("", "", "-")) + draw.choice((digits, "0", digits.lstrip("0") or "1")) + ends


def test_what_is_cut_is_what_duckdb_finds(passed: list[tuple[int, bool]]) -> None:
    """Of every row that can be cut, and most that need not be left to DuckDB can."""
    assert passed == []
    draw = random.Random(4)
    odd = [*ODD, *(number(draw) for _ in range(1000))]
    texts = []
    for value in odd:
        other, name = draw.choice(odd[:60]), draw.choice(KEYS)
        texts += [
            f'{{"n":{value},"o":{{"n":1,"keep":{value},"drop":{other}}}}}\n',
            f'{{"a":{value}, "o":{{{json.dumps(name)}:{value}}}, "n":"x"}}\n',
            f'{{"o":{{"keep":{{"deep":{value}}}, "n" : {value}}},"n":null}}\r\n',
        ]
    texts = [text for text in texts if "\n" not in text[:-1]]
    with duckdb.connect() as connection:
        for macro in compiled.MACROS:
            connection.execute(macro)

        def keeps(one: Filter, names: Sequence[str]) -> list[bool]:
            asked = "SELECT list_transform(?, lambda k: regexp_full_match(k, ?))"
            row = connection.execute(asked, [list(names), one.pattern]).fetchone()
            assert row is not None
            return [bool(found) == one.matching for found in row[0]]

        filters = [Filter(("o",), "drop|.*n.*", matching=False)]
        cutter = narrow.Cutter(
            [("n",), ("o", "n"), ("o", "keep", "deep")], [0, 0, 0], filters, keeps
        )
        sizes = [len(text.encode()) for text in texts]
        data = "".join(texts).encode()
        good, found, heap = cutter.cut(memoryview(data), np.cumsum(sizes))
        shown = [*("/n", "/o/n", "/o/keep/deep")]
        asked = ", ".join(
            f"nullif(CAST(json_extract(t, '{path}') AS VARCHAR), 'null')" for path in shown
        )
        kept = "CAST(without(json_extract(t, '/o'), 'drop|.*n.*') AS VARCHAR)"
        assert 0.2 < good.mean() < 0.9
        for row in np.flatnonzero(good).tolist():
            meant = connection.execute(
                f"SELECT {asked}, {kept} FROM (SELECT ? AS t)", [texts[row]]
            ).fetchone()
            memory = [data, data, data, bytes(heap)]
            cut = [
                None if size < 0 else memory[at][start : start + size].decode()
                for at, (start, size) in enumerate(
                    zip(found[:4, row].tolist(), found[4:, row].tolist(), strict=True)
                )
            ]
            assert cut == list(meant or ()), texts[row]
