"""What an import will touch: the ids, insert_ids and groups of a stage, read from its sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from retrofill.backfill.manifest import Manifest
from retrofill.backfill.sets import TEXT, Set
from retrofill.backfill.texts import telling
from retrofill.errors import InputError
from retrofill.limits import HISTORY_IDS_MAX

_GROUP_IDENTIFY = "$groupidentify"


class Touched(Struct, frozen=True):
    """Distinct ids of a stage. insert_ids: every one. group_insert_ids: of its group identifies. addressed: some events say `ip`."""

    device_ids: list[str]
    user_ids: list[str]
    insert_ids: pa.Array
    group_insert_ids: list[str]
    addressed: bool

    def check(self) -> None:
        """Raise InputError if there are more ids than a server tells at a time."""
        count = len(self.device_ids) + len(self.user_ids)
        if count > HISTORY_IDS_MAX:
            part = HISTORY_IDS_MAX / count
            raise InputError(
                f"The import has {count:,} device and user ids, a server tells of {HISTORY_IDS_MAX:,} at a time",
                mend=f"Rehearse a sample of its people: --sample {max(1, int(90 * part))}%",
            )


def touched(stage: Path, found: Manifest) -> Touched:
    """Read what a stage touches."""
    devices, users = set[str](), set[str]()
    inserts: list[pa.Array] = []
    groups: list[str] = []
    addressed = False
    for batch in _batches(stage, found, ["device_id", "user_id", "insert_id", "event_type", TEXT]):
        devices.update(pc.unique(batch["device_id"]).to_pylist())
        users.update(pc.unique(batch["user_id"]).to_pylist())
        inserts.append(batch["insert_id"])
        addressed = addressed or pc.any(telling(batch[TEXT], "ip")).as_py() is True
        if found.types.get(_GROUP_IDENTIFY):
            mine = pc.equal(batch["event_type"], _GROUP_IDENTIFY)
            groups += batch.filter(mine)["insert_id"].to_pylist()
    return Touched(
        sorted(one for one in devices if one),
        sorted(one for one in users if one),
        pa.concat_arrays(inserts) if inserts else pa.array([], pa.string()),
        groups,
        addressed,
    )


def insert_keys(stage: Path, found: Manifest) -> Iterator[tuple[str, str]]:
    """Yield (device_id, insert_id) of every event; "" for an event without a device."""
    for batch in _batches(stage, found, ["device_id", "insert_id"]):
        devices, inserts = batch["device_id"].to_pylist(), batch["insert_id"].to_pylist()
        yield from ((device or "", one) for device, one in zip(devices, inserts, strict=True))


def _batches(stage: Path, found: Manifest, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for one in found.sets:
        with Set(stage / one.path) as rows:
            yield from rows.batches(columns)
