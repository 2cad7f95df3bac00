"""What a stage holds, as it stands in `WORK/stage/manifest.json`. Its being there says that the stage is whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from retrofill.errors import CorruptError, InputError

VERSION: Final = 3


class Options(Struct, frozen=True, kw_only=True):
    """What was asked of a stage.

    sets: for how many senders. bad_rows: part of the rows that may be refused. since_ms (counts in), until_ms (left out),
    until_types (the same for one event type): bounds of event time. sample: part of the people, 1 = all.
    """

    import_id: str
    skip_user_properties_sync: bool = True
    sets: int = 16
    kiosk_limit: int = 10
    id_length_min: int = 5
    bad_rows: float = 0.05
    since_ms: int | None = None
    until_ms: int | None = None
    until_types: dict[str, int] = {}
    sample: float = 1.0


class File(Struct, frozen=True):
    """One piece of the source: the `file` of a row counts in these."""

    name: str
    size: int


class SetFile(Struct, frozen=True):
    """One sender's set."""

    path: str  # beside the manifest
    events: int
    bytes: int
    people: int


class Hot(Struct, frozen=True):
    """An id with many events."""

    id: str
    events: int


class HotPerson(Struct, frozen=True):
    """A person with many events: rows seq … seq + events - 1 of a set."""

    person: int
    set: int
    seq: int
    events: int


class Kiosk(Struct, frozen=True):
    """An id that joins nobody, since it would have joined too many."""

    kind: str  # device or user
    id: str
    events: int


class Duplicates(Struct, frozen=True):
    """Rows whose insert_id an earlier row of the same device has: not staged.

    same: with the same content. different: with another; these are dead letters.
    """

    same: int = 0
    different: int = 0


class Manifest(Struct, frozen=True, kw_only=True):
    """A whole stage.

    rows: looked at, those that `where` leaves out aside. days: events by UTC day. types: by event type; days.parquet has
    both together. refused: dead letters by kind. ids: events that lost an id, by reason. left_out: by bound or sample.
    """

    version: int = VERSION
    fingerprint: str
    import_id: str
    options: Options
    mapping: str
    files: list[File]
    sets: list[SetFile]
    rows: int
    events: int
    bytes: int
    people: int
    devices: int
    users: int
    first_ms: int | None
    last_ms: int | None
    days: dict[str, int]
    types: dict[str, int]
    refused: dict[str, int]
    duplicates: Duplicates
    ids: dict[str, int]
    left_out: dict[str, int]
    hot_devices: list[Hot]
    hot_users: list[Hot]
    hot_people: list[HotPerson]
    kiosks: list[Kiosk]

    @property
    def updates(self) -> bool:
        """Whether events can be property updates: beside $skip_user_properties_sync identify calls are, and they alone."""
        return not self.options.skip_user_properties_sync or "$identify" in self.types


def read(stage: Path) -> Manifest | None:
    """Return the manifest of a stage folder, None if there is no whole stage.

    Raises CorruptError when the file is not one, InputError when another version wrote it.
    """
    path = stage / "manifest.json"
    if not path.exists():
        return None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise CorruptError(
            f"The stage's manifest cannot be read: {error}",
            where=str(path),
            mend="Remove the folder; the stage is made anew from the source",
        ) from error
    if found.version != VERSION:
        raise InputError(
            f"The stage has version {found.version}, this program reads {VERSION}",
            where=str(path),
            mend="Finish the run with the version that began it; where nothing was sent (there is no journal.db), remove "
            "the folder, and the stage is made anew",
        )
    return found


def publish(made: Path, stage: Path, manifest: Manifest) -> None:
    """Put a finished folder in the stage's place. A crash leaves the old stage, none, or the new one, never a half."""
    (made / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    for path in made.iterdir():
        _sync(path)
    _sync(made)
    if stage.exists():
        # Without its manifest it is no stage any more; then it can be taken apart.
        (stage / "manifest.json").unlink(missing_ok=True)
        _sync(stage)
        for path in stage.iterdir():
            path.unlink()
        stage.rmdir()
    made.rename(stage)
    _sync(stage.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
