"""The scratch directory at work: an engine that goes on from what was given, and a run's own sender against it.

The sender is the one that `run` uses, with its schedule, its journal and its way with every answer; the requests are
read, judged and answered by what a server uses. Only the wire between them is none, and the clock is a virtual one: so
an import that a destination would take three days for is over in seconds, with the same refusals and the same waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from retrofill.backfill.destination import Answer, judge
from retrofill.backfill.feed import Feed
from retrofill.backfill.journal import Journal, Ledger
from retrofill.backfill.manifest import Manifest
from retrofill.backfill.profile import Profile
from retrofill.backfill.send import Sender
from retrofill.config import Project, Settings
from retrofill.core.event import Batch
from retrofill.core.schedule import HOUR_S
from retrofill.core.throttle import Accepted
from retrofill.engine.ingest import Engine, Outcome
from retrofill.engine.seal import Sealer, SealResult, SealTask, seal_blocks
from retrofill.errors import StoreError
from retrofill.rehearse.clock import VirtualClock
from retrofill.server.ingest import Ingest
from retrofill.server.metrics import Metrics

KEYS = Project(1, "rehearsal", "rehearsal-key", "rehearsal-secret")
_REMOTE = ("127.0.0.1", 0)
_BYTES_PER_S = 20_000_000  # ours: how fast a run goes where nothing limits it


class Sent(Struct, frozen=True):
    """How a run of an import went. seconds: of virtual time. throttled, quota: ids that had to wait, with their kind."""

    events: int
    requests: int
    bytes: int
    duplicates: int
    refused: dict[str, int]
    throttled: list[tuple[str, str]]
    quota: list[tuple[str, str]]
    seconds: float


class _Inside(Sealer):
    """Seals in this process, and leaves small files as they are: they are removed soon."""

    async def seal(self, first: int, last: int) -> SealResult:
        """Move blocks into the lake."""
        rows = 0
        while first <= last:
            file = self._lake.new_file(first, last)
            done = await asyncio.to_thread(seal_blocks, SealTask(self._blocks, first, last, file))
            self._lake.adopt(file if done.rows else None, block=done.last, merges=done.merges)
            first, rows = done.last + 1, rows + done.rows
        return SealResult(1, rows)

    async def compact(self) -> None:
        """Nothing."""


class _Both:
    """An engine that takes requests, and one beside it whose state alone follows, with the other setting.

    What the first one takes is folded over the state of the second and never written: each request a block, in the
    order in which the first one stored them.
    """

    def __init__(self, engine: Engine, beside: Engine, *, skip: bool) -> None:
        self._engine = engine
        self._beside = beside
        self._skip = skip or None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def ingest(self, batch: Batch) -> Outcome:
        events = batch.events
        outcome = await self._engine.ingest(batch)
        if isinstance(outcome, Accepted):
            for event in events:
                event.skip_user_properties_sync = self._skip
            batch.events = events
            self._beside.applied(*self._beside.fold([batch], now_ms=outcome.server_upload_ms))
        return outcome


class _Wire:
    """A connection that is none. named: who had to wait for a rate, who for a quota."""

    def __init__(self, ingest: Ingest, path: str, clock: VirtualClock) -> None:
        self._ingest = ingest
        self._endpoint = ingest.endpoints[path]
        self._clock = clock
        self.throttled: dict[tuple[str, str], None] = {}
        self.quota: dict[tuple[str, str], None] = {}

    async def open(self) -> Answer | None:
        """Nothing has to be opened."""

    async def post(self, body: list[bytes | memoryview]) -> Answer:
        """Have one request answered."""
        message: dict[str, Any] = {
            "type": "http.request",
            "body": b"".join(body),
            "more_body": False,
        }

        async def receive() -> dict[str, Any]:
            return message

        scope = {"headers": [], "client": _REMOTE, "query_string": b""}
        self._clock.begin()
        try:
            said = await self._ingest.answer(self._endpoint, scope, receive)
            self._clock.spend(len(message["body"]) / _BYTES_PER_S)
        finally:
            self._clock.end()
        assert said is not None
        pause = next((value for name, value in said.headers if name == "retry-after"), "")
        answer = Answer(said.status, said.body, pause)
        if said.status == 429:
            self._note(answer)
        return answer

    def _note(self, answer: Answer) -> None:
        refusal = judge(answer, 0, self._clock.now()).refusal
        for kind, rate, quota in (
            ("device", refusal.devices, refusal.quota_devices),
            ("user", refusal.users, refusal.quota_users),
        ):
            self.throttled.update(((kind, one), None) for one in rate)
            self.quota.update(((kind, one), None) for one in quota)

    def close(self) -> None:
        """Nothing."""


class Scratch:
    """A seeded directory with its engine open, and perhaps one beside it. Use `opened`."""

    def __init__(self, engine: Engine, beside: Engine | None, clock: VirtualClock) -> None:
        self.engine = engine
        self.beside = beside
        self.clock = clock
        self.reader = engine.reader()

    async def send(
        self, stage: Path, found: Manifest, profile: Profile, *, path: str, folder: Path
    ) -> Sent:
        """Send a stage, whole. folder: for the journal. Raises StoreError, FinalError."""
        journal = Journal(folder, threaded=False)
        try:
            feed = Feed(stage, found, profile.rates, journal.done())
            ingest = Ingest(clock=self.clock, metrics=Metrics())
            engine: Any = self.engine
            if self.beside is not None:
                other = not found.options.skip_user_properties_sync
                engine = _Both(self.engine, self.beside, skip=other)
            ingest.engine = engine
            wires = [_Wire(ingest, path, self.clock) for _ in range(profile.connections)]
            sender = Sender(
                feed=feed,
                journal=journal,
                profile=profile,
                api_key=KEYS.api_key,
                wires=wires,
                clock=self.clock,
                chance=lambda: 0.0,
                progress_s=HOUR_S,
            )
            began = self.clock.now()
            outcome = await self.clock.run(asyncio.ensure_future(sender.run()))
        finally:
            journal.close()
        if not outcome.complete:
            raise StoreError(
                f"The rehearsal stopped: {outcome.reason or outcome.progress.problem}",
                where=str(folder),
            )
        return Sent(
            outcome.progress.taken,
            outcome.progress.requests,
            outcome.progress.bytes,
            self.engine.figures.duplicates,
            _refused(folder),
            sorted({one for wire in wires for one in wire.throttled}),
            sorted({one for wire in wires for one in wire.quota}),
            self.clock.now() - began,
        )


def _refused(folder: Path) -> dict[str, int]:
    ledger = Ledger(folder)
    try:
        return dict(ledger.dead())
    finally:
        ledger.close()


@contextlib.asynccontextmanager
async def opened(root: Path, beside: Path | None, clock: VirtualClock) -> AsyncIterator[Scratch]:
    """Open a seeded directory, and one beside it that is to follow with the other setting."""
    async with _engine(root, clock) as engine:
        await engine.start()
        if beside is None:
            yield Scratch(engine, None, clock)
            return
        async with _engine(beside, clock) as other:
            yield Scratch(engine, other, clock)


@contextlib.asynccontextmanager
async def _engine(root: Path, clock: VirtualClock) -> AsyncIterator[Engine]:
    # The settings of the project name every limit.
    settings = Settings(data=root, limits="none")
    engine = await asyncio.to_thread(lambda: Engine.open(settings, clock=clock, sealer=_Inside))
    try:
        yield engine
    finally:
        await engine.abandon()
