"""The stage: a source turned into finished events, in one file for each sender, once.

Steps: look at the source, compile the mapping, take the rows in (`intake`), find out who is one person (`people`), deal
them out to buckets where they are many, sort (`order`), publish. All of it happens in folders beside the stage, of which one
takes the stage's name at the very end: a crash leaves no stage or a whole one, and what is begun is gone on with from its
last checkpoint (`checkpoint`). A stage knows what it was made from; asked for the same again, it is simply there.
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

from retrofill.backfill import (
    checkpoint,
    manifest,
    memory,
    order,
    original,
    people,
    records,
    source,
)
from retrofill.backfill import spill as spills
from retrofill.backfill.checkpoint import Checkpoint, Counted, State
from retrofill.backfill.deadletter import DeadLetters
from retrofill.backfill.intake import ODD, SPILL, SPILLED, Intake, Taken, connect
from retrofill.backfill.journal import locked
from retrofill.backfill.manifest import Duplicates, File, Hot, Kiosk, Manifest, Options
from retrofill.backfill.order import Sorted
from retrofill.backfill.people import Ints, People
from retrofill.backfill.source import Origin, Piece
from retrofill.backfill.spill import Originals, Spill
from retrofill.core.mapping import Mapping
from retrofill.errors import BusyError, InputError

DEAD_LETTERS = "dead-letters.ndjson"
# Rows are sorted where they are, in any order, up to so much text; what is more is dealt out to buckets first, read in order, so
# that no more need be in memory.
PLAIN_BYTES = 1024 * 1024 * 1024
_KEPT_SHARE = 0.6  # ours, of the memory that is free for files: so large may a source be that is gone through several times
# Ours: files of a source that are mapped at once. Each stays open, and a process may have 256 of them, or 1024.
MAPPED_FILES_MAX = 100
_SCRATCH, _MADE = "scratch", "stage.new"
_READ, _SORTED = "read.npz", "sorted.log"
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
    there = manifest.read(work / "stage") or checkpoint.read(work / _SCRATCH)
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
        with contextlib.suppress(BusyError), contextlib.closing(locked(work)):
            _remove(work / _SCRATCH, work / _MADE)  # of a process that was killed when all was done
        return there
    if there is not None and (work / "journal.db").exists():
        raise InputError(
            f"This work directory was begun as import {there.import_id!r} with another source, mapping or option",
            where=str(work),
            mend="Give the same line and source as before, or another --work directory",
        )
    scratch, made = work / _SCRATCH, work / _MADE
    with contextlib.closing(locked(work)):
        begun = checkpoint.read(scratch)
        if begun is None or begun.mark != mark or not _whole(scratch, made, begun):
            _remove(scratch, made)
            for folder in (scratch, made):
                folder.mkdir(parents=True)
            begun = checkpoint.begin(mark, options.import_id)
        elif begun.reading.counted.rows:
            progress("go on", begun.reading.counted.rows)
        kept = Checkpoint(scratch, begun)
        try:
            found = _Staging(work, origins, asked, options, kept, progress).make()
            manifest.publish(made, work / "stage", found)
        except InputError:  # whoever mends it begins anew
            _remove(scratch, made)
            raise
        _remove(scratch, made)
    return found


def _whole(scratch: Path, made: Path, begun: State) -> bool:
    """Say whether all files are there on which a checkpoint counts: who needed room may have removed some."""
    reading, dealing, sorting = begun.reading, begun.dealing, begun.sorting
    sizes = {
        scratch / DEAD_LETTERS: begun.letters.bytes,
        scratch / ODD: 0 if reading.whole else reading.odd,
        scratch / _READ: int(reading.whole),
        scratch / SPILL: 0 if dealing.whole or sorting.bucket else reading.spill,
        scratch / _SORTED: sorting.log,
    }
    for number, size in enumerate(dealing.buckets):
        sizes[scratch / _bucket(number)] = size if number >= sorting.bucket else 0
    sets = [made / order.set_name(number) for number in range(sorting.sets)]
    sizes |= dict.fromkeys(sets[-1:], sorting.end)
    return all(path.exists() for path in sets) and all(
        path.exists() and path.stat().st_size >= size for path, size in sizes.items() if size
    )


def _bucket(number: int) -> str:
    return f"bucket-{number}.arrow"


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(origins: Sequence[Origin], mapping: Mapping, options: Options) -> str:
    parts = (source.fingerprint(origins), mapping.digest, options, manifest.VERSION)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


class _Read(Struct, frozen=True):
    """What is asked of all events together. device, user, count: each pair once. keys: those that several rows have."""

    device: Ints
    user: Ints
    count: Ints
    keys: Ints
    persons: Ints
    times: Ints

    @property
    def borders(self) -> order.Borders:
        """Of the buckets."""
        return order.Borders(self.persons, self.times)

    def write(self, path: Path) -> None:
        """Keep it for whoever goes on."""
        np.savez(path, **msgspec.structs.asdict(self))


def _read(path: Path) -> _Read:
    with np.load(path) as found:
        return _Read(**found)


class _Staging:
    """One stage on its way."""

    def __init__(  # one call's state
        self,
        work: Path,
        origins: Sequence[Origin],
        asked: Asked,
        options: Options,
        kept: Checkpoint,
        progress: Progress,
    ) -> None:
        self.work, self.scratch, self.made = work, work / _SCRATCH, work / _MADE
        self.origins, self.asked, self.options = origins, asked, options
        self.kept, self.state, self.progress = kept, kept.state, progress
        # Batches come and go: Arrow's own pool asks the machine for fresh memory each time, malloc keeps some.
        pa.set_memory_pool(pa.system_memory_pool())
        self.pieces: list[Piece] = source.pieces(
            origins,
            scratch=self.scratch,
            format_name=asked.mapping.format,
            endpoint=asked.endpoint,
        )
        letters = self.scratch / DEAD_LETTERS
        self.letters = DeadLetters(letters, self.state.letters, shown=work / DEAD_LETTERS)

    def save(self) -> None:
        """Make what is done so far the checkpoint."""
        self.state.letters = self.letters.written()
        self.kept.save()

    def make(self) -> Manifest:
        """Do what is left to do. Raises InputError."""
        with self.letters, contextlib.closing(Originals(self.pieces)) as originals:
            try:
                read = self._read()
            except InputError:  # the letters say why: they show the rows, too
                self._show_letters()
                raise
            self._unchanged()
            reading = self.state.reading
            self.progress("sort", reading.counted.rows)
            joined = people.join(read.device, read.user, kiosk_limit=self.options.kiosk_limit)
            hot_devices, hot_users = (
                _hottest(read.device, read.count),
                _hottest(read.user, read.count),
            )
            crowded = _crowded(joined, read.device, read.user, read.count)
            shared = np.array([node for _kind, node, _events in crowded], np.int64)
            sorter = order.Sorter(
                self.made,
                joined,
                self.options,
                keys=read.keys,
                wanted=np.concatenate((hot_devices[0], hot_users[0], shared)),
                refused=lambda file, *rest: self.letters.add_event(self.pieces[file].name, *rest),
                packed=spills.short(self.made, reading.counted.bytes),
                log=self.scratch / _SORTED,
                sorting=self.state.sorting,
                save=self.save,
            )
            found = sorter.run(self._buckets(read, joined, originals), originals)
            self._unchanged()
        self._show_letters()
        _days(self.made, found)
        names = found.names
        return Manifest(
            fingerprint=self.state.mark,
            import_id=self.options.import_id,
            options=self.options,
            mapping=self.asked.mapping.digest,
            files=[File(piece.name, piece.size) for piece in self.pieces],
            sets=found.sets,
            rows=reading.looked_at,
            events=found.events,
            bytes=found.bytes,
            people=found.people,
            devices=_distinct(read.device),
            users=_distinct(read.user),
            first_ms=found.first_ms,
            last_ms=found.last_ms,
            days=_by_day(found),
            types=_by_type(found),
            refused=dict(self.letters.counts.most_common()),
            duplicates=Duplicates(found.same, found.different),
            ids=dict(reading.counted.ids),
            left_out={
                **reading.counted.left_out,
                **({"sample": found.left_out} if found.left_out else {}),
            },
            hot_devices=_named(hot_devices, names),
            hot_users=_named(hot_users, names),
            hot_people=found.hot,
            kiosks=[
                Kiosk(kind, names[node], events) for kind, node, events in crowded if node in names
            ],
        )

    def _read(self) -> _Read:
        """Read the source, or what was left by whoever did."""
        reading, path = self.state.reading, self.scratch / _READ
        if reading.whole:
            return _read(path)
        with contextlib.ExitStack() as opened:
            intake = Intake(
                self.pieces,
                self.asked.mapping,
                self.options,
                lambda: opened.enter_context(connect(self.scratch)),
                self.letters,
            )
            taken = intake.run(
                self.scratch,
                reading,
                save=self.save,
                seen=lambda rows: self.progress("read", rows),
            )
        reading.looked_at = reading.counted.rows + intake.unread
        device, user, count = taken.pairs.compact()
        borders = self._borders(taken, device, user)
        found = _Read(
            device, user, count, order.repeated(taken.keys), borders.persons, borders.times
        )
        found.write(path)
        reading.whole = True
        self.save()
        return found

    def _borders(self, taken: Taken, device: Ints, user: Ints) -> order.Borders:
        counted = self.state.reading.counted
        thin_device, thin_user, time_ms = taken.borders.rows()
        sizes = [piece.size for piece in self.pieces if records.lies_there(piece)]
        few = len(sizes) <= MAPPED_FILES_MAX
        # Of files much larger than what is wanted of them (--since), most would be mapped for nothing.
        as_it_is = not counted.lying or (few and sum(sizes) <= 2 * PLAIN_BYTES)
        if counted.bytes <= PLAIN_BYTES and as_it_is:
            return order.borders(thin_device, time_ms, buckets=1)
        joined = people.join(device, user, kiosk_limit=self.options.kiosk_limit)
        left = self.state.dealing.left = few and _stay(counted, sum(sizes))
        bucket_bytes = order.LAID_BUCKET_BYTES if left else order.BUCKET_BYTES
        buckets = max(2, -(-counted.bytes // bucket_bytes))
        return order.borders(joined.of(thin_device, thin_user), time_ms, buckets=buckets)

    def _buckets(self, read: _Read, joined: People, originals: Originals) -> list[Spill]:
        """Return what is sorted one after another, each in memory at once."""
        dealing = self.state.dealing
        lengths = dealing.buckets or [0] * (len(read.persons) + 1)
        if len(lengths) == 1:
            return [Spill(self.scratch / SPILL, SPILLED, length=self.state.reading.spill)]
        schema = SPILLED if dealing.left else order.DEALT
        buckets = [
            Spill(self.scratch / _bucket(at), schema, length=length)
            for at, length in enumerate(lengths)
        ]
        if not dealing.whole:
            spill = Spill(self.scratch / SPILL, SPILLED, length=self.state.reading.spill)
            order.deal(
                spill, read.borders, joined, originals, buckets, dealing=dealing, save=self.save
            )
            self._unchanged()
            dealing.whole = True
            self.save()
        (self.scratch / SPILL).unlink(missing_ok=True)
        return buckets

    def _unchanged(self) -> None:
        """Raise InputError if a file is another one than it was in which texts were left."""
        left = {piece.place for piece in self.pieces if records.lies_there(piece)}
        for origin in self.origins:
            if origin.place in left and not source.same(origin):
                raise spills.changed(origin.name)

    def _show_letters(self) -> None:
        """Put the letters beside the stage, with the rows of those that hold events."""
        letters, told = self.letters, self.asked.mapping.delimiter
        letters.close()
        original.staged(letters.path, letters.shown, self.pieces, letters.events, told)


def _stay(counted: Counted, size: int) -> bool:
    """Say whether texts stay in the source until they are sorted: most are there, and the system can keep it in memory.

    size: of the files in which they are.
    """
    room = min(order.LAID_SOURCE_BYTES_MAX, int(memory.available() * _KEPT_SHARE))
    return counted.bytes < 2 * counted.lying and size <= room


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
