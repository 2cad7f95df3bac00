"""Changing stored history: one operation behind undo, restore and whatever else folds part of it again.

An `Intent` says what shall change: where the closure starts (`Seed`), what the fold does otherwise than on arrival
(`Rule`), and a kind with an argument, for whoever asked. The steps of `run`, in order:

1. the intent is stored: from here on it will be done, by the next start if not by this one;
2. the closure is found and folded again from a pinned snapshot, its rows written as new lake files (`refold`);
3. one lake transaction puts them in the place of the old rows, and memory follows: state, dedupe keys, quotas;
4. the checkpoint is written, the kind's `ended` is told, and the intent is removed.

Commits wait from before 2 until after 4. Readers see what was before, or what is after, never between: lake and memory
change while no reader may begin. `resume` does again at a start what a crash cut off, before anything is committed.

**To build on it.** A kind is registered once, before `resume`: `rewriting.kinds["undo"] = ended`, where `ended(intent,
block)` is awaited when rows of blocks up to `block` are changed and memory and checkpoint have followed. It may be
told twice of one intent, after a crash. Then, holding `alone` (looking and deciding are part of it):

    async with rewriting.alone():
        ... look, raise ConflictError, or make an intent ...
        await rewriting.run(Intent(project, "undo", name, Seed(rows=which), Rule(hide=which)))

Seed and Rule are data, stored with the intent: whatever the fold needs must be in them, nothing may be looked up
anew after a crash. A fold that shall differ in another way (an order other than that of arrival, merges that are
barred) gets a field in `Rule` and a place in `refold`. What shall hold for every later fold of the project as well must
be put into the rule of every intent: that is for `Rewriting.told` to add.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from retrofill.engine.duplicates import Duplicates
from retrofill.engine.refold import Refolded, Rule, Seed, refold
from retrofill.engine.state import State
from retrofill.hot.intents import Intents
from retrofill.lake import Lake
from retrofill.limits import Limits

log = structlog.get_logger()

T = TypeVar("T")


class Intent(Struct, frozen=True):
    """What shall change in one project. kind, argument: for whom, as `kinds` knows it, and what it wants to know then."""

    project: int
    kind: str
    argument: str
    seed: Seed
    rule: Rule


Ended = Callable[[Intent, int], Awaitable[None]]
_decode = msgspec.json.Decoder(Intent).decode


class Host(Protocol):
    """What is needed of the engine."""

    lake: Lake
    state: State
    duplicates: Duplicates
    committing: asyncio.Lock
    saving: asyncio.Lock

    def limits(self, number: int) -> Limits:
        """Return the limits of a project."""

    def oldest_block(self) -> int:
        """Return the first block that a dedupe window still reaches."""

    def count_quota(self, project: int) -> None:
        """Count the daily quota of a project anew, from the lake."""

    async def seal(self) -> None:
        """Move every block committed so far into the lake."""

    async def checkpoint(self) -> None:
        """Save the state as of the last block."""

    def fail(self, problem: BaseException) -> None:
        """Refuse all work from now on."""


class Rewriting:
    """Changes of the stored history of one engine, one at a time. Belongs to its loop."""

    def __init__(self, host: Host, intents: Intents) -> None:
        self._host = host
        self._intents = intents
        self._one = asyncio.Lock()
        self.kinds: dict[str, Ended] = {}
        self._asked: set[asyncio.Task[Any]] = set()

    async def whole(self, change: Coroutine[Any, Any, T]) -> T:
        """Do what was asked from outside to its end, also when whoever asked has gone."""
        task = asyncio.create_task(change)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        return await asyncio.shield(task)

    async def ended(self, *, abandon: bool = False) -> None:
        """Wait for what was asked for; abandon: stop it where it stands."""
        asked = list(self._asked)
        for task in asked:
            if abandon:
                task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Let nobody else change rows in the lake meanwhile. Taken before every other lock."""
        async with self._one:
            yield

    def told(self, intent: Intent) -> tuple[Seed, Rule]:
        """Return seed and rule of an intent with whatever holds for every fold of its project.

        Where properties go by event time every fold does, and takes those with it whom late events have marked: the
        state says who they are, after a crash too. A merge that was taken back stays barred in every fold.
        """
        state, seed, rule = self._host.state.project(intent.project), intent.seed, intent.rule
        rule = replace(rule, barred=sorted({*rule.barred, *state.barred}))
        if state.by_time:
            people = [one for one in state.late if isinstance(one, int)]
            groups = [one[1:] for one in state.late if not isinstance(one, int)]
            seed = replace(seed, people=seed.people + people, groups=seed.groups + groups)
            if intent.kind != "property_time":
                rule = replace(rule, by_time=True)
        return seed, rule

    async def run(self, intent: Intent, *, begun: Callable[[], None] = lambda: None) -> None:
        """Do what an intent says, whole; the caller is `alone`.

        begun: called in a thread once the intent is stored; a crash may leave it out.
        Raises StoreError: it was never begun, or the next start ends it.
        """
        assert self._one.locked()
        assert intent.kind in self.kinds
        number = await asyncio.to_thread(self._intents.add, msgspec.json.encode(intent))
        await asyncio.to_thread(begun)
        await self._do(number, intent, again=False)

    async def resume(self) -> None:
        """End what a crash cut off. Nothing is committed meanwhile, and nothing is asked."""
        async with self.alone():
            for number, stored in await asyncio.to_thread(self._intents.all):
                await self._do(number, _decode(stored), again=True)

    async def _do(self, number: int, intent: Intent, *, again: bool) -> None:
        host = self._host
        try:
            async with host.committing:
                await host.seal()
                seed, rule = self.told(intent)
                made = await asyncio.to_thread(
                    refold,
                    host.lake,
                    intent.project,
                    seed,
                    rule,
                    limits=host.limits(intent.project),
                    new_id=host.state.draw,
                    again=again,
                )
                if made is not None:
                    async with host.saving:
                        await asyncio.to_thread(self._adopt, intent.project, made)
                host.state.in_time(intent.project)
                block = host.state.block
                await host.checkpoint()
                await self.kinds[intent.kind](intent, block)
                await asyncio.to_thread(self._intents.remove, number)
        except BaseException as problem:
            host.fail(problem)  # memory may be behind the lake: the next start ends it
            raise
        log.info("history_changed", kind=intent.kind, rows=made.rows if made else 0)

    def _adopt(self, project: int, made: Refolded) -> None:
        """Let the lake, and memory with it, be as the fold made them."""
        host = self._host
        with host.lake.held():
            host.lake.rewrite(
                project, made.files, places=made.places, people=made.people, merges=made.merges
            )
            host.state.replace(project, made.changes)
        host.duplicates.change(
            made.gone,
            made.added,
            host.limits(project),
            sealed=host.state.block,
            oldest_block=host.oldest_block(),
        )
        host.count_quota(project)
