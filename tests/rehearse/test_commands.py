"""`retrofill rehearse` as it is typed: against nothing, against an export, and what cannot be."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.backfill.exporting import Exporting, serving
from tests.faults.process import API_KEY, SECRET_KEY, Process
from tests.rehearse.test_reality import KEYS, call, rehearsed

from retrofill.backfill.journal import locked
from retrofill.errors import BusyError, Error, FinalError, InputError, RetryError
from retrofill.rehearse import outcome

pytestmark = pytest.mark.slow

Json = dict[str, Any]
START_MS = 1_700_006_400_000  # 2023-11-15
MAP = """
source: {format: ndjson, columns: {props: JSON, device: VARCHAR}}
event: {user_id: user, device_id: device, event_type: event, time: at, insert_id: id, user_properties: props}
"""


def history(folder: Path, rows: list[Json]) -> list[str]:
    (folder / "history.ndjson").write_text("\n".join(map(json.dumps, rows)))
    (folder / "map.yaml").write_text(MAP)
    return [str(folder / "history.ndjson"), "--map", str(folder / "map.yaml")]


def row(number: int, user: str, at: int = 0, **more: Any) -> Json:
    return {"user": user, "event": "Seen", "at": START_MS + at, "id": f"i-{number}", **more}


def against(folder: Path, given: list[str], name: str, *options: str) -> Json:
    line = ["rehearse", *given, "--against", name, "--work", str(folder / "work"), "--json"]
    made: Json = json.loads(call(*line, *options).stdout)
    assert made == json.loads((folder / "work" / outcome.FILE).read_text())
    assert not (folder / "work" / "rehearsal.tmp").exists()
    return made


def test_against_nothing_everybody_is_new(tmp_path: Path) -> None:
    rows = [row(n, f"user-{n % 7}", n * 1000, props={"n": n}) for n in range(70)]
    rows.append(row(99, "User-3", 5))
    made = against(tmp_path, history(tmp_path, rows), "none")
    assert (made["kind"], made["exact"]) == ("nothing", True)
    assert made["new_users"] == {"before": {}, "after": {"2023-11-15": 8}}
    assert made["volume"]["stored"] == made["volume"]["events"] == 71
    assert made["new_people"] == 8
    assert made["synced"]["people"] == made["skipped"]["people"] == 0
    assert made["doubles"] == [
        {"evidence": "case or space", "value": "user-3", "ids": ["User-3", "user-3"], "live": False}
    ]


def test_tables_are_printed_and_say_that_nothing_was_sent(tmp_path: Path) -> None:
    given = history(tmp_path, [row(n, f"user-{n}") for n in range(3)])
    line = ["rehearse", *given, "--against", "none", "--work", str(tmp_path / "work")]
    found = call(*line, "--sample", "100%")
    assert "New users by day (UTC)" in found.stdout
    assert "2023-11-15" in found.stdout
    assert "Nothing was sent" in found.stdout
    assert "sending the import into a scratch directory" in found.stderr


def export_row(number: int, person: int, user: str, at: str, **more: Any) -> Json:
    return {
        "amplitude_id": person,
        "user_id": user,
        "device_id": f"device-{person}",
        "event_type": "Live",
        "event_time": at,
        "server_upload_time": at,
        "user_creation_time": "2023-11-20 00:00:00.000000",
        "$insert_id": f"live-{number}",
        "user_properties": {},
        "country": "Brazil",
        **more,
    }


def archive(path: Path, rows: list[Json]) -> str:
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("1/1_2023.json", "\n".join(map(json.dumps, rows)))
    return str(path)


def test_an_export_may_be_a_folder_and_what_a_computer_added_to_its_zip_is_passed_over(
    tmp_path: Path,
) -> None:
    live = [export_row(1, 900, "user-1", "2023-11-20 10:00:00.000000")]
    zipped = archive(tmp_path / "export.zip", live)
    with zipfile.ZipFile(zipped) as whole:
        whole.extractall(tmp_path / "folder")
    (tmp_path / "folder" / ".DS_Store").write_bytes(b"\0junk")
    with zipfile.ZipFile(zipped, "a") as whole:
        whole.writestr("__MACOSX/1/._1_2023-11-20_10#1.json.gz", b"\0junk")
    given = history(tmp_path, [row(1, "user-1")])
    for where in (zipped, str(tmp_path / "folder")):
        assert against(tmp_path, given, where)["first_seen"]["moved"] == 1


def test_an_export_may_hold_any_number(tmp_path: Path) -> None:
    odd = {"plan": "a", "large": 10**20, "list": [2**64]}
    live = [export_row(1, 900, "user-1", "2023-11-20 10:00:00.000000", user_properties=odd)]
    rows = [row(1, "user-1", props={"plan": "old", "large": 1})]
    made = against(tmp_path, history(tmp_path, rows), archive(tmp_path / "export.zip", live))
    change = {"name": "large", "built_in": False, "old": "1e20", "new": "1", "people": 1}
    assert change in made["synced"]["listed"]


def test_against_an_export_it_is_an_estimate(tmp_path: Path) -> None:
    live = [
        export_row(1, 900, "user-1", "2023-11-20 10:00:00.000000", user_properties={"plan": "a"}),
        export_row(2, 900, "user-1", "2023-11-21 10:00:00.000000", user_properties={"plan": "b"}),
        export_row(3, 901, "user-2", "2023-11-21 10:00:00.000000", user_properties={"plan": "b"}),
        export_row(4, 902, "USER-4", "2023-11-22 10:00:00.000000"),
    ]
    rows = [
        row(1, "user-1", props={"plan": "old"}),
        row(2, "user-4"),
        row(3, "user-3", device="device-901"),
    ]
    zipped = archive(tmp_path / "export.zip", live)
    made = against(tmp_path, history(tmp_path, rows), zipped)
    assert (made["kind"], made["exact"]) == ("export", False)
    assert len(made["unknown"]) == 6
    assert made["skip_user_properties_sync"]
    assert made["new_users"]["before"] == {"2023-11-20": 1, "2023-11-21": 1, "2023-11-22": 1}
    assert made["new_users"]["after"] == {"2023-11-15": 3, "2023-11-21": 1, "2023-11-22": 1}
    assert made["active_users"]["after"]["2023-11-15"] == 3
    assert (made["first_seen"]["moved"], made["first_seen"]["days_max"]) == (1, 5.0)
    change = {"name": "plan", "built_in": False, "old": '"b"', "new": '"old"', "people": 1}
    assert change in made["synced"]["listed"]
    assert made["skipped"]["names"] == {}
    assert {
        "evidence": "case or space",
        "value": "user-4",
        "ids": ["USER-4", "user-4"],
        "live": True,
    } in made["doubles"]
    assert {
        "evidence": "device",
        "value": "device-901",
        "ids": ["user-2", "user-3"],
        "live": True,
    } in made["doubles"]
    # user-1 is live since the 21st: what is live of its type is left out.
    late = against(
        tmp_path, history(tmp_path, [row(9, "user-1", event="Live")]), zipped, "--until", "live"
    )
    assert late["volume"]["events"] == 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    one = Process(tmp_path / "data", limits="amplitude")
    one.start()
    try:
        one.wait_until_ready()
        yield one
    finally:
        one.end()


def live(number: int, user: str | None, device: str, **more: Any) -> Json:
    said = {"event_type": "Live", "time": START_MS + 86_400_000, "insert_id": f"live-{number}"}
    return {"device_id": device, **({"user_id": user} if user else {}), **said, **more}


def test_each_figure_against_a_server(tmp_path: Path, server: Process) -> None:
    limits = {"limits": {"daily_quota": 60, "id_length_min": 5}, "silenced_devices": ["mute-1"]}
    assert server.ask("PUT", "/api/1/project", limits)[0] == 200
    server.send(
        [
            live(1, "user-1", "phone-1", user_properties={"plan": "paid"}),
            live(2, None, "anon-1"),
            live(3, "Zoe-77777", "phone-3", user_properties={"email": "zoe@b.org"}),
            live(4, "far-12345", "phone-4", user_properties={"email": "q@b.org"}),
            live(5, "user-1", "phone-1", insert_id="i-1"),
        ]
    )
    rows = [
        row(1, "user-1", device="phone-1"),  # stored already
        row(2, "user-1", device="phone-1", props={"plan": "free"}),
        row(3, "user-2", device="anon-1"),
        row(4, "zoe-77777", device="phone-5"),
        row(5, "user-6", device="phone-6", props={"email": "Q@b.org"}),
        row(6, "user-7", device="mute-1"),
        *(row(100 + n, f"many-{n % 12}", device="kiosk-1") for n in range(24)),
        *(row(200 + n, "busy-1", n, device="phone-9") for n in range(70)),
    ]
    made = rehearsed(
        server, tmp_path / "work", history(tmp_path, rows), "--no-skip-user-properties-sync"
    )
    assert made["exact"]
    assert made["warnings"] == []
    assert made["duplicates"] == 1
    assert (
        made["refused"] == {"Device is silenced: mute-1": 1} or sum(made["refused"].values()) == 1
    )
    assert made["volume"]["events"] == 99
    assert made["volume"]["stored"] == 98
    assert made["first_seen"]["moved"] == 2
    change = {"name": "plan", "built_in": False, "old": '"paid"', "new": '"free"', "people": 1}
    assert change in made["synced"]["listed"]
    assert made["skipped"] == {"people": 0, "names": {}, "listed": []}
    assert made["merged"] == 0
    assert made["shared"] == [{"device_id": "kiosk-1", "users": 12, "before": 0}]
    assert {"kind": "user", "id": "busy-1", "why": "daily quota"} in made["waiting"]
    assert made["quota_days"] == 2
    doubles = {(one["evidence"], tuple(one["ids"])) for one in made["doubles"]}
    assert doubles == {
        ("case or space", ("Zoe-77777", "zoe-77777")),
        ("email", ("far-12345", "q@b.org")),
    }


def test_who_joins_too_many_is_foreseen(tmp_path: Path, server: Process) -> None:
    assert server.ask("PUT", "/api/1/project", {"limits": {"merges_per_user": 2}})[0] == 200
    server.send(
        [
            live(1, "guest-99", "desk-9"),
            *(live(2 + at, None, f"booth-{at}") for at in range(4)),
            live(6, "guest-99", "booth-0"),
        ]
    )
    rows = [row(at, "guest-99", device=f"booth-{at}") for at in range(1, 4)]
    made = rehearsed(server, tmp_path / "work", history(tmp_path, rows))
    assert made["exact"]
    assert made["merged"] == 1
    assert (made["held_users"], made["held"]) == (1, [{"user_id": "guest-99", "devices": 2}])


def test_keys_that_rows_of_other_people_hold_are_asked_for(tmp_path: Path, server: Process) -> None:
    limits = {"limits": {"dedupe_scope": "project"}}
    assert server.ask("PUT", "/api/1/project", limits)[0] == 200
    server.send([live(1, "far-away-1", "phone-1", insert_id="i-1")])
    rows = [row(n, f"user-{n}", device=f"device-{n}") for n in range(1, 4)]
    given = history(tmp_path, rows)
    made = rehearsed(server, tmp_path / "work", given)
    assert (made["duplicates"], made["volume"]["stored"], made["new_people"]) == (1, 2, 2)
    call("run", *given, "--to", server.url, *KEYS, "--work", str(tmp_path / "work"), "--yes")
    assert len(server.export()) == 3


def test_a_merge_that_was_taken_back_stays_so(tmp_path: Path, server: Process) -> None:
    server.send(
        [live(1, "user-1", "phone-9"), live(2, None, "phone-1"), live(3, "user-1", "phone-1")]
    )
    merges = json.loads(server.ask("GET", "/api/1/merges")[1])["merges"]
    assert server.ask("DELETE", f"/api/1/merges/{merges[0]['id']}")[0] == 200
    rows = [
        {**row(1, "", 1, device="phone-5"), "user": None},
        row(2, "user-1", 2, device="phone-5"),
        row(3, "user-1", 3, device="phone-1"),
    ]
    given, work = history(tmp_path, rows), tmp_path / "work"
    made = rehearsed(server, work, given)
    assert made["exact"], made["warnings"]
    assert made["merged"] == 1
    call("run", *given, "--to", server.url, *KEYS, "--work", str(work), "--yes")
    told = call("verify", "--work", str(work), *KEYS).stdout
    assert "rehearsal: 12 of 12 figures came as predicted" in told


def test_verify_says_how_the_rehearsal_did_and_the_report_shows_both(
    tmp_path: Path, server: Process
) -> None:
    server.send([live(1, "user-1", "phone-1", user_properties={"plan": "paid"})])
    rows = [row(n, f"user-{n}", device=f"phone-{n}", props={"plan": "free"}) for n in range(4)]
    given, work = history(tmp_path, rows), str(tmp_path / "work")
    rehearsed(server, tmp_path / "work", given, "--no-skip-user-properties-sync")
    page = tmp_path / "work" / "report.html"
    call("report", "--work", work)
    assert "How the rehearsal did" not in page.read_text()
    for expected in ("<h2>Rehearsal</h2>", "New users by day, before and after", "exact", "plan"):
        assert expected in page.read_text()
    call("run", *given, "--to", server.url, *KEYS, "--work", work, "--yes")
    good = call("verify", "--work", work, *KEYS).stdout
    assert "rehearsal: 12 of 12 figures came as predicted" in good
    # Somebody live does what the rehearsal could not know.
    server.send(
        [live(9, "user-1", "phone-1", user_properties={"plan": "gold"}, time=START_MS - 600_000)]
    )
    told = call("verify", "--work", work, *KEYS, "--json").stdout.splitlines()
    figures = {one["name"]: one for one in map(json.loads, told) if one["event"] == "figure"}
    wrong = {name for name, one in figures.items() if not one["same"]}
    assert wrong == {
        *("new users by day", "active users by day", "first seen moved, days at most"),
        "listed changes of properties",
    }
    assert figures["new users by day"]["differing"] == [
        "2023-11-14: 0 predicted, 1 found",
        "2023-11-15: 4 predicted, 3 found",
    ]
    said = call("verify", "--work", work, *KEYS).stdout
    assert "rehearsal: 8 of 12 figures came as predicted" in said
    assert "what arrived beside the import" in said
    call("report", "--work", work)
    assert "How the rehearsal did" in page.read_text()
    # Another import in the same directory was never rehearsed.
    (tmp_path / "work" / outcome.FILE).write_text("{}")
    assert "rehearsal:" not in call("verify", "--work", work, *KEYS).stdout


def test_after_a_rehearsal_against_an_export_charts_are_compared(
    tmp_path: Path, server: Process
) -> None:
    events = [live(n, f"user-{n}", f"device-{n}") for n in range(3)]
    server.send(events)
    shown = [export_row(n, 900 + n, f"user-{n}", "2023-11-16 00:00:00.000000") for n in range(3)]
    given = history(tmp_path, [row(n, f"user-{n}") for n in range(2, 5)])
    zipped = archive(tmp_path / "export.zip", shown)
    against(tmp_path, given, zipped)
    work = str(tmp_path / "work")
    call("run", *given, "--to", server.url, *KEYS, "--work", work, "--yes")
    said = call("verify", "--work", work, *KEYS).stdout
    assert "rehearsal: 2 of 2 figures came as predicted" in said
    assert "as predicted new users by day: predicted 5 in 2" in said


def failing(folder: Path, name: str, *keys: str) -> Error:
    given = history(folder, [row(1, "user-1")])
    with pytest.raises(Error) as failed:
        call("rehearse", *given, "--against", name, "--work", str(folder / "work"), *keys)
    assert "hush" not in str(failed.value)
    return failed.value


def test_what_cannot_be_is_told(tmp_path: Path, server: Process) -> None:
    assert failing(tmp_path, server.url).what.startswith("No API key")
    wrong = failing(tmp_path, server.url, "--api-key", API_KEY, "--secret-key", "hush")
    assert isinstance(wrong, FinalError)
    assert wrong.what == "The server does not accept the keys: 401"
    assert "cannot be read as a whole" in failing(tmp_path, "amplitude", *KEYS).what
    nobody = failing(tmp_path, "http://127.0.0.1:9", *KEYS)
    assert (nobody.code, nobody.what[-35:]) == (
        2,
        "does not say that it is a Retrofill server"[-35:],
    )
    with serving(Exporting()) as other:
        stranger = failing(tmp_path, other.url, *KEYS)
        assert (stranger.code, other.asked) == (2, ["/healthz"])  # it never saw the keys
    with serving(Exporting(), health=b'{"service":"retrofill"}') as old:
        assert failing(tmp_path, old.url, *KEYS).code == 1
    missing = failing(tmp_path, str(tmp_path / "none.zip"))
    assert (type(missing), missing.code) == (InputError, 2)
    (tmp_path / "text.zip").write_text("this is no zip\n")
    assert "no export of Amplitude's" in failing(tmp_path, str(tmp_path / "text.zip")).what
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and nothing")
    assert "no whole export" in failing(tmp_path, str(tmp_path / "cut.zip")).what
    other_zip = archive(tmp_path / "other.zip", [{"a": 1}])
    assert "no line of it has" in failing(tmp_path, other_zip).what
    with closing(locked(tmp_path / "work")):  # as another rehearsal does
        assert isinstance(failing(tmp_path, "none"), BusyError)
    assert (RetryError.code, SECRET_KEY in str(wrong)) == (1, False)
    assert not (tmp_path / "work" / "rehearsal.tmp").exists()
    assert server.export() == []
