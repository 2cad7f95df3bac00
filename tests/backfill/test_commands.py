"""The commands, from a source to a verified import, as a person would type them."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
from msgspec.structs import replace
from tests.backfill.destination import Misbehaving
from tests.backfill.exporting import Exporting, row, serving
from tests.backfill.staging import ndjson
from tests.backfill.staging import run as stage
from tests.backfill.test_kill import listening
from tests.faults.process import held_port
from typer.testing import CliRunner, Result

from retrofill.backfill import drive
from retrofill.backfill import keys as key_ring
from retrofill.backfill.profile import PROFILES, adjust, choose, target
from retrofill.backfill.send import LONE_REFUSED_MAX
from retrofill.cli import report, resend, run, status, undo_recipe, verify
from retrofill.cli.run import resumable, resume_line
from retrofill.errors import Error, FinalError, InputError

pytestmark = pytest.mark.slow

app = typer.Typer()
for name, module in (
    ("run", run),
    ("status", status),
    ("verify", verify),
    ("report", report),
    ("resend", resend),
    ("undo-recipe", undo_recipe),
):
    app.command(name, epilog=module.EXAMPLE)(module.command)

MAP = """
source: {format: ndjson}
event:
  user_id: user
  device_id: device
  event_type: event
  time: at
  insert_id: id
  event_properties: {n: n}
"""
KEYS = ["--api-key", "key"]


def source(folder: Path, rows: int) -> list[str]:
    lines = [
        json.dumps(
            {
                "user": f"user-{n % 9}",
                "device": f"device-{n % 9}",
                "event": "Seen",
                "at": 1_600_000_000_000 + n,
                "id": f"i-{n % 9}-{n // 9}",
                "n": n,
            }
        )
        for n in range(rows)
    ]
    (folder / "history.ndjson").write_text("\n".join(lines))
    (folder / "map.yaml").write_text(MAP)
    return [str(folder / "history.ndjson"), "--map", str(folder / "map.yaml")]


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def objects(found: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_a_history_is_sent_shown_and_reported(tmp_path: Path) -> None:
    given = source(tmp_path, 500)
    work = str(tmp_path / "work")
    to = Misbehaving()
    with listening(to) as url:
        line = ["run", *given, "--to", url, "--work", work, "--import", "old", *KEYS]
        found = call(*line, "--profile", "retrofill", "--yes", "--json")
        assert found.exit_code == 0, found.output
        plan, *_, end = objects(found)
        assert (plan["import"], plan["events"]) == ("old", 500)
        assert (end["complete"], end["acknowledged"], end["waiting"]) == (True, 500, 0)
        assert end["seconds_left"] is None
        assert len(to.stored) == 500
        assert "key" not in found.output.replace("keys", "")
        other = refused(*line, "--profile", "retrofill", "--until", "2020-01-01")
        assert "was begun as import 'old' with another source" in str(other)
        again = call(*line, "--profile", "retrofill")
        assert again.exit_code == 0
        assert len(to.stored) == 500
        assert to.repeats == 0
        assert objects(call("status", "--work", work, "--json"))[0]["state"] == "complete"
        assert "Seen  500" in call("undo-recipe", "--work", work).stdout
        page = call("report", "--work", work).stdout.strip()
        assert "<html" in Path(page).read_text()
        lost = call(
            "resend", "--work", work, "--from", "2020-01-01", "--to", "2100-01-01", "--yes", *KEYS
        )
        assert lost.exit_code == 0, lost.output
        assert to.repeats == 500


def test_a_run_that_cannot_reach_its_destination_never_says_complete(tmp_path: Path) -> None:
    given = source(tmp_path, 20)
    found = call(
        "run", *given, "--to", "http://127.0.0.1:9", "--work", str(tmp_path / "w"), "--yes",
        "--profile", "retrofill", "--give-up-after", "2s", *KEYS,
    )  # fmt: skip
    assert found.exit_code == 1
    assert "not complete" in found.output
    assert "20 waiting" in found.output
    assert "to go on: retrofill" in found.output


@pytest.mark.parametrize("refused", [1, 90])
def test_what_was_refused_is_sent_again_when_the_destination_is_mended(
    tmp_path: Path, refused: int
) -> None:
    """One event of many, and all of them, where the run ends before it has tried each."""
    given = source(tmp_path, 90)
    ids = [f"i-{n % 9}-{n // 9}" for n in range(refused)]
    to = Misbehaving(poison=frozenset(ids), lists="none")
    work = ["--work", str(tmp_path / "w"), *KEYS]
    letters = tmp_path / "w" / "dead-letters-send.ndjson"
    with listening(to) as url:
        found = CliRunner().invoke(
            app, ["run", *given, "--to", url, *work, "--profile", "retrofill", "--yes"]
        )
        if refused == 1:
            assert found.exit_code == 0, found.output
        else:
            assert isinstance(found.exception, FinalError)
            assert "retrofill resend --refused" in found.exception.mend
            assert to.stored == []
        told = len(letters.read_text().splitlines())
        assert min(refused, LONE_REFUSED_MAX) <= told <= refused
        for window in ([], ["--to", "2026-03-01"], ["--refused", "--from", "2026-03-01"]):
            unclear = CliRunner().invoke(app, ["resend", *work, "--yes", *window])
            assert "Give --from and --to, or --refused" in str(unclear.exception)
        to.poison = frozenset()
        again = call("resend", "--refused", "--yes", *work)
        assert again.exit_code == 0, again.output
        assert f"{told} events were refused" in again.output
        assert "complete: 90 of 90 acknowledged" in again.output
    assert (len(to.stored), to.repeats, letters.read_text()) == (90, 0, "")
    people: dict[str, list[int]] = {}
    for event in to.stored:
        people.setdefault(event["user_id"], []).append(event["time"])
    assert refused == 1 or all(times == sorted(times) for times in people.values())


def test_a_run_that_leaves_only_dead_letters_is_complete(tmp_path: Path) -> None:
    given = source(tmp_path, 50)
    to = Misbehaving(poison=frozenset({"i-3-2"}), lists="none")
    with listening(to) as url:
        line = ["run", *given, "--to", url, "--work", str(tmp_path / "w"), *KEYS]
        found = call(*line, "--profile", "retrofill", "--yes")
    assert found.exit_code == 0, found.output
    assert "complete: 49 of 50 acknowledged" in found.output
    assert "1 dead letters" in found.output
    path = tmp_path / "w" / "dead-letters-send.ndjson"
    assert f"dead letters: {path}" in found.output
    (letter,) = [json.loads(text) for text in path.read_text().splitlines()]
    assert (letter["file"], letter["line"]) == (given[0], 22)
    assert letter["reason"] == "Invalid field values on some events"
    assert letter["row"] == Path(given[0]).read_text().splitlines()[21]
    assert objects(call("status", "--work", str(tmp_path / "w"), "--json"))[0]["dead"] == 1
    assert [json.loads(text) for text in path.read_text().splitlines()] == [letter]

    # Where the source is gone meanwhile the event stands for the row, and the run is as complete.
    (tmp_path / "two").mkdir()
    given = source(tmp_path / "two", 50)
    to = Misbehaving(poison=frozenset({"i-3-2"}), lists="none")
    honest = to.handle

    def handle(body: bytes, at: float) -> Any:
        for name in (given[0], given[2]):
            Path(name).unlink(missing_ok=True)
        return honest(body, at)

    to.handle = handle  # type: ignore[method-assign]  # the script of this test
    with listening(to) as url:
        line = ["run", *given, "--to", url, "--work", str(tmp_path / "w2"), *KEYS]
        assert call(*line, "--profile", "retrofill", "--yes").exit_code == 0
    (letter,) = map(json.loads, (tmp_path / "w2" / path.name).read_text().splitlines())
    assert json.loads(letter["row"])["insert_id"] == "i-3-2"


def test_limits_of_a_destination_that_does_not_answer_are_those_of_the_run_so_far(
    tmp_path: Path,
) -> None:
    given = source(tmp_path, 20)
    to = Misbehaving(faults={"503": 1.0})
    with closing(held_port()) as held:
        with listening(to, held.getsockname()[1]) as url:
            work = ["--work", str(tmp_path / "w"), "--give-up-after", "1s", *KEYS]
            line = ["run", *given, "--to", url, *work, "--yes"]
            assert call(*line, "--profile", "retrofill", "--json").exit_code == 1
        resumed = call(*line)
    assert (resumed.exit_code, "20 waiting" in resumed.output) == (1, True)
    assert f"! {url} does not answer: the limits of retrofill are kept" in resumed.output
    assert "1 requests, profile retrofill" in resumed.output
    other = call("run", *given, "--to", "http://127.0.0.1:9", *work[2:], "--work",
                 str(tmp_path / "other"), "--yes")  # fmt: skip
    assert "does not answer: the limits of amplitude are kept, --profile sets" in other.output


def test_verify_finds_what_is_missing_and_repair_sends_it(tmp_path: Path) -> None:
    given = source(tmp_path, 90)
    work = tmp_path / "work"
    to = Misbehaving()
    data = Exporting()
    keys = [*KEYS, "--secret-key", "secret"]
    with listening(to) as url, serving(data):
        line = ["run", *given, "--to", url, "--work", str(work), "--profile", "retrofill", "--yes"]
        assert call(*line, *KEYS).exit_code == 0
        at = to.arrivals[-1].at
        data.rows = [(int(at * 1000), row(event, int(at * 1000))) for event in to.stored]
        gone = data.rows.pop()[1]["$insert_id"]
        # The reading half of this destination has another address.
        kept = drive.remembered
        with pytest.MonkeyPatch.context() as patch:

            def split(folder: Path) -> Any:
                where, profile = kept(folder)
                return type(where)(where.name, where.ingest, data.url), profile

            patch.setattr(drive, "remembered", split)
            found = call("verify", "--work", str(work), *keys)
            assert found.exit_code == 1
            assert "1 missing · 0 doubled · 0 different · 0 extra" in found.stdout
            assert f"missing    {gone}" in found.stdout
            repaired = call("verify", "--work", str(work), "--repair", *keys)
            assert repaired.exit_code == 0, repaired.output
            assert to.repeats == 1


def refused(*words: str) -> Error:
    found = call(*words)
    assert isinstance(found.exception, Error), found.output
    assert found.exception.code == 2
    return found.exception


def test_wrong_lines_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    given = source(tmp_path, 5)
    base = ["run", *given, "--work", str(tmp_path / "w"), "--profile", "retrofill", *KEYS]
    to = ["--to", "http://127.0.0.1:9"]
    assert "no destination" in str(refused(*base, "--to", "nowhere"))
    for span in ("soon", "0s", "-5m", "nans", "infh"):
        assert "no time span" in str(refused(*base, *to, f"--give-up-after={span}"))
    assert "is no part" in str(refused(*base, *to, "--sample", "200%"))
    assert "is no time" in str(refused(*base, *to, "--until", "later"))
    none = ("--since", "2024-02-01", "--until", "2024-02-01")
    assert "No time lies between --since and --until" in str(refused(*base, *to, *none))
    assert "is no import name" in str(refused(*base, *to, "--import", "a b"))
    assert "Nobody is here to be asked" in str(refused(*base, *to))
    assert "out of range" in str(refused(*base, *to, "--events-per-request", "5000", "--yes"))
    assert "No API key" in str(refused(*base[:-2], *to))
    assert "Nothing is staged" in str(refused("status", "--work", str(tmp_path / "none")))


def test_a_line_to_go_on_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "run",
        "postgresql://me:a%2Fb:c@db.example/shop",
        "--api-key",
        "secret",
        "--to=http://x",
    ]
    words[1] += "?password=secret&sslmode=require&sslpassword=secret"
    monkeypatch.setattr(sys, "argv", ["retrofill", *words, "--secret-key=secret"])
    assert resume_line() == (
        "retrofill run 'postgresql://me:…@db.example/shop?password=…&sslmode=require&sslpassword=…' --api-key … --to=http://x '--secret-key=…'"
    )


def test_an_error_that_ends_a_run_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["retrofill", "run", "a.csv"])
    with pytest.raises(FinalError) as caught, resumable(as_json=True):
        raise FinalError("The key is unknown", mend="Check it")
    assert caught.value.mend == "Check it. To go on: retrofill run a.csv"
    assert json.loads(capsys.readouterr().out) == {
        "event": "end", "complete": False, "reason": "The key is unknown", "resume": "retrofill run a.csv",
    }  # fmt: skip


def test_keys_come_from_the_line_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROFILL_API_KEY", "from-environment")
    file = tmp_path / "keys"
    file.write_text("# mine\nexport RETROFILL_API_KEY='from-file'\nsecret_key = hush\n")
    assert key_ring.find(None, None, None).api_key == "from-environment"
    assert key_ring.find(None, None, file) == key_ring.Keys("from-file", "hush")
    assert key_ring.find("given", None, file).api_key == "given"
    assert key_ring.find(" given\n", "\thush ", None) == key_ring.Keys("given", "hush")
    assert "hush" not in repr(key_ring.find(None, None, file))
    file.write_text("nothing")
    with pytest.raises(InputError, match="names no key"):
        key_ring.find(None, None, file)


def test_a_destination_says_itself_whether_it_is_ours() -> None:
    with serving(Exporting(), health=b'{"service":"retrofill"}') as ours:
        assert choose(target(ours.url), None).name == "retrofill"
    with serving(Exporting()) as other:
        assert choose(target(other.url), None).name == "amplitude"
    assert choose(target("amplitude"), None).name == "amplitude"
    assert target("http://h/2/httpapi").ingest == "http://h/2/httpapi"
    assert target("http://h/base/").read == "http://h/base"
    with pytest.raises(InputError, match="no profile"):
        choose(target("amplitude"), "x")


def test_calls_about_groups_are_no_property_updates_of_a_person(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history: list[dict[str, Any]] = [
        {
            "uuid": f"p-{n}",
            "event": "$groupidentify",
            "distinct_id": "user-p",
            "timestamp": "2026-03-01T00:00:00Z",
            "properties": {"$group_type": "org", "$group_key": "acme", "$group_set": {"seats": n}},
        }
        for n in range(1801)
    ]
    source = ndjson(tmp_path / "s.ndjson", history)
    found = stage(tmp_path / "w", source, "posthog", skip_user_properties_sync=False)
    assert [(one.person, one.events) for one in found.hot_people] == [(0, 1801)]
    run.warn_of_updates(found, PROFILES["retrofill"], key_ring.Keys("key"))
    assert capsys.readouterr().err == ""
    (one,) = found.hot_people
    someone = replace(found, hot_people=[replace(one, person=7)])
    run.warn_of_updates(someone, PROFILES["retrofill"], key_ring.Keys("key"))
    assert "One person may have 1,801 property updates" in capsys.readouterr().err


def test_property_updates_count_only_when_they_are_synced() -> None:
    assert adjust(PROFILES["amplitude"], updates=True).rates.updates_per_h == 1800
    assert adjust(PROFILES["amplitude"]).rates.updates_per_h == 0
    assert adjust(PROFILES["amplitude"], updates=True, updates_per_h=5).rates.updates_per_h == 5
