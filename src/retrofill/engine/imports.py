"""Imports: which there are, what each did to the project, and what of it was not stored.

An event belongs to the import that its `ingestion_metadata` names; its row carries the name. So almost every figure is
a count over rows, lake and unsealed alike, exact for the moment of its view. Two things leave no row:

- *duplicates*: events of the import that were stored before. The blocks hold them, so they are counted with each
  commit and again at a start, and saved with each seal, before blocks go: a crash changes nothing.
- *refusals*: requests with events of the import that were answered 400, 413 or 429, each time they were sent. Nothing
  of them is on disk, so a crash forgets those of the last minute.

What is known beside that (opened when, state, generation) is `hot.imports`'.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Literal

import msgspec
import numpy as np
from msgspec import Raw, Struct
from msgspec.structs import replace

from retrofill.core.block import Kind
from retrofill.core.event import Batch, Envelope, Event, import_name
from retrofill.engine.duplicates import IMPORT_SOURCE, import_of
from retrofill.engine.query import Reader, Statement, View
from retrofill.errors import ConflictError
from retrofill.hot.imports import NAME, Counted, Import, Imports, State
from retrofill.hot.intents import Tried
from retrofill.limits import (
    IMPORTS_LISTED_MAX,
    IMPORTS_REFUSED_MAX,
    MS_PER_DAY,
    UNDO_RETENTION_DAYS,
    Limits,
)

_HISTORY = (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY, Kind.ALIAS, Kind.DISPLACED)
_IDENTIFIES = f"({int(Kind.IDENTIFY)}, {int(Kind.GROUP_IDENTIFY)})"
Repeats = Counter[tuple[int, str]]  # by (project, import)
_LOOKED_AT = Limits().batch_events  # events of a refused request that are asked for their import


class Stored(Struct, frozen=True):
    """What the rows of an import say. Times in ms, None if it has no row that has one.

    events: rows that counts and the export show. identifies: rows that they do not. people: survivors of merges, each
    once. event_ms: of events. arrival_ms: of all rows, server_upload_time. displaced: its events whose place another
    import's row holds.
    """

    events: int = 0
    identifies: int = 0
    people: int = 0
    first_event_ms: int | None = None
    last_event_ms: int | None = None
    first_arrival_ms: int | None = None
    last_arrival_ms: int | None = None
    displaced: int = 0


class Figures(Struct, frozen=True):
    """One import as it is shown. duplicates: events. refusals: requests. For the others see `Stored`.

    tries: how often the undo or restore was begun that is under way. reason: why the last try failed.
    """

    name: str
    state: State
    generation: int
    opened_ms: int | None
    events: int
    identifies: int
    people: int
    first_event_ms: int | None
    last_event_ms: int | None
    first_arrival_ms: int | None
    last_arrival_ms: int | None
    duplicates: int
    refusals: int
    tries: int = 0
    reason: str | None = None


# What the rows say.


def stored(view: View, name: str | None = None) -> dict[str, Stored]:
    """Return what the rows of each import say, or of one; an import without rows is left out."""
    statement = Statement()
    where = "import_id <> ''" if name is None else f"import_id = {statement.bind(name)}"
    people = view.people()
    source = view.source(
        ("import_id", "amplitude_id", "event_time", "server_upload_time"),
        where=where,
        kinds=_HISTORY,
    )
    seen = f"FILTER (kind = {int(Kind.EVENT)})"
    nobodys = f"({int(Kind.GROUP_IDENTIFY)}, {int(Kind.DISPLACED)})"
    rows = view.ask(
        f"""
        SELECT import_id, count(*) {seen}, count(*) FILTER (kind IN {_IDENTIFIES}),
               count(DISTINCT coalesce(now, amplitude_id)) FILTER (kind NOT IN {nobodys}),
               min(event_time) {seen}, max(event_time) {seen},
               min(server_upload_time), max(server_upload_time),
               count(*) FILTER (kind = {int(Kind.DISPLACED)})
        FROM {source} LEFT JOIN {people} ON was = amplitude_id GROUP BY import_id
        """,
        statement,
    ).fetchall()
    return {found: Stored(*figures) for found, *figures in rows}


def figures(
    reader: Reader,
    known: Imports,
    counted: Mapping[str, Counted],
    project: int,
    *,
    name: str | None = None,
    tried: Mapping[str, Tried] | None = None,
) -> list[Figures]:
    """Return every import of a project, or one, the last one to do something first; IMPORTS_LISTED_MAX at most.

    counted: what was not stored, by name. tried: how undo or restore fared, by name. Before the view is opened: what was known of an import then is no newer than
    its rows.
    """
    records = {one.name: one for one in known.all(project)}
    with reader.view(project) as view:
        rows = stored(view, name)
    names = {*records, *rows, *counted} if name is None else {name} & {*records, *rows, *counted}
    found = [
        _shown(
            records.get(one, Import(one)),
            rows.get(one, Stored()),
            counted.get(one, Counted()),
            (tried or {}).get(one, Tried()),
        )
        for one in names
    ]
    found.sort(key=lambda one: (-max(one.last_arrival_ms or 0, one.opened_ms or 0), one.name))
    return found[:IMPORTS_LISTED_MAX]


def _shown(known: Import, rows: Stored, counted: Counted, tried: Tried) -> Figures:
    state, generation = known.state, known.generation
    opened_ms = known.opened_ms
    if state == "undone" and (known.again or rows != Stored()):
        anew = _next(known)  # what came since begins it
        state, generation, opened_ms = anew.state, anew.generation, anew.opened_ms
    return Figures(
        known.name,
        state,
        generation,
        opened_ms,
        rows.events,
        rows.identifies,
        rows.people,
        rows.first_event_ms,
        rows.last_event_ms,
        rows.first_arrival_ms,
        rows.last_arrival_ms,
        counted.duplicates + rows.displaced,
        counted.refusals,
        tried.times,
        tried.reason or None,
    )


# What its owner says.


def opened(known: Imports, project: int, name: str, *, now_ms: int) -> Import:
    """Open an import, again if it is closed or undone: rows of an undone one are of its next generation.

    Opening one that is open changes nothing but that it is known, so who resumes may ask each time. Nor does an undone one
    lose anything by it: until there are rows again it can be restored. Raises ConflictError while it is being undone.
    """

    def make(before: Import | None) -> Import:
        if before is None:
            return Import(name, "open", now_ms)
        _not_undoing(before)
        if before.state == "undone":
            return replace(before, again="open", again_ms=before.again_ms or now_ms)
        since = now_ms if before.opened_ms is None else before.opened_ms
        return replace(before, state="open", opened_ms=since)

    made = known.change(project, name, make)
    assert made is not None
    return made


def closed(known: Imports, project: int, name: str, *, rows: bool = False) -> Import:
    """Note that all of an import was sent. What arrives all the same is stored.

    rows: there are some. Raises ConflictError if it is undone, and was not begun anew.
    """

    def make(before: Import | None) -> Import:
        if before is None:
            return Import(name, "closed")
        _not_undoing(before)
        if before.state == "undone" and rows:
            before = _next(before)
        elif before.state == "undone" and before.again:
            return replace(before, again="closed")
        elif before.state == "undone":
            raise ConflictError(f"The import {name} is undone", mend="Open it again first")
        return replace(before, state="closed")

    made = known.change(project, name, make)
    assert made is not None
    return made


def _next(before: Import) -> Import:
    """Begin the generation after an undone one."""
    return Import(
        before.name,
        before.again or "open",
        before.again_ms or None,
        before.generation + 1,
        before.until,
        before.until,
        purged=before.purged,
    )


def under_way(
    known: Imports, project: int, name: str, state: Literal["undoing", "restoring"]
) -> None:
    """Note that an import is being undone or restored."""

    def make(before: Import | None) -> Import:
        one = before or Import(name)
        return replace(one, state=state, former=one.former or one.state)

    known.change(project, name, make)


def as_before(known: Imports, project: int, name: str) -> None:
    """Note that an import is not being undone or restored any more, and nothing of it has changed."""

    def make(before: Import | None) -> Import | None:
        if before is None or before.state not in ("undoing", "restoring"):
            return None
        otherwise: State = "open" if before.state == "undoing" else "undone"
        return replace(before, state=before.former or otherwise, former="")

    known.change(project, name, make)


def not_again(known: Imports, project: int, name: str) -> None:
    """Note that an undone import, opened again since and without a row, is undone once more: what it was before."""
    known.change(
        project,
        name,
        lambda before: replace(before, again="", again_ms=0) if before and before.again else None,
    )


def undone(before: Import, *, until: int, now_ms: int) -> Import:
    """Return what an import is whose rows up to block `until` are hidden now. Said again it is the same."""
    closed = before.former == "closed" if before.former else before.closed
    return replace(
        before, state="undone", until=until, undone_ms=now_ms, former="", closed=int(closed)
    )


def restored(before: Import) -> Import:
    """Return what an import is that was undone and whose rows are shown again: closed if it was. Said again it is the same."""
    state: State = "closed" if before.closed or before.state == "closed" else "open"
    return replace(
        before,
        state=state,
        until=before.after,
        undone_ms=0,
        former="",
        closed=0,
        again="",
        again_ms=0,
    )


def begun_again(known: Imports, project: int, name: str) -> None:
    """Note that rows came for an import that is undone: they are its next generation."""
    known.change(
        project,
        name,
        lambda before: _next(before) if before and before.state == "undone" else None,
    )


def to_restore(known: Imports, project: int, name: str, *, again: bool, now_ms: int) -> Import:
    """Return an undone import that may be brought back, or one whose bringing back broke off: it is asked for again.

    again: its next generation has rows. Raises ConflictError.
    """
    one = known.get(project, name) or Import(name)  # one with rows and no entry is open
    if one.state == "restoring":
        return one
    if one.state != "undone" or again:
        raise ConflictError(
            f"The import {name} holds rows of a later generation"
            if again
            else f"The import {name} is {one.state}, not undone",
            mend="Undo those first" if again else "",
        )
    if expired(one, now_ms) or one.purged >= one.until > 0:
        raise ConflictError(
            f"The import {name} was undone more than {UNDO_RETENTION_DAYS} days ago, its rows are gone",
            mend="Send it again",
        )
    return one


def expired(one: Import, now_ms: int) -> bool:
    """Say whether an undone import can no longer be restored."""
    return one.state == "undone" and now_ms - one.undone_ms > UNDO_RETENTION_DAYS * MS_PER_DAY


def to_purge(one: Import, now_ms: int) -> int:
    """Return up to which block the hidden rows of an import are to be deleted, 0 if none are: nobody can restore them.

    Those of generations before the last can never be restored.
    """
    last = one.until if expired(one, now_ms) else one.after
    return last if last > one.purged else 0


def purged(known: Imports, project: int, name: str, last: int) -> None:
    """Note that hidden rows up to a block are deleted."""
    known.change(
        project,
        name,
        lambda before: replace(before, purged=max(before.purged, last)) if before else None,
    )


def _not_undoing(known: Import) -> None:
    if known.state in ("undoing", "restoring"):
        raise ConflictError(
            f"The import {known.name} is being undone"
            if known.state == "undoing"
            else f"The import {known.name} is being restored",
            mend="Ask again when that has ended, or call it off",
        )


# What is not stored.


def duplicates_in(kinds: bytes, batches: Iterable[Batch]) -> Repeats:
    """Count the duplicates of imports among the events of a block, whose rows are of these kinds."""
    found: Repeats = Counter()
    if Kind.DROPPED in kinds:
        dropped = np.frombuffer(kinds, np.uint8) == Kind.DROPPED
        first = 0
        for batch in batches:
            rows = len(batch.events)
            for row in np.flatnonzero(dropped[first : first + rows]).tolist():
                name = import_of(batch.events[row])
                if name:
                    found[batch.project, name] += 1
            first += rows
    return found


class Counting:
    """Counts duplicates and refusals of imports. Belongs to the loop; what is shown may be read from any thread."""

    def __init__(self, known: Imports) -> None:
        self._known = known
        self.block, counts = known.counts()
        self._shown: dict[int, dict[str, Counted]] = {}
        for (project, name), one in counts.items():
            self._shown.setdefault(project, {})[name] = one
        self._duplicates: deque[tuple[int, Repeats]] = deque()
        self._refusals: Counter[tuple[int, str]] = Counter()
        self._saving = asyncio.Lock()

    def of(self, project: int) -> dict[str, Counted]:
        """Return the counts of a project by name, those not saved yet included."""
        return dict(self._shown.get(project, {}))

    def committed(self, block: int, duplicates: Repeats) -> None:
        """Count the duplicates of a block that is on disk. Blocks come in order; one saved already is passed over."""
        if duplicates and block > self.block:
            self._duplicates.append((block, duplicates))
            for key, count in duplicates.items():
                self._show(key, Counted(duplicates=count))

    def refused(self, project: int, names: Iterable[str]) -> None:
        """Count a refused request for the imports of its events."""
        for name in names:
            key = (project, name)
            # Any name at all may stand in a request that is refused: those of this minute are bounded.
            if key in self._refusals or len(self._refusals) < IMPORTS_REFUSED_MAX:
                self._refusals[key] += 1
                self._show(key, Counted(refusals=1))

    def _show(self, key: tuple[int, str], more: Counted) -> None:
        project, name = key
        shown = self._shown.setdefault(project, {})
        shown[name] = _sum(shown.get(name, Counted()), more)

    async def save(self, block: int | None = None) -> None:
        """Save what is counted, duplicates of blocks up to `block` (none if it is None). Raises StoreError."""
        async with self._saving:
            last = self.block if block is None else max(block, self.block)
            refusals = dict(self._refusals)
            more = {key: Counted(refusals=count) for key, count in refusals.items()}
            for number, found in self._duplicates:
                if number > last:
                    break
                for key, count in found.items():
                    more[key] = _sum(more.get(key, Counted()), Counted(duplicates=count))
            if not more and last == self.block:
                return
            await asyncio.to_thread(self._known.count, last, more)
            self.block = last
            self._refusals.subtract(refusals)
            self._refusals = +self._refusals
            while self._duplicates and self._duplicates[0][0] <= last:
                self._duplicates.popleft()

    async def put_aside(self, project: int, name: str, generation: int) -> None:
        """Count from 0 again for an import: its next generation begins. What was counted is kept. Raises StoreError."""
        async with self._saving:
            was = self._shown.get(project, {}).get(name, Counted())
            await asyncio.to_thread(self._known.put_counts_aside, project, name, generation, was)
            self._forget(project, name)

    async def bring_back(self, project: int, name: str, generation: int) -> None:
        """Let the counts of an import be what they were when this generation of it was undone. Raises StoreError."""
        async with self._saving:
            await asyncio.to_thread(self._known.bring_counts_back, project, name, generation)
            self._forget(project, name)
            _, counts = await asyncio.to_thread(self._known.counts)
            if (project, name) in counts:
                self._shown.setdefault(project, {})[name] = counts[project, name]

    def _forget(self, project: int, name: str) -> None:
        self._shown.get(project, {}).pop(name, None)
        self._refusals.pop((project, name), None)
        for _, found in self._duplicates:
            found.pop((project, name), None)


def _sum(one: Counted, more: Counted) -> Counted:
    return Counted(one.duplicates + more.duplicates, one.refusals + more.refusals)


class _Origin(Struct, gc=False):
    source_name: str | None = None
    source_version: str | None = None


class _Marked(Struct, gc=False):
    ingestion_metadata: _Origin | None = None


_split = msgspec.json.Decoder(list[Raw]).decode
_marked = msgspec.json.Decoder(_Marked).decode


def names_of(events: Sequence[Event]) -> set[str]:
    """Return the imports that some events belong to: those whose name could be opened."""
    found = {import_of(event) for event in events if event.ingestion_metadata}
    return {name for name in found if NAME.fullmatch(name)}


def names_in(opened: Envelope) -> set[str]:
    """Return the imports that events of a request belong to, as far as they can be read."""
    if opened.events is not None:
        return names_of(opened.events)
    found = set()
    try:
        texts = _split(opened.raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return set()
    for text in islice(texts, _LOOKED_AT):
        try:
            said = _marked(text).ingestion_metadata
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        if said is not None and said.source_name == IMPORT_SOURCE and said.source_version:
            found.add(import_name(said.source_version))
    return {name for name in found if NAME.fullmatch(name)}
