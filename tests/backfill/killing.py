"""Stages a source, is killed again and again by SIGKILL, and goes on. Run as a process of its own: it forks.

    python -m tests.backfill.killing WORK SEED KILLS WHAT…    what: see `SOURCES`, and `dealt`, `timed`

Prints one JSON object: how often it was killed, in which step, what was done in all, and whether the stage is, byte for
byte, the one that is made without a kill.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from tests.backfill.staging import run

from retrofill.backfill import intake, order, sets, spill
from retrofill.backfill import stage as stages
from retrofill.backfill.checkpoint import Checkpoint
from retrofill.backfill.deadletter import DeadLetters

ROWS = 9000
TRIES = 5  # of which each may be killed, before a stage is let come to its end
PLAIN = {name: name for name in ("user_id", "device_id", "event_type", "time", "insert_id")}
MAPPINGS: dict[str, dict[str, Any]] = {
    "plain": {"event": {**PLAIN, "event_properties": "event_properties"}},
    "asked": {"event": {**PLAIN, "event_type": "upper(event_type)"}},
}
# File and mapping of each kind of source.
SOURCES = {
    "lines": ("s.ndjson", "plain"),
    "packed": ("s.ndjson.gz", "plain"),
    "array": ("s.json", "plain"),
    "folder": ("s", "plain"),
    "asked": ("s.ndjson", "asked"),
    "cells": ("s.csv", "asked"),
    "windowed": ("s.ndjson", "windowed"),
}
MAPPINGS["windowed"] = {
    "event": {**PLAIN, "event_type": "'of ' || count(*) OVER (PARTITION BY user_id)"}
}


def rows(seed: int) -> list[bytes]:
    """Return lines of all kinds: such as pass as they stand, such as do not, and such as are none."""
    draw = random.Random(seed)
    found = []
    for number in range(ROWS):
        row: dict[str, Any] = {
            "user_id": f"user-{draw.randrange(400):08}",
            "device_id": f"device-{draw.randrange(900):08}",
            "event_type": draw.choice(["open", "view", "buy"]),
            "time": 1_700_000_000_000 + draw.randrange(10**9),
            "insert_id": f"id-{draw.randrange(ROWS * 20) if number % 3 else number}",
            "event_properties": {"text": "x" * draw.randrange(900), "n": number},
        }
        kind = draw.random()
        if kind < 0.02:
            row["user_id"] = "é-" + row["user_id"]  # written with an escape
        elif kind < 0.04:
            row["user_id"] = "anonymous"
        elif kind < 0.05:
            row["time"] = "never"
        elif kind < 0.06:
            row["insert_id"] = None
        elif kind < 0.08 and found:
            found.append(found[-1].replace(b'"open"', b'"close"'))  # again, perhaps otherwise
            continue
        line = json.dumps(row, separators=(",", ":")).encode()
        found.append(line if draw.random() > 0.01 else line[:-9] + b"\xff" * draw.randrange(3))
    return found


def written(folder: Path, what: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """Write a source and return where it is, and its mapping."""
    name, mapping = SOURCES[what]
    path, lines = folder / name, rows(seed)
    whole = b"".join(line + b"\n" for line in lines)
    if what == "packed":
        path.write_bytes(gzip.compress(whole, 1))
    elif what == "array":
        good = [line for line in lines if line.endswith(b"}}")]
        path.write_bytes(b"[\n" + b",\n".join(good) + b"\n]")
    elif what == "folder":
        path.mkdir()
        for number in range(6):
            part = lines[number::6] if number else []
            (path / f"{number}.ndjson").write_bytes(b"".join(line + b"\n" for line in part))
    elif what == "cells":
        with path.open("w", newline="") as file:
            cells = csv.writer(file)
            cells.writerow([*PLAIN, "more"])
            for line in lines:
                if line.endswith(b"}}"):
                    row = json.loads(line)
                    cells.writerow([*(row[key] for key in PLAIN), row["event_properties"]["text"]])
    else:
        path.write_bytes(whole)
    return path, MAPPINGS[mapping]


def warm(folder: Path) -> None:
    """Load compiled code once, and not in every child."""
    few = folder / "few.ndjson"
    few.write_bytes(b"".join(line + b"\n" for line in rows(0)[:20] if b"user-" in line[:30]))
    run(folder / "few", few, MAPPINGS["plain"], bad_rows=0.5)


class Done:
    """Counts what a process does in a file that outlives it, and ends it in the middle of something."""

    def __init__(self, file: Path, at: tuple[str, int] | None) -> None:
        self._handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._at, self._counts = at, Counter[str]()

    def say(self, what: str, count: int) -> None:
        os.write(self._handle, f"{what} {count}\n".encode())

    def step(self, what: str, torn: Callable[[], object] = lambda: None) -> None:
        """Note that something is about to be written. torn: writes a part of it."""
        self._counts[what] += 1
        self.say(what, 1)
        if (what, self._counts[what]) == self._at:
            torn()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Count in all that writes."""
        add, save, write, letter, part = (
            spill.Spill.add, Checkpoint.save, sets.SetWriter.write, DeadLetters.add, order.Sorter._part,
        )  # fmt: skip
        done = self

        def added(self: spill.Spill, batch: pa.RecordBatch, **options: bool) -> None:
            step = "bucket" if "bucket" in self.path.name else "spill"

            def torn() -> None:
                with self.path.open("ab") as file:
                    file.write(bytes(batch.serialize())[: batch.nbytes // 2])

            done.step(step, torn)
            done.say(f"{self.path.name.split('-')[0]} rows", batch.num_rows)
            add(self, batch, **options)

        def saved(self: Checkpoint) -> None:
            fresh = self._path.with_suffix(".new")
            done.step("save", lambda: fresh.write_bytes(b'{"mark":'))
            save(self)
            done.step("saved")

        def group(self: sets.SetWriter, batch: pa.RecordBatch) -> None:
            done.step("group")
            write(self, batch)

        def told(self: DeadLetters, *parts: Any) -> None:
            done.step("letter")
            letter(self, *parts)

        def sorted_part(self: order.Sorter, batch: pa.RecordBatch, person: Any) -> None:
            done.say("sorted rows", batch.num_rows)
            part(self, batch, person)

        spill.Spill.add, Checkpoint.save = added, saved  # type: ignore[method-assign]
        sets.SetWriter.write, DeadLetters.add = group, told  # type: ignore[method-assign]
        order.Sorter._part = sorted_part  # type: ignore[method-assign]


def attempt(
    work: Path, source: Path, mapping: dict[str, Any], at: tuple[str, int] | None, done: Path
) -> int:
    """Stage in a child and return its exit code, negative for a signal. at: of what it does, where it ends itself."""
    return _ended(_begun(work, source, mapping, at, done))


def timed(work: Path, source: Path, mapping: dict[str, Any], after_s: float, done: Path) -> int:
    """Stage in a child, kill it after a while, if it has not ended by itself, and return its exit code."""
    child = _begun(work, source, mapping, None, done)
    ended = os.pidfd_open(child)
    select.select([ended], [], [], after_s)
    os.close(ended)
    os.kill(child, signal.SIGKILL)
    return _ended(child)


def _begun(
    work: Path, source: Path, mapping: dict[str, Any], at: tuple[str, int] | None, done: Path
) -> int:
    """Begin to stage in a child and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        Done(done, at).watch()
        run(work, source, mapping, sets=3, bad_rows=0.5)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(work: Path, *, any_order: bool = False) -> dict[str, bytes]:
    """Return all that a stage is. any_order: of the letters, which a query with a window gives as its threads come."""
    found = {path.name: path.read_bytes() for path in (work / "stage").iterdir()}
    if any_order:
        told = json.loads(found["manifest.json"])
        found["manifest.json"] = json.dumps(told, sort_keys=True).encode()
    letters = (work / stages.DEAD_LETTERS).read_bytes().splitlines()
    return {**found, "letters": b"".join(sorted(letters) if any_order else letters)}


def counted(done: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in done.read_text().splitlines():
        what, _, count = line.rpartition(" ")
        found[what] += int(count)
    return found


def main(folder: Path, seed: int, kills: int, what: str, *how: str) -> dict[str, Any]:
    """Stage once without and once with kills."""
    draw = random.Random(seed)
    intake.STEP_BYTES, intake.SCANNED_BYTES = 1024 * 1024, 0
    intake.STEP_BYTES_MIN = order.STEP_BYTES = order.DEALT_BYTES = 400_000
    if "dealt" in how:
        stages.PLAIN_BYTES, order.BUCKET_BYTES = 0, 700_000
        order.LAID_SOURCE_BYTES_MAX = 0
    if "laid" in how:
        stages.PLAIN_BYTES, order.LAID_BUCKET_BYTES = 0, 1_400_000
    source, mapping = written(folder, what, seed)
    warm(folder)
    started = time.perf_counter()
    assert attempt(folder / "whole", source, mapping, None, folder / "once") == 0
    seconds = time.perf_counter() - started
    once = counted(folder / "once")
    steps = [name for name in ("spill", "bucket", "save", "saved", "group", "letter") if once[name]]
    (folder / "done").touch()
    found: dict[str, Any] = {"killed": [], "once": once, "rounds": 0, "same": True}
    whole = content(folder / "whole", any_order=what == "windowed")
    while len(found["killed"]) < kills:
        work, done = folder / f"killed-{found['rounds']}", folder / "done"
        code, tries = -signal.SIGKILL, 0
        while code == -signal.SIGKILL:
            tries += 1
            if len(found["killed"]) == kills or tries > TRIES:
                code = attempt(work, source, mapping, None, done)
            elif "timed" in how:
                started = time.perf_counter()
                code = timed(work, source, mapping, draw.random() * seconds, done)
                if code == 0:  # the first one took longer
                    seconds = min(seconds, time.perf_counter() - started)
            else:
                step = draw.choice(steps)
                at = draw.randrange(1, 2 + 2 * once[step] // TRIES)
                code = attempt(work, source, mapping, (step, at), done)
            if code == -signal.SIGKILL:
                found["killed"].append(("", *done.read_text().splitlines())[-1])
        assert code == 0, code
        found["rounds"] += 1
        found["same"] = found["same"] and content(work, any_order=what == "windowed") == whole
        found["left"] = sorted(path.name for path in work.iterdir())
    return {**found, "done": counted(done)}


if __name__ == "__main__":
    told = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    sys.stdout.write(json.dumps(told))
