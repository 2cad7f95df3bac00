"""How far staging is, so that after SIGKILL, at whatever moment, it goes on there.

Every step of staging only adds to files. A checkpoint says how long they are, and which part of the source or of an earlier
step that is. It is written beside and renamed: a kill leaves the one before or this one. What stands in the files behind
it is cut off, and done once more; nothing else is. Nothing is synced for it: a killed process loses nothing that it has
written. A machine that stopped may have lost anything, so a checkpoint counts only until the machine is started again, and
only for the same source, mapping and options under the same program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, field

from retrofill import __version__
from retrofill.backfill.deadletter import Written
from retrofill.backfill.records import Place

FORMAT: Final = 2
_NAME: Final = "checkpoint.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Counted(Struct, kw_only=True):
    """What was counted of the rows that are read. bytes: of events, lying: of these, what was left in the source.

    unreadable: rows that only the query found to be no JSON. ids: that were taken away, by why. left_out: by the bound.
    """

    rows: int = 0
    events: int = 0
    bytes: int = 0
    lying: int = 0
    unreadable: int = 0
    ids: dict[str, int] = {}
    left_out: dict[str, int] = {}


class Reading(Struct, kw_only=True):
    """How far the source is read. piece, place: where the next record is.

    odd: bytes of the rows that were put aside for the query, odd_read: how many of these are through it. spill: bytes of
    the events. looked_at: rows, once all are read.
    """

    piece: int = 0
    place: Place = field(default_factory=Place)
    odd: int = 0
    odd_read: int = 0
    spill: int = 0
    counted: Counted = field(default_factory=Counted)
    looked_at: int = 0
    whole: bool = False


class Dealing(Struct, kw_only=True):
    """How far the events are dealt out. left: less the texts that are in the source. spill: bytes of those that are out.

    buckets: bytes of each.
    """

    left: bool = False
    spill: int = 0
    buckets: list[int] = []
    whole: bool = False


class Sorting(Struct, kw_only=True):
    """How far the sets are written: rows of a bucket in their order. log: bytes of what was counted, see `order`.

    sets: how many are begun. end: bytes of the last one.
    """

    bucket: int = 0
    row: int = 0
    log: int = 0
    sets: int = 0
    end: int = 0


class State(Struct, kw_only=True):
    """One checkpoint. mark: what the stage is made of."""

    mark: str
    import_id: str
    format: int = FORMAT
    version: str = __version__
    boot: str = ""
    letters: Written = field(default_factory=Written)
    reading: Reading = field(default_factory=Reading)
    dealing: Dealing = field(default_factory=Dealing)
    sorting: Sorting = field(default_factory=Sorting)


class Checkpoint:
    """The checkpoint of one stage. state: changed in place, then saved."""

    def __init__(self, scratch: Path, state: State) -> None:
        self._path = scratch / _NAME
        self.state = state

    def save(self) -> None:
        """Make the state the one that counts. All files are as long as it says."""
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(self.state))
        fresh.replace(self._path)


def begin(mark: str, import_id: str) -> State:
    """Return the state in which nothing is done."""
    return State(mark=mark, import_id=import_id, boot=_boot())


def read(scratch: Path) -> State | None:
    """Return what a stage has left that can be gone on with, None if there is nothing of the kind."""
    try:
        found = msgspec.json.decode((scratch / _NAME).read_bytes(), type=State)
    except (FileNotFoundError, msgspec.DecodeError):  # none, or of another version
        return None
    same = (found.format, found.version, found.boot) == (FORMAT, __version__, _boot())
    return found if same and found.boot else None


def _boot() -> str:
    """Return what differs whenever the machine was started anew; "" where nobody says so."""
    return _BOOT.read_text().strip() if _BOOT.exists() else ""
