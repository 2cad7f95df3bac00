"""The real engine beside the simplest model, under random commands.

One directory lives through sends, repeats, clock steps, seals, checkpoints, restarts and crashes. After each step every
row, snapshot, state, first-seen time and count that the engine shows equals the model's; at the end the whole history
folds to the very state that the engine holds.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.stateful.model import Displaced, Model

from retrofill.config import Settings
from retrofill.core import block as block_codec
from retrofill.core import event as events
from retrofill.core import form
from retrofill.core.block import COLUMNS, Kind
from retrofill.core.event import Batch
from retrofill.core.person import encode
from retrofill.core.throttle import Accepted, Throttled
from retrofill.engine import charts
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.ingest import Engine, Outcome
from retrofill.engine.recover import batches_of, refold
from retrofill.engine.refolder import Refolder, ThreadRefolder
from retrofill.engine.seal import Sealer, SealResult, SealTask, seal_blocks
from retrofill.engine.state import State
from retrofill.hot.checkpoint import Checkpoint
from retrofill.lake import arrow
from retrofill.limits import PROFILES

pytestmark = pytest.mark.slow

START_MS = 1_700_000_000_000
DAY_MS = 24 * 3_600_000
PLATFORM = COLUMNS.index("platform")

devices = st.sampled_from(["phone-1", "phone-2", "kiosk-9", None])
known = ["ann-111", "bob-222", "eve-333"]
users = st.sampled_from([*known, None])
values = st.one_of(st.integers(-5, 5), st.sampled_from(["a", "b"]))
names = st.sampled_from(["color", "plan", "count"])
plain = st.dictionaries(names, values, max_size=2)
operations = st.fixed_dictionaries(
    {},
    optional={
        "$set": plain,
        "$setOnce": plain,
        "$add": st.dictionaries(names, st.integers(-3, 3), max_size=2),
        "$append": plain,
        "$unset": st.dictionaries(names, st.just("-"), max_size=1),
    },
)
properties = st.one_of(st.none(), plain, operations, st.just({"$clearAll": "-"}))


origins = st.sampled_from([None, None, "summer", "winter"])  # live, or an import


def stamped(wire: list[dict[str, Any]], of: str | None) -> list[dict[str, Any]]:
    """Return the same events as sent live, or by an import."""
    plain = [{name: one[name] for name in one if name != "ingestion_metadata"} for one in wire]
    origin = {"source_name": "retrofill", "source_version": of}
    return [one | {"ingestion_metadata": origin} for one in plain] if of else plain


class FakeClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.ms = START_MS

    def now_ms(self) -> int:
        return self.ms


class SealerInside(Sealer):
    """Seals in this process: a child for each of a thousand restarts would take all the time."""

    async def seal(self, first: int, last: int) -> SealResult:
        file = self._lake.new_file(first, last)
        done = seal_blocks(SealTask(self._blocks, first, last, file))
        self._lake.adopt(file if done.rows else None, block=done.last, merges=done.merges)
        return SealResult(bool(done.rows), done.rows, done.file_bytes)

    def refolder(self) -> Refolder:
        return ThreadRefolder()


class EngineBesideModel(RuleBasedStateMachine):
    """One directory, one project."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="retrofill-stateful-"))
        self.clock = FakeClock()
        self.model = Model()
        self.loop = asyncio.new_event_loop()
        self.sent: list[dict[str, Any]] = []
        self.number = 0
        self.history: list[bytes] = []
        self.open()

    def open(self) -> None:
        self.engine = Engine.open(
            Settings(data=self.folder, limits="none"), clock=self.clock, sealer=SealerInside
        )
        if not self.engine.all_projects():
            self.engine.add_project(self.engine.projects_store.add("one", "key", "secret"))
            self.engine.set_settings(1, ProjectSettings({"legacy_eps": 1, "window_s": 2}))
        self.remember_blocks()
        self.loop.run_until_complete(self.engine.start())

    def remember_blocks(self) -> None:
        append = self.engine.blocks.append

        def remembering(number: int, rows: int, blob: bytes) -> None:
            append(number, rows, blob)
            self.history.append(blob)

        self.engine.blocks.append = remembering  # type: ignore[method-assign] # it only looks on

    def teardown(self) -> None:
        try:
            self.count()
            self.the_history_folds_to_the_state()
        finally:
            self.end()

    def the_history_folds_to_the_state(self) -> None:
        empty = Checkpoint(self.folder / "empty.sqlite")
        state = State(empty)
        for number, blob in enumerate(self.history, 1):
            block = block_codec.decode(blob)
            assert block.number == number
            refold(state, block, batches_of(block))
        again, live = state.project(1), self.engine.state.project(1)
        for shelf, other in ((again.devices, live.devices), (again.users, live.users)):
            for key, value in shelf.young.items():
                assert other.get(key) == (value or None)
        for number, person in again.people.young.items():
            other_person = live.people.get(number)
            assert other_person is not None
            assert encode(other_person) == encode(person)
        assert state.fresh == self.engine.state.fresh
        empty.close()

    def end(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()
        shutil.rmtree(self.folder)

    # Commands.

    def send(self, wire: list[dict[str, Any]], path: str) -> None:
        envelope = events.open_envelope(msgspec.json.encode({"api_key": "key", "events": wire}))
        outcome = self.outcome(envelope, path)
        assert isinstance(outcome, Accepted)
        for one in wire:
            self.model.take(one, now_ms=outcome.server_upload_ms)
        self.sent += wire

    def outcome(self, envelope: events.Envelope | events.Refusal, path: str) -> Outcome:
        assert isinstance(envelope, events.Envelope)
        batch = events.parse(
            envelope,
            project=1,
            path=path,
            limits=PROFILES["none"],
            received_ms=self.clock.ms,
            remote=None,
            payload_bytes=100,
        )
        assert isinstance(batch, Batch), batch
        return self.loop.run_until_complete(self.engine.ingest(batch))

    @rule(
        who=st.lists(st.tuples(devices, users), min_size=1, max_size=4),
        sent=properties,
        skip=st.booleans(),
        identify=st.booleans(),
        platform=st.sampled_from(["iOS", "Web", None]),
        back_ms=st.integers(0, 400 * DAY_MS),
        path=st.sampled_from(["/batch", "/2/httpapi"]),
        of=origins,
    )
    def track(
        self,
        *,
        who: list[tuple[str | None, str | None]],
        sent: dict[str, Any] | None,
        skip: bool,
        identify: bool,
        platform: str | None,
        back_ms: int,
        path: str,
        of: str | None,
    ) -> None:
        wire: list[dict[str, Any]] = []
        for device, user in who:
            if device is None and user is None:
                continue
            self.number += 1
            wire.append(
                {
                    "event_type": "$identify" if identify else "View",
                    "device_id": device,
                    "user_id": user,
                    "insert_id": f"i{self.number}",
                    "time": self.clock.ms - back_ms,
                    "user_properties": sent,
                    "$skip_user_properties_sync": skip,
                    "platform": platform,
                }
            )
        if wire:
            self.send(stamped(wire, of), path)

    @rule(org=st.sampled_from(["acme", "umbra"]), first=properties, then=properties, device=devices)
    def group(
        self,
        *,
        org: str,
        first: dict[str, Any] | None,
        then: dict[str, Any] | None,
        device: str | None,
    ) -> None:
        """A group changes before and between events of one request."""
        wire = []
        for sent in (first, then):
            self.number += 2
            identify = {"event_type": "$groupidentify", "groups": {"org": org}}
            event = {"event_type": "View", "device_id": device or "phone-1", "time": self.clock.ms}
            wire += [
                {**identify, "insert_id": f"i{self.number - 1}", "group_properties": sent},
                {**event, "insert_id": f"i{self.number}", "groups": {"org": [org, "other"]}},
            ]
        self.send(wire, "/batch")

    @rule(user=st.sampled_from(known), to=st.sampled_from([*known, None]))
    def alias(self, *, user: str, to: str | None) -> None:
        said = {"unmap": True} if to is None else {"global_user_id": to}
        mapping = msgspec.json.encode({"api_key": "key", "mapping": {"user_id": user, **said}})
        outcome = self.outcome(form.open_json("/usermap", mapping), "/usermap")
        assert isinstance(outcome, Accepted) == self.model.map(user, to)

    @rule(who=st.tuples(st.sampled_from(["phone-1", "new-phone"]), users), sent=properties)
    def throttle(self, who: tuple[str, str | None], sent: dict[str, Any] | None) -> None:
        """Three at once are over one a second for two seconds: nothing of them may be left."""
        wire = {"event_type": "View", "device_id": who[0], "user_id": who[1]}
        body = msgspec.json.encode(
            {"api_key": "key", "event": [{**wire, "user_properties": sent}] * 3}
        )
        outcome = self.outcome(form.open_json("/httpapi", body), "/httpapi")
        assert isinstance(outcome, Throttled)
        assert outcome.events == [0, 1, 2]

    @rule(index=st.integers(0, 1000), count=st.integers(1, 5))
    def repeat(self, index: int, count: int) -> None:
        again = self.sent[index % max(len(self.sent), 1) :][:count]
        if again:
            self.send(again, "/batch")

    @rule(index=st.integers(0, 1000), count=st.integers(1, 5), of=origins)
    def repeat_elsewhere(self, index: int, count: int, of: str | None) -> None:
        again = self.sent[index % max(len(self.sent), 1) :][:count]
        if again:  # twice: one block has to judge what two would
            self.send(stamped(again, of) + stamped(again, "summer"), "/batch")

    @rule(step_ms=st.sampled_from([1, 1000, 3_600_000, 8 * DAY_MS, -60_000]))
    def wait(self, step_ms: int) -> None:
        self.clock.ms += step_ms

    @rule()
    def seal(self) -> None:
        self.loop.run_until_complete(self.engine.seal())

    @rule()
    def checkpoint(self) -> None:
        self.loop.run_until_complete(self.engine.checkpoint())

    @rule()
    def restart(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.open()

    @rule()
    def crash(self) -> None:
        self.loop.run_until_complete(self.engine.abandon())
        self.open()

    # What must hold.

    def rows(self) -> list[dict[str, Any]]:
        with self.engine.lake.snapshot() as snapshot:
            lake = snapshot.cursor.execute("SELECT * FROM lake.events").to_arrow_table().to_pylist()
            blocks = list(self.engine.blocks.read(snapshot.sealed + 1, self.engine.last_block()))
        lake += arrow.table(blocks).to_pylist() if blocks else []
        return sorted(lake, key=lambda row: (row["block"], row["row"]))

    @invariant()
    def rows_equal_the_model(self) -> None:
        rows = self.rows()
        self.displaced_rows_equal_the_model(rows)
        found = [row for row in rows if row["kind"] == Kind.EVENT]
        assert [
            (row["insert_id"], row["user_id"], row["platform"], row["event_time"]) for row in found
        ] == [(row.insert_id, row.user_id, row.platform, row.time_ms) for row in self.model.rows]
        assert [msgspec.json.decode(row["user_properties"]) for row in found] == [
            row.properties for row in self.model.rows
        ]
        for name in ("groups", "group_properties"):
            told = [msgspec.json.decode(row[name] or "{}") for row in found]
            assert told == [getattr(row, name) for row in self.model.rows]
        numbers: dict[int, int] = {}
        for row, expected in zip(found, self.model.rows, strict=True):
            assert numbers.setdefault(expected.person, row["amplitude_id"]) == row["amplitude_id"]
        assert len(set(numbers.values())) == len(numbers)

    @rule()
    def count(self) -> None:
        """Ask for the active users of each month."""
        expected = self.model.active()
        if not expected:
            return
        when = charts.range_of("20220101", "20301231", 30)
        with self.engine.reader().view(1) as view:
            said = charts.active(view, when, [[]], None)
        counts = zip(said["xValues"], said["series"][0], strict=True)
        assert {month: count for month, count in counts if count} == expected

    def displaced_rows_equal_the_model(self, rows: list[dict[str, Any]]) -> None:
        found = [row for row in rows if row["kind"] == Kind.DISPLACED]
        assert [
            Displaced(
                row["insert_id"],
                row["event_type"],
                row["user_id"],
                row["sent"] and (msgspec.json.decode(row["sent"]) or None),
                row["import_id"],
            )
            for row in found
        ] == self.model.displaced

    @invariant()
    def states_equal_the_model(self) -> None:
        state = self.engine.state.project(1)
        assert self.engine.aliases(1) == self.model.aliases
        for user, number in self.model.user_of.items():
            known = state.users.get(user)
            assert known is not None
            person = state.people.get(known)
            someone = self.model.people[number]
            assert person is not None
            assert person.user_id == user
            assert person.properties == someone.table
            assert person.columns[PLATFORM] == someone.platform
            expected = -1 if someone.first_seen_ms is None else someone.first_seen_ms
            assert person.first_seen_ms == expected


class Canary(EngineBesideModel):
    """The same with a fault planted in the model, to show that the alarm rings."""

    @invariant()  # a rule is not drawn in every twenty lives, and then the alarm did not ring
    def forget_a_row(self) -> None:
        del self.model.rows[-1:]


TestEngine = EngineBesideModel.TestCase
TestEngine.settings = settings(
    max_examples=8,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.long
class TestEngineForLong(EngineBesideModel.TestCase):  # type: ignore[name-defined,misc] # made by Hypothesis
    """The same with long lives."""

    settings = settings(
        max_examples=200,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def test_the_alarm_rings() -> None:
    from hypothesis.stateful import run_state_machine_as_test  # noqa: PLC0415 - only here

    with pytest.raises(AssertionError):
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Canary,
            settings=settings(
                max_examples=100,  # it stops at the first alarm
                stateful_step_count=10,
                deadline=None,
                database=None,
                report_multiple_bugs=False,
                phases=[Phase.generate],  # the alarm is enough: no need of the smallest fault
                suppress_health_check=list(HealthCheck),
            ),
        )
