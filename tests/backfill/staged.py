"""Stages made by hand, as the sender reads them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa

from retrofill.backfill.manifest import (
    Duplicates,
    File,
    Kiosk,
    Manifest,
    Options,
    SetFile,
)
from retrofill.backfill.sets import SCHEMA, SetWriter

START_MS = 1_600_000_000_000


class Made(NamedTuple):
    """One event of a history: whose it is, its ids and its text."""

    person: int
    device: str | None
    user: str | None
    insert_id: str
    text: str


def event(person: int, index: int, *, device: str | None, user: str | None, fill: str = "") -> Made:
    """One event; index is its place among its person's."""
    insert_id = f"i-{person}-{index}"
    body = {
        "event_type": f"type {index % 3}",
        "time": START_MS + index * 1000,
        "insert_id": insert_id,
        "event_properties": {"index": index, "fill": fill},
        "ingestion_metadata": {"source_name": "retrofill", "source_version": "imp"},
    }
    if device is not None:
        body["device_id"] = device
    if user is not None:
        body["user_id"] = user
    return Made(person, device, user, insert_id, json.dumps(body, separators=(",", ":")))


def history(people: dict[int, int], *, devices: int = 1, fill: str = "") -> list[Made]:
    """Each person with so many events, on so many devices in turn."""
    return [
        event(person, n, device=f"device-{person}-{n % devices}", user=f"user-{person}", fill=fill)
        for person, rows in people.items()
        for n in range(rows)
    ]


def random_history(chance: random.Random, events: int) -> list[Made]:
    """People of very different length, some on several devices, some at a kiosk, some without a device."""
    made: list[Made] = []
    person = 0
    while len(made) < events:
        person += 1
        rows = min(events - len(made), chance.choice([1, 1, 2, 3, 5, 8, 20, 60]))
        kind = chance.choice(["one", "one", "several", "kiosk", "userless", "deviceless"])
        for n in range(rows):
            device: str | None = f"device-{person}"
            user: str | None = f"user-{person}"
            if kind == "several":
                device = f"device-{person}-{n % 3}"
            elif kind == "kiosk":
                device = "kiosk-device"
            elif kind == "userless":
                user = None
            elif kind == "deviceless":
                device = None
            made.append(event(person, n, device=device, user=user))
    return made


def write(
    work: Path, made: list[Made], *, sets: int = 2, group: int = 8192, kiosks: tuple[str, ...] = ()
) -> Manifest:
    """Write a stage into WORK/stage."""
    stage = work / "stage"
    stage.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(sets):
        mine = sorted((m for m in made if m.person % sets == number), key=lambda m: m.person)
        columns = {
            "person": [m.person for m in mine],
            "seq": list(range(len(mine))),
            "time_ms": [json.loads(m.text)["time"] for m in mine]
            if len(mine) < 10_000
            else [0] * len(mine),
            "device_id": [m.device for m in mine],
            "user_id": [m.user for m in mine],
            "insert_id": [m.insert_id for m in mine],
            "event_type": ["type"] * len(mine),
            "text": [f",{m.text}" for m in mine],
            "bytes": [len(m.text.encode()) for m in mine],
            "file": [0] * len(mine),
            "line": list(range(1, len(mine) + 1)),
        }
        name = f"set-{number}.rows"
        writer = SetWriter(stage / name, packed=number % 2 == 1)
        for rows in pa.table(columns, schema=SCHEMA).to_batches(max_chunksize=group):
            writer.write(rows)
        writer.close()
        people = len({m.person for m in mine})
        files.append(SetFile(name, len(mine), sum(len(m.text.encode()) for m in mine), people))
    manifest = Manifest(
        fingerprint="made by hand",
        import_id="imp",
        options=Options(import_id="imp"),
        mapping="",
        files=[File("source.ndjson", 0)],
        sets=files,
        rows=len(made),
        events=len(made),
        bytes=sum(one.bytes for one in files),
        people=len({m.person for m in made}),
        devices=0,
        users=0,
        first_ms=START_MS,
        last_ms=START_MS,
        days={"2020-09-13": len(made)},
        types={"type": len(made)},
        refused={},
        duplicates=Duplicates(),
        ids={},
        left_out={},
        hot_devices=[],
        hot_users=[],
        hot_people=[],
        kiosks=[Kiosk("device", name, sum(m.device == name for m in made)) for name in kiosks],
    )
    (stage / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return manifest
