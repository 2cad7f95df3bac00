"""An import that was undone is as if it had never been: a server that never saw it holds the same."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from tests.stateful.test_engine import FakeClock, SealerInside

from retrofill.config import Settings
from retrofill.core import event as events
from retrofill.core import person as people
from retrofill.core.block import Kind
from retrofill.core.event import Batch
from retrofill.core.throttle import Accepted
from retrofill.engine import change, imports, refolder
from retrofill.engine.ingest import Engine
from retrofill.engine.refolder import Done, Export, Task, ThreadRefolder
from retrofill.errors import ConflictError, CorruptError, FullError, MissingError, StoreError
from retrofill.lake import Swap, history

SEEN = f"({int(Kind.EVENT)}, {int(Kind.IDENTIFY)}, {int(Kind.GROUP_IDENTIFY)})"
Wire = list[dict[str, Any]]


class _CutError(BaseException):
    """The machine stops here."""


class Meddled(ThreadRefolder):
    """Folds history again while something else happens before each of its tasks, unless commits pause."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    async def ask(self, task: Task) -> Done:
        if self.server.meddle is not None and not self.server.engine.committing.locked():
            await self.server.meddle()
        return await super().ask(task)


class Server:
    """One engine in this process."""

    def __init__(self, folder: Path, clock: FakeClock, limits: str = "none") -> None:
        self.folder, self.clock, self.limits = folder, clock, limits
        self.meddle: Callable[[], Awaitable[None]] | None = None
        self.loop = asyncio.new_event_loop()
        self.open()

    def open(self) -> None:
        self.engine = Engine.open(
            Settings(data=self.folder, limits=self.limits), clock=self.clock, sealer=SealerInside
        )
        if not self.engine.all_projects():
            self.engine.add_project(self.engine.projects_store.add("one", "key", "secret"))
        self.engine.rewriting._refolder = lambda: Meddled(self)
        self.run(self.engine.start())

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def send(self, wire: Wire, path: str = "/2/httpapi") -> None:
        self.run(self.post(wire, path))

    async def post(self, wire: Wire, path: str = "/2/httpapi") -> None:
        body = msgspec.json.encode({"api_key": "key", "events": wire})
        envelope = events.open_envelope(body)
        assert isinstance(envelope, events.Envelope)
        batch = events.parse(
            envelope,
            project=1,
            path=path,
            payload_bytes=len(body),
            received_ms=self.clock.ms,
            remote="10.0.0.1",
            limits=self.engine.limits(1),
        )
        assert isinstance(batch, Batch)
        assert isinstance(await self.engine.ingest(batch), Accepted)

    def crash(self) -> None:
        self.run(self.engine.abandon())
        self.open()

    def close(self) -> None:
        self.run(self.engine.close())
        self.loop.close()

    def owner(self, *, user: str = "", device: str = "") -> int:
        """Whoever has an id now, 0 if it is nobody's."""
        state = self.engine.state.project(1)
        one = (state.users.get(user) if user else state.devices.get(device)) or 0
        who = state.people.get(one) if one else None
        return 0 if who is not None and who.merged_into == people.FORGOTTEN else one

    def seen(self) -> dict[str, Any]:
        """Everything that readers and later folds may see, people numbered in order of appearance."""
        self.run(self.engine.seal())
        with self.engine.lake.snapshot() as snapshot:
            rows = (
                snapshot.cursor.execute(
                    f'SELECT * FROM lake.events WHERE kind IN {SEEN} ORDER BY "block", "row"'
                )
                .to_arrow_table()
                .to_pylist()
            )
            merges = snapshot.cursor.execute(
                'SELECT absorbed, surviving, event_time, server_upload_time FROM lake.merges ORDER BY "block", "row"'
            ).fetchall()
        number: dict[int, int] = {0: 0}
        for row in rows:
            del row["block"], row["row"]
            row["amplitude_id"] = number.setdefault(row["amplitude_id"], len(number))
        state = self.engine.state.project(1)
        devices = {row["device_id"] for row in rows} - {None}
        users = {row["user_id"] for row in rows} - {None}
        persons = {}
        for one, place in number.items():
            person = state.people.get(one)
            if person is not None:
                persons[place] = people.encode(
                    msgspec.structs.replace(
                        person,
                        amplitude_id=place,
                        merged_into=number.get(person.merged_into, person.merged_into),
                    )
                )
        groups = {
            key: state.groups.get(key) or None
            for row in rows
            for key in _groups(row["sent_groups"])
        }
        return {
            "rows": rows,
            "merges": [(number[a], number[b], *rest) for a, b, *rest in merges],
            "devices": {one: number.get(self.owner(device=one)) for one in devices},
            "users": {one: number.get(self.owner(user=one)) for one in users},
            "people": persons,
            "groups": groups,
        }


def _groups(text: str | None) -> Iterator[tuple[str, str]]:
    for group_type, value in msgspec.json.decode(text or "{}").items():
        yield from ((group_type, one) for one in (value if isinstance(value, list) else [value]))


def same(subject: Server, control: Server | dict[str, Any]) -> dict[str, Any]:
    """Both hold the same; told row by row, so that a difference can be read. Returns what the control holds."""
    mine = subject.seen()
    theirs = control.seen() if isinstance(control, Server) else control
    for one, other in zip(mine["rows"], theirs["rows"], strict=False):
        assert one == other
    assert len(mine["rows"]) == len(theirs["rows"])
    assert mine == theirs
    return theirs


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


DEVICES = ["phone-1", "phone-2", "kiosk-9", "tablet-4", None]
UNIQUE = 0.8
IMPORTS = ["old-shop", "old-crm"]
USERS = ["ann-111", "bob-222", "eve-333", None, None]


def _properties(seeded: random.Random) -> dict[str, Any]:
    one = seeded.choice(["color", "plan", "count"])
    value: Any = seeded.choice([1, 2, "a", "b"])
    number = seeded.randint(-3, 3)
    return seeded.choice(
        [
            {one: value},
            {"$set": {one: value}},
            {"$setOnce": {one: value}},
            {"$add": {one: number}},
            {"$append": {one: value}},
            {"$prepend": {one: value}},
            {"$preInsert": {one: value}},
            {"$postInsert": {one: value}},
            {"$remove": {one: value}},
            {"$unset": {one: "-"}},
            {"$clearAll": "-"},
        ]
    )


def _event(seeded: random.Random, number: int, now_ms: int, *, name: str = "") -> dict[str, Any]:
    device, user = seeded.choice(DEVICES), seeded.choice(USERS)
    if device is None and user is None:
        device = "phone-1"
    event: dict[str, Any] = {
        "event_type": seeded.choice(["open", "buy"]),
        "time": now_ms - seeded.randrange(10_000_000),
        "insert_id": f"i-{number}"
        if seeded.random() < UNIQUE
        else f"i-{seeded.randrange(number + 1)}",
    }
    if device:
        event["device_id"] = device
    if user:
        event["user_id"] = user
    if seeded.random() < 0.6:
        event["user_properties"] = _properties(seeded)
    for key, choices in (
        ("platform", ["iOS", "Android"]),
        ("device_model", ["iPhone 9", "Pixel"]),
        ("country", ["Chad", "Peru"]),
        ("language", ["de", "English"]),
        ("app_version", ["1.0", "2.0"]),
        ("ip", ["$remote", "1.2.3.4"]),
        ("revenue", [3.5]),
    ):
        if seeded.random() < 0.2:
            event[key] = seeded.choice(choices)
    if seeded.random() < 0.15:
        event["$skip_user_properties_sync"] = True
    if seeded.random() < 0.15:
        event["groups"] = {"org": seeded.choice(["acme", "zeta"])}
    if name:
        event["ingestion_metadata"] = {"source_name": "retrofill", "source_version": name}
    return event


def _request(
    seeded: random.Random, number: int, now_ms: int, *, name: str = ""
) -> tuple[Wire, str]:
    chance = seeded.random()
    path = seeded.choice(["/2/httpapi", "/batch"])
    made = [_event(seeded, number + at, now_ms, name=name) for at in range(seeded.randint(1, 4))]
    if chance < 0.1:
        for one in made:
            one["event_type"] = "$identify"
            one.setdefault("user_properties", {"$set": {"plan": "x"}})
    elif chance < 0.2:
        for one in made:
            one["event_type"] = "$groupidentify"
            one["groups"] = {"org": seeded.choice(["acme", "zeta"])}
            one["group_properties"] = {"$set": {"size": seeded.randint(1, 9)}}
            one.pop("user_properties", None)
    return made, path


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 100))]
)
def test_an_undone_import_leaves_no_trace(seed: int, tmp_path: Path, clock: FakeClock) -> None:
    seeded = random.Random(seed)
    limits = seeded.choice(["none", "amplitude"])
    subject = Server(tmp_path / "subject", clock, limits)
    control = Server(tmp_path / "control", clock, limits)
    number = 0
    for _ in range(seeded.randint(10, 40)):
        clock.ms += seeded.choice([10, 1000, 3_600_000])
        number += 5
        name = seeded.choice(["", "", "", "old-shop", "old-crm"])
        wire, path = _request(seeded, number, clock.ms, name=name)
        subject.send(wire, path)
        if name != "old-shop":
            control.send(wire, path)
        chance = seeded.random()
        _put_down(subject, chance)
        if 0.2 <= chance < 0.25:
            subject.run(subject.engine.undo(1, "old-shop"))
    subject.run(subject.engine.undo(1, "old-shop"))
    theirs = same(subject, control)
    subject.crash()
    same(subject, theirs)
    for _ in range(5):  # and goes on as the other does
        clock.ms += 1000
        number += 5
        wire, path = _request(seeded, number, clock.ms)
        subject.send(wire, path)
        control.send(wire, path)
    same(subject, control)
    subject.close()
    control.close()


def _put_down(server: Server, chance: float) -> None:
    """Seal, save or stop, each now and then: below 0.2."""
    if chance < 0.1:
        server.run(server.engine.seal())
    elif chance < 0.15:
        server.run(server.engine.checkpoint())
    elif chance < 0.2:
        server.crash()


def with_small_tails(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Have a change of history fold what comes meanwhile a few rows at a time, by seed."""
    monkeypatch.setattr(change, "REFOLD_PASS_ROWS", seed % 4)
    monkeypatch.setattr(change, "REFOLD_TAIL_ROWS", seed % 4)
    monkeypatch.setattr(change, "REFOLD_TAIL_MAX", 1 + seed % 5)
    monkeypatch.setattr(change, "REFOLD_TAILS_MAX", seed % 3)
    monkeypatch.setattr(refolder, "REFOLD_TAIL_BYTES", 10**9 * (seed % 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [*range(30), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(30, 500))]
)
def test_traffic_and_crashes_while_an_import_is_undone_leave_no_trace_of_it(
    seed: int, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, with requests answered between any two steps of undo and restore, and stops there."""
    with_small_tails(monkeypatch, seed)
    story = Story(1000 + seed, Server(tmp_path / "subject", clock))
    control = Server(tmp_path / "control", clock)
    subject = story.subject
    for _ in range(story.seeded.randint(2, 4)):
        story.chapter()
    subject.meddle = None
    try:
        subject.run(subject.engine.undo(1, "old-shop"))
    except ConflictError:  # a restore that was cut off three times waits until somebody asks for it
        subject.run(subject.engine.restore(1, "old-shop"))
        subject.run(subject.engine.undo(1, "old-shop"))
    assert story.during
    now_ms = clock.ms
    for ms, wire, path in story.told:
        clock.ms = ms
        control.send(wire, path)
    clock.ms = now_ms
    theirs = same(subject, control)
    subject.crash()
    same(subject, theirs)
    for _ in range(3):  # and goes on as the other does
        clock.ms += 1000
        wire, path = _request(story.seeded, story.number + 5, clock.ms)
        subject.send(wire, path)
        control.send(wire, path)
    same(subject, control)
    subject.close()
    control.close()


class Story:
    """What happens to a server. told: what a control has to hear. during: requests answered inside a change."""

    def __init__(self, seed: int, subject: Server) -> None:
        self.seeded = random.Random(seed)
        self.subject = subject
        self.told: list[tuple[int, Wire, str]] = []
        self.number = self.during = 0
        subject.meddle = self.meddle

    def chapter(self) -> None:
        seeded, subject = self.seeded, self.subject
        # What a start takes up again has its own requests: two at a time would share a block and its time.
        subject.run(subject.engine.rewriting.ended())
        for _ in range(seeded.randint(2, 8)):
            subject.run(self.request())
            if seeded.random() < 0.2:
                subject.run(subject.engine.seal())
        change = seeded.choice([subject.engine.undo, subject.engine.restore])
        change = change if self.during else subject.engine.undo
        try:
            with contextlib.suppress(ConflictError, MissingError):
                subject.run(change(1, "old-shop"))
        except _CutError:
            subject.crash()
        if seeded.random() < 0.2:
            subject.run(subject.engine.rewriting.ended())  # else nobody knows what was answered
            subject.crash()

    async def request(self) -> None:
        seeded, clock = self.seeded, self.subject.clock
        clock.ms += seeded.choice([10, 1000, 3_600_000])
        self.number += 5
        name = seeded.choice(["", "", "", "old-shop", "old-crm"])
        wire, path = _request(seeded, self.number, clock.ms, name=name)
        if name != "old-shop":  # before it is awaited: others may be sent meanwhile
            self.told.append((clock.ms, wire, path))
        await self.subject.post(wire, path)

    async def meddle(self) -> None:
        for _ in range(self.seeded.choice([0, 0, 1, 1, 2, 4]) if self.during else 1):
            await self.request()
            self.during += 1
        if self.seeded.random() < 0.05:
            raise _CutError


@pytest.mark.parametrize(
    "seed", [5, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 60))]
)
def test_a_restored_import_is_as_it_was(seed: int, tmp_path: Path, clock: FakeClock) -> None:
    seeded = random.Random(seed)
    subject = Server(tmp_path / "subject", clock)
    number = 0
    for _ in range(30):
        clock.ms += 1000
        number += 5
        wire, path = _request(seeded, number, clock.ms, name=seeded.choice(["", "old-shop"]))
        subject.send(wire, path)
    before = subject.seen()
    state = seeded.choice(["open", "closed"])
    if state == "closed":
        imports.closed(subject.engine.imports, 1, "old-shop")
    undone = subject.run(subject.engine.undo(1, "old-shop"))
    assert undone.state == "undone"
    assert len(subject.seen()["rows"]) < len(before["rows"])
    assert subject.run(subject.engine.undo(1, "old-shop")) == undone
    assert subject.run(subject.engine.restore(1, "old-shop")).state == state
    assert subject.seen() == before
    with pytest.raises(ConflictError, match=f"{state}, not undone"):
        subject.run(subject.engine.restore(1, "old-shop"))
    subject.run(subject.engine.undo(1, "old-shop"))
    subject.send([_event(seeded, 999, clock.ms, name="old-shop")])
    with pytest.raises(ConflictError, match="later generation"):
        subject.run(subject.engine.restore(1, "old-shop"))
    subject.close()


def test_a_device_that_the_import_gave_away_is_not_taken_for_one_that_a_deletion_freed(
    tmp_path: Path, clock: FakeClock
) -> None:
    """Hidden from the import, the event without a user began a person: that says nothing once the import is back."""
    subject = Server(tmp_path / "subject", clock)
    old = {"ingestion_metadata": {"source_name": "retrofill", "source_version": "old-shop"}}
    kiosk = {"event_type": "open", "device_id": "kiosk-9", "time": clock.ms}
    for event in [{**kiosk, "user_id": "ann-111", **old}, kiosk]:
        clock.ms += 1000
        subject.send([event])
    before = subject.seen()
    assert [row["amplitude_id"] for row in before["rows"]] == [1, 1]
    subject.run(subject.engine.undo(1, "old-shop"))
    subject.run(subject.engine.restore(1, "old-shop"))
    same(subject, before)
    subject.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 100))]
)
def test_imports_that_are_all_restored_are_as_if_they_had_never_been_undone(
    seed: int, tmp_path: Path, clock: FakeClock
) -> None:
    """With traffic, crashes and other imports before, between and after undo and restore."""
    seeded = random.Random(seed)
    limits = seeded.choice(["none", "amplitude"])
    subject = Server(tmp_path / "subject", clock, limits)
    control = Server(tmp_path / "control", clock, limits)
    number = 0
    undone: list[str] = []

    def send(name: str = "") -> None:
        nonlocal number
        number += 5
        wire, path = _request(seeded, number, clock.ms, name=name)
        subject.send(wire, path)
        control.send(wire, path)

    for _ in range(seeded.randint(10, 40)):
        clock.ms += seeded.choice([10, 1000, 3_600_000])
        send(seeded.choice([name for name in ("", "", *IMPORTS) if name not in undone]))
        chance = seeded.random()
        _put_down(subject, chance)
        if 0.2 <= chance < 0.5:
            _turn(subject, seeded.choice(IMPORTS), undone)
    while not undone:
        _turn(subject, seeded.choice(IMPORTS), undone)
    for name in tuple(undone):
        _turn(subject, name, undone)
    same(subject, control)
    for _ in range(4):  # and goes on as the other does
        clock.ms += 1000
        send()
    same(subject, control)
    subject.close()
    control.close()


def _turn(server: Server, name: str, undone: list[str]) -> None:
    """Restore an import that is undone, or undo it if it has come."""
    if name in undone:
        server.run(server.engine.restore(1, name))
        undone.remove(name)
    else:
        with contextlib.suppress(MissingError):
            server.run(server.engine.undo(1, name))
            undone.append(name)


@pytest.mark.parametrize("hashes", ["as they are", "all alike"])
@pytest.mark.parametrize("key", ["insert_id", "event_id"])
def test_what_repeats_a_restored_import_is_left_out_again(
    key: str, hashes: str, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the undo, while the import was hidden, and while it is restored: as where it was never undone."""
    if hashes == "all alike":
        monkeypatch.setattr(refolder, "_HASH", "1::UBIGINT")
    found: list[list[Any]] = []
    taken = refolder.Session._taken

    def noted(*given: Any) -> pa.Table:
        rows = taken(*given)
        found.append(sorted(rows[key].to_pylist()))
        return rows

    monkeypatch.setattr(refolder.Session, "_taken", noted)
    subject = Server(tmp_path / "subject", clock)
    control = Server(tmp_path / "control", clock)
    origin = {"ingestion_metadata": {"source_name": "retrofill", "source_version": "old-shop"}}

    def wire(number: int, **more: Any) -> Wire:
        said = {key: f"i-{number}" if key == "insert_id" else number, "time": clock.ms - number}
        ids = {"device_id": "phone-1", "user_id": "ann-111"}
        return [{"event_type": "open", **ids, **said, "user_properties": {"n": number}, **more}]

    old = [wire(number, **origin) for number in range(4)]
    live = [wire(number) for number in range(4)]
    for one in [*old, live[0], wire(7)]:
        clock.ms += 1000
        for server in (subject, control):
            server.send(one)
    subject.run(subject.engine.undo(1, "old-shop"))
    assert len(subject.seen()["rows"]) == 2
    clock.ms += 1000
    for server in (subject, control):
        server.send(live[1])
    assert len(subject.seen()["rows"]) == 3
    clock.ms += 1000
    waiting = [live[2]]

    async def meddle() -> None:
        while waiting:
            await subject.post(waiting.pop())

    subject.meddle = meddle
    subject.run(subject.engine.restore(1, "old-shop"))
    assert not waiting
    control.send(live[2])
    same(subject, control)
    assert found[0] == (["i-0", "i-1"] if key == "insert_id" else [0, 1])
    subject.crash()
    for server in (subject, control):
        server.send(live[3])
    same(subject, control)
    assert len(subject.seen()["rows"]) == 5
    subject.close()
    control.close()


def test_what_repeats_an_import_while_it_is_undone_is_stored_once(
    tmp_path: Path, clock: FakeClock
) -> None:
    subject = Server(tmp_path / "subject", clock)
    control = Server(tmp_path / "control", clock)
    one = {"event_type": "open", "device_id": "phone-1", "insert_id": "i-0", "time": clock.ms}
    origin = {"source_name": "retrofill", "source_version": "old-shop"}
    subject.send([{**one, "ingestion_metadata": origin}])
    clock.ms += 1000
    waiting = [[one]]

    async def meddle() -> None:
        while waiting:
            await subject.post(waiting.pop())

    subject.meddle = meddle
    subject.run(subject.engine.undo(1, "old-shop"))
    assert not waiting
    control.send([one])
    for server in (subject, control):  # its key is its own now
        server.send([one])
    same(subject, control)
    assert len(subject.seen()["rows"]) == 1
    subject.close()
    control.close()


class Interrupted(ThreadRefolder):
    """Folds history again; once, right after the first export, something else happens."""

    def __init__(self, then: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self.then: Callable[[], Awaitable[None]] | None = then

    async def ask(self, task: Task) -> Done:
        done = await super().ask(task)
        if isinstance(task, Export) and self.then is not None:
            then, self.then = self.then, None
            await then()
        return done


@pytest.mark.parametrize("cut", [False, True])
def test_whose_device_another_logs_in_on_between_the_exports_stays(
    cut: bool,  # noqa: FBT001 - a parameter
    tmp_path: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = Server(tmp_path / "subject", clock)
    control = Server(tmp_path / "control", clock)
    ann = {"device_id": "phone-1", "user_id": "ann-111"}
    bob = {"device_id": "tablet-4", "user_id": "bob-222"}
    at = 0

    def wire(ids: dict[str, str], source: str = "") -> Wire:
        nonlocal at
        at += 1
        clock.ms += 1000
        event: dict[str, Any] = {"event_type": "open", "insert_id": f"i-{at}", "time": clock.ms}
        event |= {**ids, "user_properties": {"seen": at}}
        if source:
            event["ingestion_metadata"] = {"source_name": "retrofill", "source_version": source}
        return [event]

    for ids in (ann, bob):
        sent = wire(ids)
        subject.send(sent)
        control.send(sent)
        subject.send(wire(ids, "old-shop"))
    moved = wire({**bob, "device_id": "phone-1"})
    control.send(moved)
    engine: Any = subject.engine
    engine.rewriting._refolder = lambda: Interrupted(lambda: subject.post(moved))
    if cut:  # the start follows from the files of values
        monkeypatch.setattr(engine, "checkpoint", _cut)
        with pytest.raises(_CutError):
            subject.run(engine._undoing.undo(1, "old-shop"))
        subject.crash()
    else:
        subject.run(engine.undo(1, "old-shop"))
    same(subject, control)
    sent = wire(ann)
    for server in (subject, control):
        server.send(sent)
    same(subject, control)
    subject.close()
    control.close()


def _cut(*_: Any) -> None:
    raise _CutError


def one_import(subject: Server) -> None:
    seeded = random.Random(7)
    for number in range(6):
        subject.clock.ms += 1000
        subject.send([_event(seeded, number, subject.clock.ms, name="old-shop" * (number % 2))])


def test_an_undo_goes_no_further_once_nobody_knows_what_is_on_disk(
    tmp_path: Path, clock: FakeClock
) -> None:
    subject = Server(tmp_path / "subject", clock)
    one_import(subject)
    engine: Any = subject.engine

    async def fail() -> None:
        engine.fail(FullError("The disk is full"))

    engine.rewriting._refolder = lambda: Interrupted(fail)
    with pytest.raises(StoreError, match="has failed"):
        subject.run(engine.undo(1, "old-shop"))
    assert [engine.lake.rewritten(number) for number, _ in engine._intents.all()] == [None]
    subject.crash()
    assert subject.run(subject.engine.undo(1, "old-shop")).state == "undone"
    subject.close()


@pytest.mark.parametrize(("what", "name"), [("counting", "save"), ("", "checkpoint")])
def test_what_waits_for_an_undo_that_fails_after_its_swap_leaves_its_files_alone(
    what: str, name: str, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Server(tmp_path / "subject", clock)
    one_import(subject)
    engine: Any = subject.engine

    async def full(*_: Any) -> None:
        raise FullError("The disk is full")

    async def fill() -> None:
        await subject.post([{"event_type": "open", "device_id": "kiosk-9", "insert_id": "tail"}])
        monkeypatch.setattr(getattr(engine, what) if what else engine, name, full)

    async def both() -> list[Any]:
        asked = [engine.undo(1, "old-shop") for _ in range(2)]
        return await asyncio.gather(*asked, return_exceptions=True)

    engine.rewriting._refolder = lambda: Interrupted(fill)
    first, second = subject.run(both())
    assert isinstance(first, FullError)
    assert isinstance(second, StoreError)
    assert engine.problem() is not None
    with pytest.raises(StoreError):
        subject.run(engine.seal())
    monkeypatch.undo()
    subject.crash()
    assert subject.run(subject.engine.undo(1, "old-shop")).state == "undone"
    rows = subject.seen()["rows"]
    assert len(rows) == len({row["insert_id"] for row in rows})
    subject.close()


def test_an_undo_that_takes_more_than_duckdb_may_have_says_so(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no mistake in the program: with more room it goes on."""
    subject = Server(tmp_path / "subject", clock)
    one_import(subject)
    before = subject.seen()
    engine: Any = subject.engine
    engine.rewriting._refolder = ThreadRefolder
    with monkeypatch.context() as patched:
        patched.setattr(history, "HISTORY_MEMORY_BYTES", 600_000)
        with pytest.raises(StoreError, match="600,000 bytes of memory") as problem:
            subject.run(engine.undo(1, "old-shop"))
    assert "Raise HISTORY_MEMORY_BYTES" in problem.value.mend
    assert subject.seen() == before
    assert engine.problem() is None
    assert subject.run(engine.undo(1, "old-shop")).state == "undone"
    subject.close()


@pytest.mark.parametrize("kept", [slice(0, -50), slice(0, 0)])
def test_an_undo_that_meets_a_damaged_file_says_how_to_find_it(
    kept: slice, tmp_path: Path, clock: FakeClock
) -> None:
    subject = Server(tmp_path / "subject", clock)
    one_import(subject)
    subject.run(subject.engine.seal())
    engine: Any = subject.engine
    engine.rewriting._refolder = ThreadRefolder
    for file in engine.lake.event_files():
        file.path.write_bytes(file.path.read_bytes()[kept])
    with pytest.raises(CorruptError, match="cannot be read") as problem:
        subject.run(engine.undo(1, "old-shop"))
    assert "retrofill check" in problem.value.mend
    assert engine.problem() is None
    subject.close()


def test_an_undo_that_fails_keeps_no_other_project_waiting(
    tmp_path: Path, clock: FakeClock
) -> None:
    subject = Server(tmp_path / "subject", clock)
    one_import(subject)
    engine: Any = subject.engine
    engine.add_project(engine.projects_store.add("two", "key-2", "secret-2"))

    async def die() -> None:
        raise StoreError("The process that folds history again dies")

    engine.rewriting._refolder = lambda: Interrupted(die)
    with pytest.raises(StoreError, match="dies"):
        subject.run(engine.undo(1, "old-shop"))
    engine.rewriting._refolder = ThreadRefolder  # the next one lives
    changed = msgspec.structs.replace(engine.settings(2), property_time="event")
    subject.run(engine.change_settings(2, changed))
    assert engine.settings(2).property_time == "event"
    assert engine.problem() is None
    subject.crash()
    assert subject.run(subject.engine.undo(1, "old-shop")).state == "undone"
    subject.close()


# Where an undo is cut off, in order: (what, its method, whether the method was done before).
CUTS = [
    ("_intents", "add", True),
    ("lake", "swap_history", True),
    ("swap", "take_out", True),
    ("swap", "put_in", True),
    ("swap", "merge", True),
    ("swap", "commit", False),
    ("swap", "commit", True),
    ("duplicates", "adopt", False),
    ("duplicates", "adopt", True),
    ("duplicates", "mend", True),
    ("duplicates", "sealed", False),
    ("duplicates", "sealed", True),
    ("counting", "save", True),
    ("engine", "checkpoint", False),
    ("engine", "checkpoint", True),
    ("imports", "put", False),
    ("imports", "put", True),
    ("_intents", "remove", False),
    ("_intents", "remove", True),
]


STORY: list[tuple[str, dict[str, Any]]] = [
    # The import joins two people who are two without it: one of them gets a new number.
    ("old-shop", {"device_id": "phone-1", "user_id": "ann-111"}),
    ("", {"device_id": "phone-1"}),
    ("", {"device_id": "tablet-4", "user_id": "ann-111"}),
]


def begun(server: Server, *, imports: bool) -> Wire:
    """Tell a server the story, with what is imported or without; return what that is."""
    old: Wire = []
    for at, (source, event) in enumerate(STORY):
        server.clock.ms += 1000
        wire = [{"event_type": "open", "insert_id": f"i-{at}", "time": server.clock.ms, **event}]
        if source:
            wire[0]["ingestion_metadata"] = {"source_name": "retrofill", "source_version": source}
            old = wire
        if imports or not source:
            server.send(wire)
    return old


def gone_on(server: Server, old: Wire) -> list[dict[str, Any]]:
    """Return what a server holds: now, after a new event, and after those of the import were sent again."""
    held = [server.seen()]
    server.clock.ms += 1000
    server.send([{"event_type": "open", "device_id": "kiosk-9", "insert_id": "new"}])
    held.append(server.seen())
    server.send(old)  # they are stored: none of their keys is left
    return [*held, server.seen()]


@pytest.fixture(scope="module")
def spared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a server holds that never saw the import of the story."""
    control = Server(tmp_path_factory.mktemp("spared") / "control", FakeClock())
    held = gone_on(control, begun(control, imports=False))
    control.close()
    return held


@pytest.mark.slow
@pytest.mark.parametrize(("what", "name", "after"), CUTS)
def test_an_undo_cut_off_is_ended_with_its_keys_and_numbers(
    what: str,
    name: str,
    after: bool,  # noqa: FBT001 - a parameter
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spared: list[dict[str, Any]],
) -> None:
    subject = Server(tmp_path / "subject", FakeClock())
    old = begun(subject, imports=True)
    engine: Any = subject.engine
    owner = {"swap": Swap, "engine": engine}.get(what) or getattr(engine, what)
    real = getattr(owner, name)

    def cut(*values: Any, **named: Any) -> None:
        if after:
            real(*values, **named)
        raise _CutError

    async def cut_off(*values: Any, **named: Any) -> None:
        if after:
            await real(*values, **named)
        raise _CutError

    monkeypatch.setattr(owner, name, cut_off if asyncio.iscoroutinefunction(real) else cut)
    with pytest.raises(_CutError):
        subject.run(engine._undoing.undo(1, "old-shop"))
    monkeypatch.undo()
    subject.crash()
    assert subject.run(subject.engine.undo(1, "old-shop")).state == "undone"
    held = gone_on(subject, old)
    assert held == spared
    assert len({row["amplitude_id"] for row in held[-1]["rows"]}) == 3
    subject.close()


def test_a_start_without_the_values_of_a_swap_is_refused(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Server(tmp_path / "subject", clock)
    subject.send([_event(random.Random(1), 1, clock.ms, name="old-shop")])
    engine: Any = subject.engine

    def cut(*_: Any) -> None:
        raise _CutError

    monkeypatch.setattr(engine.duplicates, "adopt", cut)
    with pytest.raises(_CutError):
        subject.run(engine._undoing.undo(1, "old-shop"))
    subject.run(engine.abandon())
    shutil.rmtree(tmp_path / "subject" / "rewriting")
    with pytest.raises(CorruptError, match="values of a change of history are missing"):
        Engine.open(Settings(data=tmp_path / "subject"), clock=clock, sealer=SealerInside)
    subject.loop.close()
