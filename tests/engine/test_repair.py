"""Each kind of damage is found, mended and gone; what was damaged is set aside, and the events it held are listed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from tests.engine.test_check import START, plant_key
from tests.engine.test_undo import Server, _request
from tests.stateful.test_engine import FakeClock, SealerInside

from retrofill.cli import main
from retrofill.config import Settings
from retrofill.core import block as block_codec
from retrofill.core import person
from retrofill.engine import repair as repairing
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.check import Report, check
from retrofill.engine.ingest import Engine
from retrofill.engine.repair import Repaired, repair
from retrofill.errors import BusyError, CorruptError
from retrofill.hot import keys
from retrofill.hot import sqlite as sqlite_blocks
from retrofill.hot.directory import Directory
from retrofill.lake import Lake
from retrofill.lake.arrow import FILE

Harm = Callable[[Path], None]

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = Server(tmp_path / "data", FakeClock())
    server.send([{**event, "time": server.clock.ms} for event in START])
    server.run(server.engine.seal())
    server.send([{**START[1], "insert_id": "d", "user_properties": {"$add": {"seen": 1}}}])
    return server


def _repair(server: Server) -> Repaired:
    return repair(server.folder, server.clock, sealer=SealerInside)


def _open(server: Server) -> None:
    server.loop = asyncio.new_event_loop()
    server.open()


def _check(server: Server) -> Report:
    return check(server.folder, server.clock, sealer=SealerInside)


def _sql(name: str, *statements: str) -> Harm:
    def harm(folder: Path) -> None:
        with closing(sqlite3.connect(folder / name)) as db, db:
            for statement in statements:
                db.execute(statement)

    return harm


def _person(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "checkpoint.sqlite")) as db, db:
        one, blob = db.execute("SELECT amplitude_id, person FROM people LIMIT 1").fetchone()
        wrong = msgspec.structs.replace(
            person.decode(blob), properties={"plan": "x"}, first_seen_ms=5
        )
        db.execute(
            "UPDATE people SET person = ? WHERE amplitude_id = ?", (person.encode(wrong), one)
        )


def _in_lake(statement: str) -> Harm:
    def harm(folder: Path) -> None:
        with closing(Lake.open(folder / "lake")) as lake, closing(lake._db.cursor()) as cursor:
            cursor.execute(statement)

    return harm


def _lost_key(folder: Path) -> None:
    path = min((folder / "keys").glob("keys-*.bin"))
    file = keys.KeyFile(path)
    table = np.stack([file.high, file.low], axis=1)
    keys.write(path.parent, file.first, file.last, table[1:].copy(), file.blocks()[1:])


def _flipped_key_file(folder: Path) -> None:
    path = min((folder / "keys").glob("keys-*.bin"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")


STATE: dict[str, Harm] = {
    "a person": _person,
    "an unreadable person": _sql("checkpoint.sqlite", "UPDATE people SET person = x'00'"),
    "a lost person": _sql("checkpoint.sqlite", "DELETE FROM people"),
    "a lost device": _sql("checkpoint.sqlite", "DELETE FROM devices WHERE id = 'phone-2'"),
    "a device too many": _sql(
        "checkpoint.sqlite", "INSERT INTO devices VALUES (1, 'phone-9', 100000000001)"
    ),
    "a user too many": _sql(
        "checkpoint.sqlite", "INSERT INTO users VALUES (1, 'eve-333', 100000000001)"
    ),
    "a group too many": _sql(
        "checkpoint.sqlite", """INSERT INTO groups VALUES (1, 'org', 'acme', '{"size":1}')"""
    ),
    "an unreadable group": _sql(
        "checkpoint.sqlite", "INSERT INTO groups VALUES (1, 'org', 'evil', x'7b22ff')"
    ),
    "an alias too many": _sql(
        "checkpoint.sqlite", "INSERT INTO aliases VALUES (1, 'ann-111', 'bob-222')"
    ),
    "a snapshot": _in_lake("UPDATE lake.events SET platform = 'Android' WHERE insert_id = 'c'"),
    "a verdict": _in_lake("UPDATE lake.events SET flags = 4 WHERE insert_id = 'b'"),
    "whose a row is": _in_lake("UPDATE lake.events SET amplitude_id = 7 WHERE insert_id = 'c'"),
    "a lost merge": _in_lake("DELETE FROM lake.merges"),
    "a merge too many": _in_lake(
        "INSERT INTO lake.merges VALUES (1, 100000000002, 100000000001, 0, 1, 1, 0, 0)"
    ),
    "a lost key": _lost_key,
    "a key file": _flipped_key_file,
    "a key too many": lambda folder: bytes(plant_key(folder, "planted")) and None,
}


TOGETHER = [
    name
    for name in STATE
    if name not in {"a lost person", "an unreadable person", "a lost key", "a key too many"}
]


@pytest.mark.parametrize(
    "names", [TOGETHER, *(pytest.param([name], marks=pytest.mark.long) for name in STATE)]
)
def test_what_the_lake_still_says_is_made_again(names: list[str], server: Server) -> None:
    server.close()
    before = _all(server)
    for name in names:
        STATE[name](server.folder)
    done = _repair(server)
    assert done.found.count >= len(names)
    assert done.left.differences == []
    assert done.left.refolded
    assert done.aside == []
    again = _repair(server)
    assert (again.found.count, again.left.count) == (0, 0)
    assert _all(server) == before


def _all(server: Server) -> Any:
    """Everything that readers and later folds may see."""
    _open(server)
    seen = server.seen()
    server.close()
    return seen


@pytest.mark.parametrize("name", [pytest.param("gone", marks=pytest.mark.long), "damaged"])
def test_a_checkpoint_that_is_lost_is_made_again(name: str, tmp_path: Path) -> None:
    seeded = random.Random(7)
    server = Server(tmp_path / "data", FakeClock(), "amplitude")
    for number in range(0, 150, 5):
        server.clock.ms += 1000
        server.send(*_request(seeded, number, server.clock.ms))
    server.close()
    before = _all(server)
    path = server.folder / "checkpoint.sqlite"
    if name == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[100:9000] = b"\x07" * 8900
        path.write_bytes(data)
    with closing(sqlite3.connect(server.folder / "hot.sqlite")) as db, db:
        db.execute("DELETE FROM blocks")
    done = _repair(server)
    assert done.found.count > 0
    assert done.left.differences == []
    assert done.aside == ["checkpoint.sqlite"]  # of one that is gone the engine made an empty one
    assert _all(server) == before
    _open(server)  # a repeat is one still: its times are known
    for one in server.seen()["rows"][-3:]:
        if one["insert_id"]:
            again = {"event_type": "View", "device_id": one["device_id"]}
            server.send([{**again, "insert_id": one["insert_id"]}])
    assert server.engine.figures.duplicates > 0
    server.close()


def test_an_id_that_is_no_text_any_more_is_damage_of_its_checkpoint(server: Server) -> None:
    server.close()
    before = _all(server)
    _sql("checkpoint.sqlite", "UPDATE devices SET id = CAST(x'ff68' AS TEXT) WHERE id = 'phone-2'")(
        server.folder
    )
    found = _check(server)
    assert [(one.where, one.field) for one in found.differences] == [
        ("checkpoint.sqlite", "structure")
    ]
    done = _repair(server)
    assert done.left.differences == []
    assert done.aside == ["checkpoint.sqlite"]
    assert _all(server) == before


def test_a_checkpoint_made_again_knows_what_comes_too_late(server: Server) -> None:
    """Where properties go by event time, the time of each person's last event is part of the state."""
    settings = ProjectSettings(property_time="event")
    server.run(server.engine.change_settings(1, settings))
    eve = {"device_id": "phone-7", "user_id": "eve-333", "event_type": "open"}
    plan = {**eve, "time": server.clock.ms, "insert_id": "e", "user_properties": {"plan": "pro"}}
    server.send([plan])
    server.close()
    (server.folder / "checkpoint.sqlite").unlink()
    with closing(sqlite3.connect(server.folder / "hot.sqlite")) as db, db:
        db.execute("DELETE FROM blocks")
    assert _repair(server).left.differences == []
    _open(server)
    late = {**plan, "time": server.clock.ms - 5000, "insert_id": "f"}
    server.send([{**late, "user_properties": {"plan": "free"}}])
    server.run(server.engine.event_time.settle(1))
    state = server.engine.state.project(1)
    found = state.people.get(state.users.get("eve-333") or 0)
    assert found is not None
    assert found.properties == {"plan": "pro"}
    server.close()


def _listed(server: Server) -> list[dict[str, Any]]:
    text = (server.folder / "set-aside" / "events.ndjson").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("kind", ["legible", pytest.param("illegible", marks=pytest.mark.long)])
def test_a_damaged_block_is_set_aside_and_the_rest_folded_without_it(
    kind: str, server: Server
) -> None:
    legible = kind == "legible"
    for at in ("e", "f"):  # blocks 3 and 4; 1 is in the lake
        server.send([{**START[1], "insert_id": at, "user_properties": {"$add": {"seen": 1}}}])
    server.run(server.engine.abandon())
    server.loop.close()
    with closing(sqlite3.connect(server.folder / "hot.sqlite")) as db, db:
        ((blob,),) = db.execute("SELECT blob FROM blocks WHERE number = 3").fetchall()
        damaged = bytes(blob) if legible else blob[: len(blob) // 2]
        db.execute(
            "UPDATE blocks SET blob = ?, checksum = checksum + 1 WHERE number = 3", (damaged,)
        )
    with pytest.raises(CorruptError, match="checksum"):
        Engine.open(Settings(data=server.folder, limits="none"), clock=server.clock)
    done = _repair(server)
    assert [one.where for one in done.found.differences] == ["block 3"]
    assert done.left.differences == []
    assert done.aside == ["checkpoint.sqlite", "block-000000000003.bin"]
    assert (server.folder / "set-aside" / done.aside[1]).read_bytes() == damaged
    (listed,) = _listed(server)
    assert listed["from"] == "block 3"
    if legible:
        assert (listed["insert_id"], listed["row"]) == ("e", 0)
    else:
        assert (listed["rows"], listed["known"]) == (1, False)
    _open(server)
    people = server.engine.state.project(1)
    ann = people.people.get(people.users.get("ann-111") or 0)
    assert ann is not None
    assert ann.properties["seen"] == 2  # of three
    assert [row["insert_id"] for row in server.seen()["rows"]] == ["a", "b", "c", "d", "f"]
    server.send([{**START[1], "insert_id": "e"}])  # sent again it is stored
    assert server.seen()["rows"][-1]["insert_id"] == "e"
    server.close()
    assert _check(server).count == 0


@pytest.mark.parametrize(
    "harm",
    ["flipped", *(pytest.param(one, marks=pytest.mark.long) for one in ("truncated", "gone"))],
)
def test_a_damaged_lake_file_is_set_aside_and_what_is_whole_of_it_stays(
    harm: str, server: Server
) -> None:
    server.close()
    path = min((server.folder / "lake").rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # in the first page
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if harm == "truncated" else data)
    damaged = None if harm == "gone" else path.read_bytes()
    done = _repair(server)
    assert [one.where for one in done.found.differences][:1] == [f"lake file {path.name}"]
    assert done.left.differences == []
    assert done.aside == ([] if harm == "gone" else [path.name])
    if damaged is not None:
        assert (server.folder / "set-aside" / path.name).read_bytes() == damaged
    listed = _listed(server)
    if harm == "flipped":
        assert [(one["from"], one["insert_id"]) for one in listed] == [
            (path.name, one) for one in "abc"
        ]
    else:
        assert listed == [{"from": path.name, "rows": 3, "known": False}]
    assert _repair(server).found.count == 0
    assert _listed(server) == listed
    _open(server)
    rows = server.seen()["rows"]
    assert [row["insert_id"] for row in rows] == ["d"]
    assert json.loads(rows[0]["user_properties"]) == {"seen": 1}
    server.close()


def test_a_lake_file_of_which_deleted_rows_alone_are_whole_becomes_an_empty_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.close()
    path = min((server.folder / "lake").rglob("0*.parquet"))
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(repairing, "_salvaged", lambda *_: ([FILE.empty_table()], []))
    assert _repair(server).left.differences == []
    _open(server)
    assert [row["insert_id"] for row in server.seen()["rows"]] == ["d"]
    server.close()


@pytest.mark.parametrize("bit", [20, 40, 62, 63])
def test_a_block_whose_size_is_damaged_is_told_as_illegible(bit: int) -> None:
    packed = pa.Codec("lz4").compress(b"x" * 400, asbytes=True)
    blob = struct.pack("<4sQ", b"lz4\n", 400 | 1 << bit) + packed
    with pytest.raises(CorruptError, match="unpacks to"):
        sqlite_blocks.decoded(blob)
    told = list(repairing._events_of(blob, 7, 3))
    assert told == [{"from": "block 7", "rows": 3, "known": False}]


STEPS = [
    ("_begin_anew", "after"),
    *(
        pytest.param(name, after, marks=pytest.mark.long)
        for name in ("_leave_checkpoint", "_mended", "_mend_lake")
        for after in ("before", "after")
    ),
    pytest.param("_begin_anew", "before", marks=pytest.mark.long),
]


class _CutError(BaseException):
    """The machine stops here."""


def test_a_key_without_a_row_is_removed_also_by_the_repair_after_one_that_is_cut_off(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.run(server.engine.seal())
    server.close()
    before = _held(server)
    assert len(list((server.folder / "keys").glob("keys-*.bin"))) == 2
    event = {"device_id": "phone-7", "event_type": "open", "insert_id": "planted"}
    plant_key(server.folder, "planted")
    plant_key(server.folder, "other", at=1, block=2)
    _open(server)
    server.send([event])
    assert "planted" not in [row["insert_id"] for row in server.seen()["rows"]]
    server.close()
    drop = keys.KeyFiles.drop

    def cut(files: keys.KeyFiles, *args: Any) -> None:
        drop(files, *args)
        raise _CutError

    with monkeypatch.context() as patched:
        patched.setattr(keys.KeyFiles, "drop", cut)
        with pytest.raises(_CutError):
            _repair(server)
    assert _check(server).count == 1
    done = _repair(server)
    assert (done.found.count, done.left.count) == (1, 0)
    assert _held(server) == before
    _open(server)
    server.send([event])
    assert "planted" in [row["insert_id"] for row in server.seen()["rows"]]
    server.close()
    assert _check(server).count == 0


def _held(server: Server) -> set[tuple[bytes, int, int]]:
    return {
        (high.tobytes() + low.tobytes(), int(value), file.first)
        for path in (server.folder / "keys").glob("keys-*.bin")
        for file in [keys.KeyFile(path)]
        for high, low, value in zip(file.high, file.low, file.values, strict=True)
        if file.count and file.last < 3
    }


@pytest.mark.parametrize("step", ["rename", "commit"])
def test_a_lake_file_whose_replacement_is_cut_off_is_damaged_still(
    step: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.close()
    _in_lake("DELETE FROM lake.events WHERE insert_id = 'b'")(server.folder)  # has a delete file
    path = min((server.folder / "lake").rglob("0*.parquet"))
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    rename, end = Path.rename, Lake._end

    def renamed(self: Path, to: Path) -> Path:
        found = rename(self, to)
        if step == "rename" and self.name.endswith(".parquet.new"):
            raise _CutError
        return found

    def ended(self: Lake, cursor: Any) -> None:
        if step == "commit":
            raise _CutError
        end(self, cursor)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", renamed)
        patched.setattr(Lake, "_end", ended)
        with pytest.raises(_CutError):
            _repair(server)
    assert path.read_bytes() == data
    assert _check(server).differences[0].where == f"lake file {path.name}"
    assert _repair(server).left.differences == []
    assert not path.exists()
    assert [one["from"] for one in _listed(server)] == [path.name] * len(_listed(server))
    _open(server)
    assert [row["insert_id"] for row in server.seen()["rows"]] == ["d"]
    server.close()
    assert _repair(server).found.count == 0


@pytest.mark.parametrize(("name", "when"), STEPS)
def test_a_repair_that_is_cut_off_is_ended_by_the_next(
    name: str, when: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.send([{**START[0], "insert_id": "e"}])
    server.run(server.engine.abandon())
    server.loop.close()
    with closing(sqlite3.connect(server.folder / "hot.sqlite")) as db, db:
        db.execute("UPDATE blocks SET blob = x'00' WHERE number = 2")
    real, after = getattr(repairing, name), when == "after"

    def cut(*args: Any, **kwargs: Any) -> Any:
        if after and name == "_begin_anew":

            async def ended() -> None:
                await real(*args, **kwargs)
                raise _CutError

            return ended()
        if after:
            real(*args, **kwargs)
        raise _CutError

    with monkeypatch.context() as patched:
        patched.setattr(repairing, name, cut)
        with pytest.raises(_CutError):
            _repair(server)
    assert _check(server).count > 0
    done = _repair(server)
    assert done.left.differences == []
    kept = {path.name for path in (server.folder / "set-aside").iterdir()}
    assert {"block-000000000002.bin", "checkpoint.sqlite", "events.ndjson"} <= kept
    assert not (server.folder / "repairing").exists()
    _open(server)
    assert [row["insert_id"] for row in server.seen()["rows"]] == ["a", "b", "c", "e"]
    server.close()
    assert _repair(server).found.count == 0


def test_a_repair_that_is_killed_is_ended_by_the_next(server: Server) -> None:
    server.run(server.engine.abandon())
    server.loop.close()
    with closing(sqlite3.connect(server.folder / "hot.sqlite")) as db, db:
        db.execute("UPDATE blocks SET blob = x'00' WHERE number = 2")
    code = "from retrofill.cli.main import app; app()"
    words = ["check", "--repair", "--data", str(server.folder)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not (server.folder / "repairing").exists():
            os.sched_yield()
        process.kill()
    assert _repair(server).left.differences == []
    assert [one["from"] for one in _listed(server)] == ["block 2"]
    _open(server)
    assert [row["insert_id"] for row in server.seen()["rows"]] == ["a", "b", "c"]
    server.close()


def test_nothing_but_a_repair_opens_a_directory_whose_repair_was_cut_off(server: Server) -> None:
    server.close()
    (server.folder / "repairing").write_text("0")
    with pytest.raises(CorruptError, match="cut off"):
        Engine.open(Settings(data=server.folder, limits="none"), clock=server.clock)
    assert _repair(server).left.count == 0
    assert _check(server).count == 0


def test_a_broken_hot_store_is_left_as_it_is(server: Server) -> None:
    server.close()
    path = server.folder / "hot.sqlite"
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\x07" * 8000 + data[8100:])
    broken = path.read_bytes()
    done = _repair(server)
    assert done.found.count == done.left.count > 0
    assert path.read_bytes() == broken


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_delete_file(folder: Path) -> None:
    _in_lake("DELETE FROM lake.events WHERE insert_id = 'a'")(folder)
    (path,) = (folder / "lake").rglob("*-delete.parquet")
    _cut(path)


LOST: dict[str, Harm] = {
    "a delete file": _cut_delete_file,
    "the catalog": lambda folder: _cut(folder / "lake" / "catalog.duckdb"),
    "the catalog, gone": lambda folder: (folder / "lake" / "catalog.duckdb").unlink(),
    "the catalog, empty": lambda folder: os.truncate(folder / "lake" / "catalog.duckdb", 0),
    "the lake": lambda folder: shutil.rmtree(folder / "lake"),
    "intents": lambda folder: _cut(folder / "intents.sqlite"),
    "intents, gone": lambda folder: (folder / "intents.sqlite").unlink(),
    "blocks, gone": lambda folder: (folder / "hot.sqlite").unlink(),
    "a secret key": _sql("hot.sqlite", "UPDATE projects SET secret_key = CAST(x'ff' AS TEXT)"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_nothing_else_holds_is_told_and_left_as_it_is(
    name: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.close()
    LOST[name](server.folder)
    kept = _bytes(server.folder)
    done = _repair(server)
    assert done.found.differences == done.left.differences
    assert done.left.count == 1
    assert _bytes(server.folder) == kept
    if name in ("the catalog, gone", "the lake"):
        with pytest.raises(CorruptError):
            Engine.open(Settings(data=server.folder, limits="none"), clock=server.clock)
    with pytest.raises(SystemExit) as ended:
        main.app(["check", "--data", str(server.folder), "--repair"])
    assert ended.value.code == 1
    assert "restore the data directory from a copy" in capsys.readouterr().out


def _bytes(folder: Path) -> dict[str, bytes]:
    names = ("hot.sqlite", "checkpoint.sqlite", "intents.sqlite")
    lake = sorted((folder / "lake").rglob("*.parquet"))
    files = (*(folder / name for name in names), *lake)
    return {path.name: path.read_bytes() for path in files if path.exists()}


def test_what_was_written_last_to_a_checkpoint_is_set_aside_with_it(server: Server) -> None:
    server.close()
    directory = Directory(server.folder)
    wal = server.folder / "checkpoint.sqlite-wal"
    wal.write_bytes(b"written last")
    folder = server.folder / "set-aside"
    repairing._leave_checkpoint(directory, repairing._Aside(folder))
    directory.close()
    assert (folder / wal.name).read_bytes() == b"written last"


def test_a_damaged_block_of_the_wire_is_no_block() -> None:
    assert block_codec.decode(block_codec.encode(repairing._empty(7, 5))).number == 7


def test_the_command_mends_and_says_so(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BusyError):
        _repair(server)
    with pytest.raises(SystemExit) as ended:
        main.app(["check", "--repair", "--data", str(server.folder)])
    assert ended.value.code == 2
    server.close()
    STATE["a lost device"](server.folder)
    for words, code, said in (
        ([], 1, "device phone-2 · amplitude_id: stored nothing"),
        (["--repair"], 0, "repaired: no differences are left"),
        ([], 0, "no differences"),
        (["--repair"], 0, "nothing to repair"),
        (["--repair", "--json"], 0, '{"event":"repaired","left":0,"set_aside":[]}'),
    ):
        with pytest.raises(SystemExit) as ended:
            main.app(["check", *words, "--data", str(server.folder)])
        assert ended.value.code == code
        assert said in capsys.readouterr().out
