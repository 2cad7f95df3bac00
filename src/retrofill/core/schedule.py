"""What may be sent now: the limits of a destination kept, and nobody held back by someone else.

`Work` is what one sender would send next, in order: the rows of one person, or of some whole people of whom none can
come near a limit. A work is in one request at a time, so that a person's events cannot overtake each other. `take`
makes one request out of the works that are ready: first the people with the longest way still to go (the longest
remaining time first is what ends soonest), then everybody else in turn. A work whose device, user or person is at its
limit sleeps until that limit gives room; the others go on.

A limit is a `Window`: arrivals that still count, each with the moment at which it stops counting. No window of that
length, wherever it begins, can then hold more than the limit. The limits over all are paced as well, so that requests
flow instead of coming in bursts: a person waits for each answer, and a burst a second would let them go once a second.
Every arrival counts, whatever is answered to it, and from when its request left: between `take` and that it is written to
the journal, at times for longer than at others. Counted when taken, what was late would fall into the next second.

Nothing here reads a clock: every call is given the time, in seconds since the epoch.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct

Kind = Literal["device", "user", "person"]

HOUR_S = 3600.0
DAY_S = 86_400.0
# Ours. Requests reach the destination a little unevenly: a second is kept as 1.005 s, so that one which was a few
# milliseconds late does not fall into the next one's window.
GUARD = 0.005
UPDATE_STEPS = 200  # ours: the hour of property updates is counted in so many steps
UPDATE_GUARD_S = 1.0  # ours: a request may reach the destination so much later than it left
CRITICAL = 0.7  # ours: share of the whole time from which a person's own way decides when it ends
LATE_S = 0.05  # ours: a pace that fell behind by at most this much catches up
METERS_SWEPT = 20_000  # ours: idle meters are dropped when there are more than these


class Rates(Struct, frozen=True, kw_only=True):
    """What a destination takes. 0 = no limit. Source: contract, ingest 3."""

    events_per_s: int = 0
    requests_per_s: int = 0
    device_per_s: int = 0  # events of one device in a second
    user_per_s: int = 0  # events of one user in a second
    events_per_request: int = 1000
    quota_per_day: int = 0  # events of one device or user in 24 rolling hours of 1 h steps
    updates_per_h: int = 0  # property updates of one person in a rolling hour; 0 when sync is off

    @property
    def by_id(self) -> bool:
        """Whether any limit looks at who an event belongs to."""
        return bool(
            self.device_per_s or self.user_per_s or self.quota_per_day or self.updates_per_h
        )

    @property
    def safe_rows(self) -> int:
        """A person with at most this many rows in all cannot reach a limit of their own; 0 = there is none."""
        limits = (self.device_per_s, self.user_per_s, self.quota_per_day, self.updates_per_h)
        return min((limit for limit in limits if limit), default=0)


class Stretch(NamedTuple):
    """Consecutive rows with the same ids. updates: whether each of them is a property update."""

    device: str | None
    user: str | None
    count: int  # type: ignore[assignment] # a tuple's own count is not wanted here
    updates: bool = False


class Window:
    """Arrivals that still count against a limit. release: when an arrival at a given time stops counting."""

    __slots__ = ("_log", "_release", "limit", "used")

    def __init__(self, limit: int, release: Callable[[float], float]) -> None:
        self.limit = limit
        self.used = 0
        self._release = release
        self._log: deque[tuple[float, int]] = deque()

    def room(self, now: float) -> int:
        """How many may arrive now. Negative when the limit was lowered below what has arrived."""
        log = self._log
        while log and log[0][0] <= now:
            self.used -= log.popleft()[1]
        return self.limit - self.used

    def add(self, now: float, count: int) -> None:
        """Count an arrival."""
        until = self._release(now)
        log = self._log
        if log and log[-1][0] >= until:
            until, before = log.pop()
            log.append((until, before + count))
        else:
            log.append((until, count))
        self.used += count

    def moved(self, count: int, *, since: float, to: float) -> None:
        """Count at a later time what was counted before: it left only then."""
        until = self._release(since)
        if self._release(to) == until:
            return
        log = self._log
        at = len(log)
        while at and log[at - 1][0] >= until:
            at -= 1
        if at < len(log) and log[at][1] >= count:  # else it has stopped counting already
            log[at] = (log[at][0], log[at][1] - count)
            self.used -= count
        self.add(to, count)

    def free_at(self, count: int) -> float:
        """When there will be room for so many. Beyond the limit: when the window is empty."""
        needed = self.used + min(count, self.limit) - self.limit
        until = 0.0
        for until, gone in self._log:  # noqa: B007 - the last one is the answer
            needed -= gone
            if needed <= 0:
                break
        return until


def _second(now: float) -> float:
    return now + 1.0 + GUARD


def _hour_of_updates(now: float) -> float:
    step = HOUR_S / UPDATE_STEPS
    return math.ceil((now + UPDATE_GUARD_S) / step) * step + HOUR_S


def _day_in_hours(now: float) -> float:
    return now // HOUR_S * HOUR_S + DAY_S


class Flow:
    """A limit over all in a second: never more in any second, and evenly within it."""

    __slots__ = ("_due", "limit", "window")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.window = Window(limit, _second)
        self._due = 0.0

    def room(self, now: float, *, early: int = 0, spare: int = 0) -> int:
        """How many may arrive now. early: so many may go before their turn. spare: so many places stay free."""
        due = self._due - early * (1.0 + GUARD) / self.limit
        return max(0, self.window.room(now) - spare) if now >= due else 0

    def add(self, now: float, count: int) -> None:
        """Count an arrival."""
        self.window.add(now, count)
        self._due = max(self._due, now - LATE_S) + count * (1.0 + GUARD) / self.limit

    def free_at(self, now: float, count: int, *, early: int = 0) -> float:
        """When there will be room for so many."""
        count = min(count, self.limit)
        due = self._due - early * (1.0 + GUARD) / self.limit
        return max(due, self.window.free_at(count) if self.window.room(now) < count else 0.0)


class Meter:
    """What limits one device, user or person."""

    __slots__ = ("held_until", "rate", "windows")

    def __init__(self, kind: Kind, rates: Rates) -> None:
        self.held_until = 0.0
        self.windows: list[Window] = []
        self.rate: Window | None = None
        self.slow_to(_per_second(kind, rates))
        if kind == "person" and rates.updates_per_h:
            self.windows.append(Window(rates.updates_per_h, _hour_of_updates))
        elif kind != "person" and rates.quota_per_day:
            self.windows.append(Window(rates.quota_per_day, _day_in_hours))

    def slow_to(self, per_second: int) -> None:
        """Set the limit for a second; 0 leaves it as it is."""
        if not per_second:
            return
        if self.rate is None:
            self.rate = Window(per_second, _second)
            self.windows.append(self.rate)
        self.rate.limit = per_second

    def room(self, now: float) -> float:
        """How many may arrive now."""
        if now < self.held_until:
            return 0
        return min((window.room(now) for window in self.windows), default=math.inf)

    def add(self, now: float, count: int) -> None:
        """Count an arrival."""
        for window in self.windows:
            window.add(now, count)

    def free_at(self, now: float, count: int) -> float:
        """When there will be room for so many."""
        times = [w.free_at(count) for w in self.windows if w.room(now) < min(count, w.limit)]
        return max([self.held_until, *times])

    def idle(self, now: float) -> bool:
        """Whether nothing here would be missed."""
        return now >= self.held_until and all(w.room(now) == w.limit for w in self.windows)


def _per_second(kind: Kind, rates: Rates) -> int:
    return {"device": rates.device_per_s, "user": rates.user_per_s, "person": 0}[kind]


class Work:
    """What one ordered sender sends next. It is in one request at a time.

    rows: how many are at hand. beyond: how many more will follow that are not at hand yet.
    stretches: whose rows these are, in order; None when nobody in it can come near a limit of their own.
    long: whether to go before those who have little left. cap: largest request it may be part of, 0 = any: a request
    with it was refused, and smaller ones show why. alone: it may share a request with nobody.
    """

    __slots__ = ("alone", "beyond", "cap", "key", "long", "person", "rows", "stretches")

    def __init__(
        self,
        key: int,
        rows: int,
        *,
        person: str = "",
        stretches: list[Stretch] | None = None,
        beyond: int = 0,
        long: bool = False,
    ) -> None:
        self.key = key
        self.rows = rows
        self.person = person
        self.stretches = None if stretches is None else deque(stretches)
        self.beyond = beyond
        self.long = long
        self.cap = 0
        self.alone = False


class Piece(NamedTuple):
    """So many rows of a work, as part of a request."""

    work: Work
    count: int  # type: ignore[assignment] # a tuple's own count is not wanted here
    stretches: list[Stretch]


class Request:
    """The pieces of one request and what they were charged to."""

    __slots__ = ("at", "charges", "events", "pieces")

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.charges: dict[Meter, int] = {}
        self.at = 0.0  # when it is counted to arrive
        self.events = 0


class Schedule:
    """Decides what goes into the next request, and when."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.wake: float | None = None
        self.request_events = _request_events(rates)
        self._events = Flow(rates.events_per_s) if rates.events_per_s else None
        self._requests = Flow(rates.requests_per_s) if rates.requests_per_s else None
        self._meters: dict[tuple[Kind, str], Meter] = {}
        self._swept_at = METERS_SWEPT
        self._long: list[tuple[int, int, Work]] = []
        self._light: deque[Work] = deque()
        self._suspects: deque[Work] = deque()
        self._asleep: list[tuple[float, int, Work]] = []
        self._turn = 0
        self._critical = False
        self.ready_rows = 0
        self.left = (
            0  # rows that are not sent yet, over all; the caller sets it, `take` counts it down
        )
        self.round_trip_s = 0.1  # how long an answer takes; the caller keeps it true

    # What is there to send

    def offer(self, work: Work) -> None:
        """Say that a work is in no request and may go."""
        if work.rows == 0:
            return
        self.ready_rows += work.rows
        self._turn += 1
        if work.cap or work.alone:
            self._suspects.append(work)
        elif work.long:
            heapq.heappush(self._long, (-(work.rows + work.beyond), self._turn, work))
        else:
            self._light.append(work)

    def put_back(self, piece: Piece) -> None:
        """Return a refused piece to the front of its work. `offer` the work afterwards."""
        piece.work.rows += piece.count
        self.left += piece.count
        if piece.work.stretches is not None:
            piece.work.stretches.extendleft(reversed(piece.stretches))

    def works(self) -> Iterator[Work]:
        """Every work that is in no request: ready or asleep."""
        yield from (work for *_, work in self._long)
        yield from self._light
        yield from self._suspects
        yield from (work for *_, work in self._asleep)

    def withdraw_safe(self) -> list[Work]:
        """Take back every work without stretches: a limit was lowered, and who is safe must be asked again."""
        found = [work for work in self.works() if work.stretches is None]
        self._long = [entry for entry in self._long if entry[2].stretches is not None]
        heapq.heapify(self._long)
        self._light = deque(work for work in self._light if work.stretches is not None)
        self._suspects = deque(work for work in self._suspects if work.stretches is not None)
        self.ready_rows -= sum(work.rows for work in found)
        return found

    def withdraw_sleepers(self, until: float) -> list[tuple[float, Work]]:
        """Take back the long works that sleep beyond a time, each with when it would wake."""
        found = [(t, work) for t, _, work in self._asleep if work.long and t > until]
        if found:
            keys = {work.key for _, work in found}
            self._asleep = [entry for entry in self._asleep if entry[2].key not in keys]
            heapq.heapify(self._asleep)
        return found

    @property
    def empty(self) -> bool:
        """Whether every work is in a request or gone."""
        return not (self._long or self._light or self._suspects or self._asleep)

    # Limits

    def hold(self, kind: Kind, name: str, until: float) -> None:
        """Let nothing of this device, user or person go before a time."""
        meter = self._meter(kind, name)
        meter.held_until = max(meter.held_until, until)

    def held(self, now: float) -> int:
        """How many devices, users and people are held."""
        return sum(now < meter.held_until for meter in self._meters.values())

    def held_until(self, now: float) -> float:
        """When the last of them may go on; now, if nobody is held."""
        return max([now, *(meter.held_until for meter in self._meters.values())])

    def learn(self, per_second: int) -> bool:
        """Take over a lower limit for each device and user that the destination named. True if it is news."""
        device = min(self.rates.device_per_s or per_second, per_second)
        user = min(self.rates.user_per_s or per_second, per_second)
        if per_second < 1 or (device, user) == (self.rates.device_per_s, self.rates.user_per_s):
            return False
        self.rates = msgspec.structs.replace(self.rates, device_per_s=device, user_per_s=user)
        for (kind, _), meter in self._meters.items():
            meter.slow_to(_per_second(kind, self.rates))
        return True

    def arrived(self, kind: Kind, name: str, count: int, at: float) -> None:
        """Count what arrived in the past: of an earlier run, or of a work that had no stretches."""
        self._meter(kind, name).add(at, count)

    # Requests

    def take(self, now: float) -> Request | None:
        """Make the next request, or say None: then `wake` is when to ask again, None if only new work can help."""
        self._rouse(now)
        self.wake = self._asleep[0][0] if self._asleep else None
        if not self.ready_rows:
            return None
        room = self._room(now)
        if room == 0:
            return None
        request = Request()
        if self._suspects:
            self._fill_suspects(request, room, now)
        if not request.pieces:
            self._fill(request, room, now)
        if not request.pieces:
            self.wake = self._asleep[0][0] if self._asleep else None
            return None
        self.left -= request.events
        self._count(request, now)
        return request

    def again(self, request: Request, now: float) -> float:
        """Count the same request once more: 0 if it may go now, else when to ask again."""
        waits = [f.free_at(now, n) for f, n in self._flows(request)]
        waits += [m.free_at(now, n) for m, n in request.charges.items() if m.room(now) < n]
        later = max(waits, default=0.0)
        if later > now:
            return later
        for meter, count in request.charges.items():
            meter.add(now, count)
        self._count(request, now)
        return 0.0

    def _flows(self, request: Request) -> list[tuple[Flow, int]]:
        pairs = ((self._events, request.events), (self._requests, 1))
        return [(flow, count) for flow, count in pairs if flow is not None]

    def leaves(self, request: Request, now: float) -> None:
        """Count a request when it really leaves: since it was taken it was written to the journal."""
        for flow, count in self._flows(request):
            flow.window.moved(count, since=request.at, to=now)
        for meter, count in request.charges.items():
            for window in meter.windows:
                window.moved(count, since=request.at, to=now)
        request.at = now

    def _count(self, request: Request, now: float) -> None:
        request.at = now
        for flow, count in self._flows(request):
            flow.add(now, count)
        if len(self._meters) > self._swept_at:
            self._meters = {k: m for k, m in self._meters.items() if not m.idle(now)}
            self._swept_at = max(METERS_SWEPT, 2 * len(self._meters))

    def _room(self, now: float) -> int:
        """How many events the next request may hold; 0 sets `wake`."""
        full = self.request_events
        ahead = bool(self._long)  # a long way still to go: may go one request before its turn
        spare = self._critical and not ahead  # the others leave one place for it
        if self._requests is not None and self._requests.room(now, early=ahead, spare=spare) < 1:
            later = self._requests.free_at(now, 1 + spare, early=ahead)
            self.wake = _sooner(self.wake, later)
            return 0
        if self._events is None:
            return full
        least = self._least()
        room = self._events.room(now, early=ahead * full, spare=spare * full)
        if room < least:
            later = self._events.free_at(now, least + spare * full, early=ahead * full)
            self.wake = _sooner(self.wake, later)
            return 0
        return min(room, full)

    def _is_critical(self, work: Work) -> bool:
        """Whether this person's own way, one answer after another, takes about as long as all the rest."""
        flow = self._events
        if flow is None or 4 * self.request_events > flow.limit:
            return False
        way = (work.rows + work.beyond) / self.request_events * self.round_trip_s
        return way > CRITICAL * self.left / flow.limit

    def _least(self) -> int:
        """The smallest request that is worth its place when the events of this second are nearly used up."""
        full, rates = self.request_events, self.rates
        assert self._events is not None
        rest = self._events.limit % full
        ample = not rates.requests_per_s or rates.requests_per_s * full > 1.2 * rates.events_per_s
        return min(full, rest or full, max(1, full // 8) if ample else full)

    def _fill(self, request: Request, room: int, now: float) -> None:
        while room > 0:
            if self._long:
                work = heapq.heappop(self._long)[2]
                if not request.events:
                    self._critical = self._is_critical(work)
            elif self._light:
                work = self._light.popleft()
            else:
                return
            room -= self._add(request, work, room, now)

    def _fill_suspects(self, request: Request, room: int, now: float) -> None:
        """Smaller requests of works that were refused together."""
        later: list[Work] = []
        shared = False
        while room > 0 and self._suspects:
            work = self._suspects.popleft()
            cap = work.cap or room
            if request.events and (work.alone or shared or cap <= request.events):
                later.append(work)
                continue
            took = self._add(request, work, min(room, cap - request.events), now)
            room = min(room - took, cap - request.events)
            shared = shared or (took > 0 and work.alone)
        self._suspects.extendleft(reversed(later))

    def _add(self, request: Request, work: Work, room: int, now: float) -> int:
        """Add as much of a work as may go; if nothing may, it sleeps."""
        self.ready_rows -= work.rows
        if work.stretches is None:
            count = min(room, work.rows)
            taken: list[Stretch] = []
        else:
            count, taken, until = self._charge(request, work, room, now)
            if count == 0:
                self._turn += 1
                heapq.heappush(self._asleep, (until, self._turn, work))
                return 0
        work.rows -= count
        request.events += count
        request.pieces.append(Piece(work, count, taken))
        return count

    def _charge(
        self, request: Request, work: Work, room: int, now: float
    ) -> tuple[int, list[Stretch], float]:
        """Charge the first rows of a work to everyone they belong to, as far as there is room."""
        taken: list[Stretch] = []
        total = 0
        stretches = work.stretches
        assert stretches is not None
        while total < room and stretches:
            head = stretches[0]
            meters = self._meters_of(work, head)
            wanted = min(head.count, room - total)
            count = int(min([wanted, *(meter.room(now) for meter in meters)]))
            if count <= 0:
                return total, taken, max(meter.free_at(now, 1) for meter in meters)
            for meter in meters:
                meter.add(now, count)
                request.charges[meter] = request.charges.get(meter, 0) + count
            taken.append(head._replace(count=count))
            total += count
            if count == head.count:
                stretches.popleft()
            else:
                stretches[0] = head._replace(count=head.count - count)
        return total, taken, 0.0

    def _meters_of(self, work: Work, stretch: Stretch) -> list[Meter]:
        rates = self.rates
        found: list[Meter | None] = []
        if stretch.device is not None:
            wanted = bool(rates.device_per_s or rates.quota_per_day)
            found.append(self._meter_if(wanted, "device", stretch.device))
        if stretch.user is not None:
            wanted = bool(rates.user_per_s or rates.quota_per_day)
            found.append(self._meter_if(wanted, "user", stretch.user))
        found.append(
            self._meter_if(bool(stretch.updates and rates.updates_per_h), "person", work.person)
            if stretch.updates
            else self._hold_only(work.person)
        )
        return [meter for meter in found if meter is not None]

    def _meter_if(self, wanted: bool, kind: Kind, name: str) -> Meter | None:  # noqa: FBT001 - a condition, not a mode
        return self._meter(kind, name) if wanted else self._meters.get((kind, name))

    def _hold_only(self, person: str) -> Meter | None:
        """A row that updates nothing is not counted for the person, but waits while the person is held."""
        meter = self._meters.get(("person", person))
        if meter is None or not meter.held_until:
            return None
        gate = Meter("user", Rates())
        gate.held_until = meter.held_until
        return gate

    def _meter(self, kind: Kind, name: str) -> Meter:
        meter = self._meters.get((kind, name))
        if meter is None:
            meter = self._meters[(kind, name)] = Meter(kind, self.rates)
        return meter

    def _rouse(self, now: float) -> None:
        while self._asleep and self._asleep[0][0] <= now:
            work = heapq.heappop(self._asleep)[2]
            self.offer(work)


def _sooner(first: float | None, second: float) -> float:
    return second if first is None else min(first, second)


def _request_events(rates: Rates) -> int:
    """How many events a full request holds: no more than a second's allowance, and dividing it if that costs nothing."""
    full = max(1, rates.events_per_request)
    limit = rates.events_per_s
    if not limit:
        return full
    full = min(full, limit)
    even = limit // math.ceil(limit / full)
    return even if even * math.ceil(limit / full) >= limit * (1 - GUARD / 5) else full


class Bound(NamedTuple):
    """The shortest time in which a history can be sent. reason: the limit that makes it so long."""

    seconds: float
    reason: str
    parts: dict[str, float]


def lower_bound(
    rates: Rates,
    *,
    events: int,
    hottest_device: int = 0,
    hottest_user: int = 0,
    longest_person: int = 0,
    most_updates: int = 0,
    round_trip_s: float = 0.1,
    start_s: float = 0.0,
) -> Bound:
    """Say how long sending must take at least, whoever does it.

    events: rows in all. hottest_*: rows of the device and of the user that has most. longest_person: rows of the person
    that has most. most_updates: property updates of one person. start_s: when it starts, seconds since the epoch: daily
    quotas count whole hours of the clock.
    """
    size = _request_events(rates)
    parts = {
        "events in all": _ratio(events, rates.events_per_s),
        "requests in all": _ratio(math.ceil(events / size), rates.requests_per_s),
        "hottest device": _ratio(hottest_device, rates.device_per_s),
        "hottest user": _ratio(hottest_user, rates.user_per_s),
        "daily quota": max(
            _quota_s(hottest_device, rates.device_per_s, rates.quota_per_day, start_s),
            _quota_s(hottest_user, rates.user_per_s, rates.quota_per_day, start_s),
        ),
        "property updates": HOUR_S * _steps(most_updates, rates.updates_per_h),
        "longest person": math.ceil(longest_person / size) * round_trip_s,
    }
    reason = max(parts, key=lambda part: parts[part])
    return Bound(parts[reason], reason, parts)


def _ratio(count: int, limit: int) -> float:
    return count / limit if limit else 0.0


def _steps(count: int, limit: int) -> int:
    return (count - 1) // limit if limit and count else 0


def _quota_s(count: int, per_s: int, quota: int, start_s: float) -> float:
    """How long one id takes when it sends as early as its rate and its quota allow, hour by hour of the clock."""
    if not _steps(count, quota):
        return 0.0
    now, left = start_s, count
    sent: deque[tuple[float, int]] = deque()
    used = 0
    while True:
        hour = now // HOUR_S * HOUR_S
        while sent and sent[0][0] + DAY_S <= hour:
            used -= sent.popleft()[1]
        room = min(left, quota - used)
        if per_s:
            room = min(room, math.ceil((hour + HOUR_S - now) * per_s))
        left -= room
        if left == 0:
            return now + _ratio(room, per_s) - start_s
        if room:
            sent.append((hour, room))
            used += room
        now = hour + HOUR_S
