"""`retrofill merges` and `retrofill unmerge` at the real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from tests.server.live import Live
from tests.server.test_project import call
from typer.testing import CliRunner, Result

from retrofill.cli import merges
from retrofill.errors import FinalError, InputError

pytestmark = pytest.mark.slow

KEYS = ["--api-key", "KEY", "--secret-key", "SECRET"]
app = typer.Typer()
app.command("merges")(merges.command)
app.command("unmerge")(merges.unmerge)


def run(*words: str) -> Result:
    found = CliRunner().invoke(app, [*words, *KEYS])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_a_merge_is_listed_taken_back_and_stays_so(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        to = ["--to", live.address]
        for ids in (
            {"device_id": "kiosk-9"},
            {"device_id": "phone-1", "user_id": "ann-111"},
            {"device_id": "kiosk-9", "user_id": "ann-111"},
        ):
            event = {"event_type": "View", **ids}
            assert call(live, "POST", "/batch", {"api_key": "KEY", "events": [event]})[0] == 200
        (line,) = run("merges", *to).stdout.splitlines()
        assert line.startswith("3-0 · merged ")
        assert "user ann-111 on device kiosk-9 · View " in line
        listed = json.loads(run("merges", "--user", "ann-111", "--json", *to).stdout)
        assert (listed["event"], listed["id"], listed["state"]) == ("merge", "3-0", "merged")
        assert run("merges", "--held", *to).stderr == "nobody is held\n"
        with pytest.raises(InputError, match="goes with --limit alone"):
            run("merges", "--held", "--unmerged", *to)
        for words in (["--unmerged"], ["--amplitude-id", "5"], ["--before", "3-0"]):
            assert not run("merges", *words, *to).stdout
        with pytest.raises(InputError, match="Nobody is here"):
            run("unmerge", "3-0", *to)
        for wrong in ("3-1", "x", "1-2-3"):
            with pytest.raises(FinalError, match="There is no such merge"):
                run("unmerge", wrong, "--yes", *to)
        done = run("unmerge", "3-0", "--yes", *to).stdout
        assert done.startswith("3-0 · unmerged ")
        assert run("unmerge", "3-0", "--yes", *to).stdout == done
        assert run("merges", *to).stderr == "no merges\n"
        assert run("merges", "--unmerged", *to).stdout == done
        again = run("unmerge", "3-0", "--restore", "--yes", *to).stdout
        assert again.startswith("3-0 · merged ")
        with pytest.raises(FinalError, match="There is no such merge"):
            run("unmerge", "2-0", "--restore", "--yes", *to)
        with pytest.raises(FinalError, match="an id is BLOCK-ROW"):
            run("merges", "--before", "the-last", *to)
        assert run("unmerge", "3-0", "--yes", *to).stdout.startswith("3-0 · unmerged ")
        for wrong in ("?state=x", "?limit=0", "?user_id=a&amplitude_id=1", "?before=x", "?a=1"):
            assert call(live, "GET", f"/api/1/merges{wrong}")[0] in {400, 404}
    with Live(tmp_path) as live:  # also after it was stopped
        event = {"event_type": "View", "device_id": "kiosk-9", "user_id": "ann-111"}
        assert call(live, "POST", "/batch", {"api_key": "KEY", "events": [event]})[0] == 200
        assert call(live, "GET", "/api/1/merges") == (200, {"merges": []})
        status, said = call(live, "DELETE", "/api/1/merges/3-0")
        assert (status, said["state"], said["absorbed"]) == (200, "unmerged", listed["absorbed"])


def test_users_who_join_too_many_are_listed(tmp_path: Path) -> None:
    with Live(tmp_path) as live:
        to = ["--to", live.address]
        assert call(live, "PUT", "/api/1/project", {"limits": {"merges_per_user": 1}})[0] == 200
        for ids in (
            {"device_id": "phone-1", "user_id": "guest-1"},
            *({"device_id": f"kiosk-{at}"} for at in range(3)),
            *({"device_id": f"kiosk-{at}", "user_id": "guest-1"} for at in range(3)),
        ):
            event = {"event_type": "View", **ids}
            assert call(live, "POST", "/batch", {"api_key": "KEY", "events": [event]})[0] == 200
        (line,) = run("merges", "--held", *to).stdout.splitlines()
        assert line.startswith("user guest-1 · ")
        assert " · 1 merged · held 2 devices in 2 events, " in line
        settings = {"limits": {"merges_per_user": 1}, "merge_always": ["guest-1"]}
        assert call(live, "PUT", "/api/1/project", settings)[1]["settings"]["merge_always"]
        listed = json.loads(run("merges", "--held", "--json", "--limit", "5", *to).stdout)
        assert (listed["event"], listed["devices"], listed["allowed"]) == ("held", 2, True)
        assert call(live, "GET", "/api/1/merges/held?limit=0")[0] == 400
        assert len(call(live, "GET", "/api/1/merges")[1]["merges"]) == 1
