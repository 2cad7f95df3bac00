"""Sending: the schedule says what goes next, the journal is synced, the request leaves, its answer is carried out.

One loop, no threads but the journal's. `_pump` makes requests while connections are idle; `_deliver` carries one request
through to an answer that decides: it repeats the same bytes for as long as nobody knows whether they were stored, and
`_settle` does what the answer asks for. The rules for every status: contract, ingest 7.

- 200: its rows are taken, as soon as the journal is synced. 400: listed events become dead letters, the rest goes again;
  without a usable list the request is halved until the event is found. 413: halved. A lone event is a dead letter.
- 429: the named ids wait, everyone else goes on. Unnamed: its people wait and then go one by one, which finds the hot one.
- 408, 5xx, no answer, half an answer: the same request again after 1, 2, 4 … 60 s and a little chance, for ever.

A person's rows never overtake each other: a work is in one request, and what is refused goes back to its front.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
from isal import igzip
from msgspec import Struct

from retrofill.backfill.destination import Answer, Judgement, judge
from retrofill.backfill.feed import Cut, Feed
from retrofill.backfill.journal import UNSURE, Dead, Final, Journal
from retrofill.backfill.profile import Profile
from retrofill.core.schedule import HOUR_S, Kind, Piece, Request, Schedule, Stretch, Work
from retrofill.errors import FinalError

BACKOFF_FIRST_S = 1.0  # contract, ingest 7
BACKOFF_LAST_S = 60.0
JITTER = 0.25  # ours: part of a pause that chance adds
THROTTLED_S = 15.0  # contract, ingest 7: at least so long waits who was throttled
BLIND_THROTTLES = (
    3  # ours: so many 429 without names in a row, and it is the whole project that is throttled
)
FORBIDDEN_MAX = (
    5  # ours: 401, 403, 404 … so often before anything was ever taken, and the destination is wrong
)
LONE_REFUSED_MAX = (
    50  # ours: so many lone events refused without a reason before anything was ever taken
)
MEMORY_MARGIN_S = 3600.0  # ours: a destination's memory is trusted this much less than it promises
GROW_AFTER = 32  # ours: so many full requests taken after a 413, and larger ones are tried again
GROW_BY = 1.25
READY_ROWS = 8192  # ours: rows kept ready to go
LOADED_BYTES = 32 * 1024 * 1024  # ours: text in memory
SHELVE_S = 60.0  # ours: a lane that sleeps longer gives its place to another
PROGRESS_S = 1.0  # ours: how often the journal notes how far the run is
HEAD = b'","events":['
TAIL = b'],"options":{"min_id_length":1}}'


class Timer(Protocol):
    """What `Clock.later` returns."""

    def cancel(self) -> None:
        """Do not call."""


class Clock(Protocol):
    """Time as the sender knows it: seconds since the epoch, never jumping."""

    def now(self) -> float:
        """Seconds since the epoch."""

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call something after a while."""


class Wire(Protocol):
    """A connection that carries one request at a time."""

    async def open(self) -> Answer | None:
        """Connect, if it is not; an answer says why that is not possible."""

    async def post(self, body: list[bytes | memoryview]) -> Answer:
        """Send one request and wait for its answer."""

    def close(self) -> None:
        """Drop the connection."""


class Progress(Struct):
    """How far a run is. Events, but for `requests`, `held` (ids that wait), `flying` (requests) and `rate` (a second)."""

    total: int = 0
    taken: int = 0  # in this run, synced
    before: int = 0  # rows that earlier runs settled
    dead: int = 0
    unsure: int = 0
    requests: int = 0
    held: int = 0
    flying: int = 0
    retrying: int = 0
    throttles: int = 0
    bytes: int = 0
    rate: float = 0.0
    last_ok: float = 0.0
    rest_s: float = 0.0  # until the last id that waits may go on
    problem: str = ""

    @property
    def left(self) -> int:
        """What is neither taken, dead nor unsure."""
        return self.total - self.before - self.taken - self.dead - self.unsure


class Outcome(Struct, frozen=True):
    """How a run ended. complete: every good row is acknowledged. reason: why it ended before, if it did."""

    complete: bool
    reason: str
    progress: Progress


class Flight:
    """One request on its way. cuts: the rows of each of its pieces, in order; texts: theirs."""

    __slots__ = ("cuts", "id", "request", "sent", "texts", "tries", "uncertain_since")

    def __init__(self, number: int, request: Request, cuts: list[list[Cut]]) -> None:
        self.id = number
        self.request = request
        self.cuts = cuts
        self.texts = [cut.block.text(cut.start, cut.stop) for one in cuts for cut in one]
        self.sent = 0.0
        self.tries = 0
        self.uncertain_since: float | None = None

    def at(self, index: int) -> tuple[int, Cut]:
        """The piece and the row, as a cut of one, of an index within the request."""
        for place, cuts in enumerate(self.cuts):
            for cut in cuts:
                if index < cut.count:
                    return place, Cut(cut.block, cut.start + index, cut.start + index + 1)
                index -= cut.count
        raise IndexError(index)


class Sender:
    """Sends what a feed holds, until all of it is settled or it is told to stop."""

    def __init__(
        self,
        *,
        feed: Feed,
        journal: Journal,
        profile: Profile,
        api_key: str,
        wires: Iterable[Wire],
        clock: Clock,
        chance: Callable[[], float],
        gzip: bool = False,
        give_up_after_s: float | None = None,
        progress_s: float = PROGRESS_S,
    ) -> None:
        """wires: as many as requests may be under way. chance: a number from 0 to 1, for jitter."""
        self._feed = feed
        self._journal = journal
        self._profile = profile
        self._clock = clock
        self._chance = chance
        self._gzip = gzip
        self._give_up_after_s = give_up_after_s
        self._progress_s = progress_s
        self._head = b'{"api_key":"' + _text(api_key) + HEAD
        self._idle = list(wires)
        self._wires = list(self._idle)
        self._flying: set[asyncio.Task[None]] = set()
        self._pauses: set[asyncio.Future[None]] = set()
        self._timer: Timer | None = None
        self._timer_at = math.inf
        self._stopping = ""
        self._broken: BaseException | None = None
        self._paused_until = 0.0
        self._blind = 0
        self._forbidden = 0
        self._lone_refused = 0
        self._fitted = 0  # full requests taken since the last 413
        self._ended: asyncio.Event | None = None
        self._events_of: dict[int, int] = {}
        self._ever_taken = False
        self.schedule = Schedule(profile.rates)
        self.schedule.left = feed.left
        self._full = self.schedule.request_events
        self.progress = Progress(total=feed.left)
        journal.on_taken = self._synced

    # From outside

    async def run(self) -> Outcome:
        """Send until everything is settled or `stop` is called. Raises StoreError, FinalError."""
        self._ended = asyncio.Event()
        began = self.progress.last_ok = self._clock.now()
        self._recall()
        ticking = self._tick()
        try:
            self._pump()
            await self._ended.wait()
            if self._flying:
                await asyncio.gather(*self._flying, return_exceptions=True)
            if self._broken is None:
                await self._journal.flushed()
            self.progress.rate = self.progress.taken / max(1e-3, self._clock.now() - began)
            self.progress.flying = 0
        finally:
            ticking.cancel()
            if self._timer is not None:
                self._timer.cancel()
            for wire in self._wires:
                wire.close()
        if self._broken is not None:
            raise self._broken
        whole = self.progress.left == 0 and self.progress.unsure == 0 and not self._stopping
        return Outcome(whole, self._stopping, self.progress)

    def stop(self, reason: str = "stopped") -> None:
        """Make no more requests; those under way get their answer, those waiting to be repeated stay in the journal."""
        self._stopping = self._stopping or reason
        for pause in list(self._pauses):
            if not pause.done():
                pause.set_result(None)
        self._check_end()

    # Making requests

    def _recall(self) -> None:
        """Take over what earlier runs did to quotas and updates; of the last second nobody knows, so it must pass."""
        now = self._clock.now()
        rates = self._profile.rates
        if self._journal.next_id > 1 and (
            rates.events_per_s or rates.requests_per_s or rates.by_id
        ):
            self._paused_until = now + 1.01
        if rates.quota_per_day:
            for kind, name, hour, count in self._journal.arrivals(int(now // HOUR_S) - 23):
                kind_: Kind = "device" if kind == "device" else "user"
                self.schedule.arrived(kind_, name, count, hour * HOUR_S)
        if rates.updates_per_h and self._journal.next_id > 1:
            before = self._journal.answered_since(int((now - HOUR_S) * 1000))
            for at_ms, person, count in self._feed.updates(before):
                self.schedule.arrived("person", str(person), count, at_ms / 1000)

    def _pump(self) -> None:
        """Make requests while there are idle connections and something may go."""
        if self._stopping or self._broken is not None:
            self._check_end()
            return
        now = self._clock.now()
        if now < self._paused_until:
            self._wake_at(self._paused_until)
            return
        self._load(now)
        while self._idle:
            request = self.schedule.take(now)
            if request is None:
                break
            self._launch(request)
            if self.schedule.ready_rows < self._low:
                self._load(now)
        times = [t for t in (self.schedule.wake, self._feed.shelf_s) if t is not None]
        if times and self._idle:
            self._wake_at(min(times))
        self._journal.kick()
        self._check_end()

    @property
    def _low(self) -> int:
        return max(READY_ROWS, 4 * self._profile.rates.events_per_request)

    def _load(self, now: float) -> None:
        """Read more rows where few are ready."""
        feed, schedule = self._feed, self.schedule
        if feed.at_end:
            return
        while feed.loaded[0] < LOADED_BYTES or schedule.empty:
            if feed.lanes_wait(now):
                self._offer(feed.open_lane())
            elif feed.streaming and schedule.ready_rows < self._low:
                self._offer(feed.bundle())
            else:
                break
        if feed.lanes_full:
            for until, work in schedule.withdraw_sleepers(now + SHELVE_S):
                if not feed.shelve(work, until):
                    schedule.offer(work)

    def _offer(self, works: list[Work]) -> None:
        for work in works:
            self.schedule.offer(work)

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._clock.later(max(0.0, when - self._clock.now()), self._woken)

    def _woken(self) -> None:
        self._timer, self._timer_at = None, math.inf
        self._guarded(self._pump)

    def _launch(self, request: Request) -> None:
        cuts = [self._cut_off(piece) for piece in request.pieces]
        flight = Flight(self._journal.next_id, request, cuts)
        self._journal.next_id += 1
        flight.sent = self._clock.now()
        size = self._size(flight)
        self._journal.sent(
            flight.id,
            [cut.span for cuts in flight.cuts for cut in cuts],
            events=request.events,
            size=size,
            now_ms=int(flight.sent * 1000),
        )
        self._count_quota(request)
        self._events_of[flight.id] = request.events
        self.progress.requests += 1
        self.progress.bytes += size
        task = asyncio.get_running_loop().create_task(self._deliver(flight, self._idle.pop()))
        self._flying.add(task)
        task.add_done_callback(self._landed)

    def _cut_off(self, piece: Piece) -> list[Cut]:
        """Take the first rows of a work out of its rows at hand."""
        queue = self._feed.cuts[piece.work.key]
        left = piece.count
        found: list[Cut] = []
        while left:
            head = queue[0]
            if head.count <= left:
                found.append(queue.popleft())
                left -= head.count
            else:
                found.append(Cut(head.block, head.start, head.start + left))
                queue[0] = Cut(head.block, head.start + left, head.stop)
                left = 0
        return found

    def _count_quota(self, request: Request) -> None:
        """Note for later runs what counts against daily quotas."""
        if not self._profile.rates.quota_per_day:
            return
        hour = int(self._clock.now() // HOUR_S)
        for piece in request.pieces:
            for stretch in piece.stretches:
                for kind, name in _ids(stretch):
                    self._journal.arrived(kind, name, hour, stretch.count)

    # One request, from leaving to its answer

    async def _deliver(self, flight: Flight, wire: Wire) -> None:
        try:
            await self._journal.flushed()
            if self._too_large(flight):
                self._settle_large(flight)
                return
            judgement = await self._answered(flight, wire)
            if judgement is not None:
                self._settle(flight, judgement)
        finally:
            self._idle.append(wire)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._flying.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._break(task.exception())
        self._guarded(self._pump)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as problem:  # noqa: BLE001 - it is raised again by `run`
            self._break(problem)

    def _break(self, problem: BaseException | None) -> None:
        self._broken = self._broken or problem
        self.stop("failed")

    def _check_end(self) -> None:
        if self._ended is None or self._flying:
            return
        if (
            self._stopping
            or self._broken is not None
            or (self._feed.at_end and self.schedule.empty)
        ):
            self._ended.set()

    def _body(self, flight: Flight) -> list[bytes | memoryview]:
        parts: list[bytes | memoryview] = [self._head]
        for text in flight.texts:
            parts += (text, b",")
        parts[-1] = TAIL
        if self._gzip:
            return [igzip.compress(b"".join(parts), 1)]
        return parts

    def _too_large(self, flight: Flight) -> bool:
        return self._size(flight) > self._profile.body_bytes and flight.request.events > 1

    def _size(self, flight: Flight) -> int:
        return len(self._head) + len(TAIL) + sum(map(len, flight.texts)) + len(flight.texts)

    async def _answered(self, flight: Flight, wire: Wire) -> Judgement | None:
        """Send a request until an answer decides. None: the run stops, or nobody may send it any more."""
        body = self._body(flight)
        while True:
            flight.tries += 1
            problem = await wire.open()
            at = flight.sent = self._clock.now()
            self.schedule.leaves(flight.request, at)
            answer = problem or await wire.post(body)
            judgement = judge(answer, flight.request.events, self._clock.now())
            if judgement.verdict not in {"again", "forbidden"}:
                self._measure(self._clock.now() - at)
                return judgement
            self.progress.problem = judgement.problem
            if judgement.uncertain and flight.uncertain_since is None:
                flight.uncertain_since = at
            if judgement.verdict == "forbidden":
                self._count_forbidden(judgement)
            pause = max(judgement.retry_after_s, self._backoff(flight.tries))
            if not await self._wait_to_repeat(flight, pause):
                self._close(flight, judgement.status)
                return None
            if self._forgotten(flight):
                self._settle_unsure(flight)
                return None

    def _backoff(self, tries: int) -> float:
        pause = min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2.0 ** min(tries - 1, 10))
        return pause * (1 + JITTER * self._chance()) + 0.01

    async def _wait_to_repeat(self, flight: Flight, pause: float) -> bool:
        """Wait for the pause and for the limits. False when the run stops first."""
        self.progress.retrying += 1
        try:
            when = self._clock.now() + pause
            while not self._stopping:
                await self._sleep(when - self._clock.now())
                if self._stopping:
                    break  # type: ignore[unreachable] # it was set while we slept
                now = self._clock.now()
                when = (
                    max(self._paused_until, self.schedule.again(flight.request, now))
                    if (now >= self._paused_until)
                    else self._paused_until
                )
                if when <= now:
                    self._count_quota(flight.request)
                    return True
            return False
        finally:
            self.progress.retrying -= 1

    async def _sleep(self, seconds: float) -> None:
        done = asyncio.get_running_loop().create_future()
        timer = self._clock.later(
            max(0.0, seconds), lambda: None if done.done() else done.set_result(None)
        )
        self._pauses.add(done)
        try:
            await done
        finally:
            timer.cancel()
            self._pauses.discard(done)

    def _measure(self, seconds: float) -> None:
        self.schedule.round_trip_s += 0.05 * (seconds - self.schedule.round_trip_s)

    def _forgotten(self, flight: Flight) -> bool:
        """Whether the destination may hold the rows and no longer know their insert_ids."""
        days = self._profile.memory_days
        if not days or flight.uncertain_since is None:
            return False
        age = self._clock.now() - flight.uncertain_since
        return age > days * 86_400 - MEMORY_MARGIN_S

    def _count_forbidden(self, judgement: Judgement) -> None:
        self._forbidden += 1
        if not self._ever_taken and self._forbidden >= FORBIDDEN_MAX:
            raise FinalError(
                f"The destination answers {judgement.problem} to every request",
                mend="Check --to and the API key, then run the same line again",
            )

    # What an answer asks for

    def _settle(self, flight: Flight, judgement: Judgement) -> None:
        match judgement.verdict:
            case "taken":
                self._settle_taken(flight, judgement)
            case "throttled":
                self._settle_throttled(flight, judgement)
            case "large":
                self._settle_large(flight)
            case _:
                self._settle_refused(flight, judgement)

    def _close(self, flight: Flight, status: int, server_upload_ms: int = 0) -> None:
        since = flight.uncertain_since
        self._journal.answered(
            Final(
                flight.id,
                flight.tries,
                status,
                server_upload_ms,
                int(self._clock.now() * 1000),
                None if since is None else int(since * 1000),
            )
        )

    def _synced(self, final: Final) -> None:
        """A request's end is on disk: only now does it count."""
        events = self._events_of.pop(final.id, 0)
        if final.status == 200:
            self.progress.taken += events

    def _settle_taken(self, flight: Flight, judgement: Judgement) -> None:
        self._close(flight, 200, judgement.server_upload_ms)
        self.progress.last_ok = self._clock.now()
        self.progress.problem = ""
        self._ever_taken = True
        self._blind = self._lone_refused = 0
        self._grow(flight.request.events)
        for piece in flight.request.pieces:
            piece.work.cap = 0
            piece.work.alone = False
            self._go_on(piece.work)

    def _go_on(self, work: Work) -> None:
        """A work is in no request any more."""
        while self._feed.wants_more(work):
            if self._feed.extend(work) == 0 and work.rows == 0:
                break
        if work.rows:
            self.schedule.offer(work)
        else:
            self._feed.finished(work)

    def _returned(
        self,
        flight: Flight,
        dropped: set[tuple[int, int]] | None = None,
        *,
        by_person: bool = False,
    ) -> list[Work]:
        """Put the rows of a request back to the front of their works, but for dropped ones. `_go_on` with each.

        Where limits look at ids, or by_person is set, a bundle falls apart into its people: what has arrived counts.
        """
        works: list[Work] = []
        by_person = by_person or self.schedule.rates.by_id
        for piece, cuts in zip(flight.request.pieces, flight.cuts, strict=True):
            work = piece.work
            kept, stretches = _without(cuts, piece.stretches, dropped or set())
            self._feed.cuts[work.key].extendleft(reversed(kept))
            self.schedule.put_back(Piece(work, sum(cut.count for cut in kept), stretches))
            if work.stretches is None and by_person:
                self._count_arrived(cuts, flight.sent)
                works += self._by_person(work)
            else:
                works.append(work)
        return works

    def _count_arrived(self, cuts: list[Cut], at: float) -> None:
        if not self.schedule.rates.by_id:
            return
        # What went before of the first one's rows may have arrived just now as well.
        before = self._feed.stretches_before(cuts[0])
        for stretch in [*before, *self._feed.stretches(cuts)]:
            for kind, name in _ids(stretch):
                self.schedule.arrived(kind, name, stretch.count, at)

    def _by_person(self, work: Work) -> list[Work]:
        """A work of each person in a work, with stretches, so that one who must wait holds up nobody else."""
        if work.long:
            work.stretches = deque(self._feed.stretches(self._feed.cuts[work.key]))
            return [work]
        return self._feed.by_person(self._feed.cuts.pop(work.key))

    def _bury(self, cut: Cut, reason: str) -> tuple[int, int]:
        """Make a dead letter of one row."""
        span = cut.span
        self._journal.died(Dead(span.set, span.first, reason, self._feed.letter(cut, reason)))
        self.progress.dead += 1
        return span.set, span.first

    def _settle_unsure(self, flight: Flight) -> None:
        self._close(flight, UNSURE)
        self.progress.unsure += flight.request.events
        for piece in flight.request.pieces:
            self._go_on(piece.work)

    def _settle_large(self, flight: Flight) -> None:
        self._close(flight, 413)
        events = flight.request.events
        if not any(piece.work.cap for piece in flight.request.pieces):
            self.schedule.request_events = max(1, min(self.schedule.request_events, events // 2))
            self._fitted = 0
        self._halve(flight, "Payload too large")

    def _grow(self, events: int) -> None:
        """After a 413 requests are smaller; try larger ones again when the smaller were taken for a while."""
        now = self.schedule.request_events
        if now == self._full or events < now:
            return
        self._fitted += 1
        if self._fitted >= GROW_AFTER:
            self._fitted = 0
            self.schedule.request_events = min(self._full, math.ceil(now * GROW_BY))

    def _settle_refused(self, flight: Flight, judgement: Judgement) -> None:
        refusal = judgement.refusal
        error = refusal.error
        if error.startswith("Invalid API key"):
            raise FinalError(
                "The destination does not know the API key",
                mend="Check the key and the region (amplitude or amplitude-eu)",
            )
        if refusal.missing_field:
            raise FinalError(
                f"The destination misses {refusal.missing_field!r} in the request: {error}",
                mend="Check --to: this may be no address that takes batches of events",
            )
        self._close(flight, judgement.status)
        if refusal.names_someone:
            self._hold(flight, judgement)
        if refusal.listed:
            dropped = {
                self._bury(flight.at(index)[1], reason) for index, reason in refusal.listed.items()
            }
            self._lone_refused = 0
            for work in self._returned(flight, dropped, by_person=refusal.names_someone):
                self._go_on(work)
        elif refusal.names_someone:
            for work in self._returned(flight, by_person=True):
                self._go_on(work)
        else:
            self._halve(flight, error or f"refused with {judgement.status}")

    def _halve(self, flight: Flight, reason: str) -> None:
        """Send the rows of a request again in halves; a lone one is a dead letter."""
        events = flight.request.events
        if events > 1:
            for work in self._returned(flight):
                work.cap = (events + 1) // 2
                self._go_on(work)
            return
        cut = flight.cuts[0][0]
        self._lone_refused += 1
        if not self._ever_taken and self._lone_refused > LONE_REFUSED_MAX:
            raise FinalError(
                f"The destination refuses every event: {reason}",
                mend="Look at dead-letters-send.ndjson and correct the mapping or --to; once the destination is mended, "
                "`retrofill resend --refused` sends all of it",
            )
        dropped = {self._bury(cut, reason)}
        for work in self._returned(flight, dropped):
            work.cap = 0
            self._go_on(work)

    def _settle_throttled(self, flight: Flight, judgement: Judgement) -> None:
        self._close(flight, 429)
        self.progress.throttles += 1
        self.progress.problem = judgement.problem
        refusal = judgement.refusal
        if refusal.names_someone:
            self._hold(flight, judgement)
        else:
            self._hold_blindly(flight, judgement)
        works = self._returned(flight, by_person=True)
        for work in works:
            work.alone = not refusal.names_someone
        if refusal.eps_threshold and self.schedule.learn(refusal.eps_threshold):
            self._feed.rates = self.schedule.rates
            works += [
                one for work in self.schedule.withdraw_safe() for one in self._by_person(work)
            ]
        for work in works:
            self._go_on(work)

    def _hold(self, flight: Flight, judgement: Judgement) -> None:
        """Let the named ids wait; those of a quota until it is said, or until the next full hour."""
        refusal, now = judgement.refusal, self._clock.now()
        until = now + max(THROTTLED_S, judgement.retry_after_s)
        hour = (now // HOUR_S + 1) * HOUR_S
        quota = now + judgement.retry_after_s if judgement.retry_after_s else max(hour, until)
        named: list[tuple[Kind, frozenset[str], float]] = [
            ("device", refusal.devices, until),
            ("user", refusal.users, until),
            ("device", refusal.quota_devices, quota),
            ("user", refusal.quota_users, quota),
        ]
        for kind, names, when in named:
            for name in names:
                self.schedule.hold(kind, name, when)
        known = {"device": refusal.devices | refusal.quota_devices}
        known["user"] = refusal.users | refusal.quota_users
        for index in refusal.throttled:
            span = flight.at(index)[1].span
            row = self._feed.row(span.set, span.first)
            if row.device not in known["device"] and row.user not in known["user"]:
                # A device_id that was not sent, and so has a name we do not know, say: the person waits.
                only_quota = not (refusal.devices or refusal.users) and bool(
                    refusal.quota_devices or refusal.quota_users
                )
                self.schedule.hold("person", str(row.person), quota if only_quota else until)

    def _hold_blindly(self, flight: Flight, judgement: Judgement) -> None:
        """Nobody is named: the people of the request wait. If that goes on, it is the project that is throttled."""
        until = self._clock.now() + max(THROTTLED_S, judgement.retry_after_s)
        self._blind += 1
        if self._blind >= BLIND_THROTTLES:
            self._paused_until = max(self._paused_until, until)
        for cuts in flight.cuts:
            for cut in cuts:
                for person in set(cut.block.people[cut.start : cut.stop].tolist()):
                    self.schedule.hold("person", str(person), until)

    # Keeping watch

    def _tick(self) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._ticking())

    async def _ticking(self) -> None:
        """Once a second: note how far we are, give up when it is time."""
        before, at = 0, self._clock.now()
        while True:
            await self._nap(self._progress_s)
            now = self._clock.now()
            one = self.progress
            one.rate = (one.taken - before) / max(1e-3, now - at)
            before, at = one.taken, now
            one.held = self.schedule.held(now)
            one.rest_s = self.schedule.held_until(now) - now
            one.flying = len(self._flying)
            self._journal.progressed(
                int(now * 1000),
                taken=one.before + one.taken,
                dead=one.dead,
                held=one.held,
                flying=one.flying,
            )
            limit = self._give_up_after_s
            if limit is not None and now - one.last_ok > limit and not self._stopping:
                self.stop(f"no acknowledgement for {limit:g} s; {one.problem or _waiting(one)}")

    async def _nap(self, seconds: float) -> None:
        done = asyncio.get_running_loop().create_future()
        timer = self._clock.later(seconds, lambda: None if done.done() else done.set_result(None))
        try:
            await done
        finally:
            timer.cancel()


def _waiting(one: Progress) -> str:
    if one.held:
        return f"{one.held:,} throttled ids wait, the last for {one.rest_s:,.0f} s more"
    return "no answer"


def _ids(stretch: Stretch) -> list[tuple[Kind, str]]:
    ids: list[tuple[Kind, str | None]] = [("device", stretch.device), ("user", stretch.user)]
    return [(kind, name) for kind, name in ids if name is not None]


def _text(key: str) -> bytes:
    """An API key as it stands inside a JSON string."""
    return msgspec.json.encode(key)[1:-1]


def _without(
    cuts: list[Cut], stretches: list[Stretch], dropped: set[tuple[int, int]]
) -> tuple[list[Cut], list[Stretch]]:
    """Cuts and stretches of a piece without the dropped rows, given as (set, row)."""
    if not dropped:
        return cuts, stretches
    kept: list[Cut] = []
    gone: list[int] = []  # places within the piece
    place = 0
    for cut in cuts:
        start = cut.start
        for at in range(cut.start, cut.stop):
            if (cut.block.set, cut.block.first + at) in dropped:
                if at > start:
                    kept.append(Cut(cut.block, start, at))
                start = at + 1
                gone.append(place + at - cut.start)
        if cut.stop > start:
            kept.append(Cut(cut.block, start, cut.stop))
        place += cut.count
    left: list[Stretch] = []
    first = 0
    for stretch in stretches:
        last = first + stretch.count
        count = stretch.count - sum(first <= index < last for index in gone)
        if count:
            left.append(stretch._replace(count=count))
        first = last
    return kept, left
