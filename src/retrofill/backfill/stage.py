"""The stage: a source turned into finished events, in one file for each sender, once.

Steps: look at the source, compile the mapping, take the rows in (`intake`), find out who is one person (`people`), sort
(`order`), publish. All of it happens in a folder beside the stage, which takes the stage's name at the very end: a crash
leaves no stage or a whole one. A stage knows what it was made from; asked for the same again, it is simply there.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from retrofill.backfill import manifest, order, original, people, source
from retrofill.backfill.deadletter import DeadLetters
from retrofill.backfill.intake import SPILLED, Intake, Taken, connect
from retrofill.backfill.manifest import Duplicates, File, Hot, Kiosk, Manifest, Options
from retrofill.backfill.order import Sorted, Sorter
from retrofill.backfill.people import Ints, People
from retrofill.backfill.source import Origin
from retrofill.backfill.spill import Spill
from retrofill.core.mapping import Mapping
from retrofill.errors import InputError

DEAD_LETTERS = "dead-letters.ndjson"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HOT = 100
_KIOSKS_MAX = 1_000  # listed by name


class Asked(Struct, frozen=True, kw_only=True):
    """What a stage is to be made of. named: files, folders, globs, s3:// or database addresses."""

    named: Sequence[str]
    mapping: Mapping
    query: str | None = None
    endpoint: str | None = None


Progress = Callable[[str, int], None]


def import_name(work: Path, given: str | None, *, now_ms: int) -> str:
    """Return the import id: as given, else the one that the work directory has, else a new one.

    Raises InputError for a name that is none: it travels in every event and in addresses.
    """
    if given is not None:
        if not _NAME.fullmatch(given):
            raise InputError(
                f"{given!r} is no import name", mend="Take 1 to 64 of A-Z a-z 0-9 . _ -"
            )
        return given
    there = manifest.read(work / "stage")
    if there is not None:
        return there.import_id
    day = dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC).strftime("%Y%m%d")
    return f"import-{day}-{secrets.token_hex(3)}"


def stage(
    work: Path, asked: Asked, options: Options, *, progress: Progress = lambda _step, _rows: None
) -> Manifest:
    """Make the stage of a work directory, or find it there, and return its manifest.

    progress: told the step and how many rows it has seen. Raises InputError for a wrong source or mapping, or when more
    rows than `options.bad_rows` allows are refused; then nothing is staged, and the dead letters say why.
    """
    origins = source.locate(asked.named, query=asked.query, endpoint=asked.endpoint)
    mark = _fingerprint(origins, asked.mapping, options)
    there = manifest.read(work / "stage")
    if there is not None and there.fingerprint == mark:
        return there
    if there is not None and (work / "journal.db").exists():
        raise InputError(
            f"This work directory was begun as import {there.import_id!r} with another source, mapping or option",
            where=str(work),
            mend="Give the same line and source as before, or another --work directory",
        )
    scratch = work / "scratch"
    made = work / "stage.new"
    for folder in (scratch, made):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        found = _make(work, made, scratch, origins, asked, options, mark, progress)
        manifest.publish(made, work / "stage", found)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(made, ignore_errors=True)
    return found


def _fingerprint(origins: Sequence[Origin], mapping: Mapping, options: Options) -> str:
    parts = (source.fingerprint(origins), mapping.digest, options, manifest.VERSION)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


def _make(  # noqa: PLR0917  # one call's state, passed on
    work: Path,
    made: Path,
    scratch: Path,
    origins: Sequence[Origin],
    asked: Asked,
    options: Options,
    mark: str,
    progress: Progress,
) -> Manifest:
    # Batches come and go: Arrow's own pool asks the machine for fresh memory each time, malloc keeps some.
    pa.set_memory_pool(pa.system_memory_pool())
    told = asked.mapping.format
    pieces = source.pieces(origins, scratch=scratch, format_name=told, endpoint=asked.endpoint)
    letters = DeadLetters(work / DEAD_LETTERS)
    spill = Spill(scratch / "spill.arrow", SPILLED, large="event")
    with letters:
        with contextlib.ExitStack() as opened:
            intake = Intake(
                pieces,
                asked.mapping,
                options,
                lambda: opened.enter_context(connect(scratch)),
                letters,
            )
            try:
                taken = intake.run(spill, scratch, seen=lambda rows: progress("read", rows))
            except InputError:  # the letters say why: they show the rows, too
                letters.close()
                original.staged(letters.path, pieces, letters.events, asked.mapping.delimiter)
                raise
        progress("sort", taken.rows)
        device, user, count = taken.pairs.compact()
        joined = people.join(device, user, kiosk_limit=options.kiosk_limit)
        hot_devices, hot_users = _hottest(device, count), _hottest(user, count)
        crowded = _crowded(joined, device, user, count)
        shared = np.array([node for _kind, node, _events in crowded], np.int64)
        wanted = np.concatenate((hot_devices[0], hot_users[0], shared))
        sorter = Sorter(
            made,
            joined,
            options,
            keys=taken.keys,
            wanted=wanted,
            refused=lambda file, *rest: letters.add_event(pieces[file].name, *rest),
        )
        taken.keys = []
        found = sorter.run(spill, _borders(taken, joined, spill), scratch)
    original.staged(letters.path, pieces, letters.events, asked.mapping.delimiter)
    _days(made, found)
    names = found.names
    return Manifest(
        fingerprint=mark,
        import_id=options.import_id,
        options=options,
        mapping=asked.mapping.digest,
        files=[File(piece.name, piece.size) for piece in pieces],
        sets=found.sets,
        rows=taken.rows + intake.unread,
        events=found.events,
        bytes=found.bytes,
        people=found.people,
        devices=_distinct(device),
        users=_distinct(user),
        first_ms=found.first_ms,
        last_ms=found.last_ms,
        days=_by_day(found),
        types=_by_type(found),
        refused=dict(letters.counts.most_common()),
        duplicates=Duplicates(found.same, found.different),
        ids=dict(taken.ids),
        left_out={**taken.left_out, **({"sample": found.left_out} if found.left_out else {})},
        hot_devices=_named(hot_devices, names),
        hot_users=_named(hot_users, names),
        hot_people=found.hot,
        kiosks=[
            Kiosk(kind, names[node], events) for kind, node, events in crowded if node in names
        ],
    )


def _borders(taken: Taken, joined: People, spill: Spill) -> order.Borders:
    if spill.plain:
        return order.borders(*taken.borders.rows()[1:], buckets=1)
    device, user, time_ms = taken.borders.rows()
    buckets = -(-taken.bytes // order.BUCKET_BYTES)
    return order.borders(joined.of(device, user), time_ms, buckets=buckets)


def _hottest(node: Ints, count: Ints) -> tuple[Ints, Ints]:
    """Return the nodes with the most events, largest first, and their events."""
    nodes, inverse = np.unique(node, return_inverse=True)
    events = np.bincount(inverse, weights=count, minlength=len(nodes)).astype(np.int64)
    events[nodes == 0] = 0
    top = np.argsort(-events, kind="stable")[:_HOT]
    top = top[events[top] > 0]
    return nodes[top], events[top]


def _named(hottest: tuple[Ints, Ints], names: dict[int, str]) -> list[Hot]:
    pairs = zip(*(column.tolist() for column in hottest), strict=True)
    return [Hot(names[node], events) for node, events in pairs if node in names]


def _crowded(joined: People, device: Ints, user: Ints, count: Ints) -> list[tuple[str, int, int]]:
    """Return the kiosks with the most events: kind, node, events."""
    found = []
    for kind, node in (("device", device), ("user", user)):
        kiosks = np.intersect1d(joined.kiosks, node)
        if len(kiosks):
            at = np.minimum(np.searchsorted(kiosks, node), len(kiosks) - 1)
            mine = kiosks[at] == node
            events = np.bincount(at[mine], weights=count[mine], minlength=len(kiosks))
            found += [
                (kind, *pair)
                for pair in zip(kiosks.tolist(), events.astype(int).tolist(), strict=True)
            ]
    return sorted(found, key=lambda kiosk: -kiosk[2])[:_KIOSKS_MAX]


def _distinct(node: Ints) -> int:
    return int(np.count_nonzero(np.unique(node)))


def _date(day: int) -> str:
    return str(dt.date(1970, 1, 1) + dt.timedelta(days=day))


def _by_day(found: Sorted) -> dict[str, int]:
    days: Counter[int] = Counter()
    for (day, _kind), events in found.days.items():
        days[day] += events
    return {_date(day): events for day, events in sorted(days.items())}


def _by_type(found: Sorted) -> dict[str, int]:
    types: Counter[str] = Counter()
    for (_day, kind), events in found.days.items():
        types[kind] += events
    return dict(types.most_common())


def _days(made: Path, found: Sorted) -> None:
    rows = sorted(found.days.items())
    table = {
        "day": pa.array([_date(day) for (day, _kind), _events in rows], pa.string()),
        "event_type": pa.array([kind for (_day, kind), _events in rows], pa.string()),
        "events": pa.array([events for _key, events in rows], pa.int64()),
    }
    pq.write_table(pa.table(table), made / "days.parquet")
