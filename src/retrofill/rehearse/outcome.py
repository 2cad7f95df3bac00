"""What a rehearsal found, as it is shown, stored in the work directory and compared with what came of the import."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
from msgspec import Struct

from retrofill.backfill.rehearsed import FILE, VERDICT
from retrofill.core.person import Person
from retrofill.engine.history import Someone

__all__ = ["BEFORE", "FILE", "VERDICT", "Outcome"]
VERSION = 1
BEFORE = "rehearsal-before.gz"


class ByDay(Struct, frozen=True):
    """People of the whole project by UTC day, before the import and after it."""

    before: dict[str, int]
    after: dict[str, int]


class Moved(Struct, frozen=True):
    """One live person whose first event is another one afterwards. Times in ms."""

    user_id: str | None
    before_ms: int
    after_ms: int


class FirstSeen(Struct, frozen=True):
    """Live people whose first-seen time moves. days_*: how far. spread: people by distance. listed: those who move farthest."""

    moved: int = 0
    days_median: float = 0.0
    days_max: float = 0.0
    spread: dict[str, int] = {}
    listed: list[Moved] = []


class Change(Struct, frozen=True):
    """One property of live people that changes from one value to another. Values are JSON text, None where it is not set.

    built_in: a column such as country, not a property that was sent.
    """

    name: str
    built_in: bool
    old: str | None
    new: str | None
    people: int


class Properties(Struct, frozen=True):
    """What changes in the property tables of live people. people: who has any change. names: people by property."""

    people: int = 0
    names: dict[str, int] = {}
    listed: list[Change] = []


class Merge(Struct, frozen=True):
    """Somebody anonymous who is shown to be a user: counted as one from then on. was_live: was there before."""

    user_id: str | None
    was_live: bool


class Double(Struct, frozen=True):
    """People who are probably one, and the evidence. ids: their user_ids, "" for an anonymous one. live: one was there before."""

    evidence: str
    value: str
    ids: list[str]
    live: bool


class Shared(Struct, frozen=True):
    """A device of many users. users: afterwards; before: without the import."""

    device_id: str
    users: int
    before: int


class Held(Struct, frozen=True):
    """A user who joins more people than the project allows. devices: of those who stay apart by events of the import."""

    user_id: str
    devices: int


class Volume(Struct, frozen=True):
    """How much is sent. events: that the destination takes; stored: less duplicates. billed: those that count there."""

    events: int
    stored: int
    billed: int
    requests: int
    bytes: int
    people: int


class Waiting(Struct, frozen=True):
    """An id that the destination's limits hold back. why: `rate` or `daily quota`."""

    kind: str
    id: str
    why: str


class Outcome(Struct, frozen=True, kw_only=True):
    """A rehearsal.

    against: as it was said. kind: `server`, `export` or `nothing`. exact: nothing is estimated. unknown: what cannot be
    known, in words. block, at_ms: the position it was made at, 0 if there is none. sample: the part of the people.
    synced, skipped: properties with `$skip_user_properties_sync` off and on; None if that was not rehearsed.
    doubles, shared, waiting, merges, held: the first hundred; each has its count beside it. imported_*: of the same import,
    before.
    """

    version: int = VERSION
    import_id: str
    against: str
    kind: str
    exact: bool
    unknown: list[str]
    warnings: list[str]
    block: int
    at_ms: int
    sample: float
    skip_user_properties_sync: bool
    property_time: str
    volume: Volume
    new_users: ByDay
    active_users: ByDay
    new_people: int
    first_seen: FirstSeen
    synced: Properties | None
    skipped: Properties | None
    merged: int
    merges: list[Merge]
    doubled: int
    evidence: dict[str, int]
    doubles: list[Double]
    shared_devices: int
    shared: list[Shared]
    duplicates: int
    refused: dict[str, int]
    refused_before: dict[str, int]
    throttled: int
    waiting: list[Waiting]
    quota_days: int
    duration_s: float
    imported_rows: int
    imported_duplicates: int
    held_users: int = 0
    held: list[Held] = []

    @property
    def properties(self) -> Properties:
        """What changes if the import is run as it is staged."""
        found = self.skipped if self.skip_user_properties_sync else self.synced
        return found or Properties()


_decode = msgspec.json.Decoder(Outcome).decode
_before = msgspec.msgpack.Decoder(list[Someone]).decode


def store(work: Path, found: Outcome, before: dict[int, Person]) -> None:
    """Keep a rehearsal in the work directory, with the live people as they were. It takes the place of an earlier one.

    A kill on the way leaves none: people as they were never stand beside another rehearsal's figures.
    """
    for name in (FILE, VERDICT):
        (work / name).unlink(missing_ok=True)
    people = msgspec.msgpack.encode([Someone.of(one) for one in before.values()])
    (work / BEFORE).write_bytes(gzip.compress(people, 1))
    made = work / f"{FILE}.new"
    made.write_bytes(msgspec.json.encode(found) + b"\n")
    made.rename(work / FILE)


def read(work: Path) -> Outcome | None:
    """Return the rehearsal of a work directory, None if there is none or another version wrote it."""
    path = work / FILE
    try:
        return _decode(path.read_bytes())
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def read_before(work: Path) -> dict[int, Person]:
    """Return the live people as they were."""
    found = _before(gzip.decompress((work / BEFORE).read_bytes()))
    return {one.amplitude_id: one.person() for one in found}
