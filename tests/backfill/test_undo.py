"""`retrofill undo` at the real server: shown, asked, taken back, brought back; and a run after it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from tests.backfill.exporting import Exporting, serving
from tests.faults.process import API_KEY, SECRET_KEY, Process
from typer.testing import CliRunner, Result

from retrofill.cli import run, status, undo, verify
from retrofill.errors import Error, FinalError, InputError

pytestmark = pytest.mark.slow

START_MS = 1_700_006_400_000
MAP = """
source: {format: ndjson}
event: {user_id: user, event_type: event, time: at, insert_id: id}
"""
KEYS = ["--api-key", API_KEY, "--secret-key", SECRET_KEY]

app = typer.Typer()
for name, module in (("run", run), ("status", status), ("undo", undo), ("verify", verify)):
    app.command(name)(module.command)


def call(*words: str, typed: str | None = None) -> Result:
    found = CliRunner().invoke(app, list(words), input=typed)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    server = Process(tmp_path / "data")
    server.start()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


def history(folder: Path, count: int, *, kind: str = "Seen") -> list[str]:
    rows = [
        {"user": f"user-{n % 7}", "event": kind, "at": START_MS + n * 1000, "id": f"i-{n}"}
        for n in range(count)
    ]
    (folder / "history.ndjson").write_text("\n".join(map(json.dumps, rows)))
    (folder / "map.yaml").write_text(MAP)
    return [str(folder / "history.ndjson"), "--map", str(folder / "map.yaml")]


def test_an_import_is_undone_shown_as_done_and_brought_back(
    tmp_path: Path, server: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = {"user_id": "user-1", "event_type": "Live", "time": START_MS, "insert_id": "live"}
    server.send([live])
    to = ["--to", server.url, *KEYS]
    line = ["run", *history(tmp_path, 70), *to, "--work", str(tmp_path / "work")]
    assert call(*line, "--import", "old", "--yes").exit_code == 0
    assert len(server.export()) == 71

    with pytest.raises(InputError, match="Nobody is here to be asked"):
        call("undo", "old", *to)
    monkeypatch.setattr(undo, "asked_at_terminal", lambda: True)
    with pytest.raises(InputError, match="Nothing was changed"):
        call("undo", "old", *to, typed="n\n")
    assert len(server.export()) == 71
    done = call("undo", "old", *to, typed="y\n")
    assert done.exit_code == 0
    assert "open: 70 events of 7 people, 2023-11-15 00:00:00 UTC to " in done.stderr
    assert "undone in " in done.stderr
    assert [row["event_type"] for row in server.export()] == ["Live"]

    again = call("undo", "old", *to)
    assert (again.exit_code, "undone already" in again.stderr) == (0, True)
    back = call("undo", "old", *to, "--restore", "--yes", "--json")
    shown, restored = map(json.loads, back.stdout.splitlines())
    assert (shown["event"], shown["state"], shown["events"]) == ("import", "undone", 0)
    assert (restored["event"], restored["events"], restored["people"]) == ("restored", 70, 7)
    assert len(server.export()) == 71
    assert call("verify", "--work", str(tmp_path / "work"), *KEYS).exit_code == 0

    with pytest.raises(FinalError, match="is open, not undone"):
        call("undo", "old", *to, "--restore", "--yes")
    with pytest.raises(FinalError, match="has no import 'other'"):
        call("undo", "other", *to, "--yes")
    with pytest.raises(FinalError, match="does not accept the keys: 401 Invalid") as refused:
        call("undo", "old", "--to", server.url, "--api-key", API_KEY, "--secret-key", "hush")
    assert "hush" not in str(refused.value)


def failing(url: str) -> Error:
    with pytest.raises(Error) as failed:
        call("undo", "old", "--to", url, "--api-key", "key", "--secret-key", "secret", "--yes")
    return failed.value


def test_only_a_retrofill_server_is_asked() -> None:
    data = Exporting()
    with serving(data):
        problem = failing(data.url)
    assert isinstance(problem, InputError)
    assert "retrofill undo-recipe" in problem.mend
    assert data.asked == ["/healthz"]  # it never saw the keys
    assert "retrofill undo-recipe" in failing("amplitude").mend
    assert "retrofill undo-recipe" in failing("http://127.0.0.1:9").mend


def test_an_answer_that_says_nothing_of_the_import_is_no_import() -> None:
    with serving(Exporting(), health=b'{"service":"retrofill"}') as other:
        assert "has no import 'old'" in failing(other.url).what
