"""Sending to a destination that misbehaves: everything arrives once, in order, within the limits."""

from __future__ import annotations

import asyncio
import json
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.backfill import staged
from tests.backfill.destination import FAULTS, Arrival, Misbehaving, Reply, Wire
from tests.backfill.virtual import START_S, VirtualClock, run

from retrofill.backfill import manifest as manifests
from retrofill.backfill import send as sending
from retrofill.backfill import status, unsure
from retrofill.backfill.feed import Feed
from retrofill.backfill.journal import Journal, Ledger
from retrofill.backfill.profile import PROFILES, Profile, adjust
from retrofill.backfill.send import Outcome, Sender
from retrofill.core.schedule import Rates
from retrofill.errors import FinalError

SMALL = Profile(
    name="amplitude",
    rates=Rates(
        events_per_s=200,
        requests_per_s=40,
        device_per_s=15,
        user_per_s=30,
        events_per_request=10,
        quota_per_day=500_000,
    ),
    connections=16,
)
OPEN = adjust(PROFILES["retrofill"], events_per_request=20)


def send(
    work: Path,
    to: Misbehaving,
    profile: Profile,
    *,
    seed: int = 0,
    stop_after: float | None = None,
    start: float = START_S,
    give_up_after_s: float | None = None,
    gzip: bool = False,
) -> Outcome:
    """Send what is staged in a directory, in virtual time; killed after some seconds if asked."""

    async def whole() -> Outcome:
        clock = VirtualClock(start)
        manifest = manifests.read(work / "stage")
        assert manifest is not None
        journal = Journal(work, threaded=False)
        journal._db.execute("PRAGMA synchronous=OFF")  # no machine crashes here, and it takes time
        try:
            feed = Feed(work / "stage", manifest, profile.rates, journal.done())
            sender = Sender(
                feed=feed,
                journal=journal,
                profile=profile,
                api_key="key",
                wires=[Wire(to, clock.now) for _ in range(profile.connections)],
                clock=clock,
                chance=random.Random(seed).random,
                give_up_after_s=give_up_after_s,
                gzip=gzip,
            )
            if stop_after is None:
                return await sender.run()
            running = asyncio.ensure_future(sender.run())
            await asyncio.wait([running], timeout=stop_after)
            if not running.done():
                running.cancel()
                # As after SIGKILL: what is not committed is gone.
                for name in ("_sent", "_finals", "_dead", "_rows"):
                    getattr(journal, name).clear()
            return Outcome(complete=False, reason="killed", progress=sender.progress)
        finally:
            journal.close()

    return run(whole())


def letters(work: Path) -> list[dict[str, Any]]:
    path = work / "dead-letters-send.ndjson"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def dead_ids(work: Path) -> list[str]:
    return [json.loads(letter["row"])["insert_id"] for letter in letters(work)]


def check_order(to: Misbehaving) -> None:
    """Each person's events were stored in order."""
    last: dict[str, int] = {}
    for event in to.stored:
        _, person, index = event["insert_id"].split("-")
        assert int(index) > last.get(person, -1), f"{event['insert_id']} overtook"
        last[person] = int(index)


def check_rates(arrivals: list[Arrival], rates: Rates) -> None:
    """No window of 1 s or 30 s holds more than the limits."""
    _check(((a.at, a.events) for a in arrivals), rates.events_per_s)
    _check(((a.at, 1) for a in arrivals), rates.requests_per_s)
    for counts, limit in (("devices", rates.device_per_s), ("users", rates.user_per_s)):
        by_id: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        for arrival in arrivals:
            for name, count in getattr(arrival, counts).items():
                by_id[name].append((arrival.at, count))
        for name, times in by_id.items():
            _check(times, limit, name)


def _check(times: Iterable[tuple[float, int]], limit: int, name: str = "") -> None:
    if not limit:
        return
    known = list(times)
    for seconds in (1, 30):
        first = total = 0
        for at, count in known:
            total += count
            while known[first][0] <= at - seconds:
                total -= known[first][1]
                first += 1
            assert total <= limit * seconds, f"{total} in {seconds} s at {at}, {name}"


def check_whole(
    work: Path, made: list[staged.Made], to: Misbehaving, poison: frozenset[str] = frozenset()
) -> None:
    """Everything is stored once or a dead letter, nothing both."""
    dead = dead_ids(work)
    assert len(dead) == len(set(dead))
    stored = {event["insert_id"] for event in to.stored}
    assert set(dead) == poison
    assert stored == {one.insert_id for one in made} - poison
    for letter in letters(work):
        assert letter["reason"]
        assert letter["file"] == "source.ndjson"
        assert letter["line"] > 0
    check_order(to)


def test_a_well_behaved_destination_gets_everything_once(tmp_path: Path) -> None:
    made = staged.history({1: 30, 2: 5, 3: 900, 4: 1, 5: 77}, devices=2)
    staged.write(tmp_path, made)
    to = Misbehaving()
    outcome = send(tmp_path, to, OPEN)
    assert outcome.complete
    assert (outcome.progress.taken, outcome.progress.flying) == (len(made), 0)
    assert to.repeats == 0
    check_whole(tmp_path, made, to)
    assert [
        json.dumps(e, separators=(",", ":")) for e in to.stored if e["user_id"] == "user-3"
    ] == [one.text for one in made if one.person == 3]


def test_bodies_can_be_compressed(tmp_path: Path) -> None:
    made = staged.history({1: 30, 2: 5})
    staged.write(tmp_path, made)
    to = Misbehaving()
    assert send(tmp_path, to, OPEN, gzip=True).complete
    check_whole(tmp_path, made, to)


@pytest.mark.parametrize("profile", [SMALL, OPEN], ids=["limits", "no limits"])
@pytest.mark.parametrize("lists", ["full", "first", "none", "id", "silenced"])
def test_poison_is_found_and_the_rest_arrives(tmp_path: Path, lists: str, profile: Profile) -> None:
    made = staged.history({1: 30, 2: 5, 3: 200, 4: 1, 5: 77}, devices=2)
    staged.write(tmp_path, made)
    poison = frozenset({"i-1-0", "i-3-17", "i-3-18", "i-3-199", "i-4-0", "i-5-40"})
    to = Misbehaving(poison=poison, lists=lists)
    assert send(tmp_path, to, profile).complete
    check_whole(tmp_path, made, to, poison)
    check_rates(to.arrivals, profile.rates)


def test_too_large_requests_are_halved_and_a_lone_one_is_a_dead_letter(tmp_path: Path) -> None:
    made = staged.history({1: 40, 2: 5, 3: 90}, fill="x" * 100)
    huge = staged.event(9, 0, device="device-9", user="user-9", fill="y" * 5000)
    staged.write(tmp_path, [*made, huge])
    to = Misbehaving(bytes_max=3000)
    assert send(tmp_path, to, OPEN).complete
    check_whole(tmp_path, [*made, huge], to, frozenset({huge.insert_id}))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_in_everything_once(tmp_path: Path, fault: str) -> None:
    chance = random.Random(fault)
    made = staged.random_history(chance, 700)
    staged.write(tmp_path, made, kiosks=("kiosk-device",))
    to = Misbehaving(1, faults={fault: 0.3})
    assert send(tmp_path, to, SMALL).complete
    assert to.statuses[fault] > 5
    check_whole(tmp_path, made, to)
    check_rates(to.arrivals, SMALL.rates)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 2**32),
    st.dictionaries(st.sampled_from(FAULTS), st.floats(0, 0.15), max_size=6),
    st.sampled_from(["full", "first", "none", "id", "silenced"]),
    st.integers(1, 60),
    st.sampled_from([SMALL, OPEN, adjust(SMALL, events_per_request=37, requests_per_s=0)]),
    st.sampled_from([None, 0.3, 2.0, 11.0]),
)
def test_whatever_happens_everything_arrives_once_in_order_within_the_limits(
    seed: int,
    faults: dict[str, float],
    lists: str,
    events_max: int,
    profile: Profile,
    kill_after: float | None,
) -> None:
    chance = random.Random(seed)
    made = staged.random_history(chance, chance.choice([30, 300, 900]))
    poison = frozenset(one.insert_id for one in made if chance.random() < 0.02)
    to = Misbehaving(seed, faults=faults, poison=poison, lists=lists, events_max=events_max)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        staged.write(work, made, kiosks=("kiosk-device",), group=chance.choice([16, 64, 8192]))
        start = START_S
        if kill_after is not None:
            for _ in range(3):
                outcome = send(work, to, profile, stop_after=kill_after, start=start, seed=seed)
                start = (to.arrivals[-1].at if to.arrivals else start) + 0.2
        outcome = send(work, to, profile, start=start, seed=seed)
        assert outcome.complete
        check_whole(work, made, to, poison)
        check_rates(to.arrivals, profile.rates)


def test_only_who_is_named_waits(tmp_path: Path) -> None:
    made = staged.history(dict.fromkeys(range(1, 30), 40))
    staged.write(tmp_path, made)
    to = Misbehaving()
    hot = "device-7-0"
    honest = to.handle

    def handle(body: bytes, at: float) -> Any:
        events = json.loads(body)["events"]
        if at < START_S + 100 and any(e["device_id"] == hot for e in events):
            return to._throttle(events, {hot: 400}, {}, at)
        return honest(body, at)

    to.handle = handle  # type: ignore[method-assign]  # the script of this test
    times: dict[str, float] = {}
    stored = to._store

    def store(events: list[dict[str, Any]]) -> None:
        for event in events:
            times[event["insert_id"]] = to.arrivals[-1].at
        stored(events)

    to._store = store  # type: ignore[method-assign]  # the same
    assert send(tmp_path, to, OPEN).complete
    check_whole(tmp_path, made, to)
    others = [at for name, at in times.items() if not name.startswith("i-7-")]
    assert max(others) < START_S + 5
    assert min(at for name, at in times.items() if name.startswith("i-7-")) >= START_S + 100


def test_limits_are_learned_from_what_the_destination_says(tmp_path: Path) -> None:
    made = staged.history({1: 3000, 2: 50, 3: 50})
    staged.write(tmp_path, made)
    to = Misbehaving(device_limit=20)
    assert send(tmp_path, to, OPEN).complete
    check_whole(tmp_path, made, to)
    assert 1 <= to.throttles <= 2, "after the first answer nobody sends more than the limit"


def test_a_quota_answer_rests_the_id_until_the_next_full_hour(tmp_path: Path) -> None:
    made = staged.history({1: 20, 2: 20})
    staged.write(tmp_path, made)
    to = Misbehaving()
    honest = to.handle
    asked: list[float] = []

    def handle(body: bytes, at: float) -> Any:
        if b"user-1" in body:
            asked.append(at)
            if len(asked) == 1:
                text = json.dumps({"code": 429, "exceeded_daily_quota_users": {"user-1": 500_000}})
                to.arrivals.append(Arrival(at, 0, Counter(), Counter()))
                return Reply(429, text.encode())
        return honest(body, at)

    to.handle = handle  # type: ignore[method-assign]  # the script of this test
    assert send(tmp_path, to, OPEN).complete
    assert asked[1] >= (START_S // 3600 + 1) * 3600
    assert asked[1] < (START_S // 3600 + 1) * 3600 + 5
    check_whole(tmp_path, made, to)


def test_a_run_that_gives_up_while_an_id_rests_says_so_and_how_long(tmp_path: Path) -> None:
    made = staged.history({1: 20, 2: 20})
    staged.write(tmp_path, made)
    to = Misbehaving()
    honest = to.handle
    text = json.dumps({"code": 429, "exceeded_daily_quota_users": {"user-1": 500_000}})

    def handle(body: bytes, at: float) -> Any:
        return Reply(429, text.encode()) if b"user-1" in body else honest(body, at)

    to.handle = handle  # type: ignore[method-assign]  # the script of this test
    outcome = send(tmp_path, to, OPEN, give_up_after_s=5)
    assert not outcome.complete
    found = re.search(r"1 throttled ids wait, the last for ([\d,]+) s more", outcome.reason)
    assert found is not None
    rest = int(found[1].replace(",", ""))
    assert rest == pytest.approx(3600 - START_S % 3600, abs=30)
    one = outcome.progress
    assert one.left == 20
    assert status.facts(one)["seconds_left"] == pytest.approx(rest, abs=2)
    assert status.line(one).endswith("left")


def test_an_unknown_key_ends_the_run_at_once(tmp_path: Path) -> None:
    staged.write(tmp_path, staged.history({1: 20}))
    to = Misbehaving()
    answer = {"code": 400, "error": "Invalid API key: key"}
    reply = Reply(400, json.dumps(answer).encode())
    to.handle = lambda _body, _at: reply  # type: ignore[method-assign, assignment]  # the script of this test
    with pytest.raises(FinalError, match="does not know the API key"):
        send(tmp_path, to, OPEN)
    assert letters(tmp_path) == []


def test_a_destination_that_forbids_everything_ends_the_run(tmp_path: Path) -> None:
    staged.write(tmp_path, staged.history({1: 20}))
    to = Misbehaving()
    to.handle = lambda _body, _at: Reply(404)  # type: ignore[method-assign, assignment]  # the script of this test
    with pytest.raises(FinalError, match="404"):
        send(tmp_path, to, OPEN)


def test_a_run_gives_up_after_the_time_it_was_given(tmp_path: Path) -> None:
    made = staged.history({1: 20, 2: 3})
    staged.write(tmp_path, made)
    to = Misbehaving(faults={"503": 1.0}, calm_after=10**9)
    outcome = send(tmp_path, to, OPEN, give_up_after_s=300)
    assert not outcome.complete
    assert "300" in outcome.reason
    assert outcome.progress.left == len(made)
    assert to.arrivals[-1].at - START_S < 300 + 61
    calm = Misbehaving()
    assert send(tmp_path, calm, OPEN, start=START_S + 1000).complete
    check_whole(tmp_path, made, calm)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_ends_while_answers_are_bad_counts_nothing_of_them(
    tmp_path: Path, fault: str
) -> None:
    made = staged.history({1: 20, 2: 3})
    staged.write(tmp_path, made)
    to = Misbehaving(faults={fault: 1.0}, calm_after=10**9)
    outcome = send(tmp_path, to, OPEN, give_up_after_s=100)
    assert not outcome.complete
    ledger = Ledger(tmp_path)
    taken = ledger.totals().taken
    ledger.close()
    assert taken == 0
    assert send(tmp_path, Misbehaving(), OPEN, start=START_S + 1000).progress.taken == len(made)


def test_the_time_to_give_up_counts_from_the_last_200(tmp_path: Path) -> None:
    """A 200 every half minute is no reason to give up after 60 s, however long it takes; silence after the tenth is."""
    staged.write(tmp_path, staged.history({1: 200}))
    to = Misbehaving()
    honest = to.handle

    def handle(body: bytes, at: float) -> Any:
        last = max((a.at for a in to.arrivals), default=at - 20)
        return Reply(503) if at < last + 20 or len(to.arrivals) == 10 else honest(body, at)

    to.handle = handle  # type: ignore[method-assign]  # the script of this test
    profile = adjust(PROFILES["retrofill"], events_per_request=10)
    outcome = send(tmp_path, to, profile, give_up_after_s=60)
    assert not outcome.complete
    assert outcome.progress.taken == 100
    assert to.arrivals[-1].at - START_S > 9 * 20
    assert "60 s" in outcome.reason


def test_what_may_be_forgotten_is_listed_and_not_sent_again(tmp_path: Path) -> None:
    made = staged.history({1: 20, 2: 3})
    staged.write(tmp_path, made)
    lost = Misbehaving(faults={"500 after storing": 1.0}, calm_after=10**9)
    assert not send(tmp_path, lost, SMALL, give_up_after_s=5).complete
    later = START_S + 8 * 86_400
    journal = Journal(tmp_path, threaded=False)
    count = journal.unsure_before(int((later - 7 * 86_400) * 1000), int(later * 1000))
    journal.close()
    assert count == len(lost.stored) > 0
    after = Misbehaving()
    send(tmp_path, after, SMALL, start=later)
    assert not {e["insert_id"] for e in after.stored} & {e["insert_id"] for e in lost.stored}
    ledger = Ledger(tmp_path)
    assert ledger.unsure().count == count
    ledger.close()
    listed = unsure.write(tmp_path)
    assert listed is not None
    told = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {one["insert_id"] for one in told} == {e["insert_id"] for e in lost.stored}
    assert len(told) == count
    assert {(one["file"], type(one["line"])) for one in told} == {("source.ndjson", int)}
    journal = Journal(tmp_path, threaded=False)
    journal.trust_unsure()
    journal.close()
    assert unsure.write(tmp_path) is None
    assert not listed.exists()


def test_a_request_that_may_be_stored_is_repeated_only_as_long_as_it_is_remembered(
    tmp_path: Path,
) -> None:
    staged.write(tmp_path, staged.history({1: 20, 2: 3}))
    to = Misbehaving()
    honest = to.handle

    def handle(body: bytes, at: float) -> Any:
        answer = honest(body, at)
        return Reply(500) if b"user-1" in body and at < START_S + 1.5 * 86_400 else answer

    to.handle = handle  # type: ignore[method-assign]  # the script of this test
    profile = msgspec.structs.replace(SMALL, connections=2, memory_days=1)
    outcome = send(tmp_path, to, profile)
    assert not outcome.complete
    assert (outcome.progress.taken, outcome.progress.unsure) == (13, 10)
    assert [a.at for a in to.arrivals if a.at < START_S + 86_400][-1] > START_S + 0.9 * 86_400
    first = [e["insert_id"] for e in to.stored if e["user_id"] == "user-1"]
    assert first == [f"i-1-{n}" for n in range(20)], "later rows of the person go on"


# How the destination says it; how long it has to be left alone.
PAUSES = [
    (Reply(503, b"", (("Retry-After", "120"),)), 120),
    (Reply(503, b"", (("Retry-After", "Tue, 14 Nov 2023 22:23:20 GMT"),)), 600),
    (Reply(429, b'{"code":429,"throttled_devices":{"device-1-0":31}}', (("Retry-After", "90"),)), 90),
    (Reply(429, b"<html>", (("Retry-After", "75"),)), 75),
    (Reply(429, b'{"code":429,"throttled_devices":{"device-1-0":31}}'), 15),
    (
        Reply(429, b'{"code":429,"exceeded_daily_quota_users":{"user-1":9}}',
              (("Retry-After", "70"),)),
        70,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "seconds"), PAUSES)
def test_retry_after_is_obeyed(tmp_path: Path, answer: Reply, seconds: float) -> None:
    made = staged.history({1: 20})
    staged.write(tmp_path, made)
    to = Misbehaving()
    honest = to.handle
    asked: list[float] = []

    def handle(body: bytes, at: float) -> Any:
        asked.append(at)
        return answer if len(asked) == 1 else honest(body, at)

    to.handle = handle  # type: ignore[method-assign]  # the script of this test
    assert send(tmp_path, to, OPEN).complete
    assert seconds - 0.1 <= asked[1] - asked[0] < seconds + 5
    check_whole(tmp_path, made, to)


def test_a_resumed_run_sends_nothing_twice_but_what_was_under_way(tmp_path: Path) -> None:
    made = staged.history(dict.fromkeys(range(40), 30))
    staged.write(tmp_path, made)
    to = Misbehaving()
    send(tmp_path, to, SMALL, stop_after=3.03)
    under_way = {one.insert_id for one in made} & {e["insert_id"] for e in to.stored}
    assert 0 < len(under_way) < len(made)
    assert send(tmp_path, to, SMALL, start=START_S + 60).complete
    assert to.repeats <= SMALL.connections * SMALL.rates.events_per_request
    check_whole(tmp_path, made, to)


SKIPPED = ',"$skip_user_properties_sync":true'
PROPERTIES = ',"user_properties":{"at":1}'


@pytest.mark.parametrize(
    ("counted", "other"),
    [
        (PROPERTIES, ""),
        # With the flag it is identify calls that count, and no others.
        (f'{PROPERTIES}{SKIPPED},"event_type":"$identify"', f"{PROPERTIES}{SKIPPED}"),
    ],
)
def test_property_updates_of_a_person_keep_to_the_hour_over_restarts(
    tmp_path: Path, counted: str, other: str
) -> None:
    """Beyond its hourly number a destination answers 200 and drops the update: nobody would ever know."""
    made = staged.history({1: 400, 2: 400})
    for at, one in enumerate(made):
        made[at] = one._replace(text=one.text[:-1] + (counted if one.person == 1 else other) + "}")
    staged.write(tmp_path, made)
    profile = adjust(PROFILES["retrofill"], events_per_request=10, updates_per_h=100, updates=True)
    to = Misbehaving(3, faults={"503": 0.05, "reset before": 0.05})
    times: list[float] = []  # of the updates that were stored
    stored = to._store

    def store(events: list[dict[str, Any]]) -> None:
        times.extend(to.arrivals[-1].at for event in events if event["user_id"] == "user-1")
        stored(events)

    to._store = store  # type: ignore[method-assign]  # the script of this test
    start = START_S
    for _ in range(3):
        send(tmp_path, to, profile, stop_after=9.0, start=start)
        start = to.arrivals[-1].at + 30
    assert send(tmp_path, to, profile, start=start).complete
    check_whole(tmp_path, made, to)
    assert len(times) == 400
    assert all(late - early >= 3600 for early, late in zip(times, times[100:], strict=False))
    assert max(times) < START_S + 4.1 * 3600
    others = [a.at for a in to.arrivals if a.users["user-2"]]
    assert max(others) < START_S + 300, "who updates nothing does not wait"


def test_memory_for_text_stays_bounded_however_long_people_are(tmp_path: Path) -> None:
    made = staged.history(dict.fromkeys(range(12), 4000))
    staged.write(tmp_path, made, group=512)
    manifest = manifests.read(tmp_path / "stage")
    assert manifest is not None
    journal = Journal(tmp_path, threaded=False)
    feed = Feed(tmp_path / "stage", manifest, OPEN.rates, journal.done())
    assert feed.loaded[0] == 0
    journal.close()
    to = Misbehaving()
    assert send(tmp_path, to, OPEN).complete
    check_whole(tmp_path, made, to)


def test_the_options_of_a_request_allow_short_ids(tmp_path: Path) -> None:
    staged.write(tmp_path, staged.history({1: 2}))
    to = Misbehaving()
    bodies: list[bytes] = []
    honest = to.handle
    to.handle = lambda body, at: (bodies.append(body), honest(body, at))[1]  # type: ignore[method-assign, func-returns-value]  # the script of this test
    assert send(tmp_path, to, OPEN).complete
    body = msgspec.json.decode(bodies[0])
    assert body["options"] == {"min_id_length": 1}
    assert body["api_key"] == "key"


@pytest.mark.parametrize("key", ["plain", 'a"b\\c', "two\nlines", "ключ"])
def test_a_key_of_any_letters_stands_in_the_body(key: str) -> None:
    assert msgspec.json.decode(b'{"api_key":"' + sending._text(key) + b'"}') == {"api_key": key}
