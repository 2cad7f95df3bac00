"""What a plan says of a stage, and a first mapping of a source."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from tests.backfill.staging import events, ndjson, run
from typer.testing import CliRunner

from retrofill.backfill import guess, intake, plan, profile, resend, source, stage
from retrofill.backfill.sets import TEXT, Set
from retrofill.cli import map as map_verb
from retrofill.cli import plan as plan_verb
from retrofill.cli import run as run_verb
from retrofill.core import mapping
from retrofill.errors import InputError

app = typer.Typer()
app.command("map")(map_verb.command)
app.command("plan")(plan_verb.command)

MAPPING = """
event:
  user_id: user
  event_type: event
  time: at
"""
AMPLITUDE = profile.PROFILES["amplitude"]


def rows(count: int, *, hot: int = 0) -> list[dict[str, Any]]:
    history = [
        {"user": f"user-{n % 50:02}", "event": "Open", "at": 1700000000000 + n * 1000}
        for n in range(count)
    ]
    return history + [
        {"user": "hot-user", "event": "$identify", "at": 1700000000000 + n} for n in range(hot)
    ]


def planned(
    tmp_path: Path, history: list[dict[str, Any]], chosen: profile.Profile, **more: Any
) -> plan.Plan:
    found = run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", history), MAPPING, **more)
    return plan.plan(found, chosen, destination="amplitude", stage=tmp_path / "work" / "stage")


def test_a_plan_says_how_much_is_sent_and_billed(tmp_path: Path) -> None:
    made = planned(tmp_path, rows(2000, hot=400), AMPLITUDE)
    assert (made.rows, made.events, made.billed, made.people) == (2400, 2400, 2000, 51)
    assert made.requests == 240
    assert made.days == {"2023-11-14": 2400}
    assert made.types == {"Open": 2000, "$identify": 400}
    assert made.hot_users[0].id == "hot-user"
    assert (made.hot_people[0].name, made.hot_people[0].events) == ("hot-user", 400)
    assert made.bounds["events in all"] == 2.4
    assert made.bounds["requests in all"] == 2.4
    # What the limits alone take, and about how long it takes: the hot user's 40 requests go one after another.
    assert (made.least_s, made.least_because) == (2.4, "events in all")
    assert made.bounds["longest person"] == 4.0
    assert (made.duration_s, made.because) == (4.04, "longest person")


def test_without_limits_a_plan_counts_on_the_pace_of_the_client_itself(tmp_path: Path) -> None:
    made = planned(tmp_path, rows(2000), profile.PROFILES["retrofill"])
    assert (made.least_s, made.updates) == (0.0, 0)
    assert made.duration_s == pytest.approx(0.101)
    wide = profile.adjust(profile.PROFILES["retrofill"], events_per_request=2000)
    many = msgspec.structs.replace(
        run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", rows(2000)), MAPPING),
        events=500_000_000,
    )
    slow = plan.plan(many, wide, destination="x", stage=tmp_path / "work" / "stage")
    assert (round(slow.duration_s), slow.because) == (10_100, "sending itself")


def test_property_updates_are_planned_where_they_are_synced(tmp_path: Path) -> None:
    """Only events that carry user properties count: 100 of 3,100 do not."""
    history = [
        {"user": "hot-user", "event": "Open", "at": 1700000000000 + n, "p": {"n": n} if n else {}}
        for n in range(3100)
    ]
    for row in history[:100]:
        row["p"] = {}
    told = MAPPING + "  user_properties: p\n"
    source = ndjson(tmp_path / "s.ndjson", history)
    found = run(tmp_path / "work", source, told, skip_user_properties_sync=False)
    ours = profile.adjust(profile.PROFILES["retrofill"], updates_per_h=1800, updates=True)
    made = plan.plan(found, ours, destination="x", stage=tmp_path / "work" / "stage")
    assert made.updates == 3000
    assert (made.least_s, made.least_because) == (3600.0, "property updates")
    warning = next(text for text in made.warnings if "3,000 property updates" in text)
    assert "1,800 an hour" in warning
    assert "takes 1 h" in warning
    assert "--skip-user-properties-sync" in warning


def test_identify_calls_are_property_updates_whatever_the_flag_says(tmp_path: Path) -> None:
    history = [
        {"user": "hot-user", "event": event, "at": 1700000000000 + n, "p": {"n": n}}
        for n in range(2000)
        for event in ("Open", "$identify")
    ]
    told = MAPPING + "  user_properties: p\n"
    found = run(tmp_path / "work", ndjson(tmp_path / "s.ndjson", history), told)
    assert found.options.skip_user_properties_sync
    ours = profile.adjust(profile.PROFILES["retrofill"], updates_per_h=1800, updates=found.updates)
    made = plan.plan(found, ours, destination="x", stage=tmp_path / "work" / "stage")
    assert made.updates == 2000
    assert (made.least_s, made.least_because) == (3600.0, "property updates")
    assert any("Its identify calls count" in text for text in made.warnings)
    plain = run(tmp_path / "plain", ndjson(tmp_path / "p.ndjson", history[::2]), told)
    assert not plain.updates


@pytest.mark.parametrize("colon", [":", ": ", " :\t"])
def test_property_updates_count_in_events_that_stand_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colon: str
) -> None:
    """White space of the source stays in them: most writers of JSON put some behind a colon."""
    monkeypatch.setattr(intake, "SCANNED_BYTES", 0)
    history = [
        {
            "user_id": "hot-user",
            "event_type": event,
            "time": 1700000000000 + n,
            "insert_id": f"{event}-{n}",
            "user_properties": {"n": n},
        }
        for n in range(1000)
        for event in ("Open", "$identify")
    ]
    source = ndjson(
        tmp_path / "s.ndjson", [json.dumps(row, separators=(",", colon)) for row in history]
    )
    told = {"event": {name: name for name in history[0]}}
    ours = profile.adjust(profile.PROFILES["retrofill"], updates_per_h=1800, updates=True)
    for skip, updates in ((True, 1000), (False, 2000)):
        work = tmp_path / str(skip)
        found = run(work, source, told, skip_user_properties_sync=skip, sets=1)
        with Set(work / "stage" / "set-0.rows") as one:
            assert f'"event_type"{colon}"Open"' in one.read(0, [TEXT])[TEXT][0].as_py()
        assert plan.plan(found, ours, destination="x", stage=work / "stage").updates == updates


def test_a_plan_names_who_is_held_back_and_for_how_many_days(tmp_path: Path) -> None:
    strict = profile.adjust(AMPLITUDE, quota_per_day=300, device_per_s=10)
    made = planned(tmp_path, rows(100, hot=1000), strict)
    assert [(one.id, one.days) for one in made.throttled] == [("hot-user", 4)]
    assert made.quota_days == 4
    assert made.because == "daily quota"
    assert made.duration_s > 3 * 86_400 - 3600
    assert any("hot-user takes 4 days" in warning for warning in made.warnings)


def test_a_plan_says_aloud_that_profiles_will_change(tmp_path: Path) -> None:
    made = planned(tmp_path, rows(10), AMPLITUDE, skip_user_properties_sync=False)
    assert any("will change the user profiles" in warning for warning in made.warnings)
    assert not planned(tmp_path, rows(10), AMPLITUDE).warnings


def test_a_plan_says_aloud_that_identify_calls_change_profiles_all_the_same(tmp_path: Path) -> None:
    (said,) = planned(tmp_path, rows(10, hot=3), AMPLITUDE).warnings
    assert said.startswith("3 of these events are identify calls")
    assert "replace live ones" in said
    by_time = msgspec.structs.replace(AMPLITUDE, by_event_time=True)
    (said,) = planned(tmp_path, rows(10, hot=3), by_time).warnings
    assert said.endswith("no newer value changes")


def test_seconds_taken_for_milliseconds_are_suspected(tmp_path: Path) -> None:
    made = planned(tmp_path, [{"user": "user-1", "event": "Open", "at": 1700000000}], AMPLITUDE)
    assert any("is `time` in seconds?" in warning for warning in made.warnings)


def test_a_plan_as_json_is_one_line(tmp_path: Path) -> None:
    text = plan.to_json(planned(tmp_path, rows(10), AMPLITUDE))
    assert "\n" not in text
    assert msgspec.json.decode(text)["events"] == 10


# seconds, words
DURATIONS = [
    (0.0, "under a second"),
    (0.2, "1 s"),
    (59, "59 s"),
    (125, "2 min 5 s"),
    (7200, "2 h"),
    (273_600, "3 days 4 h"),
]


@pytest.mark.parametrize(("seconds", "words"), DURATIONS)
def test_a_duration_is_said_as_people_do(seconds: float, words: str) -> None:
    assert plan.sentence(seconds) == words


def test_the_verb_prints_the_plan_and_stages_once(tmp_path: Path) -> None:
    ndjson(tmp_path / "s.ndjson", rows(300))
    (tmp_path / "m.yaml").write_text(MAPPING)
    line = [
        "plan",
        str(tmp_path / "s.ndjson"),
        "--map",
        str(tmp_path / "m.yaml"),
        "--work",
        str(tmp_path / "work"),
    ]
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0, shown.output
    assert "300 events" in shown.stdout
    words = " ".join(shown.stdout.split())
    assert "the limits alone take 1 s (events in all); days of quota: 1" in words
    assert "People with most events user-" in words
    assert "Users with most events user-" in words
    assert "nothing was sent" in " ".join(shown.stdout.split())
    again = CliRunner().invoke(app, [*line, "--json", "--events-per-request", "100"])
    told = msgspec.json.decode(again.stdout)
    assert (told["events"], told["requests"]) == (300, 3)
    assert told["import_id"] in shown.stdout


@pytest.mark.parametrize(
    ("option", "number", "least_s", "because"),
    [
        ("--events-per-s", 10, 30, "events in all"),
        ("--requests-per-s", 1, 30, "requests in all"),
        ("--device-per-s", 1, 50, "hottest device"),
        ("--user-per-s", 1, 150, "hottest user"),
        ("--updates-per-h", 50, 2 * 3600, "property updates"),
        ("--quota-per-day", 75, 86_400, "daily quota"),
    ],
)
def test_each_number_of_the_limits_can_be_set(
    option: str, number: int, least_s: float, because: str, tmp_path: Path
) -> None:
    found = [
        {"user": f"user-{n % 2}", "device": f"device-{n % 6}", "event": "Open", "at": 1.7e12 + n}
        for n in range(300)
    ]
    ndjson(tmp_path / "s.ndjson", found)
    (tmp_path / "m.yaml").write_text(
        f"{MAPPING}  device_id: device\n  user_properties: {{kind: event}}\n"
    )
    line = ["plan", str(tmp_path / "s.ndjson"), "--map", str(tmp_path / "m.yaml"), "--json"]
    line += ["--work", str(tmp_path / "work"), "--no-skip-user-properties-sync"]
    line += ["--profile", "retrofill", "--events-per-request", "10", option, str(number)]
    shown = CliRunner().invoke(app, line)
    told = msgspec.json.decode(shown.stdout)
    assert told["requests"] >= 30
    assert (told["least_because"], told["because"]) == (because, because)
    assert told["least_s"] == pytest.approx(least_s, rel=0.2)


def test_short_ids_can_be_good_ones(tmp_path: Path) -> None:
    users = [{"user": n, "event": "Sign up", "at": 1700000000000 + n} for n in range(1, 30)]
    ndjson(tmp_path / "s.ndjson", users)
    (tmp_path / "m.yaml").write_text(MAPPING)
    line = ["plan", str(tmp_path / "s.ndjson"), "--map", str(tmp_path / "m.yaml"), "--json"]
    refused = CliRunner().invoke(app, [*line, "--work", str(tmp_path / "w1")])
    assert "the first: no usable id: user_id too short, and there is no other" in str(
        refused.exception
    )
    assert "take shorter ids with --min-id-length" in str(refused.exception)
    taken = CliRunner().invoke(app, [*line, "--work", str(tmp_path / "w2"), "--min-id-length", "1"])
    assert msgspec.json.decode(taken.stdout)["users"] == 29


@pytest.mark.parametrize("name", ["empty.ndjson", "empty.csv", "empty.json", "blank.tsv"])
def test_a_source_without_a_row_is_told(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("\n" if name == "blank.tsv" else "")
    guessed = CliRunner().invoke(app, ["map", str(path)])
    assert "The source has no row to guess a mapping from" in str(guessed.exception)
    with pytest.raises(InputError, match="The source has no row, so it has no column 'user'"):
        run(tmp_path / "work", str(path), MAPPING)


def test_the_first_row_of_a_refusal_is_the_first_of_the_source(tmp_path: Path) -> None:
    """Rows with a time as text take another way, and are looked at later."""
    good = {"user": "user-1", "event": "A", "at": 1700000000000}
    odd = [{**good, "user": "anonymous"}, {**good, "at": "never"}, {**good, "event": ""}]
    for order in permutations(odd):
        for name, rows in (("a", [good]), ("b", [good, *order]), ("c", order)):
            ndjson(tmp_path / f"{name}.ndjson", rows)
        names = [f"{name}.ndjson" for name in "abc"]
        with pytest.raises(InputError, match="the first: ") as caught:
            run(tmp_path / "work", [str(tmp_path / name) for name in names], MAPPING)
        assert f"{tmp_path / 'b.ndjson'}, row 2: " in str(caught.value)


def test_the_verb_refuses_what_cannot_be() -> None:
    with pytest.raises(InputError, match="no part of all"):
        run_verb.part("many", "--bad-rows")
    with pytest.raises(InputError, match="no part of all"):
        run_verb.part("0%", "--sample", some=True)
    with pytest.raises(InputError, match="no time"):
        resend.parse_time("yesterday")
    assert run_verb.part("5%", "--bad-rows") == 0.05
    assert run_verb.part("0", "--bad-rows") == 0
    assert resend.parse_time("1970-01-02") == 86_400_000
    assert resend.parse_time("1970-01-01T01:00:00+01:00") == 0


def test_an_import_is_named_as_told_or_anew(tmp_path: Path) -> None:
    assert stage.import_name(tmp_path, "Spring-2024_x.y", now_ms=0) == "Spring-2024_x.y"
    assert stage.import_name(tmp_path, None, now_ms=0).startswith("import-19700101-")
    for wrong in ("", "a b", "a/b", "x" * 65):
        with pytest.raises(InputError, match="no import name"):
            stage.import_name(tmp_path, wrong, now_ms=0)


def first_mapping(tmp_path: Path, path: Path) -> str:
    pieces = source.pieces(source.locate([str(path)]), scratch=tmp_path)
    return guess.write(intake.look(pieces, None), path.name)


def test_a_first_mapping_of_git_history_is_nearly_the_right_one(tmp_path: Path, data: Path) -> None:
    text = first_mapping(tmp_path, data / "git-history.ndjson.gz")
    found = mapping.parse(yaml.safe_load(text))
    fields = {field.name: field.expression for field in found.fields}
    assert fields["user_id"] == "user"
    assert fields["device_id"] == "device"
    assert fields["event_type"] == "event"
    assert fields["time"] == "at * 1000"
    assert fields["insert_id"] == "id"
    assert "counts seconds" in text
    (tmp_path / "m.yaml").write_text(text)
    staged = run(tmp_path / "work", data / "git-history.ndjson.gz", str(tmp_path / "m.yaml"))
    assert staged.events == 60_966


def test_a_first_mapping_of_shop_clickstream_can_be_run_as_it_is(
    tmp_path: Path, data: Path
) -> None:
    text = first_mapping(tmp_path, data / "shop-clickstream.csv.gz")
    (tmp_path / "m.yaml").write_text(text)
    staged = run(tmp_path / "work", data / "shop-clickstream.csv.gz", str(tmp_path / "m.yaml"))
    assert (staged.events, staged.people) == (31_106, 600)


def test_a_first_mapping_of_parquet_knows_its_times_whatever_their_unit(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = {
        "user": ["user-1", "user-2"],
        "on": pa.array([1577836800123456789, 1577836800123456790], pa.timestamp("ns")),
        "price": [1.5, float("nan")],
        "device": [{"model": "A"}, {"model": "B"}],
    }
    pq.write_table(pa.table(rows), path)
    text = first_mapping(tmp_path, path)
    assert "2 rows" in text
    fields = {field.path: field.expression for field in mapping.parse(yaml.safe_load(text)).fields}
    assert (fields["user_id",], fields["time",]) == ("user", "on")
    days = {"user": ["user-1"], "day": pa.array([18262], pa.date32())}
    pq.write_table(pa.table(days), path)
    assert "time: day" in first_mapping(tmp_path, path)


def test_a_first_mapping_takes_the_text_of_an_object_for_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('user,event,ts,properties\nuser-1,Open,2024-01-01 10:00:00,"{""a"": 1}"\n')
    text = first_mapping(tmp_path, path)
    assert "event_properties: properties  # the text of an object, taken whole" in text
    (tmp_path / "m.yaml").write_text(text)
    run(tmp_path / "work", path, str(tmp_path / "m.yaml"))
    (event,) = events(tmp_path / "work")
    assert event["event_properties"] == {"a": 1}


def test_a_first_mapping_asks_where_it_cannot_guess(tmp_path: Path) -> None:
    path = ndjson(tmp_path / "s.ndjson", [{"foo": 1, "on": "x", "a b": 2, "a: b": 3}])
    text = first_mapping(tmp_path, path)
    assert "no column looks like a time: which is it?" in text
    assert "no column names a user or a device" in text
    names = {
        field.path[-1]: field.expression for field in mapping.parse(yaml.safe_load(text)).fields
    }
    assert (names["on"], names["a b"], names["a: b"]) == ("on", '"a b"', '"a: b"')


@pytest.mark.parametrize(
    ("values", "expression"),
    [
        (["2024-01-01 10:00:00", "2024-02-30T25:00:00Z"], "zeit"),
        ([1700000000, 1700000001], "zeit * 1000"),
        (["1700000000000", "1700000000001"], "zeit"),
        (["2024-01-01 10:00:00", ""], None),
        (["2024-01-01 10:00:00", None], None),
        ([1, 2], None),
        ([True, True], None),
    ],
)
def test_a_first_mapping_finds_a_time_without_a_name_by_its_values(
    values: list[Any], expression: str | None, tmp_path: Path
) -> None:
    rows = [{"nutzer": 4711, "zeit": value} for value in values]
    text = first_mapping(tmp_path, ndjson(tmp_path / "s.ndjson", rows))
    found = yaml.safe_load(text)["event"]["time"]
    assert found == (expression or "?")
    assert ("by its values alone" in text) is (expression is not None)


def test_a_first_mapping_takes_no_time_from_a_column_that_means_something_else(
    tmp_path: Path,
) -> None:
    rows = [
        {"user_id": 1700000000 + n, "session_id": 1700000000000, "zeit": f"2024-01-01 10:00:0{n}"}
        for n in range(3)
    ]
    found = yaml.safe_load(first_mapping(tmp_path, ndjson(tmp_path / "s.ndjson", rows)))["event"]
    assert (found["time"], found["session_id"]) == ("zeit", "session_id")


def test_a_first_mapping_takes_no_object_for_a_text(tmp_path: Path) -> None:
    found = [
        {"user": f"user-{n}", "device": {"os": "x"}, "name": "Open", "ts": 1700000000 + n}
        for n in range(5)
    ]
    text = first_mapping(tmp_path, ndjson(tmp_path / "s.ndjson", found))
    assert yaml.safe_load(text)["event"]["event_properties"] == {"device": "device"}
    assert "device_id" not in text


def test_a_first_mapping_takes_digits_for_a_number_beside_odd_cells(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("user,name,ts\n" + "user-1,Open,1700000000\n" * 9 + "user-1,Open,when\n")
    text = first_mapping(tmp_path, path)
    assert yaml.safe_load(text)["event"]["time"] == "CAST(ts AS BIGINT) * 1000"
    assert "1700000000 counts seconds" in text


def test_a_source_that_a_preset_knows_is_recognised(tmp_path: Path) -> None:
    row = {
        "$insert_id": "a",
        "amplitude_id": 1,
        "event_time": "2024-01-01 00:00:00",
        "event_type": "x",
    }
    path = ndjson(tmp_path / "s.ndjson", [row])
    assert "--map amplitude-export" in first_mapping(tmp_path, path)
    assert run_verb.fitting([str(path)], None, None) == "amplitude-export"
    with pytest.raises(InputError, match="retrofill map SOURCE"):
        run_verb.fitting([str(ndjson(tmp_path / "o.ndjson", [{"a": 1}]))], None, None)


def test_the_map_verb_writes_to_standard_output_or_a_file(tmp_path: Path) -> None:
    path = ndjson(tmp_path / "s.ndjson", rows(5))
    shown = CliRunner().invoke(app, ["map", str(path)])
    assert "event_type: event" in shown.stdout
    CliRunner().invoke(app, ["map", str(path), "--out", str(tmp_path / "m.yaml")])
    assert (tmp_path / "m.yaml").read_text() == shown.stdout
