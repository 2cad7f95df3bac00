"""`--until live`: a history ends where live data of its type begins, at the real server and from files."""

from __future__ import annotations

import json
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import typer
from tests.faults.process import API_KEY, SECRET_KEY, Process
from typer.testing import CliRunner, Result

from retrofill.backfill import manifest, seam
from retrofill.backfill.keys import Keys
from retrofill.backfill.profile import target
from retrofill.cli import plan, report, run
from retrofill.errors import CorruptError, FinalError, InputError

Json = dict[str, Any]

DAY_MS = 86_400_000
START_MS = 1_700_006_400_000  # 2023-11-15T00:00Z
NOON_MS = DAY_MS // 2
KEYS = Keys("key", "secret")
NOW = datetime(2026, 11, 24, tzinfo=UTC)
MAP = """
source: {format: ndjson}
event: {user_id: user, event_type: event, time: at, insert_id: id}
"""

app = typer.Typer()
for name, module in (("plan", plan), ("run", run), ("report", report)):
    app.command(name)(module.command)


def call(*words: str) -> Result:
    found = CliRunner().invoke(app, list(words))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def exported(kind: str, time: str, *, arrived: str | None = None, by: str | None = None) -> bytes:
    """An Export row; by: the import that brought it."""
    row: Json = {"event_type": kind, "event_time": time, "server_upload_time": arrived}
    if by is not None:
        row["ingestion_metadata"] = {"source_name": "retrofill", "source_version": by}
    return json.dumps(row).encode()


def found_in(tmp_path: Path, *rows: bytes, name: str = "export.json") -> seam.Live:
    (tmp_path / name).write_bytes(b"\n".join(rows) + b"\n")
    work = tmp_path / f"work-{name}"
    return seam.find(work, target("amplitude"), lambda: KEYS, file=str(tmp_path / name), now=NOW)


def test_the_seam_of_a_type_is_its_first_live_row_and_imports_are_not_live(tmp_path: Path) -> None:
    live = found_in(
        tmp_path,
        exported("Open", "2024-03-02 10:00:00.500000", arrived="2024-03-02 10:00:01.000000"),
        exported("Open", "2024-03-02 09:59:59.250000", arrived="2024-03-02 10:00:02.000000"),
        exported("Open", "2020-01-01 00:00:00.000000", by="spring"),
        exported("Close", "2024-03-05T00:00:00", arrived="2024-03-09T00:00:00Z"),
        exported("Old", "2020-01-01 00:00:00.000000", by="spring"),
    )
    assert live.until == {"Open": 1709373599250, "Close": 1709596800000}
    assert live.days == {"2024-03-02": 2, "2024-03-05": 1}
    assert live.imported == 2
    assert [one.late for one in live.types.values()] == [True, False]  # Close, Open


def test_a_seam_once_found_stays_until_the_destination_is_another(tmp_path: Path) -> None:
    first = found_in(tmp_path, exported("Open", "2024-03-02 10:00:00"))
    again = found_in(tmp_path, exported("Open", "2021-03-02 10:00:00"))
    assert again == first
    work = tmp_path / "work-export.json"
    other = tmp_path / "other.json"
    other.write_bytes(exported("Open", "2021-03-02 10:00:00"))
    moved = seam.find(work, target("amplitude"), lambda: KEYS, file=str(other), now=NOW)
    assert moved.until == {"Open": 1614679200000}
    (work / "journal.db").touch()  # sent already: nothing moves it now
    (tmp_path / "export.json").write_bytes(exported("Open", "2019-03-02 10:00:00"))
    kept = seam.find(work, target("amplitude"), lambda: KEYS, file="export.json", now=NOW)
    assert kept == moved


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b'{"event_type": "Open"}', "no row of an export"),
        (b'{"event_type": "Open", "event_time": "soon"}', "no time of an export"),
    ],
)
def test_a_file_that_is_no_export_is_refused(tmp_path: Path, row: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        found_in(tmp_path, row)
    assert seam.read(tmp_path / "work-export.json") is None
    (tmp_path / seam.NAME).write_text("{")
    with pytest.raises(CorruptError, match="live"):
        seam.read(tmp_path)


@contextmanager
def exporting(answer: Callable[[datetime, datetime], tuple[int, bytes]]) -> Iterator[str]:
    """Serve /api/2/export as told. Yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = parse_qs(urlsplit(self.path).query)
            hours = (
                datetime.strptime(asked[name][0], "%Y%m%dT%H").replace(tzinfo=UTC)
                for name in ("start", "end")
            )
            status, body = answer(*hours)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("too_much", [400, 504])
def test_hours_that_hold_too_much_are_asked_for_in_halves(tmp_path: Path, too_much: int) -> None:
    arrived = {
        datetime(2026, 11, day, hour, tzinfo=UTC): exported(f"On {day}", f"2026-11-{day} 01:00:00")
        for day, hour in ((20, 3), (21, 0), (23, 23))
    }
    given: list[bytes] = []

    def answer(start: datetime, end: datetime) -> tuple[int, bytes]:
        assert (end - start).days < 365
        rows = [row for at, row in arrived.items() if start <= at <= end]
        if len(rows) > 1:
            return too_much, b"too much"
        given.extend(rows)
        return (200, b"\n".join(rows)) if rows else (404, b"")

    with exporting(answer) as url:
        live = seam.find(tmp_path, target(url), lambda: KEYS, file=None, now=NOW)
    assert given == list(arrived.values())
    assert sorted(live.types) == ["On 20", "On 21", "On 23"]


@pytest.mark.slow
def test_one_hour_that_holds_too_much_ends_the_search(tmp_path: Path) -> None:
    with (
        exporting(lambda _start, _end: (400, b"too much")) as url,
        pytest.raises(FinalError, match="too much"),
    ):
        seam.find(tmp_path, target(url), lambda: KEYS, file=None, now=NOW)
    assert seam.read(tmp_path) is None


# At the real server.


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    server = Process(tmp_path / "data")
    server.start()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


def history(folder: Path, name: str, kinds: list[str]) -> list[str]:
    """Ten days of each type, an event at noon each day, from START_MS."""
    rows = [
        {
            "user": f"user-{day % 3}",
            "event": kind,
            "at": START_MS + day * DAY_MS + NOON_MS,
            "id": f"{kind}-{day}",
        }
        for kind in kinds
        for day in range(10)
    ]
    (folder / f"{name}.ndjson").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "map.yaml").write_text(MAP)
    return [str(folder / f"{name}.ndjson"), "--map", str(folder / "map.yaml")]


def send(server: Process, kind: str, at_ms: int) -> None:
    event = {"user_id": "user-live", "event_type": kind, "time": at_ms, "insert_id": f"l-{at_ms}"}
    status, _ = server.ask("POST", "/2/httpapi", {"api_key": API_KEY, "events": [event]})
    assert status == 200


def archive(server: Process, path: Path) -> Path:
    """Everything of the last day, as a person would fetch it."""
    now = datetime.now(UTC)
    token = b64encode(f"{API_KEY}:{SECRET_KEY}".encode()).decode()
    asked = urllib.request.Request(
        f"{server.url}/api/2/export?start={now - timedelta(days=1):%Y%m%dT%H}&end={now:%Y%m%dT%H}",
        headers={"Authorization": f"Basic {token}"},
    )
    with urllib.request.urlopen(asked) as answer:
        path.write_bytes(answer.read())
    return path


@pytest.mark.slow
def test_a_run_until_live_leaves_out_what_is_there_and_counts_no_import_as_live(
    tmp_path: Path, server: Process
) -> None:
    send(server, "Open", START_MS + 6 * DAY_MS)  # before noon of day 6: days 0 to 5 are history
    send(server, "Open", START_MS + 8 * DAY_MS)
    send(server, "Buy", START_MS + 2 * DAY_MS + NOON_MS + 1)  # after noon of day 2: days 0 to 2
    keys = ["--api-key", API_KEY, "--secret-key", SECRET_KEY]
    work = tmp_path / "work"
    given = history(tmp_path, "history", ["Open", "Buy", "Never live"])
    common = [*given, "--to", server.url, "--work", str(work), "--until", "live"]
    planned = call("plan", *common, *keys, "--json", "--import", "first")
    assert planned.exit_code == 0, planned.output
    facts = json.loads(planned.stdout.splitlines()[-1])
    assert facts["types"] == {"Open": 6, "Buy": 3, "Never live": 10}
    assert facts["left_out"] == {"since": 0, "until": 11}
    done = call("run", *common, *keys, "--yes")
    assert done.exit_code == 0, done.output
    assert "complete: " in done.stderr

    # What the run brought is no live data: a second import has the same seam.
    other = tmp_path / "other"
    again = history(tmp_path, "again", ["Open", "Buy", "Never live"])
    call("plan", *again, "--to", server.url, "--work", str(other), "--until", "live", *keys)
    live = seam.read(other)
    assert live is not None
    assert live.until == {
        "Open": START_MS + 6 * DAY_MS,
        "Buy": START_MS + 2 * DAY_MS + NOON_MS + 1,
    }
    assert (live.imported, sum(live.days.values())) == (19, 3)
    staged = manifest.read(other / "stage")
    assert staged is not None
    assert staged.types == {"Open": 6, "Buy": 3, "Never live": 10}

    # A file of the same export tells the same, and needs no secret.
    zipped = archive(server, tmp_path / "export.zip")
    third = tmp_path / "third"
    line = ["plan", *again, "--to", server.url, "--work", str(third), "--until", "live"]
    call(*line, "--live", str(zipped), "--json")
    from_file = seam.read(third)
    assert from_file is not None
    assert (from_file.types, from_file.days) == (live.types, live.days)

    page = tmp_path / "report.html"
    call("report", "--work", str(work), "--out", str(page))
    text = page.read_text()
    assert "11 rows of the source" in text
    assert '<i class="h" title="2023-11-15: 3 of the history, 0 live">' in text
    assert '<i class="b" title="2023-11-17: 3 of the history, 1 live">' in text
    assert '<i class="b" title="2023-11-21: 1 of the history, 1 live">' in text


def test_live_needs_both_keys_and_a_file_needs_the_word(tmp_path: Path) -> None:
    given = history(tmp_path, "history", ["Open"])
    line = ["plan", *given, "--to", "http://127.0.0.1:9", "--work", str(tmp_path / "work")]
    with pytest.raises(InputError, match="No API key"):
        call(*line, "--until", "live")
    with pytest.raises(InputError, match="--until live"):
        call(*line, "--live", "export.zip")
