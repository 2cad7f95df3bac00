"""What an import displaces is kept, hidden and the same after a seal, a restart, a crash and the loss of the keys."""

from __future__ import annotations

import asyncio
import io
import shutil
import zipfile
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.stateful.test_engine import START_MS, FakeClock, SealerInside

from retrofill.config import Settings
from retrofill.core import event as events
from retrofill.core.block import Flag, Kind
from retrofill.core.event import Batch
from retrofill.core.person import encode
from retrofill.core.throttle import Accepted, Throttled
from retrofill.engine import charts, people
from retrofill.engine.admission import ProjectSettings
from retrofill.engine.export import Hours, export
from retrofill.engine.ingest import Engine, Outcome
from retrofill.errors import StoreError
from retrofill.lake import Lake, arrow
from retrofill.limits import MS_PER_DAY, MS_PER_HOUR

pytestmark = pytest.mark.slow

TODAY = datetime.fromtimestamp(START_MS / 1000, UTC).date()
HISTORY = {"event_properties": {"from": "history"}, "user_properties": {"plan": "old"}}
LIVE = {
    "event_properties": {"from": "phone"},
    "user_properties": {"plan": "new"},
    "groups": {"org": "acme"},
    "platform": "iOS",
    "app_version": "3.1",
    "language": "de",
    "ip": "$remote",
    "price": 2.5,
    "$skip_user_properties_sync": True,
}
ANN = {"event_type": "View", "user_id": "ann-111", "device_id": "phone-1", "insert_id": "i1"}


class Site:
    """One directory and the engine at work in it."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.clock = FakeClock()
        self.engine: Engine

    async def open(self) -> None:
        self.engine = Engine.open(Settings(data=self.data), clock=self.clock, sealer=SealerInside)
        if not self.engine.all_projects():
            self.engine.add_project(self.engine.projects_store.add("one", "key", "secret"))
        await self.engine.start()

    async def send(self, *wire: dict[str, Any], of: str = "", path: str = "/batch") -> Outcome:
        """Send events, of an import if one is named."""
        origin = {"ingestion_metadata": {"source_name": "retrofill", "source_version": of}}
        sent = [one | origin if of else one for one in wire]
        found = [events.decode_one(msgspec.json.encode(one)) for one in sent]
        body = events.encode(found)
        return await self.engine.ingest(
            Batch(1, path, body, found, len(body), self.clock.ms, remote="203.0.113.9")
        )

    def rows(self, kind: Kind) -> list[dict[str, Any]]:
        """Rows of a kind, wherever they are."""
        with self.engine.lake.snapshot() as snapshot:
            found = snapshot.cursor.execute("SELECT * FROM lake.events").to_arrow_table()
            blocks = list(self.engine.blocks.read(snapshot.sealed + 1, self.engine.last_block()))
        rows = found.to_pylist() + arrow.table(blocks).to_pylist()
        return [row for row in rows if row["kind"] == kind]

    def answers(self) -> dict[str, Any]:
        """What every read API says."""
        engine, when = self.engine, charts.Range(TODAY, TODAY)
        reader = engine.reader()
        asked = charts.Question([charts.Wanted("_all")], when, metric="totals")
        hour = START_MS // MS_PER_HOUR
        archive = export(reader, 1, Hours(hour, hour), bytes_max=0)
        assert archive is not None
        names = zipfile.ZipFile(io.BytesIO(b"".join(archive)))
        archive.close()
        ann = engine.state.project(1).users.get("ann-111") or 0
        with reader.view(1) as view:
            return {
                "export": [info.file_size for info in names.infolist()],
                "types": charts.event_types(view, now_ms=self.clock.ms),
                "segmentation": charts.segmentation(view, asked),
                "active": charts.active(view, when, [[]], None),
                "new": charts.new(view, when, [[]], None),
                "sessions": charts.session_average(view, when),
                "lengths": charts.session_lengths(view, when),
                "search": people.search(view, "phone-1"),
                "activity": people.activity(view, ann, offset=0, limit=10, latest=True),
            }

    def state(self) -> bytes:
        person = self.engine.person(1, self.engine.state.project(1).users.get("ann-111") or 0)
        assert person is not None
        return encode(person)

    # Moments between two requests.

    async def nothing(self) -> None:
        """Go on."""

    async def seal(self) -> None:
        """Move what there is into the lake."""
        await self.engine.seal()

    async def restart(self) -> None:
        """Stop in good order."""
        await self.engine.close()
        await self.open()

    async def crash(self) -> None:
        """Lose what is not on disk."""
        await self.engine.abandon()
        await self.open()

    async def stop_before_keys(self) -> None:
        """Lose what is not on disk between the lake's commit and the key file; its blocks are read again, no row is."""

        def stop(*_: object, **__: object) -> None:
            raise StoreError("stopped here")

        if not self.engine.unsealed:
            await self.crash()
            return
        self.engine.duplicates.sealed = stop  # type: ignore[method-assign] # a stop
        with pytest.raises(StoreError, match="stopped here"):
            await self.engine.seal()
        before = set((self.data / "keys").iterdir())
        await self.engine.abandon()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lake, "dedupe_rows", stop)
            await self.open()
        assert len(set((self.data / "keys").iterdir()) - before) == 1

    async def lose_keys(self) -> None:
        """Have the key files made again from the lake."""
        await self.engine.close()
        shutil.rmtree(self.data / "keys")
        await self.open()


def on_site(*moments: str) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., None]]:
    """Run a test on a site, once for each of these moments."""

    def made(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        @pytest.mark.parametrize("moment", moments)
        def run(tmp_path: Path, moment: str) -> None:
            async def whole() -> None:
                site = Site(tmp_path)
                await site.open()
                await test(site, getattr(site, moment))
                await site.engine.close()

            asyncio.run(whole())

        return run

    return made


@on_site("seal", "crash", "stop_before_keys")
async def test_what_an_imports_row_displaces_is_kept_and_seen_by_nobody(
    site: Site, moment: Callable[[], Awaitable[None]]
) -> None:
    await site.send(ANN | HISTORY, of="summer")
    await moment()
    answers, state = site.answers(), site.state()
    duplicates = site.engine.figures.duplicates
    site.clock.ms += 5
    outcome = await site.send(ANN | LIVE | {"time": START_MS - 7})
    assert outcome == Accepted(1, START_MS + 5)
    assert site.engine.figures.duplicates == duplicates + 1
    for _ in range(2):
        (row,) = site.rows(Kind.DISPLACED)
        expected = {
            "amplitude_id": 0,
            "flags": Flag.SKIP,
            "user_id": "ann-111",
            "device_id": "phone-1",
            "insert_id": "i1",
            "import_id": None,
            "event_time": START_MS - 7,
            "server_upload_time": START_MS + 5,
            "created_time": None,
            "event_properties": '{"from":"phone","$revenue":2.5,"$price":2.5}',
            "sent": '{"plan":"new"}',
            "user_properties": "{}",
            "groups": '{"org":["acme"]}',
            "group_properties": "{}",
            "platform": "iOS",
            "version_name": "3.1",
            "start_version": None,
            "language": "German",
            "ip_address": "203.0.113.9",
            "library": "batch/1.0",
            "paying": None,
        }
        assert {name: row[name] for name in expected} == expected
        assert site.answers() == answers
        assert site.state() == state
        await moment()


@on_site("nothing", "restart", "lose_keys", "stop_before_keys")
async def test_a_duplicate_of_a_live_row_or_of_its_own_import_leaves_nothing(
    site: Site, moment: Callable[[], Awaitable[None]]
) -> None:
    other = ANN | {"insert_id": "i2"}
    without = {key: ANN[key] for key in ANN if key != "insert_id"}
    counted = without | {"event_id": 5, "time": START_MS}
    await site.send(ANN, counted)
    await site.send(other, counted | {"event_id": 6}, of="summer")
    await moment()
    await site.send(ANN, counted)
    await site.send(ANN, counted, other, counted | {"event_id": 6}, of="summer")
    assert len(site.rows(Kind.EVENT)) == 4
    assert site.rows(Kind.DISPLACED) == []
    await moment()
    await site.send(other, counted | {"event_id": 6})
    await site.send(other, counted | {"event_id": 6}, of="winter")
    assert len(site.rows(Kind.DISPLACED)) == 4
    await moment()
    await site.send(other, counted | {"event_id": 6}, of="winter")  # it was seen there
    assert len(site.rows(Kind.DISPLACED)) == 4
    site.clock.ms += 365 * MS_PER_DAY
    await site.send(other, counted | {"event_id": 6}, of="winter")
    await site.send(other, counted | {"event_id": 6}, of="summer")
    assert (len(site.rows(Kind.EVENT)), len(site.rows(Kind.DISPLACED))) == (4, 4)
    await site.send(other)  # a row of an import holds the ordinary key as long as any other
    assert (len(site.rows(Kind.EVENT)), len(site.rows(Kind.DISPLACED))) == (5, 4)


@on_site("lose_keys")
async def test_every_kind_of_event_is_displaced_with_what_it_sent(
    site: Site, moment: Callable[[], Awaitable[None]]
) -> None:
    group = {
        "event_type": "$groupidentify",
        "insert_id": "g1",
        "groups": {"org": "acme"},
        "group_properties": {"$set": {"seats": 5}},
    }
    identify = ANN | {
        "event_type": "$identify",
        "insert_id": "i3",
        "user_properties": {"$add": {"n": 1}},
    }
    await site.send(group, identify, of="summer")
    await moment()
    await site.send(group | {"group_properties": {"$set": {"seats": 9}}}, path="/groupidentify")
    await site.send(identify, group, of="winter")
    await moment()
    await site.send(identify, group, of="winter")
    found = [
        (row["event_type"], row["sent"], row["import_id"]) for row in site.rows(Kind.DISPLACED)
    ]
    assert sorted(found, key=str) == [
        ("$groupidentify", '{"$set":{"seats":5}}', "winter"),
        ("$groupidentify", '{"$set":{"seats":9}}', None),
        ("$identify", '{"$add":{"n":1}}', "winter"),
    ]
    assert site.engine.state.project(1).groups.get(("org", "acme")) == {"seats": 5}


@on_site("restart")
async def test_a_displaced_event_takes_nothing_from_the_daily_quota(
    site: Site, moment: Callable[[], Awaitable[None]]
) -> None:
    site.engine.set_settings(1, ProjectSettings({"daily_quota": 2}))
    await site.send(ANN, of="summer")
    for _ in range(3):
        assert isinstance(await site.send(ANN), Accepted)
        await moment()
    assert isinstance(await site.send(ANN | {"insert_id": "i2"}), Accepted)
    assert isinstance(await site.send(ANN | {"insert_id": "i3"}), Throttled)
    assert len(site.rows(Kind.DISPLACED)) == 3
