"""Killed while somebody is deleted, or while an import is restored after it, a server gives no freed device back."""

from __future__ import annotations

import http.client
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.faults.process import Process, Row
from tests.faults.test_undo import ANSWER_S, IMPORT, change, dying, rows_of, state_of, wait_for

pytestmark = pytest.mark.slow

KIOSK = "kiosk-9"
SETTINGS = "CHORES_S=0.1"
STEPS = [
    "retrofill.lake.ducklake.Lake.delete before",
    "retrofill.lake.ducklake.Lake.delete after",
    "retrofill.lake.ducklake.Swap.hide after",
    "retrofill.lake.ducklake.Swap.commit before",
    "retrofill.lake.ducklake.Swap.commit after",
]


def _event(number: int, user: str | None = None, *, name: str = "") -> Row:
    event: Row = {
        "event_type": "step",
        "insert_id": f"i-{number}",
        "device_id": KIOSK,
        "time": 1_700_000_000_000 + number,
    }
    if user:
        event["user_id"] = user
    if name:
        event["ingestion_metadata"] = {"source_name": "retrofill", "source_version": name}
    return event


def _life(server: Process, armed: Path) -> list[Row]:
    """Ann and eve use a kiosk, and eve by an import that is undone while she is deleted; then it is restored."""
    server.start()
    server.wait_until_ready()
    at_once = {"limits": {"deletion_days": 0}}
    assert server.ask("PUT", "/api/1/project", at_once)[0] == 200
    for event in (_event(1, "ann-111"), _event(2, "eve-333", name=IMPORT)):
        assert server.send([event])[0] == 200
    change(server, "DELETE")
    wait_for(server, "undone")
    assert server.send([_event(3, "eve-333") | {"device_id": "phone-1"}])[0] == 200
    armed.touch()
    asked = {"user_ids": ["eve-333"], "requester": "test"}
    with suppress(OSError, http.client.HTTPException):
        server.ask("POST", "/api/2/deletions/users", asked)
    _until(server, lambda: [row["$insert_id"] for row in server.export()] == ["i-1"])
    change(server, "POST")
    _until(server, lambda: state_of(server) == "open")
    assert not armed.exists()  # it was killed
    assert server.send([_event(4)])[0] == 200
    return rows_of(server)


def _until(server: Process, true: Any) -> None:
    """Wait until something is true; a server that has died is started again."""
    end = time.monotonic() + ANSWER_S
    while True:
        with suppress(OSError, http.client.HTTPException, AssertionError):
            if true():
                return
        assert server.running is not None
        if server.running.poll() is not None:
            server.running = None
            server.start()
            server.wait_until_ready()
        assert time.monotonic() < end, server.said()
        time.sleep(0.02)


@pytest.mark.parametrize(
    "step",
    [STEPS[1], *(pytest.param(one, marks=pytest.mark.long) for one in STEPS if one != STEPS[1])],
)
def test_killed_while_somebody_is_deleted_and_an_import_restored_a_device_stays_free(
    step: str, tmp_path: Path
) -> None:
    armed = tmp_path / "armed"
    server = Process(tmp_path / "data", settings=SETTINGS, first=dying(step, armed))
    try:
        mine = _life(server, armed)
        assert [row["$insert_id"] for row in mine] == ["i-1", "i-4"]
        assert [row["amplitude_id"] for row in mine] == [0, 1]  # ann, and somebody new
        server.kill()
        server.start()
        server.wait_until_ready()
        assert rows_of(server) == mine
    finally:
        server.end()
