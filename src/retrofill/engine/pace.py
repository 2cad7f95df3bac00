"""How fast blocks may follow one another while somebody has to catch up with them.

A change of stored history folds again what arrives meanwhile, and ends when little is left. Where events arrive faster
than they can be folded that would never be, so blocks are put off: a part of the measured speed may come, and each time
around less is left. Nothing is refused for it, requests wait a little longer.

From the beginning, when no speed is known, the loop rests after each block for a part of the time that it took. Where
traffic takes all of the machine the fold would get little of it, and what comes meanwhile has to be folded, too: what
the fold gets at once makes the change several times shorter. Who sends less than the loop can take notices nothing.

Nor may more wait to be sealed than the engine bears, though sealing rests at the end of a change: the less room is left
for it, the slower blocks come, so that it is never used up.
"""

from __future__ import annotations

from retrofill.limits import (
    REFOLD_PACE,
    REFOLD_PACE_ROWS,
    REFOLD_PACE_WAIT_S,
    REFOLD_ROOM_ROWS,
    REFOLD_ROOM_S,
    REFOLD_ROOM_WAIT_S,
    REFOLD_SHARE,
)


class Pace:
    """The pace of one commit loop. catching_up: whether somebody is; rows_per_s: 0 while it is not known how fast."""

    def __init__(self) -> None:
        self.catching_up = False
        self.rows_per_s = 0.0
        self._due_s = 0.0
        self._rests = False

    def begin(self, *, rests: bool = True) -> None:
        """Somebody begins to catch up. rests: who has so much to do that the loop rests for it from now on."""
        self.catching_up, self._rests = True, rests

    def follow(self, rows: int, seconds: float) -> None:
        """So many rows, all that had come, were caught up with in this time. Too few say nothing of the speed."""
        if rows >= REFOLD_PACE_ROWS:
            self.rows_per_s = REFOLD_PACE * rows / seconds

    def end(self) -> None:
        """Nobody has to catch up any more."""
        self.catching_up, self.rows_per_s = False, 0.0

    def wait_s(
        self, rows: int, *, now_s: float, took_s: float, room: int = REFOLD_ROOM_ROWS
    ) -> float:
        """Say how long the next block is put off after one of so many rows that took so long.

        now_s: of any clock that runs evenly. room: how many rows may come until requests are refused.
        """
        if not self.catching_up:
            return 0.0
        rest_s = took_s * (1 / REFOLD_SHARE - 1) if self._rests else 0.0
        wait_s = min(rest_s, REFOLD_PACE_WAIT_S)
        if self.rows_per_s:
            # A pause before counts for what comes, for as long as a block may be put off.
            earliest, latest = now_s - REFOLD_PACE_WAIT_S, now_s + REFOLD_PACE_WAIT_S
            self._due_s = min(max(self._due_s, earliest) + rows / self.rows_per_s, latest)
            wait_s = max(self._due_s - now_s, wait_s)
        if room < REFOLD_ROOM_ROWS:
            # At such a rate all of the room would last so long; since it grows less, so does the rate.
            slow_s = rows * REFOLD_ROOM_S / max(room, 1)
            wait_s = max(wait_s, min(slow_s, REFOLD_ROOM_WAIT_S))
        return wait_s
