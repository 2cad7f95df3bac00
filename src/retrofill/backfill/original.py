"""The source's own text of rows of which only the event is at hand: read once more, as far as needed.

An event is refused after the mapping, by the core or by the destination, when the text of its row is gone long since. A
dead letter shall show the row as it was, so it is looked up by file and line. What cannot be read again as it was (a
database, or storage far away) keeps the event in its place.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq

from retrofill.backfill import records, source
from retrofill.backfill.deadletter import DeadLetters, Letter
from retrofill.backfill.journal import Journal
from retrofill.backfill.source import Piece

LOOKED_UP_MAX = (
    100_000  # ours: letters whose rows are kept in memory meanwhile; more keep the event
)

_letter = msgspec.json.Decoder(Letter).decode

Places = Mapping[str, set[int]]
"""Lines by the name of their file."""


def texts(pieces: Sequence[Piece], wanted: Places, told: str | None) -> dict[tuple[str, int], str]:
    """Return the text of the rows at some places. told: the delimiter of CSV, if the mapping names it."""
    found: dict[tuple[str, int], str] = {}
    for piece in pieces:
        lines = wanted.get(piece.name)
        if lines and piece.query is None:
            rows = _native(piece, lines) if piece.format == "parquet" else _text(piece, lines, told)
            found |= {(piece.name, line): text for line, text in rows}
    return found


def _text(piece: Piece, lines: set[int], told: str | None) -> Iterator[tuple[int, str]]:
    sought, last = np.array(sorted(lines), np.int64), max(lines)
    with DeadLetters(Path("/dev/null")) as nowhere:
        if piece.format in {"csv", "tsv"}:
            batches = records.csv_records(piece, records.header(piece, told), nowhere, told=told)
        else:
            batches = records.json_records(piece, nowhere)
        for batch in batches:
            line = batch.column("line").to_numpy()
            for at in np.flatnonzero(np.isin(line, sought)).tolist():
                text = batch.column("text")[at].as_py().rstrip("\r\n")
                yield int(line[at]), text.strip() if piece.format == "json" else text
            if len(line) and line[-1] >= last:
                return


def _native(piece: Piece, lines: set[int]) -> Iterator[tuple[int, str]]:
    import duckdb  # noqa: PLC0415  # as in `intake`

    with pq.ParquetFile(piece.place) as file, duckdb.connect() as connection:
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            mine = sorted(line for line in lines if start < line <= stop)
            if mine:
                rows = file.read_row_group(group).take([line - 1 - start for line in mine])
                yield from zip(mine, records.as_json(connection, rows), strict=True)
            start = stop


def staged(path: Path, to: Path, pieces: Sequence[Piece], wanted: Places, told: str | None) -> None:
    """Copy the letters of a stage, those that hold events with their rows."""
    found = texts(pieces, wanted, told)
    fresh = to.with_suffix(".new")
    if not found:
        shutil.copyfile(path, fresh)
        fresh.replace(to)
        return
    with path.open("rb") as letters, fresh.open("wb") as file:
        for line in letters:
            letter = _letter(line)
            text = found.get((letter.file, letter.line))
            if text is not None:
                letter = msgspec.structs.replace(letter, row=text)
            file.write(msgspec.json.encode(letter) + b"\n")
    fresh.replace(to)


def sent(work: Path, named: Sequence[str], told: str | None, format_name: str | None) -> None:
    """Put the rows into the letters of a run that hold events, where the sources are files of this machine.

    Raises BusyError while a run works here, InputError if a source is gone.
    """
    if any("://" in name for name in named):
        return
    journal = Journal(work)
    try:
        held = ((key, _letter(line)) for key, line in journal.letters() if _holds_event(line))
        owed = list(islice(held, LOOKED_UP_MAX))
        wanted: dict[str, set[int]] = {}
        for _, letter in owed:
            wanted.setdefault(letter.file, set()).add(letter.line)
        if not wanted:
            return
        with tempfile.TemporaryDirectory(prefix="retrofill-") as scratch:
            pieces = source.pieces(
                source.locate(named), scratch=Path(scratch), format_name=format_name
            )
            found = texts(pieces, wanted, told)
        journal.reword(
            {
                key: msgspec.json.encode(
                    msgspec.structs.replace(letter, row=found[letter.file, letter.line])
                ).decode()
                for key, letter in owed
                if (letter.file, letter.line) in found
            }
        )
    finally:
        journal.close()


def _holds_event(line: str) -> bool:
    """Whether a letter's row is a finished event: every one carries the import."""
    return '\\"ingestion_metadata\\":{\\"source_name\\":\\"retrofill\\"' in line
