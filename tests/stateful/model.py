"""The simplest server that could be right: lists and dicts, one event after another, nothing remembered twice.

It shares no code with the engine. It knows the rules of the contract for what the stateful test sends, and nothing of
blocks, lakes, caches or time spent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

WEEK_MS = 7 * 24 * 3_600_000


@dataclass
class Someone:
    """One person: the owner's user_id, the table, the earliest event."""

    owner: str | None = None
    table: dict[str, Any] = field(default_factory=dict)
    platform: str | None = None
    first_seen_ms: int | None = None
    changed_ms: int = -1
    absorbed_by: int | None = None


@dataclass
class Displaced:
    """What must be kept, hidden, of an event that an import's row displaced."""

    insert_id: str | None
    event_type: str
    user_id: str | None
    sent: dict[str, Any] | None
    import_id: str | None


@dataclass
class Row:
    """What a reader must find of one stored event."""

    insert_id: str | None
    event_type: str
    person: int
    user_id: str | None
    properties: dict[str, Any]
    platform: str | None
    time_ms: int
    groups: dict[str, list[str]]
    group_properties: dict[str, dict[str, Any]]


class Model:
    """One project."""

    def __init__(self) -> None:
        self.people: list[Someone] = []
        self.device_of: dict[str, int] = {}
        self.user_of: dict[str, int] = {}
        self.aliases: dict[str, str] = {}
        self.rows: list[Row] = []
        self.groups: dict[tuple[str, str], dict[str, Any]] = {}
        self.displaced: list[Displaced] = []
        self.seen: dict[tuple[str, str], tuple[int, str | None]] = {}  # when, of which import
        self.seen_by_imports: set[tuple[str, str, str]] = set()

    def survivor(self, person: int) -> int:
        """Follow a merge."""
        into = self.people[person].absorbed_by
        return person if into is None else into

    def take(self, event: dict[str, Any], *, now_ms: int) -> None:  # noqa: C901 - every rule there is
        """Take one accepted event."""
        user, device = event.get("user_id"), event.get("device_id") or ""
        if user is not None and not device:
            device = f"of {user}"
        if event.get("insert_id") is not None and self._repeats(event, user, device, now_ms):
            return
        groups = {kind: aslist(value) for kind, value in (event.get("groups") or {}).items()}
        if event["event_type"] == "$groupidentify":
            for group in pairs(groups):
                before = self.groups.get(group, {})
                self.groups[group] = changed(before, event.get("group_properties") or {})
            return
        who = self._who(user, device)
        someone = self.people[who]
        sent = event.get("user_properties") or {}
        platform = event.get("platform")
        identify = event["event_type"] == "$identify"
        if event.get("$skip_user_properties_sync") and not identify:
            table, shown_platform = changed({}, sent), platform
        else:
            table = changed(someone.table, sent)
            shown_platform = platform if platform is not None else someone.platform
            if (table, shown_platform) != (someone.table, someone.platform):
                someone.changed_ms = now_ms
            someone.table, someone.platform = table, shown_platform
        if identify:
            return
        time_ms = event.get("time", now_ms)
        if someone.first_seen_ms is None or time_ms < someone.first_seen_ms:
            someone.first_seen_ms = time_ms
        shown: dict[str, dict[str, Any]] = {}
        for kind, value in pairs(groups):
            if self.groups.get((kind, value)):
                shown.setdefault(kind, {})[value] = self.groups[kind, value]
        said = (
            event.get("insert_id"),
            event["event_type"],
            who,
            user,
            dict(table),
            shown_platform,
            time_ms,
        )
        self.rows.append(Row(*said, groups, shown))

    def map(self, user: str, to: str | None) -> bool:
        """Map a user to another, or back to itself; say whether it can be: one level, no circle."""
        others = {one: into for one, into in self.aliases.items() if one != user or to}
        if to is not None:
            if to == user or to in others or user in others.values():
                return False
            others[user] = to
        self.aliases = others
        return True

    def _repeats(self, event: dict[str, Any], user: str | None, device: str, now_ms: int) -> bool:
        """Say whether an event is a duplicate; keep it if an import's row is what it repeats."""
        insert_id, import_id = event["insert_id"], None
        if "ingestion_metadata" in event:
            import_id = event["ingestion_metadata"]["source_version"]
            if (import_id, device, insert_id) in self.seen_by_imports:
                return True
        since, holder = self.seen.get((device, insert_id), (-WEEK_MS, None))
        duplicate = now_ms - since < WEEK_MS
        if duplicate and holder is None:
            return True
        if import_id is not None:
            self.seen_by_imports.add((import_id, device, insert_id))
        if not duplicate:
            self.seen[device, insert_id] = (now_ms, import_id)
            return False
        group = event["event_type"] == "$groupidentify"
        sent = event.get("group_properties" if group else "user_properties") or None
        self.displaced.append(Displaced(insert_id, event["event_type"], user, sent, import_id))
        return True

    def _new(self, owner: str | None) -> int:
        self.people.append(Someone(owner))
        return len(self.people) - 1

    def _who(self, user: str | None, device: str) -> int:
        there = self.device_of.get(device)
        if there is not None:
            there = self.survivor(there)
        if user is None:
            who = self._new(None) if there is None else there
        elif user in self.user_of:
            who = self.user_of[user]
            if there is not None and there != who and self.people[there].owner is None:
                self._merge(there, who)
        elif there is not None and self.people[there].owner is None:
            who = there
            self.people[who].owner = user
        else:
            who = self._new(user)
        if user is not None:
            self.user_of[user] = who
        self.device_of[device] = who
        return who

    def _merge(self, absorbed: int, surviving: int) -> None:
        one, other = self.people[surviving], self.people[absorbed]
        older, newer = (other, one) if one.changed_ms > other.changed_ms else (one, other)
        one.table = {**older.table, **newer.table}
        one.platform = newer.platform if newer.platform is not None else older.platform
        one.changed_ms = max(one.changed_ms, other.changed_ms)
        seen = [t for t in (one.first_seen_ms, other.first_seen_ms) if t is not None]
        one.first_seen_ms = min(seen, default=None)
        other.absorbed_by = surviving

    def active(self) -> dict[str, int]:
        """How many people have a counted event in each month; who is mapped counts as whom it is mapped to."""
        found: dict[str, set[object]] = {}
        for row in self.rows:
            who = self.survivor(row.person)
            owner = self.people[who].owner
            counted = who if owner is None else self.aliases.get(owner, owner)
            month = f"{datetime.fromtimestamp(row.time_ms / 1000, UTC):%Y-%m}-01"
            found.setdefault(month, set()).add(counted)
        return {month: len(counted) for month, counted in found.items()}


def aslist(value: str | list[str]) -> list[str]:
    """A group's value or values."""
    return value if isinstance(value, list) else [value]


def pairs(groups: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Each type with each of its values."""
    return [(kind, value) for kind, values in groups.items() for value in values]


def changed(table: dict[str, Any], sent: dict[str, Any]) -> dict[str, Any]:
    """The table after the operations that the test sends: plain, $set, $setOnce, $add, $append, $unset, $clearAll."""
    after = dict(table)
    if "$clearAll" in sent:
        after.clear()
    for name in sent.get("$unset", {}):
        after.pop(name, None)
    after.update({name: value for name, value in sent.items() if not name.startswith("$")})
    after.update(sent.get("$set", {}))
    for name, value in sent.get("$setOnce", {}).items():
        after.setdefault(name, value)
    for name, value in sent.get("$add", {}).items():
        now = after.get(name, 0)
        after[name] = (now if isinstance(now, int) else 0) + value
    for name, value in sent.get("$append", {}).items():
        now = after.get(name, [])
        after[name] = [*(now if isinstance(now, list) else [now]), value]
    return after
