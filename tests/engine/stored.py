"""A real lake with some blocks sealed, and the others still unsealed, for tests of readers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
from hypothesis import settings
from tests.lake.blocks import START_MS, block_of

from retrofill.core.block import Block, Flag, Kind, Merge
from retrofill.core.person import Person
from retrofill.engine.query import Reader, View
from retrofill.lake import Lake, arrow

PROJECT = 7
DAY_MS = 86_400_000
HOUR_MS = 3_600_000
FEW = settings.default.max_examples // 10  # for what makes a lake for each example


class Stored:
    """Blocks 1 …, those up to `sealed` in the lake."""

    def __init__(self, folder: Path, blocks: list[Block], *, sealed: int = 0) -> None:
        self.blocks = {block.number: block for block in blocks}
        self.lake = Lake.open(folder)
        self.people: dict[int, Person] = {}
        self.aliases: dict[str, str] = {}
        self.pins: list[int] = []
        self.last = len(blocks)
        self.sealed = 0
        self.seal(sealed)
        self.reader = Reader(
            self.lake,
            self,
            last_block=lambda: self.last,
            person=lambda _, one: self.people.get(one),
            aliases=lambda _: self.aliases,
            pin=self.pin,
        )

    def seal(self, last: int) -> None:
        """Move blocks up to `last` into the lake, one file for all."""
        some = [self.blocks[number] for number in range(self.sealed + 1, last + 1)]
        if not some:
            return
        rows = arrow.table(some).sort_by(
            [(key, "ascending") for key in ("amplitude_id", "block", "row")]
        )
        file = self.lake.new_file(self.sealed + 1, last) if rows.num_rows else None
        if file is not None:
            pq.write_table(rows, file)
        self.lake.adopt(file, block=last, merges=arrow.merges(some))
        self.sealed = last

    def read(self, first: int, last: int) -> Iterator[Block]:
        for number in range(first, last + 1):
            yield self.blocks[number]

    @contextlib.contextmanager
    def pin(self, sealed: int) -> Iterator[None]:
        self.pins.append(sealed)
        yield
        self.pins.remove(sealed)

    def ask(self, question: Callable[[View], Any]) -> Any:
        with self.reader.view(PROJECT) as view:
            return question(view)


def block(
    number: int,
    events: list[dict[str, Any]],
    *,
    upload_ms: int | None = None,
    kinds: list[Kind] | None = None,
    flags: list[Flag] | None = None,
    merges: list[Merge] | None = None,
    project: int = PROJECT,
    path: str = "/batch",
) -> Block:
    """Make a block. Of each event `person` is its amplitude_id, `shown` its user properties and columns."""
    people = [event.get("person", 1) for event in events]
    times = [event.get("time", START_MS) for event in events]
    tables = [event.get("shown", {}) for event in events]
    sent = [
        {key: value for key, value in event.items() if key not in ("person", "shown")}
        for event in events
    ]
    plain = [{"event_type": "e", "device_id": "device", **event} for event in sent]
    made = block_of(
        plain,
        number=number,
        path=path,
        project=project,
        people=people,
        times=times,
        kinds=kinds,
        flags=flags,
        merges=merges,
    )
    shown = [
        block_of(
            [{}], table={**columns, "user_properties": columns.get("user_properties", {})}
        ).tables[0]
        for columns in tables
    ]
    kept = [index if kind != Kind.DROPPED else -1 for index, kind in enumerate(made.kind)]
    return msgspec.structs.replace(
        made,
        server_upload_ms=START_MS + number if upload_ms is None else upload_ms,
        tables=shown,
        table=b"".join(index.to_bytes(4, "little", signed=True) for index in kept),
    )
