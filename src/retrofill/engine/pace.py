"""How fast blocks may follow one another while somebody has to catch up with them.

A change of stored history folds again what arrives meanwhile, and ends when little is left. Where events arrive faster
than they can be folded that would never be, so blocks are put off: a part of the measured speed may come, and each time
around less is left. Nothing is refused for it, requests wait a little longer.
"""

from __future__ import annotations

from retrofill.limits import REFOLD_PACE, REFOLD_PACE_ROWS, REFOLD_PACE_WAIT_S


class Pace:
    """The pace of one commit loop. rows_per_s: 0 while nobody has to catch up."""

    def __init__(self) -> None:
        self.rows_per_s = 0.0
        self._due_s = 0.0

    def follow(self, rows: int, seconds: float) -> None:
        """So many rows, all that had come, were caught up with in this time. Too few say nothing of the speed."""
        if rows >= REFOLD_PACE_ROWS:
            self.rows_per_s = REFOLD_PACE * rows / seconds

    def end(self) -> None:
        """Nobody has to catch up any more."""
        self.rows_per_s = 0.0

    def wait_s(self, rows: int, *, now_s: float) -> float:
        """Say how long the next block is put off after one of so many rows. now_s: of any clock that runs evenly."""
        if not self.rows_per_s:
            return 0.0
        # A pause before counts for what comes, for as long as a block may be put off.
        earliest, latest = now_s - REFOLD_PACE_WAIT_S, now_s + REFOLD_PACE_WAIT_S
        self._due_s = min(max(self._due_s, earliest) + rows / self.rows_per_s, latest)
        return max(self._due_s - now_s, 0.0)
