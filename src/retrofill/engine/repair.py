"""Mending a data directory: what can be made again from the lake is, what is damaged is set aside, nothing is deleted.

Found as `check` finds it, and mended in this order:

1. Damaged files. A damaged block, lake file, checkpoint or file of imports is copied into the folder `set-aside`, with
   a list of the events that it held as far as they can be read (`events.ndjson`). In its place stands what is left: an
   empty block, so that numbers stay without gaps; a lake file of those row groups that are whole; no checkpoint.
2. Where the state can no longer be a fold of what is there (a block or the checkpoint is gone, or blocks do not fold to
   what they say), all blocks go into the lake and the checkpoint is begun anew, empty.
3. Every project is folded again from its rows and what differs is made equal: rows, merges, values, dedupe keys. Key
   files that are damaged are made again by the engine when it opens.
4. All of it is checked once more; what still differs is told.

While a checkpoint is begun anew, from before a block is replaced until 3 is done, a file `repairing` stands in the
directory, with the next amplitude_id, and nothing but another repair opens it. Everything else leaves, where it is cut
off, a directory with fewer differences: a repair run again does what is left.

`hot.sqlite` itself, `intents.sqlite`, `deletions.sqlite`, the catalog of the lake and its delete files, which say what rows
are no more, hold what nothing else does: if one of them cannot be read, all is left as it is, and only a copy helps.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from retrofill.clock import Clock
from retrofill.config import Settings
from retrofill.core import block as block_codec
from retrofill.core.block import Block
from retrofill.core.event import decode
from retrofill.engine import check as checking
from retrofill.engine.check import Mends, Report
from retrofill.engine.ingest import Engine
from retrofill.engine.refold import no_places
from retrofill.engine.seal import Sealer
from retrofill.errors import CorruptError, StoreError
from retrofill.hot import sqlite
from retrofill.hot.checkpoint import FIRST_AMPLITUDE_ID, Checkpoint, Meta
from retrofill.hot.directory import Directory
from retrofill.lake import Lake, parquet
from retrofill.lake.arrow import FILE
from retrofill.lake.files import Files
from retrofill.limits import DEDUPE_DAYS_MAX, MS_PER_DAY

_TOLD = ("block", "row", "user_id", "device_id", "insert_id", "event_type", "event_time")
_ILLEGIBLE = (
    *(msgspec.MsgspecError, UnicodeDecodeError, pa.ArrowException, struct.error),
    *(CorruptError, OSError, MemoryError, OverflowError),
)
_encode = msgspec.json.encode


class Repaired(Struct):
    """found: as `check` says it before. left: after. aside: files set aside, by their names in `set-aside`."""

    found: Report
    left: Report
    aside: list[str] = []


def repair(
    data: Path, clock: Clock, *, sealer: Callable[[Path, Lake], Sealer] = Sealer
) -> Repaired:
    """Mend a data directory. Nobody else may use it meanwhile. Raises as `check` does. Cut off, it is to be run again."""
    checking.need(data)
    found, aside = Report(), _Aside(data / "set-aside")
    directory = Directory(data)
    try:
        checking.files(directory, found)
        if not (found.sound or found.lost):
            _mend_files(directory, aside)
    finally:
        directory.close()
    if not found.lost:
        asyncio.run(_mend(Settings(data=data, limits="none"), clock, sealer, found, aside))
    left = checking.check(data, clock, sealer=sealer)
    return Repaired(found, left, aside.names)


class _Aside:
    """The folder of what is set aside."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names: list[str] = []

    def take(self, path: Path, name: str = "") -> None:
        """Copy a file here, if it is there; it is on disk when this returns."""
        if path.exists():
            with path.open("rb") as source:
                self._put(name or path.name, lambda to: shutil.copyfileobj(source, to))

    def put(self, name: str, data: bytes) -> None:
        """Write bytes here as a file."""
        self._put(name, lambda to: to.write(data))

    def tell(self, lines: Iterator[dict[str, Any]]) -> None:
        """List events that are set aside, once each: a repair done again lists none a second time."""
        path = self._folder / "events.ndjson"
        known = set(path.read_bytes().splitlines()) if path.exists() else set()
        self._folder.mkdir(exist_ok=True)
        with path.open("ab") as file:
            for line in map(_encode, lines):
                if line not in known:
                    file.write(line + b"\n")
        Files().sync_file(path)
        Files().sync_folder(self._folder)

    def _put(self, name: str, write: Callable[[Any], object]) -> None:
        self._folder.mkdir(exist_ok=True)
        path, number = self._folder / name, 1
        while path.exists():  # somebody set another one aside before
            number += 1
            path = self._folder / f"{name}.{number}"
        new = path.with_name(f"{path.name}.part")
        with new.open("wb") as file:
            write(file)
        Files().sync_file(new)
        new.rename(path)
        Files().sync_folder(self._folder)
        Files().sync_folder(self._folder.parent)
        self.names.append(path.name)


# Files.


def _mend_files(directory: Directory, aside: _Aside) -> None:
    """Set aside what is damaged, and put in its place what is left."""
    with closing(Lake.open(directory.lake)) as lake:
        _mend_lake(lake, aside)
        sealed = lake.sealed()
    damaged = _damaged_blocks(directory)
    checkpoint = directory.checkpoint
    lost = not checkpoint.exists() and sealed > 0
    if damaged or lost or (checkpoint.exists() and sqlite.faults(checkpoint)):
        _leave_checkpoint(directory, aside)
    if directory.imports.exists() and sqlite.faults(directory.imports):
        _take(directory.imports, aside)
        _remove(directory.imports)
    with closing(sqlite.Blocks(directory.blocks)) as blocks:
        for number, rows in damaged:
            blob = blocks.blob(number)
            aside.put(f"block-{number:012}.bin", blob)
            aside.tell(_events_of(blob, number, rows))
            upload_ms = next((one.server_upload_ms for one in _readable(blocks, number - 1)), 0)
            blocks.replace(number, 0, block_codec.encode(_empty(number, upload_ms)))


def _leave_checkpoint(directory: Directory, aside: _Aside) -> None:
    """Set the checkpoint aside; from here on it is to be begun anew, and nothing but a repair opens the directory."""
    if directory.repairing.exists():
        return
    _take(directory.checkpoint, aside)
    new = directory.repairing.with_name("repairing.part")
    new.write_text(str(_fresh(directory.checkpoint)))
    Files().sync_file(new)
    new.rename(directory.repairing)
    Files().sync_folder(directory.root)


def _take(path: Path, aside: _Aside) -> None:
    """Set a SQLite file aside, with what was written to it last."""
    for end in ("", "-wal"):
        aside.take(path.with_name(f"{path.name}{end}"))


def _remove(path: Path) -> None:
    """Remove a SQLite file with all that belongs to it."""
    for end in ("", "-wal", "-shm"):
        path.with_name(f"{path.name}{end}").unlink(missing_ok=True)
    Files().sync_folder(path.parent)


def _damaged_blocks(directory: Directory) -> list[tuple[int, int]]:
    """Return number and rows of each damaged block."""
    damaged = []
    with closing(sqlite.Blocks(directory.blocks)) as blocks:
        for number, rows in blocks.numbers():
            try:
                for _ in blocks.read(number, number):
                    pass
            except CorruptError:
                damaged.append((number, rows))
    return damaged


def _readable(blocks: sqlite.Blocks, number: int) -> Iterator[Block]:
    yield from blocks.read(number, number)


def _empty(number: int, server_upload_ms: int) -> Block:
    nothing = (b"", b"", b"", b"", b"", b"", b"", b"")
    return Block(0, number, server_upload_ms, [], *nothing, [], [])


def _events_of(blob: bytes, number: int, rows: int) -> Iterator[dict[str, Any]]:
    """Name the events of a damaged block, as far as it can be read at all."""
    try:
        block = sqlite.decoded(blob)
        events = [event for part in block.parts for event in decode(part.body)]
    except _ILLEGIBLE:
        yield {"from": f"block {number}", "rows": rows, "known": False}
        return
    for row, event in enumerate(events):
        yield {
            "from": f"block {number}",
            "block": number,
            "row": row,
            "user_id": event.user_id,
            "device_id": event.device_id,
            "insert_id": event.insert_id,
            "event_type": event.event_type,
            "event_time": event.time,
        }


def _mend_lake(lake: Lake, aside: _Aside) -> None:
    """Put what is whole of each damaged lake file in its place."""
    for path, deleted, rows in lake.named_files():
        try:
            parquet.verify(path)
        except StoreError:
            aside.take(path)
            kept, lost = _salvaged(path, deleted)
            aside.tell(_lost(path, lost, rows))
            new = path.with_name(f"{path.name}.new")
            if any(one.num_rows for one in kept):
                parquet.write(new, kept, Files())
            else:
                pq.write_table(FILE.empty_table(), new)
                Files().sync_file(new)
            lake.replaced(path, new)


def _salvaged(path: Path, deleted: Path | None) -> tuple[list[pa.Table], list[Any]]:
    """Return the rows of the row groups that can be read, and for each other one what it can still say."""
    kept: list[pa.Table] = []
    lost: list[Any] = []
    try:
        opened = pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return [], []
    gone = parquet.places_of(deleted)
    first = 0
    with opened:
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            try:
                table = opened.read_row_group(group)
            except (OSError, pa.ArrowException):
                lost.append((rows, _columns(path, group)))
            else:
                if gone is not None:
                    table = parquet.without(table, gone, first)
                kept.append(parquet.whole(table))
            first += rows
    return kept, lost


def _columns(path: Path, group: int) -> dict[str, list[Any]]:
    """Read of a damaged row group the columns that tell its events, as far as they are whole."""
    found = {}
    for name in _TOLD:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as opened:
                found[name] = opened.read_row_group(group, [name])[name].to_pylist()
        except (OSError, pa.ArrowException):
            continue
    return found


def _lost(path: Path, lost: list[Any], rows: int) -> Iterator[dict[str, Any]]:
    if not lost:
        yield {"from": path.name, "rows": rows, "known": False}
    for count, columns in lost:
        for at in range(count):
            known = {name: values[at] for name, values in columns.items()}
            yield {"from": path.name, **known} if known else {"from": path.name, "known": False}


# State.


async def _mend(
    settings: Settings,
    clock: Clock,
    sealer: Callable[[Path, Lake], Sealer],
    found: Report,
    aside: _Aside,
) -> None:
    """Make every project equal to its rows."""

    def opened() -> Engine:
        return Engine.open(settings, clock=clock, sealer=sealer, repairing=True)

    with _owned(settings.data) as directory:
        anew = directory.repairing.exists()
    if not anew:
        try:
            engine = opened()
        except CorruptError as problem:
            found.differs(0, "blocks after the checkpoint", "state", problem.what, "ok")
            with _owned(settings.data) as directory:
                _leave_checkpoint(directory, aside)
            anew = True
    if anew:
        with _owned(settings.data) as directory:
            await _begin_anew(directory, clock, sealer)
        engine = opened()
    report = Report() if anew else found  # of a checkpoint begun anew everything differs
    await checking.refold(engine, clock, report, _mended)
    found.refolded, found.rows = True, report.rows
    found.people, found.merges = report.people, report.merges
    with _owned(settings.data) as directory:
        directory.repairing.unlink(missing_ok=True)
        Files().sync_folder(directory.root)


@contextlib.contextmanager
def _owned(data: Path) -> Iterator[Directory]:
    directory = Directory(data)
    try:
        yield directory
    finally:
        directory.close()


def _mended(engine: Engine, project: int, mends: Mends) -> None:
    """Let lake, state and key files be what the fold has decided."""
    if mends.files or mends.merges is not None:
        places = pa.concat_tables(mends.places) if mends.places else no_places()
        with engine.lake.held():
            engine.lake.rewrite(
                project,
                mends.files,
                places=places,
                people=sorted(mends.people),
                merges=mends.merges or [],
            )
    engine.state.mend(project, mends.changes)
    if mends.keys:
        engine.duplicates.change(
            [],
            mends.keys,
            engine.limits(project),
            sealed=engine.state.block,
            oldest_block=engine.oldest_block(),
        )


async def _begin_anew(
    directory: Directory, clock: Clock, sealer: Callable[[Path, Lake], Sealer]
) -> None:
    """Move every block into the lake and begin an empty checkpoint as of the last one."""
    with (
        closing(sqlite.Blocks(directory.blocks)) as blocks,
        closing(Lake.open(directory.lake)) as lake,
    ):
        sealed = lake.sealed()
        last = max([sealed, *(number for number, _ in blocks.numbers())])
        if last > sealed:
            one = sealer(blocks.path, lake)
            try:
                await one.seal(sealed + 1, last)
            finally:
                await one.close()
        _remove(directory.checkpoint)
        after_ms = clock.now_ms() - DEDUPE_DAYS_MAX * MS_PER_DAY
        highest, upload_ms, times = lake.history(after_ms)
        fresh = max(int(directory.repairing.read_text()), highest + 1, FIRST_AMPLITUDE_ID)
        with closing(Checkpoint(directory.checkpoint)) as checkpoint:
            checkpoint.save(
                Meta(last, upload_ms, fresh), {}, block_times=times, times_after_ms=after_ms
            )


def _fresh(checkpoint: Path) -> int:
    """Return the next amplitude_id as a checkpoint knows it, 0 if it cannot be read."""
    if not checkpoint.exists():
        return 0
    try:
        with closing(sqlite3.connect(checkpoint)) as db:
            row = db.execute("SELECT fresh FROM meta").fetchone()
            return int(row[0]) if row else 0
    except (sqlite3.Error, ValueError):
        return 0
