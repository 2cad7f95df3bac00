"""The commit loop: requests in, one block at a time onto the disk, answers out.

Everything here runs on one asyncio loop, so the state needs no lock. A task takes what waits (group commit), asks the
core what it means, writes one row in a thread while the loop goes on receiving, and only then lets memory know and
answers. The order of effects stands in `_commit`, top to bottom. After a failed write nobody knows what is on disk:
the engine refuses all work from then on, and opening it anew is the ordinary way back.

In the background blocks become lake files (`seal`), the state is saved (`checkpoint`), and blocks that both have are
deleted in small steps once no reader may still need them. Opening reads both and folds the blocks after the
checkpoint again: ordinary start and crash are one path.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import structlog
from msgspec import Struct
from msgspec.structs import replace

from retrofill.clock import Clock
from retrofill.config import Project, Settings
from retrofill.core import block as block_codec
from retrofill.core import fold
from retrofill.core.block import Block, Kind
from retrofill.core.event import Batch, Envelope, Refusal
from retrofill.core.fold import Folded
from retrofill.core.person import Person
from retrofill.core.throttle import Accepted, Silenced, Throttled
from retrofill.engine.admission import Admission, Ids, ProjectSettings
from retrofill.engine.duplicates import Duplicates, Keyed, keys_of
from retrofill.engine.enrich import Enricher
from retrofill.engine.event_time import EventTime
from retrofill.engine.guard import Told, held_in
from retrofill.engine.imports import Counting, Repeats, duplicates_in, names_in, names_of
from retrofill.engine.moment import Moment
from retrofill.engine.pace import Pace
from retrofill.engine.query import Reader
from retrofill.engine.recover import batches_of, fill_devices, refold
from retrofill.engine.refolder import Counts
from retrofill.engine.rewriting import Redone, Rewriting
from retrofill.engine.seal import Sealer
from retrofill.engine.state import State
from retrofill.engine.undo import Undoing
from retrofill.engine.unmerge import Unmerging, pairs
from retrofill.errors import BusyError, CorruptError, Error, StoreError
from retrofill.hot.checkpoint import Changed, Checkpoint, Meta
from retrofill.hot.directory import Directory
from retrofill.hot.imports import Import, Imports
from retrofill.hot.intents import Intents, Tried
from retrofill.hot.keys import ENDING
from retrofill.hot.sqlite import Bar, Blocks
from retrofill.lake import Lake
from retrofill.limits import (
    BACKGROUND_S,
    BLOCK_EVENTS_MAX,
    CHECKPOINT_AGE_MS,
    CHECKPOINT_EVENTS,
    CLOCK_BACK_MS,
    DELETE_BLOCKS_STEP,
    LATE_MARKS_MAX,
    MS_PER_S,
    REFOLD_PACE_WAIT_S,
    SEAL_AGE_MS,
    SEAL_EVENTS,
    SEAL_LAG_EVENTS_MAX,
    SEAL_RETRY_MS,
    Limits,
)
from retrofill.queue import Queue

log = structlog.get_logger()

Outcome = Accepted | Throttled | Silenced | Refusal


class Unsealed(Struct, frozen=True):
    """A committed block that is not in the lake yet."""

    number: int
    rows: int
    server_upload_ms: int


class Noted(Struct, frozen=True):
    """What memory is told of a block's events once they are on disk, beside what the fold says.

    imports: their keys within their imports, empty if none is of one. stored: for each request its project, and devices
    and users that count for the daily quota. duplicates: of imports.
    """

    imports: bytes
    stored: list[tuple[int, Ids, Ids]]
    duplicates: Repeats


class Figures(Struct):
    """What the engine has done since it was opened, for metrics and health."""

    blocks: int = 0
    events: int = 0
    duplicates: int = 0
    merges: int = 0
    held: int = 0
    commit_s: float = 0.0
    seals: int = 0
    seal_failures: int = 0
    sealed_events: int = 0
    checkpoints: int = 0
    last_seal_ms: int = 0
    last_checkpoint_ms: int = 0
    unsealed_events: int = 0
    waiting_requests: int = 0
    waiting_bytes: int = 0


class Engine:
    """One data directory at work. Use `Engine.open`, then `start` on the loop, then `ingest`, then `close`."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        directory: Directory,
        sealer: Callable[[Path, Lake], Sealer],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._directory = directory
        self.blocks = Blocks(directory.blocks)
        self.projects_store = self.blocks.projects()
        self._checkpoint = Checkpoint(directory.checkpoint)
        self.lake = Lake.open(directory.lake)
        self.state = State(self._checkpoint)
        self._intents = Intents(directory.intents)
        self.duplicates = Duplicates(
            directory.keys,
            {
                f"{ENDING}{number}"
                for number, _ in self._intents.all()
                if self.lake.rewritten(number) is not None
            },
        )
        self.imports = Imports(directory.imports)
        self.counting = Counting(self.imports)
        self._reader: Reader | None = None
        self._figures = Figures()
        self._told_held = Told()
        self.unsealed: deque[Unsealed] = deque()
        self._unsealed_events = 0
        self._since_checkpoint = 0
        self._checkpoint_ms = clock.now_ms()
        self._seal_again_ms = 0
        self._projects: dict[str, Project] = {}
        self._admissions: dict[int, Admission] = {}
        self._enricher = Enricher(settings.geoip)
        self._queue: Queue[Outcome] = Queue()
        self._forgetting: deque[tuple[tuple[tuple[int, int], ...], asyncio.Future[None]]] = deque()
        self._pins: Counter[int] = Counter()
        self._deleted_to = 0
        self._problem: str | None = None
        self._closing = False
        self._wake, self._due = asyncio.Event(), asyncio.Event()
        self.sealing, self.saving = asyncio.Lock(), asyncio.Lock()
        self.committing = asyncio.Lock()
        self.pace = Pace()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._sealer = sealer(self.blocks.path, self.lake)
        self._tasks: list[asyncio.Task[None]] = []
        self._seals: set[asyncio.Task[None]] = set()
        self._writing_back: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._settle_marks = LATE_MARKS_MAX  # with which the next look settles
        self.rewriting = Rewriting(self, self._intents, directory.rewriting, self._sealer.refolder)
        self._undoing = Undoing(self.rewriting, self, clock)
        self.event_time = EventTime(self.rewriting, self, self._may_change)
        self._unmerging = Unmerging(self.rewriting, self, clock)

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        clock: Clock,
        sealer: Callable[[Path, Lake], Sealer] = Sealer,
        repairing: bool = False,
    ) -> Engine:
        """Open a data directory, recover what a crash left, and be ready.

        sealer: who moves blocks into the lake; a child process unless a test brings its own.
        repairing: open it also where a repair was cut off.
        Raises BusyError if another process has it, StoreError if it cannot be read.
        """
        directory = Directory(settings.data)
        engine = None
        try:
            if directory.repairing.exists() and not repairing:
                raise CorruptError(
                    "A repair of this directory was cut off",
                    where=str(directory.root),
                    mend="Run `retrofill check --repair` on it again",
                )
            engine = cls(settings, clock, directory, sealer)
            engine._recover()
            if not engine.lake.keeps_freed:
                engine._keep_freed()
        except BaseException:
            if engine is None:
                directory.close()
            else:
                engine._let_go()
            raise
        return engine

    def _recover(self) -> None:
        sealed = self.lake.sealed()
        numbers = self.blocks.numbers()
        self._need_lake_to(numbers[0][0] if numbers else self.state.block + 1, sealed)
        for project in self.projects_store.all():
            self.add_project(project)
        redo = self.rewriting.redo()
        filed = self.duplicates.open(
            sealed=sealed,
            oldest_block=self.oldest_block(),
            # Of blocks whose rows have changed since, the lake alone knows the keys.
            held=numbers[0][0] if numbers and not redo else sealed + 1,
            rows=self.lake.dedupe_rows,
            limits=self.limits,
        )
        checkpointed = self.state.block
        for number, admission in self._admissions.items():
            if admission.limits.daily_quota:
                admission.load_quota(*self.lake.quota_rows(number, self._clock.now_ms()))
        last = numbers[-1][0] if numbers else max(sealed, checkpointed)
        reserved = self._intents.reserved()
        self._follow(redo, reserved)
        for block in self.blocks.read(min(filed, checkpointed, self.counting.block) + 1, last):
            batches = batches_of(block)
            self.counting.committed(block.number, duplicates_in(block.kind, batches))
            if block.number > checkpointed:
                refold(self.state, block, batches)
                self._follow(redo, reserved)
            if block.number > filed:
                limits = [self.limits(batch.project) for batch in batches]
                self._add_keys(block, keys_of(batches, limits).imports)
            if block.number > sealed:
                self._remember(block)
                self._count_stored(block.server_upload_ms, self._stored(block, batches))
        if filed < sealed:  # a stop came between the lake's commit and the key file
            self.duplicates.sealed(filed + 1, sealed, oldest_block=self.oldest_block())
            self.duplicates.filed(filed + 1, sealed, oldest_block=self.oldest_block())
        if self.state.block < sealed:
            raise CorruptError(
                f"The lake holds block {sealed:,}, the state ends at {self.state.block:,}",
                where=str(self._directory.root),
                mend="Blocks are missing from hot.sqlite: restore it from a copy",
            )
        self._deleted_to = (numbers[0][0] - 1) if numbers else self.state.block

    def _keep_freed(self) -> None:
        """Say in a lake of before what deletions have freed."""
        free = {}
        for number in self._admissions:
            state = self.state.project(number)
            if gone := state.forgotten():
                free[number] = state.owned_by(gone)
        self.lake.keep_freed(self.state.block, free)

    def _need_lake_to(self, held: int, sealed: int) -> None:
        """Blocks go once they are in the lake and in the checkpoint: what comes after the lake's is held. Raises CorruptError."""
        if sealed + 1 < held:
            raise CorruptError(
                f"The lake ends at block {sealed:,}, and blocks are held from {held:,} on",
                where=str(self.lake.folder),
                mend="It is older than the rest of the data directory, or another one: restore it from a copy",
            )

    def _follow(self, redo: dict[int, list[Redone]], reserved: list[tuple[int, int]]) -> None:
        """Take what changed between the last block and the next, as it was then."""
        block = self.state.block
        for one in redo.get(block, ()):
            self.state.replace(one.project, one.changes, settled=one.settled, by_time=one.by_time)
        for one in chain.from_iterable(some for at, some in redo.items() if at < block):
            if one.by_time is not None:  # the setting is written after the checkpoint
                self.state.project(one.project).by_time = one.by_time
        self.state.fresh = max([self.state.fresh, *(to for at, to in reserved if at <= block)])

    def _dedupe_window_ms(self) -> int:
        windows = [admission.limits.dedupe_window_ms for admission in self._admissions.values()]
        return max(windows, default=Limits().dedupe_window_ms)

    # Projects.

    def add_project(self, project: Project) -> None:
        """Serve a project from now on; one that is served already stays as it is."""
        if project.number in self._admissions:
            return
        self._projects[project.api_key] = project
        stored = self.projects_store.settings(project.number)
        settings = (
            msgspec.json.decode(stored, type=ProjectSettings) if stored else ProjectSettings()
        )
        self._admissions[project.number] = Admission(
            project.number, settings, profile=self._settings.limits, state=self.state
        )
        state = self.state.project(project.number)
        state.by_time = settings.property_time == "event"
        state.barred = pairs(self.projects_store.barred(project.number))

    def project(self, api_key: str) -> Project | None:
        """Return the project of an API key, which is a name and no secret; None if there is none."""
        return self._projects.get(api_key)

    def all_projects(self) -> list[Project]:
        """Return every project of this installation."""
        return list(self._projects.values())

    def limits(self, number: int) -> Limits:
        """Return the limits of a project."""
        return self._admissions[number].limits

    def settings(self, number: int) -> ProjectSettings:
        """Return what the operator set for a project."""
        return self._admissions[number].settings

    def set_settings(self, number: int, settings: ProjectSettings) -> None:
        """Store what the operator sets for a project; it holds from the next request on. Raises InputError.

        `property_time` is what it is: only a fold of the whole project changes that.
        """
        admission = self._admissions[number]
        admission.limits_of(settings)
        self.projects_store.set_settings(number, msgspec.json.encode(settings))
        admission.change(settings)

    async def change_settings(self, number: int, settings: ProjectSettings) -> None:
        """As `set_settings`; another `property_time` holds when the project has been folded so. Raises StoreError too."""
        before = self.settings(number).property_time
        self.set_settings(number, replace(settings, property_time=before))
        to, event_time = settings.property_time, self.event_time
        asked = to != before or event_time.asked(number)
        if asked or await asyncio.to_thread(event_time.switching, number):
            await event_time.switch(number, to)

    # Life.

    async def start(self) -> None:
        """End the changes of history that a crash cut off, then begin to commit and to work in the background."""
        self.event_time.start()
        await asyncio.to_thread(self._undoing.recover)
        await self.rewriting.resume()
        for run in (self._commit_loop, self._background_loop):
            self._tasks.append(asyncio.create_task(self._guarded(run)))

    async def close(self) -> None:
        """Answer what waits, commit, seal, save and give the directory up."""
        self._closing = True
        await self.rewriting.leave()
        self._wake.set()
        self._due.set()
        try:
            await asyncio.gather(*self._tasks)
            await self.rewriting.ended()
            if self._settling is not None:
                await asyncio.gather(self._settling, return_exceptions=True)
            await asyncio.gather(*self._seals, return_exceptions=True)
            if self._problem is None:
                await self.seal()
                await self.checkpoint()
                await self.counting.save(self.state.block)
                await self._delete_blocks()
                await self._shrink()
        finally:
            await self._release()

    async def _shrink(self) -> None:
        """Leave no more of the hot store than what is in it: next to nothing, now that every block is in the lake."""
        if self._writing_back is not None:
            await self._writing_back
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self.blocks.shrink)
        except StoreError as problem:
            log.warning("shrink_failed", reason=str(problem))  # it only is larger than it need be

    @property
    def figures(self) -> Figures:
        """What the engine has done, and what waits now."""
        self._figures.unsealed_events = self._unsealed_events
        self._figures.waiting_requests = len(self._queue)
        self._figures.waiting_bytes = self._queue.waiting_bytes
        return self._figures

    def problem(self) -> str | None:
        """Say why reads and writes do not work, or None."""
        if self._problem is not None:
            return self._problem
        behind = self.state.server_upload_ms - self._clock.now_ms()
        if behind > CLOCK_BACK_MS:
            return f"The clock is {behind // MS_PER_S} s behind the last stored event; set it right"
        if self._unsealed_events > SEAL_LAG_EVENTS_MAX:
            return f"{self._unsealed_events:,} events wait to be sealed: no more until it has caught up"
        return None

    async def abandon(self) -> None:
        """Let go of everything as a crash would: nothing is committed, sealed or saved any more. For tests."""
        tasks = self._tasks + ([self._settling] if self._settling else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.rewriting.ended(abandon=True)
        for seal in self._seals:
            seal.cancel()
        await asyncio.gather(*self._seals, return_exceptions=True)
        await self._release()

    async def _release(self) -> None:
        if self._writing_back is not None:
            await self._writing_back
        await self._sealer.close()
        self._let_go()

    def _let_go(self) -> None:
        self._writer.shutdown()
        self.lake.close()
        self._checkpoint.close()
        self.imports.close()
        self._intents.close()
        self.blocks.close()
        self._directory.close()

    async def _guarded(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await run()
        except Error as problem:
            self.fail(problem)
        except Exception as problem:
            self.fail(problem)
            raise

    def fail(self, problem: BaseException) -> None:
        """Refuse all work from now on: nobody knows what is on disk until it is opened anew."""
        if self._problem is None:
            self._problem = str(problem)
            log.error("engine_stopped", reason=str(problem))
        failure = StoreError(str(problem))
        self._queue.fail(failure)
        while self._forgetting:
            _, done = self._forgetting.popleft()
            if not done.done():
                done.set_exception(failure)

    # Ingest.

    async def ingest(self, batch: Batch) -> Outcome:
        """Take one request; return once it is on disk and visible, or say why it is refused. Its events are let go.

        Raises BusyError when a queue is at its bound, StoreError when the disk fails: nothing of it is stored then
        (after a failed sync: nobody is told that it is).
        """
        self.sound()
        if self._closing:
            raise BusyError("The server is stopping", mend="Send the request again")
        if self._unsealed_events > SEAL_LAG_EVENTS_MAX:
            raise BusyError("Sealing has to catch up", mend="Send the request again later")
        self._enricher.enrich(batch)
        fill_devices(batch)
        future = self._queue.put(batch)
        self._wake.set()
        return await future

    async def _commit_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._forgetting:
                forgotten, done = self._forgetting.popleft()
                async with self.committing:
                    await self._commit([], forgotten=forgotten)
                if not done.done():  # who asked may have been cancelled
                    done.set_result(None)
            while self._queue:
                async with self.committing:
                    began_s = time.monotonic()
                    rows = await self._commit(self._take())
                await self._put_off(rows, took_s=time.monotonic() - began_s)
            if self._closing:
                return

    async def _put_off(self, rows: int, *, took_s: float) -> None:
        """After a block of so many rows, wait for whoever has to catch up with them, as long as somebody does."""
        now_s = time.monotonic()
        room = SEAL_LAG_EVENTS_MAX - self._unsealed_events
        end_s = now_s + self.pace.wait_s(rows, now_s=now_s, took_s=took_s, room=room)
        while now_s < end_s and self.pace.catching_up and not self._closing:
            await asyncio.sleep(min(end_s - now_s, REFOLD_PACE_WAIT_S))
            now_s = time.monotonic()

    def _take(self) -> list[tuple[Batch, asyncio.Future[Outcome]]]:
        """Take the requests of the next block; those refused are answered here and not in it."""
        now_ms = self._clock.now_ms()
        taken: list[tuple[Batch, asyncio.Future[Outcome]]] = []
        events = 0
        while self._queue and events < BLOCK_EVENTS_MAX:
            batch = self._queue.first()
            admission = self._admissions[batch.project]
            near = admission.near_quota(batch, now_ms=now_ms)
            alone = near or batch.path == "/usermap"
            if alone and taken:  # it is judged by what the others leave, so they come first
                break
            verdict = admission.admit(batch, now_ms=now_ms)
            if verdict is None and near:
                dropped = self._dropped([batch], now_ms)[1]
                verdict = admission.over_quota(batch, dropped, now_ms=now_ms)
            _, future = self._queue.take()
            if verdict is not None:
                self.counting.refused(batch.project, names_of(batch.events))
                if not future.done():
                    future.set_result(verdict)
                continue
            admission.count(batch, now_ms=now_ms)
            taken.append((batch, future))
            events += len(batch.events)
            if alone:
                break
        return taken

    def _dropped(self, batches: list[Batch], now_ms: int) -> tuple[Keyed, bytearray]:
        """Return the dedupe keys of these events, and what becomes of those that are duplicates."""
        limits = [self._admissions[batch.project].limits for batch in batches]
        keyed = keys_of(batches, limits)
        oldest = np.repeat(
            [self.state.oldest_block(now_ms - one.dedupe_window_ms) for one in limits],
            [len(batch.events) for batch in batches],
        )
        return keyed, self.duplicates.split(keyed, oldest)

    def oldest_block(self) -> int:
        """Return the first block that a dedupe window still reaches."""
        return self.state.oldest_block(self._clock.now_ms() - self._dedupe_window_ms())

    def _add_keys(self, block: Block, imports: bytes) -> None:
        self.duplicates.add(
            Keyed(block.keys, imports),
            block.kind,
            block.number,
            oldest_block=self.oldest_block(),
        )

    def fold(
        self, batches: list[Batch], *, now_ms: int, forgotten: tuple[tuple[int, int], ...] = ()
    ) -> tuple[Folded, Noted]:
        """Say what the next block is and changes, and what else `applied` needs; nothing is written and nothing known yet."""
        server_upload_ms = max(now_ms, self.state.server_upload_ms)
        keyed, dropped = self._dropped(batches, server_upload_ms)
        updates_max = {
            number: admission.limits.property_updates_per_h
            for number, admission in self._admissions.items()
        }
        merges_max = {
            number: admission.limits.merges_per_user
            for number, admission in self._admissions.items()
        }
        allowed = {number: admission.merge_always for number, admission in self._admissions.items()}
        folded = self.state.fold(
            batches,
            lambda known: fold.fold(
                batches,
                known,
                number=self.state.block + 1,
                server_upload_ms=server_upload_ms,
                fresh=self.state.fresh,
                updates_max=updates_max,
                merges_max=merges_max,
                allowed=allowed,
                dropped=dropped,
                keys=keyed.packed,
                forgotten=forgotten,
            ),
        )
        block = folded.block
        stored = self._stored(block, batches)
        return folded, Noted(keyed.imports, stored, duplicates_in(block.kind, batches))

    async def _commit(
        self,
        taken: list[tuple[Batch, asyncio.Future[Outcome]]],
        *,
        forgotten: tuple[tuple[int, int], ...] = (),
    ) -> int:
        """Put one block on disk, let memory know and answer; return how many events it holds."""
        if not taken and not forgotten:
            return 0
        batches = [batch for batch, _ in taken]
        try:
            folded, noted = self.fold(batches, now_ms=self._clock.now_ms(), forgotten=forgotten)
            began = time.perf_counter()
            writing = asyncio.get_running_loop().run_in_executor(
                self._writer, self._append, folded.block
            )
            # Nobody looks at the events again, and now they are still near the processor: to free them after other
            # requests were read costs as much as a tenth of all work.
            for batch in batches:
                batch.events = []
            await writing
            self._figures.commit_s += time.perf_counter() - began
        except BaseException as problem:
            failure = problem if isinstance(problem, Error) else StoreError(repr(problem))
            for _, future in taken:
                if not future.done():
                    future.set_exception(failure)
            raise
        block = folded.block
        self.applied(folded, noted)
        for part, (_, future) in zip(block.parts, taken, strict=True):
            if not future.done():  # a client that hung up waits no more
                future.set_result(Accepted(part.rows, block.server_upload_ms))
        return block.rows

    def _append(self, block: Block) -> None:
        self.blocks.append(block.number, block.rows, block_codec.encode(block))

    def applied(self, folded: Folded, noted: Noted) -> None:
        """Let memory know what is on disk now."""
        block = folded.block
        self.state.apply(folded)
        self._add_keys(block, noted.imports)
        self._count_stored(block.server_upload_ms, noted.stored)
        self.counting.committed(block.number, noted.duplicates)
        self._remember(block)
        figures = self._figures
        figures.blocks += 1
        figures.events += block.rows
        figures.duplicates += block.kind.count(Kind.DROPPED) + block.kind.count(Kind.DISPLACED)
        figures.merges += len(block.merges)
        held = held_in(block)
        if held:
            figures.held += held
            for project, one in self._told_held.new(block):
                log.warning(
                    "merges_held",
                    project=project,
                    amplitude_id=one,
                    mend="`retrofill merges --held` lists who joins more people than merges_per_user",
                )
        self._since_checkpoint += block.rows
        if (
            self._unsealed_events >= SEAL_EVENTS
            or self._since_checkpoint >= CHECKPOINT_EVENTS
            or (
                not self.event_time.waits  # else the look by time is soon enough
                and any(self.state.project(one).marked >= LATE_MARKS_MAX for one in folded.changes)
            )
        ):
            self._due.set()
        if self.blocks.write_back_is_due and (
            self._writing_back is None or self._writing_back.done()
        ):
            self._writing_back = asyncio.create_task(self._write_back())

    async def _write_back(self) -> None:
        """Write the log of the hot store back into its file, most of it beside the commits."""
        try:
            await asyncio.to_thread(self.blocks.write_back)
            await asyncio.get_running_loop().run_in_executor(
                self._writer, self.blocks.write_back_rest
            )
        except StoreError as problem:
            # All of it is in the log still, and synced.
            log.warning("write_back_failed", reason=str(problem))

    def _stored(self, block: Block, batches: list[Batch]) -> list[tuple[int, Ids, Ids]]:
        found = []
        first = 0
        for batch in batches:
            kinds = block.kind[first : first + len(batch.events)]
            found.append((batch.project, *self._admissions[batch.project].stored(batch, kinds)))
            first += len(kinds)
        return found

    def _count_stored(self, now_ms: int, stored: list[tuple[int, Ids, Ids]]) -> None:
        for project, devices, users in stored:
            self._admissions[project].count_stored(devices, users, now_ms=now_ms)

    def _remember(self, block: Block) -> None:
        self.unsealed.append(Unsealed(block.number, block.rows, block.server_upload_ms))
        self._unsealed_events += block.rows

    # Background.

    async def _background_loop(self) -> None:
        while not self._closing:
            now_ms = self._clock.now_ms()
            if self._seal_is_due(now_ms) and now_ms >= self._seal_again_ms:
                await self._seal_in_turn()
                self._settle_marks = 1
            if self._settling is None or self._settling.done():  # it may take as long as an undo
                settle = partial(self._settle, self._settle_marks)
                self._settling = asyncio.create_task(self._guarded(settle))
            if self._since_checkpoint >= CHECKPOINT_EVENTS or (
                self._since_checkpoint and now_ms - self._checkpoint_ms >= CHECKPOINT_AGE_MS
            ):
                await self.checkpoint()
            await self._delete_blocks()
            self._due.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), BACKGROUND_S)

    async def _settle(self, marks: int) -> None:
        """Fold again what late events have marked, in projects with at least so many marks.

        Not while a change of history is under way: the next look does it, with as few marks.
        """
        self._settle_marks = LATE_MARKS_MAX
        for number in self._admissions:
            enough = self.state.project(number).marked >= marks
            if enough and self.event_time.waits:
                self._settle_marks = min(self._settle_marks, marks)
            elif enough and not self._closing:
                try:
                    await self.event_time.settle_beside(number)
                except StoreError as problem:
                    if self._problem is not None:
                        raise
                    # Nothing has changed: the next look tries it again, and so does whoever reads.
                    log.warning("settle_failed", project=number, reason=str(problem))

    async def _seal_in_turn(self) -> None:
        """Seal because it is due; if that fails, it is tried again later, and requests are refused once too much waits."""
        try:
            await self.seal()
        except StoreError:
            if self._problem is not None:
                raise
            self._seal_again_ms = self._clock.now_ms() + SEAL_RETRY_MS

    def _seal_is_due(self, now_ms: int) -> bool:
        return bool(self.unsealed) and (
            self._unsealed_events >= SEAL_EVENTS
            or now_ms - self.unsealed[0].server_upload_ms >= SEAL_AGE_MS
        )

    async def seal(self) -> None:
        """Move every block committed so far into the lake, to the end also when whoever asked has gone.

        Raises StoreError: then blocks that are not in the lake wait in the hot store for the next seal.
        """
        task = asyncio.create_task(self._seal())
        self._seals.add(task)
        task.add_done_callback(self._seals.discard)
        await asyncio.shield(task)

    async def _seal(self) -> None:
        async with self.sealing:
            self.sound()
            if not self.unsealed:
                return
            first, last = self.unsealed[0].number, self.unsealed[-1].number
            problem = None
            try:
                await self._sealer.seal(first, last)
            except StoreError as failure:
                problem = failure
                self._figures.seal_failures += 1
                log.warning("seal_failed", first=first, last=last, reason=str(failure))
            except BaseException as failure:
                self.fail(failure)
                raise
            try:
                if problem is not None:  # a second time what it has must not go there
                    last = await asyncio.to_thread(self.lake.sealed)
                await self.sealed(first, last)
            except BaseException as failure:
                self.fail(failure)
                raise
            if problem is not None:
                raise problem
            await self._sealer.compact()

    async def compact(self) -> None:
        """Write lake files anew that must lose rows, or are many; nothing is done while a change of history is under way."""
        await self._sealer.compact()
        await self._sealer.compacted()

    def compaction_rests(self, *, given_up: bool) -> AbstractAsyncContextManager[None]:
        """Begin no compaction meanwhile. given_up: nor go on with one that is under way."""
        return self._sealer.compaction_rests(given_up=given_up)

    def export_goes_on(self) -> AbstractAsyncContextManager[None]:
        """Begin no compaction meanwhile, if it does not take long."""
        return self._sealer.export_goes_on()

    async def children_rest(self) -> None:
        """Have those who seal and compact give their memory back, unless they have something to do."""
        await self._sealer.children_rest()

    async def sealed(self, first: int, last: int) -> None:
        """Let go of blocks that the lake has now; the caller holds `sealing`."""
        if first > last:
            return
        await asyncio.to_thread(
            self.duplicates.sealed, first, last, oldest_block=self.oldest_block()
        )
        self.duplicates.filed(first, last, oldest_block=self.oldest_block())
        await self.counting.save(last)  # before these blocks may be deleted
        sealed_events = 0
        while self.unsealed and self.unsealed[0].number <= last:
            sealed_events += self.unsealed.popleft().rows
        self._unsealed_events -= sealed_events
        if self._reader is not None:  # whoever read last may have been the last one for long
            await asyncio.to_thread(self._reader.sealed, last)
        self._figures.seals += 1
        self._figures.sealed_events += sealed_events
        self._figures.last_seal_ms = self._clock.now_ms()
        log.info("sealed", first=first, last=last, events=sealed_events)

    async def checkpoint(self) -> None:
        """Save the state exactly as of the last applied block."""
        async with self.saving:
            if not self.state.saved_all:
                await self._save()

    async def _save(self) -> None:
        meta, changed, times = self.state.capture()
        self._since_checkpoint = 0
        self._checkpoint_ms = self._clock.now_ms()
        after_ms = self._checkpoint_ms - self._dedupe_window_ms() - 2 * MS_PER_S
        await asyncio.to_thread(
            self._checkpoint.save, meta, changed, block_times=times, times_after_ms=after_ms
        )
        self.state.saved(meta, times_after_ms=after_ms)
        await asyncio.to_thread(self._intents.checkpointed, meta.block)
        self._figures.checkpoints += 1
        self._figures.last_checkpoint_ms = self._checkpoint_ms

    async def _delete_blocks(self) -> None:
        """Delete blocks that lake, key files, checkpoint and counts have and no reader needs, a few at a time."""
        sealed = self.unsealed[0].number - 1 if self.unsealed else self.state.block
        last = min(sealed, self.state.saved_block, self.counting.block, *self._pins)
        loop = asyncio.get_running_loop()
        while self._deleted_to < last:
            step = min(self._deleted_to + DELETE_BLOCKS_STEP, last)
            await loop.run_in_executor(self._writer, self.blocks.delete, self._deleted_to + 1, step)
            self._deleted_to = step

    # Readers.

    @contextlib.contextmanager
    def pin(self, sealed: int) -> Iterator[None]:
        """Keep every block after `sealed` while a reader may need it."""
        self._pins[sealed] += 1
        try:
            yield
        finally:
            self._pins[sealed] -= 1
            if not self._pins[sealed]:
                del self._pins[sealed]

    def reader(self) -> Reader:
        """Return what opens views of everything acknowledged, for any number of threads."""
        if self._reader is not None:
            return self._reader
        late = self.event_time
        self._reader = Reader(
            self.lake,
            self.blocks,
            last_block=self.last_block,
            person=self.person,
            aliases=self.aliases,
            pin=self.pin,
            late_since=late.late_since,
            settle=late.settle_first,
            settles=late.settles,
            settled_person=late.settled_person,
        )
        return self._reader

    def last_block(self) -> int:
        """Return the number of the last block that was acknowledged."""
        return self.state.block

    def person(self, project: int, amplitude_id: int) -> Person | None:
        """Return a person's state as of the last acknowledged block. May be called from any thread."""
        return self.state.project(project).people.get(amplitude_id)

    def aliases(self, project: int) -> dict[str, str]:
        """Return user_id → global_user_id of a project."""
        return self.state.project(project).aliases

    async def moment(self, project: int) -> Moment:
        """Pin a project as it stands after a block, all of it in the lake; close it. Raises StoreError.

        Commits wait while what has arrived since the last seal is sealed: a part of a second.
        """
        await self.event_time.settle(project)
        async with self.rewriting.alone():
            await self.seal()
            async with self.committing:
                await self.event_time.settle_held(project)  # what came late since
                await self.seal()
                meta, unsaved = self.state.moment(project)
                return await asyncio.to_thread(self._moment, project, meta, unsaved)

    def _moment(self, project: int, meta: Meta, unsaved: Changed) -> Moment:
        with contextlib.ExitStack() as held:
            saved = self._checkpoint.pinned()
            held.callback(saved.close)
            snapshot = held.enter_context(self.lake.snapshot())
            assert snapshot.sealed == meta.block
            limits, now_ms = self.limits(project), self._clock.now_ms()
            return Moment(
                project,
                meta,
                now_ms,
                self.state.oldest_block(
                    max(now_ms, meta.server_upload_ms) - limits.dedupe_window_ms
                ),
                self.settings(project),
                limits,
                snapshot,
                unsaved,
                saved,
                held.pop_all(),
                self._settings.geoip is not None,
                self.state.project(project).barred,
            )

    def refused(self, project: int, opened: Envelope) -> None:
        """Note that a request was refused before it came to `ingest`."""
        self.counting.refused(project, names_in(opened))

    # Stored history changed.

    @property
    def blocks_path(self) -> Path:
        """The hot store, whose blocks others may read."""
        return self.blocks.path

    @property
    def arrived_rows(self) -> int:
        """How many rows were committed since the start."""
        return self._figures.events

    @property
    def unsealed_rows(self) -> int:
        """How many rows are in no lake file."""
        return self._unsealed_events

    def unsealed_after(self, block: int, rows_max: int) -> tuple[int, int]:
        """Return the last of the unsealed blocks after one that hold so many rows at most, or the first; and their rows.

        The block itself, and 0, if there is none.
        """
        last, rows = block, 0
        known = block - self.unsealed[0].number + 1 if self.unsealed else 0
        for one in islice(self.unsealed, max(0, known), None):
            if rows and rows + one.rows > rows_max:
                break
            last, rows = one.number, rows + one.rows
        return last, rows

    def count_stored_again(self, project: int, devices: Counts, users: Counts) -> None:
        """So many rows more, or less, count for the daily quota of these ids: by (hour, id)."""
        now_ms = self.state.server_upload_ms
        self._admissions[project].count_again(devices, users, now_ms=now_ms)

    async def undo(self, project: int, name: str) -> Import:
        """Take an import back with all its effects; it is undone when this returns. Again it changes nothing.

        Raises StoreError: then the next start ends it, or it was never begun.
        """
        self._may_change()
        return await self.rewriting.whole(self._undoing.undo(project, name))

    async def restore(self, project: int, name: str) -> Import:
        """Bring an undone import back. Raises ConflictError if it cannot be, MissingError, StoreError."""
        self._may_change()
        return await self.rewriting.whole(self._undoing.restore(project, name))

    async def purge(self) -> int:
        """Delete the rows of undone imports that nobody can restore any more; return how many. Raises StoreError."""
        self._may_change()
        return await self.rewriting.whole(self._undoing.purge())

    async def cancel(self, project: int, name: str) -> Import:
        """Call off an undo or restore of an import that has changed nothing yet. Raises ConflictError, StoreError."""
        self._may_change()
        return await self.rewriting.whole(self._undoing.cancel(project, name))

    def tried(self, project: int) -> dict[str, Tried]:
        """Return how each undo or restore of a project fared that is not ended. Any thread."""
        return self._undoing.tried(project)

    async def unmerge(self, project: int, block: int, row: int) -> Bar:
        """Take the merge back that the event at a position proved; it is when this returns. Again it changes nothing.

        Raises MissingError if there is none, StoreError.
        """
        self._may_change()
        return await self.rewriting.whole(self._unmerging.unmerge(project, block, row))

    async def restore_merge(self, project: int, block: int, row: int) -> Bar:
        """Lift the bar of a merge taken back; it is when this returns. Raises MissingError if none was, StoreError."""
        self._may_change()
        return await self.rewriting.whole(self._unmerging.restore(project, block, row))

    def sound(self) -> None:
        """Raise StoreError if nobody knows what is on disk; a stop under way is no reason."""
        if self._problem is not None:
            raise StoreError("The store has failed", mend="Start the server again")

    def _may_change(self) -> None:
        if self._problem is not None or self._closing:
            raise StoreError("The store has failed or is stopping", mend="Start the server again")

    async def forget(self, project: int, amplitude_ids: list[int]) -> None:
        """Delete people: their state by a block of its own, then their rows, once all of them are in the lake."""
        self.sound()
        async with self.rewriting.alone():  # an undo between block and rows would make them again
            self.sound()
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._forgetting.append((tuple((project, one) for one in amplitude_ids), done))
            self._wake.set()
            await done
            await self.seal()
            await asyncio.to_thread(self.lake.delete, project, amplitude_ids)
