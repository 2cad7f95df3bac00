"""Time as a value: the one place that reads the clock, so that everything else can be given a time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Says what time it is. Tests pass their own."""

    def now_ms(self) -> int:
        """Return milliseconds since the epoch, UTC."""


class SystemClock:
    """The clock of this machine."""

    def now_ms(self) -> int:
        """Return milliseconds since the epoch, UTC."""
        return time.time_ns() // 1_000_000
