"""Taking a merge back: both people are folded again as if the event had not shown them to be one, and stay two.

What is barred is the pair of ids that proved it, the event's device and user: whoever was anonymous on that device is not
this user. So it is not merged by any later event with the same two ids either, live or in any later fold, whatever
becomes of the event itself (decision 0013). It can be lifted, by the same way: then both are folded again as if nothing
had been taken back. The bar is stored once everything is folded, in the last step before the
intent goes: until then a start folds the blocks after the checkpoint as they were folded, and then does all of it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from retrofill.clock import Clock
from retrofill.core import row as row_of
from retrofill.core.block import Kind
from retrofill.engine.change import Intent
from retrofill.engine.query import Statement, View
from retrofill.engine.refold import Rule, Seed
from retrofill.engine.rewriting import Rewriting
from retrofill.engine.state import State
from retrofill.errors import MissingError
from retrofill.hot.sqlite import Bar, Projects
from retrofill.lake import Lake

_decode = msgspec.json.Decoder(Bar).decode
_KINDS = (Kind.EVENT, Kind.IDENTIFY, Kind.GROUP_IDENTIFY)
_COLUMNS = (
    *("project", "partition", "block", "row", "user_id", "device_id", "event_type", "insert_id"),
    *("event_time", "server_upload_time", "import_id"),
)
STATES = ("merged", "unmerged")


def pairs(barred: Iterable[Bar]) -> frozenset[tuple[str, str]]:
    """Return the (device, user) of merges taken back, as the fold wants them."""
    return frozenset((one.device_id, one.user_id) for one in barred)


class Host(Protocol):
    """What is needed of the engine."""

    lake: Lake
    state: State
    projects_store: Projects

    async def seal(self) -> None:
        """Move every block committed so far into the lake."""


class Unmerging:
    """Merges of one engine, taken back."""

    def __init__(self, rewriting: Rewriting, host: Host, clock: Clock) -> None:
        self._rewriting = rewriting
        self._host = host
        self._clock = clock
        rewriting.kinds["unmerge"] = self._unmerged
        rewriting.kinds["remerge"] = self._remerged

    async def unmerge(self, project: int, block: int, row: int) -> Bar:
        """Take back the merge at a position. Raises MissingError if there is none, and none was."""
        async with self._rewriting.alone():
            done = self._known(project, block, row)
            if done is not None:
                return done
            await self._host.seal()
            bar = await asyncio.to_thread(self._found, project, block, row)
            await self._rewriting.run(
                Intent(
                    project,
                    "unmerge",
                    msgspec.json.encode(bar).decode(),
                    Seed(people=[bar.absorbed, bar.surviving]),
                    Rule(barred=[(bar.device_id, bar.user_id)]),
                )
            )
            return bar

    async def restore(self, project: int, block: int, row: int) -> Bar:
        """Lift the bar of a merge taken back at a position. Raises MissingError if there is no merge, and was none.

        Whoever is shown to be one by these two ids is merged then, in what is stored and from now on.
        """
        async with self._rewriting.alone():
            bar = self._known(project, block, row)
            if bar is None:
                await self._host.seal()
                return await asyncio.to_thread(self._found, project, block, row)
            ids = (bar.device_id, bar.user_id)
            now = self._host.state.project(project).owners([ids[0]], [ids[1]])
            await self._rewriting.run(
                Intent(
                    project,
                    "remerge",
                    msgspec.json.encode(bar).decode(),
                    Seed(people=sorted({bar.absorbed, bar.surviving, *now})),
                    Rule(lifted=[ids]),
                )
            )
            return bar

    def _known(self, project: int, block: int, row: int) -> Bar | None:
        barred = self._host.projects_store.barred(project)
        return next((one for one in barred if (one.block, one.row) == (block, row)), None)

    def _found(self, project: int, block: int, row: int) -> Bar:
        with self._host.lake.snapshot() as snapshot:
            found = snapshot.cursor.execute(
                "SELECT m.absorbed, m.surviving, e.device_id, e.user_id FROM lake.merges m, lake.events e "
                'WHERE m.project = $1 AND m."block" = $2 AND m."row" = $3 '
                'AND e.project = $1 AND e."block" = $2 AND e."row" = $3',
                [project, block, row],
            ).fetchall()
        if not found:
            raise MissingError("There is no such merge", where=f"{block}-{row}")
        absorbed, surviving, device, user = found[0]
        return Bar(block, row, absorbed, surviving, device, user, self._clock.now_ms())

    async def _unmerged(self, intent: Intent, _block: int) -> None:
        self._host.projects_store.bar(intent.project, _decode(intent.argument))
        self._follow(intent.project)

    async def _remerged(self, intent: Intent, _block: int) -> None:
        bar = _decode(intent.argument)
        self._host.projects_store.unbar(intent.project, bar.device_id, bar.user_id)
        self._follow(intent.project)

    def _follow(self, project: int) -> None:
        barred = self._host.projects_store.barred(project)
        self._host.state.project(project).barred = pairs(barred)


# The list.


class Asked(Struct, frozen=True):
    """Which merges. person: that was absorbed or that survived, 0 for all. before: a position, those before it alone."""

    state: str = "merged"
    person: int = 0
    before: tuple[int, int] | None = None
    limit: int = 100


def of(asked: Asked, person: int) -> Asked:
    """Ask the same of one person."""
    return replace(asked, person=person)


class Listed(Struct, frozen=True):
    """A merge. id: the position of the event that proved it. Times in ms; unmerged_ms: None while it stands."""

    id: str
    state: str
    absorbed: int
    surviving: int
    user_id: str | None
    device_id: str | None
    uuid: str
    event_type: str | None
    insert_id: str | None
    event_time_ms: int | None
    server_upload_time_ms: int | None
    imported_by: str | None
    unmerged_ms: int | None


def listed(view: View, barred: list[Bar], asked: Asked) -> list[Listed]:
    """Return merges, the newest first."""
    if asked.state == "unmerged":
        found = [(one.block, one.row, one.absorbed, one.surviving) for one in barred]
    else:
        found = [*_sealed(view, asked), *view.placed_merges()]
    person, before = asked.person, asked.before
    chosen = sorted(
        (
            one
            for one in found
            if (not person or person in one[2:]) and (before is None or one[:2] < before)
        ),
        reverse=True,
    )[: asked.limit]
    events = _events(view, [one[:2] for one in chosen])
    unmerged = {(one.block, one.row): one for one in barred}
    return [_listed(view, one, events, unmerged.get(one[:2])) for one in chosen]


def _sealed(view: View, asked: Asked) -> list[tuple[int, int, int, int]]:
    statement = Statement()
    where = f"project = {int(view.project)}"
    if asked.person:
        one = statement.bind(asked.person)
        where += f" AND (absorbed = {one} OR surviving = {one})"
    if asked.before is not None:
        block, row = asked.before
        where += f' AND ("block" < {int(block)} OR ("block" = {int(block)} AND "row" < {int(row)}))'
    rows: list[tuple[int, int, int, int]] = view.ask(
        f'SELECT "block", "row", absorbed, surviving FROM lake.merges WHERE {where} '
        f'ORDER BY "block" DESC, "row" DESC LIMIT {int(asked.limit)}',
        statement,
    ).fetchall()
    return rows


def _events(view: View, places: list[tuple[int, int]]) -> dict[tuple[int, int], dict[str, Any]]:
    """Return what is told of the events at these positions."""
    if not places:
        return {}
    text = ", ".join(f"({int(block)}, {int(row)})" for block, row in places)
    source = view.source(_COLUMNS, where=f'("block", "row") IN ({text})', kinds=_KINDS)
    rows = view.ask(f"SELECT * FROM {source}").to_arrow_table().to_pylist()
    return {(row["block"], row["row"]): row for row in rows}


def _listed(
    view: View,
    one: tuple[int, int, int, int],
    events: dict[tuple[int, int], dict[str, Any]],
    bar: Bar | None,
) -> Listed:
    block, row, absorbed, surviving = one
    event = events.get((block, row), {})
    return Listed(
        f"{block}-{row}",
        STATES[bar is not None],
        absorbed,
        surviving,
        bar.user_id if bar else event.get("user_id"),
        bar.device_id if bar else event.get("device_id"),
        row_of.uuid_of(view.project, 0, block, row),
        event.get("event_type"),
        event.get("insert_id"),
        event.get("event_time"),
        event.get("server_upload_time"),
        event.get("import_id"),
        bar.unmerged_ms if bar else None,
    )
