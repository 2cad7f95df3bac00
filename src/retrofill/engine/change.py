"""One change of stored history, from the closure to the swap: steps 2 to 4 of `engine.rewriting`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow.parquet as pq
from msgspec import Struct

from retrofill import glibc
from retrofill.core.fold import Changes, together
from retrofill.core.sql import literal
from retrofill.engine.duplicates import Duplicates
from retrofill.engine.pace import Pace
from retrofill.engine.refold import Rule, Seed
from retrofill.engine.refolder import (
    EVERY_BLOCK,
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
    read_changes,
)
from retrofill.engine.state import State
from retrofill.errors import ConflictError, Error, StoreError
from retrofill.hot.intents import Intents
from retrofill.hot.keys import ENDING
from retrofill.lake import Lake, Swap
from retrofill.limits import (
    MS_PER_DAY,
    MS_PER_HOUR,
    REFOLD_LOOK_S,
    REFOLD_PASS_ROWS,
    REFOLD_PASSES_MAX,
    REFOLD_TAIL_MAX,
    REFOLD_TAIL_ROWS,
    REFOLD_TAILS_MAX,
    Limits,
)

T = TypeVar("T")

_IDS_AT_ONCE = 1000  # looked up before others have their turn

# What the next block is folded by changes with these, in `ended`: no block may come before it.
CHANGES_RULE = ("unmerge", "remerge")


class Intent(Struct, frozen=True):
    """What shall change in one project. kind, argument: for whom, as `kinds` knows it, and what it wants to know then."""

    project: int
    kind: str
    argument: str
    seed: Seed
    rule: Rule

    @property
    def switches_to(self) -> bool | None:
        """Whether blocks after it are folded in event time; None: as those before."""
        return self.rule.by_time if self.kind == "property_time" else None


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

    def compaction_rests(self, *, given_up: bool) -> AbstractAsyncContextManager[None]:
        """Begin no compaction meanwhile. given_up: nor go on with one that is under way."""

    async def children_rest(self) -> None:
        """Have those who seal and compact give their memory back, unless they have something to do."""

    def sound(self) -> None:
        """Raise StoreError if nobody knows what is on disk."""

    async def sealed(self, first: int, last: int) -> None:
        """Let go of blocks that the lake has now; the caller holds `sealing`."""

    async def checkpoint(self) -> None:
        """Save the state as of the last block."""

    def fail(self, problem: BaseException) -> None:
        """Refuse all work from now on."""


class Change:
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
        self._unwanted: Error | None = None  # why it goes no further
        self._decided = False
        self.put_off = False
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
        self._settled = EVERY_BLOCK
        self._files: list[Path] = []
        self._places: list[Path] = []
        self.rows = 0

    async def run(self, seed: Seed, rule: Rule) -> int:
        """Do all of it; return the last block whose rows are changed, memory and lake alike."""
        host = self._host
        if rule.by_time:  # late events that came until now are among what is folded in event time
            self._settled = host.state.block
        host.pace.begin(rests=self._long)
        try:
            # What one under way makes of rows that are changed here is not taken into the lake.
            async with host.compaction_rests(given_up=self._long):
                if not self.paused:  # while commits wait, nobody starts another child
                    await host.children_rest()
                await host.seal()
                # Whoever asked has read the import's rows, and more is needed soon.
                await asyncio.to_thread(self._trim)
                self._arrived = host.arrived_rows - host.unsealed_rows
                began = time.perf_counter()
                sources = await self._begin(seed, rule)
                await self._fold(sources, self._arrived)
                rows = sum(file.rows for file in sources.files)
                host.pace.follow(rows, time.perf_counter() - began)
                for _ in range(REFOLD_PASSES_MAX):
                    if self._behind <= REFOLD_PASS_ROWS:
                        break
                    began, arrived = time.perf_counter(), self._arrived
                    await host.seal()
                    await self._pass()
                    host.pace.follow(self._arrived - arrived, time.perf_counter() - began)
                async with host.sealing:
                    if self._long:
                        await host.children_rest()
                    return await self._swap()
        finally:
            host.pace.end()
            self._pins.close()  # the last ones: each pass has others

    @property
    def _lasts(self) -> bool:
        """Whether the pause lasts until the intent is removed."""
        return self.intent.kind in CHANGES_RULE

    @property
    def _long(self) -> bool:
        """Whether others give way to it. Late events are folded again after every seal, and there are few of them."""
        return self.intent.kind != "late"

    @property
    def _behind(self) -> int:
        """How many rows have come since the last pass."""
        return self._host.arrived_rows - self._arrived

    def _trim(self) -> None:
        """Give memory back that was freed, unless commits wait."""
        if not self.paused:
            glibc.trim()

    async def stop(self) -> None:
        """Let it end where it stands, with a ConflictError. Raises one if it is too late for that."""
        if self._decided:
            raise ConflictError("It is nearly done", mend="Ask again when it has ended")
        self._unwanted = ConflictError("It was called off, nothing has changed")
        await self._refolder.interrupt()

    async def leave(self) -> None:
        """Let it end where it stands, with a StoreError, unless it is nearly done: the next start begins it again."""
        if not self._decided and self._unwanted is None:
            self.put_off = True
            self._unwanted = StoreError("The server is stopping", mend="Its next start ends this")
            await self._refolder.interrupt()

    def _still_wanted(self) -> None:
        if self._unwanted is not None:
            raise self._unwanted

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
                self._settled,
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
                f"TO {literal(str(merges))} (FORMAT parquet)"
            )
            freed = None
            if not self._until and self._host.lake.freed_in(self.intent.project):
                freed = self._scratch / "freed.parquet"
                pq.write_table(snapshot.freed(self.intent.project), freed)
            sources = Sources(snapshot.files(), merges, freed)
            before, self._pins = self._pins, pins.pop_all()
            before.close()
        self._pinned = snapshot.sealed
        return sources

    async def _pass(self) -> None:
        """Fold what was sealed since the last pass."""
        arrived = self._host.arrived_rows - self._host.unsealed_rows
        sources = await asyncio.to_thread(self._pin)
        if self._pinned > self._until:
            await self._fold(sources, arrived)

    async def _fold(self, sources: Sources, arrived: int) -> None:
        """Fold what a snapshot has since the last one. arrived: how many rows are in it at least, since the start."""
        ids = await self._reserved(2 * self._nodes + self._behind + REFOLD_TAIL_ROWS)
        done = await self._ask(Pass(sources, self._until, self._pinned, ids))
        self._take(done)
        self._files += done.files
        self._places += done.places
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
                await self._less(swap)
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
        rule = self.intent.rule
        if (rule.hide or rule.show) and self._host.lake.freed_in(self.intent.project):
            swap.hide(self.intent.project, rule.bounds, hidden=rule.hide is not None)
        swap.sync()
        self._trim()  # to take rows out needed much, and the transaction may be open for long

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

    async def _less(self, swap: Swap) -> None:
        """Fold what is left as long as fewer than half come meanwhile: all of that is folded inside the pause."""
        before = 2 * REFOLD_TAIL_MAX
        for _ in range(REFOLD_PASSES_MAX):
            left = self._host.unsealed_rows - self._tailed
            if not left or left > before // 2:
                return
            before = left
            await self._tail(swap)

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
            order = np.argsort(blocks, kind="stable")
            every, firsts = np.unique(blocks[order], return_index=True)
            theirs = np.split(order, firsts[1:])
            for block, mine in zip(every.tolist(), theirs, strict=True):
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
            by_time = self.intent.switches_to
            host.state.replace(project, whole, settled=self._settled, by_time=by_time)

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
