"""A block: the requests of one commit as they came, with what the fold decided about each of their events.

The block is the truth. It is written once, whole, as one checksummed row; users, devices, groups, quotas and
fingerprints are folds of blocks, and lake rows are made from them later. Per-event decisions are packed columns, one
entry for each event of all parts in order: an event's place in that order is its `row`, and (block, row) its
position. Nothing in a row depends on when or where it is made from the block.
"""

from __future__ import annotations

from array import array
from enum import IntEnum, IntFlag

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace


class Kind(IntEnum):
    """What a row is. Only EVENT is seen by counts and by /api/2; the others are history that state is folded from."""

    EVENT = 0
    IDENTIFY = 1
    GROUP_IDENTIFY = 2
    ALIAS = 3
    DISPLACED = 4  # the duplicate of an import's row: it comes back if that import is undone
    UNDONE = 5  # a row of an import that was undone
    DROPPED = 255  # a duplicate: it has no row


class Flag(IntFlag):
    """Verdicts of the fold on one event."""

    SKIP = 1  # $skip_user_properties_sync was true
    FIRST_EVENT = 2  # the first event received of this person
    UPDATE_DROPPED = 4  # over the hourly property updates: the table was not changed
    REVENUE = 8  # carries revenue
    HELD = 16  # its user has absorbed as many as it may: who is anonymous on its device stays apart


# The built-in columns of the property table, in the order in which a Table carries them.
COLUMNS = (
    "platform",
    "os_name",
    "os_version",
    "device_brand",
    "device_manufacturer",
    "device_model",
    "carrier",
    "country",
    "region",
    "city",
    "dma",
    "language",
    "version_name",
    "ip_address",
    "library",
    "start_version",
    "paying",
    "device_family",
    "device_type",
)


# Those an event can say itself, from the first on; the two after them are derived from the device.
SAYABLE = COLUMNS[: COLUMNS.index("device_family")]


class Table(Struct, array_like=True, frozen=True, gc=False):
    """What a row shows of its person and groups: the snapshot. JSON in `Block.tables`, fields in this order."""

    user_properties: Raw
    groups: Raw  # type -> [values]
    group_properties: Raw  # type -> value -> properties
    platform: str | None
    os_name: str | None
    os_version: str | None
    device_brand: str | None
    device_manufacturer: str | None
    device_model: str | None
    carrier: str | None
    country: str | None
    region: str | None
    city: str | None
    dma: str | None
    language: str | None
    version_name: str | None
    ip_address: str | None
    library: str | None
    start_version: str | None
    paying: str | None
    device_family: str | None
    device_type: str | None


class Merge(Struct, array_like=True, frozen=True, gc=False):
    """Two people shown to be one by the event at `row`."""

    row: int
    project: int
    absorbed: int
    surviving: int
    event_time_ms: int


class Part(Struct, array_like=True, frozen=True, gc=False):
    """One request of a block. body: JSON object with the array `events`; see `core.event.Batch`.

    updates_max: the hourly property updates that were allowed when it was folded, 0 = any number. The operator may
    change that at any time, and what was decided must fold the same. merges_max: the same of the people whom one user
    may absorb; `allowed` are those users of the request who may absorb any number.
    """

    project: int
    path: str
    received_ms: int
    client_upload_ms: int
    remote: str | None
    rows: int
    body: bytes
    updates_max: int = 0
    merges_max: int = 0
    allowed: list[str] = []


class Block(Struct, array_like=True, frozen=True, gc=False):
    """One committed micro-batch. Packed columns are little-endian, one entry an event.

    amplitude_id: int64. event_time_ms: int64. created_ms: int64, first-seen as known then, -1 if none.
    kind: uint8. flags: uint8. table: int32, index into `tables` (each the JSON of a Table), -1 if none.
    A table stands there once; older blocks may hold it several times.
    keys: 16 bytes each, the event's dedupe key, zeros if it has none.
    said: int32, bit i is set if the event itself says column i of SAYABLE.
    forgotten: (project, amplitude_id) of people deleted by this block: whoever uses their ids later is new.
    """

    partition: int
    number: int
    server_upload_ms: int
    parts: list[Part]
    amplitude_id: bytes
    event_time_ms: bytes
    created_ms: bytes
    kind: bytes
    flags: bytes
    table: bytes
    keys: bytes
    said: bytes
    tables: list[bytes]
    merges: list[Merge]
    forgotten: list[tuple[int, int]] = []

    @property
    def rows(self) -> int:
        """How many events the block holds, dropped ones included."""
        return len(self.kind)

    @property
    def payload_bytes(self) -> int:
        """How large its bodies and snapshots are, by far most of it."""
        return sum(len(part.body) for part in self.parts) + sum(map(len, self.tables))

    @property
    def wide_bytes(self) -> int:
        """How large its bodies and snapshots are where every row has its own, as a reader's rows do."""
        sizes = [*map(len, self.tables), 0]  # the last one of rows that show none
        shown = sum([sizes[place] for place in array("i", self.table)])
        return sum(len(part.body) for part in self.parts) + shown


def same(one: Block, other: Block) -> bool:
    """Say whether two blocks say the same, wherever they keep the tables that their rows show."""
    return one == other or (
        replace(one, table=b"", tables=[]) == replace(other, table=b"", tables=[])
        and _shown(one) == _shown(other)
    )


def _shown(block: Block) -> list[bytes]:
    places = memoryview(block.table).cast("i")
    return [block.tables[place] if place >= 0 else b"" for place in places]


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Block).decode
