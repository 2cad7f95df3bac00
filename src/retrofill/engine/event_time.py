"""Properties by event time: late events are folded again before anybody reads, and the setting is switched.

On arrival an event is folded over what is known then, and if it came too late for that, the fold marks whom it touched
(`core.order`, `ProjectState.late`). Its row is durable and answered like any other. The closure of all marks is folded
again in event time by `rewriting`: after each seal, and when many are marked, while commits go on; and before a reader of
the project is given anything, while they wait, so that nobody is marked then. So readers see what a fold of everything in event time ends in, and never what a late event did on arrival.

A change of history in such a project takes the marks with it that it finds. Late events that come while it is under way
mark whom they touch, in the old state and in what the change makes of it; these marks stay, and are folded again when
it has ended. Who wants to read once one has come waits for all of that.

The switch folds the whole project the other way. Blocks after its swap are folded so; the setting follows when the
checkpoint has.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from retrofill.core.person import Person
from retrofill.engine.admission import ProjectSettings, PropertyTime
from retrofill.engine.change import Intent
from retrofill.engine.refold import Rule, Seed
from retrofill.engine.rewriting import Rewriting
from retrofill.engine.state import State
from retrofill.errors import StoreError

T = TypeVar("T")


class Host(Protocol):
    """What is needed of the engine."""

    state: State
    committing: asyncio.Lock

    def person(self, project: int, amplitude_id: int) -> Person | None:
        """Return a person's state as of the last acknowledged block."""

    def settings(self, number: int) -> ProjectSettings:
        """Return what the operator set for a project."""

    def set_settings(self, number: int, settings: ProjectSettings) -> None:
        """Store what the operator sets for a project."""


class EventTime:
    """Projects whose properties go by event time. Belongs to the loop; what readers ask may be asked in any thread."""

    def __init__(self, rewriting: Rewriting, host: Host, may_change: Callable[[], None]) -> None:
        self._rewriting = rewriting
        self._host = host
        self._may_change = may_change
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: Counter[int] = Counter()  # switches that wait or are under way, by project
        rewriting.kinds["late"] = self._settled
        rewriting.kinds["property_time"] = self._switched

    def start(self) -> None:
        """Remember the loop, for readers in other threads."""
        self._loop = asyncio.get_running_loop()

    async def settle(self, project: int) -> None:
        """Fold again whom late events have marked so far. Raises StoreError: then the next start ends it."""
        if self.late_since(project):
            self._may_change()
            await self._rewriting.whole(self._settle(project, self._host.state.block))

    async def settle_beside(self, project: int) -> None:
        """As `settle`, while commits go on: whom late events mark meanwhile stays marked, so no reader can wait for that."""
        if self.late_since(project):
            self._may_change()
            last = self._host.state.block
            await self._rewriting.whole(self._settle(project, last, beside=True))

    @property
    def waits(self) -> bool:
        """Whether a change of history is under way, which nobody can be folded again before."""
        return self._rewriting.busy

    async def settle_held(self, project: int) -> None:
        """As `settle`; the caller is `alone`, and commits wait for it: when this returns nobody is marked."""
        if self.late_since(project):
            await self._rewriting.run(_late(project), held=True)

    async def switch(self, project: int, to: PropertyTime) -> None:
        """Fold a project in the other order; it is done when this returns. Again it changes nothing.

        Raises StoreError: it was never begun, or the next start ends it.
        """
        self._may_change()
        self._asked[project] += 1
        await self._rewriting.whole(self._in_turn(project, to))

    def asked(self, project: int) -> bool:
        """Say whether a switch of a project waits or is under way: who asks now has the last word."""
        return self._asked[project] > 0

    def switching(self, project: int) -> bool:
        """Say whether a switch of a project is begun and not ended: then the setting is not what it will be. Any thread."""
        return any(number == project for number, _to in self._rewriting.begun(["property_time"]))

    def late_since(self, project: int) -> int:
        """Return the first block whose late events are not folded again yet, 0 if there is none."""
        return self._host.state.project(project).late_since

    def settles(self, project: int) -> int:
        """Return how often a project's rows were changed since the start, so that a reader sees whether they were."""
        return self._host.state.project(project).settled_times

    def settle_first(self, project: int) -> None:
        """As `settle`, for a reader's thread, which waits. Raises StoreError."""
        self._await(lambda: self.settle(project))

    def settled_person(self, project: int, amplitude_id: int) -> Person | None:
        """Return a person's state at a moment when nobody is marked, for a reader's thread. Raises StoreError."""
        return self._await(
            lambda: self._rewriting.whole(self._settled_person(project, amplitude_id))
        )

    def _await(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        loop = self._loop
        if loop is None or not loop.is_running():
            raise StoreError("The server is not running", mend="Ask again when it is")
        return asyncio.run_coroutine_threadsafe(ask(), loop).result()

    async def _settled_person(self, project: int, amplitude_id: int) -> Person | None:
        async with self._rewriting.alone(), self._host.committing:
            await self.settle_held(project)
            return self._host.person(project, amplitude_id)

    async def _settle(self, project: int, last: int, *, beside: bool = False) -> None:
        async with self._rewriting.alone():
            # What came while this waited is for those who ask later: else each of many readers would fold again.
            if 0 < self.late_since(project) <= last:
                await self._rewriting.run(_late(project), beside=beside)

    async def _settled(self, _intent: Intent, _block: int) -> None:
        """Nothing is left to do: the state says by itself that nobody is marked."""

    async def _in_turn(self, project: int, to: PropertyTime) -> None:
        try:
            await self._switch(project, to)
        finally:
            self._asked[project] -= 1

    async def _switch(self, project: int, to: PropertyTime) -> None:
        async with self._rewriting.alone():
            if self._host.settings(project).property_time != to:
                rule = Rule(by_time=to == "event")
                intent = Intent(project, "property_time", to, Seed(whole=True), rule)
                await self._rewriting.run(intent)

    async def _switched(self, intent: Intent, _block: int) -> None:
        to: PropertyTime = "event" if intent.argument == "event" else "arrival"
        settings = replace(self._host.settings(intent.project), property_time=to)
        self._host.set_settings(intent.project, settings)


def _late(project: int) -> Intent:
    return Intent(project, "late", "", Seed(), Rule())
