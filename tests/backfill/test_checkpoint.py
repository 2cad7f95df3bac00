"""A stage is killed at any moment and gone on with: it becomes the same, byte for byte, and little is done twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.backfill import killing
from tests.backfill.staging import letters, ndjson, rows, run
from tests.faults.process import PATIENCE_S

from retrofill.backfill import checkpoint, intake, laid, order, records, spill, stage
from retrofill.backfill.checkpoint import Checkpoint
from retrofill.backfill.deadletter import DeadLetters
from retrofill.backfill.journal import locked
from retrofill.backfill.records import Place
from retrofill.backfill.source import Piece
from retrofill.errors import BusyError, InputError

MAPPING = {"event": {**killing.PLAIN, "event_properties": "event_properties"}}


def killed(folder: Path, seed: int, kills: int, *what: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    paths = os.pathsep.join(path for path in sys.path if path)
    line = [sys.executable, "-m", "tests.backfill.killing", str(folder), str(seed), str(kills)]
    done = subprocess.run(
        [*line, *what],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        timeout=PATIENCE_S * max(1, kills // 10),
        check=True,
    )
    found: dict[str, Any] = msgspec.json.decode(done.stdout)
    assert len(found["killed"]) == kills
    assert found["same"], found
    assert found["left"] == ["dead-letters.ndjson", "lock", "stage"]
    return found


def twice(found: dict[str, Any], what: str) -> int:
    """How many rows were done again, all rounds together."""
    return int(found["done"].get(what, 0) - found["rounds"] * found["once"].get(what, 0))


# What a checkpoint of this test goes by: a megabyte that is read at once, and a part that is sorted at once.
BLOCK_ROWS, PART_ROWS = 2400, 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "what"),
    [
        (3, "lines dealt"),
        (3, "lines laid"),
        (2, "packed"),
        (2, "array"),
        (2, "folder"),
        (2, "cells"),
        (2, "lines timed"),
    ],
)
def test_a_stage_killed_at_any_step_goes_on_and_becomes_the_same(
    tmp_path: Path, kills: int, what: str
) -> None:
    found = killed(tmp_path, 1, kills, *what.split())
    # A kill costs what was done since the last checkpoint.
    assert twice(found, "spill.arrow rows") <= kills * 2 * BLOCK_ROWS
    assert twice(found, "bucket rows") <= kills * 2 * BLOCK_ROWS
    assert twice(found, "sorted rows") <= kills * 2 * PART_ROWS


@pytest.mark.slow
def test_a_query_with_a_window_begins_anew_and_becomes_the_same(tmp_path: Path) -> None:
    killed(tmp_path, 2, 1, "windowed")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "timed"])
@pytest.mark.parametrize(
    "what",
    ["lines dealt", "lines laid", "packed", "array dealt", "folder laid", "asked", "cells dealt"],
)
def test_a_stage_killed_a_hundred_times_becomes_the_same(
    tmp_path: Path, what: str, how: str
) -> None:
    for seed in range(4):
        killed(tmp_path / str(seed), seed, 25, *what.split(), *how.split())


@pytest.mark.parametrize("how", ["dealt out", "laid", "dealt out, no room", "laid, no room"])
def test_many_rows_become_the_same_stage_as_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(intake, "SCANNED_BYTES", 0)
    path = source(tmp_path / "s.ndjson")
    one = run(tmp_path / "one", path, MAPPING, sets=3, bad_rows=0.5)
    monkeypatch.setattr(stage, "PLAIN_BYTES", 0)  # as if it were too large to stay in one piece
    monkeypatch.setattr(order, "BUCKET_BYTES", 300_000)
    monkeypatch.setattr(order, "LAID_BUCKET_BYTES", 300_000)
    monkeypatch.setattr(order, "LAID_SOURCE_BYTES_MAX", 2**40 if "laid" in how else 0)
    if "no room" in how:
        monkeypatch.setattr(spill, "ROOM_BYTES", 2**60)
    laid_out: list[int] = []
    ordered = laid.Scattered.ordered

    def noted(self: laid.Scattered, order: Any) -> Any:
        laid_out.append(len(order))
        return ordered(self, order)

    monkeypatch.setattr(laid.Scattered, "ordered", noted)
    many = run(tmp_path / "many", path, MAPPING, sets=3, bad_rows=0.5)
    assert len(laid_out) > 5 if "laid" in how else not laid_out
    assert rows(tmp_path / "many") == rows(tmp_path / "one")
    assert letters(tmp_path / "many") == letters(tmp_path / "one")
    alike = msgspec.structs.replace(
        many, hot_people=one.hot_people
    )  # which of equally hot ones may differ
    assert alike == one


class Killed(BaseException):
    """Stands for a kill, in this process."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every block, and texts that stay in the source."""
    monkeypatch.setattr(intake, "SCANNED_BYTES", 0)
    monkeypatch.setattr(intake, "STEP_BYTES", 1024 * 1024)
    monkeypatch.setattr(intake, "STEP_BYTES_MIN", 1)


def source(path: Path, seed: int = 3) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in killing.rows(seed)))
    return path


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """End staging behind a checkpoint."""
    save, left = Checkpoint.save, [count]

    def saved(self: Checkpoint) -> None:
        save(self)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(Checkpoint, "save", saved)


def read_again(
    monkeypatch: pytest.MonkeyPatch, work: Path, path: Path, **options: Any
) -> list[int]:
    """Stage and return the line at which each file was begun."""
    lines: list[int] = []
    read = intake.read

    def noted(*given: Any) -> Iterator[pa.RecordBatch]:
        lines.append(given[-1].line)
        return read(*given)

    with monkeypatch.context() as patched:
        patched.setattr(intake, "read", noted)
        run(work, path, MAPPING, bad_rows=0.5, **options)
    return lines


def begun(monkeypatch: pytest.MonkeyPatch, work: Path, path: Path, **options: Any) -> None:
    """Leave a stage of which two steps are read."""
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(Killed):
            run(work, path, MAPPING, bad_rows=0.5, **options)


@pytest.mark.usefixtures("small")
def test_what_is_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path / "s.ndjson")
    begun(monkeypatch, tmp_path / "w", path)
    state = checkpoint.read(tmp_path / "w" / "scratch")
    assert state is not None
    assert state.reading.place.line > 2000
    assert read_again(monkeypatch, tmp_path / "w", path) == [state.reading.place.line]
    run(tmp_path / "other", path, MAPPING, bad_rows=0.5)
    assert rows(tmp_path / "w") == rows(tmp_path / "other")
    assert letters(tmp_path / "w") == letters(tmp_path / "other")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "other", ["version", "boot", "format", "source", "options", "mapping", "torn", "no boot"]
)
def test_a_checkpoint_of_anything_else_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    path, work = source(tmp_path / "s.ndjson"), tmp_path / "w"
    begun(monkeypatch, work, path)
    file = work / "scratch" / "checkpoint.json"
    state = msgspec.json.decode(file.read_bytes())
    options = {}
    if other in state:
        file.write_bytes(msgspec.json.encode({**state, other: 99 if other == "format" else "x"}))
    elif other == "source":
        source(path, seed=4)
    elif other == "options":
        options["kiosk_limit"] = 3
    elif other == "mapping":
        monkeypatch.setitem(MAPPING["event"], "platform", "event_type")
    elif other == "torn":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        monkeypatch.setattr(checkpoint, "_BOOT", tmp_path / "none")
    assert read_again(monkeypatch, work, path, **options) == [1]
    run(tmp_path / "other", path, MAPPING, bad_rows=0.5, **options)
    assert rows(work) == rows(tmp_path / "other")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("file", "when", "how"),
    [
        ("scratch/dead-letters.ndjson", "read", "gone"),
        ("scratch/odd.arrow", "read", "empty"),
        ("scratch/spill.arrow", "read", "empty"),
        ("scratch/spill.arrow", "dealt", "gone"),
        ("scratch/read.npz", "dealt", "gone"),
        ("scratch/bucket-1.arrow", "dealt", "gone"),
        ("scratch/bucket-5.arrow", "sorted", "empty"),
        ("scratch/sorted.log", "sorted", "empty"),
        ("stage.new/set-0.rows", "sorted", "gone"),
        ("stage.new/set-0.rows", "sorted", "empty"),
    ],
)
def test_a_checkpoint_without_its_files_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, when: str, how: str
) -> None:
    monkeypatch.setattr(stage, "PLAIN_BYTES", 0)
    monkeypatch.setattr(order, "BUCKET_BYTES", 700_000)
    monkeypatch.setattr(order, "LAID_BUCKET_BYTES", 700_000)
    monkeypatch.setattr(order, "DEALT_BYTES", 700_000)
    path, work = source(tmp_path / "s.ndjson"), tmp_path / "w"
    save = Checkpoint.save

    def saved(self: Checkpoint) -> None:
        save(self)
        state = self.state
        reached = {
            "read": state.reading.counted.rows > 4000,
            "dealt": len(state.dealing.buckets) > 5,
            "sorted": state.sorting.bucket == 1,
        }
        if reached[when]:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", saved)
        with pytest.raises(Killed):
            run(work, path, MAPPING, bad_rows=0.5)
    there = work / file
    assert there.stat().st_size > 1
    if how == "gone":
        there.unlink()
    else:
        there.write_bytes(b"")
    assert read_again(monkeypatch, work, path) == [1]
    assert sorted(one.name for one in work.iterdir()) == ["dead-letters.ndjson", "lock", "stage"]


@pytest.mark.usefixtures("small")
def test_what_another_process_is_staging_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, work = source(tmp_path / "s.ndjson"), tmp_path / "w"
    run(work, path, MAPPING, bad_rows=0.5)
    begun(monkeypatch, work, path, kiosk_limit=3)
    with locked(work):
        assert read_again(monkeypatch, work, path) == []
    assert checkpoint.read(work / "scratch") is not None
    assert read_again(monkeypatch, work, path) == []  # nobody is
    assert not (work / "scratch").exists()


@pytest.mark.usefixtures("small")
def test_a_name_that_was_made_up_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = stage.import_name(tmp_path / "w", None, now_ms=0)
    begun(monkeypatch, tmp_path / "w", source(tmp_path / "s.ndjson"), import_id=name)
    assert stage.import_name(tmp_path / "w", None, now_ms=0) == name


def test_two_processes_do_not_stage_in_one_directory(tmp_path: Path) -> None:
    path = ndjson(tmp_path / "s.ndjson", [msgspec.Raw(line) for line in killing.rows(1)[:1]])  # type: ignore[list-item]
    with locked(tmp_path / "w"), pytest.raises(BusyError, match="works in"):
        run(tmp_path / "w", path, MAPPING)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dealt", [False, True], ids=["in one", "dealt out"])
@pytest.mark.parametrize("how", ["longer", "shorter"])
def test_a_source_that_changes_while_it_is_staged_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, *, dealt: bool
) -> None:
    path = source(tmp_path / "s.ndjson")
    if dealt:
        monkeypatch.setattr(stage, "PLAIN_BYTES", 0)
        monkeypatch.setattr(order, "BUCKET_BYTES", 700_000)
    write = stage._Read.write

    def changed(*given: Any) -> None:
        write(*given)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + (9 if how == "longer" else -(10**6)))

    monkeypatch.setattr(stage._Read, "write", changed)
    with pytest.raises(InputError, match="was changed while"):
        run(tmp_path / "w", path, MAPPING, bad_rows=0.5)
    assert not (tmp_path / "w" / "scratch").exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("what", ["many files", "few of their rows"])
def test_neither_many_files_nor_what_is_mostly_left_out_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder, lines = tmp_path / "s", killing.rows(5)
    folder.mkdir()
    for number in range(4):
        part = b"".join(line + b"\n" for line in lines[number::4])
        (folder / f"{number}.ndjson").write_bytes(part)
    options: dict[str, Any] = {"bad_rows": 0.5}
    if what == "few of their rows":
        options["since_ms"] = 1_700_000_950_000
    run(tmp_path / "mapped", folder, MAPPING, **options)
    if what == "many files":
        monkeypatch.setattr(stage, "MAPPED_FILES_MAX", 3)
    else:
        monkeypatch.setattr(stage, "PLAIN_BYTES", 1_000_000)
        monkeypatch.setattr(order, "LAID_SOURCE_BYTES_MAX", 1000)
    for way in ("mapped", "addressed"):
        monkeypatch.setattr(spill.Originals, way, None)
    run(tmp_path / "read", folder, MAPPING, **options)
    found = rows(tmp_path / "read")
    assert len(found) > 100
    assert found == rows(tmp_path / "mapped")


@pytest.mark.usefixtures("small")
def test_a_refused_stage_leaves_its_letters_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"all are in .*w/dead-letters.ndjson"):
        run(tmp_path / "w", source(tmp_path / "s.ndjson"), MAPPING, bad_rows=0.0)
    assert sorted(one.name for one in (tmp_path / "w").iterdir()) == ["dead-letters.ndjson", "lock"]
    assert len(letters(tmp_path / "w")) > 100


TEXTS = st.text(alphabet='{}[],"\\\n\r x1', max_size=60)


@given(TEXTS, st.sampled_from(["ndjson", "json", "csv"]), st.integers(3, 9))
@example("[1,2,3,\n4]", "json", 3)
@example("[1,2,3]x", "json", 3)
@example("1111,[", "json", 6)
@example('a,b\n"1\n2",3\n4,5\n6,"7', "csv", 3)
@example("a\n\n\nb\nc", "ndjson", 3)
def test_records_are_the_same_wherever_reading_is_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, text: str, kind: Any, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"going-on.{kind}"
    path.write_text(text if kind != "csv" else f"a,b\n{text}", newline="")
    piece = Piece(0, "it", str(path), kind)

    def read(place: Place, file: DeadLetters) -> Iterator[pa.RecordBatch]:
        if kind == "csv":
            names = ["a", "b"]
            return records.csv_records(piece, names, file, told=",", chunk=chunk, place=place)
        return records.json_records(piece, file, chunk=chunk, place=place)

    place, parts, places = Place(), [], []
    with DeadLetters(path.with_suffix(".letters")) as file:
        for batch in read(place, file):
            parts.append(batch.to_pylist())
            places.append((msgspec.structs.replace(place), file.written().bytes))
    told = path.with_suffix(".letters").read_bytes()
    for at, (there, written) in enumerate(places):
        if there.last:
            break
        with DeadLetters(path.with_suffix(".more")) as file:
            rest = [row for batch in read(there, file) for row in batch.to_pylist()]
        assert rest == [row for part in parts[at + 1 :] for row in part]
        assert path.with_suffix(".more").read_bytes() == told[written:]


def test_a_spill_gives_back_what_it_took_and_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    schema = pa.schema([("n", pa.int64()), (spill.TEXT, pa.string())])
    batches = [
        pa.record_batch(
            [[-1, at, at + 1], ["left", f"{{é{at}\n", f"{{{'x' * at}\n"]], schema=schema
        ).slice(1)
        for at in range(0, 20, 2)
    ]
    found = spill.Spill(tmp_path / "a", schema)
    found.cut()
    for number, batch in enumerate(batches):
        found.add(batch, packed=number % 3 == 1)
        if number == 6:
            length = found.bytes
    assert [end for _batch, end in found.batches()][-1] == found.bytes
    assert [batch for batch, _end in found.batches()] == batches
    assert list(found.mapped()) == batches
    found = spill.Spill(tmp_path / "a", schema, length=length)
    assert list(found.mapped()) == batches[:7]  # what follows does not count
    found.cut()
    for batch in batches[7:]:
        found.add(batch)
    (behind, end), *rest = found.batches()
    assert behind == batches[0]
    assert list(found.batches(end)) == rest
    placed = spill.placed(list(found.mapped()), schema, lambda *_: 0)
    whole = spill.whole(placed, before=b"<a>")
    taken = whole.take(np.arange(20)[::-1].copy())
    assert taken["n"].to_pylist() == list(range(20))[::-1]
    texts = [text for at in range(0, 20, 2) for text in (f"<a>é{at}", f"<a>{'x' * at}")]
    assert taken[spill.TEXT].to_pylist() == texts[::-1]
    as_it_was = spill.whole(spill.placed(batches, schema, lambda *_: 0), before=None)
    assert as_it_was.take(np.array([2, 1]), led=False)[spill.TEXT].to_pylist() == ["{é2\n", "{\n"]
