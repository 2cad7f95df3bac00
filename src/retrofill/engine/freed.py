"""Devices that somebody who was deleted since had taken, on the way through a fold of the rows that are left.

Table `freed` of the lake says where (`lake.freed`). Each of its rows is folded as the deleted one would be: in its place
among the others, in order of position or in event time; and it is hidden with the import that it was of, and shown again.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from retrofill.core.refold import Freed
from retrofill.lake.arrival import of_import, positions


def seen_under(freed: pa.Table, bounds: tuple[str, int, int], *, shown: bool) -> pa.Table:
    """Return those rows of table `freed` that are seen once an import is shown again, or hidden. bounds: see `Rule`."""
    mine = of_import(freed, *bounds)
    hidden = freed["hidden"].to_numpy(zero_copy_only=False)
    return freed.filter(pa.array(np.where(mine, shown, ~hidden)))


class Freeing:
    """Where devices become nobody's, in the order of a fold. rows: of table `freed`; devices: all others are left out.

    Of events with one time those that were deleted come last: what else decides their order is gone with them.
    """

    def __init__(self, rows: pa.Table, devices: pa.Array | None = None, *, by_time: bool) -> None:
        self._by_time = by_time
        if devices is not None:
            rows = rows.filter(pc.is_in(rows["device_id"], value_set=devices))
        keys = self._keys_of(rows)
        order = np.argsort(keys, kind="stable")
        sides = rows.select(["device_id", "amplitude_id", "event_time"]).take(pa.array(order))
        self._keys = keys[order]
        self._freed = [
            Freed(*one) for one in zip(*(side.to_pylist() for side in sides.columns), strict=True)
        ]
        self._next = 0

    def among(self, rows: pa.Table) -> dict[int, list[Freed]]:
        """Return what is freed before the last of these rows, the next of the fold: by the place of the row after it."""
        found: dict[int, list[Freed]] = {}
        if self._next == len(self._keys) or not rows.num_rows:
            return found
        keys = self._keys_of(rows)
        end = max(self._next, int(np.searchsorted(self._keys, keys[-1])))
        places = np.searchsorted(keys, self._keys[self._next : end], side="right").tolist()
        for place, one in zip(places, self._freed[self._next : end], strict=True):
            found.setdefault(place, []).append(one)
        self._next = end
        return found

    def rest(self) -> list[Freed]:
        """Return what is freed after the last row."""
        first, self._next = self._next, len(self._keys)
        return self._freed[first:]

    def _keys_of(self, rows: pa.Table) -> NDArray[np.int64]:
        return np.asarray(rows["event_time"].to_numpy() if self._by_time else positions(rows))
