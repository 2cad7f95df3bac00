"""What an undo will change, told before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine.test_undo import Server
from tests.stateful.test_engine import FakeClock

from retrofill.engine.admission import ProjectSettings
from retrofill.engine.effects import Effects, effects

IMPORT = {"ingestion_metadata": {"source_name": "retrofill", "source_version": "old-shop"}}


def seen(server: Server, name: str = "old-shop") -> Effects:
    with server.engine.reader().view(1) as view:
        return effects(view, name, server.engine.limits(1))


@pytest.mark.parametrize("sealed", [False, True])
def test_what_an_import_did_to_others_is_counted(
    sealed: bool,  # noqa: FBT001 - a parameter
    tmp_path: Path,
) -> None:
    server = Server(tmp_path / "data", FakeClock())
    number = 0

    def send(device: str, user: str = "", *, ms: int = 0, key: str = "", **more: Any) -> None:
        nonlocal number
        number += 1
        server.clock.ms += 1000
        ids = {"device_id": device} | ({"user_id": user} if user else {})
        at = {"time": ms or server.clock.ms, "insert_id": key or f"i-{number}"}
        server.send([{"event_type": "View", **ids, **at, **more}])

    plan = {"user_properties": {"plan": "old"}}
    send("phone-1")
    send("desk-1", "ann-111")
    send("desk-2", "bob-222")
    send("desk-3", "eve-333")
    assert seen(server) == Effects(0, 0, 0, 0, 0)
    send("phone-1", "ann-111", ms=1000, **IMPORT)  # merges, and is her first event
    send("desk-2", "bob-222", **IMPORT, **plan)
    send("desk-3", "eve-333", key="again", **IMPORT, **plan, **{"$skip_user_properties_sync": True})
    send("crm-1", "only-444", **IMPORT, **plan)
    send("desk-3", "eve-333", key="again")
    group = {"groups": {"org": "x"}, "group_properties": {"n": 1}}
    send("desk-3", "eve-333", event_type="$groupidentify", **group, **IMPORT)  # not hers
    if sealed:
        server.run(server.engine.seal())
    assert seen(server) == Effects(only_here=1, first_seen=1, properties=1, merges=1, repeats=1)
    assert seen(server, "other") == Effects(0, 0, 0, 0, 0)
    before = len(server.seen()["rows"])
    server.run(server.engine.undo(1, "old-shop"))
    assert seen(server) == Effects(0, 0, 0, 0, 0)
    assert len(server.seen()["rows"]) == before - 5 + 1
    assert server.seen()["merges"] == []
    server.close()


@pytest.mark.parametrize("scope", ["project+device", "project"])
def test_repeats_are_counted_by_the_keys_that_left_them_out(scope: str, tmp_path: Path) -> None:
    server = Server(tmp_path / "data", FakeClock())
    server.engine.set_settings(1, ProjectSettings({"dedupe_scope": scope}))
    now = server.clock.ms

    def send(device: str, **said: Any) -> None:
        server.clock.ms += 1000
        server.send([{"event_type": "View", "device_id": device, "time": now, **said}])

    group = {"event_type": "$groupidentify", "groups": {"org": "x"}, "group_properties": {"n": 1}}
    keys: list[dict[str, Any]] = [{"insert_id": "a"}, {"event_id": 7}, group | {"insert_id": "g"}]
    for key in keys:
        send("phone-1", **key, **IMPORT)
    for key in keys:  # those that count on any device
        send("phone-1" if "event_id" in key else "desk-2", **key)
    send("phone-1", event_id=8)
    before = len(server.seen()["rows"])
    count = {"project+device": 2, "project": 3}[scope]
    assert seen(server).repeats == count
    server.run(server.engine.undo(1, "old-shop"))
    assert len(server.seen()["rows"]) == before - 3 + count
    server.close()
