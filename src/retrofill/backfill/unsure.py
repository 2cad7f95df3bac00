"""Rows that the destination may hold and no longer remembers, one by one: `WORK/unsure.ndjson`.

They are not sent again before somebody has read back. The file says what the journal says when it was written; it is gone
when nothing is unsure.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO

import msgspec

from retrofill.backfill.drive import staged
from retrofill.backfill.journal import Ledger, Span
from retrofill.backfill.manifest import Manifest
from retrofill.backfill.sets import Set

UNSURE = "unsure.ndjson"
_COLUMNS = ["file", "line", "insert_id", "user_id", "device_id", "event_type"]


def write(work: Path) -> Path | None:
    """List the unsure rows of a work directory. Returns the file, None if there are none."""
    manifest = staged(work)
    ledger = Ledger(work)
    try:
        spans = list(ledger.unsure().spans())
    finally:
        ledger.close()
    path = work / UNSURE
    if not spans:
        path.unlink(missing_ok=True)
        return None
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        for number in sorted({span.set for span in spans}):
            _write(file, work, manifest, [span for span in spans if span.set == number])
    return fresh.replace(path)


def _write(file: IO[bytes], work: Path, manifest: Manifest, spans: list[Span]) -> None:
    """List the rows of one set. spans: in order."""
    with Set(work / "stage" / manifest.sets[spans[0].set].path) as stored:
        for group, (start, stop) in enumerate(pairwise(stored.starts.tolist())):
            mine = list(_within(spans, start, stop))
            if mine:
                rows = stored.read(group, _COLUMNS)
                for first, last in mine:
                    for row in rows.slice(first - start, last - first).to_pylist():
                        row["file"] = manifest.files[row["file"]].name
                        file.write(msgspec.json.encode(row) + b"\n")


def _within(spans: list[Span], start: int, stop: int) -> Iterator[tuple[int, int]]:
    for span in spans:
        first, last = max(span.first, start), min(span.first + span.count, stop)
        if first < last:
            yield first, last
