"""`retrofill why` at the real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.server.live import Live
from tests.server.test_project import call
from typer.testing import CliRunner, Result

from retrofill.cli import why
from retrofill.errors import Error, FinalError, InputError

pytestmark = pytest.mark.slow

KEYS = ["--api-key", "KEY", "--secret-key", "SECRET"]
ANN = {"event_type": "View", "device_id": "phone-1", "user_id": "ann-111"}
app = typer.Typer()
app.command()(why.command)


def run(*words: str) -> Result:
    found = CliRunner().invoke(app, [*words, *KEYS], env={"COLUMNS": "200"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_why_says_what_made_a_value_in_a_table_and_as_json(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        to = ["--to", live.address]
        events: list[dict[str, Any]] = [
            {**ANN, "insert_id": "a", "user_properties": {"plan": "free"}, "platform": "iOS"},
            {
                **ANN,
                "insert_id": "b",
                "user_properties": {"$set": {"plan": "pro"}},
                "ingestion_metadata": {"source_name": "retrofill", "source_version": "old-shop"},
            },
            {**ANN, "insert_id": "c", "user_properties": {"$setOnce": {"plan": "gold"}}},
        ]
        for one in events:
            assert call(live, "POST", "/batch", {"api_key": "KEY", "events": [one]})[0] == 200
        found = run("plan", "--user", "ann-111", *to)
        assert found.stdout.startswith('value of ann-111: "pro"\n')
        made = next(line for line in found.stdout.splitlines() if "old-shop" in line)
        assert '$set "pro"' in made
        assert '"free" → "pro"' in made
        assert made.split()[-1] == "yes"
        assert "/batch 2:0" in made
        assert "ignored: its operation does nothing" in found.stdout

        lines = [
            json.loads(line)
            for line in run("plan", "--user", "ann-111", "--json", *to).stdout.splitlines()
        ]
        assert [line["event"] for line in lines] == ["value", "cause", "cause", "cause"]
        assert (lines[0]["value"], lines[0]["tried"]) == ("pro", True)
        assert lines[2]["imported_by"] == "old-shop"
        uuid = lines[1]["of"]["uuid"]
        assert run("plan", "--event", uuid, *to).stdout.startswith('value of ann-111: "free"')
        found = run("plan", "--insert-id", "b", "--device", "phone-1", *to)
        assert '"pro"' in found.stdout.splitlines()[0]
        found = run("--column", "platform", "--amplitude-id", str(lines[0]["amplitude_id"]), *to)
        assert found.stdout.startswith('value of ann-111: "iOS"')
        assert "UTC" in run("--first-seen", "--device", "phone-1", *to).stdout.splitlines()[0]
        found = run("size", "--group", "org/acme", *to)
        assert found.stdout == "value: nothing\nno event ever said it\n"
        assert run("other", "--user", "ann-111", *to).stdout.endswith("no event ever said it\n")

        errors: list[tuple[list[str], type[Error], str, str]] = [
            (["plan"], InputError, "0 ids are given", "Give one of user_id"),
            (["plan", "--user", "nobody"], FinalError, "There is no such person", ""),
            (["plan", "--event", "none"], FinalError, "There is no such event", ""),
            (["--merge", "5"], FinalError, "5 was not merged into anybody", ""),
            (["size", "--group", "acme"], InputError, "'acme' is no group", "TYPE/VALUE"),
            (["--user", "ann-111"], InputError, "one thing", "Give PROPERTY, or one of"),
            (["plan", "--first-seen"], InputError, "one thing", "Give PROPERTY, or one of"),
        ]
        for words, error, what, mend in errors:
            with pytest.raises(error) as problem:
                run(*words, *to)
            assert isinstance(problem.value, Error)
            assert what in problem.value.what
            assert mend in problem.value.mend
        with pytest.raises(InputError, match="only that can say why"):
            run("plan", "--user", "ann-111", "--to", "http://127.0.0.1:9")
        status, said = call(live, "GET", "/api/1/why?property=plan&user_id=nobody")
        assert (status, said["error"]["message"]) == (404, "There is no such person")
        status, said = call(live, "GET", "/api/1/why?property=plan")
        details = "Give one of user_id, device_id and amplitude_id, or an event"
        assert (status, said["error"]["metadata"]) == (400, {"details": details})
