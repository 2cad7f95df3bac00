"""May this request in? Silenced devices, rates, the daily quota, and aliases that cannot be.

One `Admission` a project: nothing that happens in one is felt in another. Only requests that are let in are counted;
rates count every event, the quota counts stored rows of kind EVENT. So the quota is asked with all events of a request
as an upper bound; a request that might pass it is judged alone, once everything before it has been counted exactly and
its duplicates are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from retrofill.core.block import Kind
from retrofill.core.event import Batch, Event, Refusal
from retrofill.core.throttle import (
    ProjectRates,
    Quota,
    Rates,
    Silenced,
    Tally,
    Throttled,
    silence,
    with_quota,
)
from retrofill.engine.state import State
from retrofill.errors import InputError
from retrofill.limits import BLOCK_EVENTS_MAX, PROFILES, Limits

_NOT_COUNTED = frozenset({"$identify", "$groupidentify"})
_NO_ROWS = frozenset({"/identify", "/groupidentify", "/usermap"})

Ids = list[str | None]
PropertyTime = Literal["arrival", "event"]


class ProjectSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator sets for one project. limits: fields of `Limits` that differ from the profile.

    property_time: in which order properties, identity and first events are folded; see `engine.event_time`.
    merge_always: user_ids that may absorb any number of people.
    """

    limits: dict[str, Any] = {}
    silenced_devices: list[str] = []
    property_time: PropertyTime = "arrival"
    merge_always: list[str] = []


class Admission:
    """The gate of one project."""

    def __init__(
        self, project: int, settings: ProjectSettings, *, profile: str, state: State
    ) -> None:
        self._project = project
        self._profile = PROFILES[profile]
        self._state = state
        self._rates: dict[str, Rates] = {}
        self._project_rates = ProjectRates()
        self._mappings = Tally()
        self._quota = Quota()
        self.change(settings)

    def limits_of(self, settings: ProjectSettings) -> Limits:
        """Return the limits that settings make of the profile. Raises InputError naming the one that cannot be."""
        unknown = settings.limits.keys() - set(Limits.__struct_fields__)
        if unknown:
            raise InputError(
                f"There is no limit named {', '.join(sorted(unknown))}",
                mend="docs/limits.md names them all",
            )
        try:
            return msgspec.convert(
                {**msgspec.to_builtins(self._profile), **settings.limits}, Limits
            )
        except msgspec.ValidationError as problem:
            raise InputError(
                f"A limit cannot be: {problem}", mend="See docs/limits.md"
            ) from problem

    def change(self, settings: ProjectSettings) -> None:
        """Take other settings. Raises InputError as `limits_of` does."""
        self.limits = self.limits_of(settings)
        self.settings = settings
        self._silenced = frozenset(settings.silenced_devices)
        self.merge_always = frozenset(settings.merge_always)

    def eps(self, path: str) -> int:
        """Return the rate of each device and user on this path, 0 if it is off."""
        limits = self.limits
        if path == "/batch":
            return limits.batch_eps
        if path == "/2/httpapi":
            return limits.httpapi_eps
        if path in ("/identify", "/groupidentify"):
            return limits.identify_eps
        return limits.legacy_eps

    def admit(self, batch: Batch, *, now_ms: int) -> Throttled | Silenced | Refusal | None:
        """Say why a request is refused by silence, rate or meaning. None lets it in, as far as the quota does."""
        if batch.path == "/usermap":
            return self._throttled_mappings(batch, now_ms=now_ms) or self._aliases(batch)
        eps, limits = self.eps(batch.path), self.limits
        throttled = None
        if limits.project_eps or limits.project_requests_per_s:
            throttled = self._project_rates.check(
                len(batch.events),
                eps=limits.project_eps,
                requests_per_s=limits.project_requests_per_s,
                window_s=limits.window_s,
                now_ms=now_ms,
            )
        if throttled is None and eps:
            rates = self._rates.get(batch.path) or self._rates.setdefault(batch.path, Rates())
            throttled = rates.check(
                *ids_of(batch.events), eps=eps, window_s=limits.window_s, now_ms=now_ms
            )
        if self._silenced:
            silenced = silence(throttled, ids_of(batch.events)[0], self._silenced, eps=eps)
            return silenced or throttled
        return throttled

    def _throttled_mappings(self, batch: Batch, *, now_ms: int) -> Throttled | None:
        limits = self.limits
        if not limits.usermap_per_s:
            return None
        # One is asked for, not all: a request may hold more mappings than a window allows, and it is the
        # window that has to fall below. Source: contract, ingest 3b.
        wait_s = self._mappings.wait_s(
            1,
            most=limits.usermap_per_s * limits.window_s,
            window_s=limits.window_s,
            now_ms=now_ms,
        )
        if not wait_s:
            return None
        rows = list(range(len(batch.events)))
        return Throttled(limits.usermap_per_s, {}, {}, {}, {}, rows, wait_s)

    def _aliases(self, batch: Batch) -> Refusal | None:
        """One level and no cycles. Source: contract, identity 4."""
        aliases = dict(self._state.project(self._project).aliases)
        for event in batch.events:
            user, said = event.user_id or "", event.user_properties or {}
            if said.get("unmap"):
                aliases.pop(user, None)
                continue
            to = said["global_user_id"]
            if to == user or to in aliases or user in aliases.values():
                return Refusal("bad_mapping")
            aliases[user] = to
        return None

    def count(self, batch: Batch, *, now_ms: int) -> None:
        """The request is let in: count its events."""
        limits = self.limits
        if batch.path == "/usermap":
            self._mappings.count(len(batch.events), window_s=limits.window_s, now_ms=now_ms)
            return
        if limits.project_eps or limits.project_requests_per_s:
            self._project_rates.count(len(batch.events), window_s=limits.window_s, now_ms=now_ms)
        if self.eps(batch.path):
            self._rates[batch.path].count(
                *ids_of(batch.events), window_s=limits.window_s, now_ms=now_ms
            )

    # The daily quota.

    def near_quota(self, batch: Batch, *, now_ms: int) -> bool:
        """Say whether the request might pass the quota of an id, whatever else its block holds."""
        quota = self.limits.daily_quota
        if not quota:
            return False
        # The most that one block can hold: it takes requests until it is full, and the last one may be large.
        most = BLOCK_EVENTS_MAX + self.limits.batch_events
        if quota <= most:
            return True
        over = self._quota.over(*stored_ids(batch, None), limit=quota - most, now_ms=now_ms)
        return bool(over[0] or over[1])

    def over_quota(self, batch: Batch, dropped: Sequence[int], *, now_ms: int) -> Throttled | None:
        """Say whether the request passes the quota of an id. dropped: true for each duplicate."""
        over = self._quota.over(
            *stored_ids(batch, dropped), limit=self.limits.daily_quota, now_ms=now_ms
        )
        return with_quota(
            None, *ids_of(batch.events), over, eps=self.eps(batch.path), now_ms=now_ms
        )

    def stored(self, batch: Batch, kinds: bytes) -> tuple[Ids, Ids]:
        """Return what `count_stored` needs to know of a request, whose rows are of these kinds."""
        if not self.limits.daily_quota:
            return [], []
        return stored_ids(batch, [kind != Kind.EVENT for kind in kinds] if any(kinds) else None)

    def count_stored(self, devices: Ids, users: Ids, *, now_ms: int) -> None:
        """Count the rows that a block stored of a request: the ids that `stored` gave."""
        if devices:
            self._quota.add(devices, users, now_ms=now_ms)

    def count_again(
        self,
        devices: Iterable[tuple[int, str, int]],
        users: Iterable[tuple[int, str, int]],
        *,
        now_ms: int,
    ) -> None:
        """So many rows of the past more, or less, are stored: (hour, id, rows)."""
        if self.limits.daily_quota:
            self._quota.change(devices, users, now_ms=now_ms)

    def load_quota(
        self,
        devices: Iterable[tuple[int, dict[str, int]]],
        users: Iterable[tuple[int, dict[str, int]]],
    ) -> None:
        """Take what the lake holds of the last day: (hour, id → rows), oldest first."""
        self._quota.load(devices, users)


def ids_of(events: list[Event]) -> tuple[Ids, Ids]:
    """Return the devices and the users of these events, one entry an event."""
    return (
        [event.device_id or None for event in events],
        [event.user_id for event in events],
    )


def stored_ids(batch: Batch, dropped: Sequence[int] | None) -> tuple[Ids, Ids]:
    """Return the devices and users of the events that become counted rows, one entry each."""
    if batch.path in _NO_ROWS:
        return [], []
    events = batch.events
    if dropped is not None:
        events = [event for event, gone in zip(events, dropped, strict=True) if not gone]
    return ids_of([event for event in events if event.event_type not in _NOT_COUNTED])
