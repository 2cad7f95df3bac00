"""Imports on a live server: opened, shown, closed, exported, and verified by what they export."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.requests import Request
from starlette.responses import Response
from tests.backfill.test_commands import call as command
from tests.backfill.test_commands import source
from tests.engine.test_event_time import by_time
from tests.server.live import Live
from tests.server.test_project import call
from tests.stateful.test_engine import FakeClock

from retrofill.backfill import verify as verifying
from retrofill.engine.deletion import Deletions
from retrofill.errors import ConflictError
from retrofill.server.imports import ImportRoutes
from retrofill.server.read import Reads

pytestmark = pytest.mark.slow

KEYS = ["--api-key", "KEY", "--secret-key", "SECRET"]


def of(name: str, **more: Any) -> dict[str, Any]:
    return {
        "user_id": "user-1",
        "event_type": "View",
        "time": 1_600_000_000_000,
        "ingestion_metadata": {"source_name": "retrofill", "source_version": name},
        **more,
    }


def send(live: Live, *events: dict[str, Any], key: str = "KEY") -> int:
    return call(live, "POST", "/batch", {"api_key": key, "events": list(events)})[0]


def test_an_import_is_opened_shown_closed_and_opened_again(tmp_path: Path) -> None:
    with Live(tmp_path, "--project", "two:KEY2:SECRET2") as live:
        assert call(live, "GET", "/api/1/imports") == (200, {"imports": []})
        status, made = call(live, "POST", "/api/1/imports", {"name": "old"})
        assert (status, made["name"], made["state"], made["generation"]) == (200, "old", "open", 1)
        assert call(live, "POST", "/api/1/imports", {"name": "old"}) == (200, made)
        assert call(live, "GET", "/api/1/imports/old") == (200, made)
        assert (made["events"], made["people"], made["last_arrival_ms"]) == (0, 0, None)

        again = of("old", insert_id="a")
        assert [send(live, again), send(live, again)] == [200, 200]
        assert send(live, of("old", insert_id="b", time=1_600_000_000_009)) == 200
        assert send(live, of("never.opened"), of("never.opened", user_id="user-2")) == 200
        assert send(live, of("old", event_type="")) == send(live, of("old", time="x")) == 400
        assert send(live, of("theirs"), key="KEY2") == 200

        status, shown = call(live, "GET", "/api/1/imports")
        first, second = shown["imports"]
        assert (first["name"], first["state"], first["opened_ms"]) == ("never.opened", "open", None)
        assert (first["events"], first["people"]) == (2, 2)
        assert (second["events"], second["duplicates"], second["refusals"]) == (2, 1, 2)
        assert (second["first_event_ms"], second["last_event_ms"]) == (
            1_600_000_000_000,
            1_600_000_000_009,
        )
        assert made["opened_ms"] <= second["first_arrival_ms"] <= second["last_arrival_ms"]
        status, closed = call(live, "POST", "/api/1/imports/old/close")
        assert (status, closed) == (200, {**second, "state": "closed"})
        assert call(live, "GET", "/api/1/imports/old") == (200, closed)
        assert call(live, "POST", "/api/1/imports", {"name": "old"}) == (200, second)


def test_an_import_whose_name_nobody_would_open_is_shown_and_undone_all_the_same(
    tmp_path: Path,
) -> None:
    with Live(tmp_path) as live:
        for name in ("a/b", "ü ?#%", "close", "a/export", "export", "%2F", "zero-\0"):
            assert send(live, of(name, insert_id=name)) == 200
            known = name.replace("\0", "")
            path = f"/api/1/imports/{quote(known, safe='')}"
            assert call(live, "GET", path)[1]["events"] == 1
            assert call(live, "GET", f"{path}/effects")[0] == 200
            assert call(live, "DELETE", path)[0] == 200
            status, shown = call(live, "GET", path)
            assert (status, shown["name"], shown["state"]) == (200, known, "undone")
        assert call(live, "GET", "/api/1/imports/zero-%00")[0] == 404
        assert call(live, "GET", "/api/1/imports/a/b")[0] == 404


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        for body in ({}, {"name": "a b"}, {"name": ""}, {"name": 5}, {"name": "a", "x": 1}, []):
            status, said = call(live, "POST", "/api/1/imports", body)
            assert (status, said["error"]["http_code"]) == (400, 400), body
        assert call(live, "POST", "/api/1/imports", {"name": "x" * 5000})[0] == 413
        for method, path in (("GET", ""), ("GET", "/export"), ("POST", "/close")):
            status, said = call(live, method, f"/api/1/imports/none{path}")
            assert (status, said["error"]["http_code"]) == (404, 404)
        assert call(live, "GET", "/api/1/imports")[1] == {"imports": []}
        assert send(live, of("old")) == 200
        for method, path in (("DELETE", "/old"), ("GET", ""), ("POST", "/old/close")):
            status, said = call(live, method, f"/api/1/imports{path}?dry_run=true")
            assert (status, said["error"]["message"]) == (
                400,
                "Parameters that are not supported: dry_run",
            )
        assert call(live, "GET", "/api/1/imports/old")[1]["state"] == "open"
        # As an undo that is under way leaves it.
        with closing(sqlite3.connect(tmp_path / "data" / "imports.sqlite")) as file, file:
            file.execute(
                "INSERT INTO imports (project, name, state, opened_ms, generation, after, until, undone_ms, former) "
                "VALUES (1, 'going', 'undoing', 5, 1, 0, 0, 0, 'open')"
            )
        assert call(live, "POST", "/api/1/imports", {"name": "going"})[0] == 409
        status, said = call(live, "POST", "/api/1/imports/going/close")
        assert (status, said["error"]["message"]) == (409, "The import going is being undone")


def test_an_undone_import_that_is_opened_again_can_be_restored_until_it_has_rows(
    tmp_path: Path,
) -> None:
    path = "/api/1/imports/old"

    def shown(method: str, more: str = "") -> tuple[int, str, int]:
        status, said = call(live, method, f"{path}{more}")
        return status, said["state"], said["generation"]

    def opened() -> tuple[int, str, int]:
        status, said = call(live, "POST", "/api/1/imports", {"name": "old"})
        return status, said["state"], said["generation"]

    with Live(tmp_path) as live:
        assert send(live, of("old", insert_id="a")) == 200
        status, said = call(live, "POST", f"{path}/restore")
        assert (status, said["error"]["message"]) == (409, "The import old is open, not undone")
        assert shown("DELETE") == (200, "undone", 1)
        assert opened() == (200, "open", 2)
        assert shown("POST", "/close") == (200, "closed", 2)
        assert shown("POST", "/restore") == (200, "open", 1)
        assert call(live, "GET", path)[1]["events"] == 1
        assert shown("DELETE") == (200, "undone", 1)
        assert opened() == (200, "open", 2)
        assert shown("DELETE") == (200, "undone", 1)
        assert call(live, "POST", f"{path}/close")[0] == 409
        assert send(live, of("old", insert_id="b")) == 200
        assert shown("POST", "/close") == (200, "closed", 2)
        assert call(live, "POST", f"{path}/restore")[0] == 409


def test_verify_reads_back_the_import_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    fetch = verifying._fetch

    def watched(url: str, *rest: Any, **more: Any) -> Path | None:
        asked.append(url.partition("/api/")[2])
        return fetch(url, *rest, **more)

    monkeypatch.setattr(verifying, "_fetch", watched)
    given = source(tmp_path, 200)
    with Live(tmp_path) as live:
        assert send(live, of("other", insert_id="live"), of("", insert_id="other")) == 200
        for name in ("a", "b"):  # the second one is stored before, all of it
            work = ["--work", str(tmp_path / f"work-{name}"), "--api-key", "KEY"]
            line = ["run", *given, "--to", live.address, "--import", name, *work, "--yes"]
            found = command(*line)
            assert found.exit_code == 0, found.output
        figures = {one["name"]: one for one in call(live, "GET", "/api/1/imports")[1]["imports"]}
        assert [(figures[one]["events"], figures[one]["duplicates"]) for one in "ab"] == [
            (200, 0),
            (0, 200),
        ]
        found = command("verify", "--work", str(tmp_path / "work-a"), *KEYS, "--json")
        assert found.exit_code == 0, found.output
        result = json.loads(found.stdout.splitlines()[0])
        assert (result["sent"], result["read_back"], result["out_of_order"]) == (200, 200, 0)
        assert asked == ["1/imports/a/export"]
        found = command("verify", "--work", str(tmp_path / "work-b"), *KEYS)
        assert asked[1:] == ["1/imports/b/export"]
        assert found.exit_code == 0, found.output
        assert "200 sent · 200 read back · 0 missing" in found.stdout
        assert "200 stored before, not by this import" in found.stdout

        # Of a longer history a part is there already, under the other import and live: no part of it is missing.
        longer = tmp_path / "longer"
        longer.mkdir()
        given = source(longer, 320)
        last = json.loads((longer / "history.ndjson").read_text().splitlines()[319])
        sent = {"user_id": last["user"], "device_id": last["device"], "event_type": last["event"]}
        more = {"time": last["at"], "insert_id": last["id"], "event_properties": {"n": last["n"]}}
        assert send(live, sent | more) == 200
        work = ["--work", str(tmp_path / "work-c"), "--api-key", "KEY"]
        line = ["run", *given, "--to", live.address, "--import", "c", *work, "--yes"]
        assert command(*line).exit_code == 0
        shown = call(live, "GET", "/api/1/imports/c")[1]
        assert (shown["events"], shown["duplicates"]) == (119, 201)
        found = command("verify", "--work", str(tmp_path / "work-c"), *KEYS)
        assert found.exit_code == 0, found.output
        assert "320 sent · 320 read back · 0 missing" in found.stdout
        assert "0 out of order · 201 stored before, not by this import" in found.stdout


def test_an_undo_that_late_events_wait_for_can_be_called_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = by_time(tmp_path / "data", FakeClock())
    engine, clock = subject.engine, subject.clock
    now = clock.ms
    subject.send([of("old", time=now, insert_id="a"), of("", time=now, insert_id="b")])
    deletions = Deletions(tmp_path / "deletions.sqlite", clock, days=lambda _: 1)
    reader, late = engine.reader(), engine.event_time
    reads = Reads(reader, deletions, limits=engine.limits, clock=clock, settle=late.settle)
    routes = ImportRoutes(engine, reader, reads, clock)
    (project,) = engine.all_projects()
    request = Request(
        {
            "type": "http",
            "query_string": b"",
            "path_params": {"id": "old"},
            "state": {"project": project},
        }
    )
    heard, cancel = asyncio.Event(), engine.cancel
    asked: list[asyncio.Task[Response]] = []

    async def hear(*what: Any) -> Any:
        heard.set()
        return await cancel(*what)

    async def meddle() -> None:
        if not asked:
            await subject.post([of("", time=now - 1000, insert_id="c")])
            assert late.late_since(1)
            asked.append(asyncio.create_task(routes.cancel(request)))
            hearing = asyncio.create_task(heard.wait())
            await asyncio.wait({hearing, *asked}, return_when=asyncio.FIRST_COMPLETED)
            assert heard.is_set(), asked[0].result()

    monkeypatch.setattr(engine, "cancel", hear)
    subject.meddle = meddle
    with pytest.raises(ConflictError, match="called off"):
        subject.run(engine.undo(1, "old"))
    answer = subject.run(asked[0])
    assert (answer.status_code, json.loads(answer.body)["state"]) == (200, "open")
    reads.close()
    deletions.close()
    subject.close()
