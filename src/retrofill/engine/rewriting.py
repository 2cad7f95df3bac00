"""Changing stored history: one operation behind undo, restore and whatever else folds part of it again.

An `Intent` says what shall change: where the closure starts (`Seed`), what the fold does otherwise than on arrival
(`Rule`), and a kind with an argument, for whoever asked. The steps, with the numbers of docs/storage.md:

1. the intent is stored: from here on it will be done, by the next start if not by this one;
2. beside the traffic: a child process (`engine.refolder`) finds the closure and folds it again from a pinned snapshot,
   then what was sealed since, and so on until little is left; it writes lake files, key files and the values of state.
   Then sealing rests, and a lake transaction is opened that takes the old rows out and puts the new files in, while the
   child goes on with blocks that no lake file has yet. Where events arrive faster than they are folded, blocks are put
   off (`engine.pace`), so that each time around less is left;
3. commits pause: the last blocks are folded, few by now, and the transaction commits;
4. memory follows: state before any reader can begin, dedupe keys and quotas before the next commit. Commits go on.
   The checkpoint is written, the kind's `ended` is told, and the intent is removed.

Until 3 readers keep the old rows and the old state. The transaction holds a row `rewritten(intent, block)`: an intent
that has one is ended by a start from the files of values, which are on disk before (`redo`); one that has none begins
again at 2.

**To build on it.** A kind is registered once, before `resume`: `rewriting.kinds["undo"] = ended`, where `ended(intent,
block)` is awaited when rows of blocks up to `block` are changed and memory and checkpoint have followed. It may be
told twice of one intent, after a crash. Then, holding `alone` (looking and deciding are part of it):

    async with rewriting.alone():
        ... look, raise ConflictError, or make an intent ...
        await rewriting.run(Intent(project, "undo", name, Seed(rows=which), Rule(hide=which)))

Seed and Rule are data, stored with the intent and sent to the child: whatever the fold needs must be in them, nothing
may be looked up anew after a crash. A fold that shall differ in another way (an order other than that of arrival, merges
that are barred) gets a field in `Rule` and a place in `refold.Folding`. What shall hold for every later fold of the
project as well must be put into the rule of every intent: that is for `Rewriting.told` to add.

Where properties go by event time, a row that comes meanwhile may belong before others that are folded already. It is
folded as on arrival, over what the change has made of the rest, and marks whom it touches: after the swap these are late
like any other (`engine.event_time`). Late events themselves are folded again while commits wait, by a thread of this
process, which begins sooner than a child. A switch between the orders holds from the block after its swap on, for a
start too, though the setting is written later. After an unmerge the next block is folded by another rule: its pause
lasts until the intent is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from retrofill.core.fold import Changes, together
from retrofill.core.order import EVERYBODY
from retrofill.engine.change import CHANGES_RULE, Change, Host, Intent
from retrofill.engine.refold import Rule, Seed
from retrofill.engine.refolder import Refolder, ThreadRefolder, read_changes
from retrofill.errors import ConflictError, CorruptError, StoreError
from retrofill.hot.intents import Intents, Tried
from retrofill.lake.files import Files
from retrofill.limits import REFOLD_TRIES_MAX

log = structlog.get_logger()

T = TypeVar("T")

Ended = Callable[[Intent, int], Awaitable[None]]
# Forgotten if they fail, since who asks again begins anew.
_FORGOTTEN = ("property_time", *CHANGES_RULE)
_decode = msgspec.json.Decoder(Intent).decode


class Redone(Struct, frozen=True):
    """What memory must take of a change that is in the lake: see `State.replace`."""

    project: int
    changes: Changes
    settled: int
    by_time: bool | None


class Rewriting:
    """Changes of the stored history of one engine, one at a time. Belongs to its loop.

    folder: where each has a folder while it is under way. refolder: makes who folds for one.
    """

    def __init__(
        self, host: Host, intents: Intents, folder: Path, refolder: Callable[[], Refolder]
    ) -> None:
        self._host = host
        self._intents = intents
        self._folder = folder
        self._refolder = refolder
        self._one = asyncio.Lock()
        self.kinds: dict[str, Ended] = {}
        self._asked: set[asyncio.Task[Any]] = set()
        self._running: Change | None = None
        self._leaving = False

    async def whole(self, change: Coroutine[Any, Any, T]) -> T:
        """Do what was asked from outside to its end, also when whoever asked has gone."""
        task = asyncio.create_task(change)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        return await asyncio.shield(task)

    async def leave(self) -> None:
        """Begin nothing more, and leave what is under way to the next start, unless it is nearly done."""
        self._leaving = True
        if self._running is not None:
            await self._running.leave()

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

    @property
    def busy(self) -> bool:
        """Whether somebody is `alone`."""
        return self._one.locked()

    def told(self, intent: Intent) -> tuple[Seed, Rule]:
        """Return seed and rule of an intent with whatever holds for every fold of its project.

        Where properties go by event time every fold does, and takes those with it whom late events have marked: the
        state says who they are, after a crash too. A merge that was taken back stays barred in every fold, until the bar is lifted.
        """
        state, seed, rule = self._host.state.project(intent.project), intent.seed, intent.rule
        rule = replace(rule, barred=sorted({*rule.barred, *state.barred}.difference(rule.lifted)))
        if state.by_time:
            people = [one for one in state.late if isinstance(one, int)]
            groups = [one[1:] for one in state.late if not isinstance(one, int)]
            seed = replace(
                seed,
                people=seed.people + people,
                groups=seed.groups + groups,
                whole=seed.whole or EVERYBODY in state.late,
            )
            if intent.kind != "property_time":
                rule = replace(rule, by_time=True)
        return seed, rule

    async def run(
        self,
        intent: Intent,
        *,
        begun: Callable[[], None] = lambda: None,
        held: bool = False,
        beside: bool = False,
    ) -> None:
        """Do what an intent says, whole, after those of its project that broke off; the caller is `alone`.

        Nothing of one that broke off is in place, so late events may be folded again before it: readers wait for that.
        begun: called in a thread once the intent is stored; a crash may leave it out. held: commits wait already.
        beside: they need not wait for all of it, though it folds late events again.
        Raises StoreError: it was never begun, or is tried again by the next start. ConflictError: it was called off, or
        one that broke off was tried so often that somebody has to say what shall become of it.
        """
        assert self._one.locked()
        assert intent.kind in self.kinds
        if self._leaving:
            raise StoreError("The server is stopping", mend="Ask again when it has started")
        stored = msgspec.json.encode(intent)
        done = False
        tried = await asyncio.to_thread(self._intents.tried)
        for number, one in await asyncio.to_thread(self._intents.all):
            broken = _decode(one)
            if one == stored or (broken.project == intent.project and intent.kind != "late"):
                if one != stored and self._given_up(number, tried):
                    raise ConflictError(
                        f"The {broken.kind} of {broken.argument} has failed {tried[number].times} times: {tried[number].why}",
                        mend="Call it off or ask for it again first",
                    )
                # Later it would undo what is done now.
                await self._do(number, broken, held=held, beside=beside)
                done |= one == stored
        if not done:
            number = await asyncio.to_thread(self._intents.add, stored)
            await asyncio.to_thread(begun)
            await self._do(number, intent, held=held, beside=beside)

    # One that fails.

    def begun(self, kinds: Sequence[str]) -> dict[tuple[int, str], Tried]:
        """Return how each intent of these kinds fared that is not ended, by project and argument. Any thread."""
        tried, found = self._intents.tried(), {}
        for number, stored in self._intents.all():
            intent = _decode(stored)
            if intent.kind in kinds:
                found[intent.project, intent.argument] = tried.get(number, Tried())
        return found

    @contextlib.asynccontextmanager
    async def called_off(
        self, project: int, kinds: Sequence[str], argument: str
    ) -> AsyncIterator[bool]:
        """Remove an intent that has changed nothing yet, stopped if it is under way; then be `alone`. Gives whether there was one.

        Raises ConflictError if it is in the lake already.
        """

        def meant(intent: Intent) -> bool:
            return (intent.project, intent.argument) == (project, argument) and intent.kind in kinds

        running = self._running
        if running is not None and meant(running.intent):
            await running.stop()
        async with self._one:
            found = False
            for number, stored in await asyncio.to_thread(self._intents.all):
                if meant(_decode(stored)):
                    if await asyncio.to_thread(self._host.lake.rewritten, number) is not None:
                        raise ConflictError(
                            "It is done already", mend="Ask again when it has ended"
                        )
                    await asyncio.to_thread(self._intents.remove, number)
                    found = True
            yield found

    @staticmethod
    def _given_up(number: int, tried: Mapping[int, Tried]) -> bool:
        return tried.get(number, Tried()).times >= REFOLD_TRIES_MAX

    # A start.

    def redo(self) -> dict[int, list[Redone]]:
        """Return what memory must take of changes that are in the lake already, by block.

        To be laid over the state as of that block; of a later one, only how it is folded on. Raises CorruptError.
        """
        found: dict[int, list[Redone]] = {}
        for number, stored in self._intents.all():
            block = self._host.lake.rewritten(number)
            if block is None:
                continue
            paths = sorted(self._scratch(number).glob("changes-*.msgpack"), key=_count_of)
            if not paths:
                raise CorruptError(
                    "The values of a change of history are missing",
                    where=str(self._scratch(number)),
                    mend="Restore the folder from a copy, or run `retrofill check --repair`",
                )
            changes, laid = zip(*map(read_changes, paths), strict=True)
            intent = _decode(stored)
            found.setdefault(block, []).append(
                Redone(intent.project, together(changes), laid[0].settled, intent.switches_to)
            )
        return found

    async def resume(self) -> None:
        """End what a crash cut off: at once what the lake has, and the rest beside the traffic."""
        left = []
        tried = await asyncio.to_thread(self._intents.tried)
        for number, stored in await asyncio.to_thread(self._intents.all):
            block = await asyncio.to_thread(self._host.lake.rewritten, number)
            intent = _decode(stored)
            if block is not None:
                await self._end(number, intent, block)
            elif self._given_up(number, tried) and intent.kind != "late":
                log.error("history_change_given_up", kind=intent.kind, reason=tried[number].why)
                if intent.kind in _FORGOTTEN:
                    await asyncio.to_thread(self._intents.remove, number)
            elif self._waited_for(intent):
                try:
                    await self._do(number, intent)
                except Exception as problem:  # noqa: BLE001 - told; nothing of it is in place
                    self._host.sound()
                    log.warning("history_change_failed", reason=str(problem))
            else:
                left.append((number, intent))
        if left:
            await self._one.acquire()  # before anybody who may ask for the same
            task = asyncio.create_task(self._resume(left))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)

    async def _resume(self, left: list[tuple[int, Intent]]) -> None:
        try:
            for number, intent in left:
                await self._do(number, intent)
        except Exception as problem:  # noqa: BLE001 - told; it is begun again by the next start
            log.warning("history_change_failed", reason=str(problem))
        finally:
            self._one.release()

    # One change.

    def _scratch(self, number: int) -> Path:
        return self._folder / str(number)

    async def _do(
        self, number: int, intent: Intent, *, held: bool = False, beside: bool = False
    ) -> None:
        host = self._host
        host.sound()
        block = await asyncio.to_thread(host.lake.rewritten, number)
        if block is not None:  # its files are all that memory can follow from
            await self._end(number, intent, block)
            return
        await asyncio.to_thread(_made_anew, self._scratch(number))
        if held or (self._waited_for(intent) and not beside):
            if not held:
                await host.seal()  # what is done before, commits need not wait for
            async with contextlib.nullcontext() if held else host.committing:
                await self._change(number, intent, ThreadRefolder(), paused=True)
        else:
            await self._change(number, intent, self._refolder(), paused=False)

    def _waited_for(self, intent: Intent) -> bool:
        """Say whether commits wait for all of a change: nobody is marked after it then, as who reads has to know."""
        return intent.kind == "late"

    async def _change(
        self, number: int, intent: Intent, refolder: Refolder, *, paused: bool
    ) -> None:
        scratch = self._scratch(number)
        await asyncio.to_thread(self._intents.begun, number)
        change = Change(self._host, self._intents, number, intent, scratch, refolder)
        self._running, change.paused = change, paused
        async with change.pause:
            try:
                with ThreadPoolExecutor(1, thread_name_prefix="swap") as change.thread:
                    block = await change.run(*self.told(intent))
            except BaseException as problem:
                if change.committed:
                    self._host.fail(problem)  # the next start ends it
                elif isinstance(problem, Exception):
                    failed = partial(self._failed, number, intent, str(problem))
                    await asyncio.to_thread(failed, put_off=change.put_off)
                raise
            finally:
                self._running = None
                await refolder.stop()
            await self._end(number, intent, block)
        log.info("history_changed", kind=intent.kind, rows=change.rows)

    def _failed(self, number: int, intent: Intent, reason: str, *, put_off: bool) -> None:
        """Nothing of it is in place."""
        if put_off:
            self._intents.put_off(number)
        elif intent.kind in _FORGOTTEN:
            self._intents.remove(number)
        else:
            self._intents.failed(number, reason)

    async def _end(self, number: int, intent: Intent, block: int) -> None:
        try:
            await self._host.checkpoint()
            await self.kinds[intent.kind](intent, block)
            await asyncio.to_thread(self._intents.remove, number)
        except BaseException as problem:
            self._host.fail(problem)  # the next start ends it
            raise
        await asyncio.to_thread(shutil.rmtree, self._scratch(number), ignore_errors=True)


def _made_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    files = Files()
    files.make_folder(folder)
    for one in (folder.parent, folder.parent.parent):
        files.sync_folder(one)


def _count_of(path: Path) -> int:
    return int(path.stem.split("-")[1])
