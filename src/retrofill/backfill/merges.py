"""Asking our own server about merges: which there are, and that one be taken back."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from msgspec import Struct

from retrofill.backfill import ours
from retrofill.backfill.imports import CHANGE_S
from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import Target
from retrofill.backfill.readback import READ_S


class Merge(Struct, frozen=True):
    """A merge as the server lists it."""

    id: str
    state: str
    absorbed: int
    surviving: int
    user_id: str | None
    device_id: str | None
    uuid: str
    event_type: str | None
    server_upload_time_ms: int | None
    imported_by: str | None
    unmerged_ms: int | None


class _Merges(Struct):
    merges: list[Merge]


def merges(to: Target, keys: Keys, asked: dict[str, str]) -> list[Merge]:
    """Return merges, the newest first. asked: parameters of `GET /api/1/merges`. Raises FinalError, RetryError."""
    given = urlencode({name: value for name, value in asked.items() if value})
    path = f"/api/1/merges?{given}"
    found = ours.ask(to, keys, "GET", path, _Merges, seconds=READ_S, may_miss=False)
    assert found is not None
    return found.merges


class Held(Struct, frozen=True):
    """A user_id that joins more people than its project allows, as the server lists it."""

    user_id: str
    amplitude_id: int
    merged: int
    devices: int
    events: int
    first_event_time_ms: int
    last_event_time_ms: int
    last_server_upload_time_ms: int
    allowed: bool


class _Holding(Struct):
    held: list[Held]


def held(to: Target, keys: Keys, limit: int) -> list[Held]:
    """Return the users who hold people apart, those with most devices first. Raises FinalError, RetryError."""
    path = f"/api/1/merges/held?limit={limit}"
    found = ours.ask(to, keys, "GET", path, _Holding, seconds=READ_S, may_miss=False)
    assert found is not None
    return found.held


def restore(to: Target, keys: Keys, one: str) -> list[Merge]:
    """Let a merge taken back stand again; return it, if its event merges anybody now. Raises FinalError, RetryError."""
    path = f"/api/1/merges/{quote(one, safe='')}/restore"
    found = ours.ask(to, keys, "POST", path, _Merges, seconds=CHANGE_S)
    assert found is not None, "only a GET finds nothing"
    return found.merges


def unmerge(to: Target, keys: Keys, one: str) -> Merge:
    """Take a merge back; it is when this returns. Raises FinalError, RetryError."""
    path = f"/api/1/merges/{quote(one, safe='')}"
    found = ours.ask(to, keys, "DELETE", path, Merge, seconds=CHANGE_S)
    assert found is not None, "only a GET finds nothing"
    return found
