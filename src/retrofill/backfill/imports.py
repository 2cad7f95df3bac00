"""Asking our own server about an import: what it is, that it be undone, that it be brought back.

Only Retrofill can do this. A server that its /healthz does not name as ours is never sent the keys.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import msgspec
from msgspec import Struct

from retrofill.backfill import ours
from retrofill.backfill.journal import GENERATION, Ledger, set_aside
from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import Target, names_retrofill
from retrofill.backfill.readback import READ_S
from retrofill.errors import FinalError, RetryError

CHANGE_S = 6 * 3600.0  # ours: an undo or a restore of a large import may take so long to answer


class Shown(Struct, frozen=True):
    """An import as the server shows it, as far as the client looks. Times in ms since the epoch."""

    name: str
    state: str
    generation: int
    events: int
    identifies: int
    people: int
    first_event_ms: int | None = None
    last_event_ms: int | None = None
    duplicates: int = 0
    tries: int = 0
    reason: str | None = None

    @property
    def undone(self) -> bool:
        """Whether nothing of it is left."""
        return self.state == "undone"

    @property
    def next_generation(self) -> int:
        """The generation that rows sent now belong to."""
        return self.generation + self.undone


class Effects(Struct, frozen=True):
    """What an import did to others, as the server counts it: see its documentation."""

    only_here: int
    first_seen: int
    properties: int
    merges: int
    repeats: int


def show(to: Target, keys: Keys, name: str) -> Shown | None:
    """Return an import of our own server, None if there is none. Raises FinalError, RetryError."""
    return _ask(to, keys, name, "GET", seconds=READ_S)


def effects(to: Target, keys: Keys, name: str) -> Effects | None:
    """Return what an undo would change in others, None if the server cannot tell. Raises FinalError, RetryError."""
    path = f"/api/1/imports/{quote(name, safe='')}/effects"
    return ours.ask(to, keys, "GET", path, Effects, seconds=READ_S)


def opened(to: Target, keys: Keys, name: str) -> None:
    """Tell our own server that an import begins or goes on. Raises FinalError, RetryError."""
    body = msgspec.json.encode({"name": name})
    ours.ask(to, keys, "POST", "/api/1/imports", Shown, seconds=READ_S, body=body)


def closed(to: Target, keys: Keys, name: str) -> None:
    """Tell our own server that all of an import was sent. Raises FinalError, RetryError."""
    _ask(to, keys, name, "POST", "/close", seconds=READ_S)


def undo(to: Target, keys: Keys, name: str) -> Shown:
    """Undo an import; all of it is undone when this returns. Raises FinalError, RetryError."""
    found = _ask(to, keys, name, "DELETE", seconds=CHANGE_S)
    return _ended(found, name, undone=True)


def restore(to: Target, keys: Keys, name: str) -> Shown:
    """Bring an undone import back; all of it is there when this returns. Raises FinalError, RetryError."""
    found = _ask(to, keys, name, "POST", "/restore", seconds=CHANGE_S)
    return _ended(found, name, undone=False)


def cancel(to: Target, keys: Keys, name: str) -> Shown:
    """Call off an undo or restore that has changed nothing yet. Raises FinalError, RetryError."""
    found = _ask(to, keys, name, "POST", "/cancel", seconds=CHANGE_S)
    if found is None:
        raise unknown(name)
    return found


def unknown(name: str) -> FinalError:
    """Return the error for an import that the destination does not have."""
    return FinalError(
        f"The destination has no import {name!r}",
        mend="`GET /api/1/imports` lists those of the project whose keys are given",
    )


class Begun(Struct, frozen=True):
    """What the destination says of the import of a run. generation: the one that its rows belong to, None if unknown.

    aside: where the journal of an undone generation is now, None if there was none to set aside. problem: why it is not known.
    """

    generation: int | None = None
    aside: Path | None = None
    problem: str = ""


def begin(work: Path, to: Target, keys: Keys, name: str) -> Begun:
    """Say which generation of an import a run sends, and set its journal aside if that speaks of one that is undone.

    Only our own server has generations, and only both keys can ask it. Raises BusyError; FinalError if it refuses the
    keys; RetryError while it undoes or restores the import.
    """
    if not (keys.secret_key and to.ours and names_retrofill(to.read)):
        return Begun()
    try:
        found = show(to, keys, name)
    except RetryError as problem:
        return Begun(problem=problem.what)
    if found is None:
        return Begun(1)
    if found.state in {"undoing", "restoring"}:
        raise RetryError(
            f"The import {name} is {found.state} at the destination",
            mend="Run the same line again when that is done; `retrofill undo --cancel` calls off what cannot be done",
        )
    now = found.next_generation
    if not (work / "journal.db").exists():
        return Begun(now)
    facts = _facts(work)
    if facts.get("destination") != to.name or facts.get("import") != name:
        return Begun(now)
    # A journal that knows no generation was begun without the secret key.
    before = int(facts.get(GENERATION, now - found.undone))
    return Begun(now, set_aside(work, before) if before < now else None)


def undone_meanwhile(to: Target, keys: Keys, name: str, generation: int) -> bool:
    """Say whether the generation of an import that was sent is undone by now, or is being undone. Raises FinalError, RetryError."""
    found = show(to, keys, name)
    return found is not None and (found.state == "undoing" or found.next_generation > generation)


def need_not_undone(work: Path, to: Target, keys: Keys) -> None:
    """Raise FinalError if the import of a work directory is undone at our own server: what is missing there is meant to be."""
    if not (keys.secret_key and to.ours and names_retrofill(to.read)):
        return
    name = _facts(work).get("import", "")
    found = show(to, keys, name)
    if found is not None and found.undone:
        raise FinalError(
            f"The import {name} is undone at {to.name}",
            mend=f"`retrofill undo {name} --restore` brings it back; `retrofill run` sends it again, as its next generation",
        )


def _facts(work: Path) -> dict[str, str]:
    ledger = Ledger(work)
    try:
        return ledger.meta()
    finally:
        ledger.close()


def _ended(found: Shown | None, name: str, *, undone: bool) -> Shown:
    if found is None:
        raise unknown(name)
    if found.undone is not undone:
        raise RetryError(
            f"The import {name} is {found.state} after all: something else changed it meanwhile",
            mend="Run the same line again",
        )
    return found


def _ask(
    to: Target, keys: Keys, name: str, method: str, end: str = "", *, seconds: float
) -> Shown | None:
    path = f"/api/1/imports/{quote(name, safe='')}{end}"
    return ours.ask(to, keys, method, path, Shown, seconds=seconds)
