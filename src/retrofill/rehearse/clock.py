"""Time that passes at once: pauses of a run take no time, its order is as if they had.

The sender waits through the clock it is given. Here a pause ends when nothing is under way any more, and the time is
then what it would have been; while requests are taken, time goes on by what they would have taken.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from typing import TypeVar

T = TypeVar("T")

_TURNS = (
    25  # of the loop without anything under way, until a pause is over: whoever goes on needs a few
)


class Timer:
    """A call to come."""

    __slots__ = ("call", "cancelled", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        """Do not call."""
        self.cancelled = True


class VirtualClock:
    """Seconds since the epoch as a sender and an engine know them. Belongs to one loop."""

    def __init__(self, start_ms: int) -> None:
        self._now = start_ms / 1000
        self._timers: list[tuple[float, int, Timer]] = []
        self._turn = count()
        self._busy = 0
        self._rest = asyncio.Event()
        self._rest.set()

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._now

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return int(self._now * 1000)

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call something after a while."""
        timer = Timer(self._now + max(0.0, seconds), call)
        heapq.heappush(self._timers, (timer.when, next(self._turn), timer))
        return timer

    def spend(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds

    def begin(self) -> None:
        """Something is under way: no pause ends before it has."""
        self._busy += 1
        self._rest.clear()

    def end(self) -> None:
        """It has."""
        self._busy -= 1
        if not self._busy:
            self._rest.set()

    async def run(self, until: asyncio.Future[T]) -> T:
        """End pauses, the next one first, until something is done; return what it gives."""
        turns = 0
        while not until.done():
            if self._busy:
                await self._rest.wait()
                turns = 0
                continue
            await asyncio.sleep(0)
            turns += 1
            if turns >= _TURNS and self._timers:
                self._jump()
                turns = 0
        return until.result()

    def _jump(self) -> None:
        when, _, timer = heapq.heappop(self._timers)
        if not timer.cancelled:
            self._now = max(self._now, when)
            timer.call()
