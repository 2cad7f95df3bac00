"""Rates, the daily quota and the hourly property updates: who may send how much.

Counting and asking are two calls. A request is asked about before its commit and counted only once it is answered 200,
so what was refused weighs nothing. All three count in steps (a second, an hour), and a window of 30 s is the step under
way with the 29 before it: who waits 30 s after a burst finds it gone, which is how long the SDKs wait.

`_Window` counts ids. Each id has a slot, a place in an array of totals; a step under way is the list of slots counted
in it, a past step its distinct slots with their counts, taken off the totals when the step leaves the window. A slot
whose total falls to 0 is used again. So a request costs two dictionary look-ups and a few vector operations for each
of its ids, and memory follows the ids seen within one window. At the bound of ids those with the smallest counts are
forgotten, a sixteenth at a time: they may send that much again, nobody is refused for it.

Source: contract, ingest 3b and 3c. Nothing here reads a clock.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import repeat

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from retrofill.limits import MS_PER_HOUR, MS_PER_S, QUOTA_IDS_MAX, RATE_IDS_MAX

Ids = Sequence[str | None]  # one entry an event, None where it has no such id
Slots = NDArray[np.int64]


class Accepted(Struct, frozen=True):
    """A request whose events are stored. events: how many it held. Answered 200."""

    events: int
    server_upload_ms: int


class Throttled(Struct, frozen=True):
    """A request refused for its rate or its daily quota. Answered 429; nothing of it is stored or counted.

    devices, users: id → events a second now, this request's included, rounded up.
    quota_devices, quota_users: id → rows stored in the last 24 hours.
    events: indexes of the events whose device or user is in one of the four. retry_after_s: ≥ 1.
    """

    eps_threshold: int
    devices: dict[str, int]
    users: dict[str, int]
    quota_devices: dict[str, int]
    quota_users: dict[str, int]
    events: list[int]
    retry_after_s: int


class Silenced(Struct, frozen=True):
    """A request with events of devices that the operator silenced. Answered 400; the rest as in `Throttled`."""

    eps_threshold: int
    silenced_devices: list[str]
    silenced_events: list[int]
    devices: dict[str, int]
    users: dict[str, int]
    quota_devices: dict[str, int]
    quota_users: dict[str, int]
    events: list[int]


class _Step:
    """A past step: its distinct slots and how often each was counted."""

    __slots__ = ("counts", "number", "slots")

    def __init__(self, number: int, slots: Slots, counts: Slots) -> None:
        self.number = number
        self.slots = slots
        self.counts = counts


# Below this many ids plain Python is faster than the fixed cost of vector operations.
_FEW = 48
# A long step is folded whenever its list is this long, so that an hour of events stays small.
_OPEN_MAX = 1 << 17


class _Slots(dict[str | None, int]):
    """The slot of each id; asking for the slot of a new id with [] gives it one."""

    def __init__(self) -> None:
        super().__init__({None: 0})
        self.id_of: list[str | None] = [None]  # by slot
        self.free: list[int] = []

    def __missing__(self, one: str) -> int:
        if self.free:
            slot = self.free.pop()
            self.id_of[slot] = one
        else:
            slot = len(self.id_of)
            self.id_of.append(one)
        self[one] = slot
        return slot

    def release(self, slots: list[int]) -> None:
        for slot in slots:
            del self[self.id_of[slot]]
            self.id_of[slot] = None
        self.free += slots


class _Window:
    """Counts of ids over the steps of one window. step_ms: width of a step. ids_max: see the module."""

    def __init__(self, step_ms: int, ids_max: int) -> None:
        self.step_ms = step_ms
        self.ids_max = ids_max
        self.newest = -1  # number of the step under way
        self._slot_of = _Slots()
        self._totals: Slots = np.zeros(1024, np.int64)  # slot 0, for no id, stays 0
        self._view = self._totals.data
        self._peak = 0  # no total is higher
        self._grown = 0  # how much of it is counts of any ids since it was exact
        self._open = array("q")  # slots counted in the step under way, as they came
        self._past: deque[_Step] = deque()

    def roll(self, now_ms: int, steps: int) -> None:
        """Let go of what is older than the `steps` newest steps. A clock that steps back stays in its last step."""
        number = now_ms // self.step_ms
        if number > self.newest:
            self._close()
            self.newest = number
        while self._past and self._past[0].number <= self.newest - steps:
            self._take_off(self._past.popleft())

    def total(self, one: str) -> int:
        """Return the count of one id."""
        return self._view[self._slot_of.get(one, 0)]

    def over(self, ids: Ids, most: int) -> dict[str, int]:
        """Return the ids whose count would exceed `most` with these, each with that sum."""
        if self._peak + len(ids) > most and self._grown > len(self._totals) // 16:
            self._peak, self._grown = int(self._totals.max()), 0
        if self._peak + len(ids) <= most or (len(ids) > _FEW and self._fit(ids, most)):
            return {}
        view, slot_of = self._view, self._slot_of
        sums = {
            one: count + view[slot_of.get(one, 0)]
            for one, count in Counter(ids).items()
            if one is not None
        }
        return {one: count for one, count in sums.items() if count > most}

    def _fit(self, ids: Ids, most: int) -> bool:
        """Say whether surely none of these exceeds `most`, without a look at each."""
        slots = np.fromiter(map(self._slot_of.get, ids, repeat(0)), np.int64, len(ids))
        totals = self._totals
        np.add.at(totals, slots, 1)
        # Slot 0 now holds what is no id or not counted yet: too many of them need a closer look.
        fit = int(totals[slots].max()) <= most
        np.subtract.at(totals, slots, 1)
        return fit

    def count(self, ids: Ids) -> None:
        """Count each id once for each time it stands in the list, in the step under way."""
        slots = self._slots(ids)
        self._peak += len(slots)
        self._grown += len(slots)
        if len(slots) < _FEW:
            view = self._view
            for slot in slots:
                view[slot] += 1
            view[0] = 0
        else:
            np.add.at(self._totals, np.frombuffer(slots, np.int64), 1)
            self._totals[0] = 0
        self._open.extend(slots)
        if len(self._open) > _OPEN_MAX:
            self._close()

    def load(self, number: int, counts: dict[str, int]) -> None:
        """Count what was counted before a restart. Steps come in order, none newer than what is counted later."""
        assert number >= self.newest
        self.roll(number * self.step_ms, number + 1)
        slots = np.array(self._slots(list(counts)), np.int64)
        numbers = np.fromiter(counts.values(), np.int64, len(counts))
        # A step's slots stand in order; ids that were forgotten leave slots that are given out in any.
        order = np.argsort(slots)
        slots, numbers = slots[order], numbers[order]
        self._totals[slots] += numbers
        self._peak += int(numbers.max(initial=0))
        self._past.append(_Step(number, slots, numbers))

    def change(self, number: int, counts: dict[str, int]) -> None:
        """Count ids more often, or less, in a step of the window, which must have been rolled."""
        self._close()
        less = [one for one, count in counts.items() if count < 0 and one in self._slot_of]
        ids = [*less, *(one for one, count in counts.items() if count > 0)]
        slots = np.array(self._slots(ids), np.int64)
        by = np.array([counts[one] for one in ids], np.int64)
        at = next((at for at, step in enumerate(self._past) if step.number >= number), None)
        if at is not None and self._past[at].number == number:
            before = self._past[at]
            del self._past[at]
        else:
            before = _Step(number, slots[:0], by[:0])
            at = len(self._past) if at is None else at
        every, places = np.unique(np.concatenate([before.slots, slots]), return_inverse=True)
        were, are = np.zeros(len(every), np.int64), np.zeros(len(every), np.int64)
        were[places[: len(before.slots)]] = before.counts
        np.add.at(are, places, np.concatenate([before.counts, by]))
        # An id that was forgotten and came again counts less than it should, never less than nothing.
        are = np.maximum(are, 0)
        totals = self._totals
        totals[every] += are - were
        self._peak = int(totals.max())
        if are.any():
            self._past.insert(at, _Step(number, every[are > 0], are[are > 0]))
        self._slot_of.release(every[(totals[every] == 0) & (every > 0)].tolist())

    def steps(self) -> Iterator[tuple[int, dict[str, int]]]:
        """Yield (number, id → count) of each step in order, as `load` takes it."""
        self._close()
        names = self._slot_of.id_of
        for step in self._past:
            ids = [names[slot] for slot in step.slots.tolist()]
            yield (
                step.number,
                {
                    one: count
                    for one, count in zip(ids, step.counts.tolist(), strict=True)
                    if one is not None
                },
            )

    def steps_until(self, sums: dict[str, int], most: int, steps: int) -> int:
        """Return after how many steps every one of these sums (as `over` gave them) is at most `most`."""
        slots = np.sort(np.array([self._slot_of.get(one, 0) for one in sums], np.int64))
        left = np.array(
            [sums[one] for one in sorted(sums, key=lambda one: self._slot_of.get(one, 0))]
        )
        for step in self._past:
            found = np.searchsorted(step.slots, slots)
            found[found == len(step.slots)] = 0
            left -= np.where(step.slots[found] == slots, step.counts[found], 0)
            if (left <= most).all():
                return max(step.number + steps - self.newest, 1)
        return steps

    def _slots(self, ids: Ids) -> array[int]:
        slot_of = self._slot_of
        excess = len(slot_of) + len(ids) - self.ids_max
        if excess > 0:
            self._forget(max(excess, self.ids_max // 16))
        slots = array("q", map(slot_of.__getitem__, ids))
        room = len(self._totals)
        if len(slot_of.id_of) > room:
            more = np.zeros(max(len(slot_of.id_of), 2 * room), np.int64)
            more[:room] = self._totals
            self._totals = more
            self._view = more.data
        return slots

    def _close(self) -> None:
        """Fold the slots counted so far into a step."""
        if not self._open:
            return
        counts = np.bincount(np.frombuffer(self._open, np.int64))
        if self._past and self._past[-1].number == self.newest:
            before = self._past.pop()
            counts = np.pad(counts, (0, max(0, int(before.slots[-1]) + 1 - len(counts))))
            counts[before.slots] += before.counts
        counts[0] = 0
        slots = np.flatnonzero(counts)
        self._open = array("q")
        if len(slots):
            self._past.append(_Step(self.newest, slots, counts[slots]))

    def _take_off(self, step: _Step) -> None:
        totals = self._totals
        totals[step.slots] -= step.counts
        self._slot_of.release(step.slots[totals[step.slots] == 0].tolist())

    def _forget(self, number: int) -> None:
        """Forget the ids with the smallest counts."""
        self._close()
        used = np.flatnonzero(self._totals)
        number = min(number, len(used))
        gone = used[np.argpartition(self._totals[used], number - 1)[:number]]
        stays = np.ones(len(self._totals), bool)
        stays[gone] = False
        self._totals[gone] = 0
        for step in self._past:
            kept = stays[step.slots]
            step.slots, step.counts = step.slots[kept], step.counts[kept]
        self._past = deque(step for step in self._past if len(step.slots))
        self._slot_of.release(gone.tolist())


class Rates:
    """Events a second of each device and each user of one project on one endpoint, as the mean over a window."""

    def __init__(self, ids_max: int = RATE_IDS_MAX) -> None:
        self._ids_max = ids_max
        self._devices = _Window(MS_PER_S, ids_max)
        self._users = _Window(MS_PER_S, ids_max)

    def check(
        self, devices: Ids, users: Ids, *, eps: int, window_s: int, now_ms: int
    ) -> Throttled | None:
        """Refuse a request with which an id would exceed eps × window_s events in the window; None: it may pass.

        devices, users: one entry an event. eps: 0 is off. Quota fields of the answer are empty, see `with_quota`.
        """
        if not eps:
            return None
        self._roll(now_ms, window_s)
        most = eps * window_s
        over_devices = self._devices.over(devices, most)
        over_users = self._users.over(users, most)
        if not over_devices and not over_users:
            return None
        wait_s = max(
            self._devices.steps_until(over_devices, most, window_s) if over_devices else 1,
            self._users.steps_until(over_users, most, window_s) if over_users else 1,
        )
        return Throttled(
            eps,
            {one: -(-count // window_s) for one, count in over_devices.items()},
            {one: -(-count // window_s) for one, count in over_users.items()},
            {},
            {},
            _indexes(devices, over_devices, users, over_users),
            wait_s,
        )

    def count(self, devices: Ids, users: Ids, *, window_s: int, now_ms: int) -> None:
        """Count a request that is answered 200."""
        self._roll(now_ms, window_s)
        self._devices.count(devices)
        self._users.count(users)

    def _roll(self, now_ms: int, window_s: int) -> None:
        if now_ms // MS_PER_S < self._devices.newest - window_s:
            # The clock was set back by more than a window: what it said before cannot be compared any more.
            self._devices = _Window(MS_PER_S, self._ids_max)
            self._users = _Window(MS_PER_S, self._ids_max)
        self._devices.roll(now_ms, window_s)
        self._users.roll(now_ms, window_s)


class Tally:
    """One count over a window: the events, requests or mappings of a whole project."""

    def __init__(self) -> None:
        self._steps: deque[list[int]] = deque()  # [second, count], oldest first
        self._total = 0

    def wait_s(self, more: int, *, most: int, window_s: int, now_ms: int) -> int:
        """Return 0 if `more` fit under `most` now, else the seconds (≥ 1) until they will, at most window_s.

        `/usermap` asks for 1: a request may hold more mappings than a whole window, and the contract throttles
        "until the window falls below".
        """
        now_s = self._roll(now_ms, window_s)
        left = self._total + more
        if left <= most:
            return 0
        for second, count in self._steps:
            left -= count
            if left <= most:
                return max(second + window_s - now_s, 1)
        return window_s

    def count(self, amount: int, *, window_s: int, now_ms: int) -> None:
        """Count what was answered 200."""
        now_s = self._roll(now_ms, window_s)
        if not self._steps or self._steps[-1][0] < now_s:
            self._steps.append([now_s, 0])
        self._steps[-1][1] += amount
        self._total += amount

    def _roll(self, now_ms: int, window_s: int) -> int:
        now_s = now_ms // MS_PER_S
        steps = self._steps
        if steps and now_s < steps[-1][0]:
            if now_s < steps[-1][0] - window_s:
                steps.clear()
                self._total = 0
            else:
                now_s = steps[-1][0]
        while steps and steps[0][0] <= now_s - window_s:
            self._total -= steps.popleft()[1]
        return now_s


class ProjectRates:
    """Events and requests a second of one project on all endpoints: the `starter` profile."""

    def __init__(self) -> None:
        self._events = Tally()
        self._requests = Tally()

    def check(
        self, events: int, *, eps: int, requests_per_s: int, window_s: int, now_ms: int
    ) -> Throttled | None:
        """Refuse a request of a project over one of its rates (0 is off); every index of it is listed then."""
        wait_s = 0
        if eps:
            most = eps * window_s
            wait_s = self._events.wait_s(events, most=most, window_s=window_s, now_ms=now_ms)
        if requests_per_s:
            most = requests_per_s * window_s
            wait = self._requests.wait_s(1, most=most, window_s=window_s, now_ms=now_ms)
            wait_s = max(wait_s, wait)
        if not wait_s:
            return None
        return Throttled(eps, {}, {}, {}, {}, list(range(events)), wait_s)

    def count(self, events: int, *, window_s: int, now_ms: int) -> None:
        """Count a request that is answered 200."""
        self._events.count(events, window_s=window_s, now_ms=now_ms)
        self._requests.count(1, window_s=window_s, now_ms=now_ms)


HOURS = 24  # steps of the daily quota


class Quota:
    """Stored rows of each device and user of one project in 24 rolling hours, by steps of one hour of server time."""

    def __init__(self, ids_max: int = QUOTA_IDS_MAX) -> None:
        self._devices = _Window(MS_PER_HOUR, ids_max)
        self._users = _Window(MS_PER_HOUR, ids_max)

    def over(
        self, devices: Ids, users: Ids, *, limit: int, now_ms: int
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Return the devices and the users whose rows would exceed `limit` (0 is off) with these, one an event.

        Each with its rows stored in the last 24 hours, without these.
        """
        if not limit:
            return {}, {}
        found = []
        for window, ids in ((self._devices, devices), (self._users, users)):
            window.roll(now_ms, HOURS)
            found.append({one: window.total(one) for one in window.over(ids, limit)})
        return found[0], found[1]

    def add(self, devices: Ids, users: Ids, *, now_ms: int) -> None:
        """Count stored rows, one entry a row; neither duplicates nor identifies are rows here."""
        for window, ids in ((self._devices, devices), (self._users, users)):
            window.roll(now_ms, HOURS)
            window.count(ids)

    def change(
        self,
        devices: Iterable[tuple[int, str, int]],
        users: Iterable[tuple[int, str, int]],
        *,
        now_ms: int,
    ) -> None:
        """Count stored rows of the past, or take some back: (hour, id, rows). Those of before the window are nothing."""
        for window, rows in ((self._devices, devices), (self._users, users)):
            window.roll(now_ms, HOURS)
            hours: dict[int, dict[str, int]] = {}
            for hour, one, count in rows:
                hours.setdefault(hour, {})[one] = count
            for hour, counts in hours.items():
                if window.newest - HOURS < hour <= window.newest:
                    window.change(hour, counts)

    def rows(self) -> tuple[list[tuple[int, dict[str, int]]], list[tuple[int, dict[str, int]]]]:
        """Return (hour, id → rows) of devices and of users, oldest first. hour: hours since the epoch."""
        return list(self._devices.steps()), list(self._users.steps())

    def load(
        self,
        devices: Iterable[tuple[int, dict[str, int]]],
        users: Iterable[tuple[int, dict[str, int]]],
    ) -> None:
        """Take what `rows` gave before a restart, or what was counted anew in the lake, into an empty quota."""
        for window, rows in ((self._devices, devices), (self._users, users)):
            for hour, counts in rows:
                window.load(hour, counts)


def with_quota(
    throttled: Throttled | None,
    devices: Ids,
    users: Ids,
    over: tuple[dict[str, int], dict[str, int]],
    *,
    eps: int,
    now_ms: int,
) -> Throttled | None:
    """Join what `Rates.check` and `Quota.over` said of one request into one refusal, None if both let it pass."""
    quota_devices, quota_users = over
    if not quota_devices and not quota_users:
        return throttled
    # The next hour lets the oldest of 24 steps go; whether that is enough is not known before.
    wait_s = -(-(MS_PER_HOUR - now_ms % MS_PER_HOUR) // MS_PER_S)
    said = throttled or Throttled(eps, {}, {}, {}, {}, [], 1)
    events = _indexes(
        devices, said.devices.keys() | quota_devices, users, said.users.keys() | quota_users
    )
    return Throttled(
        eps, said.devices, said.users, quota_devices, quota_users, events, max(wait_s, 1)
    )


def silence(
    throttled: Throttled | None, devices: Ids, silenced: Collection[str], *, eps: int
) -> Silenced | None:
    """Refuse a request with events of silenced devices, None if there are none. Comes before 429: contract, events 12."""
    if not silenced:
        return None
    events = [index for index, device in enumerate(devices) if device in silenced]
    if not events:
        return None
    named = dict.fromkeys(device for device in devices if device in silenced)
    said = throttled or Throttled(eps, {}, {}, {}, {}, [], 1)
    return Silenced(
        eps,
        [device for device in named if device is not None],
        events,
        said.devices,
        said.users,
        said.quota_devices,
        said.quota_users,
        said.events,
    )


class UpdateWindow:
    """Property updates of one person in a rolling hour: a flat list [ms, count, ms, count, …] in order of time.

    The list is part of a person's state, so it is never changed: `added` returns another. Only updates that were
    allowed are added, which bounds it by the limit.
    """

    @staticmethod
    def allowed(updates: list[int], now_ms: int, limit: int) -> bool:
        """Say whether one more update fits under the limit (0 is off) in the hour that ends now."""
        if not limit or sum(updates[1::2]) < limit:
            return True
        return sum(updates[2 * _gone(updates, now_ms) + 1 :: 2]) < limit

    @staticmethod
    def added(updates: list[int], now_ms: int) -> list[int]:
        """Return the list with one more update now, without what is an hour old."""
        kept = updates[2 * _gone(updates, now_ms) :]
        if kept and kept[-2] >= now_ms:
            kept[-1] += 1
        else:
            kept += (now_ms, 1)
        return kept


def _gone(updates: list[int], now_ms: int) -> int:
    """How many entries are an hour old or older."""
    return bisect_right(updates[::2], now_ms - MS_PER_HOUR)


def _indexes(
    devices: Ids, over_devices: Collection[str], users: Ids, over_users: Collection[str]
) -> list[int]:
    return [
        index
        for index, (device, user) in enumerate(zip(devices, users, strict=True))
        if device in over_devices or user in over_users
    ]
