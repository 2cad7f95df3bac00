"""Dead letters show the row as it was, also of events that were refused when the row was gone."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.backfill.staging import letters, run, table

from retrofill.backfill import original, stage
from retrofill.backfill.journal import Dead, Journal
from retrofill.errors import InputError

MAPPING = """
event: {user_id: user, event_type: event, time: at, insert_id: id, event_properties: props}
"""
# Beyond 64 bits of a double: the core refuses it. Twice one insert_id with other content: the sorting refuses it.
ENDLESS = '{"n": 1e999}'
Row = dict[str, Any]


def history() -> list[Row]:
    rows = [
        {"user": f"user-{n % 3}", "event": "Open", "at": 1700000000000 + n, "id": f"i-{n}"}
        for n in range(60)
    ]
    for row in rows:
        row["props"] = '{"a": 1}'
    rows[20]["props"] = ENDLESS
    rows[41] |= {"id": "i-38", "event": "Other, with a comma"}
    return rows


def lines(rows: list[Row]) -> list[str]:
    texts = (json.dumps(row | {"props": "%"}) for row in rows)
    return [text.replace('"%"', str(row["props"])) for text, row in zip(texts, rows, strict=True)]


def ndjson(folder: Path, rows: list[Row]) -> tuple[Path, list[str]]:
    path = folder / "rows.ndjson.gz"
    path.write_bytes(gzip.compress("\n".join(lines(rows)).encode()))
    return path, lines(rows)


def array(folder: Path, rows: list[Row]) -> tuple[Path, list[str]]:
    path = folder / "rows.json"
    path.write_text("[\n  " + ",\n  ".join(lines(rows)) + "\n]")
    return path, lines(rows)


def zipped(folder: Path, rows: list[Row]) -> tuple[Path, list[str]]:
    path = folder / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.ndjson", "\n".join(lines(rows)))
    return path, lines(rows)


def cells(folder: Path, rows: list[Row]) -> tuple[Path, list[str]]:
    path, text = folder / "rows.csv", io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    path.write_text(text.getvalue())
    return path, text.getvalue().splitlines()


def parquet(folder: Path, rows: list[Row]) -> tuple[Path, list[str]]:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=16)
    return path, [json.dumps(row, separators=(",", ":")) for row in rows]


FORMS = [ndjson, array, zipped, cells, parquet]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_refused_after_the_mapping_shows_its_row(
    tmp_path: Path, form: Callable[[Path, list[Row]], tuple[Path, list[str]]]
) -> None:
    path, texts = form(tmp_path, history())
    found = run(tmp_path / "work", path, MAPPING, bad_rows=0.1)
    assert found.duplicates.different == 1
    told = sorted(letters(tmp_path / "work"), key=lambda letter: letter["line"])
    assert [letter["reason"].split(":")[0] for letter in told] == ["event_properties", "insert_id"]
    first = 1 + (form is cells)
    assert [letter["line"] for letter in told] == [20 + first, 41 + first]
    assert [letter["row"] for letter in told] == [texts[letter["line"] - 1] for letter in told]


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_source_with_too_many_bad_ones_are_shown_too(
    tmp_path: Path, form: Callable[[Path, list[Row]], tuple[Path, list[str]]]
) -> None:
    path, texts = form(tmp_path, history())
    with pytest.raises(InputError, match="rows were refused"):
        run(tmp_path / "work", path, MAPPING, bad_rows=0.0)
    (letter,) = letters(tmp_path / "work")
    assert letter["row"] == texts[letter["line"] - 1]


@pytest.mark.parametrize("form", FORMS)
def test_what_the_destination_refuses_shows_its_row(
    tmp_path: Path, form: Callable[[Path, list[Row]], tuple[Path, list[str]]]
) -> None:
    path, texts = form(tmp_path, history())
    work = tmp_path / "work"
    found = run(work, path, MAPPING, bad_rows=0.1)
    told: dict[int, str] = {}
    journal = Journal(work, threaded=False)
    for number, one in enumerate(found.sets):
        rows = table(work / "stage" / one.path)
        for row in rows.slice(0, 1).to_pylist():
            letter = {"file": found.files[0].name, "line": row["line"], "reason": "no"}
            line = json.dumps(letter | {"row": row["json"]}, separators=(",", ":"))
            journal.died(Dead(number, 0, "no", line))
            told[row["line"]] = texts[row["line"] - 1]
    journal.kick()
    journal.close()
    assert len(told) >= 1
    for _ in range(2):  # again it changes nothing
        original.sent(work, [str(path)], None, None)
        shown = [
            json.loads(line)
            for line in (work / "dead-letters-send.ndjson").read_text().splitlines()
        ]
        assert {letter["line"]: letter["row"] for letter in shown} == told


def test_a_row_of_what_python_has_no_value_for_is_shown(tmp_path: Path) -> None:
    """As pandas writes times by default: nanoseconds."""
    rows = pa.table(
        {
            "user": ["user-1"] * 40,
            "event": ["Open"] * 40,
            "at": [1700000000000 + n for n in range(40)],
            "seen": pa.array([1577836800123456789] * 40, pa.timestamp("ns")),
            "late": pa.array([[10**18]] * 40, pa.list_(pa.timestamp("us"))),
            "id": [f"i-{n}" for n in range(40)],
            "props": ['{"a": 1}'] * 20 + [ENDLESS] + ['{"a": 1}'] * 19,
        }
    )
    path = tmp_path / "rows.parquet"
    pq.write_table(rows, path, row_group_size=16)
    assert run(tmp_path / "work", path, MAPPING, bad_rows=0.1).events == 39
    (letter,) = letters(tmp_path / "work")
    shown = json.loads(letter["row"])
    assert (letter["line"], shown["id"], shown["props"]) == (21, "i-20", ENDLESS)
    assert shown["seen"] == "2020-01-01 00:00:00.123456789"
    assert shown["late"] == ["33658-09-27 01:46:40"]


def test_a_stop_between_the_table_and_the_file_is_mended_by_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    journal = Journal(tmp_path / "work", threaded=False)
    journal.died(Dead(0, 0, "no", '{"row":"event"}'))
    journal.kick()
    file = tmp_path / "work" / "dead-letters-send.ndjson"
    before = file.read_text()
    journal.reword({(0, 0): '{"row":"as it was"}'})
    assert file.read_text() == '{"row":"as it was"}\n'
    journal.close()
    file.write_text(before)  # as if the power had gone before the file was written
    Journal(tmp_path / "work", threaded=False).close()
    assert file.read_text() == '{"row":"as it was"}\n'


def test_a_source_that_cannot_be_read_again_keeps_the_event(tmp_path: Path) -> None:
    path, _ = ndjson(tmp_path, history())
    work = tmp_path / "work"
    run(work, path, MAPPING, bad_rows=0.1)
    before = (work / stage.DEAD_LETTERS).read_bytes()
    original.staged(
        work / stage.DEAD_LETTERS, work / stage.DEAD_LETTERS, [], {str(path): {21}}, None
    )
    assert (work / stage.DEAD_LETTERS).read_bytes() == before
    original.sent(work, ["s3://bucket/key"], None, None)
    assert not (work / "journal.db").exists()
