"""`retrofill undo` at the real server: shown, asked, taken back, brought back; and a run after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from tests.backfill.exporting import Exporting, serving
from tests.faults.process import API_KEY, SECRET_KEY, Process
from typer.testing import CliRunner, Result

from retrofill.backfill import drive
from retrofill.backfill.send import Outcome
from retrofill.cli import resend, run, status, undo, verify
from retrofill.errors import Error, FinalError, InputError

pytestmark = pytest.mark.slow

START_MS = 1_700_006_400_000
MAP = """
source: {format: ndjson}
event: {user_id: user, event_type: event, time: at, insert_id: id}
"""
KEYS = ["--api-key", API_KEY, "--secret-key", SECRET_KEY]

app = typer.Typer()
for name, module in (
    *(("run", run), ("status", status), ("undo", undo), ("verify", verify)),
    ("resend", resend),
):
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
    server.send([{**live, "time": START_MS + 10_000}])
    to = ["--to", server.url, *KEYS]
    line = ["run", *history(tmp_path, 70), *to, "--work", str(tmp_path / "work")]
    assert call(*line, "--import", "old", "--yes").exit_code == 0
    assert len(server.export()) == 71
    origin = {"source_name": "retrofill", "source_version": "old"}
    again = {"user_id": "user-2", "event_type": "Seen", "insert_id": "i-2"}
    server.send([{**again, "ingestion_metadata": origin}, again])
    shown = server.ask("GET", "/api/1/imports/old")
    facts = json.loads(shown[1])
    assert (facts["state"], facts["generation"], facts["duplicates"]) == ("closed", 1, 1)
    assert facts["opened_ms"] <= facts["first_arrival_ms"]

    with pytest.raises(InputError, match="Nobody is here to be asked"):
        call("undo", "old", *to)
    monkeypatch.setattr(undo, "asked_at_terminal", lambda: True)
    with pytest.raises(InputError, match="Nothing was changed"):
        call("undo", "old", *to, typed="n\n")
    assert len(server.export()) == 71
    done = call("undo", "old", *to, typed="y\n")
    assert done.exit_code == 0
    assert "closed: 70 events of 7 people, 2023-11-15 00:00:00 UTC to " in done.stderr
    assert "6 people whom nothing else shows and 0 merges" in done.stderr
    assert "the first event of 1 and set properties of 0" in done.stderr
    assert "1 events come back that were left out as repeats of it" in done.stderr
    assert "undone in " in done.stderr
    assert sorted(row["event_type"] for row in server.export()) == ["Live", "Seen"]
    facts = json.loads(server.ask("GET", "/api/1/imports/old")[1])
    assert (facts["events"], facts["duplicates"], facts["refusals"]) == (0, 0, 0)

    again = call("undo", "old", *to)
    assert (again.exit_code, "undone already" in again.stderr) == (0, True)
    told = map(json.loads, call("undo", "old", *to, "--json").stdout.splitlines())
    assert [(one["event"], one["state"]) for one in told] == [
        ("import", "undone"),
        ("undone", "undone"),
    ]
    with pytest.raises(InputError, match="--restore brings back and --cancel calls off"):
        call("undo", "old", *to, "--restore", "--cancel", "--yes")
    back = call("undo", "old", *to, "--restore", "--yes", "--json")
    shown, restored = map(json.loads, back.stdout.splitlines())
    assert (shown["event"], shown["state"], shown["events"]) == ("import", "undone", 0)
    assert (restored["event"], restored["events"], restored["people"]) == ("restored", 70, 7)
    assert restored["duplicates"] == 1
    assert len(server.export()) == 71
    assert call("verify", "--work", str(tmp_path / "work"), *KEYS).exit_code == 0

    with pytest.raises(FinalError, match="is closed, not undone"):
        call("undo", "old", *to, "--restore", "--yes")
    with pytest.raises(FinalError, match="has no import 'other'"):
        call("undo", "other", *to, "--yes")
    with pytest.raises(FinalError, match="does not accept the keys: 401 Invalid") as refused:
        call("undo", "old", "--to", server.url, "--api-key", API_KEY, "--secret-key", "hush")
    assert "hush" not in str(refused.value)


def test_a_run_whose_import_is_undone_meanwhile_is_not_complete(
    tmp_path: Path, server: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ["--to", server.url, *KEYS]
    line = ["run", *history(tmp_path, 9), *to, "--work", str(tmp_path / "work"), "--import", "old"]
    real = drive.drive

    def undone(asked: drive.Drive) -> Outcome:
        outcome = real(asked)
        assert call("undo", "old", *to, "--yes").exit_code == 0
        return outcome

    with monkeypatch.context() as patched:
        patched.setattr(drive, "drive", undone)
        found = call(*line, "--yes")
    assert found.exit_code == 1
    assert "not complete: 9 of 9 acknowledged" in found.stderr
    assert f"import old was undone at {server.url} while it was sent" in found.stderr
    assert json.loads(server.ask("GET", "/api/1/imports/old")[1])["state"] == "undone"
    assert server.export() == []
    again = call(*line, "--yes")
    assert again.exit_code == 0, again.output
    assert len(server.export()) == 9
    assert json.loads(server.ask("GET", "/api/1/imports/old")[1])["state"] == "closed"


def test_nothing_of_an_undone_import_is_sent_to_mend_it(
    tmp_path: Path, server: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ["--work", str(tmp_path / "work")]
    line = ["run", *history(tmp_path, 9), "--to", server.url, *KEYS, *work]
    assert call(*line, "--import", "old", "--yes").exit_code == 0
    assert call("undo", "old", "--to", server.url, *KEYS, "--yes").exit_code == 0
    for more in ([], ["--repair"]):
        with pytest.raises(FinalError, match="The import old is undone at") as gone:
            call("verify", *work, *KEYS, *more)
        assert "--restore" in str(gone.value)
    monkeypatch.setenv("RETROFILL_SECRET_KEY", SECRET_KEY)
    with pytest.raises(FinalError, match="The import old is undone at"):
        call("resend", *work, *KEYS[:2], "--from", "2020-01-01", "--to", "2100-01-01", "--yes")
    assert server.export() == []


_NO_MEMORY = """
from pathlib import Path
from retrofill.engine.refolder import ChildRefolder
from retrofill.errors import StoreError
real = ChildRefolder.ask
async def ask(self, task):
    if Path({armed!r}).exists():
        raise StoreError("There is no memory")
    return await real(self, task)
ChildRefolder.ask = ask
"""


def test_an_undo_that_cannot_be_done_says_why_and_is_called_off(tmp_path: Path) -> None:
    armed = tmp_path / "armed"
    armed.touch()
    server = Process(tmp_path / "data", first=_NO_MEMORY.format(armed=str(armed)))
    origin = {"source_name": "retrofill", "source_version": "old"}
    try:
        server.start()
        server.wait_until_ready()
        server.send([{"user_id": "user-1", "event_type": "Seen", "ingestion_metadata": origin}])
        to = ["--to", server.url, *KEYS]
        with pytest.raises(Error, match="There is no memory"):
            call("undo", "old", *to, "--yes")
        shown = json.loads(server.ask("GET", "/api/1/imports/old")[1])
        found = [shown[name] for name in ("state", "tries", "reason", "events")]
        assert found == ["undoing", 1, "There is no memory", 1]
        done = call("undo", "old", *to, "--cancel")
        assert "tried 1 times, the last one failed: There is no memory" in done.stderr
        assert "called off, nothing has changed: the import is open" in done.stderr
        shown = json.loads(server.ask("GET", "/api/1/imports/old")[1])
        found = [shown[name] for name in ("state", "tries", "reason", "events")]
        assert found == ["open", 0, None, 1]
        with pytest.raises(FinalError, match="neither being undone nor restored"):
            call("undo", "old", *to, "--cancel")
        armed.unlink()
        assert call("undo", "old", *to, "--yes").exit_code == 0
        assert server.ask("GET", "/api/1/imports/old/export")[0] == 404
    finally:
        server.end()


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


def test_a_run_of_an_undone_import_sends_all_of_it_anew(tmp_path: Path, server: Process) -> None:
    to = ["--to", server.url, *KEYS]
    work = tmp_path / "work"
    line = ["run", *history(tmp_path, 70), *to, "--work", str(work), "--yes"]
    assert call(*line, "--import", "old").exit_code == 0
    call("undo", "old", *to, "--yes")
    # Without the secret key nobody can say that it was undone.
    blind = ["run", *line[1:4], *to[:4], "--work", str(work), "--yes"]
    assert "was undone" not in call(*blind).stderr
    assert server.export() == []

    anew = call(*line)
    assert f"import old was undone at {server.url}" in anew.stderr
    assert "as generation 2" in anew.stderr
    assert len(server.export()) == 70
    assert (work / "journal-1.db").exists()
    same = call(*line)
    assert "was undone" not in same.stderr
    assert "resuming" in same.stderr
    assert call("verify", "--work", str(work), *KEYS).exit_code == 0

    # The mapping was wrong: undone again, the same directory takes another one.
    call("undo", "old", *to, "--yes")
    history(tmp_path, 30, kind="Mended")
    mended = call(*line, "--json")
    told = [json.loads(one) for one in mended.stdout.splitlines()]
    assert (told[0]["event"], told[0]["generation"]) == ("undone", 3)
    assert told[0]["journal"] == str(work / "journal-2.db")
    assert {row["event_type"] for row in server.export()} == {"Mended"}
    assert len(server.export()) == 30

    # Undone while another directory had sent the next generation: this journal is of none that is there.
    call("undo", "old", *to, "--yes")
    other = [*line[:-2], str(tmp_path / "other"), "--yes", "--import", "old"]
    assert call(*other).exit_code == 0
    late = call(*line)
    assert "as generation 4" in late.stderr
    assert len(server.export()) == 30

    # A stage that was removed is made anew, and the journal beside it is none of the next generation.
    call("undo", "old", *to, "--yes")
    shutil.rmtree(work / "stage")
    bare = call(*line, "--import", "old")
    assert "as generation 5" in bare.stderr
    assert len(server.export()) == 30
    assert json.loads(server.ask("GET", "/api/1/imports/old")[1])["state"] == "closed"
