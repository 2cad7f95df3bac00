"""A rehearsal, from a stage to its outcome. Nothing is written anywhere but in the work directory.

1. What the import touches is read from the stage. 2. What is there already is asked for, at one position, and a scratch
directory is seeded with it as it comes. 3. The import is sent into that. 4. What is there then is compared with what
was. Where both are possible the state of a second directory follows with the other setting of
`$skip_user_properties_sync`. The directories are removed, whatever happens.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pyarrow as pa
import uvloop
from msgspec import Struct
from msgspec.structs import replace

from retrofill.backfill.drive import staged
from retrofill.backfill.journal import locked
from retrofill.backfill.keys import Keys
from retrofill.backfill.manifest import Manifest
from retrofill.backfill.plan import Throttled, plan
from retrofill.backfill.profile import DAY_S, Profile, Target
from retrofill.core import likeness
from retrofill.core.block import Kind
from retrofill.core.person import Person
from retrofill.engine import guard, history
from retrofill.engine.history import Alike, Asked, Days
from retrofill.engine.query import Statement, View
from retrofill.engine.seeding import PROJECT, known_key, seed
from retrofill.limits import HISTORY_IDS_MAX, HISTORY_KEYS_MAX, MERGES_LISTED_MAX, PROFILES
from retrofill.rehearse import archive, difference, given, outcome
from retrofill.rehearse import asked as stages
from retrofill.rehearse.asked import Touched
from retrofill.rehearse.check import Checked
from retrofill.rehearse.clock import VirtualClock
from retrofill.rehearse.difference import LISTED
from retrofill.rehearse.given import Given, Imported
from retrofill.rehearse.outcome import Held, Outcome, Shared, Volume, Waiting
from retrofill.rehearse.scratch import KEYS, Scratch, Sent, opened

CHECKED_EVENTS = 50_000  # ours: of an import so small the rows are asked for whole and folded again
PLACES = "country, region, city and dma that the server looks up by the address of an event"
REQUEST_EVENTS = 1000  # ours: of a request where there is no server that would see it
SEED_ROWS = 200_000  # ours: rows of each lake file that is seeded

Step = Callable[[str], None]
StoredKeys = list[tuple[bytes, int]]
Device = tuple[str, list[str], int, int]  # id, its users, how many there are, how many were live


class Order(Struct, frozen=True, kw_only=True):
    """What to rehearse. against: as it was said. to: the server, archive: the export, if it is one; neither: nothing.

    profile: how it is sent.
    """

    work: Path
    against: str
    profile: Profile
    to: Target | None = None
    archive: Path | None = None
    keys: Keys = Keys()
    now_ms: int
    step: Step = lambda _: None

    @property
    def path(self) -> str:
        """The path that requests go to."""
        return "/2/httpapi" if self.to and self.to.ingest.endswith("/2/httpapi") else "/batch"

    @property
    def kind(self) -> str:
        """`server`, `export` or `nothing`."""
        return "server" if self.to else "export" if self.archive else "nothing"


class _There(Struct):
    """What is there before the import."""

    given: Given
    unknown: list[str] = []
    warnings: list[str] = []
    imported: Imported = Imported()


class _Done(Struct):
    """What came of the import. other: the people with the other setting. before, after: of those who were looked at."""

    sent: Sent
    people: dict[int, Person]
    other: dict[int, Person] | None
    before: Days
    after: Days
    devices: list[Device]
    held: list[Held]


def rehearse(order: Order) -> Outcome:
    """Rehearse what is staged in a work directory; the outcome is kept there.

    Raises InputError, BusyError while a run or another rehearsal works there, FinalError, RetryError, StoreError.
    """
    with closing(locked(order.work)):
        return _owned(order)


def _owned(order: Order) -> Outcome:
    manifest = staged(order.work)
    folder = order.work / "rehearsal.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    (folder / "run").mkdir()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            made, before = runner.run(_rehearse(order, manifest, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    outcome.store(order.work, made, before)
    return made


async def _rehearse(
    order: Order, manifest: Manifest, folder: Path
) -> tuple[Outcome, dict[int, Person]]:
    touched = await asyncio.to_thread(stages.touched, order.work / "stage", manifest)
    touched.check()
    order.step("asking what is there")
    there = await asyncio.to_thread(_seed, order, manifest, touched, folder)
    order.step("sending the import into a scratch directory")
    done = await _send(order, manifest, folder, there.given)
    skip = manifest.options.skip_user_properties_sync
    tables = {skip: done.people, not skip: done.other}
    order.step("comparing")
    alike = [*there.given.alike, *await asyncio.to_thread(_by_contact, order, there, tables[False])]
    return _outcome(order, manifest, touched, there, done, tables, alike), there.given.people


# What is there.


def _seed(order: Order, manifest: Manifest, touched: Touched, folder: Path) -> _There:
    """Learn what is there, and seed the first directory with it."""
    if order.to is not None:
        return _seed_of_server(order, order.to, manifest, touched, folder)
    limits = replace(PROFILES["amplitude"], merges_per_user=0)  # that limit is ours alone
    if order.archive is None:
        nothing = given.nothing(limits, now_ms=order.now_ms)
        _plant(folder, nothing, (), touched, list)
        return _There(nothing)
    with archive.opened(order.archive, folder / "archive") as rows:
        exported = rows.given(touched, limits, now_ms=order.now_ms)
        _plant(folder, exported, rows.tables(), touched, list)
    return _There(exported, archive.UNKNOWN)


def _seed_of_server(
    order: Order, to: Target, manifest: Manifest, touched: Touched, folder: Path
) -> _There:
    given.need_ours(to)
    whole = given.property_time(to, order.keys) != "arrival" or manifest.events <= CHECKED_EVENTS
    asked = Asked(
        device_ids=touched.device_ids,
        user_ids=touched.user_ids,
        rows="whole" if whole else "brief",
    )
    with given.ask(to, order.keys, asked) as answer:
        there = answer.given
        checked = Checked(there)
        rows = checked.watch(answer.rows()) if whole else answer.rows()
        _plant(
            folder,
            there,
            rows,
            touched,
            lambda: _stored_keys(order, to, manifest, touched, there),
        )
    imported = given.import_figures(to, order.keys, manifest.import_id)
    unknown = [PLACES] if there.position.looks_up and touched.addressed else []
    return _There(there, unknown, checked.problems() if whole else [], imported)


def _stored_keys(
    order: Order, to: Target, manifest: Manifest, touched: Touched, there: Given
) -> StoredKeys:
    """Ask which keys are stored that rows of other people hold: of group identifies, and of a scope that is the project's."""
    limits = there.limits
    wanted: Iterator[tuple[str, str]] = iter(("", one) for one in touched.group_insert_ids)
    if limits.dedupe_scope == "project":
        wanted = stages.insert_keys(order.work / "stage", manifest)
    found: StoredKeys = []
    while some := list(islice(wanted, HISTORY_KEYS_MAX)):
        with given.ask(to, order.keys, Asked(insert_keys=some, rows="none")) as answer:
            for at, block in answer.given.known:
                # What came after the position that all else is of does not count.
                if block <= there.position.block:
                    found.append((known_key(limits, *some[at]), block))
    return found


def _plant(
    folder: Path,
    there: Given,
    rows: Iterable[pa.Table],
    touched: Touched,
    more: Callable[[], StoredKeys],
) -> None:
    seed(
        folder / "first",
        KEYS,
        there.start,
        _together(rows),
        contested=touched.insert_ids,
        more=more,
    )


def _together(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put small pieces together, for files that are not too many."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(one.num_rows for one in waiting) >= SEED_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


# The import.


def _clock(there: Given) -> VirtualClock:
    return VirtualClock(max(there.position.now_ms, there.position.server_upload_ms))


async def _send(order: Order, manifest: Manifest, folder: Path, there: Given) -> _Done:
    beside = folder / "second" if there.property_time == "arrival" else None
    if beside is not None:
        await asyncio.to_thread(_plant_beside, folder, beside, there)
    async with opened(folder / "first", beside, _clock(there)) as scratch:
        before = await _days(scratch)
        sent = await scratch.send(
            order.work / "stage",
            manifest,
            order.profile if order.to is not None else _larger(order.profile),
            path=order.path,
            folder=folder / "run",
        )
        moment = await scratch.engine.moment(PROJECT)

        def look() -> _Done:
            with closing(moment), closing(scratch.reader.at(PROJECT, moment.snapshot)) as view:
                people = {one.amplitude_id: one for one in moment.every_person()}
                after, devices = history.days(view), _devices(view, manifest.import_id)
                held = guard.listed(view, [], MERGES_LISTED_MAX, import_id=manifest.import_id)
            beside = _beside(scratch, there)
            some = [Held(one.user_id, one.devices) for one in held]
            return _Done(sent, people, beside, before, after, devices, some)

        return await asyncio.to_thread(look)


def _larger(profile: Profile) -> Profile:
    """Return the profile with larger requests. What they come to does not depend on their size, what they cost does."""
    rates = profile.rates
    size = max(rates.events_per_request, REQUEST_EVENTS)
    return replace(profile, rates=replace(rates, events_per_request=size), connections=16)


def _plant_beside(folder: Path, second: Path, there: Given) -> None:
    """Seed the second directory: the state alone, and the same keys.

    A run keeps within the hourly property updates by itself, so none of them is dropped there.
    """
    limits = {**there.start.settings.limits, "property_updates_per_h": 0}
    settings = replace(there.start.settings, limits=limits)
    seed(second, KEYS, replace(there.start, settings=settings), ())
    if (folder / "first" / "keys").exists():
        shutil.rmtree(second / "keys")
        shutil.copytree(folder / "first" / "keys", second / "keys")


def _beside(scratch: Scratch, there: Given) -> dict[int, Person] | None:
    """Return the people as they are with the other setting."""
    if scratch.beside is None:
        return None
    return there.people | scratch.beside.state.project(PROJECT).people.unsaved()


async def _days(scratch: Scratch) -> Days:
    def look() -> Days:
        with scratch.reader.view(PROJECT) as view:
            return history.days(view)

    return await asyncio.to_thread(look)


def _devices(view: View, import_id: str) -> list[Device]:
    """Return the devices of the import that have several users."""
    source = view.source(
        ("device_id", "user_id", "import_id"),
        where="user_id IS NOT NULL AND device_id IS NOT NULL",
        kinds=(Kind.EVENT, Kind.IDENTIFY),
    )
    statement = Statement()
    name = statement.bind(import_id)
    rows: list[Device] = view.ask(
        f"""
        SELECT device_id, list(user_id ORDER BY user_id)[:{LISTED}], count(*), count(*) FILTER (live)
        FROM (
            SELECT device_id, user_id, bool_or(import_id IS DISTINCT FROM {name}) AS live,
                   bool_or(import_id = {name}) AS ours
            FROM {source} GROUP BY ALL
        ) GROUP BY device_id HAVING count(*) > 1 AND bool_or(ours) ORDER BY count(*) DESC, device_id
        """,
        statement,
    ).fetchall()
    return rows


def _by_contact(order: Order, there: _There, people: dict[int, Person] | None) -> list[Alike]:
    """Ask the server who else has a mail address or telephone number of the import's people."""
    if order.to is None or people is None:
        return []
    before = there.given.people
    addresses = {
        address
        for number, one in people.items()
        if one is not before.get(number)
        for _, address in likeness.contacts(one.properties)
    }
    if not addresses:
        return []
    asked = Asked(contacts=sorted(addresses)[:HISTORY_IDS_MAX], rows="none")
    with given.ask(order.to, order.keys, asked) as answer:
        return [one for one in answer.given.alike if one.amplitude_id not in before]


# What it comes to.


def _waiting(planned: Iterable[Throttled], sent: Sent) -> list[Waiting]:
    """Return who has to wait: whom the run holds back by itself, and whom it was told to."""
    found = {(one.kind, one.id): "daily quota" if one.days > 1 else "rate" for one in planned}
    found |= dict.fromkeys(sent.throttled, "rate") | dict.fromkeys(sent.quota, "daily quota")
    return [Waiting(kind, one, why) for (kind, one), why in sorted(found.items())]


def _outcome(  # noqa: PLR0917 - everything that was found, once
    order: Order,
    manifest: Manifest,
    touched: Touched,
    there: _There,
    done: _Done,
    tables: dict[bool, dict[int, Person] | None],
    alike: list[Alike],
) -> Outcome:
    before, after, sent = there.given.people, done.people, done.sent
    planned = plan(
        manifest,
        order.profile,
        destination=order.against,
        stage=order.work / "stage",
        start_s=order.now_ms / 1000,
    )
    new, active = difference.by_day(there.given.days, done.before, done.after)
    merges = difference.merges(before, after)
    kiosk = manifest.options.kiosk_limit
    some = [(device, users, live) for device, users, count, live in done.devices if count <= kiosk]
    doubles = difference.doubles(before, tables[False] or after, set(touched.user_ids), alike, some)
    shared = [one for one in done.devices if one[2] > kiosk]
    waiting = _waiting(planned.throttled, sent)
    position = there.given.position
    synced, skipped = (
        difference.properties(before, people) if people is not None else None
        for people in (tables[False], tables[True])
    )
    return Outcome(
        import_id=manifest.import_id,
        against=order.against,
        kind=order.kind,
        exact=not there.unknown and not there.warnings,
        unknown=there.unknown,
        warnings=there.warnings,
        block=position.block,
        at_ms=position.now_ms,
        sample=manifest.options.sample,
        skip_user_properties_sync=manifest.options.skip_user_properties_sync,
        property_time=there.given.property_time,
        volume=Volume(
            sent.events,
            sent.events - sent.duplicates,
            planned.billed - sum(sent.refused.values()),
            sent.requests if order.to is not None else planned.requests,
            sent.bytes,
            manifest.people,
        ),
        new_users=new,
        active_users=active,
        new_people=difference.new_people(before, after),
        first_seen=difference.first_seen(before, after),
        synced=synced,
        skipped=skipped,
        merged=len(merges),
        merges=merges[:LISTED],
        doubled=len(doubles),
        evidence=difference.evidence(doubles),
        doubles=doubles[:LISTED],
        shared_devices=len(shared),
        shared=[Shared(device, count, live) for device, _, count, live in shared[:LISTED]],
        duplicates=sent.duplicates,
        refused=sent.refused,
        refused_before=manifest.refused,
        throttled=len(waiting),
        waiting=waiting[:LISTED],
        quota_days=max(planned.quota_days, math.ceil(sent.seconds / DAY_S)) if sent.events else 0,
        duration_s=round(max(planned.duration_s, sent.seconds), 3),
        imported_rows=there.imported.rows,
        imported_duplicates=there.imported.duplicates,
        held_users=len(done.held),
        held=done.held[:LISTED],
    )
