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

Where properties go by event time, a row that comes later may belong between others: commits wait for all of such a
change, from 2 until the intent is removed, and a thread of this process folds, which begins sooner than a child. A
switch between the orders is such a change as well. After an unmerge the next block is folded by another rule: its pause
lasts until the intent is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import pyarrow.parquet as pq
import structlog
from msgspec import Struct
from msgspec.structs import replace

from retrofill.core.fold import Changes, together
from retrofill.engine.duplicates import Duplicates
from retrofill.engine.pace import Pace
from retrofill.engine.refold import Rule, Seed
from retrofill.engine.refolder import (
    Begin,
    Counts,
    Done,
    Export,
    Laid,
    Pass,
    Refolder,
    Rekey,
    Sources,
    Tail,
    Task,
    ThreadRefolder,
    read_changes,
)
from retrofill.engine.state import State
from retrofill.errors import ConflictError, CorruptError
from retrofill.hot.intents import Intents, Tried
from retrofill.hot.keys import ENDING
from retrofill.lake import Lake, Swap
from retrofill.lake.files import Files
from retrofill.limits import (
    MS_PER_DAY,
    MS_PER_HOUR,
    REFOLD_LOOK_S,
    REFOLD_PASSES_MAX,
    REFOLD_TAIL_MAX,
    REFOLD_TAIL_ROWS,
    REFOLD_TAILS_MAX,
    REFOLD_TRIES_MAX,
    Limits,
)

log = structlog.get_logger()

T = TypeVar("T")

_IDS_AT_ONCE = 1000  # looked up before others have their turn

# What the next block is folded by changes with these, in `ended`: no block may come before it. If they fail they are
# forgotten, since who asks again begins anew.
_CHANGES_RULE = ("property_time", "unmerge")


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
    """What is needed of the engine. sealing, saving, committing: taken in this order."""

    lake: Lake
    state: State
    duplicates: Duplicates
    pace: Pace
    sealing: asyncio.Lock
    saving: asyncio.Lock
    committing: asyncio.Lock

    @property
    def blocks_path(self) -> Path:
        """The hot store, whose blocks others may read."""

    @property
    def arrived_rows(self) -> int:
        """How many rows were committed since the start."""

    @property
    def unsealed_rows(self) -> int:
        """How many of them are in no lake file."""

    def unsealed_after(self, block: int, rows_max: int) -> tuple[int, int]:
        """Return the last of the unsealed blocks after one that hold so many rows at most, or the first; and their rows.

        The block itself, and 0, if there is none.
        """

    def limits(self, number: int) -> Limits:
        """Return the limits of a project."""

    def count_stored_again(self, project: int, devices: Counts, users: Counts) -> None:
        """So many rows more, or less, count for the daily quota of these ids: by (hour, id)."""

    async def seal(self) -> None:
        """Move every block committed so far into the lake."""

    def compaction_rests(self) -> AbstractContextManager[None]:
        """Begin no compaction meanwhile."""

    def sound(self) -> None:
        """Raise StoreError if nobody knows what is on disk."""

    async def sealed(self, first: int, last: int) -> None:
        """Let go of blocks that the lake has now; the caller holds `sealing`."""

    async def checkpoint(self) -> None:
        """Save the state as of the last block."""

    def fail(self, problem: BaseException) -> None:
        """Refuse all work from now on."""


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
        self._running: _Change | None = None

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

    async def run(
        self, intent: Intent, *, begun: Callable[[], None] = lambda: None, held: bool = False
    ) -> None:
        """Do what an intent says, whole, after those of its project that broke off; the caller is `alone`.

        Nothing of one that broke off is in place, so late events may be folded again before it: readers wait for that.
        begun: called in a thread once the intent is stored; a crash may leave it out. held: commits wait already.
        Raises StoreError: it was never begun, or is tried again by the next start. ConflictError: it was called off, or
        one that broke off was tried so often that somebody has to say what shall become of it.
        """
        assert self._one.locked()
        assert intent.kind in self.kinds
        stored = msgspec.json.encode(intent)
        done = False
        tried = await asyncio.to_thread(self._intents.tried)
        for number, one in await asyncio.to_thread(self._intents.all):
            broken = _decode(one)
            if one == stored or (broken.project == intent.project and intent.kind != "late"):
                if one != stored and self._given_up(number, tried):
                    raise ConflictError(
                        f"The {broken.kind} of {broken.argument} has failed {tried[number].times} times: "
                        f"{tried[number].reason or 'the server stopped each time'}",
                        mend="Call it off or ask for it again first",
                    )
                await self._do(number, broken, held=held)  # later it would undo what is done now
                done |= one == stored
        if not done:
            number = await asyncio.to_thread(self._intents.add, stored)
            await asyncio.to_thread(begun)
            await self._do(number, intent, held=held)

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

    def redo(self) -> dict[int, list[tuple[int, Changes]]]:
        """Return what memory must take of changes that are in the lake already: by block, project and values.

        To be laid over the state as of that block, if it is no later than that. Raises CorruptError.
        """
        found: dict[int, list[tuple[int, Changes]]] = {}
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
            whole = together([read_changes(path)[0] for path in paths])
            found.setdefault(block, []).append((_decode(stored).project, whole))
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
                log.error("history_change_given_up", kind=intent.kind, reason=tried[number].reason)
                if intent.kind in _CHANGES_RULE:
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

    async def _do(self, number: int, intent: Intent, *, held: bool = False) -> None:
        host = self._host
        host.sound()
        block = await asyncio.to_thread(host.lake.rewritten, number)
        if block is not None:  # its files are all that memory can follow from
            await self._end(number, intent, block)
            return
        await asyncio.to_thread(_made_anew, self._scratch(number))
        if held or self._waited_for(intent):
            async with contextlib.nullcontext() if held else host.committing:
                await self._change(number, intent, ThreadRefolder(), paused=True)
        else:
            await self._change(number, intent, self._refolder(), paused=False)

    def _waited_for(self, intent: Intent) -> bool:
        """Say whether commits wait for all of a change."""
        by_time = self._host.state.project(intent.project).by_time
        return by_time or intent.kind == "property_time"

    async def _change(
        self, number: int, intent: Intent, refolder: Refolder, *, paused: bool
    ) -> None:
        scratch = self._scratch(number)
        await asyncio.to_thread(self._intents.begun, number)
        change = _Change(self._host, self._intents, number, intent, scratch, refolder)
        self._running, change.paused = change, paused
        async with change.pause:
            try:
                with ThreadPoolExecutor(1, thread_name_prefix="swap") as change.thread:
                    block = await change.run(*self.told(intent))
            except BaseException as problem:
                if change.committed:
                    self._host.fail(problem)  # the next start ends it
                elif isinstance(problem, Exception):
                    await asyncio.to_thread(self._failed, number, intent, str(problem))
                raise
            finally:
                self._running = None
                await refolder.stop()
            await self._end(number, intent, block)
        log.info("history_changed", kind=intent.kind, rows=change.rows)

    def _failed(self, number: int, intent: Intent, reason: str) -> None:
        """Nothing of it is in place."""
        if intent.kind in _CHANGES_RULE:
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


class _Change:
    """One change, from the closure to the swap."""

    def __init__(
        self,
        host: Host,
        intents: Intents,
        number: int,
        intent: Intent,
        scratch: Path,
        refolder: Refolder,
    ) -> None:
        self._host = host
        self._intents = intents
        self._number = number
        self.intent = intent
        self._called_off = self._decided = False
        self._scratch = scratch
        self._refolder = refolder
        self.thread: ThreadPoolExecutor
        self.paused = False
        self.pause = contextlib.AsyncExitStack()  # ends it
        self.committed = False
        self._pins = contextlib.ExitStack()
        self._pinned = 0
        self._until = 0  # everything up to this block is folded
        self._arrived = 0  # rows, when that was pinned
        self._tailed = 0  # rows of blocks folded since sealing rests
        self._steps: list[asyncio.Future[Any]] = []  # of the lake transaction, in order
        self._ids_left = 0
        self._nodes = 0
        self._files: list[Path] = []
        self._places: list[Path] = []
        self.rows = 0

    async def run(self, seed: Seed, rule: Rule) -> int:
        """Do all of it; return the last block whose rows are changed, memory and lake alike."""
        host = self._host
        try:
            # What one under way makes of rows that are changed here is not taken into the lake.
            with host.compaction_rests():
                await host.seal()
                self._arrived = host.arrived_rows - host.unsealed_rows
                began = time.perf_counter()
                sources = await self._begin(seed, rule)
                await self._fold(sources)
                rows = sum(file.rows for file in sources.files)
                host.pace.follow(rows, time.perf_counter() - began)
                for _ in range(REFOLD_PASSES_MAX):
                    if self._behind <= REFOLD_TAIL_ROWS:
                        break
                    began, arrived = time.perf_counter(), self._arrived
                    await host.seal()
                    await self._pass()
                    host.pace.follow(self._arrived - arrived, time.perf_counter() - began)
                async with host.sealing:
                    return await self._swap()
        finally:
            host.pace.end()
            self._pins.close()  # the last ones: each pass has others

    @property
    def _lasts(self) -> bool:
        """Whether the pause lasts until the intent is removed."""
        return self.intent.kind in _CHANGES_RULE

    @property
    def _behind(self) -> int:
        """How many rows have come since the last pass."""
        return self._host.arrived_rows - self._arrived

    async def stop(self) -> None:
        """Let it end where it stands, with a ConflictError. Raises one if it is too late for that."""
        if self._decided:
            raise ConflictError("It is nearly done", mend="Ask again when it has ended")
        self._called_off = True
        await self._refolder.interrupt()

    def _still_wanted(self) -> None:
        if self._called_off:
            raise ConflictError("It was called off, nothing has changed")

    async def _ask(self, task: Task) -> Done:
        """Have a task done, unless the change was called off."""
        self._still_wanted()
        try:
            return await self._refolder.ask(task)
        finally:
            self._still_wanted()

    # Beside the traffic.

    async def _begin(self, seed: Seed, rule: Rule) -> Sources:
        sources = await asyncio.to_thread(self._pin)
        begun = await self._ask(
            Begin(
                self.intent.project,
                seed,
                rule,
                self._host.limits(self.intent.project),
                sources,
                self._host.lake.events,
                self._scratch,
                self._host.state.server_upload_ms - MS_PER_DAY - MS_PER_HOUR,
            )
        )
        self._nodes = begun.nodes
        return sources

    def _pin(self) -> Sources:
        """Pin the lake as it is now, and let go of the pin before."""
        with contextlib.ExitStack() as pins:
            snapshot = pins.enter_context(self._host.lake.snapshot())
            merges = self._scratch / f"known-{snapshot.sealed}.parquet"
            snapshot.cursor.execute(
                f"COPY (SELECT absorbed, surviving FROM lake.merges WHERE project = {self.intent.project}) "
                f"TO '{_quoted(merges)}' (FORMAT parquet)"
            )
            sources = Sources(snapshot.files(), merges)
            before, self._pins = self._pins, pins.pop_all()
            before.close()
        self._pinned = snapshot.sealed
        return sources

    async def _pass(self) -> None:
        """Fold what was sealed since the last pass."""
        sources = await asyncio.to_thread(self._pin)
        if self._pinned > self._until:
            await self._fold(sources)

    async def _fold(self, sources: Sources) -> None:
        """Fold what a snapshot has since the last one."""
        host = self._host
        arrived = host.arrived_rows - host.unsealed_rows
        ids = await self._reserved(2 * self._nodes + self._behind + REFOLD_TAIL_ROWS)
        done = await self._ask(Pass(sources, self._until, self._pinned, ids))
        self._take(done)
        self._files += done.files
        if done.places is not None:
            self._places.append(done.places)
        self._until, self._arrived = self._pinned, arrived

    async def _reserved(self, wanted: int) -> tuple[int, int]:
        """Set aside amplitude_ids, so that so many are left for the child."""
        more = wanted - self._ids_left
        if more <= 0:
            return 1, 0
        async with self._between_commits():
            return await self._reserve(more)

    @contextlib.asynccontextmanager
    async def _between_commits(self) -> AsyncIterator[None]:
        if self.paused:
            yield
        else:
            async with self._host.committing:
                yield

    async def _reserve(self, count: int) -> tuple[int, int]:
        """Set aside amplitude_ids between two commits."""
        state = self._host.state
        first = state.fresh
        await asyncio.to_thread(self._intents.reserve, state.block, first + count)
        state.fresh = first + count
        return first, first + count - 1

    def _take(self, done: Done) -> None:
        self._ids_left = done.ids_left
        self._nodes = done.nodes
        self.rows += done.rows

    def _in_swap(self, step: Callable[..., T], *values: Any, **named: Any) -> asyncio.Future[T]:
        """Have a step of the lake transaction done, after those before, in the one thread that does."""
        run = partial(step, *values, **named)
        return asyncio.get_running_loop().run_in_executor(self.thread, run)

    def _then(self, step: Callable[..., Any], *values: Any, **named: Any) -> None:
        """As `_in_swap`, and hear of it by `_done`."""
        self._steps.append(self._in_swap(step, *values, **named))

    async def _done(self, *, every: bool = True) -> None:
        """Wait for all steps, or look whether one has failed. Raises what it raised."""
        if every and self._steps:
            await asyncio.wait(self._steps)
        while self._steps and self._steps[0].done():
            self._steps.pop(0).result()

    async def _swap(self) -> int:
        host = self._host
        await self._pass()  # what was sealed before sealing came to rest
        rekeyed = await self._ask(
            Rekey(host.duplicates.folder, host.duplicates.files(), f"{ENDING}{self._number}")
        )
        first = self._until + 1
        exported = await self._ask(Export())
        changed = [await self._exported(exported)]
        await self._fingerprints(rekeyed)
        swap = await self._in_swap(host.lake.swap_history)
        try:
            self._then(self._replace, swap, exported)
            await self._catch_up(swap)
            if self._lasts:
                await host.checkpoint()  # little is left for the one inside the pause
            async with host.saving:  # a checkpoint under way would have more come meanwhile
                await self._catch_up(swap)
                changed.append(await self._export(swap))
                await self._at_hand(changed)
                await self._catch_up(swap)
                await self._tail(swap)  # while it is folded fewer come
                if not self.paused:
                    await self.pause.enter_async_context(host.committing)
                    self.paused = True
                await self._pause(swap, changed, rekeyed)
                if not self._lasts:
                    await self.pause.aclose()
            await host.sealed(first, self._until)
        finally:
            await asyncio.gather(*self._steps, return_exceptions=True)
            await self._in_swap(swap.close)
        return self._until

    def _replace(self, swap: Swap, exported: Done) -> None:
        for places in self._places:
            swap.take_out(self.intent.project, places)
        swap.put_in(self._files)
        swap.merge(self.intent.project, without=exported.people, add=exported.merges)
        swap.sync()

    async def _catch_up(self, swap: Swap) -> None:
        """Fold the blocks that came since, until few are left and the transaction has what was handed to it."""
        tails = 0
        while True:
            await self._done(every=False)
            left = self._host.unsealed_rows - self._tailed
            if left > REFOLD_TAIL_ROWS and tails < REFOLD_TAILS_MAX:
                await self._tail(swap)
                tails += 1
            elif self._steps:
                await asyncio.wait(self._steps[-1:], timeout=REFOLD_LOOK_S)
            else:
                return

    async def _at_hand(self, changed: list[tuple[Changes, Laid]]) -> None:
        """Have in memory who owns these ids: in the pause they would be read one after another."""
        state = self._host.state.project(self.intent.project)
        for changes, _ in changed:
            for shelf, ids in ((state.devices, changes.devices), (state.users, changes.users)):
                every = list(ids)
                for at in range(0, len(every), _IDS_AT_ONCE):
                    shelf.want(every[at : at + _IDS_AT_ONCE])
                    await asyncio.sleep(0)

    async def _export(self, swap: Swap) -> tuple[Changes, Laid]:
        """Have what has changed since the last export, its merges in the transaction."""
        done = await self._ask(Export())
        self._then(swap.merge, self.intent.project, without=done.people, add=done.merges)
        return await self._exported(done)

    async def _exported(self, done: Done) -> tuple[Changes, Laid]:
        assert done.changes is not None
        return await asyncio.to_thread(read_changes, done.changes)

    async def _fingerprints(self, rekeyed: Done) -> None:
        if rekeyed.returned is None:
            return
        rows = await asyncio.to_thread(pq.read_table, rekeyed.returned)
        if rows.num_rows:
            keys = np.stack([rows["high"].to_numpy(), rows["low"].to_numpy()], axis=1)
            blocks = rows["block"].to_numpy()
            forever = rows["forever"].to_numpy(zero_copy_only=False)
            for block in np.unique(blocks).tolist():
                mine = blocks == block
                self._host.duplicates.expect(keys[mine], block, forever=forever[mine])
                await asyncio.sleep(0)

    async def _tail(self, swap: Swap) -> None:
        """Fold the next blocks that are in no lake file, and have theirs in the transaction."""
        host = self._host
        last, rows = host.unsealed_after(self._until, REFOLD_TAIL_MAX)
        if last <= self._until:
            return
        began = time.perf_counter()
        ids = await self._reserved(rows)
        done = await self._ask(Tail(host.blocks_path, self._until + 1, last, ids))
        host.pace.follow(done.seen, time.perf_counter() - began)
        self._take(done)
        if done.files:
            self._then(swap.put_in, done.files)
        if done.merges is not None:
            self._then(swap.merge, self.intent.project, add=done.merges)
        self._until = done.last
        self._tailed += done.seen

    # While commits pause.

    async def _pause(self, swap: Swap, changed: list[tuple[Changes, Laid]], rekeyed: Done) -> None:
        host, project = self._host, self.intent.project
        host.sound()  # a block of which nobody knows whether it is on disk would be left out
        while self._until < host.state.block:
            await self._tail(swap)
        changed.append(await self._export(swap))
        await self._done()
        # At once: whom the first export alone tells of would be gone by the second.
        whole = together([changes for changes, _ in changed])

        def follow() -> None:
            host.state.replace(project, whole)
            host.state.in_time(project)

        self._still_wanted()
        self._decided = True
        try:
            await self._in_swap(swap.commit, self._number, block=self._until, then=follow)
            self.committed = True
            host.duplicates.adopt(rekeyed.keys)
            for _, laid in changed:
                host.duplicates.mend(laid.gone, laid.added)
                host.count_stored_again(project, laid.stored_devices, laid.stored_users)
        except BaseException as problem:
            host.fail(problem)  # nobody knows whether the lake has it: the next start does
            raise


def _made_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    files = Files()
    files.make_folder(folder)
    for one in (folder.parent, folder.parent.parent):
        files.sync_folder(one)


def _count_of(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
