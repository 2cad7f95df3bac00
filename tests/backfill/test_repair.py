"""`retrofill verify --repair` at the real server: it ends as what is there says, not as the answers did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.backfill.test_undo import KEYS, START_MS, call, history
from tests.faults.process import Process

pytestmark = pytest.mark.slow


def test_a_repair_ends_as_what_is_read_back_says(tmp_path: Path) -> None:
    """A destination that lost everything; then one where another event has the place of one of ours."""
    data, work = tmp_path / "data", tmp_path / "work"
    server = Process(data)
    try:
        server.start()
        server.wait_until_ready()
        line = ["run", *history(tmp_path, 70), "--to", server.url, "--work", str(work), *KEYS]
        assert call(*line, "--yes").exit_code == 0
        server.stop()
        shutil.rmtree(data)
        server.start()
        server.wait_until_ready()
        other = {"user_id": "user-2", "event_type": "Live", "time": START_MS, "insert_id": "i-2"}
        assert server.send([other])[0] == 200
        told = ["verify", "--work", str(work), *KEYS]
        lost = call(*told)
        assert (lost.exit_code, "70 missing" in lost.stdout) == (1, True)
        repaired = call(*told, "--repair")
        assert repaired.exit_code == 1
        assert "70 missing events sent again" in repaired.stderr
        assert "69 read back · 1 missing" in repaired.stdout
        assert "1 are missing still: another event holds the insert_id" in repaired.stderr
        (left,) = map(json.loads, (work / "verify.ndjson").read_text().splitlines())
        assert (left["kind"], left["insert_id"]) == ("missing", "i-2")

        server.stop()
        shutil.rmtree(data)
        server.start()
        server.wait_until_ready()
        repaired = call(*told, "--repair", "--json")
        assert repaired.exit_code == 0
        events = [json.loads(one) for one in repaired.stdout.splitlines()]
        first, second = [one for one in events if one["event"] == "verified"]
        assert (first["missing"], second["missing"], second["read_back"]) == (70, 0, 70)
        assert call(*told).exit_code == 0
    finally:
        server.end()
