"""A project in plain dicts: folds requests one block each, as the engine would, with nothing between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from retrofill.core import block as block_codec
from retrofill.core.block import Block, Kind, Table
from retrofill.core.event import Batch, Event, decode_one
from retrofill.core.fold import Folded, Known, fold
from retrofill.core.identity import derived_device
from retrofill.core.person import Person
from retrofill.limits import PROFILES, Limits

DAY_ONE_MS = 1_700_000_000_000


class _Absent(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return 0


def event(event_type: str = "View", **fields: Any) -> Event:
    """An event from its wire keys; `skip` stands for the long name of the flag."""
    wire = {"event_type": event_type, **fields}
    if "skip" in wire:
        wire["$skip_user_properties_sync"] = wire.pop("skip")
    return decode_one(msgspec.json.encode(wire))


class History:
    """State of one project, folded block by block."""

    def __init__(self, limits: Limits = PROFILES["amplitude"]) -> None:
        self.limits = limits
        self.allowed: frozenset[str] = frozenset()
        self.devices: dict[str, int] = _Absent()
        self.users: dict[str, int] = _Absent()
        self.people: dict[int, Person] = {}
        self.groups: dict[tuple[str, str], dict[str, Any]] = {}
        self.blocks: list[Block] = []
        self.fresh = 1

    def send(
        self,
        *events: Event,
        path: str = "/2/httpapi",
        now_ms: int = DAY_ONE_MS,
        client_upload_ms: int | None = None,
        body: bytes = b"",
    ) -> list[tuple[Kind, int, Table | None]]:
        """Fold one request; return each event's kind, amplitude_id and snapshot."""
        for one in events:
            if one.device_id is None:
                one.device_id = derived_device(one.user_id) if one.user_id else ""
        batch = Batch(1, path, body, list(events), 0, now_ms, client_upload_ms, "203.0.113.9")
        folded = fold(
            [batch],
            {1: Known(self.devices, self.users, self.people, self.groups)},
            number=len(self.blocks) + 1,
            server_upload_ms=now_ms,
            fresh=self.fresh,
            updates_max={1: self.limits.property_updates_per_h},
            merges_max={1: self.limits.merges_per_user},
            allowed={1: self.allowed},
            dropped=[0] * len(events),
            keys=bytes(16 * len(events)),
        )
        self._apply(folded)
        return rows(folded.block)

    def _apply(self, folded: Folded) -> None:
        for change in folded.changes.values():
            self.devices.update(change.devices)
            self.users.update(change.users)
            self.people.update(change.people)
            self.groups.update(change.groups)
        self.fresh = folded.fresh
        block = block_codec.decode(block_codec.encode(folded.block))
        assert block == folded.block
        self.blocks.append(block)

    def table(self, user: str) -> Mapping[str, Any]:
        """The current property table of a user."""
        return self.people[self.users[user]].properties


def rows(block: Block) -> list[tuple[Kind, int, Table | None]]:
    """Each event of a block: kind, amplitude_id, snapshot."""
    people = memoryview(block.amplitude_id).cast("q")
    tables = memoryview(block.table).cast("i")
    return [
        (
            Kind(kind),
            people[row],
            msgspec.json.decode(block.tables[tables[row]], type=Table)
            if tables[row] >= 0
            else None,
        )
        for row, kind in enumerate(block.kind)
    ]


def shown(row: tuple[Kind, int, Table | None]) -> dict[str, Any]:
    """The user_properties on a row."""
    assert row[2] is not None
    return msgspec.json.decode(row[2].user_properties)
