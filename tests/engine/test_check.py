"""`check` finds what was planted, names it, and finds nothing in a directory that only lived."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from tests.engine.test_undo import Server, _request
from tests.stateful.test_engine import FakeClock, SealerInside

from retrofill.cli import main
from retrofill.core import dedupe, person
from retrofill.engine.check import Report, check
from retrofill.engine.deletion import Deletions
from retrofill.engine.repair import repair
from retrofill.errors import BusyError, InputError
from retrofill.hot import keys
from retrofill.lake import Lake, arrow, parquet
from retrofill.lake.files import Files

START = [
    {"device_id": "phone-1", "event_type": "open", "insert_id": "a", "user_properties": {"plan": "free"}},
    {"device_id": "phone-2", "user_id": "ann-111", "event_type": "open", "insert_id": "b", "platform": "iOS"},
    {"device_id": "phone-1", "user_id": "ann-111", "event_type": "buy", "insert_id": "c"},
]  # fmt: skip


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def server(tmp_path: Path, clock: FakeClock) -> Server:
    server = Server(tmp_path / "data", clock)
    server.send([{**event, "time": clock.ms} for event in START])
    return server


def _check(server: Server) -> Report:
    return check(server.folder, server.clock, sealer=SealerInside)


def _found(report: Report) -> list[tuple[str, str]]:
    assert report.count == len(report.differences)
    return [(one.where.split(" ")[0], one.field) for one in report.differences]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_directory_that_only_lived_has_no_differences(
    seed: int, tmp_path: Path, clock: FakeClock
) -> None:
    seeded = random.Random(seed)
    server = Server(tmp_path / "data", clock, seeded.choice(["none", "amplitude"]))
    for number in range(5, 160, 5):
        clock.ms += seeded.choice([10, 1000, 3_600_000])
        wire, path = _request(seeded, number, clock.ms, name=seeded.choice(["", "", "old-shop"]))
        server.send(wire, path)
        chance = seeded.random()
        if chance < 0.1:
            server.run(server.engine.seal())
        elif chance < 0.15:
            server.crash()
        elif chance < 0.2:
            server.run(server.engine.undo(1, "old-shop"))
        elif chance < 0.3 and seed % 2:
            _delete(server, seeded)
    server.close()
    report = _check(server)
    assert report.differences == []
    assert report.refolded
    assert report.rows > 20


def _delete(server: Server, seeded: random.Random) -> None:
    """Delete somebody with everyone merged into them, as the deletion API does."""
    with server.engine.lake.snapshot() as snapshot:
        people = snapshot.cursor.execute(
            "SELECT DISTINCT amplitude_id FROM lake.events WHERE amplitude_id > 0 ORDER BY 1"
        ).fetchall()
        merges = snapshot.merges(1)
    if people:
        one = seeded.choice(people)[0]
        one = merges.get(one, one)
        gone = [one, *(was for was, survivor in merges.items() if survivor == one)]
        server.run(server.engine.forget(1, gone))
        _note(server, one, erased="2000-01-01")


def _note(server: Server, one: int, *, erased: str = "") -> None:
    """Keep a request to delete somebody, as the deletion API does."""
    path = server.folder / "deletions.sqlite"
    with closing(Deletions(path, server.clock, days=lambda _: 0)) as deletions:
        deletions._write(
            "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(1, "2000-01-01", one, "2000-01-01", "", None, False, erased)],
        )


@pytest.mark.parametrize("name", ["checkpoint.sqlite", "imports.sqlite"])
def test_a_file_that_is_gone_is_named_and_made_again(name: str, server: Server) -> None:
    server.close()
    (server.folder / name).unlink()
    report = _check(server)
    assert _found(report) == [(name, "file")]
    assert (report.refolded, report.lost) == (False, False)
    done = repair(server.folder, server.clock, sealer=SealerInside)
    assert (done.left.count, done.left.refolded) == (0, True)


def test_a_changed_person_is_named(server: Server) -> None:
    server.close()
    with closing(sqlite3.connect(server.folder / "checkpoint.sqlite")) as db, db:
        ((one, blob),) = (
            db.execute(
                "SELECT amplitude_id, person FROM people WHERE person LIKE '%free%' LIMIT 1"
            ).fetchall()
            or db.execute("SELECT amplitude_id, person FROM people LIMIT 1").fetchall()
        )
        who = person.decode(blob)
        changed = msgspec.structs.replace(
            who, properties={**who.properties, "plan": "paid"}, first_seen_ms=5
        )
        db.execute(
            "UPDATE people SET person = ? WHERE amplitude_id = ?", (person.encode(changed), one)
        )
    report = _check(server)
    assert _found(report) == [("person", "first_seen"), ("person", "properties.plan")]
    assert report.differences[1].where == f"person {one}"
    assert (report.differences[1].stored, report.differences[1].refolded) == ('"paid"', '"free"')
    assert report.differences[1].line().startswith(f"project 1 · person {one} · properties.plan")


def _lake(server: Server, change: Callable[[Lake], None]) -> None:
    server.close()
    with closing(Lake.open(server.folder / "lake")) as lake:
        change(lake)


def test_a_changed_snapshot_is_named(server: Server) -> None:
    def change(lake: Lake) -> None:
        (file,) = lake.event_files()
        rows = pa.concat_tables(parquet.read(file.path, file.deleted))
        at = rows["insert_id"].to_pylist().index("c")  # it shows what others have said
        for name, value in (("platform", "Android"), ("user_properties", '{"plan":"x"}')):
            values = rows[name].to_pylist()
            values[at] = value
            column = pa.array(values, pa.string()).dictionary_encode()
            field = arrow.FILE.field(name)
            rows = rows.set_column(
                rows.schema.get_field_index(name), field, column.cast(field.type)
            )
        new = lake.new_file(file.first, file.last)
        parquet.write(new, [rows], Files())
        assert lake.swap([file], new)

    _lake(server, change)
    report = _check(server)
    assert [(one.where, one.field) for one in report.differences] == [
        ("row 1:2", "user_properties.plan"),
        ("row 1:2", "platform"),
    ]
    assert (report.differences[1].stored, report.differences[1].refolded) == ('"Android"', '"iOS"')


def test_a_lost_merge_is_named(server: Server) -> None:
    def change(lake: Lake) -> None:
        with closing(lake._db.cursor()) as cursor:
            cursor.execute("DELETE FROM lake.merges")

    _lake(server, change)
    report = _check(server)
    assert [(one.where, one.field, one.stored) for one in report.differences] == [
        ("row 1:2", "merge", "nothing")
    ]


def test_a_lost_device_is_named(server: Server) -> None:
    server.close()
    with closing(sqlite3.connect(server.folder / "checkpoint.sqlite")) as db, db:
        db.execute("DELETE FROM devices WHERE id = 'phone-2'")
    assert [(one.where, one.field) for one in _check(server).differences] == [
        ("device phone-2", "amplitude_id")
    ]


def test_a_lost_key_is_named(server: Server) -> None:
    server.close()
    (path,) = (server.folder / "keys").glob("keys-*.bin")
    file = keys.KeyFile(path)
    table = np.stack([file.high, file.low], axis=1)
    keys.write(path.parent, file.first, file.last, table[1:].copy(), file.blocks()[1:])
    assert _found(_check(server)) == [("row", "dedupe key")]


def plant_key(folder: Path, insert_id: str, *, at: int = 0, block: int = 1) -> bytes:
    """Put a key of (project 1, phone-7, insert_id) into a key file."""
    key = dedupe.keys(1, ["phone-7"], [insert_id])
    path = sorted((folder / "keys").glob("keys-*.bin"))[at]
    file = keys.KeyFile(path)
    table = np.concatenate([dedupe.table_of(key), np.stack([file.high, file.low], axis=1)])
    blocks = np.insert(file.blocks(), 0, block)
    marks = [np.insert(file.values >> bit & 1 != 0, 0, values=False) for bit in (31, 30)]
    last = max(file.last, block)
    written = keys.write(
        *(path.parent, file.first, last, table, blocks), forever=marks[0], imported=marks[1]
    )
    if written != path:
        path.unlink()
    return key


@pytest.mark.parametrize("scope", ["project", "project+device"])
def test_keys_that_no_row_holds_are_named_by_day(
    scope: str, server: Server, clock: FakeClock
) -> None:
    first = {"device_id": "phone-3", "event_type": "open", "time": clock.ms}
    server.send([{**first, "event_id": 5}])  # its key is that of device, event_id and time
    origin = {"source_name": "retrofill", "source_version": "old-shop"}
    server.send([{**first, "insert_id": "i", "ingestion_metadata": origin}])
    server.send([{**first, "insert_id": "i"}])  # displaced: it holds no key
    server.close()
    assert _check(server).count == 0
    settings = b'{"limits":{"dedupe_scope":"%s"}}' % scope.encode()
    with closing(sqlite3.connect(server.folder / "hot.sqlite")) as db, db:
        db.execute("UPDATE projects SET settings = ?", (settings,))
    assert _check(server).count == 0  # keys of either scope are those of rows
    # Ten, and one in a block that has no row.
    planted = [plant_key(server.folder, f"planted-{number}") for number in range(10)]
    plant_key(server.folder, "later", block=9)
    report = _check(server)
    assert report.count == 11
    beside, known = report.differences
    day = datetime.fromtimestamp(clock.ms / 1000, UTC).date().isoformat()
    assert (known.project, known.where, known.field) == (1, f"dedupe keys of {day}", "row")
    stored = msgspec.json.decode(known.stored)
    assert stored["keys"] == 10
    assert len(stored["such_as"]) == 3
    assert set(stored["such_as"]) <= {f"{key.hex()} of block 1" for key in planted}
    assert (beside.project, beside.where) == (0, f"dedupe keys of {day}")
    assert known.refolded == "nothing"


def test_a_key_that_a_row_of_another_block_holds_is_of_no_row(server: Server) -> None:
    server.send([{"device_id": "phone-7", "event_type": "open", "insert_id": "x"}])
    server.close()
    plant_key(server.folder, "x")
    assert _check(server).count == 1


def test_keys_without_a_row_may_be_those_of_deleted_people(server: Server) -> None:
    server.send([{"device_id": "phone-7", "event_type": "open", "insert_id": "x"}])
    server.run(server.engine.seal())
    one = server.engine.state.fresh - 1
    _note(server, one, erased="2026-01-01")
    server.run(server.engine.forget(1, [one]))
    server.close()
    report = _check(server)
    assert report.differences == []
    assert report.unknown == 1


def test_a_flipped_byte_of_a_block_is_named(server: Server) -> None:
    server.run(server.engine.abandon())
    server.loop.close()
    with closing(sqlite3.connect(server.folder / "hot.sqlite")) as db, db:
        ((blob,),) = db.execute("SELECT blob FROM blocks WHERE number = 1").fetchall()
        flipped = bytearray(blob)
        flipped[len(blob) // 2] ^= 1
        db.execute("UPDATE blocks SET blob = ? WHERE number = 1", (bytes(flipped),))
    report = _check(server)
    assert [(one.where, one.field) for one in report.differences] == [("block 1", "checksum")]
    assert not report.refolded


@pytest.mark.parametrize("harm", ["truncated", "flipped", "gone"])
def test_a_damaged_lake_file_is_named(harm: str, server: Server) -> None:
    server.close()
    (path,) = (server.folder / "lake").rglob("*.parquet")
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # in the first page
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if harm == "truncated" else data)
    report = _check(server)
    assert [(one.where, one.field) for one in report.differences] == [
        (f"lake file {path.name}", "bytes")
    ]
    assert not report.refolded


def test_a_damaged_key_file_is_named_and_does_not_stop_it(server: Server) -> None:
    server.close()
    (path,) = (server.folder / "keys").glob("keys-*.bin")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    report = _check(server)
    assert _found(report) == [("key", "checksum")]
    assert report.refolded
    assert _check(server).count == 0  # the start has made it again


def test_people_due_for_deletion_are_no_difference(server: Server) -> None:
    """A crash between their state and their rows."""
    server.run(server.engine.seal())
    _note(server, 1)
    with server.engine.lake.snapshot() as snapshot:
        people = snapshot.cursor.execute("SELECT DISTINCT amplitude_id FROM lake.events").fetchall()
        pairs = snapshot.cursor.execute("SELECT * FROM lake.merges").fetchall()
    deleting = server.engine.lake.delete
    server.engine.lake.delete = lambda *_: 0  # type: ignore[method-assign] # never came to it
    server.run(server.engine.forget(1, [one for (one,) in people]))
    server.engine.lake.delete = deleting  # type: ignore[method-assign]
    server.close()
    assert pairs
    report = _check(server)
    assert report.differences == []
    assert report.refolded


def test_a_directory_in_use_and_one_that_is_not_there_are_refused(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BusyError):
        _check(server)
    with pytest.raises(InputError):
        check(tmp_path / "nowhere", server.clock)
    for folder in (server.folder, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as ended:
            main.app(["check", "--data", str(folder)])
        assert ended.value.code == 2
    assert not (tmp_path / "nowhere").exists()
    assert "Another process is using this data directory" in capsys.readouterr().err
    server.close()
